/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Opens listening sockets: TCP, unix, and those that systemd passes in. accept.c takes over from there.
 *
 * A unix socket's file outlives a server that was killed. It is replaced only when nobody answers there
 * any more; test and replacement are one step under a lock on the folder, or two servers that start at
 * once could both find it stale, and the second would take the first one's away.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#ifdef HAVE_SYSTEMD
#include <systemd/sd-daemon.h>
#endif

#include "nbdrs/cleanup.h"
#include "nbdrs/handover.h"
#include "nbdrs/log.h"
#include "nbdrs/opt.h"
#include "nbdrs/proto.h"
#include "nbdrs/unixsock.h"
#include "net/listen.h"
#include "net/listen_int.h"

enum {
	SOCKET_FLAGS = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC,
	BUSY_TRIES = 20, /* of a TCP address that is in use: */
};

/* A killed server's sockets go away some time after its process, see unixsock.c. */
#define BUSY_PAUSE_NS UINT64_C(50000000)

struct list listeners = LIST_INIT(listeners);

void address_format(const struct sockaddr_storage *addr, char *out, size_t out_len)
{
	char host[INET6_ADDRSTRLEN] = "?";

	if (addr->ss_family == AF_INET) {
		const struct sockaddr_in *in = (const void *)addr;

		(void)inet_ntop(AF_INET, &in->sin_addr, host,
				sizeof(host)); /* "?" stays when it can't */
		(void)snprintf(out, out_len, "%s:%u", host, ntohs(in->sin_port));
	} else if (addr->ss_family == AF_INET6) {
		const struct sockaddr_in6 *in6 = (const void *)addr;

		(void)inet_ntop(AF_INET6, &in6->sin6_addr, host, sizeof(host)); /* as above */
		(void)snprintf(out, out_len, "[%s]:%u", host, ntohs(in6->sin6_port));
	} else {
		(void)snprintf(out, out_len, "unix");
	}
}

/* Takes fd. */
static struct listener *listener_add(int fd, bool is_unix)
{
	struct listener *l = calloc(1, sizeof(*l));

	if (!l) {
		(void)close(fd); /* nothing was sent or received */
		return NULL;
	}
	l->fd = fd;
	l->is_unix = is_unix;
	list_add(&listeners, &l->node);
	return l;
}

void listener_free(struct listener *l)
{
	struct stat st;

	if (l->path && lstat(l->path, &st) == 0 && st.st_dev == l->path_dev &&
	    st.st_ino == l->path_ino)
		(void)unlink(
			l->path); /* a file that stays is found to be stale at the next start */
	list_del(&l->node);
	(void)close(l->fd); /* nothing was sent or received */
	free(l->path);
	free(l);
}

/* TCP. */

/* What accepted sockets inherit on Linux, so that an accept costs no further calls. */
static int set_tcp_options(int fd)
{
	static const struct {
		int level, name, value;
	} options[] = {
		{ IPPROTO_TCP, TCP_NODELAY, 1 },
		{ SOL_SOCKET, SO_KEEPALIVE, 1 },
		/* A client that vanished is noticed after 3 minutes, not after 2 hours. */
		{ IPPROTO_TCP, TCP_KEEPIDLE, 60 },
		{ IPPROTO_TCP, TCP_KEEPINTVL, 15 },
		{ IPPROTO_TCP, TCP_KEEPCNT, 8 },
	};

	for (size_t i = 0; i < ARRAY_LEN(options); i++) {
		if (setsockopt(fd, options[i].level, options[i].name, &options[i].value,
			       sizeof(int)) < 0)
			return -errno;
	}
	return 0;
}

/* One address; 0 or -errno. */
static int listen_address(const struct addrinfo *ai)
{
	struct sockaddr_storage bound = { 0 };
	socklen_t bound_len = sizeof(bound);
	char text[ADDRESS_TEXT_MAX];
	const int on = 1;
	_cleanup_close_ int fd = socket(ai->ai_family, SOCKET_FLAGS, 0);

	if (fd < 0)
		return -errno;
	if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) < 0)
		return -errno;
	/* Each address has a socket of its own; 0.0.0.0 and [::] would collide otherwise. */
	if (ai->ai_family == AF_INET6 &&
	    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof(on)) < 0)
		return -errno;
	if (bind(fd, ai->ai_addr, ai->ai_addrlen) < 0 || listen(fd, SOMAXCONN) < 0)
		return -errno;
	if (getsockname(fd, (struct sockaddr *)&bound, &bound_len) < 0)
		return -errno;
	int rc = set_tcp_options(fd);
	if (rc < 0)
		return rc;
	if (!listener_add(TAKE_FD(fd), false))
		return -ENOMEM;
	address_format(&bound, text, sizeof(text));
	log_info("listening address=%s", text);
	return 0;
}

