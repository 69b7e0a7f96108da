/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * `version` and `status` of the control socket. Counters are read while the reactors write them: each
 * number is right, sums of different ones may be a request apart.
 */
#include "ctl/ctl_int.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "nbdrs/conn.h"
#include "nbdrs/ctl.h"
#include "nbdrs/hist.h"
#include "nbdrs/layer.h"
#include "nbdrs/reactor.h"

enum { CLIENTS_SHOWN = 64 };

/* By enum nbd_cmd; NULL is not counted (DISC). */
static const char *const cmd_names[EXPORT_CMDS] = {
	"read", "write", NULL, "flush", "trim", "cache", "write_zeroes", "block_status",
};
static const char *const hist_names[EXPORT_HISTS] = { "read", "write", "flush" };
/* --- Connections -------------------------------------------------------------------------------- */

static void conn_seen(void *arg, const struct conn_view *v)
{
	struct ctl_conns *all = arg;
	struct ctl_conn *c;

	if (all->n == all->room) {
		const size_t room = all->room ? all->room * 2 : 64;
		struct ctl_conn *grown = realloc(all->v, room * sizeof(*grown));

		if (!grown) {
			all->is_oom = true;
			return;
		}
		all->v = grown;
		all->room = room;
	}
	c = &all->v[all->n++];
	*c = (struct ctl_conn){ .id = v->id,
				.requests = v->requests,
				.in_flight = v->in_flight,
				.export = export_find(v->export_name),
				.is_kernel = v->is_kernel,
				.is_cut = v->is_cut };
	(void)snprintf(c->peer, sizeof(c->peer), "%s", v->peer); /* cut off is fine for a display */
}

/* On each reactor in turn, so `all` needs no lock. */
static int conns_of_reactor(void *arg)
{
	conns_each(conn_seen, arg);
	return 0;
}

int ctl_conns_collect(struct ctl_conns *out)
{
	for (unsigned i = 0; i < reactors_n(); i++) {
		int rc = reactor_call(reactor_get(i), conns_of_reactor, out);

		if (rc)
			return rc;
	}
	return out->is_oom ? -ENOMEM : 0;
}

/* --- JSON of one export ------------------------------------------------------------------------- */

/* Adds the numbers that are not 0, by their names; the reader takes absent ones as 0. */
static json_t *counters(const char *const *names, const uint64_t *v, unsigned n)
{
	_cleanup_json_ json_t *j = json_object();

	for (unsigned i = 0; i < n; i++)
		if (names[i] && v[i] &&
		    json_object_set_new(j, names[i], json_integer((json_int_t)v[i])))
			return NULL;
	return TAKE_PTR(j);
}

static json_t *counters_of_layer(const _Atomic uint64_t *from)
{
	uint64_t v[CH_OPS];

	for (unsigned i = 0; i < CH_OPS; i++)
		v[i] = atomic_load_explicit(&from[i], memory_order_relaxed);
	return counters(ch_op_names, v, CH_OPS);
}

/* What the layer says of itself, as an object of strings; NULL when it says nothing. */
struct own_words {
	struct info base;
	json_t *j;
};

static void add_words(struct info *i, const char *key, const char *value)
{
	struct own_words *w = container_of(i, struct own_words, base);

	if (!w->j)
		w->j = json_object();
	/* A value that is not UTF-8 or does not fit into memory is left out. */
	(void)json_object_set_new(w->j, key, json_string(value));
}

static json_t *words_of_layer(struct layer *l)
{
	struct own_words w = { .base = { .add = add_words } };

	if (l->ops->status && l->open_error == 0)
		l->ops->status(l, &w.base);
	return w.j;
}

static void add_layer(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum)
{
	json_t *list = arg;

	/* A layer missing when memory is out is seen by its missing depth; the packet would fail anyway. */
	(void)json_array_append_new(
		list, json_pack("{s:s, s:i, s:o, s:o, s:o, s:I, s:o*}", "name", l->ops->name, "depth", (int)depth,
				"ops", counters_of_layer(sum->ops), "bytes", counters_of_layer(sum->bytes),
				"errors", counters_of_layer(sum->errors), "lent",
				(json_int_t)atomic_load_explicit(&sum->lent, memory_order_relaxed), "state",
				words_of_layer(l)));
}

