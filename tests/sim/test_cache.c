/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer cache writing back, in the simulator: writers, readers and flushes over a remote store that
 * fails, on a machine that crashes at any step of the journal.
 *
 * Each write has a number of its own, which its blocks hold. So of each block it is known which
 * writes it may show: none older than what was flushed (or, after a kill, answered), and none that
 * was not begun. With durability=local there is more: what a crash leaves is a beginning. No write
 * is there when one is not that was answered before it was begun, and each is there wholly or not.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "traffic.h"

enum { KI = 1024, WRITERS = 3, AREA = 32, BLOCKS = WRITERS * AREA };
enum { LEN_MAX = 8, LOG_MAX = 6000 };
#define MS UINT64_C(1000000)

/*
 * A write or zero: its number is where it stands in the log, from 1; time is counted in begins and
 * answers.
 */
struct entry {
	uint32_t block, len;
	uint64_t begun, answered; /* 0 = not */
	bool is_zero, has_failed;
};

/* What a block holds: numbers of writes of this life, or 0 for what was there before. */
struct block {
	uint64_t answered, flushed, begun;
	uint64_t base; /* its words before this life */
};

struct model {
	bool is_made, is_sure; /* sure: nobody has flipped a bit */
	uint64_t life;         /* makes numbers of different lives differ */
	uint64_t time;
	uint32_t n; /* entries */
	struct block blocks[BLOCKS];
	struct entry log[LOG_MAX + 1];
};

struct plan {
	const char *chain, *below; /* below: without the cache */
	uint64_t ns, pause_ns, idle_ns;
	bool is_prefix; /* a crash leaves a beginning */
	bool keeps_all; /* of what was answered: only kills come */
	uint32_t fails; /* ppm of the store's requests */
	bool has_weather;
	bool is_flipped; /* after a crash a few bits of the journal are not what they were */
	struct sim_faults faults;
};

struct traffic {
	const struct plan *p;
	struct model *m;
	struct volume volume;
	uint64_t until;
};

static uint64_t word_of(const struct model *m, uint32_t number)
{
	return m->log[number].is_zero ? 0 : m->life << 40 | (uint64_t)number << 8 | 1;
}

/* ---- what was read ---- */

/* Numbers of writes that a block may be of: the oldest and the newest. */
struct seen {
	uint64_t low, high;
};

/*
 * All words of a block are the same, and of a write to it in [from, to]; 0 = what was there before.
 */
static bool look(const struct model *m, uint32_t block, const uint64_t *words, uint64_t from,
		 uint64_t to, struct seen *s)
{
	bool is_found = false;

	for (unsigned k = 1; k < WORDS; k++)
		if (words[k] != words[0])
			return false;
	for (uint64_t n = from; n <= to; n++) {
		const struct entry *e = &m->log[n];

		if (n == 0 ? m->blocks[block].base != words[0]
			   : block < e->block || block >= e->block + e->len ||
				     word_of(m, (uint32_t)n) != words[0])
			continue;
		if (!is_found)
			s->low = n;
		s->high = n;
		is_found = true;
	}
	return is_found;
}

/* What a crash left is a beginning of the log. */
static int check_prefix(const struct model *m, const struct seen *seen)
{
	uint64_t newest = 0; /* the time when the newest that is there was begun */

	for (uint32_t k = 0; k < BLOCKS; k++)
		newest = MAX(newest, seen[k].low ? m->log[seen[k].low].begun : 0);
	for (uint32_t n = 1; n <= m->n; n++) {
		const struct entry *e = &m->log[n];
		unsigned there = 0, missing = 0;

		for (uint32_t k = e->block; k < e->block + e->len; k++) {
			there += seen[k].low >= n;
			missing += seen[k].high < n;
		}
		SIM_EXPECT(!there || !missing || e->has_failed, "write %" PRIu32 " is torn", n);
		SIM_EXPECT(!missing || !e->answered || e->answered > newest,
			   "write %" PRIu32 " was answered at %" PRIu64
			   " and is lost, one of %" PRIu64 " is there",
			   n, e->answered, newest);
	}
	return 0;
}

