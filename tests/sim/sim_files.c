/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The file calls of one life: fds, faults, and when a call takes effect. Each call is two events, and a
 * crash may come at either. A read or write takes effect in part when it is submitted and for the rest
 * when it ends; a sync covers what had been written when it was submitted; everything else happens at
 * one of the two.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>

#include "core/engine.h"
#include "sim_int.h"

enum {
	FD_BASE = 1 << 20, /* no real fd: who uses it in a system call gets EBADF */
	FDS = 1024,
	MILLION = 1000000,
	/* Typical times. */
	READ_NS = 60000,
	WRITE_NS = 15000,
	SYNC_NS = 1500000,
	NAME_NS = 40000,
};

static struct open_file {
	struct inode *inode; /* NULL = free */
	int flags, lock;     /* lock: LOCK_SH, LOCK_EX, 0 */
	uint64_t errors;     /* inode's, as far as they have been reported here */
	char path[128];
} files[FDS];

static struct rule {
	enum sim_call call;
	char path[64];
	unsigned after, count;
	int error;
} rules[SIM_RULES_MAX];

/* ---- faults ---- */

void sim_set_faults(const struct sim_faults *f)
{
	world->faults = *f;
}

void sim_fail(enum sim_call call, const char *path, unsigned after, unsigned count, int error)
{
	for (unsigned k = 0; k < SIM_RULES_MAX; k++) {
		struct rule *r = &rules[k];

		if (r->count > 0)
			continue;
		*r = (struct rule){ .call = call, .after = after, .count = count, .error = error };
		(void)snprintf(r->path, sizeof(r->path), "%s", path);
		return;
	}
	(void)sim_failed(__FILE__, __LINE__, "more than %d rules", SIM_RULES_MAX);
}

static bool ends_in(const char *path, const char *end)
{
	size_t len = strlen(path), end_len = strlen(end);

	return end_len <= len && memcmp(path + len - end_len, end, end_len) == 0;
}

/* 0, or the error that this call ends with. */
static int fault(enum sim_call call, const char *path)
{
	const struct sim_faults *f = &world->faults;
	uint32_t ppm = call == SIM_READ    ? f->read_ppm
		       : call == SIM_WRITE ? f->write_ppm
		       : call == SIM_SYNC  ? f->sync_ppm
					   : 0;

	for (unsigned k = 0; k < SIM_RULES_MAX; k++) {
		struct rule *r = &rules[k];

		if (r->count == 0 || r->call != call || !ends_in(path, r->path))
			continue;
		if (r->after > 0) {
			r->after--;
			continue;
		}
		r->count--;
		return r->error;
	}
	return ppm > 0 && sim_chance(ppm) ? -EIO : 0;
}

/* ---- fds ---- */

static struct open_file *file_of(int fd)
{
	struct open_file *f = fd >= FD_BASE && fd < FD_BASE + FDS ? &files[fd - FD_BASE] : NULL;

	return f != NULL && f->inode != NULL ? f : NULL;
}

/* The folder of an ...at() call: NULL is the root. */
static int dir_of(int fd, struct inode **out)
{
	const struct open_file *f = file_of(fd);

	*out = f != NULL ? f->inode : NULL;
	if (f == NULL)
		return fd == AT_FDCWD ? 0 : -EBADF;
	return f->inode->is_dir ? 0 : -ENOTDIR;
}

static void path_of(int dir_fd, const char *name, char *out, size_t len)
{
	const struct open_file *f = name[0] == '/' ? NULL : file_of(dir_fd);

	(void)snprintf(out, len, "%s%s%s", f != NULL ? f->path : "", f != NULL ? "/" : "", name);
}

static int file_new(struct inode *i, int flags, const char *path)
{
	for (int k = 0; k < FDS; k++) {
		struct open_file *f = &files[k];

		if (f->inode != NULL)
			continue;
		*f = (struct open_file){ .inode = i, .flags = flags, .errors = i->errors };
		(void)snprintf(f->path, sizeof(f->path), "%s", path);
		i->opens++;
		return FD_BASE + k;
	}
	return -EMFILE;
}

