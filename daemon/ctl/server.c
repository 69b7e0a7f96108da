/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The control socket's server: who may connect, packets in and out, dispatch (nbdrs/ctl.h).
 *
 * One fiber accepts, one serves each client; all on reactor 0. A client is
 *
 *	accepted -> (peer not allowed or too many: refused, closed)
 *	waiting for a packet -> answering -> waiting ...
 *	closed: end of stream, IDLE_NS without a packet, SEND_NS without taking an answer, ctl_stop
 *
 * What a client can make grow is capped: CLIENTS_MAX clients, one packet of CTL_MAX_PACKET bytes each,
 * and that only while it is being worked on. Descriptors that a client sends are never received.
 */
#include "ctl/ctl_int.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>

#include "nbdrs/ctl.h"
#include "nbdrs/io.h"
#include "nbdrs/log.h"
#include "nbdrs/reactor.h"
#include "nbdrs/unixsock.h"

enum { CLIENTS_MAX = 32, JSON_DEPTH_MAX = 8, BACKLOG = 128 };

#define IDLE_NS (60 * UINT64_C(1000000000))
#define SEND_NS (10 * UINT64_C(1000000000))
#define PAUSE_NS UINT64_C(100000000) /* after an accept that failed */

uint64_t ctl_started_ns;

static struct server {
	int fd;
	char *path;
	dev_t dev; /* of the socket file, so that only our own is removed */
	ino_t ino;
	gid_t group;
	bool has_group, is_stopping, is_accepting;
	struct list peers; /* struct ctl_peer */
	unsigned peers_n;
	struct co *stopper; /* fiber in ctl_stop */
} server = { .fd = -1 };

static const struct ctl_cmd commands[] = {
	{ "version", ctl_cmd_version },	  { "status", ctl_cmd_status },
	{ "attach", ctl_cmd_attach },	  { "attached", ctl_cmd_attached },
	{ "detached", ctl_cmd_detached }, { "device", ctl_cmd_device },
	{ "resize", ctl_cmd_resize },	  { "upgrade", ctl_cmd_upgrade },
};

json_t *ctl_text(const char *s)
{
	json_t *j = json_string(s);
	_cleanup_free_ char *ascii = NULL;

	if (j)
		return j;
	ascii = strdup(s);
	for (char *p = ascii; p && *p; p++)
		if (*p & 0x80)
			*p = '?';
	return ascii ? json_string(ascii) : NULL;
}

const char *ctl_get_text(json_t *req, const char *key, bool *bad)
{
	json_t *j = json_object_get(req, key);

	*bad = j && !json_is_string(j);
	return json_string_value(j);
}

/* --- Packets ------------------------------------------------------------------------------------ */

