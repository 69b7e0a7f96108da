/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the tests of the negotiation share: two exports, and a client that asks and looks at the answer.
 */
#ifndef NBDRS_NEGO_TALK_H
#define NBDRS_NEGO_TALK_H

#include "nbdrs/cleanup.h"
#include "net/negotiate.h"

#define TFLAGS (NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_DF)

/* "disk", the default, and "second", which is read-only in blocks of 512. */
extern struct export talk_disk, talk_second;
extern const struct nego_source talk_two, talk_none;
struct export *talk_find_none(const char *name, size_t len);

/* A client: sends an option, then looks at one message of the answer after the other. */
struct talk {
	struct nego nego;
	uint8_t out[NEGO_OUT_ROOM];
	size_t at;
	uint32_t option;
};

void talk_begin(struct talk *t, const struct nego_source *source);
enum nego_next ask(struct talk *t, uint32_t option, const void *data, size_t len);
/* The next message must be of this type; its data's length, *data set. */
size_t expect(struct talk *t, uint32_t type, const uint8_t **data);
/* And no more. */
void expect_last(struct talk *t, uint32_t type);
void expect_info_export(struct talk *t, uint64_t size, uint16_t tflags);
void expect_info_text(struct talk *t, uint16_t type, const char *text);
void expect_info_block_size(struct talk *t, uint32_t min);
void expect_context(struct talk *t, uint32_t id);

/* Builds option data. */
struct data {
	uint8_t v[NEGO_OPTION_MAX];
	size_t n;
};

void add32(struct data *d, uint32_t v);
void add16(struct data *d, uint16_t v);
void add_text(struct data *d, const char *text);
/* INFO or GO with `n` information requests. */
enum nego_next ask_info(struct talk *t, uint32_t option, const char *name, unsigned n,
			const uint16_t *requests);
/* LIST or SET_META_CONTEXT with `n` queries. */
enum nego_next ask_meta(struct talk *t, uint32_t option, const char *name, unsigned n,
			const char *const *queries);

#endif
