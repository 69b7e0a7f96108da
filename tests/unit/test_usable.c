/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What keeps a device from being called usable (tool/usable.c), over a tree of files made here. A device
 * that is usable needs a kernel: tests/guest.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "announce.h"
#include "child.h"
#include "nbdrs/cleanup.h"
#include "sysfs.h"
#include "temp.h"
#include "usable.h"

enum { LIMIT_MS = 100 };

static char root[64];

static const struct usable disk0 = { .index = 0,
				     .size = 1 << 20,
				     .backend = "nbdrs.disk0",
				     .waits_for_udev = true,
				     .limit_ms = LIMIT_MS };

static void put(const char *file, const char *text)
{
	char path[256];
	FILE *f;

	(void)snprintf(path, sizeof(path), "%s%s", root, file);
	for (char *p = strchr(path + strlen(root) + 1, '/'); p; p = strchr(p + 1, '/')) {
		*p = '\0';
		assert_true(mkdir(path, 0755) == 0 || errno == EEXIST);
		*p = '/';
	}
	f = fopen(path, "we");
	assert_non_null(f);
	assert_true(fputs(text, f) >= 0);
	assert_int_equal(fclose(f), 0);
}

static int setup(void **state)
{
	(void)snprintf(root, sizeof(root), "/tmp/nbdrs-usable.XXXXXX");
	assert_non_null(mkdtemp(root));
	fs_root = root;
	return 0;
}

static int teardown(void **state)
{
	return temp_remove(root);
}

static void late(const char *what)
{
	struct err err = { "" };
	const uint64_t begin = now_ms();

	assert_int_equal(usable_wait(&disk0, &err), -ETIMEDOUT);
	if (!strstr(err.msg, what))
		fail_msg("'%s' does not say '%s'", err.msg, what);
	assert_true(now_ms() - begin >= LIMIT_MS);
}

static void test_stages(void **state)
{
	struct err err = { "" };

	late("nbd0 with 0 bytes"); /* no such device at all */
	put("/sys/block/nbd0/dev", "43:0\n");
	put("/sys/block/nbd0/size", "0\n");
	put("/sys/block/nbd0/pid", "1\n");
	put("/sys/block/nbd0/backend", "nbdrs.disk0\n");
	late("nbd0 with 0 bytes");
	put("/sys/block/nbd0/size", "2047\n");
	late("1048064 bytes");
	put("/sys/block/nbd0/size", "2048\n");
	late("no node");
	put("/dev/nbd0", ""); /* a file is no node */
	late("no node");
	put("/sys/block/nbd0/backend", "nbdrs.other\n");
	assert_int_equal(usable_wait(&disk0, &err), -EBUSY);
	assert_non_null(strstr(err.msg, "nbdrs.other"));
}

/* udev runs where somebody listens at its socket, not where the file is left over. */
static void test_udev_runs(void **state)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	int fd;

	assert_false(udev_runs());
	put("/run/udev/x", "");
	(void)snprintf(sa.sun_path, sizeof(sa.sun_path), "%s/run/udev/control", root);
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	assert_true(fd >= 0);
	assert_int_equal(bind(fd, (struct sockaddr *)&sa, sizeof(sa)), 0);
	assert_false(udev_runs());
	assert_int_equal(listen(fd, 0), 0);
	assert_true(udev_runs());
	assert_true(udev_runs()); /* one waits there already */
	assert_int_equal(close(fd), 0);
	assert_false(udev_runs());
}

/* Without udev nothing is waited for; with a queue that never empties, no longer than said. */
static void test_settle(void **state)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	uint64_t begin = now_ms();
	int fd;

	put("/run/udev/queue", "");
	udev_settle(10000);
	assert_true(now_ms() - begin < 5000);
	(void)snprintf(sa.sun_path, sizeof(sa.sun_path), "%s/run/udev/control", root);
	assert_int_equal(unlink(sa.sun_path), 0);
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	assert_int_equal(bind(fd, (struct sockaddr *)&sa, sizeof(sa)), 0);
	assert_int_equal(listen(fd, 4), 0);
	begin = now_ms();
	udev_settle(LIMIT_MS);
	assert_true(now_ms() - begin >= LIMIT_MS);
	/* Without our rules there is no link to wait for. */
	put("/dev/nbdrs/disk0", "");
	begin = now_ms();
	udev_wait_unlinked("nbdrs.disk0", 10000);
	assert_true(now_ms() - begin < 5000);
	put("/usr/lib/udev/rules.d/60-nbdrs.rules", "# rules\n");
	begin = now_ms();
	udev_wait_unlinked("nbdrs.disk0", LIMIT_MS);
	assert_true(now_ms() - begin >= LIMIT_MS);
	udev_wait_unlinked("nbdrs.disk1", 10000);
	/* An empty file where it counts more masks them. */
	put("/etc/udev/rules.d/60-nbdrs.rules", "");
	begin = now_ms();
	udev_wait_unlinked("nbdrs.disk0", 10000);
	assert_true(now_ms() - begin < 5000);
	assert_int_equal(close(fd), 0);
}

static bool is_there(const char *file)
{
	return fs_exists("%s", file);
}

static void must_say(const char *file, const char *text)
{
	char got[32];

	assert_int_equal(fs_read(got, sizeof(got), "%s", file), 0);
	assert_string_equal(got, text);
}

/* What is held is announced when it is released: the disk and its partitions, once. */
static void test_announce(void **state)
{
	static const char export[] = "/run/nbdrs-attach/export-my\\x20disk", device[] = "/run/nbdrs-attach/device-nbd3";
	static const char backend[] = "nbdrs.my%20disk~0123456789abcdef";
	static const char disk[] = "/sys/class/block/nbd3/uevent", part[] = "/sys/class/block/nbd3p1/uevent";

	put("/sys/block/nbd3/dev", "43:96\n");
	put("/sys/block/nbd3/nbd3p1/dev", "43:97\n");
	put(disk, "");
	put(part, "");
	announce_hold(3, backend);
	assert_true(is_there(export) && is_there(device));
	announce_hold(3, backend); /* a tool that was killed has left them */
	must_say(disk, "");
	announce_release(3, backend);
	assert_false(is_there(export) || is_there(device));
	must_say(disk, "change");
	must_say(part, "change");
	put(disk, "");
	announce_release(3, backend);
	must_say(disk, "");
	/* The kernel is to choose, and finds no device. */
	announce_hold(-1, backend);
	assert_true(is_there(export) && !is_there(device));
	announce_release(-1, backend);
	assert_false(is_there(export));
	must_say(disk, "");
	/* A name that gets no link. */
	announce_hold(-1, "nbdrs..hidden");
	announce_release(3, "nbdrs..hidden");
	must_say(disk, "");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_stages),
		cmocka_unit_test(test_udev_runs),
		cmocka_unit_test(test_settle),
		cmocka_unit_test(test_announce),
	};

	return cmocka_run_group_tests(tests, setup, teardown);
}
