/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The disk tier's index, reading, and what makes room. See cache_tier.h for the states.
 *
 * Reading takes the checksums out of the index, reads without a lock, and compares. A slot that is
 * given to something else meanwhile has another generation then; what was read of it is not used.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "layer/cache/cache_tier_int.h"
#include "nbdrs/buf.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"

enum {
	STRIPE_MIN = 64, /* slots; fewer make no queue */
	SMALL_SHARE = 10,
	FREQ_MAX = 3,
	STEPS_MAX = 64, /* looked at to make room; a lock is held */
	SUMS_FEW = 64,
	TURN = 1024, /* slots worked on at a stretch before others have their turn */
};

/* --- Life ------------------------------------------------------------------------------------- */

static int stripe_init(struct tier_stripe *s, uint64_t first, uint32_t n)
{
	uint32_t buckets = 1;

	while (buckets < n)
		buckets *= 2;
	s->first = first;
	s->n = n;
	s->mask = buckets - 1;
	s->slots = calloc((size_t)n + 1, sizeof(*s->slots));
	s->buckets = calloc(buckets, sizeof(*s->buckets));
	s->ghosts = calloc(buckets, sizeof(*s->ghosts));
	(void)pthread_mutex_init(&s->lock, NULL); /* can't fail for a default one */
	return s->slots && s->buckets && s->ghosts ? 0 : -ENOMEM;
}

static void append(struct tier_stripe *s, uint32_t i, enum slot_queue q)
{
	struct slot_list *l = &s->queues[q];

	s->slots[i].queue = q;
	s->slots[i].next = 0;
	s->slots[i].prev = l->tail;
	if (l->tail)
		s->slots[l->tail].next = i;
	else
		l->head = i;
	l->tail = i;
	l->n++;
}

static void take_out(struct tier_stripe *s, uint32_t i)
{
	const struct slot *g = &s->slots[i];
	struct slot_list *l = &s->queues[g->queue];

	if (g->prev)
		s->slots[g->prev].next = g->next;
	else
		l->head = g->next;
	if (g->next)
		s->slots[g->next].prev = g->prev;
	else
		l->tail = g->prev;
	l->n--;
}

int tier_index_init(struct tier *t)
{
	uint64_t per;
	int rc = 0;

	t->stripes_n = 1;
	while (t->stripes_n < TIER_STRIPES_MAX && t->slots_n / (2 * t->stripes_n) >= STRIPE_MIN)
		t->stripes_n *= 2;
	per = t->slots_n / t->stripes_n;
	t->slots_n = per * t->stripes_n;
	t->sums = calloc(t->slots_n, t->blocks * sizeof(*t->sums));
	for (unsigned i = 0; i < t->stripes_n && !rc; i++) {
		struct tier_stripe *s = &t->stripes[i];

		rc = stripe_init(s, i * per, (uint32_t)per);
		for (uint32_t k = 1; k <= per && !rc; k++) {
			append(s, k, QUEUE_FREE);
			if (k % (16 * TURN) == 0)
				co_yield();
		}
	}
	return t->sums ? rc : -ENOMEM;
}

void tier_index_free(struct tier *t)
{
	for (unsigned i = 0; i < t->stripes_n; i++) {
		struct tier_stripe *s = &t->stripes[i];

		if (!s->n)
			break; /* half built */
		free(s->slots);
		free(s->buckets);
		free(s->ghosts);
		(void)pthread_mutex_destroy(&s->lock);
	}
	free(t->sums);
}

/* --- Finding; with the stripe's lock held ----------------------------------------------------- */

static struct tier_stripe *stripe_of(struct tier *t, uint64_t key)
{
	return &t->stripes[key & (t->stripes_n - 1)];
}

static uint32_t *bucket_of(struct tier_stripe *s, uint64_t key)
{
	return &s->buckets[key / TIER_STRIPES_MAX & s->mask];
}

static uint32_t find(struct tier_stripe *s, uint64_t key)
{
	uint32_t i = *bucket_of(s, key);

	while (i && s->slots[i].key != key)
		i = s->slots[i].chain;
	return i;
}

static void link_key(struct tier_stripe *s, uint32_t i, uint64_t key)
{
	uint32_t *b = bucket_of(s, key);

	s->slots[i].key = key;
	s->slots[i].chain = *b;
	*b = i;
}

