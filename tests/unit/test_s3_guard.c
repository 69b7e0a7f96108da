/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Puts that are late: the fake server keeps them whole and does them when newer ones have been answered. None of those
 * may be undone. And what that costs, and that it is never the reason why a put fails.
 */
#include "s3_trial.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"

const char *core_failure;

/* Long enough for requests of a busy machine; each late put takes so long. */
#define TIMEOUT "[timeout=1s]"

static CO_FN void open_with(struct trial *t, const char *options)
{
	trial_open(t, options, FAKE_KEY ":" FAKE_SECRET "@", "p/", NULL, false);
	EXPECT(t->rc == 0);
}

static CO_FN int put(struct trial *t, const char *name, const char *data)
{
	return trial_put(t, name, data, PUT_ALWAYS, NULL, NULL);
}

static CO_FN int put_new(struct trial *t, const char *name, const char *data)
{
	const struct obj o = trial_obj(name);
	struct iovec v = { (char *)(uintptr_t)data, strlen(data) };
	const struct iov iov = { &v, 1, strlen(data) };
	const struct put p = { .obj = &o, .iov = &iov, .is_new = true };

	return ch_put(t->c, &p, NULL);
}

static CO_FN int del(struct trial *t, const char *name)
{
	const struct obj o = trial_obj(name);

	return ch_del(t->c, &o, 1);
}

static CO_FN int look(struct trial *t, const char *name)
{
	const struct obj o = trial_obj(name);
	struct obj_stat st;

	return ch_stat(t->c, &o, &st);
}

static void forget_costs(void)
{
	atomic_store(&fake->puts, 0);
	atomic_store(&fake->heads, 0);
}

/* True when the server has seen so many puts and heads since the last time. */
static bool cost(unsigned puts, unsigned heads)
{
	const unsigned p = atomic_exchange(&fake->puts, 0), h = atomic_exchange(&fake->heads, 0);

	if (p != puts || h != heads)
		print_error("%u puts and %u heads\n", p, h);
	return p == puts && h == heads;
}

/* --- Late puts -------------------------------------------------------------------------------- */

struct late {
	struct trial *t;
	char name[2];
};

static CO_FN void put_late(void *arg)
{
	struct late *l = arg;

	EXPECT(put(l->t, l->name, "late") == -ETIMEDOUT);
}

static int wait_held(void *arg)
{
	s3_fake_wait_held(fake, *(const unsigned *)arg);
	return 0;
}

static int release(void *arg)
{
	s3_fake_release(fake);
	return 0;
}

/* Puts "late" to each object named by a letter of `names`; the daemon gives up, the server has them all. */
static CO_FN void put_all_late(struct trial *t, const char *names)
{
	struct co_group group = CO_GROUP_INIT;
	struct late late[16];
	unsigned n = 0;

	s3_fake_hold(fake, (unsigned)strlen(names), "PUT");
	for (; names[n]; n++) {
		late[n] = (struct late){ .t = t, .name = { names[n], '\0' } };
		co_group_spawn(&group, put_late, &late[n]);
	}
	co_group_wait(&group);
	(void)offload(wait_held, &n);
}

static void expect_all(const char *names, const char *data)
{
	for (const char *n = names; *n; n++) {
		char key[] = { 'p', '/', *n, '\0' };

		if (!s3_fake_is(fake, key, data)) {
			print_error("object %c is not \"%s\"\n", *n, data);
			EXPECT(!"nothing late undoes what is newer");
		}
	}
}

/* Given up by a time-out, and put again. */
static CO_FN int given_up(void *arg)
{
	struct trial t;

	open_with(&t, TIMEOUT);
	EXPECT(put(&t, "a", "first") == 0);
	put_all_late(&t, "ab");
	EXPECT(put(&t, "a", "newer") == 0 && put(&t, "b", "newer") == 0);
	(void)offload(release, NULL);
	expect_all("ab", "newer");
	EXPECT(put(&t, "a", "last") == 0);
	expect_all("a", "last");
	trial_close(&t);
	return 0;
}

