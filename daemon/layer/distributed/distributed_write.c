/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Changes of a distributed volume: write, zero and trim of parts, put and delete of whole objects.
 *
 *	enter the object's region (distributed_doubt.c)
 *	-> lock the extent (all of the object for put, delete, and where something must be repaired first)
 *	-> choose holders -> ask them all at once -> settle (marks and records, distributed_marks.c) -> unlock
 *
 * and leave the region, whatever came of it. The lock is exclusive, so that two overlapping changes reach all replicas
 * in the same order. Changes of different parts run side by side.
 *
 * With quorum < replicas the data is copied and a fiber does the above; the request is answered as soon as enough
 * have it, if none has failed until then. Its holders that are not through are `behind` meanwhile: not read from. A
 * request with FUA, a condition, or for which there is no room (BACKGROUND_MAX) waits for all.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "layer/distributed/distributed.h"
#include "nbdrs/buf.h"

enum { BACKGROUND_MAX = 64 << 20 };

struct change {
	struct chan *c;
	enum ch_op op;
	struct obj obj;
	struct place at;
	uint64_t off, len; /* of a part */
	const struct iov *iov;
	enum put_cond cond;
	const char *etag;
	unsigned fl;
	bool is_new;        /* of a put */
	struct obj_stat st; /* the same */
	unsigned st_from;
	bool has_st;
	uint64_t ask; /* holders */
	struct each each;
	struct range_hold hold;
	bool is_locked_whole;

	/* Of a change that may be answered early; one reactor. */
	struct co *waiter;
	bool is_answered, is_over;
	uint64_t behind;
	int rc;
	void *copy; /* iov's bytes, of buf_get */
	size_t copy_len;
	struct iovec copy_v;
	struct iov copy_iov;
	uint64_t ticket;
	struct list job; /* dist.jobs */
};

static bool is_whole(const struct change *ch)
{
	return ch->op == CH_PUT || ch->op == CH_DEL;
}

/* ---- on one holder ---- */

static CO_FN int change_holder(struct each *e, unsigned r, struct chan *kid)
{
	struct change *ch = e->arg;
	struct obj obj;
	struct ext ext = { &obj, ch->off, ch->len };
	struct put put = { &obj, ch->iov, ch->cond, ch->etag, ch->fl, ch->is_new };
	struct obj_stat st;
	int rc;

	place_stored(&ch->at, ch->obj.name, r, &obj);
	switch (ch->op) {
	case CH_WRITE: return ch_write(kid, ext, ch->iov, ch->fl);
	case CH_ZERO: return ch_zero(kid, ext, ch->fl);
	case CH_DEL: return ch_del(kid, &obj, 1);
	default: break;
	}
	rc = ch_put(kid, &put, &st);
	/* Of the first in order, as stat asks it: the same etag. */
	if (rc == 0 && (!ch->has_st || r < ch->st_from)) {
		ch->st = st;
		ch->st_from = r;
		ch->has_st = true;
	}
	return rc;
}

/* ---- which holders ---- */

/* 0 and the holders to ask; or the error to answer, nothing having been changed. With the lock held. */
static CO_FN int choose_holders(struct change *ch, uint64_t *ask)
{
	struct dist *d = ch->c->layer->self;
	struct view v = mark_view(d, ch->obj.name);
	uint64_t wanted;
	unsigned need = quorum_of(d, &ch->at);

	if (d->broken != 0)
		return d->broken;
	if (!is_whole(ch) && ch->is_locked_whole) {
		(void)repair_locked(ch->c, ch->obj.name, &ch->at,
				    true); /* what counts is who is good after it */
		v = mark_view(d, ch->obj.name);
		if (v.is_unsettled)
			return holders_error(d, &ch->at, all_of(&ch->at));
	}
	wanted = is_whole(ch) ? all_of(&ch->at) : all_of(&ch->at) & ~v.stale;
	*ask = wanted & holders_up(d, &ch->at);
	if (count(*ask) < need)
		*ask = wanted & holders_joined(d, &ch->at); /* perhaps it answers after all */
	return count(*ask) >= need ? 0 : holders_error(d, &ch->at, all_of(&ch->at) & ~*ask);
}

