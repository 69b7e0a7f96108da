/* SPDX-License-Identifier: GPL-3.0-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "nego_talk.h"

/* struct export owns its texts, so they are not const. */
static char second_name[] = "second", disk_name[] = "disk", disk_description[] = "10GiB, raw:file";

struct export talk_second = {
	.name = second_name,
	.size = 512,
	.tflags = TFLAGS | NBD_FLAG_READ_ONLY,
	.min_block = 512,
	.pref_block = 4096,
	.max_payload = NBD_MAX_PAYLOAD,
};

struct export talk_disk = {
	.name = disk_name,
	.description = disk_description,
	.size = UINT64_C(0x0102030405060708),
	.tflags = TFLAGS,
	.min_block = 1,
	.pref_block = 4096,
	.max_payload = NBD_MAX_PAYLOAD,
	.next = &talk_second,
};

static struct export *find_any(const char *name, size_t len)
{
	if (len == 0)
		return &talk_disk;
	for (struct export *e = &talk_disk; e; e = e->next) {
		if (strlen(e->name) == len && memcmp(e->name, name, len) == 0)
			return e;
	}
	return NULL;
}

static struct export *first_any(void)
{
	return &talk_disk;
}

const struct nego_source talk_two = { find_any, first_any };

struct export *talk_find_none(const char *name, size_t len)
{
	return NULL;
}

static struct export *first_none(void)
{
	return NULL;
}

const struct nego_source talk_none = { talk_find_none, first_none };

void talk_begin(struct talk *t, const struct nego_source *source)
{
	memset(t, 0, sizeof(*t));
	nego_init(&t->nego, source);
	t->nego.out = t->out;
	assert_true(nego_client_flags(&t->nego, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES));
}

enum nego_next ask(struct talk *t, uint32_t option, const void *data, size_t len)
{
	struct nego_option o = { option, (uint32_t)len };

	t->nego.out_n = 0;
	t->at = 0;
	t->option = option;
	return nego_answer(&t->nego, &o, nego_wants_data(&o) ? data ? data : "" : NULL);
}

size_t expect(struct talk *t, uint32_t type, const uint8_t **data)
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

void expect_last(struct talk *t, uint32_t type)
{
	const uint8_t *data;
	size_t len = expect(t, type, &data);

	if (type == NBD_REP_ACK)
		assert_int_equal(len, 0);
	assert_int_equal(t->at, t->nego.out_n);
}

void expect_info_export(struct talk *t, uint64_t size, uint16_t tflags)
{
	const uint8_t *p;

	assert_int_equal(expect(t, NBD_REP_INFO, &p), 12);
	assert_int_equal(get_be16(p), NBD_INFO_EXPORT);
	assert_int_equal(get_be64(p + 2), size);
	assert_int_equal(get_be16(p + 10), tflags);
}

void expect_info_text(struct talk *t, uint16_t type, const char *text)
{
	const uint8_t *p;

	assert_int_equal(expect(t, NBD_REP_INFO, &p), 2 + strlen(text));
	assert_int_equal(get_be16(p), type);
	assert_memory_equal(p + 2, text, strlen(text));
}

void expect_info_block_size(struct talk *t, uint32_t min)
{
	const uint8_t *p;

	assert_int_equal(expect(t, NBD_REP_INFO, &p), 14);
	assert_int_equal(get_be16(p), NBD_INFO_BLOCK_SIZE);
	assert_int_equal(get_be32(p + 2), min);
	assert_int_equal(get_be32(p + 6), 4096);
	assert_int_equal(get_be32(p + 10), NBD_MAX_PAYLOAD);
}

void expect_context(struct talk *t, uint32_t id)
{
	const uint8_t *p;

	assert_int_equal(expect(t, NBD_REP_META_CONTEXT, &p), 4 + strlen("base:allocation"));
	assert_int_equal(get_be32(p), id);
	assert_memory_equal(p + 4, "base:allocation", strlen("base:allocation"));
}

void add32(struct data *d, uint32_t v)
{
	put_be32(d->v + d->n, v);
	d->n += 4;
}

void add16(struct data *d, uint16_t v)
{
	put_be16(d->v + d->n, v);
	d->n += 2;
}

void add_text(struct data *d, const char *text)
{
	add32(d, (uint32_t)strlen(text));
	memcpy(d->v + d->n, text, strlen(text));
	d->n += strlen(text);
}

enum nego_next ask_info(struct talk *t, uint32_t option, const char *name, unsigned n,
			       const uint16_t *requests)
{
	struct data d = { .n = 0 };

	add_text(&d, name);
	add16(&d, (uint16_t)n);
	for (unsigned i = 0; i < n; i++)
		add16(&d, requests[i]);
	return ask(t, option, d.v, d.n);
}

enum nego_next ask_meta(struct talk *t, uint32_t option, const char *name, unsigned n,
			       const char *const *queries)
{
	struct data d = { .n = 0 };

	add_text(&d, name);
	add32(&d, n);
	for (unsigned i = 0; i < n; i++)
		add_text(&d, queries[i]);
	return ask(t, option, d.v, d.n);
}
