/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The reactors' loop. One turn:
 *
 *	messages and timers -> ready fibers -> deferred work (replies leave) -> engine
 *
 * and when all of that had nothing to do: spin for those who expect input within microseconds, then
 * sleep in the engine. A cross-core wake-up costs 10-30 us, more than all the rest of a request.
 *
 * Other threads hand over messages through `inbox`, a lock-free stack. Who pushes looks at `is_sleeping`
 * after the push, the loop looks at `inbox` after it set `is_sleeping`; both with sequentially
 * consistent order, so one of them sees the other and no message is slept over.
 */
#include "nbdrs/reactor.h"

#include <assert.h>
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <time.h>

#include "core/reactor_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/log.h"

#define NS_PER_S     UINT64_C(1000000000)
#define SIM_EPOCH_NS (UINT64_C(1800000000) * NS_PER_S) /* the simulation's wall clock at 0 */

static struct reactor *all[REACTOR_MAX];
static unsigned all_n;
static __thread struct reactor *self;
const struct engine *sim_engine;

struct reactor *reactor_self(void)
{
	return self;
}

unsigned reactor_index(const struct reactor *r)
{
	return r->index;
}

unsigned reactors_n(void)
{
	return all_n;
}

struct reactor *reactor_get(unsigned i)
{
	return all[i];
}

const char *reactors_engine(void)
{
	return all[0]->engine->name;
}

uint64_t now_ns(void)
{
	struct timespec ts;

	if (unlikely(sim_engine != NULL))
		return sim_engine->now();
	(void)clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * NS_PER_S + (uint64_t)ts.tv_nsec;
}

uint64_t reactor_now(void)
{
	return self->now;
}

uint64_t wall_ns(void)
{
	struct timespec ts;

	if (unlikely(sim_engine != NULL))
		return SIM_EPOCH_NS + sim_engine->now();
	(void)clock_gettime(CLOCK_REALTIME, &ts);
	return (uint64_t)ts.tv_sec * NS_PER_S + (uint64_t)ts.tv_nsec;
}

uint64_t random_start(void)
{
	uint64_t random;

	if (unlikely(sim_engine != NULL))
		return sim_engine->random();
	/* Short only before the kernel has enough entropy, at boot. */
	if (getrandom(&random, sizeof(random), GRND_NONBLOCK) != sizeof(random))
		random = now_ns() ^ (uint64_t)(uintptr_t)&random;
	return random;
}

/* ---- messages ---- */

void reactor_post(struct reactor *r, struct reactor_msg *msg, void (*fn)(void *arg), void *arg)
{
	struct reactor_msg *head = atomic_load_explicit(&r->inbox, memory_order_relaxed);

	msg->fn = fn;
	msg->arg = arg;
	do
		msg->next = head;
	while (!atomic_compare_exchange_weak(&r->inbox, &head, msg));
	if (r != self && atomic_exchange(&r->is_sleeping, false)) {
		uint64_t one = 1;

		/* Fails only when the counter is full, and then the reactor is awake. */
		(void)!write(r->wake_fd, &one, sizeof(one));
	}
}

bool reactor_run_messages(struct reactor *r)
{
	struct reactor_msg *msg, *in_order = NULL;

	if (atomic_load_explicit(&r->inbox, memory_order_relaxed) == NULL)
		return false;
	msg = atomic_exchange(&r->inbox, NULL);
	while (msg != NULL) {
		struct reactor_msg *next = msg->next;

		msg->next = in_order;
		in_order = msg;
		msg = next;
	}
	while (in_order != NULL) {
		struct reactor_msg *next = in_order->next;

		in_order->fn(in_order->arg); /* may reuse the struct */
		in_order = next;
	}
	return true;
}

static void woken(struct io_watch *w, int events)
{
	struct reactor *r = container_of(w, struct reactor, wake_watch);
	uint64_t count;

	(void)events;
	(void)!read(r->wake_fd, &count, sizeof(count)); /* only empties it */
	if (!r->is_stopping)
		(void)io_watch_arm(w, r->wake_fd, POLLIN, woken); /* as it worked before */
}

