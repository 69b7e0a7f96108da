/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the files of the layer `distributed` share: where objects lie (pure), what is known about replicas that
 * differ (marks) or may (doubt), and how they are made equal again (repair). distributed.c has the prose.
 */
#ifndef NBDRS_LAYER_DISTRIBUTED_H
#define NBDRS_LAYER_DISTRIBUTED_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

/* A table that can't grow stays as it is; an entry that can't be added has no hh.tbl. */
#define HASH_NONFATAL_OOM 1
#include <uthash.h>

#include "nbdrs/layer.h"
#include "nbdrs/list.h"
#include "nbdrs/log.h"

enum { NODES_MAX = 64, COMPARE_MAX = 8 };

/* ---- placement (distributed_place.c): pure ---- */

struct placing {
	unsigned nodes, replicas;
	uint64_t choose[NODES_MAX + 1][NODES_MAX + 1]; /* binomial coefficients; those of 64 fit */
};

/* 1 <= replicas <= nodes <= NODES_MAX. */
void placing_init(struct placing *p, unsigned nodes, unsigned replicas);

/*
 * Where an object lies: holder r is on node[r]. A shard ("block-N") has `replicas` holders, named block-N-r;
 * anything else lies on all nodes under its own name.
 */
struct place {
	bool is_shard;
	uint64_t shard;
	unsigned n; /* holders */
	uint8_t node[NODES_MAX];
};

/* The nodes of shard N: the (N mod C)-th combination in lexicographic order; writes p->replicas of them. */
void place_shard(const struct placing *p, uint64_t shard, uint8_t *node);
/* -EINVAL for names that are ours: block-N-R, stale-..., doubt */
int place_name(const struct placing *p, const char *name, struct place *out);
/* Which holder `node` is; -1 = none. */
int place_holder(const struct place *at, unsigned node);
/* The name of holder r's object in its store. */
void place_stored(const struct place *at, const char *name, unsigned r, struct obj *out);
/*
 * The reverse: what lies as `stored` on `node`. False for what is not ours, or lies on the wrong node. `name`
 * has room for OBJ_NAME_MAX + 1.
 */
bool place_parse(const struct placing *p, const char *stored, unsigned node, char *name,
		 struct place *at, unsigned *r);

/* "block-N". */
bool place_is_shard(const char *name);
void place_shard_name(uint64_t shard, char name[32]);

/* Records: the object stale-NAME-R-SEQ says "holder R of NAME is stale"; SEQ grows. */
#define RECORD_PREFIX "stale-"
enum { RECORD_LEN = OBJ_NAME_MAX + 64 };
/* -ENAMETOOLONG for names of more than some 220 bytes: their replicas can't be stale. */
int record_name(struct obj *out, const char *name, unsigned r, uint64_t seq);
/* Its beginning, common to all SEQ. */
void record_prefix(char out[RECORD_LEN], const char *name, unsigned r);
bool record_parse(const char *stored, char *name, unsigned *r, uint64_t *seq);

/* ---- what may differ (distributed_doubt.c) ---- */

#define DOUBT_NAME "doubt"
/*
 * Shards of a region; regions from which on old ones leave; with which no more are entered; that a record may name, as
 * many as crash upon crash could leave on nodes of which each knows of others.
 */
enum {
	REGION_SHARDS = 16,
	REGIONS_MAX = 1024,
	REGIONS_FULL = 2 * REGIONS_MAX,
	REGIONS_READ_MAX = 8 * REGIONS_FULL
};
/* The region of all that is no shard. */
#define REGION_OTHERS UINT64_MAX

/* Shards [n * REGION_SHARDS, (n + 1) * REGION_SHARDS), while they are in doubt. */
struct region {
	uint64_t n;
	uint64_t version; /* of the record: the first with this region */
	uint64_t
		needs_flush; /* number of the first flush that covers its last change; 0 = none is needed */
	uint64_t used;    /* ns; when its last change ended */
	unsigned changes; /* under way */
	struct list idle; /* doubt.idle, while there are none */
	UT_hash_handle hh;
};

/* The record on one node. */
struct doubt_copy {
	bool is_busy;           /* a put is on its way */
	struct chan *c;         /* by this channel */
	uint64_t has;           /* version */
	uint64_t begun, failed; /* puts, counted; the last one that failed */
	uint64_t named;         /* at open: nodes that are left out */
};

struct doubt {
	struct co_mutex room;     /* one fiber at a time looks for regions that may leave */
	_Atomic unsigned n;       /* of `table` */
	_Atomic uint64_t durable; /* version that `quorum` nodes have */

