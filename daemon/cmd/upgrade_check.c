/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Whether the exports can be left to the next program: it reads the list of exports anew, opens what stands there then,
 * and there is no way back.
 *
 *	memory		what is in memory only would be gone
 *	list		who is connected must find the same volume by the same name
 *	journals	what lies in the journal of a cache must be found by the chain that comes next, or be in the
 *			store. With another chain nobody would read it, and the store alone is older than what was
 *			flushed
 *	stores		must answer, or opening them would fail and everybody be cut
 *
 * List and journals are looked at again when nothing is in flight, right before everything is written down.
 */
#include "cmd/cmd.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"
#include "nbdrs/opt.h"

enum { ASKERS_MAX = 16 }; /* stores that are asked at the same time */

/* --- Memory ------------------------------------------------------------------------------------- */

static void find_memory(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum)
{
	(void)depth;
	(void)sum;
	*(bool *)arg |= strcmp(l->ops->name, "mem") == 0;
}

int upgrade_check_memory(struct err *err)
{
	for (const struct export *e = export_first(); e; e = e->next) {
		bool is_lost = false;

		chain_each(e->chain, find_memory, &is_lost);
		if (is_lost)
			return err_set(err, -EOPNOTSUPP,
				       "export '%.64s' has its data in memory, and would lose it", e->name);
	}
	return 0;
}

/* --- The list of exports ------------------------------------------------------------------------ */

static const struct volume_arg *find_volume(const struct args *a, const char *name)
{
	for (unsigned i = 0; i < a->volumes_n; i++)
		if (strcmp(a->volumes[i].name, name) == 0)
			return &a->volumes[i];
	return NULL;
}

/* The chain that stands there now; NULL = it can't be read here, which the new program has judged. */
static struct spec *read_spec(const struct volume_arg *v)
{
	struct spec *spec = NULL;
	struct err err;

	if (spec_parse_words(v->driver, v->conn, &spec, &err))
		return NULL;
	if (spec_expand(&spec, &err) == 0)
		return spec;
	spec_free(spec);
	return NULL;
}

static bool is_same(const struct spec *a, const struct spec *b)
{
	_cleanup_free_ char *x = spec_format(a), *y = spec_format(b);

	return x && y && strcmp(x, y) == 0;
}

/* Has the export's name got another store? */
static bool is_other(const struct export *e, const struct spec *spec)
{
	_cleanup_free_ char *stores = spec && !export_has_identity(e) ? export_stores(spec) : NULL;

	return stores && strcmp(stores, e->stores) != 0;
}

/* Files of exports are read anew by the next program: who is connected must find the same volume there. */
static int check_exports(const struct args *a, struct err *err)
{
	for (struct export *e = export_first(); e; e = e->next) {
		const struct volume_arg *v = find_volume(a, e->name);
		struct spec *spec = v ? read_spec(v) : NULL;
		const bool is_lost = is_other(e, spec);

		e->comes_again = spec && is_same(e->spec, spec);
		spec_free(spec);
		if (atomic_load(&e->conns) == 0)
			continue;
		if (!v)
			return err_set(err, -EBUSY, "export '%.64s' has connections, and is not in the list of exports "
				       "any more: they would be cut; put it back, or end them first", e->name);
		if (is_lost)
			return err_set(err, -EBUSY, "export '%.64s' has connections, and the list of exports has "
				       "another store by that name: they would be cut; put it back, or end them first",
				       e->name);
	}
	return 0;
}

struct list_check {
	int argc;
	char *const *argv;
	bool is_first;
	struct err *err;
};

/* Of an offload thread: reads files. */
static int check_list(void *arg)
{
	static bool was_read; /* at first; one upgrade at a time */
	const struct list_check *l = arg;
	_cleanup_free_ char **argv = calloc((size_t)l->argc + 1, sizeof(*argv)); /* parsing sorts the words */
	struct args a;
	int code, rc = 0;
	bool is_read;

	if (!argv)
		return err_set(l->err, -ENOMEM, "out of memory");
	memcpy(argv, l->argv, (size_t)l->argc * sizeof(*argv));
	for (struct export *e = export_first(); e; e = e->next)
		e->comes_again = false;
	is_read = args_parse(l->argc, argv, &a, &code) == 0;
	/* What only the new program understands is its own business, unless it was asked about something else. */
	if (is_read)
		rc = check_exports(&a, l->err);
	else if (was_read && !l->is_first)
		rc = err_set(l->err, -EBUSY, "the list of exports has been changed meanwhile, and can't be read now: "
			     "`nbdrsd check` says why");
	was_read = is_read;
	args_free(&a);
	return rc;
}

/* --- Journals ----------------------------------------------------------------------------------- */

