/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * cache: fast in front of slow. Above a mapping (cache:sharded:...) it keeps blocks of
 * the disk, below one (sharded:cache:...) pieces of objects; both in granules of one size, filled
 * by ranged reads.
 *
 *	mode=writethrough	a write is answered by the layer below; memory keeps what was read
 *				and written: cache_through.c, cache_table.c; what leaves memory goes
 *				to disk, where there is one: cache_tier.c, _marks, _file, _write
 *	mode=writeback		a write is answered when it is in a journal, on disk or in memory,
 *				and is sent below later. On top of the other mode, which is how it
 *				reads and writes below. Requests: cache_back.c, cache_objects.c; the
 *				journal: cache_journal.c, _room, _segment, _replay, _remove, _record; what
 *				of it is not below yet: cache_dirty.c, _queue; sending: cache_send.c,
 *				_pace, _unit
 *
 * When its volume is made or removed: cache_volume.c.
 *
 * Promises. Writing through: those of the layer below, for flush, FUA, trim, crash and several
 * writers; whatever fails below leaves nothing in the cache. Writing back: see docs/consistency.md.
 *
 * Where granules lie is cache_arena.c's to say; volumes are made and removed in cache_volume.c.
 *
 * Memory: `mem` (or less, with --cache-mem), and beyond it granules being fetched, or lent and dropped
 * since, which are at most as many as requests in flight need; some 100 bytes for each part of the journal that is not
 * below; for each unit on its way its data, or the object. For the disk 1.6 MiB for each GiB of it (with
 * granules of 64 KiB) and up to 16 MiB on its way there.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/cache/cache_int.h"
#include "layer/layers.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/opt.h"

#define SIZE_DISK UINT64_C(1 << 30)
#define SIZE_MEM  UINT64_C(128 << 20)

static const struct opt options[] = {
	{ .name = "mem",
	  .type = OPT_SIZE,
	  .field = offsetof(struct cache, mem),
	  .def = "256Mi",
	  .min = 1 << 20,
	  .max = UINT64_C(1) << 40,
	  .help = "memory for cached data" },
	{ .name = "granule",
	  .type = OPT_SIZE,
	  .field = offsetof(struct cache, granule),
	  .def = "64Ki",
	  .min = 4096,
	  .max = 4 << 20,
	  .help = "bytes fetched and kept together, a power of two" },
	{ .name = "mode",
	  .type = OPT_ENUM,
	  .field = offsetof(struct cache, mode),
	  .def = "writethrough",
	  .choices = "writethrough|writeback",
	  .help = "writeback: writes are answered before the layer below has them" },
	{ .name = "disk",
	  .type = OPT_STR,
	  .field = offsetof(struct cache, disk),
	  .help = "folder for cached data that leaves memory, and for the journal of writeback" },
	{ .name = "size",
	  .type = OPT_SIZE,
	  .field = offsetof(struct cache, size),
	  .min = 1 << 20,
	  .max = UINT64_C(1) << 40,
	  .help = "bytes in the folder (1Gi if absent): the journal, and cached data; without a folder the "
		  "journal's (128Mi)" },
	{ .name = "journal",
	  .type = OPT_SIZE,
	  .field = offsetof(struct cache, journal),
	  .min = 1 << 20,
	  .max = UINT64_C(1) << 40,
	  .help = "of these the journal's, at most 1Gi if absent; writers wait when it is full" },
	{ .name = "keep",
	  .type = OPT_BOOL,
	  .field = offsetof(struct cache, keep),
	  .def = "on",
	  .help = "use cached data of a former run; off when others write to the volume between" },
	{ .name = "durability",
	  .type = OPT_ENUM,
	  .field = offsetof(struct cache, durability),
	  .def = "auto",
	  .choices = "auto|local|remote",
	  .help = "where flushed data is: local = in the journal, remote = below; auto: local with disk" },
	{ .name = "lag",
	  .type = OPT_TIME_NS,
	  .field = offsetof(struct cache, lag_ns),
	  .def = "5s",
	  .max = UINT64_C(86400000000000),
	  .help = "unsaved data is sent below after so long, sooner when the journal fills" },
	{ .name = "uploads",
	  .type = OPT_UINT,
	  .field = offsetof(struct cache, uploads),
	  .def = "16",
	  .min = 1,
	  .max = 256,
	  .help = "objects, or 4 MiB of a disk each, sent below at a time" },
	{ .name = "away",
	  .type = OPT_ENUM,
	  .field = offsetof(struct cache, away),
	  .def = "wait",
	  .choices = "wait|error|readonly",
	  .help = "what happens when the layer below takes nothing for longer than `after`" },
	{ .name = "after",
	  .type = OPT_TIME_NS,
	  .field = offsetof(struct cache, after_ns),
	  .def = "5m",
	  .help = "see `away`" },
	{ .name = "volume",
	  .type = OPT_STR,
	  .field = offsetof(struct cache, volume),
	  .help = "whose folder it is, in place of the chain below" },
	OPT_END,
};

