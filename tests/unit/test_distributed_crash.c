/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * distributed, killed while it writes: replicas differ then, and still each place reads the same every time, whichever
 * node serves it, and is not older than what was flushed. Recovery is cut off by the next kill as well.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "conformance.h"
#include "dist_help.h"
#include "kill_child.h"
#include "layer/distributed/distributed.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"
#include "temp.h"

enum { ROUNDS = 15, ROUNDS_FULL = 100, SHARDS = 24, SLOTS = 4, SLOT = 4096, FIBERS = 8, NODES = 3 };

/* Of slot s of a shard: SLOT times the same generation. */
struct slot_word {
	uint64_t generation, where;
};

/* ---- the child ---- */

/* A line of the pipe: slot `where` was answered, or (flush) all that the fiber wrote before was flushed. */
struct said {
	uint32_t where, generation;
	uint32_t is_flushed;
};

static void fill_slot(uint8_t *data, uint64_t generation, uint64_t where)
{
	const struct slot_word w = { generation, where };

	for (size_t at = 0; at < SLOT; at += sizeof(w))
		memcpy(data + at, &w, sizeof(w));
}

/* Slots of its own shards, one after the other, at random, until somebody kills us. */
static CO_FN void write_for_ever(void *arg)
{
	struct kill_writer w = *(struct kill_writer *)arg;
	uint64_t random = w.first * 31 + w.number;
	_cleanup_free_ uint8_t *data = malloc((size_t)SLOTS * SLOT);
	int rc = 0;
	struct chan *c = chain_chan(w.chain, &rc);

	for (uint64_t generation = w.first; rc == 0 && data != NULL; generation++) {
		unsigned shard =
			w.number + FIBERS * (unsigned)random_below(&random, SHARDS / FIBERS);
		unsigned slot = (unsigned)random_below(&random, SLOTS);
		bool is_put = random_below(&random, 6) == 0;
		struct said said = { shard * SLOTS + slot, (uint32_t)generation, 0 };
		char name[32];
		struct obj obj;
		struct iovec v;

		place_shard_name(shard, name);
		(void)obj_set(&obj, name);
		for (unsigned i = 0; i < SLOTS; i++)
			fill_slot(data + (size_t)i * SLOT, generation,
				  shard * SLOTS + (is_put ? i : slot));
		if (is_put) {
			struct iov iov = iov_one(&v, data, (size_t)SLOTS * SLOT);
			struct put put = { .obj = &obj, .iov = &iov };

			rc = ch_put(c, &put, NULL);
		} else {
			struct iov iov = iov_one(&v, data, SLOT);

			rc = ch_write(c, (struct ext){ &obj, (uint64_t)slot * SLOT, SLOT }, &iov,
				      0);
		}
		if (rc == 0 && random_below(&random, 10) == 0)
			said.is_flushed = ch_flush(c) == 0;
		if (rc == 0 && write(w.pipe, &said, sizeof(said)) != sizeof(said))
			return;
		if (rc == -EAGAIN)
			rc = 0; /* a fault: old or new */
	}
	fprintf(stderr, "child: %s\n", err_name(rc));
}

/* ---- the parent ---- */

struct crash {
	char folder[256];
	char *text; /* of the chain that looks */
	bool forgets; /* the record is deleted before it is looked at: it was needed, then */
	uint64_t flushed[SHARDS * SLOTS]; /* generation that a flush promised */
	uint64_t last;                    /* generation anybody has seen */
	uint64_t seen[SHARDS * SLOTS];    /* since the last kill; UNKNOWN = not read yet */
	unsigned flips, unread;           /* reads: of something else than was seen; that failed */
	char failure[600];
};

/* Lets the child say so much, kills it, takes in what it had said by then. */
static void kill_after(struct crash *k, pid_t pid, int fd, unsigned answers)
{
	uint64_t answered[SHARDS * SLOTS] = { 0 };
	struct said s;

	for (unsigned n = 0; read(fd, &s, sizeof(s)) == sizeof(s); n++) {
		assert_true(s.where < SHARDS * SLOTS);
		answered[s.where] = s.generation;
		k->last = MAX(k->last, s.generation);
		/* What this fiber had said before; another one's lines may have been written later than its flush. */
		for (unsigned i = 0; s.is_flushed && i < SHARDS * SLOTS; i++)
			if (i / SLOTS % FIBERS == s.where / SLOTS % FIBERS)
				k->flushed[i] = MAX(k->flushed[i], answered[i]);
		if (n == answers)
			kill_child_kill(pid);
	}
	kill_child_wait(pid);
}

