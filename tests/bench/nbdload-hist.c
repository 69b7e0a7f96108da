/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Latency histogram with log-linear buckets; the idea is Gil Tene's HdrHistogram. */
#include "nbdload.h"

#define SUB_N (UINT64_C(1) << HIST_SUB_BITS)

static unsigned int bucket_of(uint64_t v)
{
	if (v < SUB_N)
		return (unsigned int)v;

	unsigned int top = 63 - (unsigned int)__builtin_clzll(v);
	unsigned int shift = top - HIST_SUB_BITS;

	return ((shift + 1) << HIST_SUB_BITS) + (unsigned int)((v >> shift) - SUB_N);
}

/* The largest value that falls into bucket @i: quantiles are reported from above, never flattered. */
static uint64_t bucket_top(unsigned int i)
{
	if (i < SUB_N)
		return i;

	unsigned int shift = (i >> HIST_SUB_BITS) - 1;
	uint64_t sub = (i & (SUB_N - 1)) + SUB_N;

	return ((sub + 1) << shift) - 1;
}

void hist_add(struct hist *h, uint64_t ns)
{
	h->count++;
	h->sum += ns;
	if (ns > h->max)
		h->max = ns;
	h->bucket[bucket_of(ns)]++;
}

void hist_merge(struct hist *into, const struct hist *from)
{
	into->count += from->count;
	into->sum += from->sum;
	if (from->max > into->max)
		into->max = from->max;
	for (unsigned int i = 0; i < HIST_BUCKETS; i++)
		into->bucket[i] += from->bucket[i];
}

uint64_t hist_quantile(const struct hist *h, double fraction)
{
	if (h->count == 0)
		return 0;

	uint64_t want = (uint64_t)(fraction * (double)h->count);
	uint64_t seen = 0;

	if (want >= h->count)
		want = h->count - 1;
	for (unsigned int i = 0; i < HIST_BUCKETS; i++) {
		seen += h->bucket[i];
		if (seen > want)
			return bucket_top(i) < h->max ? bucket_top(i) : h->max;
	}
	return h->max;
}
