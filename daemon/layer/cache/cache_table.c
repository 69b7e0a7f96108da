/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * See cache_table.h. The table is cut into stripes, each with a lock, buckets and queues of its
 * own, so that reactors rarely meet. A lock is held for lookups and for copying one granule at
 * most, never across a wait.
 *
 * A granule belongs to its stripe, and while it is being fetched or lent to the fetcher or borrower as
 * well (refs): dropped meanwhile, it leaves the table at once, so that later reads fetch anew, and is
 * freed by the last who knows it. What somebody else knows makes no room.
 */
#include "layer/cache/cache_table.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "layer/cache/cache_arena.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/list.h"

enum {
	STRIPES_MAX = 64,
	STRIPE_MIN = 16,  /* granules; fewer make no queue */
	SMALL_SHARE = 10, /* the small queue's part of the memory: one of so many */
	LENT_SHARE = 4,   /* and of what may be lent at a time: it stays while a client is slow */
	FREQ_MAX = 3,
};

enum state { FETCHING, VALID, GHOST };
enum queue { SMALL, MAIN, GHOSTS, QUEUES };

struct granule {
	struct list chain; /* in its bucket; empty = dropped */
	struct list node;  /* in its queue */
	uint64_t hash, n;
	uint8_t *data;   /* NULL of a ghost */
	struct co_wq wq; /* the fetch ends */
	struct cache_table *table;
	unsigned refs;
	uint32_t read_to; /* end of the last read */
	uint8_t state, queue, freq;
	uint16_t name_len;
	char name[];
};

struct stripe {
	pthread_mutex_t lock;
	struct list *buckets;
	struct list queues[QUEUES];
	uint64_t count[QUEUES]; /* granules */
	uint64_t lent;          /* loans */
	uint64_t hits, misses, evictions;
};

struct cache_table {
	uint32_t granule;
	unsigned stripes_n;          /* powers of two, both */
	unsigned buckets_n;          /* of a stripe */
	_Atomic uint64_t stripe_max; /* granules with data */
	_Atomic uint64_t last;       /* the highest granule number there ever was */
	evicted_fn *on_evict;        /* NULL = nobody */
	void *evict_arg;
	struct cache_arena arena;
	struct stripe stripes[STRIPES_MAX];
};

/* --- Life ------------------------------------------------------------------------------------- */

static uint64_t power_of_two(uint64_t at_least)
{
	uint64_t n = 1;

	while (n < at_least)
		n *= 2;
	return n;
}

static int stripe_init(struct stripe *s, unsigned buckets_n)
{
	s->buckets = calloc(buckets_n, sizeof(*s->buckets));
	if (!s->buckets)
		return -ENOMEM;
	for (unsigned i = 0; i < buckets_n; i++)
		list_init(&s->buckets[i]);
	for (unsigned i = 0; i < QUEUES; i++)
		list_init(&s->queues[i]);
	(void)pthread_mutex_init(&s->lock, NULL); /* can't fail for a default one */
	return 0;
}

int cache_table_new(uint64_t limit, uint32_t granule, struct cache_table **out)
{
	struct cache_table *t = calloc(1, sizeof(*t));
	const uint64_t granules = MAX(limit / granule, UINT64_C(1));
	int rc;

	if (!t)
		return -ENOMEM;
	t->granule = granule;
	t->stripes_n = 1;
	while (t->stripes_n < STRIPES_MAX && granules / (2 * t->stripes_n) >= STRIPE_MIN)
		t->stripes_n *= 2;
	t->stripe_max = granules / t->stripes_n;
	/* As many ghosts as granules may be in the table. */
	t->buckets_n = (unsigned)power_of_two(MIN(2 * t->stripe_max, UINT64_C(1) << 20));
	rc = cache_arena_init(&t->arena, limit, granule);
	for (unsigned i = 0; i < t->stripes_n && !rc; i++)
		rc = stripe_init(&t->stripes[i], t->buckets_n);
	if (rc) {
		cache_table_free(t);
		return rc;
	}
	*out = t;
	return 0;
}

void cache_table_give_back(struct cache_table *t, uint8_t *data)
{
	cache_arena_put(&t->arena, data);
}

void cache_table_on_evict(struct cache_table *t, evicted_fn *fn, void *arg)
{
	t->on_evict = fn;
	t->evict_arg = arg;
}

