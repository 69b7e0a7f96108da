/* SPDX-License-Identifier: GPL-3.0-or-later */
/* See file_slots.h. */
#include "layer/file/file_slots.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"
#include "nbdrs/list.h"

#define HASH_NONFATAL_OOM 1
#include <uthash.h>

enum { SYNC_WORKERS = 16 };

struct slot {
	UT_hash_handle hh;
	struct list idle;  /* on slots.clean or slots.dirty_idle when nobody refers to it */
	struct list dirty; /* on slots.dirty when written != synced */
	int fd;            /* -1 = not open */
	unsigned refs;     /* fibers that hold it or wait for it */
	unsigned shared_n, exclusive_waiting;
	bool is_exclusive, is_opening;
	/* Writes that have ended; those that are on the disk; those before the last stamp. */
	uint64_t written, synced, stamped;
	struct co_wq wq;           /* for a hold, or for whoever opens the file */
	struct co_mutex sync_lock; /* one fdatasync at a time */
	char name[];               /* ends with NUL */
};

/* ---- life ---- */

void slots_init(struct slots *s, int dir_fd, bool is_ro, unsigned fds_max)
{
	*s = (struct slots){ .dir_fd = dir_fd, .is_ro = is_ro, .fds_max = fds_max };
	pthread_mutex_init(&s->lock, NULL);
	list_init(&s->clean);
	list_init(&s->dirty_idle);
	list_init(&s->dirty);
	co_wq_init(&s->fd_wq);
	co_mutex_init(&s->names_lock);
	co_mutex_init(&s->first_lock);
}

/* With the lock held. */
static struct slot *slot_new(struct slots *s, const struct obj *obj)
{
	struct slot *slot = calloc(1, sizeof(*slot) + obj->len + 1U);

	if (!slot)
		return NULL;
	memcpy(slot->name, obj->name, obj->len + 1U);
	slot->fd = -1;
	list_init(&slot->idle);
	list_init(&slot->dirty);
	co_wq_init(&slot->wq);
	co_mutex_init(&slot->sync_lock);
	HASH_ADD_KEYPTR_BYHASHVALUE(hh, s->table, slot->name, obj->len, (unsigned)obj->hash, slot);
	if (slot->hh.tbl)
		return slot;
	co_mutex_destroy(&slot->sync_lock);
	free(slot);
	return NULL;
}

/* Nobody refers to it, and its file is closed or will be by the caller. With the lock held. */
static void slot_free(struct slots *s, struct slot *slot)
{
	assert(slot->refs == 0);
	HASH_DEL(s->table, slot);
	list_del(&slot->idle);
	list_del(&slot->dirty);
	co_mutex_destroy(&slot->sync_lock);
	free(slot);
}

struct timespec slots_stamp(struct slots *s)
{
	struct timespec t;
	uint64_t ns;

