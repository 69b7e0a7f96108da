/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Requests and replies: wire layout, and every answer that depends on the request alone.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/proto.h"

#define ALL_TFLAGS                                                                           \
	(NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM | \
	 NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_DF | NBD_FLAG_CAN_MULTI_CONN |           \
	 NBD_FLAG_SEND_CACHE | NBD_FLAG_SEND_FAST_ZERO)

#define MIB (1U << 20)

static const struct nbd_limits full = {
	.size = 100 * MIB,
	.tflags = ALL_TFLAGS,
	.min_block = 1,
	.max_payload = NBD_MAX_PAYLOAD,
	.has_meta = true,
	.is_structured = true,
};

static struct nbd_request request(unsigned type, unsigned flags, uint64_t off, uint32_t len)
{
	return (struct nbd_request){
		.type = (uint16_t)type, .flags = (uint16_t)flags, .off = off, .len = len
	};
}

static enum nbd_error check(const struct nbd_limits *lim, unsigned type, unsigned flags,
			    uint64_t off, uint32_t len)
{
	struct nbd_request r = request(type, flags, off, len);

	return nbd_request_check(&r, lim);
}

static void test_request_wire(void **state)
{
	static const uint8_t wire[NBD_REQUEST_LEN] = {
		0x25, 0x60, 0x95, 0x13, 0x00, 0x03, 0x00, 0x06, 'c',  'o',  'o',  'k',  'i',  'e',
		'4',  '2',  0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x80, 0x00, 0x10, 0x00,
	};
	uint8_t again[NBD_REQUEST_LEN], broken[NBD_REQUEST_LEN];
	struct nbd_request r;

	assert_true(nbd_request_parse(wire, &r));
	assert_int_equal(r.flags, NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE);
	assert_int_equal(r.type, NBD_CMD_WRITE_ZEROES);
	assert_memory_equal(&r.cookie, "cookie42", 8);
	assert_int_equal(r.off, 0x0102030405060708);
	assert_int_equal(r.len, 0x80001000);
	nbd_request_build(again, &r);
	assert_memory_equal(wire, again, sizeof(wire));

	for (unsigned i = 0; i < 4; i++) {
		memcpy(broken, wire, sizeof(wire));
		broken[i] ^= 0x01;
		assert_false(nbd_request_parse(broken, &r));
	}
}

static void test_reply_wire(void **state)
{
	static const uint8_t simple[NBD_SIMPLE_REPLY_LEN] = {
		0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 'c', 'o', 'o', 'k', 'i', 'e', '4', '2',
	};
	static const uint8_t chunk[NBD_CHUNK_LEN] = {
		0x66, 0x8e, 0x33, 0xef, 0,   1,   0x80, 2, 'c', 'o',
		'o',  'k',  'i',  'e',  '4', '2', 0,    0, 1,   2,
	};
	uint8_t wire[NBD_CHUNK_LEN];
	uint64_t cookie;

	memcpy(&cookie, "cookie42", 8);
	nbd_simple_reply(wire, NBD_ENOSPC, cookie);
	assert_memory_equal(wire, simple, sizeof(simple));
	nbd_chunk_header(wire, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR_OFFSET, cookie, 0x102);
	assert_memory_equal(wire, chunk, sizeof(chunk));
}

static void test_fields_at_odd_addresses(void **state)
{
	uint8_t buf[16] = { 0 };

	put_be64(buf + 1, UINT64_C(0x1122334455667788));
	assert_int_equal(buf[1], 0x11);
	assert_int_equal(buf[8], 0x88);
	assert_int_equal(get_be64(buf + 1), UINT64_C(0x1122334455667788));
	put_be32(buf + 3, 0xa1b2c3d4);
	assert_int_equal(get_be32(buf + 3), 0xa1b2c3d4);
	put_be16(buf + 5, 0xbeef);
	assert_int_equal(get_be16(buf + 5), 0xbeef);
}