struct totals {
	uint64_t ops[EXPORT_CMDS], bytes[EXPORT_CMDS], errors[EXPORT_CMDS];
	struct hist latency[EXPORT_HISTS];
};

static void sum_up(const struct export *e, struct totals *t)
{
	for (unsigned r = 0; r < reactors_n(); r++) {
		const struct export_stats *s = &e->stats[r];

		for (unsigned i = 0; i < EXPORT_CMDS; i++) {
			t->ops[i] += atomic_load_explicit(&s->ops[i], memory_order_relaxed);
			t->bytes[i] += atomic_load_explicit(&s->bytes[i], memory_order_relaxed);
			t->errors[i] += atomic_load_explicit(&s->errors[i], memory_order_relaxed);
		}
		for (unsigned i = 0; i < EXPORT_HISTS; i++)
			hist_merge(&t->latency[i], &s->latency[i]);
	}
}

static json_t *latencies(const struct totals *t)
{
	_cleanup_json_ json_t *j = json_object();

	for (unsigned i = 0; i < EXPORT_HISTS; i++) {
		const struct hist *h = &t->latency[i];

		if (json_object_set_new(j, hist_names[i],
					json_pack("{s:I, s:I, s:I}", "p50",
						  (json_int_t)hist_quantile(h, 500000), "p99",
						  (json_int_t)hist_quantile(h, 990000), "p999",
						  (json_int_t)hist_quantile(h, 999000))))
			return NULL;
	}
	return TAKE_PTR(j);
}

/* The first CLIENTS_SHOWN connections of `e`; the number beyond them in *omitted. */
static json_t *clients(const struct export *e, const struct ctl_conns *conns, unsigned *omitted)
{
	_cleanup_json_ json_t *list = json_array();

	*omitted = 0;
	for (size_t i = 0; i < conns->n; i++) {
		const struct ctl_conn *c = &conns->v[i];

		if (c->export != e)
			continue;
		if (json_array_size(list) == CLIENTS_SHOWN)
			(*omitted)++;
		else if (json_array_append_new(list, json_pack("{s:I, s:o, s:I, s:I, s:b}", "id",
							       (json_int_t)c->id, "peer",
							       ctl_text(c->peer), "requests",
							       (json_int_t)c->requests, "in_flight",
							       (json_int_t)c->in_flight, "kernel",
							       c->is_kernel)))
			return NULL;
	}
	return TAKE_PTR(list);
}

static json_t *export_json(const struct export *e, const struct ctl_conns *conns, bool with_layers)
{
	_cleanup_free_ struct totals *t = calloc(1, sizeof(*t));
	_cleanup_free_ char *chain = spec_format(e->spec);
	json_t *tree = with_layers ? json_array() : json_null();
	json_t *shown;
	unsigned omitted;

	if (!t || !chain || !tree) {
		json_decref(tree);
		return NULL;
	}
	sum_up(e, t);
	if (with_layers)
		chain_each(e->chain, add_layer, tree);
	shown = clients(e, conns, &omitted);
	/* json_pack takes the references of every `o` also when it fails. */
	return json_pack("{s:o, s:I, s:b, s:i, s:I, s:I, s:I, s:o, s:o, s:i, s:o, s:i, s:o, s:o, s:o, s:o, s:o}",
			 "name", ctl_text(e->name), "size", (json_int_t)e->size, "read_only",
			 (e->tflags & NBD_FLAG_READ_ONLY) != 0, "flags", (int)e->tflags, "min_block",
			 (json_int_t)e->min_block, "pref_block", (json_int_t)e->pref_block,
			 "max_payload", (json_int_t)e->max_payload, "chain", ctl_text(chain), "layers",
			 tree, "connections", (int)atomic_load(&e->conns), "clients", shown,
			 "clients_omitted", (int)omitted, "devices", ctl_devices(e, conns), "requests",
			 counters(cmd_names, t->ops, EXPORT_CMDS), "bytes",
			 counters(cmd_names, t->bytes, EXPORT_CMDS), "errors",
			 counters(cmd_names, t->errors, EXPORT_CMDS), "latency_ns", latencies(t));
}

