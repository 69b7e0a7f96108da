/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Volumes of layer `sharded` as a whole: what is recorded in the store, making, growing, shrinking, removing.
 *
 * Each of these may be cut off at any point and begun again. `size` is what makes a volume, so it is
 *	made	last: before it come the shards' size, and the removal of what a former volume may have left, which
 *		would show up as data;
 *	grown	last, for the same reason;
 *	shrunk	first: what lies behind the new end is out of reach from then on, and is removed after that;
 *	removed	last: as long as it is there `destroy` can go on.
 */
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/sharded_int.h"
#include "nbdrs/buf.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/log.h"
#include "nbdrs/progress.h"

static const char size_name[] = "size", shard_size_name[] = "shard-size", block_prefix[] = "block-";

/* Longest number in an object, with white space around it. */
enum { TEXT_MAX = 64, TEXT_SHOWN = 32 };
/* Deleted by one request. */
enum { DELETE_MAX = 1000 };

int sharded_check_option(const struct layer *l, struct err *err)
{
	const struct sharded *s = l->self;

	if (s->shard_opt & (s->shard_opt - 1))
		return err_set(err, -EINVAL,
			       "layer sharded: option \"size\": %" PRIu64
			       " bytes is not a power of two, as in "
			       "sharded[size=1Mi]",
			       s->shard_opt);
	return 0;
}

/* "s3:http://..." for messages, secrets masked; malloced, "the store" when memory is out. */
static char *store_text(const struct layer *l)
{
	char *text = spec_format(l->kids[0]->spec);

	return text ? text : strdup("the store");
}

/* --- Numbers in objects ----------------------------------------------------------------------- */

/* What an object holds, fit for a message. */
static void show(const char *text, size_t len, char *out)
{
	size_t n = MIN(len, (size_t)TEXT_SHOWN);

	for (size_t i = 0; i < n; i++)
		out[i] = isprint((unsigned char)text[i]) ? text[i] : '?';
	(void)snprintf(out + n, 4, "%s", len > n ? "..." : "");
}

static bool is_space(char c)
{
	return c == ' ' || (c >= '\t' && c <= '\r');
}

/* Decimal digits with white space around; -EINVAL, -ERANGE. */
static int parse_number(const char *text, size_t len, uint64_t *value)
{
	char digits[TEXT_MAX + 1];

	while (len && is_space(text[len - 1]))
		len--;
	while (len && is_space(*text)) {
		text++;
		len--;
	}
	if (!len || len > TEXT_MAX || memchr(text, '\0', len))
		return -EINVAL;
	memcpy(digits, text, len);
	digits[len] = '\0';
	return parse_u64(digits, value);
}

/* The number in object `name`. -ENOENT without a message when there is no such object. */
static CO_FN int read_number(struct layer *l, struct chan *store, const char *name, uint64_t *value,
			     struct err *err)
{
	char text[TEXT_MAX + 1] = { 0 }, shown[TEXT_SHOWN + 4];
	_cleanup_free_ char *where = store_text(l);
	struct obj_stat st;
	struct obj obj;
	struct iovec v;
	struct iov iov;
	int rc;

	(void)obj_set(&obj, name); /* can't fail for ours */
	rc = ch_stat(store, &obj, &st);
	iov = iov_one(&v, text, rc ? 0 : MIN(st.size, (uint64_t)TEXT_MAX));
	if (!rc && iov.len)
		rc = ch_read(store, (struct ext){ &obj, 0, iov.len }, &iov, 0);
	if (rc == -ENOENT)
		return rc;
	if (rc)
		return err_set(err, rc, "layer sharded: object '%s' in %s cannot be read: %s", name,
			       where, err_name(rc));
	if (st.size <= TEXT_MAX && parse_number(text, st.size, value) == 0)
		return 0;
	show(text, iov.len, shown);
	return err_set(
		err, -EINVAL,
		"layer sharded: object '%s' in %s should hold a number of bytes, and holds '%s' (%" PRIu64
		" bytes long); this is no volume of sharded, or it was damaged",
		name, where, shown, st.size);
}

static CO_FN int write_number(struct layer *l, struct chan *store, const char *name, uint64_t value,
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
		_cleanup_free_ char *where = store_text(l);

		return err_set(err, rc, "layer sharded: object '%s' in %s cannot be written: %s",
			       name, where,
			       rc == -EEXIST ? "somebody else made a volume there just now"
					     : err_name(rc));
	}
	return 0;
}

/* --- What is recorded ------------------------------------------------------------------------- */

static int check_size(const struct layer *l, uint64_t size, uint64_t shard_size, struct err *err)
{
	const uint64_t shards = size / shard_size + (size % shard_size != 0);
	char text[32];

	if (size == 0 || size > INT64_MAX)
		return err_set(err, -EINVAL,
			       "layer sharded: a volume of %" PRIu64 " bytes is not possible",
			       size);
	if (shards <= SHARDS_MAX)
		return 0;
	format_size(shard_size, text, sizeof(text));
	return err_set(err, -EINVAL,
		       "layer sharded: %" PRIu64 " bytes in shards of %s are %" PRIu64
		       " objects, more than %" PRIu64
		       "; it needs larger shards, as in sharded[size=16Mi]",
		       size, text, shards, SHARDS_MAX);
}

