/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Writes that failed since a device was connected, from the kernel's log. After the dead-connection
 * time-out umount(8) says 0 although data is lost, and a later fsync of the device may find nothing wrong:
 * the log is what is left.
 */
#ifndef NBDRS_LOSTDATA_H
#define NBDRS_LOSTDATA_H

#include <stdint.h>

struct lost_data {
	unsigned errors_n; /* messages; the kernel limits their rate, so there may have been more */
};

/*
 * Takes one message of the log, oldest first, into account: a write error of `disk` ("nbd0") or a
 * partition of it counts, a new connection starts again at zero. Pure.
 */
void lost_data_line(struct lost_data *lost, const char *disk, const char *message);

/* Reads /dev/kmsg. 0, or -errno (-EPERM without CAP_SYSLOG). Does not wait. */
int lost_data_read(const char *disk, struct lost_data *lost);

#endif
