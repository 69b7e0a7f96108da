/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer s3 against a fake server (s3_fake.h) with the habits that servers have besides RadosGW's:
 * conditional puts that are refused or ignored, no multi-delete, ranges ignored, clocks that
 * differ, keys that expire, words for all kinds of trouble. A real server is in tests/int/t-s3.py.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core_test.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/layer.h"
#include "nbdrs/log.h"
#include "s3_fake.h"

const char *core_failure;

enum { BIG_N = 2500, CHAIN_MAX = 512 };

/* One open chain over the fake. */
struct trial {
	struct s3_fake *f;
	struct spec *spec;
	struct chain *chain;
	struct chan *c;
	struct err err;
	int rc; /* of opening */
};

static struct s3_fake *fake; /* of the test that runs */

static int start(void **state)
{
	fake = s3_fake_start();
	return 0;
}

static int stop(void **state)
{
	s3_fake_stop(fake);
	return 0;
}

/* Opens "s3[options]:http://keys@fake/b/path"; keyed, unless `name` (of an export) is given. */
static CO_FN void open_as(struct trial *t, const char *options, const char *keys, const char *path,
			  const char *name, bool is_ro)
{
	char text[CHAIN_MAX];

	*t = (struct trial){ .f = fake };
	(void)snprintf(text, sizeof(text), "%ss3%s:http://%s127.0.0.1:%d/b/%s", name ? "raw:" : "",
		       options, keys, fake->port, path);
	t->rc = spec_parse(text, &t->spec, &t->err);
	EXPECT(t->rc == 0);
	t->rc = name ? chain_build(t->spec, name, is_ro, &t->chain, &t->err)
		     : chain_build_keyed(t->spec, is_ro, &t->chain, &t->err);
	if (t->rc == 0)
		t->rc = chain_open(t->chain, &t->err);
	if (t->rc == 0)
		t->c = chain_chan(t->chain, &t->rc);
	if (strstr(t->err.msg, FAKE_SECRET))
		EXPECT(!"the secret is in an error");
}

static CO_FN void open_store(struct trial *t)
{
	open_as(t, "[timeout=10s]", FAKE_KEY ":" FAKE_SECRET "@", "p/", NULL, false);
	EXPECT(t->rc == 0);
}

/* Without the probe's requests. */
static CO_FN void open_quiet(struct trial *t)
{
	open_as(t, "[timeout=10s,probe=off]", FAKE_KEY ":" FAKE_SECRET "@", "p/", NULL, false);
	EXPECT(t->rc == 0);
}

static CO_FN void close_trial(struct trial *t)
{
	if (t->chain) {
		EXPECT(chain_close(t->chain) == 0);
		chain_free(t->chain);
	}
	spec_free(t->spec);
}

static struct obj named(const char *name)
{
	struct obj o = { 0 };

	EXPECT(obj_set(&o, name) == 0);
	return o;
}

static CO_FN int put(struct trial *t, const char *name, const char *data, enum put_cond cond,
		     const char *etag, struct obj_stat *st)
{
	struct obj o = named(name);
	struct iovec v = { (char *)(uintptr_t)data, strlen(data) };
	struct iov iov = { &v, 1, strlen(data) };
	struct put p = { .obj = &o, .iov = &iov, .cond = cond, .etag = etag };

	return ch_put(t->c, &p, st);
}

static CO_FN int get(struct trial *t, const char *name, uint64_t off, char *buf, size_t len)
{
	struct obj o = name[0] ? named(name) : obj_none;
	struct iovec v;
	struct iov iov = iov_one(&v, buf, len);

	return ch_read(t->c, (struct ext){ &o, off, len }, &iov, 0);
}

/*
 * Changes a habit. Under the lock, because the thread that sent the last answer may still be looking.
 */
#define SET(field, value)                                \
	do {                                             \
		(void)pthread_mutex_lock(&fake->lock);   \
		fake->field = (value);                   \
		(void)pthread_mutex_unlock(&fake->lock); \
	} while (0)

static void force(unsigned n, const char *method, int status, const char *headers, const char *body)
{
	s3_fake_force(fake, n, method, status, headers, body);
}

