/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The HTTP client against a server of the test's own (http_server.h): answers of every kind, errors, deadlines,
 * reuse of connections, many requests at a time, and its end.
 */
#include "core_test.h"

#include <errno.h>
#include <stdio.h>

#include "http_server.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/http.h"

const char *core_failure;

enum { MS = 1000000, SHORT_MS = 150, LONG_MS = 30000 };

static struct http_server *server;

static int set_up(void **state)
{
	server = http_server_start();
	return core_start(state);
}

static int tear_down(void **state)
{
	int rc = core_stop(state);

	http_server_stop(server);
	return rc;
}

/* One request with its answer. */
struct ask {
	const char *method, *path;
	const struct http_header *headers;
	unsigned headers_n;
	const struct iov *body, *into;
	struct http_resp resp;
	int rc;
};

static CO_FN int ask(struct http *h, struct ask *a)
{
	char url[512];
	struct http_req req = { .method = a->method ? a->method : "GET",
				.url = url,
				.headers = a->headers,
				.headers_n = a->headers_n,
				.body = a->body,
				.into = a->into };

	(void)snprintf(url, sizeof(url), "http://127.0.0.1:%d%s", server->port, a->path);
	return a->rc = http_do(h, &req, &a->resp);
}

static struct http *new_client(unsigned conns, unsigned timeout_ms)
{
	struct http_conf conf = { .conns = conns, .timeout_ns = (uint64_t)timeout_ms * MS };
	struct http *h = NULL;
	struct err err;

	EXPECT(http_new(&conf, &h, &err) == 0);
	return h;
}

static CO_FN void end_client(struct http *h)
{
	http_close_here(h);
	http_free(h);
}

/* GET without `into`; the text must be as said. */
static CO_FN void expect_text(struct http *h, const char *path, int status, const char *text)
{
	struct ask a = { .path = path };

	EXPECT(ask(h, &a) == 0);
	EXPECT(a.resp.status == status);
	EXPECT(a.resp.text != NULL && strcmp(a.resp.text, text) == 0);
	EXPECT(a.resp.body_len == strlen(text) && a.resp.text_len == strlen(text));
	http_resp_free(&a.resp);
}

/* ---- answers ---- */

static CO_FN int answers_body(void *arg)
{
	struct http *h = new_client(4, LONG_MS);
	struct ask a = { .path = "/fixed" };

	(void)arg;
	EXPECT(ask(h, &a) == 0);
	EXPECT(a.resp.status == 200 && a.resp.content_len == 5 && a.resp.date == 0);
	EXPECT(strcmp(a.resp.etag, "e1") == 0 && strcmp(a.resp.region, "eu-west-9") == 0);
	EXPECT(strcmp(a.resp.location, "/there") == 0 && a.resp.accepts_ranges);
	EXPECT(strcmp(a.resp.last_modified, "Thu, 01 Jan 1970 00:00:10 GMT") == 0);
	EXPECT(!a.resp.has_range && a.resp.retry_after_ns == 0 && !a.resp.is_encoded);
	EXPECT(a.resp.text && strcmp(a.resp.text, "hello") == 0);
	http_resp_free(&a.resp);

	expect_text(h, "/chunked", 200, "hello");
	expect_text(h, "/continue", 200, "hello");
	expect_text(h, "/status/404", 404, "text");

	a = (struct ask){ .path = "/status/503" };
	EXPECT(ask(h, &a) == 0 && a.resp.status == 503 && a.resp.date == 100 &&
	       a.resp.retry_after_ns == 7ULL * 1000 * MS);
	http_resp_free(&a.resp);
	a = (struct ask){ .path = "/redirect" };
	EXPECT(ask(h, &a) == 0 && a.resp.status == 301);
	EXPECT(strcmp(a.resp.location, "http://127.0.0.1:1/") == 0);
	http_resp_free(&a.resp);
	a = (struct ask){ .path = "/data", .method = "HEAD" };
	EXPECT(ask(h, &a) == 0 && a.resp.status == 200 && a.resp.content_len == 1 << 20);
	EXPECT(a.resp.body_len == 0 && a.resp.text == NULL);
	http_resp_free(&a.resp);
	/* A long text of an error is cut, and the connection stays usable. */
	a = (struct ask){ .path = "/long-error" };
	EXPECT(ask(h, &a) == 0 && a.resp.status == 404 && a.resp.body_len == 200000);
	EXPECT(a.resp.text_len == 65536);
	http_resp_free(&a.resp);
	/* A trailer changes nothing any more. */
	a = (struct ask){ .path = "/chunked" };
	EXPECT(ask(h, &a) == 0 && a.resp.etag[0] == '\0' && a.resp.content_len == UINT64_MAX);
	http_resp_free(&a.resp);
	EXPECT(server->conns == 1); /* all of it on one */
	end_client(h);
	return 0;
}

