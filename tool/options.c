/* SPDX-License-Identifier: GPL-3.0-or-later */
/* The command line of nbdrs-attach: see options.h. */
#include "options.h"

#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#include "names.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/opt.h"
#include "nl.h"

enum {
	O_TIMEOUT = 256,
	O_DEAD_CONN,
	O_BLOCK_SIZE,
	O_WAIT,
	O_NO_UDEV,
	O_FORCE,
	O_WATCH,
	O_REAP,
	O_UNTIL_EOF,
	O_CONTROL,
	O_JSON,
	O_AUTO,
	O_CONF,
	O_VERSION,
	O_HELP,
	BLOCK_MAX = 4096, /* larger ones need a page size or kernel that few have */
};

/* What was given, to find what does not go together. */
enum seen { SEEN_MODE = 1, SEEN_ATTACH_OPT = 2, SEEN_TIMEOUT = 4, SEEN_DEAD_CONN = 8 };

static const struct option longs[] = {
	{ "detach", no_argument, NULL, 'd' },
	{ "list", no_argument, NULL, 'l' },
	{ "check", no_argument, NULL, 'c' },
	{ "connections", required_argument, NULL, 'C' },
	{ "read-only", no_argument, NULL, 'r' },
	{ "timeout", required_argument, NULL, O_TIMEOUT },
	{ "dead-conn-timeout", required_argument, NULL, O_DEAD_CONN },
	{ "block-size", required_argument, NULL, O_BLOCK_SIZE },
	{ "wait", required_argument, NULL, O_WAIT },
	{ "no-udev", no_argument, NULL, O_NO_UDEV },
	{ "force", no_argument, NULL, O_FORCE },
	{ "watch", no_argument, NULL, O_WATCH },
	{ "reap", no_argument, NULL, O_REAP },
	{ "until-eof", no_argument, NULL, O_UNTIL_EOF },
	{ "control", required_argument, NULL, O_CONTROL },
	{ "json", no_argument, NULL, O_JSON },
	{ "autoattach", no_argument, NULL, O_AUTO },
	{ "conf", required_argument, NULL, O_CONF },
	{ "version", no_argument, NULL, O_VERSION },
	{ "help", no_argument, NULL, O_HELP },
	{ NULL, 0, NULL, 0 },
};

void options_help(FILE *out)
{
	(void)fputs(
		"Usage: nbdrs-attach [OPTIONS] EXPORT [DEVICE]\n"
		"       nbdrs-attach -d [--force] DEVICE|EXPORT\n"
		"       nbdrs-attach -l [--json]\n"
		"       nbdrs-attach -c DEVICE\n"
		"       nbdrs-attach --conf FILE EXPORT\n"
		"       nbdrs-attach --autoattach [--conf FILE]\n"
		"       nbdrs-attach --watch\n"
		"       nbdrs-attach --reap [--force]\n"
		"Use an export of nbdrsd as a block device; prints its path when it is usable.\n"
		"\n"
		"  -d, --detach             flush and detach; refused while it is in use\n"
		"  -l, --list               list the connected nbd devices\n"
		"  -c, --check              exit 0: connected, 1: not connected, 2: cannot tell\n"
		"      --autoattach         have systemd attach what attach.conf lists\n"
		"      --conf FILE          attach as FILE says of EXPORT (default with --autoattach:\n"
		"                           /etc/nbdrs/attach.conf)\n"
		"      --watch              give devices new connections when they lose some\n"
		"      --until-eof          with --watch: end when standard input does\n"
		"      --reap               detach devices whose daemon no longer serves them\n"
		"  -C, --connections N      number of sockets, 1 to 64 (default 1)\n"
		"  -r, --read-only          attach read-only\n"
		"      --timeout S          limit for a request (default 0 = none; with -C 120)\n"
		"      --dead-conn-timeout S  how long requests wait for a daemon that is gone\n"
		"                           (default 300)\n"
		"      --block-size N       logical block size, 512 to 4096 (default 512)\n"
		"      --wait S             limit for becoming usable (default 10)\n"
		"      --no-udev            do not wait for udev's links\n"
		"      --force              attach or detach although it loses data\n"
		"      --control PATH       the daemon's control socket\n"
		"      --json               with -l: JSON\n"
		"      --version, --help\n",
		out);
}

static int bad(struct err *err, const char *option, const char *value, const char *want)
{
	return err_set(err, -EINVAL, "%s: '%s' is not %s", option, value, want);
}

