/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Does the simulator find what is wrong with a journal? A toy: records of three sectors, appended and
 * acknowledged one after the other. The right one passes; each of the others leaves out one thing that
 * only crashes show, and must be caught. Also the model of a test: what was acknowledged, in memory that
 * survives.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "sim.h"

enum { RECORD = 1536, RECORDS = 12, WORDS = RECORD / sizeof(uint64_t) };

struct model {
	uint64_t acked; /* records, or the version of what is replaced as a whole */
};

enum flaw {
	NO_FOLDER_SYNC = 1 << 0,
	ACK_BEFORE_SYNC = 1 << 1,
	NO_CHECKSUM = 1 << 2,
	RENAME_FIRST = 1 << 3,   /* before the new contents are synced */
	TRUST_2ND_SYNC = 1 << 4, /* after one that failed: the data is gone, its error reported */
};

/* word 0: number; word 1: checksum; the rest follows from the number. */
static void fill(uint64_t *record, uint64_t number)
{
	record[0] = number;
	record[1] = number * UINT64_C(0x9e3779b97f4a7c15);
	for (unsigned k = 2; k < WORDS; k++) {
		record[k] = number * 1000 + k;
		record[1] += record[k] * (2 * k + 1);
	}
}

static bool is_whole(const uint64_t *record)
{
	uint64_t sum = record[0] * UINT64_C(0x9e3779b97f4a7c15);

	for (unsigned k = 2; k < WORDS; k++)
		sum += record[k] * (2 * k + 1);
	return record[0] != 0 && record[1] == sum;
}

static CO_FN int open_file(const char *name, int flags)
{
	return io_openat(AT_FDCWD, name, flags, 0600);
}

static CO_FN int sync_folder(void)
{
	int fd = open_file("/disk", O_RDONLY | O_DIRECTORY), rc = -EIO;

	if (fd < 0)
		return fd;
	/* Names that could not be made durable stay to be done, unlike data. */
	for (unsigned tries = 0; rc == -EIO && tries < 20; tries++)
		rc = io_fsync(fd);
	(void)io_close(fd);
	return rc;
}

static CO_FN int write_at(int fd, const uint64_t *record, uint64_t off)
{
	struct iovec v = { (void *)(uintptr_t)record, RECORD };

	return io_pwrite_full(fd, &v, 1, off, 0);
}

/*
 * An error of the disk is gone when it has been told: what was written since the last sync must be
 * written again.
 */
static CO_FN int make_durable(int fd, const uint64_t *record, uint64_t off, unsigned flaws)
{
	int rc = io_fdatasync(fd);

	for (unsigned tries = 0; rc != 0 && tries < 20; tries++) {
		rc = flaws & TRUST_2ND_SYNC ? 0 : write_at(fd, record, off);
		if (rc == 0)
			rc = io_fdatasync(fd);
	}
	return rc;
}

static CO_FN int append(struct model *m, unsigned flaws)
{
	int fd = open_file("/disk/journal", O_RDWR | O_CREAT);
	uint64_t record[WORDS];

	SIM_EXPECT(fd >= 0, "%d", fd);
	if (!(flaws & NO_FOLDER_SYNC))
		SIM_EXPECT(sync_folder() == 0);
	for (uint64_t k = 1; k <= RECORDS; k++) {
		fill(record, k);
		SIM_EXPECT(write_at(fd, record, (k - 1) * RECORD) == 0);
		if (flaws & ACK_BEFORE_SYNC)
			m->acked = k;
		SIM_EXPECT(make_durable(fd, record, (k - 1) * RECORD, flaws) == 0);
		m->acked = k;
	}
	SIM_EXPECT(io_close(fd) == 0);
	return 0;
}

static CO_FN int replay(struct model *m, unsigned flaws)
{
	int fd = open_file("/disk/journal", O_RDWR);
	uint64_t record[WORDS], want[WORDS], n = 0;
	struct iovec v = { record, RECORD };

	SIM_EXPECT(fd >= 0 || m->acked == 0, "%" PRIu64 " acknowledged, no journal", m->acked);
	while (fd >= 0 && io_pread_full(fd, &v, 1, n * RECORD) == 0) {
		if (flaws & NO_CHECKSUM ? record[0] == 0 : !is_whole(record))
			break;
		fill(want, ++n);
		SIM_EXPECT(memcmp(record, want, RECORD) == 0, "record %" PRIu64 " is wrong", n);
	}
	SIM_EXPECT(n >= m->acked, "%" PRIu64 " acknowledged, %" PRIu64 " found", m->acked, n);
	if (fd >= 0)
		SIM_EXPECT(io_close(fd) == 0);
	return 0;
}

