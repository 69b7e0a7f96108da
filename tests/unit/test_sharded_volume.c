/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Volumes of layer sharded: the recorded numbers, making, growing, shrinking, removing, and what is left alone.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "conformance.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"

enum { KI = 1024, MI = KI * KI, SHARD = 4 * MI };

/* --- A chain over a store that is filled by hand ---------------------------------------------- */

struct vol {
	struct run r; /* for EXPECT only */
	struct spec *spec;
	struct chain *chain;
	struct err err;
	int (*fn)(struct vol *v);
};

static CO_FN int vol_run(void *arg)
{
	struct vol *v = arg;
	int rc = v->fn(v);

	if (chain_close(v->chain) && !rc)
		rc = -1;
	return rc;
}

static void check(const char *text, CO_FN int (*fn)(struct vol *v))
{
	struct vol v = { .fn = fn };
	int rc;

	pthread_mutex_init(&v.r.noted.lock, NULL);
	assert_int_equal(spec_parse(text, &v.spec, &v.err), 0);
	assert_int_equal(chain_build(v.spec, "vol0", false, &v.chain, &v.err), 0);
	rc = reactor_call_blocking(reactor_get(0), vol_run, &v);
	chain_free(v.chain);
	spec_free(v.spec);
	pthread_mutex_destroy(&v.r.noted.lock);
	if (v.r.noted.text[0])
		fail_msg("%s: %s", text, v.r.noted.text);
	assert_int_equal(rc, 0);
}

/* The store's layer, opened for a while: what a test does to it while the chain is closed. */
struct store {
	struct layer *above;
	struct chan *c;
};

static CO_FN int store_open(struct vol *v, struct store *s)
{
	s->above = chain_top(v->chain);
	EXPECT(&v->r, layer_kids_open(s->above, &v->err) == 0, "%s", v->err.msg);
	EXPECT(&v->r, layer_chan_open(s->above->kids[0], &s->c) == 0, "channel");
	return 0;
}

static CO_FN void store_close(struct store *s)
{
	layer_chan_close(s->c);
	layer_kids_close(s->above);
}

/* Puts an object, or deletes it (text NULL). */
static CO_FN int set(struct vol *v, const char *name, const void *data, size_t len)
{
	struct store s;
	struct obj obj;
	struct iovec vec;
	struct iov iov = iov_one(&vec, (void *)(uintptr_t)data, len);
	struct put p = { .obj = &obj, .iov = &iov };
	int rc;

	if (store_open(v, &s))
		return -1;
	EXPECT(&v->r, obj_set(&obj, name) == 0, "%s", name);
	rc = data ? ch_put(s.c, &p, NULL) : ch_del(s.c, &obj, 1);
	store_close(&s);
	EXPECT(&v->r, rc == 0, "%s: %s", name, err_name(rc));
	return 0;
}

static CO_FN int set_text(struct vol *v, const char *name, const char *text)
{
	return set(v, name, text, text ? strlen(text) : 0);
}

/* What an object holds as text, "-" when it is missing. */
static CO_FN int get_text(struct vol *v, const char *name, char *text, size_t room)
{
	struct store s;
	struct obj obj;
	struct iovec vec;
	struct iov iov = iov_one(&vec, text, room - 1);
	int rc;

	if (store_open(v, &s))
		return -1;
	memset(text, 0, room);
	EXPECT(&v->r, obj_set(&obj, name) == 0, "%s", name);
	rc = ch_read(s.c, (struct ext){ &obj, 0, room - 1 }, &iov, 0);
	store_close(&s);
	if (rc == -ENOENT)
		(void)snprintf(text, room, "-");
	EXPECT(&v->r, rc == 0 || rc == -ENOENT, "%s: %s", name, err_name(rc));
	return 0;
}

static CO_FN int expect_text(struct vol *v, const char *name, const char *wanted)
{
	char text[64];

	if (get_text(v, name, text, sizeof(text)))
		return -1;
	EXPECT(&v->r, strcmp(text, wanted) == 0, "%s holds '%s', not '%s'", name, text, wanted);
	return 0;
}

/* The result, with the message where it failed. */
static CO_FN int create(struct vol *v, uint64_t size, bool force)
{
	v->err.msg[0] = '\0';
	return chain_create(v->chain, size, force, &v->err);
}

