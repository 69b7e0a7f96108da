/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * When the write-back cache sends what, counted in puts: an object that a stream has filled goes at
 * once and once, one that is written again and again waits. In the simulator, for its clock.
 *
 * The volume has 32 shards of 64 KiB; it is written round by round, in blocks of 4 KiB.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "world.h"

#define NS_PER_S UINT64_C(1000000000)
#define MS       UINT64_C(1000000)

enum { SHARD_BLOCKS = 16, SHARDS = BLOCKS / SHARD_BLOCKS };

#define SHARDED "sharded[size=64Ki]:"
#define PACE(lag, size, uploads) \
	SHARDED "cache[disk=/disk/c,mode=writeback,lag=" lag ",size=" size ",uploads=" uploads "]:"
#define STORE "remote"
#define SLOW  "delay[write=200ms]:remote"

struct query {
	struct info info;
	const char *key;
	uint64_t value;
};

static CO_FN int enter(struct world *w, const char *text)
{
	return volume_create(text, (uint64_t)BLOCKS * BLOCK) ? -1 : world_enter(w, text);
}

static void take_value(struct info *i, const char *key, const char *value)
{
	struct query *q = container_of(i, struct query, info);

	if (strcmp(key, q->key) == 0)
		q->value = strtoull(value, NULL, 10);
}

/* Of the cache's status. */
static uint64_t value_of(const struct world *w, const char *key)
{
	struct query q = { .info = { take_value }, .key = key, .value = UINT64_MAX };
	struct layer *cache = chain_top(w->volume.chain)->kids[0];

	cache->ops->status(cache, &q.info);
	return q.value;
}

static CO_FN int write_blocks(struct world *w, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		SIM_EXPECT(world_write_next(w) == 0);
	return 0;
}

/* Reads all of it, ends, and reads it from the store. */
static CO_FN int check_and_leave(struct world *w)
{
	struct world after = { .written = w->written };

	if (world_check(w))
		return -1;
	SIM_EXPECT(world_leave(w) == 0);
	if (world_enter(&after, SHARDED STORE) || world_check(&after))
		return -1;
	return world_leave(&after);
}

/* What a stream has filled does not wait for `lag`, and goes in one piece. */
static CO_FN int full_goes(void *model)
{
	struct world w = { 0 };
	uint64_t sends;

	(void)model;
	if (enter(&w, PACE("1h", "16Mi", "4") STORE))
		return -1;
	if (write_blocks(&w, BLOCKS - SHARD_BLOCKS / 2))
		return -1;
	co_sleep(2 * NS_PER_S);
	sends = value_of(&w, "sends");
	SIM_EXPECT(sends == SHARDS - 1, "%" PRIu64 " sends", sends);
	SIM_EXPECT(value_of(&w, "dirty_bytes") == SHARD_BLOCKS / 2 * BLOCK, "half a shard waits");
	return check_and_leave(&w);
}

/* A full one that is written over and over: `lag` says how often it is sent, not its writer. */
static CO_FN int written_over(void *model)
{
	struct world w = { 0 };
	uint64_t sends;

	(void)model;
	if (enter(&w, PACE("5s", "16Mi", "4") STORE))
		return -1;
	for (unsigned i = 0; i < 300; i++) {
		w.written = 0;
		if (write_blocks(&w, SHARD_BLOCKS))
			return -1;
		co_sleep(200 * MS);
	}
	sends = value_of(&w, "sends");
	SIM_EXPECT(sends >= 12 && sends <= 34, "%" PRIu64 " sends in a minute and more", sends);
	return check_and_leave(&w);
}

/* A stream that the store cannot follow: the journal is full, and yet each object is sent whole. */
static CO_FN int outrun(void *model)
{
	enum { ROUNDS = 4 };
	struct world w = { 0 };
	uint64_t sends;

	(void)model;
	if (enter(&w, PACE("1h", "1Mi", "16") SLOW) || write_blocks(&w, ROUNDS * BLOCKS))
		return -1;
	sends = value_of(&w, "sends");
	SIM_EXPECT(sends <= ROUNDS * SHARDS * 11 / 10, "%" PRIu64 " sends", sends);
	return check_and_leave(&w);
}

/* The store is fast, and the journal slow to be given back: few are under way, and yet all go whole. */
static CO_FN int followed(void *model)
{
	enum { ROUNDS = 4 };
	struct world w = { 0 };
	uint64_t sends;

	(void)model;
	if (enter(&w, PACE("1h", "1Mi", "16") STORE) || write_blocks(&w, ROUNDS * BLOCKS))
		return -1;
	sends = value_of(&w, "sends");
	SIM_EXPECT(sends <= ROUNDS * SHARDS * 11 / 10, "%" PRIu64 " sends", sends);
	return check_and_leave(&w);
}

/* The only worker does not wait for others to be done before it sends what may grow. */
static CO_FN int outrun_alone(void *model)
{
	struct world w = { 0 };

	(void)model;
	if (enter(&w, PACE("1h", "1Mi", "1") SLOW) || write_blocks(&w, 2 * BLOCKS))
		return -1;
	SIM_EXPECT(w.longest < 5 * NS_PER_S, "a write took %" PRIu64 " ms", w.longest / MS);
	return check_and_leave(&w);
}

static const struct sim_case cases[] = {
	{ .name = "full-goes", .scenario = full_goes, .seeds = 3 },
	{ .name = "written-over", .scenario = written_over, .seeds = 2, .weight = 10 },
	{ .name = "outrun", .scenario = outrun, .seeds = 2, .weight = 5 },
	{ .name = "followed", .scenario = followed, .seeds = 2, .weight = 3 },
	{ .name = "outrun-alone", .scenario = outrun_alone, .seeds = 2, .weight = 5 },
};

int main(int argc, char **argv)
{
	return sim_main(argc, argv, cases, ARRAY_LEN(cases));
}
