/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Requests of layer `cache` that go to the layer below, and memory's part in them. A write is
 * answered when the layer below has answered it; what was written is kept for reading.
 *
 * Consistency. Fetches hold the lock of the granules they fill (shared) until the data is in the
 * table, changes hold it (exclusive) from before the request below until the table has changed as
 * well. So what is in the table is what the layer below would answer, or what it answered before a
 * change that has not been answered yet; a put drops the old object before it is sent, since stat
 * is not cached and must not be ahead of reads. `del` takes no lock (of many objects, in any order,
 * locks would wait for each other): it drops what is there afterwards, fetches on their way
 * included.
 *
 * Between memory and the layer below may be a disk (cache_tier.c). A read that misses memory looks
 * there without a lock: what it finds was valid when it looked. What leaves memory is offered to it
 * under the table's lock, and changes are told to it after the table has them; so nothing older can
 * come in behind a change.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "layer/cache/cache_int.h"

/* Granules fetched by one request, and parts of a large request that are worked on at a time. */
enum { RUN_MAX = IOV_SLICE_MAX, PARALLEL = 16 };
/* Granules looked up at a stretch before others have their turn. */
enum { TURN = 512 };

static CO_FN void lock_range(struct cache *c, struct range_hold *hold, struct ext e, bool is_shared)
{
	const uint64_t from = align_down(e.off, c->granule);

	rangelock_lock(&c->ranges, hold, e.obj->hash, from,
		       align_up(e.off + e.len, c->granule) - from, is_shared);
}

/* --- Reading ---------------------------------------------------------------------------------- */

/* A read, or a part of one. iov NULL: only fetch. */
struct job {
	struct chan *c;
	struct ext e;
	const struct iov *iov;
	bool is_locked; /* the whole range is, shared */
	uint64_t next;  /* taken up to here */
	int rc;
};

/* What one request below fetches. */
struct run {
	struct granule *g[RUN_MAX];
	struct iovec v[RUN_MAX];
	uint64_t first; /* its number */
	unsigned n;
};

/* Of a disk, the last granule may be short. */
static uint64_t clip(const struct chan *ch, uint64_t end)
{
	const struct layer *l = ch->layer;

	return l->is_keyed ? end : MIN(end, l->size);
}

/* Takes absent granules from `first` on, up to `end` (bytes), for fetching. */
static void take_run(struct job *j, struct run *r, uint64_t first, uint64_t end)
{
	struct cache *c = j->c->layer->self;

	r->first = first;
	r->n = 0;
	for (uint64_t n = first; r->n < RUN_MAX && n << c->shift < end; n++) {
		struct granule *g;

		if (n > first && tier_has(c->tier, j->e.obj, n))
			return;
		g = cache_table_begin(c->table, j->e.obj, n);
		if (!g)
			return;
		r->g[r->n] = g;
		r->v[r->n++] = (struct iovec){ granule_data(g), c->granule };
	}
}

/* Copies what the request wants of the run's granules. */
static void copy_out(struct job *j, const struct run *r)
{
	const struct cache *c = j->c->layer->self;

	for (unsigned i = 0; i < r->n && j->iov; i++) {
		const uint64_t start = (r->first + i) << c->shift;
		const uint64_t from = MAX(start, j->e.off);
		const uint64_t to = MIN(start + c->granule, j->e.off + j->e.len);

		if (from < to)
			(void)iov_copy_in(j->iov, from - j->e.off,
					  (uint8_t *)r->v[i].iov_base + (from - start), to - from);
	}
}

static CO_FN int fetch_run(struct job *j, struct run *r)
{
	struct cache *c = j->c->layer->self;
	const uint64_t start = r->first << c->shift;
	const uint64_t len = clip(j->c, start + r->n * c->granule) - start;
	const uint64_t end = j->e.off + j->e.len;
	struct iov iov = { r->v, r->n, len };
	struct iovec *last = &r->v[r->n - 1];
	int rc;

	/* Only the last one of the disk can be short: what lies behind it is never asked for. */
	last->iov_len = len - (r->n - 1) * c->granule;
	memset((uint8_t *)last->iov_base + last->iov_len, 0, c->granule - last->iov_len);
	rc = ch_read(j->c->kids[0], (struct ext){ j->e.obj, start, len }, &iov, 0);
	if (!rc)
		copy_out(j, r);
	for (unsigned i = 0; i < r->n; i++) {
		const uint64_t base = (r->first + i) << c->shift;

		cache_table_fill(c->table, r->g[i], !rc,
				 (uint32_t)(MIN(end, base + c->granule) - base));
	}
	return rc;
}

