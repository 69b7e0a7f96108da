/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer s3 over the fake server (s3_fake.h), for tests whose bodies run in a fiber: what opens it, and its requests.
 */
#ifndef NBDRS_TEST_S3_TRIAL_H
#define NBDRS_TEST_S3_TRIAL_H

#include "core_test.h"

#include "nbdrs/layer.h"
#include "s3_fake.h"

enum { CHAIN_MAX = 512 };

/* One open chain over the fake. */
struct trial {
	struct spec *spec;
	struct chain *chain;
	struct chan *c;
	struct err err;
	int rc; /* of opening */
};

extern struct s3_fake *fake; /* of the test that runs */

/* Opens "s3[options]:http://keys@fake/b/path"; keyed, unless `name` (of an export) is given. */
CO_FN void trial_open(struct trial *t, const char *options, const char *keys, const char *path,
		      const char *name, bool is_ro);
CO_FN void trial_open_store(struct trial *t);
/* Without the probe's requests. */
CO_FN void trial_open_quiet(struct trial *t);
CO_FN void trial_close(struct trial *t);

struct obj trial_obj(const char *name);
/* What the layer's requests return. */
CO_FN int trial_put(struct trial *t, const char *name, const char *data, enum put_cond cond,
		    const char *etag, struct obj_stat *st);
CO_FN int trial_get(struct trial *t, const char *name, uint64_t off, char *buf, size_t len);
/* s3_fake_force of `fake`. */
void trial_force(unsigned n, const char *method, int status, const char *headers, const char *body);

/*
 * Changes a habit. Under the lock, because the thread that sent the last answer may still be looking.
 */
#define TRIAL_SET(field, value)                          \
	do {                                             \
		(void)pthread_mutex_lock(&fake->lock);   \
		fake->field = (value);                   \
		(void)pthread_mutex_unlock(&fake->lock); \
	} while (0)

/* For cmocka: the reactors, for a user without any keys at home; the fake of one test; a body in a fiber. */
int trial_start_all(void **state);
int trial_start(void **state);
int trial_stop(void **state);
void trial_body(void **state);

#define TRIAL(fn)                                                            \
	{                                                                    \
#fn, trial_body, trial_start, trial_stop, (void *)(uintptr_t)fn \
	}

#endif
