/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The client side of the daemon's control socket (nbdrs/ctl.h): blocking calls with a time limit, for
 * the command line tools. No fibers here; prints nothing.
 *
 *	struct ctl_client *c = NULL;
 *	struct err err;
 *	json_t *reply;
 *
 *	rc = ctl_open(path, timeout_ms, &c, &err);
 *	rc = ctl_send(c, json_pack("{s:s, s:s}", "cmd", "attach", "export", name), &err);
 *	rc = ctl_recv(c, &reply, fds, &fds_n, &err);
 *	ctl_close(c);
 */
#ifndef NBDRS_CTLCLIENT_H
#define NBDRS_CTLCLIENT_H

#include <stdbool.h>
#include <jansson.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/err.h"

enum { CTL_TIMEOUT_MS = 10000 }; /* what tools use unless told otherwise */

struct ctl_client;

/*
 * Connects to the daemon at `path` (NULL = CTL_DEFAULT_PATH). `timeout_ms` is the limit of each later
 * wait, too: for the connection, for a packet to be sent, for a packet to come. On success the caller
 * owns *out (ctl_close). `err` names the path and the mend in every case:
 *   -ECONNREFUSED  no daemon answers there (no such socket, or a stale one): the only case that
 *		    means "not running"
 *   -EACCES	    the socket is there, but not for this user
 *   -ETIMEDOUT	    the daemon is there, but hangs or has too many control clients
 *   -EINVAL	    the path is too long for a socket, or not a socket
 *   any other	    as connect(2)
 */
int ctl_open(const char *path, unsigned timeout_ms, struct ctl_client **out, struct err *err);

/* NULL is fine. */
void ctl_close(struct ctl_client *c);

/*
 * Sends `request` (an object; "nbdrs": 1 is added). The reference is taken in any case; NULL (out of
 * memory in json_pack) is -ENOMEM. -EMSGSIZE beyond CTL_MAX_PACKET; -EPIPE/-ECONNRESET when the daemon
 * went away; -ETIMEDOUT.
 */
int ctl_send(struct ctl_client *c, json_t *request, struct err *err);

/*
 * Receives one packet of the reply. On success *reply is the caller's (json_decref). An answer that
 * says "ok": false is the -errno it names, err holds the daemon's text, and ctl_was_answered() is true.
 *
 * Descriptors: `fds` has room for *fds_n, and *fds_n becomes the number received (close-on-exec, the
 * caller's; untouched on failure, nothing leaks). More than there is room for, or any when fds is NULL,
 * is -EPROTO with all of them closed.
 *
 * -ETIMEDOUT; -ECONNRESET when the daemon closed; -EPROTO for what is not a reply of version 1.
 */
int ctl_recv(struct ctl_client *c, json_t **reply, int *fds, unsigned *fds_n, struct err *err);

/* One request, one packet back, no descriptors; `request` is taken. Errors of both. */
int ctl_call(struct ctl_client *c, json_t *request, json_t **reply, struct err *err);

/* True when more packets of the same answer follow `reply` ("more": true). */
bool ctl_has_more(const json_t *reply);

/* True when the last failure was the daemon's own answer and not one of the transport. */
bool ctl_was_answered(const struct ctl_client *c);

/* Cleanups for scopes: _cleanup_ctl_ struct ctl_client *c = NULL; _cleanup_json_ json_t *j = NULL; */
static inline void cleanup_ctlp(struct ctl_client **c)
{
	ctl_close(*c);
}

static inline void cleanup_jsonp(json_t **j)
{
	json_decref(*j);
}

#define _cleanup_ctl_ _cleanup_(cleanup_ctlp)
#define _cleanup_json_ _cleanup_(cleanup_jsonp)

#endif