/* --- Conditional puts ------------------------------------------------------------------------- */

static CO_FN int conditions(void *arg)
{
	static const struct {
		enum fake_cond cond;
		bool works;
	} cases[] = { { COND_ATOMIC, true },
		      { COND_CONFLICT, true },
		      { COND_IGNORED, false },
		      { COND_UNKNOWN, false },
		      { COND_ONLY_ABSENT, false } };

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		struct obj_stat st = { 0 };
		struct trial t;

		SET(cond, cases[i].cond);
		open_store(&t);
		if (t.rc)
			break;
		EXPECT(!(chain_top(t.chain)->caps & CAN_PUT_IF) == !cases[i].works);
		EXPECT(s3_fake_count(fake) == 0); /* the probe's is gone */
		EXPECT(put(&t, "a", "one", PUT_IF_ABSENT, NULL, &st) ==
		       (cases[i].works ? 0 : -ENOTSUP));
		if (cases[i].works) {
			EXPECT(st.size == 3 && st.etag[0] == 'v');
			EXPECT(put(&t, "a", "two", PUT_IF_ABSENT, NULL, NULL) == -EEXIST);
			EXPECT(put(&t, "a", "two", PUT_IF_MATCH, "v0", NULL) == -ESTALE);
			EXPECT(put(&t, "b", "two", PUT_IF_MATCH, "v0", NULL) == -ESTALE);
			EXPECT(put(&t, "a", "two", PUT_IF_MATCH, st.etag, &st) == 0);
		}
		EXPECT(put(&t, "a", "three", PUT_ALWAYS, NULL, &st) == 0);
		{
			struct obj a = named("a");

			EXPECT(ch_del(t.c, &a, 1) == 0);
		}
		close_trial(&t);
	}
	EXPECT(atomic_load(&fake->bad_hashes) == 0 && !atomic_load(&fake->is_unsorted));
	return 0;
}

/* No right to write: told at once, but not to who only reads. */
static CO_FN int read_only_keys(void *arg)
{
	struct trial t;

	force(1000, "PUT", 403, NULL, "<Error><Code>AccessDenied</Code></Error>");
	open_as(&t, "", FAKE_KEY ":" FAKE_SECRET "@", "p/", NULL, false);
	EXPECT(t.rc == -EACCES && strstr(t.err.msg, "read-only"));
	close_trial(&t);
	open_as(&t, "", FAKE_KEY ":" FAKE_SECRET "@", "p/", NULL, true);
	EXPECT(t.rc == 0 && !(chain_top(t.chain)->caps & CAN_WRITE));
	EXPECT(put(&t, "a", "x", PUT_ALWAYS, NULL, NULL) == -EROFS);
	close_trial(&t);
	return 0;
}

/* --- Reading ---------------------------------------------------------------------------------- */

static CO_FN int ranges(void *arg)
{
	struct trial t;
	char buf[16];

	s3_fake_put(fake, "p/a", "0123456789", 10);
	open_quiet(&t);
	memset(buf, 'x', sizeof(buf));
	EXPECT(get(&t, "a", 4, buf, 16) == 0 && memcmp(buf, "456789\0\0\0\0\0\0\0\0\0\0", 16) == 0);
	EXPECT(get(&t, "a", 10, buf, 4) == 0 && memcmp(buf, "\0\0\0\0", 4) == 0);
	EXPECT(get(&t, "none", 0, buf, 4) == -ENOENT);
	SET(ranges, RANGES_IGNORED);
	EXPECT(get(&t, "a", 0, buf, 16) == 0 && memcmp(buf, "0123456789\0\0\0\0\0\0", 16) == 0);
	EXPECT(get(&t, "a", 2, buf, 16) == -EPROTO); /* fits, but begins elsewhere */
	EXPECT(get(&t, "a", 0, buf, 5) == -EPROTO);
	EXPECT(get(&t, "a", 2, buf, 5) == -EPROTO);
	SET(ranges, RANGES_SHIFTED);
	EXPECT(get(&t, "a", 2, buf, 5) == -EPROTO);
	SET(ranges, RANGES_SHORT);
	EXPECT(get(&t, "a", 2, buf, 8) == -EPROTO);
	SET(ranges, RANGES_FINE);
	force(1, "GET", 206, "Content-Range: bytes 2-5/10\r\nContent-Encoding: gzip\r\n", "2345");
	EXPECT(get(&t, "a", 2, buf, 4) == -EPROTO);
	force(1, "GET", 206, "", "2345");
	EXPECT(get(&t, "a", 2, buf, 4) == -EPROTO);
	force(1, "GET", 206, "Content-Range: bytes 2-5/*\r\n", "2345");
	EXPECT(get(&t, "a", 2, buf, 4) == 0 && memcmp(buf, "2345", 4) == 0);
	EXPECT(get(&t, "a", 2, buf, 4) == 0 && memcmp(buf, "2345", 4) == 0);
	close_trial(&t);
	return 0;
}

