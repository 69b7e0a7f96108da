/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The negotiation, option by option, as NBD proto.md has it; metadata contexts are in test_negotiate_meta.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "nego_talk.h"

static void test_greeting(void **state)
{
	assert_int_equal(get_be64(nego_greeting), NBD_MAGIC);
	assert_int_equal(get_be64(nego_greeting + 8), NBD_IHAVEOPT);
	assert_int_equal(get_be16(nego_greeting + 16), 3);
}

static void test_client_flags(void **state)
{
	for (unsigned bit = 0; bit < 32; bit++) {
		struct nego n;

		nego_init(&n, &talk_two);
		assert_int_equal(nego_client_flags(&n, UINT32_C(1) << bit), bit < 2);
	}
}

static void test_option_header(void **state)
{
	uint8_t wire[NBD_OPT_HEADER_LEN];
	struct nego_option o;

	put_be64(wire, NBD_IHAVEOPT);
	put_be32(wire + 8, NBD_OPT_GO);
	put_be32(wire + 12, 0xfffffff0);
	assert_true(nego_parse_option(wire, &o));
	assert_int_equal(o.code, NBD_OPT_GO);
	assert_int_equal(o.len, 0xfffffff0);
	for (unsigned i = 0; i < 8; i++) {
		wire[i] ^= 0x10;
		assert_false(nego_parse_option(wire, &o));
		wire[i] ^= 0x10;
	}
}

static void test_go(void **state)
{
	struct talk t;

	talk_begin(&t, &talk_two);
	assert_int_equal(ask_info(&t, NBD_OPT_GO, "disk", 0, NULL), NEGO_TRANSMIT);
	expect_info_export(&t, talk_disk.size, TFLAGS & ~NBD_FLAG_SEND_DF);
	expect_last(&t, NBD_REP_ACK); /* and no zeroes behind it */
	assert_ptr_equal(t.nego.chosen, &talk_disk);
	assert_false(t.nego.has_meta);
}

static void test_go_default_export(void **state)
{
	struct talk t;

	talk_begin(&t, &talk_two);
	assert_int_equal(ask_info(&t, NBD_OPT_GO, "", 1, (uint16_t[]){ NBD_INFO_NAME }),
			 NEGO_TRANSMIT);
	expect_info_export(&t, talk_disk.size, TFLAGS & ~NBD_FLAG_SEND_DF);
	expect_info_text(&t, NBD_INFO_NAME, "disk");
	expect_last(&t, NBD_REP_ACK);
	assert_ptr_equal(t.nego.chosen, &talk_disk);
}

static void test_info_gives_what_was_asked_for(void **state)
{
	static const uint16_t requests[] = { NBD_INFO_BLOCK_SIZE,  0x7777,
					     NBD_INFO_DESCRIPTION, NBD_INFO_EXPORT,
					     NBD_INFO_NAME,        0xffff,
					     NBD_INFO_NAME };
	struct talk t;

	talk_begin(&t, &talk_two);
	for (unsigned round = 0; round < 2; round++) {
		/* INFO, then the same by GO: the answers are the same. */
		bool is_go = round == 1;

		assert_int_equal(ask_info(&t, is_go ? NBD_OPT_GO : NBD_OPT_INFO, "disk",
					  ARRAY_LEN(requests), requests),
				 is_go ? NEGO_TRANSMIT : NEGO_OPTION);
		expect_info_export(&t, talk_disk.size, TFLAGS & ~NBD_FLAG_SEND_DF);
		expect_info_text(&t, NBD_INFO_NAME, "disk");
		expect_info_text(&t, NBD_INFO_DESCRIPTION, talk_disk.description);
		expect_info_block_size(&t, 1);
		expect_last(&t, NBD_REP_ACK);
	}
}

