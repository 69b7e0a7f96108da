/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Reactors (timers, messages, deferred work, spinning), both engines' files and sockets, the offload pool,
 * buffers.
 */
#include "core_test.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <netinet/in.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "nbdrs/buf.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"

const char *core_failure;

/* ---- timers ---- */

enum { TIMERS = 200 };

struct timers {
	struct timer t[TIMERS];
	uint64_t last;
	unsigned fired;
	struct co *co;
};

static struct timers timers;

static void timer_fired(struct timer *t)
{
	EXPECT(t->deadline_ns >= timers.last); /* in the order of their deadlines */
	EXPECT(now_ns() >= t->deadline_ns);
	timers.last = t->deadline_ns;
	timers.fired++;
	co_wake(timers.co);
}

CO_FN static int timers_body(void *arg)
{
	uint64_t base = now_ns() + 2000000;
	unsigned seed = 1;

	(void)arg;
	timers.co = co_self();
	for (unsigned i = 0; i < TIMERS; i++) {
		timer_init(&timers.t[i], timer_fired);
		EXPECT(timer_start(&timers.t[i], base + (uint64_t)rand_r(&seed) % 3000000) == 0);
	}
	for (unsigned i = 0; i < TIMERS; i += 2)
		timer_stop(&timers.t[i]);
	timer_stop(&timers.t[0]); /* not running: harmless */
	while (timers.fired < TIMERS / 2)
		co_park();
	co_sleep(1000000);
	EXPECT(timers.fired == TIMERS / 2);
	return 0;
}

static void test_timers(void **state)
{
	(void)state;
	core_run(timers_body, NULL);
}

/* ---- messages ---- */

enum { POSTS = 20000, POSTERS = 3 };

static struct {
	struct reactor_msg msg[POSTERS][POSTS];
	unsigned expected[POSTERS]; /* on reactor 1 only */
	_Atomic unsigned seen;
} posts;

static void posted(void *arg)
{
	uintptr_t v = (uintptr_t)arg;
	unsigned who = (unsigned)(v % POSTERS), n = (unsigned)(v / POSTERS);

	EXPECT(posts.expected[who] == n); /* each sender's messages in its order */
	posts.expected[who] = n + 1;
	atomic_fetch_add(&posts.seen, 1);
}

static void *poster(void *arg)
{
	uintptr_t who = (uintptr_t)arg;

	for (uintptr_t i = 0; i < POSTS; i++)
		reactor_post(reactor_get(1), &posts.msg[who][i], posted, (void *)(i * POSTERS + who));
	return NULL;
}

CO_FN static int nothing(void *arg)
{
	(void)arg;
	return 0;
}

static void test_messages(void **state)
{
	pthread_t t[POSTERS];

	(void)state;
	core_failure = NULL;
	for (uintptr_t i = 0; i < POSTERS; i++)
		assert_int_equal(pthread_create(&t[i], NULL, poster, (void *)i), 0);
	for (unsigned i = 0; i < POSTERS; i++)
		pthread_join(t[i], NULL);
	/* A call posted last is done last. */
	assert_int_equal(reactor_call_blocking(reactor_get(1), nothing, NULL), 0);
	assert_int_equal(posts.seen, POSTERS * POSTS);
	assert_null(core_failure);
}

/* ---- files ---- */

static int temp_file(void)
{
	char path[] = "/tmp/nbdrs-test-XXXXXX";
	int fd = mkstemp(path);

	if (fd >= 0)
		(void)unlink(path);
	return fd;
}