	pthread_mutex_t lock; /* guards the rest; dist.lock may be taken inside it */
	struct region *table;
	_Atomic uint64_t out;      /* nodes that are left out; some node's record may name them */
	_Atomic bool is_out_named; /* and the newest one does */
	struct list idle;          /* those without changes, unused for longest first */
	struct list *look;         /* the next one to look at for who has `room`; NULL = nobody */
	uint64_t version;          /* of the table */
	uint64_t flushes, flushed; /* begun, counted; the last one that went well */
	uint64_t left;             /* changes that are over, and times that regions were dropped, counted */
	struct co_wq leaves;       /* one more is */
	struct doubt_text *text;   /* the newest, while it is on its way */
	struct doubt_copy copies[NODES_MAX];
	struct co_wq wq; /* a put of the record ended */
};

/* ---- the layer ---- */

struct node {
	_Atomic bool is_joined;  /* its kid is open, its records were read: may be used */
	_Atomic bool is_away;    /* failed lately; asked only when there is no other way */
	_Atomic int error;       /* the last one; 0 = none */
	_Atomic unsigned misses; /* failures in a row */
	_Atomic unsigned inflight;
	_Atomic uint64_t ewma_ns; /* of reads */
	_Atomic uint64_t stale_n; /* objects of which its replica is stale */
	_Atomic uint64_t caught_up_n;
	_Atomic uint64_t not_before; /* ns; when repair asks it again */
};

/*
 * What is special about one object; one that is not here has equal replicas. Bits are holders.
 */
struct mark {
	uint64_t stale;    /* not read from, and written only as a whole */
	uint64_t recorded; /* of `stale`: every good holder says so durably */
	uint64_t
		behind; /* may lack writes that were answered (quorum < replicas), while behind_n > 0 */
	uint64_t dirty;     /* written since the last flush, where that matters */
	uint64_t flushing;  /* of `dirty`, taken by the running flush */
	uint64_t lingering; /* not stale any more, but a record that says so may still lie about */
	unsigned behind_n;  /* requests */
	bool is_unsettled;  /* good replicas may differ: nobody took the last write */
	bool is_owed;       /* answered, and then too few had it: the next flush must see to it */
	struct list all;    /* dist.marks */
	struct list in_flush; /* dist.dirty or dist.flushing */
	struct list owing;    /* dist.owed, while is_owed */
	struct list other;    /* dist.others, while it is no shard */
	UT_hash_handle hh;
	char name[]; /* as seen from above */
};

struct dist {
	/* options */
	uint64_t replicas, quorum, rebuild, recheck, clean;
	unsigned read_from; /* enum read_from */

	struct placing *placing;
	struct layer *layer;
	struct node *nodes; /* layer->kids_n */
	struct rangelock objects;
	struct co_mutex flush_one;              /* one flush at a time */
	struct co_mutex call_one;               /* one fiber at a time brings nodes back */
	struct co_mutex comparing[COMPARE_MAX]; /* so many objects at a time, by shard: memory */
	struct doubt doubt;                     /* has a lock of its own */

	_Atomic uint64_t marks_n; /* of `marks`: 0 is the usual case and saves the lock */
	pthread_mutex_t lock;     /* guards the rest */
	struct mark *table;
	struct list marks;
	struct list others;      /* those of objects that are no shards: few */
	uint64_t seq;            /* of the last record */
	_Atomic int broken;      /* nothing can be relied on any more: all requests fail with it */
	uint64_t background_len; /* bytes that answered requests still hold */
	struct list dirty,
		flushing; /* struct mark: written since the last flush, of the running one */
	struct list owed; /* struct mark: is_owed; the running flush goes through it */
	_Atomic uint64_t dirty_n, owed_n, unsettled_n;
	struct list jobs;   /* answered requests that still run; oldest first */
	uint64_t ticket;    /* of the newest */
	struct co_wq quiet; /* a job or the repair fiber ended */
	struct co_wq work;  /* for the repair fiber */
	_Atomic bool is_stopping;
	bool is_repairing, has_work;
	struct log_gate gate; /* has a lock of its own */
};

enum read_from { READ_FASTEST, READ_FIRST };

struct dist_chan {
	struct co_mutex opening; /* one fiber at a time opens a kid's channel */
	unsigned bringing; /* fibers that put the record of what is in doubt; under doubt.lock */
};

static inline uint64_t bit(unsigned i)
{
	return UINT64_C(1) << i;
}

static inline uint64_t all_of(const struct place *at)
{
	return at->n == 64 ? UINT64_MAX : bit(at->n) - 1;
}

static inline unsigned count(uint64_t mask)
{
	return (unsigned)__builtin_popcountll(mask);
}

