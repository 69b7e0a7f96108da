/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Attaching: the daemon grants sockets in transmission phase, the kernel takes them, and we wait until the
 * device is usable. What fails after the kernel took them is undone.
 *
 * The device that an export is attached to is known by the backend identifier in sysfs, nowhere else, so
 * attaching twice finds the first one. Two of us at once: a lock, from looking to the device's identifier
 * being there.
 *
 * A device whose server died stays. Attaching its export again gives it new connections (reattach.h), as
 * --watch does by itself.
 */
#include "attach.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "announce.h"
#include "busy.h"
#include "child.h"
#include "ctlclient.h"
#include "devices.h"
#include "driver.h"
#include "lock.h"
#include "loopcheck.h"
#include "nbdrs/backend.h"
#include "nbdrs/proto.h"
#include "reattach.h"
#include "say.h"
#include "sysfs.h"
#include "usable.h"

enum {
	BACKING_MAX = 64,
	BACKING_LIMIT_MS = 5000,
	REVIVE_PROBE_MS =
		2000, /* no answer for this long: try new sockets, harmless when it was only slow */
	/*
	 * Of several connections one may get no receiver in the kernel (usable.c, probe); the next try finds the
	 * threads that the last one made. Each has twice the time, the last one all of it.
	 */
	TRIES_MAX = 4,
	FIRST_TRY_MS = 2000,
	/*
	 * Time until requests that were in flight when their connection died are sent again, from when the new one
	 * is there: up to this and a second, by which the kernel rounds up. Each look logs a line for a request
	 * that is older, so it is longer where the data is far away and slow ones are usual.
	 */
	RESEND_NEAR_MS = 1000,
	RESEND_FAR_MS = 2000,
};

/* What the daemon granted. */
struct grant {
	uint64_t volume, flags, min_block, attach_id;
	uint64_t size; /* of the device, bytes */
	const char *backend; /* in `reply` */
	json_t *reply, *backing;
	int socks[NL_SOCKS_MAX];
	unsigned socks_n;
};

static void grant_close_socks(struct grant *g)
{
	for (unsigned i = 0; i < g->socks_n; i++)
		(void)close(g->socks[i]);
	g->socks_n = 0;
}

static void grant_free(struct grant *g)
{
	grant_close_socks(g);
	json_decref(g->reply);
	g->reply = NULL;
}

#define _cleanup_grant_ _cleanup_(grant_free)

static int take_lock(int *out)
{
	struct err err = { "" };
	int rc = lock_take(out, &err);

	if (!rc)
		return EXIT_OK;
	return fail(rc == -EACCES ? EXIT_NO_PERMISSION :
		    rc == -EINTR || rc == -ETIMEDOUT ? EXIT_TIMED_OUT : EXIT_FAILED, "%s", err.msg);
}

/* --- the daemon's part --- */

static int ctl_status(const struct ctl_client *c, int rc)
{
	if (c && ctl_was_answered(c) && (rc == -ENOENT || rc == -EOPNOTSUPP || rc == -EINVAL))
		return EXIT_NO_EXPORT;
	switch (rc) {
	case -ECONNREFUSED: return EXIT_NO_DAEMON;
	case -EACCES:
	case -EPERM: return EXIT_NO_PERMISSION;
	case -ETIMEDOUT: return EXIT_TIMED_OUT;
	default: return EXIT_FAILED;
	}
}

/* A number of the reply that is not negative. */
static bool get_number(const json_t *reply, const char *key, uint64_t *out)
{
	const json_t *j = json_object_get(reply, key);

	if (!json_is_integer(j) || json_integer_value(j) < 0)
		return false;
	*out = (uint64_t)json_integer_value(j);
	return true;
}

