/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * distributed: objects on several nodes, each shard on `replicas` of them.
 *
 * A keyed layer: a mapping above it (sharded) names objects, and its kids, the nodes, are stores of objects. Where they
 * lie is in distributed_place.c, changes in distributed_write.c, flush in distributed_flush.c, what is known of
 * replicas that differ in distributed_marks.c, what may differ after a crash in distributed_doubt.c, mending in
 * distributed_equal.c, distributed_repair.c and distributed_join.c. Here: options, opening, and everything that only
 * reads.
 *
 * A replica (holder) of an object is
 *
 *	good	has every answered change; read from and written
 *	behind	good, but a change answered by `quorum` is still on its way to it: not read from meanwhile
 *	stale	missed a change. Durably recorded on all good holders before that change is answered. Not read
 *		from, and written only as a whole, which makes it good again; else caught up in the background
 *
 * and a node is
 *
 *	not joined	could not be opened or listed, or is left out: tried again every `recheck`. Whatever is
 *			changed meanwhile is stale there
 *	joined, away	failed lately: asked only where there is no other way, and every `recheck`
 *	joined		good
 *
 * Invariants: an object has always at least one good holder; of an answered change at least `quorum` holders were good
 * when it was answered, and each of them says durably who was not. So a volume opens with fewer than `quorum` nodes
 * away: of each answered change some node that knows is there. With more, it opens only where all others have noted
 * that they have everything (distributed_out.c).
 *
 * Promises.
 *	Write, put, zero, trim, delete: answered without error when `quorum` holders have it and the others are
 *	recorded as stale, or (quorum < replicas) still at it. With an error: old or new, as always, but the same on
 *	every good holder: those that missed what another took are stale. Where all failed, or nobody knows, one is
 *	chosen before the object is used again.
 *	Flush: answered requests are through on all good holders, and each node with something volatile has flushed.
 *	What a node may have lost because its flush failed is stale there; with fewer than `quorum` good the flush
 *	fails.
 *	FUA: waits for all holders, each with FUA.
 *	Crash of the daemon, or of everything: unanswered changes may have reached some replicas and not others, and
 *	so may answered ones that were not flushed. Where that can be is in a record on the nodes, and the replicas
 *	there are compared and made equal before they are read: old or new, and from then on always the same.
 *	Crash of a node: what it lost without failing a request or a flush can't be seen. An emptied node is.
 *	Several writers: any number of connections of one daemon. Two daemons must not write to one volume.
 */
#include "layer/distributed/distributed.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/layers.h"
#include "nbdrs/reactor.h"

static const struct opt options[] = {
	{ .name = "replicas",
	  .type = OPT_UINT,
	  .field = offsetof(struct dist, replicas),
	  .def = "1",
	  .min = 1,
	  .max = NODES_MAX,
	  .help = "nodes that hold each shard" },
	{ .name = "quorum",
	  .type = OPT_UINT,
	  .field = offsetof(struct dist, quorum),
	  .def = "0",
	  .max = NODES_MAX,
	  .help = "a write is answered when so many replicas have it, 0 = all" },
	{ .name = "read",
	  .type = OPT_ENUM,
	  .field = offsetof(struct dist, read_from),
	  .def = "fastest",
	  .choices = "fastest|first",
	  .help = "which good replica is read: the one that answers fastest, or the first in order" },
	{ .name = "recheck",
	  .type = OPT_TIME_NS,
	  .field = offsetof(struct dist, recheck),
	  .def = "5s",
	  .min = 1000000,
	  .max = UINT64_C(3600000000000),
	  .help = "how often a node that is away is asked again" },
	{ .name = "clean",
	  .type = OPT_TIME_NS,
	  .field = offsetof(struct dist, clean),
	  .def = "5s",
	  .min = 1000000,
	  .max = UINT64_C(3600000000000),
	  .help = "what was not written for so long need not be compared after a crash" },
	{ .name = "rebuild",
	  .type = OPT_UINT,
	  .field = offsetof(struct dist, rebuild),
	  .def = "2",
	  .min = 1,
	  .max = 64,
	  .help = "objects copied at a time when a node is caught up" },
	OPT_END,
};

/* --- Opening ---------------------------------------------------------------------------------- */

