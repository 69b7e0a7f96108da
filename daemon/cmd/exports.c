/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * --exports FILE: one export a line, the three words of -e. A CONN that is @PATH stands for the one word in the file
 * PATH, so that keys need not be where many may read.
 */
#include "cmd/cmd.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "conf/secret.h"
#include "nbdrs/cleanup.h"

int args_add_volume(struct args *a, const struct volume_arg *v, struct err *err)
{
	for (unsigned i = 0; i < a->volumes_n && v->name; i++)
		if (strcmp(a->volumes[i].name, v->name) == 0)
			return err_set(err, -EINVAL, "the name '%s' is given twice", v->name);
	if (a->volumes_n == a->volumes_room) {
		const unsigned room = 2 * a->volumes_room + 8;
		struct volume_arg *more = realloc(a->volumes, room * sizeof(*more));

		if (!more)
			return err_set(err, -ENOMEM, "out of memory");
		a->volumes = more;
		a->volumes_room = room;
	}
	a->volumes[a->volumes_n++] = *v;
	return 0;
}

/* Keeps the words of a file as long as the command line's. NULL when out of memory. */
static struct conf_file *read_kept(struct args *a, const char *path, int *rc, struct err *err)
{
	struct conf_file *more = realloc(a->files, (a->files_n + 1) * sizeof(*more));

	if (!more) {
		*rc = err_set(err, -ENOMEM, "out of memory");
		return NULL;
	}
	a->files = more;
	*rc = conf_read(path, &a->files[a->files_n], err);
	return *rc ? NULL : &a->files[a->files_n++];
}

static int read_conn(struct args *a, struct volume_arg *v, struct err *err)
{
	const char *path = v->conn + 1;
	const struct conf_file *f;
	int rc;

	if (*path != '/')
		return err_set(err, -EINVAL, "'%s': behind @ stands the absolute path of a file that holds CONN",
			       v->conn);
	f = read_kept(a, path, &rc, err);
	if (!f)
		return rc;
	if (f->lines_n != 1 || f->lines[0].words_n != 1)
		return err_set(err, -EINVAL, "%s must hold one word, the export's CONN", path);
	v->conn = f->lines[0].words[0];
	return 0;
}

static int take_line(struct args *a, const char *path, const struct conf_line *l, struct err *err)
{
	struct volume_arg v = { .file = path, .line = l->number };
	int rc;

	if (l->words_n != 3)
		return err_set(err, -EINVAL, "a line has three words, NAME DRIVER CONN, and this one %u (quote a word "
			       "that holds blanks)", l->words_n);
	v.name = l->words[0];
	v.driver = l->words[1];
	v.conn = l->words[2];
	rc = v.conn[0] == '@' ? read_conn(a, &v, err) : 0;
	return rc ? rc : args_add_volume(a, &v, err);
}

/* Keys in a file that everybody may read are served all the same; a log that says so is read sooner or later. */
static void check_mode(const struct conf_file *f)
{
	struct stat st;

	if (stat(f->path, &st) || !(st.st_mode & S_IROTH))
		return;
	for (size_t i = 0; i < f->lines_n; i++) {
		size_t at = 0;
		_cleanup_free_ char *masked = secret_mask_text(f->lines[i].words[2], &at);

		if (masked && strcmp(masked, f->lines[i].words[2]))
			log_warn("everybody may read a key in %s:%u mend=\"chmod 600 %s\"", f->path,
				 f->lines[i].number, f->path);
	}
}

int args_read_exports(struct args *a, const char *path, struct err *err)
{
	const struct conf_file *f;
	struct conf_line *lines;
	size_t n;
	int rc;

	f = read_kept(a, path, &rc, err);
	if (!f)
		return rc;
	/* `files` may move while CONNs are read; what the lines point to stays. */
	path = f->path;
	lines = f->lines;
	n = f->lines_n;
	if (n == 0)
		return err_set(err, -EINVAL, "%s names no export; a line is NAME DRIVER CONN, as in: disk0 raw "
			       "file:/srv/disk0.img", path);
	for (size_t i = 0; i < n; i++) {
		rc = take_line(a, path, &lines[i], err);
		if (rc)
			return err_prefix(err, rc, "%s:%u", path, lines[i].number);
	}
	check_mode(&(struct conf_file){ .path = (char *)(uintptr_t)path, .lines = lines, .lines_n = n });
	return 0;
}
