/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Detaching: the kernel's DISCONNECT asks nobody and flushes nothing, so we do, in this order:
 *
 *   who uses it?  mounts, swap, other devices, processes (busy.h): refuse, naming them
 *   O_EXCL open   refuses what we could not see, and keeps others from mounting until it is over
 *   fsync         what is dirty goes to the server, and a FLUSH after it
 *   BLKFLSBUF     and no stale page survives for the next user of the device
 *   DISCONNECT    with the exclusive descriptor still open; closing it frees the device
 *   then wait until the size is 0 and udev's links are gone
 *
 * All that touches the device happens in a child: where the server is dead, each step can hang until the
 * dead-connection time-out. Waiting goes on as long as requests complete.
 *
 * With --force: flush what can be flushed in time, then DISCONNECT whoever uses it.
 */
#include "attach.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "busy.h"
#include "child.h"
#include "ctlclient.h"
#include "devices.h"
#include "driver.h"
#include "lostdata.h"
#include "mounts.h"
#include "nl.h"
#include "reattach.h"
#include "say.h"
#include "sysfs.h"
#include "usable.h"

enum {
	SETTLE_MS = 3000, /* for udev's events, and for its links to go */
	GRACE_MS = 1500,  /* for processes that just look at the device */
	TELL_LIMIT_MS = 2000,
	SERVED_LIMIT_MS = 3000,
	HOLDERS_TEXT_LEN = 1200,
};

enum step { STEP_OPEN, STEP_FLUSH, STEP_DISCONNECT, STEP_DONE };

/* What the child reports, also when it did not come back. */
struct release {
	volatile enum step step;
	int flush_rc;
};

/* --- in the child --- */

static int open_device(const struct device *d, int flags)
{
	char path[SYSFS_PATH_LEN];
	int fd;

	if (fs_path(path, "/dev/%s", d->name))
		return -ENAMETOOLONG;
	/* Read-only: closing a descriptor for writing would wake udev. It suffices for all below. */
	fd = open(path, O_RDONLY | O_CLOEXEC | flags);
	return fd < 0 ? -errno : fd;
}

static int flush_fd(int fd)
{
	int rc = fsync(fd) ? -errno : 0;

	if (ioctl(fd, BLKFLSBUF, 0) && !rc)
		rc = -errno;
	return rc;
}

static int release_child(const void *arg, void *result)
{
	const struct device *d = arg;
	struct release *r = result;
	struct nbdnl *nl = NULL;
	char backend[BACKEND_LEN] = "";
	_cleanup_close_ int fd = -1;
	int rc;

	rc = nbdnl_open(&nl);
	if (rc)
		return rc;
	fd = open_device(d, O_EXCL);
	if (fd < 0) {
		nbdnl_close(nl);
		return fd;
	}
	/* Now it can't change hands any more: is it still the one that was asked for? */
	(void)fs_read(backend, sizeof(backend), "/sys/block/%s/backend", d->name);
	if (strcmp(backend, d->backend) != 0) {
		nbdnl_close(nl);
		return -ESTALE;
	}
	r->step = STEP_FLUSH;
	r->flush_rc = flush_fd(fd);
	r->step = STEP_DISCONNECT;
	rc = nbdnl_disconnect(nl, d->index);
	r->step = STEP_DONE;
	nbdnl_close(nl);
	return rc;
}

static int sync_mount(char *line, void *arg)
{
	const struct device_parts *parts = arg;
	struct mount_line m;
	int fd;

	if (mount_parse(line, &m) || !device_parts_has(parts, m.dev, m.source))
		return 0;
	fd = open(m.point, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NONBLOCK);
	if (fd >= 0) {
		(void)syncfs(fd); /* what fails shows in the kernel's log, which is read later */
		(void)close(fd);
	}
	return 0;
}

/* --force: file systems first, then what they left in the device's own cache. */
static int flush_child(const void *arg, void *result)
{
	const struct device *d = arg;
	_cleanup_free_ struct device_parts *parts = malloc(sizeof(*parts));
	_cleanup_close_ int fd = -1;

	if (!parts || device_parts(d->name, parts))
		return -ENODEV;
	(void)fs_each_line(sync_mount, parts, "/proc/self/mountinfo");
	fd = open_device(d, 0);
	if (fd < 0)
		return fd;
	return fsync(fd) ? -errno : 0;
}

