/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The chain parser, its errors, the canonical form and the masking of secrets.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "conf/secret.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/spec.h"

static void free_specp(struct spec **s)
{
	spec_free(*s);
}

#define _cleanup_spec_ _cleanup_(free_specp)

static struct spec *parse(const char *text)
{
	struct spec *s = NULL;
	struct err err = { "" };
	int rc = spec_parse(text, &s, &err);

	if (rc)
		fail_msg("%s: %s", text, err.msg);
	return s;
}

/* The canonical text of `text` is `want`, and is its own canonical text. */
static void check_format(const char *text, const char *want)
{
	_cleanup_spec_ struct spec *s = parse(text);
	_cleanup_free_ char *once = spec_format(s);
	_cleanup_spec_ struct spec *again = NULL;
	_cleanup_free_ char *twice = NULL;

	assert_non_null(once);
	assert_string_equal(once, want);
	again = parse(once);
	twice = spec_format(again);
	assert_string_equal(twice, want);
}

static void check_error(const char *text, const char *want)
{
	struct spec *s = (struct spec *)&s;
	struct err err = { "" };

	if (spec_parse(text, &s, &err) != -EINVAL)
		fail_msg("\"%s\" is accepted", text);
	assert_ptr_equal(s, &s); /* not written on failure */
	assert_string_equal(err.msg, want);
}

static void test_tree(void **state)
{
	_cleanup_spec_ struct spec *s = parse("raw:delay[read=5ms,write]:file:/srv/disk.img");
	const struct spec *delay, *file;

	assert_string_equal(s->layer, "raw");
	assert_int_equal(s->column, 1);
	assert_int_equal(s->args_n, 0);
	assert_null(s->target);
	assert_int_equal(s->kids_n, 1);

	delay = s->kids[0];
	assert_string_equal(delay->layer, "delay");
	assert_int_equal(delay->column, 5);
	assert_int_equal(delay->args_n, 2);
	assert_string_equal(delay->args[0].key, "read");
	assert_string_equal(delay->args[0].value, "5ms");
	assert_true(delay->args[0].has_value);
	assert_int_equal(delay->args[0].column, 11);
	assert_string_equal(delay->args[1].key, "write");
	assert_string_equal(delay->args[1].value, "");
	assert_false(delay->args[1].has_value);
	assert_int_equal(delay->args[1].column, 20);

	file = delay->kids[0];
	assert_string_equal(file->layer, "file");
	assert_string_equal(file->target, "/srv/disk.img");
	assert_int_equal(file->kids_n, 0);
}

/* Every form of the design, as nbd-rs's users know them. */
static void test_words(void **state)
{
	static const struct {
		const char *driver, *conn, *canonical;
	} cases[] = {
		{ "raw", "file:/dir/", "raw:file:/dir/" },
		{ "raw", "file:/dir/disk.img", "raw:file:/dir/disk.img" },
		{ "sharded", "file:/dir/", "sharded:file:/dir/" },
		{ "raw", "s3:http://K:S@host/bucket", "raw:s3:http://***@host/bucket" },
		{ "raw", "http://127.0.0.1:8080/a.iso", "raw:http://127.0.0.1:8080/a.iso" },
		{ "raw", "https://u:p@h/a.iso?sig=1,2", "raw:https://***@h/a.iso?***" },
		{ "sharded", "cache:s3:http://K:S@host:9000/bucket/prefix/",
		  "sharded:cache:s3:http://***@host:9000/bucket/prefix/" },
		{ "raw", "cache:file:/dir/", "raw:cache:file:/dir/" },
		{ "sharded", "s3:/bucket/prefix/", "sharded:s3:/bucket/prefix/" },
		{ "distributed",
		  "replicas=2;backends=cache:s3:http://K:S@h/node0,cache:s3:http://K:S@h/node1;",
		  "distributed[replicas=2]{cache:s3:http://***@h/node0,cache:s3:http://***@h/node1}" },
		{ "raw", "mem[size=1Gi]", "raw:mem[size=1Gi]" },
		{ "null", NULL, "null" },
	};

	for (unsigned i = 0; i < ARRAY_LEN(cases); i++) {
		_cleanup_spec_ struct spec *s = NULL;
		_cleanup_free_ char *text = NULL;
		struct err err;

		assert_int_equal(spec_parse_words(cases[i].driver, cases[i].conn, &s, &err), 0);
		text = spec_format(s);
		assert_string_equal(text, cases[i].canonical);
	}
}