/* One object as a disk. */
static CO_FN int pinned(void *arg)
{
	static const char keys[] = FAKE_KEY ":" FAKE_SECRET "@";
	struct trial t;
	char buf[8];

	s3_fake_put(fake, "p/disk", "0123456789", 10);
	open_as(&t, "", keys, "p/", "disk", false);
	EXPECT(t.rc == 0 && chain_top(t.chain)->size == 10 &&
	       !(chain_top(t.chain)->caps & CAN_WRITE));
	EXPECT(get(&t, "", 2, buf, 8) == 0 && memcmp(buf, "23456789", 8) == 0);
	s3_fake_put(fake, "p/disk", "abcdefghij", 10);
	EXPECT(get(&t, "", 2, buf, 8) == -ESTALE);
	close_trial(&t);
	/* Without ETags only another size is seen. */
	SET(has_no_etags, true);
	open_as(&t, "", keys, "p/disk", "other", false);
	EXPECT(t.rc == 0 && get(&t, "", 2, buf, 8) == 0 && memcmp(buf, "cdefghij", 8) == 0);
	s3_fake_put(fake, "p/disk", "abcdefghijk", 11);
	EXPECT(get(&t, "", 2, buf, 8) == -ESTALE);
	close_trial(&t);
	open_as(&t, "", keys, "p/none", "x", false);
	EXPECT(t.rc == -ENOENT && strstr(t.err.msg, "p/none"));
	close_trial(&t);
	return 0;
}

/* --- Many objects ----------------------------------------------------------------------------- */

struct names {
	unsigned n, odd;
	uint64_t bytes;
};

static int note(void *arg, const char *name, uint64_t size)
{
	struct names *names = arg;

	names->n++;
	names->bytes += size;
	names->odd += strcmp(name, "a b+c%&<>'\"=") == 0;
	return 0;
}

static void fill(unsigned n)
{
	char key[64];

	for (unsigned i = 0; i < n; i++) {
		(void)snprintf(key, sizeof(key), "p/block-%u", i);
		s3_fake_put(fake, key, key, 2);
	}
}

static CO_FN int listing(void *arg)
{
	struct names all = { 0 }, some = { 0 }, none = { 0 };
	struct trial t;

	fill(25);
	s3_fake_put(fake, "p/a b+c%&<>'\"=", "", 0);
	s3_fake_put(fake, "p/sub/block-1", "x", 1);
	s3_fake_put(fake, "p/", "x", 1);
	s3_fake_put(fake, "q/block-1", "x", 1);
	SET(page, 10);
	open_quiet(&t);
	atomic_store(&fake->lists, 0);
	/* A page that fails is asked for again, not the whole listing. */
	force(2, "GET", 503, "Retry-After: 0\r\n", "<Error><Code>SlowDown</Code></Error>");
	EXPECT(ch_list(t.c, "", note, &all) == 0 && all.n == 26 && all.odd == 1 && all.bytes == 50);
	EXPECT(atomic_load(&fake->lists) == 3);
	EXPECT(ch_list(t.c, "block-2", note, &some) == 0 && some.n == 6);
	EXPECT(ch_list(t.c, "x", note, &none) == 0 && none.n == 0);
	SET(repeats_token, true);
	EXPECT(ch_list(t.c, "", note, &none) == -EPROTO);
	SET(repeats_token, false);
	force(1000, "GET", 200, NULL, "<html/>");
	EXPECT(ch_list(t.c, "", note, &none) == -EPROTO);
	close_trial(&t);
	EXPECT(!atomic_load(&fake->is_unsorted));
	return 0;
}

