/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The journal at work: records in, syncs. Room for them is in cache_room.c. Format and states are
 * in cache_journal.h.
 *
 * Appending. Records queue up. Whoever finds nobody writing writes for all: a batch by one call,
 * then each record is shown in order, then their makers wake up. So there is one order of writing,
 * showing and answering, and many writers at once cost one call. The next writer is the first of
 * those who came meanwhile.
 *
 * Syncing. One fdatasync at a time (the kernel reports a loss only once), of the head: older
 * segments were synced when they ceased to be it. Those who come while it runs share the next.
 *
 * When a write fails its makers are told, and the numbers of those records are not used again: what
 * the file has of them is written over, or ends the segment. A segment whose head could not be written
 * is cleared or removed before anything else is written; if neither can be done the journal has ended.
 */
#include "layer/cache/cache_journal.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"
#include "nbdrs/log.h"
#include "nbdrs/reactor.h"

/* Bytes of a batch. */
enum { BATCH_LEN = 4 << 20 };

/* The checksum of so much data takes some 50 us: a thread makes it. */
enum { SUM_LEN = 1 << 20 };

enum { SEGMENT_MIN = 256 << 10, SEGMENT_MAX = 64 << 20, SEGMENTS = 32 };

/* --- Life ------------------------------------------------------------------------------------- */

static uint64_t choose_segment_size(uint64_t size)
{
	uint64_t n = SEGMENT_MIN;

	while (n < SEGMENT_MAX && n * SEGMENTS < size)
		n *= 2;
	return n;
}

uint64_t journal_data_max(const struct journal *j)
{
	return j->segment_size / 4;
}

/* With two there is always one that is not the head, and can be given back. */
static CO_FN int make_first(struct journal *j, struct err *err)
{
	while (j->used_n + j->spare_n < 2) {
		struct segment *seg;
		int rc = segment_new(j, &seg);

		if (rc)
			return err_set(err, rc,
				       "layer cache: %s: no journal of %" PRIu64
				       " bytes can be made: %s",
				       j->conf.folder ? j->conf.folder : "memory",
				       2 * j->segment_size, strerror(-rc));
		list_add(&j->spare, &seg->node);
		j->spare_n++;
	}
	return 0;
}

int journal_open(struct journal *j, const struct journal_conf *conf, struct err *err)
{
	int rc = 0;

	*j = (struct journal){ .conf = *conf, .dir_fd = -1 };
	(void)pthread_mutex_init(&j->lock, NULL); /* can't fail for a default one */
	list_init(&j->waiting);
	list_init(&j->used);
	list_init(&j->spare);
	co_wq_init(&j->sync_wq);
	co_wq_init(&j->room_wq);
	j->segment_size = choose_segment_size(conf->size);
	j->max_n = (unsigned)MAX(conf->size / j->segment_size, UINT64_C(2));
	if (conf->folder)
		rc = journal_folder_open(j, err);
	if (!rc && j->dir_fd >= 0)
		rc = journal_replay(j, err);
	if (!rc && !conf->is_ro)
		rc = make_first(j, err);
	return rc;
}

static CO_FN void close_all(struct list *list)
{
	while (!list_empty(list)) {
		struct segment *seg = list_entry(list_pop(list), struct segment, node);

		if (seg->fd >= 0)
			(void)io_close(seg->fd); /* what must be stable has been synced */
		segment_free(seg);
	}
}

void journal_close(struct journal *j)
{
	close_all(&j->used);
	close_all(&j->spare);
	if (j->dir_fd >= 0)
		(void)io_close(j->dir_fd); /* only looked at */
	j->dir_fd = -1;
	(void)pthread_mutex_destroy(&j->lock);
}

struct segment *journal_head(struct journal *j)
{
	return list_empty(&j->used) ? NULL : list_entry(j->used.prev, struct segment, node);
}

/* --- Syncing ---------------------------------------------------------------------------------- */

/* With the lock held. */
static void set_error(struct journal *j, int rc)
{
	if (j->error)
		return;
	j->error = rc;
	log_error(
		"%s: the journal cannot be synced: writes and flushes fail from now on folder=%s error=%s",
		j->conf.name, j->conf.folder, err_name(rc));
}

