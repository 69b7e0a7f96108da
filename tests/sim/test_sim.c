/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The simulator itself: clock, schedule, names, faults, and what a crash leaves. What must be possible
 * but not certain (a torn write, a name that survives unsynced) is a case that claims the opposite and
 * must be caught.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>

#include "nbdrs/cleanup.h"
#include "sim.h"

enum { SECTOR = 512, PAGE = 4096 };
#define NS_PER_S UINT64_C(1000000000)

/* ---- helpers ---- */

static CO_FN int open_at(const char *path, int flags)
{
	return io_openat(AT_FDCWD, path, flags, 0600);
}

static CO_FN int create(const char *path)
{
	return open_at(path, O_RDWR | O_CREAT);
}

/* `len` bytes of one value; bytes written or -errno. */
static CO_FN ssize_t put(int fd, uint8_t value, uint64_t off, size_t len, int rwf)
{
	static uint8_t bytes[64 * 1024];
	struct iovec v = { bytes, len };

	memset(bytes, value, len);
	return io_pwritev(fd, &v, 1, off, rwf);
}

/* Of len bytes read whole, how many are `value`; -1 when there are fewer. */
static CO_FN int count(int fd, uint8_t value, uint64_t off, size_t len)
{
	uint8_t bytes[2 * PAGE];
	struct iovec v = { bytes, len };
	int n = 0;

	if (io_pread_full(fd, &v, 1, off) != 0)
		return -1;
	for (size_t k = 0; k < len; k++)
		n += bytes[k] == value;
	return n;
}

static CO_FN int sync_folder(void)
{
	int fd = open_at("/disk", O_RDONLY | O_DIRECTORY);
	int rc = fd < 0 ? fd : io_fsync(fd);

	return fd < 0 ? rc : rc + io_close(fd);
}

static CO_FN bool exists(const char *path)
{
	int fd = open_at(path, O_RDONLY);

	if (fd >= 0)
		(void)io_close(fd);
	return fd >= 0;
}

/* A file of `pages` pages of one value, durable with its name. */
static CO_FN int durable(const char *path, uint8_t value, unsigned pages)
{
	int fd = create(path);

	if (fd < 0 || put(fd, value, 0, (size_t)pages * PAGE, 0) != (ssize_t)pages * PAGE ||
	    io_fdatasync(fd) != 0 || sync_folder() != 0)
		return -EIO;
	return fd;
}

/* ---- clock and schedule ---- */

static CO_FN int clock_jumps(void *model)
{
	uint64_t begin = now_ns(), wall = wall_ns();

	(void)model;
	co_sleep(24 * 3600 * NS_PER_S);
	SIM_EXPECT(now_ns() - begin >= 24 * 3600 * NS_PER_S);
	SIM_EXPECT(now_ns() - begin < 24 * 3600 * NS_PER_S + NS_PER_S,
		   "late by more than a second");
	SIM_EXPECT(wall_ns() - wall == now_ns() - begin);
	SIM_EXPECT(reactor_now() <= now_ns());
	/* Who waits by looking at the clock gets on as well. */
	for (begin = now_ns(); now_ns() < begin + 1000000;)
		co_yield();
	return 0;
}

struct order {
	unsigned n;
	char text[8];
};

struct runner {
	struct order *order;
	char name;
};

static CO_FN void run_once(void *arg)
{
	struct runner r = *(struct runner *)arg;

	co_yield();
	r.order->text[r.order->n++] = r.name;
}

static CO_FN int schedule_varies(void *model)
{
	unsigned seen = 0;

	(void)model;
	for (unsigned round = 0; round < 200; round++) {
		struct order order = { 0 };
		struct runner r[3] = { { &order, 'a' }, { &order, 'b' }, { &order, 'c' } };
		struct co_group g = CO_GROUP_INIT;
		static const char *const all[] = { "abc", "acb", "bac", "bca", "cab", "cba" };

		for (unsigned k = 0; k < 3; k++)
			co_group_spawn(&g, run_once, &r[k]);
		co_group_wait(&g);
		for (unsigned k = 0; k < ARRAY_LEN(all); k++)
			seen |= (strcmp(order.text, all[k]) == 0) << k;
	}
	SIM_EXPECT(seen == 63, "orders seen: %x", seen);
	return 0;
}

