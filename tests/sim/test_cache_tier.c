/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Clean data of layer cache on disk, in the simulator: whatever happened before, a cache that starts
 * reads as the layer below does, block by block. Nothing in its folder may be older (or newer).
 *
 * Each life looks at the layer below without the cache, then through it, then writes and reads for a
 * while, in bursts with long pauses, so that the record of changes has regions that come and go.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/layer.h"
#include "sim.h"

enum { KI = 1024, BLOCK = 4 * KI, WRITERS = 2, READERS = 2, BLOCKS = 640, AREA = BLOCKS / WRITERS };
enum { LEN_MAX = 8, WORDS = BLOCK / sizeof(uint64_t) };
#define MS UINT64_C(1000000)

struct model {
	bool is_made;
	uint64_t life, hits;
	/* Of blocks: the last life's newest numbers; see below. */
	uint64_t flushed[BLOCKS], answered[BLOCKS], begun[BLOCKS];
};

struct plan {
	const char *chain, *below; /* below: without the cache */
	const char *other;         /* a chain that some lives have instead; NULL = none */
	bool is_back;              /* what is below is older until an orderly end */
	bool keeps;                /* what was answered survives all crashes */
	uint64_t ns;
	uint64_t pause_ns, flush_ns;
	uint32_t fails;   /* ppm of the store's requests */
	const char *dies; /* a file of which one sync fails */
	bool is_flipped;
	struct sim_faults faults;
};

/* One life's; numbers grow, each write has one. */
static struct {
	const struct plan *p;
	struct model *m;
	struct chain *chain;
	uint64_t until, number;
	uint64_t base[BLOCKS]; /* what was there at its beginning */
	uint64_t zeroed[BLOCKS];
} now;

/* ---- chains ---- */

static CO_FN int open_chain(const char *text, struct spec **spec, struct chain **chain)
{
	struct err err = { "" };
	int rc = spec_parse(text, spec, &err);

	if (rc == 0)
		rc = chain_build(*spec, "disk0", false, chain, &err);
	if (rc == 0)
		rc = chain_open(*chain, &err);
	if (rc)
		(void)sim_failed(__FILE__, __LINE__, "%s", err.msg);
	return rc;
}

static CO_FN int shut_chain(struct spec *spec, struct chain *chain)
{
	const int rc = chain_close(chain);

	chain_free(chain);
	spec_free(spec);
	return rc;
}

static CO_FN int make(const struct plan *p)
{
	struct spec *spec = NULL;
	struct chain *chain = NULL;
	struct err err = { "" };
	int rc = spec_parse(p->chain, &spec, &err);

	if (rc == 0)
		rc = chain_build(spec, "disk0", false, &chain, &err);
	if (rc == 0 && strstr(p->chain, "sharded"))
		rc = chain_create(chain, (uint64_t)BLOCKS * BLOCK, false, &err);
	chain_free(chain);
	spec_free(spec);
	SIM_EXPECT(rc == 0, "%s", err.msg);
	return 0;
}

/* The first word of each block; all of a block's words are the same. */
static CO_FN int read_blocks(struct chain *chain, uint32_t reader, uint32_t block, uint32_t n,
			     uint64_t *first)
{
	static uint64_t buffers[READERS + 1][16 * WORDS]; /* the last: of the checks */
	uint64_t *words = buffers[reader];
	struct iovec v;
	struct iov iov = iov_one(&v, words, (size_t)n * BLOCK);
	int rc = 0;
	struct chan *c = chain_chan(chain, &rc);

	if (!rc)
		rc = ch_read(c, (struct ext){ &obj_none, (uint64_t)block * BLOCK, iov.len }, &iov,
			     0);
	for (uint32_t b = 0; b < n && !rc; b++) {
		first[b] = words[b * WORDS];
		for (uint32_t k = 1; k < WORDS; k++)
			if (words[b * WORDS + k] != first[b])
				return sim_failed(__FILE__, __LINE__, "block %" PRIu32 " is torn",
						  block + b);
	}
	return rc;
}

/* ---- what was read ---- */

static bool is_right(uint32_t block, uint64_t word, uint64_t from)
{
	const uint64_t number = word & UINT32_MAX;

	if (word >> 32 == now.m->life)
		return number >= from && number <= now.m->begun[block];
	if (word == 0 && now.zeroed[block] && now.zeroed[block] >= from)
		return true;
	return from == 0 && word == now.base[block];
}

