/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What nbdrs-attach reads from /sys, /proc and the kernel's log (tool/devices.c, busy.c, loopcheck.c,
 * mounts.c, lostdata.c), over a tree of files made here.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "busy.h"
#include "devices.h"
#include "loopcheck.h"
#include "lostdata.h"
#include "mounts.h"
#include "nbdrs/cleanup.h"
#include "sysfs.h"
#include "temp.h"

static char root[256];

static void parents(char *path)
{
	for (char *p = strchr(path + strlen(root) + 1, '/'); p; p = strchr(p + 1, '/')) {
		*p = '\0';
		assert_true(mkdir(path, 0755) == 0 || errno == EEXIST);
		*p = '/';
	}
}

static void put(const char *file, const char *text)
{
	char path[PATH_MAX];
	FILE *f;

	(void)snprintf(path, sizeof(path), "%s%s", root, file);
	parents(path);
	f = fopen(path, "we");
	assert_non_null(f);
	assert_true(fputs(text, f) >= 0);
	assert_int_equal(fclose(f), 0);
}

static void put_link(const char *file, const char *target)
{
	char path[PATH_MAX];

	(void)snprintf(path, sizeof(path), "%s%s", root, file);
	parents(path);
	assert_int_equal(symlink(target, path), 0);
}

static int setup(void **state)
{
	(void)snprintf(root, sizeof(root), "%s/nbdrs-devices.XXXXXX",
		       getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
	assert_non_null(mkdtemp(root));
	fs_root = root;

	put("/sys/block/vda/size", "4096\n");
	put("/sys/block/vda/dev", "254:0\n");

	/* Attached by nbdrs, with two partitions and two connections. */
	put("/sys/block/nbd0/size", "2097152\n");
	put("/sys/block/nbd0/dev", "43:0\n");
	put("/sys/block/nbd0/pid", "4711\n");
	put("/sys/block/nbd0/ro", "0\n");
	put("/sys/block/nbd0/backend", "nbdrs.my%20disk\n");
	put("/sys/block/nbd0/queue/logical_block_size", "512\n");
	put("/sys/block/nbd0/mq/0/nr_tags", "128\n");
	put("/sys/block/nbd0/mq/1/nr_tags", "128\n");
	put("/sys/block/nbd0/nbd0p1/dev", "43:1\n");
	put("/sys/block/nbd0/nbd0p1/partition", "1\n");
	put("/sys/block/nbd0/nbd0p2/dev", "43:2\n");
	put("/sys/block/nbd0/nbd0p2/partition", "2\n");
	/* Not connected. */
	put("/sys/block/nbd1/size", "0\n");
	put("/sys/block/nbd1/dev", "43:32\n");
	/* Of another program, read-only. */
	put("/sys/block/nbd10/size", "8\n");
	put("/sys/block/nbd10/dev", "43:320\n");
	put("/sys/block/nbd10/pid", "1\n");
	put("/sys/block/nbd10/ro", "1\n");
	put("/sys/block/nbd10/backend", "\n");
	/* Being detached: no size any more, but the rest. */
	put("/sys/block/nbd2/size", "0\n");
	put("/sys/block/nbd2/dev", "43:64\n");
	put("/sys/block/nbd2/pid", "1\n");
	put("/sys/block/nbd2/backend", "nbdrs.my%20disk\n");
	return 0;
}

static int teardown(void **state)
{
	return temp_remove(root);
}

static void test_get(void **state)
{
	static struct device d;

	assert_int_equal(device_get(0, &d), 0);
	assert_string_equal(d.name, "nbd0");
	assert_true(d.dev == makedev(43, 0));
	assert_true(d.is_connected && d.has_backend && !d.is_read_only);
	assert_true(d.size == UINT64_C(1) << 30);
	assert_int_equal(d.block_size, 512);
	assert_int_equal(d.queues, 2);
	assert_string_equal(d.export, "my disk");
	assert_string_equal(d.backend, "nbdrs.my%20disk");

	assert_int_equal(device_get(1, &d), 0);
	assert_false(d.is_connected || d.has_backend);
	assert_int_equal(device_get(2, &d), 0);
	assert_false(d.is_connected);
	assert_int_equal(device_get(10, &d), 0);
	assert_true(d.is_connected && d.is_read_only && d.has_backend);
	assert_string_equal(d.export, "");
	assert_int_equal(device_get(3, &d), -ENODEV);
}

/* Which volume a device may go on over: see backend.h. */
static void test_fits(void **state)
{
	static const char anonymous[] = "nbdrs.disk0", known[] = "nbdrs.disk0~0123456789abcdef";

	assert_true(device_bytes(1 << 20, 512) == 1 << 20 && device_bytes((1 << 20) + 1023, 512) == (1 << 20) + 512);
	assert_true(device_bytes((1 << 20) + 1023, 4096) == 1 << 20 && device_bytes(511, 0) == 0);
	assert_true(backend_fits(anonymous, 8192, 4096, 8192) && backend_fits(anonymous, 8192, 4096, 8192 + 4095));
	assert_false(backend_fits(anonymous, 8192, 512, 8192 + 512) || backend_fits(anonymous, 8192, 512, 4096));
	assert_true(backend_fits(known, 8192, 512, 8192) && backend_fits(known, 8192, 512, UINT64_C(1) << 40));
	assert_false(backend_fits(known, 8192, 512, 8191));
}

static void test_scan(void **state)
{
	static const uint32_t want[] = { 0, 1, 2, 10 };
	_cleanup_free_ uint32_t *list = NULL;
	uint32_t on[2];
	size_t n = 0;

	assert_int_equal(devices_scan(&list, &n), 0);
	assert_int_equal(n, ARRAY_LEN(want));
	assert_memory_equal(list, want, sizeof(want));
	assert_int_equal(devices_of_export("my disk", on, 2), 1);
	assert_int_equal(on[0], 0);
	assert_int_equal(devices_of_export("my%20disk", on, 2), 0);
	assert_int_equal(devices_of_export("", on, 2), 0);
}

static void test_by_path(void **state)
{
	uint32_t index = 77;

	assert_int_equal(device_by_path("/dev/nbd3", &index), 0);
	assert_int_equal(index, 3);
	put("/dev/nbd0", "");
	put("/dev/nbd0p1", "");
	put("/dev/vda", "");
	put_link("/dev/nbdrs/my\\x20disk", "../nbd0");
	put_link("/dev/nbdrs/my\\x20disk-part1", "../nbd0p1");
	put_link("/dev/nbdrs/wrong", "../vda");
	put_link("/dev/nbdrs/gone", "../nowhere");
	assert_int_equal(device_by_path("/dev/nbdrs/my\\x20disk", &index), 0);
	assert_int_equal(index, 0);
	assert_int_equal(device_by_path("/dev/nbdrs/my\\x20disk-part1", &index), -EISDIR);
	assert_int_equal(device_by_path("/dev/nbd0p1", &index), -EISDIR);
	assert_int_equal(device_by_path("/dev/nbdrs/wrong", &index), -EINVAL);
	assert_int_equal(device_by_path("/dev/nbdrs/gone", &index), -EINVAL);
	assert_int_equal(device_by_path("my disk", &index), -EINVAL);
}

static void test_parts(void **state)
{
	static struct device_parts p;

	assert_int_equal(device_parts("nbd0", &p), 0);
	assert_int_equal(p.n, 3);
	assert_string_equal(p.part[0].name, "nbd0");
	assert_true(device_parts_has(&p, makedev(43, 2), NULL));
	assert_true(device_parts_has(&p, 0, "/dev/nbd0p1"));
	assert_true(device_parts_has(&p, makedev(43, 0), "/dev/vda"));
	assert_false(device_parts_has(&p, makedev(43, 32), NULL));
	assert_false(device_parts_has(&p, 0, "/dev/nbd0p3"));
	assert_false(device_parts_has(&p, 0, "nbd0"));
	assert_false(device_parts_has(&p, 0, NULL));
	assert_int_equal(device_parts("nbd3", &p), -ENODEV);
}

/* --- holders --- */

static void find(const char *name, struct holders *h)
{
	static struct device_parts p;

	assert_int_equal(device_parts(name, &p), 0);
	busy_find(&p, h);
}

static bool says(const struct holders *h, const char *what)
{
	for (unsigned i = 0; i < h->n; i++)
		if (strcmp(h->text[i], what) == 0)
			return true;
	return false;
}

static void test_nobody(void **state)
{
	static struct holders h;
	char text[64] = "x";

	put("/proc/self/mountinfo", "22 1 254:1 / / rw,noatime - ext4 /dev/vda1 rw\n"
				    "30 22 0:5 / /dev rw shared:2 - devtmpfs devtmpfs rw\n"
				    "31 22 43:32 / /mnt/other rw - ext4 /dev/nbd1 rw\n");
	put("/proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n/dev/vda2 partition\t1\t0\t-2\n");
	put("/proc/77/comm", "cat\n");
	put_link("/proc/77/fd/0", "/dev/null");
	put_link("/proc/77/fd/1", "/home/nbd0");
	find("nbd0", &h);
	assert_int_equal(h.n, 0);
	assert_false(h.has_firm);
	busy_text(&h, text, sizeof(text));
	assert_string_equal(text, "");
}

static void test_process(void **state)
{
	static struct holders h;

	put("/proc/78/comm", "fio\n");
	put_link("/proc/78/fd/3", "/dev/nbd0p2");
	put_link("/proc/78/fd/4", "/dev/nbd0");
	/* Ours, which the device keeps from ending. */
	put("/proc/79/comm", "nbdrs-attach\n");
	put_link("/proc/79/fd/3", "/dev/nbd0");
	put("/proc/80/comm", "(udev-worker)\n");
	put_link("/proc/80/fd/9", "/dev/nbd0");
	find("nbd0", &h);
	assert_int_equal(h.n, 1);
	assert_false(h.has_firm);
	assert_true(h.has_udev);
	assert_true(says(&h, "open in pid 78 (fio)"));
	find("nbd1", &h);
	assert_true(h.n == 1 && h.has_firm && !h.has_udev && says(&h, "mounted on /mnt/other"));
}

static void test_holders(void **state)
{
	static struct holders h;
	char text[2000], small[40];

	put("/proc/self/mountinfo",
	    "22 1 254:1 / / rw,noatime - ext4 /dev/vda1 rw\n"
	    "40 22 43:1 / /mnt/a\\040b rw shared:3 master:1 - ext4 /dev/nbd0p1 rw\n"
	    "41 22 0:44 / /mnt/btrfs rw - btrfs /dev/nbd0p2 rw,subvol=/\n"
	    "junk\n");
	put("/proc/swaps",
	    "Filename\tType\tSize\tUsed\tPriority\n/dev/nbd0p2\tpartition\t1\t0\t-2\n");
	put("/sys/block/nbd0/nbd0p1/holders/dm-3/x", "");
	put("/sys/block/nbd0/holders/md0/x", "");
	put("/sys/block/dm-3/dm/name", "vg-lv\n");
	put("/sys/block/loop4/loop/backing_file", "/dev/nbd0\n");
	put("/sys/block/loop5/loop/backing_file", "/home/nbd0\n");
	find("nbd0", &h);
	assert_true(h.has_firm);
	assert_true(says(&h, "mounted on /mnt/a b"));
	assert_true(says(&h, "mounted on /mnt/btrfs"));
	assert_true(says(&h, "swap on /dev/nbd0p2"));
	assert_true(says(&h, "nbd0p1 is part of /dev/mapper/vg-lv"));
	assert_true(says(&h, "nbd0 is part of /dev/md0"));
	assert_true(says(&h, "/dev/nbd0 is behind /dev/loop4"));
	assert_true(says(&h, "open in pid 78 (fio)"));
	assert_int_equal(h.n + h.more, 7);
	busy_text(&h, text, sizeof(text));
	assert_non_null(strstr(text, "mounted on /mnt/a b, "));
	busy_text(&h, small, sizeof(small));
	assert_true(strlen(small) < sizeof(small));
}

/* More than can be listed are counted. */
static void test_many_holders(void **state)
{
	static struct holders h;
	static char mounts[8192], text[4000];
	size_t n = 0;

	for (unsigned i = 0; i < 50; i++)
		n += (size_t)snprintf(mounts + n, sizeof(mounts) - n,
				      "%u 1 43:0 / /mnt/%u rw - ext4 /dev/nbd0 rw\n", i, i);
	put("/proc/self/mountinfo", mounts);
	find("nbd0", &h);
	assert_int_equal(h.n, HOLDERS_MAX);
	assert_true(h.more >= 50 - HOLDERS_MAX);
	busy_text(&h, text, sizeof(text));
	assert_non_null(strstr(text, " more"));
}

/* --- parsers --- */

static void test_mount_parse(void **state)
{
	char good[] =
		"36 35 98:0 /mnt1 /mnt/x\\011y\\134 rw,noatime master:1 - ext3 /dev/root\\040 rw,errors=continue";
	char bare[] = "36 35 98:0 / /mnt rw - tmpfs none";
	static const char *const bad[] = { "",
					   "36",
					   "36 35 98:0 / /mnt rw",
					   "36 35 98:0 / /mnt rw -",
					   "36 35 98:0 / /mnt rw - ext3",
					   "36 35 98 / /mnt rw - ext3 /dev/x rw",
					   "36 35 a:b / /mnt rw - ext3 /dev/x rw",
					   "36 35 98:0:1 / /mnt rw - ext3 /dev/x rw" };
	struct mount_line m;

	assert_int_equal(mount_parse(good, &m), 0);
	assert_true(m.dev == makedev(98, 0));
	assert_string_equal(m.point, "/mnt/x\ty\\");
	assert_string_equal(m.type, "ext3");
	assert_string_equal(m.source, "/dev/root ");
	assert_string_equal(m.super_options, "rw,errors=continue");
	assert_int_equal(mount_parse(bare, &m), 0);
	assert_string_equal(m.super_options, "");
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		char line[128];

		(void)snprintf(line, sizeof(line), "%s", bad[i]);
		assert_int_equal(mount_parse(line, &m), -EINVAL);
	}
}

