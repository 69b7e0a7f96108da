/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * One line per event on standard error, `what happened key=value ...`; with sd-daemon level prefixes
 * ("<4>") when the journal reads it (JOURNAL_STREAM). error = data or service lost; warn = degraded;
 * info = life cycle; debug = the rest. Never a secret: URLs are redacted by who logs them.
 */
#ifndef NBDRS_LOG_H
#define NBDRS_LOG_H

#include <stdbool.h>
#include <stdint.h>

enum log_level { LOG_LEVEL_ERROR, LOG_LEVEL_WARN, LOG_LEVEL_INFO, LOG_LEVEL_DEBUG };

/* Sets what is printed from now on; default info. */
void log_set_level(enum log_level level);

/* Parses "error", "warn", "info", "debug"; -EINVAL for anything else. */
int log_level_parse(const char *name, enum log_level *level);

bool log_enabled(enum log_level level);

/* Any thread; one write(2) per line, so lines never mix. Control characters are escaped. */
void log_write(enum log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define log_error(...) log_write(LOG_LEVEL_ERROR, __VA_ARGS__)
#define log_warn(...) log_write(LOG_LEVEL_WARN, __VA_ARGS__)
#define log_info(...) log_write(LOG_LEVEL_INFO, __VA_ARGS__)
#define log_debug(...)                                                                             \
	do {                                                                                       \
		if (log_enabled(LOG_LEVEL_DEBUG))                                                  \
			log_write(LOG_LEVEL_DEBUG, __VA_ARGS__);                                   \
	} while (0)

/*
 * A gate for messages that a peer or a sick disk can repeat: true at most `LOG_BURST` times a
 * `LOG_WINDOW_MS`; the first message let through after some were held back should print
 * `suppressed`. Zero-initialised = ready. Any thread.
 */
struct log_gate {
	uint64_t window_start_ms;
	unsigned in_window;
	unsigned suppressed;
};

enum { LOG_BURST = 5, LOG_WINDOW_MS = 10000 };

bool log_gate_open(struct log_gate *gate, unsigned *suppressed);

#endif
