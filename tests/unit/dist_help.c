/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the tests of layer distributed share, see dist_help.h.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "dist_help.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "conformance.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"

enum { DIST_DEADLINE_S = 20 };

struct chan *dist_node(struct store_run *r, unsigned i)
{
	struct chan *c = store_chan(r), *kid = NULL;
	/* One that came late has a channel here only when somebody wanted it. */
	int rc = chan_kid(c, i, &kid);

	assert(rc == 0);
	while (kid->layer->kids_n > 0)
		kid = kid->kids[0];
	return kid;
}

int dist_node_off(struct store_run *r, unsigned i, bool is_off)
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

struct obj dist_obj(const char *name)
{
	struct obj o;

	assert(obj_set(&o, name) == 0);
	return o;
}

int dist_put_byte(struct chan *c, const char *name, uint8_t byte, size_t len)
{
	_cleanup_free_ uint8_t *data = malloc(len + 1);
	struct obj o = dist_obj(name);
	struct iovec v;
	struct iov iov = iov_one(&v, data, len);
	struct put put = { .obj = &o, .iov = &iov };

	memset(data, byte, len);
	return ch_put(c, &put, NULL);
}

int dist_put_text(struct chan *c, const char *name, const char *text)
{
	struct obj o = dist_obj(name);
	struct iovec v;
	struct iov iov = iov_one(&v, (void *)(uintptr_t)text, strlen(text));
	struct put put = { .obj = &o, .iov = &iov };

	return ch_put(c, &put, NULL);
}

int dist_write_byte(struct chan *c, const char *name, uint64_t off, uint8_t byte, size_t len,
		    unsigned fl)
{
	_cleanup_free_ uint8_t *data = malloc(len + 1);
	struct obj o = dist_obj(name);
	struct iovec v;
	struct iov iov = iov_one(&v, data, len);

	memset(data, byte, len);
	return ch_write(c, (struct ext){ &o, off, len }, &iov, fl);
}

int dist_del_one(struct chan *c, const char *name)
{
	struct obj o = dist_obj(name);

	return ch_del(c, &o, 1);
}

int dist_read_byte(struct chan *c, const char *name, uint64_t off, size_t len)
{
	_cleanup_free_ uint8_t *data = malloc(len + 1);
	struct obj o = dist_obj(name);
	struct iovec v;
	struct iov iov = iov_one(&v, data, len);
	int rc = ch_read(c, (struct ext){ &o, off, len }, &iov, 0);

	for (size_t i = 1; i < len && rc == 0; i++)
		if (data[i] != data[0])
			return -EILSEQ;
	return rc ? rc : data[0];
}

int dist_count_one(void *arg, const char *name, uint64_t size)
{
	struct dist_counting *k = arg;

	if (strncmp(name, k->prefix, strlen(k->prefix)) == 0) {
		k->n++;
		(void)snprintf(k->last, sizeof(k->last), "%s", name);
		k->size = size;
	}
	return 0;
}

int dist_count_of(struct chan *c, const char *prefix)
{
	struct dist_counting k = { .prefix = prefix };
	int rc = ch_list(c, prefix, dist_count_one, &k);

	return rc ? rc : (int)k.n;
}

static void add_state(struct info *i, const char *key, const char *value)
{
	struct dist_state *s = container_of(i, struct dist_state, base);
	size_t at = strlen(s->all);

	if (strcmp(key, "state") == 0)
		s->is_good = strcmp(value, "good") == 0;
	(void)snprintf(s->all + at, sizeof(s->all) - at, "%s: %s; ", key, value);
}

struct dist_state dist_status_of(struct store_run *r)
{
	struct dist_state s = { .base = { .add = add_state } };
	struct layer *l = chain_top(r->chain);

	l->ops->status(l, &s.base);
	return s;
}

int dist_wait_good(struct store_run *r)
{
	uint64_t until = now_ns() + DIST_DEADLINE_S * UINT64_C(1000000000);
	struct layer *l = chain_top(r->chain);
	struct dist_state s;

	for (;;) {
		int records = 0;

		s = dist_status_of(r);
		for (unsigned i = 0; i < l->kids_n && s.is_good && records == 0; i++)
			records = dist_count_of(dist_node(r, i), RECORD_PREFIX);
		if (s.is_good && records == 0)
			return 0;
		CHECK(r, now_ns() < until, "still %s records=%d", s.all, records);
		co_sleep(1000000);
	}
}

int dist_records_n(struct store_run *r)
{
	int n = 0;

	for (unsigned i = 0; i < chain_top(r->chain)->kids_n; i++)
		n += dist_count_of(dist_node(r, i), DOUBT_NAME);
	return n;
}

int dist_wait_no_records(struct store_run *r)
{
	uint64_t until = now_ns() + DIST_DEADLINE_S * UINT64_C(1000000000);

	while (dist_records_n(r) > 0) {
		CHECK(r, now_ns() < until, "still %d: %s", dist_records_n(r),
		      dist_status_of(r).all);
		co_sleep(1000000);
	}
	return 0;
}

int dist_same_everywhere(struct store_run *r, unsigned shard)
{
	const struct dist *d = dist_of(r);
	_cleanup_free_ uint8_t *first = malloc(DIST_MI), *other = malloc(DIST_MI);
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
		rc = ch_stat(dist_node(r, at.node[h]), &o, &st);
		if (h == 0) {
			rc0 = rc;
			st0 = st;
		}
		CHECK(r, rc == rc0, "%s: holder 0 %s, holder %u %s", name, err_name(rc0), h,
		      err_name(rc));
		if (rc == -ENOENT)
			continue;
		CHECK(r, rc == 0 && st.size == st0.size && st.size <= DIST_MI,
		      "%s: %s, %ju and %ju bytes", name, err_name(rc), (uintmax_t)st0.size,
		      (uintmax_t)st.size);
		struct iov iov = iov_one(&v, to, st.size);

		CHECK(r,
		      ch_read(dist_node(r, at.node[h]), (struct ext){ &o, 0, st.size }, &iov, 0) ==
			      0,
		      "%s", name);
		CHECK(r, memcmp(first, to, st.size) == 0, "%s: holder %u differs", name, h);
	}
	return 0;
}

void dist_run(const char *text, int (*fn)(void *run))
{
	const struct store_what what = { .text = text, .in_memory = true };
	const char *failure = store_with(&what, fn);

	if (failure)
		fail_msg("%s", failure);
}

int dist_wipe(struct store_run *r)
{
	for (unsigned i = 0; i < chain_top(r->chain)->kids_n; i++) {
		struct dist_counting k = { .prefix = "" };

		while (ch_list(dist_node(r, i), "", dist_count_one, &k) == 0 && k.n > 0) {
			CHECK(r, dist_del_one(dist_node(r, i), k.last) == 0, "%s", k.last);
			k.n = 0;
		}
	}
	return 0;
}
