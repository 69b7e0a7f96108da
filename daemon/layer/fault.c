/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * fault: answers chosen requests with an error, so that tests can see what everything above makes of it.
 *
 * A request can fail when its kind is in `ops`, it touches `range` (flush, stat, put, del and list always
 * do), and `file`, if given, exists. Those requests are numbered 0, 1, 2 ...; number n fails when n >= `after`,
 * a coin thrown from (`seed`, n) falls below `rate`, and fewer than `count` have failed. So "the third flush fails" is
 * fault[ops=flush,after=2,count=1], and with one client a run repeats exactly; with several, the sequence
 * of verdicts repeats, not who gets which.
 *
 * `when` says what happened to the layer below: nothing (before), half of the extent (partly), or all of
 * it (after: the answer was lost). Where there is no half (flush, and all that is done to whole objects),
 * partly is before.
 *
 * Promises: a request answered without error is as good as the layer below makes it. A request answered
 * with an error has undefined contents in its extent, and changes nothing outside of it.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "layer/layers.h"
#include "nbdrs/io.h"
#include "nbdrs/log.h"

enum when { BEFORE, PARTLY, AFTER };

struct fault {
	unsigned error, when; /* index into errors[]; enum when */
	uint64_t rate;        /* ppm */
	uint64_t after, count, seed;
	char *ops, *range, *file;

	unsigned op_mask;                /* 1 << enum ch_op */
	uint64_t from, to;               /* bytes, [from, to) */
	_Atomic uint64_t seen, injected; /* of all channels; relaxed, they order nothing else */
};

static const int errors[] = { EIO,   ENOSPC,     ENOMEM, EPERM,     EINVAL,
			      EROFS, EOPNOTSUPP, EAGAIN, ETIMEDOUT, ESHUTDOWN, ECONNRESET, ECONNREFUSED };

static const struct opt options[] = {
	{ .name = "error",
	  .type = OPT_ENUM,
	  .field = offsetof(struct fault, error),
	  .def = "EIO",
	  .choices = "EIO|ENOSPC|ENOMEM|EPERM|EINVAL|EROFS|ENOTSUP|EAGAIN|ETIMEDOUT|ESHUTDOWN|"
		     "ECONNRESET|ECONNREFUSED",
	  .help = "what is answered" },
	{ .name = "rate",
	  .type = OPT_PERCENT,
	  .field = offsetof(struct fault, rate),
	  .def = "100%",
	  .help = "how many of the requests in question fail" },
	{ .name = "ops",
	  .type = OPT_STR,
	  .field = offsetof(struct fault, ops),
	  .def = "read|write|zero|trim|flush|stat|put|del|list",
	  .help = "which requests: read|write|zero|trim|flush|stat|put|del|list|map|cache" },
	{ .name = "after",
	  .type = OPT_UINT,
	  .field = offsetof(struct fault, after),
	  .def = "0",
	  .help = "so many of them are let through first" },
	{ .name = "count",
	  .type = OPT_UINT,
	  .field = offsetof(struct fault, count),
	  .def = "0",
	  .help = "then at most so many fail, 0 = no limit" },
	{ .name = "seed",
	  .type = OPT_UINT,
	  .field = offsetof(struct fault, seed),
	  .def = "1",
	  .help = "another seed, another choice of victims" },
	{ .name = "range",
	  .type = OPT_STR,
	  .field = offsetof(struct fault, range),
	  .help = "only requests that touch FROM-TO, as in 1Mi-2Mi or 4Ki-" },
	{ .name = "when",
	  .type = OPT_ENUM,
	  .field = offsetof(struct fault, when),
	  .def = "before",
	  .choices = "before|partly|after",
	  .help = "fail before, halfway through or after doing it" },
	{ .name = "file",
	  .type = OPT_STR,
	  .field = offsetof(struct fault, file),
	  .help = "only while this file exists" },
	OPT_END,
};

/* --- Opening ---------------------------------------------------------------------------------- */

/* "read|flush" -> mask; 0 when a word is unknown. */
static unsigned parse_ops(const char *text)
{
	unsigned mask = 0;

	for (;;) {
		size_t len = strcspn(text, "|");
		unsigned op = 0;

		while (op < CH_OPS &&
		       (strlen(ch_op_names[op]) != len || memcmp(ch_op_names[op], text, len) != 0))
			op++;
		if (op == CH_OPS)
			return 0;
		mask |= 1U << op;
		if (!text[len])
			return mask;
		text += len + 1;
	}
}

