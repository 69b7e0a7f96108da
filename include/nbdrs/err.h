/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Error texts of set-up code: what is wrong, with which thing, and the mend. The data path returns
 * -errno only.
 */
#ifndef NBDRS_ERR_H
#define NBDRS_ERR_H

struct err {
	char msg[768];
};

/*
 * Writes the message (printf style, truncated when too long) and returns `rc` unchanged, so that
 * `return err_set(err, -EINVAL, ...)` reads well. `err` may be NULL. Any thread, does not suspend.
 */
int err_set(struct err *err, int rc, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* Puts "prefix: " before the message that is there already; returns rc. */
int err_prefix(struct err *err, int rc, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/*
 * One word for an error number in its own terms ("ENOSPC"); "errno 999" for one without a name.
 * Takes errno or -errno. The text is static or in a thread-local buffer.
 */
const char *err_name(int rc);

#ifdef __clang_analyzer__
/* make tidy sees one file at a time: this tells it that a failure's rc comes back as it went in. */
#define err_set(err, rc, ...) (err_set(err, rc, __VA_ARGS__), (rc))
#define err_prefix(err, rc, ...) (err_prefix(err, rc, __VA_ARGS__), (rc))
#endif

#endif
