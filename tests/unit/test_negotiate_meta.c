/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Structured replies and metadata contexts, as NBD proto.md has them.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "nego_talk.h"

static void test_structured_reply(void **state)
{
	struct talk t;

	talk_begin(&t, &talk_two);
	assert_int_equal(ask(&t, NBD_OPT_STRUCTURED_REPLY, "x", 1), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_INVALID);
	assert_false(t.nego.is_structured);
	assert_int_equal(ask(&t, NBD_OPT_STRUCTURED_REPLY, NULL, 0), NEGO_OPTION);
	expect_last(&t, NBD_REP_ACK);
	assert_int_equal(ask(&t, NBD_OPT_STRUCTURED_REPLY, NULL, 0), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_INVALID);
	assert_true(t.nego.is_structured);
}

static void begin_structured(struct talk *t)
{
	talk_begin(t, &talk_two);
	assert_int_equal(ask(t, NBD_OPT_STRUCTURED_REPLY, NULL, 0), NEGO_OPTION);
}

static void test_meta_needs_structured_replies(void **state)
{
	struct talk t;

	talk_begin(&t, &talk_two);
	assert_int_equal(ask_meta(&t, NBD_OPT_LIST_META_CONTEXT, "disk", 0, NULL), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_INVALID);
	assert_int_equal(ask_meta(&t, NBD_OPT_SET_META_CONTEXT, "disk", 0, NULL), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_INVALID);
}

static void test_list_meta_context(void **state)
{
	static const struct {
		const char *query;
		bool found;
	} rows[] = {
		{ "base:allocation", true },
		{ "base:", true },
		{ "base:allocatio", false },
		{ "base:allocation2", false },
		{ "base", false },
		{ "qemu:", false },
		{ "", false },
		{ "Base:", false },
	};
	struct talk t;

	begin_structured(&t);
	assert_int_equal(ask_meta(&t, NBD_OPT_LIST_META_CONTEXT, "disk", 0, NULL), NEGO_OPTION);
	expect_context(&t, 0);
	expect_last(&t, NBD_REP_ACK);
	for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
		assert_int_equal(ask_meta(&t, NBD_OPT_LIST_META_CONTEXT, "disk", 1, &rows[i].query),
				 NEGO_OPTION);
		if (rows[i].found)
			expect_context(&t, 0);
		expect_last(&t, NBD_REP_ACK);
	}
	/* Asked for twice, listed once; and a list chooses nothing. */
	assert_int_equal(ask_meta(&t, NBD_OPT_LIST_META_CONTEXT, "disk", 2,
				  (const char *[]){ "base:", "base:allocation" }),
			 NEGO_OPTION);
	expect_context(&t, 0);
	expect_last(&t, NBD_REP_ACK);
	assert_int_equal(ask_info(&t, NBD_OPT_GO, "disk", 0, NULL), NEGO_TRANSMIT);
	assert_false(t.nego.has_meta);
}

static const char *const allocation[] = { "qemu:dirty-bitmap:x", "base:allocation",
					  "base:allocation" };

static void set_context(struct talk *t, const char *name)
{
	assert_int_equal(
		ask_meta(t, NBD_OPT_SET_META_CONTEXT, name, ARRAY_LEN(allocation), allocation),
		NEGO_OPTION);
	expect_context(t, NBD_META_BASE_ALLOCATION);
	expect_last(t, NBD_REP_ACK);
}

static void test_set_meta_context(void **state)
{
	struct talk t;

	begin_structured(&t);
	set_context(&t, "disk");
	assert_int_equal(ask_info(&t, NBD_OPT_GO, "disk", 0, NULL), NEGO_TRANSMIT);
	assert_true(t.nego.has_meta);
}

