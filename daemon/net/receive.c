/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Bytes in, requests out. One large receive carries many requests; they are parsed and dispatched where they
 * lie, and a write's payload is used where it lies too (struct rxbuf is kept alive by reference). Only a
 * payload that does not fit into the rest of the buffer gets a buffer of its own for its second part, and is
 * received straight into it.
 *
 * A write's whole payload is read before anything is answered, also when it is refused: the sender may be
 * unable to read replies before it is done (KERNEL-NBD.md 2.3).
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "net/conn_int.h"
#include "nbdrs/buf.h"
#include "nbdrs/log.h"

enum {
	RX_BEHIND = 64 * 1024, /* received behind a payload that goes into its own buffer */
	RX_LEAST = 16 * 1024,  /* a receive into less room than this is not worth its system call */
	RX_TURNS = 8,	       /* receives in a row before others have theirs */
	RX_ANSWER = 256 * 1024, /* received bytes after which answers leave: large writes come while others are done */
};

static _Atomic uint64_t daemon_bytes; /* payload in flight, all connections */

/* ---- receive buffers ---- */

static struct rxbuf *rxbuf_new(struct conn *c)
{
	struct rxbuf *rx = malloc(sizeof(*rx));

	if (rx == NULL)
		return NULL;
	rx->data = buf_get(RX_LEN);
	if (rx->data == NULL) {
		free(rx);
		return NULL;
	}
	rx->refs = 1;
	c->rx_live++;
	return rx;
}

void rxbuf_put(struct conn *c, struct rxbuf *rx)
{
	if (--rx->refs > 0)
		return;
	buf_put(rx->data, RX_LEN);
	free(rx);
	c->rx_live--;
}

/* Makes room for a good receive. False when there is no memory. */
static bool make_room(struct conn *c)
{
	unsigned left = c->rx_fill - c->rx_pos;
	struct rxbuf *fresh;

	if (c->rx == NULL) {
		c->rx = rxbuf_new(c);
		return c->rx != NULL;
	}
	if (c->rx->refs == 1 && c->rx_pos > 0 && left <= NBD_REQUEST_LEN) {
		/* Nobody points into it: begin at its front again, where the CPU's cache is warm. */
		memmove(c->rx->data, c->rx->data + c->rx_pos, left);
		c->rx_fill = left;
		c->rx_pos = 0;
		return true;
	}
	if (RX_LEN - c->rx_fill >= RX_LEAST)
		return true;
	assert(left < NBD_REQUEST_LEN); /* all whole requests were parsed before we receive again */
	fresh = rxbuf_new(c);
	if (fresh == NULL)
		return false;
	memcpy(fresh->data, c->rx->data + c->rx_pos, left);
	rxbuf_put(c, c->rx);
	c->rx = fresh;
	c->rx_fill = left;
	c->rx_pos = 0;
	return true;
}

/* ---- limits ---- */

static bool is_over_limit(const struct conn *c)
{
	if (c->in_flight == 0)
		return false;
	return c->in_flight >= CONN_MAX_REQUESTS || c->in_flight_bytes >= CONN_MAX_BYTES ||
	       c->rx_live >= CONN_MAX_RX || !list_empty(&c->stalled) ||
	       atomic_load_explicit(&daemon_bytes, memory_order_relaxed) >= DAEMON_MAX_BYTES;
}

static void charge(struct request *r, uint64_t bytes)
{
	r->charged = bytes;
	r->conn->in_flight_bytes += bytes;
	atomic_fetch_add_explicit(&daemon_bytes, bytes, memory_order_relaxed);
}

void request_uncharge(struct request *r)
{
	r->conn->in_flight_bytes -= r->charged;
	atomic_fetch_sub_explicit(&daemon_bytes, r->charged, memory_order_relaxed);
}

/* ---- parsing ---- */

static void lost_stream(struct conn *c, const char *why)
{
	log_warn("connection closed: %s peer=%s export=%s", why, c->peer, c->s.export->name);
	conn_receive_abort(c);
	c->is_ending = true;
}

static void point_into_rx(struct conn *c, struct request *r, size_t len)
{
	r->rx = c->rx;
	c->rx->refs++;
	r->seg[0] = (struct iovec){ c->rx->data + c->rx_pos, len };
	r->segs_n = 1;
	c->rx_pos += (unsigned)len;
}

/*
 * The payload of a write: whole, or in part with the rest to come. False when out of memory.
 */