struct lookup {
	const char *host, *port;
	struct addrinfo *found;
	int gai;
};

/* Of an offload thread: asks name servers. */
static int look_up(void *arg)
{
	struct lookup *q = arg;
	const struct addrinfo hints = {
		.ai_family = AF_UNSPEC,
		.ai_socktype = SOCK_STREAM,
		.ai_flags = AI_PASSIVE | AI_NUMERICSERV,
	};

	q->gai = getaddrinfo(q->host, q->port, &hints, &q->found);
	if (q->gai == 0)
		return 0;
	return q->gai == EAI_SYSTEM && errno ? -errno : -EADDRNOTAVAIL;
}

/*
 * Splits "HOST:PORT", "[V6]:PORT", "[V6]", "HOST", a bare V6 address, "*:PORT", ":PORT" in place. *host
 * becomes NULL for every address of this machine, *port NULL for the default.
 */
static int split_host_port(char *text, char **host, char **port)
{
	char *colon = strrchr(text, ':');

	*host = text;
	*port = NULL;
	if (text[0] == '[') {
		char *end = strchr(text, ']');

		if (!end || (end[1] && end[1] != ':') || end == text + 1)
			return -EINVAL;
		*host = text + 1;
		if (end[1])
			*port = end + 2;
		*end = '\0';
	} else if (colon && colon == strchr(text, ':')) {
		*port = colon + 1;
		*colon = '\0';
	}
	if (*port && !**port)
		return -EINVAL;
	if (!**host && !*port)
		return -EINVAL;
	if (!**host || strcmp(*host, "*") == 0)
		*host = NULL;
	return 0;
}

/* All addresses in `found`. Those of a family that this machine lacks are left out while others work. */
CO_FN static int listen_found(const struct addrinfo *found, const char *host_port, struct err *err)
{
	unsigned opened = 0;
	int rc = -EADDRNOTAVAIL;

	for (const struct addrinfo *ai = found; ai; ai = ai->ai_next) {
		char text[ADDRESS_TEXT_MAX];
		struct sockaddr_storage addr = { 0 };

		rc = listen_address(ai);
		for (unsigned i = 0; rc == -EADDRINUSE && i < BUSY_TRIES; i++) {
			co_sleep(BUSY_PAUSE_NS);
			rc = listen_address(ai);
		}
		if (rc == 0) {
			opened++;
			continue;
		}
		if ((rc == -EAFNOSUPPORT || rc == -EADDRNOTAVAIL) && (opened || ai->ai_next))
			continue;
		memcpy(&addr, ai->ai_addr, MIN((size_t)ai->ai_addrlen, sizeof(addr)));
		address_format(&addr, text, sizeof(text));
		return err_set(err, rc, "cannot listen on %s (%s): %s%s", host_port, text,
			       strerrordesc_np(-rc),
			       rc == -EADDRINUSE
				       ? "; another server runs there, or choose with --listen"
			       : rc == -EACCES ? "; ports below 1024 are for root"
					       : "");
	}
	if (opened)
		return 0;
	return err_set(err, rc, "cannot listen on %s: this machine has no such address", host_port);
}

/* split_host_port() and the port as a number. `text` is a copy to be cut up. */
static int parse_address(const char *host_port, char *text, char **host, uint64_t *port, struct err *err)
{
	char *digits;

	*port = NBD_DEFAULT_PORT;
	if (split_host_port(text, host, &digits) < 0 ||
	    (digits && (parse_u64(digits, port) < 0 || *port > UINT16_MAX)))
		return err_set(
			err, -EINVAL,
			"'%s' is no address to listen on; write HOST:PORT, [V6]:PORT or HOST (port %d)",
			host_port, NBD_DEFAULT_PORT);
	return 0;
}

int listen_check(const char *host_port, struct err *err)
{
	_cleanup_free_ char *text = strdup(host_port);
	uint64_t port;
	char *host;

	return text ? parse_address(host_port, text, &host, &port, err) : err_set(err, -ENOMEM, "out of memory");
}

