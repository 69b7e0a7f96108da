/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What is made of the record of what is in doubt at open: replicas that differ are made equal before anybody sees
 * them, and what was not flushed counts as such.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "conformance.h"
#include "dist_help.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"

enum { DOUBT_DEADLINE_S = 20 };

/* As a crash leaves it: replicas differ, one node knows. */
static CO_FN int leave_differing(struct store_run *r, unsigned knows)
{
	CHECK(r, dist_put_byte(dist_node(r, 0), "block-0-0", 'n', DIST_LEN) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 1), "block-0-1", 'o', DIST_LEN) == 0);
	/* Shorter, missing; and not in the record, so nobody looks. */
	CHECK(r, dist_put_byte(dist_node(r, 0), "block-3-0", 'n', DIST_LEN) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 1), "block-3-1", 'n', 100) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 1), "block-15-1", 'o', DIST_LEN) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 0), "block-18-0", 'n', DIST_LEN) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 1), "block-18-1", 'o', DIST_LEN) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 0), "size", '1', 1) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 1), "size", '2', 1) == 0);
	/* No shard, whatever it looks like. */
	CHECK(r, dist_put_byte(dist_node(r, 0), "block-foo", '1', 1) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 1), "block-foo", '2', 1) == 0);
	CHECK(r, dist_put_text(dist_node(r, knows), DOUBT_NAME, "doubt 1\n0\nother\nend\n") == 0);
	return 0;
}

static CO_FN int read_differing(struct store_run *r, struct chan *c)
{
	for (unsigned i = 0; i < 40; i++) {
		CHECK(r, dist_read_byte(c, "block-0", 0, DIST_LEN) == 'n');
		CHECK(r, dist_read_byte(c, "block-3", 0, DIST_LEN) == 'n');
		CHECK(r, dist_read_byte(c, "block-15", 0, DIST_LEN) == -ENOENT);
		CHECK(r, dist_read_byte(c, "size", 0, 1) == '1');
		CHECK(r, dist_read_byte(c, "block-foo", 0, 1) == '1');
	}
	return 0;
}

static CO_FN int settled(void *arg)
{
	struct store_run *r = arg;

	for (unsigned knows = 0; knows < 3; knows++) {
		if (leave_differing(r, knows) || store_reopen(r))
			return -1;
		CHECK(r, strstr(dist_status_of(r).all, "regions_in_doubt: 2"), "%s",
		      dist_status_of(r).all);
		if (read_differing(r, store_chan(r)) || dist_wait_good(r) ||
		    dist_wait_no_records(r))
			return -1;
		if (dist_same_everywhere(r, 0) || dist_same_everywhere(r, 3) ||
		    dist_same_everywhere(r, 15))
			return -1;
		CHECK(r, dist_read_byte(dist_node(r, 1), "block-foo", 0, 1) == '1');
		CHECK(r, dist_read_byte(dist_node(r, 1), "block-18-1", 0, DIST_LEN) == 'o',
		      "not in the record");
	}
	return 0;
}

/* Written before it is read: the rest of the object is one version all the same. */
static CO_FN int written_first(void *arg)
{
	struct store_run *r = arg;
	struct chan *c;

	if (leave_differing(r, 0) || store_reopen(r))
		return -1;
	c = store_chan(r);
	CHECK(r, dist_write_byte(c, "block-0", 0, 'w', 512, 0) == 0);
	CHECK(r, dist_put_byte(c, "block-3", 'w', DIST_LEN) == 0);
	for (unsigned i = 0; i < 20; i++)
		CHECK(r, dist_read_byte(c, "block-0", 0, 512) == 'w' &&
				 dist_read_byte(c, "block-0", 512, DIST_LEN - 512) == 'n' &&
				 dist_read_byte(c, "block-3", 0, DIST_LEN) == 'w');
	return dist_wait_good(r) || dist_same_everywhere(r, 0) || dist_same_everywhere(r, 3) ? -1
											     : 0;
}

static void set_read_only(struct layer *l, bool is_ro)
{
	l->want_ro = is_ro;
	for (unsigned i = 0; i < l->kids_n; i++)
		set_read_only(l->kids[i], is_ro);
}

