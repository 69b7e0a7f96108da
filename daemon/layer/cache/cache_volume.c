/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Volumes with a cache are made and removed: what the cache's folder has goes with them. The folder is
 * locked meanwhile, so no daemon begins to use it in between.
 */
#include <errno.h>
#include <stdlib.h>

#include "layer/cache/cache_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/identity.h"
#include "nbdrs/opt.h"

/* Objects have a place to be made only where one of the layers below says so. */
static bool kid_makes(const struct layer *l, bool create)
{
	for (l = l->kids[0]; l; l = l->kids_n ? l->kids[0] : NULL)
		if (create ? l->ops->create != NULL : l->ops->destroy != NULL)
			return true;
	return false;
}

/* The cache's folder, as one of which all may go; journal_removal_end() in any case. */
static CO_FN int begin(const struct layer *l, struct journal_removal *r, struct err *err)
{
	const struct cache *c = l->self;
	int rc = cache_check_options(c, err);

	*r = (struct journal_removal){ .dir_fd = -1 };
	if (rc || !c->disk)
		return rc;
	r->folder = c->disk;
	r->volume = back_volume(l);
	if (!r->volume)
		return err_set(err, -ENOMEM, "out of memory");
	r->any_export = !c->volume && !l->is_keyed && !l->export_name;
	return journal_removal_begin(r, err);
}

static CO_FN void end(struct journal_removal *r)
{
	journal_removal_end(r);
	free(r->volume);
}

/* --- Making ----------------------------------------------------------------------------------- */

/* A mapping that finds its volume keeps the data, whatever size it is to have. */
static bool kid_maps(const struct layer *l)
{
	for (l = l->kids[0]; l; l = l->kids_n ? l->kids[0] : NULL)
		if (l->ops->keyed_kids)
			return true;
	return false;
}

bool cache_init_keeps(const struct layer *l)
{
	return l->is_keyed || kid_maps(l);
}

/* The volume below, or the objects of one; all 0 = there is none. */
struct below {
	uint64_t size;
	bool can_write;
	char identity[IDENTITY_LEN + 1];
};

/* The store answers, and has no volume: its object `size` is missing, not a key, a certificate or a node. */
static CO_FN int store_has_none(struct layer *store, struct err *err)
{
	struct obj_stat st;
	struct chan *c;
	struct obj obj;
	int rc = store->open_error;

	if (!rc)
		rc = layer_chan_open(store, &c);
	if (rc)
		return err_set(err, rc, "the store cannot be asked: %s", err_name(rc));
	(void)obj_set(&obj, "size"); /* a good name */
	rc = ch_stat(c, &obj, &st);
	layer_chan_close(c);
	if (rc == -ENOENT)
		return 0;
	return err_set(err, rc ? rc : -EEXIST, "the store's object 'size': %s",
		       rc ? err_name(rc) : "it is there");
}

/* A folder here: when it is missing there are no objects in it. */
static bool is_local(const struct layer *l)
{
	while (l->kids_n == 1)
		l = l->kids[0];
	return l->ops->backing != NULL;
}

/* The volume could not be opened because something is missing: 0 if it is the volume. */
static CO_FN int is_missing(struct layer *l, struct err *err)
{
	int rc;

	while (l->kids_n == 1 && !l->ops->keyed_kids)
		l = l->kids[0];
	if (!l->ops->keyed_kids)
		return 0; /* an image: it said so itself */
	rc = layer_kids_open(l, err);
	if (rc == -ENOENT && is_local(l))
		return 0;
	if (rc)
		return rc;
	for (unsigned i = 0; i < l->kids_n && !rc; i++)
		rc = store_has_none(l->kids[i], err);
	layer_kids_close(l);
	return rc;
}

static CO_FN int look_below(struct layer *l, struct below *b, struct err *err)
{
	int rc = layer_kids_open(l, err);

	*b = (struct below){ 0 };
	if (rc)
		return rc == -ENOENT ? is_missing(l->kids[0], err) : rc;
	b->size = l->kids[0]->size;
	b->can_write = l->kids[0]->caps & CAN_WRITE;
	rc = identity_below(l, b->identity, err);
	layer_kids_close(l);
	return rc;
}

