/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What cache_dirty.c and cache_queue.c share. All with the stripe's lock held.
 */
#ifndef NBDRS_LAYER_CACHE_DIRTY_INT_H
#define NBDRS_LAYER_CACHE_DIRTY_INT_H

#include "layer/cache/cache_dirty.h"

struct dirty_stripe *dirty_stripe(struct dirty *d, uint64_t key);
/* Frees it when nothing is left to do for it. */
void unit_release(struct dirty *d, struct unit *u);
/* Forgets changes: all, or those up to number `seq`. */
void unit_drop_all(struct dirty *d, struct unit *u);
void unit_drop_until(struct dirty *d, struct unit *u, uint64_t seq);
/* After a change: into the queue where it belongs, if it is in none; out of it. */
void unit_enqueue(struct dirty *d, struct unit *u);
void unit_dequeue(struct dirty *d, struct unit *u);

#endif
