/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What users leave out of a chain and nearly always want. Written explicitly it is left alone.
 *
 *	s3, http, https			without a `retry` above them get one: retry:s3:...
 *	distributed, holding a disk	is below a `sharded`: sharded:distributed{...}
 *	raw, sharded, http ... over a network	without a `readahead` on the way get one above
 *
 * Like the parser this knows layers by their names only.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/spec.h"

/* What stands above a node. */
struct above {
	bool is_keyed;		/* a mapping, so this is about objects */
	bool has_retry;
	bool has_readahead;
};

static bool is_layer(const struct spec *s, const char *name)
{
	return strcmp(s->layer, name) == 0;
}

static bool is_remote_store(const struct spec *s)
{
	return is_layer(s, "s3") || is_layer(s, "http") || is_layer(s, "https");
}

static bool maps_to_objects(const struct spec *s)
{
	return is_layer(s, "sharded") || is_layer(s, "distributed");
}

/* Is there a remote store below, and no readahead on the way to it? */
static bool is_slow(const struct spec *s)
{
	if (is_layer(s, "readahead"))
		return false;
	if (is_remote_store(s))
		return true;
	for (unsigned i = 0; i < s->kids_n; i++)
		if (is_slow(s->kids[i]))
			return true;
	return false;
}

/* Puts a new layer `name` above *s. */
static int wrap(struct spec **s, const char *name)
{
	struct spec *outer = calloc(1, sizeof(*outer));

	if (!outer)
		return -ENOMEM;
	outer->layer = strdup(name);
	outer->kids = calloc(1, sizeof(struct spec *));
	if (!outer->layer || !outer->kids) {
		spec_free(outer);
		return -ENOMEM;
	}
	outer->column = (*s)->column;
	outer->kids[0] = *s;
	outer->kids_n = 1;
	*s = outer;
	return 0;
}

/* Recursion is bounded: the parser has seen to that. */
static int expand(struct spec **at, struct above above)
{
	struct spec *s = *at;
	const bool is_disk = !above.is_keyed && (is_layer(s, "raw") || maps_to_objects(s) || is_remote_store(s));
	const bool wants_sharded = !above.is_keyed && is_layer(s, "distributed");
	const bool wants_readahead = is_disk && !above.has_readahead && is_slow(s);
	const struct above below = {
		.is_keyed = above.is_keyed || maps_to_objects(s),
		.has_retry = above.has_retry || is_layer(s, "retry"),
		.has_readahead = above.has_readahead || is_layer(s, "readahead") || wants_readahead,
	};
	int rc = 0;

	for (unsigned i = 0; i < s->kids_n && !rc; i++)
		rc = expand(&s->kids[i], below);
	/* From the inside out. */
	if (!rc && is_remote_store(s) && !above.has_retry)
		rc = wrap(at, "retry");
	if (!rc && wants_sharded)
		rc = wrap(at, "sharded");
	if (!rc && wants_readahead)
		rc = wrap(at, "readahead");
	return rc;
}

int spec_expand(struct spec **s, struct err *err)
{
	int rc = expand(s, (struct above){ 0 });

	return rc ? err_set(err, rc, "out of memory while reading a chain") : 0;
}
