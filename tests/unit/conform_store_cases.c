/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The cases that every keyed store must pass: whole objects, listings, names; and the table of all cases.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "conform_store.h"
#include "conformance.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"

#undef EXPECT /* conformance.h's is for runs of disks */

enum { KI = 1024, MI = KI * KI };

/* --- Whole objects ---------------------------------------------------------------------------- */

static CO_FN int case_put_get(void *arg)
{
	static const size_t sizes[] = { 1, 0, 511, 4096, 4097, 100000, 5 * MI + 3 };
	struct store_run *r = arg;
	_cleanup_free_ uint8_t *data = malloc(5 * MI + 3);
	char last[ETAG_MAX + 1] = "";

	CHECK(r, data, "memory");
	for (unsigned i = 0; i < ARRAY_LEN(sizes); i++) {
		struct obj_stat put = { .size = 1 }, st;
		int rc;

		store_fill(data, sizes[i], i);
		rc = store_put(r, "a", data, sizes[i], PUT_ALWAYS, NULL, &put);
		CHECK(r, rc == 0, "put of %zu: %s", sizes[i], err_name(rc));
		CHECK(r, put.size == sizes[i], "put says %ju", (uintmax_t)put.size);
		if (store_expect(r, "a", data, sizes[i]))
			return -1;
		CHECK(r, store_stat_of(r, "a", &st) == 0, "stat");
		CHECK(r, strcmp(st.etag, put.etag) == 0, "put said %s, stat %s", put.etag, st.etag);
		CHECK(r, strcmp(st.etag, last) != 0, "the etag has not changed: %s", last);
		memcpy(last, st.etag, sizeof(last));
	}
	/* Where it was put, the stat may be left out. */
	CHECK(r, store_put(r, "a", "x", 1, PUT_ALWAYS, NULL, NULL) == 0, "put");
	return store_expect(r, "a", "x", 1);
}

static CO_FN int case_missing(void *arg)
{
	struct store_run *r = arg;
	struct obj_stat st;
	char buf[10];
	int rc;

	rc = store_stat_of(r, "none", &st);
	CHECK(r, rc == -ENOENT, "stat: %s", err_name(rc));
	rc = store_get(r, "none", 0, buf, sizeof(buf));
	CHECK(r, rc == -ENOENT, "read: %s", err_name(rc));
	rc = store_get(r, "none", 1000000, buf, sizeof(buf));
	CHECK(r, rc == -ENOENT, "read: %s", err_name(rc));
	/* A name that only begins like it is another one. */
	CHECK(r, store_put(r, "none2", "x", 1, PUT_ALWAYS, NULL, NULL) == 0, "put");
	CHECK(r, store_stat_of(r, "none", &st) == -ENOENT, "stat");
	CHECK(r, store_stat_of(r, "none2", &st) == 0, "stat");
	return 0;
}

/* Parts of an object, and what lies behind its end. */
static CO_FN int case_ranges(void *arg)
{
	enum { SIZE = 300001, MORE = 50000 };
	struct store_run *r = arg;
	_cleanup_free_ uint8_t *want = calloc(1, SIZE + MORE), *got = malloc(SIZE + MORE);
	static const struct {
		uint64_t off, len;
	} fixed[] = { { 0, 1 },           { SIZE - 1, 1 },       { SIZE, 1 },        { 0, SIZE },
		      { 0, SIZE + MORE }, { SIZE - 1, 2 },       { SIZE + 1, 4096 }, { 4096, 512 },
		      { 4095, 4098 },     { SIZE - 4096, 8192 }, { 5, 0 },           { SIZE, MORE },
		      { 262143, 2 },      { 262144, 37857 },     { 65536, 131072 } };
	uint64_t state = 1;

	CHECK(r, want && got, "memory");
	store_fill(want, SIZE, 7);
	CHECK(r, store_put(r, "a", want, SIZE, PUT_ALWAYS, NULL, NULL) == 0, "put");
	for (unsigned i = 0; i < ARRAY_LEN(fixed) + store_less(r, 200); i++) {
		bool is_fixed = i < ARRAY_LEN(fixed);
		uint64_t off = is_fixed ? fixed[i].off : random_below(&state, SIZE + MORE);
		uint64_t len = is_fixed ? fixed[i].len
					: random_below(&state, MIN(SIZE + MORE - off, 20000));
		int rc = store_get(r, "a", off, got, len);

		CHECK(r, rc == 0, "read %ju+%ju: %s", (uintmax_t)off, (uintmax_t)len, err_name(rc));
		CHECK(r, memcmp(got, want + off, len) == 0, "read %ju+%ju differs", (uintmax_t)off,
		      (uintmax_t)len);
	}
	return 0;
}

