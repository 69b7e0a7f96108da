/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Inside of layer readahead: the table of pieces (readahead_pieces.c) and the detector of sequential
 * streams (readahead_streams.c). Both belong to the instance and are guarded by its one lock; nothing here
 * suspends.
 */
#ifndef NBDRS_LAYER_READAHEAD_INT_H
#define NBDRS_LAYER_READAHEAD_INT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "nbdrs/co.h"
#include "nbdrs/list.h"

struct chan;

/* --- Pieces ----------------------------------------------------------------------------------- */

enum {
	PIECE_MIN = 4096,
	PIECE_MAX = 16 << 20,
	PIECE_ORDERS = 13, /* powers of two from PIECE_MIN to PIECE_MAX */
	PIECES_MAX = 1024,
};

/*
 * What one fetch brings (or will bring): [off, off + len) of the disk, of which [from, to) may be used. A write
 * cuts it smaller, also while it is still on its way.
 */
struct piece {
	uint64_t off, len;
	uint64_t from, to;
	uint64_t used;    /* bytes of [from, to) that readers took, some perhaps twice */
	uint64_t taken;   /* the same of [off, off + len) */
	uint64_t fetched; /* 0 until it is there, then len */
	uint64_t born_ns; /* when the fetch was planned */
	uint8_t *data;    /* data[0] is the byte at off */
	unsigned order;   /* of data's size */
	unsigned refs; /* the table's, the fetch's, and one for each reader that copies or waits */
	bool is_fetching;
	bool is_listed;     /* in the table */
	struct list age;    /* in by_age while listed */
	struct co_wq done;  /* woken when it is no longer fetching, or no longer listed */
	struct chan *chan;  /* fetches it */
	struct piece *next; /* of those planned together, until they are started */
};

struct pieces {
	_Atomic unsigned n;       /* listed ones; writers look without the lock (readahead.c) */
	struct piece **v;         /* sorted, disjoint */
	struct list by_age;       /* oldest first */
	uint64_t mem, total;      /* bytes: limit; of all buffers, free ones included */
	void *free[PIECE_ORDERS]; /* a free buffer's first word links to the next */
	uint64_t planned;         /* so many pieces since open */
	uint64_t planned_at_tidy;
	uint64_t wasted; /* bytes fetched that nobody took */
};

/* -ENOMEM. `mem`: limit of all buffers, bytes. */
int pieces_init(struct pieces *t, uint64_t mem);
/* All pieces must be idle. */
void pieces_free(struct pieces *t);

/* Index of the first piece that ends behind `off`; t->n if none. */
unsigned pieces_at(const struct pieces *t, uint64_t off);
/* Whether any piece overlaps [from, to). */
bool pieces_touch(const struct pieces *t, uint64_t from, uint64_t to);

/*
 * A new piece for [from, to), which no other overlaps, at most PIECE_MAX long; listed and fetching, with the
 * table's reference and the fetch's. When memory is at its limit the oldest that nobody uses make room; NULL
 * when that is not enough.
 */
struct piece *piece_new(struct pieces *t, uint64_t from, uint64_t to, uint64_t now);
/* Takes it out of the table; who waits for it finds it gone. */
void piece_drop(struct pieces *t, struct piece *p);
void piece_put(struct pieces *t, struct piece *p);
/* A reader took `len` bytes; dropped when that was the last of them. */
void piece_consume(struct pieces *t, struct piece *p, uint64_t len);

/* Nothing of [from, to) is to be used any more. Of a piece that it hits in the middle the larger side stays. */
void pieces_cut(struct pieces *t, uint64_t from, uint64_t to);

/*
 * Drops pieces planned before `before_ns` that nobody uses; gives free buffers back if nothing was planned
 * since the last time. True when there is something left to come back for.
 */
bool pieces_tidy(struct pieces *t, uint64_t before_ns);

/* --- Streams ---------------------------------------------------------------------------------- */

enum { CANDIDATE_MAX = 8 }; /* requests of a candidate; what takes longer may be chance */
enum { CANDIDATES = 32 };   /* so many random reads may come between two of a young stream */

/* Requests near each other that may become a stream. */
struct candidate {
	uint64_t bytes; /* sum of their lengths */
	uint64_t offs[CANDIDATE_MAX];
	unsigned n, ups; /* requests; those that moved the upper end */
	bool is_spared;  /* joined since its turn to be replaced came last */
};

struct stream {
	uint64_t pos;          /* end of the highest request */
	uint64_t prev;         /* pos before the last request */
	uint64_t window;       /* bytes to be ahead of pos */
	uint64_t grow_at;      /* when pos comes here and has to wait, the window is too small */
	uint64_t start, bytes; /* since pos was at start so many bytes were asked for */
	uint64_t used_ns;      /* time of the last request; 0 = free */
};

struct streams {
	/* Where the candidates' requests lie, [lo, hi): apart, since every read is held against all of them. */
	struct {
		uint64_t lo, hi; /* both AREA_NONE: free */
	} areas[CANDIDATES];
	struct candidate candidates[CANDIDATES];
	unsigned hand; /* the one whose turn it is to be replaced */
	unsigned n, live;
	struct stream *v; /* n of them, live ones in use */
	uint64_t found;   /* since open */
};

int streams_init(struct streams *t, unsigned n);
void streams_free(struct streams *t);

/*
 * Takes note of a read of [off, off + len), len > 0. Returns the stream that it belongs to, with prev and pos
 * updated, or NULL. A new one has a window of twice what was seen of it, and prev = pos: the request itself
 * needs no help.
 */
struct stream *streams_note(struct streams *t, uint64_t off, uint64_t len, uint64_t now);

/* Streams with a request since `since_ns`. */
unsigned streams_active(const struct streams *t, uint64_t since_ns);

/* --- Pace ------------------------------------------------------------------------------------- */

/*
 * Whether more requests at a time still bring more: as long as the time of a fetch is that of the way there and back.
 * When it is many times that, they wait for each other on the line, and so does everything else.
 */
struct pace {
	uint64_t best_ns; /* of late; 0 = none yet */
	uint64_t mean_ns; /* of the last few */
};

void pace_note(struct pace *p, uint64_t took_ns);
bool pace_is_crowded(const struct pace *p);

#endif
