/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The cases that every keyed store must pass: conditions, parts, and many at a time.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "conform_store.h"
#include "conformance.h"
#include "nbdrs/cleanup.h"

/* --- Conditions ------------------------------------------------------------------------------- */

static CO_FN int race(struct store_run *r, unsigned i, void *arg)
{
	_Atomic int *winner = arg;
	char data[2000];
	int rc;

	memset(data, 'a' + (int)i, sizeof(data));
	rc = store_put(r, "lock", data, sizeof(data), PUT_IF_ABSENT, NULL, NULL);
	CHECK(r, rc == 0 || rc == -EEXIST, "put if absent: %s", err_name(rc));
	if (rc == 0)
		CHECK(r, atomic_exchange(winner, (int)i) == -1, "two have won, one is %u", i);
	return 0;
}

int store_case_if_absent(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct obj obj = store_obj(r, "lock");
	char data[2000];

	CHECK(r, c, "channel");
	if (!store_can(r, CAN_PUT_IF)) {
		int rc = store_put(r, "lock", "x", 1, PUT_IF_ABSENT, NULL, NULL);

		CHECK(r, rc == -ENOTSUP, "%s", err_name(rc));
		return 0;
	}
	for (unsigned round = 0; round < 5; round++) {
		_Atomic int winner = -1;

		if (store_fibers(r, 16, race, &winner))
			return -1;
		CHECK(r, winner >= 0, "nobody has won");
		memset(data, 'a' + winner, sizeof(data));
		if (store_expect(r, "lock", data, sizeof(data)))
			return -1;
		CHECK(r, ch_del(c, &obj, 1) == 0, "del");
	}
	return 0;
}

enum { COUNTERS = 8 };

/*
 * One object with a counter for each fiber; each raises its own, `times` times. A put that is refused may have been
 * done all the same, where answers get lost: then the fiber finds its counter raised.
 */
static CO_FN int count_up(struct store_run *r, unsigned i, void *arg)
{
	const unsigned *times = arg;
	uint32_t v[COUNTERS];

	for (unsigned done = 0; done < *times;) {
		struct obj_stat before;
		int rc = store_stat_of(r, "counter", &before);

		CHECK(r, rc == 0, "stat: %s", err_name(rc));
		rc = store_get(r, "counter", 0, v, sizeof(v));
		CHECK(r, rc == 0, "read: %s", err_name(rc));
		CHECK(r, v[i] == done || v[i] == done + 1, "%u is at %u after %u", i, v[i], done);
		rc = 0;
		if (v[i] == done) {
			v[i]++;
			rc = store_put(r, "counter", v, sizeof(v), PUT_IF_MATCH, before.etag, NULL);
		}
		CHECK(r, rc == 0 || rc == -ESTALE, "put if match: %s", err_name(rc));
		done += rc == 0;
	}
	return 0;
}

int store_case_if_match(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct obj obj = store_obj(r, "m");
	struct obj_stat first, second;
	unsigned times = store_less(r, 20);
	uint32_t v[COUNTERS] = { 0 };
	int rc;

	CHECK(r, c, "channel");
	if (!store_can(r, CAN_PUT_IF))
		return 0;
	rc = store_put(r, "m", "one", 3, PUT_IF_MATCH, "0", NULL);
	CHECK(r, rc == -ESTALE, "of a missing one: %s", err_name(rc));
	CHECK(r, store_put(r, "m", "one", 3, PUT_ALWAYS, NULL, &first) == 0, "put");
	rc = store_put(r, "m", "two", 3, PUT_IF_MATCH, first.etag, &second);
	CHECK(r, rc == 0, "%s", err_name(rc));
	rc = store_put(r, "m", "six", 3, PUT_IF_MATCH, first.etag, NULL);
	CHECK(r, rc == -ESTALE, "of the last one but one: %s", err_name(rc));
	if (store_expect(r, "m", "two", 3))
		return -1;
	CHECK(r, ch_del(c, &obj, 1) == 0, "del");
	rc = store_put(r, "m", "six", 3, PUT_IF_MATCH, second.etag, NULL);
	CHECK(r, rc == -ESTALE, "of one that has gone: %s", err_name(rc));
	CHECK(r, store_put(r, "counter", v, sizeof(v), PUT_ALWAYS, NULL, NULL) == 0, "put");
	if (store_fibers(r, COUNTERS, count_up, &times))
		return -1;
	for (unsigned i = 0; i < COUNTERS; i++)
		v[i] = times;
	return store_expect(r, "counter", v, sizeof(v));
}

/* --- Parts ------------------------------------------------------------------------------------ */

