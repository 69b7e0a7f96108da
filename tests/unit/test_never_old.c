/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layers readahead and cache never give anything older than what was answered, nor lend it: readers and writers on the
 * same blocks.
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

enum { KI = 1024, MI = KI * KI, BLOCK = 4 * KI, WORDS = BLOCK / sizeof(uint64_t) };

static struct ext at(uint64_t off, uint64_t len)
{
	return (struct ext){ &obj_none, off, len };
}

enum { READERS = 6, WRITERS = 4, BLOCKS = 1024, ROUNDS = 120, RUN_MAX = 256, REQUEST_MAX = 16 };

/* Loans: fewer, but for so long at least, since what is sent below, and when, goes by the clock. */
enum { ROUNDS_LENT = 40 };
#define AT_LEAST_NS UINT64_C(250000000)

/*
 * Each block belongs to one writer, who gives it version after version: data that says so, and whose it is, or
 * zeroes for each eighth. What a reader may find in it: no version older than the one answered before it asked,
 * none that was not begun when it has its answer. The same holds for what is lent, until it is given back: memory
 * that was made another block's meanwhile says so.
 */
struct history {
	struct run *r;
	bool can_borrow; /* readers ask for a loan first, mostly */
	unsigned rounds; /* of a reader, at least ... */
	uint64_t until;  /* ... and at least until then, ns */
	_Atomic uint64_t begun[BLOCKS], answered[BLOCKS];
	_Atomic uint64_t place; /* where a reader is: writers go there */
	_Atomic uint64_t lent, read;
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

static uint64_t word_of(uint64_t block, uint64_t version)
{
	return block << 40 | version;
}

static bool fits(uint64_t found, uint64_t block, uint64_t from, uint64_t to)
{
	if (found)
		return found >= word_of(block, from) && found <= word_of(block, to);
	return from / 8 * 8 == from || from / 8 < to / 8;
}

static CO_FN int write_version(struct actor *a, struct chan *c, uint64_t block)
{
	struct history *h = a->h;
	uint64_t version = atomic_load(&h->begun[block]) + 1;
	uint64_t words[WORDS];
	struct iovec v;
	struct iov iov = iov_one(&v, words, BLOCK);
	int rc;

	atomic_store(&h->begun[block], version);
	if (is_zero_version(version)) {
		rc = version % 16 ? ch_zero(c, at(block * BLOCK, BLOCK), IO_PUNCH)
				  : ch_trim(c, at(block * BLOCK, BLOCK), 0);
	} else {
		for (unsigned i = 0; i < WORDS; i++)
			words[i] = word_of(block, version);
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

/*
 * The first and the last word of each block. What is lent may change under whoever looks, which otherwise is the
 * kernel: so ThreadSanitizer is not told of these looks, and of nothing else.
 */
static __attribute__((noinline, no_sanitize("thread"))) void look_at(const void *lent, uint64_t n,
								     uint64_t *buf)
{
	const volatile uint64_t *words = lent;

	for (uint64_t i = 0; i < n * WORDS; i += WORDS) {
		buf[i] = words[i];
		buf[i + WORDS - 1] = words[i + WORDS - 1];
	}
}

static CO_FN int borrow(struct actor *a, struct chan *c, struct ext e, uint64_t *buf)
{
	struct loan loan = { 0 };
	int rc = ch_lend(c, e, &loan);

	if (rc)
		return rc;
	/* A socket takes it now or later. */
	for (uint64_t turns = random_below(&a->random, 4); turns > 0; turns--)
		co_yield();
	look_at(loan.base, e.len / BLOCK, buf);
	loan_return(&loan);
	return 0;
}

static CO_FN int read_or_borrow(struct actor *a, struct chan *c, struct ext e, uint64_t *buf)
{
	struct history *h = a->h;
	struct iovec v;
	struct iov iov = iov_one(&v, buf, e.len);

	if (h->can_borrow && random_below(&a->random, 4) && borrow(a, c, e, buf) == 0) {
		atomic_fetch_add(&h->lent, 1);
		return 0;
	}
	atomic_fetch_add(&h->read, 1);
	return ch_read(c, e, &iov, 0);
}

static CO_FN int read_versions(struct actor *a, struct chan *c, uint64_t block, uint64_t n,
			       uint64_t *buf)
{
	struct history *h = a->h;
	uint64_t before[REQUEST_MAX];

	for (uint64_t i = 0; i < n; i++)
		before[i] = atomic_load(&h->answered[block + i]);
	EXPECT(h->r, read_or_borrow(a, c, at(block * BLOCK, n * BLOCK), buf) == 0, "read");
	for (uint64_t i = 0; i < n; i++) {
		uint64_t after = atomic_load(&h->begun[block + i]);
		uint64_t first = buf[i * WORDS], last = buf[i * WORDS + WORDS - 1];

		EXPECT(h->r,
		       fits(first, block + i, before[i], after) &&
			       fits(last, block + i, before[i], after),
		       "block %" PRIu64 " has %" PRIx64 " and %" PRIx64 ", not %" PRIx64
		       "..%" PRIx64,
		       block + i, first, last, word_of(block + i, before[i]),
		       word_of(block + i, after));
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
	for (unsigned round = 0; round < a->h->rounds || now_ns() < a->h->until; round++) {
		uint64_t n = UINT64_C(1) << random_below(&a->random, 5);
		uint64_t block = random_below(&a->random, BLOCKS - REQUEST_MAX);
		uint64_t end = block + REQUEST_MAX + random_below(&a->random, RUN_MAX);
		for (; block + n <= end && block + n <= BLOCKS; block += n) {
			atomic_store(&a->h->place, block);
			if (read_versions(a, c, block, n, buf))
				return -1;
			if (a->h->can_borrow) /* what is in memory waits for nobody */
				co_yield();
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

static CO_FN int read_and_write(struct run *r, bool can_borrow)
{
	_cleanup_free_ struct history *h = calloc(1, sizeof(*h));
	struct actor actors[WRITERS + READERS];
	struct co_group writers = CO_GROUP_INIT, readers = CO_GROUP_INIT;

	if (!h)
		return -1;
	h->r = r;
	h->can_borrow = can_borrow;
	h->rounds = can_borrow ? ROUNDS_LENT : ROUNDS;
	h->until = can_borrow ? now_ns() + AT_LEAST_NS : 0;
	for (unsigned i = 0; i < ARRAY_LEN(actors); i++) {
		actors[i] = (struct actor){ h, i, i % CONFORM_REACTORS, i + 1, 0 };
		co_group_spawn(i < WRITERS ? &writers : &readers, act, &actors[i]);
	}
	co_group_wait(&readers);
	atomic_store(&h->is_over, true);
	co_group_wait(&writers);
	for (unsigned i = 0; i < ARRAY_LEN(actors); i++)
		EXPECT(r, actors[i].rc == 0, "actor %u", i);
	EXPECT(r, !can_borrow || (h->lent > 300 && h->read > 300),
	       "lent %" PRIu64 ", read %" PRIu64 ": that proves nothing", h->lent, h->read);
	return 0;
}

static CO_FN int never_old(void *arg)
{
	struct run *r = arg;
	const int rc = read_and_write(r, false);

	EXPECT(r, rc || (run_status(r, "hits") > 1000 && run_status(r, "fetches") > 100),
	       "hits %" PRIu64 ", fetches %" PRIu64 ": that proves nothing", run_status(r, "hits"),
	       run_status(r, "fetches"));
	return rc;
}

static CO_FN int never_old_lent(void *arg)
{
	return read_and_write(arg, true);
}

static void test_readahead(void **state)
{
	conform_check("readahead:mem[size=4Mi]", 4 * MI, never_old);
	conform_check("readahead:delay[read=100us,jitter=200us]:mem[size=4Mi]", 4 * MI, never_old);
	conform_check("readahead:delay[write=50us,zero=50us,trim=50us]:mem[size=4Mi]", 4 * MI,
		      never_old);
	conform_check(
		"readahead[mem=1Mi]:delay[read=50us,write=50us]:fault[ops=read,rate=0%]:mem[size=4Mi]",
		4 * MI, never_old);
}

static void check_lent(const char *text, bool is_volume, bool in_chain)
{
	const struct conform what = { .text = text,
				      .size = 4 * MI,
				      .is_volume = is_volume,
				      .in_chain = in_chain,
				      .in_memory = true };

	conform_must(&what, never_old_lent);
}

static void test_through(void **state)
{
	check_lent("cache[mem=1Mi]:mem[size=4Mi]", false, false);
	check_lent("cache[mem=1Mi,granule=16Ki]:delay[read=100us,jitter=200us]:mem[size=4Mi]",
		   false, false);
	check_lent("cache[mem=2Mi]:delay[write=50us,zero=50us,trim=50us]:mem[size=4Mi]", false,
		   false);
	check_lent("cache[disk=@/c,size=2Mi,mem=1Mi,granule=8Ki]:raw:file:@/disk.img", true, false);
	check_lent(
		"cache[disk=@/c,size=3Mi,mem=1Mi]:delay[read=100us,jitter=200us]:raw:file:@/disk.img",
		true, false);
	check_lent("readahead:cache[mem=2Mi]:delay[read=100us,jitter=200us]:mem[size=4Mi]", false,
		   false);
	check_lent("sharded[size=64Ki]:cache[mem=1Mi,granule=16Ki]:mem", true, true);
}

/* With so little lag what is written is sent below all the time, and leaves the journal. */
static void test_back(void **state)
{
	check_lent("cache[mode=writeback,mem=1Mi,lag=1ms]:mem[size=4Mi]", false, false);
	check_lent(
		"cache[mode=writeback,mem=2Mi,granule=16Ki,lag=1ms]:delay[write=50us,jitter=100us]:mem[size=4Mi]",
		false, false);
	check_lent("readahead:cache[mode=writeback,mem=1Mi,lag=1ms]:mem[size=4Mi]", false, false);
	/* Whole objects are put, and partly failed ones again. */
	check_lent(
		"sharded[size=64Ki]:cache[mode=writeback,mem=2Mi,granule=16Ki,lag=1ms]:mem[partial=off]",
		true, true);
	check_lent("sharded[size=64Ki]:cache[mode=writeback,mem=2Mi,granule=16Ki,lag=1ms]:"
		   "retry[base=1ms,cap=5ms]:fault[rate=5%,error=EAGAIN]:mem[partial=off]",
		   true, true);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_readahead),
		cmocka_unit_test(test_through),
		cmocka_unit_test(test_back),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = cmocka_run_group_tests_name("never old", tests, NULL, NULL);
	conform_stop();
	return failed;
}