/* Locks the extent, or the whole object when it has to be repaired before a part of it can be written. */
static CO_FN void lock_extent(struct change *ch)
{
	struct dist *d = ch->c->layer->self;

	ch->is_locked_whole = is_whole(ch);
	for (;;) {
		struct view v;

		if (ch->is_locked_whole)
			rangelock_lock(&d->objects, &ch->hold, ch->obj.hash, 0, UINT64_MAX, false);
		else
			rangelock_lock(&d->objects, &ch->hold, ch->obj.hash, ch->off,
				       MAX(ch->len, 1U), false);
		v = mark_view(d, ch->obj.name);
		if (ch->is_locked_whole ||
		    (!v.is_unsettled && count(all_of(&ch->at) & ~v.stale) >= quorum_of(d, &ch->at)))
			return;
		rangelock_unlock(&d->objects, &ch->hold);
		ch->is_locked_whole = true;
	}
}

/*
 * A conditional put is decided by one holder, the first good one in order that answers; the others follow. *rc is
 * -EEXIST or -ESTALE when it was refused. Returns the holders that are through.
 */
static CO_FN uint64_t decide(struct change *ch, uint64_t ask, int *rc)
{
	struct dist *d = ch->c->layer->self;
	uint64_t stale = mark_view(d, ch->obj.name).stale, through = 0;

	for (unsigned r = 0; r < ch->at.n; r++) {
		if (!(ask & ~stale & bit(r)))
			continue;
		ch->each.rc = 0;
		each_holder(&ch->each, bit(r));
		through |= bit(r);
		*rc = ch->each.rc;
		if (*rc == 0 || *rc == -EEXIST || *rc == -ESTALE)
			return through;
	}
	return through;
}

static CO_FN int change_holders(struct change *ch)
{
	uint64_t ask = 0, through = 0;
	int rc = choose_holders(ch, &ask);

	if (rc != 0)
		return rc;
	ch->ask = ask;
	ch->each.c = ch->c;
	ch->each.at = &ch->at;
	ch->each.fn = change_holder;
	ch->each.arg = ch;
	if (ch->cond != PUT_ALWAYS) {
		through = decide(ch, ask, &rc);
		if (rc == -EEXIST || rc == -ESTALE) {
			/* One that failed before may have done it, and differs from the one that refused. */
			through &= ~bit(63 - (unsigned)__builtin_clzll(through));
			if (through != 0)
				(void)settle(ch->c, ch->obj.name, &ch->at, through,
					     all_of(&ch->at) & ~through, false, rc);
			return rc;
		}
		if (rc != 0)
			return settle(ch->c, ch->obj.name, &ch->at, through, 0, true, rc);
		ch->cond = PUT_ALWAYS;
	}
	each_holder(&ch->each, ask & ~through);
	note_dirty(ch->c, ch->obj.name, &ch->at, ch->each.ok);
	return settle(ch->c, ch->obj.name, &ch->at, ask, ch->each.ok, is_whole(ch), ch->each.rc);
}

/* Its region has been entered, and is left. */
static CO_FN int change_now(struct change *ch)
{
	struct dist *d = ch->c->layer->self;
	int rc;

	lock_extent(ch);
	rc = change_holders(ch);
	rangelock_unlock(&d->objects, &ch->hold);
	doubt_leave(d, &ch->at);
	return rc;
}

/* ---- answered before all have it ---- */

/*
 * Whether it may be answered now: enough have it, none failed, and whoever does not get it is known to be stale
 * already, durably. With the lock held; `m` may be NULL.
 */
static bool may_answer(const struct dist *d, const struct change *ch, const struct mark *m)
{
	const struct each *e = &ch->each;
	uint64_t stale = m != NULL ? m->stale : 0;

	if (e->done != e->ok || count(e->ok & ~stale) < quorum_of(d, &ch->at))
		return false;
	if (all_of(&ch->at) & ~stale & ~ch->ask)
		return false;
	return stale == 0 || (!is_whole(ch) && (stale & ~m->recorded) == 0);
}