/* ---- nodes and marks (distributed_marks.c) ---- */

/*
 * The same done on several holders of an object at once. `fn` does it on one and returns 0 or -errno; `after`, where
 * given, is told of each that is through.
 */
struct each {
	struct chan *c;
	const struct place *at;
	CO_FN int (*fn)(struct each *e, unsigned r, struct chan *kid);
	void (*after)(struct each *e);
	void *arg;
	uint64_t ok, done; /* holders */
	int rc;            /* the first error; 0 = none */
	struct co_group group;
	uint8_t child[NODES_MAX];
};

/* Joins them all before it returns. */
CO_FN void each_holder(struct each *e, uint64_t holders);

/* This reactor's channel of a node; -ENXIO while it has not joined. */
CO_FN int node_chan(struct chan *c, unsigned node, struct chan **out);
/* What came of a request, for is_away and `error`; logs changes. -ENOENT and the like are no failures. */
void node_result(struct dist *d, unsigned node, int rc);
/* Holders whose node has joined / has joined and is not away. */
uint64_t holders_joined(const struct dist *d, const struct place *at);
uint64_t holders_up(const struct dist *d, const struct place *at);
/* An error to answer when those holders are all that could have helped; never -ENOENT and the like. */
int holders_error(const struct dist *d, const struct place *at, uint64_t holders);
/* How many holders must have a write before it is answered. */
unsigned quorum_of(const struct dist *d, const struct place *at);

/* With d->lock held. NULL: none / out of memory (then d->broken is set). */
struct mark *mark_find(struct dist *d, const char *name);
struct mark *mark_need(struct dist *d, const char *name);
/* Frees it when it says nothing. */
void mark_done(struct dist *d, struct mark *m);
void mark_set_stale(struct dist *d, struct mark *m, const struct place *at, uint64_t stale);
/* Good replicas may differ; all of them have to be flushed too, or a flush that fails could make them differ later. */
void mark_unsettle(struct dist *d, struct mark *m, const struct place *at);
void mark_settle(struct dist *d, struct mark *m);
uint64_t next_seq(struct dist *d);
void wake_repair(struct dist *d);

/* A copy of an object's mark without the lock; all zero when there is none. */
struct view {
	uint64_t stale, recorded, behind, lingering;
	bool is_unsettled;
};

struct view mark_view(struct dist *d, const char *name);

/*
 * After a change of `name` that `tried` holders were asked for and `ok` have done: marks the others stale, durably,
 * and says whether enough have it. The caller holds the object's lock over the change's extent; for a change of the
 * whole object (put, del) over all of it. `rc`: the error to return when they are too few.
 */
CO_FN int settle(struct chan *c, const char *name, const struct place *at, uint64_t tried,
		 uint64_t ok, bool is_whole, int rc);
/* Records what is stale and not recorded yet. 0, or the error when no good holder could take it. */
CO_FN int record(struct chan *c, const char *name, const struct place *at);
/* Deletes the records of holders that are lingering. */
CO_FN void forget(struct chan *c, const char *name, const struct place *at);

/* ---- doubt (distributed_doubt.c, distributed_doubt_put.c) ---- */

void doubt_init(struct dist *d);
void doubt_free(struct dist *d);
/*
 * Around a change of the `n` objects at `at`: 0 when the nodes have a record that their replicas may differ; then each
 * is left again. Waits while too many regions are in use. Not with a lock held, nor within another one.
 */
CO_FN int doubt_begin(struct chan *c, const struct place *at, unsigned n);
void doubt_leave(struct dist *d, const struct place *at);
/* Until `need` nodes have that version of the record. */
CO_FN int doubt_wait(struct chan *c, uint64_t version, unsigned need);
/* The number of the next flush that begins; whether that one, or a later one, went well. */
uint64_t doubt_flush_next(struct dist *d);
bool doubt_is_flushed(struct dist *d, uint64_t number);
/* A flush begins: its number; and was good: changes that had been left before it began need no more. */
uint64_t doubt_flush_begins(struct dist *d);
void doubt_flushed(struct dist *d, uint64_t number);
/* Takes what is clean and was not changed for `age` (ns) off the record, which is put in the background. */
CO_FN void doubt_clean(struct chan *c, uint64_t age);
/* Brings the newest record to nodes that are up and have an older one; does not wait for it. */
CO_FN void doubt_push(struct chan *c);
/* Waits for what doubt_push and doubt_wait have begun on this channel. */
CO_FN void doubt_drain(struct chan *c);
/* At open: adds what the record on a node names. -EILSEQ: it is damaged; -EFBIG: all of them name too much. */
CO_FN int doubt_read(struct chan *c, unsigned node);
int doubt_add(struct dist *d, uint64_t region);
/* At open, the marks being there: all objects that it names are unsettled. */
CO_FN int doubt_mark_all(struct chan *c);
/*
 * A node comes late, and no flush runs: what it has of a record is out of date, and what is not settled has to be
 * flushed there too.
 */
