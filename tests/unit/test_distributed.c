/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * distributed: where objects come to lie, what is read and written while nodes are away, what survives a restart,
 * and that replicas are equal again afterwards. Nodes are looked at below their fault layers, object by object.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "conformance.h"
#include "dist_help.h"
#include "layer/distributed/distributed.h"
#include "nbdrs/reactor.h"

/* --- Where it lies ---------------------------------------------------------------------------- */

static CO_FN int layout(void *arg)
{
	static const uint8_t nodes[3][2] = { { 0, 1 }, { 0, 2 }, { 1, 2 } };
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct dist_counting k = { .prefix = "block-7" };
	char name[32];

	CHECK(r, dist_put_byte(c, "size", '5', 3) == 0);
	for (unsigned n = 0; n < 12; n++) {
		(void)snprintf(name, sizeof(name), "block-%u", n);
		CHECK(r, dist_put_byte(c, name, (uint8_t)n, DIST_LEN + n) == 0);
	}
	for (unsigned n = 0; n < 12; n++)
		for (unsigned h = 0; h < 2; h++) {
			(void)snprintf(name, sizeof(name), "block-%u-%u", n, h);
			for (unsigned i = 0, at = nodes[n % 3][h]; i < 3; i++)
				CHECK(r,
				      dist_read_byte(dist_node(r, i), name, 0, DIST_LEN) ==
					      (i == at ? (int)n : -ENOENT),
				      "%s on node %u", name, i);
		}
	for (unsigned i = 0; i < 3; i++)
		CHECK(r, dist_read_byte(dist_node(r, i), "size", 0, 3) == '5' &&
				 dist_count_of(dist_node(r, i), "block-") == 8);
	/* Other programs' objects are none of ours. */
	CHECK(r, dist_put_byte(dist_node(r, 0), "block-20", 'x', 1) == 0 &&
			 dist_put_byte(dist_node(r, 0), "block-2-0", 'x', 1) == 0);
	CHECK(r, dist_count_of(c, "") == 13 && dist_count_of(c, "block-1") == 3 &&
			 dist_count_of(c, "si") == 1);
	CHECK(r,
	      ch_list(c, "block-7", dist_count_one, &k) == 0 && k.n == 1 && k.size == DIST_LEN + 7);
	CHECK(r, dist_put_byte(c, "block-1-1", 'x', 1) == -EINVAL &&
			 dist_put_byte(c, "stale-x", 'x', 1) == -EINVAL);
	CHECK(r, dist_del_one(c, "block-7") == 0 && dist_count_of(c, "block-7") == 0 &&
			 dist_read_byte(c, "block-7", 0, 1) == -ENOENT);
	CHECK(r, dist_count_of(dist_node(r, 0), "block-7") == 0 &&
			 dist_count_of(dist_node(r, 2), "block-7") == 0);
	/* nbd-rs keeps the size on node 0 only. */
	CHECK(r, dist_del_one(dist_node(r, 1), "size") == 0 &&
			 dist_del_one(dist_node(r, 2), "size") == 0);
	CHECK(r, dist_read_byte(c, "size", 0, 3) == '5' && dist_count_of(c, "size") == 1);
	return 0;
}

static void test_layout(void **state)
{
	dist_run("distributed[replicas=2]{mem,mem,mem}", layout);
	dist_run(
		"distributed[replicas=2,quorum=1,read=first]{mem[partial=off],mem,mem[partial=off]}",
		layout);
}

/* --- A node that is away ---------------------------------------------------------------------- */

