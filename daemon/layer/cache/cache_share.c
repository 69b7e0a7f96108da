/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * See cache_share.h. Parts are given out anew whenever a cache comes or goes.
 */
#include "layer/cache/cache_share.h"

#include <pthread.h>

#include "nbdrs/cleanup.h"

static struct {
	pthread_mutex_t lock;
	struct list shares;
	uint64_t limit; /* bytes; 0 = none */
} all = { .lock = PTHREAD_MUTEX_INITIALIZER, .shares = LIST_INIT(all.shares) };

/* Those that want no more than an equal part of what is left get it; true when there were any. */
static bool satisfy(uint64_t *left, unsigned *n)
{
	const uint64_t part = *n ? *left / *n : 0;
	bool found = false;

	list_for_each(s, &all.shares, struct cache_share, node)
	{
		if (s->got || s->want > part)
			continue;
		s->got = s->want;
		*left -= s->got;
		(*n)--;
		found = true;
	}
	return found;
}

/* With the lock held. */
static void divide(void)
{
	uint64_t left = all.limit;
	unsigned n = 0;

	list_for_each(s, &all.shares, struct cache_share, node)
	{
		s->got = all.limit ? 0 : s->want;
		n++;
	}
	while (all.limit && satisfy(&left, &n))
		;
	list_for_each(s, &all.shares, struct cache_share, node)
	{
		if (!s->got)
			s->got = left / n;
		cache_table_limit(s->table, s->got);
	}
}

void cache_mem_limit(uint64_t bytes)
{
	pthread_mutex_lock(&all.lock);
	all.limit = bytes;
	divide();
	pthread_mutex_unlock(&all.lock);
}

void cache_share_join(struct cache_share *s, struct cache_table *table, uint64_t want)
{
	*s = (struct cache_share){ .table = table, .want = want };
	pthread_mutex_lock(&all.lock);
	list_add(&all.shares, &s->node);
	divide();
	pthread_mutex_unlock(&all.lock);
}

void cache_share_leave(struct cache_share *s)
{
	if (!s->table)
		return;
	pthread_mutex_lock(&all.lock);
	list_del(&s->node);
	divide();
	pthread_mutex_unlock(&all.lock);
	s->table = NULL;
}
