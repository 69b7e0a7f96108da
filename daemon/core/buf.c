/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Buffer pools, see buf.h. A free buffer's first word links to the next one of its class.
 */
#include "nbdrs/buf.h"

#include <assert.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "core/reactor_int.h"
#include "nbdrs/huge.h"

enum {
	MAP_FROM = 256 * 1024,	       /* this size and more: own mapping, so that freeing it returns it */
	CACHED_MAX = 32 * 1024 * 1024, /* bytes a reactor keeps for reuse */
};

static unsigned class_of(size_t len)
{
	assert(len <= BUF_MAX);
	if (len <= BUF_MIN)
		return 0;
	return (unsigned)(64 - __builtin_clzll(len - 1) - 12);
}

size_t buf_size(size_t len)
{
	return (size_t)BUF_MIN << class_of(len);
}

static void *from_kernel(size_t size)
{
	void *p;

	if (size < MAP_FROM)
		return aligned_alloc(BUF_ALIGN, size);
	if (size >= HUGE_PAGE) {
		p = huge_map(size);
		if (p != NULL)
			huge_use(p, size);
		return p;
	}
	p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

static void to_kernel(void *p, size_t size)
{
	if (size < MAP_FROM)
		free(p);
	else
		(void)munmap(p, size);
}

void *buf_get(size_t len)
{
	struct buf_pool *pool = &reactor_self()->buf;
	unsigned c = class_of(len);
	void *p = pool->free[c];

	if (p == NULL)
		return from_kernel((size_t)BUF_MIN << c);
	pool->free[c] = *(void **)p;
	pool->cached -= (size_t)BUF_MIN << c;
	return p;
}

void buf_put(void *buf, size_t len)
{
	struct buf_pool *pool = &reactor_self()->buf;
	unsigned c;

	if (buf == NULL)
		return;
	c = class_of(len);
	if (pool->cached + ((size_t)BUF_MIN << c) > CACHED_MAX) {
		to_kernel(buf, (size_t)BUF_MIN << c);
		return;
	}
	*(void **)buf = pool->free[c];
	pool->free[c] = buf;
	pool->cached += (size_t)BUF_MIN << c;
}

void buf_pool_free(struct buf_pool *pool)
{
	for (unsigned c = 0; c < BUF_CLASSES; c++) {
		while (pool->free[c] != NULL) {
			void *p = pool->free[c];

			pool->free[c] = *(void **)p;
			to_kernel(p, (size_t)BUF_MIN << c);
		}
	}
	pool->cached = 0;
}
