/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Fibers, their locks and groups, range locks.
 */
#include "core_test.h"

#include <errno.h>
#include <stdatomic.h>

#include "nbdrs/co.h"
#include "nbdrs/rangelock.h"

const char *core_failure;

/* ---- spawning, parking, waking ---- */

struct trace {
	char text[64];
	unsigned n;
	struct co *parked;
};

static void note(struct trace *t, char c)
{
	t->text[t->n++] = c;
	t->text[t->n] = '\0';
}

CO_FN static void inner(void *arg)
{
	struct trace *t = arg;

	note(t, 'b');
	t->parked = co_self();
	co_park();
	note(t, 'e');
}

CO_FN static void outer(void *arg)
{
	struct trace *t = arg;

	note(t, 'a');
	EXPECT(co_spawn(inner, t) == 0);
	note(t, 'c'); /* inner parked: we go on at once */
}

CO_FN static int order_body(void *arg)
{
	struct trace *t = arg;

	EXPECT(co_spawn(outer, t) == 0);
	note(t, 'd');
	co_wake(t->parked);
	co_wake(t->parked); /* queued already: harmless */
	co_yield();
	note(t, 'f');
	return 0;
}

static void test_order(void **state)
{
	struct trace t = { .n = 0 };

	(void)state;
	core_run(order_body, &t);
	assert_string_equal(t.text, "abcdef");
}

enum { MANY = 3000 };

/* Values in registers and on the stack survive switches. */
static uint64_t churn(uint64_t seed, unsigned depth)
{
	volatile char pad[256];

	pad[0] = (char)seed;
	if (depth == 0)
		return seed;
	return churn(seed * 6364136223846793005U + 1, depth - 1) + (uint64_t)pad[0] * 0;
}

struct many {
	unsigned finished;
};

CO_FN static void worker(void *arg)
{
	struct many *m = arg;
	uint64_t before = churn(m->finished, 50);
	double d = (double)m->finished * 1.5;
	unsigned mine = m->finished;

	for (int i = 0; i < 3; i++)
		co_yield();
	EXPECT(churn(mine, 50) == before);
	EXPECT(d == (double)mine * 1.5);
	m->finished++;
}

CO_FN static int many_body(void *arg)
{
	struct many *m = arg;
	struct co_group g = CO_GROUP_INIT;

	for (unsigned i = 0; i < MANY; i++)
		co_group_spawn(&g, worker, m);
	co_group_wait(&g);
	return 0;
}

static void test_many(void **state)
{
	struct many m = { 0 };

	(void)state;
	core_run(many_body, &m);
	assert_int_equal(m.finished, MANY);
}

/* ---- waking from other reactors, mutex, wait queue ---- */

struct shared {
	struct co_mutex mutex;
	unsigned inside, count; /* plain: the mutex guards them */
	pthread_mutex_t lock;
	struct co_wq wq;
	unsigned tokens;
	_Atomic unsigned taken;
};

enum { ROUNDS = 2000, PER_REACTOR = 5 };

CO_FN static void mutex_worker(void *arg)
{
	struct shared *s = arg;

	for (int i = 0; i < ROUNDS / PER_REACTOR; i++) {
		co_mutex_lock(&s->mutex);
		EXPECT(s->inside == 0);
		s->inside++;
		if (i % 7 == 0)
			co_yield(); /* it may be held across a wait */
		s->inside--;
		s->count++;
		co_mutex_unlock(&s->mutex);
	}
}

CO_FN static int mutex_reactor(void *arg)
{
	struct co_group g = CO_GROUP_INIT;

	for (int i = 0; i < PER_REACTOR; i++)
		co_group_spawn(&g, mutex_worker, arg);
	co_group_wait(&g);
	return 0;
}

struct remote {
	struct reactor *r;
	int (*fn)(void *arg);
	void *arg;
};

CO_FN static void remote_fiber(void *arg)
{
	struct remote *r = arg;

	EXPECT(reactor_call(r->r, r->fn, r->arg) == 0);
}

/* Runs fn on all reactors at the same time. */
CO_FN static void on_all(int (*fn)(void *arg), void *arg)
{
	struct remote r[CORE_TEST_THREADS];
	struct co_group g = CO_GROUP_INIT;

	for (unsigned i = 0; i < CORE_TEST_THREADS; i++) {
		r[i] = (struct remote){ reactor_get(i), fn, arg };
		co_group_spawn(&g, remote_fiber, &r[i]);
	}
	co_group_wait(&g);
}

CO_FN static int mutex_body(void *arg)
{
	on_all(mutex_reactor, arg);
	return 0;
}

static void test_mutex(void **state)
{
	struct shared s = { .count = 0 };

	(void)state;
	co_mutex_init(&s.mutex);
	core_run(mutex_body, &s);
	assert_int_equal(s.count, ROUNDS / PER_REACTOR * PER_REACTOR * CORE_TEST_THREADS);
	co_mutex_destroy(&s.mutex);
}

CO_FN static int consume(void *arg)
{
	struct shared *s = arg;

	for (int i = 0; i < ROUNDS; i++) {
		pthread_mutex_lock(&s->lock);
		while (s->tokens == 0)
			co_wq_wait(&s->wq, &s->lock);
		s->tokens--;
		pthread_mutex_unlock(&s->lock);
		atomic_fetch_add(&s->taken, 1);
	}
	return 0;
}