CO_FN int listen_tcp(const char *host_port, struct err *err)
{
	_cleanup_free_ char *text = strdup(host_port);
	char default_port[8];
	struct lookup q = { 0 };
	uint64_t number;
	char *host;
	int rc;

	if (!text)
		return err_set(err, -ENOMEM, "out of memory");
	rc = parse_address(host_port, text, &host, &number, err);
	if (rc < 0)
		return rc;
	(void)snprintf(default_port, sizeof(default_port), "%u",
		       (unsigned)number); /* five digits at most */

	q.host = host;
	q.port = default_port;
	rc = offload(look_up, &q);
	if (rc < 0)
		return err_set(err, rc, "cannot listen on %s: %s", host_port,
			       q.gai == EAI_SYSTEM ? strerrordesc_np(-rc) : gai_strerror(q.gai));
	rc = listen_found(q.found, host_port, err);
	freeaddrinfo(q.found);
	return rc;
}

/* Unix. */

struct unix_bind {
	const char *path;
	struct err *err;
	int fd;
	dev_t dev;
	ino_t ino;
};

/* bind, and once more after a stale file was removed. The folder is locked. */
static int bind_or_replace(const struct unix_bind *b, const struct sockaddr_un *addr)
{
	struct stat st;
	int rc;

	if (bind(b->fd, (const struct sockaddr *)addr, sizeof(*addr)) == 0)
		return 0;
	if (errno != EADDRINUSE)
		return err_set(b->err, -errno, "cannot make socket %s: %s", b->path,
			       strerrordesc_np(errno));
	if (lstat(b->path, &st) < 0)
		return err_set(b->err, -errno, "cannot look at %s: %s", b->path,
			       strerrordesc_np(errno));
	if (!S_ISSOCK(st.st_mode))
		return err_set(b->err, -EEXIST,
			       "%s exists and is not a socket; choose another path", b->path);
	rc = unixsock_is_served(addr, SOCK_STREAM);
	if (rc > 0)
		return err_set(b->err, -EADDRINUSE,
			       "another server listens at %s; stop it or choose another path",
			       b->path);
	if (rc < 0)
		return err_set(b->err, rc,
			       "%s exists, and whether a server listens there can't be told: %s",
			       b->path, strerrordesc_np(-rc));
	if (unlink(b->path) < 0 && errno != ENOENT)
		return err_set(b->err, -errno, "cannot remove the stale socket %s: %s", b->path,
			       strerrordesc_np(errno));
	log_info("stale socket removed path=%s", b->path);
	if (bind(b->fd, (const struct sockaddr *)addr, sizeof(*addr)) < 0)
		return err_set(b->err, -errno, "cannot make socket %s: %s", b->path,
			       strerrordesc_np(errno));
	return 0;
}

/*
 * Locks the folder against other starting servers: *folder is the caller's. They hold it for microseconds;
 * anybody else who locks it must not stop us, so after a second we go on without.
 */
static int lock_folder(const char *path, int *folder)
{
	_cleanup_free_ char *copy = strdup(path);
	const struct timespec pause = { .tv_nsec = 20000000 };
	int fd;

	if (!copy)
		return -ENOMEM;
	fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	for (unsigned i = 0; i < 50 && flock(fd, LOCK_EX | LOCK_NB) < 0; i++)
		(void)nanosleep(&pause, NULL); /* shorter does no harm */
	*folder = fd;
	return 0;
}

/* Of an offload thread: may wait for the folder's lock. */
static int open_unix(void *arg)
{
	struct unix_bind *b = arg;
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	_cleanup_close_ int folder = -1;
	_cleanup_close_ int fd = -1;
	struct stat st;
	int rc;

	if (!*b->path || strlen(b->path) >= sizeof(addr.sun_path))
		return err_set(b->err, -EINVAL,
			       "'%s' is no path for a socket: 1 to %zu bytes are allowed", b->path,
			       sizeof(addr.sun_path) - 1);
	memcpy(addr.sun_path, b->path, strlen(b->path) + 1);
	rc = lock_folder(b->path, &folder);
	if (rc < 0)
		return err_set(b->err, rc, "cannot make socket %s: its folder: %s", b->path,
			       strerrordesc_np(-rc));
	fd = b->fd = socket(AF_UNIX, SOCKET_FLAGS, 0);
	if (fd < 0)
		return err_set(b->err, -errno, "cannot make socket %s: %s", b->path,
			       strerrordesc_np(errno));

	rc = bind_or_replace(b, &addr);
	if (rc < 0)
		return rc;
	/* Before the lock goes: until listen() the file looks stale to others. */
	if (listen(fd, SOMAXCONN) < 0 || lstat(b->path, &st) < 0) {
		rc = err_set(b->err, -errno, "cannot listen at %s: %s", b->path,
			     strerrordesc_np(errno));
		(void)unlink(b->path); /* ours, made a moment ago */
		return rc;
	}
	b->dev = st.st_dev;
	b->ino = st.st_ino;
	(void)TAKE_FD(fd); /* it stays in b->fd */
	return 0;
}