static bool take_payload(struct conn *c, struct request *r)
{
	size_t len = r->nbd.len;
	size_t here = MIN(len, (size_t)(c->rx_fill - c->rx_pos));

	if (here == len || len <= (size_t)(RX_LEN - c->rx_pos)) {
		/* It is, or will be, in one piece where it is. */
		if (here < len) {
			c->partial = r;
			c->partial_got = 0;
			return true;
		}
		if (len > 0)
			point_into_rx(c, r, len);
		request_dispatch(r);
		return true;
	}
	r->data_len = len - here;
	r->data = buf_get(r->data_len);
	if (r->data == NULL)
		return false;
	if (here > 0)
		point_into_rx(c, r, here);
	r->seg[r->segs_n++] = (struct iovec){ r->data, r->data_len };
	c->partial = r;
	c->partial_got = 0;
	return true;
}

/* A write that waits in the receive buffer for the rest of its payload. */
static bool partial_in_rx(const struct conn *c)
{
	return c->partial != NULL && c->partial->data == NULL;
}

static void finish_partial(struct conn *c)
{
	struct request *r = c->partial;

	if (r->data == NULL) {
		if (c->rx_fill - c->rx_pos < r->nbd.len)
			return;
		point_into_rx(c, r, r->nbd.len);
	} else if (c->partial_got < r->data_len) {
		return;
	}
	c->partial = NULL;
	request_dispatch(r);
}

static void refuse(struct conn *c, struct request *r, enum nbd_error error)
{
	if (r->nbd.type != NBD_CMD_WRITE || r->nbd.len == 0) {
		request_refuse(r, error);
		return;
	}
	r->error = error;
	c->refused = r;
	c->discard = r->nbd.len;
}

static enum nbd_error judge(const struct conn *c, const struct nbd_request *nbd)
{
	if (c->is_draining)
		return NBD_ESHUTDOWN;
	return nbd_request_check(nbd, &c->limits);
}

/* One request whose header is there. */
static void take_request(struct conn *c)
{
	struct nbd_request nbd;
	enum nbd_error error;
	struct request *r;

	if (!nbd_request_parse(c->rx->data + c->rx_pos, &nbd)) {
		lost_stream(c, "a request did not begin with the magic number");
		return;
	}
	c->rx_pos += NBD_REQUEST_LEN;
	if (nbd.type == NBD_CMD_DISC) {
		c->is_ending = true;
		return;
	}
	if (nbd.type == NBD_CMD_WRITE && nbd.len > PAYLOAD_HARD_CAP) {
		lost_stream(c, "a write of more than 128 MiB");
		return;
	}
	r = request_new(c, &nbd);
	if (r == NULL) {
		lost_stream(c, "out of memory");
		return;
	}
	error = judge(c, &nbd);
	if (error != NBD_SUCCESS) {
		refuse(c, r, error);
		return;
	}
	if (nbd.type == NBD_CMD_READ || nbd.type == NBD_CMD_WRITE)
		charge(r, nbd.len);
	if (nbd.type != NBD_CMD_WRITE)
		request_dispatch(r);
	else if (!take_payload(c, r))
		refuse(c, r, NBD_ENOMEM);
}

static void discard(struct conn *c)
{
	uint64_t n = MIN(c->discard, (uint64_t)(c->rx_fill - c->rx_pos));

	c->rx_pos += (unsigned)n;
	c->discard -= n;
	if (c->discard == 0) {
		struct request *r = c->refused;

		c->refused = NULL;
		request_refuse(r, r->error);
	}
}

static void parse(struct conn *c)
{
	/* The volume may have another size by now; request_fiber looks again. */
	c->limits.size = atomic_load_explicit(&c->s.export->size, memory_order_relaxed);
	while (!c->is_ending && !c->is_broken) {
		if (c->partial != NULL) {
			finish_partial(c);
			if (c->partial != NULL)
				return;
		} else if (c->discard > 0) {
			if (c->rx_pos == c->rx_fill)
				return;
			discard(c);
		} else {
			if (c->rx_fill - c->rx_pos < NBD_REQUEST_LEN)
				return;
			c->is_paused = is_over_limit(c);
			if (c->is_paused)
				return;
			take_request(c);
		}
		if (c->tx_len >= TX_FLUSH_AT)
			reply_flush(c);
	}
}

/* ---- receiving ---- */

void conn_receive_abort(struct conn *c)
{
	struct request *r = c->partial ? c->partial : c->refused;

	c->partial = c->refused = NULL;
	c->discard = 0;
	if (r != NULL)
		request_free(r);
}

/* The input that the nbdrsd before this had received, as if it came now. */
static ssize_t receive_left(struct conn *c, const struct msghdr *msg)
{
	size_t n = 0;

	for (size_t i = 0; i < msg->msg_iovlen; i++) {
		const size_t part = MIN(msg->msg_iov[i].iov_len, c->left_len - c->left_at);

		memcpy(msg->msg_iov[i].iov_base, (char *)c->left + c->left_at, part);
		c->left_at += part;
		n += part;
	}
	if (c->left_at == c->left_len) {
		free(c->left);
		c->left = NULL;
	}
	return (ssize_t)n;
}

