/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * When unsaved shards go to the store: queues, slots, and the work in the background. How they do is in shardstore.c,
 * flush and deletes are in shardflush.c.
 *
 * Shards with unsaved data that are not being put stand in one of three queues:
 *
 *	full	all of it is in memory, nothing must be fetched: put at once
 *	young	waits for more to come: put when `age` old, or when memory gets short
 *	failed	its last put failed: tried again after RETRY_NS
 *
 * Who changes a shard looks whether there is such work and starts a worker for it, a fiber on its own reactor, up
 * to `puts` workers in all. One keeper, a fiber of whoever came first, sleeps until something gets due. Flush does
 * not wait for workers: it puts what is left itself. All puts share `puts` slots, and
 * half of `dirty` bytes on their way (`fly`).
 */
#include <inttypes.h>

#include "layer/sharded/shardbuf_int.h"
#include "nbdrs/reactor.h"

#define RETRY_NS   UINT64_C(5000000000)
#define OVERDUE_NS UINT64_C(100000000)

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
	if (b->puts_running < b->conf.puts)
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
static void end_put(struct shardbuf *b, struct shard *s, uint64_t attempt, int rc, uint64_t end)
{
	struct gen *g = s->putting;

	pthread_mutex_lock(&b->lock);
	b->moving -= g->charge;
	pthread_mutex_unlock(&b->lock);
	s->putting = NULL;
	s->is_busy = false;
	s->error = rc;
	if (rc) {
		s->end = MAX(s->end, end); /* it may have arrived all the same */
		s->failed = attempt;
		shard_take_back(b, s, g);
	} else {
		s->end = end;
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
	const uint64_t old_end = s->end;
	const uint64_t attempt = ++s->attempts;
	uint64_t end;
	int rc;

	shard_dequeue(b, s);
	s->putting = g;
	s->dirty = NULL;
	s->is_busy = true;
	pthread_mutex_lock(&b->lock);
	b->moving += g->charge;
	pthread_mutex_unlock(&b->lock);
	pthread_mutex_unlock(&st->lock);

	rc = shard_store(u, s->n, g, old_end, &end);
	shard_account(b, s->n, rc);

	pthread_mutex_lock(&st->lock);
	end_put(b, s, attempt, rc, end);
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
	wants_worker = b->workers < b->conf.puts && !u->is_leaving && due_shard(b);
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
		.flying = b->flying,
		.puts_done = b->puts_done,
		.failures = b->failures,
		.error = b->error,
	};
	pthread_mutex_unlock(&b->lock);
}
