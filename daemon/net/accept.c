/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Takes clients from the listening sockets, on reactor 0. No fiber waits for them: a one-shot watch per
 * socket calls back, everything that is pending is accepted, each client gets a fiber for its negotiation.
 *
 *   watching --readable--> accepting --EAGAIN--> watching
 *                              |  out of descriptors or memory
 *                              v
 *                           paused --timer--> watching       (clients wait in the backlog meanwhile)
 *
 * At the end watches are cancelled, negotiations get ERR_SHUTDOWN and a moment to read it, then are cut.
 */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/conn.h"
#include "nbdrs/log.h"
#include "net/handshake.h"
#include "net/listen.h"
#include "net/listen_int.h"

enum {
	ACCEPT_AT_ONCE = 64, /* clients taken before everything else gets a turn */
	UNIX_SNDBUF = 1 << 20,
};

#define PAUSE_NS          UINT64_C(100000000) /* after an accept that failed for want of something */
#define SHUTDOWN_GRACE_NS UINT64_C(300000000) /* for negotiations to end with ERR_SHUTDOWN */

/* A client in negotiation; lives in its fiber's frame. */
struct client {
	struct list node;
	int fd;
};

/* What client_fiber takes over, from the frame of whoever spawned it. */
struct arrival {
	int fd;
	char peer[ADDRESS_TEXT_MAX];
};

/* All of reactor 0. */
static struct listen_conf conf;
static struct list clients = LIST_INIT(clients);
static unsigned clients_n;
static bool is_stopping;
static struct log_gate limit_gate, error_gate;

/* For stop: "no clients", "no watch held by the engine". */
static pthread_mutex_t idle_lock = PTHREAD_MUTEX_INITIALIZER;
static struct co_wq idle_wq = { LIST_INIT(idle_wq.waiters) };

static void on_readable(struct io_watch *w, int events);

static void wake_stop(void)
{
	pthread_mutex_lock(&idle_lock);
	co_wq_wake_all(&idle_wq);
	pthread_mutex_unlock(&idle_lock);
}

/* A fiber's function. `arg` is gone after the first wait. */
CO_FN static void client_fiber(void *arg)
{
	const struct arrival *a = arg;
	struct client c = { .fd = a->fd };
	char peer[ADDRESS_TEXT_MAX];
	struct session s;
	int rc;

	memcpy(peer, a->peer, sizeof(peer));
	list_add(&clients, &c.node);
	clients_n++;

	rc = handshake(c.fd, peer, now_ns() + conf.handshake_ns, &s);

	/* In one go with conn_start, so that the limit counts it all the time and a cut meets an open fd. */
	list_del(&c.node);
	clients_n--;
	if (rc < 0) {
		(void)close(c.fd); /* why was logged */
	} else {
		rc = conn_start(c.fd, &s, peer);
		if (rc < 0)
			log_warn("client lost peer=%s error=%s", peer, err_name(rc));
	}
	if (is_stopping && clients_n == 0)
		wake_stop();
}

/*
 * Room for replies, so that a large one need not wait for the client's reads. A unix socket inherits
 * nothing from its listener, and TCP tunes itself.
 */
static void set_unix_sndbuf(int fd)
{
	static bool is_refused; /* the force needs CAP_NET_ADMIN; asked once */
	const int len = UNIX_SNDBUF;

	if (!is_refused && setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &len, sizeof(len)) == 0)
		return;
	is_refused = true;
	(void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &len,
			 sizeof(len)); /* cut to wmem_max; the default works too */
}

/* Takes fd. */
static void welcome(const struct listener *l, int fd, const struct sockaddr_storage *addr)
{
	struct arrival a = { .fd = fd };
	unsigned suppressed;

	address_format(addr, a.peer, sizeof(a.peer));
	if (conf.max_conns && conns_n() + clients_n >= conf.max_conns) {
		if (log_gate_open(&limit_gate, &suppressed))
			log_warn(
				"client refused: connection limit reached peer=%s limit=%u suppressed=%u",
				a.peer, conf.max_conns, suppressed);
		(void)close(fd); /* nothing was sent or received */
		return;
	}
	if (l->is_unix)
		set_unix_sndbuf(fd);
	if (co_spawn(client_fiber, &a) < 0) {
		if (log_gate_open(&error_gate, &suppressed))
			log_warn("client refused: out of memory peer=%s suppressed=%u", a.peer,
				 suppressed);
		(void)close(fd); /* as above */
	}
}

/* Errors of the one client that was to be accepted, not of the socket: accept(2), "Error handling". */
static bool is_of_client(int error)
{
	switch (error) {
	case EINTR:
	case ECONNABORTED:
	case EPERM: /* firewall rules */
	case EPROTO:
	case ENOPROTOOPT:
	case ENETDOWN:
	case ENETUNREACH:
	case EHOSTDOWN:
	case EHOSTUNREACH:
	case ENONET: return true;
	default: return false;
	}
}

