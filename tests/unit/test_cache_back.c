/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer cache writing back: what reaches the layer below and when, the journal's folder, options.
 * Crashes are simulated in tests/sim/test_cache.c, stores that are away in
 * tests/sim/test_cache_away.c; the conformance suites run over it in test_layers.c and
 * test_stores.c.
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
#include <sys/stat.h>
#include <unistd.h>

#include "conformance.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"
#include "shard_help.h"

enum { KI = 1024, MI = KI * KI };

static void check(const char *text, uint64_t size, int (*fn)(void *run))
{
	const struct conform what = { .text = text, .size = size, .in_memory = true };

	conform_must(&what, fn);
}

/* --- What reaches the layer below ------------------------------------------------------------- */

/* Put and read by the store at the end of the chain's text. */
static CO_FN int merged(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);

	/* 256 blocks of one shard, none next to the last one. */
	for (uint64_t i = 0; i < 256; i++)
		if (run_write(r, i * 37 % 256 * 4 * KI, 4 * KI, 0, 1))
			return -1;
	EXPECT(r, shard_object_size(r, 0) == -ENOENT, "nothing was sent yet");
	EXPECT(r, ch_flush(c) == 0, "flush");
	EXPECT(r, shard_object_size(r, 0) == MI, "flushed is in the store");
	if (shard_check_image(r, 4 * MI))
		return -1;
	return run_check_all(r);
}

/* One put for all of them, counted by the cache, whose requests below are its own. */
static CO_FN int merged_once(void *arg)
{
	struct run *r = arg;

	struct layer *cache = chain_top(r->chain)->kids[0];

	if (merged(r))
		return -1;
	EXPECT(r, conform_status(cache, "sends") == 1, "sends: %" PRIu64,
	       conform_status(cache, "sends"));
	EXPECT(r, conform_status(cache, "dirty_bytes") == 0, "dirty");
	return 0;
}

static void test_merged(void **state)
{
	shard_check("sharded:cache[mode=writeback,lag=1h]:mem[partial=off]", 8 * MI, merged_once);
}

/* A flush with a journal leaves the store alone; time brings it there. */
static CO_FN int flushed_here(void *arg)
{
	struct run *r = arg;
	const uint64_t deadline = now_ns() + UINT64_C(20000000000);

	if (run_write(r, 5000, 100000, 0, 1))
		return -1;
	EXPECT(r, ch_flush(run_chan(r)) == 0, "flush");
	EXPECT(r, run_status(r, "sends") == 0 && run_status(r, "dirty_bytes") == 100000, "sent");
	EXPECT(r, run_status(r, "journal_syncs") == 1, "one sync");
	while (run_status(r, "dirty_bytes")) {
		EXPECT(r, now_ns() < deadline, "it is never sent");
		co_sleep(1000000);
	}
	/* And some time after that the journal is empty. */
	while (run_status(r, "journal_used")) {
		EXPECT(r, now_ns() < deadline, "it is never emptied");
		co_sleep(1000000);
	}
	if (run_check_all(r) || run_write(r, 5000, 100000, IO_FUA, 1))
		return -1;
	EXPECT(r, run_status(r, "journal_used") > 100000, "in use again");
	return run_check_all(r);
}

static void test_flushed_here(void **state)
{
	const struct conform what = {
		.text = "cache[disk=@/c,size=4Mi,mode=writeback,lag=200ms]:raw:file:@/disk.img",
		.size = 4 * MI,
		.is_volume = true,
		.in_memory = true
	};

	conform_must(&what, flushed_here);
}

/* Half a TiB is discarded: that is 131,072 units, and the index does not hold them all. */
static CO_FN int large_discard(void *arg)
{
	const uint64_t step = UINT64_C(4) << 30;
	struct run *r = arg;
	struct chan *c = run_chan(r);

	for (uint64_t i = 0; i < 128; i++) {
		uint64_t units;

		EXPECT(r, ch_trim(c, (struct ext){ &obj_none, i * step, step }, 0) == 0, "trim");
		units = run_status(r, "dirty_units");
		EXPECT(r, units <= 65536 + 1024, "%" PRIu64 " units", units);
	}
	EXPECT(r, ch_flush(c) == 0, "flush");
	EXPECT(r, run_status(r, "dirty_units") == 0, "units");
	return 0;
}

