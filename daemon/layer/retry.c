/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * retry: a request that failed for a reason that may pass (is_transient()) is tried again, after a pause.
 *
 * The n-th pause is anywhere between nothing and base * 2^n, at most `cap` (full jitter: clients that failed together
 * must not come back together), and not before a time that the store has asked for (chan.not_before). It ends with
 * success, with an answer that trying again won't change, after `max` repeats, or when `deadline` has passed since the
 * request came. Long by default: a file system above takes an I/O error for lost data, and most outages of stores, a
 * restart, a failover, a cable, are over within minutes. Whoever would rather have the error shortens it.
 *
 * Repeating is harmless for everything but a conditional put. One whose answer was lost may have been done, and its
 * repeat finds the object there, or changed: by itself. So when an attempt with unknown end came before, -EEXIST and
 * -ESTALE are looked into: if the object is byte for byte what was to be put, it is taken for ours. Whoever decides by
 * conditional puts writes what tells it from others. Without such an attempt both are answers like any other.
 * What is refused in the end may still have been done and replaced since: who reads what is there now sees.
 *
 * A list that is begun anew shows what it has shown already once more.
 *
 * Promises: those of the layer below, later. A request answered with an error may have been done, as always. Requests
 * that overtake each other here were not ordered by the client either. Flush covers what was answered before it came:
 * what waits here was not.
 *
 * When the daemon is to end, it ends by the time that it is given (retry_stop_by()), however long the deadline is.
 *
 * Opening is not retried: the layer below opens before this one, and a store that is away at the daemon's start fails
 * the start. Memory: that of the requests in flight.
 */
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/layers.h"
#include "nbdrs/buf.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/log.h"
#include "nbdrs/reactor.h"

#define SECOND UINT64_C(1000000000)
/* So long without a failure, and nobody waiting, and the store is well again. */
#define CALM_NS (5 * SECOND)
/* A sleeper looks so often whether the daemon is to end. */
#define LOOK_NS (SECOND / 2)
enum { COMPARE_PIECE = 256 * 1024 };

struct retry {
	uint64_t max, deadline, base, cap; /* options; ns but for max */
	char *what;                        /* the layer below, for the log; secrets masked */

	_Atomic bool is_sick; /* a hint, so that good requests of good days need no lock */
	pthread_mutex_t lock; /* guards all below; never held across a wait */
	uint64_t sick_since, last_failure;
	uint64_t retries, given_up;
	unsigned waiting;
	int last_error;
	struct log_gate gate;
};

struct retry_chan {
	uint64_t random;
};

static _Atomic uint64_t stop_by; /* 0 = the daemon goes on; relaxed, it orders nothing else */

static const struct opt options[] = {
	{ .name = "max",
	  .type = OPT_UINT,
	  .field = offsetof(struct retry, max),
	  .def = "0",
	  .max = 1000000,
	  .help = "repeats of one request, 0 = as many as the deadline allows" },
	{ .name = "deadline",
	  .type = OPT_TIME_NS,
	  .field = offsetof(struct retry, deadline),
	  .def = "5m",
	  .max = 365 * 86400 * SECOND,
	  .help = "a request that has taken so long is not repeated any more, 0 = for ever" },
	{ .name = "base",
	  .type = OPT_TIME_NS,
	  .field = offsetof(struct retry, base),
	  .def = "100ms",
	  .min = 1000,
	  .max = 3600 * SECOND,
	  .help = "longest first pause; doubles from one to the next" },
	{ .name = "cap",
	  .type = OPT_TIME_NS,
	  .field = offsetof(struct retry, cap),
	  .def = "5s",
	  .min = 1000,
	  .max = 3600 * SECOND,
	  .help = "longest pause" },
	OPT_END,
};

/* --- Health ----------------------------------------------------------------------------------- */

static unsigned ms(uint64_t ns)
{
	return (unsigned)MIN(ns / 1000000, (uint64_t)UINT32_MAX);
}

/* A request will be repeated. */
static void note_failure(struct retry *r, enum ch_op op, int rc)
{
	unsigned suppressed = 0;
	bool tell = false;

	pthread_mutex_lock(&r->lock);
	r->last_failure = now_ns();
	r->last_error = rc;
	r->retries++;
	r->waiting++;
	if (!atomic_load_explicit(&r->is_sick, memory_order_relaxed)) {
		r->sick_since = r->last_failure;
		atomic_store_explicit(&r->is_sick, true, memory_order_relaxed);
		tell = log_gate_open(&r->gate, &suppressed);
	}
	pthread_mutex_unlock(&r->lock);
	if (tell)
		log_warn(
			"a request failed and is tried again op=%s error=%s store=%s suppressed=%u",
			ch_op_names[op], err_name(rc), r->what, suppressed);
}

