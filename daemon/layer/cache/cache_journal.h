/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The journal of layer `cache`: changes in the order in which they are answered, each kept until
 * what it says is below. On disk in segments, files of one size in a folder of their own; or in
 * memory, where a crash forgets it.
 *
 * A segment is full, and its successor begins, when a record does not fit any more. Only the
 * newest, the head, is written. States of a segment:
 *
 *	spare	its heads are zeroes
 *	used	it has a head; records follow. Given back oldest first, when nobody points into it (refs)
 *
 * On disk (little endian, see cache_record.c):
 *
 *	segment	head (512 bytes: magic, version, number, the last sequence number before it, salt,
 *		volume, its identity, checksum), the same again, zeroes up to 4096, records
 *	record	head (64 bytes: magic, type, sequence number, extent, checksums of data and head),
 *		name of the object, data; each padded to 8 bytes
 *
 * Segment numbers have no gaps, sequence numbers only grow. A segment begins when the one before
 * has been synced. So a record that cannot be read ends the journal in the newest segment, and
 * anywhere else is damage. Checksums of records are salted by segment: what a former use left there
 * is never taken for a record, nor what a guest wrote.
 */
#ifndef NBDRS_LAYER_CACHE_JOURNAL_H
#define NBDRS_LAYER_CACHE_JOURNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "nbdrs/backend.h"
#include "nbdrs/co.h"
#include "nbdrs/iov.h"
#include "nbdrs/layer.h"
#include "nbdrs/list.h"

enum {
	SEGMENT_HEAD = 4096,
	RECORD_HEAD = 64,
	RECORD_HEAD_MAX = RECORD_HEAD + 256, /* with the name */
	JOURNAL_BATCH = 32,                  /* records written by one call */
	JOURNAL_IOVS = JOURNAL_BATCH * (2 + IOV_SLICE_MAX),
};

struct segment {
	struct list node; /* in `used`, oldest first, or `spare` */
	uint64_t number;
	uint64_t room;         /* bytes, with its head */
	_Atomic uint64_t refs; /* of those who point into it or use its fd */
	uint8_t salt[8];
	uint32_t file; /* the number in its file's name */
	int fd;        /* -1: in memory */
	uint8_t *mem;
};

enum record_type {
	RECORD_DATA = 1,
	RECORD_ZERO = 2, /* the space may be given back */
	RECORD_KEEP = 3, /* zeroes that keep their space */
	RECORD_GONE = 4, /* the object is deleted */
	RECORD_VOID = 5, /* of this object nothing before this counts any more */
};

/*
 * A change. The first four are the caller's; it lives on its stack until journal_append() returns.
 */
struct record {
	enum record_type type;
	const struct obj *obj;
	uint64_t off, len;
	const struct iov *iov; /* of RECORD_DATA */

	uint64_t seq;
	struct segment *seg; /* where its data is, at `at` */
	uint64_t at;
	struct list node;
	struct co *co;
	int rc;
	bool is_done;
	uint16_t head_len; /* padded */
	_Alignas(8) uint8_t head[RECORD_HEAD_MAX];
};

struct journal_conf {
	const char *folder;   /* borrowed; NULL = in memory */
	const char *volume;   /* borrowed; whose it is */
	const char *identity; /* borrowed; of that volume, "" = not known; see nbdrs/identity.h */
	const char *mend;     /* borrowed; how to go on without a former volume's journal */
	const char *name;     /* borrowed; of the export, for the log */
	uint64_t size;        /* bytes in all */
	bool is_ro;           /* only looked at */
	/*
	 * Shows a record, in order: once when it was written, and again at replay, in a thread of
	 * offload()'s. Never suspends.
	 */
	void (*show)(void *arg, const struct record *r);
	/* There is no room: asks for some. Not 0 = what waits for it fails with that. */
	int (*want_room)(void *arg);
	void *arg;
};

struct journal {
	struct journal_conf conf;
	uint64_t segment_size;
	int dir_fd; /* -1 */

