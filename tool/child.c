/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Work in a child that is given up on after a while: see child.h. */
#include "child.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"

enum { POLL_MS = 200, KEEP_MAX = 64 };

/* The child's answer, in memory that both share. */
struct answer {
	volatile bool has_returned;
	int rc;
	_Alignas(16) char result[CHILD_RESULT_MAX];
};

uint64_t now_ms(void)
{
	struct timespec ts;

	(void)clock_gettime(CLOCK_MONOTONIC, &ts); /* cannot fail for this clock */
	return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000;
}

void sleep_ms(unsigned ms)
{
	const struct timespec ts = { .tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000 };

	(void)nanosleep(&ts, NULL); /* a signal ends it: callers look at interrupted() */
}

static volatile sig_atomic_t got_signal;

static void on_signal(int sig)
{
	got_signal = sig;
}

void interrupts_catch(void)
{
	const struct sigaction sa = { .sa_handler = on_signal };

	(void)sigaction(SIGINT, &sa, NULL); /* cannot fail for these numbers */
	(void)sigaction(SIGTERM, &sa, NULL);
	(void)sigaction(SIGHUP, &sa, NULL);
}

bool interrupted(void)
{
	return got_signal != 0;
}

static void close_all_but(const int *keep, unsigned keep_n)
{
	unsigned from = 0;

	for (;;) {
		unsigned next = ~0u;

		for (unsigned i = 0; i < keep_n; i++)
			if (keep[i] >= 0 && (unsigned)keep[i] >= from && (unsigned)keep[i] < next)
				next = (unsigned)keep[i];
		if (next != from)
			(void)syscall(SYS_close_range, from, next == ~0u ? ~0u : next - 1, 0);
		if (next == ~0u)
			return;
		from = next + 1;
	}
}

static _Noreturn void run_child(const struct child_job *job, struct answer *answer, pid_t parent)
{
	/* The parent decides about interrupts; a half-done request helps nobody. */
	(void)signal(SIGINT, SIG_IGN);
	(void)signal(SIGTERM, SIG_IGN);
	(void)signal(SIGHUP, SIG_IGN);
	(void)signal(SIGPIPE, SIG_IGN);
	(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(1);
	close_all_but(job->keep, job->keep_n);
	answer->rc = job->fn(job->arg, answer->result);
	answer->has_returned = true;
	_exit(0);
}

/* Waits for the end of the child: 0, -ETIMEDOUT or -EINTR. */
static int wait_child(const struct child_job *job, int pidfd)
{
	uint64_t last = job->progress ? job->progress(job->arg) : 0;
	uint64_t until = now_ms() + job->limit_ms;

	for (;;) {
		struct pollfd pfd = { .fd = pidfd, .events = POLLIN };
		uint64_t now = now_ms();
		int left = now >= until ? 0 : (int)MIN(until - now, (uint64_t)POLL_MS);

		if (poll(&pfd, 1, left) > 0)
			return 0;
		if (job->ends_on_interrupt && interrupted())
			return -EINTR;
		if (job->progress) {
			uint64_t count = job->progress(job->arg);

			if (count != last) {
				last = count;
				until = now_ms() + job->limit_ms;
			}
		}
		if (now_ms() >= until)
			return -ETIMEDOUT;
	}
}

int child_run(const struct child_job *job)
{
	_cleanup_close_ int pidfd = -1;
	struct answer *answer;
	const pid_t parent = getpid();
	pid_t pid;
	int rc;

	assert(job->result_len <= CHILD_RESULT_MAX && job->keep_n <= KEEP_MAX);
	answer = mmap(NULL, sizeof(*answer), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
		      0);
	if (answer == MAP_FAILED)
		return -errno;
	pid = fork();
	if (pid == 0)
		run_child(job, answer, parent);
	if (pid < 0) {
		rc = -errno;
		goto out;
	}
	pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
	if (pidfd < 0) {
		rc = -errno;
		(void)kill(pid, SIGKILL);
		(void)waitpid(pid, NULL, 0);
		goto out;
	}
	rc = wait_child(job, pidfd);
	if (rc) {
		/* Not waited for: it may be unkillable at this moment. init reaps it after we are gone. */
		(void)kill(pid, SIGKILL);
	} else {
		(void)waitpid(pid, NULL, 0);
		rc = answer->has_returned ? answer->rc : -ECHILD;
	}
	if (job->result)
		memcpy(job->result, answer->result, job->result_len);
out:
	(void)munmap(answer, sizeof(*answer));
	return rc;
}
