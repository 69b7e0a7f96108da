/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * How nodes of a distributed volume come in: at open, and later those that were away then.
 *
 * At open every node that is there is asked for its records (one listing), and the marks are made from them, the
 * newest record first: a record counts unless the holder that has it is stale by a newer one, or the holder it names
 * has itself put a newer record, which only good ones do. So one holder always stays good.
 *
 * A node that comes later may have records of changes that nobody else knows. They were never answered without error
 * (fewer than `quorum` nodes may be away at open, or they are left out: distributed_out.c), and meanwhile others have
 * been read and written: such a record is turned round, the newcomer is the stale one.
 *
 * What was in doubt when the volume was open last (distributed_doubt.c) is unsettled, unless a record says who is
 * stale. A node that comes later has nothing to say about that: others know of all that was begun.
 *
 * A node without a single shard, while others have some that belong there, was emptied or replaced: its replicas are
 * stale. Nothing else would tell a lost replica from a hole.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "layer/distributed/distributed.h"

/* ---- records ---- */

struct seen {
	char *name;
	uint64_t seq;
	uint8_t holder, target;
};

struct book {
	struct dist *d;
	struct seen *v;
	size_t n, room;
};

static void book_free(struct book *b)
{
	for (size_t i = 0; i < b->n; i++)
		free(b->v[i].name);
	free(b->v);
}

static int book_add(struct book *b, const char *name, uint64_t seq, unsigned holder,
		    unsigned target)
{
	if (b->n == b->room) {
		size_t room = b->room ? 2 * b->room : 64;
		struct seen *v = reallocarray(b->v, room, sizeof(*v));

		if (v == NULL)
			return -ENOMEM;
		b->v = v;
		b->room = room;
	}
	b->v[b->n] = (struct seen){ strdup(name), seq, (uint8_t)holder, (uint8_t)target };
	return b->v[b->n].name != NULL ? (int)(b->n++, 0) : -ENOMEM;
}

struct reading {
	struct book *book;
	unsigned node;
};

static int read_record(void *arg, const char *stored, uint64_t size)
{
	struct reading *rd = arg;
	struct dist *d = rd->book->d;
	char name[OBJ_NAME_MAX + 1];
	struct place at;
	uint64_t seq;
	unsigned r;
	int holder;

	if (!record_parse(stored, name, &r, &seq) || place_name(d->placing, name, &at) != 0 ||
	    r >= at.n)
		return 0; /* not ours */
	holder = place_holder(&at, rd->node);
	if (holder < 0 || (unsigned)holder == r)
		return 0;
	pthread_mutex_lock(&d->lock); /* who comes late does so while others write */
	d->seq = MAX(d->seq, seq);
	pthread_mutex_unlock(&d->lock);
	return book_add(rd->book, name, seq, (unsigned)holder, r);
}

static int by_name_newest_first(const void *a, const void *b)
{
	const struct seen *x = a, *y = b;
	int order = strcmp(x->name, y->name);

	if (order != 0)
		return order;
	return x->seq < y->seq ? 1 : x->seq > y->seq ? -1 : 0;
}

/* The marks of one object from its records v[0..n), newest first. */
static int mark_from(struct dist *d, const struct seen *v, size_t n)
{
	uint64_t stale = 0, vouched = 0, named = 0, have[NODES_MAX] = { 0 };
	struct place at;
	struct mark *m;

	(void)place_name(d->placing, v->name, &at); /* read_record tried it */
	for (size_t i = 0; i < n; i++) {
		named |= bit(v[i].target);
		if (stale & bit(v[i].holder) || vouched & bit(v[i].target))
			continue;
		stale |= bit(v[i].target);
		vouched |= bit(v[i].holder);
		have[v[i].target] |= bit(v[i].holder);
	}
	pthread_mutex_lock(&d->lock);
	m = mark_need(d, v->name);
	if (m != NULL) {
		mark_set_stale(d, m, &at, stale);
		m->lingering = named & ~stale;
		for (unsigned r = 0; r < at.n; r++)
			if (stale & bit(r) && (all_of(&at) & ~stale & ~have[r]) == 0)
				m->recorded |= bit(r);
	}
	pthread_mutex_unlock(&d->lock);
	return m != NULL ? 0 : -ENOMEM;
}

