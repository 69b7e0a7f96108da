/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Progress of long one-off work (init, destroy), for a person at a terminal.
 */
#ifndef NBDRS_PROGRESS_H
#define NBDRS_PROGRESS_H

#include <stdint.h>

/*
 * "deleting objects 1200 of 4096": redrawn on one line of standard error, at most five times a
 * second. Nothing is printed when that is no terminal, or inside the daemon. total 0 = not known.
 * Any thread; does not suspend.
 */
void progress(const char *what, uint64_t done, uint64_t total);

/* Clears the line, if there is one. */
void progress_end(void);

/* Off by default: only commands that a person waits for show it. */
void progress_allow(void);

#endif
