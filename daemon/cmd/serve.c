/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * `serve`: the daemon's life.
 *
 *	parse -> open exports -> bind -> accept -> control socket -> READY   (a failure undoes what was done)
 *	READY -> `upgrade` -> stores asked, flushed -> held: nothing is read, what is in flight ends -> flushed ->
 *	everything written down, the list of exports read again -> closed as below, but no socket -> exec; a failure
 *	before "closed" goes back to READY, and so does being asked to stop; later the next one is asked to stop
 *	(a new image that was left something takes it in place of bind, and accepts it before it accepts others)
 *	READY -> SIGTERM or SIGINT -> connections of devices are kept, where that can be (fdstore.c) -> control socket
 *	closed -> listeners closed -> connections drained -> exports flushed and closed -> exit
 *	a second signal, at any time -> exit at once
 *
 * The main thread does nothing but wait for signals (signals.c); what takes time runs on reactor 0. Kernel
 * devices outlive the daemon: they wait for it as long as their dead-connection time-out says.
 */
#include "cmd/cmd.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "cmd/signals.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/conn.h"
#include "nbdrs/ctl.h"
#include "nbdrs/export.h"
#include "nbdrs/handover.h"
#include "nbdrs/io.h"
#include "net/listen.h"

struct serve {
	const struct args *a;
	struct spec **specs; /* one per volume; NULL once an export has it */
	struct signals signals;
	bool has_control;
	bool has_flush_failed;
	struct handover left; /* what another one left to us, or we leave to the next */
	int left_fd;	      /* the same as a file, -1 = not yet */
	bool was_left;
	bool is_kept; /* `left` is for the service manager */
	struct err err;
};

/* --- On reactor 0 ------------------------------------------------------------------------------- */

/* IPv6 may be switched off; everything else that goes wrong with a default address is an error. */
static CO_FN int listen_default(struct err *err)
{
	int rc = listen_tcp("127.0.0.1:10809", err);

	if (rc)
		return rc;
	rc = listen_tcp("[::1]:10809", err);
	if (rc == -EAFNOSUPPORT || rc == -EADDRNOTAVAIL) {
		log_info("not listening on [::1]:10809: no IPv6 on this machine");
		return 0;
	}
	return rc;
}

static CO_FN int open_listeners(const struct args *a, struct err *err)
{
	const int passed = listen_systemd(err);
	int rc = passed < 0 ? passed : 0;

	/* Sockets from systemd take the place of the default ones. */
	if (passed == 0 && !a->is_listen_given)
		rc = listen_default(err);
	for (unsigned i = 0; i < a->listen_n && !rc; i++)
		rc = listen_tcp(a->listen[i], err);
	for (unsigned i = 0; i < a->unix_n && !rc; i++)
		rc = listen_unix(a->unix_paths[i], err);
	if (!rc && passed == 0 && a->is_listen_given && a->listen_n == 0 && a->unix_n == 0 && !a->control)
		rc = err_set(err, -EINVAL,
			     "nothing could ever connect: --listen and --control are none; give --listen, "
			     "--unix or --control");
	return rc;
}

static CO_FN int open_exports(struct serve *s)
{
	const size_t n = s->a->volumes_n;
	_cleanup_free_ struct export_arg *args = calloc(n, sizeof(*args));

	if (!args)
		return err_set(&s->err, -ENOMEM, "out of memory");
	for (size_t i = 0; i < n; i++)
		args[i] = (struct export_arg){ s->a->volumes[i].name, TAKE_PTR(s->specs[i]) };
	return exports_open(args, n, s->a->read_only, &s->err);
}

/* The default path may be out of reach for a plain user, who then does without. */
static CO_FN int open_control(struct serve *s)
{
	int rc;

	if (!s->a->control)
		return 0;
	rc = ctl_start(s->a->control, s->a->control_group, &s->err);
	if (!s->a->is_control_given && (rc == -EACCES || rc == -EPERM || rc == -EROFS)) {
		log_warn("no control socket, so no attach and no status: %s; name one by --control",
			 s->err.msg);
		return 0;
	}
	s->has_control = rc == 0;
	return rc;
}

