/* SPDX-License-Identifier: GPL-3.0-or-later */
#include "nbdrs/progress.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <unistd.h>

#include "nbdrs/reactor.h"

#define REDRAW_NS UINT64_C(200000000)

static struct {
	pthread_mutex_t lock;
	bool is_allowed, is_drawn;
	uint64_t drawn_at; /* ns */
} line = { .lock = PTHREAD_MUTEX_INITIALIZER };

void progress_allow(void)
{
	line.is_allowed = isatty(STDERR_FILENO) == 1;
}

void progress(const char *what, uint64_t done, uint64_t total)
{
	uint64_t now;

	if (!line.is_allowed)
		return;
	now = now_ns();
	pthread_mutex_lock(&line.lock);
	if (!line.is_drawn || now - line.drawn_at >= REDRAW_NS) {
		/* To the beginning of the line, and what is left of the last text goes. */
		if (total)
			(void)fprintf(stderr, "\r\033[K%s %" PRIu64 " of %" PRIu64, what, done, total);
		else
			(void)fprintf(stderr, "\r\033[K%s %" PRIu64, what, done);
		(void)fflush(stderr);
		line.is_drawn = true;
		line.drawn_at = now;
	}
	pthread_mutex_unlock(&line.lock);
}

void progress_end(void)
{
	pthread_mutex_lock(&line.lock);
	if (line.is_drawn)
		(void)fprintf(stderr, "\r\033[K");
	line.is_drawn = false;
	pthread_mutex_unlock(&line.lock);
}
