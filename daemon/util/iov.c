/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Scattered data of a request.
 */
#include "nbdrs/iov.h"

#include <assert.h>

#include "nbdrs/cleanup.h"

/* The segment that holds byte `off`; *off becomes the offset inside it. */
static unsigned seek(const struct iov *iov, size_t *off)
{
	unsigned i = 0;

	while (i < iov->n && *off >= iov->v[i].iov_len)
		*off -= iov->v[i++].iov_len;
	return i;
}

struct iov iov_slice(const struct iov *src, size_t off, size_t len, struct iovec *store,
		     unsigned room)
{
	unsigned from, n = 0;
	size_t left = len;

	assert(off <= src->len && len <= src->len - off && room > 0);
	from = seek(src, &off);
	if (!len) {
		store[0] = (struct iovec){ NULL, 0 };
		return (struct iov){ store, 1, 0 };
	}
	while (left) {
		const struct iovec *v = &src->v[from + n];
		size_t part = MIN(v->iov_len - off, left);

		assert(n < room);
		store[n++] = (struct iovec){ (char *)v->iov_base + off, part };
		left -= part;
		off = 0;
	}
	return (struct iov){ store, n, len };
}

size_t iov_copy_out(const struct iov *src, size_t off, void *dst, size_t len)
{
	size_t done = 0;

	if (off >= src->len)
		return 0;
	len = MIN(len, src->len - off);
	for (unsigned i = seek(src, &off); done < len; i++) {
		size_t part = MIN(src->v[i].iov_len - off, len - done);

		memcpy((char *)dst + done, (const char *)src->v[i].iov_base + off, part);
		done += part;
		off = 0;
	}
	return done;
}

size_t iov_copy_in(const struct iov *dst, size_t off, const void *src, size_t len)
{
	size_t done = 0;

	if (off >= dst->len)
		return 0;
	len = MIN(len, dst->len - off);
	for (unsigned i = seek(dst, &off); done < len; i++) {
		size_t part = MIN(dst->v[i].iov_len - off, len - done);

		memcpy((char *)dst->v[i].iov_base + off, (const char *)src + done, part);
		done += part;
		off = 0;
	}
	return done;
}

void iov_zero(const struct iov *dst, size_t off, size_t len)
{
	size_t done = 0;

	assert(off <= dst->len && len <= dst->len - off);
	for (unsigned i = seek(dst, &off); done < len; i++) {
		size_t part = MIN(dst->v[i].iov_len - off, len - done);

		memset((char *)dst->v[i].iov_base + off, 0, part);
		done += part;
		off = 0;
	}
}

/*
 * After a first look at a few bytes (data mostly differs at once), each byte is compared with the one
 * PROBE places before it: memcmp is the fastest loop at hand and needs no alignment.
 */
static bool is_zero(const unsigned char *p, size_t len)
{
	enum { PROBE = 16 };
	size_t probe_len = MIN(len, (size_t)PROBE);

	for (size_t i = 0; i < probe_len; i++) {
		if (p[i])
			return false;
	}
	return len <= PROBE || memcmp(p, p + PROBE, len - PROBE) == 0;
}

bool iov_is_zero(const struct iov *src)
{
	for (unsigned i = 0; i < src->n; i++) {
		if (!is_zero(src->v[i].iov_base, src->v[i].iov_len))
			return false;
	}
	return true;
}
