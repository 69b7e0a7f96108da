/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Life of a connection in transmission phase.
 *
 *	idle	no data, nothing in flight: one poll armed (`in`), no stack, no buffers
 *	active	receives, serves, replies; between batches it spins a little (see reactor.h)
 *	paused	over a limit: not read until replies left; the kernel's are watched for their end (ghost.c)
 *	ending	DISC, end of stream or drain: in-flight requests finish and are answered, then it closes
 *	broken	the socket failed: in-flight requests finish, their replies are dropped, then it closes
 *
 * It belongs to one reactor. When an idle connection becomes busy on a reactor that has clearly more busy ones
 * than another, it moves there first: nothing is in flight then, so only the pointer travels.
 */
#include "nbdrs/conn.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "net/conn_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/handover.h"
#include "nbdrs/log.h"

static struct conn_set sets[REACTOR_MAX];
static _Atomic unsigned busy_of[REACTOR_MAX]; /* busy_n of each, for the others to see */
static _Atomic uint64_t next_id = 1;

/* Connections alive, and who waits for there to be none. */
static struct {
	pthread_mutex_t lock;
	unsigned n;
	struct co_wq gone;
} alive = { .lock = PTHREAD_MUTEX_INITIALIZER, .gone = { LIST_INIT(alive.gone.waiters) } };

struct conn_set *conn_set_self(void)
{
	struct conn_set *set = &sets[reactor_index(reactor_self())];

	if (unlikely(set->conns.next == NULL)) {
		list_init(&set->conns);
		list_init(&set->free_requests);
	}
	return set;
}

unsigned conns_n(void)
{
	unsigned n;

	pthread_mutex_lock(&alive.lock);
	n = alive.n;
	pthread_mutex_unlock(&alive.lock);
	return n;
}

static void count_alive(int by)
{
	pthread_mutex_lock(&alive.lock);
	alive.n = (unsigned)((int)alive.n + by);
	if (alive.n == 0)
		co_wq_wake_all(&alive.gone);
	pthread_mutex_unlock(&alive.lock);
}

/* ---- busy connections, and moving them ---- */

/* What poll says of a connection that the kernel has let go of. */
#define CUT_EVENTS (POLLRDHUP | POLLHUP | POLLERR)

/* Looks at the socket itself: what the connection knows may be a turn old. */
static bool is_cut(const struct conn *c)
{
	struct pollfd p = { .fd = c->fd, .events = POLLRDHUP };

	return poll(&p, 1, 0) == 1 && p.revents & CUT_EVENTS;
}

#define BUSY_PERIOD_NS UINT64_C(1000000000)

static void set_busy(struct conn *c, bool busy)
{
	struct conn_set *set = conn_set_self();

	if (c->is_busy == busy)
		return;
	c->is_busy = busy;
	set->busy_n = busy ? set->busy_n + 1 : set->busy_n - 1;
	atomic_store_explicit(&busy_of[reactor_index(c->reactor)], set->busy_n, memory_order_relaxed);
}

/* Once a period: connections from which nothing came are not busy any more. */
static void busy_look(struct timer *t)
{
	struct conn_set *set = container_of(t, struct conn_set, busy_timer);

	list_for_each(c, &set->conns, struct conn, node) {
		if (!c->is_active)
			set_busy(c, false);
		c->is_active = false;
	}
	if (set->busy_n > 0)
		(void)timer_start(t, reactor_now() + BUSY_PERIOD_NS); /* a miss only costs balance */
}

void conn_mark_busy(struct conn *c)
{
	struct conn_set *set;

	c->is_active = true;
	if (likely(c->is_busy))
		return;
	set_busy(c, true);
	set = conn_set_self();
	if (set->busy_timer.slot == 0) {
		timer_init(&set->busy_timer, busy_look);
		(void)timer_start(&set->busy_timer, reactor_now() + BUSY_PERIOD_NS);
	}
}

static struct reactor *least_busy(void)
{
	unsigned best = 0;

