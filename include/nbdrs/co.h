/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Fibers: stackful coroutines that belong to one reactor thread for their whole life.
 *
 * A function that may suspend is marked CO_FN; only CO_FNs call CO_FNs (make lint checks it). After
 * such a call errno is dead and shared state may have changed.
 *
 *   spawned -> running <-> parked -> finished (stack goes back to the reactor's pool)
 *
 * A fiber is entered by whoever spawns it or by the reactor's loop, and gives control back to whoever
 * entered it when it parks or ends. Waking only queues it.
 */
#ifndef NBDRS_CO_H
#define NBDRS_CO_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbdrs/list.h"

#ifdef __clang__
#define CO_FN __attribute__((annotate("co_fn")))
#else
#define CO_FN
#endif

struct co;

/* Size of a fiber's stack, bytes. Guard page below it. Frames stay under 2 KiB (STYLE.md). */
enum { CO_STACK_SIZE = 64 * 1024 };

/*
 * Starts a fiber on this reactor and runs it at once, until it parks or ends; then returns. `fn` is
 * the fiber's CO_FN. Callable from a fiber or from a reactor callback. 0, or -ENOMEM when no stack can
 * be mapped (nothing ran then).
 */
int co_spawn(void (*fn)(void *arg), void *arg);

/* The running fiber; NULL on the reactor's own stack and in other threads. */
struct co *co_self(void);

/*
 * Suspends until co_wake(). Callers re-check their condition in a loop: a wake that was queued for an
 * earlier wait may arrive late.
 */
CO_FN void co_park(void);

/* Queues `co` to run on its own reactor. Any thread. Waking one that is queued already is harmless. */
void co_wake(struct co *co);

/* Lets everything else that is ready run first. */
CO_FN void co_yield(void);

/* Sleeps at least `ns` nanoseconds. */
CO_FN void co_sleep(uint64_t ns);

/*
 * A mutex that may be held across a wait, by fibers of any reactor; first come, first served.
 */
struct co_mutex {
	pthread_mutex_t lock; /* guards the two below; never held across a wait */
	struct co *owner;
	struct list waiters;
};

void co_mutex_init(struct co_mutex *m);
void co_mutex_destroy(struct co_mutex *m);
CO_FN void co_mutex_lock(struct co_mutex *m);
void co_mutex_unlock(struct co_mutex *m);

/*
 * A wait queue for a condition. `lock` is the pthread mutex that guards the condition: held when
 * called, released while parked, held again on return. Works across reactors.
 */
struct co_wq {
	struct list waiters;
};

void co_wq_init(struct co_wq *q);
CO_FN void co_wq_wait(struct co_wq *q, pthread_mutex_t *lock);
/* As co_wq_wait, at most `timeout_ns`; -ETIMEDOUT, else 0 (the condition is for the caller to test). */
CO_FN int co_wq_wait_for(struct co_wq *q, pthread_mutex_t *lock, uint64_t timeout_ns);
/* Wakes all / the longest waiting one; the caller holds the lock. */
void co_wq_wake_all(struct co_wq *q);
void co_wq_wake_one(struct co_wq *q);

/*
 * Children that are joined before return. Same reactor only, so no lock.
 *
 *	struct co_group g = CO_GROUP_INIT;
 *	co_group_spawn(&g, fn, arg);	fn and arg as for co_spawn
 *	co_group_wait(&g);
 */
struct co_group {
	unsigned running;
	struct co *waiter;
};

#define CO_GROUP_INIT { 0, NULL }

/* If no fiber can be had, fn runs in the caller: slower, never lost. */
CO_FN void co_group_spawn(struct co_group *g, void (*fn)(void *arg), void *arg);
CO_FN void co_group_wait(struct co_group *g);

#endif
