/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The folder of an object store: finding, locking, making and removing it. All of this blocks and runs on the
 * offload pool.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "layer/file/file_lock.h"
#include "layer/file/file_store_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/log.h"

/* TARGET without slashes at its end. The caller frees *out. */
static int folder_path(const struct layer *l, char **out, struct err *err)
{
	const char *target = l->spec->target;
	size_t len = strlen(target);

	if (len == 0)
		return err_set(err, -EINVAL,
			       "file: needs a folder for its objects, as in file:/srv/disk1/");
	while (len > 1 && target[len - 1] == '/')
		len--;
	*out = strndup(target, len);
	return *out ? 0 : err_set(err, -ENOMEM, "out of memory");
}

static int open_folder(const char *path, struct err *err)
{
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd >= 0)
		return fd;
	switch (errno) {
	case ENOENT:
		return err_set(
			err, -ENOENT,
			"%s/ does not exist; nbdrsd init makes the folder and the volume in it",
			path);
	case ENOTDIR:
		return err_set(
			err, -ENOTDIR,
			"%s is not a folder, which is where objects are kept; a disk image is served "
			"by raw file:%s",
			path, path);
	default: return err_set(err, -errno, "%s/: cannot open: %s", path, strerror(errno));
	}
}

/* What a crash left of puts. Only with the folder locked for writing. */
static int remove_temps(int dir_fd, const char *path, struct err *err)
{
	unsigned removed = 0, failed = 0;
	struct dirent *d;
	DIR *dir;
	int fd;

	fd = openat(dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	dir = fd >= 0 ? fdopendir(fd) : NULL;
	if (!dir) {
		int rc = -errno;

		if (fd >= 0)
			(void)close(fd);
		return err_set(err, rc, "%s/: cannot read: %s", path, strerror(-rc));
	}
	while ((d = readdir(dir)) != NULL) {
		if (!file_is_temp(d->d_name))
			continue;
		if (unlinkat(dir_fd, d->d_name, 0) == 0)
			removed++;
		else
			failed++;
	}
	(void)closedir(dir);
	if (removed || failed)
		log_info(
			"removed what a crash left of unfinished writes folder=%s files=%u failed=%u",
			path, removed, failed);
	return 0;
}

/* Whether the folder may only be looked at; says so when that was not asked for. */
static bool find_ro(int dir_fd, const char *path, bool want_ro)
{
	if (want_ro || faccessat(dir_fd, ".", W_OK | X_OK, AT_EACCESS) == 0)
		return want_ro;
	log_info("not writable, served read-only folder=%s reason=%s", path, err_name(errno));
	return true;
}

int file_folder_open_task(void *task)
{
	struct folder_task *t = task;
	struct file_store *f = t->layer->self;
	_cleanup_free_ char *path = NULL;
	_cleanup_close_ int fd = -1;
	int rc = folder_path(t->layer, &path, t->err);

	if (rc)
		return rc;
	fd = open_folder(path, t->err);
	if (fd < 0)
		return fd;
	f->is_ro = find_ro(fd, path, t->layer->want_ro);
	rc = file_lock(fd, LOCK_FLOCK, f->is_ro, path, t->err);
	if (rc == 0 && !f->is_ro)
		rc = remove_temps(fd, path, t->err);
	if (rc)
		return rc;
	file_io_init(&f->io, fd, true);
	f->path = TAKE_PTR(path);
	f->dir_fd = TAKE_FD(fd);
	return 0;
}

/* The folder that holds the folder. */
static int sync_parent(const char *path, struct err *err)
{
	_cleanup_free_ char *copy = strdup(path);
	_cleanup_close_ int dir = -1;

	if (!copy)
		return err_set(err, -ENOMEM, "out of memory");
	dir = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (dir < 0 || fsync(dir) != 0)
		return err_set(err, -errno, "%s/: cannot sync the folder it is in: %s", path,
			       strerror(errno));
	return 0;
}

int file_folder_create_task(void *task)
{
	struct folder_task *t = task;
	_cleanup_free_ char *path = NULL;
	_cleanup_close_ int fd = -1;
	int rc = folder_path(t->layer, &path, t->err);

	if (rc)
		return rc;
	/* 0700: a disk holds whatever its guest keeps secret. */
	if (mkdir(path, 0700) == 0)
		return sync_parent(path, t->err);
	if (errno == ENOENT)
		return err_set(t->err, -ENOENT,
			       "%s/: the folder it should be made in does not exist", path);
	if (errno != EEXIST)
		return err_set(t->err, -errno, "%s/: cannot make it: %s", path, strerror(errno));
	fd = open_folder(path, t->err);
	return fd < 0 ? fd : 0;
}

int file_folder_destroy_task(void *task)
{
	struct folder_task *t = task;
	_cleanup_free_ char *path = NULL;
	_cleanup_close_ int fd = -1;
	int rc = folder_path(t->layer, &path, t->err);

	if (rc)
		return rc;
	fd = open_folder(path, t->err);
	if (fd == -ENOENT)
		return 0;
	if (fd < 0)
		return TAKE_FD(fd);
	rc = file_lock(fd, LOCK_FLOCK, false, path, t->err);
	if (rc == 0)
		rc = remove_temps(fd, path, t->err);
	if (rc)
		return rc;
	if (rmdir(path) == 0)
		return sync_parent(path, t->err);
	/* Somebody keeps other things in it, or it is a mount point: it stays. */
	if (errno == ENOTEMPTY || errno == EEXIST || errno == EBUSY)
		return 0;
	return err_set(t->err, -errno, "%s/: cannot remove it: %s", path, strerror(errno));
}
