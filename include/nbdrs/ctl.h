/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The control socket: unix SOCK_SEQPACKET, one JSON object per packet, at most CTL_MAX_PACKET bytes.
 *
 * Request   {"nbdrs": 1, "cmd": NAME, ...}
 * Reply     {"nbdrs": 1, "ok": true, ...}   or   {"nbdrs": 1, "ok": false, "errno": "ENOENT", "error": TEXT}
 *           A reply of several packets has "more": true in all but the last.
 * A client whose "nbdrs" is not 1 gets "errno": "EPROTO" and a text that says which versions talk.
 *
 * Commands:
 *   version   -> version, pid, engine, threads, generation, upgrade_error (absent when there is none)
 *   status    -> first packet: as version, plus uptime_ns, exports_n, connections_n; then one packet
 *                per export: {"export": {name, size, read_only, chain (secrets masked),
 *                layers [{name, depth, ops{}, bytes{}, errors{}}], connections, devices [..],
 *                requests{read,write,...}, bytes{..}, errors{..},
 *                latency_ns {read {p50, p99, p999}, write .., flush ..}}}
 *   attach    {export, connections, read_only} -> export, size (bytes), flags (transmission flags),
 *                min_block, pref_block, backend_id, backing [PATH...] (local files or block devices
 *                behind it), attach_id (number); with `connections` sockets by SCM_RIGHTS in the same
 *                packet, in transmission phase. The daemon keeps no copy of them.
 *             For a device that lost connections: {backend_id, device, size, block_size (512), connections,
 *             read_only}. The sockets join those that the device has. ENOENT: nothing with that identifier is
 *             served; ESTALE: its size does not fit (backend_fits); EBUSY: requests of lost connections are still
 *             in flight, and must not be overtaken by what is sent again: ask again soon.
 *   attached  {attach_id, device} -> ok. Tells the daemon which device it became, for status.
 *   detached  {device} -> ok.
 *   resize    {export, size (bytes), shrink} -> size. The volume, and what new clients see; not the
 *                kernel's devices. Without "shrink": true a smaller size is refused.
 *   upgrade   {binary} -> generation. The daemon goes over to a new process image as soon as nothing is in flight;
 *             without "binary" to the file that it was started from. Refused when that cannot start. The control
 *             socket is made anew; `version` tells by a generation one higher that it has happened, or by
 *             upgrade_error that it was called off.
 *   device    {backend_id, device} -> export, size, alive: how many connections of that device work, connections:
 *             how many it had when it got the last one; 0 = not known, it is another daemon's. ENOENT: nothing
 *             with that identifier is served.
 *
 * The daemon checks SO_PEERCRED: root, the daemon's own user, or members of the configured group.
 */
#ifndef NBDRS_CTL_H
#define NBDRS_CTL_H

#include "nbdrs/co.h"
#include "nbdrs/err.h"

enum { CTL_VERSION = 1, CTL_MAX_PACKET = 128 * 1024, CTL_MAX_FDS = 64 };

#define CTL_DEFAULT_PATH "/run/nbdrs/control.sock"

/*
 * Listens at `path` (its folder is made, mode 0755; socket 0660 and given to `group` when not NULL)
 * and serves in fibers of reactor 0. A live socket of another daemon is -EADDRINUSE, a stale one is replaced.
 */
CO_FN int ctl_start(const char *path, const char *group, struct err *err);
struct handover;

/*
 * For the next nbdrsd: the attached devices, written down in `h` (-ENOMEM), and taken over from it, when the exports
 * are there and before ctl_start.
 */
int ctl_devices_save(struct handover *h);
int ctl_devices_adopt(const struct handover *h);

/*
 * Asked for by `upgrade`, in a fiber of reactor 0: whether the next nbdrsd can start (`binary`, NULL = the file that
 * this one was started from), and if so, to begin. Set before ctl_start.
 */
extern CO_FN int (*ctl_upgrade_hook)(const char *binary, struct err *err);
/* How many handovers there have been since the start, and why the last one was called off ("" = it was not). */
extern unsigned ctl_generation;
extern struct err ctl_upgrade_err;

/* Runs on reactor 0 when a tool said that a device was attached; NULL = nothing. Set before ctl_start. */
extern void (*ctl_attached_hook)(void);

/* Stops, closes, removes the socket file. */
CO_FN void ctl_stop(void);

#endif
