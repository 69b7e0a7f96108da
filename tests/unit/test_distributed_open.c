/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * distributed, opened with nodes that are away or were emptied, or with records that contradict each other; objects
 * lost one by one; conditional puts; and the end of a volume.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "conformance.h"
#include "dist_help.h"
#include "layer/distributed/distributed.h"
#include "nbdrs/reactor.h"

/* --- Records that contradict each other ------------------------------------------------------- */

/* The newest is right; older ones on the holder that it calls stale are out of date, and go. */
static CO_FN int contradiction(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);

	CHECK(r, dist_put_byte(c, "block-0", 'a', DIST_LEN) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 0), "block-0-0", 'n', DIST_LEN) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 0), "stale-block-0-1-2000", 0, 0) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 1), "stale-block-0-0-1000", 0, 0) == 0);
	/* Not ours, not parsed, not there: no harm. */
	CHECK(r, dist_put_byte(dist_node(r, 1), "stale-block-0-1-3000", 0, 0) == 0, "about itself");
	CHECK(r, dist_put_byte(dist_node(r, 2), "stale-block-0-0-3000", 0, 0) == 0, "not a holder");
	CHECK(r, dist_put_byte(dist_node(r, 0), "stale-block-0-7-3000", 0, 0) == 0,
	      "no such holder");
	if (store_reopen(r))
		return -1;
	c = store_chan(r);
	for (unsigned i = 0; i < 20; i++)
		CHECK(r, dist_read_byte(c, "block-0", 0, DIST_LEN) == 'n');
	CHECK(r, dist_del_one(dist_node(r, 1), "stale-block-0-1-3000") == 0 &&
			 dist_del_one(dist_node(r, 2), "stale-block-0-0-3000") == 0 &&
			 dist_del_one(dist_node(r, 0), "stale-block-0-7-3000") == 0);
	return dist_wait_good(r) || dist_same_everywhere(r, 0) ? -1 : 0;
}

static void test_contradiction(void **state)
{
	dist_run("distributed[replicas=2,recheck=5ms]{mem,mem,mem}", contradiction);
}

/* --- Opening without a node ------------------------------------------------------------------- */

static CO_FN int open_without(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct err err = { "" };
	char name[32], b[300], c_dir[300], b_off[300], c_off[300];
	int rc;

	(void)snprintf(b, sizeof(b), "%s/b", r->folder);
	(void)snprintf(b_off, sizeof(b_off), "%s/b.off", r->folder);
	(void)snprintf(c_dir, sizeof(c_dir), "%s/c", r->folder);
	(void)snprintf(c_off, sizeof(c_off), "%s/c.off", r->folder);
	for (unsigned n = 0; n < 6; n++) {
		(void)snprintf(name, sizeof(name), "block-%u", n);
		CHECK(r, dist_put_byte(c, name, 'a', DIST_LEN) == 0);
	}
	CHECK(r, chain_close(r->chain) == 0);
	/* Two of them: who knows what they know? */
	CHECK(r, rename(b, b_off) == 0 && rename(c_dir, c_off) == 0);
	rc = chain_open(r->chain, &err);
	CHECK(r,
	      rc != 0 && strstr(err.msg, "layer distributed: node 1 of 3 is away") &&
		      strstr(err.msg, "others too") &&
		      strstr(err.msg, "put an empty store in its place"),
	      "%s", err.msg);
	/* One of them: on with it. */
	CHECK(r, rename(c_off, c_dir) == 0);
	CHECK(r, chain_open(r->chain, &err) == 0, "%s", err.msg);
	c = store_chan(r);
	CHECK(r, strstr(dist_status_of(r).all, "node-1: away"), "%s", dist_status_of(r).all);
	for (unsigned n = 0; n < 6; n++) {
		(void)snprintf(name, sizeof(name), "block-%u", n);
		CHECK(r, dist_read_byte(c, name, 0, DIST_LEN) == 'a');
		CHECK(r, (n & 1 ? dist_put_byte(c, name, 'b', DIST_LEN)
				: dist_write_byte(c, name, 0, 'b', 4096, 0)) == 0);
	}
	CHECK(r, ch_flush(c) == 0);
	CHECK(r, dist_count_of(c, "block-") == 6);
	CHECK(r, rename(b_off, b) == 0);
	if (dist_wait_good(r))
		return -1;
	for (unsigned n = 0; n < 6; n++)
		if (dist_same_everywhere(r, n))
			return -1;
	CHECK(r, dist_read_byte(c, "block-1", 0, DIST_LEN) == 'b' &&
			 dist_read_byte(c, "block-2", 0, 4096) == 'b');
	return dist_wipe(r);
}

