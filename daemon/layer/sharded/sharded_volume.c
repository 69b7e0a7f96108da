/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What is recorded of a volume of layer `sharded`: two numbers, and which blocks there are.
 */
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/sharded/sharded_int.h"
#include "nbdrs/cleanup.h"

static const char block_prefix[] = "block-";

/* Longest number in an object, with white space around it. */
enum { TEXT_MAX = 64, TEXT_SHOWN = 32 };

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
char *sharded_store_text(const struct layer *l)
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
int sharded_read_number(struct layer *l, struct chan *store, const char *name, uint64_t *value,
			struct err *err)
{
	char text[TEXT_MAX + 1] = { 0 }, shown[TEXT_SHOWN + 4];
	_cleanup_free_ char *where = sharded_store_text(l);
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

/* --- What is recorded ------------------------------------------------------------------------- */

int sharded_check_size(const struct layer *l, uint64_t size, uint64_t shard_size, struct err *err)
{
	const uint64_t shards = shards_of(size, shard_size);
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
	int rc = sharded_read_number(l, store, SHARD_SIZE_NAME, shard_size, err);

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
			       SHARD_SIZE_NAME, *shard_size, SHARD_SIZE_MIN, SHARD_SIZE_MAX);
	return 0;
}

int sharded_check_agrees(const struct layer *l, uint64_t shard_size, struct err *err)
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
int sharded_read_size(struct layer *l, struct chan *store, uint64_t *size, struct err *err)
{
	_cleanup_free_ char *where = NULL;
	int rc = sharded_read_number(l, store, SIZE_NAME, size, err);

	if (rc != -ENOENT)
		return rc;
	where = sharded_store_text(l);
	return err_set(
		err, rc,
		"layer sharded: there is no volume in %s (no object 'size'); make one with nbdrsd init --size",
		where);
}

int sharded_read_volume(struct layer *l, struct chan *store, struct volume *v, struct err *err)
{
	struct volume found;
	int rc = sharded_read_size(l, store, &found.size, err);

	if (!rc)
		rc = read_shard_size(l, store, &found.shard_size, err);
	if (!rc)
		rc = sharded_check_agrees(l, found.shard_size, err);
	if (rc)
		return rc;
	rc = sharded_check_size(l, found.size, found.shard_size, err);
	if (rc) {
		_cleanup_free_ char *where = sharded_store_text(l);

		return err_prefix(err, rc, "object 'size' in %s", where);
	}
	found.shards = shards_of(found.size, found.shard_size);
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
		_cleanup_free_ char *where = sharded_store_text(l);

		return err_set(err, rc, "layer sharded: the objects in %s cannot be listed: %s",
			       where, err_name(rc));
	}
	return 0;
}