CO_FN static int file_body(void *arg)
{
	_cleanup_close_ int fd = temp_file();
	static char out[100000], in[100000];
	struct iovec w[3] = { { out, 10 }, { out + 10, 50000 }, { out + 50010, sizeof(out) - 50010 } };
	struct iovec r[2] = { { in, 77 }, { in + 77, sizeof(in) - 77 } };

	(void)arg;
	for (size_t i = 0; i < sizeof(out); i++)
		out[i] = (char)(i * 31 + 7);
	EXPECT(fd >= 0);
	EXPECT(io_pwrite_full(fd, w, 3, 4096, 0) == 0);
	EXPECT(io_fdatasync(fd) == 0);
	EXPECT(io_pread_full(fd, r, 2, 4096) == 0);
	EXPECT(memcmp(in, out, sizeof(in)) == 0);
	/* Across the end, and beyond it. */
	EXPECT(io_pread_full(fd, r, 2, 4096 + 50000) == -EIO);
	EXPECT(io_pread_full(fd, r, 1, 1 << 20) == -EIO);
	EXPECT(io_preadv(fd, r, 1, 1 << 20) == 0);
	EXPECT(io_pwrite_full(fd, w, 1, 0, RWF_DSYNC) == 0);
	EXPECT(io_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, 8192) == 0);
	EXPECT(io_pread_full(fd, r, 1, 4096) == 0 && in[0] == 0 && in[76] == 0);
	return 0;
}

static void test_file(void **state)
{
	(void)state;
	core_run(file_body, NULL);
}

/* ---- names ---- */

static int note_name(void *arg, const char *name)
{
	unsigned *seen = arg;

	*seen |= strcmp(name, "a") == 0 ? 1 : strcmp(name, "b") == 0 ? 2 : strcmp(name, "sub") == 0 ? 4 : 8;
	return strcmp(name, "stop") == 0 ? -EINTR : 0;
}

CO_FN static int names_body(void *arg)
{
	char byte = 'x', back[2];
	struct iovec v = { &byte, 1 }, in = { back, 2 };
	int dir = io_openat(AT_FDCWD, arg, O_RDONLY | O_DIRECTORY, 0), fd, other;
	unsigned seen = 0;
	struct stat st;
	ssize_t n;

	EXPECT(dir >= 0 && fcntl(dir, F_GETFD) == FD_CLOEXEC);
	EXPECT(io_openat(dir, "a", O_RDWR, 0) == -ENOENT);
	fd = io_openat(dir, "a", O_RDWR | O_CREAT | O_EXCL, 0600);
	EXPECT(fd >= 0 && io_openat(dir, "a", O_RDWR | O_CREAT | O_EXCL, 0600) == -EEXIST);
	EXPECT(io_ftruncate(fd, 10000) == 0 && io_pwritev(fd, &v, 1, 9999, 0) == 1);
	EXPECT(io_fstat(fd, &st) == 0 && st.st_size == 10000);
	n = io_preadv_nowait(fd, &in, 1, 9999);
	EXPECT((n == 1 && back[0] == 'x') || n == -EAGAIN || n == -EOPNOTSUPP);
	EXPECT(io_fsync(fd) == 0 && io_fsync(dir) == 0);
	other = io_openat(dir, "a", O_RDWR, 0);
	EXPECT(io_flock(fd, LOCK_EX) == 0 && io_flock(other, LOCK_SH) == -EWOULDBLOCK);
	EXPECT(io_flock(fd, LOCK_UN) == 0 && io_flock(other, LOCK_SH) == 0);
	EXPECT(io_mkdirat(dir, "sub", 0700) == 0 && io_mkdirat(dir, "sub", 0700) == -EEXIST);
	EXPECT(io_renameat(dir, "a", "b") == 0 && io_renameat(dir, "a", "b") == -ENOENT);
	EXPECT(io_list(dir, note_name, &seen) == 0 && seen == 6);
	EXPECT(io_list(dir, note_name, &seen) == 0); /* from the beginning again */
	EXPECT(io_renameat(dir, "b", "stop") == 0 && io_list(dir, note_name, &seen) == -EINTR);
	EXPECT(io_unlinkat(dir, "stop", 0) == 0 && io_unlinkat(dir, "sub", AT_REMOVEDIR) == 0);
	EXPECT(io_close(other) == 0 && io_close(fd) == 0 && io_close(fd) == -EBADF && io_close(dir) == 0);
	return 0;
}