static int add_one(void *arg)
{
	return ++*(int *)arg;
}

static CO_FN int offload_takes_time(void *model)
{
	uint64_t begin = now_ns();
	int n = 41;

	(void)model;
	SIM_EXPECT(offload(add_one, &n) == 42 && n == 42);
	SIM_EXPECT(now_ns() > begin);
	SIM_EXPECT(random_start() != random_start());
	return 0;
}

static CO_FN void wait_for_ever(void *arg)
{
	(void)arg;
	for (;;)
		co_park();
}

static CO_FN int leaves_a_fiber(void *model)
{
	(void)model;
	return co_spawn(wait_for_ever, NULL);
}

static CO_FN int hangs(void *model)
{
	wait_for_ever(model);
	return 0;
}

static CO_FN int aborts(void *model)
{
	fprintf(stderr, "what an assertion says\n");
	abort();
}

/* By what differs from process to process: where the memory is. */
static CO_FN int not_repeatable(void *model)
{
	co_sleep((uintptr_t)model >> 12);
	return 0;
}

/* ---- names ---- */

static int note_name(void *arg, const char *name)
{
	unsigned *seen = arg;

	*seen |= strcmp(name, "a") == 0     ? 1
		 : strcmp(name, "b") == 0   ? 2
		 : strcmp(name, "sub") == 0 ? 4
					    : 8;
	return 0;
}

static CO_FN int names(void *model)
{
	int folder = open_at("/disk", O_RDONLY | O_DIRECTORY), fd, other;
	unsigned seen = 0;
	struct stat st;

	(void)model;
	fd = io_openat(folder, "a", O_RDWR | O_CREAT | O_EXCL, 0600);
	SIM_EXPECT(fd >= 0);
	SIM_EXPECT(io_openat(folder, "a", O_RDWR | O_CREAT | O_EXCL, 0600) == -EEXIST);
	SIM_EXPECT(io_openat(folder, "none", O_RDWR, 0) == -ENOENT);
	SIM_EXPECT(io_openat(folder, "none/x", O_RDWR | O_CREAT, 0600) == -ENOENT);
	SIM_EXPECT(io_openat(folder, "a/x", O_RDWR, 0) == -ENOTDIR);
	SIM_EXPECT(io_mkdirat(folder, "sub", 0700) == 0);
	SIM_EXPECT(io_mkdirat(folder, "sub", 0700) == -EEXIST);
	other = open_at("/disk/sub/b", O_RDWR | O_CREAT);
	SIM_EXPECT(other >= 0);
	SIM_EXPECT(io_unlinkat(folder, "sub", AT_REMOVEDIR) == -ENOTEMPTY);
	SIM_EXPECT(io_unlinkat(folder, "sub", 0) == -EISDIR);
	SIM_EXPECT(put(other, 1, 0, PAGE, 0) == PAGE);
	SIM_EXPECT(io_unlinkat(folder, "sub/b", 0) == 0);
	SIM_EXPECT(count(other, 1, 0, PAGE) == PAGE, "a file lives as long as it is open");
	SIM_EXPECT(io_close(other) == 0 && io_close(other) == -EBADF);
	SIM_EXPECT(io_renameat(folder, "a", "b") == 0 && !exists("/disk/a") && exists("/disk/b"));
	SIM_EXPECT(io_list(folder, note_name, &seen) == 0 && seen == 6, "%u", seen);
	SIM_EXPECT(io_ftruncate(fd, 3 * PAGE) == 0 && io_fstat(fd, &st) == 0 &&
		   st.st_size == 3 * PAGE);
	SIM_EXPECT(count(fd, 0, 0, PAGE) == PAGE);
	SIM_EXPECT(put(fd, 7, 0, 2 * PAGE, 0) == 2 * PAGE && io_ftruncate(fd, 100) == 0 &&
		   io_ftruncate(fd, PAGE) == 0);
	SIM_EXPECT(count(fd, 7, 0, PAGE) == 100, "what was cut off comes back as zeroes");
	return io_close(fd) + io_close(folder);
}

