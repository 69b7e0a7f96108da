/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the files of the buffers share (see shardbuf.h). The whole picture is at the top of shardbuf.c.
 */
#ifndef NBDRS_LAYER_SHARDBUF_INT_H
#define NBDRS_LAYER_SHARDBUF_INT_H

#include <pthread.h>

#include "layer/sharded/shardbuf.h"
#include "nbdrs/list.h"
#include "nbdrs/log.h"

enum { STRIPES = 64, BUCKETS = 32 };

/* Bytes copied under a lock at a time: some 10 us. */
enum { PIECE = 64 * 1024 };

/* Memory is counted in these. */
enum { MEM_PAGE = 4096 };

/* Where objects end is remembered in so many steps of a shard. */
enum { END_STEPS = 256 };

/* Generations there may be: the kernel allows a process 65530 mappings. */
enum { SHARD_GENS_MAX = 16384 };

/* One generation of a shard's unsaved data. Written only while it is the dirty one. */
struct gen {
	uint64_t seq;     /* of all generations of the volume, in order of birth */
	uint64_t born;    /* ns */
	uint64_t charge;  /* bytes of b->used */
	uint8_t *data;    /* a mapping of shard_size bytes; NULL while it holds only zeroes */
	bool rest_zero;   /* what is not valid is zero, whatever the store has */
	uint32_t valid_n; /* grains */
	uint64_t
		bits[]; /* valid grains, then touched pages: those not touched are zero in `data` */
};

enum queue { QUEUE_NONE, QUEUE_FULL, QUEUE_YOUNG, QUEUE_FAILED, QUEUES };

/* A shard with something unsaved. All but `node`, `queue` and `due` (queue lock) under its stripe's lock. */
struct shard {
	struct list chain; /* in its bucket */
	uint64_t n;
	unsigned refs;       /* of those who wait for it or work on it */
	uint64_t end;        /* the object ends here, or before, bytes; 0 = there is none */
	bool is_busy;        /* somebody puts or deletes the object: nobody else may */
	unsigned droppers;   /* who wait to delete it: no put begins before they had their turn */
	bool is_dropping;    /* it is being deleted as a whole: reads as zeroes below `dirty` */
	struct gen *dirty;   /* takes writes */
	struct gen *putting; /* on its way; older than dirty */
	uint64_t newest;     /* seq of the newest generation there was */
	uint64_t done;       /* every generation up to this seq is in the store */
	uint64_t attempts;   /* puts that were begun */
	uint64_t failed;     /* the number of the last one that failed */
	int error;           /* its error; 0 after one that went well */
	struct co_wq wq;     /* is_busy ends */

	struct list node; /* in its queue */
	enum queue queue;
	uint64_t due; /* ns */
};

struct stripe {
	pthread_mutex_t lock;
	struct list buckets[BUCKETS];
};

struct shardbuf {
	struct shardbuf_conf conf;
	uint64_t grains, pages; /* of a shard */
	/*
	 * Of each shard that has no entry: where its object ends, or beyond, in END_STEPS of a shard; 0 = nobody
	 * knows. Under the stripe's lock.
	 */
	uint8_t *ends;
	uint64_t ends_n; /* shards that there is room for */
	_Atomic uint64_t seq; /* of the last generation */
	_Atomic uint64_t shards_n;
	struct stripe stripes[STRIPES];

	pthread_mutex_t lock; /* the queue lock; guards all below. Taken last */
	struct list queues[QUEUES];
	uint64_t used;   /* bytes of memory in generations, and reserved by writers */
	uint64_t moving; /* of these: in generations that are being put */
	uint64_t gens_n;
	unsigned room_waiters; /* in line */
	struct co_mutex line;  /* of writers who wait for room; taken without the queue lock */
	struct co_wq room;     /* where its first waits */
	unsigned puts_running; /* slots taken */
	struct co_wq slots;
	uint64_t flying;             /* bytes in puts on their way */
	struct co_mutex flying_line; /* of puts that wait for their turn; as `line` */
	struct co_wq landed;         /* where its first waits */
	unsigned workers;
	unsigned savers; /* fibers that flushes have beside their own; no more than slots */
	struct shard_user *keeper_of; /* whose channel the keeper uses; NULL = there is none */
	uint64_t keeper_until;        /* it sleeps until then; 0 = it does not sleep */
	struct co_wq keeper;
	uint64_t puts_done, failures;
	unsigned failed_in_row;
	int error; /* of the last attempt; 0 = it went well */
	struct log_gate gate;
};

static inline struct stripe *shard_stripe(struct shardbuf *b, uint64_t n)
{
	return &b->stripes[n % STRIPES];
}

static inline uint64_t *gen_touched(const struct shardbuf *b, struct gen *g)
{
	return g->bits + bits_words(b->grains);
}

/* Anonymous memory of a shard's size, zeroed and not populated; NULL. */
uint8_t *shard_map(const struct shardbuf *b);
void shard_unmap(const struct shardbuf *b, uint8_t *data);

/* --- The table; with the stripe's lock held --- */

struct shard *shard_find(struct stripe *st, uint64_t n);
/* Where the object of shard n, which has no entry, ends at most, bytes; the whole shard when nobody knows. */
uint64_t shard_end(const struct shardbuf *b, uint64_t n);
/* Nobody may put or delete its object now. */
static inline bool shard_is_taken(const struct shard *s)
{
	return s->is_busy || s->droppers;
}
/* Finds or adds; NULL = no memory. Ends with shard_release(). */
struct shard *shard_get(struct shardbuf *b, struct stripe *st, uint64_t n);
/* Frees it when nothing is left to do for it. */
void shard_release(struct shardbuf *b, struct stripe *st, struct shard *s);
/* The dirty generation, made if there is none; NULL = no memory. */
struct gen *shard_dirty(struct shardbuf *b, struct shard *s);
void gen_free(struct shardbuf *b, struct gen *g);
/* Zeroes [off, off + len) of it, which is valid then. */
void gen_zero(struct shardbuf *b, struct gen *g, uint64_t off, uint64_t len);
/* After a failed put of `g`: back to being dirty, below what was written meanwhile. */
void shard_take_back(struct shardbuf *b, struct shard *s, struct gen *g);

/* --- Work in the background --- */

/* Puts it into the queue where it belongs: it has a dirty generation and is not busy. Stripe's lock held. */
void shard_enqueue(struct shardbuf *b, struct shard *s);
void shard_dequeue(struct shardbuf *b, struct shard *s);
/* Starts a fiber for work that is due, if there is any and not enough fibers, and the keeper. */
void shard_kick(struct shard_user *u);

/* --- The way to the store --- */

/* One of conf.puts slots; waits for one. */
CO_FN void shard_slot_take(struct shardbuf *b);
void shard_slot_give(struct shardbuf *b);
/*
 * Brings shard n as `g`, which nobody changes, has it into the store, whose object ends at `old_end` (0 = there is
 * none). *end becomes where it may end from then on, also on error.
 */
CO_FN int shard_store(struct shard_user *u, uint64_t n, struct gen *g, uint64_t old_end,
		      uint64_t *end);
/* Puts the dirty generation of `s`, which is not busy. The stripe's lock is held before and after, not meanwhile. */
CO_FN void shard_put(struct shard_user *u, struct stripe *st, struct shard *s);
/* Notes how a put or delete of shard n went, for the log and for those who wait for memory. */
void shard_account(struct shardbuf *b, uint64_t n, int rc);

#endif
