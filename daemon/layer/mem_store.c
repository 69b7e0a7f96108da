/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * mem where objects are wanted: objects by name in memory.
 *
 * An object's bytes are a blob, counted by its readers. A put brings a blob of its own and swaps it in, so who
 * reads meanwhile goes on with the old one: no read ever sees half of a put. Writes to parts of an object happen in
 * place, under the lock, and so does each piece that a reader copies.
 *
 * Objects live as long as the instance, not only while it is open: a volume made by chain_create() is there for the
 * chain_open() after it. Every change gives an object a new etag, a number that is never used twice.
 *
 * Promises. Volatile: everything is gone when the daemon ends. Until then an answered request is as stable as it
 * will ever be; flush and FUA are offered all the same and cost nothing. Trim and zero of parts read as zeroes and
 * keep the memory; del gives it back. Any number of connections and writers; conditional puts are atomic.
 *
 * partial=off imitates a store like S3, which knows whole objects only.
 *
 * Memory: what is stored, up to twice of it for objects that grew by writes to their end. There is no limit of its
 * own: who maps a disk on it bounds it by the disk's size.
 */
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/layers.h"

/* A table that can't grow stays as it is and gets slower; an entry that can't be added says so. */
#define HASH_NONFATAL_OOM 1
#include <uthash.h>

enum { TURN_LEN = 256 * 1024, ROOM_MIN = 4096 };

struct blob {
	unsigned refs; /* the object's and its readers'; under the lock */
	uint64_t size, room;
	uint8_t data[]; /* `room` bytes; zeroes behind `size` */
};

struct object {
	UT_hash_handle hh;
	struct blob *blob;
	uint64_t etag;
	char name[]; /* ends with NUL */
};

struct mem_store {
	bool partial; /* option */

	bool is_ready;        /* lock is initialised; the first open does it */
	pthread_mutex_t lock; /* guards all below, and the bytes of blobs that an object has */
	struct object *objects;
	uint64_t last_etag;
};

static const struct opt options[] = {
	{ .name = "partial",
	  .type = OPT_BOOL,
	  .field = offsetof(struct mem_store, partial),
	  .def = "on",
	  .help = "parts of objects can be written in place; off is like S3" },
	OPT_END,
};

/* --- Objects; all with the lock held ---------------------------------------------------------- */

static struct object *find(struct mem_store *m, const struct obj *obj)
{
	struct object *o;

	HASH_FIND_BYHASHVALUE(hh, m->objects, obj->name, obj->len, (unsigned)obj->hash, o);
	return o;
}

static void blob_put(struct blob *b)
{
	if (b && --b->refs == 0)
		free(b);
}

/* Without the lock, too: nobody else knows it yet. */
static struct blob *blob_new(uint64_t size, uint64_t room)
{
	struct blob *b = NULL;

	if (room <= SIZE_MAX - sizeof(*b))
		b = calloc(1, sizeof(*b) + room);
	if (b) {
		b->refs = 1;
		b->size = size;
		b->room = room;
	}
	return b;
}

/* An object with that blob, which it takes over; NULL when out of memory. */
static struct object *add(struct mem_store *m, const struct obj *obj, struct blob *b)
{
	struct object *o = calloc(1, sizeof(*o) + obj->len + 1U);

	if (!o)
		return NULL;
	memcpy(o->name, obj->name, obj->len + 1U);
	HASH_ADD_KEYPTR_BYHASHVALUE(hh, m->objects, o->name, obj->len, (unsigned)obj->hash, o);
	if (!o->hh.tbl) {
		free(o);
		return NULL;
	}
	o->blob = b;
	o->etag = ++m->last_etag;
	return o;
}

static void drop(struct mem_store *m, struct object *o)
{
	HASH_DEL(m->objects, o);
	blob_put(o->blob);
	free(o);
}

static void fill_stat(const struct object *o, struct obj_stat *st)
{
	st->size = o->blob->size;
	(void)snprintf(st->etag, sizeof(st->etag), "%" PRIu64, o->etag);
}

/* --- Whole objects ---------------------------------------------------------------------------- */

static CO_FN int mem_store_stat(struct chan *c, const struct obj *obj, struct obj_stat *st)
{
	struct mem_store *m = c->layer->self;
	const struct object *o;

	pthread_mutex_lock(&m->lock);
	o = find(m, obj);
	if (o)
		fill_stat(o, st);
	pthread_mutex_unlock(&m->lock);
	return o ? 0 : -ENOENT;
}

