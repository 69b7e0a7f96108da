/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Write-back buffers: a table of the shards that have something unsaved, shared by all channels.
 *
 * A shard's unsaved data is in generations: `dirty` takes writes; when a put begins it becomes `putting`, which
 * nobody changes any more, and later writes start a new dirty one. Each generation knows which grains (512 bytes) it
 * holds; below them lies the older generation, below that the store:
 *
 *	state		dirty	putting	is_busy		leaves it by
 *	dirty		yes	-	no		a put begins (full, old, memory short, flush)
 *	putting		-	yes	yes		the put ends: saved, or dirty again
 *	both		yes	yes	yes		the put ends: dirty, or both merged and dirty
 *	dropping	maybe	-	yes		the delete ends; reads as zeroes below dirty meanwhile
 *	saved		-	-	no		the entry is freed: the store has it all
 *
 * Never two puts or deletes of one object at a time (is_busy), so the store never sees them in the wrong order.
 *
 * A read takes each grain from the newest place that has it. What it leaves to the store it fetches after it let
 * go of the lock: a put that ends meanwhile makes that newer, never older, and only by writes that the read was
 * not ordered after.
 *
 * Locks: one of STRIPES per shard, held for one piece of copying at most and never across a wait; the queue lock
 * inside it. Generations are numbered over the whole volume: flush takes note of each shard's newest, and waits until
 * `done` has reached it, so a stream of later writes does not hold it up.
 *
 * Memory: pages of generations are counted when first touched; writers reserve before they write and wait at the
 * limit. A put that has to complete a shard from the store takes a copy of it, beyond the limit: what is on its way
 * is dirty_max/2 bytes at most, or one put.
 *
 * Objects end with their last page that is not zero. Where each one ends is known since this daemon put it: `end` of
 * an entry, `ends` where there is none. Both may only be wrong in one direction, too far. What a listing says of sizes
 * is not used: of a store that is late with it, data would read as zeroes.
 *
 * Errors: data whose put failed stays dirty. It is tried again by each flush, which reports the error if that
 * fails too, and from time to time in the background.
 */
#include "layer/sharded/shardbuf.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "layer/sharded/shardbuf_int.h"
#include "nbdrs/huge.h"
#include "nbdrs/reactor.h"

/* What a generation takes besides its data: bitmaps, its entry, a page table of its own. */
enum { GEN_COST = 16 * 1024 };
#define HOPELESS UINT64_C(16)

/* --- Life ------------------------------------------------------------------------------------- */

int shardbuf_new(const struct shardbuf_conf *conf, struct shardbuf **out)
{
	struct shardbuf *b = calloc(1, sizeof(*b));

	if (!b)
		return -ENOMEM;
	b->ends_n = conf->known->n;
	b->ends = calloc(b->ends_n, sizeof(*b->ends));
	if (!b->ends) {
		free(b);
		return -ENOMEM;
	}
	b->conf = *conf;
	b->grains = conf->shard_size / SHARD_GRAIN;
	b->pages = conf->shard_size / MEM_PAGE;
	for (unsigned i = 0; i < STRIPES; i++) {
		(void)pthread_mutex_init(&b->stripes[i].lock,
					 NULL); /* can't fail for a default one */
		for (unsigned j = 0; j < BUCKETS; j++)
			list_init(&b->stripes[i].buckets[j]);
	}
	(void)pthread_mutex_init(&b->lock, NULL);
	for (unsigned i = 0; i < QUEUES; i++)
		list_init(&b->queues[i]);
	co_mutex_init(&b->line);
	co_mutex_init(&b->flying_line);
	co_wq_init(&b->landed);
	co_wq_init(&b->room);
	co_wq_init(&b->slots);
	co_wq_init(&b->keeper);
	*out = b;
	return 0;
}

static uint64_t shard_abandon(struct shardbuf *b, struct shard *s)
{
	uint64_t lost = (uint64_t)s->dirty->valid_n * SHARD_GRAIN;

	assert(!s->is_busy && !s->refs);
	shard_dequeue(b, s);
	gen_free(b, s->dirty);
	list_del(&s->chain);
	free(s);
	return lost;
}

