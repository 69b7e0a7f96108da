/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Where replicas may differ if the daemon ended now: the write hole, and what closes it.
 *
 * Shards are taken together in regions, REGION_SHARDS in a row; all that is no shard is one more region. A region is
 *
 *	clean		its replicas are equal, or marks say durably which are not
 *	in doubt	a change is under way, or was not flushed since, or is not settled: named in the record, the
 *			object `doubt` on the nodes (distributed_doubt_put.c), before the change begins
 *
 * and a volume that opens with a record makes the replicas of what is named there equal before they are read
 * (doubt_mark_all; then as with all that is_unsettled).
 *
 * A change enters its region, waits until `quorum` nodes have a record with it, and leaves when it is through on all
 * holders. Fewer than `quorum` nodes may be away at open, so one that has it is always there. A region that is in doubt
 * already costs nothing, so a sequential writer pays one small put to each node in 2 * REGION_SHARDS shards (the region
 * behind is named as well then), and a random one pays once for each region that it works in.
 *
 * A region leaves the record when nothing was changed in it for `clean`, what was changed is flushed, and all is
 * settled; or earlier, those unused for longest first, when there are more than REGIONS_MAX. With REGIONS_FULL, a
 * change that would add one waits until another has left. So the record is small, and few regions have to be looked at
 * after a crash.
 */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/distributed/distributed.h"
#include "nbdrs/reactor.h"

/* So many leave at a time when there are too many: a record for each would cost as much as the changes do. */
enum { LEAVE_N = REGIONS_MAX / 8 };

/* ---- regions; with the lock held ---- */

static uint64_t region_of(const struct place *at)
{
	return at->is_shard ? at->shard / REGION_SHARDS : REGION_OTHERS;
}

static struct region *region_find(struct doubt *t, uint64_t n)
{
	struct region *g;

	HASH_FIND(hh, t->table, &n, sizeof(n), g);
	return g;
}

/* NULL: out of memory. */
static struct region *region_need(struct doubt *t, uint64_t n)
{
	struct region *g = region_find(t, n);

	if (g != NULL)
		return g;
	g = calloc(1, sizeof(*g));
	if (g == NULL)
		return NULL;
	g->n = n;
	HASH_ADD(hh, t->table, n, sizeof(g->n), g);
	if (g->hh.tbl == NULL) {
		free(g);
		return NULL;
	}
	g->version = ++t->version;
	g->used = now_ns();
	list_add(&t->idle, &g->idle);
	t->n++;
	return g;
}

static void no_longer_idle(struct doubt *t, struct region *g)
{
	if (t->look == &g->idle)
		t->look = g->idle.next;
	list_del(&g->idle);
}

static void region_drop(struct doubt *t, struct region *g)
{
	HASH_DEL(t->table, g);
	no_longer_idle(t, g);
	free(g);
	t->n--;
}

/* For those who wait in doubt_begin. */
static void may_have_room(struct doubt *t)
{
	t->left++;
	co_wq_wake_all(&t->leaves);
}

/* ---- leaving the record ---- */

/* With d->lock held: replicas may differ, and no record of their own says so. */
static bool is_open(const struct mark *m)
{
	return m->is_unsettled || m->behind_n > 0 || (m->stale & ~m->recorded) != 0;
}

static bool is_settled(struct dist *d, uint64_t n)
{
	bool is_so = true;
	char name[32];

	if (d->marks_n == 0)
		return true;
	pthread_mutex_lock(&d->lock);
	if (n == REGION_OTHERS) {
		list_for_each(m, &d->others, struct mark, other)
			is_so = is_so && !is_open(m);
	} else {
		for (unsigned i = 0; i < REGION_SHARDS && is_so; i++) {
			const struct mark *m;

			place_shard_name(n * REGION_SHARDS + i, name);
			m = mark_find(d, name);
			is_so = m == NULL || !is_open(m);
		}
	}
	pthread_mutex_unlock(&d->lock);
	return is_so;
}

static bool is_volatile(const struct dist *d)
{
	for (unsigned i = 0; i < d->placing->nodes; i++)
		if (d->nodes[i].is_joined && d->layer->kids[i]->caps & CAN_FLUSH)
			return true;
	return false;
}

/* Looks through idle regions for those that are clean. */
struct drop {
	uint64_t now, age; /* ns; those used within `age` stay */
	unsigned max;      /* that leave */
	bool is_less;      /* some have left */
	bool needs_flush, needs_settling; /* and then more could */
	uint64_t unsettled;               /* the first shards that need settling, of region .. */
};

/* So many are looked at before others get their turn. */
enum { LOOK_N = 32 };

