/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * `nbdrsctl resize`: the daemon's volume, and this machine's devices of it.
 *
 *	grow	volume, then devices: a device never reaches behind its volume
 *	shrink	devices, then volume
 *
 * Interrupted at any point it is done by doing it again: what has its size already is left alone.
 */
#ifndef NBDRS_RESIZE_H
#define NBDRS_RESIZE_H

#include <stdbool.h>
#include <stdint.h>

#include "ctlclient.h"
#include "nbdrs/err.h"

enum { RESIZE_DEVICES_MAX = 16, RESIZE_LIMIT_MS = 30000, RESIZE_TIMEOUT_MS = 600000 };

struct resize {
	const char *export;
	uint64_t size; /* bytes */
	bool may_shrink;
	/* What came of it. */
	uint32_t index[RESIZE_DEVICES_MAX];
	unsigned devices_n;
};

/*
 * -EPERM: devices need root; -EBUSY: a connection of a device is dead, or another resize runs; -ETIMEDOUT: the kernel
 * or the daemon does not answer; else as the daemon says. `err` says how far it came when it is not where it began.
 */
int resize_run(struct ctl_client *c, struct resize *r, struct err *err);

/* Prints what came of it on standard output: sizes and devices, as text or JSON. */
void resize_print(const struct resize *r, bool json);

#endif
