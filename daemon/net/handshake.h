/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Fixed newstyle negotiation of one client (NBD proto.md, Handshake phase).
 */
#ifndef NBDRS_HANDSHAKE_H
#define NBDRS_HANDSHAKE_H

#include "nbdrs/conn.h"

/*
 * Talks to the client until it chose an export. 0 = transmission begins, *out is filled and every reply
 * was sent; -errno = close the socket (-ECONNABORTED: the client said ABORT; -ETIMEDOUT: `deadline_ns`
 * passed; -EPROTO: it broke the protocol; -ENOENT: EXPORT_NAME of an unknown export; -ESHUTDOWN; what the socket
 * said). It is logged. Reads not a byte beyond the negotiation. `peer` is for logs. On reactor 0 only.
 */
CO_FN int handshake(int fd, const char *peer, uint64_t deadline_ns, struct session *out);

/* From now on INFO and GO are answered with ERR_SHUTDOWN. Any thread. */
void handshake_shutdown(void);

#endif