/* Why what is unsaved must stay; NULL = it need not, or may. */
static const char *objection(const struct layer *l, const struct below *b, bool is_former,
			     bool force)
{
	if (is_former && force)
		return NULL;
	if (is_former && cache_init_keeps(l))
		return "a former volume of this name, not of the one that is there; say --force, and what is unsaved "
		       "is lost";
	if (is_former)
		return "a former volume of this name, not of the one that is there; move the folder away, or say "
		       "--force, and both are lost";
	if (b->size && kid_maps(l))
		return "the volume that is there, and keeps its data with another size; serve it until that is "
		       "saved, then change the size";
	if (force)
		return NULL;
	if (b->size)
		return "the volume that is there; serve it until that is saved, or say --force, and both are lost";
	return "a former volume of this name, which is not there any more; bring it back and serve it until that "
	       "is saved, or say --force, and it is lost";
}

/* What the journal has is this one's, and is left as it is. Of objects it is the mapping above that decides. */
static bool may_stay(const struct layer *l, const struct below *b, uint64_t size, bool force)
{
	return l->is_keyed || (b->size == size && (!force || kid_maps(l)));
}

/* Whether the journal, which is not empty, goes; and that what is to come after it can be done. */
static CO_FN int judge(struct layer *l, const struct journal_removal *r, uint64_t size, bool force,
		       bool *goes, struct err *err)
{
	struct err why = { "" };
	struct below b;
	char unsaved[32];
	const char *of;
	int rc = look_below(l, &b, &why);
	const bool is_former = journal_removal_is_former(r, b.identity);

	if (!rc && !is_former && may_stay(l, &b, size, force))
		return 0;
	format_size(r->unsaved, unsaved, sizeof(unsaved));
	if (rc)
		return err_set(
			err, rc,
			"layer cache: %s has unsaved data, up to %s, of a volume that cannot be opened: %s",
			r->folder, unsaved, why.msg);
	of = objection(l, &b, is_former, force);
	if (of)
		return err_set(err, -EEXIST, "layer cache: %s has unsaved data, up to %s, of %s",
			       r->folder, unsaved, of);
	if ((b.size || *b.identity) && !b.can_write)
		return err_set(err, -EROFS, "layer cache: the volume below is read-only");
	*goes = true;
	return 0;
}

/*
 * Whatever of a former volume of this name is in the folder is not the new one's; see docs/consistency.md,
 * "A new volume never gets an old journal". Objects may be on a store where nothing is made: there only the journal
 * is looked at.
 */
static CO_FN int make_way(struct layer *l, struct journal_removal *r, uint64_t size, bool force,
			  struct err *err)
{
	bool goes = false;
	int rc = 0;

	if (l->is_keyed || kid_makes(l, true)) {
		rc = journal_may_remove(r, err);
		if (!rc && r->unsaved)
			rc = judge(l, r, size, force, &goes, err);
	}
	if (!rc)
		rc = tier_remove(r, err);
	return rc || !goes ? rc : journal_remove(r, err);
}

int cache_create(struct layer *l, const struct obj *obj, uint64_t size, bool force, struct err *err)
{
	struct journal_removal r;
	int rc = begin(l, &r, err);

	if (!rc)
		rc = make_way(l, &r, size, force, err);
	if (!rc && (!l->is_keyed || kid_makes(l, true)))
		rc = layer_create(l->kids[0], obj, size, force, err);
	end(&r);
	return rc;
}

/* --- Removing --------------------------------------------------------------------------------- */

/* That it is all this volume's is asked before anything goes. */
int cache_destroy(struct layer *l, const struct obj *obj, struct err *err)
{
	struct journal_removal r;
	int rc = begin(l, &r, err);

	if (!rc)
		rc = journal_may_remove(&r, err);
	if (!rc && (!l->is_keyed || kid_makes(l, false)))
		rc = layer_destroy(l->kids[0], obj, err);
	if (!rc)
		rc = tier_remove(&r, err);
	if (!rc)
		rc = journal_remove(&r, err);
	if (!rc)
		rc = journal_folder_remove(&r, err);
	end(&r);
	return rc;
}
