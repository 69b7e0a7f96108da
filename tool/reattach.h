/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * New connections for a device that has lost some: its daemon died, or the kernel gave a connection up.
 */
#ifndef NBDRS_REATTACH_H
#define NBDRS_REATTACH_H

#include <stdint.h>

#include "ctlclient.h"
#include "devices.h"
#include "nbdrs/err.h"

/* How a device and the daemon at a control socket are related. */
enum link_state {
	LINK_LIVE,    /* all connections work */
	LINK_CUT,     /* its export is served, but connections are missing */
	LINK_WAITING, /* no daemon answers */
	LINK_ORPHAN,  /* a daemon answers, and does not serve what this device was attached to */
	LINK_FOREIGN, /* not attached by nbdrs */
};

extern const char *const link_state_names[];

/* What a daemon says of a device. */
struct link {
	unsigned alive;	 /* connections that work */
	unsigned wanted; /* connections it should have, as far as the daemon or the kernel know */
	uint64_t volume; /* bytes */
};

/* -ENOENT: it serves nothing by the device's identifier; else as ctl_call. */
int link_ask(struct ctl_client *c, const struct device *d, struct link *out, struct err *err);

/*
 * Asks the daemon at `control` (NULL = the default) about a connected device; at most `limit_ms`. *l is
 * what it says, with LINK_LIVE and LINK_CUT only. `err` says what is wrong where something is.
 */
enum link_state reattach_look(const char *control, const struct device *d, unsigned limit_ms, struct link *l,
			      struct err *err);

/*
 * Gives the device the connections that it lacks, and returns when all work, or after `limit_ms`. Requests
 * that wait for a connection go on at once; what had been sent already is sent again when its timer fires
 * (resend_set). 0 also when nothing was missing.
 * -ECONNREFUSED: no daemon. -ENOENT, -ESTALE: it serves nothing by that identifier, or not with that size: another
 * image must never get this device's requests. -EPERM: no CAP_SYS_ADMIN. -ETIMEDOUT: the kernel took none.
 */
int reattach(const char *control, const struct device *d, unsigned limit_ms, struct err *err);

/*
 * How often the kernel looks at the requests that it has sent: those whose connection has been replaced are
 * sent again. For a device with one connection and no time-out, where it does nothing else than that (and
 * log those that take longer). -errno of writing sysfs.
 */
int resend_set(uint32_t index, unsigned ms);

#endif
