/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Reading a journal that is there. The segments are put in order by their numbers; each but the
 * last must be whole: its last record is the one that the next segment's head names. In the last
 * one, what cannot be read was never synced and ends the journal. Whatever else is not as it should
 * be is an error: nothing is skipped, nothing is mended.
 *
 * Everything that was read is synced then, and what comes goes into a new segment.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>

#include "layer/cache/cache_journal.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"
#include "nbdrs/log.h"
#include "nbdrs/opt.h"

/* Tries for a file that a killed daemon's ring still writes to. */
enum { LOCK_TRIES = 150 };
#define LOCK_PAUSE_NS UINT64_C(20000000)

struct found {
	struct segment *seg;
	struct segment_head head;
};

struct replay {
	struct journal *j;
	struct err *err;
	struct found *v; /* with a good head */
	size_t n;
	uint64_t last_seq, records;
};

/* --- Finding ---------------------------------------------------------------------------------- */

static int by_segment(const void *a, const void *b)
{
	const struct found *x = a, *y = b;

	return x->seg->number < y->seg->number ? -1 : x->seg->number > y->seg->number;
}

/* A killed daemon's last write may still be on its way: then its file is locked. */
static CO_FN int lock_file(const struct replay *r, int fd)
{
	int rc = 0;

	for (unsigned i = 0; i < LOCK_TRIES; i++) {
		rc = io_flock(fd, r->j->conf.is_ro ? LOCK_SH : LOCK_EX);
		if (rc != -EWOULDBLOCK)
			break;
		co_sleep(LOCK_PAUSE_NS);
	}
	return rc == -EWOULDBLOCK || rc == 0 ? rc : 0; /* a file system without locks */
}

/* Opens one file and reads its head. */
static CO_FN int look_at(struct replay *r, uint32_t file, struct segment *seg, uint8_t *bytes)
{
	char name[32];
	int rc;

	segment_name(file, name, sizeof(name));
	seg->file = file;
	seg->fd = io_openat(r->j->dir_fd, name, r->j->conf.is_ro ? O_RDONLY : O_RDWR, 0);
	if (seg->fd < 0)
		return seg->fd;
	rc = lock_file(r, seg->fd);
	return rc ? rc : segment_read_heads(seg->fd, &seg->room, bytes);
}

static int judge_head(struct replay *r, const struct segment *seg, const uint8_t *bytes,
		      struct segment_head *head, bool *is_spare)
{
	const struct journal_conf *c = &r->j->conf;
	char name[32];

	segment_name(seg->file, name, sizeof(name));
	*is_spare = false;
	switch (segment_head_read(bytes, head)) {
	case HEAD_SPARE: *is_spare = true; return 0;
	case HEAD_GOOD: break;
	case HEAD_NEWER:
		return err_set(
			r->err, -EPROTONOSUPPORT,
			"layer cache: %s/%s was written by a newer version of nbdrs; use that",
			c->folder, name);
	case HEAD_BAD:
		return err_set(
			r->err, -EUCLEAN,
			"layer cache: %s/%s is damaged: its head cannot be read. What it held and was not "
			"in the store yet is lost; to go on without it, move the folder away",
			c->folder, name);
	}
	if (segment_head_is_of(head, c->volume))
		return 0;
	return err_set(
		r->err, -EBUSY,
		"layer cache: %s holds unsaved data of another volume, %s; this one is %s. Give it a folder "
		"of its own, or serve that one until its data is saved, or say volume=%s if it is the same",
		c->folder, head->volume, c->volume, head->volume);
}

static int former(const struct replay *r, const char *was, const char *is)
{
	uint64_t len = 0;
	char unsaved[32];

	for (size_t i = 0; i < r->n; i++)
		len += r->v[i].seg->room - SEGMENT_HEAD;
	format_size(len, unsaved, sizeof(unsaved));
	return err_set(
		r->err, -EBUSY,
		"layer cache: %s has unsaved data, up to %s, of a former volume of this name: identity %s, "
		"not %s. Nothing was changed; to go on without that data %s",
		r->j->conf.folder, unsaved, was, is, r->j->conf.mend);
}

/*
 * One that was removed and made again has the name, and nothing of the data: see docs/consistency.md, "A former
 * volume of that name". Two different ones in a folder are not both this one.
 */