static void test_answers(void **state)
{
	(void)state;
	core_run(answers_body, NULL);
}

/* What is sent, to the letter. */
static CO_FN int sent_body(void *arg)
{
	static const struct http_header headers[] = { { "X-One", "1" }, { "X-Empty", "" } };
	struct http *h = new_client(4, LONG_MS);
	struct ask a = { .path = "/echo/../a%2Fb/./c?x=%20", .headers = headers, .headers_n = 2 };

	(void)arg;
	EXPECT(ask(h, &a) == 0 && a.resp.status == 200 && a.resp.text != NULL);
	if (a.resp.text != NULL) {
		EXPECT(strncmp(a.resp.text, "GET /echo/../a%2Fb/./c?x=%20 HTTP/1.1\r\n", 39) == 0);
		EXPECT(strstr(a.resp.text, "\r\nX-One: 1\r\n") &&
		       strstr(a.resp.text, "\r\nX-Empty:\r\n"));
		EXPECT(!strcasestr(a.resp.text, "\r\nexpect:") &&
		       !strcasestr(a.resp.text, "\r\naccept-encoding:"));
	}
	http_resp_free(&a.resp);
	/* No body is still a length where the method has one, and nothing stays of the last request. */
	a = (struct ask){ .path = "/echo", .method = "POST" };
	EXPECT(ask(h, &a) == 0 && a.resp.text && strstr(a.resp.text, "\r\nContent-Length: 0\r\n"));
	EXPECT(a.resp.text && strncmp(a.resp.text, "POST ", 5) == 0 &&
	       !strstr(a.resp.text, "X-One"));
	http_resp_free(&a.resp);
	a = (struct ask){ .path = "/echo", .method = "DELETE" };
	EXPECT(ask(h, &a) == 0 && a.resp.text && strncmp(a.resp.text, "DELETE ", 7) == 0);
	http_resp_free(&a.resp);
	a = (struct ask){ .path = "/echo" };
	EXPECT(ask(h, &a) == 0 && a.resp.text && strncmp(a.resp.text, "GET ", 4) == 0);
	EXPECT(a.resp.text && !strcasestr(a.resp.text, "content-length"));
	http_resp_free(&a.resp);
	end_client(h);
	return 0;
}

static void test_sent(void **state)
{
	(void)state;
	core_run(sent_body, NULL);
}

/* ---- bodies ---- */

enum { BODY_MAX = 4 << 20, PARTS = 5 };

/* Splits `buf` unevenly. */
static struct iov in_parts(struct iovec *v, uint8_t *buf, size_t len)
{
	size_t at = 0;

	for (unsigned i = 0; i < PARTS; i++) {
		size_t part = i == PARTS - 1 ? len - at : len / 9 * (i + 1) / 2;

		v[i] = (struct iovec){ buf + at, part };
		at += part;
	}
	return (struct iov){ v, PARTS, len };
}

static CO_FN void get_range(struct http *h, uint8_t *buf, unsigned from, unsigned len)
{
	char range[64];
	struct http_header header = { "Range", range };
	struct iovec v[PARTS];
	struct iov into = in_parts(v, buf, len);
	struct ask a = { .path = "/data", .headers = &header, .headers_n = 1, .into = &into };
	unsigned bad = 0;

	(void)snprintf(range, sizeof(range), "bytes=%u-%u", from, from + len - 1);
	memset(buf, 0xee, len + 1);
	EXPECT(ask(h, &a) == 0 && a.resp.status == 206 && a.resp.body_len == len);
	EXPECT(a.resp.has_range && a.resp.range_from == from && a.resp.range_to == from + len);
	EXPECT(a.resp.range_total == server->data_len && strcmp(a.resp.etag, "v1") == 0);
	for (unsigned i = 0; i < len; i++)
		bad += buf[i] != http_pattern(from + i);
	EXPECT(bad == 0 && buf[len] == 0xee);
	http_resp_free(&a.resp);
}