/* The next LOOK_N, from t->look on. False: that was all. With the lock held. */
static bool drop_near(struct dist *d, struct drop *p)
{
	struct doubt *t = &d->doubt;
	bool has_cache = is_volatile(d);

	for (unsigned i = 0; i < LOOK_N; i++) {
		struct region *g = list_entry(t->look, struct region, idle);

		if (t->look == &t->idle || p->max == 0 || g->used + p->age > p->now)
			return false;
		t->look = g->idle.next;
		if (has_cache && g->needs_flush > t->flushed) {
			p->needs_flush = true;
		} else if (is_settled(d, g->n)) {
			region_drop(t, g);
			p->is_less = true;
			p->max--;
		} else if (!p->needs_settling && g->n != REGION_OTHERS) {
			p->needs_settling = true;
			p->unsettled = g->n;
		}
	}
	return true;
}

/*
 * Takes up to `max` regions off that are clean and have not been used for `age`, those unused for longest first. With
 * t->room locked.
 */
static CO_FN struct drop drop_clean(struct dist *d, uint64_t age, unsigned max)
{
	struct doubt *t = &d->doubt;
	struct drop p = { .now = now_ns(), .age = age, .max = max };

	if (d->broken != 0)
		return p; /* marks may be missing */
	pthread_mutex_lock(&t->lock);
	t->look = t->idle.next;
	while (drop_near(d, &p)) {
		pthread_mutex_unlock(&t->lock);
		co_yield();
		pthread_mutex_lock(&t->lock);
	}
	t->look = NULL;
	if (p.is_less) {
		t->version++;
		may_have_room(t);
	}
	pthread_mutex_unlock(&t->lock);
	return p;
}

/* The same, and flushes where more can leave then. */
static CO_FN int drop_all(struct chan *c, uint64_t age)
{
	struct dist *d = c->layer->self;
	int rc = 0;

	co_mutex_lock(&d->doubt.room);
	if (drop_clean(d, age, UINT_MAX).needs_flush) {
		rc = dist_flush(c);
		(void)drop_clean(d, age, UINT_MAX);
	}
	co_mutex_unlock(&d->doubt.room);
	return rc;
}

void doubt_clean(struct chan *c, uint64_t age)
{
	(void)drop_all(c, age); /* what did not leave is looked at again */
	doubt_push(c);
}

/* How many should leave, so that it need not be done again at once. */
static unsigned too_many(const struct doubt *t)
{
	unsigned n = t->n;

	return n >= REGIONS_MAX ? n - REGIONS_MAX + LEAVE_N : 0;
}

static CO_FN int settle_region(struct chan *c, uint64_t n)
{
	struct dist *d = c->layer->self;
	struct place at;
	int rc = 0;

	for (unsigned i = 0; i < REGION_SHARDS && rc == 0; i++) {
		struct view v;
		char name[32];

		place_shard_name(n * REGION_SHARDS + i, name);
		settle_first(c, name, &at);
		v = mark_view(d, name);
		if (v.is_unsettled || v.stale & ~v.recorded)
			rc = holders_error(d, &at, all_of(&at));
	}
	return rc;
}

/*
 * There are many regions in doubt and a change is about to add one. When it returns 0, those that are left are in use,
 * or have been left meanwhile, as far as they are too many.
 */
static CO_FN int make_room(struct chan *c)
{
	struct dist *d = c->layer->self;
	struct doubt *t = &d->doubt;
	struct drop p;
	int rc = 0;

	co_mutex_lock(&t->room);
	p = drop_clean(d, 0, too_many(t));
	if (p.needs_flush && t->n >= REGIONS_MAX) {
		rc = dist_flush(c);
		p = drop_clean(d, 0, too_many(t));
	}
	/* A crash may have left as many: mended in the background, or here when that is too slow. */
	while (rc == 0 && t->n >= REGIONS_FULL && p.needs_settling) {
		rc = settle_region(c, p.unsettled);
		p = drop_clean(d, 0, too_many(t));
	}
	co_mutex_unlock(&t->room);
	if (d->broken != 0)
		return d->broken;
	return t->n >= REGIONS_FULL ? rc : 0; /* only what can't be cleaned is refused */
}

/* ---- changes ---- */

/* One with one holder can't differ. */
static bool is_safe(const struct place *at)
{
	return at->n == 1;
}

static bool is_known(struct doubt *t, const struct place *at)
{
	bool found;

	pthread_mutex_lock(&t->lock);
	found = region_find(t, region_of(at)) != NULL;
	pthread_mutex_unlock(&t->lock);
	return found;
}

