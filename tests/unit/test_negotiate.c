/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The negotiation, option by option, as NBD proto.md has it.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "nbdrs/cleanup.h"
#include "net/negotiate.h"

#define TFLAGS (NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_DF)

/* struct export owns its texts, so they are not const. */
static char second_name[] = "second", disk_name[] = "disk", disk_description[] = "10GiB, raw:file";

static struct export second = {
	.name = second_name,
	.size = 512,
	.tflags = TFLAGS | NBD_FLAG_READ_ONLY,
	.min_block = 512,
	.pref_block = 4096,
	.max_payload = NBD_MAX_PAYLOAD,
};

static struct export disk = {
	.name = disk_name,
	.description = disk_description,
	.size = UINT64_C(0x0102030405060708),
	.tflags = TFLAGS,
	.min_block = 1,
	.pref_block = 4096,
	.max_payload = NBD_MAX_PAYLOAD,
	.next = &second,
};

static struct export *find_any(const char *name, size_t len)
{
	if (len == 0)
		return &disk;
	for (struct export *e = &disk; e; e = e->next) {
		if (strlen(e->name) == len && memcmp(e->name, name, len) == 0)
			return e;
	}
	return NULL;
}

static struct export *first_any(void)
{
	return &disk;
}

static const struct nego_source two = { find_any, first_any };

static struct export *find_none(const char *name, size_t len)
{
	return NULL;
}

static struct export *first_none(void)
{
	return NULL;
}

static const struct nego_source none = { find_none, first_none };

/* A client: sends an option, then looks at one message of the answer after the other. */
struct talk {
	struct nego nego;
	uint8_t out[NEGO_OUT_ROOM];
	size_t at;
	uint32_t option;
};

static void talk_begin(struct talk *t, const struct nego_source *source)
{
	memset(t, 0, sizeof(*t));
	nego_init(&t->nego, source);
	t->nego.out = t->out;
	assert_true(nego_client_flags(&t->nego, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES));
}

static enum nego_next ask(struct talk *t, uint32_t option, const void *data, size_t len)
{
	struct nego_option o = { option, (uint32_t)len };

	t->nego.out_n = 0;
	t->at = 0;
	t->option = option;
	return nego_answer(&t->nego, &o, nego_wants_data(&o) ? data ? data : "" : NULL);
}

/* The next message must be of this type; its data's length, *data set. */
static size_t expect(struct talk *t, uint32_t type, const uint8_t **data)
{
	const uint8_t *p = t->out + t->at;
	size_t len;

	assert_true(t->nego.out_n - t->at >= NBD_REP_HEADER_LEN);
	assert_int_equal(get_be64(p), NBD_REP_MAGIC);
	assert_int_equal(get_be32(p + 8), t->option);
	assert_int_equal(get_be32(p + 12), type);
	len = get_be32(p + 16);
	t->at += NBD_REP_HEADER_LEN + len;
	assert_true(t->at <= t->nego.out_n);
	*data = p + NBD_REP_HEADER_LEN;
	return len;
}

/* And no more. */
static void expect_last(struct talk *t, uint32_t type)
{
	const uint8_t *data;
	size_t len = expect(t, type, &data);

	if (type == NBD_REP_ACK)
		assert_int_equal(len, 0);
	assert_int_equal(t->at, t->nego.out_n);
}

static void expect_info_export(struct talk *t, uint64_t size, uint16_t tflags)
{
	const uint8_t *p;

	assert_int_equal(expect(t, NBD_REP_INFO, &p), 12);
	assert_int_equal(get_be16(p), NBD_INFO_EXPORT);
	assert_int_equal(get_be64(p + 2), size);
	assert_int_equal(get_be16(p + 10), tflags);
}

static void expect_info_text(struct talk *t, uint16_t type, const char *text)
{
	const uint8_t *p;

	assert_int_equal(expect(t, NBD_REP_INFO, &p), 2 + strlen(text));
	assert_int_equal(get_be16(p), type);
	assert_memory_equal(p + 2, text, strlen(text));
}

static void expect_info_block_size(struct talk *t, uint32_t min)
{
	const uint8_t *p;

	assert_int_equal(expect(t, NBD_REP_INFO, &p), 14);
	assert_int_equal(get_be16(p), NBD_INFO_BLOCK_SIZE);
	assert_int_equal(get_be32(p + 2), min);
	assert_int_equal(get_be32(p + 6), 4096);
	assert_int_equal(get_be32(p + 10), NBD_MAX_PAYLOAD);
}

static void expect_context(struct talk *t, uint32_t id)
{
	const uint8_t *p;

	assert_int_equal(expect(t, NBD_REP_META_CONTEXT, &p), 4 + strlen("base:allocation"));
	assert_int_equal(get_be32(p), id);
	assert_memory_equal(p + 4, "base:allocation", strlen("base:allocation"));
}

/* Builds option data. */
struct data {
	uint8_t v[NEGO_OPTION_MAX];
	size_t n;
};