/* block-0 and block-3 lie on nodes 0 and 1. */
static CO_FN int away(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);

	CHECK(r, dist_put_byte(c, "block-0", 'a', DIST_LEN) == 0 &&
			 dist_put_byte(c, "block-3", 'a', DIST_LEN) == 0);
	CHECK(r, ch_flush(c) == 0, "or one of them may still be on its way");
	CHECK(r, dist_node_off(r, 1, true) == 0);
	for (uint8_t b = 'b'; b < 'h'; b++) {
		/* The first one finds out; FUA waits for that. */
		CHECK(r, dist_write_byte(c, "block-0", 0, b, DIST_LEN, b == 'b' ? IO_FUA : 0) == 0);
		/* Recorded once, and before the answer. */
		CHECK(r, dist_count_of(dist_node(r, 0), "stale-block-0-1-") == 1, "%d",
		      dist_count_of(dist_node(r, 0), "stale-block-0-1-"));
		CHECK(r, dist_read_byte(c, "block-0", 0, DIST_LEN) == b);
	}
	CHECK(r, dist_count_of(dist_node(r, 0), "stale-") == 1, "block-3 was not written");
	CHECK(r, dist_put_byte(c, "block-3", 'z', 100) == 0 &&
			 dist_count_of(dist_node(r, 0), "stale-block-3-1-") == 1);
	CHECK(r, dist_read_byte(dist_node(r, 1), "block-0-1", 0, DIST_LEN) == 'a');
	CHECK(r,
	      !dist_status_of(r).is_good && strstr(dist_status_of(r).all, "node-1: away, 2 stale"),
	      "%s", dist_status_of(r).all);
	/* Back, and never an old byte. */
	CHECK(r, dist_node_off(r, 1, false) == 0);
	for (unsigned i = 0; i < 50; i++) {
		CHECK(r, dist_read_byte(c, "block-0", 0, DIST_LEN) == 'g' &&
				 dist_read_byte(c, "block-3", 0, 100) == 'z');
		co_yield();
	}
	if (dist_wait_good(r))
		return -1;
	CHECK(r, dist_read_byte(dist_node(r, 1), "block-0-1", 0, DIST_LEN) == 'g' &&
			 dist_read_byte(dist_node(r, 1), "block-3-1", 0, 100) == 'z');
	CHECK(r, dist_read_byte(c, "block-3", 0, 101) == -EILSEQ, "shorter now, zeroes behind it");
	return dist_same_everywhere(r, 0) || dist_same_everywhere(r, 3) ? -1 : 0;
}

/* What is known of stale replicas is on the nodes: another daemon finds it there. */
static CO_FN int away_restart(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);

	CHECK(r, dist_put_byte(c, "block-0", 'a', DIST_LEN) == 0 &&
			 dist_put_byte(c, "block-3", 'a', DIST_LEN) == 0);
	CHECK(r, ch_flush(c) == 0 && dist_node_off(r, 0, true) == 0);
	CHECK(r, dist_write_byte(c, "block-0", 0, 'b', DIST_LEN, 0) == 0 &&
			 dist_del_one(c, "block-3") == 0);
	CHECK(r, dist_node_off(r, 0, false) == 0);
	if (store_reopen(r))
		return -1;
	c = store_chan(r);
	for (unsigned i = 0; i < 50; i++) {
		CHECK(r, dist_read_byte(c, "block-0", 0, DIST_LEN) == 'b', "%d",
		      dist_read_byte(c, "block-0", 0, DIST_LEN));
		CHECK(r, dist_read_byte(c, "block-3", 0, DIST_LEN) == -ENOENT &&
				 dist_count_of(c, "block-3") == 0);
	}
	if (dist_wait_good(r))
		return -1;
	CHECK(r, dist_read_byte(dist_node(r, 0), "block-0-0", 0, DIST_LEN) == 'b' &&
			 dist_count_of(dist_node(r, 0), "block-3") == 0);
	return 0;
}