static CO_FN void read_on(void *arg)
{
	const uint32_t reader = *(const uint32_t *)arg;

	while (now_ns() < now.until) {
		const uint32_t n = 1 + (uint32_t)sim_below(sim_chance(200000) ? 15 : 2);
		const uint32_t block = (uint32_t)sim_below(BLOCKS - n);
		uint64_t from[16], got[16];

		memcpy(from, now.m->answered + block, n * sizeof(*from));
		if (read_blocks(now.chain, reader, block, n, got) == 0)
			for (uint32_t b = 0; b < n; b++)
				if (!is_right(block + b, got[b], from[b]))
					(void)sim_failed(__FILE__, __LINE__,
							 "block %" PRIu32 " reads as %" PRIx64
							 "; answered %" PRIu64 ", begun %" PRIu64,
							 block + b, got[b], from[b],
							 now.m->begun[block + b]);
		co_sleep(sim_chance(990000) ? sim_below(MS) : sim_below(8000 * MS));
	}
}

/* ---- changes ---- */

static CO_FN int change(uint32_t area, uint32_t block, uint32_t n, bool is_zero)
{
	static uint64_t buffers[WRITERS][LEN_MAX * WORDS];
	const struct ext e = { &obj_none, (uint64_t)block * BLOCK, (uint64_t)n * BLOCK };
	const uint64_t number = ++now.number;
	struct iovec v;
	struct iov iov = iov_one(&v, buffers[area], e.len);
	int rc = 0;
	struct chan *c = chain_chan(now.chain, &rc);

	for (uint32_t b = block; b < block + n; b++) {
		now.m->begun[b] = number;
		if (is_zero)
			now.zeroed[b] = number;
	}
	for (uint32_t k = 0; k < n * WORDS; k++)
		buffers[area][k] = now.m->life << 32 | number;
	if (!rc && is_zero)
		rc = ch_zero(c, e, sim_chance(500000) ? IO_PUNCH : 0);
	else if (!rc)
		rc = ch_write(c, e, &iov, 0);
	for (uint32_t b = block; b < block + n && !rc; b++)
		now.m->answered[b] = number;
	return rc;
}

/* Bursts in a part of the area; now and then whole objects. */
static CO_FN void write_on(void *arg)
{
	const uint32_t area = *(const uint32_t *)arg;
	uint32_t at = 0;

	while (now_ns() < now.until) {
		const bool is_object = sim_chance(100000);
		const uint32_t n = is_object ? LEN_MAX
					     : 1 + (uint32_t)sim_below(sim_chance(200000) ? 7 : 2);
		const uint32_t in = (uint32_t)sim_below(32 - n);

		if (change(area, area * AREA + at + (is_object ? in / LEN_MAX * LEN_MAX : in), n,
			   sim_chance(is_object ? 800000 : 50000)))
			co_sleep(10 * MS);
		if (!sim_chance(950000)) {
			at = (uint32_t)sim_below(AREA / 32) * 32;
			co_sleep(sim_below(now.p->pause_ns));
		}
	}
}

static CO_FN void flush_on(void *arg)
{
	static uint64_t answered[BLOCKS];

	while (now_ns() < now.until) {
		int rc = 0;
		struct chan *c = chain_chan(now.chain, &rc);

		memcpy(answered, now.m->answered, sizeof(answered));
		if (!rc && ch_flush(c) == 0)
			memcpy(now.m->flushed, answered, sizeof(answered));
		co_sleep(sim_below(now.p->flush_ns));
	}
}

static CO_FN void run_traffic(void)
{
	static const uint32_t numbers[] = { 0, 1 }; /* of readers, of writers' areas */
	struct co_group g = CO_GROUP_INIT;

	now.until = now_ns() + now.p->ns;
	for (unsigned i = 0; i < WRITERS; i++)
		co_group_spawn(&g, write_on, (void *)(uintptr_t)&numbers[i]);
	for (unsigned i = 0; i < READERS; i++)
		co_group_spawn(&g, read_on, (void *)(uintptr_t)&numbers[i]);
	co_group_spawn(&g, flush_on, NULL);
	co_group_wait(&g);
}

/* ---- lives ---- */

static void note_status(struct info *i, const char *key, const char *value)
{
	if (strcmp(key, "tier_hits") == 0)
		now.m->hits += strtoull(value, NULL, 10);
	if (strcmp(key, "tier_bad") == 0)
		sim_trace("%s %s", key, value);
}

static void look_at_status(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum)
{
	struct info i = { .add = note_status };

	if (strcmp(l->ops->name, "cache") == 0)
		l->ops->status(l, &i);
}

/* What the crash left of what the last life wrote; its numbers are known. */
static int judge(uint32_t block, uint64_t word)
{
	const struct model *m = now.m;
	const uint64_t from = now.p->keeps ? m->answered[block] : m->flushed[block];
	const uint64_t number = word & UINT32_MAX;

	if (word == 0 || now.p->is_flipped)
		return 0; /* who knows when */
	if (word >> 32 == m->life)
		SIM_EXPECT(number >= from && number <= m->begun[block],
			   "block %" PRIu32 " is %" PRIx64 ", of %" PRIu64 " to %" PRIu64, block,
			   word, from, m->begun[block]);
	else
		SIM_EXPECT(from == 0, "block %" PRIu32 " is %" PRIx64 ", must be %" PRIu64, block,
			   word, from);
	return 0;
}

