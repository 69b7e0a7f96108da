/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Small files of the kernel: see sysfs.h. */
#include "sysfs.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "mounts.h"
#include "nbdrs/cleanup.h"

const char *fs_root = "";

static int __attribute__((format(printf, 2, 0))) path_of(char *out, const char *fmt, va_list ap)
{
	const size_t head = strlen(fs_root);
	int n;

	if (head >= SYSFS_PATH_LEN)
		return -ENAMETOOLONG;
	memcpy(out, fs_root, head);
	n = vsnprintf(out + head, SYSFS_PATH_LEN - head, fmt, ap);
	return n < 0 || (size_t)n >= SYSFS_PATH_LEN - head ? -ENAMETOOLONG : 0;
}

/* Formats the path of a variadic function into a local `path`; `rc` is its result. */
#define PATH_OF_ARGS(fmt)            \
	char path[SYSFS_PATH_LEN];   \
	va_list ap;                  \
	int rc;                      \
	va_start(ap, fmt);           \
	rc = path_of(path, fmt, ap); \
	va_end(ap)

int fs_path(char *out, const char *fmt, ...)
{
	PATH_OF_ARGS(fmt);
	if (rc)
		return rc;
	memcpy(out, path, strlen(path) + 1);
	return 0;
}

bool fs_exists(const char *fmt, ...)
{
	PATH_OF_ARGS(fmt);
	return !rc && access(path, F_OK) == 0;
}

static int read_file(const char *path, char *out, size_t out_len)
{
	_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	size_t len = 0;

	if (fd < 0)
		return -errno;
	while (len < out_len - 1) {
		ssize_t n = read(fd, out + len, out_len - 1 - len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			break;
		len += (size_t)n;
	}
	while (len > 0 && out[len - 1] == '\n')
		len--;
	out[len] = '\0';
	return 0;
}

int fs_read(char *out, size_t out_len, const char *fmt, ...)
{
	PATH_OF_ARGS(fmt);
	return rc ? rc : read_file(path, out, out_len);
}

int fs_read_u64(uint64_t *out, const char *fmt, ...)
{
	char text[32], *end;
	unsigned long long v;
	PATH_OF_ARGS(fmt);

	if (!rc)
		rc = read_file(path, text, sizeof(text));
	if (rc)
		return rc;
	errno = 0;
	v = strtoull(text, &end, 10);
	if (errno || end == text || *end || text[0] < '0' || text[0] > '9')
		return -EINVAL;
	*out = v;
	return 0;
}

int fs_read_dev(dev_t *out, const char *fmt, ...)
{
	char text[32];
	PATH_OF_ARGS(fmt);

	if (!rc)
		rc = read_file(path, text, sizeof(text));
	return rc ? rc : dev_parse(text, out);
}

int fs_each(int (*fn)(const char *name, void *arg), void *arg, const char *fmt, ...)
{
	struct dirent *e;
	DIR *dir;
	PATH_OF_ARGS(fmt);

	if (rc)
		return rc;
	dir = opendir(path);
	if (!dir)
		return errno == ENOENT || errno == ENOTDIR ? 0 : -errno;
	while (!rc && (e = readdir(dir)))
		if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
			rc = fn(e->d_name, arg);
	(void)closedir(dir);
	return rc;
}

int fs_each_line(int (*fn)(char *line, void *arg), void *arg, const char *fmt, ...)
{
	_cleanup_free_ char *line = NULL;
	size_t room = 0;
	ssize_t n;
	FILE *f;
	PATH_OF_ARGS(fmt);

	if (rc)
		return rc;
	f = fopen(path, "re");
	if (!f)
		return -errno;
	while (!rc && (n = getline(&line, &room, f)) >= 0) {
		if (n > 0 && line[n - 1] == '\n')
			line[n - 1] = '\0';
		rc = fn(line, arg);
	}
	(void)fclose(f);
	return rc;
}