static void test_block_size_unasked_when_it_binds(void **state)
{
	struct talk t;

	talk_begin(&t, &talk_two);
	/* No description: the request for it is passed over. */
	assert_int_equal(
		ask_info(&t, NBD_OPT_INFO, "second", 1, (uint16_t[]){ NBD_INFO_DESCRIPTION }),
		NEGO_OPTION);
	expect_info_export(&t, 512, (TFLAGS | NBD_FLAG_READ_ONLY) & ~NBD_FLAG_SEND_DF);
	expect_info_block_size(&t, 512);
	expect_last(&t, NBD_REP_ACK);
}

static void test_df_only_with_structured_replies(void **state)
{
	struct talk t;

	talk_begin(&t, &talk_two);
	assert_int_equal(ask(&t, NBD_OPT_STRUCTURED_REPLY, NULL, 0), NEGO_OPTION);
	expect_last(&t, NBD_REP_ACK);
	assert_int_equal(ask_info(&t, NBD_OPT_GO, "disk", 0, NULL), NEGO_TRANSMIT);
	expect_info_export(&t, talk_disk.size, TFLAGS);
	expect_last(&t, NBD_REP_ACK);
	assert_true(t.nego.is_structured);
}

static void test_unknown_export(void **state)
{
	static const char *const names[] = { "disk2", "dis", "Disk", " ", "second/" };
	struct talk t;

	talk_begin(&t, &talk_two);
	for (size_t i = 0; i < ARRAY_LEN(names); i++) {
		assert_int_equal(ask_info(&t, NBD_OPT_GO, names[i], 0, NULL), NEGO_OPTION);
		expect_last(&t, NBD_REP_ERR_UNKNOWN); /* no INFO before it */
		assert_null(t.nego.chosen);
		assert_int_equal(ask_info(&t, NBD_OPT_INFO, names[i], 0, NULL), NEGO_OPTION);
		expect_last(&t, NBD_REP_ERR_UNKNOWN);
	}
	/* The negotiation goes on. */
	assert_int_equal(ask_info(&t, NBD_OPT_GO, "second", 0, NULL), NEGO_TRANSMIT);
	assert_ptr_equal(t.nego.chosen, &talk_second);
}

static void test_name_with_a_zero_byte(void **state)
{
	static const uint8_t data[] = { 0, 0, 0, 5, 'd', 'i', 's', 'k', 0, 0, 0 };
	struct talk t;

	talk_begin(&t, &talk_two);
	assert_int_equal(ask(&t, NBD_OPT_GO, data, sizeof(data)), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_UNKNOWN);
}

static void test_no_exports_at_all(void **state)
{
	struct talk t;

	talk_begin(&t, &talk_none);
	assert_int_equal(ask_info(&t, NBD_OPT_GO, "", 0, NULL), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_UNKNOWN);
	assert_int_equal(ask(&t, NBD_OPT_LIST, NULL, 0), NEGO_OPTION);
	expect_last(&t, NBD_REP_ACK);
}

static void test_malformed_info(void **state)
{
	static const struct {
		uint8_t v[16];
		size_t n;
	} rows[] = {
		{ { 0 }, 0 },
		{ { 0, 0, 0 }, 3 },
		{ { 0, 0, 0, 0 }, 4 },                            /* no count */
		{ { 0, 0, 0, 0, 0 }, 5 },                         /* half a count */
		{ { 0, 0, 0, 0, 0, 1 }, 6 },                      /* a request that is not there */
		{ { 0, 0, 0, 0, 0, 1, 0 }, 7 },                   /* half a request */
		{ { 0, 0, 0, 0, 0, 0, 0 }, 7 },                   /* one byte too many */
		{ { 0, 0, 0, 0, 0, 1, 0, 3, 0, 3 }, 10 },         /* one request too many */
		{ { 0, 0, 0, 4, 'd', 'i', 's', 'k' }, 8 },        /* name, no count */
		{ { 0, 0, 0, 5, 'd', 'i', 's', 'k', 0, 0 }, 10 }, /* name eats half of the count */
		{ { 0xff, 0xff, 0xff, 0xff, 'd', 'i', 0, 0 }, 8 },
		{ { 0xff, 0xff, 0xff, 0xfc, 'd', 'i', 0, 0 }, 8 }, /* + 4 wraps to 0 at 32 bits */
		{ { 0, 0, 0, 0, 0xff, 0xff, 0, 3 }, 8 },
	};
	struct talk t;

	talk_begin(&t, &talk_two);
	for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
		assert_int_equal(ask(&t, NBD_OPT_GO, rows[i].v, rows[i].n), NEGO_OPTION);
		expect_last(&t, NBD_REP_ERR_INVALID);
	}
	assert_int_equal(ask_info(&t, NBD_OPT_GO, "disk", 0, NULL), NEGO_TRANSMIT);
}

