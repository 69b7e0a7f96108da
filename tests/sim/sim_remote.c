/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * remote: a store on another machine, which does not crash with ours. Its objects are in the arena; a
 * disk is one object. Each request is two events, and takes effect at one of them at once.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "layer/layers.h"
#include "nbdrs/reactor.h"
#include "sim_int.h"

enum { MILLION = 1000000, REQUEST_NS = 1000000, STORE_NAME_MAX = 31 };

struct object {
	struct list node;
	uint64_t etag;
	struct image image;
	char name[OBJ_NAME_MAX + 1];
};

struct store {
	struct list node;
	char name[STORE_NAME_MAX + 1];
	struct list objects;
	uint64_t last_etag;
};

/* In the arena. */
struct remote {
	struct list stores;
	int error;
	uint32_t fail_ppm;
	uint64_t fail_until; /* ns */
};

struct self {
	char *name;    /* option */
	uint64_t size; /* option of the disk */
	struct store *store;
};

/* ---- what is stored ---- */

static struct remote *remote(void)
{
	if (world->remote == NULL) {
		world->remote = arena_alloc(sizeof(*world->remote));
		list_init(&world->remote->stores);
	}
	return world->remote;
}

static struct store *store_find(const char *name)
{
	list_for_each(s, &remote()->stores, struct store,
		      node) if (strcmp(s->name, name) == 0) return s;
	return NULL;
}

static struct store *store_get(const char *name)
{
	struct store *s = store_find(name);

	if (s != NULL)
		return s;
	s = arena_alloc(sizeof(*s));
	(void)snprintf(s->name, sizeof(s->name), "%s", name);
	list_init(&s->objects);
	list_add(&remote()->stores, &s->node);
	return s;
}

static struct object *object_find(const struct store *s, const char *name)
{
	list_for_each(o, &s->objects, struct object, node) if (strcmp(o->name, name) == 0) return o;
	return NULL;
}

static struct object *object_get(struct store *s, const char *name)
{
	struct object *o = object_find(s, name);

	if (o == NULL) {
		o = arena_alloc(sizeof(*o));
		(void)snprintf(o->name, sizeof(o->name), "%s", name);
		list_add(&s->objects, &o->node);
	}
	o->etag = ++s->last_etag;
	return o;
}

static void object_stat(const struct object *o, struct obj_stat *st)
{
	st->size = o->image.size;
	(void)snprintf(st->etag, sizeof(st->etag), "%" PRIu64, o->etag);
}

static void put_bytes(struct image *m, const struct iov *iov, uint64_t off)
{
	uint64_t at = off;

	if (off + iov->len > m->size)
		image_resize(m, off + iov->len);
	for (unsigned k = 0; k < iov->n; k++) {
		image_write(m, at, iov->v[k].iov_base, iov->v[k].iov_len);
		at += iov->v[k].iov_len;
	}
}

static void get_bytes(const struct image *m, const struct iov *iov, uint64_t off)
{
	uint64_t at = off;

	for (unsigned k = 0; k < iov->n; k++) {
		uint64_t len = iov->v[k].iov_len, there = at < m->size ? MIN(len, m->size - at) : 0;

		image_read(m, at, iov->v[k].iov_base, there);
		memset((char *)iov->v[k].iov_base + there, 0, len - there);
		at += len;
	}
}

/* ---- requests ---- */

enum kind { READ, WRITE, ZERO, STAT, PUT, DEL };

struct request {
	enum kind kind;
	const struct obj *obj;
	const struct iov *iov;
	uint64_t off, len;
	const struct put *put;
	struct obj_stat *st;
	unsigned n; /* of DEL */
};

/* The disk's only object has a name that no request gives. */
static const char *name_of(const struct request *q)
{
	return q->obj->len > 0 ? q->obj->name : "disk";
}

