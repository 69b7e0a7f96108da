/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The identity of a volume: 16 random hexadecimal digits that `init` writes beside its data, so that two volumes
 * that one day have the same name and size are told apart (a kernel device is only ever given to its own).
 *
 * Where it is: objects have an object `uuid` beside `size`; a file has the extended attribute user.nbdrs.id. Volumes
 * from before that, those of nbd-rs, block devices, file systems without such attributes and volumes on several stores
 * have none.
 */
#ifndef NBDRS_IDENTITY_H
#define NBDRS_IDENTITY_H

#include <stdbool.h>

#include "nbdrs/backend.h"
#include "nbdrs/co.h"
#include "nbdrs/err.h"
#include "nbdrs/layer.h"

#define IDENTITY_OBJECT "uuid"
#define IDENTITY_XATTR  "user.nbdrs.id"

/*
 * Gives a volume that was just created one; the chain is built, not open. One that is there stays, unless `renew`.
 * Where none can be had that is no error.
 */
CO_FN int identity_make(struct chain *c, bool renew, struct err *err);

/*
 * Before a volume is removed: what would be left over of it; the chain is built, not open. `was`: what it was, "" =
 * none, to be put back if the volume stays after all.
 */
CO_FN int identity_remove(struct chain *c, char was[IDENTITY_LEN + 1], struct err *err);
CO_FN int identity_put_back(struct chain *c, const char *was, struct err *err);

/* The open chain's, "" = none. -errno when it can't be told: then neither can whose devices are whose. */
CO_FN int identity_read(struct chain *c, char out[IDENTITY_LEN + 1], struct err *err);
/* The same for a layer that is being opened: of what is below it. */
CO_FN int identity_below(struct layer *l, char out[IDENTITY_LEN + 1], struct err *err);

#endif