/* A write that can't be: an error, and not the one that stands for a missing object. */
static CO_FN int closed_write(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct err err = { "" };
	char b[300], b_off[300];

	(void)snprintf(b, sizeof(b), "%s/b", r->folder);
	(void)snprintf(b_off, sizeof(b_off), "%s/b.off", r->folder);
	CHECK(r, dist_put_byte(c, "block-0", 'a', DIST_LEN) == 0);
	CHECK(r, chain_close(r->chain) == 0 && rename(b, b_off) == 0);
	CHECK(r, chain_open(r->chain, &err) == 0, "%s", err.msg);
	c = store_chan(r);
	CHECK(r, dist_read_byte(c, "block-0", 0, DIST_LEN) == 'a');
	CHECK(r, dist_write_byte(c, "block-0", 0, 'b', DIST_LEN, 0) == -EIO);
	CHECK(r, dist_put_byte(c, "block-0", 'b', DIST_LEN) == -EIO &&
			 dist_del_one(c, "block-0") == -EIO);
	CHECK(r, dist_read_byte(c, "block-0", 0, DIST_LEN) == 'a', "nothing was changed");
	CHECK(r, dist_count_of(c, "stale-") == 0);
	CHECK(r, rename(b_off, b) == 0);
	return dist_wait_good(r) || dist_same_everywhere(r, 0) ? -1 : dist_wipe(r);
}

/* A new disk in the place of the old one. */
static CO_FN int emptied(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	char name[32];

	CHECK(r, dist_put_byte(c, "size", '1', 1) == 0);
	for (unsigned n = 0; n < 9; n++) {
		(void)snprintf(name, sizeof(name), "block-%u", n);
		CHECK(r, dist_put_byte(c, name, 'a', DIST_LEN) == 0);
	}
	for (unsigned n = 0; n < 9; n++)
		for (unsigned h = 0; h < 2; h++) {
			(void)snprintf(name, sizeof(name), "block-%u-%u", n, h);
			CHECK(r, dist_del_one(dist_node(r, 0), name) == 0);
		}
	CHECK(r, dist_del_one(dist_node(r, 0), "size") == 0);
	if (store_reopen(r))
		return -1;
	c = store_chan(r);
	/* A part written to an empty place must not look like the whole. */
	CHECK(r, dist_write_byte(c, "block-0", 0, 'b', 10, 0) == 0);
	for (unsigned i = 0; i < 10; i++)
		CHECK(r, dist_read_byte(c, "block-0", 10, DIST_LEN - 10) == 'a' &&
				 dist_read_byte(c, "block-0", 0, 10) == 'b');
	if (dist_wait_good(r))
		return -1;
	for (unsigned n = 0; n < 9; n++)
		if (dist_same_everywhere(r, n))
			return -1;
	CHECK(r, dist_read_byte(dist_node(r, 0), "size", 0, 1) == '1');
	return 0;
}

