/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Chains that get another size while they are open (ch_resize): what is kept, what reads as zeroes, what is left in the
 * store. Nothing else runs meanwhile, as the export sees to (net/resize.c; t-resize.py has all of it).
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

#include "nbdrs/cleanup.h"
#include "shard_help.h"

enum { KI = 1024, SHARD = 64 * KI, SIZE = 8 * SHARD, ODD = 3 * SHARD + 5 * 512 };

static CO_FN int resize(struct run *r, uint64_t size)
{
	struct chan *c = run_chan(r);
	struct err err = { "" };
	int rc = c ? 0 : -EIO;

	for (int phase = RESIZE_BEFORE; phase <= RESIZE_AFTER && !rc; phase++)
		rc = ch_resize(c, size, phase, &err);
	EXPECT(r, rc == 0, "resize: %s", err.msg);
	EXPECT(r, c->layer->size == size, "the top says %" PRIu64, (uint64_t)c->layer->size);
	return 0;
}

static CO_FN int check_bytes(struct run *r, uint64_t off, uint64_t len, uint8_t byte)
{
	struct chan *c = run_chan(r);
	_cleanup_free_ uint8_t *buf = malloc(len);
	struct iovec v;
	struct iov iov = iov_one(&v, buf, len);

	EXPECT(r, c && buf && ch_read(c, shard_at(off, len), &iov, 0) == 0, "read at %" PRIu64, off);
	for (uint64_t i = 0; i < len; i++)
		EXPECT(r, buf[i] == byte, "byte %" PRIu64 " is %02x, not %02x", off + i, buf[i], byte);
	return 0;
}

/* As shard_fill(), behind what the model knows. */
static CO_FN int fill_new(struct run *r, uint64_t off, uint64_t len, uint8_t byte)
{
	struct chan *c = run_chan(r);
	_cleanup_free_ uint8_t *buf = malloc(len);
	struct iovec v;
	struct iov iov = iov_one(&v, buf, len);

	EXPECT(r, c && buf, "no channel or no memory");
	memset(buf, byte, len);
	EXPECT(r, ch_write(c, shard_at(off, len), &iov, 0) == 0, "write at %" PRIu64, off);
	return 0;
}

/* Smaller, larger again, larger than ever; each time with what is unsaved, cached or read ahead. */
static CO_FN int sizes_come_and_go(void *arg)
{
	struct run *r = arg;

	if (shard_fill(r, 0, SIZE, 0xaa) || check_bytes(r, 0, SIZE, 0xaa))
		return -1;
	if (resize(r, ODD) || check_bytes(r, 0, ODD, 0xaa))
		return -1;
	if (resize(r, SIZE) || check_bytes(r, 0, ODD, 0xaa) || check_bytes(r, ODD, SIZE - ODD, 0))
		return -1;
	if (shard_fill(r, ODD, 512, 0xbb) || shard_fill(r, SIZE - 512, 512, 0xcc))
		return -1;
	if (resize(r, 2 * SIZE) || check_bytes(r, SIZE - 512, 512, 0xcc) || check_bytes(r, SIZE, SIZE, 0))
		return -1;
	/* The new part is as good as the old one: what is put there can be read, and completed. */
	if (fill_new(r, SIZE, SIZE, 0xd1) || shard_flush(r) || check_bytes(r, SIZE, SIZE, 0xd1) ||
	    fill_new(r, SIZE + 512, 512, 0xd2) || shard_flush(r) || check_bytes(r, SIZE, 512, 0xd1) ||
	    check_bytes(r, SIZE + 512, 512, 0xd2) || check_bytes(r, SIZE + 1024, SIZE - 1024, 0xd1))
		return -1;
	/* Back to what the test's end expects. */
	return resize(r, SIZE) || check_bytes(r, ODD, 512, 0xbb) || shard_fill(r, 0, SIZE, 0xdd) ||
			       check_bytes(r, 0, SIZE, 0xdd)
		       ? -1
		       : 0;
}