static void test_swap_parse(void **state)
{
	char head[] = "Filename\t\t\t\tType\t\tSize", part[] = "/dev/nbd0p2   partition 1 0 -2",
	     file[] = "/swap\\040file\\012\\04 file", empty[] = "";
	const char *name = NULL;

	assert_int_equal(swap_parse(head, &name), -EINVAL);
	assert_int_equal(swap_parse(empty, &name), -EINVAL);
	assert_null(name);
	assert_int_equal(swap_parse(part, &name), 0);
	assert_string_equal(name, "/dev/nbd0p2");
	assert_int_equal(swap_parse(file, &name), 0);
	assert_string_equal(name, "/swap file\n\\04"); /* what is no escape stays */
}

static void test_lost_data(void **state)
{
	struct lost_data lost = { 0 };
	static const char *const no[] = {
		"nbd0: detected capacity change from 0 to 131072",
		"I/O error, dev nbd0, sector 0 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 2",
		"I/O error, dev nbd01, sector 0 op 0x1:(WRITE) flags 0x0 phys_seg 1 prio class 2",
		"I/O error, dev nbd1, sector 0 op 0x1:(WRITE) flags 0x0 phys_seg 1 prio class 2",
		"Buffer I/O error on dev nbd0, logical block 0, async page read",
		"block nbd0: Connection timed out",
		"",
	};
	static const char *const yes[] = {
		"I/O error, dev nbd0, sector 0 op 0x1:(WRITE) flags 0x800 phys_seg 1 prio class 2",
		"blk_update_request: I/O error, dev nbd0, sector 8 op 0x9:(WRITE_ZEROES) flags 0x0",
		"I/O error, dev nbd0, sector 0 op 0x2:(FLUSH) flags 0x0 phys_seg 0 prio class 2",
		"Buffer I/O error on dev nbd0p1, logical block 33, lost async page write",
		"Buffer I/O error on dev nbd0, logical block 0, lost sync page write",
	};

	for (size_t i = 0; i < ARRAY_LEN(no); i++)
		lost_data_line(&lost, "nbd0", no[i]);
	assert_int_equal(lost.errors_n, 0);
	for (size_t i = 0; i < ARRAY_LEN(yes); i++) {
		lost_data_line(&lost, "nbd0", yes[i]);
		assert_int_equal(lost.errors_n, i + 1);
	}
	/* Another device's connection changes nothing, its own begins a new life. */
	lost_data_line(&lost, "nbd0", "nbd1: detected capacity change from 0 to 131072");
	lost_data_line(&lost, "nbd0", "nbd0: detected capacity change from 131072 to 0");
	assert_int_equal(lost.errors_n, ARRAY_LEN(yes));
	lost_data_line(&lost, "nbd0", "nbd0: detected capacity change from 0 to 131072");
	assert_int_equal(lost.errors_n, 0);
}

