/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The file system of the simulated machine: files and folders, each in two states. `now` is what calls
 * see; `stable` is what a power cut leaves for sure. Between them lie the changes, in the order in which
 * they were made: a sync applies them to `stable`, a power cut some of them.
 *
 * Of one file, what a journaling file system logs (size, holes, reservations) survives in order; data
 * survives in any selection, sector by sector. Data behind the surviving size is lost with it.
 */
#include <errno.h>
#include <linux/falloc.h>
#include <string.h>

#include "sim_int.h"

/* More than this unsynced and the oldest of it becomes durable, as the kernel writes back in the end. */
#define PENDING_MAX (UINT64_C(32) << 20)
enum { MILLION = 1000000 };

/* ---- folders ---- */

static struct entry *entry_find(const struct entries *e, const char *name)
{
	for (unsigned k = 0; k < e->n; k++)
		if (strcmp(e->v[k].name, name) == 0)
			return &e->v[k];
	return NULL;
}

static void entry_set(struct entries *e, const char *name, struct inode *inode)
{
	struct entry *at = entry_find(e, name);

	if (at == NULL && e->n == e->room) {
		unsigned room = MAX(8U, 2 * e->room);
		struct entry *v = arena_alloc(room * sizeof(*v));

		if (e->n > 0)
			memcpy(v, e->v, e->n * sizeof(*v));
		arena_free(e->v, e->room * sizeof(*v));
		e->v = v;
		e->room = room;
	}
	if (at == NULL) {
		at = &e->v[e->n++];
		memcpy(at->name, name, strlen(name) + 1);
	}
	at->inode = inode;
}

/* Only when it still is the name of `inode`. */
static void entry_drop(struct entries *e, const char *name, const struct inode *inode)
{
	struct entry *at = entry_find(e, name);

	if (at != NULL && at->inode == inode)
		*at = e->v[--e->n];
}

static void entries_copy(struct entries *to, const struct entries *from)
{
	to->n = 0;
	for (unsigned k = 0; k < from->n; k++)
		entry_set(to, from->v[k].name, from->v[k].inode);
}

/* ---- changes ---- */

static struct inode *inode_new(bool is_dir)
{
	struct disk *d = world->disk;
	struct inode *i = arena_alloc(sizeof(*i));

	i->number = ++d->last_number;
	i->is_dir = is_dir;
	list_init(&i->changes);
	list_add(&d->inodes, &i->node);
	return i;
}

static struct change *change_new(struct inode *i, enum change_kind kind, uint64_t off, uint64_t len)
{
	struct change *c = arena_alloc(sizeof(*c));

	c->seq = ++world->disk->last_seq;
	c->kind = kind;
	c->off = off;
	c->len = len;
	list_add(&i->changes, &c->node);
	i->changes_n++;
	return c;
}

static void change_free(struct inode *i, struct change *c)
{
	list_del(&c->node);
	i->changes_n--;
	if (c->kind == CHANGE_DATA) {
		world->disk->pending -= c->len;
		arena_free(c->data, c->len);
	}
	arena_free(c, sizeof(*c));
}

/* Data as far as the file goes. `torn`: each sector survives with that chance; MILLION = whole. */
static void apply_data(struct inode *i, const struct change *c, uint32_t torn)
{
	uint64_t end = MIN(c->off + c->len, i->stable.size), part;

	for (uint64_t at = c->off; at < end; at += part) {
		part = torn >= MILLION ? end - at : MIN(SIM_SECTOR - at % SIM_SECTOR, end - at);
		if (sim_chance(torn))
			image_write(&i->stable, at, c->data + (at - c->off), part);
	}
}

static void apply(struct inode *i, const struct change *c, uint32_t torn)
{
	switch (c->kind) {
	case CHANGE_DATA: apply_data(i, c, torn); break;
	case CHANGE_ZERO: image_zero(&i->stable, c->off, c->len); break;
	case CHANGE_SIZE: image_resize(&i->stable, c->off); break;
	case CHANGE_RESERVE: image_reserve(&i->stable, c->off, c->len); break;
	case CHANGE_LINK: entry_set(&i->stable_names, c->name, c->inode); break;
	case CHANGE_UNLINK: entry_drop(&i->stable_names, c->name, c->inode); break;
	case CHANGE_RENAME:
		entry_set(&i->stable_names, c->to, c->inode);
		entry_drop(&i->stable_names, c->name, c->inode);
		break;
	}
}