static void test_chains(void **state)
{
	static const char *const chains[] = {
		"sharded[size=64Ki]:mem",
		"sharded[size=64Ki]:mem[partial=off]",
		"readahead:sharded[size=64Ki]:mem[partial=off]",
		"cache:sharded[size=64Ki]:mem[partial=off]",
		"sharded[size=64Ki]:cache:mem[partial=off]",
		"sharded[size=64Ki]:cache[mode=writeback,lag=2ms]:mem[partial=off]",
		"sharded[size=64Ki]:distributed[replicas=2]{mem[partial=off],mem[partial=off]}",
	};

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(chains); i++)
		shard_check(chains[i], SIZE, sizes_come_and_go);
}

/* What is cut is gone from the store, and of the last shard nothing comes back. */
static CO_FN int the_store_is_cut(void *arg)
{
	struct run *r = arg;
	const uint64_t last = ODD / SHARD;

	if (shard_fill(r, 0, SIZE, 0xaa) || shard_flush(r) || resize(r, ODD))
		return -1;
	EXPECT(r, shard_object_size(r, last) == SHARD, "the last shard");
	for (uint64_t n = last + 1; n < SIZE / SHARD; n++)
		EXPECT(r, shard_object_size(r, n) == -ENOENT, "shard %" PRIu64 " is left", n);
	EXPECT(r, run_status(r, "known_shards") == last + 1, "%" PRIu64 " known", run_status(r, "known_shards"));
	if (resize(r, SIZE))
		return -1;
	return shard_fill(r, 0, SIZE, 0xee);
}

static void test_store(void **state)
{
	(void)state;
	shard_check("sharded[size=64Ki]:mem", SIZE, the_store_is_cut);
	shard_check("sharded[size=64Ki]:mem[partial=off]", SIZE, the_store_is_cut);
}

/* A store that fails: the size stays, and so does everything unsaved. */
static CO_FN int the_store_fails(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	struct err err = { "" };

	if (!c || shard_fill(r, 0, SIZE, 0xaa) || shard_break_store(r, true))
		return -1;
	EXPECT(r, ch_resize(c, SIZE / 2, RESIZE_NOW, &err) == -EIO, "smaller: %s", err.msg);
	EXPECT(r, c->layer->size == SIZE, "size");
	EXPECT(r, strstr(err.msg, "layer sharded"), "%s", err.msg);
	EXPECT(r, ch_resize(c, SIZE * 2, RESIZE_NOW, &err) == -EIO, "larger: %s", err.msg);
	EXPECT(r, c->layer->size == SIZE, "size");
	if (shard_break_store(r, false) || check_bytes(r, 0, SIZE, 0xaa))
		return -1;
	return shard_flush(r);
}

static void test_failures(void **state)
{
	(void)state;
	shard_check("sharded[size=64Ki]:fault[ops=put|del|list,file=@/broken]:mem[partial=off]", SIZE, the_store_fails);
}

static CO_FN int refused(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	struct err err = { "" };

	EXPECT(r, c && ch_resize(c, UINT64_MAX, RESIZE_BEFORE, &err) == -EINVAL, "2^64");
	EXPECT(r, ch_resize(c, UINT64_C(1) << 62, RESIZE_BEFORE, &err) == -EINVAL, "too many shards");
	EXPECT(r, strstr(err.msg, "it needs larger shards"), "%s", err.msg);
	return 0;
}

static void test_refused(void **state)
{
	(void)state;
	shard_check("sharded[size=64Ki]:mem", SIZE, refused);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_chains),
		cmocka_unit_test(test_store),
		cmocka_unit_test(test_failures),
		cmocka_unit_test(test_refused),
	};
	int failed;

	conform_start();
	failed = cmocka_run_group_tests_name("resize", tests, NULL, NULL);
	conform_stop();
	return failed;
}
