/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Reads over write-back buffers: each grain from the newest place that has it. What is in memory is copied piece by
 * piece under the stripe's lock; what is left to the store is noted as a gap and fetched without the lock. See the
 * top of shardbuf.c for why that is right.
 */
#include <errno.h>

#include "layer/sharded/shardbuf_int.h"
#include "nbdrs/buf.h"
#include "nbdrs/cleanup.h"

/* Gaps of one shard fetched at a time, and up to which length one request for all of them is better. */
enum { GAPS_MAX = 8, HULL_MAX = 128 * 1024 };

enum source { ZEROES, FROM_DIRTY, FROM_PUTTING, STORE };

/* Where grain `at` is read from; *to becomes the end of the run of which that is true, at most `end`. */
static enum source find_source(const struct shard *s, uint64_t at, uint64_t end, uint64_t *to)
{
	const struct gen *d = s->dirty, *p = s->putting;
	const uint64_t stored = s->end / SHARD_GRAIN;

	*to = end;
	if (d) {
		if (bits_test(d->bits, at)) {
			*to = bits_find(d->bits, at, end, false);
			return FROM_DIRTY;
		}
		*to = bits_find(d->bits, at, end, true);
		if (d->rest_zero)
			return ZEROES;
	}
	if (s->is_dropping)
		return ZEROES;
	if (p) {
		if (bits_test(p->bits, at)) {
			*to = bits_find(p->bits, at, *to, false);
			return FROM_PUTTING;
		}
		*to = bits_find(p->bits, at, *to, true);
		if (p->rest_zero)
			return ZEROES;
	}
	if (at >= stored)
		return ZEROES;
	*to = MIN(*to, stored);
	return STORE;
}

struct gap {
	uint64_t off, len; /* in the shard */
	int rc;
};

/* What a read of one shard is made of. */
struct fetch {
	struct shard_user *u;
	uint64_t n, off, end;
	const struct iov *iov; /* from `off` on */
	struct obj obj;
	struct gap gaps[GAPS_MAX];
	unsigned gaps_n;
	unsigned next; /* gap to fetch */
};

/* False when there is no room for one more. */
static bool add_gap(struct fetch *f, uint64_t off, uint64_t len)
{
	struct gap *last = f->gaps_n ? &f->gaps[f->gaps_n - 1] : NULL;

	if (last && last->off + last->len == off) {
		last->len += len;
		return true;
	}
	if (f->gaps_n == GAPS_MAX)
		return false;
	f->gaps[f->gaps_n++] = (struct gap){ off, len, 0 };
	return true;
}

/* One piece from `off` on, or a gap noted. The end of it; `off` itself when there is no room for the gap. */
static uint64_t read_piece(struct fetch *f, struct shard *s, uint64_t off)
{
	uint64_t grain_end, len, end = MIN(off + PIECE, f->end);
	enum source from = find_source(s, off / SHARD_GRAIN, end / SHARD_GRAIN, &grain_end);
	const struct gen *g = from == FROM_DIRTY ? s->dirty : s->putting;

	len = grain_end * SHARD_GRAIN - off;
	if (from == STORE)
		return add_gap(f, off, len) ? off + len : off;
	if (from == ZEROES || !g->data)
		iov_zero(f->iov, off - f->off, len);
	else
		(void)iov_copy_in(f->iov, off - f->off, g->data + off, len);
	return off + len;
}

/* The same of a shard that has nothing unsaved: zeroes behind the end of its object. */
static uint64_t read_saved(struct fetch *f, uint64_t off)
{
	uint64_t stored = shard_end(f->u->b, f->n), end = MIN(off + PIECE, f->end);

	if (off >= stored) {
		iov_zero(f->iov, off - f->off, end - off);
		return end;
	}
	stored = MIN(stored, f->end);
	return add_gap(f, off, stored - off) ? stored : off;
}

/* Copies what is in memory, and notes gaps, as many as there is room for. Returns how far it came. */
static uint64_t read_buffered(struct fetch *f, uint64_t at)
{
	struct stripe *st = shard_stripe(f->u->b, f->n);

	while (at < f->end) {
		struct shard *s;
		uint64_t next;

		pthread_mutex_lock(&st->lock);
		s = shard_find(st, f->n);
		next = s ? read_piece(f, s, at) : read_saved(f, at);
		pthread_mutex_unlock(&st->lock);
		if (next == at)
			break;
		at = next;
	}
	return at;
}

static CO_FN int read_store(struct fetch *f, uint64_t off, const struct iov *iov)
{
	int rc = ch_read(f->u->kid, (struct ext){ &f->obj, off, iov->len }, iov, 0);

	if (rc != -ENOENT)
		return rc;
	iov_zero(iov, 0, iov->len); /* a bit may be set though the object is not there */
	return 0;
}

static CO_FN void fetch_gaps(void *arg)
{
	struct fetch *f = arg;

	while (f->next < f->gaps_n) {
		struct gap *gap = &f->gaps[f->next++];
		struct iovec store[IOV_SLICE_MAX];
		struct iov part =
			iov_slice(f->iov, gap->off - f->off, gap->len, store, IOV_SLICE_MAX);

		gap->rc = read_store(f, gap->off, &part);
	}
}

/* All gaps by one request for what they span. */
static CO_FN int fetch_hull(struct fetch *f, uint64_t off, uint64_t len)
{
	uint8_t *buf = buf_get(len);
	struct iovec v;
	struct iov iov = iov_one(&v, buf, len);
	int rc;

	if (!buf)
		return -ENOMEM;
	rc = read_store(f, off, &iov);
	for (unsigned i = 0; i < f->gaps_n && !rc; i++)
		(void)iov_copy_in(f->iov, f->gaps[i].off - f->off, buf + (f->gaps[i].off - off),
				  f->gaps[i].len);
	buf_put(buf, len);
	return rc;
}

static CO_FN int fetch(struct fetch *f)
{
	const struct gap *last = &f->gaps[f->gaps_n - 1];
	uint64_t hull = last->off + last->len - f->gaps[0].off, sum = 0;
	struct co_group g = CO_GROUP_INIT;
	int rc = 0;

	for (unsigned i = 0; i < f->gaps_n; i++)
		sum += f->gaps[i].len;
	if (f->gaps_n > 1 && (hull <= HULL_MAX || hull / 2 <= sum))
		return fetch_hull(f, f->gaps[0].off, hull);
	f->next = 0;
	for (unsigned i = 1; i < f->gaps_n; i++)
		co_group_spawn(&g, fetch_gaps, f);
	fetch_gaps(f);
	co_group_wait(&g);
	for (unsigned i = 0; i < f->gaps_n && !rc; i++)
		rc = f->gaps[i].rc;
	return rc;
}

int shardbuf_read(struct shard_user *u, uint64_t n, uint64_t off, const struct iov *iov)
{
	struct fetch f = { .u = u, .n = n, .off = off, .end = off + iov->len, .iov = iov };
	uint64_t at = off;

	if (!shardmap_test(u->b->conf.known, n)) {
		iov_zero(iov, 0, iov->len);
		return 0;
	}
	shard_obj(&f.obj, n);
	while (at < f.end) {
		int rc;

		f.gaps_n = 0;
		at = read_buffered(&f, at);
		rc = f.gaps_n ? fetch(&f) : 0;
		if (rc)
			return rc;
	}
	return 0;
}
