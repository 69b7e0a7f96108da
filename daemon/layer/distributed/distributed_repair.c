/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Makes replicas equal again: whole objects are copied from a good holder to a stale one, under the object's lock, so
 * that never newer data is overwritten. One fiber per volume looks for work when it is told that there is some, and
 * every `recheck` at nodes that are away; it copies `rebuild` objects at a time, and rests between copies as long as
 * a copy takes while others use the volume.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/distributed/distributed.h"
#include "nbdrs/buf.h"
#include "nbdrs/io.h"
#include "nbdrs/reactor.h"

/* ---- one object ---- */

/* The object on a good holder: *data (of buf_get) and its size, or -ENOENT. */
static CO_FN int fetch(struct chan *c, const char *name, const struct place *at, unsigned r,
		       void **data, uint64_t *size)
{
	struct obj obj;
	struct obj_stat st;
	struct chan *kid;
	struct iovec v;
	struct iov iov;
	int rc = node_chan(c, at->node[r], &kid);

	if (rc != 0)
		return rc;
	place_stored(at, name, r, &obj);
	rc = ch_stat(kid, &obj, &st);
	if (rc != 0)
		return rc;
	if (st.size > BUF_MAX)
		return -EFBIG;
	*size = st.size;
	*data = buf_get(MAX(st.size, 1U));
	if (*data == NULL)
		return -ENOMEM;
	iov = iov_one(&v, *data, st.size);
	if (st.size > 0)
		rc = ch_read(kid, (struct ext){ &obj, 0, st.size }, &iov, 0);
	if (rc != 0)
		buf_put(*data, MAX(st.size, 1U));
	return rc;
}

/* Puts it on holder `r`, or deletes it there where the good one has none (is_hole). */
static CO_FN int store(struct chan *c, const char *name, const struct place *at, unsigned r,
		       void *data, uint64_t size, bool is_hole)
{
	struct obj obj;
	struct iovec v;
	struct iov iov = iov_one(&v, data, size);
	struct put put = { .obj = &obj, .iov = &iov, .fl = IO_FUA };
	struct chan *kid;
	int rc = node_chan(c, at->node[r], &kid);

	if (rc != 0)
		return rc;
	place_stored(at, name, r, &obj);
	return is_hole ? ch_del(kid, &obj, 1) : ch_put(kid, &put, NULL);
}

/* Makes holder `r` equal to holder `from`. */
static CO_FN int copy(struct chan *c, const char *name, const struct place *at, unsigned from,
		      unsigned r)
{
	struct dist *d = c->layer->self;
	uint64_t size = 0;
	void *data = NULL;
	int rc = fetch(c, name, at, from, &data, &size);
	bool is_hole = rc == -ENOENT;

	if (!is_hole)
		node_result(d, at->node[from], rc);
	if (rc != 0 && !is_hole)
		return rc;
	rc = store(c, name, at, r, data, size, is_hole);
	node_result(d, at->node[r], rc);
	if (rc != 0)
		d->nodes[at->node[r]].not_before = now_ns() + d->recheck;
	if (!is_hole)
		buf_put(data, MAX(size, 1U));
	return rc;
}

static void set_good(struct dist *d, const char *name, const struct place *at, unsigned r)
{
	struct mark *m;

	pthread_mutex_lock(&d->lock);
	m = mark_find(d, name);
	if (m != NULL && m->stale & bit(r)) {
		mark_set_stale(d, m, at, m->stale & ~bit(r));
		m->recorded = 0; /* the new good one must learn of the others */
		m->lingering |= bit(r);
	}
	pthread_mutex_unlock(&d->lock);
	atomic_fetch_add(&d->nodes[at->node[r]].caught_up_n, 1);
}

/* Two objects in memory, for offload: a shard takes a while. */
struct comparison {
	const void *a, *b;
	size_t len;
};

static int compare(void *arg)
{
	const struct comparison *k = arg;

	return memcmp(k->a, k->b, k->len) == 0 ? 0 : -EILSEQ;
}

/* Whether holder `r` has the same: `size` bytes at `data`, or (is_hole) no such object. Unknown is no. */
static CO_FN bool is_equal(struct chan *c, const char *name, const struct place *at, unsigned r,
			   void *data, uint64_t size, bool is_hole)
{
	struct comparison k = { .a = data };
	uint64_t its_size = 0;
	void *its = NULL;
	int rc = fetch(c, name, at, r, &its, &its_size);

	node_result(c->layer->self, at->node[r], rc);
	if (rc != 0)
		return is_hole && rc == -ENOENT;
	k.b = its;
	k.len = size;
	rc = !is_hole && its_size == size ? offload(compare, &k) : -EILSEQ;
	buf_put(its, MAX(its_size, 1U));
	return rc == 0;
}

/*
 * Of the replicas on `holders`, the first that answers, and those that are equal to it; 0 with *rc when none answers.
 * Those that come before it, or whose node is away, are not asked: they are unequal as far as anybody knows.
 */