/* quorum=1 of 2: each node may be the only one that has a change. Without one it opens when that is replaced. */
static CO_FN int lost_for_good(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct err err = { "" };
	char b[300], name[32], doubt[300];
	FILE *f;

	(void)snprintf(b, sizeof(b), "%s/b", r->folder);
	(void)snprintf(doubt, sizeof(doubt), "%s/a/doubt", r->folder);
	for (unsigned n = 0; n < 6; n++) {
		(void)snprintf(name, sizeof(name), "block-%u", n);
		CHECK(r, dist_put_byte(c, name, 'a', DIST_LEN) == 0);
	}
	CHECK(r, ch_flush(c) == 0);
	for (unsigned n = 0; n < 6; n++) {
		(void)snprintf(name, sizeof(name), "block-%u-1", n);
		CHECK(r, dist_del_one(dist_node(r, 1), name) == 0);
	}
	CHECK(r, chain_close(r->chain) == 0 && rmdir(b) == 0, "%s", strerror(errno));
	f = fopen(doubt, "w"); /* and the daemon was killed */
	CHECK(r, f != NULL && fputs("doubt 1\n0\nend\n", f) >= 0 && fclose(f) == 0);
	CHECK(r, chain_open(r->chain, &err) != 0);
	CHECK(r, strstr(err.msg, "put an empty store in its place") != NULL, "%s", err.msg);
	CHECK(r, mkdir(b, 0700) == 0 && chain_open(r->chain, &err) == 0, "%s", err.msg);
	for (unsigned n = 0; n < 6; n++) {
		(void)snprintf(name, sizeof(name), "block-%u", n);
		CHECK(r, dist_read_byte(store_chan(r), name, 0, DIST_LEN) == 'a', "%s", name);
	}
	if (dist_wait_good(r))
		return -1;
	for (unsigned n = 0; n < 6; n++)
		if (dist_same_everywhere(r, n))
			return -1;
	return dist_wipe(r);
}

/* A single object lost, another one unreadable: mended when read. */
static CO_FN int lost_one(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);

	CHECK(r, dist_put_byte(c, "block-0", 'a', DIST_LEN) == 0 &&
			 dist_put_byte(c, "block-3", 'b', DIST_LEN) == 0);
	CHECK(r, dist_del_one(dist_node(r, 0), "block-0-0") == 0);
	CHECK(r, dist_read_byte(c, "block-0", 0, DIST_LEN) == 'a');
	CHECK(r, dist_node_off(r, 0, true) == 0);
	CHECK(r, dist_read_byte(c, "block-3", 0, DIST_LEN) == 'b');
	CHECK(r, dist_node_off(r, 0, false) == 0);
	return dist_wait_good(r) || dist_same_everywhere(r, 0) || dist_same_everywhere(r, 3) ? -1
											     : 0;
}

static void test_open_without(void **state)
{
	dist_run("distributed[replicas=2,quorum=2,recheck=5ms]{mem,mem,mem}", emptied);
	dist_run(
		"distributed[replicas=2,recheck=5ms,read=first]{fault[file=@/off0,ops=read]:mem,mem,mem}",
		lost_one);
	dist_run("distributed[replicas=2,recheck=5ms]{file:@/a/,file:@/b/}", closed_write);
	dist_run("distributed[replicas=2,quorum=1,recheck=5ms]{file:@/a/,file:@/b/}",
		 lost_for_good);
	dist_run("distributed[replicas=3,quorum=2,recheck=5ms]{file:@/a/,file:@/b/,file:@/c/}",
		 open_without);
}

/* --- Conditions, the end of a volume ---------------------------------------------------------- */

static CO_FN int put_if(struct chan *c, const char *name, enum put_cond cond, const char *etag,
			uint8_t byte, struct obj_stat *st)
{
	struct obj o = dist_obj(name);
	uint8_t data[16];
	struct iovec v;
	struct iov iov = iov_one(&v, data, sizeof(data));
	struct put put = { .obj = &o, .iov = &iov, .cond = cond, .etag = etag };

	memset(data, byte, sizeof(data));
	return ch_put(c, &put, st);
}