static void unlink_key(struct tier_stripe *s, uint32_t i)
{
	uint32_t *at = bucket_of(s, s->slots[i].key);

	while (*at != i)
		at = &s->slots[*at].chain;
	*at = s->slots[i].chain;
}

/* Are all of blocks [b, end) there? */
static bool are_there(const uint32_t *sums, uint32_t b, uint32_t end)
{
	while (b < end && sums[b])
		b++;
	return b == end;
}

/* Out of the index. One that is being written stays its writer's. */
static void forget(struct tier_stripe *s, uint32_t i)
{
	struct slot *g = &s->slots[i];

	unlink_key(s, i);
	take_out(s, i);
	g->gen++;
	g->is_stale = 1;
	if (g->state == SLOT_QUEUED) {
		g->state = SLOT_DOOMED;
		return;
	}
	g->state = SLOT_FREE;
	append(s, i, QUEUE_FREE);
}

/* --- Making room ------------------------------------------------------------------------------ */

static uint32_t *ghost_of(struct tier_stripe *s, uint64_t key)
{
	return &s->ghosts[(key >> 20) & s->mask];
}

static void evict(struct tier_stripe *s, uint32_t i)
{
	const uint64_t key = s->slots[i].key;

	if (s->slots[i].queue == QUEUE_SMALL)
		*ghost_of(s, key) = (uint32_t)(key >> 32);
	forget(s, i);
	s->evictions++;
}

/* One step of S3-FIFO; the last one must find something. */
static void evict_step(struct tier_stripe *s, bool is_last)
{
	const bool from_small = s->queues[QUEUE_SMALL].n * SMALL_SHARE > s->n ||
				s->queues[QUEUE_MAIN].n == 0;
	const enum slot_queue q = from_small ? QUEUE_SMALL : QUEUE_MAIN;
	const uint32_t i = s->queues[q].head;
	struct slot *g = &s->slots[i];

	if (g->state == SLOT_VALID && (g->freq == 0 || is_last)) {
		evict(s, i);
		return;
	}
	take_out(s, i);
	append(s, i, g->state == SLOT_VALID ? QUEUE_MAIN : q);
	if (g->state == SLOT_VALID)
		g->freq = from_small ? 0 : (uint8_t)(g->freq - 1) & FREQ_MAX;
}

/* 0: all that was looked at is being written. */
static uint32_t take_slot(struct tier_stripe *s)
{
	for (unsigned k = 1; k <= STEPS_MAX && !s->queues[QUEUE_FREE].n; k++) {
		if (s->queues[QUEUE_SMALL].n + s->queues[QUEUE_MAIN].n == 0)
			return 0;
		evict_step(s, k == STEPS_MAX);
	}
	return s->queues[QUEUE_FREE].head;
}

/* --- Reading ---------------------------------------------------------------------------------- */

struct wanted {
	struct tier_key key;
	struct tier_stripe *s;
	uint32_t slot, b, end; /* blocks */
	uint16_t gen;
	bool counts;
	uint32_t *sums; /* of these blocks; NULL = only looks */
};

/* True when it is there, with its checksums. */
static bool look_up(struct tier *t, struct wanted *w)
{
	bool is_there;

	pthread_mutex_lock(&w->s->lock);
	w->slot = find(w->s, w->key.lo);
	is_there = w->slot && w->s->slots[w->slot].state == SLOT_VALID &&
		   are_there(slot_sums(t, w->s, w->slot), w->b, w->end);
	if (is_there && w->sums)
		memcpy(w->sums, slot_sums(t, w->s, w->slot) + w->b,
		       (w->end - w->b) * sizeof(*w->sums));
	if (is_there)
		w->gen = w->s->slots[w->slot].gen;
	if (is_there && w->counts) {
		struct slot *g = &w->s->slots[w->slot];

		g->freq = (uint8_t)MIN(g->freq + 1, FREQ_MAX) & FREQ_MAX;
	}
	if (w->counts && is_there)
		w->s->hits++;
	else if (w->counts)
		w->s->misses++;
	pthread_mutex_unlock(&w->s->lock);
	return is_there;
}

/* After the read: may it be used? What is bad goes, unless it is something else by now. */
static bool is_usable(const struct wanted *w, int rc, bool is_good)
{
	bool is_same;

	pthread_mutex_lock(&w->s->lock);
	is_same = w->s->slots[w->slot].gen == w->gen;
	if (!is_good || !is_same) {
		w->s->hits -= w->counts;
		w->s->misses += w->counts;
	}
	if (!is_good && is_same) {
		w->s->bad += rc == 0;
		forget(w->s, w->slot);
	}
	pthread_mutex_unlock(&w->s->lock);
	return is_good && is_same;
}

