/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the files of layer `sharded` share.
 */
#ifndef NBDRS_LAYER_SHARDED_INT_H
#define NBDRS_LAYER_SHARDED_INT_H

#include "layer/shardbits.h"
#include "layer/shardbuf.h"
#include "nbdrs/layer.h"

enum { SHARD_SIZE_DEFAULT = 4 << 20, SHARD_SIZE_MIN = 4096, SHARD_SIZE_MAX = 64 << 20 };

/* Bits of the map of known shards: 32 MiB of memory. */
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

/* layer_ops. */
CO_FN int sharded_create(struct layer *l, const struct obj *obj, uint64_t size, bool force,
			 struct err *err);
CO_FN int sharded_destroy(struct layer *l, const struct obj *obj, struct err *err);

#endif
