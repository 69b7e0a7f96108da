/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Which unit is sent when, and who waits for it. See cache_dirty.h.
 */
#include "layer/cache/cache_dirty.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "layer/cache/cache_dirty_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/log.h"
#include "nbdrs/reactor.h"

/* How long a full unit waits for another change. */
#define REST_NS UINT64_C(20000000)

/* One that may grow is left alone for so long, whatever the fill. */
#define GROW_NS UINT64_C(100000000)

/* Less of an object is not taken for all of it. */
enum { FULL_MIN = 64 << 10 };

/* --- Queues; with d->lock held ---------------------------------------------------------------- */

/* What the last attempt said; 0 also when nothing is left that could fail. */
static void set_error(struct dirty *d, struct unit *u, int rc)
{
	if (u->error && !is_transient(u->error))
		d->refused_n--;
	u->error = rc;
	if (rc && !is_transient(rc)) {
		d->refused_n++;
		d->refused = rc;
	}
}

static void move_to(struct dirty *d, struct unit *u, enum unit_queue q)
{
	list_del(&u->node);
	list_del(&u->rest);
	d->busy_n += (q == UNIT_BUSY) - (u->queue == UNIT_BUSY);
	u->queue = q;
	if (q != UNIT_NONE)
		list_add(&d->queues[q], &u->node);
	if (q == UNIT_NONE) {
		u->since = 0;
		set_error(d, u, 0);
	} else if (!u->since) {
		u->since = now_ns();
	}
}

static struct unit *first_of(const struct dirty *d, enum unit_queue q)
{
	return list_empty(&d->queues[q]) ? NULL : list_entry(d->queues[q].next, struct unit, node);
}

/* It is not full, and changed a moment ago. Keys of others that are the same do no harm. */
static bool may_grow(const struct dirty *d, const struct unit *u)
{
	if (!list_empty(&u->rest))
		return false;
	for (unsigned i = 0; i < DIRTY_RECENT; i++)
		if (d->recent[i] == u->key)
			return true;
	return false;
}

/* One that is old enough. As there are few that may grow this looks at few. */
static struct unit *next_aged(struct dirty *d, uint64_t age, uint64_t now, uint64_t *due)
{
	/* With enough of others under way there is more time: the end of each looks anew. */
	const uint64_t left = d->busy_n < d->enough ? MIN(GROW_NS, d->lag_ns) : d->lag_ns;
	struct unit *growing = NULL;

	list_for_each(u, &d->queues[UNIT_YOUNG], struct unit, node)
	{
		if (u->since + age > now) {
			*due = MIN(*due, u->since + age);
			break;
		}
		if (u->since + d->lag_ns <= now || !may_grow(d, u))
			return u;
		if (u->since + left > now)
			*due = MIN(*due, u->since + left);
		else if (!growing)
			growing = u;
	}
	return growing;
}

static struct unit *next_rested(struct dirty *d, uint64_t now, uint64_t *due)
{
	struct unit *u = list_empty(&d->resting) ? NULL
						 : list_entry(d->resting.next, struct unit, rest);

	if (!u || u->rested + REST_NS <= now)
		return u;
	*due = MIN(*due, u->rested + REST_NS);
	return NULL;
}

struct unit *dirty_next(struct dirty *d, uint64_t age, uint64_t retry_at, uint64_t *due)
{
	struct unit *u = first_of(d, UNIT_WANTED), *failed = first_of(d, UNIT_FAILED);
	const uint64_t now = now_ns();

	*due = failed ? retry_at : UINT64_MAX;
	if (!u)
		u = next_aged(d, age, now, due);
	if (!u)
		u = next_rested(d, now, due);
	if (!u && retry_at <= now)
		u = failed;
	if (u) {
		/* Who would free it takes d->lock first, and sees this. */
		atomic_fetch_add(&u->refs, 1);
		move_to(d, u, UNIT_BUSY);
	}
	return u;
}

/* --- Queues; with the stripe's lock held ------------------------------------------------------ */

/*
 * All of it is here. How long an object is, nobody says; those of a mapping are powers of two, so that
 * is what is taken for a whole one. A guess that is wrong costs a put too many, once in `lag`.
 */
static bool is_full(const struct dirty *d, const struct unit *u)
{
	const uint64_t end = u->n ? u->v[u->n - 1].end : 0;

	if (!d->by_object)
		return u->bytes == UINT64_C(1) << UNIT_SHIFT;
	return u->bytes == end && end >= FULL_MIN && (end & (end - 1)) == 0;
}

static uint64_t *sent_at(struct dirty *d, const struct unit *u)
{
	return &dirty_stripe(d, u->key)->sent[u->key / DIRTY_STRIPES % DIRTY_SENT];
}

/* It rests from its last change on, if it is full and was not sent a short time ago. */
static void rest(struct dirty *d, struct unit *u)
{
	const uint64_t sent = *sent_at(d, u), now = now_ns();

	list_del(&u->rest);
	if (!is_full(d, u) || (sent && now < sent + d->lag_ns))
		return;
	if (list_empty(&d->resting))
		co_wq_wake_one(&d->work);
	u->rested = now;
	list_add(&d->resting, &u->rest);
}

void unit_enqueue(struct dirty *d, struct unit *u)
{
	pthread_mutex_lock(&d->lock);
	if (d->recent[d->recent_at] != u->key) {
		d->recent_at = (d->recent_at + 1) % DIRTY_RECENT;
		d->recent[d->recent_at] = u->key;
	}
	if (u->queue == UNIT_NONE) {
		const bool is_first = list_empty(&d->queues[UNIT_YOUNG]);

		move_to(d, u, UNIT_YOUNG);
		if (is_first)
			co_wq_wake_one(&d->work);
	}
	if (u->queue == UNIT_YOUNG)
		rest(d, u);
	pthread_mutex_unlock(&d->lock);
}