/* --- an export that stores itself --- */

static void block(const char *name, const char *dev, const char *below, const char *below_dev)
{
	char path[256], target[256];

	(void)snprintf(path, sizeof(path), "/sys/devices/virtual/block/%s/dev", name);
	put(path, dev);
	(void)snprintf(path, sizeof(path), "/sys/dev/block/%s", dev);
	(void)snprintf(target, sizeof(target), "../../devices/virtual/block/%s", name);
	put_link(path, target);
	if (below) {
		(void)snprintf(path, sizeof(path), "/sys/devices/virtual/block/%s/slaves/%s/dev",
			       name, below);
		put(path, below_dev);
	}
}

static void test_loop(void **state)
{
	struct loopcheck found = { 0 };

	block("nbd5", "43:160", NULL, NULL);
	block("nbd5/nbd5p1", "43:161", NULL, NULL);
	put("/sys/devices/virtual/block/nbd5/nbd5p1/partition", "1\n");
	block("dm-0", "253:0", "nbd5p1", "43:161");
	block("dm-1", "253:1", "dm-0", "253:0");
	block("vdb", "254:16", NULL, NULL);
	block("dm-2", "253:2", "vdb", "254:16");

	assert_int_equal(loopcheck_dev(254, 16, 0, &found), 0);
	assert_int_equal(loopcheck_dev(253, 2, 0, &found), 0);
	assert_int_equal(loopcheck_dev(99, 99, 0, &found), 0); /* sysfs knows no such device */
	assert_int_equal(found.n, 0);
	assert_int_equal(loopcheck_dev(43, 160, 0, &found), 0);
	assert_true(found.n == 1 && found.index[0] == 5);
	found.n = 0;
	assert_int_equal(loopcheck_dev(43, 161, 0, &found), 0);
	assert_true(found.n == 1 && found.index[0] == 5);
	found.n = 0;
	assert_int_equal(loopcheck_dev(253, 1, 0, &found), 0);
	assert_true(found.n == 1 && found.index[0] == 5);
}

