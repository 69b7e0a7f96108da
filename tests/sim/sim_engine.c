/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * One life of the simulated machine: the clock, the order in which fibers run, and the end.
 *
 * The loop does what a reactor's does, with one fiber at a time, picked from those that are ready by the
 * seed. When none is, the clock jumps to the next timer; file calls and offloaded ones wait by timers
 * too, so there is nothing else that could come.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/reactor_int.h"
#include "sim_int.h"

enum {
	MILLION = 1000000,
	TURN_NS = 2000,   /* at most what a fiber's turn takes */
	LATE_NS = 100000, /* at most by how much a timer is late */
	OFFLOAD_NS = 50000,
	SLOW_ONE_IN = 100, /* calls */
	SLOW_FACTOR = 300, /* at most that much longer */
};
/* Nothing that is tested takes longer: it hangs. */
#define CLOCK_MAX (UINT64_C(400) * 86400 * 1000000000)

struct world *world;

static const struct life *life;

/* ---- random numbers; splitmix64 (Steele, Lea, Flood 2014) ---- */

static uint64_t mixed(uint64_t z)
{
	z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
	return z ^ z >> 31;
}

uint64_t sim_mix(uint64_t a, uint64_t b)
{
	return mixed(mixed(a + UINT64_C(0x9e3779b97f4a7c15)) + b);
}

uint64_t sim_random(void)
{
	return mixed(world->random += UINT64_C(0x9e3779b97f4a7c15));
}

uint64_t sim_below(uint64_t n)
{
	return sim_random() % n;
}

bool sim_chance(uint32_t ppm)
{
	return ppm >= MILLION || (ppm > 0 && sim_below(MILLION) < ppm);
}

unsigned sim_life(void)
{
	return world->life;
}

uint64_t sim_seed(void)
{
	return world->seed;
}

/* ---- what happened ---- */

void sim_note(uint64_t value)
{
	world->hash = mixed(world->hash ^ value);
}

__attribute__((format(printf, 1, 0))) static void trace(const char *fmt, va_list ap)
{
	char line[400];
	int at, n;

	at = snprintf(line, sizeof(line), "%u %6" PRIu64 " %12.6f  ", world->life, world->events,
		      (double)world->clock / 1e9);
	n = vsnprintf(line + at, sizeof(line) - (size_t)at - 1, fmt, ap);
	at = MIN(at + n, (int)sizeof(line) - 2);
	line[at++] = '\n';
	(void)!write(STDERR_FILENO, line, (size_t)at); /* only a trace */
}

void sim_trace(const char *fmt, ...)
{
	va_list ap;

	if (!world->is_traced)
		return;
	va_start(ap, fmt);
	trace(fmt, ap);
	va_end(ap);
}

void sim_event(const char *fmt, ...)
{
	va_list ap;

	world->events++;
	va_start(ap, fmt);
	(void)vsnprintf(world->event, sizeof(world->event), fmt, ap);
	va_end(ap);
	for (const char *c = world->event; *c != '\0'; c++)
		world->hash = (world->hash ^ (uint8_t)*c) * UINT64_C(0x100000001b3);
	sim_note(world->clock);
	sim_trace("%s", world->event);
	if (world->events >= life->crash_at)
		sim_crash(life->crash);
}

int sim_failed(const char *file, int line, const char *fmt, ...)
{
	const char *base = strrchr(file, '/');
	size_t at;
	va_list ap;

	if (world->failure[0] != '\0')
		return -1;
	at = (size_t)snprintf(world->failure, sizeof(world->failure),
			      "%s:%d: ", base != NULL ? base + 1 : file, line);
	va_start(ap, fmt);
	(void)vsnprintf(world->failure + at, sizeof(world->failure) - at, fmt, ap);
	va_end(ap);
	sim_trace("FAILED %s", world->failure);
	return -1;
}

/* The process is gone, with all its fibers, as it is. */
_Noreturn static void end(enum life_end how)
{
	_exit(how);
}

void sim_crash(enum sim_crash how)
{
	if (how == SIM_ANY_CRASH)
		how = sim_chance(MILLION / 3) ? SIM_KILL : SIM_POWER_CUT;
	sim_trace("%s", how == SIM_KILL ? "KILLED" : "POWER CUT");
	if (how == SIM_POWER_CUT)
		disk_power_cut();
	end(LIFE_CRASHED);
}

/* ---- the engine ---- */

