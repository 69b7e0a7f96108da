/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer cache, clean data on disk: what is found after a restart and what is not used then, damage, another size.
 * Whose it is is in test_cache_whose.c, what makes room in test_cache_room.c. The conformance suites run over it in
 * test_layers.c and test_stores.c, races in test_never_old.c, crashes in tests/sim/test_cache_tier.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "layer/cache/cache_tier_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"
#include "tiered.h"

/* Turns a bit over at each `step` bytes of one of the files. */
static int damage(struct run *r, const char *name, uint64_t from, uint64_t step)
{
	char path[320];
	struct stat st;
	uint8_t b;
	int fd;

	(void)snprintf(path, sizeof(path), "%s/c/%s", r->folder, name);
	fd = open(path, O_RDWR);
	EXPECT(r, fd >= 0 && fstat(fd, &st) == 0, "%s", path);
	for (uint64_t at = from; at < (uint64_t)st.st_size; at += step) {
		EXPECT(r, pread(fd, &b, 1, (off_t)at) == 1, "read");
		b ^= 4;
		EXPECT(r, pwrite(fd, &b, 1, (off_t)at) == 1, "write");
	}
	EXPECT(r, close(fd) == 0, "close");
	return 0;
}

/* --- Restart ---------------------------------------------------------------------------------- */

static CO_FN int found_again(void *arg)
{
	static const char zeroes[4096];
	struct run *r = arg;

	if (tiered_fill(r) || run_check_all(r) || tiered_reopen(r) || run_check_all(r))
		return -1;
	EXPECT(r, tiered_below(r) == 0, "all was there, but for %" PRIu64 " reads",
	       tiered_below(r));
	EXPECT(r, run_status(r, "tier_hits") >= SIZE / GRANULE, "hits");
	EXPECT(r, run_status(r, "tier_bytes") == SIZE, "bytes: %" PRIu64,
	       run_status(r, "tier_bytes"));
	EXPECT(r, run_status(r, "tier_bad") == 0 && run_status(r, "tier_marks") == 0, "bad");
	/* Odd pieces, too. */
	if (run_check(r, 12345, 99999, 3) || run_check(r, SIZE - 1, 1, 1))
		return -1;
	EXPECT(r, tiered_below(r) == 0, "pieces: %" PRIu64, tiered_below(r));
	/* A change is one, before and after another start. */
	if (run_write(r, MI + 5000, 100, 0, 1) || run_zero(r, 2 * MI, sizeof(zeroes), 0))
		return -1;
	run_model(r, 2 * MI, zeroes, sizeof(zeroes));
	if (run_check_all(r) || tiered_reopen(r) || run_check_all(r))
		return -1;
	EXPECT(r, tiered_below(r) == 0, "what was fetched anew was kept: %" PRIu64,
	       tiered_below(r));
	return 0;
}

static void test_found_again(void **state)
{
	tiered_check(TIERED FILE_BELOW, SIZE, found_again);
	tiered_check("cache[disk=@/c,volume=v,size=8Mi,mem=1Mi,granule=4Ki]:" FILE_BELOW, SIZE,
		     found_again);
}

/* Below the mapping, written back. The journal's part of the folder is its own. */
static CO_FN int found_below(void *arg)
{
	struct run *r = arg;

	if (tiered_fill(r) || run_check_all(r) || tiered_reopen(r) || run_check_all(r))
		return -1;
	EXPECT(r, run_ops(r, 2, CH_READ) <= 2, "objects were read: %" PRIu64,
	       run_ops(r, 2, CH_READ));
	return 0;
}

static void test_found_below(void **state)
{
	tiered_check(
		"sharded[size=256Ki]:cache[disk=@/c,volume=v,size=12Mi,journal=2Mi,mode=writeback,mem=1Mi,lag=5ms]:"
		"file:@/vol/",
		SIZE, found_below);
}

/* A part of a granule is changed: the others stay. */
static CO_FN int others_stay(void *arg)
{
	struct run *r = arg;

	if (tiered_fill(r) || tiered_reopen(r) || run_write(r, MI, 4096, 0, 1) ||
	    run_check(r, MI + 4096, GRANULE - 4096, 1))
		return -1;
	EXPECT(r, tiered_below(r) == 0, "blocks beside it: %" PRIu64, tiered_below(r));
	if (run_check(r, MI, 4096, 1))
		return -1;
	EXPECT(r, tiered_below(r) == 1, "the changed one: %" PRIu64, tiered_below(r));
	return 0;
}

