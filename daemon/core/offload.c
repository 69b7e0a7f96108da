/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * A pool of threads for calls that block. One for all reactors; threads start as work piles up, up to
 * OFFLOAD_THREADS, and end after a while without work.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "core/reactor_int.h"
#include "nbdrs/io.h"

enum { OFFLOAD_THREADS = 32, IDLE_SECONDS = 10, THREAD_STACK = 256 * 1024 };

struct job {
	struct list node;
	void (*run)(struct job *job); /* ends by waking whoever waits; *job is gone then */
};

static struct {
	pthread_mutex_t lock;
	pthread_cond_t work, ended;
	struct list jobs;
	unsigned jobs_n, threads_n, idle_n;
	bool is_stopping;
} pool = {
	.lock = PTHREAD_MUTEX_INITIALIZER,
	.work = PTHREAD_COND_INITIALIZER,
	.ended = PTHREAD_COND_INITIALIZER,
	.jobs = LIST_INIT(pool.jobs),
};

/* The next job, or NULL when this thread should end. Called with the lock held. */
static struct job *next_job(void)
{
	while (list_empty(&pool.jobs)) {
		struct timespec until;
		int rc;

		if (pool.is_stopping)
			return NULL;
		(void)clock_gettime(CLOCK_REALTIME, &until);
		until.tv_sec += IDLE_SECONDS;
		pool.idle_n++;
		rc = pthread_cond_timedwait(&pool.work, &pool.lock, &until);
		pool.idle_n--;
		if (rc == ETIMEDOUT && list_empty(&pool.jobs))
			return NULL;
	}
	pool.jobs_n--;
	return list_entry(list_pop(&pool.jobs), struct job, node);
}

static void *worker(void *unused)
{
	struct job *job;

	(void)unused;
	(void)pthread_setname_np(pthread_self(), "nbdrs-offload");
	pthread_mutex_lock(&pool.lock);
	while ((job = next_job()) != NULL) {
		pthread_mutex_unlock(&pool.lock);
		job->run(job);
		pthread_mutex_lock(&pool.lock);
	}
	pool.threads_n--;
	pthread_cond_broadcast(&pool.ended);
	pthread_mutex_unlock(&pool.lock);
	return NULL;
}

/* Called with the lock held. */
static void add_thread(void)
{
	pthread_attr_t attr;
	sigset_t all, old;
	pthread_t t;

	(void)pthread_attr_init(&attr);
	(void)pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	(void)pthread_attr_setstacksize(&attr, THREAD_STACK);
	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &old);
	if (pthread_create(&t, &attr, worker, NULL) == 0)
		pool.threads_n++;
	(void)pthread_sigmask(SIG_SETMASK, &old, NULL);
	(void)pthread_attr_destroy(&attr);
}

/* False when there is no thread at all to run it. */
static bool submit(struct job *job)
{
	bool ok;

	pthread_mutex_lock(&pool.lock);
	if (pool.idle_n <= pool.jobs_n && pool.threads_n < OFFLOAD_THREADS)
		add_thread();
	ok = pool.threads_n > 0;
	if (ok) {
		list_add(&pool.jobs, &job->node);
		pool.jobs_n++;
		pthread_cond_signal(&pool.work);
	}
	pthread_mutex_unlock(&pool.lock);
	return ok;
}

void offload_stop(void)
{
	pthread_mutex_lock(&pool.lock);
	pool.is_stopping = true;
	pthread_cond_broadcast(&pool.work);
	while (pool.threads_n > 0)
		pthread_cond_wait(&pool.ended, &pool.lock);
	pool.is_stopping = false;
	pthread_mutex_unlock(&pool.lock);
}

struct fn_job {
	struct job job;
	int (*fn)(void *arg);
	void *arg;
	struct co *co;
	int res;
	_Atomic bool is_done;
};

static void fn_job_run(struct job *job)
{
	struct fn_job *j = container_of(job, struct fn_job, job);
	struct co *co = j->co;

	j->res = j->fn(j->arg);
	atomic_store(&j->is_done, true); /* from here on *j may be gone */
	co_wake(co);
}

int offload(int (*fn)(void *arg), void *arg)
{
	struct fn_job j = { .job.run = fn_job_run, .fn = fn, .arg = arg, .co = co_self() };

	if (unlikely(sim_engine != NULL))
		return sim_engine->offload(reactor_self()->engine_state, fn, arg);
	if (!submit(&j.job))
		return fn(arg); /* no thread to be had: blocking is better than failing */
	while (!atomic_load(&j.is_done))
		co_park();
	return j.res;
}

/* ---- file calls for the epoll engine ---- */


static ssize_t file_call(const struct file_op *op)
{
	switch (op->kind) {
	case FILE_READ:
		return preadv(op->fd, op->iov, (int)op->iov_n, (off_t)op->off);
	case FILE_WRITE:
		return pwritev2(op->fd, op->iov, (int)op->iov_n, (off_t)op->off, op->flags);
	case FILE_FDATASYNC:
		return fdatasync(op->fd);
	case FILE_FALLOCATE:
		return fallocate(op->fd, op->flags, (off_t)op->off, (off_t)op->len);
	}
	return -1;
}

static int file_fn(void *arg)
{
	const struct file_op *op = arg;
	ssize_t n;

	do
		n = file_call(op);
	while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : (int)n;
}

int offload_file(const struct file_op *op)
{
	return offload(file_fn, (void *)(uintptr_t)op);
}