static void after_holder(struct each *e)
{
	struct change *ch = e->arg;
	struct dist *d = ch->c->layer->self;
	struct mark *m;

	if (ch->is_answered || ch->waiter == NULL)
		return;
	pthread_mutex_lock(&d->lock);
	m = mark_find(d, ch->obj.name);
	if (may_answer(d, ch, m)) {
		uint64_t left = ch->ask & ~e->ok;

		m = left != 0 ? mark_need(d, ch->obj.name) : NULL;
		if (m != NULL) {
			m->behind = (m->behind_n > 0 ? m->behind : 0) | left;
			m->behind_n++;
			ch->behind = left;
		}
		ch->is_answered = left == 0 || m != NULL;
	}
	pthread_mutex_unlock(&d->lock);
	if (ch->is_answered)
		co_wake(ch->waiter);
}

static void no_longer_behind(struct change *ch)
{
	struct dist *d = ch->c->layer->self;
	struct mark *m;

	pthread_mutex_lock(&d->lock);
	m = ch->rc != 0 && ch->is_answered ? mark_need(d, ch->obj.name)
					   : mark_find(d, ch->obj.name);
	if (m != NULL) {
		if (ch->behind != 0)
			m->behind_n--;
		if (ch->rc != 0 && ch->is_answered)
			mark_set_owed(d, m, true);
		mark_done(d, m);
	}
	d->background_len -= ch->copy_len;
	list_del(&ch->job);
	co_wq_wake_all(&d->quiet);
	pthread_mutex_unlock(&d->lock);
}

static CO_FN void job_run(void *arg)
{
	struct change *ch = arg;
	struct co *waiter;

	ch->rc = change_now(ch);
	buf_put(ch->copy, ch->copy_len);
	no_longer_behind(ch);
	waiter = ch->waiter;
	ch->is_over = true;
	if (waiter != NULL)
		co_wake(waiter); /* it frees */
	else
		free(ch);
}

/* Takes room for the data; false when there is none, or no need: then the request waits for all. */
static bool take_background(struct dist *d, const struct change *ch)
{
	bool has_room;

	if (quorum_of(d, &ch->at) == ch->at.n || ch->fl & IO_FUA || ch->cond != PUT_ALWAYS ||
	    ch->op == CH_DEL)
		return false;
	pthread_mutex_lock(&d->lock);
	has_room = d->background_len + (ch->iov ? ch->iov->len : 0) <= BACKGROUND_MAX;
	if (has_room)
		d->background_len += ch->iov ? ch->iov->len : 0;
	pthread_mutex_unlock(&d->lock);
	return has_room;
}

static CO_FN int change_behind(struct change *small, struct obj_stat *st)
{
	struct dist *d = small->c->layer->self;
	struct change *ch = malloc(sizeof(*ch));
	int rc;

	if (ch != NULL) {
		*ch = *small;
		ch->copy_len = ch->iov ? ch->iov->len : 0;
		ch->copy = ch->copy_len ? buf_get(ch->copy_len) : NULL;
	}
	if (ch == NULL || (ch->copy_len && ch->copy == NULL)) {
		free(ch);
		pthread_mutex_lock(&d->lock);
		d->background_len -= small->iov ? small->iov->len : 0;
		pthread_mutex_unlock(&d->lock);
		return change_now(small);
	}
	if (ch->iov != NULL) {
		(void)iov_copy_out(ch->iov, 0, ch->copy, ch->copy_len);
		ch->copy_iov = iov_one(&ch->copy_v, ch->copy, ch->copy_len);
		ch->iov = &ch->copy_iov;
	}
	ch->each.after = after_holder;
	ch->waiter = co_self();
	pthread_mutex_lock(&d->lock);
	ch->ticket = ++d->ticket;
	list_add(&d->jobs, &ch->job);
	pthread_mutex_unlock(&d->lock);
	if (co_spawn(job_run, ch) != 0)
		job_run(ch); /* no fiber: the caller does it, and waits for all */
	while (!ch->is_answered && !ch->is_over)
		co_park();
	*st = ch->st;
	ch->waiter = NULL;
	if (!ch->is_over)
		return 0;
	rc = ch->rc;
	free(ch);
	return rc;
}

