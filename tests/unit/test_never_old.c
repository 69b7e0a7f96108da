/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layers readahead and cache never give anything older than what was answered: readers and writers on the same blocks.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "conformance.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"

enum { KI = 1024, MI = KI * KI, BLOCK = 4 * KI };

static struct ext at(uint64_t off, uint64_t len)
{
	return (struct ext){ &obj_none, off, len };
}

enum { READERS = 6, WRITERS = 4, BLOCKS = 1024, ROUNDS = 120, RUN_MAX = 256, REQUEST_MAX = 16 };

/*
 * Each block belongs to one writer, who gives it version after version: data that says so, or zeroes for each
 * eighth. What a reader may find in it: no version older than the one answered before it asked, none that was
 * not begun when it has its answer.
 */
struct history {
	struct run *r;
	_Atomic uint64_t begun[BLOCKS], answered[BLOCKS];
	_Atomic uint64_t place; /* where a reader is: writers go there */
	_Atomic bool is_over;
};

struct actor {
	struct history *h;
	unsigned number, reactor;
	uint64_t random;
	int rc;
};

static bool is_zero_version(uint64_t version)
{
	return version % 8 == 0;
}

static bool fits(uint64_t found, uint64_t from, uint64_t to)
{
	if (found)
		return found >= from && found <= to;
	return from / 8 * 8 == from || from / 8 < to / 8;
}

static CO_FN int write_version(struct actor *a, struct chan *c, uint64_t block)
{
	struct history *h = a->h;
	uint64_t version = atomic_load(&h->begun[block]) + 1;
	uint64_t words[BLOCK / sizeof(uint64_t)];
	struct iovec v;
	struct iov iov = iov_one(&v, words, BLOCK);
	int rc;

	atomic_store(&h->begun[block], version);
	if (is_zero_version(version)) {
		rc = version % 16 ? ch_zero(c, at(block * BLOCK, BLOCK), IO_PUNCH)
				  : ch_trim(c, at(block * BLOCK, BLOCK), 0);
	} else {
		for (unsigned i = 0; i < ARRAY_LEN(words); i++)
			words[i] = version;
		rc = ch_write(c, at(block * BLOCK, BLOCK), &iov, 0);
	}
	EXPECT(h->r, rc == 0, "write: %s", err_name(rc));
	atomic_store(&h->answered[block], version);
	return 0;
}

static CO_FN int write_on(void *arg)
{
	struct actor *a = arg;
	struct chan *c = run_chan(a->h->r);

	while (c && !atomic_load(&a->h->is_over)) {
		uint64_t block = atomic_load(&a->h->place) + random_below(&a->random, 96);

		block = (block / WRITERS * WRITERS + a->number) % BLOCKS;
		if (write_version(a, c, block))
			return -1;
		co_yield();
	}
	return c ? 0 : -1;
}

static CO_FN int read_versions(struct actor *a, struct chan *c, uint64_t block, uint64_t n,
			       uint64_t *buf)
{
	struct history *h = a->h;
	uint64_t before[REQUEST_MAX];
	struct iovec v;
	struct iov iov = iov_one(&v, buf, n * BLOCK);

	for (uint64_t i = 0; i < n; i++)
		before[i] = atomic_load(&h->answered[block + i]);
	EXPECT(h->r, ch_read(c, at(block * BLOCK, n * BLOCK), &iov, 0) == 0, "read");
	for (uint64_t i = 0; i < n; i++) {
		uint64_t after = atomic_load(&h->begun[block + i]);
		uint64_t first = buf[i * 512], last = buf[i * 512 + 511];

		EXPECT(h->r, fits(first, before[i], after) && fits(last, before[i], after),
		       "block %" PRIu64 " has %" PRIu64 " and %" PRIu64 ", not %" PRIu64
		       "..%" PRIu64,
		       block + i, first, last, before[i], after);
	}
	return 0;
}