/* No wildcard here, and no queries choose nothing. */
static void test_set_meta_context_to_nothing(void **state)
{
	static const char *const queries[] = { "base:", "base:nothing", "x" };
	struct talk t;

	begin_structured(&t);
	for (unsigned n = 0; n <= ARRAY_LEN(queries); n++) {
		set_context(&t, "disk");
		assert_int_equal(ask_meta(&t, NBD_OPT_SET_META_CONTEXT, "disk", n, queries),
				 NEGO_OPTION);
		expect_last(&t, NBD_REP_ACK);
		assert_null(t.nego.meta);
	}
	assert_int_equal(ask_info(&t, NBD_OPT_GO, "disk", 0, NULL), NEGO_TRANSMIT);
	assert_false(t.nego.has_meta);
}

static void test_set_meta_context_is_lost_by_a_failure(void **state)
{
	struct nego_option huge = { NBD_OPT_SET_META_CONTEXT, NEGO_OPTION_MAX + 1 };
	struct talk t;

	begin_structured(&t);
	set_context(&t, "disk");
	assert_int_equal(
		ask_meta(&t, NBD_OPT_SET_META_CONTEXT, "disk2", ARRAY_LEN(allocation), allocation),
		NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_UNKNOWN);
	assert_null(t.nego.meta);
	set_context(&t, "disk");
	assert_int_equal(ask(&t, NBD_OPT_SET_META_CONTEXT, "\0", 1), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_INVALID);
	assert_null(t.nego.meta);
	set_context(&t, "disk");
	t.nego.out_n = t.at = 0;
	assert_int_equal(nego_answer(&t.nego, &huge, NULL), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_TOO_BIG);
	assert_null(t.nego.meta);
}

static void test_meta_context_belongs_to_a_name(void **state)
{
	static const struct {
		const char *set, *go;
		bool has;
	} rows[] = {
		{ "disk", "disk", true },    { "", "", true },      { "second", "second", true },
		{ "disk", "", false },       { "", "disk", false }, { "disk", "second", false },
		{ "second", "disk", false },
	};
	struct talk t;

	for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
		begin_structured(&t);
		set_context(&t, rows[i].set);
		assert_int_equal(ask_info(&t, NBD_OPT_GO, rows[i].go, 0, NULL), NEGO_TRANSMIT);
		assert_int_equal(t.nego.has_meta, rows[i].has);
		begin_structured(&t);
		set_context(&t, rows[i].set);
		assert_int_equal(ask(&t, NBD_OPT_EXPORT_NAME, rows[i].go, strlen(rows[i].go)),
				 NEGO_TRANSMIT);
		assert_int_equal(t.nego.has_meta, rows[i].has);
	}
}

static void test_malformed_meta(void **state)
{
	static const struct {
		uint8_t v[20];
		size_t n;
	} rows[] = {
		{ { 0, 0, 0, 0 }, 4 },
		{ { 0, 0, 0, 0, 0, 0, 0 }, 7 },
		{ { 0, 0, 0, 0, 0, 0, 0, 1 }, 8 },
		{ { 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0 }, 11 },
		{ { 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 'x' }, 13 },
		{ { 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 'x', 'y' }, 14 },
		{ { 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0 }, 12 },
		{ { 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff }, 12 },
		{ { 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0 }, 12 },
	};
	struct talk t;

	begin_structured(&t);
	for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
		assert_int_equal(ask(&t, NBD_OPT_LIST_META_CONTEXT, rows[i].v, rows[i].n),
				 NEGO_OPTION);
		expect_last(&t, NBD_REP_ERR_INVALID);
		assert_int_equal(ask(&t, NBD_OPT_SET_META_CONTEXT, rows[i].v, rows[i].n),
				 NEGO_OPTION);
		expect_last(&t, NBD_REP_ERR_INVALID);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_structured_reply),
		cmocka_unit_test(test_meta_needs_structured_replies),
		cmocka_unit_test(test_list_meta_context),
		cmocka_unit_test(test_set_meta_context),
		cmocka_unit_test(test_set_meta_context_to_nothing),
		cmocka_unit_test(test_set_meta_context_is_lost_by_a_failure),
		cmocka_unit_test(test_meta_context_belongs_to_a_name),
		cmocka_unit_test(test_malformed_meta),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
