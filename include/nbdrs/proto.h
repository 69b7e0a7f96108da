/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The NBD protocol as numbers and pure parsers/builders (NBD project, doc/proto.md). No I/O here.
 */
#ifndef NBDRS_PROTO_H
#define NBDRS_PROTO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NBD_MAGIC UINT64_C(0x4e42444d41474943)	/* "NBDMAGIC" */
#define NBD_IHAVEOPT UINT64_C(0x49484156454f5054)
#define NBD_REP_MAGIC UINT64_C(0x0003e889045565a9)
#define NBD_REQUEST_MAGIC 0x25609513U
#define NBD_SIMPLE_REPLY_MAGIC 0x67446698U
#define NBD_STRUCTURED_REPLY_MAGIC 0x668e33efU

enum { NBD_DEFAULT_PORT = 10809 };

/* Handshake flags and the client's. */
enum { NBD_FLAG_FIXED_NEWSTYLE = 1, NBD_FLAG_NO_ZEROES = 2 };

enum nbd_opt {
	NBD_OPT_EXPORT_NAME = 1,
	NBD_OPT_ABORT = 2,
	NBD_OPT_LIST = 3,
	NBD_OPT_STARTTLS = 5,
	NBD_OPT_INFO = 6,
	NBD_OPT_GO = 7,
	NBD_OPT_STRUCTURED_REPLY = 8,
	NBD_OPT_LIST_META_CONTEXT = 9,
	NBD_OPT_SET_META_CONTEXT = 10,
	NBD_OPT_EXTENDED_HEADERS = 11,
};

enum nbd_rep {
	NBD_REP_ACK = 1,
	NBD_REP_SERVER = 2,
	NBD_REP_INFO = 3,
	NBD_REP_META_CONTEXT = 4,
};

#define NBD_REP_ERR(n) (0x80000000U | (n))
#define NBD_REP_ERR_UNSUP NBD_REP_ERR(1)
#define NBD_REP_ERR_POLICY NBD_REP_ERR(2)
#define NBD_REP_ERR_INVALID NBD_REP_ERR(3)
#define NBD_REP_ERR_PLATFORM NBD_REP_ERR(4)
#define NBD_REP_ERR_TLS_REQD NBD_REP_ERR(5)
#define NBD_REP_ERR_UNKNOWN NBD_REP_ERR(6)
#define NBD_REP_ERR_SHUTDOWN NBD_REP_ERR(7)
#define NBD_REP_ERR_BLOCK_SIZE_REQD NBD_REP_ERR(8)
#define NBD_REP_ERR_TOO_BIG NBD_REP_ERR(9)

enum nbd_info { NBD_INFO_EXPORT = 0, NBD_INFO_NAME = 1, NBD_INFO_DESCRIPTION = 2, NBD_INFO_BLOCK_SIZE = 3 };

/* Transmission flags. */
enum nbd_tflag {
	NBD_FLAG_HAS_FLAGS = 1 << 0,
	NBD_FLAG_READ_ONLY = 1 << 1,
	NBD_FLAG_SEND_FLUSH = 1 << 2,
	NBD_FLAG_SEND_FUA = 1 << 3,
	NBD_FLAG_ROTATIONAL = 1 << 4,
	NBD_FLAG_SEND_TRIM = 1 << 5,
	NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6,
	NBD_FLAG_SEND_DF = 1 << 7,
	NBD_FLAG_CAN_MULTI_CONN = 1 << 8,
	NBD_FLAG_SEND_RESIZE = 1 << 9,
	NBD_FLAG_SEND_CACHE = 1 << 10,
	NBD_FLAG_SEND_FAST_ZERO = 1 << 11,
};

enum nbd_cmd {
	NBD_CMD_READ = 0,
	NBD_CMD_WRITE = 1,
	NBD_CMD_DISC = 2,
	NBD_CMD_FLUSH = 3,
	NBD_CMD_TRIM = 4,
	NBD_CMD_CACHE = 5,
	NBD_CMD_WRITE_ZEROES = 6,
	NBD_CMD_BLOCK_STATUS = 7,
};

enum nbd_cmd_flag {
	NBD_CMD_FLAG_FUA = 1 << 0,
	NBD_CMD_FLAG_NO_HOLE = 1 << 1,
	NBD_CMD_FLAG_DF = 1 << 2,
	NBD_CMD_FLAG_REQ_ONE = 1 << 3,
	NBD_CMD_FLAG_FAST_ZERO = 1 << 4,
};