/* Nothing may be written then; the choice is kept in memory. */
static CO_FN int read_only(void *arg)
{
	struct store_run *r = arg;
	struct err err = { "" };

	if (leave_differing(r, 1))
		return -1;
	CHECK(r, chain_close(r->chain) == 0);
	set_read_only(chain_top(r->chain), true);
	CHECK(r, chain_open(r->chain, &err) == 0, "%s", err.msg);
	if (read_differing(r, store_chan(r)))
		return -1;
	CHECK(r, dist_node_off(r, 0, true) == 0);
	CHECK(r, dist_read_byte(store_chan(r), "block-0", 0, DIST_LEN) == -ETIMEDOUT,
	      "never the other");
	CHECK(r, dist_node_off(r, 0, false) == 0);
	CHECK(r, dist_read_byte(dist_node(r, 1), "block-0-1", 0, DIST_LEN) == 'o' &&
			 dist_records_n(r) == 1);
	CHECK(r, chain_close(r->chain) == 0);
	set_read_only(chain_top(r->chain), false);
	CHECK(r, chain_open(r->chain, &err) == 0, "%s", err.msg);
	return read_differing(r, store_chan(r));
}

/* A node that comes later is told what was chosen without it. */
static CO_FN int one_away(void *arg)
{
	struct store_run *r = arg;
	struct chan *c;

	if (leave_differing(r, 1))
		return -1;
	CHECK(r, dist_node_off(r, 0, true) == 0);
	if (store_reopen(r))
		return -1;
	c = store_chan(r);
	for (unsigned i = 0; i < 3; i++)
		CHECK(r, dist_read_byte(c, "block-0", 0, DIST_LEN) == 'o');
	CHECK(r, dist_count_of(dist_node(r, 1), "stale-block-0-0-") == 1);
	CHECK(r, dist_node_off(r, 0, false) == 0);
	for (unsigned i = 0; i < 30; i++)
		CHECK(r, dist_read_byte(c, "block-0", 0, DIST_LEN) == 'o');
	if (dist_wait_good(r) || dist_same_everywhere(r, 0) || dist_wait_no_records(r))
		return -1;
	CHECK(r, dist_read_byte(dist_node(r, 0), "block-0-0", 0, DIST_LEN) == 'o');
	return 0;
}

/* A crash left more than there is room for, and a writer comes before it is mended. */
static CO_FN int crowded(void *arg)
{
	enum { REGIONS = 2 * REGIONS_MAX + 40, LINE = 24 };
	struct store_run *r = arg;
	_cleanup_free_ char *text = malloc((size_t)REGIONS * LINE);
	size_t at = 0;

	CHECK(r, text != NULL);
	at += (size_t)snprintf(text + at, LINE, "doubt 1\n");
	for (unsigned i = 0; i < REGIONS; i++)
		at += (size_t)snprintf(text + at, LINE, "%u\n", i * REGION_SHARDS);
	(void)snprintf(text + at, LINE, "end\n");
	CHECK(r, dist_put_byte(dist_node(r, 0), "block-0-0", 'n', DIST_LEN) == 0);
	CHECK(r, dist_put_text(dist_node(r, 1), DOUBT_NAME, text) == 0);
	if (store_reopen(r))
		return -1;
	for (unsigned i = 0; i < 40; i++) {
		char name[32];

		(void)snprintf(name, sizeof(name), "block-%u",
			       (REGIONS + 1 + 2 * i) * REGION_SHARDS);
		CHECK(r, dist_write_byte(store_chan(r), name, 0, 'w', 512, 0) == 0);
		CHECK(r, dist_of(r)->doubt.n <= REGIONS + 1);
	}
	CHECK(r, dist_of(r)->doubt.n <= 2 * REGIONS_MAX, "%u", (unsigned)dist_of(r)->doubt.n);
	CHECK(r, dist_read_byte(store_chan(r), "block-0", 0, DIST_LEN) == 'n');
	return dist_wait_good(r) || dist_wait_no_records(r) || dist_same_everywhere(r, 0) ? -1 : 0;
}

/* Many changes at a time, in more regions than the record has room for: some wait, and none for ever. */
enum { DELS = 12, DEL_OBJS = 256, CROWD = DELS + 20 };

static CO_FN int crowd(struct store_run *r, unsigned i, void *arg)
{
	struct doubt *t = &dist_of(r)->doubt;
	_Atomic unsigned *left = arg;
	_cleanup_free_ struct obj *objs = calloc(DEL_OBJS, sizeof(*objs));
	unsigned most = 0;
	char name[32];

	CHECK(r, objs != NULL);
	if (i == CROWD) {
		for (; *left > 0; co_sleep(100000))
			most = MAX(most, t->n);
		CHECK(r, most > REGIONS_MAX && most <= REGIONS_FULL, "%u", most);
		return 0;
	}
	for (unsigned n = 0; n < DEL_OBJS; n++) {
		place_shard_name((i * DEL_OBJS + n) * UINT64_C(2) * REGION_SHARDS, name);
		objs[n] = dist_obj(name);
	}
	if (i < DELS)
		CHECK(r, ch_del(store_chan(r), objs, DEL_OBJS) == 0);
	else
		CHECK(r, dist_write_byte(store_chan(r), objs[0].name, 0, 'w', 512, 0) == 0);
	(*left)--;
	return 0;
}

