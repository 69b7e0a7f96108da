/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer sharded: how many requests reach the store, what flush promises when the store is slow, fails, or comes back,
 * and how much memory it takes. The conformance suite runs over it in test_layers.c; volumes as such are in
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
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "conformance.h"
#include "layer/shardbuf.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"

enum { KI = 1024, MI = KI * KI, SHARD = 4 * MI, BLOCK = 4 * KI };

/* --- Helpers ---------------------------------------------------------------------------------- */

static void check(const char *text, uint64_t size, int (*fn)(void *run))
{
	const struct conform what = {
		.text = text, .size = size, .is_volume = true, .in_chain = true
	};
	const char *failure = conform_with(&what, fn);

	if (failure)
		fail_msg("%s", failure);
}

static struct ext at(uint64_t off, uint64_t len)
{
	return (struct ext){ &obj_none, off, len };
}

/* What the layer below sharded was asked for. */
struct asked {
	uint64_t ops[CH_OPS], bytes[CH_OPS];
};

static void add_asked(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum)
{
	struct asked *a = arg;

	for (unsigned i = 0; depth == 1 && i < CH_OPS; i++) {
		a->ops[i] = atomic_load(&sum->ops[i]);
		a->bytes[i] = atomic_load(&sum->bytes[i]);
	}
}

static struct asked asked(struct run *r)
{
	struct asked a = { 0 };

	chain_each(r->chain, add_asked, &a);
	return a;
}

/* What was asked for since `before`. */
static struct asked asked_since(struct run *r, const struct asked *before)
{
	struct asked a = asked(r);

	for (unsigned i = 0; i < CH_OPS; i++) {
		a.ops[i] -= before->ops[i];
		a.bytes[i] -= before->bytes[i];
	}
	return a;
}

struct query {
	struct info info;
	const char *key;
	uint64_t value;
	bool is_found;
};

static void take_value(struct info *i, const char *key, const char *value)
{
	struct query *q = container_of(i, struct query, info);

	if (strcmp(key, q->key) == 0) {
		q->value = strtoull(value, NULL, 10);
		q->is_found = true;
	}
}

/* A line of the layer's status; UINT64_MAX when there is none. */
static uint64_t status(struct run *r, const char *key)
{
	struct query q = { .info = { take_value }, .key = key };
	struct layer *top = chain_top(r->chain);

	top->ops->status(top, &q.info);
	return q.is_found ? q.value : UINT64_MAX;
}

/* Waits until a number of the status is at least `least`. */
static CO_FN int wait_status(struct run *r, const char *key, uint64_t least)
{
	const uint64_t deadline = now_ns() + UINT64_C(20000000000);

	while (status(r, key) < least) {
		EXPECT(r, now_ns() < deadline, "%s never reached %" PRIu64, key, least);
		co_sleep(1000000);
	}
	return 0;
}

static CO_FN int flush(struct run *r)
{
	struct chan *c = run_chan(r);

	return c ? ch_flush(c) : -EIO;
}

/* All of `len` bytes the same, as the model knows then. */
static CO_FN int fill(struct run *r, uint64_t off, uint64_t len, uint8_t byte)
{
	struct chan *c = run_chan(r);
	_cleanup_free_ uint8_t *buf = malloc(len);
	struct iovec v;
	struct iov iov = iov_one(&v, buf, len);
	int rc;

	if (!c || !buf)
		return -1;
	memset(buf, byte, len);
	rc = ch_write(c, at(off, len), &iov, 0);
	if (!rc)
		memset(r->model + off, byte, len);
	return rc;
}

/* The store at the end of the chain, past everything. */
static CO_FN int open_store(struct run *r, struct chan **out)
{
	struct layer *l = chain_top(r->chain);

	while (l->kids_n)
		l = l->kids[0];
	EXPECT(r, layer_chan_open(l, out) == 0, "the store's channel");
	return 0;
}

/* 0, -ENOENT; the object of shard n as far as it goes, zeroes behind. */
static CO_FN int read_object(struct chan *store, uint64_t n, uint8_t *to, uint64_t len)
{
	struct iovec v;
	struct iov iov = iov_one(&v, to, len);
	struct obj obj;

	shard_obj(&obj, n);
	return ch_read(store, (struct ext){ &obj, 0, len }, &iov, 0);
}