/* After a crash; what is there is where the model begins anew. */
static CO_FN int check_all(struct traffic *t)
{
	struct model *m = t->m;
	struct chan *c = volume_chan(&t->volume);
	struct seen seen[BLOCKS];
	uint64_t words[WORDS], found[BLOCKS];

	for (uint32_t k = 0; c != NULL && k < BLOCKS; k++) {
		struct block *b = &m->blocks[k];
		uint64_t from = !m->is_sure ? 0 : t->p->keeps_all ? b->answered : b->flushed;
		int rc = read_block(c, k, words);

		SIM_EXPECT(rc == 0, "block %" PRIu32 ": %d", k, rc);
		SIM_EXPECT(look(m, k, words, from, b->begun, &seen[k]),
			   "block %" PRIu32 " begins with %" PRIx64 " and ends with %" PRIx64
			   "; stable %" PRIu64 ", begun %" PRIu64,
			   k, words[0], words[WORDS - 1], from, b->begun);
		found[k] = words[0];
	}
	/* Damage to the last records that were synced looks like a crash, and parts of them may be below. */
	if (t->p->is_prefix && m->is_sure && check_prefix(m, seen) != 0)
		return -1;
	/* At once: no crash comes between. */
	for (uint32_t k = 0; c != NULL && k < BLOCKS; k++)
		m->blocks[k] = (struct block){ .base = found[k] };
	m->n = 0;
	m->life++;
	return 0;
}

/* ---- traffic ---- */

static bool goes_on(const struct traffic *t)
{
	return now_ns() < t->until && t->m->n < LOG_MAX;
}

static CO_FN int request(struct chan *c, const struct model *m, uint32_t number, unsigned fl)
{
	static uint64_t buffers[WRITERS][LEN_MAX * WORDS];
	const struct entry *e = &m->log[number];
	uint64_t *words = buffers[e->block / AREA];
	const struct ext ext = { &obj_none, (uint64_t)e->block * BLOCK, (uint64_t)e->len * BLOCK };
	struct iovec v;
	struct iov iov = iov_one(&v, words, ext.len);

	if (e->is_zero)
		return sim_chance(300000)
			       ? ch_trim(c, ext, fl)
			       : ch_zero(c, ext, fl | (sim_chance(500000) ? IO_PUNCH : 0));
	for (unsigned k = 0; k < e->len * WORDS; k++)
		words[k] = word_of(m, number);
	return ch_write(c, ext, &iov, fl);
}

static CO_FN int write_some(struct chan *c, struct model *m, uint32_t area)
{
	const uint32_t number = ++m->n;
	struct entry *e = &m->log[number];
	unsigned fl = sim_chance(50000) ? IO_FUA : 0;
	int rc;

	*e = (struct entry){ .len = 1 + (uint32_t)sim_below(sim_chance(300000) ? LEN_MAX : 2),
			     .begun = ++m->time,
			     .is_zero = sim_chance(150000) };
	e->block = area * AREA + (uint32_t)sim_below(AREA - e->len);
	for (uint32_t k = e->block; k < e->block + e->len; k++)
		m->blocks[k].begun = number;
	rc = request(c, m, number, fl);
	e->has_failed = rc != 0;
	if (rc != 0)
		return rc;
	e->answered = ++m->time;
	for (uint32_t k = e->block; k < e->block + e->len; k++) {
		m->blocks[k].answered = number;
		if (fl & IO_FUA)
			m->blocks[k].flushed = number;
	}
	return 0;
}

struct fiber {
	struct traffic *t;
	uint32_t number;
};

static CO_FN void weather_of(void *arg)
{
	const struct traffic *t = arg;

	weather(t->until);
}

/* In the middle of it nobody writes for a while: the journal gets empty. */
static CO_FN void pause_together(const struct traffic *t)
{
	const uint64_t from = t->until - t->p->ns / 2, ns = t->p->idle_ns;

	if (ns && now_ns() >= from && now_ns() < from + ns)
		co_sleep(from + ns - now_ns() + sim_below(MS));
}

static CO_FN void write_on(void *arg)
{
	const struct fiber f = *(struct fiber *)arg;
	struct chan *c = volume_chan(&f.t->volume);

	while (c != NULL && goes_on(f.t)) {
		int rc = write_some(c, f.t->m, f.number);

		if (rc != 0) {
			sim_trace("write: %d", rc);
			co_sleep(20 * MS);
		}
		if (sim_chance(500000))
			co_sleep(sim_below(2 * f.t->p->pause_ns));
		pause_together(f.t);
	}
}

static CO_FN void read_on(void *arg)
{
	const struct fiber f = *(struct fiber *)arg;
	struct chan *c = volume_chan(&f.t->volume);
	struct seen seen;

	while (c != NULL && goes_on(f.t)) {
		const uint32_t block = (uint32_t)sim_below(BLOCKS);
		const struct block *b = &f.t->m->blocks[block];
		const uint64_t from = b->answered;
		uint64_t words[WORDS];
		int rc = read_block(c, block, words);

		if (rc == 0 && !look(f.t->m, block, words, from, b->begun, &seen))
			(void)sim_failed(__FILE__, __LINE__,
					 "block %" PRIu32 " reads as %" PRIx64 "; answered %" PRIu64
					 ", begun %" PRIu64,
					 block, words[0], from, b->begun);
		co_sleep(sim_below(2 * f.t->p->pause_ns));
	}
}

