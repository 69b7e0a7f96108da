/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Shared by listen.c, which opens listening sockets, and accept.c, which takes clients from them.
 */
#ifndef NBDRS_LISTEN_INT_H
#define NBDRS_LISTEN_INT_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/types.h>

#include "nbdrs/io.h"
#include "nbdrs/list.h"
#include "nbdrs/reactor.h"

enum { ADDRESS_TEXT_MAX = 64 }; /* "[v6 with scope]:port" */

struct listener {
	struct list node;
	int fd;
	bool is_unix;
	char *path;     /* unix socket file that we made, else NULL */
	dev_t path_dev; /* what the file was when we made it: */
	ino_t path_ino; /* only that one is removed */
	struct io_watch watch;
	struct timer pause; /* runs while accepting is suspended after an error */
	bool is_watching;   /* watch.fn will run */
};

/* All that are open, accepting or not. Changed on reactor 0 only, before and after accepting. */
extern struct list listeners;

/* "127.0.0.1:4711", "[::1]:4711" or "unix". */
void address_format(const struct sockaddr_storage *addr, char *out, size_t out_len);

/* Closes, removes the socket file if it is still ours, frees. */
void listener_free(struct listener *l);

#endif