static void test_others_stay(void **state)
{
	tiered_check(TIERED FILE_BELOW, SIZE, others_stay);
}

/* Over a store that takes objects as wholes. */
static const struct conform whole_objects = {
	.text = "sharded[size=256Ki]:cache[disk=@/c,size=8Mi,mem=1Mi,granule=16Ki]:mem[partial=off]",
	.size = SIZE,
	.is_volume = true,
	.in_chain = true,
	.in_memory = true,
};

struct query {
	struct info info;
	const char *key;
	uint64_t value;
};

static void take_value(struct info *i, const char *key, const char *value)
{
	struct query *q = container_of(i, struct query, info);

	if (strcmp(key, q->key) == 0)
		q->value = strtoull(value, NULL, 10);
}

/* Of the cache below sharded. */
static uint64_t status_below(struct run *r, const char *key)
{
	struct layer *l = chain_top(r->chain)->kids[0];
	struct query q = { .info = { take_value }, .key = key, .value = UINT64_MAX };

	l->ops->status(l, &q.info);
	return q.value;
}

static CO_FN int wait_written(struct run *r)
{
	const uint64_t deadline = now_ns() + UINT64_C(20000000000);

	while (status_below(r, "tier_queued")) {
		EXPECT(r, now_ns() < deadline, "it is never written");
		co_yield();
	}
	return 0;
}

/* Reads from there on; what left memory for that is on disk then. */
static CO_FN int read_from(struct run *r, uint64_t from)
{
	for (uint64_t off = from; off < r->what->size; off += 16 * KI)
		if (run_check(r, off, 16 * KI, 1) || wait_written(r))
			return -1;
	return 0;
}

static CO_FN int read_all(struct run *r)
{
	return read_from(r, 0);
}

/* Objects of 16 granules are put for 100 bytes of each: the rest of them is on disk already. */
static CO_FN int little_is_written(void *arg)
{
	struct run *r = arg;
	uint64_t writes, puts;

	if (tiered_fill(r) || ch_flush(run_chan(r)) || read_all(r) || read_all(r))
		return -1;
	writes = status_below(r, "tier_writes");
	puts = run_ops(r, 1, CH_PUT);
	for (uint64_t off = 0; off < SIZE; off += 256 * KI)
		if (run_write(r, off + 70000, 100, 0, 1))
			return -1;
	EXPECT(r, ch_flush(run_chan(r)) == 0, "flush");
	EXPECT(r, run_ops(r, 1, CH_PUT) - puts == SIZE / (256 * KI), "each was put");
	if (read_all(r) || read_all(r))
		return -1;
	writes = status_below(r, "tier_writes") - writes;
	/* Those that were changed, and those that were in memory alone before. */
	EXPECT(r, writes <= 16 + 64, "%" PRIu64 " granules were written", writes);
	return 0;
}

static void test_little_is_written(void **state)
{
	conform_must(&whole_objects, little_is_written);
}

/* Blocks of zeroes but for a number. */
static uint32_t sum_of(const struct tier_key *key, uint8_t *block, uint32_t number)
{
	memcpy(block, &number, sizeof(number));
	return tier_block_sum(key, 0, block);
}

/* Two numbers other than 0 whose blocks have the same checksum at this place: chance needs some 2^16. */
static int find_twins(struct run *r, const struct tier_key *key, uint32_t twins[2])
{
	enum { SLOTS = 1 << 21, TRIES = SLOTS / 2 };
	_cleanup_free_ uint32_t *seen = calloc(SLOTS, sizeof(*seen));
	uint8_t block[TIER_BLOCK] = { 0 }, other[TIER_BLOCK] = { 0 };

	EXPECT(r, seen, "memory");
	for (uint32_t n = 1; n < TRIES; n++) {
		const uint32_t sum = sum_of(key, block, n);
		uint32_t at = sum % SLOTS;

		for (; seen[at]; at = (at + 1) % SLOTS) {
			if (sum_of(key, other, seen[at]) != sum)
				continue;
			twins[0] = seen[at];
			twins[1] = n;
			return 0;
		}
		seen[at] = n;
	}
	EXPECT(r, false, "no two blocks have the same checksum");
	return 0;
}

