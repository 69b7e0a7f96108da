/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * HTTP requests of fibers: takes them, lines them up, sets curl's options, waits.
 *
 *	in line -> (slot) -> with curl -> done
 *
 * A client may have any number of requests, of which `conns` at a time on each reactor have a slot, an easy handle and
 * a connection; the rest waits in line with nothing but its fiber's stack, first come, first served. So memory stays
 * bounded however long a server stalls. The deadline runs from the moment of the slot: a request is not to blame for
 * those before it.
 *
 * A request ends in transfer_done(), on the reactor's own stack, when curl does not know of it any more. Only then
 * its fiber goes on: curl never points into the stack of a fiber that returned.
 *
 * Proxies: as the environment says (http_proxy, HTTPS_PROXY, NO_PROXY), because in networks that need one every other
 * program gets out by it. Never for the machine itself: a store on 127.0.0.1 is not reached through a proxy elsewhere.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "client/http_int.h"
#include "nbdrs/io.h"

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
enum { METHODS = 6, STATUSES = 600 };

static const char *const methods[METHODS] = { "GET", "HEAD", "PUT", "POST", "DELETE", "other" };

struct http {
	struct http_conf conf;          /* the texts are ours */
	struct here *here[REACTOR_MAX]; /* each used by its own reactor only */
	/* Relaxed: they order nothing. */
	_Atomic uint64_t counts[METHODS][STATUSES];
};

/* ---- the client ---- */

static CURLcode global_rc;

static void global_init(void)
{
	global_rc = curl_global_init(CURL_GLOBAL_DEFAULT);
}

/* strdup that knows NULL. False when out of memory. */
static bool copy_str(const char *from, const char **to)
{
	*to = from ? strdup(from) : NULL;
	return from == NULL || *to != NULL;
}

int http_new(const struct http_conf *conf, struct http **out, struct err *err)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct http *h;

	if (conf->conns < 1 || conf->conns > HTTP_CONNS_MAX)
		return err_set(err, -EINVAL, "%u connections: must be 1 to %d", conf->conns,
			       HTTP_CONNS_MAX);
	if (conf->ca_file != NULL && access(conf->ca_file, R_OK) != 0)
		return err_set(err, -errno, "cannot read the certificates in %s: %s", conf->ca_file,
			       strerror(errno));
	(void)pthread_once(&once, global_init); /* cannot fail */
	if (global_rc != CURLE_OK)
		return err_set(err, -ENOMEM, "libcurl does not start: %s",
			       curl_easy_strerror(global_rc));
	h = calloc(1, sizeof(*h));
	if (h == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	h->conf = *conf;
	h->conf.ca_file = h->conf.resolve = NULL;
	if (!copy_str(conf->ca_file, &h->conf.ca_file) ||
	    !copy_str(conf->resolve, &h->conf.resolve)) {
		http_free(h);
		return err_set(err, -ENOMEM, "out of memory");
	}
	*out = h;
	return 0;
}

void http_free(struct http *h)
{
	if (h == NULL)
		return;
	for (unsigned i = 0; i < REACTOR_MAX; i++)
		assert(h->here[i] == NULL);
	free((char *)(uintptr_t)h->conf.ca_file);
	free((char *)(uintptr_t)h->conf.resolve);
	free(h);
}

static void count(struct http *h, const char *method, int status)
{
	unsigned m = 0;

	while (m < METHODS - 1 && strcmp(method, methods[m]) != 0)
		m++;
	if (status < 0 || status >= STATUSES)
		status = 0;
	atomic_fetch_add_explicit(&h->counts[m][status], 1, memory_order_relaxed);
}

void http_each_count(struct http *h,
		     void (*fn)(void *arg, const char *method, int status, uint64_t n), void *arg)
{
	for (unsigned m = 0; m < METHODS; m++)
		for (int status = 0; status < STATUSES; status++) {
			uint64_t n =
				atomic_load_explicit(&h->counts[m][status], memory_order_relaxed);

			if (n > 0)
				fn(arg, methods[m], status, n);
		}
}

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

static void handle_free(struct handle *h)
{
	if (h == NULL)
		return;
	curl_easy_cleanup(h->easy); /* NULL is fine */
	curl_slist_free_all(h->resolve);
	free(h);
}

static struct handle *handle_new(struct here *here)
{
	const struct http_conf *conf = &here->http->conf;
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

static struct handle *handle_get(struct here *here)
{
	struct list *n = list_pop(&here->handles);

	return n != NULL ? list_entry(n, struct handle, node) : handle_new(here);
}

static void handle_put(struct handle *h)
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
static bool is_good(const struct http_req *req)
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

static bool make_headers(const struct http_req *req, struct curl_slist **list)
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
	long len = (long)buffer_len(want, h->here->http->conf.conns);

	/* Refused while curl still has the buffer of the last request (HTTP/2): then it uses that one again. */
	(void)curl_easy_setopt(h->easy, CURLOPT_BUFFERSIZE, len);
}

static CURLcode set_request(struct handle *h, const struct http_req *req,
			    struct curl_slist *headers)
{
	bool is_tls = is_https(req->url);
	CURL *easy = h->easy;
	CURLcode rc = set_method(easy, req, h->here->http->conf.conns);

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

/* ---- on its way ---- */

static struct here *here_get(struct http *http)
{
	unsigned i = reactor_index(reactor_self());
	struct here *h = http->here[i];

