/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The cases that every chain must pass; see conformance.h.
 */
#include "conformance.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/rangelock.h"
#include "nbdrs/reactor.h"

enum { KI = 1024, MI = KI * KI, REACTORS = CONFORM_REACTORS, SEGMENTS_MAX = CONFORM_SEGMENTS };

/* --- Cases ------------------------------------------------------------------------------------ */

static bool is_power_of_two(uint32_t v)
{
	return v && !(v & (v - 1));
}

static CO_FN int case_limits(void *arg)
{
	struct run *r = arg;
	const struct layer *l = chain_top(r->chain);

	EXPECT(r, l->size == r->what->size, "size %" PRIu64, l->size);
	EXPECT(r, is_power_of_two(l->min_io), "min_io %u", l->min_io);
	EXPECT(r, is_power_of_two(l->pref_io) && l->pref_io >= 512 && l->pref_io >= l->min_io,
	       "pref_io %u", l->pref_io);
	EXPECT(r, l->max_io >= l->pref_io, "max_io %u", l->max_io);
	EXPECT(r, l->caps & CAN_WRITE, "caps %x", l->caps);
	EXPECT(r, !(l->caps & CAN_FAST_ZERO) || l->caps & CAN_ZERO, "caps %x", l->caps);
	return 0;
}

/* A disk that was never written reads as zeroes. */
static CO_FN int case_fresh(void *arg)
{
	return run_check_all(arg);
}

/* Lengths around sectors, pages and nothing much, at aligned and odd places, in several pieces. */
static CO_FN int case_read_back(void *arg)
{
	static const uint32_t lengths[] = { 1, 2, 511, 512, 513, 4095, 4096, 4097, 65536, 200001 };
	static const uint32_t offsets[] = { 0, 1, 511, 512, 4095, 4096, 5000, 65537 };
	struct run *r = arg;

	for (unsigned o = 0; o < ARRAY_LEN(offsets); o++) {
		for (unsigned i = 0; i < ARRAY_LEN(lengths); i++) {
			uint64_t off = offsets[o], len = lengths[i];
			uint64_t before = MIN(off, 600U);

			if (run_write(r, off, len, 0, 1 + (o + i) % SEGMENTS_MAX) ||
			    run_check(r, off - before, before + len + 600, 1 + i % SEGMENTS_MAX))
				return -1;
		}
	}
	return run_check_all(r);
}

/* The very first and last bytes, and everything at once: on a large disk, more than a layer takes in one go. */
static CO_FN int case_boundaries(void *arg)
{
	struct run *r = arg;
	uint64_t size = r->what->size;

	if (run_write(r, 0, 1, 0, 1) || run_write(r, size - 1, 1, 0, 1) ||
	    run_write(r, size - 4097, 4097, 0, 3) || run_check(r, size - 1, 1, 1) ||
	    run_check(r, 0, 1, 1) || run_check_all(r))
		return -1;
	if (run_write(r, 0, size, 0, SEGMENTS_MAX) || run_check(r, 0, size, SEGMENTS_MAX))
		return -1;
	return run_write(r, 1, size - 2, IO_FUA, 1) ? -1 : run_check_all(r);
}

static CO_FN int check_zero(struct run *r, uint64_t off, uint64_t len, unsigned fl)
{
	bool may_refuse = fl & IO_FAST;
	int rc;

	if (run_write(r, off - 100, len + 200, 0, 1))
		return -1;
	rc = run_zero(r, off, len, fl);
	EXPECT(r, rc == 0 || (may_refuse && rc == -ENOTSUP),
	       "zero %" PRIu64 "+%" PRIu64 " flags %x: %s", off, len, fl, err_name(rc));
	EXPECT(r, rc || !may_refuse || chain_top(r->chain)->caps & CAN_FAST_ZERO,
	       "zero was fast without CAN_FAST_ZERO");
	if (rc == 0)
		memset(r->model + off, 0, len);
	return run_check(r, off - 200, len + 400, 1);
}