static CO_FN int write_twin(struct run *r, uint32_t number)
{
	uint8_t block[TIER_BLOCK] = { 0 };
	struct iovec v;
	struct iov iov = iov_one(&v, block, sizeof(block));

	memcpy(block, &number, sizeof(number));
	EXPECT(r,
	       ch_write(run_chan(r), (struct ext){ &obj_none, 0, sizeof(block) }, &iov, 0) == 0 &&
		       ch_flush(run_chan(r)) == 0,
	       "write");
	run_model(r, 0, block, sizeof(block));
	return 0;
}

/* What is in memory goes to disk, for other data from there on. */
static CO_FN int push_out(struct run *r, uint64_t from)
{
	for (uint64_t off = from; off < SIZE; off += 256 * KI)
		if (run_write(r, off, 256 * KI, 0, 1) || ch_flush(run_chan(r)) || wait_written(r))
			return -1;
	return 0;
}

/* That checksums are the same does not say that bytes are. */
static CO_FN int twins_differ(void *arg)
{
	struct run *r = arg;
	struct tier_key key = tier_key_of("block-0", 7, 0);
	uint32_t twins[2];

	if (find_twins(r, &key, twins) || tiered_fill(r) || write_twin(r, twins[0]) ||
	    push_out(r, 256 * KI) || write_twin(r, twins[1]) || push_out(r, 256 * KI))
		return -1;
	return read_from(r, 0);
}

static void test_twins_differ(void **state)
{
	conform_must(&whole_objects, twins_differ);
}

/* --- What is not used ------------------------------------------------------------------------- */

static CO_FN int flipped_data(void *arg)
{
	struct run *r = arg;

	if (tiered_fill(r) || run_shut(r) || damage(r, "tier-data", 777, GRANULE) ||
	    run_reopen(r, false) || run_check_all(r))
		return -1;
	EXPECT(r, run_status(r, "tier_bad") == SIZE / GRANULE, "bad: %" PRIu64,
	       run_status(r, "tier_bad"));
	EXPECT(r, tiered_below(r) == SIZE / GRANULE, "reads: %" PRIu64, tiered_below(r));
	/* What was read instead is good. */
	if (tiered_reopen(r) || run_check_all(r))
		return -1;
	EXPECT(r, tiered_below(r) == 0 && run_status(r, "tier_bad") == 0,
	       "after that: %" PRIu64 " reads, %" PRIu64 " of bad data", tiered_below(r),
	       run_status(r, "tier_bad"));
	return 0;
}

/* Each entry's checksum of block 0. */
static CO_FN int flipped_entries(void *arg)
{
	struct run *r = arg;

	if (tiered_fill(r) || run_shut(r) || damage(r, "tier-index", 4096 + 40, 128) ||
	    run_reopen(r, false) || run_check_all(r))
		return -1;
	EXPECT(r, run_status(r, "tier_hits") == 0, "hits: %" PRIu64, run_status(r, "tier_hits"));
	return 0;
}

static CO_FN int flipped_head(void *arg)
{
	struct run *r = arg;

	if (tiered_fill(r) || run_shut(r) || damage(r, "tier-index", 30, 1 << 30) ||
	    run_reopen(r, false) || run_check_all(r))
		return -1;
	EXPECT(r, run_status(r, "tier_hits") == 0, "hits: %" PRIu64, run_status(r, "tier_hits"));
	/* It was made anew. */
	if (tiered_reopen(r) || run_check_all(r))
		return -1;
	EXPECT(r, tiered_below(r) == 0, "reads: %" PRIu64, tiered_below(r));
	return 0;
}

/* A damaged part of the record is the same as all marks. */
static CO_FN int flipped_marks(void *arg)
{
	struct run *r = arg;

	if (tiered_fill(r) || run_shut(r) || damage(r, "tier-marks", 100, 512) ||
	    run_reopen(r, false) || run_check_all(r))
		return -1;
	EXPECT(r, run_status(r, "tier_hits") == 0, "hits: %" PRIu64, run_status(r, "tier_hits"));
	return 0;
}

