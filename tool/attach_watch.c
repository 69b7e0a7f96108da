/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * `--watch`: keeps devices connected to the daemon at one control socket. nbdrsd runs one of these beside
 * itself, because it takes CAP_SYS_ADMIN to give the kernel sockets, and because requests to the driver may
 * hang. It also can be a service of its own.
 *
 * It looks at all devices when it starts, when the kernel says that a connection is dead, and now and then.
 * For each that the daemon serves but that lacks connections:
 *
 *	reattach  done: said once
 *	no daemon, or the kernel takes none yet: again after a pause that grows to RETRY_MAX_MS
 *	orphaned, or of another size: said once, left alone
 *
 * It knows nothing that it could not find out again, so it may be killed at any time.
 */
#include "attach.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "child.h"
#include "ctlclient.h"
#include "devices.h"
#include "nbdrs/cleanup.h"
#include "nl.h"
#include "reattach.h"
#include "say.h"

enum {
	RETRY_MIN_MS = 20,
	RETRY_MAX_MS = 500,
	IDLE_MS = 5000,	     /* between looks while all is well: an event may have been lost */
	DEAF_MS = 500,	     /* the same while the driver's events can't be heard: it is not loaded */
	REATTACH_MS = 10000, /* for one device, before the others have their turn */
	LOOK_MS = 2000,
};

struct watch {
	const struct options *o;
	struct nbdnl *nl; /* NULL = deaf */
	struct device *d; /* that is being looked at */
	struct said {
		uint32_t index;
		int rc;
	} *said; /* what was last said of each device */
	size_t said_n;
	bool must_retry;
	int fatal; /* an exit status; 0 = go on */
};

/* True when `rc` is news for that device. */
static bool is_news(struct watch *w, uint32_t index, int rc)
{
	struct said *more;

	for (size_t i = 0; i < w->said_n; i++)
		if (w->said[i].index == index) {
			const bool news = w->said[i].rc != rc;

			w->said[i].rc = rc;
			return news;
		}
	more = reallocarray(w->said, w->said_n + 1, sizeof(*more));
	if (more) {
		w->said = more;
		w->said[w->said_n++] = (struct said){ index, rc };
	}
	return rc != 0;
}

static void mend(struct watch *w, unsigned missing)
{
	const struct device *d = w->d;
	const uint64_t begin = now_ms();
	struct err err = { "" };
	int rc = reattach(w->o->control, d, REATTACH_MS, &err);

	switch (rc) {
	case 0:
		(void)is_news(w, d->index, 0);
		note("/dev/%s has %u new connection%s to '%s' ms=%u", d->name, missing, missing == 1 ? "" : "s",
		     d->export, (unsigned)(now_ms() - begin));
		return;
	case -EPERM:
		w->fatal = fail(EXIT_NO_PERMISSION,
				"devices cannot be given new connections without CAP_SYS_ADMIN");
		return;
	case -ENOENT:
	case -ESTALE: break;
	default: w->must_retry = true;
	}
	if (is_news(w, d->index, rc))
		note("/dev/%s waits for a connection: %s", d->name, err.msg);
}

static void look(struct watch *w, uint32_t index)
{
	struct device *d = w->d;
	struct err err = { "" };
	struct link l;

	if (device_get(index, d) || !d->is_connected || !d->export[0])
		return;
	switch (reattach_look(w->o->control, d, LOOK_MS, &l, &err)) {
	case LINK_CUT: mend(w, l.wanted - l.alive); break;
	case LINK_WAITING:
		w->must_retry = true;
		if (is_news(w, index, -ECONNREFUSED))
			note("/dev/%s waits for its daemon: %s", d->name, err.msg);
		break;
	case LINK_ORPHAN:
		if (is_news(w, index, -ENOENT))
			note("/dev/%s is orphaned: %s", d->name, err.msg);
		break;
	default: (void)is_news(w, index, 0); break;
	}
}

static void look_at_all(struct watch *w)
{
	_cleanup_free_ uint32_t *list = NULL;
	size_t n = 0;

	w->must_retry = false;
	if (devices_scan(&list, &n)) {
		w->must_retry = true; /* no memory */
		return;
	}
	for (size_t i = 0; i < n && !w->fatal && !interrupted(); i++)
		look(w, list[i]);
}

/* The driver may be loaded later. */
static void hear(struct watch *w)
{
	if (w->nl || nbdnl_open(&w->nl))
		return;
	if (nbdnl_listen(w->nl)) {
		nbdnl_close(w->nl);
		w->nl = NULL;
	}
}

/* Waits for an event or `ms`. False when standard input has ended and that is to be the end. */
static bool wait_event(struct watch *w, unsigned ms)
{
	struct pollfd fds[2] = { { .fd = w->nl ? nbdnl_fd(w->nl) : -1, .events = POLLIN },
				 { .fd = w->o->until_eof ? STDIN_FILENO : -1, .events = POLLIN } };
	char c;

	if (poll(fds, 2, (int)ms) <= 0)
		return true; /* time, or a signal */
	if (fds[0].revents)
		nbdnl_drain(w->nl);
	return !fds[1].revents || read(STDIN_FILENO, &c, 1) > 0;
}

int watch_run(const struct options *o)
{
	struct watch w = { .o = o, .d = malloc(sizeof(*w.d)) };
	unsigned pause = RETRY_MIN_MS;
	bool goes_on = w.d != NULL;

	interrupts_catch();
	if (!w.d)
		w.fatal = fail(EXIT_FAILED, "out of memory");
	while (goes_on && !w.fatal && !interrupted()) {
		hear(&w); /* before the look, so that nothing happens unheard in between */
		look_at_all(&w);
		pause = w.must_retry ? MIN(pause * 2, (unsigned)RETRY_MAX_MS) : RETRY_MIN_MS;
		if (!w.fatal && !interrupted())
			goes_on = wait_event(&w, w.must_retry ? pause : w.nl ? IDLE_MS : DEAF_MS);
	}
	nbdnl_close(w.nl);
	free(w.said);
	free(w.d);
	return w.fatal;
}
