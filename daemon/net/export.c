/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The list of exports: what is offered, by which chain, and what is advertised for it.
 *
 * Offered is only what the whole chain can do. Some things it always can, since generic code in layer.c
 * brings requests into the shape a layer takes: unaligned requests (padded under a lock), large ones
 * (split), WRITE_ZEROES (written), FUA (write, then flush). So the smallest block is one byte for every
 * chain, which also keeps a device's block size the same when options of the chain change.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nbdrs/backend.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/export.h"
#include "nbdrs/identity.h"
#include "nbdrs/log.h"
#include "nbdrs/opt.h"
#include "nbdrs/reactor.h"
#include "nbdrs/spec.h"

enum {
	MIN_BLOCK = 1,
	PREF_BLOCK_MIN = 4096, /* a page: what costs the same as one byte on nearly every medium */
	STATS_ALIGN = 64,      /* each reactor's on cache lines of its own */
	OPENERS_MAX = 16,      /* volumes that are being opened at the same time */
};

static struct export *exports;

uint16_t export_tflags(unsigned caps, bool read_only)
{
	uint16_t flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_DF | NBD_FLAG_SEND_CACHE;

	if (caps & IS_ROTATIONAL)
		flags |= NBD_FLAG_ROTATIONAL;
	if (caps & CAN_MULTI)
		flags |= NBD_FLAG_CAN_MULTI_CONN;
	if (read_only || !(caps & CAN_WRITE))
		return flags | NBD_FLAG_READ_ONLY;

	/* Without anything volatile FLUSH is a quick success, and clients that insist on it are content. */
	flags |= NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_WRITE_ZEROES;
	if (caps & CAN_TRIM)
		flags |= NBD_FLAG_SEND_TRIM;
	if (caps & CAN_FAST_ZERO)
		flags |= NBD_FLAG_SEND_FAST_ZERO;
	return flags;
}

/* Length of the UTF-8 sequence at `p` (RFC 3629: no overlong forms, no surrogates), 0 = none. */
static size_t utf8_len(const uint8_t *p)
{
	uint32_t c;
	size_t n;

	if (p[0] < 0x80)
		return 1;
	if (p[0] >= 0xc2 && p[0] < 0xe0)
		n = 2;
	else if (p[0] >= 0xe0 && p[0] < 0xf0)
		n = 3;
	else if (p[0] >= 0xf0 && p[0] < 0xf5)
		n = 4;
	else
		return 0;

	c = p[0] & (0x7fU >> n);
	for (size_t i = 1; i < n; i++) {
		if ((p[i] & 0xc0) != 0x80) /* also at the end of the text */
			return 0;
		c = c << 6 | (p[i] & 0x3f);
	}
	if ((n == 3 && (c < 0x800 || (c >= 0xd800 && c < 0xe000))) ||
	    (n == 4 && (c < 0x10000 || c > 0x10ffff)))
		return 0;
	return n;
}

int export_check_name(const char *name, struct err *err)
{
	size_t len = strlen(name);

	if (len == 0)
		return err_set(err, -EINVAL,
			       "an export needs a name; clients get the first one for ''");
	if (len > NBD_MAX_STRING)
		return err_set(err, -EINVAL,
			       "export name '%.32s...' has %zu bytes; at most %d can be sent", name,
			       len, NBD_MAX_STRING);
	for (const uint8_t *p = (const uint8_t *)name; *p;) {
		size_t n = utf8_len(p);
		bool is_control = *p < 0x20 || *p == 0x7f ||
				  (n == 2 && p[0] == 0xc2 && p[1] < 0xa0);

		if (n == 0)
			return err_set(err, -EINVAL, "export name '%.64s' is not UTF-8 (byte %zu)",
				       name, (size_t)((const char *)p - name) + 1);
		if (is_control)
			return err_set(err, -EINVAL,
				       "export name '%.64s' has a control character (byte %zu)",
				       name, (size_t)((const char *)p - name) + 1);
		p += n;
	}
	if (export_find_n(name, len))
		return err_set(err, -EEXIST,
			       "two exports have the name '%.64s'; give one of them another", name);
	return 0;
}

/*
 * For people who list the server: size and layers ("10GiB, raw:file"). No targets: where data lies is
 * nothing that every client should read.
 */