static void test_too_long(void **state)
{
	static struct data d;
	static char name[NBD_MAX_STRING + 2];
	struct nego_option huge = { NBD_OPT_GO, UINT32_MAX };
	struct talk t;

	talk_begin(&t, &talk_two);
	memset(name, 'n', NBD_MAX_STRING);
	assert_int_equal(ask_info(&t, NBD_OPT_GO, name, 0, NULL), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_UNKNOWN);
	name[NBD_MAX_STRING] = 'n';
	assert_int_equal(ask_info(&t, NBD_OPT_GO, name, 0, NULL), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_TOO_BIG);
	assert_int_equal(ask_meta(&t, NBD_OPT_SET_META_CONTEXT, "disk", 0, NULL), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_INVALID); /* structured replies come first */
	assert_int_equal(ask(&t, NBD_OPT_STRUCTURED_REPLY, NULL, 0), NEGO_OPTION);
	assert_int_equal(ask_meta(&t, NBD_OPT_SET_META_CONTEXT, name, 0, NULL), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_TOO_BIG);
	assert_int_equal(
		ask_meta(&t, NBD_OPT_SET_META_CONTEXT, "disk", 1, (const char *[]){ name }),
		NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_TOO_BIG);

	/* The longest that is looked at, full of information requests nobody knows. */
	d.n = 0;
	add_text(&d, "disk");
	add16(&d, (uint16_t)((NEGO_OPTION_MAX - 10) / 2));
	memset(d.v + d.n, 0x55, NEGO_OPTION_MAX - d.n);
	assert_int_equal(ask(&t, NBD_OPT_INFO, d.v, NEGO_OPTION_MAX), NEGO_OPTION);
	expect_info_export(&t, talk_disk.size, TFLAGS);
	expect_last(&t, NBD_REP_ACK);

	t.nego.out_n = t.at = 0;
	t.option = NBD_OPT_GO;
	assert_false(nego_wants_data(&huge));
	assert_int_equal(nego_answer(&t.nego, &huge, NULL), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_TOO_BIG);
}

static void test_unknown_options(void **state)
{
	static const uint32_t options[] = { 0,  4,          NBD_OPT_EXTENDED_HEADERS,
					    12, 0x7fffffff, UINT32_MAX };
	struct talk t;

	talk_begin(&t, &talk_two);
	for (size_t i = 0; i < ARRAY_LEN(options); i++) {
		for (size_t len = 0; len < 3; len++) {
			assert_int_equal(ask(&t, options[i], "xx", len), NEGO_OPTION);
			expect_last(&t, NBD_REP_ERR_UNSUP);
		}
	}
}

static void test_starttls(void **state)
{
	struct talk t;

	talk_begin(&t, &talk_two);
	for (unsigned i = 0; i < 2; i++) {
		assert_int_equal(ask(&t, NBD_OPT_STARTTLS, NULL, 0), NEGO_OPTION);
		expect_last(&t, NBD_REP_ERR_UNSUP);
	}
}

static void test_abort(void **state)
{
	struct talk t;

	talk_begin(&t, &talk_two);
	assert_int_equal(ask(&t, NBD_OPT_ABORT, "whatever", 8), NEGO_BYE);
	expect_last(&t, NBD_REP_ACK);
}

