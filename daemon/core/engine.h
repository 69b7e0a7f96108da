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
};

extern const struct engine uring_engine, epoll_engine;

/* 0 when this process may use io_uring with the features needed, else -errno. */
int uring_probe(void);

#endif