void wait_for_jobs(struct dist *d)
{
	uint64_t ticket;

	pthread_mutex_lock(&d->lock);
	ticket = d->ticket;
	while (!list_empty(&d->jobs) &&
	       list_entry(d->jobs.next, struct change, job)->ticket <= ticket)
		co_wq_wait(&d->quiet, &d->lock);
	pthread_mutex_unlock(&d->lock);
}

static CO_FN int change(struct change *ch, struct obj_stat *st)
{
	struct dist *d = ch->c->layer->self;
	struct obj_stat mine;
	int rc = place_name(d->placing, ch->obj.name, &ch->at);

	if (rc != 0)
		return rc;
	flush_if_much(ch->c);
	rc = doubt_begin(ch->c, &ch->at, 1);
	if (rc != 0)
		return rc;
	if (take_background(d, ch)) {
		rc = change_behind(ch, &mine);
	} else {
		rc = change_now(ch);
		mine = ch->st;
	}
	if (rc == 0 && st != NULL)
		*st = mine;
	return rc;
}

/* ---- operations ---- */

int dist_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	struct change ch = { .c = c,
			     .op = CH_WRITE,
			     .obj = *e.obj,
			     .off = e.off,
			     .len = e.len,
			     .iov = iov,
			     .fl = fl };

	return change(&ch, NULL);
}

int dist_zero(struct chan *c, struct ext e, unsigned fl)
{
	struct change ch = {
		.c = c, .op = CH_ZERO, .obj = *e.obj, .off = e.off, .len = e.len, .fl = fl
	};

	/* One node may be able to and another not, and then data is not untouched. */
	if (fl & IO_FAST)
		return -ENOTSUP;
	return change(&ch, NULL);
}

/* A trim may leave old data, and on each node another; zeroes are the same everywhere. */
int dist_trim(struct chan *c, struct ext e, unsigned fl)
{
	return dist_zero(c, e, fl | IO_PUNCH);
}

int dist_put(struct chan *c, const struct put *p, struct obj_stat *st)
{
	struct change ch = { .c = c,
			     .op = CH_PUT,
			     .obj = *p->obj,
			     .len = p->iov->len,
			     .iov = p->iov,
			     .cond = p->cond,
			     .etag = p->etag,
			     .fl = p->fl,
			     .is_new = p->is_new };

	if (p->cond != PUT_ALWAYS && !(c->layer->caps & CAN_PUT_IF))
		return -ENOTSUP;
	return change(&ch, st);
}

/* ---- delete ---- */

/* So many at a time: their locks are held together. */
enum { DEL_MAX = 256 };

struct del_one {
	const struct obj *obj;
	struct dels *all;
	const struct place *at; /* of dels.at */
	uint64_t ask, ok;
	bool is_locked; /* another one of the same hash has the lock otherwise */
	struct range_hold hold;
};

struct dels {
	struct chan *c;
	unsigned n;
	struct del_one *v;
	struct place *at;
	struct each each; /* over nodes */
	int rc;
};

static int by_hash(const void *a, const void *b)
{
	const struct del_one *x = a, *y = b;

	return x->obj->hash < y->obj->hash ? -1 : x->obj->hash > y->obj->hash;
}

/* All that one node has of them, in one request. */
static CO_FN int del_on_node(struct each *e, unsigned node, struct chan *kid)
{
	struct dels *ds = e->arg;
	struct obj *objs = calloc(ds->n, sizeof(*objs));
	unsigned n = 0;
	int rc = 0;

	if (objs == NULL)
		return -ENOMEM;
	for (unsigned i = 0; i < ds->n; i++) {
		int r = place_holder(ds->v[i].at, node);

		if (r >= 0 && ds->v[i].ask & bit((unsigned)r))
			place_stored(ds->v[i].at, ds->v[i].obj->name, (unsigned)r, &objs[n++]);
	}
	if (n > 0)
		rc = ch_del(kid, objs, n);
	free(objs);
	return rc;
}

static CO_FN void settle_del(void *arg)
{
	struct del_one *o = arg;
	int rc;

	note_dirty(o->all->c, o->obj->name, o->at, o->ok);
	rc = settle(o->all->c, o->obj->name, o->at, o->ask, o->ok, true, o->all->each.rc);
	if (rc != 0)
		o->all->rc = rc;
}