static void test_list(void **state)
{
	struct talk t;
	const uint8_t *p;

	talk_begin(&t, &talk_two);
	assert_int_equal(ask(&t, NBD_OPT_LIST, NULL, 0), NEGO_OPTION);
	assert_int_equal(expect(&t, NBD_REP_SERVER, &p), 4 + 4 + strlen(talk_disk.description));
	assert_int_equal(get_be32(p), 4);
	assert_memory_equal(p + 4, "disk", 4);
	assert_memory_equal(p + 8, talk_disk.description, strlen(talk_disk.description));
	assert_int_equal(expect(&t, NBD_REP_SERVER, &p), 4 + 6);
	assert_memory_equal(p + 4, "second", 6);
	expect_last(&t, NBD_REP_ACK);

	assert_int_equal(ask(&t, NBD_OPT_LIST, "x", 1), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_INVALID);
}

/* More than fits into one buffer: it comes in parts, nothing lost or twice. */
enum { MANY = 200 };

static struct export many[MANY];

static struct export *first_of_many(void)
{
	return &many[0];
}

static void test_long_list(void **state)
{
	static const struct nego_source source = { talk_find_none, first_of_many };
	static char names[MANY][NBD_MAX_STRING + 1];
	enum nego_next next;
	unsigned seen = 0, parts = 1;
	struct talk t;
	const uint8_t *p;

	for (unsigned i = 0; i < MANY; i++) {
		memset(names[i], 'a' + (int)(i % 26), i % 3 ? NBD_MAX_STRING : i + 1);
		many[i] = (struct export){ .name = names[i], .description = names[i] };
		many[i].next = i + 1 < MANY ? &many[i + 1] : NULL;
	}
	talk_begin(&t, &source);
	next = ask(&t, NBD_OPT_LIST, NULL, 0);
	for (;;) {
		while (t.at < t.nego.out_n && seen < MANY) {
			size_t len = strlen(names[seen]);

			assert_int_equal(expect(&t, NBD_REP_SERVER, &p), 4 + 2 * len);
			assert_memory_equal(p + 4, names[seen], len);
			seen++;
		}
		if (next != NEGO_MORE)
			break;
		assert_true(t.nego.out_n > 0);
		t.nego.out_n = t.at = 0;
		parts++;
		next = nego_more(&t.nego);
	}
	assert_int_equal(next, NEGO_OPTION);
	assert_int_equal(seen, MANY);
	assert_true(parts > 10);
	expect_last(&t, NBD_REP_ACK);
}

static void test_export_name(void **state)
{
	static const uint8_t zeroes[124];
	struct talk t;

	talk_begin(&t, &talk_two);
	assert_int_equal(ask(&t, NBD_OPT_EXPORT_NAME, "disk", 4), NEGO_TRANSMIT);
	assert_int_equal(t.nego.out_n, 10);
	assert_int_equal(get_be64(t.out), talk_disk.size);
	assert_int_equal(get_be16(t.out + 8), TFLAGS & ~NBD_FLAG_SEND_DF);

	talk_begin(&t, &talk_two);
	assert_true(nego_client_flags(&t.nego, 0));
	memset(t.out, 0xee, sizeof(t.out));
	assert_int_equal(ask(&t, NBD_OPT_EXPORT_NAME, "", 0), NEGO_TRANSMIT);
	assert_int_equal(t.nego.out_n, 134);
	assert_memory_equal(t.out + 10, zeroes, sizeof(zeroes));
	assert_ptr_equal(t.nego.chosen, &talk_disk);
}