static int check_options(struct layer *l, struct err *err)
{
	struct dist *d = l->self;

	if (!l->is_keyed)
		return err_set(
			err, -EINVAL,
			"layer distributed holds objects, not a disk: put sharded above it, as in "
			"sharded:distributed[replicas=2]{file:/a/,file:/b/}");
	if (d->replicas > l->kids_n)
		return err_set(err, -EINVAL,
			       "layer distributed: replicas=%" PRIu64
			       ", but there are only %u nodes; "
			       "give more nodes or fewer replicas",
			       d->replicas, l->kids_n);
	if (d->quorum > d->replicas)
		return err_set(err, -EINVAL,
			       "layer distributed: quorum=%" PRIu64
			       " must not be more than replicas=%" PRIu64,
			       d->quorum, d->replicas);
	if (d->quorum == 0)
		d->quorum = d->replicas;
	return 0;
}

static void dist_free(struct dist *d)
{
	list_for_each(m, &d->marks, struct mark, all)
	{
		HASH_DEL(d->table, m);
		free(m);
	}
	doubt_free(d);
	(void)pthread_mutex_destroy(&d->lock);
	co_mutex_destroy(&d->flush_one);
	co_mutex_destroy(&d->call_one);
	for (unsigned i = 0; i < COMPARE_MAX; i++)
		co_mutex_destroy(&d->comparing[i]);
	rangelock_destroy(&d->objects);
	free(d->nodes);
	free(d->placing);
	d->nodes = NULL;
	d->placing = NULL;
}

static int dist_init(struct layer *l, struct err *err)
{
	struct dist *d = l->self;

	d->placing = malloc(sizeof(*d->placing));
	d->nodes = calloc(l->kids_n, sizeof(*d->nodes));
	if (d->placing == NULL || d->nodes == NULL) {
		free(d->placing);
		free(d->nodes);
		return err_set(err, -ENOMEM, "out of memory");
	}
	placing_init(d->placing, l->kids_n, (unsigned)d->replicas);
	d->layer = l;
	doubt_init(d);
	rangelock_init(&d->objects);
	co_mutex_init(&d->flush_one);
	co_mutex_init(&d->call_one);
	for (unsigned i = 0; i < COMPARE_MAX; i++)
		co_mutex_init(&d->comparing[i]);
	(void)pthread_mutex_init(&d->lock, NULL); /* cannot fail for a default mutex */
	list_init(&d->marks);
	list_init(&d->others);
	list_init(&d->dirty);
	list_init(&d->flushing);
	list_init(&d->owed);
	list_init(&d->jobs);
	co_wq_init(&d->quiet);
	co_wq_init(&d->work);
	d->is_stopping = false;
	d->is_repairing = false;
	d->broken = 0;
	d->seq = 0;
	d->table = NULL;
	d->marks_n = d->unsettled_n = d->dirty_n = d->owed_n = 0;
	return 0;
}

/* Fewer than `quorum` nodes may be away: the rest knows all that was answered. Or it knows that it has all of that. */
static int check_joined(struct layer *l, struct err *err)
{
	const struct dist *d = l->self;
	unsigned away = 0, first = 0;

	for (unsigned i = l->kids_n; i-- > 0;)
		if (d->nodes[i].error != 0) {
			away++;
			first = i;
		}
	if (away < d->quorum || out_is_enough(d))
		return 0;
	return err_set(
		err, d->nodes[first].error,
		"layer distributed: node %u of %u is away (%s)%s; with quorum=%" PRIu64
		" at most %" PRIu64 " may be, or old data could be served. Bring it back; if it is "
		"lost for good, put an empty store in its place: it is filled from the others, and what "
		"only it had is lost",
		first, l->kids_n, err_name(d->nodes[first].error),
		away > 1 ? " and others too" : "", d->quorum, d->quorum - 1);
}