/* The disk as a crash would leave it. Shards of `shard` bytes. */
static CO_FN int read_image(struct run *r, uint8_t *image, uint64_t shard)
{
	struct chan *store = NULL;
	int rc = open_store(r, &store);

	for (uint64_t n = 0; n * shard < r->what->size && !rc; n++) {
		uint64_t len = MIN(shard, r->what->size - n * shard);

		rc = read_object(store, n, image + n * shard, len);
		if (rc == -ENOENT) {
			memset(image + n * shard, 0, len);
			rc = 0;
		}
	}
	if (store)
		layer_chan_close(store);
	return rc;
}

/* The store has all that was written. */
static CO_FN int check_image(struct run *r, uint64_t shard)
{
	_cleanup_free_ uint8_t *image = malloc(r->what->size);

	EXPECT(r, image, "no memory");
	EXPECT(r, read_image(r, image, shard) == 0, "image");
	for (uint64_t i = 0; i < r->what->size; i++)
		EXPECT(r, image[i] == r->model[i],
		       "byte %" PRIu64 " of the store is %02x, not %02x", i, image[i], r->model[i]);
	return 0;
}

/* Size of the object, or -errno. */
static CO_FN int64_t object_size(struct run *r, uint64_t n)
{
	struct chan *store = NULL;
	struct obj_stat st;
	struct obj obj;
	int rc = open_store(r, &store);

	if (rc)
		return rc;
	shard_obj(&obj, n);
	rc = ch_stat(store, &obj, &st);
	layer_chan_close(store);
	return rc ? rc : (int64_t)st.size;
}

static CO_FN int break_store(struct run *r, bool is_broken)
{
	char path[300];
	int fd;

	(void)snprintf(path, sizeof(path), "%s/broken", r->folder);
	if (!is_broken) {
		EXPECT(r, unlink(path) == 0, "%s", path);
		return 0;
	}
	fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
	EXPECT(r, fd >= 0, "%s", path);
	close(fd);
	return 0;
}

/* --- How many requests ------------------------------------------------------------------------ */

/* A sequential writer of small blocks costs a put per shard, and nothing else. */
static CO_FN int sequential(void *arg)
{
	struct run *r = arg;
	struct asked before = asked(r), a;

	for (uint64_t off = 0; off < 16 * MI; off += BLOCK)
		if (run_write(r, off, BLOCK, 0, 1))
			return -1;
	EXPECT(r, flush(r) == 0, "flush");
	a = asked_since(r, &before);
	EXPECT(r, a.ops[CH_PUT] == 4, "%" PRIu64 " puts", a.ops[CH_PUT]);
	EXPECT(r, a.ops[CH_READ] == 0, "%" PRIu64 " reads", a.ops[CH_READ]);
	EXPECT(r, a.bytes[CH_PUT] == 16 * MI, "%" PRIu64 " bytes", a.bytes[CH_PUT]);
	return check_image(r, SHARD) ? -1 : run_check_all(r);
}

/* Nothing is fetched for what is overwritten wholly, whatever is there. */
static CO_FN int full_writes(void *arg)
{
	struct run *r = arg;
	struct asked before, a;

	if (run_write(r, 0, r->what->size, 0, 1) || flush(r))
		return -1;
	before = asked(r);
	if (run_write(r, 0, r->what->size, 0, 2))
		return -1;
	EXPECT(r, flush(r) == 0, "flush");
	a = asked_since(r, &before);
	/* The disk ends within the third shard; what lies behind needs no fetching either. */
	EXPECT(r, a.ops[CH_PUT] == 3 && a.ops[CH_READ] == 0, "%" PRIu64 " puts, %" PRIu64 " reads",
	       a.ops[CH_PUT], a.ops[CH_READ]);
	EXPECT(r, object_size(r, 2) == SHARD, "the last shard has %" PRIi64 " bytes",
	       object_size(r, 2));
	return check_image(r, SHARD);
}

