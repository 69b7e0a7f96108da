/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * nbdrsctl: looks at a running daemon, and has it go over to a new program. The command line and the talk with the
 * daemon are here; how a status looks is in statustext.c.
 */
#include <assert.h>
#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "child.h"
#include "ctlclient.h"
#include "nbdrs/ctl.h"
#include "nbdrs/opt.h"
#include "resize.h"
#include "statustext.h"

/* The same numbers as nbdrs-attach's where they mean the same; nbdrsctl(8) documents them. */
enum {
	STATUS_OK = 0,
	STATUS_FAILED = 1,
	STATUS_USAGE = 2,
	STATUS_NO_DAEMON = 3,
	STATUS_NO_EXPORT = 4,
	STATUS_NO_PERMISSION = 7,
	STATUS_TIMED_OUT = 8,
};

enum { UPGRADE_MAX_S = 120, WAIT_DEFAULT_S = 30, WAIT_STEP_MS = 50, UPGRADE_STEP_MS = 10, TIMEOUT_MAX_S = 86400 };

struct options {
	const char *command, *export; /* export NULL = all */
	const char *control, *binary; /* NULL = the default */
	unsigned timeout_ms;
	uint64_t wait_ms; /* 0 = don't wait for a daemon */
	uint64_t size;	  /* of resize */
	bool json, shrink;
};

