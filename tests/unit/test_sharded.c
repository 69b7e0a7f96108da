/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer sharded: how many requests reach the store, and what flush promises when the store fails and comes back. The
 * conformance suite runs over it in test_layers.c; load is in test_sharded_load.c, volumes as such in
 * test_sharded_volume.c.
 *
 * What a crash would leave behind is what is in the store: these tests look at it there, past the layer.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"
#include "shard_help.h"

enum { KI = 1024, MI = KI * KI, SHARD = 4 * MI, BLOCK = 4 * KI };

/* --- How many requests ------------------------------------------------------------------------ */

/* A sequential writer of small blocks costs a put per shard, and nothing else. */
static CO_FN int sequential(void *arg)
{
	struct run *r = arg;
	struct shard_asked before = shard_asked(r), a;

	for (uint64_t off = 0; off < 16 * MI; off += BLOCK)
		if (run_write(r, off, BLOCK, 0, 1))
			return -1;
	EXPECT(r, shard_flush(r) == 0, "flush");
	a = shard_asked_since(r, &before);
	EXPECT(r, a.ops[CH_PUT] == 4, "%" PRIu64 " puts", a.ops[CH_PUT]);
	EXPECT(r, a.ops[CH_READ] == 0, "%" PRIu64 " reads", a.ops[CH_READ]);
	EXPECT(r, a.bytes[CH_PUT] == 16 * MI, "%" PRIu64 " bytes", a.bytes[CH_PUT]);
	return shard_check_image(r, SHARD) ? -1 : run_check_all(r);
}

/* Nothing is fetched for what is overwritten wholly, whatever is there. */
static CO_FN int full_writes(void *arg)
{
	struct run *r = arg;
	struct shard_asked before, a;

	if (run_write(r, 0, r->what->size, 0, 1) || shard_flush(r))
		return -1;
	before = shard_asked(r);
	if (run_write(r, 0, r->what->size, 0, 2))
		return -1;
	EXPECT(r, shard_flush(r) == 0, "flush");
	a = shard_asked_since(r, &before);
	/* The disk ends within the third shard; what lies behind needs no fetching either. */
	EXPECT(r, a.ops[CH_PUT] == 3 && a.ops[CH_READ] == 0, "%" PRIu64 " puts, %" PRIu64 " reads",
	       a.ops[CH_PUT], a.ops[CH_READ]);
	EXPECT(r, shard_object_size(r, 2) == MI + BLOCK, "the last shard has %" PRIi64 " bytes",
	       shard_object_size(r, 2));
	return shard_check_image(r, SHARD);
}

/* A put of a part fetches exactly what is missing; more than a few gaps by one request. */
static CO_FN int partial_writes(void *arg)
{
	struct run *r = arg;
	struct shard_asked before, a;

	if (run_write(r, 0, SHARD, 0, 1) || shard_flush(r))
		return -1;
	before = shard_asked(r);
	if (run_write(r, 8 * BLOCK, BLOCK, 0, 1))
		return -1;
	EXPECT(r, shard_flush(r) == 0, "flush");
	a = shard_asked_since(r, &before);
	EXPECT(r, a.ops[CH_PUT] == 1 && a.ops[CH_READ] == 2, "%" PRIu64 " puts, %" PRIu64 " reads",
	       a.ops[CH_PUT], a.ops[CH_READ]);
	EXPECT(r, a.bytes[CH_READ] == SHARD - BLOCK, "%" PRIu64 " bytes", a.bytes[CH_READ]);

	before = shard_asked(r);
	for (uint64_t i = 0; i < 64; i++)
		if (run_write(r, 3 * i * BLOCK, BLOCK, 0, 1))
			return -1;
	EXPECT(r, shard_flush(r) == 0, "flush");
	a = shard_asked_since(r, &before);
	EXPECT(r, a.ops[CH_PUT] == 1 && a.ops[CH_READ] == 1,
	       "%" PRIu64 " puts, %" PRIu64 " reads %" PRIu64 " bytes", a.ops[CH_PUT],
	       a.ops[CH_READ], a.bytes[CH_READ]);

	/* Of a shard that does not exist nothing is fetched. */
	before = shard_asked(r);
	if (run_write(r, SHARD + 5 * BLOCK, BLOCK, 0, 1))
		return -1;
	EXPECT(r, shard_flush(r) == 0, "flush");
	a = shard_asked_since(r, &before);
	EXPECT(r, a.ops[CH_PUT] == 1 && a.ops[CH_READ] == 0, "%" PRIu64 " puts, %" PRIu64 " reads",
	       a.ops[CH_PUT], a.ops[CH_READ]);
	return shard_check_image(r, SHARD);
}

