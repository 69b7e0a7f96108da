/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the files of layer s3 share.
 */
#ifndef NBDRS_LAYER_S3_INT_H
#define NBDRS_LAYER_S3_INT_H

#include <stdatomic.h>

#include "layer/layers.h"
#include "layer/s3/s3_etags.h"
#include "nbdrs/s3.h"

enum { S3_PREFIX_MAX = S3_KEY_MAX - OBJ_NAME_MAX };

/* The instance. */
struct s3_self {
	/* options */
	char *region, *profile, *key_file, *token, *ca_file, *resolve;
	unsigned style, payload;
	bool is_insecure, wants_probe;
	uint64_t conns, timeout_ns, connect_ns;

	/* while open */
	struct s3 *s3;
	char *prefix;            /* keyed: what stands before all names. else: the object's key */
	char etag[ETAG_MAX + 1]; /* of the one object, "" = it has none */
	_Atomic bool
		has_no_multi_del; /* the server turned out to lack it; relaxed, any order will do */

	/* s3_guard.c */
	struct s3_etags *etags;                      /* NULL = puts are not guarded */
	struct rangelock putting;                    /* objects, by name; with etags */
	_Atomic bool is_unguarded;                   /* not any more; relaxed as well */
	_Atomic uint64_t guard_asked, guard_refused; /* for people */
};

extern const struct opt s3_options[];

CO_FN int s3_object_open(struct layer *l, struct err *err);
CO_FN int s3_store_open(struct layer *l, struct err *err);
/* Lists one object below the prefix: shows whether all that was configured is right. */
CO_FN int s3_check_access(struct s3_self *self, struct err *err);
/* Sets CAN_PUT_IF if conditional puts are atomic. An error when nothing can be written. */
CO_FN int s3_probe(struct layer *l, struct err *err);
CO_FN void s3_layer_close(struct layer *l);
CO_FN void s3_layer_info(struct layer *l, struct info *i);

/*
 * Sends one request, again with pauses while the failure is a passing one: for what has no layer
 * retry above it (open) and what can't be begun anew (the pages of a listing).
 */
CO_FN int s3_insist(struct s3 *s3, const struct s3_req *req, struct s3_resp *resp,
		    uint64_t *not_before);

CO_FN int s3_store_del(struct chan *c, const struct obj *objs, unsigned n);
CO_FN int s3_store_list(struct chan *c, const char *prefix, list_fn *fn, void *arg);

#endif
