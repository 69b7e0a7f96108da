/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The memory of layer `cache`: granules of objects by name, of all reactors, with a byte limit.
 *
 *	absent -> fetching -> valid -> absent or ghost
 *	             |  ^ it failed, or was dropped meanwhile: absent again
 *
 * Which one makes room is decided by S3-FIFO (Yang et al., SOSP 2023): what comes for the first
 * time waits in a small queue, a tenth of the memory, and goes on to the main one only if it was
 * asked for again; a scan passes through the small queue and leaves what is used often alone. A
 * ghost is a name without data: what comes back soon after it left is taken into the main queue at
 * once. Unlike LRU it needs no list operation for a hit, only a counter. Reads that go on where the
 * last one of the granule ended are one use, not many: a scan in small steps is still a scan.
 */
#ifndef NBDRS_LAYER_CACHE_TABLE_H
#define NBDRS_LAYER_CACHE_TABLE_H

#include <stdbool.h>
#include <stdint.h>

#include "nbdrs/co.h"
#include "nbdrs/iov.h"
#include "nbdrs/layer.h"

struct cache_table;
struct granule;

/* limit: bytes; granule: bytes of each, a power of two. -ENOMEM. */
int cache_table_new(uint64_t limit, uint32_t granule, struct cache_table **out);
/*
 * Who is offered the data of granules that make room: true = it is theirs now, until they give it back
 * (cache_table_give_back, on any thread, before the table goes). Called with a lock held, so that a later
 * change of the granule comes later there as well; never suspends.
 */
typedef bool evicted_fn(void *arg, const char *name, uint16_t name_len, uint64_t n, uint8_t *data,
			bool is_hot);
/* Before it is used. */
void cache_table_on_evict(struct cache_table *t, evicted_fn *fn, void *arg);
void cache_table_give_back(struct cache_table *t, uint8_t *data);
/* Makes room as if it was full: up to `n` granules; returns how many. */
unsigned cache_table_evict(struct cache_table *t, unsigned n);
/* Nothing may be fetching. NULL is fine. */
void cache_table_free(struct cache_table *t);

enum lookup { CACHE_HIT, CACHE_MISS };

/*
 * Granule n of `obj`: copies [off, off + len) of it to iov at `at` (iov NULL: nothing is copied).
 * Waits while somebody else fetches it. CACHE_MISS: it is not there.
 */
CO_FN enum lookup cache_table_read(struct cache_table *t, const struct obj *obj, uint64_t n,
				   uint32_t off, uint32_t len, const struct iov *iov, size_t at);

/*
 * The same without a copy and without waiting: what is valid is lent, and stays until it comes back, on any
 * thread; the table goes later. -EAGAIN: it is not there, or a quarter of the stripe is lent already.
 */
int cache_table_lend(struct cache_table *t, const struct obj *obj, uint64_t n, uint32_t off,
		     uint32_t len, struct loan *loan);

/*
 * Takes an absent granule for fetching: *out with room for its bytes at granule_data(), to be ended
 * by cache_table_fill(). NULL when it is there, is being fetched, or there is no memory.
 */
struct granule *cache_table_begin(struct cache_table *t, const struct obj *obj, uint64_t n);
uint8_t *granule_data(struct granule *g);
/*
 * The data is there (or not: !is_good), and was read up to `read_to`. It becomes valid unless it
 * was dropped meanwhile.
 */
void cache_table_fill(struct cache_table *t, struct granule *g, bool is_good, uint32_t read_to);

/*
 * Changes what is valid of granule n: [off, off + len) from iov at `at`; iov NULL = zeroes. With
 * all of a granule given it is added when it was absent.
 */
void cache_table_change(struct cache_table *t, const struct obj *obj, uint64_t n, uint32_t off,
			uint32_t len, const struct iov *iov, size_t at);

/* Forgets granule n; a fetch on its way will not be kept. */
void cache_table_drop(struct cache_table *t, const struct obj *obj, uint64_t n);
/* Forgets all granules of the object from `first` on. */
void cache_table_drop_from(struct cache_table *t, const struct obj *obj, uint64_t first);

/* Another limit, at most the one it was made with. A stripe keeps a granule at least. */
void cache_table_limit(struct cache_table *t, uint64_t limit);

struct cache_view {
	uint64_t bytes, granules, ghosts, hits, misses, evictions;
};

void cache_table_view(struct cache_table *t, struct cache_view *v);

#endif