static CO_FN int locks(void *model)
{
	int a = create("/disk/lock"), b = create("/disk/lock");

	(void)model;
	SIM_EXPECT(io_flock(a, LOCK_EX) == 0 && io_flock(b, LOCK_EX) == -EWOULDBLOCK &&
		   io_flock(b, LOCK_SH) == -EWOULDBLOCK);
	SIM_EXPECT(io_flock(a, LOCK_SH) == 0 && io_flock(b, LOCK_SH) == 0 &&
		   io_flock(b, LOCK_EX) == -EWOULDBLOCK);
	SIM_EXPECT(io_close(a) == 0 && io_flock(b, LOCK_EX) == 0);
	sim_crash(SIM_KILL); /* a lock dies with its process */
}

static CO_FN int locks_are_free(void *model)
{
	int a = open_at("/disk/lock", O_RDWR);

	(void)model;
	SIM_EXPECT(a >= 0 && io_flock(a, LOCK_EX) == 0);
	return 0;
}

/* ---- faults ---- */

static CO_FN int faults_by_rule(void *model)
{
	int fd = durable("/disk/a", 1, 2), other;

	(void)model;
	SIM_EXPECT(fd >= 0);
	sim_fail(SIM_READ, "/a", 1, 2, -EIO);
	SIM_EXPECT(count(fd, 1, 0, PAGE) == PAGE && count(fd, 1, 0, PAGE) == -1 &&
		   count(fd, 1, 0, PAGE) == -1 && count(fd, 1, 0, PAGE) == PAGE);
	sim_fail(SIM_OPEN, "b", 0, 1, -EMFILE);
	SIM_EXPECT(create("/disk/b") == -EMFILE);
	/* A failed sync is told to each fd once, and no more. */
	other = open_at("/disk/a", O_RDWR);
	sim_fail(SIM_SYNC, "a", 0, 1, -EIO);
	SIM_EXPECT(put(fd, 2, 0, PAGE, 0) == PAGE);
	SIM_EXPECT(io_fdatasync(fd) == -EIO && io_fdatasync(fd) == 0);
	SIM_EXPECT(io_fdatasync(other) == -EIO && io_fdatasync(other) == 0);
	SIM_EXPECT(sim_flip("/disk/a", PAGE, PAGE, 1) == 0 && count(fd, 1, PAGE, PAGE) == PAGE - 1);
	SIM_EXPECT(sim_flip("/disk/a", 0, 9 * PAGE, 1) == -ERANGE);
	return io_close(fd) + io_close(other);
}

static CO_FN int full_disk(void *model)
{
	struct sim_faults f = { .space = 8 * PAGE };
	int fd = create("/disk/a");

	(void)model;
	sim_set_faults(&f);
	SIM_EXPECT(put(fd, 1, 0, 6 * PAGE, 0) == 6 * PAGE);
	SIM_EXPECT(put(fd, 1, 6 * PAGE, 6 * PAGE, 0) == 2 * PAGE, "what fits");
	SIM_EXPECT(put(fd, 1, 8 * PAGE, PAGE, 0) == -ENOSPC && put(fd, 2, 0, PAGE, 0) == PAGE,
		   "overwriting needs no room");
	SIM_EXPECT(io_fallocate(fd, 0, 8 * PAGE, PAGE) == -ENOSPC &&
		   io_ftruncate(fd, 4 * PAGE) == 0);
	SIM_EXPECT(io_fallocate(fd, 0, 4 * PAGE, 4 * PAGE) == 0 &&
		   put(fd, 1, 4 * PAGE, 4 * PAGE, 0) == 4 * PAGE);
	return io_close(fd);
}

static CO_FN int direct(void *model)
{
	_Alignas(512) static uint8_t bytes[PAGE];
	int fd = open_at("/disk/a", O_RDWR | O_CREAT | O_DIRECT);
	struct iovec good = { bytes, PAGE }, bad = { bytes, 100 }, odd = { bytes + 8, 512 };

	(void)model;
	SIM_EXPECT(io_pwritev(fd, &good, 1, 0, 0) == PAGE &&
		   io_pwritev(fd, &good, 1, 8, 0) == -EINVAL);
	SIM_EXPECT(io_pwritev(fd, &bad, 1, 0, 0) == -EINVAL &&
		   io_preadv(fd, &odd, 1, 0) == -EINVAL);
	return io_close(fd);
}

