/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Locks on byte ranges: overlapping exclusive holders wait for each other, first come, first served;
 * shared holders of one range run together. Fibers of all reactors.
 */
#ifndef NBDRS_RANGELOCK_H
#define NBDRS_RANGELOCK_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "nbdrs/co.h"
#include "nbdrs/list.h"

struct rangelock {
	pthread_mutex_t lock; /* guards `held`; never held across a wait */
	struct list held;     /* struct range_hold in order of arrival, waiting ones included */
};

/* Lives in the holder's stack frame from lock to unlock. */
struct range_hold {
	struct list node;
	uint64_t start, end; /* [start, end) */
	uint64_t key;	     /* of the object (its name's hash); ranges of different keys never meet */
	unsigned blockers;   /* earlier overlapping holders that must go first */
	bool is_shared;
	struct co *co;
};

void rangelock_init(struct rangelock *l);
void rangelock_destroy(struct rangelock *l);
CO_FN void rangelock_lock(struct rangelock *l, struct range_hold *h, uint64_t key, uint64_t start,
			  uint64_t len, bool is_shared);
void rangelock_unlock(struct rangelock *l, struct range_hold *h);

#endif
