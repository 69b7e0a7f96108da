/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Sending in the background. `uploads` fibers on the reactor that opened the layer take units as
 * they are due: one that somebody waits for at once, others when they are full or `lag` old, sooner
 * the fuller the journal is. One of the fibers, the keeper, sleeps until something is due; who knows of
 * something that is due earlier takes its place. Whoever takes work wakes another one first. Between
 * units one of them gives segments back.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/cache/cache_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/identity.h"

#define NS_PER_S UINT64_C(1000000000)
#define IDLE_NS  (NS_PER_S)

/* Units that are asked for before others have their turn. */
enum { TURN = 512 };

/* --- Workers ---------------------------------------------------------------------------------- */

/* How old a unit gets. */
static uint64_t age_now(struct back *b)
{
	const uint64_t fill = back_fill(b);

	return fill >= FILL_SLOW ? 0 : b->c->lag_ns / FILL_SLOW * (FILL_SLOW - fill);
}

/* Segments on their way back. */
struct giving {
	struct back *b;
	int flush_rc; /* what the layer below said; all other errors are the journal's own */
};

static CO_FN int flush_below(void *arg)
{
	struct giving *g = arg;
	struct chan *below = g->b->chan->kids[0];

	if (!(below->layer->caps & CAN_FLUSH))
		return 0;
	g->flush_rc = ch_flush(below);
	back_account_flush(g->b, g->flush_rc);
	return g->flush_rc;
}

/* Segments: the oldest, or all when nothing needs them. */
static CO_FN void give_back(struct back *b, bool all)
{
	struct giving g = { b, 0 };
	const int rc = all ? journal_empty(&b->journal, flush_below, &g)
			   : journal_free_segments(&b->journal, false, flush_below, &g);

	if (rc && !g.flush_rc)
		back_account_journal(b, rc);
}

/* The end: all of them, the head too. What the layer below says. */
static CO_FN int give_all_back(struct back *b)
{
	struct giving g = { b, 0 };
	const int rc = journal_free_segments(&b->journal, true, flush_below, &g);

	if (rc && !g.flush_rc)
		back_account_journal(b, rc);
	return g.flush_rc;
}

static CO_FN void send_one(struct back *b, struct unit *u)
{
	struct snapshot s;
	int rc;

	if (!unit_begin(&b->dirty, u, &s))
		return;
	/*
	 * Below there is never more than the journal is sure to have: else a crash of the machine
	 * could leave an older change in it, and bring that back over the newer one below, or leave
	 * there what is newer than changes that are lost. In memory this costs nothing.
	 */
	rc = journal_sync(&b->journal);
	if (rc)
		rc = journal_covers(&b->journal, s.seq);
	if (!rc)
		rc = unit_send(b, u, &s);
	back_account(b, u->obj.name, s.bytes, rc);
	unit_end(&b->dirty, u, &s, rc);
}

/* With dirty.lock held, but not while it works. False: nothing to do before *due. */
static CO_FN bool work_once(struct back *b, uint64_t age, uint64_t *due)
{
	struct dirty *d = &b->dirty;
	uint64_t idle = UINT64_MAX;
	const uint64_t free_at = MAX(b->retry_at, b->free_at);
	const bool is_due = free_at <= now_ns(), may_free = is_due && !b->is_freeing;
	const bool all = may_free && journal_is_idle(&b->journal, b->c->lag_ns + IDLE_NS, &idle);
	struct unit *u;

	if (all || (may_free && journal_can_free(&b->journal))) {
		b->is_freeing = true;
		co_wq_wake_one(&d->work);
		pthread_mutex_unlock(&d->lock);
		give_back(b, all);
		pthread_mutex_lock(&d->lock);
		b->is_freeing = false;
		return true;
	}
	u = dirty_next(d, age, b->retry_at, due);
	*due = MIN(*due, is_due ? idle : free_at);
	if (!u)
		return false;
	co_wq_wake_one(&d->work);
	pthread_mutex_unlock(&d->lock);
	send_one(b, u);
	pthread_mutex_lock(&d->lock);
	return true;
}

