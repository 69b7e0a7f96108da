/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The memory that granules of layer `cache` lie in.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "layer/cache/cache_arena.h"
#include "nbdrs/cleanup.h"

enum { GRANULE = 65536, N = 40, MORE = 3 };

static bool is_inside(const struct cache_arena *a, const uint8_t *p)
{
	return p >= a->base && p < a->base + (size_t)a->n * a->granule;
}

/* Each is a place of its own; those beyond the size are malloc's. */
static void test_all(void **state)
{
	struct cache_arena a;
	uint8_t *p[N + MORE];

	(void)state;
	assert_int_equal(cache_arena_init(&a, N * GRANULE + GRANULE / 2, GRANULE), 0);
	assert_int_equal(a.n, N);
	for (unsigned i = 0; i < N + MORE; i++) {
		p[i] = cache_arena_get(&a);
		assert_non_null(p[i]);
		assert_int_equal((uintptr_t)p[i] % 4096, 0);
		assert_int_equal(is_inside(&a, p[i]), i < N);
		memset(p[i], (int)i, GRANULE);
	}
	for (unsigned i = 0; i < N + MORE; i++) {
		for (unsigned k = 0; k < GRANULE; k += 4096)
			assert_int_equal(p[i][k], i);
		cache_arena_put(&a, p[i]);
	}
	cache_arena_put(&a, NULL);
	cache_arena_free(&a);
}

/* What was given back is taken before what was never used: it has memory. */
static void test_again(void **state)
{
	struct cache_arena a;
	uint8_t *p, *q;

	(void)state;
	assert_int_equal(cache_arena_init(&a, N * GRANULE, GRANULE), 0);
	p = cache_arena_get(&a);
	q = cache_arena_get(&a);
	cache_arena_put(&a, p);
	assert_ptr_equal(cache_arena_get(&a), p);
	cache_arena_put(&a, q);
	cache_arena_put(&a, p);
	assert_int_equal(a.fresh, 2);
	cache_arena_free(&a);
}

/* Pages of [p, p + len) that have memory. */
static unsigned resident(uint8_t *p, size_t len)
{
	unsigned char there[GRANULE / 4096];
	unsigned n = 0;

	assert_int_equal(mincore(p, len, there), 0);
	for (size_t i = 0; i < len / 4096; i++)
		n += there[i] & 1;
	return n;
}

static void check_trim(bool locks)
{
	struct cache_arena a;
	uint8_t *kept, *back, *later;

	assert_int_equal(cache_arena_init(&a, N * GRANULE, GRANULE), 0);
	if (locks)
		assert_int_equal(mlock2(a.base, (size_t)N * GRANULE, MLOCK_ONFAULT), 0);
	kept = cache_arena_get(&a);
	back = cache_arena_get(&a);
	later = cache_arena_get(&a);
	memset(kept, 1, GRANULE);
	memset(back, 2, GRANULE);
	memset(later, 3, GRANULE);
	cache_arena_put(&a, back);
	cache_arena_trim(&a);
	cache_arena_trim(&a);
	cache_arena_put(&a, later);
	assert_int_equal(resident(kept, GRANULE), GRANULE / 4096);
	assert_int_equal(resident(back, GRANULE), 0);
	assert_ptr_equal(cache_arena_get(&a), later); /* that one has memory */
	assert_ptr_equal(cache_arena_get(&a), back);
	assert_int_equal(back[GRANULE - 1], 0);
	assert_int_equal(kept[GRANULE - 1], 1);
	memset(back, 4, GRANULE);
	cache_arena_put(&a, back);
	cache_arena_trim(&a);
	assert_int_equal(resident(back, GRANULE), 0);
	cache_arena_put(&a, kept);
	cache_arena_put(&a, later);
	cache_arena_free(&a);
}

static void test_trim(void **state)
{
	(void)state;
	check_trim(false);
}

/* As in a daemon that locks its memory. */
static void test_trim_locked(void **state)
{
	(void)state;
	check_trim(true);
}

/* Address space can be had for no more than malloc has. */
static void test_none(void **state)
{
	struct cache_arena a;
	uint8_t *p;

	(void)state;
	assert_int_equal(cache_arena_init(&a, UINT64_C(1) << 62, 4 << 20), 0);
	assert_null(a.base);
	p = cache_arena_get(&a);
	assert_non_null(p);
	memset(p, 1, 4 << 20);
	cache_arena_put(&a, p);
	cache_arena_free(&a);
	assert_int_equal(cache_arena_init(&a, GRANULE / 2, GRANULE), 0);
	p = cache_arena_get(&a);
	assert_non_null(p);
	cache_arena_put(&a, p);
	cache_arena_free(&a);
}

static void *take_and_give(void *arg)
{
	struct cache_arena *a = arg;
	uint8_t *p[N];
	unsigned n = 0, seed = (unsigned)(uintptr_t)&n;

	for (unsigned i = 0; i < 20000; i++) {
		if (n < N && (n == 0 || rand_r(&seed) % 2)) {
			p[n] = cache_arena_get(a);
			assert_non_null(p[n]);
			memcpy(p[n], (const void *)&p[n], sizeof(uint8_t *));
			*(void **)(void *)(p[n] + GRANULE - sizeof(void *)) = &n;
			n++;
		} else {
			n--;
			assert_memory_equal(p[n], (const void *)&p[n], sizeof(uint8_t *));
			assert_ptr_equal(*(void **)(void *)(p[n] + GRANULE - sizeof(void *)), &n);
			cache_arena_put(a, p[n]);
		}
		if (i % 1000 == 0)
			cache_arena_trim(a);
	}
	while (n)
		cache_arena_put(a, p[--n]);
	return NULL;
}

/* More than there are, by two threads: nobody gets what another one has. */
static void test_threads(void **state)
{
	struct cache_arena a;
	pthread_t other;

	(void)state;
	assert_int_equal(cache_arena_init(&a, N * GRANULE, GRANULE), 0);
	assert_int_equal(pthread_create(&other, NULL, take_and_give, &a), 0);
	take_and_give(&a);
	assert_int_equal(pthread_join(other, NULL), 0);
	cache_arena_free(&a);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_all),  cmocka_unit_test(test_again),
		cmocka_unit_test(test_trim), cmocka_unit_test(test_trim_locked),
		cmocka_unit_test(test_none), cmocka_unit_test(test_threads),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
