/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer retry: what is repeated, how often, how long, and what becomes of puts whose answers were lost.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "conform_store.h"
#include "conformance.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"

#undef EXPECT

#define QUICK "retry[base=1us,cap=1us]:"

static void check(const char *text, int (*fn)(void *run))
{
	const struct store_what what = { .text = text };
	const char *failure = store_with(&what, fn);

	if (failure)
		fail_msg("%s", failure);
}

/* --- What can be seen of a run ---------------------------------------------------------------- */

struct count {
	unsigned depth;
	enum ch_op op;
	uint64_t n;
};

static void add_count(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum)
{
	struct count *c = arg;

	if (depth == c->depth)
		c->n = atomic_load(&sum->ops[c->op]);
}

/* Requests that have reached the layer at `depth` (0 = retry, 1 = fault, 2 = mem). */
static uint64_t ops_at(struct store_run *r, unsigned depth, enum ch_op op)
{
	struct count c = { depth, op, 0 };

	chain_each(r->chain, add_count, &c);
	return c.n;
}

struct told {
	struct info base;
	const char *key;
	char value[64];
};

static void keep(struct info *i, const char *key, const char *value)
{
	struct told *t = container_of(i, struct told, base);

	if (strcmp(key, t->key) == 0)
		(void)snprintf(t->value, sizeof(t->value), "%s", value);
}

/* A line of the layer's status, as a number; -1 = it is not there. */
static long status(struct store_run *r, const char *key)
{
	struct told t = { .base = { keep }, .key = key };
	struct layer *top = chain_top(r->chain);

	top->ops->status(top, &t.base);
	return t.value[0] ? strtol(t.value, NULL, 10) : -1;
}

static CO_FN int put(struct store_run *r, const char *text, enum put_cond cond, const char *etag)
{
	return store_put(r, "o", text, strlen(text), cond, etag, NULL);
}

/* --- How often and how long ------------------------------------------------------------------- */

static CO_FN int three_repeats(void *arg)
{
	struct store_run *r = arg;
	int rc = put(r, "x", PUT_ALWAYS, NULL);

	CHECK(r, rc == -EAGAIN, "%s", err_name(rc));
	CHECK(r, ops_at(r, 1, CH_PUT) == 4, "%ju tries", (uintmax_t)ops_at(r, 1, CH_PUT));
	CHECK(r, status(r, "retries") == 3, "retries: %ld", status(r, "retries"));
	CHECK(r, status(r, "given_up") == 1, "given up: %ld", status(r, "given_up"));
	CHECK(r, status(r, "waiting") == 0, "waiting: %ld", status(r, "waiting"));
	return 0;
}

static CO_FN int until_deadline(void *arg)
{
	struct store_run *r = arg;
	uint64_t start = now_ns(), took;
	int rc = put(r, "x", PUT_ALWAYS, NULL);

	took = now_ns() - start;
	CHECK(r, rc == -ETIMEDOUT, "%s", err_name(rc));
	CHECK(r, took >= 200000000, "given up after %ju ns", (uintmax_t)took);
	CHECK(r, took < UINT64_C(20000000000), "given up after %ju ns", (uintmax_t)took);
	CHECK(r, ops_at(r, 1, CH_PUT) >= 2, "%ju tries", (uintmax_t)ops_at(r, 1, CH_PUT));
	return 0;
}

static void test_limits(void **state)
{
	check("retry[max=3,base=1us,cap=1us]:fault[error=EAGAIN,ops=put]:mem", three_repeats);
	check("retry[deadline=200ms,base=10ms]:fault[error=ETIMEDOUT,ops=put]:mem", until_deadline);
	/* Pauses of hours: the last try is at the deadline all the same. */
	check("retry[deadline=200ms,base=1h,cap=1h]:fault[error=ETIMEDOUT,ops=put]:mem",
	      until_deadline);
}

static CO_FN int not_repeated(void *arg)
{
	struct store_run *r = arg;
	int rc = put(r, "x", PUT_ALWAYS, NULL);

	CHECK(r, rc == -EIO || rc == -ENOSPC || rc == -EPERM || rc == -ESHUTDOWN, "%s",
	      err_name(rc));
	CHECK(r, ops_at(r, 1, CH_PUT) == 1, "%ju tries", (uintmax_t)ops_at(r, 1, CH_PUT));
	CHECK(r, status(r, "retries") == 0, "retries: %ld", status(r, "retries"));
	CHECK(r, status(r, "last_error") == -1, "an answer is no trouble");
	return 0;
}