/* Reads fetch what they need and no more; what is missing, or in memory, costs nothing. */
static CO_FN int reads(void *arg)
{
	struct run *r = arg;
	struct shard_asked before = shard_asked(r), a;

	if (run_check_all(r))
		return -1;
	a = shard_asked_since(r, &before);
	EXPECT(r, a.ops[CH_READ] == 0, "%" PRIu64 " reads of nothing", a.ops[CH_READ]);
	if (run_write(r, 0, SHARD, 0, 1) || run_check(r, 1000 * BLOCK, 10 * BLOCK, 1) ||
	    shard_flush(r))
		return -1;
	before = shard_asked(r);
	if (run_check(r, 77 * 512, 512, 1))
		return -1;
	a = shard_asked_since(r, &before);
	EXPECT(r, a.ops[CH_READ] == 1 && a.bytes[CH_READ] == 512, "%" PRIu64 " bytes",
	       a.bytes[CH_READ]);
	/* One block is in memory, so the two parts around it are asked for, in one or two requests. */
	before = shard_asked(r);
	if (run_write(r, 10 * BLOCK, BLOCK, 0, 1) || run_check(r, 0, SHARD, 1))
		return -1;
	a = shard_asked_since(r, &before);
	EXPECT(r, a.ops[CH_READ] <= 2 && a.bytes[CH_READ] <= SHARD, "%" PRIu64 " reads",
	       a.ops[CH_READ]);
	return 0;
}

/* Whole shards go by one delete, and only those that exist. */
static CO_FN int trims(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	struct shard_asked before = shard_asked(r), a;

	if (!c)
		return -1;
	EXPECT(r, ch_trim(c, shard_at(0, r->what->size), 0) == 0, "trim");
	EXPECT(r, ch_zero(c, shard_at(100, r->what->size - 200), IO_PUNCH) == 0, "zero");
	EXPECT(r, shard_flush(r) == 0, "flush");
	a = shard_asked_since(r, &before);
	EXPECT(r, a.ops[CH_DEL] + a.ops[CH_PUT] + a.ops[CH_READ] == 0, "requests for nothing");

	for (uint64_t n = 1; n < 9; n += 2)
		if (run_write(r, n * SHARD + 5, 7000, 0, 1))
			return -1;
	EXPECT(r, shard_flush(r) == 0, "flush");
	/* One more, in memory only. */
	if (run_write(r, 2 * SHARD, 512, 0, 1))
		return -1;
	before = shard_asked(r);
	EXPECT(r, ch_trim(c, shard_at(SHARD, 7 * SHARD), 0) == 0, "trim");
	memset(r->model + SHARD, 0, 7 * SHARD);
	a = shard_asked_since(r, &before);
	EXPECT(r, a.ops[CH_DEL] == 1, "%" PRIu64 " deletes", a.ops[CH_DEL]);
	EXPECT(r, shard_object_size(r, 1) == -ENOENT && shard_object_size(r, 7) == -ENOENT,
	       "still there");
	EXPECT(r, run_status(r, "dirty_shards") == 0, "not forgotten");
	EXPECT(r, run_status(r, "known_shards") == 0, "%" PRIu64 " known",
	       run_status(r, "known_shards"));
	return shard_check_image(r, SHARD) ? -1 : run_check_all(r);
}