/* Whole seconds, as "5", "5s" or "2m". */
static int parse_seconds(const char *option, const char *text, uint32_t min, uint32_t *out,
			 struct err *err)
{
	uint64_t ns;

	if (parse_time_ns(text, &ns) || ns % 1000000000 != 0 || ns / 1000000000 > SECONDS_MAX ||
	    ns / 1000000000 < min)
		return bad(err, option, text,
			   min ? "a whole number of seconds from 1 to 86400"
			       : "a whole number of seconds from 0 to 86400");
	*out = (uint32_t)(ns / 1000000000);
	return 0;
}

static int parse_connections(const char *text, struct options *o, struct err *err)
{
	uint64_t n;

	if (parse_u64(text, &n) || n < 1 || n > NL_SOCKS_MAX)
		return bad(err, "--connections", text, "a number from 1 to 64");
	o->connections = (unsigned)n;
	return 0;
}

static int parse_block_size(const char *text, struct options *o, struct err *err)
{
	uint64_t n;

	if (parse_size(text, &n) || n < 512 || n > BLOCK_MAX || (n & (n - 1)) != 0)
		return bad(err, "--block-size", text, "512, 1024, 2048 or 4096");
	o->block_size = (uint32_t)n;
	return 0;
}

static int set_action(struct options *o, enum action action, unsigned *seen, struct err *err)
{
	if ((*seen & SEEN_MODE) && o->action != action)
		return err_set(err, -EINVAL,
			       "only one of --detach, --list, --check, --watch, --reap and --autoattach can be given");
	*seen |= SEEN_MODE;
	o->action = action;
	return 0;
}

static int parse_option(int c, struct options *o, unsigned *seen, struct err *err)
{
	switch (c) {
	case 'd': return set_action(o, ACT_DETACH, seen, err);
	case 'l': return set_action(o, ACT_LIST, seen, err);
	case 'c': return set_action(o, ACT_CHECK, seen, err);
	case O_WATCH: return set_action(o, ACT_WATCH, seen, err);
	case O_REAP: return set_action(o, ACT_REAP, seen, err);
	case O_UNTIL_EOF: o->until_eof = true; return 0;
	case 'C': *seen |= SEEN_ATTACH_OPT; return parse_connections(optarg, o, err);
	case 'r':
		*seen |= SEEN_ATTACH_OPT;
		o->is_read_only = true;
		return 0;
	case O_TIMEOUT:
		*seen |= SEEN_ATTACH_OPT | SEEN_TIMEOUT;
		return parse_seconds("--timeout", optarg, 0, &o->timeout_s, err);
	case O_DEAD_CONN:
		*seen |= SEEN_ATTACH_OPT | SEEN_DEAD_CONN;
		return parse_seconds("--dead-conn-timeout", optarg, 0, &o->dead_conn_timeout_s,
				     err);
	case O_BLOCK_SIZE: *seen |= SEEN_ATTACH_OPT; return parse_block_size(optarg, o, err);
	case O_WAIT: return parse_seconds("--wait", optarg, 1, &o->wait_s, err);
	case O_NO_UDEV: o->no_udev = true; return 0;
	case O_FORCE: o->force = true; return 0;
	case O_CONTROL:
		if (!*optarg)
			return bad(err, "--control", optarg, "a path");
		o->control = optarg;
		return 0;
	case O_JSON: o->json = true; return 0;
	case O_AUTO: return set_action(o, ACT_AUTOATTACH, seen, err);
	case O_CONF: o->conf = optarg; return 0;
	default: return -EINVAL;
	}
}

/* getopt's complaints in our words. `arg` is the word it stumbled over. */
static int complain(int c, const char *arg, struct err *err)
{
	char opt[3] = { '-', (char)optopt, '\0' };
	const char *name = strncmp(arg, "--", 2) == 0 ? arg : opt;

	if (c == ':')
		return err_set(err, -EINVAL, "%s needs a value; see --help", name);
	return err_set(
		err, -EINVAL,
		"%s: no such option, an ambiguous one, or one that takes no value; see --help",
		name);
}

