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
#include "nbdrs/backend.h"
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

static unsigned get_count(const json_t *reply, const char *key)
{
	const json_int_t n = json_integer_value(json_object_get(reply, key));

	return n < 0 || n > NL_SOCKS_MAX ? NL_SOCKS_MAX : (unsigned)n;
}

int link_ask(struct ctl_client *c, const struct device *d, struct link *out, struct err *err)
{
	_cleanup_json_ json_t *reply = NULL;
	int rc = ctl_call(c, request("device", d), &reply, err);

	if (rc)
		return rc;
	out->alive = get_count(reply, "alive");
	out->wanted = MAX(MAX(d->queues, 1u), get_count(reply, "connections"));
	out->volume = (uint64_t)json_integer_value(json_object_get(reply, "size"));
	return 0;
}

/* As link_ask. Where connections are missing requests of a file system are waiting: never for another image. */
static int ask(struct ctl_client *c, const struct device *d, struct link *l, struct err *err)
{
	int rc = link_ask(c, d, l, err);

	if (!rc && l->alive < l->wanted && !backend_fits(d->backend, d->size, d->block_size, l->volume))
		return err_set(err, -ESTALE, "/dev/%s has %llu bytes, and what is served by that name %llu", d->name,
			       (unsigned long long)d->size, (unsigned long long)l->volume);
	return rc;
}

enum link_state reattach_look(const char *control, const struct device *d, unsigned limit_ms, struct link *l,
			      struct err *err)
{
	_cleanup_ctl_ struct ctl_client *c = NULL;
	int rc;

	if (!d->export[0])
		return LINK_FOREIGN;
	rc = ctl_open(control, limit_ms, &c, err);
	if (!rc)
		rc = ask(c, d, l, err);
	if (rc)
		return rc == -ESTALE || (rc == -ENOENT && c && ctl_was_answered(c)) ? LINK_ORPHAN
										   : LINK_WAITING;
	return l->alive < l->wanted ? LINK_CUT : LINK_LIVE;
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
	    json_object_set_new(wish, "block_size",
				json_integer((json_int_t)MAX(d->block_size, (uint64_t)BLOCK_SIZE_MIN))) ||
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
	unsigned pause = PAUSE_MIN_MS;
	struct link l;
	int rc = ctl_open(control, limit_ms, &c, err);

	if (rc)
		return rc;
	for (;;) {
		rc = ask(c, d, &l, err);
		if (rc || l.alive >= l.wanted)
			return rc;
		rc = give(c, d, l.wanted - l.alive, err);
		if (!rc)
			rc = ask(c, d, &l, err);
		if (!rc && l.alive >= l.wanted)
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
