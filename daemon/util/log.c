/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The log: lines on standard error.
 *
 * A line is put together in thread-local buffers (a fiber's stack is small, and nothing here waits for
 * another fiber) and leaves by one write(2), so lines of several threads never mix. What can't be
 * written is lost: a log must not stop the data.
 */
#include "nbdrs/log.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"

enum { TEXT_MAX = 2048, LINE_MAX_LEN = 4096 };

/* sd-daemon(3): SD_ERR, SD_WARNING, SD_INFO, SD_DEBUG. */
static const struct {
	const char *name, *journal;
} levels[] = {
	[LOG_LEVEL_ERROR] = { "error", "<3>" },
	[LOG_LEVEL_WARN] = { "warn", "<4>" },
	[LOG_LEVEL_INFO] = { "info", "<6>" },
	[LOG_LEVEL_DEBUG] = { "debug", "<7>" },
};

/* Relaxed: a thread that sees a new level a little late does no harm. */
static _Atomic int level_max = LOG_LEVEL_INFO;

void log_set_level(enum log_level level)
{
	atomic_store_explicit(&level_max, (int)level, memory_order_relaxed);
}

int log_level_parse(const char *name, enum log_level *level)
{
	for (unsigned i = 0; i < ARRAY_LEN(levels); i++) {
		if (strcmp(name, levels[i].name) == 0) {
			*level = (enum log_level)i;
			return 0;
		}
	}
	return -EINVAL;
}

bool log_enabled(enum log_level level)
{
	return (int)level <= atomic_load_explicit(&level_max, memory_order_relaxed);
}

/* A number in decimal digits at `text`; what follows it. NULL for anything else. */
static const char *take_number(const char *text, uintmax_t *out)
{
	char *end;

	if (*text < '0' || *text > '9')
		return NULL; /* strtoumax() takes signs and blanks */
	errno = 0;
	*out = strtoumax(text, &end, 10);
	return errno ? NULL : end;
}

/*
 * Whether standard error is the journal's socket. JOURNAL_STREAM is inherited by children whose output
 * was redirected, hence the comparison with the file itself (systemd.exec(5)).
 */
static bool is_journal(void)
{
	static _Atomic int known; /* 0 not yet looked, 1 no, 2 yes; racing threads find the same */
	const char *env;
	uintmax_t dev = 0, ino = 0;
	struct stat st;
	int is;

	is = atomic_load_explicit(&known, memory_order_relaxed);
	if (is)
		return is == 2;
	env = getenv("JOURNAL_STREAM");
	if (env)
		env = take_number(env, &dev);
	if (env)
		env = *env == ':' ? take_number(env + 1, &ino) : NULL;
	is = env && !*env && fstat(STDERR_FILENO, &st) == 0 && dev == (uintmax_t)st.st_dev &&
			     ino == (uintmax_t)st.st_ino
		     ? 2
		     : 1;
	atomic_store_explicit(&known, is, memory_order_relaxed);
	return is == 2;
}

/* Appends `text` with control characters escaped, so that a peer's bytes can't forge lines. */
static size_t escape(char *line, size_t at, size_t room, const char *text)
{
	static const char hex[] = "0123456789abcdef";

	for (; *text && at + 4 <= room; text++) {
		unsigned char c = (unsigned char)*text;

		if (c >= 0x20 && c != 0x7f) {
			line[at++] = (char)c;
		} else if (c == '\n') {
			line[at++] = '\\';
			line[at++] = 'n';
		} else {
			line[at++] = '\\';
			line[at++] = 'x';
			line[at++] = hex[c >> 4];
			line[at++] = hex[c & 15];
		}
	}
	return at;
}

void log_write(enum log_level level, const char *fmt, ...)
{
	static _Thread_local char text[TEXT_MAX], line[LINE_MAX_LEN];
	va_list ap;
	int saved_errno = errno, n;
	size_t len;

	if (!log_enabled(level))
		return;
	va_start(ap, fmt);
	n = vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	if (n >= (int)sizeof(text))
		memcpy(text + sizeof(text) - 4, "...", 4);

	if (is_journal())
		n = snprintf(line, sizeof(line), "%s", levels[level].journal);
	else
		n = snprintf(line, sizeof(line), "%s: %s: ", program_invocation_short_name,
			     levels[level].name);
	len = MIN((size_t)n, sizeof(line) / 2);
	len = escape(line, len, sizeof(line) - 1, text);
	line[len++] = '\n';
	if (write(STDERR_FILENO, line, len) < 0) {
		/* Nobody is left to tell. */
	}
	errno = saved_errno;
}

/*
 * The counters are updated without a lock. Two threads that meet at the turn of a window may let a
 * message too many through or count one twice; nothing is lost but exactness.
 */
bool log_gate_open(struct log_gate *gate, unsigned *suppressed)
{
	struct timespec ts;
	uint64_t now_ms, start_ms;

	(void)clock_gettime(CLOCK_MONOTONIC, &ts); /* can't fail for this clock */
	now_ms = (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000 + 1; /* never 0 */
	start_ms = __atomic_load_n(&gate->window_start_ms, __ATOMIC_RELAXED);
	if (!start_ms || now_ms - start_ms >= LOG_WINDOW_MS) {
		__atomic_store_n(&gate->window_start_ms, now_ms, __ATOMIC_RELAXED);
		__atomic_store_n(&gate->in_window, 0, __ATOMIC_RELAXED);
	}
	if (__atomic_fetch_add(&gate->in_window, 1, __ATOMIC_RELAXED) >= LOG_BURST) {
		__atomic_fetch_add(&gate->suppressed, 1, __ATOMIC_RELAXED);
		return false;
	}
	*suppressed = __atomic_exchange_n(&gate->suppressed, 0, __ATOMIC_RELAXED);
	return true;
}
