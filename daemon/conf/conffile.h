/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Configuration files: one thing a line, made of the words that a command line would have.
 *
 *	# exports.conf
 *	disk0   sharded  s3:http://host:9000/bucket/disk0/
 *	"a b"   raw      'fault[rate=1%]:file:/srv/b.img'
 *
 * Blanks and tabs part words. A word that begins with a quote goes up to the same quote, so that it may hold blanks;
 * between double quotes \" and \\ stand for " and \. Elsewhere quotes and backslashes are what they are, as chains
 * have a use for them. A word that begins with # ends the line.
 */
#ifndef NBDRS_CONF_CONFFILE_H
#define NBDRS_CONF_CONFFILE_H

#include <stddef.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/err.h"

enum { CONF_BYTES_MAX = 1 << 20, CONF_WORDS_MAX = 64 };

struct conf_line {
	unsigned number; /* in the file, from 1 */
	unsigned words_n;
	char **words; /* never none, and a NULL behind them */
};

struct conf_file {
	char *path; /* for messages */
	char *text; /* holds the words */
	char **words;
	struct conf_line *lines; /* those with words */
	size_t lines_n;
};

/*
 * Parses `len` bytes at `text`; `path` is for messages: "PATH:LINE: what is wrong". -EINVAL, -ENOMEM. Pure. On success
 * the caller owns what is in *out (conf_free).
 */
int conf_parse(const char *path, const char *text, size_t len, struct conf_file *out,
	       struct err *err);

/* The same with what is in the file. -ENOENT, with a message, when there is none; -EFBIG; else as open and read. */
int conf_read(const char *path, struct conf_file *out, struct err *err);

void conf_free(struct conf_file *f);

#define _cleanup_conf_ _cleanup_(conf_free)

#endif
