/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Chains: built from a spec (no I/O), opened kids first, with a tree of channels per reactor that is opened
 * when that reactor first needs it.
 *
 *	built -> open -> closed (may be freed)
 */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nbdrs/buf.h"
#include "nbdrs/layer.h"
#include "nbdrs/log.h"
#include "nbdrs/reactor.h"

struct chain {
	struct layer *top;
	bool is_open;
	struct co_mutex opening;	      /* one at a time opens channels or closes */
	_Atomic(struct chan *) chans[REACTOR_MAX]; /* by reactor; set once while open */
};

/* ---- building ---- */

static void layer_free(struct layer *l)
{
	if (l == NULL)
		return;
	for (unsigned i = 0; i < l->kids_n; i++)
		layer_free(l->kids[i]);
	if (l->self != NULL) {
		if (l->ops->free != NULL)
			l->ops->free(l);
		opts_free(l->ops->opts, l->self);
	}
	rangelock_destroy(&l->rmw);
	free(l->kids);
	free(l->self);
	free(l);
}

static int check_shape(const struct layer_ops *ops, const struct spec *spec, struct err *err)
{
	if (ops->takes_target && spec->target == NULL)
		return err_set(err, -EINVAL, "column %u: layer %s needs a target, as in %s:/path", spec->column,
			       ops->name, ops->name);
	if (!ops->takes_target && spec->target != NULL)
		return err_set(err, -EINVAL, "column %u: layer %s takes no target", spec->column, ops->name);
	if (ops->is_store && spec->kids_n > 0)
		return err_set(err, -EINVAL, "column %u: %s is a store and ends a chain; nothing can follow it",
			       spec->column, ops->name);
	if (spec->kids_n < ops->min_kids)
		return err_set(err, -EINVAL, "column %u: layer %s needs a layer below it, as in %s:file:/path",
			       spec->column, ops->name, ops->name);
	if (spec->kids_n > ops->max_kids)
		return err_set(err, -EINVAL, "column %u: layer %s takes at most %u below it, not %u",
			       spec->column, ops->name, ops->max_kids, spec->kids_n);
	return 0;
}

/* What goes down the tree while it is built. */
struct build {
	const char *export_name;
	bool read_only, is_keyed;
};

static int layer_new(const struct spec *spec, struct build b, struct layer **out, struct err *err);