/* --- Life ------------------------------------------------------------------------------------- */

static int check_back(const struct cache *c, struct err *err)
{
	if (c->mode == MODE_WRITETHROUGH && c->durability != DURABILITY_AUTO)
		return err_set(err, -EINVAL,
			       "layer cache: option \"durability\" is for mode=writeback");
	if (c->durability == DURABILITY_LOCAL && !c->disk)
		return err_set(
			err, -EINVAL,
			"layer cache: durability=local needs a folder for the journal, as in "
			"disk=/var/cache/nbdrs/disk0");
	if (c->disk && c->disk[0] != '/')
		return err_set(err, -EINVAL,
			       "layer cache: option \"disk\": \"%s\" must be an absolute path",
			       c->disk);
	return 0;
}

static int check_sizes(const struct cache *c, struct err *err)
{
	const uint64_t size = c->size ? c->size : SIZE_DISK;

	if (c->mode == MODE_WRITETHROUGH && c->journal)
		return err_set(err, -EINVAL,
			       "layer cache: option \"journal\" is for mode=writeback");
	if (c->disk && c->journal > size)
		return err_set(
			err, -EINVAL,
			"layer cache: the journal is a part of size; make it smaller, or size larger");
	if (c->disk && c->mode == MODE_WRITETHROUGH && size < TIER_MIN * c->granule)
		return err_set(
			err, -EINVAL,
			"layer cache: size must hold eight granules at least; make it larger, or "
			"granule smaller");
	return 0;
}

int cache_check_options(const struct cache *c, struct err *err)
{
	int rc;

	if (c->granule & (c->granule - 1))
		return err_set(err, -EINVAL,
			       "layer cache: granule=%" PRIu64 " is no power of two; 65536 is one",
			       c->granule);
	if (c->granule > c->mem / 4)
		return err_set(
			err, -EINVAL,
			"layer cache: mem must hold four granules at least; make it larger, or "
			"granule smaller");
	rc = check_sizes(c, err);
	return rc ? rc : check_back(c, err);
}

/* After cache_check_options(). */
static void fill_in(struct cache *c)
{
	c->is_local = c->durability == DURABILITY_LOCAL ||
		      (c->durability == DURABILITY_AUTO && c->disk);
	c->tier_size = c->size ? c->size : c->disk ? SIZE_DISK : SIZE_MEM;
	c->journal_size = c->journal ? c->journal
			  : c->disk  ? MIN(c->tier_size, SIZE_DISK)
				     : c->tier_size;
	if (!c->disk)
		c->tier_size = 0;
	else if (c->mode == MODE_WRITEBACK)
		c->tier_size -= MIN(c->journal_size, c->tier_size);
	c->shift = (unsigned)__builtin_ctzll(c->granule);
}

static const char *mode_name(const struct cache *c)
{
	return c->mode == MODE_WRITEBACK ? "writeback" : "writethrough";
}

static const char *durability_name(const struct cache *c)
{
	return c->mode == MODE_WRITEBACK && c->is_local ? "local" : "remote";
}

static void set_back_caps(struct layer *l)
{
	const struct cache *c = l->self;

	if (c->back->is_ro) {
		l->caps &= ~(unsigned)(CAN_WRITE | CAN_MAP);
		return;
	}
	l->caps |= CAN_PARTIAL | CAN_ZERO | CAN_FAST_ZERO | CAN_TRIM | CAN_FLUSH | CAN_MULTI;
	l->caps &= ~(unsigned)(CAN_FUA | IS_VOLATILE);
	if (!c->disk)
		l->caps |= IS_VOLATILE;
	if (c->is_local)
		l->caps |= CAN_FUA;
	if (l->is_keyed)
		l->caps &= ~(unsigned)CAN_MAP; /* what is only here has no map */
	l->pref_io = MIN(l->pref_io, 4096U);
}

static CO_FN void cache_close(struct layer *l)
{
	struct cache *c = l->self;

	back_close(l);
	cache_tier_stop(l);
	cache_share_leave(&c->share); /* where no tier was to be stopped */
	cache_table_free(c->table);
	c->table = NULL;
	rangelock_destroy(&c->ranges);
}

static void say_mode(const struct layer *l)
{
	const struct cache *c = l->self;

	log_info("%s: cache mode=%s durability=%s%s%s unsaved_bytes=%" PRIu64 " disk_size=%" PRIu64,
		 l->export_name ? l->export_name : "cache", mode_name(c), durability_name(c),
		 c->disk ? " disk=" : "", c->disk ? c->disk : "",
		 c->back ? atomic_load(&c->back->dirty.bytes) : 0, c->tier_size);
}

