/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What curl is told: easy handles, which requests use one after the other, the options of each request, and the
 * callbacks by which its head and its bodies go back and forth.
 *
 * Proxies: as the environment says (http_proxy, HTTPS_PROXY, NO_PROXY), because in networks that need one every other
 * program gets out by it. Never for the machine itself: a store on 127.0.0.1 is not reached through a proxy elsewhere.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "client/http_int.h"
#include "nbdrs/cleanup.h"

#if LIBCURL_VERSION_NUM < 0x075700
#error "libcurl 7.87 or newer is needed (CURLOPT_QUICK_EXIT)"
#endif

/*
 * What is moved at a time. curl takes its buffers anew for each request, so they are no larger than that needs: the
 * allocator gives small ones back and forth, large ones it splits, merges and returns to the system. All of a
 * reactor's together may take so much, so more connections have smaller ones.
 */
enum { BUFFERS_LEN = 32 << 20, BUFFER_MIN = 16 << 10, HEAD_ROOM = 4 << 10 };
enum { RECEIVE_MAX = 256 << 10, UPLOAD_MAX = 512 << 10 };

/* ---- curl's callbacks: these must not call it ---- */

static size_t on_head(char *data, size_t size, size_t n, void *arg)
{
	struct handle *h = arg;
	struct transfer *t = h->transfer;
	size_t len = size * n;

	loop_heard(h->here);
	/* What follows the empty line are trailers, which may not change what the body was taken for. */
	if (len >= 5 && memcmp(data, "HTTP/", 5) == 0)
		t->is_head_over = false;
	if (!t->is_head_over)
		resp_line(t->resp, data, len);
	if (len <= 2 && (data[0] == '\r' || data[0] == '\n'))
		t->is_head_over = true;
	return len;
}

static size_t on_body(char *data, size_t size, size_t n, void *arg)
{
	struct transfer *t = ((struct handle *)arg)->transfer;
	size_t len = size * n;

	t->rc = resp_body(t, data, len);
	return t->rc == 0 ? len : 0; /* 0 of len taken: curl ends the transfer */
}

static size_t on_upload(char *data, size_t size, size_t n, void *arg)
{
	struct transfer *t = ((struct handle *)arg)->transfer;
	size_t len = 0;

	if (t->req->body != NULL)
		len = iov_copy_out(t->req->body, t->sent, data, size * n);
	t->sent += len;
	return len;
}

/* curl sends anew by itself when a kept connection turns out to be closed. */
static int on_seek(void *arg, curl_off_t off, int origin)
{
	struct transfer *t = ((struct handle *)arg)->transfer;

	if (origin != SEEK_SET || off < 0 || t->req->body == NULL ||
	    (size_t)off > t->req->body->len)
		return CURL_SEEKFUNC_FAIL;
	t->sent = (size_t)off;
	return CURL_SEEKFUNC_OK;
}

/* ---- easy handles ---- */

#define SET(option, value)                                          \
	do {                                                        \
		if (rc == CURLE_OK)                                 \
			rc = curl_easy_setopt(easy, option, value); \
	} while (0)

static size_t buffer_len(size_t want, unsigned conns)
{
	size_t share = BUFFERS_LEN / conns;

	return MAX(MIN(want, share), (size_t)BUFFER_MIN);
}