static void note_given_up(struct retry *r, enum ch_op op, int rc, uint64_t took, unsigned tries)
{
	unsigned suppressed = 0;
	bool tell;

	pthread_mutex_lock(&r->lock);
	r->last_failure = now_ns();
	r->last_error = rc;
	r->given_up++;
	tell = log_gate_open(&r->gate, &suppressed);
	pthread_mutex_unlock(&r->lock);
	if (tell)
		log_error(
			"a request is given up op=%s error=%s tries=%u after_ms=%u store=%s suppressed=%u",
			ch_op_names[op], err_name(rc), tries, ms(took), r->what, suppressed);
}

/* A request was answered while the store was held to be sick. */
static void note_answer(struct retry *r)
{
	uint64_t now = now_ns(), lasted = 0;
	bool is_well;

	pthread_mutex_lock(&r->lock);
	is_well = atomic_load_explicit(&r->is_sick, memory_order_relaxed) && r->waiting == 0 &&
		  now - r->last_failure >= CALM_NS;
	if (is_well) {
		atomic_store_explicit(&r->is_sick, false, memory_order_relaxed);
		lasted = r->last_failure - r->sick_since;
	}
	pthread_mutex_unlock(&r->lock);
	if (is_well)
		log_info("well again store=%s lasted_ms=%u", r->what, ms(lasted));
}

/* --- One request ------------------------------------------------------------------------------ */

struct attempts {
	struct chan *c;
	enum ch_op op;
	uint64_t start; /* ns */
	unsigned failed;
};

static struct attempts begin(struct chan *c, enum ch_op op)
{
	return (struct attempts){ .c = c, .op = op, .start = now_ns() };
}

/* splitmix64 (Steele, Lea, Flood 2014). */
static uint64_t next_random(uint64_t *state)
{
	uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
	return z ^ z >> 31;
}

/* The latest time that a store below asks to be left alone until; 0 = none does. */
static uint64_t not_before(const struct chan *c)
{
	uint64_t until = c->not_before;

	for (unsigned i = 0; i < c->layer->kids_n; i++)
		if (c->kids[i])
			until = MAX(until, not_before(c->kids[i]));
	return until;
}

/* The pause before the next try, ns. */
static uint64_t pause_length(const struct attempts *a, uint64_t now)
{
	const struct retry *r = a->c->layer->self;
	struct retry_chan *rc = a->c->self;
	/* 2^20 * 1 us is a second; more doublings would only overflow. */
	uint64_t most = MIN(r->base << MIN(a->failed, 20U), MAX(r->cap, r->base));
	uint64_t pause = next_random(&rc->random) % (most + 1);
	uint64_t until = not_before(a->c->kids[0]);

	if (until > now)
		pause +=
			until -
			now; /* and those who were told the same do not come back together either */
	return pause;
}

void retry_stop_by(uint64_t ns)
{
	atomic_store_explicit(&stop_by, ns, memory_order_relaxed);
}

/* When this request has to have an end; UINT64_MAX = never. */
static uint64_t end_of(const struct attempts *a)
{
	const struct retry *r = a->c->layer->self;
	uint64_t end = r->deadline ? a->start + r->deadline : UINT64_MAX;
	uint64_t stop = atomic_load_explicit(&stop_by, memory_order_relaxed);

	return stop ? MIN(end, stop) : end;
}

/* The last try is at the end. */
static CO_FN void sleep_until(const struct attempts *a, uint64_t until)
{
	for (uint64_t now = now_ns(); now < MIN(until, end_of(a)); now = now_ns())
		co_sleep(MIN(MIN(until, end_of(a)) - now, LOOK_NS));
}

/* After a try that ended with rc: shall there be another one? Then the pause is over. */
static CO_FN bool again(struct attempts *a, int rc)
{
	struct retry *r = a->c->layer->self;
	uint64_t now, pause;

	if (likely(!is_transient(rc))) {
		if (unlikely(atomic_load_explicit(&r->is_sick, memory_order_relaxed)))
			note_answer(r);
		return false;
	}
	now = now_ns();
	if ((r->max && a->failed >= r->max) || now >= end_of(a)) {
		note_given_up(r, a->op, rc, now - a->start, a->failed + 1);
		return false;
	}
	note_failure(r, a->op, rc);
	pause = pause_length(a, now);
	a->failed++;
	sleep_until(a, now + pause);
	pthread_mutex_lock(&r->lock);
	r->waiting--;
	pthread_mutex_unlock(&r->lock);
	return true;
}

