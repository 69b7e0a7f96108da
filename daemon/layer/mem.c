/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * mem: a sparse disk in memory.
 *
 * The whole disk is one private anonymous mapping, reserved but not populated: the kernel finds pages on
 * the first write, gives zeroes for the rest, and takes pages back by madvise(MADV_DONTNEED). The offset is
 * the address, so reads and writes are copies without locks and reads can be lent at any length. A bitmap
 * beside it, one bit per page, knows what is allocated, for map and to skip holes in zero and trim.
 *
 * Invariant: a page whose bit is clear reads as zeroes, for everybody whose requests are ordered by their
 * answers. It holds because
 *	a write copies first and then sets the bits (allocate),
 *	a zero clears the bits first and then drops the pages (release):
 * whichever of two overlapping requests comes first, no data can stay behind a clear bit. Neither reads nor
 * lent memory look at the bits.
 *
 * Promises. Volatile: everything is gone when the daemon ends, in whichever way. Until then an answered
 * write is as stable as it will ever be, so flush and FUA have nothing to wait for; they are offered all
 * the same, so that clients and tests do over mem what they do over a disk. Trim and zero (with IO_PUNCH)
 * give whole pages back, and read as zeroes. Several connections and writers see each other's answered
 * writes at once; requests that overlap in time may mix, byte by byte, as NBD allows.
 *
 * Memory: at most the size, plus 1/32768 for the bitmap. When the machine has none left the kernel kills a
 * process; it can't be answered as ENOSPC.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "layer/layers.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* Linux 5.18 */
#endif

enum { WORD_BITS = 64 };
/* So many times its size it can grow, at least to 1 GiB: addresses cost next to nothing. */
enum { ROOM_FACTOR = 16 };
#define ROOM_MIN (UINT64_C(1) << 30)

/* Copied or dropped at a stretch before others have their turn. */
enum { TURN_LEN = 256 * 1024 };

struct mem {
	uint64_t size;  /* option */
	unsigned shift; /* log2 of the page size */
	uint8_t *base;  /* room bytes, of which map_len may be touched */
	size_t map_len; /* the largest size so far, rounded up to pages */
	size_t room;    /* addresses taken: the disk can grow into them, and nothing ever moves */
	_Atomic uint64_t *bits;
};

static const struct opt options[] = {
	{ .name = "size",
	  .type = OPT_SIZE,
	  .field = offsetof(struct mem, size),
	  .min = 512,
	  .max = UINT64_C(16) << 40,
	  .help = "size of the disk; memory is used as it is written" },
	OPT_END,
};

/*
 * Requests that overlap in time race for their bytes; the protocol leaves the outcome open. Everything else
 * here is for ThreadSanitizer to check, so only these copies are hidden from it.
 */
#ifdef __SANITIZE_THREAD__
#define HAVE_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define HAVE_TSAN 1
#endif
#endif
#ifdef HAVE_TSAN
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateIgnoreWritesBegin(const char *file, int line);
void AnnotateIgnoreWritesEnd(const char *file, int line);

static void race_begin(void)
{
	AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
	AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}

static void race_end(void)
{
	AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
	AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
#else
static void race_begin(void)
{
}

static void race_end(void)
{
}
#endif

/* --- Opening ---------------------------------------------------------------------------------- */

/* Addresses for `room` bytes; the first `len` of them are memory. */
static void *reserve(size_t len, size_t room)
{
	void *p = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int why;

	if (p == MAP_FAILED)
		return NULL;
	if (mprotect(p, len, PROT_READ | PROT_WRITE)) {
		why = errno;
		(void)munmap(p, room); /* ours, so it can't fail */
		errno = why;
		return NULL;
	}
	(void)madvise(p, room, MADV_DONTDUMP); /* only to keep core files small */
	return p;
}

static size_t bits_len(const struct mem *m, uint64_t bytes)
{
	return align_up(bytes >> m->shift, WORD_BITS) / 8;
}

/* Both mappings, with room to grow if there is any. */
static bool reserve_both(struct mem *m, uint64_t room)
{
	m->room = room;
	m->base = reserve(m->map_len, room);
	m->bits = m->base ? reserve(bits_len(m, room), bits_len(m, room)) : NULL;
	if (m->bits)
		return true;
	if (m->base)
		(void)munmap(m->base, room); /* as above */
	m->base = NULL;
	return false;
}

static CO_FN void mem_close(struct layer *l)
{
	struct mem *m = l->self;

	if (m->base)
		(void)munmap(m->base, m->room); /* can't fail for a mapping of ours */
	if (m->bits)
		(void)munmap(m->bits, bits_len(m, m->room));
	m->base = NULL;
	m->bits = NULL;
}

static CO_FN int mem_open(struct layer *l, struct err *err)
{
	struct mem *m = l->self;
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), room;
	char size[32];

	if (!m->size)
		return err_set(err, -EINVAL, "layer mem needs its size: mem[size=1Gi]");
	m->shift = (unsigned)__builtin_ctzll(page);
	m->map_len = align_up(m->size, page);
	room = MAX(MIN(m->map_len * ROOM_FACTOR, options[0].max), MAX(m->map_len, ROOM_MIN));
	if (!reserve_both(m, room) && !reserve_both(m, m->map_len)) {
		int rc = -errno;

		mem_close(l);
		format_size(m->size, size, sizeof(size));
		return err_set(err, rc,
			       "layer mem: no room for %s (%s): a smaller size, or look at "
			       "vm.overcommit_memory, ulimit -v and ulimit -l",
			       size, err_name(rc));
	}
	l->size = m->size;
	l->caps = CAN_PARTIAL | CAN_TRIM | CAN_ZERO | CAN_FAST_ZERO | CAN_FUA | CAN_FLUSH |
		  CAN_MULTI | CAN_MAP | CAN_LEND;
	if (!l->want_ro)
		l->caps |= CAN_WRITE;
	return 0;
}

