/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Cases, seeds and lives. Each life is a child of its own: whatever a crash leaves of a process (fibers,
 * locks, static state) is gone with it, and what must stay is in the arena.
 *
 * Where a crash comes is a number drawn from the seed alone, so that a seed can be repeated alone. It is
 * drawn up to a quarter more than the events of a first run without a crash; past the end means after
 * the end.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "nbdrs/log.h"
#include "nbdrs/reactor.h"
#include "sim_int.h"

enum { LIFE_SECONDS = 120, RERUNS = 2 };

struct run {
	const struct sim_case *c;
	uint64_t scenario_events, recover_events; /* of the first run, without a crash in them */
	uint64_t only_event;                      /* of NBDRS_SIM_EVENT; 0 = none */
	bool is_traced;
	int output; /* what the children write to standard error; -1 = ours */
};

struct outcome {
	bool has_failed;
	uint64_t hash, events, crashes;
	char where[900]; /* what failed, and where */
};

/* ---- one life ---- */

_Noreturn static void child(const struct run *run, const struct life *l)
{
	const struct rlimit no_core = { 0, 0 };

	(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
	(void)setrlimit(RLIMIT_CORE, &no_core); /* a core would only take time */
	(void)alarm(LIFE_SECONDS);
	if (run->output >= 0)
		(void)dup2(run->output, STDERR_FILENO);
	log_set_level(run->is_traced ? LOG_LEVEL_DEBUG : LOG_LEVEL_ERROR);
	life_run(l);
}

/* What an assertion or a sanitizer said, at the end of the failure's text. */
static void take_output(const struct run *run, int status)
{
	char *to = world->failure;
	size_t room = sizeof(world->failure);
	off_t end = run->output >= 0 ? lseek(run->output, 0, SEEK_END) : 0;
	ssize_t n;
	int at;

	if (WIFEXITED(status))
		at = snprintf(to, room, "it ended with status %d\n", WEXITSTATUS(status));
	else if (WTERMSIG(status) == SIGALRM)
		at = snprintf(to, room, "no end after %d s\n", LIFE_SECONDS);
	else
		at = snprintf(to, room, "%s\n", strsignal(WTERMSIG(status)));
	n = end > 0 ? pread(run->output, to + at, room - (size_t)at - 1, 0) : 0;
	to[at + (n > 0 ? n : 0)] = '\0';
}

static enum life_end live(const struct run *run, const struct life *l)
{
	int status = 0;
	pid_t pid;

	world->events = 0;
	world->random = sim_mix(world->seed, world->life + 1);
	if (run->output >= 0 && ftruncate(run->output, 0) == 0)
		(void)lseek(run->output, 0, SEEK_SET);
	(void)fflush(NULL);
	pid = fork();
	if (pid == 0)
		child(run, l);
	if (pid < 0) {
		(void)sim_failed(__FILE__, __LINE__, "fork: %s", strerror(errno));
		return LIFE_FAILED;
	}
	while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	if (WIFEXITED(status) && WEXITSTATUS(status) == LIFE_CRASHED)
		return LIFE_CRASHED;
	if (WIFEXITED(status) && WEXITSTATUS(status) == LIFE_OK && world->failure[0] == '\0')
		return LIFE_OK;
	if (world->failure[0] == '\0')
		take_output(run, status);
	return LIFE_FAILED;
}

/* ---- one seed ---- */

static void new_world(const struct run *run, uint64_t seed)
{
	arena_reset();
	world = arena_alloc(sizeof(*world));
	world->seed = seed;
	world->random = sim_mix(seed, 0);
	world->clock = UINT64_C(1000000000);
	world->is_traced = run->is_traced;
	world->model = arena_alloc(MAX(run->c->model_len, (size_t)1));
	disk_init();
}

static uint64_t crash_point(const struct run *run, uint64_t events)
{
	uint64_t range = events + events / 4 + 1;

	if (run->only_event > 0 && world->life == 0)
		return run->only_event;
	return 1 + sim_mix(world->seed, 1000 + world->life) % range;
}

static bool end_life(struct outcome *o, enum life_end how)
{
	o->events += world->events;
	o->crashes += how == LIFE_CRASHED;
	o->has_failed = how == LIFE_FAILED;
	if (o->has_failed)
		(void)snprintf(o->where, sizeof(o->where),
			       "seed %" PRIu64 ", life %u, event %" PRIu64 " (%s): %s", world->seed,
			       world->life, world->events, world->event, world->failure);
	world->life++;
	return o->has_failed;
}

/* Scenario, crash, recovery. Without `is_crashed` every life goes on to its end (and crashes there). */
static struct outcome run_seed(struct run *run, uint64_t seed, bool is_crashed)
{
	const struct sim_case *c = run->c;
	unsigned crashes = is_crashed && c->crash != SIM_NO_CRASH ? MAX(c->crashes, 1U) : 1;
	struct outcome o = { 0 };
	struct life l = { .fn = c->scenario, .crash = c->crash, .crash_at = UINT64_MAX };

	new_world(run, seed);
	world->faults = c->faults;
	if (is_crashed && c->crash != SIM_NO_CRASH)
		l.crash_at = crash_point(run, run->scenario_events);
	if (end_life(&o, live(run, &l)))
		goto out;
	if (!is_crashed)
		run->scenario_events = world->events;
	world->faults = (struct sim_faults){ 0 };
	for (unsigned k = 1; k <= crashes && c->recover != NULL; k++) {
		l = (struct life){ .fn = c->recover, .crash_at = UINT64_MAX };
		if (k < crashes) {
			l.crash = c->crash;
			l.crash_at = crash_point(run, run->recover_events);
		}
		if (end_life(&o, live(run, &l)))
			goto out;
	}
	if (!is_crashed)
		run->recover_events = world->events;
out:
	o.hash = sim_mix(world->hash, world->clock);
	return o;
}

/* ---- is it repeatable? ---- */

/* The seed's hash as another process finds it, where memory is elsewhere. 0 or -errno. */
static int hash_elsewhere(const char *name, uint64_t seed, uint64_t *hash)
{
	char number[32], self[] = "/proc/self/exe", text[32] = "",
			 *argv[] = { self, (char *)(uintptr_t)name, NULL };
	int ends[2], status;
	ssize_t n;
	pid_t pid;

	(void)snprintf(number, sizeof(number), "%" PRIu64, seed);
	if (pipe2(ends, O_CLOEXEC) != 0)
		return -errno;
	pid = fork();
	if (pid == 0) {
		(void)dup2(ends[1], STDOUT_FILENO);
		(void)setenv("NBDRS_SIM_HASH", number, 1);
		(void)execv(self, argv);
		_exit(127);
	}
	(void)close(ends[1]);
	n = pid > 0 ? read(ends[0], text, sizeof(text) - 1) : -1;
	(void)close(ends[0]);
	if (pid > 0)
		(void)waitpid(pid, &status, 0);
	if (n <= 0)
		return -EIO;
	*hash = strtoull(text, NULL, 16);
	return 0;
}

/* Does another process find the same? Else *o has failed. */
static void repeat(const struct run *run, uint64_t seed, struct outcome *o)
{
	uint64_t again = 0;
	int rc = hash_elsewhere(run->c->name, seed, &again);

	if (rc == 0 && again == o->hash)
		return;
	o->has_failed = true;
	(void)snprintf(o->where, sizeof(o->where),
		       "seed %" PRIu64 " is not repeatable: hash %016" PRIx64
		       ", in another process %016" PRIx64 "%s (compare two traces)",
		       seed, o->hash, again, rc != 0 ? ", which failed" : "");
}

/* ---- one case ---- */

static uint64_t number(const char *name, uint64_t otherwise)
{
	const char *text = getenv(name);
	char *rest;
	uint64_t n;

	if (text == NULL || *text == '\0')
		return otherwise;
	n = strtoull(text, &rest, 10);
	if (*rest != '\0') {
		fprintf(stderr, "sim: %s is '%s', which is no number\n", name, text);
		exit(1);
	}
	return n;
}

static uint64_t seeds_of(const struct sim_case *c)
{
	uint64_t few = MAX(c->seeds, 1U), n = number("SIM_SEEDS", 0) / MAX(c->weight, 1U);

	if (c->is_once || n == 0)
		return few;
	return c->must_fail ? MAX(few, n) : n;
}

/* Seed 0 is the first run, without a crash before the end: it tells how many events there are. */
static struct outcome run_first(struct run *run)
{
	return run->c->crash != SIM_NO_CRASH ? run_seed(run, 0, false) : (struct outcome){ 0 };
}

static bool run_all(struct run *run, struct outcome *sum, uint64_t *seeds)
{
	uint64_t n = seeds_of(run->c), reruns = 0;
	struct outcome o = run_first(run);

	*sum = o;
	for (*seeds = 0; *seeds < n && !o.has_failed; ++*seeds) {
		o = run_seed(run, *seeds + 1, true);
		sum->events += o.events;
		sum->crashes += o.crashes;
		if (reruns++ < RERUNS && !o.has_failed)
			repeat(run, *seeds + 1, &o);
	}
	memcpy(sum->where, o.where, sizeof(o.where));
	return !o.has_failed;
}

static bool run_case(struct run *run)
{
	const struct sim_case *c = run->c;
	uint64_t begin = now_ns(), seeds = 0;
	struct outcome sum = { 0 };
	bool ok = run_all(run, &sum, &seeds), is_good = ok != c->must_fail;

	printf("%-4s %-32s %6" PRIu64 " seeds %7" PRIu64 " crashes %9" PRIu64 " events %7.1f s%s\n",
	       is_good ? "ok" : "FAIL", c->name, seeds, sum.crashes, sum.events,
	       (double)(now_ns() - begin) / 1e9,
	       ok && c->must_fail ? " and nothing was caught"
	       : !ok && is_good   ? " caught"
				  : "");
	if (!ok)
		printf("     %s\n", sum.where);
	if (!is_good && !ok)
		printf("     again, with a trace: NBDRS_SIM_SEED=%" PRIu64 " %s %s\n", world->seed,
		       program_invocation_name, c->name);
	(void)fflush(stdout);
	return is_good;
}

/* ---- one seed by hand ---- */

static bool run_one_seed(struct run *run, uint64_t seed, bool is_hash_only)
{
	struct outcome o = run_first(run);

	if (!o.has_failed && seed > 0) {
		run->is_traced = !is_hash_only;
		if (run->is_traced)
			run->output = -1;
		o = run_seed(run, seed, true);
	}
	if (is_hash_only)
		printf("%016" PRIx64 "\n", o.hash);
	else
		printf("%s %s: seed %" PRIu64 " hash %016" PRIx64 "\n%s",
		       o.has_failed ? "FAIL" : "ok", run->c->name, seed, o.hash,
		       o.has_failed ? o.where : "");
	return !o.has_failed;
}

static bool is_wanted(const char *name, int argc, char **argv)
{
	for (int k = 1; k < argc; k++)
		if (strcmp(argv[k], name) == 0)
			return true;
	return argc == 1;
}

int sim_main(int argc, char **argv, const struct sim_case *cases, size_t n)
{
	uint64_t seed = number("NBDRS_SIM_SEED", UINT64_MAX),
		 hash = number("NBDRS_SIM_HASH", UINT64_MAX);
	unsigned passed = 0, failed = 0;

	if (arena_init() != 0) {
		fprintf(stderr, "sim: no shared memory\n");
		return 1;
	}
	remote_register();
	for (size_t k = 0; k < n; k++) {
		struct run run = { .c = &cases[k],
				   .only_event = number("NBDRS_SIM_EVENT", 0),
				   .output = -1 };
		bool ok;

		if (!is_wanted(cases[k].name, argc, argv))
			continue;
		run.output = memfd_create("sim-output", MFD_CLOEXEC);
		if (hash != UINT64_MAX)
			ok = run_one_seed(&run, hash, true);
		else
			ok = seed != UINT64_MAX ? run_one_seed(&run, seed, false) : run_case(&run);
		passed += ok;
		failed += !ok;
		if (run.output >= 0)
			(void)close(run.output);
	}
	if (hash == UINT64_MAX)
		printf("%u passed, %u failed, 0 skipped\n", passed, failed);
	return failed > 0 || passed == 0;
}
