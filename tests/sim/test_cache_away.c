/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer cache writing back while the store is away, refuses data or is slow. In the simulator, where
 * ten minutes pass at once.
 */
#include <errno.h>
#include <inttypes.h>

#include "nbdrs/cleanup.h"
#include "world.h"

#define NS_PER_S UINT64_C(1000000000)
#define NEVER    UINT64_MAX

/* Ten minutes: flushes go on, reads too, writes until there is no room, and then when there is. */
static CO_FN int away_wait(void *model)
{
	struct world w = { 0 };
	struct co_group g = CO_GROUP_INIT;

	if (world_enter(&w, CACHE("") DISK))
		return -1;
	sim_remote_fails(-ETIMEDOUT, 1000000, NEVER);
	co_group_spawn(&g, world_fill_up, &w);
	for (unsigned i = 0; i < 60; i++) {
		co_sleep(10 * NS_PER_S);
		SIM_EXPECT(ch_flush(w.c) == 0, "flush after %u s", 10 * i);
	}
	SIM_EXPECT(!w.is_done && w.written > 300, "%" PRIu64 " blocks", w.written);
	sim_remote_fails(-ETIMEDOUT, 0, 0);
	co_group_wait(&g);
	SIM_EXPECT(w.rc == 0 && w.written == FULL, "%d", w.rc);
	if (world_check(&w))
		return -1;
	return world_come_back(&w);
}

/* Before `after` nothing fails; then flushes do, and writes without room; what is there is read. */
static CO_FN int away_error(void *model)
{
	struct world w = { 0 };

	if (world_enter(&w, CACHE(",away=error,after=30s") DISK))
		return -1;
	sim_remote_fails(-ETIMEDOUT, 1000000, NEVER);
	SIM_EXPECT(world_write_next(&w) == 0);
	co_sleep(20 * NS_PER_S);
	SIM_EXPECT(ch_flush(w.c) == 0, "it has been away for less than `after`");
	co_sleep(30 * NS_PER_S);
	SIM_EXPECT(ch_flush(w.c) == -ETIMEDOUT && ch_flush(w.c) == -ETIMEDOUT, "again and again");
	SIM_EXPECT(world_write_next(&w) == 0, "there is room");
	world_fill_up(&w);
	SIM_EXPECT(w.rc == -ETIMEDOUT && w.written > 300, "%d after %" PRIu64, w.rc, w.written);
	sim_remote_fails(-ETIMEDOUT, 0, 0);
	co_sleep(30 * NS_PER_S);
	SIM_EXPECT(ch_flush(w.c) == 0, "it is back");
	/* The block of the write that failed is old or new: write it. */
	SIM_EXPECT(world_write_next(&w) == 0);
	return world_check(&w) ? -1 : world_come_back(&w);
}

static CO_FN int away_readonly(void *model)
{
	struct world w = { 0 };

	if (world_enter(&w, CACHE(",away=readonly,after=30s") DISK))
		return -1;
	for (unsigned i = 0; i < 20; i++)
		SIM_EXPECT(world_write_next(&w) == 0);
	sim_remote_fails(-ECONNREFUSED, 1000000, NEVER);
	co_sleep(60 * NS_PER_S);
	SIM_EXPECT(world_write_next(&w) == -EROFS);
	SIM_EXPECT(ch_flush(w.c) == -ECONNREFUSED);
	sim_remote_fails(-ECONNREFUSED, 0, 0);
	co_sleep(10 * NS_PER_S);
	SIM_EXPECT(world_write_next(&w) == 0 && ch_flush(w.c) == 0);
	return world_check(&w) ? -1 : world_come_back(&w);
}

/* All is sent, and then it takes no flush: that ends with one it takes, though nothing is sent. */
static CO_FN int flush_away(void *model)
{
	struct world w = { 0 };

	if (world_enter(
		    &w,
		    CACHE(",away=readonly,after=30s") "fault[ops=flush,count=20,error=ETIMEDOUT]:" DISK))
		return -1;
	SIM_EXPECT(world_write_next(&w) == 0);
	co_sleep(60 * NS_PER_S);
	SIM_EXPECT(world_write_next(&w) == -EROFS && ch_flush(w.c) == -ETIMEDOUT);
	co_sleep(60 * NS_PER_S);
	SIM_EXPECT(world_write_next(&w) == 0 && ch_flush(w.c) == 0, "it is back");
	return world_check(&w) ? -1 : world_come_back(&w);
}

/* It says no, not "later": each flush says so until the data is there. */
static CO_FN int refused(void *model)
{
	struct world w = { 0 };

	if (world_enter(&w, CACHE("") DISK))
		return -1;
	sim_remote_fails(-EACCES, 1000000, NEVER);
	SIM_EXPECT(world_write_next(&w) == 0 && ch_flush(w.c) == 0, "it was not tried yet");
	co_sleep(5 * NS_PER_S);
	SIM_EXPECT(ch_flush(w.c) == -EACCES && ch_flush(w.c) == -EACCES);
	SIM_EXPECT(world_write_next(&w) == 0, "writes go on");
	sim_remote_fails(-EACCES, 0, 0);
	co_sleep(10 * NS_PER_S);
	SIM_EXPECT(ch_flush(w.c) == 0, "it is safe now");
	return world_check(&w) ? -1 : world_come_back(&w);
}