/* --- Pages ------------------------------------------------------------------------------------ */

/* Bits [from, to) of one word, both relative to it; to > from. */
static uint64_t word_mask(unsigned from, unsigned to)
{
	return (to == WORD_BITS ? 0 : UINT64_C(1) << to) - (UINT64_C(1) << from);
}

/* The bits of [page, end) that lie in page's word; *next becomes the first page behind them. */
static uint64_t span(uint64_t page, uint64_t end, uint64_t *next)
{
	uint64_t first = align_down(page, WORD_BITS);

	*next = MIN(first + WORD_BITS, end);
	return word_mask((unsigned)(page - first), (unsigned)(*next - first));
}

/* After a copy to [off, off + len), len > 0: its pages hold data. */
static void allocate(struct mem *m, uint64_t off, uint64_t len)
{
	uint64_t end = ((off + len - 1) >> m->shift) + 1, next;

	/*
	 * The copy must be visible before a set bit is found below, or else a zero could clear the bit and
	 * drop the page in between, and the copy fall on the new page. Pairs with release().
	 */
	atomic_thread_fence(memory_order_seq_cst);
	for (uint64_t page = off >> m->shift; page < end; page = next) {
		_Atomic uint64_t *word = &m->bits[page / WORD_BITS];
		uint64_t mask = span(page, end, &next);

		if ((atomic_load_explicit(word, memory_order_relaxed) & mask) != mask)
			atomic_fetch_or(word, mask);
	}
}

/* Gives [base + off, + len) back; reads as zeroes then. Whole pages. */
static void drop(struct mem *m, uint64_t off, uint64_t len)
{
	/* Plain MADV_DONTNEED refuses locked memory, and the daemon locks its own where it may. */
	if (madvise(m->base + off, len, MADV_DONTNEED_LOCKED) == 0 ||
	    madvise(m->base + off, len, MADV_DONTNEED) == 0)
		return;
	/* Locked, and a kernel older than 5.18: keep the pages, zeroed. */
	race_begin();
	memset(m->base + off, 0, len);
	race_end();
}

/* Clears and drops the pages [page, end). */
static CO_FN void release(struct mem *m, uint64_t page, uint64_t end)
{
	uint64_t next, dropped = 0;

	for (; page < end; page = next) {
		_Atomic uint64_t *word = &m->bits[page / WORD_BITS];
		uint64_t first = align_down(page, WORD_BITS);
		uint64_t mask = span(page, end, &next);
		unsigned low, high;

		if (!(atomic_load_explicit(word, memory_order_relaxed) & mask))
			continue;
		mask &= atomic_fetch_and(word, ~mask);
		if (!mask)
			continue;
		/* From the lowest to the highest at once: what lies between is clear, so zero already. */
		low = (unsigned)__builtin_ctzll(mask);
		high = WORD_BITS - (unsigned)__builtin_clzll(mask);
		drop(m, (first + low) << m->shift, (uint64_t)(high - low) << m->shift);
		dropped += (uint64_t)(high - low) << m->shift;
		if (dropped >= TURN_LEN) {
			co_yield();
			dropped = 0;
		}
	}
}

static bool is_allocated(const struct mem *m, uint64_t page)
{
	return atomic_load(&m->bits[page / WORD_BITS]) >> (page % WORD_BITS) & 1;
}

/* The first page of [page, end) that is not allocated (is_data) or is (otherwise); end if none. */
static uint64_t run_end(const struct mem *m, uint64_t page, uint64_t end, bool is_data)
{
	uint64_t same = is_data ? 0 : UINT64_MAX, next;

	for (; page < end; page = next) {
		uint64_t mask = span(page, end, &next);
		uint64_t differ = ~(atomic_load(&m->bits[page / WORD_BITS]) ^ same) & mask;

		if (differ)
			return align_down(page, WORD_BITS) + (unsigned)__builtin_ctzll(differ);
	}
	return end;
}

/* --- Requests --------------------------------------------------------------------------------- */

static CO_FN int mem_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	const struct mem *m = c->layer->self;

	for (uint64_t done = 0; done < e.len; done += TURN_LEN) {
		if (done)
			co_yield();
		race_begin();
		(void)iov_copy_in(iov, done, m->base + e.off + done,
				  MIN(e.len - done, (uint64_t)TURN_LEN));
		race_end();
	}
	return 0;
}

