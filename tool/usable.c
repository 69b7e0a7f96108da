/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Waiting for a device to become usable: see usable.h. Everything is polled: the files in sysfs and /run
 * are the same whether udev runs or not, and cost microseconds to look at.
 *
 * Order: size and backend in sysfs -> node in /dev -> a read (its open makes the kernel scan for
 * partitions) -> systemd may know (announce.h) -> links and database entries of udev, for the disk and each partition.
 */
#include "usable.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "announce.h"
#include "child.h"
#include "devices.h"
#include "nbdrs/cleanup.h"
#include "sysfs.h"

enum {
	POLL_MS = 10,
	QUEUE_MS = 3000,   /* for udev's other events, which may never end on a busy machine */
	EARLY_MS = 100,    /* before the first `change` event of our own, on kernels before 6.17 */
	TRIGGER_MS = 1000, /* on others, and between two of them */
	PROBE_LEN = 4096,
	MAX_QUEUES = 64,
};

#define RULES "60-nbdrs.rules"

/* Pauses before the next look; false when the time is over or a signal came. */
static bool pause_until(uint64_t until)
{
	const uint64_t now = now_ms();

	if (now >= until || interrupted())
		return false;
	sleep_ms((unsigned)MIN(until - now, (uint64_t)POLL_MS));
	return true;
}

static int late(struct err *err, const char *what)
{
	return interrupted() ? err_set(err, -EINTR, "interrupted")
			     : err_set(err, -ETIMEDOUT, "not usable in time: %s", what);
}

/* --- the kernel's part --- */

static int wait_size(const struct usable *u, struct device *d, uint64_t until, struct err *err)
{
	char what[256];
	int rc;

	do {
		rc = device_get(u->index, d);
		if (!rc && d->is_connected && d->size == u->size) {
			if (!d->has_backend || strcmp(d->backend, u->backend) == 0)
				return 0;
			return err_set(err, -EBUSY, "/dev/%s was taken by another backend, '%s'",
				       d->name, d->backend);
		}
	} while (pause_until(until));
	(void)snprintf(what, sizeof(what),
		       "the kernel shows %s with %llu bytes (%s) instead of %llu connected ones",
		       d->name, (unsigned long long)d->size, rc ? strerror(-rc) : "see dmesg",
		       (unsigned long long)u->size);
	return late(err, what);
}

static int wait_node(const struct device *d, uint64_t until, struct err *err)
{
	char path[SYSFS_PATH_LEN], what[SYSFS_PATH_LEN + 64];
	struct stat st;

	if (fs_path(path, "/dev/%s", d->name))
		return err_set(err, -ENAMETOOLONG, "path too long");
	do
		if (stat(path, &st) == 0 && S_ISBLK(st.st_mode) && st.st_rdev == d->dev)
			return 0;
	while (pause_until(until));
	(void)snprintf(what, sizeof(what), "there is no node %s (no devtmpfs or udev here?)", path);
	return late(err, what);
}

/* Moves this process to a processor whose requests go through queue `q`; false when there is no such queue. */
static bool run_on_queue(const char *name, unsigned q)
{
	char list[256];
	cpu_set_t set;
	unsigned long cpu;
	char *at = list, *end;

	if (fs_read(list, sizeof(list), "/sys/block/%s/mq/%u/cpu_list", name, q))
		return false;
	/* "0, 4": any that is online will do. */
	for (;; at = end + strspn(end, ", ")) {
		cpu = strtoul(at, &end, 10);
		if (end == at || cpu >= CPU_SETSIZE)
			return true; /* a queue that no processor of ours reaches cannot be in anybody's way */
		CPU_ZERO(&set);
		CPU_SET(cpu, &set);
		if (sched_setaffinity(0, sizeof(set), &set) == 0)
			return true;
	}
}