/* Structured reply chunks. */
enum { NBD_REPLY_FLAG_DONE = 1 };
enum nbd_chunk {
	NBD_REPLY_TYPE_NONE = 0,
	NBD_REPLY_TYPE_OFFSET_DATA = 1,
	NBD_REPLY_TYPE_OFFSET_HOLE = 2,
	NBD_REPLY_TYPE_BLOCK_STATUS = 5,
	NBD_REPLY_TYPE_ERROR = 0x8001,
	NBD_REPLY_TYPE_ERROR_OFFSET = 0x8002,
};

/* Errors on the wire. */
enum nbd_error {
	NBD_SUCCESS = 0,
	NBD_EPERM = 1,
	NBD_EIO = 5,
	NBD_ENOMEM = 12,
	NBD_EINVAL = 22,
	NBD_ENOSPC = 28,
	NBD_EOVERFLOW = 75,
	NBD_ENOTSUP = 95,
	NBD_ESHUTDOWN = 108,
};

enum {
	NBD_REQUEST_LEN = 28,
	NBD_SIMPLE_REPLY_LEN = 16,
	NBD_CHUNK_LEN = 20,
	NBD_GREETING_LEN = 18,
	NBD_OPT_HEADER_LEN = 16,
	NBD_REP_HEADER_LEN = 20,
	NBD_MAX_STRING = 4096,
	NBD_META_BASE_ALLOCATION = 1, /* the id that SET_META_CONTEXT gives out for "base:allocation" */
	NBD_MAX_PAYLOAD = 32 << 20, /* what every client may count on */
};

/* A request as it came; `cookie` is opaque and kept in wire order. */
struct nbd_request {
	uint16_t flags, type;
	uint64_t cookie;
	uint64_t off;
	uint32_t len;
};

/* Reads NBD_REQUEST_LEN bytes; false when the magic is wrong (the stream is lost then). */
bool nbd_request_parse(const void *wire, struct nbd_request *r);
void nbd_request_build(void *wire, const struct nbd_request *r);

/* Writes NBD_SIMPLE_REPLY_LEN bytes. */
void nbd_simple_reply(void *wire, enum nbd_error error, uint64_t cookie);
/* Writes NBD_CHUNK_LEN bytes; payload_len follows on the wire. */
void nbd_chunk_header(void *wire, uint16_t flags, uint16_t type, uint64_t cookie, uint32_t payload_len);

/* -errno (or errno) -> its number on the wire; what has none there is EIO. */
enum nbd_error nbd_error_of(int rc);

/* The same as the answer to `r`: ENOTSUP only to FAST_ZERO and EOVERFLOW only to DF, else EINVAL. */
enum nbd_error nbd_error_for(const struct nbd_request *r, int rc);

/* What a request is checked against. */
struct nbd_limits {
	uint64_t size;
	uint16_t tflags;
	uint32_t min_block;  /* power of two */
	uint32_t max_payload;
	bool has_meta;	     /* base:allocation is set for this connection */
	bool is_structured;
};

/*
 * Everything of checklist 5.1 that needs only the request itself: unknown command or flag, ranges,
 * read-only, alignment, size. NBD_SUCCESS or the error to answer. DISC is always fine.
 */
enum nbd_error nbd_request_check(const struct nbd_request *r, const struct nbd_limits *lim);

/* Big-endian fields at any alignment. */
static inline uint16_t get_be16(const void *p)
{
	uint16_t v;
	__builtin_memcpy(&v, p, sizeof(v));
	return __builtin_bswap16(v);
}
static inline uint32_t get_be32(const void *p)
{
	uint32_t v;
	__builtin_memcpy(&v, p, sizeof(v));
	return __builtin_bswap32(v);
}
static inline uint64_t get_be64(const void *p)
{
	uint64_t v;
	__builtin_memcpy(&v, p, sizeof(v));
	return __builtin_bswap64(v);
}
static inline void put_be16(void *p, uint16_t v)
{
	v = __builtin_bswap16(v);
	__builtin_memcpy(p, &v, sizeof(v));
}
static inline void put_be32(void *p, uint32_t v)
{
	v = __builtin_bswap32(v);
	__builtin_memcpy(p, &v, sizeof(v));
}
static inline void put_be64(void *p, uint64_t v)
{
	v = __builtin_bswap64(v);
	__builtin_memcpy(p, &v, sizeof(v));
}

#endif
