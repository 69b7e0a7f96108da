/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The one interface of every layer, above and below the address mapping.
 *
 * A request names an extent of an object. Above the address mapping (raw, sharded, ...) the object
 * is `obj_none` and `off` is the offset on the disk; below it the object has a name ("disk0",
 * "block-12").
 *
 * Instance (struct layer): shared by all reactors, mostly read-only after open.
 * Channel (struct chan): one per instance and reactor, private to it, no locks needed.
 *
 * Down only through ch_*(): they count, check and bring the request into the shape that the layer
 * takes (pad to `min_io`, split at `max_io`, zero -> write), then call its operation, or fall
 * through to kid 0 where the layer has none.
 */
#ifndef NBDRS_LAYER_H
#define NBDRS_LAYER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbdrs/co.h"
#include "nbdrs/err.h"
#include "nbdrs/iov.h"
#include "nbdrs/opt.h"
#include "nbdrs/rangelock.h"
#include "nbdrs/spec.h"

/* An object's name with its hash; short and immutable. */
enum { OBJ_NAME_MAX = 255 };

struct obj {
	uint64_t hash;
	uint16_t len; /* 0 = no name */
	char name[OBJ_NAME_MAX + 1];
};

extern const struct obj obj_none;

/* -ENAMETOOLONG, or -EINVAL for "", ".", "..", a "/" or a control character. */
int obj_set(struct obj *o, const char *name);

struct ext {
	const struct obj *obj; /* borrowed for the call; never NULL */
	uint64_t off, len;
};

/* Flags of requests. */
enum io_flags {
	IO_FUA = 1 << 0,   /* answered only when on stable storage */
	IO_PUNCH = 1 << 1, /* zero: may deallocate */
	IO_FAST =
		1
		<< 2, /* zero: -ENOTSUP at once, data untouched, unless much faster than writing */
};

/* What a chain can do; computed in open from the kids upwards, and honest. */
enum caps {
	CAN_WRITE = 1 << 0,
	CAN_PARTIAL = 1 << 1,   /* parts of an object can be written in place */
	CAN_TRIM = 1 << 2,      /* trim does something */
	CAN_ZERO = 1 << 3,      /* zero is cheaper than writing zeroes */
	CAN_FAST_ZERO = 1 << 4, /* zero with IO_FAST can succeed */
	CAN_FUA = 1 << 5,       /* IO_FUA is cheaper than flush */
	CAN_FLUSH = 1 << 6,     /* there is something volatile that flush makes stable */
	CAN_MULTI = 1 << 7,     /* flush on one connection covers all */
	CAN_MAP = 1 << 8,       /* map tells holes from data */
	CAN_LEND = 1 << 9,      /* lend may succeed */
	IS_ROTATIONAL = 1 << 10,
	HAS_HOLES =
		1 << 11, /* large parts may be unallocated: worth looking for zeroes in replies */
	CAN_PUT_IF = 1 << 12, /* keyed: conditional puts are atomic */
	IS_REMOTE = 1 << 13,  /* a request takes milliseconds: worth reading ahead */
	IS_VOLATILE = 1 << 14, /* what is answered may be in our memory only until a flush, and gone with a kill -9 */
};

/*
 * Keyed stores (a folder of files, S3, memory by name) hold objects. Below a layer that maps the
 * disk to objects (`keyed_kids`), every extent names its object:
 *	read	a missing object is -ENOENT; what lies behind an object's end reads as zeroes
 *	write	only with CAN_PARTIAL: in place, makes and lengthens the object
 *	zero, trim  of a part, as the capabilities say; a missing object is fine
 *	flush	covers writes and puts answered before the call
 * and the four below. Layers between pass all of it through.
 */
enum { ETAG_MAX = 127 };

struct obj_stat {
	uint64_t size;           /* bytes */
	char etag[ETAG_MAX + 1]; /* as the store gives it, without quotes; "" = it has none */
};

enum put_cond { PUT_ALWAYS, PUT_IF_ABSENT, PUT_IF_MATCH };

struct put {
	const struct obj *obj;
	const struct iov *iov; /* the whole object; len may be 0 */
	enum put_cond cond;
	const char *etag; /* of PUT_IF_MATCH */
	unsigned fl;      /* IO_FUA */
	bool is_new;      /* PUT_ALWAYS: there should be no such object; a hint that saves a store a look */
};

/* One object of list(); never suspends. Not 0 ends the listing, which returns it. */
typedef int list_fn(void *arg, const char *name, uint64_t size);

/* Extents of map, in order, without gaps, from ext.off on; at least one, the last may end early. */
enum extent_flags {
	EXTENT_HOLE = 1 << 0,
	EXTENT_ZERO = 1 << 1
}; /* = NBD_STATE_HOLE, NBD_STATE_ZERO */

