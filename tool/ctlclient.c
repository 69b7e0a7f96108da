/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Client of the control socket: see ctlclient.h. The socket's own time limits (SO_SNDTIMEO covers
 * connect(2) on unix sockets, too) do the waiting, so a hung daemon costs `timeout_ms` and not forever.
 */
#include "ctlclient.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include "nbdrs/ctl.h"

struct ctl_client {
	int fd;
	unsigned timeout_ms;
	bool was_answered;
	char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
	char *buf; /* CTL_MAX_PACKET bytes, of the packet being received */
};

static int set_timeouts(int fd, unsigned ms)
{
	/* 0 would mean "forever". */
	struct timeval tv = { .tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000 + (ms == 0) };

	if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv)) ||
	    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv)))
		return -errno;
	return 0;
}

static int connect_error(int rc, const char *path, unsigned timeout_ms, struct err *err)
{
	switch (rc) {
	case -ENOENT:
	case -ENOTDIR:
	case -ECONNREFUSED:
		return err_set(err, -ECONNREFUSED,
			       "no daemon answers at %s; start it (systemctl start nbdrs), or name its "
			       "socket by --control PATH",
			       path);
	case -EACCES:
	case -EPERM:
		return err_set(err, -EACCES,
			       "%s: permission denied; run as root, or as a member of the daemon's "
			       "--control-group",
			       path);
	case -EAGAIN:
		return err_set(err, -ETIMEDOUT,
			       "%s: the daemon did not take the connection within %u.%03u s: it hangs "
			       "or is overloaded",
			       path, timeout_ms / 1000, timeout_ms % 1000);
	case -EPROTOTYPE:
		return err_set(err, -EINVAL,
			       "%s is not the control socket of nbdrsd (wrong socket type); name that "
			       "by --control PATH",
			       path);
	default:
		return err_set(err, rc, "cannot connect to %s: %s", path, strerror(-rc));
	}
}

int ctl_open(const char *path, unsigned timeout_ms, struct ctl_client **out, struct err *err)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	_cleanup_ctl_ struct ctl_client *c = NULL;
	size_t len;
	int rc;

	if (!path)
		path = CTL_DEFAULT_PATH;
	len = strlen(path);
	if (len == 0 || len >= sizeof(sa.sun_path))
		return err_set(err, -EINVAL, "'%s' cannot be a socket's path: it must have 1 to %zu bytes",
			       path, sizeof(sa.sun_path) - 1);
	memcpy(sa.sun_path, path, len + 1);

	c = calloc(1, sizeof(*c));
	if (!c)
		return err_set(err, -ENOMEM, "out of memory");
	c->fd = -1;
	c->timeout_ms = timeout_ms;
	memcpy(c->path, path, len + 1);
	c->buf = malloc(CTL_MAX_PACKET);
	if (!c->buf)
		return err_set(err, -ENOMEM, "out of memory");

	c->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (c->fd < 0)
		return err_set(err, -errno, "cannot make a socket: %s", strerror(errno));
	rc = set_timeouts(c->fd, timeout_ms);
	if (rc)
		return err_set(err, rc, "cannot set the time limit of a socket: %s", strerror(-rc));
	do
		rc = connect(c->fd, (struct sockaddr *)&sa, sizeof(sa)) ? -errno : 0;
	while (rc == -EINTR);
	if (rc)
		return connect_error(rc, path, timeout_ms, err);
	*out = TAKE_PTR(c);
	return 0;
}

void ctl_close(struct ctl_client *c)
{
	if (!c)
		return;
	if (c->fd >= 0)
		(void)close(c->fd);
	free(c->buf);
	free(c);
}

static int transport_error(const struct ctl_client *c, int rc, const char *what, struct err *err)
{
	if (rc == -EAGAIN)
		return err_set(err, -ETIMEDOUT, "%s: the daemon did not answer within %u.%03u s", c->path,
			       c->timeout_ms / 1000, c->timeout_ms % 1000);
	if (rc == -EPIPE || rc == -ECONNRESET)
		return err_set(err, -ECONNRESET,
			       "%s: the daemon closed the connection; see its log "
			       "(journalctl -u nbdrs)",
			       c->path);
	return err_set(err, rc, "%s: cannot %s: %s", c->path, what, strerror(-rc));
}

