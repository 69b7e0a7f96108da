/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The format in which one nbdrsd leaves its connections to the next: see handover.h.
 */
#include "nbdrs/handover.h"

#include <errno.h>
#include <jansson.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"

#define MAGIC "nbdrs-ho"

enum { MAGIC_LEN = 8, HEAD_AT = MAGIC_LEN + 8, HEAD_MAX = 64 << 20, FD_MAX = 1 << 20 };

static inline void cleanup_jsonp(json_t **j)
{
	json_decref(*j);
}

#define _cleanup_json_ _cleanup_(cleanup_jsonp)

static inline void cleanup_handover(struct handover *h)
{
	handover_clear(h);
}

/* --- The struct --------------------------------------------------------------------------------- */

/* Room for one more of `size` bytes, zeroed. Power-of-two growth: at each power of two it is full. */
static void *add(void *list, size_t *n, size_t size)
{
	char **v = list;

	if ((*n & (*n - 1)) == 0) {
		char *grown = reallocarray(*v, *n ? *n * 2 : 1, size);

		if (!grown)
			return NULL;
		*v = grown;
	}
	memset(*v + *n * size, 0, size);
	return *v + (*n)++ * size;
}

struct handover_conn *handover_add_conn(struct handover *h)
{
	struct handover_conn *c = add(&h->conns, &h->conns_n, sizeof(*c));

	if (c) {
		c->fd = -1;
		c->size = HANDOVER_NO_SIZE;
	}
	return c;
}

struct handover_listener *handover_add_listener(struct handover *h)
{
	return add(&h->listeners, &h->listeners_n, sizeof(*h->listeners));
}

struct handover_device *handover_add_device(struct handover *h)
{
	return add(&h->devices, &h->devices_n, sizeof(*h->devices));
}

void handover_clear(struct handover *h)
{
	for (size_t i = 0; i < h->conns_n; i++) {
		free(h->conns[i].backend_id);
		free(h->conns[i].stores);
		free(h->conns[i].left);
	}
	for (size_t i = 0; i < h->listeners_n; i++)
		free(h->listeners[i].path);
	for (size_t i = 0; i < h->devices_n; i++)
		free(h->devices[i].backend_id);
	free(h->conns);
	free(h->listeners);
	free(h->devices);
	*h = (struct handover){ 0 };
}

bool handover_is_kept(const char *name)
{
	static const char prefix[] = HANDOVER_NAMES;
	const char *number = name + sizeof(prefix) - 1;

	if (strcmp(name, HANDOVER_FILE_NAME) == 0)
		return true;
	if (strncmp(name, prefix, sizeof(prefix) - 1) != 0 || *number == '\0')
		return false;
	return number[strspn(number, "0123456789")] == '\0';
}

/* --- To JSON ------------------------------------------------------------------------------------ */

static json_t *conn_json(const struct handover_conn *c)
{
	json_t *j = json_pack("{s:i, s:s, s:s*, s:s, s:b, s:b, s:b, s:b, s:I}", "fd", c->fd, "backend_id",
			      c->backend_id, "stores", c->stores, "peer", c->peer, "structured", c->is_structured,
			      "meta", c->has_meta, "kernel", c->is_kernel, "read_only", c->is_read_only, "left",
			      (json_int_t)c->left_len);
	json_t *r;

	if (c->size != HANDOVER_NO_SIZE && json_object_set_new(j, "size", json_integer((json_int_t)c->size))) {
		json_decref(j);
		return NULL;
	}
	if (!j || !c->has_refused)
		return j;
	/* JSON's integers are signed here; the cookie is any 64 bits. */
	r = json_pack("{s:i, s:i, s:I, s:I, s:I, s:I, s:I}", "flags", c->refused.flags, "type", c->refused.type,
		      "cookie", (json_int_t)c->refused.cookie, "off", (json_int_t)c->refused.off, "len",
		      (json_int_t)c->refused.len, "error", (json_int_t)c->refused_error, "discard",
		      (json_int_t)c->discard);
	if (json_object_set_new(j, "refused", r)) {
		json_decref(j);
		return NULL;
	}
	return j;
}

