/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Requests on their way down: ch_*() count, bring the request into the shape that the layer takes, and call
 * its operation or fall through to kid 0. Building and opening chains is in chain.c.
 *
 * Shapes (so that no layer has to care):
 *	- larger than max_io: split;
 *	- not a multiple of min_io: padded, by read-modify-write under a range lock. Aligned writes then take the
 *	  lock too, shared among themselves, so that a padded write never puts old bytes over theirs;
 *	- zero where the chain cannot: written as zeroes, in pieces.
 */
#include "nbdrs/layer.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nbdrs/buf.h"
#include "nbdrs/counter.h"

const struct obj obj_none = { 0 };

int obj_set(struct obj *o, const char *name)
{
	size_t len = strlen(name);

	if (len > OBJ_NAME_MAX)
		return -ENAMETOOLONG;
	if (len == 0 || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
		return -EINVAL;
	for (size_t i = 0; i < len; i++)
		if ((unsigned char)name[i] < 0x20 || name[i] == '/' || name[i] == 0x7f)
			return -EINVAL;
	memset(o, 0, sizeof(*o));
	memcpy(o->name, name, len + 1);
	o->len = (uint16_t)len;
	/* FNV-1a, 64 bits: names are short, and the hash is only ever compared beside the name. */
	o->hash = 0xcbf29ce484222325;
	for (size_t i = 0; i < len; i++)
		o->hash = (o->hash ^ (unsigned char)name[i]) * 0x100000001b3;
	return 0;
}

bool extmap_add(struct extmap *m, uint64_t len, uint32_t flags)
{
	if (m->n > 0 && m->v[m->n - 1].flags == flags) {
		m->v[m->n - 1].len += len;
		return true;
	}
	if (m->n == m->max)
		return false;
	m->v[m->n++] = (struct extent){ len, flags };
	return true;
}

const char *const ch_op_names[CH_OPS] = {
	[CH_READ] = "read",   [CH_WRITE] = "write", [CH_ZERO] = "zero", [CH_TRIM] = "trim",
	[CH_FLUSH] = "flush", [CH_MAP] = "map",	    [CH_CACHE] = "cache", [CH_STAT] = "stat",
	[CH_PUT] = "put",     [CH_DEL] = "del",	    [CH_LIST] = "list",
};

void info_number(struct info *i, const char *key, uint64_t value)
{
	char text[24];

	(void)snprintf(text, sizeof(text), "%" PRIu64, value);
	i->add(i, key, text);
}

static int counted(struct chan *c, enum ch_op op, uint64_t bytes, int rc)
{
	counter_add(&c->stats.ops[op], 1);
	if (rc == 0)
		counter_add(&c->stats.bytes[op], bytes);
	else if (rc != -ENOTSUP)
		counter_add(&c->stats.errors[op], 1);
	return rc;
}

static struct ext part(struct ext e, uint64_t done, uint64_t len)
{
	return (struct ext){ e.obj, e.off + done, len };
}

static bool is_aligned(struct ext e, uint32_t to)
{
	return ((e.off | e.len) & (to - 1)) == 0;
}

/* ---- read ---- */

static CO_FN int read_padded(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	uint32_t to = c->layer->min_io;
	uint64_t start = align_down(e.off, to);
	uint64_t len = align_up(e.off + e.len, to) - start;
	struct iovec v;
	struct iov all;
	void *buf;
	int rc;

	buf = buf_get(len);
	if (buf == NULL)
		return -ENOMEM;
	all = iov_one(&v, buf, len);
	rc = c->layer->ops->read(c, (struct ext){ e.obj, start, len }, &all, fl);
	if (rc == 0)
		(void)iov_copy_in(iov, 0, (char *)buf + (e.off - start), e.len);
	buf_put(buf, len);
	return rc;
}

static CO_FN int read_shaped(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	const struct layer *l = c->layer;

	if (likely(e.len <= l->max_io)) {
		if (likely(is_aligned(e, l->min_io)))
			return l->ops->read(c, e, iov, fl);
		if (e.len + 2ULL * l->min_io <= BUF_MAX)
			return read_padded(c, e, iov, fl);
	}
	for (uint64_t done = 0; done < e.len;) {
		/* End pieces at multiples of max_io, so that at most the first and last are padded. */
		uint64_t at = e.off + done;
		uint64_t len = MIN(align_down(at, l->max_io) + l->max_io - at, e.len - done);
		struct iovec store[IOV_SLICE_MAX];
		struct iov piece = iov_slice(iov, done, len, store, IOV_SLICE_MAX);
		struct ext pe = part(e, done, len);
		int rc = is_aligned(pe, l->min_io) ? l->ops->read(c, pe, &piece, fl) :
						     read_padded(c, pe, &piece, fl);

		if (rc != 0)
			return rc;
		done += len;
	}
	return 0;
}

int ch_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	int rc;

	assert(iov->len == e.len);
	if (c->layer->ops->read == NULL)
		rc = ch_read(c->kids[0], e, iov, fl);
	else
		rc = read_shaped(c, e, iov, fl);
	return counted(c, CH_READ, e.len, rc);
}

