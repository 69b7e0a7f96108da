/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer readahead: how many requests reach the store and with how many bytes. The conformance suite runs over it in
 * test_layers.c; races are in test_readahead_race.c, its parts in test_readahead_parts.c.
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

#include "conformance.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"

enum { KI = 1024, MI = KI * KI, BLOCK = 4 * KI };

/* --- Helpers ---------------------------------------------------------------------------------- */

/* What the layer below readahead was asked for. */
struct asked {
	uint64_t ops, bytes;
};

static void add_asked(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum)
{
	struct asked *a = arg;

	if (depth == 1)
		*a = (struct asked){ atomic_load(&sum->ops[CH_READ]),
				     atomic_load(&sum->bytes[CH_READ]) };
}

static struct asked asked(struct run *r)
{
	struct asked a = { 0 };

	chain_each(r->chain, add_asked, &a);
	return a;
}

static struct ext at(uint64_t off, uint64_t len)
{
	return (struct ext){ &obj_none, off, len };
}

/* A read whose bytes are of no interest; its result. */
static CO_FN int read_only(struct run *r, uint64_t off, uint64_t len)
{
	struct chan *c = run_chan(r);
	_cleanup_free_ void *buf = malloc(len);
	struct iovec v;
	struct iov iov = iov_one(&v, buf, len);

	return c && buf ? ch_read(c, at(off, len), &iov, 0) : -ENOMEM;
}

/* Reads of a list, `depth` at a time, by turns on several reactors. */
struct load {
	struct run *r;
	const uint64_t *offs;
	uint64_t n, len;
	_Atomic uint64_t next;
	_Atomic int rc;
};

struct loader {
	struct load *load;
	unsigned reactor;
};

static CO_FN int load_here(void *arg)
{
	struct load *l = arg;

	for (;;) {
		uint64_t i = atomic_fetch_add(&l->next, 1);

		if (i >= l->n)
			return 0;
		if (run_check(l->r, l->offs[i], l->len, 1))
			return -1;
	}
}

static CO_FN void load_there(void *arg)
{
	struct loader *w = arg;
	struct load *l = w->load;

	if (reactor_call(reactor_get(w->reactor), load_here, l))
		atomic_store(&l->rc, -1);
}

static CO_FN int load(struct run *r, const uint64_t *offs, uint64_t n, uint64_t len, unsigned depth,
		      unsigned reactors)
{
	struct load l = { .r = r, .offs = offs, .n = n, .len = len };
	struct loader w[64];
	struct co_group g = CO_GROUP_INIT;

	for (unsigned i = 0; i < depth && i < ARRAY_LEN(w); i++) {
		w[i] = (struct loader){ &l, i % reactors };
		co_group_spawn(&g, load_there, &w[i]);
	}
	co_group_wait(&g);
	return atomic_load(&l.rc);
}

/* --- Sequential ------------------------------------------------------------------------------- */

/* 4096 reads, one at a time, 5 ms each if each went to the store. */
static CO_FN int sequential(void *arg)
{
	struct run *r = arg;
	uint64_t size = r->what->size, start;
	struct asked a;

	if (run_write(r, 0, size, 0, 1))
		return -1;
	start = now_ns();
	for (uint64_t off = 0; off < size; off += BLOCK) {
		if (run_check(r, off, BLOCK, 1))
			return -1;
	}
	start = now_ns() - start;
	a = asked(r);
	EXPECT(r, a.ops <= size / BLOCK / 50, "%" PRIu64 " requests", a.ops);
	EXPECT(r, a.bytes == size, "%" PRIu64 " bytes", a.bytes);
	EXPECT(r, start < UINT64_C(4000000000), "%" PRIu64 " ms", start / 1000000);
	EXPECT(r, run_status(r, "wasted_bytes") == 0, "wasted %" PRIu64,
	       run_status(r, "wasted_bytes"));
	EXPECT(r, run_status(r, "streams") == 1, "streams %" PRIu64, run_status(r, "streams"));
	EXPECT(r, run_status(r, "fetched_bytes") == size - 3 * BLOCK, "%" PRIu64,
	       run_status(r, "fetched_bytes"));
	return 0;
}

