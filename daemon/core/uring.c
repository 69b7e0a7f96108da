/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The io_uring engine: one ring per reactor, used by its thread only. Requests are queued and handed to
 * the kernel once per turn. Readiness is one-shot IORING_OP_POLL_ADD.
 *
 * user_data of a completion: a struct pending * (file call) or a struct io_watch * with bit 0 set; 0 for
 * what nobody waits for (the removal of a poll).
 */
#include <assert.h>
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>

#include "core/engine.h"
#include "nbdrs/cleanup.h"

enum { SQ_ENTRIES = 256, CQ_ENTRIES = 4096, TAG_WATCH = 1 };

struct uring {
	struct io_uring ring;
	unsigned queued; /* SQEs not handed to the kernel yet */
};

struct pending {
	struct co *co;
	int res;
	bool is_done;
};

static int ring_open(struct uring *u)
{
	/*
	 * Best first: DEFER_TASKRUN (6.1) runs completions only when we ask, COOP_TASKRUN (5.19) spares
	 * the interrupt. Older kernels take nothing more (EBUSY) while completions do not fit into the queue,
	 * and get_sqe(), which cannot take them inside somebody's call, would wait for ever: no io_uring there.
	 */
	static const unsigned sets[] = {
		IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
		IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
	};
	int rc = -ENOSYS;

	for (unsigned i = 0; i < ARRAY_LEN(sets); i++) {
		struct io_uring_params p = { .flags = sets[i] | IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP,
					     .cq_entries = CQ_ENTRIES };

		rc = io_uring_queue_init_params(SQ_ENTRIES, &u->ring, &p);
		if (rc == 0) {
			if (p.features & IORING_FEAT_NODROP && p.features & IORING_FEAT_EXT_ARG)
				return 0;
			io_uring_queue_exit(&u->ring);
			return -ENOSYS;
		}
		if (rc != -EINVAL)
			return rc;
	}
	return -ENOSYS;
}

int uring_probe(void)
{
	struct uring u;
	int rc = ring_open(&u);

	if (rc == 0)
		io_uring_queue_exit(&u.ring);
	return rc;
}

static int uring_open(void **state)
{
	struct uring *u = calloc(1, sizeof(*u));
	int rc;

	if (u == NULL)
		return -ENOMEM;
	rc = ring_open(u);
	if (rc != 0) {
		free(u);
		return rc;
	}
	(void)io_uring_register_ring_fd(&u->ring); /* an optimisation of 5.18, fine without */
	*state = u;
	return 0;
}

static void uring_close(void *state)
{
	struct uring *u = state;

	io_uring_queue_exit(&u->ring);
	free(u);
}

static void complete(struct io_uring_cqe *cqe)
{
	uintptr_t data = (uintptr_t)cqe->user_data;

	if (data == 0)
		return;
	if (data & TAG_WATCH) {
		struct io_watch *w = (struct io_watch *)(data - TAG_WATCH);

		w->is_armed = false;
		w->fn(w, cqe->res);
	} else {
		struct pending *p = (struct pending *)data;

		p->res = cqe->res;
		p->is_done = true;
		co_wake(p->co);
	}
}

static bool reap(struct uring *u)
{
	struct io_uring_cqe *cqe;
	bool any = false;

	while (io_uring_peek_cqe(&u->ring, &cqe) == 0) {
		struct io_uring_cqe copy = *cqe;

		/* Consume first: the callback may come back here for room. */
		io_uring_cqe_seen(&u->ring, cqe);
		complete(&copy);
		any = true;
	}
	return any;
}

static struct io_uring_sqe *get_sqe(struct uring *u)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&u->ring);

	while (unlikely(sqe == NULL)) {
		int rc = io_uring_submit(&u->ring);

		/* EBUSY, EAGAIN: the kernel waits for us to take completions; it keeps them, so later. */
		assert(rc >= 0 || rc == -EBUSY || rc == -EAGAIN || rc == -EINTR);
		u->queued = 0;
		sqe = io_uring_get_sqe(&u->ring);
	}
	u->queued++;
	return sqe;
}

static CO_FN int uring_file(void *state, const struct file_op *op)
{
	struct pending p = { .co = co_self() };
	struct io_uring_sqe *sqe = get_sqe(state);

	switch (op->kind) {
	case FILE_READ:
		io_uring_prep_readv(sqe, op->fd, op->iov, op->iov_n, op->off);
		break;
	case FILE_WRITE:
		io_uring_prep_writev2(sqe, op->fd, op->iov, op->iov_n, op->off, op->flags);
		break;
	case FILE_FDATASYNC:
		io_uring_prep_fsync(sqe, op->fd, IORING_FSYNC_DATASYNC);
		break;
	case FILE_FALLOCATE:
		io_uring_prep_fallocate(sqe, op->fd, op->flags, (off_t)op->off, (off_t)op->len);
		break;
	}
	io_uring_sqe_set_data(sqe, &p);
	while (!p.is_done)
		co_park();
	return p.res;
}

static int uring_arm(void *state, struct io_watch *w)
{
	struct io_uring_sqe *sqe = get_sqe(state);

	io_uring_prep_poll_add(sqe, w->fd, (unsigned)w->events);
	io_uring_sqe_set_data64(sqe, (uintptr_t)w | TAG_WATCH);
	return 0;
}

static bool uring_cancel(void *state, struct io_watch *w)
{
	struct io_uring_sqe *sqe = get_sqe(state);

	io_uring_prep_poll_remove(sqe, (uintptr_t)w | TAG_WATCH);
	io_uring_sqe_set_data64(sqe, 0);
	return false;
}

static void enter(struct uring *u, unsigned wait_n, uint64_t timeout_ns)
{
	struct io_uring_cqe *cqe;
	int rc;

	if (wait_n == 0) {
		rc = io_uring_submit_and_get_events(&u->ring);
	} else if (timeout_ns == IO_FOREVER) {
		rc = io_uring_submit_and_wait(&u->ring, 1);
	} else {
		struct __kernel_timespec ts = { .tv_sec = (int64_t)(timeout_ns / 1000000000),
						.tv_nsec = (long long)(timeout_ns % 1000000000) };

		rc = io_uring_submit_and_wait_timeout(&u->ring, &cqe, 1, &ts, NULL);
	}
	/* ETIME, EINTR: nothing came. EBUSY, EAGAIN: short of room; what is queued stays queued. */
	assert(rc >= 0 || rc == -ETIME || rc == -EINTR || rc == -EBUSY || rc == -EAGAIN);
	if (rc >= 0 || rc == -ETIME)
		u->queued = 0;
}

static bool has_task_work(const struct uring *u)
{
	return IO_URING_READ_ONCE(*u->ring.sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW);
}

static bool uring_peek(void *state)
{
	struct uring *u = state;

	if (u->queued > 0 || has_task_work(u))
		enter(u, 0, 0);
	return reap(u);
}

static bool uring_poll(void *state, uint64_t timeout_ns)
{
	struct uring *u = state;

	if (timeout_ns == 0)
		return uring_peek(u);
	if (io_uring_cq_ready(&u->ring) == 0)
		enter(u, 1, timeout_ns);
	else if (u->queued > 0 || has_task_work(u))
		enter(u, 0, 0);
	return reap(u);
}

const struct engine uring_engine = {
	.name = "io_uring",
	.open = uring_open,
	.close = uring_close,
	.file = uring_file,
	.arm = uring_arm,
	.cancel = uring_cancel,
	.poll = uring_poll,
	.peek = uring_peek,
};
