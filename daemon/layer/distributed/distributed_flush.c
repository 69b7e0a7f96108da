/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Flush of a distributed volume. It waits for requests that were answered before all holders had them, and flushes
 * all nodes that have something to flush.
 *
 * A node that fails may have lost what it was given since its last good flush, so every object that it was given is
 * stale there: that is what `dirty` notes, for nodes with a volatile cache. The flush fails where too few good
 * replicas are left, and so does each later one until they have been caught up (is_owed).
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/distributed/distributed.h"

enum { DIRTY_MAX = 65536 };

void mark_set_owed(struct dist *d, struct mark *m, bool is_owed)
{
	if (m->is_owed == is_owed)
		return;
	m->is_owed = is_owed;
	d->owed_n += is_owed ? 1 : UINT64_MAX;
	if (is_owed)
		list_add(&d->owed, &m->owing);
	else
		list_del(&m->owing);
}

/* Of `holders`, those whose node has a volatile cache. */
static uint64_t holders_volatile(const struct dist *d, const struct place *at, uint64_t holders)
{
	for (unsigned r = 0; r < at->n; r++)
		if (!(d->layer->kids[at->node[r]]->caps & CAN_FLUSH))
			holders &= ~bit(r);
	return holders;
}

void mark_set_dirty(struct dist *d, struct mark *m, const struct place *at, uint64_t holders)
{
	uint64_t dirty = holders_volatile(d, at, holders);

	if (dirty == 0 || d->layer->want_ro)
		return; /* read-only, nobody flushes, and nothing could be noted */
	if (m->dirty == 0)
		d->dirty_n++;
	if (m->dirty == 0 && m->flushing == 0)
		list_add(&d->dirty, &m->in_flush);
	m->dirty |= dirty;
}

void note_dirty(struct chan *c, const char *name, const struct place *at, uint64_t holders)
{
	struct dist *d = c->layer->self;
	struct mark *m;

	if (holders_volatile(d, at, holders) == 0)
		return;
	pthread_mutex_lock(&d->lock);
	m = mark_need(d, name);
	if (m != NULL)
		mark_set_dirty(d, m, at, holders);
	pthread_mutex_unlock(&d->lock);
}

static CO_FN int flush_holder(struct each *e, unsigned r, struct chan *kid)
{
	return ch_flush(kid);
}

/* The next object of the flush, with the holders that were written; false = none left. */
static bool take_flushing(struct dist *d, char name[OBJ_NAME_MAX + 1], struct place *at,
			  uint64_t *holders)
{
	bool found;

	pthread_mutex_lock(&d->lock);
	found = !list_empty(&d->flushing);
	if (found) {
		struct mark *m = list_entry(list_pop(&d->flushing), struct mark, in_flush);

		(void)snprintf(name, OBJ_NAME_MAX + 1, "%s", m->name);
		(void)place_name(d->placing, name, at);
		*holders = m->flushing;
		m->flushing = 0;
		if (m->dirty != 0)
			list_add(&d->dirty, &m->in_flush);
		mark_done(d, m);
	}
	pthread_mutex_unlock(&d->lock);
	return found;
}

/* `failed` holders may have lost it. False: so may all others. */
static CO_FN bool lost_in_flush(struct chan *c, const char *name, const struct place *at,
				uint64_t failed)
{
	struct dist *d = c->layer->self;
	struct range_hold hold;
	struct obj obj;
	struct mark *m;
	bool is_left = false;

	(void)obj_set(&obj, name); /* came from above as an object */
	rangelock_lock(&d->objects, &hold, obj.hash, 0, UINT64_MAX, false);
	pthread_mutex_lock(&d->lock);
	m = mark_need(d, name);
	if (m != NULL) {
		is_left = (all_of(at) & ~m->stale & ~failed) != 0;
		if (is_left) {
			mark_set_stale(d, m, at, m->stale | failed);
			mark_set_owed(d, m, true);
		} else {
			/* Nobody knows more than the others: the next flush tries again. */
			m->dirty |= failed & ~m->stale;
			if (list_empty(&m->in_flush))
				list_add(&d->dirty, &m->in_flush);
		}
		mark_done(d, m);
	}
	pthread_mutex_unlock(&d->lock);
	(void)record(c, name, at); /* pay_debts looks whether it went well */
	rangelock_unlock(&d->objects, &hold);
	return is_left;
}

