/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Who uses a block device: see busy.h. */
#include "busy.h"

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "mounts.h"
#include "nbdrs/cleanup.h"
#include "sysfs.h"

enum { NAMESPACES_MAX = 256 };

struct search {
	const struct device_parts *parts;
	struct holders *holders;
	const char *part; /* whose holders/ is being read */
	int pid;          /* whose files are being read */
	const char *comm;
	bool is_other_namespace;
	unsigned namespaces_n;
	ino_t namespaces[NAMESPACES_MAX];
};

static void __attribute__((format(printf, 3, 4)))
add(struct search *s, bool is_firm, const char *fmt, ...)
{
	struct holders *h = s->holders;
	char text[HOLDER_LEN];
	va_list ap;

	h->has_firm |= is_firm;
	va_start(ap, fmt);
	(void)vsnprintf(text, sizeof(text), fmt, ap); /* cut off when too long */
	va_end(ap);
	for (unsigned i = 0; i < h->n; i++)
		if (strcmp(h->text[i], text) == 0)
			return;
	if (h->n == HOLDERS_MAX)
		h->more++;
	else
		memcpy(h->text[h->n++], text, sizeof(text));
}

/* Device number behind a path below /dev; 0 for anything else: a stat elsewhere might hang. */
static dev_t dev_of(const char *path)
{
	char real[SYSFS_PATH_LEN];
	struct stat st;

	if (strncmp(path, "/dev/", 5) != 0 || fs_path(real, "%s", path) || stat(real, &st) ||
	    !S_ISBLK(st.st_mode))
		return 0;
	return st.st_rdev;
}

static bool is_ours(const struct search *s, dev_t dev, const char *path)
{
	return device_parts_has(s->parts, dev, path) ||
	       (path && device_parts_has(s->parts, dev_of(path), NULL));
}

static int mount_one(char *line, void *arg)
{
	struct search *s = arg;
	struct mount_line m;

	if (mount_parse(line, &m) || !is_ours(s, m.dev, m.source))
		return 0;
	if (s->is_other_namespace)
		add(s, true, "mounted on %s in the mount namespace of pid %d (%s)", m.point, s->pid,
		    s->comm);
	else
		add(s, true, "mounted on %s", m.point);
	return 0;
}

static int swap_one(char *line, void *arg)
{
	struct search *s = arg;
	const char *file;

	if (!swap_parse(line, &file) && is_ours(s, 0, file))
		add(s, true, "swap on %s", file);
	return 0;
}

static int holder_one(const char *name, void *arg)
{
	struct search *s = arg;
	char dm[128];

	if (fs_read(dm, sizeof(dm), "/sys/block/%s/dm/name", name) == 0)
		add(s, true, "%s is part of /dev/mapper/%s", s->part, dm);
	else
		add(s, true, "%s is part of /dev/%s", s->part, name);
	return 0;
}

static int loop_one(const char *name, void *arg)
{
	struct search *s = arg;
	char file[PATH_MAX];

	if (strncmp(name, "loop", 4) == 0 &&
	    fs_read(file, sizeof(file), "/sys/block/%s/loop/backing_file", name) == 0 &&
	    is_ours(s, 0, file))
		add(s, true, "%s is behind /dev/%s", file, name);
	return 0;
}

static int fd_one(const char *name, void *arg)
{
	struct search *s = arg;
	char link[SYSFS_PATH_LEN], target[PATH_MAX];
	ssize_t n;

	/* The link's text only: following it, or a stat through it, could hang on a dead file system. */
	if (fs_path(link, "/proc/%d/fd/%s", s->pid, name))
		return 0;
	n = readlink(link, target, sizeof(target) - 1);
	if (n <= 0)
		return 0;
	target[n] = '\0';
	if (!is_ours(s, 0, target))
		return 0;
	if (strcmp(s->comm, "(udev-worker)") == 0 || strcmp(s->comm, "systemd-udevd") == 0 ||
	    strcmp(s->comm, "udevd") == 0)
		s->holders->has_udev = true;
	else
		add(s, false, "open in pid %d (%s)", s->pid, s->comm);
	return 1;
}

/* True when this is the first process seen of its mount namespace, and that is not our own. */
static bool is_new_namespace(struct search *s, int pid)
{
	char path[SYSFS_PATH_LEN];
	struct stat st;

	if (fs_path(path, "/proc/%d/ns/mnt", pid) || stat(path, &st) ||
	    s->namespaces_n == NAMESPACES_MAX)
		return false;
	for (unsigned i = 0; i < s->namespaces_n; i++)
		if (s->namespaces[i] == st.st_ino)
			return false;
	s->namespaces[s->namespaces_n++] = st.st_ino;
	return true;
}

static int process_one(const char *name, void *arg)
{
	struct search *s = arg;
	char comm[64], *end;
	const long pid = strtol(name, &end, 10);

	if (*end || pid <= 0 || pid > INT_MAX || pid == getpid())
		return 0;
	/* It ended; or it is a child of ours, or of an earlier run, that the device keeps from ending. */
	if (fs_read(comm, sizeof(comm), "/proc/%ld/comm", pid) || strcmp(comm, "nbdrs-attach") == 0)
		return 0;
	s->pid = (int)pid;
	s->comm = comm;
	(void)fs_each(fd_one, s, "/proc/%ld/fd", pid); /* not readable: not ours to see */
	if (is_new_namespace(s, (int)pid)) {
		s->is_other_namespace = true;
		(void)fs_each_line(mount_one, s, "/proc/%ld/mountinfo", pid);
	}
	return 0;
}

void busy_find(const struct device_parts *parts, struct holders *h)
{
	struct search s = { .parts = parts, .holders = h };

	memset(h, 0, sizeof(*h));
	/* Whatever cannot be read holds nothing that we could name; the O_EXCL open decides in the end. */
	(void)is_new_namespace(&s, getpid());
	(void)fs_each_line(mount_one, &s, "/proc/self/mountinfo");
	(void)fs_each_line(swap_one, &s, "/proc/swaps");
	for (unsigned i = 0; i < parts->n; i++) {
		s.part = parts->part[i].name;
		if (i == 0)
			(void)fs_each(holder_one, &s, "/sys/block/%s/holders", s.part);
		else
			(void)fs_each(holder_one, &s, "/sys/block/%s/%s/holders",
				      parts->part[0].name, s.part);
	}
	(void)fs_each(loop_one, &s, "/sys/block");
	(void)fs_each(process_one, &s, "/proc");
}

void busy_text(const struct holders *h, char *out, size_t out_len)
{
	size_t n = 0;

	out[0] = '\0';
	for (unsigned i = 0; i < h->n && n < out_len; i++)
		n += (size_t)snprintf(out + n, out_len - n, "%s%s", i ? ", " : "", h->text[i]);
	if (h->more && n < out_len)
		(void)snprintf(out + n, out_len - n, ", and %u more", h->more);
}
