/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What one nbdrsd leaves to the next one, so that its clients notice nothing but a pause: sockets, and what was agreed
 * on and received in part on each. The next one is the same process after exec (an upgrade), or the one that systemd
 * starts after it, which only gets the connections of devices (cmd/fdstore.c).
 *
 * It travels in a file (memfd): a magic, the length of the head, the head (a JSON object), then the bytes
 * that had been received and not been used, of all connections. Across exec descriptors stay open, and their numbers
 * in the head are right. From systemd they come under other numbers, with names that say which entry they belong to.
 * The head is parsed by a program of another version, so it says which format it is
 * (HANDOVER_FORMAT), and unknown members are ignored.
 */
#ifndef NBDRS_HANDOVER_H
#define NBDRS_HANDOVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "nbdrs/err.h"
#include "nbdrs/proto.h"

/* Raised when an older nbdrsd would misread it: `nbdrsd --check-handover N` says which ones it can read. */
enum { HANDOVER_FORMAT = 1 };

/* What it prints when it can, and exits 0: not every program that exits 0 is an nbdrsd. */
#define HANDOVER_YES "nbdrsd can take over"

/* The environment variable that holds the file's descriptor. */
#define HANDOVER_ENV "NBDRS_HANDOVER"

enum { HANDOVER_PEER_MAX = 64, HANDOVER_DEVICE_MAX = 65 };

/* Names with which systemd keeps descriptors: the file, and the connection that is number %zu in it. */
#define HANDOVER_NAMES "nbdrs-"
#define HANDOVER_FILE_NAME HANDOVER_NAMES "handover"
#define HANDOVER_CONN_NAME HANDOVER_NAMES "%zu"

/* A size that an older nbdrsd did not tell. */
#define HANDOVER_NO_SIZE UINT64_MAX

/* A connection in transmission phase with nothing in flight. */
struct handover_conn {
	int fd;
	char *backend_id; /* of its export */
	uint64_t size;	  /* of its export, bytes */
	char *stores;	  /* of an export without an identity (export_stores); NULL = not told */
	char peer[HANDOVER_PEER_MAX];
	bool is_structured, has_meta, is_kernel, is_read_only;
	void *left; /* bytes that were received and not used, to be parsed first */
	size_t left_len;
	/* A write that was refused while its payload is still coming: thrown away, then answered. */
	bool has_refused;
	struct nbd_request refused;
	uint32_t refused_error;
	uint64_t discard; /* bytes of it that have not come yet */
};

struct handover_listener {
	int fd;
	bool is_unix;
	char *path; /* a socket file that we made and have to remove; NULL = none */
	dev_t dev;
	ino_t ino;
};

/* An attached kernel device (ctl/devices.c). */
struct handover_device {
	uint64_t id;
	char *backend_id;
	unsigned connections;
	uid_t uid;
	char name[HANDOVER_DEVICE_MAX];
};

struct handover {
	unsigned generation;	/* of the one that is to come: 1 for the first one after a start */
	uint64_t next_device;
	struct handover_conn *conns;
	struct handover_listener *listeners;
	struct handover_device *devices;
	size_t conns_n, listeners_n, devices_n;
};

/* Whether a descriptor of that name is one of those above. */
bool handover_is_kept(const char *name);

/* Append a zeroed element; NULL without memory. The pointer is good until the next one. */
struct handover_conn *handover_add_conn(struct handover *h);
struct handover_listener *handover_add_listener(struct handover *h);
struct handover_device *handover_add_device(struct handover *h);

/* Frees what is in it, and no descriptors; zeroes it. */
void handover_clear(struct handover *h);

/* The head as a string (the caller's), NULL without memory or for a path that is not UTF-8. Pure. */
char *handover_encode(const struct handover *h);

/*
 * The head's `len` bytes into *h (zeroed), everything but the bytes of `left`, whose lengths are set and whose sum is
 * at most `left_room`. -EPROTO with a text that says what is wrong; *h is empty then. Pure.
 */
int handover_decode(const char *head, size_t len, uint64_t left_room, struct handover *h, struct err *err);

/* All of it into, and out of, the file `fd`. Block, for threads. -errno. */
int handover_save(const struct handover *h, int fd, struct err *err);
int handover_load(int fd, struct handover *h, struct err *err);

#endif
