/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * distributed under fire: nodes go and come while fibers read and write; nothing is ever read but what was answered,
 * and replicas are equal afterwards.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "conformance.h"
#include "dist_help.h"
#include "layer/distributed/distributed.h"
#include "nbdrs/reactor.h"

/* --- All together ----------------------------------------------------------------------------- */

enum { FIBERS = 6, ROUNDS = 250, SLOTS = 4 };

/* One fiber with shards of its own; a slot's bytes are all the same, and known unless its last write failed. */
static CO_FN int scribble(struct store_run *r, unsigned i, void *arg)
{
	struct chan *c = store_chan(r);
	uint64_t random = i * 7919 + 1;
	int known[2][SLOTS] = { { 0 } };
	char name[2][32];

	(void)snprintf(name[0], sizeof(name[0]), "block-%u", 2 * i);
	(void)snprintf(name[1], sizeof(name[1]), "block-%u", 2 * i + 1);
	for (unsigned round = 0; round < ROUNDS; round++) {
		unsigned s = (unsigned)random_below(&random, 2),
			 slot = (unsigned)random_below(&random, SLOTS);
		uint8_t byte = (uint8_t)(1 + random_below(&random, 250));
		int rc, got;

		switch (random_below(&random, 8)) {
		case 0:
			rc = dist_put_byte(c, name[s], byte, SLOTS * DIST_KI);
			for (unsigned k = 0; k < SLOTS; k++)
				known[s][k] = rc == 0 ? byte : -1;
			break;
		case 1:
			(void)ch_flush(c); /* may fail while a node is off */
			break;
		case 2:
		case 3:
		case 4:
			rc = dist_write_byte(c, name[s], slot * DIST_KI, byte, DIST_KI,
					     byte & 1 ? IO_FUA : 0);
			known[s][slot] = rc == 0 ? byte : -1;
			break;
		default:
			got = dist_read_byte(c, name[s], slot * DIST_KI, DIST_KI);
			if (got < 0 && got != -EILSEQ)
				break; /* nodes are off */
			if (known[s][slot] == -1 && got >= 0)
				known[s][slot] = got; /* from now on the same */
			if (known[s][slot] >= 0 && got != known[s][slot])
				return store_fail(r, __LINE__,
						  "%s slot %u round %u: read %d, not %d: %s",
						  name[s], slot, round, got, known[s][slot],
						  dist_status_of(r).all);
		}
	}
	return 0;
}

struct flapping {
	struct store_run *r;
	struct co_group group;
	bool stop;
	int rc;
};

/* Nodes go and come, sometimes two at once. */
static CO_FN void flap(void *arg)
{
	struct flapping *f = arg;
	uint64_t random = 42;

	while (!f->stop) {
		unsigned i = (unsigned)random_below(&random, 3),
			 j = (unsigned)random_below(&random, 3);

		(void)dist_node_off(f->r, i, true);
		co_sleep(random_below(&random, 8000000));
		if (random_below(&random, 3) == 0) {
			(void)dist_node_off(f->r, j, true);
			co_sleep(random_below(&random, 3000000));
			(void)dist_node_off(f->r, j, false);
		}
		(void)dist_node_off(f->r, i, false);
		co_sleep(random_below(&random, 8000000));
	}
}

static CO_FN int storm(void *arg)
{
	struct store_run *r = arg;
	struct flapping f = { .r = r, .group = CO_GROUP_INIT };
	char name[32];
	int rc;

	for (unsigned n = 0; n < 2 * FIBERS; n++) {
		(void)snprintf(name, sizeof(name), "block-%u", n);
		CHECK(r, dist_put_byte(store_chan(r), name, 0, SLOTS * DIST_KI) == 0);
	}
	co_group_spawn(&f.group, flap, &f);
	rc = store_fibers(r, FIBERS, scribble, NULL);
	f.stop = true;
	co_group_wait(&f.group);
	if (rc || dist_wait_good(r))
		return -1;
	CHECK(r, ch_flush(store_chan(r)) == 0);
	for (unsigned n = 0; n < 2 * FIBERS; n++)
		if (dist_same_everywhere(r, n))
			return -1;
	return 0;
}

#define FLAP(i)      "fault[file=@/off" #i ",ops=read|write|flush|put|del|stat|list,error=ETIMEDOUT]:mem"
#define FLAP_HALF(i) "fault[file=@/off" #i ",ops=write|put|flush,when=partly]:mem"

static void test_storm(void **state)
{
	dist_run("distributed[replicas=2,recheck=2ms]{" FLAP(0) "," FLAP(1) "," FLAP(2) "}", storm);
	dist_run(
		"distributed[replicas=2,quorum=1,recheck=2ms]{" FLAP(0) "," FLAP(1) "," FLAP(2) "}",
		storm);
	dist_run("distributed[replicas=3,quorum=2,recheck=2ms]{" FLAP(0) "," FLAP_HALF(1) "," FLAP(
			 2) ",mem}",
		 storm);
	dist_run("distributed[replicas=2,quorum=1,recheck=2ms]{" FLAP_HALF(
			 0) ",delay[jitter=1ms,write=1us]:" FLAP(1) "," FLAP_HALF(2) "}",
		 storm);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_storm),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = cmocka_run_group_tests_name("distributed, storm", tests, NULL, NULL);
	conform_stop();
	return failed;
}
