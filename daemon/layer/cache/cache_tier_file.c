/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The disk tier's files: their format, finding out at start whose they are and what of them is to be
 * trusted, removing them. Formats are in cache_tier_int.h.
 */
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>

#include "layer/cache/cache_journal.h"
#include "layer/cache/cache_tier_int.h"
#include "nbdrs/buf.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/identity.h"
#include "nbdrs/io.h"
#include "nbdrs/log.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

enum { VERSION = 2, LOAD_LEN = 256 << 10 };

/* Tries for a file that a killed daemon's ring still writes to. */
enum { LOCK_TRIES = 150 };
#define LOCK_PAUSE_NS UINT64_C(20000000)

static const char magic[8] = "nbdrs\rT\n";
static const char *const file_names[] = { "tier-index", "tier-data", "tier-marks" };

struct head {
	char magic[8];
	uint32_t version, granule;
	uint64_t slots, id, volume_sum;
	uint64_t disk_size, is_keyed;
	char identity[IDENTITY_LEN + 8];
	char volume[424]; /* shortened; both end with NUL */
	uint64_t sum;
};

_Static_assert(sizeof(struct head) == 512, "a sector");

struct entry {
	uint64_t sum;
	struct tier_key key;
	uint64_t n;
	uint32_t region, used;
	uint32_t sums[];
};

/* --- Checksums -------------------------------------------------------------------------------- */

struct tier_key tier_key_of(const char *name, uint16_t name_len, uint64_t n)
{
	uint8_t all[OBJ_NAME_MAX + sizeof(n)];
	XXH128_hash_t h;

	memcpy(all, &n, sizeof(n));
	memcpy(all + sizeof(n), name, name_len);
	h = XXH3_128bits(all, sizeof(n) + name_len);
	return (struct tier_key){ h.low64, h.high64 };
}

uint32_t tier_block_sum(const struct tier_key *key, uint32_t block, const uint8_t *data)
{
	const uint32_t sum = (uint32_t)XXH3_64bits_withSeed(data, TIER_BLOCK, key->hi + block);

	return sum ? sum : 1;
}

uint64_t tier_sum(const struct tier *t, const void *data, size_t len, uint64_t what)
{
	return XXH3_64bits_withSeed(data, len, t->id + what);
}

/* --- Entries ---------------------------------------------------------------------------------- */

static uint64_t entry_sum(const struct tier *t, const uint8_t *entry, uint64_t slot)
{
	return tier_sum(t, entry + sizeof(uint64_t), t->entry_len - sizeof(uint64_t), slot);
}

void tier_entry_seal(const struct tier *t, uint8_t *entry, uint64_t slot)
{
	((struct entry *)(void *)entry)->sum = entry_sum(t, entry, slot);
}

void tier_entry_make(struct tier *t, const struct tier_job *job, uint64_t slot)
{
	struct entry *e = (struct entry *)(void *)t->entry;

	memset(e, 0, t->entry_len);
	if (!job)
		return; /* zeroes are no good entry */
	e->key = job->key;
	e->n = job->n;
	e->region = job->region;
	e->used = 1;
	for (uint32_t b = 0; b < t->blocks; b++)
		e->sums[b] = tier_block_sum(&job->key, b, job->data + (size_t)b * TIER_BLOCK);
	tier_entry_seal(t, t->entry, slot);
}

bool tier_entry_is_good(const struct tier *t, const uint8_t *entry, uint64_t slot)
{
	const struct entry *e = (const struct entry *)(const void *)entry;

	return e->used == 1 && e->region < REGIONS && e->sum == entry_sum(t, entry, slot);
}

uint64_t tier_entry_key(const uint8_t *entry)
{
	return ((const struct entry *)(const void *)entry)->key.lo;
}

uint8_t *tier_entry_sums(uint8_t *entry)
{
	return entry + offsetof(struct entry, sums);
}

CO_FN int tier_entry_write(struct tier *t, uint64_t slot)
{
	struct iovec v = { t->entry, t->entry_len };

	return io_pwrite_full(t->index_fd, &v, 1, TIER_HEAD + slot * t->entry_len, 0);
}

CO_FN int tier_entry_read(struct tier *t, uint64_t slot)
{
	struct iovec v = { t->entry, t->entry_len };

	return io_pread_full(t->index_fd, &v, 1, TIER_HEAD + slot * t->entry_len);
}

/* --- The head --------------------------------------------------------------------------------- */

static void head_make(const struct tier *t, struct head *h)
{
	const char *volume = t->conf.volume;

	memset(h, 0, sizeof(*h));
	memcpy(h->magic, magic, sizeof(magic));
	h->version = VERSION;
	h->granule = t->conf.granule;
	h->slots = t->slots_n;
	h->id = t->id;
	h->volume_sum = XXH3_64bits(volume, strlen(volume));
	h->disk_size = t->conf.disk_size;
	h->is_keyed = t->conf.is_keyed;
	(void)snprintf(h->identity, sizeof(h->identity), "%s", t->conf.identity);
	(void)snprintf(h->volume, sizeof(h->volume), "%s", volume);
	h->sum = XXH3_64bits(h, offsetof(struct head, sum));
}

