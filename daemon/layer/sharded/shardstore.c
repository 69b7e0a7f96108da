/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * One generation's way into the store: what it lacks is fetched, and what is put goes up to the last page that is not
 * zero. A shard that is zero altogether is deleted, if it was there.
 *
 * A generation that covers all that the object had is put from where it lies. Otherwise it is completed in a copy: it
 * is being read meanwhile, and must stay what it is if the put fails.
 */
#include <errno.h>
#include <string.h>

#include "layer/sharded/shardbuf_int.h"
#include "nbdrs/huge.h"

/* Looked at at a stretch before others have their turn. */
enum { TURN_LEN = 256 * 1024 };
/* Up to so many ranges are fetched one by one to complete a shard; more of them in one. */
enum { RANGES_MAX = 4 };
/* Of an object no larger than this all of them are one: a request costs more than so many bytes do. */
enum { ONE_GET_MAX = 256 * 1024 };

/* --- The end ---------------------------------------------------------------------------------- */

/*
 * Where the last page of data[0, end) that is not all zero ends; 0 = there is none. `touched` (NULL = all): the pages
 * that may be other than zero.
 *
 * Whole pages, though an object might end with any byte: that is what is counted here, file systems write no less, and
 * a store gains nothing by a few bytes.
 */
static CO_FN uint64_t data_end(const uint8_t *data, const uint64_t *touched, uint64_t end)
{
	uint64_t page = end / MEM_PAGE;
	unsigned looked = 0;

	while (page > 0 && (page = touched ? bits_end(touched, page) : page) > 0) {
		struct iovec v = { (void *)(uintptr_t)(data + (page - 1) * MEM_PAGE), MEM_PAGE };
		const struct iov iov = { &v, 1, MEM_PAGE };

		if (!iov_is_zero(&iov))
			return page * MEM_PAGE;
		page--;
		if (++looked % (TURN_LEN / MEM_PAGE) == 0)
			co_yield();
	}
	return 0;
}

/* --- What is missing -------------------------------------------------------------------------- */

/* A range of shard n that is fetched into `base`, memory for the whole shard. */
struct range {
	struct chan *kid;
	const struct obj *obj;
	uint8_t *base;
	uint64_t off, len;
	int rc;
};

static CO_FN void fetch_range(void *arg)
{
	struct range *r = arg;
	struct iovec v;
	struct iov iov = iov_one(&v, r->base + r->off, r->len);

	r->rc = ch_read(r->kid, (struct ext){ r->obj, r->off, r->len }, &iov, 0);
	if (r->rc == -ENOENT)
		r->rc = 0; /* the memory is zero already */
}

/* What `g` lacks of the first `end` bytes, which is something; few ranges by themselves, many as one. */
static CO_FN int fetch_rest(struct shard_user *u, const struct obj *obj, const struct gen *g,
			    uint64_t end, uint8_t *to)
{
	const uint64_t grains = end / SHARD_GRAIN;
	const unsigned max = end <= ONE_GET_MAX ? 1 : RANGES_MAX;
	struct range ranges[RANGES_MAX];
	struct co_group group = CO_GROUP_INIT;
	uint64_t at = 0, from;
	unsigned n = 0;
	int rc = 0;

	while ((from = bits_find(g->bits, at, grains, false)) < grains) {
		at = bits_find(g->bits, from, grains, true);
		if (n < max)
			ranges[n++] = (struct range){
				u->kid, obj, to, from * SHARD_GRAIN, (at - from) * SHARD_GRAIN, 0
			};
		else
			ranges[0].len = at * SHARD_GRAIN - ranges[0].off;
	}
	if (ranges[0].off + ranges[0].len > ranges[n - 1].off)
		n = 1; /* there were more, or there is only one */
	for (unsigned i = 1; i < n; i++)
		co_group_spawn(&group, fetch_range, &ranges[i]);
	fetch_range(&ranges[0]);
	co_group_wait(&group);
	for (unsigned i = 0; i < n && !rc; i++)
		rc = ranges[i].rc;
	return rc;
}