/* A shard that becomes all zero goes away, by whatever means. */
static CO_FN int zero_shards(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);

	if (!c || shard_fill(r, 0, 3 * SHARD, 'x') || shard_flush(r))
		return -1;
	EXPECT(r, shard_object_size(r, 0) == SHARD, "not written");
	/* Zeroes written as data; in two halves; the rest in the store is zero already. */
	if (shard_fill(r, 0, SHARD, 0))
		return -1;
	EXPECT(r, ch_zero(c, shard_at(SHARD, SHARD / 2), IO_PUNCH) == 0, "zero");
	EXPECT(r, ch_zero(c, shard_at(SHARD + SHARD / 2, SHARD / 2), 0) == 0, "zero");
	if (shard_fill(r, 2 * SHARD, SHARD / 2, 0))
		return -1;
	memset(r->model, 0, 2 * SHARD);
	EXPECT(r, shard_flush(r) == 0, "flush");
	EXPECT(r, shard_object_size(r, 0) == -ENOENT, "0 is there");
	EXPECT(r, shard_object_size(r, 1) == -ENOENT, "1 is there");
	EXPECT(r, shard_object_size(r, 2) == SHARD, "2 is not there");
	if (shard_fill(r, 2 * SHARD + SHARD / 2, SHARD / 2, 0))
		return -1;
	EXPECT(r, shard_flush(r) == 0, "flush");
	EXPECT(r, shard_object_size(r, 2) == -ENOENT, "2 is there");
	return shard_check_image(r, SHARD) ? -1 : run_check_all(r);
}

static CO_FN int expect_size(struct run *r, uint64_t n, int64_t size)
{
	int64_t is = shard_object_size(r, n);

	EXPECT(r, is == size, "block-%" PRIu64 " has %" PRIi64 " bytes, not %" PRIi64, n, is, size);
	return 0;
}

/* What reaches the store: objects end with their last page that is not zero, by whatever way it came to be the last. */
static CO_FN int short_objects(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	struct shard_asked before = shard_asked(r), a;

	if (!c || shard_fill(r, 0, BLOCK, 'a') || shard_fill(r, SHARD + 100 * KI + 512, 512, 'b') ||
	    shard_fill(r, 2 * SHARD, SHARD / 2, 'c') ||
	    shard_fill(r, 2 * SHARD + SHARD / 2, SHARD / 2, 0))
		return -1;
	EXPECT(r, ch_zero(c, shard_at(BLOCK, SHARD - BLOCK), IO_PUNCH) == 0, "zero");
	EXPECT(r, shard_flush(r) == 0, "flush");
	a = shard_asked_since(r, &before);
	EXPECT(r, a.ops[CH_PUT] == 3 && a.ops[CH_READ] == 0, "%" PRIu64 " puts, %" PRIu64 " reads",
	       a.ops[CH_PUT], a.ops[CH_READ]);
	EXPECT(r, a.bytes[CH_PUT] == BLOCK + 104 * KI + SHARD / 2, "%" PRIu64 " bytes",
	       a.bytes[CH_PUT]);
	if (expect_size(r, 0, BLOCK) || expect_size(r, 1, 104 * KI) || expect_size(r, 2, SHARD / 2))
		return -1;
	return shard_check_image(r, SHARD) ? -1 : run_check_all(r);
}

/* Behind the end of what we put there is nothing to read, whether for a client or to complete a put. */
static CO_FN int behind_the_end(void *arg)
{
	struct run *r = arg;
	struct shard_asked before, a;

	if (shard_fill(r, 0, BLOCK, 'a') || shard_flush(r))
		return -1;
	before = shard_asked(r);
	if (run_check(r, 64 * KI, SHARD - 64 * KI, 1))
		return -1;
	a = shard_asked_since(r, &before);
	EXPECT(r, a.ops[CH_READ] == 0, "%" PRIu64 " reads of nothing", a.ops[CH_READ]);

	/* Longer: what is in front is fetched, by one request. */
	if (shard_fill(r, MI, BLOCK, 'b') || run_check(r, 0, SHARD, 1))
		return -1;
	before = shard_asked(r);
	EXPECT(r, shard_flush(r) == 0, "flush");
	a = shard_asked_since(r, &before);
	EXPECT(r, a.ops[CH_PUT] == 1 && a.ops[CH_READ] == 1, "%" PRIu64 " puts, %" PRIu64 " reads",
	       a.ops[CH_PUT], a.ops[CH_READ]);
	EXPECT(r, a.bytes[CH_READ] <= 16 * KI && a.bytes[CH_PUT] == MI + BLOCK,
	       "%" PRIu64 " bytes read, %" PRIu64 " put", a.bytes[CH_READ], a.bytes[CH_PUT]);
	if (run_check_all(r))
		return -1;

	/* All that the object has is overwritten: nothing is fetched, though most of the shard is not in memory. */
	before = shard_asked(r);
	if (shard_fill(r, 0, MI + 64 * KI, 'c'))
		return -1;
	EXPECT(r, shard_flush(r) == 0, "flush");
	a = shard_asked_since(r, &before);
	EXPECT(r, a.ops[CH_PUT] == 1 && a.ops[CH_READ] == 0, "%" PRIu64 " puts, %" PRIu64 " reads",
	       a.ops[CH_PUT], a.ops[CH_READ]);

	/* Shorter again, and gone. */
	if (shard_fill(r, BLOCK, MI + 60 * KI, 0) || shard_flush(r) || expect_size(r, 0, BLOCK) ||
	    shard_check_image(r, SHARD) || run_check_all(r) || shard_fill(r, 0, BLOCK, 0) ||
	    shard_flush(r) || expect_size(r, 0, -ENOENT))
		return -1;
	return shard_check_image(r, SHARD) ? -1 : run_check_all(r);
}

