/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The record of what is in doubt, as it lies on the nodes: one object on each, replaced as a whole.
 *
 *	doubt 1
 *	48			the region that begins with shard 48
 *	other			what is no shard
 *	out 2			a node that is left out (distributed_out.c)
 *	end
 *
 * None is the same as one that names nothing. Each state of the table is a version. Every node has at most one put
 * on its way, which takes the newest version along, so those who wait for different regions share it, and a slow
 * node holds up nobody as long as `quorum` others are faster. A node that failed gets the newest version when it is
 * asked the next time. At open what any of them names counts: too much does no harm.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/distributed/distributed.h"
#include "nbdrs/reactor.h"

static const char first_line[] = "doubt 1\n", other_line[] = "other\n", last_line[] = "end\n";

/* No table has more regions than REGIONS_READ_MAX, so what is written can be read. */
enum { LINE_MAX_LEN = 22 };
enum {
	RECORD_SIZE_MAX = sizeof(first_line) + (REGIONS_READ_MAX + NODES_MAX) * LINE_MAX_LEN +
			  sizeof(last_line)
};

/* ---- text ---- */

/* One version, on its way to some nodes. */
struct doubt_text {
	unsigned users;
	uint64_t version;
	bool is_empty;
	size_t len;
	char text[];
};

/* NULL: out of memory. With the lock held. */
static struct doubt_text *text_make(const struct doubt *t)
{
	size_t room = sizeof(first_line) + (t->n + (size_t)NODES_MAX) * LINE_MAX_LEN +
		      sizeof(last_line);
	size_t at = 0;
	struct doubt_text *x = malloc(sizeof(*x) + room);
	struct region *g, *next;

	if (x == NULL)
		return NULL;
	at += (size_t)snprintf(x->text, room, "%s", first_line);
	for (unsigned i = 0; i < NODES_MAX && t->is_out_named; i++)
		if (t->out & bit(i))
			at += (size_t)snprintf(x->text + at, room - at, "out %u\n", i);
	HASH_ITER(hh, t->table, g, next) {
		if (g->n == REGION_OTHERS)
			at += (size_t)snprintf(x->text + at, room - at, "%s", other_line);
		else
			at += (size_t)snprintf(x->text + at, room - at, "%" PRIu64 "\n",
					       g->n * REGION_SHARDS);
	}
	at += (size_t)snprintf(x->text + at, room - at, "%s", last_line);
	x->users = 0;
	x->version = t->version;
	x->is_empty = t->n == 0 && t->out == 0; /* a delete would not be durable */
	x->len = at;
	return x;
}

/* With the lock held. */
static void text_put(struct doubt *t, struct doubt_text *x)
{
	if (x == NULL || --x->users > 0)
		return;
	if (t->text == x)
		t->text = NULL;
	free(x);
}

/* The newest version, made once for all who want it at the same time. NULL: out of memory. With the lock held. */
static struct doubt_text *text_get(struct doubt *t)
{
	if (t->text == NULL || t->text->version != t->version)
		t->text = text_make(t);
	if (t->text != NULL)
		t->text->users++;
	return t->text;
}

/* "out N", each once. */
static int parse_out(const char *line, uint64_t *out)
{
	uint64_t node;

	if (parse_u64(line, &node) != 0 || node >= NODES_MAX || *out & bit((unsigned)node))
		return -EILSEQ;
	*out |= bit((unsigned)node);
	return 0;
}

int doubt_parse(const char *text, size_t len, int (*add)(void *arg, uint64_t region), void *arg,
		uint64_t *out)
{
	const char *at = text, *end = text + len;
	size_t first = sizeof(first_line) - 1;
	uint64_t left_out = 0;
	unsigned n = 0;

	if (len < first || memcmp(at, first_line, first) != 0)
		return -EILSEQ;
	for (at += first; at < end;) {
		const char *eol = memchr(at, '\n', (size_t)(end - at));
		char line[LINE_MAX_LEN + 1];
		uint64_t shard, region = REGION_OTHERS;
		int rc;

		if (eol == NULL || eol - at >= LINE_MAX_LEN ||
		    memchr(at, '\0', (size_t)(eol - at)) != NULL)
			return -EILSEQ;
		memcpy(line, at, (size_t)(eol + 1 - at));
		line[eol + 1 - at] = '\0';
		at = eol + 1;
		if (strcmp(line, last_line) == 0) {
			if (at != end)
				return -EILSEQ;
			*out = left_out;
			return 0;
		}
		if (strcmp(line, other_line) != 0) {
			line[strlen(line) - 1] = '\0';
			if (strncmp(line, "out ", 4) == 0) {
				if (parse_out(line + 4, &left_out) != 0)
					return -EILSEQ;
				continue;
			}
			if (parse_u64(line, &shard) != 0 || shard % REGION_SHARDS != 0)
				return -EILSEQ;
			region = shard / REGION_SHARDS;
		}
		rc = n++ < REGIONS_READ_MAX ? add(arg, region) : -EILSEQ;
		if (rc != 0)
			return rc;
	}
	return -EILSEQ; /* without its end */
}

