/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Large pieces of memory, in huge pages where the kernel has them: a fault for 2 MiB instead of one for
 * each 4 KiB. What is used sparsely must not have them, and would on a kernel that gives them unasked.
 */
#ifndef NBDRS_HUGE_H
#define NBDRS_HUGE_H

#include <stddef.h>

enum { HUGE_PAGE = 2 << 20 };

/*
 * `len` bytes of zeroes at a multiple of HUGE_PAGE, which take memory when they are used, in small pages;
 * munmap() gives them back. NULL = no address space.
 */
void *huge_map(size_t len);
/* Whole huge pages in [p, p + len) of such a mapping come as such from now on. */
void huge_use(void *p, size_t len);

#endif
