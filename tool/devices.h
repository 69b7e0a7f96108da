/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the kernel says about nbd devices, without opening any: /sys/block, and the driver's STATUS.
 */
#ifndef NBDRS_DEVICES_H
#define NBDRS_DEVICES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "names.h"

enum { BACKEND_LEN = 4096, DEVICE_PARTS_MAX = 256 };

struct device {
	uint32_t index;
	char name[DEVICE_NAME_LEN]; /* "nbd0" */
	dev_t dev;
	/* It has a size and is configured. A daemon that is gone does not change that. */
	bool is_connected;
	bool is_read_only;
	bool has_backend; /* the attribute exists: Linux 5.14 and later, while connected by netlink */
	uint64_t size;    /* bytes */
	uint64_t block_size;
	unsigned queues; /* one a connection, but no more than the machine has processors: then some share */
	char backend[BACKEND_LEN];    /* "" = none */
	char export[EXPORT_NAME_LEN]; /* "" = not attached by nbdrs */
};

/* -ENODEV when there is no such device; else -errno of reading its attributes. */
int device_get(uint32_t index, struct device *d);

/*
 * Waits until the device is let go by `backend`: after a disconnect that takes until the last one has closed
 * it. False when that took longer than `limit_ms`.
 */
bool device_wait_free(uint32_t index, const char *backend, unsigned limit_ms);

/* The numbers of all devices, ascending; the caller frees *out. None is no error. */
int devices_scan(uint32_t **out, size_t *out_n);

/* Numbers of the connected devices that serve `export`, at most `max`; returns how many, or -errno. */
int devices_of_export(const char *export, uint32_t *out, unsigned max);

/* Names ("nbd0", "nbd0p1") and numbers of a device and its partitions. */
struct device_parts {
	unsigned n;
	struct {
		char name[DEVICE_NAME_LEN + 12];
		dev_t dev;
	} part[DEVICE_PARTS_MAX + 1]; /* [0] is the whole disk */
};

int device_parts(const char *name, struct device_parts *parts);

/* True when `dev`, or the name after "/dev/" in `path` (NULL = none), is the device or a partition. */
bool device_parts_has(const struct device_parts *parts, dev_t dev, const char *path);

/*
 * The index behind what a user wrote: /dev/nbd0, nbd0, or a link to it. -EINVAL when it is no nbd device,
 * -EISDIR when it is a partition of one.
 */
int device_by_path(const char *text, uint32_t *index);

struct options;

/*
 * Prints the connected devices on standard output, as a table or (--json) as an object; of one device when
 * `only` is not NULL. Asks the daemon for their state. -errno.
 */
int devices_print(const uint32_t *only, const struct options *o);

#endif
