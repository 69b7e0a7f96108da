/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * How sending goes, and what that means for those who write.
 *
 * Writers are slowed down from 70 % on: they take turns whose length follows from the speed of
 * sending, four times that speed at 70 %, as fast as sending when the journal is full.
 *
 *	state		since		ends with
 *	good		-		a failure
 *	failing		bad_since	a success; after `after` what `away` says happens
 *
 * The layer below fails when it takes no data or no flush. Errors of the journal's own disk are none
 * of its: they are told apart (cache_send.c).
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "layer/cache/cache_int.h"
#include "nbdrs/cleanup.h"

#define NS_PER_S      UINT64_C(1000000000)
#define RETRY_MIN_NS  (NS_PER_S / 10)
#define RETRY_MAX_NS  (5 * NS_PER_S)
#define FREE_RETRY_NS (NS_PER_S)
#define PAUSE_MAX_NS  (NS_PER_S / 2)
#define FULL_PAUSE_NS UINT64_C(2000000)

/* Bytes per second: who is slowed down is at least as fast. */
enum { SPEED_MIN = 1 << 20 };

/* --- How it goes ------------------------------------------------------------------------------ */

/* With dirty.lock held. */
static void count_sent(struct back *b, uint64_t bytes)
{
	const uint64_t second = now_ns() / NS_PER_S;

	if (second != b->second) {
		b->last_second = second == b->second + 1 ? b->this_second : 0;
		b->this_second = 0;
		b->second = second;
	}
	b->this_second += bytes;
	b->sent_bytes += bytes;
}

static void note_failure(struct back *b, int rc)
{
	const uint64_t now = now_ns();

	b->failures++;
	b->error = rc;
	if (!b->bad_since)
		b->bad_since = now;
	b->retry_at = now + MIN(RETRY_MIN_NS << MIN(b->failed_in_row, 10U), RETRY_MAX_NS);
	b->failed_in_row++;
}

static void note_success(struct back *b)
{
	b->error = 0;
	b->bad_since = b->retry_at = b->failed_in_row = 0;
}

/* The lock ends here. `what` failed with rc, or all is well and it was not (is_back). */
static void unlock_and_say(struct back *b, const char *what, int rc, bool is_back)
{
	unsigned suppressed = 0;
	const bool is_news = (rc || is_back) && log_gate_open(&b->gate, &suppressed);

	pthread_mutex_unlock(&b->dirty.lock);
	if (is_news && rc)
		log_warn(
			"%s: cache: the layer below does not take data, it stays here object=%s error=%s "
			"suppressed=%u",
			b->name, what, err_name(rc), suppressed);
	else if (is_news)
		log_info("%s: cache: the layer below takes data again suppressed=%u", b->name,
			 suppressed);
}

void back_account(struct back *b, const char *what, uint64_t bytes, int rc)
{
	bool was_bad;

	pthread_mutex_lock(&b->dirty.lock);
	was_bad = b->error != 0;
	if (rc) {
		note_failure(b, rc);
	} else {
		b->sends++;
		note_success(b);
		count_sent(b, bytes);
	}
	unlock_and_say(b, what, rc, was_bad && !rc);
}

/* A good one ends what flushes that failed have begun; units that failed speak for themselves. */
void back_account_flush(struct back *b, int rc)
{
	bool was_bad;

	pthread_mutex_lock(&b->dirty.lock);
	was_bad = b->error != 0;
	if (rc)
		note_failure(b, rc);
	else if (list_empty(&b->dirty.queues[UNIT_FAILED]))
		note_success(b);
	unlock_and_say(b, "(flush)", rc, was_bad && !b->error);
}

/* No data is in danger by that: segments stay in use. */
void back_account_journal(struct back *b, int rc)
{
	unsigned suppressed = 0;
	bool is_news;

	pthread_mutex_lock(&b->dirty.lock);
	b->free_at = now_ns() + FREE_RETRY_NS;
	is_news = log_gate_open(&b->journal_gate, &suppressed);
	pthread_mutex_unlock(&b->dirty.lock);
	if (is_news)
		log_warn(
			"%s: cache: the journal's files cannot be cleared, they stay in use folder=%s error=%s "
			"suppressed=%u",
			b->name, b->c->disk, err_name(rc), suppressed);
}

/* What the option `away` makes of it: an error, or 0. */
static int away_error(struct back *b)
{
	int rc = 0;

	pthread_mutex_lock(&b->dirty.lock);
	if (b->c->away != AWAY_WAIT && b->bad_since && now_ns() - b->bad_since >= b->c->after_ns)
		rc = b->error;
	pthread_mutex_unlock(&b->dirty.lock);
	return rc;
}

int back_error(struct back *b)
{
	struct dirty_view v;
	int rc = away_error(b);

	if (rc || !b->c->is_local)
		return rc;
	dirty_view(&b->dirty, &v);
	if (v.refused)
		return v.refused;
	pthread_mutex_lock(&b->dirty.lock);
	rc = b->error; /* of a flush below, perhaps, which has no unit */
	pthread_mutex_unlock(&b->dirty.lock);
	return rc && !is_transient(rc) ? rc : 0;
}

/* --- Slowing down ----------------------------------------------------------------------------- */

uint64_t back_fill(struct back *b)
{
	return MAX(journal_fill(&b->journal), dirty_fill(&b->dirty));
}

/* How long this writer pauses: until the turns of those before it are over. */
static uint64_t take_turn(struct back *b, uint64_t len, uint64_t fill)
{
	const uint64_t over = MIN(fill, (uint64_t)FILL_ALL) - FILL_SLOW,
		       span = FILL_ALL - FILL_SLOW;
	const uint64_t now = now_ns();
	uint64_t speed, pause;

	pthread_mutex_lock(&b->dirty.lock);
	speed = MAX(MAX(b->last_second, b->this_second), (uint64_t)SPEED_MIN);
	speed += 3 * speed / span * (span - over);
	b->pace_until = MAX(b->pace_until, now);
	pause = MIN(b->pace_until - now, PAUSE_MAX_NS);
	b->pace_until += MIN(len * NS_PER_S / speed, PAUSE_MAX_NS);
	co_wq_wake_one(&b->dirty.work); /* units are due sooner now */
	pthread_mutex_unlock(&b->dirty.lock);
	return pause;
}

/* The journal has no room for a writer. */
int back_want_room(void *arg)
{
	struct back *b = arg;

	pthread_mutex_lock(&b->dirty.lock);
	co_wq_wake_one(&b->dirty.work);
	pthread_mutex_unlock(&b->dirty.lock);
	return away_error(b);
}

int back_throttle(struct back *b, uint64_t len)
{
	uint64_t fill, pause;
	int rc = 0;

	if (b->c->away == AWAY_READONLY && away_error(b))
		return -EROFS;
	fill = back_fill(b);
	if (likely(fill <= FILL_SLOW))
		return 0;
	pause = take_turn(b, len, fill);
	if (pause)
		co_sleep(pause);
	/* The journal waits for room by itself. Once it has failed what it has not synced stays where it is. */
	while (!rc && dirty_fill(&b->dirty) >= FILL_ALL) {
		rc = atomic_load(&b->journal.error);
		if (!rc)
			rc = back_want_room(b);
		if (!rc)
			co_sleep(FULL_PAUSE_NS);
	}
	return rc;
}
