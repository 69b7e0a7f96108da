/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Listening sockets: TCP, unix, and those that systemd passes in. Accepting runs on reactor 0; each
 * client is negotiated with in a fiber under a time limit and a connection limit.
 */
#ifndef NBDRS_LISTEN_H
#define NBDRS_LISTEN_H

#include <stdbool.h>

#include "nbdrs/co.h"
#include "nbdrs/err.h"

struct listen_conf {
	unsigned max_conns;	     /* in handshake and transmission together, 0 = no limit */
	uint64_t handshake_ns;	     /* time limit of the negotiation */
};

/* Whether listen_tcp() would understand it: 0 or -EINVAL. Looks nothing up. */
int listen_check(const char *host_port, struct err *err);
/* Opens "HOST:PORT", "[V6]:PORT", "HOST" (port 10809), every address of a name. Before listeners_start. */
CO_FN int listen_tcp(const char *host_port, struct err *err);
/* A stale socket file (nobody answers) is replaced, a live one is -EADDRINUSE. The umask decides its mode. */
CO_FN int listen_unix(const char *path, struct err *err);
/* Sockets of systemd socket activation (LISTEN_FDS), if any; the number taken or -errno. */
int listen_systemd(struct err *err);

/* Begins to accept. */
CO_FN int listeners_start(const struct listen_conf *conf, struct err *err);
struct handover;

/*
 * For the next nbdrsd: stops accepting and cuts off who is in negotiation (clients wait in the backlog, and those that
 * were cut connect again). listeners_start calls it off. listeners_save writes the sockets down in `h`, -ENOMEM;
 * listeners_forget frees the rest and leaves them open.
 */
CO_FN void listeners_hold(void);
int listeners_save(struct handover *h);
void listeners_forget(void);
/* Takes over what is in `h`, in place of opening anything. Before listeners_start. -ENOMEM. */
int listeners_adopt(struct handover *h, struct err *err);

/* Stops accepting, waits for negotiations to end (they get ERR_SHUTDOWN), closes; removes unix socket files it made. */
CO_FN void listeners_stop(void);

#endif