static CO_FN void flush_on(void *arg)
{
	const struct fiber f = *(struct fiber *)arg;
	struct chan *c = volume_chan(&f.t->volume);
	uint64_t answered[BLOCKS];

	while (c != NULL && goes_on(f.t)) {
		for (unsigned k = 0; k < BLOCKS; k++)
			answered[k] = f.t->m->blocks[k].answered;
		if (ch_flush(c) == 0)
			for (unsigned k = 0; k < BLOCKS; k++)
				f.t->m->blocks[k].flushed =
					MAX(f.t->m->blocks[k].flushed, answered[k]);
		co_sleep(sim_below(20 * f.t->p->pause_ns));
	}
}

static CO_FN void run_traffic(struct traffic *t)
{
	struct fiber fibers[WRITERS + 3];
	struct co_group g = CO_GROUP_INIT;

	t->until = now_ns() + t->p->ns;
	if (t->p->has_weather)
		co_group_spawn(&g, weather_of, t);
	for (uint32_t k = 0; k < ARRAY_LEN(fibers); k++) {
		fibers[k] = (struct fiber){ t, k };
		co_group_spawn(&g,
			       k < WRITERS    ? write_on
			       : k == WRITERS ? read_on
					      : flush_on,
			       &fibers[k]);
	}
	co_group_wait(&g);
}

/* ---- a life ---- */

/* An orderly end leaves nothing behind: below is all that was answered. */
static CO_FN int check_below(struct traffic *t)
{
	struct err err = { "" };
	int rc;

	SIM_EXPECT(volume_open(&t->volume, t->p->below, &err) == 0, "%s", err.msg);
	for (unsigned k = 0; k < BLOCKS; k++)
		t->m->blocks[k].flushed = t->m->blocks[k].answered;
	rc = check_all(t);
	SIM_EXPECT(volume_close(&t->volume) == 0);
	return rc;
}

/* Some bits of one of the journal's files. */
static void flip(struct model *m)
{
	char path[64];

	(void)snprintf(path, sizeof(path), "/disk/c/journal-%06u", 1 + (unsigned)sim_below(4));
	if (sim_flip(path, sim_below(256 * KI - 1024), 1024, 1 + (unsigned)sim_below(4)) == 0)
		m->is_sure = false;
}

/* It may refuse what it cannot read, and then says why. */
static int judge_refusal(const struct plan *p, const struct err *err)
{
	static const char *const words[] = { "is damaged", "is missing", "newer version",
					     "another volume" };

	for (unsigned k = 0; k < ARRAY_LEN(words) && p->is_flipped; k++)
		if (strstr(err->msg, words[k]))
			return 0;
	return sim_failed(__FILE__, __LINE__, "%s", err->msg);
}

static CO_FN int make(const struct plan *p, struct model *m)
{
	if (!m->is_made && strstr(p->chain, "sharded") &&
	    volume_create(p->chain, (uint64_t)BLOCKS * BLOCK) != 0)
		return -1;
	if (!m->is_made)
		m->is_made = m->is_sure = true;
	return 0;
}

static CO_FN int live(const struct plan *p, struct model *m)
{
	struct traffic t = { .p = p, .m = m };
	struct err err = { "" };
	int rc;

	sim_remote_fails(-EAGAIN, 0, 0);
	if (make(p, m) != 0)
		return -1;
	if (p->is_flipped && sim_life() > 0)
		flip(m);
	if (volume_open(&t.volume, p->chain, &err) != 0)
		return judge_refusal(p, &err);
	rc = check_all(&t);
	sim_remote_fails(-EAGAIN, p->fails, UINT64_MAX);
	if (rc == 0 && sim_life() == 0)
		sim_set_faults(&p->faults);
	if (rc == 0)
		run_traffic(&t);
	sim_remote_fails(-EAGAIN, 0, 0);
	(void)volume_close(&t.volume); /* fails after a fault */
	if (rc || p->faults.sync_ppm)
		return rc;
	return check_below(&t);
}

#define CACHE(more)                                                                               \
	"cache[disk=/disk/c,size=1Mi,mode=writeback,lag=100ms,uploads=4,mem=1Mi,granule=8Ki" more \
	"]:"
#define DISK  "remote[size=384Ki]"
#define RETRY "retry[deadline=2m]:"