char *export_describe(const struct spec *spec, uint64_t size)
{
	char text[256], bytes[32];
	size_t n;

	format_size(size, bytes, sizeof(bytes));
	n = (size_t)snprintf(text, sizeof(text), "%s, %s", bytes, spec->layer);
	for (const struct spec *s = spec; s->kids_n && n < sizeof(text); s = s->kids[0])
		n += (size_t)snprintf(text + n, sizeof(text) - n, ":%s", s->kids[0]->layer);
	return strdup(text);
}

static bool write_stores(FILE *out, const struct spec *s)
{
	_cleanup_free_ char *text = s->kids_n ? NULL : spec_format(s);
	bool is_whole = s->kids_n || text;

	if (text)
		fprintf(out, "%s ", text);
	for (unsigned i = 0; i < s->kids_n; i++)
		is_whole &= write_stores(out, s->kids[i]);
	return is_whole;
}

char *export_stores(const struct spec *spec)
{
	char *text = NULL;
	size_t len;
	FILE *out = open_memstream(&text, &len);
	bool is_whole = out && write_stores(out, spec);

	if (out && fclose(out) == 0 && is_whole)
		return text;
	free(text);
	return NULL;
}

static void export_free(struct export *e)
{
	if (!e)
		return;
	chain_free(e->chain);
	spec_free(e->spec);
	free(e->stats);
	free(e->backend_id);
	free(e->stores);
	free(e->description);
	free(e->name);
	free(e);
}

/* By what the kernel knows it: its name and, where it has one, its identity. */
static CO_FN int set_backend_id(struct export *e, struct err *err)
{
	_cleanup_free_ char *encoded = percent_encode(e->name);
	char identity[IDENTITY_LEN + 1];
	int rc = identity_read(e->chain, identity, err);

	if (rc)
		return rc;
	if (!encoded ||
	    asprintf(&e->backend_id, BACKEND_PREFIX "%s%s%s", encoded, *identity ? BACKEND_IDENTITY : "",
		     identity) < 0) {
		e->backend_id = NULL; /* asprintf leaves it undefined */
		return err_set(err, -ENOMEM, "out of memory");
	}
	return 0;
}

/* What is advertised, from the open chain. */
static int set_offer(struct export *e, bool read_only, struct err *err)
{
	const struct layer *top = chain_top(e->chain);
	size_t stats_len = reactors_n() * sizeof(*e->stats);

	if (top->size > INT64_MAX)
		return err_set(err, -EFBIG, "it has %llu bytes; 2^63 - 1 is the limit",
			       (unsigned long long)top->size);
	e->size = top->size;
	e->tflags = export_tflags(top->caps, read_only);
	e->min_block = MIN_BLOCK;
	e->pref_block = MAX(MAX(top->pref_io, top->min_io), (uint32_t)PREF_BLOCK_MIN);
	e->pref_block = MIN(e->pref_block, (uint32_t)NBD_MAX_PAYLOAD);
	e->max_payload = NBD_MAX_PAYLOAD;

	e->description = export_describe(e->spec, e->size);
	e->stats = aligned_alloc(STATS_ALIGN, align_up(stats_len, STATS_ALIGN));
	e->stores = export_stores(e->spec);
	if (!e->description || !e->stats || !e->stores)
		return err_set(err, -ENOMEM, "out of memory");
	memset(e->stats, 0, stats_len);
	return 0;
}

static CO_FN int open_chain(struct export *e, bool read_only, struct err *err)
{
	int rc = chain_build(e->spec, e->name, read_only, &e->chain, err);

	if (!rc)
		rc = chain_open(e->chain, err);
	if (rc)
		return rc;
	rc = set_offer(e, read_only, err);
	if (!rc)
		rc = set_backend_id(e, err);
	if (rc)
		(void)chain_close(e->chain); /* nothing was written */
	return rc;
}

/* --- Opening all of them ------------------------------------------------------------------------ */

/* One export on its way into the list. */
struct opening {
	struct export *e; /* open once rc is 0 */
	struct err err;
	int rc;
};

/* All of them, and those who open one after the other. */
struct openings {
	struct opening *v;
	size_t n, next;
	bool read_only;
};

/* A store far away takes some round trips, while which others can be opened. */
static CO_FN void open_some(void *arg)
{
	struct openings *o = arg;

	while (o->next < o->n) {
		struct opening *v = &o->v[o->next++];

		v->rc = open_chain(v->e, o->read_only, &v->err);
	}
}

