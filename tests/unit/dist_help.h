/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the tests of layer distributed share: nodes that are switched off by fault layers (a file in the run's
 * folder), objects whose bytes are all the same, and a look at each node's store.
 */
#ifndef NBDRS_TEST_DIST_HELP_H
#define NBDRS_TEST_DIST_HELP_H

#include "conform_store.h"
#include "layer/distributed/distributed.h"

enum { DIST_KI = 1024, DIST_MI = DIST_KI * DIST_KI, DIST_LEN = 8 * DIST_KI };

/* In front of node i: all it is asked for fails while that node is off. */
#define DIST_OFF(i) \
	"fault[file=@/off" #i ",ops=read|write|zero|trim|flush|stat|put|del|list,error=ETIMEDOUT]"

/* Runs fn on a fiber, over nodes in memory; fails the test when fn fails. */
void dist_run(const char *text, int (*fn)(void *run));

/* The store of node i, below its fault layer. */
CO_FN struct chan *dist_node(struct store_run *r, unsigned i);
static inline struct dist *dist_of(struct store_run *r)
{
	return chain_top(r->chain)->self;
}
/* Makes and removes the file of "fault[file=@/offN]": the node fails while it is there. */
int dist_node_off(struct store_run *r, unsigned i, bool is_off);
/* Removes all objects of all nodes, so that folders can go. */
CO_FN int dist_wipe(struct store_run *r);

struct obj dist_obj(const char *name);
/* `len` times the same byte. */
CO_FN int dist_put_byte(struct chan *c, const char *name, uint8_t byte, size_t len);
CO_FN int dist_put_text(struct chan *c, const char *name, const char *text);
CO_FN int dist_write_byte(struct chan *c, const char *name, uint64_t off, uint8_t byte, size_t len,
			  unsigned fl);
CO_FN int dist_del_one(struct chan *c, const char *name);
/* The one byte that all of [off, off + len) is; -EILSEQ when it is several, or the read's error. */
CO_FN int dist_read_byte(struct chan *c, const char *name, uint64_t off, size_t len);

struct dist_counting {
	const char *prefix;
	unsigned n;
	char last[OBJ_NAME_MAX + 1];
	uint64_t size;
};

/* A list_fn; arg is a struct dist_counting. */
int dist_count_one(void *arg, const char *name, uint64_t size);
/* How many objects begin with prefix. */
CO_FN int dist_count_of(struct chan *c, const char *prefix);

/* Nodes with a record of what is in doubt. */
CO_FN int dist_records_n(struct store_run *r);
CO_FN int dist_wait_no_records(struct store_run *r);

struct dist_state {
	struct info base;
	bool is_good;
	char all[1024]; /* "key: value; key: value; " */
};

struct dist_state dist_status_of(struct store_run *r);
/* Waits until all nodes are there and caught up, and no record is left. */
CO_FN int dist_wait_good(struct store_run *r);
/* All holders of shard n have the same bytes, or none has it. */
CO_FN int dist_same_everywhere(struct store_run *r, unsigned shard);

#endif