#define PLAN(name, ...)                                       \
	static CO_FN int name(void *model)                    \
	{                                                     \
		static const struct plan p = { __VA_ARGS__ }; \
		return live(&p, model);                       \
	}
#define SHORT .ns = 300 * MS, .pause_ns = MS

PLAN(disk_power, SHORT, .chain = CACHE("") DISK, .below = DISK, .is_prefix = true, .fails = 30000)
PLAN(disk_kill, SHORT, .chain = CACHE("") DISK, .below = DISK, .is_prefix = true, .keeps_all = true,
     .fails = 30000)
/* Long enough for the journal to be emptied, which is when some of the crashes come. */
PLAN(disk_idle, .chain = "cache[disk=/disk/c,size=1Mi,mode=writeback,lag=10ms]:" DISK,
     .below = DISK, .ns = 2300 * MS, .idle_ns = 1013 * MS, .pause_ns = 40 * MS, .is_prefix = true)
PLAN(objects, SHORT, .chain = "sharded[size=32Ki]:" CACHE("") RETRY "remote",
     .below = "sharded:remote", .fails = 30000)
PLAN(above_sharded, SHORT, .chain = CACHE("") "sharded[size=32Ki,age=50ms]:" RETRY "remote",
     .below = "sharded:remote", .is_prefix = true, .fails = 30000)
PLAN(in_memory, SHORT,
     .chain = "sharded[size=32Ki]:cache[mode=writeback,size=1Mi,lag=100ms,mem=1Mi]:" RETRY "remote",
     .below = "sharded:remote", .fails = 30000)
PLAN(remote_on_disk, SHORT, .chain = CACHE(",durability=remote") DISK, .below = DISK,
     .is_prefix = true, .fails = 30000)
PLAN(bad_disk, SHORT, .chain = CACHE("") DISK, .below = DISK, .is_prefix = true, .fails = 30000,
     .faults = { .read_ppm = 2000, .write_ppm = 2000, .sync_ppm = 2000, .short_ppm = 20000 })
PLAN(day, .chain = "sharded[size=32Ki]:" CACHE("") RETRY "remote", .below = "sharded:remote",
     .ns = UINT64_C(24) * 3600 * 1000 * MS, .pause_ns = 100000 * MS, .has_weather = true)
PLAN(full_disk, .chain = "cache[disk=/disk/c,size=8Mi,mode=writeback,lag=100ms,uploads=4]:" DISK,
     .below = DISK, .ns = 300 * MS, .pause_ns = MS / 4, .is_prefix = true,
     .faults = { .space = 900 * KI })
PLAN(flipped, SHORT, .chain = CACHE("") DISK, .below = DISK, .is_prefix = true, .is_flipped = true)

#define CRASHES(how) .model_len = sizeof(struct model), .crash = how, .crashes = 3, .seeds = 25

static const struct sim_case cases[] = {
	{ .name = "disk-power",
	  .scenario = disk_power,
	  .recover = disk_power,
	  CRASHES(SIM_POWER_CUT) },
	{ .name = "disk-kill", .scenario = disk_kill, .recover = disk_kill, CRASHES(SIM_KILL) },
	{ .name = "disk-idle",
	  .scenario = disk_idle,
	  .recover = disk_idle,
	  CRASHES(SIM_ANY_CRASH) },
	{ .name = "objects", .scenario = objects, .recover = objects, CRASHES(SIM_ANY_CRASH) },
	{ .name = "above-sharded",
	  .scenario = above_sharded,
	  .recover = above_sharded,
	  CRASHES(SIM_ANY_CRASH) },
	{ .name = "memory", .scenario = in_memory, .recover = in_memory, CRASHES(SIM_ANY_CRASH) },
	{ .name = "disk-remote",
	  .scenario = remote_on_disk,
	  .recover = remote_on_disk,
	  CRASHES(SIM_ANY_CRASH) },
	{ .name = "bad-disk", .scenario = bad_disk, .recover = disk_power, CRASHES(SIM_ANY_CRASH) },
	{ .name = "objects-24h",
	  .scenario = day,
	  .model_len = sizeof(struct model),
	  .is_once = true },
	{ .name = "flipped",
	  .scenario = flipped,
	  .recover = flipped,
	  .model_len = sizeof(struct model),
	  .crash = SIM_ANY_CRASH,
	  .seeds = 40 },
	{ .name = "full-disk",
	  .scenario = full_disk,
	  .recover = disk_power,
	  CRASHES(SIM_ANY_CRASH) },
};

int main(int argc, char **argv)
{
	return sim_main(argc, argv, cases, ARRAY_LEN(cases));
}