/* A large request, cut into pages by the client: most of it comes in one or two requests. */
static CO_FN int merged(void *arg)
{
	enum { LEN = 128 * KI };
	struct run *r = arg;
	uint64_t offs[LEN / BLOCK];
	struct asked a;

	for (unsigned i = 0; i < ARRAY_LEN(offs); i++)
		offs[i] = 777 * BLOCK + i * BLOCK;
	if (load(r, offs, ARRAY_LEN(offs), BLOCK, 16, 1))
		return -1;
	a = asked(r);
	EXPECT(r, a.ops <= 10, "%" PRIu64 " requests", a.ops);
	EXPECT(r, a.bytes <= 3 * LEN, "%" PRIu64 " bytes", a.bytes);
	return 0;
}

/* Out of order, as from several connections, and on all reactors. */
static CO_FN int shuffled(void *arg)
{
	enum { LEN = 64 * KI, GROUP = 8 };
	struct run *r = arg;
	uint64_t n = r->what->size / LEN, random = 5;
	_cleanup_free_ uint64_t *offs = malloc(n * sizeof(*offs));
	struct asked a;

	if (!offs || run_write(r, 0, r->what->size, 0, 1))
		return -1;
	for (uint64_t i = 0; i < n; i++)
		offs[i] = i * LEN;
	for (uint64_t i = 0; i + GROUP <= n; i += GROUP) {
		for (uint64_t k = 0; k < GROUP; k++) {
			uint64_t other = i + random_below(&random, GROUP), o = offs[i + k];

			offs[i + k] = offs[other];
			offs[other] = o;
		}
	}
	if (load(r, offs, n, LEN, 16, 3))
		return -1;
	a = asked(r);
	EXPECT(r, a.ops <= n / 2, "%" PRIu64 " requests for %" PRIu64, a.ops, n);
	EXPECT(r, a.bytes <= r->what->size / 8 * 9, "%" PRIu64 " bytes", a.bytes);
	EXPECT(r, run_status(r, "streams") <= 3, "streams %" PRIu64, run_status(r, "streams"));
	return 0;
}

/* Eight readers, each in its own place, taking turns. */
static CO_FN int interleaved(void *arg)
{
	enum { STREAMS = 8, LEN = 16 * KI };
	struct run *r = arg;
	uint64_t part = r->what->size / STREAMS;
	struct asked a;

	if (run_write(r, 0, r->what->size, 0, 1))
		return -1;
	for (uint64_t off = 0; off < part; off += LEN) {
		for (unsigned i = 0; i < STREAMS; i++) {
			if (run_check(r, i * part + off, LEN, 1))
				return -1;
		}
		EXPECT(r, run_status(r, "memory") <= 64 * MI, "memory");
	}
	a = asked(r);
	EXPECT(r, run_status(r, "streams") == STREAMS, "streams %" PRIu64,
	       run_status(r, "streams"));
	EXPECT(r, a.ops <= r->what->size / LEN / 5, "%" PRIu64 " requests", a.ops);
	EXPECT(r, a.bytes <= r->what->size / 4 * 5, "%" PRIu64 " bytes", a.bytes);
	return 0;
}

static void test_sequential(void **state)
{
	conform_check("readahead:delay[read=5ms]:mem[size=16Mi]", 16 * MI, sequential);
	conform_check("readahead:delay[read=2ms]:mem[size=8Mi]", 8 * MI, merged);
	conform_check("readahead:delay[read=500us,jitter=1ms]:mem[size=16Mi]", 16 * MI, shuffled);
	conform_check("readahead:delay[read=500us]:mem[size=16Mi]", 16 * MI, interleaved);
}

/* --- What is near already --------------------------------------------------------------------- */