/* What all nodes can; a node that comes later must be able to as well. */
static void set_caps(struct layer *l)
{
	const struct dist *d = l->self;
	unsigned every = CAN_WRITE | CAN_PARTIAL | CAN_FUA | CAN_MULTI | CAN_PUT_IF | CAN_TRIM |
			 CAN_ZERO;
	unsigned any = d->quorum < d->replicas ? CAN_FLUSH : 0;

	l->pref_io = 0;
	for (unsigned i = 0; i < l->kids_n; i++) {
		if (!d->nodes[i].is_joined)
			continue;
		every &= l->kids[i]->caps;
		any |= l->kids[i]->caps & (CAN_FLUSH | IS_REMOTE | IS_ROTATIONAL | IS_VOLATILE | HAS_HOLES);
		l->pref_io = MAX(l->pref_io, l->kids[i]->pref_io);
	}
	/* Parts are trimmed by zeroing (distributed_write.c). */
	if (!(every & CAN_ZERO) || !(every & CAN_PARTIAL))
		every &= ~(unsigned)(CAN_TRIM | CAN_ZERO);
	l->caps = every | any;
	l->size = 0;
}

static CO_FN int dist_open(struct layer *l, struct err *err)
{
	struct dist *d = l->self;
	struct chan *c = NULL;
	int rc = check_options(l, err);

	if (rc == 0)
		rc = dist_init(l, err);
	if (rc != 0)
		return rc;
	rc = layer_chan_open(l, &c);
	if (rc == 0)
		rc = join_nodes(c);
	if (rc != 0)
		(void)err_set(err, rc, "layer distributed: the nodes can't be listed%s (%s)",
			      rc == -EILSEQ ? ", or their objects \"" DOUBT_NAME
					      "\" contradict each other about nodes left out"
					    : "",
			      err_name(rc));
	else
		rc = check_joined(l, err);
	if (rc == 0) {
		set_caps(l);
		d->is_repairing = true;
		d->has_work = d->marks_n > 0 || d->doubt.out != 0;
		rc = co_spawn(repair_fiber, c);
		if (rc != 0)
			(void)err_set(err, rc, "out of memory");
	}
	if (rc != 0) {
		if (c != NULL)
			layer_chan_close(c);
		dist_free(d);
		return rc;
	}
	for (unsigned i = 0; i < l->kids_n; i++)
		if (!d->nodes[i].is_joined || d->nodes[i].stale_n > 0)
			log_warn(
				"volume is degraded layer=distributed node=%u state=%s stale=%" PRIu64,
				i, d->nodes[i].is_joined ? "stale" : "away",
				(uint64_t)d->nodes[i].stale_n);
	return 0;
}

static CO_FN void dist_close(struct layer *l)
{
	struct dist *d = l->self;

	pthread_mutex_lock(&d->lock);
	d->is_stopping = true;
	co_wq_wake_all(&d->work);
	while (d->is_repairing)
		co_wq_wait(&d->quiet, &d->lock);
	pthread_mutex_unlock(&d->lock);
	dist_free(d);
}

static CO_FN int dist_chan_open(struct chan *c)
{
	struct dist_chan *dc = c->self;

	co_mutex_init(&dc->opening);
	return 0;
}

static CO_FN void dist_chan_close(struct chan *c)
{
	struct dist_chan *dc = c->self;

	wait_for_jobs(c->layer->self);
	doubt_drain(c);
	co_mutex_destroy(&dc->opening);
}

/* --- Reading ---------------------------------------------------------------------------------- */

/* The best of `holders`: not away, then the fastest for what it has to do, or the first. */
static unsigned pick(const struct dist *d, const struct place *at, uint64_t holders, bool in_order)
{
	uint64_t best_score = UINT64_MAX;
	unsigned best = 0;

	for (unsigned r = 0; r < at->n; r++) {
		struct node *n = &d->nodes[at->node[r]];
		uint64_t score = 0;

		if (!(holders & bit(r)))
			continue;
		if (!in_order)
			score = (n->ewma_ns + 1) * (n->inflight + 1);
		score += n->is_away ? UINT64_MAX / 2 : 0;
		if (score < best_score) {
			best_score = score;
			best = r;
		}
	}
	return best;
}

/* Moving averages; the one that was not asked gets a little better, to be asked again some time. */
static void note_time(struct dist *d, const struct place *at, unsigned r, uint64_t ns)
{
	for (unsigned i = 0; i < at->n; i++) {
		_Atomic uint64_t *ewma = &d->nodes[at->node[i]].ewma_ns;
		uint64_t old = *ewma; /* a lost update is a lost sample */

		*ewma = i == r ? (old == 0 ? ns : old - old / 8 + ns / 8) : old - old / 512;
	}
}