/* "FROM-TO" or "FROM-". */
static int parse_range(const char *text, uint64_t *from, uint64_t *to)
{
	_cleanup_free_ char *first = strdup(text);
	char *dash;

	if (!first)
		return -ENOMEM;
	dash = strchr(first, '-');
	if (!dash)
		return -EINVAL;
	*dash = '\0';
	if (parse_size(first, from) || (dash[1] && parse_size(dash + 1, to)))
		return -EINVAL;
	return *from < *to ? 0 : -EINVAL;
}

static CO_FN int fault_open(struct layer *l, struct err *err)
{
	struct fault *f = l->self;

	f->op_mask = parse_ops(f->ops);
	if (!f->op_mask)
		return err_set(err, -EINVAL,
			       "layer fault: option \"ops\": \"%s\" must be words out of "
			       "read|write|zero|trim|flush|stat|put|del|list|map|cache",
			       f->ops);
	f->from = 0;
	f->to = UINT64_MAX;
	if (f->range && parse_range(f->range, &f->from, &f->to))
		return err_set(
			err, -EINVAL,
			"layer fault: option \"range\": \"%s\" must be FROM-TO with FROM < TO, "
			"as in 1Mi-2Mi or 4Ki-",
			f->range);
	l->caps &= ~(unsigned)CAN_LEND;
	return 0;
}

static CO_FN void fault_close(struct layer *l)
{
	struct fault *f = l->self;

	log_debug("layer fault closed requests=%" PRIu64 " failed=%" PRIu64, (uint64_t)f->seen,
		  (uint64_t)f->injected);
}

/* --- Verdicts --------------------------------------------------------------------------------- */

/* A number of [0, 1000000) that depends on seed and n only (splitmix64's finish). */
static uint32_t throw_coin(uint64_t seed, uint64_t n)
{
	uint64_t z = seed * UINT64_C(0x9e3779b97f4a7c15) + n + 1;

	z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
	z ^= z >> 31;
	return (uint32_t)((z >> 32) * 1000000 >> 32);
}

static int file_exists(void *arg)
{
	return access(arg, F_OK) == 0;
}

/* Takes one of the `count` failures; false when there is none left. */
static bool take_failure(struct fault *f)
{
	uint64_t n = atomic_fetch_add_explicit(&f->injected, 1, memory_order_relaxed);

	if (!f->count || n < f->count)
		return true;
	atomic_fetch_sub_explicit(&f->injected, 1, memory_order_relaxed);
	return false;
}

/* Has it an extent? The others are always in range. */
static bool has_extent(enum ch_op op)
{
	return op <= CH_CACHE && op != CH_FLUSH;
}

/* Whether this request fails: 0 or the error. */
static CO_FN int verdict(struct chan *c, enum ch_op op, struct ext e)
{
	struct fault *f = c->layer->self;
	uint64_t n;

	if (!(f->op_mask & 1U << op))
		return 0;
	if (has_extent(op) && (e.off >= f->to || e.off + e.len <= f->from))
		return 0;
	if (f->file && offload(file_exists, f->file) != 1)
		return 0;
	n = atomic_fetch_add_explicit(&f->seen, 1, memory_order_relaxed);
	if (n < f->after || throw_coin(f->seed, n) >= f->rate || !take_failure(f))
		return 0;
	log_debug("fault injected op=%s n=%" PRIu64 " off=%" PRIu64 " len=%" PRIu64 " error=%s",
		  ch_op_names[op], n, e.off, e.len, err_name(errors[f->error]));
	return -errors[f->error];
}

/* How much of a request with that verdict reaches the layer below. */
static uint64_t reach(const struct chan *c, struct ext e, int failed)
{
	const struct fault *f = c->layer->self;

	if (!failed || f->when == AFTER)
		return e.len;
	return f->when == PARTLY ? e.len / 2 : 0;
}

/* --- Requests --------------------------------------------------------------------------------- */

