/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the files of the disk tier share.
 *
 * On disk, in the machine's byte order (a head of another one is not known, so the files are made anew):
 *
 *	tier-index	head (512 bytes: magic, version, granule, slots, id, whose it is, checksum), zeroes
 *			up to 4096, an entry for each slot: checksum, key, number of the granule, region,
 *			checksums of its blocks (0 = not there)
 *	tier-data	a granule for each slot
 *	tier-marks	a bit for each region, in sectors of 504 bytes with a checksum
 *
 * All checksums are made with `id`, a random number that changes when the files are made anew: what a
 * former use left is never taken for an entry.
 */
#ifndef NBDRS_LAYER_CACHE_TIER_INT_H
#define NBDRS_LAYER_CACHE_TIER_INT_H

#include <pthread.h>
#include <stdatomic.h>

#include "layer/cache/cache_tier.h"
#include "nbdrs/identity.h"
#include "nbdrs/list.h"
#include "nbdrs/reactor.h"

enum {
	TIER_BLOCK = 4096,
	TIER_HEAD = 4096,
	TIER_STRIPES_MAX = 16,
	TIER_JOBS_MAX = 256,
	MARK_SECTORS = 4,
	MARK_SECTOR = 512,
	MARK_BYTES = MARK_SECTOR - 8, /* of a sector that are bits */
	REGIONS = MARK_SECTORS * MARK_BYTES * 8,
	REGION_SHIFT = 26,
};

/* A granule's name: lo finds it, hi goes into the checksums of its data. */
struct tier_key {
	uint64_t lo, hi;
};

enum slot_state { SLOT_FREE, SLOT_QUEUED, SLOT_VALID, SLOT_DOOMED };
enum slot_queue { QUEUE_FREE, QUEUE_SMALL, QUEUE_MAIN, QUEUES_N };

/* Numbers of slots count from 1 in their stripe; 0 = none. */
struct slot {
	uint64_t key;
	uint32_t chain, prev, next; /* in its bucket, in its queue */
	uint8_t state : 3, queue : 2, freq : 2;
	uint8_t is_stale : 1; /* its entry on disk may be of something that is not valid in it */
	uint16_t gen;         /* changes with what is in it */
};

struct slot_list {
	uint32_t head, tail, n;
};

/* A part of the slots, with a lock of its own: after the table's in memory, before the tier's. */
struct tier_stripe {
	pthread_mutex_t lock;
	struct slot *slots;
	uint32_t *buckets, *ghosts;
	uint32_t n, mask; /* slots; of buckets and ghosts */
	uint64_t first;   /* the number on disk of slot 1 */
	struct slot_list queues[QUEUES_N];
	uint64_t hits, misses, evictions, bad;
};

struct tier_job {
	uint8_t *data;
	struct tier_key key;
	uint64_t n;
	uint32_t slot, region;
	struct tier_stripe *stripe;
	uint16_t gen;
};

struct region {
	uint64_t at;   /* ns: the last change ended, or it was found marked */
	uint64_t seq;  /* of the mark */
	uint32_t busy; /* changes on their way */
	bool is_marked;
};

struct tier_marks {
	pthread_mutex_t lock; /* guards all below */
	struct region *regions;
	uint64_t seq, synced; /* the last mark; all up to this are on disk */
	bool is_syncing;
	bool is_over; /* the files are gone, or nothing can be done about them */
	struct co_wq wq;
	_Atomic uint64_t n; /* marked ones */
};

struct tier {
	struct tier_conf conf;
	char identity[IDENTITY_LEN + 1]; /* conf.identity */
	unsigned shift;                  /* log2 of granule */
	uint32_t blocks, entry_len;
	uint64_t slots_n;
	uint64_t id;
	int dir_fd, index_fd, data_fd, marks_fd; /* -1 */
	uint8_t *entry;                          /* of the fiber that writes: entry_len bytes */