static CO_FN int look_below(void)
{
	struct spec *spec = NULL;
	struct chain *chain = NULL;
	int rc = 0;

	/* Above the journal it is what a crash left; below, once it was sent. */
	if (now.p->is_back) {
		if (open_chain(now.p->chain, &spec, &chain))
			return -1;
		for (uint32_t b = 0; b < BLOCKS && !rc; b++) {
			rc = read_blocks(chain, READERS, b, 1, &now.base[b]);
			if (!rc)
				rc = judge(b, now.base[b]);
		}
		SIM_EXPECT(shut_chain(spec, chain) == 0 && rc == 0);
	}
	if (open_chain(now.p->below, &spec, &chain))
		return -1;
	for (uint32_t b = 0; b < BLOCKS && !rc; b++) {
		uint64_t word = 0;

		rc = read_blocks(chain, READERS, b, 1, &word);
		if (!rc && now.p->is_back)
			SIM_EXPECT(word == now.base[b],
				   "block %" PRIu32 " was %" PRIx64 " with the cache, is %" PRIx64,
				   b, now.base[b], word);
		if (!rc && !now.p->is_back)
			rc = judge(b, word);
		now.base[b] = word;
	}
	SIM_EXPECT(shut_chain(spec, chain) == 0 && rc == 0);
	return 0;
}

static CO_FN int compare_all(void)
{
	uint32_t from = (uint32_t)sim_below(BLOCKS);

	for (uint32_t k = 0; k < BLOCKS; k++) {
		const uint32_t b = (from + k * 7) % BLOCKS;
		uint64_t word = 0;

		SIM_EXPECT(read_blocks(now.chain, READERS, b, 1, &word) == 0);
		SIM_EXPECT(word == now.base[b],
			   "block %" PRIu32 " is %" PRIx64 " below, reads as %" PRIx64, b,
			   now.base[b], word);
	}
	return 0;
}

static void flip(void)
{
	static const char *const files[] = { "data", "index", "marks" };
	char path[64];

	for (unsigned i = 0; i < 20; i++) {
		const unsigned which = (unsigned)sim_below(ARRAY_LEN(files));

		(void)snprintf(path, sizeof(path), "/disk/c/tier-%s", files[which]);
		(void)sim_flip(path,
			       sim_below(which == 0   ? 1 << 20
					 : which == 1 ? 12 << 10
						      : 1024),
			       1024, 1 + (unsigned)sim_below(4));
	}
}

static CO_FN int live(const struct plan *p, void *model)
{
	struct spec *spec = NULL;
	int rc;

	now.p = p;
	now.m = model;
	sim_remote_fails(-EAGAIN, 0, 0);
	if (!now.m->is_made && make(p) != 0)
		return -1;
	now.m->is_made = true;
	if (look_below() != 0)
		return -1;
	if (p->is_flipped)
		flip();
	if (open_chain(p->other && sim_chance(300000) ? p->other : p->chain, &spec, &now.chain) !=
	    0)
		return -1;
	/* At once: no crash comes between. */
	memset(now.m->flushed, 0, sizeof(now.m->flushed));
	memset(now.m->answered, 0, sizeof(now.m->answered));
	memset(now.m->begun, 0, sizeof(now.m->begun));
	now.m->life++;
	rc = compare_all();
	sim_remote_fails(-EAGAIN, p->fails, UINT64_MAX);
	if (rc == 0 && sim_life() == 0)
		sim_set_faults(&p->faults);
	if (p->dies && sim_life() == 1) /* there is something to be too old */
		sim_fail(SIM_SYNC, p->dies, (unsigned)sim_below(4), 1, -EIO);
	if (rc == 0)
		run_traffic();
	chain_each(now.chain, look_at_status, NULL);
	sim_trace("hits so far: %" PRIu64, now.m->hits);
	sim_remote_fails(-EAGAIN, 0, 0);
	if (shut_chain(spec, now.chain) == 0)
		memcpy(now.m->flushed, now.m->answered, sizeof(now.m->flushed));
	return rc;
}

#define TIER(more) "cache[disk=/disk/c,volume=v,mem=1Mi,granule=8Ki" more "]:"
#define PLAN(...)                                                                                \
	{                                                                                        \
		.ns = 25000 * MS, .pause_ns = 15000 * MS, .flush_ns = 6000 * MS, .fails = 20000, \
		__VA_ARGS__                                                                      \
	}
#define DISK  "remote[size=2560Ki]"
#define BACK  ",size=2Mi,journal=1Mi,mode=writeback,lag=100ms,uploads=4"
#define RETRY "retry[deadline=2m]:"

