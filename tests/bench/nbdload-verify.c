/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Data that can be checked: every 8-byte word of a block is derived from its own disk offset, the
 * block's generation and the seed of the run, so that data from the wrong place, from an older
 * write, from another run, or shifted by a few bytes all differ.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nbdload.h"

#define BUSY               1u
#define MISMATCHES_PRINTED 5

int verify_init(struct verify *v, uint64_t block_n, uint32_t block_len, uint64_t seed)
{
	_Atomic uint32_t *word = calloc(block_n, sizeof(*word));

	if (!word)
		return -ENOMEM;
	*v = (struct verify){
		.word = word,
		.block_n = block_n,
		.block_len = block_len,
		.seed = seed,
	};
	return 0;
}

void verify_free(struct verify *v)
{
	free(v->word);
	v->word = NULL;
}

bool verify_claim(struct verify *v, uint64_t block, uint32_t *gen)
{
	/* Acquire pairs with the release below: the generation seen belongs to data whose write
	 * was answered before this claim, on whichever connection. */
	uint32_t old = atomic_fetch_or_explicit(&v->word[block], BUSY, memory_order_acquire);

	if (old & BUSY)
		return false;
	*gen = old >> 1;
	return true;
}

void verify_release(struct verify *v, uint64_t block, uint32_t gen)
{
	atomic_store_explicit(&v->word[block], gen << 1, memory_order_release);
}

static uint64_t word_at(const struct verify *v, uint64_t off, uint32_t gen)
{
	uint64_t x = off ^ (gen + (v->seed << 32)) * UINT64_C(0x9e3779b97f4a7c15);

	/* The finalizer of splitmix64: neighbours do not look alike. */
	x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
	return x ^ x >> 31;
}

void verify_fill(const struct verify *v, void *buf, uint64_t block, uint32_t gen)
{
	uint64_t off = block * v->block_len;
	uint64_t *p = buf;

	for (uint32_t i = 0; i < v->block_len / sizeof(*p); i++)
		p[i] = word_at(v, off + i * sizeof(*p), gen);
}

void verify_check(struct verify *v, const void *buf, uint64_t block, uint32_t gen)
{
	uint64_t off = block * v->block_len;
	const uint64_t *p = buf;

	if (gen == 0)
		return;
	atomic_fetch_add_explicit(&v->checked, 1, memory_order_relaxed);
	for (uint32_t i = 0; i < v->block_len / sizeof(*p); i++) {
		uint64_t want = word_at(v, off + i * sizeof(*p), gen);

		if (p[i] == want)
			continue;
		if (atomic_fetch_add_explicit(&v->mismatches, 1, memory_order_relaxed) <
		    MISMATCHES_PRINTED)
			fprintf(stderr,
				"nbdload: mismatch at offset %" PRIu64 " (block %" PRIu64
				", generation %" PRIu32 "): read %016" PRIx64 ", want %016" PRIx64
				"\n",
				off + i * sizeof(*p), block, gen, p[i], want);
		return;
	}
}