int ch_lend(struct chan *c, struct ext e, struct loan *loan)
{
	const struct layer_ops *ops = c->layer->ops;
	int rc;

	if (!(c->layer->caps & CAN_LEND))
		return -ENOTSUP;
	if (ops->lend != NULL)
		rc = ops->lend(c, e, loan);
	else if (ops->read == NULL)
		rc = ch_lend(c->kids[0], e, loan);
	else
		return -ENOTSUP;
	if (rc == 0) {
		counter_add(&c->stats.lent, 1);
		(void)counted(c, CH_READ, e.len, 0);
	}
	return rc;
}

/* ---- write ---- */

/* Reads the block at `at` into buf unless [from, to) covers it wholly. */
static CO_FN int fill_edge(struct chan *c, struct ext e, uint64_t at, char *buf)
{
	uint32_t min = c->layer->min_io;
	struct iovec v;
	struct iov one = iov_one(&v, buf, min);

	if (e.off <= at && at + min <= e.off + e.len)
		return 0;
	return c->layer->ops->read(c, (struct ext){ e.obj, at, min }, &one, 0);
}

/* The caller holds the range exclusively. */
static CO_FN int write_padded(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	uint32_t to = c->layer->min_io;
	uint64_t start = align_down(e.off, to);
	uint64_t len = align_up(e.off + e.len, to) - start;
	uint64_t last = start + len - to;
	char *buf = buf_get(len);
	struct iovec v;
	struct iov all;
	int rc;

	if (buf == NULL)
		return -ENOMEM;
	rc = fill_edge(c, e, start, buf);
	if (rc == 0 && last != start)
		rc = fill_edge(c, e, last, buf + (last - start));
	if (rc == 0) {
		(void)iov_copy_out(iov, 0, buf + (e.off - start), e.len);
		all = iov_one(&v, buf, len);
		rc = c->layer->ops->write(c, (struct ext){ e.obj, start, len }, &all, fl);
	}
	buf_put(buf, len);
	return rc;
}

static CO_FN int write_piece(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	struct layer *l = c->layer;
	struct range_hold hold;
	bool aligned;
	uint64_t start;
	int rc;

	if (l->min_io == 1)
		return l->ops->write(c, e, iov, fl);
	aligned = is_aligned(e, l->min_io);
	start = align_down(e.off, l->min_io);
	rangelock_lock(&l->rmw, &hold, e.obj->hash, start, align_up(e.off + e.len, l->min_io) - start,
		       aligned);
	rc = aligned ? l->ops->write(c, e, iov, fl) : write_padded(c, e, iov, fl);
	rangelock_unlock(&l->rmw, &hold);
	return rc;
}

static CO_FN int write_shaped(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	const struct layer *l = c->layer;

	if (likely(e.len <= l->max_io && (l->min_io == 1 || e.len + 2ULL * l->min_io <= BUF_MAX)))
		return write_piece(c, e, iov, fl);
	for (uint64_t done = 0; done < e.len;) {
		uint64_t at = e.off + done;
		uint64_t len = MIN(align_down(at, l->max_io) + l->max_io - at, e.len - done);
		struct iovec store[IOV_SLICE_MAX];
		struct iov piece = iov_slice(iov, done, len, store, IOV_SLICE_MAX);
		int rc = write_piece(c, part(e, done, len), &piece, fl);

		if (rc != 0)
			return rc;
		done += len;
	}
	return 0;
}

/* Writes, with FUA by a flush where the layer has no better. */
static CO_FN int write_or_flush(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	bool by_flush = (fl & IO_FUA) && !(c->layer->caps & CAN_FUA);
	int rc = write_shaped(c, e, iov, by_flush ? fl & ~(unsigned)IO_FUA : fl);

	if (rc == 0 && by_flush)
		rc = ch_flush(c);
	return rc;
}