static void test_large_discard(void **state)
{
	check("cache[mode=writeback,lag=1h]:null[size=1Ti]", 4096, large_discard);
}

/* --- Group commit ----------------------------------------------------------------------------- */

enum { CLIENTS = 64, ROUNDS = 8 };

struct client {
	struct run *r;
	unsigned number;
	int rc;
};

static CO_FN void write_and_flush(void *arg)
{
	struct client *c = arg;

	for (unsigned i = 0; i < ROUNDS && !c->rc; i++)
		c->rc = run_write(c->r, (c->number * ROUNDS + i) * 4 * KI, 4 * KI, IO_FUA, 1);
}

static CO_FN int shared_syncs(void *arg)
{
	struct run *r = arg;
	struct client clients[CLIENTS];
	struct co_group g = CO_GROUP_INIT;
	uint64_t syncs;

	for (unsigned i = 0; i < CLIENTS; i++) {
		clients[i] = (struct client){ r, i, 0 };
		co_group_spawn(&g, write_and_flush, &clients[i]);
	}
	co_group_wait(&g);
	for (unsigned i = 0; i < CLIENTS; i++)
		EXPECT(r, clients[i].rc == 0, "client %u", i);
	syncs = run_status(r, "journal_syncs");
	/* Each waits for one or two, and all for the same ones. */
	EXPECT(r, syncs >= ROUNDS && syncs <= 4 * ROUNDS, "%" PRIu64 " syncs for %d FUA writes",
	       syncs, CLIENTS * ROUNDS);
	return run_check_all(r);
}

static void test_shared_syncs(void **state)
{
	const struct conform what = {
		.text = "cache[disk=@/c,size=16Mi,mode=writeback,lag=1h]:raw:file:@/disk.img",
		.size = 4 * MI,
		.is_volume = true
	};

	conform_must(&what, shared_syncs);
}

/* --- Large records ---------------------------------------------------------------------------- */

