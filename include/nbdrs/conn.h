/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Connections in transmission phase. The edges are event driven and own no stack while idle; each
 * request that may wait runs in a fiber of its own.
 */
#ifndef NBDRS_CONN_H
#define NBDRS_CONN_H

#include <stdbool.h>
#include <stdint.h>

#include "nbdrs/export.h"
#include "nbdrs/reactor.h"

/* What the handshake agreed on. */
struct session {
	struct export *export;
	bool is_structured;
	bool has_meta;	     /* base:allocation for this export */
	bool is_kernel;	     /* a socketpair: no ESHUTDOWN, see KERNEL-NBD.md 1.8 */
	bool is_read_only;   /* writes are refused though the export takes them */
};

/*
 * Starts serving on this reactor (or one with fewer busy connections, chosen at the first request).
 * Takes `fd` (connected stream socket, non-blocking) in any case. `peer` is for logs and status: "unix",
 * "127.0.0.1:4711", "kernel". 0, or -ENOMEM (fd closed).
 */
int conn_start(int fd, const struct session *s, const char *peer);

/* A connection as the control socket shows it. */
struct conn_view {
	uint64_t id;
	const char *export_name, *peer;
	uint64_t requests, in_flight;
	bool is_kernel;
	bool is_cut; /* kernel connections: the kernel has let go of its end, or we of ours */
};

/* Calls fn for the connections of this reactor. */
void conns_each(void (*fn)(void *arg, const struct conn_view *v), void *arg);

/*
 * Ends all connections of all reactors: new requests get ESHUTDOWN (kernel connections: are not read any
 * more), what is in flight is finished and answered, then they close. Waits until they are gone or until
 * `deadline_ns`; then cuts the rest off (still waiting for requests that sit in the chain). The number cut.
 */
CO_FN unsigned conns_drain(uint64_t deadline_ns);

struct handover;

/*
 * Handing connections (all, or those of the kernel) to the next nbdrsd, in this order. conns_hold: stops reading and
 * waits until nothing is in flight and every reply has left; those of clients (not of the kernel) that hold it up
 * beyond `deadline_ns` are cut off. -ETIMEDOUT: requests of the kernel take longer; everything goes on as before then.
 * conns_resume: calls it off. conns_save: writes them down in `h`; -ENOMEM. conns_forget: frees them; their descriptors
 * stay open.
 */
CO_FN int conns_hold(bool only_kernel, uint64_t deadline_ns);
CO_FN void conns_resume(void);
CO_FN int conns_save(struct handover *h);
CO_FN void conns_forget(void);

/* Serves the connections in `h`, from whose entries it takes what it needs. How many had to be closed. */
CO_FN unsigned conns_adopt(struct handover *h);

/* Connections of all reactors, in any state of transmission. */
unsigned conns_n(void);

#endif