	for (unsigned i = 1; i < reactors_n(); i++)
		if (atomic_load_explicit(&busy_of[i], memory_order_relaxed) <
		    atomic_load_explicit(&busy_of[best], memory_order_relaxed))
			best = i;
	return reactor_get(best);
}

static void became_readable(struct io_watch *w, int events);

static void arm(struct conn *c, short events)
{
	int rc;

	if (c->in.is_armed || c->is_held)
		return;
	rc = io_watch_arm(&c->in, c->fd, events, became_readable);
	if (rc != 0) {
		log_warn("connection given up, its socket cannot be polled peer=%s reason=%s", c->peer,
			 err_name(rc));
		c->is_broken = true;
		reactor_defer(&c->flush);
	}
}

void conn_watch_cut(struct conn *c)
{
	if (c->s.is_kernel && !c->is_ending && !c->is_broken)
		arm(c, POLLRDHUP);
}

static void go_idle(struct spinner *s)
{
	struct conn *c = container_of(s, struct conn, spin);

	/*
	 * Everything parsed and nobody points into it: an idle connection holds no buffer. A write whose
	 * header came alone waits for its payload in there, though.
	 */
	if (c->rx != NULL && c->partial == NULL && c->rx_pos == c->rx_fill && c->rx->refs == 1) {
		rxbuf_put(c, TAKE_PTR(c->rx));
		c->rx_fill = c->rx_pos = 0;
	}
	arm(c, POLLIN);
}

static void arrive(void *arg)
{
	struct conn *c = arg;
	struct conn_set *set = conn_set_self();

	c->reactor = reactor_self();
	list_add(&set->conns, &c->node);
	c->is_draining = set->is_draining;
	c->is_held = set->is_held;
	conn_mark_busy(c);
	(void)conn_receive(c);
}

/* True when the connection left for another reactor. */
static bool move_if_better(struct conn *c)
{
	unsigned mine = conn_set_self()->busy_n;
	struct reactor *to;

	/* A device's connections were spread when they were made, and status must find them where they are. */
	if (c->s.is_kernel || !list_empty(&c->flush.node))
		return false;
	if (c->is_busy || c->in_flight > 0 || c->rx != NULL || c->tx_len > 0 || c->is_ending || c->is_broken ||
	    c->is_draining)
		return false;
	to = least_busy();
	if (to == c->reactor || atomic_load_explicit(&busy_of[reactor_index(to)], memory_order_relaxed) >= mine)
		return false;
	list_del(&c->node);
	reactor_post(to, &c->move, arrive, c);
	return true;
}

static void became_readable(struct io_watch *w, int events)
{
	struct conn *c = container_of(w, struct conn, in);

	spinner_woken(&c->spin);
	/* The kernel has given it up, and sends again what was not answered: what is left in the socket, too. */
	if (c->s.is_kernel && (events < 0 ? is_cut(c) : events & CUT_EVENTS))
		c->is_broken = true;
	if (c->is_broken || c->is_ending || c->is_held) {
		(void)conn_try_close(c);
		return;
	}
	if (c->is_paused) {
		conn_watch_cut(c);
		return;
	}
	/* Also when the watch was cancelled: nobody else looks. */
	if (move_if_better(c))
		return;
	conn_mark_busy(c);
	(void)conn_receive(c);
}

static bool try_receive(struct spinner *s)
{
	return conn_receive(container_of(s, struct conn, spin));
}

/* ---- beginning and end ---- */

static void flush_deferred(struct reactor_defer *d)
{
	struct conn *c = container_of(d, struct conn, flush);
	bool must_look;

	if (unlikely(!list_empty(&c->stalled)) && c->retry.slot == 0)
		request_retry_stalled(c);
	reply_flush(c);
	if (conn_try_close(c))
		return;
	/* It was held, or comes from the nbdrsd before this: nobody looks at its socket. */
	must_look = c->must_look;
	c->must_look = false;
	/* Cut meanwhile: what it left has been sent again, and may be done and overwritten already. */
	if (unlikely(must_look) && c->s.is_kernel && is_cut(c)) {
		c->is_broken = true;
		(void)conn_try_close(c);
		return;
	}
	if (unlikely(must_look) && !c->is_paused)
		(void)conn_receive(c);
	else
		conn_resume(c);
}

