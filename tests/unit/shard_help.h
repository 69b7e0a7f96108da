/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the tests of layer sharded share: volumes in memory, what the store was asked for, and what is in it.
 */
#ifndef NBDRS_TEST_SHARD_HELP_H
#define NBDRS_TEST_SHARD_HELP_H

#include "conformance.h"
#include "layer/sharded/shardbuf.h"

/* What the layer below sharded was asked for. */
struct shard_asked {
	uint64_t ops[CH_OPS], bytes[CH_OPS];
};

/* Runs fn on a fiber, over a volume of a chain that ends in memory; fails the test when fn fails. */
void shard_check(const char *text, uint64_t size, int (*fn)(void *run));

struct ext shard_at(uint64_t off, uint64_t len);
struct shard_asked shard_asked(struct run *r);
/* What was asked for since `before`. */
struct shard_asked shard_asked_since(struct run *r, const struct shard_asked *before);
/* Waits until a number of the status is at least `least`. */
CO_FN int shard_wait_status(struct run *r, const char *key, uint64_t least);
CO_FN int shard_flush(struct run *r);
/* All of `len` bytes the same, as the model knows then. */
CO_FN int shard_fill(struct run *r, uint64_t off, uint64_t len, uint8_t byte);
/* The disk as a crash would leave it. Shards of `shard` bytes. */
CO_FN int shard_read_image(struct run *r, uint8_t *image, uint64_t shard);
/* The store has all that was written. */
CO_FN int shard_check_image(struct run *r, uint64_t shard);
/* Size of shard n's object, or -errno. */
CO_FN int64_t shard_object_size(struct run *r, uint64_t n);
/* Makes and removes the file that switches a fault on. */
CO_FN int shard_break_store(struct run *r, bool is_broken);

#endif
