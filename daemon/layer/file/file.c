/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer `file`: a regular file or a block device.
 *
 *	flush	fdatasync; left out when no write was answered since the last good one. Once one failed, the
 *		kernel may have dropped dirty pages, so every later flush and FUA fails too, until the daemon is
 *		restarted and the operator has looked.
 *	FUA	RWF_DSYNC; for zero and trim an fdatasync after it.
 *	trim	hole punched (regular) or BLKDISCARD (block device); where the medium cannot, nothing happens.
 *	zero	hole punched where allowed (IO_PUNCH), else FALLOC_FL_ZERO_RANGE, else -ENOTSUP (written above).
 *	crash	what was flushed is there; a write in flight is there wholly, partly (by 512-byte sectors), or not.
 *	writers	one: an OFD lock on the whole file (see file_setup.c). Connections: any number, one page cache.
 *
 * Nothing here may block the reactor on the disk, and nothing that is in memory should pay for a detour:
 *	reads	preadv2(RWF_NOWAIT), and the engine for what was not cached; or lent from a mapping (filemap.h);
 *	writes	pwritev into the page cache at once, where that is likely not to wait (file_io.c).
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include "layer/file/file_int.h"
#include "layer/file/filemap.h"
#include "layer/layers.h"
#include "nbdrs/buf.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"
#include "nbdrs/reactor.h"

struct file_chan {
	struct filemap *map; /* NULL = does not lend */
};

/* ---- read ---- */

/* O_DIRECT wants aligned memory; what comes out of receive buffers is not. */
static bool is_mem_aligned(const struct iov *iov, uint32_t to)
{
	for (unsigned i = 0; i < iov->n; i++)
		if (((uintptr_t)iov->v[i].iov_base | iov->v[i].iov_len) & (to - 1))
			return false;
	return true;
}

static CO_FN int read_direct(struct file *f, struct ext e, const struct iov *iov)
{
	struct iovec v;
	void *bounce;
	int rc;

	if (is_mem_aligned(iov, f->direct_align))
		return io_pread_full(f->fd, iov->v, iov->n, e.off);
	bounce = buf_get(e.len);
	if (bounce == NULL)
		return -ENOMEM;
	v = (struct iovec){ bounce, e.len };
	rc = io_pread_full(f->fd, &v, 1, e.off);
	if (rc == 0)
		(void)iov_copy_in(iov, 0, bounce, e.len);
	buf_put(bounce, e.len);
	return rc;
}

static CO_FN int file_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	struct file *f = c->layer->self;
	struct iovec store[IOV_SLICE_MAX];
	struct iov rest;
	size_t done;

	(void)fl;
	if (f->direct_align)
		return read_direct(f, e, iov);
	done = file_io_read_cached(&f->io, f->fd, e, iov);
	if (likely(done == e.len))
		return 0;
	rest = iov_slice(iov, done, e.len - done, store, IOV_SLICE_MAX);
	return io_pread_full(f->fd, rest.v, rest.n, e.off + done);
}

static int file_lend(struct chan *c, struct ext e, struct loan *loan)
{
	struct file_chan *fc = c->self;

	return fc->map ? filemap_lend(fc->map, c->layer->size, e.off, e.len, loan) : -ENOTSUP;
}

/* ---- write ---- */

static void count_write(struct file *f)
{
	/* Release: a flush that reads the new count sees the write done (see file_flush). */
	atomic_fetch_add_explicit(&f->written, 1, memory_order_release);
}

static CO_FN int write_direct(struct file *f, struct ext e, const struct iov *iov, int rwf)
{
	struct iovec v;
	void *bounce;
	int rc;

	if (is_mem_aligned(iov, f->direct_align))
		return io_pwrite_full(f->fd, iov->v, iov->n, e.off, rwf);
	bounce = buf_get(e.len);
	if (bounce == NULL)
		return -ENOMEM;
	(void)iov_copy_out(iov, 0, bounce, e.len);
	v = (struct iovec){ bounce, e.len };
	rc = io_pwrite_full(f->fd, &v, 1, e.off, rwf);
	buf_put(bounce, e.len);
	return rc;
}

