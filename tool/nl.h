/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The nbd driver's generic-netlink interface (Linux: include/uapi/linux/nbd-netlink.h,
 * drivers/block/nbd.c). Every function returns 0 or the kernel's -errno, and prints nothing.
 *
 * Names start with nbdnl_, as nl_connect() and others belong to libnl.
 *
 * Every call may hang for as long as the driver does, so tools make them in a child (child.h), and open
 * the socket there, too. Sockets are taken from the descriptor table of the process that asks.
 */
#ifndef NBDRS_NL_H
#define NBDRS_NL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct nl_msg;

#define NBD_NL_FAMILY  "nbd"
#define NBD_NL_VERSION 1
#define NBD_NL_GROUP   "nbd_mc_group"

/* Own constants: installed kernel headers may lack the newer ones. */
enum nbd_nl_cmd {
	NBD_NL_CONNECT = 1,
	NBD_NL_DISCONNECT = 2,
	NBD_NL_RECONFIGURE = 3,
	NBD_NL_LINK_DEAD = 4,
	NBD_NL_STATUS = 5,
};

enum nbd_nl_attr {
	NBD_NL_A_INDEX = 1,             /* u32 */
	NBD_NL_A_SIZE_BYTES = 2,        /* u64 */
	NBD_NL_A_BLOCK_SIZE_BYTES = 3,  /* u64 */
	NBD_NL_A_TIMEOUT = 4,           /* u64, seconds */
	NBD_NL_A_SERVER_FLAGS = 5,      /* u64, transmission flags of the NBD protocol */
	NBD_NL_A_CLIENT_FLAGS = 6,      /* u64 */
	NBD_NL_A_SOCKETS = 7,           /* nested NBD_NL_SOCK_ITEM { NBD_NL_SOCK_FD u32 } */
	NBD_NL_A_DEAD_CONN_TIMEOUT = 8, /* u64, seconds */
	NBD_NL_A_DEVICE_LIST = 9,       /* nested NBD_NL_DEVICE_ITEM { INDEX u32, CONNECTED u8 } */
	NBD_NL_A_BACKEND_ID = 10,       /* NUL-terminated */
	NBD_NL_A_MAX = 10,
};

enum { NBD_NL_SOCK_ITEM = 1 };
enum { NBD_NL_SOCK_FD = 1, NBD_NL_SOCK_MAX = 1 };
enum { NBD_NL_DEVICE_ITEM = 1 };
enum { NBD_NL_DEVICE_INDEX = 1, NBD_NL_DEVICE_CONNECTED = 2, NBD_NL_DEVICE_MAX = 2 };

enum { NL_INDEX_ANY = -1, NL_SOCKS_MAX = 64 };

/*
 * A CONNECT. Nothing is left to the driver's defaults: a missing block size would mean 1024, and a missing
 * time-out the one of the device's last user.
 */
struct nbdnl_connect {
	int64_t index;             /* NL_INDEX_ANY: the kernel picks or makes one */
	uint64_t size, block_size; /* bytes */
	uint64_t server_flags, client_flags;
	uint64_t timeout_s, dead_conn_timeout_s;
	const char *backend; /* shown in /sys/block/nbdN/backend */
	const int *socks;    /* open in this process; the kernel takes references of its own */
	unsigned socks_n;    /* 1 to NL_SOCKS_MAX */
};

struct nbdnl;

/*
 * Connects to the kernel and looks the driver up. -ENOENT: it is not there (modprobe nbd). The caller
 * owns *out.
 */
int nbdnl_open(struct nbdnl **out);
/* NULL is fine. */
void nbdnl_close(struct nbdnl *nl);

/*
 * Sends `c`; *index becomes the device's. -EBUSY: in use, or just being opened by udev. -EEXIST: its last
 * use is still being torn down. -EINVAL has many causes, one of them that the device is going away. All
 * three may be gone a moment later. -EPERM: no CAP_SYS_ADMIN.
 */
int nbdnl_connect(struct nbdnl *nl, const struct nbdnl_connect *c, uint32_t *index);

/*
 * Disconnects, whoever has the device open: that is for the caller to check. 0 also when it was not
 * connected. -EINVAL: no such device.
 */
int nbdnl_disconnect(struct nbdnl *nl, uint32_t index);

/*
 * New sockets for dead ones of a connected device. `backend` must be what it was connected with. Sockets
 * beyond the number of dead ones are dropped without an error: see whether the other end stays open.
 */
int nbdnl_reconfigure(struct nbdnl *nl, uint32_t index, const char *backend, const int *socks,
		      unsigned socks_n);

/*
 * Another size for a connected device; `backend` must be what it was connected with. Waits for requests in flight.
 * Kernels before 5.3 say yes and do nothing.
 */
int nbdnl_resize(struct nbdnl *nl, uint32_t index, const char *backend, uint64_t size);

struct nbdnl_device {
	uint32_t index;
	bool is_in_use; /* connected, or open somewhere although it is not */
};

/* All devices of the driver, or one; up to devices_max of them. Needs no privileges. */
int nbdnl_status(struct nbdnl *nl, int64_t index, struct nbdnl_device *devices,
		 unsigned devices_max, unsigned *devices_n);

/*
 * The attributes of a CONNECT into a message whose header is there (nbdnl_connect does both). For tests,
 * too. -EMSGSIZE; -EINVAL for no or too many sockets.
 */
int nbdnl_put_connect(struct nl_msg *msg, const struct nbdnl_connect *c);

/* The reply's list in `attrs` (len bytes of attributes). For tests, too. -EBADMSG. */
int nbdnl_parse_status(const void *attrs, size_t len, struct nbdnl_device *devices,
		       unsigned devices_max, unsigned *devices_n);

/* Makes `nl` hear of connections that the kernel gives up (LINK_DEAD), and of nothing else. */
int nbdnl_listen(struct nbdnl *nl);
/* For poll(2): readable when something was heard. */
int nbdnl_fd(const struct nbdnl *nl);
/* Drops what was heard: which device it was is seen in sysfs and by the daemon. */
void nbdnl_drain(struct nbdnl *nl);

#endif
