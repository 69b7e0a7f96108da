/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The journal of layer cache: whose it is, errors of its own disk, fibers that cannot be had.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"
#include "world.h"

#define NS_PER_S UINT64_C(1000000000)
#define NEVER    UINT64_MAX

/* ---- whose it is ---- */

/* Leaves unsaved data in the journal. */
static CO_FN int leave_some(struct world *w)
{
	if (world_enter(w, CACHE("") DISK))
		return -1;
	for (unsigned i = 0; i < 100; i++)
		SIM_EXPECT(world_write_next(w) == 0);
	sim_remote_fails(-ETIMEDOUT, 1000000, NEVER);
	SIM_EXPECT(world_leave(w) == 0, "the journal has it");
	sim_remote_fails(-ETIMEDOUT, 0, 0);
	return 0;
}

static CO_FN int expect_refused(const char *chain, int rc, const char *message)
{
	struct volume v;
	struct err err = { "" };

	SIM_EXPECT(volume_open(&v, chain, &err) == rc && strstr(err.msg, message), "%s: %s", chain,
		   err.msg);
	return 0;
}

/*
 * What stays behind when the store is away at the end is there at the next start, for this volume
 * only.
 */
static CO_FN int whose_journal(void *model)
{
	struct world w = { 0 };

	if (leave_some(&w) ||
	    expect_refused(CACHE(",volume=x") DISK, -EBUSY,
			   "unsaved data of another volume, remote") ||
	    expect_refused("sharded:" CACHE("") "remote", -EBUSY,
			   "this one is remote. Give it a folder"))
		return -1;
	/* Neither options nor retry make another volume of it. */
	if (world_enter(&w, CACHE(",mem=4Mi") "retry:" DISK))
		return -1;
	return world_check(&w) ? -1 : world_come_back(&w);
}

#define OTHER "sharded:remote[name=x]"

static CO_FN int create(const char *text)
{
	return volume_create(text, (uint64_t)BLOCKS * BLOCK);
}

static CO_FN int destroy(const char *text, const char *export, struct err *err)
{
	struct volume v;
	int rc = volume_build(&v, text, export, err);

	if (rc == 0)
		rc = chain_destroy(v.chain, err);
	volume_free(&v);
	return rc;
}

/* A volume is removed with its own journal. With another's folder it is not, and all is as it was. */
static CO_FN int whose_journal_goes(void *model)
{
	const char *other = CACHE("") OTHER;
	struct world w = { 0 }, o = { 0 };
	struct err err = { "" };

	if (create(OTHER) || leave_some(&w))
		return -1;
	SIM_EXPECT(destroy(other, NULL, &err) == -EBUSY &&
			   strstr(err.msg, "unsaved data of another volume, remote (disk0)"),
		   "%s", err.msg);
	if (world_enter(&o, OTHER)) /* is still there */
		return -1;
	SIM_EXPECT(world_leave(&o) == 0);
	if (world_enter(&w, CACHE("") DISK) || world_check(&w) || world_come_back(&w))
		return -1;
	/* With an export's name or without one, its own goes. */
	for (unsigned i = 0; i < 2; i++) {
		if (world_enter(&o, other))
			return -1;
		SIM_EXPECT(world_write_next(&o) == 0);
		sim_remote_fails(-EACCES, 1000000, NEVER);
		SIM_EXPECT(world_leave(&o) == 0);
		sim_remote_fails(-EACCES, 0, 0);
		SIM_EXPECT(destroy(other, "disk1", &err) == -EBUSY);
		SIM_EXPECT(destroy(other, i ? "disk0" : NULL, &err) == 0, "%s", err.msg);
		SIM_EXPECT(io_openat(AT_FDCWD, "/disk/c", O_RDONLY | O_DIRECTORY, 0) == -ENOENT);
		if (create(OTHER))
			return -1;
	}
	return 0;
}

/* Writes the byte into both heads of a file of the journal. */
static CO_FN int patch(uint64_t at, uint8_t byte)
{
	struct iovec v = { &byte, 1 };
	int fd = io_openat(AT_FDCWD, "/disk/c/journal-000001", O_RDWR, 0);

	SIM_EXPECT(fd >= 0);
	SIM_EXPECT(io_pwrite_full(fd, &v, 1, at, 0) == 0 &&
		   io_pwrite_full(fd, &v, 1, 512 + at, 0) == 0);
	return io_close(fd);
}