static CO_FN int crash_fail(struct crash *k, const char *what, unsigned where, uint64_t a,
			    uint64_t b)
{
	(void)snprintf(k->failure, sizeof(k->failure), "block-%u slot %u: %s: %ju, %ju",
		       where / SLOTS, where % SLOTS, what, (uintmax_t)a, (uintmax_t)b);
	return -EIO;
}

/* The generation in a slot; 0 = never written. An error when it is torn. */
static CO_FN int read_slot(struct crash *k, struct chan *c, unsigned where, uint64_t *generation)
{
	uint8_t data[SLOT / 2], want[SLOT];
	char name[32];
	struct obj obj;
	struct iovec v;
	struct iov iov = iov_one(&v, data, sizeof(data));
	struct slot_word w;
	int rc;

	/* The first half of it: frames are small. */
	place_shard_name(where / SLOTS, name);
	(void)obj_set(&obj, name);
	rc = ch_read(c, (struct ext){ &obj, (uint64_t)(where % SLOTS) * SLOT, sizeof(data) }, &iov,
		     0);
	*generation = 0;
	if (rc != 0)
		return rc == -ENOENT ? 0 : rc;
	memcpy(&w, data, sizeof(w));
	fill_slot(want, w.generation, where);
	if (w.generation != 0 && memcmp(data, want, sizeof(data)) != 0)
		return crash_fail(k, "torn", where, w.generation, w.where);
	*generation = w.generation;
	return 0;
}

