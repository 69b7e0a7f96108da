/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * distributed: where objects come to lie, what is read and written while nodes are away, what survives a restart,
 * and that replicas are equal again afterwards. Nodes are switched off by fault layers (a file in the run's
 * folder), and looked at below those, object by object.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "conform_store.h"
#include "conformance.h"
#include "layer/distributed/distributed.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"

enum { KI = 1024, MI = KI * KI, LEN = 8 * KI };
enum { DEADLINE_S = 20 };

/* --- Nodes ------------------------------------------------------------------------------------ */

/* The store of node i, below its fault layer. */
static CO_FN struct chan *node(struct store_run *r, unsigned i)
{
	struct chan *c = store_chan(r), *kid = NULL;
	/* One that came late has a channel here only when somebody wanted it. */
	int rc = chan_kid(c, i, &kid);

	assert(rc == 0);
	while (kid->layer->kids_n > 0)
		kid = kid->kids[0];
	return kid;
}

/* "fault[file=@/offN]": the node fails while the file is there. */
static int node_off(struct store_run *r, unsigned i, bool is_off)
{
	char path[300];
	int fd;

	(void)snprintf(path, sizeof(path), "%s/off%u", r->folder, i);
	if (!is_off)
		return unlink(path);
	fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
	if (fd >= 0)
		close(fd);
	return fd >= 0 ? 0 : -1;
}

static struct obj named(const char *name)
{
	struct obj o;

	assert(obj_set(&o, name) == 0);
	return o;
}

static CO_FN int put_byte(struct chan *c, const char *name, uint8_t byte, size_t len)
{
	_cleanup_free_ uint8_t *data = malloc(len + 1);
	struct obj o = named(name);
	struct iovec v;
	struct iov iov = iov_one(&v, data, len);
	struct put put = { .obj = &o, .iov = &iov };

	memset(data, byte, len);
	return ch_put(c, &put, NULL);
}

static CO_FN int write_byte(struct chan *c, const char *name, uint64_t off, uint8_t byte,
			    size_t len, unsigned fl)
{
	_cleanup_free_ uint8_t *data = malloc(len + 1);
	struct obj o = named(name);
	struct iovec v;
	struct iov iov = iov_one(&v, data, len);

	memset(data, byte, len);
	return ch_write(c, (struct ext){ &o, off, len }, &iov, fl);
}

static CO_FN int del(struct chan *c, const char *name)
{
	struct obj o = named(name);

	return ch_del(c, &o, 1);
}

/* The one byte that all of [off, off + len) is; -EILSEQ when it is several, or the read's error. */
static CO_FN int read_byte(struct chan *c, const char *name, uint64_t off, size_t len)
{
	_cleanup_free_ uint8_t *data = malloc(len + 1);
	struct obj o = named(name);
	struct iovec v;
	struct iov iov = iov_one(&v, data, len);
	int rc = ch_read(c, (struct ext){ &o, off, len }, &iov, 0);

	for (size_t i = 1; i < len && rc == 0; i++)
		if (data[i] != data[0])
			return -EILSEQ;
	return rc ? rc : data[0];
}

struct counting {
	const char *prefix;
	unsigned n;
	char last[OBJ_NAME_MAX + 1];
	uint64_t size;
};

static int count_one(void *arg, const char *name, uint64_t size)
{
	struct counting *k = arg;

	if (strncmp(name, k->prefix, strlen(k->prefix)) == 0) {
		k->n++;
		(void)snprintf(k->last, sizeof(k->last), "%s", name);
		k->size = size;
	}
	return 0;
}

/* How many objects begin with prefix. */
static CO_FN int count_of(struct chan *c, const char *prefix)
{
	struct counting k = { .prefix = prefix };
	int rc = ch_list(c, prefix, count_one, &k);

	return rc ? rc : (int)k.n;
}

static void add_state(struct info *i, const char *key, const char *value);

struct state {
	struct info base;
	bool is_good;
	char all[1024];
};

static void add_state(struct info *i, const char *key, const char *value)
{
	struct state *s = container_of(i, struct state, base);
	size_t at = strlen(s->all);

	if (strcmp(key, "state") == 0)
		s->is_good = strcmp(value, "good") == 0;
	(void)snprintf(s->all + at, sizeof(s->all) - at, "%s: %s; ", key, value);
}

static struct state status(struct store_run *r)
{
	struct state s = { .base = { .add = add_state } };
	struct layer *l = chain_top(r->chain);

	l->ops->status(l, &s.base);
	return s;
}

/* Waits until all nodes are there and caught up, and no record is left. */
static CO_FN int wait_good(struct store_run *r)
{
	uint64_t until = now_ns() + DEADLINE_S * UINT64_C(1000000000);
	struct layer *l = chain_top(r->chain);
	struct state s;

	for (;;) {
		int records = 0;

		s = status(r);
		for (unsigned i = 0; i < l->kids_n && s.is_good && records == 0; i++)
			records = count_of(node(r, i), RECORD_PREFIX);
		if (s.is_good && records == 0)
			return 0;
		CHECK(r, now_ns() < until, "still %s records=%d", s.all, records);
		co_sleep(1000000);
	}
}

