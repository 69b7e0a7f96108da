/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Requests to the kernel's nbd driver that cannot hang the caller: nl.h in child processes, with time
 * limits and texts for people. Each returns 0 or -errno with `err` filled; -ETIMEDOUT: no answer, and what
 * the driver does later is unknown.
 */
#ifndef NBDRS_DRIVER_H
#define NBDRS_DRIVER_H

#include <stdint.h>

#include "nbdrs/err.h"
#include "nl.h"

enum {
	DRIVER_LIMIT_MS = 30000, /* for CONNECT and DISCONNECT, which wait for running requests */
	DRIVER_RETRY_MS =
		5000, /* how long CONNECT is tried again while the device is just being used */
	DRIVER_MODPROBE_MS = 30000,
};

/* Loads the module when the driver is not there. -ENOENT: that did not help. */
int driver_ensure(struct err *err);

/* CONNECT, tried again as long as the device may become free. -EBUSY after that; -EPERM; -EINTR. */
int driver_connect(const struct nbdnl_connect *c, uint32_t *index, struct err *err);

int driver_disconnect(uint32_t index, struct err *err);

/* New sockets for dead ones. -EINVAL: not connected, or with another backend. */
int driver_reconfigure(uint32_t index, const char *backend, const int *socks, unsigned socks_n,
		       struct err *err);

#endif