/* ---- on a node ---- */

static int add_region(void *arg, uint64_t region)
{
	return doubt_add(arg, region);
}

int doubt_read(struct chan *c, unsigned node)
{
	struct dist *d = c->layer->self;
	struct obj_stat st;
	struct chan *kid;
	struct iovec v;
	struct iov iov;
	struct obj obj;
	char *text;
	int rc = node_chan(c, node, &kid);

	(void)obj_set(&obj, DOUBT_NAME); /* a good name */
	if (rc == 0)
		rc = ch_stat(kid, &obj, &st);
	if (rc != 0)
		return rc == -ENOENT ? 0 : rc;
	text = st.size > 0 && st.size <= RECORD_SIZE_MAX ? malloc(st.size) : NULL;
	if (text == NULL)
		return st.size > 0 && st.size <= RECORD_SIZE_MAX ? -ENOMEM : -EILSEQ;
	iov = iov_one(&v, text, st.size);
	rc = ch_read(kid, (struct ext){ &obj, 0, st.size }, &iov, 0);
	if (rc == 0)
		rc = doubt_parse(text, st.size, add_region, d, &d->doubt.copies[node].named);
	free(text);
	return rc;
}

static CO_FN int put_text(struct chan *c, unsigned node, struct doubt_text *x)
{
	struct iovec v;
	struct iov iov = iov_one(&v, x->text, x->len);
	struct obj obj;
	struct put put = { .obj = &obj, .iov = &iov, .fl = IO_FUA };
	struct chan *kid;
	int rc = node_chan(c, node, &kid);

	if (rc != 0)
		return rc;
	(void)obj_set(&obj, DOUBT_NAME); /* a good name */
	rc = x->is_empty ? ch_del(kid, &obj, 1) : ch_put(kid, &put, NULL);
	node_result(c->layer->self, node, rc);
	return rc;
}

/* The newest version that `quorum` nodes that have joined have. With the lock held. */
static void find_durable(struct dist *d)
{
	struct doubt *t = &d->doubt;

	for (unsigned i = 0; i < d->placing->nodes; i++) {
		unsigned n = 0;

		for (unsigned k = 0; k < d->placing->nodes; k++)
			n += d->nodes[k].is_joined && t->copies[k].has >= t->copies[i].has;
		if (n >= d->quorum && t->copies[i].has > t->durable)
			t->durable = t->copies[i].has;
	}
}

void doubt_leaves(struct dist *d, uint64_t nodes)
{
	struct doubt *t = &d->doubt;

	pthread_mutex_lock(&t->lock);
	for (unsigned i = 0; i < d->placing->nodes; i++)
		if (nodes & bit(i))
			d->nodes[i].is_joined = false;
	t->durable = 0;
	find_durable(d);
	co_wq_wake_all(&t->wq);
	pthread_mutex_unlock(&t->lock);
}

/* Until the node has the newest version, or fails. is_busy was set by who started it. */
static CO_FN void bring(void *arg)
{
	struct doubt_copy *k = arg;
	struct chan *c = k->c;
	struct dist_chan *dc = c->self;
	struct dist *d = c->layer->self;
	struct doubt *t = &d->doubt;
	unsigned node = (unsigned)(k - t->copies);
	bool again;

	do {
		struct doubt_text *x;
		int rc;

		pthread_mutex_lock(&t->lock);
		k->begun++;
		x = text_get(t);
		pthread_mutex_unlock(&t->lock);
		rc = x != NULL ? put_text(c, node, x) : -ENOMEM;

		pthread_mutex_lock(&t->lock);
		if (rc == 0) {
			k->has = x->version;
			find_durable(d);
		} else {
			k->failed = k->begun;
			d->nodes[node].not_before = now_ns() + d->recheck;
		}
		text_put(t, x);
		again = rc == 0 && k->has < t->version;
		if (!again) {
			k->is_busy = false;
			dc->bringing--;
		}
		co_wq_wake_all(&t->wq);
		pthread_mutex_unlock(&t->lock);
	} while (again);
}

