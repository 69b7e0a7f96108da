/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Connecting: unix or TCP, the fixed newstyle handshake, NBD_OPT_GO without further options, so
 * that replies in the transmission phase are simple replies.
 *
 * Client flags and NBD_OPT_GO leave in one send, as a client that counts round trips would do.
 */
#include <endian.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "nbdload-proto.h"
#include "nbdload.h"

#define HANDSHAKE_TIMEOUT_S 30
#define OPTION_REPLY_MAX    1024 /* longer ones are discarded in pieces */

__attribute__((format(printf, 4, 5))) static int fail(int err, char *why, size_t why_len,
						      const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	(void)vsnprintf(why, why_len, fmt, ap); /* a truncated message is still a message */
	va_end(ap);
	return err;
}

static int send_all(int fd, const void *buf, size_t len)
{
	const char *p = buf;

	while (len > 0) {
		ssize_t n = send(fd, p, len, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		p += n;
		len -= (size_t)n;
	}
	return 0;
}

static int recv_all(int fd, void *buf, size_t len)
{
	char *p = buf;

	while (len > 0) {
		ssize_t n = recv(fd, p, len, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno == EAGAIN ? -ETIMEDOUT : -errno;
		if (n == 0)
			return -ECONNRESET;
		p += n;
		len -= (size_t)n;
	}
	return 0;
}

static int connect_unix(const char *path, char *why, size_t why_len)
{
	struct sockaddr_un sa = {.sun_family = AF_UNIX};

	if (strlen(path) >= sizeof(sa.sun_path))
		return fail(-ENAMETOOLONG, why, why_len,
			    "socket path '%s' is longer than %zu bytes", path,
			    sizeof(sa.sun_path) - 1);
	memcpy(sa.sun_path, path, strlen(path) + 1);

	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return fail(-errno, why, why_len, "socket");
	if (connect(fd, (struct sockaddr *)&sa, sizeof(sa)) < 0) {
		int err = -errno;

		close(fd);
		return fail(err, why, why_len, "connect to '%s'", path);
	}
	return fd;
}

static int connect_tcp(const char *host, const char *port, char *why, size_t why_len)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
	struct addrinfo *list;
	int one = 1;
	int fd = -1;
	int err = -EADDRNOTAVAIL;
	int gai = getaddrinfo(host, port, &hints, &list);

	if (gai)
		return fail(-EINVAL, why, why_len, "address %s port %s: %s", host, port,
			    gai_strerror(gai));
	for (struct addrinfo *a = list; a && fd < 0; a = a->ai_next) {
		fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
		if (fd < 0) {
			err = -errno;
			continue;
		}
		if (connect(fd, a->ai_addr, a->ai_addrlen) < 0) {
			err = -errno;
			close(fd);
			fd = -1;
		}
	}
	freeaddrinfo(list);
	if (fd < 0)
		return fail(err, why, why_len, "connect to %s port %s", host, port);
	if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)) < 0) {
		err = -errno;
		close(fd);
		return fail(err, why, why_len, "TCP_NODELAY");
	}
	return fd;
}

/* proto.md, "NBD_OPT_GO": name length, name, number of information requests (none). */
static int send_go(int fd, const char *name, char *why, size_t why_len)
{
	uint8_t msg[sizeof(uint32_t) + sizeof(struct option_request) + 4 + NBD_NAME_MAX + 2];
	size_t name_len = strlen(name);
	uint32_t flags = htobe32(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES);
	uint32_t be_name_len = htobe32((uint32_t)name_len);
	uint8_t *p = msg;

	if (name_len > NBD_NAME_MAX)
		return fail(-EINVAL, why, why_len, "export name is longer than %d bytes",
			    NBD_NAME_MAX);

	struct option_request req = {
		.magic = htobe64(NBD_IHAVEOPT),
		.option = htobe32(NBD_OPT_GO),
		.len = htobe32((uint32_t)(4 + name_len + 2)),
	};

	p = mempcpy(p, &flags, sizeof(flags));
	p = mempcpy(p, &req, sizeof(req));
	p = mempcpy(p, &be_name_len, sizeof(be_name_len));
	p = mempcpy(p, name, name_len);
	*p++ = 0;
	*p++ = 0;

	int err = send_all(fd, msg, (size_t)(p - msg));

	return err ? fail(err, why, why_len, "sending NBD_OPT_GO") : 0;
}