/* Zeroes are zeroes and end where they should; refused fast ones have changed nothing. */
static CO_FN int case_zero(void *arg)
{
	static const uint32_t lengths[] = { 1, 512, 4096, 4097, 8191, 70000, 300000, 3 * MI + 5 };
	static const uint32_t offsets[] = { 4096, 4097, 65536, 100001 };
	static const unsigned flags[] = { 0,
					  IO_PUNCH,
					  IO_FAST,
					  IO_PUNCH | IO_FAST,
					  IO_FUA,
					  IO_FUA | IO_PUNCH,
					  IO_FUA | IO_PUNCH | IO_FAST };
	struct run *r = arg;

	for (unsigned f = 0; f < ARRAY_LEN(flags); f++) {
		/* Once through the lengths is enough for what must reach the disk each time. */
		unsigned offsets_n = flags[f] & IO_FUA ? 1 : ARRAY_LEN(offsets);

		for (unsigned o = 0; o < offsets_n; o++) {
			for (unsigned i = 0; i < ARRAY_LEN(lengths); i++) {
				if (check_zero(r, offsets[o], lengths[i], flags[f]))
					return -1;
			}
		}
	}
	/* Up to the end, and all of it. */
	if (check_zero(r, r->what->size / 2, r->what->size - r->what->size / 2 - 400, IO_PUNCH))
		return -1;
	memset(r->model, 0, r->what->size);
	EXPECT(r, run_zero(r, 0, r->what->size, IO_PUNCH) == 0, "all");
	return run_check_all(r);
}

/* Inside a trim every byte is what it was or zero, and stays so; outside nothing changed. */
static CO_FN int check_trim(struct run *r, uint64_t off, uint64_t len, unsigned fl)
{
	struct chan *c = run_chan(r);
	_cleanup_free_ uint8_t *buf = malloc(len);
	struct iovec v;
	struct iov iov = iov_one(&v, buf, len);
	int rc;

	if (!c || !buf || run_write(r, off - 100, len + 200, 0, 1))
		return -1;
	rc = ch_trim(c, (struct ext){ &obj_none, off, len }, fl);
	EXPECT(r, rc == 0, "trim %" PRIu64 "+%" PRIu64 ": %s", off, len, err_name(rc));
	rc = ch_read(c, (struct ext){ &obj_none, off, len }, &iov, 0);
	EXPECT(r, rc == 0, "read after trim: %s", err_name(rc));
	for (uint64_t i = 0; i < len; i++) {
		EXPECT(r, buf[i] == 0 || buf[i] == r->model[off + i],
		       "trim %" PRIu64 "+%" PRIu64 ": byte %" PRIu64 " is %02x", off, len, off + i,
		       buf[i]);
		r->model[off + i] = buf[i];
	}
	return run_check(r, off - 200, len + 400, 1);
}

static CO_FN int case_trim(void *arg)
{
	static const uint32_t lengths[] = { 1, 512, 4096, 8191, 70000, 3 * MI + 5 };
	static const uint32_t offsets[] = { 4096, 4097, 65536, 100001 };
	struct run *r = arg;

	for (unsigned o = 0; o < ARRAY_LEN(offsets); o++) {
		for (unsigned i = 0; i < ARRAY_LEN(lengths); i++) {
			if (check_trim(r, offsets[o], lengths[i], i % 3 == 2 ? IO_FUA : 0))
				return -1;
		}
	}
	return run_check_all(r);
}

struct on_other {
	struct run *r;
	int rc;
};

static CO_FN int flush_here(void *arg)
{
	struct on_other *o = arg;
	struct chan *c = run_chan(o->r);

	return c ? ch_flush(c) : -EIO;
}

/* Flush works on any reactor, with and without something to flush; FUA with every kind of request. */
static CO_FN int case_flush(void *arg)
{
	struct run *r = arg;
	struct on_other other = { .r = r };
	struct chan *c = run_chan(r);

	if (!c)
		return -1;
	EXPECT(r, ch_flush(c) == 0, "fresh");
	if (run_write(r, 12345, 10000, 0, 2))
		return -1;
	for (unsigned i = 0; i < reactors_n(); i++) {
		other.rc = reactor_call(reactor_get(i), flush_here, &other);
		EXPECT(r, other.rc == 0, "reactor %u: %s", i, err_name(other.rc));
	}
	if (run_write(r, 12000, 5000, IO_FUA, 1))
		return -1;
	EXPECT(r, run_zero(r, 12000, 5000, IO_FUA) == 0, "zero");
	memset(r->model + 12000, 0, 5000);
	EXPECT(r, ch_flush(c) == 0, "after FUA");
	return run_check_all(r);
}

static bool is_model_zero(const struct run *r, uint64_t off, uint64_t len)
{
	struct iovec v;
	struct iov iov = iov_one(&v, r->model + off, len);

	return iov_is_zero(&iov);
}

