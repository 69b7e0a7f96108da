/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * See huge.h.
 */
#include "nbdrs/huge.h"

#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"

void *huge_map(size_t len)
{
	uint8_t *p = mmap(NULL, len + HUGE_PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	const size_t end = align_up(len, (uint64_t)sysconf(_SC_PAGESIZE));
	const size_t before = (size_t)(-(uintptr_t)p & (HUGE_PAGE - 1));

	if (p == MAP_FAILED)
		return NULL;
	/* Unmapping the ends of a mapping can't fail. */
	if (before)
		(void)munmap(p, before);
	if (end < len + HUGE_PAGE - before)
		(void)munmap(p + before + end, len + HUGE_PAGE - before - end);
	(void)madvise(p + before, len,
		      MADV_NOHUGEPAGE); /* a kernel without them has none to give */
	return p + before;
}

void huge_use(void *p, size_t len)
{
	(void)madvise(p, len, MADV_HUGEPAGE); /* small ones do, too */
}
