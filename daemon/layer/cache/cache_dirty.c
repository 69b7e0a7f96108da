/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The index: units by name, and in each an array of parts, sorted. Changes go in by moving the tail
 * of an array, which for the hundreds of parts that 4 MiB have costs less than a tree's memory
 * would. See cache_dirty.h. What is sent is chosen in cache_queue.c.
 */
#include "layer/cache/cache_dirty.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "layer/cache/cache_dirty_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/log.h"
#include "nbdrs/reactor.h"

/* Units looked at before others have their turn; of one stripe they may be more. */
enum { TURN = 512 };

/* --- Life ------------------------------------------------------------------------------------- */

int dirty_init(struct dirty *d, bool by_object, uint64_t lag_ns, uint64_t uploads)
{
	*d = (struct dirty){ .by_object = by_object, .lag_ns = lag_ns };
	d->enough = (unsigned)MAX(MIN(uploads / 2, (uint64_t)DIRTY_RECENT), UINT64_C(1));
	d->stripes = calloc(DIRTY_STRIPES, sizeof(*d->stripes));
	if (!d->stripes)
		return -ENOMEM;
	for (unsigned i = 0; i < DIRTY_STRIPES; i++) {
		(void)pthread_mutex_init(&d->stripes[i].lock,
					 NULL); /* can't fail for a default one */
		list_init(&d->stripes[i].units);
		for (unsigned k = 0; k < DIRTY_BUCKETS; k++)
			list_init(&d->stripes[i].buckets[k]);
	}
	(void)pthread_mutex_init(&d->lock, NULL);
	for (unsigned i = 0; i < UNIT_QUEUES; i++)
		list_init(&d->queues[i]);
	list_init(&d->resting);
	co_wq_init(&d->work);
	return 0;
}

static void unit_free(struct dirty *d, struct unit *u)
{
	unit_drop_all(d, u);
	list_del(&u->chain);
	list_del(&u->all);
	free(u->v);
	free(u);
	atomic_fetch_sub(&d->units_n, 1);
}

void dirty_free(struct dirty *d)
{
	if (!d->stripes)
		return;
	for (unsigned i = 0; i < DIRTY_STRIPES; i++) {
		list_for_each(u, &d->stripes[i].units, struct unit, all)
		{
			list_del(&u->node);
			unit_free(d, u);
		}
		(void)pthread_mutex_destroy(&d->stripes[i].lock);
	}
	(void)pthread_mutex_destroy(&d->lock);
	free(d->stripes);
	d->stripes = NULL;
}

/*
 * The index has no way to fail a change that is in the journal: reading it again does what memory
 * was short for.
 */
static void *must(void *p)
{
	if (!p) {
		log_error("out of memory for the index of the journal; a restart reads it again");
		abort();
	}
	return p;
}

/* --- Units; with the stripe's lock held ------------------------------------------------------- */

static uint64_t mix(uint64_t hash, uint64_t window)
{
	uint64_t z = hash + window * UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
	return z ^ z >> 31;
}

struct dirty_stripe *dirty_stripe(struct dirty *d, uint64_t key)
{
	return &d->stripes[key % DIRTY_STRIPES];
}

static struct list *bucket(struct dirty_stripe *st, uint64_t key)
{
	return &st->buckets[key / DIRTY_STRIPES % DIRTY_BUCKETS];
}

static struct unit *find(struct dirty_stripe *st, uint64_t key, uint64_t window,
			 const struct obj *obj)
{
	list_for_each(u, bucket(st, key), struct unit,
		      chain) if (u->key == key && u->window == window && u->obj.len == obj->len &&
				 memcmp(u->obj.name, obj->name, obj->len) == 0) return u;
	return NULL;
}

static struct unit *get(struct dirty *d, struct dirty_stripe *st, uint64_t key, uint64_t window,
			const struct obj *obj)
{
	struct unit *u = find(st, key, window, obj);

	if (u)
		return u;
	u = must(calloc(1, sizeof(*u)));
	u->obj = *obj;
	u->key = key;
	u->window = window;
	co_wq_init(&u->wq);
	list_init(&u->node);
	list_init(&u->rest);
	list_add(bucket(st, key), &u->chain);
	list_add(&st->units, &u->all);
	atomic_fetch_add(&d->units_n, 1);
	return u;
}

void unit_release(struct dirty *d, struct unit *u)
{
	if (!u->n && !u->gone_seq && !u->is_busy && !u->refs)
		unit_free(d, u);
}

/* --- Parts; with the stripe's lock held ------------------------------------------------------- */

static void part_drop(struct dirty *d, struct unit *u, const struct dirty_part *p)
{
	segment_put(p->seg);
	u->bytes -= p->end - p->off;
	atomic_fetch_sub_explicit(&d->bytes, p->end - p->off, memory_order_relaxed);
	atomic_fetch_sub_explicit(&d->parts_n, 1, memory_order_relaxed);
}

