/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layers as they are, in the simulator: a disk over a remote store that fails and goes away, a machine
 * that crashes, and fibers that write, zero, read and flush. The model knows, of each block, the version
 * that was last begun, answered and flushed: no read finds one older than what was answered before it,
 * and no crash loses one that was flushed.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "traffic.h"

enum { BLOCKS = 384, WRITERS = 3, READERS = 2 };
#define NS_PER_S UINT64_C(1000000000)
#define SHORT_NS UINT64_C(150000000) /* of a life that crashes */
#define PAUSE_NS UINT64_C(2000000)

struct block {
	uint64_t begun, answered, flushed; /* versions; 0 = never written */
};

struct model {
	bool is_made;
	uint64_t until; /* ns; the traffic ends then */
	struct block blocks[BLOCKS];
};

struct traffic {
	struct model *m;
	struct volume volume;
	uint64_t pause_ns; /* between the requests of a fiber, about */
	uint64_t place;    /* where most of the requests go, so that they meet */
};

/* Every fourth version is zeroes. */
static bool is_zero(uint64_t version)
{
	return version % 4 == 0;
}

static uint64_t word_of(uint64_t block, uint64_t version)
{
	return is_zero(version) ? 0 : version << 16 | block;
}

static struct ext ext_of(uint64_t block)
{
	return (struct ext){ &obj_none, block * BLOCK, BLOCK };
}

/* ---- what a block may hold ---- */

/* The version that was read, by its first word; UINT64_MAX = none of [from, to]. */
static uint64_t version_of(uint64_t block, const uint64_t *words, uint64_t from, uint64_t to)
{
	uint64_t version = words[0] >> 16;

	for (unsigned k = 1; k < WORDS; k++)
		if (words[k] != words[0])
			return UINT64_MAX;
	if (words[0] == 0) {
		version = from + (4 - from % 4) % 4; /* the first that is zeroes */
		return version <= to ? version : UINT64_MAX;
	}
	return words[0] == word_of(block, version) && version >= from && version <= to ? version
										       : UINT64_MAX;
}

/* After a crash: what was found is what is there from now on. */
static CO_FN int check_all(struct traffic *t)
{
	struct chan *c = volume_chan(&t->volume);

	for (uint64_t k = 0; c != NULL && k < BLOCKS; k++) {
		struct block *b = &t->m->blocks[k];
		uint64_t words[WORDS], found;
		int rc = read_block(c, k, words);

		SIM_EXPECT(rc == 0, "block %" PRIu64 ": %d", k, rc);
		found = version_of(k, words, b->flushed, b->begun);
		SIM_EXPECT(found != UINT64_MAX,
			   "block %" PRIu64 " begins with %" PRIx64 " and ends with %" PRIx64
			   "; flushed %" PRIu64 ", begun %" PRIu64,
			   k, words[0], words[WORDS - 1], b->flushed, b->begun);
		b->answered = b->flushed = found;
	}
	return 0;
}

/* ---- traffic ---- */

static CO_FN int write_block(struct chan *c, struct model *m, uint64_t block)
{
	struct block *b = &m->blocks[block];
	uint64_t version = ++b->begun, words[WORDS];
	unsigned fl = sim_chance(50000) ? IO_FUA : 0;
	struct iovec v;
	struct iov iov = iov_one(&v, words, BLOCK);
	int rc;

	for (unsigned k = 0; k < WORDS; k++)
		words[k] = word_of(block, version);
	rc = is_zero(version) ? ch_zero(c, ext_of(block), fl | IO_PUNCH)
			      : ch_write(c, ext_of(block), &iov, fl);
	if (rc != 0)
		return rc;
	b->answered = version;
	if (fl & IO_FUA)
		b->flushed = version;
	return 0;
}

static bool goes_on(struct traffic *t)
{
	return now_ns() < t->m->until;
}

static CO_FN void pause_between(const struct traffic *t)
{
	co_sleep(sim_below(2 * t->pause_ns));
}

static uint64_t choose_block(struct traffic *t)
{
	if (sim_chance(50000))
		t->place = sim_below(BLOCKS);
	return sim_chance(700000) ? (t->place + sim_below(2 * WRITERS)) % BLOCKS
				  : sim_below(BLOCKS);
}

struct fiber {
	struct traffic *t;
	unsigned number;
};

/* Each writer has blocks of its own: the order of versions is the order of its requests. */
static CO_FN void write_on(void *arg)
{
	struct fiber f = *(struct fiber *)arg;
	struct chan *c = volume_chan(&f.t->volume);

	while (c != NULL && goes_on(f.t)) {
		uint64_t block = choose_block(f.t) / WRITERS * WRITERS + f.number;
		int rc = write_block(c, f.t->m, block);

		if (rc != 0)
			sim_trace("write of block %" PRIu64 ": %d", block, rc);
		pause_between(f.t);
	}
}

static CO_FN void read_on(void *arg)
{
	struct fiber f = *(struct fiber *)arg;
	struct chan *c = volume_chan(&f.t->volume);

	while (c != NULL && goes_on(f.t)) {
		uint64_t block = choose_block(f.t), words[WORDS];
		const struct block *b = &f.t->m->blocks[block];
		uint64_t from = b->answered;

		if (read_block(c, block, words) == 0 &&
		    version_of(block, words, from, b->begun) == UINT64_MAX)
			(void)sim_failed(__FILE__, __LINE__,
					 "block %" PRIu64 " reads as %" PRIx64 "; answered %" PRIu64
					 ", begun %" PRIu64,
					 block, words[0], from, b->begun);
		pause_between(f.t);
	}
}