static CO_FN int bodies_body(void *arg)
{
	static const size_t lengths[] = { 100, 4096, 65536, 1000000, BODY_MAX };
	_cleanup_free_ uint8_t *buf = malloc(BODY_MAX + 1);
	struct http *h = new_client(4, LONG_MS);
	struct http_header all = { "Range", "bytes=0-99" };
	struct iovec v[PARTS];
	struct iov iov;
	struct ask a;

	(void)arg;
	server->data_len = BODY_MAX;
	for (unsigned i = 0; i < ARRAY_LEN(lengths); i++)
		get_range(h, buf, 0, (unsigned)lengths[i]);
	get_range(h, buf, 1234567, 54321);
	for (unsigned i = 0; i < ARRAY_LEN(lengths); i++) {
		char want[16];

		for (size_t k = 0; k < lengths[i]; k++)
			buf[k] = http_pattern(k);
		iov = in_parts(v, buf, lengths[i]);
		a = (struct ask){ .path = "/put", .method = i & 1 ? "POST" : "PUT", .body = &iov };
		(void)snprintf(want, sizeof(want), "%8zu", lengths[i]);
		EXPECT(ask(h, &a) == 0 && a.resp.status == 200);
		EXPECT(a.resp.text && strcmp(a.resp.text, want) == 0 &&
		       strcmp(a.resp.etag, "new") == 0);
		http_resp_free(&a.resp);
	}
	/* The answer is not the range asked for, but all of it: nothing is written beyond `into`. */
	server->has_ranges = false;
	memset(buf, 0xee, 101);
	iov = iov_one(v, buf, 100);
	a = (struct ask){ .path = "/data", .headers = &all, .headers_n = 1, .into = &iov };
	EXPECT(ask(h, &a) == -EPROTO && a.resp.status == 200 && buf[100] == 0xee);
	http_resp_free(&a.resp);
	server->has_ranges = true;
	/* The text of an error goes elsewhere. */
	a = (struct ask){ .path = "/status/403", .into = &iov };
	EXPECT(ask(h, &a) == 0 && a.resp.status == 403 && a.resp.text &&
	       strcmp(a.resp.text, "text") == 0);
	EXPECT(buf[0] == 0xee);
	http_resp_free(&a.resp);
	/* Less than `into` is the caller's to judge. */
	a = (struct ask){ .path = "/fixed", .into = &iov };
	EXPECT(ask(h, &a) == 0 && a.resp.body_len == 5 && memcmp(buf, "hello", 5) == 0);
	http_resp_free(&a.resp);
	end_client(h);
	return 0;
}

static void test_bodies(void **state)
{
	(void)state;
	core_run(bodies_body, NULL);
}

/* ---- errors ---- */

static CO_FN void expect_error(struct http *h, const char *path, int rc)
{
	struct ask a = { .path = path };

	EXPECT(ask(h, &a) == rc);
	if (a.rc != rc)
		print_error("%s: %d instead of %d (%s)\n", path, a.rc, rc, a.resp.error);
	EXPECT(a.resp.error[0] != '\0');
	http_resp_free(&a.resp);
}

static CO_FN int do_url(struct http *h, const struct http_req *req)
{
	struct http_resp resp;
	int rc = http_do(h, req, &resp);

	http_resp_free(&resp);
	return rc;
}

static CO_FN int errors_body(void *arg)
{
	struct http *h = new_client(4, LONG_MS);
	struct http_header evil = { "X-Evil", "1\r\nX-More: 2" };
	struct http_req req = { .method = "GET", .url = "http://127.0.0.1:1/" };

	(void)arg;
	expect_error(h, "/early", -ECONNRESET);
	expect_error(h, "/reset", -ECONNRESET);
	expect_error(h, "/garbage", -EPROTO);
	expect_text(h, "/chunked", 200, "hello"); /* goes on as if nothing had been */
	EXPECT(do_url(h, &req) == -ECONNREFUSED);
	req.url = "http://does-not-exist.invalid/";
	EXPECT(do_url(h, &req) == -EHOSTUNREACH);
	req.url = "ftp://127.0.0.1/";
	EXPECT(do_url(h, &req) == -EINVAL);
	req.url = "http://127.0.0.1/a b";
	EXPECT(do_url(h, &req) == -EINVAL);
	req.url = "http://me:secret@127.0.0.1/";
	EXPECT(do_url(h, &req) == -EINVAL);
	req = (struct http_req){
		.method = "GET", .url = "http://127.0.0.1/", .headers = &evil, .headers_n = 1
	};
	EXPECT(do_url(h, &req) == -EINVAL);
	end_client(h);
	return 0;
}

