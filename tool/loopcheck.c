/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Does a file lie on an nbd device: see loopcheck.h. */
#include "loopcheck.h"

#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "mounts.h"
#include "names.h"
#include "nbdrs/cleanup.h"
#include "sysfs.h"

static int find(const char *path, unsigned depth, struct loopcheck *found);

static void found_add(struct loopcheck *found, uint32_t index)
{
	for (unsigned i = 0; i < found->n; i++)
		if (found->index[i] == index)
			return;
	if (found->n < LOOP_FOUND_MAX)
		found->index[found->n++] = index;
}

/* The mount that holds a path: the longest mount point that is a folder above it, the last one mounted. */
struct holder {
	const char *path;
	dev_t dev;
	size_t best;
	char source[PATH_MAX];
};

static int holder_one(char *line, void *arg)
{
	struct holder *h = arg;
	struct mount_line m;
	const char *upper, *source;
	size_t len;

	if (mount_parse(line, &m))
		return 0;
	len = strcmp(m.point, "/") == 0 ? 0 : strlen(m.point);
	if (strncmp(h->path, m.point, len) != 0 || (h->path[len] != '/' && h->path[len] != '\0') ||
	    len + 1 < h->best)
		return 0;
	/* Of an overlay, what is written lies in upperdir. */
	source = m.source;
	upper = strcmp(m.type, "overlay") == 0 ? strstr(m.super_options, "upperdir=") : NULL;
	if (upper)
		source = upper + strlen("upperdir=");
	len = upper ? strcspn(source, ",") : strlen(source);
	if (len >= sizeof(h->source))
		return 0;
	h->best = strlen(m.point) + 1;
	memcpy(h->source, source, len);
	h->source[len] = '\0';
	return 0;
}

/* A file on a file system without a device of its own. */
static int find_by_mount(const char *path, unsigned depth, struct loopcheck *found)
{
	char real[PATH_MAX];
	struct holder h = { .path = real };

	if (!realpath(path, real))
		return -errno;
	(void)fs_each_line(holder_one, &h, "/proc/self/mountinfo");
	if (h.source[0] != '/')
		return 0; /* tmpfs, a network file system, zfs */
	return find(h.source, depth + 1, found);
}

struct below {
	unsigned depth;
	struct loopcheck *found;
	const char *folder;
};

static int slave_one(const char *name, void *arg)
{
	const struct below *b = arg;
	dev_t dev;

	if (fs_read_dev(&dev, "%s/slaves/%s/dev", b->folder, name))
		return 0;
	return loopcheck_dev(major(dev), minor(dev), b->depth + 1, b->found);
}

int loopcheck_dev(unsigned major, unsigned minor, unsigned depth, struct loopcheck *found)
{
	char link[SYSFS_PATH_LEN], folder[PATH_MAX], file[PATH_MAX];
	struct below b = { .depth = depth, .found = found };
	const char *name;
	uint32_t index;
	int rc;

	if (depth > LOOP_DEPTH_MAX)
		return -ELOOP;
	if (fs_path(link, "/sys/dev/block/%u:%u", major, minor) || !realpath(link, folder))
		return 0;
	b.folder = folder + strlen(fs_root);
	if (fs_exists("%s/partition", b.folder))
		*strrchr(folder, '/') = '\0'; /* the disk is the folder above */
	name = strrchr(folder, '/') + 1;
	if (name_to_index(name, &index) == 0)
		found_add(found, index);
	if (fs_read(file, sizeof(file), "%s/loop/backing_file", b.folder) == 0) {
		rc = find(file, depth + 1, found);
		/* " (deleted)", or from another mount namespace: nothing to follow. */
		if (rc && rc != -ENOENT)
			return rc;
	}
	return fs_each(slave_one, &b, "%s/slaves", b.folder);
}

static int find(const char *path, unsigned depth, struct loopcheck *found)
{
	struct stat st;
	dev_t dev;

	if (depth > LOOP_DEPTH_MAX)
		return -ELOOP;
	if (stat(path, &st))
		return -errno;
	if (S_ISBLK(st.st_mode))
		return loopcheck_dev(major(st.st_rdev), minor(st.st_rdev), depth, found);
	dev = st.st_dev;
	if (major(dev) == 0)
		return find_by_mount(path, depth, found);
	return loopcheck_dev(major(dev), minor(dev), depth, found);
}

int loopcheck_find(const char *path, struct loopcheck *found)
{
	struct loopcheck all = { 0 };
	int rc = find(path, 0, &all);

	if (!rc)
		*found = all;
	return rc;
}
