/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The disk tier as a part of the layer: whether there is one, whose it is, its life.
 *
 * A change below that is not noted in files which are there would make them wrong. So they are open
 * before the first change is sent and until the last one was, and where there is no room for them
 * (any more) they are removed.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "layer/cache/cache_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/identity.h"
#include "nbdrs/log.h"

/*
 * What memory has goes to disk at the end, for so long at most, and what is not valid any more goes from
 * the index, for as long again; at an upgrade clients wait for that.
 */
#define LAST_NS    UINT64_C(2000000000)
#define UPGRADE_NS UINT64_C(200000000)

static CO_FN int flush_below(void *arg)
{
	const struct cache *c = arg;
	struct chan *kid = c->below->kids[0];

	return kid->layer->caps & CAN_FLUSH ? ch_flush(kid) : 0;
}

static bool evicted(void *arg, const char *name, uint16_t name_len, uint64_t n, uint8_t *data,
		    bool is_hot)
{
	const struct cache *c = arg;

	return tier_take(c->tier, name, name_len, n, data, is_hot);
}

static void give_back(void *arg, uint8_t *data)
{
	const struct cache *c = arg;

	cache_table_give_back(c->table, data);
}

/* What was in memory is another disk after a restart. */
static bool is_lasting(const struct layer *l)
{
	if (strcmp(l->ops->name, "mem") == 0 || strcmp(l->ops->name, "null") == 0)
		return false;
	for (unsigned i = 0; i < l->kids_n; i++)
		if (!is_lasting(l->kids[i]))
			return false;
	return true;
}

static CO_FN int open_tier(struct layer *l, const char *identity, struct err *err)
{
	struct cache *c = l->self;
	struct tier_conf conf = {
		.folder = c->disk,
		.volume = c->place,
		.identity = identity,
		.name = l->export_name ? l->export_name : "cache",
		.size = c->tier_size,
		.disk_size = l->is_keyed ? 0 : l->kids[0]->size,
		.granule = (uint32_t)c->granule,
		.dir_fd = c->back ? c->back->journal.dir_fd : -1,
		.is_keyed = l->is_keyed,
		.is_named = c->volume != NULL,
		/* What nobody here can write to somebody else does. */
		.keeps = c->keep && (l->kids[0]->caps & CAN_WRITE) && is_lasting(l->kids[0]),
		.flush = flush_below,
		.give_back = give_back,
		.arg = c,
	};
	int rc = layer_chan_open(l, &c->below);

	if (rc)
		return err_set(err, rc, "layer cache: no channel to the layer below: %s",
			       err_name(rc));
	c->home = reactor_self();
	/* What a killed daemon left unflushed there could be lost there, and be here. */
	rc = flush_below(c);
	if (rc)
		log_warn(
			"%s: no cached data on disk is used, the layer below cannot be flushed folder=%s error=%s",
			conf.name, conf.folder, err_name(rc));
	conf.keeps &= rc == 0;
	rc = tier_open(&conf, &c->tier, err);
	if (rc)
		layer_chan_close(c->below);
	else
		cache_table_on_evict(c->table, evicted, c);
	return rc;
}

int cache_tier_start(struct layer *l, struct err *err)
{
	struct cache *c = l->self;
	char own[IDENTITY_LEN + 1];
	int rc;

	if (!c->disk || l->want_ro || (c->back && c->back->is_ro))
		return 0; /* nothing is written to the folder, and nothing below is changed */
	if (c->tier_size < TIER_MIN * c->granule) /* all of it is the journal's, which is open */
		return tier_remove(&(struct journal_removal){ .folder = c->disk,
							      .dir_fd = c->back->journal.dir_fd },
				   err);
	/* For its journal it was asked already. */
	rc = c->back ? 0 : identity_below(l, own, err);
	if (rc)
		return err_prefix(err, rc, "layer cache");
	c->place = back_volume(l);
	if (!c->place)
		return err_set(err, -ENOMEM, "out of memory");
	rc = open_tier(l, c->back ? c->back->identity : own, err);
	if (rc)
		cache_tier_stop(l);
	return rc;
}

/* On `home`. */
static CO_FN int stop(void *arg)
{
	struct layer *l = arg;
	struct cache *c = l->self;
	const uint64_t ns = l->comes_again ? UPGRADE_NS : LAST_NS;
	const uint64_t until = now_ns() + ns;

	while (now_ns() < until && cache_table_evict(c->table, TIER_MIN / 2)) {
		tier_wait(c->tier);
		co_yield(); /* it may have all of it */
	}
	cache_table_on_evict(c->table, NULL, NULL);
	/* As back_close(): with what is in the journal nobody waits for the layer below. */
	tier_close(c->tier, !(l->comes_again && c->back && c->is_local), ns);
	c->tier = NULL;
	layer_chan_close(c->below);
	return 0;
}

void cache_tier_stop(struct layer *l)
{
	struct cache *c = l->self;

	/* When another cache comes or goes its reactor makes room in our table, and hands that to the tier. */
	if (c->tier)
		cache_share_leave(&c->share);
	while (c->tier && reactor_call(c->home, stop, l) == -ENOMEM)
		co_yield(); /* no fiber was to be had; it can't fail itself */
	free(c->place);
	c->place = NULL;
}
