/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The command line: one table of options says which command takes which, and gives parsing, help and
 * error texts. The command is the first word; without one it is `serve`.
 */
#include "cmd/cmd.h"

#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/ctl.h"
#include "nbdrs/opt.h"
#include "net/listen.h"

#define SECOND_NS UINT64_C(1000000000)

enum { SPIN_MAX_US = 10000, CONNS_MAX = 1000000 };

enum {
	SERVE = 1 << 0,
	INIT = 1 << 1,
	DESTROY = 1 << 2,
	CHECK = 1 << 3,
	INFO = 1 << 4,
	HELP = 1 << 5,
	LAYERS = 1 << 6,
	VOLUME = INIT | DESTROY | INFO, /* exactly one volume */
	WORKING = SERVE | VOLUME | CHECK,
	EVERY = 0xff,
};

static const struct command {
	const char *name, *words, *help;
	unsigned bit;
	int (*run)(const struct args *a);
} commands[] = {
	{ "serve", "{-e NAME DRIVER CONN | --exports FILE} ...", "serve volumes (the default command)", SERVE,
	  cmd_serve },
	{ "init", "--size SIZE [--force] DRIVER CONN", "make a volume", INIT, cmd_init },
	{ "destroy", "[--force] DRIVER CONN", "remove a volume and all its data", DESTROY, cmd_destroy },
	{ "check", "{-e NAME DRIVER CONN ... | --exports FILE | DRIVER CONN}",
	  "parse chains and print them in full", CHECK, cmd_check },
	{ "info", "DRIVER CONN", "open a volume read-only and describe it", INFO, cmd_info },
	{ "layers", "", "list the layers chains are made of", LAYERS, cmd_layers },
	{ "help", "[LAYER]", "print this, or a layer's options", HELP, cmd_help },
};

/* Values of long options; letters are their own. */
enum {
	OPT_LISTEN = 256,
	OPT_UNIX,
	OPT_CONTROL,
	OPT_CONTROL_GROUP,
	OPT_MAX_CONNECTIONS,
	OPT_HANDSHAKE_TIMEOUT,
	OPT_DRAIN_TIMEOUT,
	OPT_THREADS,
	OPT_IO_ENGINE,
	OPT_SPIN,
	OPT_CACHE_MEM,
	OPT_LOG_LEVEL,
	OPT_SIZE_BYTES,
	OPT_FORCE,
	OPT_OPEN,
	OPT_EXPORTS,
	OPT_CHECK_HANDOVER,
};

static const struct flag {
	const char *name, *arg, *help;
	int value;
	unsigned commands;
} flags[] = {
	{ "export", "NAME DRIVER CONN", "an export: its name and its chain DRIVER:CONN", 'e',
	  WORKING },
	{ "exports", "FILE", "exports from a file: NAME DRIVER CONN a line", OPT_EXPORTS, SERVE | CHECK },
	{ "read-only", NULL, "never write to the volumes", 'r', SERVE },
	{ "listen", "HOST:PORT", "TCP address, or none (default 127.0.0.1:10809 and [::1]:10809)", OPT_LISTEN,
	  SERVE },
	{ "unix", "PATH", "unix socket for clients", OPT_UNIX, SERVE },
	{ "control", "PATH", "control socket, or none (default " CTL_DEFAULT_PATH ")", OPT_CONTROL, SERVE },
	{ "control-group", "GROUP", "members may use the control socket, too", OPT_CONTROL_GROUP, SERVE },
	{ "max-connections", "N", "at most so many clients; 0 = no limit (default 10000)",
	  OPT_MAX_CONNECTIONS, SERVE },
	{ "handshake-timeout", "TIME", "limit of the negotiation (default 10s)", OPT_HANDSHAKE_TIMEOUT,
	  SERVE },
	{ "drain-timeout", "TIME", "at stop, limit for requests in flight (default 30s)", OPT_DRAIN_TIMEOUT,
	  SERVE },
	{ "threads", "N", "reactor threads (default: one per core, at most 4)", OPT_THREADS, SERVE },
	{ "io-engine", "NAME", "auto, io_uring or epoll (default auto)", OPT_IO_ENGINE, WORKING },
	{ "spin", "USEC", "poll so long before sleeping, or off (default 50)", OPT_SPIN, SERVE },
	{ "cache-mem", "SIZE", "memory for all caches together (default: what each one says)", OPT_CACHE_MEM,
	  SERVE },
	{ "size", "SIZE", "of the volume: 100Mi, 4GiB, 10G (K, M, G ... are powers of 1024)", OPT_SIZE_BYTES,
	  INIT },
	{ "force", NULL, "init: replace what is there; destroy: do not ask", OPT_FORCE, INIT | DESTROY },
	{ "open", NULL, "open the volumes, read-only", OPT_OPEN, CHECK },
	{ "check-handover", "N", "parse all this and exit: could it take over from an nbdrsd that leaves format N?",
	  OPT_CHECK_HANDOVER, SERVE },
	{ "log-level", "LEVEL", "error, warn, info or debug (default info)", OPT_LOG_LEVEL, EVERY },
	{ "help", NULL, "print this", 'h', EVERY },
	{ "version", NULL, "print the version", 'V', EVERY },
};