uint64_t shardbuf_free(struct shardbuf *b)
{
	uint64_t lost = 0;

	if (!b)
		return 0;
	for (unsigned i = 0; i < STRIPES; i++) {
		for (unsigned j = 0; j < BUCKETS; j++)
			list_for_each(s, &b->stripes[i].buckets[j], struct shard, chain)
				lost += shard_abandon(b, s);
		(void)pthread_mutex_destroy(&b->stripes[i].lock);
	}
	assert(b->used == 0 && b->flying == 0);
	co_mutex_destroy(&b->line);
	co_mutex_destroy(&b->flying_line);
	(void)pthread_mutex_destroy(&b->lock);
	free(b->ends);
	free(b);
	return lost;
}

int shardbuf_reserve(struct shardbuf *b, uint64_t n)
{
	uint8_t *ends = n > b->ends_n ? calloc(n, sizeof(*ends)) : NULL, *old = b->ends;

	if (n <= b->ends_n)
		return 0;
	if (!ends)
		return -ENOMEM;
	/* All of them, in order; nobody else holds two. */
	for (unsigned i = 0; i < STRIPES; i++)
		pthread_mutex_lock(&b->stripes[i].lock);
	memcpy(ends, old, b->ends_n * sizeof(*ends));
	b->ends = ends;
	b->ends_n = n;
	for (unsigned i = 0; i < STRIPES; i++)
		pthread_mutex_unlock(&b->stripes[i].lock);
	free(old);
	return 0;
}

void shardbuf_set_size(struct shardbuf *b, uint64_t disk_size)
{
	b->conf.disk_size = disk_size;
}

uint8_t *shard_map(const struct shardbuf *b)
{
	return huge_map(b->conf.shard_size);
}

void shard_unmap(const struct shardbuf *b, uint8_t *data)
{
	if (data)
		(void)munmap(data, b->conf.shard_size); /* can't fail for a mapping of ours */
}

void shard_obj(struct obj *o, uint64_t n)
{
	char name[32] = "block-", digits[24];
	size_t len = 6;
	unsigned i = 0;

	do
		digits[i++] = (char)('0' + n % 10);
	while (n /= 10);
	while (i)
		name[len++] = digits[--i];
	name[len] = '\0';
	(void)obj_set(o, name); /* can't fail for such a name */
}

/* --- Room ------------------------------------------------------------------------------------- */

/* Waiting is in vain when so many puts have failed in a row: all there are, where `dirty` is small. */
static bool is_hopeless(const struct shardbuf *b)
{
	const uint64_t all = MAX(atomic_load(&b->shards_n), UINT64_C(1));

	return b->failed_in_row >= MIN(all, MIN((uint64_t)b->conf.puts, HOPELESS));
}

static bool is_short(const struct shardbuf *b, uint64_t bytes)
{
	return b->used + bytes > b->conf.dirty_max || b->gens_n >= SHARD_GENS_MAX;
}

/* Until there is room for `bytes`, or no hope of it. With the queue lock held before and after, not meanwhile. */
static CO_FN int room_wait(struct shard_user *u, uint64_t bytes)
{
	struct shardbuf *b = u->b;
	bool is_kicked = false;

	while (is_short(b, bytes)) {
		if (is_hopeless(b))
			return b->error;
		if (is_kicked) {
			co_wq_wait(&b->room, &b->lock);
			is_kicked = false;
		} else {
			pthread_mutex_unlock(&b->lock);
			shard_kick(u);
			is_kicked = true;
			pthread_mutex_lock(&b->lock);
		}
	}
	return 0;
}

/*
 * Reserves memory for a write. Those who wait stand in line, and only its first looks at every change: small writes,
 * for which there is room again and again, must not shut out a large one, nor a thousand get in each other's way.
 */
