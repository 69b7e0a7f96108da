/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Finding, opening, locking, making and removing the file of layer `file`. All of this blocks and runs on
 * the offload pool.
 */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "layer/file/file_int.h"
#include "layer/file/file_lock.h"
#include "nbdrs/buf.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/log.h"

int file_path(const struct layer *l, char **out, struct err *err)
{
	const char *target = l->spec->target;
	size_t len = strlen(target);
	struct obj name;

	if (len == 0)
		return err_set(err, -EINVAL, "file: needs a path, as in file:/srv/disk.img");
	if (target[len - 1] != '/') {
		*out = strdup(target);
		return *out ? 0 : err_set(err, -ENOMEM, "out of memory");
	}
	if (l->export_name == NULL || l->export_name[0] == '\0')
		return err_set(err, -EINVAL, "file:%s is a folder; name the file in it, as in file:%sdisk0",
			       target, target);
	if (obj_set(&name, l->export_name) != 0)
		return err_set(err, -EINVAL,
			       "the export's name '%s' cannot be a file in %s (no \"/\", \".\" or \"..\"); name "
			       "the file itself",
			       l->export_name, target);
	if (asprintf(out, "%s%s", target, l->export_name) < 0)
		return err_set(err, -ENOMEM, "out of memory");
	return 0;
}

/* ---- open ---- */

static int open_flags(const struct file *f, bool is_ro)
{
	return O_CLOEXEC | O_NOCTTY | (is_ro ? O_RDONLY : O_RDWR) | (f->opt_direct ? O_DIRECT : 0);
}

static int open_path(struct file *f, bool want_ro, struct err *err)
{
	int fd = open(f->path, open_flags(f, want_ro));

	f->is_ro = want_ro;
	if (fd < 0 && !want_ro && (errno == EACCES || errno == EROFS || errno == EPERM || errno == ETXTBSY)) {
		int why = errno;

		fd = open(f->path, open_flags(f, true));
		if (fd >= 0) {
			f->is_ro = true;
			log_info("not writable, served read-only file=%s reason=%s", f->path, err_name(why));
		} else {
			errno = why;
		}
	}
	if (fd >= 0)
		return fd;
	switch (errno) {
	case ENOENT:
		return err_set(err, -ENOENT, "%s does not exist; make it: nbdrsd init --size SIZE raw file:%s",
			       f->path, f->path);
	case EISDIR:
		return err_set(err, -EISDIR, "%s is a folder; write file:%s/ to serve the file in it that has the "
			       "export's name", f->path, f->path);
	case EINVAL:
		if (f->opt_direct)
			return err_set(err, -EINVAL, "%s: this file system has no O_DIRECT; leave out direct",
				       f->path);
		break;
	default:
		break;
	}
	return err_set(err, -errno, "%s: cannot open: %s", f->path, strerror(errno));
}

/* Smallest unit of O_DIRECT on this file: tried out, since file systems do not agree on how to ask. */
static uint32_t find_direct_align(int fd, bool is_block)
{
	_cleanup_free_ void *page = aligned_alloc(BUF_ALIGN, BUF_ALIGN);
	int sector = 0;

	if (is_block && ioctl(fd, BLKSSZGET, &sector) == 0 && sector >= 512)
		return (uint32_t)sector;
	if (page != NULL && pread(fd, page, 512, 512) == 512)
		return 512;
	return 4096;
}

static int find_size(const struct file *f, int fd, const struct stat *st, uint64_t *size, struct err *err)
{
	if (S_ISREG(st->st_mode)) {
		*size = (uint64_t)st->st_size;
		return 0;
	}
	if (S_ISBLK(st->st_mode))
		return ioctl(fd, BLKGETSIZE64, size) == 0 ?
			       0 :
			       err_set(err, -errno, "%s: cannot read its size: %s", f->path, strerror(errno));
	return err_set(err, -EINVAL, "%s is %s, not a file or block device%s", f->path,
		       S_ISDIR(st->st_mode) ? "a folder" : "of an unusual kind",
		       S_ISDIR(st->st_mode)
			       ? "; end the path with / to serve the file of the export's name in it"
			       : "");
}