static int mark_all(struct book *b)
{
	int rc = 0;

	if (b->n > 0)
		qsort(b->v, b->n, sizeof(*b->v), by_name_newest_first);
	for (size_t from = 0, to; from < b->n && rc == 0; from = to) {
		for (to = from + 1; to < b->n && strcmp(b->v[from].name, b->v[to].name) == 0;)
			to++;
		rc = mark_from(b->d, b->v + from, to - from);
	}
	return rc;
}

/* ---- nodes that lost everything ---- */

struct listing {
	struct dist *d;
	unsigned node;
	uint64_t emptied; /* nodes */
};

static int find_shard(void *arg, const char *stored, uint64_t size)
{
	const struct listing *li = arg;
	char name[OBJ_NAME_MAX + 1];
	struct place at;
	unsigned r;

	return place_parse(li->d->placing, stored, li->node, name, &at, &r) && at.is_shard;
}

/* All that lies here and belongs on an emptied node as well is stale there. */
static int mark_emptied(void *arg, const char *stored, uint64_t size)
{
	const struct listing *li = arg;
	struct dist *d = li->d;
	char name[OBJ_NAME_MAX + 1];
	struct place at;
	uint64_t lost = 0;
	struct mark *m;
	unsigned r;

	if (!place_parse(d->placing, stored, li->node, name, &at, &r))
		return 0;
	for (unsigned i = 0; i < at.n; i++)
		if (li->emptied & bit(at.node[i]))
			lost |= bit(i);
	if (lost == 0)
		return 0;
	pthread_mutex_lock(&d->lock);
	m = mark_need(d, name);
	/* What is not good here says nothing about others. */
	if (m != NULL && !(m->stale & bit(r)))
		mark_set_stale(d, m, &at, m->stale | lost);
	if (m != NULL)
		mark_done(d, m);
	pthread_mutex_unlock(&d->lock);
	return m != NULL ? 0 : -ENOMEM;
}

/* Looks whether one of `among` lost what it had. A node that can't be listed is left alone. */
static CO_FN int find_emptied(struct chan *c, uint64_t among)
{
	struct dist *d = c->layer->self;
	struct listing li = { .d = d };
	uint64_t filled = 0;
	struct chan *kid;

	for (unsigned i = 0; i < d->placing->nodes; i++) {
		int rc;

		if (!d->nodes[i].is_joined || node_chan(c, i, &kid) != 0)
			continue;
		li.node = i;
		rc = ch_list(kid, "block-", find_shard, &li);
		if (rc > 0)
			filled |= bit(i);
		else if (rc == 0 && among & bit(i))
			li.emptied |= bit(i);
	}
	for (unsigned i = 0; i < d->placing->nodes && li.emptied != 0; i++) {
		int rc = 0;

		li.node = i;
		if (filled & bit(i) && node_chan(c, i, &kid) == 0)
			rc = ch_list(kid, "", mark_emptied, &li);
		if (rc != 0)
			return rc;
	}
	for (unsigned i = 0; i < d->placing->nodes; i++)
		if (li.emptied & bit(i) && d->nodes[i].stale_n != 0)
			log_warn("node is empty and will be filled again layer=distributed node=%u",
				 i);
	return 0;
}

/* ---- joining ---- */

/* What a node must be able to do once the volume has said that it can. */
enum { NEEDED = CAN_WRITE | CAN_PARTIAL | CAN_TRIM | CAN_ZERO | CAN_PUT_IF };

static CO_FN int read_records(struct chan *c, unsigned node, struct book *b)
{
	struct reading rd = { b, node };
	struct chan *kid;
	int rc = node_chan(c, node, &kid);

	if (rc == 0)
		rc = ch_list(kid, RECORD_PREFIX, read_record, &rd);
	return rc;
}