/* A put of a part fetches exactly what is missing; more than a few gaps by one request. */
static CO_FN int partial_writes(void *arg)
{
	struct run *r = arg;
	struct asked before, a;

	if (run_write(r, 0, SHARD, 0, 1) || flush(r))
		return -1;
	before = asked(r);
	if (run_write(r, 8 * BLOCK, BLOCK, 0, 1))
		return -1;
	EXPECT(r, flush(r) == 0, "flush");
	a = asked_since(r, &before);
	EXPECT(r, a.ops[CH_PUT] == 1 && a.ops[CH_READ] == 2, "%" PRIu64 " puts, %" PRIu64 " reads",
	       a.ops[CH_PUT], a.ops[CH_READ]);
	EXPECT(r, a.bytes[CH_READ] == SHARD - BLOCK, "%" PRIu64 " bytes", a.bytes[CH_READ]);

	before = asked(r);
	for (uint64_t i = 0; i < 64; i++)
		if (run_write(r, 3 * i * BLOCK, BLOCK, 0, 1))
			return -1;
	EXPECT(r, flush(r) == 0, "flush");
	a = asked_since(r, &before);
	EXPECT(r, a.ops[CH_PUT] == 1 && a.ops[CH_READ] == 1,
	       "%" PRIu64 " puts, %" PRIu64 " reads %" PRIu64 " bytes", a.ops[CH_PUT],
	       a.ops[CH_READ], a.bytes[CH_READ]);

	/* Of a shard that does not exist nothing is fetched. */
	before = asked(r);
	if (run_write(r, SHARD + 5 * BLOCK, BLOCK, 0, 1))
		return -1;
	EXPECT(r, flush(r) == 0, "flush");
	a = asked_since(r, &before);
	EXPECT(r, a.ops[CH_PUT] == 1 && a.ops[CH_READ] == 0, "%" PRIu64 " puts, %" PRIu64 " reads",
	       a.ops[CH_PUT], a.ops[CH_READ]);
	return check_image(r, SHARD);
}

/* Reads fetch what they need and no more; what is missing, or in memory, costs nothing. */
static CO_FN int reads(void *arg)
{
	struct run *r = arg;
	struct asked before = asked(r), a;

	if (run_check_all(r))
		return -1;
	a = asked_since(r, &before);
	EXPECT(r, a.ops[CH_READ] == 0, "%" PRIu64 " reads of nothing", a.ops[CH_READ]);
	if (run_write(r, 0, SHARD, 0, 1) || run_check(r, 1000 * BLOCK, 10 * BLOCK, 1) || flush(r))
		return -1;
	before = asked(r);
	if (run_check(r, 77 * 512, 512, 1))
		return -1;
	a = asked_since(r, &before);
	EXPECT(r, a.ops[CH_READ] == 1 && a.bytes[CH_READ] == 512, "%" PRIu64 " bytes",
	       a.bytes[CH_READ]);
	/* One block is in memory, so the two parts around it are asked for, in one or two requests. */
	before = asked(r);
	if (run_write(r, 10 * BLOCK, BLOCK, 0, 1) || run_check(r, 0, SHARD, 1))
		return -1;
	a = asked_since(r, &before);
	EXPECT(r, a.ops[CH_READ] <= 2 && a.bytes[CH_READ] <= SHARD, "%" PRIu64 " reads",
	       a.ops[CH_READ]);
	return 0;
}

/* Whole shards go by one delete, and only those that exist. */
static CO_FN int trims(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	struct asked before = asked(r), a;

	if (!c)
		return -1;
	EXPECT(r, ch_trim(c, at(0, r->what->size), 0) == 0, "trim");
	EXPECT(r, ch_zero(c, at(100, r->what->size - 200), IO_PUNCH) == 0, "zero");
	EXPECT(r, flush(r) == 0, "flush");
	a = asked_since(r, &before);
	EXPECT(r, a.ops[CH_DEL] + a.ops[CH_PUT] + a.ops[CH_READ] == 0, "requests for nothing");

	for (uint64_t n = 1; n < 9; n += 2)
		if (run_write(r, n * SHARD + 5, 7000, 0, 1))
			return -1;
	EXPECT(r, flush(r) == 0, "flush");
	/* One more, in memory only. */
	if (run_write(r, 2 * SHARD, 512, 0, 1))
		return -1;
	before = asked(r);
	EXPECT(r, ch_trim(c, at(SHARD, 7 * SHARD), 0) == 0, "trim");
	memset(r->model + SHARD, 0, 7 * SHARD);
	a = asked_since(r, &before);
	EXPECT(r, a.ops[CH_DEL] == 1, "%" PRIu64 " deletes", a.ops[CH_DEL]);
	EXPECT(r, object_size(r, 1) == -ENOENT && object_size(r, 7) == -ENOENT, "still there");
	EXPECT(r, status(r, "dirty_shards") == 0, "not forgotten");
	EXPECT(r, status(r, "known_shards") == 0, "%" PRIu64 " known", status(r, "known_shards"));
	return check_image(r, SHARD) ? -1 : run_check_all(r);
}

