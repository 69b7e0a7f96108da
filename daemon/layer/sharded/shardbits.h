/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Bitmaps: one of atomic words for what all channels look at without a lock (which shards may exist), and plain
 * ones for what a lock guards (which sectors of a shard are in memory).
 */
#ifndef NBDRS_LAYER_SHARDBITS_H
#define NBDRS_LAYER_SHARDBITS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { BITS_WORD = 64 };

/* Words that hold n bits. */
static inline size_t bits_words(uint64_t n)
{
	return (size_t)((n + BITS_WORD - 1) / BITS_WORD);
}

/* The bits of word at/64 that lie in [at, end); *next becomes the first bit behind them. */
static inline uint64_t bits_span(uint64_t at, uint64_t end, uint64_t *next)
{
	unsigned from = at % BITS_WORD;
	uint64_t room = BITS_WORD - from;
	uint64_t n = end - at < room ? end - at : room;

	*next = at + n;
	return (n == BITS_WORD ? UINT64_MAX : (UINT64_C(1) << n) - 1) << from;
}

/* --- Plain; n <= 2^32 --------------------------------------------------------------------------- */

static inline bool bits_test(const uint64_t *words, uint64_t i)
{
	return words[i / BITS_WORD] >> (i % BITS_WORD) & 1;
}

/* Sets [from, end); returns how many were clear before. */
static inline uint64_t bits_set(uint64_t *words, uint64_t from, uint64_t end)
{
	uint64_t fresh = 0, next;

	for (; from < end; from = next) {
		uint64_t *word = &words[from / BITS_WORD];
		uint64_t mask = bits_span(from, end, &next);

		fresh += (unsigned)__builtin_popcountll(mask & ~*word);
		*word |= mask;
	}
	return fresh;
}

/* The first bit of [from, end) that is `value`; `end` when there is none. */
static inline uint64_t bits_find(const uint64_t *words, uint64_t from, uint64_t end, bool value)
{
	uint64_t flip = value ? 0 : UINT64_MAX, next;

	for (; from < end; from = next) {
		uint64_t hit = (words[from / BITS_WORD] ^ flip) & bits_span(from, end, &next);

		if (hit)
			return from / BITS_WORD * BITS_WORD + (unsigned)__builtin_ctzll(hit);
	}
	return end;
}

/* One more than the last bit of [0, end) that is set; 0 when there is none. */
static inline uint64_t bits_end(const uint64_t *words, uint64_t end)
{
	uint64_t next;

	for (uint64_t from; end; end = from) {
		uint64_t hit;

		from = (end - 1) / BITS_WORD * BITS_WORD;
		hit = words[from / BITS_WORD] & bits_span(from, end, &next);
		if (hit)
			return from + BITS_WORD - (unsigned)__builtin_clzll(hit);
	}
	return 0;
}

/* --- Atomic ------------------------------------------------------------------------------------- */

/* `n` bits in words that whoever made it frees. */
struct shardmap {
	_Atomic uint64_t *words;
	uint64_t n;
};

/*
 * Acquire and release: who sees a bit also sees what was done before it was set or cleared. Everything finer is
 * ordered by the locks of those who change bits.
 */
static inline bool shardmap_test(const struct shardmap *m, uint64_t i)
{
	return atomic_load_explicit(&m->words[i / BITS_WORD], memory_order_acquire) >>
		       (i % BITS_WORD) &
	       1;
}

static inline void shardmap_set(struct shardmap *m, uint64_t i)
{
	if (!shardmap_test(m, i))
		atomic_fetch_or_explicit(&m->words[i / BITS_WORD], UINT64_C(1) << (i % BITS_WORD),
					 memory_order_acq_rel);
}

static inline void shardmap_clear(struct shardmap *m, uint64_t i)
{
	atomic_fetch_and_explicit(&m->words[i / BITS_WORD], ~(UINT64_C(1) << (i % BITS_WORD)),
				  memory_order_acq_rel);
}

/* As bits_find. */
static inline uint64_t shardmap_find(const struct shardmap *m, uint64_t from, uint64_t end,
				     bool value)
{
	uint64_t flip = value ? 0 : UINT64_MAX, next;

	for (; from < end; from = next) {
		uint64_t word =
			atomic_load_explicit(&m->words[from / BITS_WORD], memory_order_acquire);
		uint64_t hit = (word ^ flip) & bits_span(from, end, &next);

		if (hit)
			return from / BITS_WORD * BITS_WORD + (unsigned)__builtin_ctzll(hit);
	}
	return end;
}

static inline uint64_t shardmap_count(const struct shardmap *m)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < bits_words(m->n); i++)
		sum += (unsigned)__builtin_popcountll(
			atomic_load_explicit(&m->words[i], memory_order_relaxed));
	return sum;
}

#endif
