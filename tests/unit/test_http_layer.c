/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layers http and https, against the server of http_server.h: what is read, what is refused and in which words, and
 * what happens to those who change an object that is served.
 */
#include "core_test.h"

#include <errno.h>
#include <stdio.h>

#include "http_server.h"
#include "layer/http/http_object.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/spec.h"

const char *core_failure;

enum { MI = 1 << 20, DATA_LEN = 3 * MI + 12345 };

static struct http_server *server;

static int set_up(void **state)
{
	server = http_server_start();
	server->data_len = DATA_LEN;
	return core_start(state);
}

static int tear_down(void **state)
{
	int rc = core_stop(state);

	http_server_stop(server);
	return rc;
}

/* ---- chains ---- */

struct disk {
	struct spec *spec;
	struct chain *chain;
	struct err err;
	int rc;
};

/* `text` with %d for the port. */
static CO_FN int disk_open(struct disk *d, const char *text, const char *export_name)
{
	char chain[512];

	*d = (struct disk){ 0 };
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
	(void)snprintf(chain, sizeof(chain), text, server->port);
#pragma GCC diagnostic pop
	d->rc = spec_parse(chain, &d->spec, &d->err);
	if (d->rc == 0)
		d->rc = chain_build(d->spec, export_name, true, &d->chain, &d->err);
	if (d->rc == 0)
		d->rc = chain_open(d->chain, &d->err);
	return d->rc;
}

static CO_FN void disk_close(struct disk *d)
{
	if (d->chain != NULL)
		EXPECT(chain_close(d->chain) == 0);
	chain_free(d->chain);
	spec_free(d->spec);
}

/* Opening fails with that; the text has `word` in it, and no secret. */
static CO_FN void expect_refusal(const char *text, int rc, const char *word)
{
	struct disk d;

	(void)disk_open(&d, text, "disk0");
	if (d.rc != rc || (rc != 0 && !strstr(d.err.msg, word)))
		print_error("%s: %d (%s)\n", text, d.rc, d.err.msg);
	EXPECT(d.rc == rc && strstr(d.err.msg, word) != NULL && !strstr(d.err.msg, "cret"));
	disk_close(&d);
}

static CO_FN int read_at(struct disk *d, uint64_t off, uint8_t *buf, size_t len)
{
	struct iovec v[2] = { { buf, len / 3 }, { buf + len / 3, len - len / 3 } };
	struct iov iov = { v, 2, len };
	struct chan *c;
	int rc;

	c = chain_chan(d->chain, &rc);
	return c != NULL ? ch_read(c, (struct ext){ &obj_none, off, len }, &iov, 0) : rc;
}

static CO_FN void expect_data(struct disk *d, uint64_t off, size_t len)
{
	_cleanup_free_ uint8_t *buf = calloc(1, len);
	size_t bad = 0;

	EXPECT(read_at(d, off, buf, len) == 0);
	for (size_t i = 0; i < len; i++)
		bad += buf[i] != http_pattern(off + i);
	EXPECT(bad == 0);
}

static CO_FN void expect_read_error(struct disk *d, int rc)
{
	uint8_t buf[4096];
	int got = read_at(d, 4096, buf, sizeof(buf));

	if (got != rc)
		print_error("read: %d instead of %d\n", got, rc);
	EXPECT(got == rc);
}

/* ---- reading ---- */

static CO_FN int read_here(void *arg)
{
	struct disk *d = arg;

	expect_data(d, 0, 512);
	expect_data(d, 511, 3);
	expect_data(d, 4096, 4096);
	expect_data(d, DATA_LEN - 700, 700);
	expect_data(d, 0, DATA_LEN);
	return 0;
}

