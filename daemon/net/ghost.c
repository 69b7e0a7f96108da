/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Requests of a device's lost connections.
 *
 * When the kernel gives a connection up (a request took longer than its --timeout) it sends what was in flight again,
 * at once, over another one that works. The first copy may still be in the chain, and cannot be called back. Were the
 * second one answered, and then a newer write to the same place, the first copy would undo the newer write at its
 * end. So, while a cut connection of an export has changes in the chain (it is a ghost), changes that come over the
 * export's other connections of the kernel wait. Reads, flushes and other clients don't.
 *
 * A connection that is over its limits is not read, and so is watched for its end only (conn_watch_cut).
 *
 *	a change begins	(ghost_enter) -> changing++ ... changing-- (ghost_leave)
 *	cut		with changing > 0: a ghost, until the last of them has ended
 */
#include "net/conn_int.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct co_wq ended = { LIST_INIT(ended.waiters) };

static bool is_cut(const struct conn *c)
{
	return c->is_ending || c->is_broken;
}

void ghost_look(struct conn *c)
{
	/* A daemon that stops ends all connections, and takes no requests any more. */
	if (!c->s.is_kernel || c->is_ghost || c->changing == 0 || c->is_draining || !is_cut(c))
		return;
	c->is_ghost = true;
	atomic_fetch_add(&c->s.export->ghosts, 1);
}

CO_FN bool ghost_enter(struct conn *c)
{
	struct export *e = c->s.export;

	if (unlikely(atomic_load(&e->ghosts) > 0)) {
		pthread_mutex_lock(&lock);
		while (atomic_load(&e->ghosts) > 0 && !is_cut(c))
			co_wq_wait(&ended, &lock);
		pthread_mutex_unlock(&lock);
		/* It has not begun, and is sent again over another connection: nobody misses it. */
		if (is_cut(c))
			return false;
	}
	c->changing++;
	return true;
}

void ghost_leave(struct conn *c)
{
	if (--c->changing > 0 || !c->is_ghost)
		return;
	c->is_ghost = false;
	pthread_mutex_lock(&lock);
	atomic_fetch_sub(&c->s.export->ghosts, 1);
	co_wq_wake_all(&ended);
	pthread_mutex_unlock(&lock);
}
