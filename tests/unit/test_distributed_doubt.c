/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The record of what is in doubt: its text, when it is there and when it is gone, and what it costs. What is made of it
 * at open is in test_distributed_doubt_open.c; test_distributed_crash.c has the kills.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "conformance.h"
#include "dist_help.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"

/* ---- text ---- */

struct parsed {
	unsigned n;
	uint64_t last;
};

static int add(void *arg, uint64_t region)
{
	struct parsed *p = arg;

	p->n++;
	p->last = region;
	return region == 7 ? -ENOMEM : 0;
}

static void test_text(void **state)
{
	static const struct {
		const char *text;
		int rc;
		unsigned n;
		uint64_t last, out;
	} cases[] = {
		{ "doubt 1\nend\n", 0, 0, 0, 0 },
		{ "doubt 1\n0\nend\n", 0, 1, 0, 0 },
		{ "doubt 1\n48\nother\nend\n", 0, 2, REGION_OTHERS, 0 },
		{ "doubt 1\n18446744073709551600\nend\n", 0, 1, UINT64_C(1152921504606846975), 0 },
		{ "doubt 1\n112\nend\n", -ENOMEM, 1, 7, 0 },
		{ "doubt 1\nout 2\nend\n", 0, 0, 0, 4 },
		{ "doubt 1\nout 0\nout 63\n16\nend\n", 0, 1, 1, UINT64_C(0x8000000000000001) },
		{ "doubt 1\nout 0\nout 0\nend\n", -EILSEQ, 0, 0, 0 },
		{ "doubt 1\nout 64\nend\n", -EILSEQ, 0, 0, 0 },
		{ "doubt 1\nout \nend\n", -EILSEQ, 0, 0, 0 },
		{ "", -EILSEQ, 0, 0, 0 },
		{ "doubt 2\nend\n", -EILSEQ, 0, 0, 0 },
		{ "doubt 1\n", -EILSEQ, 0, 0, 0 },
		{ "doubt 1\n16\n", -EILSEQ, 1, 1, 0 },
		{ "doubt 1\n16\nen", -EILSEQ, 1, 1, 0 },
		{ "doubt 1\n17\nend\n", -EILSEQ, 0, 0, 0 },
		{ "doubt 1\nx\nend\n", -EILSEQ, 0, 0, 0 },
		{ "doubt 1\n\nend\n", -EILSEQ, 0, 0, 0 },
		{ "doubt 1\nend\n16\n", -EILSEQ, 0, 0, 0 },
		{ "doubt 1\n184467440737095516000\nend\n", -EILSEQ, 0, 0, 0 },
		{ "doubt 1\n000000000000000000000000000000000016\nend\n", -EILSEQ, 0, 0, 0 },
	};

	for (unsigned i = 0; i < ARRAY_LEN(cases); i++) {
		struct parsed p = { 0, 0 };
		uint64_t out = 0;
		int rc = doubt_parse(cases[i].text, strlen(cases[i].text), add, &p, &out);

		if (rc != cases[i].rc || p.n != cases[i].n || p.last != cases[i].last ||
		    out != cases[i].out)
			fail_msg("'%s': %s, %u regions, last %ju", cases[i].text, err_name(rc), p.n,
				 (uintmax_t)p.last);
	}
}

/* As many regions as a table may have can be read, and no more. */
static void test_much_text(void **state)
{
	enum { LINE = 21 };
	_cleanup_free_ char *text = malloc(16 + (size_t)(REGIONS_READ_MAX + 1) * LINE);
	size_t at;

	assert_non_null(text);
	for (unsigned more = 0; more < 2; more++) {
		struct parsed p = { 0, 0 };
		uint64_t out = 0;

		at = (size_t)snprintf(text, LINE, "doubt 1\n");
		for (unsigned i = 0; i < REGIONS_READ_MAX + more; i++)
			at += (size_t)snprintf(text + at, LINE, "%u\n", (i + 8) * REGION_SHARDS);
		at += (size_t)snprintf(text + at, LINE, "end\n");
		assert_int_equal(doubt_parse(text, at, add, &p, &out), more ? -EILSEQ : 0);
		assert_int_equal(p.n, REGIONS_READ_MAX);
	}
}

/* ---- when it is there ---- */