static CO_FN int conditions(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct obj_stat st = { 0 }, now = { 0 };
	struct obj o = dist_obj("block-0");

	CHECK(r, chain_top(r->chain)->caps & CAN_PUT_IF);
	CHECK(r, put_if(c, "block-0", PUT_IF_ABSENT, NULL, 'a', &st) == 0);
	CHECK(r, put_if(c, "block-0", PUT_IF_ABSENT, NULL, 'b', NULL) == -EEXIST);
	CHECK(r, ch_stat(c, &o, &now) == 0 && strcmp(now.etag, st.etag) == 0, "%s, %s", now.etag,
	      st.etag);
	CHECK(r, put_if(c, "block-0", PUT_IF_MATCH, st.etag, 'c', &now) == 0);
	CHECK(r, put_if(c, "block-0", PUT_IF_MATCH, st.etag, 'd', NULL) == -ESTALE);
	CHECK(r, dist_read_byte(c, "block-0", 0, 16) == 'c' && dist_same_everywhere(r, 0) == 0);
	/* The one that decides may have done it, or not: the next one decides, and the first is stale. */
	CHECK(r, dist_node_off(r, 0, true) == 0);
	CHECK(r, put_if(c, "block-0", PUT_IF_ABSENT, NULL, 'e', NULL) == -EEXIST);
	CHECK(r, put_if(c, "block-3", PUT_IF_ABSENT, NULL, 'f', NULL) == 0);
	CHECK(r, dist_node_off(r, 0, false) == 0);
	for (unsigned i = 0; i < 10; i++)
		CHECK(r, dist_read_byte(c, "block-0", 0, 16) == 'c' &&
				 dist_read_byte(c, "block-3", 0, 16) == 'f');
	return dist_wait_good(r) || dist_same_everywhere(r, 0) || dist_same_everywhere(r, 3) ? -1
											     : 0;
}

static CO_FN int end(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct obj two[2] = { dist_obj("block-0"), dist_obj("block-1") };

	CHECK(r, dist_put_byte(c, "size", '1', 1) == 0 &&
			 dist_put_byte(c, "block-0", 'a', 10) == 0 &&
			 dist_put_byte(c, "block-1", 'a', 10) == 0);
	CHECK(r, dist_node_off(r, 0, true) == 0);
	CHECK(r, ch_del(c, two, 2) == 0);
	CHECK(r, dist_count_of(c, "block-") == 0);
	/* Its blocks could come back with the next volume. */
	CHECK(r, dist_del_one(c, "size") == -ETIMEDOUT && dist_read_byte(c, "size", 0, 1) == '1');
	CHECK(r, dist_node_off(r, 0, false) == 0);
	if (dist_wait_good(r))
		return -1;
	CHECK(r, dist_put_byte(dist_node(r, 1), "stale-block-0-0-17", 0, 0) == 0,
	      "a record left over");
	CHECK(r, dist_del_one(c, "size") == 0);
	for (unsigned i = 0; i < 3; i++)
		CHECK(r, dist_count_of(dist_node(r, i), "") == 0, "node %u", i);
	return 0;
}

/* What fails while a volume is removed leaves one that can be removed. */
static CO_FN int end_again(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	int rc;

	CHECK(r, dist_put_byte(c, "size", '1', 1) == 0 &&
			 dist_put_byte(c, "block-0", 'a', 10) == 0 &&
			 dist_del_one(c, "block-0") == 0);
	CHECK(r, dist_node_off(r, 0, true) == 0);
	rc = dist_del_one(c, "size");
	CHECK(r, rc == -ETIMEDOUT, "%s", err_name(rc));
	CHECK(r, dist_read_byte(c, "size", 0, 1) == '1');
	CHECK(r, dist_node_off(r, 0, false) == 0);
	CHECK(r, dist_del_one(c, "size") == 0);
	for (unsigned i = 0; i < 3; i++)
		CHECK(r, dist_count_of(dist_node(r, i), "") == 0, "node %u", i);
	return 0;
}

static void test_conditions(void **state)
{
	dist_run(
		"distributed[replicas=2,quorum=1,recheck=5ms]{fault[file=@/off0,ops=put,when=after]:mem,mem,mem}",
		conditions);
	dist_run("distributed[replicas=2,quorum=1,recheck=5ms]{" DIST_OFF(
			 0) ":mem[partial=off],mem,mem}",
		 conditions);
}

static void test_end(void **state)
{
	dist_run("distributed[replicas=2,quorum=1,recheck=5ms]{" DIST_OFF(0) ":mem,mem,mem}", end);
	dist_run("distributed[replicas=2,quorum=1,recheck=5ms]"
		 "{fault[file=@/off0,ops=del,error=ETIMEDOUT]:mem,mem,mem}",
		 end_again);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_contradiction),
		cmocka_unit_test(test_open_without),
		cmocka_unit_test(test_conditions),
		cmocka_unit_test(test_end),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = cmocka_run_group_tests_name("distributed, opened", tests, NULL, NULL);
	conform_stop();
	return failed;
}