static CO_FN int many_at_a_time(void *arg)
{
	struct store_run *r = arg;
	_Atomic unsigned left = CROWD;

	if (store_fibers(r, CROWD + 1, crowd, &left))
		return -1;
	CHECK(r, dist_of(r)->doubt.n <= REGIONS_FULL, "%u", (unsigned)dist_of(r)->doubt.n);
	return 0;
}

/* Opens what a crash leaves, equal on both nodes, with node 1 failing flushes and more: is it as good as flushed? */
static CO_FN int leave_unflushed(struct store_run *r)
{
	CHECK(r, dist_put_byte(dist_node(r, 0), "block-0-0", 'n', DIST_LEN) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 1), "block-0-1", 'n', DIST_LEN) == 0);
	CHECK(r, dist_put_text(dist_node(r, 0), DOUBT_NAME, "doubt 1\n0\nend\n") == 0);
	if (store_reopen(r))
		return -1;
	CHECK(r, dist_node_off(r, 1, true) == 0);
	return 0;
}

/* Too few have what the last daemon wrote. */
static CO_FN int unflushed(void *arg)
{
	struct store_run *r = arg;

	if (leave_unflushed(r))
		return -1;
	CHECK(r, ch_flush(store_chan(r)) != 0);
	CHECK(r, ch_flush(store_chan(r)) != 0, "nor has it now");
	CHECK(r, dist_count_of(dist_node(r, 0), "stale-block-0-1-") == 1);
	CHECK(r, dist_read_byte(store_chan(r), "block-0", 0, DIST_LEN) == 'n');
	CHECK(r, dist_node_off(r, 1, false) == 0);
	CHECK(r, ch_flush(store_chan(r)) == 0, "%s", dist_status_of(r).all);
	return dist_wait_good(r) || dist_same_everywhere(r, 0) || dist_wait_no_records(r) ? -1 : 0;
}

/* One is enough; the other one is stale. */
static CO_FN int unflushed_quorum(void *arg)
{
	struct store_run *r = arg;

	if (leave_unflushed(r))
		return -1;
	CHECK(r, ch_flush(store_chan(r)) == 0);
	CHECK(r, dist_count_of(dist_node(r, 0), "stale-block-0-1-") == 1);
	CHECK(r, dist_node_off(r, 1, false) == 0);
	return dist_wait_good(r) || dist_same_everywhere(r, 0) || dist_wait_no_records(r) ? -1 : 0;
}

/* Node 1 comes when nothing is settled yet, for the others can be read at open only. */
static CO_FN int unflushed_late(void *arg)
{
	struct store_run *r = arg;

	CHECK(r, dist_put_byte(dist_node(r, 0), "block-0-0", 'n', DIST_LEN) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 1), "block-0-1", 'n', DIST_LEN) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 2), "block-0-2", 'n', DIST_LEN) == 0);
	CHECK(r, dist_put_text(dist_node(r, 0), DOUBT_NAME, "doubt 1\n0\nend\n") == 0);
	CHECK(r, dist_node_off(r, 0, true) == 0 && dist_node_off(r, 3, true) == 0);
	if (store_reopen(r))
		return -1;
	CHECK(r, dist_node_off(r, 1, true) == 0 && dist_node_off(r, 3, false) == 0);
	for (uint64_t until = now_ns() + DOUBT_DEADLINE_S * UINT64_C(1000000000);
	     !dist_of(r)->nodes[1].is_joined;) {
		CHECK(r, now_ns() < until, "%s", dist_status_of(r).all);
		co_sleep(1000000);
	}
	CHECK(r, ch_flush(store_chan(r)) == 0);
	CHECK(r, dist_count_of(dist_node(r, 0), "stale-block-0-1-") == 1);
	CHECK(r, dist_node_off(r, 0, false) == 0 && dist_node_off(r, 1, false) == 0);
	return dist_wait_good(r) || dist_same_everywhere(r, 0) || dist_wait_no_records(r) ? -1 : 0;
}

/* What the good one has not is deleted, and noted as stale until it can't come back. */
static CO_FN int deleted(void *arg)
{
	struct store_run *r = arg;

	CHECK(r, dist_put_byte(dist_node(r, 0), "block-3-0", 'n', DIST_LEN) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 1), "block-3-1", 'n', DIST_LEN) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 1), "block-0-1", 'o', DIST_LEN) == 0);
	CHECK(r, dist_put_text(dist_node(r, 0), DOUBT_NAME, "doubt 1\n0\nend\n") == 0);
	CHECK(r, dist_node_off(r, 1, true) == 0);
	if (store_reopen(r))
		return -1;
	CHECK(r, dist_read_byte(store_chan(r), "block-0", 0, DIST_LEN) == -ENOENT);
	CHECK(r, dist_count_of(dist_node(r, 1), "block-0-1") == 0);
	CHECK(r, dist_count_of(dist_node(r, 0), "stale-block-0-1-") == 1);
	CHECK(r, dist_node_off(r, 1, false) == 0);
	return dist_wait_good(r) || dist_same_everywhere(r, 0) ? -1 : 0;
}

