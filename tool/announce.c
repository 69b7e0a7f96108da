/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Holding back the announcement of a device: see announce.h. */
#include "announce.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "devices.h"
#include "nbdrs/cleanup.h"
#include "sysfs.h"

#define FOLDER "/run/nbdrs-attach"

enum { MARKS_MAX = 2 };

/* The paths of the files for a device; how many there are. */
static unsigned get_marks(int64_t index, const char *backend, char marks[MARKS_MAX][SYSFS_PATH_LEN])
{
	char link[LINK_NAME_LEN];
	unsigned n = 0;

	if (index >= 0 && fs_path(marks[n], FOLDER "/device-nbd%u", (unsigned)index) == 0)
		n++;
	if (name_to_link(backend, link) == 0 && fs_path(marks[n], FOLDER "/export-%s", link) == 0)
		n++;
	return n;
}

void announce_hold(int64_t index, const char *backend)
{
	char marks[MARKS_MAX][SYSFS_PATH_LEN], folder[SYSFS_PATH_LEN];
	const unsigned n = get_marks(index, backend, marks);

	if (fs_path(folder, FOLDER) || (mkdir(folder, 0755) && errno != EEXIST))
		return;
	for (unsigned i = 0; i < n; i++) {
		_cleanup_close_ int fd = open(marks[i], O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);

		(void)fd; /* see the header */
	}
}

void announce_again(const char *name)
{
	char path[SYSFS_PATH_LEN];
	_cleanup_close_ int fd = -1;

	if (fs_path(path, "/sys/class/block/%s/uevent", name))
		return;
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd >= 0)
		(void)!write(fd, "change", 6);
}

void announce_release(int64_t index, const char *backend)
{
	_cleanup_free_ struct device_parts *parts = malloc(sizeof(*parts));
	char marks[MARKS_MAX][SYSFS_PATH_LEN], name[DEVICE_NAME_LEN];
	const unsigned n = get_marks(index, backend, marks);
	bool was_held = false;

	for (unsigned i = 0; i < n; i++)
		was_held |= unlink(marks[i]) == 0;
	if (!was_held || index < 0)
		return;
	(void)snprintf(name, sizeof(name), "nbd%u", (unsigned)index); /* fits */
	if (!parts || device_parts(name, parts))
		return;
	for (unsigned i = 0; i < parts->n; i++)
		announce_again(parts->part[i].name);
}