/* --- Requests --------------------------------------------------------------------------------- */

static CO_FN int retry_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	struct attempts a = begin(c, CH_READ);
	int rc;

	do
		rc = ch_read(c->kids[0], e, iov, fl);
	while (again(&a, rc));
	return rc;
}

static CO_FN int retry_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	struct attempts a = begin(c, CH_WRITE);
	int rc;

	do
		rc = ch_write(c->kids[0], e, iov, fl);
	while (again(&a, rc));
	return rc;
}

static CO_FN int retry_zero(struct chan *c, struct ext e, unsigned fl)
{
	struct attempts a = begin(c, CH_ZERO);
	int rc;

	do
		rc = ch_zero(c->kids[0], e, fl);
	while (again(&a, rc));
	return rc;
}

static CO_FN int retry_trim(struct chan *c, struct ext e, unsigned fl)
{
	struct attempts a = begin(c, CH_TRIM);
	int rc;

	do
		rc = ch_trim(c->kids[0], e, fl);
	while (again(&a, rc));
	return rc;
}

static CO_FN int retry_flush(struct chan *c)
{
	struct attempts a = begin(c, CH_FLUSH);
	int rc;

	do
		rc = ch_flush(c->kids[0]);
	while (again(&a, rc));
	return rc;
}

static CO_FN int retry_map(struct chan *c, struct ext e, struct extmap *m)
{
	struct attempts a = begin(c, CH_MAP);
	const struct extmap before = *m;
	struct extent last = { 0 };
	int rc;

	if (m->n)
		last = m->v[m->n - 1]; /* may be merged with */
	do {
		*m = before;
		if (m->n)
			m->v[m->n - 1] = last;
		rc = ch_map(c->kids[0], e, m);
	} while (again(&a, rc));
	return rc;
}

static CO_FN int retry_stat(struct chan *c, const struct obj *obj, struct obj_stat *st)
{
	struct attempts a = begin(c, CH_STAT);
	int rc;

	do
		rc = ch_stat(c->kids[0], obj, st);
	while (again(&a, rc));
	return rc;
}

static CO_FN int retry_del(struct chan *c, const struct obj *objs, unsigned n)
{
	struct attempts a = begin(c, CH_DEL);
	int rc;

	do
		rc = ch_del(c->kids[0], objs, n);
	while (again(&a, rc));
	return rc;
}

/* What the listing's owner says must not be taken for an answer of the store. */
struct listing {
	list_fn *fn;
	void *arg;
	bool is_ended;
};

static int list_one(void *arg, const char *name, uint64_t size)
{
	struct listing *l = arg;
	int rc = l->fn(l->arg, name, size);

	l->is_ended = rc != 0;
	return rc;
}

static CO_FN int retry_list(struct chan *c, const char *prefix, list_fn *fn, void *arg)
{
	struct attempts a = begin(c, CH_LIST);
	struct listing l = { fn, arg, false };
	int rc;

	do
		rc = ch_list(c->kids[0], prefix, list_one, &l);
	while (!l.is_ended && again(&a, rc));
	return rc;
}

/* --- put -------------------------------------------------------------------------------------- */

/* Could the request have been done all the same? Not when nobody was there to do it. */
static bool is_end_unknown(int rc)
{
	switch (rc) {
	case -ECONNREFUSED:
	case -EHOSTUNREACH:
	case -EHOSTDOWN:
	case -ENETUNREACH:
	case -ENETDOWN: return false;
	default: return is_transient(rc);
	}
}

static bool is_equal(const struct iov *iov, size_t off, const char *data, size_t len)
{
	for (unsigned i = 0; i < iov->n && len > 0; i++) {
		const struct iovec *v = &iov->v[i];
		size_t n;

		if (off >= v->iov_len) {
			off -= v->iov_len;
			continue;
		}
		n = MIN(len, v->iov_len - off);
		if (memcmp((const char *)v->iov_base + off, data, n) != 0)
			return false;
		data += n;
		len -= n;
		off = 0;
	}
	return len == 0;
}

