/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Fibers: creation, entering, parking, waking. See co.h for the states.
 *
 * The fiber's struct outlives the fiber: it goes to a free list and is reused, never freed while the
 * reactor lives. A wake from another thread may therefore come late and hit a reused fiber; that is a
 * spurious wake, which every waiter allows for by testing its condition in a loop.
 */
#include "nbdrs/co.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "core/reactor_int.h"

#if defined(__SANITIZE_ADDRESS__)
#define CO_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CO_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define CO_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define CO_TSAN 1
#endif
#endif

#ifdef CO_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef CO_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__has_include)
#if __has_include(<valgrind/valgrind.h>)
#include <valgrind/valgrind.h>
#endif
#endif

enum {
	GUARD_LEN = 4096,
	FREE_STACKS_MAX = 512, /* more go back to the kernel */
	SAN_LIVES_MAX = 1000,
};

/* Sanitizers need far deeper frames. */
#if defined(CO_ASAN) || defined(CO_TSAN)
enum { STACK_LEN = 4 * CO_STACK_SIZE };
#else
enum { STACK_LEN = CO_STACK_SIZE };
#endif

/* ---- what the tools must be told about a switch ---- */

static void tell_before_switch(struct co_pool *p, struct co *to, void **save_fake, bool is_last)
{
#ifdef CO_ASAN
	const void *bottom = to ? to->stack : p->main_stack;
	size_t len = to ? STACK_LEN : p->main_stack_len;

	__sanitizer_start_switch_fiber(is_last ? NULL : save_fake, bottom, len);
#else
	(void)save_fake;
	(void)is_last;
#endif
#ifdef CO_TSAN
	__tsan_switch_to_fiber(to ? to->san_fiber : p->san_main_fiber, 0);
#endif
	(void)p;
	(void)to;
}

static void tell_after_switch(struct co_pool *p, void *fake, bool from_main)
{
#ifdef CO_ASAN
	if (from_main)
		__sanitizer_finish_switch_fiber(fake, &p->main_stack, &p->main_stack_len);
	else
		__sanitizer_finish_switch_fiber(fake, NULL, NULL);
#else
	(void)fake;
	(void)from_main;
	(void)p;
#endif
}

/* ---- stacks ---- */

static int stack_map(struct co *co)
{
	char *map = mmap(NULL, GUARD_LEN + STACK_LEN, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);

	if (map == MAP_FAILED)
		return -ENOMEM;
	if (mprotect(map, GUARD_LEN, PROT_NONE) != 0) {
		(void)munmap(map, GUARD_LEN + STACK_LEN);
		return -ENOMEM;
	}
	co->stack = map + GUARD_LEN;
#ifdef VALGRIND_STACK_REGISTER
	co->valgrind_id = (unsigned)VALGRIND_STACK_REGISTER(co->stack, (char *)co->stack + STACK_LEN);
#endif
	return 0;
}

static void stack_unmap(struct co *co)
{
#ifdef VALGRIND_STACK_DEREGISTER
	VALGRIND_STACK_DEREGISTER(co->valgrind_id);
#endif
#ifdef CO_ASAN
	__asan_unpoison_memory_region(co->stack, STACK_LEN);
#endif
#ifdef CO_TSAN
	if (co->san_fiber != NULL)
		__tsan_destroy_fiber(co->san_fiber);
	co->san_fiber = NULL;
#endif
	(void)munmap((char *)co->stack - GUARD_LEN, GUARD_LEN + STACK_LEN);
	co->stack = NULL;
}

void co_pool_init(struct co_pool *p)
{
	list_init(&p->runq);
	list_init(&p->free);
	list_init(&p->bare);
#ifdef CO_TSAN
	p->san_main_fiber = __tsan_get_current_fiber();
#endif
}

void co_pool_free(struct co_pool *p)
{
	struct list *n;

	while ((n = list_pop(&p->free)) != NULL) {
		struct co *co = list_entry(n, struct co, node);

		stack_unmap(co);
		free(co);
	}
	while ((n = list_pop(&p->bare)) != NULL)
		free(list_entry(n, struct co, node));
}

static struct co *co_get(struct reactor *r)
{
	struct list *n = list_pop(&r->co.free);
	struct co *co;

	if (likely(n != NULL)) {
		r->co.free_n--;
		return list_entry(n, struct co, node);
	}
	n = list_pop(&r->co.bare);
	if (n != NULL) {
		co = list_entry(n, struct co, node);
	} else {
		co = calloc(1, sizeof(*co));
		if (co == NULL)
			return NULL;
		co->reactor = r;
		list_init(&co->node);
	}
	if (stack_map(co) != 0) {
		list_push(&r->co.bare, &co->node);
		return NULL;
	}
	return co;
}

