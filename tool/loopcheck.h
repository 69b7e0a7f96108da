/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Does a file lie on an nbd device? An export whose data lies on the device it is attached to waits for
 * itself at the first write.
 */
#ifndef NBDRS_LOOPCHECK_H
#define NBDRS_LOOPCHECK_H

#include <stdint.h>

enum { LOOP_DEPTH_MAX = 16, LOOP_FOUND_MAX = 32 };

struct loopcheck {
	unsigned n;
	uint32_t index[LOOP_FOUND_MAX]; /* of the nbd devices below, each once */
};

/*
 * Finds the nbd devices below `path`, a file or block device: by the file system's device number, or where
 * that is anonymous (btrfs, overlay) the source of its mount; then down partitions, device-mapper and md
 * (slaves/), and loop devices to the files behind them. May hang for as long as the file system does: to be
 * called in a child. -errno of stat; a device that sysfs does not know ends the search silently.
 */
int loopcheck_find(const char *path, struct loopcheck *found);

/* The same from a device number, "MAJOR:MINOR" in /sys/dev/block. For tests. */
int loopcheck_dev(unsigned major, unsigned minor, unsigned depth, struct loopcheck *found);

#endif
