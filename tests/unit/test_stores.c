/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Keyed stores, and the layers that pass objects on, against one conformance suite; and each one's own promises.
 *
 *	test_stores [PATTERN]
 *	NBDRS_STORE='s3:http://...' test_stores		the suite only, over that chain ("@" stands for a folder)
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

#include "conform_store.h"
#include "conformance.h"
#include "nbdrs/cleanup.h"

static const struct store_what chains[] = {
	{ .text = "mem" },
	{ .text = "mem[partial=off]" },
	{ .text = "file:@/objects/", .in_memory = true },
	{ .text = "file:@/objects", .few = 10 },
	{ .text = "delay[read=50us,write=100us,flush=50us,jitter=100us]:mem", .few = 4 },
	{ .text = "fault[rate=0%]:mem" },
	{ .text = "retry:mem", .few = 4 },
	{ .text = "retry[base=1ms,cap=10ms]:fault[rate=10%,error=EAGAIN]:mem" },
	{ .text = "retry[base=1ms,cap=10ms]:fault[rate=20%,error=ETIMEDOUT]:mem[partial=off]" },
	{ .text = "retry[base=1ms,cap=10ms]:fault[rate=30%,error=ETIMEDOUT,when=after,"
		  "ops=put|del|write|stat|read]:mem" },
	{ .text = "retry[base=1ms,cap=10ms]:fault[rate=10%,error=EAGAIN]:file:@/objects/",
	  .in_memory = true,
	  .few = 2 },
	{ .text = "retry:delay[jitter=200us,read=10us,write=10us]:file:@/objects/",
	  .in_memory = true,
	  .few = 4 },
	{ .text = "cache[mem=1Mi]:mem" },
	{ .text = "cache[mem=1Mi,granule=4Ki]:mem[partial=off]" },
	{ .text = "cache[disk=@/cache,size=2Mi,mem=1Mi,granule=4Ki]:mem", .in_memory = true, .few = 4 },
	{ .text = "cache[disk=@/cache,size=3Mi,journal=1Mi,mode=writeback,mem=1Mi,granule=8Ki,lag=1ms]:"
		  "mem[partial=off]",
	  .in_memory = true,
	  .few = 4 },
	{ .text = "cache:retry[base=1ms,cap=10ms]:fault[rate=10%,error=EAGAIN]:mem", .few = 4 },
	{ .text = "cache[mode=writeback,mem=1Mi,lag=1ms]:mem" },
	{ .text = "cache[mode=writeback,mem=1Mi,lag=1ms]:mem[partial=off]" },
	{ .text = "cache[disk=@/cache,size=8Mi,mode=writeback,mem=1Mi,lag=2ms]:mem[partial=off]",
	  .in_memory = true,
	  .few = 4 },
	{ .text = "cache[disk=@/cache,size=4Mi,mode=writeback,mem=1Mi,lag=5ms]:"
		  "retry[base=1ms,cap=10ms]:fault[rate=10%,error=EAGAIN]:file:@/objects/",
	  .in_memory = true,
	  .few = 4 },
	{ .text = "distributed[replicas=2]{mem,mem,mem}" },
	{ .text = "distributed[replicas=2]{cache[mode=writeback,lag=2ms]:mem[partial=off],"
		  "cache[disk=@/cache,size=8Mi,mode=writeback,lag=3ms]:mem[partial=off],mem}",
	  .in_memory = true,
	  .few = 4 },
	{ .text = "distributed[replicas=2]{mem[partial=off],mem[partial=off],mem}" },
	{ .text = "distributed[replicas=3,quorum=2]{mem,delay[write=300us]:mem,mem,mem}",
	  .few = 4 },
	{ .text = "distributed[replicas=2,quorum=1,recheck=5ms]"
		  "{mem,fault[rate=10%,error=EAGAIN,ops=read|write|put]:mem,mem}",
	  .only = "random" },
	{ .text = "distributed[replicas=2,quorum=1,recheck=5ms]"
		  "{mem,fault[rate=10%,error=EAGAIN,ops=read|write|put]:mem,mem}",
	  .only = "concurrent" },
	{ .text = "distributed[replicas=2]{file:@/a/,file:@/b/,file:@/c/}",
	  .in_memory = true,
	  .few = 4 },
};

/* One case over one chain: the state of one test. */
struct job {
	const struct store_what *what;
	const struct store_case *c;
};

static void test_job(void **state)
{
	const struct job *job = *state;
	const char *failure = store_with(job->what, job->c->fn);

	if (failure)
		fail_msg("%s", failure);
}

enum { TESTS_MAX = 512 };

static struct CMUnitTest tests[TESTS_MAX];
static struct job jobs[TESTS_MAX];
static char names[TESTS_MAX][160];

static unsigned add_suite(unsigned n, const struct store_what *what)
{
	for (const struct store_case *c = store_cases; c->name; c++) {
		if (what->only && strcmp(what->only, c->name) != 0)
			continue;
		assert_true(n < TESTS_MAX);
		jobs[n] = (struct job){ what, c };
		(void)snprintf(names[n], sizeof(names[n]), "%s: %s",
			       what->label ? what->label : what->text, c->name);
		tests[n] = (struct CMUnitTest){ .name = names[n],
						.test_func = test_job,
						.initial_state = &jobs[n] };
		n++;
	}
	return n;
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest own[] = {
		{ 0 },
	};
	static struct store_what given;
	unsigned n = 0;
	int failed;

	given.text = getenv("NBDRS_STORE");
	if (given.text) {
		given.label = "NBDRS_STORE";
		given.few = 10;
		n = add_suite(n, &given);
	} else {
		for (unsigned i = 0; i < ARRAY_LEN(chains); i++)
			n = add_suite(n, &chains[i]);
		for (unsigned i = 0; i < ARRAY_LEN(own) && own[i].name; i++)
			tests[n++] = own[i];
	}
	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = _cmocka_run_group_tests("stores", tests, n, NULL, NULL);
	conform_stop();
	return failed;
}