/* ---- what a crash leaves ---- */

static CO_FN int synced(void *model)
{
	int fd = durable("/disk/a", 1, 1), other = create("/disk/b");
	uint8_t byte = 9;

	(void)model;
	SIM_EXPECT(fd >= 0 && other >= 0);
	SIM_EXPECT(put(fd, 2, 0, PAGE, 0) == PAGE);
	SIM_EXPECT(sim_stable_read("/disk/a", &byte, 1, 0) == 1 && byte == 1, "%d", byte);
	SIM_EXPECT(io_fdatasync(fd) == 0 && sim_stable_read("/disk/a", &byte, 1, 0) == 1 &&
		   byte == 2);
	SIM_EXPECT(put(fd, 3, PAGE, PAGE, RWF_DSYNC) == PAGE); /* durable, the other one not */
	SIM_EXPECT(put(fd, 4, 2 * PAGE, PAGE, 0) == PAGE);
	sim_crash(SIM_POWER_CUT);
}

static CO_FN int find_synced(void *model)
{
	int fd = open_at("/disk/a", O_RDONLY);

	(void)model;
	SIM_EXPECT(fd >= 0);
	SIM_EXPECT(count(fd, 2, 0, PAGE) == PAGE);
	SIM_EXPECT(count(fd, 3, PAGE, PAGE) == PAGE);
	return 0;
}

/*
 * One sector for each version; a sync now and then. After a crash a sector has its synced version or a
 * later one.
 */
enum { FILES = 2, SECTORS = 24 };

struct sectors {
	uint8_t begun[FILES][SECTORS], synced[FILES][SECTORS];
	bool is_there;
};

static const char *const paths[FILES] = { "/disk/a", "/disk/b" };

static CO_FN int write_sectors(void *model)
{
	struct sectors *m = model;
	int fd[FILES];

	for (unsigned f = 0; f < FILES; f++)
		fd[f] = durable(paths[f], 0, SECTORS * SECTOR / PAGE);
	m->is_there = true;
	for (unsigned round = 0; round < 60; round++) {
		unsigned f = (unsigned)sim_below(FILES), from = (unsigned)sim_below(SECTORS),
			 n = 1 + (unsigned)sim_below(SECTORS - from);
		uint8_t bytes[SECTORS * SECTOR];
		struct iovec v = { bytes, (size_t)n * SECTOR };

		for (unsigned k = 0; k < n; k++)
			memset(bytes + k * SECTOR, ++m->begun[f][from + k], SECTOR);
		SIM_EXPECT(io_pwrite_full(fd[f], &v, 1, (uint64_t)from * SECTOR,
					  sim_chance(100000) ? RWF_DSYNC : 0) == 0);
		if (sim_chance(200000)) {
			uint8_t covers[SECTORS];

			memcpy(covers, m->begun[f], SECTORS);
			SIM_EXPECT(io_fdatasync(fd[f]) == 0);
			memcpy(m->synced[f], covers, SECTORS);
		}
	}
	return 0;
}

static CO_FN int find_sectors(void *model)
{
	const struct sectors *m = model;

	for (unsigned f = 0; f < FILES && m->is_there; f++) {
		uint8_t bytes[SECTORS * SECTOR];
		struct iovec v = { bytes, sizeof(bytes) };
		int fd = open_at(paths[f], O_RDONLY);

		SIM_EXPECT(io_pread_full(fd, &v, 1, 0) == 0);
		for (unsigned k = 0; k < SECTORS; k++) {
			uint8_t got = bytes[k * SECTOR];

			for (unsigned b = 1; b < SECTOR; b++)
				SIM_EXPECT(bytes[k * SECTOR + b] == got, "sector %u is torn", k);
			SIM_EXPECT(got >= m->synced[f][k] && got <= m->begun[f][k],
				   "sector %u: %u, synced %u, begun %u", k, got, m->synced[f][k],
				   m->begun[f][k]);
		}
	}
	return 0;
}

/* Killed: all that was answered is there. */
struct killed {
	uint8_t answered;
};

static CO_FN int write_and_be_killed(void *model)
{
	struct killed *m = model;
	int fd = create("/disk/a");

	for (uint8_t k = 1; k < 30; k++) {
		SIM_EXPECT(put(fd, k, 0, PAGE, 0) == PAGE);
		m->answered = k;
	}
	return 0;
}

