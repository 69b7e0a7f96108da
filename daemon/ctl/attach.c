/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * `attach` of the control socket: makes the sockets that become a kernel device, or those that one has lost.
 *
 * The daemon drops the kernel's ends as soon as they are sent: a copy kept here would hide that the
 * kernel discarded a socket (KERNEL-NBD.md 0.1).
 */
#include "ctl/devices.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "nbdrs/backend.h"
#include "nbdrs/conn.h"
#include "nbdrs/ctl.h"
#include "nbdrs/layer.h"
#include "nbdrs/log.h"
#include "nbdrs/reactor.h"

enum { DEVICES_MAX = 4096 };

/*
 * A unix stream socket holds 278 requests or some 200 KiB with Debian's default (KERNEL-NBD.md 2.2);
 * the kernel doubles what is asked for.
 */
enum { SOCKET_BUFFER = 1 << 20 };

static unsigned next_reactor;

/* --- Sockets ------------------------------------------------------------------------------------ */

static void set_buffer(int fd)
{
	static struct log_gate gate;
	const int want = SOCKET_BUFFER;
	socklen_t len = sizeof(int);
	unsigned suppressed;
	int got = 0;

	/* Without CAP_NET_ADMIN net.core.wmem_max caps it. */
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &want, sizeof(want)))
		(void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &want, sizeof(want)); /* looked at below */
	if ((getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &got, &len) || got < SOCKET_BUFFER) &&
	    log_gate_open(&gate, &suppressed))
		log_warn("attach: socket buffer smaller than wanted, transfers will be slower "
			 "bytes=%d wanted=%d mend=\"run nbdrsd with CAP_NET_ADMIN or raise "
			 "net.core.wmem_max\" suppressed=%u",
			 got, SOCKET_BUFFER, suppressed);
}

/* A connected pair: sv[0] is ours, non-blocking for conn_start; sv[1] is as the kernel wants it. */
static int make_pair(int sv[2])
{
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv))
		return -errno;
	if (fcntl(sv[0], F_SETFL, O_NONBLOCK)) {
		const int rc = -errno;

		(void)close(sv[0]);
		(void)close(sv[1]);
		return rc;
	}
	set_buffer(sv[0]);
	set_buffer(sv[1]);
	return 0;
}

struct start {
	int fd; /* -1 once conn_start has it */
	struct session session;
	const char *peer;
};

static int start_on_reactor(void *arg)
{
	struct start *s = arg;

	return conn_start(TAKE_FD(s->fd), &s->session, s->peer);
}

/*
 * Makes `n` pairs, starts serving our ends (read-only if wanted), leaves the kernel's in theirs[]. On
 * failure everything is closed; connections that were started end by themselves, for their other end
 * is gone.
 */
static CO_FN int start_sockets(struct export *e, uint64_t id, unsigned n, bool read_only, int *theirs)
{
	char peer[DEVICE_PEER_MAX];
	unsigned made = 0;
	int rc = 0;

	device_peer(id, peer);
	while (made < n && !rc) {
		struct start s = {
			.session = { .export = e, .is_kernel = true, .is_read_only = read_only },
			.peer = peer,
		};
		int sv[2] = { -1, -1 };

		rc = make_pair(sv);
		if (rc)
			break;
		s.fd = sv[0];
		theirs[made++] = sv[1];
		rc = reactor_call(reactor_get(next_reactor++ % reactors_n()), start_on_reactor, &s);
		if (s.fd >= 0)
			(void)close(s.fd); /* no memory for the call's fiber: nobody took it */
	}
	for (unsigned i = 0; rc && i < made; i++)
		(void)close(theirs[i]);
	return rc;
}

/* --- attach ------------------------------------------------------------------------------------- */

static void add_backing(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum)
{
	const char *path = l->ops->backing ? l->ops->backing(l) : NULL;

	(void)depth;
	(void)sum;
	if (path && *path)
		(void)json_array_append_new(arg, ctl_text(path)); /* out of memory: the answer fails, too */
}

static json_t *attach_json(const struct export *e, uint64_t id, bool read_only)
{
	json_t *backing = json_array();
	uint16_t flags = e->tflags;

	/* A read-only device must not even be offered what writes. */
	if (read_only)
		flags = export_tflags(chain_top(e->chain)->caps, true);
	if (backing)
		chain_each(e->chain, add_backing, backing);
	return json_pack("{s:o, s:I, s:i, s:I, s:I, s:s, s:o, s:I}", "export", ctl_text(e->name), "size",
			 (json_int_t)e->size, "flags", (int)flags, "min_block", (json_int_t)e->min_block,
			 "pref_block", (json_int_t)e->pref_block, "backend_id", e->backend_id, "backing",
			 backing, "attach_id", (json_int_t)id);
}

/* An `attach`, checked. */
struct wish {
	struct export *export;
	unsigned n;
	bool is_read_only;
	const char *device; /* that is to get new connections; NULL = a new device */
};

/* For a device that has lost connections: what it was connected to, and nothing else. */
static int wish_of_device(json_t *req, const char *backend_id, struct wish *w, struct err *err)
{
	json_t *size = json_object_get(req, "size"), *block = json_object_get(req, "block_size");

	w->device = device_name(req);
	if (!w->device || !json_is_integer(size) || json_integer_value(size) < 0)
		return err_set(err, -EINVAL,
			       "attach by \"backend_id\" needs \"device\", a path, and \"size\", a number");
	if (block && (!json_is_integer(block) || json_integer_value(block) < BLOCK_SIZE_MIN))
		return err_set(err, -EINVAL, "\"block_size\" must be a number from %d on", BLOCK_SIZE_MIN);
	w->export = export_find_backend(backend_id);
	if (!w->export)
		return err_set(err, -ENOENT, "nothing is served by the identifier '%.64s'", backend_id);
	if (!backend_fits(backend_id, (uint64_t)json_integer_value(size), (uint64_t)json_integer_value(block),
			  w->export->size))
		return err_set(err, -ESTALE, "export '%.64s' has %llu bytes, and %s was attached with %lld",
			       w->export->name, (unsigned long long)w->export->size, w->device,
			       (long long)json_integer_value(size));
	return 0;
}

