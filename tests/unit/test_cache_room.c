/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer cache, clean data on disk: what makes room for what, when all of it is in use.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <inttypes.h>

#include "tiered.h"

static CO_FN int scan(struct run *r, uint64_t from, uint64_t to)
{
	for (uint64_t off = from; off < to; off += 16 * KI)
		if (run_check(r, off, 16 * KI, 1) || tiered_settle(r))
			return -1;
	return 0;
}

/* 4 MiB that are used, then 24 MiB once, in 8 MiB. */
static CO_FN int survives_a_scan(void *arg)
{
	struct run *r = arg;
	uint64_t before;

	for (unsigned i = 0; i < 4; i++)
		if (scan(r, 0, 4 * MI))
			return -1;
	if (scan(r, 8 * MI, 32 * MI))
		return -1;
	EXPECT(r,
	       run_status(r, "tier_bytes") <= run_status(r, "tier_limit") &&
		       run_status(r, "tier_evictions") > 100,
	       "room was made: %" PRIu64, run_status(r, "tier_evictions"));
	before = tiered_below(r);
	if (scan(r, 0, 4 * MI))
		return -1;
	EXPECT(r, tiered_below(r) - before <= 8, "%" PRIu64 " of 64 were pushed out by a scan",
	       tiered_below(r) - before);
	return 0;
}

static void test_survives_a_scan(void **state)
{
	tiered_check(TIERED FILE_BELOW, 32 * MI, survives_a_scan);
}

/* Another use takes the place of the one before, also when all of the disk is in use. */
static CO_FN int follows_its_use(void *arg)
{
	struct run *r = arg;
	uint64_t before;

	for (unsigned i = 0; i < 4; i++)
		if (scan(r, 0, 7 * MI))
			return -1;
	for (unsigned i = 0; i < 12; i++)
		if (scan(r, 8 * MI, 12 * MI))
			return -1;
	before = tiered_below(r);
	if (scan(r, 8 * MI, 12 * MI))
		return -1;
	EXPECT(r, tiered_below(r) - before <= 16, "%" PRIu64 " of 64 are not there",
	       tiered_below(r) - before);
	return 0;
}

static void test_follows_its_use(void **state)
{
	tiered_check(TIERED FILE_BELOW, 16 * MI, follows_its_use);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_survives_a_scan),
		cmocka_unit_test(test_follows_its_use),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = cmocka_run_group_tests_name("cache on disk, what makes room", tests, NULL, NULL);
	conform_stop();
	return failed;
}
