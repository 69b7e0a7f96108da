/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Fuzzes the negotiation. Input: what a client sends, from its flags on, pipelined.
 *
 * Each option must get exactly one answer: messages that echo the option, the last of them, and only
 * that, an ACK or an error.
 */
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "net/negotiate.h"

enum { CLIENT_FLAGS_LEN = 4, EXPORTS = 40 };

static struct export all[EXPORTS];

static struct export *find(const char *name, size_t len)
{
	for (unsigned i = 0; i < EXPORTS; i++) {
		if (len == 0 || (strlen(all[i].name) == len && memcmp(all[i].name, name, len) == 0))
			return &all[i];
	}
	return NULL;
}

static struct export *first(void)
{
	return &all[0];
}

/* "disk", and some that are long enough for LIST to need several parts. */
static void make_exports(void)
{
	static char names[EXPORTS][NBD_MAX_STRING + 1];
	static char disk[] = "disk";

	if (all[0].name)
		return;
	for (unsigned i = 0; i < EXPORTS; i++) {
		memset(names[i], 'a' + (int)i % 26, i % 2 ? NBD_MAX_STRING : i + 1);
		all[i] = (struct export){
			.name = i ? names[i] : disk,
			.description = i % 3 ? names[i] : NULL,
			.size = (uint64_t)i << 32,
			.tflags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_DF,
			.min_block = i % 5 ? 1 : 512,
			.pref_block = 4096,
			.max_payload = NBD_MAX_PAYLOAD,
			.next = i + 1 < EXPORTS ? &all[i + 1] : NULL,
		};
	}
}

/* All whole messages for this option; the number of those that end an answer. */
static unsigned check_messages(const struct nego *n, uint32_t option)
{
	unsigned ends = 0;
	size_t at = 0;

	must(n->out_n <= NEGO_OUT_ROOM);
	while (at < n->out_n) {
		uint32_t type;

		must(ends == 0 && n->out_n - at >= NBD_REP_HEADER_LEN);
		must(get_be64(n->out + at) == NBD_REP_MAGIC);
		must(get_be32(n->out + at + 8) == option);
		type = get_be32(n->out + at + 12);
		ends += type == NBD_REP_ACK || type & NBD_REP_ERR(0);
		must(get_be32(n->out + at + 16) <= n->out_n - at - NBD_REP_HEADER_LEN);
		at += NBD_REP_HEADER_LEN + get_be32(n->out + at + 16);
	}
	return ends;
}

/* Whether the negotiation goes on. */
static bool one_option(struct nego *n, const struct nego_option *o, const void *data)
{
	enum nego_next next;

	n->out_n = 0;
	next = nego_answer(n, o, data);
	if (next == NEGO_CLOSE) {
		must(n->out_n == 0 && n->trouble);
		return false;
	}
	if (o->code == NBD_OPT_EXPORT_NAME) {
		must(next == NEGO_TRANSMIT && n->out_n == (n->no_zeroes ? 10 : 134));
		return false;
	}
	while (next == NEGO_MORE) {
		must(check_messages(n, o->code) == 0 && n->out_n > 0);
		n->out_n = 0;
		next = nego_more(n);
	}
	must(check_messages(n, o->code) == 1);
	must((next == NEGO_TRANSMIT) == (n->chosen != NULL));
	must(!n->has_meta || (n->is_structured && n->meta == n->chosen));
	return next == NEGO_OPTION;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const struct nego_source source = { find, first };
	static uint8_t out[NEGO_OUT_ROOM];
	struct nego n;
	struct nego_option o;
	bool goes_on = true;
	size_t at = CLIENT_FLAGS_LEN;

	make_exports();
	nego_init(&n, &source);
	n.out = out;
	if (size < CLIENT_FLAGS_LEN || !nego_client_flags(&n, get_be32(data)))
		return 0;
	while (goes_on && size - at >= NBD_OPT_HEADER_LEN) {
		void *copy;

		if (!nego_parse_option(data + at, &o))
			break;
		at += NBD_OPT_HEADER_LEN;
		if (!nego_wants_data(&o)) {
			goes_on = one_option(&n, &o, NULL);
			at += o.len < size - at ? o.len : size - at;
			continue;
		}
		if (o.len > size - at)
			break;
		/* An exact copy, so that a byte too far is seen. */
		copy = malloc(o.len ? o.len : 1);
		must(copy);
		memcpy(copy, data + at, o.len);
		at += o.len;
		goes_on = one_option(&n, &o, copy);
		free(copy);
	}
	return 0;
}
