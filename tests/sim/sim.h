/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The simulator: one reactor on a machine whose clock, schedule and disk are made up from a seed.
 *
 *	clock		now_ns(), timers and co_sleep() jump to the next event when no fiber is ready. A fiber that runs
 *			costs about a microsecond, so who polls with co_yield() gets on as well.
 *	schedule	of the fibers that are ready a random one runs next; a file call takes a random time and takes
 *			effect somewhere in it.
 *	disk		the calls of io.h on files see a small file system of its own: the folder "/disk" is there at
 *			the start, and stays there. See "What a crash leaves" below.
 *	lives		a process that crashes is a child that ends; what was on the disk is in shared memory, and so is
 *			the test's model. The next life is another child.
 *
 * A test is a program tests/sim/test_*.c with a table of cases:
 *
 *	struct model { uint64_t acked; };			all zeroes at first, survives every crash
 *
 *	static CO_FN int write_some(void *model) { ...; return 0; }
 *	static CO_FN int check_all(void *model) { ...; SIM_EXPECT(got >= m->acked, "lost %" PRIu64, ...); return 0; }
 *
 *	static const struct sim_case cases[] = {
 *		{ .name = "journal", .scenario = write_some, .recover = check_all,
 *		  .model_len = sizeof(struct model), .crash = SIM_ANY_CRASH, .crashes = 2, .seeds = 300 },
 *	};
 *
 *	int main(int argc, char **argv) { return sim_main(argc, argv, cases, ARRAY_LEN(cases)); }
 *
 * For each seed: an empty disk; `scenario` runs in a fiber until it returns or the crash comes at a
 * random event (a file or offloaded call begins or ends); then `recover` runs on what is left, itself
 * crashed in the middle `crashes` - 1 times, at last to its end. Both return 0, or not 0 after
 * sim_failed() (SIM_EXPECT). Also failures: a fiber left over at the end, fibers that wait for nothing,
 * an end that does not come, a signal (assert), and a seed that does something else when it is run
 * again.
 *
 * A failure prints seed and event. In the environment:
 *	SIM_SEEDS=N		so many seeds for each case (see `weight`)
 *	NBDRS_SIM_SEED=N	only this one, with a trace of its events (and the log of the layers) on standard error
 *	NBDRS_SIM_EVENT=N	crash there
 * Arguments: names of cases; none = all.
 */
#ifndef NBDRS_SIM_H
#define NBDRS_SIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbdrs/co.h"
#include "nbdrs/io.h"
#include "nbdrs/reactor.h"

enum sim_crash {
	SIM_NO_CRASH, /* `scenario` runs to its end; then `recover`, if there is one, in a life of its own */
	SIM_KILL,      /* kill -9: all that was written is there */
	SIM_POWER_CUT, /* only what was synced, and some of the rest */
	SIM_ANY_CRASH, /* by the seed, one of the two above */
};

/*
 * Faults of the disk, in calls per million. An error of a sync is reported once to each fd that was
 * open, as the kernel does it; some of what it should have made durable is lost for good, though it may
 * still be read for a while.
 */
struct sim_faults {
	uint32_t read_ppm, write_ppm, sync_ppm; /* -EIO */
	uint32_t short_ppm;                     /* reads and writes that transfer less */
	uint64_t space; /* bytes the disk has room for (in pages of 4 KiB); 0 = no limit */
};

struct sim_case {
	const char *name;
	CO_FN int (*scenario)(void *model);
	CO_FN int (*recover)(void *model); /* NULL = nothing is checked after the crash */
	size_t model_len;                  /* bytes */
	enum sim_crash crash;
	unsigned crashes; /* 0 = 1; see above */
	unsigned seeds;   /* of a run without SIM_SEEDS; 0 = 1 */
	struct sim_faults
		faults; /* during `scenario`; `recover` has a sound disk (but sees what was lost) */
	/* This case is wrong on purpose, and must be caught within `seeds`. */
	bool must_fail;
	bool is_once;	 /* nothing random is in it that is worth more seeds: SIM_SEEDS does not apply */
	unsigned weight; /* a seed takes so many times longer than most: SIM_SEEDS / weight of them */
};