/* Until there may be something to do. With dirty.lock held, but not meanwhile. */
static CO_FN void wait_for_work(struct back *b, uint64_t due)
{
	struct dirty *d = &b->dirty;
	const uint64_t now = now_ns();

	if (due <= now)
		return;
	if (due >= b->keeper_due) {
		co_wq_wait(&d->work, &d->lock);
		return;
	}
	b->keeper_due = due; /* who was the keeper wakes up later, which does no harm */
	(void)co_wq_wait_for(&d->work, &d->lock, due - now); /* looks anew either way */
	if (b->keeper_due == due)
		b->keeper_due = UINT64_MAX;
}

static CO_FN void worker(void *arg)
{
	struct back *b = arg;
	struct dirty *d = &b->dirty;

	pthread_mutex_lock(&d->lock);
	while (!b->is_stopping) {
		uint64_t due;

		if (!work_once(b, age_now(b), &due))
			wait_for_work(b, due);
	}
	co_wq_wake_one(&d->work); /* the next one ends too */
	if (--b->workers_n == 0)
		co_wq_wake_all(&b->ended);
	pthread_mutex_unlock(&d->lock);
}

/* --- Everything at once ----------------------------------------------------------------------- */

int back_drain_object(struct back *b, const struct obj *obj)
{
	struct target t;

	return dirty_target(&b->dirty, obj, &t) ? 0 : target_wait(&b->dirty, &t);
}

/*
 * `gives_up`: after the first failure below the others are not waited for. What the journal cannot sync fails at
 * once, and says nothing about the others.
 */
static CO_FN int drain(struct back *b, bool gives_up)
{
	struct target *v;
	bool has_given_up = false;
	size_t n;
	int rc = dirty_targets(&b->dirty, &v, &n);

	for (size_t i = 0; i < n && !rc; i++) {
		target_want(&b->dirty, &v[i]);
		if (i % TURN == TURN - 1)
			co_yield();
	}
	for (size_t i = 0; i < n; i++) {
		int one = 0;

		if (has_given_up)
			target_drop(&b->dirty, &v[i]);
		else
			one = target_wait(&b->dirty, &v[i]);
		if (one && gives_up && !journal_covers(&b->journal, v[i].seq))
			has_given_up = true;
		if (!rc)
			rc = one;
	}
	free(v);
	return rc;
}

int back_drain(struct back *b)
{
	return drain(b, false);
}

/* --- Life ------------------------------------------------------------------------------------- */

/* Names of layers and places without options: what makes it another volume. */
static int print_place(FILE *f, const struct spec *s)
{
	const struct layer_ops *ops = layer_find(s->layer);
	struct spec bare = *s;

	bare.args_n = bare.kids_n = 0;
	if (s->kids_n == 0) {
		_cleanup_free_ char *text = spec_format(&bare);

		return text && fputs(text, f) >= 0 ? 0 : -ENOMEM;
	}
	if (ops && ops->keyed_kids && fprintf(f, "%s:", s->layer) < 0)
		return -ENOMEM;
	for (unsigned i = 0; i < s->kids_n; i++) {
		int rc = i && fputc(',', f) == EOF ? -ENOMEM : print_place(f, s->kids[i]);

		if (rc)
			return rc;
	}
	return 0;
}

char *back_volume(const struct layer *l)
{
	const struct cache *c = l->self;
	char *text = NULL;
	size_t len;
	FILE *f;
	int rc;

	if (c->volume)
		return strdup(c->volume);
	f = open_memstream(&text, &len);
	if (!f)
		return NULL;
	rc = print_place(f, l->spec->kids[0]);
	if (!rc && !l->is_keyed && l->export_name && fprintf(f, " (%s)", l->export_name) < 0)
		rc = -ENOMEM;
	if (fclose(f) != 0 || rc) {
		free(text);
		return NULL;
	}
	return text;
}

static void show(void *arg, const struct record *r)
{
	struct back *b = arg;

	dirty_show(&b->dirty, r);
}

/* No co_group: without memory that would run one here, and a worker runs until the end. */
static CO_FN int start_workers(struct back *b)
{
	int rc = 0;

	for (uint64_t i = 0; i < b->c->uploads && !rc; i++) {
		b->workers_n++; /* those that are there run on this reactor */
		rc = co_spawn(worker, b);
		if (rc)
			b->workers_n--;
	}
	return b->workers_n ? 0 : rc; /* fewer do, too */
}