/* Copies what `g` holds of the first `end` bytes over what was fetched. */
static CO_FN void lay_over(const struct gen *g, uint64_t end, uint8_t *to)
{
	const uint64_t grains = end / SHARD_GRAIN;
	uint64_t at = 0, from;

	while ((from = bits_find(g->bits, at, grains, true)) < grains) {
		uint64_t len;

		at = bits_find(g->bits, from, MIN(from + TURN_LEN / SHARD_GRAIN, grains), false);
		len = (at - from) * SHARD_GRAIN;
		if (g->data)
			memcpy(to + from * SHARD_GRAIN, g->data + from * SHARD_GRAIN, len);
		else
			memset(to + from * SHARD_GRAIN, 0, len);
		if (len == TURN_LEN)
			co_yield();
	}
}

/* --- The way there ---------------------------------------------------------------------------- */

/*
 * Puts of so many bytes are on their way together that a slow line brings each of them home in time. In turn: a large
 * one is not overtaken by small ones for ever.
 */
static CO_FN void fly(struct shardbuf *b, uint64_t bytes)
{
	co_mutex_lock(&b->flying_line);
	pthread_mutex_lock(&b->lock);
	while (b->flying && b->flying + bytes > b->conf.dirty_max / 2)
		co_wq_wait(&b->landed, &b->lock);
	b->flying += bytes;
	pthread_mutex_unlock(&b->lock);
	co_mutex_unlock(&b->flying_line);
}

static void land(struct shardbuf *b, uint64_t bytes)
{
	pthread_mutex_lock(&b->lock);
	b->flying -= bytes;
	co_wq_wake_one(&b->landed);
	pthread_mutex_unlock(&b->lock);
}

/* data[0, end) becomes the object; zeroes are not stored. */
static CO_FN int put_bytes(struct shard_user *u, const struct obj *obj, uint8_t *data, uint64_t end,
			   bool was_there)
{
	struct iovec v;
	struct iov iov = iov_one(&v, data, end);
	struct put p = { .obj = obj, .iov = &iov, .cond = PUT_ALWAYS, .is_new = !was_there };

	if (end)
		return ch_put(u->kid, &p, NULL);
	return was_there ? ch_del(u->kid, obj, 1) : 0;
}

/* With what the store has of it, which ends at `old_end`. */
static CO_FN int put_completed(struct shard_user *u, const struct obj *obj, const struct gen *g,
			       uint64_t old_end, uint64_t *end)
{
	const uint64_t most = MAX(old_end, *end);
	uint8_t *whole = shard_map(u->b);
	int rc;

	if (!whole)
		return -ENOMEM;
	huge_use(whole, align_down(most, HUGE_PAGE));
	rc = fetch_rest(u, obj, g, old_end, whole);
	if (!rc) {
		lay_over(g, most, whole);
		*end = data_end(whole, NULL, most);
		rc = put_bytes(u, obj, whole, *end, true);
	}
	shard_unmap(u->b, whole);
	return rc;
}

int shard_store(struct shard_user *u, uint64_t n, struct gen *g, uint64_t old_end, uint64_t *end)
{
	const uint64_t old_grains = g->rest_zero ? 0 : old_end / SHARD_GRAIN;
	const bool is_complete = bits_find(g->bits, 0, old_grains, false) == old_grains;
	uint64_t bytes;
	struct obj obj;
	int rc;

	shard_obj(&obj, n);
	*end = g->data ? data_end(g->data, gen_touched(u->b, g), u->b->conf.shard_size) : 0;
	bytes = is_complete ? *end : MAX(*end, old_end);
	fly(u->b, bytes);
	if (is_complete)
		rc = put_bytes(u, &obj, g->data, *end, old_end > 0);
	else
		rc = put_completed(u, &obj, g, old_end, end);
	land(u->b, bytes);
	return rc;
}
