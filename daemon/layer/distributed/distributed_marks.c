/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What a distributed volume knows of its nodes, and of objects whose replicas are not equal.
 *
 * A mark says which holders of one object are stale. It is durable once each good holder's node has the object
 * stale-NAME-R-SEQ ("holder R of NAME is stale"). Marks are set in memory first, under the lock, then recorded, then
 * the change that caused them is answered.
 *
 * Rules that keep one good replica of everything:
 *	- a change of a part goes to good holders only, and counts only those that are still good when it is done: of
 *	  two that run at the same time and each lose another holder, the first one to settle wins;
 *	- a holder on which a record can't be put is treated as one that missed the change;
 *	- SEQ grows. Where records contradict each other after a crash, the newest is right: it was put on a holder
 *	  that was good then, about one that was not. Older ones on the latter are out of date (distributed_join.c).
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "layer/distributed/distributed.h"
#include "nbdrs/reactor.h"

enum { MISSES_MAX = 3 };

/* ---- nodes ---- */

/* What says nothing against the node: its answers, and our own limits. */
static bool is_answer(int rc)
{
	return rc == 0 || rc == -ENOENT || rc == -EEXIST || rc == -ESTALE || rc == -ENOTSUP ||
	       rc == -EINVAL || rc == -ENAMETOOLONG || rc == -EFBIG || rc == -ENOMEM;
}

int node_chan(struct chan *c, unsigned node, struct chan **out)
{
	struct dist_chan *dc = c->self;
	int rc;

	*out = c->kids[node];
	if (likely(*out != NULL))
		return 0;
	co_mutex_lock(&dc->opening);
	rc = chan_kid(c, node, out);
	co_mutex_unlock(&dc->opening);
	return rc;
}

/* A node may come and go all the time. */
static void log_node(struct dist *d, unsigned node, int rc)
{
	unsigned suppressed;

	if (!log_gate_open(&d->gate, &suppressed))
		return;
	if (rc == 0)
		log_info("node is back layer=distributed node=%u suppressed=%u", node, suppressed);
	else
		log_warn("node is away layer=distributed node=%u error=%s suppressed=%u", node,
			 err_name(rc), suppressed);
}

void node_result(struct dist *d, unsigned node, int rc)
{
	struct node *n = &d->nodes[node];

	if (is_answer(rc)) {
		if (n->misses != 0)
			n->misses = 0;
		if (n->is_away && atomic_exchange(&n->is_away, false)) {
			log_node(d, node, 0);
			wake_repair(d);
		}
		return;
	}
	n->error = rc;
	if ((atomic_fetch_add(&n->misses, 1) + 1 >= MISSES_MAX || is_transient(rc)) &&
	    !atomic_exchange(&n->is_away, true)) {
		log_node(d, node, rc);
		wake_repair(d);
	}
}

uint64_t holders_joined(const struct dist *d, const struct place *at)
{
	uint64_t mask = 0;

	for (unsigned r = 0; r < at->n; r++)
		if (d->nodes[at->node[r]].is_joined)
			mask |= bit(r);
	return mask;
}

uint64_t holders_up(const struct dist *d, const struct place *at)
{
	uint64_t mask = 0;

	for (unsigned r = 0; r < at->n; r++)
		if (d->nodes[at->node[r]].is_joined && !d->nodes[at->node[r]].is_away)
			mask |= bit(r);
	return mask;
}

int holders_error(const struct dist *d, const struct place *at, uint64_t holders)
{
	for (unsigned r = 0; r < at->n; r++) {
		int rc = d->nodes[at->node[r]].error;

		/* A folder that is not there is no object that is not there: nobody may take it for zeroes. */
		if (holders & bit(r) && !is_answer(rc))
			return rc;
	}
	return -EIO;
}

/* As many holders may fail as of a shard, however many there are. */
unsigned quorum_of(const struct dist *d, const struct place *at)
{
	return at->n - (unsigned)(d->replicas - d->quorum);
}

/* ---- several at once ---- */

