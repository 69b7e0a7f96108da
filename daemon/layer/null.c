/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * null: reads as zeroes, forgets what is written. It costs nothing, so whatever is measured over it is the
 * cost of everything else.
 *
 * Promises: none about data, by design. Flush and FUA are answered at once. There is nothing to share, so
 * several connections and writers agree trivially.
 */
#include <errno.h>

#include "layer/layers.h"

struct null {
	uint64_t size;
};

static const struct opt options[] = {
	{ .name = "size",
	  .type = OPT_SIZE,
	  .field = offsetof(struct null, size),
	  .def = "1Gi",
	  .min = 512,
	  .max = UINT64_C(1) << 62,
	  .help = "size of the disk" },
	OPT_END,
};

/* Not const: so it lies in .bss, costs nothing in the binary, and all its pages are the one zero page. */
static uint8_t zeroes[1 << 20];

static CO_FN int null_open(struct layer *l, struct err *err)
{
	const struct null *n = l->self;

	l->size = n->size;
	l->caps = CAN_PARTIAL | CAN_TRIM | CAN_ZERO | CAN_FAST_ZERO | CAN_FUA | CAN_FLUSH |
		  CAN_MULTI | CAN_MAP | CAN_LEND;
	if (!l->want_ro)
		l->caps |= CAN_WRITE;
	return 0;
}

static CO_FN int null_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	iov_zero(iov, 0, iov->len);
	return 0;
}

static CO_FN int null_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	return 0;
}

static CO_FN int null_zero(struct chan *c, struct ext e, unsigned fl)
{
	return 0;
}

static CO_FN int null_flush(struct chan *c)
{
	return 0;
}

static CO_FN int null_map(struct chan *c, struct ext e, struct extmap *m)
{
	(void)extmap_add(m, e.len, EXTENT_HOLE | EXTENT_ZERO); /* the first one always has room */
	return 0;
}

static CO_FN int null_resize(struct chan *c, uint64_t size, enum resize_phase phase, struct err *err)
{
	if (phase == RESIZE_NOW)
		c->layer->size = size;
	return 0;
}

static int null_lend(struct chan *c, struct ext e, struct loan *loan)
{
	if (e.len > sizeof(zeroes))
		return -EAGAIN;
	*loan = (struct loan){ .base = zeroes };
	return 0;
}

const struct layer_ops null_layer = {
	.name = "null",
	.help = "reads as zeroes, forgets what is written; for measuring",
	.opts = options,
	.is_store = true,
	.self_size = sizeof(struct null),
	.open = null_open,
	.read = null_read,
	.write = null_write,
	.zero = null_zero,
	.trim = null_zero,
	.flush = null_flush,
	.map = null_map,
	.lend = null_lend,
	.resize = null_resize,
};