static CO_FN void close_all(struct serve *s)
{
	unsigned cut;
	int rc;

	if (s->has_control)
		ctl_stop();
	listeners_stop();
	if (conns_n())
		log_info("draining connections=%u", conns_n());
	retry_stop_by(now_ns() + s->a->drain_ns);
	cut = conns_drain(now_ns() + s->a->drain_ns);
	if (cut)
		log_warn("connections cut off when the drain time was over n=%u", cut);
	retry_stop_by(now_ns() + s->a->drain_ns); /* once more as long, for the last flush */
	rc = exports_close(false);
	watchdog_stop(); /* last: a drain that hangs is noticed */
	if (rc) {
		s->has_flush_failed = true;
		log_error("a flush failed at stop: writes may be lost error=%s", err_name(rc));
	}
}

static const char *watched_control; /* for the hook, which has no argument */

static void device_attached(void)
{
	watcher_start(watched_control);
}

static struct listen_conf listen_conf(const struct serve *s)
{
	return (struct listen_conf){ .max_conns = s->a->max_conns, .handshake_ns = s->a->handshake_ns };
}

/* The connections of the nbdrsd before this, and then its devices. */
static CO_FN int take_over(struct serve *s)
{
	const size_t n = s->left.conns_n;
	unsigned lost = conns_adopt(&s->left);
	int rc = ctl_devices_adopt(&s->left);

	if (rc)
		return err_set(&s->err, rc, "out of memory");
	ctl_generation = s->left.generation;
	log_info("taken over connections=%zu lost=%u generation=%u", n - lost, lost, ctl_generation);
	fdstore_forget();
	handover_clear(&s->left);
	return 0;
}

static CO_FN int start_run(void *arg)
{
	struct serve *s = arg;
	const struct listen_conf conf = listen_conf(s);
	/* First: the manager's clock runs since before an upgrade, and a journal may be long. */
	int rc = watchdog_start(&s->err);

	if (!rc)
		rc = open_exports(s);
	if (!rc)
		rc = s->left.listeners_n ? listeners_adopt(&s->left, &s->err) : open_listeners(s->a, &s->err);
	if (!rc && s->was_left)
		rc = take_over(s);
	if (!rc)
		rc = listeners_start(&conf, &s->err);
	/* Last: who gets an answer here may count on the daemon to serve. */
	if (!rc)
		rc = open_control(s);
	if (rc)
		close_all(s);
	return rc;
}

static int save_file(void *arg)
{
	struct serve *s = arg;

	return upgrade_save(&s->left, &s->left_fd, &s->err);
}

/* With nothing in flight. All that may fail is in here. */
static CO_FN int write_down(struct serve *s)
{
	int rc = exports_flush();

	if (rc)
		return err_set(&s->err, rc, "a flush failed (%s)", err_name(rc));
	s->left.generation = ctl_generation + 1;
	rc = conns_save(&s->left);
	if (!rc)
		rc = listeners_save(&s->left);
	if (!rc)
		rc = ctl_devices_save(&s->left);
	if (rc)
		return err_set(&s->err, rc, "out of memory");
	rc = offload(save_file, s);
	if (!rc)
		rc = upgrade_check_again(&s->err);
	if (!rc && s->signals.stop)
		rc = err_set(&s->err, -ECANCELED, "it was asked to stop");
	return rc;
}

/*
 * What takes long, while everybody is served. A flush may wait for a store for minutes, so that is asked before;
 * and after, because it may have gone away meanwhile.
 */
static CO_FN int prepare_leave_run(void *arg)
{
	struct serve *s = arg;
	int rc = upgrade_check_stores(&s->err);

	if (!rc) {
		rc = exports_flush();
		if (rc)
			(void)err_set(&s->err, rc, "a flush failed (%s)", err_name(rc));
	}
	if (!rc)
		rc = upgrade_check_stores(&s->err);
	if (rc)
		exports_thaw();
	return rc;
}

/* 0: nothing is served any more, and the next one has all it needs. Else everything goes on. */
static CO_FN int leave_run(void *arg)
{
	struct serve *s = arg;
	const struct listen_conf conf = listen_conf(s);
	int rc;

	listeners_hold();
	rc = conns_hold(false, now_ns() + s->a->drain_ns);
	if (rc)
		(void)err_set(&s->err, rc, "requests in flight took longer than --drain-timeout");
	else
		rc = write_down(s);
	if (rc) {
		struct err err = { "" };

		handover_clear(&s->left);
		if (s->left_fd >= 0)
			(void)close(TAKE_FD(s->left_fd));
		exports_thaw();
		conns_resume();
		if (listeners_start(&conf, &err))
			log_error("no new clients: %s", err.msg);
		return rc;
	}
	if (s->has_control)
		ctl_stop();
	conns_forget();
	listeners_forget();
	(void)conns_drain(now_ns()); /* there are none: what they shared */
	retry_stop_by(now_ns()); /* all is flushed, and in the store or in a journal that the next one finds */
	rc = exports_close(true);
	watchdog_stop(); /* the next one starts its own */
	if (rc)
		log_error("closing for an upgrade: error=%s", err_name(rc)); /* flushed before: nothing is lost */
	return 0;
}

