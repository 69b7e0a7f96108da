/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The guard against puts that are late: each is conditional on what was there when it began (docs/consistency.md, s3).
 */
#ifndef NBDRS_LAYER_S3_GUARD_H
#define NBDRS_LAYER_S3_GUARD_H

#include "layer/s3/s3_int.h"

/* Conditional puts work; `etag` is one that the server gives. Without a usable one nothing is guarded. -ENOMEM. */
int s3_guard_open(struct s3_self *self, const char *etag);
void s3_guard_close(struct s3_self *self);
void s3_guard_status(struct s3_self *self, struct info *i);
bool s3_is_guarded(const struct s3_self *self);

/*
 * PUT_ALWAYS, as s3_do; `req` has method, key and body. After 0, resp->http.etag is that of the object, which may be of
 * an answer to HEAD. -EAGAIN also: others keep changing the object.
 */
CO_FN int s3_guarded_put(struct chan *c, const struct put *p, struct s3_req *req, struct s3_resp *resp);

/*
 * What other requests say about an object: a read or stat; the n-th of a listing (any thread); a conditional put of the
 * caller's; a delete of n.
 */
void s3_guard_saw(struct s3_self *self, const struct obj *obj, int rc, const struct s3_resp *resp);
void s3_guard_listed(struct s3_self *self, const struct obj *obj, const char *etag, unsigned n);
void s3_guard_put_was(struct s3_self *self, const struct obj *obj, int rc, const struct s3_resp *resp);
void s3_guard_del_was(struct s3_self *self, const struct obj *objs, unsigned n, int rc);

#endif