/* All holders of shard n have the same bytes, or none has it. */
static CO_FN int same_everywhere(struct store_run *r, unsigned shard)
{
	const struct dist *d = chain_top(r->chain)->self;
	_cleanup_free_ uint8_t *first = malloc(MI), *other = malloc(MI);
	struct obj_stat st, st0 = { 0 };
	char name[32];
	struct place at;
	int rc0 = 0;

	(void)snprintf(name, sizeof(name), "block-%u", shard);
	(void)place_name(d->placing, name, &at);
	for (unsigned h = 0; h < at.n; h++) {
		uint8_t *to = h ? other : first;
		struct obj o;
		struct iovec v;
		int rc;

		place_stored(&at, name, h, &o);
		rc = ch_stat(node(r, at.node[h]), &o, &st);
		if (h == 0) {
			rc0 = rc;
			st0 = st;
		}
		CHECK(r, rc == rc0, "%s: holder 0 %s, holder %u %s", name, err_name(rc0), h,
		      err_name(rc));
		if (rc == -ENOENT)
			continue;
		CHECK(r, rc == 0 && st.size == st0.size && st.size <= MI,
		      "%s: %s, %ju and %ju bytes", name, err_name(rc), (uintmax_t)st0.size,
		      (uintmax_t)st.size);
		struct iov iov = iov_one(&v, to, st.size);

		CHECK(r, ch_read(node(r, at.node[h]), (struct ext){ &o, 0, st.size }, &iov, 0) == 0,
		      "%s", name);
		CHECK(r, memcmp(first, to, st.size) == 0, "%s: holder %u differs", name, h);
	}
	return 0;
}

static void check(const char *text, int (*fn)(void *run))
{
	const struct store_what what = { .text = text, .in_memory = true };
	const char *failure = store_with(&what, fn);

	if (failure)
		fail_msg("%s", failure);
}

/* Removes all objects of all nodes, so that folders can go. */
static CO_FN int wipe(struct store_run *r)
{
	for (unsigned i = 0; i < chain_top(r->chain)->kids_n; i++) {
		struct counting k = { .prefix = "" };

		while (ch_list(node(r, i), "", count_one, &k) == 0 && k.n > 0) {
			CHECK(r, del(node(r, i), k.last) == 0, "%s", k.last);
			k.n = 0;
		}
	}
	return 0;
}

#define OFF(i) \
	"fault[file=@/off" #i ",ops=read|write|zero|trim|flush|stat|put|del|list,error=ETIMEDOUT]"

/* --- Where it lies ---------------------------------------------------------------------------- */

static CO_FN int layout(void *arg)
{
	static const uint8_t nodes[3][2] = { { 0, 1 }, { 0, 2 }, { 1, 2 } };
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct counting k = { .prefix = "block-7" };
	char name[32];

	CHECK(r, put_byte(c, "size", '5', 3) == 0);
	for (unsigned n = 0; n < 12; n++) {
		(void)snprintf(name, sizeof(name), "block-%u", n);
		CHECK(r, put_byte(c, name, (uint8_t)n, LEN + n) == 0);
	}
	for (unsigned n = 0; n < 12; n++)
		for (unsigned h = 0; h < 2; h++) {
			(void)snprintf(name, sizeof(name), "block-%u-%u", n, h);
			for (unsigned i = 0, at = nodes[n % 3][h]; i < 3; i++)
				CHECK(r,
				      read_byte(node(r, i), name, 0, LEN) ==
					      (i == at ? (int)n : -ENOENT),
				      "%s on node %u", name, i);
		}
	for (unsigned i = 0; i < 3; i++)
		CHECK(r,
		      read_byte(node(r, i), "size", 0, 3) == '5' && count_of(node(r, i), "") == 9);
	/* Other programs' objects are none of ours. */
	CHECK(r, put_byte(node(r, 0), "block-20", 'x', 1) == 0 &&
			 put_byte(node(r, 0), "block-2-0", 'x', 1) == 0);
	CHECK(r, count_of(c, "") == 13 && count_of(c, "block-1") == 3 && count_of(c, "si") == 1);
	CHECK(r, ch_list(c, "block-7", count_one, &k) == 0 && k.n == 1 && k.size == LEN + 7);
	CHECK(r, put_byte(c, "block-1-1", 'x', 1) == -EINVAL &&
			 put_byte(c, "stale-x", 'x', 1) == -EINVAL);
	CHECK(r, del(c, "block-7") == 0 && count_of(c, "block-7") == 0 &&
			 read_byte(c, "block-7", 0, 1) == -ENOENT);
	CHECK(r, count_of(node(r, 0), "block-7") == 0 && count_of(node(r, 2), "block-7") == 0);
	/* nbd-rs keeps the size on node 0 only. */
	CHECK(r, del(node(r, 1), "size") == 0 && del(node(r, 2), "size") == 0);
	CHECK(r, read_byte(c, "size", 0, 3) == '5' && count_of(c, "size") == 1);
	return 0;
}