/* Of objects that were there at the start nothing is taken for granted, whatever their length. */
static CO_FN int found_objects(void *arg)
{
	struct run *r = arg;

	if (shard_fill(r, 100, BLOCK, 'a') || shard_fill(r, 2 * SHARD - 512, 512, 'b') ||
	    shard_flush(r) || run_shut(r) || run_reopen(r, false) || run_check_all(r))
		return -1;
	if (shard_fill(r, MI, 512, 'c') || shard_fill(r, SHARD, 512, 'd') || shard_flush(r) ||
	    expect_size(r, 0, MI + BLOCK) || expect_size(r, 1, SHARD))
		return -1;
	return shard_check_image(r, SHARD) ? -1 : run_check_all(r);
}

static void test_short_objects(void **state)
{
	shard_check("sharded:mem[partial=off]", 12 * MI, short_objects);
	shard_check("sharded:mem[partial=off]", 8 * MI, behind_the_end);
	shard_check("sharded:mem[partial=off]", 8 * MI, found_objects);
	/* What a cache keeps of an object ends where the object does. */
	shard_check("sharded:cache:mem[partial=off]", 12 * MI, short_objects);
	shard_check("sharded:cache:mem[partial=off]", 8 * MI, behind_the_end);
	shard_check("sharded:cache:mem[partial=off]", 8 * MI, found_objects);
}

static void test_requests(void **state)
{
	shard_check("sharded:mem[partial=off]", 16 * MI, sequential);
	shard_check("sharded:mem[partial=off]", 9 * MI + 512, full_writes);
	shard_check("sharded:mem[partial=off]", 8 * MI, partial_writes);
	shard_check("sharded:mem[partial=off]", 8 * MI, reads);
	shard_check("sharded:mem[partial=off]", 40 * MI, trims);
	shard_check("sharded:mem[partial=off]", 12 * MI, zero_shards);
}

/* FUA puts the shards concerned and no others. */
static CO_FN int fua(void *arg)
{
	struct run *r = arg;
	struct shard_asked before, a;

	if (run_write(r, 0, 1000, 0, 1))
		return -1;
	before = shard_asked(r);
	if (run_write(r, SHARD - 1000, 2000, IO_FUA, 1)) /* shards 0 and 1 */
		return -1;
	a = shard_asked_since(r, &before);
	EXPECT(r, a.ops[CH_PUT] == 2, "%" PRIu64 " puts", a.ops[CH_PUT]);
	if (shard_check_image(r, SHARD) || run_write(r, 2 * SHARD, 1000, 0, 1))
		return -1;
	before = shard_asked(r);
	if (run_write(r, 0, 1000, IO_FUA, 1))
		return -1;
	a = shard_asked_since(r, &before);
	EXPECT(r, a.ops[CH_PUT] == 1, "%" PRIu64 " puts", a.ops[CH_PUT]);
	EXPECT(r, shard_object_size(r, 2) == -ENOENT, "put without need");
	return 0;
}

/* Nobody flushes: age does. */
static CO_FN int age(void *arg)
{
	struct run *r = arg;

	if (run_write(r, 5000, 1000, 0, 1) || shard_wait_status(r, "puts", 1) ||
	    shard_check_image(r, SHARD))
		return -1;
	if (run_write(r, 5000, 1000, 0, 1) || run_write(r, SHARD, 512, 0, 1) ||
	    shard_wait_status(r, "puts", 3))
		return -1;
	return shard_check_image(r, SHARD);
}