int ch_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	int rc;

	assert(iov->len == e.len);
	if (c->layer->ops->write == NULL && c->layer->kids_n > 0)
		rc = ch_write(c->kids[0], e, iov, fl);
	else if (!(c->layer->caps & CAN_WRITE))
		rc = -EROFS;
	else
		rc = write_or_flush(c, e, iov, fl);
	return counted(c, CH_WRITE, e.len, rc);
}

/* ---- zero and trim ---- */

enum { ZERO_PIECE = 1 << 20 };

/* Not const: that would put a megabyte of zeroes into the binary. Nobody writes to it. */
static char zeroes[ZERO_PIECE];

static CO_FN int zero_by_write(struct chan *c, struct ext e, unsigned fl)
{
	for (uint64_t done = 0; done < e.len;) {
		uint64_t at = e.off + done;
		uint64_t len = MIN(align_down(at, ZERO_PIECE) + ZERO_PIECE - at, e.len - done);
		bool is_last = done + len == e.len;
		struct iovec v;
		struct iov iov = iov_one(&v, zeroes, len);
		int rc;

		/* A flush covers all before it, and so does FUA by flush; a real FUA covers one piece. */
		rc = ch_write(c, part(e, done, len), &iov,
			      (c->layer->caps & CAN_FUA) || is_last ? fl & IO_FUA : 0);
		if (rc != 0)
			return rc;
		done += len;
		co_yield(); /* 4 GiB of zeroes must not keep the others waiting */
	}
	return 0;
}

/*
 * The aligned middle by the layer's own zero, the edges by writing. -ENOTSUP of the layer (its medium
 * turned out not to be able) means: write, unless the caller wants fast or nothing.
 */
static CO_FN int zero_shaped(struct chan *c, struct ext e, unsigned fl)
{
	struct layer *l = c->layer;
	uint64_t start = align_up(e.off, l->min_io);
	uint64_t end = align_down(e.off + e.len, l->min_io);
	struct range_hold hold;
	int rc;

	if (start >= end)
		return fl & IO_FAST ? -ENOTSUP : zero_by_write(c, e, fl);
	if ((fl & IO_FAST) && (start != e.off || end != e.off + e.len) && l->min_io > 4096)
		return -ENOTSUP;
	if (l->min_io > 1)
		rangelock_lock(&l->rmw, &hold, e.obj->hash, start, end - start, true);
	rc = l->ops->zero(c, (struct ext){ e.obj, start, end - start }, fl);
	if (l->min_io > 1)
		rangelock_unlock(&l->rmw, &hold);
	if (rc == -ENOTSUP && !(fl & IO_FAST))
		return zero_by_write(c, e, fl);
	if (rc == 0 && start > e.off)
		rc = zero_by_write(c, (struct ext){ e.obj, e.off, start - e.off }, fl);
	if (rc == 0 && end < e.off + e.len)
		rc = zero_by_write(c, (struct ext){ e.obj, end, e.off + e.len - end }, fl);
	return rc;
}

static CO_FN int zero_or_flush(struct chan *c, struct ext e, unsigned fl)
{
	bool by_flush = (fl & IO_FUA) && !(c->layer->caps & CAN_FUA);
	int rc = zero_shaped(c, e, by_flush ? fl & ~(unsigned)IO_FUA : fl);

	if (rc == 0 && by_flush)
		rc = ch_flush(c);
	return rc;
}

int ch_zero(struct chan *c, struct ext e, unsigned fl)
{
	const struct layer *l = c->layer;
	int rc;

	if (l->ops->zero == NULL && l->ops->write == NULL && l->kids_n > 0)
		rc = ch_zero(c->kids[0], e, fl);
	else if (!(l->caps & CAN_WRITE))
		rc = -EROFS;
	else if (l->ops->zero == NULL || !(l->caps & CAN_ZERO))
		rc = fl & IO_FAST ? -ENOTSUP : zero_by_write(c, e, fl);
	else
		rc = zero_or_flush(c, e, fl);
	return counted(c, CH_ZERO, e.len, rc);
}