static CO_FN int room_take(struct shard_user *u, uint64_t bytes)
{
	struct shardbuf *b = u->b;
	bool is_in_line;
	int rc = 0;

	pthread_mutex_lock(&b->lock);
	is_in_line = b->room_waiters || is_short(b, bytes);
	if (is_in_line) {
		b->room_waiters++;
		pthread_mutex_unlock(&b->lock);
		co_mutex_lock(&b->line);
		pthread_mutex_lock(&b->lock);
		rc = room_wait(u, bytes);
		b->room_waiters--;
	}
	if (!rc)
		b->used += bytes;
	pthread_mutex_unlock(&b->lock);
	if (is_in_line)
		co_mutex_unlock(&b->line);
	return rc;
}

/* With the queue lock held. */
static void room_add(struct shardbuf *b, uint64_t bytes)
{
	b->used -= bytes;
	if (bytes && b->room_waiters)
		co_wq_wake_one(&b->room);
}

static void room_give(struct shardbuf *b, uint64_t bytes)
{
	if (!bytes)
		return;
	pthread_mutex_lock(&b->lock);
	room_add(b, bytes);
	pthread_mutex_unlock(&b->lock);
}

/* --- Generations; with the stripe's lock held ------------------------------------------------- */

static struct gen *gen_new(struct shardbuf *b)
{
	size_t words = bits_words(b->grains) + bits_words(b->pages);
	struct gen *g = calloc(1, sizeof(*g) + words * sizeof(g->bits[0]));

	if (!g)
		return NULL;
	g->seq = atomic_fetch_add(&b->seq, 1) + 1;
	g->born = now_ns();
	g->charge = GEN_COST;
	pthread_mutex_lock(&b->lock);
	b->used += GEN_COST; /* reserved by the writer, who gives that back */
	b->gens_n++;
	pthread_mutex_unlock(&b->lock);
	return g;
}

void gen_free(struct shardbuf *b, struct gen *g)
{
	if (!g)
		return;
	pthread_mutex_lock(&b->lock);
	b->gens_n--;
	room_add(b, g->charge);
	pthread_mutex_unlock(&b->lock);
	shard_unmap(b, g->data);
	free(g);
}

/* Grains of the last shard that lie behind the disk's end count as written: with zeroes. */
static void fill_behind_end(struct shardbuf *b, struct gen *g, uint64_t n)
{
	uint64_t start = n * b->conf.shard_size, end = b->conf.disk_size;

	if (end - start >= b->conf.shard_size)
		return;
	g->valid_n += (uint32_t)bits_set(g->bits, (end - start + SHARD_GRAIN - 1) / SHARD_GRAIN,
					 b->grains);
}

struct gen *shard_dirty(struct shardbuf *b, struct shard *s)
{
	if (s->dirty)
		return s->dirty;
	s->dirty = gen_new(b);
	if (!s->dirty)
		return NULL;
	fill_behind_end(b, s->dirty, s->n);
	s->newest = s->dirty->seq;
	if (!s->is_busy)
		shard_enqueue(b, s);
	return s->dirty;
}

/*
 * A piece that begins an untouched huge page looks like a stream, and the rest will come: all of it is taken at
 * once, a fault in place of 512.
 */
static bool begins_stream(const struct shardbuf *b, struct gen *g, uint64_t off, uint64_t len)
{
	const uint64_t page = off / MEM_PAGE, end = page + HUGE_PAGE / MEM_PAGE;

	return len >= PIECE && off % HUGE_PAGE == 0 && end <= b->pages &&
	       bits_find(gen_touched(b, g), page, end, true) == end;
}

/* The rest might not come, so half of the memory is left to what is small. */
static bool has_room_for_streams(struct shardbuf *b)
{
	bool has;

	pthread_mutex_lock(&b->lock);
	has = b->used + HUGE_PAGE <= b->conf.dirty_max / 2;
	pthread_mutex_unlock(&b->lock);
	return has;
}

/* The pages of [off, off + len) are written to: from now on they count. */
static void gen_touch(struct shardbuf *b, struct gen *g, uint64_t off, uint64_t len)
{
	uint64_t fresh;

	if (begins_stream(b, g, off, len) && has_room_for_streams(b)) {
		huge_use(g->data + off, HUGE_PAGE);
		len = HUGE_PAGE;
	}
	fresh = bits_set(gen_touched(b, g), off / MEM_PAGE, (off + len - 1) / MEM_PAGE + 1);
	if (!fresh)
		return;
	g->charge += fresh * MEM_PAGE;
	pthread_mutex_lock(&b->lock);
	b->used += fresh * MEM_PAGE;
	pthread_mutex_unlock(&b->lock);
}

