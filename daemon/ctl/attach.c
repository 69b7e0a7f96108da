/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * `attach`, `attached`, `detached` of the control socket: makes the sockets that become a kernel device
 * and remembers which device it was.
 *
 * Life of an entry in `devices`:
 *
 *	attach    -> entry with id and export, no device name yet
 *	attached  -> has its name ("/dev/nbd0")
 *	gone when detached names the device, or when the daemon's ends of all its sockets are closed
 *	(noticed at the next status or attach: the peer name of the connections carries the id)
 *
 * The daemon drops the kernel's ends as soon as they are sent: a copy kept here would hide that the
 * kernel discarded a socket (KERNEL-NBD.md 0.1).
 */
#include "ctl/ctl_int.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "nbdrs/conn.h"
#include "nbdrs/ctl.h"
#include "nbdrs/layer.h"
#include "nbdrs/log.h"
#include "nbdrs/reactor.h"

enum { DEVICES_MAX = 4096, DEVICE_NAME_MAX = 64, PEER_MAX = 32 };

/*
 * A unix stream socket holds 278 requests or some 200 KiB with Debian's default (KERNEL-NBD.md 2.2);
 * the kernel doubles what is asked for.
 */
enum { SOCKET_BUFFER = 1 << 20 };

struct device {
	struct list node;
	uint64_t id;
	const struct export *export;
	unsigned connections;
	uid_t uid;
	char name[DEVICE_NAME_MAX + 1]; /* "" until `attached` came */
};

static struct list devices = LIST_INIT(devices);
static size_t devices_n;
static uint64_t next_id = 1;
static unsigned next_reactor;

/* --- Bookkeeping -------------------------------------------------------------------------------- */

static void device_free(struct device *d)
{
	list_del(&d->node);
	devices_n--;
	free(d);
}

static struct device *device_find(uint64_t id)
{
	list_for_each(d, &devices, struct device, node)
		if (d->id == id)
			return d;
	return NULL;
}

static void peer_name(uint64_t id, char *out)
{
	(void)snprintf(out, PEER_MAX, "kernel:%llu", (unsigned long long)id);
}

/* Connections of `d` that are still served. */
static unsigned count_alive(const struct device *d, const struct ctl_conns *conns)
{
	char peer[PEER_MAX];
	unsigned n = 0;

	peer_name(d->id, peer);
	for (size_t i = 0; i < conns->n; i++)
		n += conns->v[i].is_kernel && strcmp(conns->v[i].peer, peer) == 0;
	return n;
}

void ctl_devices_prune(const struct ctl_conns *conns)
{
	list_for_each(d, &devices, struct device, node)
		if (count_alive(d, conns) == 0)
			device_free(d);
}

void ctl_devices_free(void)
{
	list_for_each(d, &devices, struct device, node)
		device_free(d);
}

json_t *ctl_devices(const struct export *e, const struct ctl_conns *conns)
{
	_cleanup_json_ json_t *list = json_array();

	list_for_each(d, &devices, struct device, node) {
		if (d->export != e)
			continue;
		if (json_array_append_new(
			    list, json_pack("{s:o, s:I, s:i, s:i, s:I}", "device",
					    d->name[0] ? json_string(d->name) : json_null(), "attach_id",
					    (json_int_t)d->id, "connections", (int)d->connections,
					    "connections_alive", (int)count_alive(d, conns), "uid",
					    (json_int_t)d->uid)))
			return NULL;
	}
	return TAKE_PTR(list);
}

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
	char peer[PEER_MAX];
	unsigned made = 0;
	int rc = 0;

	peer_name(id, peer);
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

static CO_FN int prune_now(void)
{
	_cleanup_conns_ struct ctl_conns conns = { 0 };
	int rc = ctl_conns_collect(&conns);

	if (!rc)
		ctl_devices_prune(&conns);
	return rc;
}

/* Checks the request's members; 0, or -errno with the text of the refusal. */
static int attach_parse(json_t *req, struct export **e, unsigned *n, bool *read_only, struct err *err)
{
	json_t *conns = json_object_get(req, "connections"), *ro = json_object_get(req, "read_only");
	const char *name;
	bool bad;

	name = ctl_get_text(req, "export", &bad);
	if (!name)
		return err_set(err, -EINVAL, "attach needs \"export\", a string");
	if (ro && !json_is_boolean(ro))
		return err_set(err, -EINVAL, "\"read_only\" must be true or false");
	if (conns && (!json_is_integer(conns) || json_integer_value(conns) < 1 ||
		      json_integer_value(conns) > CTL_MAX_FDS))
		return err_set(err, -EINVAL, "\"connections\" must be a number from 1 to %d", CTL_MAX_FDS);
	*e = export_find(name);
	if (!*e)
		return err_set(err, -ENOENT,
			       "there is no export '%s'; `nbdrsctl status` lists what is served", name);
	*n = conns ? (unsigned)json_integer_value(conns) : 1;
	if (*n > 1 && !((*e)->tflags & NBD_FLAG_CAN_MULTI_CONN))
		return err_set(err, -EOPNOTSUPP,
			       "export '%s' can't do several connections: a flush on one would not cover "
			       "the others; use one",
			       (*e)->name);
	*read_only = json_is_true(ro);
	return 0;
}

