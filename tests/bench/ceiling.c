/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * ceiling: how fast could an NBD server be that does nothing but the work?
 *
 * A thread per connection; one recv takes all the requests that are there, pread or pwrite serves
 * them at once, one sendmsg carries all the replies. No structured replies, no flush, no checks
 * beyond those that keep it from crashing, one export for every name. It is a yardstick in the
 * benchmark's table, and it shows that the load generator is not what is measured. Serve nothing
 * with it.
 *
 *   --mmap       reads are sent from a mapping of the file instead of being copied out of it first
 *   --spin US    poll the socket for that long, yielding, before blocking in recv
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "nbdload-proto.h"

#define RX_LEN     (512 * 1024)
#define TX_LEN     (1024 * 1024) /* data gathered before it is sent */
#define BATCH      256           /* replies gathered before they are sent */
#define READ_MAX   (32 * 1024 * 1024)
#define OPTION_MAX 4096

/* The whole program's settings; written by main before the first thread starts. */
static struct {
	int file;
	uint64_t size;
	const uint8_t *map; /* NULL without --mmap */
	uint64_t spin_ns;
} cfg;

struct conn {
	int fd;
	uint8_t *rx;
	size_t pos, end; /* unread bytes are rx[pos..end) */
	uint8_t *tx;     /* data of the reads in this batch */
	size_t tx_cap, tx_len;
	struct simple_reply reply[BATCH];
	struct iovec iov[2 * BATCH];
	unsigned int reply_n, iov_n;
};

