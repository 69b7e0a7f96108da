/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * curl's multi handles on the reactor: its sockets are watched, its timer is ours, its results are handed on.
 *
 * curl is entered from three places only, always on the reactor's own stack (curl and TLS are not made for a fiber's)
 * and never from within curl: a watch fired, the timer fired, or the end of a turn in which transfers were added. Its
 * callbacks only note, arm and start.
 *
 * A struct sock stands for a socket that curl wants watched:
 *
 *	want > 0     its watches are armed, and armed anew after each event
 *	want = 0     idle: nobody has a transfer on it. A watch that is armed still stays armed: the next request
 *		     will want it, and what it says meanwhile is not listened to
 *	is_dead      gone from the table; freed when the engine has let go of its watches (io_uring ends them
 *		     asynchronously), whose late events are not listened to
 *
 * When is it dead? A connection that was in use is closed through close_socket(): it is shut down at once, so that
 * the peer knows, but its number stays taken until both watches are over. Sockets that never carried an answer
 * (is_known is false: still connecting, or of curl's resolver) curl closes by itself and without a word, so those are
 * dead as soon as curl does not want them watched, and their number is not touched: it may be another's by then.
 * The kernel's poll holds on to the file and not to the number, so a late event cannot be for another connection.
 */
#include <assert.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "client/http_int.h"
#include "nbdrs/io.h"

struct multi {
	struct here *here;
	CURLM *curl;
	unsigned transfers;
	bool is_inside; /* curl is running: for an assertion */
	struct timer timer;
	struct reactor_defer kick; /* lets curl look at what is new, once per turn */
};

struct sock {
	struct here *here;
	struct multi *multi; /* whose connection it is */
	int fd;
	int want; /* CURL_POLL_IN | CURL_POLL_OUT */
	bool is_known, is_dead;
	bool is_held;      /* in use by fired() */
	bool is_to_close;  /* the number is ours to close */
	uint64_t heard_ns; /* when something last came in */
	struct io_watch in, out;
};

/* ---- sockets ---- */

static void in_fired(struct io_watch *w, int events);
static void out_fired(struct io_watch *w, int events);

static struct sock *sock_find(const struct here *h, int fd)
{
	return (unsigned)fd < h->socks_n ? h->socks[fd] : NULL;
}

static struct sock *sock_new(struct here *h, int fd)
{
	struct sock *s;

	if ((unsigned)fd >= h->socks_n) {
		unsigned n = h->socks_n > 0 ? h->socks_n : 64;
		struct sock **v;

		while (n <= (unsigned)fd)
			n *= 2;
		v = realloc(h->socks, n * sizeof(struct sock *));
		if (v == NULL)
			return NULL;
		memset(v + h->socks_n, 0, (n - h->socks_n) * sizeof(struct sock *));
		h->socks = v;
		h->socks_n = n;
	}
	s = calloc(1, sizeof(*s));
	if (s == NULL)
		return NULL;
	s->here = h;
	s->fd = fd;
	h->socks[fd] = s;
	h->socks_alive++;
	return s;
}

/* Frees it when nobody holds it any more. */
static void sock_release(struct sock *s)
{
	struct here *h = s->here;

	if (!s->is_dead || s->is_held || s->in.is_armed || s->out.is_armed)
		return;
	if (s->is_to_close)
		(void)close(s->fd); /* nothing to be done about an error */
	free(s);
	if (--h->socks_alive == 0 && h->closer != NULL)
		co_wake(h->closer);
}

static void sock_kill(struct sock *s)
{
	s->is_dead = true;
	s->want = 0;
	s->here->socks[s->fd] = NULL;
	/* False: the engine holds it still, and in_fired or out_fired will come here. */
	(void)io_watch_cancel(&s->in);
	(void)io_watch_cancel(&s->out);
	sock_release(s);
}

/* If the engine refuses, the request's own deadline ends the wait. */
static void sock_arm(struct sock *s)
{
	if ((s->want & CURL_POLL_IN) && !s->in.is_armed)
		(void)io_watch_arm(&s->in, s->fd, POLLIN, in_fired);
	if ((s->want & CURL_POLL_OUT) && !s->out.is_armed)
		(void)io_watch_arm(&s->out, s->fd, POLLOUT, out_fired);
}

/* ---- into curl ---- */

/* Hands on what is finished. */
static void reap(struct multi *m)
{
	const CURLMsg *msg;
	int left;

	while ((msg = curl_multi_info_read(m->curl, &left)) != NULL) {
		struct handle *h = NULL;
		struct transfer *t;

		if (msg->msg != CURLMSG_DONE)
			continue;
		(void)curl_easy_getinfo(msg->easy_handle, CURLINFO_PRIVATE, (char **)&h);
		t = h->transfer;
		t->code = msg->data.result; /* *msg is gone with the handle */
		loop_drop(t);
		transfer_done(t);
	}
}

/* What went wrong with one transfer is its result; an error of the whole leaves the deadlines to end them. */
static void enter(struct multi *m, curl_socket_t fd, int events)
{
	int running;

	assert(!m->is_inside);
	m->is_inside = true;
	(void)curl_multi_socket_action(m->curl, fd, events, &running);
	m->is_inside = false;
	reap(m);
}

/*
 * Acknowledges at once what has come of an answer that is not complete. RadosGW, for one, sends head and body apart and
 * leaves Nagle's algorithm on: the body waits for this, and the kernel would keep it back for 40 ms. The option is
 * not a lasting one.
 */
static void ack_now(const struct sock *s)
{
	int on = 1;

	(void)setsockopt(s->fd, IPPROTO_TCP, TCP_QUICKACK, &on,
			 sizeof(on)); /* it is about speed only */
}

/* Errors of the socket are not passed on as such: curl gets them, with their number, from the call it tries. */
static void fired(struct sock *s, int what)
{
	if (s->is_dead) {
		sock_release(s);
		return;
	}
	if (what == CURL_POLL_IN)
		s->heard_ns = reactor_now();
	if (!(s->want & what))
		return;
	s->is_held = true;
	s->here->current = s;
	enter(s->multi, s->fd, what == CURL_POLL_IN ? CURL_CSELECT_IN : CURL_CSELECT_OUT);
	s->here->current = NULL;
	s->is_held = false;
	if (what == CURL_POLL_IN && !s->is_dead && (s->want & CURL_POLL_IN))
		ack_now(s);
	if (s->is_dead)
		sock_release(s);
	else
		sock_arm(s);
}

static void in_fired(struct io_watch *w, int events)
{
	(void)events;
	fired(container_of(w, struct sock, in), CURL_POLL_IN);
}

static void out_fired(struct io_watch *w, int events)
{
	(void)events;
	fired(container_of(w, struct sock, out), CURL_POLL_OUT);
}

static void timer_fired(struct timer *timer)
{
	enter(container_of(timer, struct multi, timer), CURL_SOCKET_TIMEOUT, 0);
}

static void kicked(struct reactor_defer *d)
{
	enter(container_of(d, struct multi, kick), CURL_SOCKET_TIMEOUT, 0);
}

/* ---- out of curl: these must not call it ---- */

void loop_heard(struct here *h)
{
	if (h->current != NULL)
		h->current->is_known = true;
}

static int want_timer(CURLM *curl, long ms, void *arg)
{
	struct multi *m = arg;

	(void)curl;
	timer_stop(&m->timer);
	if (ms < 0)
		return 0;
	/* "Now" is the end of this turn: whatever else is added until then goes along. */
	if (ms == 0 || timer_start(&m->timer, now_ns() + (uint64_t)ms * 1000000) != 0)
		reactor_defer(&m->kick);
	return 0;
}

static int want_socket(CURL *easy, curl_socket_t fd, int what, void *arg, void *sock)
{
	struct multi *m = arg;
	struct sock *s = sock_find(m->here, fd);

	(void)easy;
	(void)sock;
	if (what == CURL_POLL_REMOVE) {
		if (s != NULL && s->is_known)
			s->want = 0;
		else if (s != NULL)
			sock_kill(s);
		return 0;
	}
	if (s == NULL)
		s = sock_new(m->here, fd);
	if (s == NULL)
		return 0; /* as in sock_arm */
	s->multi = m;
	s->want = what & (CURL_POLL_IN | CURL_POLL_OUT);
	sock_arm(s);
	return 0;
}

static curl_socket_t open_socket(void *arg, curlsocktype purpose, struct curl_sockaddr *addr)
{
	int fd =
		socket(addr->family, addr->socktype | SOCK_NONBLOCK | SOCK_CLOEXEC, addr->protocol);
	struct sock *stale = fd >= 0 ? sock_find(arg, fd) : NULL;

	(void)purpose;
	if (stale != NULL) /* closed, or the number would not be free */
		sock_kill(stale);
	return fd >= 0 ? fd : CURL_SOCKET_BAD;
}

static int close_socket(void *arg, curl_socket_t fd)
{
	struct sock *s = sock_find(arg, fd);

	if (s == NULL) {
		(void)close(fd);
		return 0;
	}
	s->is_to_close = true;
	(void)shutdown(fd, SHUT_RDWR); /* it may not be connected any more */
	sock_kill(s);
	return 0;
}

CURLcode loop_set_options(struct handle *h)
{
	CURLcode rc = curl_easy_setopt(h->easy, CURLOPT_OPENSOCKETFUNCTION, open_socket);

	if (rc == CURLE_OK)
		rc = curl_easy_setopt(h->easy, CURLOPT_OPENSOCKETDATA, h->here);
	if (rc == CURLE_OK)
		rc = curl_easy_setopt(h->easy, CURLOPT_CLOSESOCKETFUNCTION, close_socket);
	if (rc == CURLE_OK)
		rc = curl_easy_setopt(h->easy, CURLOPT_CLOSESOCKETDATA, h->here);
	return rc;
}

/* ---- multi handles ---- */

static void multi_free(struct multi *m)
{
	if (m == NULL)
		return;
	if (m->curl != NULL)
		(void)curl_multi_cleanup(m->curl); /* fails only for a bad handle */
	timer_stop(&m->timer);
	list_del(&m->kick.node);
	free(m);
}

static struct multi *multi_new(struct here *h)
{
	struct multi *m = calloc(1, sizeof(*m));
	CURLMcode rc = CURLM_OK;

	if (m == NULL)
		return NULL;
	m->here = h;
	timer_init(&m->timer, timer_fired);
	m->kick.fn = kicked;
	list_init(&m->kick.node);
	m->curl = curl_multi_init();
	if (m->curl == NULL) {
		multi_free(m);
		return NULL;
	}
	rc |= curl_multi_setopt(m->curl, CURLMOPT_SOCKETFUNCTION, want_socket);
	rc |= curl_multi_setopt(m->curl, CURLMOPT_SOCKETDATA, m);
	rc |= curl_multi_setopt(m->curl, CURLMOPT_TIMERFUNCTION, want_timer);
	rc |= curl_multi_setopt(m->curl, CURLMOPT_TIMERDATA, m);
	rc |= curl_multi_setopt(m->curl, CURLMOPT_PIPELINING, (long)CURLPIPE_MULTIPLEX);
	/* Else four times the transfers of the moment, and a lull would close what the next burst needs. */
	rc |= curl_multi_setopt(m->curl, CURLMOPT_MAXCONNECTS, (long)MULTI_TRANSFERS_MAX);
	if (rc == CURLM_OK)
		return m;
	multi_free(m);
	return NULL;
}

/* The first with room: so that few transfers find warm connections, in few multi handles. */
static struct multi *multi_with_room(struct here *h)
{
	for (unsigned i = 0; i < MULTIS_MAX; i++) {
		if (h->multis[i] == NULL)
			return h->multis[i] = multi_new(h);
		if (h->multis[i]->transfers < MULTI_TRANSFERS_MAX)
			return h->multis[i];
	}
	assert(false); /* conns is at most HTTP_CONNS_MAX */
	return NULL;
}

int loop_add(struct here *h, struct transfer *t)
{
	struct multi *m = multi_with_room(h);

	if (m == NULL || curl_multi_add_handle(m->curl, t->handle->easy) != CURLM_OK)
		return -ENOMEM;
	m->transfers++;
	t->multi = m;
	return 0;
}

void loop_drop(struct transfer *t)
{
	struct multi *m = t->multi;

	assert(!m->is_inside);
	(void)curl_multi_remove_handle(m->curl, t->handle->easy); /* it is ours and in there */
	m->transfers--;
	t->multi = NULL;
}

void loop_suspect(struct transfer *t)
{
	curl_socket_t fd = CURL_SOCKET_BAD;
	struct sock *s = NULL;

	/*
	 * HTTP/1 closes it anyway. With HTTP/2 only the stream would end, and every new request would go to the same
	 * dead connection as long as there is one.
	 */
	if (curl_easy_getinfo(t->handle->easy, CURLINFO_ACTIVESOCKET, &fd) == CURLE_OK &&
	    fd != CURL_SOCKET_BAD)
		s = sock_find(t->multi->here, fd);
	if (s != NULL && s->heard_ns < t->start_ns)
		(void)shutdown(fd, SHUT_RDWR);
}

void loop_close(struct here *h)
{
	for (unsigned i = 0; i < MULTIS_MAX; i++) {
		assert(h->multis[i] == NULL || h->multis[i]->transfers == 0);
		multi_free(h->multis[i]);
		h->multis[i] = NULL;
	}
	for (unsigned fd = 0; fd < h->socks_n; fd++)
		if (h->socks[fd] != NULL)
			sock_kill(h->socks[fd]);
}
