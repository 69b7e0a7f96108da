/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * http, https: one object of a web server as a read-only disk.
 *
 * Promises. Read-only: nothing to flush, no FUA, no trim, a crash loses nothing, any number of readers. The object is
 * pinned at open by size and ETag (or Last-Modified, where there is no ETag), and every answer is held against that:
 * an object that was changed or removed is -ESTALE, never a mixture of two. Where a server tells neither, only
 * another size is noticed. If the pinned object comes back, so do the reads.
 *
 * A read asks for a range and never takes more than it asked for. Less (some servers limit ranges) is asked for
 * again. Nothing else is repeated here: that is layer retry's task, and merging and reading ahead is readahead's.
 *
 * It holds no objects by name: below `sharded` it can't be used.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/http/http_object.h"
#include "layer/layers.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/log.h"
#include "nbdrs/reactor.h"

/* Large enough to be worth a round trip; small enough for the deadline of one request on a slow line. */
enum { PREF_IO = 64 << 10, MAX_IO = 8 << 20 };

int object_ask(struct object *o, uint64_t off, const struct iov *into, struct http_resp *resp)
{
	struct http_header headers[OBJECT_HEADERS_MAX + 2];
	char range[64];
	struct http_req req = { .method = into ? "GET" : "HEAD",
				.url = o->url,
				.headers = headers,
				.headers_n = o->headers_n,
				.into = into };

	memcpy(headers, o->headers, o->headers_n * sizeof(*headers));
	if (into != NULL) {
		(void)snprintf(range, sizeof(range), "bytes=%" PRIu64 "-%" PRIu64, off,
			       off + into->len - 1);
		headers[req.headers_n++] = (struct http_header){ "Range", range };
	}
	return http_do(o->http, &req, resp);
}

/* ---- read ---- */

static int complain(const struct object *o, const char *why)
{
	static struct log_gate gate;
	unsigned suppressed;

	if (log_gate_open(&gate, &suppressed))
		log_warn("http answer makes no sense: %s url=%s suppressed=%u", why, o->shown,
			 suppressed);
	return -EPROTO;
}

static int stale(struct object *o, const char *why)
{
	if (!atomic_exchange_explicit(&o->was_told, true, memory_order_relaxed))
		log_error(
			"the object was changed or removed while it was served, reads fail until it is "
			"served anew: %s url=%s",
			why, o->shown);
	return -ESTALE;
}

static int check_pin(struct object *o, const struct http_resp *r)
{
	if (r->range_total != UINT64_MAX && r->range_total != o->size)
		return stale(o, "another size");
	/* Servers behind one name may disagree about dates; whoever has ETags means those. */
	if (o->etag[0] != '\0' && r->etag[0] != '\0')
		return strcmp(o->etag, r->etag) == 0 ? 0 : stale(o, "another ETag");
	if (strcmp(o->last_modified, r->last_modified) != 0 && r->last_modified[0] != '\0' &&
	    o->last_modified[0] != '\0')
		return stale(o, "another Last-Modified");
	return 0;
}

/* Judges the answer to a request for `want` bytes from `off` on; *got = how many are good. */
static int check_answer(struct object *o, uint64_t off, uint64_t want, const struct http_resp *r,
			uint64_t *got)
{
	int rc = http_status_error(r->status);

	if (rc == -ENOENT || rc == -ERANGE || rc == -ESTALE)
		return stale(o, rc == -ENOENT ? "it is gone" : "it does not reach so far any more");
	if (rc != 0)
		return rc;
	rc = check_pin(o, r);
	if (rc != 0)
		return rc;
	if (r->is_encoded)
		return complain(o, "the body is compressed");
	*got = r->body_len;
	if (r->status == 200 && off == 0 && want == o->size && *got == want)
		return 0; /* all of it was asked for */
	if (r->status != 206)
		return complain(o, "it is not the range that was asked for");
	if (!r->has_range || r->range_from != off || *got == 0 || *got > want ||
	    r->range_to - r->range_from != *got)
		return complain(o, "another range than was asked for");
	return 0;
}