	pthread_mutex_t lock; /* guards all below */
	struct list waiting;  /* records */
	struct list used, spare;
	unsigned used_n, spare_n, max_n;
	uint32_t last_file;
	bool is_writing; /* somebody writes: `head` and `head_at` are its */
	uint64_t head_at;
	uint64_t seq;         /* given last */
	uint64_t written;     /* all up to this one are written and shown */
	uint64_t synced;      /* and these are stable */
	uint64_t syncs;       /* done */
	uint64_t appended_at; /* ns: the last record */
	bool is_syncing;
	struct co_wq sync_wq;
	struct co_wq room_wq; /* where the writer waits for a segment */
	_Atomic int error;    /* of a sync, or of a bad head that is still there: it stays */
	int free_error;       /* of the last segment that was to be given back; 0 after a success */
	struct iovec iovs[JOURNAL_IOVS];
};

/*
 * A fresh one; with a folder that is locked, read and shown record by record. -EBUSY when what is in it
 * belongs to somebody else, or to a former volume of this name. Errors name the file;
 * it is to be closed after them, too, since what was shown may point into it.
 */
CO_FN int journal_open(struct journal *j, const struct journal_conf *conf, struct err *err);
/* Nobody uses it. Its files stay. */
CO_FN void journal_close(struct journal *j);

/* A folder of which the journal, and the cached data, may have to go. */
struct journal_removal {
	const char *folder; /* borrowed; NULL: there is none, and nothing to do */
	char *volume;       /* the caller's; whose it has to be */
	bool any_export;    /* or of that disk as an export of whatever name */
	int dir_fd;         /* -1: it is not there, which is fine */
	/* Of journal_may_remove(): */
	uint64_t unsaved;                /* bytes of the journal, no more than so many */
	char identity[IDENTITY_LEN + 1]; /* so it says; "" = it does not */
	bool has_two;                    /* it says several */
};

/* Opens and locks the folder until journal_removal_end(). -EBUSY when it is in use. */
CO_FN int journal_removal_begin(struct journal_removal *r, struct err *err);
CO_FN void journal_removal_end(struct journal_removal *r);
/* -EBUSY when the journal is another volume's; an error too when that cannot be said. */
CO_FN int journal_may_remove(struct journal_removal *r, struct err *err);
/* After that: is it of a former volume of this name, where `identity` is that of the one there, or ""? */
bool journal_removal_is_former(const struct journal_removal *r, const char *identity);
/* After journal_may_remove(): removes it, whatever is in it, and makes that stable. */
CO_FN int journal_remove(const struct journal_removal *r, struct err *err);
/* The folder as well, unless there are other files in it. */
CO_FN int journal_folder_remove(const struct journal_removal *r, struct err *err);

/*
 * Writes the record and shows it; returns then. Waits for room. -errno: it was not shown. The
 * longest record that there can be has journal_data_max() bytes of data.
 */
CO_FN int journal_append(struct journal *j, struct record *r);
uint64_t journal_data_max(const struct journal *j);
/* Makes everything that was appended before the call stable. In memory it does nothing. */
CO_FN int journal_sync(struct journal *j);

/* 0, or after a sync that failed the error, when it had to cover record `seq`. */
int journal_covers(struct journal *j, uint64_t seq);
/*
 * Bytes of data at seg:at, of record `seq`. The caller holds a reference to the segment. After a
 * sync that failed what is read of newer records is nobody's promise: an error.
 */
CO_FN int journal_read(struct journal *j, struct segment *seg, uint64_t at, uint64_t seq,
		       const struct iov *iov);
static inline void segment_get(struct segment *seg)
{
	atomic_fetch_add_explicit(&seg->refs, 1, memory_order_relaxed);
}
/* Release: who sees 0 also sees that all reading is over. */
static inline void segment_put(struct segment *seg)
{
	atomic_fetch_sub_explicit(&seg->refs, 1, memory_order_release);
}

/* Is there a segment that could be given back? Any thread. */
bool journal_can_free(struct journal *j);
/*
 * Gives back, oldest first, the segments to which nobody points, with `all` the head as well
 * (nobody appends then). What their records said is below and `flush` makes it stable there. One at
 * a time.
 */
CO_FN int journal_free_segments(struct journal *j, bool all, CO_FN int (*flush)(void *arg),
				void *arg);

/*
 * When nothing was appended for so long, and nobody points into any segment: gives all of them
 * back, the head too. So a journal without a purpose is empty. *due: when that may be, UINT64_MAX =
 * not before something happens.
 */
