/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * readahead: for stores that are milliseconds away. Reads that belong to a sequential stream are served from
 * what was fetched before they came, in few large requests; all others go down as they are.
 *
 * Streams (readahead_streams.c) are found over all channels together, since the kernel spreads one stream over
 * its connections. A stream has a window: so many bytes are fetched, or on their way, beyond its highest
 * request. It begins at twice what was read, and doubles whenever a read has to wait for the store although
 * all of the last window was asked for. So a reader slower than the store costs little memory, and one that
 * is as fast gets the whole `window`, with enough requests in flight to hide the latency. On a line that is
 * full already it does not grow: others would wait. Nothing runs by itself: each read of a stream tops its
 * window up, and when the reads end, so does the fetching.
 *
 * A piece (readahead_pieces.c) is what one fetch brings:
 *
 *	fetching -> ready -> consumed (every byte was read once) or too old or in the way: dropped
 *	    |          |
 *	    +----------+---> written to: cut smaller; failed: dropped
 *
 * A read takes its bytes from pieces, waits for those on their way, and reads the gaps between them itself. So
 * one that is in flight already is never asked for twice, and small reads of a stream are merged into one.
 * This is no cache: what was read once is gone.
 *
 * Never older data than what was answered: a write cuts its extent out of all pieces, also of those being
 * fetched, before it goes down and again after it came back, before it is answered. What was planned before the
 * second cut may have read the old data and is gone; what is planned after it begins after the write was done.
 * Who waits for a piece and finds its bytes cut away reads them anew from below.
 *
 * Promises: flush, FUA, trim and crash are those of the layer below; nothing is held back here. Several
 * connections see each other's answered writes. Somebody else who writes to the same store, past this
 * daemon, is seen late, by up to STALE_MS and TIDY_MS together. An error of a fetch is nobody's: the reads
 * that it was for ask again and get their own; for a while nothing is fetched ahead then.
 *
 * Memory: `mem` at most, given back when nothing was read ahead for some seconds. Locks: one mutex per
 * instance, held for a search of a few steps; the store is four orders of magnitude slower. Random writers
 * do not take it while nothing is read ahead.
 *
 * What the layer below lends (a cache's memory) is near already: it is a part of its stream, and nothing is
 * fetched for it.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "layer/layers.h"
#include "layer/readahead/readahead_int.h"
#include "nbdrs/reactor.h"

#define MS UINT64_C(1000000)

enum {
	KI = 1024,
	WINDOW_MIN = 8 * KI,
	ALIGN_FROM = 128 * KI, /* fetches of this size and more end at multiples of it */
	COPY_LOCKED = 8 * KI,  /* up to here a copy is cheaper than taking the lock twice */
	TURN_LEN = 256 * KI,   /* copied at a stretch before others have their turn */
	TIDY_MS = 5000,
	STALE_MS = 10000,
	ACTIVE_MS = 2000, /* streams that share the memory: used within this time */
	SICK_MS = 250,    /* nothing is read ahead after an error for this time */
};

struct readahead {
	uint64_t window, request, mem, streams_max; /* options */

	pthread_mutex_t lock; /* guards the rest; never held across a wait */
	struct pieces pieces;
	struct streams streams;
	struct pace pace;
	unsigned running;      /* fetches planned and not yet done ... */
	struct co_wq idle;     /* ... woken when there are none */
	uint64_t sick_until;   /* ns */
	uint64_t hits, misses; /* reads served from pieces, wholly or in part; all others */
	uint64_t hit_bytes, fetches, fetched_bytes, failed;
};

struct readahead_chan {
	struct co_group fetches;
	struct timer tidy;
	struct chan *chan;
};

static const struct opt options[] = {
	{ .name = "window",
	  .type = OPT_SIZE,
	  .field = offsetof(struct readahead, window),
	  .def = "16Mi",
	  .max = UINT64_C(1) << 30,
	  .help = "a stream is read ahead up to this far, 0 = never" },
	{ .name = "request",
	  .type = OPT_SIZE,
	  .field = offsetof(struct readahead, request),
	  .def = "4Mi",
	  .min = 64 * KI,
	  .max = PIECE_MAX,
	  .help = "largest request to the store; a power of two" },
	{ .name = "mem",
	  .type = OPT_SIZE,
	  .field = offsetof(struct readahead, mem),
	  .def = "64Mi",
	  .min = 1024 * KI,
	  .max = UINT64_C(1) << 40,
	  .help = "memory for what was read ahead, of all streams together" },
	{ .name = "streams",
	  .type = OPT_UINT,
	  .field = offsetof(struct readahead, streams_max),
	  .def = "16",
	  .min = 1,
	  .max = 256,
	  .help = "so many streams are followed at a time" },
	OPT_END,
};

/* --- Opening ---------------------------------------------------------------------------------- */

static CO_FN void readahead_close(struct layer *l)
{
	struct readahead *ra = l->self;

	pieces_free(&ra->pieces);
	streams_free(&ra->streams);
	(void)pthread_mutex_destroy(&ra->lock);
}

static CO_FN int readahead_open(struct layer *l, struct err *err)
{
	struct readahead *ra = l->self;
	int rc;

	if (l->is_keyed)
		return err_set(
			err, -EINVAL,
			"layer readahead follows the disk's bytes and belongs above the mapping, "
			"as in readahead:sharded:...");
	if (ra->request & (ra->request - 1))
		return err_set(err, -EINVAL,
			       "layer readahead: option \"request\": %" PRIu64
			       " must be a power of two, as in 4Mi",
			       ra->request);
	co_wq_init(&ra->idle);
	(void)pthread_mutex_init(&ra->lock, NULL); /* can't fail for a default mutex */
	rc = streams_init(&ra->streams, (unsigned)ra->streams_max);
	if (rc == 0)
		rc = pieces_init(&ra->pieces, ra->mem);
	if (rc) {
		readahead_close(l);
		return err_set(err, rc, "layer readahead: out of memory");
	}
	return 0;
}

/* On the reactor's stack, every TIDY_MS while there is anything. */
static void tidy(struct timer *t)
{
	struct readahead_chan *rc = container_of(t, struct readahead_chan, tidy);
	struct readahead *ra = rc->chan->layer->self;
	bool is_left;

	pthread_mutex_lock(&ra->lock);
	is_left = pieces_tidy(&ra->pieces, now_ns() - STALE_MS * MS);
	pthread_mutex_unlock(&ra->lock);
	if (is_left)
		(void)timer_start(t, now_ns() + TIDY_MS * MS); /* memory stays longer without it */
}

static CO_FN int readahead_chan_open(struct chan *c)
{
	struct readahead_chan *rc = c->self;

	rc->chan = c;
	timer_init(&rc->tidy, tidy);
	return 0;
}

static CO_FN void readahead_chan_close(struct chan *c)
{
	struct readahead_chan *rc = c->self;

	/* Reads have ended, so nothing new is started. */
	co_group_wait(&rc->fetches);
	timer_stop(&rc->tidy);
}

/* --- Fetching --------------------------------------------------------------------------------- */

static CO_FN void fetch(void *arg)
{
	struct piece *p = arg;
	struct chan *c = p->chan;
	struct readahead *ra = c->layer->self;
	struct iovec v;
	struct iov iov = iov_one(&v, p->data, p->len);
	uint64_t begun = now_ns();
	int rc = ch_read(c->kids[0], (struct ext){ &obj_none, p->off, p->len }, &iov, 0);

	pthread_mutex_lock(&ra->lock);
	p->is_fetching = false;
	ra->fetches++;
	if (rc == 0) {
		p->fetched = p->len;
		ra->fetched_bytes += p->len;
		pace_note(&ra->pace, now_ns() - begun);
	} else {
		ra->failed++;
		ra->sick_until = now_ns() + SICK_MS * MS;
		piece_drop(&ra->pieces, p);
	}
	co_wq_wake_all(&p->done);
	piece_put(&ra->pieces, p);
	if (--ra->running == 0)
		co_wq_wake_all(&ra->idle);
	pthread_mutex_unlock(&ra->lock);
}

/* Starts what was planned, in fibers of this channel. */
static CO_FN void start(struct chan *c, struct piece *planned)
{
	struct readahead_chan *rc = c->self;

	if (likely(!planned))
		return;
	/*
	 * The new count of pieces must be visible before any fetch reads: then either the writer who answers now
	 * sees it and cuts, or the fetch reads what was written. Pairs with invalidate().
	 */
	atomic_thread_fence(memory_order_seq_cst);
	if (!rc->tidy.slot)
		(void)timer_start(&rc->tidy, now_ns() + TIDY_MS * MS);
	while (planned) {
		struct piece *p = planned;

		planned = p->next; /* p may be gone when the fetch has run */
		p->chan = c;
		co_group_spawn(&rc->fetches, fetch, p);
	}
}

/* --- Planning, under the lock ----------------------------------------------------------------- */

/* How large a fetch is: all of a small window, then several at a time. */
static uint64_t fetch_len(const struct readahead *ra, uint64_t window)
{
	uint64_t len = MIN(window, MAX(window / 8, UINT64_C(512) * KI));

	len = MIN(len, ra->request);
	return UINT64_C(1) << (63 - __builtin_clzll(len));
}

static uint64_t fetch_end(const struct readahead *ra, uint64_t at, uint64_t len)
{
	uint64_t end = at + len;

	if (len >= ALIGN_FROM)
		return align_down(end, len);
	return MIN(end, align_down(at, ra->request) + ra->request);
}

/*
 * Plans fetches for the gaps between pieces from `at` on: those that begin before `must` at any rate, and
 * further ones of `len` bytes that fit before `goal`. *end: how far it came.
 */
static struct piece *plan_gaps(struct chan *c, uint64_t at, uint64_t must, uint64_t goal,
			       uint64_t len, uint64_t *end)
{
	struct readahead *ra = c->layer->self;
	struct pieces *t = &ra->pieces;
	struct piece *first = NULL, **tail = &first;
	uint64_t size = c->layer->size, now = now_ns();

	goal = MIN(MAX(goal, must), size);
	for (unsigned i = pieces_at(t, at); at < goal; i = pieces_at(t, at)) {
		struct piece *next = i < t->n ? t->v[i] : NULL, *p;
		uint64_t to = MIN(fetch_end(ra, at, len), size);

		if (next && next->from <= at) {
			at = next->to;
			continue;
		}
		if (next)
			to = MIN(to, next->from);
		if (to > goal && at >= must)
			break;
		to = MIN(to, goal);
		p = piece_new(t, at, to, now);
		if (!p)
			break;
		ra->running++;
		*tail = p;
		tail = &p->next;
		at = to;
	}
	*end = at;
	return first;
}

/* Whether the byte at `off` is there. */
static bool is_ready(const struct readahead *ra, uint64_t off)
{
	unsigned i = pieces_at(&ra->pieces, off);

	return i < ra->pieces.n && ra->pieces.v[i]->from <= off && !ra->pieces.v[i]->is_fetching;
}

/* What to fetch now that this read has come; NULL = nothing. */
static struct piece *plan(struct chan *c, struct ext e)
{
	struct readahead *ra = c->layer->self;
	uint64_t now = reactor_now(), limit, end;
	struct stream *s = streams_note(&ra->streams, e.off, e.len, now);
	struct piece *first;
	bool can_grow;

	if (!s)
		return NULL;
	if (now < ra->sick_until) {
		s->window = WINDOW_MIN;
		s->grow_at = s->pos;
		return NULL;
	}
	limit = ra->mem / 4 * 3 / MAX(1U, streams_active(&ra->streams, now - ACTIVE_MS * MS));
	limit = MIN(limit, ra->window);
	can_grow = s->pos > s->prev && s->pos > s->grow_at && !is_ready(ra, e.off + e.len - 1) &&
		   !pace_is_crowded(&ra->pace);
	if (can_grow)
		s->window *= 2;
	s->window = MAX(MIN(s->window, limit), (uint64_t)WINDOW_MIN);
	first = plan_gaps(c, s->prev, s->pos, s->pos + s->window, fetch_len(ra, s->window), &end);
	if (can_grow)
		s->grow_at = end;
	return first;
}

/* --- Reading ---------------------------------------------------------------------------------- */

/* A part of the request, [at, to), from the layer below. */
static CO_FN int read_below(struct chan *c, struct ext e, const struct iov *iov, unsigned fl,
			    uint64_t at, uint64_t to)
{
	struct iovec store[IOV_SLICE_MAX];
	struct iov part = iov_slice(iov, at - e.off, to - at, store, IOV_SLICE_MAX);

	return ch_read(c->kids[0], (struct ext){ e.obj, at, to - at }, &part, fl);
}

static bool holds(const struct piece *p, uint64_t at)
{
	return p->is_listed && p->from <= at && at < p->to;
}

/*
 * Copies [at, to) out of a piece that is ready and that the caller has a reference on. The lock is held when
 * called and on return, not while much is copied. A write may cut the piece meanwhile: it came later than
 * this read.
 */
static CO_FN void copy(struct readahead *ra, struct piece *p, const struct iov *iov, size_t iov_off,
		       uint64_t at, uint64_t to)
{
	bool unlock = to - at > COPY_LOCKED;

	if (unlock)
		pthread_mutex_unlock(&ra->lock);
	for (uint64_t done = 0; done < to - at; done += TURN_LEN) {
		if (done)
			co_yield();
		(void)iov_copy_in(iov, iov_off + done, p->data + (at - p->off) + done,
				  MIN(to - at - done, (uint64_t)TURN_LEN));
	}
	if (unlock)
		pthread_mutex_lock(&ra->lock);
	piece_consume(&ra->pieces, p, to - at);
	ra->hit_bytes += to - at;
}

/* The next part of the request, from `at` on; *next becomes the end of it. */
static CO_FN int read_part(struct chan *c, struct ext e, const struct iov *iov, unsigned fl,
			   uint64_t at, uint64_t *next)
{
	struct readahead *ra = c->layer->self;
	uint64_t to = e.off + e.len;
	struct piece *p;
	bool is_there;
	unsigned i;

	pthread_mutex_lock(&ra->lock);
	i = pieces_at(&ra->pieces, at);
	p = i < ra->pieces.n ? ra->pieces.v[i] : NULL;
	if (!p || p->from > at) {
		*next = p ? MIN(to, p->from) : to;
		pthread_mutex_unlock(&ra->lock);
		return read_below(c, e, iov, fl, at, *next);
	}
	*next = MIN(to, p->to);
	p->refs++;
	while (p->is_fetching && holds(p, at))
		co_wq_wait(&p->done, &ra->lock);
	is_there = holds(p, at);
	if (is_there) {
		*next = MIN(*next, p->to);
		copy(ra, p, iov, at - e.off, at, *next);
	}
	piece_put(&ra->pieces, p);
	pthread_mutex_unlock(&ra->lock);
	/* Failed, or written to meanwhile. No second wait: that could go on as long as somebody writes. */
	return is_there ? 0 : read_below(c, e, iov, fl, at, *next);
}

static CO_FN int readahead_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	struct readahead *ra = c->layer->self;
	struct piece *planned;
	bool is_near;
	int rc = 0;

	pthread_mutex_lock(&ra->lock);
	planned = ra->window ? plan(c, e) : NULL;
	is_near = pieces_touch(&ra->pieces, e.off, e.off + e.len);
	ra->hits += is_near;
	ra->misses += !is_near;
	pthread_mutex_unlock(&ra->lock);
	start(c, planned);
	if (!is_near)
		return ch_read(c->kids[0], e, iov, fl);
	for (uint64_t at = e.off; at < e.off + e.len && rc == 0;)
		rc = read_part(c, e, iov, fl, at, &at);
	return rc;
}