/* A case of that name, with its plan. */
#define CASE(fn, ...)                                           \
	static CO_FN int fn(void *model)                        \
	{                                                       \
		static const struct plan p = PLAN(__VA_ARGS__); \
		return live(&p, model);                         \
	}

CASE(through_disk, .chain = TIER(",size=1Mi") DISK, .below = DISK, .keeps = true)
CASE(through_objects, .chain = "sharded[size=32Ki]:" TIER(",size=1Mi") RETRY "remote",
     .below = "sharded:remote")
CASE(above_sharded, .chain = TIER(",size=1Mi") "sharded[size=32Ki,age=1h]:" RETRY "remote",
     .below = "sharded:remote")
/* Pauses in which marks go, and the layer below is flushed by nobody else. */
static CO_FN int unflushed(void *model)
{
	static const struct plan p = { .chain = TIER(",size=1Mi") "sharded[size=32Ki,age=1h]:" RETRY
								  "remote",
				       .below = "sharded:remote",
				       .ns = 80000 * MS,
				       .pause_ns = 60000 * MS,
				       .flush_ns = 200000 * MS };

	return live(&p, model);
}

CASE(other_size, .chain = "sharded[size=32Ki]:" TIER(",size=1Mi") RETRY "remote",
     .other = "sharded[size=32Ki]:" TIER(",size=1200Ki") RETRY "remote", .below = "sharded:remote")
CASE(marks_die, .chain = "sharded[size=32Ki]:" TIER(",size=1Mi") RETRY "remote",
     .below = "sharded:remote", .dies = "tier-marks")
CASE(index_dies, .chain = "sharded[size=32Ki]:" TIER(",size=1Mi") RETRY "remote",
     .below = "sharded:remote", .dies = "tier-index")
CASE(back_disk, .chain = TIER(BACK) DISK, .below = DISK, .is_back = true)
CASE(back_objects, .chain = "sharded[size=32Ki]:" TIER(BACK) RETRY "remote",
     .below = "sharded:remote", .is_back = true)
CASE(bad_disk, .chain = "sharded[size=32Ki]:" TIER(",size=1Mi") RETRY "remote",
     .below = "sharded:remote",
     .faults = { .read_ppm = 20000, .write_ppm = 20000, .sync_ppm = 20000, .short_ppm = 20000 })
CASE(full_disk, .chain = "sharded[size=32Ki]:" TIER(",size=1Mi") RETRY "remote",
     .below = "sharded:remote", .faults = { .space = 400 * KI })
CASE(flipped, .chain = "sharded[size=32Ki]:" TIER(",size=1Mi") RETRY "remote",
     .below = "sharded:remote", .is_flipped = true)

#define CRASHES(how, n) \
	.model_len = sizeof(struct model), .crash = how, .crashes = 3, .seeds = n, .weight = 4

static const struct sim_case cases[] = {
	{ .name = "disk",
	  .scenario = through_disk,
	  .recover = through_disk,
	  CRASHES(SIM_ANY_CRASH, 8) },
	{ .name = "objects",
	  .scenario = through_objects,
	  .recover = through_objects,
	  CRASHES(SIM_ANY_CRASH, 12) },
	{ .name = "above-sharded",
	  .scenario = above_sharded,
	  .recover = above_sharded,
	  CRASHES(SIM_ANY_CRASH, 8) },
	{ .name = "unflushed",
	  .scenario = unflushed,
	  .recover = unflushed,
	  CRASHES(SIM_ANY_CRASH, 6) },
	{ .name = "other-size",
	  .scenario = other_size,
	  .recover = other_size,
	  CRASHES(SIM_ANY_CRASH, 8) },
	{ .name = "marks-die",
	  .scenario = marks_die,
	  .recover = marks_die,
	  CRASHES(SIM_ANY_CRASH, 8) },
	{ .name = "index-dies",
	  .scenario = index_dies,
	  .recover = index_dies,
	  CRASHES(SIM_ANY_CRASH, 8) },
	{ .name = "back-disk",
	  .scenario = back_disk,
	  .recover = back_disk,
	  CRASHES(SIM_ANY_CRASH, 8) },
	{ .name = "back-objects",
	  .scenario = back_objects,
	  .recover = back_objects,
	  CRASHES(SIM_ANY_CRASH, 8) },
	{ .name = "bad-disk",
	  .scenario = bad_disk,
	  .recover = through_objects,
	  CRASHES(SIM_ANY_CRASH, 8) },
	{ .name = "full-disk",
	  .scenario = full_disk,
	  .recover = through_objects,
	  CRASHES(SIM_ANY_CRASH, 6) },
	{ .name = "flipped", .scenario = flipped, .recover = flipped, CRASHES(SIM_ANY_CRASH, 6) },
};

int main(int argc, char **argv)
{
	return sim_main(argc, argv, cases, ARRAY_LEN(cases));
}
