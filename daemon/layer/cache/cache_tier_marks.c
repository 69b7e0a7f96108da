/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The record of where the files may be wrong after a crash: regions with changes that began since the
 * last time that the layer below was flushed and the index was made to agree with it. Why, and when a
 * mark goes, is in docs/consistency.md, "Clean data on disk".
 *
 * A change marks its regions, then waits until they are on disk; those that come meanwhile share the
 * next sync. Once all is marked this costs a lock and no I/O.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "layer/cache/cache_tier_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"
#include "nbdrs/log.h"

enum { OBJECTS_SHIFT = 4 };

int tier_marks_init(struct tier *t)
{
	struct tier_marks *m = &t->marks;

	(void)pthread_mutex_init(&m->lock, NULL); /* can't fail for a default one */
	co_wq_init(&m->wq);
	m->regions = calloc(REGIONS, sizeof(*m->regions));
	return m->regions ? 0 : -ENOMEM;
}

void tier_marks_free(struct tier *t)
{
	free(t->marks.regions);
	(void)pthread_mutex_destroy(&t->marks.lock);
}

/*
 * Of a disk, by place. Objects by name, without the low bits of the number at its end: "block-32" to
 * "block-47" are neighbours.
 */
uint32_t tier_region_of(const struct tier *t, const char *name, uint16_t name_len, uint64_t off)
{
	uint64_t number = 0, unit = 1;
	uint16_t end = name_len;

	if (!t->conf.is_keyed)
		return (uint32_t)((off >> REGION_SHIFT) % REGIONS);
	for (; end && name[end - 1] >= '0' && name[end - 1] <= '9'; end--, unit *= 10)
		number += unit * (uint64_t)(name[end - 1] - '0');
	return (uint32_t)(tier_key_of(name, end, number >> OBJECTS_SHIFT).lo % REGIONS);
}

/* --- On disk ---------------------------------------------------------------------------------- */

struct page {
	uint8_t bytes[MARK_SECTORS][MARK_SECTOR];
};

static uint64_t sector_sum(const struct tier *t, const uint8_t *sector, unsigned i)
{
	return tier_sum(t, sector, MARK_BYTES, UINT64_MAX - i);
}

/* With the lock held. */
static void fill_page(struct tier *t, struct page *p)
{
	memset(p, 0, sizeof(*p));
	for (uint32_t i = 0; i < REGIONS; i++)
		if (t->marks.regions[i].is_marked)
			p->bytes[i / 8 / MARK_BYTES][i / 8 % MARK_BYTES] |= (uint8_t)(1U << i % 8);
	for (unsigned k = 0; k < MARK_SECTORS; k++) {
		const uint64_t sum = sector_sum(t, p->bytes[k], k);

		memcpy(p->bytes[k] + MARK_BYTES, &sum, sizeof(sum));
	}
}

/* With the lock held, but not meanwhile; nobody else syncs. */
static CO_FN int sync_once(struct tier *t)
{
	struct tier_marks *m = &t->marks;
	const uint64_t upto = m->seq;
	struct page *p = malloc(sizeof(*p));
	struct iovec v = { p, sizeof(*p) };
	int rc = p ? 0 : -ENOMEM;

	m->is_syncing = true;
	if (p)
		fill_page(t, p);
	pthread_mutex_unlock(&m->lock);
	if (!rc)
		rc = io_pwrite_full(t->marks_fd, &v, 1, 0, 0);
	if (!rc)
		rc = io_fdatasync(t->marks_fd);
	free(p);
	if (rc)
		tier_give_up(t, "marks", rc);
	pthread_mutex_lock(&m->lock);
	if (!rc)
		m->synced = upto;
	m->is_syncing = false;
	co_wq_wake_all(&m->wq);
	return rc;
}

int tier_marks_write(struct tier *t)
{
	struct tier_marks *m = &t->marks;
	int rc;

	pthread_mutex_lock(&m->lock);
	while (m->is_syncing)
		co_wq_wait(&m->wq, &m->lock);
	rc = sync_once(t);
	pthread_mutex_unlock(&m->lock);
	return rc;
}

static bool sector_is_good(const struct tier *t, const uint8_t *sector, unsigned k)
{
	uint64_t sum;

	memcpy(&sum, sector + MARK_BYTES, sizeof(sum));
	return sum == sector_sum(t, sector, k);
}

CO_FN int tier_marks_read(struct tier *t)
{
	struct tier_marks *m = &t->marks;
	_cleanup_free_ struct page *p = calloc(1, sizeof(*p));
	struct iovec v = { p, sizeof(*p) };
	const uint64_t now = now_ns();
	bool is_bad[MARK_SECTORS];
	int rc;

	if (!p)
		return -ENOMEM;
	rc = io_pread_full(t->marks_fd, &v, 1, 0);
	if (rc)
		memset(p, 0, sizeof(*p)); /* no sum is good */
	for (unsigned k = 0; k < MARK_SECTORS; k++)
		is_bad[k] = !sector_is_good(t, p->bytes[k], k);
	for (uint32_t i = 0; i < REGIONS; i++) {
		const unsigned k = i / 8 / MARK_BYTES;

		m->regions[i].is_marked = is_bad[k] ||
					  (p->bytes[k][i / 8 % MARK_BYTES] >> i % 8 & 1);
		m->regions[i].at = now;
		m->n += m->regions[i].is_marked;
	}
	/*
	 * A bad sector may be good when it is read again, without what is marked here from now on; and what a
	 * killed daemon wrote last may be in the page cache only, and gone with a crash of the machine.
	 */
	return m->n ? tier_marks_write(t) : 0;
}

