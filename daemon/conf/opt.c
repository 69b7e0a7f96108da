/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Option tables, and the numbers with units that stand in them. Parsers are pure.
 */
#include "nbdrs/opt.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "conf/secret.h"
#include "nbdrs/ascii.h"
#include "nbdrs/cleanup.h"

enum { PPM_PER_PERCENT = 10000 };

/* At most 18 digits behind the point. */
#define FRACTION_DEN_MAX UINT64_C(1000000000000000000)

/* --- Numbers ---------------------------------------------------------------------------------- */

/* Reads digits at *text and moves behind them. -EINVAL without a digit, -ERANGE over 64 bits. */
static int take_digits(const char **text, uint64_t *value)
{
	const char *p = *text;
	uint64_t v = 0;

	if (!ascii_is_digit(*p))
		return -EINVAL;
	for (; ascii_is_digit(*p); p++) {
		if (__builtin_mul_overflow(v, 10U, &v) ||
		    __builtin_add_overflow(v, (uint64_t)(*p - '0'), &v))
			return -ERANGE;
	}
	*text = p;
	*value = v;
	return 0;
}

/* "12", "1.5": the number as it stood, before the unit. */
struct decimal {
	uint64_t whole, num, den; /* whole + num / den */
};

static int take_decimal(const char **text, struct decimal *d)
{
	int rc = take_digits(text, &d->whole);
	const char *p = *text;

	d->num = 0;
	d->den = 1;
	if (rc || *p != '.')
		return rc;
	for (p++; ascii_is_digit(*p); p++) {
		if (d->den == FRACTION_DEN_MAX)
			return -EINVAL;
		d->num = d->num * 10 + (uint64_t)(*p - '0');
		d->den *= 10;
	}
	*text = p;
	return d->den > 1 ? 0 : -EINVAL;
}

/* The number times `factor`; -EINVAL when that is not whole. */
static int scale(const struct decimal *d, uint64_t factor, uint64_t *out)
{
	unsigned __int128 part = (unsigned __int128)d->num * factor;
	uint64_t v;

	if (part % d->den)
		return -EINVAL;
	if (__builtin_mul_overflow(d->whole, factor, &v) ||
	    __builtin_add_overflow(v, (uint64_t)(part / d->den), &v))
		return -ERANGE;
	*out = v;
	return 0;
}

int parse_size(const char *text, uint64_t *bytes)
{
	static const char prefixes[] = "KkMmGgTtPpEe";
	struct decimal d;
	const char *prefix;
	unsigned shift = 0;
	int rc = take_decimal(&text, &d);

	if (rc)
		return rc;
	prefix = *text ? strchr(prefixes, *text) : NULL;
	if (prefix) {
		shift = 10 * ((unsigned)(prefix - prefixes) / 2 + 1);
		text++;
	}
	/* "KB" is an error on purpose: 1000 to some, 1024 to others. */
	if (strcmp(text, prefix ? "i" : "B") != 0 && strcmp(text, prefix ? "iB" : "") != 0 && *text)
		return -EINVAL;
	return scale(&d, UINT64_C(1) << shift, bytes);
}

int parse_time_ns(const char *text, uint64_t *ns)
{
	static const struct {
		const char *name;
		uint64_t factor;
	} units[] = {
		{ "", UINT64_C(1000000000) },
		{ "s", UINT64_C(1000000000) },
		{ "ms", UINT64_C(1000000) },
		{ "us", UINT64_C(1000) },
		{ "ns", UINT64_C(1) },
		{ "m", UINT64_C(60000000000) },
		{ "min", UINT64_C(60000000000) },
		{ "h", UINT64_C(3600000000000) },
	};
	struct decimal d;
	int rc = take_decimal(&text, &d);

	if (rc)
		return rc;
	for (unsigned i = 0; i < ARRAY_LEN(units); i++) {
		if (strcmp(units[i].name, text) == 0)
			return scale(&d, units[i].factor, ns);
	}
	return -EINVAL;
}

/* "5%", "0.1%" -> parts per million, at most all of them. */
static int parse_percent(const char *text, uint64_t *ppm)
{
	struct decimal d;
	int rc = take_decimal(&text, &d);

	if (rc)
		return rc;
	if (strcmp(text, "%") != 0)
		return -EINVAL;
	if (d.whole > 100 || (d.whole == 100 && d.num))
		return -ERANGE;
	return scale(&d, PPM_PER_PERCENT, ppm);
}

int parse_u64(const char *text, uint64_t *value)
{
	uint64_t v;
	int rc = take_digits(&text, &v);

	if (rc)
		return rc;
	if (*text)
		return -EINVAL;
	*value = v;
	return 0;
}