static void pause_accepting(struct listener *l, int error)
{
	unsigned suppressed;

	if (log_gate_open(&error_gate, &suppressed))
		log_warn("accept failed, trying again soon error=%s suppressed=%u%s",
			 err_name(error), suppressed,
			 error == EMFILE ? " hint=\"raise LimitNOFILE or ulimit -n\"" : "");
	/* The heap of timers has room: this one ran before, or nothing could run at all. */
	if (timer_start(&l->pause, now_ns() + PAUSE_NS) < 0)
		log_error("accepting has ended error=ENOMEM");
}

static int watch(struct listener *l)
{
	int rc = io_watch_arm(&l->watch, l->fd, POLLIN, on_readable);

	l->is_watching = rc == 0;
	return rc;
}

static void on_pause_end(struct timer *t)
{
	struct listener *l = container_of(t, struct listener, pause);
	int rc = watch(l);

	if (rc < 0)
		pause_accepting(l, -rc);
}

static void on_readable(struct io_watch *w, int events)
{
	struct listener *l = container_of(w, struct listener, watch);
	int rc;

	l->is_watching = false;
	if (is_stopping) {
		wake_stop();
		return;
	}
	for (int i = 0; i < ACCEPT_AT_ONCE; i++) {
		struct sockaddr_storage addr = { .ss_family = AF_UNIX };
		socklen_t addr_len = sizeof(addr);
		int fd = accept4(l->fd, (struct sockaddr *)&addr, &addr_len,
				 SOCK_NONBLOCK | SOCK_CLOEXEC);

		if (fd >= 0) {
			welcome(l, fd, &addr);
		} else if (errno == EAGAIN) {
			break;
		} else if (!is_of_client(errno)) {
			pause_accepting(l, errno);
			return;
		}
	}
	rc = watch(l);
	if (rc < 0)
		pause_accepting(l, -rc);
}

/* On reactor 0. */
CO_FN static int start_here(void *arg)
{
	int rc = 0;

	conf = *(const struct listen_conf *)arg;
	is_stopping = false;
	list_for_each(l, &listeners, struct listener, node)
	{
		timer_init(&l->pause, on_pause_end);
		rc = watch(l);
		if (rc < 0)
			break;
	}
	return rc;
}

CO_FN int listeners_start(const struct listen_conf *c, struct err *err)
{
	struct listen_conf copy = *c;
	int rc = reactor_call(reactor_get(0), start_here, &copy);

	return rc < 0 ? err_set(err, rc, "cannot watch a listening socket: %s", err_name(rc)) : 0;
}

/* Cancels what waits for clients, and waits until the engine holds none of it. */
CO_FN static void stop_watching(void)
{
	list_for_each(l, &listeners, struct listener, node)
	{
		timer_stop(&l->pause);
		if (l->is_watching && io_watch_cancel(&l->watch))
			l->is_watching = false;
	}
	pthread_mutex_lock(&idle_lock);
	list_for_each(l, &listeners, struct listener, node)
	{
		while (l->is_watching)
			co_wq_wait(&idle_wq, &idle_lock);
	}
	pthread_mutex_unlock(&idle_lock);
}

/* Waits until no client is in negotiation; `grace_ns` first, then cutting them off. */
CO_FN static void stop_clients(uint64_t grace_ns)
{
	pthread_mutex_lock(&idle_lock);
	if (clients_n && grace_ns)
		(void)co_wq_wait_for(&idle_wq, &idle_lock, grace_ns); /* late or not, see below */
	list_for_each(c, &clients, struct client, node)(void)
		shutdown(c->fd, SHUT_RDWR); /* its fiber wakes up and sees the end of the stream */
	while (clients_n)
		co_wq_wait(&idle_wq, &idle_lock);
	pthread_mutex_unlock(&idle_lock);
}

CO_FN static int stop_here(void *arg)
{
	is_stopping = true;
	handshake_shutdown();
	stop_watching();
	list_for_each(l, &listeners, struct listener, node) listener_free(l);
	stop_clients(SHUTDOWN_GRACE_NS);
	return 0;
}

CO_FN static int hold_here(void *arg)
{
	(void)arg;
	is_stopping = true;
	stop_watching();
	stop_clients(0);
	return 0;
}

CO_FN void listeners_hold(void)
{
	/* Without memory for a fiber it goes on accepting: what is accepted then is lost, and connects again. */
	(void)reactor_call(reactor_get(0), hold_here, NULL);
}

CO_FN void listeners_stop(void)
{
	/* Without memory for a fiber it ends with the process; the next start finds stale files. */
	(void)reactor_call(reactor_get(0), stop_here, NULL);
}
