/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Small files of the kernel: /sys, /proc and what udev keeps in /run. Reading them never waits for a
 * device.
 */
#ifndef NBDRS_SYSFS_H
#define NBDRS_SYSFS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { SYSFS_PATH_LEN = 512 };

/* Put before every path below; "" unless a test has a tree of its own. */
extern const char *fs_root;

/* fs_root and the formatted path into `out`, of SYSFS_PATH_LEN bytes. -ENAMETOOLONG. */
int fs_path(char *out, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

bool fs_exists(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/*
 * The file's first out_len-1 bytes, without a newline at the end, as a string. -errno of open and read.
 */
int fs_read(char *out, size_t out_len, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* A file that holds one decimal number. -EINVAL when it does not. */
int fs_read_u64(uint64_t *out, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* A file that holds MAJOR:MINOR, as /sys/block/X/dev. */
int fs_read_dev(dev_t *out, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/*
 * Calls `fn` with each name in a folder, except . and .., until it returns non-zero, which is returned.
 * A folder that is not there has no names.
 */
int fs_each(int (*fn)(const char *name, void *arg), void *arg, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));

/*
 * Calls `fn` with each line of a file, its newline cut off, until it returns non-zero, which is
 * returned. The line may be changed. -errno when the file cannot be opened.
 */
int fs_each_line(int (*fn)(char *line, void *arg), void *arg, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));

#endif