struct extent {
	uint64_t len;
	uint32_t flags;
};

struct extmap {
	struct extent *v; /* room for `max`; filled by map */
	unsigned n, max;
};

/* Appends, merging with the last one when the flags are equal. False when full (nothing was added). */
bool extmap_add(struct extmap *m, uint64_t len, uint32_t flags);

/*
 * Memory lent by a layer instead of a copy: `base` holds the extent's bytes until loan_return().
 * The process must not touch it (a truncated file gives SIGBUS): only hand it to the kernel, which
 * answers EFAULT then. Bytes may change while lent, as with any overlapping write.
 */
struct loan {
	const void *base;
	void (*give_back)(struct loan *l);
	void *owner;
};

struct layer;
struct chan;

/*
 * A resize has three parts, the chain's requests being served in all but the middle one. Each may fail, and the size
 * is what it was before then, except after the last: that one's failure leaves something to be cleared away.
 */
enum resize_phase {
	RESIZE_BEFORE, /* checks; does what takes long and may be done at any time */
	RESIZE_NOW,    /* nothing is in the chain, on any reactor; short */
	RESIZE_AFTER,  /* clears away */
};

/* Key and value lines for `nbdrsd info`, and what the control socket shows. */
struct info {
	void (*add)(struct info *i, const char *key, const char *value);
};

/* A line with a number. Keys are snake_case where scripts read them (status). */
void info_number(struct info *i, const char *key, uint64_t value);

struct layer_ops {
	const char *name, *help; /* "file", one line */
	const struct opt *opts;
	bool takes_target; /* name:TARGET, the rest verbatim */
	bool is_store;     /* ends a chain */
	bool keyed_kids;   /* its kids are keyed; a filter's are when it is keyed itself */
	bool may_miss_kids; /* a kid out of reach stays closed (open_error), for layer_kid_open later */
	const struct layer_ops
		*keyed; /* of a store: what stands in its place where objects are wanted */
	uint16_t self_size, chan_size;
	uint8_t min_kids, max_kids;

	/*
	 * Kids are open. Sets layer->size, caps, min_io, pref_io, max_io where they differ from
	 * what layer_build took over from kid 0. `err` names the thing and the mend.
	 */
	CO_FN int (*open)(struct layer *l, struct err *err);
	/*
	 * Last of all, when the instance goes: frees what `self` holds beyond close, options
	 * excepted. Also called when it was never open. Does not suspend.
	 */
	void (*free)(struct layer *l);
	/* Everything is drained already. Flushes nothing: the caller did. */
	CO_FN void (*close)(struct layer *l);
	CO_FN int (*chan_open)(struct chan *c);
	CO_FN void (*chan_close)(struct chan *c);

	/*
	 * All or nothing per request as far as the medium allows; 0 or -errno. NULL = kid 0 does
	 * it. iov has at most IOV_SLICE_MAX segments.
	 */
	CO_FN int (*read)(struct chan *c, struct ext e, const struct iov *iov, unsigned fl);
	CO_FN int (*write)(struct chan *c, struct ext e, const struct iov *iov, unsigned fl);
	CO_FN int (*zero)(struct chan *c, struct ext e, unsigned fl);
	CO_FN int (*trim)(struct chan *c, struct ext e, unsigned fl);
	/* Covers every write answered before the call, on all channels. */
	CO_FN int (*flush)(struct chan *c);
	CO_FN int (*map)(struct chan *c, struct ext e, struct extmap *m);
	/* Brings the extent near (read-ahead); a hint. */
	CO_FN int (*cache)(struct chan *c, struct ext e);
	/*
	 * Never suspends: 0, or -EAGAIN / -ENOTSUP (read it the ordinary way). Not passed on by a
	 * layer with its own read.
	 */
	int (*lend)(struct chan *c, struct ext e, struct loan *loan);

	/*
	 * Keyed stores only. NULL = kid 0 does it.
	 *	stat	-ENOENT when there is none.
	 *	put	the whole object at once, or not at all; *st (may be NULL) is the new one's.
	 *		-EEXIST: PUT_IF_ABSENT and it is there; -ESTALE: PUT_IF_MATCH and it is another
	 *		one or gone; -ENOTSUP: no CAN_PUT_IF.
	 *	del	all of them, in any order; one that is missing is fine. As many as you like.
	 *	list	those whose names begin with `prefix`, in any order. A name may come twice.
	 */
	CO_FN int (*stat)(struct chan *c, const struct obj *obj, struct obj_stat *st);
	CO_FN int (*put)(struct chan *c, const struct put *p, struct obj_stat *st);
	CO_FN int (*del)(struct chan *c, const struct obj *objs, unsigned n);
	CO_FN int (*list)(struct chan *c, const char *prefix, list_fn *fn, void *arg);