static int write_file(struct store_run *r, const char *name, const char *text)
{
	char path[300];
	FILE *f;

	(void)snprintf(path, sizeof(path), "%s/%s", r->folder, name);
	f = fopen(path, "w");
	CHECK(r, f != NULL && fputs(text, f) >= 0 && fclose(f) == 0, "%s", path);
	return 0;
}

/* Others know as much: it is a node that could not be read at open, and comes later. */
static CO_FN int damaged(void *arg)
{
	struct store_run *r = arg;
	struct err err = { "" };
	char path[300];

	CHECK(r, dist_put_byte(store_chan(r), "block-0", 'a', DIST_LEN) == 0);
	CHECK(r, chain_close(r->chain) == 0);
	if (write_file(r, "a/doubt", "doubt 1\n0\n") || write_file(r, "b/doubt", "what?"))
		return -1;
	CHECK(r, chain_open(r->chain, &err) != 0);
	CHECK(r, strstr(err.msg, "node 0 of 3 is away (EILSEQ) and others too") != NULL, "%s",
	      err.msg);
	(void)snprintf(path, sizeof(path), "%s/b/doubt", r->folder);
	CHECK(r, unlink(path) == 0 && chain_open(r->chain, &err) == 0, "%s", err.msg);
	CHECK(r, strstr(dist_status_of(r).all, "last error EILSEQ") != NULL, "%s",
	      dist_status_of(r).all);
	CHECK(r, dist_read_byte(store_chan(r), "block-0", 0, DIST_LEN) == 'a');
	if (dist_wait_good(r))
		return -1;
	CHECK(r, dist_put_byte(store_chan(r), "block-0", 'b', DIST_LEN) == 0 &&
			 dist_count_of(dist_node(r, 0), DOUBT_NAME) == 1);
	return store_reopen(r) || dist_wipe(r) ? -1 : 0;
}

static void test_open(void **state)
{
	dist_run("distributed[replicas=2,clean=10ms,recheck=5ms]{mem,mem,mem}", settled);
	dist_run(
		"distributed[replicas=2,quorum=1,clean=10ms,recheck=5ms]{mem[partial=off],mem,mem}",
		settled);
	dist_run("distributed[replicas=2,clean=10ms,recheck=5ms]{mem,mem,mem}", written_first);
	dist_run(
		"distributed[replicas=2,recheck=5ms]{fault[file=@/off0,ops=read|stat,error=ETIMEDOUT]:mem,mem,mem}",
		read_only);
	dist_run("distributed[replicas=2,clean=10ms,recheck=5ms]{" DIST_OFF(0) ":mem,mem,mem}",
		 one_away);
	dist_run(
		"distributed[replicas=2,rebuild=1,clean=300ms]{mem,mem,delay[read=1us,count=300]:mem}",
		crowded);
	dist_run("distributed[replicas=2,clean=1h]{delay[trim=20ms]:mem,delay[write=1ms]:mem,mem}",
		 many_at_a_time);
	dist_run(
		"distributed[replicas=3,quorum=2,clean=300ms,recheck=5ms]{"
		"fault[file=@/off0,ops=read|stat,after=2,error=ETIMEDOUT]:mem,"
		"fault[file=@/off1,ops=flush|put|read|stat]:fault[file=@/off3,ops=list,error=ETIMEDOUT]:mem,"
		"fault[file=@/off0,ops=read|stat,after=1,error=ETIMEDOUT]:mem}",
		unflushed_late);
	dist_run(
		"distributed[replicas=2,clean=1h,recheck=5ms]{mem,fault[file=@/off1,ops=flush]:mem,mem}",
		deleted);
	dist_run(
		"distributed[replicas=2,clean=300ms,recheck=5ms]{mem,fault[file=@/off1,ops=flush|put]:mem,mem}",
		unflushed);
	dist_run("distributed[replicas=2,quorum=1,clean=300ms,recheck=5ms]{mem,"
		 "fault[file=@/off1,ops=flush|put]:mem,mem}",
		 unflushed_quorum);
	dist_run("distributed[replicas=2,recheck=5ms]{file:@/a/,file:@/b/,file:@/c/}", damaged);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_open),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = cmocka_run_group_tests_name("distributed, doubt at open", tests, NULL, NULL);
	conform_stop();
	return failed;
}