/* Trim is advice: only whole min_io blocks are passed on, and a layer without it does nothing. */
static CO_FN int trim_shaped(struct chan *c, struct ext e, unsigned fl)
{
	struct layer *l = c->layer;
	bool by_flush = (fl & IO_FUA) && !(l->caps & CAN_FUA);
	uint64_t start = align_up(e.off, l->min_io);
	uint64_t end = align_down(e.off + e.len, l->min_io);
	int rc = 0;

	if (l->ops->trim != NULL && l->caps & CAN_TRIM && start < end) {
		struct range_hold hold;

		if (l->min_io > 1)
			rangelock_lock(&l->rmw, &hold, e.obj->hash, start, end - start, true);
		rc = l->ops->trim(c, (struct ext){ e.obj, start, end - start },
				  by_flush ? fl & ~(unsigned)IO_FUA : fl);
		if (l->min_io > 1)
			rangelock_unlock(&l->rmw, &hold);
	}
	if (rc == 0 && by_flush)
		rc = ch_flush(c);
	return rc;
}

int ch_trim(struct chan *c, struct ext e, unsigned fl)
{
	const struct layer *l = c->layer;
	int rc;

	if (l->ops->trim == NULL && l->kids_n > 0)
		rc = ch_trim(c->kids[0], e, fl);
	else if (!(l->caps & CAN_WRITE))
		rc = -EROFS;
	else
		rc = trim_shaped(c, e, fl);
	return counted(c, CH_TRIM, e.len, rc);
}

/* ---- the rest ---- */

int ch_flush(struct chan *c)
{
	const struct layer_ops *ops = c->layer->ops;
	int rc = 0;

	if (ops->flush != NULL)
		rc = ops->flush(c);
	else if (c->layer->kids_n > 0)
		rc = ch_flush(c->kids[0]);
	return counted(c, CH_FLUSH, 0, rc);
}

int ch_map(struct chan *c, struct ext e, struct extmap *m)
{
	const struct layer *l = c->layer;
	int rc = 0;

	if (l->caps & CAN_MAP && l->ops->map != NULL)
		rc = l->ops->map(c, e, m);
	else if (l->caps & CAN_MAP && l->kids_n > 0)
		rc = ch_map(c->kids[0], e, m);
	else
		(void)extmap_add(m, e.len, 0);
	return counted(c, CH_MAP, e.len, rc);
}

int ch_cache(struct chan *c, struct ext e)
{
	int rc = 0;

	if (c->layer->ops->cache != NULL)
		rc = c->layer->ops->cache(c, e);
	else if (c->layer->kids_n > 0)
		rc = ch_cache(c->kids[0], e);
	return counted(c, CH_CACHE, e.len, rc);
}

/* ---- objects ---- */

int ch_stat(struct chan *c, const struct obj *obj, struct obj_stat *st)
{
	int rc = -ENOTSUP;

	if (c->layer->ops->stat != NULL)
		rc = c->layer->ops->stat(c, obj, st);
	else if (c->layer->kids_n > 0)
		rc = ch_stat(c->kids[0], obj, st);
	return counted(c, CH_STAT, 0, rc);
}

int ch_put(struct chan *c, const struct put *p, struct obj_stat *st)
{
	int rc = -ENOTSUP;

	if (!(c->layer->caps & CAN_WRITE))
		rc = -EROFS;
	else if (c->layer->ops->put != NULL)
		rc = c->layer->ops->put(c, p, st);
	else if (c->layer->kids_n > 0)
		rc = ch_put(c->kids[0], p, st);
	return counted(c, CH_PUT, p->iov->len, rc);
}

int ch_del(struct chan *c, const struct obj *objs, unsigned n)
{
	int rc = -ENOTSUP;

	if (!(c->layer->caps & CAN_WRITE))
		rc = -EROFS;
	else if (c->layer->ops->del != NULL)
		rc = c->layer->ops->del(c, objs, n);
	else if (c->layer->kids_n > 0)
		rc = ch_del(c->kids[0], objs, n);
	return counted(c, CH_DEL, 0, rc);
}

int ch_list(struct chan *c, const char *prefix, list_fn *fn, void *arg)
{
	int rc = -ENOTSUP;

	if (c->layer->ops->list != NULL)
		rc = c->layer->ops->list(c, prefix, fn, arg);
	else if (c->layer->kids_n > 0)
		rc = ch_list(c->kids[0], prefix, fn, arg);
	return counted(c, CH_LIST, 0, rc);
}

bool is_transient(int rc)
{
	switch (rc) {
	case -EAGAIN:
	case -ETIMEDOUT:
	case -ECONNRESET:
	case -ECONNREFUSED:
	case -ECONNABORTED:
	case -EPIPE:
	case -EHOSTUNREACH:
	case -EHOSTDOWN:
	case -ENETUNREACH:
	case -ENETDOWN:
	case -EBUSY:
	case -EPROTO: /* what came makes no sense: cut off or altered on its way */
		return true;
	default:
		return false;
	}
}
