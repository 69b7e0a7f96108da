/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Putting new sockets where dead ones are: see reattach.h.
 *
 * RECONFIGURE says 0 also when the kernel dropped a socket, because the death of the old one had not
 * reached it yet. The daemon sees the other end closed then, at once: the tool has closed its own before it
 * asks. So the daemon's count of working connections decides, and what is missing is tried again.
 */
#include "reattach.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "child.h"
#include "ctlclient.h"
#include "driver.h"
#include "nbdrs/cleanup.h"
#include "nl.h"
#include "sysfs.h"

enum { PAUSE_MIN_MS = 5, PAUSE_MAX_MS = 200 };

const char *const link_state_names[] = { "live", "cut off", "waiting", "orphaned", "foreign" };

static json_t *request(const char *cmd, const struct device *d)
{
	return json_pack("{s:s, s:s, s:o}", "cmd", cmd, "backend_id", d->backend, "device",
			 json_sprintf("/dev/%s", d->name));
}

/* How many connections are missing. */
static int ask_missing(struct ctl_client *c, const struct device *d, unsigned *missing, struct err *err)
{
	_cleanup_json_ json_t *reply = NULL;
	const unsigned want = MAX(d->connections, 1u);
	json_int_t alive;
	int rc = ctl_call(c, request("device", d), &reply, err);

	if (rc)
		return rc;
	alive = json_integer_value(json_object_get(reply, "alive"));
	*missing = alive < 0 || alive >= want ? 0 : want - (unsigned)alive;
	/* Requests of a file system on it are waiting: they must not reach another image. */
	if (*missing && (uint64_t)json_integer_value(json_object_get(reply, "size")) / 512 * 512 != d->size)
		return err_set(err, -ESTALE, "/dev/%s has %llu bytes, and what is served by that name does not",
			       d->name, (unsigned long long)d->size);
	return 0;
}

enum link_state reattach_look(const char *control, const struct device *d, unsigned limit_ms,
			      unsigned *missing, struct err *err)
{
	_cleanup_ctl_ struct ctl_client *c = NULL;
	unsigned n = 0;
	int rc;

	if (!d->export[0])
		return LINK_FOREIGN;
	rc = ctl_open(control, limit_ms, &c, err);
	if (!rc)
		rc = ask_missing(c, d, &n, err);
	if (missing)
		*missing = n;
	if (rc)
		return rc == -ESTALE || (rc == -ENOENT && c && ctl_was_answered(c)) ? LINK_ORPHAN
										   : LINK_WAITING;
	return n ? LINK_CUT : LINK_LIVE;
}

/* Gets `n` sockets from the daemon and gives them to the kernel, which may drop some. */
static int give(struct ctl_client *c, const struct device *d, unsigned n, struct err *err)
{
	_cleanup_json_ json_t *wish = request("attach", d), *reply = NULL;
	int socks[NL_SOCKS_MAX];
	unsigned got = NL_SOCKS_MAX;
	int rc;

	if (!wish || json_object_set_new(wish, "connections", json_integer(n)) ||
	    json_object_set_new(wish, "size", json_integer((json_int_t)d->size)) ||
	    json_object_set_new(wish, "read_only", json_boolean(d->is_read_only)))
		return err_set(err, -ENOMEM, "out of memory");
	rc = ctl_send(c, TAKE_PTR(wish), err);
	if (!rc)
		rc = ctl_recv(c, &reply, socks, &got, err);
	if (rc)
		return rc;
	rc = driver_reconfigure(d->index, d->backend, socks, got, err);
	/* The kernel has references of its own; ours would hide from the daemon that it let go. */
	for (unsigned i = 0; i < got; i++)
		(void)close(socks[i]);
	return rc;
}

int reattach(const char *control, const struct device *d, unsigned limit_ms, struct err *err)
{
	_cleanup_ctl_ struct ctl_client *c = NULL;
	const uint64_t until = now_ms() + limit_ms;
	unsigned pause = PAUSE_MIN_MS, missing;
	int rc = ctl_open(control, limit_ms, &c, err);

	if (rc)
		return rc;
	for (;;) {
		rc = ask_missing(c, d, &missing, err);
		if (rc || !missing)
			return rc;
		rc = give(c, d, missing, err);
		if (!rc)
			rc = ask_missing(c, d, &missing, err);
		if (!rc && !missing)
			return 0;
		/* EBUSY: the daemon still works on requests of the lost connections. */
		if (rc && rc != -EBUSY)
			return rc;
		if (now_ms() + pause > until || interrupted())
			return rc ? rc :
				    err_set(err, -ETIMEDOUT, "the kernel takes no new connections for /dev/%s",
					    d->name);
		sleep_ms(pause);
		pause = MIN(pause * 2, (unsigned)PAUSE_MAX_MS);
	}
}

int resend_set(uint32_t index, unsigned ms)
{
	char path[SYSFS_PATH_LEN], text[16];
	_cleanup_close_ int fd = -1;
	int n;

	if (fs_path(path, "/sys/block/nbd%u/queue/io_timeout", index))
		return -ENAMETOOLONG;
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	n = snprintf(text, sizeof(text), "%u", ms);
	return write(fd, text, (size_t)n) == n ? 0 : -errno;
}