static void test_when(void **state)
{
	shard_check("sharded:mem[partial=off]", 12 * MI, fua);
	shard_check("sharded[age=3ms]:mem[partial=off]", 12 * MI, age);
	shard_check("sharded[age=0s]:mem[partial=off]", 12 * MI, age);
}

/* --- A store that fails ----------------------------------------------------------------------- */

/* Each flush reports the error until the data is safe; meanwhile it can be read. */
static CO_FN int flush_fails(void *arg)
{
	struct run *r = arg;

	if (run_write(r, 100, 5000, 0, 1) || shard_flush(r) || shard_break_store(r, true))
		return -1;
	if (run_write(r, 3000, 5000, 0, 1) || run_write(r, SHARD, SHARD, 0, 1))
		return -1;
	for (unsigned i = 0; i < 3; i++) {
		EXPECT(r, shard_flush(r) == -ENOSPC, "flush %u", i);
		/* What is written meanwhile goes on top of what could not be put. */
		if (run_write(r, 4000 + 100 * i, 600, 0, 1) || run_check_all(r))
			return -1;
	}
	EXPECT(r, run_status(r, "failures") >= 6, "%" PRIu64, run_status(r, "failures"));
	if (shard_break_store(r, false))
		return -1;
	EXPECT(r, shard_flush(r) == 0, "well again");
	EXPECT(r, run_status(r, "dirty_bytes") == 0, "%" PRIu64, run_status(r, "dirty_bytes"));
	EXPECT(r, run_status(r, "error") == UINT64_MAX, "error still shown");
	return shard_check_image(r, SHARD) ? -1 : run_check_all(r);
}

/* The same found in the background, by age; FUA tells it as well. */
static CO_FN int background_fails(void *arg)
{
	struct run *r = arg;

	if (shard_break_store(r, true) || run_write(r, 100, 5000, 0, 1) ||
	    shard_wait_status(r, "failures", 1))
		return -1;
	EXPECT(r, shard_flush(r) == -EIO, "flush");
	EXPECT(r, shard_fill(r, 9 * SHARD, 512, 'x') == 0, "a write is answered from memory");
	EXPECT(r, shard_flush(r) == -EIO, "flush");
	if (run_check_all(r) || shard_break_store(r, false))
		return -1;
	EXPECT(r, shard_flush(r) == 0, "well again");
	return shard_check_image(r, SHARD);
}

/* A trim that fails says so; what it leaves is decided by then. */
static CO_FN int trim_fails(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);

	if (!c || run_write(r, 0, 3 * SHARD, 0, 1) || shard_flush(r) || shard_break_store(r, true))
		return -1;
	EXPECT(r, ch_trim(c, shard_at(0, 2 * SHARD), 0) == -EIO, "trim");
	memset(r->model, 0, 2 * SHARD);
	if (run_check_all(r) || run_write(r, 5000, 5000, 0, 1))
		return -1;
	EXPECT(r, shard_flush(r) == -EIO, "flush");
	if (run_check_all(r) || shard_break_store(r, false))
		return -1;
	EXPECT(r, shard_flush(r) == 0, "well again");
	EXPECT(r, shard_object_size(r, 1) == -ENOENT, "1 is there");
	return shard_check_image(r, SHARD) ? -1 : run_check_all(r);
}

/* With memory full of what can't be stored, writes fail with the reason instead of waiting for ever. */
static CO_FN int full_and_failing(void *arg)
{
	struct run *r = arg;
	int rc = 0;

	if (shard_break_store(r, true))
		return -1;
	for (uint64_t off = 0; off < 8 * MI && !rc; off += 64 * KI)
		rc = shard_fill(r, off, 64 * KI, (uint8_t)(off / (64 * KI)));
	EXPECT(r, rc == -ENOSPC, "%s", err_name(rc));
	EXPECT(r, run_status(r, "dirty_bytes") <= MI, "%" PRIu64, run_status(r, "dirty_bytes"));
	EXPECT(r, shard_flush(r) == -ENOSPC, "flush");
	if (shard_break_store(r, false))
		return -1;
	EXPECT(r, shard_flush(r) == 0, "well again");
	/* The one that failed may have been written in part. */
	for (uint64_t off = 0; off < 8 * MI; off += 64 * KI)
		EXPECT(r, shard_fill(r, off, 64 * KI, (uint8_t)(1 + off / (64 * KI))) == 0,
		       "write");
	EXPECT(r, shard_flush(r) == 0, "flush");
	return shard_check_image(r, 64 * KI);
}

