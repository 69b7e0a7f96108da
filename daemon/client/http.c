/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * HTTP requests of fibers: takes them, lines them up, waits.
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
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/http_int.h"
#include "nbdrs/io.h"

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
	h->conf = &http->conf;
	list_init(&h->line);
	list_init(&h->handles);
	return http->here[i] = h;
}

static CO_FN void take_slot(struct here *h, struct transfer *t)
{
	if (h->running < h->conf->conns) {
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
			       here->conf->timeout_ns / 1000000);
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
	rc = timer_start(&t->deadline, t->start_ns + here->conf->timeout_ns);
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
	rc = handle_set(h, t->req, headers) == CURLE_OK ? run_once(here, t) : -ENOMEM;
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
	if (!handle_accepts(req))
		return -EINVAL;
	if (here == NULL)
		return -ENOMEM;
	take_slot(here, &t);
	rc = handle_headers(req, &headers) ? run(here, &t, headers) : -ENOMEM;
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
