/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Volumes of layer `sharded` are made, grown, shrunk and removed.
 *
 * Each of these may be cut off at any point and begun again. `size` is what makes a volume, so it is
 *	made	last: before it come the shards' size, and the removal of what a former volume may have left, which
 *		would show up as data;
 *	grown	last, for the same reason;
 *	shrunk	first: what lies behind the new end is out of reach from then on, and is removed after that;
 *	removed	last: as long as it is there `destroy` can go on.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/sharded/sharded_int.h"
#include "nbdrs/buf.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/progress.h"

int sharded_write_number(struct layer *l, struct chan *store, const char *name, uint64_t value,
			      enum put_cond cond, struct err *err)
{
	char text[24];
	int len = snprintf(text, sizeof(text), "%" PRIu64, value);
	struct obj obj;
	struct iovec v;
	struct iov iov = iov_one(&v, text, (size_t)len);
	struct put p = { .obj = &obj, .iov = &iov, .cond = cond, .fl = IO_FUA };
	int rc;

	if (!(store->layer->caps & CAN_PUT_IF))
		p.cond = PUT_ALWAYS;
	if (!(store->layer->caps & CAN_FUA))
		p.fl = 0;
	(void)obj_set(&obj, name);
	rc = ch_put(store, &p, NULL);
	if (!rc && !p.fl)
		rc = ch_flush(store);
	if (rc) {
		_cleanup_free_ char *where = sharded_store_text(l);

		return err_set(err, rc, "layer sharded: object '%s' in %s cannot be written: %s",
			       name, where,
			       rc == -EEXIST ? "somebody else made a volume there just now"
					     : err_name(rc));
	}
	return 0;
}

/* --- Removing --------------------------------------------------------------------------------- */

static CO_FN int delete_blocks(struct layer *l, struct chan *store, const uint64_t *numbers,
			       uint64_t n, struct err *err)
{
	_cleanup_free_ struct obj *objs = calloc(SHARD_DEL_MAX, sizeof(*objs));
	int rc = 0;

	if (!objs)
		return err_set(err, -ENOMEM, "out of memory");
	for (uint64_t done = 0; done < n && !rc;) {
		unsigned batch = (unsigned)MIN(n - done, (uint64_t)SHARD_DEL_MAX);

		for (unsigned i = 0; i < batch; i++)
			shard_obj(&objs[i], numbers[done + i]);
		rc = ch_del(store, objs, batch);
		done += batch;
		progress("deleting objects", done, n);
	}
	progress_end();
	if (!rc)
		rc = ch_flush(store);
	if (rc) {
		_cleanup_free_ char *where = sharded_store_text(l);

		return err_set(
			err, rc,
			"layer sharded: objects in %s cannot be deleted: %s; it can be tried again",
			where, err_name(rc));
	}
	return 0;
}

/* Deletes the blocks from number `from` on. */
int sharded_delete_from(struct layer *l, struct chan *store, uint64_t from, struct err *err)
{
	struct shard_list list = { .shards = from, .has_behind = true };
	int rc = sharded_list(l, store, &list, err);

	if (!rc && list.behind_n)
		rc = delete_blocks(l, store, list.behind, list.behind_n, err);
	free(list.behind);
	return rc;
}

static CO_FN int delete_number(struct layer *l, struct chan *store, const char *name,
			       struct err *err)
{
	struct obj obj;
	int rc;

	(void)obj_set(&obj, name);
	rc = ch_del(store, &obj, 1);
	if (!rc)
		rc = ch_flush(store);
	return rc ? err_set(err, rc, "layer sharded: object '%s' cannot be deleted: %s", name,
			    err_name(rc))
		  : 0;
}

/* --- The store itself ------------------------------------------------------------------------- */

/* Whether one of the layers below makes (or removes) something of its own: the folder of a file store. */
static bool store_can(const struct layer *l, bool create)
{
	for (; l; l = l->kids_n ? l->kids[0] : NULL)
		if (create ? l->ops->create != NULL : l->ops->destroy != NULL)
			return true;
	return false;
}

