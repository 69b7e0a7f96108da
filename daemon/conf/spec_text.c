/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Chains as text: the canonical form, the excerpt in errors, and names in percent encoding.
 */
#include "conf/spec_text.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "conf/secret.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/spec.h"

/* --- Errors ----------------------------------------------------------------------------------- */

enum { EXCERPT_BEFORE = 56, EXCERPT_LEN = 84, CONTINUATIONS_MAX = 3 };

/* UTF-8: bytes after the first of a character take no column of their own. */
static bool is_continuation(char c)
{
	return ((unsigned char)c & 0xc0) == 0x80;
}

/* The part of `text` to show: at most EXCERPT_LEN bytes around `at`, whole characters. */
static void excerpt_range(const char *text, size_t at, size_t *from, size_t *to)
{
	size_t len = strlen(text);

	*from = 0;
	*to = len;
	if (len <= EXCERPT_LEN)
		return;
	if (at > EXCERPT_BEFORE)
		*from = at - EXCERPT_BEFORE;
	if (len - *from > EXCERPT_LEN)
		*to = *from + EXCERPT_LEN;
	/* Three is the most that a character of UTF-8 has; other bytes may be anything. */
	for (unsigned i = 0; i < CONTINUATIONS_MAX && *from < at && is_continuation(text[*from]);
	     i++)
		(*from)++;
	for (unsigned i = 0; i < CONTINUATIONS_MAX && *to < len && is_continuation(text[*to]); i++)
		(*to)++;
}

int spec_text_error(struct err *err, const char *text, size_t at, const char *fmt, va_list ap)
{
	_cleanup_free_ char *masked = NULL;
	char message[256], line[EXCERPT_LEN + CONTINUATIONS_MAX + 1];
	size_t shown_at = at, from, to, line_len = 0, caret;

	(void)vsnprintf(message, sizeof(message), fmt,
			ap); /* cut short when too long: bounded input */
	masked = secret_mask_text(text, &shown_at);
	if (!masked)
		return err_set(err, -EINVAL, "column %zu: %s", at + 1, message);
	excerpt_range(masked, shown_at, &from, &to);
	caret = from ? 3 : 0;
	for (size_t i = from; i < to; i++) {
		unsigned char c = (unsigned char)masked[i];

		line[line_len++] = c < 0x20 || c == 0x7f ? '?' : (char)c;
		caret += i < shown_at && !is_continuation(masked[i]);
	}
	line[line_len] = '\0';
	return err_set(err, -EINVAL, "column %zu: %s\n  %s%s%s\n  %*s^", at + 1, message,
		       from ? "..." : "", line, masked[to] ? "..." : "", (int)caret, "");
}

/* --- The canonical form ----------------------------------------------------------------------- */

static void write_quoted(FILE *out, const char *text)
{
	fputc('"', out);
	for (; *text; text++) {
		if (*text == '"' || *text == '\\')
			fputc('\\', out);
		fputc(*text, out);
	}
	fputc('"', out);
}

static bool is_value_plain(const char *value)
{
	return value[0] != '"' && !strpbrk(value, ",;[]{}");
}

/* A plain target may stand anywhere: no terminator in it, brackets in pairs (IPv6 addresses). */
static bool is_target_plain(const char *target)
{
	unsigned open = 0;

	if (target[0] == '"' || strpbrk(target, ",;{}"))
		return false;
	for (; *target; target++) {
		if (*target == '[')
			open++;
		else if (*target == ']' && open-- == 0)
			return false;
	}
	return open == 0;
}

static void write_arg(FILE *out, const struct opt_arg *a)
{
	fputs(a->key, out);
	if (!a->has_value)
		return;
	fputc('=', out);
	if (secret_is_key(a->key, strlen(a->key)))
		fputs(SECRET_MASK, out);
	else if (is_value_plain(a->value))
		fputs(a->value, out);
	else
		write_quoted(out, a->value);
}

static bool write_target(FILE *out, const struct spec *s)
{
	_cleanup_free_ char *masked = secret_mask_target(s->layer, s->target);

	if (!masked)
		return false;
	fputc(':', out);
	if (is_target_plain(masked))
		fputs(masked, out);
	else
		write_quoted(out, masked);
	return true;
}

/* Recursion is bounded by SPEC_MAX_DEPTH. */
static bool write_spec(FILE *out, const struct spec *s)
{
	fputs(s->layer, out);
	for (unsigned i = 0; i < s->args_n; i++) {
		fputc(i ? ',' : '[', out);
		write_arg(out, &s->args[i]);
	}
	if (s->args_n)
		fputc(']', out);
	if (s->target)
		return write_target(out, s);
	for (unsigned i = 0; i < s->kids_n; i++) {
		fputc(i ? ',' : s->kids_n > 1 ? '{' : ':', out);
		if (!write_spec(out, s->kids[i]))
			return false;
	}
	if (s->kids_n > 1)
		fputc('}', out);
	return true;
}

char *spec_format(const struct spec *s)
{
	char *text = NULL;
	size_t len = 0;
	FILE *out = open_memstream(&text, &len);
	bool is_good;

	if (!out)
		return NULL;
	is_good = write_spec(out, s) && !ferror(out);
	if (fclose(out) != 0 || !is_good) {
		free(text);
		return NULL;
	}
	return text;
}

/* --- Names ------------------------------------------------------------------------------------ */

static bool is_unreserved(char c)
{
	return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
	       c == '.' || c == '_' || c == '-';
}

char *percent_encode(const char *text)
{
	static const char hex[] = "0123456789ABCDEF";
	char *out = malloc(strlen(text) * 3 + 1), *p = out;

	if (!out)
		return NULL;
	for (; *text; text++) {
		unsigned char c = (unsigned char)*text;

		if (is_unreserved(*text)) {
			*p++ = *text;
		} else {
			*p++ = '%';
			*p++ = hex[c >> 4];
			*p++ = hex[c & 15];
		}
	}
	*p = '\0';
	return out;
}