/* One answer of map: in order, of use, within bounds, and no lie about zeroes. */
static CO_FN int check_map(struct run *r, uint64_t off, uint64_t len, unsigned max,
			   uint64_t *covered, uint64_t *holes)
{
	struct chan *c = run_chan(r);
	struct extent v[16];
	struct extmap m = { v, 0, max };
	uint64_t at = off;
	int rc;

	if (!c)
		return -1;
	rc = ch_map(c, (struct ext){ &obj_none, off, len }, &m);
	EXPECT(r, rc == 0, "map %" PRIu64 "+%" PRIu64 ": %s", off, len, err_name(rc));
	EXPECT(r, m.n >= 1 && m.n <= max, "map gave %u extents of %u", m.n, max);
	for (unsigned i = 0; i < m.n; i++) {
		EXPECT(r, v[i].len > 0 && v[i].len <= off + len - at,
		       "map: extent %u has %" PRIu64 " bytes", i, v[i].len);
		EXPECT(r, i == 0 || v[i].flags != v[i - 1].flags, "map: extents %u and %u are one",
		       i - 1, i);
		if (v[i].flags & EXTENT_HOLE)
			*holes += v[i].len;
		EXPECT(r, !(v[i].flags & EXTENT_ZERO) || is_model_zero(r, at, v[i].len),
		       "map: %" PRIu64 "+%" PRIu64 " is said to be zero", at, v[i].len);
		at += v[i].len;
	}
	*covered = at - off;
	return 0;
}

/* Maps [off, off + len) piece by piece; returns the bytes in holes through *holes. */
static CO_FN int map_all(struct run *r, uint64_t off, uint64_t len, unsigned max, uint64_t *holes)
{
	uint64_t covered = 0;

	*holes = 0;
	for (uint64_t end = off + len; off < end; off += covered) {
		if (check_map(r, off, end - off, max, &covered, holes))
			return -1;
	}
	return 0;
}

static CO_FN int case_map(void *arg)
{
	struct run *r = arg;
	uint64_t size = r->what->size, holes;

	if (map_all(r, 0, size, 16, &holes))
		return -1;
	EXPECT(r, !r->what->has_holes || holes == size,
	       "fresh: %" PRIu64 " of %" PRIu64 " are holes", holes, size);
	for (uint64_t off = 0; off + MI <= size; off += MI) {
		if (run_write(r, off + 4321 * (off / MI), 50000, 0, 1))
			return -1;
	}
	if (map_all(r, 0, size, 16, &holes) || map_all(r, 0, size, 1, &holes) ||
	    map_all(r, 12345, 2 * MI + 1, 3, &holes))
		return -1;
	if (run_write(r, 0, size, 0, 1) || map_all(r, 0, size, 16, &holes))
		return -1;
	EXPECT(r, !r->what->has_holes || holes == 0, "full: %" PRIu64 " are holes", holes);
	EXPECT(r, run_zero(r, MI, MI, IO_PUNCH) == 0, "zero");
	memset(r->model + MI, 0, MI);
	if (map_all(r, 0, size, 16, &holes))
		return -1;
	EXPECT(r, !r->what->has_holes || holes == MI, "after zero: %" PRIu64 " are holes", holes);
	return run_check_all(r);
}

/* What is lent is what would have been read: given to the kernel, for the process must not look itself. */
static CO_FN int check_lend(struct run *r, int fd, uint64_t off, uint64_t len)
{
	struct chan *c = run_chan(r);
	_cleanup_free_ uint8_t *buf = malloc(len);
	struct loan loan = { 0 };
	ssize_t n;
	int rc;

	if (!c || !buf)
		return conform_fail(r, __LINE__, "out of memory");
	rc = ch_lend(c, (struct ext){ &obj_none, off, len }, &loan);
	EXPECT(r, rc == 0 || rc == -EAGAIN || rc == -ENOTSUP, "lend: %s", err_name(rc));
	EXPECT(r, rc || chain_top(r->chain)->caps & CAN_LEND, "lent without CAN_LEND");
	if (rc)
		return 0;
	n = pwrite(fd, loan.base, len, 0);
	loan_return(&loan);
	EXPECT(r, n == (ssize_t)len && pread(fd, buf, len, 0) == n, "wrote %zd of the loan", n);
	return run_compare(r, off, buf, len);
}

static CO_FN int case_lend(void *arg)
{
	static const uint32_t lengths[] = { 1, 512, 4096, 65536, 200000, MI };
	_cleanup_close_ int fd = memfd_create("lend", MFD_CLOEXEC);
	struct run *r = arg;

	EXPECT(r, fd >= 0, "%s", strerror(errno));
	for (unsigned i = 0; i < ARRAY_LEN(lengths); i++) {
		uint64_t off = i * 333333, len = lengths[i];

		if (check_lend(r, fd, off, len) || run_write(r, off + len / 2, len, 0, 1) ||
		    run_check(r, off, len, 1) || check_lend(r, fd, off, len))
			return -1;
	}
	return check_lend(r, fd, r->what->size - 4096, 4096);
}