int store_case_partial(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	_cleanup_free_ uint8_t *want = calloc(1, 200000);
	struct obj obj = store_obj(r, "p"), none = store_obj(r, "none");
	struct obj_stat before, after;
	int rc;

	CHECK(r, c && want, "memory");
	if (!store_can(r, CAN_PARTIAL))
		return 0;
	/* Makes it, with zeroes before. */
	store_fill(want + 5000, 3000, 1);
	rc = store_write_at(r, "p", 5000, want + 5000, 3000, 0);
	CHECK(r, rc == 0, "write: %s", err_name(rc));
	if (store_expect(r, "p", want, 8000))
		return -1;
	/* In the middle, with an etag of its own each time, however quick. */
	for (unsigned i = 0; i < 50; i++) {
		CHECK(r, store_stat_of(r, "p", &before) == 0, "stat");
		store_fill(want + 6000, 100, 100 + i);
		CHECK(r, store_write_at(r, "p", 6000, want + 6000, 100, 0) == 0, "write");
		CHECK(r, store_stat_of(r, "p", &after) == 0, "stat");
		CHECK(r, strcmp(before.etag, after.etag) != 0, "the etag is still %s", after.etag);
		if (!store_can(r, CAN_PUT_IF))
			continue;
		rc = store_put(r, "p", "x", 1, PUT_IF_MATCH, before.etag, NULL);
		CHECK(r, rc == -ESTALE, "put over a write: %s", err_name(rc));
	}
	/* Longer, with a gap; over the end; one byte. */
	store_fill(want + 100000, 50000, 3);
	CHECK(r, store_write_at(r, "p", 100000, want + 100000, 50000, IO_FUA) == 0, "write");
	store_fill(want + 149999, 2, 4);
	CHECK(r, store_write_at(r, "p", 149999, want + 149999, 2, 0) == 0, "write");
	if (store_expect(r, "p", want, 150001))
		return -1;
	rc = ch_zero(c, (struct ext){ &obj, 6050, 10000 }, IO_PUNCH);
	CHECK(r, rc == 0, "zero: %s", err_name(rc));
	memset(want + 6050, 0, 10000);
	rc = ch_zero(c, (struct ext){ &obj, 110001, 7 }, IO_FUA);
	CHECK(r, rc == 0, "zero: %s", err_name(rc));
	memset(want + 110001, 0, 7);
	if (store_expect(r, "p", want, 150001))
		return -1;
	/* Put over it, and write to what was put. */
	CHECK(r, store_put(r, "p", "new object", 10, PUT_ALWAYS, NULL, NULL) == 0, "put");
	CHECK(r, store_write_at(r, "p", 4, "part", 4, 0) == 0, "write");
	if (store_expect(r, "p", "new partct", 10))
		return -1;
	/* Of a missing one, or behind the end, there is nothing to be done. */
	CHECK(r, ch_trim(c, (struct ext){ &none, 0, 4096 }, 0) == 0, "trim");
	CHECK(r, ch_zero(c, (struct ext){ &none, 0, 4096 }, IO_PUNCH) == 0, "zero");
	CHECK(r, ch_trim(c, (struct ext){ &obj, 1 << 20, 4096 }, 0) == 0, "trim");
	CHECK(r, ch_flush(c) == 0, "flush");
	return 0;
}

int store_case_map(void *arg)
{
	enum { SIZE = 1 << 20 };
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	_cleanup_free_ uint8_t *data = malloc(SIZE);
	struct obj obj = store_obj(r, "map"), none = store_obj(r, "none");
	struct extent v[16];
	struct extmap m = { v, 0, ARRAY_LEN(v) };
	uint64_t at = 0;
	int rc;

	CHECK(r, c && data, "memory");
	if (!store_can(r, CAN_MAP))
		return 0;
	rc = ch_map(c, (struct ext){ &none, 0, 4096 }, &m);
	CHECK(r, rc == -ENOENT, "of a missing one: %s", err_name(rc));
	store_fill(data, SIZE, 1);
	CHECK(r, store_put(r, "map", data, SIZE, PUT_ALWAYS, NULL, NULL) == 0, "put");
	m.n = 0;
	rc = ch_map(c, (struct ext){ &obj, 0, 4 * SIZE }, &m);
	CHECK(r, rc == 0 && m.n >= 1, "%s", err_name(rc));
	for (unsigned i = 0; i < m.n; i++) {
		CHECK(r, at >= SIZE || v[i].flags == 0, "data is told to be a hole");
		at += v[i].len;
	}
	CHECK(r, at <= 4 * SIZE, "more than asked for");
	return 0;
}

/* --- Life and many at a time ------------------------------------------------------------------ */

