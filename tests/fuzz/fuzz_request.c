/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Fuzzes request parsing and checking. Input: limits (size 8, tflags 2, log2 of min_block 1, bits 1, all
 * big-endian), then requests of 28 bytes each.
 *
 * A request that passes must be harmless: a known command and flags, a range inside the export, payload
 * bounded, nothing written on a read-only export.
 */
#include <string.h>

#include "fuzz.h"
#include "nbdrs/proto.h"

enum { LIMITS_LEN = 12, BIT_META = 1, BIT_STRUCTURED = 2 };

/* What nbd_request_check() promises for a request that it lets through, said another way. */
static void check_passed(const struct nbd_request *r, const struct nbd_limits *lim)
{
	__uint128_t end = (__uint128_t)r->off + r->len;

	if (r->type == NBD_CMD_DISC)
		return;
	must(r->type <= NBD_CMD_BLOCK_STATUS);
	must(!(r->flags & ~(NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_DF |
			    NBD_CMD_FLAG_REQ_ONE | NBD_CMD_FLAG_FAST_ZERO)));
	must(!(r->flags & NBD_CMD_FLAG_FUA) || (lim->tflags & NBD_FLAG_SEND_FUA));
	if (r->type == NBD_CMD_FLUSH)
		return;
	must(end <= lim->size);
	must(r->off % lim->min_block == 0 && r->len % lim->min_block == 0);
	if (r->type == NBD_CMD_READ || r->type == NBD_CMD_WRITE)
		must(r->len <= lim->max_payload);
	if (r->type == NBD_CMD_WRITE || r->type == NBD_CMD_TRIM || r->type == NBD_CMD_WRITE_ZEROES)
		must(!(lim->tflags & NBD_FLAG_READ_ONLY));
	if (r->type == NBD_CMD_BLOCK_STATUS)
		must(r->len > 0 && lim->has_meta && lim->is_structured);
}

static void one_request(const uint8_t *wire, const struct nbd_limits *lim)
{
	uint8_t again[NBD_REQUEST_LEN];
	struct nbd_request r;
	enum nbd_error error;

	if (!nbd_request_parse(wire, &r)) {
		must(get_be32(wire) != NBD_REQUEST_MAGIC);
		return;
	}
	nbd_request_build(again, &r);
	must(memcmp(wire, again, sizeof(again)) == 0);

	error = nbd_request_check(&r, lim);
	switch (error) {
	case NBD_SUCCESS: check_passed(&r, lim); break;
	case NBD_EPERM: must(lim->tflags & NBD_FLAG_READ_ONLY); break;
	case NBD_ENOSPC: must(r.type == NBD_CMD_WRITE || r.type == NBD_CMD_WRITE_ZEROES); break;
	case NBD_EOVERFLOW:
		must(r.type == NBD_CMD_READ && (r.flags & NBD_CMD_FLAG_DF) && lim->is_structured);
		break;
	default: must(error == NBD_EINVAL);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct nbd_limits lim = { .max_payload = NBD_MAX_PAYLOAD };

	if (size < LIMITS_LEN)
		return 0;
	lim.size = get_be64(data) & INT64_MAX;
	lim.tflags = get_be16(data + 8);
	lim.min_block = 1U << (data[10] % 17);
	lim.has_meta = data[11] & BIT_META;
	lim.is_structured = data[11] & BIT_STRUCTURED;
	for (size_t at = LIMITS_LEN; size - at >= NBD_REQUEST_LEN; at += NBD_REQUEST_LEN)
		one_request(data + at, &lim);
	return 0;
}