void cmd_complain(const char *fmt, ...)
{
	char text[1536];
	va_list ap;

	va_start(ap, fmt);
	(void)vsnprintf(text, sizeof(text), fmt, ap); /* cut off is good enough */
	va_end(ap);
	/* Words of the command line are in it, and must not steer a terminal. */
	for (char *p = text; *p; p++)
		if ((*p >= 0 && *p < ' ' && *p != '\n') || *p == 0x7f)
			*p = '?';
	(void)fprintf(stderr, "nbdrsd: %s\n", text);
}

void args_print_help(void)
{
	printf("Usage:\n");
	for (size_t i = 0; i < ARRAY_LEN(commands); i++)
		printf("  nbdrsd %s%s%s\n", i == 0 ? "[serve]" : commands[i].name,
		       *commands[i].words ? " " : "", commands[i].words);
	printf("\nnbdrsd %s serves block volumes by the NBD protocol.\n\nCommands:\n", NBDRS_VERSION);
	for (size_t i = 0; i < ARRAY_LEN(commands); i++)
		printf("  %-9s %s\n", commands[i].name, commands[i].help);
	printf("\nOptions:\n");
	for (size_t i = 0; i < ARRAY_LEN(flags); i++) {
		const struct flag *f = &flags[i];
		char text[64];

		(void)snprintf(text, sizeof(text), "--%s%s%s", f->name, f->arg ? " " : "",
			       f->arg ? f->arg : "");
		if (f->value < 256)
			printf("  -%c, %-26s %s\n", f->value, text, f->help);
		else
			printf("      %-26s %s\n", text, f->help);
	}
	printf("\nA volume is a chain of layers that ends in a store: `nbdrsd layers`, `nbdrsd help LAYER`.\n"
	       "  nbdrsd init --size 10Gi raw file:/srv/disk0.img\n"
	       "  nbdrsd -e disk0 raw file:/srv/disk0.img\n"
	       "  nbdrs-attach disk0 /dev/nbd0\n"
	       "See nbdrsd(8).\n");
}

