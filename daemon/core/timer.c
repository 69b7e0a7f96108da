/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * A reactor's timers: a binary heap by deadline. Each timer knows its place (`slot`, counted from 1), so
 * stopping one is as cheap as starting it.
 */
#include <errno.h>
#include <stdlib.h>

#include "core/reactor_int.h"

static void put(struct timer_heap *h, unsigned i, struct timer *t)
{
	h->v[i] = t;
	t->slot = i + 1;
}

static void sift_up(struct timer_heap *h, unsigned i, struct timer *t)
{
	while (i > 0) {
		unsigned parent = (i - 1) / 2;

		if (h->v[parent]->deadline_ns <= t->deadline_ns)
			break;
		put(h, i, h->v[parent]);
		i = parent;
	}
	put(h, i, t);
}

static void sift_down(struct timer_heap *h, unsigned i, struct timer *t)
{
	for (;;) {
		unsigned kid = 2 * i + 1;

		if (kid >= h->n)
			break;
		if (kid + 1 < h->n && h->v[kid + 1]->deadline_ns < h->v[kid]->deadline_ns)
			kid++;
		if (t->deadline_ns <= h->v[kid]->deadline_ns)
			break;
		put(h, i, h->v[kid]);
		i = kid;
	}
	put(h, i, t);
}

static void remove_at(struct timer_heap *h, unsigned i)
{
	struct timer *last;

	h->v[i]->slot = 0;
	last = h->v[--h->n];
	if (i == h->n)
		return;
	if (i > 0 && last->deadline_ns < h->v[(i - 1) / 2]->deadline_ns)
		sift_up(h, i, last);
	else
		sift_down(h, i, last);
}

void timer_init(struct timer *t, void (*fn)(struct timer *t))
{
	t->deadline_ns = 0;
	t->slot = 0;
	t->fn = fn;
}

int timer_start(struct timer *t, uint64_t deadline_ns)
{
	struct timer_heap *h = &reactor_self()->timers;

	timer_stop(t);
	if (h->n == h->max) {
		unsigned max = h->max ? 2 * h->max : 64;
		struct timer **v = realloc(h->v, max * sizeof(*v));

		if (v == NULL)
			return -ENOMEM;
		h->v = v;
		h->max = max;
	}
	t->deadline_ns = deadline_ns;
	sift_up(h, h->n++, t);
	return 0;
}

void timer_stop(struct timer *t)
{
	if (t->slot > 0)
		remove_at(&reactor_self()->timers, t->slot - 1);
}

void timers_run(struct timer_heap *h, uint64_t now)
{
	while (h->n > 0 && h->v[0]->deadline_ns <= now) {
		struct timer *t = h->v[0];

		remove_at(h, 0);
		t->fn(t);
	}
}

uint64_t timers_next(const struct timer_heap *h, uint64_t now)
{
	if (h->n == 0)
		return IO_FOREVER;
	return h->v[0]->deadline_ns > now ? h->v[0]->deadline_ns - now : 0;
}

void timers_free(struct timer_heap *h)
{
	free(h->v);
	*h = (struct timer_heap){ 0 };
}
