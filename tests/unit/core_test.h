/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the tests of core/ share: reactors with the engine that NBDRS_IO_ENGINE names (default: auto), and
 * a test body that runs in a fiber of reactor 0.
 */
#ifndef NBDRS_CORE_TEST_H
#define NBDRS_CORE_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "nbdrs/reactor.h"

enum { CORE_TEST_THREADS = 3 };

static inline int core_start(void **state)
{
	const char *engine = getenv("NBDRS_IO_ENGINE");
	struct reactor_conf conf = { .threads = CORE_TEST_THREADS, .spin_us = 20 };
	struct err err;

	(void)state;
	if (engine != NULL && strcmp(engine, "epoll") == 0)
		conf.engine = IO_ENGINE_EPOLL;
	else if (engine != NULL && strcmp(engine, "io_uring") == 0)
		conf.engine = IO_ENGINE_URING;
	if (reactors_start(&conf, &err) == 0)
		return 0;
	print_error("%s\n", err.msg);
	return -1;
}

static inline int core_stop(void **state)
{
	(void)state;
	reactors_stop();
	return 0;
}

/*
 * cmocka's assertions longjmp and must stay on the test's own stack: a body that runs in a fiber uses
 * EXPECT, which notes the first failure and goes on.
 */
extern const char *core_failure;

#define EXPECT(cond)                                                                               \
	do {                                                                                       \
		if (!(cond) && core_failure == NULL)                                               \
			core_failure = __FILE__ ": " #cond;                                        \
	} while (0)

static inline void core_run(int (*body)(void *arg), void *arg)
{
	int rc;

	core_failure = NULL;
	rc = reactor_call_blocking(reactor_get(0), body, arg);
	if (core_failure != NULL)
		fail_msg("%s", core_failure);
	assert_int_equal(rc, 0);
}

#endif
