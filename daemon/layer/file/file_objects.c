/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Whole objects of the store in a folder: stat, put, del, list.
 *
 * A put writes its temporary file without holding the object, then holds it exclusively for as long as it takes to
 * look at the condition and rename. That is atomic because nobody else changes the folder (it is locked).
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "layer/file/file_store_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"

static bool is_name(const struct obj *obj)
{
	return obj->len > 0 && !file_is_temp(obj->name);
}

/* ---- stat ---- */

static void fill_stat(const struct stat *s, struct obj_stat *st)
{
	st->size = (uint64_t)s->st_size;
	(void)snprintf(st->etag, sizeof(st->etag), "%jx-%jx-%jx.%lx", (uintmax_t)s->st_ino,
		       (uintmax_t)s->st_size, (uintmax_t)s->st_mtim.tv_sec,
		       (unsigned long)s->st_mtim.tv_nsec);
}

/* Gives the file a modification time of its own. Refused for somebody else's file: then it keeps the kernel's. */
static void stamp(struct slots *s, int fd)
{
	const struct timespec t[2] = { { .tv_nsec = UTIME_OMIT }, slots_stamp(s) };

	(void)futimens(fd, t);
}

struct stat_task {
	struct file_store *f;
	const char *name;
	int fd; /* -1 = not open */
	bool is_edited;
	struct obj_stat *st;
};

static int stat_task(void *arg)
{
	struct stat_task *t = arg;
	struct stat st;
	int rc;

	if (t->is_edited)
		stamp(&t->f->slots, t->fd);
	rc = t->fd >= 0 ? fstat(t->fd, &st) : fstatat(t->f->dir_fd, t->name, &st, 0);
	if (rc != 0)
		return -errno;
	if (!S_ISREG(st.st_mode))
		return -EINVAL;
	fill_stat(&st, t->st);
	return 0;
}

/* The slot is held exclusively, so no write comes in between. */
static CO_FN int stat_held(struct file_store *f, struct slot *slot, const struct obj *obj,
			   struct obj_stat *st)
{
	struct stat_task t = { f, obj->name, slot_fd(slot), slot_is_edited(slot), st };
	int rc = offload(stat_task, &t);

	if (t.is_edited)
		slot_stamped(&f->slots, slot);
	return rc;
}

int file_objects_stat(struct file_store *f, const struct obj *obj, struct obj_stat *st)
{
	struct obj_stat found;
	struct slot *slot;
	int rc;

	if (!is_name(obj))
		return -EINVAL;
	rc = slot_hold(&f->slots, obj, EXCLUSIVE, &slot);
	if (rc)
		return rc;
	rc = stat_held(f, slot, obj, &found);
	slot_release(&f->slots, slot, EXCLUSIVE);
	if (rc == 0)
		*st = found;
	return rc;
}

/* ---- put ---- */

struct put_task {
	struct file_store *f;
	const struct put *p;
	char temp[48];
	int fd;     /* of the temporary file; -1 = none */
	int old_fd; /* commit: of the file that is replaced, -1 = not open; closed then */
	struct obj_stat st;
};

static int begin_task(void *arg)
{
	struct put_task *t = arg;

	/* Not the verdict, only to save the work. */
	if (t->p->cond == PUT_IF_ABSENT && faccessat(t->f->dir_fd, t->p->obj->name, F_OK, 0) == 0)
		return -EEXIST;
	/* 0600: a disk holds whatever its guest keeps secret. */
	t->fd = openat(t->f->dir_fd, t->temp, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOCTTY,
		       0600);
	return t->fd >= 0 ? 0 : -errno;
}

/* Closes and removes what is left of the temporary file. */
static int end_task(void *arg)
{
	struct put_task *t = arg;

	if (t->fd < 0)
		return 0;
	(void)close(t->fd);
	(void)unlinkat(t->f->dir_fd, t->temp, 0); /* what stays goes at the next start */
	return 0;
}

static int check_cond(const struct put_task *t)
{
	const int dir = t->f->dir_fd;
	struct obj_stat now;
	struct stat st;

	if (t->p->cond == PUT_ALWAYS)
		return 0;
	if (fstatat(dir, t->p->obj->name, &st, 0) != 0) {
		if (errno != ENOENT)
			return -errno;
		return t->p->cond == PUT_IF_ABSENT ? 0 : -ESTALE;
	}
	if (t->p->cond == PUT_IF_ABSENT)
		return -EEXIST;
	fill_stat(&st, &now);
	return strcmp(now.etag, t->p->etag) == 0 ? 0 : -ESTALE;
}

static int commit_task(void *arg)
{
	struct put_task *t = arg;
	struct stat st;
	int rc = check_cond(t);

	if (rc)
		return rc;
	stamp(&t->f->slots, t->fd);
	if (fstat(t->fd, &st) != 0 ||
	    renameat(t->f->dir_fd, t->temp, t->f->dir_fd, t->p->obj->name) != 0)
		return -errno;
	fill_stat(&st, &t->st);
	(void)close(t->fd); /* is on the disk already */
	t->fd = -1;
	if (t->old_fd >= 0)
		(void)close(t->old_fd);
	return 0;
}

/* The temporary file is complete: gives it the name. */
static CO_FN int commit(struct put_task *t)
{
	struct slots *s = &t->f->slots;
	struct slot *slot;
	int rc = slot_hold(s, t->p->obj, EXCLUSIVE, &slot);

	if (rc)
		return rc;
	/* An etag of before the last write in place must not match. */
	if (t->p->cond == PUT_IF_MATCH && slot_is_edited(slot))
		(void)stat_held(t->f, slot, t->p->obj, &t->st);
	t->old_fd = slot_fd(slot);
	rc = offload(commit_task, t);
	if (rc == 0) {
		slot_forget(s, slot);
		names_changed(s);
	}
	slot_release(s, slot, EXCLUSIVE);
	return rc;
}