static CO_FN int cache_open(struct layer *l, struct err *err)
{
	struct cache *c = l->self;
	int rc = cache_check_options(c, err);

	if (rc)
		return rc;
	fill_in(c);
	rc = cache_table_new(c->mem, (uint32_t)c->granule, &c->table);
	if (rc)
		return err_set(err, rc, "layer cache: out of memory");
	rangelock_init(&c->ranges);
	l->caps |= CAN_LEND; /* ours: the store's memory may be older */
	if (c->mode == MODE_WRITEBACK)
		rc = back_open(l, err);
	else
		rc = cache_tier_start(l, err);
	if (rc) {
		cache_close(l);
		return rc;
	}
	cache_share_join(&c->share, c->table, c->mem);
	if (c->back)
		set_back_caps(l);
	say_mode(l);
	return 0;
}

/* --- Requests: by mode ------------------------------------------------------------------------ */

static bool is_back(const struct chan *ch)
{
	const struct cache *c = ch->layer->self;

	return c->back != NULL;
}

static CO_FN int cache_read(struct chan *ch, struct ext e, const struct iov *iov, unsigned fl)
{
	return is_back(ch) ? back_read(ch, e, iov, fl) : through_read(ch, e, iov, fl);
}

/* What is in memory, lies in one granule, and is as it is below. */
static int cache_lend(struct chan *ch, struct ext e, struct loan *loan)
{
	const struct cache *c = ch->layer->self;
	const uint64_t n = e.off >> c->shift;

	if (n != (e.off + e.len - 1) >> c->shift || (c->back && !back_is_clean(c->back, e)))
		return -EAGAIN;
	return cache_table_lend(c->table, e.obj, n, (uint32_t)(e.off & (c->granule - 1)),
				(uint32_t)e.len, loan);
}

static CO_FN int cache_write(struct chan *ch, struct ext e, const struct iov *iov, unsigned fl)
{
	return is_back(ch) ? back_write(ch, e, iov, fl) : through_write(ch, e, iov, fl);
}

static CO_FN int cache_zero(struct chan *ch, struct ext e, unsigned fl)
{
	return is_back(ch) ? back_zero(ch, e, fl) : through_zero(ch, e, fl);
}

static CO_FN int cache_trim(struct chan *ch, struct ext e, unsigned fl)
{
	return is_back(ch) ? back_zero(ch, e, fl | IO_PUNCH) : through_trim(ch, e, fl);
}

static CO_FN int cache_flush(struct chan *ch)
{
	return is_back(ch) ? back_flush(ch) : ch_flush(ch->kids[0]);
}

static CO_FN int cache_map(struct chan *ch, struct ext e, struct extmap *m)
{
	return is_back(ch) ? back_map(ch, e, m) : ch_map(ch->kids[0], e, m);
}

static CO_FN int cache_stat(struct chan *ch, const struct obj *obj, struct obj_stat *st)
{
	return is_back(ch) ? back_stat(ch, obj, st) : ch_stat(ch->kids[0], obj, st);
}

static CO_FN int cache_put(struct chan *ch, const struct put *p, struct obj_stat *st)
{
	return is_back(ch) ? back_put(ch, p, st) : through_put(ch, p, st);
}

static CO_FN int cache_del(struct chan *ch, const struct obj *objs, unsigned n)
{
	return is_back(ch) ? back_del(ch, objs, n) : through_del(ch, objs, n);
}

static CO_FN int cache_list(struct chan *ch, const char *prefix, list_fn *fn, void *arg)
{
	return is_back(ch) ? back_list(ch, prefix, fn, arg) : ch_list(ch->kids[0], prefix, fn, arg);
}

/* --- Another size ----------------------------------------------------------------------------- */

/*
 * The last granule of a disk may be short, and what lies behind the end will be zeroes. A journal
 * may hold changes behind a new end, and would play them again at the next start.
 */
static CO_FN int cache_resize(struct chan *ch, uint64_t size, enum resize_phase phase,
			      struct err *err)
{
	struct cache *c = ch->layer->self;
	const uint64_t from = MIN(size, (uint64_t)ch->layer->size) >> c->shift;
	int rc;