static int open_name(const struct name_op *op, const char *path)
{
	struct inode *dir, *parent, *i;
	const char *name;
	int rc = dir_of(op->fd, &dir);

	if (rc == 0 && op->flags & O_PATH)
		rc = -EOPNOTSUPP;
	if (rc != 0)
		return rc;
	rc = disk_lookup(dir, op->name, &i);
	if (rc == 0 && op->flags & O_CREAT && op->flags & O_EXCL)
		return -EEXIST;
	if (rc == -ENOENT && op->flags & O_CREAT) {
		rc = disk_parent(dir, op->name, &parent, &name);
		if (rc == 0)
			rc = disk_make(parent, name, false, &i);
	}
	if (rc != 0)
		return rc;
	if (i->is_dir && ((op->flags & O_ACCMODE) != O_RDONLY || op->flags & O_CREAT))
		return -EISDIR;
	if (!i->is_dir && op->flags & O_DIRECTORY)
		return -ENOTDIR;
	if (op->flags & O_TRUNC && !i->is_dir)
		disk_resize(i, 0);
	return file_new(i, op->flags, path);
}

/* ---- reading and writing ---- */

static bool is_aligned(const struct open_file *f, const struct file_op *op)
{
	bool ok = (op->off % SIM_SECTOR) == 0;

	for (unsigned k = 0; f->flags & O_DIRECT && k < op->iov_n; k++)
		ok &= op->iov[k].iov_len % SIM_SECTOR == 0 &&
		      (uintptr_t)op->iov[k].iov_base % SIM_SECTOR == 0;
	return ok || !(f->flags & O_DIRECT);
}

/* Bytes [from, to) of the request; how far it got, or -errno. */
static int64_t move(const struct open_file *f, const struct file_op *op, uint64_t from, uint64_t to,
		    bool is_durable)
{
	uint64_t at = 0;

	for (unsigned k = 0; k < op->iov_n && at < to; k++) {
		uint64_t len = op->iov[k].iov_len, begin = MAX(from, at), end = MIN(to, at + len);
		char *mem = (char *)op->iov[k].iov_base + (begin - at);
		int64_t n = 0;

		at += len;
		if (begin >= end)
			continue;
		n = op->kind == FILE_WRITE ? disk_write(f->inode, op->off + begin, mem, end - begin,
							world->faults.space, is_durable)
					   : disk_read(f->inode, op->off + begin, mem, end - begin);
		if (n < 0)
			return begin > from ? (int64_t)begin : n;
		if ((uint64_t)n < end - begin)
			return (int64_t)begin + n;
	}
	return (int64_t)to;
}

static uint64_t total(const struct file_op *op)
{
	uint64_t len = 0;

	for (unsigned k = 0; k < op->iov_n; k++)
		len += op->iov[k].iov_len;
	return len;
}

static uint64_t checksum(const struct file_op *op, uint64_t len)
{
	uint64_t sum = 0;

	for (unsigned k = 0; k < op->iov_n && len > 0; k++) {
		const uint8_t *p = op->iov[k].iov_base;
		uint64_t n = MIN(len, op->iov[k].iov_len);

		for (uint64_t at = 0; at < n; at++)
			sum = sum * 31 + p[at];
		len -= n;
	}
	return sum;
}

static CO_FN int64_t transfer(struct open_file *f, const struct file_op *op)
{
	bool is_write = op->kind == FILE_WRITE;
	bool is_durable = is_write && (op->flags & RWF_DSYNC || f->flags & O_DSYNC);
	const char *what = is_write ? "write" : "read";
	uint64_t len = total(op), first = 0;
	int64_t early, done;
	int rc;

	sim_event("%s %s %" PRIu64 "+%" PRIu64, what, f->path, op->off, len);
	if ((f->flags & O_ACCMODE) == (is_write ? O_RDONLY : O_WRONLY))
		return -EBADF;
	if (f->inode->is_dir)
		return -EISDIR;
	if (!is_aligned(f, op))
		return -EINVAL;
	rc = fault(is_write ? SIM_WRITE : SIM_READ, f->path);
	if (rc == 0 && len > 1 && sim_chance(world->faults.short_ppm))
		len = 1 + sim_below(len - 1);
	/*
	 * Half of the calls do nothing yet, and a fourth all. A write that fails may have been half done
	 * as well.
	 */
	if (sim_chance(MILLION / 2))
		first = sim_chance(MILLION / 2) ? len : sim_below(len + 1);
	if (f->flags & O_DIRECT)
		len = MIN(total(op), align_up(len, SIM_SECTOR));
	first = first < len ? MAX(align_down(op->off + first, SIM_SECTOR), op->off) - op->off : len;
	done = early = first > 0 ? move(f, op, 0, first, false) : 0;
	sim_wait(is_durable ? SYNC_NS : is_write ? WRITE_NS : READ_NS);
	sim_event("%s %s %" PRIu64 "+%" PRIu64 " ends", what, f->path, op->off, len);
	if (rc == 0 && is_durable)
		done = move(f, op, 0, len, true);
	else if (rc == 0 && early == (int64_t)first && first < len)
		done = move(f, op, first, len, false);
	if (done < 0 && early > 0)
		done = early;
	if (rc == 0 && done > 0)
		sim_note(checksum(op, (uint64_t)done));
	return rc != 0 ? rc : done;
}