/* A stream over what the cache below has is lent, and fetches nothing; where the cache ends it is one at once. */
static CO_FN int lent(void *arg)
{
	enum { WARM = 4 * MI };
	struct run *r = arg;
	struct chan *c = run_chan(r);
	struct loan loan;
	struct asked before, a;
	uint64_t fetched;
	int rc;

	/* What is written is in the cache. */
	if (!c || run_write(r, 0, WARM, 0, 1))
		return -1;
	before = asked(r);
	fetched = run_status(r, "fetched_bytes");
	for (uint64_t off = 0; off < WARM; off += BLOCK) {
		EXPECT(r, ch_lend(c, at(off, BLOCK), &loan) == 0, "lend at %" PRIu64, off);
		rc = run_compare(r, off, loan.base, BLOCK);
		loan_return(&loan);
		if (rc)
			return rc;
	}
	a = asked(r);
	EXPECT(r, a.bytes - before.bytes == WARM, "%" PRIu64 " bytes", a.bytes - before.bytes);
	EXPECT(r, run_status(r, "fetched_bytes") == fetched, "fetched");
	EXPECT(r, run_status(r, "streams") == 1, "streams %" PRIu64, run_status(r, "streams"));
	rc = ch_lend(c, at(WARM, BLOCK), &loan);
	EXPECT(r, rc == -EAGAIN, "lent what is not there: %d", rc);
	if (run_check(r, WARM, BLOCK, 1))
		return -1;
	EXPECT(r, run_status(r, "fetched_bytes") > fetched, "the stream was forgotten");
	return 0;
}

/* What was fetched for a read is taken by it, though the cache below could lend it as well. */
static CO_FN int pieces_first(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	struct loan loan;
	int rc;

	if (!c || run_check(r, 0, MI, 1) || run_check(r, MI, MI, 1) || run_check(r, 2 * MI, MI, 1))
		return -1;
	EXPECT(r, run_status(r, "memory") > 0, "nothing was read ahead");
	rc = ch_lend(c, at(3 * MI, BLOCK), &loan);
	EXPECT(r, rc == -EAGAIN, "lent past a piece: %d", rc);
	for (uint64_t off = 3 * MI; off < r->what->size; off += MI)
		if (run_check(r, off, MI, 1))
			return -1;
	EXPECT(r, run_status(r, "hit_bytes") == run_status(r, "fetched_bytes"),
	       "%" PRIu64 " of %" PRIu64, run_status(r, "hit_bytes"),
	       run_status(r, "fetched_bytes"));
	return 0;
}

static void test_lent(void **state)
{
	conform_check("readahead:cache[mem=64Mi]:delay[read=500us]:mem[size=16Mi]", 16 * MI, lent);
	conform_check("readahead:cache[mem=64Mi]:delay[read=500us]:mem[size=16Mi]", 16 * MI,
		      pieces_first);
}

/* --- What is not sequential costs nothing ----------------------------------------------------- */

static CO_FN int random_reads(void *arg)
{
	enum { READS = 20000, DISK = 1 << 30 };
	struct run *r = arg;
	struct asked a;
	uint64_t random = 99;

	for (unsigned i = 0; i < READS; i++)
		EXPECT(r, read_only(r, random_below(&random, DISK / BLOCK) * BLOCK, BLOCK) == 0,
		       "read");
	a = asked(r);
	EXPECT(r, a.ops == READS && a.bytes == (uint64_t)READS * BLOCK,
	       "%" PRIu64 " requests, %" PRIu64 " bytes", a.ops, a.bytes);
	EXPECT(r, run_status(r, "memory") == 0 && run_status(r, "streams") == 0, "streams");
	return 0;
}