static CO_FN int read_blocks(struct tier *t, const struct wanted *w, uint8_t *to)
{
	const uint64_t slot = w->s->first + w->slot - 1;
	const uint64_t at = slot * t->conf.granule + (uint64_t)w->b * TIER_BLOCK;
	struct iovec v = { to, (size_t)(w->end - w->b) * TIER_BLOCK };

	if (io_preadv_nowait(t->data_fd, &v, 1, at) == (ssize_t)v.iov_len)
		return 0;
	return io_pread_full(t->data_fd, &v, 1, at);
}

/* Reads the blocks to `to` and compares. */
static CO_FN bool read_slot(struct tier *t, const struct wanted *w, uint8_t *to)
{
	const int rc = read_blocks(t, w, to);
	bool is_good = rc == 0;

	for (uint32_t b = w->b; b < w->end && is_good; b++)
		is_good = tier_block_sum(&w->key, b, to + (size_t)(b - w->b) * TIER_BLOCK) ==
			  w->sums[b - w->b];
	if (rc)
		atomic_fetch_add(&t->errors, 1);
	return is_usable(w, rc, is_good);
}

static CO_FN bool read_wanted(struct tier *t, const struct wanted *w, uint32_t off,
			      const struct iov *part)
{
	const uint64_t from = (uint64_t)w->b * TIER_BLOCK,
		       len = (uint64_t)w->end * TIER_BLOCK - from;
	uint8_t *buf;
	bool is_good;

	if (part->n == 1 && part->len == len)
		return read_slot(t, w, part->v[0].iov_base);
	buf = buf_get(len);
	is_good = buf && read_slot(t, w, buf);
	if (is_good)
		(void)iov_copy_in(part, 0, buf + (off - from), part->len);
	buf_put(buf, len);
	return is_good;
}

bool tier_read(struct tier *t, const struct obj *obj, uint64_t n, uint32_t off, uint32_t len,
	       const struct iov *iov, size_t at)
{
	uint32_t few[SUMS_FEW], *many = NULL;
	struct iovec store[IOV_SLICE_MAX];
	struct wanted w = { .b = off / TIER_BLOCK, .end = (off + len - 1) / TIER_BLOCK + 1 };
	const size_t sums_len = (w.end - w.b) * sizeof(*w.sums);
	struct iov part;
	bool is_there;

	if (!t || !atomic_load_explicit(&t->is_on, memory_order_relaxed))
		return false;
	w.key = tier_key_of(obj->name, obj->len, n);
	w.s = stripe_of(t, w.key.lo);
	if (!iov)
		return look_up(t, &w);
	if (sums_len > sizeof(few)) {
		many = buf_get(sums_len);
		if (!many)
			return false;
	}
	w.sums = many ? many : few;
	w.counts = true;
	is_there = look_up(t, &w);
	if (is_there) {
		part = iov_slice(iov, at, len, store, IOV_SLICE_MAX);
		is_there = read_wanted(t, &w, off, &part);
	}
	if (many)
		buf_put(many, sums_len);
	return is_there;
}

bool tier_has(struct tier *t, const struct obj *obj, uint64_t n)
{
	struct wanted w = { .b = 0 };

	if (!t || !atomic_load_explicit(&t->is_on, memory_order_relaxed))
		return false;
	w.end = t->blocks;
	w.key = tier_key_of(obj->name, obj->len, n);
	w.s = stripe_of(t, w.key.lo);
	return look_up(t, &w);
}

/* --- Coming in -------------------------------------------------------------------------------- */

static void note_last(struct tier *t, uint64_t n)
{
	uint64_t last = atomic_load_explicit(&t->last, memory_order_relaxed);

	while (n > last && !atomic_compare_exchange_weak(&t->last, &last, n))
		;
}

