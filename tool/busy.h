/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Who uses a block device: the kernel's DISCONNECT does not ask, so a tool must. Nothing here opens the
 * device.
 */
#ifndef NBDRS_BUSY_H
#define NBDRS_BUSY_H

#include <stdbool.h>
#include <stddef.h>

#include "devices.h"

enum { HOLDERS_MAX = 12, HOLDER_LEN = 256 };

struct holders {
	unsigned n, more; /* listed, and found beyond HOLDERS_MAX */
	bool has_firm; /* mounts, swap, other devices; when false, at most processes that have it open */
	bool has_udev; /* udev looks at it: not listed, as it only reads and is gone in a moment */
	char text[HOLDERS_MAX][HOLDER_LEN]; /* "mounted on /mnt", "open in pid 12 (fio)" */
};

/*
 * Looks for mounts (of every mount namespace), swap, holders/ (device-mapper, md, bcache), loop devices,
 * and open files of other processes. What this process may not see is not found: without root, other
 * users' files and namespaces. What uses a device inside the kernel without telling (a ZFS pool) is not
 * either; an O_EXCL open finds it.
 */
void busy_find(const struct device_parts *parts, struct holders *h);

/* All of them in one line, separated by commas. */
void busy_text(const struct holders *h, char *out, size_t out_len);

#endif
