/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The way of unsaved shards to the store: puts and deletes, flush, and the work in the background.
 *
 * Shards with unsaved data that are not being put stand in one of three queues:
 *
 *	full	all of it is in memory, nothing must be fetched: put at once
 *	young	waits for more to come: put when `age` old, or when memory gets short
 *	failed	its last put failed: tried again after RETRY_NS
 *
 * Who changes a shard looks whether there is such work and starts a worker for it, a fiber on its own reactor, up
 * to `puts` workers in all. One keeper, a fiber of whoever came first, sleeps until something gets due. Flush does
 * not wait for workers: it puts what is left itself. All of them share `puts` slots.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "layer/sharded/shardbuf_int.h"
#include "nbdrs/reactor.h"

#define RETRY_NS   UINT64_C(5000000000)
#define OVERDUE_NS UINT64_C(100000000)

/* Looked at at a stretch before others have their turn. */
enum { TURN_LEN = 256 * 1024 };
/* Up to so many ranges are fetched one by one to complete a shard; more of them in one. */
enum { RANGES_MAX = 4 };
/* Of a shard no larger than this all of them are one: a request costs more than so many bytes do. */
enum { ONE_GET_MAX = 256 * 1024 };

/* --- Queues ----------------------------------------------------------------------------------- */

/* With the queue lock held. */
static void wake_keeper(struct shardbuf *b, uint64_t due)
{
	if (b->keeper_until > due)
		co_wq_wake_all(&b->keeper);
}

static void move_to(struct shardbuf *b, struct shard *s, enum queue q)
{
	if (s->queue == q)
		return;
	list_del(&s->node);
	s->queue = q;
	if (q == QUEUE_NONE)
		return;
	list_add(&b->queues[q], &s->node);
	if (q == QUEUE_FULL)
		return;
	s->due = q == QUEUE_FAILED ? now_ns() + RETRY_NS : s->dirty->born + b->conf.age_ns;
	wake_keeper(b, s->due);
}

void shard_enqueue(struct shardbuf *b, struct shard *s)
{
	pthread_mutex_lock(&b->lock);
	move_to(b, s,
		s->error                         ? QUEUE_FAILED
		: s->dirty->valid_n == b->grains ? QUEUE_FULL
						 : QUEUE_YOUNG);
	pthread_mutex_unlock(&b->lock);
}

void shard_dequeue(struct shardbuf *b, struct shard *s)
{
	pthread_mutex_lock(&b->lock);
	move_to(b, s, QUEUE_NONE);
	pthread_mutex_unlock(&b->lock);
}

static struct shard *first_of(struct shardbuf *b, enum queue q)
{
	return list_empty(&b->queues[q]) ? NULL : list_entry(b->queues[q].next, struct shard, node);
}

/* Half of the memory is dirty and nothing is done about it yet. Queue lock held. */
static bool is_pressed(const struct shardbuf *b)
{
	return b->used - b->moving > b->conf.dirty_max / 2 || b->gens_n > SHARD_GENS_MAX / 2;
}

/* The shard to put next; NULL = none. Queue lock held. */
static struct shard *due_shard(struct shardbuf *b)
{
	struct shard *full = first_of(b, QUEUE_FULL), *young = first_of(b, QUEUE_YOUNG);
	struct shard *failed = first_of(b, QUEUE_FAILED);
	uint64_t now;

	if (full)
		return full;
	if (young && is_pressed(b))
		return young;
	if (!young && !failed)
		return NULL;
	now = now_ns();
	if (young && young->due <= now)
		return young;
	return failed && failed->due <= now ? failed : NULL;
}

/* --- Slots ------------------------------------------------------------------------------------ */

/*
 * A slot that is given while others wait passes to the first of them and never becomes free: workers take the next
 * one at once, and a flush that had to compete with them would wait for as long as there is work.
 */
void shard_slot_take(struct shardbuf *b)
{
	pthread_mutex_lock(&b->lock);
	if (b->puts_running < b->puts)
		b->puts_running++;
	else
		co_wq_wait(&b->slots, &b->lock); /* woken: it is ours */
	pthread_mutex_unlock(&b->lock);
}

void shard_slot_give(struct shardbuf *b)
{
	pthread_mutex_lock(&b->lock);
	if (list_empty(&b->slots.waiters))
		b->puts_running--;
	else
		co_wq_wake_one(&b->slots);
	pthread_mutex_unlock(&b->lock);
}

