/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Latency histogram: log-linear buckets (16 per power of two, so within 6.25 %), from 1 ns to about
 * 18 minutes. One writer (its reactor), any readers: counters are relaxed atomics.
 */
#ifndef NBDRS_HIST_H
#define NBDRS_HIST_H

#include <stdatomic.h>
#include <stdint.h>

enum { HIST_SUB = 16, HIST_BUCKETS = 37 * HIST_SUB };

struct hist {
	_Atomic uint64_t count[HIST_BUCKETS];
};

/* Bucket of a value in ns; values beyond the end go to the last one. */
static inline unsigned hist_bucket(uint64_t ns)
{
	unsigned top, b;

	if (ns < HIST_SUB)
		return (unsigned)ns;
	top = 63U - (unsigned)__builtin_clzll(ns);
	b = (top - 3) * HIST_SUB + (unsigned)((ns >> (top - 4)) & (HIST_SUB - 1));
	return b < HIST_BUCKETS ? b : HIST_BUCKETS - 1;
}

static inline void hist_add(struct hist *h, uint64_t ns)
{
	_Atomic uint64_t *c = &h->count[hist_bucket(ns)];

	/* One writer: a plain add is enough, and spares the locked instruction. */
	atomic_store_explicit(c, atomic_load_explicit(c, memory_order_relaxed) + 1, memory_order_relaxed);
}

/* Adds `src` to `dst` (dst is private to the caller). */
void hist_merge(struct hist *dst, const struct hist *src);

/* Value in ns at or below which `ppm` millionths of the samples lie (upper edge of the bucket); 0 when empty. */
uint64_t hist_quantile(const struct hist *h, uint32_t ppm);

#endif