static void test_errors(void **state)
{
	static const struct {
		int rc;
		enum nbd_error error;
	} rows[] = {
		{ 0, NBD_SUCCESS },           { EPERM, NBD_EPERM },
		{ EROFS, NBD_EPERM },         { EIO, NBD_EIO },
		{ ENOMEM, NBD_ENOMEM },       { EINVAL, NBD_EINVAL },
		{ ENOSPC, NBD_ENOSPC },       { EDQUOT, NBD_ENOSPC },
		{ EFBIG, NBD_ENOSPC },        { EOVERFLOW, NBD_EOVERFLOW },
		{ ENOTSUP, NBD_ENOTSUP },     { EOPNOTSUPP, NBD_ENOTSUP },
		{ ESHUTDOWN, NBD_EIO }, { EACCES, NBD_EIO },
		{ EAGAIN, NBD_EIO },          { ETIMEDOUT, NBD_EIO },
		{ EFAULT, NBD_EIO },          { ENOENT, NBD_EIO },
		{ ECONNRESET, NBD_EIO },      { 4095, NBD_EIO },
	};

	for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
		assert_int_equal(nbd_error_of(rows[i].rc), rows[i].error);
		assert_int_equal(nbd_error_of(-rows[i].rc), rows[i].error);
	}
}

/* Nothing but the eight numbers of the protocol ever leaves. */
static void test_errors_are_those_of_the_protocol(void **state)
{
	for (int rc = 0; rc < 4096; rc++) {
		switch ((int)nbd_error_of(-rc)) {
		case 0: assert_int_equal(rc, 0); break;
		case 1:
		case 5:
		case 12:
		case 22:
		case 28:
		case 75:
		case 95:
		case 108: break;
		default: fail_msg("errno %d becomes %d", rc, (int)nbd_error_of(-rc));
		}
	}
}

static void test_errors_in_context(void **state)
{
	struct nbd_request fast = request(NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_FAST_ZERO, 0, 1);
	struct nbd_request slow = request(NBD_CMD_WRITE_ZEROES, 0, 0, 1);
	struct nbd_request whole = request(NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 1);
	struct nbd_request parts = request(NBD_CMD_READ, 0, 0, 1);
	/* The same bit means something else elsewhere. */
	struct nbd_request trim = request(NBD_CMD_TRIM, NBD_CMD_FLAG_FAST_ZERO, 0, 1);

	assert_int_equal(nbd_error_for(&fast, -ENOTSUP), NBD_ENOTSUP);
	assert_int_equal(nbd_error_for(&slow, -ENOTSUP), NBD_EINVAL);
	assert_int_equal(nbd_error_for(&trim, -ENOTSUP), NBD_EINVAL);
	assert_int_equal(nbd_error_for(&whole, -EOVERFLOW), NBD_EOVERFLOW);
	assert_int_equal(nbd_error_for(&parts, -EOVERFLOW), NBD_EINVAL);
	assert_int_equal(nbd_error_for(&parts, -EIO), NBD_EIO);
	assert_int_equal(nbd_error_for(&parts, 0), NBD_SUCCESS);
}

static void test_good_requests(void **state)
{
	static const struct {
		unsigned type, flags;
		uint32_t len;
	} rows[] = {
		{ NBD_CMD_READ, 0, 4096 },
		{ NBD_CMD_READ, NBD_CMD_FLAG_DF, 4096 },
		{ NBD_CMD_READ, NBD_CMD_FLAG_FUA, 4096 },
		{ NBD_CMD_WRITE, 0, 4096 },
		{ NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, 4096 },
		{ NBD_CMD_DISC, 0, 0 },
		{ NBD_CMD_DISC, 0xffff, 17 },
		{ NBD_CMD_FLUSH, 0, 0 },
		{ NBD_CMD_FLUSH, NBD_CMD_FLAG_FUA, 0 },
		{ NBD_CMD_TRIM, NBD_CMD_FLAG_FUA, 64 * MIB },
		{ NBD_CMD_CACHE, 0, 64 * MIB },
		{ NBD_CMD_WRITE_ZEROES,
		  NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO, 64 * MIB },
		{ NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_REQ_ONE, 64 * MIB },
	};

	for (size_t i = 0; i < ARRAY_LEN(rows); i++)
		assert_int_equal(check(&full, rows[i].type, rows[i].flags, 0, rows[i].len),
				 NBD_SUCCESS);
}

