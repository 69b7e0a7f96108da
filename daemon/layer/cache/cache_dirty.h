/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What of the journal is not below yet: by unit, which extents of it, and where in the journal they
 * are. A unit is what is sent down together: an object, or 4 MiB of a disk.
 *
 * Changes come in the journal's order, one at a time (cache_dirty_show), and lie over older ones. A
 * unit is sent by one at a time (is_busy); what has come meanwhile stays. Each extent holds a
 * reference to its segment.
 *
 * A unit stands in one of four queues: those that somebody waits for, those that wait for their
 * time, those that failed, those that are sent. Each is in the order in which they came there; for
 * those that wait this is nearly the order of their age, but for what changed while it was sent. Its
 * struct lives while it has something unsent or somebody knows it (refs).
 *
 * A unit that is full gains nothing by waiting until it is `lag` old: it goes when nothing was written
 * to it for a moment (`resting`). One that is written again and again would then be sent again and
 * again, so that happens once in `lag` only. Those that changed last are likely to be growing still:
 * where the journal's fill makes units due before their time, they are left for last.
 */
#ifndef NBDRS_LAYER_CACHE_DIRTY_H
#define NBDRS_LAYER_CACHE_DIRTY_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "layer/cache/cache_journal.h"

enum { UNIT_SHIFT = 22, DIRTY_STRIPES = 64, DIRTY_BUCKETS = 1024 };
enum { DIRTY_SENT = 256, DIRTY_RECENT = 4 };
/* Where writers wait: some 30 and 100 MiB of memory. A discard of a large disk is many units. */
enum { UNITS_MAX = 1 << 16, PARTS_MAX = 1 << 21 };

/* [off, end) of the object as record `seq` left it. */
struct dirty_part {
	uint64_t off, end, seq;
	struct segment *seg;
	uint64_t at;           /* in seg, of off */
	enum record_type type; /* DATA, ZERO, KEEP */
};

enum unit_queue { UNIT_NONE, UNIT_WANTED, UNIT_YOUNG, UNIT_FAILED, UNIT_BUSY, UNIT_QUEUES };

/* Up to `wq` under the lock of its stripe, from `node` to `rested` under d->lock. */
struct unit {
	struct list chain;    /* in its bucket */
	struct list all;      /* in `units` of its stripe */
	struct dirty_part *v; /* ascending, none overlap */
	size_t n, room;
	uint64_t bytes;    /* of all parts */
	uint64_t data_end; /* of an object: so long it is at least, 0 = it need not be there */
	uint64_t gone_seq; /* 0, or: below, the object has to go first */
	struct segment *gone_seg;
	uint64_t newest;   /* number of the last change there was */
	uint64_t done;     /* all changes up to this one are below */
	uint64_t attempts; /* to send it that were begun */
	uint64_t failed;   /* number of the last one that failed */
	_Atomic unsigned refs;
	bool is_busy;
	struct co_wq wq; /* is_busy ends */

	struct list node;
	enum unit_queue queue;
	uint64_t since;   /* ns: its oldest change, or younger than that while it is sent */
	int error;        /* of the last attempt, also while it is tried again */
	struct list rest; /* in `resting` */
	uint64_t rested;  /* ns: since then */

	uint64_t key, window; /* mixed hash of both; of a disk, which 4 MiB */
	struct obj obj;
};

struct dirty {
	bool by_object; /* a unit is an object */
	uint64_t lag_ns;
	unsigned enough; /* units under way, for those that may grow to be left alone */
	_Atomic uint64_t units_n, parts_n, bytes;
	struct dirty_stripe {
		pthread_mutex_t lock;
		struct list units;
		struct list buckets[DIRTY_BUCKETS];
		uint64_t sent[DIRTY_SENT]; /* ns: when a unit was last, by its key; 0 = never */
	} * stripes;

