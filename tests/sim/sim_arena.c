/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * One mapping, made before the first fork: children see it at the same address, so pointers in it stay
 * good from life to life. Pieces are powers of two; what is freed goes to a list of its size.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "sim_int.h"

#define ARENA_LEN ((size_t)1 << 30)
enum { SHIFT_MIN = 5, SHIFT_MAX = 30 };

static struct arena {
	size_t used;
	void *free[SHIFT_MAX + 1]; /* by size; each begins with a pointer to the next */
} * arena;

int arena_init(void)
{
	void *map = mmap(NULL, ARENA_LEN, PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (map == MAP_FAILED)
		return -errno;
	arena = map;
	arena_reset();
	return 0;
}

void arena_reset(void)
{
	memset(arena, 0, sizeof(*arena));
	arena->used = align_up(sizeof(*arena), 64);
}

static unsigned shift_of(size_t len)
{
	unsigned shift = SHIFT_MIN;

	while (((size_t)1 << shift) < len)
		shift++;
	return shift;
}

void *arena_alloc(size_t len)
{
	unsigned shift = shift_of(len);
	void *p = shift <= SHIFT_MAX ? arena->free[shift] : NULL;

	if (p != NULL) {
		memcpy(&arena->free[shift], p, sizeof(void *));
	} else {
		if (len > ARENA_LEN || arena->used + ((size_t)1 << shift) > ARENA_LEN) {
			fprintf(stderr, "sim: the disk and the models need more than %zu MiB\n",
				ARENA_LEN >> 20);
			abort();
		}
		p = (char *)arena + arena->used;
		arena->used += (size_t)1 << shift;
	}
	memset(p, 0, len);
	return p;
}

void arena_free(void *p, size_t len)
{
	unsigned shift = shift_of(len);

	if (p == NULL)
		return;
	memcpy(p, &arena->free[shift], sizeof(void *));
	arena->free[shift] = p;
}
