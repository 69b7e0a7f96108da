/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Device numbers, and lines of /proc/PID/mountinfo and /proc/swaps: pure parsers (proc(5)). */
#ifndef NBDRS_MOUNTS_H
#define NBDRS_MOUNTS_H

#include <sys/types.h>

/* "43:1" -> its number. -EINVAL for anything else. */
int dev_parse(const char *text, dev_t *out);

struct mount_line {
	dev_t dev; /* st_dev of files there; anonymous (major 0) for btrfs, overlay and others */
	const char *point; /* where it is mounted, unescaped */
	const char *type, *source, *super_options;
};

/* Cuts `line` up in place; the strings point into it. -EINVAL for what is not such a line. */
int mount_parse(char *line, struct mount_line *m);

/* The file name of a line of /proc/swaps, unescaped in place. -EINVAL for the heading and the like. */
int swap_parse(char *line, const char **file);

#endif