/* Backwards, again and again, and in strides. */
static CO_FN int other_patterns(void *arg)
{
	enum { LEN = 8 * KI };
	struct run *r = arg;
	uint64_t size = r->what->size, n = 0;
	struct asked a;

	if (run_write(r, 0, size, 0, 1))
		return -1;
	for (uint64_t off = size; off > 0; off -= LEN, n++) {
		if (run_check(r, off - LEN, LEN, 1))
			return -1;
	}
	for (unsigned i = 0; i < 100; i++, n++) {
		if (run_check(r, 5 * LEN, LEN, 1))
			return -1;
	}
	for (uint64_t off = 3 * LEN; off + LEN <= size; off += 4 * LEN, n++) {
		if (run_check(r, off, LEN, 1))
			return -1;
	}
	a = asked(r);
	EXPECT(r, a.ops == n && a.bytes == n * LEN, "%" PRIu64 " requests, %" PRIu64 " bytes",
	       a.ops, a.bytes);
	return 0;
}

/* Off: a stream goes down as it is; what was asked for to be cached still comes from there. */
static CO_FN int switched_off(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	uint64_t n = 0;

	if (!c || run_write(r, 0, r->what->size, 0, 1))
		return -1;
	for (uint64_t off = 0; off < r->what->size; off += BLOCK, n++) {
		if (run_check(r, off, BLOCK, 1))
			return -1;
	}
	EXPECT(r, asked(r).ops == n, "%" PRIu64 " requests", asked(r).ops);
	EXPECT(r, ch_cache(c, at(0, 10 * BLOCK)) == 0 && run_check(r, BLOCK, BLOCK, 1) == 0,
	       "cache");
	EXPECT(r, asked(r).ops == n + 1, "%" PRIu64 " requests", asked(r).ops);
	return 0;
}

static void test_not_sequential(void **state)
{
	conform_check("readahead:null[size=1Gi]", MI, random_reads);
	conform_check("readahead:mem[size=5Mi]", 5 * MI, other_patterns);
	conform_check("readahead[window=0]:mem[size=1Mi]", MI, switched_off);
}

/* --- Cache requests, limits, errors, the end -------------------------------------------------- */

/* What was fetched on request is read once from memory, then again from below. */
static CO_FN int cache_request(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	struct asked a;

	if (!c || run_write(r, 0, r->what->size, 0, 1))
		return -1;
	EXPECT(r, ch_cache(c, at(MI + 5, 2 * MI)) == 0, "cache");
	if (run_check(r, MI, 2 * MI + 5, 1))
		return -1;
	a = asked(r);
	EXPECT(r, a.bytes == 2 * MI + 5, "%" PRIu64 " bytes", a.bytes);
	EXPECT(r, a.ops <= 6, "%" PRIu64 " requests", a.ops);
	if (run_check(r, MI + 5, MI, 1))
		return -1;
	EXPECT(r, asked(r).bytes == 3 * MI + 5, "%" PRIu64 " bytes", asked(r).bytes);
	return 0;
}

/* Never more memory than allowed, whatever is wanted; and all that does not fit is read all the same. */
static CO_FN int little_memory(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);

	if (!c || run_write(r, 0, r->what->size, 0, 1))
		return -1;
	for (unsigned i = 0; i < 4; i++) {
		EXPECT(r, ch_cache(c, at(0, r->what->size)) == 0, "cache");
		for (uint64_t off = 0; off < r->what->size / 2; off += 48 * KI) {
			if (run_check(r, off, 48 * KI, 1) ||
			    run_check(r, r->what->size / 2 + off, 48 * KI, 1))
				return -1;
			EXPECT(r, run_status(r, "memory") <= MI, "memory %" PRIu64,
			       run_status(r, "memory"));
		}
	}
	EXPECT(r, run_status(r, "memory") > 0, "nothing was read ahead");
	return 0;
}

/* One bad page: its reader gets the error, nobody else does, although pieces around it fail. */
static CO_FN int bad_page(void *arg)
{
	struct run *r = arg;

	if (run_write(r, 0, r->what->size, 0, 1))
		return -1;
	for (uint64_t off = 0; off < r->what->size; off += BLOCK) {
		if (off == MI) {
			int rc = read_only(r, off, BLOCK);

			EXPECT(r, rc == -EIO, "%s", err_name(rc));
		} else if (run_check(r, off, BLOCK, 1)) {
			return -1;
		}
	}
	EXPECT(r, run_status(r, "fetches_failed") > 0, "no fetch has met it");
	return 0;
}