static json_t *listener_json(const struct handover_listener *l)
{
	return json_pack("{s:i, s:b, s:s?, s:I, s:I}", "fd", l->fd, "unix", l->is_unix, "path", l->path, "dev",
			 (json_int_t)l->dev, "ino", (json_int_t)l->ino);
}

static json_t *device_json(const struct handover_device *d)
{
	return json_pack("{s:I, s:s, s:i, s:I, s:s}", "id", (json_int_t)d->id, "backend_id", d->backend_id,
			 "connections", (int)d->connections, "uid", (json_int_t)d->uid, "name", d->name);
}

char *handover_encode(const struct handover *h)
{
	_cleanup_json_ json_t *conns = json_array(), *listeners = json_array(), *devices = json_array();
	_cleanup_json_ json_t *top = NULL;

	for (size_t i = 0; i < h->conns_n; i++)
		if (json_array_append_new(conns, conn_json(&h->conns[i])))
			return NULL;
	for (size_t i = 0; i < h->listeners_n; i++)
		if (json_array_append_new(listeners, listener_json(&h->listeners[i])))
			return NULL;
	for (size_t i = 0; i < h->devices_n; i++)
		if (json_array_append_new(devices, device_json(&h->devices[i])))
			return NULL;
	top = json_pack("{s:i, s:I, s:I, s:O, s:O, s:O}", "format", HANDOVER_FORMAT, "generation",
			(json_int_t)h->generation, "next_device", (json_int_t)h->next_device, "conns", conns,
			"listeners", listeners, "devices", devices);
	return top ? json_dumps(top, JSON_COMPACT) : NULL;
}

/* --- From JSON ---------------------------------------------------------------------------------- */

/* A member that is a number from `min` to `max`. */
static int get_number(json_t *j, const char *key, int64_t min, int64_t max, int64_t *out)
{
	json_t *v = json_object_get(j, key);

	if (!json_is_integer(v) || json_integer_value(v) < min || json_integer_value(v) > max)
		return -EPROTO;
	*out = json_integer_value(v);
	return 0;
}

/* A copy of a member that is a string; *out stays NULL for null where that is allowed. */
static int get_string(json_t *j, const char *key, bool may_be_null, char **out)
{
	json_t *v = json_object_get(j, key);

	if (may_be_null && json_is_null(v))
		return 0;
	if (!json_is_string(v))
		return -EPROTO;
	*out = strdup(json_string_value(v));
	return *out ? 0 : -ENOMEM;
}

static int get_short(json_t *j, const char *key, char *out, size_t out_len)
{
	const char *s = json_string_value(json_object_get(j, key));

	if (!s || strlen(s) >= out_len)
		return -EPROTO;
	memcpy(out, s, strlen(s) + 1);
	return 0;
}

static int get_refused(json_t *r, struct handover_conn *c)
{
	int64_t flags, type, cookie, off, len, error, discard;

	if (get_number(r, "flags", 0, UINT16_MAX, &flags) || get_number(r, "type", 0, UINT16_MAX, &type) ||
	    get_number(r, "cookie", INT64_MIN, INT64_MAX, &cookie) ||
	    get_number(r, "off", INT64_MIN, INT64_MAX, &off) || get_number(r, "len", 1, UINT32_MAX, &len) ||
	    get_number(r, "error", 1, UINT32_MAX, &error) || get_number(r, "discard", 1, len, &discard))
		return -EPROTO;
	c->has_refused = true;
	c->refused = (struct nbd_request){ .flags = (uint16_t)flags,
					   .type = (uint16_t)type,
					   .cookie = (uint64_t)cookie,
					   .off = (uint64_t)off,
					   .len = (uint32_t)len };
	c->refused_error = (uint32_t)error;
	c->discard = (uint64_t)discard;
	return 0;
}

