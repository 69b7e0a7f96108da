/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * How nbdrs-attach speaks to people and scripts: exit statuses, and one-line messages on standard
 * error. Standard output is for results only.
 */
#ifndef NBDRS_SAY_H
#define NBDRS_SAY_H

/* Documented in nbdrs-attach(8); scripts depend on the numbers. */
enum exit_status {
	EXIT_OK = 0,
	EXIT_FAILED = 1,    /* anything without a number of its own; --check: not connected */
	EXIT_USAGE = 2,     /* wrong arguments; --check: cannot tell */
	EXIT_NO_DAEMON = 3, /* nothing answers at the control socket */
	EXIT_NO_EXPORT = 4, /* no such export, or --detach of what is not attached */
	EXIT_BUSY = 5,      /* the device serves something else, or the export is on another one */
	EXIT_NO_MODULE = 6, /* the kernel has no nbd driver */
	EXIT_NO_PERMISSION = 7, /* not root */
	EXIT_TIMED_OUT = 8,     /* not usable in time, or the device does not answer */
	EXIT_REFUSED = 9,       /* mounted, held, swapped on; or the device would store itself */
	EXIT_DATA_LOST = 10,    /* detached, but writes to it had failed */
	EXIT_INTERRUPTED = 130, /* by a signal; half-done work was undone */
};

/* Prints "nbdrs-attach: MESSAGE" on standard error, in one line. */
void note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* The same, as an expression whose value is the exit status: return fail(EXIT_BUSY, "...", ...). */
#define fail(status, ...) (note(__VA_ARGS__), (status))

#endif
