/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * mode=writeback: a change is answered when it is in the journal; a read takes what is newer than
 * below from there. What that means for flush, crash, order and errors is in docs/consistency.md,
 * "cache".
 *
 * Reads take no lock. They note which parts the index has, with references, then read the gaps
 * below, then lay the parts over that. A part is taken out of the index only after what it says is
 * below: so a read finds each byte here or there, or there as new as here. What changes meanwhile
 * overlaps with the read, which may see either.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "layer/cache/cache_int.h"
#include "nbdrs/cleanup.h"

/* --- Reading ---------------------------------------------------------------------------------- */

static CO_FN int read_below(struct chan *ch, struct ext e, const struct iov *iov,
			    const struct look *l)
{
	int rc = -ENOENT;

	if (!l->is_gone)
		rc = through_read(ch, e, iov, 0);
	if (rc != -ENOENT || !l->is_known)
		return rc;
	iov_zero(iov, 0, iov->len);
	return 0;
}

/* Not inline: its frame is large, and so is the caller's. */
static __attribute__((noinline)) CO_FN int lay_over(struct back *b, struct ext e,
						    const struct iov *iov, const struct look *l)
{
	int rc = 0;

	for (unsigned i = 0; i < l->n && !rc; i++) {
		const struct dirty_part *p = &l->v[i];
		struct iovec store[IOV_SLICE_MAX];
		struct iov part;

		if (p->type != RECORD_DATA) {
			iov_zero(iov, p->off - e.off, p->end - p->off);
			continue;
		}
		part = iov_slice(iov, p->off - e.off, p->end - p->off, store, IOV_SLICE_MAX);
		rc = journal_read(&b->journal, p->seg, p->at, p->seq, &part);
	}
	return rc;
}

int back_read(struct chan *ch, struct ext e, const struct iov *iov, unsigned fl)
{
	const struct cache *c = ch->layer->self;
	const uint64_t end = e.off + e.len;
	int rc = 0;

	for (uint64_t at = e.off; at < end && !rc;) {
		struct iovec store[IOV_SLICE_MAX];
		struct iov part;
		struct look l;
		const bool is_dirty = dirty_look(&c->back->dirty, e.obj, at, end, &l);
		const struct ext pe = { e.obj, at, l.end - at };

		part = iov_slice(iov, at - e.off, pe.len, store, IOV_SLICE_MAX);
		if (!is_dirty)
			rc = through_read(ch, pe, &part, fl);
		else if (l.has_gaps)
			rc = read_below(ch, pe, &part, &l);
		if (!rc)
			rc = lay_over(c->back, pe, &part, &l);
		look_end(&l);
		at = l.end;
	}
	return rc;
}

bool back_is_clean(struct back *b, struct ext e)
{
	struct look l;
	bool is_clean;

	(void)dirty_look(&b->dirty, e.obj, e.off, e.off + e.len, &l);
	is_clean = !l.n && !l.is_gone;
	look_end(&l);
	return is_clean;
}

/* --- Changing --------------------------------------------------------------------------------- */

static CO_FN int change(struct back *b, struct record *r)
{
	int rc = back_throttle(b, r->iov ? r->len : 0);

	return rc ? rc : back_append(b, r);
}

/* With durability=remote there is no CAN_FUA, and the flag never comes. */
static CO_FN int stable(struct back *b, unsigned fl, int rc)
{
	return rc || !(fl & IO_FUA) ? rc : journal_sync(&b->journal);
}

int back_write(struct chan *ch, struct ext e, const struct iov *iov, unsigned fl)
{
	const struct cache *c = ch->layer->self;
	const uint64_t max = journal_data_max(&c->back->journal);
	int rc = 0;

	for (uint64_t done = 0; done < e.len && !rc;) {
		const uint64_t len = MIN(e.len - done, max);
		struct iovec store[IOV_SLICE_MAX];
		const struct iov part = iov_slice(iov, done, len, store, IOV_SLICE_MAX);
		struct record r = { .type = RECORD_DATA,
				    .obj = e.obj,
				    .off = e.off + done,
				    .len = len,
				    .iov = &part };

		rc = change(c->back, &r);
		done += len;
	}
	return stable(c->back, fl, rc);
}

int back_zero(struct chan *ch, struct ext e, unsigned fl)
{
	const struct cache *c = ch->layer->self;
	struct record r = { .type = fl & IO_PUNCH ? RECORD_ZERO : RECORD_KEEP,
			    .obj = e.obj,
			    .off = e.off,
			    .len = e.len };

	return e.len ? stable(c->back, fl, change(c->back, &r)) : 0;
}

/* --- Flush ------------------------------------------------------------------------------------ */

/* Of objects that were put past the journal. */
static CO_FN int flush_puts(struct chan *ch, struct back *b)
{
	const uint64_t puts = atomic_load(&b->puts);
	int rc;

	if (puts == atomic_load(&b->flushed) || !(ch->kids[0]->layer->caps & CAN_FLUSH))
		return 0;
	rc = ch_flush(ch->kids[0]);
	if (!rc) /* two at a time may set it back, which costs a flush */
		atomic_store(&b->flushed, puts);
	return rc;
}

int back_flush(struct chan *ch)
{
	const struct cache *c = ch->layer->self;
	struct back *b = c->back;
	int rc, puts_rc;

	if (b->is_ro)
		return 0;
	if (!c->is_local) {
		rc = back_drain(b);
		puts_rc = ch_flush(ch->kids[0]);
		return rc ? rc : puts_rc;
	}
	rc = journal_sync(&b->journal);
	puts_rc = flush_puts(ch, b);
	if (!rc)
		rc = puts_rc;
	return rc ? rc : back_error(b);
}

/* --- Map -------------------------------------------------------------------------------------- */

/* Of a disk: 4 MiB of which something is here are data, the rest is as below. */
int back_map(struct chan *ch, struct ext e, struct extmap *m)
{
	const struct cache *c = ch->layer->self;
	struct dirty *d = &c->back->dirty;
	const uint64_t end = e.off + e.len;
	uint64_t at = e.off;
	struct look l;

	while (at < end && dirty_look(d, e.obj, at, end, &l)) {
		look_end(&l);
		if (!extmap_add(m, l.end - at, 0))
			return 0;
		at = l.end;
	}
	if (at > e.off || at == end)
		return 0; /* the rest at the next call */
	/* Up to the next that has something. */
	for (at = l.end; at < end && !dirty_look(d, e.obj, at, end, &l); at = l.end)
		look_end(&l);
	if (at < end)
		look_end(&l);
	return ch_map(ch->kids[0], (struct ext){ e.obj, e.off, at - e.off }, m);
}
