/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The chain parser: recursive descent over the grammar in spec.h, one function per rule.
 *
 * It knows the shape only. Whether a layer exists and what options it takes is asked later (chain_build);
 * all it knows about layers is which take the rest as a target, and `distributed`, for which nbd-rs has a
 * form of its own:
 *
 *	distributed:replicas=2;backends=SPEC,SPEC;	is	distributed[replicas=2]{SPEC,SPEC}
 *
 * A target ends where the construct around it says so: nowhere at the outermost level ("file:/a,b" is one
 * file), at "," or "}" inside braces, at "," or ";" in a list of backends. Brackets and braces inside the
 * target are skipped in pairs; a target may be quoted like a value to hold anything.
 *
 * In `a{b,c}:d` the kids are d, b, c: what follows the colon is kid 0, where requests go by default.
 */
#include "nbdrs/spec.h"

#include <assert.h>
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "conf/spec_text.h"
#include "nbdrs/ascii.h"
#include "nbdrs/cleanup.h"

enum { NAME_MAX_LEN = 64, ARGS_MAX = 64 };

struct parser {
	const char *text;
	size_t at;
	struct err *err;
};

static int parse_spec(struct parser *p, const char *ends, unsigned depth, struct spec **out);

static __attribute__((format(printf, 3, 4))) int bad(struct parser *p, size_t at, const char *fmt,
						     ...)
{
	va_list ap;
	int rc;

	va_start(ap, fmt);
	rc = spec_text_error(p->err, p->text, at, fmt, ap);
	va_end(ap);
	return rc;
}

static int no_memory(struct parser *p)
{
	return err_set(p->err, -ENOMEM, "out of memory while reading a chain");
}

static char here(const struct parser *p)
{
	return p->text[p->at];
}

static unsigned column(const struct parser *p)
{
	return (unsigned)p->at + 1;
}

/* "wanted X, but there is Y". */
static int unexpected(struct parser *p, const char *wanted)
{
	unsigned char c = (unsigned char)here(p);

	if (!c)
		return bad(p, p->at, "%s is missing here", wanted);
	if (c < 0x20 || c >= 0x7f)
		return bad(p, p->at, "%s must stand here, not the byte 0x%02x", wanted, c);
	return bad(p, p->at, "%s must stand here, not '%c'", wanted, c);
}

/* Length of the name (of a layer or an option) at `text`. */
static size_t name_len(const char *text)
{
	size_t n = 0;

	while (ascii_is_alnum(text[n]) || (n && (text[n] == '_' || text[n] == '-')))
		n++;
	return n;
}

static int take_name(struct parser *p, const char *what, char **out)
{
	size_t len = name_len(p->text + p->at);

	if (!len)
		return unexpected(p, what);
	if (len > NAME_MAX_LEN)
		return bad(p, p->at, "%s is longer than %d characters", what, NAME_MAX_LEN);
	*out = strndup(p->text + p->at, len);
	if (!*out)
		return no_memory(p);
	p->at += len;
	return 0;
}

/* "..." with backslash escapes, at the opening quote. */
static int take_quoted(struct parser *p, char **out)
{
	size_t open = p->at, len = 0;
	char *s = malloc(strlen(p->text + open) + 1);

	if (!s)
		return no_memory(p);
	for (p->at++; here(p) != '"'; p->at++) {
		if (here(p) == '\\')
			p->at++;
		if (!here(p)) {
			free(s);
			return bad(p, open, "the quote is not closed");
		}
		s[len++] = here(p);
	}
	p->at++;
	s[len] = '\0';
	*out = s;
	return 0;
}

/* A value, quoted or up to one of `ends` or the end of the text. */
static int take_value(struct parser *p, const char *ends, char **out)
{
	size_t len;

	if (here(p) == '"')
		return take_quoted(p, out);
	len = strcspn(p->text + p->at, ends);
	*out = strndup(p->text + p->at, len);
	if (!*out)
		return no_memory(p);
	p->at += len;
	return 0;
}

/* Room for one more `key=value`, counted in at once so that spec_free sees it; NULL when full or no memory. */
static struct opt_arg *add_arg(struct spec *s)
{
	struct opt_arg *v;

	if (s->args_n == ARGS_MAX)
		return NULL;
	v = realloc(s->args, (s->args_n + 1) * sizeof(*v));
	if (!v)
		return NULL;
	s->args = v;
	v[s->args_n] = (struct opt_arg){ 0 };
	return &v[s->args_n++];
}

