/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What asks for unsaved shards to be stored now: flush, FUA, and the deletion of whole shards.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "layer/sharded/shardbuf_int.h"
#include "nbdrs/cleanup.h"

/* --- Saving ----------------------------------------------------------------------------------- */

/* Until every generation up to `seq` of shard n is in the store, or a put begun after the call failed. */
static CO_FN int save(struct shard_user *u, uint64_t n, uint64_t seq)
{
	struct shardbuf *b = u->b;
	struct stripe *st = shard_stripe(b, n);
	uint64_t before;
	struct shard *s;
	int rc = 0;

	pthread_mutex_lock(&st->lock);
	s = shard_find(st, n);
	if (!s) {
		pthread_mutex_unlock(&st->lock);
		return 0;
	}
	s->refs++;
	before = s->attempts;
	while (s->done < seq && !rc) {
		if (s->failed > before) {
			rc = s->error ? s->error : -EIO;
		} else if (shard_is_taken(s)) {
			co_wq_wait(&s->wq, &st->lock);
		} else {
			assert(s->dirty);
			pthread_mutex_unlock(&st->lock);
			shard_slot_take(b);
			pthread_mutex_lock(&st->lock);
			/* Waiting for the slot took its time. */
			if (s->done < seq && s->failed <= before && !shard_is_taken(s))
				shard_put(u, st, s);
			pthread_mutex_unlock(&st->lock);
			shard_slot_give(b);
			pthread_mutex_lock(&st->lock);
		}
	}
	s->refs--;
	shard_release(b, st, s);
	pthread_mutex_unlock(&st->lock);
	return rc;
}

int shardbuf_save(struct shard_user *u, uint64_t n)
{
	struct stripe *st = shard_stripe(u->b, n);
	const struct shard *s;
	uint64_t seq;

	pthread_mutex_lock(&st->lock);
	s = shard_find(st, n);
	seq = s ? s->newest : 0;
	pthread_mutex_unlock(&st->lock);
	return s ? save(u, n, seq) : 0;
}

struct todo {
	uint64_t n, seq;
};

/* What a flush has to save. */
struct flush {
	struct shard_user *u;
	struct todo *v;
	size_t n, room, next;
	int rc;
};

static int add_todo(struct flush *f, const struct shard *s)
{
	if (f->n == f->room) {
		size_t room = MAX(2 * f->room, 64U);
		struct todo *v = realloc(f->v, room * sizeof(*v));

		if (!v)
			return -ENOMEM;
		f->v = v;
		f->room = room;
	}
	f->v[f->n++] = (struct todo){ s->n, s->newest };
	return 0;
}

static int collect(struct flush *f)
{
	struct shardbuf *b = f->u->b;
	int rc = 0;

	for (unsigned i = 0; i < STRIPES && !rc; i++) {
		pthread_mutex_lock(&b->stripes[i].lock);
		for (unsigned j = 0; j < BUCKETS; j++)
			list_for_each(s, &b->stripes[i].buckets[j], struct shard,
				      chain) if (s->done < s->newest && !rc) rc = add_todo(f, s);
		pthread_mutex_unlock(&b->stripes[i].lock);
	}
	return rc;
}

static CO_FN void save_next(struct flush *f)
{
	const struct todo *t = &f->v[f->next++];
	int rc = save(f->u, t->n, t->seq);

	if (rc)
		f->rc = rc; /* and on: the others' data is worth as much */
}

static bool saver_take(struct shardbuf *b)
{
	bool is_free;

	pthread_mutex_lock(&b->lock);
	is_free = b->savers < b->conf.puts;
	b->savers += is_free;
	pthread_mutex_unlock(&b->lock);
	return is_free;
}

static CO_FN void saver(void *arg)
{
	struct flush *f = arg;
	struct shardbuf *b = f->u->b;

	while (f->next < f->n)
		save_next(f);
	pthread_mutex_lock(&b->lock);
	b->savers--;
	pthread_mutex_unlock(&b->lock);
}

/*
 * A thousand flushes may come at a time, each with thousands of shards to save: one fiber of its own has each of
 * them, those beside it are as many in all as there are slots. Who got none looks again after each shard.
 */
static CO_FN void save_all(struct flush *f)
{
	struct co_group g = CO_GROUP_INIT;

	while (f->next < f->n) {
		while (f->n - f->next > 1 && saver_take(f->u->b))
			co_group_spawn(&g, saver, f);
		if (f->next < f->n)
			save_next(f);
	}
	co_group_wait(&g);
}

