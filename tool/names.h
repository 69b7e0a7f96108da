/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Names of devices, exports and links: pure text, no files.
 *
 * From a backend identifier (nbdrs/backend.h) follow export and links; its identity is no part of them. udev's
 * links use the same bytes as \xnn, which is how udev itself writes labels (60-nbdrs.rules).
 */
#ifndef NBDRS_NAMES_H
#define NBDRS_NAMES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbdrs/backend.h"

enum {
	DEVICE_INDEX_MAX = (1 << 20) - 1, /* MINORBITS: the kernel may allow less */
	DEVICE_NAME_LEN = 16,             /* "nbd1048575" */
	EXPORT_NAME_LEN = 4097,           /* NBD proto.md: strings of up to 4096 bytes */
	LINK_NAME_LEN = 256,              /* NAME_MAX */
};

/*
 * "/dev/nbd12" or "nbd12" -> 12. -EINVAL for anything else, as leading zeroes, partitions (see
 * name_is_partition) and numbers above DEVICE_INDEX_MAX.
 */
int name_to_index(const char *text, uint32_t *index);

/* True for a partition of an nbd device: "/dev/nbd0p1", "nbd0p1". */
bool name_is_partition(const char *text);

/*
 * The export behind a backend identifier, percent-decoded. -EINVAL for one that is not ours: without the
 * prefix, empty, or with a broken escape or a %00. `out` has room for EXPORT_NAME_LEN.
 */
int name_from_backend(const char *backend, char *out);

/* The opposite; `out` has room for `out_len`. -ENAMETOOLONG. */
int name_to_backend(const char *export, char *out, size_t out_len);

/*
 * The last part of the links in /dev/nbdrs and after /dev/disk/by-id/nbdrs-. -EINVAL for a backend that
 * 60-nbdrs.rules makes no link for: not ours, a name that starts with a dot, or one that is too long with
 * "nbdrs-" before and "-part31" behind it. `out` has room for LINK_NAME_LEN.
 */
int name_to_link(const char *backend, char *out);

#endif
