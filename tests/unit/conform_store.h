/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What every keyed store must do, and every layer that passes objects on: one set of cases, run over any chain. Each
 * case opens the chain anew, works on fibers of the reactors, and compares with a model in memory.
 *
 * A new store is held to all of this by one more line in the table of test_stores.c; one that needs a server by
 * NBDRS_STORE=CHAIN test_stores.
 */
#ifndef NBDRS_TEST_CONFORM_STORE_H
#define NBDRS_TEST_CONFORM_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "conformance.h"
#include "nbdrs/layer.h"

struct store_what {
	const char *text;  /* the chain, without a mapping; "@" stands for a folder of its own */
	const char *label; /* printed instead of the text, which may hold keys; NULL = the text */
	const char *only;  /* the one case to run; NULL = all */
	bool in_memory;    /* its folder may be in memory: syncing disks takes its time */
	unsigned few;      /* share the numbers of objects and rounds by this; 0 = 1 */
};

/* One run of one case. */
struct store_run {
	const struct store_what *what;
	char folder[256];
	char prefix[40]; /* of all names that the case uses */
	struct spec *spec;
	struct chain *chain;
	struct noted noted;
};

/* Notes the failure, if it is the first; always -1, for `return store_fail(...)`. From any fiber. */
int store_fail(struct store_run *r, int line, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));

#define CHECK(r, cond, ...)                                                     \
	do {                                                                    \
		if (!(cond))                                                    \
			return store_fail(r, __LINE__, #cond ": " __VA_ARGS__); \
	} while (0)

/* A case: a CO_FN that runs in a fiber of reactor 0 with the chain open; 0, or -1 after store_fail. */
struct store_case {
	const char *name;
	int (*fn)(void *run);
};

extern const struct store_case store_cases[]; /* ended by a NULL name */

/*
 * Builds the chain, has its place made, opens it, runs fn in a fiber of reactor 0, deletes the case's objects, closes,
 * and has the place removed. NULL, or what went wrong (static storage). conform_start() (conformance.h) comes first.
 */
const char *store_with(const struct store_what *what, int (*fn)(void *run));

/* Cases of conform_store_shared.c. */
CO_FN int store_case_if_absent(void *run);
CO_FN int store_case_if_match(void *run);
CO_FN int store_case_partial(void *run);
CO_FN int store_case_map(void *run);
CO_FN int store_case_reopen(void *run);
CO_FN int store_case_concurrent(void *run);
CO_FN int store_case_random(void *run);

/* --- For cases -------------------------------------------------------------------------------- */

/* This reactor's channel; NULL after store_fail. */
CO_FN struct chan *store_chan(struct store_run *r);
/* Closes and opens the chain; 0, or -1 after store_fail. Nobody else uses it. */
CO_FN int store_reopen(struct store_run *r);

/* Has the chain all of these capabilities? */
bool store_can(const struct store_run *r, unsigned caps);
/* `n`, or fewer as the run wants; at least 1. */
unsigned store_less(const struct store_run *r, unsigned n);

/* The object `prefix` + `name`. */
struct obj store_obj(const struct store_run *r, const char *name);
/* Fills with bytes that depend on `seed` only. */
void store_fill(void *buf, size_t len, uint64_t seed);

/* The layer operations on store_obj(name); what they return. */
CO_FN int store_put(struct store_run *r, const char *name, const void *data, size_t len,
		    enum put_cond cond, const char *etag, struct obj_stat *st);
CO_FN int store_get(struct store_run *r, const char *name, uint64_t off, void *buf, size_t len);
CO_FN int store_write_at(struct store_run *r, const char *name, uint64_t off, const void *data,
			 size_t len, unsigned fl);
CO_FN int store_stat_of(struct store_run *r, const char *name, struct obj_stat *st);
/* 0 when the object is exactly that, else -1 after store_fail. */
CO_FN int store_expect(struct store_run *r, const char *name, const void *data, size_t len);

/* Runs fn(arg of fiber i) on `n` fibers, spread over the reactors; 0, or -1 when one returned something else. */
CO_FN int store_fibers(struct store_run *r, unsigned n,
		       int (*fn)(struct store_run *r, unsigned i, void *arg), void *arg);

#endif
