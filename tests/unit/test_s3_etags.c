/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What layer s3 remembers of objects: what replaces what, what is not kept, what makes room.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <string.h>

#include "layer/s3/s3_etags.h"

static struct obj named(const char *name)
{
	struct obj o;

	assert_int_equal(obj_set(&o, name), 0);
	return o;
}

static struct obj block(unsigned n)
{
	char name[32];

	(void)snprintf(name, sizeof(name), "block-%u", n);
	return named(name);
}

static void expect(struct s3_etags *t, const struct obj *o, enum s3_known known, const char *etag)
{
	char out[S3_ETAG_LEN_MAX + 1] = "";

	assert_int_equal(s3_etags_get(t, o, out), known);
	if (etag)
		assert_string_equal(out, etag);
}

static void test_replace(void **state)
{
	struct s3_etags *t = s3_etags_new(64);
	const struct obj a = named("a"), b = named("b");

	assert_non_null(t);
	expect(t, &a, S3_UNKNOWN, NULL);
	s3_etags_put(t, &a, "one");
	expect(t, &a, S3_THERE, "one");
	expect(t, &b, S3_UNKNOWN, NULL);
	s3_etags_put(t, &a, "two");
	expect(t, &a, S3_THERE, "two");
	/* A read may have been overtaken. */
	s3_etags_saw(t, &a, "one");
	s3_etags_saw(t, &a, NULL);
	expect(t, &a, S3_THERE, "two");
	s3_etags_del(t, &a);
	expect(t, &a, S3_ABSENT, NULL);
	s3_etags_saw(t, &a, "two");
	expect(t, &a, S3_ABSENT, NULL);
	s3_etags_forget(t, &a);
	expect(t, &a, S3_UNKNOWN, NULL);
	s3_etags_saw(t, &a, "three");
	expect(t, &a, S3_THERE, "three");
	s3_etags_forget(t, &a);
	s3_etags_saw(t, &a, NULL);
	expect(t, &a, S3_ABSENT, NULL);
	s3_etags_forget(t, &b); /* nothing there */
	s3_etags_free(t);
	s3_etags_free(NULL);
}

static void test_lengths(void **state)
{
	struct s3_etags *t = s3_etags_new(64);
	const struct obj a = named("a");
	char etag[S3_ETAG_LEN_MAX + 2];

	assert_non_null(t);
	memset(etag, 'x', sizeof(etag));
	etag[S3_ETAG_LEN_MAX + 1] = '\0';
	s3_etags_put(t, &a, "kept");
	s3_etags_saw(t, &a, etag);
	s3_etags_saw(t, &a, "");
	expect(t, &a, S3_THERE, "kept");
	/* Cut off it would match nothing; the older one is out of date. */
	s3_etags_put(t, &a, etag);
	expect(t, &a, S3_UNKNOWN, NULL);
	s3_etags_put(t, &a, "kept");
	s3_etags_put(t, &a, "");
	expect(t, &a, S3_UNKNOWN, NULL);
	etag[S3_ETAG_LEN_MAX] = '\0';
	s3_etags_put(t, &a, etag);
	expect(t, &a, S3_THERE, etag);
	s3_etags_free(t);
}

/* In one set: the one unused for longest goes; to be asked for is to be used. */
static void test_room(void **state)
{
	struct s3_etags *t = s3_etags_new(S3_ETAGS_WAYS);
	struct obj o[S3_ETAGS_WAYS + 2];

	assert_non_null(t);
	for (unsigned i = 0; i < S3_ETAGS_WAYS + 2; i++)
		o[i] = block(i);
	for (unsigned i = 0; i < S3_ETAGS_WAYS; i++)
		s3_etags_put(t, &o[i], "e");
	expect(t, &o[0], S3_THERE, "e");
	s3_etags_put(t, &o[S3_ETAGS_WAYS], "n");
	expect(t, &o[1], S3_UNKNOWN, NULL);
	for (unsigned i = 0; i <= S3_ETAGS_WAYS; i++)
		if (i != 1)
			expect(t, &o[i], S3_THERE, i < S3_ETAGS_WAYS ? "e" : "n");
	/* What was forgotten makes room before anything else. */
	s3_etags_forget(t, &o[3]);
	s3_etags_del(t, &o[S3_ETAGS_WAYS + 1]);
	expect(t, &o[3], S3_UNKNOWN, NULL);
	expect(t, &o[S3_ETAGS_WAYS + 1], S3_ABSENT, NULL);
	for (unsigned i = 0; i <= S3_ETAGS_WAYS; i++)
		if (i != 1 && i != 3)
			expect(t, &o[i], S3_THERE, i < S3_ETAGS_WAYS ? "e" : "n");
	s3_etags_free(t);
}

/* The names that volumes have are spread over the sets: three quarters full, few are lost; never one for another. */
static void test_spread(void **state)
{
	struct s3_etags *t = s3_etags_new(S3_ETAGS_MAX);
	const unsigned n = S3_ETAGS_MAX / 4 * 3;
	unsigned lost = 0;
	char etag[32], out[S3_ETAG_LEN_MAX + 1];

	assert_non_null(t);
	for (unsigned i = 0; i < n; i++) {
		const struct obj o = block(i);

		(void)snprintf(etag, sizeof(etag), "%u", i);
		s3_etags_put(t, &o, etag);
	}
	for (unsigned i = 0; i < n; i++) {
		const struct obj o = block(i);

		(void)snprintf(etag, sizeof(etag), "%u", i);
		if (s3_etags_get(t, &o, out) == S3_UNKNOWN)
			lost++;
		else
			assert_string_equal(out, etag);
	}
	assert_true(lost < n / 20);
	s3_etags_free(t);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_replace),
		cmocka_unit_test(test_lengths),
		cmocka_unit_test(test_room),
		cmocka_unit_test(test_spread),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
