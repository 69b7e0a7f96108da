/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * `attach`, `attached`, `detached` of the control socket: makes the sockets that become a kernel device
 * and remembers which device it was.
 *
 * Life of an entry in `devices`:
 *
 *	attach    -> entry with id and export, no device name yet
 *	attached  -> has its name ("/dev/nbd0")
 *	attach with a device's name -> new sockets for an entry, or the entry of a device that a daemon before
 *		this one has left
 *	gone when detached names the device, or when the daemon's ends of all its sockets are closed
 *	(noticed at the next status or attach: the peer name of the connections carries the id)
 *
 * The daemon drops the kernel's ends as soon as they are sent: a copy kept here would hide that the
 * kernel discarded a socket (KERNEL-NBD.md 0.1).
 */
#include "ctl/ctl_int.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "nbdrs/backend.h"
#include "nbdrs/conn.h"
#include "nbdrs/ctl.h"
#include "nbdrs/handover.h"
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
	unsigned starting;              /* requests that make sockets for it */
	char name[DEVICE_NAME_MAX + 1]; /* "" until `attached` came */
};

void (*ctl_attached_hook)(void);

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

static struct device *device_find_name(const char *name)
{
	list_for_each(d, &devices, struct device, node)
		if (strcmp(d->name, name) == 0)
			return d;
	return NULL;
}

/* A device's connections: those that work, and those that are cut but have requests in the chain. */
struct tally {
	unsigned alive, ghosts;
};

static struct tally count_conns(const struct device *d, const struct ctl_conns *conns)
{
	struct tally t = { 0 };
	char peer[PEER_MAX];

	peer_name(d->id, peer);
	for (size_t i = 0; i < conns->n; i++) {
		const struct ctl_conn *c = &conns->v[i];

		if (!c->is_kernel || strcmp(c->peer, peer) != 0)
			continue;
		t.alive += !c->is_cut;
		t.ghosts += c->is_cut && c->in_flight > 0;
	}
	return t;
}

void ctl_devices_prune(const struct ctl_conns *conns)
{
	list_for_each(d, &devices, struct device, node) {
		const struct tally t = count_conns(d, conns);

		if (t.alive + t.ghosts == 0 && d->starting == 0)
			device_free(d);
	}
}

void ctl_devices_free(void)
{
	list_for_each(d, &devices, struct device, node)
		device_free(d);
}

int ctl_devices_save(struct handover *h)
{
	h->next_device = next_id;
	list_for_each(d, &devices, struct device, node) {
		struct handover_device *to = handover_add_device(h);

		if (!to)
			return -ENOMEM;
		to->id = d->id;
		to->connections = d->connections;
		to->uid = d->uid;
		(void)snprintf(to->name, sizeof(to->name), "%s", d->name); /* fits */
		to->backend_id = strdup(d->export->backend_id);
		if (!to->backend_id)
			return -ENOMEM;
	}
	return 0;
}

int ctl_devices_adopt(const struct handover *h)
{
	next_id = h->next_device;
	for (size_t i = 0; i < h->devices_n; i++) {
		const struct handover_device *from = &h->devices[i];
		const struct export *e = export_find_backend(from->backend_id);
		struct device *d = e ? calloc(1, sizeof(*d)) : NULL;

		if (e && !d)
			return -ENOMEM;
		if (!d)
			continue; /* its connections are closed, too */
		*d = (struct device){ .id = from->id,
				      .export = e,
				      .connections = from->connections,
				      .uid = from->uid };
		(void)snprintf(d->name, sizeof(d->name), "%s", from->name); /* fits */
		list_add(&devices, &d->node);
		devices_n++;
	}
	return 0;
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
					    "connections_alive", (int)count_conns(d, conns).alive, "uid",
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

	w->device = get_device(req);
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

static struct device *device_new(const struct wish *w, const struct ctl_peer *p)
{
	struct device *d = calloc(1, sizeof(*d));

	if (!d)
		return NULL;
	*d = (struct device){ .id = next_id++, .export = w->export, .uid = p->cred.uid };
	if (w->device)
		(void)snprintf(d->name, sizeof(d->name), "%s", w->device); /* fits: checked */
	list_add(&devices, &d->node);
	devices_n++;
	return d;
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

	if (w->device || devices_n >= DEVICES_MAX) {
		if (ctl_conns_collect(&conns))
			return err_set(err, -ENOMEM, "out of memory");
		ctl_devices_prune(&conns);
	}
	d = w->device ? device_find_name(w->device) : NULL;
	if (d && d->export != w->export) {
		d->name[0] = '\0'; /* its connections were another attachment's */
		d = NULL;
	}
	if (d && count_conns(d, &conns).ghosts)
		return err_set(err, -EBUSY, "%s: requests of a lost connection are still being worked on",
			       w->device);
	if (!d && devices_n >= DEVICES_MAX)
		return err_set(err, -EBUSY, "%d devices are attached already", DEVICES_MAX);
	if (!d)
		d = device_new(w, p);
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
	if (ctl_attached_hook)
		ctl_attached_hook();
	return ctl_answer(p, json_object(), NULL, 0);
}

int ctl_cmd_device(struct ctl_peer *p, json_t *req)
{
	_cleanup_conns_ struct ctl_conns conns = { 0 };
	const char *name = get_device(req), *backend_id;
	const struct export *e;
	unsigned alive = 0, connections = 0;
	bool bad;

	backend_id = ctl_get_text(req, "backend_id", &bad);
	if (!name || !backend_id)
		return ctl_refuse(p, -EINVAL, "device needs \"device\", a path, and \"backend_id\", a string");
	if (ctl_conns_collect(&conns))
		return ctl_refuse(p, -ENOMEM, "out of memory");
	e = export_find_backend(backend_id);
	if (!e)
		return ctl_refuse(p, -ENOENT, "nothing is served by the identifier '%.64s'", backend_id);
	/* One without a name is just being attached, or was by a tool that did not live to say so. */
	list_for_each(d, &devices, struct device, node) {
		unsigned n;

		if (d->export != e || (*d->name && strcmp(d->name, name) != 0))
			continue;
		n = count_conns(d, &conns).alive;
		alive += n;
		connections += *d->name ? d->connections : n;
	}
	return ctl_answer(p,
			  json_pack("{s:o, s:I, s:i, s:i}", "export", ctl_text(e->name), "size",
				    (json_int_t)e->size, "alive", (int)alive, "connections", (int)connections),
			  NULL, 0);
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
