/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Data buffers: per-reactor pools of power-of-two sizes from 4 KiB to 64 MiB, page aligned. Buffers of
 * up to 256 KiB are kept for reuse (last in, first out: the next one is still in the CPU's cache), larger
 * ones up to a byte limit; the rest goes back to the kernel. From 2 MiB on they lie in huge pages (huge.h).
 */
#ifndef NBDRS_BUF_H
#define NBDRS_BUF_H

#include <stddef.h>

enum { BUF_MIN = 4096, BUF_MAX = 64 << 20, BUF_ALIGN = 4096 };

/*
 * At least `len` bytes, contents undefined. NULL only when the kernel refuses memory: the caller fails
 * the request with -ENOMEM. Belongs to this reactor: give it back here.
 */
void *buf_get(size_t len);

/* `len` as given to buf_get; NULL is fine. */
void buf_put(void *buf, size_t len);

/* What buf_get(len) really gives: the next power of two, at least BUF_MIN. */
size_t buf_size(size_t len);

#endif
