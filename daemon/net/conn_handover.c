/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Connections that go over to the next nbdrsd (handover.h):
 *
 *	serving -> held: not read any more; what is in flight is finished and answered
 *	held -> still: nothing in flight, nothing to send, no watch armed; a write that came in part may be there
 *	still -> taken: its descriptor and what is left of its input are written down, its struct is freed
 *	held -> serving again, when the handover is called off
 *
 * The next one gives each connection the bytes that are left, as if they had just been received.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "net/conn_int.h"
#include "nbdrs/handover.h"
#include "nbdrs/log.h"

#define LOOK_NS UINT64_C(1000000) /* between looks whether they are still */

/* --- Holding ------------------------------------------------------------------------------------ */

static bool is_still(const struct conn *c)
{
	const unsigned partial = c->partial != NULL || c->refused != NULL;

	return c->in_flight == partial && c->tx_len == 0 && !c->in.is_armed && !c->out.is_armed &&
	       !c->is_ending && !c->is_broken && list_empty(&c->flush.node);
}

static int hold_here(void *arg)
{
	const bool *only_kernel = arg;
	struct conn_set *set = conn_set_self();

	set->is_held = !*only_kernel;
	list_for_each(c, &set->conns, struct conn, node) {
		if (*only_kernel && !c->s.is_kernel)
			continue;
		c->is_held = true;
		spinner_stop(&c->spin);
		(void)io_watch_cancel(&c->in); /* is_armed says when the engine has let go of it */
	}
	return 0;
}

struct count {
	unsigned busy; /* are not still */
	bool cuts;     /* clients that are not, but the kernel */
};

static int count_here(void *arg)
{
	struct count *n = arg;

	list_for_each(c, &conn_set_self()->conns, struct conn, node) {
		if (!c->is_held || is_still(c))
			continue;
		n->busy++;
		if (!n->cuts || c->s.is_kernel)
			continue;
		log_warn("connection cut off: it does not take its replies, or its requests take too long peer=%s",
			 c->peer);
		c->is_broken = true;
		(void)shutdown(c->fd, SHUT_RDWR); /* fails only when the peer is gone already */
		(void)conn_try_close(c);
	}
	return 0;
}

/* 0 when all are still before `deadline_ns`. */
static CO_FN int wait_still(uint64_t deadline_ns, bool cuts)
{
	for (;;) {
		struct count n = { .cuts = cuts };

		for (unsigned i = 0; i < reactors_n(); i++)
			(void)reactor_call(reactor_get(i), count_here, &n); /* always 0 */
		if (n.busy == 0)
			return 0;
		if (now_ns() >= deadline_ns)
			return -ETIMEDOUT;
		cuts = false;
		co_sleep(LOOK_NS);
	}
}

static int resume_here(void *arg)
{
	struct conn_set *set = conn_set_self();

	(void)arg;
	set->is_held = false;
	list_for_each(c, &set->conns, struct conn, node) {
		if (!c->is_held)
			continue;
		c->is_held = false;
		c->must_look = true;
		/* From the loop: serving may end the connection, and with it our place in the list. */
		reactor_defer(&c->flush);
	}
	return 0;
}

void conns_resume(void)
{
	for (unsigned i = 0; i < reactors_n(); i++)
		(void)reactor_call(reactor_get(i), resume_here, NULL);
}

CO_FN int conns_hold(bool only_kernel, uint64_t deadline_ns)
{
	const uint64_t grace_ns = UINT64_C(1000000000);
	int rc;

	for (unsigned i = 0; i < reactors_n(); i++)
		(void)reactor_call(reactor_get(i), hold_here, &only_kernel);
	rc = wait_still(deadline_ns, false);
	/* One client that reads no replies must not keep all others from an upgrade. */
	if (rc != 0)
		rc = wait_still(now_ns() + grace_ns, true);
	if (rc != 0)
		conns_resume();
	return rc;
}

/* --- Taking ------------------------------------------------------------------------------------- */