/* As much of it as the server likes to give at once. Its answer is no part of the caller's frame. */
static __attribute__((noinline)) CO_FN int read_some(struct chan *c, uint64_t off,
						     const struct iov *into, uint64_t *got)
{
	struct object *o = c->layer->self;
	struct http_resp resp;
	int rc = object_ask(o, off, into, &resp);

	if (rc == -EPROTO && resp.status == 200) {
		/* The whole object; a new one may be of another kind, so its marks count first. */
		rc = check_pin(o, &resp);
		rc = rc != 0 ? rc : complain(o, "it ignores ranges");
	} else if (rc == 0) {
		rc = check_answer(o, off, into->len, &resp, got);
	}
	if (resp.retry_after_ns > 0)
		c->not_before = now_ns() + resp.retry_after_ns;
	http_resp_free(&resp);
	return rc;
}

static CO_FN int object_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	uint64_t done = 0;

	(void)fl;
	while (done < e.len) {
		struct iovec store[IOV_SLICE_MAX];
		struct iov rest = iov_slice(iov, done, e.len - done, store, IOV_SLICE_MAX);
		uint64_t got = 0;
		int rc = read_some(c, e.off + done, &rest, &got);

		if (rc != 0)
			return rc;
		done += got;
	}
	return 0;
}

/* ---- open, close ---- */

static CO_FN int http_layer_open(struct layer *l, struct err *err)
{
	struct object *o = l->self;
	int rc = object_open(l, err);

	if (rc != 0)
		return rc;
	l->size = o->size;
	l->caps = CAN_MULTI | IS_REMOTE;
	l->pref_io = PREF_IO;
	l->max_io = MAX_IO;
	if (o->etag[0] == '\0' && o->last_modified[0] == '\0')
		log_warn(
			"the server gives no ETag and no Last-Modified: if the object is changed while it is "
			"served, only another size is noticed url=%s",
			o->shown);
	return 0;
}

static CO_FN void http_layer_close(struct layer *l)
{
	object_free(l->self);
}

static CO_FN void http_chan_close(struct chan *c)
{
	const struct object *o = c->layer->self;

	http_close_here(o->http);
}

/* ---- what operators see ---- */

static void show(struct info *i, const struct object *o)
{
	i->add(i, "url", o->shown);
	if (o->etag[0] != '\0')
		i->add(i, "etag", o->etag);
	if (o->last_modified[0] != '\0')
		i->add(i, "last_modified", o->last_modified);
}

static CO_FN void http_info(struct layer *l, struct info *i)
{
	struct object *o = l->self;
	bool was_open = o->http != NULL;
	char size[32];
	struct err err;

	if (!was_open && object_open(l, &err) != 0) {
		i->add(i, "error", err.msg);
		return;
	}
	(void)snprintf(size, sizeof(size), "%" PRIu64, o->size);
	i->add(i, "size", size);
	show(i, o);
	if (!was_open)
		object_free(o);
}

static void http_status(struct layer *l, struct info *i)
{
	struct object *o = l->self;

	show(i, o);
	if (atomic_load_explicit(&o->was_told, memory_order_relaxed))
		i->add(i, "changed", "yes");
	http_show_counts(o->http, i);
}

#define HTTP_LAYER(scheme, words)                                                              \
	{                                                                                      \
		.name = scheme, .help = words, .opts = object_options, .takes_target = true,   \
		.is_store = true, .self_size = sizeof(struct object), .open = http_layer_open, \
		.close = http_layer_close, .chan_close = http_chan_close, .read = object_read, \
		.info = http_info, .status = http_status,                                      \
	}

const struct layer_ops http_layer = HTTP_LAYER("http", "an object of a web server, read-only");
const struct layer_ops https_layer =
	HTTP_LAYER("https", "an object of a web server over TLS, read-only");