static void test_expand(void **state)
{
	static const struct {
		const char *text, *expanded;
	} cases[] = {
		{ "raw:file:/d/", "raw:file:/d/" },
		{ "sharded:file:/d/", "sharded:file:/d/" },
		{ "sharded:s3:http://h/b/", "readahead:sharded:retry:s3:http://h/b/" },
		{ "raw:http://h/x.iso", "readahead:raw:retry:http://h/x.iso" },
		{ "https://h/x.iso", "readahead:retry:https://h/x.iso" },
		{ "sharded:cache:s3:/b/", "readahead:sharded:cache:retry:s3:/b/" },
		{ "cache:sharded:s3:/b/", "cache:readahead:sharded:retry:s3:/b/" },
		{ "sharded:retry[max=0]:s3:/b/", "readahead:sharded:retry[max=0]:s3:/b/" },
		{ "readahead:sharded:s3:/b/", "readahead:sharded:retry:s3:/b/" },
		{ "readahead[mem=1Mi]:delay:raw:http://h/x", "readahead[mem=1Mi]:delay:raw:retry:http://h/x" },
		{ "delay:sharded:s3:/b/", "delay:readahead:sharded:retry:s3:/b/" },
		{ "distributed{file:/a,file:/b}", "sharded:distributed{file:/a,file:/b}" },
		{ "distributed{file:/a,s3:/b/}", "readahead:sharded:distributed{file:/a,retry:s3:/b/}" },
		{ "distributed{cache:s3:/a/,cache:s3:/b/}",
		  "readahead:sharded:distributed{cache:retry:s3:/a/,cache:retry:s3:/b/}" },
		{ "sharded[size=1Mi]:distributed{file:/a,file:/b}", "sharded[size=1Mi]:distributed{file:/a,file:/b}" },
	};

	for (unsigned i = 0; i < ARRAY_LEN(cases); i++) {
		_cleanup_spec_ struct spec *s = parse(cases[i].text);
		_cleanup_free_ char *once = NULL, *twice = NULL;
		struct err err;

		assert_int_equal(spec_expand(&s, &err), 0);
		once = spec_format(s);
		assert_string_equal(once, cases[i].expanded);
		assert_int_equal(spec_expand(&s, &err), 0);
		twice = spec_format(s);
		assert_string_equal(twice, once);
	}
}

/* A target keeps everything behind its layer's colon: nothing of it is lost or decoded. */
static void test_targets(void **state)
{
	static const struct {
		const char *text, *target;
	} cases[] = {
		{ "http://127.0.0.1:8080/a.iso", "//127.0.0.1:8080/a.iso" },
		{ "https://u:p@h/x?a=b", "//u:p@h/x?a=b" },
		{ "s3:http://K:S/+,@host:9000/b/p/", "http://K:S/+,@host:9000/b/p/" },
		{ "file:/srv/a,b}c]d {e.img", "/srv/a,b}c]d {e.img" },
		{ "file:/srv/%20 \"q\" \\ \xc3\xa4", "/srv/%20 \"q\" \\ \xc3\xa4" },
		{ "file:relative", "relative" },
		{ "file::", ":" },
		{ "file:\"/srv/quoted \\\"\\\\\"", "/srv/quoted \"\\" },
		{ "file[direct]:/x", "/x" },
		{ "http://[::1]:80/x", "//[::1]:80/x" },
	};

	for (unsigned i = 0; i < ARRAY_LEN(cases); i++) {
		_cleanup_spec_ struct spec *s = parse(cases[i].text);

		assert_string_equal(s->target, cases[i].target);
	}
}

static void test_kids(void **state)
{
	_cleanup_spec_ struct spec *s =
		parse("mirror{file:/a,raw:http://[::1]:80/x{1,2},mem[size=1Mi]}");
	_cleanup_spec_ struct spec *both = parse("log{file:/dev/nvme}:s3:/b/");

	assert_int_equal(s->kids_n, 3);
	assert_string_equal(s->kids[0]->target, "/a");
	assert_string_equal(s->kids[1]->kids[0]->target, "//[::1]:80/x{1,2}");
	assert_string_equal(s->kids[2]->layer, "mem");
	assert_int_equal(s->kids[2]->column, 43);

	/* What follows the colon is kid 0. */
	assert_int_equal(both->kids_n, 2);
	assert_string_equal(both->kids[0]->layer, "s3");
	assert_string_equal(both->kids[1]->layer, "file");
}