static void test_layout(void **state)
{
	check("distributed[replicas=2]{mem,mem,mem}", layout);
	check("distributed[replicas=2,quorum=1,read=first]{mem[partial=off],mem,mem[partial=off]}",
	      layout);
}

/* --- A node that is away ---------------------------------------------------------------------- */

/* block-0 and block-3 lie on nodes 0 and 1. */
static CO_FN int away(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);

	CHECK(r, put_byte(c, "block-0", 'a', LEN) == 0 && put_byte(c, "block-3", 'a', LEN) == 0);
	CHECK(r, ch_flush(c) == 0, "or one of them may still be on its way");
	CHECK(r, node_off(r, 1, true) == 0);
	for (uint8_t b = 'b'; b < 'h'; b++) {
		/* The first one finds out; FUA waits for that. */
		CHECK(r, write_byte(c, "block-0", 0, b, LEN, b == 'b' ? IO_FUA : 0) == 0);
		/* Recorded once, and before the answer. */
		CHECK(r, count_of(node(r, 0), "stale-block-0-1-") == 1, "%d",
		      count_of(node(r, 0), "stale-block-0-1-"));
		CHECK(r, read_byte(c, "block-0", 0, LEN) == b);
	}
	CHECK(r, count_of(node(r, 0), "stale-") == 1, "block-3 was not written");
	CHECK(r, put_byte(c, "block-3", 'z', 100) == 0 &&
			 count_of(node(r, 0), "stale-block-3-1-") == 1);
	CHECK(r, read_byte(node(r, 1), "block-0-1", 0, LEN) == 'a');
	CHECK(r, !status(r).is_good && strstr(status(r).all, "node-1: away, 2 stale"), "%s",
	      status(r).all);
	/* Back, and never an old byte. */
	CHECK(r, node_off(r, 1, false) == 0);
	for (unsigned i = 0; i < 50; i++) {
		CHECK(r, read_byte(c, "block-0", 0, LEN) == 'g' &&
				 read_byte(c, "block-3", 0, 100) == 'z');
		co_yield();
	}
	if (wait_good(r))
		return -1;
	CHECK(r, read_byte(node(r, 1), "block-0-1", 0, LEN) == 'g' &&
			 read_byte(node(r, 1), "block-3-1", 0, 100) == 'z');
	CHECK(r, read_byte(c, "block-3", 0, 101) == -EILSEQ, "shorter now, zeroes behind it");
	return same_everywhere(r, 0) || same_everywhere(r, 3) ? -1 : 0;
}

/* What is known of stale replicas is on the nodes: another daemon finds it there. */
static CO_FN int away_restart(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);

	CHECK(r, put_byte(c, "block-0", 'a', LEN) == 0 && put_byte(c, "block-3", 'a', LEN) == 0);
	CHECK(r, ch_flush(c) == 0 && node_off(r, 0, true) == 0);
	CHECK(r, write_byte(c, "block-0", 0, 'b', LEN, 0) == 0 && del(c, "block-3") == 0);
	CHECK(r, node_off(r, 0, false) == 0);
	if (store_reopen(r))
		return -1;
	c = store_chan(r);
	for (unsigned i = 0; i < 50; i++) {
		CHECK(r, read_byte(c, "block-0", 0, LEN) == 'b', "%d",
		      read_byte(c, "block-0", 0, LEN));
		CHECK(r, read_byte(c, "block-3", 0, LEN) == -ENOENT && count_of(c, "block-3") == 0);
	}
	if (wait_good(r))
		return -1;
	CHECK(r, read_byte(node(r, 0), "block-0-0", 0, LEN) == 'b' &&
			 count_of(node(r, 0), "block-3") == 0);
	return 0;
}

/* quorum = replicas: a write fails, reads go on and don't flip, and afterwards it goes on where it can. */
static CO_FN int no_quorum(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	int before, after;

	CHECK(r, put_byte(c, "block-0", 'a', LEN) == 0);
	CHECK(r, node_off(r, 1, true) == 0);
	CHECK(r, write_byte(c, "block-0", 0, 'b', LEN, 0) == -ETIMEDOUT);
	before = read_byte(c, "block-0", 0, LEN);
	CHECK(r, before == 'a' || before == 'b');
	CHECK(r, put_byte(c, "block-4", 'c', LEN) == 0, "on nodes 0 and 2");
	CHECK(r, node_off(r, 1, false) == 0);
	for (unsigned i = 0; i < 20; i++) {
		after = read_byte(c, "block-0", 0, LEN);
		CHECK(r, after == before, "%c, then %c", before, after);
	}
	/* Mended at once where a write needs it. */
	CHECK(r, write_byte(c, "block-0", 4096, 'd', 4096, 0) == 0);
	CHECK(r, read_byte(c, "block-0", 0, 4096) == before &&
			 read_byte(c, "block-0", 4096, 4096) == 'd');
	return wait_good(r) || same_everywhere(r, 0) ? -1 : 0;
}