static void test_permanent(void **state)
{
	check(QUICK "fault[error=EIO,ops=put]:mem", not_repeated);
	check(QUICK "fault[error=ENOSPC,ops=put]:mem", not_repeated);
	check(QUICK "fault[error=EPERM,ops=put]:mem", not_repeated);
	check(QUICK "fault[error=ESHUTDOWN,ops=put]:mem", not_repeated);
}

/* --- Every kind of request -------------------------------------------------------------------- */

static int count_names(void *arg, const char *name, uint64_t size)
{
	unsigned *n = arg;

	(*n)++;
	return 0;
}

static CO_FN int each_op(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct obj obj = store_obj(r, "o");
	struct ext e = { &obj, 0, 4 };
	struct extent v[2];
	struct extmap m = { v, 0, 2 };
	struct obj_stat st;
	struct iovec vec;
	char buf[4] = "data";
	struct iov iov = iov_one(&vec, buf, 4);
	unsigned n = 0;

	CHECK(r, c, "channel");
	CHECK(r, put(r, "1234", PUT_ALWAYS, NULL) == 0, "put");
	CHECK(r, ch_write(c, e, &iov, 0) == 0, "write");
	CHECK(r, ch_read(c, e, &iov, 0) == 0 && memcmp(buf, "data", 4) == 0, "read");
	CHECK(r, ch_flush(c) == 0, "flush");
	CHECK(r, ch_stat(c, &obj, &st) == 0 && st.size == 4, "stat");
	CHECK(r,
	      ch_map(c, (struct ext){ &obj, 0, 8 }, &m) == 0 && m.n == 2 && v[0].len == 4 &&
		      v[1].len == 4,
	      "map");
	CHECK(r, ch_list(c, r->prefix, count_names, &n) == 0 && n == 1, "list");
	CHECK(r, ch_zero(c, e, IO_PUNCH) == 0, "zero");
	CHECK(r, ch_trim(c, e, 0) == 0, "trim");
	CHECK(r, ch_del(c, &obj, 1) == 0, "del");
	for (unsigned op = 0; op < CH_OPS; op++)
		CHECK(r, op == CH_CACHE || (ops_at(r, 0, op) == 1 && ops_at(r, 1, op) >= 1), "%s",
		      ch_op_names[op]);
	return 0;
}

static void test_each_op(void **state)
{
	char text[128];

	for (unsigned op = 0; op < CH_OPS; op++) {
		if (op == CH_CACHE)
			continue; /* a hint, not repeated */
		(void)snprintf(text, sizeof(text),
			       QUICK "fault[error=ECONNRESET,count=3,ops=%s]:mem", ch_op_names[op]);
		check(text, each_op);
		(void)snprintf(text, sizeof(text),
			       QUICK "fault[error=EAGAIN,count=3,when=after,ops=%s]:mem",
			       ch_op_names[op]);
		if (op != CH_LIST) /* it may show things twice, as it says */
			check(text, each_op);
	}
}

static int not_again(void *arg, const char *name, uint64_t size)
{
	unsigned *n = arg;

	(*n)++;
	return -EAGAIN;
}

/* What the owner of a listing returns is no answer of the store. */
static CO_FN int list_ended(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	unsigned n = 0;
	int rc;

	CHECK(r, c && put(r, "x", PUT_ALWAYS, NULL) == 0, "put");
	rc = ch_list(c, "", not_again, &n);
	CHECK(r, rc == -EAGAIN && n == 1, "%s after %u", err_name(rc), n);
	return 0;
}

static void test_list_ended(void **state)
{
	check(QUICK "mem", list_ended);
}

/* --- Coming back ------------------------------------------------------------------------------ */

static CO_FN int asked_to_wait(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	uint64_t until = now_ns() + 150000000;
	int rc;

	CHECK(r, c, "channel");
	c->kids[0]->kids[0]->not_before = until; /* as a store does that is told so */
	rc = put(r, "x", PUT_ALWAYS, NULL);
	CHECK(r, rc == 0, "%s", err_name(rc));
	CHECK(r, now_ns() >= until, "came back too early");
	CHECK(r, ops_at(r, 1, CH_PUT) == 2, "%ju tries", (uintmax_t)ops_at(r, 1, CH_PUT));
	return 0;
}

static void test_not_before(void **state)
{
	check(QUICK "fault[error=EAGAIN,count=1,ops=put]:mem", asked_to_wait);
}