/* mincore tells the truth only to who owns the file or may write it (mincore(2)). */
static bool may_lend(const struct file *f, const struct stat *st)
{
	return f->opt_lend && !f->direct_align && (!f->is_ro || geteuid() == 0 || geteuid() == st->st_uid);
}

static int set_up(struct layer *l, struct file *f, struct err *err)
{
	struct stat st;
	uint64_t size;
	int rc;

	if (fstat(f->fd, &st) != 0)
		return err_set(err, -errno, "%s: %s", f->path, strerror(errno));
	f->is_block = S_ISBLK(st.st_mode);
	rc = find_size(f, f->fd, &st, &size, err);
	if (rc != 0)
		return rc;
	l->size = size;
	rc = file_lock(f->fd, LOCK_OFD, f->is_ro, f->path, err);
	if (rc != 0)
		return rc;
	file_io_init(&f->io, f->fd, false);
	f->has_holes = !f->is_block && (uint64_t)st.st_blocks * 512 < l->size;
	f->direct_align = f->opt_direct ? find_direct_align(f->fd, f->is_block) : 0;
	if (f->direct_align && l->size % f->direct_align)
		return err_set(err, -EINVAL, "%s: its size %ju is no multiple of %u, which direct needs; leave out "
			       "direct or extend the file", f->path, (uintmax_t)l->size, f->direct_align);
	l->min_io = MAX(f->direct_align, 1U);
	l->pref_io = 4096;
	l->max_io = BUF_MAX / 2;
	l->caps = CAN_PARTIAL | CAN_FUA | CAN_FLUSH | CAN_MULTI;
	if (!f->is_ro)
		l->caps |= CAN_WRITE | CAN_TRIM | CAN_ZERO | CAN_FAST_ZERO;
	if (!f->is_block)
		l->caps |= CAN_MAP;
	if (f->has_holes)
		l->caps |= HAS_HOLES;
	if (may_lend(f, &st))
		l->caps |= CAN_LEND;
	return 0;
}

