/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Error texts and the log.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/err.h"
#include "nbdrs/log.h"

/* --- err -------------------------------------------------------------------------------------- */

static void test_err_set(void **state)
{
	struct err err;

	assert_int_equal(err_set(&err, -EINVAL, "bad %s %d", "size", 7), -EINVAL);
	assert_string_equal(err.msg, "bad size 7");
	assert_int_equal(err_set(NULL, -EIO, "nobody asks"), -EIO);
}

static void test_err_prefix(void **state)
{
	struct err err;

	err_set(&err, 0, "no such file");
	assert_int_equal(err_prefix(&err, -ENOENT, "export \"%s\"", "disk0"), -ENOENT);
	assert_string_equal(err.msg, "export \"disk0\": no such file");
	assert_int_equal(err_prefix(NULL, -ENOENT, "x"), -ENOENT);
}

/* Too long texts are cut and say so; nothing is written behind the end. */
static void test_err_truncates(void **state)
{
	struct {
		struct err err;
		char guard[8];
	} s;
	char longest[sizeof(s.err.msg) + 100];

	memset(longest, 'x', sizeof(longest) - 1);
	longest[sizeof(longest) - 1] = '\0';
	memset(s.guard, 'g', sizeof(s.guard));

	err_set(&s.err, 0, "%s", longest);
	assert_int_equal(strlen(s.err.msg), sizeof(s.err.msg) - 1);
	assert_string_equal(s.err.msg + sizeof(s.err.msg) - 4, "...");

	err_prefix(&s.err, 0, "%s", longest);
	assert_int_equal(strlen(s.err.msg), sizeof(s.err.msg) - 1);
	assert_string_equal(s.err.msg + sizeof(s.err.msg) - 4, "...");

	/* A text that just fits is not marked. */
	longest[sizeof(s.err.msg) - 1] = '\0';
	err_set(&s.err, 0, "%s", longest);
	assert_string_equal(s.err.msg, longest);
	longest[sizeof(s.err.msg) - 1 - 4] = '\0';
	err_set(&s.err, 0, "%s", longest);
	err_prefix(&s.err, 0, "ab");
	assert_memory_equal(s.err.msg, "ab: xx", 6);
	assert_string_equal(s.err.msg + sizeof(s.err.msg) - 4, "xxx");
	assert_memory_equal(s.guard, "gggggggg", 8);
}

static void test_err_name(void **state)
{
	assert_string_equal(err_name(ENOSPC), "ENOSPC");
	assert_string_equal(err_name(-EIO), "EIO");
	assert_string_equal(err_name(-9999), "errno 9999");
	assert_string_equal(err_name(0), "errno 0");
	assert_string_equal(err_name(INT32_MIN), "errno 2147483648");
}

/* --- log -------------------------------------------------------------------------------------- */

/* Standard error, caught in a file while `log` runs. */
struct capture {
	int saved, file;
	char text[8192];
};

static void capture_start(struct capture *c)
{
	char path[] = "/tmp/nbdrs-log-XXXXXX";

	c->file = mkstemp(path);
	assert_true(c->file >= 0);
	unlink(path);
	c->saved = dup(STDERR_FILENO);
	assert_true(dup2(c->file, STDERR_FILENO) >= 0);
}

static void capture_end(struct capture *c)
{
	ssize_t n;

	assert_true(dup2(c->saved, STDERR_FILENO) >= 0);
	n = pread(c->file, c->text, sizeof(c->text) - 1, 0);
	assert_true(n >= 0);
	c->text[n] = '\0';
	close(c->file);
	close(c->saved);
}

static void test_log_levels(void **state)
{
	enum log_level level;
	struct capture c;
	char want[200];

	assert_int_equal(log_level_parse("debug", &level), 0);
	assert_int_equal(level, LOG_LEVEL_DEBUG);
	assert_int_equal(log_level_parse("error", &level), 0);
	assert_int_equal(level, LOG_LEVEL_ERROR);
	assert_int_equal(log_level_parse("loud", &level), -EINVAL);
	assert_int_equal(log_level_parse("", &level), -EINVAL);
	assert_int_equal(level, LOG_LEVEL_ERROR); /* not written on failure */

	capture_start(&c);
	log_set_level(LOG_LEVEL_WARN);
	log_error("first n=%d", 1);
	log_warn("second");
	log_info("third");
	log_debug("fourth");
	log_set_level(LOG_LEVEL_DEBUG);
	log_debug("fifth");
	log_set_level(LOG_LEVEL_INFO);
	capture_end(&c);
	snprintf(want, sizeof(want),
		 "%1$s: error: first n=1\n%1$s: warn: second\n%1$s: debug: fifth\n",
		 program_invocation_short_name);
	assert_string_equal(c.text, want);
}

