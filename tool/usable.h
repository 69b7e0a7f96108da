/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Is a connected device usable: does it have its size and node, does its server answer a read, are its
 * partitions there, and has udev made its links. The kernel answers CONNECT before any of that.
 */
#ifndef NBDRS_USABLE_H
#define NBDRS_USABLE_H

#include <stdbool.h>
#include <stdint.h>

#include "nbdrs/err.h"

struct usable {
	uint32_t index;
	uint64_t size;       /* bytes that it must have */
	const char *backend; /* that the device must carry */
	bool waits_for_udev;
	unsigned limit_ms; /* for the kernel and the daemon, and again for udev */
	unsigned probe_ms; /* of limit_ms, for the read; 0 = all that is left */
};

/*
 * Waits until all of it is true. -ETIMEDOUT with what was missing; -EAGAIN when the read was not
 * answered within probe_ms; -EINTR after a signal; -EIO when the read failed; -EBUSY when the device carries
 * another backend.
 */
int usable_wait(const struct usable *u, struct err *err);

/* True when udevd runs here. */
bool udev_runs(void);

/* Waits until udev has handled its events, `limit_ms` at most: some machines never get there. */
void udev_settle(unsigned limit_ms);

/* Waits until the links of a detached device's `backend` are gone, `limit_ms` at most. */
void udev_wait_unlinked(const char *backend, unsigned limit_ms);

#endif