/* All fail, one of them after doing it: whatever is read then is what stays. */
static CO_FN int all_fail(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	int first;

	CHECK(r, put_byte(c, "block-0", 'a', LEN) == 0);
	CHECK(r, node_off(r, 0, true) == 0 && node_off(r, 1, true) == 0);
	CHECK(r, write_byte(c, "block-0", 0, 'b', LEN, 0) == -ETIMEDOUT);
	CHECK(r, read_byte(node(r, 0), "block-0-0", 0, LEN) == 'a');
	CHECK(r, read_byte(node(r, 1), "block-0-1", 0, LEN) == 'b');
	CHECK(r, node_off(r, 0, false) == 0 && node_off(r, 1, false) == 0);
	first = read_byte(c, "block-0", 0, LEN);
	CHECK(r, first == 'a' || first == 'b');
	for (unsigned i = 0; i < 50; i++)
		CHECK(r, read_byte(c, "block-0", 0, LEN) == first);
	if (wait_good(r) || same_everywhere(r, 0))
		return -1;
	CHECK(r, read_byte(node(r, 0), "block-0-0", 0, LEN) == first);
	return 0;
}

static void test_away(void **state)
{
	check("distributed[replicas=2,quorum=1,recheck=5ms]{mem," OFF(1) ":mem,mem}", away);
	check("distributed[replicas=2,quorum=1,recheck=5ms,read=first]{mem," OFF(1) ":mem,mem}",
	      away);
	/* Nothing is caught up before the restart. */
	check("distributed[replicas=2,quorum=1,recheck=1h]{" OFF(0) ":mem,mem,mem}", away_restart);
	check("distributed[replicas=3,quorum=2,recheck=1h]{" OFF(0) ":mem,mem,mem,mem}",
	      away_restart);
}

static void test_no_quorum(void **state)
{
	check("distributed[replicas=2,recheck=5ms]{mem," OFF(1) ":mem,mem}", no_quorum);
	check("distributed[replicas=2,recheck=5ms]{fault[file=@/off0,ops=write]:mem,"
	      "fault[file=@/off1,ops=write,when=after,error=ETIMEDOUT]:mem,mem}",
	      no_quorum);
	check("distributed[replicas=2,recheck=5ms]{fault[file=@/off0,ops=write,error=ETIMEDOUT]:mem,"
	      "fault[file=@/off1,ops=write,when=after,error=ETIMEDOUT]:mem,mem}",
	      all_fail);
}

/* --- Records that contradict each other ------------------------------------------------------- */

/* The newest is right; older ones on the holder that it calls stale are out of date, and go. */
static CO_FN int contradiction(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);

	CHECK(r, put_byte(c, "block-0", 'a', LEN) == 0);
	CHECK(r, put_byte(node(r, 0), "block-0-0", 'n', LEN) == 0);
	CHECK(r, put_byte(node(r, 0), "stale-block-0-1-2000", 0, 0) == 0);
	CHECK(r, put_byte(node(r, 1), "stale-block-0-0-1000", 0, 0) == 0);
	/* Not ours, not parsed, not there: no harm. */
	CHECK(r, put_byte(node(r, 1), "stale-block-0-1-3000", 0, 0) == 0, "about itself");
	CHECK(r, put_byte(node(r, 2), "stale-block-0-0-3000", 0, 0) == 0, "not a holder");
	CHECK(r, put_byte(node(r, 0), "stale-block-0-7-3000", 0, 0) == 0, "no such holder");
	if (store_reopen(r))
		return -1;
	c = store_chan(r);
	for (unsigned i = 0; i < 20; i++)
		CHECK(r, read_byte(c, "block-0", 0, LEN) == 'n');
	CHECK(r, del(node(r, 1), "stale-block-0-1-3000") == 0 &&
			 del(node(r, 2), "stale-block-0-0-3000") == 0 &&
			 del(node(r, 0), "stale-block-0-7-3000") == 0);
	return wait_good(r) || same_everywhere(r, 0) ? -1 : 0;
}

static void test_contradiction(void **state)
{
	check("distributed[replicas=2,recheck=5ms]{mem,mem,mem}", contradiction);
}

/* --- Opening without a node ------------------------------------------------------------------- */