static int get_conn(json_t *j, uint64_t *left_room, struct handover_conn *c)
{
	json_t *refused = json_object_get(j, "refused");
	int64_t fd, left, size;
	int rc;

	if (get_number(j, "fd", 0, FD_MAX, &fd) || get_number(j, "left", 0, INT64_MAX, &left) ||
	    (uint64_t)left > *left_room || get_short(j, "peer", c->peer, sizeof(c->peer)))
		return -EPROTO;
	/* An older nbdrsd tells neither. */
	if (json_object_get(j, "size")) {
		if (get_number(j, "size", 0, INT64_MAX, &size))
			return -EPROTO;
		c->size = (uint64_t)size;
	}
	rc = get_string(j, "backend_id", false, &c->backend_id);
	if (!rc && json_object_get(j, "stores"))
		rc = get_string(j, "stores", false, &c->stores);
	if (!rc && refused)
		rc = get_refused(refused, c);
	if (rc)
		return rc;
	*left_room -= (uint64_t)left;
	c->fd = (int)fd;
	c->left_len = (size_t)left;
	c->is_structured = json_is_true(json_object_get(j, "structured"));
	c->has_meta = json_is_true(json_object_get(j, "meta"));
	c->is_kernel = json_is_true(json_object_get(j, "kernel"));
	c->is_read_only = json_is_true(json_object_get(j, "read_only"));
	return 0;
}

static int get_listener(json_t *j, struct handover_listener *l)
{
	int64_t fd, dev, ino;

	if (get_number(j, "fd", 0, FD_MAX, &fd) || get_number(j, "dev", INT64_MIN, INT64_MAX, &dev) ||
	    get_number(j, "ino", INT64_MIN, INT64_MAX, &ino))
		return -EPROTO;
	l->fd = (int)fd;
	l->dev = (dev_t)dev;
	l->ino = (ino_t)ino;
	l->is_unix = json_is_true(json_object_get(j, "unix"));
	return get_string(j, "path", true, &l->path);
}

static int get_device(json_t *j, struct handover_device *d)
{
	int64_t id, connections, uid;

	if (get_number(j, "id", 1, INT64_MAX, &id) || get_number(j, "connections", 1, INT_MAX, &connections) ||
	    get_number(j, "uid", 0, UINT32_MAX, &uid) || get_short(j, "name", d->name, sizeof(d->name)))
		return -EPROTO;
	d->id = (uint64_t)id;
	d->connections = (unsigned)connections;
	d->uid = (uid_t)uid;
	return get_string(j, "backend_id", false, &d->backend_id);
}

static int get_all(json_t *top, uint64_t left_room, struct handover *h)
{
	json_t *j;
	size_t i;
	int rc = 0;

	json_array_foreach(json_object_get(top, "conns"), i, j) {
		struct handover_conn *c = handover_add_conn(h);

		rc = c ? get_conn(j, &left_room, c) : -ENOMEM;
		if (rc)
			return rc;
	}
	json_array_foreach(json_object_get(top, "listeners"), i, j) {
		struct handover_listener *l = handover_add_listener(h);

		rc = l ? get_listener(j, l) : -ENOMEM;
		if (rc)
			return rc;
	}
	json_array_foreach(json_object_get(top, "devices"), i, j) {
		struct handover_device *d = handover_add_device(h);

		rc = d ? get_device(j, d) : -ENOMEM;
		if (rc)
			return rc;
	}
	return 0;
}