static void test_unknown_commands(void **state)
{
	for (unsigned type = NBD_CMD_BLOCK_STATUS + 1; type <= UINT16_MAX; type++)
		assert_int_equal(check(&full, type, 0, 0, 0), NBD_EINVAL);
}

/* Every flag bit with every command: allowed are exactly these. */
static void test_flags(void **state)
{
	static const unsigned own[] = {
		[NBD_CMD_READ] = NBD_CMD_FLAG_DF,
		[NBD_CMD_WRITE] = 0,
		[NBD_CMD_DISC] = 0xffff,
		[NBD_CMD_FLUSH] = 0,
		[NBD_CMD_TRIM] = 0,
		[NBD_CMD_CACHE] = 0,
		[NBD_CMD_WRITE_ZEROES] = NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
		[NBD_CMD_BLOCK_STATUS] = NBD_CMD_FLAG_REQ_ONE,
	};

	for (unsigned type = 0; type < ARRAY_LEN(own); type++) {
		for (unsigned bit = 0; bit < 16; bit++) {
			unsigned allowed = own[type] | NBD_CMD_FLAG_FUA;
			enum nbd_error want = allowed & (1U << bit) ? NBD_SUCCESS : NBD_EINVAL;

			assert_int_equal(check(&full, type, 1U << bit, 0, 512), want);
		}
	}
}

static void test_flags_that_were_not_offered(void **state)
{
	struct nbd_limits lim = full;

	lim.tflags &= (uint16_t)~NBD_FLAG_SEND_FUA;
	assert_int_equal(check(&lim, NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, 0, 512), NBD_EINVAL);
	lim = full;
	lim.tflags &= (uint16_t)~NBD_FLAG_SEND_FAST_ZERO;
	assert_int_equal(check(&lim, NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_FAST_ZERO, 0, 512),
			 NBD_EINVAL);
	assert_int_equal(check(&lim, NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE, 0, 512),
			 NBD_SUCCESS);
	lim = full;
	lim.is_structured = false;
	assert_int_equal(check(&lim, NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 512), NBD_EINVAL);
	assert_int_equal(check(&lim, NBD_CMD_READ, 0, 0, 512), NBD_SUCCESS);
}

static void test_commands_that_were_not_offered(void **state)
{
	struct nbd_limits lim = full;

	lim.tflags = NBD_FLAG_HAS_FLAGS;
	assert_int_equal(check(&lim, NBD_CMD_FLUSH, 0, 0, 0), NBD_EINVAL);
	assert_int_equal(check(&lim, NBD_CMD_TRIM, 0, 0, 512), NBD_EINVAL);
	assert_int_equal(check(&lim, NBD_CMD_WRITE_ZEROES, 0, 0, 512), NBD_EINVAL);
	assert_int_equal(check(&lim, NBD_CMD_READ, 0, 0, 512), NBD_SUCCESS);
	assert_int_equal(check(&lim, NBD_CMD_WRITE, 0, 0, 512), NBD_SUCCESS);
	/* Clients of old send it without looking. */
	assert_int_equal(check(&lim, NBD_CMD_CACHE, 0, 0, 512), NBD_SUCCESS);
}

static void test_block_status_needs_context(void **state)
{
	struct nbd_limits lim = full;

	lim.has_meta = false;
	assert_int_equal(check(&lim, NBD_CMD_BLOCK_STATUS, 0, 0, 512), NBD_EINVAL);
	lim = full;
	lim.is_structured = false;
	assert_int_equal(check(&lim, NBD_CMD_BLOCK_STATUS, 0, 0, 512), NBD_EINVAL);
	assert_int_equal(check(&full, NBD_CMD_BLOCK_STATUS, 0, 0, 0), NBD_EINVAL);
}

