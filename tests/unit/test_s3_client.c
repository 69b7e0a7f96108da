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

#include "nbdrs/cleanup.h"
#include "nbdrs/layer.h"
#include "nbdrs/log.h"
#include "s3_trial.h"

const char *core_failure;

enum { BIG_N = 2500 };

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

		TRIAL_SET(cond, cases[i].cond);
		trial_open_store(&t);
		if (t.rc)
			break;
		EXPECT(!(chain_top(t.chain)->caps & CAN_PUT_IF) == !cases[i].works);
		EXPECT(s3_fake_count(fake) == 0); /* the probe's is gone */
		EXPECT(trial_put(&t, "a", "one", PUT_IF_ABSENT, NULL, &st) ==
		       (cases[i].works ? 0 : -ENOTSUP));
		if (cases[i].works) {
			EXPECT(st.size == 3 && st.etag[0] == 'v');
			EXPECT(trial_put(&t, "a", "two", PUT_IF_ABSENT, NULL, NULL) == -EEXIST);
			EXPECT(trial_put(&t, "a", "two", PUT_IF_MATCH, "v0", NULL) == -ESTALE);
			EXPECT(trial_put(&t, "b", "two", PUT_IF_MATCH, "v0", NULL) == -ESTALE);
			EXPECT(trial_put(&t, "a", "two", PUT_IF_MATCH, st.etag, &st) == 0);
		}
		EXPECT(trial_put(&t, "a", "three", PUT_ALWAYS, NULL, &st) == 0);
		{
			struct obj a = trial_obj("a");

			EXPECT(ch_del(t.c, &a, 1) == 0);
		}
		trial_close(&t);
	}
	EXPECT(atomic_load(&fake->bad_hashes) == 0 && !atomic_load(&fake->is_unsorted));
	return 0;
}

/* No right to write: told at once, but not to who only reads. */
static CO_FN int read_only_keys(void *arg)
{
	struct trial t;

	trial_force(1000, "PUT", 403, NULL, "<Error><Code>AccessDenied</Code></Error>");
	trial_open(&t, "", FAKE_KEY ":" FAKE_SECRET "@", "p/", NULL, false);
	EXPECT(t.rc == -EACCES && strstr(t.err.msg, "read-only"));
	trial_close(&t);
	trial_open(&t, "", FAKE_KEY ":" FAKE_SECRET "@", "p/", NULL, true);
	EXPECT(t.rc == 0 && !(chain_top(t.chain)->caps & CAN_WRITE));
	EXPECT(trial_put(&t, "a", "x", PUT_ALWAYS, NULL, NULL) == -EROFS);
	trial_close(&t);
	return 0;
}

/* --- Reading ---------------------------------------------------------------------------------- */

static CO_FN int ranges(void *arg)
{
	struct trial t;
	char buf[16];

	s3_fake_put(fake, "p/a", "0123456789", 10);
	trial_open_quiet(&t);
	memset(buf, 'x', sizeof(buf));
	EXPECT(trial_get(&t, "a", 4, buf, 16) == 0 && memcmp(buf, "456789\0\0\0\0\0\0\0\0\0\0", 16) == 0);
	EXPECT(trial_get(&t, "a", 10, buf, 4) == 0 && memcmp(buf, "\0\0\0\0", 4) == 0);
	EXPECT(trial_get(&t, "none", 0, buf, 4) == -ENOENT);
	TRIAL_SET(ranges, RANGES_IGNORED);
	EXPECT(trial_get(&t, "a", 0, buf, 16) == 0 && memcmp(buf, "0123456789\0\0\0\0\0\0", 16) == 0);
	EXPECT(trial_get(&t, "a", 2, buf, 16) == -EPROTO); /* fits, but begins elsewhere */
	EXPECT(trial_get(&t, "a", 0, buf, 5) == -EPROTO);
	EXPECT(trial_get(&t, "a", 2, buf, 5) == -EPROTO);
	TRIAL_SET(ranges, RANGES_SHIFTED);
	EXPECT(trial_get(&t, "a", 2, buf, 5) == -EPROTO);
	TRIAL_SET(ranges, RANGES_SHORT);
	EXPECT(trial_get(&t, "a", 2, buf, 8) == -EPROTO);
	TRIAL_SET(ranges, RANGES_FINE);
	trial_force(1, "GET", 206, "Content-Range: bytes 2-5/10\r\nContent-Encoding: gzip\r\n", "2345");
	EXPECT(trial_get(&t, "a", 2, buf, 4) == -EPROTO);
	trial_force(1, "GET", 206, "", "2345");
	EXPECT(trial_get(&t, "a", 2, buf, 4) == -EPROTO);
	trial_force(1, "GET", 206, "Content-Range: bytes 2-5/*\r\n", "2345");
	EXPECT(trial_get(&t, "a", 2, buf, 4) == 0 && memcmp(buf, "2345", 4) == 0);
	EXPECT(trial_get(&t, "a", 2, buf, 4) == 0 && memcmp(buf, "2345", 4) == 0);
	trial_close(&t);
	return 0;
}