static void test_names(void **state)
{
	char folder[] = "/tmp/nbdrs-io-XXXXXX";

	(void)state;
	assert_non_null(mkdtemp(folder));
	core_run(names_body, folder);
	assert_int_equal(rmdir(folder), 0);
}

static void test_clocks(void **state)
{
	uint64_t wall = (uint64_t)time(NULL), ns = wall_ns();

	(void)state;
	assert_in_range(ns / 1000000000, wall, wall + 60);
	assert_true(random_start() != random_start());
}

CO_FN static int file_errors_body(void *arg)
{
	char byte = 0;
	struct iovec v = { &byte, 1 };
	_cleanup_close_ int ro = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	_cleanup_close_ int full = open("/dev/full", O_RDWR | O_CLOEXEC);

	(void)arg;
	EXPECT(io_pwrite_full(ro, &v, 1, 0, 0) == -EBADF);
	EXPECT(io_preadv(-1, &v, 1, 0) == -EBADF);
	EXPECT(io_fdatasync(-1) == -EBADF);
	EXPECT(io_pwrite_full(full, &v, 1, 0, 0) == -ENOSPC);
	return 0;
}

static void test_file_errors(void **state)
{
	(void)state;
	core_run(file_errors_body, NULL);
}

/* ---- sockets ---- */

enum { STREAM = 3 << 20 };

struct stream {
	int fd;
	unsigned char *data;
	int rc;
};

CO_FN static void sender(void *arg)
{
	struct stream *s = arg;

	s->rc = io_send_full(s->fd, s->data, STREAM, IO_FOREVER);
	(void)shutdown(s->fd, SHUT_WR);
}

CO_FN static int stream_body(void *arg)
{
	struct stream s = { .data = malloc(STREAM) };
	unsigned char *in = malloc(STREAM);
	struct co_group g = CO_GROUP_INIT;
	int fd[2];

	(void)arg;
	EXPECT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fd) == 0);
	for (unsigned i = 0; i < STREAM; i++)
		s.data[i] = (unsigned char)(i >> 3);
	s.fd = fd[0];
	co_group_spawn(&g, sender, &s);
	EXPECT(io_recv_full(fd[1], in, STREAM, now_ns() + UINT64_C(20000000000)) == 0);
	EXPECT(memcmp(in, s.data, STREAM) == 0);
	EXPECT(io_recv(fd[1], in, 1, IO_FOREVER) == 0);
	EXPECT(io_recv_full(fd[1], in, 1, IO_FOREVER) == -ECONNRESET);
	co_group_wait(&g);
	EXPECT(s.rc == 0);
	(void)close(fd[0]);
	EXPECT(io_send_full(fd[1], in, 1, IO_FOREVER) == -EPIPE);
	(void)close(fd[1]);
	free(s.data);
	free(in);
	return 0;
}

static void test_stream(void **state)
{
	(void)state;
	core_run(stream_body, NULL);
}

CO_FN static int poll_body(void *arg)
{
	uint64_t before = now_ns();
	int fd[2];

	(void)arg;
	EXPECT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fd) == 0);
	EXPECT(io_poll(fd[0], POLLIN, before + 3000000) == -ETIMEDOUT);
	EXPECT(now_ns() - before >= 3000000);
	EXPECT(io_poll(fd[0], POLLOUT, IO_FOREVER) & POLLOUT);
	EXPECT(write(fd[1], "x", 1) == 1);
	EXPECT(io_poll(fd[0], POLLIN, now_ns() + 1000000000) & POLLIN);
	/* The same fd again after a time-out and after an event. */
	EXPECT(io_poll(fd[0], POLLIN, IO_FOREVER) & POLLIN);
	(void)close(fd[1]);
	EXPECT(io_poll(fd[0], POLLOUT, IO_FOREVER) & POLLHUP);
	(void)close(fd[0]);
	return 0;
}