/* Of a daemon that is dead; the next one comes to know of the objects in all ways that there are. */
static CO_FN int dead_daemon(void *arg)
{
	struct trial dead, t;
	char buf[8];

	open_with(&dead, TIMEOUT);
	for (const char *n = "abcd"; *n; n++)
		EXPECT(put(&dead, (char[]){ *n, '\0' }, "first") == 0);
	put_all_late(&dead, "abcdefg");
	trial_close(&dead);
	trial_open_store(&t);
	EXPECT(trial_get(&t, "a", 0, buf, 5) == 0);
	EXPECT(look(&t, "b") == 0);
	EXPECT(del(&t, "d") == 0);
	EXPECT(trial_get(&t, "e", 0, buf, 5) == -ENOENT);
	EXPECT(put_new(&t, "f", "newer") == 0);
	for (const char *n = "abcdeg"; *n; n++)
		EXPECT(put(&t, (char[]){ *n, '\0' }, "newer") == 0);
	(void)offload(release, NULL);
	expect_all("abcdefg", "newer");
	trial_close(&t);
	return 0;
}

/* What was there before, and is deleted, stays so. */
static CO_FN int deleted(void *arg)
{
	struct trial dead, t;

	open_with(&dead, TIMEOUT);
	EXPECT(put(&dead, "a", "first") == 0);
	put_all_late(&dead, "a");
	trial_close(&dead);
	trial_open_store(&t);
	EXPECT(del(&t, "a") == 0);
	(void)offload(release, NULL);
	EXPECT(!s3_fake_has(fake, "p/a"));
	trial_close(&t);
	return 0;
}

/* It comes through before the newer one, which was made for what was there until then. */
static CO_FN int in_between(void *arg)
{
	struct trial dead, t;

	open_with(&dead, TIMEOUT);
	EXPECT(put(&dead, "a", "first") == 0);
	put_all_late(&dead, "ab");
	trial_close(&dead);
	trial_open_store(&t);
	EXPECT(look(&t, "a") == 0);
	(void)offload(release, NULL);
	expect_all("ab", "late");
	forget_costs();
	EXPECT(put(&t, "a", "newer") == 0 && put_new(&t, "b", "newer") == 0);
	EXPECT(cost(4, 2));
	expect_all("ab", "newer");
	/* The same, and it is what was to be put: by its MD5. */
	TRIAL_SET(has_md5_etags, true);
	EXPECT(look(&t, "c") == -ENOENT);
	s3_fake_put(fake, "p/c", "newer", 5);
	forget_costs();
	EXPECT(put(&t, "c", "newer") == 0 && cost(1, 1));
	EXPECT(put(&t, "c", "last") == 0 && cost(1, 0));
	s3_fake_put(fake, "p/c", "1234", 4); /* as long */
	EXPECT(put(&t, "c", "4321") == 0 && cost(2, 1));
	expect_all("c", "4321");
	trial_close(&t);
	return 0;
}

/* Of a put that is done the answer is lost: of the probe's, and of one that is sent again by the HTTP client. */
static CO_FN int lost_answers(void *arg)
{
	struct trial t;

	for (unsigned i = 4; i-- > 0;) {
		TRIAL_SET(lose_puts, 1);
		TRIAL_SET(lose_after, i);
		trial_open_store(&t);
		EXPECT(chain_top(t.chain)->caps & CAN_PUT_IF);
		if (i > 0)
			trial_close(&t);
	}
	EXPECT(put(&t, "a", "first") == 0);
	s3_fake_put(fake, "p/a", "other", 5);
	forget_costs();
	EXPECT(put(&t, "a", "newer") == 0 && cost(2, 1));
	TRIAL_SET(lose_puts, 1);
	EXPECT(put(&t, "a", "lost") == 0 && cost(3, 1));
	expect_all("a", "lost");
	TRIAL_SET(has_md5_etags, true);
	EXPECT(put(&t, "b", "first") == 0);
	forget_costs();
	TRIAL_SET(lose_puts, 1);
	EXPECT(put(&t, "b", "lost") == 0 && cost(2, 1));
	expect_all("b", "lost");
	trial_close(&t);
	return 0;
}

/* --- What it costs ---------------------------------------------------------------------------- */

static int ignore(void *arg, const char *name, uint64_t size)
{
	return 0;
}

