/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The calls of io.h on names and on whole files: system calls on the offload pool. They are rare, so no
 * engine has a faster way for them; the simulation has its own.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "core/reactor_int.h"
#include "nbdrs/io.h"

static int list(const struct name_op *op)
{
	/* A description of its own: two listings must not share a position. */
	_cleanup_close_ int fd = openat(op->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
	const struct dirent *d;
	int rc = 0;

	if (!dir)
		return -errno;
	(void)TAKE_FD(fd); /* closedir's */
	while (rc == 0 && (errno = 0, d = readdir(dir)) != NULL) {
		if (strcmp(d->d_name, ".") != 0 && strcmp(d->d_name, "..") != 0)
			rc = op->fn(op->arg, d->d_name);
	}
	if (d == NULL)
		rc = -errno;
	(void)closedir(dir);
	return rc;
}

static int call(const struct name_op *op)
{
	switch (op->kind) {
	case NAME_OPEN: return openat(op->fd, op->name, op->flags | O_CLOEXEC, op->mode);
	case NAME_CLOSE: return close(op->fd);
	case NAME_STAT: return fstat(op->fd, op->st);
	case NAME_TRUNCATE: return ftruncate(op->fd, (off_t)op->size);
	case NAME_SYNC: return fsync(op->fd);
	case NAME_RENAME: return renameat(op->fd, op->name, op->fd, op->to);
	case NAME_UNLINK: return unlinkat(op->fd, op->name, op->flags);
	case NAME_MKDIR: return mkdirat(op->fd, op->name, op->mode);
	case NAME_LOCK: return flock(op->fd, op->flags | LOCK_NB);
	case NAME_LIST: break; /* names_fn has it */
	}
	errno = ENOSYS;
	return -1;
}

static int names_fn(void *arg)
{
	const struct name_op *op = arg;
	int rc;

	if (op->kind == NAME_LIST)
		return list(op);
	do
		rc = call(op);
	while (rc < 0 && errno == EINTR &&
	       op->kind != NAME_CLOSE); /* close has closed it all the same */
	return rc < 0 ? -errno : rc;
}

static CO_FN int names(const struct name_op *op)
{
	if (unlikely(sim_engine != NULL))
		return sim_engine->names(reactor_self()->engine_state, op);
	return offload(names_fn, (void *)(uintptr_t)op);
}

int io_openat(int dir_fd, const char *path, int flags, mode_t mode)
{
	return names(&(struct name_op){
		.kind = NAME_OPEN, .fd = dir_fd, .name = path, .flags = flags, .mode = mode });
}

int io_close(int fd)
{
	return names(&(struct name_op){ .kind = NAME_CLOSE, .fd = fd });
}

int io_fstat(int fd, struct stat *st)
{
	return names(&(struct name_op){ .kind = NAME_STAT, .fd = fd, .st = st });
}

int io_ftruncate(int fd, uint64_t size)
{
	return names(&(struct name_op){ .kind = NAME_TRUNCATE, .fd = fd, .size = size });
}

int io_fsync(int fd)
{
	return names(&(struct name_op){ .kind = NAME_SYNC, .fd = fd });
}

int io_renameat(int dir_fd, const char *from, const char *to)
{
	return names(
		&(struct name_op){ .kind = NAME_RENAME, .fd = dir_fd, .name = from, .to = to });
}

int io_unlinkat(int dir_fd, const char *name, int flags)
{
	return names(&(struct name_op){
		.kind = NAME_UNLINK, .fd = dir_fd, .name = name, .flags = flags });
}

int io_mkdirat(int dir_fd, const char *name, mode_t mode)
{
	return names(
		&(struct name_op){ .kind = NAME_MKDIR, .fd = dir_fd, .name = name, .mode = mode });
}

int io_flock(int fd, int op)
{
	return names(&(struct name_op){ .kind = NAME_LOCK, .fd = fd, .flags = op });
}

int io_list(int dir_fd, int (*fn)(void *arg, const char *name), void *arg)
{
	return names(&(struct name_op){ .kind = NAME_LIST, .fd = dir_fd, .fn = fn, .arg = arg });
}

ssize_t io_preadv_nowait(int fd, const struct iovec *iov, unsigned n, uint64_t off)
{
	ssize_t rc;

	if (unlikely(sim_engine != NULL))
		return sim_engine->read_nowait(
			reactor_self()->engine_state,
			&(struct file_op){
				.kind = FILE_READ, .fd = fd, .iov = iov, .iov_n = n, .off = off });
	do
		rc = preadv2(fd, iov, (int)n, (off_t)off, RWF_NOWAIT);
	while (rc < 0 && errno == EINTR);
	return rc < 0 ? -errno : rc;
}
