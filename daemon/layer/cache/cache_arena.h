/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Where the granules of layer `cache` lie: one mapping of address space, in huge pages where the kernel
 * has them. It takes a fault for 2 MiB instead of one for 4 KiB to fill it, and a random read of it
 * finds its address in the TLB. Memory is taken when a granule is used for the first time; one that was
 * given back is the next to be used.
 */
#ifndef NBDRS_LAYER_CACHE_ARENA_H
#define NBDRS_LAYER_CACHE_ARENA_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

struct cache_arena {
	pthread_mutex_t lock;
	uint8_t *base; /* NULL: no address space was to be had, all comes from malloc */
	uint32_t *spare;
	uint32_t granule, n; /* bytes of each; how many */
	uint32_t fresh;      /* those from here on were never used */
	uint32_t spare_n;    /* spare[]: given back; the last one is taken first */
	uint32_t cold_n;     /* the first of them are without memory */
};

/* `granule`: a power of two from 4 KiB. -ENOMEM. */
int cache_arena_init(struct cache_arena *a, uint64_t size, uint32_t granule);
/* All granules were given back. */
void cache_arena_free(struct cache_arena *a);

/* A granule, its contents undefined, at a multiple of 4 KiB; from malloc when all are taken. NULL = no memory. */
uint8_t *cache_arena_get(struct cache_arena *a);
/* NULL is fine. Any thread. */
void cache_arena_put(struct cache_arena *a, uint8_t *data);
/* The memory of granules that were given back is the kernel's again. */
void cache_arena_trim(struct cache_arena *a);

#endif