struct look {
	struct ext e;
	const struct iov *iov; /* NULL: stat */
	struct obj_stat *st;
	unsigned fl;
	uint64_t missing, broken; /* holders */
	int rc;
};

/* Asks one holder. 0 = done. */
static CO_FN int look_at(struct chan *c, struct look *k, const struct place *at, unsigned r)
{
	struct dist *d = c->layer->self;
	struct node *n = &d->nodes[at->node[r]];
	struct obj obj;
	struct chan *kid;
	uint64_t start;
	int rc = node_chan(c, at->node[r], &kid);

	if (rc != 0)
		return rc;
	place_stored(at, k->e.obj->name, r, &obj);
	atomic_fetch_add(&n->inflight, 1);
	start = now_ns();
	if (k->iov != NULL)
		rc = ch_read(kid, (struct ext){ &obj, k->e.off, k->e.len }, k->iov, k->fl);
	else
		rc = ch_stat(kid, &obj, k->st);
	atomic_fetch_sub(&n->inflight, 1);
	node_result(d, at->node[r], rc);
	if (rc == 0 && k->iov != NULL)
		note_time(d, at, r, now_ns() - start);
	else if (rc == -ENOENT)
		k->missing |= bit(r);
	else if (rc != 0 && !is_transient(rc))
		k->broken |= bit(r);
	return rc;
}

/*
 * All good holders, until one has it. Good ones that don't agree whether there is such an object: it exists, and who
 * has none is mended.
 */
static CO_FN int look(struct chan *c, struct look *k, const struct place *at, uint64_t holders)
{
	struct dist *d = c->layer->self;
	uint64_t left = holders & holders_joined(d, at);
	int rc = -EIO, worst = 0;
	/* stat: etags are each node's own, so always the same one. */
	bool in_order = d->read_from == READ_FIRST || !at->is_shard || k->iov == NULL;

	if (left == 0)
		return holders_error(d, at, all_of(at));
	while (left != 0) {
		unsigned r = pick(d, at, left, in_order);

		left &= ~bit(r);
		rc = look_at(c, k, at, r);
		if (rc == 0)
			break;
		if (rc != -ENOENT)
			worst = rc;
	}
	if (rc == 0) {
		for (unsigned r = 0; r < at->n; r++)
			if ((k->missing | k->broken) & bit(r))
				distrust(c, k->e.obj->name, at, r, k->missing & bit(r));
		return 0;
	}
	/* A good holder says that there is none, and no other one has a broken one: there is none. */
	if (k->missing != 0 && k->broken == 0)
		return -ENOENT;
	return worst;
}

void settle_first(struct chan *c, const char *name, struct place *at)
{
	struct dist *d = c->layer->self;
	struct range_hold hold;
	struct obj obj;

	(void)obj_set(&obj, name); /* marks are made with good names, that have a place */
	(void)place_name(d->placing, name, at);
	rangelock_lock(&d->objects, &hold, obj.hash, 0, UINT64_MAX, false);
	(void)repair_locked(c, name, at, false); /* whether it is settled is looked at again */
	rangelock_unlock(&d->objects, &hold);
}

static CO_FN int look_good(struct chan *c, struct look *k)
{
	struct dist *d = c->layer->self;
	struct range_hold hold;
	struct place at;
	struct view v;
	int rc = place_name(d->placing, k->e.obj->name, &at);

	if (rc == 0)
		rc = d->broken;
	if (rc != 0)
		return rc;
	v = mark_view(d, k->e.obj->name);
	if (unlikely(v.is_unsettled)) {
		settle_first(c, k->e.obj->name, &at);
		v = mark_view(d, k->e.obj->name);
		if (v.is_unsettled)
			return holders_error(d, &at, all_of(&at));
	}
	if (likely(all_of(&at) & ~v.stale & ~v.behind & holders_joined(d, &at))) {
		rc = look(c, k, &at, all_of(&at) & ~v.stale & ~v.behind);
		if (rc == 0 || rc == -ENOENT || v.behind == 0)
			return rc;
	}
	/* What they are behind of is done when the range is free. */
	rangelock_lock(&d->objects, &hold, k->e.obj->hash, k->e.off, MAX(k->e.len, 1U), true);
	v = mark_view(d, k->e.obj->name);
	rangelock_unlock(&d->objects, &hold);
	return look(c, k, &at, all_of(&at) & ~v.stale);
}