static int read_grant(struct grant *g, unsigned connections)
{
	char name[EXPORT_NAME_LEN];

	g->backend = json_string_value(json_object_get(g->reply, "backend_id"));
	g->backing = json_object_get(g->reply, "backing");
	if (!get_number(g->reply, "size", &g->volume) || !get_number(g->reply, "flags", &g->flags) ||
	    !get_number(g->reply, "min_block", &g->min_block) ||
	    !get_number(g->reply, "attach_id", &g->attach_id) || !g->backend ||
	    name_from_backend(g->backend, name) || g->socks_n != connections)
		return fail(
			EXIT_FAILED,
			"the daemon's answer lacks something: bring nbdrsd and nbdrs-attach to the same "
			"release");
	return EXIT_OK;
}

static int ask_daemon(struct ctl_client *c, const struct options *o, unsigned connections,
		      bool is_read_only, struct grant *g)
{
	struct err err = { "" };
	json_t *request = json_pack("{s:s, s:s, s:i, s:b}", "cmd", "attach", "export", o->export,
				    "connections", (int)connections, "read_only", is_read_only);
	int rc;

	if (!request)
		return fail(EXIT_NO_EXPORT, "'%s': an export's name is UTF-8", o->export);
	rc = ctl_send(c, request, &err);
	g->socks_n = NL_SOCKS_MAX;
	if (!rc)
		rc = ctl_recv(c, &g->reply, g->socks, &g->socks_n, &err);
	if (rc) {
		g->socks_n = 0;
		return fail(ctl_status(c, rc), "%s", err.msg);
	}
	return read_grant(g, connections);
}

/* The daemon shows it in its status; not being told breaks nothing. */
static void tell_daemon(struct ctl_client *c, const struct grant *g, const char *node)
{
	struct err err = { "" };
	_cleanup_json_ json_t *reply = NULL;

	if (ctl_call(c,
		     json_pack("{s:s, s:I, s:s}", "cmd", "attached", "attach_id",
			       (json_int_t)g->attach_id, "device", node),
		     &reply, &err))
		note("attached, but the daemon could not be told: %s", err.msg);
}

/* --- checks --- */

static int check_loop_child(const void *arg, void *result)
{
	return loopcheck_find(arg, result);
}

/* `index` below 0: the kernel will pick a device that nothing can lie on yet. */
static int check_backing(const struct grant *g, const struct options *o, int64_t index)
{
	_cleanup_free_ struct device *d = malloc(sizeof(*d));
	size_t i;
	json_t *path;

	if (!d)
		return fail(EXIT_FAILED, "out of memory");
	json_array_foreach(g->backing, i, path) {
		struct loopcheck found = { 0 };
		const char *file = json_string_value(path);
		const struct child_job job = { .fn = check_loop_child,
					       .arg = file,
					       .result = &found,
					       .result_len = sizeof(found),
					       .limit_ms = BACKING_LIMIT_MS };
		int rc;

		if (!file || i == BACKING_MAX)
			break;
		rc = child_run(&job);
		if (rc == -ETIMEDOUT)
			return fail(
				EXIT_REFUSED,
				"%s, where the export's data lies, does not answer; is it on a dead device?",
				file);
		for (unsigned k = 0; !rc && k < found.n; k++) {
			const bool is_same = found.index[k] == index ||
					     (!device_get(found.index[k], d) &&
					      strcmp(d->backend, g->backend) == 0);

			if (is_same && !o->force)
				return fail(
					EXIT_REFUSED,
					"%s lies on /dev/nbd%u itself: the device would wait for itself at "
					"its first write; move the file, or use --force",
					file, found.index[k]);
			note("%s lies on /dev/nbd%u: under memory pressure the two may wait for each other",
			     file, found.index[k]);
		}
	}
	return EXIT_OK;
}

/* A device that was asked for must not serve anything else. */
static int check_free(const char *name, const struct device *d)
{
	if (!d->is_connected)
		return EXIT_OK;
	if (d->export[0])
		return fail(
			EXIT_BUSY,
			"/dev/%s serves the export '%s' already; detach that first: nbdrs-attach -d /dev/%s",
			name, d->export, name);
	return fail(EXIT_BUSY, "/dev/%s was attached by another program%s%s; pick another device",
		    name, d->backend[0] ? ", backend " : "", d->backend);
}