ssize_t sim_read_nowait(void *state, const struct file_op *op)
{
	const struct open_file *f = file_of(op->fd);
	int64_t n;

	(void)state;
	if (f == NULL)
		return -EBADF;
	if (sim_chance(MILLION / 3))
		return -EAGAIN;
	n = move(f, op, 0, sim_chance(MILLION / 8) ? sim_below(total(op) + 1) : total(op), false);
	sim_note((uint64_t)n);
	return n;
}

static CO_FN int sync_file(struct open_file *f)
{
	uint64_t covers = world->disk->last_seq;
	int rc;

	sim_event("sync %s", f->path);
	rc = fault(SIM_SYNC, f->path);
	sim_wait(SYNC_NS);
	sim_event("sync %s ends with %d", f->path, rc);
	if (rc != 0)
		disk_sync_failed(f->inode, covers);
	else
		disk_sync(f->inode, covers);
	/* Somebody's failure is reported to all who had it open, once. */
	if (f->errors != f->inode->errors && rc == 0)
		rc = -EIO;
	f->errors = f->inode->errors;
	return rc;
}

static CO_FN int allocate(struct open_file *f, const struct file_op *op)
{
	int rc;

	sim_event("fallocate %s %d %" PRIu64 "+%" PRIu64, f->path, op->flags, op->off, op->len);
	sim_wait(NAME_NS);
	sim_event("fallocate %s ends", f->path);
	rc = fault(SIM_ALLOCATE, f->path);
	return rc != 0 ? rc
		       : disk_allocate(f->inode, op->flags, op->off, op->len, world->faults.space);
}

int sim_file(void *state, const struct file_op *op)
{
	struct open_file *f = file_of(op->fd);
	int64_t rc;

	(void)state;
	if (f == NULL)
		return -EBADF;
	switch (op->kind) {
	case FILE_READ:
	case FILE_WRITE: rc = transfer(f, op); break;
	case FILE_FDATASYNC: rc = sync_file(f); break;
	default: rc = allocate(f, op); break;
	}
	sim_note((uint64_t)rc);
	if (rc < 0)
		sim_trace("  %s: -> %" PRId64, f->path, rc);
	return (int)rc;
}

/* ---- names and whole files ---- */

static int lock(struct open_file *f, int op)
{
	op &= ~LOCK_NB;
	for (unsigned k = 0; k < FDS && op != LOCK_UN; k++) {
		const struct open_file *other = &files[k];

		if (other != f && other->inode == f->inode && other->lock != 0 &&
		    (op == LOCK_EX || other->lock == LOCK_EX))
			return -EWOULDBLOCK;
	}
	f->lock = op == LOCK_UN ? 0 : op;
	return 0;
}

static int stat_file(const struct inode *i, struct stat *st)
{
	*st = (struct stat){ .st_ino = i->number, .st_nlink = 1, .st_blksize = SIM_PAGE };
	st->st_mode = i->is_dir ? S_IFDIR | 0700 : S_IFREG | 0600;
	st->st_size = (off_t)i->now.size;
	st->st_blocks = (blkcnt_t)(i->now.used * (SIM_PAGE / SIM_SECTOR));
	return 0;
}

static int list(const struct inode *dir, const struct name_op *op)
{
	int rc = 0;

	for (unsigned k = 0; k < dir->names.n && rc == 0; k++)
		rc = op->fn(op->arg, dir->names.v[k].name);
	return rc;
}

