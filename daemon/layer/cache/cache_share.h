/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * One limit for the memory of all caches of the process (nbdrsd --cache-mem), see cache_mem_limit()
 * in nbdrs/layer.h. Each gets what it wants (`mem`) or an equal part, whatever is less; what some
 * don't want the others share.
 */
#ifndef NBDRS_LAYER_CACHE_SHARE_H
#define NBDRS_LAYER_CACHE_SHARE_H

#include <stdatomic.h>

#include "layer/cache/cache_table.h"
#include "nbdrs/list.h"

struct cache_share {
	struct list node;
	struct cache_table *table; /* borrowed */
	uint64_t want;             /* bytes */
	_Atomic uint64_t got;
};

/* From now on `table` has its part, which changes as others come and go. Any thread. */
void cache_share_join(struct cache_share *s, struct cache_table *table, uint64_t want);
/* Nothing happens where it has not joined. */
void cache_share_leave(struct cache_share *s);

#endif