struct access {
	struct layer *l;
	struct chan *store;
};

/* Opens the store of an instance that is not open. */
static CO_FN int access_store(struct layer *l, struct access *a, struct err *err)
{
	int rc = layer_kids_open(l, err);

	if (rc)
		return rc;
	rc = layer_chan_open(l->kids[0], &a->store);
	if (rc) {
		layer_kids_close(l);
		return err_set(err, rc, "layer sharded: no channel to the store: %s", err_name(rc));
	}
	a->l = l;
	return 0;
}

static CO_FN void leave_store(struct access *a)
{
	layer_chan_close(a->store);
	layer_kids_close(a->l);
}

static CO_FN int check_writable(struct layer *l, struct err *err)
{
	_cleanup_free_ char *where = NULL;

	if (l->kids[0]->caps & CAN_WRITE)
		return 0;
	where = sharded_store_text(l);
	return err_set(err, -EROFS, "layer sharded: %s is read-only", where);
}

/* --- Making ----------------------------------------------------------------------------------- */

/* Behind `size` the last shard is zeroed, in case the disk grows again. */
int sharded_zero_tail(struct layer *l, struct chan *store, uint64_t size, uint64_t shard_size,
			   struct err *err)
{
	const uint64_t n = size / shard_size, keep = size % shard_size;
	struct obj_stat st;
	struct obj obj;
	struct iovec v;
	struct iov iov;
	uint8_t *buf;
	int rc;

	if (!keep)
		return 0;
	shard_obj(&obj, n);
	rc = ch_stat(store, &obj, &st);
	if (rc == -ENOENT || (!rc && st.size <= keep))
		return 0;
	buf = rc ? NULL : buf_get(keep);
	if (!rc && !buf)
		rc = -ENOMEM;
	if (!rc) {
		iov = iov_one(&v, buf, keep);
		rc = ch_read(store, (struct ext){ &obj, 0, keep }, &iov, 0);
	}
	if (!rc) {
		struct put p = { .obj = &obj, .iov = &iov, .cond = PUT_ALWAYS };

		rc = ch_put(store, &p, NULL); /* what is missing reads as zeroes */
	}
	buf_put(buf, keep);
	return rc ? err_set(err, rc, "layer sharded: object '%s' cannot be changed: %s", obj.name,
			    err_name(rc))
		  : 0;
}

static CO_FN int resize(struct layer *l, struct chan *store, const struct volume *v, uint64_t size,
			struct err *err)
{
	const uint64_t shards = shards_of(size, v->shard_size);
	int rc;

	if (size < v->size) {
		rc = sharded_write_number(l, store, SIZE_NAME, size, PUT_ALWAYS, err);
		if (!rc)
			rc = sharded_delete_from(l, store, shards, err);
		return rc ? rc : sharded_zero_tail(l, store, size, v->shard_size, err);
	}
	rc = sharded_delete_from(l, store, v->shards, err);
	if (!rc)
		rc = sharded_zero_tail(l, store, v->size, v->shard_size, err);
	return rc ? rc : sharded_write_number(l, store, SIZE_NAME, size, PUT_ALWAYS, err);
}

/* There is a volume already. */
static CO_FN int create_over(struct layer *l, struct chan *store, const struct volume *v,
			     uint64_t size, bool force, struct err *err)
{
	char is[32], wanted[32];
	int rc;

	if (v->size == size)
		return 0;
	if (!force) {
		_cleanup_free_ char *where = sharded_store_text(l);

		format_size(v->size, is, sizeof(is));
		format_size(size, wanted, sizeof(wanted));
		return err_set(err, -EEXIST,
			       "layer sharded: in %s there is a volume of %s (%" PRIu64
			       " bytes), not %s (%" PRIu64 " bytes); --force changes its size%s",
			       where, is, v->size, wanted, size,
			       size < v->size ? ", and what lies behind the new end is lost" : "");
	}
	rc = sharded_check_size(l, size, v->shard_size, err);
	return rc ? rc : resize(l, store, v, size, err);
}

