/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The client's state, shared by its files: s3_setup.c makes it, s3_client.c uses it, s3_explain.c
 * talks about it.
 */
#ifndef NBDRS_CLIENT_S3_INT_H
#define NBDRS_CLIENT_S3_INT_H

#include <stdatomic.h>

#include "nbdrs/log.h"
#include "nbdrs/reactor.h"
#include "nbdrs/s3.h"

/* One generation of keys. */
struct s3_keys {
	struct s3_creds creds;
	struct s3_keys *older;
};

struct s3 {
	struct http *http;
	char *endpoint; /* "http://host:9000", for people */
	char *bucket;
	char *base; /* scheme and host of all URLs: with the bucket in it unless is_path_style */
	char *host; /* of base, as in the header */
	char *root; /* what all paths begin with: "/" or "/bucket/", encoded */
	bool is_path_style, is_https, is_unsigned;
	bool is_default_endpoint; /* nobody named one */
	char region[S3_REGION_MAX + 1];

	/* For reading the sources of keys again. */
	struct s3_url url; /* without what is not needed for it */
	char *key_file, *profile, *token;

	_Atomic(struct s3_keys *) keys; /* the newest */
	struct co_mutex renewing;
	uint64_t renewed_ns; /* when they were read again, 0 = never; guarded by renewing */

	_Atomic int64_t skew_s;          /* what is added to our clock */
	_Atomic uint64_t sent, received; /* bytes of bodies; relaxed, for people */
	struct log_gate log, skew_log;
	struct s3_signer signers[REACTOR_MAX];
};

/*
 * Reads the sources of keys again, unless that was just done. True when there are others than
 * `used` now.
 */
CO_FN bool s3_renew(struct s3 *s, const struct s3_creds *used);

#endif