/* Puts fail now and then, before or after they were done: nothing is lost, nothing comes back. */
static CO_FN int random_failures(void *arg)
{
	struct run *r = arg;
	uint64_t random = 7, flushes = 0, failed = 0;
	struct chan *c = run_chan(r);

	if (shard_break_store(r, true))
		return -1;
	for (unsigned i = 0; i < 600 && c; i++) {
		uint64_t len = 1 + random_below(&random, 200000);
		uint64_t off = random_below(&random, r->what->size - len);
		uint64_t what = random_below(&random, 12);
		int rc = 0;

		if (what == 0) {
			rc = ch_trim(c, shard_at(off, len), 0);
			/* Parts may keep their data: set it anew either way. */
			if (run_write(r, off, len, 0, 1))
				return -1;
		} else if (what < 3) {
			do
				rc = ch_zero(c, shard_at(off, len), IO_PUNCH);
			while (rc == -EIO);
			memset(r->model + off, 0, len);
		} else if (what < 5) {
			rc = shard_flush(r);
			flushes++;
			failed += rc != 0;
			if (!rc && shard_check_image(r, 64 * KI))
				return -1;
		} else if (run_write(r, off, len, 0, 1)) {
			return -1;
		}
		EXPECT(r, rc == 0 || rc == -EIO, "%s", err_name(rc));
		if (i % 10 == 0 && run_check_all(r))
			return -1;
	}
	EXPECT(r, failed > 0 && failed < flushes, "%" PRIu64 " of %" PRIu64, failed, flushes);
	if (shard_break_store(r, false))
		return -1;
	EXPECT(r, shard_flush(r) == 0, "well again");
	return shard_check_image(r, 64 * KI) ? -1 : run_check_all(r);
}

static void test_failures(void **state)
{
	shard_check("sharded:fault[ops=put|del,error=ENOSPC,file=@/broken]:mem[partial=off]",
		    12 * MI, flush_fails);
	shard_check("sharded[age=2ms]:fault[ops=put|del,file=@/broken]:mem[partial=off]", 40 * MI,
		    background_fails);
	shard_check("sharded:fault[ops=put|del,file=@/broken]:mem[partial=off]", 12 * MI,
		    trim_fails);
	shard_check(
		"sharded[size=64Ki,dirty=1Mi,puts=4]:fault[ops=put|del,error=ENOSPC,file=@/broken]:"
		"mem[partial=off]",
		8 * MI, full_and_failing);
	shard_check(
		"sharded[size=64Ki,age=1ms,dirty=8Mi]:fault[ops=put|del,rate=5%,file=@/broken]:mem[partial=off]",
		2 * MI, random_failures);
	shard_check(
		"sharded[size=64Ki,dirty=8Mi]:fault[ops=put|del,rate=5%,when=after,file=@/broken]:mem[partial=off]",
		2 * MI, random_failures);
}

/* A read that fails fails, and nothing else does: a put that can't be completed keeps its data. */
static CO_FN int fetch_fails(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	struct iovec v;
	char byte[512];
	struct iov iov = iov_one(&v, byte, sizeof(byte));

	if (!c || run_write(r, 0, SHARD, 0, 1) || shard_flush(r) || run_write(r, 0, BLOCK, 0, 1) ||
	    shard_break_store(r, true))
		return -1;
	EXPECT(r, ch_read(c, shard_at(SHARD - 512, 512), &iov, 0) == -ETIMEDOUT, "read");
	EXPECT(r, shard_flush(r) == -ETIMEDOUT, "flush");
	if (run_check(r, 0, BLOCK, 1) || shard_break_store(r, false))
		return -1;
	EXPECT(r, shard_flush(r) == 0, "flush");
	return shard_check_image(r, SHARD) ? -1 : run_check_all(r);
}

static void test_fetch_fails(void **state)
{
	shard_check("sharded:fault[ops=read,error=ETIMEDOUT,file=@/broken]:mem[partial=off]",
		    8 * MI, fetch_fails);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_requests),    cmocka_unit_test(test_short_objects),
		cmocka_unit_test(test_when),        cmocka_unit_test(test_failures),
		cmocka_unit_test(test_fetch_fails),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	conform_start();
	failed = cmocka_run_group_tests_name("sharded", tests, NULL, NULL);
	conform_stop();
	return failed;
}
