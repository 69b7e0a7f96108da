/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Calls across reactors: a message asks for a fiber there, and whoever called waits for its end, as a fiber or as a
 * thread.
 */
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>

#include "nbdrs/co.h"
#include "nbdrs/reactor.h"

struct call {
	struct reactor_msg msg;
	int (*fn)(void *arg);
	void *arg;
	int res;
	_Atomic bool is_done;
	struct co *co;		/* who waits: a fiber ... */
	pthread_mutex_t lock;	/* ... or, when NULL, a thread on these */
	pthread_cond_t done;
};

static void call_finish(struct call *c, int res)
{
	struct co *co = c->co;

	c->res = res;
	if (co != NULL) {
		atomic_store(&c->is_done, true); /* from here on *c may be gone */
		co_wake(co);
		return;
	}
	pthread_mutex_lock(&c->lock);
	atomic_store(&c->is_done, true);
	pthread_cond_signal(&c->done);
	pthread_mutex_unlock(&c->lock);
}

static void call_fiber(void *arg)
{
	struct call *c = arg;

	call_finish(c, c->fn(c->arg));
}

static void call_here(void *arg)
{
	struct call *c = arg;

	if (co_spawn(call_fiber, c) != 0)
		call_finish(c, -ENOMEM);
}

int reactor_call(struct reactor *r, int (*fn)(void *arg), void *arg)
{
	struct call c = { .fn = fn, .arg = arg, .co = co_self() };

	reactor_post(r, &c.msg, call_here, &c);
	while (!atomic_load(&c.is_done))
		co_park();
	return c.res;
}

int reactor_call_blocking(struct reactor *r, int (*fn)(void *arg), void *arg)
{
	struct call c = { .fn = fn, .arg = arg };

	assert(reactor_self() == NULL);
	(void)pthread_mutex_init(&c.lock, NULL);
	(void)pthread_cond_init(&c.done, NULL);
	reactor_post(r, &c.msg, call_here, &c);
	pthread_mutex_lock(&c.lock);
	while (!atomic_load(&c.is_done))
		pthread_cond_wait(&c.done, &c.lock);
	pthread_mutex_unlock(&c.lock);
	(void)pthread_cond_destroy(&c.done);
	(void)pthread_mutex_destroy(&c.lock);
	return c.res;
}
