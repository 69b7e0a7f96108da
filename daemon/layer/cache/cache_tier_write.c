/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The disk tier's one writer: a fiber that writes what is queued, a granule and then its entry, and
 * between that makes the index on disk agree with the one in memory, so that marks can go. Before
 * that the layer below is flushed, which may take long, so another fiber does it. All
 * writing to entries and data is its, so no write of an entry passes another one.
 *
 * Also the tier's life: opening, and an end after which everything in the files is good.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/cache/cache_journal.h"
#include "layer/cache/cache_tier_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"
#include "nbdrs/log.h"

#define NS_PER_S UINT64_C(1000000000)
#define CLEAN_NS (10 * NS_PER_S)
#define LOOK_NS  (CLEAN_NS / 4)
#define TRY_NS   (16 * CLEAN_NS) /* the longest time between tries that fail */
#define PAUSE_NS NS_PER_S

enum { QUEUE_LEN = 16 << 20 }; /* bytes, but for very large granules */
enum { LOOK_MAX = 4096 };      /* slots that are looked at with their lock held */

/* --- What is queued --------------------------------------------------------------------------- */

static CO_FN int write_granule(struct tier *t, const struct tier_job *job)
{
	const uint64_t slot = job->stripe->first + job->slot - 1;
	struct iovec v = { job->data, t->conf.granule };
	int rc = io_pwrite_full(t->data_fd, &v, 1, slot * t->conf.granule, 0);

	if (rc || !tier_job_is_wanted(job))
		return rc;
	tier_entry_make(t, job, slot);
	return tier_entry_write(t, slot);
}

/* With the lock held, but not while it writes. */
static CO_FN void do_job(struct tier *t)
{
	const struct tier_job job = t->jobs[t->jobs_at];
	bool is_wanted;
	int rc = 0;

	pthread_mutex_unlock(&t->lock);
	is_wanted = atomic_load(&t->is_on) && tier_job_is_wanted(&job);
	if (is_wanted) {
		rc = write_granule(t, &job);
		atomic_fetch_add_explicit(&t->writes, 1, memory_order_relaxed);
	}
	tier_job_end(t, &job, is_wanted && !rc ? tier_entry_sums(t->entry) : NULL);
	t->conf.give_back(t->conf.arg, job.data);
	if (rc)
		atomic_fetch_add(&t->errors, 1);
	pthread_mutex_lock(&t->lock);
	if (rc)
		t->pause_until = now_ns() + PAUSE_NS;
	t->jobs_at = (t->jobs_at + 1) % TIER_JOBS_MAX;
	if (--t->jobs_n == 0)
		co_wq_wake_all(&t->idle);
}

/* --- The index on disk as the one in memory --------------------------------------------------- */

/* The checksums of what is still valid of the slot into t->entry; false when all of it has to go. */
static bool take_sums(struct tier *t, struct tier_stripe *s, uint32_t i)
{
	struct slot *g = &s->slots[i];
	bool is_valid;

	pthread_mutex_lock(&s->lock);
	g->is_stale = 0; /* from now on it is again what others make of it */
	is_valid = g->state == SLOT_VALID && g->key == tier_entry_key(t->entry);
	if (is_valid)
		memcpy(tier_entry_sums(t->entry), slot_sums(t, s, i), t->blocks * sizeof(*t->sums));
	pthread_mutex_unlock(&s->lock);
	return is_valid;
}

static bool is_zero(const uint8_t *p, size_t len)
{
	return !p[0] && memcmp(p, p + 1, len - 1) == 0;
}

static CO_FN int clean_slot(struct tier *t, struct tier_stripe *s, uint32_t i)
{
	const uint64_t slot = s->first + i - 1;
	int rc = tier_entry_read(t, slot);
	const bool is_good = !rc && tier_entry_is_good(t, t->entry, slot);

	if (take_sums(t, s, i) && is_good)
		tier_entry_seal(t, t->entry, slot);
	else if (!rc && is_zero(t->entry, t->entry_len))
		return 0; /* there never was one; a full disk has no room for it either */
	else
		tier_entry_make(t, NULL, slot);
	rc = tier_entry_write(t, slot);
	if (!rc)
		return 0;
	atomic_fetch_add(&t->errors, 1);
	pthread_mutex_lock(&s->lock);
	s->slots[i].is_stale = 1;
	pthread_mutex_unlock(&s->lock);
	return rc;
}

/* The next slot after i whose entry is stale; 0 = none. */
static CO_FN uint32_t next_stale(struct tier_stripe *s, uint32_t i)
{
	while (i < s->n) {
		const uint32_t end = MIN(i + LOOK_MAX, s->n);

		pthread_mutex_lock(&s->lock);
		while (i < end && !s->slots[i + 1].is_stale)
			i++;
		pthread_mutex_unlock(&s->lock);
		if (i < end)
			return i + 1;
		co_yield();
	}
	return 0;
}