void unit_dequeue(struct dirty *d, struct unit *u)
{
	pthread_mutex_lock(&d->lock);
	move_to(d, u, UNIT_NONE);
	pthread_mutex_unlock(&d->lock);
}

/* --- Sending ---------------------------------------------------------------------------------- */

static void take_snapshot(struct unit *u, struct snapshot *s)
{
	*s = (struct snapshot){
		.seq = u->newest, .is_gone = u->gone_seq != 0, .n = u->n, .data_end = u->data_end
	};
	s->v = malloc(MAX(u->n, (size_t)1) * sizeof(*s->v));
	if (!s->v) {
		log_error("out of memory for what is to be sent down; a restart goes on with it");
		abort();
	}
	for (size_t i = 0; i < u->n; i++) {
		s->v[i] = u->v[i];
		segment_get(s->v[i].seg);
		if (s->v[i].type == RECORD_DATA)
			s->bytes += s->v[i].end - s->v[i].off;
	}
}

bool unit_begin(struct dirty *d, struct unit *u, struct snapshot *s)
{
	struct dirty_stripe *st = dirty_stripe(d, u->key);
	bool is_ours;

	pthread_mutex_lock(&st->lock);
	is_ours = !u->is_busy && (u->n || u->gone_seq);
	if (is_ours) {
		take_snapshot(u, s);
		u->is_busy = true;
		u->attempts++;
		pthread_mutex_lock(&d->lock);
		/* What comes from here on is younger. */
		s->since = u->since;
		move_to(d, u, UNIT_BUSY);
		u->since = now_ns();
		pthread_mutex_unlock(&d->lock);
	} else {
		if (!u->is_busy)
			unit_dequeue(d, u);
		atomic_fetch_sub(&u->refs, 1);
		unit_release(d, u);
	}
	pthread_mutex_unlock(&st->lock);
	return is_ours;
}

void unit_end(struct dirty *d, struct unit *u, struct snapshot *s, int rc)
{
	struct dirty_stripe *st = dirty_stripe(d, u->key);

	for (size_t i = 0; i < s->n; i++)
		segment_put(s->v[i].seg);
	free(s->v);
	pthread_mutex_lock(&st->lock);
	if (rc) {
		u->failed = u->attempts;
	} else {
		unit_drop_until(d, u, s->seq);
		u->done = MAX(u->done, s->seq);
		*sent_at(d, u) = now_ns();
	}
	u->is_busy = false;
	pthread_mutex_lock(&d->lock);
	set_error(d, u, rc);
	if (rc)
		u->since = s->since;
	move_to(d, u, !u->n && !u->gone_seq ? UNIT_NONE : rc ? UNIT_FAILED : UNIT_YOUNG);
	pthread_mutex_unlock(&d->lock);
	co_wq_wake_all(&u->wq);
	atomic_fetch_sub(&u->refs, 1);
	unit_release(d, u);
	pthread_mutex_unlock(&st->lock);
}

/* --- Waiting ---------------------------------------------------------------------------------- */

void target_want(struct dirty *d, const struct target *t)
{
	struct unit *u = t->u;

	pthread_mutex_lock(&d->lock);
	if (u->queue == UNIT_YOUNG || u->queue == UNIT_FAILED) {
		move_to(d, u, UNIT_WANTED);
		co_wq_wake_one(&d->work);
	}
	pthread_mutex_unlock(&d->lock);
}

int target_wait(struct dirty *d, const struct target *t)
{
	struct unit *u = t->u;
	struct dirty_stripe *st = dirty_stripe(d, u->key);
	int rc = 0;

	pthread_mutex_lock(&st->lock);
	while (u->done < t->seq && !rc) {
		if (u->failed > t->attempts) {
			rc = u->error ? u->error : -EIO;
		} else {
			target_want(d, t);
			co_wq_wait(&u->wq, &st->lock);
		}
	}
	atomic_fetch_sub(&u->refs, 1);
	unit_release(d, u);
	pthread_mutex_unlock(&st->lock);
	return rc;
}

void target_drop(struct dirty *d, const struct target *t)
{
	struct dirty_stripe *st = dirty_stripe(d, t->u->key);

	pthread_mutex_lock(&st->lock);
	atomic_fetch_sub(&t->u->refs, 1);
	unit_release(d, t->u);
	pthread_mutex_unlock(&st->lock);
}

/* --- Looking at it ---------------------------------------------------------------------------- */

uint64_t dirty_fill(struct dirty *d)
{
	const uint64_t units = atomic_load_explicit(&d->units_n, memory_order_relaxed);
	const uint64_t parts = atomic_load_explicit(&d->parts_n, memory_order_relaxed);

	return MAX(units * 1000000 / UNITS_MAX, parts * 1000000 / PARTS_MAX);
}

void dirty_view(struct dirty *d, struct dirty_view *v)
{
	*v = (struct dirty_view){ .bytes = atomic_load(&d->bytes),
				  .units = atomic_load(&d->units_n) };
	pthread_mutex_lock(&d->lock);
	for (enum unit_queue q = UNIT_WANTED; q < UNIT_QUEUES; q++) {
		const struct unit *u = first_of(d, q);

		if (u && (!v->since || u->since < v->since))
			v->since = u->since;
	}
	v->refused = d->refused_n ? d->refused : 0;
	pthread_mutex_unlock(&d->lock);
}