static CO_FN int open_without(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct err err = { "" };
	char name[32], b[300], c_dir[300], b_off[300], c_off[300];
	int rc;

	(void)snprintf(b, sizeof(b), "%s/b", r->folder);
	(void)snprintf(b_off, sizeof(b_off), "%s/b.off", r->folder);
	(void)snprintf(c_dir, sizeof(c_dir), "%s/c", r->folder);
	(void)snprintf(c_off, sizeof(c_off), "%s/c.off", r->folder);
	for (unsigned n = 0; n < 6; n++) {
		(void)snprintf(name, sizeof(name), "block-%u", n);
		CHECK(r, put_byte(c, name, 'a', LEN) == 0);
	}
	CHECK(r, chain_close(r->chain) == 0);
	/* Two of them: who knows what they know? */
	CHECK(r, rename(b, b_off) == 0 && rename(c_dir, c_off) == 0);
	rc = chain_open(r->chain, &err);
	CHECK(r,
	      rc != 0 && strstr(err.msg, "layer distributed: node 1 of 3 is away") &&
		      strstr(err.msg, "others too"),
	      "%s", err.msg);
	/* One of them: on with it. */
	CHECK(r, rename(c_off, c_dir) == 0);
	CHECK(r, chain_open(r->chain, &err) == 0, "%s", err.msg);
	c = store_chan(r);
	CHECK(r, strstr(status(r).all, "node-1: away"), "%s", status(r).all);
	for (unsigned n = 0; n < 6; n++) {
		(void)snprintf(name, sizeof(name), "block-%u", n);
		CHECK(r, read_byte(c, name, 0, LEN) == 'a');
		CHECK(r, (n & 1 ? put_byte(c, name, 'b', LEN)
				: write_byte(c, name, 0, 'b', 4096, 0)) == 0);
	}
	CHECK(r, ch_flush(c) == 0);
	CHECK(r, count_of(c, "block-") == 6);
	CHECK(r, rename(b_off, b) == 0);
	if (wait_good(r))
		return -1;
	for (unsigned n = 0; n < 6; n++)
		if (same_everywhere(r, n))
			return -1;
	CHECK(r, read_byte(c, "block-1", 0, LEN) == 'b' && read_byte(c, "block-2", 0, 4096) == 'b');
	return wipe(r);
}

/* A write that can't be: an error, and not the one that stands for a missing object. */
static CO_FN int closed_write(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct err err = { "" };
	char b[300], b_off[300];

	(void)snprintf(b, sizeof(b), "%s/b", r->folder);
	(void)snprintf(b_off, sizeof(b_off), "%s/b.off", r->folder);
	CHECK(r, put_byte(c, "block-0", 'a', LEN) == 0);
	CHECK(r, chain_close(r->chain) == 0 && rename(b, b_off) == 0);
	CHECK(r, chain_open(r->chain, &err) == 0, "%s", err.msg);
	c = store_chan(r);
	CHECK(r, read_byte(c, "block-0", 0, LEN) == 'a');
	CHECK(r, write_byte(c, "block-0", 0, 'b', LEN, 0) == -EIO);
	CHECK(r, put_byte(c, "block-0", 'b', LEN) == -EIO && del(c, "block-0") == -EIO);
	CHECK(r, read_byte(c, "block-0", 0, LEN) == 'a', "nothing was changed");
	CHECK(r, count_of(c, "stale-") == 0);
	CHECK(r, rename(b_off, b) == 0);
	return wait_good(r) || same_everywhere(r, 0) ? -1 : wipe(r);
}

/* A new disk in the place of the old one. */
static CO_FN int emptied(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	char name[32];

	CHECK(r, put_byte(c, "size", '1', 1) == 0);
	for (unsigned n = 0; n < 9; n++) {
		(void)snprintf(name, sizeof(name), "block-%u", n);
		CHECK(r, put_byte(c, name, 'a', LEN) == 0);
	}
	for (unsigned n = 0; n < 9; n++)
		for (unsigned h = 0; h < 2; h++) {
			(void)snprintf(name, sizeof(name), "block-%u-%u", n, h);
			CHECK(r, del(node(r, 0), name) == 0);
		}
	CHECK(r, del(node(r, 0), "size") == 0);
	if (store_reopen(r))
		return -1;
	c = store_chan(r);
	/* A part written to an empty place must not look like the whole. */
	CHECK(r, write_byte(c, "block-0", 0, 'b', 10, 0) == 0);
	for (unsigned i = 0; i < 10; i++)
		CHECK(r, read_byte(c, "block-0", 10, LEN - 10) == 'a' &&
				 read_byte(c, "block-0", 0, 10) == 'b');
	if (wait_good(r))
		return -1;
	for (unsigned n = 0; n < 9; n++)
		if (same_everywhere(r, n))
			return -1;
	CHECK(r, read_byte(node(r, 0), "size", 0, 1) == '1');
	return 0;
}

