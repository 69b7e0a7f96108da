/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The journal's folder and its files: made, cleared, found. See cache_journal.h.
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
#include <sys/stat.h>

#include "layer/cache/cache_journal.h"
#include "layer/file/file_lock.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"
#include "nbdrs/log.h"
#include "nbdrs/reactor.h"

/* --- Segments --------------------------------------------------------------------------------- */

enum { FILES_MAX = 1 << 20 };

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

	if (j->last_file >= FILES_MAX)
		return -ENOSPC; /* replay looks at no more */
	seg->file = j->last_file + 1;
	segment_name(seg->file, name, sizeof(name));
	seg->fd = io_openat(j->dir_fd, name, O_RDWR | O_CREAT | O_EXCL, 0600);
	if (seg->fd >= 0 || seg->fd == -EEXIST)
		j->last_file = seg->file;
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
		if (io_unlinkat(j->dir_fd, name, 0) == 0)
			j->last_file--; /* else it stays, empty: in nobody's way */
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
	(void)snprintf(h.identity, sizeof(h.identity), "%s", j->conf.identity);
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

int segment_remove(struct journal *j, struct segment *seg)
{
	char name[32];
	int rc = 0;

	if (seg->fd >= 0) {
		segment_name(seg->file, name, sizeof(name));
		rc = io_unlinkat(j->dir_fd, name, 0);
		(void)io_close(seg->fd); /* it has nothing that counts */
	}
	segment_free(seg);
	return rc;
}

int segment_read_heads(int fd, uint64_t *size, uint8_t *bytes)
{
	struct iovec v = { bytes, SEGMENT_HEADS };
	struct stat st;
	int rc = io_fstat(fd, &st);

	if (rc)
		return rc;
	*size = (uint64_t)st.st_size;
	memset(bytes, 0, SEGMENT_HEADS);
	return *size < SEGMENT_HEAD ? 0 : io_pread_full(fd, &v, 1, 0);
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
int journal_folder_lock(int dir_fd, const char *path, bool is_ro, struct err *err)
{
	struct lock_job l = { dir_fd, is_ro, path, err };
	int rc = io_flock(dir_fd, is_ro ? LOCK_SH : LOCK_EX);

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
	rc = journal_folder_lock(rc, path, j->conf.is_ro, err);
	if (rc) {
		(void)io_close(j->dir_fd);
		j->dir_fd = -1;
	}
	return rc;
}

struct names {
	uint32_t *files;
	size_t n, room;
};

/* "journal-000012" -> 12; 0 = another file. */
static uint32_t parse_name(const char *name)
{
	char again[32];
	unsigned long n;
	char *end;

	if (strncmp(name, "journal-", 8) != 0)
		return 0;
	n = strtoul(name + 8, &end, 10);
	if (*end || n == 0 || n > FILES_MAX)
		return 0;
	segment_name((uint32_t)n, again, sizeof(again));
	return strcmp(again, name) == 0 ? (uint32_t)n : 0;
}

static int note_file(void *arg, const char *name)
{
	struct names *s = arg;
	const uint32_t file = parse_name(name);

	if (!file)
		return 0;
	if (s->n == s->room) {
		const size_t room = MAX(2 * s->room, (size_t)64);
		uint32_t *files = realloc(s->files, room * sizeof(*files));

		if (!files)
			return -ENOMEM;
		s->files = files;
		s->room = room;
	}
	s->files[s->n++] = file;
	return 0;
}

static int by_number(const void *a, const void *b)
{
	const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

int journal_folder_list(int dir_fd, uint32_t **files, size_t *n)
{
	struct names names = { 0 };
	int rc = io_list(dir_fd, note_file, &names);

	if (rc) {
		free(names.files);
		return rc;
	}
	if (names.n)
		qsort(names.files, names.n, sizeof(*names.files), by_number);
	*files = names.files;
	*n = names.n;
	return 0;
}