static int judge_identity(const struct replay *r)
{
	const char *is = r->j->conf.identity;

	for (size_t i = 0; i < r->n; i++) {
		const struct segment_head *head = &r->v[i].head;

		if (segment_head_is_of_former(head, is))
			return former(r, head->identity, is);
		if (!*is)
			is = head->identity;
	}
	return 0;
}

static CO_FN int add_file(struct replay *r, uint32_t file)
{
	struct segment *seg = calloc(1, sizeof(*seg));
	struct segment_head head;
	uint8_t bytes[SEGMENT_HEADS];
	bool is_spare;
	char name[32];
	int rc;

	if (!seg)
		return err_set(r->err, -ENOMEM, "out of memory");
	list_init(&seg->node);
	list_add(&r->j->spare, &seg->node); /* journal_close() has it then */
	r->j->spare_n++;
	rc = look_at(r, file, seg, bytes);
	if (rc) {
		segment_name(file, name, sizeof(name));
		return err_set(r->err, rc, "layer cache: %s/%s cannot be read: %s",
			       r->j->conf.folder, name, err_name(rc));
	}
	rc = judge_head(r, seg, bytes, &head, &is_spare);
	if (rc || is_spare)
		return rc;
	seg->number = head.number;
	memcpy(seg->salt, head.salt, sizeof(seg->salt));
	r->v[r->n++] = (struct found){ seg, head };
	return 0;
}

/* --- Reading ---------------------------------------------------------------------------------- */

static int damaged(const struct replay *r, const struct segment *seg)
{
	char name[32];

	segment_name(seg->file, name, sizeof(name));
	return err_set(
		r->err, -EUCLEAN,
		"layer cache: %s/%s is damaged: a record behind number %" PRIu64
		" cannot be read, and it was synced. Nothing was changed; to go on without this journal, and "
		"what was not in the store yet, move the folder away",
		r->j->conf.folder, name, r->last_seq);
}

/*
 * Behind what cannot be read: a record that says that more was synced than what was read so far.
 * Then something was there, and is damaged. All the others were written after the last sync, and a
 * crash of the machine keeps of those what it likes.
 */
static bool misses_synced(const struct replay *r, const struct segment *seg, const uint8_t *all,
			  uint64_t at)
{
	struct record rec;
	struct obj obj;

	for (at += 8; at + RECORD_HEAD <= seg->room; at += 8)
		if (journal_record_parse(all + at, seg->room - at, seg, r->last_seq, &rec, &obj) &&
		    journal_record_synced(&rec) > r->last_seq)
			return true;
	return false;
}

/* The records of one segment. */
struct reading {
	struct replay *r;
	struct segment *seg;
	uint8_t *all;  /* what it holds */
	uint64_t last; /* its last record's number where that is known */
	uint64_t end;  /* of its last record that was shown */
};

/* Shows them. Up to 64 MiB of checksums: for offload(). */
static int show_records(void *arg)
{
	struct reading *g = arg;
	struct replay *r = g->r;
	struct segment *seg = g->seg;
	uint64_t at = SEGMENT_HEAD;
	struct record rec;
	struct obj obj;

	while (journal_record_parse(g->all + at, seg->room - at, seg, r->last_seq, &rec, &obj) &&
	       rec.seq <= g->last && journal_record_data_is_good(g->all + at, &rec)) {
		rec.seg = seg;
		rec.at += at;
		r->last_seq = rec.seq;
		r->j->conf.show(r->j->conf.arg, &rec);
		r->records++;
		at += journal_record_size(&rec);
	}
	g->end = at;
	if (g->last == UINT64_MAX ? misses_synced(r, seg, g->all, at) : r->last_seq != g->last)
		return damaged(r, seg);
	return 0;
}

/*
 * What was read may be in the page cache only, and called stable by the kernel: after a sync that failed in the
 * daemon before, the next one succeeds and writes nothing. So it is written again, with the same bytes.
 */
static CO_FN int write_again(const struct reading *g)
{
	struct iovec v = { g->all, g->end };
	const int rc = io_pwrite_full(g->seg->fd, &v, 1, 0, 0);

	return rc ? err_set(g->r->err, rc, "layer cache: %s: the journal cannot be written: %s",
			    g->r->j->conf.folder, err_name(rc))
		  : 0;
}