static int usage_error(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static int usage_error(const char *fmt, ...)
{
	char text[1024];
	va_list ap;

	va_start(ap, fmt);
	(void)vsnprintf(text, sizeof(text), fmt, ap); /* cut off is good enough */
	va_end(ap);
	cmd_complain("%s\nTry `nbdrsd --help`.", text);
	return -EINVAL;
}

/* --- Values ------------------------------------------------------------------------------------- */

static int take_number(const char *flag, const char *text, uint64_t min, uint64_t max, unsigned *out)
{
	uint64_t v;

	if (parse_u64(text, &v) || v < min || v > max)
		return usage_error("--%s: '%s' is not a number from %llu to %llu", flag, text,
				   (unsigned long long)min, (unsigned long long)max);
	*out = (unsigned)v;
	return 0;
}

static int take_time(const char *flag, const char *text, uint64_t *ns)
{
	/* A day: what is meant as "for ever" must not overflow a deadline. */
	if (parse_time_ns(text, ns) || *ns == 0 || *ns > 86400 * SECOND_NS)
		return usage_error("--%s: '%s' is not a time like 500ms, 10s or 2m (at most 24h)", flag,
				   text);
	return 0;
}

static int take_spin(const char *text, unsigned *us)
{
	uint64_t v;

	if (strcmp(text, "off") == 0) {
		*us = 0;
		return 0;
	}
	if (parse_u64(text, &v) == 0) {
		/* plain: microseconds */
	} else if (parse_time_ns(text, &v) == 0) {
		v /= 1000;
	} else {
		v = UINT64_MAX;
	}
	if (v > SPIN_MAX_US)
		return usage_error("--spin: '%s' is not off or microseconds from 0 to %d", text, SPIN_MAX_US);
	*us = (unsigned)v;
	return 0;
}

static int take_engine(const char *text, enum io_engine_kind *kind)
{
	if (strcmp(text, "auto") == 0)
		*kind = IO_ENGINE_AUTO;
	else if (strcmp(text, "io_uring") == 0)
		*kind = IO_ENGINE_URING;
	else if (strcmp(text, "epoll") == 0)
		*kind = IO_ENGINE_EPOLL;
	else
		return usage_error("--io-engine: '%s' is not auto, io_uring or epoll", text);
	return 0;
}

static int take_size(const char *flag, const char *text, uint64_t *size)
{
	if (parse_size(text, size) || *size == 0 || *size > INT64_MAX)
		return usage_error("--%s: '%s' is not a size like 100Mi, 4GiB or 10G (at most 8EiB - 1)", flag,
				   text);
	return 0;
}

/* Appends to an array that has room for every word of the command line. */
static void append(char ***list, unsigned *n, char *word)
{
	(*list)[(*n)++] = word;
}

static int take_listen(struct args *a, char *text)
{
	struct err err;

	if (a->is_listen_given && (strcmp(text, "none") == 0 || a->listen_n == 0))
		return usage_error("--listen none excludes every other --listen");
	a->is_listen_given = true;
	if (strcmp(text, "none") && listen_check(text, &err))
		return usage_error("%s", err.msg);
	if (strcmp(text, "none"))
		append(&a->listen, &a->listen_n, text);
	return 0;
}

/* -e takes three words: getopt's argument and the next two, which are taken from under it. */
static int take_export(struct args *a, int argc, char **argv)
{
	struct volume_arg v = { .name = optarg };
	struct err err;

	if (optind + 2 > argc)
		return usage_error("-e takes three words, NAME DRIVER CONN; after '%s' %s", optarg,
				   optind + 1 > argc ? "both DRIVER and CONN are missing" : "CONN is missing");
	v.driver = argv[optind++];
	v.conn = argv[optind++];
	if (v.driver[0] == '-' || v.conn[0] == '-')
		return usage_error("-e takes three words, NAME DRIVER CONN; '%s' after '%s' looks like an "
				   "option",
				   v.driver[0] == '-' ? v.driver : v.conn, v.name);
	return args_add_volume(a, &v, &err) ? usage_error("-e: %s", err.msg) : 0;
}

static int take_exports_file(struct args *a, const char *path)
{
	struct err err;

	if (args_read_exports(a, path, &err) == 0)
		return 0;
	/* No hint at the usage: it is the file that is wrong. */
	cmd_complain("%s", err.msg);
	return -EINVAL;
}

/* 0, -EINVAL (said), or 1: all is done. */
static int take_flag(struct args *a, int value, int argc, char **argv)
{
	switch (value) {
	case 'e': return take_export(a, argc, argv);
	case OPT_EXPORTS: return take_exports_file(a, optarg);
	case 'r': a->read_only = true; return 0;
	case 'h': args_print_help(); return 1;
	case 'V': printf("nbdrsd %s\n", NBDRS_VERSION); return 1;
	case OPT_LISTEN: return take_listen(a, optarg);
	case OPT_UNIX: append(&a->unix_paths, &a->unix_n, optarg); return 0;
	case OPT_CONTROL:
		a->control = strcmp(optarg, "none") ? optarg : NULL;
		a->is_control_given = true;
		return 0;
	case OPT_CONTROL_GROUP: a->control_group = optarg; return 0;
	case OPT_MAX_CONNECTIONS:
		return take_number("max-connections", optarg, 0, CONNS_MAX, &a->max_conns);
	case OPT_HANDSHAKE_TIMEOUT: return take_time("handshake-timeout", optarg, &a->handshake_ns);
	case OPT_DRAIN_TIMEOUT: return take_time("drain-timeout", optarg, &a->drain_ns);
	case OPT_THREADS: return take_number("threads", optarg, 1, REACTOR_MAX, &a->reactor.threads);
	case OPT_IO_ENGINE: return take_engine(optarg, &a->reactor.engine);
	case OPT_SPIN: return take_spin(optarg, &a->reactor.spin_us);
	case OPT_CACHE_MEM: return take_size("cache-mem", optarg, &a->cache_mem);
	case OPT_SIZE_BYTES: return take_size("size", optarg, &a->size);
	case OPT_FORCE: a->force = true; return 0;
	case OPT_OPEN: a->open = true; return 0;
	case OPT_CHECK_HANDOVER:
		return take_number("check-handover", optarg, 1, UINT_MAX, &a->check_handover);
	case OPT_LOG_LEVEL:
		if (log_level_parse(optarg, &a->log_level))
			return usage_error("--log-level: '%s' is not error, warn, info or debug", optarg);
		return 0;
	default: return usage_error("option %d is in the table but not taken", value);
	}
}

/* --- The line as a whole ------------------------------------------------------------------------ */

static const struct flag *flag_of(int value)
{
	for (size_t i = 0; i < ARRAY_LEN(flags); i++)
		if (flags[i].value == value)
			return &flags[i];
	return NULL;
}

/* What getopt_long did not take; `word` is the one it was looking at. */
static int unknown_option(int kind, const char *word)
{
	const struct flag *f = optopt ? flag_of(optopt) : NULL;

	if (kind == ':' && f)
		return usage_error("--%s needs a value: %s", f->name, f->arg);
	if (f && !f->arg)
		return usage_error("--%s takes no value", f->name);
	if (optopt && optopt < 256)
		return usage_error("unknown option '-%c'", optopt);
	return usage_error("unknown or ambiguous option '%s'", word);
}

static int parse_flags(struct args *a, const struct command *cmd, int argc, char **argv)
{
	struct option longs[ARRAY_LEN(flags) + 1] = { 0 };
	char shorts[2 * ARRAY_LEN(flags) + 2] = ":"; /* missing values are told apart */
	size_t at = 1;
	int value, rc = 0;

	for (size_t i = 0; i < ARRAY_LEN(flags); i++) {
		longs[i] = (struct option){ flags[i].name, flags[i].arg ? required_argument : no_argument,
					    NULL, flags[i].value };
		if (flags[i].value < 256) {
			shorts[at++] = (char)flags[i].value;
			if (flags[i].arg)
				shorts[at++] = ':';
		}
	}
	opterr = 0;
	optind = 1;
	while (!rc && (value = getopt_long(argc, argv, shorts, longs, NULL)) != -1) {
		const struct flag *f = flag_of(value);

		if (!f)
			return unknown_option(value, argv[optind - 1]);
		if (!(f->commands & cmd->bit))
			return usage_error("--%s is not an option of `nbdrsd %s`", f->name, cmd->name);
		rc = take_flag(a, value, argc, argv);
	}
	return rc;
}

/* What is left after the options: DRIVER CONN, a topic, or nothing. */
static int parse_words(struct args *a, const struct command *cmd, int n, char **words)
{
	struct volume_arg v = { 0 };
	struct err err;

	if (cmd->bit == HELP && n > 0) {
		a->topic = *words++;
		n--;
	} else if (cmd->bit & (VOLUME | CHECK) && a->volumes_n == 0 && n > 0) {
		if (n == 1)
			return usage_error("`nbdrsd %s` takes two words, DRIVER CONN; after '%s' CONN is "
					   "missing",
					   cmd->name, words[0]);
		v.driver = words[0];
		v.conn = words[1];
		if (args_add_volume(a, &v, &err))
			return usage_error("%s", err.msg);
		words += 2;
		n -= 2;
	}
	if (n > 0)
		return usage_error("unexpected word '%s' (a chain with spaces needs quotes)", words[0]);
	return 0;
}

static int check_whole(const struct args *a, const struct command *cmd)
{
	if (cmd->bit == SERVE && a->volumes_n == 0)
		return usage_error("no export: name at least one by -e NAME DRIVER CONN or --exports FILE, "
				   "as in `nbdrsd -e disk0 raw file:/srv/disk0.img`");
	if (cmd->bit & (VOLUME | CHECK) && a->volumes_n == 0)
		return usage_error("`nbdrsd %s` needs a volume: DRIVER CONN, as in `raw file:/srv/disk0.img`",
				   cmd->name);
	if (cmd->bit & VOLUME && a->volumes_n > 1)
		return usage_error("`nbdrsd %s` takes one volume at a time", cmd->name);
	if (cmd->bit == INIT && a->size == 0)
		return usage_error("`nbdrsd init` needs --size, as in --size 10Gi");
	if (a->control_group && !a->control)
		return usage_error("--control-group needs a control socket, and --control is none");
	return 0;
}

static const struct command *find_command(const char *word)
{
	for (size_t i = 0; i < ARRAY_LEN(commands); i++)
		if (strcmp(commands[i].name, word) == 0)
			return &commands[i];
	return NULL;
}

static int parse_all(struct args *a, int argc, char **argv)
{
	const struct command *cmd = &commands[0];
	int rc;

	if (argc > 1 && argv[1][0] != '-') {
		cmd = find_command(argv[1]);
		if (!cmd)
			return usage_error("unknown command '%s'; there are serve, init, destroy, check, "
					   "info, layers, help",
					   argv[1]);
		/* getopt starts behind the command's name. */
		argv++;
		argc--;
	}
	a->run = cmd->run;
	a->command = cmd->name;
	rc = parse_flags(a, cmd, argc, argv);
	if (!rc)
		rc = parse_words(a, cmd, argc - optind, argv + optind);
	return rc ? rc : check_whole(a, cmd);
}

int args_parse(int argc, char **argv, struct args *a, int *exit_code)
{
	int rc;

	*a = (struct args){ .argv = argv,
			    .argc = argc,
			    .control = CTL_DEFAULT_PATH,
			    .max_conns = 10000,
			    .handshake_ns = 10 * SECOND_NS,
			    .drain_ns = 30 * SECOND_NS,
			    .reactor = { .engine = IO_ENGINE_AUTO, .spin_us = 50 },
			    .log_level = LOG_LEVEL_INFO };
	a->listen = calloc((size_t)argc + 1, sizeof(*a->listen));
	a->unix_paths = calloc((size_t)argc + 1, sizeof(*a->unix_paths));
	if (!a->listen || !a->unix_paths) {
		cmd_complain("out of memory");
		*exit_code = CMD_FAILED;
		return -1;
	}
	rc = parse_all(a, argc, argv);
	if (rc == 0)
		return 0;
	*exit_code = rc > 0 ? CMD_OK : CMD_USAGE;
	return -1;
}

void args_free(struct args *a)
{
	free(a->volumes);
	for (unsigned i = 0; i < a->files_n; i++)
		conf_free(&a->files[i]);
	free(a->files);
	free(a->listen);
	free(a->unix_paths);
}