/* A newer format and a damaged head are refused, nothing is lost by that. */
static CO_FN int odd_heads(void *model)
{
	struct world w = { 0 };

	if (leave_some(&w) || patch(8, 2) ||
	    expect_refused(CACHE("") DISK, -EPROTONOSUPPORT, "newer version"))
		return -1;
	if (patch(8, 0) || expect_refused(CACHE("") DISK, -EUCLEAN, "its head cannot be read"))
		return -1;
	if (patch(8, 1) || world_enter(&w, CACHE("") DISK))
		return -1;
	return world_check(&w) ? -1 : world_come_back(&w);
}

/* ---- memory ---- */

static bool has_no_stacks;

/* In the place of the C library's: what makes the guard page below a new stack. */
int mprotect(void *at, size_t len, int prot)
{
	if (has_no_stacks && prot == PROT_NONE) {
		errno = ENOMEM;
		return -1;
	}
	return (int)syscall(SYS_mprotect, at, len, prot);
}

struct holders {
	pthread_mutex_t lock;
	struct co_wq wq;
};

/* Until it is woken this fiber has a stack that nobody else gets. */
static CO_FN void hold_stack(void *arg)
{
	struct holders *h = arg;

	pthread_mutex_lock(&h->lock);
	co_wq_wait(&h->wq, &h->lock);
	pthread_mutex_unlock(&h->lock);
}

/* With no stack for a fiber that sends it does not open, and says why; with one that does it all. */
static CO_FN int no_stacks(void *model)
{
	struct holders h = { .lock = PTHREAD_MUTEX_INITIALIZER };
	struct world w = { 0 };

	co_wq_init(&h.wq);
	SIM_EXPECT(co_spawn(hold_stack, &h) == 0);
	has_no_stacks = true;
	while (co_spawn(hold_stack, &h) == 0)
		;
	if (expect_refused(CACHE("") DISK, -ENOMEM, "out of memory"))
		return -1;
	co_wq_wake_one(&h.wq);
	co_sleep(NS_PER_S);
	if (world_enter(&w, CACHE("") DISK))
		return -1;
	for (unsigned i = 0; i < BLOCKS; i++)
		SIM_EXPECT(world_write_next(&w) == 0);
	co_wq_wake_all(&h.wq);
	has_no_stacks = false;
	return world_check(&w) ? -1 : world_come_back(&w);
}

/* ---- the journal's own disk ---- */

/* The journal's own disk is not the store: what fails there is no reason to refuse anything. */
static CO_FN int not_cleared(void *model)
{
	struct world w = { 0 };

	if (world_enter(&w, CACHE(",away=readonly,after=30s") DISK))
		return -1;
	SIM_EXPECT(world_write_next(&w) == 0 && ch_flush(w.c) == 0);
	sim_fail(SIM_SYNC, "journal-000001", 0, 20, -EIO);
	co_sleep(60 * NS_PER_S);
	SIM_EXPECT(ch_flush(w.c) == 0 && world_write_next(&w) == 0);
	co_sleep(60 * NS_PER_S);
	return world_check(&w) ? -1 : world_come_back(&w);
}

/*
 * Idle, the journal is emptied, but the sync of that fails: its file may be a spare one now, and
 * takes no records any more.
 */
static CO_FN int not_emptied(void *model)
{
	struct world w = { 0 };
	uint64_t *written = model;

	if (world_enter(&w, "cache[disk=/disk/c,size=2Mi,mode=writeback,lag=10ms]:" DISK))
		return -1;
	SIM_EXPECT(world_write_with(&w, IO_FUA) == 0);
	sim_fail(SIM_SYNC, "journal-000001", 0, 1, -EIO);
	co_sleep(NS_PER_S + NS_PER_S / 20); /* it is tried again a second later */
	sim_remote_fails(-ETIMEDOUT, 1000000, NEVER);
	SIM_EXPECT(world_write_with(&w, IO_FUA) == 0);
	*written = w.written;
	sim_crash(SIM_KILL);
}

static CO_FN int nothing_is_lost(void *model)
{
	struct world w = { .written = *(uint64_t *)model };

	sim_remote_fails(-ETIMEDOUT, 0, 0);
	if (world_enter(&w, CACHE("") DISK))
		return -1;
	return world_check(&w) ? -1 : world_come_back(&w);
}