/* quorum = replicas: a write fails, reads go on and don't flip, and afterwards it goes on where it can. */
static CO_FN int no_quorum(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	int before, after;

	CHECK(r, dist_put_byte(c, "block-0", 'a', DIST_LEN) == 0);
	CHECK(r, dist_node_off(r, 1, true) == 0);
	CHECK(r, dist_write_byte(c, "block-0", 0, 'b', DIST_LEN, 0) == -ETIMEDOUT);
	before = dist_read_byte(c, "block-0", 0, DIST_LEN);
	CHECK(r, before == 'a' || before == 'b');
	CHECK(r, dist_put_byte(c, "block-4", 'c', DIST_LEN) == 0, "on nodes 0 and 2");
	CHECK(r, dist_node_off(r, 1, false) == 0);
	for (unsigned i = 0; i < 20; i++) {
		after = dist_read_byte(c, "block-0", 0, DIST_LEN);
		CHECK(r, after == before, "%c, then %c", before, after);
	}
	/* Mended at once where a write needs it. */
	CHECK(r, dist_write_byte(c, "block-0", 4096, 'd', 4096, 0) == 0);
	CHECK(r, dist_read_byte(c, "block-0", 0, 4096) == before &&
			 dist_read_byte(c, "block-0", 4096, 4096) == 'd');
	return dist_wait_good(r) || dist_same_everywhere(r, 0) ? -1 : 0;
}

/* All fail, one of them after doing it: whatever is read then is what stays. */
static CO_FN int all_fail(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	int first;

	CHECK(r, dist_put_byte(c, "block-0", 'a', DIST_LEN) == 0);
	CHECK(r, dist_node_off(r, 0, true) == 0 && dist_node_off(r, 1, true) == 0);
	CHECK(r, dist_write_byte(c, "block-0", 0, 'b', DIST_LEN, 0) == -ETIMEDOUT);
	CHECK(r, dist_read_byte(dist_node(r, 0), "block-0-0", 0, DIST_LEN) == 'a');
	CHECK(r, dist_read_byte(dist_node(r, 1), "block-0-1", 0, DIST_LEN) == 'b');
	CHECK(r, dist_node_off(r, 0, false) == 0 && dist_node_off(r, 1, false) == 0);
	first = dist_read_byte(c, "block-0", 0, DIST_LEN);
	CHECK(r, first == 'a' || first == 'b');
	for (unsigned i = 0; i < 50; i++)
		CHECK(r, dist_read_byte(c, "block-0", 0, DIST_LEN) == first);
	if (dist_wait_good(r) || dist_same_everywhere(r, 0))
		return -1;
	CHECK(r, dist_read_byte(dist_node(r, 0), "block-0-0", 0, DIST_LEN) == first);
	return 0;
}

static void test_away(void **state)
{
	dist_run("distributed[replicas=2,quorum=1,recheck=5ms]{mem," DIST_OFF(1) ":mem,mem}", away);
	dist_run("distributed[replicas=2,quorum=1,recheck=5ms,read=first]{mem," DIST_OFF(
			 1) ":mem,mem}",
		 away);
	/* Nothing is caught up before the restart. */
	dist_run("distributed[replicas=2,quorum=1,recheck=1h]{" DIST_OFF(0) ":mem,mem,mem}",
		 away_restart);
	dist_run("distributed[replicas=3,quorum=2,recheck=1h]{" DIST_OFF(0) ":mem,mem,mem,mem}",
		 away_restart);
}

static void test_no_quorum(void **state)
{
	dist_run("distributed[replicas=2,recheck=5ms]{mem," DIST_OFF(1) ":mem,mem}", no_quorum);
	dist_run("distributed[replicas=2,recheck=5ms]{fault[file=@/off0,ops=write]:mem,"
		 "fault[file=@/off1,ops=write,when=after,error=ETIMEDOUT]:mem,mem}",
		 no_quorum);
	dist_run(
		"distributed[replicas=2,recheck=5ms]{fault[file=@/off0,ops=write,error=ETIMEDOUT]:mem,"
		"fault[file=@/off1,ops=write,when=after,error=ETIMEDOUT]:mem,mem}",
		all_fail);
}

/* --- Answered before all have it; flush ------------------------------------------------------- */

