/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Configuration files: words and lines (conf/conffile.h), and attach.conf (tool/autoattach.h). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "autoattach.h"
#include "conf/conffile.h"
#include "nbdrs/cleanup.h"

static int parse(const char *text, struct conf_file *f, struct err *err)
{
	err->msg[0] = '\0';
	return conf_parse("x.conf", text, strlen(text), f, err);
}

/* The file as "LINE<word><word>;LINE..." */
static void expect(const char *text, const char *wanted)
{
	_cleanup_conf_ struct conf_file f = { 0 };
	struct err err;
	char got[512] = "";
	size_t n = 0;

	assert_int_equal(parse(text, &f, &err), 0);
	for (size_t i = 0; i < f.lines_n; i++) {
		n += (size_t)snprintf(got + n, sizeof(got) - n, "%s%u", i ? ";" : "", f.lines[i].number);
		for (unsigned w = 0; w < f.lines[i].words_n; w++)
			n += (size_t)snprintf(got + n, sizeof(got) - n, "<%s>", f.lines[i].words[w]);
		assert_null(f.lines[i].words[f.lines[i].words_n]);
	}
	assert_string_equal(got, wanted);
}

static void refuse(const char *text, const char *message)
{
	struct conf_file f = { 0 };
	struct err err;

	assert_int_equal(parse(text, &f, &err), -EINVAL);
	assert_string_equal(err.msg, message);
	assert_null(f.text);
}

static void test_words(void **state)
{
	expect("", "");
	expect("\n\n  \t\n", "");
	expect("a", "1<a>");
	expect("a b\tc \n", "1<a><b><c>");
	expect("a\n\n  b c\r\nd", "1<a>;3<b><c>;4<d>");
	expect("# all of it\na # rest\n#b\nc#d", "2<a>;4<c#d>");
	expect("'' \"\"", "1<><>");
	expect("'a b' \"c d\"", "1<a b><c d>");
	expect("\"a\\\"b\\\\c\\d\" 'a\\'", "1<a\"b\\c\\d><a\\>");
	/* Inside of a word a quote belongs to the chain. */
	expect("mirror{file:\"/a,b\"} x'y", "1<mirror{file:\"/a,b\"}><x'y>");
	expect("a\\ b", "1<a\\><b>");
	expect("\"#a\" b", "1<#a><b>");
	expect("\"last\"", "1<last>");
}

static void test_refused(void **state)
{
	char many[2 * (CONF_WORDS_MAX + 1) + 1];

	refuse("a\n'b c\nd'", "x.conf:2: a quote is opened and not closed");
	refuse("\"", "x.conf:1: a quote is opened and not closed");
	refuse("'a'b", "x.conf:1: a blank must follow the quote that ends a word");
	refuse("a\nb\x01", "x.conf:2: there is a control character in it: this is no text file");
	for (size_t i = 0; i < sizeof(many) - 1; i++)
		many[i] = i % 2 ? ' ' : 'a';
	many[sizeof(many) - 1] = '\0';
	refuse(many, "x.conf:1: too many words");
}

static void test_zero_byte(void **state)
{
	struct conf_file f = { 0 };
	struct err err;

	assert_int_equal(conf_parse("x", "a\0b", 3, &f, &err), -EINVAL);
}

static void test_missing_file(void **state)
{
	struct conf_file f = { 0 };
	struct err err;

	assert_int_equal(conf_read("/nonexistent/x.conf", &f, &err), -ENOENT);
	assert_string_equal(err.msg, "cannot open /nonexistent/x.conf: No such file or directory");
}

/* --- attach.conf --- */

static void attach_error(const char *text, const char *message)
{
	_cleanup_conf_ struct conf_file f = { 0 };
	struct err err;

	assert_int_equal(parse(text, &f, &err), 0);
	assert_int_equal(autoattach_check(&f, &err), -EINVAL);
	assert_string_equal(err.msg, message);
}

static void test_attach_lines(void **state)
{
	_cleanup_conf_ struct conf_file f = { 0 };
	struct options o = { .export = "data", .control = "/c" };
	struct err err;

	assert_int_equal(parse("disk0 /dev/nbd3\n--connections 4 data --wait 8 -r # more\n", &f, &err), 0);
	assert_int_equal(autoattach_check(&f, &err), 0);
	autoattach_apply(&f, &o);
	assert_string_equal(o.export, "data");
	assert_int_equal(o.connections, 4);
	assert_true(o.is_read_only);
	assert_string_equal(o.control, "/c");
	assert_int_equal(o.wait_s, 8);

	o = (struct options){ .export = "disk0", .wait_s = 7 };
	autoattach_apply(&f, &o);
	assert_string_equal(o.device, "/dev/nbd3");
	assert_int_equal(o.wait_s, WAIT_BOOT_S);

	/* One that is not in it stays as it is. */
	o = (struct options){ .export = "other", .wait_s = 7 };
	autoattach_apply(&f, &o);
	assert_null(o.device);
	assert_int_equal(o.wait_s, 7);
}

static void test_attach_errors(void **state)
{
	attach_error("disk0 /dev/sda", "x.conf:1: '/dev/sda' is not an nbd device: /dev/nbd0, nbd1, ...");
	attach_error("disk0\ndisk1 --connections 99",
		     "x.conf:2: --connections: '99' is not a number from 1 to 64");
	attach_error("-d disk0", "x.conf:1: a line is EXPORT [DEVICE] and options of attaching");
	attach_error("disk0 --conf y", "x.conf:1: a line is EXPORT [DEVICE] and options of attaching");
	attach_error("--help", "x.conf:1: a line is EXPORT [DEVICE] and options of attaching");
	attach_error("disk0\n\ndisk0 nbd1", "x.conf:3: export 'disk0' stands in line 1 already");
	attach_error("disk0 nbd1\ndisk1 /dev/nbd1", "x.conf:2: /dev/nbd1 is taken by line 1 already");
}

static void test_units(void **state)
{
	char unit[256], longest[300];

	assert_int_equal(autoattach_unit("disk0", unit, sizeof(unit)), 0);
	assert_string_equal(unit, "nbdrs-attach@disk0.service");
	/* As systemd-escape(1). */
	assert_int_equal(autoattach_unit("my-disk/a b.x:\xc3\xa4", unit, sizeof(unit)), 0);
	assert_string_equal(unit, "nbdrs-attach@my\\x2ddisk-a\\x20b.x:\\xc3\\xa4.service");
	assert_int_equal(autoattach_unit(".hidden", unit, sizeof(unit)), 0);
	assert_string_equal(unit, "nbdrs-attach@\\x2ehidden.service");
	memset(longest, 'a', sizeof(longest) - 1);
	longest[sizeof(longest) - 1] = '\0';
	assert_int_equal(autoattach_unit(longest, unit, sizeof(unit)), -ENAMETOOLONG);
	longest[255 - strlen("nbdrs-attach@.service")] = '\0';
	assert_int_equal(autoattach_unit(longest, unit, sizeof(unit)), 0);
	assert_int_equal(strlen(unit), 255);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_words),
		cmocka_unit_test(test_refused),
		cmocka_unit_test(test_zero_byte),
		cmocka_unit_test(test_missing_file),
		cmocka_unit_test(test_attach_lines),
		cmocka_unit_test(test_attach_errors),
		cmocka_unit_test(test_units),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
