/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What a request does: reads that the chain can lend are answered on the spot; everything else runs in a
 * fiber of its own, which usually ends without having waited.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "net/conn_int.h"
#include "nbdrs/buf.h"
#include "nbdrs/counter.h"
#include "nbdrs/log.h"

enum {
	POOL_MAX = 2048,	   /* requests kept for reuse, per reactor */
	SCAN_FROM = 32 * 1024,	   /* structured reads from here on are searched for zeroes */
	MAP_EXTENTS = 4096,	   /* of one BLOCK_STATUS; the client asks again for the rest */
	RETRY_MS = 10,
};

/* ---- memory ---- */

struct request *request_new(struct conn *c, const struct nbd_request *nbd)
{
	struct conn_set *set = conn_set_self();
	struct list *n = list_pop(&set->free_requests);
	struct request *r;

	if (n != NULL) {
		r = list_entry(n, struct request, node);
		set->free_n--;
	} else {
		r = malloc(sizeof(*r));
		if (r == NULL)
			return NULL;
	}
	/* Only what is read before it is written: the struct is large and this is the hot path. */
	list_init(&r->node);
	r->conn = c;
	r->nbd = *nbd;
	r->started = c->batch_ns;
	r->charged = 0;
	r->error = NBD_SUCCESS;
	r->rx = NULL;
	r->segs_n = 0;
	r->data = NULL;
	r->loan.give_back = NULL;
	r->more = NULL;
	r->more_heads = NULL;
	c->in_flight++;
	c->requests++;
	return r;
}

void request_drop_payload(struct request *r)
{
	if (r->data != NULL)
		buf_put(r->data, r->data_len);
	if (r->rx != NULL)
		rxbuf_put(r->conn, r->rx);
	r->data = NULL;
	r->rx = NULL;
}

void request_free(struct request *r)
{
	struct conn_set *set = conn_set_self();
	struct conn *c = r->conn;

	loan_return(&r->loan);
	request_drop_payload(r);
	free(r->more);
	free(r->more_heads);
	request_uncharge(r);
	c->in_flight--;
	if (set->free_n >= POOL_MAX) {
		free(r);
		return;
	}
	list_push(&set->free_requests, &r->node);
	set->free_n++;
}

void request_pool_free(struct conn_set *set)
{
	struct list *n;

	while ((n = list_pop(&set->free_requests)) != NULL)
		free(list_entry(n, struct request, node));
	set->free_n = 0;
}

/* ---- the commands, in a fiber ---- */

static struct ext ext_of(const struct request *r)
{
	return (struct ext){ &obj_none, r->nbd.off, r->nbd.len };
}

static CO_FN int do_read(struct request *r, struct chan *chan)
{
	struct iov iov;

	if (r->nbd.len == 0)
		return 0;
	r->data_len = r->nbd.len;
	r->data = buf_get(r->data_len);
	if (r->data == NULL)
		return -ENOMEM;
	iov = iov_one(&r->seg[0], r->data, r->nbd.len);
	return ch_read(chan, ext_of(r), &iov, 0);
}

static CO_FN int do_write(struct request *r, struct chan *chan, unsigned fl)
{
	struct iov iov = { r->seg, r->segs_n, r->nbd.len };

	return r->nbd.len ? ch_write(chan, ext_of(r), &iov, fl) : 0;
}

static CO_FN int do_zero(struct request *r, struct chan *chan, unsigned fl)
{
	if (!(r->nbd.flags & NBD_CMD_FLAG_NO_HOLE))
		fl |= IO_PUNCH;
	if (r->nbd.flags & NBD_CMD_FLAG_FAST_ZERO)
		fl |= IO_FAST;
	return r->nbd.len ? ch_zero(chan, ext_of(r), fl) : 0;
}

static CO_FN int do_map(struct request *r, struct chan *chan, struct extmap *map)
{
	struct ext e = ext_of(r);
	int rc;

	map->n = 0;
	map->max = r->nbd.flags & NBD_CMD_FLAG_REQ_ONE ? 1 : MAP_EXTENTS;
	map->v = calloc(map->max, sizeof(*map->v));
	if (map->v == NULL)
		return -ENOMEM;
	rc = ch_map(chan, e, map);
	if (rc == 0 && map->n == 0)
		rc = -EIO;
	return rc;
}

static CO_FN int do_command(struct request *r, struct chan *chan, struct extmap *map)
{
	/*
	 * A device outlives the daemon. What a killed one had answered from its memory would be gone under a
	 * kernel that has no reason to write it again, so there it is answered when the store has it.
	 */
	const bool is_safe = !r->conn->s.is_kernel || !(chan->layer->caps & IS_VOLATILE);
	unsigned fl = r->nbd.flags & NBD_CMD_FLAG_FUA || !is_safe ? IO_FUA : 0;

	switch (r->nbd.type) {
	case NBD_CMD_READ:
		return do_read(r, chan);
	case NBD_CMD_WRITE:
		return do_write(r, chan, fl);
	case NBD_CMD_FLUSH:
		return ch_flush(chan);
	case NBD_CMD_TRIM:
		return r->nbd.len ? ch_trim(chan, ext_of(r), fl) : 0;
	case NBD_CMD_CACHE:
		return r->nbd.len ? ch_cache(chan, ext_of(r)) : 0;
	case NBD_CMD_WRITE_ZEROES:
		return do_zero(r, chan, fl);
	case NBD_CMD_BLOCK_STATUS:
		return do_map(r, chan, map);
	default:
		return -EINVAL; /* nbd_request_check let nothing else through */
	}
}

