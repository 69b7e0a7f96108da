/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Opening of layer s3: options, the client, and the first requests, which tell early what is wrong
 * with address, keys, bucket or region.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/http/http_options.h"
#include "layer/s3/s3_guard.h"
#include "layer/s3/s3_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/log.h"
#include "nbdrs/reactor.h"

enum { TRIES = 6, TRIES_GARBLED = 3, TRIES_UNREACHED = 2 };

#define FIRST_PAUSE_NS UINT64_C(100000000)

#define FIELD(field_)  .field = offsetof(struct s3_self, field_)

const struct opt s3_options[] = {
	{ .name = "region",
	  .type = OPT_STR,
	  FIELD(region),
	  .help = "region of the bucket, else AWS_REGION, the profile's, us-east-1" },
	{ .name = "style",
	  .type = OPT_ENUM,
	  FIELD(style),
	  .def = "auto",
	  .choices = "auto|path|virtual",
	  .help = "bucket in the path or before the host's name" },
	{ .name = "profile",
	  .type = OPT_STR,
	  FIELD(profile),
	  .help = "profile of the shared credentials file" },
	{ .name = "key_file",
	  .type = OPT_STR,
	  FIELD(key_file),
	  .help = "file with the access key on its first line, the secret on the second" },
	{ .name = "token",
	  .type = OPT_STR,
	  FIELD(token),
	  .help = "session token of temporary keys" },
	{ .name = "payload",
	  .type = OPT_ENUM,
	  FIELD(payload),
	  .def = "signed",
	  .choices = "signed|unsigned",
	  .help = "unsigned: leave it to TLS to protect what is written (https only)" },
	{ .name = "probe",
	  .type = OPT_BOOL,
	  FIELD(wants_probe),
	  .def = "on",
	  .help = "find out at start whether conditional puts work" },
	HTTP_OPTIONS(struct s3_self),
	OPT_END,
};

/* Failures of one kind that are one too many. Who mistyped an address does not want to wait for the answer. */
static unsigned limit_of(int rc)
{
	switch (rc) {
	case -ECONNREFUSED:
	case -EHOSTUNREACH:
	case -ENETUNREACH:
	case -ETIMEDOUT: return TRIES_UNREACHED;
	case -EPROTO: return TRIES_GARBLED;
	default: return TRIES;
	}
}

/*
 * Each kind is counted by itself: a garbled answer after two that said "later" is the first of its kind, and on a bad
 * network that happens.
 */
int s3_insist(struct s3 *s3, const struct s3_req *req, struct s3_resp *resp, uint64_t *not_before)
{
	unsigned failures[TRIES + 1] = { 0 }; /* by limit */
	uint64_t pause = FIRST_PAUSE_NS, until = 0;
	int rc = s3_do(s3, req, resp, &until);

	for (unsigned tries = 1; is_transient(rc) && tries < TRIES; tries++) {
		const unsigned limit = limit_of(rc);
		uint64_t now = now_ns();

		if (++failures[limit] >= limit)
			break;
		http_resp_free(&resp->http);
		co_sleep(MAX(pause, until > now ? until - now : 0));
		pause *= 2;
		rc = s3_do(s3, req, resp, &until);
	}
	if (not_before)
		*not_before = MAX(*not_before, until);
	return rc;
}

/* ---- common ---- */

static CO_FN int client_new(const struct s3_self *self, const struct s3_url *u, struct s3 **out,
			    struct err *err)
{
	const struct s3_conf conf = {
		.url = u,
		.key_file = self->key_file,
		.profile = self->profile,
		.token = self->token,
		.region = self->region,
		.style = (enum s3_style)self->style,
		.is_unsigned = self->payload == 1,
		.http = {
			.conns = (unsigned)self->conns,
			.timeout_ns = self->timeout_ns,
			.connect_ns = MIN(self->connect_ns, self->timeout_ns),
			.ca_file = self->ca_file,
			.is_insecure = self->is_insecure,
			.resolve = self->resolve,
		},
	};

	if (self->is_insecure && self->ca_file)
		return err_set(
			err, -EINVAL,
			"layer s3: insecure and ca_file contradict each other; give one of them");
	return s3_new(&conf, out, err);
}

void s3_layer_close(struct layer *l)
{
	struct s3_self *self = l->self;

	s3_guard_close(self);
	s3_free(self->s3);
	free(self->prefix);
	self->s3 = NULL;
	self->prefix = NULL;
}

/* "dir" -> "dir/": names are put right behind it. */
static int take_prefix(struct s3_self *self, const struct s3_url *u, struct err *err)
{
	size_t len = strlen(u->path);

	if (len + 1 > S3_PREFIX_MAX)
		return err_set(err, -EINVAL, "layer s3: the prefix is longer than %d bytes",
			       S3_PREFIX_MAX - 1);
	if (asprintf(&self->prefix, "%s%s", u->path,
		     len > 0 && u->path[len - 1] != '/' ? "/" : "") < 0) {
		self->prefix = NULL;
		return err_set(err, -ENOMEM, "out of memory");
	}
	return 0;
}

/* ---- the store ---- */

static CO_FN int store_check(struct layer *l, const struct s3_url *u, struct err *err)
{
	struct s3_self *self = l->self;
	int rc = take_prefix(self, u, err);

	if (!rc)
		rc = client_new(self, u, &self->s3, err);
	if (!rc) {
		rc = s3_check_access(self, err);
		if (!rc && !l->want_ro && self->wants_probe)
			rc = s3_probe(l, err);
		s3_close_here(self->s3);
	}
	return rc;
}