/* It knows no error reply, so the connection is closed. */
static void test_export_name_refused(void **state)
{
	static char name[NBD_MAX_STRING + 1];
	struct talk t;

	talk_begin(&t, &talk_two);
	assert_int_equal(ask(&t, NBD_OPT_EXPORT_NAME, "disk2", 5), NEGO_CLOSE);
	assert_int_equal(t.nego.out_n, 0);
	memset(name, 'n', sizeof(name));
	assert_int_equal(ask(&t, NBD_OPT_EXPORT_NAME, name, sizeof(name)), NEGO_CLOSE);
	assert_int_equal(ask(&t, NBD_OPT_EXPORT_NAME, NULL, UINT32_MAX), NEGO_CLOSE);
	t.nego.is_ending = true;
	assert_int_equal(ask(&t, NBD_OPT_EXPORT_NAME, "disk", 4), NEGO_CLOSE);
}

static void test_not_fixed(void **state)
{
	struct talk t;

	talk_begin(&t, &talk_two);
	assert_true(nego_client_flags(&t.nego, NBD_FLAG_NO_ZEROES));
	assert_int_equal(ask(&t, NBD_OPT_LIST, NULL, 0), NEGO_CLOSE);
	assert_int_equal(ask(&t, NBD_OPT_EXPORT_NAME, "disk", 4), NEGO_TRANSMIT);
}

static void test_shutdown(void **state)
{
	struct talk t;

	talk_begin(&t, &talk_two);
	t.nego.is_ending = true;
	assert_int_equal(ask_info(&t, NBD_OPT_INFO, "disk", 0, NULL), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_SHUTDOWN);
	assert_int_equal(ask_info(&t, NBD_OPT_GO, "disk", 0, NULL), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_SHUTDOWN);
	assert_null(t.nego.chosen);
	assert_int_equal(ask(&t, NBD_OPT_ABORT, NULL, 0), NEGO_BYE);
	expect_last(&t, NBD_REP_ACK);
}

/* The fullest answer there can be fits into NEGO_OUT_ROOM (an assert watches over it). */
static void test_fullest_info(void **state)
{
	static const uint16_t all[] = { NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE };
	static char text[NBD_MAX_STRING + 1];
	char *const name = talk_disk.name, *const description = talk_disk.description;
	struct talk t;

	talk_begin(&t, &talk_two);
	memset(text, 't', NBD_MAX_STRING);
	talk_disk.name = talk_disk.description = text;
	assert_int_equal(ask_info(&t, NBD_OPT_GO, text, ARRAY_LEN(all), all), NEGO_TRANSMIT);
	talk_disk.name = name;
	talk_disk.description = description;
	expect_info_export(&t, talk_disk.size, TFLAGS & ~NBD_FLAG_SEND_DF);
	expect_info_text(&t, NBD_INFO_NAME, text);
	expect_info_text(&t, NBD_INFO_DESCRIPTION, text);
	expect_info_block_size(&t, 1);
	expect_last(&t, NBD_REP_ACK);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_greeting),
		cmocka_unit_test(test_client_flags),
		cmocka_unit_test(test_option_header),
		cmocka_unit_test(test_go),
		cmocka_unit_test(test_go_default_export),
		cmocka_unit_test(test_info_gives_what_was_asked_for),
		cmocka_unit_test(test_block_size_unasked_when_it_binds),
		cmocka_unit_test(test_df_only_with_structured_replies),
		cmocka_unit_test(test_unknown_export),
		cmocka_unit_test(test_name_with_a_zero_byte),
		cmocka_unit_test(test_no_exports_at_all),
		cmocka_unit_test(test_malformed_info),
		cmocka_unit_test(test_too_long),
		cmocka_unit_test(test_unknown_options),
		cmocka_unit_test(test_starttls),
		cmocka_unit_test(test_abort),
		cmocka_unit_test(test_list),
		cmocka_unit_test(test_long_list),
		cmocka_unit_test(test_export_name),
		cmocka_unit_test(test_export_name_refused),
		cmocka_unit_test(test_not_fixed),
		cmocka_unit_test(test_shutdown),
		cmocka_unit_test(test_fullest_info),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