static void test_errors(void **state)
{
	(void)state;
	core_run(errors_body, NULL);
}

static CO_FN int deadlines_body(void *arg)
{
	struct http *h = new_client(4, SHORT_MS);
	struct ask good = { .path = "/chunked" };
	uint64_t start = now_ns();
	int rc = -ETIMEDOUT;

	(void)arg;
	expect_error(h, "/stall", -ETIMEDOUT);
	EXPECT(now_ns() - start >= (uint64_t)SHORT_MS * MS);
	expect_error(h, "/stall-body", -ETIMEDOUT);
	/* It goes on as if nothing had been; on a busy machine that may take longer, too. */
	for (unsigned i = 0; i < 100 && rc == -ETIMEDOUT; i++)
		rc = ask(h, &good);
	EXPECT(rc == 0 && strcmp(good.resp.text, "hello") == 0);
	http_resp_free(&good.resp);
	end_client(h);
	return 0;
}

static void test_deadlines(void **state)
{
	(void)state;
	core_run(deadlines_body, NULL);
}

static void test_status_errors(void **state)
{
	static const struct {
		int status, rc;
	} table[] = {
		{ 200, 0 },        { 206, 0 },           { 204, 0 },           { 404, -ENOENT },
		{ 410, -ENOENT },  { 401, -EACCES },     { 403, -EACCES },     { 429, -EAGAIN },
		{ 500, -EAGAIN },  { 502, -EAGAIN },     { 503, -EAGAIN },     { 504, -EAGAIN },
		{ 408, -EAGAIN },  { 412, -ESTALE },     { 409, -EBUSY },      { 416, -ERANGE },
		{ 507, -ENOSPC },  { 301, -EREMCHG },    { 302, -EREMCHG },    { 307, -EREMCHG },
		{ 308, -EREMCHG }, { 501, -EOPNOTSUPP }, { 405, -EOPNOTSUPP }, { 400, -EINVAL },
		{ 418, -EINVAL },  { 304, -EPROTO },     { 599, -EPROTO },     { 0, -EPROTO },
	};

	(void)state;
	for (unsigned i = 0; i < ARRAY_LEN(table); i++)
		assert_int_equal(http_status_error(table[i].status), table[i].rc);
}

/* ---- connections ---- */

/* The server closes what the client keeps: the next request must not notice. */
static CO_FN int reuse_body(void *arg)
{
	struct http *h = new_client(4, LONG_MS);
	_cleanup_free_ uint8_t *buf = malloc(BODY_MAX);
	struct iovec v[PARTS];
	struct iov iov = in_parts(v, buf, BODY_MAX);
	struct ask a;

	(void)arg;
	for (size_t i = 0; i < BODY_MAX; i++)
		buf[i] = http_pattern(i);
	for (unsigned i = 0; i < 20; i++)
		expect_text(h, "/chunked", 200, "hello");
	EXPECT(server->conns == 1 && server->requests == 20);
	for (unsigned i = 0; i < 20; i++) {
		expect_text(h, "/last", 200, "hello");
		a = (struct ask){ .path = "/put", .method = "PUT", .body = &iov };
		EXPECT(ask(h, &a) == 0 && a.resp.status == 200);
		http_resp_free(&a.resp);
	}
	EXPECT(server->conns >= 20);
	/* Closed here and begun anew. */
	http_close_here(h);
	expect_text(h, "/chunked", 200, "hello");
	end_client(h);
	return 0;
}

static void test_reuse(void **state)
{
	(void)state;
	core_run(reuse_body, NULL);
}

enum { CROWD = 300, CONNS = 16 };

struct crowd {
	struct http *http;
	const char *path;
	unsigned done, failed;
};

static CO_FN void crowd_one(void *arg)
{
	struct crowd *c = arg;
	struct ask a = { .path = c->path };

	if (ask(c->http, &a) != 0)
		c->failed++;
	c->done++;
	http_resp_free(&a.resp);
}

