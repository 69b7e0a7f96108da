/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * An export gets another size while it is served.
 *
 *	before	the chain checks, and does what takes long
 *	pause	new requests wait outside of the chain; those in it end, on every reactor, or it is given up
 *	now	nothing is in the chain: it gets its size, and so does the export; the pause ends
 *	after	the chain clears away
 *
 * Memory that was lent may still be on its way to a socket meanwhile; layers keep it readable. A request that came in
 * under the old size is looked at again when it goes into the chain.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/export.h"
#include "nbdrs/log.h"
#include "nbdrs/reactor.h"

#define MS UINT64_C(1000000)

enum { DRAIN_MS = 10000, LOOK_MS = 1, SECTOR = 512 };

/* Reactor 0: one resize at a time, and none while everything is handed over. */
static bool is_resizing, is_frozen;

int exports_freeze(void)
{
	if (is_resizing || is_frozen)
		return -EBUSY;
	is_frozen = true;
	return 0;
}

void exports_thaw(void)
{
	is_frozen = false;
}

struct drain {
	struct export *e;
	uint64_t until_ns;
};

/* On each reactor: those of its requests that are in the chain end. Nothing announces the last one. */
static CO_FN int drain_here(void *arg)
{
	const struct drain *d = arg;
	const struct export_stats *s = &d->e->stats[reactor_index(reactor_self())];

	while (atomic_load(&s->entered) != atomic_load(&s->left)) {
		if (now_ns() > d->until_ns)
			return -EBUSY;
		co_sleep(LOOK_MS * MS);
	}
	return 0;
}

static CO_FN int pause_export(struct export *e, struct err *err)
{
	struct drain d = { .e = e, .until_ns = now_ns() + DRAIN_MS * MS };
	int rc = 0;

	atomic_store(&e->is_paused, true);
	for (unsigned i = 0; i < reactors_n() && !rc; i++)
		rc = reactor_call(reactor_get(i), drain_here, &d);
	if (rc)
		atomic_store(&e->is_paused, false);
	if (rc == -EBUSY)
		return err_set(err, rc, "requests that are in flight do not end: is the store away? Try again later");
	return rc ? err_set(err, rc, "out of memory") : 0;
}

static CO_FN int check(struct export *e, uint64_t size, bool may_shrink, struct err *err)
{
	if (e->tflags & NBD_FLAG_READ_ONLY)
		return err_set(err, -EROFS, "it is served read-only");
	if (size == 0 || size > INT64_MAX || size % SECTOR)
		return err_set(err, -EINVAL, "%" PRIu64 " bytes: a size is a multiple of 512, from 512 to 2^63 - 512",
			       size);
	if (size < e->size && !may_shrink)
		return err_set(err, -EINVAL, "it has %" PRIu64 " bytes, and what lies behind %" PRIu64
			       " would be lost; make file systems and partitions smaller first, then use --shrink",
			       (uint64_t)e->size, size);
	if (is_resizing)
		return err_set(err, -EBUSY, "another resize is under way");
	if (is_frozen)
		return err_set(err, -EBUSY, "the daemon is going over to a new program; try again in a moment");
	return 0;
}

/* Between pause and its end. */
static CO_FN int resize_paused(struct export *e, struct chan *c, uint64_t size, struct err *err)
{
	char *text = export_describe(e->spec, size);
	int rc = text ? ch_resize(c, size, RESIZE_NOW, err) : err_set(err, -ENOMEM, "out of memory");

	if (rc) {
		free(text);
		return rc;
	}
	e->size = chain_top(e->chain)->size;
	free(e->description);
	e->description = text;
	return 0;
}

static CO_FN int resize(struct export *e, uint64_t size, struct err *err)
{
	const uint64_t was = e->size, begun = now_ns();
	struct chan *c;
	uint64_t paused;
	int rc;

	c = chain_chan(e->chain, &rc);
	if (!c)
		return err_set(err, rc, "no channel: %s", err_name(rc));
	rc = ch_resize(c, size, RESIZE_BEFORE, err);
	if (!rc)
		rc = pause_export(e, err);
	if (rc)
		return rc;
	paused = now_ns();
	rc = resize_paused(e, c, size, err);
	atomic_store(&e->is_paused, false);
	paused = now_ns() - paused;
	if (rc)
		return rc;
	log_info("resized export=%s bytes=%" PRIu64 " was=%" PRIu64 " paused_us=%" PRIu64, e->name, size, was,
		 paused / 1000);
	if (ch_resize(c, size, RESIZE_AFTER, err))
		log_warn("after a resize something is left behind the end, for the next one to remove export=%s "
			 "error=\"%s\"", e->name, err->msg);
	log_debug("resize took ms=%" PRIu64, (now_ns() - begun) / MS);
	return 0;
}

int export_resize(struct export *e, uint64_t size, bool may_shrink, struct err *err)
{
	int rc = 0;

	if (size != e->size)
		rc = check(e, size, may_shrink, err);
	if (!rc && size != e->size) {
		is_resizing = true;
		rc = resize(e, size, err);
		is_resizing = false;
	}
	return rc ? err_prefix(err, rc, "export '%.64s'", e->name) : 0;
}
