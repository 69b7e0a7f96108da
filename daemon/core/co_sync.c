/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Waiting locks for fibers of any reactor. Each has a small pthread mutex around its list of waiters,
 * which is never held across a wait. A waiter's node lives on its stack: it leaves only after it saw, under
 * that mutex, that it was taken off the list, so nobody can touch a node that is gone.
 */
#include <assert.h>
#include <errno.h>

#include "core/reactor_int.h"
#include "nbdrs/co.h"

/* gcc cannot see that a waiter's node is off the list before its frame ends (is_woken says so). */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wdangling-pointer"
#endif

struct waiter {
	struct list node;
	struct co *co;
	bool is_woken;
};

static void waiter_add(struct list *list, struct waiter *w)
{
	w->co = co_self();
	w->is_woken = false;
	list_add(list, &w->node);
}

/* The caller holds the mutex that guards the list. */
static void waiter_wake(struct list *node)
{
	struct waiter *w = list_entry(node, struct waiter, node);

	list_del(node);
	w->is_woken = true;
	co_wake(w->co);
}

void co_mutex_init(struct co_mutex *m)
{
	(void)pthread_mutex_init(&m->lock, NULL); /* cannot fail for a default mutex */
	m->owner = NULL;
	list_init(&m->waiters);
}

void co_mutex_destroy(struct co_mutex *m)
{
	assert(m->owner == NULL && list_empty(&m->waiters));
	(void)pthread_mutex_destroy(&m->lock);
}

void co_mutex_lock(struct co_mutex *m)
{
	struct waiter w;

	pthread_mutex_lock(&m->lock);
	if (m->owner == NULL) {
		m->owner = co_self();
		pthread_mutex_unlock(&m->lock);
		return;
	}
	waiter_add(&m->waiters, &w);
	while (!w.is_woken) {
		pthread_mutex_unlock(&m->lock);
		co_park();
		pthread_mutex_lock(&m->lock);
	}
	assert(m->owner == co_self()); /* handed over by unlock */
	pthread_mutex_unlock(&m->lock);
}

void co_mutex_unlock(struct co_mutex *m)
{
	struct list *first;

	pthread_mutex_lock(&m->lock);
	assert(m->owner == co_self());
	first = m->waiters.next;
	if (first == &m->waiters) {
		m->owner = NULL;
	} else {
		m->owner = list_entry(first, struct waiter, node)->co;
		waiter_wake(first);
	}
	pthread_mutex_unlock(&m->lock);
}

void co_wq_init(struct co_wq *q)
{
	list_init(&q->waiters);
}

void co_wq_wait(struct co_wq *q, pthread_mutex_t *lock)
{
	struct waiter w;

	waiter_add(&q->waiters, &w);
	while (!w.is_woken) {
		pthread_mutex_unlock(lock);
		co_park();
		pthread_mutex_lock(lock);
	}
}

struct wq_timeout {
	struct timer timer;
	struct co *co;
	bool is_over;
};

static void wq_timed_out(struct timer *t)
{
	struct wq_timeout *wt = container_of(t, struct wq_timeout, timer);

	wt->is_over = true;
	co_wake(wt->co);
}

int co_wq_wait_for(struct co_wq *q, pthread_mutex_t *lock, uint64_t timeout_ns)
{
	struct wq_timeout wt = { .co = co_self(), .is_over = false };
	struct waiter w;

	timer_init(&wt.timer, wq_timed_out);
	if (timer_start(&wt.timer, now_ns() + timeout_ns) != 0)
		return -ETIMEDOUT; /* without a timer a wait might never end */
	waiter_add(&q->waiters, &w);
	while (!w.is_woken && !wt.is_over) {
		pthread_mutex_unlock(lock);
		co_park();
		pthread_mutex_lock(lock);
	}
	timer_stop(&wt.timer);
	if (w.is_woken)
		return 0;
	list_del(&w.node);
	return -ETIMEDOUT;
}

void co_wq_wake_all(struct co_wq *q)
{
	while (!list_empty(&q->waiters))
		waiter_wake(q->waiters.next);
}

void co_wq_wake_one(struct co_wq *q)
{
	if (!list_empty(&q->waiters))
		waiter_wake(q->waiters.next);
}

struct group_child {
	struct co_group *group;
	void (*fn)(void *arg);
	void *arg;
};

static void group_run(void *arg)
{
	/* The parent's frame holds *arg only until the child first parks. */
	struct group_child child = *(struct group_child *)arg;

	child.fn(child.arg);
	child.group->running--;
	if (child.group->running == 0 && child.group->waiter != NULL)
		co_wake(child.group->waiter);
}

void co_group_spawn(struct co_group *g, void (*fn)(void *arg), void *arg)
{
	struct group_child child = { g, fn, arg };

	g->running++;
	if (co_spawn(group_run, &child) != 0)
		group_run(&child);
}

void co_group_wait(struct co_group *g)
{
	g->waiter = co_self();
	while (g->running > 0)
		co_park();
	g->waiter = NULL;
}