/* Two devices on each other cannot be; if sysfs says so, it ends. */
static void test_loop_endless(void **state)
{
	struct loopcheck found = { 0 };

	block("dm-8", "253:8", "dm-9", "253:9");
	block("dm-9", "253:9", "dm-8", "253:8");
	assert_int_equal(loopcheck_dev(253, 8, 0, &found), -ELOOP);
}

/* A loop device over a file: on to the device of the file's file system, here that of the tree. */
static void test_loop_file(void **state)
{
	struct loopcheck found = { 0 };
	char text[PATH_MAX + 16], path[64];
	struct stat st;

	assert_int_equal(stat(root, &st), 0);
	if (major(st.st_dev) == 0) {
		/* tmpfs or overlay: found by the mount table. */
		(void)snprintf(text, sizeof(text), "50 1 0:99 / %s rw - btrfs %s/source rw\n", root,
			       root);
		put("/proc/self/mountinfo", text);
		put("/source", "");
	} else {
		(void)snprintf(path, sizeof(path), "%u:%u", major(st.st_dev), minor(st.st_dev));
		block("nbd6", path, NULL, NULL);
	}
	put("/file", "");
	(void)snprintf(text, sizeof(text), "%s/file\n", root);
	put("/sys/devices/virtual/block/loop7/loop/backing_file", text);
	block("loop7", "7:7", NULL, NULL);
	if (major(st.st_dev) == 0) {
		/* The source lies on the same anonymous device: it goes round, and ends. */
		assert_int_equal(loopcheck_dev(7, 7, 0, &found), -ELOOP);
		return;
	}
	assert_int_equal(loopcheck_dev(7, 7, 0, &found), 0);
	assert_true(found.n == 1 && found.index[0] == 6);
	put("/sys/devices/virtual/block/loop7/loop/backing_file", "/nowhere (deleted)\n");
	found.n = 0;
	assert_int_equal(loopcheck_dev(7, 7, 0, &found), 0);
	assert_int_equal(found.n, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_get),          cmocka_unit_test(test_scan),
		cmocka_unit_test(test_by_path),      cmocka_unit_test(test_parts),
		cmocka_unit_test(test_nobody),       cmocka_unit_test(test_process),
		cmocka_unit_test(test_holders),      cmocka_unit_test(test_many_holders),
		cmocka_unit_test(test_mount_parse),  cmocka_unit_test(test_swap_parse),
		cmocka_unit_test(test_lost_data),    cmocka_unit_test(test_loop),
		cmocka_unit_test(test_loop_endless), cmocka_unit_test(test_loop_file),
		cmocka_unit_test(test_fits),
	};

	return cmocka_run_group_tests(tests, setup, teardown);
}
