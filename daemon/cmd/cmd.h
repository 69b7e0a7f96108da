/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The commands of nbdrsd: what the command line says (args.c), and what each command does.
 */
#ifndef NBDRS_CMD_H
#define NBDRS_CMD_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "conf/conffile.h"
#include "nbdrs/co.h"
#include "nbdrs/err.h"
#include "nbdrs/export.h"
#include "nbdrs/layer.h"
#include "nbdrs/log.h"
#include "nbdrs/reactor.h"
#include "nbdrs/spec.h"

/* Exit codes of nbdrsd; nbdrsd(8) documents them. */
enum {
	CMD_OK = 0,
	CMD_FAILED = 1, /* could not start, open, make, remove; or the last flush failed */
	CMD_USAGE = 2,	/* the command line, a chain included, is wrong; nothing was touched */
	CMD_CUT = 3,	/* a second signal ended it before everything was drained */
};

/* Words of the command line, borrowed from argv, or of a file of exports. */
struct volume_arg {
	char *name; /* NULL when given without -e */
	char *driver, *conn;
	const char *file; /* where they stand; NULL = on the command line */
	unsigned line;
};

struct args {
	int (*run)(const struct args *a); /* the command; returns an exit code */
	char **argv;			  /* the whole line; secrets in it get masked later */
	int argc;
	unsigned check_handover;	  /* 0 = no, else the format in question */
	const char *command;
	const char *topic;		  /* of `help`; NULL = none */
	struct volume_arg *volumes;	  /* -e, or DRIVER CONN, in order */
	unsigned volumes_n, volumes_room;
	struct conf_file *files;	  /* --exports, and the files that it names */
	unsigned files_n;
	char **listen, **unix_paths;	  /* --listen (without "none"), --unix */
	unsigned listen_n, unix_n;
	bool is_listen_given;		  /* --listen was there, if only as "none" */
	const char *control;		  /* NULL = none */
	bool is_control_given;
	const char *control_group;	  /* NULL = none */
	unsigned max_conns;
	uint64_t handshake_ns, drain_ns;
	uint64_t size, cache_mem;	  /* bytes; 0 = not given */
	bool read_only, force, open;
	struct reactor_conf reactor;
	enum log_level log_level;
};

/*
 * Fills `a` from the command line. 0, or -1 when there is nothing left to do, with *exit_code: help or
 * the version was printed, or an error (on stderr, with the offending word). args_free in any case.
 */
int args_parse(int argc, char **argv, struct args *a, int *exit_code);
void args_free(struct args *a);
/* Appends a volume; -EINVAL for a name that is there already. */
int args_add_volume(struct args *a, const struct volume_arg *v, struct err *err);
/* Appends the exports of a file (exports.c). -errno, with the file and the line in the text. */
int args_read_exports(struct args *a, const char *path, struct err *err);
/* The usage text of all commands. */
void args_print_help(void);

int cmd_serve(const struct args *a);
int cmd_init(const struct args *a);
int cmd_destroy(const struct args *a);
int cmd_check(const struct args *a);
int cmd_info(const struct args *a);
int cmd_help(const struct args *a);
int cmd_layers(const struct args *a);