static int check_words(int n, char **words, struct options *o, struct err *err)
{
	uint32_t index;

	switch (o->action) {
	case ACT_LIST:
	case ACT_WATCH:
	case ACT_REAP:
	case ACT_AUTOATTACH:
		return n == 0 ? 0 : err_set(err, -EINVAL, "'%s': no name goes with this option", words[0]);
	case ACT_DETACH:
	case ACT_CHECK:
		if (n != 1 || !*words[0])
			return err_set(err, -EINVAL, "%s takes one %s; see --help",
				       o->action == ACT_CHECK ? "--check" : "--detach",
				       o->action == ACT_CHECK ? "device" : "device or export");
		o->device = words[0];
		return 0;
	case ACT_ATTACH: break;
	default: return 0;
	}
	if (n < 1 || !*words[0])
		return err_set(err, -EINVAL,
			       "which export? nbdrs-attach EXPORT [DEVICE]; see --help");
	if (n > 2)
		return err_set(err, -EINVAL,
			       "'%s': too many arguments; nbdrs-attach EXPORT [DEVICE]", words[2]);
	if (strlen(words[0]) >= EXPORT_NAME_LEN)
		return err_set(err, -EINVAL, "the export's name is longer than 4096 bytes");
	o->export = words[0];
	if (n == 1)
		return 0;
	o->device = words[1];
	if (name_is_partition(o->device))
		return err_set(err, -EINVAL, "'%s' is a partition; name the whole device",
			       o->device);
	if (name_to_index(o->device, &index))
		return err_set(err, -EINVAL, "'%s' is not an nbd device: /dev/nbd0, nbd1, ...",
			       o->device);
	return 0;
}

/*
 * A request that timed out waits for a new socket only where the dead-connection time-out is the longer
 * one; else it fails (ceph-csi #2204). So a default gives way to what was asked for.
 */
static int check_timeouts(struct options *o, unsigned seen, struct err *err)
{
	if (!(seen & SEEN_TIMEOUT) && o->connections > 1)
		o->timeout_s = TIMEOUT_MULTI_S;
	if (!o->dead_conn_timeout_s || o->timeout_s < o->dead_conn_timeout_s)
		return 0;
	if (!(seen & SEEN_DEAD_CONN))
		o->dead_conn_timeout_s = o->timeout_s * 2;
	else if (!(seen & SEEN_TIMEOUT))
		o->timeout_s = o->dead_conn_timeout_s - 1;
	else
		return err_set(err, -EINVAL,
			       "--dead-conn-timeout (%u s) must be longer than --timeout (%u s)",
			       o->dead_conn_timeout_s, o->timeout_s);
	return 0;
}

int options_parse(int argc, char **argv, struct options *o, struct err *err)
{
	unsigned seen = 0;
	int c, rc;

	*o = (struct options){ .connections = 1,
			       .dead_conn_timeout_s = DEAD_CONN_DEFAULT_S,
			       .wait_s = WAIT_DEFAULT_S };
	optind = 0; /* glibc: start anew */
	for (;;) {
		c = getopt_long(argc, argv, ":dlcC:r", longs, NULL);
		if (c < 0)
			break;
		if (c == O_VERSION || c == O_HELP) {
			o->action = c == O_HELP ? ACT_HELP : ACT_VERSION;
			return 0;
		}
		if (c == '?' || c == ':')
			return complain(c, argv[optind - 1], err);
		rc = parse_option(c, o, &seen, err);
		if (rc)
			return rc;
	}
	rc = check_words(argc - optind, argv + optind, o, err);
	if (rc)
		return rc;
	if (o->action != ACT_ATTACH && (seen & SEEN_ATTACH_OPT))
		return err_set(err, -EINVAL, "an option that only attaching takes; see --help");
	if (o->force && o->action != ACT_ATTACH && o->action != ACT_DETACH && o->action != ACT_REAP)
		return err_set(err, -EINVAL, "--force goes with attaching, --detach and --reap");
	if (o->until_eof && o->action != ACT_WATCH)
		return err_set(err, -EINVAL, "--until-eof goes with --watch");
	if (o->json && o->action != ACT_LIST)
		return err_set(err, -EINVAL, "--json goes with --list");
	if (o->conf && o->action != ACT_ATTACH && o->action != ACT_AUTOATTACH)
		return err_set(err, -EINVAL, "--conf goes with attaching and --autoattach");
	if (o->conf && ((seen & SEEN_ATTACH_OPT) || o->device))
		return err_set(err, -EINVAL,
			       "--conf: the file says which device and which options; leave the others out");
	if (o->conf)
		o->wait_s = WAIT_BOOT_S;
	return check_timeouts(o, seen, err);
}
