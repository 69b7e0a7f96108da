/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The epoll engine, for where io_uring is forbidden: readiness by one-shot epoll registrations, file calls
 * on the offload pool.
 *
 * An fd has one registration for both directions, so the engine keeps a table by fd of who waits for
 * what. Closing an fd ends its registration behind our back; MOD then says ENOENT and we ADD.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "core/reactor_int.h"

enum { EVENTS_MAX = 128 };

struct slot {
	struct io_watch *in, *out;
};

struct ep {
	int fd;
	struct slot *slots; /* by fd */
	unsigned slots_n;
};

static int ep_open(void **state)
{
	struct ep *e = calloc(1, sizeof(*e));

	if (e == NULL)
		return -ENOMEM;
	e->fd = epoll_create1(EPOLL_CLOEXEC);
	if (e->fd < 0) {
		int rc = -errno;

		free(e);
		return rc;
	}
	*state = e;
	return 0;
}

static void ep_close(void *state)
{
	struct ep *e = state;

	(void)close(e->fd);
	free(e->slots);
	free(e);
}

static int slot_of(struct ep *e, int fd, struct slot **out)
{
	if ((unsigned)fd >= e->slots_n) {
		unsigned n = MAX(256U, e->slots_n);
		struct slot *v;

		while (n <= (unsigned)fd)
			n *= 2;
		v = realloc(e->slots, n * sizeof(*v));
		if (v == NULL)
			return -ENOMEM;
		memset(v + e->slots_n, 0, (n - e->slots_n) * sizeof(*v));
		e->slots = v;
		e->slots_n = n;
	}
	*out = &e->slots[fd];
	return 0;
}

/* Makes the kernel's registration say what the slot says. */
static int update(struct ep *e, int fd, const struct slot *s)
{
	struct epoll_event ev = { .data.fd = fd };

	if (s->in)
		ev.events |= (uint32_t)s->in->events;
	if (s->out)
		ev.events |= (uint32_t)s->out->events;
	if (ev.events == 0)
		return 0; /* one-shot: it is silent already, or its next event finds nobody */
	ev.events |= EPOLLONESHOT;
	if (epoll_ctl(e->fd, EPOLL_CTL_MOD, fd, &ev) == 0)
		return 0;
	if (errno == ENOENT && epoll_ctl(e->fd, EPOLL_CTL_ADD, fd, &ev) == 0)
		return 0;
	return -errno;
}

static int ep_arm(void *state, struct io_watch *w)
{
	struct ep *e = state;
	struct slot *s;
	int rc = slot_of(e, w->fd, &s);

	if (rc != 0)
		return rc;
	if (w->events & POLLOUT)
		s->out = w;
	else
		s->in = w;
	rc = update(e, w->fd, s);
	if (rc != 0) {
		if (s->out == w)
			s->out = NULL;
		else
			s->in = NULL;
	}
	return rc;
}

static bool ep_cancel(void *state, struct io_watch *w)
{
	struct ep *e = state;
	struct slot *s = &e->slots[w->fd];

	if (s->out == w)
		s->out = NULL;
	else if (s->in == w)
		s->in = NULL;
	w->is_armed = false;
	return true;
}

static void fire(struct io_watch *w, uint32_t events)
{
	w->is_armed = false;
	w->fn(w, (int)events);
}

static bool concerns(const struct io_watch *w, uint32_t events)
{
	return w != NULL &&
	       events & ((uint32_t)w->events | EPOLLERR | EPOLLHUP | EPOLLRDHUP);
}

static void dispatch(struct ep *e, int fd, uint32_t events)
{
	struct io_watch *in = e->slots[fd].in;
	struct io_watch *out = e->slots[fd].out;

	if (concerns(in, events)) {
		e->slots[fd].in = NULL;
		fire(in, events);
	}
	/* That call may have cancelled the other watch, or grown the table: look again. */
	if (out != NULL && e->slots[fd].out == out && concerns(out, events)) {
		e->slots[fd].out = NULL;
		fire(out, events);
	}
	/* The one-shot registration is used up: what still waits must be registered anew. */
	(void)update(e, fd, &e->slots[fd]); /* it was registered a moment ago, or is closed */
}

static bool ep_poll(void *state, uint64_t timeout_ns)
{
	struct ep *e = state;
	struct epoll_event ev[EVENTS_MAX];
	int timeout_ms = -1;
	int n;

	if (timeout_ns != IO_FOREVER) {
		uint64_t ms = (timeout_ns + 999999) / 1000000; /* up: never wake before a timer is due */

		timeout_ms = ms > 3600000 ? 3600000 : (int)ms;
	}
	n = epoll_wait(e->fd, ev, EVENTS_MAX, timeout_ms);
	for (int i = 0; i < n; i++)
		dispatch(e, ev[i].data.fd, ev[i].events);
	return n > 0;
}

static bool ep_peek(void *state)
{
	return ep_poll(state, 0);
}

static CO_FN int ep_file(void *state, const struct file_op *op)
{
	(void)state;
	return offload_file(op);
}

const struct engine epoll_engine = {
	.name = "epoll",
	.open = ep_open,
	.close = ep_close,
	.file = ep_file,
	.arm = ep_arm,
	.cancel = ep_cancel,
	.poll = ep_poll,
	.peek = ep_peek,
};
