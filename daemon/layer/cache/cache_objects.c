/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * mode=writeback below a mapping: requests about whole objects.
 *
 *	del	is a record, like a write, and is answered when the layer below has done it: many
 *		deletes at a time are rare, and who removes a volume wants to know that it is gone
 *	put	goes past the journal. Changes of the object are kept out meanwhile; those that are
 *		here are sent first, so that a put that fails leaves what was there; then a record
 *		ends them, so that a crash does not bring them back
 *	stat	of an object with changes: they are sent first, as nobody but the layer below can say
 *		its etag
 *	list	what the layer below has, and what is here
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "layer/cache/cache_int.h"
#include "nbdrs/cleanup.h"

int back_append(struct back *b, struct record *r)
{
	struct range_hold hold;
	int rc;

	if (!b->l->is_keyed)
		return journal_append(&b->journal, r);
	rangelock_lock(&b->objects, &hold, r->obj->hash, 0, 1, true);
	rc = journal_append(&b->journal, r);
	rangelock_unlock(&b->objects, &hold);
	return rc;
}

int back_stat(struct chan *ch, const struct obj *obj, struct obj_stat *st)
{
	const struct cache *c = ch->layer->self;
	int rc = c->back->is_ro ? 0 : back_drain_object(c->back, obj);

	return rc ? rc : ch_stat(ch->kids[0], obj, st);
}

/* --- put -------------------------------------------------------------------------------------- */

/*
 * Nothing of the object is in the journal any more, whatever happens. The caller keeps changes out.
 */
static CO_FN int leave_journal(struct chan *ch, const struct obj *obj)
{
	const struct cache *c = ch->layer->self;
	struct back *b = c->back;
	struct record r = { .type = RECORD_VOID, .obj = obj };
	int rc = back_drain_object(b, obj);

	if (rc || !c->disk)
		return rc;
	/* From the record on the layer below alone has what was flushed. */
	if (ch->kids[0]->layer->caps & CAN_FLUSH)
		rc = ch_flush(ch->kids[0]);
	if (!rc)
		rc = journal_append(&b->journal, &r);
	return rc ? rc : journal_sync(&b->journal);
}

int back_put(struct chan *ch, const struct put *p, struct obj_stat *st)
{
	const struct cache *c = ch->layer->self;
	struct back *b = c->back;
	struct range_hold hold;
	int rc;

	rangelock_lock(&b->objects, &hold, p->obj->hash, 0, 1, false);
	rc = leave_journal(ch, p->obj);
	if (!rc)
		rc = through_put(ch, p, st);
	rangelock_unlock(&b->objects, &hold);
	if (!rc)
		atomic_fetch_add(&b->puts, 1);
	return rc;
}

/* --- del -------------------------------------------------------------------------------------- */

/* Waits until they are gone below too; a failure of one does not keep the others. */
static CO_FN int wait_gone(struct back *b, const struct obj *objs, unsigned n)
{
	_cleanup_free_ struct target *v = calloc(n, sizeof(*v));
	unsigned found = 0;
	int rc = 0;

	if (!v)
		return -ENOMEM;
	for (unsigned i = 0; i < n; i++)
		if (dirty_target(&b->dirty, &objs[i], &v[found]) == 0)
			target_want(&b->dirty, &v[found++]);
	for (unsigned i = 0; i < found; i++) {
		int one = target_wait(&b->dirty, &v[i]);

		if (!rc)
			rc = one;
	}
	return rc;
}

int back_del(struct chan *ch, const struct obj *objs, unsigned n)
{
	const struct cache *c = ch->layer->self;
	int rc = 0;

	for (unsigned i = 0; i < n && !rc; i++) {
		struct record r = { .type = RECORD_GONE, .obj = &objs[i] };

		rc = back_append(c->back, &r);
	}
	if (!rc && n)
		rc = wait_gone(c->back, objs, n);
	if (!rc) /* its flush is the layer's below */
		atomic_fetch_add(&c->back->puts, 1);
	return rc;
}

/* --- list ------------------------------------------------------------------------------------- */

struct known {
	char *name;
	uint64_t end;
	enum dirty_state state;
	bool is_shown;
};

struct listing {
	const char *prefix;
	list_fn *fn;
	void *arg;
	struct known *v; /* what is here; sorted once it is complete */
	size_t n, room;
};

static int note(void *arg, const struct obj *obj, enum dirty_state state, uint64_t end)
{
	struct listing *l = arg;

	if (strncmp(obj->name, l->prefix, strlen(l->prefix)) != 0)
		return 0;
	if (l->n == l->room) {
		const size_t room = MAX(2 * l->room, (size_t)64);
		struct known *v = realloc(l->v, room * sizeof(*v));

		if (!v)
			return -ENOMEM;
		l->v = v;
		l->room = room;
	}
	l->v[l->n] = (struct known){ .name = strdup(obj->name), .end = end, .state = state };
	return l->v[l->n++].name ? 0 : -ENOMEM;
}

static int by_name(const void *a, const void *b)
{
	const struct known *x = a, *y = b;

	return strcmp(x->name, y->name);
}

static int show_stored(void *arg, const char *name, uint64_t size)
{
	struct listing *l = arg;
	const struct known key = { .name = (char *)(uintptr_t)name };
	struct known *k = l->n ? bsearch(&key, l->v, l->n, sizeof(*l->v), by_name) : NULL;

	if (!k)
		return l->fn(l->arg, name, size);
	if (k->is_shown || (k->state == DIRTY_GONE && !k->end))
		return 0;
	k->is_shown = true;
	return l->fn(l->arg, name, k->state == DIRTY_GONE ? k->end : MAX(size, k->end));
}

int back_list(struct chan *ch, const char *prefix, list_fn *fn, void *arg)
{
	const struct cache *c = ch->layer->self;
	struct listing l = { .prefix = prefix, .fn = fn, .arg = arg };
	/* First what is here: what goes down meanwhile is there when it is looked for. */
	int rc = dirty_each_object(&c->back->dirty, note, &l);

	if (!rc && l.n)
		qsort(l.v, l.n, sizeof(*l.v), by_name);
	if (!rc)
		rc = ch_list(ch->kids[0], prefix, show_stored, &l);
	for (size_t i = 0; i < l.n; i++) {
		if (!rc && !l.v[i].is_shown && l.v[i].end)
			rc = fn(arg, l.v[i].name, l.v[i].end);
		free(l.v[i].name);
	}
	free(l.v);
	return rc;
}