int ctl_send(struct ctl_client *c, json_t *request, struct err *err)
{
	_cleanup_json_ json_t *req = request;
	_cleanup_free_ char *text = NULL;
	size_t len;
	ssize_t n;

	c->was_answered = false;
	if (!req || json_object_set_new(req, "nbdrs", json_integer(CTL_VERSION)))
		return err_set(err, -ENOMEM, "out of memory, or text that is not UTF-8 in a request");
	text = json_dumps(req, JSON_COMPACT);
	if (!text)
		return err_set(err, -ENOMEM, "out of memory");
	len = strlen(text);
	if (len > CTL_MAX_PACKET)
		return err_set(err, -EMSGSIZE, "a request of %zu bytes; the daemon takes up to %d", len,
			       CTL_MAX_PACKET);
	do
		n = send(c->fd, text, len, MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	if (n >= 0)
		return 0;
	/* A daemon that refuses this client says why before it closes, perhaps before anything is asked. */
	if (errno == EPIPE) {
		_cleanup_json_ json_t *unasked = NULL;
		int rc = ctl_recv(c, &unasked, NULL, NULL, err);

		if (rc)
			return rc;
		errno = EPIPE;
	}
	return transport_error(c, -errno, "send", err);
}

/* The descriptors of a message into `fds` (room for CTL_MAX_FDS); returns their number. */
static unsigned take_fds(struct msghdr *msg, int *fds)
{
	unsigned n = 0;

	for (struct cmsghdr *m = CMSG_FIRSTHDR(msg); m; m = CMSG_NXTHDR(msg, m)) {
		size_t bytes;

		if (m->cmsg_level != SOL_SOCKET || m->cmsg_type != SCM_RIGHTS)
			continue;
		bytes = m->cmsg_len - CMSG_LEN(0);
		memcpy(fds + n, CMSG_DATA(m), bytes);
		n += (unsigned)(bytes / sizeof(int));
	}
	return n;
}

/* The number that a name like "ENOENT" stands for; EIO for an unknown one. */
static int errno_of(const char *name)
{
	for (int e = 1; name && e < 200; e++)
		if (strcmp(err_name(e), name) == 0)
			return e;
	return EIO;
}

static int check_reply(struct ctl_client *c, const json_t *reply, struct err *err)
{
	json_t *ok = json_object_get(reply, "ok");
	const char *text;

	if (!json_is_boolean(ok))
		return err_set(err, -EPROTO, "%s: what answers is not nbdrsd, or not this version of it",
			       c->path);
	if (json_is_true(ok)) {
		if (json_integer_value(json_object_get(reply, "nbdrs")) != CTL_VERSION)
			return err_set(err, -EPROTO,
				       "%s: the daemon speaks version %" JSON_INTEGER_FORMAT
				       " of the control protocol, this tool %d: bring both to the same release",
				       c->path, json_integer_value(json_object_get(reply, "nbdrs")),
				       CTL_VERSION);
		return 0;
	}
	c->was_answered = true;
	text = json_string_value(json_object_get(reply, "error"));
	return err_set(err, -errno_of(json_string_value(json_object_get(reply, "errno"))), "%s",
		       text ? text : "the daemon refused, and did not say why");
}

/* One packet into c->buf; its length, and up to CTL_MAX_FDS descriptors (the caller's). */
static ssize_t recv_packet(struct ctl_client *c, int *fds, unsigned *fds_n, struct err *err)
{
	union {
		char buf[CMSG_SPACE(CTL_MAX_FDS * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec iov = { .iov_base = c->buf, .iov_len = CTL_MAX_PACKET };
	struct msghdr msg = { .msg_iov = &iov,
			      .msg_iovlen = 1,
			      .msg_control = control.buf,
			      .msg_controllen = sizeof(control.buf) };
	ssize_t n;

	do
		n = recvmsg(c->fd, &msg, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return transport_error(c, -errno, "receive", err);
	*fds_n = take_fds(&msg, fds);
	if (n == 0)
		return transport_error(c, -ECONNRESET, "receive", err);
	if (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
		return err_set(err, -EPROTO, "%s: a reply of the daemon was cut off", c->path);
	return n;
}

int ctl_recv(struct ctl_client *c, json_t **reply, int *fds, unsigned *fds_n, struct err *err)
{
	const unsigned room = fds && fds_n ? *fds_n : 0;
	_cleanup_json_ json_t *j = NULL;
	int got[CTL_MAX_FDS];
	unsigned got_n = 0;
	ssize_t n;
	int rc;

	c->was_answered = false;
	n = recv_packet(c, got, &got_n, err);
	rc = n < 0 ? (int)n : 0;
	if (!rc) {
		j = json_loadb(c->buf, (size_t)n, JSON_REJECT_DUPLICATES, NULL);
		rc = check_reply(c, j, err);
	}
	if (!rc && got_n > room)
		rc = err_set(err, -EPROTO, "%s: the daemon sent %u sockets, %u were expected", c->path,
			     got_n, room);
	if (rc) {
		for (unsigned i = 0; i < got_n; i++)
			(void)close(got[i]);
		return rc;
	}
	if (fds && fds_n) {
		memcpy(fds, got, got_n * sizeof(int));
		*fds_n = got_n;
	}
	*reply = TAKE_PTR(j);
	return 0;
}

int ctl_call(struct ctl_client *c, json_t *request, json_t **reply, struct err *err)
{
	int rc = ctl_send(c, request, err);

	return rc ? rc : ctl_recv(c, reply, NULL, NULL, err);
}

bool ctl_has_more(const json_t *reply)
{
	return json_is_true(json_object_get(reply, "more"));
}

bool ctl_was_answered(const struct ctl_client *c)
{
	return c->was_answered;
}