/* --- del and list ----------------------------------------------------------------------------- */

static CO_FN int put_some(struct store_run *r, unsigned fiber, void *arg)
{
	const unsigned *range = arg; /* from, to, fibers */

	for (unsigned i = range[0] + fiber; i < range[1]; i += range[2]) {
		char name[32], data[64];
		int rc;

		(void)snprintf(name, sizeof(name), "n-%u", i);
		memset(data, 'd', sizeof(data));
		rc = store_put(r, name, data, i % 60, PUT_ALWAYS, NULL, NULL);
		CHECK(r, rc == 0, "put %s: %s", name, err_name(rc));
	}
	return 0;
}

static CO_FN int put_many(struct store_run *r, unsigned from, unsigned to)
{
	unsigned range[3] = { from, to, 32 };

	return store_fibers(r, range[2], put_some, range);
}

/* What a listing has shown of the objects n-0 .. n-(max - 1). */
struct shown {
	struct store_run *r;
	uint8_t *times;
	unsigned max, n, stop_at;
};

static int show(void *arg, const char *name, uint64_t size)
{
	struct shown *s = arg;
	const size_t len = strlen(s->r->prefix);
	unsigned i;
	char end;

	s->n++;
	if (s->n == s->stop_at)
		return 4711;
	if (strncmp(name, s->r->prefix, len) != 0)
		return store_fail(s->r, __LINE__, "list shows %s", name);
	if (sscanf(name + len, "n-%u%c", &i, &end) != 1 || i >= s->max)
		return store_fail(s->r, __LINE__, "list shows %s", name);
	if (size != i % 60)
		return store_fail(s->r, __LINE__, "list says that %s has %ju bytes", name,
				  (uintmax_t)size);
	s->times[i]++;
	return 0;
}

/* Lists what begins with prefix + more; as ch_list. */
static CO_FN int list(struct store_run *r, const char *more, list_fn *fn, void *arg)
{
	char prefix[OBJ_NAME_MAX + 1];
	struct chan *c = store_chan(r);

	(void)snprintf(prefix, sizeof(prefix), "%s%s", r->prefix, more);
	return c ? ch_list(c, prefix, fn, arg) : -EIO;
}

static CO_FN int count(struct store_run *r, const char *more, unsigned *n)
{
	_cleanup_free_ uint8_t *times = calloc(1, 10000);
	struct shown s = { .r = r, .times = times, .max = 10000 };
	int rc = list(r, more, show, &s);

	CHECK(r, rc == 0, "list: %s", err_name(rc));
	*n = s.n;
	return 0;
}