static int check_grant(struct grant *g, const struct options *o, uint64_t *block_size)
{
	if (o->connections > 1 && !(g->flags & NBD_FLAG_CAN_MULTI_CONN))
		return fail(
			EXIT_NO_EXPORT,
			"export '%s' cannot do several connections (part of its chain has no MULTI_CONN); "
			"attach it without --connections",
			o->export);
	*block_size = o->block_size ? o->block_size : MAX(g->min_block, (uint64_t)512);
	if (*block_size < g->min_block)
		return fail(EXIT_NO_EXPORT, "--block-size %u: the export needs at least %llu",
			    o->block_size, (unsigned long long)g->min_block);
	if (g->volume < *block_size)
		return fail(EXIT_NO_EXPORT, "export '%s' has %llu bytes: too small for a device",
			    o->export, (unsigned long long)g->volume);
	g->size = device_bytes(g->volume, *block_size);
	return EXIT_OK;
}

/* --- the kernel's part --- */

static int driver_status(int rc)
{
	switch (rc) {
	case -ENOENT: return EXIT_NO_MODULE;
	case -EPERM:
	case -EACCES: return EXIT_NO_PERMISSION;
	case -EBUSY: return EXIT_BUSY;
	case -ETIMEDOUT: return EXIT_TIMED_OUT;
	case -EINTR: return EXIT_INTERRUPTED;
	default: return EXIT_FAILED;
	}
}

/* Says who keeps a device that is not connected from being connected. */
static int busy_error(uint32_t index, const struct err *err)
{
	_cleanup_free_ struct device_parts *parts = malloc(sizeof(*parts));
	_cleanup_free_ struct holders *h = malloc(sizeof(*h));
	char name[DEVICE_NAME_LEN], text[1024] = "";

	(void)snprintf(name, sizeof(name), "nbd%u", index);
	if (parts && h && !device_parts(name, parts)) {
		busy_find(parts, h);
		busy_text(h, text, sizeof(text));
	}
	return fail(EXIT_BUSY, "%s%s%s", err->msg, text[0] ? "; it is " : "", text);
}

static int connect_device(const struct options *o, const struct grant *g, int64_t index,
			  uint64_t block_size, uint32_t *out)
{
	struct err err = { "" };
	const struct nbdnl_connect c = {
		.index = index,
		.size = g->size,
		.block_size = block_size,
		.server_flags = g->flags | (o->is_read_only ? NBD_FLAG_READ_ONLY : 0),
		.client_flags = 0,
		.timeout_s = o->timeout_s,
		.dead_conn_timeout_s = o->dead_conn_timeout_s,
		.backend = g->backend,
		.socks = g->socks,
		.socks_n = g->socks_n,
	};
	int rc = driver_connect(&c, out, &err);

	if (rc == -EBUSY && index >= 0)
		return busy_error((uint32_t)index, &err);
	if (rc)
		return fail(driver_status(rc), "%s", err.msg);
	/* In every other case the timer kills the connection, so that it has to be --timeout. */
	if (g->socks_n == 1 && !o->timeout_s) {
		rc = resend_set(*out, json_array_size(g->backing) ? RESEND_NEAR_MS : RESEND_FAR_MS);
		if (rc)
			note("/dev/nbd%u: after a crash of the daemon it will take up to 30 s until requests are "
			     "sent again: cannot set io_timeout: %s",
			     *out, strerror(-rc));
	}
	return EXIT_OK;
}

/* Half-attached: better no device than one that looks usable. False when that failed. */
static bool undo(uint32_t index)
{
	struct err err = { "" };

	if (driver_disconnect(index, &err)) {
		note("and detaching it again failed: %s", err.msg);
		return false;
	}
	note("/dev/nbd%u was detached again", index);
	return true;
}

static void print_device(const char *node)
{
	(void)puts(node);
}

