/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * sharded on stores that write parts of objects: requests go straight through. A rangelock over shard numbers makes
 * deletes of shards and writes to them exclude each other; reads need none, for a shard that goes away reads as zeroes.
 *
 * The map's bit of a shard is set before the first write and cleared after the delete, both under that lock.
 */
#include <errno.h>
#include <stdlib.h>

#include "layer/sharded/sharded_int.h"
#include "nbdrs/cleanup.h"

int place_read(struct request *r, const struct piece *p, const struct iov *iov)
{
	const struct sharded *s = r->c->layer->self;
	struct obj obj;
	int rc = -ENOENT;

	if (shardmap_test(&s->known, p->n)) {
		shard_obj(&obj, p->n);
		rc = ch_read(r->c->kids[0], (struct ext){ &obj, p->off, p->len }, iov, r->fl);
	}
	if (rc != -ENOENT)
		return rc;
	iov_zero(iov, 0, iov->len);
	return 0;
}

int place_write(struct request *r, const struct piece *p, const struct iov *iov)
{
	struct sharded *s = r->c->layer->self;
	struct range_hold hold;
	struct obj obj;
	int rc;

	shard_obj(&obj, p->n);
	rangelock_lock(&s->deletes, &hold, 0, p->n, 1, true);
	shardmap_set(&s->known, p->n);
	rc = ch_write(r->c->kids[0], (struct ext){ &obj, p->off, p->len }, iov, r->fl);
	rangelock_unlock(&s->deletes, &hold);
	return rc;
}

int place_zero(struct request *r, const struct piece *p, const struct iov *iov)
{
	struct sharded *s = r->c->layer->self;
	struct range_hold hold;
	struct obj obj;
	int rc;

	if ((r->fl & IO_PUNCH) && !shardmap_test(&s->known, p->n))
		return 0;
	shard_obj(&obj, p->n);
	rangelock_lock(&s->deletes, &hold, 0, p->n, 1, true);
	shardmap_set(&s->known, p->n);
	rc = ch_zero(r->c->kids[0], (struct ext){ &obj, p->off, p->len }, r->fl);
	rangelock_unlock(&s->deletes, &hold);
	return rc;
}

int place_trim(struct request *r, const struct piece *p, const struct iov *iov)
{
	struct sharded *s = r->c->layer->self;
	struct range_hold hold;
	struct obj obj;
	int rc;

	if (!shardmap_test(&s->known, p->n))
		return 0;
	shard_obj(&obj, p->n);
	rangelock_lock(&s->deletes, &hold, 0, p->n, 1, true);
	rc = ch_trim(r->c->kids[0], (struct ext){ &obj, p->off, p->len }, r->fl);
	rangelock_unlock(&s->deletes, &hold);
	return rc;
}

/* Deletes the first SHARD_DEL_MAX known ones of [at, end); *next becomes where to go on. */
static CO_FN int place_delete(struct chan *c, struct obj *objs, uint64_t *numbers, uint64_t at,
			      uint64_t end, uint64_t *next)
{
	struct sharded *s = c->layer->self;
	struct range_hold hold;
	unsigned n = 0;
	int rc = 0;

	rangelock_lock(&s->deletes, &hold, 0, at, end - at, false);
	for (; n < SHARD_DEL_MAX && (at = shardmap_find(&s->known, at, end, true)) < end; at++) {
		shard_obj(&objs[n], at);
		numbers[n++] = at;
	}
	if (n)
		rc = ch_del(c->kids[0], objs, n);
	for (unsigned i = 0; i < n && !rc; i++)
		shardmap_clear(&s->known, numbers[i]);
	rangelock_unlock(&s->deletes, &hold);
	*next = at;
	return rc;
}

int place_drop(struct chan *c, uint64_t first, uint64_t end)
{
	struct sharded *s = c->layer->self;
	_cleanup_free_ struct obj *objs = NULL;
	_cleanup_free_ uint64_t *numbers = NULL;
	size_t room;
	int rc = 0;

	first = shardmap_find(&s->known, first, end, true);
	if (first == end)
		return 0;
	room = MIN(end - first, (uint64_t)SHARD_DEL_MAX);
	objs = calloc(room, sizeof(*objs));
	numbers = calloc(room, sizeof(*numbers));
	if (!objs || !numbers)
		return -ENOMEM;
	while (first < end && !rc)
		rc = place_delete(c, objs, numbers, first, end, &first);
	return rc;
}

int place_cache(struct request *r, const struct piece *p, const struct iov *iov)
{
	const struct sharded *s = r->c->layer->self;
	struct obj obj;
	int rc;

	if (!shardmap_test(&s->known, p->n))
		return 0;
	shard_obj(&obj, p->n);
	rc = ch_cache(r->c->kids[0], (struct ext){ &obj, p->off, p->len });
	return rc == -ENOENT ? 0 : rc;
}

uint64_t place_map(struct chan *c, const struct piece *p, struct extmap *m, int *rc)
{
	struct extent v[16];
	struct extmap part = { v, 0, ARRAY_LEN(v) };
	uint64_t len = 0;
	struct obj obj;

	shard_obj(&obj, p->n);
	*rc = ch_map(c->kids[0], (struct ext){ &obj, p->off, p->len }, &part);
	if (*rc == -ENOENT) {
		*rc = 0;
		return extmap_add(m, p->len, EXTENT_HOLE | EXTENT_ZERO) ? p->len : 0;
	}
	for (unsigned i = 0; i < part.n && !*rc; i++) {
		if (!extmap_add(m, v[i].len, v[i].flags))
			break;
		len += v[i].len;
	}
	return len;
}
