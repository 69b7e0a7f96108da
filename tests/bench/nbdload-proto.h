/* SPDX-License-Identifier: GPL-3.0-or-later */
/* The part of doc/proto.md that the load generator and the ceiling server need. Big-endian. */
#ifndef NBDLOAD_PROTO_H
#define NBDLOAD_PROTO_H

#include <stdint.h>

#define NBD_MAGIC              UINT64_C(0x4e42444d41474943)
#define NBD_IHAVEOPT           UINT64_C(0x49484156454f5054)
#define NBD_REPLY_MAGIC        UINT64_C(0x3e889045565a9)
#define NBD_REQUEST_MAGIC      UINT32_C(0x25609513)
#define NBD_SIMPLE_REPLY_MAGIC UINT32_C(0x67446698)
#define NBD_NAME_MAX           255 /* proto.md allows 4096; a benchmark has no use for them */

enum {
	NBD_FLAG_FIXED_NEWSTYLE = 1 << 0,
	NBD_FLAG_NO_ZEROES = 1 << 1,
	NBD_FLAG_C_FIXED_NEWSTYLE = 1 << 0,
	NBD_FLAG_C_NO_ZEROES = 1 << 1,
	NBD_FLAG_HAS_FLAGS = 1 << 0,
	NBD_FLAG_READ_ONLY = 1 << 1,
};

enum { NBD_OPT_EXPORT_NAME = 1, NBD_OPT_ABORT = 2, NBD_OPT_GO = 7 };
enum { NBD_REP_ACK = 1, NBD_REP_INFO = 3 };
enum { NBD_INFO_EXPORT = 0 };
enum { NBD_CMD_READ = 0, NBD_CMD_WRITE = 1, NBD_CMD_DISC = 2 };

#define NBD_REP_FLAG_ERROR (UINT32_C(1) << 31)
#define NBD_REP_ERR_UNSUP  (NBD_REP_FLAG_ERROR + 1)

enum { NBD_EIO = 5, NBD_EINVAL = 22 };

struct greeting {
	uint64_t nbdmagic;
	uint64_t ihaveopt;
	uint16_t flags;
} __attribute__((packed));

struct option_request {
	uint64_t magic;
	uint32_t option;
	uint32_t len; /* bytes that follow */
} __attribute__((packed));

struct option_reply {
	uint64_t magic;
	uint32_t option;
	uint32_t type;
	uint32_t len; /* bytes that follow */
} __attribute__((packed));

struct request {
	uint32_t magic;
	uint16_t flags;
	uint16_t type;
	uint64_t cookie;
	uint64_t offset;
	uint32_t len;
} __attribute__((packed));

struct simple_reply {
	uint32_t magic;
	uint32_t error;
	uint64_t cookie;
} __attribute__((packed));

_Static_assert(sizeof(struct greeting) == 18, "proto.md, newstyle negotiation");
_Static_assert(sizeof(struct request) == 28, "proto.md, request message");
_Static_assert(sizeof(struct simple_reply) == 16, "proto.md, simple reply message");

#endif