void unit_drop_all(struct dirty *d, struct unit *u)
{
	for (size_t i = 0; i < u->n; i++)
		part_drop(d, u, &u->v[i]);
	u->n = 0;
	u->data_end = 0;
	if (u->gone_seq)
		segment_put(u->gone_seg);
	u->gone_seq = 0;
}

void unit_drop_until(struct dirty *d, struct unit *u, uint64_t seq)
{
	size_t kept = 0;

	for (size_t i = 0; i < u->n; i++) {
		if (u->v[i].seq <= seq)
			part_drop(d, u, &u->v[i]);
		else
			u->v[kept++] = u->v[i];
	}
	u->n = kept;
	if (u->gone_seq && u->gone_seq <= seq) {
		segment_put(u->gone_seg);
		u->gone_seq = 0;
	}
	if (!u->n && !u->gone_seq)
		u->data_end = 0;
}

/* The first part that ends behind `off`; u->n when there is none. */
static size_t first_behind(const struct unit *u, uint64_t off)
{
	size_t from = 0, to = u->n;

	while (from < to) {
		const size_t mid = from + (to - from) / 2;

		if (u->v[mid].end <= off)
			from = mid + 1;
		else
			to = mid;
	}
	return from;
}

/* `p` without what lies in front of `off`. */
static struct dirty_part tail_of(struct dirty_part p, uint64_t off)
{
	if (off > p.off) {
		p.at += off - p.off;
		p.off = off;
	}
	return p;
}

/* Replaces v[i .. i + old) by `n` of `with`. */
static void splice(struct unit *u, size_t i, size_t old, const struct dirty_part *with, size_t n)
{
	const size_t now = u->n - old + n;

	if (now > u->room) {
		u->room = MAX(2 * u->room, MAX(now, (size_t)4));
		u->v = must(realloc(u->v, u->room * sizeof(*u->v)));
	}
	memmove(&u->v[i + n], &u->v[i + old], (u->n - i - old) * sizeof(*u->v));
	memcpy(&u->v[i], with, n * sizeof(*u->v));
	u->n = now;
}

/* Lays `p` over what is there. */
static void lay_over(struct dirty *d, struct unit *u, struct dirty_part p)
{
	const size_t i = first_behind(u, p.off);
	struct dirty_part with[3];
	size_t n = 0, old = 0;

	/* What sticks out in front and behind is kept, with references of its own. */
	if (i < u->n && u->v[i].off < p.off) {
		with[n] = u->v[i];
		with[n++].end = p.off;
	}
	with[n++] = p;
	while (i + old < u->n && u->v[i + old].off < p.end)
		old++;
	if (old && u->v[i + old - 1].end > p.end)
		with[n++] = tail_of(u->v[i + old - 1], p.end);
	for (size_t k = 0; k < n; k++) {
		segment_get(with[k].seg);
		u->bytes += with[k].end - with[k].off;
		atomic_fetch_add_explicit(&d->bytes, with[k].end - with[k].off,
					  memory_order_relaxed);
		atomic_fetch_add_explicit(&d->parts_n, 1, memory_order_relaxed);
	}
	for (size_t k = 0; k < old; k++)
		part_drop(d, u, &u->v[i + k]);
	splice(u, i, old, with, n);
}

/* --- Changes ---------------------------------------------------------------------------------- */

static void change_unit(struct dirty *d, const struct record *r, uint64_t window, uint64_t off,
			uint64_t end)
{
	const uint64_t key = mix(r->obj->hash, window);
	struct dirty_stripe *st = dirty_stripe(d, key);
	struct unit *u;

	pthread_mutex_lock(&st->lock);
	u = get(d, st, key, window, r->obj);
	u->newest = r->seq;
	switch (r->type) {
	case RECORD_DATA:
		u->data_end = MAX(u->data_end, end);
		/* fallthrough */
	case RECORD_ZERO:
	case RECORD_KEEP:
		lay_over(d, u,
			 (struct dirty_part){ .off = off,
					      .end = end,
					      .seq = r->seq,
					      .seg = r->seg,
					      .at = r->at + (off - r->off),
					      .type = r->type });
		break;
	case RECORD_GONE:
		unit_drop_all(d, u);
		u->gone_seq = r->seq;
		u->gone_seg = r->seg;
		segment_get(r->seg);
		break;
	case RECORD_VOID:
		unit_drop_all(d, u);
		u->done = r->seq;
		break;
	}
	if (!u->is_busy && (u->n || u->gone_seq))
		unit_enqueue(d, u);
	else if (!u->is_busy)
		unit_dequeue(d, u);
	unit_release(d, u);
	pthread_mutex_unlock(&st->lock);
}

void dirty_show(struct dirty *d, const struct record *r)
{
	const uint64_t end = r->off + r->len;

	if (d->by_object) {
		change_unit(d, r, 0, r->off, end);
		return;
	}
	for (uint64_t at = r->off; at < end;) {
		const uint64_t window = at >> UNIT_SHIFT;
		const uint64_t to = MIN(end, (window + 1) << UNIT_SHIFT);

		change_unit(d, r, window, at, to);
		at = to;
	}
}