/* Pieces are asked first: a read takes what was fetched for it, so that it goes. */
static int readahead_lend(struct chan *c, struct ext e, struct loan *loan)
{
	struct readahead *ra = c->layer->self;
	int rc = -EAGAIN;

	pthread_mutex_lock(&ra->lock);
	if (!pieces_touch(&ra->pieces, e.off, e.off + e.len))
		rc = ch_lend(c->kids[0], e, loan);
	if (rc == 0 && ra->window)
		(void)streams_note(&ra->streams, e.off, e.len, reactor_now());
	pthread_mutex_unlock(&ra->lock);
	return rc;
}

/* A hint: fetches what fits into half of the memory, and does not wait for it. */
static CO_FN int readahead_cache(struct chan *c, struct ext e)
{
	struct readahead *ra = c->layer->self;
	uint64_t len = MIN(e.len, ra->mem / 2), end;
	struct piece *planned = NULL;

	pthread_mutex_lock(&ra->lock);
	if (now_ns() >= ra->sick_until)
		planned = plan_gaps(c, e.off, e.off + len, 0, fetch_len(ra, ra->mem / 2), &end);
	pthread_mutex_unlock(&ra->lock);
	start(c, planned);
	return 0;
}

/* --- Writing ---------------------------------------------------------------------------------- */

