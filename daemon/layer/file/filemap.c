/* SPDX-License-Identifier: GPL-3.0-or-later */
#include "layer/file/filemap.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/list.h"
#include "nbdrs/reactor.h"

/*
 * GROUP pages are asked about together: what the kernel maps around a fault. A small read is lent only
 * from a group that was read TOUCHES times before: mincore and the fault cost more than a copy, and pay only when
 * it is read again and again.
 */
enum {
	PAGE = 4096,
	GROUP = 16,
	WINDOW_PAGES = (int)(FILEMAP_WINDOW / PAGE),
	SMALL_PAGES = 16, /* reads of fewer pages are small */
	TOUCHES = 4,
};

/* How long mincore's word is believed: a syscall saved for each read of a hot page. */
#define TRUST_NS UINT64_C(1000000000)

struct window {
	struct list node; /* in use order, longest unused first */
	uint64_t index;
	char *base;
	size_t len;
	unsigned lent;
	uint64_t seen_since;	    /* ns; older bits are forgotten */
	uint64_t seen[WINDOW_PAGES / 64];      /* pages known to have been in memory */
	uint8_t touched[WINDOW_PAGES / GROUP]; /* small reads of each group, up to TOUCHES */
};

struct filemap {
	int fd;
	uint64_t size;
	struct list windows;
	unsigned windows_n;
	uint64_t table_n;
	struct window **table; /* by off / FILEMAP_WINDOW */
};

static uint64_t windows_of(uint64_t size)
{
	return (size + FILEMAP_WINDOW - 1) / FILEMAP_WINDOW;
}

struct filemap *filemap_new(int fd, uint64_t size)
{
	struct filemap *m = calloc(1, sizeof(*m));

	if (m == NULL)
		return NULL;
	m->fd = fd;
	m->size = size;
	m->table_n = windows_of(size);
	m->table = calloc(m->table_n + 1, sizeof(struct window *));
	list_init(&m->windows);
	if (m->table == NULL) {
		free(m);
		return NULL;
	}
	return m;
}

static void window_free(struct filemap *m, struct window *w)
{
	list_del(&w->node);
	m->windows_n--;
	m->table[w->index] = NULL;
	(void)munmap(w->base, w->len);
	free(w);
}

void filemap_free(struct filemap *m)
{
	if (m == NULL)
		return;
	list_for_each(w, &m->windows, struct window, node)
		window_free(m, w);
	free(m->table);
	free(m);
}

/*
 * The file has grown. False: not yet (no memory, or somebody still has a part of the last window, which is too short).
 * A file that has become smaller needs nothing: what is behind its end is an EFAULT of whoever sends it.
 */
static bool grow(struct filemap *m, uint64_t size)
{
	const uint64_t n = windows_of(size);
	struct window *last = m->table_n ? m->table[m->table_n - 1] : NULL;
	struct window **table;

	if (last != NULL && last->lent > 0)
		return false;
	if (last != NULL)
		window_free(m, last);
	table = realloc(m->table, (n + 1) * sizeof(struct window *));
	if (table == NULL)
		return false;
	memset(table + m->table_n, 0, (n + 1 - m->table_n) * sizeof(struct window *));
	m->table = table;
	m->table_n = n;
	m->size = size;
	return true;
}

static int make_room(struct filemap *m)
{
	if (m->windows_n < FILEMAP_WINDOWS)
		return 0;
	list_for_each(w, &m->windows, struct window, node) {
		if (w->lent == 0) {
			window_free(m, w);
			return 0;
		}
	}
	return -EAGAIN;
}

static int window_new(struct filemap *m, uint64_t index, struct window **out)
{
	uint64_t start = index * FILEMAP_WINDOW;
	struct window *w;
	void *base;
	int rc = make_room(m);

	if (rc != 0)
		return rc;
	w = calloc(1, sizeof(*w));
	if (w == NULL)
		return -ENOMEM;
	w->index = index;
	w->len = MIN(FILEMAP_WINDOW, m->size - start);
	base = mmap(NULL, w->len, PROT_READ, MAP_SHARED, m->fd, (off_t)start);
	if (base == MAP_FAILED) {
		free(w);
		return -ENOMEM;
	}
	(void)munlock(base, w->len); /* undoes MCL_FUTURE; fails only where nothing was locked */
	w->base = base;
	list_add(&m->windows, &w->node);
	m->windows_n++;
	m->table[index] = w;
	*out = w;
	return 0;
}

static bool test_bit(const uint64_t *bits, uint64_t i)
{
	return bits[i / 64] & (UINT64_C(1) << (i % 64));
}

static void set_bit(uint64_t *bits, uint64_t i)
{
	bits[i / 64] |= UINT64_C(1) << (i % 64);
}

static bool all_seen(const struct window *w, uint64_t first, uint64_t last)
{
	for (uint64_t p = first; p <= last; p++)
		if (!test_bit(w->seen, p))
			return false;
	return true;
}

static bool is_worth_mapping(struct window *w, uint64_t first, uint64_t last)
{
	uint8_t *touched = &w->touched[first / GROUP];

	if (last - first + 1 >= SMALL_PAGES || *touched >= TOUCHES)
		return true;
	(*touched)++;
	return false;
}

/* Are the pages first..last of the window in memory, and worth mapping? */
static bool is_resident(struct window *w, uint64_t first, uint64_t last)
{
	unsigned char vec[FILEMAP_LEND_MAX / PAGE + 2 * GROUP];
	uint64_t from = align_down(first, GROUP);
	uint64_t to = MIN(align_up(last + 1, GROUP), (w->len + PAGE - 1) / PAGE);

	if (reactor_now() - w->seen_since > TRUST_NS) {
		memset(w->seen, 0, sizeof(w->seen));
		w->seen_since = reactor_now();
	} else if (all_seen(w, first, last)) {
		return true;
	}
	if (!is_worth_mapping(w, first, last) || mincore(w->base + from * PAGE, (to - from) * PAGE, vec) != 0)
		return false;
	for (uint64_t p = from; p < to; p++)
		if (vec[p - from] & 1)
			set_bit(w->seen, p);
	return all_seen(w, first, last);
}

static void give_back(struct loan *loan)
{
	struct window *w = loan->owner;

	w->lent--;
}

int filemap_lend(struct filemap *m, uint64_t size, uint64_t off, uint64_t len, struct loan *loan)
{
	uint64_t index = off / FILEMAP_WINDOW;
	uint64_t at = off % FILEMAP_WINDOW;
	struct window *w;
	int rc;

	if (len == 0 || len > FILEMAP_LEND_MAX || at + len > FILEMAP_WINDOW)
		return -ENOTSUP;
	if (unlikely(off + len > m->size) && !grow(m, size))
		return -EAGAIN;
	w = m->table[index];
	if (w == NULL) {
		rc = window_new(m, index, &w);
		if (rc != 0)
			return rc;
	}
	if (!is_resident(w, at / PAGE, (at + len - 1) / PAGE))
		return -EAGAIN;
	if (m->windows_n == FILEMAP_WINDOWS) { /* the order matters only when one must go */
		list_del(&w->node);
		list_add(&m->windows, &w->node);
	}
	w->lent++;
	*loan = (struct loan){ .base = w->base + at, .give_back = give_back, .owner = w };
	return 0;
}
