/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What stands in the journal's files: bytes in, struct or error out, no I/O. See cache_journal.h.
 *
 *	segment's head			record's head
 *	 0  magic "nbdrsjnl"		 0  magic "ndrj"
 *	 8  u32 version, 1		 4  u16 type
 *	12  u32 length, 512		 6  u16 length of the name
 *	16  u64 number			 8  u64 sequence number
 *	24  u64 last sequence number	16  u64 offset
 *	32  salt, 8 bytes		24  u64 length of the extent
 *	40  u64 hash of the volume	32  u64 checksum of the data
 *	48  its text, 352 bytes		40  u64 length of the data
 *	400 its identity, 16 bytes	48  u64 number up to which all was synced by then
 *	504 u64 checksum		56  u64 checksum of the head, the name and the salt
 *
 * Checksums are XXH3, 64 bits. The identity is zeroes where it was not known, and in files of releases that did
 * not write any.
 *
 * The segment's head stands there twice. It is written over zeroes, and zeroes are written over it,
 * by one call from front to back, when no record of it counts. A crash in the middle leaves one of
 * the two good, or one that is zeroes beside one that makes no sense: the segment is spare then.
 * Two that make no sense are damage.
 */
#include <assert.h>
#include <endian.h>
#include <string.h>

/* Only what the header has: no library is linked. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "layer/cache/cache_journal.h"
#include "nbdrs/cleanup.h"

enum { VERSION = 1, HEAD_LEN = 512, SUM_AT = 504 };
enum { VOLUME_AT = 48, VOLUME_LEN = 352, IDENTITY_AT = 400 };
enum { RECORD_SUM_AT = 56, SYNCED_AT = 48, PAD = 8 };

static const char segment_magic[8] = { 'n', 'b', 'd', 'r', 's', 'j', 'n', 'l' };
static const char record_magic[4] = { 'n', 'd', 'r', 'j' };

static void put16(uint8_t *to, uint16_t v)
{
	v = htole16(v);
	memcpy(to, &v, sizeof(v));
}

static void put32(uint8_t *to, uint32_t v)
{
	v = htole32(v);
	memcpy(to, &v, sizeof(v));
}

static void put64(uint8_t *to, uint64_t v)
{
	v = htole64(v);
	memcpy(to, &v, sizeof(v));
}

static uint16_t get16(const uint8_t *from)
{
	uint16_t v;

	memcpy(&v, from, sizeof(v));
	return le16toh(v);
}

static uint32_t get32(const uint8_t *from)
{
	uint32_t v;

	memcpy(&v, from, sizeof(v));
	return le32toh(v);
}

static uint64_t get64(const uint8_t *from)
{
	uint64_t v;

	memcpy(&v, from, sizeof(v));
	return le64toh(v);
}

/* --- Segments --------------------------------------------------------------------------------- */

void segment_head_write(uint8_t *to, const struct segment_head *h, const char *volume)
{
	const size_t len = strlen(volume);

	memset(to, 0, HEAD_LEN);
	memcpy(to, segment_magic, sizeof(segment_magic));
	put32(to + 8, VERSION);
	put32(to + 12, HEAD_LEN);
	put64(to + 16, h->number);
	put64(to + 24, h->last_seq);
	memcpy(to + 32, h->salt, sizeof(h->salt));
	put64(to + 40, XXH3_64bits(volume, len));
	memcpy(to + VOLUME_AT, volume, MIN(len, (size_t)VOLUME_LEN));
	memcpy(to + IDENTITY_AT, h->identity, strlen(h->identity));
	put64(to + SUM_AT, XXH3_64bits(to, SUM_AT));
	memcpy(to + HEAD_LEN, to, HEAD_LEN);
}

static bool is_zero(const uint8_t *p, size_t len)
{
	for (size_t i = 0; i < len; i++)
		if (p[i])
			return false;
	return true;
}

static enum head_state read_one(const uint8_t *from, struct segment_head *h)
{
	if (is_zero(from, HEAD_LEN))
		return HEAD_SPARE;
	/* What a newer version has changed behind its number is not ours to judge. */
	if (memcmp(from, segment_magic, sizeof(segment_magic)) == 0 && get32(from + 8) > VERSION)
		return HEAD_NEWER;
	if (memcmp(from, segment_magic, sizeof(segment_magic)) != 0 ||
	    get64(from + SUM_AT) != XXH3_64bits(from, SUM_AT) || get32(from + 8) != VERSION)
		return HEAD_BAD;
	*h = (struct segment_head){
		.number = get64(from + 16),
		.last_seq = get64(from + 24),
		.volume_sum = get64(from + 40),
	};
	memcpy(h->salt, from + 32, sizeof(h->salt));
	memcpy(h->volume, from + VOLUME_AT, VOLUME_LEN);
	memcpy(h->identity, from + IDENTITY_AT, IDENTITY_LEN);
	return *h->identity == '\0' || identity_is_valid(h->identity) ? HEAD_GOOD : HEAD_BAD;
}

enum head_state segment_head_read(const uint8_t *from, struct segment_head *h)
{
	const enum head_state a = read_one(from, h);
	enum head_state b;

	if (a == HEAD_GOOD || a == HEAD_NEWER)
		return a;
	b = read_one(from + HEAD_LEN, h);
	return a == HEAD_SPARE && b == HEAD_BAD ? HEAD_SPARE : b;
}