static void test_read_only(void **state)
{
	/* As export_tflags() gives them. */
	struct nbd_limits lim = full;

	lim.tflags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY | NBD_FLAG_SEND_DF |
		     NBD_FLAG_SEND_CACHE;
	assert_int_equal(check(&lim, NBD_CMD_WRITE, 0, 0, 512), NBD_EPERM);
	assert_int_equal(check(&lim, NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, 0, 512), NBD_EPERM);
	assert_int_equal(check(&lim, NBD_CMD_WRITE, 0, 0, 0), NBD_EPERM);
	assert_int_equal(check(&lim, NBD_CMD_WRITE, 0, 200 * MIB, 512), NBD_EPERM);
	assert_int_equal(check(&lim, NBD_CMD_TRIM, 0, 0, 512), NBD_EPERM);
	assert_int_equal(check(&lim, NBD_CMD_WRITE_ZEROES, 0, 0, 512), NBD_EPERM);
	assert_int_equal(check(&lim, NBD_CMD_READ, 0, 0, 512), NBD_SUCCESS);
	assert_int_equal(check(&lim, NBD_CMD_CACHE, 0, 0, 512), NBD_SUCCESS);
	assert_int_equal(check(&lim, NBD_CMD_BLOCK_STATUS, 0, 0, 512), NBD_SUCCESS);
}

static void test_ranges(void **state)
{
	static const struct {
		unsigned type;
		enum nbd_error beyond;
	} rows[] = {
		{ NBD_CMD_READ, NBD_EINVAL },         { NBD_CMD_WRITE, NBD_ENOSPC },
		{ NBD_CMD_TRIM, NBD_EINVAL },         { NBD_CMD_CACHE, NBD_EINVAL },
		{ NBD_CMD_WRITE_ZEROES, NBD_ENOSPC }, { NBD_CMD_BLOCK_STATUS, NBD_EINVAL },
	};
	uint64_t size = full.size;

	for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
		unsigned type = rows[i].type;
		enum nbd_error beyond = rows[i].beyond;

		assert_int_equal(check(&full, type, 0, size - 512, 512), NBD_SUCCESS);
		assert_int_equal(check(&full, type, 0, size - 1, 1), NBD_SUCCESS);
		assert_int_equal(check(&full, type, 0, size - 512, 513), beyond);
		assert_int_equal(check(&full, type, 0, size, 1), beyond);
		assert_int_equal(check(&full, type, 0, size + 1, 1), beyond);
		/* Sums that wrap at 64 bits, and lengths that look small when cut to 32. */
		assert_int_equal(check(&full, type, 0, UINT64_MAX, 1), beyond);
		assert_int_equal(check(&full, type, 0, UINT64_MAX - 511, 512), beyond);
		assert_int_equal(check(&full, type, 0, UINT64_MAX - UINT32_MAX + 1, UINT32_MAX),
				 beyond);
		assert_int_equal(check(&full, type, 0, UINT64_C(1) << 63, 512), beyond);
		assert_int_equal(check(&full, type, 0, UINT64_C(1) << 32, 512), beyond);
		assert_int_equal(check(&full, type, 0, 0, UINT32_MAX), beyond);
	}
}

static void test_zero_length(void **state)
{
	static const unsigned types[] = { NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_CACHE,
					  NBD_CMD_WRITE_ZEROES };

	for (size_t i = 0; i < ARRAY_LEN(types); i++) {
		assert_int_equal(check(&full, types[i], 0, 0, 0), NBD_SUCCESS);
		assert_int_equal(check(&full, types[i], 0, full.size, 0), NBD_SUCCESS);
		assert_int_not_equal(check(&full, types[i], 0, full.size + 1, 0), NBD_SUCCESS);
	}
}