static bool head_is_good(const struct head *h)
{
	return memcmp(h->magic, magic, sizeof(magic)) == 0 && h->version == VERSION &&
	       h->sum == XXH3_64bits(h, offsetof(struct head, sum)) &&
	       memchr(h->identity, '\0', sizeof(h->identity)) &&
	       memchr(h->volume, '\0', sizeof(h->volume));
}

static bool head_is_of(const struct head *h, const char *volume)
{
	return h->volume_sum == XXH3_64bits(volume, strlen(volume)) &&
	       strncmp(h->volume, volume, sizeof(h->volume) - 1) == 0;
}

/* Why what is there can't be used; NULL = it can. */
static const char *judge(const struct tier *t, const struct head *h)
{
	if (!head_is_good(h))
		return "no good head";
	if (!head_is_of(h, t->conf.volume))
		return "another volume";
	if (strcmp(h->identity, t->conf.identity) != 0)
		return "another volume of this name";
	/* Another disk may have got its name. */
	if (!*h->identity && !t->conf.is_named)
		return "nothing but its name says that it is the same volume; say volume=";
	if (h->granule != t->conf.granule || h->slots != t->slots_n)
		return "another size";
	/* What happened in the other place was not noted here. */
	if (h->is_keyed != t->conf.is_keyed)
		return "it was above the mapping, and is below it, or the other way round";
	/* Behind a former end may be what was there once. */
	if (h->disk_size != t->conf.disk_size)
		return "another size of the disk";
	return t->conf.keeps ? NULL : "not to be kept";
}

/* --- Reading what is there -------------------------------------------------------------------- */

static uint64_t load_entry(struct tier *t, uint8_t *from, uint64_t slot)
{
	const struct entry *e = (const struct entry *)(const void *)from;

	if (!tier_entry_is_good(t, from, slot)) {
		/* It may be good when it is read again: it goes before any mark does. */
		if (e->used || e->sum)
			tier_index_stale(t, slot);
		return 0;
	}
	t->last = MAX(t->last, e->n);
	if (!tier_is_marked(t, e->region) &&
	    tier_index_add(t, slot, e->key.lo, (const uint8_t *)e->sums))
		return 1;
	tier_index_stale(t, slot);
	return 0;
}

static CO_FN int load(struct tier *t)
{
	const uint64_t step = LOAD_LEN / t->entry_len;
	uint8_t *buf = buf_get(LOAD_LEN);
	uint64_t used = 0;
	int rc = buf ? tier_marks_read(t) : -ENOMEM;

	for (uint64_t slot = 0; slot < t->slots_n && !rc; slot += step) {
		const uint64_t n = MIN(step, t->slots_n - slot);
		struct iovec v = { buf, n * t->entry_len };

		rc = io_pread_full(t->index_fd, &v, 1, TIER_HEAD + slot * t->entry_len);
		for (uint64_t k = 0; k < n && !rc; k++)
			used += load_entry(t, buf + k * t->entry_len, slot + k);
		co_yield();
	}
	buf_put(buf, LOAD_LEN);
	if (!rc)
		log_info("%s: cached data found on disk folder=%s bytes=%llu marks=%llu",
			 t->conf.name, t->conf.folder, (unsigned long long)used * t->conf.granule,
			 (unsigned long long)atomic_load(&t->marks.n));
	return rc;
}

static CO_FN int head_write(struct tier *t)
{
	struct head h;
	struct iovec v = { &h, sizeof(h) };
	int rc;

	head_make(t, &h);
	rc = io_pwrite_full(t->index_fd, &v, 1, 0, 0);
	return rc ? rc : io_fdatasync(t->index_fd);
}

void tier_resize(struct tier *t, uint64_t size)
{
	int rc;

	if (!t || !atomic_load(&t->is_on))
		return;
	t->conf.disk_size = size;
	rc = head_write(t);
	if (rc)
		tier_give_up(t, "index", rc);
}

/* Made anew. What is there has another id, so nothing of it is good any more. */
static CO_FN int format(struct tier *t)
{
	int rc;

	t->id = random_start();
	rc = io_ftruncate(t->index_fd, TIER_HEAD + t->slots_n * t->entry_len);
	if (!rc)
		rc = io_ftruncate(t->data_fd, t->slots_n * t->conf.granule);
	if (!rc)
		rc = head_write(t);
	if (!rc)
		rc = tier_marks_write(t);
	return rc ? rc : io_fsync(t->dir_fd);
}

/* --- Opening ---------------------------------------------------------------------------------- */

