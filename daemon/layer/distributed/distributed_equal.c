/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Makes the replicas of one object equal again, under its lock, so that never newer data is overwritten: decides which
 * of those that may differ counts, and copies it as a whole to those that are stale. When that is done, and for which
 * objects, is in distributed_repair.c.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "layer/distributed/distributed.h"
#include "nbdrs/buf.h"
#include "nbdrs/io.h"
#include "nbdrs/reactor.h"

/* The object on a good holder: *data (of buf_get) and its size, or -ENOENT. */
static CO_FN int fetch(struct chan *c, const char *name, const struct place *at, unsigned r,
		       void **data, uint64_t *size)
{
	struct obj obj;
	struct obj_stat st;
	struct chan *kid;
	struct iovec v;
	struct iov iov;
	int rc = node_chan(c, at->node[r], &kid);

	if (rc != 0)
		return rc;
	place_stored(at, name, r, &obj);
	rc = ch_stat(kid, &obj, &st);
	if (rc != 0)
		return rc;
	if (st.size > BUF_MAX)
		return -EFBIG;
	*size = st.size;
	*data = buf_get(MAX(st.size, 1U));
	if (*data == NULL)
		return -ENOMEM;
	iov = iov_one(&v, *data, st.size);
	if (st.size > 0)
		rc = ch_read(kid, (struct ext){ &obj, 0, st.size }, &iov, 0);
	if (rc != 0)
		buf_put(*data, MAX(st.size, 1U));
	return rc;
}

/*
 * Puts it on holder `r`, or deletes it there where the good one has none (is_hole). Durably: what says that it is stale
 * is deleted then.
 */
static CO_FN int store(struct chan *c, const char *name, const struct place *at, unsigned r,
		       void *data, uint64_t size, bool is_hole)
{
	struct obj obj;
	struct iovec v;
	struct iov iov = iov_one(&v, data, size);
	struct put put = { .obj = &obj, .iov = &iov, .fl = IO_FUA };
	struct chan *kid;
	int rc = node_chan(c, at->node[r], &kid);

	if (rc != 0)
		return rc;
	place_stored(at, name, r, &obj);
	if (!is_hole)
		return ch_put(kid, &put, NULL);
	rc = ch_del(kid, &obj, 1);
	return rc == 0 && kid->layer->caps & CAN_FLUSH ? ch_flush(kid) : rc;
}

/* Makes holder `r` equal to holder `from`. */
static CO_FN int copy(struct chan *c, const char *name, const struct place *at, unsigned from,
		      unsigned r)
{
	struct dist *d = c->layer->self;
	uint64_t size = 0;
	void *data = NULL;
	int rc = fetch(c, name, at, from, &data, &size);
	bool is_hole = rc == -ENOENT;

	if (!is_hole)
		node_result(d, at->node[from], rc);
	if (rc != 0 && !is_hole)
		return rc;
	rc = store(c, name, at, r, data, size, is_hole);
	node_result(d, at->node[r], rc);
	if (rc != 0)
		d->nodes[at->node[r]].not_before = now_ns() + d->recheck;
	if (!is_hole)
		buf_put(data, MAX(size, 1U));
	return rc;
}

static void set_good(struct dist *d, const char *name, const struct place *at, unsigned r)
{
	struct mark *m;

	pthread_mutex_lock(&d->lock);
	m = mark_find(d, name);
	if (m != NULL && m->stale & bit(r)) {
		mark_set_stale(d, m, at, m->stale & ~bit(r));
		m->recorded = 0; /* the new good one must learn of the others */
		m->lingering |= bit(r);
	}
	pthread_mutex_unlock(&d->lock);
	atomic_fetch_add(&d->nodes[at->node[r]].caught_up_n, 1);
}

/* Two objects in memory, for offload: a shard takes a while. */
struct comparison {
	const void *a, *b;
	size_t len;
};

static int compare(void *arg)
{
	const struct comparison *k = arg;

	return memcmp(k->a, k->b, k->len) == 0 ? 0 : -EILSEQ;
}

/* Whether holder `r` has the same: `size` bytes at `data`, or (is_hole) no such object. Unknown is no. */
static CO_FN bool is_equal(struct chan *c, const char *name, const struct place *at, unsigned r,
			   void *data, uint64_t size, bool is_hole)
{
	struct comparison k = { .a = data };
	uint64_t its_size = 0;
	void *its = NULL;
	int rc = fetch(c, name, at, r, &its, &its_size);

	node_result(c->layer->self, at->node[r], rc);
	if (rc != 0)
		return is_hole && rc == -ENOENT;
	k.b = its;
	k.len = size;
	rc = !is_hole && its_size == size ? offload(compare, &k) : -EILSEQ;
	buf_put(its, MAX(its_size, 1U));
	return rc == 0;
}

/*
 * Of the replicas on `holders`, the first that answers, and those that are equal to it; 0 with *rc when none answers.
 * Those that come before it, or whose node is away, are not asked: they are unequal as far as anybody knows.
 */