static CO_FN void one_holder(void *arg)
{
	uint8_t *child = arg;
	unsigned r = *child;
	struct each *e = container_of(child - r, struct each, child);
	struct dist *d = e->c->layer->self;
	unsigned node = e->at->node[r];
	struct chan *kid;
	int rc = node_chan(e->c, node, &kid);

	if (rc == 0) {
		atomic_fetch_add(&d->nodes[node].inflight, 1);
		rc = e->fn(e, r, kid);
		atomic_fetch_sub(&d->nodes[node].inflight, 1);
		node_result(d, node, rc);
	}
	e->done |= bit(r);
	if (rc == 0)
		e->ok |= bit(r);
	else if (e->rc == 0)
		e->rc = rc;
	if (e->after != NULL)
		e->after(e);
}

void each_holder(struct each *e, uint64_t holders)
{
	e->group = (struct co_group)CO_GROUP_INIT;
	for (unsigned r = 0; r < e->at->n; r++) {
		if (!(holders & bit(r)))
			continue;
		e->child[r] = (uint8_t)r;
		if (holders >> r == 1) /* the last one needs no fiber of its own */
			one_holder(&e->child[r]);
		else
			co_group_spawn(&e->group, one_holder, &e->child[r]);
	}
	co_group_wait(&e->group);
}

/* ---- marks ---- */

struct mark *mark_find(struct dist *d, const char *name)
{
	struct mark *m;

	HASH_FIND_STR(d->table, name, m);
	return m;
}

struct mark *mark_need(struct dist *d, const char *name)
{
	struct mark *m = mark_find(d, name);
	size_t len = strlen(name) + 1;

	if (m != NULL)
		return m;
	m = calloc(1, sizeof(*m) + len);
	if (m != NULL) {
		memcpy(m->name, name, len);
		HASH_ADD_STR(d->table, name, m);
		if (m->hh.tbl == NULL) {
			free(m);
			m = NULL;
		}
	}
	if (m == NULL) {
		/* What can't be marked could be served wrong. */
		if (d->broken == 0)
			log_error(
				"no memory to note a stale replica, volume stops layer=distributed object=%s",
				name);
		d->broken = -ENOMEM;
		return NULL;
	}
	list_init(&m->in_flush);
	list_init(&m->owing);
	list_init(&m->other);
	if (!place_is_shard(name))
		list_add(&d->others, &m->other);
	list_add(&d->marks, &m->all);
	atomic_fetch_add(&d->marks_n, 1);
	return m;
}

void mark_done(struct dist *d, struct mark *m)
{
	if (m->stale | m->behind_n | m->dirty | m->flushing | m->lingering || m->is_unsettled ||
	    m->is_owed)
		return;
	list_del(&m->in_flush);
	list_del(&m->other);
	list_del(&m->all);
	HASH_DEL(d->table, m);
	atomic_fetch_sub(&d->marks_n, 1);
	free(m);
}

void mark_set_stale(struct dist *d, struct mark *m, const struct place *at, uint64_t stale)
{
	for (unsigned r = 0; r < at->n; r++) {
		_Atomic uint64_t *n = &d->nodes[at->node[r]].stale_n;

		if (stale & ~m->stale & bit(r))
			atomic_fetch_add(n, 1);
		else if (m->stale & ~stale & bit(r))
			atomic_fetch_sub(n, 1);
	}
	m->stale = stale;
	m->recorded &= stale;
}

void mark_unsettle(struct dist *d, struct mark *m, const struct place *at)
{
	mark_set_dirty(d, m, at, all_of(at) & ~m->stale & holders_joined(d, at));
	if (m->is_unsettled)
		return;
	m->is_unsettled = true;
	d->unsettled_n++;
}

void mark_settle(struct dist *d, struct mark *m)
{
	if (!m->is_unsettled)
		return;
	m->is_unsettled = false;
	d->unsettled_n--;
}