static CO_FN int dist_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	struct look k = { .e = e, .iov = iov, .fl = fl };

	return look_good(c, &k);
}

static CO_FN int dist_stat(struct chan *c, const struct obj *obj, struct obj_stat *st)
{
	struct look k = { .e = { obj, 0, UINT64_MAX }, .st = st };

	return look_good(c, &k);
}

static CO_FN int dist_cache(struct chan *c, struct ext e)
{
	struct dist *d = c->layer->self;
	struct chan *kid;
	struct place at;
	struct obj obj;
	uint64_t good;
	unsigned r;

	if (place_name(d->placing, e.obj->name, &at) != 0)
		return 0;
	good = all_of(&at) & ~mark_view(d, e.obj->name).stale & holders_up(d, &at);
	if (good == 0)
		return 0;
	r = pick(d, &at, good, d->read_from == READ_FIRST);
	if (node_chan(c, at.node[r], &kid) != 0)
		return 0;
	place_stored(&at, e.obj->name, r, &obj);
	return ch_cache(kid, (struct ext){ &obj, e.off, e.len });
}

/* --- Status ----------------------------------------------------------------------------------- */

static void dist_status(struct layer *l, struct info *i)
{
	struct dist *d = l->self;
	bool is_degraded = d->broken != 0 || d->unsettled_n != 0;
	char key[32], value[160];

	for (unsigned n = 0; n < l->kids_n; n++) {
		const struct node *node = &d->nodes[n];
		const char *state = !node->is_joined || node->is_away ? "away"
				    : node->stale_n != 0              ? "catching up"
								      : "good";

		is_degraded = is_degraded || strcmp(state, "good") != 0;
		(void)snprintf(key, sizeof(key), "node-%u", n);
		(void)snprintf(value, sizeof(value),
			       "%s, %" PRIu64 " stale, %" PRIu64 " caught up, reads in %" PRIu64
			       " us%s%s",
			       state, (uint64_t)node->stale_n, (uint64_t)node->caught_up_n,
			       (uint64_t)node->ewma_ns / 1000, node->error ? ", last error " : "",
			       node->error ? err_name(node->error) : "");
		i->add(i, key, value);
	}
	info_number(i, "regions_in_doubt", d->doubt.n);
	info_number(i, "objects_to_compare", d->unsettled_n);
	i->add(i, "state", d->broken != 0 ? "stopped" : is_degraded ? "degraded" : "good");
}

/* --- Making and removing ---------------------------------------------------------------------- */

/* The places of the nodes; a store that needs none says -ENOTSUP. */
static CO_FN int dist_create(struct layer *l, const struct obj *obj, uint64_t size, bool force,
			     struct err *err)
{
	for (unsigned i = 0; i < l->kids_n; i++) {
		int rc = layer_create(l->kids[i], obj, size, force, err);

		if (rc != 0 && rc != -ENOTSUP)
			return rc;
	}
	return 0;
}

static CO_FN int dist_destroy(struct layer *l, const struct obj *obj, struct err *err)
{
	for (unsigned i = 0; i < l->kids_n; i++) {
		int rc = layer_destroy(l->kids[i], obj, err);

		if (rc != 0 && rc != -ENOTSUP)
			return rc;
	}
	return 0;
}

const struct layer_ops distributed_layer = {
	.name = "distributed",
	.help = "objects on several nodes, each shard on some of them",
	.opts = options,
	.keyed_kids = true,
	.may_miss_kids = true,
	.self_size = sizeof(struct dist),
	.chan_size = sizeof(struct dist_chan),
	.min_kids = 1,
	.max_kids = NODES_MAX,
	.open = dist_open,
	.close = dist_close,
	.chan_open = dist_chan_open,
	.chan_close = dist_chan_close,
	.read = dist_read,
	.write = dist_write,
	.zero = dist_zero,
	.trim = dist_trim,
	.flush = dist_flush,
	.cache = dist_cache,
	.stat = dist_stat,
	.put = dist_put,
	.del = dist_del,
	.list = dist_list,
	.create = dist_create,
	.destroy = dist_destroy,
	.status = dist_status,
};
