/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * A counter with one writer (a reactor) and readers on any thread (the control socket): no locked
 * instruction needed, and nothing is ordered by it.
 */
#ifndef NBDRS_COUNTER_H
#define NBDRS_COUNTER_H

#include <stdatomic.h>
#include <stdint.h>

static inline void counter_add(_Atomic uint64_t *c, uint64_t by)
{
	atomic_store_explicit(c, atomic_load_explicit(c, memory_order_relaxed) + by, memory_order_relaxed);
}

#endif
