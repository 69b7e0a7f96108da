/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The journal's folder and its files: made, cleared, removed. See cache_journal.h.
 *
 * A file gets all its space when it is made, so a full disk shows there and nowhere else, and it is
 * used again and again: syncing data over old data costs the file system less than syncing a file
 * that grows.
 */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>

#include "layer/cache/cache_journal.h"
#include "layer/file/file_lock.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"
#include "nbdrs/log.h"
#include "nbdrs/reactor.h"

/* --- Segments --------------------------------------------------------------------------------- */

void segment_name(uint32_t file, char *to, size_t len)
{
	(void)snprintf(to, len, "journal-%06" PRIu32, file);
}

void segment_free(struct segment *seg)
{
	if (!seg)
		return;
	if (seg->mem)
		(void)munmap(seg->mem, seg->room); /* can't fail for ours */
	free(seg);
}

static int make_in_memory(struct segment *seg)
{
	void *p = mmap(NULL, seg->room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		return -ENOMEM;
	seg->mem = p;
	return 0;
}

/* Where space can't be taken beforehand it is taken by writing. */
static CO_FN int take_space(int fd, uint64_t len)
{
	int rc = io_fallocate(fd, 0, 0, len);

	return rc == -EOPNOTSUPP ? io_ftruncate(fd, len) : rc;
}

static CO_FN int make_file(struct journal *j, struct segment *seg)
{
	char name[32];
	int rc;

	seg->file = ++j->last_file;
	segment_name(seg->file, name, sizeof(name));
	seg->fd = io_openat(j->dir_fd, name, O_RDWR | O_CREAT | O_EXCL, 0600);
	if (seg->fd < 0)
		return seg->fd;
	/* Held for as long as the kernel writes to it: see journal_replay(). Not every file system has locks. */
	(void)io_flock(seg->fd, LOCK_EX);
	rc = take_space(seg->fd, seg->room);
	if (!rc)
		rc = io_fsync(seg->fd);
	if (!rc)
		rc = io_fsync(j->dir_fd);
	if (rc) {
		(void)io_unlinkat(j->dir_fd, name, 0); /* empty: in nobody's way */
		(void)io_close(seg->fd);
	}
	return rc;
}

int segment_new(struct journal *j, struct segment **out)
{
	struct segment *seg = calloc(1, sizeof(*seg));
	int rc;

	if (!seg)
		return -ENOMEM;
	list_init(&seg->node);
	seg->fd = -1;
	seg->room = j->segment_size;
	rc = j->conf.folder ? make_file(j, seg) : make_in_memory(seg);
	if (rc) {
		segment_free(seg);
		return rc;
	}
	*out = seg;
	return 0;
}

int segment_write_head(struct journal *j, struct segment *seg, uint64_t last_seq)
{
	struct segment_head h = { .number = seg->number, .last_seq = last_seq };
	const uint64_t salt = random_start();
	uint8_t bytes[SEGMENT_HEADS];
	struct iovec v = { bytes, sizeof(bytes) };

	memcpy(seg->salt, &salt, sizeof(seg->salt));
	if (seg->fd < 0)
		return 0;
	memcpy(h.salt, seg->salt, sizeof(h.salt));
	segment_head_write(bytes, &h, j->conf.volume);
	return io_pwrite_full(seg->fd, &v, 1, 0, 0);
}

int segment_clear(struct segment *seg)
{
	static char zeroes[SEGMENT_HEADS]; /* nobody writes to it */
	struct iovec v = { zeroes, sizeof(zeroes) };
	int rc;

	if (seg->fd < 0) {
		/* The memory is the system's until it is written again. */
		(void)madvise(seg->mem, seg->room, MADV_DONTNEED);
		return 0;
	}
	rc = io_pwrite_full(seg->fd, &v, 1, 0, 0);
	return rc ? rc : io_fdatasync(seg->fd);
}

int segment_read(struct segment *seg, uint64_t at, const struct iov *iov)
{
	ssize_t n;

	if (seg->fd < 0) {
		(void)iov_copy_in(iov, 0, seg->mem + at, iov->len);
		return 0;
	}
	n = io_preadv_nowait(seg->fd, iov->v, iov->n, at);
	return n == (ssize_t)iov->len ? 0 : io_pread_full(seg->fd, iov->v, iov->n, at);
}

/* --- The folder ------------------------------------------------------------------------------- */

struct lock_job {
	int fd;
	bool is_ro;
	const char *path;
	struct err *err;
};

static int lock_task(void *arg)
{
	const struct lock_job *l = arg;

	return file_lock(l->fd, LOCK_FLOCK, l->is_ro, l->path, l->err);
}

/* The second way waits for a killed daemon's lock, and names whoever holds it. */
static CO_FN int lock_folder(struct journal *j, struct err *err)
{
	struct lock_job l = { j->dir_fd, j->conf.is_ro, j->conf.folder, err };
	int rc = io_flock(j->dir_fd, l.is_ro ? LOCK_SH : LOCK_EX);

	if (rc)
		rc = offload(lock_task, &l);
	return rc ? err_prefix(err, rc, "layer cache") : 0;
}

static CO_FN int make_folder(const char *path, struct err *err)
{
	_cleanup_free_ char *copy = strdup(path);
	int dir, rc;

	if (!copy)
		return err_set(err, -ENOMEM, "out of memory");
	rc = io_mkdirat(AT_FDCWD, path, 0700); /* a disk holds whatever its guest keeps secret */
	if (rc == -ENOENT)
		return err_set(err, rc,
			       "layer cache: option \"disk\": the folder that %s is to be made in "
			       "does not exist; make it",
			       path);
	if (rc && rc != -EEXIST)
		return err_set(err, rc, "layer cache: option \"disk\": %s cannot be made: %s", path,
			       strerror(-rc));
	/* Also when it is there: who made it may have been killed before this. */
	dir = io_openat(AT_FDCWD, dirname(copy), O_RDONLY | O_DIRECTORY, 0);
	rc = dir < 0 ? dir : io_fsync(dir);
	if (dir >= 0)
		(void)io_close(dir); /* only looked at */
	return rc ? err_set(err, rc, "layer cache: %s: cannot sync the folder it is in: %s", path,
			    strerror(-rc))
		  : 0;
}

int journal_folder_open(struct journal *j, struct err *err)
{
	const char *path = j->conf.folder;
	int rc = j->conf.is_ro ? 0 : make_folder(path, err);

	if (rc)
		return rc;
	rc = io_openat(AT_FDCWD, path, O_RDONLY | O_DIRECTORY, 0);
	if (rc == -ENOENT && j->conf.is_ro)
		return 0; /* there is no journal */
	if (rc < 0)
		return err_set(err, rc, "layer cache: option \"disk\": %s cannot be opened: %s%s",
			       path, strerror(-rc), rc == -ENOTDIR ? "; it must be a folder" : "");
	j->dir_fd = rc;
	rc = lock_folder(j, err);
	if (rc) {
		(void)io_close(j->dir_fd);
		j->dir_fd = -1;
	}
	return rc;
}

struct removal {
	char (*names)[32];
	size_t n, room;
};

static int note_name(void *arg, const char *name)
{
	struct removal *r = arg;

	if (strncmp(name, "journal-", 8) != 0 || strlen(name) >= sizeof(r->names[0]))
		return 0;
	if (r->n == r->room) {
		const size_t room = MAX(2 * r->room, (size_t)64);
		char(*names)[32] = realloc(r->names, room * sizeof(*names));

		if (!names)
			return -ENOMEM;
		r->names = names;
		r->room = room;
	}
	(void)snprintf(r->names[r->n++], sizeof(r->names[0]), "%s", name);
	return 0;
}

int journal_remove(const char *folder, struct err *err)
{
	struct journal j = { .conf = { .folder = folder }, .dir_fd = -1 };
	struct removal r = { 0 };
	int rc = io_openat(AT_FDCWD, folder, O_RDONLY | O_DIRECTORY, 0);

	if (rc == -ENOENT)
		return 0;
	if (rc < 0)
		return err_set(err, rc, "layer cache: %s: %s", folder, strerror(-rc));
	j.dir_fd = rc;
	rc = lock_folder(&j, err);
	if (rc)
		goto out;
	rc = io_list(j.dir_fd, note_name, &r);
	for (size_t i = 0; i < r.n && !rc; i++)
		rc = io_unlinkat(j.dir_fd, r.names[i], 0);
	/* What comes back after a crash of the machine would be played over the next volume of this name. */
	if (!rc)
		rc = io_fsync(j.dir_fd);
	if (!rc)
		rc = io_unlinkat(AT_FDCWD, folder, AT_REMOVEDIR);
	if (rc == -ENOTEMPTY) {
		log_info("the cache's folder stays, it has other files folder=%s", folder);
		rc = 0;
	}
	if (rc)
		(void)err_set(err, rc, "layer cache: %s cannot be removed: %s", folder,
			      strerror(-rc));
out:
	free(r.names);
	(void)io_close(j.dir_fd); /* only looked at */
	return rc;
}