static CO_FN int destroy(struct vol *v)
{
	v->err.msg[0] = '\0';
	return chain_destroy(v->chain, &v->err);
}

static CO_FN int open_chain(struct vol *v)
{
	v->err.msg[0] = '\0';
	return chain_open(v->chain, &v->err);
}

static bool says(const struct vol *v, const char *what)
{
	return strstr(v->err.msg, what) != NULL;
}

/* Every byte of [off, off + len) is `byte`. */
static CO_FN int expect_bytes(struct vol *v, uint64_t off, uint64_t len, uint8_t byte)
{
	_cleanup_free_ uint8_t *buf = malloc(len);
	struct iovec vec;
	struct iov iov = iov_one(&vec, buf, len);
	int rc;
	struct chan *c = chain_chan(v->chain, &rc);

	EXPECT(&v->r, c && buf, "channel");
	EXPECT(&v->r, ch_read(c, (struct ext){ &obj_none, off, len }, &iov, 0) == 0, "read");
	for (uint64_t i = 0; i < len; i++)
		EXPECT(&v->r, buf[i] == byte, "byte %" PRIu64 " is %02x, not %02x", off + i, buf[i],
		       byte);
	return 0;
}

static CO_FN int fill(struct vol *v, uint64_t off, uint64_t len, uint8_t byte)
{
	_cleanup_free_ uint8_t *buf = malloc(len);
	struct iovec vec;
	struct iov iov = iov_one(&vec, buf, len);
	int rc;
	struct chan *c = chain_chan(v->chain, &rc);

	EXPECT(&v->r, c && buf, "channel");
	memset(buf, byte, len);
	EXPECT(&v->r, ch_write(c, (struct ext){ &obj_none, off, len }, &iov, 0) == 0, "write");
	return 0;
}

/* Opens it, anew if it is open; the disk has that size. */
static CO_FN int reopen(struct vol *v, uint64_t size)
{
	EXPECT(&v->r, chain_close(v->chain) == 0, "close");
	EXPECT(&v->r, open_chain(v) == 0, "%s", v->err.msg);
	EXPECT(&v->r, chain_top(v->chain)->size == size, "%" PRIu64, chain_top(v->chain)->size);
	return 0;
}

/* --- What is recorded ------------------------------------------------------------------------- */

static CO_FN int good_sizes(struct vol *v)
{
	static const char *const texts[] = { "1048576", "1048576\n", " 1048576 ", "\t1048576\r\n",
					     "0001048576" };

	for (unsigned i = 0; i < ARRAY_LEN(texts); i++) {
		if (set_text(v, "size", texts[i]))
			return -1;
		EXPECT(&v->r, open_chain(v) == 0, "'%s': %s", texts[i], v->err.msg);
		EXPECT(&v->r, chain_top(v->chain)->size == MI, "'%s'", texts[i]);
		EXPECT(&v->r, chain_close(v->chain) == 0, "close");
	}
	return 0;
}

static CO_FN int bad_sizes(struct vol *v)
{
	static const char *const texts[] = { "",
					     " ",
					     "abc",
					     "-5",
					     "+5",
					     "12 34",
					     "0",
					     "1e6",
					     "0x100",
					     "1048576K",
					     "1.5",
					     "99999999999999999999",
					     "9223372036854775808" };
	char longer[200];

	for (unsigned i = 0; i < ARRAY_LEN(texts); i++) {
		if (set_text(v, "size", texts[i]))
			return -1;
		EXPECT(&v->r, open_chain(v) == -EINVAL, "'%s' was taken", texts[i]);
		EXPECT(&v->r, says(v, "object 'size' in mem") && says(v, texts[i]), "'%s': %s",
		       texts[i], v->err.msg);
	}
	/* Too long to be shown, and what must not reach a terminal. */
	memset(longer, '\033', sizeof(longer));
	if (set(v, "size", longer, sizeof(longer)))
		return -1;
	EXPECT(&v->r, open_chain(v) == -EINVAL, "taken");
	EXPECT(&v->r, !says(v, "\033") && says(v, "200 bytes long"), "%s", v->err.msg);
	if (set(v, "size", "10\0485", 6))
		return -1;
	EXPECT(&v->r, open_chain(v) == -EINVAL, "a NUL was taken");
	if (set_text(v, "size", NULL))
		return -1;
	EXPECT(&v->r, open_chain(v) == -ENOENT && says(v, "there is no volume in mem"), "%s",
	       v->err.msg);
	return 0;
}

