/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the files of layer `cache` share.
 */
#ifndef NBDRS_LAYER_CACHE_INT_H
#define NBDRS_LAYER_CACHE_INT_H

#include "layer/cache/cache_dirty.h"
#include "layer/cache/cache_journal.h"
#include "layer/cache/cache_share.h"
#include "layer/cache/cache_table.h"
#include "layer/cache/cache_tier.h"
#include "nbdrs/layer.h"
#include "nbdrs/log.h"
#include "nbdrs/rangelock.h"
#include "nbdrs/reactor.h"

enum cache_mode { MODE_WRITETHROUGH, MODE_WRITEBACK };
enum cache_durability { DURABILITY_AUTO, DURABILITY_LOCAL, DURABILITY_REMOTE };
enum cache_away { AWAY_WAIT, AWAY_ERROR, AWAY_READONLY };

struct back;

struct cache {
	/* Options. */
	uint64_t mem, granule, size, journal, lag_ns, uploads, after_ns;
	unsigned mode, durability, away;
	char *disk, *volume;
	bool keep;

	bool is_local;                    /* durability */
	uint64_t journal_size, tier_size; /* size, without and with what else is on disk */
	unsigned shift;                   /* log2 of granule */
	struct cache_table *table;
	struct cache_share share;
	struct rangelock ranges; /* see cache_through.c */
	struct back *back;       /* NULL: writes through */

	/* The disk's part of what is clean. */
	struct tier *tier;  /* NULL = none */
	char *place;        /* whose it is */
	struct chan *below; /* of this layer, on `home`, for flushes */
	struct reactor *home;
};

/* What a write-back cache has beside. */
struct back {
	struct cache *c;
	struct layer *l;
	const char *name; /* for the log */
	char *volume;
	char identity[IDENTITY_LEN + 1]; /* of what is below, "" = it has none */
	bool is_ro;
	bool is_whole; /* objects below are only put whole */
	struct journal journal;
	struct dirty dirty;
	struct rangelock objects; /* of a keyed one: a put excludes changes of its object */
	_Atomic uint64_t puts,
		flushed; /* puts that went past the journal; those that a flush covered */

	/* Sending; on one reactor. */
	struct reactor *home;
	struct chan *chan;  /* of this layer */
	unsigned workers_n; /* changed there, under dirty.lock once they run */
	struct co_wq ended; /* workers_n is 0 */

	/* Under dirty.lock. */
	bool is_stopping, is_freeing;
	uint64_t keeper_due; /* ns: when the keeper wakes up; UINT64_MAX = there is none */
	uint64_t retry_at;   /* ns: failed ones are not tried before */
	uint64_t free_at;    /* ns: nor are segments given back before this */
	uint64_t bad_since;  /* ns: the first failure since the last success, 0 = all is well */
	int error;           /* the last one; 0 after a success */
	unsigned failed_in_row;
	uint64_t sends, sent_bytes, failures;
	uint64_t second, this_second, last_second; /* bytes sent in them */
	uint64_t pace_until; /* ns: writers that are slowed have their turns up to here */
	struct log_gate gate, journal_gate;
};

/* --- cache.c ---------------------------------------------------------------------------------- */

/* Whether they go together. */
int cache_check_options(const struct cache *c, struct err *err);

/* --- cache_through.c: to the layer below, past the journal ------------------------------------ */

CO_FN int through_read(struct chan *ch, struct ext e, const struct iov *iov, unsigned fl);
CO_FN int through_cache(struct chan *ch, struct ext e);
CO_FN int through_write(struct chan *ch, struct ext e, const struct iov *iov, unsigned fl);
CO_FN int through_zero(struct chan *ch, struct ext e, unsigned fl);
CO_FN int through_trim(struct chan *ch, struct ext e, unsigned fl);
CO_FN int through_put(struct chan *ch, const struct put *p, struct obj_stat *st);
CO_FN int through_del(struct chan *ch, const struct obj *objs, unsigned n);

/* --- cache_disk.c: the disk's part of what is clean ------------------------------------------- */

/* Granules that the disk must have room for. */
enum { TIER_MIN = 8 };

/* Opens it, if there is to be one; before anything is sent below. The journal is open. */
CO_FN int cache_tier_start(struct layer *l, struct err *err);
/* Nothing is sent below any more; the journal is still open. */
CO_FN void cache_tier_stop(struct layer *l);

/* --- cache_volume.c: volumes are made and removed --------------------------------------------- */

/* Whether `init --force` changes the volume's size at most, and keeps its data. */
bool cache_init_keeps(const struct layer *l);
CO_FN int cache_create(struct layer *l, const struct obj *obj, uint64_t size, bool force,
		       struct err *err);
CO_FN int cache_destroy(struct layer *l, const struct obj *obj, struct err *err);

/* --- cache_back.c: requests over the journal -------------------------------------------------- */

CO_FN int back_read(struct chan *ch, struct ext e, const struct iov *iov, unsigned fl);
/* The journal has nothing of it, so what memory has is what a read would answer. */
bool back_is_clean(struct back *b, struct ext e);
CO_FN int back_write(struct chan *ch, struct ext e, const struct iov *iov, unsigned fl);
CO_FN int back_zero(struct chan *ch, struct ext e, unsigned fl);
CO_FN int back_flush(struct chan *ch);
CO_FN int back_map(struct chan *ch, struct ext e, struct extmap *m);

/* --- cache_objects.c: whole objects over the journal ------------------------------------------ */

CO_FN int back_stat(struct chan *ch, const struct obj *obj, struct obj_stat *st);
CO_FN int back_put(struct chan *ch, const struct put *p, struct obj_stat *st);
CO_FN int back_del(struct chan *ch, const struct obj *objs, unsigned n);
CO_FN int back_list(struct chan *ch, const char *prefix, list_fn *fn, void *arg);
/* Writes a change into the journal; of a keyed layer it waits for a put of the object. */
CO_FN int back_append(struct back *b, struct record *r);

/* --- cache_send.c: in the background ---------------------------------------------------------- */

/* Opens journal and index and starts sending. */
CO_FN int back_open(struct layer *l, struct err *err);
/* Whose journal it is; the caller frees it. NULL = no memory. */
char *back_volume(const struct layer *l);
/* Sends what there is, once, and ends. */
CO_FN void back_close(struct layer *l);
/* Everything that was answered is below; its flush is the caller's. */
CO_FN int back_drain(struct back *b);
CO_FN int back_drain_object(struct back *b, const struct obj *obj);

/* --- cache_pace.c: how it goes ---------------------------------------------------------------- */

/* Parts per million of the room in journal and index. */
enum { FILL_SLOW = 700000, FILL_ALL = 1000000 };

uint64_t back_fill(struct back *b);
/* Something was sent, or not. */
void back_account(struct back *b, const char *what, uint64_t bytes, int rc);
/* The layer below was flushed, or not. */
void back_account_flush(struct back *b, int rc);
/* The journal's own files failed when they were to be given back. */
void back_account_journal(struct back *b, int rc);
/* Slows a writer of so many bytes down, or refuses it. */
CO_FN int back_throttle(struct back *b, uint64_t len);
/* Of struct journal_conf. */
int back_want_room(void *back);
/* What is wrong with sending and has to be reported; 0. */
int back_error(struct back *b);

/* --- cache_unit.c ----------------------------------------------------------------------------- */

/* Brings what the snapshot has below. */
CO_FN int unit_send(struct back *b, const struct unit *u, const struct snapshot *s);

#endif
