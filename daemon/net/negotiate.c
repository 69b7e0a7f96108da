/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The negotiation as a pure state machine.
 *
 * Every option gets exactly one answer: zero or more messages, the last of them ACK or an error, all in
 * `out` so that it leaves in one send. Only LIST may need several rounds. The state between options is
 * small: structured replies or not, and for which export base:allocation was chosen.
 */
#include <assert.h>
#include <string.h>

#include "net/negotiate.h"
#include "nbdrs/cleanup.h"

static const char base_allocation[] = "base:allocation";

enum {
	/* The longest message: REP_SERVER with a name and a description. */
	MESSAGE_MAX = NBD_REP_HEADER_LEN + 4 + NBD_MAX_STRING + NBD_MAX_STRING,
	INFO_EXPORT_LEN = 12,
	INFO_BLOCK_SIZE_LEN = 14,
	OLD_ZEROES_LEN = 124, /* after the answer to EXPORT_NAME, unless NO_ZEROES */
};

const uint8_t nego_greeting[NBD_GREETING_LEN] = {
	'N', 'B', 'D', 'M', 'A', 'G', 'I', 'C', 'I',
	'H', 'A', 'V', 'E', 'O', 'P', 'T', 0,   NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES,
};

void nego_init(struct nego *n, const struct nego_source *source)
{
	memset(n, 0, sizeof(*n));
	n->source = source;
}

bool nego_client_flags(struct nego *n, uint32_t flags)
{
	if (flags & ~(uint32_t)(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)) {
		n->trouble = "unknown client flags";
		return false;
	}
	n->is_fixed = flags & NBD_FLAG_FIXED_NEWSTYLE;
	n->no_zeroes = flags & NBD_FLAG_NO_ZEROES;
	return true;
}

bool nego_parse_option(const void *wire, struct nego_option *o)
{
	const uint8_t *p = wire;

	if (get_be64(p) != NBD_IHAVEOPT)
		return false;
	o->code = get_be32(p + 8);
	o->len = get_be32(p + 12);
	return true;
}

bool nego_wants_data(const struct nego_option *o)
{
	switch (o->code) {
	case NBD_OPT_EXPORT_NAME:
	case NBD_OPT_INFO:
	case NBD_OPT_GO:
	case NBD_OPT_LIST_META_CONTEXT:
	case NBD_OPT_SET_META_CONTEXT: return o->len <= NEGO_OPTION_MAX;
	default: return false;
	}
}

/* Parsers of option data: everything is checked against `len` before it is looked at. */

/* A length-prefixed string at *at; advances. False when it ends behind the data. */
static bool take_string(const uint8_t *p, size_t len, size_t *at, const char **text,
			size_t *text_len)
{
	uint32_t n;

	if (len - *at < 4)
		return false;
	n = get_be32(p + *at);
	if (n > len - *at - 4)
		return false;
	*text = (const char *)p + *at + 4;
	*text_len = n;
	*at += 4 + (size_t)n;
	return true;
}

static uint32_t refuse(const char **why, uint32_t error, const char *text)
{
	*why = text;
	return error;
}

uint32_t nego_parse_info(const void *data, size_t len, struct nego_info *out, const char **why)
{
	struct nego_info info = { 0 };
	const uint8_t *p = data;
	size_t at = 0, requests_n;

	if (!take_string(p, len, &at, &info.name, &info.name_len) || len - at < 2)
		return refuse(why, NBD_REP_ERR_INVALID,
			      "the export name does not fit into the option");
	if (info.name_len > NBD_MAX_STRING)
		return refuse(why, NBD_REP_ERR_TOO_BIG,
			      "the export name is longer than 4096 bytes");
	requests_n = get_be16(p + at);
	at += 2;
	if (len - at != requests_n * 2)
		return refuse(why, NBD_REP_ERR_INVALID,
			      "the information requests do not fill the option");

	for (size_t i = 0; i < requests_n; i++) {
		switch (get_be16(p + at + i * 2)) {
		case NBD_INFO_NAME: info.wants_name = true; break;
		case NBD_INFO_DESCRIPTION: info.wants_description = true; break;
		case NBD_INFO_BLOCK_SIZE: info.wants_block_size = true; break;
		default: /* INFO_EXPORT comes anyway; those we do not know are ignored, never an error */
			break;
		}
	}
	*out = info;
	return 0;
}

