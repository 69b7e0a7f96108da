/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Scattered data of a request: borrowed segments, never owned.
 */
#ifndef NBDRS_IOV_H
#define NBDRS_IOV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

struct iov {
	const struct iovec *v; /* n segments, none empty unless n == 1 */
	unsigned n;
	size_t len; /* bytes in all */
};

/* A single buffer; `v` is storage of the caller that must live as long as the result. */
static inline struct iov iov_one(struct iovec *v, void *buf, size_t len)
{
	v->iov_base = buf;
	v->iov_len = len;
	return (struct iov){ v, 1, len };
}

enum { IOV_SLICE_MAX = 16 };

/*
 * The part [off, off + len) of `src` as a new view; `store` has room for `room` segments. The number of
 * segments needed never exceeds src->n. Asserts that it fits.
 */
struct iov iov_slice(const struct iov *src, size_t off, size_t len, struct iovec *store, unsigned room);

/* Copies min(len, iov->len - off) bytes out of / into the segments from `off` on; returns the count. */
size_t iov_copy_out(const struct iov *src, size_t off, void *dst, size_t len);
size_t iov_copy_in(const struct iov *dst, size_t off, const void *src, size_t len);
/* Zeroes len bytes from `off` on. */
void iov_zero(const struct iov *dst, size_t off, size_t len);
/* True when every byte is zero. */
bool iov_is_zero(const struct iov *src);

#endif
