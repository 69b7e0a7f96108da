/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * sharded: the disk is cut into shards of one size, each an object of the store below.
 *
 *	size		bytes of the disk, decimal
 *	shard-size	bytes of a shard, decimal; absent: 4 MiB
 *	block-N		shard N, from 0; absent: zeroes; short: zeroes behind its end. Where whole objects are put
 *			they end with their last page that is not zero
 *
 * Without `shard-size` this is nbd-rs's format, and volumes of 4 MiB shards are written without it. Other objects
 * are not touched.
 *
 * A map of one bit per shard says which blocks may exist. It is filled by listing the store once, at open, and may
 * only be wrong in one direction: set though there is no object. So reads and trims of what was never written cost no
 * request. Nobody else may write to the volume meanwhile.
 *
 * Two ways to the store:
 *	in place	where parts of objects can be written (files): requests are cut at shard borders and passed
 *			on. A whole shard that is zeroed or trimmed is deleted; that excludes writes to it.
 *	buffered	where objects are replaced as a whole (S3): writes are collected in memory, see shardbuf.c.
 *
 * Promises.
 *	flush	in place: the store's. Buffered: everything answered is put, then the store's flush. An error of a
 *		background put is kept, with its data, and reported by each flush until the data is safe.
 *	FUA	in place: the store's. Buffered: the shards concerned are put.
 *	trim	whole shards are deleted before the answer and read as zeroes. Parts of shards: in place the store's;
 *		buffered, zeroes where the part is in memory already, else nothing.
 *	crash	in place: the store's. Buffered: what was not flushed may be lost, in units of shards, in any order;
 *		never anything that was.
 *	writers	any number of connections of one daemon. There is no lock against other daemons.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/layers.h"
#include "layer/sharded/sharded_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/log.h"

/* Shards of one request that are worked on at a time. */
enum { PARALLEL = 16 };
/* Shards that one map looks into. */
enum { MAP_MAX = 64 };

static const struct opt options[] = {
	{ .name = "size",
	  .type = OPT_SIZE,
	  .field = offsetof(struct sharded, shard_opt),
	  .min = SHARD_SIZE_MIN,
	  .max = SHARD_SIZE_MAX,
	  .help = "bytes of a shard, a power of two; for init (4Mi if absent), later it must agree" },
	{ .name = "dirty",
	  .type = OPT_SIZE,
	  .field = offsetof(struct sharded, dirty_max),
	  .def = "128Mi",
	  .min = 1 << 20,
	  .max = UINT64_C(64) << 30,
	  .help = "memory for what is not stored yet; writers wait at the limit" },
	{ .name = "puts",
	  .type = OPT_UINT,
	  .field = offsetof(struct sharded, puts),
	  .def = "48", /* leaves room for reads: s3 has 64 connections */
	  .min = 1,
	  .max = 256,
	  .help = "shards on their way to the store at a time, of half of dirty in all" },
	{ .name = "age",
	  .type = OPT_TIME_NS,
	  .field = offsetof(struct sharded, age_ns),
	  .def = "5s",
	  .max = UINT64_C(3600000000000),
	  .help = "what is not flushed is put after so long" },
	OPT_END,
};

/* --- Life ------------------------------------------------------------------------------------- */

static CO_FN void sharded_close(struct layer *l)
{
	struct sharded *s = l->self;
	uint64_t lost = shardbuf_free(s->buf);

	if (lost)
		log_error("%s: unsaved data is lost, the store did not take it bytes=%" PRIu64,
			  l->export_name ? l->export_name : "sharded", lost);
	s->buf = NULL;
	if (s->known.words)
		rangelock_destroy(&s->deletes);
	free(s->known.words);
	s->known.words = NULL;
}

static void set_caps(struct layer *l, const struct layer *kid, bool is_buffered)
{
	const unsigned from_kid = CAN_WRITE | CAN_FUA | CAN_FLUSH | CAN_MULTI | CAN_FAST_ZERO |
				  CAN_LEND | IS_ROTATIONAL | IS_REMOTE | IS_VOLATILE;

	l->caps = (kid->caps & from_kid) | CAN_PARTIAL | CAN_TRIM | CAN_ZERO | CAN_MAP | HAS_HOLES;
	l->max_io = MAX(l->max_io, l->pref_io);
	if (is_buffered) {
		l->caps = (l->caps & ~(unsigned)CAN_LEND) | CAN_FUA | CAN_FLUSH | CAN_MULTI |
			  CAN_FAST_ZERO | IS_VOLATILE;
		l->min_io = SHARD_GRAIN;
		l->pref_io = 4096;
	}
	if (l->want_ro)
		l->caps &= ~(unsigned)CAN_WRITE;
}