static CO_FN int case_cache(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);

	if (!c || run_write(r, 1000, 100000, 0, 1))
		return -1;
	EXPECT(r, ch_cache(c, (struct ext){ &obj_none, 0, r->what->size }) == 0, "all");
	EXPECT(r, ch_cache(c, (struct ext){ &obj_none, r->what->size - 1, 1 }) == 0, "last byte");
	return run_check_all(r);
}

/* --- Many at a time --------------------------------------------------------------------------- */

enum { WORKERS_PER_REACTOR = 4, STEPS = 250, AREA = 192 * KI, STEP_LEN_MAX = 20000 };

/*
 * Workers on all reactors, in one small area so that they meet on the same blocks. Each orders its request
 * against overlapping ones of others (as a client does) by a lock on exactly the bytes it touches; whoever
 * touches other bytes of the same sector or page runs at the same time.
 */
struct crowd {
	struct run *r;
	struct rangelock order;
	uint64_t area; /* [area, area + AREA) */
};

struct worker {
	struct crowd *crowd;
	unsigned reactor;
	uint64_t random;
	int rc;
};

enum step_kind { STEP_READ, STEP_WRITE, STEP_FUA, STEP_ZERO, STEP_FLUSH };

static CO_FN int do_step(struct run *r, uint64_t off, uint64_t len, enum step_kind what)
{
	struct chan *c = run_chan(r);
	int rc;

	switch (what) {
	case STEP_READ: return run_check(r, off, len, 1 + off % SEGMENTS_MAX);
	case STEP_FUA: return run_write(r, off, len, IO_FUA, 1);
	case STEP_WRITE: return run_write(r, off, len, 0, 1 + off % SEGMENTS_MAX);
	case STEP_ZERO:
		rc = run_zero(r, off, len, off % 2 ? IO_PUNCH : 0);
		EXPECT(r, rc == 0, "zero %" PRIu64 "+%" PRIu64 ": %s", off, len, err_name(rc));
		memset(r->model + off, 0, len);
		return 0;
	case STEP_FLUSH:
		rc = c ? ch_flush(c) : -EIO;
		EXPECT(r, rc == 0, "flush: %s", err_name(rc));
		return 0;
	}
	return -1;
}

/* Mostly reads and writes; what must reach the disk takes its time. */
static enum step_kind random_step(struct worker *w)
{
	uint64_t n = random_below(&w->random, 100);

	return n < 40   ? STEP_READ
	       : n < 83 ? STEP_WRITE
	       : n < 98 ? STEP_ZERO
	       : n < 99 ? STEP_FUA
			: STEP_FLUSH;
}

static CO_FN int step(struct worker *w)
{
	struct crowd *crowd = w->crowd;
	uint64_t len = 1 + random_below(&w->random, STEP_LEN_MAX);
	uint64_t off = random_below(&w->random, AREA - len);
	enum step_kind what = random_step(w);
	struct range_hold hold;
	int rc;

	if (random_below(&w->random, 3) == 0) { /* what clients mostly do */
		off = align_down(off, 4096);
		len = MAX(align_down(len, 4096), 4096);
	}
	off += crowd->area;
	rangelock_lock(&crowd->order, &hold, 0, off, len, what == STEP_READ);
	rc = do_step(crowd->r, off, len, what);
	rangelock_unlock(&crowd->order, &hold);
	return rc;
}

static CO_FN int work_here(void *arg)
{
	struct worker *w = arg;

	for (unsigned i = 0; i < STEPS; i++) {
		if (step(w))
			return -1;
	}
	return 0;
}

static CO_FN void work(void *arg)
{
	struct worker *w = arg;

	w->rc = reactor_call(reactor_get(w->reactor), work_here, w);
}

/* `area` bytes from the disk's start. */
static CO_FN int run_crowd(struct run *r, uint64_t area)
{
	enum { WORKERS = REACTORS * WORKERS_PER_REACTOR };
	_cleanup_free_ struct worker *workers = calloc(WORKERS, sizeof(*workers));
	struct crowd crowd = { .r = r, .area = area };
	struct co_group g = CO_GROUP_INIT;
	int rc = 0;

	if (!workers)
		return conform_fail(r, __LINE__, "out of memory");
	rangelock_init(&crowd.order);
	for (unsigned i = 0; i < WORKERS; i++) {
		workers[i] = (struct worker){ &crowd, i % reactors_n(), i + 1, 0 };
		co_group_spawn(&g, work, &workers[i]);
	}
	co_group_wait(&g);
	for (unsigned i = 0; i < WORKERS && !rc; i++)
		rc = workers[i].rc;
	rangelock_destroy(&crowd.order);
	return rc ? rc : run_check_all(r);
}

