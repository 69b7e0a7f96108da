/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What was last heard of objects: their ETags, or that there is none. Shared by all reactors; never waits.
 *
 * A table of fixed size, in sets of a few entries of which the one unused for longest makes room. Names are told apart
 * by their hashes alone. So an answer may be missing, old, or another object's: whoever asks must be able to do with
 * that.
 */
#ifndef NBDRS_LAYER_S3_ETAGS_H
#define NBDRS_LAYER_S3_ETAGS_H

#include "nbdrs/layer.h"

enum {
	S3_ETAGS_MAX = 64 * 1024, /* entries */
	S3_ETAGS_WAYS = 8,        /* in a set */
	S3_ETAG_LEN_MAX = 54,     /* of an ETag that is kept; 32 digits are usual, and "-10000" behind them */
};

enum s3_known { S3_UNKNOWN, S3_ABSENT, S3_THERE };

struct s3_etags;

/* `entries` is a power of two, at least S3_ETAGS_WAYS. NULL: no memory. */
struct s3_etags *s3_etags_new(unsigned entries);
void s3_etags_free(struct s3_etags *t);

/* `etag` (S3_ETAG_LEN_MAX + 1 bytes) is set for S3_THERE. */
enum s3_known s3_etags_get(struct s3_etags *t, const struct obj *obj, char *etag);
/* The object has been put, and this is its ETag. One that can't be kept ("", too long) is as s3_etags_forget. */
void s3_etags_put(struct s3_etags *t, const struct obj *obj, const char *etag);
/* The object has been deleted, or somebody who has to know found none. */
void s3_etags_del(struct s3_etags *t, const struct obj *obj);
/*
 * An answer to a read; etag NULL: there is no such object. Taken only if nothing is known: the read may have been
 * overtaken by a put.
 */
void s3_etags_saw(struct s3_etags *t, const struct obj *obj, const char *etag);
void s3_etags_forget(struct s3_etags *t, const struct obj *obj);

#endif