/* The recorded size of shards, 4 MiB when none is. */
static CO_FN int read_shard_size(struct layer *l, struct chan *store, uint64_t *shard_size,
				 struct err *err)
{
	int rc = read_number(l, store, shard_size_name, shard_size, err);

	if (rc == -ENOENT) {
		*shard_size = SHARD_SIZE_DEFAULT;
		return 0;
	}
	if (rc)
		return rc;
	if (*shard_size < SHARD_SIZE_MIN || *shard_size > SHARD_SIZE_MAX ||
	    *shard_size & (*shard_size - 1))
		return err_set(err, -EINVAL,
			       "layer sharded: object '%s' says %" PRIu64
			       ", which is no power of two from %d to %d: the volume was damaged",
			       shard_size_name, *shard_size, SHARD_SIZE_MIN, SHARD_SIZE_MAX);
	return 0;
}

static int check_agrees(const struct layer *l, uint64_t shard_size, struct err *err)
{
	const struct sharded *s = l->self;
	char given[32], recorded[32];

	if (!s->shard_opt || s->shard_opt == shard_size)
		return 0;
	format_size(s->shard_opt, given, sizeof(given));
	format_size(shard_size, recorded, sizeof(recorded));
	return err_set(
		err, -EINVAL,
		"layer sharded: option \"size\" says %s, but this volume was made with shards of %s; leave the "
		"option out, or destroy the volume and make it anew",
		given, recorded);
}

/* The disk's size; -ENOENT, with a message, when there is no volume. */
static CO_FN int read_size(struct layer *l, struct chan *store, uint64_t *size, struct err *err)
{
	_cleanup_free_ char *where = NULL;
	int rc = read_number(l, store, size_name, size, err);

	if (rc != -ENOENT)
		return rc;
	where = store_text(l);
	return err_set(
		err, rc,
		"layer sharded: there is no volume in %s (no object 'size'); make one with nbdrsd init --size",
		where);
}

int sharded_read_volume(struct layer *l, struct chan *store, struct volume *v, struct err *err)
{
	struct volume found;
	int rc = read_size(l, store, &found.size, err);

	if (!rc)
		rc = read_shard_size(l, store, &found.shard_size, err);
	if (!rc)
		rc = check_agrees(l, found.shard_size, err);
	if (rc)
		return rc;
	rc = check_size(l, found.size, found.shard_size, err);
	if (rc) {
		_cleanup_free_ char *where = store_text(l);

		return err_prefix(err, rc, "object 'size' in %s", where);
	}
	found.shards = found.size / found.shard_size + (found.size % found.shard_size != 0);
	*v = found;
	return 0;
}

/* "block-12" -> 12; only as we write it: no leading zero, sign or other text. */
static bool parse_block(const char *name, uint64_t *n)
{
	const char *digits = name + sizeof(block_prefix) - 1;

	if (strncmp(name, block_prefix, sizeof(block_prefix) - 1) != 0 || !*digits)
		return false;
	if (*digits == '0' && digits[1])
		return false;
	for (const char *p = digits; *p; p++)
		if (*p < '0' || *p > '9')
			return false;
	return parse_u64(digits, n) == 0;
}

static int note_behind(struct shard_list *list, uint64_t n)
{
	if (list->behind_n == list->behind_room) {
		uint64_t room = MAX(2 * list->behind_room, UINT64_C(256));
		uint64_t *v = realloc(list->behind, room * sizeof(*v));

		if (!v)
			return -ENOMEM;
		list->behind = v;
		list->behind_room = room;
	}
	list->behind[list->behind_n] = n;
	return 0;
}

static int found_object(void *arg, const char *name, uint64_t size)
{
	struct shard_list *list = arg;
	uint64_t n;

	if (!parse_block(name, &n)) {
		list->foreign_n++;
	} else if (n >= list->shards) {
		int rc = list->has_behind ? note_behind(list, n) : 0;

		if (rc)
			return rc;
		list->behind_n++;
	} else {
		if (list->known)
			shardmap_set(list->known, n);
		list->blocks_n++;
		list->bytes += size;
	}
	return 0;
}

int sharded_list(struct layer *l, struct chan *store, struct shard_list *list, struct err *err)
{
	int rc = ch_list(store, block_prefix, found_object, list);

	if (rc) {
		_cleanup_free_ char *where = store_text(l);

		return err_set(err, rc, "layer sharded: the objects in %s cannot be listed: %s",
			       where, err_name(rc));
	}
	return 0;
}

/* --- Removing --------------------------------------------------------------------------------- */

