/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer sharded under load: flushes while others write, a put that is on its way, and how much memory it takes.
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

enum { KI = 1024, MI = KI * KI, SHARD = 4 * MI };

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
	uint64_t random = s->index + 1, buf[64];
	struct iovec v;
	struct iov iov = iov_one(&v, buf, sizeof(buf));

	for (uint64_t n = 1; c && !atomic_load(s->stop); n++) {
		unsigned b = (unsigned)random_below(&random, BLOCKS);

		for (unsigned i = 0; i < ARRAY_LEN(buf); i++)
			buf[i] = n;
		EXPECT(r, ch_write(c, shard_at(place_of(s->index, b), iov.len), &iov, 0) == 0,
		       "write");
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
	EXPECT(r, shard_read_image(r, image, shard) == 0, "image");
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
		EXPECT(r, shard_flush(r) == 0, "flush");
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

	shard_check("sharded[size=64Ki]:mem[partial=off]", size, flush_under_load);
	shard_check("sharded[size=64Ki,age=1ms,puts=3]:delay[write=300us,read=100us,jitter=1ms]:"
		    "mem[partial=off]",
		    size, flush_under_load);
	/* There is always more work than slots: flush gets its turn all the same. */
	shard_check("sharded[size=64Ki,age=1ms,puts=2]:delay[write=2ms]:mem[partial=off]", size,
		    flush_under_load);
}

struct fiber {
	struct run *r;
	uint64_t n;
	int rc;
};

static CO_FN void flush_fiber(void *arg)
{
	struct fiber *f = arg;

	f->rc = shard_flush(f->r);
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
		if (shard_wait_status(r, "puts_in_flight", 1) || run_check_all(r) ||
		    run_write(r, 30000, 40000, 0, 1) || run_check_all(r))
			return -1;
		EXPECT(r, ch_zero(c, shard_at(10000, 5000), IO_PUNCH) == 0, "zero");
		memset(r->model + 10000, 0, 5000);
		if (run_check_all(r))
			return -1;
		if (i % 2) { /* waits for the put: an object is never in two requests */
			EXPECT(r, ch_trim(c, shard_at(0, 64 * KI), 0) == 0, "trim");
			memset(r->model, 0, 64 * KI);
		}
		co_group_wait(&g);
		EXPECT(r, f.rc == 0, "flush: %s", err_name(f.rc));
		if (run_check_all(r))
			return -1;
		EXPECT(r, shard_flush(r) == 0, "flush");
		if (shard_check_image(r, 64 * KI) || run_check_all(r))
			return -1;
	}
	return 0;
}

static void test_while_putting(void **state)
{
	shard_check("sharded[size=64Ki]:delay[write=20ms]:mem[partial=off]", 256 * KI,
		    while_putting);
}

/* --- Taking turns ----------------------------------------------------------------------------- */

enum { ENOUGH = 500 };

/* Writes to shard 0 until it is told to stop, each write followed by a put: there is hardly a moment without one. */
struct stubborn {
	struct run *r;
	bool stop;
	unsigned written;
	int rc;
};

static CO_FN void write_stubbornly(void *arg)
{
	struct stubborn *w = arg;
	struct chan *c = run_chan(w->r);
	uint8_t buf[512];
	struct iovec v;
	struct iov iov = iov_one(&v, buf, sizeof(buf));

	memset(buf, 'w', sizeof(buf));
	for (; c && !w->stop && !w->rc && w->written < ENOUGH; w->written++)
		w->rc = ch_write(c, shard_at(512, sizeof(buf)), &iov, IO_FUA);
}

/* A trim gets its turn between writes to the same shard, and holds nobody up for ever itself. */
static CO_FN int trim_has_its_turn(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	struct stubborn w[2] = { { .r = r }, { .r = r } };
	struct co_group g = CO_GROUP_INIT;

	if (!c)
		return -1;
	co_group_spawn(&g, write_stubbornly, &w[0]);
	co_group_spawn(&g, write_stubbornly, &w[1]);
	for (unsigned i = 0; i < 3; i++) {
		unsigned before = w[0].written + w[1].written, n;

		EXPECT(r, ch_trim(c, shard_at(0, 64 * KI), 0) == 0, "trim");
		n = w[0].written + w[1].written - before;
		EXPECT(r, n < 10, "a trim waited for %u writes", n);
	}
	w[0].stop = w[1].stop = true;
	co_group_wait(&g);
	EXPECT(r, w[0].rc == 0 && w[1].rc == 0, "write: %s", err_name(w[0].rc ? w[0].rc : w[1].rc));
	return 0;
}

