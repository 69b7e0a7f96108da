/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What an I/O engine does for one reactor. All calls are made on the reactor's thread.
 */
#ifndef NBDRS_ENGINE_H
#define NBDRS_ENGINE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "nbdrs/io.h"

enum file_op_kind { FILE_READ, FILE_WRITE, FILE_FDATASYNC, FILE_FALLOCATE };

/* A file call; lives on the stack of the fiber that waits for it. */
struct file_op {
	enum file_op_kind kind;
	int fd;
	const struct iovec *iov;
	unsigned iov_n;
	int flags;	   /* RWF_* of write, mode of fallocate */
	uint64_t off, len; /* len: of fallocate */
};

enum name_op_kind {
	NAME_OPEN,
	NAME_CLOSE,
	NAME_STAT,
	NAME_TRUNCATE,
	NAME_SYNC,
	NAME_RENAME,
	NAME_UNLINK,
	NAME_MKDIR,
	NAME_LOCK,
	NAME_LIST
};

/* A call on names or on a whole file; lives on the stack of the fiber that waits for it. */
struct name_op {
	enum name_op_kind kind;
	int fd;			/* of the folder, where there is a name */
	const char *name, *to;
	int flags;
	mode_t mode;
	uint64_t size;		/* of NAME_TRUNCATE */
	struct stat *st;	/* of NAME_STAT */
	int (*fn)(void *arg, const char *name); /* of NAME_LIST */
	void *arg;
};

struct engine {
	const char *name;
	/* *state is the engine's own. 0 or -errno. */
	int (*open)(void **state);
	void (*close)(void *state);
	/* Runs op; >= 0 or -errno. */
	CO_FN int (*file)(void *state, const struct file_op *op);
	int (*arm)(void *state, struct io_watch *w);
	/* See io_watch_cancel. */
	bool (*cancel)(void *state, struct io_watch *w);
	/*
	 * Submits what is queued and handles what has come. timeout_ns: 0 = do not wait, IO_FOREVER =
	 * until something comes. True when anything came.
	 */
	bool (*poll)(void *state, uint64_t timeout_ns);
	/* As poll with 0, but leaves out the system call where that is likely to be in vain. */
	bool (*peek)(void *state);

	/* Of a simulated engine only. `names` runs op as `file` does; `offload` is the whole of offload(). */
	CO_FN int (*names)(void *state, const struct name_op *op);
	CO_FN int (*offload)(void *state, int (*fn)(void *arg), void *arg);
	ssize_t (*read_nowait)(void *state, const struct file_op *op);
	uint64_t (*now)(void);	  /* ns */
	uint64_t (*random)(void);
};

extern const struct engine uring_engine, epoll_engine;

/* The engine of the simulation (reactor_begin_here); NULL in the real world. */
extern const struct engine *sim_engine;

/* 0 when this process may use io_uring with the features needed, else -errno. */
int uring_probe(void);

#endif