/* How much of what was not synced survives: the same for the whole disk at one power cut. */
struct mood {
	uint32_t keep, torn; /* of a million data changes; the rest is lost */
	bool is_ordered;     /* names too: the first ones survive */
};

static struct mood mood_drawn(void)
{
	struct mood m = { 0 };
	uint64_t kind = sim_below(8);

	if (kind == 0) /* nothing */
		return m;
	m.keep = kind == 1 ? MILLION : (uint32_t)sim_below(MILLION);
	m.torn = (uint32_t)sim_below(MILLION - m.keep + 1);
	m.is_ordered = sim_chance(MILLION / 2);
	return m;
}

/* So many of what is logged in order survive a power cut. */
static uint64_t logged(const struct inode *i, const struct mood *m)
{
	if (m->keep == 0 || m->keep == MILLION)
		return m->keep == 0 ? 0 : UINT64_MAX;
	return sim_below(i->changes_n + 1);
}

/*
 * Of the changes up to `seq`, some become durable, all are over. In order: the first `in_order` that are
 * no data.
 */
static void settle(struct inode *i, uint64_t seq, const struct mood *m, uint64_t in_order)
{
	bool is_ordered = !i->is_dir || m->is_ordered;

	list_for_each(c, &i->changes, struct change, node)
	{
		uint32_t luck = (uint32_t)sim_below(MILLION);

		if (c->seq > seq)
			break;
		if (c->is_durable)
			apply(i, c, MILLION);
		else if (c->kind == CHANGE_DATA && luck >= m->keep && luck < m->keep + m->torn)
			apply(i, c, (uint32_t)sim_below(MILLION));
		else if (c->kind != CHANGE_DATA && is_ordered ? in_order > 0 : luck < m->keep)
			apply(i, c, MILLION);
		if (c->kind != CHANGE_DATA && in_order > 0)
			in_order--;
		change_free(i, c);
	}
}

/* What calls see is what is durable, and what was changed since. */
static void reread(struct inode *i)
{
	image_copy(&i->now, &i->stable);
	list_for_each(c, &i->changes, struct change, node)
	{
		switch (c->kind) {
		case CHANGE_DATA: image_write(&i->now, c->off, c->data, c->len); break;
		case CHANGE_ZERO: image_zero(&i->now, c->off, c->len); break;
		case CHANGE_SIZE: image_resize(&i->now, c->off); break;
		default: image_reserve(&i->now, c->off, c->len); break;
		}
	}
}

void disk_sync(struct inode *i, uint64_t seq)
{
	list_for_each(c, &i->changes, struct change, node)
	{
		if (c->seq > seq)
			break;
		apply(i, c, MILLION);
		change_free(i, c);
	}
	if (i->is_dir)
		disk_tidy();
}

void disk_sync_failed(struct inode *i, uint64_t seq)
{
	struct mood m = mood_drawn();

	i->errors++;
	if (i->is_dir)
		return; /* they stay to be done */
	settle(i, seq, &m, UINT64_MAX);
	/*
	 * The pages count as clean now. Until they are evicted, reads still see what is not on the disk.
	 */
	if (sim_chance(MILLION / 2))
		reread(i);
}

void disk_power_cut(void)
{
	struct mood m = mood_drawn();

	list_for_each(i, &world->disk->inodes, struct inode, node)
	{
		settle(i, UINT64_MAX, &m, logged(i, &m));
		image_copy(&i->now, &i->stable);
		entries_copy(&i->names, &i->stable_names);
	}
}

/* ---- life ---- */

void disk_init(void)
{
	struct disk *d = arena_alloc(sizeof(*d));
	struct inode *folder;

	world->disk = d;
	list_init(&d->inodes);
	d->root = inode_new(true);
	(void)disk_make(d->root, "disk", true, &folder); /* nothing is there yet */
	disk_sync(d->root, UINT64_MAX);
}

