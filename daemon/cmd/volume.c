/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * `init`, `destroy`, `check`, `info`: one-off work on volumes. Layers need a reactor to run on, so one
 * is started for the time it takes; nothing is served.
 */
#include "cmd/cmd.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "conf/secret.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/export.h"
#include "nbdrs/identity.h"
#include "nbdrs/progress.h"

enum { MAP_EXTENTS = 512 };

static void free_specp(struct spec **s)
{
	spec_free(*s);
}

static void free_chainp(struct chain **c)
{
	chain_free(*c);
}

#define _cleanup_spec_ _cleanup_(free_specp)
#define _cleanup_chain_ _cleanup_(free_chainp)

/* --- Parsing ------------------------------------------------------------------------------------ */

/* Overwrites a word of the command line by its masked form, in place: `ps` reads that memory. */
static void mask_word(char *word)
{
	const size_t len = strlen(word);
	_cleanup_free_ char *masked = NULL;
	size_t at = 0;

	masked = secret_mask_text(word, &at);
	if (masked && strcmp(masked, word) == 0)
		return;
	/* In doubt (no memory) all of it goes. The last byte is there already: a NUL. */
	if (masked)
		(void)strncpy(word, masked, len); /* pads with NUL, which ps shows as nothing */
	else
		memset(word, '*', len);
}

static int parse_one(const struct volume_arg *v, bool read_only, struct spec **spec, struct chain **chain,
		     struct err *err)
{
	_cleanup_spec_ struct spec *parsed = NULL;
	_cleanup_chain_ struct chain *built = NULL;
	int rc;

	if (v->name) {
		rc = export_check_name(v->name, err);
		if (rc)
			return rc;
	}
	rc = spec_parse_words(v->driver, v->conn, &parsed, err);
	if (!rc)
		rc = spec_expand(&parsed, err);
	if (!rc)
		rc = chain_build(parsed, v->name, read_only, &built, err);
	mask_word(v->driver);
	mask_word(v->conn);
	if (rc)
		return v->name ? err_prefix(err, rc, "export %s", v->name) : rc;
	*spec = TAKE_PTR(parsed);
	if (chain)
		*chain = TAKE_PTR(built);
	return 0;
}

int volume_parse(const struct volume_arg *v, bool read_only, struct spec **spec, struct chain **chain,
		 struct err *err)
{
	int rc = parse_one(v, read_only, spec, chain, err);

	return rc && v->file ? err_prefix(err, rc, "%s:%u", v->file, v->line) : rc;
}

/* --- Running on a reactor ----------------------------------------------------------------------- */

/* A command's volume; passed through the reactor. */
struct job {
	const struct args *a;
	struct spec *spec;
	struct chain *chain; /* built, not open */
	char *text;	     /* the chain, masked */
	struct err err;
};

static void job_done(struct job *job)
{
	chain_free(job->chain);
	spec_free(job->spec);
	free(job->text);
}

#define _cleanup_job_ _cleanup_(job_done)

/* Parses volume `i` of the command line. CMD_OK, or an exit code after the complaint. */
static int job_prepare(struct job *job, const struct args *a, unsigned i, bool read_only)
{
	*job = (struct job){ .a = a };
	if (volume_parse(&a->volumes[i], read_only, &job->spec, &job->chain, &job->err)) {
		cmd_complain("%s", job->err.msg);
		return CMD_USAGE;
	}
	job->text = spec_format(job->spec);
	if (!job->text) {
		cmd_complain("out of memory");
		return CMD_FAILED;
	}
	return CMD_OK;
}

/* Runs `fn` in a fiber of a reactor started for it. An exit code; complains. */
static int job_run(struct job *job, CO_FN int (*fn)(void *job))
{
	const struct reactor_conf conf = { .threads = 1, .engine = job->a->reactor.engine };
	int rc = reactors_start(&conf, &job->err);

	if (!rc) {
		progress_allow();
		rc = reactor_call_blocking(reactor_get(0), fn, job);
		progress_end();
		reactors_stop();
	}
	if (!rc)
		return CMD_OK;
	cmd_complain("%s: %s", job->a->command, *job->err.msg ? job->err.msg : strerror(-rc));
	return CMD_FAILED;
}

