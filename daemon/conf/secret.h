/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What in a chain is secret: the userinfo and the query of URLs (keys, presigned requests), and values
 * of options that are named like a secret. In doubt more is masked than needed: a masked path is a
 * nuisance, a logged key is an incident.
 */
#ifndef NBDRS_CONF_SECRET_H
#define NBDRS_CONF_SECRET_H

#include <stdbool.h>
#include <stddef.h>

#define SECRET_MASK "***"

/* True for names that end in "key" or contain "secret", "passw", "token" or "credential". */
bool secret_is_key(const char *key, size_t len);

/* The target of a store, masked; the caller frees. NULL when out of memory. */
char *secret_mask_target(const char *layer, const char *target);

/*
 * Chain text that need not be well-formed, masked; the caller frees. *at, an offset into `text`, becomes
 * the offset of the same place in the result (of the mask, inside a secret). NULL when out of memory.
 */
char *secret_mask_text(const char *text, size_t *at);

#endif