/* 1 when the object's bytes are those of the put, 0 when not, or -errno. */
static CO_FN int compare_bytes(struct chan *c, const struct put *p)
{
	char *buf = buf_get(COMPARE_PIECE);
	int rc = 1;

	if (!buf)
		return -ENOMEM;
	for (uint64_t at = 0; at < p->iov->len && rc == 1; at += COMPARE_PIECE) {
		uint64_t len = MIN(p->iov->len - at, (uint64_t)COMPARE_PIECE);
		struct iovec v;
		struct iov iov = iov_one(&v, buf, len);

		rc = retry_read(c, (struct ext){ p->obj, at, len }, &iov, 0);
		if (rc == 0)
			rc = is_equal(p->iov, at, buf, len);
	}
	buf_put(buf, COMPARE_PIECE);
	return rc;
}

/*
 * A conditional put was refused with `rc` after one whose end is not known: 0 when the object is what was to be put,
 * else rc, or why it can't be told.
 */
static CO_FN int settle(struct chan *c, const struct put *p, struct obj_stat *st, int rc)
{
	struct obj_stat before, after;
	int found = retry_stat(c, p->obj, &before);

	if (found == -ENOENT || (found == 0 && before.size != p->iov->len))
		return rc;
	if (found == 0)
		found = compare_bytes(c, p);
	if (found == 0 || found == -ENOENT)
		return rc;
	if (found == 1)
		found = retry_stat(c, p->obj, &after);
	if (found == -ENOENT || (found == 0 && strcmp(before.etag, after.etag) != 0))
		return rc; /* changed while it was looked at: not the object that answered */
	if (found == 0 && st)
		*st = after;
	return found;
}

static CO_FN int retry_put(struct chan *c, const struct put *p, struct obj_stat *st)
{
	struct attempts a = begin(c, CH_PUT);
	struct put now = *p;
	bool is_unknown = false;
	int rc;

	for (;;) {
		rc = ch_put(c->kids[0], &now, st);
		if (!again(&a, rc))
			break;
		is_unknown = is_unknown || is_end_unknown(rc);
		now.is_new = false; /* it may be there */
	}
	if (is_unknown && ((rc == -EEXIST && p->cond == PUT_IF_ABSENT) ||
			   (rc == -ESTALE && p->cond == PUT_IF_MATCH)))
		rc = settle(c, p, st, rc);
	return rc;
}

/* --- Life ------------------------------------------------------------------------------------- */

static CO_FN int retry_open(struct layer *l, struct err *err)
{
	struct retry *r = l->self;

	r->what = spec_format(l->spec->kids[0]);
	if (!r->what)
		return err_set(err, -ENOMEM, "out of memory");
	pthread_mutex_init(&r->lock, NULL);
	atomic_store(&r->is_sick, false);
	r->waiting = 0;
	l->caps &= ~(unsigned)CAN_LEND;
	return 0;
}

static CO_FN void retry_close(struct layer *l)
{
	struct retry *r = l->self;

	pthread_mutex_destroy(&r->lock);
	free(r->what);
	r->what = NULL;
}

static CO_FN int retry_chan_open(struct chan *c)
{
	struct retry_chan *rc = c->self;

	rc->random = random_start(); /* other daemons, other pauses */
	return 0;
}

static void retry_status(struct layer *l, struct info *i)
{
	struct retry *r = l->self;
	uint64_t retries, given_up;
	unsigned waiting;
	int last_error;

	pthread_mutex_lock(&r->lock);
	retries = r->retries;
	given_up = r->given_up;
	waiting = r->waiting;
	last_error = r->last_error;
	pthread_mutex_unlock(&r->lock);
	info_number(i, "retries", retries);
	info_number(i, "given_up", given_up);
	info_number(i, "waiting", waiting);
	if (last_error)
		i->add(i, "last_error", err_name(last_error));
}

const struct layer_ops retry_layer = {
	.name = "retry",
	.help = "repeats requests that failed for a reason that may pass",
	.opts = options,
	.self_size = sizeof(struct retry),
	.chan_size = sizeof(struct retry_chan),
	.min_kids = 1,
	.max_kids = 1,
	.open = retry_open,
	.close = retry_close,
	.chan_open = retry_chan_open,
	.read = retry_read,
	.write = retry_write,
	.zero = retry_zero,
	.trim = retry_trim,
	.flush = retry_flush,
	.map = retry_map,
	.stat = retry_stat,
	.put = retry_put,
	.del = retry_del,
	.list = retry_list,
	.status = retry_status,
};