/* --- Changes ---------------------------------------------------------------------------------- */

/* The regions are first, ... of them, modulo REGIONS. */
static uint32_t regions_of(const struct tier *t, struct ext e, uint32_t *first)
{
	const uint64_t last = e.len > UINT64_MAX - e.off ? UINT64_MAX : e.off + e.len - 1;

	*first = tier_region_of(t, e.obj->name, e.obj->len, e.off);
	if (t->conf.is_keyed)
		return 1;
	return (uint32_t)MIN((last >> REGION_SHIFT) - (e.off >> REGION_SHIFT) + 1,
			     (uint64_t)REGIONS);
}

void tier_mark(struct tier *t, struct ext e)
{
	bool is_first = false;
	uint32_t first, n;

	if (!t || !e.len)
		return;
	n = regions_of(t, e, &first);
	pthread_mutex_lock(&t->marks.lock);
	for (uint32_t i = 0; i < n; i++) {
		struct region *r = &t->marks.regions[(first + i) % REGIONS];

		r->busy++;
		if (r->is_marked)
			continue;
		r->is_marked = true;
		r->seq = ++t->marks.seq;
		is_first |= atomic_fetch_add(&t->marks.n, 1) == 0;
	}
	pthread_mutex_unlock(&t->marks.lock);
	if (!is_first)
		return;
	pthread_mutex_lock(&t->lock);
	co_wq_wake_one(&t->work); /* it has something to do after a while */
	pthread_mutex_unlock(&t->lock);
}

void tier_settle(struct tier *t)
{
	struct tier_marks *m = t ? &t->marks : NULL;
	uint64_t target;

	if (!t)
		return;
	pthread_mutex_lock(&m->lock);
	target = m->seq;
	while (m->synced < target && !m->is_over) {
		if (m->is_syncing || !atomic_load(&t->is_on))
			co_wq_wait(&m->wq, &m->lock);
		else
			(void)sync_once(t); /* fails by turning the tier off */
	}
	pthread_mutex_unlock(&m->lock);
}

void tier_done(struct tier *t, struct ext e)
{
	const uint64_t now = now_ns();
	uint32_t first, n;

	if (!t || !e.len)
		return;
	n = regions_of(t, e, &first);
	pthread_mutex_lock(&t->marks.lock);
	for (uint32_t i = 0; i < n; i++) {
		struct region *r = &t->marks.regions[(first + i) % REGIONS];

		r->busy--;
		r->at = now;
	}
	pthread_mutex_unlock(&t->marks.lock);
}

/* --- Marks that go ---------------------------------------------------------------------------- */

static bool is_quiet(const struct region *r, uint64_t before)
{
	return r->is_marked && !r->busy && r->at <= before;
}

bool tier_is_marked(struct tier *t, uint32_t region)
{
	bool is_marked;

	pthread_mutex_lock(&t->marks.lock);
	is_marked = t->marks.regions[region].is_marked;
	pthread_mutex_unlock(&t->marks.lock);
	return is_marked;
}

bool tier_marks_due(struct tier *t, uint64_t before)
{
	uint32_t i = 0;

	pthread_mutex_lock(&t->marks.lock);
	while (i < REGIONS && !is_quiet(&t->marks.regions[i], before))
		i++;
	pthread_mutex_unlock(&t->marks.lock);
	return i < REGIONS;
}

CO_FN void tier_marks_take_off(struct tier *t, uint64_t before)
{
	pthread_mutex_lock(&t->marks.lock);
	for (uint32_t i = 0; i < REGIONS; i++) {
		struct region *r = &t->marks.regions[i];

		if (!is_quiet(r, before))
			continue;
		r->is_marked = false;
		atomic_fetch_sub(&t->marks.n, 1);
	}
	pthread_mutex_unlock(&t->marks.lock);
	(void)tier_marks_write(t); /* fails by turning the tier off */
}

/* --- When nothing helps ----------------------------------------------------------------------- */

void tier_give_up(struct tier *t, const char *what, int rc)
{
	atomic_fetch_add(&t->errors, 1);
	if (!atomic_exchange(&t->is_on, false))
		return;
	log_warn("%s: no data is cached on disk from now on folder=%s file=tier-%s error=%s",
		 t->conf.name, t->conf.folder, what, err_name(rc));
	rc = tier_files_remove(t->dir_fd);
	if (rc)
		log_error(
			"%s: the files tier-* in the cache's folder get too old and cannot be removed; remove them "
			"before the next start, or say keep=off folder=%s error=%s",
			t->conf.name, t->conf.folder, err_name(rc));
	pthread_mutex_lock(&t->marks.lock);
	t->marks.is_over = true;
	co_wq_wake_all(&t->marks.wq);
	pthread_mutex_unlock(&t->marks.lock);
}
