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
 *	writes	pwritev into the page cache at once. That may stall when the kernel throttles writers: one that
 *		took longer than SLOW_NS sends all writes of the next SLOW_PERIOD_NS through the engine.
 *		A write to part of a page goes the long way unless that page is in memory.
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

#include "layer/file_int.h"
#include "layer/filemap.h"
#include "layer/layers.h"
#include "nbdrs/buf.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"
#include "nbdrs/reactor.h"

#define SLOW_NS UINT64_C(1000000)
#define SLOW_PERIOD_NS UINT64_C(100000000)
enum { PAGE = 4096 };

struct file_chan {
	struct filemap *map; /* NULL = does not lend */
};

/* ---- read ---- */

/* Bytes read without waiting, 0 when none. */
static size_t read_cached(struct file *f, struct ext e, const struct iov *iov)
{
	ssize_t n;

	if (!atomic_load_explicit(&f->can_nowait, memory_order_relaxed)) {
		if (!f->is_tmpfs)
			return 0;
		/* Memory, but without RWF_NOWAIT on this kernel. */
		n = preadv(f->fd, iov->v, (int)iov->n, (off_t)e.off);
	} else {
		n = preadv2(f->fd, iov->v, (int)iov->n, (off_t)e.off, RWF_NOWAIT);
		if (n < 0 && (errno == EOPNOTSUPP || errno == EINVAL))
			atomic_store_explicit(&f->can_nowait, false, memory_order_relaxed);
	}
	return n > 0 ? (size_t)n : 0;
}

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
	done = read_cached(f, e, iov);
	if (likely(done == e.len))
		return 0;
	rest = iov_slice(iov, done, e.len - done, store, IOV_SLICE_MAX);
	return io_pread_full(f->fd, rest.v, rest.n, e.off + done);
}

static int file_lend(struct chan *c, struct ext e, struct loan *loan)
{
	struct file_chan *fc = c->self;

	return fc->map ? filemap_lend(fc->map, e.off, e.len, loan) : -ENOTSUP;
}

/* ---- write ---- */

static void count_write(struct file *f)
{
	/* Release: a flush that reads the new count sees the write done (see file_flush). */
	atomic_fetch_add_explicit(&f->written, 1, memory_order_release);
}

static bool is_page_cached(const struct file *f, uint64_t off)
{
	char byte;
	struct iovec v = { &byte, 1 };

	return preadv2(f->fd, &v, 1, (off_t)off, RWF_NOWAIT) == 1;
}

/* Can it go straight into the page cache, without reading from the disk first? */
static bool can_write_inline(struct file *f, struct ext e)
{
	uint64_t end = e.off + e.len;

	if (f->is_tmpfs)
		return true;
	if (atomic_load_explicit(&f->slow_until, memory_order_relaxed) > reactor_now())
		return false;
	return ((e.off & (PAGE - 1)) == 0 || is_page_cached(f, e.off)) &&
	       ((end & (PAGE - 1)) == 0 || is_page_cached(f, end - 1));
}

