/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Exports: a name, an open chain, and what is advertised for it. The list is built before the listeners
 * start and taken down after the last connection is gone, so readers need no lock.
 */
#ifndef NBDRS_EXPORT_H
#define NBDRS_EXPORT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbdrs/hist.h"
#include "nbdrs/layer.h"
#include "nbdrs/proto.h"

enum { EXPORT_HISTS = 3 }; /* read, write (zero and trim too), flush */
enum { EXPORT_CMDS = 8 };  /* by enum nbd_cmd */

/* Written by one reactor, read by the control socket. */
struct export_stats {
	_Atomic uint64_t ops[EXPORT_CMDS];
	_Atomic uint64_t bytes[EXPORT_CMDS];
	_Atomic uint64_t errors[EXPORT_CMDS];
	struct hist latency[EXPORT_HISTS];
	/* Requests that went into the chain, and came out of it. */
	_Atomic uint64_t entered, left;
};

struct export {
	char *name, *description;
	struct spec *spec;
	struct chain *chain;
	_Atomic uint64_t size; /* bytes; changes while it is paused */
	/* Requests wait outside of the chain. A reactor that has run a fiber since it was set has seen it. */
	_Atomic bool is_paused;
	uint16_t tflags;     /* enum nbd_tflag; without CAN_MULTI when the chain can't */
	uint32_t min_block, pref_block, max_payload;
	char *backend_id; /* nbdrs/backend.h */
	char *stores; /* where its data lies: see export_stores */
	/* The nbdrsd that was asked to take over has the same chain by that name. */
	bool comes_again;
	struct export_stats *stats; /* reactors_n() of them */
	_Atomic unsigned conns;
	_Atomic unsigned ghosts; /* cut connections of devices with changes in the chain (net/ghost.c) */
	struct export *next;
};

/*
 * Whether an export may have that name: -EINVAL unless it is UTF-8 of 1 to 4096 bytes without control
 * characters, -EEXIST for one that is taken.
 */
int export_check_name(const char *name, struct err *err);

struct export_arg {
	const char *name;
	struct spec *spec;
};

/*
 * Opens n chains, several at a time, and appends them to the list in their order; those that could be opened also when
 * it fails for others (exports_close). Errors of export_check_name, and the first one in the order. Takes the specs,
 * also when it fails. `read_only` serves what could be written read-only; what can't be written is served so anyway.
 */
CO_FN int exports_open(const struct export_arg *args, size_t n, bool read_only, struct err *err);
/* Flushes all. The first error. */
CO_FN int exports_flush(void);
/*
 * Closes (flush included) and frees all. `is_upgrade`: those that come again leave to the next one what is safe
 * already. The first error of a flush.
 */
CO_FN int exports_close(bool is_upgrade);

/*
 * The export with that backend identifier, NULL = none. One without an identity, of a device that was attached before
 * the volume got one, is a name only.
 */
struct export *export_find_backend(const char *backend_id);
bool export_has_identity(const struct export *e);
/* "" = the default export: the first one. NULL = unknown. */
struct export *export_find(const char *name);
/* The same for a name of `len` bytes that may hold anything, zero bytes too. */
struct export *export_find_n(const char *name, size_t len);
struct export *export_first(void);

/*
 * Gives the export's volume `size` bytes, while it is served: requests wait for a moment, and those behind a new end
 * are refused from then on. On reactor 0. What is smaller than now needs `may_shrink`. 0 also when it has that size.
 * -EINVAL, -EROFS; -EBUSY: another resize or an upgrade is under way, or requests in flight did not end in time (the
 * store is away); -EOPNOTSUPP, -EFBIG, or what the store says: see ch_resize.
 */
CO_FN int export_resize(struct export *e, uint64_t size, bool may_shrink, struct err *err);
/*
 * Resizes and a handover exclude each other: none is begun from exports_freeze to exports_thaw. -EBUSY: one is under
 * way, or somebody else has frozen them. On reactor 0.
 */
int exports_freeze(void);
void exports_thaw(void);

/*
 * The stores at the ends of a chain with their options, secrets masked: what a volume without an identity is told
 * from another one by. Malloced; NULL without memory. Pure.
 */
char *export_stores(const struct spec *spec);
/* "10GiB, raw:file"; malloced. */
char *export_describe(const struct spec *spec, uint64_t size);

/* Transmission flags from the capabilities of the chain. Pure. */
uint16_t export_tflags(unsigned caps, bool read_only);

#endif