/* --- an export that is attached already --- */

static int revive(const struct options *o, const struct device *d)
{
	struct err err = { "" };
	int rc = reattach(o->control, d, o->wait_s * 1000, &err);

	switch (rc) {
	case 0: return EXIT_OK;
	case -ENOENT:
	case -ESTALE:
		return fail(
			EXIT_BUSY,
			"/dev/%s does not answer, and export '%s' is not what it was attached to (%s); "
			"detach it: nbdrs-attach -d --force /dev/%s",
			d->name, o->export, err.msg, d->name);
	case -EPERM: return fail(EXIT_NO_PERMISSION, "%s", err.msg);
	default: return fail(ctl_status(NULL, rc), "/dev/%s does not answer, and %s", d->name, err.msg);
	}
}

static int attach_again(const struct options *o, uint32_t index)
{
	_cleanup_free_ struct device *d = malloc(sizeof(*d));
	struct usable u = { .index = index,
			    .waits_for_udev = !o->no_udev,
			    .limit_ms = MIN(o->wait_s * 1000, (unsigned)REVIVE_PROBE_MS) };
	struct err err = { "" };
	char node[DEVICE_NAME_LEN + 8];
	int rc, status;

	if (!d)
		return fail(EXIT_FAILED, "out of memory");
	rc = device_get(index, d);
	if (rc)
		return fail(EXIT_FAILED, "cannot look at /dev/nbd%u: %s", index, strerror(-rc));
	if (o->is_read_only && !d->is_read_only)
		return fail(EXIT_BUSY, "'%s' is attached to /dev/%s for writing; detach it first",
			    o->export, d->name);
	u.size = d->size;
	u.backend = d->backend;
	rc = usable_wait(&u, &err);
	if (rc == -ETIMEDOUT || rc == -EIO) {
		status = revive(o, d);
		if (status)
			return status;
		u.limit_ms = o->wait_s * 1000;
		rc = usable_wait(&u, &err);
		if (!rc)
			note("/dev/%s was cut off from its daemon; it has new connections",
			     d->name);
	}
	if (rc)
		return fail(
			driver_status(rc),
			"'%s' is attached to /dev/%s, but %s; detach it: nbdrs-attach -d /dev/%s",
			o->export, d->name, err.msg, d->name);
	(void)snprintf(node, sizeof(node), "/dev/%s", d->name);
	print_device(node);
	return EXIT_OK;
}

/* --- all of it --- */

/* EXIT_OK with *index >= 0 when the export is attached already, where it was asked for. */
static int find_attached(const struct options *o, int64_t wanted, int64_t *index)
{
	uint32_t on[2];
	int n = devices_of_export(o->export, on, ARRAY_LEN(on));

	if (n < 0)
		return fail(EXIT_FAILED, "cannot look for nbd devices: %s", strerror(-n));
	if (n == 0)
		return EXIT_OK;
	for (int i = 0; i < n; i++)
		if (wanted == NL_INDEX_ANY || wanted == on[i]) {
			*index = on[i];
			return EXIT_OK;
		}
	return fail(
		EXIT_BUSY,
		"export '%s' is attached to /dev/nbd%u already; two devices of one export would not see "
		"each other's writes",
		o->export, on[0]);
}

/* From here on the lock is held; returns with the device connected. */
static int connect_locked(const struct options *o, int64_t wanted, struct ctl_client *c,
			  struct grant *g, uint32_t *index)
{
	_cleanup_free_ struct device *d = malloc(sizeof(*d));
	uint64_t block_size = 0;
	int status;

