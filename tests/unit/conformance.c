/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the cases need to run: reactors, a folder, the chain, the model. The cases are in
 * conformance_cases.c.
 *
 * Fibers must not leave by cmocka's longjmp, so checks note the first failure in the run and return; the
 * test asserts on that in its own thread.
 */
#include "conformance.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <inttypes.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/log.h"
#include "nbdrs/rangelock.h"
#include "nbdrs/reactor.h"

enum { KI = 1024, MI = KI * KI, SEGMENTS_MAX = CONFORM_SEGMENTS, GUARD = 64 };

/* --- Life ------------------------------------------------------------------------------------- */

void conform_start(void)
{
	const char *engine = getenv("NBDRS_IO_ENGINE");
	struct reactor_conf conf = { .threads = CONFORM_REACTORS, .engine = IO_ENGINE_AUTO };
	struct err err = { "" };

	/* Buffers of some MiB come and go all the time: don't let each be mapped and cleared anew. */
	(void)mallopt(M_MMAP_THRESHOLD, 64 * MI);
	(void)mallopt(M_TRIM_THRESHOLD, 512 * MI);
	if (engine && *engine)
		conf.engine = strcmp(engine, "epoll") == 0 ? IO_ENGINE_EPOLL : IO_ENGINE_URING;
	if (reactors_start(&conf, &err) != 0) {
		fprintf(stderr, "reactors: %s\n", err.msg);
		exit(1);
	}
	printf("# engine %s\n", reactors_engine());
}

void conform_stop(void)
{
	reactors_stop();
}

const char *conform_tmp(void)
{
	const char *dir = getenv("TMPDIR");

	return dir && *dir && strlen(dir) < 200 ? dir : "/var/tmp";
}

int noted_add(struct noted *n, int line, const char *fmt, va_list ap)
{
	size_t at;

	pthread_mutex_lock(&n->lock);
	if (!n->text[0]) {
		at = (size_t)snprintf(n->text, sizeof(n->text), "line %d: ", line);
		(void)vsnprintf(n->text + at, sizeof(n->text) - at, fmt, ap);
	}
	pthread_mutex_unlock(&n->lock);
	return -1;
}

int conform_fail(struct run *r, int line, const char *fmt, ...)
{
	va_list ap;
	int rc;

	va_start(ap, fmt);
	rc = noted_add(&r->noted, line, fmt, ap);
	va_end(ap);
	return rc;
}

int conform_folder(char to[256], const char *kind, bool in_memory)
{
	const bool in_shm = in_memory && access("/dev/shm", W_OK) == 0;

	(void)snprintf(to, 256, "%s/nbdrs-%s-XXXXXX", in_shm ? "/dev/shm" : conform_tmp(), kind);
	return mkdtemp(to) ? 0 : -errno;
}

struct status_query {
	struct info info;
	const char *key;
	uint64_t value;
};

static void take_value(struct info *i, const char *key, const char *value)
{
	struct status_query *q = container_of(i, struct status_query, info);

	if (strcmp(key, q->key) == 0)
		q->value = strtoull(value, NULL, 10);
}

uint64_t conform_status(struct layer *l, const char *key)
{
	struct status_query q = { .info = { take_value }, .key = key, .value = UINT64_MAX };

	l->ops->status(l, &q.info);
	return q.value;
}

uint64_t run_status(struct run *r, const char *key)
{
	return conform_status(chain_top(r->chain), key);
}

char *conform_expand(const char *from, const char *folder)
{
	char *text = NULL;
	size_t len;
	FILE *f = open_memstream(&text, &len);

	if (!f)
		return NULL;
	for (; *from; from++) {
		if (*from == '@')
			(void)fputs(folder, f);
		else
			(void)fputc(*from, f);
	}
	if (fclose(f) == 0)
		return text;
	free(text);
	return NULL;
}

/* As chain_build() does it for a new one. */
static void set_read_only(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum)
{
	l->want_ro = *(const bool *)arg;
}

static int build(struct run *r, bool read_only)
{
	struct err err = { "" };
	int rc;

	if (r->chain) {
		chain_each(r->chain, set_read_only, &read_only);
		return 0;
	}
	rc = chain_build(r->spec, "vol0", read_only, &r->chain, &err);
	EXPECT(r, rc == 0, "%s", err.msg);
	return 0;
}

static void unbuild(struct run *r)
{
	if (r->what->in_chain)
		return; /* conform_with() frees it */
	chain_free(r->chain);
	r->chain = NULL;
}

