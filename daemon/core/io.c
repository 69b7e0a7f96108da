/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The suspending calls of io.h on top of an engine's three primitives: a file call, a one-shot watch, and
 * its cancellation.
 */
#include "nbdrs/io.h"

#include <assert.h>
#include <errno.h>

#include "core/reactor_int.h"
#include "nbdrs/iov.h"

/* ---- files ---- */

static CO_FN int file(const struct file_op *op)
{
	struct reactor *r = reactor_self();

	return r->engine->file(r->engine_state, op);
}

ssize_t io_preadv(int fd, const struct iovec *iov, unsigned n, uint64_t off)
{
	return file(&(struct file_op){ .kind = FILE_READ, .fd = fd, .iov = iov, .iov_n = n, .off = off });
}

ssize_t io_pwritev(int fd, const struct iovec *iov, unsigned n, uint64_t off, int rwf)
{
	return file(&(struct file_op){
		.kind = FILE_WRITE, .fd = fd, .iov = iov, .iov_n = n, .off = off, .flags = rwf });
}

int io_fdatasync(int fd)
{
	return file(&(struct file_op){ .kind = FILE_FDATASYNC, .fd = fd });
}

int io_fallocate(int fd, int mode, uint64_t off, uint64_t len)
{
	int rc;

	do
		rc = file(&(struct file_op){
			.kind = FILE_FALLOCATE, .fd = fd, .flags = mode, .off = off, .len = len });
	while (rc == -EINTR);
	return rc;
}

/* Segments still to be done after `done` bytes of the first ones; returns how many are left. */
static unsigned rest_of(const struct iovec *iov, unsigned n, size_t done, const struct iovec **first,
			struct iovec *head)
{
	while (n > 0 && done >= iov->iov_len) {
		done -= iov->iov_len;
		iov++;
		n--;
	}
	*first = iov;
	if (n > 0) {
		head->iov_base = (char *)iov->iov_base + done;
		head->iov_len = iov->iov_len - done;
	}
	return n;
}

static size_t iov_total(const struct iovec *iov, unsigned n)
{
	size_t sum = 0;

	for (unsigned i = 0; i < n; i++)
		sum += iov[i].iov_len;
	return sum;
}

/*
 * After a short transfer, the remainder goes segment by segment: short transfers of files are rare (end
 * of file, a signal), so simplicity wins over a copy of the vector.
 */
static CO_FN ssize_t transfer(int fd, bool is_write, const struct iovec *iov, unsigned n, uint64_t off, int rwf)
{
	size_t done = 0, len = iov_total(iov, n);

	while (done < len) {
		const struct iovec *first;
		struct iovec head;
		unsigned left = rest_of(iov, n, done, &first, &head);
		ssize_t rc;

		if (done > 0) {
			first = &head;
			left = 1;
		}
		rc = is_write ? io_pwritev(fd, first, left, off + done, rwf) :
				io_preadv(fd, first, left, off + done);
		if (rc == -EINTR || rc == -EAGAIN)
			continue;
		if (rc < 0)
			return rc;
		if (rc == 0)
			break;
		done += (size_t)rc;
	}
	return (ssize_t)done;
}

int io_pread_full(int fd, const struct iovec *iov, unsigned n, uint64_t off)
{
	ssize_t done = transfer(fd, false, iov, n, off, 0);

	if (done < 0)
		return (int)done;
	/* Zeroes in place of what is missing would be wrong data. */
	return (size_t)done == iov_total(iov, n) ? 0 : -EIO;
}

int io_pwrite_full(int fd, const struct iovec *iov, unsigned n, uint64_t off, int rwf)
{
	ssize_t done = transfer(fd, true, iov, n, off, rwf);

	if (done < 0)
		return (int)done;
	return (size_t)done == iov_total(iov, n) ? 0 : -EIO;
}

/* ---- readiness ---- */

int io_watch_arm(struct io_watch *w, int fd, short events, void (*fn)(struct io_watch *, int events))
{
	struct reactor *r = reactor_self();
	int rc;

	assert(!w->is_armed);
	w->fd = fd;
	w->events = events;
	w->fn = fn;
	w->is_armed = true;
	rc = r->engine->arm(r->engine_state, w);
	if (rc != 0)
		w->is_armed = false;
	return rc;
}