static void invalidate(struct chan *c, struct ext e)
{
	struct readahead *ra = c->layer->self;

	/* The write must be visible before the count is looked at. Pairs with start(). */
	atomic_thread_fence(memory_order_seq_cst);
	if (likely(atomic_load_explicit(&ra->pieces.n, memory_order_relaxed) == 0))
		return;
	pthread_mutex_lock(&ra->lock);
	pieces_cut(&ra->pieces, e.off, e.off + e.len);
	pthread_mutex_unlock(&ra->lock);
}

static CO_FN int readahead_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	int rc;

	invalidate(c, e);
	rc = ch_write(c->kids[0], e, iov, fl);
	invalidate(c, e);
	return rc;
}

static CO_FN int readahead_zero(struct chan *c, struct ext e, unsigned fl)
{
	int rc;

	invalidate(c, e);
	rc = ch_zero(c->kids[0], e, fl);
	invalidate(c, e);
	return rc;
}

static CO_FN int readahead_trim(struct chan *c, struct ext e, unsigned fl)
{
	int rc;

	invalidate(c, e);
	rc = ch_trim(c->kids[0], e, fl);
	invalidate(c, e);
	return rc;
}

/* --- Another size ----------------------------------------------------------------------------- */

/*
 * Fetches are nobody's requests: they are waited for, so that nothing below is in use, and forgotten. No new ones come,
 * as nobody reads.
 */
