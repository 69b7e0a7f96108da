/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Replies out: built in the request's own memory, queued in the order in which requests finish, and sent
 * many at a time with one sendmsg, straight from where the data lies.
 *
 * Reads are simple replies or, where the client negotiated them, chunks; everything else is a simple reply also
 * then, which the protocol allows and which is shorter (NBD proto.md, "Structured replies": only READ and
 * BLOCK_STATUS must be structured).
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "net/conn_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/counter.h"
#include "nbdrs/log.h"

enum {
	DATA_HEAD = NBD_CHUNK_LEN + 8,	/* OFFSET_DATA before its data */
	HOLE_LEN = NBD_CHUNK_LEN + 12,	/* OFFSET_HOLE, whole */
	ERROR_LEN = NBD_CHUNK_LEN + 6,	/* ERROR without a text */
	HOLE_UNIT = 32 * 1024,		/* zeroes are looked for in pieces of this size */
};

/* ---- building ---- */

static void set_head(struct request *r, size_t len)
{
	r->tx[0] = (struct iovec){ r->head, len };
	r->tx_n = 1;
	r->tx_len = len;
}

static void build_error_chunk(struct request *r)
{
	nbd_chunk_header(r->head, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR, r->nbd.cookie, 6);
	put_be32(r->head + NBD_CHUNK_LEN, r->error);
	put_be16(r->head + NBD_CHUNK_LEN + 4, 0);
	set_head(r, ERROR_LEN);
}

static bool is_zero_unit(const char *p, size_t len)
{
	/* Equal to itself one byte further on, and beginning with 0: all zero. memcmp is vectorised. */
	return p[0] == 0 && memcmp(p, p + 1, len - 1) == 0;
}

struct chunks {
	struct request *r;
	uint8_t *heads;
	unsigned n, max; /* segments */
	size_t heads_n;
};

static void add_chunk(struct chunks *ch, uint64_t from, uint64_t to, bool is_hole)
{
	struct request *r = ch->r;
	uint8_t *head = ch->heads + ch->heads_n;
	uint16_t flags = to == r->nbd.len ? NBD_REPLY_FLAG_DONE : 0;
	uint32_t len = (uint32_t)(to - from);

	put_be64(head + NBD_CHUNK_LEN, r->nbd.off + from);
	if (is_hole) {
		nbd_chunk_header(head, flags, NBD_REPLY_TYPE_OFFSET_HOLE, r->nbd.cookie, 12);
		put_be32(head + NBD_CHUNK_LEN + 8, len);
		r->more[ch->n++] = (struct iovec){ head, HOLE_LEN };
		ch->heads_n += HOLE_LEN;
		r->tx_len += HOLE_LEN;
		return;
	}
	nbd_chunk_header(head, flags, NBD_REPLY_TYPE_OFFSET_DATA, r->nbd.cookie, 8 + len);
	r->more[ch->n++] = (struct iovec){ head, DATA_HEAD };
	r->more[ch->n++] = (struct iovec){ (char *)r->data + from, len };
	ch->heads_n += DATA_HEAD;
	r->tx_len += DATA_HEAD + (size_t)len;
}

/* Data and holes as found. False: nothing to gain, or no memory; send it in one piece. */
static bool build_sparse(struct request *r)
{
	unsigned units = (r->nbd.len + HOLE_UNIT - 1) / HOLE_UNIT;
	struct chunks ch = { .r = r };
	uint64_t from = 0;
	bool was_hole = false, any = false;

	for (unsigned u = 0; u < units && !any; u++)
		any = is_zero_unit((char *)r->data + (size_t)u * HOLE_UNIT,
				   MIN((size_t)HOLE_UNIT, r->nbd.len - (size_t)u * HOLE_UNIT));
	if (!any)
		return false;
	r->more = malloc((2 * (size_t)units + 2) * sizeof(*r->more));
	r->more_heads = malloc((size_t)(units + 1) * HOLE_LEN);
	if (r->more == NULL || r->more_heads == NULL) {
		free(TAKE_PTR(r->more));
		free(TAKE_PTR(r->more_heads));
		return false;
	}
	ch.heads = r->more_heads;
	r->tx_len = 0;
	for (unsigned u = 0; u < units; u++) {
		uint64_t at = (uint64_t)u * HOLE_UNIT;
		bool hole = is_zero_unit((char *)r->data + at, MIN((size_t)HOLE_UNIT, r->nbd.len - at));

		if (u > 0 && hole != was_hole) {
			add_chunk(&ch, from, at, was_hole);
			from = at;
		}
		was_hole = hole;
	}
	add_chunk(&ch, from, r->nbd.len, was_hole);
	r->tx_n = ch.n;
	return true;
}