/* More than a page of any server. */
static CO_FN int case_list(void *arg)
{
	struct store_run *r = arg;
	const unsigned max = r->what->few ? 1250 : 2500; /* not fewer: a server's page has 1,000 */
	_cleanup_free_ uint8_t *times = calloc(1, max);
	struct shown s = { .r = r, .times = times, .max = max };
	unsigned n = 1;
	int rc;

	if (count(r, "", &n))
		return -1;
	CHECK(r, n == 0, "%u objects before any was put", n);
	if (put_many(r, 0, max))
		return -1;
	rc = list(r, "", show, &s);
	CHECK(r, rc == 0, "list: %s", err_name(rc));
	for (unsigned i = 0; i < max; i++)
		CHECK(r, times[i] == 1, "n-%u was listed %u times", i, times[i]);
	if (count(r, "n-24", &n))
		return -1;
	/* n-24, n-240..249, n-2400..2499 */
	CHECK(r, n == (max > 2400 ? 111 : 11), "n-24*: %u", n);
	if (count(r, "m", &n))
		return -1;
	CHECK(r, n == 0, "m*: %u", n);
	/* Ended by who looks. */
	s = (struct shown){ .r = r, .times = times, .max = max, .stop_at = 3 };
	rc = list(r, "", show, &s);
	CHECK(r, rc == 4711 && s.n == 3, "%d after %u", rc, s.n);
	return 0;
}

static CO_FN int case_del(void *arg)
{
	struct store_run *r = arg;
	const unsigned max = store_less(r, 1400);
	_cleanup_free_ struct obj *objs = calloc(max, sizeof(struct obj));
	struct chan *c = store_chan(r);
	struct obj_stat st;
	unsigned n = 0;
	char name[32];
	int rc;

	CHECK(r, objs && c, "memory");
	CHECK(r, store_put(r, "n-9000", "", 0, PUT_ALWAYS, NULL, NULL) == 0, "put");
	objs[0] = store_obj(r, "n-9000");
	for (unsigned i = 0; i < 2; i++) { /* the second time there is none */
		rc = ch_del(c, objs, 1);
		CHECK(r, rc == 0, "del: %s", err_name(rc));
		rc = store_stat_of(r, "n-9000", &st);
		CHECK(r, rc == -ENOENT, "stat: %s", err_name(rc));
	}
	CHECK(r, ch_del(c, objs, 0) == 0, "del of none");
	/* Every second one is not there. */
	for (unsigned i = 0; i < max; i++) {
		(void)snprintf(name, sizeof(name), "n-%u", i % 2 ? i / 2 : 5000 + i);
		objs[i] = store_obj(r, name);
	}
	if (put_many(r, 0, max / 2 + 5))
		return -1;
	rc = ch_del(c, objs, max);
	CHECK(r, rc == 0, "del of many: %s", err_name(rc));
	if (count(r, "", &n))
		return -1;
	CHECK(r, n == 5, "%u are left", n);
	/* And one comes back as a new one. */
	CHECK(r, store_put(r, "n-0", "", 0, PUT_ALWAYS, NULL, NULL) == 0, "put");
	return store_expect(r, "n-0", "", 0);
}

/* --- Names ------------------------------------------------------------------------------------ */

static const char *const odd_names[] = {
	"size",
	"block-0",
	"block-0-1",
	"a",
	"A",
	"aa",
	"a b",
	" lead",
	"trail ",
	".hidden",
	"..x",
	"a..b",
	"~tilde",
	"100%",
	"%2F",
	"%00",
	"a+b",
	"a&b=c",
	"a?b",
	"a#b",
	"a;b",
	"a:b",
	"@",
	"$x",
	"a*b",
	"[x]",
	"{x}",
	"a|b",
	"\"quoted\"",
	"it's",
	"back\\slash",
	"<tag>&amp;",
	"\xc3\xa4\xc3\xb6\xc3\xbc",
	"\xe2\x82\xac",
	"\xf0\x9f\x98\x80",
	"a,b",
	"a=b",
	"^",
	"`",
	"!",
	"-",
	"--force",
	"_",
	"n\xcc\x83",
	"(paren)",
};

struct name_list {
	struct store_run *r;
	unsigned times[ARRAY_LEN(odd_names) + 1];
	const char *longest;
};

