/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Resizing, on its way down: by the first layer that has something to do with it. A layer that passes everything on
 * has its kid's size.
 */
#include <errno.h>

#include "nbdrs/layer.h"

int ch_resize(struct chan *c, uint64_t size, enum resize_phase phase, struct err *err)
{
	struct layer *l = c->layer;
	int rc;

	if (phase == RESIZE_BEFORE && !(l->caps & CAN_WRITE))
		return err_set(err, -EROFS, "layer %s: this disk is read-only", l->ops->name);
	if (l->ops->resize)
		return l->ops->resize(c, size, phase, err);
	if (l->kids_n != 1)
		return err_set(err, -EOPNOTSUPP, "layer %s: its size cannot be changed while it is served",
			       l->ops->name);
	rc = ch_resize(c->kids[0], size, phase, err);
	if (!rc && phase == RESIZE_NOW)
		l->size = l->kids[0]->size;
	return rc;
}
