/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Listing a distributed volume: what the nodes have, put together, each object once.
 *
 * A node that can't be listed does no harm as long as there are fewer of them than replicas: each object then lies on
 * another one as well. Of objects with stale replicas only good ones count; where no good one could be asked the object
 * is said to be there, for who takes it for missing reads zeroes.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "layer/distributed/distributed.h"
#include "nbdrs/io.h"

/* A shard, found somewhere. */
struct shard {
	uint64_t number, size;
};

/* Any other object. */
struct thing {
	uint64_t size;
	UT_hash_handle hh;
	char name[];
};

struct catalogue {
	struct dist *d;
	const char *prefix;
	unsigned node;
	struct shard *shards;
	size_t n, room;
	struct thing *things;
};

static void catalogue_free(struct catalogue *cat)
{
	struct thing *t, *next;

	HASH_ITER(hh, cat->things, t, next) {
		HASH_DEL(cat->things, t);
		free(t);
	}
	free(cat->shards);
}

static int add_shard(struct catalogue *cat, uint64_t number, uint64_t size)
{
	if (cat->n == cat->room) {
		size_t room = cat->room ? 2 * cat->room : 1024;
		struct shard *v = reallocarray(cat->shards, room, sizeof(*v));

		if (v == NULL)
			return -ENOMEM;
		cat->shards = v;
		cat->room = room;
	}
	cat->shards[cat->n++] = (struct shard){ number, size };
	return 0;
}

static int add_thing(struct catalogue *cat, const char *name, uint64_t size)
{
	struct thing *t;

	HASH_FIND_STR(cat->things, name, t);
	if (t == NULL) {
		t = calloc(1, sizeof(*t) + strlen(name) + 1);
		if (t == NULL)
			return -ENOMEM;
		memcpy(t->name, name, strlen(name) + 1);
		HASH_ADD_STR(cat->things, name, t);
		if (t->hh.tbl == NULL) {
			free(t);
			return -ENOMEM;
		}
	}
	t->size = MAX(t->size, size);
	return 0;
}

static int found(void *arg, const char *stored, uint64_t size)
{
	struct catalogue *cat = arg;
	char name[OBJ_NAME_MAX + 1];
	struct place at;
	unsigned r;

	if (!place_parse(cat->d->placing, stored, cat->node, name, &at, &r) ||
	    strncmp(name, cat->prefix, strlen(cat->prefix)) != 0 ||
	    mark_view(cat->d, name).stale & bit(r))
		return 0;
	return at.is_shard ? add_shard(cat, at.shard, size) : add_thing(cat, name, size);
}

static int by_number(const void *a, const void *b)
{
	const struct shard *x = a, *y = b;

	return x->number < y->number ? -1 : x->number > y->number;
}

/* Sorts; each shard once, with the largest size. In a thread: there may be millions. */
static int merge(void *arg)
{
	struct catalogue *cat = arg;
	size_t n = 0;

	if (cat->n > 0)
		qsort(cat->shards, cat->n, sizeof(*cat->shards), by_number);
	for (size_t i = 0; i < cat->n; i++) {
		if (n > 0 && cat->shards[n - 1].number == cat->shards[i].number)
			cat->shards[n - 1].size = MAX(cat->shards[n - 1].size, cat->shards[i].size);
		else
			cat->shards[n++] = cat->shards[i];
	}
	cat->n = n;
	return 0;
}

/* Objects no good holder of which was on a node that was listed. */
static int add_unknown(struct catalogue *cat, uint64_t listed)
{
	struct dist *d = cat->d;
	int rc = 0;

	pthread_mutex_lock(&d->lock);
	list_for_each(m, &d->marks, struct mark, all)
	{
		struct place at;
		bool is_known = false;

		(void)place_name(d->placing, m->name,
				 &at); /* marks are made with names that have a place */
		for (unsigned r = 0; r < at.n; r++)
			if (listed & bit(at.node[r]) && !(m->stale & bit(r)))
				is_known = true;
		if (is_known || strncmp(m->name, cat->prefix, strlen(cat->prefix)) != 0 || rc != 0)
			continue;
		rc = at.is_shard ? add_shard(cat, at.shard, 0) : add_thing(cat, m->name, 0);
	}
	pthread_mutex_unlock(&d->lock);
	return rc;
}

static CO_FN int list_nodes(struct chan *c, struct catalogue *cat)
{
	struct dist *d = cat->d;
	unsigned failed = 0;
	uint64_t listed = 0;
	int rc = 0, error = -EIO;

	for (unsigned i = 0; i < d->placing->nodes; i++) {
		struct chan *kid;

		cat->node = i;
		rc = d->nodes[i].is_joined ? node_chan(c, i, &kid) : -ENXIO;
		if (rc == 0) {
			rc = ch_list(kid, cat->prefix, found, cat);
			if (rc == -ENOMEM)
				return rc;
			node_result(d, i, rc);
		}
		if (rc == 0) {
			listed |= bit(i);
			(void)offload(merge, cat); /* always 0 */
			continue;
		}
		error = d->nodes[i].error != 0 ? d->nodes[i].error : rc;
		if (++failed >= d->replicas)
			return error;
	}
	rc = add_unknown(cat, listed);
	if (rc == 0)
		(void)offload(merge, cat); /* always 0 */
	return rc;
}

int dist_list(struct chan *c, const char *prefix, list_fn *fn, void *arg)
{
	struct dist *d = c->layer->self;
	struct catalogue cat = { .d = d, .prefix = prefix };
	struct thing *t, *next;
	int rc = d->broken;

	if (rc == 0)
		rc = list_nodes(c, &cat);
	HASH_ITER(hh, cat.things, t, next)
		if (rc == 0)
			rc = fn(arg, t->name, t->size);
	for (size_t i = 0; i < cat.n && rc == 0; i++) {
		char name[32];

		place_shard_name(cat.shards[i].number, name);
		rc = fn(arg, name, cat.shards[i].size);
	}
	catalogue_free(&cat);
	return rc;
}