static CO_FN uint64_t compare_holders(struct chan *c, const char *name, const struct place *at,
				      uint64_t holders, int *rc)
{
	struct dist *d = c->layer->self;
	uint64_t same = 0, size = 0, rest;
	bool is_hole = false;
	void *data = NULL;

	*rc = -EIO;
	for (unsigned r = 0; r < at->n && same == 0; r++) {
		if (!(holders & bit(r)))
			continue;
		*rc = fetch(c, name, at, r, &data, &size);
		node_result(d, at->node[r], *rc);
		is_hole = *rc == -ENOENT;
		if (*rc == 0 || is_hole)
			same = bit(r);
	}
	if (same == 0)
		return 0;
	rest = holders & holders_up(d, at) & ~(same | (same - 1));
	for (unsigned r = 0; r < at->n; r++)
		if (rest & bit(r) && is_equal(c, name, at, r, data, size, is_hole))
			same |= bit(r);
	if (!is_hole)
		buf_put(data, MAX(size, 1U));
	return same;
}

/* Of good replicas that may differ, the first that answers is the one, and those that are not equal to it are stale. */
static CO_FN int choose(struct chan *c, const char *name, const struct place *at)
{
	struct dist *d = c->layer->self;
	struct co_mutex *turn = &d->comparing[at->shard % COMPARE_MAX];
	uint64_t good = all_of(at) & ~mark_view(d, name).stale, same;
	struct mark *m;
	int rc;

	co_mutex_lock(turn);
	same = compare_holders(c, name, at, good & holders_joined(d, at), &rc);
	co_mutex_unlock(turn);
	if (same == 0)
		return rc;
	pthread_mutex_lock(&d->lock);
	m = mark_find(d, name);
	if (m != NULL) {
		mark_set_stale(d, m, at, m->stale | (good & ~same));
		mark_set_unsettled(d, m, false);
		mark_done(d, m);
	}
	pthread_mutex_unlock(&d->lock);
	return 0;
}

/* Holders whose node is up, and has not refused a copy a moment ago. */
static uint64_t holders_ready(const struct dist *d, const struct place *at)
{
	uint64_t now = now_ns(), mask = holders_up(d, at);

	for (unsigned r = 0; r < at->n; r++)
		if (d->nodes[at->node[r]].not_before > now)
			mask &= ~bit(r);
	return mask;
}

int repair_locked(struct chan *c, const char *name, const struct place *at, bool is_needed)
{
	struct dist *d = c->layer->self;
	struct view v = mark_view(d, name);
	uint64_t good, ready;
	int rc = v.is_unsettled ? choose(c, name, at) : 0;

	if (c->layer->want_ro)
		return rc; /* who was not chosen is not read as long as this is open */
	if (rc == 0)
		rc = record(c, name, at);
	if (rc != 0)
		return rc;
	v = mark_view(d, name);
	good = all_of(at) & ~v.stale & holders_joined(d, at);
	ready = v.stale & (is_needed ? holders_joined(d, at) : holders_ready(d, at));
	for (unsigned r = 0; r < at->n; r++) {
		int copied = ready & bit(r) ? -EIO : 0;

		for (unsigned from = 0; from < at->n && copied != 0; from++)
			if (good & bit(from))
				copied = copy(c, name, at, from, r);
		if (ready & bit(r) && copied == 0)
			set_good(d, name, at, r);
		else if (copied != 0)
			rc = copied;
	}
	if (mark_view(d, name).stale != v.stale) {
		int recorded = record(c, name, at);

		rc = rc != 0 ? rc : recorded;
	}
	forget(c, name, at);
	v = mark_view(d, name);
	if (v.stale == 0)
		return 0;
	return rc != 0 ? rc : holders_error(d, at, v.stale);
}

void distrust(struct chan *c, const char *name, const struct place *at, unsigned r, bool is_missing)
{
	struct dist *d = c->layer->self;
	struct range_hold hold;
	struct obj obj;
	struct obj_stat st;
	struct chan *kid;
	uint64_t good;
	bool is_so = !is_missing;
	int rc;

	if (c->layer->want_ro)
		return;
	(void)obj_set(&obj, name); /* came from above as an object */
	rangelock_lock(&d->objects, &hold, obj.hash, 0, UINT64_MAX, false);
	good = all_of(at) & ~mark_view(d, name).stale & holders_joined(d, at);
	/* It may have come or gone since: now that nobody changes it, is it here missing and there not? */
	for (unsigned i = 0; i < at->n && is_missing && good & bit(r); i++) {
		if (!(good & bit(i)) || node_chan(c, at->node[i], &kid) != 0)
			continue;
		place_stored(at, name, i, &obj);
		rc = ch_stat(kid, &obj, &st);
		if (i == r && rc != -ENOENT)
			is_missing = is_so = false;
		else if (i != r && rc == 0)
			is_so = true;
	}
	if (is_so && good & bit(r) && good != bit(r)) {
		struct mark *m;

		log_warn("replica is %s layer=distributed node=%u object=%s",
			 is_missing ? "missing" : "unreadable", at->node[r], name);
		pthread_mutex_lock(&d->lock);
		m = mark_need(d, name);
		if (m != NULL && (all_of(at) & ~m->stale & ~bit(r)) != 0)
			mark_set_stale(d, m, at, m->stale | bit(r));
		pthread_mutex_unlock(&d->lock);
		(void)repair_locked(c, name, at, false); /* tried again in the background */
	}
	rangelock_unlock(&d->objects, &hold);
}

/* ---- all of them ---- */

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

	(void)place_name(d->placing, "size", &nodes); /* on all of them */
	int rc;

	if (!is_gone)
		return make_ready(c, &nodes);
	rc = doubt_end(c);
	if (rc != 0)
		return rc;
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
