/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Write-back buffers of layer `sharded`, for stores that only replace whole objects: writes are collected per shard
 * in memory and put as whole objects, by flush, FUA, age, or when a shard is full. How is in shardbuf.c (the memory),
 * shardput.c (when), shardstore.c (the way to the store), shardflush.c (flush and deletes) and shardread.c.
 *
 * Offsets and lengths are multiples of SHARD_GRAIN and lie within one shard.
 */
#ifndef NBDRS_LAYER_SHARDBUF_H
#define NBDRS_LAYER_SHARDBUF_H

#include "layer/sharded/shardbits.h"
#include "nbdrs/layer.h"

enum { SHARD_GRAIN = 512 };
/* Shards deleted by one request. */
enum { SHARD_DEL_MAX = 1000 };

struct shardbuf;

struct shardbuf_conf {
	const char *name;    /* borrowed; of the volume, for the log */
	uint64_t shard_size; /* bytes, a power of two >= 4096 */
	uint64_t disk_size;  /* bytes */
	uint64_t dirty_max;  /* bytes of memory for unsaved data; writers wait at the limit */
	uint64_t age_ns;     /* unsaved data is put after so long */
	unsigned puts;       /* at most so many puts in flight, and half of dirty_max in bytes */
	/*
	 * Borrowed. Bit n: block-n may be in the store, or is in the buffers. Set before either,
	 * cleared when neither is the case; a clear bit means zeroes.
	 */
	struct shardmap *known;
};

/* One channel's access: its store's channel and its background fibers. Zeroed before shardbuf_enter(). */
struct shard_user {
	struct shardbuf *b;
	struct chan *kid;
	unsigned fibers; /* of this user: puts in the background, and maybe the keeper */
	bool is_leaving;
	struct co *leaver;
};

/* Names the object of shard n. */
void shard_obj(struct obj *o, uint64_t n);

/* -ENOMEM. */
int shardbuf_new(const struct shardbuf_conf *conf, struct shardbuf **out);
/* No users, nothing in flight. NULL is fine. Returns the bytes that were never stored. */
uint64_t shardbuf_free(struct shardbuf *b);

/*
 * For a disk that gets another size, while nothing is in the chain: room for `n` shards (-ENOMEM, nothing is changed),
 * before anything else; and the size itself, when all that was unsaved is saved.
 */
int shardbuf_reserve(struct shardbuf *b, uint64_t n);
void shardbuf_set_size(struct shardbuf *b, uint64_t disk_size);

void shardbuf_enter(struct shard_user *u, struct shardbuf *b, struct chan *kid);
/* Waits for this user's fibers. Saves nothing: flush first. */
CO_FN void shardbuf_leave(struct shard_user *u);

/* The part [off, off + iov->len) of shard n. */
CO_FN int shardbuf_read(struct shard_user *u, uint64_t n, uint64_t off, const struct iov *iov);
/*
 * Into memory. Waits while memory is short; fails with the store's error when it is short because the store fails.
 */
CO_FN int shardbuf_write(struct shard_user *u, uint64_t n, uint64_t off, const struct iov *iov);
CO_FN int shardbuf_zero(struct shard_user *u, uint64_t n, uint64_t off, uint64_t len);
/* Zeroes what is in memory for writing anyway; else does nothing. */
CO_FN int shardbuf_trim(struct shard_user *u, uint64_t n, uint64_t off, uint64_t len);
/* Deletes the shards [first, end), in the store as well; they read as zeroes then. */
CO_FN int shardbuf_drop(struct shard_user *u, uint64_t first, uint64_t end);
/* Puts shard n if it has unsaved data. The store's flush is the caller's. */
CO_FN int shardbuf_save(struct shard_user *u, uint64_t n);
/* The same for all that was answered before the call. */
CO_FN int shardbuf_flush(struct shard_user *u);

struct shardbuf_view {
	uint64_t dirty_bytes, dirty_shards, puts_running, flying, puts_done, failures;
	int error; /* of the last put, 0 = it went well */
};

/* Any thread. */
void shardbuf_view(struct shardbuf *b, struct shardbuf_view *v);

#endif
