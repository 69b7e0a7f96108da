/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Nodes that are left out, so that a volume opens without them though `quorum` or more are away: when it does, and
 * when it must not, because what is missing may have the last changes.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <string.h>

#include "conformance.h"
#include "dist_help.h"
#include "layer/distributed/distributed.h"
#include "nbdrs/reactor.h"

enum { OUT_DEADLINE_S = 20 };

#define TWO(options) \
	"distributed[replicas=2,quorum=1," options "]{" DIST_OFF(0) ":mem," DIST_OFF(1) ":mem}"
#define THREE "distributed[replicas=2,quorum=1,recheck=5ms]{mem," DIST_OFF(1) ":mem,mem}"

/* Whether the record on a node has that line. */
static CO_FN bool says(struct store_run *r, unsigned node, const char *line)
{
	struct chan *c = dist_node(r, node);
	struct obj o = dist_obj(DOUBT_NAME);
	struct obj_stat st;
	char text[1000] = "";
	struct iovec v;
	struct iov iov;

	if (ch_stat(c, &o, &st) != 0 || st.size >= sizeof(text))
		return false;
	iov = iov_one(&v, text, st.size);
	return ch_read(c, (struct ext){ &o, 0, st.size }, &iov, 0) == 0 && strstr(text, line);
}

static CO_FN int wait_says(struct store_run *r, unsigned node, const char *line, bool is_so)
{
	uint64_t until = now_ns() + OUT_DEADLINE_S * UINT64_C(1000000000);

	while (says(r, node, line) != is_so) {
		CHECK(r, now_ns() < until, "node %u: %s", node, dist_status_of(r).all);
		co_sleep(1000000);
	}
	return 0;
}

static CO_FN int write_flushed(struct store_run *r, uint8_t byte)
{
	struct chan *c = store_chan(r);

	CHECK(r, dist_write_byte(c, "block-0", 0, byte, DIST_LEN, 0) == 0, "%s",
	      dist_status_of(r).all);
	CHECK(r, ch_flush(c) == 0);
	return 0;
}

static CO_FN int reads(struct store_run *r, uint8_t byte)
{
	for (unsigned i = 0; i < 20; i++)
		CHECK(r, dist_read_byte(store_chan(r), "block-0", 0, DIST_LEN) == byte);
	return 0;
}

static void only_off(struct store_run *r, uint64_t off)
{
	for (unsigned i = 0; i < 3; i++)
		(void)dist_node_off(r, i, off & bit(i)); /* it may be on already */
}

/* Closes, and opens without the nodes of `off`. */
static CO_FN int reopen_without(struct store_run *r, uint64_t off, bool is_good)
{
	struct err err = { "" };
	int rc;

	(void)chain_close(r->chain); /* says so where the last flush failed */
	only_off(r, off);
	rc = chain_open(r->chain, &err);
	CHECK(r, (rc == 0) == is_good, "%s %s", err_name(rc), err.msg);
	if (rc == 0)
		return 0;
	CHECK(r, strstr(err.msg, "is away") != NULL || strstr(err.msg, "contradict") != NULL, "%s",
	      err.msg);
	only_off(r, 0);
	CHECK(r, chain_open(r->chain, &err) == 0, "%s", err.msg);
	return 0;
}

/* ---- two nodes, of which one is enough ---- */

/* Node `gone` goes away, and the other one has it all. */
static CO_FN int leave_out(struct store_run *r, unsigned gone, uint8_t byte)
{
	const char *line = gone ? "out 1\n" : "out 0\n";
	uint64_t until = now_ns() + OUT_DEADLINE_S * UINT64_C(1000000000);

	CHECK(r, dist_node_off(r, gone, true) == 0);
	/* Again and again: a late answer of something else can make it look as if it were there. */
	do {
		CHECK(r, now_ns() < until, "%s", dist_status_of(r).all);
		if (write_flushed(r, byte))
			return -1;
		co_sleep(1000000);
	} while (!says(r, 1 - gone, line));
	return 0;
}