/* A shard that becomes all zero goes away, by whatever means. */
static CO_FN int zero_shards(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);

	if (!c || fill(r, 0, 3 * SHARD, 'x') || flush(r))
		return -1;
	EXPECT(r, object_size(r, 0) == SHARD, "not written");
	/* Zeroes written as data; in two halves; the rest in the store is zero already. */
	if (fill(r, 0, SHARD, 0))
		return -1;
	EXPECT(r, ch_zero(c, at(SHARD, SHARD / 2), IO_PUNCH) == 0, "zero");
	EXPECT(r, ch_zero(c, at(SHARD + SHARD / 2, SHARD / 2), 0) == 0, "zero");
	if (fill(r, 2 * SHARD, SHARD / 2, 0))
		return -1;
	memset(r->model, 0, 2 * SHARD);
	EXPECT(r, flush(r) == 0, "flush");
	EXPECT(r, object_size(r, 0) == -ENOENT, "0 is there");
	EXPECT(r, object_size(r, 1) == -ENOENT, "1 is there");
	EXPECT(r, object_size(r, 2) == SHARD, "2 is not there");
	if (fill(r, 2 * SHARD + SHARD / 2, SHARD / 2, 0))
		return -1;
	EXPECT(r, flush(r) == 0, "flush");
	EXPECT(r, object_size(r, 2) == -ENOENT, "2 is there");
	return check_image(r, SHARD) ? -1 : run_check_all(r);
}

static void test_requests(void **state)
{
	check("sharded:mem[partial=off]", 16 * MI, sequential);
	check("sharded:mem[partial=off]", 9 * MI + 512, full_writes);
	check("sharded:mem[partial=off]", 8 * MI, partial_writes);
	check("sharded:mem[partial=off]", 8 * MI, reads);
	check("sharded:mem[partial=off]", 40 * MI, trims);
	check("sharded:mem[partial=off]", 12 * MI, zero_shards);
}

/* FUA puts the shards concerned and no others. */
static CO_FN int fua(void *arg)
{
	struct run *r = arg;
	struct asked before, a;

	if (run_write(r, 0, 1000, 0, 1))
		return -1;
	before = asked(r);
	if (run_write(r, SHARD - 1000, 2000, IO_FUA, 1)) /* shards 0 and 1 */
		return -1;
	a = asked_since(r, &before);
	EXPECT(r, a.ops[CH_PUT] == 2, "%" PRIu64 " puts", a.ops[CH_PUT]);
	if (check_image(r, SHARD) || run_write(r, 2 * SHARD, 1000, 0, 1))
		return -1;
	before = asked(r);
	if (run_write(r, 0, 1000, IO_FUA, 1))
		return -1;
	a = asked_since(r, &before);
	EXPECT(r, a.ops[CH_PUT] == 1, "%" PRIu64 " puts", a.ops[CH_PUT]);
	EXPECT(r, object_size(r, 2) == -ENOENT, "put without need");
	return 0;
}

/* Nobody flushes: age does. */
static CO_FN int age(void *arg)
{
	struct run *r = arg;

	if (run_write(r, 5000, 1000, 0, 1) || wait_status(r, "puts", 1) || check_image(r, SHARD))
		return -1;
	if (run_write(r, 5000, 1000, 0, 1) || run_write(r, SHARD, 512, 0, 1) ||
	    wait_status(r, "puts", 3))
		return -1;
	return check_image(r, SHARD);
}

static void test_when(void **state)
{
	check("sharded:mem[partial=off]", 12 * MI, fua);
	check("sharded[age=3ms]:mem[partial=off]", 12 * MI, age);
	check("sharded[age=0s]:mem[partial=off]", 12 * MI, age);
}

/* --- A store that fails ----------------------------------------------------------------------- */

