/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Reads and writes through the page cache that try not to wait, and holes: what `file` does to its file and the
 * object store in a folder to each of its files.
 */
#ifndef NBDRS_FILE_IO_H
#define NBDRS_FILE_IO_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "nbdrs/layer.h"

/* What is known of the file system; for all files of one. Any thread. */
struct file_io {
	bool is_tmpfs;
	/* Learned on the way; each goes from true to false once. */
	_Atomic bool can_nowait, can_punch, can_zero_range;
	/* Inline writes took long: until then (ns) they go through the engine. */
	_Atomic uint64_t slow_until;
};

/* Looks at the file `fd`, or the folder of the files. Blocks. */
void file_io_init(struct file_io *io, int fd, bool is_folder);

/* Bytes read without waiting, 0 when none. Does not suspend. */
size_t file_io_read_cached(struct file_io *io, int fd, struct ext e, const struct iov *iov);
/* All of it, or -errno. `rwf`: RWF_DSYNC or 0. */
CO_FN int file_io_write(struct file_io *io, int fd, struct ext e, const struct iov *iov, int rwf);
/*
 * `mode`: FALLOC_FL_PUNCH_HOLE or FALLOC_FL_ZERO_RANGE; the size stays. -ENOTSUP when the file system can't, and from
 * then on at once.
 */
CO_FN int file_io_deallocate(struct file_io *io, int fd, int mode, struct ext e);
/* Is this the answer of a file system or device that has no such call? */
bool file_io_means_cannot(int rc);

/* As the layer operations `map` and `cache`. What lies behind the end of the file is a hole. */
CO_FN int file_io_map(int fd, struct ext e, struct extmap *m);
CO_FN int file_io_bring(int fd, struct ext e);

#endif
