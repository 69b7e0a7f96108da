/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Chain texts (DESIGN.md section 6) -> tree. Pure: bytes in, tree or error out.
 *
 *	spec  := layer [ ":" spec ]
 *	layer := name [ "[" key=value { "," key=value } "]" ] [ "{" spec { "," spec } "}" ]
 *
 * After `file:`, `s3:`, `http:`, `https:` the rest is the layer's target, verbatim, up to an
 * unbracketed "," or "}". A value may be quoted with "..." (backslash escapes) to hold any of ,]}.
 */
#ifndef NBDRS_SPEC_H
#define NBDRS_SPEC_H

#include "nbdrs/err.h"
#include "nbdrs/opt.h"

enum { SPEC_MAX_LEN = 16384, SPEC_MAX_DEPTH = 32, SPEC_MAX_KIDS = 64 };

struct spec {
	char *layer;	     /* "raw", "file", ... */
	struct opt_arg *args;
	unsigned args_n;
	char *target;	     /* verbatim rest of a store ("/srv/disk.img"); NULL for other layers */
	struct spec **kids;  /* one for `a:b`, several for `a{b,c}` */
	unsigned kids_n;
	unsigned column;     /* 1-based, of the layer's name */
};

/*
 * -EINVAL with "column N: ..." and a second line with the text and a caret below it; secrets
 * (userinfo of URLs) in that line are masked. On success the caller owns *out.
 */
int spec_parse(const char *text, struct spec **out, struct err *err);

/* The command form `-e NAME DRIVER CONN`: the chain "DRIVER:CONN". */
int spec_parse_words(const char *driver, const char *conn, struct spec **out, struct err *err);

/*
 * Adds the layers that a chain nearly always wants and this one does not name: `retry` above
 * network stores, `readahead` above disks on such, `sharded` above a `distributed` that is to be a
 * disk. -ENOMEM; *s is valid then.
 */
int spec_expand(struct spec **s, struct err *err);

void spec_free(struct spec *s);

/* The canonical text, secrets masked; the caller frees. NULL when out of memory. */
char *spec_format(const struct spec *s);

/* Percent-encodes all but [A-Za-z0-9._-]; the caller frees. For export names in device links and ids. */
char *percent_encode(const char *text);

#endif