	/*
	 * On an instance that is not open (options are parsed, kids built but not open): make, look
	 * at, remove the volume. NULL = kid 0 does it. Of a keyed store: the place where objects
	 * will be (a folder; fine when it is there), and removing it when no object is left in it;
	 * size and force mean nothing there.
	 */
	CO_FN int (*create)(struct layer *l, const struct obj *obj, uint64_t size, bool force,
			    struct err *err);
	CO_FN int (*destroy)(struct layer *l, const struct obj *obj, struct err *err);
	/*
	 * Of an open instance: gives the disk another size, above 0 and other than it has; see ch_resize. Sets
	 * layer->size. A layer that keeps anything by offset forgets what lies between the two sizes and behind them.
	 * NULL = kid 0 does it.
	 */
	CO_FN int (*resize)(struct chan *c, uint64_t size, enum resize_phase phase, struct err *err);
	CO_FN void (*info)(struct layer *l, struct info *i);
	/*
	 * What an operator asks of a running layer (requests by status, dirty bytes, degraded): see
	 * nbdrsctl status. Does not suspend.
	 */
	void (*status)(struct layer *l, struct info *i);
	/* Path of a local file or block device that holds the data ("" = none), for loop detection at attach. */
	const char *(*backing)(struct layer *l);
};

/* Latency needs clock reads, so only the export measures it; these are per channel and unlocked. */
enum ch_op {
	CH_READ,
	CH_WRITE,
	CH_ZERO,
	CH_TRIM,
	CH_FLUSH,
	CH_MAP,
	CH_CACHE,
	CH_STAT,
	CH_PUT,
	CH_DEL,
	CH_LIST,
	CH_OPS
};

/* "read", "write", ... */
extern const char *const ch_op_names[CH_OPS];

struct ch_stats {
	_Atomic uint64_t ops[CH_OPS];
	_Atomic uint64_t bytes[CH_OPS];
	_Atomic uint64_t errors[CH_OPS];
	_Atomic uint64_t lent; /* reads served without a copy; also in ops[CH_READ] */
};

struct layer {
	const struct layer_ops *ops;
	const struct spec *spec; /* borrowed from the chain */
	const char *export_name; /* borrowed; NULL when there is none (init, destroy) */
	struct layer **kids;
	unsigned kids_n;
	bool is_keyed; /* extents name objects; set by chain_build */
	bool want_ro;  /* set before open: never write, not even locks for writing */
	/* Set before close: the next process opens the same chain at once, so what is flushed may lie where it is. */
	bool comes_again;

	/* Bytes, of the disk; a keyed store says 0. Changes while nothing is in the chain (RESIZE_NOW). */
	_Atomic uint64_t size;
	unsigned caps;    /* enum caps */
	uint32_t min_io;  /* power of two; requests are padded to it (read-modify-write) */
	uint32_t pref_io; /* power of two, >= 512 */
	uint32_t max_io;  /* of read and write; larger ones are split */
	/*
	 * Why this kid of a layer that may_miss_kids is closed; 0 = open. Its parent calls nothing
	 * below it meanwhile, and its channels are NULL.
	 */
	_Atomic int open_error;
	struct rangelock rmw; /* used when min_io > 1 */
	void *self;           /* ops->self_size bytes, zeroed */
};

struct chan {
	struct layer *layer;
	/* layer->kids_n of them. NULL: the kid was closed when this was opened; chan_kid opens it later. */
	_Atomic(struct chan *) *kids;
	struct ch_stats stats;
	/*
	 * Set by a store that was told to come back later (HTTP's Retry-After), ns of the monotonic
	 * clock: who retries waits until then. A hint for everybody on this channel.
	 */
	uint64_t not_before;
	void *self; /* ops->chan_size bytes, zeroed */
};

/* An open chain and its channels. */
struct chain;

/*
 * Builds the tree for `spec` (borrowed until chain_free): looks the layers up, parses their
 * options. Nothing is opened. `export_name` may be NULL. Errors name the layer and its column.
 */
int chain_build(const struct spec *spec, const char *export_name, bool read_only,
		struct chain **out, struct err *err);
/* The same with a keyed top: for tests and tools that look at objects. */
int chain_build_keyed(const struct spec *spec, bool read_only, struct chain **out, struct err *err);
/* Opens kids first. On error everything that was opened is closed again. */
CO_FN int chain_open(struct chain *c, struct err *err);
/* Flushes, closes the channels of all reactors, then the layers. Nothing may be in flight. The flush's result. */
CO_FN int chain_close(struct chain *c);
/* NULL and half-built are fine; must be closed. */
void chain_free(struct chain *c);