static CO_FN int in_turn(void *arg)
{
	struct store_run *r = arg;

	if (write_flushed(r, 'a') || leave_out(r, 1, 'b') || reopen_without(r, bit(1), true))
		return -1;
	if (reads(r, 'b') || write_flushed(r, 'c') || reopen_without(r, bit(1), true))
		return -1;
	CHECK(r, dist_read_byte(dist_node(r, 1), "block-0-1", 0, DIST_LEN) == 'a');
	/* Back, at work: it is caught up, and nothing is left that says otherwise. */
	CHECK(r, dist_node_off(r, 1, false) == 0);
	if (dist_wait_good(r) || wait_says(r, 0, "doubt", false) || wait_says(r, 1, "doubt", false))
		return -1;
	if (reads(r, 'c') || dist_same_everywhere(r, 0))
		return -1;
	/* Now the other one; and it alone is too old. */
	if (leave_out(r, 0, 'd') || reopen_without(r, bit(0), true) || reads(r, 'd'))
		return -1;
	if (write_flushed(r, 'e') || reopen_without(r, bit(1), false))
		return -1;
	return dist_wait_good(r) || reads(r, 'e') || dist_same_everywhere(r, 0) ? -1 : 0;
}

/* The same when the daemon was killed: what was in doubt is settled without the other node. */
static CO_FN int killed(void *arg)
{
	struct store_run *r = arg;

	if (write_flushed(r, 'a') || leave_out(r, 1, 'b') || wait_says(r, 0, "0\nend", false))
		return -1;
	CHECK(r, dist_put_byte(dist_node(r, 0), "block-3-0", 'n', DIST_LEN) == 0);
	CHECK(r, dist_put_byte(dist_node(r, 1), "block-3-1", 'o', DIST_LEN) == 0);
	CHECK(r, dist_put_text(dist_node(r, 0), DOUBT_NAME, "doubt 1\nout 1\n0\nend\n") == 0);
	if (reopen_without(r, bit(1), true) || reads(r, 'b'))
		return -1;
	CHECK(r, dist_read_byte(store_chan(r), "block-3", 0, DIST_LEN) == 'n');
	if (wait_says(r, 0, "0\nend", false)) /* compared, and noted */
		return -1;
	CHECK(r, dist_count_of(dist_node(r, 0), "stale-block-3-1-") == 1);
	CHECK(r, dist_node_off(r, 1, false) == 0);
	if (dist_wait_good(r) || reads(r, 'b') || dist_same_everywhere(r, 0))
		return -1;
	return dist_same_everywhere(r, 3);
}

/* Who was left out alone has not all, even if it is there when the other one is not. */
static CO_FN int wrong_one(void *arg)
{
	struct store_run *r = arg;

	if (write_flushed(r, 'a') || leave_out(r, 1, 'b') || reopen_without(r, bit(0), false))
		return -1;
	return reads(r, 'b') || dist_wait_good(r) || dist_same_everywhere(r, 0) ? -1 : 0;
}

/* Not used before the other node knows: what it took alone would be lost when that one opens alone. */
static CO_FN int not_counted(void *arg)
{
	struct store_run *r = arg;

	if (write_flushed(r, 'a') || leave_out(r, 1, 'b'))
		return -1;
	CHECK(r, dist_node_off(r, 0, true) == 0 && dist_node_off(r, 1, false) == 0);
	/* Long enough for it to be asked many times. */
	for (uint64_t until = now_ns() + UINT64_C(50000000); now_ns() < until; co_sleep(100000))
		CHECK(r, dist_write_byte(store_chan(r), "block-0", 0, 'x', DIST_LEN, 0) != 0 &&
				 dist_put_byte(store_chan(r), "block-3", 'x', 512) != 0);
	CHECK(r, dist_count_of(dist_node(r, 1), "block-3") == 0 && says(r, 0, "out 1\n"));
	if (reopen_without(r, bit(1), true) || reads(r, 'b'))
		return -1;
	CHECK(r, dist_node_off(r, 1, false) == 0);
	return dist_wait_good(r) || reads(r, 'b') || dist_same_everywhere(r, 0) ? -1 : 0;
}

/* Node 0 missed a change before node 1 goes: it can't do without. */
static CO_FN int incomplete(void *arg)
{
	struct store_run *r = arg;

	if (write_flushed(r, 'a') || leave_out(r, 0, 'b'))
		return -1;
	CHECK(r, dist_node_off(r, 0, false) == 0 && dist_node_off(r, 1, true) == 0);
	CHECK(r, dist_write_byte(store_chan(r), "block-0", 0, 'x', DIST_LEN, 0) != 0);
	if (reopen_without(r, bit(1), false))
		return -1;
	return reads(r, 'b') || dist_wait_good(r) || dist_same_everywhere(r, 0) ? -1 : 0;
}