static CO_FN int readahead_resize(struct chan *c, uint64_t size, enum resize_phase phase, struct err *err)
{
	struct readahead *ra = c->layer->self;
	int rc;

	if (phase == RESIZE_NOW) {
		pthread_mutex_lock(&ra->lock);
		while (ra->running)
			co_wq_wait(&ra->idle, &ra->lock);
		pieces_cut(&ra->pieces, 0, UINT64_MAX);
		pthread_mutex_unlock(&ra->lock);
	}
	rc = ch_resize(c->kids[0], size, phase, err);
	if (!rc && phase == RESIZE_NOW)
		c->layer->size = c->kids[0]->layer->size;
	return rc;
}

/* --- Looking at it ---------------------------------------------------------------------------- */

static void readahead_status(struct layer *l, struct info *i)
{
	struct readahead *ra = l->self;

	pthread_mutex_lock(&ra->lock);
	info_number(i, "hits", ra->hits);
	info_number(i, "misses", ra->misses);
	info_number(i, "hit_bytes", ra->hit_bytes);
	info_number(i, "fetches", ra->fetches);
	info_number(i, "fetches_failed", ra->failed);
	info_number(i, "fetched_bytes", ra->fetched_bytes);
	info_number(i, "wasted_bytes", ra->pieces.wasted);
	info_number(i, "streams", ra->streams.found);
	info_number(i, "streams_active", streams_active(&ra->streams, now_ns() - ACTIVE_MS * MS));
	info_number(i, "memory", ra->pieces.total);
	pthread_mutex_unlock(&ra->lock);
}

const struct layer_ops readahead_layer = {
	.name = "readahead",
	.help = "reads sequential streams ahead, in few large requests; for stores that are far away",
	.opts = options,
	.self_size = sizeof(struct readahead),
	.chan_size = sizeof(struct readahead_chan),
	.min_kids = 1,
	.max_kids = 1,
	.open = readahead_open,
	.close = readahead_close,
	.chan_open = readahead_chan_open,
	.chan_close = readahead_chan_close,
	.read = readahead_read,
	.lend = readahead_lend,
	.write = readahead_write,
	.zero = readahead_zero,
	.trim = readahead_trim,
	.cache = readahead_cache,
	.resize = readahead_resize,
	.status = readahead_status,
};
