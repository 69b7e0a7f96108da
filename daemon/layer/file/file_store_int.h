/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the halves of `file` as an object store share: file_store.c serves requests to parts of objects,
 * file_objects.c whole objects, file_folder.c finds, locks, makes and removes the folder.
 */
#ifndef NBDRS_FILE_STORE_INT_H
#define NBDRS_FILE_STORE_INT_H

#include "layer/file/file_io.h"
#include "layer/file/file_slots.h"
#include "nbdrs/layer.h"

/* Files that are not yet objects. No object's name may begin like that. */
#define FILE_TEMP_PREFIX ".nbdrs-tmp-"

struct file_store {
	char *path; /* of the folder, without a slash at the end */
	int dir_fd;
	bool is_ro;
	struct file_io io;
	struct slots slots;
	_Atomic uint64_t temps; /* so many were made; gives them their names */
};

bool file_is_temp(const char *name);

/* These block: call them through offload(). */
struct folder_task {
	struct layer *layer;
	struct err *err;
};

/* Sets path, dir_fd, is_ro; the folder is locked, and free of what a crash left behind. */
int file_folder_open_task(void *task);
int file_folder_create_task(void *task);
int file_folder_destroy_task(void *task);

/* As the layer operations of these names. */
CO_FN int file_objects_stat(struct file_store *f, const struct obj *obj, struct obj_stat *st);
CO_FN int file_objects_put(struct file_store *f, const struct put *p, struct obj_stat *st);
CO_FN int file_objects_del(struct file_store *f, const struct obj *objs, unsigned n);
CO_FN int file_objects_list(struct file_store *f, const char *prefix, list_fn *fn, void *arg);

#endif
