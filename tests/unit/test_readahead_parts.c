/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The parts of layer readahead by themselves: the table of pieces and the detector of streams.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "layer/readahead/readahead_int.h"
#include "nbdrs/cleanup.h"

enum { KI = 1024, MI = KI * KI, BLOCK = 4 * KI };

/* --- The table by itself ---------------------------------------------------------------------- */

/* A piece that has been fetched. */
static struct piece *ready(struct pieces *t, uint64_t from, uint64_t to, uint64_t now)
{
	struct piece *p = piece_new(t, from, to, now);

	if (!p)
		return NULL;
	p->is_fetching = false;
	p->fetched = p->len;
	piece_put(t, p);
	return p;
}

static void test_pieces_cut(void **state)
{
	struct pieces t;
	struct piece *a, *b, *c;

	assert_int_equal(pieces_init(&t, 16 * MI), 0);
	b = ready(&t, 100000, 200000, 1);
	a = ready(&t, 0, 100000, 2);
	c = ready(&t, 300000, 400000, 3);
	assert_true(t.n == 3 && t.v[0] == a && t.v[1] == b && t.v[2] == c);
	assert_true(pieces_touch(&t, 199999, 200001) && !pieces_touch(&t, 200000, 300000));
	assert_int_equal(pieces_at(&t, 99999), 0);
	assert_int_equal(pieces_at(&t, 100000), 1);
	assert_int_equal(pieces_at(&t, 200000), 2);
	assert_int_equal(pieces_at(&t, 400000), 3);

	pieces_cut(&t, 90000, 110000); /* the end of one, the beginning of another */
	assert_true(a->from == 0 && a->to == 90000 && b->from == 110000 && b->to == 200000);
	pieces_cut(&t, 310000, 320000); /* the larger side stays */
	assert_true(c->from == 320000 && c->to == 400000);
	pieces_cut(&t, 390000, 390001);
	assert_true(c->from == 320000 && c->to == 390000);
	pieces_cut(&t, 200000, 320000); /* nothing there */
	assert_true(b->to == 200000 && c->from == 320000);
	pieces_cut(&t, 50000, 330000); /* all of one */
	assert_true(t.n == 2 && a->to == 50000 && c->from == 330000);
	pieces_cut(&t, 0, UINT64_MAX);
	assert_int_equal(t.n, 0);
	assert_int_equal(t.wasted, 300000);
	pieces_free(&t);
}

/* A writer that follows the reader through a piece does not make it go early. */
static void test_pieces_consume(void **state)
{
	struct pieces t;
	struct piece *p;

	assert_int_equal(pieces_init(&t, 16 * MI), 0);
	p = ready(&t, 0, 100 * KI, 1);
	for (uint64_t off = 0; off < 100 * KI; off += 10 * KI) {
		assert_true(p->is_listed && p->from == off);
		p->refs++;
		piece_consume(&t, p, 10 * KI);
		assert_int_equal(p->is_listed, off < 90 * KI);
		piece_put(&t, p);
		pieces_cut(&t, off, off + 10 * KI);
	}
	assert_int_equal(t.n, 0);
	assert_int_equal(t.wasted, 0);
	pieces_free(&t);
}

/* Makes room by the oldest that is idle, never goes beyond the limit, and gives everything back. */
static void test_pieces_memory(void **state)
{
	struct pieces t;
	struct piece *oldest, *p;

	assert_int_equal(pieces_init(&t, MI), 0);
	oldest = piece_new(&t, 0, 256 * KI, 1); /* stays: on its way */
	assert_non_null(oldest);
	for (uint64_t i = 1; i < 4; i++)
		assert_non_null(ready(&t, i * 256 * KI, (i + 1) * 256 * KI, i + 1));
	assert_int_equal(t.total, MI);
	assert_non_null(ready(&t, 4 * MI, 4 * MI + 200 * KI, 5));
	assert_true(t.n == 4 && t.v[0] == oldest && t.v[1]->off == 512 * KI);
	/* Another size: two go for one. */
	p = ready(&t, 5 * MI, 5 * MI + 400 * KI, 6);
	assert_non_null(p);
	assert_true(t.n == 3 && t.v[1]->off == 4 * MI && t.total <= MI);
	p->refs++; /* somebody copies */
	assert_null(piece_new(&t, 6 * MI, 7 * MI, 7));
	assert_true(t.n == 2 && t.total <= MI);
	p->refs--;

	oldest->is_fetching = false;
	piece_put(&t, oldest);
	assert_true(pieces_tidy(&t, 6)); /* only what is older */
	assert_true(t.n == 1 && t.v[0] == p);
	assert_false(pieces_tidy(&t, 7)); /* nothing new since: all goes */
	assert_true(t.n == 0 && t.total == 0);
	for (uint64_t i = 0; i < PIECES_MAX + 10; i++)
		assert_non_null(ready(&t, i * 10, i * 10 + 10, i));
	assert_true(t.n <= PIECES_MAX && t.total <= MI);
	pieces_free(&t);
}