/* Requests that the device has completed: while this moves, its server lives. */
static uint64_t progress(const void *arg)
{
	const struct device *d = arg;
	char text[512], *rest = text, *w;
	uint64_t sum = 0;

	if (fs_read(text, sizeof(text), "/sys/block/%s/stat", d->name))
		return 0;
	/* Documentation/block/stat.rst: I/Os completed are fields 0 read, 4 write, 11 discard, 15 flush. */
	for (unsigned i = 0; (w = strsep(&rest, " "));) {
		if (!*w)
			continue;
		if (i == 0 || i == 4 || i == 11 || i == 15)
			sum += strtoull(w, NULL, 10);
		i++;
	}
	return sum;
}

/* --- which device --- */

static int resolve(const struct options *o, struct device *d)
{
	uint32_t on[2];
	int n, rc = device_by_path(o->device, &on[0]);

	if (rc == -EISDIR)
		return fail(EXIT_USAGE, "'%s' is a partition; name the whole device", o->device);
	if (rc == 0 && device_get(on[0], d) == 0 && d->is_connected)
		return EXIT_OK;
	/* "nbd7" may be an export, too. */
	n = devices_of_export(o->device, on, ARRAY_LEN(on));
	if (n < 0)
		return fail(EXIT_FAILED, "cannot look for nbd devices: %s", strerror(-n));
	if (n == 0)
		return fail(
			EXIT_NO_EXPORT,
			rc == 0 || o->device[0] == '/'
				? "%s is not attached"
				: "no device is attached to an export '%s'; nbdrs-attach -l lists them",
			o->device);
	if (n > 1)
		return fail(EXIT_BUSY,
			    "'%s' is attached to /dev/nbd%u and /dev/nbd%u; name the device",
			    o->device, on[0], on[1]);
	rc = device_get(on[0], d);
	return rc ? fail(EXIT_FAILED, "cannot look at /dev/nbd%u: %s", on[0], strerror(-rc))
		  : EXIT_OK;
}

/* --- who uses it --- */

/*
 * Fills `text` with the holders, "" when there are none. Processes get a moment to let go, and udev,
 * which looks at a device after each close by a writer, `udev_ms`; then it is cut off.
 */
static int find_holders(const struct device *d, unsigned grace_ms, unsigned udev_ms, char *text,
			size_t text_len)
{
	_cleanup_free_ struct device_parts *parts = malloc(sizeof(*parts));
	_cleanup_free_ struct holders *h = malloc(sizeof(*h));
	const uint64_t begin = now_ms();
	int rc;

	if (!parts || !h)
		return -ENOMEM;
	for (;;) {
		rc = device_parts(d->name, parts);
		if (rc)
			return rc;
		busy_find(parts, h);
		busy_text(h, text, text_len);
		if (h->has_firm || interrupted() || (!h->n && !h->has_udev) ||
		    now_ms() >= begin + (h->n ? grace_ms : udev_ms))
			return 0;
		sleep_ms(50);
	}
}

static int refuse(const struct device *d, const char *holders)
{
	return fail(
		EXIT_REFUSED,
		"/dev/%s is in use: %s; release it first (umount, swapoff, ...), or lose data with --force",
		d->name,
		holders[0] ? holders
			   : "claimed by something inside the kernel that has no name here");
}

/* --- afterwards --- */

static void tell_daemon(const struct options *o, const struct device *d)
{
	_cleanup_ctl_ struct ctl_client *c = NULL;
	_cleanup_json_ json_t *reply = NULL;
	struct err err = { "" };
	char node[DEVICE_NAME_LEN + 8];

	(void)snprintf(node, sizeof(node), "/dev/%s", d->name);
	/* It sees its sockets close anyway, and may be gone: nothing to complain about. */
	if (ctl_open(o->control, TELL_LIMIT_MS, &c, &err) == 0)
		(void)ctl_call(c, json_pack("{s:s, s:s}", "cmd", "detached", "device", node),
			       &reply, &err);
}