static struct obj *blocks(unsigned n)
{
	struct obj *objs = calloc(n, sizeof(*objs));
	char name[32];

	EXPECT(objs != NULL);
	for (unsigned i = 0; i < n; i++) {
		(void)snprintf(name, sizeof(name), "block-%u", i);
		EXPECT(obj_set(&objs[i], name) == 0);
	}
	return objs;
}

static CO_FN int deleting(void *arg)
{
	struct obj *objs = blocks(BIG_N);
	struct trial t;

	fill(BIG_N - 10); /* some are missing already */
	s3_fake_put(fake, "p/block-1x", "", 0);
	open_quiet(&t);
	/* One of the batches fails, but not for long. */
	force(1, "POST", 500, NULL, "<Error><Code>InternalError</Code></Error>");
	EXPECT(ch_del(t.c, objs, BIG_N) == 0 && s3_fake_count(fake) == 1);
	EXPECT(atomic_load(&fake->multi_deletes) == 3 && atomic_load(&fake->deletes) == 0);
	EXPECT(ch_del(t.c, objs, 0) == 0);
	/* One that can't be deleted does not keep the others. */
	fill(20);
	SET(undeletable, "p/block-7");
	EXPECT(ch_del(t.c, objs, 20) == -EACCES);
	EXPECT(s3_fake_count(fake) == 2 && s3_fake_has(fake, "p/block-7") &&
	       s3_fake_has(fake, "p/block-1x"));
	/* What is no answer at all is worth another try. */
	force(1, "POST", 200, NULL, "<Error><Code>InternalError</Code></Error>");
	EXPECT(is_transient(ch_del(t.c, objs, 2)));
	close_trial(&t);
	free(objs);
	EXPECT(atomic_load(&fake->bad_hashes) == 0);
	return 0;
}

static CO_FN int deleting_singly(void *arg)
{
	struct obj *objs = blocks(100);
	struct trial t;

	fill(100);
	SET(has_no_multi_delete, true);
	open_quiet(&t);
	EXPECT(ch_del(t.c, objs, 100) == 0 && s3_fake_count(fake) == 0);
	EXPECT(atomic_load(&fake->deletes) == 100);
	/* It is not asked again. */
	atomic_store(&fake->requests, 0);
	EXPECT(ch_del(t.c, objs, 3) == 0 && atomic_load(&fake->requests) == 3);
	force(1, "DELETE", 404, NULL, "<Error><Code>NoSuchKey</Code></Error>");
	EXPECT(ch_del(t.c, objs, 1) == 0);
	close_trial(&t);
	free(objs);
	return 0;
}

/* --- What servers say ------------------------------------------------------------------------- */

static CO_FN int words(void *arg)
{
	static const struct {
		int status;
		const char *code;
		int rc;
	} cases[] = {
		{ 503, "SlowDown", -EAGAIN },
		{ 503, "", -EAGAIN },
		{ 429, "", -EAGAIN },
		{ 500, "InternalError", -EAGAIN },
		{ 400, "RequestTimeout", -EAGAIN },
		{ 409, "OperationAborted", -EAGAIN },
		{ 400, "BadDigest", -EPROTO },
		{ 400, "XAmzContentSHA256Mismatch", -EPROTO },
		{ 403, "AccessDenied", -EACCES },
		{ 403, "", -EACCES },
		{ 403, "SignatureDoesNotMatch", -EACCES },
		{ 403, "QuotaExceeded", -ENOSPC },
		{ 507, "", -ENOSPC },
		{ 404, "NoSuchBucket", -ENODEV },
		{ 501, "NotImplemented", -ENOTSUP },
		{ 301, "PermanentRedirect", -EREMCHG },
		{ 307, "", -EREMCHG },
		{ 400, "AuthorizationHeaderMalformed", -EREMCHG },
	};
	struct trial t;
	char body[128], buf[4];

	open_quiet(&t);
	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		(void)snprintf(body, sizeof(body),
			       cases[i].code[0] ? "<Error><Code>%s</Code></Error>" : "%s",
			       cases[i].code);
		force(1, "PUT", cases[i].status, NULL, body);
		EXPECT(put(&t, "a", "x", PUT_ALWAYS, NULL, NULL) == cases[i].rc);
		force(1, "GET", cases[i].status, NULL, body);
		EXPECT(get(&t, "a", 0, buf, 4) == cases[i].rc);
	}
	EXPECT(t.c->not_before == 0);
	force(1, "GET", 503, "Retry-After: 7\r\n", "");
	EXPECT(get(&t, "a", 0, buf, 4) == -EAGAIN);
	EXPECT(t.c->not_before > now_ns() + UINT64_C(5000000000) &&
	       t.c->not_before < now_ns() + UINT64_C(7000000000));
	close_trial(&t);
	return 0;
}