/* Past the cache: there is no memory for it. */
static CO_FN int read_below(struct job *j, uint64_t at, uint64_t len)
{
	struct iovec store[IOV_SLICE_MAX];
	struct iov part;

	if (!j->iov)
		return 0;
	part = iov_slice(j->iov, at - j->e.off, len, store, IOV_SLICE_MAX);
	return ch_read(j->c->kids[0], (struct ext){ j->e.obj, at, len }, &part, 0);
}

/* Fetches from the granule of `at` on; *done becomes the bytes that this served. */
static CO_FN int fetch(struct job *j, uint64_t at, uint64_t end, uint64_t *done)
{
	struct cache *c = j->c->layer->self;
	const uint64_t first = at >> c->shift;
	const uint64_t last = MIN((end - 1) >> c->shift, first + RUN_MAX - 1);
	struct range_hold hold;
	struct run r;
	int rc = 0;

	*done = 0;
	if (!j->is_locked)
		rangelock_lock(&c->ranges, &hold, j->e.obj->hash, first << c->shift,
			       (last - first + 1) << c->shift, true);
	take_run(j, &r, first, end);
	if (r.n) {
		rc = fetch_run(j, &r);
		*done = MIN((first + r.n) << c->shift, end) - at;
	}
	if (!j->is_locked)
		rangelock_unlock(&c->ranges, &hold);
	return rc;
}

/* [at, end) of the request, in order. */
static CO_FN int read_part(struct job *j, uint64_t at, uint64_t end)
{
	const struct cache *c = j->c->layer->self;
	unsigned tries = 0;

	while (at < end) {
		const uint64_t n = at >> c->shift;
		const uint32_t off = (uint32_t)(at & (c->granule - 1));
		const uint32_t len = (uint32_t)MIN(c->granule - off, end - at);
		uint64_t done = len;
		int rc = 0;

		if (cache_table_read(c->table, j->e.obj, n, off, len, j->iov, at - j->e.off) ==
			    CACHE_MISS &&
		    !tier_read(c->tier, j->e.obj, n, off, len, j->iov, at - j->e.off)) {
			rc = fetch(j, at, end, &done);
			if (!rc && !done && ++tries > 2) {
				/*
				 * Somebody else begins to fetch it each time we look, or memory is
				 * out.
				 */
				done = len;
				rc = read_below(j, at, len);
			}
		}
		if (rc)
			return rc;
		if (done)
			tries = 0;
		at += done;
	}
	return 0;
}

static CO_FN void take_parts(void *arg)
{
	struct job *j = arg;
	const struct cache *c = j->c->layer->self;
	const uint64_t end = j->e.off + j->e.len, step = RUN_MAX * c->granule;

	while (j->next < end && !j->rc) {
		const uint64_t at = j->next, to = MIN(align_down(at, step) + step, end);
		int rc;

		j->next = to;
		rc = read_part(j, at, to);
		if (rc && !j->rc)
			j->rc = rc;
	}
}

static CO_FN int read_all(struct job *j)
{
	const struct cache *c = j->c->layer->self;
	const uint64_t step = RUN_MAX * c->granule, end = j->e.off + j->e.len;
	const uint64_t parts = (end - 1) / step - j->e.off / step + 1;
	struct co_group g = CO_GROUP_INIT;

	if (parts == 1)
		return read_part(j, j->e.off, end);
	j->next = j->e.off;
	for (uint64_t i = 1; i < MIN(parts, (uint64_t)PARALLEL); i++)
		co_group_spawn(&g, take_parts, j);
	take_parts(j);
	co_group_wait(&g);
	return j->rc;
}

int through_read(struct chan *ch, struct ext e, const struct iov *iov, unsigned fl)
{
	struct cache *c = ch->layer->self;
	struct job j = { .c = ch, .e = e, .iov = iov };
	struct range_hold hold;
	int rc;

	if (e.len == 0)
		return 0;
	/* A put is seen wholly or not at all, also by who reads several granules. */
	if (!ch->layer->is_keyed || e.off >> c->shift == (e.off + e.len - 1) >> c->shift)
		return read_all(&j);
	j.is_locked = true;
	lock_range(c, &hold, e, true);
	rc = read_all(&j);
	rangelock_unlock(&c->ranges, &hold);
	return rc;
}

/* NBD_CMD_CACHE: a hint, so what fails is nobody's business. */
int through_cache(struct chan *ch, struct ext e)
{
	struct job j = { .c = ch, .e = e };

	if (e.len)
		(void)read_all(&j);
	return 0;
}

/* --- Changing --------------------------------------------------------------------------------- */

/*
 * The table after a change below: with the new bytes (iov; NULL: zeroes), or without the granules.
 * Then the disk, which has what was there before, or got it from the table until now.
 */