void doubt_joins(struct dist *d, unsigned node);
/* Before the volume is removed: the record is, on all nodes. */
CO_FN int doubt_end(struct chan *c);
/* Nodes are not joined any more, and their records don't count. */
void doubt_leaves(struct dist *d, uint64_t nodes);
/* Calls `add` for each region; not 0 ends it. *out: nodes left out. Pure. -EILSEQ: this is no record. */
int doubt_parse(const char *text, size_t len, int (*add)(void *arg, uint64_t region), void *arg,
		uint64_t *out);

/* ---- nodes left out (distributed_out.c) ---- */

/* At open, from the records of the nodes that are `there`. -EILSEQ: they contradict each other. */
int out_find(struct dist *d, uint64_t there);
/* At open: all but those left out have joined, so it may be without them. */
bool out_is_enough(const struct dist *d);
/* Leaves out nodes that are away where it is needed and may be. For the repair fiber. */
CO_FN void out_review(struct chan *c);
/* Before one of them joins, with call_one locked: none is left out any more, durably. */
CO_FN int out_end(struct chan *c);

/* ---- reading (distributed.c) ---- */

/* Good replicas may differ: makes them equal first. What came of it is in the mark. *at: where they are. */
CO_FN void settle_first(struct chan *c, const char *name, struct place *at);

/* ---- changes (distributed_write.c) ---- */

CO_FN int dist_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl);
CO_FN int dist_zero(struct chan *c, struct ext e, unsigned fl);
CO_FN int dist_trim(struct chan *c, struct ext e, unsigned fl);
CO_FN int dist_put(struct chan *c, const struct put *p, struct obj_stat *st);
CO_FN int dist_del(struct chan *c, const struct obj *objs, unsigned n);
/* Waits until the requests answered before the call are through everywhere. */
CO_FN void wait_for_jobs(struct dist *d);

/* ---- list (distributed_list.c) ---- */

CO_FN int dist_list(struct chan *c, const char *prefix, list_fn *fn, void *arg);

/* ---- flush (distributed_flush.c) ---- */

/* Notes that holders were written, for the flush. */
void note_dirty(struct chan *c, const char *name, const struct place *at, uint64_t holders);
/* With d->lock held: the same for a mark; and answers have to be kept. */
void mark_set_dirty(struct dist *d, struct mark *m, const struct place *at, uint64_t holders);
void mark_set_owed(struct dist *d, struct mark *m, bool is_owed);
CO_FN int dist_flush(struct chan *c);
/* Flushes when so much was written since that noting it takes too much memory. Not with a lock held. */
CO_FN void flush_if_much(struct chan *c);

/* ---- repair (distributed_equal.c, distributed_repair.c, distributed_join.c) ---- */

/* Holders whose node is up, and has not refused a copy a moment ago. */
uint64_t holders_ready(const struct dist *d, const struct place *at);

/*
 * At open: reads the records of all nodes that are there, and finds nodes that lost what they had. Sets is_joined;
 * fails only for want of memory.
 */
CO_FN int join_nodes(struct chan *c);
/* Opens a node that was not there at open, later. */
CO_FN int join_late(struct chan *c, unsigned node);
/*
 * With the whole object locked: decides which of differing replicas counts, records what is not, and copies to
 * stale replicas whose node is up, or (`is_needed`: a request waits for it) may be. 0 when nothing is stale any
 * more, else why.
 */
CO_FN int repair_locked(struct chan *c, const char *name, const struct place *at, bool is_needed);
/* A read found the object missing or broken on holder `r`, and good on another one. */
CO_FN void distrust(struct chan *c, const char *name, const struct place *at, unsigned r,
		    bool is_missing);
CO_FN void repair_all(struct chan *c);
/*
 * Before the object `size` is deleted: 0 only when all nodes are there and nothing is stale, or else what is left on
 * one could come back as data of the next volume of that name. After it (`is_gone`): deletes all records.
 */
CO_FN int end_volume(struct chan *c, bool is_gone);
/* Stale replicas of all objects. */
uint64_t stale_in_all(const struct dist *d);
/* The fiber that brings nodes and replicas back; takes `arg`, a channel of the layer on this reactor. */
CO_FN void repair_fiber(void *arg);

#endif
