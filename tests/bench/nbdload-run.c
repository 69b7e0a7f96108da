/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The load: each thread drives its connections with as few system calls as it can, so that what is
 * measured is the server.
 *
 * A turn of one connection: receive whatever is there into one large buffer, complete every reply
 * in it, refill the freed slots, and send all new requests with one sendmsg. Requests are built
 * only after the previous batch has left completely; that keeps the iovec in one piece.
 *
 * Sends never block: a server that answers a read while we are still sending writes would
 * otherwise wait for us while we wait for it. With one connection and nothing left to send, the
 * receive blocks (one system call per batch); in all other cases poll() waits.
 *
 * A slot is one request in flight:
 *
 *   free -> (refill) -> in flight -> (reply complete) -> free
 *
 * The cookie carries the slot's number and a sequence number, so that a reply to a request which is
 * not in flight is noticed.
 */
#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "nbdload-proto.h"
#include "nbdload.h"

#define RX_LEN      (512 * 1024)
#define DATA_ALIGN  4096
#define STALL_MS    30000
#define CLAIM_TRIES 64

struct slot {
	uint64_t cookie; /* 0 = free */
	uint64_t started_ns;
	uint64_t block;
	uint32_t gen;     /* verify: what a read must find, a write will leave */
	uint32_t old_gen; /* verify: what a failed write may have left is unknown; see finish() */
	bool is_read;
	uint8_t *data; /* verify and writes; the request header sits in the bytes before it */
};

struct conn {
	int fd;
	struct slot *slot;
	unsigned int *free_slot; /* stack of slot numbers */
	unsigned int free_n;
	uint32_t seq;

	struct request *hdr; /* headers of reads in the batch being sent, back to back */
	struct iovec *iov;
	unsigned int iov_pos, iov_n;

	uint8_t *rx;
	size_t rx_len;     /* bytes of an incomplete reply header at the start of rx */
	struct slot *cur;  /* read whose data is arriving */
	uint32_t cur_left; /* bytes of it still to come */

	uint64_t first_block, block_n; /* this connection's share (sequential: exclusive) */
	uint64_t cursor;               /* sequential and once: the next index */
	uint64_t stride;               /* once: an odd step coprime to block_n */
	uint64_t rng;
	uint64_t budget; /* requests that may still be started */
	void *arena;     /* memory behind slot[].data */
};

struct worker {
	const struct job *job;
	struct conn *conn;
	unsigned int conn_n;
	struct pollfd *poll;        /* conn_n of them */
	uint64_t from_ns, until_ns; /* measured window; until 0 = to the last reply */
	uint64_t ended_ns;
	struct result res;
	int err;
	pthread_t thread;
};