static CO_FN void change(struct cache *c, struct ext e, const struct iov *iov, bool is_good)
{
	const uint64_t end = e.off + e.len;
	unsigned n = 0;

	for (uint64_t at = e.off; at < end;) {
		const uint32_t off = (uint32_t)(at & (c->granule - 1));
		const uint32_t len = (uint32_t)MIN(c->granule - off, end - at);

		if (is_good)
			cache_table_change(c->table, e.obj, at >> c->shift, off, len, iov,
					   at - e.off);
		else
			cache_table_drop(c->table, e.obj, at >> c->shift);
		tier_drop(c->tier, e.obj, at >> c->shift, off, len);
		at += len;
		if (++n % TURN == 0)
			co_yield(); /* 4 GiB of zeroes are many granules */
	}
}

/* Before a change is sent below: what the disk has of that is not to be trusted after a crash. */
static CO_FN void begin(struct cache *c, struct ext e)
{
	tier_mark(c->tier, e);
	tier_settle(c->tier);
}

int through_write(struct chan *ch, struct ext e, const struct iov *iov, unsigned fl)
{
	struct cache *c = ch->layer->self;
	struct range_hold hold;
	int rc;

	lock_range(c, &hold, e, false);
	begin(c, e);
	rc = ch_write(ch->kids[0], e, iov, fl);
	change(c, e, iov, rc == 0);
	tier_done(c->tier, e);
	rangelock_unlock(&c->ranges, &hold);
	return rc;
}

int through_zero(struct chan *ch, struct ext e, unsigned fl)
{
	struct cache *c = ch->layer->self;
	struct range_hold hold;
	int rc;

	lock_range(c, &hold, e, false);
	begin(c, e);
	rc = ch_zero(ch->kids[0], e, fl);
	if (rc != -ENOTSUP)
		change(c, e, NULL, rc == 0);
	tier_done(c->tier, e);
	rangelock_unlock(&c->ranges, &hold);
	return rc;
}

/* What is read after a trim is the layer's below to say. */
int through_trim(struct chan *ch, struct ext e, unsigned fl)
{
	struct cache *c = ch->layer->self;
	struct range_hold hold;
	int rc;

	lock_range(c, &hold, e, false);
	begin(c, e);
	rc = ch_trim(ch->kids[0], e, fl);
	change(c, e, NULL, false);
	tier_done(c->tier, e);
	rangelock_unlock(&c->ranges, &hold);
	return rc;
}

/* --- Objects ---------------------------------------------------------------------------------- */

/* The table after a put. What the disk has is the new object's as well: see tier_drop_changed(). */
static CO_FN void change_whole(struct cache *c, const struct ext e, const struct iov *iov)
{
	for (uint64_t at = 0; at < e.len; at += c->granule)
		if (!tier_has(c->tier, e.obj, at >> c->shift))
			cache_table_change(c->table, e.obj, at >> c->shift, 0, (uint32_t)c->granule,
					   iov, at);
}

int through_put(struct chan *ch, const struct put *p, struct obj_stat *st)
{
	struct cache *c = ch->layer->self;
	const uint64_t whole = align_down(p->iov->len, c->granule);
	const struct ext all = { p->obj, 0, UINT64_MAX };
	struct range_hold hold;
	int rc;

	rangelock_lock(&c->ranges, &hold, p->obj->hash, 0, UINT64_MAX, false);
	/* stat is not cached: who has seen the new object there must not read the old one here. */
	cache_table_drop_from(c->table, p->obj, 0);
	tier_drop_changed(c->tier, p->obj, p->iov);
	begin(c, all);
	rc = ch_put(ch->kids[0], p, st);
	if (rc == 0)
		change_whole(c, (struct ext){ p->obj, 0, whole }, p->iov);
	else
		tier_drop_from(c->tier, p->obj, 0); /* it may be somebody else's by now */
	tier_done(c->tier, all);
	rangelock_unlock(&c->ranges, &hold);
	return rc;
}

int through_del(struct chan *ch, const struct obj *objs, unsigned n)
{
	struct cache *c = ch->layer->self;
	int rc;

	for (unsigned i = 0; i < n; i++)
		tier_mark(c->tier, (struct ext){ &objs[i], 0, UINT64_MAX });
	tier_settle(c->tier);
	rc = ch_del(ch->kids[0], objs, n);
	for (unsigned i = 0; i < n; i++) {
		cache_table_drop_from(c->table, &objs[i], 0);
		tier_drop_from(c->tier, &objs[i], 0);
		tier_done(c->tier, (struct ext){ &objs[i], 0, UINT64_MAX });
		co_yield();
	}
	return rc;
}
