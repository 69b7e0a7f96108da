/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Tells a live server's socket file from a stale one by connecting to it.
 *
 * A listening socket can outlive its process: an io_uring is taken down by the kernel some time after the
 * process ended, and until then holds the files it polls. Who restarts a killed server at once must not be
 * told that another one is running, so a listener whose process is gone is waited for.
 */
#include "nbdrs/unixsock.h"

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <time.h>

#include "nbdrs/cleanup.h"

enum { TRIES = 100, PAUSE_MS = 20 };

/* Whether the process that called listen() exists. In doubt it does: it may live where we can't see it. */
static bool has_process(int fd)
{
	struct ucred cred;
	socklen_t len = sizeof(cred);

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) < 0 || cred.pid <= 0)
		return true;
	return kill(cred.pid, 0) == 0 || errno != ESRCH;
}

int unixsock_is_served(const struct sockaddr_un *addr, int type)
{
	const struct timespec pause = { .tv_nsec = PAUSE_MS * 1000000L };

	for (unsigned i = 0; i < TRIES; i++) {
		_cleanup_close_ int fd = socket(AF_UNIX, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

		if (fd < 0)
			return -errno;
		if (connect(fd, (const struct sockaddr *)addr, sizeof(*addr)) < 0) {
			/* EAGAIN: its backlog is full. EPROTOTYPE: it serves something else there. */
			if (errno == EAGAIN || errno == EPROTOTYPE)
				return 1;
			return errno == ECONNREFUSED || errno == ENOENT ? 0 : -errno;
		}
		if (has_process(fd))
			return 1;
		(void)nanosleep(&pause, NULL); /* shorter does no harm */
	}
	return 1;
}
