/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Numbers with units, and option tables.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/opt.h"

#define KI UINT64_C(1024)

struct number_case {
	const char *text;
	int rc;
	uint64_t value;
};

static void check_numbers(int (*parse)(const char *, uint64_t *), const struct number_case *c,
			  unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		uint64_t v = 4711;
		int rc = parse(c[i].text, &v);

		if (rc != c[i].rc || v != (rc ? 4711 : c[i].value))
			fail_msg("\"%s\": rc %d, value %" PRIu64, c[i].text, rc, v);
	}
}

static void test_size(void **state)
{
	static const struct number_case cases[] = {
		{ "0", 0, 0 },
		{ "512", 0, 512 },
		{ "512B", 0, 512 },
		{ "64K", 0, 64 * KI },
		{ "64k", 0, 64 * KI },
		{ "64Ki", 0, 64 * KI },
		{ "64KiB", 0, 64 * KI },
		{ "100Mi", 0, 100 * KI * KI },
		{ "4GiB", 0, 4 * KI * KI * KI },
		{ "10G", 0, 10 * KI * KI * KI },
		{ "1.5Ti", 0, 3 * KI * KI * KI * KI / 2 },
		{ "1.50K", 0, 1536 },
		{ "2P", 0, 2 * KI * KI * KI * KI * KI },
		{ "15E", 0, 15 * KI * KI * KI * KI * KI * KI },
		{ "18446744073709551615", 0, UINT64_MAX },
		{ "18446744073709551616", -ERANGE, 0 },
		{ "16E", -ERANGE, 0 },
		{ "99999999999999999999999", -ERANGE, 0 },
		{ "", -EINVAL, 0 },
		{ " 1", -EINVAL, 0 },
		{ "1 ", -EINVAL, 0 },
		{ "-1", -EINVAL, 0 },
		{ "+1", -EINVAL, 0 },
		{ "K", -EINVAL, 0 },
		{ ".5K", -EINVAL, 0 },
		{ "1.K", -EINVAL, 0 },
		{ "1.5", -EINVAL, 0 },
		{ "1.0001K", -EINVAL, 0 },
		{ "0.0000000000000000001E", -EINVAL, 0 },
		{ "10GB", -EINVAL, 0 }, /* 1000s or 1024s? nobody knows */
		{ "10KB", -EINVAL, 0 },
		{ "10Gb", -EINVAL, 0 },
		{ "10GiBs", -EINVAL, 0 },
		{ "10i", -EINVAL, 0 },
		{ "10iB", -EINVAL, 0 },
		{ "0x10", -EINVAL, 0 },
		{ "1e3", -EINVAL, 0 },
	};

	check_numbers(parse_size, cases, ARRAY_LEN(cases));
}

static void test_time(void **state)
{
	static const struct number_case cases[] = {
		{ "5s", 0, UINT64_C(5000000000) },
		{ "100ms", 0, 100000000 },
		{ "20us", 0, 20000 },
		{ "7ns", 0, 7 },
		{ "1m", 0, UINT64_C(60000000000) },
		{ "2min", 0, UINT64_C(120000000000) },
		{ "2h", 0, UINT64_C(7200000000000) },
		{ "3", 0, UINT64_C(3000000000) },
		{ "0.5s", 0, 500000000 },
		{ "0.25", 0, 250000000 },
		{ "0", 0, 0 },
		{ "18446744073s", 0, UINT64_C(18446744073000000000) },
		{ "18446744074s", -ERANGE, 0 },
		{ "0.5ns", -EINVAL, 0 },
		{ "5 s", -EINVAL, 0 },
		{ "5S", -EINVAL, 0 },
		{ "-5s", -EINVAL, 0 },
		{ "s", -EINVAL, 0 },
		{ "", -EINVAL, 0 },
	};

	check_numbers(parse_time_ns, cases, ARRAY_LEN(cases));
}

static void test_u64(void **state)
{
	static const struct number_case cases[] = {
		{ "0", 0, 0 },
		{ "007", 0, 7 },
		{ "18446744073709551615", 0, UINT64_MAX },
		{ "18446744073709551616", -ERANGE, 0 },
		{ "", -EINVAL, 0 },
		{ "1K", -EINVAL, 0 },
		{ "1.0", -EINVAL, 0 },
		{ "-1", -EINVAL, 0 },
		{ "0x1", -EINVAL, 0 },
	};

	check_numbers(parse_u64, cases, ARRAY_LEN(cases));
}

static void test_format_size(void **state)
{
	static const struct {
		uint64_t bytes;
		const char *text;
	} cases[] = {
		{ 0, "0B" },
		{ 1000, "1000B" },
		{ 1023, "1023B" },
		{ 1024, "1KiB" },
		{ 1536, "1.5KiB" },
		{ UINT64_C(10737418240), "10GiB" },
		{ 1024 + 52, "1.05KiB" },
		{ 1024 + 1, "1KiB" }, /* rounded down: never more than there is */
		{ 1024 * 1024 - 1, "1023.99KiB" },
		{ UINT64_MAX, "15.99EiB" },
		{ UINT64_C(3) << 49, "1.5PiB" },
		{ UINT64_C(5) << 58, "1.25EiB" },
	};
	char out[32], small[4];

	for (unsigned i = 0; i < ARRAY_LEN(cases); i++) {
		format_size(cases[i].bytes, out, sizeof(out));
		assert_string_equal(out, cases[i].text);
	}
	format_size(UINT64_MAX, small, sizeof(small));
	assert_string_equal(small, "15.");
}