static void test_largest_export(void **state)
{
	struct nbd_limits lim = full;

	lim.size = INT64_MAX;
	assert_int_equal(check(&lim, NBD_CMD_TRIM, 0, 0, UINT32_MAX), NBD_SUCCESS);
	assert_int_equal(check(&lim, NBD_CMD_WRITE_ZEROES, 0, lim.size - UINT32_MAX, UINT32_MAX),
			 NBD_SUCCESS);
	assert_int_equal(check(&lim, NBD_CMD_READ, 0, lim.size - 512, 512), NBD_SUCCESS);
	assert_int_equal(check(&lim, NBD_CMD_READ, 0, lim.size - 511, 512), NBD_EINVAL);
	lim.size = 0;
	assert_int_equal(check(&lim, NBD_CMD_READ, 0, 0, 0), NBD_SUCCESS);
	assert_int_equal(check(&lim, NBD_CMD_READ, 0, 0, 1), NBD_EINVAL);
	assert_int_equal(check(&lim, NBD_CMD_WRITE, 0, 0, 1), NBD_ENOSPC);
}

static void test_alignment(void **state)
{
	struct nbd_limits lim = full;

	lim.min_block = 4096;
	for (unsigned type = NBD_CMD_READ; type <= NBD_CMD_BLOCK_STATUS; type++) {
		enum nbd_error want = type == NBD_CMD_DISC || type == NBD_CMD_FLUSH ? NBD_SUCCESS
										    : NBD_EINVAL;

		assert_int_equal(check(&lim, type, 0, 4096, 8192), NBD_SUCCESS);
		assert_int_equal(check(&lim, type, 0, 512, 4096), want);
		assert_int_equal(check(&lim, type, 0, 4096, 512), want);
		assert_int_equal(check(&lim, type, 0, 4095, 1), want);
	}
}

static void test_oversize(void **state)
{
	assert_int_equal(check(&full, NBD_CMD_READ, 0, 0, NBD_MAX_PAYLOAD), NBD_SUCCESS);
	assert_int_equal(check(&full, NBD_CMD_WRITE, 0, 0, NBD_MAX_PAYLOAD), NBD_SUCCESS);
	assert_int_equal(check(&full, NBD_CMD_READ, 0, 0, NBD_MAX_PAYLOAD + 1), NBD_EINVAL);
	assert_int_equal(check(&full, NBD_CMD_WRITE, 0, 0, NBD_MAX_PAYLOAD + 1), NBD_EINVAL);
	assert_int_equal(check(&full, NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, NBD_MAX_PAYLOAD + 1),
			 NBD_EOVERFLOW);
	assert_int_equal(check(&full, NBD_CMD_READ, NBD_CMD_FLAG_FUA, 0, NBD_MAX_PAYLOAD + 1),
			 NBD_EINVAL);
	/* What carries no data may be as long as the export. */
	assert_int_equal(check(&full, NBD_CMD_CACHE, 0, 0, NBD_MAX_PAYLOAD + 1), NBD_SUCCESS);
	assert_int_equal(check(&full, NBD_CMD_TRIM, 0, 0, (uint32_t)full.size), NBD_SUCCESS);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_request_wire),
		cmocka_unit_test(test_reply_wire),
		cmocka_unit_test(test_fields_at_odd_addresses),
		cmocka_unit_test(test_errors),
		cmocka_unit_test(test_errors_are_those_of_the_protocol),
		cmocka_unit_test(test_errors_in_context),
		cmocka_unit_test(test_good_requests),
		cmocka_unit_test(test_unknown_commands),
		cmocka_unit_test(test_flags),
		cmocka_unit_test(test_flags_that_were_not_offered),
		cmocka_unit_test(test_commands_that_were_not_offered),
		cmocka_unit_test(test_block_status_needs_context),
		cmocka_unit_test(test_read_only),
		cmocka_unit_test(test_ranges),
		cmocka_unit_test(test_zero_length),
		cmocka_unit_test(test_largest_export),
		cmocka_unit_test(test_alignment),
		cmocka_unit_test(test_oversize),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
