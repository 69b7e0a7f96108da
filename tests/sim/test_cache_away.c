/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer cache writing back while the store is away, refuses data or is slow; whose journal it is.
 * In the simulator, where ten minutes pass at once.
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
#include "traffic.h"

enum { BLOCKS = 512, FULL = 600 };
#define NS_PER_S UINT64_C(1000000000)
#define NEVER    UINT64_MAX

/* Blocks are written one after the other, round by round: so the count says what each holds. */
struct world {
	struct volume volume;
	struct chan *c;
	uint64_t written; /* blocks */
	uint64_t longest; /* ns: of one write */
	bool is_done;
	int rc;
};

static CO_FN int enter(struct world *w, const char *text)
{
	struct err err = { "" };

	SIM_EXPECT(volume_open(&w->volume, text, &err) == 0, "%s", err.msg);
	w->c = volume_chan(&w->volume);
	return w->c != NULL ? 0 : -1;
}

static CO_FN int leave(struct world *w)
{
	return volume_close(&w->volume);
}

static CO_FN int write_with(struct world *w, unsigned fl)
{
	const uint64_t before = now_ns();
	uint64_t words[WORDS];
	struct iovec v;
	struct iov iov = iov_one(&v, words, BLOCK);
	int rc;

	for (unsigned k = 0; k < ARRAY_LEN(words); k++)
		words[k] = w->written + 1;
	rc = ch_write(w->c, (struct ext){ &obj_none, w->written % BLOCKS * BLOCK, BLOCK }, &iov,
		      fl);
	if (rc == 0)
		w->written++;
	w->longest = MAX(w->longest, now_ns() - before);
	return rc;
}

static CO_FN int write_next(struct world *w)
{
	return write_with(w, 0);
}

static CO_FN int check(struct world *w)
{
	uint64_t words[WORDS];

	for (uint64_t k = 0; k < BLOCKS; k++) {
		uint64_t want = k < w->written ? (w->written - 1 - k) / BLOCKS * BLOCKS + k + 1 : 0;

		SIM_EXPECT(read_block(w->c, k, words) == 0);
		for (unsigned i = 0; i < ARRAY_LEN(words); i++)
			SIM_EXPECT(words[i] == want,
				   "block %" PRIu64 " has %" PRIu64 ", not %" PRIu64, k, words[i],
				   want);
	}
	return 0;
}

#define CACHE(more) "cache[disk=/disk/c,size=2Mi,mode=writeback,lag=1s,uploads=4" more "]:"
#define DISK        "remote[size=2Mi]"

/* What the store has without the cache. */
static CO_FN int check_store(const struct world *before)
{
	struct world w = { .written = before->written };
	int rc = enter(&w, DISK);

	if (rc == 0)
		rc = check(&w);
	SIM_EXPECT(leave(&w) == 0);
	return rc;
}

static CO_FN int come_back(struct world *w)
{
	sim_remote_fails(-ETIMEDOUT, 0, 0);
	for (unsigned i = 0; i < 10; i++)
		SIM_EXPECT((co_sleep(NS_PER_S), write_next(w)) == 0);
	SIM_EXPECT(ch_flush(w->c) == 0);
	SIM_EXPECT(leave(w) == 0, "it closes well");
	return check_store(w);
}

static CO_FN void fill_up(void *arg)
{
	struct world *w = arg;

	while (w->rc == 0 && w->written < FULL)
		w->rc = write_next(w);
	w->is_done = true;
}

/* Ten minutes: flushes go on, reads too, writes until there is no room, and then when there is. */
static CO_FN int away_wait(void *model)
{
	struct world w = { 0 };
	struct co_group g = CO_GROUP_INIT;

	if (enter(&w, CACHE("") DISK))
		return -1;
	sim_remote_fails(-ETIMEDOUT, 1000000, NEVER);
	co_group_spawn(&g, fill_up, &w);
	for (unsigned i = 0; i < 60; i++) {
		co_sleep(10 * NS_PER_S);
		SIM_EXPECT(ch_flush(w.c) == 0, "flush after %u s", 10 * i);
	}
	SIM_EXPECT(!w.is_done && w.written > 300, "%" PRIu64 " blocks", w.written);
	sim_remote_fails(-ETIMEDOUT, 0, 0);
	co_group_wait(&g);
	SIM_EXPECT(w.rc == 0 && w.written == FULL, "%d", w.rc);
	if (check(&w))
		return -1;
	return come_back(&w);
}