/* What one receive brought; *asked is how much it could have brought. */
static ssize_t receive_some(struct conn *c, size_t *asked)
{
	struct iovec v[2];
	struct msghdr msg = { .msg_iov = v };
	size_t direct = 0;
	ssize_t n;

	if (c->partial != NULL && c->partial->data != NULL) {
		direct = c->partial->data_len - c->partial_got;
		v[msg.msg_iovlen++] =
			(struct iovec){ (char *)c->partial->data + c->partial_got, direct };
	}
	v[msg.msg_iovlen] = (struct iovec){ c->rx->data + c->rx_fill, RX_LEN - c->rx_fill };
	if (direct > 0)
		v[1].iov_len = MIN(v[1].iov_len, (size_t)RX_BEHIND);
	*asked = direct + v[msg.msg_iovlen].iov_len;
	msg.msg_iovlen++;
	if (unlikely(c->left != NULL))
		n = receive_left(c, &msg);
	else if (direct > 0)
		n = recvmsg(c->fd, &msg, MSG_DONTWAIT);
	else
		n = recv(c->fd, v[0].iov_base, v[0].iov_len, MSG_DONTWAIT);
	if (n < 0)
		return -errno;
	c->partial_got += MIN((size_t)n, direct);
	c->rx_fill += (unsigned)((size_t)n - MIN((size_t)n, direct));
	return n;
}

static void stream_ended(struct conn *c, int rc)
{
	/* A write that came in part is dropped whole; what came wholly is finished. */
	conn_receive_abort(c);
	if (rc == 0)
		c->is_ending = true;
	else
		c->is_broken = true;
}

/* Receives and parses until the socket is empty, others should have a turn, a limit is reached, or the stream ends. */
static bool receive_all(struct conn *c)
{
	size_t unanswered = 0;
	bool any = false;

	/* A client that sends as fast as we serve gets its turns, no more. */
	for (unsigned turns = 0; turns < RX_TURNS && !c->is_ending && !c->is_broken && !c->is_paused; turns++) {
		size_t asked;
		ssize_t n;

		if (!partial_in_rx(c) && !make_room(c)) {
			lost_stream(c, "out of memory");
			return true;
		}
		n = receive_some(c, &asked);
		if (n == -EAGAIN)
			return any;
		if (n == -EINTR)
			continue;
		any = true;
		if (n <= 0) {
			stream_ended(c, (int)n);
			return true;
		}
		c->batch_ns = now_ns();
		parse(c);
		if ((size_t)n < asked && c->left == NULL)
			return true; /* the socket was empty */
		unanswered += (size_t)n;
		if (unanswered >= RX_ANSWER) {
			reply_flush(c);
			unanswered = 0;
		}
	}
	return any;
}

bool conn_receive(struct conn *c)
{
	bool any;

	if (c->is_paused || c->is_ending || c->is_broken || c->is_reading || c->is_held)
		return false;
	c->is_reading = true;
	any = receive_all(c);
	if (any) {
		conn_mark_busy(c);
		reply_flush(c);
	}
	c->is_reading = false;
	if (conn_try_close(c))
		return true;
	if (c->is_paused) {
		/* Deferred, not called: a client that is always ahead would keep us here, ever deeper. */
		if (!is_over_limit(c))
			reactor_defer(&c->flush);
		conn_watch_cut(c);
		return any;
	}
	if (c->left != NULL) {
		c->must_look = true; /* no socket will tell of it */
		reactor_defer(&c->flush);
	}
	/* Called for nothing (any is false) by a spin, it spins on; by a poll, that must be armed again. */
	if (!c->is_ending && !c->is_broken && !c->in.is_armed && (any || list_empty(&c->spin.node)))
		spinner_start(&c->spin);
	return any;
}

void conn_resume(struct conn *c)
{
	if (!c->is_paused || c->is_reading || c->is_ending || c->is_broken || c->is_held)
		return;
	if (is_over_limit(c)) {
		conn_watch_cut(c);
		return;
	}
	c->is_reading = true;
	/* Until it stays paused: when the socket took all replies, nothing else would bring us here again. */
	do {
		c->is_paused = false;
		c->batch_ns = now_ns();
		parse(c);
		reply_flush(c);
	} while (c->is_paused && !c->is_ending && !c->is_broken && !is_over_limit(c));
	c->is_reading = false;
	if (conn_try_close(c))
		return;
	if (c->is_paused) {
		conn_watch_cut(c);
		return;
	}
	/* Was watched for its end only; where that takes a while, the end of the watch receives, too. */
	if (c->in.is_armed)
		(void)io_watch_cancel(&c->in);
	(void)conn_receive(c);
}
