/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The disk's part of layer `cache`: granules that left memory, in files in the folder `disk`. Between
 * memory and the layer below; what is in it is what the layer below would answer, also after a
 * crash: docs/consistency.md, "Clean data on disk".
 *
 *	free -> queued -> valid -> free		taken from memory, written, made room or changed
 *	          \-> doomed -> free		changed before it was written
 *
 * Which one makes room: S3-FIFO, as in memory (cache_table.h), with the counters of the disk's own
 * hits. What memory used often goes into the main queue at once, the rest through the small one, so
 * a scan passes through a tenth of the disk. A hit costs a counter and no I/O; nothing ever moves
 * on disk, since a queue is a list of slots.
 *
 * Reads fetch the blocks of 4 KiB that are wanted, not whole granules, and do not go into memory:
 * what is read often is in the kernel's page cache. A change makes its blocks invalid; the others
 * of the granule stay.
 *
 * All functions take NULL for a cache without. No lock is held over I/O.
 */
#ifndef NBDRS_LAYER_CACHE_TIER_H
#define NBDRS_LAYER_CACHE_TIER_H

#include <stdbool.h>
#include <stdint.h>

#include "nbdrs/co.h"
#include "nbdrs/err.h"
#include "nbdrs/iov.h"
#include "nbdrs/layer.h"

struct tier;
struct journal_removal;

struct tier_conf {
	const char *folder, *volume; /* borrowed; whose it is */
	const char *identity;        /* copied; of the volume, "" = none */
	const char *name;            /* borrowed; of the export, for the log */
	uint64_t size;               /* bytes in all */
	uint64_t disk_size;          /* bytes, of the disk that it is in front of; 0 = of objects */
	uint32_t granule;
	int dir_fd; /* the folder, locked by who owns it; -1 = it is to be made and locked */
	bool is_keyed;
	bool is_named; /* `volume` is the operator's word, and enough without an identity */
	bool keeps;    /* what a former run left is used */
	/* Makes stable below what was answered. Called on the reactor that opens. */
	CO_FN int (*flush)(void *arg);
	/* What tier_take() took is needed no more. Any thread. */
	void (*give_back)(void *arg, uint8_t *data);
	void *arg;
};

/*
 * Opens what is there, or makes it, and starts the fiber that writes. Where no files can be made *out
 * is one that keeps nothing and says so in its status. An error when the folder cannot be had, has
 * unsaved data that this cache would ignore, or files that may be too old and cannot be removed.
 */
CO_FN int tier_open(const struct tier_conf *conf, struct tier **out, struct err *err);
/*
 * Nobody uses it any more. Everything queued is written; with `cleans` the layer below is flushed and
 * all of the files is good then, else what a crash leaves. The same where writing the index takes
 * longer than `ns`. On the reactor that opened it.
 */
CO_FN void tier_close(struct tier *t, bool cleans, uint64_t ns);
/*
 * Removes the files, if they are the volume's, or whoever's they are (volume NULL). A folder without
 * them is fine.
 */
CO_FN int tier_remove(const struct journal_removal *r, struct err *err);

/*
 * Copies [off, off + len) of granule n to iov at `at`; iov NULL = only looks. False: it is not
 * there, or not all of it.
 */
CO_FN bool tier_read(struct tier *t, const struct obj *obj, uint64_t n, uint32_t off, uint32_t len,
		     const struct iov *iov, size_t at);
/* Is all of granule n there? */
bool tier_has(struct tier *t, const struct obj *obj, uint64_t n);

/*
 * A granule leaves memory. True: the data is the tier's now, until conf.give_back. It never waits: when too
 * much is queued the data is not taken, and counted. `is_hot`: it was used often.
 */
bool tier_take(struct tier *t, const char *name, uint16_t name_len, uint64_t n, uint8_t *data,
	       bool is_hot);
/* Waits until nothing is queued. */
CO_FN void tier_wait(struct tier *t);

/* [off, off + len) of granule n is not what it was. */
void tier_drop(struct tier *t, const struct obj *obj, uint64_t n, uint32_t off, uint32_t len);
/*
 * The object is to be these bytes: what of it differs from them, or is not all there, is dropped. So a
 * put that changes little leaves the rest where it is.
 */
CO_FN void tier_drop_changed(struct tier *t, const struct obj *obj, const struct iov *iov);
/* Nor is anything of the object from granule `first` on. */
CO_FN void tier_drop_from(struct tier *t, const struct obj *obj, uint64_t first);

/*
 * Around each change below: tier_mark() for all of its extents, tier_settle() before the request
 * is sent; tier_done() when it has ended and the tier was told what it changed. len UINT64_MAX: to
 * the end of the object.
 */
void tier_mark(struct tier *t, struct ext e);
CO_FN void tier_settle(struct tier *t);
void tier_done(struct tier *t, struct ext e);

/*
 * The disk has another size; between tier_settle() and tier_done() of all that lies behind the smaller
 * one, after it was dropped.
 */
CO_FN void tier_resize(struct tier *t, uint64_t size);

struct tier_view {
	uint64_t limit, bytes, hits, misses, evictions, queued;
	uint64_t bad;     /* did not match their checksums */
	uint64_t writes;  /* granules */
	uint64_t dropped; /* not written: too much was queued */
	uint64_t errors;  /* of the folder's disk */
	uint64_t marks;   /* regions that would not be used after a crash */
	bool is_off;
};

void tier_view(struct tier *t, struct tier_view *v);

#endif
