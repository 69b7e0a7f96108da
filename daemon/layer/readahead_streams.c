/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Which reads are parts of a sequential stream?
 *
 * Requests of one stream arrive out of order: many are in flight, and the kernel spreads them over several
 * connections. So neither "begins where the last one ended" nor one reactor's view will do. A request joins the
 * candidate near which it lies; when the requests of a candidate cover most of the ground between the lowest and
 * the highest of them, and at least two of them have moved its upper end, it is a stream. Random reads may lie
 * near each other, but do not cover the ground; rereading is not counted; reading backwards moves the other end.
 *
 *	free -> candidate -> stream      covers the ground
 *	          |   ^        |
 *	          +-> anew <---+         too thin: begins again with the last request
 *
 * Whoever was not used for longest gives way to the new.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "layer/readahead_int.h"
#include "nbdrs/cleanup.h"

enum {
	KI = 1024,
	REQUESTS_MIN = 3, /* of a stream */
	STREAM_NEAR = 16,
	NEAR_MIN = 256 * KI,
	NEAR_MAX = 8192 * KI,
	REVIEW = 1024 * KI, /* a stream that moved so far is looked at again */
};

int streams_init(struct streams *t, unsigned n)
{
	memset(t, 0, sizeof(*t));
	t->v = calloc(n, sizeof(*t->v));
	if (!t->v)
		return -ENOMEM;
	t->n = n;
	return 0;
}

void streams_free(struct streams *t)
{
	free(t->v);
	t->v = NULL;
	t->n = 0;
}

unsigned streams_active(const struct streams *t, uint64_t since_ns)
{
	unsigned n = 0;

	for (unsigned i = 0; i < t->n; i++)
		n += t->v[i].used_ns > since_ns;
	return n;
}

/*
 * How far off its place a request may come: as far as a queue of them reaches. Stricter
 * where it is still to be found out whether there is a stream.
 */
static uint64_t near(uint64_t len, unsigned requests)
{
	return MIN(MAX(requests * len, (uint64_t)NEAR_MIN), (uint64_t)NEAR_MAX);
}

static uint64_t distance(uint64_t a, uint64_t b)
{
	return a > b ? a - b : b - a;
}

/* --- Streams ---------------------------------------------------------------------------------- */

static struct stream *stream_find(struct streams *t, uint64_t off, uint64_t len)
{
	struct stream *best = NULL;
	uint64_t limit = near(len, STREAM_NEAR);

	for (unsigned i = 0; i < t->n; i++) {
		struct stream *s = &t->v[i];

		if (s->used_ns && distance(off, s->pos) <= limit &&
		    (!best || distance(off, s->pos) < distance(off, best->pos)))
			best = s;
	}
	return best;
}

/* False when so little was read of the way it came that it is none (any more). */
static bool stream_advance(struct stream *s, uint64_t end, uint64_t len, uint64_t now)
{
	s->prev = s->pos;
	s->pos = MAX(s->pos, end);
	s->used_ns = now;
	s->bytes += len;
	if (s->pos - s->start < REVIEW)
		return true;
	if (s->bytes < (s->pos - s->start) / 2)
		return false;
	s->start = s->pos;
	s->bytes = 0;
	return true;
}

static struct stream *stream_new(struct streams *t, const struct candidate *c, uint64_t now)
{
	struct stream *s = &t->v[0];

	for (unsigned i = 1; i < t->n; i++) {
		if (t->v[i].used_ns < s->used_ns)
			s = &t->v[i];
	}
	*s = (struct stream){
		.pos = c->hi,
		.prev = c->hi,
		.grow_at = c->hi,
		.start = c->hi,
		.window = 2 * (c->hi - c->lo),
		.used_ns = now,
	};
	t->found++;
	return s;
}

/* --- Candidates ------------------------------------------------------------------------------- */

/* The one that the request lies near, nearest to its upper end; else the one to be replaced. */
static struct candidate *candidate_find(struct streams *t, uint64_t off, uint64_t len,
					bool *is_near)
{
	struct candidate *best = NULL, *oldest = &t->candidates[0];
	uint64_t limit = near(len, CANDIDATE_MAX);

	for (unsigned i = 0; i < CANDIDATES; i++) {
		struct candidate *c = &t->candidates[i];

		if (c->last < oldest->last)
			oldest = c;
		if (c->last && off <= c->hi + limit && off + len + limit >= c->lo &&
		    (!best || distance(off, c->hi) < distance(off, best->hi)))
			best = c;
	}
	*is_near = best != NULL;
	return best ? best : oldest;
}

static void candidate_begin(struct candidate *c, uint64_t off, uint64_t len, uint64_t tick)
{
	*c = (struct candidate){
		.lo = off, .hi = off + len, .bytes = len, .offs[0] = off, .n = 1, .last = tick
	};
}

static void candidate_join(struct candidate *c, uint64_t off, uint64_t len, uint64_t tick)
{
	for (unsigned i = 0; i < c->n; i++) {
		if (c->offs[i] == off) { /* once more: no new ground */
			c->last = tick;
			return;
		}
	}
	if (c->n == CANDIDATE_MAX) {
		candidate_begin(c, off, len, tick);
		return;
	}
	c->offs[c->n] = off;
	c->ups += off + len > c->hi;
	c->lo = MIN(c->lo, off);
	c->hi = MAX(c->hi, off + len);
	c->bytes += len;
	c->n++;
	c->last = tick;
}

static bool is_stream(const struct candidate *c)
{
	return c->n >= REQUESTS_MIN && c->ups >= REQUESTS_MIN - 1 &&
	       c->bytes >= (c->hi - c->lo) / 4 * 3;
}

struct stream *streams_note(struct streams *t, uint64_t off, uint64_t len, uint64_t now)
{
	struct stream *s = stream_find(t, off, len);
	struct candidate *c;
	bool is_near;

	t->tick++;
	if (s) {
		if (stream_advance(s, off + len, len, now))
			return s;
		s->used_ns = 0;
	}
	c = candidate_find(t, off, len, &is_near);
	if (!is_near) {
		candidate_begin(c, off, len, t->tick);
		return NULL;
	}
	candidate_join(c, off, len, t->tick);
	if (!is_stream(c))
		return NULL;
	s = stream_new(t, c, now);
	c->last = 0;
	return s;
}