int shardbuf_flush(struct shard_user *u)
{
	struct flush f = { .u = u };

	if (!atomic_load(&u->b->shards_n))
		return 0;
	f.rc = collect(&f);
	if (!f.rc)
		save_all(&f);
	free(f.v);
	return f.rc;
}

/* --- Deleting --------------------------------------------------------------------------------- */

struct drop {
	struct shard *s; /* busy, with a reference of ours */
	uint64_t seq;    /* everything up to it is void when the object is gone */
};

/* Up to SHARD_DEL_MAX of them. */
struct drops {
	struct shard_user *u;
	struct drop *v;
	struct obj *objs; /* of those that the store may have */
	unsigned n, objs_n;
};

/* Takes shard n for deletion; what is unsaved of it is void. */
static CO_FN int drop_begin(struct drops *d, uint64_t n)
{
	struct shardbuf *b = d->u->b;
	struct stripe *st = shard_stripe(b, n);
	struct shard *s;

	pthread_mutex_lock(&st->lock);
	s = shard_get(b, st, n);
	if (!s) {
		pthread_mutex_unlock(&st->lock);
		return -ENOMEM;
	}
	s->refs++;
	/*
	 * Others delete in ascending order too, so nobody waits in a circle. Who writes to the shard and flushes, over
	 * and over, would put it again each time before we get to run: that is what `droppers` is for.
	 */
	if (shard_is_taken(s)) {
		s->droppers++;
		do
			co_wq_wait(&s->wq, &st->lock);
		while (s->is_busy);
		s->droppers--;
	}
	s->is_busy = s->is_dropping = true;
	shard_dequeue(b, s);
	gen_free(b, s->dirty);
	s->dirty = NULL;
	d->v[d->n++] = (struct drop){ s, s->newest };
	if (s->end)
		shard_obj(&d->objs[d->objs_n++], n);
	pthread_mutex_unlock(&st->lock);
	return 0;
}

static CO_FN void drop_end(struct drops *d, const struct drop *one, int rc)
{
	struct shardbuf *b = d->u->b;
	struct shard *s = one->s;
	struct stripe *st = shard_stripe(b, s->n);
	struct gen *g;

	pthread_mutex_lock(&st->lock);
	s->is_busy = s->is_dropping = false;
	s->refs--;
	if (!rc) {
		s->end = 0;
		s->done = one->seq;
		s->error = 0;
	} else {
		/* Still to be done, then: with what was written meanwhile on top. */
		g = shard_dirty(b, s);
		if (g)
			g->rest_zero = true;
		else
			s->done = one->seq; /* no memory: undefined, as the trim's error says */
	}
	co_wq_wake_all(&s->wq);
	if (s->dirty)
		shard_enqueue(b, s);
	shard_release(b, st, s);
	pthread_mutex_unlock(&st->lock);
}

/* Deletes what is known of [at, end), one batch of it; *next becomes where to go on. */
static CO_FN int drop_batch(struct drops *d, uint64_t at, uint64_t end, uint64_t *next)
{
	int rc = 0, del_rc = 0;

	d->n = d->objs_n = 0;
	for (; at < end && d->n < SHARD_DEL_MAX && !rc; at++) {
		at = shardmap_find(d->u->b->conf.known, at, end, true);
		if (at < end)
			rc = drop_begin(d, at);
	}
	*next = at;
	if (d->objs_n) {
		del_rc = ch_del(d->u->kid, d->objs, d->objs_n);
		shard_account(d->u->b, d->v[0].s->n, del_rc);
	}
	for (unsigned i = 0; i < d->n; i++)
		drop_end(d, &d->v[i], del_rc);
	return rc ? rc : del_rc;
}

int shardbuf_drop(struct shard_user *u, uint64_t first, uint64_t end)
{
	_cleanup_free_ struct drop *v = NULL;
	_cleanup_free_ struct obj *objs = NULL;
	struct drops d = { .u = u };
	uint64_t n;
	int rc = 0;

	first = shardmap_find(u->b->conf.known, first, end, true);
	n = MIN(end - first, (uint64_t)SHARD_DEL_MAX);
	if (n == 0)
		return 0;
	v = calloc(n, sizeof(*v));
	objs = calloc(n, sizeof(*objs));
	if (!v || !objs)
		return -ENOMEM;
	d.v = v;
	d.objs = objs;
	while (first < end && !rc)
		rc = drop_batch(&d, first, end, &first);
	return rc;
}