static CO_FN int costs(void *arg)
{
	struct obj objs[2] = { trial_obj("a"), trial_obj("b") };
	struct obj_stat st;
	struct trial t;
	char buf[4];

	s3_fake_put(fake, "p/read", "x", 1);
	s3_fake_put(fake, "p/seen", "x", 1);
	trial_open_store(&t);
	forget_costs();
	/* Nothing is known. */
	EXPECT(put(&t, "a", "x") == 0 && cost(1, 1));
	for (unsigned i = 0; i < 10; i++)
		EXPECT(put(&t, "a", i & 1 ? "x" : "y") == 0);
	EXPECT(cost(10, 0));
	EXPECT(put_new(&t, "b", "x") == 0 && put(&t, "b", "y") == 0 && cost(2, 0));
	EXPECT(trial_get(&t, "read", 0, buf, 1) == 0 && put(&t, "read", "y") == 0 && cost(1, 0));
	EXPECT(look(&t, "seen") == 0 && put(&t, "seen", "y") == 0 && cost(1, 1));
	EXPECT(look(&t, "none") == -ENOENT && put(&t, "none", "y") == 0 && cost(1, 1));
	EXPECT(del(&t, "none") == 0 && put(&t, "none", "z") == 0 && cost(1, 0));
	EXPECT(ch_del(t.c, objs, 2) == 0 && put_new(&t, "a", "z") == 0 && put(&t, "b", "z") == 0 &&
	       cost(2, 1));
	/* A listing knows all of them. */
	s3_fake_put(fake, "p/list1", "x", 1);
	s3_fake_put(fake, "p/list2", "x", 1);
	EXPECT(ch_list(t.c, "list", ignore, NULL) == 0);
	EXPECT(put(&t, "list1", "z") == 0 && put(&t, "list2", "z") == 0 && cost(2, 0));
	/* Conditional puts of the caller are what they were, and tell what is there. */
	EXPECT(trial_put(&t, "c", "x", PUT_IF_ABSENT, NULL, &st) == 0);
	EXPECT(trial_put(&t, "c", "y", PUT_IF_ABSENT, NULL, NULL) == -EEXIST && cost(2, 0));
	EXPECT(put(&t, "c", "z") == 0 && cost(1, 1));
	EXPECT(trial_put(&t, "c", "y", PUT_IF_MATCH, st.etag, NULL) == -ESTALE && cost(1, 0));
	EXPECT(trial_put(&t, "d", "y", PUT_IF_ABSENT, NULL, NULL) == 0);
	EXPECT(put(&t, "d", "z") == 0 && cost(2, 0));
	/* After one that failed nobody knows. */
	trial_force(1, "PUT", 500, NULL, NULL);
	EXPECT(put(&t, "d", "x") == -EAGAIN && put(&t, "d", "x") == 0 && cost(2, 1));
	trial_close(&t);
	return 0;
}

/* The etag that is answered is that of the object. */
static CO_FN int answers(void *arg)
{
	struct obj_stat st, now;
	const struct obj a = trial_obj("a");
	struct trial t;

	TRIAL_SET(has_md5_etags, true);
	trial_open_store(&t);
	for (unsigned i = 0; i < 2; i++) {
		EXPECT(trial_put(&t, "a", "bytes", PUT_ALWAYS, NULL, &st) == 0 && st.size == 5);
		EXPECT(ch_stat(t.c, &a, &now) == 0 && strcmp(st.etag, now.etag) == 0);
		EXPECT(put(&t, "a", "other") == 0);
		s3_fake_put(fake, "p/a", "bytes", 5); /* the second put is done already */
	}
	trial_close(&t);
	return 0;
}

/* --- Servers ---------------------------------------------------------------------------------- */

struct writer {
	struct trial *t;
	unsigned rounds;
};

static CO_FN void write_often(void *arg)
{
	const struct writer *w = arg;

	for (unsigned i = 0; i < w->rounds; i++)
		EXPECT(put(w->t, "a", "x") == 0);
}

/* Several at a time, from one daemon: each gets its turn, and none costs more than alone. */
static CO_FN int crowd(void *arg)
{
	struct co_group group = CO_GROUP_INIT;
	struct writer w = { .rounds = 20 };
	struct trial t;

	trial_open_store(&t);
	forget_costs();
	w.t = &t;
	for (unsigned i = 0; i < 4; i++)
		co_group_spawn(&group, write_often, &w);
	co_group_wait(&group);
	EXPECT(cost(80, 1));
	expect_all("a", "x");
	trial_close(&t);
	return 0;
}

