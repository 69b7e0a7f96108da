/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The service manager's watchdog: "WATCHDOG=1" at half its period, each time after every reactor has run a fiber. So a
 * loop that hangs, or one that never gets to its queue, ends the daemon, and systemd starts it anew. A store that hangs
 * does not: reactors turn while requests wait.
 */
#include "cmd/cmd.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "nbdrs/io.h"
#include "nbdrs/opt.h"

static struct {
	pthread_mutex_t lock; /* guards what follows it */
	bool is_running, is_stopping;
	struct co_wq changed;
	uint64_t period_ns;
} dog = { .lock = PTHREAD_MUTEX_INITIALIZER, .changed = { LIST_INIT(dog.changed.waiters) } };

/* How often it wants to hear from us, ns; 0 = never. As sd_watchdog_enabled(3). */
static uint64_t wanted_ns(void)
{
	const char *usec = getenv("WATCHDOG_USEC"), *pid = getenv("WATCHDOG_PID");
	uint64_t us, n;

	if (!usec || parse_u64(usec, &us) || us == 0 || us > UINT64_MAX / 1000)
		return 0;
	if (pid && (parse_u64(pid, &n) || n != (uint64_t)getpid()))
		return 0;
	return us * 1000;
}

static int turn(void *arg)
{
	(void)arg;
	return 0;
}

/* Not from a reactor: the manager may be waiting for a disk of ours, with its socket full. */
static int tell(void *arg)
{
	notify_manager(arg);
	return 0;
}

static CO_FN void watchdog_main(void *arg)
{
	bool is_stopping = false;

	(void)arg;
	while (!is_stopping) {
		int rc = 0;

		for (unsigned i = 0; i < reactors_n() && !rc; i++)
			rc = reactor_call(reactor_get(i), turn, NULL);
		if (!rc)
			(void)offload(tell, (void *)(uintptr_t) "WATCHDOG=1"); /* always 0 */
		pthread_mutex_lock(&dog.lock);
		if (!dog.is_stopping)
			(void)co_wq_wait_for(&dog.changed, &dog.lock, dog.period_ns);
		is_stopping = dog.is_stopping;
		pthread_mutex_unlock(&dog.lock);
	}
	pthread_mutex_lock(&dog.lock);
	dog.is_running = false;
	co_wq_wake_all(&dog.changed);
	pthread_mutex_unlock(&dog.lock);
}

int watchdog_start(struct err *err)
{
	const uint64_t ns = wanted_ns();

	if (!ns)
		return 0;
	dog.period_ns = ns / 2;
	dog.is_stopping = false;
	dog.is_running = true;
	if (co_spawn(watchdog_main, NULL) == 0)
		return 0;
	dog.is_running = false;
	return err_set(err, -ENOMEM, "watchdog: out of memory");
}

void watchdog_stop(void)
{
	pthread_mutex_lock(&dog.lock);
	dog.is_stopping = true;
	co_wq_wake_all(&dog.changed);
	while (dog.is_running)
		co_wq_wait(&dog.changed, &dog.lock);
	pthread_mutex_unlock(&dog.lock);
}