/* 0, or an error, or 1: there are too many. */
static CO_FN int enter(struct chan *c, const struct place *at, uint64_t *version)
{
	struct dist *d = c->layer->self;
	struct doubt *t = &d->doubt;
	uint64_t n = region_of(at);
	struct region *g;
	bool is_new, has_room;
	int rc = 0;

	if (is_safe(at))
		return 0;
	if (unlikely(t->n >= REGIONS_MAX) && !is_known(t, at))
		rc = make_room(c);
	if (rc != 0)
		return rc;
	pthread_mutex_lock(&t->lock);
	is_new = region_find(t, n) == NULL;
	has_room = !is_new || t->n < REGIONS_FULL;
	g = has_room ? region_need(t, n) : NULL;
	if (g != NULL) {
		if (g->changes++ == 0)
			no_longer_idle(t, g);
		*version = MAX(*version, g->version);
		if (is_new && at->is_shard && n > 0 && t->n < REGIONS_MAX &&
		    region_find(t, n - 1) != NULL)
			(void)region_need(t, n + 1); /* a guess; without memory it waits */
	}
	pthread_mutex_unlock(&t->lock);
	return !has_room ? 1 : g != NULL ? 0 : -ENOMEM;
}

void doubt_leave(struct dist *d, const struct place *at)
{
	struct doubt *t = &d->doubt;
	struct region *g;

	if (is_safe(at))
		return;
	pthread_mutex_lock(&t->lock);
	g = region_find(t, region_of(at)); /* stays while there are changes */
	g->needs_flush = t->flushes + 1;
	if (--g->changes == 0) {
		g->used = now_ns();
		list_add(&t->idle, &g->idle);
	}
	may_have_room(t);
	pthread_mutex_unlock(&t->lock);
}

/* The same, having left all again when it is not 0. *left: what t->left is then, if nobody else leaves. */
static CO_FN int enter_all(struct chan *c, const struct place *at, unsigned n, uint64_t *left)
{
	struct dist *d = c->layer->self;
	struct doubt *t = &d->doubt;
	uint64_t version = 0;
	unsigned entered = 0;
	int rc = 0;

	pthread_mutex_lock(&t->lock);
	*left = t->left;
	pthread_mutex_unlock(&t->lock);
	while (rc == 0 && entered < n) {
		rc = enter(c, &at[entered], &version);
		entered += rc == 0;
	}
	if (rc == 0)
		rc = doubt_wait(c, version, (unsigned)d->quorum);
	while (rc != 0 && entered > 0) {
		*left += !is_safe(&at[--entered]);
		doubt_leave(d, &at[entered]);
	}
	return rc;
}

int doubt_begin(struct chan *c, const struct place *at, unsigned n)
{
	struct dist *d = c->layer->self;
	struct doubt *t = &d->doubt;
	uint64_t left;
	int rc;

	/* Who waits is in no region, so that those in whose way it is come to their end. */
	while ((rc = enter_all(c, at, n, &left)) > 0) {
		pthread_mutex_lock(&t->lock);
		while (t->left == left)
			co_wq_wait(&t->leaves, &t->lock);
		pthread_mutex_unlock(&t->lock);
	}
	return rc;
}

/* ---- flush ---- */

uint64_t doubt_flush_next(struct dist *d)
{
	uint64_t number;

	pthread_mutex_lock(&d->doubt.lock);
	number = d->doubt.flushes + 1;
	pthread_mutex_unlock(&d->doubt.lock);
	return number;
}

bool doubt_is_flushed(struct dist *d, uint64_t number)
{
	bool is_so;

	pthread_mutex_lock(&d->doubt.lock);
	is_so = d->doubt.flushed >= number;
	pthread_mutex_unlock(&d->doubt.lock);
	return is_so;
}

uint64_t doubt_flush_begins(struct dist *d)
{
	uint64_t number;

	pthread_mutex_lock(&d->doubt.lock);
	number = ++d->doubt.flushes;
	pthread_mutex_unlock(&d->doubt.lock);
	return number;
}

void doubt_flushed(struct dist *d, uint64_t number)
{
	pthread_mutex_lock(&d->doubt.lock);
	d->doubt.flushed = MAX(d->doubt.flushed, number);
	pthread_mutex_unlock(&d->doubt.lock);
}

/* ---- begin and end of the volume ---- */

void doubt_init(struct dist *d)
{
	struct doubt *t = &d->doubt;

	*t = (struct doubt){ .table = NULL };
	(void)pthread_mutex_init(&t->lock, NULL); /* cannot fail for a default mutex */
	co_mutex_init(&t->room);
	co_wq_init(&t->wq);
	co_wq_init(&t->leaves);
	list_init(&t->idle);
}

