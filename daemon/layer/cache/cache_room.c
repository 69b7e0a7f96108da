/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Room in the journal: segments for the one who writes, and segments given back, oldest first. A
 * segment can go when nobody points into it, but what took the place of its records has to be as
 * stable as they were: below it is flushed, in the journal it is synced, then the segment's heads
 * are cleared, and only then it is used again.
 *
 * Nobody else changes the front of the list: one at a time gives back.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "layer/cache/cache_journal.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"
#include "nbdrs/log.h"
#include "nbdrs/reactor.h"

/* How long a writer waits for room before it asks again. */
#define ROOM_NS UINT64_C(100000000)

/* --- Taking; by the one who writes ------------------------------------------------------------ */

/* The disk is full: what there is must do. */
static void do_with_less(struct journal *j)
{
	pthread_mutex_lock(&j->lock);
	j->max_n = j->used_n + j->spare_n;
	pthread_mutex_unlock(&j->lock);
	log_warn("%s: no space for more of the journal folder=%s bytes=%" PRIu64, j->conf.name,
		 j->conf.folder, j->max_n * j->segment_size);
}

static CO_FN int wait_for_room(struct journal *j)
{
	int rc = j->conf.want_room(j->conf.arg);

	pthread_mutex_lock(&j->lock);
	if (!rc && list_empty(&j->spare))
		rc = j->error ? j->error : j->free_error;
	if (!rc && list_empty(&j->spare))
		(void)co_wq_wait_for(&j->room_wq, &j->lock, ROOM_NS); /* looks anew either way */
	pthread_mutex_unlock(&j->lock);
	return rc;
}

int segment_find(struct journal *j, struct segment **out)
{
	int rc = 0;

	while (!rc) {
		bool may_grow;

		pthread_mutex_lock(&j->lock);
		may_grow = j->used_n + j->spare_n < j->max_n;
		if (!list_empty(&j->spare)) {
			*out = list_entry(list_pop(&j->spare), struct segment, node);
			j->spare_n--;
			pthread_mutex_unlock(&j->lock);
			return 0;
		}
		pthread_mutex_unlock(&j->lock);
		if (!may_grow) {
			rc = wait_for_room(j);
			continue;
		}
		rc = segment_new(j, out);
		if (!rc)
			return 0;
		if (rc == -ENOSPC || rc == -EDQUOT) {
			do_with_less(j);
			rc = 0;
		}
	}
	return rc;
}

/* --- Giving back ------------------------------------------------------------------------------ */

/* How many of the oldest nobody needs. With the lock held. Acquire: see segment_put(). */
static unsigned free_n(struct journal *j, bool all)
{
	const struct segment *head = journal_head(j);
	unsigned n = 0;

	list_for_each(seg, &j->used, struct segment, node)
	{
		if ((seg == head && !all) || atomic_load_explicit(&seg->refs, memory_order_acquire))
			break;
		n++;
	}
	return n;
}

bool journal_can_free(struct journal *j)
{
	bool can;

	pthread_mutex_lock(&j->lock);
	can = free_n(j, false) > 0;
	pthread_mutex_unlock(&j->lock);
	return can;
}

/* The oldest. */
static CO_FN int free_oldest(struct journal *j)
{
	struct segment *seg;
	bool keep;
	int rc;

	pthread_mutex_lock(&j->lock);
	seg = list_entry(j->used.next, struct segment, node);
	pthread_mutex_unlock(&j->lock);
	rc = segment_clear(seg);
	pthread_mutex_lock(&j->lock);
	j->free_error = rc;
	if (rc) {
		pthread_mutex_unlock(&j->lock);
		return rc;
	}
	list_del(&seg->node);
	j->used_n--;
	keep = seg->room == j->segment_size && j->used_n + j->spare_n < j->max_n;
	if (keep) {
		list_add(&j->spare, &seg->node);
		j->spare_n++;
		co_wq_wake_all(&j->room_wq);
	}
	pthread_mutex_unlock(&j->lock);
	/* Its size is not ours any more. Where its file cannot go it stays: it is cleared. */
	if (!keep)
		(void)segment_remove(j, seg);
	return 0;
}

int journal_free_segments(struct journal *j, bool all, int (*flush)(void *arg), void *arg)
{
	unsigned n;
	int rc;

	pthread_mutex_lock(&j->lock);
	n = free_n(j, all);
	pthread_mutex_unlock(&j->lock);
	if (!n)
		return 0;
	rc = flush(arg);
	/* What took the place of these records must not be less stable than they were. */
	if (!rc)
		rc = journal_sync(j);
	for (unsigned i = 0; i < n && !rc; i++)
		rc = free_oldest(j);
	return rc;
}

bool journal_is_idle(struct journal *j, uint64_t ns, uint64_t *due)
{
	const uint64_t now = now_ns();

	pthread_mutex_lock(&j->lock);
	*due = j->used_n ? j->appended_at + ns : UINT64_MAX;
	if (j->error || (*due <= now && (j->is_writing || free_n(j, true) < j->used_n)))
		*due = UINT64_MAX;
	pthread_mutex_unlock(&j->lock);
	return *due <= now;
}

int journal_empty(struct journal *j, int (*flush)(void *arg), void *arg)
{
	uint64_t before;
	int rc;

	pthread_mutex_lock(&j->lock);
	before = j->seq;
	pthread_mutex_unlock(&j->lock);
	rc = flush(arg);
	if (!rc)
		rc = journal_sync(j);
	pthread_mutex_lock(&j->lock);
	if (rc || j->is_writing || j->is_syncing || j->seq != before ||
	    free_n(j, true) < j->used_n) {
		pthread_mutex_unlock(&j->lock);
		return rc;
	}
	j->is_writing = true; /* who appends waits for some milliseconds */
	/* After a failure the head may be a spare one on the disk: it takes no more records. */
	if (j->used_n)
		j->head_at = journal_head(j)->room;
	while (!rc && j->used_n) {
		pthread_mutex_unlock(&j->lock);
		rc = free_oldest(j);
		pthread_mutex_lock(&j->lock);
	}
	journal_stop_writing(j);
	pthread_mutex_unlock(&j->lock);
	return rc;
}