/* From before the first change until it is flushed and old; a volume that was closed has none. */
static CO_FN int life(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);

	CHECK(r, dist_records_n(r) == 0);
	CHECK(r, dist_write_byte(c, "block-5", 0, 'a', DIST_LEN, 0) == 0);
	CHECK(r, dist_records_n(r) >= (int)dist_of(r)->quorum, "%d", dist_records_n(r));
	CHECK(r, dist_of(r)->doubt.n == 1);
	/* Nobody flushes: it does that itself. */
	if (dist_wait_no_records(r))
		return -1;
	CHECK(r, dist_of(r)->doubt.n == 0);
	CHECK(r, dist_put_byte(c, "size", '5', 1) == 0 && dist_del_one(c, "block-5") == 0);
	CHECK(r, dist_records_n(r) >= (int)dist_of(r)->quorum && dist_of(r)->doubt.n == 2);
	CHECK(r, dist_put_byte(c, DOUBT_NAME, 'x', 1) == -EINVAL, "the name is taken");
	CHECK(r, dist_count_of(c, "") == 1, "and is not listed");
	CHECK(r, chain_close(r->chain) == 0);
	struct err err = { "" };

	CHECK(r, chain_open(r->chain, &err) == 0, "%s", err.msg);
	CHECK(r, dist_records_n(r) == 0 && dist_status_of(r).is_good, "%s", dist_status_of(r).all);
	return 0;
}

/* Nothing is changed before it is there. */
static CO_FN int not_recorded(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct obj two[2] = { dist_obj("block-0"), dist_obj("block-16") };

	CHECK(r, dist_put_byte(c, "block-0", 'a', DIST_LEN) == 0);
	CHECK(r, dist_node_off(r, 0, true) == 0 && dist_node_off(r, 1, true) == 0);
	CHECK(r, dist_write_byte(c, "block-16", 0, 'b', DIST_LEN, 0) == -EIO);
	CHECK(r, ch_del(c, two, 2) == -EIO);
	for (unsigned i = 0; i < 3; i++)
		CHECK(r, dist_count_of(dist_node(r, i), "block-16") == 0);
	CHECK(r, dist_read_byte(c, "block-0", 0, DIST_LEN) == 'a');
	CHECK(r, dist_write_byte(c, "block-0", 0, 'c', DIST_LEN, 0) == 0,
	      "that one is in the record");
	CHECK(r, dist_node_off(r, 0, false) == 0 && dist_node_off(r, 1, false) == 0);
	CHECK(r, dist_write_byte(c, "block-16", 0, 'd', DIST_LEN, 0) == 0);
	return 0;
}

/* Node 2 takes 300 ms for a put; the others are enough. */
static CO_FN int slow(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	uint64_t start = now_ns();

	for (unsigned n = 0; n < 5; n++) {
		char name[32];

		(void)snprintf(name, sizeof(name), "block-%u", 3 * 17 * n); /* on nodes 0 and 1 */
		CHECK(r, dist_write_byte(c, name, 0, 'a', 512, 0) == 0);
	}
	CHECK(r, now_ns() - start < UINT64_C(1000000000), "%ju ns", (uintmax_t)(now_ns() - start));
	return 0;
}

static void test_life(void **state)
{
	dist_run("distributed[replicas=2,clean=100ms,recheck=5ms]{mem,mem,mem}", life);
	dist_run("distributed[replicas=2,quorum=1,clean=100ms]{mem[partial=off],mem,mem}", life);
	dist_run("distributed[replicas=2,recheck=1h]{fault[file=@/off0,ops=put]:mem,"
		 "fault[file=@/off1,ops=put]:mem,mem}",
		 not_recorded);
	dist_run("distributed[replicas=2]{mem,mem,delay[write=300ms]:mem}", slow);
}

/* ---- cost ---- */

struct asked {
	uint64_t puts, dels;
};

static void add_asked(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum)
{
	struct asked *a = arg;

	if (strcmp(l->ops->name, "mem") == 0) {
		a->puts += sum->ops[CH_PUT];
		a->dels += sum->ops[CH_DEL];
	}
}

static struct asked asked(struct store_run *r)
{
	struct asked a = { 0, 0 };

	chain_each(r->chain, add_asked, &a);
	return a;
}

/* Whole shards in order, 16 at a time, as sharded puts them. */
enum { IN_ORDER = 640, AT_A_TIME = 16 };

