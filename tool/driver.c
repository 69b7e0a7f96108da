/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Bounded requests to the nbd driver: see driver.h. */
#include "driver.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "child.h"
#include "nbdrs/cleanup.h"
#include "sysfs.h"

extern char **environ;

static int probe_family(const void *arg, void *result)
{
	struct nbdnl *nl = NULL;
	int rc = nbdnl_open(&nl);

	nbdnl_close(nl);
	return rc;
}

static int run_modprobe(const void *arg, void *result)
{
	const char *path = arg;
	char *const argv[] = { (char *)(uintptr_t)path, (char *)(uintptr_t) "-q",
			       (char *)(uintptr_t) "nbd", NULL };
	pid_t pid;
	int status, rc;

	/* All descriptors are closed here; modprobe should find its usual three. */
	for (int i = 0; i < 3; i++)
		if (open("/dev/null", O_RDWR) < 0)
			return -errno;
	rc = posix_spawn(&pid, path, NULL, NULL, argv, environ);
	if (rc)
		return -rc;
	if (waitpid(pid, &status, 0) < 0)
		return -errno;
	return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : -ENOENT;
}

int driver_ensure(struct err *err)
{
	char modprobe[256];
	const struct child_job probe = { .fn = probe_family, .limit_ms = DRIVER_LIMIT_MS };
	const struct child_job load = { .fn = run_modprobe,
					.arg = modprobe,
					.limit_ms = DRIVER_MODPROBE_MS };
	int loaded, rc = child_run(&probe);

	if (rc == -ENOENT) {
		if (fs_read(modprobe, sizeof(modprobe), "/proc/sys/kernel/modprobe") ||
		    modprobe[0] != '/')
			memcpy(modprobe, "/sbin/modprobe", sizeof("/sbin/modprobe"));
		loaded = child_run(&load);
		rc = child_run(&probe);
		if (rc == -ENOENT && geteuid() != 0)
			return err_set(
				err, -EPERM,
				"the nbd module is not loaded, and only root can load it; run as root, "
				"or load it first: modprobe nbd");
		if (rc == -ENOENT)
			return err_set(
				err, -ENOENT,
				"this kernel has no nbd driver: 'modprobe nbd' %s; install the kernel's "
				"module package, or build it with CONFIG_BLK_DEV_NBD",
				loaded == 0 ? "made no difference" : "failed");
	}
	if (rc == -ETIMEDOUT)
		return err_set(
			err, rc,
			"the kernel's netlink does not answer: a request to the nbd driver hangs "
			"(see dmesg)");
	if (rc)
		return err_set(err, rc, "cannot reach the kernel's nbd driver by netlink: %s",
			       strerror(-rc));
	return 0;
}

static int do_connect(const void *arg, void *result)
{
	struct nbdnl *nl = NULL;
	int rc = nbdnl_open(&nl);

	if (!rc)
		rc = nbdnl_connect(nl, arg, result);
	nbdnl_close(nl);
	return rc;
}

static int connect_error(int rc, const struct nbdnl_connect *c, struct err *err)
{
	char name[32] = "an nbd device";

	if (c->index != NL_INDEX_ANY)
		(void)snprintf(name, sizeof(name), "/dev/nbd%u", (unsigned)c->index);
	switch (rc) {
	case -EPERM:
	case -EACCES:
		return err_set(
			err, -EPERM,
			"the kernel does not let this user attach a device; run as root (CAP_SYS_ADMIN)");
	case -EBUSY:
	case -EEXIST:
		return err_set(err, -EBUSY, "%s is in use: the kernel says %s", name, err_name(rc));
	case -EINVAL:
		return err_set(
			err, rc,
			"the kernel refuses to attach %s (EINVAL): dmesg says why; a number too high "
			"for its partitions, or a block size it cannot do, are possible causes",
			name);
	case -ETIMEDOUT:
		return err_set(err, rc,
			       "the kernel did not finish attaching %s within %d s (see dmesg)",
			       name, DRIVER_LIMIT_MS / 1000);
	default: return err_set(err, rc, "the kernel cannot attach %s: %s", name, strerror(-rc));
	}
}

int driver_connect(const struct nbdnl_connect *c, uint32_t *index, struct err *err)
{
	const struct child_job job = { .fn = do_connect,
				       .arg = c,
				       .result = index,
				       .result_len = sizeof(*index),
				       .keep = c->socks,
				       .keep_n = c->socks_n,
				       .limit_ms = DRIVER_LIMIT_MS };
	const uint64_t begin = now_ms();
	unsigned pause = 10;
	int rc;

	for (;;) {
		uint64_t waited;

		rc = child_run(&job);
		waited = now_ms() - begin;
		/*
		 * udev looking at the node makes it EBUSY, a detach that is not over EEXIST, and a device that
		 * is going away EINVAL: all short, and EINVAL has other causes that stay.
		 */
		if (!(rc == -EBUSY || rc == -EEXIST) && !(rc == -EINVAL && waited < 1000))
			break;
		if (interrupted()) {
			rc = -EINTR;
			break;
		}
		if (waited + pause > DRIVER_RETRY_MS)
			break;
		sleep_ms(pause);
		pause = MIN(pause * 2, 500u);
	}
	return rc ? connect_error(rc, c, err) : 0;
}

static int do_disconnect(const void *arg, void *result)
{
	struct nbdnl *nl = NULL;
	int rc = nbdnl_open(&nl);

	if (!rc)
		rc = nbdnl_disconnect(nl, *(const uint32_t *)arg);
	nbdnl_close(nl);
	return rc;
}

int driver_disconnect(uint32_t index, struct err *err)
{
	const struct child_job job = { .fn = do_disconnect,
				       .arg = &index,
				       .limit_ms = DRIVER_LIMIT_MS };
	int rc = child_run(&job);

	switch (rc) {
	case 0: return 0;
	case -EPERM:
		return err_set(
			err, rc,
			"the kernel does not let this user detach a device; run as root (CAP_SYS_ADMIN)");
	case -EINVAL:
	case -ENOENT: return err_set(err, -ENODEV, "the kernel knows no /dev/nbd%u", index);
	case -ETIMEDOUT:
		return err_set(
			err, rc,
			"the kernel did not finish detaching /dev/nbd%u within %d s: a request hangs "
			"until its time-out (see dmesg)",
			index, DRIVER_LIMIT_MS / 1000);
	default:
		return err_set(err, rc, "the kernel cannot detach /dev/nbd%u: %s", index,
			       strerror(-rc));
	}
}

struct reconfigure {
	uint32_t index;
	const char *backend;
	const int *socks;
	unsigned socks_n;
};

static int do_reconfigure(const void *arg, void *result)
{
	const struct reconfigure *r = arg;
	struct nbdnl *nl = NULL;
	int rc = nbdnl_open(&nl);

	if (!rc)
		rc = nbdnl_reconfigure(nl, r->index, r->backend, r->socks, r->socks_n);
	nbdnl_close(nl);
	return rc;
}

int driver_reconfigure(uint32_t index, const char *backend, const int *socks, unsigned socks_n,
		       struct err *err)
{
	const struct reconfigure r = { index, backend, socks, socks_n };
	const struct child_job job = { .fn = do_reconfigure,
				       .arg = &r,
				       .keep = socks,
				       .keep_n = socks_n,
				       .limit_ms = DRIVER_LIMIT_MS };
	int rc = child_run(&job);

	if (rc)
		return err_set(err, rc, "the kernel does not take new sockets for /dev/nbd%u: %s",
			       index, rc == -ETIMEDOUT ? "no answer" : strerror(-rc));
	return 0;
}