static void switch_node(const struct crash *k, unsigned node, bool is_off)
{
	char path[300];

	(void)snprintf(path, sizeof(path), "%s/off%u", k->folder, node);
	if (is_off)
		close(open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
	else
		(void)unlink(path);
}

/* What could not be read: its only good replica is away. */
#define UNKNOWN UINT64_MAX

static CO_FN int read_or_not(struct crash *k, struct chan *c, unsigned where, uint64_t *generation)
{
	int rc = read_slot(k, c, where, generation);

	if (rc == 0 || k->failure[0])
		return rc;
	*generation = UNKNOWN;
	return 0;
}

static void compare_slot(struct crash *k, unsigned where, uint64_t now)
{
	k->unread += now == UNKNOWN;
	if (now == UNKNOWN || now == k->seen[where])
		return;
	if (k->seen[where] != UNKNOWN)
		k->flips++;
	k->seen[where] = now;
	k->last = MAX(k->last, now);
}

/* Reads it all once, and again with each node in turn away: it is the same, or only the one that is away has it. */
static CO_FN int look_at_slots(struct crash *k, struct chan *c)
{
	uint64_t now = 0;
	int rc = 0;

	for (unsigned i = 0; i < SHARDS * SLOTS && rc == 0; i++) {
		rc = read_or_not(k, c, i, &now);
		if (rc == 0 && !k->forgets && now < k->flushed[i])
			return crash_fail(k, "older than what was flushed", i, now, k->flushed[i]);
		compare_slot(k, i, now);
	}
	for (unsigned node = 0; node < NODES; node++) {
		switch_node(k, node, true);
		for (unsigned i = 0; i < SHARDS * SLOTS && rc == 0; i++) {
			rc = read_or_not(k, c, i, &now);
			compare_slot(k, i, now);
		}
		switch_node(k, node, false);
	}
	return rc;
}

static CO_FN int look(void *arg)
{
	struct crash *k = arg;
	struct spec *spec = NULL;
	struct chain *chain = NULL;
	struct chan *c = NULL;
	struct err err = { "" };
	int rc = spec_parse(k->text, &spec, &err);

	if (rc == 0)
		rc = chain_build_keyed(spec, false, &chain, &err);
	if (rc == 0)
		rc = chain_open(chain, &err);
	if (rc)
		(void)snprintf(k->failure, sizeof(k->failure), "%.500s", err.msg);
	else
		c = chain_chan(chain, &rc);
	if (c)
		rc = look_at_slots(k, c);
	if (rc && !k->failure[0])
		(void)snprintf(k->failure, sizeof(k->failure), "%s", err_name(rc));
	if (c)
		(void)chain_close(chain);
	chain_free(chain);
	spec_free(spec);
	return 0;
}

static void forget_record(const struct crash *k)
{
	char path[300];

	for (unsigned i = 0; i < NODES; i++) {
		(void)snprintf(path, sizeof(path), "%s/n%u/doubt", k->folder, i);
		(void)unlink(path);
	}
}

static void move_node(const struct crash *k, bool is_gone)
{
	char here[300], there[300];

	(void)snprintf(here, sizeof(here), "%s/n2", k->folder);
	(void)snprintf(there, sizeof(there), "%s/n2.gone", k->folder);
	assert_int_equal(is_gone ? rename(here, there) : rename(there, here), 0);
}

/* NBDRS_FULL=1: for longer. */
static unsigned rounds_n(void)
{
	const char *full = getenv("NBDRS_FULL");

	return full != NULL && strcmp(full, "1") == 0 ? ROUNDS_FULL : ROUNDS;
}

/* Kills many times, and counts what reads as this and as that. */
static unsigned crash_rounds(const char *child, const char *parent, bool forgets, bool may_miss,
			     unsigned *unread)
{
	struct crash k = { .forgets = forgets };
	char *child_text;
	uint64_t seed = 4711;
	const unsigned rounds = rounds_n();

	assert_int_equal(conform_folder(k.folder, "crash", true), 0);
	for (unsigned i = 0; i < NODES; i++) {
		char path[300];

		(void)snprintf(path, sizeof(path), "%s/n%u", k.folder, i);
		assert_int_equal(mkdir(path, 0700), 0);
	}
	child_text = conform_expand(child, k.folder);
	k.text = conform_expand(parent, k.folder);
	assert_true(child_text && k.text);
	for (unsigned round = 0; round < rounds && !k.failure[0]; round++) {
		int from = -1;
		pid_t pid = kill_child_start(child_text, k.last + 100, &from);

		kill_after(&k, pid, from, (unsigned)random_below(&seed, 60));
		close(from);
		if (forgets)
			forget_record(&k);
		/* Two kills in a row now and then: the first one's recovery is cut off. */
		if (random_below(&seed, 3) == 0)
			continue;
		memset(k.seen, 0xff, sizeof(k.seen)); /* UNKNOWN */
		if (may_miss && random_below(&seed, 2) == 0) {
			/* What is seen without node 2 is what is seen with it later. */
			move_node(&k, true);
			assert_int_equal(reactor_call_blocking(reactor_get(0), look, &k), 0);
			move_node(&k, false);
		}
		if (!k.failure[0])
			assert_int_equal(reactor_call_blocking(reactor_get(0), look, &k), 0);
		if (k.failure[0])
			fail_msg("round %u: %s", round, k.failure);
	}
	assert_int_equal(temp_remove(k.folder), 0);
	free(child_text);
	free(k.text);
	*unread = k.unread;
	return k.flips;
}

#define SLOW(i) "delay[write=200us,jitter=1ms]:file:@/n" #i "/"
#define OFF(i)  "fault[file=@/off" #i ",ops=read|stat,error=ETIMEDOUT]:file:@/n" #i "/"

#define BAD(i)  "fault[ops=write|put|flush,rate=5%,when=partly,error=EAGAIN]:" SLOW(i)

/* Node 0 is fast and good. */
static const struct {
	const char *options, *node1, *node2;
	bool may_miss; /* one node, at open */
} kinds[] = {
	{ "replicas=2", SLOW(1), SLOW(2), true },
	{ "replicas=3,quorum=2", SLOW(1), SLOW(2), true },
	{ "replicas=2,quorum=1,read=first", SLOW(1), SLOW(2), false },
	{ "replicas=2", BAD(1), SLOW(2), true },
	{ "replicas=3,quorum=2", BAD(1), BAD(2), true },
};

static void test_crash(void **state)
{
	char child[600], parent[400];

	for (unsigned i = 0; i < ARRAY_LEN(kinds); i++) {
		unsigned flips, unread, ignored;

		(void)snprintf(child, sizeof(child),
			       "distributed[%s,clean=20ms,recheck=10ms]{%s,%s,%s}",
			       kinds[i].options, "file:@/n0/", kinds[i].node1, kinds[i].node2);
		/* Nobody mends in the background what the test wants to see. */
		(void)snprintf(parent, sizeof(parent), "distributed[%s,recheck=1h]{%s,%s,%s}",
			       kinds[i].options, OFF(0), OFF(1), OFF(2));
		flips = crash_rounds(child, parent, false, kinds[i].may_miss, &unread);
		printf("%s, node 1 %.5s: %u kills: %u reads differ, %u fail\n", kinds[i].options,
		       kinds[i].node1, rounds_n(), flips, unread);
		assert_int_equal(flips, 0);
		if (i > 0)
			continue;
		flips = crash_rounds(child, parent, true, false, &ignored);
		printf("the same without the record: %u differ\n", flips);
		assert_true(flips > 0); /* or this test sees nothing */
	}
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_crash),
	};
	int failed;

	if (kill_child_is(argc, argv))
		return kill_child_main(argv, write_for_ever, FIBERS);
	conform_start();
	failed = cmocka_run_group_tests_name("distributed, killed", tests, NULL, NULL);
	conform_stop();
	return failed;
}