static CO_FN int file_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	struct file *f = c->layer->self;
	int rwf = fl & IO_FUA ? RWF_DSYNC : 0;
	int rc;

	if (rwf && atomic_load(&f->sync_error) != 0)
		return atomic_load(&f->sync_error);
	rc = f->direct_align ? write_direct(f, e, iov, rwf) : file_io_write(&f->io, f->fd, e, iov, rwf);
	/* Counted when it failed too: part of it may be in the page cache. */
	count_write(f);
	if (rwf && rc == -EIO) {
		int none = 0;

		(void)atomic_compare_exchange_strong(&f->sync_error, &none, rc);
	}
	/* Another request may have been told of the failure of this one's pages. */
	return rwf && rc == 0 ? atomic_load(&f->sync_error) : rc;
}

/* ---- flush ---- */

static bool is_synced(struct file *f, uint64_t upto)
{
	/* The first one always runs: an earlier process may have left dirty pages. */
	return atomic_load(&f->was_synced) && atomic_load(&f->synced) >= upto;
}

/* With sync_lock held. */
static CO_FN int sync_now(struct file *f)
{
	/* Counted after waiting for the lock, so it covers those who will wait for it behind us. */
	uint64_t upto = atomic_load_explicit(&f->written, memory_order_acquire);
	int rc = io_fdatasync(f->sync_fd);
	int none = 0;

	if (rc != 0) {
		(void)atomic_compare_exchange_strong(&f->sync_error, &none, rc);
		return rc;
	}
	atomic_store(&f->synced, upto);
	atomic_store(&f->was_synced, true);
	return atomic_load(&f->sync_error);
}

static CO_FN int file_flush(struct chan *c)
{
	struct file *f = c->layer->self;
	uint64_t upto;
	int rc;

	rc = atomic_load(&f->sync_error);
	if (rc != 0)
		return rc;
	/*
	 * Acquire, and before the fdatasync: every write that was answered has counted itself before its
	 * answer, so it is in `upto` and its pages are dirty now.
	 */
	upto = atomic_load_explicit(&f->written, memory_order_acquire);
	if (f->is_ro || is_synced(f, upto))
		return 0;
	/*
	 * One at a time: the kernel tells a failure once, so an fdatasync beside the one that is told would
	 * succeed with the same pages lost. Those who waited mostly find the work done.
	 */
	co_mutex_lock(&f->sync_lock);
	rc = atomic_load(&f->sync_error);
	if (rc == 0 && !is_synced(f, upto))
		rc = sync_now(f);
	co_mutex_unlock(&f->sync_lock);
	return rc;
}

/* ---- zero and trim ---- */

static CO_FN int file_zero(struct chan *c, struct ext e, unsigned fl)
{
	struct file *f = c->layer->self;
	int rc = -ENOTSUP;

	if (fl & IO_PUNCH)
		rc = file_io_deallocate(&f->io, f->fd, FALLOC_FL_PUNCH_HOLE, e);
	/* A block device may write zeroes for ZERO_RANGE: right, but not fast. */
	if (rc == -ENOTSUP && !(f->is_block && fl & IO_FAST))
		rc = file_io_deallocate(&f->io, f->fd, FALLOC_FL_ZERO_RANGE, e);
	if (rc == -ENOTSUP)
		return rc;
	count_write(f);
	return rc == 0 && fl & IO_FUA ? file_flush(c) : rc;
}

struct discard {
	int fd;
	uint64_t range[2];
};

static int discard_task(void *arg)
{
	struct discard *d = arg;

	return ioctl(d->fd, BLKDISCARD, d->range) == 0 ? 0 : -errno;
}

static CO_FN int file_trim(struct chan *c, struct ext e, unsigned fl)
{
	struct file *f = c->layer->self;
	int rc;

	if (f->is_block) {
		struct discard d = { f->fd, { e.off, e.len } };

		rc = offload(discard_task, &d);
		if (file_io_means_cannot(rc))
			rc = 0;
	} else {
		rc = file_io_deallocate(&f->io, f->fd, FALLOC_FL_PUNCH_HOLE, e);
		if (rc == -ENOTSUP)
			rc = 0; /* trim is advice */
	}
	count_write(f);
	return rc == 0 && fl & IO_FUA ? file_flush(c) : rc;
}

/* ---- map and cache ---- */

static CO_FN int file_map(struct chan *c, struct ext e, struct extmap *m)
{
	const struct file *f = c->layer->self;

	return file_io_map(f->fd, e, m);
}