/* With the lock held, but not meanwhile; nobody else syncs. */
static CO_FN void sync_once(struct journal *j)
{
	struct segment *head = journal_head(j);
	const uint64_t to = j->written;
	int rc;

	assert(head); /* something was written that is not synced */
	j->is_syncing = true;
	segment_get(head);
	pthread_mutex_unlock(&j->lock);
	rc = head->fd < 0 ? 0 : io_fdatasync(head->fd);
	pthread_mutex_lock(&j->lock);
	segment_put(head);
	j->is_syncing = false;
	j->syncs++;
	if (rc)
		set_error(j, rc);
	else
		j->synced = MAX(j->synced, to);
	co_wq_wake_all(&j->sync_wq);
}

int journal_sync(struct journal *j)
{
	uint64_t target;
	int rc;

	pthread_mutex_lock(&j->lock);
	target = j->written;
	while (j->synced < target && !j->error) {
		if (j->is_syncing)
			co_wq_wait(&j->sync_wq, &j->lock);
		else
			sync_once(j);
	}
	rc = j->error;
	pthread_mutex_unlock(&j->lock);
	return rc;
}

int journal_covers(struct journal *j, uint64_t seq)
{
	int rc = 0;

	if (likely(!atomic_load(&j->error)))
		return 0;
	pthread_mutex_lock(&j->lock);
	if (seq > j->synced)
		rc = j->error;
	pthread_mutex_unlock(&j->lock);
	return rc;
}

int journal_read(struct journal *j, struct segment *seg, uint64_t at, uint64_t seq,
		 const struct iov *iov)
{
	const int rc = segment_read(seg, at, iov);

	return rc ? rc : journal_covers(j, seq);
}

/* --- A new head; by the one who writes -------------------------------------------------------- */

/*
 * A head that could not be written may be there all the same, and would end the segment in which the
 * journal goes on: no record is written before it is gone.
 */
static CO_FN void take_back(struct journal *j, struct segment *seg)
{
	int rc = segment_clear(seg);

	if (rc) {
		rc = segment_remove(j, seg);
		if (!rc)
			rc = io_fsync(j->dir_fd);
		seg = NULL;
	}
	pthread_mutex_lock(&j->lock);
	if (rc)
		set_error(j, rc);
	if (seg) {
		list_add(&j->spare, &seg->node);
		j->spare_n++;
	}
	pthread_mutex_unlock(&j->lock);
}

/* `old`: the one so far; NULL = none. */
static CO_FN int new_head(struct journal *j, const struct segment *old)
{
	const uint64_t number = old ? old->number + 1 : 1; /* `old` may be given back meanwhile */
	struct segment *seg;
	int rc = journal_sync(j);

	if (!rc)
		rc = segment_find(j, &seg);
	if (rc)
		return rc;
	seg->number = number;
	rc = segment_write_head(j, seg, j->written);
	if (rc) {
		take_back(j, seg);
		return rc;
	}
	pthread_mutex_lock(&j->lock);
	list_add(&j->used, &seg->node);
	j->used_n++;
	j->head_at = SEGMENT_HEAD;
	pthread_mutex_unlock(&j->lock);
	return 0;
}

/* --- Appending -------------------------------------------------------------------------------- */

struct batch {
	struct record *r[JOURNAL_BATCH];
	unsigned n;
	uint64_t len;
};

/* Takes what fits in `room` bytes. With the lock held. */
static void take_batch(struct journal *j, struct batch *b, uint64_t room)
{
	b->n = 0;
	b->len = 0;
	while (b->n < JOURNAL_BATCH && !list_empty(&j->waiting)) {
		struct record *r = list_entry(j->waiting.next, struct record, node);
		const uint64_t len = journal_record_size(r);

		if (b->len + len > room || (b->n && b->len + len > BATCH_LEN))
			return;
		list_del(&r->node);
		b->r[b->n++] = r;
		b->len += len;
	}
}

/* Numbers and places; the segments of one call into j->iovs. Returns how many. */
static unsigned lay_out(struct journal *j, struct batch *b, struct segment *head, uint64_t synced)
{
	static char padding[8]; /* nobody writes to it */
	uint64_t at = j->head_at;
	unsigned n = 0;

	for (unsigned i = 0; i < b->n; i++) {
		struct record *r = b->r[i];
		const uint64_t data = journal_record_data_size(r);

		r->seq = j->seq + 1 + i;
		r->seg = head;
		r->at = at + r->head_len;
		journal_record_seal(r, synced);
		j->iovs[n++] = (struct iovec){ r->head, r->head_len };
		for (unsigned k = 0; data && k < r->iov->n; k++)
			j->iovs[n++] = r->iov->v[k];
		if (data > r->len)
			j->iovs[n++] = (struct iovec){ padding, data - r->len };
		at += journal_record_size(r);
	}
	return n;
}