static CO_FN int errors_at_open(void *arg)
{
	static const struct {
		int status;
		const char *headers, *body, *word;
	} cases[] = {
		{ 400, NULL,
		  "<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-3</Region></Error>",
		  "region=eu-3" },
		{ 301, "x-amz-bucket-region: ap-2\r\n",
		  "<Error><Code>PermanentRedirect</Code></Error>", "region=ap-2" },
		{ 307, "Location: http://elsewhere/\r\n", "", "http://elsewhere/" },
		{ 403, NULL, "<Error><Code>SignatureDoesNotMatch</Code></Error>", "the secret" },
		{ 403, NULL, "<Error><Code>InvalidAccessKeyId</Code></Error>", "this access key" },
		{ 403, NULL, "<Error><Code>RequestTimeTooSkewed</Code></Error>", "clocks" },
		{ 404, NULL, "<Error><Code>NoSuchBucket</Code></Error>", "no such bucket" },
		{ 404, NULL, "<html>not here</html>", "is this an S3 endpoint?" },
		{ 200, NULL, "<html>hello</html>", "no S3 server" },
		{ 503, NULL, "", "out of order" },
	};

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		struct trial t;
		char where[64];

		force(1000, "", cases[i].status, cases[i].headers, cases[i].body);
		open_as(&t, "", FAKE_KEY ":" FAKE_SECRET "@", "p/", NULL, false);
		(void)snprintf(where, sizeof(where), "http://127.0.0.1:%d", fake->port);
		if (t.rc == 0 || !strstr(t.err.msg, cases[i].word) || !strstr(t.err.msg, where)) {
			print_error("%s: %s\n", cases[i].word, t.err.msg);
			EXPECT(!"a clear error");
		}
		close_trial(&t);
	}
	return 0;
}

/* On a bad network one thing after the other goes wrong at the start: each has tries of its own. */
static CO_FN int bad_start(void *arg)
{
	struct trial t;

	force(3, "", 503, "Retry-After: 0\r\n", NULL);
	s3_fake_force_last(fake, "XAmzContentSHA256Mismatch");
	open_store(&t);
	close_trial(&t);
	return 0;
}

/* --- Clocks and keys -------------------------------------------------------------------------- */

static CO_FN int clocks(void *arg)
{
	static const int64_t offs[] = { 7200, -86400 };

	for (size_t i = 0; i < ARRAY_LEN(offs); i++) {
		struct obj a = named("a");
		struct obj_stat st;
		struct trial t;

		SET(clock_off_s, 0);
		open_quiet(&t);
		/* It goes wrong while we run. HEAD's answer has no body that says so. */
		SET(clock_off_s, offs[i]);
		atomic_store(&fake->skewed, 0);
		EXPECT(ch_stat(t.c, &a, &st) == -ENOENT);
		EXPECT(put(&t, "b", "x", PUT_ALWAYS, NULL, NULL) == 0);
		EXPECT(atomic_load(&fake->skewed) == 1);
		close_trial(&t);
		/* At the start. */
		atomic_store(&fake->skewed, 0);
		open_store(&t);
		EXPECT(atomic_load(&fake->skewed) == 1);
		close_trial(&t);
	}
	return 0;
}