static CO_FN int file_cache(struct chan *c, struct ext e)
{
	const struct file *f = c->layer->self;

	return f->direct_align ? 0 : file_io_bring(f->fd, e);
}

/* ---- life ---- */

static CO_FN int file_open(struct layer *l, struct err *err)
{
	struct file *f = l->self;
	struct file_task t = { .layer = l, .err = err };

	co_mutex_init(&f->sync_lock);
	return offload(file_open_task, &t);
}

static int close_task(void *arg)
{
	struct file *f = arg;

	/* Everything was flushed, or the flush's error was reported. */
	(void)close(f->fd);
	if (f->sync_fd >= 0)
		(void)close(f->sync_fd);
	return 0;
}

static CO_FN void file_close(struct layer *l)
{
	struct file *f = l->self;

	(void)offload(close_task, f); /* always 0 */
	co_mutex_destroy(&f->sync_lock);
	free(f->path);
	f->path = NULL;
}

static int file_chan_open(struct chan *c)
{
	const struct file *f = c->layer->self;
	struct file_chan *fc = c->self;

	if (!(c->layer->caps & CAN_LEND))
		return 0;
	fc->map = filemap_new(f->fd, c->layer->size);
	return fc->map ? 0 : -ENOMEM;
}

static void file_chan_close(struct chan *c)
{
	struct file_chan *fc = c->self;

	filemap_free(fc->map);
}

static CO_FN int file_create(struct layer *l, const struct obj *obj, uint64_t size, bool force,
			     struct err *err)
{
	struct file_task t = { .layer = l, .size = size, .force = force, .err = err };

	(void)obj;
	return offload(file_create_task, &t);
}

static CO_FN int file_destroy(struct layer *l, const struct obj *obj, struct err *err)
{
	struct file_task t = { .layer = l, .err = err };

	(void)obj;
	return offload(file_destroy_task, &t);
}

static CO_FN int file_resize(struct chan *c, uint64_t size, enum resize_phase phase, struct err *err)
{
	struct file_task t = { .layer = c->layer, .size = size, .err = err };
	int rc;

	if (phase == RESIZE_AFTER)
		return 0;
	rc = offload(phase == RESIZE_BEFORE ? file_check_resize_task : file_resize_task, &t);
	if (!rc && phase == RESIZE_NOW)
		c->layer->size = size;
	return rc;
}

static void file_info(struct layer *l, struct info *i)
{
	const struct file *f = l->self;

	i->add(i, "file", f->path);
	i->add(i, "kind", f->is_block ? "block device" : "regular file");
	i->add(i, "cache", f->direct_align ? "none (O_DIRECT)" : "page cache");
}

static const char *file_backing(struct layer *l)
{
	const struct file *f = l->self;

	return f->path;
}

static const struct opt file_opts[] = {
	{ .name = "direct", .type = OPT_BOOL, .field = offsetof(struct file, opt_direct), .def = "off",
	  .help = "bypass the page cache (O_DIRECT)" },
	{ .name = "lend", .type = OPT_BOOL, .field = offsetof(struct file, opt_lend), .def = "on",
	  .help = "send cached data straight from the page cache, without a copy" },
	{ .name = "prealloc", .type = OPT_ENUM, .field = offsetof(struct file, opt_prealloc), .def = "off",
	  .choices = "off|falloc|full", .help = "init: leave the file sparse, reserve its blocks, or write zeroes" },
	OPT_END,
};

const struct layer_ops file_layer = {
	.name = "file",
	.help = "a regular file or a block device",
	.keyed = &file_store_layer,
	.opts = file_opts,
	.takes_target = true,
	.is_store = true,
	.self_size = sizeof(struct file),
	.chan_size = sizeof(struct file_chan),
	.open = file_open,
	.close = file_close,
	.chan_open = file_chan_open,
	.chan_close = file_chan_close,
	.read = file_read,
	.write = file_write,
	.zero = file_zero,
	.trim = file_trim,
	.flush = file_flush,
	.map = file_map,
	.cache = file_cache,
	.lend = file_lend,
	.create = file_create,
	.destroy = file_destroy,
	.resize = file_resize,
	.info = file_info,
	.backing = file_backing,
};
