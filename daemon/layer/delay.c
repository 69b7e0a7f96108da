/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * delay: every request waits before it goes on. For trying out how clients and other layers bear a slow
 * store; many requests wait at the same time, so this adds latency, not a limit of bandwidth.
 *
 * Promises: those of the layer below. A request is passed on unchanged after its wait; requests that
 * overtake each other here were not ordered by the client either. A flush covers what was answered before
 * it came, because that has reached the layer below already.
 *
 * Of objects: stat and list wait as long as reads, put as writes, del as trim.
 *
 * Lending is not passed on: a loan can't wait.
 */
#include "layer/layers.h"
#include "nbdrs/reactor.h"

#define DELAY_MAX_NS UINT64_C(3600000000000)

struct delay {
	uint64_t read, write, zero, trim, flush, jitter; /* ns */
	uint64_t count;
	_Atomic uint64_t waited; /* requests, of all channels; relaxed, it orders nothing else */
};

/* The state of the channel's random numbers. */
struct delay_chan {
	uint64_t random;
};

#define TIME_OPT(field_, help_)                                                                \
	{                                                                                      \
		.name = #field_, .type = OPT_TIME_NS, .field = offsetof(struct delay, field_), \
		.def = "0s", .max = DELAY_MAX_NS, .help = help_                                \
	}

static const struct opt options[] = {
	TIME_OPT(read, "wait before a read, stat or list"),
	TIME_OPT(write, "wait before a write or put"),
	TIME_OPT(zero, "wait before zeroing"),
	TIME_OPT(trim, "wait before a trim or del"),
	TIME_OPT(flush, "wait before a flush"),
	TIME_OPT(jitter, "up to this much more for each request that waits, evenly spread"),
	{ .name = "count",
	  .type = OPT_UINT,
	  .field = offsetof(struct delay, count),
	  .def = "0",
	  .help = "only the first so many requests wait, 0 = all" },
	OPT_END,
};

static CO_FN int delay_open(struct layer *l, struct err *err)
{
	l->caps &= ~(unsigned)CAN_LEND;
	return 0;
}

static CO_FN int delay_chan_open(struct chan *c)
{
	struct delay_chan *dc = c->self;

	dc->random = random_start();
	return 0;
}

/* splitmix64 (Steele, Lea, Flood 2014). */
static uint64_t next_random(uint64_t *state)
{
	uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
	return z ^ z >> 31;
}

static CO_FN void nap(struct chan *c, uint64_t ns)
{
	struct delay *d = c->layer->self;
	struct delay_chan *dc = c->self;

	if (!ns || (d->count && atomic_fetch_add_explicit(&d->waited, 1, memory_order_relaxed) >= d->count))
		return;
	if (d->jitter)
		ns += next_random(&dc->random) % (d->jitter + 1);
	co_sleep(ns);
}

static CO_FN int delay_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	const struct delay *d = c->layer->self;

	nap(c, d->read);
	return ch_read(c->kids[0], e, iov, fl);
}

static CO_FN int delay_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	const struct delay *d = c->layer->self;

	nap(c, d->write);
	return ch_write(c->kids[0], e, iov, fl);
}

static CO_FN int delay_zero(struct chan *c, struct ext e, unsigned fl)
{
	const struct delay *d = c->layer->self;

	nap(c, d->zero);
	return ch_zero(c->kids[0], e, fl);
}

static CO_FN int delay_trim(struct chan *c, struct ext e, unsigned fl)
{
	const struct delay *d = c->layer->self;

	nap(c, d->trim);
	return ch_trim(c->kids[0], e, fl);
}

static CO_FN int delay_flush(struct chan *c)
{
	const struct delay *d = c->layer->self;

	nap(c, d->flush);
	return ch_flush(c->kids[0]);
}

static CO_FN int delay_stat(struct chan *c, const struct obj *obj, struct obj_stat *st)
{
	const struct delay *d = c->layer->self;

	nap(c, d->read);
	return ch_stat(c->kids[0], obj, st);
}

static CO_FN int delay_put(struct chan *c, const struct put *p, struct obj_stat *st)
{
	const struct delay *d = c->layer->self;

	nap(c, d->write);
	return ch_put(c->kids[0], p, st);
}

static CO_FN int delay_del(struct chan *c, const struct obj *objs, unsigned n)
{
	const struct delay *d = c->layer->self;

	nap(c, d->trim);
	return ch_del(c->kids[0], objs, n);
}

static CO_FN int delay_list(struct chan *c, const char *prefix, list_fn *fn, void *arg)
{
	const struct delay *d = c->layer->self;

	nap(c, d->read);
	return ch_list(c->kids[0], prefix, fn, arg);
}

const struct layer_ops delay_layer = {
	.name = "delay",
	.help = "makes every request wait; for tests",
	.opts = options,
	.self_size = sizeof(struct delay),
	.chan_size = sizeof(struct delay_chan),
	.min_kids = 1,
	.max_kids = 1,
	.open = delay_open,
	.chan_open = delay_chan_open,
	.read = delay_read,
	.write = delay_write,
	.zero = delay_zero,
	.trim = delay_trim,
	.flush = delay_flush,
	.stat = delay_stat,
	.put = delay_put,
	.del = delay_del,
	.list = delay_list,
};
