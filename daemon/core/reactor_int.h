/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * A reactor's inside, shared by the files of core/ only.
 */
#ifndef NBDRS_REACTOR_INT_H
#define NBDRS_REACTOR_INT_H

#include <pthread.h>
#include <stdatomic.h>

#include "core/co_switch.h"
#include "core/engine.h"
#include "nbdrs/reactor.h"

struct co {
	struct list node;	 /* on the run queue or the free list */
	struct co_ctx ctx;
	struct co *caller;	 /* who entered us; NULL = the reactor's own stack */
	struct reactor *reactor;
	void *stack;		 /* lowest usable byte; NULL when the stack went back to the kernel */
	void (*fn)(void *arg);
	void *arg;
	_Atomic bool is_queued;	 /* a wake is on its way or on the run queue */
	bool is_finished;
	struct reactor_msg msg;	 /* carries a wake from another thread */
	void *san_fake_stack;	 /* AddressSanitizer's, while suspended */
	void *san_fiber;	 /* ThreadSanitizer's */
	unsigned san_lives;	 /* that it has served */
	unsigned valgrind_id;
};

/* Fibers of one reactor. The struct of a fiber is never freed while the reactor lives (late wakes). */
struct co_pool {
	struct co *current;
	struct co_ctx main_ctx;
	struct list runq;
	struct list free;	 /* with a stack, hottest first */
	struct list bare;	 /* without a stack */
	unsigned free_n, live_n;
	void *san_main_fiber, *san_main_fake_stack;
	const void *main_stack;
	size_t main_stack_len;
};

enum { BUF_CLASSES = 15 }; /* 4 KiB << 0 .. 4 KiB << 14 = 64 MiB */

struct buf_pool {
	void *free[BUF_CLASSES];
	size_t cached; /* bytes on the free lists */
};

struct timer_heap {
	struct timer **v;
	unsigned n, max;
};

/* Whether spinning pays: each one in vain makes it leave out more of the next, one that paid ends that. */
struct spin_luck {
	uint64_t armed_ns; /* when it last went to sleep */
	unsigned misses;   /* spins in vain in a row */
	unsigned skip;	   /* sleeps still to come without a spin */
	bool is_tried;	   /* spinning now */
};

struct reactor {
	unsigned index;
	pthread_t thread;
	const struct engine *engine;
	void *engine_state;
	struct co_pool co;
	struct buf_pool buf;
	struct timer_heap timers;
	struct list defers, spinners;
	unsigned spinners_n;
	uint64_t now, spin_ns;
	uint64_t active_at;	 /* when something last came */
	uint64_t spun_at;	 /* when the spinners last had their turn */
	struct spin_luck luck;	 /* of spinning before a sleep */
	bool is_stopping;

	int wake_fd;
	struct io_watch wake_watch;
	/* Shared with other threads; on cache lines of their own. */
	_Alignas(64) _Atomic(struct reactor_msg *) inbox;
	_Atomic bool is_sleeping;
};

/* co.c */
void co_pool_init(struct co_pool *p);
void co_pool_free(struct co_pool *p);
void co_enter(struct co *co);
/* Runs what is on the run queue now (not what is added meanwhile). True when anything ran. */
bool co_run_ready(struct reactor *r);

/* reactor.c, for the simulation: the parts of a turn; true when anything ran. */
bool reactor_run_messages(struct reactor *r);
bool reactor_run_defers(struct reactor *r);
/*
 * Makes this thread the one reactor, without a loop, until the process ends; `engine` becomes the world's clock
 * as well. 0 or -errno.
 */
int reactor_begin_here(const struct engine *engine);

/* timer.c: runs what is due; ns until the next one, IO_FOREVER when there is none. */
void timers_run(struct timer_heap *h, uint64_t now);
uint64_t timers_next(const struct timer_heap *h, uint64_t now);
void timers_free(struct timer_heap *h);

/* buf.c */
void buf_pool_free(struct buf_pool *p);

/* offload.c: ends the pool's threads; nothing may be running in it. */
void offload_stop(void);
/* Runs a file_op by ordinary blocking calls on a pool thread. For the epoll engine. */
CO_FN int offload_file(const struct file_op *op);

#endif