static CO_FN int del_locked(struct dels *ds)
{
	struct dist *d = ds->c->layer->self;
	struct place nodes;
	struct co_group group = CO_GROUP_INIT;
	uint64_t ask = 0;

	(void)place_name(d->placing, "size", &nodes); /* on all of them */
	for (unsigned i = 0; i < ds->n; i++) {
		struct del_one *o = &ds->v[i];

		o->ask = holders_up(d, o->at);
		if (count(o->ask) < quorum_of(d, o->at))
			o->ask = holders_joined(d, o->at);
		if (count(o->ask) < quorum_of(d, o->at))
			return holders_error(d, o->at, all_of(o->at) & ~o->ask);
		for (unsigned r = 0; r < o->at->n; r++)
			ask |= o->ask & bit(r) ? bit(o->at->node[r]) : 0;
	}
	ds->each = (struct each){ .c = ds->c, .at = &nodes, .fn = del_on_node, .arg = ds };
	each_holder(&ds->each, ask);
	for (unsigned i = 0; i < ds->n; i++) {
		struct del_one *o = &ds->v[i];

		for (unsigned r = 0; r < o->at->n; r++)
			if (o->ask & bit(r) && ds->each.ok & bit(o->at->node[r]))
				o->ok |= bit(r);
		co_group_spawn(&group, settle_del, o);
	}
	co_group_wait(&group);
	return ds->rc;
}

/*
 * Not in doubt when the volume ends (`is_end`): `size` needs no record (where good holders don't agree whether it
 * exists it does, and the rest is gone before), and then no put of one can fail when it is too late to try again.
 */
static CO_FN int del_now(struct dels *ds, bool is_end)
{
	struct dist *d = ds->c->layer->self;
	int rc = is_end ? 0 : doubt_begin(ds->c, ds->at, ds->n);

	if (rc != 0)
		return rc;
	/* In one order, so that two of these never wait for each other. */
	qsort(ds->v, ds->n, sizeof(*ds->v), by_hash);
	for (unsigned i = 0; i < ds->n; i++) {
		struct del_one *o = &ds->v[i];

		o->is_locked = i == 0 || o->obj->hash != ds->v[i - 1].obj->hash;
		if (o->is_locked)
			rangelock_lock(&d->objects, &o->hold, o->obj->hash, 0, UINT64_MAX, false);
	}
	rc = del_locked(ds);
	for (unsigned i = 0; i < ds->n; i++)
		if (ds->v[i].is_locked)
			rangelock_unlock(&d->objects, &ds->v[i].hold);
	for (unsigned i = 0; i < ds->n && !is_end; i++)
		doubt_leave(d, &ds->at[i]);
	return rc;
}

static CO_FN int del_some(struct chan *c, const struct obj *objs, unsigned n, bool is_end)
{
	struct dist *d = c->layer->self;
	struct dels ds = { .c = c, .n = n };
	int rc = d->broken;

	ds.v = calloc(n, sizeof(*ds.v));
	ds.at = calloc(n, sizeof(*ds.at));
	if (ds.v == NULL || ds.at == NULL)
		rc = -ENOMEM;
	for (unsigned i = 0; i < n && rc == 0; i++) {
		ds.v[i].obj = &objs[i];
		ds.v[i].all = &ds;
		ds.v[i].at = &ds.at[i];
		rc = place_name(d->placing, objs[i].name, &ds.at[i]);
	}
	if (rc == 0)
		rc = del_now(&ds, is_end);
	free(ds.at);
	free(ds.v);
	return rc;
}

static bool is_size(const struct obj *obj)
{
	return strcmp(obj->name, "size") == 0;
}

int dist_del(struct chan *c, const struct obj *objs, unsigned n)
{
	bool is_end = false;
	int rc = 0;

	flush_if_much(c);
	for (unsigned i = 0; i < n; i++)
		is_end = is_end || is_size(&objs[i]);
	if (is_end)
		rc = end_volume(c, false);
	for (unsigned i = 0; i < n && rc == 0; i += DEL_MAX)
		rc = del_some(c, objs + i, MIN(n - i, (unsigned)DEL_MAX), is_end);
	if (is_end && rc == 0)
		rc = end_volume(c, true);
	return rc;
}