/*
 * Where the service manager keeps descriptors: those of kernel devices, for the daemon that it may start next. All
 * others end as ever. What goes wrong here costs a pause: devices wait for new connections then.
 */
static CO_FN void keep_devices(struct serve *s)
{
	int rc = conns_hold(true, now_ns() + s->a->drain_ns);

	s->left.generation = ctl_generation + 1;
	if (!rc)
		rc = conns_save(&s->left);
	if (!rc && s->left.conns_n >= fdstore_room()) /* one is for the file */
		rc = -ENOSPC;
	if (!rc && s->left.conns_n)
		rc = ctl_devices_save(&s->left);
	if (!rc && s->left.conns_n)
		rc = offload(save_file, s);
	if (!rc && s->left.conns_n) {
		conns_forget();
		s->is_kept = true;
		return;
	}
	if (rc)
		log_warn("connections of devices are not kept for the next nbdrsd error=%s", err_name(rc));
	handover_clear(&s->left);
	conns_resume();
}

static CO_FN int stop_run(void *arg)
{
	struct serve *s = arg;

	if (fdstore_room())
		keep_devices(s);
	close_all(s);
	return 0;
}

/* --- Going over, or stopping --------------------------------------------------------------------- */

/* On the reactor that answers the control socket, which reads it. */
static CO_FN int tell_called_off(void *arg)
{
	const struct serve *s = arg;

	ctl_upgrade_err = s->err;
	return 0;
}

/* True when everything has been handed over, and only exec is left. */
static bool try_upgrade(struct serve *s)
{
	const uint64_t begin = now_ns();
	eventfd_t count;
	bool had_watcher = false;
	int rc;

	(void)eventfd_read(upgrade_event_fd(), &count); /* poll said so */
	notify_manager("STATUS=going over to a new nbdrsd");
	log_info("going over to a new nbdrsd");
	s->err.msg[0] = '\0';
	rc = signals_call(&s->signals, prepare_leave_run, s);
	if (!rc) {
		had_watcher = watcher_stop(); /* while all goes on: the helper may be waiting for the driver */
		rc = signals_call(&s->signals, leave_run, s);
	}
	if (!rc) {
		log_info("handed over connections=%zu ms=%u", s->left.conns_n,
			 (unsigned)((now_ns() - begin) / 1000000));
		return true;
	}
	log_error("the upgrade was called off, this daemon goes on error=%s reason=\"%s\"", err_name(rc),
		  s->err.msg);
	watcher_may_start();
	if (had_watcher || (s->has_control && watcher_has_devices())) /* one was attached meanwhile, perhaps */
		watcher_start(s->a->control);
	(void)signals_call(&s->signals, tell_called_off, s); /* always 0 */
	notify_manager("STATUS=serving; an upgrade was called off");
	return false;
}

/* True when it ends for an upgrade. */
static bool wait_for_stop(struct serve *s)
{
	struct pollfd fds[2] = { { .fd = s->signals.fd, .events = POLLIN },
				 { .fd = upgrade_event_fd(), .events = POLLIN } };

	while (!s->signals.stop) {
		if (poll(fds, ARRAY_LEN(fds), -1) <= 0)
			continue;
		if (fds[0].revents)
			signals_take(&s->signals);
		else if (fds[1].revents && try_upgrade(s))
			return true;
	}
	return false;
}

/* --- The command -------------------------------------------------------------------------------- */