/* Each flush reports the error until the data is safe; meanwhile it can be read. */
static CO_FN int flush_fails(void *arg)
{
	struct run *r = arg;

	if (run_write(r, 100, 5000, 0, 1) || flush(r) || break_store(r, true))
		return -1;
	if (run_write(r, 3000, 5000, 0, 1) || run_write(r, SHARD, SHARD, 0, 1))
		return -1;
	for (unsigned i = 0; i < 3; i++) {
		EXPECT(r, flush(r) == -ENOSPC, "flush %u", i);
		/* What is written meanwhile goes on top of what could not be put. */
		if (run_write(r, 4000 + 100 * i, 600, 0, 1) || run_check_all(r))
			return -1;
	}
	EXPECT(r, status(r, "failures") >= 6, "%" PRIu64, status(r, "failures"));
	if (break_store(r, false))
		return -1;
	EXPECT(r, flush(r) == 0, "well again");
	EXPECT(r, status(r, "dirty_bytes") == 0, "%" PRIu64, status(r, "dirty_bytes"));
	EXPECT(r, status(r, "error") == UINT64_MAX, "error still shown");
	return check_image(r, SHARD) ? -1 : run_check_all(r);
}

/* The same found in the background, by age; FUA tells it as well. */
static CO_FN int background_fails(void *arg)
{
	struct run *r = arg;

	if (break_store(r, true) || run_write(r, 100, 5000, 0, 1) || wait_status(r, "failures", 1))
		return -1;
	EXPECT(r, flush(r) == -EIO, "flush");
	EXPECT(r, fill(r, 9 * SHARD, 512, 'x') == 0, "a write is answered from memory");
	EXPECT(r, flush(r) == -EIO, "flush");
	if (run_check_all(r) || break_store(r, false))
		return -1;
	EXPECT(r, flush(r) == 0, "well again");
	return check_image(r, SHARD);
}

/* A trim that fails says so; what it leaves is decided by then. */
static CO_FN int trim_fails(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);

	if (!c || run_write(r, 0, 3 * SHARD, 0, 1) || flush(r) || break_store(r, true))
		return -1;
	EXPECT(r, ch_trim(c, at(0, 2 * SHARD), 0) == -EIO, "trim");
	memset(r->model, 0, 2 * SHARD);
	if (run_check_all(r) || run_write(r, 5000, 5000, 0, 1))
		return -1;
	EXPECT(r, flush(r) == -EIO, "flush");
	if (run_check_all(r) || break_store(r, false))
		return -1;
	EXPECT(r, flush(r) == 0, "well again");
	EXPECT(r, object_size(r, 1) == -ENOENT, "1 is there");
	return check_image(r, SHARD) ? -1 : run_check_all(r);
}

/* With memory full of what can't be stored, writes fail with the reason instead of waiting for ever. */
static CO_FN int full_and_failing(void *arg)
{
	struct run *r = arg;
	int rc = 0;

	if (break_store(r, true))
		return -1;
	for (uint64_t off = 0; off < 8 * MI && !rc; off += 64 * KI)
		rc = fill(r, off, 64 * KI, (uint8_t)(off / (64 * KI)));
	EXPECT(r, rc == -ENOSPC, "%s", err_name(rc));
	EXPECT(r, status(r, "dirty_bytes") <= MI, "%" PRIu64, status(r, "dirty_bytes"));
	EXPECT(r, flush(r) == -ENOSPC, "flush");
	if (break_store(r, false))
		return -1;
	EXPECT(r, flush(r) == 0, "well again");
	/* The one that failed may have been written in part. */
	for (uint64_t off = 0; off < 8 * MI; off += 64 * KI)
		EXPECT(r, fill(r, off, 64 * KI, (uint8_t)(1 + off / (64 * KI))) == 0, "write");
	EXPECT(r, flush(r) == 0, "flush");
	return check_image(r, 64 * KI);
}

/* Puts fail now and then, before or after they were done: nothing is lost, nothing comes back. */
static CO_FN int random_failures(void *arg)
{
	struct run *r = arg;
	uint64_t random = 7, flushes = 0, failed = 0;
	struct chan *c = run_chan(r);

	for (unsigned i = 0; i < 600 && c; i++) {
		uint64_t len = 1 + random_below(&random, 200000);
		uint64_t off = random_below(&random, r->what->size - len);
		uint64_t what = random_below(&random, 12);
		int rc = 0;

		if (what == 0) {
			rc = ch_trim(c, at(off, len), 0);
			/* Parts may keep their data: set it anew either way. */
			if (run_write(r, off, len, 0, 1))
				return -1;
		} else if (what < 3) {
			do
				rc = ch_zero(c, at(off, len), IO_PUNCH);
			while (rc == -EIO);
			memset(r->model + off, 0, len);
		} else if (what < 5) {
			rc = flush(r);
			flushes++;
			failed += rc != 0;
			if (!rc && check_image(r, 64 * KI))
				return -1;
		} else if (run_write(r, off, len, 0, 1)) {
			return -1;
		}
		EXPECT(r, rc == 0 || rc == -EIO, "%s", err_name(rc));
		if (i % 10 == 0 && run_check_all(r))
			return -1;
	}
	EXPECT(r, failed > 0 && failed < flushes, "%" PRIu64 " of %" PRIu64, failed, flushes);
	for (unsigned i = 0; i < 1000 && flush(r); i++)
		co_yield();
	return check_image(r, 64 * KI) ? -1 : run_check_all(r);
}