/* Before `after` nothing fails; then flushes do, and writes without room; what is there is read. */
static CO_FN int away_error(void *model)
{
	struct world w = { 0 };

	if (enter(&w, CACHE(",away=error,after=30s") DISK))
		return -1;
	sim_remote_fails(-ETIMEDOUT, 1000000, NEVER);
	SIM_EXPECT(write_next(&w) == 0);
	co_sleep(20 * NS_PER_S);
	SIM_EXPECT(ch_flush(w.c) == 0, "it has been away for less than `after`");
	co_sleep(30 * NS_PER_S);
	SIM_EXPECT(ch_flush(w.c) == -ETIMEDOUT && ch_flush(w.c) == -ETIMEDOUT, "again and again");
	SIM_EXPECT(write_next(&w) == 0, "there is room");
	fill_up(&w);
	SIM_EXPECT(w.rc == -ETIMEDOUT && w.written > 300, "%d after %" PRIu64, w.rc, w.written);
	sim_remote_fails(-ETIMEDOUT, 0, 0);
	co_sleep(30 * NS_PER_S);
	SIM_EXPECT(ch_flush(w.c) == 0, "it is back");
	/* The block of the write that failed is old or new: write it. */
	SIM_EXPECT(write_next(&w) == 0);
	return check(&w) ? -1 : come_back(&w);
}

static CO_FN int away_readonly(void *model)
{
	struct world w = { 0 };

	if (enter(&w, CACHE(",away=readonly,after=30s") DISK))
		return -1;
	for (unsigned i = 0; i < 20; i++)
		SIM_EXPECT(write_next(&w) == 0);
	sim_remote_fails(-ECONNREFUSED, 1000000, NEVER);
	co_sleep(60 * NS_PER_S);
	SIM_EXPECT(write_next(&w) == -EROFS);
	SIM_EXPECT(ch_flush(w.c) == -ECONNREFUSED);
	sim_remote_fails(-ECONNREFUSED, 0, 0);
	co_sleep(10 * NS_PER_S);
	SIM_EXPECT(write_next(&w) == 0 && ch_flush(w.c) == 0);
	return check(&w) ? -1 : come_back(&w);
}

/* All is sent, and then it takes no flush: that ends with one it takes, though nothing is sent. */
static CO_FN int flush_away(void *model)
{
	struct world w = { 0 };

	if (enter(&w,
		  CACHE(",away=readonly,after=30s") "fault[ops=flush,count=20,error=ETIMEDOUT]:" DISK))
		return -1;
	SIM_EXPECT(write_next(&w) == 0);
	co_sleep(60 * NS_PER_S);
	SIM_EXPECT(write_next(&w) == -EROFS && ch_flush(w.c) == -ETIMEDOUT);
	co_sleep(60 * NS_PER_S);
	SIM_EXPECT(write_next(&w) == 0 && ch_flush(w.c) == 0, "it is back");
	return check(&w) ? -1 : come_back(&w);
}

/* The journal's own disk is not the store: what fails there is no reason to refuse anything. */
static CO_FN int not_cleared(void *model)
{
	struct world w = { 0 };

	if (enter(&w, CACHE(",away=readonly,after=30s") DISK))
		return -1;
	SIM_EXPECT(write_next(&w) == 0 && ch_flush(w.c) == 0);
	sim_fail(SIM_SYNC, "journal-000001", 0, 20, -EIO);
	co_sleep(60 * NS_PER_S);
	SIM_EXPECT(ch_flush(w.c) == 0 && write_next(&w) == 0);
	co_sleep(60 * NS_PER_S);
	return check(&w) ? -1 : come_back(&w);
}

/* It says no, not "later": each flush says so until the data is there. */
static CO_FN int refused(void *model)
{
	struct world w = { 0 };

	if (enter(&w, CACHE("") DISK))
		return -1;
	sim_remote_fails(-EACCES, 1000000, NEVER);
	SIM_EXPECT(write_next(&w) == 0 && ch_flush(w.c) == 0, "it was not tried yet");
	co_sleep(5 * NS_PER_S);
	SIM_EXPECT(ch_flush(w.c) == -EACCES && ch_flush(w.c) == -EACCES);
	SIM_EXPECT(write_next(&w) == 0, "writes go on");
	sim_remote_fails(-EACCES, 0, 0);
	co_sleep(10 * NS_PER_S);
	SIM_EXPECT(ch_flush(w.c) == 0, "it is safe now");
	return check(&w) ? -1 : come_back(&w);
}

#define REFUSING "fault[ops=write,range=0-4Ki,error=EPERM,count=60]:"