static int prepare(const struct export_arg *arg, struct opening *v, struct err *err)
{
	int rc = export_check_name(arg->name, err);

	if (rc)
		return rc;
	v->e = calloc(1, sizeof(*v->e));
	if (!v->e)
		return err_set(err, -ENOMEM, "out of memory");
	v->e->name = strdup(arg->name);
	return v->e->name ? 0 : err_set(err, -ENOMEM, "out of memory");
}

static CO_FN void open_all(struct openings *o)
{
	struct co_group g = CO_GROUP_INIT;

	for (size_t i = 0; i < MIN(o->n, (size_t)OPENERS_MAX); i++)
		co_group_spawn(&g, open_some, o);
	co_group_wait(&g);
}

/* In the order of the list; the first one that failed counts. */
static CO_FN int append_all(struct openings *o, struct err *err)
{
	struct export **at = &exports;
	int rc = 0;

	while (*at)
		at = &(*at)->next;
	for (size_t i = 0; i < o->n; i++) {
		struct opening *v = &o->v[i];
		struct export *e = TAKE_PTR(v->e);

		if (v->rc) {
			if (!rc)
				rc = err_set(err, v->rc, "export '%.64s': %s", e->name, v->err.msg);
			export_free(e);
			continue;
		}
		if (e->size == 0)
			log_warn("export is empty name=%s", e->name);
		if ((e->tflags & NBD_FLAG_READ_ONLY) && !o->read_only)
			log_warn("export is read-only: its chain can't be written name=%s", e->name);
		*at = e;
		at = &e->next;
	}
	return rc;
}

CO_FN int exports_open(const struct export_arg *args, size_t n, bool read_only, struct err *err)
{
	struct openings o = { .v = calloc(n, sizeof(*o.v)), .n = n, .read_only = read_only };
	int rc = o.v ? 0 : err_set(err, -ENOMEM, "out of memory");

	for (size_t i = 0; i < n && !rc; i++)
		rc = prepare(&args[i], &o.v[i], err);
	for (size_t i = 0; i < n; i++) {
		if (rc)
			spec_free(args[i].spec);
		else
			o.v[i].e->spec = args[i].spec;
	}
	if (!rc) {
		open_all(&o);
		rc = append_all(&o, err);
	}
	for (size_t i = 0; i < n && o.v; i++)
		export_free(o.v[i].e);
	free(o.v);
	return rc;
}

CO_FN int exports_flush(void)
{
	int first = 0;

	for (struct export *e = exports; e; e = e->next) {
		int rc = 0;
		struct chan *chan = chain_chan(e->chain, &rc);

		if (chan)
			rc = ch_flush(chan);
		if (rc < 0)
			log_error("flush failed export=%s error=%s", e->name, err_name(rc));
		first = first ? first : rc;
	}
	return first;
}

static void set_comes_again(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum)
{
	(void)arg;
	(void)depth;
	(void)sum;
	l->comes_again = true;
}

CO_FN int exports_close(bool is_upgrade)
{
	int first = 0;

	while (exports) {
		struct export *e = exports;
		int rc;

		if (is_upgrade && e->comes_again)
			chain_each(e->chain, set_comes_again, NULL);
		rc = chain_close(e->chain);
		exports = e->next;
		if (rc < 0)
			log_error("flush at close failed export=%s error=%s", e->name,
				  err_name(rc));
		if (first == 0 && rc < 0)
			first = rc;
		export_free(e);
	}
	return first;
}

struct export *export_find_n(const char *name, size_t len)
{
	if (len == 0)
		return exports;
	for (struct export *e = exports; e; e = e->next) {
		if (strlen(e->name) == len && memcmp(e->name, name, len) == 0)
			return e;
	}
	return NULL;
}

struct export *export_find(const char *name)
{
	return export_find_n(name, strlen(name));
}

struct export *export_find_backend(const char *backend_id)
{
	const size_t len = strlen(backend_id);
	const bool has_identity = backend_has_identity(backend_id);

	for (struct export *e = exports; e; e = e->next)
		if (strncmp(e->backend_id, backend_id, len) == 0 &&
		    (e->backend_id[len] == '\0' || (e->backend_id[len] == *BACKEND_IDENTITY && !has_identity)))
			return e;
	return NULL;
}

bool export_has_identity(const struct export *e)
{
	return backend_has_identity(e->backend_id);
}

struct export *export_first(void)
{
	return exports;
}