static bool text_is(const char *text, size_t len, const char *what)
{
	return len == strlen(what) && memcmp(text, what, len) == 0;
}

uint32_t nego_parse_meta(const void *data, size_t len, struct nego_meta *out, const char **why)
{
	struct nego_meta meta = { 0 };
	const uint8_t *p = data;
	size_t at = 0;

	if (!take_string(p, len, &at, &meta.name, &meta.name_len) || len - at < 4)
		return refuse(why, NBD_REP_ERR_INVALID,
			      "the export name does not fit into the option");
	if (meta.name_len > NBD_MAX_STRING)
		return refuse(why, NBD_REP_ERR_TOO_BIG,
			      "the export name is longer than 4096 bytes");
	meta.queries_n = get_be32(p + at);
	at += 4;

	/* Each round takes four bytes at least, so the data bounds the count. */
	for (uint32_t i = 0; i < meta.queries_n; i++) {
		const char *query;
		size_t query_len;

		if (!take_string(p, len, &at, &query, &query_len))
			return refuse(why, NBD_REP_ERR_INVALID,
				      "a query does not fit into the option");
		if (query_len > NBD_MAX_STRING)
			return refuse(why, NBD_REP_ERR_TOO_BIG,
				      "a query is longer than 4096 bytes");
		if (text_is(query, query_len, base_allocation))
			meta.has_allocation = true;
		else if (text_is(query, query_len, "base:"))
			meta.has_base = true;
	}
	if (at != len)
		return refuse(why, NBD_REP_ERR_INVALID, "the queries do not fill the option");
	*out = meta;
	return 0;
}

/* Messages. */

/* Begins a message of `len` bytes of data and returns where the data goes. */
static uint8_t *message(struct nego *n, uint32_t option, uint32_t type, size_t len)
{
	uint8_t *p = n->out + n->out_n;

	assert(NEGO_OUT_ROOM - n->out_n >= NBD_REP_HEADER_LEN + len);
	put_be64(p, NBD_REP_MAGIC);
	put_be32(p + 8, option);
	put_be32(p + 12, type);
	put_be32(p + 16, (uint32_t)len);
	n->out_n += NBD_REP_HEADER_LEN + len;
	return p + NBD_REP_HEADER_LEN;
}

static enum nego_next ack(struct nego *n, uint32_t option)
{
	(void)message(n, option, NBD_REP_ACK, 0); /* it has no data */
	return NEGO_OPTION;
}

static enum nego_next error_reply(struct nego *n, uint32_t option, uint32_t type, const char *text)
{
	size_t len = strlen(text);

	memcpy(message(n, option, type, len), text, len);
	n->trouble = text;
	return NEGO_OPTION;
}

static enum nego_next close_for(struct nego *n, const char *why)
{
	n->trouble = why;
	return NEGO_CLOSE;
}

static void info_text(struct nego *n, uint32_t option, uint16_t type, const char *text, size_t len)
{
	uint8_t *p = message(n, option, NBD_REP_INFO, 2 + len);

	put_be16(p, type);
	memcpy(p + 2, text, len);
}

/* DF makes sense, and may be advertised, only with structured replies. */
static uint16_t tflags_for(const struct nego *n, const struct export *e)
{
	return n->is_structured ? e->tflags : (uint16_t)(e->tflags & ~NBD_FLAG_SEND_DF);
}

/* Options. */

