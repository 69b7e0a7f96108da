/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The bytes of a file: pages by number, with holes.
 */
#include <string.h>

#include "sim_int.h"

/* Calls for each page that [off, off + len) touches: its number, where in it, how much. */
#define for_pages(off, len, n, in, part)                                 \
	for (uint64_t at_ = (off), end_ = (off) + (len), n, in, part;    \
	     at_ < end_ && (n = at_ / SIM_PAGE, in = at_ % SIM_PAGE,     \
			   part = MIN(SIM_PAGE - in, end_ - at_), true); \
	     at_ += part)

static uint8_t *page(const struct image *m, uint64_t n)
{
	return n < m->room ? m->pages[n] : NULL;
}

static uint8_t *page_made(struct image *m, uint64_t n)
{
	if (n >= m->room) {
		uint64_t room = MAX(UINT64_C(8), m->room);
		uint8_t **v;

		while (room <= n)
			room *= 2;
		v = arena_alloc(room * sizeof(*v));
		if (m->room > 0)
			memcpy(v, m->pages, m->room * sizeof(*v));
		arena_free(m->pages, m->room * sizeof(*v));
		m->pages = v;
		m->room = room;
	}
	if (m->pages[n] == NULL) {
		m->pages[n] = arena_alloc(SIM_PAGE);
		m->used++;
	}
	return m->pages[n];
}

static void page_drop(struct image *m, uint64_t n)
{
	if (page(m, n) == NULL)
		return;
	arena_free(m->pages[n], SIM_PAGE);
	m->pages[n] = NULL;
	m->used--;
}

void image_read(const struct image *m, uint64_t off, void *buf, uint64_t len)
{
	uint8_t *to = buf;

	for_pages(off, len, n, in, part)
	{
		const uint8_t *p = page(m, n);

		if (p != NULL)
			memcpy(to, p + in, part);
		else
			memset(to, 0, part);
		to += part;
	}
}

void image_write(struct image *m, uint64_t off, const void *buf, uint64_t len)
{
	const uint8_t *from = buf;

	for_pages(off, len, n, in, part)
	{
		memcpy(page_made(m, n) + in, from, part);
		from += part;
	}
}

void image_zero(struct image *m, uint64_t off, uint64_t len)
{
	len = off < m->room * SIM_PAGE ? MIN(len, m->room * SIM_PAGE - off) : 0;
	for_pages(off, len, n, in, part)
	{
		uint8_t *p = page(m, n);

		if (part == SIM_PAGE)
			page_drop(m, n);
		else if (p != NULL)
			memset(p + in, 0, part);
	}
}

void image_resize(struct image *m, uint64_t size)
{
	if (size < m->size)
		image_zero(m, size, align_up(m->size, SIM_PAGE) - size);
	m->size = size;
}

uint64_t image_missing(const struct image *m, uint64_t off, uint64_t len)
{
	uint64_t missing = 0;

	for_pages(off, len, n, in, part)
	{
		missing += page(m, n) == NULL;
	}
	return missing;
}

void image_reserve(struct image *m, uint64_t off, uint64_t len)
{
	for_pages(off, len, n, in, part)
	{
		(void)page_made(m, n);
	}
}

void image_copy(struct image *to, const struct image *from)
{
	image_free(to);
	for (uint64_t n = 0; n < from->room; n++)
		if (from->pages[n] != NULL)
			memcpy(page_made(to, n), from->pages[n], SIM_PAGE);
	to->size = from->size;
}

void image_free(struct image *m)
{
	for (uint64_t n = 0; n < m->room; n++)
		page_drop(m, n);
	arena_free(m->pages, m->room * sizeof(*m->pages));
	*m = (struct image){ 0 };
}
