/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * All I/O that may wait goes through here; two engines (io_uring; epoll + threads) stand behind it.
 *
 * Sockets are non-blocking: the call is tried first and the engine armed only on EAGAIN. File calls
 * go to the engine at once: who can do better without waiting (the file layer) tries that itself.
 * Buffers belong to the call until it returns; it returns only after the kernel let go of them.
 * All return >= 0 or -errno.
 */
#ifndef NBDRS_IO_H
#define NBDRS_IO_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "nbdrs/co.h"

#define IO_FOREVER UINT64_MAX

/* Files. May transfer less than asked, as pread(2). `rwf`: RWF_DSYNC or 0. */
CO_FN ssize_t io_preadv(int fd, const struct iovec *iov, unsigned n, uint64_t off);
CO_FN ssize_t io_pwritev(int fd, const struct iovec *iov, unsigned n, uint64_t off, int rwf);
/* All of it, or -errno; -EIO when the file ends before that: somebody made it shorter. */
CO_FN int io_pread_full(int fd, const struct iovec *iov, unsigned n, uint64_t off);
CO_FN int io_pwrite_full(int fd, const struct iovec *iov, unsigned n, uint64_t off, int rwf);
CO_FN int io_fdatasync(int fd);
CO_FN int io_fallocate(int fd, int mode, uint64_t off, uint64_t len);

/*
 * Waits for readiness (POLLIN, POLLOUT; POLLERR/POLLHUP always) until `deadline_ns` (CLOCK_MONOTONIC,
 * IO_FOREVER = none). Returns the events, or -ETIMEDOUT.
 */
CO_FN int io_poll(int fd, short events, uint64_t deadline_ns);

/* One recv/send: at least a byte, 0 = end of stream. */
CO_FN ssize_t io_recv(int fd, void *buf, size_t len, uint64_t deadline_ns);
/* Exactly len bytes; -ECONNRESET at end of stream. */
CO_FN int io_recv_full(int fd, void *buf, size_t len, uint64_t deadline_ns);
CO_FN int io_send_full(int fd, const void *buf, size_t len, uint64_t deadline_ns);
/* One message of a packet socket, with ancillary data. */
CO_FN ssize_t io_recvmsg(int fd, struct msghdr *msg, uint64_t deadline_ns);
CO_FN ssize_t io_sendmsg(int fd, const struct msghdr *msg, uint64_t deadline_ns);
/* Non-blocking, close-on-exec socket of the next client. */
CO_FN int io_accept(int fd);

/*
 * Runs `fn(arg)` on a thread of the pool and waits for it: for calls that block (open, getaddrinfo,
 * opendir) and for CPU work over ~50 us. Returns fn's result.
 */
CO_FN int offload(int (*fn)(void *arg), void *arg);

/*
 * Readiness without a fiber, for idle connections: `fn` runs once on the reactor's stack when `fd` has
 * one of `events`. The watch and the fd must live until fn ran or io_watch_cancel() returned true.
 */
struct io_watch {
	void (*fn)(struct io_watch *w, int events);
	int fd;
	short events;
	bool is_armed;
};

/*
 * Arms (one shot). 0, or -errno (then fn will not run). At most one watch for POLLIN and one for POLLOUT
 * per fd.
 */
int io_watch_arm(struct io_watch *w, int fd, short events, void (*fn)(struct io_watch *, int events));

/*
 * Cancels. True: it is over, fn will not run. False: the engine still holds it; fn will run, with
 * events = -ECANCELED or, if it was faster, with real ones. (io_uring ends a poll asynchronously.)
 */
bool io_watch_cancel(struct io_watch *w);

#endif