static CO_FN int send_packet(struct ctl_peer *p, json_t *reply, const int *fds, unsigned n)
{
	union {
		char buf[CMSG_SPACE(CTL_MAX_FDS * sizeof(int))];
		struct cmsghdr align;
	} control;
	_cleanup_free_ char *text = json_dumps(reply, JSON_COMPACT);
	struct iovec iov = { .iov_base = text, .iov_len = text ? strlen(text) : 0 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
	ssize_t rc;

	if (!text)
		return -ENOMEM;
	if (iov.iov_len > CTL_MAX_PACKET)
		return -EMSGSIZE;
	if (n) {
		struct cmsghdr *m;

		memset(&control, 0, sizeof(control));
		msg.msg_control = control.buf;
		msg.msg_controllen = CMSG_SPACE(n * sizeof(int));
		m = CMSG_FIRSTHDR(&msg);
		m->cmsg_level = SOL_SOCKET;
		m->cmsg_type = SCM_RIGHTS;
		m->cmsg_len = CMSG_LEN(n * sizeof(int));
		memcpy(CMSG_DATA(m), fds, n * sizeof(int));
	}
	rc = io_sendmsg(p->fd, &msg, now_ns() + SEND_NS);
	return rc < 0 ? (int)rc : 0;
}

int ctl_answer(struct ctl_peer *p, json_t *reply, const int *fds, unsigned n)
{
	_cleanup_json_ json_t *j = reply;

	if (!j || json_object_set_new(j, "nbdrs", json_integer(CTL_VERSION)) ||
	    json_object_set_new(j, "ok", json_true()))
		return -ENOMEM;
	return send_packet(p, j, fds, n);
}

int ctl_refuse(struct ctl_peer *p, int rc, const char *fmt, ...)
{
	_cleanup_json_ json_t *j = NULL;
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	(void)vsnprintf(text, sizeof(text), fmt, ap); /* cut off is good enough */
	va_end(ap);
	j = json_pack("{s:i, s:b, s:s, s:o}", "nbdrs", CTL_VERSION, "ok", 0, "errno", err_name(rc),
		      "error", ctl_text(text));
	return j ? send_packet(p, j, NULL, 0) : -ENOMEM;
}

/*
 * True when brackets nest deeper than a request ever does. jansson's parser recurses, up to 2048 deep,
 * which a fiber's stack would not survive.
 */
static bool is_too_deep(const char *text, size_t len)
{
	bool in_string = false;
	unsigned depth = 0;

	for (size_t i = 0; i < len; i++) {
		const char c = text[i];

		if (in_string) {
			if (c == '\\')
				i++;
			else if (c == '"')
				in_string = false;
		} else if (c == '"') {
			in_string = true;
		} else if (c == '[' || c == '{') {
			if (++depth > JSON_DEPTH_MAX)
				return true;
		} else if ((c == ']' || c == '}') && depth > 0) {
			depth--;
		}
	}
	return false;
}

/* Parses and runs one request. 0, or -errno to close the client. */
static CO_FN int handle(struct ctl_peer *p, const char *text, size_t len)
{
	_cleanup_json_ json_t *req = NULL;
	json_error_t where;
	const char *cmd;
	bool bad;

	if (is_too_deep(text, len))
		return ctl_refuse(p, -EINVAL, "a request nests at most %d deep", JSON_DEPTH_MAX);
	req = json_loadb(text, len, JSON_REJECT_DUPLICATES, &where);
	if (!req)
		return ctl_refuse(p, -EINVAL, "not JSON: byte %d: %s", where.position, where.text);
	if (!json_is_object(req))
		return ctl_refuse(p, -EINVAL, "a request is a JSON object");
	if (!json_is_integer(json_object_get(req, "nbdrs")) ||
	    json_integer_value(json_object_get(req, "nbdrs")) != CTL_VERSION)
		return ctl_refuse(p, -EPROTO,
				  "this daemon (nbdrsd %s) speaks version %d of the control protocol "
				  "(\"nbdrs\": %d), the request does not: bring tool and daemon to the "
				  "same release",
				  NBDRS_VERSION, CTL_VERSION, CTL_VERSION);
	cmd = ctl_get_text(req, "cmd", &bad);
	if (!cmd)
		return ctl_refuse(p, -EINVAL, "a request needs \"cmd\", a string");
	for (size_t i = 0; i < ARRAY_LEN(commands); i++)
		if (strcmp(cmd, commands[i].name) == 0)
			return commands[i].run(p, req);
	return ctl_refuse(p, -EOPNOTSUPP,
			  "unknown command '%.64s'; there are version, status, attach, attached, detached, device, "
			  "resize, upgrade",
			  cmd);
}

/* --- Clients ------------------------------------------------------------------------------------ */

static bool is_in_group(int fd, gid_t group)
{
	_cleanup_free_ gid_t *groups = NULL;
	socklen_t len = 0;

	/* A length that is too short gives ERANGE and the one that is needed. */
	if (!getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, NULL, &len) || errno != ERANGE)
		return false;
	groups = malloc(len);
	if (!groups || getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, &len))
		return false;
	for (size_t i = 0; i < len / sizeof(*groups); i++)
		if (groups[i] == group)
			return true;
	return false;
}