/* 0 when `p` may go on with what is there now, `o` (NULL = nothing). */
static int check_cond(const struct put *p, const struct object *o)
{
	struct obj_stat st;

	if (p->cond == PUT_IF_ABSENT)
		return o ? -EEXIST : 0;
	if (p->cond == PUT_ALWAYS)
		return 0;
	if (!o)
		return -ESTALE;
	fill_stat(o, &st);
	return strcmp(st.etag, p->etag) == 0 ? 0 : -ESTALE;
}

/* Takes `b` over when it succeeds. With the lock held. */
static int replace(struct mem_store *m, const struct put *p, struct blob *b, struct obj_stat *st)
{
	struct object *o = find(m, p->obj);
	int rc = check_cond(p, o);

	if (rc)
		return rc;
	if (o) {
		blob_put(o->blob);
		o->blob = b;
		o->etag = ++m->last_etag;
	} else {
		o = add(m, p->obj, b);
		if (!o)
			return -ENOMEM;
	}
	if (st)
		fill_stat(o, st);
	return 0;
}

static CO_FN int mem_store_put(struct chan *c, const struct put *p, struct obj_stat *st)
{
	struct mem_store *m = c->layer->self;
	struct blob *b = blob_new(p->iov->len, p->iov->len);
	int rc;

	if (!b)
		return -ENOMEM;
	for (uint64_t done = 0; done < b->size; done += TURN_LEN) {
		if (done)
			co_yield();
		(void)iov_copy_out(p->iov, done, b->data + done,
				   MIN(b->size - done, (uint64_t)TURN_LEN));
	}
	pthread_mutex_lock(&m->lock);
	rc = replace(m, p, b, st);
	if (rc)
		blob_put(b);
	pthread_mutex_unlock(&m->lock);
	return rc;
}

static CO_FN int mem_store_del(struct chan *c, const struct obj *objs, unsigned n)
{
	struct mem_store *m = c->layer->self;

	for (unsigned i = 0; i < n; i++) {
		struct object *o;

		pthread_mutex_lock(&m->lock);
		o = find(m, &objs[i]);
		if (o)
			drop(m, o);
		pthread_mutex_unlock(&m->lock);
	}
	return 0;
}

static CO_FN int mem_store_list(struct chan *c, const char *prefix, list_fn *fn, void *arg)
{
	struct mem_store *m = c->layer->self;
	const size_t len = strlen(prefix);
	int rc = 0;

	pthread_mutex_lock(&m->lock);
	for (const struct object *o = m->objects; o && !rc; o = o->hh.next)
		if (strncmp(o->name, prefix, len) == 0)
			rc = fn(arg, o->name, o->blob->size);
	pthread_mutex_unlock(&m->lock);
	return rc;
}

/* --- Parts ------------------------------------------------------------------------------------ */

/* Copies one piece of the request, zeroes for what lies behind the object's end. */
static void copy_piece(const struct blob *b, struct ext e, const struct iov *iov, uint64_t done,
		       uint64_t len)
{
	uint64_t at = e.off + done;
	uint64_t there = at < b->size ? MIN(b->size - at, len) : 0;

	if (there)
		(void)iov_copy_in(iov, done, b->data + at, there);
	if (there < len)
		iov_zero(iov, done + there, len - there);
}

static CO_FN int mem_store_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	struct mem_store *m = c->layer->self;
	const struct object *o;
	struct blob *b;

	pthread_mutex_lock(&m->lock);
	o = find(m, e.obj);
	b = o ? o->blob : NULL;
	if (b)
		b->refs++;
	for (uint64_t done = 0; b && done < e.len; done += TURN_LEN) {
		copy_piece(b, e, iov, done, MIN(e.len - done, (uint64_t)TURN_LEN));
		pthread_mutex_unlock(&m->lock);
		if (done + TURN_LEN < e.len)
			co_yield();
		pthread_mutex_lock(&m->lock);
	}
	blob_put(b);
	pthread_mutex_unlock(&m->lock);
	return b ? 0 : -ENOENT;
}

/* Makes the object reach `end`; readers keep the blob that they have. With the lock held. */
static int grow(struct object *o, uint64_t end)
{
	uint64_t room = o->blob->room;
	struct blob *b;

	if (end > room) {
		room = end > 2 * room ? end : 2 * room;
		b = blob_new(end, MAX(room, (uint64_t)ROOM_MIN));
		if (!b)
			return -ENOMEM;
		memcpy(b->data, o->blob->data, o->blob->size);
		blob_put(o->blob);
		o->blob = b;
	}
	o->blob->size = MAX(o->blob->size, end);
	return 0;
}

