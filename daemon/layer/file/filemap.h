/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * A file's page cache, lent to the kernel's send path through mappings instead of being copied by pread.
 *
 * Hazards, and what is done about each:
 *	- a page that is not in memory would make sendmsg wait for the disk: mincore first, -EAGAIN then;
 *	- what was in memory may be evicted before it is sent: costs one wait, is rare, accepted;
 *	- a file truncated by somebody else: sendmsg says EFAULT (the caller closes the connection); the process
 *	  itself never touches a mapping, so there is no SIGBUS;
 *	- page tables of terabytes: windows of FILEMAP_WINDOW bytes, at most FILEMAP_WINDOWS of them, the
 *	  longest unused one goes (at most 32 MiB of page tables a reactor);
 *	- mlockall of the process would pin the page cache: mappings are unlocked at once.
 */
#ifndef NBDRS_FILEMAP_H
#define NBDRS_FILEMAP_H

#include <stdint.h>

#include "nbdrs/layer.h"

#define FILEMAP_WINDOW (UINT64_C(256) << 20)
enum { FILEMAP_WINDOWS = 64, FILEMAP_LEND_MAX = 4 << 20 };

struct filemap;

/* For one reactor. `fd` is borrowed; `size` in bytes. NULL when out of memory. */
struct filemap *filemap_new(int fd, uint64_t size);
/* Nothing may be lent. NULL is fine. */
void filemap_free(struct filemap *m);

/*
 * Lends [off, off + len) of a file that has `size` bytes by now. -EAGAIN: not all in memory, or too many windows in
 * use; -ENOTSUP: longer than FILEMAP_LEND_MAX or across windows; -ENOMEM: no address space. Never suspends.
 */
int filemap_lend(struct filemap *m, uint64_t size, uint64_t off, uint64_t len, struct loan *loan);

#endif
