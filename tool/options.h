/* SPDX-License-Identifier: GPL-3.0-or-later */
/* The command line of nbdrs-attach: text in, struct or error out. */
#ifndef NBDRS_OPTIONS_H
#define NBDRS_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "nbdrs/err.h"

enum action {
	ACT_ATTACH,
	ACT_DETACH,
	ACT_LIST,
	ACT_CHECK,
	ACT_WATCH,
	ACT_REAP,
	ACT_AUTOATTACH,
	ACT_VERSION,
	ACT_HELP,
};

/* A busy machine at boot takes longer than one that somebody sits at: with --conf. */
enum { WAIT_DEFAULT_S = 10, WAIT_BOOT_S = 60, DEAD_CONN_DEFAULT_S = 300, TIMEOUT_MULTI_S = 120, SECONDS_MAX = 86400 };

struct options {
	enum action action;
	const char *export;  /* attach */
	const char *device;  /* attach: NULL = the kernel picks; check, detach: device or export */
	const char *control; /* NULL = the default socket */
	const char *conf;    /* attach: the file that says how; autoattach: NULL = the default one */
	unsigned connections;
	uint32_t block_size; /* 0 = what the export needs */
	uint32_t timeout_s, dead_conn_timeout_s, wait_s;
	bool is_read_only, force, json, no_udev, until_eof;
};

/*
 * Parses argv. The strings of *o point into it. -EINVAL with a text that names the argument and what would
 * do; *o is then undefined.
 */
int options_parse(int argc, char **argv, struct options *o, struct err *err);

void options_help(FILE *out);

#endif