static void retry_due(struct timer *t)
{
	request_retry_stalled(container_of(t, struct conn, retry));
}

/* A connection of this reactor; nobody looks at its socket yet. NULL without memory. */
static struct conn *conn_new(int fd, const struct session *s, const char *peer)
{
	struct conn_set *set = conn_set_self();
	struct conn *c = calloc(1, sizeof(*c));

	if (c == NULL)
		return NULL;
	c->id = atomic_fetch_add(&next_id, 1);
	c->fd = fd;
	c->s = *s;
	c->reactor = reactor_self();
	c->limits = (struct nbd_limits){
		.size = s->export->size,
		.tflags = s->export->tflags,
		.min_block = s->export->min_block,
		.max_payload = s->export->max_payload,
		.has_meta = s->has_meta,
		.is_structured = s->is_structured,
	};
	if (s->is_read_only)
		c->limits.tflags = export_tflags(chain_top(s->export->chain)->caps, true);
	(void)snprintf(c->peer, sizeof(c->peer), "%s", peer);
	list_init(&c->stalled);
	list_init(&c->tx);
	list_init(&c->flush.node);
	c->flush.fn = flush_deferred;
	spinner_init(&c->spin, try_receive, go_idle);
	timer_init(&c->retry, retry_due);
	c->is_draining = set->is_draining;
	c->is_held = set->is_held;
	list_add(&set->conns, &c->node);
	atomic_fetch_add(&s->export->conns, 1);
	count_alive(1);
	log_debug("connection begins id=%ju peer=%s export=%s", (uintmax_t)c->id, c->peer, s->export->name);
	return c;
}

int conn_start(int fd, const struct session *s, const char *peer)
{
	struct conn *c = conn_new(fd, s, peer);

	if (c == NULL) {
		(void)close(fd);
		return -ENOMEM;
	}
	if (c->is_draining)
		c->is_ending = true;
	if (!conn_try_close(c))
		go_idle(&c->spin);
	return 0;
}

int conn_adopt(struct handover_conn *h, const struct session *s)
{
	struct conn *c = conn_new(h->fd, s, h->peer);

	if (c == NULL)
		return -ENOMEM;
	if (h->has_refused) {
		c->refused = request_new(c, &h->refused);
		if (c->refused == NULL) {
			conn_forget(c);
			return -ENOMEM;
		}
		c->refused->error = h->refused_error;
		c->discard = h->discard;
	}
	c->left = TAKE_PTR(h->left);
	c->left_len = h->left_len;
	h->fd = -1;
	c->must_look = true;
	reactor_defer(&c->flush);
	return 0;
}

void conn_forget(struct conn *c)
{
	conn_receive_abort(c);
	if (c->rx != NULL)
		rxbuf_put(c, c->rx);
	assert(c->rx_live == 0 && c->tx_len == 0 && list_empty(&c->stalled));
	timer_stop(&c->retry);
	spinner_stop(&c->spin);
	list_del(&c->flush.node);
	set_busy(c, false);
	list_del(&c->node);
	log_debug("connection ends id=%ju peer=%s requests=%ju", (uintmax_t)c->id, c->peer,
		  (uintmax_t)c->requests);
	atomic_fetch_sub(&c->s.export->conns, 1);
	free(c->left);
	free(c);
	count_alive(-1);
}

/* The daemon stops, and all that came wholly is answered; half a write is dropped. */
static bool is_drained(const struct conn *c)
{
	return c->is_draining && c->in_flight == (c->partial != NULL || c->refused != NULL);
}