/* ---- deferred work ---- */

void reactor_defer(struct reactor_defer *d)
{
	if (list_empty(&d->node))
		list_add(&self->defers, &d->node);
}

bool reactor_run_defers(struct reactor *r)
{
	struct list batch, *n;

	if (list_empty(&r->defers))
		return false;
	list_take(&batch, &r->defers); /* what is deferred from now on waits for the next turn */
	while ((n = list_pop(&batch)) != NULL) {
		struct reactor_defer *d = list_entry(n, struct reactor_defer, node);

		d->fn(d);
	}
	return true;
}

/* ---- spinning ---- */

enum {
	MISSES_MAX = 6,	  /* at most 2^6 - 1 waits without a spin */
	SPINNERS_MAX = 8, /* more than these and each try costs more than it saves */
	WOKEN_FACTOR = 4, /* a sleep of up to so many spins counts as short: its end includes a wake-up */
};

void spinner_init(struct spinner *s, bool (*try)(struct spinner *), void (*expire)(struct spinner *))
{
	*s = (struct spinner){ .try = try, .expire = expire };
	list_init(&s->node);
}

static void expire(struct spinner *s, uint64_t now)
{
	s->armed_ns = now;
	s->expire(s);
}

void spinner_start(struct spinner *s)
{
	struct reactor *r = self;

	if (!list_empty(&s->node)) {
		s->deadline_ns = now_ns() + r->spin_ns;
		return;
	}
	if (r->spin_ns == 0 || s->skip > 0 || r->spinners_n >= SPINNERS_MAX) {
		if (s->skip > 0)
			s->skip--;
		expire(s, r->now);
		return;
	}
	s->deadline_ns = now_ns() + r->spin_ns;
	list_add(&r->spinners, &s->node);
	r->spinners_n++;
}

void spinner_woken(struct spinner *s)
{
	if (now_ns() - s->armed_ns > WOKEN_FACTOR * self->spin_ns)
		return;
	if (s->misses > 0)
		s->misses--;
	s->skip = 0;
}

void spinner_stop(struct spinner *s)
{
	if (list_empty(&s->node))
		return;
	list_del(&s->node);
	self->spinners_n--;
}

/* True when somebody got something. */
static bool spin_once(struct reactor *r)
{
	uint64_t now = now_ns();
	bool progress = false;

	r->now = r->spun_at = now;
	for (unsigned n = r->spinners_n; n > 0 && !progress && !list_empty(&r->spinners); n--) {
		struct spinner *s = list_entry(r->spinners.next, struct spinner, node);
		uint32_t misses = s->misses;

		/* To the end: one that always has something must not keep the others waiting. */
		list_del(&s->node);
		list_add(&r->spinners, &s->node);
		s->misses = 0; /* before: with progress *s may be gone, as at the end of a connection */
		if (s->try(s)) {
			progress = true;
			continue;
		}
		s->misses = misses;
		if (now >= s->deadline_ns) {
			if (s->misses < MISSES_MAX)
				s->misses++;
			s->skip = (1U << s->misses) - 1;
			spinner_stop(s);
			expire(s, now);
		}
	}
	return progress;
}

/* ---- the loop ---- */

static bool turn(struct reactor *r)
{
	bool any;

	any = reactor_run_messages(r);
	timers_run(&r->timers, r->now);
	any |= co_run_ready(r);
	any |= reactor_run_defers(r);
	return any;
}

static void sleep_until_event(struct reactor *r)
{
	uint64_t timeout = timers_next(&r->timers, now_ns());

	atomic_store(&r->is_sleeping, true);
	if (atomic_load(&r->inbox) != NULL)
		timeout = 0;
	(void)r->engine->poll(r->engine_state, timeout);
	atomic_store(&r->is_sleeping, false);
}

static void was_active(struct reactor *r)
{
	r->active_at = r->now;
	if (!r->luck.is_tried)
		return;
	r->luck.is_tried = false;
	r->luck.misses = 0;
}

