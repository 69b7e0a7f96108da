/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * NBD requests and replies: bytes in, struct or verdict out. Pure.
 */
#include <errno.h>
#include <stdlib.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/proto.h"

/* What a command is, before looking at the export: NBD proto.md, "Request types". */
struct command {
	uint16_t flags;        /* valid with it, FUA aside: that goes with every command */
	uint16_t needs;        /* transmission flag without which a client must not send it */
	bool is_write;         /* refused on a read-only export */
	bool has_range;        /* offset and length mean something */
	bool has_payload;      /* of `len` bytes, in either direction */
	enum nbd_error beyond; /* answer to a range that ends behind the export */
};

/*
 * CACHE needs no flag: older clients send it without looking, and it can do no harm. The fields of
 * FLUSH are reserved; whatever stands there, flushing is safe.
 */
static const struct command commands[] = {
	[NBD_CMD_READ] = { NBD_CMD_FLAG_DF, 0, false, true, true, NBD_EINVAL },
	[NBD_CMD_WRITE] = { 0, 0, true, true, true, NBD_ENOSPC },
	[NBD_CMD_DISC] = { 0 },
	[NBD_CMD_FLUSH] = { .needs = NBD_FLAG_SEND_FLUSH },
	[NBD_CMD_TRIM] = { 0, NBD_FLAG_SEND_TRIM, true, true, false, NBD_EINVAL },
	[NBD_CMD_CACHE] = { 0, 0, false, true, false, NBD_EINVAL },
	[NBD_CMD_WRITE_ZEROES] = { NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
				   NBD_FLAG_SEND_WRITE_ZEROES, true, true, false, NBD_ENOSPC },
	[NBD_CMD_BLOCK_STATUS] = { NBD_CMD_FLAG_REQ_ONE, 0, false, true, false, NBD_EINVAL },
};

bool nbd_request_parse(const void *wire, struct nbd_request *r)
{
	const uint8_t *p = wire;

	if (get_be32(p) != NBD_REQUEST_MAGIC)
		return false;
	r->flags = get_be16(p + 4);
	r->type = get_be16(p + 6);
	__builtin_memcpy(&r->cookie, p + 8, sizeof(r->cookie));
	r->off = get_be64(p + 16);
	r->len = get_be32(p + 24);
	return true;
}

void nbd_request_build(void *wire, const struct nbd_request *r)
{
	uint8_t *p = wire;

	put_be32(p, NBD_REQUEST_MAGIC);
	put_be16(p + 4, r->flags);
	put_be16(p + 6, r->type);
	__builtin_memcpy(p + 8, &r->cookie, sizeof(r->cookie));
	put_be64(p + 16, r->off);
	put_be32(p + 24, r->len);
}

void nbd_simple_reply(void *wire, enum nbd_error error, uint64_t cookie)
{
	uint8_t *p = wire;

	put_be32(p, NBD_SIMPLE_REPLY_MAGIC);
	put_be32(p + 4, error);
	__builtin_memcpy(p + 8, &cookie, sizeof(cookie));
}

void nbd_chunk_header(void *wire, uint16_t flags, uint16_t type, uint64_t cookie,
		      uint32_t payload_len)
{
	uint8_t *p = wire;

	put_be32(p, NBD_STRUCTURED_REPLY_MAGIC);
	put_be16(p + 4, flags);
	put_be16(p + 6, type);
	__builtin_memcpy(p + 8, &cookie, sizeof(cookie));
	put_be32(p + 16, payload_len);
}

enum nbd_error nbd_error_of(int rc)
{
	switch (abs(rc)) {
	case 0: return NBD_SUCCESS;
	case EPERM:
	case EROFS: return NBD_EPERM;
	case ENOMEM: return NBD_ENOMEM;
	case EINVAL: return NBD_EINVAL;
	case ENOSPC:
	case EDQUOT:
	case EFBIG: return NBD_ENOSPC;
	case EOVERFLOW: return NBD_EOVERFLOW;
	case EOPNOTSUPP: /* = ENOTSUP on Linux */ return NBD_ENOTSUP;
	/* Not ESHUTDOWN: that says that we stop, and only we know. */
	default: return NBD_EIO;
	}
}

enum nbd_error nbd_error_for(const struct nbd_request *r, int rc)
{
	enum nbd_error error = nbd_error_of(rc);
	bool is_fast_zero = r->type == NBD_CMD_WRITE_ZEROES && (r->flags & NBD_CMD_FLAG_FAST_ZERO);
	bool is_whole_read = r->type == NBD_CMD_READ && (r->flags & NBD_CMD_FLAG_DF);

	if ((error == NBD_ENOTSUP && !is_fast_zero) || (error == NBD_EOVERFLOW && !is_whole_read))
		return NBD_EINVAL;
	return error;
}

/* Flags that `r` may carry on this connection. */
static uint16_t allowed_flags(const struct command *c, const struct nbd_limits *lim)
{
	uint16_t allowed = c->flags;

	if (!lim->is_structured || !(lim->tflags & NBD_FLAG_SEND_DF))
		allowed &= (uint16_t)~NBD_CMD_FLAG_DF;
	if (!(lim->tflags & NBD_FLAG_SEND_FAST_ZERO))
		allowed &= (uint16_t)~NBD_CMD_FLAG_FAST_ZERO;
	if (lim->tflags & NBD_FLAG_SEND_FUA)
		allowed |= NBD_CMD_FLAG_FUA;
	return allowed;
}

enum nbd_error nbd_request_check(const struct nbd_request *r, const struct nbd_limits *lim)
{
	const struct command *c;

	if (r->type == NBD_CMD_DISC)
		return NBD_SUCCESS;
	if (unlikely(r->type >= ARRAY_LEN(commands)))
		return NBD_EINVAL;
	c = &commands[r->type];

	/* Before flags: what an export does not advertise for being read-only is still EPERM. */
	if (unlikely(c->is_write && (lim->tflags & NBD_FLAG_READ_ONLY)))
		return NBD_EPERM;
	if (unlikely((lim->tflags & c->needs) != c->needs))
		return NBD_EINVAL;
	if (unlikely(r->flags & ~allowed_flags(c, lim)))
		return NBD_EINVAL;
	if (unlikely(!c->has_range))
		return NBD_SUCCESS;

	/* A status reply holds extents of at least a byte, so none can describe nothing. */
	if (r->type == NBD_CMD_BLOCK_STATUS &&
	    (!lim->is_structured || !lim->has_meta || r->len == 0))
		return NBD_EINVAL;
	if (unlikely((r->off | r->len) & (lim->min_block - 1)))
		return NBD_EINVAL;
	/* In this order nothing can overflow. */
	if (unlikely(r->off > lim->size || r->len > lim->size - r->off))
		return c->beyond;
	if (unlikely(c->has_payload && r->len > lim->max_payload))
		return r->flags & NBD_CMD_FLAG_DF ? NBD_EOVERFLOW : NBD_EINVAL;
	return NBD_SUCCESS;
}