static const char *size_text(uint64_t bytes)
{
	static char text[32];

	format_size(bytes, text, sizeof(text));
	return text;
}

/* --- init and destroy --------------------------------------------------------------------------- */

static CO_FN int init_run(void *arg)
{
	struct job *job = arg;

	int rc = chain_create(job->chain, job->a->size, job->a->force, &job->err);

	return rc ? rc : identity_make(job->chain, job->a->force, &job->err);
}

int cmd_init(const struct args *a)
{
	_cleanup_job_ struct job job;
	int code = job_prepare(&job, a, 0, false);

	if (code == CMD_OK)
		code = job_run(&job, init_run);
	if (code == CMD_OK)
		printf("%s: %s (%llu bytes)\n", job.text, size_text(a->size),
		       (unsigned long long)a->size);
	if (code == CMD_OK && a->size % 512)
		cmd_complain("note: the size is not a multiple of 512 bytes; a kernel device leaves out "
			     "the last %u",
			     (unsigned)(a->size % 512));
	return code;
}

static CO_FN int destroy_run(void *arg)
{
	struct job *job = arg;
	char was[IDENTITY_LEN + 1];
	struct err ignored = { "" };
	int rc = identity_remove(job->chain, was, &job->err);

	if (rc)
		return rc;
	rc = chain_destroy(job->chain, &job->err);
	if (rc) /* what can't be put back is known to nobody, and the first error counts */
		(void)identity_put_back(job->chain, was, &ignored);
	return rc;
}

static int confirm_destroy(const struct job *job)
{
	char line[16];

	if (job->a->force)
		return CMD_OK;
	if (!isatty(STDIN_FILENO)) {
		cmd_complain("destroy removes %s and all its data; without a terminal to ask on it needs "
			     "--force",
			     job->text);
		return CMD_USAGE;
	}
	fprintf(stderr, "Remove %s and all its data? Type yes: ", job->text);
	if (fgets(line, sizeof(line), stdin) && strcmp(line, "yes\n") == 0)
		return CMD_OK;
	cmd_complain("nothing was removed");
	return CMD_FAILED;
}

int cmd_destroy(const struct args *a)
{
	_cleanup_job_ struct job job;
	int code = job_prepare(&job, a, 0, false);

	if (code == CMD_OK)
		code = confirm_destroy(&job);
	if (code == CMD_OK)
		code = job_run(&job, destroy_run);
	if (code == CMD_OK)
		printf("removed %s\n", job.text);
	return code;
}

/* --- check and info ----------------------------------------------------------------------------- */

static CO_FN int check_open(void *arg)
{
	struct job *job = arg;
	int rc = chain_open(job->chain, &job->err);

	if (rc)
		return rc;
	printf(" %s", size_text(chain_top(job->chain)->size));
	return chain_close(job->chain);
}

static int check_one(const struct args *a, unsigned i)
{
	_cleanup_job_ struct job job;
	int code = job_prepare(&job, a, i, true);

	if (code != CMD_OK)
		return code;
	printf("%s%s%s", a->volumes[i].name ? a->volumes[i].name : "", a->volumes[i].name ? ": " : "",
	       job.text);
	(void)fflush(stdout); /* before a complaint on stderr */
	if (a->open)
		code = job_run(&job, check_open);
	printf("\n");
	return code;
}

/* Looks at all of them; the code of the first that failed. */
int cmd_check(const struct args *a)
{
	int code = CMD_OK;

	for (unsigned i = 0; i < a->volumes_n; i++) {
		int one = check_one(a, i);

		if (code == CMD_OK)
			code = one;
	}
	return code;
}

struct info_printer {
	struct info base;
	unsigned depth;
};