/* Nothing to do right now: the next thing often comes within microseconds of the last. */
static void spin_or_sleep(struct reactor *r)
{
	struct spin_luck *luck = &r->luck;

	if (r->spin_ns > 0 && luck->skip == 0 && r->now - r->active_at < r->spin_ns) {
		luck->is_tried = true;
		(void)sched_yield();
		if (r->engine->peek(r->engine_state))
			was_active(r);
		return;
	}
	if (luck->is_tried) {
		luck->is_tried = false;
		luck->misses = MIN(luck->misses + 1, (unsigned)MISSES_MAX);
		luck->skip = (1U << luck->misses) - 1;
	} else if (luck->skip > 0) {
		luck->skip--;
	}
	luck->armed_ns = r->now;
	sleep_until_event(r);
	r->now = now_ns();
	if (r->now - luck->armed_ns < WOKEN_FACTOR * r->spin_ns) {
		luck->misses -= luck->misses > 0;
		luck->skip = 0;
	}
	was_active(r);
}

static void loop(struct reactor *r)
{
	while (!r->is_stopping) {
		r->now = now_ns();
		if (turn(r)) {
			was_active(r);
			(void)r->engine->peek(r->engine_state);
			/* Of spinners the engine knows nothing: work that never ends must not shut them out. */
			if (!list_empty(&r->spinners) && r->now - r->spun_at >= r->spin_ns)
				(void)spin_once(r);
		} else if (!list_empty(&r->spinners)) {
			/* First the yield: on a shared core it is what lets the client send. */
			(void)sched_yield();
			(void)r->engine->peek(r->engine_state);
			if (spin_once(r))
				was_active(r);
		} else if (list_empty(&r->co.runq)) {
			spin_or_sleep(r);
		}
	}
}

struct start {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	unsigned ready, failed;
	int rc;
};

struct thread_arg {
	struct reactor *r;
	struct start *start;
};

static int reactor_open(struct reactor *r)
{
	int rc = r->engine->open(&r->engine_state);

	if (rc != 0)
		return rc;
	rc = io_watch_arm(&r->wake_watch, r->wake_fd, POLLIN, woken);
	if (rc != 0)
		r->engine->close(r->engine_state);
	return rc;
}

static void *thread_main(void *arg)
{
	struct thread_arg *ta = arg;
	struct reactor *r = ta->r;
	struct start *start = ta->start;
	char name[16];
	int rc;

	free(ta);
	self = r;
	(void)snprintf(name, sizeof(name), "nbdrs-%u", r->index);
	(void)pthread_setname_np(pthread_self(), name);
	co_pool_init(&r->co);
	rc = reactor_open(r);

	pthread_mutex_lock(&start->lock);
	if (rc == 0) {
		start->ready++;
	} else {
		start->failed++;
		start->rc = rc;
	}
	pthread_cond_broadcast(&start->changed);
	pthread_mutex_unlock(&start->lock);
	if (rc != 0)
		return NULL;

	loop(r);
	assert(r->co.live_n == 0);
	r->engine->close(r->engine_state);
	buf_pool_free(&r->buf);
	timers_free(&r->timers);
	return NULL;
}

static void reactor_free(struct reactor *r)
{
	if (r == NULL)
		return;
	if (r->wake_fd >= 0)
		(void)close(r->wake_fd);
	free(r);
}

static struct reactor *reactor_new(unsigned index, const struct engine *engine, unsigned spin_us)
{
	struct reactor *r = aligned_alloc(64, align_up(sizeof(*r), 64));

	if (r == NULL)
		return NULL;
	memset(r, 0, sizeof(*r));
	r->index = index;
	r->engine = engine;
	r->spin_ns = (uint64_t)spin_us * 1000;
	list_init(&r->defers);
	list_init(&r->spinners);
	r->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	if (r->wake_fd < 0) {
		reactor_free(r);
		return NULL;
	}
	return r;
}