static void test_recorded(void **state)
{
	check("sharded:mem", good_sizes);
	check("sharded:mem[partial=off]", good_sizes);
	check("sharded:mem", bad_sizes);
}

static CO_FN int plain_by_default(struct vol *v)
{
	EXPECT(&v->r, create(v, 5 * MI, false) == 0, "%s", v->err.msg);
	return expect_text(v, "size", "5242880") || expect_text(v, "shard-size", "-") ? -1 : 0;
}

static CO_FN int other_shards(struct vol *v)
{
	EXPECT(&v->r, create(v, 5 * MI, false) == 0, "%s", v->err.msg);
	if (expect_text(v, "size", "5242880") || expect_text(v, "shard-size", "65536"))
		return -1;
	EXPECT(&v->r, open_chain(v) == 0, "%s", v->err.msg);
	if (fill(v, 3 * 65536, 1, 'x'))
		return -1;
	EXPECT(&v->r, chain_close(v->chain) == 0, "close");
	if (expect_text(v, "block-3", "x"))
		return -1;
	/* The volume has others by now: refused, whatever is asked. */
	if (set_text(v, "shard-size", "1048576"))
		return -1;
	EXPECT(&v->r, open_chain(v) == -EINVAL && says(v, "64KiB") && says(v, "1MiB"), "%s",
	       v->err.msg);
	EXPECT(&v->r, create(v, 9 * MI, true) == -EINVAL && says(v, "1MiB"), "%s", v->err.msg);
	EXPECT(&v->r, destroy(v) == -EINVAL && says(v, "1MiB"), "%s", v->err.msg);
	/* A destroy that was cut off before its end: the size is all that is left. */
	if (set_text(v, "shard-size", NULL))
		return -1;
	EXPECT(&v->r, destroy(v) == 0, "%s", v->err.msg);
	return expect_text(v, "size", "-") || expect_text(v, "block-3", "-") ? -1 : 0;
}

/* Without the option, what is recorded counts. */
static CO_FN int recorded_shards(struct vol *v)
{
	if (set_text(v, "size", "5242880") || set_text(v, "shard-size", "65536\n") ||
	    set_text(v, "block-2", "abc"))
		return -1;
	EXPECT(&v->r, open_chain(v) == 0, "%s", v->err.msg);
	if (expect_bytes(v, 2 * 65536 + 1, 1, 'b') || expect_bytes(v, 2 * 65536 + 3, 65533, 0) ||
	    expect_bytes(v, 0, 2 * 65536, 0))
		return -1;
	EXPECT(&v->r, chain_close(v->chain) == 0, "close");
	for (unsigned i = 0; i < 4; i++) {
		static const char *const bad[] = { "65535", "134217728", "512", "x" };

		if (set_text(v, "shard-size", bad[i]))
			return -1;
		EXPECT(&v->r, open_chain(v) == -EINVAL && says(v, "'shard-size'"), "%s: %s", bad[i],
		       v->err.msg);
	}
	return 0;
}

static CO_FN int odd_option(struct vol *v)
{
	EXPECT(&v->r, create(v, MI, false) == -EINVAL && says(v, "not a power of two"), "%s",
	       v->err.msg);
	return 0;
}

static CO_FN int too_many(struct vol *v)
{
	EXPECT(&v->r, create(v, UINT64_C(16) << 40, false) == -EINVAL && says(v, "larger shards"),
	       "%s", v->err.msg);
	return 0;
}

static void test_shard_sizes(void **state)
{
	check("sharded:mem", plain_by_default);
	check("sharded[size=64Ki]:mem[partial=off]", other_shards);
	check("sharded:mem[partial=off]", recorded_shards);
	check("sharded:mem", recorded_shards);
	check("sharded[size=96Ki]:mem", odd_option);
	check("sharded[size=4Ki]:mem", too_many);
}

/* --- Making and removing ---------------------------------------------------------------------- */