void format_size(uint64_t bytes, char *out, size_t out_len)
{
	static const char *const names[] = { "B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB" };
	unsigned i = 0, hundredths;
	uint64_t below;

	while (i + 1 < ARRAY_LEN(names) && bytes >> (10 * (i + 1)))
		i++;
	below = i ? bytes & ((UINT64_C(1) << (10 * i)) - 1) : 0;
	/* 60 bits by 100 is too much for 64; the bits dropped are far below a hundredth. */
	hundredths = i > 4 ? (unsigned)((below >> 20) * 100 >> (10 * i - 20))
			   : (unsigned)(below * 100 >> (10 * i));
	bytes >>= 10 * i;
	if (hundredths % 10)
		(void)snprintf(out, out_len, "%" PRIu64 ".%02u%s", bytes, hundredths, names[i]);
	else if (hundredths)
		(void)snprintf(out, out_len, "%" PRIu64 ".%u%s", bytes, hundredths / 10, names[i]);
	else
		(void)snprintf(out, out_len, "%" PRIu64 "%s", bytes, names[i]);
}

/* --- Tables ----------------------------------------------------------------------------------- */

/* What a field of this type holds, for help and errors. */
static const char *type_name(const struct opt *o)
{
	switch (o->type) {
	case OPT_BOOL: return "on|off";
	case OPT_UINT: return "N";
	case OPT_SIZE: return "SIZE";
	case OPT_TIME_NS: return "TIME";
	case OPT_PERCENT: return "PERCENT";
	case OPT_ENUM: return o->choices;
	case OPT_STR: return "TEXT";
	}
	return "?";
}

static const char *type_hint(const struct opt *o)
{
	switch (o->type) {
	case OPT_BOOL: return "must be on or off";
	case OPT_UINT: return "must be a number";
	case OPT_SIZE: return "must be a size: 512, 64Ki, 4MiB, 10G";
	case OPT_TIME_NS: return "must be a time: 20us, 100ms, 5s";
	case OPT_PERCENT: return "must be a percentage: 5%, 0.1%";
	case OPT_ENUM: return "must be one of";
	case OPT_STR: return "must be a text";
	}
	return "?";
}

static const struct opt *find(const struct opt *opts, const char *name)
{
	for (const struct opt *o = opts; o && o->name; o++) {
		if (strcmp(o->name, name) == 0)
			return o;
	}
	return NULL;
}

static int parse_bool(const char *text, bool *out)
{
	static const char *const on[] = { "on", "yes", "true", "1" };
	static const char *const off[] = { "off", "no", "false", "0" };

	for (unsigned i = 0; i < ARRAY_LEN(on); i++) {
		if (strcmp(text, on[i]) == 0 || strcmp(text, off[i]) == 0) {
			*out = strcmp(text, on[i]) == 0;
			return 0;
		}
	}
	return -EINVAL;
}

/* The index of `text` in "a|b|c". */
static int parse_choice(const char *choices, const char *text, unsigned *out)
{
	size_t text_len = strlen(text);

	for (unsigned i = 0;; i++) {
		size_t len = strcspn(choices, "|");

		if (len == text_len && memcmp(choices, text, len) == 0) {
			*out = i;
			return 0;
		}
		if (!choices[len])
			return -EINVAL;
		choices += len + 1;
	}
}

/* Parses `text` into the field. -EINVAL (not of the type), -ERANGE, -ENOMEM. */
static int set_field(const struct opt *o, void *self, const char *text)
{
	void *field = (char *)self + o->field;
	uint64_t v = 0;
	char *copy;
	int rc = -EINVAL;

	switch (o->type) {
	case OPT_BOOL: return parse_bool(text, field);
	case OPT_ENUM: return parse_choice(o->choices, text, field);
	case OPT_STR:
		copy = strdup(text);
		if (!copy)
			return -ENOMEM;
		free(*(char **)field);
		*(char **)field = copy;
		return 0;
	case OPT_UINT: rc = parse_u64(text, &v); break;
	case OPT_SIZE: rc = parse_size(text, &v); break;
	case OPT_TIME_NS: rc = parse_time_ns(text, &v); break;
	case OPT_PERCENT: rc = parse_percent(text, &v); break;
	}
	if (rc)
		return rc;
	if (v < o->min || (o->max && v > o->max))
		return -ERANGE;
	*(uint64_t *)field = v;
	return 0;
}

static void clear_field(const struct opt *o, void *self)
{
	void *field = (char *)self + o->field;

	switch (o->type) {
	case OPT_BOOL: *(bool *)field = false; break;
	case OPT_ENUM: *(unsigned *)field = 0; break;
	case OPT_STR: *(char **)field = NULL; break;
	case OPT_UINT:
	case OPT_SIZE:
	case OPT_TIME_NS:
	case OPT_PERCENT: *(uint64_t *)field = 0; break;
	}
}

/* A number of the option's type as the user would write it. */
static void format_number(const struct opt *o, uint64_t v, char *out, size_t out_len)
{
	static const struct {
		const char *name;
		uint64_t factor;
	} times[] = { { "s", 1000000000 }, { "ms", 1000000 }, { "us", 1000 }, { "ns", 1 } };
	unsigned i = 0;

	switch (o->type) {
	case OPT_SIZE: format_size(v, out, out_len); return;
	case OPT_TIME_NS:
		while (v % times[i].factor)
			i++;
		(void)snprintf(out, out_len, "%" PRIu64 "%s", v / times[i].factor, times[i].name);
		return;
	case OPT_PERCENT: (void)snprintf(out, out_len, "%g%%", (double)v / PPM_PER_PERCENT); return;
	default: (void)snprintf(out, out_len, "%" PRIu64, v);
	}
}