static int complain(int status, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static int complain(int status, const char *fmt, ...)
{
	va_list ap;

	fputs("nbdrsctl: ", stderr);
	va_start(ap, fmt);
	(void)vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	return status;
}

static void print_help(void)
{
	printf("Usage:\n"
	       "  nbdrsctl status [--json] [--wait[=TIME]] [EXPORT]\n"
	       "  nbdrsctl version\n"
	       "  nbdrsctl resize [--shrink] EXPORT SIZE\n"
	       "  nbdrsctl upgrade [--binary PATH]\n"
	       "\n"
	       "Looks at and steers a running nbdrsd.\n"
	       "\n"
	       "Commands:\n"
	       "  status    exports, connections, devices, requests, bytes, errors, latencies\n"
	       "  version   of this tool and of the daemon\n"
	       "  resize    give a volume, and its devices here, another size\n"
	       "  upgrade   have the daemon go over to a new program; clients notice a pause\n"
	       "\n"
	       "Options:\n"
	       "      --json          print JSON\n"
	       "      --wait[=TIME]   wait until a daemon serves, at most TIME (default %ds)\n"
	       "      --shrink        of resize: SIZE may be smaller; what lies behind it is lost\n"
	       "      --control PATH  the daemon's control socket (default %s)\n"
	       "      --binary PATH   the new nbdrsd (default: the file the daemon was started from)\n"
	       "      --timeout TIME  limit of each answer (default %ds; resize: %ds)\n"
	       "  -h, --help          print this\n"
	       "  -V, --version       print the tool's version\n",
	       WAIT_DEFAULT_S, CTL_DEFAULT_PATH, CTL_TIMEOUT_MS / 1000, RESIZE_TIMEOUT_MS / 1000);
}

/* --- The command line --------------------------------------------------------------------------- */

enum { OPT_JSON = 256, OPT_WAIT, OPT_CONTROL, OPT_TIMEOUT, OPT_SHRINK, OPT_BINARY };

static const struct option long_options[] = {
	{ "json", no_argument, NULL, OPT_JSON },
	{ "wait", optional_argument, NULL, OPT_WAIT },
	{ "control", required_argument, NULL, OPT_CONTROL },
	{ "timeout", required_argument, NULL, OPT_TIMEOUT },
	{ "shrink", no_argument, NULL, OPT_SHRINK },
	{ "binary", required_argument, NULL, OPT_BINARY },
	{ "help", no_argument, NULL, 'h' },
	{ "version", no_argument, NULL, 'V' },
	{ NULL, 0, NULL, 0 },
};

static int take_time(const char *flag, const char *text, uint64_t *ns)
{
	if (parse_time_ns(text, ns) == 0 && *ns >= 1000000 && *ns <= TIMEOUT_MAX_S * UINT64_C(1000000000))
		return 0;
	return complain(-EINVAL, "--%s: '%s' is not a time like 500ms, 10s or 2m (1ms to 24h)", flag, text);
}

/* 0; 1 = all is done; -EINVAL (said). */
static int take_option(struct options *o, int value, const char *word)
{
	uint64_t ns;
	int rc;

	switch (value) {
	case OPT_JSON: o->json = true; return 0;
	case OPT_BINARY: o->binary = optarg; return 0;
	case OPT_CONTROL: o->control = optarg; return 0;
	case OPT_SHRINK: o->shrink = true; return 0;
	case OPT_WAIT:
		o->wait_ms = WAIT_DEFAULT_S * UINT64_C(1000);
		rc = optarg ? take_time("wait", optarg, &ns) : 0;
		if (!rc && optarg)
			o->wait_ms = (ns + 999999) / 1000000;
		return rc;
	case OPT_TIMEOUT:
		rc = take_time("timeout", optarg, &ns);
		if (!rc)
			o->timeout_ms = (unsigned)(ns / 1000000);
		return rc;
	case 'h': print_help(); return 1;
	case 'V': printf("nbdrsctl %s\n", NBDRS_VERSION); return 1;
	case ':': return complain(-EINVAL, "%s needs a value", word);
	default: return complain(-EINVAL, "unknown or ambiguous option '%s'; see nbdrsctl --help", word);
	}
}

static int take_resize(struct options *o, int n, char **words)
{
	if (n != 3)
		return complain(-EINVAL, "resize takes two words, EXPORT SIZE, as in: nbdrsctl resize disk0 20Gi");
	o->export = words[1];
	if (parse_size(words[2], &o->size) || o->size == 0 || o->size > INT64_MAX)
		return complain(-EINVAL, "'%s' is not a size like 100Mi, 20GiB or 1T", words[2]);
	if (!o->timeout_ms)
		o->timeout_ms = RESIZE_TIMEOUT_MS;
	return 0;
}

static int take_words(struct options *o, int n, char **words)
{
	if (n == 0)
		return complain(-EINVAL,
				"no command: there are status, version, resize and upgrade; see nbdrsctl --help");
	o->command = words[0];
	if (o->shrink && strcmp(o->command, "resize"))
		return complain(-EINVAL, "--shrink goes with resize");
	if (o->binary && strcmp(o->command, "upgrade"))
		return complain(-EINVAL, "--binary goes with upgrade");
	if (strcmp(o->command, "resize") == 0)
		return take_resize(o, n, words);
	if (!o->timeout_ms)
		o->timeout_ms = CTL_TIMEOUT_MS;
	if (strcmp(o->command, "status") && strcmp(o->command, "version") && strcmp(o->command, "upgrade"))
		return complain(-EINVAL, "unknown command '%s': there are status, version, resize and upgrade",
				o->command);
	if (n > 1 && strcmp(o->command, "status") == 0) {
		o->export = words[1];
		words++;
		n--;
	}
	if (n > 1)
		return complain(-EINVAL, "unexpected word '%s'", words[1]);
	return 0;
}

static int parse(struct options *o, int argc, char **argv)
{
	int value, rc = 0;

	*o = (struct options){ 0 };
	opterr = 0;
	while (!rc && (value = getopt_long(argc, argv, ":hV", long_options, NULL)) != -1)
		rc = take_option(o, value, argv[optind - 1]);
	return rc ? rc : take_words(o, argc - optind, argv + optind);
}

/* --- The talk ----------------------------------------------------------------------------------- */

static int exit_status(const struct ctl_client *c, int rc)
{
	if (c && ctl_was_answered(c))
		return rc == -ENOENT ? STATUS_NO_EXPORT : rc == -EACCES ? STATUS_NO_PERMISSION : STATUS_FAILED;
	switch (rc) {
	case -ECONNREFUSED: return STATUS_NO_DAEMON;
	case -EPERM:
	case -EACCES: return STATUS_NO_PERMISSION;
	case -ETIMEDOUT: return STATUS_TIMED_OUT;
	default: return STATUS_FAILED;
	}
}

/* All packets of one status: the first one with "exports", an array, added. */
static int ask_status(struct ctl_client *c, const char *export, json_t **out, struct err *err)
{
	_cleanup_json_ json_t *all = NULL;
	json_t *exports = json_array();
	bool more;
	int rc;

	rc = ctl_send(c, export ? json_pack("{s:s, s:s}", "cmd", "status", "export", export) :
				  json_pack("{s:s}", "cmd", "status"),
		      err);
	if (!rc)
		rc = ctl_recv(c, &all, NULL, NULL, err);
	if (rc) {
		json_decref(exports);
		return rc;
	}
	more = ctl_has_more(all);
	(void)json_object_del(all, "more"); /* of the transport, as the next two */
	(void)json_object_del(all, "ok");
	(void)json_object_del(all, "nbdrs");
	if (json_object_set_new(all, "exports", exports))
		return err_set(err, -ENOMEM, "out of memory");
	while (more) {
		_cleanup_json_ json_t *one = NULL;
		json_t *e;

		rc = ctl_recv(c, &one, NULL, NULL, err);
		if (rc)
			return rc;
		more = ctl_has_more(one);
		e = json_object_get(one, "export");
		if (!json_is_object(e))
			return err_set(err, -EPROTO, "the daemon's status has a packet without an export");
		if (json_array_append(exports, e))
			return err_set(err, -ENOMEM, "out of memory");
	}
	*out = TAKE_PTR(all);
	return 0;
}

/*
 * Connects; with --wait again and again while no daemon is there. Nothing announces a socket that comes
 * into being in a folder that may not exist yet, so this asks every 50 ms.
 */
static int open_daemon(const struct options *o, struct ctl_client **c, struct err *err)
{
	const uint64_t deadline = now_ms() + o->wait_ms;
	int rc;

	while ((rc = ctl_open(o->control, o->timeout_ms, c, err)) == -ECONNREFUSED && o->wait_ms &&
	       now_ms() < deadline)
		sleep_ms(WAIT_STEP_MS);
	return rc;
}

static int print_json(json_t *j)
{
	if (json_dumpf(j, stdout, JSON_INDENT(2)))
		return -EIO;
	printf("\n");
	return 0;
}

static int run_status(const struct options *o)
{
	_cleanup_ctl_ struct ctl_client *c = NULL;
	_cleanup_json_ json_t *status = NULL;
	struct err err;
	int rc = open_daemon(o, &c, &err);

	if (!rc)
		rc = ask_status(c, o->export, &status, &err);
	if (rc)
		return complain(exit_status(c, rc), "%s", err.msg);
	if (o->json)
		(void)print_json(status); /* stdout's error is looked at in main */
	else
		status_print(status);
	return STATUS_OK;
}

static int run_version(const struct options *o)
{
	_cleanup_ctl_ struct ctl_client *c = NULL;
	_cleanup_json_ json_t *reply = NULL;
	struct err err;
	int rc = open_daemon(o, &c, &err);

	if (!rc)
		rc = ctl_call(c, json_pack("{s:s}", "cmd", "version"), &reply, &err);
	if (rc && !o->json)
		printf("nbdrsctl %s\n", NBDRS_VERSION);
	if (rc)
		return complain(exit_status(c, rc), "%s", err.msg);
	if (o->json) {
		(void)json_object_del(reply, "ok"); /* of the transport */
		(void)json_object_del(reply, "nbdrs");
		(void)print_json(reply); /* as above */
		return STATUS_OK;
	}
	printf("nbdrsctl %s\n", NBDRS_VERSION);
	version_print(reply);
	return STATUS_OK;
}

static int run_resize(const struct options *o)
{
	_cleanup_ctl_ struct ctl_client *c = NULL;
	struct resize r = { .export = o->export, .size = o->size, .may_shrink = o->shrink };
	struct err err;
	int rc = open_daemon(o, &c, &err);

	if (!rc)
		rc = resize_run(c, &r, &err);
	if (rc)
		return complain(exit_status(c, rc), "%s", err.msg);
	resize_print(&r, o->json); /* stdout's error is looked at in main */
	return STATUS_OK;
}

/* 1: it goes over still; 0: done; -errno. The daemon may have no control socket for a moment. */
static int ask_upgraded(const struct options *o, json_int_t from, struct err *err)
{
	_cleanup_ctl_ struct ctl_client *c = NULL;
	_cleanup_json_ json_t *reply = NULL;
	const char *why;
	int rc = ctl_open(o->control, o->timeout_ms, &c, err);

	if (!rc)
		rc = ctl_call(c, json_pack("{s:s}", "cmd", "version"), &reply, err);
	if (rc == -ECONNREFUSED || rc == -ECONNRESET || rc == -EPIPE)
		return 1;
	if (rc)
		return rc;
	why = json_string_value(json_object_get(reply, "upgrade_error"));
	if (json_integer_value(json_object_get(reply, "generation")) == from)
		return why ? err_set(err, -ECANCELED, "called off, the old daemon goes on: %s", why) : 1;
	version_print(reply);
	return 0;
}

static int run_upgrade(const struct options *o)
{
	_cleanup_free_ char *binary = o->binary ? realpath(o->binary, NULL) : NULL;
	_cleanup_ctl_ struct ctl_client *c = NULL;
	_cleanup_json_ json_t *reply = NULL;
	struct err err;
	uint64_t deadline;
	int rc;

	if (o->binary && !binary)
		return complain(STATUS_FAILED, "%s: %s", o->binary, strerror(errno));
	rc = open_daemon(o, &c, &err);
	if (!rc)
		rc = ctl_call(c, json_pack("{s:s, s:s*}", "cmd", "upgrade", "binary", binary), &reply, &err);
	if (rc)
		return complain(exit_status(c, rc), "%s", err.msg);
	deadline = now_ms() + UPGRADE_MAX_S * UINT64_C(1000);
	while ((rc = ask_upgraded(o, json_integer_value(json_object_get(reply, "generation")), &err)) > 0) {
		if (now_ms() >= deadline)
			return complain(STATUS_TIMED_OUT, "the daemon has not gone over within %d s; see its log",
					UPGRADE_MAX_S);
		sleep_ms(UPGRADE_STEP_MS);
	}
	return rc ? complain(STATUS_FAILED, "%s", err.msg) : STATUS_OK;
}

int main(int argc, char **argv)
{
	struct options o;
	int status, rc = parse(&o, argc, argv);

	if (rc)
		return rc > 0 ? STATUS_OK : STATUS_USAGE;
	assert(o.command); /* as take_words saw to */
	status = strcmp(o.command, "status") == 0    ? run_status(&o)
		 : strcmp(o.command, "version") == 0 ? run_version(&o)
		 : strcmp(o.command, "resize") == 0  ? run_resize(&o)
						     : run_upgrade(&o);
	if ((fflush(stdout) || ferror(stdout)) && status == STATUS_OK)
		return complain(STATUS_FAILED, "cannot write the output: %s", strerror(errno));
	return status;
}
