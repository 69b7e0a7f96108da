/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * file where objects are wanted: TARGET is a folder, an object is the file in it that has exactly its name.
 *
 *	put	written to a temporary file beside it, fdatasync, rename: whoever looks, also after a crash of the
 *		machine, finds the old object or the new one, never a mixture. The name is on the disk with the next
 *		flush, or with FUA at once (fsync of the folder).
 *	write	in place, into the page cache; makes and lengthens the object. On the disk with the next flush, or with
 *		FUA at once (fdatasync of that file, and fsync of the folder when names have changed).
 *	flush	fdatasync of every file written since the last one, and fsync of the folder when names have changed;
 *		the first one syncs the whole file system, for what a daemon that was killed has answered. Once one
 *		failed, the kernel may have dropped dirty pages, so every later flush and FUA fails too, until the
 *		daemon is restarted and the operator has looked.
 *	trim	hole punched, the size stays; where the file system cannot, nothing happens.
 *	zero	hole punched where allowed (IO_PUNCH), else FALLOC_FL_ZERO_RANGE, else -ENOTSUP (written above).
 *	del	unlink; on the disk with the next flush.
 *	crash	what was flushed is there; a write in place that was not is there wholly, partly, or not.
 *	writers	one daemon a folder: flock(2) on it, exclusive for writing and shared for reading. Connections: any
 *		number.
 *
 * An etag is inode, size and modification time. Since the kernel's clock for the latter is coarse, files get times of
 * their own: at a put, and when somebody asks for the etag of one that was written to in place.
 *
 * Memory: an entry per open file, at most FDS_MAX, or an eighth of RLIMIT_NOFILE; and per request in flight.
 */
#include <errno.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "layer/file/file_store_int.h"
#include "layer/layers.h"
#include "nbdrs/buf.h"
#include "nbdrs/io.h"

enum { FDS_MAX = 4096, FDS_MIN = 8 };

bool file_is_temp(const char *name)
{
	return strncmp(name, FILE_TEMP_PREFIX, strlen(FILE_TEMP_PREFIX)) == 0;
}

/* Holds the object's slot, shared, with its file open. */
static CO_FN int hold_open(struct file_store *f, const struct obj *obj, bool create,
			   struct slot **out)
{
	struct slot *slot;
	int rc;

	if (obj->len == 0 || file_is_temp(obj->name))
		return -EINVAL;
	rc = slot_hold(&f->slots, obj, SHARED, &slot);
	if (rc)
		return rc;
	rc = slot_open(&f->slots, slot, create);
	if (rc)
		slot_release(&f->slots, slot, SHARED);
	else
		*out = slot;
	return rc;
}

/* ---- read ---- */

/* Is there nothing at `off` and behind it? */
static bool is_behind_end(int fd, uint64_t off)
{
	struct stat st;

	return fstat(fd, &st) == 0 && (uint64_t)st.st_size <= off;
}

/* What the object has of the extent; the rest is its end, and zeroes. */
static CO_FN int read_padded(struct file_store *f, int fd, struct ext e, const struct iov *iov)
{
	size_t done = file_io_read_cached(&f->io, fd, e, iov);

	while (done < e.len) {
		struct iovec store[IOV_SLICE_MAX];
		struct iov rest = iov_slice(iov, done, e.len - done, store, IOV_SLICE_MAX);
		ssize_t n = is_behind_end(fd, e.off + done)
				    ? 0
				    : io_preadv(fd, rest.v, rest.n, e.off + done);

		if (n == -EINTR || n == -EAGAIN)
			continue;
		if (n < 0)
			return (int)n;
		if (n == 0)
			break;
		done += (size_t)n;
	}
	if (done < e.len)
		iov_zero(iov, done, e.len - done);
	return 0;
}

static CO_FN int store_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	struct file_store *f = c->layer->self;
	struct slot *slot;
	int rc = hold_open(f, e.obj, false, &slot);

	if (rc)
		return rc;
	rc = read_padded(f, slot_fd(slot), e, iov);
	slot_release(&f->slots, slot, SHARED);
	return rc;
}

/* ---- write, zero, trim, flush ---- */

/* After a change of the slot's file: notes it, makes it stable with FUA, releases the slot. */
static CO_FN int changed(struct file_store *f, struct slot *slot, int rc, unsigned fl)
{
	slot_wrote(&f->slots, slot); /* when it failed too: part of it may be in the page cache */
	if (rc == 0 && fl & IO_FUA)
		rc = slot_sync(&f->slots, slot);
	slot_release(&f->slots, slot, SHARED);
	return rc == 0 && fl & IO_FUA ? names_sync(&f->slots) : rc;
}

static CO_FN int store_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	struct file_store *f = c->layer->self;
	struct slot *slot;
	int rc = hold_open(f, e.obj, true, &slot);

	if (rc)
		return rc;
	rc = file_io_write(&f->io, slot_fd(slot), e, iov, 0);
	return changed(f, slot, rc, fl);
}