static CO_FN int crowd_body(void *arg)
{
	struct crowd c = { .http = new_client(CONNS, LONG_MS), .path = "/gate" };
	struct co_group group = CO_GROUP_INIT;

	(void)arg;
	server->gate_n = CONNS; /* nobody gets an answer before so many are there */
	for (unsigned i = 0; i < CROWD; i++)
		co_group_spawn(&group, crowd_one, &c);
	co_group_wait(&group);
	EXPECT(c.done == CROWD && c.failed == 0);
	EXPECT(server->at_gate_max == CONNS && server->conns == CONNS && server->requests == CROWD);
	end_client(c.http);
	return 0;
}

static void test_crowd(void **state)
{
	(void)state;
	core_run(crowd_body, NULL);
}

/* More than one multi handle can hold, all of them at the same time; then a silent server for all. */
static CO_FN int wide_body(void *arg)
{
	struct crowd c = { .http = new_client(CROWD, LONG_MS), .path = "/gate" };
	struct crowd stalled = { .http = new_client(CROWD, SHORT_MS), .path = "/stall" };
	struct co_group group = CO_GROUP_INIT;

	(void)arg;
	server->gate_n = CROWD;
	for (unsigned i = 0; i < CROWD; i++)
		co_group_spawn(&group, crowd_one, &c);
	co_group_wait(&group);
	EXPECT(c.failed == 0 && server->at_gate_max == CROWD && server->conns == CROWD);
	end_client(c.http);
	for (unsigned i = 0; i < CROWD; i++)
		co_group_spawn(&group, crowd_one, &stalled);
	co_group_wait(&group);
	EXPECT(stalled.done == CROWD && stalled.failed == CROWD);
	end_client(stalled.http);
	return 0;
}

static void test_wide(void **state)
{
	(void)state;
	core_run(wide_body, NULL);
}

/* ---- several reactors, and the counters ---- */

struct counts {
	uint64_t good, missing, none, other;
};

static void add_count(void *arg, const char *method, int status, uint64_t n)
{
	struct counts *c = arg;

	if (strcmp(method, "GET") == 0 && status == 200)
		c->good += n;
	else if (strcmp(method, "GET") == 0 && status == 404)
		c->missing += n;
	else if (strcmp(method, "GET") == 0 && status == 0)
		c->none += n;
	else
		c->other += n;
}

static CO_FN int counted_here(void *arg)
{
	struct http *h = arg;

	for (unsigned i = 0; i < 10; i++) {
		expect_text(h, "/chunked", 200, "hello");
		expect_text(h, "/status/404", 404, "text");
	}
	expect_error(h, "/reset", -ECONNRESET);
	http_close_here(h);
	return 0;
}

static CO_FN int counts_body(void *arg)
{
	struct http *h = new_client(4, LONG_MS);
	struct counts c = { 0 };

	(void)arg;
	for (unsigned i = 0; i < CORE_TEST_THREADS; i++)
		EXPECT(reactor_call(reactor_get(i), counted_here, h) == 0);
	http_each_count(h, add_count, &c);
	EXPECT(c.good == 30 && c.missing == 30 && c.none == 3 && c.other == 0);
	http_free(h);
	return 0;
}

static void test_counts(void **state)
{
	(void)state;
	core_run(counts_body, NULL);
}

static void test_bad_conf(void **state)
{
	struct http_conf conf = { .conns = 0, .timeout_ns = MS };
	struct http *h = NULL;
	struct err err;

	(void)state;
	assert_int_equal(http_new(&conf, &h, &err), -EINVAL);
	conf.conns = 1;
	conf.ca_file = "/does/not/exist.pem";
	assert_int_equal(http_new(&conf, &h, &err), -ENOENT);
	assert_non_null(strstr(err.msg, "/does/not/exist.pem"));
	http_free(NULL);
}

#define WITH_SERVER(fn) cmocka_unit_test_setup_teardown(fn, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		WITH_SERVER(test_answers),       WITH_SERVER(test_sent),
		WITH_SERVER(test_bodies),        WITH_SERVER(test_errors),
		WITH_SERVER(test_deadlines),     cmocka_unit_test(test_status_errors),
		WITH_SERVER(test_reuse),         WITH_SERVER(test_crowd),
		WITH_SERVER(test_wide),          WITH_SERVER(test_counts),
		cmocka_unit_test(test_bad_conf),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