/* One object as a disk. */
static CO_FN int pinned(void *arg)
{
	static const char keys[] = FAKE_KEY ":" FAKE_SECRET "@";
	struct trial t;
	char buf[8];

	s3_fake_put(fake, "p/disk", "0123456789", 10);
	trial_open(&t, "", keys, "p/", "disk", false);
	EXPECT(t.rc == 0 && chain_top(t.chain)->size == 10 &&
	       !(chain_top(t.chain)->caps & CAN_WRITE));
	EXPECT(trial_get(&t, "", 2, buf, 8) == 0 && memcmp(buf, "23456789", 8) == 0);
	s3_fake_put(fake, "p/disk", "abcdefghij", 10);
	EXPECT(trial_get(&t, "", 2, buf, 8) == -ESTALE);
	trial_close(&t);
	/* Without ETags only another size is seen. */
	TRIAL_SET(has_no_etags, true);
	trial_open(&t, "", keys, "p/disk", "other", false);
	EXPECT(t.rc == 0 && trial_get(&t, "", 2, buf, 8) == 0 && memcmp(buf, "cdefghij", 8) == 0);
	s3_fake_put(fake, "p/disk", "abcdefghijk", 11);
	EXPECT(trial_get(&t, "", 2, buf, 8) == -ESTALE);
	trial_close(&t);
	trial_open(&t, "", keys, "p/none", "x", false);
	EXPECT(t.rc == -ENOENT && strstr(t.err.msg, "p/none"));
	trial_close(&t);
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
	TRIAL_SET(page, 10);
	trial_open_quiet(&t);
	atomic_store(&fake->lists, 0);
	/* A page that fails is asked for again, not the whole listing. */
	trial_force(2, "GET", 503, "Retry-After: 0\r\n", "<Error><Code>SlowDown</Code></Error>");
	EXPECT(ch_list(t.c, "", note, &all) == 0 && all.n == 26 && all.odd == 1 && all.bytes == 50);
	EXPECT(atomic_load(&fake->lists) == 3);
	EXPECT(ch_list(t.c, "block-2", note, &some) == 0 && some.n == 6);
	EXPECT(ch_list(t.c, "x", note, &none) == 0 && none.n == 0);
	TRIAL_SET(repeats_token, true);
	EXPECT(ch_list(t.c, "", note, &none) == -EPROTO);
	TRIAL_SET(repeats_token, false);
	trial_force(1000, "GET", 200, NULL, "<html/>");
	EXPECT(ch_list(t.c, "", note, &none) == -EPROTO);
	trial_close(&t);
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
	trial_open_quiet(&t);
	/* One of the batches fails, but not for long. */
	trial_force(1, "POST", 500, NULL, "<Error><Code>InternalError</Code></Error>");
	EXPECT(ch_del(t.c, objs, BIG_N) == 0 && s3_fake_count(fake) == 1);
	EXPECT(atomic_load(&fake->multi_deletes) == 3 && atomic_load(&fake->deletes) == 0);
	EXPECT(ch_del(t.c, objs, 0) == 0);
	/* One that can't be deleted does not keep the others. */
	fill(20);
	TRIAL_SET(undeletable, "p/block-7");
	EXPECT(ch_del(t.c, objs, 20) == -EACCES);
	EXPECT(s3_fake_count(fake) == 2 && s3_fake_has(fake, "p/block-7") &&
	       s3_fake_has(fake, "p/block-1x"));
	/* What is no answer at all is worth another try. */
	trial_force(1, "POST", 200, NULL, "<Error><Code>InternalError</Code></Error>");
	EXPECT(is_transient(ch_del(t.c, objs, 2)));
	trial_close(&t);
	free(objs);
	EXPECT(atomic_load(&fake->bad_hashes) == 0);
	return 0;
}

