/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the files of the control socket share. Everything runs on reactor 0, so the state below needs no
 * locks; it may change across any CO_FN call.
 */
#ifndef NBDRS_CTL_INT_H
#define NBDRS_CTL_INT_H

#include <jansson.h>
#include <stdint.h>
#include <sys/socket.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/co.h"
#include "nbdrs/export.h"
#include "nbdrs/list.h"

static inline void cleanup_jsonp(json_t **j)
{
	json_decref(*j);
}

#define _cleanup_json_ _cleanup_(cleanup_jsonp)

/* A connected control client. */
struct ctl_peer {
	struct list node;
	int fd;
	struct ucred cred;
};

/*
 * A command: answers `req` (borrowed) on `p`. 0 = the client may go on; -errno = close it (it was not
 * possible to answer).
 */
struct ctl_cmd {
	const char *name;
	CO_FN int (*run)(struct ctl_peer *p, json_t *req);
};

/*
 * Sends one packet: `reply` (taken; NULL = out of memory) with "nbdrs" and "ok": true added, and the
 * `n` descriptors (stay the caller's). -errno when the client is gone or does not read.
 */
CO_FN int ctl_answer(struct ctl_peer *p, json_t *reply, const int *fds, unsigned n);

/* Answers "ok": false with -errno `rc` and a text. */
CO_FN int ctl_refuse(struct ctl_peer *p, int rc, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));

/* A JSON string of bytes that need not be UTF-8 (paths): what is not ASCII becomes "?" then. */
json_t *ctl_text(const char *s);

/* The member `key` as a string; NULL when absent, and NULL with *bad set when it is something else. */
const char *ctl_get_text(json_t *req, const char *key, bool *bad);

/* One past connections_collect. */
struct ctl_conn {
	uint64_t id, requests, in_flight;
	const struct export *export;
	bool is_kernel, is_cut;
	char peer[64];
};

struct ctl_conns {
	struct ctl_conn *v;
	size_t n, room;
	bool is_oom;
};

static inline void cleanup_conns(struct ctl_conns *c)
{
	free(c->v);
}

#define _cleanup_conns_ _cleanup_(cleanup_conns)

/* The connections of all reactors, as they are now. -ENOMEM. `out` zeroed, and _cleanup_conns_. */
CO_FN int ctl_conns_collect(struct ctl_conns *out);

/* Devices: an array of {"device", "connections", "attach_id"} for an export. NULL = out of memory. */
json_t *ctl_devices(const struct export *e, const struct ctl_conns *conns);
/* Forgets attached devices none of whose connections is left. */
void ctl_devices_prune(const struct ctl_conns *conns);
void ctl_devices_free(void);

CO_FN int ctl_cmd_version(struct ctl_peer *p, json_t *req);
CO_FN int ctl_cmd_status(struct ctl_peer *p, json_t *req);
CO_FN int ctl_cmd_attach(struct ctl_peer *p, json_t *req);
CO_FN int ctl_cmd_attached(struct ctl_peer *p, json_t *req);
CO_FN int ctl_cmd_upgrade(struct ctl_peer *p, json_t *req);
CO_FN int ctl_cmd_device(struct ctl_peer *p, json_t *req);
CO_FN int ctl_cmd_detached(struct ctl_peer *p, json_t *req);
CO_FN int ctl_cmd_resize(struct ctl_peer *p, json_t *req);

/* Start of serving, for uptime. */
extern uint64_t ctl_started_ns;

#endif