struct layer *chain_top(struct chain *c);
/* This reactor's channel of the top layer, opened at first use. NULL with *rc set when that fails. */
CO_FN struct chan *chain_chan(struct chain *c, int *rc);
/* The same if it is open already, else NULL. Does not suspend. */
struct chan *chain_chan_peek(struct chain *c);
/* Calls `fn` for every layer, top first, with its depth and the sum of its channels' counters. */
void chain_each(struct chain *c,
		void (*fn)(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum),
		void *arg);

/* create / destroy a volume at the chain's target, see layer_ops; the chain is built, not open. */
CO_FN int chain_create(struct chain *c, uint64_t size, bool force, struct err *err);
CO_FN int chain_destroy(struct chain *c, struct err *err);

/* Requests. Extents inside the layer's size (the export checks). */
CO_FN int ch_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl);
CO_FN int ch_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl);
CO_FN int ch_zero(struct chan *c, struct ext e, unsigned fl);
CO_FN int ch_trim(struct chan *c, struct ext e, unsigned fl);
CO_FN int ch_flush(struct chan *c);
/* Without CAN_MAP: one extent, flags 0. */
CO_FN int ch_map(struct chan *c, struct ext e, struct extmap *m);
CO_FN int ch_cache(struct chan *c, struct ext e);
int ch_lend(struct chan *c, struct ext e, struct loan *loan);
/*
 * One phase of a resize, by the layer or by kid 0. -EOPNOTSUPP: this chain cannot; -EROFS; -EINVAL: not that size;
 * else of the store. Errors name the layer.
 */
CO_FN int ch_resize(struct chan *c, uint64_t size, enum resize_phase phase, struct err *err);
/* Of keyed stores; see layer_ops. */
CO_FN int ch_stat(struct chan *c, const struct obj *obj, struct obj_stat *st);
CO_FN int ch_put(struct chan *c, const struct put *p, struct obj_stat *st);
CO_FN int ch_del(struct chan *c, const struct obj *objs, unsigned n);
CO_FN int ch_list(struct chan *c, const char *prefix, list_fn *fn, void *arg);

static inline void loan_return(struct loan *l)
{
	if (l->give_back)
		l->give_back(l);
	l->give_back = NULL;
}

/* The same on an instance that is not open, for layers that pass on: kid 0's, with fall-through. */
CO_FN int layer_create(struct layer *l, const struct obj *obj, uint64_t size, bool force,
		       struct err *err);
CO_FN int layer_destroy(struct layer *l, const struct obj *obj, struct err *err);

/*
 * For a layer's own open, create and destroy, which have requests of their own before the chain has
 * channels: a channel of an open instance, for this reactor; and opening the kids where nobody did
 * (create, destroy).
 */
CO_FN int layer_chan_open(struct layer *l, struct chan **out);
CO_FN void layer_chan_close(struct chan *c);
CO_FN int layer_kids_open(struct layer *l, struct err *err);
CO_FN void layer_kids_close(struct layer *l);
/*
 * Of a layer that may_miss_kids, later: tries again to open kid `i`, which has an open_error; and
 * this reactor's channel of kid `i`, opened if it was not (one fiber of the reactor at a time).
 * -ENXIO when the kid is closed.
 */
CO_FN int layer_kid_open(struct layer *l, unsigned i, struct err *err);
CO_FN int chan_kid(struct chan *c, unsigned i, struct chan **out);

/*
 * The one place that knows whether trying again may help: time-outs, resets, a server that is down,
 * overloaded or out of order (-EAGAIN: 429 and 5xx). What is refused (EACCES, ENOENT, EINVAL,
 * EEXIST, ESTALE, ENOSPC ...) is not.
 */
bool is_transient(int rc);

/*
 * The daemon is to end: from this time on (ns of the monotonic clock) no layer `retry` repeats
 * anything, and what waits for its repeat gives up. 0 = as usual. Any thread.
 */
void retry_stop_by(uint64_t ns);

/*
 * The memory that all layers `cache` together may use for cached data, bytes; 0 = each as much as its option `mem`
 * says. Any thread, any time.
 */
void cache_mem_limit(uint64_t bytes);

/* The registry: all layers, ended by NULL. */
extern const struct layer_ops *const layers[];
const struct layer_ops *layer_find(const char *name);
/* Makes layer_find know one more, for tests; before a chain is built. */
void layer_add(const struct layer_ops *ops);

#endif
