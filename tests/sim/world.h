/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * A disk of 2 MiB that is written round by round, for tests of the cache: over the store, or with a journal.
 */
#ifndef NBDRS_SIM_WORLD_H
#define NBDRS_SIM_WORLD_H

#include "traffic.h"

enum { BLOCKS = 512, FULL = 600 };

#define CACHE(more) "cache[disk=/disk/c,size=2Mi,mode=writeback,lag=1s,uploads=4" more "]:"
#define DISK        "remote[size=2Mi]"

/* Blocks are written one after the other, round by round: so the count says what each holds. */
struct world {
	struct volume volume;
	struct chan *c;
	uint64_t written; /* blocks */
	uint64_t longest; /* ns: of one write */
	bool is_done;
	int rc;
};

CO_FN int world_enter(struct world *w, const char *text);
CO_FN int world_leave(struct world *w);
/* The next block; 0 or the error, after which the block may hold either. */
CO_FN int world_write_next(struct world *w);
CO_FN int world_write_with(struct world *w, unsigned fl);
/* Writes until there is an error (w->rc), or FULL blocks are written. For co_group_spawn(). */
CO_FN void world_fill_up(void *world);
/* What is read is what was written. */
CO_FN int world_check(struct world *w);
/* So it is in the store, without the cache. */
CO_FN int world_check_store(const struct world *before);
/* The store is well again: then all of it can be written and flushed, and is there after the end. */
CO_FN int world_come_back(struct world *w);

#endif