int s3_store_open(struct layer *l, struct err *err)
{
	struct s3_url u;
	int rc = s3_url_parse(l->spec->target, &u, err);

	if (rc)
		return rc;
	/* A put is durable when it is answered: nothing to flush. */
	l->caps = CAN_FUA | CAN_MULTI | IS_REMOTE | (l->want_ro ? 0U : CAN_WRITE);
	rc = store_check(l, &u, err);
	s3_url_free(&u);
	if (rc)
		s3_layer_close(l);
	return rc;
}

/* ---- one object ---- */

/* The path, or with none, or one that ends in "/", the export's name below it. */
static int take_key(struct layer *l, const struct s3_url *u, struct err *err)
{
	struct s3_self *self = l->self;
	size_t len = strlen(u->path);
	bool is_folder = len == 0 || u->path[len - 1] == '/';
	const char *name = is_folder ? l->export_name : "";

	if (!name || (is_folder && !*name))
		return err_set(
			err, -EINVAL,
			"layer s3: the target names a bucket or folder; name the object in it, as in "
			"s3:http://host/%s/%sdisk.img",
			u->bucket, u->path);
	if (len + strlen(name) > S3_KEY_MAX)
		return err_set(err, -EINVAL, "layer s3: the object's key is longer than %d bytes",
			       S3_KEY_MAX);
	if (asprintf(&self->prefix, "%s%s", u->path, name) < 0) {
		self->prefix = NULL;
		return err_set(err, -ENOMEM, "out of memory");
	}
	return 0;
}

/* An answer to HEAD has no body to tell the reason: one byte of GET has. */
static CO_FN int explain_head(struct s3_self *self, int rc, struct s3_resp *resp, struct err *err)
{
	struct s3_req req = {
		.method = "GET", .key = self->prefix, .has_range = true, .len = 1, .is_quiet = true
	};
	int again;

	if (resp->http.status == 0 || is_transient(rc))
		return s3_explain(self->s3, rc, resp, err);
	http_resp_free(&resp->http);
	again = s3_insist(self->s3, &req, resp, NULL);
	if (again == -ENOENT)
		return err_set(err, again,
			       "s3 %s, bucket %s: there is no object \"%s\"; look at the path",
			       s3_endpoint(self->s3), s3_bucket(self->s3), self->prefix);
	return s3_explain(self->s3, again ? again : rc, resp, err);
}

static CO_FN int pin(struct layer *l, struct err *err)
{
	struct s3_self *self = l->self;
	struct s3_resp *resp = s3_resp_new();
	struct s3_req req = { .method = "HEAD", .key = self->prefix, .is_quiet = true };
	int rc;

	if (!resp)
		return err_set(err, -ENOMEM, "out of memory");
	rc = s3_insist(self->s3, &req, resp, NULL);
	if (rc) {
		rc = explain_head(self, rc, resp, err);
	} else if (resp->http.content_len == UINT64_MAX) {
		rc = err_set(err, -EPROTO,
			     "s3 %s: no Content-Length for \"%s\"; without it the disk has no size",
			     s3_endpoint(self->s3), self->prefix);
	} else {
		l->size = resp->http.content_len;
		(void)snprintf(self->etag, sizeof(self->etag), "%.*s", ETAG_MAX, resp->http.etag);
		if (strlen(resp->http.etag) > ETAG_MAX || !self->etag[0]) {
			self->etag[0] = '\0';
			log_warn(
				"s3 object has no usable ETag: a change of it will only be seen by its size "
				"endpoint=%s object=%s",
				s3_endpoint(self->s3), self->prefix);
		}
	}
	s3_resp_free(resp);
	return rc;
}

int s3_object_open(struct layer *l, struct err *err)
{
	struct s3_self *self = l->self;
	struct s3_url u;
	int rc = s3_url_parse(l->spec->target, &u, err);

	if (rc)
		return rc;
	l->caps = CAN_MULTI | IS_REMOTE;
	rc = take_key(l, &u, err);
	if (!rc)
		rc = client_new(self, &u, &self->s3, err);
	if (!rc) {
		rc = pin(l, err);
		s3_close_here(self->s3);
	}
	s3_url_free(&u);
	if (rc)
		s3_layer_close(l);
	return rc;
}

/* ---- info ---- */

void s3_layer_info(struct layer *l, struct info *i)
{
	static const char *const styles[] = { "virtual", "path" };
	struct s3_self *self = l->self;
	struct s3 *s3 = self->s3;
	struct s3_url u;
	struct err err;

	if (s3_url_parse(l->spec->target, &u, &err) != 0) {
		i->add(i, "error", err.msg);
		return;
	}
	if (!s3 && client_new(self, &u, &s3, &err) != 0) {
		i->add(i, "error", err.msg);
		s3_url_free(&u);
		return;
	}
	i->add(i, "endpoint", s3_endpoint(s3));
	i->add(i, "bucket", u.bucket);
	i->add(i, l->is_keyed ? "prefix" : "object", u.path);
	i->add(i, "region", s3_region(s3));
	i->add(i, "style", styles[s3_is_path_style(s3)]);
	i->add(i, "keys from", s3_key_source(s3));
	if (s3 != self->s3)
		s3_free(s3);
	s3_url_free(&u);
}