static int put(struct store *s, const struct request *q)
{
	struct object *o = object_find(s, name_of(q));
	struct obj_stat st;

	if (q->put->cond == PUT_IF_ABSENT && o != NULL)
		return -EEXIST;
	if (q->put->cond == PUT_IF_MATCH) {
		if (o == NULL)
			return -ESTALE;
		object_stat(o, &st);
		if (strcmp(st.etag, q->put->etag) != 0)
			return -ESTALE;
	}
	o = object_get(s, name_of(q));
	image_free(&o->image);
	put_bytes(&o->image, q->put->iov, 0);
	if (q->st != NULL)
		object_stat(o, q->st);
	return 0;
}

static int del(struct store *s, const struct request *q)
{
	for (unsigned k = 0; k < q->n; k++) {
		struct object *o = object_find(s, q->obj[k].name);

		if (o == NULL)
			continue;
		list_del(&o->node);
		image_free(&o->image);
		arena_free(o, sizeof(*o));
	}
	return 0;
}

static int act(struct self *self, const struct request *q)
{
	struct store *s = self->store;
	struct object *o = object_find(s, name_of(q));

	switch (q->kind) {
	case PUT: return put(s, q);
	case DEL: return del(s, q);
	case WRITE: put_bytes(&object_get(s, name_of(q))->image, q->iov, q->off); return 0;
	case ZERO: image_zero(&object_get(s, name_of(q))->image, q->off, q->len); return 0;
	case READ:
		if (o == NULL)
			return -ENOENT;
		get_bytes(&o->image, q->iov, q->off);
		return 0;
	case STAT:
		if (o == NULL)
			return -ENOENT;
		object_stat(o, q->st);
		return 0;
	}
	return -EINVAL;
}

/* How a request that begins now fails; 0 = not. At its end there may be other weather. */
static int draw_failure(void)
{
	const bool fails = now_ns() < remote()->fail_until && sim_chance(remote()->fail_ppm);

	return fails ? remote()->error : 0;
}

static CO_FN int request(struct chan *c, const struct request *q)
{
	static const char *const kinds[] = { "read", "write", "zero", "stat", "put", "del" };
	const bool is_early = sim_chance(MILLION / 2);
	const int error = draw_failure();
	const bool is_done = !error || sim_chance(MILLION / 2);
	int rc = 0;

	sim_event("remote %s %s %" PRIu64 "+%" PRIu64 "%s", kinds[q->kind], name_of(q), q->off,
		  q->len, error ? " fails" : "");
	if (is_done && is_early)
		rc = act(c->layer->self, q);
	sim_wait(REQUEST_NS);
	sim_event("remote %s %s ends", kinds[q->kind], name_of(q));
	if (is_done && !is_early)
		rc = act(c->layer->self, q);
	if (error)
		rc = error;
	sim_note((uint64_t)(int64_t)rc);
	return rc;
}

static CO_FN int remote_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	return request(
		c, &(struct request){
			   .kind = READ, .obj = e.obj, .iov = iov, .off = e.off, .len = e.len });
}

static CO_FN int remote_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	return request(
		c, &(struct request){
			   .kind = WRITE, .obj = e.obj, .iov = iov, .off = e.off, .len = e.len });
}

static CO_FN int remote_zero(struct chan *c, struct ext e, unsigned fl)
{
	return request(c,
		       &(struct request){ .kind = ZERO, .obj = e.obj, .off = e.off, .len = e.len });
}

static CO_FN int remote_trim(struct chan *c, struct ext e, unsigned fl)
{
	return remote_zero(c, e, fl);
}

static CO_FN int remote_flush(struct chan *c)
{
	return 0;
}

static CO_FN int remote_stat(struct chan *c, const struct obj *obj, struct obj_stat *st)
{
	return request(c, &(struct request){ .kind = STAT, .obj = obj, .st = st });
}

static CO_FN int remote_put(struct chan *c, const struct put *p, struct obj_stat *st)
{
	return request(
		c, &(struct request){
			   .kind = PUT, .obj = p->obj, .put = p, .st = st, .len = p->iov->len });
}