void disk_boot(void)
{
	list_for_each(i, &world->disk->inodes, struct inode, node) i->opens = 0;
	disk_tidy();
}

static void see(struct inode *i)
{
	if (i != NULL)
		i->is_seen = true;
}

void disk_tidy(void)
{
	struct disk *d = world->disk;

	list_for_each(i, &d->inodes, struct inode, node) i->is_seen = i == d->root || i->opens > 0;
	list_for_each(i, &d->inodes, struct inode, node)
	{
		for (unsigned k = 0; k < i->names.n; k++)
			see(i->names.v[k].inode);
		for (unsigned k = 0; k < i->stable_names.n; k++)
			see(i->stable_names.v[k].inode);
		list_for_each(c, &i->changes, struct change, node) see(c->inode);
	}
	list_for_each(i, &d->inodes, struct inode, node)
	{
		if (i->is_seen)
			continue;
		list_for_each(c, &i->changes, struct change, node) change_free(i, c);
		image_free(&i->now);
		image_free(&i->stable);
		arena_free(i->names.v, i->names.room * sizeof(struct entry));
		arena_free(i->stable_names.v, i->stable_names.room * sizeof(struct entry));
		list_del(&i->node);
		arena_free(i, sizeof(*i));
	}
}

/* ---- names ---- */

/* The next part of a path; 0 at its end, -ENAMETOOLONG. */
static int next_part(const char **path, char *part)
{
	size_t len;

	do {
		*path += strspn(*path, "/");
		len = strcspn(*path, "/");
		if (len > SIM_NAME_MAX)
			return -ENAMETOOLONG;
		memcpy(part, *path, len);
		part[len] = '\0';
		*path += len;
	} while (strcmp(part, ".") == 0);
	return len > 0;
}

int disk_lookup(struct inode *dir, const char *path, struct inode **out)
{
	struct inode *i = dir == NULL || path[0] == '/' ? world->disk->root : dir;
	char part[SIM_NAME_MAX + 1];
	int rc;

	while ((rc = next_part(&path, part)) > 0) {
		const struct entry *e;

		if (!i->is_dir)
			return -ENOTDIR;
		e = entry_find(&i->names, part);
		if (e == NULL)
			return -ENOENT;
		i = e->inode;
	}
	if (rc == 0)
		*out = i;
	return rc;
}

int disk_parent(struct inode *dir, const char *path, struct inode **out, const char **name)
{
	const char *slash = strrchr(path, '/');
	char folder[256];
	size_t len = slash != NULL ? (size_t)(slash - path) : 0;

	*name = slash != NULL ? slash + 1 : path;
	if (len >= sizeof(folder) || strlen(*name) > SIM_NAME_MAX)
		return -ENAMETOOLONG;
	memcpy(folder, path, len);
	folder[len] = '\0';
	return disk_lookup(path[0] == '/' ? NULL : dir, folder, out);
}

static struct change *name_change(struct inode *dir, enum change_kind kind, const char *name,
				  struct inode *i)
{
	struct change *c = change_new(dir, kind, 0, 0);

	memcpy(c->name, name, strlen(name) + 1);
	c->inode = i;
	return c;
}

int disk_make(struct inode *dir, const char *name, bool is_dir, struct inode **out)
{
	if (!dir->is_dir)
		return -ENOTDIR;
	if (name[0] == '\0' || entry_find(&dir->names, name) != NULL)
		return -EEXIST;
	*out = inode_new(is_dir);
	entry_set(&dir->names, name, *out);
	(void)name_change(dir, CHANGE_LINK, name, *out);
	return 0;
}

int disk_unlink(struct inode *dir, const char *name, bool is_dir)
{
	struct entry *e = entry_find(&dir->names, name);
	struct inode *i;

	if (e == NULL)
		return -ENOENT;
	i = e->inode;
	if (i->is_dir != is_dir)
		return is_dir ? -ENOTDIR : -EISDIR;
	if (i->names.n > 0)
		return -ENOTEMPTY;
	entry_drop(&dir->names, name, i);
	(void)name_change(dir, CHANGE_UNLINK, name, i);
	return 0;
}