CO_FN int run_reopen(struct run *r, bool read_only)
{
	struct err err = { "" };

	if (build(r, read_only))
		return -1;
	EXPECT(r, chain_open(r->chain, &err) == 0, "%s", err.msg);
	return 0;
}

CO_FN int run_shut(struct run *r)
{
	int rc = chain_close(r->chain);

	unbuild(r);
	EXPECT(r, rc == 0, "%s", err_name(rc));
	return 0;
}

static CO_FN int create_volume(struct run *r)
{
	struct err err = { "" };
	int rc = build(r, false);

	if (rc)
		return rc;
	rc = chain_create(r->chain, r->what->size, false, &err);
	unbuild(r);
	EXPECT(r, rc == 0, "%s", err.msg);
	return 0;
}

static CO_FN int destroy_volume(struct run *r)
{
	struct err err = { "" };
	unsigned tries = 0;
	int rc = build(r, false);

	if (rc)
		return rc;
	/* What a faulty store interrupts goes on when it is asked for again. */
	do
		rc = chain_destroy(r->chain, &err);
	while (rc && strstr(r->what->text, "fault[rate=") && tries++ < 20);
	unbuild(r);
	EXPECT(r, rc == 0, "%s", err.msg);
	return 0;
}

struct fiber_case {
	struct run *r;
	int (*fn)(void *run);
};

static CO_FN int run_case(void *arg)
{
	struct fiber_case *fc = arg;
	struct run *r = fc->r;
	int rc = r->what->is_volume ? create_volume(r) : 0;

	if (rc == 0)
		rc = run_reopen(r, false);
	if (rc == 0) {
		rc = fc->fn(r);
		if (r->chain && run_shut(r)) /* a case that failed may have left it shut */
			rc = -1;
	}
	if (r->what->is_volume && destroy_volume(r))
		rc = -1;
	return rc;
}

const char *conform_with(const struct conform *what, int (*fn)(void *run))
{
	static char failure[600];
	struct run r = { .what = what };
	struct fiber_case fc = { &r, fn };
	_cleanup_free_ char *text = NULL;
	struct err err = { "" };
	int rc;

	pthread_mutex_init(&r.noted.lock, NULL);
	rc = conform_folder(r.folder, "layers", what->in_memory);
	if (rc) {
		(void)snprintf(failure, sizeof(failure), "%s: %s", r.folder, strerror(-rc));
		return failure;
	}
	text = conform_expand(what->text, r.folder);
	rc = -1;
	r.model = calloc(1, what->size);
	if (!text || !r.model)
		(void)conform_fail(&r, __LINE__, "out of memory");
	else if (spec_parse(text, &r.spec, &err) != 0)
		(void)conform_fail(&r, __LINE__, "%s", err.msg);
	else
		rc = reactor_call_blocking(reactor_get(0), run_case, &fc);
	if (rc && !r.noted.text[0])
		(void)conform_fail(&r, __LINE__, "the case ended with %s", err_name(rc));
	chain_free(r.chain);
	spec_free(r.spec);
	free(r.model);
	if (rmdir(r.folder) != 0)
		(void)conform_fail(&r, __LINE__, "%s: %s", r.folder, strerror(errno));
	(void)snprintf(failure, sizeof(failure), "%s: %s", what->text, r.noted.text);
	pthread_mutex_destroy(&r.noted.lock);
	return r.noted.text[0] ? failure : NULL;
}

void conform_must(const struct conform *what, int (*fn)(void *run))
{
	const char *failure = conform_with(what, fn);

	if (failure)
		fail_msg("%s", failure);
}

void conform_check(const char *text, uint64_t size, int (*fn)(void *run))
{
	conform_must(&(struct conform){ .text = text, .size = size }, fn);
}

static CO_FN int nothing(void *arg)
{
	return 0;
}

void conform_refuses(const char *text, const char *message)
{
	const struct conform what = { .text = text, .size = MI, .in_memory = true };
	const char *failure = conform_with(&what, nothing);

	if (!failure || !strstr(failure, message))
		fail_msg("%s: %s", text, failure ? failure : "was accepted");
}

const char *conform_run(const struct conform *what, const struct conform_case *c)
{
	return conform_with(what, c->fn);
}

/* --- Helpers of cases ------------------------------------------------------------------------- */

uint64_t random_below(uint64_t *state, uint64_t n)
{
	uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
	return (z ^ z >> 31) % n;
}

struct chan *run_chan(struct run *r)
{
	int rc = 0;
	struct chan *c = chain_chan(r->chain, &rc);

	if (!c)
		(void)conform_fail(r, __LINE__, "no channel: %s", err_name(rc));
	return c;
}