static CO_FN bool is_there(const char *path)
{
	const int fd = io_openat(AT_FDCWD, path, O_RDONLY, 0);

	if (fd >= 0)
		(void)io_close(fd);
	return fd >= 0;
}

/* Tries to make a file that fail use no numbers up. */
static CO_FN int numbers(void *model)
{
	struct world w = { 0 };
	unsigned failed = 0;

	if (world_enter(&w, CACHE("") DISK))
		return -1;
	sim_remote_fails(-ETIMEDOUT, 1000000, NEVER);
	sim_fail(SIM_OPEN, "", 0, 30, -EMFILE);
	sim_fail(SIM_ALLOCATE, "", 0, 30, -EIO);
	while (w.written < 200)
		SIM_EXPECT(world_write_next(&w) == 0 || ++failed <= 60);
	sim_remote_fails(-ETIMEDOUT, 0, 0);
	SIM_EXPECT(failed == 60 && is_there("/disk/c/journal-000004"));
	SIM_EXPECT(!is_there("/disk/c/journal-000006"));
	return world_check(&w) ? -1 : world_come_back(&w);
}

/* A head that cannot be written, but is there: it must not end the segment that goes on. */
static CO_FN int bad_head(void *model)
{
	struct world w = { 0 };

	if (world_enter(&w, CACHE("") DISK))
		return -1;
	sim_remote_fails(-ETIMEDOUT, 1000000, NEVER);
	sim_fail(SIM_WRITE, "journal-000002", 0, 1 + sim_below(2), -EIO);
	while (world_write_next(&w) == 0)
		;
	SIM_EXPECT(w.written == 62, "%" PRIu64, w.written);
	SIM_EXPECT(ch_zero(w.c, (struct ext){ &obj_none, 0, BLOCK }, IO_FUA) == 0, "has room");
	sim_crash(SIM_KILL);
}

static CO_FN int zeroed(void *model)
{
	struct world w = { 0 };

	sim_remote_fails(-ETIMEDOUT, 0, 0);
	if (world_enter(&w, CACHE("") DISK))
		return -1;
	for (uint64_t k = 0; k < BLOCKS; k++) {
		uint64_t words[WORDS], want = k == 0 || k >= 62 ? 0 : k + 1;

		SIM_EXPECT(read_block(w.c, k, words) == 0);
		SIM_EXPECT(words[0] == want, "block %" PRIu64 " has %" PRIu64, k, words[0]);
	}
	return world_leave(&w);
}

/* A journal of which nothing can be given back gets full, and then writes fail. They do not wait. */
static CO_FN int never_cleared(void *model)
{
	struct world w = { 0 };

	if (world_enter(&w, CACHE("") DISK))
		return -1;
	for (unsigned i = 1; i <= 8; i++) {
		char name[16];

		(void)snprintf(name, sizeof(name), "-00000%u", i);
		sim_fail(SIM_WRITE, name, 64, 1U << 30, -EIO);
	}
	world_fill_up(&w);
	SIM_EXPECT(w.rc == -EIO && w.written > 300, "%d after %" PRIu64, w.rc, w.written);
	SIM_EXPECT(ch_flush(w.c) == 0, "what was answered is safe");
	return world_leave(&w);
}

static const struct sim_case cases[] = {
	{ .name = "not-cleared", .scenario = not_cleared, .seeds = 5 },
	{ .name = "whose-journal", .scenario = whose_journal, .seeds = 3 },
	{ .name = "whose-journal-goes", .scenario = whose_journal_goes, .seeds = 3 },
	{ .name = "odd-heads", .scenario = odd_heads, .seeds = 3 },
	{ .name = "no-stacks", .scenario = no_stacks, .seeds = 3 },
	{ .name = "numbers", .scenario = numbers, .seeds = 5 },
	{ .name = "bad-head", .scenario = bad_head, .recover = zeroed, .seeds = 40 },
	{ .name = "never-cleared", .scenario = never_cleared, .seeds = 5 },
	{ .name = "not-emptied",
	  .scenario = not_emptied,
	  .recover = nothing_is_lost,
	  .model_len = sizeof(uint64_t),
	  .seeds = 10 },
};

int main(int argc, char **argv)
{
	return sim_main(argc, argv, cases, ARRAY_LEN(cases));
}