/* --- One put ---------------------------------------------------------------------------------- */

static CO_FN bool is_zero(const uint8_t *data, uint64_t len)
{
	for (uint64_t at = 0; at < len; at += TURN_LEN) {
		struct iovec v = { (void *)(uintptr_t)(data + at),
				   MIN(len - at, (uint64_t)TURN_LEN) };
		struct iov iov = { &v, 1, v.iov_len };

		if (!iov_is_zero(&iov))
			return false;
		co_yield();
	}
	return true;
}

static CO_FN bool gen_is_zero(struct shardbuf *b, struct gen *g)
{
	const uint64_t *touched = gen_touched(b, g);
	uint64_t at = 0, from;

	while ((from = bits_find(touched, at, b->pages, true)) < b->pages) {
		at = bits_find(touched, from, b->pages, false);
		if (!is_zero(g->data + from * MEM_PAGE, (at - from) * MEM_PAGE))
			return false;
	}
	return true;
}

/* A range of shard n that is fetched into `base`, memory for the whole shard. */
struct range {
	struct chan *kid;
	const struct obj *obj;
	uint8_t *base;
	uint64_t off, len;
	int rc;
};

static CO_FN void fetch_range(void *arg)
{
	struct range *r = arg;
	struct iovec v;
	struct iov iov = iov_one(&v, r->base + r->off, r->len);

	r->rc = ch_read(r->kid, (struct ext){ r->obj, r->off, r->len }, &iov, 0);
	if (r->rc == -ENOENT)
		r->rc = 0; /* the memory is zero already */
}

/* What `g` lacks; few ranges by themselves, many as one. */
static CO_FN int fetch_rest(struct shard_user *u, const struct obj *obj, const struct gen *g,
			    uint8_t *to)
{
	const uint64_t grains = u->b->grains;
	const unsigned max = u->b->conf.shard_size <= ONE_GET_MAX ? 1 : RANGES_MAX;
	struct range ranges[RANGES_MAX];
	struct co_group group = CO_GROUP_INIT;
	uint64_t at = 0, from;
	unsigned n = 0;
	int rc = 0;

	while ((from = bits_find(g->bits, at, grains, false)) < grains) {
		at = bits_find(g->bits, from, grains, true);
		if (n < max)
			ranges[n++] = (struct range){
				u->kid, obj, to, from * SHARD_GRAIN, (at - from) * SHARD_GRAIN, 0
			};
		else
			ranges[0].len = at * SHARD_GRAIN - ranges[0].off;
	}
	if (ranges[0].off + ranges[0].len > ranges[n - 1].off)
		n = 1; /* there were more, or there is only one */
	for (unsigned i = 1; i < n; i++)
		co_group_spawn(&group, fetch_range, &ranges[i]);
	fetch_range(&ranges[0]);
	co_group_wait(&group);
	for (unsigned i = 0; i < n && !rc; i++)
		rc = ranges[i].rc;
	return rc;
}

/* Copies what `g` holds over what was fetched. */
static CO_FN void lay_over(const struct shardbuf *b, const struct gen *g, uint8_t *to)
{
	uint64_t at = 0, from;

	while ((from = bits_find(g->bits, at, b->grains, true)) < b->grains) {
		uint64_t len;

		at = bits_find(g->bits, from, MIN(from + TURN_LEN / SHARD_GRAIN, b->grains), false);
		len = (at - from) * SHARD_GRAIN;
		if (g->data)
			memcpy(to + from * SHARD_GRAIN, g->data + from * SHARD_GRAIN, len);
		else
			memset(to + from * SHARD_GRAIN, 0, len);
		if (len == TURN_LEN)
			co_yield();
	}
}

static CO_FN int put_bytes(struct shard_user *u, const struct obj *obj, uint8_t *data)
{
	struct iovec v;
	struct iov iov = iov_one(&v, data, u->b->conf.shard_size);
	struct put p = { .obj = obj, .iov = &iov, .cond = PUT_ALWAYS };

	return ch_put(u->kid, &p, NULL);
}