static CO_FN int reading_body(void *arg)
{
	struct disk d;

	(void)arg;
	if (disk_open(&d, "raw:http://127.0.0.1:%d/data", "disk0") == 0) {
		const struct layer *top = chain_top(d.chain);

		EXPECT(top->size == DATA_LEN && top->caps == (CAN_MULTI | IS_REMOTE));
		for (unsigned i = 0; i < CORE_TEST_THREADS; i++)
			EXPECT(reactor_call(reactor_get(i), read_here, &d) == 0);
		server->is_short = true; /* it gives less than was asked for */
		expect_data(&d, 1000, 5);
		server->is_short = false;
	}
	EXPECT(d.rc == 0);
	disk_close(&d);
	/* In a folder. */
	EXPECT(disk_open(&d, "raw:http://127.0.0.1:%d/data/", "disk0") == 0);
	expect_data(&d, 0, 512);
	disk_close(&d);
	/* Empty. */
	server->data_len = 0;
	EXPECT(disk_open(&d, "http://127.0.0.1:%d/data", NULL) == 0 &&
	       chain_top(d.chain)->size == 0);
	disk_close(&d);
	return 0;
}

static void test_reading(void **state)
{
	(void)state;
	core_run(reading_body, NULL);
}

/* Where the size comes from if not from the first range. */
static CO_FN int size_body(void *arg)
{
	struct disk d;

	(void)arg;
	server->has_total = false;
	EXPECT(disk_open(&d, "http://127.0.0.1:%d/data", NULL) == 0 &&
	       chain_top(d.chain)->size == DATA_LEN);
	expect_data(&d, DATA_LEN - 700, 700);
	disk_close(&d);
	server->has_head = false;
	expect_refusal("http://127.0.0.1:%d/data", -EOPNOTSUPP, "HTTP 405");
	return 0;
}

static void test_size(void **state)
{
	(void)state;
	core_run(size_body, NULL);
}

/* ---- who may ---- */