	if (c->back)
		return err_set(
			err, -EOPNOTSUPP,
			"layer cache: with mode=writeback above the mapping a volume keeps its size while it "
			"is served; put the cache below it, as in sharded:cache:..., or stop the daemon first");
	if (phase != RESIZE_NOW)
		return ch_resize(ch->kids[0], size, phase, err);
	tier_mark(c->tier, (struct ext){ &obj_none, from << c->shift, UINT64_MAX });
	tier_settle(c->tier);
	rc = ch_resize(ch->kids[0], size, phase, err);
	cache_table_drop_from(c->table, &obj_none, from);
	tier_drop_from(c->tier, &obj_none, from);
	tier_resize(c->tier, ch->kids[0]->layer->size);
	tier_done(c->tier, (struct ext){ &obj_none, from << c->shift, UINT64_MAX });
	if (rc)
		return rc;
	ch->layer->size = ch->kids[0]->layer->size;
	return 0;
}

/* --- Looking at it ---------------------------------------------------------------------------- */

static void back_status(struct back *b, struct info *i)
{
	struct journal_view j;
	struct dirty_view d;
	uint64_t sends, bytes, failures;
	int error;

	journal_view(&b->journal, &j);
	dirty_view(&b->dirty, &d);
	pthread_mutex_lock(&b->dirty.lock);
	sends = b->sends;
	bytes = b->sent_bytes;
	failures = b->failures;
	error = b->error;
	pthread_mutex_unlock(&b->dirty.lock);
	info_number(i, "dirty_bytes", d.bytes);
	info_number(i, "dirty_units", d.units);
	info_number(i, "oldest_dirty_ms", d.since ? (now_ns() - d.since) / 1000000 : 0);
	info_number(i, "lag_ms", b->c->lag_ns / 1000000);
	info_number(i, "journal_used", j.used);
	info_number(i, "journal_limit", j.limit);
	info_number(i, "journal_syncs", j.syncs);
	info_number(i, "sends", sends);
	info_number(i, "sent_bytes", bytes);
	info_number(i, "failures", failures);
	if (j.error || error)
		i->add(i, "error", err_name(j.error ? j.error : error));
}

static void info_size(struct info *i, const char *key, uint64_t bytes)
{
	char text[32];

	format_size(bytes, text, sizeof(text));
	i->add(i, key, text);
}

/* What the options come to. */
static CO_FN void cache_info(struct layer *l, struct info *i)
{
	const struct cache *c = l->self;

	i->add(i, "mode", mode_name(c));
	i->add(i, "durability", durability_name(c));
	info_size(i, "memory", c->mem);
	if (c->mode == MODE_WRITEBACK)
		info_size(i, "journal", c->journal_size);
	if (c->disk) {
		info_size(i, "cached_on_disk", c->tier_size);
		i->add(i, "folder", c->disk);
	}
}

static void tier_status(struct tier *t, struct info *i)
{
	struct tier_view v;

	tier_view(t, &v);
	i->add(i, "tier", v.is_off ? "off" : "on");
	info_number(i, "tier_bytes", v.bytes);
	info_number(i, "tier_limit", v.limit);
	info_number(i, "tier_hits", v.hits);
	info_number(i, "tier_misses", v.misses);
	info_number(i, "tier_evictions", v.evictions);
	info_number(i, "tier_queued", v.queued);
	info_number(i, "tier_writes", v.writes);
	info_number(i, "tier_dropped", v.dropped);
	info_number(i, "tier_bad", v.bad);
	info_number(i, "tier_errors", v.errors);
	info_number(i, "tier_marks", v.marks);
}

static void cache_status(struct layer *l, struct info *i)
{
	const struct cache *c = l->self;
	struct cache_view v;

	if (!c->table)
		return;
	cache_table_view(c->table, &v);
	i->add(i, "mode", mode_name(c));
	i->add(i, "durability", durability_name(c));
	info_number(i, "mem_bytes", v.bytes);
	info_number(i, "mem_limit", c->share.got);
	info_number(i, "hits", v.hits);
	info_number(i, "misses", v.misses);
	info_number(i, "hit_percent", v.hits * 100 / MAX(v.hits + v.misses, UINT64_C(1)));
	info_number(i, "evictions", v.evictions);
	if (c->tier)
		tier_status(c->tier, i);
	if (c->back)
		back_status(c->back, i);
}

const struct layer_ops cache_layer = {
	.name = "cache",
	.help = "memory and a local disk in front of a slower layer",
	.opts = options,
	.self_size = sizeof(struct cache),
	.min_kids = 1,
	.max_kids = 1,
	.open = cache_open,
	.close = cache_close,
	.read = cache_read,
	.lend = cache_lend,
	.write = cache_write,
	.zero = cache_zero,
	.trim = cache_trim,
	.flush = cache_flush,
	.map = cache_map,
	.cache = through_cache,
	.stat = cache_stat,
	.put = cache_put,
	.del = cache_del,
	.list = cache_list,
	.create = cache_create,
	.destroy = cache_destroy,
	.resize = cache_resize,
	.info = cache_info,
	.status = cache_status,
};