static void granule_free(struct cache_table *t, struct granule *g)
{
	cache_arena_put(&t->arena, g->data);
	free(g);
}

void cache_table_free(struct cache_table *t)
{
	if (!t)
		return;
	for (unsigned i = 0; i < t->stripes_n; i++) {
		struct stripe *s = &t->stripes[i];

		if (!s->buckets)
			break; /* half built */
		for (unsigned q = 0; q < QUEUES; q++)
			list_for_each(g, &s->queues[q], struct granule, node)
			{
				assert(g->state != FETCHING && !g->refs);
				granule_free(t, g);
			}
		free(s->buckets);
		(void)pthread_mutex_destroy(&s->lock);
	}
	cache_arena_free(&t->arena);
	free(t);
}

/* --- Finding; with the stripe's lock held ----------------------------------------------------- */

/* splitmix64's finaliser: neighbours go to different stripes. */
static uint64_t mix(const struct obj *obj, uint64_t n)
{
	uint64_t z = obj->hash + n * UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
	return z ^ z >> 31;
}

static struct stripe *stripe_of(struct cache_table *t, uint64_t hash)
{
	return &t->stripes[hash & (t->stripes_n - 1)];
}

static struct list *bucket_of(struct cache_table *t, struct stripe *s, uint64_t hash)
{
	return &s->buckets[hash / STRIPES_MAX & (t->buckets_n - 1)];
}

static struct granule *find(struct cache_table *t, struct stripe *s, uint64_t hash,
			    const struct obj *obj, uint64_t n)
{
	list_for_each(g, bucket_of(t, s, hash), struct granule,
		      chain) if (g->hash == hash && g->n == n && g->name_len == obj->len &&
				 memcmp(g->name, obj->name, obj->len) == 0) return g;
	return NULL;
}

static void move_to(struct stripe *s, struct granule *g, enum queue q)
{
	list_del(&g->node);
	s->count[g->queue]--;
	g->queue = (uint8_t)q;
	list_add(&s->queues[q], &g->node);
	s->count[q]++;
}

/* Out of the table; freed unless somebody still knows it. */
static void forget(struct cache_table *t, struct stripe *s, struct granule *g)
{
	list_del(&g->chain);
	list_del(&g->node);
	s->count[g->queue]--;
	if (g->refs == 0)
		granule_free(t, g);
}

static void put_ref(struct cache_table *t, struct granule *g)
{
	if (--g->refs == 0 && list_empty(&g->chain))
		granule_free(t, g);
}

/* --- Making room ------------------------------------------------------------------------------ */

static struct granule *oldest(struct stripe *s, enum queue q)
{
	return list_empty(&s->queues[q]) ? NULL
					 : list_entry(s->queues[q].next, struct granule, node);
}

static void offer(struct cache_table *t, struct granule *g)
{
	if (t->on_evict &&
	    t->on_evict(t->evict_arg, g->name, g->name_len, g->n, g->data, g->queue == MAIN))
		g->data = NULL;
}

static void become_ghost(struct cache_table *t, struct stripe *s, struct granule *g)
{
	cache_arena_put(&t->arena, g->data);
	g->data = NULL;
	g->state = GHOST;
	g->freq = 0;
	move_to(s, g, GHOSTS);
	if (s->count[GHOSTS] > s->count[MAIN] + STRIPE_MIN)
		forget(t, s, oldest(s, GHOSTS));
}

/*
 * One step of S3-FIFO. True when a granule lost its data. *held: granules passed that somebody else knows; when all
 * of the small queue may be such, the main one has to give.
 */
static bool evict_step(struct cache_table *t, struct stripe *s, uint64_t *held)
{
	const bool is_small_full = s->count[SMALL] * SMALL_SHARE > t->stripe_max &&
				   *held < s->count[SMALL];
	const bool from_small = is_small_full || s->count[MAIN] == 0;
	struct granule *g = oldest(s, from_small ? SMALL : MAIN);

	if (g->state == FETCHING || g->refs) {
		move_to(s, g, from_small ? SMALL : MAIN); /* to the end: its time is not over */
		(*held)++;
	} else if (from_small && g->freq > 0) {
		g->freq = 0;
		move_to(s, g, MAIN);
	} else if (from_small) {
		offer(t, g);
		become_ghost(t, s, g);
		return true;
	} else if (g->freq > 0) {
		g->freq--;
		move_to(s, g, MAIN);
	} else {
		offer(t, g);
		forget(t, s, g);
		return true;
	}
	return false;
}

