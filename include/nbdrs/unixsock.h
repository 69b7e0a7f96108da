/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Files of unix sockets that outlive their servers.
 */
#ifndef NBDRS_UNIXSOCK_H
#define NBDRS_UNIXSOCK_H

#include <sys/un.h>

/*
 * Whether a server listens at `addr` by sockets of `type` (SOCK_STREAM, ...): 1 yes, 0 no (the file is stale),
 * -errno when it can't be told. Blocks for up to 2 s while a killed server's socket is being taken down: for
 * offload() and threads, not for fibers.
 */
int unixsock_is_served(const struct sockaddr_un *addr, int type);

#endif