/* What is printed means the same when read again, when it is exact. */
static void test_size_round_trip(void **state)
{
	for (unsigned shift = 0; shift < 62; shift++) {
		uint64_t v = UINT64_C(3) << shift, back = 0;
		char out[32];

		format_size(v, out, sizeof(out));
		assert_int_equal(parse_size(out, &back), 0);
		assert_true(back == v);
	}
}

/* --- Tables ----------------------------------------------------------------------------------- */

struct thing {
	uint64_t before;
	bool flag, other;
	unsigned mode;
	uint64_t n, size, time, percent;
	char *name, *password;
	uint64_t after;
};

#define FIELD(f) .field = offsetof(struct thing, f)

static const struct opt table[] = {
	{ .name = "flag", .type = OPT_BOOL, FIELD(flag), .help = "a flag" },
	{ .name = "other", .type = OPT_BOOL, FIELD(other), .def = "on", .help = "another" },
	{ .name = "mode",
	  .type = OPT_ENUM,
	  FIELD(mode),
	  .def = "falloc",
	  .choices = "off|falloc|full",
	  .help = "a mode" },
	{ .name = "n",
	  .type = OPT_UINT,
	  FIELD(n),
	  .def = "3",
	  .min = 1,
	  .max = 9,
	  .help = "a number" },
	{ .name = "size", .type = OPT_SIZE, FIELD(size), .min = 512, .help = "a size" },
	{ .name = "time",
	  .type = OPT_TIME_NS,
	  FIELD(time),
	  .def = "1.5s",
	  .max = UINT64_C(3600000000000),
	  .help = "a time" },
	{ .name = "percent",
	  .type = OPT_PERCENT,
	  FIELD(percent),
	  .def = "0.1%",
	  .help = "a share" },
	{ .name = "name", .type = OPT_STR, FIELD(name), .def = "joe", .help = "a name" },
	{ .name = "password", .type = OPT_STR, FIELD(password), .help = "a secret" },
	OPT_END,
};

/* Parses "key=value" words (and bare keys) into t; the columns are 10, 20, ... */
static int parse(struct thing *t, struct err *err, unsigned n, ...)
{
	struct opt_arg args[8];
	va_list ap;
	int rc;

	assert_true(n <= ARRAY_LEN(args));
	va_start(ap, n);
	for (unsigned i = 0; i < n; i++) {
		char *word = strdup(va_arg(ap, const char *)), *eq = strchr(word, '=');

		if (eq)
			*eq = '\0';
		args[i] = (struct opt_arg){ .key = word,
					    .value = eq ? eq + 1 : word + strlen(word),
					    .has_value = eq != NULL,
					    .column = 10 * (i + 1) };
	}
	va_end(ap);
	err->msg[0] = '\0';
	rc = opts_parse(table, t, args, n, "layer thing", err);
	for (unsigned i = 0; i < n; i++)
		free(args[i].key);
	return rc;
}

static void test_defaults(void **state)
{
	struct thing t;
	struct err err;

	memset(&t, 0xee, sizeof(t)); /* whatever was there must not shine through */
	assert_int_equal(parse(&t, &err, 0), 0);
	assert_false(t.flag);
	assert_true(t.other);
	assert_int_equal(t.mode, 1);
	assert_true(t.n == 3 && t.size == 0 && t.time == UINT64_C(1500000000) && t.percent == 1000);
	assert_string_equal(t.name, "joe");
	assert_null(t.password);
	assert_true(t.before == UINT64_C(0xeeeeeeeeeeeeeeee) && t.after == t.before);
	opts_free(table, &t);
	assert_null(t.name);
	opts_free(table, &t); /* twice is fine */
	opts_free(NULL, &t);
	assert_int_equal(opts_parse(NULL, NULL, NULL, 0, "x", &err), 0);
}

static void test_given(void **state)
{
	struct thing t;
	struct err err;

	assert_int_equal(parse(&t, &err, 8, "flag", "other=no", "mode=full", "n=9", "size=4Ki",
			       "time=1h", "percent=100%", "name="),
			 0);
	assert_true(t.flag);
	assert_false(t.other);
	assert_int_equal(t.mode, 2);
	assert_true(t.n == 9 && t.size == 4096 && t.time == UINT64_C(3600000000000));
	assert_true(t.percent == 1000000);
	assert_string_equal(t.name, "");
	opts_free(table, &t);
}

