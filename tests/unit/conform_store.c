/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the cases of conform_store_cases.c need to run.
 */
#include "conform_store.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "conformance.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"
#include "temp.h"

enum { KI = 1024, GUARD = 32, SEGMENTS = 4, DEL_BATCH = 500 };

int store_fail(struct store_run *r, int line, const char *fmt, ...)
{
	va_list ap;
	int rc;

	va_start(ap, fmt);
	rc = noted_add(&r->noted, line, fmt, ap);
	va_end(ap);
	return rc;
}

/* --- Helpers of cases ------------------------------------------------------------------------- */

struct chan *store_chan(struct store_run *r)
{
	int rc = 0;
	struct chan *c = chain_chan(r->chain, &rc);

	if (!c)
		(void)store_fail(r, __LINE__, "no channel: %s", err_name(rc));
	return c;
}

int store_reopen(struct store_run *r)
{
	struct err err = { "" };
	int rc = chain_close(r->chain);

	CHECK(r, rc == 0, "close: %s", err_name(rc));
	rc = chain_open(r->chain, &err);
	CHECK(r, rc == 0, "open: %s", err.msg);
	return 0;
}

bool store_can(const struct store_run *r, unsigned caps)
{
	return (chain_top(r->chain)->caps & caps) == caps;
}

unsigned store_less(const struct store_run *r, unsigned n)
{
	return MAX(n / MAX(r->what->few, 1U), 1U);
}

struct obj store_obj(const struct store_run *r, const char *name)
{
	char text[OBJ_NAME_MAX + 1];
	struct obj obj;

	(void)snprintf(text, sizeof(text), "%s%s", r->prefix, name);
	if (obj_set(&obj, text) != 0)
		abort(); /* a case with a bad name */
	return obj;
}

void store_fill(void *buf, size_t len, uint64_t seed)
{
	uint64_t state = seed * 0x9e3779b97f4a7c15 + 1, word;
	uint8_t *p = buf;

	for (size_t at = 0; at < len; at += sizeof(word)) {
		word = random_below(&state, UINT64_MAX);
		memcpy(p + at, &word, MIN(len - at, sizeof(word)));
	}
}

/* Cuts `len` bytes at buf into at most SEGMENTS pieces of odd lengths. */
static struct iov cut(struct iovec *v, void *buf, size_t len)
{
	unsigned n = 0;
	size_t at = 0;

	while (n + 1 < SEGMENTS && len - at > 3) {
		size_t part = (len - at) / 3 | 1;

		v[n++] = (struct iovec){ (char *)buf + at, part };
		at += part;
	}
	v[n++] = (struct iovec){ (char *)buf + at, len - at };
	return (struct iov){ v, n, len };
}

int store_put(struct store_run *r, const char *name, const void *data, size_t len,
	      enum put_cond cond, const char *etag, struct obj_stat *st)
{
	struct chan *c = store_chan(r);
	struct obj obj = store_obj(r, name);
	struct iovec v[SEGMENTS];
	struct iov iov = cut(v, (void *)(uintptr_t)data, len);
	struct put p = { .obj = &obj, .iov = &iov, .cond = cond, .etag = etag };

	return c ? ch_put(c, &p, st) : -EIO;
}

int store_get(struct store_run *r, const char *name, uint64_t off, void *buf, size_t len)
{
	struct chan *c = store_chan(r);
	struct obj obj = store_obj(r, name);
	_cleanup_free_ uint8_t *room = malloc(len + 2 * GUARD);
	struct iovec v[SEGMENTS];
	struct iov iov;
	int rc;

	if (!c || !room)
		return -ENOMEM;
	memset(room, 0xa5, len + 2 * GUARD);
	iov = cut(v, room + GUARD, len);
	rc = ch_read(c, (struct ext){ &obj, off, len }, &iov, 0);
	for (unsigned i = 0; i < GUARD; i++)
		if (room[i] != 0xa5 || room[GUARD + len + i] != 0xa5)
			return store_fail(r, __LINE__, "a read of %s wrote beyond its buffer",
					  name);
	if (rc == 0 && len > 0)
		memcpy(buf, room + GUARD, len);
	return rc;
}

int store_stat_of(struct store_run *r, const char *name, struct obj_stat *st)
{
	struct chan *c = store_chan(r);
	struct obj obj = store_obj(r, name);

	return c ? ch_stat(c, &obj, st) : -EIO;
}

int store_write_at(struct store_run *r, const char *name, uint64_t off, const void *data,
		   size_t len, unsigned fl)
{
	struct chan *c = store_chan(r);
	struct obj obj = store_obj(r, name);
	struct iovec v;
	struct iov iov = iov_one(&v, (void *)(uintptr_t)data, len);

	return c ? ch_write(c, (struct ext){ &obj, off, len }, &iov, fl) : -EIO;
}

int store_expect(struct store_run *r, const char *name, const void *data, size_t len)
{
	/* More than there is: the rest is zeroes. */
	const size_t more = len + 100;
	_cleanup_free_ uint8_t *got = malloc(more);
	struct obj_stat st;
	int rc;

	if (!got)
		return store_fail(r, __LINE__, "out of memory");
	rc = store_stat_of(r, name, &st);
	CHECK(r, rc == 0, "stat %s: %s", name, err_name(rc));
	CHECK(r, st.size == len, "%s has %ju bytes, not %zu", name, (uintmax_t)st.size, len);
	rc = store_get(r, name, 0, got, more);
	CHECK(r, rc == 0, "read %s: %s", name, err_name(rc));
	for (size_t i = 0; i < more; i++) {
		uint8_t want = i < len ? ((const uint8_t *)data)[i] : 0;

		CHECK(r, got[i] == want, "%s: byte %zu of %zu is %02x, not %02x", name, i, len,
		      got[i], want);
	}
	return 0;
}