uint64_t now_ns(void)
{
	struct timespec ts;

	(void)clock_gettime(CLOCK_MONOTONIC, &ts); /* cannot fail with this clock */
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* xorshift64*: Marsaglia, "Xorshift RNGs", with Vigna's multiplier. */
static uint64_t rng_next(uint64_t *s)
{
	uint64_t x = *s;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	*s = x;
	return x * UINT64_C(0x2545f4914f6cdd1d);
}

static uint64_t gcd(uint64_t a, uint64_t b)
{
	while (b) {
		uint64_t t = a % b;

		a = b;
		b = t;
	}
	return a;
}

/* ---- requests ---- */

static uint64_t pick_block(const struct job *job, struct conn *c)
{
	uint64_t i;

	if (job->sequential || job->sweep)
		i = c->cursor++ % c->block_n;
	else if (job->once)
		i = (uint64_t)((unsigned __int128)c->cursor++ * c->stride % c->block_n);
	else
		i = (uint64_t)((unsigned __int128)rng_next(&c->rng) * c->block_n >> 64);
	return c->first_block + i;
}

/*
 * Choose what slot @s asks for. False when it should not ask for anything now: everything tried is
 * in flight already (verify), or the sweep met a block that was never written.
 */
static bool choose(const struct job *job, struct conn *c, struct slot *s)
{
	s->is_read = job->read_pct == 100 ||
		     (job->read_pct > 0 && rng_next(&c->rng) % 100 < job->read_pct);
	if (!job->verify) {
		s->block = pick_block(job, c);
		return true;
	}
	for (unsigned int i = 0; i < CLAIM_TRIES; i++) {
		s->block = pick_block(job, c);
		if (!verify_claim(job->verify, s->block, &s->old_gen))
			continue;
		if (job->sweep && s->old_gen == 0) {
			verify_release(job->verify, s->block, 0);
			return false;
		}
		s->gen = s->is_read ? s->old_gen : s->old_gen + 1;
		return true;
	}
	return false;
}

static void add_iov(struct conn *c, void *base, size_t len)
{
	struct iovec *last = c->iov + c->iov_n - 1;

	if (c->iov_n > 0 && (uint8_t *)last->iov_base + last->iov_len == (uint8_t *)base)
		last->iov_len += len;
	else
		c->iov[c->iov_n++] = (struct iovec){base, len};
}

/* Build requests for all free slots. Only called when the previous batch has left. */
static void refill(const struct job *job, struct conn *c, uint64_t now)
{
	unsigned int hdr_n = 0;

	c->iov_pos = 0;
	c->iov_n = 0;
	while (c->free_n > 0 && c->budget > 0) {
		unsigned int i = c->free_slot[c->free_n - 1];
		struct slot *s = &c->slot[i];

		if (!choose(job, c, s)) {
			if (!job->sweep)
				break; /* in-flight requests will free blocks */
			c->budget--;
			continue;
		}
		c->free_n--;
		c->budget--;
		s->cookie = (uint64_t)++c->seq << 32 | (i + 1);
		s->started_ns = now;

		struct request *h = s->is_read ? &c->hdr[hdr_n++]
					       : (struct request *)(void *)(s->data - sizeof(*h));

		*h = (struct request){
			.magic = htobe32(NBD_REQUEST_MAGIC),
			.type = htobe16(s->is_read ? NBD_CMD_READ : NBD_CMD_WRITE),
			.cookie = s->cookie, /* opaque to the server: no byte order */
			.offset = htobe64(s->block * job->block_len),
			.len = htobe32(job->block_len),
		};
		if (!s->is_read && job->verify)
			verify_fill(job->verify, s->data, s->block, s->gen);
		add_iov(c, h, sizeof(*h) + (s->is_read ? 0 : job->block_len));
	}
}

/* Send what is queued, as far as it goes. -errno when the connection is broken. */
static int push(struct conn *c, bool *progress)
{
	while (c->iov_pos < c->iov_n) {
		unsigned int n = c->iov_n - c->iov_pos;
		struct msghdr msg = {
			.msg_iov = c->iov + c->iov_pos,
			.msg_iovlen = n < IOV_MAX ? n : IOV_MAX,
		};
		ssize_t sent = sendmsg(c->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			return errno == EAGAIN ? 0 : -errno;
		*progress = true;
		while (sent > 0) {
			struct iovec *v = &c->iov[c->iov_pos];
			size_t part = (size_t)sent < v->iov_len ? (size_t)sent : v->iov_len;

			v->iov_base = (uint8_t *)v->iov_base + part;
			v->iov_len -= part;
			sent -= (ssize_t)part;
			if (v->iov_len == 0)
				c->iov_pos++;
		}
	}
	return 0;
}

/* ---- replies ---- */

static void finish(struct worker *w, struct conn *c, struct slot *s, uint32_t error, uint64_t now)
{
	const struct job *job = w->job;
	struct verify *v = job->verify;

	if (v) {
		if (s->is_read && !error)
			verify_check(v, s->data, s->block, s->gen);
		/* After a failed write the block may hold either content: stop checking it. */
		verify_release(v, s->block, !error ? s->gen : s->is_read ? s->old_gen : 0);
	}
	if (error && w->res.errors++ == 0)
		w->res.first_error = error;
	w->res.ops_all++;
	if (now >= w->from_ns && (w->until_ns == 0 || now < w->until_ns)) {
		w->res.ops++;
		hist_add(&w->res.hist, now - s->started_ns);
	}
	s->cookie = 0;
	c->free_slot[c->free_n++] = (unsigned int)(s - c->slot);
}

/* Take a reply header. The slot it answers, or NULL (reported) when there is none. */
static struct slot *match(const struct job *job, struct conn *c, const struct simple_reply *r)
{
	uint64_t i = (r->cookie & UINT32_MAX) - 1;

	if (be32toh(r->magic) != NBD_SIMPLE_REPLY_MAGIC) {
		fprintf(stderr, "nbdload: bad reply magic %#x\n", be32toh(r->magic));
		return NULL;
	}
	if (r->cookie == 0 || i >= job->depth || c->slot[i].cookie != r->cookie) {
		fprintf(stderr, "nbdload: reply with cookie %#" PRIx64 " matches no request\n",
			r->cookie);
		return NULL;
	}
	return &c->slot[i];
}

/* Work through @len bytes in c->rx; keeps an incomplete header for the next time. */
static int parse(struct worker *w, struct conn *c, size_t len, uint64_t now)
{
	const struct job *job = w->job;
	uint8_t *p = c->rx;
	uint8_t *end = p + len;

	while (p < end) {
		if (c->cur) {
			size_t n = (size_t)(end - p) < c->cur_left ? (size_t)(end - p)
								   : c->cur_left;

			if (job->verify)
				memcpy(c->cur->data + job->block_len - c->cur_left, p, n);
			p += n;
			c->cur_left -= (uint32_t)n;
			if (c->cur_left == 0) {
				finish(w, c, c->cur, 0, now);
				c->cur = NULL;
			}
			continue;
		}

		struct simple_reply r;

		if ((size_t)(end - p) < sizeof(r))
			break;
		memcpy(&r, p, sizeof(r));
		p += sizeof(r);

		struct slot *s = match(job, c, &r);

		if (!s)
			return -EPROTO;
		if (s->is_read && r.error == 0) {
			c->cur = s;
			c->cur_left = job->block_len;
		} else {
			finish(w, c, s, be32toh(r.error), now);
		}
	}
	c->rx_len = (size_t)(end - p);
	memmove(c->rx, p, c->rx_len);
	return 0;
}

/*
 * Receive once and work through it. Returns the number of bytes (0 = nothing there), or -errno.
 * @block: wait for data, at most STALL_MS (SO_RCVTIMEO was set at connect).
 */
static ssize_t pull(struct worker *w, struct conn *c, bool block, uint64_t *now)
{
	ssize_t n;

	do
		n = recv(c->fd, c->rx + c->rx_len, RX_LEN - c->rx_len, block ? 0 : MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	if (n < 0 && errno == EAGAIN)
		return block ? -ETIMEDOUT : 0;
	if (n < 0)
		return -errno;
	if (n == 0)
		return -ECONNRESET;
	*now = now_ns();

	int err = parse(w, c, c->rx_len + (size_t)n, *now);

	return err ? err : n;
}

/* ---- the loop of a thread ---- */

static bool idle(const struct job *job, const struct conn *c)
{
	return c->free_n == job->depth;
}

static int wait_any(struct worker *w)
{
	unsigned int watched = 0;
	int n;

	for (unsigned int i = 0; i < w->conn_n; i++) {
		const struct conn *c = &w->conn[i];

		w->poll[i].fd = idle(w->job, c) ? -1 : c->fd;
		w->poll[i].events = (short)(POLLIN | (c->iov_pos < c->iov_n ? POLLOUT : 0));
		watched += w->poll[i].fd >= 0;
	}
	if (watched == 0) { /* verify: every block tried is in flight in other threads */
		sched_yield();
		return 0;
	}
	do
		n = poll(w->poll, w->conn_n, STALL_MS);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	return n == 0 ? -ETIMEDOUT : 0;
}

/* One turn of @c. Sets *progress when bytes went either way. */
static int turn(struct worker *w, struct conn *c, uint64_t *now, bool *progress)
{
	const struct job *job = w->job;

	if (!idle(job, c)) {
		bool block = w->conn_n == 1 && c->iov_pos == c->iov_n && !job->spin;
		ssize_t n = pull(w, c, block, now);

		if (n < 0)
			return (int)n;
		if (n > 0)
			*progress = true;
	}

	bool stop = w->until_ns && *now >= w->until_ns;

	if (c->iov_pos == c->iov_n && c->free_n > 0 && !stop)
		refill(job, c, *now);
	return push(c, progress);
}

static bool all_done(const struct worker *w, uint64_t now)
{
	bool stop = w->until_ns && now >= w->until_ns;

	for (unsigned int i = 0; i < w->conn_n; i++) {
		const struct conn *c = &w->conn[i];

		if (!idle(w->job, c) || (!stop && c->budget > 0))
			return false;
	}
	return true;
}

static int loop(struct worker *w)
{
	uint64_t now = now_ns();
	uint64_t last = now; /* when bytes last went either way */

	while (!all_done(w, now)) {
		bool progress = false;
		int err = 0;

		for (unsigned int i = 0; i < w->conn_n && !err; i++)
			err = turn(w, &w->conn[i], &now, &progress);
		if (err)
			return err;
		if (progress) {
			last = now;
			continue;
		}
		if (!w->job->spin) {
			err = wait_any(w);
		} else {
			sched_yield();
			err = now_ns() - last > STALL_MS * UINT64_C(1000000) ? -ETIMEDOUT : 0;
		}
		if (err)
			return err;
		now = now_ns();
	}
	w->ended_ns = now;
	return 0;
}

static void *worker_main(void *arg)
{
	struct worker *w = arg;

	w->err = loop(w);
	if (w->err)
		fprintf(stderr, "nbdload: connection failed after %" PRIu64 " replies: %s\n",
			w->res.ops_all,
			w->err == -ETIMEDOUT ? "no reply for 30 s" : strerror(-w->err));
	return NULL;
}

/* ---- set-up ---- */

static void conn_free(struct conn *c)
{
	free(c->slot);
	free(c->free_slot);
	free(c->hdr);
	free(c->iov);
	free(c->rx);
	free(c->arena);
}

static int conn_init(const struct job *job, struct conn *c, unsigned int index, int fd)
{
	size_t stride = (size_t)((job->block_len + 2 * DATA_ALIGN - 1) / DATA_ALIGN) * DATA_ALIGN +
			DATA_ALIGN;
	bool needs_data = job->verify || job->read_pct < 100;
	uint64_t total = job->range / job->block_len;

	c->fd = fd;
	c->slot = calloc(job->depth, sizeof(*c->slot));
	c->free_slot = calloc(job->depth, sizeof(*c->free_slot));
	c->hdr = calloc(job->depth, sizeof(*c->hdr));
	c->iov = calloc(job->depth, sizeof(*c->iov));
	c->rx = aligned_alloc(DATA_ALIGN, RX_LEN);
	if (needs_data)
		c->arena = aligned_alloc(DATA_ALIGN, job->depth * stride);
	if (!c->slot || !c->free_slot || !c->hdr || !c->iov || !c->rx || (needs_data && !c->arena))
		return -ENOMEM;
	c->free_n = job->depth;
	c->rng = (job->seed + index + 1) * UINT64_C(0x9e3779b97f4a7c15) | 1;
	for (unsigned int i = 0; i < job->depth; i++) {
		c->free_slot[i] = job->depth - 1 - i;
		if (!needs_data)
			continue;
		c->slot[i].data = (uint8_t *)c->arena + i * stride + DATA_ALIGN;
		/* Not zeroes: no server may take a short cut for them. */
		for (uint32_t k = 0; k + sizeof(uint64_t) <= job->block_len;
		     k += sizeof(uint64_t)) {
			uint64_t word = rng_next(&c->rng);

			memcpy(c->slot[i].data + k, &word, sizeof(word));
		}
	}

	c->first_block = 0;
	c->block_n = total;
	if (job->sequential || job->once || job->sweep) {
		c->block_n = total / job->conn_n;
		c->first_block = index * c->block_n;
		if (index == job->conn_n - 1)
			c->block_n = total - c->first_block;
	}
	c->stride = (uint64_t)((double)c->block_n * 0.6180339887) | 1;
	while (gcd(c->stride, c->block_n) != 1)
		c->stride += 2;
	c->budget = UINT64_MAX;
	if (job->once || job->sweep)
		c->budget = c->block_n;
	else if (job->op_limit)
		c->budget =
			job->op_limit / job->conn_n + (index < job->op_limit % job->conn_n ? 1 : 0);
	return 0;
}

static void start(const struct job *job, struct worker *w, unsigned int n, uint64_t t0)
{
	for (unsigned int i = 0; i < n; i++) {
		w[i].from_ns = t0 + job->warmup_ns;
		w[i].until_ns = job->op_limit || job->sweep ? 0 : w[i].from_ns + job->runtime_ns;
		int err = pthread_create(&w[i].thread, NULL, worker_main, &w[i]);

		if (err) {
			fprintf(stderr, "nbdload: cannot start a thread: %s\n", strerror(err));
			exit(1); /* threads already running own the connections */
		}
	}
}

static int collect(struct worker *w, unsigned int n, struct result *res)
{
	uint64_t ended = 0;
	int err = 0;

	for (unsigned int i = 0; i < n; i++) {
		pthread_join(w[i].thread, NULL);
		if (w[i].err && !err)
			err = w[i].err;
		res->ops += w[i].res.ops;
		res->ops_all += w[i].res.ops_all;
		if (w[i].res.errors && !res->errors)
			res->first_error = w[i].res.first_error;
		res->errors += w[i].res.errors;
		hist_merge(&res->hist, &w[i].res.hist);
		if (w[i].ended_ns > ended)
			ended = w[i].ended_ns;
	}
	/* The load ended early (op count, once) or ran for exactly the window. */
	uint64_t until = w[0].until_ns && w[0].until_ns < ended ? w[0].until_ns : ended;

	res->seconds = until > w[0].from_ns ? (double)(until - w[0].from_ns) / 1e9 : 0;
	return err;
}

int run_job(const struct job *job, const int *fds, struct result *res)
{
	struct conn *conn = calloc(job->conn_n, sizeof(*conn));
	struct worker *w = calloc(job->thread_n, sizeof(*w));
	int err = conn && w ? 0 : -ENOMEM;
	unsigned int next = 0;

	for (unsigned int i = 0; i < job->conn_n && !err; i++)
		err = conn_init(job, &conn[i], i, fds[i]);
	if (err)
		goto out;
	for (unsigned int i = 0; i < job->thread_n; i++) {
		w[i].job = job;
		w[i].conn = conn + next;
		w[i].conn_n =
			job->conn_n / job->thread_n + (i < job->conn_n % job->thread_n ? 1 : 0);
		next += w[i].conn_n;
		w[i].poll = calloc(w[i].conn_n, sizeof(*w[i].poll));
		if (!w[i].poll) {
			err = -ENOMEM;
			goto out;
		}
	}
	*res = (struct result){0};
	start(job, w, job->thread_n, now_ns());
	err = collect(w, job->thread_n, res);
out:
	if (err == -ENOMEM)
		fprintf(stderr, "nbdload: out of memory\n");
	for (unsigned int i = 0; w && i < job->thread_n; i++)
		free(w[i].poll);
	for (unsigned int i = 0; conn && i < job->conn_n; i++)
		conn_free(&conn[i]);
	free(conn);
	free(w);
	return err;
}
