/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The files of an object store in a folder: who uses which, which are open, and what is not yet on the disk.
 *
 * A slot stands for an object that somebody uses or whose file is open. It is held shared by who reads or writes parts
 * of the object, exclusively by who gives the name another file (put, del): so no write can end up in a file that has
 * just been replaced. First come, first served; an exclusive holder waits for at most those before it.
 *
 * Descriptors: at most `fds_max`. The longest unused one is closed for the next; if it has writes that are not on the
 * disk yet, those are synced first, because a failure of writing them back is told to open descriptors. Who finds all
 * of them in use waits. When the process has none left, one of ours goes, too.
 *
 * Dirty: a slot counts its writes, and how many of them the last good fdatasync covers. One fdatasync per file at a
 * time: the kernel reports a failure once, so one beside it would succeed with the same pages lost. A failed one is
 * never forgotten: `sync_error` stays, and every sync from then on returns it.
 *
 * Names (made, replaced, removed) are counted in the same way, for the fsync of the folder.
 */
#ifndef NBDRS_FILE_SLOTS_H
#define NBDRS_FILE_SLOTS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "nbdrs/co.h"
#include "nbdrs/layer.h"

struct slot;

struct slots {
	int dir_fd; /* borrowed */
	bool is_ro;

	pthread_mutex_t lock; /* guards the rest but the last five, and the slots */
	struct slot *table;
	struct list clean, dirty_idle; /* unused slots with an open file, longest unused first */
	struct list dirty;             /* all that have writes to be synced */
	unsigned dirty_n, fds_n, fds_max;
	struct co_wq fd_wq; /* for a descriptor that somebody can give up */
	uint64_t names_changed, names_synced;
	uint64_t last_stamp;

	struct co_mutex names_lock; /* one fsync of the folder at a time */
	struct co_mutex first_lock;
	_Atomic bool was_synced; /* what an earlier process left behind is on the disk */
	_Atomic int sync_error;  /* -errno of the first failed sync; stays */
};

void slots_init(struct slots *s, int dir_fd, bool is_ro, unsigned fds_max);
/* Closes all files; nobody uses any. Blocks: for the offload pool. */
void slots_close(struct slots *s);

enum hold { SHARED, EXCLUSIVE };

/* -ENOMEM. */
CO_FN int slot_hold(struct slots *s, const struct obj *obj, enum hold how, struct slot **out);
void slot_release(struct slots *s, struct slot *slot, enum hold how);

/* Opens the file unless it is open; with `create` makes it. -ENOENT and what open(2) says. Held shared. */
CO_FN int slot_open(struct slots *s, struct slot *slot, bool create);
/* -1 when it is not open. Stays as it is while held, but for slot_open(). */
int slot_fd(const struct slot *slot);
/*
 * Closes a file that nobody uses, for who is out of descriptors (is_out_of_fds()): the process has a limit that other
 * volumes and clients share. Waits for one; -EMFILE when none is open, or as slot_sync().
 */
CO_FN int slots_make_room(struct slots *s);
bool is_out_of_fds(int rc);

/* The holder (exclusive) has replaced or removed the file and closed slot_fd(). */
void slot_forget(struct slots *s, struct slot *slot);

/* A write has ended, or failed halfway. */
void slot_wrote(struct slots *s, struct slot *slot);
/* Were there writes since the file last got a modification time of its own? Held exclusively; see slots_stamp(). */
bool slot_is_edited(const struct slot *slot);
void slot_stamped(struct slots *s, struct slot *slot);
/* All writes that have ended are on the disk. Held. */
CO_FN int slot_sync(struct slots *s, struct slot *slot);

/* A name was made, replaced or removed. */
void names_changed(struct slots *s);
/* All changes of names so far are on the disk. */
CO_FN int names_sync(struct slots *s);
/* Everything that was answered so far is on the disk. */
CO_FN int slots_sync(struct slots *s);

/*
 * Now, or a little later: a time that was never given before. As modification time it makes a file's etag its own,
 * which the kernel's clock, ticking every few milliseconds, does not. Any thread.
 */
struct timespec slots_stamp(struct slots *s);

#endif
