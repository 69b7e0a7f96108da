/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * See cache_arena.h.
 */
#include "layer/cache/cache_arena.h"

#include <assert.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/huge.h"

/* Debian 12's headers know it, older ones don't: MADV_DONTNEED of memory that may be locked. Linux 5.18. */
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

enum { DATA_ALIGN = 4096 };

/* Granules trimmed at a stretch. */
enum { TURN = 64 };

/* So that a sanitizer sees uses after cache_arena_put(), as of malloc's memory. */
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define HIDE(p, len) ASAN_POISON_MEMORY_REGION(p, len)
#define SHOW(p, len) ASAN_UNPOISON_MEMORY_REGION(p, len)
#else
#define HIDE(p, len) ((void)0)
#define SHOW(p, len) ((void)0)
#endif

int cache_arena_init(struct cache_arena *a, uint64_t size, uint32_t granule)
{
	const uint64_t n = size / granule;

	*a = (struct cache_arena){ .granule = granule, .n = (uint32_t)MIN(n, UINT64_C(1) << 31) };
	a->spare =
		malloc(MAX(a->n, 1U) * sizeof(*a->spare)); /* untouched, so it costs nothing yet */
	if (!a->spare)
		return -ENOMEM;
	(void)pthread_mutex_init(&a->lock, NULL); /* can't fail for a default one */
	a->base = a->n ? huge_map((size_t)a->n * granule) : NULL;
	if (a->base)
		huge_use(a->base, (size_t)a->n * granule);
	else
		a->n = 0;
	return 0;
}

void cache_arena_free(struct cache_arena *a)
{
	if (!a->spare)
		return; /* never made */
	assert(a->spare_n == a->fresh);
	if (a->base) {
		SHOW(a->base, (size_t)a->n * a->granule);
		(void)munmap(a->base, (size_t)a->n * a->granule);
	}
	free(a->spare);
	a->spare = NULL;
	(void)pthread_mutex_destroy(&a->lock);
}

static uint8_t *at(const struct cache_arena *a, uint32_t i)
{
	return a->base + (size_t)i * a->granule;
}

static bool is_inside(const struct cache_arena *a, const uint8_t *data)
{
	return a->base && data >= a->base && data < at(a, a->n);
}

uint8_t *cache_arena_get(struct cache_arena *a)
{
	uint8_t *data = NULL;

	pthread_mutex_lock(&a->lock);
	if (a->spare_n) {
		data = at(a, a->spare[--a->spare_n]);
		a->cold_n = MIN(a->cold_n, a->spare_n);
	} else if (a->fresh < a->n) {
		data = at(a, a->fresh++);
	}
	pthread_mutex_unlock(&a->lock);
	if (!data)
		return aligned_alloc(DATA_ALIGN, a->granule);
	SHOW(data, a->granule);
	return data;
}

void cache_arena_put(struct cache_arena *a, uint8_t *data)
{
	if (!is_inside(a, data)) {
		free(data);
		return;
	}
	HIDE(data, a->granule);
	pthread_mutex_lock(&a->lock);
	a->spare[a->spare_n++] = (uint32_t)((size_t)(data - a->base) / a->granule);
	pthread_mutex_unlock(&a->lock);
}

/* Some; true when more is left. The lock is not held for longer, as who holds a stripe's waits for it. */
static bool trim_some(struct cache_arena *a)
{
	bool is_more;

	pthread_mutex_lock(&a->lock);
	for (unsigned i = 0; i < TURN && a->cold_n < a->spare_n; i++, a->cold_n++)
		/* Where it fails the memory stays for the next one. */
		if (madvise(at(a, a->spare[a->cold_n]), a->granule, MADV_DONTNEED_LOCKED))
			(void)madvise(at(a, a->spare[a->cold_n]), a->granule, MADV_DONTNEED);
	is_more = a->cold_n < a->spare_n;
	pthread_mutex_unlock(&a->lock);
	return is_more;
}

void cache_arena_trim(struct cache_arena *a)
{
	/* Where a page is larger than a granule others lie in it, too. */
	if (a->granule % (size_t)sysconf(_SC_PAGESIZE) == 0)
		while (trim_some(a))
			;
}