static void test_list(void **state)
{
	_cleanup_spec_ struct spec *s =
		parse("distributed:backends=file:/a,file:/b;replicas=2;depth=3");
	_cleanup_spec_ struct spec *nested =
		parse("mirror{distributed:replicas=1;backends=file:/a;,mem}");

	assert_int_equal(s->args_n, 2);
	assert_string_equal(s->args[0].key, "replicas");
	assert_string_equal(s->args[0].value, "2");
	assert_int_equal(s->args[0].column, 38);
	assert_string_equal(s->args[1].key, "depth");
	assert_int_equal(s->kids_n, 2);
	assert_string_equal(s->kids[1]->target, "/b");

	assert_int_equal(nested->kids_n, 2);
	assert_string_equal(nested->kids[0]->kids[0]->target, "/a");
	assert_string_equal(nested->kids[1]->layer, "mem");
}

static void test_values(void **state)
{
	_cleanup_spec_ struct spec *s =
		parse("x[a=\"1,2]}\\\"\\\\\",b=,c=\"\",d=read|write,e=1-2]:mem");

	assert_int_equal(s->args_n, 5);
	assert_string_equal(s->args[0].value, "1,2]}\"\\");
	assert_true(s->args[1].has_value);
	assert_string_equal(s->args[1].value, "");
	assert_string_equal(s->args[2].value, "");
	assert_string_equal(s->args[3].value, "read|write");
	assert_string_equal(s->args[4].value, "1-2");
}

static void test_format(void **state)
{
	check_format("raw:mem[size=1Gi]", "raw:mem[size=1Gi]");
	check_format("a{b}", "a:b");
	check_format("a{b,c}:d", "a{d,b,c}");
	check_format("a{b{c,d},e}", "a{b{c,d},e}");
	check_format("x[a=\"1,2\",b=\"plain\",c]:mem", "x[a=\"1,2\",b=plain,c]:mem");
	check_format("x[a=\"q\\\"\\\\\"]:mem", "x[a=q\"\\]:mem");
	check_format("x[a=\"\\\"q\"]:mem", "x[a=\"\\\"q\"]:mem");
	check_format("file:/a,b", "file:\"/a,b\"");
	check_format("mirror{file:\"/a,b\",file:/c@d}", "mirror{file:\"/a,b\",file:/c@d}");
	check_format("http://[::1]:80/x", "http://[::1]:80/x");
	check_format("file:/a]b", "file:\"/a]b\"");
	check_format("x[password=abc,key,access-key=1,monkey=2]:mem",
		     "x[password=***,key,access-key=***,monkey=***]:mem");
}

static void test_error_places(void **state)
{
	check_error("", "column 1: a layer's name is missing here\n  \n  ^");
	check_error("raw:", "column 5: a layer's name is missing here\n  raw:\n      ^");
	check_error("raw:/srv/disk.img",
		    "column 5: a layer must stand here; for a file write file:/path\n"
		    "  raw:/srv/disk.img\n"
		    "      ^");
	check_error("raw file:/x", "column 4: \":\" or the end must stand here, not ' '\n"
				   "  raw file:/x\n"
				   "     ^");
	check_error("raw:file", "column 9: file needs a target, such as file:/srv/disk.img\n"
				"  raw:file\n"
				"          ^");
	check_error("raw:s3:", "column 8: s3 needs a target, such as s3:http://host:9000/bucket/\n"
			       "  raw:s3:\n"
			       "         ^");
	check_error("file{mem}:/x", "column 5: file is a store: no layers can stand below it\n"
				    "  file{mem}:/x\n"
				    "      ^");
	check_error("mem[size=1Gi", "column 4: the [ is not closed\n"
				    "  mem[size=1Gi\n"
				    "     ^");
	check_error("mem[]", "column 5: an option's name must stand here, not ']'\n"
			     "  mem[]\n"
			     "      ^");
	check_error("mem[size=\"1]", "column 10: the quote is not closed\n"
				     "  mem[size=\"1]\n"
				     "           ^");
	check_error("mem[size=\"1\\", "column 10: the quote is not closed\n"
				      "  mem[size=\"1\\\n"
				      "           ^");
	check_error("mem[size=\"1\"2]", "column 13: \",\" or \"]\" must stand here, not '2'\n"
					"  mem[size=\"1\"2]\n"
					"              ^");
	check_error("mirror{file:/a,file:/b",
		    "column 7: the { is not closed (quote a target that has brackets in it)\n"
		    "  mirror{file:/a,file:/b\n"
		    "        ^");
	check_error("mirror{}", "column 8: a layer's name must stand here, not '}'\n"
				"  mirror{}\n"
				"         ^");
	check_error("mirror{mem,,mem}", "column 12: a layer's name must stand here, not ','\n"
					"  mirror{mem,,mem}\n"
					"             ^");
	check_error("mirror{mem mem}", "column 11: \",\" or \"}\" must stand here, not ' '\n"
				       "  mirror{mem mem}\n"
				       "            ^");
	check_error("distributed:replicas=2;", "column 13: distributed has no \"backends=\"\n"
					       "  distributed:replicas=2;\n"
					       "              ^");
	check_error("distributed:backends=mem;backends=mem;",
		    "column 26: \"backends\" is given twice\n"
		    "  distributed:backends=mem;backends=mem;\n"
		    "                           ^");
	check_error("raw:m\xc3\xa4m:\x01",
		    "column 6: \":\" or the end must stand here, not the byte 0xc3\n"
		    "  raw:m\xc3\xa4m:?\n"
		    "       ^");
}