static CO_FN int mem_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	struct mem *m = c->layer->self;

	for (uint64_t done = 0; done < e.len; done += TURN_LEN) {
		uint64_t len = MIN(e.len - done, (uint64_t)TURN_LEN);

		if (done)
			co_yield();
		race_begin();
		(void)iov_copy_out(iov, done, m->base + e.off + done, len);
		race_end();
		allocate(m, e.off + done, len);
	}
	return 0;
}

/* Zeroes that keep (or get) their memory. */
static CO_FN void fill_zero(struct mem *m, uint64_t off, uint64_t len)
{
	for (uint64_t done = 0; done < len; done += TURN_LEN) {
		uint64_t n = MIN(len - done, (uint64_t)TURN_LEN);

		if (done)
			co_yield();
		race_begin();
		memset(m->base + off + done, 0, n);
		race_end();
		allocate(m, off + done, n);
	}
}

/* Part of one page; nothing to do in a hole. */
static CO_FN void zero_edge(struct mem *m, uint64_t off, uint64_t end)
{
	if (off < end && is_allocated(m, off >> m->shift))
		fill_zero(m, off, end - off);
}

static CO_FN int mem_zero(struct chan *c, struct ext e, unsigned fl)
{
	struct mem *m = c->layer->self;
	uint64_t page = UINT64_C(1) << m->shift;
	uint64_t end = e.off + e.len;
	uint64_t from = align_up(e.off, page);
	/* What lies behind the end of the disk in its last page is nobody's. */
	uint64_t to = end == m->size ? align_up(end, page) : align_down(end, page);

	if (!(fl & IO_PUNCH)) {
		if (fl & IO_FAST)
			return -ENOTSUP; /* as slow as writing */
		fill_zero(m, e.off, e.len);
		return 0;
	}
	if (from >= to) { /* less than a page, or parts of two */
		zero_edge(m, e.off, MIN(from, end));
		zero_edge(m, MIN(from, end), end);
		return 0;
	}
	zero_edge(m, e.off, from);
	release(m, from >> m->shift, to >> m->shift);
	zero_edge(m, to, end);
	return 0;
}

static CO_FN int mem_trim(struct chan *c, struct ext e, unsigned fl)
{
	return mem_zero(c, e, fl | IO_PUNCH);
}

static CO_FN int mem_flush(struct chan *c)
{
	return 0;
}

/* Nothing moves, so who holds a loan is not disturbed. What lies behind the end is always zero. */
static CO_FN int mem_resize(struct chan *c, uint64_t size, enum resize_phase phase, struct err *err)
{
	struct mem *m = c->layer->self;
	const uint64_t page = UINT64_C(1) << m->shift;
	char text[32];

	format_size(m->room, text, sizeof(text));
	if (phase == RESIZE_BEFORE && size > m->room)
		return err_set(err, -EFBIG, "layer mem: it can grow to %s, not further", text);
	if (phase != RESIZE_NOW)
		return 0;
	if (size < m->size) {
		zero_edge(m, size, MIN(align_up(size, page), m->size));
		release(m, align_up(size, page) >> m->shift, m->map_len >> m->shift);
	} else if (mprotect(m->base, align_up(size, page), PROT_READ | PROT_WRITE)) {
		return err_set(err, -errno, "layer mem: no memory for that size: %s", err_name(errno));
	}
	/* Once it was given out it stays readable: a late loan may still be on its way to a socket. */
	m->map_len = MAX(m->map_len, align_up(size, page));
	m->size = size;
	c->layer->size = size;
	return 0;
}

static CO_FN int mem_map(struct chan *c, struct ext e, struct extmap *map)
{
	const struct mem *m = c->layer->self;
	uint64_t at = e.off, end = e.off + e.len;
	uint64_t end_page = ((end - 1) >> m->shift) + 1;

	while (at < end) {
		uint64_t page = at >> m->shift;
		bool is_data = is_allocated(m, page);
		/* The first page by the first look: its bit may have changed since. */
		uint64_t next = MIN(run_end(m, page + 1, end_page, is_data) << m->shift, end);

		if (!extmap_add(map, next - at, is_data ? 0 : EXTENT_HOLE | EXTENT_ZERO))
			break;
		at = next;
	}
	return 0;
}

/* The mapping stays until close, and nothing is in flight then: nothing to give back. */
static int mem_lend(struct chan *c, struct ext e, struct loan *loan)
{
	const struct mem *m = c->layer->self;

	*loan = (struct loan){ .base = m->base + e.off };
	return 0;
}

const struct layer_ops mem_layer = {
	.name = "mem",
	.help = "a sparse disk in memory, gone when the daemon ends",
	.opts = options,
	.is_store = true,
	.keyed = &mem_store_layer,
	.self_size = sizeof(struct mem),
	.open = mem_open,
	.close = mem_close,
	.read = mem_read,
	.write = mem_write,
	.zero = mem_zero,
	.trim = mem_trim,
	.flush = mem_flush,
	.map = mem_map,
	.lend = mem_lend,
	.resize = mem_resize,
};