static CO_FN int start(struct back *b, struct err *err)
{
	int rc = layer_chan_open(b->l, &b->chan);

	if (rc)
		return err_set(err, rc, "layer cache: no channel to the layer below: %s",
			       err_name(rc));
	b->home = reactor_self();
	b->keeper_due = UINT64_MAX;
	co_wq_init(&b->ended);
	rc = start_workers(b);
	if (rc) {
		layer_chan_close(b->chan);
		return err_set(err, rc, "out of memory");
	}
	return 0;
}

static void free_back(struct back *b)
{
	dirty_free(&b->dirty);
	rangelock_destroy(&b->objects);
	free(b->volume);
	free(b);
}

/* For whom the volume that is there is the one that counts: `init` must not cost its data. */
#define MEND "move the folder away"
#define MEND_MAPPED                                                                           \
	MEND ", or say \"nbdrsd init --force\" with this chain and the volume's size, which " \
	     "removes it and keeps the volume"

int back_open(struct layer *l, struct err *err)
{
	struct cache *c = l->self;
	struct back *b = calloc(1, sizeof(*b));
	struct journal_conf conf = { .folder = c->disk, .size = c->journal_size, .show = show };
	int rc;

	if (!b)
		return err_set(err, -ENOMEM, "out of memory");
	b->c = c;
	b->l = l;
	b->name = l->export_name ? l->export_name : "cache";
	b->is_ro = l->want_ro || !(l->kids[0]->caps & CAN_WRITE);
	b->is_whole = l->is_keyed && !(l->kids[0]->caps & CAN_PARTIAL);
	rangelock_init(&b->objects);
	b->volume = back_volume(l);
	rc = b->volume ? dirty_init(&b->dirty, l->is_keyed, c->lag_ns, c->uploads) : -ENOMEM;
	if (rc) {
		free_back(b);
		return err_set(err, rc, "out of memory");
	}
	rc = c->disk ? identity_below(l, b->identity, err) : 0;
	if (rc) {
		free_back(b);
		return err_prefix(err, rc, "layer cache");
	}
	conf.volume = b->volume;
	conf.identity = b->identity;
	conf.mend = cache_init_keeps(l) ? MEND_MAPPED : MEND;
	conf.name = b->name;
	conf.is_ro = b->is_ro;
	conf.want_room = back_want_room;
	conf.arg = b;
	c->back = b;
	rc = journal_open(&b->journal, &conf, err);
	if (!rc)
		rc = cache_tier_start(l, err);
	if (!rc && !b->is_ro)
		rc = start(b, err);
	if (rc) {
		cache_tier_stop(l);
		dirty_free(&b->dirty); /* its references into the journal first */
		journal_close(&b->journal);
		c->back = NULL;
		free_back(b);
	}
	return rc;
}

static CO_FN int stop(void *arg)
{
	struct back *b = arg;
	/* Flushed means in the journal: the next process sends it, and nobody waits for the store now. */
	const bool is_left = b->l->comes_again && b->c->is_local;
	int rc = is_left ? 0 : drain(b, true);

	pthread_mutex_lock(&b->dirty.lock);
	b->is_stopping = true;
	co_wq_wake_all(&b->dirty.work);
	while (b->workers_n) /* one of them may be giving segments back */
		co_wq_wait(&b->ended, &b->dirty.lock);
	pthread_mutex_unlock(&b->dirty.lock);
	if (!rc && !is_left)
		rc = give_all_back(b);
	layer_chan_close(b->chan);
	return rc;
}

void back_close(struct layer *l)
{
	struct cache *c = l->self;
	struct back *b = c->back;
	uint64_t left;
	int rc = 0;

	if (!b)
		return;
	if (!b->is_ro)
		rc = reactor_call(b->home, stop, b);
	left = atomic_load(&b->dirty.bytes);
	if (rc && c->disk)
		log_warn(
			"%s: unsaved data stays in the journal, the layer below did not take it bytes=%" PRIu64
			" folder=%s error=%s",
			b->name, left, c->disk, err_name(rc));
	else if (rc)
		log_error("%s: unsaved data is lost, the layer below did not take it bytes=%" PRIu64
			  " error=%s",
			  b->name, left, err_name(rc));
	cache_tier_stop(l);
	dirty_free(&b->dirty); /* its references into the journal first */
	journal_close(&b->journal);
	c->back = NULL;
	free_back(b);
}