/* --- The detector by itself ------------------------------------------------------------------- */

static unsigned notes(const uint64_t *units, unsigned n, uint64_t len)
{
	struct streams t;
	unsigned found = 0;

	assert_int_equal(streams_init(&t, 4), 0);
	for (unsigned i = 0; i < n; i++)
		found += streams_note(&t, units[i] * len, len, i + 1) != NULL;
	streams_free(&t);
	return found;
}

#define NOTES(len, ...)                          \
	notes((const uint64_t[]){ __VA_ARGS__ }, \
	      sizeof((const uint64_t[]){ __VA_ARGS__ }) / sizeof(uint64_t), len)

static void test_streams(void **state)
{
	static const uint64_t lengths[] = { 512, BLOCK, 128 * KI, 4 * MI };

	for (unsigned i = 0; i < ARRAY_LEN(lengths); i++) {
		uint64_t len = lengths[i];

		assert_int_equal(NOTES(len, 0, 1), 0);
		assert_int_equal(NOTES(len, 0, 1, 2), 1);
		assert_int_equal(NOTES(len, 7, 8, 9, 10, 11), 3);
		/* Out of order. */
		assert_true(NOTES(len, 0, 3, 1, 2, 4, 6, 5, 7) >= 3);
		assert_true(NOTES(len, 2, 0, 1, 3, 5, 4, 6) >= 2);
		/* Two at a time. */
		assert_int_equal(NOTES(len, 0, 1000, 1, 1001, 2, 1002), 2);
		/* Backwards, on the spot, in strides. */
		assert_int_equal(NOTES(len, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 0);
		assert_int_equal(NOTES(len, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5), 0);
		assert_int_equal(NOTES(len, 0, 2, 4, 6, 8, 10, 12, 14, 16), 0);
	}
}

/* A stream that becomes thin is none any more; others take the place of those that are not used. */
static void test_streams_end(void **state)
{
	struct streams t;
	struct stream *s = NULL;
	uint64_t off = 0, now = 0;

	assert_int_equal(streams_init(&t, 2), 0);
	for (; off < 64 * KI; off += BLOCK)
		s = streams_note(&t, off, BLOCK, ++now);
	assert_non_null(s);
	assert_true(s->pos == 64 * KI && s->prev == 60 * KI);
	for (; s && off < 16 * MI; off += 32 * KI)
		s = streams_note(&t, off, BLOCK, ++now);
	assert_null(s);
	assert_true(off < 3 * MI);
	assert_int_equal(streams_active(&t, 0), 0);

	for (unsigned k = 1; k <= 3; k++) {
		for (unsigned i = 0; i < 4; i++)
			s = streams_note(&t, k * 100 * (uint64_t)MI + i * BLOCK, BLOCK, ++now);
		assert_non_null(s);
	}
	assert_int_equal(streams_active(&t, 0), 2);
	assert_int_equal(streams_active(&t, now - 1), 1);
	assert_int_equal(t.found, 4);
	streams_free(&t);
}

/* A long way is no reason not to fetch more at a time, a full line is. */
static void test_pace(void **state)
{
	enum { MS = 1000000 };
	struct pace p = { 0 };

	assert_false(pace_is_crowded(&p));
	for (unsigned i = 0; i < 100; i++) {
		pace_note(&p, 600 * (uint64_t)MS + i);
		assert_false(pace_is_crowded(&p)); /* the far side of the moon */
	}
	p = (struct pace){ 0 };
	for (uint64_t ms = 10; ms <= 250; ms += 10) {
		pace_note(&p, ms * MS);
		assert_false(pace_is_crowded(&p)); /* a line that fills, but not much */
	}
	for (unsigned i = 0; i < 10; i++)
		pace_note(&p, 500 * (uint64_t)MS);
	assert_true(pace_is_crowded(&p));
	for (unsigned i = 0; i < 10; i++)
		pace_note(&p, 20 * (uint64_t)MS);
	assert_false(pace_is_crowded(&p));
	for (unsigned i = 0; i < 400; i++) /* another line, and a longer one */
		pace_note(&p, 500 * (uint64_t)MS);
	assert_false(pace_is_crowded(&p));
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_pieces_cut),    cmocka_unit_test(test_pieces_consume),
		cmocka_unit_test(test_pieces_memory), cmocka_unit_test(test_streams),
		cmocka_unit_test(test_streams_end),   cmocka_unit_test(test_pace),
	};

	return cmocka_run_group_tests_name("readahead's parts", tests, NULL, NULL);
}
