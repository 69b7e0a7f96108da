/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Fuzzes what stands in the files of the cache's journal. Input: a letter, then bytes of such a file.
 *
 *	h	both heads of a segment
 *	r	records, one after the other, up to the segment's end
 *	R	the same, but each is given the checksum that its head needs: a fuzzer does not find it
 *
 * A head that is good says so again when it is written anew. A record that is taken lies within the
 * segment, and so does where the next one begins.
 */
#include <endian.h>
#include <string.h>

#include "fuzz.h"
#include "layer/cache/cache_journal.h"
#include "nbdrs/cleanup.h"

static void fuzz_heads(const uint8_t *data, size_t size)
{
	uint8_t bytes[SEGMENT_HEADS] = { 0 }, again[SEGMENT_HEADS];
	struct segment_head h, other;

	memcpy(bytes, data, MIN(size, sizeof(bytes)));
	if (segment_head_read(bytes, &h) != HEAD_GOOD)
		return;
	must(memchr(h.volume, '\0', sizeof(h.volume)) != NULL);
	segment_head_write(again, &h, h.volume);
	must(segment_head_read(again, &other) == HEAD_GOOD);
	must(segment_head_is_of(&other, h.volume));
	must(strcmp(other.identity, h.identity) == 0);
	must(!segment_head_is_of_former(&other, h.identity));
	must(other.number == h.number && other.last_seq == h.last_seq &&
	     memcmp(other.salt, h.salt, sizeof(h.salt)) == 0);
}

/* The record's head as it would be with a good checksum; its number stays. */
static void seal(uint8_t *from, uint64_t len, struct segment *seg)
{
	struct record r = { .seg = seg };
	struct obj obj = { 0 };
	uint16_t name_len;

	if (len < RECORD_HEAD)
		return;
	memcpy(&name_len, from + 6, sizeof(name_len));
	name_len = le16toh(name_len);
	if (name_len > MIN(len - RECORD_HEAD, (uint64_t)OBJ_NAME_MAX))
		return;
	obj.len = name_len;
	r.obj = &obj;
	memcpy(r.head, from, RECORD_HEAD + name_len);
	memcpy(&r.seq, from + 8, sizeof(r.seq));
	r.seq = le64toh(r.seq);
	journal_record_seal(&r, journal_record_synced(&r));
	memcpy(from, r.head, RECORD_HEAD);
}

static void fuzz_records(uint8_t *data, uint64_t size, bool seals)
{
	struct segment seg = { .salt = "salty!!" };
	uint64_t at = 0, after = 0;
	struct record r;
	struct obj obj;

	for (; at < size; at += journal_record_size(&r)) {
		if (seals)
			seal(data + at, size - at, &seg);
		if (!journal_record_parse(data + at, size - at, &seg, after, &r, &obj))
			return;
		must(r.obj == &obj && r.seq > after && RECORD_HEAD + obj.len <= r.head_len);
		must(r.off <= UINT64_MAX - r.len);
		must(journal_record_size(&r) <= size - at);
		must(r.at == r.head_len && r.at + journal_record_data_size(&r) <= size - at);
		(void)journal_record_data_is_good(data + at, &r); /* it reads all of it */
		after = r.seq;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t *copy;

	if (size < 2)
		return 0;
	if (data[0] == 'h') {
		fuzz_heads(data + 1, size - 1);
		return 0;
	}
	copy = malloc(size - 1);
	must(copy != NULL);
	memcpy(copy, data + 1, size - 1);
	fuzz_records(copy, size - 1, data[0] == 'R');
	free(copy);
	return 0;
}