int sim_main(int argc, char **argv, const struct sim_case *cases, size_t n);

/* Notes the failure, if it is the first of this run, and traces it; always -1. */
int sim_failed(const char *file, int line, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));

#define SIM_EXPECT(cond, ...)                                                          \
	do {                                                                           \
		if (!(cond))                                                           \
			return sim_failed(__FILE__, __LINE__, #cond ": " __VA_ARGS__); \
	} while (0)

/* ---- what a scenario may ask for; in a fiber ---- */

uint64_t sim_random(void);
/* Below n, n > 0. */
uint64_t sim_below(uint64_t n);
/* True `ppm` times in a million. */
bool sim_chance(uint32_t ppm);
/* Life 0 is `scenario`, the others are `recover`. */
unsigned sim_life(void);
uint64_t sim_seed(void);
/* A line of the trace; seen with NBDRS_SIM_SEED only. */
void sim_trace(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* The crash comes now, whatever the case says. Does not return. */
_Noreturn void sim_crash(enum sim_crash how);

/* ---- the disk ---- */

/* Other faults from now on; in this life. */
void sim_set_faults(const struct sim_faults *f);

/*
 * A fault by rule: of the calls of that kind on files whose path ends in `path` ("" = all), `after` are
 * let through, then `count` fail with `error` (-errno). In this life. At most SIM_RULES_MAX at a time.
 */
enum sim_call {
	SIM_OPEN,
	SIM_READ,
	SIM_WRITE,
	SIM_SYNC,
	SIM_TRUNCATE,
	SIM_ALLOCATE,
	SIM_RENAME,
	SIM_UNLINK
};
enum { SIM_RULES_MAX = 16 };
void sim_fail(enum sim_call call, const char *path, unsigned after, unsigned count, int error);

/*
 * Turns `bits` random bits of [off, off + len) of a file over, in memory and at rest. -ENOENT; -ERANGE
 * past its end.
 */
int sim_flip(const char *path, uint64_t off, uint64_t len, unsigned bits);

/*
 * The file as a crash that keeps nothing unsynced would leave it, for tests of the simulator: bytes or
 * -errno.
 */
int64_t sim_stable_read(const char *path, void *buf, size_t len, uint64_t off);

/*
 * What a crash leaves. Kill: everything that a finished call wrote, and some prefix of what was under
 * way. Power cut: what an io_fdatasync() or io_fsync() that succeeded covers (calls that had ended when
 * it began), and O_DSYNC and RWF_DSYNC writes; of everything later a random part: nothing, all, or a
 * choice call by call, in which a write may be torn into sectors of 512 bytes and a later one survive an
 * earlier one. Sizes come and go on their own; bytes missing in a longer file are zeroes. Names (made,
 * renamed, removed) are durable when their folder has been synced, and otherwise survive or not,
 * sometimes in order, sometimes not; a rename is never half done.
 *
 * Not simulated: mmap, links, sockets, more than one reactor, more than one folder in a rename. Files
 * that are opened by system calls instead of io.h are real, their time is not.
 */

/*
 * A remote store that survives every crash of the machine: the layer `remote` for chain texts. Keyed
 * (whole objects, like S3) below sharded and the like, or a disk, remote[size=1Mi]. name=X tells several
 * apart. A request takes a random time; what is answered is durable, what was under way at a crash has
 * happened or not, never half.
 */

/*
 * From now on (over crashes, too) and until the clock says `until_ns`, `ppm` in a million requests fail
 * with `error` (-errno), half of them after they were done. 1000000 = the store is away.
 */
void sim_remote_fails(int error, uint32_t ppm, uint64_t until_ns);
/* An object as it is in the store; bytes of it, or -ENOENT. A disk is the object "disk". */
int64_t sim_remote_read(const char *store, const char *object, void *buf, size_t len, uint64_t off);

#endif
