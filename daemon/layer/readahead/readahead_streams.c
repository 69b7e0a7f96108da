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

#include "layer/readahead/readahead_int.h"
#include "nbdrs/cleanup.h"

/* Of a free area: near nothing, and no sum with it wraps. */
#define AREA_NONE (UINT64_MAX / 2)

enum {
	KI = 1024,
	REQUESTS_MIN = 3, /* of a stream */
	STREAM_NEAR = 16,
	NEAR_MIN = 256 * KI,
	NEAR_MAX = 8192 * KI,
	CROWDED_MS = 300, /* shorter waits than this do nobody harm */
	CROWDED_TIMES = 4,
	REVIEW = 1024 * KI, /* a stream that moved so far is looked at again */
};

int streams_init(struct streams *t, unsigned n)
{
	memset(t, 0, sizeof(*t));
	for (unsigned i = 0; i < CANDIDATES; i++)
		t->areas[i].lo = t->areas[i].hi = AREA_NONE;
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

	if (!t->live)
		return NULL;
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

static struct stream *stream_new(struct streams *t, uint64_t lo, uint64_t hi, uint64_t now)
{
	struct stream *s = &t->v[0];

	for (unsigned i = 1; i < t->n; i++) {
		if (t->v[i].used_ns < s->used_ns)
			s = &t->v[i];
	}
	t->live += !s->used_ns;
	*s = (struct stream){
		.pos = hi,
		.prev = hi,
		.grow_at = hi,
		.start = hi,
		.window = 2 * (hi - lo),
		.used_ns = now,
	};
	t->found++;
	return s;
}

/* --- Candidates ------------------------------------------------------------------------------- */

/* The one that the request lies near, nearest to its upper end; CANDIDATES if there is none. */
static unsigned candidate_find(const struct streams *t, uint64_t off, uint64_t len)
{
	uint64_t limit = near(len, CANDIDATE_MAX), matches = 0;
	unsigned best = CANDIDATES;

	/* Without branches: this is what random reads cost. */
	for (unsigned i = 0; i < CANDIDATES; i++)
		matches |= (uint64_t)((off <= t->areas[i].hi + limit) &
				      (off + len + limit >= t->areas[i].lo))
			   << i;
	for (; matches; matches &= matches - 1) {
		unsigned i = (unsigned)__builtin_ctzll(matches);

		if (best == CANDIDATES ||
		    distance(off, t->areas[i].hi) < distance(off, t->areas[best].hi))
			best = i;
	}
	return best;
}

/* One that nobody joined for longest, nearly. */
static unsigned candidate_replaced(struct streams *t)
{
	for (;;) {
		unsigned i = t->hand++ % CANDIDATES;

		if (!t->candidates[i].is_spared)
			return i;
		t->candidates[i].is_spared = false;
	}
}

static void candidate_begin(struct streams *t, unsigned i, uint64_t off, uint64_t len)
{
	t->areas[i].lo = off;
	t->areas[i].hi = off + len;
	t->candidates[i].bytes = len;
	t->candidates[i].offs[0] = off;
	t->candidates[i].n = 1;
	t->candidates[i].ups = 0;
}

static void candidate_join(struct streams *t, unsigned i, uint64_t off, uint64_t len)
{
	struct candidate *c = &t->candidates[i];

	c->is_spared = true;
	for (unsigned k = 0; k < c->n; k++) {
		if (c->offs[k] == off) /* once more: no new ground */
			return;
	}
	if (c->n == CANDIDATE_MAX) {
		candidate_begin(t, i, off, len);
		return;
	}
	c->ups += off + len > t->areas[i].hi;
	t->areas[i].lo = MIN(t->areas[i].lo, off);
	t->areas[i].hi = MAX(t->areas[i].hi, off + len);
	c->bytes += len;
	c->offs[c->n++] = off;
}

static bool is_stream(const struct streams *t, unsigned i)
{
	const struct candidate *c = &t->candidates[i];

	return c->n >= REQUESTS_MIN && c->ups >= REQUESTS_MIN - 1 &&
	       c->bytes >= (t->areas[i].hi - t->areas[i].lo) / 4 * 3;
}

struct stream *streams_note(struct streams *t, uint64_t off, uint64_t len, uint64_t now)
{
	struct stream *s = stream_find(t, off, len);
	unsigned i;

	if (s) {
		if (stream_advance(s, off + len, len, now))
			return s;
		s->used_ns = 0;
		t->live--;
	}
	i = candidate_find(t, off, len);
	if (i == CANDIDATES) {
		candidate_begin(t, candidate_replaced(t), off, len);
		return NULL;
	}
	candidate_join(t, i, off, len);
	if (!is_stream(t, i))
		return NULL;
	s = stream_new(t, t->areas[i].lo, t->areas[i].hi, now);
	t->areas[i].lo = t->areas[i].hi = AREA_NONE;
	t->candidates[i].is_spared = false;
	return s;
}

/* --- Pace ------------------------------------------------------------------------------------- */

void pace_note(struct pace *p, uint64_t took_ns)
{
	if (!p->best_ns) {
		p->best_ns = p->mean_ns = took_ns;
		return;
	}
	/* A way that has become longer is believed after a while: twice as long after 45 fetches. */
	p->best_ns = MIN(took_ns, p->best_ns + p->best_ns / 64);
	p->mean_ns = (3 * p->mean_ns + took_ns) / 4;
}

bool pace_is_crowded(const struct pace *p)
{
	return p->mean_ns > CROWDED_MS * UINT64_C(1000000) &&
	       p->mean_ns > CROWDED_TIMES * p->best_ns;
}