static int read_once(int fd, const struct device *d)
{
	static _Alignas(PROBE_LEN) char buf[PROBE_LEN];
	const size_t len = MAX(MIN(d->block_size, (uint64_t)PROBE_LEN), (uint64_t)512);
	ssize_t n = pread(fd, buf, len, 0);

	if (n < 0)
		return -errno;
	return (size_t)n == len || (uint64_t)n == d->size ? 0 : -EIO;
}

/*
 * In a child: opens the node, which scans partitions, and reads its first block past every cache, through each
 * connection: a queue is a connection. Under heavy load the driver may not get threads for all of its receivers, and
 * then one connection works while another never answers (seen on 6.1: the work queue's rescuer runs the
 * first receiver, which never ends, and holds the others). Attaching anew helps: attach.c does.
 */
static int probe(const void *arg, void *result)
{
	const struct device *d = arg;
	char path[SYSFS_PATH_LEN];
	_cleanup_close_ int fd = -1;
	int rc;

	if (fs_path(path, "/dev/%s", d->name))
		return -ENAMETOOLONG;
	fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	rc = read_once(fd, d);
	for (unsigned q = 0; !rc && q < MAX_QUEUES && run_on_queue(d->name, q); q++)
		rc = read_once(fd, d);
	return rc;
}

static int wait_read(const struct device *d, uint64_t until, struct err *err)
{
	const uint64_t now = now_ms();
	const struct child_job job = { .fn = probe,
				       .arg = d,
				       .limit_ms = until > now ? (unsigned)(until - now) : 0,
				       .ends_on_interrupt = true };
	char what[128];
	int rc = child_run(&job);

	(void)snprintf(what, sizeof(what), "a read of /dev/%s is not answered", d->name);
	switch (rc) {
	case 0: return 0;
	case -ETIMEDOUT:
	case -EINTR: return late(err, what);
	case -EACCES:
	case -EPERM:
		return err_set(err, -EPERM, "cannot open /dev/%s: permission denied; run as root",
			       d->name);
	default:
		return err_set(err, -EIO,
			       "reading /dev/%s fails: %s (see dmesg and the daemon's log)",
			       d->name, strerror(-rc));
	}
}

/* --- udev's part --- */

bool udev_runs(void)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	char path[SYSFS_PATH_LEN];
	_cleanup_close_ int fd = -1;

	if (fs_path(path, "/run/udev/control") || strlen(path) >= sizeof(sa.sun_path))
		return false;
	memcpy(sa.sun_path, path, strlen(path) + 1);
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	/* The file outlives the daemon. Busy with another client, or not for us: it lives. */
	return fd >= 0 && (connect(fd, (struct sockaddr *)&sa, sizeof(sa)) == 0 ||
			   errno == EAGAIN || errno == EACCES || errno == EPERM);
}

/* True when udev reads our rules: the first folder that has them wins, an empty file masks them. */
static bool rules_are_there(void)
{
	static const char *const folders[] = { "/etc/udev/rules.d", "/run/udev/rules.d",
					       "/usr/local/lib/udev/rules.d",
					       "/usr/lib/udev/rules.d", "/lib/udev/rules.d" };
	char path[SYSFS_PATH_LEN];
	struct stat st;

	for (size_t i = 0; i < ARRAY_LEN(folders); i++)
		if (!fs_path(path, "%s/" RULES, folders[i]) && stat(path, &st) == 0)
			return S_ISREG(st.st_mode) && st.st_size > 0;
	return false;
}

static bool queue_is_empty(void)
{
	return !fs_exists("/run/udev/queue");
}

void udev_settle(unsigned limit_ms)
{
	const uint64_t until = now_ms() + limit_ms;

	if (udev_runs())
		while (!queue_is_empty() && pause_until(until))
			;
}

/* Before Linux 6.17 the event of CONNECT comes before the attribute that our rules look at. */
static bool kernel_is_early(void)
{
	struct utsname u;
	unsigned long major, minor;
	char *end;

	if (uname(&u))
		return false;
	major = strtoul(u.release, &end, 10);
	minor = *end == '.' ? strtoul(end + 1, NULL, 10) : 0;
	return major < 6 || (major == 6 && minor < 17);
}