/* Finds the blocks. */
static CO_FN int fill_map(struct layer *l, struct chan *store, const struct volume *v,
			  struct err *err)
{
	struct sharded *s = l->self;
	struct shard_list list = { .known = &s->known, .shards = v->shards };
	int rc = sharded_list(l, store, &list, err);

	if (!rc && list.behind_n + list.foreign_n)
		log_warn("%s: objects that are not the volume's are left alone behind_end=%" PRIu64
			 " other=%" PRIu64,
			 l->export_name ? l->export_name : "sharded", list.behind_n,
			 list.foreign_n);
	return rc;
}

static int make_buffer(struct layer *l, const struct volume *v, struct err *err)
{
	struct sharded *s = l->self;
	const struct shardbuf_conf conf = {
		.name = l->export_name ? l->export_name : "sharded",
		.shard_size = v->shard_size,
		.disk_size = v->size,
		.dirty_max = s->dirty_max,
		.age_ns = s->age_ns,
		.puts = (unsigned)s->puts,
		.known = &s->known,
	};
	int rc = shardbuf_new(&conf, &s->buf);

	return rc ? err_set(err, rc, "out of memory") : 0;
}

static CO_FN int sharded_open(struct layer *l, struct err *err)
{
	struct sharded *s = l->self;
	const struct layer *kid = l->kids[0];
	struct chan *store = NULL;
	struct volume v;
	int rc = sharded_check_option(l, err);

	if (rc)
		return rc;
	rc = layer_chan_open(l->kids[0], &store);
	if (rc)
		return err_set(err, rc, "layer sharded: no channel to the store: %s", err_name(rc));
	rc = sharded_read_volume(l, store, &v, err);
	if (!rc) {
		s->shift = (unsigned)__builtin_ctzll(v.shard_size);
		s->known.n = v.shards;
		s->known.words = calloc(bits_words(v.shards), sizeof(*s->known.words));
		if (!s->known.words)
			rc = err_set(err, -ENOMEM, "out of memory");
		else
			rangelock_init(&s->deletes);
	}
	if (!rc)
		rc = fill_map(l, store, &v, err);
	layer_chan_close(store);
	if (!rc && (kid->caps & CAN_WRITE) && !(kid->caps & CAN_PARTIAL) && !l->want_ro)
		rc = make_buffer(l, &v, err);
	if (rc) {
		sharded_close(l);
		return rc;
	}
	l->size = v.size;
	set_caps(l, kid, s->buf != NULL);
	return 0;
}

static CO_FN int sharded_chan_open(struct chan *c)
{
	struct sharded *s = c->layer->self;

	if (s->buf)
		shardbuf_enter(c->self, s->buf, c->kids[0]);
	return 0;
}

static CO_FN void sharded_chan_close(struct chan *c)
{
	struct sharded *s = c->layer->self;

	if (s->buf)
		shardbuf_leave(c->self);
}

/* --- Cutting requests into shards ------------------------------------------------------------- */

static struct piece piece_at(const struct layer *l, uint64_t at, uint64_t end)
{
	const struct sharded *s = l->self;
	const uint64_t size = UINT64_C(1) << s->shift;
	struct piece p = { .n = at >> s->shift, .off = at & (size - 1) };

	p.len = MIN(size - p.off, end - at);
	return p;
}

static CO_FN void take_pieces(void *arg)
{
	struct request *r = arg;
	const uint64_t end = r->e.off + r->e.len;

	while (r->next < end && !r->rc) {
		const uint64_t at = r->next;
		const struct piece p = piece_at(r->c->layer, at, end);
		struct iovec store[IOV_SLICE_MAX];
		struct iov part = { 0 };
		int rc;

		r->next += p.len;
		if (r->iov)
			part = iov_slice(r->iov, at - r->e.off, p.len, store, IOV_SLICE_MAX);
		rc = r->one(r, &p, &part);
		if (rc && !r->rc)
			r->rc = rc;
	}
}

/* Calls r->one for each shard, for several at a time. */
static CO_FN int by_shard(struct request *r)
{
	const struct sharded *s = r->c->layer->self;
	const uint64_t last = (r->e.off + r->e.len - 1) >> s->shift;
	const uint64_t shards = last - (r->e.off >> s->shift) + 1;
	struct co_group g = CO_GROUP_INIT;

	if (shards == 1) {
		const struct piece p = piece_at(r->c->layer, r->e.off, r->e.off + r->e.len);

		return r->one(r, &p, r->iov);
	}
	r->next = r->e.off;
	for (uint64_t i = 1; i < MIN(shards, (uint64_t)PARALLEL); i++)
		co_group_spawn(&g, take_pieces, r);
	take_pieces(r);
	co_group_wait(&g);
	return r->rc;
}

/* --- Buffered --------------------------------------------------------------------------------- */

static CO_FN int buffer_read(struct request *r, const struct piece *p, const struct iov *iov)
{
	return shardbuf_read(r->c->self, p->n, p->off, iov);
}