/* A single object lost, another one unreadable: mended when read. */
static CO_FN int lost_one(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);

	CHECK(r, put_byte(c, "block-0", 'a', LEN) == 0 && put_byte(c, "block-3", 'b', LEN) == 0);
	CHECK(r, del(node(r, 0), "block-0-0") == 0);
	CHECK(r, read_byte(c, "block-0", 0, LEN) == 'a');
	CHECK(r, node_off(r, 0, true) == 0);
	CHECK(r, read_byte(c, "block-3", 0, LEN) == 'b');
	CHECK(r, node_off(r, 0, false) == 0);
	return wait_good(r) || same_everywhere(r, 0) || same_everywhere(r, 3) ? -1 : 0;
}

static void test_open_without(void **state)
{
	check("distributed[replicas=2,quorum=2,recheck=5ms]{mem,mem,mem}", emptied);
	check("distributed[replicas=2,recheck=5ms,read=first]{fault[file=@/off0,ops=read]:mem,mem,mem}",
	      lost_one);
	check("distributed[replicas=2,recheck=5ms]{file:@/a/,file:@/b/}", closed_write);
	check("distributed[replicas=3,quorum=2,recheck=5ms]{file:@/a/,file:@/b/,file:@/c/}",
	      open_without);
}

/* --- Conditions, the end of a volume ---------------------------------------------------------- */

static CO_FN int put_if(struct chan *c, const char *name, enum put_cond cond, const char *etag,
			uint8_t byte, struct obj_stat *st)
{
	struct obj o = named(name);
	uint8_t data[16];
	struct iovec v;
	struct iov iov = iov_one(&v, data, sizeof(data));
	struct put put = { .obj = &o, .iov = &iov, .cond = cond, .etag = etag };

	memset(data, byte, sizeof(data));
	return ch_put(c, &put, st);
}

static CO_FN int conditions(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct obj_stat st = { 0 }, now = { 0 };
	struct obj o = named("block-0");

	CHECK(r, chain_top(r->chain)->caps & CAN_PUT_IF);
	CHECK(r, put_if(c, "block-0", PUT_IF_ABSENT, NULL, 'a', &st) == 0);
	CHECK(r, put_if(c, "block-0", PUT_IF_ABSENT, NULL, 'b', NULL) == -EEXIST);
	CHECK(r, ch_stat(c, &o, &now) == 0 && strcmp(now.etag, st.etag) == 0, "%s, %s", now.etag,
	      st.etag);
	CHECK(r, put_if(c, "block-0", PUT_IF_MATCH, st.etag, 'c', &now) == 0);
	CHECK(r, put_if(c, "block-0", PUT_IF_MATCH, st.etag, 'd', NULL) == -ESTALE);
	CHECK(r, read_byte(c, "block-0", 0, 16) == 'c' && same_everywhere(r, 0) == 0);
	/* The one that decides may have done it, or not: the next one decides, and the first is stale. */
	CHECK(r, node_off(r, 0, true) == 0);
	CHECK(r, put_if(c, "block-0", PUT_IF_ABSENT, NULL, 'e', NULL) == -EEXIST);
	CHECK(r, put_if(c, "block-3", PUT_IF_ABSENT, NULL, 'f', NULL) == 0);
	CHECK(r, node_off(r, 0, false) == 0);
	for (unsigned i = 0; i < 10; i++)
		CHECK(r, read_byte(c, "block-0", 0, 16) == 'c' &&
				 read_byte(c, "block-3", 0, 16) == 'f');
	return wait_good(r) || same_everywhere(r, 0) || same_everywhere(r, 3) ? -1 : 0;
}

static CO_FN int end(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct obj two[2] = { named("block-0"), named("block-1") };

	CHECK(r, put_byte(c, "size", '1', 1) == 0 && put_byte(c, "block-0", 'a', 10) == 0 &&
			 put_byte(c, "block-1", 'a', 10) == 0);
	CHECK(r, node_off(r, 0, true) == 0);
	CHECK(r, ch_del(c, two, 2) == 0);
	CHECK(r, count_of(c, "block-") == 0);
	/* Its blocks could come back with the next volume. */
	CHECK(r, del(c, "size") == -ETIMEDOUT && read_byte(c, "size", 0, 1) == '1');
	CHECK(r, node_off(r, 0, false) == 0);
	if (wait_good(r))
		return -1;
	CHECK(r, put_byte(node(r, 1), "stale-block-0-0-17", 0, 0) == 0, "a record left over");
	CHECK(r, del(c, "size") == 0);
	for (unsigned i = 0; i < 3; i++)
		CHECK(r, count_of(node(r, i), "") == 0, "node %u", i);
	return 0;
}

static void test_conditions(void **state)
{
	check("distributed[replicas=2,quorum=1,recheck=5ms]{fault[file=@/off0,ops=put,when=after]:mem,mem,mem}",
	      conditions);
	check("distributed[replicas=2,quorum=1,recheck=5ms]{" OFF(0) ":mem[partial=off],mem,mem}",
	      conditions);
}