static int wish_of_export(json_t *req, struct wish *w, struct err *err)
{
	bool bad;
	const char *name = ctl_get_text(req, "export", &bad);

	if (!name)
		return err_set(err, -EINVAL, "attach needs \"export\", a string");
	w->export = export_find(name);
	if (!w->export)
		return err_set(err, -ENOENT,
			       "there is no export '%s'; `nbdrsctl status` lists what is served", name);
	return 0;
}

/* Checks the request's members; 0, or -errno with the text of the refusal. */
static int attach_parse(json_t *req, struct wish *w, struct err *err)
{
	json_t *conns = json_object_get(req, "connections"), *ro = json_object_get(req, "read_only");
	bool bad;
	const char *backend_id = ctl_get_text(req, "backend_id", &bad);
	int rc;

	if (bad)
		return err_set(err, -EINVAL, "\"backend_id\" must be a string");
	if (ro && !json_is_boolean(ro))
		return err_set(err, -EINVAL, "\"read_only\" must be true or false");
	if (conns && (!json_is_integer(conns) || json_integer_value(conns) < 1 ||
		      json_integer_value(conns) > CTL_MAX_FDS))
		return err_set(err, -EINVAL, "\"connections\" must be a number from 1 to %d", CTL_MAX_FDS);
	rc = backend_id ? wish_of_device(req, backend_id, w, err) : wish_of_export(req, w, err);
	if (rc)
		return rc;
	w->n = conns ? (unsigned)json_integer_value(conns) : 1;
	if (w->n > 1 && !(w->export->tflags & NBD_FLAG_CAN_MULTI_CONN))
		return err_set(err, -EOPNOTSUPP,
			       "export '%s' can't do several connections: a flush on one would not cover "
			       "the others; use one",
			       w->export->name);
	w->is_read_only = json_is_true(ro);
	return 0;
}

/*
 * The entry that `w` is for: a new one, or that of the device. 0, or -errno with the refusal's text. A request
 * of a lost connection may still be in the chain. The kernel sends it again; were that and a newer write to
 * the same place answered first, the old one would undo the newer. So it has to end before.
 */
static CO_FN int device_for(const struct wish *w, const struct ctl_peer *p, struct device **out,
			    struct err *err)
{
	_cleanup_conns_ struct ctl_conns conns = { 0 };
	struct device *d;

	if (w->device || devices_n() >= DEVICES_MAX) {
		if (ctl_conns_collect(&conns))
			return err_set(err, -ENOMEM, "out of memory");
		ctl_devices_prune(&conns);
	}
	d = w->device ? device_find_name(w->device) : NULL;
	if (d && d->export != w->export) {
		d->name[0] = '\0'; /* its connections were another attachment's */
		d = NULL;
	}
	if (d && device_count(d, &conns).ghosts)
		return err_set(err, -EBUSY, "%s: requests of a lost connection are still being worked on",
			       w->device);
	if (!d && devices_n() >= DEVICES_MAX)
		return err_set(err, -EBUSY, "%d devices are attached already", DEVICES_MAX);
	if (!d)
		d = device_new(w->export, p->cred.uid, w->device);
	if (!d)
		return err_set(err, -ENOMEM, "out of memory");
	/*
	 * One that has a number keeps it: when two mend the device at once, the kernel drops what it has no place for,
	 * and a number that grew would be missed for ever. The surplus is not refused: the number may be too small (see
	 * ctl_cmd_device, one without a name), and the kernel takes the right ones.
	 */
	if (d->connections == 0)
		d->connections = w->n;
	d->starting++;
	*out = d;
	return 0;
}

int ctl_cmd_attach(struct ctl_peer *p, json_t *req)
{
	int theirs[CTL_MAX_FDS];
	struct wish w = { 0 };
	struct device *d = NULL;
	struct err err;
	uint64_t id;
	int rc;

	rc = attach_parse(req, &w, &err);
	if (!rc)
		rc = device_for(&w, p, &d, &err);
	if (rc)
		return ctl_refuse(p, rc, "%s", err.msg);
	assert(d); /* no error, so there is one */
	id = d->id;
	rc = start_sockets(w.export, id, w.n, w.is_read_only, theirs);
	/* Without connections it is forgotten at the next look, be it because nobody took the answer. */
	d = device_find(id);
	if (d)
		d->starting--;
	if (rc)
		return ctl_refuse(p, rc, "cannot make %u sockets: %s%s", w.n, strerror(-rc),
				  rc == -EMFILE ? " (raise LimitNOFILE of the daemon)" : "");
	rc = ctl_answer(p, attach_json(w.export, id, w.is_read_only), theirs, w.n);
	for (unsigned i = 0; i < w.n; i++)
		(void)close(theirs[i]);
	if (rc)
		return rc;
	log_info("attach export=%s id=%llu connections=%u read_only=%d uid=%u pid=%d%s%s", w.export->name,
		 (unsigned long long)id, w.n, w.is_read_only, p->cred.uid, p->cred.pid,
		 w.device ? " again=" : "", w.device ? w.device : "");
	return 0;
}