/* 409 may mean "not now" as well: no reason to do without. */
static CO_FN int conflicts(void *arg)
{
	struct trial t;

	TRIAL_SET(cond, COND_CONFLICT);
	trial_open_store(&t);
	EXPECT(put(&t, "a", "x") == 0);
	s3_fake_put(fake, "p/a", "y", 1);
	EXPECT(put(&t, "a", "z") == 0);
	expect_all("a", "z");
	forget_costs();
	trial_force(4, "PUT", 409, NULL, "<Error><Code>ConditionalRequestConflict</Code></Error>");
	EXPECT(put(&t, "a", "w") == 0 && cost(5, 4));
	expect_all("a", "w");
	trial_force(1000, "PUT", 409, NULL, "<Error><Code>ConditionalRequestConflict</Code></Error>");
	EXPECT(put(&t, "a", "v") == -EAGAIN && cost(8, 8));
	trial_force(0, "PUT", 200, NULL, NULL);
	EXPECT(put(&t, "a", "v") == 0);
	expect_all("a", "v");
	s3_fake_put(fake, "p/a", "y", 1);
	EXPECT(put(&t, "a", "u") == 0 && cost(3, 1)); /* guarded as before */
	trial_close(&t);
	return 0;
}

/* ETags that are not told, or are others than those that count, end the guard, not the put. */
static CO_FN int no_etags(void *arg)
{
	struct trial t;

	TRIAL_SET(has_no_etags, true);
	trial_open_store(&t);
	forget_costs();
	EXPECT(put(&t, "a", "x") == 0 && put(&t, "a", "y") == 0 && cost(2, 0));
	trial_close(&t);
	/* Not any more. */
	TRIAL_SET(has_no_etags, false);
	trial_open_store(&t);
	EXPECT(put(&t, "a", "x") == 0);
	TRIAL_SET(has_no_etags, true);
	forget_costs();
	EXPECT(put(&t, "a", "y") == 0 && cost(1, 0));
	EXPECT(put(&t, "a", "z") == 0 && cost(1, 1));
	expect_all("a", "z");
	trial_close(&t);
	TRIAL_SET(has_no_etags, false);
	TRIAL_SET(renames_etags, true);
	trial_open_store(&t);
	forget_costs();
	EXPECT(put(&t, "a", "x") == 0 && cost(3, 3));
	EXPECT(put(&t, "a", "y") == 0 && put(&t, "b", "y") == 0 && cost(2, 0));
	expect_all("ab", "y");
	trial_close(&t);
	return 0;
}

static CO_FN int no_conditions(void *arg)
{
	struct trial t;

	trial_open_store(&t);
	EXPECT(put(&t, "a", "x") == 0);
	TRIAL_SET(cond, COND_UNKNOWN);
	forget_costs();
	EXPECT(put(&t, "a", "y") == 0 && cost(2, 0));
	EXPECT(put(&t, "a", "z") == 0 && put(&t, "b", "z") == 0 && cost(2, 0));
	expect_all("ab", "z");
	trial_close(&t);
	/* From the start. */
	for (enum fake_cond cond = COND_IGNORED; cond <= COND_ONLY_ABSENT; cond++) {
		TRIAL_SET(cond, cond);
		trial_open_store(&t);
		forget_costs();
		EXPECT(put(&t, "a", "x") == 0 && put_new(&t, "a", "y") == 0 && cost(2, 0));
		trial_close(&t);
	}
	expect_all("a", "y");
	return 0;
}

/* The server is asked, and does not answer. */
static CO_FN int not_told(void *arg)
{
	struct trial t;

	trial_open_store(&t);
	trial_force(1, "HEAD", 403, NULL, NULL);
	EXPECT(put(&t, "a", "x") == 0);
	expect_all("a", "x");
	trial_force(1, "HEAD", 503, NULL, NULL);
	EXPECT(put(&t, "b", "x") == -EAGAIN && !s3_fake_has(fake, "p/b"));
	EXPECT(put(&t, "b", "x") == 0);
	trial_force(1, "PUT", 403, NULL, "<Error><Code>AccessDenied</Code></Error>");
	EXPECT(put(&t, "b", "y") == -EACCES);
	trial_force(1, "PUT", 404, NULL, "<Error><Code>NoSuchBucket</Code></Error>");
	EXPECT(put(&t, "b", "y") == -ENODEV);
	expect_all("b", "x");
	trial_close(&t);
	return 0;
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		TRIAL(given_up),   TRIAL(dead_daemon),  TRIAL(deleted),  TRIAL(in_between),
		TRIAL(lost_answers), TRIAL(costs),      TRIAL(answers),  TRIAL(crowd),
		TRIAL(conflicts),  TRIAL(no_etags),     TRIAL(no_conditions), TRIAL(not_told),
	};

	return cmocka_run_group_tests(tests, trial_start_all, core_stop);
}
