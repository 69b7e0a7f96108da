/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Reads and writes through the page cache, without waiting where that can be had.
 *
 * A read tries RWF_NOWAIT. A write goes into the page cache at once, by pwritev. That may stall when the kernel
 * throttles writers: one that took longer than SLOW_NS sends all writes of the next SLOW_PERIOD_NS through the
 * engine. A write to part of a page, which the kernel would read from the disk first, goes the long way unless that
 * page is in memory.
 */
#include "layer/file/file_io.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/magic.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "nbdrs/io.h"
#include "nbdrs/reactor.h"

#define SLOW_NS        UINT64_C(1000000)
#define SLOW_PERIOD_NS UINT64_C(100000000)
enum { PAGE = 4096 };

/* Is RWF_NOWAIT known for this file? One byte is enough to tell; EAGAIN means it is. */
static bool knows_nowait(int fd)
{
	char byte;
	struct iovec v = { &byte, 1 };

	return preadv2(fd, &v, 1, 0, RWF_NOWAIT) >= 0 || errno == EAGAIN;
}

void file_io_init(struct file_io *io, int fd, bool is_folder)
{
	struct statfs fs;

	io->is_tmpfs = fstatfs(fd, &fs) == 0 && fs.f_type == TMPFS_MAGIC;
	io->can_nowait = is_folder || knows_nowait(fd);
	io->can_punch = io->can_zero_range = true;
	io->slow_until = 0;
}

size_t file_io_read_cached(struct file_io *io, int fd, struct ext e, const struct iov *iov)
{
	ssize_t n;

	if (!atomic_load_explicit(&io->can_nowait, memory_order_relaxed)) {
		if (!io->is_tmpfs)
			return 0;
		/* Memory, but without RWF_NOWAIT on this kernel. */
		n = preadv(fd, iov->v, (int)iov->n, (off_t)e.off);
	} else {
		n = preadv2(fd, iov->v, (int)iov->n, (off_t)e.off, RWF_NOWAIT);
		if (n < 0 && (errno == EOPNOTSUPP || errno == EINVAL))
			atomic_store_explicit(&io->can_nowait, false, memory_order_relaxed);
	}
	return n > 0 ? (size_t)n : 0;
}

static bool is_page_cached(int fd, uint64_t off)
{
	char byte;
	struct iovec v = { &byte, 1 };

	return preadv2(fd, &v, 1, (off_t)off, RWF_NOWAIT) == 1;
}

/* Can it go straight into the page cache, without reading from the disk first? */
static bool can_write_inline(struct file_io *io, int fd, struct ext e)
{
	uint64_t end = e.off + e.len;

	if (io->is_tmpfs)
		return true;
	if (atomic_load_explicit(&io->slow_until, memory_order_relaxed) > reactor_now())
		return false;
	return ((e.off & (PAGE - 1)) == 0 || is_page_cached(fd, e.off)) &&
	       ((end & (PAGE - 1)) == 0 || is_page_cached(fd, end - 1));
}

/* Bytes written, or -errno. */
static ssize_t write_inline(struct file_io *io, int fd, struct ext e, const struct iov *iov)
{
	uint64_t before = now_ns();
	uint64_t after;
	ssize_t n;

	do
		n = pwritev(fd, iov->v, (int)iov->n, (off_t)e.off);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	after = now_ns();
	if (unlikely(after - before > SLOW_NS + e.len)) /* allow 1 GB/s for large ones */
		atomic_store_explicit(&io->slow_until, after + SLOW_PERIOD_NS,
				      memory_order_relaxed);
	return n;
}

int file_io_write(struct file_io *io, int fd, struct ext e, const struct iov *iov, int rwf)
{
	struct iovec store[IOV_SLICE_MAX];
	struct iov rest = *iov;
	ssize_t done = 0;

	if (rwf == 0 && can_write_inline(io, fd, e)) {
		done = write_inline(io, fd, e, iov);
		if (done < 0)
			return (int)done;
		if (likely((size_t)done == e.len))
			return 0;
		rest = iov_slice(iov, (size_t)done, e.len - (size_t)done, store, IOV_SLICE_MAX);
	}
	return io_pwrite_full(fd, rest.v, rest.n, e.off + (uint64_t)done, rwf);
}

bool file_io_means_cannot(int rc)
{
	return rc == -EOPNOTSUPP || rc == -ENOSYS || rc == -ENOTTY;
}

int file_io_deallocate(struct file_io *io, int fd, int mode, struct ext e)
{
	_Atomic bool *can = mode == FALLOC_FL_PUNCH_HOLE ? &io->can_punch : &io->can_zero_range;
	int rc;

	if (!atomic_load_explicit(can, memory_order_relaxed))
		return -ENOTSUP;
	rc = io_fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, e.off, e.len);
	if (!file_io_means_cannot(rc))
		return rc;
	atomic_store_explicit(can, false, memory_order_relaxed);
	return -ENOTSUP;
}

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

int file_io_map(int fd, struct ext e, struct extmap *m)
{
	struct map_task t = { fd, e, m };
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

int file_io_bring(int fd, struct ext e)
{
	struct cache_task t = { fd, e };

	return offload(cache_task, &t);
}