static void make_room(struct cache_table *t, struct stripe *s)
{
	/*
	 * Each granule is passed a few times at most; those that are being fetched or lent may fill all of
	 * it, for a moment.
	 */
	uint64_t steps = (FREQ_MAX + 2) * (s->count[SMALL] + s->count[MAIN]), held = 0;

	while (s->count[SMALL] + s->count[MAIN] >= t->stripe_max && steps-- > 0)
		s->evictions += evict_step(t, s, &held);
}

/* A granule with room for data, in the table; NULL = no memory, or there is one. */
static struct granule *add(struct cache_table *t, struct stripe *s, uint64_t hash,
			   const struct obj *obj, uint64_t n)
{
	struct granule *g = find(t, s, hash, obj, n);
	enum queue q = g ? MAIN : SMALL;

	if (g && g->state != GHOST)
		return NULL;
	if (g)
		forget(t, s, g);
	make_room(t, s);
	g = calloc(1, sizeof(*g) + obj->len);
	if (!g)
		return NULL;
	g->data = cache_arena_get(&t->arena);
	if (!g->data) {
		free(g);
		return NULL;
	}
	g->table = t;
	g->hash = hash;
	g->n = n;
	g->state = FETCHING;
	g->queue = (uint8_t)q;
	g->name_len = obj->len;
	memcpy(g->name, obj->name, obj->len);
	co_wq_init(&g->wq);
	list_add(bucket_of(t, s, hash), &g->chain);
	list_add(&s->queues[q], &g->node);
	s->count[q]++;
	return g;
}

static void note_last(struct cache_table *t, uint64_t n)
{
	uint64_t last = atomic_load_explicit(&t->last, memory_order_relaxed);

	while (n > last && !atomic_compare_exchange_weak(&t->last, &last, n))
		;
}

/* --- Requests --------------------------------------------------------------------------------- */

static void note_hit(struct stripe *s, struct granule *g, uint32_t off, uint32_t len)
{
	g->freq = (uint8_t)MIN(g->freq + (off != g->read_to), FREQ_MAX);
	g->read_to = off + len;
	s->hits++;
}

CO_FN enum lookup cache_table_read(struct cache_table *t, const struct obj *obj, uint64_t n,
				   uint32_t off, uint32_t len, const struct iov *iov, size_t at)
{
	const uint64_t hash = mix(obj, n);
	struct stripe *s = stripe_of(t, hash);
	enum lookup result = CACHE_MISS;
	struct granule *g;

	pthread_mutex_lock(&s->lock);
	while ((g = find(t, s, hash, obj, n)) != NULL && g->state == FETCHING) {
		g->refs++;
		co_wq_wait(&g->wq, &s->lock);
		put_ref(t, g);
	}
	if (g && g->state == VALID) {
		note_hit(s, g, off, len);
		if (iov)
			(void)iov_copy_in(iov, at, g->data + off, len);
		result = CACHE_HIT;
	} else {
		s->misses++;
	}
	pthread_mutex_unlock(&s->lock);
	return result;
}

static void take_back(struct loan *loan)
{
	struct granule *g = loan->owner;
	struct cache_table *t = g->table;
	struct stripe *s = stripe_of(t, g->hash);

	pthread_mutex_lock(&s->lock);
	s->lent--;
	put_ref(t, g);
	pthread_mutex_unlock(&s->lock);
}

int cache_table_lend(struct cache_table *t, const struct obj *obj, uint64_t n, uint32_t off,
		     uint32_t len, struct loan *loan)
{
	const uint64_t hash = mix(obj, n);
	struct stripe *s = stripe_of(t, hash);
	struct granule *g;
	int rc = -EAGAIN;

	pthread_mutex_lock(&s->lock);
	g = find(t, s, hash, obj, n);
	if (g && g->state == VALID && s->lent < t->stripe_max / LENT_SHARE) {
		note_hit(s, g, off, len);
		s->lent++;
		g->refs++;
		*loan = (struct loan){ g->data + off, take_back, g };
		rc = 0;
	}
	pthread_mutex_unlock(&s->lock);
	return rc;
}

struct granule *cache_table_begin(struct cache_table *t, const struct obj *obj, uint64_t n)
{
	const uint64_t hash = mix(obj, n);
	struct stripe *s = stripe_of(t, hash);
	struct granule *g;