/* Tells of writes that failed while it was attached; `flush_rc` is of our own flush. */
static int account(const struct device *d, int flush_rc)
{
	struct lost_data lost = { 0 };
	int rc = lost_data_read(d->name, &lost);

	if (lost.errors_n)
		return fail(
			EXIT_DATA_LOST,
			"/dev/%s is detached, but DATA WAS LOST: writes to it have failed since it was "
			"attached (%u messages in the kernel's log: dmesg | grep %s); check the file "
			"system before using it",
			d->name, lost.errors_n, d->name);
	if (flush_rc)
		return fail(EXIT_DATA_LOST,
			    "/dev/%s is detached, but DATA MAY BE LOST: flushing it failed: %s",
			    d->name,
			    flush_rc == -ETIMEDOUT ? "no answer from its server"
						   : strerror(-flush_rc));
	if (rc == -EPERM || rc == -EACCES)
		note("the kernel's log cannot be read: whether writes had failed before is unknown");
	return EXIT_OK;
}

static int finish(const struct options *o, const struct device *d, int flush_rc, bool is_held)
{
	/* While something holds it, the kernel keeps it half alive, and waiting is in vain. */
	if (is_held)
		note("/dev/%s is cut off, but stays until what holds it lets go", d->name);
	else if (!device_wait_free(d->index, d->backend, o->wait_s * 1000))
		note("/dev/%s is cut off, but something still has it open", d->name);
	else if (!o->no_udev)
		udev_wait_unlinked(d->backend, SETTLE_MS);
	tell_daemon(o, d);
	return account(d, flush_rc);
}

/* --- the two ways --- */

static int release_error(const struct options *o, const struct device *d, int rc,
			 const struct release *r)
{
	char holders[HOLDERS_TEXT_LEN] = "";

	switch (rc) {
	case -EBUSY:
		(void)find_holders(d, 0, 0, holders,
				   sizeof(holders)); /* without names it is still refused */
		return refuse(d, holders);
	case -ESTALE:
		return fail(EXIT_BUSY, "/dev/%s has just been attached to something else", d->name);
	case -EACCES:
	case -EPERM:
		return fail(EXIT_NO_PERMISSION, "detaching /dev/%s needs root (CAP_SYS_ADMIN)",
			    d->name);
	case -ENOENT:
		return fail(EXIT_FAILED, "there is no node /dev/%s, or no nbd driver any more",
			    d->name);
	case -EINTR:
		return fail(EXIT_INTERRUPTED, "interrupted; /dev/%s is still attached", d->name);
	case -ETIMEDOUT:
		if (r->step == STEP_DISCONNECT)
			return fail(EXIT_TIMED_OUT,
				    "the kernel does not finish detaching /dev/%s (see dmesg)",
				    d->name);
		return fail(
			EXIT_TIMED_OUT,
			"/dev/%s does not answer (no request completed in %u s), so it cannot be flushed: "
			"start its daemon again and repeat, wait longer with --wait, or lose what was not "
			"written with --force",
			d->name, o->wait_s);
	default: return fail(EXIT_FAILED, "cannot detach /dev/%s: %s", d->name, strerror(-rc));
	}
}

static int detach_gently(const struct options *o, const struct device *d)
{
	struct release r = { 0 };
	const struct child_job job = { .fn = release_child,
				       .arg = d,
				       .result = &r,
				       .result_len = sizeof(r),
				       .limit_ms = o->wait_s * 1000,
				       .progress = progress,
				       .ends_on_interrupt = true };
	char holders[HOLDERS_TEXT_LEN] = "";
	int rc;

	if (!o->no_udev)
		udev_settle(SETTLE_MS);
	rc = find_holders(d, GRACE_MS, o->wait_s * 1000, holders, sizeof(holders));
	if (rc)
		return fail(EXIT_FAILED, "cannot look at /dev/%s: %s", d->name, strerror(-rc));
	if (holders[0])
		return refuse(d, holders);
	rc = child_run(&job);
	return rc ? release_error(o, d, rc, &r) : finish(o, d, r.flush_rc, false);
}