/* All signals are for the main thread: reactors start with them blocked. */
static int start_thread(struct reactor *r, struct start *start)
{
	struct thread_arg *ta = malloc(sizeof(*ta));
	sigset_t all_signals, old;
	int rc;

	if (ta == NULL)
		return -ENOMEM;
	*ta = (struct thread_arg){ r, start };
	(void)sigfillset(&all_signals);
	(void)pthread_sigmask(SIG_SETMASK, &all_signals, &old);
	rc = pthread_create(&r->thread, NULL, thread_main, ta);
	(void)pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (rc != 0)
		free(ta);
	return -rc;
}

static unsigned default_threads(void)
{
	cpu_set_t set;
	int n = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;

	return (unsigned)MAX(1, MIN(n, 4));
}

static int choose_engine(enum io_engine_kind kind, const struct engine **out, struct err *err)
{
	int rc = kind == IO_ENGINE_EPOLL ? 0 : uring_probe();

	if (rc != 0 && kind == IO_ENGINE_URING)
		return err_set(err, rc,
			       "io_uring cannot be used here (%s; it needs Linux 5.19, and see "
			       "/proc/sys/kernel/io_uring_disabled and the container's seccomp profile); "
			       "take --io-engine=epoll",
			       err_name(rc));
	if (rc != 0)
		log_info("io_uring is not available, using epoll reason=%s", err_name(rc));
	*out = kind == IO_ENGINE_EPOLL || rc != 0 ? &epoll_engine : &uring_engine;
	return 0;
}

int reactors_start(const struct reactor_conf *conf, struct err *err)
{
	struct start start = { .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER };
	unsigned n = conf->threads ? conf->threads : default_threads();
	const struct engine *engine = NULL;
	int rc;

	assert(all_n == 0);
	if (n > REACTOR_MAX)
		return err_set(err, -EINVAL, "%u threads are too many, at most %d", n, REACTOR_MAX);
	rc = choose_engine(conf->engine, &engine, err);
	if (rc != 0)
		return rc;
	for (unsigned i = 0; i < n && rc == 0; i++) {
		struct reactor *r = reactor_new(i, engine, conf->spin_us);

		rc = r ? start_thread(r, &start) : -ENOMEM;
		if (rc != 0)
			reactor_free(r);
		else
			all[all_n++] = r;
	}
	pthread_mutex_lock(&start.lock);
	while (start.ready + start.failed < all_n)
		pthread_cond_wait(&start.changed, &start.lock);
	if (start.failed > 0)
		rc = start.rc;
	pthread_mutex_unlock(&start.lock);
	if (rc == 0)
		return 0;
	/* A thread that failed has ended already; for it only the join is left. */
	reactors_stop();
	return err_set(err, rc, "cannot start %u threads with %s: %s", n, engine->name, err_name(rc));
}

int reactor_begin_here(const struct engine *engine)
{
	struct reactor *r;
	int rc;

	assert(all_n == 0 && self == NULL);
	r = reactor_new(0, engine, 0);
	if (r == NULL)
		return -ENOMEM;
	rc = engine->open(&r->engine_state);
	if (rc != 0) {
		reactor_free(r);
		return rc;
	}
	co_pool_init(&r->co);
	sim_engine = engine;
	self = all[all_n++] = r;
	return 0;
}

static void stop_here(void *arg)
{
	struct reactor *r = arg;

	r->is_stopping = true;
}

void reactors_stop(void)
{
	struct reactor_msg msg[REACTOR_MAX];

	assert(self == NULL);
	for (unsigned i = 0; i < all_n; i++)
		reactor_post(all[i], &msg[i], stop_here, all[i]);
	for (unsigned i = 0; i < all_n; i++)
		pthread_join(all[i]->thread, NULL);
	offload_stop();
	/* Only now nobody is inside co_wake() for a fiber that needed no wake to go on and ended. */
	for (unsigned i = 0; i < all_n; i++) {
		co_pool_free(&all[i]->co);
		reactor_free(all[i]);
		all[i] = NULL;
	}
	all_n = 0;
}
