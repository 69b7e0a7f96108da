/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Mends a volume in the background: one fiber looks for objects whose replicas are not equal (distributed_equal.c)
 * when it is told that there are some, and every `recheck` at nodes that are away; it works on `rebuild` objects at a
 * time, and rests between them as long as one takes while others use the volume. And what has to be mended before a
 * volume ends.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/distributed/distributed.h"
#include "nbdrs/reactor.h"

/* ---- all objects ---- */

struct round {
	struct chan *c;
	uint64_t left; /* marks still to look at */
};

static bool needs_work(struct dist *d, const struct mark *m, const struct place *at)
{
	uint64_t up = holders_ready(d, at);

	if (m->is_unsettled || m->stale & up || m->stale & ~m->recorded)
		return up != 0;
	return m->lingering != 0 && up == all_of(at);
}

/* So many marks are looked at before others get their turn. */
enum { LOOK_N = 128 };

/* One of the next LOOK_N objects that needs work; false = none. With the lock held. */
static bool take_near(struct round *rd, char name[OBJ_NAME_MAX + 1], struct place *at)
{
	struct dist *d = rd->c->layer->self;
	bool found = false;

	for (unsigned i = 0; i < LOOK_N && !found && rd->left > 0 && !list_empty(&d->marks); i++) {
		struct mark *m = list_entry(d->marks.next, struct mark, all);

		rd->left--;
		list_del(&m->all);
		list_add(&d->marks, &m->all);
		(void)place_name(d->placing, m->name,
				 at); /* marks are made with names that have a place */
		found = needs_work(d, m, at);
		if (found)
			(void)snprintf(name, OBJ_NAME_MAX + 1, "%s", m->name);
	}
	return found;
}

/* The next object to work on; false = the round is over. */
static CO_FN bool take(struct round *rd, char name[OBJ_NAME_MAX + 1], struct place *at)
{
	struct dist *d = rd->c->layer->self;
	bool found = false;

	while (!found && rd->left > 0 && !d->is_stopping && d->marks_n > 0) {
		pthread_mutex_lock(&d->lock);
		found = take_near(rd, name, at);
		pthread_mutex_unlock(&d->lock);
		if (!found)
			co_yield();
	}
	return found;
}

static bool is_busy(const struct dist *d)
{
	for (unsigned i = 0; i < d->placing->nodes; i++)
		if (d->nodes[i].inflight != 0)
			return true;
	return false;
}

static CO_FN void worker(void *arg)
{
	struct round *rd = arg;
	struct dist *d = rd->c->layer->self;
	char name[OBJ_NAME_MAX + 1];
	struct place at;

	while (take(rd, name, &at)) {
		struct range_hold hold;
		struct obj obj;
		uint64_t start = now_ns();

		(void)obj_set(&obj, name); /* came from above as an object */
		rangelock_lock(&d->objects, &hold, obj.hash, 0, UINT64_MAX, false);
		(void)repair_locked(rd->c, name, &at,
				    false); /* what stays stale is looked at again */
		rangelock_unlock(&d->objects, &hold);
		if (is_busy(d))
			co_sleep(MIN(now_ns() - start, UINT64_C(1000000000)));
	}
}

uint64_t stale_in_all(const struct dist *d)
{
	uint64_t n = 0;

	for (unsigned i = 0; i < d->placing->nodes; i++)
		n += d->nodes[i].stale_n;
	return n;
}

void repair_all(struct chan *c)
{
	struct dist *d = c->layer->self;
	struct round rd = { c, d->marks_n };
	struct co_group group = CO_GROUP_INIT;
	uint64_t before = stale_in_all(d), unsettled = d->unsettled_n, after;

	for (uint64_t i = 0; i < d->rebuild && rd.left > 0; i++)
		co_group_spawn(&group, worker, &rd);
	co_group_wait(&group);
	after = stale_in_all(d);
	if (after < before)
		log_info("caught up layer=distributed objects=%llu left=%llu",
			 (unsigned long long)(before - after), (unsigned long long)after);
	if (unsettled > 0 && d->unsettled_n == 0)
		log_info("replicas have been compared layer=distributed objects=%llu",
			 (unsigned long long)unsettled);
}

/* ---- records, all of a node ---- */

struct names {
	struct obj *v;
	unsigned n;
};

static int add_record(void *arg, const char *stored, uint64_t size)
{
	struct names *all = arg;
	struct obj *v;
	char name[OBJ_NAME_MAX + 1];
	uint64_t seq;
	unsigned r;

	if (!record_parse(stored, name, &r, &seq))
		return 0; /* not ours */
	v = reallocarray(all->v, all->n + 1U, sizeof(*v));
	if (v == NULL)
		return -ENOMEM;
	all->v = v;
	return obj_set(&v[all->n++], stored);
}

