/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Which kernel devices are ours, and what is said of them: `attached`, `device`, `detached` of the control socket.
 *
 * Life of an entry in `devices`:
 *
 *	attach    -> entry with id and export, no device name yet
 *	attached  -> has its name ("/dev/nbd0")
 *	attach with a device's name -> new sockets for an entry, or the entry of a device that a daemon before
 *		this one has left
 *	gone when detached names the device, or when the daemon's ends of all its sockets are closed
 *	(noticed at the next status or attach: the peer name of the connections carries the id)
 */
#include "ctl/devices.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "nbdrs/ctl.h"
#include "nbdrs/handover.h"
#include "nbdrs/log.h"

void (*ctl_attached_hook)(void);

static struct list devices = LIST_INIT(devices);
static size_t known_n;
static uint64_t next_id = 1;

/* --- Bookkeeping -------------------------------------------------------------------------------- */

static void device_free(struct device *d)
{
	list_del(&d->node);
	known_n--;
	free(d);
}

struct device *device_new(const struct export *e, uid_t uid, const char *name)
{
	struct device *d = calloc(1, sizeof(*d));

	if (!d)
		return NULL;
	*d = (struct device){ .id = next_id++, .export = e, .uid = uid };
	if (name)
		(void)snprintf(d->name, sizeof(d->name), "%s", name); /* fits: checked */
	list_add(&devices, &d->node);
	known_n++;
	return d;
}

size_t devices_n(void)
{
	return known_n;
}

struct device *device_find(uint64_t id)
{
	list_for_each(d, &devices, struct device, node)
		if (d->id == id)
			return d;
	return NULL;
}

void device_peer(uint64_t id, char out[DEVICE_PEER_MAX])
{
	(void)snprintf(out, DEVICE_PEER_MAX, "kernel:%llu", (unsigned long long)id);
}

struct device *device_find_name(const char *name)
{
	list_for_each(d, &devices, struct device, node)
		if (strcmp(d->name, name) == 0)
			return d;
	return NULL;
}

struct tally device_count(const struct device *d, const struct ctl_conns *conns)
{
	struct tally t = { 0 };
	char peer[DEVICE_PEER_MAX];

	device_peer(d->id, peer);
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
		const struct tally t = device_count(d, conns);

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
		known_n++;
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
					    "connections_alive", (int)device_count(d, conns).alive, "uid",
					    (json_int_t)d->uid)))
			return NULL;
	}
	return TAKE_PTR(list);
}

/* --- Commands ------------------------------------------------------------------------------------ */

const char *device_name(json_t *req)
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
	const char *name = device_name(req);
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
	const char *name = device_name(req), *backend_id;
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
		n = device_count(d, &conns).alive;
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
	const char *name = device_name(req);

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