struct journal_info {
	struct info info; /* first: what `add` gets is this */
	bool is_used;
};

static void add_info(struct info *i, const char *key, const char *value)
{
	struct journal_info *j = (struct journal_info *)i;

	j->is_used |= strcmp(key, "journal_used") == 0 && strcmp(value, "0") != 0;
}

static bool has_option(const struct spec *s, const char *name)
{
	for (unsigned i = 0; i < s->args_n; i++)
		if (strcmp(s->args[i].key, name) == 0)
			return true;
	return false;
}

/*
 * Of a cache with a journal that outlives the process. In use it is also when all of it has been sent but not yet
 * cleared away: whoever opened it later would send it again, over what is newer.
 */
static void find_journal(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum)
{
	(void)depth;
	(void)sum;
	if (strcmp(l->ops->name, "cache") == 0 && has_option(l->spec, "disk"))
		l->ops->status(l, arg);
}

static int check_journals(struct err *err)
{
	for (const struct export *e = export_first(); e; e = e->next) {
		struct journal_info j = { .info.add = add_info };

		if (e->comes_again)
			continue;
		chain_each(e->chain, find_journal, &j);
		if (j.is_used)
			return err_set(err, -EBUSY, "export '%.64s' has writes in the journal of its cache, and the "
				       "list of exports has another chain by that name, which would not find them; put "
				       "the chain back, wait until `nbdrsctl status` shows journal_used 0, or restart "
				       "the daemon", e->name);
	}
	return 0;
}

CO_FN int upgrade_check_list(int argc, char *const *argv, bool is_first, struct err *err)
{
	struct list_check l = { argc, argv, is_first, err };
	int rc = offload(check_list, &l);

	return rc ? rc : check_journals(err);
}

/* --- Stores ------------------------------------------------------------------------------------- */

/* Answers from memory, or waits until the store is back; or else its kids know objects, and it does not. */
static bool hides_store(const struct layer *l)
{
	static const char *const names[] = { "cache", "readahead", "retry" };

	for (size_t i = 0; i < ARRAY_LEN(names); i++)
		if (strcmp(l->ops->name, names[i]) == 0)
			return true;
	return l->ops->keyed_kids;
}

/* Something small, of which only the error counts. */
static CO_FN int ask_store(struct layer *l)
{
	char byte;
	struct iovec v;
	const struct iov iov = iov_one(&v, &byte, 1);
	struct obj_stat st;
	struct chan *c;
	struct obj obj;
	int rc = layer_chan_open(l, &c);

	if (rc)
		return rc;
	(void)obj_set(&obj, "size"); /* a good name */
	if (l->is_keyed)
		rc = ch_stat(c, &obj, &st);
	else if (l->size)
		rc = ch_read(c, (struct ext){ &obj_none, 0, 1 }, &iov, 0);
	layer_chan_close(c);
	return rc == -ENOENT ? 0 : rc;
}

/* Of several stores one is enough: what the others are for is that some may be away. */
static CO_FN int ask_stores(struct layer *l)
{
	struct layer *store = l;
	int rc = 0;

	for (; l->kids_n == 1; l = l->kids[0])
		if (hides_store(l))
			store = l->kids[0];
	if (!l->kids_n)
		return ask_store(store);
	for (unsigned i = 0; i < l->kids_n; i++) {
		rc = atomic_load(&l->kids[i]->open_error);
		if (!rc)
			rc = ask_stores(l->kids[i]);
		if (!rc)
			break;
	}
	/* Who may not list is told "forbidden" for what is not there by some; which objects each has we don't know. */
	return rc == -EACCES || rc == -EPERM ? 0 : rc;
}

/* All exports, and those who ask for one after the other. */
struct asking {
	const struct export *next, *failed;
	int rc; /* of `failed` */
};

static CO_FN void ask_some(void *arg)
{
	struct asking *a = arg;

	while (a->next && !a->rc) {
		const struct export *e = a->next;
		int rc;

		a->next = e->next;
		rc = ask_stores(chain_top(e->chain));
		if (rc && !a->rc) {
			a->rc = rc;
			a->failed = e;
		}
	}
}

CO_FN int upgrade_check_stores(struct err *err)
{
	struct asking a = { .next = export_first() };
	struct co_group g = CO_GROUP_INIT;

	for (unsigned i = 0; i < ASKERS_MAX; i++)
		co_group_spawn(&g, ask_some, &a);
	co_group_wait(&g);
	if (!a.rc)
		return 0;
	return err_set(err, a.rc, "the store of export '%.64s' does not answer (%s), and would have to be opened; try "
		       "again when it does", a.failed->name, err_name(a.rc));
}