static struct export *find(struct nego *n, const char *name, size_t len)
{
	struct export *e = n->source->find(name, len);

	if (!e) {
		n->wanted = name;
		n->wanted_len = len;
	}
	return e;
}

static void choose(struct nego *n, struct export *e, bool by_default)
{
	n->chosen = e;
	/* Contexts belong to the name they were asked for (NBD proto.md, SET_META_CONTEXT). */
	n->has_meta = n->meta == e && n->meta_by_default == by_default;
}

static enum nego_next answer_export_name(struct nego *n, const struct nego_option *o,
					 const void *data)
{
	struct export *e;
	uint8_t *p = n->out;

	if (o->len > NBD_MAX_STRING)
		return close_for(n, "the export name is longer than 4096 bytes");
	if (n->is_ending)
		return close_for(n, "the server is shutting down");
	e = find(n, data, o->len);
	if (!e)
		return close_for(n, "no such export");

	choose(n, e, o->len == 0);
	put_be64(p, e->size);
	put_be16(p + 8, tflags_for(n, e));
	n->out_n = 10;
	if (!n->no_zeroes) {
		memset(p + n->out_n, 0, OLD_ZEROES_LEN);
		n->out_n += OLD_ZEROES_LEN;
	}
	return NEGO_TRANSMIT;
}

static enum nego_next answer_info(struct nego *n, const struct nego_option *o, const void *data)
{
	struct nego_info info;
	const char *why;
	struct export *e;
	uint8_t *p;
	uint32_t error = nego_parse_info(data, o->len, &info, &why);

	if (error)
		return error_reply(n, o->code, error, why);
	if (n->is_ending)
		return error_reply(n, o->code, NBD_REP_ERR_SHUTDOWN, "the server is shutting down");
	e = find(n, info.name, info.name_len);
	if (!e)
		return error_reply(n, o->code, NBD_REP_ERR_UNKNOWN, "no such export");

	p = message(n, o->code, NBD_REP_INFO, INFO_EXPORT_LEN);
	put_be16(p, NBD_INFO_EXPORT);
	put_be64(p + 2, e->size);
	put_be16(p + 10, tflags_for(n, e));
	if (info.wants_name)
		info_text(n, o->code, NBD_INFO_NAME, e->name, strlen(e->name));
	if (info.wants_description && e->description)
		info_text(n, o->code, NBD_INFO_DESCRIPTION, e->description, strlen(e->description));
	/* Also unasked when we insist on it. */
	if (info.wants_block_size || e->min_block > 1) {
		p = message(n, o->code, NBD_REP_INFO, INFO_BLOCK_SIZE_LEN);
		put_be16(p, NBD_INFO_BLOCK_SIZE);
		put_be32(p + 2, e->min_block);
		put_be32(p + 6, e->pref_block);
		put_be32(p + 10, e->max_payload);
	}
	(void)ack(n, o->code); /* the same for both, the way on is not */
	if (o->code == NBD_OPT_INFO)
		return NEGO_OPTION;
	choose(n, e, info.name_len == 0);
	return NEGO_TRANSMIT;
}

static void add_context(struct nego *n, uint32_t option, uint32_t id)
{
	size_t len = sizeof(base_allocation) - 1;
	uint8_t *p = message(n, option, NBD_REP_META_CONTEXT, 4 + len);

	put_be32(p, id);
	memcpy(p + 4, base_allocation, len);
}

static enum nego_next answer_meta(struct nego *n, const struct nego_option *o, const void *data)
{
	bool is_set = o->code == NBD_OPT_SET_META_CONTEXT;
	struct nego_meta meta;
	const char *why;
	struct export *e;
	uint32_t error;