/* --- Reads ------------------------------------------------------------------------------------ */

/* The parts of [off, end), as many as there is room for. With the stripe's lock held. */
static void look_into(const struct unit *u, uint64_t off, uint64_t end, struct look *l)
{
	uint64_t at = off;

	l->is_gone = u->gone_seq != 0;
	l->is_known = u->data_end != 0;
	for (size_t i = first_behind(u, off); i < u->n && u->v[i].off < end; i++) {
		struct dirty_part p = tail_of(u->v[i], off);

		if (l->n == LOOK_MAX) {
			end = p.off;
			break;
		}
		p.end = MIN(p.end, end);
		l->has_gaps |= p.off > at;
		at = p.end;
		segment_get(p.seg);
		l->v[l->n++] = p;
	}
	l->has_gaps |= at < end;
	l->end = end;
}

bool dirty_look(struct dirty *d, const struct obj *obj, uint64_t off, uint64_t end, struct look *l)
{
	const uint64_t window = d->by_object ? 0 : off >> UNIT_SHIFT;
	const uint64_t key = mix(obj->hash, window);
	struct dirty_stripe *st = dirty_stripe(d, key);
	const struct unit *u;

	l->n = 0;
	l->is_known = l->is_gone = l->has_gaps = false;
	l->end = end;
	if (!atomic_load(&d->units_n))
		return false;
	if (!d->by_object)
		end = l->end = MIN(end, (window + 1) << UNIT_SHIFT);
	pthread_mutex_lock(&st->lock);
	u = find(st, key, window, obj);
	if (u)
		look_into(u, off, end, l);
	pthread_mutex_unlock(&st->lock);
	return l->n || l->is_gone || l->is_known;
}

void look_end(struct look *l)
{
	for (unsigned i = 0; i < l->n; i++)
		segment_put(l->v[i].seg);
	l->n = 0;
}

/* --- All of them ------------------------------------------------------------------------------ */

/*
 * Calls fn for each unit, with its stripe's lock held, until it returns an error. Between stripes
 * others have their turn: 65,536 units are milliseconds.
 */
static CO_FN int each_unit(struct dirty *d, int (*fn)(void *arg, struct unit *u), void *arg)
{
	unsigned since_turn = 0;
	int rc = 0;

	for (unsigned i = 0; i < DIRTY_STRIPES && !rc; i++) {
		struct dirty_stripe *st = &d->stripes[i];

		pthread_mutex_lock(&st->lock);
		list_for_each(u, &st->units, struct unit, all)
		{
			if (!rc)
				rc = fn(arg, u);
			since_turn++;
		}
		pthread_mutex_unlock(&st->lock);
		if (since_turn > TURN) {
			since_turn = 0;
			co_yield();
		}
	}
	return rc;
}

struct object_visit {
	int (*fn)(void *arg, const struct obj *obj, enum dirty_state s, uint64_t end);
	void *arg;
};

static int visit_object(void *arg, struct unit *u)
{
	const struct object_visit *v = arg;
	const bool is_gone = u->gone_seq != 0;

	if (!u->data_end && !is_gone)
		return 0;
	return v->fn(v->arg, &u->obj, is_gone ? DIRTY_GONE : DIRTY_THERE, u->data_end);
}

int dirty_each_object(struct dirty *d,
		      int (*fn)(void *arg, const struct obj *obj, enum dirty_state s, uint64_t end),
		      void *arg)
{
	struct object_visit v = { fn, arg };

	return each_unit(d, visit_object, &v);
}

/* --- Targets ---------------------------------------------------------------------------------- */

int dirty_target(struct dirty *d, const struct obj *obj, struct target *t)
{
	const uint64_t key = mix(obj->hash, 0);
	struct dirty_stripe *st = dirty_stripe(d, key);
	struct unit *u;

	pthread_mutex_lock(&st->lock);
	u = find(st, key, 0, obj);
	if (u) {
		atomic_fetch_add(&u->refs, 1);
		*t = (struct target){ u, u->newest, u->attempts };
	}
	pthread_mutex_unlock(&st->lock);
	return u ? 0 : -ENOENT;
}

struct targets {
	struct target *v;
	size_t n, room;
};

static int add_target(void *arg, struct unit *u)
{
	struct targets *t = arg;

	if (u->done >= u->newest)
		return 0;
	if (t->n == t->room) {
		const size_t room = MAX(2 * t->room, (size_t)64);
		struct target *bigger = realloc(t->v, room * sizeof(*bigger));

		if (!bigger)
			return -ENOMEM;
		t->v = bigger;
		t->room = room;
	}
	atomic_fetch_add(&u->refs, 1);
	t->v[t->n++] = (struct target){ u, u->newest, u->attempts };
	return 0;
}

int dirty_targets(struct dirty *d, struct target **v, size_t *n)
{
	struct targets t = { 0 };
	int rc = atomic_load(&d->units_n) ? each_unit(d, add_target, &t) : 0;

	*v = t.v;
	*n = t.n;
	return rc;
}
