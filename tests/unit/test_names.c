/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Names of devices, exports and links (tool/names.c). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "names.h"

static void test_index(void **state)
{
	static const struct {
		const char *text;
		int64_t index;
	} cases[] = {
		{ "/dev/nbd0", 0 },   { "nbd0", 0 },
		{ "nbd12", 12 },      { "/dev/nbd1048575", 1048575 },
		{ "nbd1048576", -1 }, { "nbd99999999999999999999", -1 },
		{ "nbd", -1 },        { "nbd01", -1 },
		{ "nbd0p1", -1 },     { "nbd-1", -1 },
		{ "nbd 1", -1 },      { "nbd1 ", -1 },
		{ "/dev//nbd1", -1 }, { "/nbd1", -1 },
		{ "dev/nbd1", -1 },   { "", -1 },
		{ "/dev/", -1 },      { "/dev/vda", -1 },
		{ "xnbd1", -1 },      { "/dev/nbdrs/1", -1 },
	};

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		uint32_t index = 77;
		int rc = name_to_index(cases[i].text, &index);

		assert_int_equal(rc, cases[i].index < 0 ? -EINVAL : 0);
		assert_int_equal(index, cases[i].index < 0 ? 77 : cases[i].index);
	}
}

static void test_partition(void **state)
{
	assert_true(name_is_partition("/dev/nbd0p1"));
	assert_true(name_is_partition("nbd10p128"));
	assert_false(name_is_partition("nbd0"));
	assert_false(name_is_partition("nbd0p"));
	assert_false(name_is_partition("nbd0p1x"));
	assert_false(name_is_partition("sda1"));
}

static void test_backend(void **state)
{
	static const struct {
		const char *name, *backend, *link;
	} cases[] = {
		{ "disk0", "nbdrs.disk0", "disk0" },
		{ "a.b_c-D9", "nbdrs.a.b_c-D9", "a.b_c-D9" },
		{ "a b/c", "nbdrs.a%20b%2Fc", "a\\x20b\\x2fc" },
		{ "100%", "nbdrs.100%25", "100\\x25" },
		{ "\xc3\xa4", "nbdrs.%C3%A4", "\\xc3\\xa4" },
		{ "$(reboot)\n", "nbdrs.%24%28reboot%29%0A", "\\x24\\x28reboot\\x29\\x0a" },
		{ "..", "nbdrs...", NULL },
		{ ".hidden", "nbdrs..hidden", NULL },
	};

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		char text[EXPORT_NAME_LEN], link[LINK_NAME_LEN];

		assert_int_equal(name_to_backend(cases[i].name, text, sizeof(text)), 0);
		assert_string_equal(text, cases[i].backend);
		assert_int_equal(name_from_backend(cases[i].backend, text), 0);
		assert_string_equal(text, cases[i].name);
		if (cases[i].link) {
			assert_int_equal(name_to_link(cases[i].backend, link), 0);
			assert_string_equal(link, cases[i].link);
		} else {
			assert_int_equal(name_to_link(cases[i].backend, link), -EINVAL);
		}
	}
}

/* Which volume it is follows the name, and is no part of it. */
static void test_identity(void **state)
{
	static const char *const bad[] = { "nbdrs.a~", "nbdrs.a~0123456789abcde", "nbdrs.a~0123456789abcdef0",
					   "nbdrs.a~0123456789ABCDEF", "nbdrs.a~0123456789abcdef~0123456789abcdef",
					   "nbdrs.~0123456789abcdef" };
	char text[EXPORT_NAME_LEN], link[LINK_NAME_LEN];

	assert_int_equal(name_from_backend("nbdrs.a%20b~0123456789abcdef", text), 0);
	assert_string_equal(text, "a b");
	assert_int_equal(name_to_link("nbdrs.a%20b~0123456789abcdef", link), 0);
	assert_string_equal(link, "a\\x20b");
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++)
		assert_int_equal(name_from_backend(bad[i], text), -EINVAL);
}

static void test_foreign_backend(void **state)
{
	static const char *const bad[] = { "",          "disk0",     "nbdrs",     "nbdrs.",
					   "nbdrs.%",   "nbdrs.%2",  "nbdrs.%zz", "nbdrs.%00",
					   "nbdrs.a/b", "nbdrs.a b", "NBDRS.a",   "xnbdrs.a" };

	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		char text[EXPORT_NAME_LEN] = "unchanged", link[LINK_NAME_LEN] = "unchanged";

		assert_int_equal(name_from_backend(bad[i], text), -EINVAL);
		assert_string_equal(text, "unchanged");
		assert_int_equal(name_to_link(bad[i], link), -EINVAL);
		assert_string_equal(link, "unchanged");
	}
}

/* The longest names, and one byte more: every buffer holds. */
static void test_lengths(void **state)
{
	static char name[EXPORT_NAME_LEN + 1], text[3 * EXPORT_NAME_LEN + 16], out[EXPORT_NAME_LEN];
	char link[LINK_NAME_LEN];

	memset(name, 'n', EXPORT_NAME_LEN - 1);
	assert_int_equal(name_to_backend(name, text, sizeof(text)), 0);
	assert_int_equal(name_from_backend(text, out), 0);
	assert_string_equal(out, name);
	memset(name, ' ', EXPORT_NAME_LEN - 1);
	assert_int_equal(name_to_backend(name, text, sizeof(text)), 0);
	assert_int_equal(name_from_backend(text, out), 0);
	memset(name, 'n', EXPORT_NAME_LEN);
	assert_int_equal(name_to_backend(name, text, sizeof(text)), 0);
	assert_int_equal(name_from_backend(text, out), -EINVAL);

	assert_int_equal(name_to_backend("abc", text, strlen("nbdrs.abc")), -ENAMETOOLONG);
	assert_int_equal(name_to_backend("abc", text, strlen("nbdrs.abc") + 1), 0);
	assert_int_equal(name_to_backend("ab ", text, strlen("nbdrs.ab%20")), -ENAMETOOLONG);
	assert_int_equal(name_to_backend("", text, 3), -ENAMETOOLONG);

	/* "nbdrs-" + name + "-part31" is the longest link, and must be a file name. */
	memset(name, 'n', sizeof(name));
	name[255 - 13] = '\0';
	assert_int_equal(name_to_backend(name, text, sizeof(text)), 0);
	assert_int_equal(name_to_link(text, link), -EINVAL);
	name[255 - 13 - 4] = '\0';
	assert_int_equal(name_to_backend(name, text, sizeof(text)), 0);
	assert_int_equal(name_to_link(text, link), 0);
	assert_string_equal(link, name);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_index),   cmocka_unit_test(test_partition),
		cmocka_unit_test(test_backend), cmocka_unit_test(test_identity), cmocka_unit_test(test_foreign_backend),
		cmocka_unit_test(test_lengths),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
