/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Latency histogram: the reading side.
 */
#include "nbdrs/hist.h"

enum { PPM = 1000000 };

void hist_merge(struct hist *dst, const struct hist *src)
{
	for (unsigned b = 0; b < HIST_BUCKETS; b++) {
		uint64_t sum = atomic_load_explicit(&dst->count[b], memory_order_relaxed) +
			       atomic_load_explicit(&src->count[b], memory_order_relaxed);

		atomic_store_explicit(&dst->count[b], sum, memory_order_relaxed);
	}
}

/* The largest value that hist_bucket() puts into bucket b (the last bucket's has no bound). */
static uint64_t upper_edge(unsigned b)
{
	unsigned shift;

	if (b < HIST_SUB)
		return b;
	shift = b / HIST_SUB - 1;
	return ((uint64_t)(HIST_SUB + b % HIST_SUB + 1) << shift) - 1;
}

uint64_t hist_quantile(const struct hist *h, uint32_t ppm)
{
	uint64_t total = 0, rank, seen = 0;

	for (unsigned b = 0; b < HIST_BUCKETS; b++)
		total += atomic_load_explicit(&h->count[b], memory_order_relaxed);
	if (!total)
		return 0;
	if (ppm > PPM)
		ppm = PPM;
	/* ceil(total * ppm / PPM) without overflow; the smallest sample is the 1st, not the 0th. */
	rank = total / PPM * ppm + (total % PPM * ppm + PPM - 1) / PPM;
	if (!rank)
		rank = 1;
	for (unsigned b = 0; b < HIST_BUCKETS; b++) {
		seen += atomic_load_explicit(&h->count[b], memory_order_relaxed);
		if (seen >= rank)
			return upper_edge(b);
	}
	/* Not reached: counters only grow, so the second pass sees at least `total`. */
	return upper_edge(HIST_BUCKETS - 1);
}