static CO_FN void auth_by_file(const char *text, int rc, const char *word)
{
	char path[] = "/tmp/nbdrs-headers-XXXXXX", chain[256];
	_cleanup_close_ int fd = mkstemp(path);

	EXPECT(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	(void)snprintf(chain, sizeof(chain), "raw:http[header_file=%s]://127.0.0.1:%%d/data", path);
	expect_refusal(chain, rc, word);
	(void)unlink(path);
}

static CO_FN int auth_body(void *arg)
{
	struct disk d;

	(void)arg;
	server->needs_auth = true;
	expect_refusal("raw:http://127.0.0.1:%d/data", -EACCES, "user:password@");
	expect_refusal("raw:http://me:wrong-se%%20cret@127.0.0.1:%d/data", -EACCES,
		       "access refused");
	expect_refusal("raw:http://me@127.0.0.1:%d/data", -EACCES, "access refused");
	EXPECT(disk_open(&d, "raw:http://m%%65:se%%20cret@127.0.0.1:%d/data", NULL) == 0);
	expect_data(&d, 4096, 4096);
	disk_close(&d);
	auth_by_file("# who\n\nX-One: 1\r\nAuthorization: Basic bWU6c2UgY3JldA==\n", 0, "");
	auth_by_file("X-One: 1\nno colon\n", -EINVAL, "line 2");
	auth_by_file("X-One: 1\nRange: bytes=0-1\n", -EINVAL,
		     "line 2: this header is set by nbdrs");
	auth_by_file("X One: 1\n", -EINVAL, "line 1: the name");
	auth_by_file("X-One: \x01\n", -EINVAL, "line 1: the value");
	expect_refusal("raw:http[header_file=/does/not/exist]://127.0.0.1:%d/data", -ENOENT,
		       "/does/not/exist");
	return 0;
}

static void test_auth(void **state)
{
	(void)state;
	core_run(auth_body, NULL);
}

/* ---- refusals ---- */

static CO_FN int refusals_body(void *arg)
{
	(void)arg;
	expect_refusal("raw:http://127.0.0.1:%d/status/404?sig=secret", -ENOENT,
		       "/status/404?*** does not exist");
	expect_refusal("raw:http://u:secret@127.0.0.1:%d/status/410", -ENOENT, "does not exist");
	expect_refusal("raw:http://127.0.0.1:%d/status/400", -EINVAL, "HTTP 400");
	expect_refusal("raw:http://127.0.0.1:%d/redirect", -EREMCHG,
		       "has moved to http://127.0.0.1:1/");
	expect_refusal("raw:http://127.0.0.1:%d/garbage", -EPROTO, "/garbage: ");
	expect_refusal("raw:http://127.0.0.1:1/x", -ECONNREFUSED, "127.0.0.1:1/x: ");
	expect_refusal("raw:http://does-not-exist.invalid/x", -EHOSTUNREACH,
		       "does-not-exist.invalid");
	expect_refusal("raw:http[timeout=100ms]://127.0.0.1:%d/stall", -ETIMEDOUT,
		       "no answer within 100 ms");
	expect_refusal("raw:https://127.0.0.1:%d/data", -EPROTO, "https://127.0.0.1");
	expect_refusal("raw:http://127.0.0.1:%d/fixed", -EOPNOTSUPP, "does not serve ranges");
	server->is_encoded = true;
	expect_refusal("raw:http://127.0.0.1:%d/data", -EOPNOTSUPP, "Content-Encoding");
	server->is_encoded = false;
	server->has_ranges = false;
	expect_refusal("raw:http://127.0.0.1:%d/data", -EOPNOTSUPP, "does not serve ranges");
	expect_refusal("raw:http[ca_file=/does/not/exist]://127.0.0.1:%d/data", -ENOENT,
		       "/does/not/exist");
	expect_refusal("sharded:http://127.0.0.1:%d/data", -EINVAL, "http");
	return 0;
}

static void test_refusals(void **state)
{
	(void)state;
	core_run(refusals_body, NULL);
}

static void test_urls(void **state)
{
	static const struct {
		const char *target, *name, *url,
			*basic; /* url NULL: refused, with `basic` in the message */
	} table[] = {
		{ "//h/x.iso", "n", "http://h/x.iso", NULL },
		{ "//h:81/a%20b/c@d:e?q=1/2", "n", "http://h:81/a%20b/c@d:e?q=1/2", NULL },
		{ "//h/a/", "n", "http://h/a/n", NULL },
		{ "//h/a/?q=1", "my disk", "http://h/a/my%20disk?q=1", NULL },
		{ "//h", "n", "http://h/n", NULL },
		{ "//h?q=1", "n", "http://h/n?q=1", NULL },
		{ "//[::1]:80/x", "n", "http://[::1]:80/x", NULL },
		{ "//me:se%20cret@h/x", "n", "http://h/x", "Basic bWU6c2UgY3JldA==" },
		{ "//me@h/x", "n", "http://h/x", "Basic bWU6" },
		{ "//a:b:@c@h/x", "n", "http://h/x", "Basic YTpiOkBj" },
		{ "//h/../x", "n", "http://h/../x", NULL },
		{ "/x", "n", NULL, "needs a URL" },
		{ "", "n", NULL, "needs a URL" },
		{ "///x", "n", NULL, "no host" },
		{ "//u:p@/x", "n", NULL, "no host" },
		{ "//h/a b", "n", NULL, "percent-encode" },
		{ "//h/a#b", "n", NULL, "percent-encode" },
		{ "//h/", NULL, NULL, "name the object" },
		{ "//h/", "..", NULL, "cannot be an object" },
		{ "//h/", "a/b", NULL, "cannot be an object" },
		{ "//u:100%@h/", "n", NULL, "password" },
		{ "//u%3a:p@h/", "n", NULL, "user" },
		{ "//u:%0ap@h/", "n", NULL, "password" },
	};

	(void)state;
	for (unsigned i = 0; i < ARRAY_LEN(table); i++) {
		_cleanup_free_ char *url = NULL, *basic = NULL;
		struct err err = { "" };
		int rc = object_parse_url("http", table[i].target, table[i].name, &url, &basic,
					  &err);

		if (table[i].url == NULL) {
			assert_int_equal(rc, -EINVAL);
			if (!strstr(err.msg, table[i].basic))
				fail_msg("%s: %s", table[i].target, err.msg);
			continue;
		}
		assert_int_equal(rc, 0);
		assert_string_equal(url, table[i].url);
		if (table[i].basic != NULL)
			assert_string_equal(basic, table[i].basic);
		else
			assert_null(basic);
	}
}

/* ---- changes ---- */

static CO_FN int changes_body(void *arg)
{
	struct disk d;

	(void)arg;
	server->modified = 10;
	EXPECT(disk_open(&d, "raw:http://127.0.0.1:%d/data", "disk0") == 0);
	expect_data(&d, 0, 4096);
	server->etag = 2;
	expect_read_error(&d, -ESTALE);
	expect_read_error(&d, -ESTALE);
	server->has_ranges = false; /* the new one comes as a whole */
	expect_read_error(&d, -ESTALE);
	server->has_ranges = true;
	server->etag = 1;
	server->modified = 20; /* another server's copy of the same */
	expect_data(&d, 0, 4096);
	server->data_len = 4096; /* shorter: first the read behind its end ... */
	expect_read_error(&d, -ESTALE);
	server->data_len = DATA_LEN + 1; /* ... then longer */
	expect_read_error(&d, -ESTALE);
	server->data_len = DATA_LEN;
	expect_data(&d, 0, 4096);
	server->is_encoded = true;
	expect_read_error(&d, -EPROTO);
	server->is_encoded = false;
	server->has_ranges = false;
	expect_read_error(&d, -EPROTO);
	server->has_ranges = true;
	disk_close(&d);
	/* Without ETags the date must do. */
	server->etag = -1;
	EXPECT(disk_open(&d, "raw:http://127.0.0.1:%d/data", "disk0") == 0);
	expect_data(&d, 0, 4096);
	server->modified = 30;
	expect_read_error(&d, -ESTALE);
	disk_close(&d);
	return 0;
}

static void test_changes(void **state)
{
	(void)state;
	core_run(changes_body, NULL);
}

/* ---- what operators see ---- */

struct seen {
	struct info info;
	char text[1024];
};

static void see(struct info *i, const char *key, const char *value)
{
	struct seen *s = container_of(i, struct seen, info);
	size_t len = strlen(s->text);

	(void)snprintf(s->text + len, sizeof(s->text) - len, "%s=%s;", key, value);
}

static CO_FN int shown_body(void *arg)
{
	struct seen s = { .info = { see } };
	struct layer *l;
	struct disk d;

	(void)arg;
	EXPECT(disk_open(&d, "http://me:secret@127.0.0.1:%d/data?token=secret", NULL) == 0);
	expect_data(&d, 0, 4096);
	l = chain_top(d.chain);
	l->ops->status(l, &s.info);
	EXPECT(strstr(s.text, "etag=v1;") && strstr(s.text, "GET 206=2;") &&
	       !strstr(s.text, "secret"));
	EXPECT(strstr(s.text, "/data?***;") != NULL);
	EXPECT(chain_close(d.chain) == 0);
	s.text[0] = '\0'; /* closed: it looks for itself */
	l->ops->info(l, &s.info);
	EXPECT(strstr(s.text, "size=3158073;") && strstr(s.text, "etag=v1;") &&
	       !strstr(s.text, "secret"));
	server->needs_auth = true;
	s.text[0] = '\0';
	l->ops->info(l, &s.info);
	EXPECT(strstr(s.text, "error=") && !strstr(s.text, "secret"));
	disk_close(&d);
	return 0;
}

static void test_shown(void **state)
{
	(void)state;
	core_run(shown_body, NULL);
}

#define WITH_SERVER(fn) cmocka_unit_test_setup_teardown(fn, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		WITH_SERVER(test_reading),  WITH_SERVER(test_size),      WITH_SERVER(test_auth),
		WITH_SERVER(test_refusals), cmocka_unit_test(test_urls), WITH_SERVER(test_changes),
		WITH_SERVER(test_shown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