static CO_FN int cut_files(void *arg)
{
	static const char *const names[] = { "tier-index", "tier-data", "tier-marks" };
	struct run *r = arg;
	char path[320];

	for (unsigned i = 0; i < ARRAY_LEN(names); i++) {
		if (tiered_fill(r) || run_shut(r))
			return -1;
		(void)snprintf(path, sizeof(path), "%s/c/%s", r->folder, names[i]);
		EXPECT(r, truncate(path, 1000) == 0, "%s", path);
		if (run_reopen(r, false) || run_check_all(r) || tiered_reopen(r) ||
		    run_check_all(r))
			return -1;
		EXPECT(r, unlink(path) == 0, "%s", path);
		if (tiered_reopen(r) || run_check_all(r))
			return -1;
	}
	return 0;
}

static void test_damage(void **state)
{
	tiered_check(TIERED FILE_BELOW, SIZE, flipped_data);
	tiered_check(TIERED FILE_BELOW, SIZE, flipped_entries);
	tiered_check(TIERED FILE_BELOW, SIZE, flipped_head);
	tiered_check(TIERED FILE_BELOW, SIZE, flipped_marks);
	tiered_check(TIERED FILE_BELOW, SIZE, cut_files);
}

static CO_FN int not_kept(void *arg)
{
	struct run *r = arg;

	if (tiered_fill(r) || run_check_all(r) || tiered_reopen(r) || run_check_all(r))
		return -1;
	EXPECT(r, tiered_below(r) == SIZE / GRANULE / IOV_SLICE_MAX, "reads: %" PRIu64,
	       tiered_below(r));
	return 0;
}

static void test_not_kept(void **state)
{
	tiered_check("cache[disk=@/c,volume=v,size=8Mi,mem=1Mi,keep=off]:" FILE_BELOW, SIZE,
		     not_kept);
}

/* The layer below does not say that what is there will last: the volume opens without what was kept. */
static CO_FN int not_flushed(void *arg)
{
	struct run *r = arg;

	if (tiered_fill(r) || run_check_all(r) || tiered_reopen(r) || run_check_all(r))
		return -1;
	EXPECT(r, tiered_below(r) == SIZE / GRANULE / IOV_SLICE_MAX, "reads: %" PRIu64,
	       tiered_below(r));
	return 0;
}

static void test_not_flushed(void **state)
{
	tiered_check(TIERED "fault[ops=flush,count=1,error=EIO]:" FILE_BELOW, SIZE, not_flushed);
}

/* --- Another size ----------------------------------------------------------------------------- */

static CO_FN int resize(struct run *r, uint64_t size)
{
	struct err err = { "" };
	int rc = 0;

	for (enum resize_phase phase = RESIZE_BEFORE; phase <= RESIZE_AFTER && !rc; phase++)
		rc = ch_resize(run_chan(r), size, phase, &err);
	EXPECT(r, rc == 0, "%s", err.msg);
	return 0;
}

/* What is behind the end is zeroes when the disk has grown again, now and after another start. */
static CO_FN int resized(void *arg)
{
	const uint64_t half = SIZE / 2 - 5000;
	struct run *r = arg;

	if (tiered_fill(r) || tiered_reopen(r) || run_check_all(r) || resize(r, half) ||
	    resize(r, SIZE))
		return -1;
	memset(r->model + half, 0, SIZE - half);
	if (run_check_all(r) || tiered_reopen(r) || run_check_all(r))
		return -1;
	EXPECT(r, tiered_below(r) == 0, "reads: %" PRIu64, tiered_below(r));
	return 0;
}

static void test_resized(void **state)
{
	tiered_check(TIERED FILE_BELOW, SIZE, resized);
	tiered_check(TIERED "sharded[size=64Ki]:file:@/vol/", SIZE, resized);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_found_again),       cmocka_unit_test(test_found_below),
		cmocka_unit_test(test_others_stay),       cmocka_unit_test(test_damage),
		cmocka_unit_test(test_not_kept),          cmocka_unit_test(test_resized),
		cmocka_unit_test(test_little_is_written), cmocka_unit_test(test_twins_differ),
		cmocka_unit_test(test_not_flushed),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = cmocka_run_group_tests_name("cache on disk", tests, NULL, NULL);
	conform_stop();
	return failed;
}
