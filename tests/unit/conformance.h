/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What every chain must do, whatever it is made of: one set of cases, run over any chain. Each case opens
 * the chain anew, does something on fibers of the reactors, and compares with a model in memory.
 *
 * A new layer is held to all of this by one more line in the table of test_layers.c.
 */
#ifndef NBDRS_TEST_CONFORMANCE_H
#define NBDRS_TEST_CONFORMANCE_H

#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbdrs/layer.h"

/* Reactor threads of a test; pieces of memory that one request may have. */
enum { CONFORM_REACTORS = 3, CONFORM_SEGMENTS = 4 };

struct conform {
	const char *text;  /* the chain; "@" stands for a folder of its own */
	uint64_t size;     /* bytes of the disk */
	bool is_volume;    /* made by chain_create first, removed by chain_destroy at the end */
	bool in_chain;     /* a volume that lives as long as the chain (mem): all on the same one */
	bool is_forgetful; /* reads zeroes whatever was written (null) */
	bool has_holes;    /* trimmed and never written MiBs must be reported as holes */
	const char *only;  /* the one case to run; NULL = all */
	bool in_memory;    /* its folder may be in memory: flushing disks takes its time */
};

/* The first failed check of a run. */
struct noted {
	pthread_mutex_t lock; /* guards text */
	char text[512];       /* "" = none yet */
};

/* One run of one case. */
struct run {
	const struct conform *what;
	char folder[256];
	struct spec *spec;
	struct chain *chain;
	uint8_t *model; /* what.size bytes */
	struct noted noted;
};

/* Notes the failure, if it is the first; always -1, for `return conform_fail(...)`. From any fiber. */
int conform_fail(struct run *r, int line, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));

#define EXPECT(r, cond, ...)                                                      \
	do {                                                                      \
		if (!(cond))                                                      \
			return conform_fail(r, __LINE__, #cond ": " __VA_ARGS__); \
	} while (0)

/* A case: a CO_FN that runs in a fiber of reactor 0 with the chain open; 0, or -1 after conform_fail. */
struct conform_case {
	const char *name;
	int (*fn)(void *run);
};

extern const struct conform_case conform_cases[]; /* ended by a NULL name */

/*
 * Starts the reactors as NBDRS_IO_ENGINE says, for the whole process. Call once, before conform_run();
 * fails the test when they can't be had.
 */
void conform_start(void);
void conform_stop(void);

/* --- What runs are made of, those of conform_store.h, too ----------------------------------- */

/* Notes it, if it is the first; -1. From any fiber. */
int noted_add(struct noted *n, int line, const char *fmt, va_list ap)
	__attribute__((format(printf, 3, 0)));
/* Makes a run's folder, in memory where that may be. 0, or -errno; its name is there then, too. */
int conform_folder(char to[256], const char *kind, bool in_memory);
/* The text with the folder in the place of each "@"; of malloc, NULL = no memory. */
char *conform_expand(const char *text, const char *folder);

/* Where the folders are made: TMPDIR, or /var/tmp, which is a disk more often than /tmp. */
const char *conform_tmp(void);

/* Runs one case over one chain. NULL, or what went wrong (static storage). */
const char *conform_run(const struct conform *what, const struct conform_case *c);

/* --- For cases of a single layer ------------------------------------------------------------- */

/* Opens, runs fn in a fiber of reactor 0, closes. As conform_run. */
const char *conform_with(const struct conform *what, int (*fn)(void *run));
/* The same as a test of cmocka's, which fails; `size` of the disk. */
void conform_check(const char *text, uint64_t size, int (*fn)(void *run));
void conform_must(const struct conform *what, int (*fn)(void *run));

/* The chain cannot be opened, and the error has `message` in it; else the test fails. */
void conform_refuses(const char *text, const char *message);

/* This reactor's channel; NULL after conform_fail. */
CO_FN struct chan *run_chan(struct run *r);

/* Random data to [off, off + len), from `segments` pieces of memory; the model follows when it succeeds. */
CO_FN int run_write(struct run *r, uint64_t off, uint64_t len, unsigned fl, unsigned segments);
/* Reads [off, off + len) and compares with the model. */
CO_FN int run_check(struct run *r, uint64_t off, uint64_t len, unsigned segments);
CO_FN int run_check_all(struct run *r);
CO_FN int run_zero(struct run *r, uint64_t off, uint64_t len, unsigned fl);

/* `data` is what the disk must hold at [off, off + len) from now on. */
void run_model(struct run *r, uint64_t off, const void *data, uint64_t len);
/* Compares what was read byte by byte with the model; -1 after conform_fail. */
int run_compare(struct run *r, uint64_t off, const uint8_t *got, uint64_t len);

/* A number of a layer's status, or the top one's; UINT64_MAX when there is none of that name. */
uint64_t conform_status(struct layer *l, const char *key);
uint64_t run_status(struct run *r, const char *key);

/* Opens and closes the built chain. -1 after conform_fail. */
CO_FN int run_reopen(struct run *r, bool read_only);
CO_FN int run_shut(struct run *r);

/* A random number below n (n > 0); each fiber may use its own state. */
uint64_t random_below(uint64_t *state, uint64_t n);

/* The sum of one counter over all reactors' channels of the layer at `depth` (0 = top; first of its depth). */
uint64_t run_ops(struct run *r, unsigned depth, enum ch_op op);

#endif