/* With what the store has of it. */
static CO_FN int put_completed(struct shard_user *u, const struct obj *obj, const struct gen *g,
			       bool maybe_zero, bool *is_gone)
{
	uint8_t *whole = shard_map(u->b);
	int rc;

	if (!whole)
		return -ENOMEM;
	rc = fetch_rest(u, obj, g, whole);
	if (!rc) {
		lay_over(u->b, g, whole);
		*is_gone = maybe_zero && is_zero(whole, u->b->conf.shard_size);
		rc = *is_gone ? ch_del(u->kid, obj, 1) : put_bytes(u, obj, whole);
	}
	shard_unmap(u->b, whole);
	return rc;
}

/*
 * Brings shard n as `g` has it into the store, which may have an older one (`was_there`). Zeroes are not stored:
 * *is_gone then.
 */
static CO_FN int store_gen(struct shard_user *u, uint64_t n, struct gen *g, bool was_there,
			   bool *is_gone)
{
	struct shardbuf *b = u->b;
	bool maybe_zero = gen_is_zero(b, g);
	struct obj obj;

	shard_obj(&obj, n);
	*is_gone = false;
	if (was_there && !g->rest_zero && g->valid_n < b->grains)
		return put_completed(u, &obj, g, maybe_zero, is_gone);
	if (!maybe_zero)
		return put_bytes(u, &obj, g->data);
	*is_gone = true;
	return was_there ? ch_del(u->kid, &obj, 1) : 0;
}

void shard_account(struct shardbuf *b, uint64_t n, int rc)
{
	unsigned suppressed = 0;
	bool is_news = false, was_bad;

	pthread_mutex_lock(&b->lock);
	was_bad = b->error != 0;
	b->error = rc;
	if (rc) {
		b->failures++;
		b->failed_in_row++;
		if (b->room_waiters)
			co_wq_wake_all(&b->room); /* it may be hopeless now */
	} else {
		b->puts_done++;
		b->failed_in_row = 0;
	}
	if (rc || was_bad)
		is_news = log_gate_open(&b->gate, &suppressed);
	pthread_mutex_unlock(&b->lock);
	if (is_news && rc)
		log_warn("%s: store failed, data stays in memory object=block-%" PRIu64
			 " error=%s suppressed=%u",
			 b->conf.name, n, err_name(rc), suppressed);
	else if (is_news)
		log_info("%s: store works again object=block-%" PRIu64 " suppressed=%u",
			 b->conf.name, n, suppressed);
}

/* After a put of s->putting, with the stripe's lock held. */
static void end_put(struct shardbuf *b, struct shard *s, uint64_t attempt, int rc, bool is_gone)
{
	struct gen *g = s->putting;

	pthread_mutex_lock(&b->lock);
	b->moving -= g->charge;
	pthread_mutex_unlock(&b->lock);
	s->putting = NULL;
	s->is_busy = false;
	s->error = rc;
	if (rc) {
		s->in_store = true; /* it may have arrived all the same */
		s->failed = attempt;
		shard_take_back(b, s, g);
	} else {
		s->in_store = !is_gone;
		s->done = g->seq;
		gen_free(b, g);
	}
	co_wq_wake_all(&s->wq);
	if (s->dirty)
		shard_enqueue(b, s);
}

void shard_put(struct shard_user *u, struct stripe *st, struct shard *s)
{
	struct shardbuf *b = u->b;
	struct gen *g = s->dirty;
	const bool was_there = s->in_store;
	const uint64_t attempt = ++s->attempts;
	bool is_gone;
	int rc;

	shard_dequeue(b, s);
	s->putting = g;
	s->dirty = NULL;
	s->is_busy = true;
	pthread_mutex_lock(&b->lock);
	b->moving += g->charge;
	pthread_mutex_unlock(&b->lock);
	pthread_mutex_unlock(&st->lock);

	rc = store_gen(u, s->n, g, was_there, &is_gone);
	shard_account(b, s->n, rc);

	pthread_mutex_lock(&st->lock);
	end_put(b, s, attempt, rc, is_gone);
}

/* --- In the background ------------------------------------------------------------------------ */

static void fiber_ends(struct shard_user *u)
{
	u->fibers--;
	if (u->leaver)
		co_wake(u->leaver);
}

/* Puts shard n unless somebody else did or does. */
static CO_FN void put_one(struct shard_user *u, uint64_t n)
{
	struct shardbuf *b = u->b;
	struct stripe *st = shard_stripe(b, n);
	struct shard *s;

	shard_slot_take(b);
	pthread_mutex_lock(&st->lock);
	s = shard_find(st, n);
	if (s && s->dirty && !shard_is_taken(s))
		shard_put(u, st, s);
	if (s)
		shard_release(b, st, s);
	pthread_mutex_unlock(&st->lock);
	shard_slot_give(b);
}