void sim_wait(uint64_t typical_ns)
{
	uint64_t ns = typical_ns / 2 + sim_below(typical_ns);

	if (sim_below(SLOW_ONE_IN) == 0)
		ns *= 1 + sim_below(SLOW_FACTOR);
	co_sleep(ns);
}

static CO_FN int sim_offload(void *state, int (*fn)(void *arg), void *arg)
{
	int rc;

	(void)state;
	sim_event("offloaded call");
	sim_wait(OFFLOAD_NS);
	rc = fn(arg);
	sim_event("offloaded call ends with %d", rc);
	sim_wait(OFFLOAD_NS);
	return rc;
}

static uint64_t sim_now(void)
{
	return world->clock;
}

static int sim_open(void **state)
{
	*state = NULL;
	return 0;
}

static void sim_close(void *state)
{
	(void)state;
}

/* Sockets are real, and nothing real is repeatable. */
static int sim_arm(void *state, struct io_watch *w)
{
	(void)state;
	(void)w;
	return -EOPNOTSUPP;
}

static bool sim_cancel(void *state, struct io_watch *w)
{
	(void)state;
	(void)w;
	return true;
}

static bool sim_poll(void *state, uint64_t timeout_ns)
{
	(void)state;
	(void)timeout_ns;
	return false;
}

static bool sim_peek(void *state)
{
	(void)state;
	return false;
}

static const struct engine engine = {
	.name = "simulated",
	.open = sim_open,
	.close = sim_close,
	.file = sim_file,
	.arm = sim_arm,
	.cancel = sim_cancel,
	.poll = sim_poll,
	.peek = sim_peek,
	.names = sim_names,
	.offload = sim_offload,
	.read_nowait = sim_read_nowait,
	.now = sim_now,
	.random = sim_random,
};

/* ---- the loop ---- */

/* Runs one of the fibers that are ready. */
static bool run_one(struct reactor *r)
{
	unsigned n = 0, pick;
	struct list *at;
	struct co *co;

	for (at = r->co.runq.next; at != &r->co.runq; at = at->next)
		n++;
	if (n == 0)
		return false;
	pick = (unsigned)sim_below(n);
	sim_note(pick);
	at = r->co.runq.next;
	for (unsigned k = 0; k < pick; k++)
		at = at->next;
	co = list_entry(at, struct co, node);
	list_del(&co->node);
	atomic_store(&co->is_queued, false);
	co_enter(co);
	world->clock += sim_below(TURN_NS);
	return true;
}

static bool turn(struct reactor *r)
{
	bool any;

	r->now = world->clock;
	any = reactor_run_messages(r);
	timers_run(&r->timers, world->clock);
	any |= run_one(r);
	any |= reactor_run_defers(r);
	return any;
}

/* False when there is nothing to wait for. */
static bool jump(struct reactor *r)
{
	uint64_t ns = timers_next(&r->timers, world->clock);

	if (ns == IO_FOREVER)
		return false;
	world->clock += ns + (sim_chance(MILLION / 4) ? sim_below(LATE_NS) : 0);
	return true;
}

struct body {
	int rc;
	bool is_over;
};

static CO_FN void run_body(void *arg)
{
	struct body *b = arg;

	b->rc = life->fn(world->model);
	b->is_over = true;
}

void life_run(const struct life *l)
{
	struct body b = { 0 };
	struct reactor *r;
	bool goes_on = true;

	life = l;
	if (reactor_begin_here(&engine) != 0) {
		(void)sim_failed(__FILE__, __LINE__, "no reactor");
		end(LIFE_FAILED);
	}
	disk_boot();
	r = reactor_self();
	if (co_spawn(run_body, &b) != 0)
		(void)sim_failed(__FILE__, __LINE__, "no fiber");
	while (goes_on && r->co.live_n > 0 && world->failure[0] == '\0') {
		goes_on = turn(r) || jump(r);
		if (world->clock > CLOCK_MAX)
			(void)sim_failed(__FILE__, __LINE__, "no end: the clock ran away");
	}
	if (!b.is_over)
		(void)sim_failed(__FILE__, __LINE__,
				 "it waits for something that will never happen");
	else if (b.rc != 0)
		(void)sim_failed(__FILE__, __LINE__, "it ended with %d", b.rc);
	else if (r->co.live_n > 0)
		(void)sim_failed(__FILE__, __LINE__, "%u fibers are left over, waiting for nothing",
				 r->co.live_n);
	if (world->failure[0] != '\0')
		end(LIFE_FAILED);
	if (life->crash != SIM_NO_CRASH)
		sim_crash(life->crash);
	end(LIFE_OK);
}