/* One of the `left` objects to look at: the list is turned by the running flush only, so it comes to each of them. */
static bool take_owed(struct dist *d, uint64_t *left, char name[OBJ_NAME_MAX + 1])
{
	bool found;

	pthread_mutex_lock(&d->lock);
	found = *left > 0 && !list_empty(&d->owed);
	if (found) {
		struct mark *m = list_entry(list_pop(&d->owed), struct mark, owing);

		list_add(&d->owed, &m->owing);
		(void)snprintf(name, OBJ_NAME_MAX + 1, "%s", m->name);
		--*left;
	}
	pthread_mutex_unlock(&d->lock);
	return found;
}

/* Objects of which too few good replicas were left: are there enough now, durably known? */
static CO_FN int pay_debts(struct chan *c)
{
	struct dist *d = c->layer->self;
	uint64_t left = d->owed_n;
	char name[OBJ_NAME_MAX + 1];
	int rc = 0;

	while (take_owed(d, &left, name)) {
		struct range_hold hold;
		struct place at;
		struct obj obj;
		struct mark *m;
		int repaired;

		(void)obj_set(&obj, name); /* came from above as an object */
		(void)place_name(d->placing, name, &at);
		rangelock_lock(&d->objects, &hold, obj.hash, 0, UINT64_MAX, false);
		repaired = repair_locked(c, name, &at, true);
		pthread_mutex_lock(&d->lock);
		m = mark_find(d, name);
		if (m != NULL && (m->stale & ~m->recorded) == 0 &&
		    count(all_of(&at) & ~m->stale) >= quorum_of(d, &at)) {
			mark_set_owed(d, m, false);
			mark_done(d, m);
		} else if (m != NULL) {
			rc = repaired != 0 ? repaired : -EIO;
		}
		pthread_mutex_unlock(&d->lock);
		rangelock_unlock(&d->objects, &hold);
	}
	return rc;
}

static CO_FN int flush_nodes(struct chan *c)
{
	struct dist *d = c->layer->self;
	struct place nodes, at;
	struct each e = { .c = c, .at = &nodes, .fn = flush_holder };
	uint64_t ask = 0, holders;
	char name[OBJ_NAME_MAX + 1];
	int rc = 0, owed;

	(void)place_name(d->placing, "size", &nodes); /* on all of them */
	for (unsigned i = 0; i < nodes.n; i++)
		if (d->nodes[i].is_joined && c->layer->kids[i]->caps & CAN_FLUSH)
			ask |= bit(i);
	each_holder(&e, ask);
	while (take_flushing(d, name, &at, &holders)) {
		uint64_t failed = 0;

		for (unsigned r = 0; r < at.n; r++)
			if (holders & bit(r) && !(e.ok & bit(at.node[r])))
				failed |= bit(r);
		if (failed != 0 && !lost_in_flush(c, name, &at, failed))
			rc = e.rc != 0 ? e.rc : -EIO;
	}
	owed = pay_debts(c);
	return rc != 0 ? rc : owed;
}

/* With flush_one held. */
static CO_FN int flush_now(struct chan *c)
{
	struct dist *d = c->layer->self;
	/* Before `dirty` is taken: what is changed from here on may be in there, or not. */
	uint64_t number = doubt_flush_begins(d);
	int rc;

	pthread_mutex_lock(&d->lock);
	if (!list_empty(&d->dirty))
		list_take(&d->flushing, &d->dirty);
	d->dirty_n = 0;
	list_for_each(m, &d->flushing, struct mark, in_flush)
	{
		m->flushing = m->dirty;
		m->dirty = 0;
	}
	pthread_mutex_unlock(&d->lock);
	rc = flush_nodes(c);
	if (rc == 0)
		doubt_flushed(d, number);
	return rc;
}

/* Until a flush went well that began after the call: all who wait for the running one share the next. */
int dist_flush(struct chan *c)
{
	struct dist *d = c->layer->self;
	uint64_t wanted;
	int rc = 0;

	wait_for_jobs(d);
	wanted = doubt_flush_next(d);
	co_mutex_lock(&d->flush_one);
	if (!doubt_is_flushed(d, wanted))
		rc = flush_now(c);
	co_mutex_unlock(&d->flush_one);
	return d->broken != 0 ? d->broken : rc;
}

void flush_if_much(struct chan *c)
{
	struct dist *d = c->layer->self;

	if (likely(d->dirty_n <= DIRTY_MAX))
		return;
	wait_for_jobs(d);
	co_mutex_lock(&d->flush_one);
	if (d->dirty_n > DIRTY_MAX)
		(void)flush_now(
			c); /* what it finds is marked, and told by the client's own flush */
	co_mutex_unlock(&d->flush_one);
}