static CO_FN int create_new(struct layer *l, struct chan *store, uint64_t size, bool force,
			    struct err *err)
{
	const struct sharded *s = l->self;
	const uint64_t shard_size = s->shard_opt ? s->shard_opt : (uint64_t)SHARD_SIZE_DEFAULT;
	struct shard_list list = { .shards = 0 };
	uint64_t there;
	int rc = sharded_check_size(l, size, shard_size, err);

	if (!rc)
		rc = sharded_list(l, store, &list, err);
	if (rc)
		return rc;
	if (list.behind_n && !force) {
		_cleanup_free_ char *where = sharded_store_text(l);

		return err_set(
			err, -EEXIST,
			"layer sharded: in %s there are %" PRIu64
			" objects block-N but no object 'size': a "
			"volume that was damaged or not wholly removed. --force deletes them",
			where, list.behind_n);
	}
	if (list.behind_n)
		rc = sharded_delete_from(l, store, 0, err);
	if (!rc && shard_size == SHARD_SIZE_DEFAULT)
		rc = delete_number(l, store, SHARD_SIZE_NAME, err);
	else if (!rc)
		rc = sharded_write_number(l, store, SHARD_SIZE_NAME, shard_size, PUT_ALWAYS, err);
	if (rc)
		return rc;
	rc = sharded_write_number(l, store, SIZE_NAME, size, PUT_IF_ABSENT, err);
	/* It may have been us: a put whose answer was lost is sent again. */
	if (rc == -EEXIST && sharded_read_number(l, store, SIZE_NAME, &there, NULL) == 0 &&
	    there == size)
		rc = 0;
	return rc;
}

static CO_FN int create_in(struct layer *l, struct chan *store, uint64_t size, bool force,
			   struct err *err)
{
	struct volume v;
	struct err none = { "" };
	int rc = check_writable(l, err);

	if (rc)
		return rc;
	rc = sharded_read_volume(l, store, &v, &none);
	if (rc == -ENOENT)
		return create_new(l, store, size, force, err);
	if (rc)
		return err_set(err, rc, "%s", none.msg);
	return create_over(l, store, &v, size, force, err);
}

int sharded_create(struct layer *l, const struct obj *obj, uint64_t size, bool force,
		   struct err *err)
{
	struct access a;
	int rc = sharded_check_option(l, err);

	if (!rc && store_can(l->kids[0], true))
		rc = layer_create(l->kids[0], obj, size, force, err);
	if (!rc)
		rc = access_store(l, &a, err);
	if (rc)
		return rc;
	rc = create_in(l, a.store, size, force, err);
	leave_store(&a);
	return rc;
}

/* The size is all it takes: a destroy that was cut off may have removed the rest. */
static CO_FN int destroy_in(struct layer *l, struct chan *store, struct err *err)
{
	uint64_t size, shard_size;
	int rc = check_writable(l, err);

	if (!rc)
		rc = sharded_read_size(l, store, &size, err);
	if (rc)
		return rc;
	rc = sharded_read_number(l, store, SHARD_SIZE_NAME, &shard_size, err);
	if (!rc)
		rc = sharded_check_agrees(l, shard_size, err);
	if (rc && rc != -ENOENT)
		return rc;
	rc = sharded_delete_from(l, store, 0, err);
	if (!rc)
		rc = delete_number(l, store, SHARD_SIZE_NAME, err);
	return rc ? rc : delete_number(l, store, SIZE_NAME, err);
}

int sharded_destroy(struct layer *l, const struct obj *obj, struct err *err)
{
	struct access a;
	int rc = sharded_check_option(l, err);

	if (!rc)
		rc = access_store(l, &a, err);
	if (rc)
		return rc;
	rc = destroy_in(l, a.store, err);
	leave_store(&a);
	if (!rc && store_can(l->kids[0], false))
		rc = layer_destroy(l->kids[0], obj, err);
	return rc;
}