uint64_t next_seq(struct dist *d)
{
	/* The clock makes it grow over restarts too, even past records that lie on a node that is away now. */
	d->seq = MAX(d->seq + 1, wall_ns());
	return d->seq;
}

void wake_repair(struct dist *d)
{
	pthread_mutex_lock(&d->lock);
	d->has_work = true;
	co_wq_wake_all(&d->work);
	pthread_mutex_unlock(&d->lock);
}

struct view mark_view(struct dist *d, const char *name)
{
	struct view v = { 0 };
	struct mark *m;

	if (likely(d->marks_n == 0))
		return v;
	pthread_mutex_lock(&d->lock);
	m = mark_find(d, name);
	if (m != NULL)
		v = (struct view){ m->stale, m->recorded, m->behind_n ? m->behind : 0, m->lingering,
				   m->is_unsettled };
	pthread_mutex_unlock(&d->lock);
	return v;
}

/* ---- records ---- */

struct to_record {
	const char *name;
	uint64_t stale, seq;
};

static CO_FN int put_records(struct each *e, unsigned r, struct chan *kid)
{
	const struct to_record *t = e->arg;
	struct iov nothing = { 0 };
	int rc = 0;

	for (unsigned i = 0; i < e->at->n && rc == 0; i++) {
		struct obj obj;
		struct put put = { .obj = &obj, .iov = &nothing, .fl = IO_FUA };

		if (!(t->stale & bit(i)))
			continue;
		rc = record_name(&obj, t->name, i, t->seq);
		if (rc == 0)
			rc = ch_put(kid, &put, NULL);
	}
	return rc;
}

/* With the lock held: what came of putting `t` on `good`. */
static void records_put(struct dist *d, struct mark *m, const struct place *at,
			const struct to_record *t, uint64_t good, uint64_t ok)
{
	uint64_t now_good = all_of(at) & ~m->stale;
	uint64_t failed = good & ~ok & now_good;

	if ((now_good & ~failed) == 0)
		return; /* the last good one stays good; its record is still missing */
	if (failed != 0)
		mark_set_stale(d, m, at, m->stale | failed);
	if ((now_good & ~good) == 0)
		m->recorded |= t->stale & m->stale;
}

int record(struct chan *c, const char *name, const struct place *at)
{
	struct dist *d = c->layer->self;

	/* Each round that does not end it makes one more holder stale. */
	for (unsigned round = 0; round <= at->n; round++) {
		struct to_record t = { .name = name };
		struct each e = { .c = c, .at = at, .fn = put_records, .arg = &t };
		uint64_t good = 0;
		struct mark *m;

		pthread_mutex_lock(&d->lock);
		m = mark_find(d, name);
		if (m != NULL) {
			t.stale = m->stale & ~m->recorded;
			t.seq = next_seq(d);
			good = all_of(at) & ~m->stale;
		}
		pthread_mutex_unlock(&d->lock);
		if (t.stale == 0)
			return 0;
		each_holder(&e, good & holders_joined(d, at));
		pthread_mutex_lock(&d->lock);
		m = mark_find(d, name);
		if (m != NULL)
			records_put(d, m, at, &t, good, e.ok);
		pthread_mutex_unlock(&d->lock);
		if (e.ok == 0)
			return e.rc != 0 ? e.rc : -EIO;
	}
	return -EIO;
}

enum { FOUND_MAX = 32 };

/* Records of one holder of one object, found on one node. */
struct found {
	const char *name;
	unsigned r, n;
	struct obj *objs; /* FOUND_MAX */
};

static int find_record(void *arg, const char *stored, uint64_t size)
{
	struct found *f = arg;
	char name[OBJ_NAME_MAX + 1];
	uint64_t seq;
	unsigned r;

	if (record_parse(stored, name, &r, &seq) && r == f->r && strcmp(name, f->name) == 0 &&
	    f->n < FOUND_MAX && obj_set(&f->objs[f->n], stored) == 0)
		f->n++;
	return 0;
}

