/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Volumes with a cache are made and removed: what the cache's folder has goes with them. The folder is
 * locked meanwhile, so no daemon begins to use it in between.
 */
#include <errno.h>
#include <stdlib.h>

#include "layer/cache/cache_int.h"
#include "nbdrs/cleanup.h"

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

	*r = (struct journal_removal){ .dir_fd = -1 };
	if (!c->disk)
		return 0;
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

int cache_create(struct layer *l, const struct obj *obj, uint64_t size, bool force, struct err *err)
{
	struct journal_removal r;
	int rc = begin(l, &r, err);

	/* Whatever of a former volume of this name is there is not the new one's. */
	if (!rc)
		rc = tier_remove(&r, err);
	if (!rc && (!l->is_keyed || kid_makes(l, true)))
		rc = layer_create(l->kids[0], obj, size, force, err);
	end(&r);
	return rc;
}

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
	end(&r);
	return rc;
}