static CO_FN int init_rules(struct vol *v)
{
	EXPECT(&v->r, create(v, 6 * MI, false) == 0, "%s", v->err.msg);
	EXPECT(&v->r, create(v, 6 * MI, false) == 0, "the same again: %s", v->err.msg);
	EXPECT(&v->r, create(v, 7 * MI, false) == -EEXIST, "another size");
	EXPECT(&v->r, says(v, "6291456") && says(v, "7340032") && says(v, "--force"), "%s",
	       v->err.msg);
	EXPECT(&v->r, destroy(v) == 0, "%s", v->err.msg);
	EXPECT(&v->r, destroy(v) == -ENOENT && says(v, "there is no volume"), "%s", v->err.msg);
	/* Blocks without a size are no volume, and would be one's data. */
	if (set_text(v, "block-0", "old"))
		return -1;
	EXPECT(&v->r, create(v, 6 * MI, false) == -EEXIST && says(v, "1 objects block-N"), "%s",
	       v->err.msg);
	EXPECT(&v->r, create(v, 6 * MI, true) == 0, "%s", v->err.msg);
	return expect_text(v, "block-0", "-");
}

/* What lay behind the end does not come back, neither from whole shards nor from the last one's tail. */
static CO_FN int resizing(struct vol *v)
{
	EXPECT(&v->r, create(v, 10 * MI, false) == 0, "%s", v->err.msg);
	EXPECT(&v->r, open_chain(v) == 0, "%s", v->err.msg);
	if (fill(v, 0, 10 * MI, 'x'))
		return -1;
	EXPECT(&v->r, chain_close(v->chain) == 0, "close");

	EXPECT(&v->r, create(v, 5 * MI, true) == 0, "%s", v->err.msg);
	if (expect_text(v, "block-2", "-"))
		return -1;
	EXPECT(&v->r, create(v, 20 * MI, true) == 0, "%s", v->err.msg);
	if (reopen(v, 20 * MI) || expect_bytes(v, 0, 5 * MI, 'x') ||
	    expect_bytes(v, 5 * MI, 15 * MI, 0))
		return -1;
	EXPECT(&v->r, chain_close(v->chain) == 0, "close");

	/* A shrink that was cut off after the size: growing cleans up after it. */
	if (set_text(v, "size", "1000") || set_text(v, "block-4", "stale"))
		return -1;
	EXPECT(&v->r, create(v, 20 * MI, true) == 0, "%s", v->err.msg);
	if (reopen(v, 20 * MI) || expect_bytes(v, 0, 1000, 'x'))
		return -1;
	return expect_bytes(v, 1000, 20 * MI - 1000, 0);
}

static void test_init(void **state)
{
	check("sharded:mem", init_rules);
	check("sharded:mem[partial=off]", init_rules);
	check("sharded:mem", resizing);
	check("sharded:mem[partial=off]", resizing);
}

static CO_FN int cut_off(struct vol *v)
{
	EXPECT(&v->r, create(v, 6 * MI, false) == 0, "%s", v->err.msg);
	if (set_text(v, "block-0", "a") || set_text(v, "block-1", "b"))
		return -1;
	/* The fault's one failure hits the first delete after those of the steps above. */
	EXPECT(&v->r, destroy(v) == -EIO && says(v, "can be tried again"), "%s", v->err.msg);
	if (expect_text(v, "size", "6291456"))
		return -1;
	EXPECT(&v->r, destroy(v) == 0, "%s", v->err.msg);
	return expect_text(v, "size", "-") || expect_text(v, "block-1", "-") ? -1 : 0;
}

static void test_destroy_again(void **state)
{
	/* create deletes `shard-size` once. */
	check("sharded:fault[ops=del,after=1,count=1]:mem[partial=off]", cut_off);
}

/* --- Others' objects -------------------------------------------------------------------------- */

static const char *const foreign[] = { "block-01", "block-5-0", "block-x",
				       "block-",   "block--1",  "block-+1",
				       "block- 1", "Block-1",   "other",
				       "sizes",    "block-0.1", "block-18446744073709551616" };