/* A killed daemon's last write may still be on its way: then its file is locked. */
static CO_FN int lock_file(int fd)
{
	int rc = 0;

	for (unsigned i = 0; i < LOCK_TRIES; i++) {
		rc = io_flock(fd, LOCK_EX);
		if (rc != -EWOULDBLOCK)
			break;
		co_sleep(LOCK_PAUSE_NS);
	}
	return rc == -EWOULDBLOCK ? rc : 0; /* a file system without locks */
}

static CO_FN int open_file(struct tier *t, const char *name, int *fd)
{
	*fd = io_openat(t->dir_fd, name, O_RDWR | O_CREAT, 0600);
	return *fd < 0 ? *fd : lock_file(*fd);
}

static CO_FN int open_all(struct tier *t)
{
	struct head h = { .version = 0 };
	struct iovec v = { &h, sizeof(h) };
	struct stat st;
	const char *why;
	int rc = open_file(t, file_names[0], &t->index_fd);

	if (!rc)
		rc = open_file(t, file_names[1], &t->data_fd);
	if (!rc)
		rc = open_file(t, file_names[2], &t->marks_fd);
	if (!rc)
		rc = io_fstat(t->index_fd, &st);
	if (rc)
		return rc;
	if (st.st_size == (off_t)(TIER_HEAD + t->slots_n * t->entry_len))
		rc = io_pread_full(t->index_fd, &v, 1, 0);
	if (rc)
		return rc;
	why = judge(t, &h);
	if (!why) {
		t->id = h.id;
		return load(t);
	}
	if (st.st_size)
		log_info("%s: cached data on disk is not used folder=%s reason=%s", t->conf.name,
			 t->conf.folder, why);
	return format(t);
}

CO_FN void tier_files_close(struct tier *t)
{
	int *const fds[] = { &t->index_fd, &t->data_fd, &t->marks_fd };

	for (unsigned i = 0; i < ARRAY_LEN(fds); i++) {
		if (*fds[i] >= 0)
			(void)io_close(*fds[i]); /* what must be stable has been synced */
		*fds[i] = -1;
	}
}

CO_FN int tier_files_remove(int dir_fd)
{
	int rc = 0;

	for (unsigned i = 0; i < ARRAY_LEN(file_names); i++) {
		const int one = io_unlinkat(dir_fd, file_names[i], 0);

		if (one && one != -ENOENT && !rc)
			rc = one;
	}
	/* Also when nothing is there: who removed it may not have come to this. */
	return rc ? rc : io_fsync(dir_fd);
}

CO_FN int tier_files_open(struct tier *t, struct err *err)
{
	int rc = open_all(t), removed;

	if (!rc) {
		atomic_store(&t->is_on, true);
		return 0;
	}
	if (rc == -EWOULDBLOCK)
		return err_set(err, -EBUSY, "layer cache: %s: its files tier-* are in use",
			       t->conf.folder);
	atomic_fetch_add(&t->errors, 1);
	log_warn("%s: no data is cached on disk folder=%s error=%s", t->conf.name, t->conf.folder,
		 err_name(rc));
	/* What changes below from now on is not noted there. */
	removed = tier_files_remove(t->dir_fd);
	return removed ? err_set(err, removed,
				 "layer cache: %s: its files tier-* cannot be used (%s) nor removed; remove "
				 "them",
				 t->conf.folder, err_name(rc))
		       : 0;
}

/* --- Removing --------------------------------------------------------------------------------- */

/* That of the disk as an export of whatever name: back_volume() puts it behind. */
static bool head_is_of_export(const struct head *h, const char *volume)
{
	const size_t len = strlen(volume);

	return strlen(h->volume) + 1 < sizeof(h->volume) && strncmp(h->volume, volume, len) == 0 &&
	       strncmp(h->volume + len, " (", 2) == 0;
}

/* Is there a head that says it is the volume's? */
static CO_FN bool is_of(int dir_fd, const struct journal_removal *r)
{
	struct head h;
	struct iovec v = { &h, sizeof(h) };
	const int fd = io_openat(dir_fd, file_names[0], O_RDONLY, 0);
	int rc;

	if (fd < 0)
		return false;
	rc = io_pread_full(fd, &v, 1, 0);
	(void)io_close(fd); /* only read */
	return !rc && head_is_good(&h) &&
	       (head_is_of(&h, r->volume) || (r->any_export && head_is_of_export(&h, r->volume)));
}

int tier_remove(const struct journal_removal *r, struct err *err)
{
	int rc;

	if (r->dir_fd < 0 || (r->volume && !is_of(r->dir_fd, r)))
		return 0;
	rc = tier_files_remove(r->dir_fd);
	return rc ? err_set(err, rc, "layer cache: %s: tier-* cannot be removed: %s", r->folder,
			    strerror(-rc))
		  : 0;
}
