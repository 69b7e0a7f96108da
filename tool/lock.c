/* SPDX-License-Identifier: GPL-3.0-or-later */
#include "lock.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>

#include "child.h"
#include "nbdrs/cleanup.h"
#include "sysfs.h"

enum { LOCK_LIMIT_MS = 60000 }; /* others connecting, one after the other */

#define LOCK_PATH "/run/nbdrs-attach.lock"

int lock_take(int *out, struct err *err)
{
	const uint64_t until = now_ms() + LOCK_LIMIT_MS;
	char path[SYSFS_PATH_LEN];
	_cleanup_close_ int fd = -1;

	if (fs_path(path, LOCK_PATH))
		return err_set(err, -ENAMETOOLONG, "path too long");
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0 && (errno == EACCES || errno == EPERM))
		return err_set(err, -EACCES, "this needs root: %s: permission denied", path);
	if (fd < 0)
		return err_set(err, -errno, "cannot open %s: %s", path, strerror(errno));
	while (flock(fd, LOCK_EX | LOCK_NB)) {
		if (interrupted())
			return err_set(err, -EINTR, "interrupted while waiting for %s", path);
		if (now_ms() >= until)
			return err_set(err, -ETIMEDOUT, "somebody else has held %s for too long", path);
		sleep_ms(20);
	}
	*out = TAKE_FD(fd);
	return 0;
}
