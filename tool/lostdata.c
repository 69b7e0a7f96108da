/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Failed writes in the kernel's log: see lostdata.h. */
#include "lostdata.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"
#include "sysfs.h"

/* True when `at` names the disk or a partition of it, and the name ends there. */
static bool is_disk(const char *at, const char *disk)
{
	const size_t len = strlen(disk);

	if (strncmp(at, disk, len) != 0)
		return false;
	at += len;
	if (at[0] == 'p' && at[1] >= '0' && at[1] <= '9') {
		at++;
		at += strspn(at, "0123456789");
	}
	return !(*at >= '0' && *at <= '9') && !(*at >= 'a' && *at <= 'z');
}

void lost_data_line(struct lost_data *lost, const char *disk, const char *message)
{
	const char *dev;

	/* block/genhd.c, set_capacity_and_notify(): the line of every CONNECT. */
	if (is_disk(message, disk) && strstr(message, ": detected capacity change from 0 to ")) {
		lost->errors_n = 0;
		return;
	}
	/* block/blk-mq.c, blk_print_req_error(). */
	dev = strstr(message, "I/O error, dev ");
	if (dev && is_disk(dev + strlen("I/O error, dev "), disk) &&
	    (strstr(dev, "(WRITE") || strstr(dev, "(FLUSH)"))) {
		lost->errors_n++;
		return;
	}
	/* fs/buffer.c, buffer_io_error(). */
	dev = strstr(message, "Buffer I/O error on dev ");
	if (dev && is_disk(dev + strlen("Buffer I/O error on dev "), disk) &&
	    strstr(dev, "page write"))
		lost->errors_n++;
}

int lost_data_read(const char *disk, struct lost_data *lost)
{
	struct lost_data found = { 0 };
	char path[SYSFS_PATH_LEN], record[8192];
	_cleanup_close_ int fd = -1;

	if (fs_path(path, "/dev/kmsg"))
		return -ENAMETOOLONG;
	fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	for (;;) {
		ssize_t n = read(fd, record, sizeof(record) - 1); /* one record */
		char *message;

		if (n < 0 && (errno == EINTR || errno == EPIPE))
			continue; /* EPIPE: overwritten while we read; the next is the oldest left */
		if (n < 0 && errno != EAGAIN)
			return -errno;
		if (n <= 0)
			break;
		record[n] = '\0';
		message = strchr(record, ';'); /* "6,339,5140900,-;message\n KEY=value\n" */
		if (message) {
			message[1 + strcspn(message + 1, "\n")] = '\0';
			lost_data_line(&found, disk, message + 1);
		}
	}
	*lost = found;
	return 0;
}
