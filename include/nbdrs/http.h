/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * HTTP client for fibers: libcurl's multi interface on the reactor's own event loop (io_watch, timers).
 *
 * A client (`struct http`) holds settings and, for each reactor that uses it, several multi handles with their
 * connections. A request is sent once: whether to try again is decided above (layer retry).
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

struct http_conf {
	unsigned conns;	      /* transfers at a time on each reactor; the rest waits in line */
	uint64_t timeout_ns;  /* for a whole request, waiting in line not included */
	uint64_t connect_ns;  /* for a connection; 0 = timeout_ns */
	const char *ca_file;  /* PEM; NULL = the system's */
	bool is_insecure;     /* do not verify certificates */
	const char *resolve;  /* "HOST:PORT:ADDRESS" as curl's --resolve; NULL = none */
};

struct http_header {
	const char *name, *value;
};

enum { HTTP_TEXT_MAX = 8 << 20, HTTP_WORD_MAX = 256 };

struct http_req {
	const char *method; /* "GET", "HEAD", "PUT", "POST", "DELETE" */
	const char *url;    /* absolute, percent-encoded; sent as it is (no dot segments removed) */
	const struct http_header *headers; /* beside Host and Content-Length; a value "" is sent empty */
	unsigned headers_n;
	const struct iov *body; /* sent with its Content-Length; NULL = none */
	const struct iov *into; /* where the body of a 2xx goes; NULL = to resp->text */
};

struct http_resp {
	int status;	      /* 200, 206, 404 ... */
	uint64_t body_len;    /* bytes that came, in `into` or `text` */
	uint64_t content_len; /* Content-Length (of HEAD, too); UINT64_MAX = not told */
	/* Content-Range of a 206 or 416; total UINT64_MAX = not told. */
	bool has_range;
	uint64_t range_from, range_to, range_total; /* [from, to) */
	uint64_t retry_after_ns; /* 0 = not told */
	int64_t date;		 /* seconds since 1970, 0 = not told */
	char etag[HTTP_WORD_MAX];     /* without W/ and quotes */
	char region[HTTP_WORD_MAX];   /* x-amz-bucket-region */
	char location[HTTP_WORD_MAX * 4];
	bool accepts_ranges; /* Accept-Ranges: bytes */
	char *text;	     /* NUL-terminated; bodies of errors, and of requests without `into`; may be NULL */
	size_t text_len;
	char error[HTTP_WORD_MAX]; /* libcurl's words when there was no response */
};

/* Copies what it needs of `conf`. Any thread. */
int http_new(const struct http_conf *conf, struct http **out, struct err *err);
/* Closes this reactor's connections; nothing may be in flight here. From chan_close. */
CO_FN void http_close_here(struct http *h);
/* After http_close_here on every reactor that used it. NULL is fine. */
void http_free(struct http *h);

/*
 * Sends a request and waits for the whole response. 0 when a response came, whatever its status; else -errno:
 * -ETIMEDOUT, -ECONNREFUSED, -ECONNRESET (also: the body ended early), -EHOSTUNREACH (no such host or no way there),
 * -EPROTO (no HTTP, or a body longer than `into`), -EKEYREJECTED (TLS: not trusted), -ENOMEM. `resp` is
 * initialised here and must be freed in either case.
 */
CO_FN int http_do(struct http *h, const struct http_req *req, struct http_resp *resp);
void http_resp_free(struct http_resp *resp);

/* What a status means to a store: 0 for 2xx; -EAGAIN 429, 500, 502, 503, 504, 408; -ENOENT 404, 410; -EACCES 401, 403; ... */
int http_status_error(int status);

/* Counters of all requests so far, "GET 206" -> n, in no order. Any thread. */
void http_each_count(struct http *h, void (*fn)(void *arg, const char *method, int status, uint64_t n), void *arg);

#endif