static CO_FN void flush_on(void *arg)
{
	struct fiber f = *(struct fiber *)arg;
	struct chan *c = volume_chan(&f.t->volume);
	uint64_t answered[BLOCKS];

	while (c != NULL && goes_on(f.t)) {
		for (unsigned k = 0; k < BLOCKS; k++)
			answered[k] = f.t->m->blocks[k].answered;
		if (ch_flush(c) == 0)
			for (unsigned k = 0; k < BLOCKS; k++)
				f.t->m->blocks[k].flushed =
					MAX(f.t->m->blocks[k].flushed, answered[k]);
		co_sleep(20 * f.t->pause_ns);
	}
}

static CO_FN void run_traffic(struct traffic *t)
{
	struct fiber fibers[WRITERS + READERS + 1];
	struct co_group g = CO_GROUP_INIT;

	for (unsigned k = 0; k < ARRAY_LEN(fibers); k++) {
		fibers[k] = (struct fiber){ t, k };
		co_group_spawn(&g,
			       k < WRITERS             ? write_on
			       : k < WRITERS + READERS ? read_on
						       : flush_on,
			       &fibers[k]);
	}
	co_group_wait(&g);
}

/* ---- a life ---- */

/* Checks what is there, then more traffic. */
static CO_FN int live(const char *text, struct model *m, uint64_t ns, uint64_t pause_ns,
		      CO_FN void (*meanwhile)(void *arg))
{
	struct traffic t = { .m = m, .pause_ns = pause_ns };
	struct co_group g = CO_GROUP_INIT;
	struct err err = { "" };
	int rc;

	if (!m->is_made && volume_create(text, (uint64_t)BLOCKS * BLOCK) != 0)
		return -1;
	m->is_made = true;
	SIM_EXPECT(volume_open(&t.volume, text, &err) == 0, "%s", err.msg);
	rc = check_all(&t);
	m->until = now_ns() + ns;
	if (rc == 0 && meanwhile != NULL)
		co_group_spawn(&g, meanwhile, &t);
	if (rc == 0)
		run_traffic(&t);
	co_group_wait(&g);
	SIM_EXPECT(volume_close(&t.volume) == 0);
	for (unsigned k = 0; k < BLOCKS; k++)
		m->blocks[k].flushed = m->blocks[k].answered;
	return rc;
}

#define SHARDED "sharded[size=32Ki,dirty=1Mi,puts=4,age=2s]:retry[deadline=2m]:"

static CO_FN int sharded_short(void *model)
{
	sim_remote_fails(-EAGAIN, 30000, UINT64_MAX);
	return live(SHARDED "remote", model, SHORT_NS, PAUSE_NS, NULL);
}

static CO_FN int cached_short(void *model)
{
	sim_remote_fails(-ECONNRESET, 30000, UINT64_MAX);
	return live("cache[mem=1Mi,granule=4Ki]:" SHARDED "remote", model, SHORT_NS, PAUSE_NS,
		    NULL);
}

/* A disk that is remote as a whole: writes take their time there. No volume to be made. */
static CO_FN int cached_disk(void *model)
{
	((struct model *)model)->is_made = true;
	sim_remote_fails(-ETIMEDOUT, 10000, UINT64_MAX);
	return live("cache[mem=1Mi,granule=8Ki]:retry:remote[size=1536Ki]", model, SHORT_NS,
		    PAUSE_NS, NULL);
}

static CO_FN void weather_of(void *arg)
{
	const struct traffic *t = arg;

	weather(t->m->until);
}

static CO_FN int day(void *model)
{
	return live(SHARDED "remote", model, 24 * 3600 * NS_PER_S, 12 * NS_PER_S, weather_of);
}

/* Nothing volatile but time: the layers for tests, with errors that retry must hide. */
static CO_FN int day_in_memory(void *model)
{
	((struct model *)model)->is_made = true; /* no volume: the disk is there */
	return live("retry[deadline=10m]:fault[rate=10%,ops=read|write|zero,error=EAGAIN]:"
		    "delay[read=2ms,write=5ms,jitter=50ms]:mem[size=1536Ki]",
		    model, 24 * 3600 * NS_PER_S, 2 * NS_PER_S, NULL);
}

#define MODEL .model_len = sizeof(struct model)
#define CRASHES(fn)                                                                              \
	.scenario = fn, .recover = fn, MODEL, .crash = SIM_ANY_CRASH, .crashes = 3, .seeds = 30, \
	.weight = 10

static const struct sim_case cases[] = {
	{ .name = "sharded", CRASHES(sharded_short) },
	{ .name = "cache-sharded", CRASHES(cached_short) },
	{ .name = "cache-disk", CRASHES(cached_disk) },
	{ .name = "sharded-24h", .scenario = day, .recover = sharded_short, MODEL, .weight = 500 },
	{ .name = "retry-24h", .scenario = day_in_memory, MODEL, .weight = 500 },
};

int main(int argc, char **argv)
{
	return sim_main(argc, argv, cases, ARRAY_LEN(cases));
}
