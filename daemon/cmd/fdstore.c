/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Sockets of kernel devices kept by systemd between a stop and a start: sd_pid_notify_with_fds(3), "FDSTORE=1".
 *
 * Each has a name: "nbdrs-handover" the file (handover.h), "nbdrs-N" the connection that is number N in it. They
 * come back among the sockets of LISTEN_FDS, under other numbers, and listen.c leaves what has such a name alone.
 * Whether a start will follow nobody knows; systemd closes what it has when the service stays stopped.
 */
#include "cmd/cmd.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/handover.h"
#include "nbdrs/opt.h"

#define PREFIX	  "nbdrs-"
#define FILE_NAME PREFIX "handover"

#ifdef HAVE_SYSTEMD
#include <systemd/sd-daemon.h>

enum { BARRIER_US = 5000000 };

static size_t taken_n; /* connections that are to be forgotten */
static bool was_taken;

bool fdstore_is_there(void)
{
	const char *max = getenv("FDSTORE");
	uint64_t n;

	return getenv("NOTIFY_SOCKET") && max && parse_u64(max, &n) == 0 && n > 0;
}

static int put_one(const char *name, int fd)
{
	char text[64];
	int rc;

	(void)snprintf(text, sizeof(text), "FDSTORE=1\nFDNAME=%s", name);
	rc = sd_pid_notify_with_fds(0, 0, text, &fd, 1);
	return rc < 0 ? rc : rc == 0 ? -ENOTCONN : 0;
}

int fdstore_put(const struct handover *h, int file)
{
	char name[32];
	int rc = 0;

	for (size_t i = 0; i < h->conns_n && !rc; i++) {
		(void)snprintf(name, sizeof(name), PREFIX "%zu", i);
		rc = put_one(name, h->conns[i].fd);
	}
	/* Last: with it the next one knows that the others are there. */
	if (!rc)
		rc = put_one(FILE_NAME, file);
	/* Messages of a process that is gone can't be told to be this service's. */
	if (!rc)
		rc = sd_notify_barrier(0, BARRIER_US);
	return rc < 0 ? rc : 0;
}

/* The descriptor of connection `number`, -1 = none. */
static int find(char **names, int n, size_t number)
{
	char name[32];

	(void)snprintf(name, sizeof(name), PREFIX "%zu", number);
	for (int i = 0; i < n; i++)
		if (strcmp(names[i], name) == 0)
			return SD_LISTEN_FDS_START + i;
	return -1;
}

static int take(char **names, int n, struct handover *h, struct err *err)
{
	int file = -1, rc;

	for (int i = 0; i < n; i++)
		if (strcmp(names[i], FILE_NAME) == 0)
			file = SD_LISTEN_FDS_START + i;
	if (file < 0)
		return 0;
	rc = handover_load(file, h, err);
	(void)close(file); /* read only */
	if (rc)
		return rc;
	taken_n = h->conns_n;
	was_taken = true;
	/* systemd drops one that ends meanwhile: as if it had ended under us. */
	for (size_t i = 0; i < h->conns_n; i++)
		h->conns[i].fd = find(names, n, i);
	return 1;
}

int fdstore_take(struct handover *h, struct err *err)
{
	char **names = NULL;
	int rc, n = sd_listen_fds_with_names(0, &names);

	if (n <= 0)
		return 0; /* an error shows when the listening sockets are looked for */
	rc = take(names, n, h, err);
	for (int i = 0; i < n; i++)
		free(names[i]);
	free(names);
	return rc;
}

void fdstore_forget(void)
{
	char text[64];

	if (!was_taken)
		return;
	for (size_t i = 0; i < taken_n; i++) {
		(void)snprintf(text, sizeof(text), "FDSTOREREMOVE=1\nFDNAME=" PREFIX "%zu", i);
		notify_manager(text);
	}
	notify_manager("FDSTOREREMOVE=1\nFDNAME=" FILE_NAME);
	was_taken = false;
}
#else
bool fdstore_is_there(void)
{
	return false;
}

int fdstore_put(const struct handover *h, int file)
{
	(void)h;
	(void)file;
	return -EOPNOTSUPP;
}

int fdstore_take(struct handover *h, struct err *err)
{
	(void)h;
	(void)err;
	return 0;
}

void fdstore_forget(void)
{
}
#endif