CO_FN static int produce(void *arg)
{
	struct shared *s = arg;

	for (int i = 0; i < ROUNDS; i++) {
		pthread_mutex_lock(&s->lock);
		s->tokens++;
		co_wq_wake_one(&s->wq);
		pthread_mutex_unlock(&s->lock);
		if (i % 5 == 0)
			co_yield();
	}
	return 0;
}

CO_FN static int wq_body(void *arg)
{
	struct remote r[] = { { reactor_get(1), consume, arg },
			      { reactor_get(2), produce, arg },
			      { reactor_get(2), consume, arg },
			      { reactor_get(0), produce, arg } };
	struct co_group g = CO_GROUP_INIT;

	for (unsigned i = 0; i < 4; i++)
		co_group_spawn(&g, remote_fiber, &r[i]);
	co_group_wait(&g);
	return 0;
}

static void test_wq(void **state)
{
	struct shared s = { .tokens = 0 };

	(void)state;
	(void)pthread_mutex_init(&s.lock, NULL);
	co_wq_init(&s.wq);
	core_run(wq_body, &s);
	assert_int_equal(s.taken, 2 * ROUNDS);
	assert_int_equal(s.tokens, 0);
	(void)pthread_mutex_destroy(&s.lock);
}

CO_FN static int wq_timeout_body(void *arg)
{
	struct shared *s = arg;
	uint64_t before = now_ns();
	int rc;

	pthread_mutex_lock(&s->lock);
	rc = co_wq_wait_for(&s->wq, &s->lock, 5000000);
	EXPECT(list_empty(&s->wq.waiters));
	pthread_mutex_unlock(&s->lock);
	EXPECT(rc == -ETIMEDOUT);
	EXPECT(now_ns() - before >= 5000000);
	return 0;
}

static void test_wq_timeout(void **state)
{
	struct shared s = { .tokens = 0 };

	(void)state;
	(void)pthread_mutex_init(&s.lock, NULL);
	co_wq_init(&s.wq);
	core_run(wq_timeout_body, &s);
	(void)pthread_mutex_destroy(&s.lock);
}

/* ---- range locks: nobody overlaps an exclusive holder, everybody gets through ---- */

enum { CELLS = 64, RANGE_ROUNDS = 400 };

struct ranges {
	struct rangelock lock;
	_Atomic int cell[CELLS]; /* > 0: so many sharers; -1: an exclusive holder */
	_Atomic unsigned done;
};

static void enter_cells(struct ranges *s, unsigned from, unsigned n, bool is_shared)
{
	for (unsigned i = from; i < from + n; i++) {
		if (is_shared) {
			EXPECT(atomic_fetch_add(&s->cell[i], 1) >= 0);
		} else {
			EXPECT(atomic_exchange(&s->cell[i], -1) == 0);
		}
	}
}

static void leave_cells(struct ranges *s, unsigned from, unsigned n, bool is_shared)
{
	for (unsigned i = from; i < from + n; i++) {
		if (is_shared)
			atomic_fetch_sub(&s->cell[i], 1);
		else
			atomic_store(&s->cell[i], 0);
	}
}

CO_FN static void range_worker(void *arg)
{
	struct ranges *s = arg;
	unsigned seed = (unsigned)(uintptr_t)co_self() ^ (unsigned)now_ns();

	for (int i = 0; i < RANGE_ROUNDS; i++) {
		unsigned from = (unsigned)rand_r(&seed) % CELLS;
		unsigned n = 1 + (unsigned)rand_r(&seed) % (CELLS - from);
		bool is_shared = rand_r(&seed) % 2;
		struct range_hold h;

		rangelock_lock(&s->lock, &h, 7, from, n, is_shared);
		enter_cells(s, from, n, is_shared);
		if (rand_r(&seed) % 3 == 0)
			co_yield();
		leave_cells(s, from, n, is_shared);
		rangelock_unlock(&s->lock, &h);
	}
	atomic_fetch_add(&s->done, 1);
}

CO_FN static int range_reactor(void *arg)
{
	struct co_group g = CO_GROUP_INIT;

	for (int i = 0; i < 8; i++)
		co_group_spawn(&g, range_worker, arg);
	co_group_wait(&g);
	return 0;
}

CO_FN static int range_body(void *arg)
{
	on_all(range_reactor, arg);
	return 0;
}

static void test_rangelock(void **state)
{
	static struct ranges s;

	(void)state;
	rangelock_init(&s.lock);
	core_run(range_body, &s);
	assert_int_equal(s.done, 8 * CORE_TEST_THREADS);
	rangelock_destroy(&s.lock);
}

CO_FN static int other_key_body(void *arg)
{
	struct rangelock *l = arg;
	struct range_hold a, b, c;

	rangelock_lock(l, &a, 1, 0, 100, false);
	rangelock_lock(l, &b, 2, 0, 100, false); /* another object: no conflict, or this would hang */
	rangelock_lock(l, &c, 1, 100, 1, false); /* neighbours do not overlap */
	rangelock_unlock(l, &a);
	rangelock_unlock(l, &b);
	rangelock_unlock(l, &c);
	return 0;
}

static void test_rangelock_keys(void **state)
{
	struct rangelock l;

	(void)state;
	rangelock_init(&l);
	core_run(other_key_body, &l);
	rangelock_destroy(&l);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_order),	   cmocka_unit_test(test_many),
		cmocka_unit_test(test_mutex),	   cmocka_unit_test(test_wq),
		cmocka_unit_test(test_wq_timeout), cmocka_unit_test(test_rangelock),
		cmocka_unit_test(test_rangelock_keys),
	};

	return cmocka_run_group_tests(tests, core_start, core_stop);
}
