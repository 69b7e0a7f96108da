/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The latency histogram.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "nbdrs/hist.h"

/* Every bucket follows the one before it without gap, up to the last. */
static void test_buckets(void **state)
{
	assert_int_equal(hist_bucket(0), 0);
	for (uint64_t v = 1; v < 1 << 20; v++) {
		unsigned before = hist_bucket(v - 1), b = hist_bucket(v);

		assert_true(b == before || b == before + 1);
	}
	for (unsigned top = 20; top < 40; top++) {
		uint64_t v = UINT64_C(1) << top;

		assert_int_equal(hist_bucket(v), hist_bucket(v - 1) + 1);
	}
	assert_int_equal(hist_bucket(UINT64_C(1) << 40), HIST_BUCKETS - 1);
	assert_int_equal(hist_bucket(UINT64_MAX), HIST_BUCKETS - 1);
}

/* One sample: every quantile is within 6.25 % of it, never below it, and in its bucket. */
static void test_precision(void **state)
{
	for (unsigned i = 0; i < 2000; i++) {
		struct hist h;
		uint64_t v = (uint64_t)random() << (random() % 9), q;

		memset(&h, 0, sizeof(h));
		hist_add(&h, v);
		q = hist_quantile(&h, 500000);
		assert_true(q >= v);
		assert_true(q - v <= v / 16);
		assert_int_equal(hist_bucket(q), hist_bucket(v));
		assert_true(hist_quantile(&h, 1) == q && hist_quantile(&h, 1000000) == q);
	}
}

static void test_quantiles(void **state)
{
	static struct hist h;

	assert_true(hist_quantile(&h, 500000) == 0);
	for (uint64_t v = 1; v <= 10; v++)
		hist_add(&h, v); /* below 16 ns buckets are exact */
	assert_true(hist_quantile(&h, 0) == 1);
	assert_true(hist_quantile(&h, 100000) == 1);
	assert_true(hist_quantile(&h, 100001) == 2);
	assert_true(hist_quantile(&h, 500000) == 5);
	assert_true(hist_quantile(&h, 990000) == 10);
	assert_true(hist_quantile(&h, 1000000) == 10);
	assert_true(hist_quantile(&h, 2000000) == 10);
}

/* Counts beyond 2^44 would overflow a product with a million. */
static void test_huge_counts(void **state)
{
	static struct hist h;

	atomic_store(&h.count[3], UINT64_C(1) << 60);
	atomic_store(&h.count[9], UINT64_C(1) << 60);
	assert_true(hist_quantile(&h, 500000) == 3);
	assert_true(hist_quantile(&h, 500001) == 9);
}

static void test_merge(void **state)
{
	static struct hist a, b, sum;

	hist_add(&a, 5);
	hist_add(&b, 5);
	hist_add(&b, 12);
	hist_merge(&sum, &a);
	hist_merge(&sum, &b);
	assert_true(atomic_load(&sum.count[5]) == 2);
	assert_true(atomic_load(&sum.count[12]) == 1);
	assert_true(hist_quantile(&sum, 990000) == 12);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_buckets),   cmocka_unit_test(test_precision),
		cmocka_unit_test(test_quantiles), cmocka_unit_test(test_huge_counts),
		cmocka_unit_test(test_merge),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