/* Node 1 takes 500 ms for a write. */
static CO_FN int behind(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);

	CHECK(r, dist_write_byte(c, "block-0", 0, 'a', DIST_LEN, 0) == 0 &&
			 dist_write_byte(c, "block-3", 0, 'b', DIST_LEN, 0) == 0);
	CHECK(r, dist_read_byte(dist_node(r, 1), "block-0-1", 0, DIST_LEN) == -ENOENT,
	      "answered before");
	for (unsigned i = 0; i < 20; i++)
		CHECK(r, dist_read_byte(c, "block-0", 0, DIST_LEN) == 'a' &&
				 dist_read_byte(c, "block-3", 0, DIST_LEN) == 'b');
	CHECK(r, ch_flush(c) == 0);
	CHECK(r, dist_read_byte(dist_node(r, 1), "block-0-1", 0, DIST_LEN) == 'a' &&
			 dist_read_byte(dist_node(r, 1), "block-3-1", 0, DIST_LEN) == 'b');
	CHECK(r, dist_status_of(r).is_good, "%s", dist_status_of(r).all);
	/* Order: the second one must not be overtaken on the slow node. */
	CHECK(r, dist_write_byte(c, "block-0", 0, 'c', DIST_LEN, 0) == 0 &&
			 dist_write_byte(c, "block-0", 0, 'd', DIST_LEN, 0) == 0);
	CHECK(r,
	      ch_flush(c) == 0 && dist_read_byte(dist_node(r, 1), "block-0-1", 0, DIST_LEN) == 'd');
	/* FUA waits. */
	CHECK(r, dist_write_byte(c, "block-0", 0, 'e', DIST_LEN, IO_FUA) == 0);
	CHECK(r, dist_read_byte(dist_node(r, 1), "block-0-1", 0, DIST_LEN) == 'e');
	/* It fails after the answer: recorded by the next flush at the latest. */
	CHECK(r, dist_node_off(r, 1, true) == 0);
	CHECK(r, dist_write_byte(c, "block-0", 0, 'f', DIST_LEN, 0) == 0 && ch_flush(c) == 0);
	CHECK(r, dist_count_of(dist_node(r, 0), "stale-block-0-1-") == 1 &&
			 dist_read_byte(c, "block-0", 0, DIST_LEN) == 'f');
	CHECK(r, dist_node_off(r, 1, false) == 0);
	return dist_wait_good(r) || dist_same_everywhere(r, 0) ? -1 : 0;
}

/* A node that fails to flush may have lost what it was given. */
static CO_FN int flush_fails(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	const struct dist *d = dist_of(r);
	bool is_enough = d->quorum < d->replicas;

	CHECK(r, dist_write_byte(c, "block-0", 0, 'a', DIST_LEN, 0) == 0 && ch_flush(c) == 0);
	CHECK(r, dist_write_byte(c, "block-3", 0, 'b', DIST_LEN, 0) == 0 &&
			 dist_write_byte(c, "block-1", 0, 'b', DIST_LEN, 0) == 0);
	CHECK(r, dist_node_off(r, 1, true) == 0);
	CHECK(r, ch_flush(c) == (is_enough ? 0 : -EIO));
	CHECK(r,
	      dist_count_of(dist_node(r, 0), "stale-") == 1 &&
		      dist_count_of(dist_node(r, 0), "stale-block-3-1-") == 1,
	      "only what was not flushed there");
	/* What it lost. */
	CHECK(r, dist_write_byte(dist_node(r, 1), "block-3-1", 0, 'x', DIST_LEN, 0) == 0);
	for (unsigned i = 0; i < 20; i++)
		CHECK(r, dist_read_byte(c, "block-3", 0, DIST_LEN) == 'b');
	CHECK(r, ch_flush(c) == (is_enough ? 0 : -EIO), "it is still not safe");
	CHECK(r, dist_node_off(r, 1, false) == 0);
	if (dist_wait_good(r))
		return -1;
	CHECK(r, ch_flush(c) == 0);
	return dist_same_everywhere(r, 3);
}