	if (!d)
		return fail(EXIT_FAILED, "out of memory");
	if (wanted >= 0 && !device_get((uint32_t)wanted, d)) {
		status = check_free(d->name, d);
		if (status)
			return status;
	}
	status = ask_daemon(c, o, o->connections, o->is_read_only, g);
	if (!status)
		status = check_grant(g, o, &block_size);
	if (!status)
		status = check_backing(g, o, wanted);
	/* The last moment at which there is nothing to undo. */
	if (!status && interrupted())
		status = fail(EXIT_INTERRUPTED, "interrupted; nothing was attached");
	if (!status && o->connections > 1)
		announce_hold(wanted, g->backend);
	if (!status) {
		status = connect_device(o, g, wanted, block_size, index);
		if (status)
			announce_release(wanted, g->backend);
	}
	/* The kernel has references of its own; ours would keep the daemon from seeing it let go. */
	grant_close_socks(g);
	return status;
}

/* With *again, the device was detached and another try may help. */
static int wait_usable(const struct options *o, const struct grant *g, uint32_t index, unsigned try,
		       bool *again)
{
	const bool is_last = o->connections <= 1 || try + 1 == TRIES_MAX;
	const struct usable u = { .index = index,
				  .size = g->size,
				  .backend = g->backend,
				  .waits_for_udev = !o->no_udev,
				  .limit_ms = o->wait_s * 1000,
				  .probe_ms = is_last ? 0 : (unsigned)FIRST_TRY_MS << try };
	struct err err = { "" };
	int rc = usable_wait(&u, &err);
	bool is_gone;

	*again = false;
	if (!rc)
		return EXIT_OK;
	if (rc == -EAGAIN) {
		note("/dev/nbd%u: a connection does not answer; attaching anew", index);
		*again = true;
	} else {
		(void)fail(EXIT_FAILED, "/dev/nbd%u: %s", index, err.msg);
	}
	/*
	 * What another backend took in the meantime is not ours to undo. As long as udev or our child has it open, it
	 * looks as if it were attached: it stays held back then, and is neither attached nor free.
	 */
	is_gone = rc == -EBUSY || (undo(index) && (o->connections <= 1 ||
						   device_wait_free(index, g->backend, o->wait_s * 1000)));
	if (is_gone)
		announce_release(index, g->backend);
	if (*again && !is_gone) {
		*again = false;
		return fail(EXIT_TIMED_OUT, "/dev/nbd%u is cut off, but something still has it open", index);
	}
	return *again ? EXIT_TIMED_OUT : driver_status(rc);
}

static int attach_once(const struct options *o, int64_t wanted, unsigned try, bool *again)
{
	_cleanup_grant_ struct grant g = { 0 };
	_cleanup_ctl_ struct ctl_client *c = NULL;
	_cleanup_close_ int lock = -1;
	struct err err = { "" };
	int64_t attached = -1;
	uint32_t index;
	char node[32];
	int rc, status;

	*again = false;
	status = take_lock(&lock);
	if (!status)
		status = find_attached(o, wanted, &attached);
	if (status)
		return status;
	if (attached >= 0)
		return attach_again(o, (uint32_t)attached);

	rc = ctl_open(o->control, CTL_TIMEOUT_MS, &c, &err);
	if (rc)
		return fail(ctl_status(NULL, rc), "%s", err.msg);
	rc = driver_ensure(&err);
	if (rc)
		return fail(driver_status(rc), "%s", err.msg);
	status = connect_locked(o, wanted, c, &g, &index);
	if (status)
		return status;
	(void)close(TAKE_FD(lock)); /* the device carries the identifier now: others see it */
	status = wait_usable(o, &g, index, try, again);
	if (status)
		return status;
	(void)snprintf(node, sizeof(node), "/dev/nbd%u", index);
	tell_daemon(c, &g, node);
	print_device(node);
	return EXIT_OK;
}

int attach_run(const struct options *o)
{
	int64_t wanted = NL_INDEX_ANY;
	bool again = true;
	uint32_t index;
	int status = EXIT_FAILED;

	interrupts_catch();
	if (o->device && name_to_index(o->device, &index) == 0)
		wanted = index;
	for (unsigned try = 0; again && try < TRIES_MAX; try++)
		status = attach_once(o, wanted, try, &again);
	return status;
}
