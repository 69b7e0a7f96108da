/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The table of kernel devices, for `attach`. Everything runs on reactor 0.
 */
#ifndef NBDRS_CTL_DEVICES_H
#define NBDRS_CTL_DEVICES_H

#include "ctl/ctl_int.h"

enum { DEVICE_NAME_MAX = 64, DEVICE_PEER_MAX = 32 };

struct device {
	struct list node;
	uint64_t id;
	const struct export *export;
	unsigned connections;
	uid_t uid;
	unsigned starting;              /* requests that make sockets for it */
	char name[DEVICE_NAME_MAX + 1]; /* "" until `attached` came */
};

/* An entry without connections; `name` of at most DEVICE_NAME_MAX bytes, NULL = not known yet. NULL = no memory. */
struct device *device_new(const struct export *e, uid_t uid, const char *name);
size_t devices_n(void);
/* NULL = there is none. */
struct device *device_find(uint64_t id);
struct device *device_find_name(const char *name);

/* The peer's name that a device's connections have. */
void device_peer(uint64_t id, char out[DEVICE_PEER_MAX]);

/* A device's connections: those that work, and those that are cut but have requests in the chain. */
struct tally {
	unsigned alive, ghosts;
};

struct tally device_count(const struct device *d, const struct ctl_conns *conns);

/* The member "device": a path or name of printable ASCII without spaces; NULL when it is not that. */
const char *device_name(json_t *req);

#endif