	struct tier_stripe stripes[TIER_STRIPES_MAX];
	unsigned stripes_n;    /* a power of two */
	uint32_t *sums;        /* of all slots; guarded by their stripe */
	_Atomic uint64_t last; /* the highest granule number there ever was */
	_Atomic bool is_on;
	_Atomic uint64_t clean_until; /* ns: then the end does not wait for the index any longer */
	_Atomic uint64_t writes, dropped, errors;

	struct tier_marks marks;

	/* Writing; see cache_tier_write.c. */
	struct reactor *home;
	pthread_mutex_t lock; /* guards all below */
	struct co_wq work, idle;
	struct tier_job jobs[TIER_JOBS_MAX]; /* a ring */
	unsigned jobs_at, jobs_n, jobs_max;
	bool is_stopping, has_writer;
	uint64_t pause_until; /* ns: after an error nothing is taken */
	/* The layer below is flushed by another fiber: what is queued does not wait for that. */
	bool is_flushing, is_flushed;
	uint64_t flush_before; /* ns: what is quiet since then may be clean after it */
	int flush_rc;
};

/* --- cache_tier.c ----------------------------------------------------------------------------- */

CO_FN int tier_index_init(struct tier *t);
void tier_index_free(struct tier *t);
static inline uint32_t *slot_sums(const struct tier *t, const struct tier_stripe *s, uint32_t i)
{
	return t->sums + (s->first + i - 1) * t->blocks;
}
/* A slot that was found on disk; false when its granule is there already. */
bool tier_index_add(struct tier *t, uint64_t slot, uint64_t key, const uint8_t *sums);
/* Slot number on disk; it is free, and its entry has to go. */
void tier_index_stale(struct tier *t, uint64_t slot);
/* After the job's data was written, or not. `entry`: the sums as they are on disk. */
void tier_job_end(struct tier *t, const struct tier_job *job, const uint8_t *entry);
bool tier_job_is_wanted(const struct tier_job *job);

/* --- cache_tier_file.c: formats and files ----------------------------------------------------- */

struct tier_key tier_key_of(const char *name, uint16_t name_len, uint64_t n);
/* Never 0. */
uint32_t tier_block_sum(const struct tier_key *key, uint32_t block, const uint8_t *data);
uint64_t tier_sum(const struct tier *t, const void *data, size_t len, uint64_t what);

/* Into t->entry; of a job with its data, or of none: a free slot's. */
void tier_entry_make(struct tier *t, const struct tier_job *job, uint64_t slot);
/* Is t->entry a good one of the slot? */
bool tier_entry_is_good(const struct tier *t, const uint8_t *entry, uint64_t slot);
uint64_t tier_entry_key(const uint8_t *entry);
uint8_t *tier_entry_sums(uint8_t *entry);
/* After its sums were changed. */
void tier_entry_seal(const struct tier *t, uint8_t *entry, uint64_t slot);
CO_FN int tier_entry_write(struct tier *t, uint64_t slot);
CO_FN int tier_entry_read(struct tier *t, uint64_t slot);

/* Opens or makes the files, and reads them. */
CO_FN int tier_files_open(struct tier *t, struct err *err);
CO_FN void tier_files_close(struct tier *t);
/* Makes sure that they are never used again. */
CO_FN int tier_files_remove(int dir_fd);

/* --- cache_tier_marks.c ----------------------------------------------------------------------- */

int tier_marks_init(struct tier *t);
void tier_marks_free(struct tier *t);
uint32_t tier_region_of(const struct tier *t, const char *name, uint16_t name_len, uint64_t off);
/* All bits as they are in memory, synced. */
CO_FN int tier_marks_write(struct tier *t);
CO_FN int tier_marks_read(struct tier *t);
bool tier_is_marked(struct tier *t, uint32_t region);
/* Nobody uses the files from now on; see tier_settle(). */
CO_FN void tier_give_up(struct tier *t, const char *what, int rc);
/* Some are quiet since `before`, ns; takes those off that still are. */
bool tier_marks_due(struct tier *t, uint64_t before);
CO_FN void tier_marks_take_off(struct tier *t, uint64_t before);

/* --- cache_tier_write.c ----------------------------------------------------------------------- */

CO_FN void tier_writer(void *arg);

#endif