/* The input that was not used: of a write that came in part, from its header on. -ENOMEM. */
static int save_left(const struct conn *c, struct handover_conn *h)
{
	const struct request *r = c->partial;
	const size_t rest = c->rx != NULL ? c->rx_fill - c->rx_pos : 0;
	/* With a buffer of its own for the rest, the first part of its payload is the one segment before that. */
	const size_t first = r != NULL && r->data != NULL && r->segs_n > 1 ? r->seg[0].iov_len : 0;
	const size_t own = r != NULL && r->data != NULL ? c->partial_got : 0;
	/* What the nbdrsd before this had left, as far as it was not received yet, comes behind all that. */
	const size_t older = c->left != NULL ? c->left_len - c->left_at : 0;
	char *p;

	h->left_len = (r != NULL ? (size_t)NBD_REQUEST_LEN : 0) + first + own + rest + older;
	if (h->left_len == 0)
		return 0;
	p = h->left = malloc(h->left_len);
	if (p == NULL)
		return -ENOMEM;
	if (r != NULL) {
		nbd_request_build(p, &r->nbd);
		p += NBD_REQUEST_LEN;
	}
	if (first > 0)
		memcpy(p, r->seg[0].iov_base, first);
	if (own > 0)
		memcpy(p + first, r->data, own);
	if (rest > 0)
		memcpy(p + first + own, c->rx->data + c->rx_pos, rest);
	if (older > 0)
		memcpy(p + first + own + rest, (char *)c->left + c->left_at, older);
	return 0;
}

static int save_conn(const struct conn *c, struct handover_conn *h)
{
	const struct export *e = c->s.export;

	h->fd = c->fd;
	h->backend_id = strdup(e->backend_id);
	h->size = e->size;
	if (!export_has_identity(e)) {
		h->stores = strdup(e->stores);
		if (!h->stores)
			return -ENOMEM;
	}
	memcpy(h->peer, c->peer, sizeof(h->peer));
	h->is_structured = c->s.is_structured;
	h->has_meta = c->s.has_meta;
	h->is_kernel = c->s.is_kernel;
	h->is_read_only = c->s.is_read_only;
	if (c->refused != NULL) {
		h->has_refused = true;
		h->refused = c->refused->nbd;
		h->refused_error = c->refused->error;
		h->discard = c->discard;
	}
	return h->backend_id ? save_left(c, h) : -ENOMEM;
}

static int save_here(void *arg)
{
	struct handover *h = arg;

	list_for_each(c, &conn_set_self()->conns, struct conn, node) {
		struct handover_conn *to = c->is_held ? handover_add_conn(h) : NULL;
		int rc = to ? save_conn(c, to) : c->is_held ? -ENOMEM : 0;

		if (rc != 0)
			return rc;
	}
	return 0;
}

static int forget_here(void *arg)
{
	struct conn_set *set = conn_set_self();

	(void)arg;
	list_for_each(c, &set->conns, struct conn, node)
		if (c->is_held)
			conn_forget(c);
	set->is_held = false;
	return 0;
}

CO_FN int conns_save(struct handover *h)
{
	int rc = 0;

	for (unsigned i = 0; i < reactors_n() && rc == 0; i++)
		rc = reactor_call(reactor_get(i), save_here, h);
	return rc;
}

CO_FN void conns_forget(void)
{
	for (unsigned i = 0; i < reactors_n(); i++)
		(void)reactor_call(reactor_get(i), forget_here, NULL);
}

/* --- In the next one ---------------------------------------------------------------------------- */

static int adopt_here(void *arg)
{
	struct handover_conn *h = arg;
	const struct session s = {
		.export = export_find_backend(h->backend_id),
		.is_structured = h->is_structured,
		.has_meta = h->has_meta,
		.is_kernel = h->is_kernel,
		.is_read_only = h->is_read_only,
	};

	return conn_adopt(h, &s);
}

/*
 * The list of exports was read anew, or the file replaced: what the client knows must not go on over another image.
 * One with an identity is known by that, whatever lies above its store.
 */
static int check_same(const struct handover_conn *c)
{
	const struct export *e = export_find_backend(c->backend_id);

	if (!e)
		return -ENOENT;
	if (c->size != HANDOVER_NO_SIZE && c->size != e->size)
		return -ESTALE;
	return c->stores && strcmp(c->stores, e->stores) != 0 ? -ESTALE : 0;
}

CO_FN unsigned conns_adopt(struct handover *h)
{
	unsigned lost = 0;

	for (size_t i = 0; i < h->conns_n; i++) {
		struct handover_conn *c = &h->conns[i];
		int rc = c->fd < 0 ? -EBADF : check_same(c);

		if (rc == 0)
			rc = reactor_call(reactor_get((unsigned)i % reactors_n()), adopt_here, c);
		if (rc == 0)
			continue;
		log_error("connection lost on its way to the new daemon peer=%s backend_id=%s error=%s", c->peer,
			  c->backend_id, err_name(rc));
		/* For good: the service manager may have another descriptor of it. */
		if (c->fd >= 0) {
			(void)shutdown(c->fd, SHUT_RDWR);
			(void)close(c->fd);
		}
		lost++;
	}
	return lost;
}