static void gen_mark(struct gen *g, uint64_t off, uint64_t len)
{
	g->valid_n += (uint32_t)bits_set(g->bits, off / SHARD_GRAIN, (off + len) / SHARD_GRAIN);
}

/* [off, off + len) becomes valid, for the caller to copy data there; NULL = no memory. */
static uint8_t *gen_open(struct shardbuf *b, struct gen *g, uint64_t off, uint64_t len)
{
	if (!g->data)
		g->data = shard_map(b);
	if (!g->data)
		return NULL;
	gen_touch(b, g, off, len);
	gen_mark(g, off, len);
	return g->data + off;
}

void gen_zero(struct shardbuf *b, struct gen *g, uint64_t off, uint64_t len)
{
	const uint64_t *touched = gen_touched(b, g);
	uint64_t end = off + len, end_page = (end - 1) / MEM_PAGE + 1;
	uint64_t page = off / MEM_PAGE;

	while (page < end_page) {
		uint64_t first = bits_find(touched, page, end_page, true);

		page = bits_find(touched, first, end_page, false);
		if (first < page) {
			uint64_t from = MAX(first * MEM_PAGE, off);

			memset(g->data + from, 0, MIN(page * MEM_PAGE, end) - from);
		}
	}
	gen_mark(g, off, len);
}

/* `old` has no memory of its own, so all it holds is zero: that goes below what `to` has. */
static void take_zeroes(struct shardbuf *b, struct gen *to, const struct gen *old)
{
	uint64_t at = 0;

	while (at < b->grains) {
		uint64_t from = bits_find(old->bits, at, b->grains, true), hole;

		at = bits_find(old->bits, from, b->grains, false);
		for (; from < at; from = bits_find(to->bits, hole, at, false)) {
			from = bits_find(to->bits, from, at, false);
			hole = bits_find(to->bits, from, at, true);
			if (from < hole)
				gen_zero(b, to, from * SHARD_GRAIN, (hole - from) * SHARD_GRAIN);
		}
	}
	to->rest_zero = old->rest_zero;
}

/* What `young` holds goes over what `g` has, which has memory. */
static void take_over(struct shardbuf *b, struct gen *g, const struct gen *young)
{
	uint64_t at = 0;

	for (;;) {
		uint64_t from = bits_find(young->bits, at, b->grains, true);
		uint64_t off = from * SHARD_GRAIN, len;

		if (from == b->grains)
			return;
		at = bits_find(young->bits, from, b->grains, false);
		len = (at - from) * SHARD_GRAIN;
		if (young->data)
			memcpy(gen_open(b, g, off, len), young->data + off, len);
		else
			gen_zero(b, g, off, len);
	}
}

void shard_take_back(struct shardbuf *b, struct shard *s, struct gen *g)
{
	struct gen *young = s->dirty;

	if (young && young->rest_zero) {
		gen_free(b, g);
	} else if (young && !g->data) {
		take_zeroes(b, young, g);
		gen_free(b, g);
	} else if (young) {
		take_over(b, g, young);
		g->seq = young->seq;
		s->dirty = g;
		gen_free(b, young);
	} else {
		s->dirty = g;
	}
}

/* --- The table; with the stripe's lock held --------------------------------------------------- */

static struct list *bucket(struct stripe *st, uint64_t n)
{
	return &st->buckets[n / STRIPES % BUCKETS];
}

struct shard *shard_find(struct stripe *st, uint64_t n)
{
	list_for_each(s, bucket(st, n), struct shard, chain) if (s->n == n) return s;
	return NULL;
}

uint64_t shard_end(const struct shardbuf *b, uint64_t n)
{
	const uint64_t step = b->conf.shard_size / END_STEPS;

	return b->ends[n] ? b->ends[n] * step : b->conf.shard_size;
}

