/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Fuzzes the record of what is in doubt. Input: the object as a node has it.
 *
 * What is taken names as many regions and nodes as it has lines between the first and the last, each region a whole
 * one.
 */
#include <errno.h>

#include "fuzz.h"
#include "layer/distributed/distributed.h"

static int add(void *arg, uint64_t region)
{
	size_t *n = arg;

	must(region == REGION_OTHERS || region <= UINT64_MAX / REGION_SHARDS);
	++*n;
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	size_t n = 0, lines = 0;
	uint64_t out = 0;
	int rc = doubt_parse((const char *)data, size, add, &n, &out);

	for (size_t i = 0; i < size; i++)
		lines += data[i] == '\n';
	must(rc == 0 || rc == -EILSEQ);
	must(rc != 0 || (lines == n + count(out) + 2 && data[size - 1] == '\n'));
	must(n <= lines);
	return 0;
}
