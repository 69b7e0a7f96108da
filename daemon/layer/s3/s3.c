/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * s3: objects in a bucket. As a keyed store (below sharded, distributed) the objects whose keys
 * begin with a prefix; as a disk (below raw) one object, read-only.
 *
 * Promises of the keyed store. A put replaces the whole object or nothing of it, and is durable
 * when it is answered: flush has nothing to do and FUA costs nothing. Who reads while another puts
 * gets the old object or the new one. Several writers: the last put wins; with CAN_PUT_IF (found
 * out at start) conditional puts are atomic among all of them, and a put that is late, because it was given
 * up or its daemon died, undoes no newer one (s3_guard.c). Crash: what was answered is there;
 * what was not is there wholly or not at all. Parts can't be written, trim is del.
 *
 * Promises of the disk. Read-only. The object's ETag is pinned at open and demanded with each read,
 * and its size compared: a changed object is -ESTALE from then on, never a mixture. Without an ETag
 * only another size is noticed.
 *
 * A read asks for a range and never gets more than it asked for. What lies behind an object's end
 * reads as zeroes.
 *
 * Nothing is repeated here but what s3_client.c says, and pages of a listing; that is layer retry's
 * task.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/s3/s3_guard.h"
#include "layer/s3/s3_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/log.h"

static CO_FN void s3_chan_close(struct chan *c)
{
	const struct s3_self *self = c->layer->self;

	s3_close_here(self->s3);
}

static void s3_layer_status(struct layer *l, struct info *i)
{
	struct s3_self *self = l->self;

	s3_status(self->s3, i);
	i->add(i, l->is_keyed ? "prefix" : "object", self->prefix);
	if (!l->is_keyed || l->want_ro)
		return;
	i->add(i, "conditional_puts", l->caps & CAN_PUT_IF ? "yes" : "no");
	s3_guard_status(self, i);
}

/* ---- reading ---- */

static int complain(const struct s3_self *self, const char *key, const char *why)
{
	static struct log_gate gate;
	unsigned suppressed;

	if (log_gate_open(&gate, &suppressed))
		log_warn("s3 answer makes no sense: %s endpoint=%s object=%s suppressed=%u", why,
			 s3_endpoint(self->s3), key, suppressed);
	return -EPROTO;
}

/*
 * What came with 200 or 206 must be the range, or its part before the object's end. Returns 0 with
 * *got = its length.
 */
static int check_body(const struct s3_self *self, const char *key, struct ext e,
		      const struct http_resp *r, uint64_t *got)
{
	uint64_t want;

	if (r->is_encoded)
		return complain(self, key, "the body is compressed");
	if (r->status != 206) {
		/* The whole object: fine when that is what was asked for. */
		if (e.off != 0)
			return complain(self, key, "it ignores ranges");
		*got = r->body_len;
		return 0;
	}
	if (!r->has_range || r->range_from != e.off || r->range_to < r->range_from)
		return complain(self, key, "another range than was asked for");
	want = r->range_total == UINT64_MAX
		       ? e.len
		       : MIN(e.len, r->range_total - MIN(r->range_total, e.off));
	if (r->body_len != want || r->range_to - r->range_from != want)
		return complain(self, key, "less than was asked for");
	*got = want;
	return 0;
}

/*
 * Reads a range of an object; `pinned` (may be NULL or "") is the ETag that it must have. *total =
 * its size, if told.
 */
static CO_FN int get(struct chan *c, const char *key, struct ext e, const struct iov *iov,
		     const char *pinned, uint64_t *total)
{
	struct s3_self *self = c->layer->self;
	struct s3_resp *resp = s3_resp_new();
	struct s3_req req = {
		.method = "GET",
		.key = key,
		.has_range = true,
		.off = e.off,
		.len = e.len,
		.cond = pinned && *pinned ? PUT_IF_MATCH : PUT_ALWAYS,
		.etag = pinned,
		.into = iov,
	};
	uint64_t got = 0;
	int rc;

	if (!resp)
		return -ENOMEM;
	rc = s3_do(self->s3, &req, resp, &c->not_before);
	if (rc == -EPROTO && resp->http.status == 200)
		(void)complain(self, key, "it ignores ranges");
	*total = resp->http.range_total;
	s3_guard_saw(self, e.obj, rc, resp);
	if (rc == 0)
		rc = check_body(self, key, e, &resp->http, &got);
	else if (rc == -ERANGE)
		rc = 0; /* it ends before this range */
	if (rc == 0 && req.cond == PUT_IF_MATCH && resp->http.etag[0] &&
	    strcmp(resp->http.etag, pinned) != 0)
		rc = -ESTALE;
	s3_resp_free(resp);
	if (rc == 0)
		iov_zero(iov, got, e.len - got);
	return rc;
}