/* key [ "=" value ]; `ends` end a plain value. */
static int parse_arg(struct parser *p, struct spec *s, const char *ends)
{
	struct opt_arg *a;
	int rc;

	if (s->args_n == ARGS_MAX)
		return bad(p, p->at, "layer %s has more than %d options", s->layer, ARGS_MAX);
	a = add_arg(s);
	if (!a)
		return no_memory(p);
	a->column = column(p);
	rc = take_name(p, "an option's name", &a->key);
	if (rc)
		return rc;
	a->has_value = here(p) == '=';
	if (a->has_value) {
		p->at++;
		return take_value(p, ends, &a->value);
	}
	a->value = strdup("");
	return a->value ? 0 : no_memory(p);
}

/* "[" key=value { "," key=value } "]", at the bracket. */
static int parse_args(struct parser *p, struct spec *s)
{
	size_t open = p->at;
	int rc;

	do {
		p->at++;
		rc = parse_arg(p, s, ",]");
		if (rc)
			return rc;
	} while (here(p) == ',');
	if (!here(p))
		return bad(p, open, "the [ is not closed");
	if (here(p) != ']')
		return unexpected(p, "\",\" or \"]\"");
	p->at++;
	return 0;
}

/* Parses a spec and adds it to the kids of s, in front or at the end. */
static int parse_kid(struct parser *p, struct spec *s, const char *ends, unsigned depth,
		     bool in_front)
{
	struct spec *kid = NULL, **v;
	int rc;

	if (s->kids_n == SPEC_MAX_KIDS)
		return bad(p, p->at, "layer %s has more than %d layers below it", s->layer,
			   SPEC_MAX_KIDS);
	rc = parse_spec(p, ends, depth + 1, &kid);
	if (rc)
		return rc;
	v = realloc(s->kids, (s->kids_n + 1) * sizeof(struct spec *));
	if (!v) {
		spec_free(kid);
		return no_memory(p);
	}
	s->kids = v;
	if (in_front)
		memmove(v + 1, v, s->kids_n * sizeof(struct spec *));
	v[in_front ? 0 : s->kids_n] = kid;
	s->kids_n++;
	return 0;
}

/* "{" spec { "," spec } "}", at the brace. */
static int parse_braces(struct parser *p, struct spec *s, unsigned depth)
{
	size_t open = p->at;
	int rc;

	do {
		p->at++;
		rc = parse_kid(p, s, ",}", depth, false);
		if (rc)
			return rc;
	} while (here(p) == ',');
	if (!here(p))
		return bad(p, open, "the { is not closed (quote a target that has brackets in it)");
	if (here(p) != '}')
		return unexpected(p, "\",\" or \"}\"");
	p->at++;
	return 0;
}

static const char *target_example(const char *layer)
{
	if (strcmp(layer, "file") == 0)
		return "file:/srv/disk.img";
	if (strcmp(layer, "s3") == 0)
		return "s3:http://host:9000/bucket/";
	return "http://host/disk.img";
}

/* The target of a store: quoted, or verbatim up to one of `ends` outside of brackets. */
static int parse_target(struct parser *p, struct spec *s, const char *ends)
{
	size_t from = p->at;
	unsigned open = 0;

	if (here(p) == '"')
		return take_quoted(p, &s->target);
	for (; here(p) && *ends; p->at++) {
		char c = here(p);

		if (!open && strchr(ends, c))
			break;
		if (c == '[' || c == '{')
			open++;
		else if (open && (c == ']' || c == '}'))
			open--;
	}
	if (!*ends)
		p->at += strlen(p->text + p->at);
	if (p->at == from)
		return bad(p, from, "%s needs a target, such as %s", s->layer,
			   target_example(s->layer));
	s->target = strndup(p->text + from, p->at - from);
	return s->target ? 0 : no_memory(p);
}