static CO_FN int clean_index(struct tier *t)
{
	int rc = 0;

	for (unsigned k = 0; k < t->stripes_n && !rc; k++) {
		struct tier_stripe *s = &t->stripes[k];

		for (uint32_t i = 0; !rc && (i = next_stale(s, i)) != 0;)
			rc = now_ns() < atomic_load(&t->clean_until) ? clean_slot(t, s, i)
								     : -ETIMEDOUT;
	}
	return rc;
}

/* After a flush below: marks of regions that are quiet since `before` go. -errno: they stay. */
static CO_FN int clean(struct tier *t, uint64_t before)
{
	int rc = clean_index(t);

	if (rc)
		return rc;
	rc = io_fdatasync(t->index_fd);
	if (rc) /* a second one would say that all is well */
		tier_give_up(t, "index", rc);
	else
		tier_marks_take_off(t, before);
	return rc;
}

/* --- The fiber -------------------------------------------------------------------------------- */

static CO_FN void flush_below(void *arg)
{
	struct tier *t = arg;
	const int rc = t->conf.flush(t->conf.arg);

	pthread_mutex_lock(&t->lock);
	t->flush_rc = rc;
	t->is_flushed = true;
	co_wq_wake_all(&t->work);
	pthread_mutex_unlock(&t->lock);
}

/* With the lock held, but not meanwhile. */
static CO_FN void begin_clean(struct tier *t, uint64_t now)
{
	const uint64_t before = now > CLEAN_NS ? now - CLEAN_NS : 0;

	t->flush_before = before;
	t->is_flushing = true;
	t->is_flushed = false;
	pthread_mutex_unlock(&t->lock);
	if (!tier_marks_due(t, before) || co_spawn(flush_below, t) != 0) {
		pthread_mutex_lock(&t->lock);
		t->is_flushing = false; /* not yet */
	} else {
		pthread_mutex_lock(&t->lock);
	}
}

/* The same. How long to wait before the next: a store or a disk that fails is not asked all the time. */
static CO_FN uint64_t end_clean(struct tier *t, uint64_t pause)
{
	const uint64_t before = t->flush_before;
	int rc = t->flush_rc;

	pthread_mutex_unlock(&t->lock);
	if (!rc && atomic_load(&t->is_on))
		rc = clean(t, before);
	pthread_mutex_lock(&t->lock);
	t->is_flushing = false;
	return rc ? MIN(2 * pause, TRY_NS) : LOOK_NS;
}

/* The same. */
static CO_FN void sleep_some(struct tier *t)
{
	const uint64_t now = now_ns();

	if (t->is_flushing || !atomic_load(&t->marks.n)) {
		co_wq_wait(&t->work, &t->lock);
	} else if (co_wq_wait_for(&t->work, &t->lock, LOOK_NS) == -ETIMEDOUT &&
		   now_ns() - now < LOOK_NS) {
		pthread_mutex_unlock(&t->lock); /* no memory for a timer */
		co_yield();
		pthread_mutex_lock(&t->lock);
	}
}

CO_FN void tier_writer(void *arg)
{
	struct tier *t = arg;
	uint64_t clean_at = 0, pause = LOOK_NS;

	pthread_mutex_lock(&t->lock);
	while (!t->is_stopping || t->jobs_n || t->is_flushing) {
		const uint64_t now = now_ns();

		if (t->is_flushing && t->is_flushed) {
			pause = end_clean(t, pause);
			clean_at = now_ns() + pause;
		} else if (now >= clean_at && !t->is_stopping && !t->is_flushing &&
			   atomic_load(&t->is_on) && atomic_load(&t->marks.n)) {
			clean_at = now + LOOK_NS;
			begin_clean(t, now);
		} else if (t->jobs_n) {
			do_job(t);
		} else {
			sleep_some(t);
		}
	}
	t->has_writer = false;
	co_wq_wake_all(&t->idle);
	pthread_mutex_unlock(&t->lock);
}

void tier_wait(struct tier *t)
{
	if (!t)
		return;
	pthread_mutex_lock(&t->lock);
	while (t->jobs_n)
		co_wq_wait(&t->idle, &t->lock);
	pthread_mutex_unlock(&t->lock);
}

/* --- The folder ------------------------------------------------------------------------------- */

/* The journal's way: made if it is not there, locked. */
static CO_FN int folder_open(struct tier *t, struct err *err)
{
	struct journal *j = calloc(1, sizeof(*j));
	int rc;

	if (!j)
		return err_set(err, -ENOMEM, "out of memory");
	j->conf.folder = t->conf.folder;
	j->dir_fd = -1;
	rc = journal_folder_open(j, err);
	t->dir_fd = j->dir_fd;
	free(j);
	return rc;
}

