/* SPDX-License-Identifier: GPL-3.0-or-later */
/* What nbdrs-attach does: each returns an exit status (say.h) and has said what there is to say. */
#ifndef NBDRS_ATTACH_H
#define NBDRS_ATTACH_H

#include "options.h"

int attach_run(const struct options *o);
/* Detaches devices that the daemon does not serve; with --force also those that are in use. */
int reap_run(const struct options *o);
/* Keeps devices connected, until a signal comes. */
int watch_run(const struct options *o);
int detach_run(const struct options *o);

#endif