int ctl_cmd_attach(struct ctl_peer *p, json_t *req)
{
	int theirs[CTL_MAX_FDS];
	struct export *e = NULL;
	struct device *d;
	bool read_only = false;
	struct err err;
	unsigned n = 0;
	uint64_t id;
	int rc;

	rc = attach_parse(req, &e, &n, &read_only, &err);
	if (rc)
		return ctl_refuse(p, rc, "%s", err.msg);
	if (devices_n >= DEVICES_MAX && (prune_now() || devices_n >= DEVICES_MAX))
		return ctl_refuse(p, -EBUSY, "%d devices are attached already", DEVICES_MAX);
	d = calloc(1, sizeof(*d));
	if (!d)
		return ctl_refuse(p, -ENOMEM, "out of memory");
	id = next_id++;
	rc = start_sockets(e, id, n, read_only, theirs);
	if (rc) {
		free(d);
		return ctl_refuse(p, rc, "cannot make %u sockets: %s%s", n, strerror(-rc),
				  rc == -EMFILE ? " (raise LimitNOFILE of the daemon)" : "");
	}
	*d = (struct device){ .id = id, .export = e, .connections = n, .uid = p->cred.uid };
	list_add(&devices, &d->node);
	devices_n++;
	rc = ctl_answer(p, attach_json(e, id, read_only), theirs, n);
	for (unsigned i = 0; i < n; i++)
		(void)close(theirs[i]);
	if (rc) {
		/* Nobody has the other ends: the connections are about to end. */
		d = device_find(id);
		if (d)
			device_free(d);
		return rc;
	}
	log_info("attach export=%s id=%llu connections=%u read_only=%d uid=%u pid=%d", e->name,
		 (unsigned long long)id, n, read_only, p->cred.uid, p->cred.pid);
	return 0;
}

/* The member "device": a path or name of printable ASCII without spaces; NULL when it is not that. */
static const char *get_device(json_t *req)
{
	bool bad;
	const char *name = ctl_get_text(req, "device", &bad);

	if (!name || !*name || strlen(name) > DEVICE_NAME_MAX)
		return NULL;
	for (const char *c = name; *c; c++)
		if (*c <= ' ' || *c > '~')
			return NULL;
	return name;
}

int ctl_cmd_attached(struct ctl_peer *p, json_t *req)
{
	json_t *id = json_object_get(req, "attach_id");
	const char *name = get_device(req);
	struct device *d;

	if (!name)
		return ctl_refuse(p, -EINVAL, "attached needs \"device\", a path of at most %d bytes",
				  DEVICE_NAME_MAX);
	if (!json_is_integer(id))
		return ctl_refuse(p, -EINVAL, "attached needs \"attach_id\", a number");
	d = device_find((uint64_t)json_integer_value(id));
	if (!d)
		return ctl_refuse(p, -ENOENT, "there is no attach_id %" JSON_INTEGER_FORMAT,
				  json_integer_value(id));
	/* An older entry of that name is stale: a device has one set of sockets. */
	list_for_each(other, &devices, struct device, node)
		if (other != d && strcmp(other->name, name) == 0)
			device_free(other);
	(void)snprintf(d->name, sizeof(d->name), "%s", name); /* fits: checked */
	log_info("attached export=%s id=%llu device=%s", d->export->name, (unsigned long long)d->id, name);
	return ctl_answer(p, json_object(), NULL, 0);
}

int ctl_cmd_detached(struct ctl_peer *p, json_t *req)
{
	const char *name = get_device(req);

	if (!name)
		return ctl_refuse(p, -EINVAL, "detached needs \"device\", a path of at most %d bytes",
				  DEVICE_NAME_MAX);
	list_for_each(d, &devices, struct device, node) {
		if (strcmp(d->name, name))
			continue;
		log_info("detached export=%s id=%llu device=%s", d->export->name,
			 (unsigned long long)d->id, name);
		device_free(d);
	}
	return ctl_answer(p, json_object(), NULL, 0);
}