/* What a peer sends can't end the line, begin another or steer a terminal. */
static void test_log_escapes(void **state)
{
	struct capture c;
	char want[200];

	capture_start(&c);
	errno = ENOENT;
	log_info("name=%s", "a\nb\x1b[2J\x7f\tz\xc3\xa4");
	assert_int_equal(errno, ENOENT);
	capture_end(&c);
	snprintf(want, sizeof(want), "%s: info: name=a\\nb\\x1b[2J\\x7f\\x09z\xc3\xa4\n",
		 program_invocation_short_name);
	assert_string_equal(c.text, want);
}

/* However long, one line; the worst case of escaping included. */
static void test_log_long(void **state)
{
	static char longest[20000];
	struct capture c;

	memset(longest, '\1', sizeof(longest) - 1);
	capture_start(&c);
	log_info("%s", longest);
	capture_end(&c);
	assert_int_equal(strlen(c.text) - 1, strcspn(c.text, "\n"));
	assert_true(strlen(c.text) <= 4096);

	memset(longest, 'y', sizeof(longest) - 1);
	capture_start(&c);
	log_info("%s", longest);
	capture_end(&c);
	assert_non_null(strstr(c.text, "yyy...\n"));
}

/* What a process logs whose JOURNAL_STREAM is `before`, the device and inode of its standard error, `after`. */
static void log_in_stream(const char *before, const char *after, char *text, size_t text_len)
{
	int out[2];
	pid_t pid;
	char stream[64];
	struct stat st;
	ssize_t n;

	assert_int_equal(pipe(out), 0);
	assert_int_equal(fstat(out[1], &st), 0);
	snprintf(stream, sizeof(stream), "%s%ju:%ju%s", before, (uintmax_t)st.st_dev,
		 (uintmax_t)st.st_ino, after);
	fflush(NULL);
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0) { /* a process of its own, for the log looks once */
		dup2(out[1], STDERR_FILENO);
		setenv("JOURNAL_STREAM", stream, 1);
		execl("/proc/self/exe", program_invocation_short_name, "--log-one", NULL);
		_exit(127);
	}
	close(out[1]);
	n = read(out[0], text, text_len - 1);
	assert_true(n > 0);
	text[n] = '\0';
	close(out[0]);
}

/* The journal wants "<6>" before the text, but only if standard error really is its stream. */
static void test_log_journal(void **state)
{
	static const char *const others[][2] = {
		{ "1", "" }, { "", "1" }, { "", "x" }, { "-", "" }, { "", "99999999999999999999" },
	};
	char text[256];

	log_in_stream("", "", text, sizeof(text));
	assert_string_equal(text, "<4>journal test\n");
	for (size_t i = 0; i < ARRAY_LEN(others); i++) {
		log_in_stream(others[i][0], others[i][1], text, sizeof(text));
		assert_non_null(strstr(text, "warn: journal test\n"));
	}
}

static void test_log_gate(void **state)
{
	struct log_gate gate = { 0 };
	unsigned suppressed = 99;

	for (int i = 0; i < LOG_BURST; i++) {
		assert_true(log_gate_open(&gate, &suppressed));
		assert_int_equal(suppressed, 0);
	}
	for (int i = 0; i < 7; i++)
		assert_false(log_gate_open(&gate, &suppressed));
	/* As if the window had begun long ago. */
	gate.window_start_ms -= LOG_WINDOW_MS;
	assert_true(log_gate_open(&gate, &suppressed));
	assert_int_equal(suppressed, 7);
	assert_true(log_gate_open(&gate, &suppressed));
	assert_int_equal(suppressed, 0);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_err_set),       cmocka_unit_test(test_err_prefix),
		cmocka_unit_test(test_err_truncates), cmocka_unit_test(test_err_name),
		cmocka_unit_test(test_log_levels),    cmocka_unit_test(test_log_escapes),
		cmocka_unit_test(test_log_long),      cmocka_unit_test(test_log_journal),
		cmocka_unit_test(test_log_gate),
	};

	if (argc == 2 && strcmp(argv[1], "--log-one") == 0) {
		log_warn("journal test");
		return 0;
	}
	unsetenv("JOURNAL_STREAM");
	return cmocka_run_group_tests(tests, NULL, NULL);
}