/* The same file once more; by the descriptor where /proc is there, so that a rename meanwhile does no harm. */
static int open_sync_fd(struct file *f, struct err *err)
{
	char path[64];
	struct stat a, b;

	(void)snprintf(path, sizeof(path), "/proc/self/fd/%d", f->fd);
	f->sync_fd = open(path, O_WRONLY | O_CLOEXEC | O_NOCTTY);
	if (f->sync_fd < 0)
		f->sync_fd = open(f->path, O_WRONLY | O_CLOEXEC | O_NOCTTY);
	if (f->sync_fd < 0)
		return err_set(err, -errno, "%s: cannot open it a second time, for flushes: %s", f->path,
			       strerror(errno));
	if (fstat(f->fd, &a) == 0 && fstat(f->sync_fd, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino)
		return 0;
	(void)close(f->sync_fd);
	return err_set(err, -EBUSY, "%s: was replaced while it was being opened; try again", f->path);
}

int file_open_task(void *task)
{
	struct file_task *t = task;
	struct file *f = t->layer->self;
	int rc = file_path(t->layer, &f->path, t->err);

	if (rc != 0)
		return rc;
	f->sync_fd = -1;
	f->fd = open_path(f, t->layer->want_ro, t->err);
	rc = f->fd < 0 ? f->fd : set_up(t->layer, f, t->err);
	if (rc == 0 && !f->is_ro)
		rc = open_sync_fd(f, t->err);
	if (rc == 0)
		return 0;
	if (f->fd >= 0)
		(void)close(f->fd);
	free(f->path);
	f->path = NULL;
	return rc;
}

/* ---- create ---- */

static int sync_folder(const char *path, struct err *err)
{
	_cleanup_free_ char *copy = strdup(path);
	_cleanup_close_ int dir = -1;

	if (copy == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	dir = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (dir < 0 || fsync(dir) != 0)
		return err_set(err, -errno, "%s: cannot sync its folder: %s", path, strerror(errno));
	return 0;
}

static int write_zeroes(int fd, uint64_t size)
{
	enum { PIECE = 1 << 20 };
	_cleanup_free_ void *zeroes = calloc(1, PIECE);

	if (zeroes == NULL)
		return -ENOMEM;
	for (uint64_t at = 0; at < size;) {
		ssize_t n = pwrite(fd, zeroes, (size_t)MIN((uint64_t)PIECE, size - at), (off_t)at);

		if (n < 0 && errno != EINTR)
			return -errno;
		if (n > 0)
			at += (uint64_t)n;
	}
	return 0;
}

static int fill(int fd, uint64_t size, unsigned prealloc)
{
	if (ftruncate(fd, 0) != 0 || ftruncate(fd, (off_t)size) != 0)
		return -errno;
	if (prealloc == PREALLOC_FALLOC && size > 0 && fallocate(fd, 0, 0, (off_t)size) != 0)
		return -errno;
	if (prealloc == PREALLOC_FULL)
		return write_zeroes(fd, size);
	return 0;
}

static int create_on(int fd, const char *path, bool is_new, const struct file_task *t)
{
	const struct file *f = t->layer->self;
	struct stat st;
	uint64_t old;
	int rc;

	rc = file_lock(fd, LOCK_OFD, false, path, t->err);
	if (rc != 0)
		return rc;
	if (fstat(fd, &st) != 0)
		return err_set(t->err, -errno, "%s: %s", path, strerror(errno));
	rc = find_size(&(struct file){ .path = (char *)(uintptr_t)path }, fd, &st, &old, t->err);
	if (rc != 0)
		return rc;
	if (S_ISBLK(st.st_mode))
		return old == t->size ? 0 :
					err_set(t->err, -EINVAL, "%s is a block device of %ju bytes and cannot be "
						"made %ju", path, (uintmax_t)old, (uintmax_t)t->size);
	if (!is_new && !t->force && old != 0)
		return old == t->size ?
			       0 :
			       err_set(t->err, -EEXIST, "%s exists with %ju bytes, not %ju; --force makes it anew and "
				       "loses what is in it", path, (uintmax_t)old, (uintmax_t)t->size);
	rc = fill(fd, t->size, f->opt_prealloc);
	if (rc != 0)
		return err_set(t->err, rc, "%s: cannot give it %ju bytes: %s", path, (uintmax_t)t->size,
			       strerror(-rc));
	if (fsync(fd) != 0)
		return err_set(t->err, -errno, "%s: cannot sync: %s", path, strerror(errno));
	return sync_folder(path, t->err);
}

int file_create_task(void *task)
{
	struct file_task *t = task;
	_cleanup_free_ char *path = NULL;
	_cleanup_close_ int fd = -1;
	bool is_new = true;
	int rc = file_path(t->layer, &path, t->err);

	if (rc != 0)
		return rc;
	/* 0600: a disk holds whatever its guest keeps secret. */
	fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd < 0 && errno == EEXIST) {
		is_new = false;
		fd = open(path, O_RDWR | O_CLOEXEC);
	}
	if (fd < 0)
		return err_set(t->err, -errno, "%s: cannot make it: %s", path, strerror(errno));
	rc = create_on(fd, path, is_new, t);
	if (rc != 0 && is_new)
		(void)unlink(path); /* ours, and useless; rc says what happened */
	return rc;
}

/* ---- destroy ---- */

int file_destroy_task(void *task)
{
	struct file_task *t = task;
	_cleanup_free_ char *path = NULL;
	_cleanup_close_ int fd = -1;
	struct stat st;
	int rc = file_path(t->layer, &path, t->err);

	if (rc != 0)
		return rc;
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return err_set(t->err, -errno, "%s: %s", path, strerror(errno));
	rc = file_lock(fd, LOCK_OFD, false, path, t->err);
	if (rc != 0)
		return rc;
	if (fstat(fd, &st) != 0)
		return err_set(t->err, -errno, "%s: %s", path, strerror(errno));
	if (!S_ISREG(st.st_mode))
		return err_set(t->err, -EINVAL, "%s is a block device, not a file that could be removed; to empty it: "
			       "blkdiscard %s", path, path);
	if (unlink(path) != 0)
		return err_set(t->err, -errno, "%s: cannot remove: %s", path, strerror(errno));
	return sync_folder(path, t->err);
}