CO_FN int listen_unix(const char *path, struct err *err)
{
	struct unix_bind b = { .path = path, .err = err, .fd = -1 };
	_cleanup_free_ char *copy = strdup(path);
	struct listener *l;
	int rc;

	if (!copy)
		return err_set(err, -ENOMEM, "out of memory");
	rc = offload(open_unix, &b);
	if (rc < 0)
		return rc;
	l = listener_add(b.fd, true);
	if (!l) {
		(void)unlink(path); /* ours, made a moment ago */
		return err_set(err, -ENOMEM, "out of memory");
	}
	l->path = TAKE_PTR(copy);
	l->path_dev = b.dev;
	l->path_ino = b.ino;
	log_info("listening path=%s", path);
	return 0;
}

/* systemd. */

#ifdef HAVE_SYSTEMD
/* One socket that was passed in. It stays systemd's: shared, so never shut down, only closed. */
static int adopt(int fd, struct err *err)
{
	struct sockaddr_storage addr = { 0 };
	socklen_t addr_len = sizeof(addr);
	char text[ADDRESS_TEXT_MAX];
	int fl = fcntl(fd, F_GETFL);
	int rc = 0;

	if (sd_is_socket(fd, AF_UNSPEC, SOCK_STREAM, 1) <= 0 || fl < 0 ||
	    getsockname(fd, (struct sockaddr *)&addr, &addr_len) < 0)
		return err_set(
			err, -ENOTSOCK,
			"systemd passed a descriptor (%d) that is no listening stream socket; "
			"use ListenStream= in the socket unit",
			fd);
	if (addr.ss_family != AF_UNIX)
		rc = set_tcp_options(fd);
	if (rc == 0 && fcntl(fd, F_SETFL, fl | O_NONBLOCK) < 0)
		rc = -errno;
	if (rc < 0)
		return err_set(err, rc, "cannot set up a socket that systemd passed: %s",
			       strerrordesc_np(-rc));
	if (!listener_add(fd, addr.ss_family == AF_UNIX))
		return err_set(err, -ENOMEM, "out of memory");
	address_format(&addr, text, sizeof(text));
	log_info("listening address=%s from=systemd", text);
	return 0;
}

int listen_systemd(struct err *err)
{
	char **names = NULL;
	int n = sd_listen_fds_with_names(1, &names);
	int adopted = 0, rc = 0;

	if (n < 0)
		return err_set(err, n, "cannot take the sockets of systemd: %s",
			       strerrordesc_np(-n));
	for (int i = 0; i < n; i++) {
		/* Not listening sockets: connections that were kept (cmd/fdstore.c). */
		if (rc == 0 && !handover_is_kept(names[i])) {
			rc = adopt(SD_LISTEN_FDS_START + i, err);
			adopted++;
		}
		free(names[i]);
	}
	free(names);
	return rc < 0 ? rc : adopted;
}
#else
int listen_systemd(struct err *err)
{
	const char *pid = getenv("LISTEN_PID");
	uint64_t number;

	if (!pid || parse_u64(pid, &number) < 0 || number != (uint64_t)getpid())
		return 0;
	return err_set(
		err, -EOPNOTSUPP,
		"systemd passes sockets, but this nbdrsd was built without libsystemd; build it with "
		"libsystemd-dev installed, or use --listen and --unix");
}
#endif

/* The next nbdrsd. */

int listeners_save(struct handover *h)
{
	list_for_each(l, &listeners, struct listener, node)
	{
		struct handover_listener *to = handover_add_listener(h);

		if (!to)
			return -ENOMEM;
		to->fd = l->fd;
		to->is_unix = l->is_unix;
		to->dev = l->path_dev;
		to->ino = l->path_ino;
		to->path = l->path ? strdup(l->path) : NULL;
		if (l->path && !to->path)
			return -ENOMEM;
	}
	return 0;
}

void listeners_forget(void)
{
	list_for_each(l, &listeners, struct listener, node)
	{
		list_del(&l->node);
		free(l->path);
		free(l);
	}
}

int listeners_adopt(struct handover *h, struct err *err)
{
	for (size_t i = 0; i < h->listeners_n; i++) {
		struct handover_listener *from = &h->listeners[i];
		struct listener *l = listener_add(from->fd, from->is_unix);

		if (!l)
			return err_set(err, -ENOMEM, "out of memory");
		l->path = TAKE_PTR(from->path);
		l->path_dev = from->dev;
		l->path_ino = from->ino;
	}
	log_info("listening sockets taken over n=%zu", h->listeners_n);
	return 0;
}