static CO_FN int write_batch(struct journal *j, struct batch *b, struct segment *head,
			     uint64_t synced)
{
	const unsigned n = lay_out(j, b, head, synced);
	uint64_t at = j->head_at;

	if (head->fd >= 0)
		return io_pwrite_full(head->fd, j->iovs, n, at, 0);
	for (unsigned i = 0; i < n; i++) {
		memcpy(head->mem + at, j->iovs[i].iov_base, j->iovs[i].iov_len);
		at += j->iovs[i].iov_len;
	}
	return 0;
}

/* Answers them. With the lock held. */
static void finish(struct batch *b, int rc)
{
	for (unsigned i = 0; i < b->n; i++) {
		struct record *r = b->r[i];
		struct co *co = r->co;

		r->rc = rc;
		r->is_done = true; /* from the unlock on *r may be gone */
		co_wake(co);
	}
}

static void finish_waiting(struct journal *j, int rc)
{
	struct batch b = { .n = 0 };

	do {
		take_batch(j, &b, UINT64_MAX);
		finish(&b, rc);
	} while (b.n);
}

void journal_stop_writing(struct journal *j)
{
	j->is_writing = false;
	if (!list_empty(&j->waiting))
		co_wake(list_entry(j->waiting.next, struct record, node)->co);
}

/*
 * After `written` was raised: who finds in the index what one of them says, or that it took another one's place,
 * then syncs all of them. The lock is held before and after, not meanwhile.
 */
static void show(struct journal *j, const struct batch *b)
{
	pthread_mutex_unlock(&j->lock);
	for (unsigned i = 0; i < b->n; i++)
		j->conf.show(j->conf.arg, b->r[i]);
	pthread_mutex_lock(&j->lock);
}

/* One batch. The lock is held before and after, not meanwhile. */
static CO_FN void lead(struct journal *j)
{
	struct segment *head = journal_head(j);
	const uint64_t synced = j->synced;
	struct batch b = { .n = 0 };
	int rc = j->error;

	j->is_writing = true;
	if (!rc && head)
		take_batch(j, &b, head->room - MIN(j->head_at, head->room));
	pthread_mutex_unlock(&j->lock);
	if (!rc && !b.n)
		rc = new_head(j, head);
	else if (!rc)
		rc = write_batch(j, &b, head, synced);
	pthread_mutex_lock(&j->lock);
	j->seq += b.n;
	if (!rc && b.n) {
		j->written = j->seq;
		j->appended_at = now_ns();
		j->head_at += b.len;
		show(j, &b);
	}
	if (rc && !b.n)
		finish_waiting(j, rc); /* no segment to be had */
	finish(&b, rc);
	journal_stop_writing(j);
}

static int prepare(void *arg)
{
	journal_record_prepare(arg);
	return 0;
}

int journal_append(struct journal *j, struct record *r)
{
	r->co = co_self();
	r->is_done = false;
	if (r->type == RECORD_DATA && r->len >= SUM_LEN)
		(void)offload(prepare, r); /* cannot fail */
	else
		(void)prepare(r);
	pthread_mutex_lock(&j->lock);
	list_add(&j->waiting, &r->node);
	while (!r->is_done) {
		if (!j->is_writing) {
			lead(j);
			continue;
		}
		pthread_mutex_unlock(&j->lock);
		co_park();
		pthread_mutex_lock(&j->lock);
	}
	pthread_mutex_unlock(&j->lock);
	return r->rc;
}

/* --- Looking at it ---------------------------------------------------------------------------- */

/* With the lock held. */
static uint64_t used_bytes(const struct journal *j)
{
	if (!j->used_n)
		return 0;
	return (j->used_n - 1) * j->segment_size + MIN(j->head_at, j->segment_size);
}

uint64_t journal_fill(struct journal *j)
{
	uint64_t fill;

	pthread_mutex_lock(&j->lock);
	fill = used_bytes(j) * 1000 / j->max_n * 1000 / j->segment_size;
	pthread_mutex_unlock(&j->lock);
	return fill;
}

void journal_view(struct journal *j, struct journal_view *v)
{
	pthread_mutex_lock(&j->lock);
	*v = (struct journal_view){
		.used = used_bytes(j),
		.limit = j->max_n * j->segment_size,
		.syncs = j->syncs,
		.error = j->error,
	};
	pthread_mutex_unlock(&j->lock);
}