/* One record, replaced by renaming a new one over it. */
static CO_FN int replace(struct model *m, unsigned flaws)
{
	uint64_t record[WORDS];
	int folder = open_file("/disk", O_RDONLY | O_DIRECTORY);

	for (uint64_t k = 1; k <= RECORDS / 2; k++) {
		int fd = io_openat(folder, "new", O_WRONLY | O_CREAT | O_TRUNC, 0600);

		SIM_EXPECT(fd >= 0, "%d", fd);
		fill(record, k);
		SIM_EXPECT(write_at(fd, record, 0) == 0);
		if (!(flaws & RENAME_FIRST))
			SIM_EXPECT(io_fdatasync(fd) == 0);
		SIM_EXPECT(io_renameat(folder, "new", "state") == 0);
		SIM_EXPECT(io_fdatasync(fd) == 0);
		SIM_EXPECT(io_close(fd) == 0);
		SIM_EXPECT(io_fsync(folder) == 0);
		m->acked = k;
	}
	SIM_EXPECT(io_close(folder) == 0);
	return 0;
}

static CO_FN int find_state(void *model)
{
	struct model *m = model;
	int fd = open_file("/disk/state", O_RDONLY);
	uint64_t record[WORDS];
	struct iovec v = { record, RECORD };

	SIM_EXPECT(fd >= 0 || m->acked == 0, "%" PRIu64 " acknowledged, nothing there", m->acked);
	if (fd < 0)
		return 0;
	SIM_EXPECT(io_pread_full(fd, &v, 1, 0) == 0, "short");
	SIM_EXPECT(is_whole(record), "torn");
	SIM_EXPECT(record[0] >= m->acked, "%" PRIu64 " acknowledged, %" PRIu64 " found", m->acked,
		   record[0]);
	SIM_EXPECT(io_close(fd) == 0);
	return 0;
}

#define FLAWED(name, flaws)                         \
	static CO_FN int append_##name(void *model) \
	{                                           \
		return append(model, flaws);        \
	}                                           \
	static CO_FN int replay_##name(void *model) \
	{                                           \
		return replay(model, flaws);        \
	}

FLAWED(right, 0)
FLAWED(no_folder_sync, NO_FOLDER_SYNC)
FLAWED(ack_before_sync, ACK_BEFORE_SYNC)
FLAWED(no_checksum, NO_CHECKSUM)
FLAWED(trust_2nd_sync, TRUST_2ND_SYNC)

static CO_FN int replace_right(void *model)
{
	return replace(model, 0);
}

static CO_FN int replace_wrong(void *model)
{
	return replace(model, RENAME_FIRST);
}

#define JOURNAL(name_) \
	.scenario = append_##name_, .recover = replay_##name_, .model_len = sizeof(struct model)
#define STATE(fn) .scenario = fn, .recover = find_state, .model_len = sizeof(struct model)

static const struct sim_case cases[] = {
	{ .name = "journal", JOURNAL(right), .crash = SIM_ANY_CRASH, .crashes = 2, .seeds = 300 },
	{ .name = "journal-killed", JOURNAL(ack_before_sync), .crash = SIM_KILL, .seeds = 100 },
	{ .name = "journal-sick-disk",
	  JOURNAL(right),
	  .crash = SIM_ANY_CRASH,
	  .seeds = 200,
	  .faults = { .sync_ppm = 200000, .short_ppm = 300000 } },
	{ .name = "wrong-no-folder-sync",
	  JOURNAL(no_folder_sync),
	  .crash = SIM_POWER_CUT,
	  .seeds = 2000,
	  .must_fail = true },
	{ .name = "wrong-ack-before-sync",
	  JOURNAL(ack_before_sync),
	  .crash = SIM_POWER_CUT,
	  .seeds = 2000,
	  .must_fail = true },
	{ .name = "wrong-no-checksum",
	  JOURNAL(no_checksum),
	  .crash = SIM_POWER_CUT,
	  .seeds = 2000,
	  .must_fail = true },
	{ .name = "wrong-trust-2nd-sync",
	  JOURNAL(trust_2nd_sync),
	  .crash = SIM_POWER_CUT,
	  .seeds = 2000,
	  .faults = { .sync_ppm = 200000 },
	  .must_fail = true },
	{ .name = "replace", STATE(replace_right), .crash = SIM_ANY_CRASH, .seeds = 300 },
	{ .name = "wrong-rename-first",
	  STATE(replace_wrong),
	  .crash = SIM_POWER_CUT,
	  .seeds = 2000,
	  .must_fail = true },
};

int main(int argc, char **argv)
{
	return sim_main(argc, argv, cases, ARRAY_LEN(cases));
}