bool segment_head_is_of(const struct segment_head *h, const char *volume)
{
	return h->volume_sum == XXH3_64bits(volume, strlen(volume)) &&
	       strncmp(h->volume, volume, VOLUME_LEN) == 0;
}

bool segment_head_is_of_export(const struct segment_head *h, const char *volume)
{
	const size_t len = strlen(volume);

	return len < VOLUME_LEN && strncmp(h->volume, volume, len) == 0 &&
	       strncmp(h->volume + len, " (", 2) == 0;
}

bool segment_head_is_of_former(const struct segment_head *h, const char *identity)
{
	return *h->identity && *identity && strcmp(h->identity, identity) != 0;
}

/* --- Records ---------------------------------------------------------------------------------- */

/* Of the head without its sum, the name behind it, and the salt. */
static uint64_t head_sum(const uint8_t *head, const uint8_t *name, size_t name_len,
			 const uint8_t salt[8])
{
	uint8_t all[RECORD_SUM_AT + 8 + OBJ_NAME_MAX + 1];

	memcpy(all, head, RECORD_SUM_AT);
	memcpy(all + RECORD_SUM_AT, salt, 8);
	memcpy(all + RECORD_SUM_AT + 8, name, name_len);
	return XXH3_64bits(all, RECORD_SUM_AT + 8 + name_len);
}

static uint64_t iov_sum(const struct iov *iov)
{
	XXH3_state_t state;

	if (iov->n == 1)
		return XXH3_64bits(iov->v[0].iov_base, iov->len);
	(void)XXH3_64bits_reset(&state); /* these fail for NULL only */
	for (unsigned i = 0; i < iov->n; i++)
		(void)XXH3_64bits_update(&state, iov->v[i].iov_base, iov->v[i].iov_len);
	return XXH3_64bits_digest(&state);
}

void journal_record_prepare(struct record *r)
{
	const uint16_t name_len = r->obj->len;

	memset(r->head, 0, RECORD_HEAD);
	memcpy(r->head, record_magic, sizeof(record_magic));
	put16(r->head + 4, (uint16_t)r->type);
	put16(r->head + 6, name_len);
	put64(r->head + 16, r->off);
	put64(r->head + 24, r->len);
	if (r->type == RECORD_DATA) {
		put64(r->head + 32, iov_sum(r->iov));
		put64(r->head + 40, r->len);
	}
	r->head_len = (uint16_t)align_up(RECORD_HEAD + name_len, PAD);
	memcpy(r->head + RECORD_HEAD, r->obj->name, name_len);
	memset(r->head + RECORD_HEAD + name_len, 0, r->head_len - RECORD_HEAD - name_len);
}

void journal_record_seal(struct record *r, uint64_t synced)
{
	put64(r->head + 8, r->seq);
	put64(r->head + SYNCED_AT, synced);
	put64(r->head + RECORD_SUM_AT,
	      head_sum(r->head, r->head + RECORD_HEAD, r->obj->len, r->seg->salt));
}

uint64_t journal_record_data_size(const struct record *r)
{
	return r->type == RECORD_DATA ? align_up(r->len, PAD) : 0;
}

uint64_t journal_record_size(const struct record *r)
{
	return r->head_len + journal_record_data_size(r);
}

/* Numbers that a good checksum may not excuse. */
static bool is_sound(const struct record *r, uint64_t data_len, uint64_t room)
{
	if (r->type < RECORD_DATA || r->type > RECORD_VOID || r->len > UINT64_MAX - r->off)
		return false;
	if (r->type != RECORD_DATA)
		return data_len == 0;
	room -= r->head_len; /* of the data, with its padding */
	return data_len == r->len && r->len && r->len <= room && align_up(r->len, PAD) <= room;
}

bool journal_record_parse(const uint8_t *from, uint64_t len, const struct segment *seg,
			  uint64_t after, struct record *r, struct obj *obj)
{
	char name[OBJ_NAME_MAX + 1] = "";
	uint16_t name_len;

	if (len < RECORD_HEAD || memcmp(from, record_magic, sizeof(record_magic)) != 0)
		return false;
	name_len = get16(from + 6);
	*r = (struct record){
		.type = get16(from + 4),
		.obj = obj,
		.seq = get64(from + 8),
		.off = get64(from + 16),
		.len = get64(from + 24),
		.head_len = (uint16_t)align_up(RECORD_HEAD + (uint64_t)name_len, PAD),
	};
	r->at = r->head_len;
	if (name_len > OBJ_NAME_MAX || r->head_len > len || r->seq <= after ||
	    get64(from + RECORD_SUM_AT) !=
		    head_sum(from, from + RECORD_HEAD, name_len, seg->salt) ||
	    !is_sound(r, get64(from + 40), len))
		return false;
	memcpy(name, from + RECORD_HEAD, name_len);
	*obj = obj_none;
	if (name_len && (obj_set(obj, name) != 0 || obj->len != name_len))
		return false;
	/* Its head alone, for journal_record_data_is_good(). */
	memcpy(r->head, from, RECORD_HEAD);
	return true;
}

bool journal_record_data_is_good(const uint8_t *from, const struct record *r)
{
	return r->type != RECORD_DATA || get64(r->head + 32) == XXH3_64bits(from + r->at, r->len);
}

uint64_t journal_record_synced(const struct record *r)
{
	return get64(r->head + SYNCED_AT);
}