/* An outage, with requests that wait for its end. */
static CO_FN int waiter(struct store_run *r, unsigned i, void *arg)
{
	char name[16];
	int rc;

	if (i == 0) {
		const char *path = arg;

		while (status(r, "waiting") < 5 || status(r, "retries") < 20)
			co_yield();
		CHECK(r, unlink(path) == 0, "%s", path);
		return 0;
	}
	(void)snprintf(name, sizeof(name), "w%u", i);
	rc = store_put(r, name, name, strlen(name), PUT_ALWAYS, NULL, NULL);
	CHECK(r, rc == 0, "%s", err_name(rc));
	return store_expect(r, name, name, strlen(name));
}

static CO_FN int outage(void *arg)
{
	struct store_run *r = arg;
	char path[300];
	int fd;

	(void)snprintf(path, sizeof(path), "%s/away", r->folder);
	fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
	CHECK(r, fd >= 0, "%s", path);
	close(fd);
	if (store_fibers(r, 6, waiter, path)) {
		(void)unlink(path);
		return -1;
	}
	CHECK(r, status(r, "waiting") == 0, "waiting: %ld", status(r, "waiting"));
	CHECK(r, status(r, "given_up") == 0, "given up: %ld", status(r, "given_up"));
	return 0;
}

static void test_outage(void **state)
{
	check("retry[deadline=0,base=1ms,cap=5ms]:fault[error=ECONNREFUSED,file=@/away]:mem",
	      outage);
}

/* The daemon is to end, the store is away for good: who would wait for ever gives up. */
static CO_FN int stopper(struct store_run *r, unsigned i, void *arg)
{
	uint64_t start = now_ns();
	char name[16];
	int rc;

	if (i == 0) {
		while (status(r, "waiting") < 3)
			co_yield();
		retry_stop_by(now_ns() + 1000000);
		return 0;
	}
	(void)snprintf(name, sizeof(name), "w%u", i);
	rc = store_put(r, name, name, strlen(name), PUT_ALWAYS, NULL, NULL);
	CHECK(r, rc == -ECONNREFUSED, "%s", err_name(rc));
	CHECK(r, now_ns() - start < UINT64_C(30000000000), "waited too long");
	return 0;
}

static CO_FN int stopping(void *arg)
{
	struct store_run *r = arg;
	int rc = store_fibers(r, 4, stopper, NULL);

	/* Each request is still tried once. */
	if (rc == 0)
		rc = put(r, "x", PUT_ALWAYS, NULL) == -ECONNREFUSED
			     ? 0
			     : store_fail(r, __LINE__, "the last one");
	retry_stop_by(0);
	CHECK(r, status(r, "waiting") == 0, "waiting: %ld", status(r, "waiting"));
	return rc;
}

static void test_stopping(void **state)
{
	check("retry[deadline=0,base=1h,cap=1h]:fault[error=ECONNREFUSED,ops=put]:mem", stopping);
}

/* --- Conditional puts ------------------------------------------------------------------------- */

/* Done, but the answer was lost. */
static CO_FN int lost_answers(void *arg)
{
	struct store_run *r = arg;
	struct obj_stat st = { 0 }, now;
	int rc;

	rc = store_put(r, "o", "mine", 4, PUT_IF_ABSENT, NULL, &st);
	CHECK(r, rc == 0, "if absent: %s", err_name(rc));
	CHECK(r, store_stat_of(r, "o", &now) == 0, "stat");
	CHECK(r, st.size == 4 && strcmp(st.etag, now.etag) == 0, "%s, not %s", st.etag, now.etag);
	rc = store_put(r, "o", "mine too", 8, PUT_IF_MATCH, now.etag, &st);
	CHECK(r, rc == 0, "if match: %s", err_name(rc));
	CHECK(r, store_stat_of(r, "o", &now) == 0, "stat");
	CHECK(r, st.size == 8 && strcmp(st.etag, now.etag) == 0, "%s, not %s", st.etag, now.etag);
	/* 2 lost answers each. */
	CHECK(r, ops_at(r, 1, CH_PUT) >= 4, "%ju tries", (uintmax_t)ops_at(r, 1, CH_PUT));
	return store_expect(r, "o", "mine too", 8);
}