/* One packet: {"export": .., "more": ..}. A tree of thousands of layers would not fit: it is left out then. */
static CO_FN int send_export(struct ctl_peer *p, const struct export *e, const struct ctl_conns *conns,
			     bool more)
{
	int rc = -EMSGSIZE;

	for (int with_layers = 1; rc == -EMSGSIZE && with_layers >= 0; with_layers--) {
		json_t *j = json_pack("{s:o}", "export", export_json(e, conns, with_layers));

		if (j && more && json_object_set_new(j, "more", json_true())) {
			json_decref(j);
			return -ENOMEM;
		}
		rc = ctl_answer(p, j, NULL, 0);
	}
	return rc;
}

/* --- Commands ----------------------------------------------------------------------------------- */

CO_FN int (*ctl_upgrade_hook)(const char *binary, struct err *err);
unsigned ctl_generation;
struct err ctl_upgrade_err;

static json_t *version_json(void)
{
	return json_pack("{s:s, s:i, s:s, s:i, s:I, s:o*}", "version", NBDRS_VERSION, "pid", (int)getpid(), "engine",
			 reactors_engine(), "threads", (int)reactors_n(), "generation",
			 (json_int_t)ctl_generation, "upgrade_error",
			 *ctl_upgrade_err.msg ? ctl_text(ctl_upgrade_err.msg) : NULL);
}

int ctl_cmd_upgrade(struct ctl_peer *p, json_t *req)
{
	const struct err was = ctl_upgrade_err;
	struct err err = { "" };
	bool bad;
	const char *binary = ctl_get_text(req, "binary", &bad);
	int rc;

	if (bad || (binary && *binary != '/'))
		return ctl_refuse(p, -EINVAL, "\"binary\" must be a string, an absolute path");
	/* A new program runs with the daemon's rights, so this is not for everybody who may look at it. */
	if (p->cred.uid != 0 && p->cred.uid != geteuid())
		return ctl_refuse(p, -EACCES, "only root and the daemon's own user may start a new nbdrsd");
	ctl_upgrade_err.msg[0] = '\0';
	rc = ctl_upgrade_hook(binary, &err);
	if (rc && !*ctl_upgrade_err.msg)
		ctl_upgrade_err = was; /* who asked before may not have read it yet */
	if (rc)
		return ctl_refuse(p, rc, "%s", err.msg);
	return ctl_answer(p, json_pack("{s:I}", "generation", (json_int_t)ctl_generation), NULL, 0);
}

int ctl_cmd_version(struct ctl_peer *p, json_t *req)
{
	(void)req; /* has no parameters */
	return ctl_answer(p, version_json(), NULL, 0);
}

/* The first packet; `more` = others follow. */
static json_t *head_json(unsigned exports, bool more)
{
	_cleanup_json_ json_t *j = version_json();

	if (json_object_set_new(j, "uptime_ns", json_integer((json_int_t)(now_ns() - ctl_started_ns))) ||
	    json_object_set_new(j, "exports_n", json_integer(exports)) ||
	    json_object_set_new(j, "connections_n", json_integer(conns_n())))
		return NULL;
	if (more && json_object_set_new(j, "more", json_true()))
		return NULL;
	return TAKE_PTR(j);
}

int ctl_cmd_status(struct ctl_peer *p, json_t *req)
{
	_cleanup_conns_ struct ctl_conns conns = { 0 };
	const struct export *only = NULL;
	const char *name;
	unsigned n = 0;
	bool bad;
	int rc;

	name = ctl_get_text(req, "export", &bad);
	if (bad)
		return ctl_refuse(p, -EINVAL, "\"export\" must be a string");
	if (name) {
		only = export_find(name);
		if (!only)
			return ctl_refuse(p, -ENOENT, "there is no export '%s'", name);
	}
	rc = ctl_conns_collect(&conns);
	if (rc)
		return ctl_refuse(p, rc, "out of memory");
	ctl_devices_prune(&conns);

	for (const struct export *e = export_first(); e; e = e->next)
		n++;
	rc = ctl_answer(p, head_json(n, n > 0), NULL, 0);
	if (only)
		return rc ? rc : send_export(p, only, &conns, false);
	for (const struct export *e = export_first(); e && !rc; e = e->next) {
		rc = send_export(p, e, &conns, e->next != NULL);
		/* Many exports must not hold up the requests of this reactor. */
		co_yield();
	}
	return rc;
}