/* The object, made when it is missing; NULL when out of memory. With the lock held. */
static struct object *get_or_add(struct mem_store *m, const struct obj *obj)
{
	struct object *o = find(m, obj);
	struct blob *b;

	if (o)
		return o;
	b = blob_new(0, 0);
	if (!b)
		return NULL;
	o = add(m, obj, b);
	if (!o)
		blob_put(b);
	return o;
}

static CO_FN int mem_store_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	struct mem_store *m = c->layer->self;
	struct object *o;
	uint64_t end;
	int rc;

	if (!m->partial)
		return -ENOTSUP;
	if (__builtin_add_overflow(e.off, e.len, &end))
		return -EFBIG;
	/* At a stretch, as nobody may see the object grown but not yet written. */
	pthread_mutex_lock(&m->lock);
	o = get_or_add(m, e.obj);
	rc = o ? grow(o, end) : -ENOMEM;
	if (!rc) {
		(void)iov_copy_out(iov, 0, o->blob->data + e.off, e.len);
		o->etag = ++m->last_etag;
	}
	pthread_mutex_unlock(&m->lock);
	return rc;
}

static CO_FN int mem_store_zero(struct chan *c, struct ext e, unsigned fl)
{
	struct mem_store *m = c->layer->self;
	struct object *o;

	pthread_mutex_lock(&m->lock);
	o = find(m, e.obj);
	if (o && e.off < o->blob->size) {
		memset(o->blob->data + e.off, 0, MIN(e.len, o->blob->size - e.off));
		o->etag = ++m->last_etag;
	}
	pthread_mutex_unlock(&m->lock);
	return 0;
}

static CO_FN int mem_store_trim(struct chan *c, struct ext e, unsigned fl)
{
	return mem_store_zero(c, e, fl);
}

static CO_FN int mem_store_flush(struct chan *c)
{
	return 0;
}

/* Data up to the object's end, a hole behind it. */
static CO_FN int mem_store_map(struct chan *c, struct ext e, struct extmap *map)
{
	struct mem_store *m = c->layer->self;
	const struct object *o;
	uint64_t size, data;

	pthread_mutex_lock(&m->lock);
	o = find(m, e.obj);
	size = o ? o->blob->size : 0;
	pthread_mutex_unlock(&m->lock);
	if (!o)
		return -ENOENT;
	data = e.off < size ? MIN(size - e.off, e.len) : 0;
	if ((!data || extmap_add(map, data, 0)) && data < e.len)
		(void)extmap_add(map, e.len - data, EXTENT_HOLE | EXTENT_ZERO);
	return 0;
}

/* --- Life ------------------------------------------------------------------------------------- */

static CO_FN int mem_store_open(struct layer *l, struct err *err)
{
	struct mem_store *m = l->self;

	if (!m->is_ready)
		pthread_mutex_init(&m->lock, NULL);
	m->is_ready = true;
	l->size = 0;
	l->caps = CAN_FUA | CAN_FLUSH | CAN_MULTI | CAN_MAP | CAN_PUT_IF;
	if (m->partial)
		l->caps |= CAN_PARTIAL | CAN_TRIM | CAN_ZERO | CAN_FAST_ZERO;
	if (!l->want_ro)
		l->caps |= CAN_WRITE;
	return 0;
}

/* There is no place to be made: it is there as long as the instance. */
static CO_FN int mem_store_create(struct layer *l, const struct obj *obj, uint64_t size, bool force,
				  struct err *err)
{
	return 0;
}

static CO_FN int mem_store_destroy(struct layer *l, const struct obj *obj, struct err *err)
{
	return 0;
}

static void mem_store_free(struct layer *l)
{
	struct mem_store *m = l->self;

	if (!m->is_ready)
		return;
	while (m->objects)
		drop(m, m->objects);
	pthread_mutex_destroy(&m->lock);
}

const struct layer_ops mem_store_layer = {
	.name = "mem",
	.help = "objects in memory, gone when the daemon ends",
	.opts = options,
	.is_store = true,
	.self_size = sizeof(struct mem_store),
	.open = mem_store_open,
	.free = mem_store_free,
	.read = mem_store_read,
	.write = mem_store_write,
	.zero = mem_store_zero,
	.trim = mem_store_trim,
	.flush = mem_store_flush,
	.map = mem_store_map,
	.stat = mem_store_stat,
	.put = mem_store_put,
	.del = mem_store_del,
	.list = mem_store_list,
	.create = mem_store_create,
	.destroy = mem_store_destroy,
};