static CO_FN uint64_t compare_holders(struct chan *c, const char *name, const struct place *at,
				      uint64_t holders, int *rc)
{
	struct dist *d = c->layer->self;
	uint64_t same = 0, size = 0, rest;
	bool is_hole = false;
	void *data = NULL;

	*rc = -EIO;
	for (unsigned r = 0; r < at->n && same == 0; r++) {
		if (!(holders & bit(r)))
			continue;
		*rc = fetch(c, name, at, r, &data, &size);
		node_result(d, at->node[r], *rc);
		is_hole = *rc == -ENOENT;
		if (*rc == 0 || is_hole)
			same = bit(r);
	}
	if (same == 0)
		return 0;
	rest = holders & holders_up(d, at) & ~(same | (same - 1));
	for (unsigned r = 0; r < at->n; r++)
		if (rest & bit(r) && is_equal(c, name, at, r, data, size, is_hole))
			same |= bit(r);
	if (!is_hole)
		buf_put(data, MAX(size, 1U));
	return same;
}

/* Of good replicas that may differ, the first that answers is the one, and those that are not equal to it are stale. */
static CO_FN int choose(struct chan *c, const char *name, const struct place *at)
{
	struct dist *d = c->layer->self;
	struct co_mutex *turn = &d->comparing[at->shard % COMPARE_MAX];
	uint64_t good = all_of(at) & ~mark_view(d, name).stale, same;
	struct mark *m;
	int rc;

	co_mutex_lock(turn);
	same = compare_holders(c, name, at, good & holders_joined(d, at), &rc);
	co_mutex_unlock(turn);
	if (same == 0)
		return rc;
	pthread_mutex_lock(&d->lock);
	m = mark_find(d, name);
	if (m != NULL) {
		mark_set_stale(d, m, at, m->stale | (good & ~same));
		mark_settle(d, m);
		mark_done(d, m);
	}
	pthread_mutex_unlock(&d->lock);
	return 0;
}

uint64_t holders_ready(const struct dist *d, const struct place *at)
{
	uint64_t now = now_ns(), mask = holders_up(d, at);

	for (unsigned r = 0; r < at->n; r++)
		if (d->nodes[at->node[r]].not_before > now)
			mask &= ~bit(r);
	return mask;
}

int repair_locked(struct chan *c, const char *name, const struct place *at, bool is_needed)
{
	struct dist *d = c->layer->self;
	struct view v = mark_view(d, name);
	uint64_t good, ready;
	int rc = v.is_unsettled ? choose(c, name, at) : 0;

	if (c->layer->want_ro)
		return rc; /* who was not chosen is not read as long as this is open */
	if (rc == 0)
		rc = record(c, name, at);
	if (rc != 0)
		return rc;
	v = mark_view(d, name);
	good = all_of(at) & ~v.stale & holders_joined(d, at);
	ready = v.stale & (is_needed ? holders_joined(d, at) : holders_ready(d, at));
	for (unsigned r = 0; r < at->n; r++) {
		int copied = ready & bit(r) ? -EIO : 0;

		for (unsigned from = 0; from < at->n && copied != 0; from++)
			if (good & bit(from))
				copied = copy(c, name, at, from, r);
		if (ready & bit(r) && copied == 0)
			set_good(d, name, at, r);
		else if (copied != 0)
			rc = copied;
	}
	if (mark_view(d, name).stale != v.stale) {
		int recorded = record(c, name, at);

		rc = rc != 0 ? rc : recorded;
	}
	forget(c, name, at);
	v = mark_view(d, name);
	if (v.stale == 0)
		return 0;
	return rc != 0 ? rc : holders_error(d, at, v.stale);
}

void distrust(struct chan *c, const char *name, const struct place *at, unsigned r, bool is_missing)
{
	struct dist *d = c->layer->self;
	struct range_hold hold;
	struct obj obj;
	struct obj_stat st;
	struct chan *kid;
	uint64_t good;
	bool is_so = !is_missing;
	int rc;

	if (c->layer->want_ro)
		return;
	(void)obj_set(&obj, name); /* came from above as an object */
	rangelock_lock(&d->objects, &hold, obj.hash, 0, UINT64_MAX, false);
	good = all_of(at) & ~mark_view(d, name).stale & holders_joined(d, at);
	/* It may have come or gone since: now that nobody changes it, is it here missing and there not? */
	for (unsigned i = 0; i < at->n && is_missing && good & bit(r); i++) {
		if (!(good & bit(i)) || node_chan(c, at->node[i], &kid) != 0)
			continue;
		place_stored(at, name, i, &obj);
		rc = ch_stat(kid, &obj, &st);
		if (i == r && rc != -ENOENT)
			is_missing = is_so = false;
		else if (i != r && rc == 0)
			is_so = true;
	}
	if (is_so && good & bit(r) && good != bit(r)) {
		struct mark *m;

		log_warn("replica is %s layer=distributed node=%u object=%s",
			 is_missing ? "missing" : "unreadable", at->node[r], name);
		pthread_mutex_lock(&d->lock);
		m = mark_need(d, name);
		if (m != NULL && (all_of(at) & ~m->stale & ~bit(r)) != 0)
			mark_set_stale(d, m, at, m->stale | bit(r));
		pthread_mutex_unlock(&d->lock);
		(void)repair_locked(c, name, at, false); /* tried again in the background */
	}
	rangelock_unlock(&d->objects, &hold);
}
