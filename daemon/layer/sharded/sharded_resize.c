/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * A volume of layer `sharded` gets another size while it is served. The order is that of sharded_make.c: `size` is
 * written last when it grows and first when it shrinks, so that nothing of an earlier, larger disk can ever be read,
 * wherever it is cut off.
 *
 *	before	grow: what lies behind the end, of a shrink that was cut off, is deleted: nobody reads there
 *	now	everything unsaved is saved; grow: what the last shard holds behind the end is zeroed; `size` is
 *		written; the map of known shards gets its new length
 *	after	shrink: the shards behind the new end are deleted
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "layer/sharded/sharded_int.h"
#include "nbdrs/cleanup.h"

static CO_FN int before(struct chan *c, uint64_t size, struct err *err)
{
	struct layer *l = c->layer;
	struct sharded *s = l->self;
	int rc = sharded_check_size(l, size, UINT64_C(1) << s->shift, err);

	if (rc || size < l->size)
		return rc;
	return sharded_delete_from(l, c->kids[0], s->known.n, err);
}

/* The map for `n` shards; those that are new do not exist. */
static _Atomic uint64_t *longer_map(const struct shardmap *m, uint64_t n)
{
	_Atomic uint64_t *words = calloc(bits_words(n), sizeof(*words));

	for (uint64_t i = 0; words && i < MIN(bits_words(n), bits_words(m->n)); i++)
		words[i] = m->words[i];
	/* Shards behind the end of a shorter disk, in its last word. */
	for (uint64_t i = n; words && i < MIN(m->n, bits_words(n) * BITS_WORD); i++)
		words[i / BITS_WORD] &= ~(UINT64_C(1) << (i % BITS_WORD));
	return words;
}

static CO_FN int now(struct chan *c, uint64_t size, struct err *err)
{
	struct layer *l = c->layer;
	struct sharded *s = l->self;
	const uint64_t n = shards_of(size, UINT64_C(1) << s->shift);
	_Atomic uint64_t *words = longer_map(&s->known, n);
	int rc = words ? 0 : -ENOMEM;

	if (!rc && s->buf)
		rc = shardbuf_reserve(s->buf, n);
	if (rc)
		(void)err_set(err, rc, "out of memory");
	if (!rc) {
		rc = l->ops->flush(c);
		if (rc)
			(void)err_set(err, rc, "layer sharded: what is not saved yet cannot be saved: %s",
				      err_name(rc));
	}
	if (!rc && size > l->size)
		rc = sharded_zero_tail(l, c->kids[0], l->size, UINT64_C(1) << s->shift, err);
	if (!rc)
		rc = sharded_write_number(l, c->kids[0], SIZE_NAME, size, PUT_ALWAYS, err);
	if (rc) {
		free(words);
		return rc;
	}
	free(s->known.words);
	s->known = (struct shardmap){ words, n };
	if (s->buf)
		shardbuf_set_size(s->buf, size);
	l->size = size;
	return 0;
}

int sharded_resize(struct chan *c, uint64_t size, enum resize_phase phase, struct err *err)
{
	const struct sharded *s = c->layer->self;

	switch (phase) {
	case RESIZE_BEFORE: return before(c, size, err);
	case RESIZE_NOW: return now(c, size, err);
	default: return sharded_delete_from(c->layer, c->kids[0], s->known.n, err);
	}
}
