/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer cache: what reaches the layer below, what is kept, what makes room. The conformance suites run over it in
 * test_layers.c and test_stores.c, races in test_never_old.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "conformance.h"
#include "layer/cache/cache_share.h"
#include "layer/cache/cache_table.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"

enum { KI = 1024, MI = KI * KI, GRANULE = 64 * KI };

/* Reads from the layer below so far. */
static uint64_t below(struct run *r)
{
	return run_ops(r, 1, CH_READ);
}

/* --- What is fetched -------------------------------------------------------------------------- */

static CO_FN int fetched_once(void *arg)
{
	struct run *r = arg;

	if (run_write(r, 0, MI, 0, 1) || run_check(r, 3 * MI + 100, 10, 1))
		return -1;
	EXPECT(r, below(r) == 1, "one read for one granule, not %" PRIu64, below(r));
	if (run_check(r, 3 * MI, GRANULE, 1) || run_check(r, 3 * MI + GRANULE - 1, 1, 1))
		return -1;
	EXPECT(r, below(r) == 1, "it was there: %" PRIu64, below(r));
	/* Eight granules by one request. */
	if (run_check(r, 2 * MI, 8 * GRANULE, 3))
		return -1;
	EXPECT(r, below(r) == 2, "a run is one request: %" PRIu64, below(r));
	/* What was written is there without any. */
	if (run_check(r, 0, MI, 2))
		return -1;
	EXPECT(r, below(r) == 2, "written and read: %" PRIu64, below(r));
	return 0;
}

static void test_fetched_once(void **state)
{
	conform_check("cache[mem=8Mi]:mem[size=4Mi]", 4 * MI, fetched_once);
}

static CO_FN void read_same(void *arg)
{
	struct run *r = arg;

	(void)run_check(r, MI + 512, 512, 1); /* notes its failure in the run */
}

static CO_FN int single_flight(void *arg)
{
	struct run *r = arg;
	struct co_group g = CO_GROUP_INIT;

	for (unsigned i = 0; i < 50; i++)
		co_group_spawn(&g, read_same, r);
	co_group_wait(&g);
	EXPECT(r, below(r) == 1, "50 reads of one granule are one fetch, not %" PRIu64, below(r));
	return 0;
}

static void test_single_flight(void **state)
{
	conform_check("cache:delay[read=20ms]:mem[size=4Mi]", 4 * MI, single_flight);
}

/* --- What is kept ------------------------------------------------------------------------------ */

static CO_FN int survives_a_scan(void *arg)
{
	struct run *r = arg;
	uint64_t before;

	/* Used twice, not one read after the other: worth keeping. */
	for (unsigned round = 0; round < 2; round++)
		for (uint64_t off = 0; off < MI / 2; off += GRANULE)
			if (run_check(r, off, 4 * KI, 1))
				return -1;
	/* 16 times the cache, in small steps. */
	for (uint64_t off = 16 * MI; off < 32 * MI; off += 4 * KI)
		if (run_check(r, off, 4 * KI, 1))
			return -1;
	before = below(r);
	for (uint64_t off = 0; off < MI / 2; off += GRANULE)
		if (run_check(r, off, 4 * KI, 1))
			return -1;
	EXPECT(r, below(r) == before, "%" PRIu64 " of 8 were pushed out by a scan",
	       below(r) - before);
	return 0;
}

static void test_survives_a_scan(void **state)
{
	conform_check("cache[mem=1Mi]:mem[size=32Mi]", 32 * MI, survives_a_scan);
}

static CO_FN int errors_are_not_kept(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	char buf[512];
	struct iovec v;
	struct iov iov = iov_one(&v, buf, sizeof(buf));
	const struct ext e = { &obj_none, 0, sizeof(buf) };

	EXPECT(r, ch_read(c, e, &iov, 0) == -EIO, "the first read fails below");
	if (run_check(r, 0, 512, 1) || run_write(r, 0, 512, 0, 1) || run_check(r, 0, GRANULE, 1))
		return -1;
	return 0;
}

static void test_errors_are_not_kept(void **state)
{
	conform_check("cache:fault[ops=read,count=1]:mem[size=1Mi]", MI, errors_are_not_kept);
}

static CO_FN int failed_write_is_read_below(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	char buf[512], got[512];
	struct iovec v;
	struct iov iov = iov_one(&v, buf, sizeof(buf));
	const struct ext e = { &obj_none, 0, sizeof(buf) };

	memset(buf, 'x', sizeof(buf));
	if (run_check(r, 0, 512, 1))
		return -1;
	/* The layer below took it and failed to say so. */
	EXPECT(r, ch_write(c, e, &iov, 0) == -EIO, "the write fails");
	iov = iov_one(&v, got, sizeof(got));
	EXPECT(r, ch_read(c, e, &iov, 0) == 0 && memcmp(got, buf, sizeof(got)) == 0,
	       "what is read is what the layer below has");
	return 0;
}

static void test_failed_write_is_read_below(void **state)
{
	conform_check("cache:fault[ops=write,when=after]:mem[size=1Mi]", MI,
		      failed_write_is_read_below);
}