static CO_FN int deleting_singly(void *arg)
{
	struct obj *objs = blocks(100);
	struct trial t;

	fill(100);
	TRIAL_SET(has_no_multi_delete, true);
	trial_open_quiet(&t);
	EXPECT(ch_del(t.c, objs, 100) == 0 && s3_fake_count(fake) == 0);
	EXPECT(atomic_load(&fake->deletes) == 100);
	/* It is not asked again. */
	atomic_store(&fake->requests, 0);
	EXPECT(ch_del(t.c, objs, 3) == 0 && atomic_load(&fake->requests) == 3);
	trial_force(1, "DELETE", 404, NULL, "<Error><Code>NoSuchKey</Code></Error>");
	EXPECT(ch_del(t.c, objs, 1) == 0);
	trial_close(&t);
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

	trial_open_quiet(&t);
	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		(void)snprintf(body, sizeof(body),
			       cases[i].code[0] ? "<Error><Code>%s</Code></Error>" : "%s",
			       cases[i].code);
		trial_force(1, "PUT", cases[i].status, NULL, body);
		EXPECT(trial_put(&t, "a", "x", PUT_ALWAYS, NULL, NULL) == cases[i].rc);
		trial_force(1, "GET", cases[i].status, NULL, body);
		EXPECT(trial_get(&t, "a", 0, buf, 4) == cases[i].rc);
	}
	EXPECT(t.c->not_before == 0);
	trial_force(1, "GET", 503, "Retry-After: 7\r\n", "");
	EXPECT(trial_get(&t, "a", 0, buf, 4) == -EAGAIN);
	EXPECT(t.c->not_before > now_ns() + UINT64_C(5000000000) &&
	       t.c->not_before < now_ns() + UINT64_C(7000000000));
	trial_close(&t);
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

		trial_force(1000, "", cases[i].status, cases[i].headers, cases[i].body);
		trial_open(&t, "", FAKE_KEY ":" FAKE_SECRET "@", "p/", NULL, false);
		(void)snprintf(where, sizeof(where), "http://127.0.0.1:%d", fake->port);
		if (t.rc == 0 || !strstr(t.err.msg, cases[i].word) || !strstr(t.err.msg, where)) {
			print_error("%s: %s\n", cases[i].word, t.err.msg);
			EXPECT(!"a clear error");
		}
		trial_close(&t);
	}
	return 0;
}

/* On a bad network one thing after the other goes wrong at the start: each has tries of its own. */
static CO_FN int bad_start(void *arg)
{
	struct trial t;

	trial_force(3, "", 503, "Retry-After: 0\r\n", NULL);
	s3_fake_force_last(fake, "XAmzContentSHA256Mismatch");
	trial_open_store(&t);
	trial_close(&t);
	return 0;
}

/* --- Clocks and keys -------------------------------------------------------------------------- */

static CO_FN int clocks(void *arg)
{
	static const int64_t offs[] = { 7200, -86400 };

	for (size_t i = 0; i < ARRAY_LEN(offs); i++) {
		struct obj a = trial_obj("a");
		struct obj_stat st;
		struct trial t;

		TRIAL_SET(clock_off_s, 0);
		trial_open_quiet(&t);
		/* It goes wrong while we run. HEAD's answer has no body that says so. */
		TRIAL_SET(clock_off_s, offs[i]);
		atomic_store(&fake->skewed, 0);
		EXPECT(ch_stat(t.c, &a, &st) == -ENOENT);
		EXPECT(trial_put(&t, "b", "x", PUT_ALWAYS, NULL, NULL) == 0);
		EXPECT(atomic_load(&fake->skewed) == 1);
		trial_close(&t);
		/* At the start. */
		atomic_store(&fake->skewed, 0);
		trial_open_store(&t);
		EXPECT(atomic_load(&fake->skewed) == 1);
		trial_close(&t);
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
	TRIAL_SET(token, "first");
	trial_open(&t, options, "", "p/", NULL, false);
	EXPECT(t.rc == 0 && trial_get(&t, "a", 0, buf, 4) == -ENOENT);
	TRIAL_SET(token, "next");
	write_keys(path, "next");
	EXPECT(trial_get(&t, "a", 0, buf, 4) == -ENOENT);
	/* Not read again with every request. */
	TRIAL_SET(token, "last");
	EXPECT(trial_get(&t, "a", 0, buf, 4) == -EACCES);
	trial_close(&t);
	/* Stale from the start: there is nothing new to be read. */
	TRIAL_SET(token, "second");
	trial_open(&t, options, "", "p/", NULL, false);
	EXPECT(t.rc == -EACCES && strstr(t.err.msg, "expired"));
	trial_close(&t);
	return 0;
}

static CO_FN int anonymous(void *arg)
{
	struct trial t;
	char buf[4];

	trial_open(&t, "", "", "p/", NULL, true);
	EXPECT(t.rc == -EACCES && strstr(t.err.msg, "no keys were found"));
	trial_close(&t);
	TRIAL_SET(is_public, true);
	s3_fake_put(fake, "p/a", "abcd", 4);
	trial_open(&t, "", "", "p/", NULL, true);
	EXPECT(t.rc == 0 && trial_get(&t, "a", 0, buf, 4) == 0 && memcmp(buf, "abcd", 4) == 0);
	trial_close(&t);
	EXPECT(atomic_load(&fake->unsigned_requests) == atomic_load(&fake->requests));
	return 0;
}

/* --- The run ---------------------------------------------------------------------------------- */

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

int main(void)
{
	const struct CMUnitTest tests[] = {
		TRIAL(conditions),      TRIAL(read_only_keys),
		TRIAL(ranges),          TRIAL(pinned),
		TRIAL(listing),         TRIAL(deleting),
		TRIAL(deleting_singly), TRIAL(words),
		TRIAL(errors_at_open),  TRIAL(clocks),
		TRIAL(anonymous),       TRIAL(bad_start),
		cmocka_unit_test_setup_teardown(test_expiry, trial_start, trial_stop),
	};

	return cmocka_run_group_tests(tests, trial_start_all, core_stop);
}