static CO_FN int put_in_order(struct store_run *r, unsigned i, void *arg)
{
	_Atomic unsigned *next = arg;
	unsigned n;

	while ((n = (*next)++) < IN_ORDER) {
		char name[32];

		(void)snprintf(name, sizeof(name), "block-%u", n);
		CHECK(r, dist_put_byte(store_chan(r), name, 'a', 4096) == 0);
	}
	return 0;
}

static CO_FN int sequential(void *arg)
{
	struct store_run *r = arg;
	struct asked before = asked(r), after;
	_Atomic unsigned next = 0;
	uint64_t extra, nodes = chain_top(r->chain)->kids_n;

	if (store_fibers(r, AT_A_TIME, put_in_order, &next))
		return -1;
	after = asked(r);
	extra = after.puts - before.puts - UINT64_C(2) * IN_ORDER;
	printf("sequential: %d shards, 2 replicas, %ju nodes: %ju puts more, %.1f %%\n", IN_ORDER,
	       (uintmax_t)nodes, (uintmax_t)extra, (double)extra * 100 / (2 * IN_ORDER));
	/* One for two regions; a few more where their order is not quite that. */
	CHECK(r, extra <= nodes * (IN_ORDER / REGION_SHARDS / 2 + 8), "%ju", (uintmax_t)extra);
	return 0;
}

enum { WRITES = 3000 };

static CO_FN int at_random(struct store_run *r, unsigned shards, uint64_t *extra)
{
	struct asked before = asked(r), after;
	uint64_t random = shards;

	for (unsigned i = 0; i < WRITES; i++) {
		char name[32];

		(void)snprintf(name, sizeof(name), "block-%u",
			       (unsigned)random_below(&random, shards));
		CHECK(r, dist_write_byte(store_chan(r), name, 4096 * random_below(&random, 2), 'r',
					 512, 0) == 0);
		CHECK(r, ch_flush(store_chan(r)) == 0);
	}
	after = asked(r);
	*extra = after.puts - before.puts + after.dels - before.dels;
	printf("random, flushed each: %d writes over %u shards: %ju puts more in %u nodes\n",
	       WRITES, shards, (uintmax_t)*extra, chain_top(r->chain)->kids_n);
	return 0;
}

/* 4 GiB, 64 GiB, and more than the record has room for (of 4 MiB shards). */
static CO_FN int random_flushed(void *arg)
{
	struct store_run *r = arg;
	uint64_t extra, nodes = chain_top(r->chain)->kids_n;

	if (at_random(r, 1024, &extra))
		return -1;
	CHECK(r, extra <= nodes * (1024 / REGION_SHARDS), "%ju", (uintmax_t)extra);
	if (at_random(r, 1024 * REGION_SHARDS, &extra))
		return -1;
	CHECK(r, extra <= nodes * 1024, "%ju", (uintmax_t)extra);
	if (at_random(r, 1024 * 64 * REGION_SHARDS, &extra))
		return -1;
	CHECK(r, extra <= nodes * WRITES, "%ju", (uintmax_t)extra);
	CHECK(r, dist_of(r)->doubt.n <= REGIONS_MAX, "%u regions", (unsigned)dist_of(r)->doubt.n);
	return 0;
}

/* Without a flush: it flushes itself, and stays as small. */
static CO_FN int random_unflushed(void *arg)
{
	struct store_run *r = arg;
	uint64_t random = 5;

	for (unsigned i = 0; i < WRITES; i++) {
		char name[32];

		(void)snprintf(name, sizeof(name), "block-%u",
			       (unsigned)random_below(&random, 1 << 24));
		CHECK(r, dist_write_byte(store_chan(r), name, 0, 'r', 512, 0) == 0);
		CHECK(r, dist_of(r)->doubt.n <= REGIONS_MAX + 1, "%u",
		      (unsigned)dist_of(r)->doubt.n);
	}
	return 0;
}

static void test_cost(void **state)
{
	dist_run("distributed[replicas=2,clean=1h]{mem,mem,mem}", sequential);
	dist_run("distributed[replicas=2,clean=1h]{mem,mem,mem}", random_flushed);
	dist_run("distributed[replicas=2,clean=1h]{mem,mem,mem}", random_unflushed);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_text),
		cmocka_unit_test(test_much_text),
		cmocka_unit_test(test_life),
		cmocka_unit_test(test_cost),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = cmocka_run_group_tests_name("distributed, doubt", tests, NULL, NULL);
	conform_stop();
	return failed;
}