static CO_FN int delete_all_records(struct each *e, unsigned node, struct chan *kid)
{
	struct names all = { NULL, 0 };
	int rc = ch_list(kid, RECORD_PREFIX, add_record, &all);

	if (rc == 0 && all.n > 0)
		rc = ch_del(kid, all.v, all.n);
	free(all.v);
	return rc;
}

/* ---- nodes that are away ---- */

/* Asks the nodes that are away, each at most once in `recheck`. */
static CO_FN void call_nodes(struct chan *c)
{
	struct dist *d = c->layer->self;
	struct obj size;

	(void)obj_set(&size, "size"); /* a good name */
	co_mutex_lock(&d->call_one);
	for (unsigned i = 0; i < d->placing->nodes && !d->is_stopping; i++) {
		struct node *n = &d->nodes[i];
		struct obj_stat st;
		struct chan *kid;
		int rc;

		if ((n->is_joined && !n->is_away) || n->not_before > now_ns())
			continue;
		if (!n->is_joined) {
			rc = join_late(c, i);
		} else {
			rc = node_chan(c, i, &kid);
			if (rc == 0)
				rc = ch_stat(kid, &size, &st);
			node_result(d, i, rc);
		}
		if (!n->is_joined || n->is_away) {
			n->error = rc;
			n->not_before = now_ns() + d->recheck;
		}
	}
	co_mutex_unlock(&d->call_one);
}

/* ---- the end of a volume ---- */

/* Before it is given up: rounds in which a node did not answer, and in which nothing could be copied. */
enum { DEAF_MAX = 2, VAIN_MAX = 8 };

/* The first node that is away or not caught up; -1 = none. */
static int not_ready(const struct dist *d, bool *is_away)
{
	for (unsigned i = 0; i < d->placing->nodes; i++) {
		*is_away = !d->nodes[i].is_joined || d->nodes[i].is_away;
		if (*is_away || d->nodes[i].stale_n != 0)
			return (int)i;
	}
	return -1;
}

/* Brings all nodes back and catches them up, now. */
static CO_FN int make_ready(struct chan *c, const struct place *nodes)
{
	struct dist *d = c->layer->self;
	unsigned deaf = 0, vain = 0;
	bool is_away = false;
	int node;

	while ((node = not_ready(d, &is_away)) >= 0) {
		uint64_t before = stale_in_all(d);

		for (unsigned i = 0; i < nodes->n; i++)
			d->nodes[i].not_before = 0;
		call_nodes(c);
		repair_all(c);
		node = not_ready(d, &is_away);
		deaf += node >= 0 && is_away;
		vain = stale_in_all(d) < before ? 0 : vain + 1;
		if (node >= 0 && (deaf == DEAF_MAX || vain == VAIN_MAX)) {
			log_error("node is away or not caught up, the volume can't be removed "
				  "layer=distributed node=%d",
				  node);
			return holders_error(d, nodes, bit((unsigned)node));
		}
	}
	return 0;
}

int end_volume(struct chan *c, bool is_gone)
{
	struct dist *d = c->layer->self;
	struct place nodes;
	struct each e = { .c = c, .at = &nodes, .fn = delete_all_records };

	int rc;

	(void)place_name(d->placing, "size", &nodes); /* on all of them */
	if (!is_gone) {
		rc = make_ready(c, &nodes);
		if (rc == 0 && d->unsettled_n > 0)
			repair_all(c);
		return rc != 0 ? rc : doubt_end(c);
	}
	each_holder(&e, all_of(&nodes));
	pthread_mutex_lock(&d->lock);
	list_for_each(m, &d->marks, struct mark, all)
	{
		m->lingering = e.rc == 0 ? 0 : m->lingering;
		mark_done(d, m);
	}
	pthread_mutex_unlock(&d->lock);
	return e.rc;
}

/* ---- the fiber ---- */

void repair_fiber(void *arg)
{
	struct chan *c = arg;
	struct dist *d = c->layer->self;

	for (;;) {
		bool stop;

		pthread_mutex_lock(&d->lock);
		if (!d->is_stopping && !d->has_work)
			(void)co_wq_wait_for(&d->work, &d->lock, MIN(d->recheck, d->clean));
		d->has_work = false;
		stop = d->is_stopping;
		pthread_mutex_unlock(&d->lock);
		if (stop)
			break;
		call_nodes(c);
		if (!c->layer->want_ro) {
			repair_all(c);
			out_review(c);
			doubt_clean(c, d->clean);
		}
	}
	if (!c->layer->want_ro)
		doubt_clean(c, 0);
	layer_chan_close(c);
	pthread_mutex_lock(&d->lock);
	d->is_repairing = false;
	co_wq_wake_all(&d->quiet);
	pthread_mutex_unlock(&d->lock);
}
