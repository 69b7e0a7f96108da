/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The negotiation as a pure state machine: an option comes in, its whole answer goes out (NBD proto.md,
 * "Handshake phase"). handshake.c does the I/O around it.
 */
#ifndef NBDRS_NEGOTIATE_H
#define NBDRS_NEGOTIATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbdrs/export.h"
#include "nbdrs/proto.h"

enum {
	NEGO_OPTION_MAX =
		16384, /* data of an option that is looked at; longer ones are drained and refused */
	NEGO_OUT_ROOM = 16384, /* room for any answer, or any part of one */
};

enum nego_next {
	NEGO_OPTION,   /* send what is in `out`, read the next option */
	NEGO_MORE,     /* send what is in `out`, then nego_more() */
	NEGO_TRANSMIT, /* send what is in `out`, transmission begins with `chosen` */
	NEGO_BYE,      /* send what is in `out`, then close: the client said ABORT */
	NEGO_CLOSE,    /* close; the protocol has no other answer */
};

/* Where the exports come from; the functions of export.h, or a test's. Both may return NULL. */
struct nego_source {
	struct export *(*find)(const char *name, size_t len);
	struct export *(*first)(void);
};

struct nego {
	const struct nego_source *source;
	bool is_fixed, no_zeroes; /* what the client's flags said */
	bool is_structured;
	bool is_ending;            /* set by the owner: the server is being shut down */
	bool meta_by_default;      /* base:allocation was chosen for the name "" */
	const struct export *meta; /* base:allocation was chosen for this export; NULL = for none */
	struct export *chosen;     /* after NEGO_TRANSMIT */
	bool has_meta;             /* after NEGO_TRANSMIT: `meta` is for `chosen` */
	const struct export *listed; /* LIST goes on here */
	const char *trouble; /* why NEGO_CLOSE, or the text of the last error reply; static */
	const char *
		wanted; /* name of an export that there is not, in the last option's data; for logs */
	size_t wanted_len;

	uint8_t *out; /* NEGO_OUT_ROOM bytes of the owner */
	size_t out_n; /* bytes in it; the owner sets it to 0 after sending */
};

/* An option's header. */
struct nego_option {
	uint32_t code, len;
};

/* NBD_GREETING_LEN bytes, what the server says first. */
extern const uint8_t nego_greeting[];

void nego_init(struct nego *n, const struct nego_source *source);

/* The client's 32 flag bits. False: there is one we do not know; close. */
bool nego_client_flags(struct nego *n, uint32_t flags);

/* Reads NBD_OPT_HEADER_LEN bytes; false when the magic is wrong (the stream is lost then). */
bool nego_parse_option(const void *wire, struct nego_option *o);

/* Whether nego_answer() wants to see the option's data; if not, drain it and give NULL. */
bool nego_wants_data(const struct nego_option *o);

/*
 * Answers an option; `data` is all its o->len bytes, or NULL when not wanted. n->out must be empty.
 * Fills n->out unless it returns NEGO_CLOSE.
 */
enum nego_next nego_answer(struct nego *n, const struct nego_option *o, const void *data);

/* The next part of an answer that did not fit. */
enum nego_next nego_more(struct nego *n);

/*
 * What follows is used by nego_answer() and seen by its tests: option data -> struct, all of it or
 * nothing. 0, or the error reply (enum nbd_rep) with *why set. Pointers go into the data.
 */

/* INFO and GO. */
struct nego_info {
	const char *name;
	size_t name_len;
	bool wants_name, wants_description, wants_block_size;
};

uint32_t nego_parse_info(const void *data, size_t len, struct nego_info *out, const char **why);

/* LIST_META_CONTEXT and SET_META_CONTEXT. */
struct nego_meta {
	const char *name;
	size_t name_len;
	uint32_t queries_n;
	bool has_allocation; /* a query is "base:allocation" */
	bool has_base;       /* a query is "base:", which lists all of them */
};

uint32_t nego_parse_meta(const void *data, size_t len, struct nego_meta *out, const char **why);

#endif
