/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Scattered data, against plain memory.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/iov.h"

enum { LEN = 64, SEGMENTS_MAX = 6 };

/* `len` bytes of `mem` cut into n segments at random places. */
static struct iov cut(struct iovec *v, unsigned char *mem, size_t len, unsigned n)
{
	size_t at = 0;

	for (unsigned i = 0; i < n; i++) {
		size_t left = len - at, most = left - (n - 1 - i);
		size_t part = i == n - 1 ? left : 1 + (size_t)random() % most;

		v[i] = (struct iovec){ mem + at, part };
		at += part;
	}
	return (struct iov){ v, n, len };
}

static void fill(unsigned char *mem, size_t len)
{
	for (size_t i = 0; i < len; i++)
		mem[i] = (unsigned char)(random() | 1);
}

static void test_one(void **state)
{
	unsigned char mem[LEN];
	struct iovec v;
	struct iov iov = iov_one(&v, mem, sizeof(mem));

	assert_int_equal(iov.n, 1);
	assert_int_equal(iov.len, LEN);
	assert_ptr_equal(iov.v[0].iov_base, mem);
}

static void test_slice(void **state)
{
	for (int round = 0; round < 5000; round++) {
		unsigned char mem[LEN], out[LEN];
		struct iovec v[SEGMENTS_MAX], store[SEGMENTS_MAX];
		unsigned n = 1 + (unsigned)random() % SEGMENTS_MAX;
		struct iov src = cut(v, mem, LEN, n), part;
		size_t off = (size_t)random() % LEN, len = (size_t)random() % (LEN - off + 1);
		size_t sum = 0;

		fill(mem, LEN);
		part = iov_slice(&src, off, len, store, n);
		assert_int_equal(part.len, len);
		assert_true(part.n >= 1 && part.n <= n);
		for (unsigned i = 0; i < part.n; i++) {
			assert_true(part.v[i].iov_len > 0 || part.n == 1);
			sum += part.v[i].iov_len;
		}
		assert_int_equal(sum, len);
		assert_int_equal(iov_copy_out(&part, 0, out, LEN), len);
		assert_memory_equal(out, mem + off, len);
	}
}

/* A slice of nothing at the very end is fine. */
static void test_slice_empty(void **state)
{
	unsigned char mem[LEN];
	struct iovec v[2], store[1];
	struct iov src = cut(v, mem, LEN, 2), part;

	part = iov_slice(&src, LEN, 0, store, 1);
	assert_int_equal(part.len, 0);
	assert_int_equal(part.n, 1);
	assert_int_equal(part.v[0].iov_len, 0);
}

static void test_copy(void **state)
{
	for (int round = 0; round < 5000; round++) {
		unsigned char mem[LEN], model[LEN], data[LEN];
		struct iovec v[SEGMENTS_MAX];
		struct iov iov = cut(v, mem, LEN, 1 + (unsigned)random() % SEGMENTS_MAX);
		size_t off = (size_t)random() % (LEN + 3), len = (size_t)random() % (LEN + 3);
		size_t fits = off < LEN ? MIN(len, LEN - off) : 0;
		unsigned char out[LEN + 3];

		fill(mem, LEN);
		fill(data, LEN);
		memcpy(model, mem, LEN);

		memset(out, 0, sizeof(out));
		assert_int_equal(iov_copy_out(&iov, off, out, len), fits);
		if (fits)
			assert_memory_equal(out, model + off, fits);
		assert_int_equal(out[fits], 0); /* no byte too many */

		len = MIN(len, (size_t)LEN);
		fits = off < LEN ? MIN(len, LEN - off) : 0;
		if (fits)
			memcpy(model + off, data, fits);
		assert_int_equal(iov_copy_in(&iov, off, data, len), fits);
		assert_memory_equal(mem, model, LEN);

		if (off + len <= LEN) {
			memset(model + off, 0, len);
			iov_zero(&iov, off, len);
			assert_memory_equal(mem, model, LEN);
		}
	}
}

/* A single byte anywhere is found, in any cut. */
static void test_is_zero(void **state)
{
	unsigned char mem[LEN] = { 0 };
	struct iovec v[SEGMENTS_MAX];

	for (unsigned n = 1; n <= SEGMENTS_MAX; n++) {
		struct iov iov = cut(v, mem, LEN, n);

		assert_true(iov_is_zero(&iov));
		for (size_t i = 0; i < LEN; i++) {
			mem[i] = 0x80;
			assert_false(iov_is_zero(&iov));
			mem[i] = 0;
		}
	}
	for (size_t len = 0; len < LEN; len++) {
		struct iov iov = iov_one(v, mem, len);

		mem[len] = 1; /* just behind */
		assert_true(iov_is_zero(&iov));
		mem[len] = 0;
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_one),         cmocka_unit_test(test_slice),
		cmocka_unit_test(test_slice_empty), cmocka_unit_test(test_copy),
		cmocka_unit_test(test_is_zero),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