static uint64_t now_ns(void)
{
	struct timespec ts;

	(void)clock_gettime(CLOCK_MONOTONIC, &ts); /* cannot fail with this clock */
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static bool send_iov(int fd, struct iovec *iov, size_t n)
{
	while (n > 0) {
		struct msghdr msg = {.msg_iov = iov, .msg_iovlen = n};
		ssize_t sent = sendmsg(fd, &msg, MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			return false;
		while (n > 0 && (size_t)sent >= iov->iov_len) {
			sent -= (ssize_t)iov->iov_len;
			iov++;
			n--;
		}
		if (sent > 0) {
			iov->iov_base = (uint8_t *)iov->iov_base + sent;
			iov->iov_len -= (size_t)sent;
		}
	}
	return true;
}

static bool send_replies(struct conn *c)
{
	bool ok = send_iov(c->fd, c->iov, c->iov_n);

	c->reply_n = 0;
	c->iov_n = 0;
	c->tx_len = 0;
	return ok;
}

/* Receive once; send what is gathered before waiting. False at the end of the connection. */
static bool fill(struct conn *c)
{
	uint64_t until = 0;
	ssize_t n;

	memmove(c->rx, c->rx + c->pos, c->end - c->pos);
	c->end -= c->pos;
	c->pos = 0;
	if (c->iov_n && !send_replies(c))
		return false;
	for (;;) {
		bool spin = cfg.spin_ns && (!until || now_ns() < until);

		n = recv(c->fd, c->rx + c->end, RX_LEN - c->end, spin ? MSG_DONTWAIT : 0);
		if (n >= 0 || (errno != EAGAIN && errno != EINTR))
			break;
		if (spin && !until)
			until = now_ns() + cfg.spin_ns;
		if (spin)
			sched_yield();
	}
	if (n <= 0)
		return false;
	c->end += (size_t)n;
	return true;
}

/* Make @len bytes available at c->rx + c->pos. */
static bool need(struct conn *c, size_t len)
{
	while (c->end - c->pos < len)
		if (!fill(c))
			return false;
	return true;
}

static bool add_reply(struct conn *c, uint64_t cookie, uint32_t error, const void *data, size_t len)
{
	struct simple_reply *r = &c->reply[c->reply_n++];

	*r = (struct simple_reply){
		.magic = htobe32(NBD_SIMPLE_REPLY_MAGIC),
		.error = htobe32(error),
		.cookie = cookie,
	};
	c->iov[c->iov_n++] = (struct iovec){r, sizeof(*r)};
	if (len)
		c->iov[c->iov_n++] = (struct iovec){(void *)(uintptr_t)data, len};
	return c->reply_n < BATCH || send_replies(c);
}

static bool serve_read(struct conn *c, uint64_t cookie, uint64_t off, uint32_t len)
{
	if (cfg.map)
		return add_reply(c, cookie, 0, cfg.map + off, len);
	if (c->tx_len + len > c->tx_cap && c->iov_n && !send_replies(c))
		return false;
	if (len > c->tx_cap) {
		uint8_t *bigger = realloc(c->tx, len);

		if (!bigger)
			return false;
		c->tx = bigger;
		c->tx_cap = len;
	}
	if (pread(cfg.file, c->tx + c->tx_len, len, (off_t)off) != (ssize_t)len)
		return add_reply(c, cookie, NBD_EIO, NULL, 0);
	c->tx_len += len;
	return add_reply(c, cookie, 0, c->tx + c->tx_len - len, len);
}

static bool serve_write(struct conn *c, uint64_t cookie, uint64_t off, uint32_t len, bool valid)
{
	bool ok = valid;

	while (len > 0) {
		if (c->pos == c->end && !fill(c))
			return false;

		size_t n = c->end - c->pos < len ? c->end - c->pos : len;

		if (ok && pwrite(cfg.file, c->rx + c->pos, n, (off_t)off) != (ssize_t)n)
			ok = false;
		c->pos += n;
		off += n;
		len -= (uint32_t)n;
	}
	return add_reply(c, cookie, ok ? 0 : valid ? NBD_EIO : NBD_EINVAL, NULL, 0);
}

static void transmission(struct conn *c)
{
	while (need(c, sizeof(struct request))) {
		struct request q;

		memcpy(&q, c->rx + c->pos, sizeof(q));
		c->pos += sizeof(q);

		uint64_t off = be64toh(q.offset);
		uint32_t len = be32toh(q.len);
		bool valid = off <= cfg.size && len <= cfg.size - off && len <= READ_MAX;
		bool ok;

		if (be32toh(q.magic) != NBD_REQUEST_MAGIC)
			return;
		switch (be16toh(q.type)) {
		case NBD_CMD_READ:
			ok = valid ? serve_read(c, q.cookie, off, len)
				   : add_reply(c, q.cookie, NBD_EINVAL, NULL, 0);
			break;
		case NBD_CMD_WRITE: ok = serve_write(c, q.cookie, off, len, valid); break;
		case NBD_CMD_DISC: return;
		default: ok = add_reply(c, q.cookie, NBD_EINVAL, NULL, 0);
		}
		if (!ok)
			return;
	}
}

static bool send_option_reply(struct conn *c, uint32_t option, uint32_t type)
{
	struct {
		struct option_reply info;
		uint16_t info_type;
		uint64_t size;
		uint16_t flags;
		struct option_reply last;
	} __attribute__((packed)) m = {
		.info = {htobe64(NBD_REPLY_MAGIC), htobe32(option), htobe32(NBD_REP_INFO),
			 htobe32(12)},
		.info_type = htobe16(NBD_INFO_EXPORT),
		.size = htobe64(cfg.size),
		.flags = htobe16(NBD_FLAG_HAS_FLAGS),
		.last = {htobe64(NBD_REPLY_MAGIC), htobe32(option), htobe32(type), 0},
	};
	struct iovec all = {&m, sizeof(m)};
	struct iovec last = {&m.last, sizeof(m.last)};

	return send_iov(c->fd, type == NBD_REP_ACK && option == NBD_OPT_GO ? &all : &last, 1);
}

/* True when the client has chosen the export and the transmission phase begins. */
static bool handshake(struct conn *c)
{
	struct greeting g = {
		.nbdmagic = htobe64(NBD_MAGIC),
		.ihaveopt = htobe64(NBD_IHAVEOPT),
		.flags = htobe16(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES),
	};
	struct iovec v = {&g, sizeof(g)};

	if (!send_iov(c->fd, &v, 1) || !need(c, 4))
		return false;
	c->pos += 4; /* client flags */
	for (;;) {
		struct option_request o;

		if (!need(c, sizeof(o)))
			return false;
		memcpy(&o, c->rx + c->pos, sizeof(o));

		uint32_t len = be32toh(o.len);
		uint32_t option = be32toh(o.option);

		if (be64toh(o.magic) != NBD_IHAVEOPT || len > OPTION_MAX ||
		    !need(c, sizeof(o) + len))
			return false;
		c->pos += sizeof(o) + len;
		if (option == NBD_OPT_GO)
			return send_option_reply(c, option, NBD_REP_ACK);
		if (option == NBD_OPT_ABORT || option == NBD_OPT_EXPORT_NAME)
			return false;
		if (!send_option_reply(c, option, NBD_REP_ERR_UNSUP))
			return false;
	}
}

static void *serve(void *arg)
{
	struct conn *c = arg;

	c->rx = malloc(RX_LEN);
	c->tx_cap = TX_LEN;
	c->tx = malloc(c->tx_cap);
	if (c->rx && c->tx && handshake(c))
		transmission(c);
	if (c->iov_n)
		(void)send_replies(c); /* replies before a DISC; the client may be gone already */
	close(c->fd);
	free(c->rx);
	free(c->tx);
	free(c);
	return NULL;
}

static int listen_unix(const char *path)
{
	struct sockaddr_un sa = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	if (fd < 0 || strlen(path) >= sizeof(sa.sun_path))
		return -1;
	memcpy(sa.sun_path, path, strlen(path) + 1);
	if (bind(fd, (struct sockaddr *)&sa, sizeof(sa)) < 0 || listen(fd, 4096) < 0) {
		close(fd);
		return -1;
	}
	return fd;
}

static int listen_tcp(unsigned long port)
{
	struct sockaddr_in sa = {
		.sin_family = AF_INET,
		.sin_port = htobe16((uint16_t)port),
		.sin_addr.s_addr = htobe32(INADDR_LOOPBACK),
	};
	int one = 1;
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	if (fd < 0)
		return -1;
	if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) < 0 ||
	    bind(fd, (struct sockaddr *)&sa, sizeof(sa)) < 0 || listen(fd, 4096) < 0) {
		close(fd);
		return -1;
	}
	return fd;
}