static CO_FN int store_zero(struct chan *c, struct ext e, unsigned fl)
{
	struct file_store *f = c->layer->self;
	struct slot *slot;
	int rc = hold_open(f, e.obj, false, &slot);

	if (rc)
		return rc == -ENOENT ? 0 : rc;
	rc = -ENOTSUP;
	if (fl & IO_PUNCH)
		rc = file_io_deallocate(&f->io, slot_fd(slot), FALLOC_FL_PUNCH_HOLE, e);
	if (rc == -ENOTSUP)
		rc = file_io_deallocate(&f->io, slot_fd(slot), FALLOC_FL_ZERO_RANGE, e);
	return changed(f, slot, rc, fl);
}

static CO_FN int store_trim(struct chan *c, struct ext e, unsigned fl)
{
	struct file_store *f = c->layer->self;
	struct slot *slot;
	int rc = hold_open(f, e.obj, false, &slot);

	if (rc)
		return rc == -ENOENT ? 0 : rc;
	rc = file_io_deallocate(&f->io, slot_fd(slot), FALLOC_FL_PUNCH_HOLE, e);
	if (rc == -ENOTSUP)
		rc = 0; /* trim is advice */
	return changed(f, slot, rc, fl);
}

static CO_FN int store_flush(struct chan *c)
{
	struct file_store *f = c->layer->self;

	return slots_sync(&f->slots);
}

/* ---- map and cache ---- */

static CO_FN int store_map(struct chan *c, struct ext e, struct extmap *m)
{
	struct file_store *f = c->layer->self;
	struct slot *slot;
	int rc = hold_open(f, e.obj, false, &slot);

	if (rc)
		return rc;
	rc = file_io_map(slot_fd(slot), e, m);
	slot_release(&f->slots, slot, SHARED);
	return rc;
}

static CO_FN int store_cache(struct chan *c, struct ext e)
{
	struct file_store *f = c->layer->self;
	struct slot *slot;
	int rc = hold_open(f, e.obj, false, &slot);

	if (rc)
		return rc == -ENOENT ? 0 : rc;
	rc = file_io_bring(slot_fd(slot), e);
	slot_release(&f->slots, slot, SHARED);
	return rc;
}

/* ---- whole objects ---- */

static CO_FN int store_stat(struct chan *c, const struct obj *obj, struct obj_stat *st)
{
	return file_objects_stat(c->layer->self, obj, st);
}

static CO_FN int store_put(struct chan *c, const struct put *p, struct obj_stat *st)
{
	return file_objects_put(c->layer->self, p, st);
}

static CO_FN int store_del(struct chan *c, const struct obj *objs, unsigned n)
{
	return file_objects_del(c->layer->self, objs, n);
}

static CO_FN int store_list(struct chan *c, const char *prefix, list_fn *fn, void *arg)
{
	return file_objects_list(c->layer->self, prefix, fn, arg);
}

/* ---- life ---- */

static unsigned fds_limit(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
		return FDS_MIN;
	/* An eighth: there are other volumes, and clients. */
	return (unsigned)MAX(MIN(limit.rlim_cur / 8, (rlim_t)FDS_MAX), (rlim_t)FDS_MIN);
}

static CO_FN int store_open(struct layer *l, struct err *err)
{
	struct file_store *f = l->self;
	struct folder_task t = { l, err };
	int rc = offload(file_folder_open_task, &t);

	if (rc)
		return rc;
	slots_init(&f->slots, f->dir_fd, f->is_ro, fds_limit());
	l->size = 0;
	l->caps = CAN_PARTIAL | CAN_FUA | CAN_FLUSH | CAN_MULTI | CAN_MAP | CAN_PUT_IF;
	if (!f->is_ro)
		l->caps |= CAN_WRITE | CAN_TRIM | CAN_ZERO | CAN_FAST_ZERO;
	return 0;
}

static int close_task(void *arg)
{
	struct file_store *f = arg;

	slots_close(&f->slots);
	(void)close(f->dir_fd);
	return 0;
}

static CO_FN void store_close(struct layer *l)
{
	struct file_store *f = l->self;

	(void)offload(close_task, f); /* always 0 */
	free(f->path);
	f->path = NULL;
}

static CO_FN int store_create(struct layer *l, const struct obj *obj, uint64_t size, bool force,
			      struct err *err)
{
	struct folder_task t = { l, err };

	return offload(file_folder_create_task, &t);
}

static CO_FN int store_destroy(struct layer *l, const struct obj *obj, struct err *err)
{
	struct folder_task t = { l, err };

	return offload(file_folder_destroy_task, &t);
}

static void store_info(struct layer *l, struct info *i)
{
	const struct file_store *f = l->self;

	i->add(i, "folder", f->path);
}

static const char *store_backing(struct layer *l)
{
	const struct file_store *f = l->self;

	return f->path;
}

const struct layer_ops file_store_layer = {
	.name = "file",
	.help = "objects as files in a folder",
	.takes_target = true,
	.is_store = true,
	.self_size = sizeof(struct file_store),
	.open = store_open,
	.close = store_close,
	.read = store_read,
	.write = store_write,
	.zero = store_zero,
	.trim = store_trim,
	.flush = store_flush,
	.map = store_map,
	.cache = store_cache,
	.stat = store_stat,
	.put = store_put,
	.del = store_del,
	.list = store_list,
	.create = store_create,
	.destroy = store_destroy,
	.info = store_info,
	.backing = store_backing,
};