static bool is_allowed(const struct ctl_peer *p)
{
	if (p->cred.uid == 0 || p->cred.uid == geteuid())
		return true;
	return server.has_group &&
	       (p->cred.gid == server.group || is_in_group(p->fd, server.group));
}

/* One packet; its length, 0 = end of stream, or -errno. */
static CO_FN ssize_t recv_packet(const struct ctl_peer *p, char *buf)
{
	struct iovec iov = { .iov_base = buf, .iov_len = CTL_MAX_PACKET };
	/* No room for control data: the kernel drops descriptors that come along. */
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
	ssize_t n = io_recvmsg(p->fd, &msg, now_ns() + IDLE_NS);

	return n > 0 && (msg.msg_flags & MSG_TRUNC) ? -EMSGSIZE : n;
}

static CO_FN int serve_one(struct ctl_peer *p)
{
	_cleanup_free_ char *buf = NULL;
	ssize_t n;
	int rc;

	/* Waits first, so that an idle client holds no buffer. */
	rc = io_poll(p->fd, POLLIN, now_ns() + IDLE_NS);
	if (rc < 0)
		return rc;
	buf = malloc(CTL_MAX_PACKET);
	if (!buf)
		return -ENOMEM;
	n = recv_packet(p, buf);
	if (n == -EMSGSIZE) {
		(void)ctl_refuse(p, -EMSGSIZE, "a request has at most %d bytes", CTL_MAX_PACKET);
		return -EMSGSIZE;
	}
	if (n <= 0)
		return n == 0 ? -ECONNRESET : (int)n;
	return handle(p, buf, (size_t)n);
}

/*
 * Closes so that the last answer is read: a unix socket that is closed with unread requests gives the
 * client ECONNRESET, in place of what was sent to it. So no more may come, and what came is taken off.
 */
static void close_politely(int fd)
{
	char c;

	(void)shutdown(fd, SHUT_RDWR); /* the other end may be gone already */
	while (recv(fd, &c, 1, MSG_DONTWAIT) > 0)
		continue; /* a packet is gone with its first byte; the client's buffer bounds them */
	(void)close(fd);
}

static void wake_stopper(void)
{
	if (server.stopper)
		co_wake(server.stopper);
}

static CO_FN void peer_main(void *arg)
{
	struct ctl_peer *p = arg;
	int rc = 0;

	if (!is_allowed(p)) {
		log_warn("control client refused uid=%u pid=%d", p->cred.uid, p->cred.pid);
		(void)ctl_refuse(p, -EACCES,
				 "user %u may not control this daemon; run as root, or as a member of "
				 "its --control-group",
				 p->cred.uid);
		rc = -EACCES;
	}
	while (!rc && !server.is_stopping)
		rc = serve_one(p);
	log_debug("control client gone pid=%d why=%s", p->cred.pid, rc ? err_name(rc) : "stopping");
	list_del(&p->node);
	server.peers_n--;
	close_politely(p->fd);
	free(p);
	wake_stopper();
}

/* Takes fd. */
static CO_FN void peer_start(int fd)
{
	struct ctl_peer *p = calloc(1, sizeof(*p));
	struct ctl_peer full = { .fd = fd };
	socklen_t len = sizeof(p->cred);

	if (!p || server.peers_n >= CLIENTS_MAX) {
		(void)ctl_refuse(&full, -EBUSY, "%d control clients are connected already; try again",
				 CLIENTS_MAX);
		close_politely(fd);
		free(p);
		return;
	}
	p->fd = fd;
	list_add(&server.peers, &p->node);
	server.peers_n++;
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &p->cred, &len) || co_spawn(peer_main, p)) {
		log_warn("control client dropped: out of memory");
		list_del(&p->node);
		server.peers_n--;
		(void)close(fd);
		free(p);
	}
}

/*
 * accept4 and not io_accept: a listening unix socket that was shut down says "not now" to a
 * non-blocking accept, and "ready" to poll, for ever.
 */
