/* SPDX-License-Identifier: GPL-3.0-or-later */
/* nbdrs-attach: use an export of nbdrsd as a block device of this machine. See nbdrs-attach(8). */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "attach.h"
#include "autoattach.h"
#include "child.h"
#include "devices.h"
#include "nbdrs/cleanup.h"
#include "options.h"
#include "say.h"

static int list_run(const struct options *o)
{
	int rc = devices_print(NULL, o);

	return rc ? fail(EXIT_FAILED, "cannot list devices: %s", strerror(-rc)) : EXIT_OK;
}

static int check_run(const struct options *o)
{
	_cleanup_free_ struct device *d = malloc(sizeof(*d));
	uint32_t index;
	int rc = device_by_path(o->device, &index);

	if (rc == -EISDIR)
		return fail(EXIT_USAGE, "'%s' is a partition; name the whole device", o->device);
	/* A link of udev is there only while its device is connected. */
	if (rc && strncmp(o->device, "/dev/nbdrs/", 11) == 0 && access(o->device, F_OK) &&
	    errno == ENOENT)
		return EXIT_FAILED;
	if (rc)
		return fail(EXIT_USAGE, "'%s' is not an nbd device: /dev/nbd0, nbd1, ...",
			    o->device);
	if (!d)
		return fail(EXIT_USAGE, "out of memory");
	rc = device_get(index, d);
	if (rc == -ENODEV || (!rc && !d->is_connected))
		return EXIT_FAILED;
	if (!rc)
		rc = devices_print(&index, o);
	return rc ? fail(EXIT_USAGE, "cannot look at %s: %s", o->device, strerror(-rc)) : EXIT_OK;
}

/* Descriptors 0 to 2 must not be closed: a socket that became one of them would be written to. */
static bool open_std_fds(void)
{
	int fd;

	do
		fd = open("/dev/null", O_RDWR);
	while (fd >= 0 && fd < 3);
	if (fd > 2)
		(void)close(fd);
	return fd > 2;
}

int main(int argc, char **argv)
{
	_cleanup_conf_ struct conf_file conf = { 0 };
	struct options o;
	struct err err = { "" };
	int status;

	if (!open_std_fds())
		return EXIT_FAILED;
	if (options_parse(argc, argv, &o, &err))
		return fail(EXIT_USAGE, "%s", err.msg);
	switch (o.action) {
	case ACT_HELP:
		options_help(stdout);
		status = EXIT_OK;
		break;
	case ACT_VERSION:
		(void)puts("nbdrs-attach " NBDRS_VERSION);
		status = EXIT_OK;
		break;
	case ACT_LIST: status = list_run(&o); break;
	case ACT_CHECK: status = check_run(&o); break;
	case ACT_WATCH: status = watch_run(&o); break;
	case ACT_REAP: status = reap_run(&o); break;
	case ACT_DETACH: status = detach_run(&o); break;
	case ACT_AUTOATTACH: status = autoattach_run(&o); break;
	default:
		status = o.conf ? autoattach_load(&o, &conf) : EXIT_OK;
		if (status == EXIT_OK)
			status = attach_run(&o);
		break;
	}
	if (fflush(stdout) || ferror(stdout))
		return status ? status : fail(EXIT_FAILED, "cannot write to standard output");
	return status;
}