/* The caret stands under the character, whatever UTF-8 is before it. */
static void test_error_utf8(void **state)
{
	check_error("x[a=\xc3\xa4\xe2\x82\xac,]",
		    "column 11: an option's name must stand here, not ']'\n"
		    "  x[a=\xc3\xa4\xe2\x82\xac,]\n"
		    "         ^");
}

/* A long text is shown around the place only. */
static void test_error_excerpt(void **state)
{
	char text[2000], *line, *caret;
	struct spec *s;
	struct err err;

	memset(text, 'x', sizeof(text));
	memcpy(text, "a[k=", 4);
	memcpy(text + 1000, ",!", 2);
	text[sizeof(text) - 1] = '\0';
	assert_int_equal(spec_parse(text, &s, &err), -EINVAL);
	line = strchr(err.msg, '\n') + 1;
	caret = strchr(line, '\n') + 1;
	assert_memory_equal(err.msg, "column 1002: ", 13);
	assert_memory_equal(line, "  ...xxx", 8);
	assert_memory_equal(caret - 4, "...\n", 4);
	assert_int_equal(line[strlen(caret) - 1], '!');
}

/* No part of a secret in any message, wherever the mistake is. */
static void test_error_secrets(void **state)
{
	static const char *const texts[] = {
		"mirror{s3:http://KEY:TOPSECRET@host/b,!",
		"mirror{s3:http://KEY:TOP/SECRET@host/b,!",
		"mirror{s3:http://KEY:TOP@SECRET@host/b,!",
		"mirror{s3:http://K:TOP,SECRET@host/b,!",
		"mirror{s3:http://k:p@h/b,s3:http://KEY:TOPSECRET@host/b,!",
		"mirror{http://h/x?Signature=TOPSECRET&y=SECRET,!",
		"mirror{s3:KEY:TOPSECRET@host/b,!",
		"x[password=TOPSECRET,!",
		"x[password=\"TOP\\\",SECRET\",!",
		"x[password=\"TOPSECRET",
		"x[secret=TOPSECRET",
		"x[a=1,Access-Key=TOPSECRET,b=2]:!",
		"distributed:token=TOP,SECRET;!",
		"!password=TOPSECRET",
	};

	for (unsigned i = 0; i < ARRAY_LEN(texts); i++) {
		struct spec *s;
		struct err err;

		assert_int_equal(spec_parse(texts[i], &s, &err), -EINVAL);
		if (strstr(err.msg, "SECRET") || strstr(err.msg, "TOP") || !strstr(err.msg, "***"))
			fail_msg("%s: %s", texts[i], err.msg);
	}
	/* The caret is at its place behind a mask. */
	check_error("mirror{s3:http://KEY:TOPSECRET@host/b,!",
		    "column 39: a layer's name must stand here, not '!'\n"
		    "  mirror{s3:http://***@host/b,!\n"
		    "                              ^");
	check_error("x[password=\"TOPSECRET", "column 12: the quote is not closed\n"
					      "  x[password=***\n"
					      "             ^");
}

