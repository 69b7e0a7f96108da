/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the tests of the cache's clean data on disk share: a disk that gets there by itself, and a second chain
 * over the same folder.
 */
#ifndef NBDRS_TEST_TIERED_H
#define NBDRS_TEST_TIERED_H

#include "conformance.h"

enum { KI = 1024, MI = KI * KI, GRANULE = 64 * KI, SIZE = 4 * MI };

#define TIERED     "cache[disk=@/c,volume=v,size=8Mi,mem=1Mi]:"
#define NAMELESS   "cache[disk=@/c,size=8Mi,mem=1Mi]:"
#define FILE_BELOW "raw:file:@/disk.img"

/* Runs fn on a fiber, over a volume in a folder in memory; fails the test when fn fails. */
void tiered_check(const char *text, uint64_t size, int (*fn)(void *run));

/* Reads from the layer below since the chain was opened. */
uint64_t tiered_below(struct run *r);
CO_FN int tiered_reopen(struct run *r);
/* Waits until what left memory is on disk. */
CO_FN int tiered_settle(struct run *r);
/* All of the disk is written, and on disk but for what is still in memory. */
CO_FN int tiered_fill(struct run *r);

/* Another chain while the run's is shut. */
struct tiered_other {
	struct spec *spec;
	struct chain *chain;
};

/* As export "disk0"; "@" is the run's folder. */
CO_FN int tiered_other(struct run *r, const char *form, struct tiered_other *o);
void tiered_other_free(struct tiered_other *o);

#endif
