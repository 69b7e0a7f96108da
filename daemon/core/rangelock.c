/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Holders stand in one list in order of arrival, waiting ones included. A newcomer counts the earlier
 * overlapping ones that exclude it (`blockers`); each unlock subtracts itself from the later ones it
 * blocked. First come, first served, so nobody starves.
 */
#include "nbdrs/rangelock.h"

#include <assert.h>

static bool excludes(const struct range_hold *a, const struct range_hold *b)
{
	return a->key == b->key && a->start < b->end && b->start < a->end &&
	       !(a->is_shared && b->is_shared);
}

void rangelock_init(struct rangelock *l)
{
	(void)pthread_mutex_init(&l->lock, NULL); /* cannot fail for a default mutex */
	list_init(&l->held);
}

void rangelock_destroy(struct rangelock *l)
{
	assert(list_empty(&l->held));
	(void)pthread_mutex_destroy(&l->lock);
}

void rangelock_lock(struct rangelock *l, struct range_hold *h, uint64_t key, uint64_t start, uint64_t len,
		    bool is_shared)
{
	*h = (struct range_hold){
		.start = start,
		.end = start + len,
		.key = key,
		.is_shared = is_shared,
		.co = co_self(),
	};
	pthread_mutex_lock(&l->lock);
	list_for_each(other, &l->held, struct range_hold, node)
		if (excludes(other, h))
			h->blockers++;
	list_add(&l->held, &h->node);
	while (h->blockers > 0) {
		pthread_mutex_unlock(&l->lock);
		co_park();
		pthread_mutex_lock(&l->lock);
	}
	pthread_mutex_unlock(&l->lock);
}

void rangelock_unlock(struct rangelock *l, struct range_hold *h)
{
	pthread_mutex_lock(&l->lock);
	/* Only later arrivals can have counted us. */
	for (struct list *n = h->node.next; n != &l->held; n = n->next) {
		struct range_hold *later = list_entry(n, struct range_hold, node);

		if (excludes(h, later) && --later->blockers == 0)
			co_wake(later->co);
	}
	list_del(&h->node);
	pthread_mutex_unlock(&l->lock);
}
