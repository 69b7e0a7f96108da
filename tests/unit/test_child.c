/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Work in a child that is given up on (tool/child.c). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"
#include "child.h"

static int add_one(const void *arg, void *result)
{
	*(int *)result = *(const int *)arg + 1;
	return -EBUSY; /* the result counts all the same */
}

static void test_result(void **state)
{
	int in = 41, out = 0;
	const struct child_job job = { .fn = add_one,
				       .arg = &in,
				       .result = &out,
				       .result_len = sizeof(out),
				       .limit_ms = 10000 };

	assert_int_equal(child_run(&job), -EBUSY);
	assert_int_equal(out, 42);
	/* Nobody is left to be waited for. */
	assert_int_equal(waitpid(-1, NULL, WNOHANG), -1);
	assert_int_equal(errno, ECHILD);
}

/* Says that it began, then hangs; no signal but SIGKILL ends it. */
static int hang(const void *arg, void *result)
{
	*(int *)result = 7;
	while (pause() < 0)
		;
	return 0;
}

static void test_hang(void **state)
{
	int out = 0, status;
	const struct child_job job = {
		.fn = hang, .result = &out, .result_len = sizeof(out), .limit_ms = 300
	};
	uint64_t begin = now_ms();

	assert_int_equal(child_run(&job), -ETIMEDOUT);
	assert_true(now_ms() - begin >= 300);
	assert_int_equal(out, 7);
	/* It was ended, and not by a signal that it could ignore. */
	assert_true(waitpid(-1, &status, 0) > 0);
	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

static int die(const void *arg, void *result)
{
	_exit(0); /* without having returned */
}

static void test_dies(void **state)
{
	const struct child_job job = { .fn = die, .limit_ms = 10000 };

	assert_int_equal(child_run(&job), -ECHILD);
}

/* A bit for each of the descriptors 0 to 29 that is open. */
static int open_fds(const void *arg, void *result)
{
	uint32_t set = 0;

	for (int fd = 0; fd < 30; fd++)
		if (fcntl(fd, F_GETFD) >= 0)
			set |= 1u << fd;
	*(uint32_t *)result = set;
	return 0;
}

static void test_descriptors(void **state)
{
	uint32_t set = ~0u;
	int keep[] = { 25, 21, 23 };
	struct child_job job = {
		.fn = open_fds, .result = &set, .result_len = sizeof(set), .limit_ms = 10000
	};

	for (int fd = 20; fd < 28; fd++)
		assert_int_equal(dup2(STDERR_FILENO, fd), fd);
	assert_int_equal(child_run(&job), 0);
	assert_int_equal(set, 0);
	job.keep = keep;
	job.keep_n = ARRAY_LEN(keep);
	assert_int_equal(child_run(&job), 0);
	assert_int_equal(set, 1u << 21 | 1u << 23 | 1u << 25);
	for (int fd = 20; fd < 28; fd++)
		assert_int_equal(close(fd), 0);
}

/* A number that moves the first 8 times it is asked for. */
static uint64_t moves(const void *arg)
{
	static uint64_t count;

	return count < 8 ? ++count : count;
}

static void test_progress(void **state)
{
	const struct child_job job = { .fn = hang,
				       .result = &(int){ 0 },
				       .result_len = sizeof(int),
				       .limit_ms = 250,
				       .progress = moves };
	uint64_t begin = now_ms();

	assert_int_equal(child_run(&job), -ETIMEDOUT);
	/* 8 looks, each at most 200 ms apart, each starting the 250 ms anew. */
	assert_true(now_ms() - begin >= 1000);
	(void)waitpid(-1, NULL, 0);
}

static int wait_for_signal(const void *arg, void *result)
{
	(void)kill(getppid(), SIGTERM);
	return hang(arg, result);
}

/* Last: from here on a signal was seen. */
static void test_interrupt(void **state)
{
	struct child_job job = { .fn = wait_for_signal,
				 .result = &(int){ 0 },
				 .result_len = sizeof(int),
				 .limit_ms = 10000,
				 .ends_on_interrupt = true };
	uint64_t begin = now_ms();

	interrupts_catch();
	assert_false(interrupted());
	assert_int_equal(child_run(&job), -EINTR);
	assert_true(interrupted());
	assert_true(now_ms() - begin < 9000);
	(void)waitpid(-1, NULL, 0);
	/* What must not be cut short is not. */
	job.ends_on_interrupt = false;
	job.limit_ms = 300;
	assert_int_equal(child_run(&job), -ETIMEDOUT);
	(void)waitpid(-1, NULL, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_result),   cmocka_unit_test(test_hang),
		cmocka_unit_test(test_dies),     cmocka_unit_test(test_descriptors),
		cmocka_unit_test(test_progress), cmocka_unit_test(test_interrupt),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