	/* An earlier choice is gone even when this one fails. */
	if (is_set)
		n->meta = NULL;
	if (!n->is_structured)
		return error_reply(n, o->code, NBD_REP_ERR_INVALID,
				   "structured replies come first");
	error = nego_parse_meta(data, o->len, &meta, &why);
	if (error)
		return error_reply(n, o->code, error, why);
	e = find(n, meta.name, meta.name_len);
	if (!e)
		return error_reply(n, o->code, NBD_REP_ERR_UNKNOWN, "no such export");

	if (is_set && meta.has_allocation) {
		n->meta = e;
		n->meta_by_default = meta.name_len == 0;
		add_context(n, o->code, NBD_META_BASE_ALLOCATION);
	} else if (!is_set && (meta.has_allocation || meta.has_base || meta.queries_n == 0)) {
		add_context(n, o->code, 0); /* ids mean nothing in a list */
	}
	return ack(n, o->code);
}

static enum nego_next answer_structured(struct nego *n, const struct nego_option *o)
{
	if (o->len)
		return error_reply(n, o->code, NBD_REP_ERR_INVALID, "the option takes no data");
	if (n->is_structured)
		return error_reply(n, o->code, NBD_REP_ERR_INVALID,
				   "structured replies are on already");
	n->is_structured = true;
	return ack(n, o->code);
}

static enum nego_next answer_list(struct nego *n, const struct nego_option *o)
{
	if (o->len)
		return error_reply(n, o->code, NBD_REP_ERR_INVALID, "the option takes no data");
	n->listed = n->source->first();
	return nego_more(n);
}

enum nego_next nego_more(struct nego *n)
{
	for (; n->listed; n->listed = n->listed->next) {
		const char *description = n->listed->description ? n->listed->description : "";
		size_t name_len = strlen(n->listed->name), description_len = strlen(description);
		uint8_t *p;

		/* The ACK must fit behind it too. */
		if (NEGO_OUT_ROOM - n->out_n < MESSAGE_MAX + NBD_REP_HEADER_LEN)
			return NEGO_MORE;
		p = message(n, NBD_OPT_LIST, NBD_REP_SERVER, 4 + name_len + description_len);
		put_be32(p, (uint32_t)name_len);
		memcpy(p + 4, n->listed->name, name_len);
		memcpy(p + 4 + name_len, description, description_len);
	}
	return ack(n, NBD_OPT_LIST);
}

enum nego_next nego_answer(struct nego *n, const struct nego_option *o, const void *data)
{
	assert(n->out_n == 0);
	n->trouble = NULL;
	n->wanted = NULL;
	/* Without FIXED_NEWSTYLE the client understands no replies, only the one option of old. */
	if (!n->is_fixed && o->code != NBD_OPT_EXPORT_NAME)
		return close_for(n, "an option other than EXPORT_NAME without fixed newstyle");

	switch (o->code) {
	case NBD_OPT_EXPORT_NAME: return answer_export_name(n, o, data);
	case NBD_OPT_ABORT:
		(void)ack(n, o->code); /* what comes next is our own */
		return NEGO_BYE;
	case NBD_OPT_LIST: return answer_list(n, o);
	case NBD_OPT_STRUCTURED_REPLY: return answer_structured(n, o);
	case NBD_OPT_INFO:
	case NBD_OPT_GO:
	case NBD_OPT_LIST_META_CONTEXT:
	case NBD_OPT_SET_META_CONTEXT: break;
	case NBD_OPT_STARTTLS:
		return error_reply(n, o->code, NBD_REP_ERR_UNSUP, "this server has no TLS");
	default: return error_reply(n, o->code, NBD_REP_ERR_UNSUP, "unknown option");
	}

	if (!data) {
		if (o->code == NBD_OPT_SET_META_CONTEXT)
			n->meta = NULL;
		return error_reply(n, o->code, NBD_REP_ERR_TOO_BIG,
				   "the option is longer than 16384 bytes");
	}
	if (o->code == NBD_OPT_INFO || o->code == NBD_OPT_GO)
		return answer_info(n, o, data);
	return answer_meta(n, o, data);
}