bool io_watch_cancel(struct io_watch *w)
{
	struct reactor *r = reactor_self();

	if (!w->is_armed)
		return true;
	return r->engine->cancel(r->engine_state, w);
}

struct poll_wait {
	struct io_watch watch;
	struct timer timer;
	struct co *co;
	int events;
	bool is_over, is_late;
};

static void poll_ready(struct io_watch *w, int events)
{
	struct poll_wait *p = container_of(w, struct poll_wait, watch);

	p->events = events;
	p->is_over = true;
	co_wake(p->co);
}

static void poll_late(struct timer *t)
{
	struct poll_wait *p = container_of(t, struct poll_wait, timer);

	p->is_late = true;
	if (io_watch_cancel(&p->watch)) {
		p->events = -ECANCELED;
		p->is_over = true;
		co_wake(p->co);
	}
}

int io_poll(int fd, short events, uint64_t deadline_ns)
{
	struct poll_wait p = { .co = co_self() };
	int rc;

	timer_init(&p.timer, poll_late);
	if (deadline_ns != IO_FOREVER) {
		rc = timer_start(&p.timer, deadline_ns);
		if (rc != 0)
			return rc;
	}
	rc = io_watch_arm(&p.watch, fd, events, poll_ready);
	if (rc != 0) {
		timer_stop(&p.timer);
		return rc;
	}
	while (!p.is_over)
		co_park();
	timer_stop(&p.timer);
	if (p.events == -ECANCELED && p.is_late)
		return -ETIMEDOUT;
	return p.events;
}

/* ---- sockets ---- */

/* 0 = try again now, else -errno. */
static CO_FN int after_failure(int fd, short events, uint64_t deadline_ns)
{
	int rc;

	if (errno == EINTR)
		return 0;
	if (errno != EAGAIN)
		return -errno;
	rc = io_poll(fd, events, deadline_ns);
	return rc < 0 ? rc : 0;
}

ssize_t io_recv(int fd, void *buf, size_t len, uint64_t deadline_ns)
{
	for (;;) {
		ssize_t n = recv(fd, buf, len, MSG_DONTWAIT);
		int rc;

		if (n >= 0)
			return n;
		rc = after_failure(fd, POLLIN, deadline_ns);
		if (rc != 0)
			return rc;
	}
}

int io_recv_full(int fd, void *buf, size_t len, uint64_t deadline_ns)
{
	for (size_t done = 0; done < len;) {
		ssize_t n = io_recv(fd, (char *)buf + done, len - done, deadline_ns);

		if (n < 0)
			return (int)n;
		if (n == 0)
			return -ECONNRESET;
		done += (size_t)n;
	}
	return 0;
}

int io_send_full(int fd, const void *buf, size_t len, uint64_t deadline_ns)
{
	for (size_t done = 0; done < len;) {
		ssize_t n = send(fd, (const char *)buf + done, len - done, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n >= 0) {
			done += (size_t)n;
		} else {
			int rc = after_failure(fd, POLLOUT, deadline_ns);

			if (rc != 0)
				return rc;
		}
	}
	return 0;
}

ssize_t io_recvmsg(int fd, struct msghdr *msg, uint64_t deadline_ns)
{
	ssize_t n;
	int rc = 0;

	do
		n = recvmsg(fd, msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	while (n < 0 && (rc = after_failure(fd, POLLIN, deadline_ns)) == 0);
	return n < 0 ? rc : n;
}

ssize_t io_sendmsg(int fd, const struct msghdr *msg, uint64_t deadline_ns)
{
	ssize_t n;
	int rc = 0;

	do
		n = sendmsg(fd, msg, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (n < 0 && (rc = after_failure(fd, POLLOUT, deadline_ns)) == 0);
	return n < 0 ? rc : n;
}

int io_accept(int fd)
{
	for (;;) {
		int client = accept4(fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
		int rc;

		if (client >= 0)
			return client;
		if (errno == ECONNABORTED)
			continue; /* gone before we came; the next one may be there */
		rc = after_failure(fd, POLLIN, IO_FOREVER);
		if (rc != 0)
			return rc;
	}
}