static int add_kids(struct layer *l, struct err *err)
{
	l->kids = calloc(l->spec->kids_n + 1U, sizeof(struct layer *));
	if (l->kids == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	for (unsigned i = 0; i < l->spec->kids_n; i++) {
		struct build b = { l->export_name, l->want_ro, l->ops->keyed_kids || l->is_keyed };
		int rc = layer_new(l->spec->kids[i], b, &l->kids[i], err);

		if (rc != 0)
			return rc;
		l->kids_n++;
	}
	return 0;
}

/* Below a mapping only what holds objects can stand. */
static int choose_keyed(const struct layer_ops **ops, const struct spec *spec, struct err *err)
{
	if (!(*ops)->is_store)
		return 0;
	if ((*ops)->keyed == NULL)
		return err_set(err, -EINVAL, "column %u: %s holds one disk, no objects; use it with raw",
			       spec->column, (*ops)->name);
	*ops = (*ops)->keyed;
	return 0;
}

static int layer_new(const struct spec *spec, struct build b, struct layer **out, struct err *err)
{
	const struct layer_ops *ops = layer_find(spec->layer);
	char what[96];
	struct layer *l;
	int rc;

	if (ops == NULL)
		return err_set(err, -EINVAL, "column %u: there is no layer '%s' (see nbdrsd layers)",
			       spec->column, spec->layer);
	rc = b.is_keyed ? choose_keyed(&ops, spec, err) : 0;
	if (rc == 0)
		rc = check_shape(ops, spec, err);
	if (rc != 0)
		return rc;
	l = calloc(1, sizeof(*l));
	if (l == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	rangelock_init(&l->rmw);
	l->ops = ops;
	l->spec = spec;
	l->export_name = b.export_name;
	l->want_ro = b.read_only;
	l->is_keyed = b.is_keyed;
	l->self = calloc(1, MAX(ops->self_size, 1U));
	if (l->self == NULL) {
		layer_free(l);
		return err_set(err, -ENOMEM, "out of memory");
	}
	(void)snprintf(what, sizeof(what), "layer %s", ops->name);
	rc = opts_parse(ops->opts, l->self, spec->args, spec->args_n, what, err);
	if (rc == 0)
		rc = add_kids(l, err);
	if (rc != 0)
		layer_free(l);
	else
		*out = l;
	return rc;
}

static int chain_new(const struct spec *spec, struct build b, struct chain **out, struct err *err)
{
	struct chain *c = calloc(1, sizeof(*c));
	int rc;

	if (c == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	co_mutex_init(&c->opening);
	rc = layer_new(spec, b, &c->top, err);
	if (rc != 0)
		chain_free(c);
	else
		*out = c;
	return rc;
}

int chain_build(const struct spec *spec, const char *export_name, bool read_only, struct chain **out,
		struct err *err)
{
	return chain_new(spec, (struct build){ export_name, read_only, false }, out, err);
}

int chain_build_keyed(const struct spec *spec, bool read_only, struct chain **out, struct err *err)
{
	return chain_new(spec, (struct build){ NULL, read_only, true }, out, err);
}

void chain_free(struct chain *c)
{
	if (c == NULL)
		return;
	assert(!c->is_open);
	layer_free(c->top);
	co_mutex_destroy(&c->opening);
	free(c);
}

/* ---- opening and closing ---- */

static void take_over_from_kid(struct layer *l)
{
	const struct layer *kid;

	if (l->kids_n == 0) {
		l->min_io = 1;
		l->pref_io = 4096;
		l->max_io = BUF_MAX / 2;
		return;
	}
	kid = l->kids[0];
	l->size = kid->size;
	l->caps = kid->caps;
	l->min_io = 1; /* the kid pads for itself */
	l->pref_io = kid->pref_io;
	l->max_io = BUF_MAX / 2;
}

static CO_FN void layer_close(struct layer *l)
{
	if (l->open_error != 0)
		return;
	if (l->ops->close != NULL)
		l->ops->close(l);
	for (unsigned i = 0; i < l->kids_n; i++)
		layer_close(l->kids[i]);
}

static CO_FN int layer_open(struct layer *l, struct err *err)
{
	int rc = layer_kids_open(l, err);

	if (rc != 0)
		return rc;
	take_over_from_kid(l);
	if (l->ops->open != NULL)
		rc = l->ops->open(l, err);
	if (rc != 0)
		layer_kids_close(l);
	return rc;
}

/* What is wrong with the chain's text or with us, another time would not mend. */
static bool is_missable(const struct layer *l, int rc)
{
	return l->ops->may_miss_kids && rc != -EINVAL && rc != -ENOMEM;
}

int layer_kids_open(struct layer *l, struct err *err)
{
	for (unsigned i = 0; i < l->kids_n; i++) {
		int rc = layer_open(l->kids[i], err);

		l->kids[i]->open_error = is_missable(l, rc) ? rc : 0;
		if (l->kids[i]->open_error != 0)
			log_warn("kid can't be opened layer=%s kid=%u error=\"%s\"", l->ops->name, i, err->msg);
		if (rc == 0 || l->kids[i]->open_error != 0)
			continue;
		while (i > 0)
			layer_close(l->kids[--i]);
		return rc;
	}
	return 0;
}

void layer_kids_close(struct layer *l)
{
	for (unsigned i = l->kids_n; i > 0; i--)
		layer_close(l->kids[i - 1]);
}

int layer_kid_open(struct layer *l, unsigned i, struct err *err)
{
	int rc = layer_open(l->kids[i], err);

	/* Release, by default: who sees it open sees all that open did. */
	l->kids[i]->open_error = rc;
	return rc;
}

int chain_open(struct chain *c, struct err *err)
{
	int rc = layer_open(c->top, err);

	c->is_open = rc == 0;
	return rc;
}

/* ---- channels ---- */

static CO_FN void chan_close(struct chan *c)
{
	if (c == NULL)
		return;
	if (c->layer->ops->chan_close != NULL)
		c->layer->ops->chan_close(c);
	for (unsigned i = 0; i < c->layer->kids_n; i++)
		chan_close(c->kids[i]);
	free(c->kids);
	free(c->self);
	free(c);
}

static CO_FN int chan_new(struct layer *l, struct chan **out);

int chan_kid(struct chan *c, unsigned i, struct chan **out)
{
	struct chan *kid = c->kids[i];
	int rc = 0;

	if (kid == NULL) {
		if (c->layer->kids[i]->open_error != 0)
			return -ENXIO;
		rc = chan_new(c->layer->kids[i], &kid);
		if (rc == 0)
			c->kids[i] = kid;
	}
	if (rc == 0)
		*out = kid;
	return rc;
}

static CO_FN int chan_new(struct layer *l, struct chan **out)
{
	struct chan *c = calloc(1, sizeof(*c)), *kid;
	int rc = 0;

	if (c == NULL)
		return -ENOMEM;
	c->layer = l;
	c->kids = calloc(l->kids_n + 1U, sizeof(*c->kids));
	c->self = calloc(1, MAX(l->ops->chan_size, 1U));
	if (c->kids == NULL || c->self == NULL)
		rc = -ENOMEM;
	for (unsigned i = 0; i < l->kids_n && rc == 0; i++) {
		rc = chan_kid(c, i, &kid);
		if (rc != 0 && l->kids[i]->open_error != 0)
			rc = 0; /* may be missed */
	}
	if (rc == 0 && l->ops->chan_open != NULL)
		rc = l->ops->chan_open(c);
	if (rc == 0) {
		*out = c;
		return 0;
	}
	/* Half built: chan_close of this layer must not see what chan_open did not make. */
	if (c->kids != NULL)
		for (unsigned i = 0; i < l->kids_n; i++)
			chan_close(c->kids[i]);
	free(c->kids);
	free(c->self);
	free(c);
	return rc;
}

int layer_chan_open(struct layer *l, struct chan **out)
{
	return chan_new(l, out);
}

void layer_chan_close(struct chan *c)
{
	chan_close(c);
}

struct chan *chain_chan_peek(struct chain *c)
{
	return atomic_load_explicit(&c->chans[reactor_index(reactor_self())], memory_order_relaxed);
}

struct chan *chain_chan(struct chain *c, int *rc)
{
	struct chan *mine = chain_chan_peek(c);

	*rc = 0;
	if (mine != NULL)
		return mine;
	co_mutex_lock(&c->opening);
	mine = chain_chan_peek(c);
	if (mine == NULL) {
		*rc = chan_new(c->top, &mine);
		if (*rc == 0)
			/* Release: who sums up the counters on another thread sees a whole tree. */
			atomic_store_explicit(&c->chans[reactor_index(reactor_self())], mine,
					      memory_order_release);
	}
	co_mutex_unlock(&c->opening);
	return mine;
}

static CO_FN int close_here(void *arg)
{
	struct chain *c = arg;
	unsigned i = reactor_index(reactor_self());

	chan_close(atomic_exchange(&c->chans[i], NULL));
	return 0;
}

int chain_close(struct chain *c)
{
	struct chan *chan;
	int rc;

	if (!c->is_open)
		return 0;
	chan = chain_chan(c, &rc);
	if (chan != NULL)
		rc = ch_flush(chan);
	for (unsigned i = 0; i < reactors_n(); i++)
		if (atomic_load(&c->chans[i]) != NULL)
			(void)reactor_call(reactor_get(i), close_here, c); /* always 0 */
	layer_close(c->top);
	c->is_open = false;
	return rc;
}

/* ---- looking at it ---- */

struct layer *chain_top(struct chain *c)
{
	return c->top;
}

static void sum_stats(struct ch_stats *sum, const struct ch_stats *s)
{
	for (unsigned op = 0; op < CH_OPS; op++) {
		sum->ops[op] += atomic_load_explicit(&s->ops[op], memory_order_relaxed);
		sum->bytes[op] += atomic_load_explicit(&s->bytes[op], memory_order_relaxed);
		sum->errors[op] += atomic_load_explicit(&s->errors[op], memory_order_relaxed);
	}
	sum->lent += atomic_load_explicit(&s->lent, memory_order_relaxed);
}

/* chans: the channels of `l`, one per reactor, NULL where there is none. */
static void each(struct layer *l, unsigned depth, struct chan **chans, unsigned n,
		 void (*fn)(void *, struct layer *, unsigned, const struct ch_stats *), void *arg)
{
	struct ch_stats sum = { 0 };
	struct chan **below;

	for (unsigned i = 0; i < n; i++)
		if (chans[i] != NULL)
			sum_stats(&sum, &chans[i]->stats);
	fn(arg, l, depth, &sum);
	if (l->kids_n == 0 || l->open_error != 0)
		return;
	below = calloc(MAX(n, 1U), sizeof(struct chan *));
	if (below == NULL)
		return; /* a status display may be short of lines, the daemon may not die of it */
	for (unsigned k = 0; k < l->kids_n; k++) {
		for (unsigned i = 0; i < n; i++)
			below[i] = chans[i] ? chans[i]->kids[k] : NULL;
		each(l->kids[k], depth + 1, below, n, fn, arg);
	}
	free(below);
}

void chain_each(struct chain *c, void (*fn)(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum),
		void *arg)
{
	struct chan *chans[REACTOR_MAX];
	unsigned n = reactors_n();

	for (unsigned i = 0; i < n; i++)
		chans[i] = atomic_load_explicit(&c->chans[i], memory_order_acquire);
	each(c->top, 0, chans, n, fn, arg);
}

/* ---- making and removing volumes ---- */

int layer_create(struct layer *l, const struct obj *obj, uint64_t size, bool force, struct err *err)
{
	while (l->ops->create == NULL && l->kids_n > 0)
		l = l->kids[0];
	if (l->ops->create == NULL)
		return err_set(err, -ENOTSUP, "layer %s holds no volume that could be made", l->ops->name);
	return l->ops->create(l, obj, size, force, err);
}

int layer_destroy(struct layer *l, const struct obj *obj, struct err *err)
{
	while (l->ops->destroy == NULL && l->kids_n > 0)
		l = l->kids[0];
	if (l->ops->destroy == NULL)
		return err_set(err, -ENOTSUP, "layer %s holds no volume that could be removed", l->ops->name);
	return l->ops->destroy(l, obj, err);
}

int chain_create(struct chain *c, uint64_t size, bool force, struct err *err)
{
	return layer_create(c->top, &obj_none, size, force, err);
}

int chain_destroy(struct chain *c, struct err *err)
{
	return layer_destroy(c->top, &obj_none, err);
}