struct turning {
	struct dist *d;
	struct co_group group;
	bool stop;
};

/* What the repair fiber does to the order of marks while a flush looks through them. */
static CO_FN void turn(void *arg)
{
	struct turning *t = arg;

	while (!t->stop) {
		pthread_mutex_lock(&t->d->lock);
		if (!list_empty(&t->d->marks))
			list_add(&t->d->marks, list_pop(&t->d->marks));
		pthread_mutex_unlock(&t->d->lock);
		co_sleep(200000);
	}
}

/* A flush that owes several objects looks at each of them. */
static CO_FN int all_debts(void *arg)
{
	struct store_run *r = arg;
	struct turning t = { .d = dist_of(r), .group = CO_GROUP_INIT };
	struct dist *d = t.d;
	int rc;

	for (unsigned n = 0; n < 96; n += 3) { /* on nodes 0 and 1 */
		struct place at;
		char name[32];

		(void)snprintf(name, sizeof(name), "block-%u", n);
		CHECK(r, dist_put_byte(store_chan(r), name, 'a', DIST_LEN) == 0);
		(void)place_name(d->placing, name, &at);
		/* As after a flush that node 1 failed; every other one was stale before. */
		pthread_mutex_lock(&d->lock);
		mark_set_stale(d, mark_need(d, name), &at, 2);
		mark_set_owed(d, mark_find(d, name), n % 2 == 0);
		pthread_mutex_unlock(&d->lock);
	}
	co_group_spawn(&t.group, turn, &t);
	rc = ch_flush(store_chan(r));
	t.stop = true;
	co_group_wait(&t.group);
	CHECK(r, rc == 0 && d->owed_n == 0, "flush: %s, and %u objects are not safe", err_name(rc),
	      (unsigned)d->owed_n);
	return 0;
}

static void count_flushes(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum)
{
	if (strcmp(l->ops->name, "mem") == 0)
		*(uint64_t *)arg += sum->ops[CH_FLUSH];
}

static CO_FN int flush_once(struct store_run *r, unsigned i, void *arg)
{
	return ch_flush(store_chan(r));
}

/* Those who wait for a flush that is on its way share the next one. */
static CO_FN int shared_flush(void *arg)
{
	struct store_run *r = arg;
	uint64_t n = 0;

	CHECK(r, dist_write_byte(store_chan(r), "block-0", 0, 'a', DIST_LEN, 0) == 0);
	CHECK(r, store_fibers(r, 60, flush_once, NULL) == 0);
	chain_each(r->chain, count_flushes, &n);
	CHECK(r, n >= 6 && n <= 3 * 15, "%ju flushes of 3 nodes for 60", (uintmax_t)n);
	return 0;
}

static void test_flush(void **state)
{
	dist_run("distributed[replicas=2,quorum=1,recheck=5ms]"
		 "{mem,delay[write=500ms]:fault[file=@/off1,ops=write]:mem,mem}",
		 behind);
	/* Copying to it fails as well meanwhile. */
	dist_run(
		"distributed[replicas=2,quorum=1,recheck=5ms]{mem,fault[file=@/off1,ops=flush|put]:mem,mem}",
		flush_fails);
	dist_run(
		"distributed[replicas=2,recheck=5ms]{mem,fault[file=@/off1,ops=flush|put]:mem,mem}",
		flush_fails);
	dist_run("distributed[replicas=2,recheck=1h]{mem,delay[write=2ms]:mem,mem}", all_debts);
	dist_run("distributed[replicas=2]{mem,delay[flush=20ms]:mem,mem}", shared_flush);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_layout),
		cmocka_unit_test(test_away),
		cmocka_unit_test(test_no_quorum),
		cmocka_unit_test(test_flush),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = cmocka_run_group_tests_name("distributed", tests, NULL, NULL);
	conform_stop();
	return failed;
}