static int accept_loop(int lfd)
{
	pthread_attr_t attr;
	int one = 1;

	if (pthread_attr_init(&attr) || pthread_attr_setstacksize(&attr, 64 * 1024) ||
	    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED)) {
		fprintf(stderr, "ceiling: cannot prepare threads\n");
		return 1;
	}
	for (;;) {
		int fd = accept(lfd, NULL, NULL);
		pthread_t t;

		if (fd < 0 && (errno == EINTR || errno == ECONNABORTED))
			continue;
		if (fd < 0) {
			perror("ceiling: accept");
			return 1;
		}
		/* Fails on a unix socket, which has no Nagle. */
		(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));

		struct conn *c = calloc(1, sizeof(*c));

		if (c)
			c->fd = fd;
		if (!c || pthread_create(&t, &attr, serve, c)) {
			fprintf(stderr, "ceiling: no thread for a connection\n");
			close(fd);
			free(c);
		}
	}
}

static int open_file(const char *path, bool map)
{
	struct stat st;

	cfg.file = open(path, O_RDWR | O_CLOEXEC);
	if (cfg.file < 0 || fstat(cfg.file, &st) < 0) {
		fprintf(stderr, "ceiling: %s: %s\n", path, strerror(errno));
		return -1;
	}
	cfg.size = (uint64_t)st.st_size;
	if (!map)
		return 0;

	void *m = mmap(NULL, cfg.size, PROT_READ, MAP_SHARED | MAP_POPULATE, cfg.file, 0);

	if (m == MAP_FAILED) {
		fprintf(stderr, "ceiling: mmap of %s: %s\n", path, strerror(errno));
		return -1;
	}
	cfg.map = m;
	return 0;
}

int main(int argc, char **argv)
{
	static const struct option opts[] = {
		{"unix", 1, NULL, 'u'},
		{"port", 1, NULL, 'p'},
		{"mmap", 0, NULL, 'm'},
		{"spin", 1, NULL, 's'},
		{0},
	};
	const char *path = NULL;
	unsigned long port = 0;
	bool map = false;
	int c;

	while ((c = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (c) {
		case 'u': path = optarg; break;
		case 'p': port = strtoul(optarg, NULL, 10); break;
		case 'm': map = true; break;
		case 's': cfg.spin_ns = strtoull(optarg, NULL, 10) * 1000; break;
		default: return 2;
		}
	}
	if (optind != argc - 1 || !path == !port || port > UINT16_MAX) {
		fprintf(stderr,
			"usage: ceiling (--unix PATH | --port N) [--mmap] [--spin US] FILE\n");
		return 2;
	}
	if (open_file(argv[optind], map) < 0)
		return 1;

	int lfd = path ? listen_unix(path) : listen_tcp(port);

	if (lfd < 0) {
		fprintf(stderr, "ceiling: cannot listen: %s\n", strerror(errno));
		return 1;
	}
	return accept_loop(lfd);
}
