/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The simulator's inside. Three parts: what is shared by all lives of the machine (arena, struct world,
 * disk, remote store), the engine of one life, and the harness that runs lives in child processes.
 */
#ifndef NBDRS_SIM_INT_H
#define NBDRS_SIM_INT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbdrs/list.h"
#include "sim.h"

/* ---- sim_arena.c: memory shared with the children, at the same address in each ---- */

/* Makes it, once; 0 or -errno. */
int arena_init(void);
/* Forgets everything in it. */
void arena_reset(void);
/* Zeroed. Ends the process when there is none left: a test writes too much. */
void *arena_alloc(size_t len);
/* `len` as it was asked for; NULL is fine. */
void arena_free(void *p, size_t len);

/* ---- what outlives a crash ---- */

struct world {
	uint64_t seed;
	uint64_t random; /* the state of sim_random() */
	uint64_t hash;   /* of everything that happened: equal for equal seeds */
	uint64_t clock;  /* ns; goes on over crashes */
	unsigned life;
	uint64_t events;   /* of the latest life */
	char event[200];   /* the latest */
	char failure[600]; /* "" = none */
	bool is_traced;
	struct sim_faults faults;
	struct disk *disk;
	struct remote *remote;
	void *model;
};

/* In the arena. */
extern struct world *world;

/* A seeded 64-bit mix, for choices that must not depend on what happened before. */
uint64_t sim_mix(uint64_t a, uint64_t b);
/* Makes the hash depend on `value`. */
void sim_note(uint64_t value);

/* ---- sim_image.c: what is in a file ---- */

enum { SIM_PAGE = 4096, SIM_SECTOR = 512 };

struct image {
	uint64_t size;   /* bytes; what a page holds behind it is zero */
	uint8_t **pages; /* by number; NULL = a hole */
	uint64_t room;   /* entries of `pages` */
	uint64_t used;   /* pages that are there */
};

/* Inside the size. */
void image_read(const struct image *m, uint64_t off, void *buf, uint64_t len);
void image_write(struct image *m, uint64_t off, const void *buf, uint64_t len);
/* Takes whole pages out. */
void image_zero(struct image *m, uint64_t off, uint64_t len);
void image_resize(struct image *m, uint64_t size);
/* Pages that a write to [off, off + len) would add, and adding them. */
uint64_t image_missing(const struct image *m, uint64_t off, uint64_t len);
void image_reserve(struct image *m, uint64_t off, uint64_t len);
void image_copy(struct image *to, const struct image *from);
void image_free(struct image *m);

/* ---- sim_disk.c: files and folders, and what of them is durable ---- */

enum { SIM_NAME_MAX = 63 };

enum change_kind {
	CHANGE_DATA,
	CHANGE_ZERO,
	CHANGE_SIZE,
	CHANGE_RESERVE,
	CHANGE_LINK,
	CHANGE_UNLINK,
	CHANGE_RENAME
};

/* Something done to a file or folder that is not durable yet. */
struct change {
	struct list node; /* inode.changes, oldest first */
	uint64_t seq;     /* grows over the whole disk */
	enum change_kind kind;
	bool is_durable;                                   /* survives all the same (O_DSYNC) */
	uint64_t off, len;                                 /* SIZE: off = the new size */
	uint8_t *data;                                     /* DATA: len bytes */
	struct inode *inode;                               /* LINK: what gets the name */
	char name[SIM_NAME_MAX + 1], to[SIM_NAME_MAX + 1]; /* of folders */
};

struct entry {
	char name[SIM_NAME_MAX + 1];
	struct inode *inode;
};

struct entries {
	struct entry *v;
	unsigned n, room;
};

struct inode {
	struct list node; /* disk.inodes */
	unsigned number;
	bool is_dir, is_seen;     /* seen: by the search for what nobody refers to */
	struct image now, stable; /* of a file: what reads see, what a crash leaves for sure */
	struct entries names, stable_names; /* of a folder */
	struct list changes;
	uint64_t changes_n;
	uint64_t errors; /* syncs that failed */
	unsigned opens;  /* fds of this life */
};

struct disk {
	struct list inodes;
	struct inode *root;
	uint64_t last_seq, pending; /* bytes in changes */
	unsigned last_number;
};

void disk_init(void);
/* Begins a life: nothing is open. */
void disk_boot(void);
void disk_power_cut(void);

/* 0 or -errno. `dir` NULL = the root. Of a path the folders must be there. */
int disk_lookup(struct inode *dir, const char *path, struct inode **out);
/* The folder that `path` ends in, and its last part. */
int disk_parent(struct inode *dir, const char *path, struct inode **out, const char **name);
int disk_make(struct inode *dir, const char *name, bool is_dir, struct inode **out);
int disk_unlink(struct inode *dir, const char *name, bool is_dir);
int disk_rename(struct inode *dir, const char *from, const char *to);
/* Lets go of what has neither a name nor an fd. */
void disk_tidy(void);

/* Bytes written: fewer when `space` (0 = no limit) is full; -ENOSPC. */
int64_t disk_write(struct inode *i, uint64_t off, const void *buf, uint64_t len, uint64_t space,
		   bool is_durable);
int64_t disk_read(const struct inode *i, uint64_t off, void *buf, uint64_t len);
void disk_resize(struct inode *i, uint64_t size);
/* As fallocate(2) with `mode`. */
int disk_allocate(struct inode *i, int mode, uint64_t off, uint64_t len, uint64_t space);
/* Makes durable, or fails to, what was changed up to `seq`. */
void disk_sync(struct inode *i, uint64_t seq);
void disk_sync_failed(struct inode *i, uint64_t seq);

/* ---- sim_remote.c: the remote store ---- */

/* Registers the layer; new ones are empty. */
void remote_register(void);

/* ---- sim_engine.c: one life ---- */

struct life {
	CO_FN int (*fn)(void *model);
	uint64_t crash_at; /* event; UINT64_MAX = never, only at the end if `crash` says so */
	enum sim_crash crash;
};

/* Runs in the child; ends it with an enum life_end. */
enum life_end { LIFE_OK, LIFE_FAILED, LIFE_CRASHED };
_Noreturn void life_run(const struct life *l);

/* An event: counted, hashed, traced; here the crash comes. */
void sim_event(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Waits a random time around `typical_ns`, rarely a very long one. */
CO_FN void sim_wait(uint64_t typical_ns);

/* ---- sim_files.c: the file calls of the engine ---- */

struct file_op;
struct name_op;
CO_FN int sim_file(void *state, const struct file_op *op);
CO_FN int sim_names(void *state, const struct name_op *op);
ssize_t sim_read_nowait(void *state, const struct file_op *op);

#endif