static CO_FN void accept_main(void *arg)
{
	struct log_gate gate = { 0 };
	unsigned suppressed;

	(void)arg; /* there is one server */
	while (!server.is_stopping) {
		int fd, rc = io_poll(server.fd, POLLIN, IO_FOREVER);

		if (server.is_stopping)
			break;
		fd = rc < 0 ? rc : accept4(server.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
		if (fd >= 0) {
			peer_start(fd);
			continue;
		}
		rc = rc < 0 ? rc : -errno;
		if (rc == -EAGAIN || rc == -EINTR || rc == -ECONNABORTED)
			continue;
		/* Out of descriptors or memory: the client waits in the backlog meanwhile. */
		if (log_gate_open(&gate, &suppressed))
			log_warn("cannot accept a control client error=%s suppressed=%u", err_name(rc),
				 suppressed);
		co_sleep(PAUSE_NS);
	}
	server.is_accepting = false;
	wake_stopper();
}

/* --- Start and stop ----------------------------------------------------------------------------- */

/* All the blocking calls of the start, on a thread of the pool. */
struct setup {
	const char *path, *group;
	struct sockaddr_un sa;
	struct err *err;
	struct stat st;
	gid_t gid;
	int fd;
};

static int find_group(struct setup *s)
{
	struct group g, *found = NULL;
	int rc = ERANGE;

	/* The member list of a large group needs room. */
	for (size_t room = 4096; rc == ERANGE && room <= 1 << 20; room *= 4) {
		_cleanup_free_ char *buf = malloc(room);

		if (!buf)
			return err_set(s->err, -ENOMEM, "out of memory");
		rc = getgrnam_r(s->group, &g, buf, room, &found);
		if (found)
			s->gid = found->gr_gid; /* g's strings end with buf */
	}
	if (!found)
		return err_set(s->err, -EINVAL, "--control-group: there is no group '%s' on this machine",
			       s->group);
	return 0;
}

/* Makes the socket's folder when it is missing, and locks it: *dir_fd is the caller's. */
static int lock_folder(struct setup *s, int *dir_fd)
{
	_cleanup_free_ char *dir = strdup(s->path);
	char *slash = dir ? strrchr(dir, '/') : NULL;
	const struct timespec pause = { .tv_nsec = 20 * 1000 * 1000 };
	const char *name = ".";
	int fd;

	if (!dir)
		return err_set(s->err, -ENOMEM, "out of memory");
	if (slash) {
		slash[slash == dir] = '\0'; /* "/x" is in "/" */
		name = dir;
	}
	/* The umask must not lock the group out of a folder that is ours to make. */
	if (mkdir(name, 0755) == 0)
		(void)chmod(name, 0755);
	else if (errno != EEXIST)
		return err_set(s->err, -errno, "control socket: cannot make the folder %s: %s", name,
			       strerror(errno));
	fd = open(name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return err_set(s->err, -errno, "control socket: cannot open the folder %s: %s", name,
			       strerror(errno));
	/* Another starting daemon holds it for microseconds; anybody else must not stop us for long. */
	for (unsigned i = 0; flock(fd, LOCK_EX | LOCK_NB) && i < 50; i++)
		(void)nanosleep(&pause, NULL);
	*dir_fd = fd;
	return 0;
}

/* Removes a socket file nobody listens at; the folder is locked. */
static int clear_stale(struct setup *s)
{
	struct stat st;

	if (lstat(s->path, &st))
		return 0;
	if (!S_ISSOCK(st.st_mode))
		return err_set(s->err, -EEXIST,
			       "control socket: %s exists and is no socket; remove it, or name another "
			       "path by --control",
			       s->path);
	if (unixsock_is_served(&s->sa, SOCK_SEQPACKET))
		return err_set(s->err, -EADDRINUSE,
			       "control socket: another program serves %s; stop it, or give this one "
			       "--control PATH (or none)",
			       s->path);
	if (unlink(s->path))
		return err_set(s->err, -errno, "control socket: cannot remove the stale %s: %s", s->path,
			       strerror(errno));
	return 0;
}

static int bind_socket(struct setup *s)
{
	_cleanup_close_ int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	const char *what = "bind to";
	int rc = 0;

	if (fd < 0)
		return err_set(s->err, -errno, "cannot make a socket: %s", strerror(errno));
	if (bind(fd, (struct sockaddr *)&s->sa, sizeof(s->sa)))
		return err_set(s->err, -errno, "control socket: cannot bind to %s: %s", s->path,
			       strerror(errno));
	/* Nobody can connect before listen(), so there is no moment with the wrong mode. */
	if (s->group && chown(s->path, (uid_t)-1, s->gid)) {
		rc = -errno;
		what = "give to the group";
	} else if (chmod(s->path, 0660)) {
		rc = -errno;
		what = "set the mode of";
	} else if (lstat(s->path, &s->st)) {
		rc = -errno;
		what = "look at";
	} else if (listen(fd, BACKLOG)) {
		rc = -errno;
		what = "listen at";
	}
	if (rc) {
		(void)unlink(s->path);
		return err_set(s->err, rc, "control socket: cannot %s %s: %s", what, s->path,
			       strerror(-rc));
	}
	s->fd = TAKE_FD(fd);
	return 0;
}

static int setup_run(void *arg)
{
	struct setup *s = arg;
	_cleanup_close_ int dir_fd = -1;
	int rc = s->group ? find_group(s) : 0;

	if (!rc)
		rc = lock_folder(s, &dir_fd);
	if (!rc)
		rc = clear_stale(s);
	if (!rc)
		rc = bind_socket(s);
	return rc;
}

static int remove_socket(void *arg)
{
	const struct server *srv = arg;
	struct stat st;

	/* Somebody may have put another one there. */
	if (lstat(srv->path, &st) == 0 && st.st_dev == srv->dev && st.st_ino == srv->ino)
		(void)unlink(srv->path);
	return 0;
}

int ctl_start(const char *path, const char *group, struct err *err)
{
	struct setup s = { .path = path, .group = group, .err = err, .fd = -1 };
	const size_t len = strlen(path);
	int rc;

	if (len == 0 || len >= sizeof(s.sa.sun_path))
		return err_set(err, -EINVAL, "--control: '%s' cannot be a socket's path: it must have 1 to %zu bytes",
			       path, sizeof(s.sa.sun_path) - 1);
	s.sa.sun_family = AF_UNIX;
	memcpy(s.sa.sun_path, path, len + 1);
	rc = offload(setup_run, &s);
	if (rc)
		return rc;
	/* Reads the seed of the hash tables from the kernel here, not amid the first request. */
	json_object_seed(0);
	server = (struct server){ .fd = s.fd,
				  .path = strdup(path),
				  .dev = s.st.st_dev,
				  .ino = s.st.st_ino,
				  .group = s.gid,
				  .has_group = group != NULL,
				  .is_accepting = true };
	list_init(&server.peers);
	ctl_started_ns = now_ns();
	if (!server.path || co_spawn(accept_main, NULL)) {
		server.is_accepting = false;
		ctl_stop();
		return err_set(err, -ENOMEM, "control socket: out of memory");
	}
	return 0;
}

void ctl_stop(void)
{
	if (server.fd < 0)
		return;
	server.is_stopping = true;
	if (server.path)
		(void)offload(remove_socket, &server); /* stays behind when it fails: stale, replaced later */
	server.stopper = co_self();
	/* Ends the wait for a client (POLLHUP) and waiting receives (end of stream). */
	(void)shutdown(server.fd, SHUT_RDWR);
	list_for_each(p, &server.peers, struct ctl_peer, node)
		(void)shutdown(p->fd, SHUT_RDWR);
	while (server.is_accepting || server.peers_n > 0)
		co_park();
	(void)close(server.fd);
	free(server.path);
	ctl_devices_free();
	server = (struct server){ .fd = -1 };
}