int store_case_reopen(void *arg)
{
	struct store_run *r = arg;
	uint8_t data[5000];
	struct chan *c;
	int rc;

	store_fill(data, sizeof(data), 5);
	CHECK(r, store_put(r, "kept", data, sizeof(data), PUT_ALWAYS, NULL, NULL) == 0, "put");
	CHECK(r, store_put(r, "gone", data, sizeof(data), PUT_ALWAYS, NULL, NULL) == 0, "put");
	if (store_can(r, CAN_PARTIAL))
		CHECK(r, store_write_at(r, "part", 0, data, 4000, 0) == 0, "write");
	for (unsigned i = 0; i < 3; i++) {
		struct obj gone = store_obj(r, "gone");
		struct obj_stat st;

		if (store_expect(r, "kept", data, sizeof(data)) ||
		    (store_can(r, CAN_PARTIAL) && store_expect(r, "part", data, 4000)))
			return -1;
		c = store_chan(r);
		CHECK(r, c, "channel");
		CHECK(r, ch_del(c, &gone, 1) == 0, "del");
		rc = ch_flush(c);
		CHECK(r, rc == 0, "flush: %s", err_name(rc));
		if (store_reopen(r))
			return -1;
		CHECK(r, store_stat_of(r, "gone", &st) == -ENOENT, "a deleted one is there again");
	}
	return 0;
}

enum { WHOLE = 150000 };

/* Puts and reads one object from everywhere: each read must be of one put. */
static CO_FN int whole_or_nothing(struct store_run *r, unsigned i, void *arg)
{
	const unsigned *rounds = arg;
	_cleanup_free_ uint8_t *buf = malloc(WHOLE);

	CHECK(r, buf, "memory");
	for (unsigned round = 0; round < *rounds; round++) {
		int rc;

		if (i % 2) {
			memset(buf, (int)(i * 16 + round), WHOLE);
			rc = store_put(r, "whole", buf, WHOLE, PUT_ALWAYS, NULL, NULL);
			CHECK(r, rc == 0, "put: %s", err_name(rc));
			continue;
		}
		rc = store_get(r, "whole", 0, buf, WHOLE);
		CHECK(r, rc == 0, "read: %s", err_name(rc));
		for (unsigned at = 1; at < WHOLE; at++)
			CHECK(r, buf[at] == buf[0], "a read of two objects: %02x, and %02x at %u",
			      buf[0], buf[at], at);
	}
	return 0;
}

/* Each has its own objects; makes, looks at and deletes them. */
static CO_FN int own_objects(struct store_run *r, unsigned i, void *arg)
{
	const unsigned *rounds = arg;
	struct chan *c = store_chan(r);
	uint8_t data[3000];
	char name[32];
	struct obj obj;

	(void)snprintf(name, sizeof(name), "own-%u", i);
	obj = store_obj(r, name);
	for (unsigned round = 0; round < *rounds && c; round++) {
		struct obj_stat st;
		int rc;

		store_fill(data, sizeof(data), i * 1000 + round);
		rc = store_put(r, name, data, sizeof(data) - i, PUT_ALWAYS, NULL, NULL);
		CHECK(r, rc == 0, "put: %s", err_name(rc));
		if (store_expect(r, name, data, sizeof(data) - i))
			return -1;
		rc = ch_del(c, &obj, 1);
		CHECK(r, rc == 0, "del: %s", err_name(rc));
		rc = store_stat_of(r, name, &st);
		CHECK(r, rc == -ENOENT, "stat: %s", err_name(rc));
	}
	return c ? 0 : -1;
}

int store_case_concurrent(void *arg)
{
	struct store_run *r = arg;
	unsigned rounds = store_less(r, 20);
	_cleanup_free_ uint8_t *buf = calloc(1, WHOLE);

	CHECK(r, buf, "memory");
	CHECK(r, store_put(r, "whole", buf, WHOLE, PUT_ALWAYS, NULL, NULL) == 0, "put");
	if (store_fibers(r, 12, whole_or_nothing, &rounds))
		return -1;
	return store_fibers(r, store_less(r, 100), own_objects, &rounds);
}

/* --- Anything, against a model ---------------------------------------------------------------- */

enum { MODEL_N = 8, MODEL_SIZE = 40000 };

struct model {
	bool is_there;
	size_t size;
	uint8_t data[MODEL_SIZE];
	char name[8];
};

