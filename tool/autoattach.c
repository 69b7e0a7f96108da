/* SPDX-License-Identifier: GPL-3.0-or-later */
/* attach.conf: see autoattach.h. */
#include "autoattach.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "names.h"
#include "say.h"

enum { UNIT_LEN = 256 }; /* systemd.unit(5): 255 bytes and a NUL */

int autoattach_parse(const char *path, const struct conf_line *line, struct options *o,
		     struct err *err)
{
	char wait[32]; /* first, so that one of the line takes its place */
	char *argv[CONF_WORDS_MAX + 3] = { (char *)(uintptr_t) "nbdrs-attach", wait };
	int rc;

	(void)snprintf(wait, sizeof(wait), "--wait=%u", WAIT_BOOT_S);
	memcpy(&argv[2], line->words, line->words_n * sizeof(*argv));
	rc = options_parse((int)line->words_n + 2, argv, o, err);
	if (!rc && (o->action != ACT_ATTACH || o->conf))
		rc = err_set(err, -EINVAL, "a line is EXPORT [DEVICE] and options of attaching");
	return rc ? err_prefix(err, rc, "%s:%u", path, line->number) : 0;
}

/* Both are names of devices, as options_parse saw to. */
static bool is_same_device(const char *a, const char *b)
{
	uint32_t i = 0, k = 0;

	return name_to_index(a, &i) == 0 && name_to_index(b, &k) == 0 && i == k;
}

/* Two lines that cannot both be had. */
static int check_pair(const char *path, const struct options *o, unsigned line,
		      const struct options *before, unsigned before_line, struct err *err)
{
	if (strcmp(o->export, before->export) == 0)
		return err_set(err, -EINVAL, "%s:%u: export '%s' stands in line %u already", path, line,
			       o->export, before_line);
	if (o->device && before->device && is_same_device(o->device, before->device))
		return err_set(err, -EINVAL, "%s:%u: %s is taken by line %u already", path, line, o->device,
			       before_line);
	return 0;
}

int autoattach_check(const struct conf_file *f, struct err *err)
{
	_cleanup_free_ struct options *all = calloc(f->lines_n + 1, sizeof(*all));
	int rc = 0;

	if (!all)
		return err_set(err, -ENOMEM, "out of memory");
	for (size_t i = 0; i < f->lines_n && !rc; i++) {
		rc = autoattach_parse(f->path, &f->lines[i], &all[i], err);
		for (size_t k = 0; k < i && !rc; k++)
			rc = check_pair(f->path, &all[i], f->lines[i].number, &all[k],
					f->lines[k].number, err);
	}
	return rc;
}

void autoattach_apply(const struct conf_file *f, struct options *o)
{
	struct options line;
	struct err err;

	for (size_t i = 0; i < f->lines_n; i++) {
		if (autoattach_parse(f->path, &f->lines[i], &line, &err) || strcmp(line.export, o->export))
			continue;
		if (o->control)
			line.control = o->control;
		*o = line;
		return;
	}
}

int autoattach_unit(const char *export, char *out, size_t out_len)
{
	static const char plain[] =
		"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789:_.";
	char text[4 * EXPORT_NAME_LEN + 1];
	size_t n = 0;

	for (const char *p = export; *p; p++) {
		if (*p == '/')
			text[n++] = '-';
		else if (strchr(plain, *p) && !(*p == '.' && p == export))
			text[n++] = *p;
		else
			n += (size_t)snprintf(text + n, sizeof(text) - n, "\\x%02x", (unsigned char)*p);
	}
	text[n] = '\0';
	n = (size_t)snprintf(out, out_len, "nbdrs-attach@%s.service", text);
	return n < MIN(out_len, (size_t)UNIT_LEN) ? 0 : -ENAMETOOLONG;
}

/* A file that is not there is an empty one. An exit status. */
static int load(const char *path, struct conf_file *f)
{
	struct err err = { "" };
	int rc = conf_read(path, f, &err);

	if (rc == -ENOENT)
		rc = conf_parse(path, "", 0, f, &err);
	if (!rc)
		rc = autoattach_check(f, &err);
	if (rc)
		return fail(rc == -EINVAL ? EXIT_USAGE : EXIT_FAILED, "%s", err.msg);
	return EXIT_OK;
}

int autoattach_load(struct options *o, struct conf_file *f)
{
	int status = load(o->conf, f);

	if (status == EXIT_OK)
		autoattach_apply(f, o);
	return status;
}

/* Does not come back when it went well. */
static int start_units(const struct conf_file *f)
{
	static const char *const head[] = { "systemctl", "--no-block", "start", "--" };
	const size_t n = ARRAY_LEN(head);
	_cleanup_free_ char **argv = calloc(n + f->lines_n + 1, sizeof(*argv));
	_cleanup_free_ char *names = calloc(f->lines_n + 1, UNIT_LEN);
	struct options o;
	struct err err = { "" };

	if (!argv || !names)
		return fail(EXIT_FAILED, "out of memory");
	for (size_t i = 0; i < n; i++)
		argv[i] = (char *)(uintptr_t)head[i];
	for (size_t i = 0; i < f->lines_n; i++) {
		argv[n + i] = &names[i * UNIT_LEN];
		if (autoattach_parse(f->path, &f->lines[i], &o, &err))
			return fail(EXIT_USAGE, "%s", err.msg);
		if (autoattach_unit(o.export, argv[n + i], UNIT_LEN))
			return fail(EXIT_USAGE, "%s:%u: the export's name is too long for a unit of systemd",
				    f->path, f->lines[i].number);
	}
	(void)execvp(argv[0], argv);
	return fail(EXIT_FAILED, "cannot run systemctl: %s", strerror(errno));
}

int autoattach_run(const struct options *o)
{
	_cleanup_conf_ struct conf_file f = { 0 };
	int status = load(o->conf ? o->conf : ATTACH_CONF, &f);

	if (status != EXIT_OK || f.lines_n == 0)
		return status;
	return start_units(&f);
}
