/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * All I/O that may wait goes through here; two engines (io_uring; epoll + threads) stand behind it, and
 * in tests a third one that simulates disk and clock (tests/sim/sim.h).
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
#include <sys/stat.h>
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
 * What can be read without waiting, from the page cache; -EAGAIN when nothing can, -EOPNOTSUPP where the
 * file system can't tell. Does not suspend.
 */
ssize_t io_preadv_nowait(int fd, const struct iovec *iov, unsigned n, uint64_t off);

/*
 * Names, and the rest of what is done to files: the system call on a thread of the pool. Who keeps data
 * on a disk uses these and no others, so that the simulation can cut its power. A new or renamed file is
 * there after a crash only when its folder has been synced too; io_fdatasync is enough for contents and
 * size.
 *
 * Folders are fds of io_openat(AT_FDCWD, PATH, O_RDONLY | O_DIRECTORY, 0). O_CLOEXEC is added.
 */
CO_FN int io_openat(int dir_fd, const char *path, int flags, mode_t mode);
/* Whatever it returns, the fd is gone. */
CO_FN int io_close(int fd);
CO_FN int io_fstat(int fd, struct stat *st);
CO_FN int io_ftruncate(int fd, uint64_t size);
/* Of files and folders. */
CO_FN int io_fsync(int fd);
/* Within one folder; `to` is replaced. */
CO_FN int io_renameat(int dir_fd, const char *from, const char *to);
/* `flags`: AT_REMOVEDIR or 0. */
CO_FN int io_unlinkat(int dir_fd, const char *name, int flags);
CO_FN int io_mkdirat(int dir_fd, const char *name, mode_t mode);
/* flock(2), never waiting: -EWOULDBLOCK. `op`: LOCK_EX, LOCK_SH or LOCK_UN. */
CO_FN int io_flock(int fd, int op);
/*
 * Calls `fn` with each name in the folder, in any order, "." and ".." left out; it may run on another
 * thread and must not suspend. Not 0 ends the listing, which returns it.
 */
CO_FN int io_list(int dir_fd, int (*fn)(void *arg, const char *name), void *arg);

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