static void co_recycle(struct reactor *r, struct co *co)
{
	/*
	 * A late wake may have queued it: that entry must go. One that is still on its way as a message
	 * keeps is_queued, and finds is_finished or a fiber that can stand a spurious wake.
	 */
	if (!list_empty(&co->node)) {
		list_del(&co->node);
		atomic_store(&co->is_queued, false);
	}
	if (r->co.free_n >= FREE_STACKS_MAX) {
		stack_unmap(co);
		list_push(&r->co.bare, &co->node);
		return;
	}
	list_push(&r->co.free, &co->node);
	r->co.free_n++;
}

/* ---- switching ---- */

static void leave(struct co *co, bool is_last)
{
	struct co_pool *p = &co->reactor->co;
	struct co *to = co->caller;

	p->current = to;
	tell_before_switch(p, to, &co->san_fake_stack, is_last);
	co_ctx_switch(&co->ctx, to ? &to->ctx : &p->main_ctx);
	tell_after_switch(p, co->san_fake_stack, co->caller == NULL);
}

static void co_main(void)
{
	struct reactor *r = reactor_self();
	struct co *co = r->co.current;

	tell_after_switch(&r->co, NULL, co->caller == NULL);
	co->fn(co->arg);
	co->is_finished = true;
	leave(co, true);
	abort(); /* a finished fiber is never entered again */
}

void co_enter(struct co *co)
{
	struct reactor *r = co->reactor;
	struct co_pool *p = &r->co;
	struct co *me = p->current;
	void **save = me ? &me->san_fake_stack : &p->san_main_fake_stack;

	assert(co != me);
	co->caller = me;
	p->current = co;
	tell_before_switch(p, co, save, false);
	co_ctx_switch(me ? &me->ctx : &p->main_ctx, &co->ctx);
	tell_after_switch(p, *save, false);
	if (co->is_finished) {
		p->live_n--;
		co_recycle(r, co);
	}
}

int co_spawn(void (*fn)(void *arg), void *arg)
{
	struct reactor *r = reactor_self();
	struct co *co;

	assert(r != NULL);
	co = co_get(r);
	if (co == NULL)
		return -ENOMEM;
	co->fn = fn;
	co->arg = arg;
	co->is_finished = false;
#ifdef CO_TSAN
	/*
	 * co_main never returns, and what each life leaves on the tool's own call stack adds up until that
	 * overflows; a new fiber for each life takes a millisecond.
	 */
	if (co->san_fiber != NULL && ++co->san_lives == SAN_LIVES_MAX) {
		__tsan_destroy_fiber(co->san_fiber);
		co->san_fiber = NULL;
	}
	if (co->san_fiber == NULL) {
		co->san_fiber = __tsan_create_fiber(0);
		co->san_lives = 0;
	}
#endif
	co_ctx_init(&co->ctx, co->stack, STACK_LEN, co_main);
	r->co.live_n++;
	co_enter(co);
	return 0;
}

struct co *co_self(void)
{
	struct reactor *r = reactor_self();

	return r ? r->co.current : NULL;
}

void co_park(void)
{
	struct co *co = co_self();

	assert(co != NULL);
	leave(co, false);
}

static void wake_here(void *arg)
{
	struct co *co = arg;

	/* Finished meanwhile: the wake was for an earlier life and has nobody to wake. */
	if (co->is_finished) {
		atomic_store(&co->is_queued, false);
		return;
	}
	list_add(&co->reactor->co.runq, &co->node);
}

void co_wake(struct co *co)
{
	if (atomic_exchange(&co->is_queued, true))
		return;
	if (co->reactor == reactor_self())
		wake_here(co);
	else
		reactor_post(co->reactor, &co->msg, wake_here, co);
}

bool co_run_ready(struct reactor *r)
{
	struct list batch;
	struct list *n;

	if (list_empty(&r->co.runq))
		return false;
	/* Take over the whole queue: what is woken from now on waits for the next turn. */
	list_take(&batch, &r->co.runq);
	while ((n = list_pop(&batch)) != NULL) {
		struct co *co = list_entry(n, struct co, node);

		atomic_store(&co->is_queued, false);
		co_enter(co);
	}
	return true;
}

void co_yield(void)
{
	co_wake(co_self());
	co_park();
}

struct sleep {
	struct timer timer;
	struct co *co;
	bool is_over;
};

static void sleep_over(struct timer *t)
{
	struct sleep *s = container_of(t, struct sleep, timer);

	s->is_over = true;
	co_wake(s->co);
}

void co_sleep(uint64_t ns)
{
	struct sleep s = { .co = co_self(), .is_over = false };

	timer_init(&s.timer, sleep_over);
	if (timer_start(&s.timer, now_ns() + ns) != 0) {
		co_yield(); /* no memory for a timer: better early than never */
		return;
	}
	while (!s.is_over)
		co_park();
}