/* nbd-rs's form: key=value { ";" key=value } [";"], where backends=SPEC,SPEC are the kids. */
static int parse_list(struct parser *p, struct spec *s, const char *ends, unsigned depth)
{
	static const char backends[] = "backends=";
	const char *list_ends = strchr(ends, '}') ? ",;}" : ",;";
	size_t from = p->at;
	int rc;

	for (;;) {
		if (strncmp(p->text + p->at, backends, strlen(backends)) == 0) {
			if (s->kids_n)
				return bad(p, p->at, "\"backends\" is given twice");
			p->at += strlen(backends) - 1;
			do {
				p->at++;
				rc = parse_kid(p, s, list_ends, depth, false);
			} while (!rc && here(p) == ',');
		} else {
			rc = parse_arg(p, s, list_ends);
		}
		if (rc)
			return rc;
		if (here(p) != ';')
			break;
		p->at++;
		if (!name_len(p->text + p->at))
			break;
	}
	if (!s->kids_n)
		return bad(p, from, "%s has no \"backends=\"", s->layer);
	return 0;
}

static bool takes_target(const char *layer)
{
	static const char *const stores[] = { "file", "s3", "http", "https" };

	for (unsigned i = 0; i < ARRAY_LEN(stores); i++) {
		if (strcmp(layer, stores[i]) == 0)
			return true;
	}
	return false;
}

static bool is_list(const struct parser *p, const char *layer)
{
	size_t len = name_len(p->text + p->at);

	return strcmp(layer, "distributed") == 0 && len && p->text[p->at + len] == '=';
}

/* What follows the name: options, kids, and the rest after a colon. */
static int parse_parts(struct parser *p, struct spec *s, const char *ends, unsigned depth)
{
	size_t start = p->at;
	bool is_store = takes_target(s->layer);
	int rc = 0;

	if (here(p) == '[')
		rc = parse_args(p, s);
	if (!rc && here(p) == '{') {
		if (is_store)
			return bad(p, p->at, "%s is a store: no layers can stand below it",
				   s->layer);
		rc = parse_braces(p, s, depth);
	}
	if (rc)
		return rc;
	if (here(p) != ':') {
		if (is_store)
			return bad(p, start, "%s needs a target, such as %s", s->layer,
				   target_example(s->layer));
		return 0;
	}
	p->at++;
	if (is_store)
		return parse_target(p, s, ends);
	if (is_list(p, s->layer))
		return parse_list(p, s, ends, depth);
	return parse_kid(p, s, ends, depth, true);
}

/* Recursion is bounded by SPEC_MAX_DEPTH. */
static int parse_spec(struct parser *p, const char *ends, unsigned depth, struct spec **out)
{
	struct spec *s;
	int rc;

	if (depth > SPEC_MAX_DEPTH)
		return bad(p, p->at, "more than %d layers on top of each other", SPEC_MAX_DEPTH);
	if (here(p) == '/')
		return bad(p, p->at, "a layer must stand here; for a file write file:/path");
	s = calloc(1, sizeof(*s));
	if (!s)
		return no_memory(p);
	s->column = column(p);
	rc = take_name(p, "a layer's name", &s->layer);
	if (!rc) {
		assert(s->layer); /* no name is a failure */
		rc = parse_parts(p, s, ends, depth);
	}
	if (rc) {
		spec_free(s);
		return rc;
	}
	*out = s;
	return 0;
}

int spec_parse(const char *text, struct spec **out, struct err *err)
{
	struct parser p = { .text = text, .err = err };
	struct spec *s = NULL;
	int rc;

	if (strlen(text) > SPEC_MAX_LEN)
		return err_set(err, -EINVAL,
			       "column %d: a chain may be %d bytes long, this one has %zu",
			       SPEC_MAX_LEN + 1, SPEC_MAX_LEN, strlen(text));
	rc = parse_spec(&p, "", 1, &s);
	if (rc)
		return rc;
	if (here(&p)) {
		spec_free(s);
		return unexpected(&p, "\":\" or the end");
	}
	*out = s;
	return 0;
}

int spec_parse_words(const char *driver, const char *conn, struct spec **out, struct err *err)
{
	_cleanup_free_ char *text = NULL;

	if (!conn)
		return spec_parse(driver, out, err);
	if (asprintf(&text, "%s:%s", driver, conn) < 0) {
		text = NULL; /* undefined after a failure */
		return err_set(err, -ENOMEM, "out of memory while reading a chain");
	}
	return spec_parse(text, out, err);
}

void spec_free(struct spec *s)
{
	if (!s)
		return;
	for (unsigned i = 0; i < s->args_n; i++) {
		free(s->args[i].key);
		free(s->args[i].value);
	}
	for (unsigned i = 0; i < s->kids_n; i++)
		spec_free(s->kids[i]);
	free(s->args);
	free(s->kids);
	free(s->target);
	free(s->layer);
	free(s);
}