	(void)clock_gettime(CLOCK_REALTIME, &t);
	ns = (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
	pthread_mutex_lock(&s->lock);
	ns = s->last_stamp = MAX(ns, s->last_stamp + 1);
	pthread_mutex_unlock(&s->lock);
	return (struct timespec){ (time_t)(ns / 1000000000), (long)(ns % 1000000000) };
}

/* A file that goes out of sight: its last writes must not share their time with later ones. */
static void close_file(struct slots *s, int fd, bool is_edited)
{
	struct timespec t[2] = { { .tv_nsec = UTIME_OMIT } };

	if (is_edited) {
		t[1] = slots_stamp(s);
		(void)futimens(
			fd,
			t); /* refused for somebody else's file: then it keeps the kernel's time */
	}
	(void)close(fd);
}

void slots_close(struct slots *s)
{
	while (s->table) {
		struct slot *slot = s->table;

		if (slot->fd >= 0)
			close_file(s, slot->fd, slot_is_edited(slot));
		slot_free(s, slot);
	}
	co_mutex_destroy(&s->names_lock);
	co_mutex_destroy(&s->first_lock);
	pthread_mutex_destroy(&s->lock);
}

/* ---- holding ---- */

/* With the lock held. */
static void hold(struct slot *slot, enum hold how)
{
	if (how == SHARED)
		slot->shared_n++;
	else
		slot->is_exclusive = true;
}

/* With the lock held, which is released meanwhile; slot->refs keeps the slot. */
static CO_FN void hold_wait(struct slots *s, struct slot *slot, enum hold how)
{
	if (how == SHARED) {
		while (slot->is_exclusive || slot->exclusive_waiting > 0)
			co_wq_wait(&slot->wq, &s->lock);
	} else {
		slot->exclusive_waiting++;
		while (slot->is_exclusive || slot->shared_n > 0)
			co_wq_wait(&slot->wq, &s->lock);
		slot->exclusive_waiting--;
	}
	hold(slot, how);
}

int slot_hold(struct slots *s, const struct obj *obj, enum hold how, struct slot **out)
{
	struct slot *slot;

	pthread_mutex_lock(&s->lock);
	HASH_FIND_BYHASHVALUE(hh, s->table, obj->name, obj->len, (unsigned)obj->hash, slot);
	if (!slot)
		slot = slot_new(s, obj);
	if (slot) {
		slot->refs++;
		list_del(&slot->idle);
		hold_wait(s, slot, how);
	}
	pthread_mutex_unlock(&s->lock);
	*out = slot;
	return slot ? 0 : -ENOMEM;
}

/* With the lock held. */
static void release(struct slots *s, struct slot *slot, enum hold how)
{
	if (how == SHARED)
		slot->shared_n--;
	else
		slot->is_exclusive = false;
	slot->refs--;
	co_wq_wake_all(&slot->wq);
	if (slot->refs > 0)
		return;
	if (slot->fd < 0) {
		slot_free(s, slot);
		return;
	}
	list_add(slot->written == slot->synced ? &s->clean : &s->dirty_idle, &slot->idle);
	co_wq_wake_all(&s->fd_wq);
}

void slot_release(struct slots *s, struct slot *slot, enum hold how)
{
	pthread_mutex_lock(&s->lock);
	release(s, slot, how);
	pthread_mutex_unlock(&s->lock);
}

/* ---- files ---- */

int slot_fd(const struct slot *slot)
{
	return slot->fd;
}

/* A descriptor that has to be closed before another is opened. */
struct victim {
	int fd; /* -1 = none */
	bool is_edited;
};

/*
 * Takes a place for a descriptor: a free one, or that of the longest unused file, which it is always with `evict`.
 * -EMFILE: there is no file to be closed. With the lock held, which is released meanwhile.
 */
static CO_FN int take_place(struct slots *s, bool evict, struct victim *v)
{
	*v = (struct victim){ .fd = -1 };
	while (evict || s->fds_n >= s->fds_max) {
		struct list *node = list_pop(&s->clean);
		struct slot *slot;
		int rc;

		if (s->fds_n == 0)
			return -EMFILE;
		if (node) {
			slot = list_entry(node, struct slot, idle);
			*v = (struct victim){ slot->fd, slot_is_edited(slot) };
			slot_free(s, slot);
			return 0; /* its place is ours */
		}
		node = list_pop(&s->dirty_idle);
		if (!node) {
			co_wq_wait(&s->fd_wq, &s->lock);
			continue;
		}
		slot = list_entry(node, struct slot, idle);
		slot->refs++;
		hold(slot, SHARED); /* nobody refers to it, so nobody is in the way */
		pthread_mutex_unlock(&s->lock);
		rc = slot_sync(s, slot);
		pthread_mutex_lock(&s->lock);
		release(s, slot, SHARED);
		if (rc)
			return rc;
	}
	s->fds_n++;
	return 0;
}

static void give_place(struct slots *s)
{
	s->fds_n--;
	co_wq_wake_all(&s->fd_wq);
}

struct evict_task {
	struct slots *s;
	struct victim victim;
};

static int evict_task(void *arg)
{
	struct evict_task *t = arg;

	close_file(t->s, t->victim.fd, t->victim.is_edited);
	return 0;
}

int slots_make_room(struct slots *s)
{
	struct evict_task t = { .s = s };
	int rc;

	pthread_mutex_lock(&s->lock);
	rc = take_place(s, true, &t.victim);
	pthread_mutex_unlock(&s->lock);
	if (rc)
		return rc;
	(void)offload(evict_task, &t); /* always 0 */
	/* Only now: who finds no place taken is told that there is nothing to wait for. */
	pthread_mutex_lock(&s->lock);
	give_place(s);
	pthread_mutex_unlock(&s->lock);
	return 0;
}

bool is_out_of_fds(int rc)
{
	return rc == -EMFILE || rc == -ENFILE;
}

struct open_task {
	struct slots *s;
	const char *name;
	bool create, is_new;
	struct victim victim;
	int fd;
};

static int open_task(void *arg)
{
	struct open_task *t = arg;
	const int flags = O_CLOEXEC | O_NOCTTY | (t->s->is_ro ? O_RDONLY : O_RDWR);
	struct stat st;

	if (t->victim.fd >= 0)
		close_file(t->s, t->victim.fd, t->victim.is_edited);
	t->fd = openat(t->s->dir_fd, t->name, flags | O_NONBLOCK); /* it might be a pipe */
	if (t->fd < 0 && errno == ENOENT && t->create) {
		/* 0600: a disk holds whatever its guest keeps secret. */
		t->fd = openat(t->s->dir_fd, t->name, flags | O_CREAT | O_EXCL, 0600);
		t->is_new = t->fd >= 0;
	}
	if (t->fd < 0)
		return -errno;
	if (fstat(t->fd, &st) == 0 && S_ISREG(st.st_mode)) {
		(void)fcntl(t->fd, F_SETFL, 0); /* O_NONBLOCK would mean something to the ring */
		return 0;
	}
	(void)close(t->fd); /* a pipe, a device: no object */
	return -EINVAL;
}

/* With the lock held, which is released meanwhile. */
static CO_FN int open_locked(struct slots *s, struct slot *slot, bool create)
{
	struct open_task t = { .s = s, .name = slot->name, .create = create };
	int rc;

	do {
		rc = take_place(s, false, &t.victim);
		if (rc)
			return rc;
		pthread_mutex_unlock(&s->lock);
		rc = offload(open_task, &t);
		pthread_mutex_lock(&s->lock);
		if (rc == 0) {
			slot->fd = t.fd;
			s->names_changed += t.is_new;
			return 0;
		}
		give_place(s);
		if (is_out_of_fds(rc)) {
			pthread_mutex_unlock(&s->lock);
			rc = slots_make_room(s) == 0 ? -EAGAIN : rc;
			pthread_mutex_lock(&s->lock);
		}
	} while (rc == -EAGAIN);
	return rc;
}

int slot_open(struct slots *s, struct slot *slot, bool create)
{
	int rc = 0;

	pthread_mutex_lock(&s->lock);
	while (slot->is_opening)
		co_wq_wait(&slot->wq, &s->lock);
	if (slot->fd < 0) {
		slot->is_opening = true;
		rc = open_locked(s, slot, create);
		slot->is_opening = false;
		co_wq_wake_all(&slot->wq);
	}
	pthread_mutex_unlock(&s->lock);
	return rc;
}

/* With the lock held. */
static void set_synced(struct slots *s, struct slot *slot, uint64_t upto)
{
	slot->synced = upto;
	if (slot->synced != slot->written || list_empty(&slot->dirty))
		return;
	list_del(&slot->dirty);
	s->dirty_n--;
}

void slot_forget(struct slots *s, struct slot *slot)
{
	pthread_mutex_lock(&s->lock);
	if (slot->fd >= 0)
		give_place(s);
	slot->fd = -1;
	set_synced(s, slot, slot->written); /* of a file that is nobody's any more */
	slot->stamped = slot->written;
	pthread_mutex_unlock(&s->lock);
}

bool slot_is_edited(const struct slot *slot)
{
	return slot->written != slot->stamped;
}

void slot_stamped(struct slots *s, struct slot *slot)
{
	pthread_mutex_lock(&s->lock);
	slot->stamped = slot->written;
	pthread_mutex_unlock(&s->lock);
}

/* ---- what is on the disk ---- */

void slot_wrote(struct slots *s, struct slot *slot)
{
	pthread_mutex_lock(&s->lock);
	slot->written++;
	if (list_empty(&slot->dirty)) {
		list_add(&s->dirty, &slot->dirty);
		s->dirty_n++;
	}
	pthread_mutex_unlock(&s->lock);
}

/* Notes the first failure; returns what every sync has to say from now on. */
static int note(struct slots *s, int rc)
{
	int none = 0;

	if (rc)
		(void)atomic_compare_exchange_strong(&s->sync_error, &none, rc);
	return atomic_load(&s->sync_error);
}

int slot_sync(struct slots *s, struct slot *slot)
{
	uint64_t upto;
	int rc = 0;

	co_mutex_lock(&slot->sync_lock);
	/* Counted after waiting for the lock, so it covers those who will wait for it behind us. */
	pthread_mutex_lock(&s->lock);
	upto = slot->written;
	if (slot->synced == upto)
		upto = 0;
	pthread_mutex_unlock(&s->lock);
	if (upto && !atomic_load(&s->sync_error)) {
		rc = note(s, io_fdatasync(slot->fd));
		pthread_mutex_lock(&s->lock);
		if (!rc)
			set_synced(s, slot, upto);
		pthread_mutex_unlock(&s->lock);
	}
	co_mutex_unlock(&slot->sync_lock);
	return note(s, rc);
}

void names_changed(struct slots *s)
{
	pthread_mutex_lock(&s->lock);
	s->names_changed++;
	pthread_mutex_unlock(&s->lock);
}

static int fsync_task(void *arg)
{
	const struct slots *s = arg;

	/* EINVAL: this file system has nothing to sync there. */
	return fsync(s->dir_fd) == 0 || errno == EINVAL ? 0 : -errno;
}

int names_sync(struct slots *s)
{
	uint64_t upto;
	bool is_done;
	int rc;

	co_mutex_lock(&s->names_lock);
	pthread_mutex_lock(&s->lock);
	upto = s->names_changed;
	is_done = s->names_synced == upto;
	pthread_mutex_unlock(&s->lock);
	rc = note(s, 0);
	if (!rc && !is_done) {
		rc = note(s, offload(fsync_task, s));
		pthread_mutex_lock(&s->lock);
		if (!rc)
			s->names_synced = upto;
		pthread_mutex_unlock(&s->lock);
	}
	co_mutex_unlock(&s->names_lock);
	return rc;
}

static int syncfs_task(void *arg)
{
	const struct slots *s = arg;

	return syncfs(s->dir_fd) == 0 ? 0 : -errno;
}

/*
 * A client that was answered by a daemon which was killed comes back to this one and flushes: what the first one
 * wrote is in the page cache, in files that this one may never have opened. Once per start.
 */
static CO_FN int sync_leftovers(struct slots *s)
{
	int rc;

	if (atomic_load(&s->was_synced))
		return 0;
	co_mutex_lock(&s->first_lock);
	rc = atomic_load(&s->was_synced) ? 0 : note(s, offload(syncfs_task, s));
	if (!rc)
		atomic_store(&s->was_synced, true);
	co_mutex_unlock(&s->first_lock);
	return rc;
}

/* The slots that a flush has to sync, dealt out to its fibers (all of this reactor: no lock). */
struct sync_job {
	struct slots *s;
	struct slot **v;
	unsigned n, next;
};

static CO_FN void sync_worker(void *arg)
{
	struct sync_job *job = arg;
	struct slots *s = job->s;

	while (job->next < job->n) {
		struct slot *slot = job->v[job->next++];

		pthread_mutex_lock(&s->lock);
		hold_wait(s, slot, SHARED);
		pthread_mutex_unlock(&s->lock);
		(void)slot_sync(s, slot); /* a failure stays in sync_error */
		slot_release(s, slot, SHARED);
	}
}

/* The dirty ones, each with a reference; -ENOMEM. */
static int collect(struct slots *s, struct sync_job *job)
{
	pthread_mutex_lock(&s->lock);
	job->v = calloc(s->dirty_n + 1U, sizeof(struct slot *));
	if (job->v) {
		list_for_each(slot, &s->dirty, struct slot, dirty)
		{
			slot->refs++;
			list_del(&slot->idle);
			job->v[job->n++] = slot;
		}
	}
	pthread_mutex_unlock(&s->lock);
	return job->v ? 0 : -ENOMEM;
}

int slots_sync(struct slots *s)
{
	struct co_group g = CO_GROUP_INIT;
	struct sync_job job = { .s = s };
	int rc = note(s, 0);

	if (rc || s->is_ro)
		return rc;
	rc = sync_leftovers(s);
	if (!rc)
		rc = collect(s, &job);
	if (rc)
		return rc;
	for (unsigned i = 1; i < MIN(job.n, (unsigned)SYNC_WORKERS); i++)
		co_group_spawn(&g, sync_worker, &job);
	sync_worker(&job);
	co_group_wait(&g);
	free(job.v);
	return names_sync(s);
}
