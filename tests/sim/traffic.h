/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What tests that send traffic over a chain share: its life, its blocks, and the weather of the store below.
 */
#ifndef NBDRS_SIM_TRAFFIC_H
#define NBDRS_SIM_TRAFFIC_H

#include "nbdrs/layer.h"
#include "sim.h"

enum { BLOCK = 4096, WORDS = BLOCK / sizeof(uint64_t) };

struct volume {
	struct spec *spec;
	struct chain *chain;
};

/* Not open yet; volume_free() it in any case. */
int volume_build(struct volume *v, const char *text, const char *export, struct err *err);
void volume_free(struct volume *v);
/* Builds it as export "disk0" and opens it. After an error nothing is left of it. */
CO_FN int volume_open(struct volume *v, const char *text, struct err *err);
/* Frees it, and returns what its end said. */
CO_FN int volume_close(struct volume *v);
CO_FN int volume_create(const char *text, uint64_t size);
/* NULL after sim_failed(). */
CO_FN struct chan *volume_chan(const struct volume *v);

CO_FN int read_block(struct chan *c, uint64_t block, uint64_t *words);

/* Until then (ns) the store is good, failing, or away, for up to ten minutes each; good at the end. */
CO_FN void weather(uint64_t until);

#endif