static void test_mask_target(void **state)
{
	static const struct {
		const char *layer, *target, *masked;
	} cases[] = {
		{ "s3", "http://K:S@h:9000/b/", "http://***@h:9000/b/" },
		{ "s3", "http://h:9000/b/", "http://h:9000/b/" },
		{ "s3", "K:S@h/b", "***@h/b" },
		{ "s3", "/bucket/prefix/", "/bucket/prefix/" },
		{ "http", "//u@h/x", "//***@h/x" },
		{ "http", "//h/x?q", "//h/x?***" },
		{ "http", "//h/x?", "//h/x?" },
		{ "http", "//@h/x", "//@h/x" },
		{ "file", "//srv/a@b?c", "//srv/a@b?c" },
	};

	for (unsigned i = 0; i < ARRAY_LEN(cases); i++) {
		_cleanup_free_ char *masked = secret_mask_target(cases[i].layer, cases[i].target);

		assert_string_equal(masked, cases[i].masked);
	}
}

static int parse_repeated(const char *head, const char *part, unsigned n, const char *tail,
			  struct err *err)
{
	size_t part_len = strlen(part), head_len = strlen(head);
	size_t tail_len = strlen(tail);
	_cleanup_free_ char *text = malloc(head_len + n * part_len + tail_len + 1);
	_cleanup_spec_ struct spec *s = NULL;

	memcpy(text, head, head_len);
	for (unsigned i = 0; i < n; i++)
		memcpy(text + head_len + i * part_len, part, part_len);
	memcpy(text + head_len + n * part_len, tail, tail_len + 1);
	return spec_parse(text, &s, err);
}

static void test_limits(void **state)
{
	struct err err;

	assert_int_equal(parse_repeated("", "a:", SPEC_MAX_DEPTH - 1, "mem", &err), 0);
	assert_int_equal(parse_repeated("", "a:", SPEC_MAX_DEPTH, "mem", &err), -EINVAL);
	assert_non_null(strstr(err.msg, "column 65: more than 32 layers"));
	assert_int_equal(parse_repeated("", "a{", 5000, "", &err), -EINVAL);

	assert_int_equal(parse_repeated("m{mem", ",mem", SPEC_MAX_KIDS - 1, "}", &err), 0);
	assert_int_equal(parse_repeated("m{mem", ",mem", SPEC_MAX_KIDS, "}", &err), -EINVAL);
	assert_non_null(strstr(err.msg, "more than 64 layers below"));

	assert_int_equal(parse_repeated("m[a", ",a", 63, "]", &err), 0);
	assert_int_equal(parse_repeated("m[a", ",a", 64, "]", &err), -EINVAL);
	assert_non_null(strstr(err.msg, "more than 64 options"));

	assert_int_equal(parse_repeated("", "n", 64, "", &err), 0);
	assert_int_equal(parse_repeated("", "n", 65, "", &err), -EINVAL);

	assert_int_equal(parse_repeated("file:", "x", SPEC_MAX_LEN - 5, "", &err), 0);
	assert_int_equal(parse_repeated("file:", "x", SPEC_MAX_LEN - 4, "", &err), -EINVAL);
	assert_non_null(strstr(err.msg, "column 16385: a chain may be 16384 bytes long"));
}

static void test_percent_encode(void **state)
{
	static const struct {
		const char *text, *encoded;
	} cases[] = {
		{ "", "" },
		{ "disk-0_A.img", "disk-0_A.img" },
		{ "a/b c", "a%2Fb%20c" },
		{ "%~\xc3\xa4\n", "%25%7E%C3%A4%0A" },
	};

	for (unsigned i = 0; i < ARRAY_LEN(cases); i++) {
		_cleanup_free_ char *encoded = percent_encode(cases[i].text);

		assert_string_equal(encoded, cases[i].encoded);
	}
}

static void test_free_null(void **state)
{
	spec_free(NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_tree),          cmocka_unit_test(test_words),
		cmocka_unit_test(test_expand),
		cmocka_unit_test(test_targets),       cmocka_unit_test(test_kids),
		cmocka_unit_test(test_list),          cmocka_unit_test(test_values),
		cmocka_unit_test(test_format),        cmocka_unit_test(test_error_places),
		cmocka_unit_test(test_error_utf8),    cmocka_unit_test(test_error_excerpt),
		cmocka_unit_test(test_error_secrets), cmocka_unit_test(test_mask_target),
		cmocka_unit_test(test_limits),        cmocka_unit_test(test_percent_encode),
		cmocka_unit_test(test_free_null),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
