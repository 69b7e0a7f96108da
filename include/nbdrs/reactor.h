/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Reactors: one thread each, with its own I/O engine, fibers, timers and buffers. Everything here is
 * for code that runs on a reactor (fiber or callback) unless it says "any thread".
 *
 * One turn of the loop: run fibers that are ready and posted messages; run deferred work (replies are
 * flushed here, once per turn); submit what was queued; spin a little or sleep for events.
 */
#ifndef NBDRS_REACTOR_H
#define NBDRS_REACTOR_H

#include <stdbool.h>
#include <stdint.h>

#include "nbdrs/co.h"
#include "nbdrs/err.h"
#include "nbdrs/list.h"

enum { REACTOR_MAX = 64 };

enum io_engine_kind { IO_ENGINE_AUTO, IO_ENGINE_URING, IO_ENGINE_EPOLL };

struct reactor;

struct reactor_conf {
	unsigned threads;		/* 0 = one per core, at most 4 */
	enum io_engine_kind engine;
	unsigned spin_us;		/* longest spin before a sleep; 0 = never */
};

/*
 * Starts the reactors; returns when all run. Call once, after PR_SET_IO_FLUSHER and before other
 * threads. AUTO falls back from io_uring to epoll with one log line; with URING that is an error.
 */
int reactors_start(const struct reactor_conf *conf, struct err *err);

/* Asks all loops to end, joins the threads, frees everything. Not from a reactor. */
void reactors_stop(void);

unsigned reactors_n(void);
struct reactor *reactor_get(unsigned i);
const char *reactors_engine(void); /* "io_uring" or "epoll" */

/* The reactor of this thread, NULL elsewhere; and its number, 0 .. reactors_n() - 1. */
struct reactor *reactor_self(void);
unsigned reactor_index(const struct reactor *r);

/* Monotonic time. reactor_now is the one read at the start of this turn (cheap, up to ms old). */
uint64_t now_ns(void);
uint64_t reactor_now(void);
/* Time of day, ns since 1970. May jump either way. Any thread. */
uint64_t wall_ns(void);

/*
 * A start for pseudo-random numbers (pauses, samples), another one at each call; no secret. In the
 * simulation it comes from the seed, as both clocks do: who reads them elsewhere can't be repeated
 * there. Any thread.
 */
uint64_t random_start(void);

/*
 * A message: `fn(arg)` runs on the target reactor's own stack, soon. The struct is the caller's and
 * free again when fn runs. Any thread.
 */
struct reactor_msg {
	struct reactor_msg *next;
	void (*fn)(void *arg);
	void *arg;
};

void reactor_post(struct reactor *r, struct reactor_msg *msg, void (*fn)(void *arg), void *arg);

/*
 * Runs `fn(arg)` in a fiber of reactor `r` and waits for it. From a fiber of any reactor, including
 * `r` itself. Returns what fn returned, or -ENOMEM.
 */
CO_FN int reactor_call(struct reactor *r, int (*fn)(void *arg), void *arg);

/* The same from a thread that is not a reactor: blocks it. For start-up and the end of main(). */
int reactor_call_blocking(struct reactor *r, int (*fn)(void *arg), void *arg);

/* Work for the end of this turn. Queued once until it runs; zero-initialise with list_init(&d->node). */
struct reactor_defer {
	struct list node;
	void (*fn)(struct reactor_defer *d);
};

void reactor_defer(struct reactor_defer *d);

/* One-shot timers; `fn` runs on the reactor's stack. Initialise with timer_init. */
struct timer {
	uint64_t deadline_ns; /* CLOCK_MONOTONIC */
	unsigned slot;	      /* position in the heap + 1; 0 = not running */
	void (*fn)(struct timer *t);
};

void timer_init(struct timer *t, void (*fn)(struct timer *t));
/* (Re)starts. -ENOMEM when the heap can't grow. */
int timer_start(struct timer *t, uint64_t deadline_ns);
void timer_stop(struct timer *t);

/*
 * Spinning: what is likely to have input within microseconds is polled without a system call that
 * sleeps. `try` is called in the loop, on the reactor's stack; it returns true when it made progress;
 * the entry may be gone then.
 * The loop drops the entry and calls `expire` when the spin ran out: that is where the fd is armed
 * for a real wait. Adaptive: entries whose last spins were in vain expire at once for a while.
 */
struct spinner {
	struct list node;
	uint64_t deadline_ns;
	uint64_t armed_ns;     /* when it last went to sleep */
	uint32_t misses;       /* spins in vain in a row */
	uint32_t skip;	       /* waits that will not be spun, after misses */
	bool (*try)(struct spinner *s);
	void (*expire)(struct spinner *s);
};

void spinner_init(struct spinner *s, bool (*try)(struct spinner *), void (*expire)(struct spinner *));
void spinner_start(struct spinner *s);
void spinner_stop(struct spinner *s);
/* What was armed at `expire` has come: a short wait after all means that spinning pays again. */
void spinner_woken(struct spinner *s);

#endif