static void test_poll(void **state)
{
	(void)state;
	core_run(poll_body, NULL);
}

CO_FN static void client(void *arg)
{
	const struct sockaddr_in *addr = arg;
	_cleanup_close_ int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	EXPECT(connect(fd, (const struct sockaddr *)addr, sizeof(*addr)) == 0);
	EXPECT(write(fd, "hello", 5) == 5);
}

CO_FN static int accept_body(void *arg)
{
	struct sockaddr_in addr = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	_cleanup_close_ int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	socklen_t len = sizeof(addr);
	struct co_group g = CO_GROUP_INIT;
	char got[5];
	int fd;

	(void)arg;
	EXPECT(bind(listener, (struct sockaddr *)&addr, len) == 0);
	EXPECT(listen(listener, 5) == 0);
	EXPECT(getsockname(listener, (struct sockaddr *)&addr, &len) == 0);
	co_group_spawn(&g, client, &addr);
	fd = io_accept(listener);
	EXPECT(fd >= 0);
	EXPECT(io_recv_full(fd, got, 5, IO_FOREVER) == 0 && memcmp(got, "hello", 5) == 0);
	(void)close(fd);
	co_group_wait(&g);
	return 0;
}

static void test_accept(void **state)
{
	(void)state;
	core_run(accept_body, NULL);
}

/* ---- watches ---- */

struct watched {
	struct io_watch w;
	struct co *co;
	int events;
	unsigned fired;
};

static void watch_fired(struct io_watch *w, int events)
{
	struct watched *d = container_of(w, struct watched, w);

	d->events = events;
	d->fired++;
	co_wake(d->co);
}

CO_FN static int watch_body(void *arg)
{
	struct watched in = { .co = co_self() }, out = { .co = co_self() };
	char fill[4096] = { 0 };
	int fd[2];

	(void)arg;
	EXPECT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fd) == 0);
	while (write(fd[0], fill, sizeof(fill)) > 0)
		;
	/* Both directions of one fd, each with its own watch. */
	EXPECT(io_watch_arm(&in.w, fd[0], POLLIN, watch_fired) == 0);
	EXPECT(io_watch_arm(&out.w, fd[0], POLLOUT, watch_fired) == 0);
	co_sleep(1000000);
	EXPECT(in.fired == 0 && out.fired == 0);
	EXPECT(write(fd[1], "x", 1) == 1);
	while (in.fired == 0)
		co_park();
	EXPECT(in.events & POLLIN);
	EXPECT(out.fired == 0);
	while (read(fd[1], fill, sizeof(fill)) > 0)
		;
	while (out.fired == 0)
		co_park();
	EXPECT(out.events & POLLOUT);
	/* Cancelled: over at once, or told so later; never both. */
	EXPECT(read(fd[0], fill, 1) == 1);
	EXPECT(io_watch_arm(&in.w, fd[0], POLLIN, watch_fired) == 0);
	co_yield();
	if (!io_watch_cancel(&in.w)) {
		while (in.fired == 1)
			co_park();
		EXPECT(in.events == -ECANCELED);
	}
	EXPECT(!in.w.is_armed);
	(void)close(fd[0]);
	(void)close(fd[1]);
	return 0;
}

static void test_watch(void **state)
{
	(void)state;
	core_run(watch_body, NULL);
}

/* ---- offload ---- */

static int slow_square(void *arg)
{
	int v = *(int *)arg;

	(void)usleep(1000); /* a blocking call is what the pool is for */
	return v * v;
}

struct errand {
	int v, rc;
};

CO_FN static void run_errand(void *arg)
{
	struct errand *e = arg;

	e->rc = offload(slow_square, &e->v);
}

