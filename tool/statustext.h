/* SPDX-License-Identifier: GPL-3.0-or-later */
/* A daemon's status for people, on standard output. Absent members count as 0 or empty. */
#ifndef NBDRS_STATUSTEXT_H
#define NBDRS_STATUSTEXT_H

#include <jansson.h>

/* The reply of `status`, with "exports" an array of the exports' objects; borrowed. */
void status_print(json_t *status);

/* The reply of `version`: one line. */
void version_print(json_t *version);

#endif