static bool link_is_there(const char *link, dev_t dev)
{
	char path[SYSFS_PATH_LEN];
	struct stat st;

	return !fs_path(path, "/dev/nbdrs/%s", link) && stat(path, &st) == 0 &&
	       S_ISBLK(st.st_mode) && st.st_rdev == dev;
}

/* What udev has not done yet; NULL when nothing is missing. `link` "" = none is made for this name. */
static const char *udev_missing(const struct device *d, const char *link,
				struct device_parts *parts, char *what, size_t what_len)
{
	if (link[0] && !link_is_there(link, d->dev)) {
		(void)snprintf(what, what_len,
			       "udev has not made /dev/nbdrs/%s; --no-udev does not wait for it",
			       link);
		return what;
	}
	if (device_parts(d->name, parts))
		return "the device went away";
	for (unsigned i = 0; i < parts->n; i++)
		if (!fs_exists("/run/udev/data/b%u:%u", major(parts->part[i].dev),
			       minor(parts->part[i].dev))) {
			(void)snprintf(what, what_len,
				       "udev has not handled %s; --no-udev does not wait for it",
				       parts->part[i].name);
			return what;
		}
	return NULL;
}

static int wait_udev(const struct usable *u, const struct device *d, uint64_t until,
		     struct err *err)
{
	_cleanup_free_ struct device_parts *parts = malloc(sizeof(*parts));
	char link[LINK_NAME_LEN] = "", what[LINK_NAME_LEN + 128];
	const uint64_t begin = now_ms();
	uint64_t trigger_at = begin + (kernel_is_early() ? EARLY_MS : TRIGGER_MS);
	const char *missing;

	if (!parts)
		return err_set(err, -ENOMEM, "out of memory");
	if (rules_are_there() && d->has_backend && name_to_link(u->backend, link))
		link[0] = '\0';
	do {
		missing = udev_missing(d, link, parts, what, sizeof(what));
		/*
		 * Most often udev came late enough to see the attribute all the same. Not while it is busy:
		 * events of a disk hold up those of its partitions.
		 */
		if (missing && link[0] && now_ms() >= trigger_at && queue_is_empty()) {
			announce_again(d->name);
			trigger_at = now_ms() + TRIGGER_MS;
			continue;
		}
		if (!missing && (queue_is_empty() || now_ms() >= begin + QUEUE_MS))
			return 0;
	} while (pause_until(until));
	return missing ? late(err, missing) : 0;
}

void udev_wait_unlinked(const char *backend, unsigned limit_ms)
{
	const uint64_t until = now_ms() + limit_ms;
	char link[LINK_NAME_LEN], path[SYSFS_PATH_LEN];
	struct stat st;

	if (!udev_runs() || !rules_are_there() || name_to_link(backend, link) ||
	    fs_path(path, "/dev/nbdrs/%s", link))
		return;
	while (lstat(path, &st) == 0 && pause_until(until))
		;
}

int usable_wait(const struct usable *u, struct err *err)
{
	_cleanup_free_ struct device *d = malloc(sizeof(*d));
	const uint64_t until = now_ms() + u->limit_ms;
	int rc;

	if (!d)
		return err_set(err, -ENOMEM, "out of memory");
	rc = wait_size(u, d, until, err);
	if (!rc)
		rc = wait_node(d, until, err);
	if (!rc && u->probe_ms && now_ms() + u->probe_ms < until) {
		rc = wait_read(d, now_ms() + u->probe_ms, err);
		if (rc == -ETIMEDOUT)
			rc = -EAGAIN;
	} else if (!rc) {
		rc = wait_read(d, until, err);
	}
	if (!rc)
		announce_release(u->index, u->backend);
	/* udev's work begins now, so its time does, too. */
	if (!rc && u->waits_for_udev && udev_runs())
		rc = wait_udev(u, d, now_ms() + u->limit_ms, err);
	return rc;
}