/* With both locks held: into the index, and to the writer. */
static bool queue_job(struct tier *t, struct tier_stripe *s, struct tier_job *job, bool is_hot)
{
	uint32_t i = find(s, job->key.lo);
	const bool was_here = *ghost_of(s, job->key.lo) == (uint32_t)(job->key.lo >> 32);

	if (t->jobs_n == t->jobs_max || now_ns() < t->pause_until)
		return false;
	if (i)
		forget(s, i); /* a part of it was changed */
	i = take_slot(s);
	if (!i)
		return false;
	take_out(s, i);
	append(s, i, is_hot || was_here ? QUEUE_MAIN : QUEUE_SMALL);
	link_key(s, i, job->key.lo);
	s->slots[i].state = SLOT_QUEUED;
	s->slots[i].freq = 0;
	s->slots[i].is_stale = 1;
	job->slot = i;
	job->stripe = s;
	job->gen = ++s->slots[i].gen;
	t->jobs[(t->jobs_at + t->jobs_n++) % TIER_JOBS_MAX] = *job;
	co_wq_wake_one(&t->work);
	return true;
}

bool tier_take(struct tier *t, const char *name, uint16_t name_len, uint64_t n, uint8_t *data,
	       bool is_hot)
{
	struct tier_job job = { .data = data, .n = n };
	struct tier_stripe *s;
	bool is_there, is_taken = false;
	uint32_t i;

	if (!t || !atomic_load_explicit(&t->is_on, memory_order_relaxed))
		return false;
	job.key = tier_key_of(name, name_len, n);
	job.region = tier_region_of(t, name, name_len, n << t->shift);
	s = stripe_of(t, job.key.lo);
	note_last(t, n);
	pthread_mutex_lock(&s->lock);
	i = find(s, job.key.lo);
	is_there = i && (s->slots[i].state == SLOT_QUEUED ||
			 are_there(slot_sums(t, s, i), 0, t->blocks));
	if (!is_there) {
		pthread_mutex_lock(&t->lock);
		is_taken = queue_job(t, s, &job, is_hot);
		pthread_mutex_unlock(&t->lock);
		if (!is_taken)
			atomic_fetch_add_explicit(&t->dropped, 1, memory_order_relaxed);
	}
	pthread_mutex_unlock(&s->lock);
	return is_taken;
}

bool tier_job_is_wanted(const struct tier_job *job)
{
	bool is_wanted;

	pthread_mutex_lock(&job->stripe->lock);
	is_wanted = job->stripe->slots[job->slot].state == SLOT_QUEUED;
	pthread_mutex_unlock(&job->stripe->lock);
	return is_wanted;
}

void tier_job_end(struct tier *t, const struct tier_job *job, const uint8_t *entry)
{
	struct tier_stripe *s = job->stripe;
	struct slot *g = &s->slots[job->slot];

	pthread_mutex_lock(&s->lock);
	if (g->state == SLOT_QUEUED && entry) {
		assert(g->gen == job->gen);
		memcpy(slot_sums(t, s, job->slot), entry, t->blocks * sizeof(*t->sums));
		g->state = SLOT_VALID;
		g->is_stale = 0;
	} else {
		if (g->state == SLOT_QUEUED)
			forget(s, job->slot);
		g->state = SLOT_FREE;
		append(s, job->slot, QUEUE_FREE);
	}
	pthread_mutex_unlock(&s->lock);
}

bool tier_index_add(struct tier *t, uint64_t slot, uint64_t key, const uint8_t *sums)
{
	const uint64_t per = t->slots_n / t->stripes_n;
	struct tier_stripe *s = &t->stripes[slot / per];
	const uint32_t i = (uint32_t)(slot % per) + 1;

	/* Nobody else is here yet. */
	if (s != stripe_of(t, key) || find(s, key))
		return false;
	take_out(s, i);
	append(s, i, QUEUE_MAIN);
	link_key(s, i, key);
	s->slots[i].state = SLOT_VALID;
	memcpy(slot_sums(t, s, i), sums, t->blocks * sizeof(*t->sums));
	return true;
}

void tier_index_stale(struct tier *t, uint64_t slot)
{
	const uint64_t per = t->slots_n / t->stripes_n;

	t->stripes[slot / per].slots[slot % per + 1].is_stale = 1;
}

/* --- Going out -------------------------------------------------------------------------------- */

static void drop(struct tier *t, const struct obj *obj, uint64_t n, uint32_t b, uint32_t end)
{
	const struct tier_key key = tier_key_of(obj->name, obj->len, n);
	struct tier_stripe *s = stripe_of(t, key.lo);
	uint32_t i;

	pthread_mutex_lock(&s->lock);
	i = find(s, key.lo);
	if (i && s->slots[i].state == SLOT_VALID) {
		uint32_t *sums = slot_sums(t, s, i), k = 0;

		memset(sums + b, 0, (end - b) * sizeof(*sums));
		while (k < t->blocks && !sums[k])
			k++;
		s->slots[i].is_stale = 1;
		if (k < t->blocks)
			i = 0;
	}
	if (i)
		forget(s, i);
	pthread_mutex_unlock(&s->lock);
}