static CO_FN int transfer(struct chan *c, enum ch_op op, struct ext e, const struct iov *iov,
			  unsigned fl)
{
	int failed = verdict(c, op, e), rc = 0;
	uint64_t len = reach(c, e, failed);
	struct iovec store[IOV_SLICE_MAX];
	struct iov part = *iov;

	if (len < e.len && len)
		part = iov_slice(iov, 0, len, store, IOV_SLICE_MAX);
	e.len = len;
	if (len && op == CH_READ)
		rc = ch_read(c->kids[0], e, &part, fl);
	else if (len)
		rc = ch_write(c->kids[0], e, &part, fl);
	return rc ? rc : failed;
}

static CO_FN int fault_read(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	return transfer(c, CH_READ, e, iov, fl);
}

static CO_FN int fault_write(struct chan *c, struct ext e, const struct iov *iov, unsigned fl)
{
	return transfer(c, CH_WRITE, e, iov, fl);
}

static CO_FN int fault_zero(struct chan *c, struct ext e, unsigned fl)
{
	int failed = verdict(c, CH_ZERO, e), rc = 0;

	e.len = reach(c, e, failed);
	if (e.len)
		rc = ch_zero(c->kids[0], e, fl);
	return rc ? rc : failed;
}

static CO_FN int fault_trim(struct chan *c, struct ext e, unsigned fl)
{
	int failed = verdict(c, CH_TRIM, e), rc = 0;

	e.len = reach(c, e, failed);
	if (e.len)
		rc = ch_trim(c->kids[0], e, fl);
	return rc ? rc : failed;
}

/* Of requests without halves: the verdict, and whether they reach the layer below. */
static CO_FN int whole_verdict(struct chan *c, enum ch_op op, const struct obj *obj, bool *reaches)
{
	const struct fault *f = c->layer->self;
	int failed = verdict(c, op, (struct ext){ obj, 0, 0 });

	*reaches = !failed || f->when == AFTER;
	return failed;
}

static CO_FN int fault_flush(struct chan *c)
{
	bool reaches;
	int failed = whole_verdict(c, CH_FLUSH, &obj_none, &reaches), rc = 0;

	if (reaches)
		rc = ch_flush(c->kids[0]);
	return rc ? rc : failed;
}

static CO_FN int fault_stat(struct chan *c, const struct obj *obj, struct obj_stat *st)
{
	bool reaches;
	int failed = whole_verdict(c, CH_STAT, obj, &reaches);

	return failed ? failed : ch_stat(c->kids[0], obj, st);
}

static CO_FN int fault_put(struct chan *c, const struct put *p, struct obj_stat *st)
{
	bool reaches;
	int failed = whole_verdict(c, CH_PUT, p->obj, &reaches), rc = 0;

	if (reaches)
		rc = ch_put(c->kids[0], p, failed ? NULL : st);
	return rc ? rc : failed;
}

static CO_FN int fault_del(struct chan *c, const struct obj *objs, unsigned n)
{
	bool reaches;
	int failed = whole_verdict(c, CH_DEL, n ? objs : &obj_none, &reaches), rc = 0;

	if (reaches)
		rc = ch_del(c->kids[0], objs, n);
	return rc ? rc : failed;
}

static CO_FN int fault_list(struct chan *c, const char *prefix, list_fn *fn, void *arg)
{
	bool reaches;
	int failed = whole_verdict(c, CH_LIST, &obj_none, &reaches), rc = 0;

	if (reaches)
		rc = ch_list(c->kids[0], prefix, fn, arg);
	return rc ? rc : failed;
}

static CO_FN int fault_map(struct chan *c, struct ext e, struct extmap *m)
{
	int failed = verdict(c, CH_MAP, e);

	return failed ? failed : ch_map(c->kids[0], e, m);
}

static CO_FN int fault_cache(struct chan *c, struct ext e)
{
	int failed = verdict(c, CH_CACHE, e);

	return failed ? failed : ch_cache(c->kids[0], e);
}

const struct layer_ops fault_layer = {
	.name = "fault",
	.help = "answers chosen requests with an error; for tests",
	.opts = options,
	.self_size = sizeof(struct fault),
	.min_kids = 1,
	.max_kids = 1,
	.open = fault_open,
	.close = fault_close,
	.read = fault_read,
	.write = fault_write,
	.zero = fault_zero,
	.trim = fault_trim,
	.flush = fault_flush,
	.map = fault_map,
	.cache = fault_cache,
	.stat = fault_stat,
	.put = fault_put,
	.del = fault_del,
	.list = fault_list,
};