static void write_keys(const char *path, const char *token)
{
	FILE *f = fopen(path, "w");

	EXPECT(f != NULL);
	if (f) {
		EXPECT(fprintf(f, "%s\n%s\n%s\n", FAKE_KEY, FAKE_SECRET, token) > 0);
		EXPECT(fclose(f) == 0);
	}
}

/* A session's keys expire; the file has new ones by then. */
static CO_FN int expiry(void *arg)
{
	const char *path = arg;
	char options[CHAIN_MAX], buf[4];
	struct trial t;

	(void)snprintf(options, sizeof(options), "[probe=off,key_file=%s]", path);
	write_keys(path, "first");
	SET(token, "first");
	open_as(&t, options, "", "p/", NULL, false);
	EXPECT(t.rc == 0 && get(&t, "a", 0, buf, 4) == -ENOENT);
	SET(token, "next");
	write_keys(path, "next");
	EXPECT(get(&t, "a", 0, buf, 4) == -ENOENT);
	/* Not read again with every request. */
	SET(token, "last");
	EXPECT(get(&t, "a", 0, buf, 4) == -EACCES);
	close_trial(&t);
	/* Stale from the start: there is nothing new to be read. */
	SET(token, "second");
	open_as(&t, options, "", "p/", NULL, false);
	EXPECT(t.rc == -EACCES && strstr(t.err.msg, "expired"));
	close_trial(&t);
	return 0;
}

static CO_FN int anonymous(void *arg)
{
	struct trial t;
	char buf[4];

	open_as(&t, "", "", "p/", NULL, true);
	EXPECT(t.rc == -EACCES && strstr(t.err.msg, "no keys were found"));
	close_trial(&t);
	SET(is_public, true);
	s3_fake_put(fake, "p/a", "abcd", 4);
	open_as(&t, "", "", "p/", NULL, true);
	EXPECT(t.rc == 0 && get(&t, "a", 0, buf, 4) == 0 && memcmp(buf, "abcd", 4) == 0);
	close_trial(&t);
	EXPECT(atomic_load(&fake->unsigned_requests) == atomic_load(&fake->requests));
	return 0;
}

/* --- The run ---------------------------------------------------------------------------------- */

static void test_body(void **state)
{
	core_run(*state, NULL);
}

static void test_expiry(void **state)
{
	const char *tmp = getenv("TMPDIR");
	char path[256];
	int fd;

	(void)snprintf(path, sizeof(path), "%s/nbdrs-s3-keys-XXXXXX", tmp ? tmp : "/tmp");
	fd = mkstemp(path);
	assert_true(fd >= 0);
	close(fd);
	core_run(expiry, path);
	unlink(path);
}

/* As a user without any keys at home. */
static int start_all(void **state)
{
	static const char *const variables[] = { "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
						 "AWS_SESSION_TOKEN", "AWS_PROFILE",
						 "AWS_CONFIG_FILE",   "AWS_SHARED_CREDENTIALS_FILE",
						 "AWS_REGION",        "AWS_DEFAULT_REGION" };

	for (size_t i = 0; i < ARRAY_LEN(variables); i++)
		(void)unsetenv(variables[i]);
	(void)setenv("HOME", "/nonexistent", 1);
	log_set_level(LOG_LEVEL_ERROR); /* provoked warnings are no news */
	return core_start(state);
}

#define BODY(fn)                                                   \
	{                                                          \
#fn, test_body, start, stop, (void *)(uintptr_t)fn \
	}

int main(void)
{
	const struct CMUnitTest tests[] = {
		BODY(conditions),      BODY(read_only_keys),
		BODY(ranges),          BODY(pinned),
		BODY(listing),         BODY(deleting),
		BODY(deleting_singly), BODY(words),
		BODY(errors_at_open),  BODY(clocks),
		BODY(anonymous),       BODY(bad_start),
		cmocka_unit_test_setup_teardown(test_expiry, start, stop),
	};

	return cmocka_run_group_tests(tests, start_all, core_stop);
}