/* After a change: on the way to the store, if that is asked for. */
static CO_FN int saved(struct request *r, const struct piece *p, int rc)
{
	return rc || !(r->fl & IO_FUA) ? rc : shardbuf_save(r->c->self, p->n);
}

static CO_FN int buffer_write(struct request *r, const struct piece *p, const struct iov *iov)
{
	return saved(r, p, shardbuf_write(r->c->self, p->n, p->off, iov));
}

static CO_FN int buffer_zero(struct request *r, const struct piece *p, const struct iov *iov)
{
	return saved(r, p, shardbuf_zero(r->c->self, p->n, p->off, p->len));
}

static CO_FN int buffer_trim(struct request *r, const struct piece *p, const struct iov *iov)
{
	return saved(r, p, shardbuf_trim(r->c->self, p->n, p->off, p->len));
}

/* --- Requests --------------------------------------------------------------------------------- */

static CO_FN int sharded_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	const struct sharded *s = c->layer->self;
	struct request r = { .c = c, .e = e, .iov = iov, .fl = fl };

	r.one = s->buf ? buffer_read : place_read;
	return by_shard(&r);
}

/* What makes puts and deletes stable in the store, where it has such a thing. */
static CO_FN int flush_store(struct chan *c, unsigned fl)
{
	return fl & IO_FUA && c->kids[0]->layer->caps & CAN_FLUSH ? ch_flush(c->kids[0]) : 0;
}

static CO_FN int sharded_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	const struct sharded *s = c->layer->self;
	struct request r = { .c = c, .e = e, .iov = iov, .fl = fl };
	int rc;

	r.one = s->buf ? buffer_write : place_write;
	rc = by_shard(&r);
	return !rc && s->buf ? flush_store(c, fl) : rc;
}

/*
 * Calls `one` for the parts of shards at the ends of `e`, and `drop` for the whole shards between them: in this
 * order, so that -ENOTSUP (IO_FAST) of the first comes before anything was changed.
 */
static CO_FN int cut_off(struct chan *c, struct ext e, unsigned fl,
			 CO_FN int (*one)(struct request *r, const struct piece *p,
					  const struct iov *iov))
{
	const struct sharded *s = c->layer->self;
	const uint64_t size = UINT64_C(1) << s->shift, end = e.off + e.len;
	uint64_t first = (e.off + size - 1) >> s->shift;
	uint64_t last = end >= c->layer->size ? s->known.n : end >> s->shift;
	struct request r = { .c = c, .fl = fl, .one = one };
	int rc = 0;

	if (first >= last) { /* no whole shard */
		r.e = e;
		return by_shard(&r);
	}
	if (first << s->shift > e.off) {
		r.e = (struct ext){ e.obj, e.off, (first << s->shift) - e.off };
		rc = by_shard(&r);
		r.fl &= ~(unsigned)IO_FAST; /* what is begun is ended */
	}
	if (!rc && last << s->shift < end) {
		r.e = (struct ext){ e.obj, last << s->shift, end - (last << s->shift) };
		rc = by_shard(&r);
	}
	if (rc)
		return rc;
	return s->buf ? shardbuf_drop(c->self, first, last) : place_drop(c, first, last);
}

/* Shards whose space must stay are zeroed one after the other: the first says whether that is fast. */
static CO_FN int zero_in_place(struct chan *c, struct ext e, unsigned fl)
{
	struct request r = { .c = c, .fl = fl, .one = place_zero };
	const struct piece p = piece_at(c->layer, e.off, e.off + e.len);
	int rc;

	r.e = (struct ext){ e.obj, e.off, p.len };
	rc = by_shard(&r);
	if (rc || p.len == e.len)
		return rc;
	r.fl &= ~(unsigned)IO_FAST;
	r.e = (struct ext){ e.obj, e.off + p.len, e.len - p.len };
	return by_shard(&r);
}

static CO_FN int sharded_zero(struct chan *c, struct ext e, unsigned fl)
{
	const struct sharded *s = c->layer->self;
	int rc;

	if (s->buf) /* nothing to reserve: every put takes new space */
		rc = cut_off(c, e, fl, buffer_zero);
	else if (fl & IO_PUNCH)
		rc = cut_off(c, e, fl, place_zero);
	else
		return zero_in_place(c, e, fl);
	return rc ? rc : flush_store(c, fl);
}

static CO_FN int sharded_trim(struct chan *c, struct ext e, unsigned fl)
{
	const struct sharded *s = c->layer->self;
	int rc = cut_off(c, e, fl, s->buf ? buffer_trim : place_trim);

	return rc ? rc : flush_store(c, fl);
}

static CO_FN int sharded_flush(struct chan *c)
{
	const struct sharded *s = c->layer->self;
	int rc = s->buf ? shardbuf_flush(c->self) : 0;
	int store_rc = ch_flush(c->kids[0]);

	return rc ? rc : store_rc;
}