static CO_FN int delete_blocks(struct layer *l, struct chan *store, const uint64_t *numbers,
			       uint64_t n, struct err *err)
{
	_cleanup_free_ struct obj *objs = calloc(DELETE_MAX, sizeof(*objs));
	int rc = 0;

	if (!objs)
		return err_set(err, -ENOMEM, "out of memory");
	for (uint64_t done = 0; done < n && !rc;) {
		unsigned batch = (unsigned)MIN(n - done, (uint64_t)DELETE_MAX);

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
		_cleanup_free_ char *where = store_text(l);

		return err_set(
			err, rc,
			"layer sharded: objects in %s cannot be deleted: %s; it can be tried again",
			where, err_name(rc));
	}
	return 0;
}

/* Deletes the blocks from number `from` on. */
static CO_FN int delete_from(struct layer *l, struct chan *store, uint64_t from, struct err *err)
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
	where = store_text(l);
	return err_set(err, -EROFS, "layer sharded: %s is read-only", where);
}

/* --- Making ----------------------------------------------------------------------------------- */

/* Behind `size` the last shard is zeroed, in case the disk grows again. */
static CO_FN int zero_tail(struct layer *l, struct chan *store, uint64_t size, uint64_t shard_size,
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
	buf = rc ? NULL : buf_get(shard_size);
	if (!rc && !buf)
		rc = -ENOMEM;
	if (!rc) {
		iov = iov_one(&v, buf, keep);
		rc = ch_read(store, (struct ext){ &obj, 0, keep }, &iov, 0);
	}
	if (!rc) {
		struct put p = { .obj = &obj, .iov = &iov, .cond = PUT_ALWAYS };

		memset(buf + keep, 0, shard_size - keep);
		iov = iov_one(&v, buf, shard_size);
		rc = ch_put(store, &p, NULL);
	}
	buf_put(buf, shard_size);
	return rc ? err_set(err, rc, "layer sharded: object '%s' cannot be changed: %s", obj.name,
			    err_name(rc))
		  : 0;
}

static CO_FN int resize(struct layer *l, struct chan *store, const struct volume *v, uint64_t size,
			struct err *err)
{
	const uint64_t shards = size / v->shard_size + (size % v->shard_size != 0);
	int rc;

	if (size < v->size) {
		rc = write_number(l, store, size_name, size, PUT_ALWAYS, err);
		if (!rc)
			rc = delete_from(l, store, shards, err);
		return rc ? rc : zero_tail(l, store, size, v->shard_size, err);
	}
	rc = delete_from(l, store, v->shards, err);
	if (!rc)
		rc = zero_tail(l, store, v->size, v->shard_size, err);
	return rc ? rc : write_number(l, store, size_name, size, PUT_ALWAYS, err);
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
		_cleanup_free_ char *where = store_text(l);

		format_size(v->size, is, sizeof(is));
		format_size(size, wanted, sizeof(wanted));
		return err_set(err, -EEXIST,
			       "layer sharded: in %s there is a volume of %s (%" PRIu64
			       " bytes), not %s (%" PRIu64 " bytes); --force changes its size%s",
			       where, is, v->size, wanted, size,
			       size < v->size ? ", and what lies behind the new end is lost" : "");
	}
	rc = check_size(l, size, v->shard_size, err);
	return rc ? rc : resize(l, store, v, size, err);
}

static CO_FN int create_new(struct layer *l, struct chan *store, uint64_t size, bool force,
			    struct err *err)
{
	const struct sharded *s = l->self;
	const uint64_t shard_size = s->shard_opt ? s->shard_opt : (uint64_t)SHARD_SIZE_DEFAULT;
	struct shard_list list = { .shards = 0 };
	uint64_t there;
	int rc = check_size(l, size, shard_size, err);

	if (!rc)
		rc = sharded_list(l, store, &list, err);
	if (rc)
		return rc;
	if (list.behind_n && !force) {
		_cleanup_free_ char *where = store_text(l);

		return err_set(
			err, -EEXIST,
			"layer sharded: in %s there are %" PRIu64
			" objects block-N but no object 'size': a "
			"volume that was damaged or not wholly removed. --force deletes them",
			where, list.behind_n);
	}
	if (list.behind_n)
		rc = delete_from(l, store, 0, err);
	if (!rc && shard_size == SHARD_SIZE_DEFAULT)
		rc = delete_number(l, store, shard_size_name, err);
	else if (!rc)
		rc = write_number(l, store, shard_size_name, shard_size, PUT_ALWAYS, err);
	if (rc)
		return rc;
	rc = write_number(l, store, size_name, size, PUT_IF_ABSENT, err);
	/* It may have been us: a put whose answer was lost is sent again. */
	if (rc == -EEXIST && read_number(l, store, size_name, &there, NULL) == 0 && there == size)
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
		rc = read_size(l, store, &size, err);
	if (rc)
		return rc;
	rc = read_number(l, store, shard_size_name, &shard_size, err);
	if (!rc)
		rc = check_agrees(l, shard_size, err);
	if (rc && rc != -ENOENT)
		return rc;
	rc = delete_from(l, store, 0, err);
	if (!rc)
		rc = delete_number(l, store, shard_size_name, err);
	return rc ? rc : delete_number(l, store, size_name, err);
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
