/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Signals of the daemon: blocked in all threads and read from a signalfd by the main thread, also while it waits for
 * something that takes time.
 *
 *	SIGTERM, SIGINT		asks to stop; a second one ends the process at once
 *	SIGHUP			is ignored, with a line in the log
 */
#ifndef NBDRS_CMD_SIGNALS_H
#define NBDRS_CMD_SIGNALS_H

#include "nbdrs/co.h"

struct signals {
	int fd;           /* readable: signals_take(); the caller closes it */
	_Atomic int stop; /* we were asked to stop by it, 0 = not yet */
};

/* Blocks them for this and all later threads; -errno. */
int signals_open(struct signals *s);
/* Reads one signal and acts on it; does not return after the second that asks to stop. */
void signals_take(struct signals *s);
/* What fn returns, in a fiber on reactor 0; signals are heard meanwhile. */
int signals_call(struct signals *s, CO_FN int (*fn)(void *arg), void *arg);

#endif