static bool is_change(const struct request *r)
{
	return r->nbd.type == NBD_CMD_WRITE || r->nbd.type == NBD_CMD_WRITE_ZEROES || r->nbd.type == NBD_CMD_TRIM;
}

/* The kernel sends again what a lost connection has left in the chain: see ghost.c. */
static CO_FN int do_in_order(struct request *r, struct chan *chan, struct extmap *map)
{
	struct conn *c = r->conn;
	int rc;

	if (!c->s.is_kernel || !is_change(r))
		return do_command(r, chan, map);
	if (!ghost_enter(c))
		return -ESHUTDOWN; /* nobody reads the reply */
	rc = do_command(r, chan, map);
	ghost_leave(c);
	return rc;
}

static void log_failure(const struct request *r, int rc)
{
	static struct log_gate gate;
	/* One that was cut off and so did not begin: see do_in_order. */
	const bool is_left_out = rc == -ESHUTDOWN && r->conn->s.is_kernel && (r->conn->is_broken || r->conn->is_ending);
	unsigned suppressed;

	if (rc == -ENOTSUP || is_left_out || !log_gate_open(&gate, &suppressed))
		return;
	log_error("request failed export=%s peer=%s command=%u offset=%ju length=%u reason=%s suppressed=%u",
		  r->conn->s.export->name, r->conn->peer, r->nbd.type, (uintmax_t)r->nbd.off, r->nbd.len,
		  err_name(rc), suppressed);
}

/* Also what was found right under an earlier size, and then had to wait for a resize. */
static bool is_behind_end(const struct request *r, const struct export *e)
{
	return unlikely(r->nbd.off + r->nbd.len > atomic_load_explicit(&e->size, memory_order_relaxed));
}

/* As nbd_request_check. */
static int behind_end(const struct request *r)
{
	return r->nbd.type == NBD_CMD_WRITE || r->nbd.type == NBD_CMD_WRITE_ZEROES ? -ENOSPC : -EINVAL;
}

static CO_FN void request_fiber(void *arg)
{
	struct request *r = arg;
	struct export *e = r->conn->s.export;
	struct export_stats *stats = &e->stats[reactor_index(reactor_self())];
	struct extmap map = { 0 };
	struct chan *chan;
	int rc;

	counter_add(&stats->entered, 1);
	chan = chain_chan(e->chain, &rc);
	if (chan != NULL)
		rc = is_behind_end(r, e) ? behind_end(r) : do_in_order(r, chan, &map);
	counter_add(&stats->left, 1);
	if (unlikely(rc != 0)) {
		log_failure(r, rc);
		r->error = nbd_error_for(&r->nbd, rc);
	}
	if (r->nbd.type == NBD_CMD_BLOCK_STATUS && rc == 0)
		reply_queue_map(r, &map);
	else
		reply_queue(r);
	free(map.v);
}

/* ---- dispatch ---- */

static bool try_lend(struct request *r)
{
	struct conn *c = r->conn;
	struct chan *chan = chain_chan_peek(c->s.export->chain);

	if (chan == NULL || !(chan->layer->caps & CAN_LEND) || r->nbd.len == 0)
		return false;
	/* Lent bytes may not be looked at, so zeroes could not be left out of the reply. */
	if (c->s.is_structured && chan->layer->caps & HAS_HOLES && r->nbd.len >= SCAN_FROM)
		return false;
	if (ch_lend(chan, ext_of(r), &r->loan) != 0)
		return false;
	r->seg[0] = (struct iovec){ (void *)(uintptr_t)r->loan.base, r->nbd.len };
	return true;
}

/*
 * Acquire: who sees the end of a pause also sees what the chain's layers changed in it. Between drain_here() on this
 * reactor and that end nothing else than "paused" can be seen.
 */
static bool is_paused(const struct conn *c)
{
	return unlikely(atomic_load_explicit(&c->s.export->is_paused, memory_order_acquire));
}

static void start_fiber(struct request *r)
{
	struct conn *c = r->conn;

	if (!is_paused(c) && co_spawn(request_fiber, r) == 0)
		return;
	list_add(&c->stalled, &r->node);
	if (c->retry.slot == 0 && timer_start(&c->retry, reactor_now() + RETRY_MS * UINT64_C(1000000)) != 0)
		reactor_defer(&c->flush); /* no memory even for that: again in the next turn */
}

void request_dispatch(struct request *r)
{
	if (r->nbd.type == NBD_CMD_READ && !is_paused(r->conn) && try_lend(r)) {
		reply_queue(r);
		return;
	}
	start_fiber(r);
}

void request_retry_stalled(struct conn *c)
{
	struct list batch = LIST_INIT(batch);
	struct list *n;

	while ((n = list_pop(&c->stalled)) != NULL)
		list_add(&batch, n);
	while ((n = list_pop(&batch)) != NULL)
		start_fiber(list_entry(n, struct request, node));
}

void request_refuse(struct request *r, enum nbd_error error)
{
	r->error = error;
	reply_queue(r);
}