/* --- The table ---------------------------------------------------------------------------------- */

static void fill(struct cache_table *t, const struct obj *obj, uint64_t n)
{
	struct granule *g = cache_table_begin(t, obj, n);

	assert_non_null(g);
	memset(granule_data(g), (int)n, 4096);
	cache_table_fill(t, g, true, 0);
}

static CO_FN int table_limit(void *arg)
{
	struct cache_table *t = NULL;
	struct cache_view v;
	struct obj obj;

	assert_int_equal(obj_set(&obj, "block-1"), 0);
	assert_int_equal(cache_table_new(MI, 4096, &t), 0);
	for (uint64_t n = 0; n < 10000; n++) {
		fill(t, &obj, n);
		cache_table_view(t, &v);
		assert_true(v.bytes <= MI);
		assert_true(v.ghosts <= 2 * 256);
	}
	assert_true(v.granules > 200 && v.evictions > 9000);
	cache_table_drop_from(t, &obj, 0);
	cache_table_view(t, &v);
	assert_int_equal(v.granules, 0);
	cache_table_free(t);
	return 0;
}

static void test_table_limit(void **state)
{
	assert_int_equal(reactor_call_blocking(reactor_get(0), table_limit, NULL), 0);
}

static CO_FN int table_drop(void *arg)
{
	struct cache_table *t = NULL;
	struct granule *g;
	struct obj a, b;
	char buf[8];
	struct iovec v;
	struct iov iov = iov_one(&v, buf, sizeof(buf));

	assert_int_equal(obj_set(&a, "a"), 0);
	assert_int_equal(obj_set(&b, "b"), 0);
	b.hash = a.hash; /* names decide, not hashes */
	assert_int_equal(cache_table_new(MI, 4096, &t), 0);
	fill(t, &a, 7);
	assert_int_equal(cache_table_read(t, &b, 7, 0, 8, &iov, 0), CACHE_MISS);
	assert_int_equal(cache_table_read(t, &a, 7, 0, 8, &iov, 0), CACHE_HIT);
	assert_int_equal(buf[0], 7);
	/* Dropped while it is fetched: what comes is not kept, and the next one may fetch at once. */
	g = cache_table_begin(t, &b, 1);
	assert_non_null(g);
	assert_null(cache_table_begin(t, &b, 1));
	cache_table_drop(t, &b, 1);
	fill(t, &b, 1);
	memset(granule_data(g), 99, 4096);
	cache_table_fill(t, g, true, 0);
	assert_int_equal(cache_table_read(t, &b, 1, 0, 8, &iov, 0), CACHE_HIT);
	assert_int_equal(buf[0], 1);
	cache_table_free(t);
	return 0;
}

static void test_table_drop(void **state)
{
	assert_int_equal(reactor_call_blocking(reactor_get(0), table_drop, NULL), 0);
}

/* --- Lending ----------------------------------------------------------------------------------- */

static bool has(const struct loan *loan, int byte)
{
	const uint8_t *p = loan->base;

	return p[0] == byte && p[4095] == byte;
}

/* What is lent stays where it is, whatever becomes of it in the table. */
static CO_FN int table_lend(void *arg)
{
	struct cache_table *t = NULL;
	struct loan kept, dropped, changed, none;
	struct granule *g;
	struct cache_view v;
	struct iovec vec;
	char bytes[4096];
	const struct iov iov = iov_one(&vec, bytes, sizeof(bytes));

	assert_int_equal(cache_table_new(MI, 4096, &t), 0);
	for (uint64_t n = 1; n <= 3; n++)
		fill(t, &obj_none, n);
	assert_int_equal(cache_table_lend(t, &obj_none, 1, 0, 4096, &kept), 0);
	assert_int_equal(cache_table_lend(t, &obj_none, 2, 0, 4096, &dropped), 0);
	assert_int_equal(cache_table_lend(t, &obj_none, 3, 0, 4096, &changed), 0);
	cache_table_view(t, &v);
	assert_int_equal(v.hits, 3);
	/* Absent, on its way, dropped: not lent. */
	assert_int_equal(cache_table_lend(t, &obj_none, 4, 0, 4096, &none), -EAGAIN);
	g = cache_table_begin(t, &obj_none, 4);
	assert_int_equal(cache_table_lend(t, &obj_none, 4, 0, 4096, &none), -EAGAIN);
	cache_table_fill(t, g, false, 0);
	cache_table_drop(t, &obj_none, 2);
	assert_int_equal(cache_table_lend(t, &obj_none, 2, 0, 4096, &none), -EAGAIN);
	memset(bytes, 33, sizeof(bytes));
	cache_table_change(t, &obj_none, 3, 0, 4096, &iov, 0);
	assert_true(has(&changed, 33)); /* in place: no new granule beside one that somebody has */
	/* Many others come; what was used once would go. */
	for (uint64_t n = 1000; n < 3000; n++)
		fill(t, &obj_none, n);
	assert_int_equal(cache_table_read(t, &obj_none, 1, 0, 4096, &iov, 0), CACHE_HIT);
	assert_int_equal(cache_table_read(t, &obj_none, 3, 0, 4096, &iov, 0), CACHE_HIT);
	assert_true(has(&kept, 1) && has(&dropped, 2) && has(&changed, 33));
	cache_table_limit(t, 0);
	assert_true(has(&kept, 1) && has(&dropped, 2) && has(&changed, 33));
	loan_return(&kept);
	loan_return(&dropped);
	loan_return(&changed);
	cache_table_limit(t, 0);
	cache_table_view(t, &v);
	assert_true(v.granules <= 16); /* as many as stripes */
	cache_table_free(t);
	return 0;
}