static void add32(struct data *d, uint32_t v)
{
	put_be32(d->v + d->n, v);
	d->n += 4;
}

static void add16(struct data *d, uint16_t v)
{
	put_be16(d->v + d->n, v);
	d->n += 2;
}

static void add_text(struct data *d, const char *text)
{
	add32(d, (uint32_t)strlen(text));
	memcpy(d->v + d->n, text, strlen(text));
	d->n += strlen(text);
}

/* INFO or GO with `n` information requests. */
static enum nego_next ask_info(struct talk *t, uint32_t option, const char *name, unsigned n,
			       const uint16_t *requests)
{
	struct data d = { .n = 0 };

	add_text(&d, name);
	add16(&d, (uint16_t)n);
	for (unsigned i = 0; i < n; i++)
		add16(&d, requests[i]);
	return ask(t, option, d.v, d.n);
}

static enum nego_next ask_meta(struct talk *t, uint32_t option, const char *name, unsigned n,
			       const char *const *queries)
{
	struct data d = { .n = 0 };

	add_text(&d, name);
	add32(&d, n);
	for (unsigned i = 0; i < n; i++)
		add_text(&d, queries[i]);
	return ask(t, option, d.v, d.n);
}

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

		nego_init(&n, &two);
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

	talk_begin(&t, &two);
	assert_int_equal(ask_info(&t, NBD_OPT_GO, "disk", 0, NULL), NEGO_TRANSMIT);
	expect_info_export(&t, disk.size, TFLAGS & ~NBD_FLAG_SEND_DF);
	expect_last(&t, NBD_REP_ACK); /* and no zeroes behind it */
	assert_ptr_equal(t.nego.chosen, &disk);
	assert_false(t.nego.has_meta);
}

static void test_go_default_export(void **state)
{
	struct talk t;

	talk_begin(&t, &two);
	assert_int_equal(ask_info(&t, NBD_OPT_GO, "", 1, (uint16_t[]){ NBD_INFO_NAME }),
			 NEGO_TRANSMIT);
	expect_info_export(&t, disk.size, TFLAGS & ~NBD_FLAG_SEND_DF);
	expect_info_text(&t, NBD_INFO_NAME, "disk");
	expect_last(&t, NBD_REP_ACK);
	assert_ptr_equal(t.nego.chosen, &disk);
}

static void test_info_gives_what_was_asked_for(void **state)
{
	static const uint16_t requests[] = { NBD_INFO_BLOCK_SIZE,  0x7777,
					     NBD_INFO_DESCRIPTION, NBD_INFO_EXPORT,
					     NBD_INFO_NAME,        0xffff,
					     NBD_INFO_NAME };
	struct talk t;

	talk_begin(&t, &two);
	for (unsigned round = 0; round < 2; round++) {
		/* INFO, then the same by GO: the answers are the same. */
		bool is_go = round == 1;

		assert_int_equal(ask_info(&t, is_go ? NBD_OPT_GO : NBD_OPT_INFO, "disk",
					  ARRAY_LEN(requests), requests),
				 is_go ? NEGO_TRANSMIT : NEGO_OPTION);
		expect_info_export(&t, disk.size, TFLAGS & ~NBD_FLAG_SEND_DF);
		expect_info_text(&t, NBD_INFO_NAME, "disk");
		expect_info_text(&t, NBD_INFO_DESCRIPTION, disk.description);
		expect_info_block_size(&t, 1);
		expect_last(&t, NBD_REP_ACK);
	}
}

static void test_block_size_unasked_when_it_binds(void **state)
{
	struct talk t;

	talk_begin(&t, &two);
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

	talk_begin(&t, &two);
	assert_int_equal(ask(&t, NBD_OPT_STRUCTURED_REPLY, NULL, 0), NEGO_OPTION);
	expect_last(&t, NBD_REP_ACK);
	assert_int_equal(ask_info(&t, NBD_OPT_GO, "disk", 0, NULL), NEGO_TRANSMIT);
	expect_info_export(&t, disk.size, TFLAGS);
	expect_last(&t, NBD_REP_ACK);
	assert_true(t.nego.is_structured);
}

static void test_unknown_export(void **state)
{
	static const char *const names[] = { "disk2", "dis", "Disk", " ", "second/" };
	struct talk t;

	talk_begin(&t, &two);
	for (size_t i = 0; i < ARRAY_LEN(names); i++) {
		assert_int_equal(ask_info(&t, NBD_OPT_GO, names[i], 0, NULL), NEGO_OPTION);
		expect_last(&t, NBD_REP_ERR_UNKNOWN); /* no INFO before it */
		assert_null(t.nego.chosen);
		assert_int_equal(ask_info(&t, NBD_OPT_INFO, names[i], 0, NULL), NEGO_OPTION);
		expect_last(&t, NBD_REP_ERR_UNKNOWN);
	}
	/* The negotiation goes on. */
	assert_int_equal(ask_info(&t, NBD_OPT_GO, "second", 0, NULL), NEGO_TRANSMIT);
	assert_ptr_equal(t.nego.chosen, &second);
}