int handover_decode(const char *head, size_t len, uint64_t left_room, struct handover *h, struct err *err)
{
	_cleanup_json_ json_t *top = json_loadb(head, len, JSON_REJECT_DUPLICATES, NULL);
	int64_t format, generation, next;
	int rc;

	if (!top || get_number(top, "format", 0, INT_MAX, &format))
		return err_set(err, -EPROTO, "the handover cannot be read");
	if (format != HANDOVER_FORMAT)
		return err_set(err, -EPROTO, "the handover has format %lld, this nbdrsd reads %d",
			       (long long)format, HANDOVER_FORMAT);
	if (get_number(top, "generation", 1, UINT_MAX, &generation) ||
	    get_number(top, "next_device", 1, INT64_MAX, &next))
		return err_set(err, -EPROTO, "the handover lacks something");
	rc = get_all(top, left_room, h);
	if (rc) {
		handover_clear(h);
		return err_set(err, rc, rc == -ENOMEM ? "out of memory" : "the handover lacks something");
	}
	h->generation = (unsigned)generation;
	h->next_device = (uint64_t)next;
	return 0;
}

/* --- The file ----------------------------------------------------------------------------------- */

static int write_all(int fd, const void *data, size_t len, struct err *err)
{
	const char *p = data;

	while (len > 0) {
		ssize_t n = write(fd, p, len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return err_set(err, n < 0 ? -errno : -EIO, "cannot write the handover: %s",
				       strerror(n < 0 ? errno : EIO));
		p += n;
		len -= (size_t)n;
	}
	return 0;
}

static int read_all(int fd, void *data, size_t len, struct err *err)
{
	char *p = data;

	while (len > 0) {
		ssize_t n = read(fd, p, len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return err_set(err, -EPROTO, "the handover ends early");
		p += n;
		len -= (size_t)n;
	}
	return 0;
}

int handover_save(const struct handover *h, int fd, struct err *err)
{
	_cleanup_free_ char *head = handover_encode(h);
	char start[HEAD_AT] = MAGIC;
	int rc;

	if (!head)
		return err_set(err, -ENOMEM, "cannot describe the connections: out of memory, or the path of a "
					     "socket is not UTF-8");
	put_be64(start + MAGIC_LEN, strlen(head));
	rc = write_all(fd, start, sizeof(start), err);
	if (!rc)
		rc = write_all(fd, head, strlen(head), err);
	for (size_t i = 0; i < h->conns_n && !rc; i++)
		rc = write_all(fd, h->conns[i].left, h->conns[i].left_len, err);
	if (!rc && lseek(fd, 0, SEEK_SET) != 0)
		rc = err_set(err, -errno, "cannot rewind the handover: %s", strerror(errno));
	return rc;
}

int handover_load(int fd, struct handover *out, struct err *err)
{
	_cleanup_(cleanup_handover) struct handover h = { 0 };
	_cleanup_free_ char *head = NULL;
	char start[HEAD_AT];
	uint64_t len, all;
	off_t end = lseek(fd, 0, SEEK_END);
	int rc;

	if (end < HEAD_AT || lseek(fd, 0, SEEK_SET) != 0)
		return err_set(err, -EPROTO, "the handover ends early");
	rc = read_all(fd, start, sizeof(start), err);
	if (rc)
		return rc;
	len = get_be64(start + MAGIC_LEN);
	all = (uint64_t)end - HEAD_AT;
	if (memcmp(start, MAGIC, MAGIC_LEN) != 0 || len > HEAD_MAX || len > all)
		return err_set(err, -EPROTO, "what should be a handover is none");
	head = malloc(len + 1);
	if (!head)
		return err_set(err, -ENOMEM, "out of memory");
	rc = read_all(fd, head, len, err);
	if (!rc)
		rc = handover_decode(head, len, all - len, &h, err);
	for (size_t i = 0; i < h.conns_n && !rc; i++) {
		struct handover_conn *c = &h.conns[i];

		c->left = c->left_len ? malloc(c->left_len) : NULL;
		if (c->left_len && !c->left)
			rc = err_set(err, -ENOMEM, "out of memory");
		else
			rc = read_all(fd, c->left, c->left_len, err);
	}
	if (rc)
		return rc;
	*out = h;
	h = (struct handover){ 0 };
	return 0;
}
