/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Signals of the daemon, see signals.h.
 */
#include "cmd/signals.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "cmd/cmd.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/conn.h"

int signals_open(struct signals *s)
{
	const struct sigaction ignore = { .sa_handler = SIG_IGN };
	sigset_t set;

	(void)sigemptyset(&set); /* these can't fail */
	(void)sigaddset(&set, SIGTERM);
	(void)sigaddset(&set, SIGINT);
	(void)sigaddset(&set, SIGHUP);
	(void)sigaction(SIGPIPE, &ignore, NULL);
	(void)pthread_sigmask(SIG_BLOCK, &set, NULL);
	s->fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	return s->fd < 0 ? -errno : 0;
}

static const char *signal_name(unsigned number)
{
	return number == SIGINT ? "SIGINT" : number == SIGTERM ? "SIGTERM" : "SIGHUP";
}

void signals_take(struct signals *s)
{
	struct signalfd_siginfo si;

	if (read(s->fd, &si, sizeof(si)) != sizeof(si))
		return;
	if (si.ssi_signo == SIGHUP) {
		log_info("SIGHUP ignored: the command line can't be read anew");
		return;
	}
	if (s->stop) {
		log_warn("second signal: leaving at once signal=%s, %u connections are cut off",
			 signal_name(si.ssi_signo), conns_n());
		_exit(CMD_CUT);
	}
	s->stop = (int)si.ssi_signo;
	log_info("stopping signal=%s pid=%u; a second signal ends at once", signal_name(si.ssi_signo),
		 si.ssi_pid);
}

/* A call on its way to reactor 0, by a thread of its own so that signals are still heard. */
struct errand {
	CO_FN int (*fn)(void *arg);
	void *arg;
	int rc, done_fd;
};

static void *errand_thread(void *arg)
{
	struct errand *e = arg;

	e->rc = reactor_call_blocking(reactor_get(0), e->fn, e->arg);
	(void)eventfd_write(e->done_fd, 1); /* can't overflow */
	return NULL;
}

int signals_call(struct signals *s, CO_FN int (*fn)(void *arg), void *arg)
{
	_cleanup_close_ int done_fd = eventfd(0, EFD_CLOEXEC);
	struct errand e = { .fn = fn, .arg = arg, .done_fd = done_fd };
	struct pollfd fds[2] = { { .fd = done_fd, .events = POLLIN },
				 { .fd = s->fd, .events = POLLIN } };
	pthread_t thread;

	if (done_fd < 0 || pthread_create(&thread, NULL, errand_thread, &e))
		return reactor_call_blocking(reactor_get(0), fn, arg); /* deaf for signals, but done */
	while (!(fds[0].revents & POLLIN)) {
		if (poll(fds, ARRAY_LEN(fds), -1) < 0)
			continue; /* EINTR */
		if (fds[1].revents & POLLIN)
			signals_take(s);
	}
	(void)pthread_join(thread, NULL);
	return e.rc;
}
