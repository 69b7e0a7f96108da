/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * One writer to a file or folder: exclusive for writing, shared for reading. A lock goes with its descriptor, so a
 * crash never leaves it behind.
 */
#ifndef NBDRS_FILE_LOCK_H
#define NBDRS_FILE_LOCK_H

#include <stdbool.h>

#include "nbdrs/err.h"

enum lock_kind {
	LOCK_OFD, /* of a file: fcntl(2) F_OFD_SETLK on all of it; meets QEMU's image locks, which are of that kind */
	LOCK_FLOCK, /* of a folder, which knows no other: flock(2) */
};

/*
 * -EBUSY with a message that names the holder. Blocks (up to some seconds, when nobody is seen to hold it): for the
 * offload pool. On a file system without locks: a warning in the log, and 0.
 */
int file_lock(int fd, enum lock_kind kind, bool is_ro, const char *path, struct err *err);

#endif