static CO_FN int delete_records(struct each *e, unsigned r, struct chan *kid)
{
	struct found *what = e->arg;
	struct found f = *what;
	char prefix[RECORD_LEN];
	int rc;

	f.objs = calloc(FOUND_MAX, sizeof(struct obj));
	if (f.objs == NULL)
		return -ENOMEM;
	record_prefix(prefix, f.name, f.r);
	rc = ch_list(kid, prefix, find_record, &f);
	if (rc == 0 && f.n > 0)
		rc = ch_del(kid, f.objs, f.n);
	free(f.objs);
	return rc;
}

void forget(struct chan *c, const char *name, const struct place *at)
{
	struct dist *d = c->layer->self;
	uint64_t lingering = mark_view(d, name).lingering;
	struct mark *m;

	for (unsigned r = 0; r < at->n; r++) {
		struct found f = { .name = name, .r = r };
		struct each e = { .c = c, .at = at, .fn = delete_records, .arg = &f };

		if (!(lingering & bit(r)))
			continue;
		each_holder(&e, holders_up(d, at));
		if (e.ok != all_of(at))
			continue; /* another time, when all of them answer */
		pthread_mutex_lock(&d->lock);
		m = mark_find(d, name);
		if (m != NULL) {
			m->lingering &= ~bit(r);
			mark_done(d, m);
		}
		pthread_mutex_unlock(&d->lock);
	}
}

/* ---- the end of a change ---- */

/* With the lock held. */
static void note_unsettled(struct dist *d, const char *name, const struct place *at)
{
	struct mark *m = mark_need(d, name);

	if (m != NULL)
		mark_unsettle(d, m, at);
}

/*
 * The marks in memory after a change; `ok` becomes those that count. With the lock held. False: nothing more to
 * do than to answer with an error.
 */
static bool mark_change(struct dist *d, const char *name, const struct place *at, uint64_t tried,
			uint64_t *ok, bool is_whole)
{
	struct mark *m = mark_find(d, name);
	uint64_t stale = m != NULL ? m->stale : 0, all = all_of(at), after;

	if (!is_whole)
		*ok &= ~stale;
	if (*ok == 0) {
		/* Those that were asked may have done it or not. */
		if ((tried & ~stale) != 0 && count(all & ~stale) > 1)
			note_unsettled(d, name, at);
		return false;
	}
	after = is_whole ? all & ~*ok : stale | (all & ~*ok);
	if (after == 0 && m == NULL)
		return true;
	m = mark_need(d, name);
	if (m == NULL)
		return false;
	mark_set_stale(d, m, at, after);
	if (stale & ~after) {
		/* What became good must learn of the others. */
		m->recorded = 0;
		m->lingering |= stale & ~after;
		d->has_work = true;
		co_wq_wake_all(&d->work);
	}
	m->lingering &= ~after;
	if (is_whole || count(all & ~after) == 1)
		mark_settle(d, m);
	mark_done(d, m);
	return true;
}

int settle(struct chan *c, const char *name, const struct place *at, uint64_t tried, uint64_t ok,
	   bool is_whole, int rc)
{
	struct dist *d = c->layer->self;
	struct view v;
	int recorded;
	bool go_on;

	if (likely(ok == all_of(at) && d->marks_n == 0))
		return 0;
	pthread_mutex_lock(&d->lock);
	go_on = mark_change(d, name, at, tried, &ok, is_whole);
	pthread_mutex_unlock(&d->lock);
	if (d->broken != 0)
		return d->broken;
	if (!go_on)
		return rc != 0 ? rc : -EIO;
	recorded = record(c, name, at);
	if (recorded != 0)
		return recorded;
	v = mark_view(d, name);
	if (v.stale & holders_up(d, at))
		wake_repair(d); /* else when its node is back: not by each write meanwhile */
	/* Who left meanwhile does not count (distributed_out.c). */
	if (count(ok & ~v.stale & holders_joined(d, at)) >= quorum_of(d, at))
		return 0;
	return rc != 0 ? rc : holders_error(d, at, v.stale);
}
