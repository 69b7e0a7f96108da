/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Another size for the file of layer `file`, while it is served: a regular file is made longer (by a hole) or cut; a
 * block device has the size that it has, so that one is only looked at anew.
 *
 * Crash: the file has one size or the other. It is on disk when the task returns.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "layer/file/file_int.h"

static int check_block(const struct file *f, uint64_t size, struct err *err)
{
	uint64_t has;

	if (ioctl(f->fd, BLKGETSIZE64, &has) != 0)
		return err_set(err, -errno, "%s: cannot read its size: %s", f->path, strerror(errno));
	return has == size ? 0 :
			     err_set(err, -EINVAL, "%s is a block device of %" PRIu64 " bytes; give it %" PRIu64
				     " first, with its own tools", f->path, has, size);
}

int file_check_resize_task(void *task)
{
	const struct file_task *t = task;
	const struct file *f = t->layer->self;

	if (f->direct_align && t->size % f->direct_align)
		return err_set(t->err, -EINVAL, "%s: %" PRIu64 " bytes is no multiple of %u, which direct needs",
			       f->path, t->size, f->direct_align);
	return f->is_block ? check_block(f, t->size, t->err) : 0;
}

int file_resize_task(void *task)
{
	const struct file_task *t = task;
	const struct file *f = t->layer->self;

	if (f->is_block)
		return check_block(f, t->size, t->err);
	if (t->size > t->layer->size && f->opt_prealloc != PREALLOC_OFF &&
	    fallocate(f->fd, 0, (off_t)t->layer->size, (off_t)(t->size - t->layer->size)) != 0)
		return err_set(t->err, -errno, "%s: cannot reserve %" PRIu64 " bytes: %s", f->path, t->size,
			       strerror(errno));
	if (ftruncate(f->fd, (off_t)t->size) != 0)
		return err_set(t->err, -errno, "%s: cannot give it %" PRIu64 " bytes: %s", f->path, t->size,
			       strerror(errno));
	if (fsync(f->fd) != 0)
		return err_set(t->err, -errno, "%s: has %" PRIu64 " bytes now, but cannot be synced: %s", f->path,
			       t->size, strerror(errno));
	return 0;
}