int disk_rename(struct inode *dir, const char *from, const char *to)
{
	struct entry *e = entry_find(&dir->names, from), *old = entry_find(&dir->names, to);
	struct change *c;
	struct inode *i;

	if (e == NULL)
		return -ENOENT;
	i = e->inode;
	if (strlen(to) > SIM_NAME_MAX)
		return -ENAMETOOLONG;
	if (old != NULL && old->inode == i)
		return 0;
	if (old != NULL && old->inode->is_dir != i->is_dir)
		return i->is_dir ? -ENOTDIR : -EISDIR;
	if (old != NULL && old->inode->names.n > 0)
		return -ENOTEMPTY;
	entry_set(&dir->names, to, i);
	entry_drop(&dir->names, from, i);
	c = name_change(dir, CHANGE_RENAME, from, i);
	memcpy(c->to, to, strlen(to) + 1);
	return 0;
}

/* ---- contents ---- */

/* Pages there is room for. */
static uint64_t pages_free(uint64_t space)
{
	uint64_t used = 0;

	if (space == 0)
		return UINT64_MAX;
	list_for_each(i, &world->disk->inodes, struct inode, node) used += i->now.used;
	return space / SIM_PAGE > used ? space / SIM_PAGE - used : 0;
}

static void write_back(struct inode *i)
{
	while (world->disk->pending > PENDING_MAX && !list_empty(&i->changes)) {
		struct change *c = list_entry(i->changes.next, struct change, node);

		apply(i, c, MILLION);
		change_free(i, c);
	}
}

void disk_resize(struct inode *i, uint64_t size)
{
	if (size == i->now.size)
		return;
	(void)change_new(i, CHANGE_SIZE, size, 0);
	image_resize(&i->now, size);
}

static void grow(struct inode *i, uint64_t size)
{
	if (size > i->now.size)
		disk_resize(i, size);
}

/* What O_DSYNC writes needs the size to be read again. */
static void make_log_durable(struct inode *i)
{
	list_for_each(c, &i->changes, struct change, node) c->is_durable |= c->kind != CHANGE_DATA;
}

int64_t disk_write(struct inode *i, uint64_t off, const void *buf, uint64_t len, uint64_t space,
		   bool is_durable)
{
	uint64_t room = pages_free(space);
	struct change *c;

	if (len == 0)
		return 0;
	while (len > 0 && image_missing(&i->now, off, len) > room) {
		uint64_t end = align_down(off + len - 1, SIM_PAGE);

		len = end > off ? end - off : 0;
	}
	if (len == 0)
		return -ENOSPC;
	grow(i, off + len);
	if (is_durable)
		make_log_durable(i);
	c = change_new(i, CHANGE_DATA, off, len);
	c->is_durable = is_durable;
	c->data = arena_alloc(len);
	memcpy(c->data, buf, len);
	world->disk->pending += len;
	image_write(&i->now, off, buf, len);
	write_back(i);
	return (int64_t)len;
}

int64_t disk_read(const struct inode *i, uint64_t off, void *buf, uint64_t len)
{
	if (off >= i->now.size)
		return 0;
	len = MIN(len, i->now.size - off);
	image_read(&i->now, off, buf, len);
	return (int64_t)len;
}

int disk_allocate(struct inode *i, int mode, uint64_t off, uint64_t len, uint64_t space)
{
	int what = mode & ~FALLOC_FL_KEEP_SIZE;

	if (what != 0 && what != FALLOC_FL_PUNCH_HOLE && what != FALLOC_FL_ZERO_RANGE)
		return -EOPNOTSUPP;
	if (what != FALLOC_FL_PUNCH_HOLE && image_missing(&i->now, off, len) > pages_free(space))
		return -ENOSPC;
	if (what != 0) {
		(void)change_new(i, CHANGE_ZERO, off, len);
		image_zero(&i->now, off, len);
	}
	if (what == FALLOC_FL_PUNCH_HOLE)
		return 0;
	if (!(mode & FALLOC_FL_KEEP_SIZE))
		grow(i, off + len);
	(void)change_new(i, CHANGE_RESERVE, off, len);
	image_reserve(&i->now, off, len);
	return 0;
}