/* "nbdrsd: MESSAGE" on stderr. */
void cmd_complain(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/*
 * Parses a volume's chain and builds it, unopened, so that every mistake in it is found before anything
 * is touched; then masks the secrets in its words of the command line, for `ps`. The caller owns *spec
 * (spec_free) and, unless `chain` is NULL, *chain (chain_free, before the spec). -EINVAL as
 * export_check_name, spec_parse and chain_build, with the export's name in the text.
 */
int volume_parse(const struct volume_arg *v, bool read_only, struct spec **spec, struct chain **chain,
		 struct err *err);

/*
 * Prepares the process for serving: raises RLIMIT_NOFILE, takes core dumps away, asks the kernel for
 * IO_FLUSHER and locked memory. What is not permitted costs one log line each. Before threads exist.
 */
void process_prepare(void);

/* Whether the process has a capability (capabilities(7)), effective. */
bool process_has_cap(int cap);

/*
 * posix_spawn(3) with no signal blocked or ignored: ours are. `in` is its standard input, `out` its standard output and
 * error; -1 = ours. -errno.
 */
int process_spawn(const char *program, char *const argv[], int in, int out, pid_t *pid);

/*
 * Runs `nbdrs-attach --watch` for the control socket `path` beside us, which gives kernel devices new
 * connections; started anew should it die. Once, any thread; where it can't be had the log says what follows
 * from that. Nothing happens without CAP_SYS_ADMIN: then it is somebody else's task.
 */
void watcher_start(const char *path);
/* Whether the kernel has a device that was attached to some nbdrsd: one before this, perhaps. Reads sysfs. */
bool watcher_has_devices(void);
/* Ends it; false = there was none. None is started any more, until watcher_may_start. Waits for the helper. */
bool watcher_stop(void);
void watcher_may_start(void);

struct handover;

/*
 * Going over to a new program (upgrade.c). upgrade_prepare: before the command line is touched; -ENOMEM. upgrade_ask
 * is ctl_upgrade_hook; when it returns 0, upgrade_event_fd becomes readable, and the caller has what exports_freeze
 * gives. upgrade_check_again: right before there is no way back, whether what upgrade_ask found in the list of exports
 * is there still. upgrade_save: `h` into a file, whose
 * descriptor is the caller's. upgrade_exec returns only when it could not be done.
 * upgrade_take: 1 = *h is what another one left (handover_clear), 0 = nobody did, -errno.
 */
int upgrade_prepare(const struct args *a);
int upgrade_event_fd(void);
CO_FN int upgrade_ask(const char *binary, struct err *err);
CO_FN int upgrade_check_again(struct err *err);
int upgrade_save(const struct handover *h, int *fd, struct err *err);
int upgrade_exec(const struct handover *h, int file);
int upgrade_take(struct handover *h, struct err *err);

/*
 * Whether the exports can be left to the next program (upgrade_check.c), on reactor 0; -errno with a text for who
 * asked. upgrade_check_list reads what the command line `argv` names, and sets `comes_again` of each export; -EBUSY:
 * somebody would be cut, or writes would be left behind. `is_first`: not the repetition of one before.
 * upgrade_check_stores asks each store for something small, and waits as long as one request takes there.
 */
int upgrade_check_memory(struct err *err);
CO_FN int upgrade_check_list(int argc, char *const *argv, bool is_first, struct err *err);
CO_FN int upgrade_check_stores(struct err *err);

/*
 * The service manager keeps descriptors from one process to the next (fdstore.c), where the unit says so by FDSTORE in
 * the environment (systemd does it by itself from 254 on). fdstore_put: the file of a handover and its connections,
 * to be taken by the one that is started next, if any is; else they are closed. fdstore_room: how many, 0 = none.
 * fdstore_take: 1 = *h is what was put there, its descriptors ours, 0 = there was nothing that can be used: then those
 * connections are cut, and devices wait as after a crash. fdstore_forget: the manager drops its copies,
 * because of which the kernel would never see that a connection has ended.
 */
uint64_t fdstore_room(void);
int fdstore_put(const struct handover *h, int file);
int fdstore_take(struct handover *h);
void fdstore_forget(void);

/* Tells the service manager (sd_notify(3)); nothing happens without one. Newline-separated assignments. */
void notify_manager(const char *state);

/*
 * The service manager's watchdog (sd_watchdog_enabled(3)): from now on it hears from us as long as every reactor
 * turns. Nothing happens when it wants none. On reactor 0. -ENOMEM.
 */
CO_FN int watchdog_start(struct err *err);
/* Returns when it has ended; nothing happens when it was not started. */
CO_FN void watchdog_stop(void);

#endif