/* Streams from anywhere, in requests of one to 16 blocks. */
static CO_FN int read_on(void *arg)
{
	struct actor *a = arg;
	struct chan *c = run_chan(a->h->r);
	_cleanup_free_ uint64_t *buf = malloc(REQUEST_MAX * BLOCK);

	if (!c || !buf)
		return -1;
	for (unsigned round = 0; round < ROUNDS; round++) {
		uint64_t n = UINT64_C(1) << random_below(&a->random, 5);
		uint64_t block = random_below(&a->random, BLOCKS - REQUEST_MAX);
		uint64_t end = block + REQUEST_MAX + random_below(&a->random, RUN_MAX);
		for (; block + n <= end && block + n <= BLOCKS; block += n) {
			atomic_store(&a->h->place, block);
			if (read_versions(a, c, block, n, buf))
				return -1;
		}
	}
	return 0;
}

static CO_FN void act(void *arg)
{
	struct actor *a = arg;
	bool is_writer = a->number < WRITERS;

	a->rc = reactor_call(reactor_get(a->reactor), is_writer ? write_on : read_on, a);
}

static void check_volume(const char *text, uint64_t size, int (*fn)(void *run))
{
	const struct conform what = { .text = text, .size = size, .is_volume = true, .in_memory = true };

	conform_must(&what, fn);
}

static CO_FN int never_old(void *arg)
{
	struct run *r = arg;
	_cleanup_free_ struct history *h = calloc(1, sizeof(*h));
	struct actor actors[WRITERS + READERS];
	struct co_group writers = CO_GROUP_INIT, readers = CO_GROUP_INIT;
	uint64_t fetches;

	if (!h)
		return -1;
	h->r = r;
	for (unsigned i = 0; i < ARRAY_LEN(actors); i++) {
		actors[i] = (struct actor){ h, i, i % 2, i + 1, 0 };
		co_group_spawn(i < WRITERS ? &writers : &readers, act, &actors[i]);
	}
	co_group_wait(&readers);
	atomic_store(&h->is_over, true);
	co_group_wait(&writers);
	for (unsigned i = 0; i < ARRAY_LEN(actors); i++)
		EXPECT(r, actors[i].rc == 0, "actor %u", i);
	/* The cache counts what it had to fetch as misses. */
	fetches = run_status(r, "fetches") != UINT64_MAX ? run_status(r, "fetches") : run_status(r, "misses");
	EXPECT(r, run_status(r, "hits") > 1000 && fetches > 100,
	       "hits %" PRIu64 ", fetches %" PRIu64 ": that proves nothing", run_status(r, "hits"), fetches);
	return 0;
}

static void test_never_old(void **state)
{
	conform_check("readahead:mem[size=4Mi]", 4 * MI, never_old);
	conform_check("readahead:delay[read=100us,jitter=200us]:mem[size=4Mi]", 4 * MI, never_old);
	conform_check("readahead:delay[write=50us,zero=50us,trim=50us]:mem[size=4Mi]", 4 * MI, never_old);
	conform_check("readahead[mem=1Mi]:delay[read=50us,write=50us]:fault[ops=read,rate=0%]:mem[size=4Mi]",
	      4 * MI, never_old);
	conform_check("cache[mem=1Mi]:mem[size=4Mi]", 4 * MI, never_old);
	conform_check("cache[mem=1Mi,granule=16Ki]:delay[read=100us,jitter=200us]:mem[size=4Mi]", 4 * MI, never_old);
	check_volume("cache[disk=@/c,size=2Mi,mem=1Mi,granule=8Ki]:raw:file:@/disk.img", 4 * MI, never_old);
	check_volume("cache[disk=@/c,size=3Mi,mem=1Mi]:delay[read=100us,jitter=200us]:raw:file:@/disk.img",
		     4 * MI, never_old);
	conform_check("cache[mem=2Mi]:delay[write=50us,zero=50us,trim=50us]:mem[size=4Mi]", 4 * MI, never_old);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_never_old),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = cmocka_run_group_tests_name("never old", tests, NULL, NULL);
	conform_stop();
	return failed;
}