static void format_range(const struct opt *o, char *out, size_t out_len)
{
	char min[32], max[32];

	format_number(o, o->min, min, sizeof(min));
	if (o->max)
		format_number(o, o->max, max, sizeof(max));
	else if (o->type == OPT_PERCENT)
		(void)snprintf(max, sizeof(max), "100%%");
	else
		max[0] = '\0';
	(void)snprintf(out, out_len, "%s..%s", min, max);
}

static int bad_value(const struct opt *o, const struct opt_arg *a, const char *what, int rc,
		     struct err *err)
{
	const char *shown = secret_is_key(a->key, strlen(a->key)) ? SECRET_MASK : a->value;
	char range[80];

	if (rc == -ENOMEM)
		return err_set(err, rc, "%s: out of memory", what);
	if (rc == -ERANGE) {
		format_range(o, range, sizeof(range));
		return err_set(err, -EINVAL,
			       "%s: option \"%s\" (column %u): \"%s\" is out of range %s", what,
			       a->key, a->column, shown, range);
	}
	return err_set(err, -EINVAL, "%s: option \"%s\" (column %u): \"%s\" %s%s%s", what, a->key,
		       a->column, shown, type_hint(o), o->type == OPT_ENUM ? " " : "",
		       o->type == OPT_ENUM ? o->choices : "");
}

/* "a, b, c" of a table; cut short silently when it does not fit, it is only a hint. */
static void list_names(const struct opt *opts, char *out, size_t out_len)
{
	size_t at = 0;

	out[0] = '\0';
	for (const struct opt *o = opts; o && o->name && at < out_len; o++) {
		int n = snprintf(out + at, out_len - at, "%s%s", at ? ", " : "", o->name);

		at += (size_t)n;
	}
}

static int unknown_key(const struct opt *opts, const struct opt_arg *a, const char *what,
		       struct err *err)
{
	char names[256];

	if (!opts || !opts->name)
		return err_set(err, -EINVAL, "%s: option \"%s\" (column %u): it takes no options",
			       what, a->key, a->column);
	list_names(opts, names, sizeof(names));
	return err_set(err, -EINVAL, "%s: unknown option \"%s\" (column %u); it knows: %s", what,
		       a->key, a->column, names);
}

static int set_one(const struct opt *opts, void *self, const struct opt_arg *args, unsigned i,
		   const char *what, struct err *err)
{
	const struct opt_arg *a = &args[i];
	const struct opt *o = find(opts, a->key);
	int rc;

	if (!o)
		return unknown_key(opts, a, what, err);
	for (unsigned j = 0; j < i; j++) {
		if (strcmp(args[j].key, a->key) == 0)
			return err_set(err, -EINVAL,
				       "%s: option \"%s\" is given twice (columns %u and %u)", what,
				       a->key, args[j].column, a->column);
	}
	if (!a->has_value && o->type != OPT_BOOL)
		return err_set(err, -EINVAL, "%s: option \"%s\" (column %u) needs a value: %s=%s",
			       what, a->key, a->column, a->key, type_name(o));
	rc = set_field(o, self, a->has_value ? a->value : "on");
	return rc ? bad_value(o, a, what, rc, err) : 0;
}

int opts_parse(const struct opt *opts, void *self, const struct opt_arg *args, unsigned n,
	       const char *what, struct err *err)
{
	int rc = 0;

	for (const struct opt *o = opts; o && o->name; o++)
		clear_field(o, self);
	for (const struct opt *o = opts; o && o->name && !rc; o++) {
		if (!o->def)
			continue;
		rc = set_field(o, self, o->def);
		assert(!rc || rc == -ENOMEM); /* else the table itself is wrong */
		if (rc)
			err_set(err, rc, "%s: out of memory", what);
	}
	for (unsigned i = 0; i < n && !rc; i++)
		rc = set_one(opts, self, args, i, what, err);
	if (rc)
		opts_free(opts, self);
	return rc;
}

void opts_free(const struct opt *opts, void *self)
{
	for (const struct opt *o = opts; o && o->name; o++) {
		char **field = (char **)((char *)self + o->field);

		if (o->type == OPT_STR) {
			free(*field);
			*field = NULL;
		}
	}
}

void opts_print(const struct opt *opts, void *out)
{
	enum { HELP_COLUMN = 26 };

	for (const struct opt *o = opts; o && o->name; o++) {
		bool is_number = o->type != OPT_BOOL && o->type != OPT_ENUM && o->type != OPT_STR;
		bool has_range = is_number && (o->min || o->max);
		char range[80] = "";
		int n = fprintf(out, "  %s=%s", o->name, type_name(o));

		fprintf(out, "%*s%s", MAX(HELP_COLUMN - n, 2), "", o->help);
		if (has_range)
			format_range(o, range, sizeof(range));
		if (o->def || has_range)
			fprintf(out, " (%s%s%s%s)", o->def ? "default " : "", o->def ? o->def : "",
				o->def && has_range ? "; " : "", range);
		fputc('\n', out);
	}
}
