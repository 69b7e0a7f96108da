/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Scope-bound cleanup and small helpers that every file needs.
 */
#ifndef NBDRS_CLEANUP_H
#define NBDRS_CLEANUP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#define _cleanup_(fn) __attribute__((cleanup(fn)))

/* Frees what a `_cleanup_free_` pointer variable holds; NULL is fine. */
static inline void cleanup_freep(void *p)
{
	free(*(void **)p);
}

/* Closes what a `_cleanup_close_` int variable holds; negative = nothing. */
static inline void cleanup_closep(const int *fd)
{
	if (*fd >= 0)
		(void)close(*fd); /* nothing to be done about an error here */
}

#define _cleanup_free_ _cleanup_(cleanup_freep)
#define _cleanup_close_ _cleanup_(cleanup_closep)

/* Hands the value on and leaves NULL (or -1) behind, so that the scope's cleanup does nothing. */
#define TAKE_PTR(p)                                                                                \
	({                                                                                         \
		__auto_type taken_ = (p);                                                          \
		(p) = NULL;                                                                        \
		taken_;                                                                            \
	})
#define TAKE_FD(fd)                                                                                \
	({                                                                                         \
		int taken_ = (fd);                                                                 \
		(fd) = -1;                                                                         \
		taken_;                                                                            \
	})

#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define container_of(ptr, type, member) ((type *)(void *)((char *)(ptr)-offsetof(type, member)))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* Rounds down / up to a power-of-two `to`. align_up may wrap: check the result on outside input. */
static inline uint64_t align_down(uint64_t v, uint64_t to)
{
	return v & ~(to - 1);
}

static inline uint64_t align_up(uint64_t v, uint64_t to)
{
	return (v + to - 1) & ~(to - 1);
}

#endif