	pthread_mutex_t lock; /* of the queues; after a stripe's, before the journal's */
	struct list queues[UNIT_QUEUES];
	struct list resting; /* young ones that are full, in the order of their last change */
	uint64_t recent[DIRTY_RECENT]; /* keys of those that changed last */
	unsigned recent_at;            /* the newest of them */
	unsigned busy_n;               /* in UNIT_BUSY */
	struct co_wq work;             /* something was queued */
	uint64_t refused_n;            /* units whose error time will not mend */
	int refused;                   /* the newest such error */
};

/* `lag_ns`: how old a unit may get; `uploads`: sent at a time. -ENOMEM. */
int dirty_init(struct dirty *d, bool by_object, uint64_t lag_ns, uint64_t uploads);
/* Gives all references back. Half built and zeroed ones are fine. */
void dirty_free(struct dirty *d);

/* Takes a change in, see struct journal_conf. */
void dirty_show(struct dirty *d, const struct record *r);

/* --- For reads -------------------------------------------------------------------------------- */

enum { LOOK_MAX = 32 };

/* What there is of a request's beginning. */
struct look {
	uint64_t end;  /* so far it was looked at */
	bool is_known; /* the object is there, whatever the layer below says */
	bool is_gone;  /* what has no part is zeroes, or no object if !is_known: never ask below */
	bool has_gaps; /* not all of it has parts */
	unsigned n;
	struct dirty_part v[LOOK_MAX]; /* clipped; with references of the caller's */
};

/* False: the layer below knows all of [off, l->end). */
bool dirty_look(struct dirty *d, const struct obj *obj, uint64_t off, uint64_t end, struct look *l);
void look_end(struct look *l);

/* GONE: below, it has to go first; what is here is all of it then. */
enum dirty_state { DIRTY_THERE, DIRTY_GONE };
/*
 * Calls fn for each object that has changes, with its data_end. It must not suspend. Not 0 ends it.
 */
CO_FN int dirty_each_object(struct dirty *d,
			    int (*fn)(void *arg, const struct obj *obj, enum dirty_state s,
				      uint64_t end),
			    void *arg);

/* --- For sending ------------------------------------------------------------------------------ */

/*
 * The unit to send next, busy, or NULL with the time when there may be one in *due (UINT64_MAX:
 * unknown). `age`: ns that a young one waits; `retry_at`: when failed ones may be tried. With
 * d->lock held.
 */
struct unit *dirty_next(struct dirty *d, uint64_t age, uint64_t retry_at, uint64_t *due);

/* What a unit has, at one time. */
struct snapshot {
	uint64_t seq; /* of its newest part */
	bool is_gone;
	struct dirty_part *v; /* with references */
	size_t n;
	uint64_t data_end, since; /* the unit's */
	uint64_t bytes;           /* of data */
};

/*
 * Takes a snapshot of what dirty_next() gave; false when there is nothing to send any more: it is
 * given back.
 */
bool unit_begin(struct dirty *d, struct unit *u, struct snapshot *s);
/* It went down, or not. Frees the snapshot, gives the unit back. */
void unit_end(struct dirty *d, struct unit *u, struct snapshot *s, int rc);

/* A change that somebody waits for. */
struct target {
	struct unit *u; /* with a reference, which target_wait() gives back */
	uint64_t seq, attempts;
};

/*
 * The unit of an object (-ENOENT), or all units: what they have by now, and some of what comes
 * meanwhile. The caller frees *v. -ENOMEM: *v has those that there was room for.
 */
int dirty_target(struct dirty *d, const struct obj *obj, struct target *t);
CO_FN int dirty_targets(struct dirty *d, struct target **v, size_t *n);
/*
 * Wants it sent, and waits until it is, or one attempt that began after the target was taken has
 * failed.
 */
void target_want(struct dirty *d, const struct target *t);
CO_FN int target_wait(struct dirty *d, const struct target *t);
/* Does not wait. */
void target_drop(struct dirty *d, const struct target *t);

/* Parts per million of the index's room that are in use. Any thread. */
uint64_t dirty_fill(struct dirty *d);

struct dirty_view {
	uint64_t bytes, units;
	uint64_t since; /* ns: about that of the oldest change; 0 = there is none */
	int refused;    /* an error that time will not mend */
};

void dirty_view(struct dirty *d, struct dirty_view *v);

#endif