static int on_fd(struct open_file *f, const struct name_op *op)
{
	switch (op->kind) {
	case NAME_CLOSE:
		f->inode->opens--;
		f->inode = NULL;
		f->lock = 0;
		return 0;
	case NAME_STAT: return stat_file(f->inode, op->st);
	case NAME_LOCK: return lock(f, op->flags);
	case NAME_LIST: return f->inode->is_dir ? list(f->inode, op) : -ENOTDIR;
	default: /* NAME_TRUNCATE */
		if (f->inode->is_dir || (f->flags & O_ACCMODE) == O_RDONLY)
			return -EINVAL;
		disk_resize(f->inode, op->size);
		return 0;
	}
}

static int on_name(const struct name_op *op)
{
	struct inode *dir, *parent, *made;
	const char *name;
	int rc = dir_of(op->fd, &dir);

	if (rc == 0)
		rc = disk_parent(dir, op->name, &parent, &name);
	if (rc != 0)
		return rc;
	switch (op->kind) {
	case NAME_RENAME:
		return strchr(op->to, '/') == NULL ? disk_rename(parent, name, op->to) : -EXDEV;
	case NAME_UNLINK: return disk_unlink(parent, name, op->flags & AT_REMOVEDIR);
	default: return disk_make(parent, name, true, &made);
	}
}

/* Which faults may hit it; -1 = none. */
static int call_of(enum name_op_kind kind)
{
	switch (kind) {
	case NAME_OPEN:
	case NAME_MKDIR: return SIM_OPEN;
	case NAME_TRUNCATE: return SIM_TRUNCATE;
	case NAME_RENAME: return SIM_RENAME;
	case NAME_UNLINK: return SIM_UNLINK;
	default: return -1;
	}
}

static const char *const kinds[] = { "open",   "close",  "stat",  "truncate", "sync",
				     "rename", "unlink", "mkdir", "lock",     "list" };

static int names(struct open_file *f, const struct name_op *op, const char *path)
{
	int rc = call_of(op->kind) < 0 ? 0 : fault((enum sim_call)call_of(op->kind), path);

	if (rc != 0)
		return rc;
	if (op->name == NULL)
		return on_fd(f, op);
	return op->kind == NAME_OPEN ? open_name(op, path) : on_name(op);
}

int sim_names(void *state, const struct name_op *op)
{
	struct open_file *f = file_of(op->fd);
	bool is_early = sim_chance(MILLION / 2);
	char path[256];
	int rc = 0;

	(void)state;
	if (op->name == NULL && f == NULL)
		return -EBADF;
	if (op->kind == NAME_SYNC)
		return sync_file(f);
	if (op->name != NULL)
		path_of(op->fd, op->name, path, sizeof(path));
	else
		(void)snprintf(path, sizeof(path), "%s", f->path);
	sim_event("%s %s%s%s", kinds[op->kind], path, op->to ? " to " : "", op->to ? op->to : "");
	if (is_early)
		rc = names(f, op, path);
	sim_wait(NAME_NS);
	sim_event("%s %s ends", kinds[op->kind], path);
	if (!is_early)
		rc = names(f, op, path);
	sim_note((uint64_t)(int64_t)rc);
	if (rc < 0)
		sim_trace("  %s %s: -> %d", kinds[op->kind], path, rc);
	return rc;
}

/* ---- for tests ---- */

int sim_flip(const char *path, uint64_t off, uint64_t len, unsigned bits)
{
	struct inode *i;
	int rc = disk_lookup(NULL, path, &i);

	if (rc != 0)
		return rc;
	if (len == 0 || off + len > i->now.size)
		return -ERANGE;
	for (unsigned k = 0; k < bits; k++) {
		uint64_t at = off + sim_below(len);
		uint8_t mask = (uint8_t)(1U << sim_below(8)), byte;

		image_read(&i->now, at, &byte, 1);
		byte ^= mask;
		image_write(&i->now, at, &byte, 1);
		if (at >= i->stable.size)
			continue;
		image_read(&i->stable, at, &byte, 1);
		byte ^= mask;
		image_write(&i->stable, at, &byte, 1);
	}
	return 0;
}

int64_t sim_stable_read(const char *path, void *buf, size_t len, uint64_t off)
{
	struct inode *i;
	int rc = disk_lookup(NULL, path, &i);

	if (rc != 0)
		return rc;
	if (off >= i->stable.size)
		return 0;
	len = MIN(len, i->stable.size - off);
	image_read(&i->stable, off, buf, len);
	return (int64_t)len;
}
