/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The pieces of readahead: what was fetched or is on its way, in a sorted array, found by binary search.
 *
 * A piece is referenced by the table while it is listed, by its fetch while that runs, and by readers that
 * wait for it or copy out of it. Its memory is used again when the last of them has gone, so a piece that
 * is dropped while it is being fetched still counts against the limit.
 *
 * Buffers are powers of two with a mapping of their own each, kept for reuse by size, because mapping and
 * clearing costs more than fetching from a near store. Mapping and unmapping happens under the lock; a steady
 * stream does neither.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "layer/readahead/readahead_int.h"
#include "nbdrs/cleanup.h"

/* --- Buffers ---------------------------------------------------------------------------------- */

static unsigned order_of(uint64_t len)
{
	unsigned order = 0;

	while (((uint64_t)PIECE_MIN << order) < len)
		order++;
	assert(order < PIECE_ORDERS);
	return order;
}

static uint64_t order_len(unsigned order)
{
	return (uint64_t)PIECE_MIN << order;
}

static void *take_free(struct pieces *t, unsigned order)
{
	void *buf = t->free[order];

	if (buf)
		t->free[order] = *(void **)buf;
	return buf;
}

/* Gives free buffers back to the kernel until `need` more bytes fit, or all of them. */
static void release_free(struct pieces *t, uint64_t need)
{
	for (unsigned order = PIECE_ORDERS; order-- > 0;) {
		while (t->free[order] && t->total + need > t->mem) {
			(void)munmap(take_free(t, order), order_len(order)); /* ours: can't fail */
			t->total -= order_len(order);
		}
	}
}

/* Drops the oldest piece that nobody uses; false when there is none. */
static bool evict(struct pieces *t)
{
	list_for_each(p, &t->by_age, struct piece, age)
	{
		if (p->refs == 1) { /* the table's: nobody fetches, waits or copies */
			piece_drop(t, p);
			return true;
		}
	}
	return false;
}

static void *buffer_get(struct pieces *t, unsigned order)
{
	void *buf = take_free(t, order);

	while (!buf && t->total + order_len(order) > t->mem) {
		release_free(t, order_len(order));
		if (t->total + order_len(order) <= t->mem)
			break;
		if (!evict(t))
			return NULL;
		buf = take_free(t, order);
	}
	if (buf)
		return buf;
	buf = mmap(NULL, order_len(order), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		   0);
	if (buf == MAP_FAILED)
		return NULL;
	t->total += order_len(order);
	return buf;
}

/* --- The table -------------------------------------------------------------------------------- */

int pieces_init(struct pieces *t, uint64_t mem)
{
	memset(t, 0, sizeof(*t));
	list_init(&t->by_age);
	t->mem = mem;
	t->v = calloc(PIECES_MAX, sizeof(*t->v));
	return t->v ? 0 : -ENOMEM;
}

void pieces_free(struct pieces *t)
{
	if (!t->v)
		return;
	while (t->n)
		piece_drop(t, t->v[t->n - 1]);
	t->mem = 0;
	release_free(t, 1);
	assert(t->total == 0);
	free(t->v);
	t->v = NULL;
}

unsigned pieces_at(const struct pieces *t, uint64_t off)
{
	unsigned low = 0, high = t->n;

	while (low < high) {
		unsigned mid = (low + high) / 2;

		if (t->v[mid]->to > off)
			high = mid;
		else
			low = mid + 1;
	}
	return low;
}

bool pieces_touch(const struct pieces *t, uint64_t from, uint64_t to)
{
	unsigned i = pieces_at(t, from);

	return i < t->n && t->v[i]->from < to;
}

struct piece *piece_new(struct pieces *t, uint64_t from, uint64_t to, uint64_t now)
{
	unsigned order = order_of(to - from), at;
	struct piece *p;

	if (t->n == PIECES_MAX && !evict(t))
		return NULL;
	p = malloc(sizeof(*p));
	if (!p)
		return NULL;
	*p = (struct piece){
		.off = from,
		.len = to - from,
		.from = from,
		.to = to,
		.born_ns = now,
		.data = buffer_get(t, order),
		.order = order,
		.refs = 2,
		.is_fetching = true,
		.is_listed = true,
	};
	if (!p->data) {
		free(p);
		return NULL;
	}
	co_wq_init(&p->done);
	at = pieces_at(t, from);
	memmove(&t->v[at + 1], &t->v[at], (t->n - at) * sizeof(struct piece *));
	t->v[at] = p;
	list_add(&t->by_age, &p->age);
	t->planned++;
	atomic_fetch_add(&t->n, 1);
	return p;
}

void piece_drop(struct pieces *t, struct piece *p)
{
	unsigned at;

	if (!p->is_listed)
		return;
	at = pieces_at(t, p->to - 1);
	assert(t->v[at] == p);
	memmove(&t->v[at], &t->v[at + 1], (t->n - at - 1) * sizeof(struct piece *));
	atomic_fetch_sub(&t->n, 1);
	list_del(&p->age);
	p->is_listed = false;
	co_wq_wake_all(&p->done);
	piece_put(t, p);
}

void piece_put(struct pieces *t, struct piece *p)
{
	if (--p->refs)
		return;
	t->wasted += p->fetched - MIN(p->taken, p->fetched);
	*(void **)p->data = t->free[p->order];
	t->free[p->order] = p->data;
	free(p);
}

void piece_consume(struct pieces *t, struct piece *p, uint64_t len)
{
	p->used += len;
	p->taken += len;
	if (p->used >= p->to - p->from)
		piece_drop(t, p);
}

void pieces_cut(struct pieces *t, uint64_t from, uint64_t to)
{
	unsigned i = pieces_at(t, from);

	while (i < t->n && t->v[i]->from < to) {
		struct piece *p = t->v[i];
		uint64_t left = from > p->from ? from - p->from : 0;
		uint64_t right = to < p->to ? p->to - to : 0;
		uint64_t kept = MAX(left, right);

		if (!kept) {
			piece_drop(t, p); /* the next one comes to its place */
			continue;
		}
		/* What is cut off is likely what was read already: a writer that follows a reader. */
		p->used -= MIN(p->used, p->to - p->from - kept);
		if (left > right)
			p->to = from;
		else
			p->from = to;
		/* Who waits for bytes that are gone must not wait for the rest. */
		co_wq_wake_all(&p->done);
		i++;
	}
}

bool pieces_tidy(struct pieces *t, uint64_t before_ns)
{
	list_for_each(p, &t->by_age, struct piece, age)
	{
		if (p->refs == 1 && p->born_ns < before_ns)
			piece_drop(t, p);
	}
	if (t->planned == t->planned_at_tidy) {
		uint64_t mem = t->mem;

		t->mem = 0;
		release_free(t, 1);
		t->mem = mem;
	}
	t->planned_at_tidy = t->planned;
	return t->total > 0;
}