int join_nodes(struct chan *c)
{
	struct dist *d = c->layer->self;
	struct book b = { .d = d };
	uint64_t there = 0, joined = 0;
	int rc = 0;

	for (unsigned i = 0; i < d->placing->nodes && rc != -ENOMEM; i++) {
		d->nodes[i].error = rc = doubt_read(c, i);
		there |= rc == 0 ? bit(i) : 0;
	}
	if (rc != -ENOMEM)
		rc = out_find(d, there);
	if (rc == -ENOMEM || rc == -EILSEQ)
		return rc;
	for (unsigned i = 0; i < d->placing->nodes && rc != -ENOMEM; i++) {
		rc = d->nodes[i].error;
		if (rc == 0 && d->doubt.out & bit(i))
			continue; /* comes late */
		if (rc == 0)
			rc = read_records(c, i, &b);
		if (rc == -ENXIO && c->layer->kids[i]->open_error != 0)
			rc = c->layer->kids[i]->open_error; /* logged already */
		else if (rc != 0)
			log_warn("%s layer=distributed node=%u error=%s",
				 rc == -EILSEQ  ? "node's object \"" DOUBT_NAME "\" is damaged"
				 : rc == -EFBIG ? "nodes' objects \"" DOUBT_NAME "\" name too much"
						: "node can't be listed",
				 i, err_name(rc));
		d->nodes[i].error = rc;
		d->nodes[i].is_joined = rc == 0;
		joined |= rc == 0 ? bit(i) : 0;
	}
	if (rc != -ENOMEM)
		rc = mark_all(&b);
	if (rc == 0)
		rc = find_emptied(c, joined);
	if (rc == 0)
		rc = doubt_mark_all(c);
	book_free(&b);
	return rc;
}

/* The newcomer alone knows of these changes: it is the stale one. */
static int turn_round(struct dist *d, const struct seen *s)
{
	struct place at;
	struct mark *m;

	(void)place_name(d->placing, s->name, &at); /* read_record tried it */
	pthread_mutex_lock(&d->lock);
	m = mark_need(d, s->name);
	if (m != NULL) {
		if ((all_of(&at) & ~m->stale & ~bit(s->holder)) != 0)
			mark_set_stale(d, m, &at, m->stale | bit(s->holder));
		if (!(m->stale & bit(s->target)))
			m->lingering |= bit(s->target);
		mark_done(d, m);
	}
	pthread_mutex_unlock(&d->lock);
	return m != NULL ? 0 : -ENOMEM;
}

int join_late(struct chan *c, unsigned node)
{
	struct dist *d = c->layer->self;
	struct layer *kid = c->layer->kids[node];
	struct book b = { .d = d };
	struct err err = { "" };
	int rc = 0;

	if (kid->open_error != 0)
		rc = layer_kid_open(c->layer, node, &err);
	if (rc != 0) {
		log_debug("node still away layer=distributed node=%u error=\"%s\"", node, err.msg);
		return rc;
	}
	if (c->layer->caps & ~kid->caps & NEEDED) {
		log_error("node can do less than the others, not used layer=distributed node=%u",
			  node);
		return -ENOTSUP;
	}
	rc = read_records(c, node, &b);
	for (size_t i = 0; i < b.n && rc == 0; i++)
		rc = turn_round(d, &b.v[i]);
	book_free(&b);
	if (rc == 0)
		rc = out_end(c);
	if (rc != 0)
		return rc;
	co_mutex_lock(&d->flush_one);
	doubt_joins(d, node);
	/* Before anything is written to it. */
	d->nodes[node].is_away = true;
	d->nodes[node].is_joined = true;
	co_mutex_unlock(&d->flush_one);
	rc = find_emptied(c, bit(node));
	if (rc != 0) {
		d->nodes[node].is_joined = false;
		return rc;
	}
	node_result(d, node, 0);
	return 0;
}
