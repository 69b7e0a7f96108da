/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Parsers of mountinfo and swaps: see mounts.h. */
#include "mounts.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>

/* One half of a device number, 32 bits at most; what follows it. NULL for anything else. */
static const char *half(const char *p, unsigned *out)
{
	char *end;
	unsigned long v;

	if (*p < '0' || *p > '9')
		return NULL;
	errno = 0;
	v = strtoul(p, &end, 10);
	if (errno || v > UINT32_MAX)
		return NULL;
	*out = (unsigned)v;
	return end;
}

int dev_parse(const char *text, dev_t *out)
{
	unsigned major, minor;
	const char *p = half(text, &major);

	if (!p || *p != ':')
		return -EINVAL;
	p = half(p + 1, &minor);
	if (!p || *p)
		return -EINVAL;
	*out = makedev(major, minor);
	return 0;
}

/* The kernel writes blanks, newlines and backslashes in names as \ooo. */
static void unescape(char *s)
{
	char *out = s;

	for (; *s; s++) {
		if (s[0] == '\\' && s[1] >= '0' && s[1] <= '3' && s[2] >= '0' && s[2] <= '7' &&
		    s[3] >= '0' && s[3] <= '7') {
			*out++ = (char)((s[1] - '0') * 64 + (s[2] - '0') * 8 + (s[3] - '0'));
			s += 3;
		} else {
			*out++ = *s;
		}
	}
	*out = '\0';
}

/* The next word; NULL at the end. */
static char *word(char **rest)
{
	char *w;

	while ((w = strsep(rest, " \t")))
		if (*w)
			return w;
	return NULL;
}

int mount_parse(char *line, struct mount_line *m)
{
	char *rest = line, *dev, *point, *w, *type, *source, *options;
	dev_t number;

	(void)word(&rest); /* mount id */
	(void)word(&rest); /* parent id */
	dev = word(&rest);
	(void)word(&rest); /* root of the mount in its file system */
	point = word(&rest);
	if (!point || dev_parse(dev, &number))
		return -EINVAL;
	/* Mount options, then any number of optional fields up to a lone dash. */
	do
		w = word(&rest);
	while (w && strcmp(w, "-") != 0);
	type = word(&rest);
	source = word(&rest);
	options = word(&rest);
	if (!source)
		return -EINVAL;
	unescape(point);
	unescape(source);
	if (options)
		unescape(options);
	m->dev = number;
	m->point = point;
	m->type = type;
	m->source = source;
	m->super_options = options ? options : "";
	return 0;
}

int swap_parse(char *line, const char **file)
{
	char *rest = line;
	char *name = word(&rest);

	if (!name || name[0] != '/')
		return -EINVAL;
	unescape(name);
	*file = name;
	return 0;
}
