/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * For tests of what SIGKILL leaves behind: a child that writes to a keyed chain by many fibers, and says through a
 * pipe what was answered. It is the test's own program, started anew with other words, so that nothing of the parent's
 * reactors is in it:
 *
 *	test_X --child CHAIN PIPE GENERATION
 */
#ifndef NBDRS_TEST_KILL_CHILD_H
#define NBDRS_TEST_KILL_CHILD_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "nbdrs/co.h"
#include "nbdrs/layer.h"

/* What one fiber of the child knows. */
struct kill_writer {
	struct chain *chain; /* open */
	int pipe;            /* where it says what was answered, in records of at most PIPE_BUF bytes */
	uint64_t first;      /* generation to begin with */
	unsigned number;     /* of the fiber, from 0 */
};

/* Whether main() was called as the child. */
bool kill_child_is(int argc, char **argv);
/* Main of the child: `write` in `n` fibers (16 at most), each with its kill_writer. It returns only after a failure. */
int kill_child_main(char **argv, void (*write)(void *writer), unsigned n);

/* Starts it; *from is the pipe's read end, the caller's. Asserts. */
pid_t kill_child_start(const char *chain, uint64_t first, int *from);
void kill_child_kill(pid_t pid);
/* Waits until it is gone; asserts that it was killed. */
void kill_child_wait(pid_t pid);

#endif