struct fiber {
	struct store_run *r;
	int (*fn)(struct store_run *r, unsigned i, void *arg);
	unsigned i;
	void *arg;
	int rc;
};

static CO_FN int fiber_there(void *arg)
{
	struct fiber *f = arg;

	return f->fn(f->r, f->i, f->arg);
}

static CO_FN void fiber_here(void *arg)
{
	struct fiber *f = arg;

	f->rc = reactor_call(reactor_get(f->i % reactors_n()), fiber_there, f);
}

int store_fibers(struct store_run *r, unsigned n,
		 int (*fn)(struct store_run *r, unsigned i, void *arg), void *arg)
{
	_cleanup_free_ struct fiber *f = calloc(n, sizeof(*f));
	struct co_group g = CO_GROUP_INIT;
	int rc = 0;

	if (!f)
		return store_fail(r, __LINE__, "out of memory");
	for (unsigned i = 0; i < n; i++) {
		f[i] = (struct fiber){ .r = r, .fn = fn, .i = i, .arg = arg };
		co_group_spawn(&g, fiber_here, &f[i]);
	}
	co_group_wait(&g);
	for (unsigned i = 0; i < n; i++)
		rc = f[i].rc ? -1 : rc;
	return rc;
}

/* --- Life ------------------------------------------------------------------------------------- */

struct names {
	struct obj v[DEL_BATCH];
	unsigned n;
};

static int add_name(void *arg, const char *name, uint64_t size)
{
	struct names *names = arg;

	(void)size;
	if (names->n == DEL_BATCH)
		return 1;
	return obj_set(&names->v[names->n++], name);
}

/* What the case has left behind. */
static CO_FN int clean(struct store_run *r)
{
	_cleanup_free_ struct names *names = malloc(sizeof(*names));
	struct chan *c = store_chan(r);
	int rc = 1;

	if (!names || !c)
		return -1;
	while (rc == 1) {
		names->n = 0;
		rc = ch_list(c, r->prefix, add_name, names);
		CHECK(r, rc == 0 || rc == 1, "list for cleaning up: %s", err_name(rc));
		if (names->n > 0) {
			int del = ch_del(c, names->v, names->n);

			CHECK(r, del == 0, "del for cleaning up: %s", err_name(del));
		}
	}
	return 0;
}

struct store_job {
	struct store_run *r;
	int (*fn)(void *run);
};

static CO_FN int run_open(struct store_run *r, int (*fn)(void *run))
{
	struct err err = { "" };
	int rc = chain_open(r->chain, &err), closed;

	CHECK(r, rc == 0, "open: %s", err.msg);
	rc = fn(r);
	if (clean(r) != 0)
		rc = -1;
	closed = chain_close(r->chain);
	CHECK(r, closed == 0, "close: %s", err_name(closed));
	return rc;
}

static CO_FN int run_job(void *arg)
{
	struct store_job *job = arg;
	struct store_run *r = job->r;
	struct err err = { "" };
	int rc = chain_create(r->chain, 0, false, &err);

	/* A store that has no place to be made says so. */
	CHECK(r, rc == 0 || rc == -ENOTSUP, "create: %s", err.msg);
	if (run_open(r, job->fn) != 0)
		return -1;
	rc = chain_destroy(r->chain, &err);
	CHECK(r, rc == 0 || rc == -ENOTSUP, "destroy: %s", err.msg);
	return 0;
}

static void set_up(struct store_run *r, int (*fn)(void *run), const char *text)
{
	struct store_job job = { r, fn };
	struct err err = { "" };

	if (!text)
		(void)store_fail(r, __LINE__, "out of memory");
	else if (spec_parse(text, &r->spec, &err) != 0 ||
		 chain_build_keyed(r->spec, false, &r->chain, &err) != 0)
		(void)store_fail(r, __LINE__, "%s", err.msg);
	else if (reactor_call_blocking(reactor_get(0), run_job, &job) != 0 && !r->noted.text[0])
		(void)store_fail(r, __LINE__, "the case failed without a word");
	chain_free(r->chain);
	spec_free(r->spec);
}

const char *store_with(const struct store_what *what, int (*fn)(void *run))
{
	static char failure[700];
	static unsigned runs;
	struct store_run r = { .what = what };
	_cleanup_free_ char *text = NULL;
	int rc;

	pthread_mutex_init(&r.noted.lock, NULL);
	(void)snprintf(r.prefix, sizeof(r.prefix), "t%d-%u-", (int)getpid(), runs++);
	rc = conform_folder(r.folder, "stores", what->in_memory);
	if (rc) {
		(void)snprintf(failure, sizeof(failure), "%s: %s", r.folder, strerror(-rc));
		return failure;
	}
	text = conform_expand(what->text, r.folder);
	set_up(&r, fn, text);
	if (rmdir(r.folder) != 0) {
		(void)store_fail(&r, __LINE__, "%s: %s", r.folder, strerror(errno));
		(void)temp_remove(r.folder);
	}
	(void)snprintf(failure, sizeof(failure), "%s: %s", what->label ? what->label : what->text,
		       r.noted.text);
	pthread_mutex_destroy(&r.noted.lock);
	return r.noted.text[0] ? failure : NULL;
}