static CO_FN int model_put(struct store_run *r, struct model *m, uint64_t *state)
{
	const size_t size = random_below(state, MODEL_SIZE + 1);
	enum put_cond cond = store_can(r, CAN_PUT_IF) && random_below(state, 3) == 0 ? PUT_IF_ABSENT
										     : PUT_ALWAYS;
	_cleanup_free_ uint8_t *data = malloc(size + 1);
	int rc;

	CHECK(r, data, "memory");
	store_fill(data, size, *state);
	rc = store_put(r, m->name, data, size, cond, NULL, NULL);
	if (cond == PUT_IF_ABSENT && m->is_there) {
		CHECK(r, rc == -EEXIST, "put of what is there: %s", err_name(rc));
		return 0;
	}
	CHECK(r, rc == 0, "put: %s", err_name(rc));
	m->is_there = true;
	m->size = size;
	memset(m->data, 0, sizeof(m->data));
	memcpy(m->data, data, size);
	return 0;
}

static CO_FN int model_write(struct store_run *r, struct model *m, uint64_t *state)
{
	const size_t off = random_below(state, MODEL_SIZE),
		     len = 1 + random_below(state, MODEL_SIZE - off);
	const unsigned fl = random_below(state, 8) == 0 ? IO_FUA : 0;
	int rc;

	if (!store_can(r, CAN_PARTIAL))
		return 0;
	store_fill(m->data + off, len, *state);
	rc = store_write_at(r, m->name, off, m->data + off, len, fl);
	CHECK(r, rc == 0, "write: %s", err_name(rc));
	m->size = MAX(m->size, off + len);
	m->is_there = true;
	return 0;
}

/* Inside of the object: what zeroing makes of its end is the store's affair. */
static CO_FN int model_zero(struct store_run *r, struct model *m, uint64_t *state)
{
	struct chan *c = store_chan(r);
	struct obj obj = store_obj(r, m->name);
	uint64_t off, len;
	int rc;

	if (!store_can(r, CAN_PARTIAL) || !m->is_there || m->size == 0)
		return 0;
	off = random_below(state, m->size);
	len = 1 + random_below(state, m->size - off);
	rc = ch_zero(c, (struct ext){ &obj, off, len }, random_below(state, 2) ? IO_PUNCH : 0);
	CHECK(r, rc == 0, "zero: %s", err_name(rc));
	memset(m->data + off, 0, len);
	return 0;
}

static CO_FN int model_del(struct store_run *r, struct model *m)
{
	struct chan *c = store_chan(r);
	struct obj obj = store_obj(r, m->name);
	int rc = ch_del(c, &obj, 1);

	CHECK(r, rc == 0, "del: %s", err_name(rc));
	m->is_there = false;
	m->size = 0;
	memset(m->data, 0, sizeof(m->data));
	return 0;
}

static CO_FN int model_check(struct store_run *r, const struct model *m)
{
	struct obj_stat st;
	int rc;

	if (m->is_there)
		return store_expect(r, m->name, m->data, m->size);
	rc = store_stat_of(r, m->name, &st);
	CHECK(r, rc == -ENOENT, "%s: %s", m->name, err_name(rc));
	return 0;
}

static CO_FN int model_read(struct store_run *r, const struct model *m, uint64_t *state)
{
	const size_t off = random_below(state, MODEL_SIZE),
		     len = 1 + random_below(state, MODEL_SIZE - off);
	_cleanup_free_ uint8_t *got = malloc(len);
	int rc;

	CHECK(r, got, "memory");
	rc = store_get(r, m->name, off, got, len);
	CHECK(r, rc == (m->is_there ? 0 : -ENOENT), "read of %s: %s", m->name, err_name(rc));
	CHECK(r, rc || memcmp(got, m->data + off, len) == 0, "%s: %zu+%zu of %zu differs", m->name,
	      off, len, m->size);
	return 0;
}

int store_case_random(void *arg)
{
	struct store_run *r = arg;
	_cleanup_free_ struct model *models = calloc(MODEL_N, sizeof(*models));
	uint64_t state = 42;
	int rc = 0;

	CHECK(r, models, "memory");
	for (unsigned i = 0; i < MODEL_N; i++)
		(void)snprintf(models[i].name, sizeof(models[i].name), "r%u", i);
	for (unsigned i = 0; i < store_less(r, 800) && rc == 0; i++) {
		struct model *m = &models[random_below(&state, MODEL_N)];
		struct chan *c = store_chan(r);

		switch (random_below(&state, 12)) {
		case 0:
		case 1: rc = model_put(r, m, &state); break;
		case 2:
		case 3:
		case 4: rc = model_write(r, m, &state); break;
		case 5: rc = model_zero(r, m, &state); break;
		case 6: rc = model_del(r, m); break;
		case 7: rc = c ? ch_flush(c) : -1; break;
		case 8: rc = model_check(r, m); break;
		default: rc = model_read(r, m, &state); break;
		}
	}
	CHECK(r, rc == 0, "%s", err_name(rc));
	for (unsigned i = 0; i < MODEL_N && rc == 0; i++)
		rc = model_check(r, &models[i]);
	return rc;
}
