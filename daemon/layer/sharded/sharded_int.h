/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the files of layer `sharded` share.
 */
#ifndef NBDRS_LAYER_SHARDED_INT_H
#define NBDRS_LAYER_SHARDED_INT_H

#include "layer/sharded/shardbits.h"
#include "layer/sharded/shardbuf.h"
#include "nbdrs/layer.h"

enum { SHARD_SIZE_DEFAULT = 4 << 20, SHARD_SIZE_MIN = 4096, SHARD_SIZE_MAX = 64 << 20 };

/* Bits of the map of known shards: 32 MiB of memory; and, buffered, a byte for the end of each that was put. */
#define SHARDS_MAX (UINT64_C(1) << 28)

struct sharded {
	/* Options. */
	uint64_t shard_opt; /* bytes, 0 = as recorded */
	uint64_t dirty_max, age_ns, puts;

	/* While open. */
	unsigned shift; /* log2 of the shard size */
	struct shardmap known;
	struct rangelock
		deletes; /* in place: a delete of shards excludes writes to them; key 0, in shards */
	struct shardbuf *buf; /* NULL: requests go straight through */
};

/* What is recorded in the store. */
struct volume {
	uint64_t size;       /* bytes of the disk */
	uint64_t shard_size; /* bytes */
	uint64_t shards;
};

/* How many shards of `shard_size` bytes a disk of `size` bytes has. */
static inline uint64_t shards_of(uint64_t size, uint64_t shard_size)
{
	return size / shard_size + (size % shard_size != 0);
}

/* --- Requests, by shard --- */

/* The part of a request that lies in one shard. */
struct piece {
	uint64_t n;        /* the shard */
	uint64_t off, len; /* in it */
};

struct request {
	struct chan *c;
	struct ext e;
	const struct iov *iov; /* NULL where there is no data */
	unsigned fl;
	CO_FN int (*one)(struct request *r, const struct piece *p, const struct iov *iov);
	uint64_t next; /* on the disk: taken up to here */
	int rc;        /* of the first that failed */
};

/* In place (sharded_place.c); the first five as struct request's `one`. */
CO_FN int place_read(struct request *r, const struct piece *p, const struct iov *iov);
CO_FN int place_write(struct request *r, const struct piece *p, const struct iov *iov);
/* Parts of shards, and whole ones that must keep their space. */
CO_FN int place_zero(struct request *r, const struct piece *p, const struct iov *iov);
CO_FN int place_trim(struct request *r, const struct piece *p, const struct iov *iov);
CO_FN int place_cache(struct request *r, const struct piece *p, const struct iov *iov);
/* Deletes the shards [first, end). */
CO_FN int place_drop(struct chan *c, uint64_t first, uint64_t end);
/* What the store says of the part of one shard. Returns how far; 0 = no room left, or an error in *rc. */
CO_FN uint64_t place_map(struct chan *c, const struct piece *p, struct extmap *m, int *rc);

/* --- Volumes --- */

#define SIZE_NAME       "size"
#define SHARD_SIZE_NAME "shard-size"

/* An option that can't be: -EINVAL. */
int sharded_check_option(const struct layer *l, struct err *err);

/*
 * Reads what is recorded and checks it against the options. -ENOENT when there is no volume. `store` is a channel of
 * kid 0.
 */
CO_FN int sharded_read_volume(struct layer *l, struct chan *store, struct volume *v,
			      struct err *err);

/* What a listing found. */
struct shard_list {
	struct shardmap *known;   /* a bit is set for each block found; NULL = just count */
	uint64_t shards;          /* of the volume; blocks from here on are behind the end */
	uint64_t blocks_n, bytes; /* the volume's own */
	uint64_t behind_n, foreign_n;
	uint64_t *behind; /* if wanted (has_behind): their numbers, malloced */
	uint64_t behind_room;
	bool has_behind;
};

CO_FN int sharded_list(struct layer *l, struct chan *store, struct shard_list *list,
		       struct err *err);

/* The parts of that. -ENOENT of the first comes without a message, of the second with one. */
CO_FN int sharded_read_number(struct layer *l, struct chan *store, const char *name,
			      uint64_t *value, struct err *err);
CO_FN int sharded_read_size(struct layer *l, struct chan *store, uint64_t *size, struct err *err);
int sharded_check_size(const struct layer *l, uint64_t size, uint64_t shard_size, struct err *err);
int sharded_check_agrees(const struct layer *l, uint64_t shard_size, struct err *err);

/* Writes one of the numbers, durably. */
CO_FN int sharded_write_number(struct layer *l, struct chan *store, const char *name, uint64_t value,
			       enum put_cond cond, struct err *err);
/* Deletes the blocks from number `from` on. */
CO_FN int sharded_delete_from(struct layer *l, struct chan *store, uint64_t from, struct err *err);
/* Zeroes what the shard in which a disk of `size` bytes ends holds behind that end. */
CO_FN int sharded_zero_tail(struct layer *l, struct chan *store, uint64_t size, uint64_t shard_size,
			    struct err *err);

/* The store's chain for messages, secrets masked; malloced, NULL when out of memory. */
char *sharded_store_text(const struct layer *l);

/* layer_ops. */
CO_FN int sharded_create(struct layer *l, const struct obj *obj, uint64_t size, bool force,
			 struct err *err);
CO_FN int sharded_destroy(struct layer *l, const struct obj *obj, struct err *err);
CO_FN int sharded_resize(struct chan *c, uint64_t size, enum resize_phase phase, struct err *err);

#endif