/* A shard taken off its queue; false = no more, and this worker is not counted any more. */
static bool next_work(struct shardbuf *b, bool is_leaving, uint64_t *n)
{
	struct shard *s;

	pthread_mutex_lock(&b->lock);
	s = is_leaving ? NULL : due_shard(b);
	if (s) {
		*n = s->n;
		list_del(&s->node);
		s->queue = QUEUE_NONE;
	} else {
		b->workers--;
	}
	pthread_mutex_unlock(&b->lock);
	return s != NULL;
}

static CO_FN void worker(void *arg)
{
	struct shard_user *u = arg;
	uint64_t n;

	co_yield(); /* whoever started this has a request to answer */
	while (next_work(u->b, u->is_leaving, &n)) {
		shard_kick(u); /* there may be work for one more */
		put_one(u, n);
	}
	fiber_ends(u);
}

static CO_FN void keeper(void *arg)
{
	struct shard_user *u = arg;
	struct shardbuf *b = u->b;

	pthread_mutex_lock(&b->lock);
	while (!u->is_leaving) {
		const struct shard *young = first_of(b, QUEUE_YOUNG),
				   *failed = first_of(b, QUEUE_FAILED);
		uint64_t due =
			MIN(young ? young->due : UINT64_MAX, failed ? failed->due : UINT64_MAX);
		uint64_t now = now_ns();

		if (due <= now) {
			pthread_mutex_unlock(&b->lock);
			shard_kick(u);
			pthread_mutex_lock(&b->lock);
			due = now +
			      OVERDUE_NS; /* workers take one after the other; look that they do */
		}
		if (u->is_leaving)
			break;
		b->keeper_until = due;
		if (due == UINT64_MAX)
			co_wq_wait(&b->keeper, &b->lock);
		else
			(void)co_wq_wait_for(&b->keeper, &b->lock,
					     due - now); /* looks anew either way */
		b->keeper_until = 0;
	}
	b->keeper_of = NULL;
	pthread_mutex_unlock(&b->lock);
	fiber_ends(u);
}

void shard_kick(struct shard_user *u)
{
	struct shardbuf *b = u->b;
	bool wants_worker, wants_keeper;

	pthread_mutex_lock(&b->lock);
	wants_keeper = !b->keeper_of && !u->is_leaving;
	wants_worker = b->workers < b->puts && !u->is_leaving && due_shard(b);
	if (wants_keeper)
		b->keeper_of = u;
	if (wants_worker)
		b->workers++;
	pthread_mutex_unlock(&b->lock);
	u->fibers += wants_keeper + wants_worker;
	/* Without memory for a fiber the work is left to whoever comes next, or to flush. */
	if (wants_keeper && co_spawn(keeper, u) != 0) {
		u->fibers--;
		pthread_mutex_lock(&b->lock);
		b->keeper_of = NULL;
		pthread_mutex_unlock(&b->lock);
	}
	if (wants_worker && co_spawn(worker, u) != 0) {
		u->fibers--;
		pthread_mutex_lock(&b->lock);
		b->workers--;
		pthread_mutex_unlock(&b->lock);
	}
}

void shardbuf_enter(struct shard_user *u, struct shardbuf *b, struct chan *kid)
{
	*u = (struct shard_user){ .b = b, .kid = kid };
}

void shardbuf_leave(struct shard_user *u)
{
	pthread_mutex_lock(&u->b->lock);
	u->is_leaving = true;
	if (u->b->keeper_of == u)
		co_wq_wake_all(&u->b->keeper);
	pthread_mutex_unlock(&u->b->lock);
	u->leaver = co_self();
	while (u->fibers > 0)
		co_park();
}

/* --- Looking at it ---------------------------------------------------------------------------- */

void shardbuf_view(struct shardbuf *b, struct shardbuf_view *v)
{
	pthread_mutex_lock(&b->lock);
	*v = (struct shardbuf_view){
		.dirty_bytes = b->used,
		.dirty_shards = atomic_load(&b->shards_n),
		.puts_running = b->puts_running,
		.puts_done = b->puts_done,
		.failures = b->failures,
		.error = b->error,
	};
	pthread_mutex_unlock(&b->lock);
}