void tier_drop(struct tier *t, const struct obj *obj, uint64_t n, uint32_t off, uint32_t len)
{
	if (t && len)
		drop(t, obj, n, off / TIER_BLOCK, (off + len - 1) / TIER_BLOCK + 1);
}

/* Is granule n these bytes? `room` is as large as it and its checksums. */
static CO_FN bool is_same(struct tier *t, const struct obj *obj, uint64_t n, const uint8_t *data,
			  uint8_t *room)
{
	struct wanted w = { .end = t->blocks };

	w.key = tier_key_of(obj->name, obj->len, n);
	w.s = stripe_of(t, w.key.lo);
	w.sums = (uint32_t *)(void *)(room + t->conf.granule);
	/* Not the checksums alone: of 2^32 changes they would miss one, and that for ever. */
	return look_up(t, &w) && read_slot(t, &w, room) && memcmp(room, data, t->conf.granule) == 0;
}

void tier_drop_changed(struct tier *t, const struct obj *obj, const struct iov *iov)
{
	const uint64_t whole = t && iov->n == 1 ? iov->len >> t->shift : 0;
	const size_t room_len = t ? t->conf.granule + t->blocks * sizeof(uint32_t) : 0;
	uint8_t *room = whole ? buf_get(room_len) : NULL;

	for (uint64_t n = 0; room && n < whole; n++) {
		const uint8_t *data = (const uint8_t *)iov->v[0].iov_base + (n << t->shift);

		if (!is_same(t, obj, n, data, room))
			drop(t, obj, n, 0, t->blocks);
		co_yield(); /* 64 KiB take some 10 us, large granules more */
	}
	tier_drop_from(t, obj, room ? whole : 0);
	if (room)
		buf_put(room, room_len);
}

/* Some of the stripe; true when more is there. */
static bool drop_some(struct tier_stripe *s)
{
	unsigned left = TURN;
	bool is_more;

	pthread_mutex_lock(&s->lock);
	for (enum slot_queue q = QUEUE_SMALL; q < QUEUES_N; q++)
		for (; s->queues[q].n && left; left--)
			forget(s, s->queues[q].head);
	is_more = s->queues[QUEUE_SMALL].n + s->queues[QUEUE_MAIN].n > 0;
	pthread_mutex_unlock(&s->lock);
	return is_more;
}

/* What comes in meanwhile goes as well, or not: it is new. */
static CO_FN void drop_all(struct tier *t)
{
	for (unsigned k = 0; k < t->stripes_n; k++)
		while (drop_some(&t->stripes[k]))
			co_yield();
}

void tier_drop_from(struct tier *t, const struct obj *obj, uint64_t first)
{
	const uint64_t last = t ? atomic_load(&t->last) : 0;

	if (!t || first > last)
		return;
	if (last - first > t->slots_n) {
		drop_all(t); /* cheaper than to ask for each */
		return;
	}
	for (uint64_t n = first; n <= last; n++) {
		drop(t, obj, n, 0, t->blocks);
		if ((n - first) % TURN == TURN - 1)
			co_yield();
	}
}

/* --- Looking at it ---------------------------------------------------------------------------- */

void tier_view(struct tier *t, struct tier_view *v)
{
	*v = (struct tier_view){
		.limit = t->slots_n * t->conf.granule,
		.writes = atomic_load(&t->writes),
		.dropped = atomic_load(&t->dropped),
		.errors = atomic_load(&t->errors),
		.marks = atomic_load(&t->marks.n),
		.is_off = !atomic_load(&t->is_on),
	};
	pthread_mutex_lock(&t->lock);
	v->queued = (uint64_t)t->jobs_n * t->conf.granule;
	pthread_mutex_unlock(&t->lock);
	for (unsigned i = 0; i < t->stripes_n; i++) {
		struct tier_stripe *s = &t->stripes[i];

		pthread_mutex_lock(&s->lock);
		v->bytes += (uint64_t)(s->queues[QUEUE_SMALL].n + s->queues[QUEUE_MAIN].n) *
			    t->conf.granule;
		v->hits += s->hits;
		v->misses += s->misses;
		v->evictions += s->evictions;
		v->bad += s->bad;
		pthread_mutex_unlock(&s->lock);
	}
}