static void print_line(struct info *i, const char *key, const char *value)
{
	const struct info_printer *p = container_of(i, struct info_printer, base);

	printf("  %*s%-*s %s\n", (int)(2 * p->depth), "", (int)(14 - MIN(2 * p->depth, 12U)), key, value);
}

static CO_FN void print_layers(struct layer *l, unsigned depth)
{
	struct info_printer p = { .base = { .add = print_line }, .depth = depth + 1 };

	printf("  %*s%s\n", (int)(2 * depth), "", l->ops->name);
	if (l->ops->info)
		l->ops->info(l, &p.base);
	for (unsigned i = 0; i < l->kids_n; i++)
		print_layers(l->kids[i], depth + 1);
}

static void print_caps(const struct layer *top)
{
	static const struct {
		unsigned bit;
		const char *name;
	} names[] = {
		{ CAN_WRITE, "write" },		{ CAN_PARTIAL, "partial" }, { CAN_TRIM, "trim" },
		{ CAN_ZERO, "zero" },		{ CAN_FAST_ZERO, "fast-zero" }, { CAN_FUA, "fua" },
		{ CAN_FLUSH, "flush" },		{ CAN_MULTI, "multi-conn" }, { CAN_MAP, "map" },
		{ CAN_LEND, "lend" },		{ IS_ROTATIONAL, "rotational" },
	};

	printf("capabilities ");
	for (size_t i = 0; i < ARRAY_LEN(names); i++)
		if (top->caps & names[i].bit)
			printf(" %s", names[i].name);
	printf("\n");
}

/* Bytes that are not holes, by walking the map; -errno. */
static CO_FN int count_allocated(struct chain *chain, uint64_t *allocated)
{
	_cleanup_free_ struct extent *extents = calloc(MAP_EXTENTS, sizeof(*extents));
	const uint64_t size = chain_top(chain)->size;
	uint64_t off = 0, sum = 0;
	struct chan *c;
	int rc = 0;

	if (!extents)
		return -ENOMEM;
	c = chain_chan(chain, &rc);
	if (!c)
		return rc;
	while (off < size) {
		struct extmap m = { .v = extents, .max = MAP_EXTENTS };

		rc = ch_map(c, (struct ext){ &obj_none, off, size - off }, &m);
		if (rc)
			return rc;
		for (unsigned i = 0; i < m.n; i++) {
			sum += extents[i].flags & EXTENT_HOLE ? 0 : extents[i].len;
			off += extents[i].len;
		}
		if (m.n == 0)
			return -EIO; /* would never end: at least one extent is the rule */
	}
	*allocated = sum;
	return 0;
}

static CO_FN int info_run(void *arg)
{
	struct job *job = arg;
	const struct layer *top = chain_top(job->chain);
	uint64_t allocated = 0;
	int rc = chain_open(job->chain, &job->err);

	if (rc)
		return rc;
	printf("chain         %s\n", job->text);
	printf("size          %s (%llu bytes)\n", size_text(top->size), (unsigned long long)top->size);
	if (top->caps & CAN_MAP) {
		rc = count_allocated(job->chain, &allocated);
		if (!rc)
			printf("allocated     %s (%llu bytes)\n", size_text(allocated),
			       (unsigned long long)allocated);
	}
	print_caps(top);
	printf("requests      at least %u, best %u, at most %u bytes\n", top->min_io, top->pref_io,
	       top->max_io);
	printf("layers\n");
	print_layers(chain_top(job->chain), 0);
	if (rc)
		(void)err_set(&job->err, rc, "cannot map what is allocated: %s", strerror(-rc));
	(void)chain_close(job->chain); /* read-only: there is nothing to flush */
	return rc;
}

int cmd_info(const struct args *a)
{
	_cleanup_job_ struct job job;
	int code = job_prepare(&job, a, 0, true);

	return code == CMD_OK ? job_run(&job, info_run) : code;
}
