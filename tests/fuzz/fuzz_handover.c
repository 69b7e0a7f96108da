/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What one nbdrsd leaves to the next. Besides not crashing: what is accepted fits into the room there is, and is
 * the same after it was written and read once more.
 */
#include <string.h>

#include "fuzz.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/handover.h"

enum { ROOM = 1000 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct handover h = { 0 }, again = { 0 };
	_cleanup_free_ char *first = NULL, *second = NULL;
	struct err err = { "" };
	size_t left = 0;

	if (handover_decode((const char *)data, size, ROOM, &h, &err) != 0) {
		must(*err.msg && !h.conns && !h.listeners && !h.devices);
		return 0;
	}
	for (size_t i = 0; i < h.conns_n; i++) {
		must(h.conns[i].fd >= 0 && h.conns[i].backend_id && !h.conns[i].left);
		must(!h.conns[i].has_refused || h.conns[i].discard <= h.conns[i].refused.len);
		left += h.conns[i].left_len;
	}
	must(left <= ROOM);
	first = handover_encode(&h);
	must(first && handover_decode(first, strlen(first), ROOM, &again, &err) == 0);
	second = handover_encode(&again);
	must(second && strcmp(first, second) == 0);
	handover_clear(&h);
	handover_clear(&again);
	return 0;
}