/* One unit is refused while another is sent, again and again: no flush misses that. */
static CO_FN int one_refused(void *model)
{
	struct world w = { 0 };
	char byte = 1;
	struct iovec v;
	struct iov iov = iov_one(&v, &byte, 1);

	if (enter(&w, CACHE("") "delay[write=300ms]:" REFUSING "remote[size=8Mi]"))
		return -1;
	SIM_EXPECT(write_next(&w) == 0);
	co_sleep(3 * NS_PER_S);
	for (unsigned i = 0; i < 100; i++) {
		SIM_EXPECT(ch_write(w.c, (struct ext){ &obj_none, 4 << 20, 1 }, &iov, 0) == 0);
		SIM_EXPECT(ch_flush(w.c) == -EPERM, "flush %u", i);
		co_sleep(NS_PER_S / 10);
	}
	co_sleep(600 * NS_PER_S);
	SIM_EXPECT(ch_flush(w.c) == 0, "it is safe now");
	return check(&w) ? -1 : come_back(&w);
}

/* In memory a flush is below, or fails, and the data is still there for the next one. */
static CO_FN int in_memory_back(void *model)
{
	struct world w = { 0 };

	if (enter(&w, "cache[mode=writeback,lag=1h]:" DISK))
		return -1;
	for (unsigned i = 0; i < BLOCKS; i++)
		SIM_EXPECT(write_next(&w) == 0);
	sim_remote_fails(-ETIMEDOUT, 1000000, NEVER);
	SIM_EXPECT(ch_flush(w.c) == -ETIMEDOUT);
	if (check(&w)) /* all of it is here */
		return -1;
	sim_remote_fails(-ETIMEDOUT, 0, 0);
	SIM_EXPECT(ch_flush(w.c) == 0);
	return check_store(&w) ? -1 : come_back(&w);
}

/* What is due first is sent first, also when a worker sleeps until something later. */
static CO_FN int in_time(void *model)
{
	struct world w = { 0 };
	char byte = 0;

	if (enter(&w, "cache[disk=/disk/c,size=2Mi,mode=writeback,lag=100ms]:" DISK))
		return -1;
	SIM_EXPECT(write_next(&w) == 0);
	co_sleep(NS_PER_S / 2); /* sent; one sleeps until the journal can be emptied */
	SIM_EXPECT(write_next(&w) == 0);
	co_sleep(NS_PER_S / 5);
	SIM_EXPECT(sim_remote_read("", "disk", &byte, 1, BLOCK) == 1 && byte == 2, "%d", byte);
	return come_back(&w);
}

/* A store that takes 4 MiB/s: writers come down to that, none waits for long. */
static CO_FN int slow_store(void *model)
{
	struct world w = { 0 };

	if (enter(&w,
		  "cache[disk=/disk/c,size=16Mi,mode=writeback,lag=10s,uploads=4]:delay[write=500ms]:remote[size=2Mi]"))
		return -1;
	for (unsigned i = 0; i < 12000; i++)
		SIM_EXPECT(write_next(&w) == 0);
	SIM_EXPECT(w.longest < 2 * NS_PER_S, "a write took %" PRIu64 " ms", w.longest / 1000000);
	return check(&w) ? -1 : come_back(&w);
}