static CO_FN int sharded_map(struct chan *c, struct ext e, struct extmap *m)
{
	const struct sharded *s = c->layer->self;
	const bool can_look = !s->buf && c->kids[0]->layer->caps & CAN_MAP;
	const uint64_t end = e.off + e.len;
	unsigned looks = 0;
	uint64_t at = e.off;

	while (at < end) {
		const uint64_t n = at >> s->shift, last = ((end - 1) >> s->shift) + 1;
		const bool is_data = shardmap_test(&s->known, n);
		const struct piece p = piece_at(c->layer, at, end);
		uint64_t to, step;
		int rc = 0;

		if (is_data && can_look) {
			if (looks++ == MAP_MAX)
				break; /* the rest at the next call */
			step = place_map(c, &p, m, &rc);
		} else {
			/* This one by the first look: its bit may have changed since. */
			to = shardmap_find(&s->known, n + 1, last, !is_data) << s->shift;
			step = MIN(to, end) - at;
			if (!extmap_add(m, step, is_data ? 0 : EXTENT_HOLE | EXTENT_ZERO))
				break;
		}
		if (rc)
			return rc;
		if (!step)
			break;
		at += step;
	}
	return 0;
}

static CO_FN int sharded_cache(struct chan *c, struct ext e)
{
	const struct sharded *s = c->layer->self;
	struct request r = { .c = c, .e = e, .one = place_cache };

	return s->buf ? 0 : by_shard(&r);
}

static int sharded_lend(struct chan *c, struct ext e, struct loan *loan)
{
	const struct sharded *s = c->layer->self;
	const struct piece p = piece_at(c->layer, e.off, e.off + e.len);
	struct obj obj;

	if (s->buf || p.len != e.len || !shardmap_test(&s->known, p.n))
		return -EAGAIN;
	shard_obj(&obj, p.n);
	return ch_lend(c->kids[0], (struct ext){ &obj, p.off, p.len }, loan);
}

/* --- Looking at it ---------------------------------------------------------------------------- */

static void add_size(struct info *i, const char *key, uint64_t bytes)
{
	char size[32], text[80];

	format_size(bytes, size, sizeof(size));
	(void)snprintf(text, sizeof(text), "%s (%" PRIu64 " bytes)", size, bytes);
	i->add(i, key, text);
}

static CO_FN void sharded_info(struct layer *l, struct info *i)
{
	const struct sharded *s = l->self;
	struct shard_list list = { .shards = s->known.n };
	struct chan *store = NULL;
	struct err err;

	if (!s->known.words)
		return; /* not open */
	add_size(i, "shard size", UINT64_C(1) << s->shift);
	info_number(i, "shards", s->known.n);
	if (layer_chan_open(l->kids[0], &store))
		return;
	if (!sharded_list(l, store, &list, &err)) {
		info_number(i, "objects", list.blocks_n);
		add_size(i, "bytes used", list.bytes);
		if (list.behind_n)
			info_number(i, "behind the end", list.behind_n);
	}
	layer_chan_close(store);
}

static void sharded_status(struct layer *l, struct info *i)
{
	const struct sharded *s = l->self;
	struct shardbuf_view v;

	info_number(i, "shard_size", UINT64_C(1) << s->shift);
	info_number(i, "shards", s->known.n);
	info_number(i, "known_shards", shardmap_count(&s->known));
	if (!s->buf)
		return;
	shardbuf_view(s->buf, &v);
	info_number(i, "dirty_bytes", v.dirty_bytes);
	info_number(i, "dirty_shards", v.dirty_shards);
	info_number(i, "puts_in_flight", v.puts_running);
	info_number(i, "bytes_in_flight", v.flying);
	info_number(i, "puts", v.puts_done);
	info_number(i, "failures", v.failures);
	if (v.error)
		i->add(i, "error", err_name(v.error));
}

const struct layer_ops sharded_layer = {
	.name = "sharded",
	.help = "the disk is cut into objects of the store below, 4 MiB each",
	.opts = options,
	.keyed_kids = true,
	.self_size = sizeof(struct sharded),
	.chan_size = sizeof(struct shard_user),
	.min_kids = 1,
	.max_kids = 1,
	.open = sharded_open,
	.close = sharded_close,
	.chan_open = sharded_chan_open,
	.chan_close = sharded_chan_close,
	.read = sharded_read,
	.write = sharded_write,
	.zero = sharded_zero,
	.trim = sharded_trim,
	.flush = sharded_flush,
	.map = sharded_map,
	.cache = sharded_cache,
	.lend = sharded_lend,
	.create = sharded_create,
	.destroy = sharded_destroy,
	.resize = sharded_resize,
	.info = sharded_info,
	.status = sharded_status,
};
