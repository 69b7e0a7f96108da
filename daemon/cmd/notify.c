/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * sd_notify(3): by libsystemd, or by the few lines that the protocol takes.
 */
#include "cmd/cmd.h"

#include <errno.h>
#include <string.h>

#include "nbdrs/cleanup.h"

#ifdef HAVE_SYSTEMD
#include <systemd/sd-daemon.h>

static int notify(const char *state)
{
	int rc = sd_notify(0, state);

	return rc < 0 ? rc : 0;
}
#else
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

/* A datagram to the socket named by $NOTIFY_SOCKET; "@" begins an abstract name. */
static int notify(const char *state)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	const char *path = getenv("NOTIFY_SOCKET");
	_cleanup_close_ int fd = -1;
	size_t len;

	if (!path || !*path)
		return 0;
	len = strlen(path);
	if ((path[0] != '/' && path[0] != '@') || len >= sizeof(sa.sun_path))
		return -EINVAL;
	memcpy(sa.sun_path, path, len);
	if (path[0] == '@')
		sa.sun_path[0] = '\0';
	fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	if (sendto(fd, state, strlen(state), MSG_NOSIGNAL, (struct sockaddr *)&sa,
		   (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len)) < 0)
		return -errno;
	return 0;
}
#endif

void notify_manager(const char *state)
{
	int rc = notify(state);

	if (rc)
		log_warn("cannot notify the service manager error=%s", err_name(rc));
}