struct ops_query {
	unsigned depth;
	enum ch_op op;
	bool is_found;
	uint64_t n;
};

static void add_ops(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum)
{
	struct ops_query *q = arg;

	if (depth != q->depth || q->is_found)
		return;
	q->is_found = true;
	q->n = atomic_load(&sum->ops[q->op]);
}

uint64_t run_ops(struct run *r, unsigned depth, enum ch_op op)
{
	struct ops_query q = { .depth = depth, .op = op };

	chain_each(r->chain, add_ops, &q);
	return q.n;
}

/* Cuts `len` bytes at buf into at most `segments` pieces of odd lengths; v has room for SEGMENTS_MAX. */
static struct iov cut(struct iovec *v, uint8_t *buf, uint64_t len, unsigned segments)
{
	unsigned n = 0;
	uint64_t at = 0;

	while (n + 1 < segments && len - at > 3) {
		uint64_t part = (len - at) / 3 | 1;

		v[n++] = (struct iovec){ buf + at, part };
		at += part;
	}
	v[n++] = (struct iovec){ buf + at, len - at };
	return (struct iov){ v, n, len };
}

static void fill_random(uint8_t *buf, uint64_t len)
{
	static _Atomic uint64_t runs; /* so that no two writes write the same */
	uint64_t state = atomic_fetch_add(&runs, 1) << 32, word;

	for (uint64_t at = 0; at < len; at += sizeof(word)) {
		word = random_below(&state, UINT64_MAX);
		memcpy(buf + at, &word, MIN(len - at, sizeof(word)));
	}
}

void run_model(struct run *r, uint64_t off, const void *data, uint64_t len)
{
	if (!r->what->is_forgetful)
		memcpy(r->model + off, data, len);
}

CO_FN int run_write(struct run *r, uint64_t off, uint64_t len, unsigned fl, unsigned segments)
{
	struct chan *c = run_chan(r);
	_cleanup_free_ uint8_t *buf = malloc(len + 1);
	struct iovec v[SEGMENTS_MAX];
	struct iov iov;
	int rc;

	if (!c || !buf)
		return conform_fail(r, __LINE__, "out of memory");
	fill_random(buf + 1, len); /* at an odd address: memory need not be aligned */
	iov = cut(v, buf + 1, len, segments);
	rc = ch_write(c, (struct ext){ &obj_none, off, len }, &iov, fl);
	EXPECT(r, rc == 0, "write %" PRIu64 "+%" PRIu64 ": %s", off, len, err_name(rc));
	run_model(r, off, buf + 1, len);
	return 0;
}

int run_compare(struct run *r, uint64_t off, const uint8_t *got, uint64_t len)
{
	for (uint64_t i = 0; i < len; i++)
		EXPECT(r, got[i] == r->model[off + i],
		       "read %" PRIu64 "+%" PRIu64 ": byte %" PRIu64 " is %02x, not %02x", off, len,
		       off + i, got[i], r->model[off + i]);
	return 0;
}

CO_FN int run_check(struct run *r, uint64_t off, uint64_t len, unsigned segments)
{
	struct chan *c = run_chan(r);
	_cleanup_free_ uint8_t *buf = malloc(len + 2 * GUARD + 1);
	uint8_t *data = buf + GUARD + 1;
	struct iovec v[SEGMENTS_MAX];
	struct iov iov;
	int rc;

	if (!c || !buf)
		return conform_fail(r, __LINE__, "out of memory");
	memset(buf, 0xa5, len + 2 * GUARD + 1);
	iov = cut(v, data, len, segments);
	rc = ch_read(c, (struct ext){ &obj_none, off, len }, &iov, 0);
	EXPECT(r, rc == 0, "read %" PRIu64 "+%" PRIu64 ": %s", off, len, err_name(rc));
	for (unsigned i = 0; i < GUARD; i++)
		EXPECT(r, data[-1 - (int)i] == 0xa5 && data[len + i] == 0xa5,
		       "read %" PRIu64 "+%" PRIu64 " wrote beyond its buffer", off, len);
	if (memcmp(data, r->model + off, len) == 0)
		return 0;
	return run_compare(r, off, data, len);
}

CO_FN int run_check_all(struct run *r)
{
	return run_check(r, 0, r->what->size, 1);
}

CO_FN int run_zero(struct run *r, uint64_t off, uint64_t len, unsigned fl)
{
	struct chan *c = run_chan(r);

	return c ? ch_zero(c, (struct ext){ &obj_none, off, len }, fl) : -EIO;
}