enum change { WRITE, ZERO, TRIM, CHANGES };

/* What is written, zeroed or trimmed while one piece is there or on its way is read from below. */
static CO_FN int written(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);

	if (!c || run_write(r, 0, r->what->size, 0, 1))
		return -1;
	for (unsigned i = 0; i < 2 * CHANGES; i++) {
		uint64_t off = (8 - i) * 100 * KI; /* downwards: no stream */
		bool is_ready = i >= CHANGES;
		int rc = ch_cache(c, at(off, 64 * KI));

		while (rc == 0 && is_ready && run_status(r, "fetches") < i + 1)
			co_sleep(1000000);
		EXPECT(r, rc == 0 && (is_ready || run_status(r, "fetches") < i + 1), "cache");
		if (i % CHANGES == WRITE)
			rc = run_write(r, off + 10 * KI, 3 * KI, 0, 1);
		else if (i % CHANGES == ZERO)
			rc = ch_zero(c, at(off + 10 * KI, 3 * KI), IO_PUNCH);
		else
			rc = ch_trim(c, at(off + 10 * KI, 3 * KI), 0);
		EXPECT(r, rc == 0, "change: %s", err_name(rc));
		if (i % CHANGES != WRITE)
			memset(r->model + off + 10 * KI, 0, 3 * KI);
		if (run_check(r, off + 11 * KI, KI, 1) || run_check(r, off, 64 * KI, 1))
			return -1;
		EXPECT(r, run_status(r, "fetches") == i + 1, "fetches");
	}
	EXPECT(r, run_status(r, "hits") >= CHANGES * 2, "hits %" PRIu64, run_status(r, "hits"));
	return 0;
}

static CO_FN int close_soon(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);

	EXPECT(r, c && ch_cache(c, at(0, r->what->size)) == 0, "cache");
	EXPECT(r, asked(r).ops == 0 && run_status(r, "memory") >= r->what->size, "in flight");
	return 0;
}

static void test_life(void **state)
{
	uint64_t start;

	conform_check("readahead:delay[read=1ms]:mem[size=8Mi]", 8 * MI, cache_request);
	conform_check("readahead[mem=1Mi,window=64Mi]:delay[read=100us]:mem[size=6Mi]", 6 * MI,
		      little_memory);
	conform_check("readahead:delay[read=200us]:fault[ops=read,range=1Mi-1028Ki]:mem[size=4Mi]",
		      4 * MI, bad_page);
	conform_check("readahead:delay[read=10ms]:mem[size=1Mi]", MI, written);
	start = now_ns();
	conform_check("readahead:delay[read=50ms]:mem[size=8Mi]", 8 * MI, close_soon);
	assert_true(now_ns() - start >= 50000000);
}

static CO_FN int build_keyed(void *arg)
{
	struct spec *spec = NULL;
	struct chain *chain = NULL;
	struct err err = { "" };
	int rc = spec_parse("readahead:mem", &spec, &err);

	if (!rc)
		rc = chain_build_keyed(spec, false, &chain, &err);
	if (!rc)
		rc = chain_open(chain, &err) == -EINVAL && strstr(err.msg, "above the mapping")
			     ? 0
			     : -EPROTO;
	chain_free(chain);
	spec_free(spec);
	return rc;
}

static void test_setup_errors(void **state)
{
	conform_refuses("readahead[request=3Mi]:mem[size=1Mi]",
			"option \"request\": 3145728 must be a power of two");
	assert_int_equal(reactor_call_blocking(reactor_get(0), build_keyed, NULL), 0);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_sequential),     cmocka_unit_test(test_lent),
		cmocka_unit_test(test_not_sequential), cmocka_unit_test(test_life),
		cmocka_unit_test(test_setup_errors),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = cmocka_run_group_tests_name("readahead", tests, NULL, NULL);
	conform_stop();
	return failed;
}
