/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Placement of a distributed volume, which is its format: against a table written by hand, and against counting
 * through all combinations; the names of replicas and records; and errors of set-up.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "conform_store.h"
#include "conformance.h"
#include "layer/distributed/distributed.h"
#include "nbdrs/cleanup.h"

static struct placing *placing(unsigned nodes, unsigned replicas)
{
	struct placing *p = malloc(sizeof(*p));

	assert_non_null(p);
	placing_init(p, nodes, replicas);
	return p;
}

/* Written down by hand. */
static void test_place_table(void **state)
{
	static const uint8_t three[][2] = { { 0, 1 }, { 0, 2 }, { 1, 2 }, { 0, 1 } };
	static const uint8_t four[][3] = { { 0, 1, 2 }, { 0, 1, 3 }, { 0, 2, 3 }, { 1, 2, 3 } };
	static const uint8_t one[][1] = { { 0 }, { 1 }, { 2 }, { 0 } };
	_cleanup_free_ struct placing *p32 = placing(3, 2), *p43 = placing(4, 3),
				      *p31 = placing(3, 1);
	uint8_t node[NODES_MAX];

	for (unsigned n = 0; n < 4; n++) {
		place_shard(p32, n, node);
		assert_memory_equal(node, three[n], 2);
		place_shard(p43, n, node);
		assert_memory_equal(node, four[n], 3);
		place_shard(p31, n, node);
		assert_memory_equal(node, one[n], 1);
	}
	/* 2^64 - 1 = 3 * 6148914691236517205 */
	place_shard(p32, UINT64_MAX, node);
	assert_memory_equal(node, three[0], 2);
}

/* Counts through all combinations as an odometer does. */
static void check_all(unsigned nodes, unsigned replicas)
{
	_cleanup_free_ struct placing *p = placing(nodes, replicas);
	uint8_t want[NODES_MAX], got[NODES_MAX];
	uint64_t n = 0;
	int at;

	for (unsigned i = 0; i < replicas; i++)
		want[i] = (uint8_t)i;
	do {
		place_shard(p, n, got);
		assert_memory_equal(got, want, replicas);
		place_shard(p, n + 5 * p->choose[nodes][replicas], got);
		assert_memory_equal(got, want, replicas);
		n++;
		for (at = (int)replicas - 1;
		     at >= 0 && want[at] == nodes - replicas + (unsigned)at;)
			at--;
		if (at >= 0)
			want[at]++;
		for (unsigned i = (unsigned)(at + 1); at >= 0 && i < replicas; i++)
			want[i] = (uint8_t)(want[i - 1] + 1);
	} while (at >= 0);
	assert_int_equal(n, p->choose[nodes][replicas]);
}

static void test_place_all(void **state)
{
	_cleanup_free_ struct placing *wide = placing(64, 32);
	uint8_t got[NODES_MAX];

	for (unsigned nodes = 1; nodes <= 9; nodes++)
		for (unsigned replicas = 1; replicas <= nodes; replicas++)
			check_all(nodes, replicas);
	assert_true(wide->choose[64][32] == UINT64_C(1832624140942590534));
	place_shard(wide, 0, got);
	for (unsigned i = 0; i < 32; i++)
		assert_int_equal(got[i], i);
	place_shard(wide, wide->choose[64][32] - 1, got);
	for (unsigned i = 0; i < 32; i++)
		assert_int_equal(got[i], 32 + i);
}

static void test_place_names(void **state)
{
	_cleanup_free_ struct placing *p = placing(3, 2);
	static const char *const refused[] = { "block-1-0", "block-0-63", "stale-",
					       "stale-block-1-0-5" };
	static const char *const others[] = { "size",
					      "block-",
					      "block-01",
					      "block-x",
					      "block-1-",
					      "Block-1",
					      "block-18446744073709551616",
					      "block-1-2-3" };
	char name[OBJ_NAME_MAX + 1];
	struct place at;
	struct obj obj;
	uint64_t seq;
	unsigned r;

	assert_int_equal(place_name(p, "block-4", &at), 0); /* 4 mod 3 = 1: nodes 0 and 2 */
	assert_true(at.is_shard && at.shard == 4 && at.n == 2 && at.node[0] == 0 &&
		    at.node[1] == 2);
	assert_int_equal(place_holder(&at, 2), 1);
	assert_int_equal(place_holder(&at, 1), -1);
	place_stored(&at, "block-4", 1, &obj);
	assert_string_equal(obj.name, "block-4-1");
	assert_true(place_parse(p, "block-4-1", 2, name, &at, &r));
	assert_string_equal(name, "block-4");
	assert_int_equal(r, 1);
	assert_false(place_parse(p, "block-4-1", 0, name, &at, &r)); /* another node's */
	assert_false(place_parse(p, "block-4-2", 2, name, &at, &r)); /* no such replica */
	assert_false(place_parse(p, "block-4", 0, name, &at, &r));   /* not distributed */
	assert_false(place_parse(p, "stale-size-1-7", 0, name, &at, &r));
	for (unsigned i = 0; i < ARRAY_LEN(refused); i++)
		assert_int_equal(place_name(p, refused[i], &at), -EINVAL);
	for (unsigned i = 0; i < ARRAY_LEN(others); i++) {
		assert_int_equal(place_name(p, others[i], &at), 0);
		assert_true(!at.is_shard && at.n == 3 && at.node[2] == 2);
	}
	assert_int_equal(record_name(&obj, "a-1", 2, UINT64_MAX), 0);
	assert_string_equal(obj.name, "stale-a-1-2-18446744073709551615");
	assert_true(record_parse(obj.name, name, &r, &seq));
	assert_string_equal(name, "a-1");
	assert_true(r == 2 && seq == UINT64_MAX);
	assert_false(record_parse("stale-1-2", name, &r, &seq));
	assert_false(record_parse("stale-size-64-2", name, &r, &seq));
	assert_false(record_parse("stale-size-1-x", name, &r, &seq));
	assert_false(record_parse("stale-", name, &r, &seq));
}

/* --- Set-up ----------------------------------------------------------------------------------- */

static CO_FN int nothing(void *arg)
{
	return 0;
}

static void test_setup_errors(void **state)
{
	static const struct {
		const char *text, *message;
	} cases[] = {
		{ "distributed[replicas=3]{mem,mem}", "replicas=3, but there are only 2 nodes" },
		{ "distributed[replicas=2,quorum=3]{mem,mem,mem}",
		  "quorum=3 must not be more than replicas=2" },
		{ "distributed[replicas=0]{mem,mem}", "option \"replicas\"" },
		{ "distributed[read=slowest]{mem}", "\"slowest\"" },
		{ "distributed{null}", "null holds one disk, no objects" },
	};

	for (unsigned i = 0; i < ARRAY_LEN(cases); i++) {
		const struct store_what what = { .text = cases[i].text, .in_memory = true };
		const char *failure = store_with(&what, nothing);

		if (!failure || !strstr(failure, cases[i].message))
			fail_msg("%s: %s", cases[i].text, failure ? failure : "was accepted");
	}
	conform_refuses("distributed{mem,mem}", "put sharded above it");
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_place_table),
		cmocka_unit_test(test_place_all),
		cmocka_unit_test(test_place_names),
		cmocka_unit_test(test_setup_errors),
	};
	int failed;

	conform_start();
	failed = cmocka_run_group_tests_name("placement", tests, NULL, NULL);
	conform_stop();
	return failed;
}