int file_objects_put(struct file_store *f, const struct put *p, struct obj_stat *st)
{
	struct put_task t = { .f = f, .p = p, .fd = -1, .old_fd = -1 };
	int rc;

	if (!is_name(p->obj))
		return -EINVAL;
	(void)snprintf(t.temp, sizeof(t.temp), FILE_TEMP_PREFIX "%d-%" PRIu64, (int)getpid(),
		       (uint64_t)atomic_fetch_add(&f->temps, 1));
	do
		rc = offload(begin_task, &t);
	while (is_out_of_fds(rc) && slots_make_room(&f->slots) == 0);
	if (rc)
		return rc;
	if (p->iov->len > 0)
		rc = io_pwrite_full(t.fd, p->iov->v, p->iov->n, 0, 0);
	if (rc == 0)
		rc = io_fdatasync(t.fd);
	if (rc == 0)
		rc = commit(&t);
	if (t.fd >= 0)
		(void)offload(end_task, &t); /* always 0 */
	if (rc == 0 && p->fl & IO_FUA)
		rc = names_sync(&f->slots);
	if (rc == 0 && st)
		*st = t.st;
	return rc;
}

/* ---- del ---- */

struct del_task {
	struct file_store *f;
	const char *name;
	int fd; /* -1 = not open */
};

static int del_task(void *arg)
{
	const struct del_task *t = arg;

	if (unlinkat(t->f->dir_fd, t->name, 0) != 0)
		return -errno;
	if (t->fd >= 0)
		(void)close(t->fd);
	return 0;
}

static CO_FN int del_one(struct file_store *f, const struct obj *obj)
{
	struct del_task t = { .f = f, .name = obj->name };
	struct slot *slot;
	int rc;

	if (!is_name(obj))
		return -EINVAL;
	rc = slot_hold(&f->slots, obj, EXCLUSIVE, &slot);
	if (rc)
		return rc;
	t.fd = slot_fd(slot);
	rc = offload(del_task, &t);
	if (rc == 0) {
		slot_forget(&f->slots, slot);
		names_changed(&f->slots);
	}
	slot_release(&f->slots, slot, EXCLUSIVE);
	return rc == -ENOENT ? 0 : rc;
}

int file_objects_del(struct file_store *f, const struct obj *objs, unsigned n)
{
	int rc = 0;

	/* The others go all the same; the first failure is told. */
	for (unsigned i = 0; i < n; i++) {
		int one = del_one(f, &objs[i]);

		rc = rc ? rc : one;
	}
	return rc;
}

/* ---- list ---- */

enum { LIST_ROOM = 64 * 1024 };

/* One object in list_task.buf; the next one follows its name's NUL, aligned. */
struct listed {
	uint64_t size;
	uint32_t next; /* offset of the next one */
	char name[];
};

struct list_task {
	struct file_store *f;
	const char *prefix;
	DIR *dir;
	bool is_end;
	uint32_t used;
	char *buf; /* LIST_ROOM bytes */
};

static int list_begin_task(void *arg)
{
	struct list_task *t = arg;
	int fd = openat(t->f->dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0)
		return -errno;
	t->dir = fdopendir(fd);
	if (t->dir)
		return 0;
	(void)close(fd);
	return -ENOMEM;
}

static void list_add_name(struct list_task *t, const char *name)
{
	struct listed *l = (struct listed *)(void *)(t->buf + t->used);
	const size_t len = strlen(name);
	struct stat st;
	struct obj obj;

	if (file_is_temp(name) || strncmp(name, t->prefix, strlen(t->prefix)) != 0 ||
	    obj_set(&obj, name) != 0)
		return;
	/* Gone meanwhile, or no object. */
	if (fstatat(t->f->dir_fd, name, &st, 0) != 0 || !S_ISREG(st.st_mode))
		return;
	l->size = (uint64_t)st.st_size;
	memcpy(l->name, name, len + 1);
	t->used += (uint32_t)align_up(sizeof(*l) + len + 1, sizeof(uint64_t));
	l->next = t->used;
}

static int list_some_task(void *arg)
{
	struct list_task *t = arg;

	t->used = 0;
	while (t->used + sizeof(struct listed) + OBJ_NAME_MAX + 1 + sizeof(uint64_t) <= LIST_ROOM) {
		const struct dirent *d;

		errno = 0;
		d = readdir(t->dir);
		if (!d) {
			t->is_end = true;
			return -errno;
		}
		list_add_name(t, d->d_name);
	}
	return 0;
}

static int list_end_task(void *arg)
{
	struct list_task *t = arg;

	(void)closedir(t->dir);
	return 0;
}

int file_objects_list(struct file_store *f, const char *prefix, list_fn *fn, void *arg)
{
	struct list_task t = { .f = f, .prefix = prefix };
	int rc;

	t.buf = malloc(LIST_ROOM);
	if (!t.buf)
		return -ENOMEM;
	rc = offload(list_begin_task, &t);
	while (rc == 0 && !t.is_end) {
		rc = offload(list_some_task, &t);
		for (uint32_t at = 0; rc == 0 && at < t.used;) {
			const struct listed *l = (const struct listed *)(void *)(t.buf + at);

			rc = fn(arg, l->name, l->size);
			at = l->next;
		}
	}
	if (t.dir)
		(void)offload(list_end_task, &t); /* always 0 */
	free(t.buf);
	return rc;
}