/* Who writes through would not see what is only in a journal. */
static CO_FN int refuse_unsaved(struct tier *t, struct err *err)
{
	_cleanup_free_ uint32_t *files = NULL;
	size_t n = 0;
	int rc = journal_folder_list(t->dir_fd, &files, &n);

	for (size_t i = 0; i < n && !rc; i++) {
		uint8_t bytes[SEGMENT_HEADS];
		struct segment_head head;
		uint64_t size;
		char name[32];
		int fd;

		segment_name(files[i], name, sizeof(name));
		fd = io_openat(t->dir_fd, name, O_RDONLY, 0);
		rc = fd < 0 ? fd : segment_read_heads(fd, &size, bytes);
		if (fd >= 0)
			(void)io_close(fd); /* only read */
		if (!rc && segment_head_read(bytes, &head) != HEAD_SPARE)
			return err_set(
				err, -EBUSY,
				"layer cache: %s has a journal with data that is not in the store yet; serve it "
				"with mode=writeback until it is",
				t->conf.folder);
	}
	return rc ? err_set(err, rc, "layer cache: %s: the journal there cannot be read: %s",
			    t->conf.folder, err_name(rc))
		  : 0;
}

/* --- Life ------------------------------------------------------------------------------------- */

static CO_FN int init(struct tier *t)
{
	const uint64_t granule = t->conf.granule;
	int rc;

	(void)pthread_mutex_init(&t->lock, NULL); /* can't fail for a default one */
	co_wq_init(&t->work);
	co_wq_init(&t->idle);
	t->dir_fd = t->index_fd = t->data_fd = t->marks_fd = -1;
	t->shift = (unsigned)__builtin_ctzll(granule);
	t->blocks = (uint32_t)(granule / TIER_BLOCK);
	t->entry_len = (uint32_t)align_up(40 + 4 * (uint64_t)t->blocks, 64);
	t->slots_n = MIN(t->conf.size / (granule + t->entry_len), (uint64_t)UINT32_MAX / 2);
	t->jobs_max = (unsigned)MIN(MAX(QUEUE_LEN / granule, UINT64_C(4)), (uint64_t)TIER_JOBS_MAX);
	atomic_store(&t->clean_until, UINT64_MAX);
	t->home = reactor_self();
	t->entry = malloc(t->entry_len);
	rc = tier_marks_init(t);
	if (!rc)
		rc = tier_index_init(t);
	return t->entry ? rc : -ENOMEM;
}

static CO_FN void free_tier(struct tier *t)
{
	tier_files_close(t);
	if (t->dir_fd >= 0 && t->dir_fd != t->conf.dir_fd)
		(void)io_close(t->dir_fd); /* only looked at */
	tier_index_free(t);
	tier_marks_free(t);
	(void)pthread_mutex_destroy(&t->lock);
	free(t->entry);
	free(t);
}

int tier_open(const struct tier_conf *conf, struct tier **out, struct err *err)
{
	struct tier *t = calloc(1, sizeof(*t));
	int rc;

	if (!t)
		return err_set(err, -ENOMEM, "out of memory");
	t->conf = *conf;
	(void)snprintf(t->identity, sizeof(t->identity), "%s", conf->identity);
	t->conf.identity = t->identity;
	rc = init(t);
	if (rc)
		(void)err_set(err, rc, "layer cache: no memory for the index of %s", conf->folder);
	t->dir_fd = conf->dir_fd;
	if (!rc && conf->dir_fd < 0) {
		rc = folder_open(t, err);
		if (!rc)
			rc = refuse_unsaved(t, err);
	}
	if (!rc)
		rc = tier_files_open(t, err);
	if (rc) {
		free_tier(t);
		return rc;
	}
	t->marks.is_over = !atomic_load(&t->is_on);
	/* No co_group: without memory that would run it here, until the end. */
	t->has_writer = true;
	rc = co_spawn(tier_writer, t);
	if (rc) {
		free_tier(t);
		return err_set(err, rc, "out of memory");
	}
	*out = t;
	return 0;
}

/* Without marks nothing has to be stable; but what is known not to be there need not be found again. */
static CO_FN int clean_all(struct tier *t, uint64_t ns)
{
	const bool is_any = atomic_load(&t->marks.n);
	int rc = is_any ? t->conf.flush(t->conf.arg) : 0;

	atomic_store(&t->clean_until, now_ns() + ns);
	if (rc)
		return rc;
	return is_any ? clean(t, UINT64_MAX) : clean_index(t);
}

void tier_close(struct tier *t, bool cleans, uint64_t ns)
{
	if (!t)
		return;
	atomic_store(&t->clean_until, now_ns() + ns); /* of the writer's */
	pthread_mutex_lock(&t->lock);
	t->is_stopping = true;
	co_wq_wake_all(&t->work);
	while (t->has_writer)
		co_wq_wait(&t->idle, &t->lock);
	pthread_mutex_unlock(&t->lock);
	if (cleans && atomic_load(&t->is_on) && clean_all(t, ns) != 0)
		log_info("%s: of the data cached on disk some will not be used folder=%s",
			 t->conf.name, t->conf.folder);
	free_tier(t);
}