static CO_FN int case_crowd(void *arg)
{
	struct run *r = arg;

	if (run_crowd(r, 0))
		return -1;
	return run_crowd(r, r->what->size - AREA);
}

enum { MIX_LEN = 100001, MIX_OFF = 777 };

static CO_FN int mix_here(void *arg)
{
	struct worker *w = arg;
	struct run *r = w->crowd->r;
	struct chan *c = run_chan(r);
	_cleanup_free_ uint8_t *buf = malloc(MIX_LEN);
	struct iovec v;
	struct iov iov = iov_one(&v, buf, MIX_LEN);

	if (!c || !buf)
		return -1;
	memset(buf, 'A' + (int)w->random, MIX_LEN);
	for (unsigned i = 0; i < 20; i++)
		EXPECT(r, ch_write(c, (struct ext){ &obj_none, MIX_OFF, MIX_LEN }, &iov, 0) == 0,
		       "write");
	return 0;
}

static CO_FN void mix(void *arg)
{
	struct worker *w = arg;

	w->rc = reactor_call(reactor_get(w->reactor), mix_here, w);
}

/* Overlapping writes that nobody orders: every byte is one of those written, and the neighbours are whole. */
static CO_FN int case_mix(void *arg)
{
	struct run *r = arg;
	struct crowd crowd = { .r = r };
	struct worker workers[REACTORS];
	struct co_group g = CO_GROUP_INIT;
	struct chan *c = run_chan(r);
	_cleanup_free_ uint8_t *buf = malloc(MIX_LEN);
	struct iovec v;
	struct iov iov = iov_one(&v, buf, MIX_LEN);

	if (!c || !buf || run_write(r, 0, MIX_OFF + MIX_LEN + 5000, 0, 1))
		return -1;
	for (unsigned i = 0; i < REACTORS; i++) {
		workers[i] = (struct worker){ &crowd, i % reactors_n(), i, 0 };
		co_group_spawn(&g, mix, &workers[i]);
	}
	co_group_wait(&g);
	for (unsigned i = 0; i < REACTORS; i++)
		EXPECT(r, workers[i].rc == 0, "worker %u", i);
	EXPECT(r, ch_read(c, (struct ext){ &obj_none, MIX_OFF, MIX_LEN }, &iov, 0) == 0, "read");
	for (uint64_t i = 0; i < MIX_LEN && !r->what->is_forgetful; i++)
		EXPECT(r, buf[i] >= 'A' && buf[i] < 'A' + REACTORS, "byte %" PRIu64 " is %02x",
		       MIX_OFF + i, buf[i]);
	run_model(r, MIX_OFF, buf, MIX_LEN);
	return run_check_all(r);
}

/* --- Opened again ----------------------------------------------------------------------------- */

/* Closed and opened, a volume has its data; read-only, it can't be changed. */
static CO_FN int case_reopen(void *arg)
{
	struct run *r = arg;
	struct chan *c;
	struct iovec v;
	char byte = 'x';
	struct iov iov = iov_one(&v, &byte, 1);
	struct ext e = { &obj_none, 5, 1 };

	if (run_write(r, 3, 70000, 0, 1) || run_shut(r))
		return -1;
	if (!r->what->is_volume)
		memset(r->model, 0, r->what->size); /* mem and null begin anew */
	if (run_reopen(r, true) || run_check_all(r))
		return -1;
	c = run_chan(r);
	if (!c)
		return -1;
	EXPECT(r, !(chain_top(r->chain)->caps & CAN_WRITE), "read-only has CAN_WRITE");
	EXPECT(r, ch_write(c, e, &iov, 0) == -EROFS, "write");
	EXPECT(r, ch_zero(c, e, 0) == -EROFS, "zero");
	EXPECT(r, ch_trim(c, e, 0) == -EROFS, "trim");
	EXPECT(r, ch_flush(c) == 0, "flush");
	if (run_check_all(r) || run_shut(r))
		return -1;
	return run_reopen(r, false) ? -1 : run_check_all(r);
}

const struct conform_case conform_cases[] = {
	{ "limits", case_limits },         { "fresh", case_fresh }, { "read back", case_read_back },
	{ "boundaries", case_boundaries }, { "zero", case_zero },   { "trim", case_trim },
	{ "flush and FUA", case_flush },   { "map", case_map },     { "lend", case_lend },
	{ "cache", case_cache },           { "crowd", case_crowd }, { "mix", case_mix },
	{ "reopen", case_reopen },         { NULL, NULL },
};