/* The same with node 0 there all the time. */
static CO_FN int not_caught_up(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);

	CHECK(r, dist_node_off(r, 2, true) == 0);
	if (write_flushed(r, 'b'))
		return -1;
	CHECK(r, dist_count_of(dist_node(r, 1), "stale-block-0-0-") == 1);
	CHECK(r, dist_node_off(r, 1, true) == 0 && dist_node_off(r, 2, false) == 0);
	CHECK(r, dist_write_byte(c, "block-20", 0, 'c', DIST_LEN, 0) == 0);
	/* It leaves the record after nodes were looked at. */
	if (wait_says(r, 0, "16\n", false))
		return -1;
	CHECK(r, dist_of(r)->nodes[1].is_away && !says(r, 0, "out"));
	if (reopen_without(r, bit(1), false))
		return -1;
	return reads(r, 'b') || dist_wait_good(r) || dist_same_everywhere(r, 0) ? -1 : 0;
}

static void test_two(void **state)
{
	dist_run(TWO("recheck=5ms,clean=20ms"), in_turn);
	dist_run(TWO("recheck=5ms,clean=20ms"), killed);
	dist_run(TWO("recheck=5ms,clean=20ms"), wrong_one);
	dist_run(TWO("recheck=1ms,clean=20ms"), not_counted);
	dist_run(TWO("recheck=1h,clean=20ms"), incomplete);
	dist_run("distributed[replicas=2,quorum=1,recheck=5ms,clean=20ms]{"
		 "fault[file=@/off2,ops=write|put,error=EINVAL]:mem," DIST_OFF(1) ":mem}",
		 not_caught_up);
}

/* ---- what records say, at open ---- */

static CO_FN int records(struct store_run *r, const char *node0, const char *node2, bool is_good)
{
	static const char *const nothing = "doubt 1\nend\n";

	CHECK(r, dist_put_text(dist_node(r, 0), DOUBT_NAME, node0 ? node0 : nothing) == 0);
	CHECK(r, dist_put_text(dist_node(r, 2), DOUBT_NAME, node2 ? node2 : nothing) == 0);
	if (reopen_without(r, bit(1), is_good))
		return -1;
	only_off(r, 0);
	/* Whatever they said, it is gone when all are back. */
	if (dist_wait_good(r) || wait_says(r, 0, "out", false) || wait_says(r, 2, "out", false))
		return -1;
	CHECK(r, dist_of(r)->doubt.out == 0 && dist_of(r)->nodes[1].is_joined);
	return 0;
}

static CO_FN int said(void *arg)
{
	static const char *const out0 = "doubt 1\nout 0\nend\n",
				 *const out1 = "doubt 1\nout 1\nend\n",
				 *const out2 = "doubt 1\nout 2\nend\n";
	struct store_run *r = arg;
	int rc = records(r, out1, out1, true);

	rc = rc ? rc : records(r, out1, NULL, false);
	rc = rc ? rc : records(r, NULL, out1, false);
	rc = rc ? rc : records(r, NULL, NULL, false);
	rc = rc ? rc : records(r, out0, out0, false);
	rc = rc ? rc : records(r, out1, out0, false);
	rc = rc ? rc : records(r, out2, out1, false);
	return rc ? rc : records(r, out2, out0, false); /* they can't both be right */
}

/* Two that can't both be right. */
static CO_FN int contradict(void *arg)
{
	struct store_run *r = arg;
	struct err err = { "" };

	CHECK(r, dist_put_text(dist_node(r, 0), DOUBT_NAME, "doubt 1\nout 1\nend\n") == 0);
	CHECK(r, dist_put_text(dist_node(r, 1), DOUBT_NAME, "doubt 1\nout 0\nend\n") == 0);
	CHECK(r, chain_close(r->chain) == 0);
	int rc = chain_open(r->chain, &err);

	only_off(r, bit(1));
	if (rc != 0)
		CHECK(r, chain_open(r->chain, &err) == 0);
	CHECK(r, rc == -EILSEQ && strstr(err.msg, "contradict each other") != NULL, "%s %s",
	      err_name(rc), err.msg);
	only_off(r, 0);
	return dist_wait_good(r);
}

static void test_said(void **state)
{
	dist_run(THREE, said);
	dist_run(TWO("recheck=5ms"), contradict);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_two),
		cmocka_unit_test(test_said),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = cmocka_run_group_tests_name("distributed, nodes left out", tests, NULL, NULL);
	conform_stop();
	return failed;
}