#define REFUSING "fault[ops=write,range=0-4Ki,error=EPERM,count=60]:"

/* One unit is refused while another is sent, again and again: no flush misses that. */
static CO_FN int one_refused(void *model)
{
	struct world w = { 0 };
	char byte = 1;
	struct iovec v;
	struct iov iov = iov_one(&v, &byte, 1);

	if (world_enter(&w, CACHE("") "delay[write=300ms]:" REFUSING "remote[size=8Mi]"))
		return -1;
	SIM_EXPECT(world_write_next(&w) == 0);
	co_sleep(3 * NS_PER_S);
	for (unsigned i = 0; i < 100; i++) {
		SIM_EXPECT(ch_write(w.c, (struct ext){ &obj_none, 4 << 20, 1 }, &iov, 0) == 0);
		SIM_EXPECT(ch_flush(w.c) == -EPERM, "flush %u", i);
		co_sleep(NS_PER_S / 10);
	}
	co_sleep(600 * NS_PER_S);
	SIM_EXPECT(ch_flush(w.c) == 0, "it is safe now");
	return world_check(&w) ? -1 : world_come_back(&w);
}

/* In memory a flush is below, or fails, and the data is still there for the next one. */
static CO_FN int in_memory_back(void *model)
{
	struct world w = { 0 };

	if (world_enter(&w, "cache[mode=writeback,lag=1h]:" DISK))
		return -1;
	for (unsigned i = 0; i < BLOCKS; i++)
		SIM_EXPECT(world_write_next(&w) == 0);
	sim_remote_fails(-ETIMEDOUT, 1000000, NEVER);
	SIM_EXPECT(ch_flush(w.c) == -ETIMEDOUT);
	if (world_check(&w)) /* all of it is here */
		return -1;
	sim_remote_fails(-ETIMEDOUT, 0, 0);
	SIM_EXPECT(ch_flush(w.c) == 0);
	return world_check_store(&w) ? -1 : world_come_back(&w);
}

/*
 * What is due first is sent first, also when a worker sleeps until something later. Any request may
 * be slow, but not all of them.
 */
static CO_FN int in_time(void *model)
{
	struct world w = { 0 };
	unsigned late = 0;

	if (world_enter(&w, "cache[disk=/disk/c,size=2Mi,mode=writeback,lag=100ms]:" DISK))
		return -1;
	for (unsigned i = 0; i < 5; i++) {
		uint8_t byte = 0;

		SIM_EXPECT(world_write_next(&w) == 0);
		co_sleep(NS_PER_S / 2); /* sent; one sleeps until the journal can be emptied */
		SIM_EXPECT(world_write_next(&w) == 0);
		co_sleep(NS_PER_S / 5);
		SIM_EXPECT(sim_remote_read("", "disk", &byte, 1, (w.written - 1) * BLOCK) == 1);
		late += byte != w.written;
		co_sleep(3 * NS_PER_S);
	}
	SIM_EXPECT(late < 4, "%u of 5", late);
	return world_come_back(&w);
}

/* A store that takes 4 MiB/s: writers come down to that, none waits for long. */
static CO_FN int slow_store(void *model)
{
	struct world w = { 0 };

	if (world_enter(&w, "cache[disk=/disk/c,size=16Mi,mode=writeback,lag=10s,uploads=4]:"
			    "delay[write=500ms]:remote[size=2Mi]"))
		return -1;
	for (unsigned i = 0; i < 12000; i++)
		SIM_EXPECT(world_write_next(&w) == 0);
	SIM_EXPECT(w.longest < 2 * NS_PER_S, "a write took %" PRIu64 " ms", w.longest / 1000000);
	return world_check(&w) ? -1 : world_come_back(&w);
}

static const struct sim_case cases[] = {
	{ .name = "away-wait", .scenario = away_wait, .seeds = 5, .weight = 25 },
	{ .name = "away-error", .scenario = away_error, .seeds = 5 },
	{ .name = "away-readonly", .scenario = away_readonly, .seeds = 5 },
	{ .name = "flush-away", .scenario = flush_away, .seeds = 5 },
	{ .name = "refused", .scenario = refused, .seeds = 5 },
	{ .name = "one-refused", .scenario = one_refused, .seeds = 3 },
	{ .name = "memory-away", .scenario = in_memory_back, .seeds = 5 },
	{ .name = "in-time", .scenario = in_time, .seeds = 5 },
	{ .name = "slow-store", .scenario = slow_store, .seeds = 3, .weight = 25 },
};

int main(int argc, char **argv)
{
	return sim_main(argc, argv, cases, ARRAY_LEN(cases));
}