/* Bytes written, or -errno. */
static ssize_t write_inline(struct file *f, struct ext e, const struct iov *iov)
{
	uint64_t before = now_ns();
	uint64_t after;
	ssize_t n;

	do
		n = pwritev(f->fd, iov->v, (int)iov->n, (off_t)e.off);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	after = now_ns();
	if (unlikely(after - before > SLOW_NS + e.len)) /* allow 1 GB/s for large ones */
		atomic_store_explicit(&f->slow_until, after + SLOW_PERIOD_NS, memory_order_relaxed);
	return n;
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

static CO_FN int write_buffered(struct file *f, struct ext e, const struct iov *iov, int rwf)
{
	struct iovec store[IOV_SLICE_MAX];
	struct iov rest = *iov;
	ssize_t done = 0;

	if (rwf == 0 && can_write_inline(f, e)) {
		done = write_inline(f, e, iov);
		if (done < 0)
			return (int)done;
		if (likely((size_t)done == e.len))
			return 0;
		rest = iov_slice(iov, (size_t)done, e.len - (size_t)done, store, IOV_SLICE_MAX);
	}
	return io_pwrite_full(f->fd, rest.v, rest.n, e.off + (uint64_t)done, rwf);
}

static CO_FN int file_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	struct file *f = c->layer->self;
	int rwf = fl & IO_FUA ? RWF_DSYNC : 0;
	int rc;

	if (rwf && atomic_load(&f->sync_error) != 0)
		return atomic_load(&f->sync_error);
	rc = f->direct_align ? write_direct(f, e, iov, rwf) : write_buffered(f, e, iov, rwf);
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

static bool means_cannot(int rc)
{
	return rc == -EOPNOTSUPP || rc == -ENOSYS || rc == -ENOTTY;
}

/* Tries one mode of fallocate and remembers when the medium cannot do it. */
static CO_FN int deallocate(struct file *f, _Atomic bool *can, int mode, struct ext e)
{
	int rc;

	if (!atomic_load_explicit(can, memory_order_relaxed))
		return -ENOTSUP;
	rc = io_fallocate(f->fd, mode | FALLOC_FL_KEEP_SIZE, e.off, e.len);
	if (!means_cannot(rc))
		return rc;
	atomic_store_explicit(can, false, memory_order_relaxed);
	return -ENOTSUP;
}

static CO_FN int file_zero(struct chan *c, struct ext e, unsigned fl)
{
	struct file *f = c->layer->self;
	int rc = -ENOTSUP;

	if (fl & IO_PUNCH)
		rc = deallocate(f, &f->can_punch, FALLOC_FL_PUNCH_HOLE, e);
	/* A block device may write zeroes for ZERO_RANGE: right, but not fast. */
	if (rc == -ENOTSUP && !(f->is_block && fl & IO_FAST))
		rc = deallocate(f, &f->can_zero_range, FALLOC_FL_ZERO_RANGE, e);
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
		if (means_cannot(rc))
			rc = 0;
	} else {
		rc = deallocate(f, &f->can_punch, FALLOC_FL_PUNCH_HOLE, e);
		if (rc == -ENOTSUP)
			rc = 0; /* trim is advice */
	}
	count_write(f);
	return rc == 0 && fl & IO_FUA ? file_flush(c) : rc;
}

/* ---- map and cache ---- */

struct map_task {
	int fd;
	struct ext e;
	struct extmap *m;
};

/* lseek may read extents from the disk, so this runs on the pool. */
static int map_task(void *arg)
{
	struct map_task *t = arg;
	uint64_t end = t->e.off + t->e.len;

	for (uint64_t at = t->e.off; at < end;) {
		off_t data = lseek(t->fd, (off_t)at, SEEK_DATA);
		off_t hole;

		if (data < 0 && errno == ENXIO)
			data = (off_t)end; /* a hole up to the end of the file */
		if (data < 0)
			return -errno;
		if ((uint64_t)data > at) {
			uint64_t len = MIN((uint64_t)data, end) - at;

			if (!extmap_add(t->m, len, EXTENT_HOLE | EXTENT_ZERO))
				return 0;
			at += len;
			continue;
		}
		hole = lseek(t->fd, (off_t)at, SEEK_HOLE);
		if (hole < 0)
			return -errno;
		if ((uint64_t)hole <= at)
			return -EIO; /* the file changes under us faster than we can look */
		if (!extmap_add(t->m, MIN((uint64_t)hole, end) - at, 0))
			return 0;
		at = MIN((uint64_t)hole, end);
	}
	return 0;
}

static CO_FN int file_map(struct chan *c, struct ext e, struct extmap *m)
{
	const struct file *f = c->layer->self;
	struct map_task t = { f->fd, e, m };
	int rc = offload(map_task, &t);

	/* Some file systems know no holes: then all is data, which is always a true answer. */
	if (rc != 0 && m->n == 0) {
		(void)extmap_add(m, e.len, 0);
		rc = 0;
	}
	return rc;
}

struct cache_task {
	int fd;
	struct ext e;
};

static int cache_task(void *arg)
{
	struct cache_task *t = arg;

	return -posix_fadvise(t->fd, (off_t)t->e.off, (off_t)t->e.len, POSIX_FADV_WILLNEED);
}

static CO_FN int file_cache(struct chan *c, struct ext e)
{
	const struct file *f = c->layer->self;
	struct cache_task t = { f->fd, e };

	return f->direct_align ? 0 : offload(cache_task, &t);
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
	.info = file_info,
	.backing = file_backing,
};
