/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Nodes that are left out, so that a volume can be opened without them: where `quorum` or more may be away, those that
 * are there at open could not know otherwise whether one that is not has the last changes (docs/consistency.md).
 *
 *	none left out
 *	-> nodes are away: not joined any more, requests that counted on them are through, the rest is complete
 *	left out, named in the record of what is in doubt, as it gets to the others
 *	-> one is back: the record without them is durable on one of the others, which makes what the rest have void
 *	none left out; the node joins as any that comes late
 *
 * Only one set of nodes at a time, and what is in none of the records is no such set: so an old record that a node has
 * from another time is never that of all who must have it.
 */
#include <errno.h>

#include "layer/distributed/distributed.h"

/* Whether it may be: all of those there that are not left out say the same. With the volume not open yet. */
static bool is_possible(const struct dist *d, uint64_t out, uint64_t there)
{
	for (unsigned i = 0; i < d->placing->nodes; i++)
		if (there & ~out & bit(i) && d->doubt.copies[i].named != out)
			return false;
	return true;
}

int out_find(struct dist *d, uint64_t there)
{
	struct doubt *t = &d->doubt;

	for (unsigned i = 0; i < d->placing->nodes; i++) {
		uint64_t out = there & bit(i) ? t->copies[i].named : 0;

		t->version += out != 0; /* so that it is put anew, whatever it is worth */
		if (out == 0 || out & bit(i) || out == t->out || !is_possible(d, out, there))
			continue;
		if (t->out != 0)
			return -EILSEQ;
		t->out = out;
		t->is_out_named = true;
	}
	return 0;
}

bool out_is_enough(const struct dist *d)
{
	for (unsigned i = 0; i < d->placing->nodes; i++)
		if (!d->nodes[i].is_joined && !(d->doubt.out & bit(i)))
			return false;
	return d->doubt.out != 0;
}

/* Whether nodes that are not away have all that was answered. */
static bool is_complete(struct dist *d, uint64_t away)
{
	bool is_so = d->unsettled_n == 0;

	/* Whoever was answered without them before they left has marked them by now, under this lock. */
	pthread_mutex_lock(&d->lock);
	for (unsigned i = 0; i < d->placing->nodes; i++)
		if (!(away & bit(i)))
			is_so = is_so && d->nodes[i].is_joined && d->nodes[i].stale_n == 0;
	pthread_mutex_unlock(&d->lock);
	return is_so;
}

int out_end(struct chan *c)
{
	struct dist *d = c->layer->self;
	struct doubt *t = &d->doubt;
	uint64_t version;
	int rc;

	if (t->out == 0)
		return 0;
	if (c->layer->want_ro)
		return -EROFS;
	pthread_mutex_lock(&t->lock);
	t->version += t->is_out_named;
	t->is_out_named = false;
	version = t->version;
	pthread_mutex_unlock(&t->lock);
	rc = doubt_wait(c, version, 1);
	if (rc != 0)
		return rc;
	pthread_mutex_lock(&t->lock);
	t->out = 0;
	t->version++; /* what names nothing is deleted */
	pthread_mutex_unlock(&t->lock);
	return 0;
}

static CO_FN void leave_out(struct chan *c)
{
	struct dist *d = c->layer->self;
	struct doubt *t = &d->doubt;
	uint64_t away = 0;

	if (t->out != 0 && !t->is_out_named)
		(void)out_end(c); /* could not be ended before */
	for (unsigned i = 0; i < d->placing->nodes; i++)
		if (!d->nodes[i].is_joined || d->nodes[i].is_away)
			away |= bit(i);
	if (t->out != 0 || count(away) < d->quorum || count(away) > d->replicas - d->quorum ||
	    !is_complete(d, away))
		return;
	doubt_leaves(d, away);
	wait_for_jobs(d);
	if (!is_complete(d, away))
		return; /* they come back as nodes that were not there */
	pthread_mutex_lock(&t->lock);
	t->out = away;
	t->is_out_named = true;
	t->version++;
	pthread_mutex_unlock(&t->lock);
	log_info("nodes that are away are left out until they are back layer=distributed nodes=%u",
		 count(away));
}

void out_review(struct chan *c)
{
	struct dist *d = c->layer->self;

	co_mutex_lock(&d->call_one);
	leave_out(c);
	co_mutex_unlock(&d->call_one);
}
