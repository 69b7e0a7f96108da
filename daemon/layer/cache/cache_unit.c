/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * One unit on its way below: parts of a disk, or of an object where parts can be written, in as few
 * requests as they allow; else the whole object with what is there of it. All of it goes through
 * memory's cache, which knows then what is below.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "layer/cache/cache_int.h"
#include "nbdrs/buf.h"
#include "nbdrs/cleanup.h"

/* The longest write. */
enum { SEND_MAX = 4 << 20 };

static CO_FN int read_part(struct back *b, const struct dirty_part *p, uint64_t off, uint64_t len,
			   uint8_t *to)
{
	struct iovec v;
	const struct iov iov = iov_one(&v, to, len);

	return journal_read(&b->journal, p->seg, p->at + (off - p->off), p->seq, &iov);
}

/* --- Parts ------------------------------------------------------------------------------------ */

/* The end of the data that begins at `from` in s->v[i], and goes on in the parts behind it. */
static uint64_t run_end(const struct snapshot *s, size_t i, uint64_t from)
{
	uint64_t end = s->v[i].end;

	while (++i < s->n && s->v[i].off == end && s->v[i].type == RECORD_DATA)
		end = s->v[i].end;
	return MIN(end, from + SEND_MAX);
}

static CO_FN int send_run(struct back *b, const struct unit *u, const struct snapshot *s, size_t i,
			  uint64_t from, uint64_t end)
{
	uint8_t *buf = buf_get(end - from);
	struct iovec v;
	const struct iov iov = iov_one(&v, buf, end - from);
	int rc = buf ? 0 : -ENOMEM;

	for (uint64_t at = from; at < end && !rc; i++) {
		const uint64_t to = MIN(s->v[i].end, end);

		rc = read_part(b, &s->v[i], at, to - at, buf + (at - from));
		at = to;
	}
	if (!rc)
		rc = through_write(b->chan, (struct ext){ &u->obj, from, end - from }, &iov, 0);
	buf_put(buf, end - from);
	return rc;
}

/* Zeroes make no object longer: where data once ended that was zeroed since, a byte is written. */
static CO_FN int keep_length(struct back *b, const struct unit *u, const struct snapshot *s)
{
	const uint64_t last = s->data_end - 1;
	struct iovec v;
	const struct iov iov = iov_one(&v, (char[]){ 0 }, 1);

	for (size_t i = 0; i < s->n; i++)
		if (s->v[i].off <= last && last < s->v[i].end && s->v[i].type != RECORD_DATA)
			return through_write(b->chan, (struct ext){ &u->obj, last, 1 }, &iov, 0);
	return 0;
}

static CO_FN int send_parts(struct back *b, const struct unit *u, const struct snapshot *s)
{
	size_t i = 0;
	int rc = 0;

	if (s->is_gone)
		rc = through_del(b->chan, &u->obj, 1);
	if (!rc && s->data_end && b->l->is_keyed)
		rc = keep_length(b, u, s);
	for (uint64_t at = 0; i < s->n && !rc;) {
		const struct dirty_part *p = &s->v[i];

		at = MAX(at, p->off);
		if (p->type == RECORD_DATA) {
			const uint64_t end = run_end(s, i, at);

			rc = send_run(b, u, s, i, at, end);
			at = end;
		} else {
			rc = through_zero(b->chan, (struct ext){ &u->obj, at, p->end - at },
					  p->type == RECORD_ZERO ? IO_PUNCH : 0);
			at = p->end;
		}
		while (i < s->n && s->v[i].end <= at)
			i++;
	}
	return rc;
}

/* --- Whole objects ---------------------------------------------------------------------------- */

static bool covers(const struct snapshot *s, uint64_t end)
{
	uint64_t at = 0;

	for (size_t i = 0; i < s->n && s->v[i].off == at && at < end; i++)
		at = s->v[i].end;
	return at >= end;
}

static CO_FN int lay_over(struct back *b, const struct snapshot *s, uint8_t *to, uint64_t size)
{
	int rc = 0;

	for (size_t i = 0; i < s->n && !rc; i++) {
		const struct dirty_part *p = &s->v[i];
		const uint64_t end = MIN(p->end, size);

		if (p->off >= end)
			continue;
		if (p->type == RECORD_DATA)
			rc = read_part(b, p, p->off, end - p->off, to + p->off);
		else
			memset(to + p->off, 0, end - p->off);
	}
	return rc;
}

/* Room for an object; what is in it is undefined. New memory costs as much as the copy into it. */
static void *room_get(size_t len)
{
	void *p;

	if (len <= BUF_MAX)
		return buf_get(len);
	p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

static void room_put(void *p, size_t len)
{
	if (len <= BUF_MAX)
		buf_put(p, len);
	else
		(void)munmap(p, len); /* can't fail for ours */
}

/* `there`: bytes of the object that is there. */
static CO_FN int put_whole(struct back *b, const struct unit *u, const struct snapshot *s,
			   uint64_t there, uint64_t size)
{
	const size_t room = MAX(size, UINT64_C(1));
	uint8_t *buf = room_get(room);
	struct iovec v;
	struct iov iov = iov_one(&v, buf, there);
	int rc = 0;

	if (!buf)
		return -ENOMEM;
	if (size > there && !covers(s, size))
		memset(buf + there, 0, size - there);
	if (there && !covers(s, there))
		rc = through_read(b->chan, (struct ext){ &u->obj, 0, there }, &iov, 0);
	if (!rc)
		rc = lay_over(b, s, buf, size);
	if (!rc) {
		const struct put p = { .obj = &u->obj, .iov = &iov, .cond = PUT_ALWAYS };

		iov = iov_one(&v, buf, size);
		rc = through_put(b->chan, &p, NULL);
	}
	room_put(buf, room);
	return rc;
}

static CO_FN int send_whole(struct back *b, const struct unit *u, const struct snapshot *s)
{
	const uint64_t end = s->data_end;
	struct obj_stat st = { .size = 0 };
	int rc;

	if (s->is_gone)
		return end ? put_whole(b, u, s, 0, end) : through_del(b->chan, &u->obj, 1);
	/*
	 * Also when all that is known of it is here: a longer one may be there, from before this cache,
	 * and what it has behind that would be gone with the put.
	 */
	rc = ch_stat(b->chan->kids[0], &u->obj, &st);
	if (rc == -ENOENT && !end)
		return 0; /* zeroes of nothing */
	if (rc && rc != -ENOENT)
		return rc;
	return put_whole(b, u, s, st.size, MAX(st.size, end));
}

int unit_send(struct back *b, const struct unit *u, const struct snapshot *s)
{
	return b->is_whole ? send_whole(b, u, s) : send_parts(b, u, s);
}
