/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What an export advertises follows from what its chain can do, and from nothing else.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/export.h"

enum { ALWAYS = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_DF | NBD_FLAG_SEND_CACHE };
enum { WRITABLE = ALWAYS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_WRITE_ZEROES };

static void test_each_capability(void **state)
{
	static const struct {
		unsigned caps;
		uint16_t tflags;
	} rows[] = {
		{ 0, ALWAYS | NBD_FLAG_READ_ONLY },
		{ CAN_WRITE, WRITABLE },
		{ CAN_WRITE | CAN_TRIM, WRITABLE | NBD_FLAG_SEND_TRIM },
		{ CAN_WRITE | CAN_FAST_ZERO, WRITABLE | NBD_FLAG_SEND_FAST_ZERO },
		{ CAN_WRITE | CAN_MULTI, WRITABLE | NBD_FLAG_CAN_MULTI_CONN },
		{ CAN_WRITE | IS_ROTATIONAL, WRITABLE | NBD_FLAG_ROTATIONAL },
		/* Emulated where missing, so they change nothing. */
		{ CAN_WRITE | CAN_ZERO | CAN_FUA | CAN_FLUSH, WRITABLE },
		{ CAN_WRITE | CAN_PARTIAL | CAN_MAP | CAN_LEND, WRITABLE },
	};

	for (size_t i = 0; i < ARRAY_LEN(rows); i++)
		assert_int_equal(export_tflags(rows[i].caps, false), rows[i].tflags);
}

/* Whatever the chain could do, nothing that writes is offered. */
static void test_read_only(void **state)
{
	const unsigned all = ~0U;

	assert_int_equal(export_tflags(all, true), ALWAYS | NBD_FLAG_READ_ONLY |
							   NBD_FLAG_ROTATIONAL |
							   NBD_FLAG_CAN_MULTI_CONN);
	assert_int_equal(export_tflags(all & ~(unsigned)CAN_WRITE, false),
			 export_tflags(all, true));
	assert_int_equal(export_tflags(CAN_WRITE | CAN_TRIM, true), ALWAYS | NBD_FLAG_READ_ONLY);
}

static void test_nothing_to_find(void **state)
{
	assert_null(export_first());
	assert_null(export_find(""));
	assert_null(export_find("disk"));
	assert_null(export_find_n("disk\0", 5));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_each_capability),
		cmocka_unit_test(test_read_only),
		cmocka_unit_test(test_nothing_to_find),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