static CO_FN int remote_del(struct chan *c, const struct obj *objs, unsigned n)
{
	return n > 0 ? request(c, &(struct request){ .kind = DEL, .obj = objs, .n = n }) : 0;
}

static CO_FN int remote_list(struct chan *c, const char *prefix, list_fn *fn, void *arg)
{
	const struct self *self = c->layer->self;
	int rc = draw_failure();

	sim_event("remote list");
	sim_wait(REQUEST_NS);
	sim_event("remote list ends");
	if (rc != 0)
		return rc;
	list_for_each(o, &self->store->objects, struct object, node)
	{
		if (strncmp(o->name, prefix, strlen(prefix)) == 0)
			rc = fn(arg, o->name, o->image.size);
		if (rc != 0)
			break;
	}
	return rc;
}

/* ---- life ---- */

static CO_FN int remote_open(struct layer *l, struct err *err)
{
	struct self *self = l->self;

	self->store = store_get(self->name != NULL ? self->name : "");
	l->size = self->size;
	l->caps = CAN_WRITE | CAN_FUA | CAN_FLUSH | CAN_MULTI | IS_REMOTE;
	l->caps |= l->is_keyed ? CAN_PUT_IF : CAN_PARTIAL | CAN_TRIM | CAN_ZERO;
	if (!l->is_keyed) {
		struct object *o = object_get(self->store, "disk");

		image_resize(&o->image, self->size);
	}
	return 0;
}

static CO_FN int remote_create(struct layer *l, const struct obj *obj, uint64_t size, bool force,
			       struct err *err)
{
	return 0; /* it is there */
}

static const struct opt store_options[] = {
	{ .name = "name",
	  .type = OPT_STR,
	  .field = offsetof(struct self, name),
	  .help = "which store" },
	OPT_END,
};

static const struct opt disk_options[] = {
	{ .name = "name",
	  .type = OPT_STR,
	  .field = offsetof(struct self, name),
	  .help = "which store" },
	{ .name = "size",
	  .type = OPT_SIZE,
	  .field = offsetof(struct self, size),
	  .def = "1Mi",
	  .help = "of the disk" },
	OPT_END,
};

static const struct layer_ops store_layer = {
	.name = "remote",
	.help = "objects that survive the simulated machine",
	.opts = store_options,
	.is_store = true,
	.self_size = sizeof(struct self),
	.open = remote_open,
	.read = remote_read,
	.flush = remote_flush,
	.stat = remote_stat,
	.put = remote_put,
	.del = remote_del,
	.list = remote_list,
	.create = remote_create,
};

static const struct layer_ops disk_layer = {
	.name = "remote",
	.help = "a disk that survives the simulated machine",
	.opts = disk_options,
	.is_store = true,
	.keyed = &store_layer,
	.self_size = sizeof(struct self),
	.open = remote_open,
	.read = remote_read,
	.write = remote_write,
	.zero = remote_zero,
	.trim = remote_trim,
	.flush = remote_flush,
	.create = remote_create,
};

void remote_register(void)
{
	layer_add(&disk_layer);
}

/* ---- for tests ---- */

void sim_remote_fails(int error, uint32_t ppm, uint64_t until_ns)
{
	assert(error < 0); /* 0 would be a success of what was not done */
	remote()->error = error;
	remote()->fail_ppm = ppm;
	remote()->fail_until = until_ns;
}

int64_t sim_remote_read(const char *store, const char *object, void *buf, size_t len, uint64_t off)
{
	const struct store *s = store_find(store);
	const struct object *o = s != NULL ? object_find(s, object) : NULL;

	if (o == NULL)
		return -ENOENT;
	if (off >= o->image.size)
		return 0;
	len = MIN(len, o->image.size - off);
	image_read(&o->image, off, buf, len);
	return (int64_t)len;
}
