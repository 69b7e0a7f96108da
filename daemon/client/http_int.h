/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the parts of the HTTP client share: http.c takes requests and lines them up, http_handle.c tells curl what they
 * are, http_loop.c runs curl on the reactor, http_resp.c makes sense of what comes back.
 */
#ifndef NBDRS_HTTP_INT_H
#define NBDRS_HTTP_INT_H

#include <curl/curl.h>
#include <stdatomic.h>

#include "nbdrs/http.h"
#include "nbdrs/list.h"
#include "nbdrs/reactor.h"

/* curl's search for a free connection is linear, so transfers are spread over several multi handles. */
enum { MULTI_TRANSFERS_MAX = 128, MULTIS_MAX = HTTP_CONNS_MAX / MULTI_TRANSFERS_MAX };

struct multi;
struct sock;

/* A client on one reactor. */
struct here {
	struct http *http;
	const struct http_conf *conf; /* its */
	unsigned running;             /* slots taken, at most conns */
	struct list line;             /* transfers that wait for a slot, first come first */
	struct list handles;          /* idle easy handles, last used first */
	struct multi *multis[MULTIS_MAX];
	struct sock **socks;  /* by fd */
	unsigned socks_n;     /* room in it */
	unsigned socks_alive; /* that still have to be freed, the dead ones included */
	struct sock *current; /* whose event curl is looking at */
	struct co *closer;    /* waits until there are none of them */
};

/* An easy handle, for one transfer after the other. */
struct handle {
	CURL *easy;
	struct here *here;
	struct transfer *transfer; /* NULL when idle */
	struct list node;          /* of here->handles */
	struct curl_slist *resolve;
	char error[CURL_ERROR_SIZE];
};

/* A request on its way; in the frame of http_do. */
struct transfer {
	const struct http_req *req;
	struct http_resp *resp;
	struct co *co;
	struct list node; /* of here->line */
	struct handle *handle;
	struct multi *multi; /* NULL when curl does not have it (any more) */
	struct timer deadline;
	uint64_t start_ns;
	size_t sent; /* of the body */
	size_t text_room;
	bool has_slot, is_done, is_head_over;
	int rc; /* why one of our callbacks, or the deadline, ended it */
	CURLcode code;
};

/* ---- http_loop.c: all but loop_add and socket options run on the reactor's own stack ---- */

/* Hands it to curl. -ENOMEM. Then transfer_done() will be called, unless loop_drop() is first. */
int loop_add(struct here *h, struct transfer *t);
/* Takes it away from curl, finished or not: afterwards curl knows nothing of it. */
void loop_drop(struct transfer *t);
/* Callbacks for sockets, of a new easy handle. */
CURLcode loop_set_options(struct handle *h);
/* From a callback of curl: an answer comes in. */
void loop_heard(struct here *h);
/* Closes every connection. Sockets that the engine still holds go a little later: see here->socks_alive. */
void loop_close(struct here *h);
/* The connection of a transfer that got no answer in time may be dead: ends it if it was silent since the start. */
void loop_suspect(struct transfer *t);

/* http.c: called on the reactor's stack when curl is through with a transfer; it was dropped already. */
void transfer_done(struct transfer *t);

/* ---- http_handle.c: what curl is told ---- */

/* An idle one, or a new one; NULL = no memory. */
struct handle *handle_get(struct here *here);
void handle_put(struct handle *h);
void handle_free(struct handle *h);
/* False for what could smuggle in a second header or request. */
bool handle_accepts(const struct http_req *req);
/* Adds to *list, which is the caller's in any case; false = no memory. */
bool handle_headers(const struct http_req *req, struct curl_slist **list);
/* The request's options; it and the headers are borrowed until it has ended. */
CURLcode handle_set(struct handle *h, const struct http_req *req, struct curl_slist *headers);

/* ---- http_resp.c: bytes in, struct or error out ---- */

void resp_init(struct http_resp *r);
/* One line of the head, CR LF included or not. A status line starts anew. */
void resp_line(struct http_resp *r, const char *line, size_t len);
/* Takes len bytes of the body; 0, -EPROTO (too long) or -ENOMEM. */
int resp_body(struct transfer *t, const char *data, size_t len);
/* The only map from curl's codes to errno. os_errno: of the system call that failed, 0 = none. */
int resp_error(CURLcode code, long os_errno);

#endif
