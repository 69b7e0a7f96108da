/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The identity of a volume, from outside its layers: see identity.h. Layers need not know of it; what a layer that
 * maps to objects does not know it leaves alone.
 */
#include "nbdrs/identity.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/xattr.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"

/* The layer whose kid holds the volume's objects, or the store that is the volume; NULL = neither is alone. */
static struct layer *home_from(struct layer *l)
{
	while (l->kids_n == 1 && !l->ops->keyed_kids)
		l = l->kids[0];
	return l->kids_n > 1 ? NULL : l;
}

static struct layer *home_of(struct chain *c)
{
	return home_from(chain_top(c));
}

static int make_text(char out[IDENTITY_LEN + 1])
{
	unsigned char bytes[IDENTITY_LEN / 2];

	if (getrandom(bytes, sizeof(bytes), 0) != sizeof(bytes))
		return -EIO;
	for (size_t i = 0; i < sizeof(bytes); i++)
		(void)snprintf(out + 2 * i, 3, "%02x", bytes[i]);
	return 0;
}

/* --- Objects ------------------------------------------------------------------------------------ */

static CO_FN int put_object(struct chan *store, const char *text)
{
	struct obj obj;
	struct iovec v;
	struct iov iov = iov_one(&v, (void *)(uintptr_t)text, IDENTITY_LEN);
	struct put p = { .obj = &obj, .iov = &iov, .cond = PUT_ALWAYS };
	struct obj_stat st;
	int rc;

	(void)obj_set(&obj, IDENTITY_OBJECT);
	rc = ch_stat(store, &obj, &st);
	if (rc != -ENOENT)
		return rc; /* it is there */
	rc = ch_put(store, &p, NULL);
	return rc ? rc : ch_flush(store);
}

static CO_FN int get_object(struct chan *store, char out[IDENTITY_LEN + 1])
{
	struct obj obj;
	struct iovec v;
	struct iov iov = iov_one(&v, out, IDENTITY_LEN);
	int rc;

	(void)obj_set(&obj, IDENTITY_OBJECT);
	rc = ch_read(store, (struct ext){ &obj, 0, IDENTITY_LEN }, &iov, 0);
	out[rc ? 0 : IDENTITY_LEN] = '\0';
	return rc;
}

/* "" in `was` when there is none. */
static CO_FN int take_object(struct chan *store, char was[IDENTITY_LEN + 1])
{
	struct obj obj;
	int rc = get_object(store, was);

	(void)obj_set(&obj, IDENTITY_OBJECT);
	return rc && rc != -ENOENT ? rc : ch_del(store, &obj, 1);
}

/* Runs with the store's channel, of a chain that is not open. `text` NULL: removes; `was` becomes what was there. */
static CO_FN int change_object(struct layer *l, const char *text, char *was, struct err *err)
{
	struct chan *store;
	int rc = layer_kids_open(l, err);

	if (rc)
		return rc;
	rc = layer_chan_open(l->kids[0], &store);
	if (!rc) {
		rc = text ? put_object(store, text) : take_object(store, was);
		layer_chan_close(store);
	}
	if (rc)
		(void)err_set(err, rc, "object '" IDENTITY_OBJECT "' cannot be changed: %s", err_name(rc));
	layer_kids_close(l);
	return rc;
}

/* --- Files -------------------------------------------------------------------------------------- */

struct attribute {
	const char *path;
	char text[IDENTITY_LEN + 1];
	bool renew;
};

/* Of an offload thread. */
static int set_attribute(void *arg)
{
	const struct attribute *a = arg;

	if (setxattr(a->path, IDENTITY_XATTR, a->text, IDENTITY_LEN, a->renew ? 0 : XATTR_CREATE) == 0)
		return 0;
	/* It has one already, or can have none. */
	return errno == EEXIST || errno == ENOTSUP || errno == EPERM ? 0 : -errno;
}