static void note_end(struct shardbuf *b, const struct shard *s)
{
	const uint64_t step = b->conf.shard_size / END_STEPS;
	const uint64_t steps = (s->end + step - 1) / step;

	b->ends[s->n] = steps < END_STEPS ? (uint8_t)steps : 0;
}

struct shard *shard_get(struct shardbuf *b, struct stripe *st, uint64_t n)
{
	struct shard *s = shard_find(st, n);

	if (s)
		return s;
	s = calloc(1, sizeof(*s));
	if (!s)
		return NULL;
	s->n = n;
	s->end = shardmap_test(b->conf.known, n) ? shard_end(b, n) : 0;
	s->newest = s->done = atomic_load(&b->seq);
	co_wq_init(&s->wq);
	list_init(&s->node);
	list_add(bucket(st, n), &s->chain);
	shardmap_set(b->conf.known, n);
	atomic_fetch_add(&b->shards_n, 1);
	return s;
}

void shard_release(struct shardbuf *b, struct stripe *st, struct shard *s)
{
	if (s->dirty || s->is_busy || s->refs)
		return;
	note_end(b, s);
	if (!s->end)
		shardmap_clear(b->conf.known, s->n);
	list_del(&s->chain);
	free(s);
	atomic_fetch_sub(&b->shards_n, 1);
}

/* --- Writing ---------------------------------------------------------------------------------- */

/* At most PIECE bytes; iov NULL = zeroes, `only_dirty`: where there is a dirty generation. */
static CO_FN int change_piece(struct shard_user *u, uint64_t n, uint64_t off, uint64_t len,
			      const struct iov *iov, uint64_t done, bool only_dirty)
{
	uint64_t room = GEN_COST + (iov ? len + 2 * MEM_PAGE : 0);
	struct shardbuf *b = u->b;
	struct stripe *st = shard_stripe(b, n);
	uint8_t *to = NULL;
	struct gen *g = NULL;
	struct shard *s;
	int rc = only_dirty ? 0 : room_take(u, room);

	if (rc)
		return rc;
	pthread_mutex_lock(&st->lock);
	s = only_dirty ? shard_find(st, n) : shard_get(b, st, n);
	if (s)
		g = only_dirty ? s->dirty : shard_dirty(b, s);
	if (g && iov)
		to = gen_open(b, g, off, len);
	if (to)
		(void)iov_copy_out(iov, done, to, len);
	else if (g && !iov)
		gen_zero(b, g, off, len);
	if (g && g->valid_n == b->grains && !s->is_busy)
		shard_enqueue(b, s);
	if (s && !g)
		shard_release(b, st, s);
	pthread_mutex_unlock(&st->lock);
	if (!only_dirty)
		room_give(b, room); /* what it took is counted by now */
	shard_kick(u);
	return only_dirty || to || (g && !iov) ? 0 : -ENOMEM;
}

int shardbuf_write(struct shard_user *u, uint64_t n, uint64_t off, const struct iov *iov)
{
	for (uint64_t done = 0; done < iov->len; done += PIECE) {
		uint64_t len = MIN(iov->len - done, (uint64_t)PIECE);
		int rc = change_piece(u, n, off + done, len, iov, done, false);

		if (rc)
			return rc;
		if (done % (4 * PIECE) == 3 * PIECE)
			co_yield(); /* large writes leave others their turn */
	}
	return 0;
}

static CO_FN int zero_pieces(struct shard_user *u, uint64_t n, uint64_t off, uint64_t len,
			     bool only_dirty)
{
	enum { STEP = 4 * PIECE };

	if (!shardmap_test(u->b->conf.known, n))
		return 0;
	for (uint64_t done = 0; done < len; done += STEP) {
		int rc = change_piece(u, n, off + done, MIN(len - done, (uint64_t)STEP), NULL, 0,
				      only_dirty);

		if (rc)
			return rc;
	}
	return 0;
}

int shardbuf_zero(struct shard_user *u, uint64_t n, uint64_t off, uint64_t len)
{
	return zero_pieces(u, n, off, len, false);
}

int shardbuf_trim(struct shard_user *u, uint64_t n, uint64_t off, uint64_t len)
{
	return zero_pieces(u, n, off, len, true);
}