/* Leaves unsaved data in the journal. */
static CO_FN int leave_some(struct world *w)
{
	if (enter(w, CACHE("") DISK))
		return -1;
	for (unsigned i = 0; i < 100; i++)
		SIM_EXPECT(write_next(w) == 0);
	sim_remote_fails(-ETIMEDOUT, 1000000, NEVER);
	SIM_EXPECT(leave(w) == 0, "the journal has it");
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
	if (enter(&w, CACHE(",mem=4Mi") "retry:" DISK))
		return -1;
	return check(&w) ? -1 : come_back(&w);
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
	if (enter(&o, OTHER)) /* is still there */
		return -1;
	SIM_EXPECT(leave(&o) == 0);
	if (enter(&w, CACHE("") DISK) || check(&w) || come_back(&w))
		return -1;
	/* With an export's name or without one, its own goes. */
	for (unsigned i = 0; i < 2; i++) {
		if (enter(&o, other))
			return -1;
		SIM_EXPECT(write_next(&o) == 0);
		sim_remote_fails(-EACCES, 1000000, NEVER);
		SIM_EXPECT(leave(&o) == 0);
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
	if (patch(8, 1) || enter(&w, CACHE("") DISK))
		return -1;
	return check(&w) ? -1 : come_back(&w);
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
	if (enter(&w, CACHE("") DISK))
		return -1;
	for (unsigned i = 0; i < BLOCKS; i++)
		SIM_EXPECT(write_next(&w) == 0);
	co_wq_wake_all(&h.wq);
	has_no_stacks = false;
	return check(&w) ? -1 : come_back(&w);
}

/* ---- the journal's own disk ---- */

/*
 * Idle, the journal is emptied, but the sync of that fails: its file may be a spare one now, and
 * takes no records any more.
 */
static CO_FN int not_emptied(void *model)
{
	struct world w = { 0 };
	uint64_t *written = model;

	if (enter(&w, "cache[disk=/disk/c,size=2Mi,mode=writeback,lag=10ms]:" DISK))
		return -1;
	SIM_EXPECT(write_with(&w, IO_FUA) == 0);
	sim_fail(SIM_SYNC, "journal-000001", 0, 1, -EIO);
	co_sleep(NS_PER_S + NS_PER_S / 20); /* it is tried again a second later */
	sim_remote_fails(-ETIMEDOUT, 1000000, NEVER);
	SIM_EXPECT(write_with(&w, IO_FUA) == 0);
	*written = w.written;
	sim_crash(SIM_KILL);
}

static CO_FN int nothing_is_lost(void *model)
{
	struct world w = { .written = *(uint64_t *)model };

	sim_remote_fails(-ETIMEDOUT, 0, 0);
	if (enter(&w, CACHE("") DISK))
		return -1;
	return check(&w) ? -1 : come_back(&w);
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

	if (enter(&w, CACHE("") DISK))
		return -1;
	sim_remote_fails(-ETIMEDOUT, 1000000, NEVER);
	sim_fail(SIM_OPEN, "", 0, 30, -EMFILE);
	sim_fail(SIM_ALLOCATE, "", 0, 30, -EIO);
	while (w.written < 200)
		SIM_EXPECT(write_next(&w) == 0 || ++failed <= 60);
	sim_remote_fails(-ETIMEDOUT, 0, 0);
	SIM_EXPECT(failed == 60 && is_there("/disk/c/journal-000004"));
	SIM_EXPECT(!is_there("/disk/c/journal-000006"));
	return check(&w) ? -1 : come_back(&w);
}

/* A head that cannot be written, but is there: it must not end the segment that goes on. */
static CO_FN int bad_head(void *model)
{
	struct world w = { 0 };

	if (enter(&w, CACHE("") DISK))
		return -1;
	sim_remote_fails(-ETIMEDOUT, 1000000, NEVER);
	sim_fail(SIM_WRITE, "journal-000002", 0, 1 + sim_below(2), -EIO);
	while (write_next(&w) == 0)
		;
	SIM_EXPECT(w.written == 62, "%" PRIu64, w.written);
	SIM_EXPECT(ch_zero(w.c, (struct ext){ &obj_none, 0, BLOCK }, IO_FUA) == 0, "has room");
	sim_crash(SIM_KILL);
}

static CO_FN int zeroed(void *model)
{
	struct world w = { 0 };

	sim_remote_fails(-ETIMEDOUT, 0, 0);
	if (enter(&w, CACHE("") DISK))
		return -1;
	for (uint64_t k = 0; k < BLOCKS; k++) {
		uint64_t words[WORDS], want = k == 0 || k >= 62 ? 0 : k + 1;

		SIM_EXPECT(read_block(w.c, k, words) == 0);
		SIM_EXPECT(words[0] == want, "block %" PRIu64 " has %" PRIu64, k, words[0]);
	}
	return leave(&w);
}

/* A journal of which nothing can be given back gets full, and then writes fail. They do not wait. */
static CO_FN int never_cleared(void *model)
{
	struct world w = { 0 };

	if (enter(&w, CACHE("") DISK))
		return -1;
	for (unsigned i = 1; i <= 8; i++) {
		char name[16];

		(void)snprintf(name, sizeof(name), "-00000%u", i);
		sim_fail(SIM_WRITE, name, 64, 1U << 30, -EIO);
	}
	fill_up(&w);
	SIM_EXPECT(w.rc == -EIO && w.written > 300, "%d after %" PRIu64, w.rc, w.written);
	SIM_EXPECT(ch_flush(w.c) == 0, "what was answered is safe");
	return leave(&w);
}

static const struct sim_case cases[] = {
	{ .name = "away-wait", .scenario = away_wait, .seeds = 5, .weight = 25 },
	{ .name = "away-error", .scenario = away_error, .seeds = 5 },
	{ .name = "away-readonly", .scenario = away_readonly, .seeds = 5 },
	{ .name = "flush-away", .scenario = flush_away, .seeds = 5 },
	{ .name = "not-cleared", .scenario = not_cleared, .seeds = 5 },
	{ .name = "refused", .scenario = refused, .seeds = 5 },
	{ .name = "one-refused", .scenario = one_refused, .seeds = 3 },
	{ .name = "memory-away", .scenario = in_memory_back, .seeds = 5 },
	{ .name = "in-time", .scenario = in_time, .seeds = 5 },
	{ .name = "slow-store", .scenario = slow_store, .seeds = 3, .weight = 25 },
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