static void test_turns(void **state)
{
	shard_check("sharded[size=64Ki]:delay[write=1ms]:mem[partial=off]", 256 * KI,
		    trim_has_its_turn);
}

/* --- Memory ----------------------------------------------------------------------------------- */

enum { CROWD = 200 };

static CO_FN void write_fiber(void *arg)
{
	struct fiber *f = arg;

	for (uint64_t i = 0; i < 4 && !f->rc; i++) {
		uint64_t off = (f->n * 4 + i) * 32 * KI;

		f->rc = shard_fill(f->r, off, 24 * KI, (uint8_t)(f->n + i + 1));
		if (run_status(f->r, "dirty_bytes") > MI && !f->rc)
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
	EXPECT(r, shard_flush(r) == 0, "flush");
	EXPECT(r, run_status(r, "dirty_bytes") == 0, "%" PRIu64, run_status(r, "dirty_bytes"));
	return shard_check_image(r, 64 * KI) ? -1 : run_check_all(r);
}

enum { STALLED = 1000, STALLED_LEN = 64 * KI };

/* How much memory they may take; ThreadSanitizer counts its own with it. */
#ifdef __SANITIZE_THREAD__
static const uint64_t grown_max = UINT64_C(2048) * MI;
#else
static const uint64_t grown_max = 64 * MI;
#endif

static CO_FN void stalled_fiber(void *arg)
{
	static uint8_t ones[STALLED_LEN]; /* one for all: what is measured is the layer's memory */
	struct fiber *f = arg;
	struct chan *c = run_chan(f->r);
	struct iovec v;
	struct iov iov = iov_one(&v, ones, sizeof(ones));

	memset(ones, 1, sizeof(ones));
	f->rc = c ? ch_write(c, shard_at(f->n * STALLED_LEN, STALLED_LEN), &iov, 0) : -EIO;
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
	if (shard_wait_status(r, "dirty_bytes", 31 * MI))
		return -1;
	grown = resident() - before;
	co_group_wait(&g);
	for (unsigned i = 0; i < STALLED; i++)
		EXPECT(r, v[i].rc == 0, "writer %u: %s", i, err_name(v[i].rc));
	EXPECT(r, grown < grown_max, "%" PRIu64 " MiB", grown / MI);
	memset(r->model, 1, (size_t)STALLED * STALLED_LEN);
	EXPECT(r, shard_flush(r) == 0, "flush");
	return shard_check_image(r, SHARD);
}

/* Each looks as if a stream began there, and none goes on: they have room for all that, and don't wait for a put. */
static CO_FN int scattered(void *arg)
{
	struct run *r = arg;
	const uint64_t start = now_ns();

	for (uint64_t off = 0; off < r->what->size; off += 2 * MI)
		if (shard_fill(r, off, STALLED_LEN, 'a'))
			return -1;
	EXPECT(r, now_ns() - start < UINT64_C(250000000), "waited %" PRIu64 " ms",
	       (now_ns() - start) / 1000000);
	return shard_flush(r) ? -1 : shard_check_image(r, SHARD);
}

/* Address space of this process for which the kernel is not to give huge pages. */
static uint64_t only_small_pages(void)
{
	FILE *f = fopen("/proc/self/smaps", "re");
	char line[512];
	unsigned long size = 0;
	uint64_t sum = 0;

	while (f && fgets(line, sizeof(line), f)) {
		(void)sscanf(line, "Size: %lu kB", &size);
		if (strncmp(line, "VmFlags:", 8) == 0 && strstr(line, " nh"))
			sum += (uint64_t)size * KI;
	}
	if (f)
		(void)fclose(f);
	return sum;
}

/* Where the kernel gives huge pages unasked, 4 KiB here and there must not take 2 MiB each. */
static CO_FN int sparse(void *arg)
{
	struct run *r = arg;
	const uint64_t before = only_small_pages();

	for (uint64_t off = 0; off < r->what->size; off += SHARD)
		if (shard_fill(r, off, 4096, 'a'))
			return -1;
	EXPECT(r, only_small_pages() - before >= r->what->size, "%" PRIu64 " MiB",
	       (only_small_pages() - before) / MI);
	return shard_flush(r) ? -1 : shard_check_image(r, SHARD);
}

/*
 * More shards are to be completed than there may be copies of: puts wait for each other, and all end. In the store
 * are PARTS shards of a MiB.
 */
enum { PARTS = 40 };

static CO_FN int copies(void *arg)
{
	struct run *r = arg;
	struct fiber f = { .r = r, .rc = 1 };
	struct co_group g = CO_GROUP_INIT;
	uint64_t most = 0;

	if (shard_fill(r, 0, (uint64_t)PARTS * MI, 'a') || shard_flush(r))
		return -1;
	for (uint64_t i = 0; i < PARTS; i++)
		if (shard_fill(r, i * MI + 4096, 512, 'b'))
			return -1;
	co_group_spawn(&g, flush_fiber, &f);
	while (f.rc == 1) {
		most = MAX(most, run_status(r, "bytes_in_flight"));
		co_sleep(200000);
	}
	co_group_wait(&g);
	EXPECT(r, f.rc == 0, "flush: %s", err_name(f.rc));
	EXPECT(r, most == 4 * MI, "%" PRIu64 " bytes in flight", most);
	EXPECT(r, run_status(r, "bytes_in_flight") == 0, "some are still");
	return shard_check_image(r, MI);
}

/* As many flushes as a client may have in flight, each with all shards to save: they share the work, and its fibers. */
enum { FLUSHES = 1000 };

static CO_FN int many_flushes(void *arg)
{
	struct run *r = arg;
	_cleanup_free_ struct fiber *v = calloc(FLUSHES, sizeof(*v));
	struct co_group g = CO_GROUP_INIT;
	uint64_t before = resident(), grown;

	EXPECT(r, v && before, "no memory");
	for (uint64_t off = 0; off < r->what->size; off += 64 * KI)
		if (shard_fill(r, off, 512, 'a'))
			return -1;
	for (unsigned i = 0; i < FLUSHES; i++) {
		v[i] = (struct fiber){ .r = r, .rc = 1 };
		co_group_spawn(&g, flush_fiber, &v[i]);
	}
	grown = resident() - before;
	co_group_wait(&g);
	for (unsigned i = 0; i < FLUSHES; i++)
		EXPECT(r, v[i].rc == 0, "flush %u: %s", i, err_name(v[i].rc));
	EXPECT(r, grown < grown_max, "%" PRIu64 " MiB", grown / MI);
	return shard_check_image(r, 64 * KI);
}

static void test_memory(void **state)
{
	shard_check("sharded[size=64Ki]:delay[write=5ms]:mem[partial=off]", 8 * MI, many_flushes);
	shard_check("sharded[size=1Mi,dirty=8Mi]:delay[write=3ms]:mem[partial=off]", PARTS * MI,
		    copies);
	shard_check("sharded[dirty=32Mi]:delay[write=200ms]:mem[partial=off]", 64 * MI, stalled);
	shard_check("sharded[dirty=8Mi]:delay[write=300ms]:mem[partial=off]", 32 * MI, scattered);
	shard_check("sharded:mem[partial=off]", 64 * MI, sparse);
	shard_check("sharded[size=64Ki,dirty=1Mi]:delay[write=200us]:mem[partial=off]", 32 * MI,
		    limited);
	shard_check("sharded[size=64Ki,dirty=1Mi]:mem[partial=off]", 32 * MI, limited);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_under_load),
		cmocka_unit_test(test_while_putting),
		cmocka_unit_test(test_turns),
		cmocka_unit_test(test_memory),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	conform_start();
	failed = cmocka_run_group_tests_name("sharded under load", tests, NULL, NULL);
	conform_stop();
	return failed;
}