static void test_failures(void **state)
{
	check("sharded:fault[ops=put|del,error=ENOSPC,file=@/broken]:mem[partial=off]", 12 * MI,
	      flush_fails);
	check("sharded[age=2ms]:fault[ops=put|del,file=@/broken]:mem[partial=off]", 40 * MI,
	      background_fails);
	check("sharded:fault[ops=put|del,file=@/broken]:mem[partial=off]", 12 * MI, trim_fails);
	check("sharded[size=64Ki,dirty=1Mi,puts=4]:fault[ops=put|del,error=ENOSPC,file=@/broken]:"
	      "mem[partial=off]",
	      8 * MI, full_and_failing);
	check("sharded[size=64Ki,age=1ms,dirty=8Mi]:fault[ops=put|del,rate=5%]:mem[partial=off]",
	      2 * MI, random_failures);
	check("sharded[size=64Ki,dirty=8Mi]:fault[ops=put|del,rate=5%,when=after]:mem[partial=off]",
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

	if (!c || run_write(r, 0, SHARD, 0, 1) || flush(r) || run_write(r, 0, BLOCK, 0, 1) ||
	    break_store(r, true))
		return -1;
	EXPECT(r, ch_read(c, at(SHARD - 512, 512), &iov, 0) == -ETIMEDOUT, "read");
	EXPECT(r, flush(r) == -ETIMEDOUT, "flush");
	if (run_check(r, 0, BLOCK, 1) || break_store(r, false))
		return -1;
	EXPECT(r, flush(r) == 0, "flush");
	return check_image(r, SHARD) ? -1 : run_check_all(r);
}

static void test_fetch_fails(void **state)
{
	check("sharded:fault[ops=read,error=ETIMEDOUT,file=@/broken]:mem[partial=off]", 8 * MI,
	      fetch_fails);
}

/* --- Many at a time --------------------------------------------------------------------------- */

/*
 * Writers write ever higher numbers into their own blocks; a flush that began after a number was answered must find
 * at least that number in the store when it ends.
 */
enum { WRITERS = 6, BLOCKS = 64, ROUNDS = 12, PAUSE_NS = 100000 };

struct stream {
	struct run *r;
	unsigned index, reactor;
	_Atomic uint64_t answered[BLOCKS];
	_Atomic bool *stop;
	int rc;
};

static uint64_t place_of(unsigned writer, unsigned block)
{
	return ((uint64_t)block * WRITERS + writer) * 12 * KI;
}

static CO_FN int stream_here(void *arg)
{
	struct stream *s = arg;
	struct run *r = s->r;
	struct chan *c = run_chan(r);
	uint64_t random = s->index + 1, buf[BLOCK / sizeof(uint64_t)];
	struct iovec v;
	struct iov iov = iov_one(&v, buf, sizeof(buf) / 2);

	for (uint64_t n = 1; c && !atomic_load(s->stop); n++) {
		unsigned b = (unsigned)random_below(&random, BLOCKS);

		for (unsigned i = 0; i < ARRAY_LEN(buf); i++)
			buf[i] = n;
		EXPECT(r, ch_write(c, at(place_of(s->index, b), iov.len), &iov, 0) == 0, "write");
		atomic_store(&s->answered[b], n);
		co_sleep(PAUSE_NS);
	}
	return 0;
}

static CO_FN void stream(void *arg)
{
	struct stream *s = arg;

	s->rc = reactor_call(reactor_get(s->reactor), stream_here, s);
}

static CO_FN int check_versions(struct run *r, const uint64_t *least, uint8_t *image,
				uint64_t shard)
{
	EXPECT(r, read_image(r, image, shard) == 0, "image");
	for (unsigned w = 0; w < WRITERS; w++) {
		for (unsigned b = 0; b < BLOCKS; b++) {
			uint64_t got;

			memcpy(&got, image + place_of(w, b), sizeof(got));
			EXPECT(r, got >= least[w * BLOCKS + b],
			       "writer %u block %u: %" PRIu64 " in the store, flushed %" PRIu64, w,
			       b, got, least[w * BLOCKS + b]);
		}
	}
	return 0;
}

static CO_FN int flush_rounds(struct run *r, struct stream *streams, uint8_t *image)
{
	_cleanup_free_ uint64_t *least = calloc((size_t)WRITERS * BLOCKS, sizeof(*least));

	EXPECT(r, least, "no memory");
	for (unsigned i = 0; i < ROUNDS; i++) {
		for (unsigned w = 0; w < WRITERS; w++)
			for (unsigned b = 0; b < BLOCKS; b++)
				least[w * BLOCKS + b] = atomic_load(&streams[w].answered[b]);
		EXPECT(r, flush(r) == 0, "flush");
		if (check_versions(r, least, image, 64 * KI))
			return -1;
	}
	return 0;
}

/* Writers never stop, and flushes end all the same. */
static CO_FN int flush_under_load(void *arg)
{
	struct run *r = arg;
	_cleanup_free_ struct stream *streams = calloc(WRITERS, sizeof(*streams));
	_cleanup_free_ uint8_t *image = malloc(r->what->size);
	struct co_group g = CO_GROUP_INIT;
	_Atomic bool stop = false;
	int rc;

	EXPECT(r, streams && image, "no memory");
	for (unsigned i = 0; i < WRITERS; i++) {
		streams[i].r = r;
		streams[i].index = i;
		streams[i].reactor = i % reactors_n();
		streams[i].stop = &stop;
		co_group_spawn(&g, stream, &streams[i]);
	}
	rc = flush_rounds(r, streams, image);
	atomic_store(&stop, true);
	co_group_wait(&g);
	for (unsigned i = 0; i < WRITERS; i++)
		EXPECT(r, streams[i].rc == 0, "writer %u", i);
	return rc;
}

static void test_under_load(void **state)
{
	const uint64_t size = (uint64_t)WRITERS * BLOCKS * 12 * KI;

	check("sharded[size=64Ki]:mem[partial=off]", size, flush_under_load);
	check("sharded[size=64Ki,age=1ms,puts=3]:delay[write=300us,read=100us,jitter=1ms]:"
	      "mem[partial=off]",
	      size, flush_under_load);
}

struct fiber {
	struct run *r;
	uint64_t n;
	int rc;
};

static CO_FN void flush_fiber(void *arg)
{
	struct fiber *f = arg;

	f->rc = flush(f->r);
}

/* While a put is on its way the shard can be read, written and trimmed; what was answered stays answered. */
static CO_FN int while_putting(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	struct fiber f = { .r = r };
	struct co_group g = CO_GROUP_INIT;

	if (!c)
		return -1;
	for (unsigned i = 0; i < 4; i++) {
		if (run_write(r, 0, 50000, 0, 1))
			return -1;
		co_group_spawn(&g, flush_fiber, &f);
		if (wait_status(r, "puts_in_flight", 1) || run_check_all(r) ||
		    run_write(r, 30000, 40000, 0, 1) || run_check_all(r))
			return -1;
		EXPECT(r, ch_zero(c, at(10000, 5000), IO_PUNCH) == 0, "zero");
		memset(r->model + 10000, 0, 5000);
		if (run_check_all(r))
			return -1;
		if (i % 2) { /* waits for the put: an object is never in two requests */
			EXPECT(r, ch_trim(c, at(0, 64 * KI), 0) == 0, "trim");
			memset(r->model, 0, 64 * KI);
		}
		co_group_wait(&g);
		EXPECT(r, f.rc == 0, "flush: %s", err_name(f.rc));
		if (run_check_all(r))
			return -1;
		EXPECT(r, flush(r) == 0, "flush");
		if (check_image(r, 64 * KI) || run_check_all(r))
			return -1;
	}
	return 0;
}

static void test_while_putting(void **state)
{
	check("sharded[size=64Ki]:delay[write=20ms]:mem[partial=off]", 256 * KI, while_putting);
}

/* --- Memory ----------------------------------------------------------------------------------- */

enum { CROWD = 200 };

static CO_FN void write_fiber(void *arg)
{
	struct fiber *f = arg;

	for (uint64_t i = 0; i < 4 && !f->rc; i++) {
		uint64_t off = (f->n * 4 + i) * 32 * KI;

		f->rc = fill(f->r, off, 24 * KI, (uint8_t)(f->n + i + 1));
		if (status(f->r, "dirty_bytes") > MI && !f->rc)
			f->rc = -E2BIG;
	}
}

/* Far more is written at a time than may be dirty: writers wait, all is stored, and the limit holds throughout. */
static CO_FN int limited(void *arg)
{
	struct run *r = arg;
	_cleanup_free_ struct fiber *v = calloc(CROWD, sizeof(*v));
	struct co_group g = CO_GROUP_INIT;

	EXPECT(r, v, "no memory");
	for (unsigned i = 0; i < CROWD; i++) {
		v[i] = (struct fiber){ .r = r, .n = i };
		co_group_spawn(&g, write_fiber, &v[i]);
	}
	co_group_wait(&g);
	for (unsigned i = 0; i < CROWD; i++)
		EXPECT(r, v[i].rc == 0, "writer %u: %s", i, err_name(v[i].rc));
	EXPECT(r, flush(r) == 0, "flush");
	EXPECT(r, status(r, "dirty_bytes") == 0, "%" PRIu64, status(r, "dirty_bytes"));
	return check_image(r, 64 * KI) ? -1 : run_check_all(r);
}

enum { STALLED = 1000, STALLED_LEN = 64 * KI };

static CO_FN void stalled_fiber(void *arg)
{
	static uint8_t ones[STALLED_LEN]; /* one for all: what is measured is the layer's memory */
	struct fiber *f = arg;
	struct chan *c = run_chan(f->r);
	struct iovec v;
	struct iov iov = iov_one(&v, ones, sizeof(ones));

	memset(ones, 1, sizeof(ones));
	f->rc = c ? ch_write(c, at(f->n * STALLED_LEN, STALLED_LEN), &iov, 0) : -EIO;
}

/* Bytes of this process in memory. */
static uint64_t resident(void)
{
	FILE *f = fopen("/proc/self/statm", "re");
	unsigned long all = 0, pages = 0;

	if (f) {
		if (fscanf(f, "%lu %lu", &all, &pages) != 2)
			pages = 0;
		(void)fclose(f);
	}
	return (uint64_t)pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* 1,000 writes against a store that takes its time: memory is what was allowed, and fibers. */
static CO_FN int stalled(void *arg)
{
	struct run *r = arg;
	_cleanup_free_ struct fiber *v = calloc(STALLED, sizeof(*v));
	struct co_group g = CO_GROUP_INIT;
	uint64_t before = resident(), grown;

	EXPECT(r, v && before, "no memory");
	for (unsigned i = 0; i < STALLED; i++) {
		v[i] = (struct fiber){ .r = r, .n = i };
		co_group_spawn(&g, stalled_fiber, &v[i]);
	}
	if (wait_status(r, "dirty_bytes", 31 * MI))
		return -1;
	grown = resident() - before;
	co_group_wait(&g);
	for (unsigned i = 0; i < STALLED; i++)
		EXPECT(r, v[i].rc == 0, "writer %u: %s", i, err_name(v[i].rc));
	EXPECT(r, grown < 64 * MI, "%" PRIu64 " MiB", grown / MI);
	memset(r->model, 1, (size_t)STALLED * STALLED_LEN);
	EXPECT(r, flush(r) == 0, "flush");
	return check_image(r, SHARD);
}

static void test_memory(void **state)
{
	check("sharded[dirty=32Mi]:delay[write=200ms]:mem[partial=off]", 64 * MI, stalled);
	check("sharded[size=64Ki,dirty=1Mi]:delay[write=200us]:mem[partial=off]", 32 * MI, limited);
	check("sharded[size=64Ki,dirty=1Mi]:mem[partial=off]", 32 * MI, limited);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_requests),   cmocka_unit_test(test_when),
		cmocka_unit_test(test_failures),   cmocka_unit_test(test_fetch_fails),
		cmocka_unit_test(test_under_load), cmocka_unit_test(test_while_putting),
		cmocka_unit_test(test_memory),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	conform_start();
	failed = cmocka_run_group_tests_name("sharded", tests, NULL, NULL);
	conform_stop();
	return failed;
}