static int discard(int fd, uint32_t len)
{
	char scrap[512];

	while (len > 0) {
		uint32_t n = len < sizeof(scrap) ? len : (uint32_t)sizeof(scrap);
		int err = recv_all(fd, scrap, n);

		if (err)
			return err;
		len -= n;
	}
	return 0;
}

/* Read option replies until NBD_REP_ACK. NBD_INFO_EXPORT must have come before it. */
static int recv_go(int fd, struct export_info *info, char *why, size_t why_len)
{
	bool have_export = false;

	for (;;) {
		struct option_reply rep;
		uint8_t body[OPTION_REPLY_MAX];
		int err = recv_all(fd, &rep, sizeof(rep));

		if (err)
			return fail(err, why, why_len, "waiting for the reply to NBD_OPT_GO");

		uint32_t type = be32toh(rep.type);
		uint32_t len = be32toh(rep.len);
		uint32_t kept = len < sizeof(body) ? len : (uint32_t)sizeof(body);

		if (be64toh(rep.magic) != NBD_REPLY_MAGIC || be32toh(rep.option) != NBD_OPT_GO)
			return fail(-EPROTO, why, why_len, "malformed option reply");
		err = recv_all(fd, body, kept);
		if (!err)
			err = discard(fd, len - kept);
		if (err)
			return fail(err, why, why_len, "reading the reply to NBD_OPT_GO");
		if (type & NBD_REP_FLAG_ERROR)
			return fail(-ENOENT, why, why_len, "NBD_OPT_GO refused, error %#x: %.*s",
				    type, (int)(kept < 200 ? kept : 200), (const char *)body);
		if (type == NBD_REP_ACK)
			break;
		if (type == NBD_REP_INFO && kept >= 12 && body[0] == 0 &&
		    body[1] == NBD_INFO_EXPORT) {
			uint64_t be_size;
			uint16_t be_flags;

			memcpy(&be_size, body + 2, sizeof(be_size));
			memcpy(&be_flags, body + 10, sizeof(be_flags));
			info->size = be64toh(be_size);
			info->flags = be16toh(be_flags);
			have_export = true;
		}
	}
	if (!have_export)
		return fail(-EPROTO, why, why_len, "server sent no NBD_INFO_EXPORT");
	return 0;
}

static int handshake(int fd, const char *name, struct export_info *info, char *why, size_t why_len)
{
	struct timeval limit = {.tv_sec = HANDSHAKE_TIMEOUT_S};
	struct greeting g;

	/* Stays set: in the transmission phase it is what tells a stalled server from a slow one. */
	if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) < 0)
		return fail(-errno, why, why_len, "SO_RCVTIMEO");

	int err = recv_all(fd, &g, sizeof(g));

	if (err)
		return fail(err, why, why_len, "waiting for the server's greeting");
	if (be64toh(g.nbdmagic) != NBD_MAGIC || be64toh(g.ihaveopt) != NBD_IHAVEOPT)
		return fail(-EPROTO, why, why_len, "not a newstyle NBD server");
	if (!(be16toh(g.flags) & NBD_FLAG_FIXED_NEWSTYLE))
		return fail(-EPROTO, why, why_len, "server has no fixed newstyle handshake");
	err = send_go(fd, name, why, why_len);
	return err ? err : recv_go(fd, info, why, why_len);
}

int conn_open(const struct target *t, struct export_info *info, char *why, size_t why_len)
{
	int fd = t->unix_path ? connect_unix(t->unix_path, why, why_len)
			      : connect_tcp(t->host, t->port, why, why_len);

	if (fd < 0)
		return fd;

	int err = handshake(fd, t->export_name, info, why, why_len);

	if (err) {
		close(fd);
		return err;
	}
	return fd;
}

void conn_close(int fd)
{
	struct request req = {.magic = htobe32(NBD_REQUEST_MAGIC), .type = htobe16(NBD_CMD_DISC)};

	(void)send_all(fd, &req,
		       sizeof(req)); /* the peer may be gone: then there is no one to tell */
	close(fd);
}