	note_last(t, n);
	pthread_mutex_lock(&s->lock);
	g = add(t, s, hash, obj, n);
	if (g)
		g->refs = 1;
	pthread_mutex_unlock(&s->lock);
	return g;
}

uint8_t *granule_data(struct granule *g)
{
	return g->data;
}

void cache_table_fill(struct cache_table *t, struct granule *g, bool is_good, uint32_t read_to)
{
	struct stripe *s = stripe_of(t, g->hash);

	pthread_mutex_lock(&s->lock);
	g->state = VALID;
	g->read_to = read_to;
	if (!is_good && !list_empty(&g->chain))
		forget(t, s, g);
	co_wq_wake_all(&g->wq);
	put_ref(t, g);
	pthread_mutex_unlock(&s->lock);
}

void cache_table_change(struct cache_table *t, const struct obj *obj, uint64_t n, uint32_t off,
			uint32_t len, const struct iov *iov, size_t at)
{
	const uint64_t hash = mix(obj, n);
	struct stripe *s = stripe_of(t, hash);
	struct granule *g;

	note_last(t, n);
	pthread_mutex_lock(&s->lock);
	g = find(t, s, hash, obj, n);
	if ((!g || g->state == GHOST) && len == t->granule && iov)
		g = add(t, s, hash, obj, n);
	if (g && g->state == FETCHING && g->refs == 0)
		g->state = VALID; /* ours: we have all of it */
	if (g && g->state == VALID && iov)
		(void)iov_copy_out(iov, at, g->data + off, len);
	else if (g && g->state == VALID)
		memset(g->data + off, 0, len);
	else if (g && g->state == FETCHING)
		forget(t, s, g); /* what it fetches may be older */
	pthread_mutex_unlock(&s->lock);
}

static void drop(struct cache_table *t, const struct obj *obj, uint64_t n)
{
	const uint64_t hash = mix(obj, n);
	struct stripe *s = stripe_of(t, hash);
	struct granule *g;

	pthread_mutex_lock(&s->lock);
	g = find(t, s, hash, obj, n);
	if (g && g->state != GHOST)
		forget(t, s, g);
	pthread_mutex_unlock(&s->lock);
}

void cache_table_drop(struct cache_table *t, const struct obj *obj, uint64_t n)
{
	drop(t, obj, n);
}

void cache_table_drop_from(struct cache_table *t, const struct obj *obj, uint64_t first)
{
	const uint64_t last = atomic_load(&t->last);

	for (uint64_t n = first; n <= last; n++)
		drop(t, obj, n);
}

unsigned cache_table_evict(struct cache_table *t, unsigned n)
{
	unsigned found = 0;

	for (unsigned i = 0; i < t->stripes_n && found < n; i++) {
		struct stripe *s = &t->stripes[i];
		uint64_t steps, held = 0;

		pthread_mutex_lock(&s->lock);
		steps = (FREQ_MAX + 2) * (s->count[SMALL] + s->count[MAIN]);
		while (s->count[SMALL] + s->count[MAIN] && found < n && steps-- > 0)
			found += evict_step(t, s, &held);
		pthread_mutex_unlock(&s->lock);
	}
	return found;
}

void cache_table_limit(struct cache_table *t, uint64_t limit)
{
	atomic_store(&t->stripe_max, MAX(limit / t->granule / t->stripes_n, UINT64_C(1)));
	for (unsigned i = 0; i < t->stripes_n; i++) {
		struct stripe *s = &t->stripes[i];

		pthread_mutex_lock(&s->lock);
		if (s->count[SMALL] + s->count[MAIN] > t->stripe_max)
			make_room(t, s);
		pthread_mutex_unlock(&s->lock);
	}
	cache_arena_trim(&t->arena);
}

void cache_table_view(struct cache_table *t, struct cache_view *v)
{
	*v = (struct cache_view){ 0 };
	for (unsigned i = 0; i < t->stripes_n; i++) {
		struct stripe *s = &t->stripes[i];

		pthread_mutex_lock(&s->lock);
		v->granules += s->count[SMALL] + s->count[MAIN];
		v->ghosts += s->count[GHOSTS];
		v->hits += s->hits;
		v->misses += s->misses;
		v->evictions += s->evictions;
		pthread_mutex_unlock(&s->lock);
	}
	v->bytes = v->granules * t->granule;
}
