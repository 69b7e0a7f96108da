/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Option tables: a layer states its options once, and parsing, defaults, ranges, error texts, help and
 * the man page come from that. Also the parsers for sizes and times used on the command line.
 */
#ifndef NBDRS_OPT_H
#define NBDRS_OPT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbdrs/err.h"

enum opt_type {
	OPT_BOOL,    /* bool: on|off|yes|no|true|false|1|0; the bare name means on */
	OPT_UINT,    /* uint64_t: a plain number */
	OPT_SIZE,    /* uint64_t, bytes: 512, 64Ki, 4MiB, 10G (K, Ki, KiB are all powers of 1024) */
	OPT_TIME_NS, /* uint64_t, nanoseconds: 5s, 100ms, 20us; a plain number is seconds */
	OPT_PERCENT, /* uint64_t, parts per million: 5%, 0.1% */
	OPT_ENUM,    /* unsigned: index into `choices` */
	OPT_STR,     /* char *: owned by the field, freed by opts_free; NULL when absent */
};

struct opt {
	const char *name;
	enum opt_type type;
	size_t field;	     /* offset of the field in the layer's self struct */
	const char *def;     /* as the user would write it; NULL = zero / absent */
	uint64_t min, max;   /* of UINT, SIZE, TIME_NS, PERCENT; max 0 = no limit */
	const char *choices; /* OPT_ENUM: "off|falloc|full" */
	const char *help;    /* one line, no full stop */
};

/* A table ends with an entry whose name is NULL; a NULL table is empty. */
#define OPT_END { .name = NULL }

/* One `key=value` as it stood in the chain; value "" with has_value false for a bare key. */
struct opt_arg {
	char *key, *value;
	bool has_value;
	unsigned column; /* 1-based, of the key in the text */
};

/*
 * Sets every field of `self` to its default, then the given ones. An unknown or repeated key and a bad
 * value are -EINVAL with a message that names `what` ("layer file"), the key, the value and what would do.
 * On failure everything is freed again (opts_free).
 */
int opts_parse(const struct opt *opts, void *self, const struct opt_arg *args, unsigned n, const char *what,
	       struct err *err);

/* Frees the strings. */
void opts_free(const struct opt *opts, void *self);

/* Prints the table as help, "  name=TYPE   help (default X; min..max)", into `out` (FILE *). */
void opts_print(const struct opt *opts, void *out);

/* "100Mi", "4GiB", "10G", "512", "1.5Ti" (exact multiples of a byte only) -> bytes. -EINVAL, -ERANGE. */
int parse_size(const char *text, uint64_t *bytes);
/* "5s", "100ms", "20us", "1m", "2h", "3" (seconds) -> ns. -EINVAL, -ERANGE. */
int parse_time_ns(const char *text, uint64_t *ns);
/* Decimal digits only. -EINVAL, -ERANGE. */
int parse_u64(const char *text, uint64_t *value);

/* 10737418240 -> "10GiB", 1536 -> "1.5KiB", 1000 -> "1000B"; at most two decimals, rounded down. */
void format_size(uint64_t bytes, char *out, size_t out_len);

#endif