static CO_FN int find_all(void *model)
{
	const struct killed *m = model;
	int fd = open_at("/disk/a", O_RDONLY), n;

	if (m->answered == 0)
		return 0;
	n = count(fd, m->answered, 0, PAGE);
	SIM_EXPECT(n >= 0);
	/* The next one may have been half done, from its beginning on. */
	SIM_EXPECT(n + count(fd, m->answered + 1, 0, PAGE) == PAGE);
	return 0;
}

/* ---- what a power cut may do, claimed to be impossible ---- */

static CO_FN int two_writes(void *model)
{
	int fd = durable("/disk/a", 1, 2);

	(void)model;
	SIM_EXPECT(put(fd, 2, 0, PAGE, 0) == PAGE && put(fd, 2, PAGE, PAGE, 0) == PAGE);
	SIM_EXPECT(create("/disk/new") >= 0);
	sim_crash(SIM_POWER_CUT);
}

static CO_FN int never_torn(void *model)
{
	int n = count(open_at("/disk/a", O_RDONLY), 2, 0, PAGE);

	(void)model;
	SIM_EXPECT(n == 0 || n == PAGE, "%d", n);
	return 0;
}

static CO_FN int never_reordered(void *model)
{
	int fd = open_at("/disk/a", O_RDONLY), first = count(fd, 2, 0, PAGE),
	    second = count(fd, 2, PAGE, PAGE);

	(void)model;
	SIM_EXPECT(second == 0 || first == PAGE, "%d %d", first, second);
	return 0;
}

static CO_FN int never_lost(void *model)
{
	(void)model;
	SIM_EXPECT(count(open_at("/disk/a", O_RDONLY), 2, 0, 2 * PAGE) == 2 * PAGE);
	return 0;
}

static CO_FN int never_kept(void *model)
{
	(void)model;
	SIM_EXPECT(count(open_at("/disk/a", O_RDONLY), 2, 0, 2 * PAGE) < 2 * PAGE);
	return 0;
}

static CO_FN int name_never_lost(void *model)
{
	(void)model;
	SIM_EXPECT(exists("/disk/new"));
	return 0;
}

static CO_FN int name_never_kept(void *model)
{
	(void)model;
	SIM_EXPECT(!exists("/disk/new"));
	return 0;
}

#define ALONE(fn)                                                        \
	{                                                                \
		.name = #fn, .scenario = fn, .seeds = 3, .is_once = true \
	}
#define CUT(fn)                                                                                    \
	{                                                                                          \
		.name = #fn, .scenario = two_writes, .recover = fn, .seeds = 100, .is_once = true, \
		.must_fail = true                                                                  \
	}
#define WRONG(fn)                                                               \
	{                                                                       \
		.name = #fn, .scenario = fn, .is_once = true, .must_fail = true \
	}

static const struct sim_case cases[] = {
	ALONE(clock_jumps),
	ALONE(schedule_varies),
	ALONE(offload_takes_time),
	WRONG(leaves_a_fiber),
	WRONG(hangs),
	WRONG(aborts),
	WRONG(not_repeatable),
	ALONE(names),
	{ .name = "locks", .scenario = locks, .recover = locks_are_free },
	ALONE(faults_by_rule),
	ALONE(full_disk),
	ALONE(direct),
	{ .name = "synced", .scenario = synced, .recover = find_synced, .seeds = 100 },
	{ .name = "sectors",
	  .scenario = write_sectors,
	  .recover = find_sectors,
	  .model_len = sizeof(struct sectors),
	  .crash = SIM_POWER_CUT,
	  .seeds = 300 },
	{ .name = "killed",
	  .scenario = write_and_be_killed,
	  .recover = find_all,
	  .model_len = sizeof(struct killed),
	  .crash = SIM_KILL,
	  .seeds = 100 },
	CUT(never_torn),
	CUT(never_reordered),
	CUT(never_lost),
	CUT(never_kept),
	CUT(name_never_lost),
	CUT(name_never_kept),
};

int main(int argc, char **argv)
{
	return sim_main(argc, argv, cases, ARRAY_LEN(cases));
}