static void build_read_chunks(struct request *r)
{
	unsigned caps = chain_top(r->conn->s.export->chain)->caps;

	if (r->nbd.len == 0) {
		nbd_chunk_header(r->head, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, r->nbd.cookie, 0);
		set_head(r, NBD_CHUNK_LEN);
		return;
	}
	if (r->data != NULL && caps & HAS_HOLES && r->nbd.len >= HOLE_UNIT &&
	    !(r->nbd.flags & NBD_CMD_FLAG_DF) && build_sparse(r))
		return;
	nbd_chunk_header(r->head, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_DATA, r->nbd.cookie,
			 8 + r->nbd.len);
	put_be64(r->head + NBD_CHUNK_LEN, r->nbd.off);
	set_head(r, DATA_HEAD);
	r->tx[r->tx_n++] = (struct iovec){ r->seg[0].iov_base, r->nbd.len };
	r->tx_len += r->nbd.len;
}

static void build(struct request *r)
{
	bool is_read = r->nbd.type == NBD_CMD_READ;
	bool must_chunk = is_read || r->nbd.type == NBD_CMD_BLOCK_STATUS;

	if (r->conn->s.is_structured && must_chunk) {
		if (r->error != NBD_SUCCESS)
			build_error_chunk(r);
		else
			build_read_chunks(r);
		return;
	}
	nbd_simple_reply(r->head, r->error, r->nbd.cookie);
	set_head(r, NBD_SIMPLE_REPLY_LEN);
	if (is_read && r->error == NBD_SUCCESS && r->nbd.len > 0) {
		r->tx[r->tx_n++] = (struct iovec){ r->seg[0].iov_base, r->nbd.len };
		r->tx_len += r->nbd.len;
	}
}

/* ---- queueing ---- */

static void count(const struct request *r)
{
	struct export_stats *s = &r->conn->s.export->stats[reactor_index(reactor_self())];
	unsigned cmd = r->nbd.type < EXPORT_CMDS ? r->nbd.type : NBD_CMD_DISC;

	counter_add(&s->ops[cmd], 1);
	if (r->error == NBD_SUCCESS)
		counter_add(&s->bytes[cmd], r->nbd.len);
	else
		counter_add(&s->errors[cmd], 1);
}

static void enqueue(struct request *r)
{
	struct conn *c = r->conn;

	count(r);
	if (unlikely(c->is_broken)) {
		request_free(r);
	} else {
		list_add(&c->tx, &r->node);
		c->tx_len += r->tx_len;
	}
	if (!c->is_reading)
		reactor_defer(&c->flush);
}

void reply_queue(struct request *r)
{
	/* Now, not when the reply left: the next receive then finds its buffer free, and warm. */
	if (r->nbd.type == NBD_CMD_WRITE)
		request_drop_payload(r);
	build(r);
	enqueue(r);
}

/* One chunk: context id, then (length, flags) pairs (NBD proto.md, NBD_REPLY_TYPE_BLOCK_STATUS). */
void reply_queue_map(struct request *r, const struct extmap *map)
{
	size_t len = 4 + (size_t)map->n * 8;
	uint64_t left = r->nbd.len;
	uint8_t *p = malloc(len);
	unsigned n = 0;

	if (p == NULL) {
		request_refuse(r, NBD_ENOMEM);
		return;
	}
	put_be32(p, NBD_META_BASE_ALLOCATION);
	for (; n < map->n && left > 0; n++) {
		uint32_t piece = (uint32_t)MIN(map->v[n].len, left);

		put_be32(p + 4 + n * 8, piece);
		put_be32(p + 8 + n * 8, map->v[n].flags);
		left -= piece;
	}
	len = 4 + (size_t)n * 8;
	nbd_chunk_header(r->head, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_BLOCK_STATUS, r->nbd.cookie,
			 (uint32_t)len);
	set_head(r, NBD_CHUNK_LEN);
	r->more_heads = p;
	r->tx[r->tx_n++] = (struct iovec){ p, len };
	r->tx_len += len;
	enqueue(r);
}