static CO_FN int read_segment(struct replay *r, struct segment *seg, uint64_t last)
{
	struct reading g = { .r = r, .seg = seg, .last = last };
	struct iovec v;
	int rc;

	g.all = mmap(NULL, seg->room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (g.all == MAP_FAILED)
		return err_set(r->err, -ENOMEM, "out of memory");
	v = (struct iovec){ g.all, seg->room };
	rc = io_pread_full(seg->fd, &v, 1, 0);
	if (rc)
		(void)err_set(r->err, rc, "layer cache: %s: the journal cannot be read: %s",
			      r->j->conf.folder, err_name(rc));
	else
		rc = offload(show_records, &g);
	/* All before the newest one was synced when that was begun. */
	if (!rc && last == UINT64_MAX && !r->j->conf.is_ro)
		rc = write_again(&g);
	(void)munmap(g.all, seg->room); /* can't fail for ours */
	return rc;
}

static CO_FN int read_all(struct replay *r)
{
	int rc = 0;

	r->last_seq = r->n ? r->v[0].head.last_seq : 0;
	for (size_t i = 0; i < r->n && !rc; i++) {
		const bool is_last = i + 1 == r->n;
		const uint64_t last = is_last ? UINT64_MAX : r->v[i + 1].head.last_seq;
		struct segment *seg = r->v[i].seg;

		if (!is_last && r->v[i + 1].seg->number != seg->number + 1)
			return err_set(r->err, -EUCLEAN,
				       "layer cache: %s: part %" PRIu64
				       " of the journal is missing; put its file back",
				       r->j->conf.folder, seg->number + 1);
		list_del(&seg->node);
		list_add(&r->j->used, &seg->node);
		r->j->spare_n--;
		r->j->used_n++;
		rc = read_segment(r, seg, last);
	}
	return rc;
}

/*
 * After a crash of the daemon alone not all of it is on the disk: neither records, nor names, nor that
 * a segment was cleared, which must not be forgotten once it is used again.
 */
static CO_FN int sync_all(struct replay *r)
{
	int rc = io_fsync(r->j->dir_fd);

	list_for_each(seg, &r->j->used, struct segment, node) if (!rc) rc = io_fdatasync(seg->fd);
	list_for_each(seg, &r->j->spare, struct segment, node) if (!rc) rc = segment_clear(seg);
	return rc ? err_set(r->err, rc, "layer cache: %s: the journal cannot be synced: %s",
			    r->j->conf.folder, err_name(rc))
		  : 0;
}

/* What a smaller `size` has no use for, or was never finished. */
static CO_FN void drop_odd_spares(struct journal *j)
{
	list_for_each(seg, &j->spare, struct segment, node)
	{
		if (seg->room == j->segment_size && j->used_n + j->spare_n <= j->max_n)
			continue;
		list_del(&seg->node);
		j->spare_n--;
		(void)segment_remove(j, seg); /* empty: may as well stay */
	}
}

int journal_replay(struct journal *j, struct err *err)
{
	struct replay r = { .j = j, .err = err };
	uint32_t *files = NULL;
	size_t n = 0;
	int rc = journal_folder_list(j->dir_fd, &files, &n);

	if (rc)
		(void)err_set(err, rc, "layer cache: %s cannot be listed: %s", j->conf.folder,
			      err_name(rc));
	r.v = calloc(n + 1, sizeof(*r.v));
	if (!rc && !r.v)
		rc = err_set(err, -ENOMEM, "out of memory");
	for (size_t i = 0; i < n && !rc; i++)
		rc = add_file(&r, files[i]);
	j->last_file = n ? files[n - 1] : 0;
	if (!rc)
		rc = judge_identity(&r);
	if (!rc && r.n) {
		qsort(r.v, r.n, sizeof(*r.v), by_segment);
		rc = read_all(&r);
	}
	if (!rc && !j->conf.is_ro)
		rc = sync_all(&r);
	if (!rc && !j->conf.is_ro)
		drop_odd_spares(j);
	if (!rc && r.n) {
		j->seq = j->written = j->synced = r.last_seq;
		j->head_at = r.v[r.n - 1].seg->room; /* what comes goes into a new one */
		log_info("%s: journal read folder=%s records=%" PRIu64 " segments=%zu",
			 j->conf.name, j->conf.folder, r.records, r.n);
	}
	free(r.v);
	free(files);
	return rc;
}