static void test_table_lend(void **state)
{
	assert_int_equal(reactor_call_blocking(reactor_get(0), table_lend, NULL), 0);
}

/* All that comes is asked for again soon, so it goes into the main queue. */
static CO_FN void fill_twice(struct cache_table *t, uint64_t n)
{
	fill(t, &obj_none, n);
	assert_int_equal(cache_table_read(t, &obj_none, n, 0, 1, NULL, 0), CACHE_HIT);
	assert_int_equal(cache_table_read(t, &obj_none, n, 2, 1, NULL, 0), CACHE_HIT);
}

/*
 * Clients that don't take what they asked for hold a part of the memory at most, all of the small queue perhaps, and
 * others go on.
 */
static CO_FN int table_lends_little(void *arg)
{
	struct cache_table *t = NULL;
	struct loan loan[256];
	struct cache_view v;
	unsigned lent = 0;

	assert_int_equal(cache_table_new(MI, 4096, &t), 0);
	for (uint64_t n = 0; n < 256; n++) {
		fill(t, &obj_none, n);
		lent += cache_table_lend(t, &obj_none, n, 0, 512, &loan[lent]) == 0;
	}
	assert_in_range(lent, 16, 64);
	for (uint64_t n = 1000; n < 3000; n++) {
		fill_twice(t, n);
		cache_table_view(t, &v);
		assert_true(v.bytes <= MI);
	}
	cache_table_limit(t, MI / 2);
	cache_table_view(t, &v);
	assert_true(v.bytes <= MI / 2);
	while (lent)
		loan_return(&loan[--lent]);
	fill(t, &obj_none, 5000);
	assert_int_equal(cache_table_lend(t, &obj_none, 5000, 0, 512, &loan[0]), 0);
	loan_return(&loan[0]);
	cache_table_free(t);
	return 0;
}

static void test_table_lends_little(void **state)
{
	assert_int_equal(reactor_call_blocking(reactor_get(0), table_lends_little, NULL), 0);
}

/* --- One limit for all -------------------------------------------------------------------------- */

static CO_FN int shared_limit(void *arg)
{
	struct cache_table *t[3] = { NULL };
	struct cache_share s[3];
	struct cache_view v;

	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(cache_table_new(16 * MI, 4096, &t[i]), 0);
	cache_share_join(&s[0], t[0], 16 * MI);
	for (uint64_t n = 0; n < 5000; n++)
		fill(t[0], &obj_none, n);
	cache_table_view(t[0], &v);
	assert_true(v.bytes > 15 * MI && v.bytes <= 16 * MI);
	/* What is too much goes at once. */
	cache_mem_limit(12 * MI);
	cache_table_view(t[0], &v);
	assert_true(v.bytes > 11 * MI && v.bytes <= 12 * MI);
	/* One wants little; the others share the rest. */
	cache_share_join(&s[1], t[1], 2 * MI);
	cache_share_join(&s[2], t[2], 16 * MI);
	assert_int_equal(s[0].got, 5 * MI);
	assert_int_equal(s[1].got, 2 * MI);
	assert_int_equal(s[2].got, 5 * MI);
	cache_table_view(t[0], &v);
	assert_true(v.bytes <= 5 * MI);
	cache_share_leave(&s[2]);
	assert_int_equal(s[0].got, 10 * MI);
	cache_mem_limit(0);
	assert_int_equal(s[0].got, 16 * MI);
	for (uint64_t n = 0; n < 5000; n++)
		cache_table_drop(t[0], &obj_none, n);
	for (uint64_t n = 0; n < 5000; n++)
		fill(t[0], &obj_none, n);
	cache_table_view(t[0], &v);
	assert_true(v.bytes > 15 * MI);
	cache_share_leave(&s[1]);
	cache_share_leave(&s[0]);
	for (unsigned i = 0; i < 3; i++)
		cache_table_free(t[i]);
	return 0;
}

static void test_shared_limit(void **state)
{
	assert_int_equal(reactor_call_blocking(reactor_get(0), shared_limit, NULL), 0);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_fetched_once),
		cmocka_unit_test(test_single_flight),
		cmocka_unit_test(test_survives_a_scan),
		cmocka_unit_test(test_errors_are_not_kept),
		cmocka_unit_test(test_failed_write_is_read_below),
		cmocka_unit_test(test_table_limit),
		cmocka_unit_test(test_table_drop),
		cmocka_unit_test(test_table_lend),
		cmocka_unit_test(test_table_lends_little),
		cmocka_unit_test(test_shared_limit),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = cmocka_run_group_tests_name("cache", tests, NULL, NULL);
	conform_stop();
	return failed;
}
