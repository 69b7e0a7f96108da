/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * HTTP client for fibers: libcurl's multi interface on the reactor's own event loop (io_watch,
 * timers).
 *
 * A client (`struct http`) holds settings and, for each reactor that uses it, several multi handles
 * with their connections. A request is sent once, but for the race with a server that closes an
 * idle connection (http_do): whether to try again is decided above (layer retry).
 */
#ifndef NBDRS_HTTP_H
#define NBDRS_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbdrs/co.h"
#include "nbdrs/err.h"
#include "nbdrs/iov.h"

struct http;

enum { HTTP_CONNS_MAX = 4096 };

struct http_conf {
	unsigned conns;	      /* transfers at a time on each reactor, 1 to HTTP_CONNS_MAX; the rest waits */
	uint64_t timeout_ns;  /* for a whole request, waiting in line not included */
	uint64_t connect_ns;  /* for a connection; 0 = timeout_ns */
	const char *ca_file;  /* PEM; NULL = the system's */
	bool is_insecure;     /* do not verify certificates */
	const char *resolve;  /* "HOST:PORT:ADDRESS" as curl's --resolve; NULL = none */
};

struct http_header {
	const char *name, *value;
};

enum { HTTP_TEXT_MAX = 8 << 20, HTTP_WORD_MAX = 256, HTTP_DATE_MAX = 48 };

struct http_req {
	const char *method; /* "GET", "HEAD", "PUT", "POST", "DELETE" */
	const char *url;    /* http(s), percent-encoded, without userinfo; sent as it is (no dot segments removed) */
	const struct http_header *headers; /* beside Host and Content-Length; a value "" is sent empty */
	unsigned headers_n;
	const struct iov *body; /* sent with its Content-Length; NULL = none */
	const struct iov *into; /* where the body of a 2xx goes; NULL = to resp->text */
	bool is_once; /* must not reach the server twice (a conditional PUT): takes a new connection, see http_do */
};

struct http_resp {
	int status;	      /* 200, 206, 404 ... */
	uint64_t body_len;    /* bytes that came, in `into` or `text` */
	uint64_t content_len; /* Content-Length (of HEAD, too); UINT64_MAX = not told */
	/* Content-Range of a 206 or 416; total UINT64_MAX = not told. */
	bool has_range;
	uint64_t range_from, range_to, range_total; /* [from, to) */
	uint64_t retry_after_ns; /* 0 = not told */
	int64_t date;		 /* of an error (4xx, 5xx): seconds since 1970, 0 = not told */
	char etag[HTTP_WORD_MAX];     /* without W/ and quotes */
	char region[HTTP_WORD_MAX];   /* x-amz-bucket-region */
	char location[HTTP_WORD_MAX * 4];
	char last_modified[HTTP_DATE_MAX]; /* as it was sent, to be compared; "" = not told */
	bool accepts_ranges; /* Accept-Ranges: bytes */
	bool is_encoded;     /* Content-Encoding is not identity: the body is not the object's bytes */
	char *text;	     /* NUL-terminated; bodies of errors, and of requests without `into`; may be NULL */
	size_t text_len;
	char error[HTTP_WORD_MAX]; /* libcurl's words when there was no response */
};

/* Copies what it needs of `conf`. Any thread. */
int http_new(const struct http_conf *conf, struct http **out, struct err *err);
/*
 * Closes this reactor's connections; the caller has nothing in flight here. While another channel
 * has, nothing happens: its own call will do it. From chan_close, and at the end of an open that
 * sent requests (its reactor need not get a channel). Requests after it start anew.
 */
CO_FN void http_close_here(struct http *h);
/* After http_close_here on every reactor that used it. NULL is fine. */
void http_free(struct http *h);

/*
 * Sends a request and waits for the whole response. 0 when a response came, whatever its status;
 * else -errno:
 * -ETIMEDOUT, -ECONNREFUSED, -ECONNRESET (also: the body ended early), -EHOSTUNREACH (no such host
 * or no way there),
 * -EPROTO (no HTTP, or a 2xx body longer than `into` or HTTP_TEXT_MAX), -EKEYREJECTED (TLS: not
 * trusted), -EINVAL (the request itself is no good), -ENOMEM. A body shorter than `into` is no
 * error here: see body_len. `resp` is initialised here and must be freed in either case; after an
 * error it holds what came of the head.
 *
 * A kept connection may be closed by the server at the moment when a request goes out on it. One
 * that ends without a byte of an answer is therefore sent once more on a new connection, as all
 * HTTP clients do; nobody can tell whether the server has seen the first. is_once rules that out.
 */
CO_FN int http_do(struct http *h, const struct http_req *req, struct http_resp *resp);
void http_resp_free(struct http_resp *resp);

/*
 * The only map from a status to what it means to a store: 0 2xx; -EAGAIN 408, 429, 500, 502, 503,
 * 504; -ENOENT 404, 410; -EACCES 401, 403; -ESTALE 412; -EBUSY 409; -ERANGE 416; -ENOSPC 507;
 * -EREMCHG 301, 302, 307, 308; -EOPNOTSUPP 405, 501; -EINVAL other 4xx; -EPROTO the rest.
 */
int http_status_error(int status);

/* Counters of all requests so far, "GET 206" -> n, in no order; status 0 = no response. Any thread. */
void http_each_count(struct http *h, void (*fn)(void *arg, const char *method, int status, uint64_t n), void *arg);

/* The same as lines of a layer's status, "GET 206": n. */
struct info;
void http_show_counts(struct http *h, struct info *i);

#endif