/* ---- sending ---- */

static unsigned gather(const struct conn *c, struct iovec *v, unsigned max_replies)
{
	size_t skip = c->tx_off;
	unsigned n = 0;

	list_for_each(r, &c->tx, struct request, node) {
		const struct iovec *src = r->more ? r->more : r->tx;

		if (max_replies-- == 0)
			break;
		for (unsigned i = 0; i < r->tx_n; i++) {
			if (skip >= src[i].iov_len) {
				skip -= src[i].iov_len;
				continue;
			}
			if (n == TX_IOV)
				return n;
			v[n].iov_base = (char *)src[i].iov_base + skip;
			v[n].iov_len = src[i].iov_len - skip;
			skip = 0;
			n++;
		}
	}
	return n;
}

static void record_latency(const struct request *r, uint64_t now)
{
	static const uint8_t hist_of[EXPORT_CMDS] = {
		[NBD_CMD_WRITE] = 1, [NBD_CMD_TRIM] = 1, [NBD_CMD_WRITE_ZEROES] = 1, [NBD_CMD_FLUSH] = 2,
	};
	struct export_stats *s = &r->conn->s.export->stats[reactor_index(reactor_self())];

	if (r->nbd.type < EXPORT_CMDS)
		hist_add(&s->latency[hist_of[r->nbd.type]], now - r->started);
}

/* `n` bytes left the queue's front. */
static void advance(struct conn *c, size_t n)
{
	uint64_t now = now_ns();

	c->tx_len -= n;
	c->tx_off += n;
	while (!list_empty(&c->tx)) {
		struct request *r = list_entry(c->tx.next, struct request, node);

		if (c->tx_off < r->tx_len)
			break;
		c->tx_off -= r->tx_len;
		record_latency(r, now);
		list_del(&r->node);
		request_free(r);
	}
}

/*
 * The kernel could not read lent memory: the file was truncated under us. The read whose header has not left
 * yet gets an error; otherwise only the end of the connection is left.
 */
static void handle_fault(struct conn *c)
{
	struct request *r = list_entry(c->tx.next, struct request, node);

	if (!c->tx_careful) {
		c->tx_careful = true; /* find out which one it was */
		return;
	}
	c->tx_careful = false;
	log_error("lent memory is gone: was the file truncated? export=%s peer=%s offset=%ju",
		  c->s.export->name, c->peer, (uintmax_t)r->nbd.off);
	if (c->tx_off > 0) {
		c->is_broken = true;
		return;
	}
	c->tx_len -= r->tx_len;
	loan_return(&r->loan);
	r->error = NBD_EIO;
	build(r);
	c->tx_len += r->tx_len;
}

static void became_writable(struct io_watch *w, int events)
{
	struct conn *c = container_of(w, struct conn, out);

	(void)events;
	reactor_defer(&c->flush);
}

static ssize_t send_segments(int fd, const struct msghdr *msg)
{
	const int flags = MSG_DONTWAIT | MSG_NOSIGNAL;

	/* A lone segment, as a single reply to a write: the shorter system call. */
	if (msg->msg_iovlen == 1)
		return send(fd, msg->msg_iov->iov_base, msg->msg_iov->iov_len, flags);
	return sendmsg(fd, msg, flags);
}

void reply_flush(struct conn *c)
{
	while (c->tx_len > 0 && !c->is_broken && !c->out.is_armed) {
		struct msghdr msg = { .msg_iov = conn_set_self()->tx_iov };
		ssize_t n;

		msg.msg_iovlen = gather(c, msg.msg_iov, c->tx_careful ? 1 : UINT32_MAX);
		n = send_segments(c->fd, &msg);
		if (n >= 0) {
			advance(c, (size_t)n);
			c->tx_careful = false;
		} else if (errno == EFAULT) {
			handle_fault(c);
		} else if (errno == EAGAIN) {
			if (io_watch_arm(&c->out, c->fd, POLLOUT, became_writable) != 0)
				c->is_broken = true;
		} else if (errno != EINTR) {
			c->is_broken = true; /* the peer is gone */
		}
	}
	if (c->is_broken)
		reply_drop(c);
}

void reply_drop(struct conn *c)
{
	struct list *n;

	while ((n = list_pop(&c->tx)) != NULL)
		request_free(list_entry(n, struct request, node));
	c->tx_len = c->tx_off = 0;
}