static void test_end(void **state)
{
	check("distributed[replicas=2,quorum=1,recheck=5ms]{" OFF(0) ":mem,mem,mem}", end);
}

/* --- Answered before all have it; flush ------------------------------------------------------- */

/* Node 1 takes 500 ms for a write. */
static CO_FN int behind(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);

	CHECK(r, write_byte(c, "block-0", 0, 'a', LEN, 0) == 0 &&
			 write_byte(c, "block-3", 0, 'b', LEN, 0) == 0);
	CHECK(r, read_byte(node(r, 1), "block-0-1", 0, LEN) == -ENOENT, "answered before");
	for (unsigned i = 0; i < 20; i++)
		CHECK(r, read_byte(c, "block-0", 0, LEN) == 'a' &&
				 read_byte(c, "block-3", 0, LEN) == 'b');
	CHECK(r, ch_flush(c) == 0);
	CHECK(r, read_byte(node(r, 1), "block-0-1", 0, LEN) == 'a' &&
			 read_byte(node(r, 1), "block-3-1", 0, LEN) == 'b');
	CHECK(r, status(r).is_good, "%s", status(r).all);
	/* Order: the second one must not be overtaken on the slow node. */
	CHECK(r, write_byte(c, "block-0", 0, 'c', LEN, 0) == 0 &&
			 write_byte(c, "block-0", 0, 'd', LEN, 0) == 0);
	CHECK(r, ch_flush(c) == 0 && read_byte(node(r, 1), "block-0-1", 0, LEN) == 'd');
	/* FUA waits. */
	CHECK(r, write_byte(c, "block-0", 0, 'e', LEN, IO_FUA) == 0);
	CHECK(r, read_byte(node(r, 1), "block-0-1", 0, LEN) == 'e');
	/* It fails after the answer: recorded by the next flush at the latest. */
	CHECK(r, node_off(r, 1, true) == 0);
	CHECK(r, write_byte(c, "block-0", 0, 'f', LEN, 0) == 0 && ch_flush(c) == 0);
	CHECK(r, count_of(node(r, 0), "stale-block-0-1-") == 1 &&
			 read_byte(c, "block-0", 0, LEN) == 'f');
	CHECK(r, node_off(r, 1, false) == 0);
	return wait_good(r) || same_everywhere(r, 0) ? -1 : 0;
}

/* A node that fails to flush may have lost what it was given. */
static CO_FN int flush_fails(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	const struct dist *d = chain_top(r->chain)->self;
	bool is_enough = d->quorum < d->replicas;

	CHECK(r, write_byte(c, "block-0", 0, 'a', LEN, 0) == 0 && ch_flush(c) == 0);
	CHECK(r, write_byte(c, "block-3", 0, 'b', LEN, 0) == 0 &&
			 write_byte(c, "block-1", 0, 'b', LEN, 0) == 0);
	CHECK(r, node_off(r, 1, true) == 0);
	CHECK(r, ch_flush(c) == (is_enough ? 0 : -EIO));
	CHECK(r,
	      count_of(node(r, 0), "stale-") == 1 && count_of(node(r, 0), "stale-block-3-1-") == 1,
	      "only what was not flushed there");
	/* What it lost. */
	CHECK(r, write_byte(node(r, 1), "block-3-1", 0, 'x', LEN, 0) == 0);
	for (unsigned i = 0; i < 20; i++)
		CHECK(r, read_byte(c, "block-3", 0, LEN) == 'b');
	CHECK(r, ch_flush(c) == (is_enough ? 0 : -EIO), "it is still not safe");
	CHECK(r, node_off(r, 1, false) == 0);
	if (wait_good(r))
		return -1;
	CHECK(r, ch_flush(c) == 0);
	return same_everywhere(r, 3);
}

static void test_flush(void **state)
{
	check("distributed[replicas=2,quorum=1,recheck=5ms]"
	      "{mem,delay[write=500ms]:fault[file=@/off1,ops=write]:mem,mem}",
	      behind);
	/* Copying to it fails as well meanwhile. */
	check("distributed[replicas=2,quorum=1,recheck=5ms]{mem,fault[file=@/off1,ops=flush|put]:mem,mem}",
	      flush_fails);
	check("distributed[replicas=2,recheck=5ms]{mem,fault[file=@/off1,ops=flush|put]:mem,mem}",
	      flush_fails);
}

/* --- All together ----------------------------------------------------------------------------- */

enum { FIBERS = 6, ROUNDS = 250, SLOTS = 4 };