static void test_bool_words(void **state)
{
	static const char *const on[] = { "flag=on", "flag=yes", "flag=true", "flag=1" };
	static const char *const off[] = { "other=off", "other=no", "other=false", "other=0" };
	struct thing t;
	struct err err;

	for (unsigned i = 0; i < ARRAY_LEN(on); i++) {
		assert_int_equal(parse(&t, &err, 2, on[i], off[i]), 0);
		assert_true(t.flag);
		assert_false(t.other);
		opts_free(table, &t);
	}
}

static void test_errors(void **state)
{
	static const struct {
		const char *word, *message;
	} cases[] = {
		{ "flag=maybe",
		  "layer thing: option \"flag\" (column 20): \"maybe\" must be on or off" },
		{ "mode=",
		  "layer thing: option \"mode\" (column 20): \"\" must be one of off|falloc|full" },
		{ "mode=of",
		  "layer thing: option \"mode\" (column 20): \"of\" must be one of off|falloc|full" },
		{ "n=0", "layer thing: option \"n\" (column 20): \"0\" is out of range 1..9" },
		{ "n=10", "layer thing: option \"n\" (column 20): \"10\" is out of range 1..9" },
		{ "n=1K", "layer thing: option \"n\" (column 20): \"1K\" must be a number" },
		{ "n", "layer thing: option \"n\" (column 20) needs a value: n=N" },
		{ "mode",
		  "layer thing: option \"mode\" (column 20) needs a value: mode=off|falloc|full" },
		{ "size=10GB",
		  "layer thing: option \"size\" (column 20): \"10GB\" must be a size: 512, 64Ki, "
		  "4MiB, 10G" },
		{ "size=1",
		  "layer thing: option \"size\" (column 20): \"1\" is out of range 512B.." },
		{ "time=2h",
		  "layer thing: option \"time\" (column 20): \"2h\" is out of range 0s..3600s" },
		{ "time=soon",
		  "layer thing: option \"time\" (column 20): \"soon\" must be a time: 20us, 100ms, "
		  "5s" },
		{ "percent=5",
		  "layer thing: option \"percent\" (column 20): \"5\" must be a percentage: 5%, "
		  "0.1%" },
		{ "percent=100.1%",
		  "layer thing: option \"percent\" (column 20): \"100.1%\" is out of range "
		  "0%..100%" },
		{ "sise=1",
		  "layer thing: unknown option \"sise\" (column 20); it knows: flag, other, mode, n, "
		  "size, time, percent, name, password" },
		{ "name=b", "layer thing: option \"name\" is given twice (columns 10 and 20)" },
	};
	struct thing t;
	struct err err;

	for (unsigned i = 0; i < ARRAY_LEN(cases); i++) {
		assert_int_equal(parse(&t, &err, 2, "name=a", cases[i].word), -EINVAL);
		assert_string_equal(err.msg, cases[i].message);
		assert_null(t.name); /* freed again */
	}
	assert_int_equal(opts_parse(NULL, NULL,
				    &(struct opt_arg){ .key = (char[]){ "x" }, .column = 3 }, 1,
				    "layer raw", &err),
			 -EINVAL);
	assert_string_equal(err.msg, "layer raw: option \"x\" (column 3): it takes no options");
}

/* A secret that is refused must not be shown. */
static void test_secret_value(void **state)
{
	static const struct opt keys[] = {
		{ .name = "secret-key", .type = OPT_UINT, FIELD(n), .help = "a secret number" },
		OPT_END,
	};
	struct opt_arg arg = { .key = (char[]){ "secret-key" },
			       .value = (char[]){ "hunter2" },
			       .has_value = true,
			       .column = 1 };
	struct thing t;
	struct err err;

	assert_int_equal(opts_parse(keys, &t, &arg, 1, "x", &err), -EINVAL);
	assert_null(strstr(err.msg, "hunter2"));
	assert_non_null(strstr(err.msg, "***"));
}

static void test_print(void **state)
{
	static const char want[] = "  flag=on|off             a flag\n"
				   "  other=on|off            another (default on)\n"
				   "  mode=off|falloc|full    a mode (default falloc)\n"
				   "  n=N                     a number (default 3; 1..9)\n"
				   "  size=SIZE               a size (512B..)\n"
				   "  time=TIME               a time (default 1.5s; 0s..3600s)\n"
				   "  percent=PERCENT         a share (default 0.1%)\n"
				   "  name=TEXT               a name (default joe)\n"
				   "  password=TEXT           a secret\n";
	_cleanup_free_ char *text = NULL;
	size_t len;
	FILE *out = open_memstream(&text, &len);

	assert_non_null(out);
	opts_print(table, out);
	opts_print(NULL, out);
	fclose(out);
	assert_string_equal(text, want);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_size),
		cmocka_unit_test(test_time),
		cmocka_unit_test(test_u64),
		cmocka_unit_test(test_format_size),
		cmocka_unit_test(test_size_round_trip),
		cmocka_unit_test(test_defaults),
		cmocka_unit_test(test_given),
		cmocka_unit_test(test_bool_words),
		cmocka_unit_test(test_errors),
		cmocka_unit_test(test_secret_value),
		cmocka_unit_test(test_print),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