static CO_FN int lost_answer_large(void *arg)
{
	struct store_run *r = arg;
	const size_t len = 1000003;
	_cleanup_free_ uint8_t *data = malloc(len);
	int rc;

	CHECK(r, data, "memory");
	store_fill(data, len, 1);
	rc = store_put(r, "o", data, len, PUT_IF_ABSENT, NULL, NULL);
	CHECK(r, rc == 0, "if absent: %s", err_name(rc));
	return store_expect(r, "o", data, len);
}

/* Not done, and somebody else's is there: of the same length, of another one, the same but for the last byte. */
static CO_FN int others_object(void *arg)
{
	static const char *const theirs[] = { "theirs", "their object", "ours!?" };
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct obj obj = store_obj(r, "o");

	CHECK(r, c, "channel");
	for (unsigned i = 0; i < ARRAY_LEN(theirs); i++) {
		struct obj_stat st;
		int rc;

		/* The first two puts fail before they are done; later ones work. */
		CHECK(r, put(r, theirs[i], PUT_ALWAYS, NULL) == 0, "put");
		rc = put(r, "ours!!", PUT_IF_ABSENT, NULL);
		CHECK(r, rc == -EEXIST, "if absent: %s", err_name(rc));
		CHECK(r, store_stat_of(r, "o", &st) == 0, "stat");
		rc = put(r, "ours!!", PUT_IF_MATCH, "another");
		CHECK(r, rc == -ESTALE, "if match: %s", err_name(rc));
		if (store_expect(r, "o", theirs[i], strlen(theirs[i])))
			return -1;
		CHECK(r, ch_del(c, &obj, 1) == 0, "del");
		rc = put(r, "ours!!", PUT_IF_MATCH, st.etag);
		CHECK(r, rc == -ESTALE, "of one that has gone: %s", err_name(rc));
	}
	return 0;
}

/* Where no try has an unknown end, even the same bytes are somebody else's. */
static CO_FN int same_bytes(void *arg)
{
	struct store_run *r = arg;
	int rc;

	CHECK(r, put(r, "same", PUT_ALWAYS, NULL) == 0, "put");
	rc = put(r, "same", PUT_IF_ABSENT, NULL);
	CHECK(r, rc == -EEXIST, "%s", err_name(rc));
	rc = put(r, "same", PUT_IF_MATCH, "another");
	CHECK(r, rc == -ESTALE, "%s", err_name(rc));
	return 0;
}

static void test_conditional(void **state)
{
	check(QUICK "fault[error=ETIMEDOUT,when=after,ops=put,count=4,rate=70%]:mem", lost_answers);
	check(QUICK "fault[error=ETIMEDOUT,when=after,ops=put,count=1]:mem", lost_answer_large);
	/* Looking at it is repeated, too. */
	check(QUICK "fault[error=ECONNRESET,when=after,ops=put|stat|read,rate=60%]:mem",
	      lost_answer_large);
	check(QUICK "fault[error=ETIMEDOUT,ops=put,rate=50%]:mem", others_object);
	check(QUICK "fault[error=ETIMEDOUT,ops=put,after=1,count=2]:mem", others_object);
	check(QUICK "mem", same_bytes);
	/* Nobody was there to do it. */
	check(QUICK "fault[error=ECONNREFUSED,ops=put,rate=60%]:mem", same_bytes);
}

/* --- Above a disk ----------------------------------------------------------------------------- */

static CO_FN int disk(void *arg)
{
	struct run *r = arg;
	uint64_t state = 1;

	for (unsigned i = 0; i < 200; i++) {
		uint64_t off = random_below(&state, r->what->size),
			 len = 1 + random_below(&state, 20000);

		len = MIN(len, r->what->size - off);
		if (run_write(r, off, len, i % 5 ? 0 : IO_FUA, 1 + i % 3) ||
		    run_check(r, off, len, 1))
			return -1;
	}
	return run_check_all(r);
}

static void test_disk(void **state)
{
	static const struct conform what = { .text = "raw:" QUICK
						     "fault[error=EAGAIN,rate=20%]:mem[size=1Mi]",
					     .size = 1 << 20 };

	conform_must(&what, disk);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_limits),     cmocka_unit_test(test_permanent),
		cmocka_unit_test(test_each_op),    cmocka_unit_test(test_list_ended),
		cmocka_unit_test(test_not_before), cmocka_unit_test(test_outage),
		cmocka_unit_test(test_stopping),   cmocka_unit_test(test_conditional),
		cmocka_unit_test(test_disk),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	conform_start();
	failed = cmocka_run_group_tests_name("retry", tests, NULL, NULL);
	conform_stop();
	return failed;
}