static CO_FN int object_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	static struct log_gate gate;
	const struct s3_self *self = c->layer->self;
	uint64_t total = UINT64_MAX;
	unsigned suppressed;
	int rc;

	if (e.len == 0)
		return 0;
	rc = get(c, self->prefix, e, iov, self->etag, &total);
	if ((rc == 0 && total != UINT64_MAX && total != c->layer->size) || rc == -ENOENT)
		rc = -ESTALE;
	if (rc == -ESTALE && log_gate_open(&gate, &suppressed))
		log_error(
			"s3 object was changed or removed while it was served endpoint=%s object=%s suppressed=%u",
			s3_endpoint(self->s3), self->prefix, suppressed);
	return rc;
}

/* ---- objects ---- */

/* `key` has S3_KEY_MAX + 1 bytes. */
static void key_of(const struct s3_self *self, const struct obj *obj, char *key)
{
	size_t len = strlen(self->prefix); /* at most S3_PREFIX_MAX: it was checked */

	memcpy(key, self->prefix, len);
	memcpy(key + len, obj->name, obj->len + 1U);
}

static CO_FN int store_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	char key[S3_KEY_MAX + 1];
	uint64_t total;

	if (e.len == 0)
		return 0;
	key_of(c->layer->self, e.obj, key);
	return get(c, key, e, iov, NULL, &total);
}

static void take_etag(struct obj_stat *st, const struct http_resp *r)
{
	/* Cut short it would match nothing, or the wrong thing. */
	if (strlen(r->etag) <= ETAG_MAX)
		(void)snprintf(st->etag, sizeof(st->etag), "%.*s", ETAG_MAX, r->etag);
	else
		st->etag[0] = '\0';
}

static CO_FN int store_stat(struct chan *c, const struct obj *obj, struct obj_stat *st)
{
	struct s3_self *self = c->layer->self;
	struct s3_resp *resp = s3_resp_new();
	char key[S3_KEY_MAX + 1];
	struct s3_req req = { .method = "HEAD", .key = key };
	int rc;

	if (!resp)
		return -ENOMEM;
	key_of(self, obj, key);
	rc = s3_do(self->s3, &req, resp, &c->not_before);
	s3_guard_saw(self, obj, rc, resp);
	if (rc == 0 && resp->http.content_len == UINT64_MAX)
		rc = complain(self, key, "no Content-Length");
	if (rc == 0) {
		st->size = resp->http.content_len;
		take_etag(st, &resp->http);
	}
	s3_resp_free(resp);
	return rc;
}

static CO_FN int store_put(struct chan *c, const struct put *p, struct obj_stat *st)
{
	struct s3_self *self = c->layer->self;
	struct s3_resp *resp;
	char key[S3_KEY_MAX + 1];
	struct s3_req req = {
		.method = "PUT", .key = key, .cond = p->cond, .etag = p->etag, .body = p->iov
	};
	int rc;

	if (p->cond != PUT_ALWAYS && !(c->layer->caps & CAN_PUT_IF))
		return -ENOTSUP;
	resp = s3_resp_new();
	if (!resp)
		return -ENOMEM;
	key_of(self, p->obj, key);
	if (p->cond == PUT_ALWAYS && s3_is_guarded(self)) {
		rc = s3_guarded_put(c, p, &req, resp);
	} else {
		rc = s3_do(self->s3, &req, resp, &c->not_before);
		s3_guard_put_was(self, p->obj, rc, resp);
	}
	if (rc == 0 && st) {
		st->size = p->iov->len;
		take_etag(st, &resp->http);
	}
	s3_resp_free(resp);
	/*
	 * There is no such bucket's object either way; to a put, a missing path is not "no such
	 * object".
	 */
	return rc == -ENOENT ? -ENODEV : rc;
}

/* The place where objects will be is the bucket, and that is its owner's to make and remove. */
static CO_FN int store_create(struct layer *l, const struct obj *obj, uint64_t size, bool force,
			      struct err *err)
{
	return 0;
}

static CO_FN int store_destroy(struct layer *l, const struct obj *obj, struct err *err)
{
	return 0;
}

const struct layer_ops s3_store_layer = {
	.name = "s3",
	.help = "objects in a bucket of an S3 server",
	.opts = s3_options,
	.takes_target = true,
	.is_store = true,
	.self_size = sizeof(struct s3_self),
	.open = s3_store_open,
	.close = s3_layer_close,
	.chan_close = s3_chan_close,
	.read = store_read,
	.stat = store_stat,
	.put = store_put,
	.del = s3_store_del,
	.list = s3_store_list,
	.create = store_create,
	.destroy = store_destroy,
	.info = s3_layer_info,
	.status = s3_layer_status,
};

const struct layer_ops s3_layer = {
	.name = "s3",
	.help = "an object of an S3 server, read-only; below sharded: objects in a bucket",
	.opts = s3_options,
	.takes_target = true,
	.is_store = true,
	.keyed = &s3_store_layer,
	.self_size = sizeof(struct s3_self),
	.open = s3_object_open,
	.close = s3_layer_close,
	.chan_close = s3_chan_close,
	.read = object_read,
	.info = s3_layer_info,
	.status = s3_layer_status,
};