/* What is written in pieces of MiBs is read, before and after it is read from the journal again. */
static CO_FN int large_records(void *arg)
{
	struct run *r = arg;
	char away[320];
	int fd;

	(void)snprintf(away, sizeof(away), "%s/away", r->folder);
	fd = open(away, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
	EXPECT(r, fd >= 0 && close(fd) == 0, "%s", away);
	if (run_write(r, 1000, 7 * MI, 0, 3) || run_write(r, 3 * MI, 3 * MI - 5, IO_FUA, 1) ||
	    run_check_all(r) || run_shut(r) || run_reopen(r, false))
		return -1;
	EXPECT(r, run_status(r, "dirty_bytes") == 7 * MI, "all of it");
	EXPECT(r, unlink(away) == 0, "%s", away);
	return run_check_all(r);
}

static void test_large_records(void **state)
{
	const struct conform what = {
		.text = "cache[disk=@/c,size=256Mi,mode=writeback,lag=1h]:"
			"fault[ops=write,error=ETIMEDOUT,file=@/away]:raw:file:@/disk.img",
		.size = 8 * MI,
		.is_volume = true,
		.in_memory = true
	};

	conform_must(&what, large_records);
}

/* --- The folder ------------------------------------------------------------------------------- */

/* A second one on the same folder is refused, by name, and disturbs nobody. */
static CO_FN int one_folder(void *arg)
{
	struct run *r = arg;
	_cleanup_free_ char *text = NULL;
	struct spec *spec = NULL;
	struct chain *other = NULL;
	struct err err = { "" };
	int rc;

	if (run_write(r, 0, MI, 0, 1))
		return -1;
	rc = asprintf(&text, "cache[disk=%s/c,mode=writeback]:mem[size=1Mi]", r->folder);
	EXPECT(r, rc > 0, "memory");
	EXPECT(r, spec_parse(text, &spec, &err) == 0, "%s", err.msg);
	EXPECT(r, chain_build(spec, "disk1", false, &other, &err) == 0, "%s", err.msg);
	rc = chain_open(other, &err);
	EXPECT(r, rc == -EBUSY && strstr(err.msg, "/c is in use by another export of this daemon"),
	       "%s", err.msg);
	chain_free(other);
	spec_free(spec);
	return run_check_all(r);
}

/* Destroyed, a volume takes its journal with it: conform_with() sees that the folder is empty. */
static void test_one_folder(void **state)
{
	const struct conform what = {
		.text = "cache[disk=@/c,size=4Mi,mode=writeback]:raw:file:@/disk.img",
		.size = 2 * MI,
		.is_volume = true,
		.in_memory = true
	};

	conform_must(&what, one_folder);
}

static CO_FN int size_changes(void *arg)
{
	struct run *r = arg;
	char path[320];
	struct stat st;

	if (run_write(r, 0, 2 * MI, 0, 1) || run_shut(r))
		return -1;
	(void)snprintf(path, sizeof(path), "%s/c/journal-000001", r->folder);
	EXPECT(r, stat(path, &st) == 0 && st.st_size == 256 * KI, "made");
	/* What an older `size` left is replaced. */
	EXPECT(r, truncate(path, 512 * KI) == 0, "truncate");
	if (run_reopen(r, false) || run_write(r, 0, 2 * MI, 0, 1) || run_check_all(r))
		return -1;
	EXPECT(r, stat(path, &st) != 0, "gone");
	return 0;
}

static void test_size_changes(void **state)
{
	const struct conform what = {
		.text = "cache[disk=@/c,size=4Mi,mode=writeback]:raw:file:@/disk.img",
		.size = 2 * MI,
		.is_volume = true,
		.in_memory = true
	};

	conform_must(&what, size_changes);
}

/* --- Options ---------------------------------------------------------------------------------- */

static void test_setup_errors(void **state)
{
	static const struct {
		const char *text, *message;
	} cases[] = {
		{ "cache[journal=1Mi]:mem[size=1Mi]", "option \"journal\" is for mode=writeback" },
		{ "cache[mode=writeback,disk=@,size=1Mi,journal=2Mi]:mem[size=1Mi]",
		  "the journal is a part of size" },
		{ "cache[disk=@,size=1Mi,granule=1Mi,mem=8Mi]:mem[size=1Mi]",
		  "size must hold eight granules" },
		{ "cache[durability=remote]:mem[size=1Mi]",
		  "option \"durability\" is for mode=writeback" },
		{ "cache[mode=writeback,durability=local]:mem[size=1Mi]",
		  "durability=local needs a folder" },
		{ "cache[mode=writeback,disk=x/y]:mem[size=1Mi]",
		  "\"x/y\" must be an absolute path" },
		{ "cache[mode=writeback,disk=@/no/c]:mem[size=1Mi]", "does not exist; make it" },
		{ "cache[mode=writeback,disk=/dev/null]:mem[size=1Mi]", "it must be a folder" },
		{ "cache[mode=writeback,size=64Ki]:mem[size=1Mi]",
		  "\"64Ki\" is out of range 1MiB..1TiB" },
	};

	for (unsigned i = 0; i < ARRAY_LEN(cases); i++)
		conform_refuses(cases[i].text, cases[i].message);
}

/* A store that can only be read is read. */
static CO_FN int read_only(void *arg)
{
	struct run *r = arg;

	if (run_write(r, 0, MI, 0, 1) || run_shut(r) || run_reopen(r, true))
		return -1;
	EXPECT(r, !(chain_top(r->chain)->caps & CAN_WRITE), "caps");
	return 0;
}

static void test_read_only(void **state)
{
	check("cache[mode=writeback]:mem[size=1Mi]", MI, read_only);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_merged),        cmocka_unit_test(test_flushed_here),
		cmocka_unit_test(test_shared_syncs),  cmocka_unit_test(test_one_folder),
		cmocka_unit_test(test_size_changes),  cmocka_unit_test(test_setup_errors),
		cmocka_unit_test(test_read_only),     cmocka_unit_test(test_large_discard),
		cmocka_unit_test(test_large_records),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = cmocka_run_group_tests_name("cache, writing back", tests, NULL, NULL);
	conform_stop();
	return failed;
}
