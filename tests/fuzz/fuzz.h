/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What fuzz targets share: the entry that libFuzzer and replay.c call, and how a target says that something is wrong.
 */
#ifndef NBDRS_TESTS_FUZZ_H
#define NBDRS_TESTS_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/* `data` is exactly `size` bytes long. Returns 0. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Also without assertions compiled in. */
static inline void must(bool is_true)
{
	if (!is_true)
		abort();
}

#endif