bool conn_try_close(struct conn *c)
{
	bool waits;

	if (is_drained(c))
		c->is_ending = true;
	ghost_look(c);
	if (!c->is_ending && !c->is_broken)
		return false;
	if (c->is_broken)
		reply_drop(c);
	if (!c->is_reading)
		conn_receive_abort(c);
	spinner_stop(&c->spin);
	if (c->in_flight > 0 || c->is_reading)
		return false; /* the last reply comes back here */
	/* The engine may still hold a watch: it calls back, and that comes here again. */
	waits = !io_watch_cancel(&c->in);
	waits |= !io_watch_cancel(&c->out);
	if (waits)
		return true;
	(void)close(c->fd); /* nothing of ours is buffered behind it */
	conn_forget(c);
	return true;
}

void conns_each(void (*fn)(void *arg, const struct conn_view *v), void *arg)
{
	list_for_each(c, &conn_set_self()->conns, struct conn, node) {
		struct conn_view v = {
			.id = c->id,
			.export_name = c->s.export->name,
			.peer = c->peer,
			.requests = c->requests,
			.in_flight = c->in_flight,
			.is_kernel = c->s.is_kernel,
			.is_cut = c->s.is_kernel && (c->is_ending || c->is_broken || is_cut(c)),
		};

		fn(arg, &v);
	}
}

/* ---- drain ---- */

static int drain_here(void *arg)
{
	struct conn_set *set = conn_set_self();

	(void)arg;
	set->is_draining = true;
	list_for_each(c, &set->conns, struct conn, node) {
		c->is_draining = true;
		/* What has arrived is answered with ESHUTDOWN; the kernel's requests stay in the socket. */
		if (!c->s.is_kernel)
			(void)conn_receive(c);
	}
	/* While its requests are in flight a client may send more, and is told ESHUTDOWN. */
	list_for_each(c, &set->conns, struct conn, node) {
		c->is_ending |= c->s.is_kernel;
		(void)conn_try_close(c);
	}
	return 0;
}

static int cut_here(void *arg)
{
	unsigned *n = arg;

	list_for_each(c, &conn_set_self()->conns, struct conn, node) {
		(*n)++;
		c->is_broken = true;
		(void)shutdown(c->fd, SHUT_RDWR); /* fails only when the peer is gone already */
		(void)conn_try_close(c);
	}
	return 0;
}

static int pools_here(void *arg)
{
	struct conn_set *set = conn_set_self();

	(void)arg;
	request_pool_free(set);
	timer_stop(&set->busy_timer);
	set->is_draining = false;
	return 0;
}

/* Waits until no connection is left. */
static CO_FN int wait_gone(uint64_t timeout_ns)
{
	int rc = 0;

	pthread_mutex_lock(&alive.lock);
	while (alive.n > 0 && rc == 0) {
		if (timeout_ns == IO_FOREVER)
			co_wq_wait(&alive.gone, &alive.lock);
		else
			rc = co_wq_wait_for(&alive.gone, &alive.lock, timeout_ns);
	}
	rc = alive.n > 0 ? -ETIMEDOUT : 0;
	pthread_mutex_unlock(&alive.lock);
	return rc;
}

unsigned conns_drain(uint64_t deadline_ns)
{
	uint64_t now = now_ns();
	unsigned cut = 0;

	for (unsigned i = 0; i < reactors_n(); i++)
		(void)reactor_call(reactor_get(i), drain_here, NULL); /* always 0 */
	if (wait_gone(deadline_ns > now ? deadline_ns - now : 0) != 0) {
		for (unsigned i = 0; i < reactors_n(); i++)
			(void)reactor_call(reactor_get(i), cut_here, &cut);
		/* Requests in the chain cannot be abandoned: their buffers are in use. */
		(void)wait_gone(IO_FOREVER);
	}
	for (unsigned i = 0; i < reactors_n(); i++)
		(void)reactor_call(reactor_get(i), pools_here, NULL);
	return cut;
}
