/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * A journal goes with its volume. Whose it is stands in its files: one that has records of another
 * volume stays, and so does one of which that cannot be said. Spare files are nobody's.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "layer/cache/cache_journal.h"
#include "nbdrs/io.h"
#include "nbdrs/log.h"

/* Of the file, `size` bytes. */
static int judge(struct journal_removal *r, const char *name, const uint8_t *bytes, uint64_t size,
		 struct err *err)
{
	struct segment_head head;

	switch (segment_head_read(bytes, &head)) {
	case HEAD_SPARE: return 0;
	case HEAD_GOOD: break;
	case HEAD_NEWER:
		return err_set(
			err, -EPROTONOSUPPORT,
			"layer cache: nothing was changed: %s/%s was written by a newer version of nbdrs; use "
			"that",
			r->folder, name);
	case HEAD_BAD:
		return err_set(
			err, -EUCLEAN,
			"layer cache: nothing was changed: %s/%s is damaged, and does not say any more whose "
			"journal it is; if it is this volume's, remove the folder first",
			r->folder, name);
	}
	if (segment_head_is_of(&head, r->volume) ||
	    (r->any_export && segment_head_is_of_export(&head, r->volume))) {
		r->unsaved += size - SEGMENT_HEAD;
		if (segment_head_is_of_former(&head, r->identity))
			r->has_two = true;
		else if (*head.identity)
			memcpy(r->identity, head.identity, sizeof(r->identity));
		return 0;
	}
	return err_set(
		err, -EBUSY,
		"layer cache: nothing was changed: %s holds unsaved data of another volume, %s; this one is "
		"%s. Say disk= as it was served with, or volume=%s if it is the same",
		r->folder, head.volume, r->volume, head.volume);
}

static CO_FN int check_file(struct journal_removal *r, uint32_t file, struct err *err)
{
	uint8_t bytes[SEGMENT_HEADS];
	uint64_t size;
	char name[32];
	int fd, rc;

	segment_name(file, name, sizeof(name));
	fd = io_openat(r->dir_fd, name, O_RDONLY, 0);
	rc = fd < 0 ? fd : segment_read_heads(fd, &size, bytes);
	if (fd >= 0)
		(void)io_close(fd); /* only looked at */
	if (rc)
		return err_set(err, rc, "layer cache: %s/%s cannot be read: %s", r->folder, name,
			       strerror(-rc));
	return judge(r, name, bytes, size, err);
}

static CO_FN int remove_files(const struct journal_removal *r, const uint32_t *files, size_t n)
{
	char name[32];
	int rc = 0;

	for (size_t i = 0; i < n && !rc; i++) {
		segment_name(files[i], name, sizeof(name));
		rc = io_unlinkat(r->dir_fd, name, 0);
	}
	/* What comes back after a crash of the machine would be played over the next volume of this name. */
	return rc ? rc : io_fsync(r->dir_fd);
}

static CO_FN int list(const struct journal_removal *r, uint32_t **files, size_t *n, struct err *err)
{
	const int rc = journal_folder_list(r->dir_fd, files, n);

	return rc ? err_set(err, rc, "layer cache: %s cannot be listed: %s", r->folder,
			    strerror(-rc))
		  : 0;
}

int journal_removal_begin(struct journal_removal *r, struct err *err)
{
	const int fd = io_openat(AT_FDCWD, r->folder, O_RDONLY | O_DIRECTORY, 0);

	if (fd == -ENOENT)
		return 0;
	if (fd < 0)
		return err_set(err, fd, "layer cache: %s: %s", r->folder, strerror(-fd));
	r->dir_fd = fd;
	return journal_folder_lock(fd, r->folder, false, err);
}

void journal_removal_end(struct journal_removal *r)
{
	if (r->dir_fd >= 0)
		(void)io_close(r->dir_fd); /* what was removed has been synced */
	r->dir_fd = -1;
}

int journal_may_remove(struct journal_removal *r, struct err *err)
{
	uint32_t *files = NULL;
	size_t n = 0;
	int rc = r->dir_fd < 0 ? 0 : list(r, &files, &n, err);

	r->unsaved = 0;
	r->identity[0] = '\0';
	r->has_two = false;
	for (size_t i = 0; i < n && !rc; i++)
		rc = check_file(r, files[i], err);
	free(files);
	return rc;
}

bool journal_removal_is_former(const struct journal_removal *r, const char *identity)
{
	return r->has_two || (*r->identity && *identity && strcmp(r->identity, identity) != 0);
}

int journal_remove(const struct journal_removal *r, struct err *err)
{
	uint32_t *files = NULL;
	size_t n = 0;
	int rc;

	if (r->dir_fd < 0)
		return 0;
	rc = list(r, &files, &n, err);
	if (rc)
		return rc;
	rc = remove_files(r, files, n);
	free(files);
	return rc ? err_set(err, rc, "layer cache: the journal in %s cannot be removed: %s",
			    r->folder, strerror(-rc))
		  : 0;
}

int journal_folder_remove(const struct journal_removal *r, struct err *err)
{
	int rc = r->dir_fd < 0 ? 0 : io_unlinkat(AT_FDCWD, r->folder, AT_REMOVEDIR);

	if (rc == -ENOTEMPTY) {
		log_info("the cache's folder stays, it has other files folder=%s", r->folder);
		rc = 0;
	}
	return rc ? err_set(err, rc, "layer cache: %s cannot be removed: %s", r->folder,
			    strerror(-rc))
		  : 0;
}