static CO_FN int left_alone(struct vol *v)
{
	int rc;
	struct chan *c;

	EXPECT(&v->r, create(v, 3 * SHARD, false) == 0, "%s", v->err.msg);
	for (unsigned i = 0; i < ARRAY_LEN(foreign); i++)
		if (set_text(v, foreign[i], "theirs"))
			return -1;
	if (set_text(v, "block-3", "behind") || set_text(v, "block-1", "mine"))
		return -1;
	EXPECT(&v->r, open_chain(v) == 0, "%s", v->err.msg);
	c = chain_chan(v->chain, &rc);
	EXPECT(&v->r, c, "channel");
	if (expect_bytes(v, 0, SHARD, 0) || expect_bytes(v, SHARD, 1, 'm'))
		return -1;
	EXPECT(&v->r, ch_trim(c, (struct ext){ &obj_none, 0, 3 * SHARD }, 0) == 0, "trim");
	if (expect_bytes(v, 0, 3 * SHARD, 0))
		return -1;
	EXPECT(&v->r, chain_close(v->chain) == 0, "close");
	if (expect_text(v, "block-3", "behind") || expect_text(v, "block-1", "-"))
		return -1;
	EXPECT(&v->r, destroy(v) == 0, "%s", v->err.msg);
	for (unsigned i = 0; i < ARRAY_LEN(foreign); i++)
		if (expect_text(v, foreign[i], "theirs"))
			return -1;
	/* That one is of a volume that was larger. */
	return expect_text(v, "block-3", "-");
}

static void test_left_alone(void **state)
{
	check("sharded:mem", left_alone);
	check("sharded:mem[partial=off]", left_alone);
}

/* --- Very large ------------------------------------------------------------------------------- */

static void add_ops(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum)
{
	uint64_t *ops = arg;

	for (unsigned i = 0; depth == 1 && i < CH_OPS; i++)
		*ops += i == CH_FLUSH ? 0 : atomic_load(&sum->ops[i]);
}

static CO_FN int very_large(struct vol *v)
{
	const uint64_t size = UINT64_C(16) << 40;
	struct extent e[4];
	struct extmap m = { e, 0, ARRAY_LEN(e) };
	uint64_t ops = 0, start;
	struct chan *c;
	int rc;

	EXPECT(&v->r, create(v, size, false) == 0, "%s", v->err.msg);
	EXPECT(&v->r, open_chain(v) == 0, "%s", v->err.msg);
	c = chain_chan(v->chain, &rc);
	EXPECT(&v->r, c, "channel");
	start = now_ns();
	EXPECT(&v->r, ch_trim(c, (struct ext){ &obj_none, 0, size }, 0) == 0, "trim");
	EXPECT(&v->r, ch_zero(c, (struct ext){ &obj_none, 0, size }, IO_PUNCH) == 0, "zero");
	EXPECT(&v->r, ch_map(c, (struct ext){ &obj_none, 0, size }, &m) == 0, "map");
	EXPECT(&v->r, m.n == 1 && e[0].len == size && e[0].flags & EXTENT_HOLE, "%u extents", m.n);
	EXPECT(&v->r, ch_flush(c) == 0, "flush");
	EXPECT(&v->r, now_ns() - start < UINT64_C(5000000000), "slow");
	chain_each(v->chain, add_ops, &ops);
	EXPECT(&v->r, ops == 0, "%" PRIu64 " requests for nothing", ops);

	if (fill(v, size - 512, 512, 'z') || fill(v, size / 2 + 77, 1000, 'm'))
		return -1;
	EXPECT(&v->r, ch_flush(c) == 0, "flush");
	m.n = 0;
	EXPECT(&v->r, ch_map(c, (struct ext){ &obj_none, size / 2 - 100, size / 2 }, &m) == 0,
	       "map");
	EXPECT(&v->r, m.n >= 2 && e[0].len == 100, "%u extents", m.n);
	if (reopen(v, size) || expect_bytes(v, size - 512, 512, 'z') ||
	    expect_bytes(v, size / 2 + 77, 1000, 'm'))
		return -1;
	return 0;
}

static void test_very_large(void **state)
{
	check("sharded:mem[partial=off]", very_large);
	check("sharded:mem", very_large);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_recorded),   cmocka_unit_test(test_shard_sizes),
		cmocka_unit_test(test_init),       cmocka_unit_test(test_destroy_again),
		cmocka_unit_test(test_left_alone), cmocka_unit_test(test_very_large),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	conform_start();
	failed = cmocka_run_group_tests_name("sharded volumes", tests, NULL, NULL);
	conform_stop();
	return failed;
}