static int get_attribute(void *arg)
{
	struct attribute *a = arg;
	ssize_t n = getxattr(a->path, IDENTITY_XATTR, a->text, IDENTITY_LEN);

	a->text[n == IDENTITY_LEN ? IDENTITY_LEN : 0] = '\0';
	return n >= 0 || errno == ENODATA || errno == ENOTSUP || errno == EPERM || errno == ERANGE ? 0 : -errno;
}

static const char *path_of(struct layer *l)
{
	const char *path = l->ops->is_store && l->ops->backing ? l->ops->backing(l) : NULL;

	return path && *path ? path : NULL;
}

/* The path is known while the chain is open. */
static CO_FN int make_attribute(struct chain *c, struct layer *l, const char *text, bool renew, struct err *err)
{
	struct attribute a = { .renew = renew };
	int rc;

	if (!l->ops->backing)
		return 0;
	rc = chain_open(c, err);
	if (rc)
		return rc;
	memcpy(a.text, text, sizeof(a.text));
	a.path = path_of(l);
	rc = a.path ? offload(set_attribute, &a) : 0;
	if (rc)
		(void)err_set(err, rc, "%s: cannot set its attribute " IDENTITY_XATTR ": %s", a.path, err_name(rc));
	(void)chain_close(c); /* nothing was written */
	return rc;
}

/* --- Both --------------------------------------------------------------------------------------- */

int identity_make(struct chain *c, bool renew, struct err *err)
{
	struct layer *l = home_of(c);
	char text[IDENTITY_LEN + 1];
	int rc = make_text(text);

	if (rc)
		return err_set(err, rc, "no random numbers: %s", err_name(rc));
	if (!l)
		return 0;
	return l->ops->keyed_kids ? change_object(l, text, NULL, err) : make_attribute(c, l, text, renew, err);
}

int identity_remove(struct chain *c, char was[IDENTITY_LEN + 1], struct err *err)
{
	struct layer *l = home_of(c);

	was[0] = '\0';
	return l && l->ops->keyed_kids ? change_object(l, NULL, was, err) : 0;
}

int identity_put_back(struct chain *c, const char *was, struct err *err)
{
	return *was ? change_object(home_of(c), was, NULL, err) : 0;
}

/* From objects in `keyed`, or from the file of `l`; either may be NULL. */
static CO_FN int read_either(struct layer *keyed, struct layer *l, char out[IDENTITY_LEN + 1],
			     struct err *err)
{
	struct attribute a = { .path = NULL };
	struct chan *store;
	int rc = 0;

	out[0] = '\0';
	if (keyed) {
		rc = layer_chan_open(keyed, &store);
		if (!rc) {
			rc = get_object(store, a.text);
			layer_chan_close(store);
		}
		/* Who may not list is told "forbidden" for what is not there by some stores. */
		if (rc == -ENOENT || rc == -EACCES || rc == -EPERM)
			return 0;
	} else if (l) {
		a.path = path_of(l);
		rc = a.path ? offload(get_attribute, &a) : 0;
	}
	if (rc)
		return err_set(err, rc, "which volume it is cannot be read: %s", err_name(rc));
	if (identity_is_valid(a.text))
		memcpy(out, a.text, IDENTITY_LEN + 1);
	return 0;
}

/* `l`: see home_of(). */
static CO_FN int read_home(struct layer *l, char out[IDENTITY_LEN + 1], struct err *err)
{
	return read_either(l && l->ops->keyed_kids ? l->kids[0] : NULL, l, out, err);
}

int identity_read(struct chain *c, char out[IDENTITY_LEN + 1], struct err *err)
{
	return read_home(home_of(c), out, err);
}

int identity_below(struct layer *l, char out[IDENTITY_LEN + 1], struct err *err)
{
	return l->is_keyed ? read_either(l->kids[0], NULL, out, err)
			   : read_home(home_from(l->kids[0]), out, err);
}