static int detach_forced(const struct options *o, const struct device *d)
{
	const struct child_job job = { .fn = flush_child,
				       .arg = d,
				       .limit_ms = o->wait_s * 1000,
				       .progress = progress,
				       .ends_on_interrupt = true };
	char holders[HOLDERS_TEXT_LEN] = "";
	struct err err = { "" };
	int flush_rc, rc;

	(void)find_holders(d, 0, 0, holders, sizeof(holders)); /* only to tell */
	if (holders[0])
		note("/dev/%s is in use: %s; detaching it anyway", d->name, holders);
	flush_rc = child_run(&job);
	if (flush_rc == -EINTR)
		return fail(EXIT_INTERRUPTED, "interrupted; /dev/%s is still attached", d->name);
	if (flush_rc == -EACCES || flush_rc == -EPERM)
		return release_error(o, d, flush_rc, NULL);
	rc = driver_disconnect(d->index, &err);
	if (rc)
		return fail(rc == -EPERM       ? EXIT_NO_PERMISSION
			    : rc == -ETIMEDOUT ? EXIT_TIMED_OUT
					       : EXIT_FAILED,
			    "%s", err.msg);
	return finish(o, d, flush_rc, holders[0] != '\0');
}

int detach_run(const struct options *o)
{
	_cleanup_free_ struct device *d = malloc(sizeof(*d));
	int status;

	interrupts_catch();
	if (!d)
		return fail(EXIT_FAILED, "out of memory");
	status = resolve(o, d);
	if (status)
		return status;
	if (!d->export[0] && !o->force)
		return fail(
			EXIT_REFUSED,
			"/dev/%s was not attached by nbdrs; detach it with the tool that did, or use --force",
			d->name);
	return o->force ? detach_forced(o, d) : detach_gently(o, d);
}

static int read_child(const void *arg, void *result)
{
	static _Alignas(4096) char buf[4096];
	const struct device *d = arg;
	_cleanup_close_ int fd = open_device(d, O_DIRECT);

	return fd < 0 ? fd : pread(fd, buf, sizeof(buf), 0) < 0 ? -errno : 0;
}

/* Another daemon may serve it. */
static bool is_served(const struct device *d)
{
	const struct child_job job = { .fn = read_child, .arg = d, .limit_ms = SERVED_LIMIT_MS };

	return child_run(&job) == 0;
}

/*
 * One device; EXIT_OK also when there is nothing to do. Only what a daemon that answers does not serve is
 * an orphan: while none does, the next one may.
 */
static int reap_one(const struct options *o, const struct device *d)
{
	char holders[HOLDERS_TEXT_LEN] = "";
	struct err err = { "" };
	struct link l;
	int rc;

	if (reattach_look(o->control, d, CTL_TIMEOUT_MS, &l, &err) != LINK_ORPHAN)
		return EXIT_OK;
	if (is_served(d)) {
		note("/dev/%s answers, so another daemon serves it; left alone", d->name);
		return EXIT_OK;
	}
	(void)find_holders(d, 0, 0, holders, sizeof(holders)); /* without names: nobody is known to use it */
	if (holders[0] && !o->force)
		return refuse(d, holders);
	(void)printf("/dev/%s\n", d->name);
	/* Nothing can be flushed; what waits to be written fails, and the kernel's log tells finish() so. */
	rc = driver_disconnect(d->index, &err);
	return rc ? fail(rc == -EPERM ? EXIT_NO_PERMISSION : EXIT_FAILED, "%s", err.msg) :
		    finish(o, d, 0, holders[0] != '\0');
}

int reap_run(const struct options *o)
{
	_cleanup_free_ struct device *d = malloc(sizeof(*d));
	_cleanup_free_ uint32_t *list = NULL;
	_cleanup_ctl_ struct ctl_client *c = NULL;
	struct err err = { "" };
	int status = EXIT_OK;
	size_t n = 0;
	int rc;

	interrupts_catch();
	if (!d)
		return fail(EXIT_FAILED, "out of memory");
	rc = ctl_open(o->control, CTL_TIMEOUT_MS, &c, &err);
	if (rc)
		return fail(rc == -ECONNREFUSED ? EXIT_NO_DAEMON : EXIT_FAILED,
			    "which devices are orphaned, only a daemon can tell: %s", err.msg);
	rc = devices_scan(&list, &n);
	if (rc)
		return fail(EXIT_FAILED, "cannot look for nbd devices: %s", strerror(-rc));
	for (size_t i = 0; i < n && !interrupted(); i++) {
		int one;

		if (device_get(list[i], d) || !d->is_connected)
			continue;
		one = reap_one(o, d);
		status = status ? status : one;
	}
	return status;
}