/* What is the same for all requests. */
static CURLcode set_common(struct handle *h, const struct http_conf *conf)
{
	uint64_t connect_ns = conf->connect_ns ? conf->connect_ns : conf->timeout_ns;
	CURL *easy = h->easy;
	CURLcode rc = loop_set_options(h);

	SET(CURLOPT_PRIVATE, h);
	SET(CURLOPT_ERRORBUFFER, h->error);
	SET(CURLOPT_HEADERFUNCTION, on_head);
	SET(CURLOPT_HEADERDATA, h);
	SET(CURLOPT_WRITEFUNCTION, on_body);
	SET(CURLOPT_WRITEDATA, h);
	SET(CURLOPT_READFUNCTION, on_upload);
	SET(CURLOPT_READDATA, h);
	SET(CURLOPT_SEEKFUNCTION, on_seek);
	SET(CURLOPT_SEEKDATA, h);
	SET(CURLOPT_NOSIGNAL, 1L);
	/* Else a request that ends while a name is being looked up would stop the reactor until that is over. */
	SET(CURLOPT_QUICK_EXIT, 1L);
	SET(CURLOPT_NOPROGRESS, 1L);
	SET(CURLOPT_PROTOCOLS_STR, "http,https");
	SET(CURLOPT_DISALLOW_USERNAME_IN_URL, 1L); /* curl's error texts may quote it */
	SET(CURLOPT_FOLLOWLOCATION, 0L);
	SET(CURLOPT_PATH_AS_IS, 1L);
	SET(CURLOPT_TCP_NODELAY, 1L);
	SET(CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);
	SET(CURLOPT_USERAGENT, "nbdrs/" NBDRS_VERSION);
	SET(CURLOPT_CONNECTTIMEOUT_MS, (long)MAX(connect_ns / 1000000, UINT64_C(1)));
	SET(CURLOPT_SSL_VERIFYPEER, conf->is_insecure ? 0L : 1L);
	SET(CURLOPT_SSL_VERIFYHOST, conf->is_insecure ? 0L : 2L);
	if (conf->ca_file != NULL)
		SET(CURLOPT_CAINFO, conf->ca_file);
	return rc;
}

void handle_free(struct handle *h)
{
	if (h == NULL)
		return;
	curl_easy_cleanup(h->easy); /* NULL is fine */
	curl_slist_free_all(h->resolve);
	free(h);
}

static struct handle *handle_new(struct here *here)
{
	const struct http_conf *conf = here->conf;
	struct handle *h = calloc(1, sizeof(*h));

	if (h == NULL)
		return NULL;
	h->here = here;
	list_init(&h->node);
	h->easy = curl_easy_init();
	if (h->easy != NULL && set_common(h, conf) == CURLE_OK) {
		if (conf->resolve == NULL)
			return h;
		h->resolve = curl_slist_append(NULL, conf->resolve);
		if (h->resolve != NULL &&
		    curl_easy_setopt(h->easy, CURLOPT_RESOLVE, h->resolve) == CURLE_OK)
			return h;
	}
	handle_free(h);
	return NULL;
}

struct handle *handle_get(struct here *here)
{
	struct list *n = list_pop(&here->handles);

	return n != NULL ? list_entry(n, struct handle, node) : handle_new(here);
}

void handle_put(struct handle *h)
{
	h->transfer = NULL;
	list_push(&h->here->handles, &h->node); /* the last one is still in the CPU's cache */
}

/* ---- one request's options ---- */

static bool is_clean(const char *text, unsigned char from)
{
	for (; *text; text++)
		if ((unsigned char)*text < from || *text == 0x7f)
			return false;
	return true;
}

static bool is_https(const char *url)
{
	return strncasecmp(url, "https://", 8) == 0;
}

/* Nothing that could smuggle in a second header or request. */
bool handle_accepts(const struct http_req *req)
{
	if (!is_https(req->url) && strncasecmp(req->url, "http://", 7) != 0)
		return false;
	if (!is_clean(req->url, 0x21) || !is_clean(req->method, 0x21))
		return false;
	for (unsigned i = 0; i < req->headers_n; i++)
		if (!is_clean(req->headers[i].name, 0x21) || !is_clean(req->headers[i].value, 0x20))
			return false;
	return true;
}

static bool is_local(const char *url)
{
	static const char *const hosts[] = { "127.", "localhost:", "localhost/", "[::1]" };
	const char *host = strstr(url, "//") + 2;

	for (unsigned i = 0; i < ARRAY_LEN(hosts); i++)
		if (strncasecmp(host, hosts[i], strlen(hosts[i])) == 0)
			return true;
	return strcasecmp(host, "localhost") == 0;
}

