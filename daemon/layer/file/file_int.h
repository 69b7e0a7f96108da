/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the two halves of layer `file` share: file.c serves requests, file_setup.c finds, locks, makes and
 * removes the file.
 */
#ifndef NBDRS_FILE_INT_H
#define NBDRS_FILE_INT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "layer/file/file_io.h"
#include "nbdrs/co.h"
#include "nbdrs/layer.h"

enum prealloc { PREALLOC_OFF, PREALLOC_FALLOC, PREALLOC_FULL };

/* Instance. Options first (filled by the option table), then what open found. */
struct file {
	bool opt_direct, opt_lend;
	unsigned opt_prealloc; /* enum prealloc */

	char *path;
	int fd;
	/*
	 * For fdatasync only; -1 when read-only. The kernel tells a failed write-back once per open file
	 * description: on one of their own, flushes hear of it also when a FUA write heard it first.
	 */
	int sync_fd;
	bool is_block, is_ro;
	bool has_holes;        /* when it was opened */
	uint32_t direct_align; /* 0 = buffered */

	struct file_io io;
	/* Writes answered so far, and how many of them the last good fdatasync covers. */
	_Atomic uint64_t written, synced;
	_Atomic bool was_synced;
	struct co_mutex sync_lock; /* one fdatasync at a time */
	_Atomic int sync_error; /* -errno of the first failed fdatasync; stays */
};

/* All of these block: call them through offload(). */
struct file_task {
	struct layer *layer;
	uint64_t size; /* of create */
	bool force;
	struct err *err;
};

int file_open_task(void *task);
int file_create_task(void *task);
int file_destroy_task(void *task);
/* file_resize.c: whether the open file can have t->size bytes; and giving it so many, durably. */
int file_check_resize_task(void *task);
int file_resize_task(void *task);

/* TARGET, or TARGET + NAME when it ends in "/". The caller frees *out. */
int file_path(const struct layer *l, char **out, struct err *err);

#endif