static void test_name_with_a_zero_byte(void **state)
{
	static const uint8_t data[] = { 0, 0, 0, 5, 'd', 'i', 's', 'k', 0, 0, 0 };
	struct talk t;

	talk_begin(&t, &two);
	assert_int_equal(ask(&t, NBD_OPT_GO, data, sizeof(data)), NEGO_OPTION);
	expect_last(&t, NBD_REP_ERR_UNKNOWN);
}

static void test_no_exports_at_all(void **state)
{
	struct talk t;

	talk_begin(&t, &none);
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

	talk_begin(&t, &two);
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

	talk_begin(&t, &two);
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
	expect_info_export(&t, disk.size, TFLAGS);
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

	talk_begin(&t, &two);
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

	talk_begin(&t, &two);
	for (unsigned i = 0; i < 2; i++) {
		assert_int_equal(ask(&t, NBD_OPT_STARTTLS, NULL, 0), NEGO_OPTION);
		expect_last(&t, NBD_REP_ERR_UNSUP);
	}
}

static void test_abort(void **state)
{
	struct talk t;

	talk_begin(&t, &two);
	assert_int_equal(ask(&t, NBD_OPT_ABORT, "whatever", 8), NEGO_BYE);
	expect_last(&t, NBD_REP_ACK);
}

static void test_list(void **state)
{
	struct talk t;
	const uint8_t *p;

	talk_begin(&t, &two);
	assert_int_equal(ask(&t, NBD_OPT_LIST, NULL, 0), NEGO_OPTION);
	assert_int_equal(expect(&t, NBD_REP_SERVER, &p), 4 + 4 + strlen(disk.description));
	assert_int_equal(get_be32(p), 4);
	assert_memory_equal(p + 4, "disk", 4);
	assert_memory_equal(p + 8, disk.description, strlen(disk.description));
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
	static const struct nego_source source = { find_none, first_of_many };
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

	talk_begin(&t, &two);
	assert_int_equal(ask(&t, NBD_OPT_EXPORT_NAME, "disk", 4), NEGO_TRANSMIT);
	assert_int_equal(t.nego.out_n, 10);
	assert_int_equal(get_be64(t.out), disk.size);
	assert_int_equal(get_be16(t.out + 8), TFLAGS & ~NBD_FLAG_SEND_DF);

	talk_begin(&t, &two);
	assert_true(nego_client_flags(&t.nego, 0));
	memset(t.out, 0xee, sizeof(t.out));
	assert_int_equal(ask(&t, NBD_OPT_EXPORT_NAME, "", 0), NEGO_TRANSMIT);
	assert_int_equal(t.nego.out_n, 134);
	assert_memory_equal(t.out + 10, zeroes, sizeof(zeroes));
	assert_ptr_equal(t.nego.chosen, &disk);
}

/* It knows no error reply, so the connection is closed. */
static void test_export_name_refused(void **state)
{
	static char name[NBD_MAX_STRING + 1];
	struct talk t;

	talk_begin(&t, &two);
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

	talk_begin(&t, &two);
	assert_true(nego_client_flags(&t.nego, NBD_FLAG_NO_ZEROES));
	assert_int_equal(ask(&t, NBD_OPT_LIST, NULL, 0), NEGO_CLOSE);
	assert_int_equal(ask(&t, NBD_OPT_EXPORT_NAME, "disk", 4), NEGO_TRANSMIT);
}

static void test_structured_reply(void **state)
{
	struct talk t;

	talk_begin(&t, &two);
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
	talk_begin(t, &two);
	assert_int_equal(ask(t, NBD_OPT_STRUCTURED_REPLY, NULL, 0), NEGO_OPTION);
}

static void test_meta_needs_structured_replies(void **state)
{
	struct talk t;

	talk_begin(&t, &two);
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

static void test_shutdown(void **state)
{
	struct talk t;

	talk_begin(&t, &two);
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
	struct talk t;

	talk_begin(&t, &two);
	memset(text, 't', NBD_MAX_STRING);
	disk.name = disk.description = text;
	assert_int_equal(ask_info(&t, NBD_OPT_GO, text, ARRAY_LEN(all), all), NEGO_TRANSMIT);
	disk.name = disk_name;
	disk.description = disk_description;
	expect_info_export(&t, disk.size, TFLAGS & ~NBD_FLAG_SEND_DF);
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
		cmocka_unit_test(test_structured_reply),
		cmocka_unit_test(test_meta_needs_structured_replies),
		cmocka_unit_test(test_list_meta_context),
		cmocka_unit_test(test_set_meta_context),
		cmocka_unit_test(test_set_meta_context_to_nothing),
		cmocka_unit_test(test_set_meta_context_is_lost_by_a_failure),
		cmocka_unit_test(test_meta_context_belongs_to_a_name),
		cmocka_unit_test(test_malformed_meta),
		cmocka_unit_test(test_shutdown),
		cmocka_unit_test(test_fullest_info),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
