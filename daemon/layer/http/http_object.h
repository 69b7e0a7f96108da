/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the two halves of layers `http` and `https` share: http_object.c serves requests, http_setup.c makes sense of
 * the URL and the options and looks at the object.
 */
#ifndef NBDRS_HTTP_OBJECT_H
#define NBDRS_HTTP_OBJECT_H

#include <stdatomic.h>

#include "nbdrs/http.h"
#include "nbdrs/layer.h"

enum { OBJECT_HEADERS_MAX = 32 };

/* Instance. Options first (filled by the option table), then what open found. */
struct object {
	uint64_t conns, timeout_ns, connect_ns;
	char *ca_file, *header_file, *resolve;
	bool is_insecure;

	struct http *http;
	char *url;         /* without userinfo */
	char *shown;       /* the same without its query, for messages */
	char *basic;       /* "Basic ..."; NULL = none. Secret */
	char *header_text; /* of header_file; `headers` points into it. Secret */
	struct http_header headers[OBJECT_HEADERS_MAX + 2]; /* room for Authorization and Range */
	unsigned headers_n;

	/* Pinned: what every answer is held against. "" = the server does not tell. */
	char etag[HTTP_WORD_MAX];
	char last_modified[HTTP_DATE_MAX];
	uint64_t size;
	_Atomic bool was_told; /* that it has changed: once is enough. Relaxed */
};

extern const struct opt object_options[];

/* Everything from the options to the pinned object; on failure nothing is left behind. */
CO_FN int object_open(struct layer *l, struct err *err);
void object_free(struct object *o);

/*
 * One GET of [off, off + len) into `into`, or a HEAD where `into` is NULL. As http_do; resp->status 200 is told from
 * 206 by the caller.
 */
CO_FN int object_ask(struct object *o, uint64_t off, const struct iov *into,
		     struct http_resp *resp);

/* What the chain's target stands for. The caller frees the two (object_free does). Pure. */
int object_parse_url(const char *scheme, const char *target, const char *export_name, char **url,
		     char **basic, struct err *err);

#endif