	if (h != NULL)
		return h;
	h = calloc(1, sizeof(*h));
	if (h == NULL)
		return NULL;
	h->http = http;
	list_init(&h->line);
	list_init(&h->handles);
	return http->here[i] = h;
}

static CO_FN void take_slot(struct here *h, struct transfer *t)
{
	if (h->running < h->http->conf.conns) {
		h->running++;
		return;
	}
	list_add(&h->line, &t->node);
	while (!t->has_slot)
		co_park();
}

/* To the first in line, if there is one. */
static void give_slot(struct here *h)
{
	struct list *n = list_pop(&h->line);
	struct transfer *t;

	if (n == NULL) {
		h->running--;
		return;
	}
	t = list_entry(n, struct transfer, node);
	t->has_slot = true;
	co_wake(t->co);
}

void transfer_done(struct transfer *t)
{
	timer_stop(&t->deadline);
	t->is_done = true;
	co_wake(t->co);
}

static void deadline_passed(struct timer *timer)
{
	struct transfer *t = container_of(timer, struct transfer, deadline);

	loop_suspect(t);
	loop_drop(t);
	t->code = CURLE_OPERATION_TIMEDOUT;
	t->rc = -ETIMEDOUT;
	transfer_done(t);
}

static void explain(struct transfer *t, const struct here *here)
{
	const struct handle *h = t->handle;
	char *out = t->resp->error;

	if (t->rc == -ETIMEDOUT)
		(void)snprintf(out, sizeof(t->resp->error), "no answer within %" PRIu64 " ms",
			       here->http->conf.timeout_ns / 1000000);
	else if (t->rc == -EPROTO)
		(void)snprintf(out, sizeof(t->resp->error), "the body is longer than expected");
	else
		(void)snprintf(out, sizeof(t->resp->error), "%s",
			       h->error[0] ? h->error : curl_easy_strerror(t->code));
}

static int result(struct transfer *t, const struct here *here)
{
	long os_errno = 0;

	if (t->code == CURLE_OK)
		return 0;
	(void)curl_easy_getinfo(t->handle->easy, CURLINFO_OS_ERRNO, &os_errno);
	explain(t, here);
	return t->rc != 0 ? t->rc : resp_error(t->code, os_errno);
}

static CO_FN int run_once(struct here *here, struct transfer *t)
{
	int rc;

	t->is_done = t->is_head_over = false;
	t->sent = 0;
	t->rc = 0;
	t->handle->error[0] = '\0';
	rc = timer_start(&t->deadline, t->start_ns + here->http->conf.timeout_ns);
	if (rc == 0)
		rc = loop_add(here, t);
	while (rc == 0 && !t->is_done)
		co_park();
	timer_stop(&t->deadline);
	return rc != 0 ? rc : result(t, here);
}

/*
 * Did a kept connection die without a word? curl itself sends anew if it notices that on reading, not if it notices
 * while it still sends the body.
 */
static bool was_stale(const struct transfer *t)
{
	long connects = 1;

	if (t->code != CURLE_SEND_ERROR && t->code != CURLE_RECV_ERROR &&
	    t->code != CURLE_GOT_NOTHING && t->code != CURLE_HTTP2)
		return false;
	(void)curl_easy_getinfo(t->handle->easy, CURLINFO_NUM_CONNECTS, &connects);
	return connects == 0 && t->resp->status == 0 && t->rc == 0;
}

/* With a slot: an easy handle, there and back. */
static CO_FN int run(struct here *here, struct transfer *t, struct curl_slist *headers)
{
	struct handle *h = handle_get(here);
	int rc;

	if (h == NULL)
		return -ENOMEM;
	h->transfer = t;
	t->handle = h;
	t->start_ns = now_ns();
	timer_init(&t->deadline, deadline_passed);
	rc = set_request(h, t->req, headers) == CURLE_OK ? run_once(here, t) : -ENOMEM;
	if (rc == -ECONNRESET && was_stale(t) &&
	    curl_easy_setopt(h->easy, CURLOPT_FRESH_CONNECT, 1L) == CURLE_OK)
		rc = run_once(here, t);
	(void)curl_easy_setopt(h->easy, CURLOPT_HTTPHEADER, NULL); /* the list goes now */
	handle_put(h);
	return rc;
}

int http_do(struct http *http, const struct http_req *req, struct http_resp *resp)
{
	struct transfer t = { .req = req, .resp = resp, .co = co_self() };
	struct here *here = here_get(http);
	struct curl_slist *headers = NULL;
	int rc;

	resp_init(resp);
	if (!is_good(req))
		return -EINVAL;
	if (here == NULL)
		return -ENOMEM;
	take_slot(here, &t);
	rc = make_headers(req, &headers) ? run(here, &t, headers) : -ENOMEM;
	curl_slist_free_all(headers);
	give_slot(here);
	count(http, req->method, resp->status);
	return rc;
}

/* ---- the end ---- */

struct closing {
	struct reactor_msg msg;
	struct here *here;
	struct co *co;
	bool is_done;
};

static void close_curl(void *arg)
{
	struct closing *c = arg;
	struct list *n;

	while ((n = list_pop(&c->here->handles)) != NULL)
		handle_free(list_entry(n, struct handle, node));
	loop_close(c->here);
	c->is_done = true;
	co_wake(c->co);
}

void http_close_here(struct http *http)
{
	unsigned i = reactor_index(reactor_self());
	struct closing c = { .here = http->here[i], .co = co_self() };

	/*
	 * An instance can have several channels on a reactor (a layer's own for background work beside that of the
	 * requests above). While another one is at work the connections stay; the last to close finds nothing running.
	 */
	if (c.here == NULL || c.here->running > 0)
		return;
	http->here[i] = NULL;
	reactor_post(reactor_self(), &c.msg, close_curl, &c);
	c.here->closer = c.co;
	while (!c.is_done || c.here->socks_alive > 0)
		co_park();
	free(c.here->socks);
	free(c.here);
}