void doubt_free(struct dist *d)
{
	struct doubt *t = &d->doubt;

	list_for_each(g, &t->idle, struct region, idle) region_drop(t, g);
	co_mutex_destroy(&t->room);
	(void)pthread_mutex_destroy(&t->lock);
}

int doubt_add(struct dist *d, uint64_t n)
{
	struct doubt *t = &d->doubt;
	struct region *g;
	bool has_room;

	pthread_mutex_lock(&t->lock);
	has_room = t->n < REGIONS_READ_MAX || region_find(t, n) != NULL;
	g = has_room ? region_need(t, n) : NULL;
	if (g != NULL)
		g->needs_flush = 1; /* what the last daemon wrote may be volatile still */
	pthread_mutex_unlock(&t->lock);
	return !has_room ? -EFBIG : g != NULL ? 0 : -ENOMEM;
}

static int mark_unsettled(struct dist *d, const char *name)
{
	struct place at;
	struct mark *m;

	if (place_name(d->placing, name, &at) != 0)
		return 0; /* a replica of a shard, or a record */
	pthread_mutex_lock(&d->lock);
	m = mark_need(d, name);
	/* A single good one can't differ, but what the last daemon wrote to it may be volatile still. */
	if (m != NULL && count(all_of(&at) & ~m->stale) > 1)
		mark_unsettle(d, m, &at);
	else if (m != NULL)
		mark_set_dirty(d, m, &at, all_of(&at) & ~m->stale & holders_joined(d, &at));
	if (m != NULL)
		mark_done(d, m);
	pthread_mutex_unlock(&d->lock);
	return m != NULL ? 0 : -ENOMEM;
}

static int mark_other(void *arg, const char *stored, uint64_t size)
{
	return place_is_shard(stored) ? 0 : mark_unsettled(arg, stored); /* a shard without replica is nobody's */
}

/* All objects that are no shards; there are few, but only a listing of everything finds them. */
static CO_FN int mark_others(struct chan *c)
{
	struct dist *d = c->layer->self;
	int rc = 0;

	for (unsigned i = 0; i < d->placing->nodes && rc != -ENOMEM; i++) {
		struct chan *kid;

		if (d->nodes[i].is_joined && node_chan(c, i, &kid) == 0)
			rc = ch_list(kid, "", mark_other, d); /* another node may have them too */
	}
	return rc == -ENOMEM ? rc : 0;
}

int doubt_mark_all(struct chan *c)
{
	struct dist *d = c->layer->self;
	struct doubt *t = &d->doubt;
	struct region *g, *next;
	char name[32];
	int rc = 0;

	/* The volume is not open yet: nobody else uses the table. */
	HASH_ITER(hh, t->table, g, next) {
		if (g->n == REGION_OTHERS && rc == 0)
			rc = mark_others(c);
		for (unsigned i = 0; g->n != REGION_OTHERS && i < REGION_SHARDS && rc == 0; i++) {
			place_shard_name(g->n * REGION_SHARDS + i, name);
			rc = mark_unsettled(d, name);
		}
	}
	if (t->n > 0)
		log_warn(
			"volume was not closed, replicas are compared layer=distributed regions=%u",
			(unsigned)t->n);
	return rc;
}

int doubt_end(struct chan *c)
{
	struct dist *d = c->layer->self;
	struct doubt *t = &d->doubt;
	uint64_t version;
	int rc = drop_all(c, 0);

	if (rc != 0)
		return rc;
	pthread_mutex_lock(&t->lock);
	version = t->version;
	pthread_mutex_unlock(&t->lock);
	return doubt_wait(c, version, d->placing->nodes);
}

void doubt_joins(struct dist *d, unsigned node)
{
	struct doubt *t = &d->doubt;
	struct region *g, *next;

	pthread_mutex_lock(&t->lock);
	t->version = MAX(t->version, 1U);
	t->copies[node].has = 0;
	HASH_ITER(hh, t->table, g, next) {
		g->needs_flush = t->flushes + 1;
	}
	pthread_mutex_lock(&d->lock);
	list_for_each(m, &d->marks, struct mark, all)
	{
		struct place at;
		int r;

		if (!m->is_unsettled || place_name(d->placing, m->name, &at) != 0)
			continue;
		r = place_holder(&at, node);
		if (r >= 0)
			mark_set_dirty(d, m, &at, bit((unsigned)r) & ~m->stale);
	}
	pthread_mutex_unlock(&d->lock);
	pthread_mutex_unlock(&t->lock);
}