static bool add_header(struct curl_slist **list, const char *name, const char *value)
{
	char line[512];
	_cleanup_free_ char *longer = NULL;
	char *text = line;
	struct curl_slist *more;
	/* "Name;" is curl's way to write an empty one. */
	const char *form = *value ? "%s: %s" : "%s;";
	int n;

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
	n = snprintf(line, sizeof(line), form, name, value);
#pragma GCC diagnostic pop
	if (n >= (int)sizeof(line)) {
		if (asprintf(&longer, "%s: %s", name, value) < 0)
			return false;
		text = longer;
	}
	more = curl_slist_append(*list, text);
	if (more == NULL)
		return false;
	*list = more;
	return true;
}

static bool has_body(const struct http_req *req)
{
	return req->body != NULL || strcmp(req->method, "PUT") == 0 ||
	       strcmp(req->method, "POST") == 0;
}

bool handle_headers(const struct http_req *req, struct curl_slist **list)
{
	/* curl would send it with a body, and it costs a round trip. */
	if (has_body(req) && (*list = curl_slist_append(NULL, "Expect:")) == NULL)
		return false;
	for (unsigned i = 0; i < req->headers_n; i++)
		if (!add_header(list, req->headers[i].name, req->headers[i].value))
			return false;
	return true;
}

static CURLcode set_method(CURL *easy, const struct http_req *req, unsigned conns)
{
	bool is_head = strcmp(req->method, "HEAD") == 0;
	bool is_upload = has_body(req);
	bool is_plain = strcmp(req->method, is_upload ? "PUT" : "GET") == 0 || is_head;
	size_t len = req->body != NULL ? req->body->len : 0;
	CURLcode rc = CURLE_OK;

	SET(CURLOPT_HTTPGET, 1L); /* also takes back what the handle's last request was */
	if (is_head)
		SET(CURLOPT_NOBODY, 1L);
	if (is_upload) {
		SET(CURLOPT_UPLOAD, 1L);
		SET(CURLOPT_INFILESIZE_LARGE, (curl_off_t)len);
		SET(CURLOPT_UPLOAD_BUFFERSIZE,
		    (long)buffer_len(MIN(len, (size_t)UPLOAD_MAX), conns));
	}
	SET(CURLOPT_CUSTOMREQUEST, is_plain ? NULL : req->method);
	return rc;
}

static void set_buffer(struct handle *h, const struct http_req *req)
{
	size_t body_len = req->into != NULL ? req->into->len : 0;
	size_t want = MIN(body_len, (size_t)RECEIVE_MAX - HEAD_ROOM) + HEAD_ROOM;
	long len = (long)buffer_len(want, h->here->conf->conns);

	/* Refused while curl still has the buffer of the last request (HTTP/2): then it uses that one again. */
	(void)curl_easy_setopt(h->easy, CURLOPT_BUFFERSIZE, len);
}

CURLcode handle_set(struct handle *h, const struct http_req *req, struct curl_slist *headers)
{
	bool is_tls = is_https(req->url);
	CURL *easy = h->easy;
	CURLcode rc = set_method(easy, req, h->here->conf->conns);

	set_buffer(h, req);
	SET(CURLOPT_URL, req->url);
	SET(CURLOPT_HTTPHEADER, headers);
	/*
	 * Without TLS there is no way to learn of HTTP/2 but to ask and wait. With it, requests wait for the first
	 * connection, to share it if the server agrees.
	 */
	SET(CURLOPT_HTTP_VERSION,
	    is_tls ? (long)CURL_HTTP_VERSION_2TLS : (long)CURL_HTTP_VERSION_1_1);
	SET(CURLOPT_PIPEWAIT, is_tls ? 1L : 0L);
	SET(CURLOPT_FRESH_CONNECT, req->is_once ? 1L : 0L);
	SET(CURLOPT_NOPROXY, is_local(req->url) ? "*" : NULL);
	return rc;
}
