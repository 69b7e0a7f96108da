/* SPDX-License-Identifier: GPL-3.0-or-later */
/* The command line of nbdrs-attach (tool/options.c). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "options.h"

enum { WORDS_MAX = 16 };

/* Splits at blanks; "''" is the empty word. */
static int parse(const char *line, struct options *o, struct err *err)
{
	static char copy[256], program[] = "nbdrs-attach", empty[] = "";
	char *argv[WORDS_MAX + 2] = { program }, *rest = copy, *w;
	int argc = 1;

	(void)snprintf(copy, sizeof(copy), "%s", line);
	err->msg[0] = '\0';
	while ((w = strsep(&rest, " ")) && argc < WORDS_MAX)
		if (*w)
			argv[argc++] = strcmp(w, "''") == 0 ? empty : w;
	return options_parse(argc, argv, o, err);
}

static void test_defaults(void **state)
{
	struct options o;
	struct err err;

	assert_int_equal(parse("disk0", &o, &err), 0);
	assert_int_equal(o.action, ACT_ATTACH);
	assert_string_equal(o.export, "disk0");
	assert_null(o.device);
	assert_null(o.control);
	assert_int_equal(o.connections, 1);
	assert_int_equal(o.block_size, 0);
	assert_int_equal(o.timeout_s, 0);
	assert_int_equal(o.dead_conn_timeout_s, 300);
	assert_int_equal(o.wait_s, 10);
	assert_false(o.is_read_only || o.force || o.json || o.no_udev);
}

static void test_attach(void **state)
{
	struct options o;
	struct err err;

	/* Options may follow the names. */
	assert_int_equal(
		parse("disk0 /dev/nbd3 -r -C4 --wait 2m --block-size 4Ki --control /c --no-udev --force",
		      &o, &err),
		0);
	assert_string_equal(o.export, "disk0");
	assert_string_equal(o.device, "/dev/nbd3");
	assert_string_equal(o.control, "/c");
	assert_int_equal(o.connections, 4);
	assert_int_equal(o.wait_s, 120);
	assert_int_equal(o.block_size, 4096);
	assert_true(o.is_read_only && o.no_udev && o.force);
	/* An export may be called like a device, or begin with a dash. */
	assert_int_equal(parse("nbd1", &o, &err), 0);
	assert_string_equal(o.export, "nbd1");
	assert_int_equal(parse("-- -x nbd2", &o, &err), 0);
	assert_string_equal(o.export, "-x");
}

/* KERNEL-NBD: with several connections "none" would be 30 s, and dead must be longer than slow. */
static void test_timeouts(void **state)
{
	static const struct {
		const char *line;
		unsigned timeout_s, dead_conn_s;
	} cases[] = {
		{ "x -C 1", 0, 300 },
		{ "x -C 2", 120, 300 },
		{ "-C 2 --timeout 0 x", 0, 300 },
		{ "--timeout 0 -C 2 x", 0, 300 },
		{ "x --timeout 30s", 30, 300 },
		{ "x --timeout 400", 400, 800 },
		{ "x -C 2 --dead-conn-timeout 60", 59, 60 },
		{ "x -C 2 --dead-conn-timeout 0", 120, 0 },
		{ "x --timeout 5 --dead-conn-timeout 6", 5, 6 },
	};
	struct options o;
	struct err err;

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		assert_int_equal(parse(cases[i].line, &o, &err), 0);
		assert_int_equal(o.timeout_s, cases[i].timeout_s);
		assert_int_equal(o.dead_conn_timeout_s, cases[i].dead_conn_s);
	}
}

static void test_others(void **state)
{
	struct options o;
	struct err err;

	assert_int_equal(parse("-d disk0 --force --wait 3", &o, &err), 0);
	assert_int_equal(o.action, ACT_DETACH);
	assert_string_equal(o.device, "disk0");
	assert_true(o.force);
	assert_int_equal(parse("--detach /dev/nbd0", &o, &err), 0);
	assert_int_equal(parse("-l", &o, &err), 0);
	assert_int_equal(o.action, ACT_LIST);
	assert_false(o.json);
	assert_int_equal(parse("--json --list", &o, &err), 0);
	assert_true(o.json);
	assert_int_equal(parse("-c nbd0", &o, &err), 0);
	assert_int_equal(o.action, ACT_CHECK);
	assert_int_equal(parse("--version", &o, &err), 0);
	assert_int_equal(o.action, ACT_VERSION);
	assert_int_equal(parse("-l x --help", &o, &err), 0);
	assert_int_equal(o.action, ACT_HELP);
}

/* Every refusal names what is wrong. */
static void test_refused(void **state)
{
	static const struct {
		const char *line, *names;
	} cases[] = {
		{ "", "which export" },
		{ "''", "which export" },
		{ "x /dev/sda", "/dev/sda" },
		{ "x /dev/nbd0p1", "/dev/nbd0p1" },
		{ "x ''", "''" },
		{ "x nbd0 y", "'y'" },
		{ "-l x", "'x'" },
		{ "-c", "--check" },
		{ "-c ''", "--check" },
		{ "-c a b", "--check" },
		{ "-d", "--detach" },
		{ "-d a b", "--detach" },
		{ "-l -d x", "only one" },
		{ "--watch x", "'x'" },
		{ "--reap x", "'x'" },
		{ "--watch -l", "only one" },
		{ "-l --until-eof", "--until-eof" },
		{ "--watch --force", "--force" },
		{ "-z x", "-z" },
		{ "--nosuch x", "--nosuch" },
		{ "--read-only=yes x", "--read-only" },
		{ "x -C", "-C" },
		{ "x --wait", "--wait" },
		{ "x -C 0", "'0'" },
		{ "x -C 65", "'65'" },
		{ "x -C -1", "'-1'" },
		{ "x -C 4294967297", "'4294967297'" },
		{ "x -C two", "'two'" },
		{ "x --timeout soon", "'soon'" },
		{ "x --timeout 1.5", "'1.5'" },
		{ "x --timeout 100ms", "'100ms'" },
		{ "x --timeout -1", "'-1'" },
		{ "x --wait 86401", "'86401'" },
		{ "x --wait 0", "'0'" },
		{ "x --dead-conn-timeout 99999999999999999999", "'99999999999999999999'" },
		{ "x --timeout 5 --dead-conn-timeout 5", "--dead-conn-timeout" },
		{ "x --block-size 511", "'511'" },
		{ "x --block-size 513", "'513'" },
		{ "x --block-size 8192", "'8192'" },
		{ "x --block-size 0", "'0'" },
		{ "x --control ''", "--control" },
		{ "x --json", "--json" },
		{ "-l --force", "--force" },
		{ "-d x -r", "only attaching" },
		{ "-l -C 2", "only attaching" },
	};
	struct options o;
	struct err err;

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		if (parse(cases[i].line, &o, &err) != -EINVAL)
			fail_msg("'%s' was taken", cases[i].line);
		if (!strstr(err.msg, cases[i].names))
			fail_msg("'%s': '%s' does not say '%s'", cases[i].line, err.msg,
				 cases[i].names);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_defaults), cmocka_unit_test(test_attach),
		cmocka_unit_test(test_timeouts), cmocka_unit_test(test_others),
		cmocka_unit_test(test_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