/* One fiber with shards of its own; a slot's bytes are all the same, and known unless its last write failed. */
static CO_FN int scribble(struct store_run *r, unsigned i, void *arg)
{
	struct chan *c = store_chan(r);
	uint64_t random = i * 7919 + 1;
	int known[2][SLOTS] = { { 0 } };
	char name[2][32];

	(void)snprintf(name[0], sizeof(name[0]), "block-%u", 2 * i);
	(void)snprintf(name[1], sizeof(name[1]), "block-%u", 2 * i + 1);
	for (unsigned round = 0; round < ROUNDS; round++) {
		unsigned s = (unsigned)random_below(&random, 2),
			 slot = (unsigned)random_below(&random, SLOTS);
		uint8_t byte = (uint8_t)(1 + random_below(&random, 250));
		int rc, got;

		switch (random_below(&random, 8)) {
		case 0:
			rc = put_byte(c, name[s], byte, SLOTS * KI);
			for (unsigned k = 0; k < SLOTS; k++)
				known[s][k] = rc == 0 ? byte : -1;
			break;
		case 1:
			(void)ch_flush(c); /* may fail while a node is off */
			break;
		case 2:
		case 3:
		case 4:
			rc = write_byte(c, name[s], slot * KI, byte, KI, byte & 1 ? IO_FUA : 0);
			known[s][slot] = rc == 0 ? byte : -1;
			break;
		default:
			got = read_byte(c, name[s], slot * KI, KI);
			if (got < 0 && got != -EILSEQ)
				break; /* nodes are off */
			if (known[s][slot] == -1 && got >= 0)
				known[s][slot] = got; /* from now on the same */
			if (known[s][slot] >= 0 && got != known[s][slot])
				return store_fail(
					r, __LINE__, "%s slot %u round %u: read %d, not %d: %s",
					name[s], slot, round, got, known[s][slot], status(r).all);
		}
	}
	return 0;
}

struct flapping {
	struct store_run *r;
	struct co_group group;
	bool stop;
	int rc;
};

/* Nodes go and come, sometimes two at once. */
static CO_FN void flap(void *arg)
{
	struct flapping *f = arg;
	uint64_t random = 42;

	while (!f->stop) {
		unsigned i = (unsigned)random_below(&random, 3),
			 j = (unsigned)random_below(&random, 3);

		(void)node_off(f->r, i, true);
		co_sleep(random_below(&random, 8000000));
		if (random_below(&random, 3) == 0) {
			(void)node_off(f->r, j, true);
			co_sleep(random_below(&random, 3000000));
			(void)node_off(f->r, j, false);
		}
		(void)node_off(f->r, i, false);
		co_sleep(random_below(&random, 8000000));
	}
}

static CO_FN int storm(void *arg)
{
	struct store_run *r = arg;
	struct flapping f = { .r = r, .group = CO_GROUP_INIT };
	char name[32];
	int rc;

	for (unsigned n = 0; n < 2 * FIBERS; n++) {
		(void)snprintf(name, sizeof(name), "block-%u", n);
		CHECK(r, put_byte(store_chan(r), name, 0, SLOTS * KI) == 0);
	}
	co_group_spawn(&f.group, flap, &f);
	rc = store_fibers(r, FIBERS, scribble, NULL);
	f.stop = true;
	co_group_wait(&f.group);
	if (rc || wait_good(r))
		return -1;
	CHECK(r, ch_flush(store_chan(r)) == 0);
	for (unsigned n = 0; n < 2 * FIBERS; n++)
		if (same_everywhere(r, n))
			return -1;
	return 0;
}

#define FLAP(i)      "fault[file=@/off" #i ",ops=read|write|flush|put|del|stat|list,error=ETIMEDOUT]:mem"
#define FLAP_HALF(i) "fault[file=@/off" #i ",ops=write|put|flush,when=partly]:mem"

static void test_storm(void **state)
{
	check("distributed[replicas=2,recheck=2ms]{" FLAP(0) "," FLAP(1) "," FLAP(2) "}", storm);
	check("distributed[replicas=2,quorum=1,recheck=2ms]{" FLAP(0) "," FLAP(1) "," FLAP(2) "}",
	      storm);
	check("distributed[replicas=3,quorum=2,recheck=2ms]{" FLAP(0) "," FLAP_HALF(1) "," FLAP(
		      2) ",mem}",
	      storm);
	check("distributed[replicas=2,quorum=1,recheck=2ms]{" FLAP_HALF(
		      0) ",delay[jitter=1ms,write=1us]:" FLAP(1) "," FLAP_HALF(2) "}",
	      storm);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_layout),       cmocka_unit_test(test_away),
		cmocka_unit_test(test_no_quorum),    cmocka_unit_test(test_contradiction),
		cmocka_unit_test(test_open_without), cmocka_unit_test(test_conditions),
		cmocka_unit_test(test_end),          cmocka_unit_test(test_flush),
		cmocka_unit_test(test_storm),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = cmocka_run_group_tests_name("distributed", tests, NULL, NULL);
	conform_stop();
	return failed;
}