static int match_name(void *arg, const char *name, uint64_t size)
{
	struct name_list *l = arg;
	const char *rest = name + strlen(l->r->prefix);

	for (unsigned i = 0; i <= ARRAY_LEN(odd_names); i++) {
		if (strcmp(rest, i < ARRAY_LEN(odd_names) ? odd_names[i] : l->longest) != 0)
			continue;
		if (size != i % 7)
			return store_fail(l->r, __LINE__, "%s: %ju bytes", name, (uintmax_t)size);
		l->times[i]++;
		return 0;
	}
	return store_fail(l->r, __LINE__, "list shows %s", name);
}

static CO_FN int case_names(void *arg)
{
	struct store_run *r = arg;
	char longest[OBJ_NAME_MAX + 1] = "";
	struct name_list l = { .r = r, .longest = longest };
	struct chan *c = store_chan(r);
	uint8_t data[8];
	int rc;

	CHECK(r, c, "channel");
	for (size_t i = strlen(r->prefix); i < OBJ_NAME_MAX; i++)
		longest[i - strlen(r->prefix)] = "abcdefgh%+ -"[i % 12];
	longest[OBJ_NAME_MAX - strlen(r->prefix) - 1] = 'z';
	for (unsigned i = 0; i <= ARRAY_LEN(odd_names); i++) {
		const char *name = i < ARRAY_LEN(odd_names) ? odd_names[i] : longest;

		store_fill(data, sizeof(data), i);
		rc = store_put(r, name, data, i % 7, PUT_ALWAYS, NULL, NULL);
		CHECK(r, rc == 0, "put '%s': %s", name, err_name(rc));
	}
	for (unsigned i = 0; i <= ARRAY_LEN(odd_names); i++) {
		store_fill(data, sizeof(data), i);
		if (store_expect(r, i < ARRAY_LEN(odd_names) ? odd_names[i] : longest, data, i % 7))
			return -1;
	}
	rc = list(r, "", match_name, &l);
	CHECK(r, rc == 0, "list: %s", err_name(rc));
	for (unsigned i = 0; i <= ARRAY_LEN(odd_names); i++)
		CHECK(r, l.times[i] == 1, "'%s' was listed %u times",
		      i < ARRAY_LEN(odd_names) ? odd_names[i] : longest, l.times[i]);
	for (unsigned i = 0; i <= ARRAY_LEN(odd_names); i++) {
		const char *name = i < ARRAY_LEN(odd_names) ? odd_names[i] : longest;
		struct obj obj = store_obj(r, name);
		struct obj_stat st;

		CHECK(r, ch_del(c, &obj, 1) == 0, "del '%s'", name);
		CHECK(r, store_stat_of(r, name, &st) == -ENOENT, "'%s' is still there", name);
	}
	return 0;
}

/* --- The rest --------------------------------------------------------------------------------- */

static CO_FN int case_limits(void *arg)
{
	struct store_run *r = arg;
	const struct layer *top = chain_top(r->chain);

	CHECK(r, top->size == 0, "a store of objects has no size, says %ju", (uintmax_t)top->size);
	CHECK(r, store_can(r, CAN_WRITE), "not for writing");
	CHECK(r, top->min_io >= 1 && top->pref_io >= 512 && top->max_io >= 1 << 20, "%u %u %u",
	      top->min_io, top->pref_io, top->max_io);
	CHECK(r, !store_can(r, CAN_FAST_ZERO) || store_can(r, CAN_ZERO),
	      "zeroes fast, but not at all");
	CHECK(r, top->is_keyed, "not keyed");
	return 0;
}

const struct store_case store_cases[] = {
	{ "limits", case_limits },
	{ "put and get", case_put_get },
	{ "missing", case_missing },
	{ "ranges", case_ranges },
	{ "list", case_list },
	{ "del", case_del },
	{ "names", case_names },
	{ "if absent", store_case_if_absent },
	{ "if match", store_case_if_match },
	{ "partial", store_case_partial },
	{ "map", store_case_map },
	{ "reopen", store_case_reopen },
	{ "concurrent", store_case_concurrent },
	{ "random", store_case_random },
	{ NULL, NULL },
};
