/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Work that may hang in the kernel where not even SIGKILL helps (D state): opens and flushes of a device
 * whose server is dead, and every netlink request to the nbd driver, as one stuck request holds the lock
 * of all. It runs in a child process, and the parent waits no longer than it wants to.
 */
#ifndef NBDRS_CHILD_H
#define NBDRS_CHILD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { CHILD_RESULT_MAX = 4096 };

struct child_job {
	/*
	 * Runs in the child; writes up to result_len bytes at `result`; 0 or -errno. It must print nothing:
	 * all descriptors but `keep` are closed, so that a child that hangs keeps no pipe open whose
	 * reader waits for this tool.
	 */
	int (*fn)(const void *arg, void *result);
	const void *arg;
	void *result; /* filled with what the child has written there, however it ended; may be NULL */
	size_t result_len;
	const int *keep; /* at most 64 */
	unsigned keep_n;
	/*
	 * How long to wait. With `progress`, the time starts anew whenever the number that it returns has
	 * changed: slow is not dead.
	 */
	unsigned limit_ms;
	uint64_t (*progress)(const void *arg);
	bool ends_on_interrupt; /* otherwise SIGINT and SIGTERM wait for the child */
};

/*
 * Returns what fn returned. -ETIMEDOUT: it did not come back, was sent SIGKILL, and ends as soon as the
 * kernel lets it go - before it does anything further. -EINTR: likewise, because of a signal after
 * interrupts_catch(). -ECHILD: it died. -EAGAIN, -ENOMEM: no process.
 */
int child_run(const struct child_job *job);

/* From now on SIGINT, SIGTERM and SIGHUP only make interrupted() true, so that work is undone. */
void interrupts_catch(void);
bool interrupted(void);

/* Milliseconds of the monotonic clock. */
uint64_t now_ms(void);
void sleep_ms(unsigned ms);

#endif