CO_FN static int offload_body(void *arg)
{
	struct errand e[100];
	struct co_group g = CO_GROUP_INIT;

	(void)arg;
	for (int i = 0; i < 100; i++) {
		e[i].v = i;
		co_group_spawn(&g, run_errand, &e[i]);
	}
	co_group_wait(&g);
	for (int i = 0; i < 100; i++)
		EXPECT(e[i].rc == i * i);
	return 0;
}

static void test_offload(void **state)
{
	(void)state;
	core_run(offload_body, NULL);
}

/* ---- spinning and deferred work ---- */

struct spin {
	struct spinner s;
	struct reactor_defer d;
	unsigned tries, expired, deferred;
	unsigned succeed_at; /* the try that finds something; 0 = none */
	struct co *co;
};

static bool spin_try(struct spinner *s)
{
	struct spin *p = container_of(s, struct spin, s);

	if (++p->tries != p->succeed_at)
		return false;
	spinner_stop(s);
	reactor_defer(&p->d);
	reactor_defer(&p->d); /* queued once */
	return true;
}

static void spin_expired(struct spinner *s)
{
	struct spin *p = container_of(s, struct spin, s);

	p->expired++;
	co_wake(p->co);
}

static void spin_deferred(struct reactor_defer *d)
{
	struct spin *p = container_of(d, struct spin, d);

	p->deferred++;
	co_wake(p->co);
}

CO_FN static int spin_body(void *arg)
{
	struct spin p = { .co = co_self(), .succeed_at = 3 };

	(void)arg;
	spinner_init(&p.s, spin_try, spin_expired);
	list_init(&p.d.node);
	p.d.fn = spin_deferred;
	spinner_start(&p.s);
	while (p.deferred == 0 && p.expired == 0)
		co_park();
	co_yield();
	/* On a loaded machine the spin may run out before its third try; one of the two, never both. */
	EXPECT((p.deferred == 1) != (p.expired == 1));
	/* In vain: it expires, and the next start does so without a try. */
	p.succeed_at = 0;
	p.expired = 0;
	p.s.skip = 0;
	spinner_start(&p.s);
	while (p.expired == 0)
		co_park();
	EXPECT(p.s.skip > 0);
	p.tries = 0;
	spinner_start(&p.s);
	EXPECT(p.expired == 2 && p.tries == 0);
	return 0;
}

static void test_spin(void **state)
{
	(void)state;
	core_run(spin_body, NULL);
}

/* ---- buffers ---- */

CO_FN static int buf_body(void *arg)
{
	static const size_t lens[] = { 1, 4096, 4097, 100000, 262144, 262145, 5 << 20, BUF_MAX };
	void *p, *q;

	(void)arg;
	for (unsigned i = 0; i < ARRAY_LEN(lens); i++) {
		p = buf_get(lens[i]);
		EXPECT(p != NULL && (uintptr_t)p % BUF_ALIGN == 0);
		EXPECT(buf_size(lens[i]) >= lens[i]);
		memset(p, 1, lens[i]);
		buf_put(p, lens[i]);
	}
	/* Last in, first out. */
	p = buf_get(5000);
	buf_put(p, 5000);
	q = buf_get(8192);
	EXPECT(p == q);
	buf_put(q, 8192);
	buf_put(NULL, 1);
	return 0;
}

static void test_buf(void **state)
{
	(void)state;
	core_run(buf_body, NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_timers),	    cmocka_unit_test(test_messages),
		cmocka_unit_test(test_file),	    cmocka_unit_test(test_file_errors),
		cmocka_unit_test(test_names),	    cmocka_unit_test(test_clocks),
		cmocka_unit_test(test_stream),	    cmocka_unit_test(test_poll),
		cmocka_unit_test(test_accept),	    cmocka_unit_test(test_watch),
		cmocka_unit_test(test_offload),	    cmocka_unit_test(test_spin),
		cmocka_unit_test(test_buf),
	};

	return cmocka_run_group_tests(tests, core_start, core_stop);
}
