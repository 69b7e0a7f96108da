/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The lock that is held while a device of the nbd driver gets an export, or another size: so that no export is attached
 * twice, and none while it is being resized.
 */
#ifndef NBDRS_LOCK_H
#define NBDRS_LOCK_H

#include "nbdrs/err.h"

/* Waits for it, a minute at most. *out is the caller's to close. -EACCES: not root; -ETIMEDOUT; -EINTR: a signal. */
int lock_take(int *out, struct err *err);

#endif