/* With the reactors running. An exit code. */
static int serve_on_reactors(struct serve *s)
{
	char text[128];
	bool is_upgrade;
	int rc = signals_call(&s->signals, start_run, s);

	if (rc) {
		cmd_complain("%s", *s->err.msg ? s->err.msg : strerror(-rc));
		return CMD_FAILED;
	}
	log_info("ready version=%s exports=%u engine=%s threads=%u", NBDRS_VERSION, s->a->volumes_n,
		 reactors_engine(), reactors_n());
	(void)snprintf(text, sizeof(text), "READY=1\nSTATUS=serving %u export%s", s->a->volumes_n,
		       s->a->volumes_n == 1 ? "" : "s");
	notify_manager(text);
	if (s->has_control && watcher_has_devices())
		watcher_start(s->a->control);
	is_upgrade = wait_for_stop(s);
	if (is_upgrade)
		return CMD_OK; /* serve() does the rest, without threads */

	(void)watcher_stop(); /* or it would try to mend what we are about to end */
	notify_manager("STOPPING=1\nSTATUS=waiting for requests in flight");
	(void)signals_call(&s->signals, stop_run, s); /* what can fail is in has_flush_failed */
	log_info("stopped");
	return s->has_flush_failed ? CMD_FAILED : CMD_OK;
}

static int parse_volumes(struct serve *s)
{
	for (unsigned i = 0; i < s->a->volumes_n; i++) {
		int rc = volume_parse(&s->a->volumes[i], s->a->read_only, &s->specs[i], NULL, &s->err);

		if (rc)
			return rc;
	}
	return 0;
}

static int serve(struct serve *s)
{
	int code, rc = signals_open(&s->signals);

	if (rc) {
		cmd_complain("cannot receive signals: %s", strerror(-rc));
		return CMD_FAILED;
	}
	process_prepare();
	watched_control = s->a->control;
	ctl_attached_hook = device_attached;
	ctl_upgrade_hook = upgrade_ask;
	cache_mem_limit(s->a->cache_mem);
	rc = reactors_start(&s->a->reactor, &s->err);
	if (rc) {
		cmd_complain("%s", s->err.msg);
		return CMD_FAILED;
	}
	code = serve_on_reactors(s);
	reactors_stop();
	if (s->is_kept) {
		rc = fdstore_put(&s->left, s->left_fd);
		log_info("left to the service manager connections=%zu error=%s", s->left.conns_n,
			 rc ? err_name(rc) : "none");
		return code;
	}
	if (s->left_fd < 0)
		return code;
	/*
	 * Asked to stop when there was no way back: journals are unsent, socket files there. The next one does it
	 * all, for a blocked signal waits over an exec.
	 */
	if (s->signals.stop)
		(void)kill(getpid(), s->signals.stop); /* can't fail */
	rc = upgrade_exec(&s->left, s->left_fd);
	cmd_complain("cannot go over to a new program: %s", strerror(-rc));
	return CMD_FAILED;
}

/* The command line is right; can it read what the one that asks would leave? */
static int check_handover(struct serve *s)
{
	for (unsigned i = 0; i < s->a->volumes_n; i++)
		spec_free(s->specs[i]);
	free(s->specs);
	if (s->a->check_handover == HANDOVER_FORMAT) {
		printf(HANDOVER_YES "\n");
		return CMD_OK;
	}
	cmd_complain("nbdrsd %s takes over format %d, not %u; restart it instead", NBDRS_VERSION, HANDOVER_FORMAT,
		     s->a->check_handover);
	return CMD_FAILED;
}

int cmd_serve(const struct args *a)
{
	struct serve s = { .a = a, .signals = { .fd = -1 }, .left_fd = -1 };
	int code = CMD_USAGE, rc; /* 2 says that another try is no use */

	s.specs = calloc(a->volumes_n, sizeof(struct spec *));
	if (!s.specs || upgrade_prepare(a)) {
		cmd_complain("out of memory");
		free(s.specs);
		return CMD_FAILED;
	}
	rc = parse_volumes(&s);
	if (!rc && a->check_handover)
		return check_handover(&s);
	if (!rc) {
		code = CMD_FAILED;
		rc = upgrade_take(&s.left, &s.err);
		if (!rc)
			rc = fdstore_take(&s.left);
		s.was_left = rc > 0;
		rc = MIN(rc, 0);
	}
	if (!rc)
		code = serve(&s);
	else
		cmd_complain("%s", s.err.msg);
	handover_clear(&s.left);
	for (unsigned i = 0; i < a->volumes_n; i++)
		spec_free(s.specs[i]);
	free(s.specs);
	if (s.signals.fd >= 0)
		(void)close(s.signals.fd);
	return code;
}