/* With the lock held, which is let go meanwhile. */
static CO_FN void start(struct chan *c, uint64_t nodes)
{
	struct dist *d = c->layer->self;
	struct dist_chan *dc = c->self;
	struct doubt *t = &d->doubt;

	for (unsigned i = 0; i < d->placing->nodes; i++) {
		if (!(nodes & bit(i)))
			continue;
		t->copies[i].is_busy = true;
		t->copies[i].c = c;
		dc->bringing++;
	}
	pthread_mutex_unlock(&t->lock);
	for (unsigned i = 0; i < d->placing->nodes; i++)
		if (nodes & bit(i) && co_spawn(bring, &t->copies[i]) != 0)
			bring(&t->copies[i]); /* no fiber: here, then */
	pthread_mutex_lock(&t->lock);
}

/* Sets of nodes. */
struct outlook {
	uint64_t have, coming, free; /* have it; a put is on its way; may be asked */
};

/* Without those that failed in a put begun after `since`. With the lock held. */
static struct outlook look_ahead(const struct dist *d, uint64_t version,
				 const uint64_t since[NODES_MAX])
{
	struct outlook o = { 0, 0, 0 };

	for (unsigned i = 0; i < d->placing->nodes; i++) {
		const struct doubt_copy *k = &d->doubt.copies[i];

		if (!d->nodes[i].is_joined)
			continue;
		if (k->has >= version)
			o.have |= bit(i);
		else if (k->failed > since[i])
			continue; /* though somebody else may be trying again, and again */
		else if (k->is_busy)
			o.coming |= bit(i);
		else
			o.free |= bit(i);
	}
	return o;
}

int doubt_wait(struct chan *c, uint64_t version, unsigned need)
{
	struct dist *d = c->layer->self;
	struct doubt *t = &d->doubt;
	uint64_t since[NODES_MAX], up;
	struct place nodes;
	int rc = 0;

	if (likely(version <= t->durable && need <= d->quorum))
		return 0;
	(void)place_name(d->placing, "size", &nodes); /* on all of them */
	pthread_mutex_lock(&t->lock);
	for (unsigned i = 0; i < nodes.n; i++)
		since[i] = t->copies[i].begun;
	for (;;) {
		struct outlook o = look_ahead(d, version, since);

		if (count(o.have) >= need)
			break;
		up = o.free & holders_up(d, &nodes);
		if (count(o.have | o.coming | up) < need)
			up = o.free; /* perhaps it answers after all */
		if (count(o.have | o.coming | up) < need) {
			rc = holders_error(d, &nodes, all_of(&nodes) & ~o.have);
			break;
		}
		if (up != 0)
			start(c, up);
		else
			co_wq_wait(&t->wq, &t->lock);
	}
	pthread_mutex_unlock(&t->lock);
	return rc;
}

void doubt_push(struct chan *c)
{
	struct dist *d = c->layer->self;
	struct doubt *t = &d->doubt;
	struct place nodes;
	uint64_t up;

	(void)place_name(d->placing, "size", &nodes); /* on all of them */
	up = holders_ready(d, &nodes);
	pthread_mutex_lock(&t->lock);
	for (unsigned i = 0; i < nodes.n; i++)
		if (t->copies[i].has >= t->version || t->copies[i].is_busy)
			up &= ~bit(i);
	start(c, up);
	pthread_mutex_unlock(&t->lock);
}

void doubt_drain(struct chan *c)
{
	struct dist *d = c->layer->self;
	const struct dist_chan *dc = c->self;

	pthread_mutex_lock(&d->doubt.lock);
	while (dc->bringing > 0)
		co_wq_wait(&d->doubt.wq, &d->doubt.lock);
	pthread_mutex_unlock(&d->doubt.lock);
}