bool journal_is_idle(struct journal *j, uint64_t ns, uint64_t *due);
CO_FN int journal_empty(struct journal *j, CO_FN int (*flush)(void *arg), void *arg);

/* Parts per million of the room that are in use. Any thread. */
uint64_t journal_fill(struct journal *j);

struct journal_view {
	uint64_t used, limit, syncs; /* bytes, bytes, number */
	int error;
};

void journal_view(struct journal *j, struct journal_view *v);

/* --- For the journal's own files -------------------------------------------------------------- */

/* cache_record.c: bytes in, struct or error out. */

struct segment_head {
	uint64_t number, last_seq; /* last_seq: before it */
	uint8_t salt[8];
	char volume[353]; /* ends with NUL; shortened */
	uint64_t volume_sum;
	char identity[IDENTITY_LEN + 1]; /* "" = not known */
};

enum head_state { HEAD_SPARE, HEAD_GOOD, HEAD_NEWER, HEAD_BAD };

/* Both heads, SEGMENT_HEADS bytes. */
enum { SEGMENT_HEADS = 1024 };

void segment_head_write(uint8_t *to, const struct segment_head *h, const char *volume);
enum head_state segment_head_read(const uint8_t *from, struct segment_head *h);
bool segment_head_is_of(const struct segment_head *h, const char *volume);
/* The volume's text with the name of an export behind it, as back_volume() makes it. */
bool segment_head_is_of_export(const struct segment_head *h, const char *volume);
/* Whatever its name: both identities are known, and differ. */
bool segment_head_is_of_former(const struct segment_head *h, const char *identity);

/* Fills r->head, but for what journal_record_seal() adds; the data's checksum is made here. */
void journal_record_prepare(struct record *r);
/*
 * With its number and place, which r->seq and r->seg say. `synced`: all up to this number is
 * stable.
 */
void journal_record_seal(struct record *r, uint64_t synced);
/* What it says of that. Of a parsed one. */
uint64_t journal_record_synced(const struct record *r);
/* Bytes of the record with all padding; of its data alone. */
uint64_t journal_record_size(const struct record *r);
uint64_t journal_record_data_size(const struct record *r);
/*
 * The record at the beginning of `from`, `len` bytes up to the segment's end; false when there is
 * none. *obj becomes its object; r->at counts from `from` on. Checksums and bounds have been
 * checked, the data's not.
 */
bool journal_record_parse(const uint8_t *from, uint64_t len, const struct segment *seg,
			  uint64_t after, struct record *r, struct obj *obj);
bool journal_record_data_is_good(const uint8_t *from, const struct record *r);

/*
 * cache_journal.c, with the lock held: the newest segment or NULL; is_writing ends, whoever waits
 * goes on.
 */

struct segment *journal_head(struct journal *j);
void journal_stop_writing(struct journal *j);

/* cache_room.c: a segment that is in no list, once there is one. The lock is not held. */

CO_FN int segment_find(struct journal *j, struct segment **out);

/* cache_replay.c */
CO_FN int journal_replay(struct journal *j, struct err *err);

/* cache_segment.c: files. */

CO_FN int segment_read(struct segment *seg, uint64_t at, const struct iov *iov);

/*
 * A segment of the head's place, spare or made anew; the lock is not held. -ENOSPC: there can't be
 * more.
 */
CO_FN int segment_new(struct journal *j, struct segment **out);
void segment_free(struct segment *seg);
CO_FN int segment_write_head(struct journal *j, struct segment *seg, uint64_t last_seq);
/* Makes it spare, and that stable. */
CO_FN int segment_clear(struct segment *seg);
/* Its file and itself; it is in no list. */
CO_FN int segment_remove(struct journal *j, struct segment *seg);
void segment_name(uint32_t file, char *to, size_t len);
/* SEGMENT_HEADS bytes: zeroes of a file that was still being made. *size: bytes of the file. */
CO_FN int segment_read_heads(int fd, uint64_t *size, uint8_t *bytes);

/* The folder, made if it is not there, locked. */
CO_FN int journal_folder_open(struct journal *j, struct err *err);
CO_FN int journal_folder_lock(int dir_fd, const char *path, bool is_ro, struct err *err);
/* The numbers of its files, ascending; the caller frees *files. */
CO_FN int journal_folder_list(int dir_fd, uint32_t **files, size_t *n);

#endif
