/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Sockets of kernel devices kept by systemd between a stop and a start: sd_pid_notify_with_fds(3), "FDSTORE=1".
 *
 * Each has a name: "nbdrs-handover" the file (handover.h), "nbdrs-N" the connection that is number N in it. They
 * come back among the sockets of LISTEN_FDS, under other numbers, and listen.c leaves what has such a name alone.
 * Whether a start will follow nobody knows; systemd closes what it has when the service stays stopped.
 *
 * A descriptor that stays there, or here, unused keeps the kernel from seeing that its connection has ended, and the
 * device would hang. So what cannot be used is cut, here and there.
 */
#include "cmd/cmd.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/handover.h"
#include "nbdrs/opt.h"

#ifdef HAVE_SYSTEMD
#include <systemd/sd-daemon.h>

enum { BARRIER_US = 5000000, NAME_LEN = 32 };

static size_t taken_n; /* connections that are to be forgotten */
static bool was_taken;

uint64_t fdstore_room(void)
{
	const char *max = getenv("FDSTORE");
	uint64_t n;

	return getenv("NOTIFY_SOCKET") && max && parse_u64(max, &n) == 0 ? n : 0;
}

static void conn_name(char out[NAME_LEN], size_t number)
{
	(void)snprintf(out, NAME_LEN, HANDOVER_CONN_NAME, number); /* fits */
}

static int put_one(const char *name, int fd)
{
	char text[64];
	int rc;

	(void)snprintf(text, sizeof(text), "FDSTORE=1\nFDNAME=%s", name);
	rc = sd_pid_notify_with_fds(0, 0, text, &fd, 1);
	return rc < 0 ? rc : rc == 0 ? -ENOTCONN : 0;
}

static void forget_one(const char *name)
{
	char text[64];

	(void)snprintf(text, sizeof(text), "FDSTOREREMOVE=1\nFDNAME=%s", name);
	notify_manager(text);
}

static void forget_all(size_t n)
{
	char name[NAME_LEN];

	for (size_t i = 0; i < n; i++) {
		conn_name(name, i);
		forget_one(name);
	}
	forget_one(HANDOVER_FILE_NAME);
}

int fdstore_put(const struct handover *h, int file)
{
	char name[NAME_LEN];
	int rc = 0;

	for (size_t i = 0; i < h->conns_n && !rc; i++) {
		conn_name(name, i);
		rc = put_one(name, h->conns[i].fd);
	}
	/* Last: with it the next one knows that the others are there. */
	if (!rc)
		rc = put_one(HANDOVER_FILE_NAME, file);
	/* Messages of a process that is gone can't be told to be this service's. */
	if (!rc)
		rc = sd_notify_barrier(0, BARRIER_US);
	if (rc < 0)
		forget_all(h->conns_n);
	return rc < 0 ? rc : 0;
}

/* What comes in LISTEN_FDS. */
struct passed {
	char **names;
	int n;
};

static int find(const struct passed *p, const char *name)
{
	for (int i = 0; i < p->n; i++)
		if (strcmp(p->names[i], name) == 0)
			return SD_LISTEN_FDS_START + i;
	return -1;
}

/* Of no use: the kernel shall see the end of each. */
static void cut_all(const struct passed *p)
{
	for (int i = 0; i < p->n; i++) {
		if (!handover_is_kept(p->names[i]))
			continue;
		(void)shutdown(SD_LISTEN_FDS_START + i, SHUT_RDWR); /* the file is no socket */
		(void)close(SD_LISTEN_FDS_START + i);
		forget_one(p->names[i]);
	}
}

/* 1 = taken, 0 = there is no file, -errno. */
static int take(const struct passed *p, struct handover *h, struct err *err)
{
	const int file = find(p, HANDOVER_FILE_NAME);
	char name[NAME_LEN];
	int rc;

	if (file < 0)
		return 0;
	rc = handover_load(file, h, err);
	if (rc)
		return rc;
	(void)close(file); /* read only */
	taken_n = h->conns_n;
	was_taken = true;
	/* systemd drops one that ends meanwhile: as if it had ended under us. */
	for (size_t i = 0; i < h->conns_n; i++) {
		conn_name(name, i);
		h->conns[i].fd = find(p, name);
	}
	return 1;
}

int fdstore_take(struct handover *h)
{
	struct passed p = { 0 };
	struct err err = { "" };
	int rc;

	p.n = sd_listen_fds_with_names(0, &p.names);
	if (p.n <= 0)
		return 0; /* an error shows when the listening sockets are looked for */
	rc = take(&p, h, &err);
	if (rc < 0)
		log_error("connections of devices that systemd has kept are cut, and wait for new ones error=%s "
			  "reason=\"%s\"", err_name(rc), err.msg);
	if (rc <= 0)
		cut_all(&p);
	for (int i = 0; i < p.n; i++)
		free(p.names[i]);
	free(p.names);
	return rc > 0;
}

void fdstore_forget(void)
{
	if (!was_taken)
		return;
	forget_all(taken_n);
	was_taken = false;
}
#else
uint64_t fdstore_room(void)
{
	return 0;
}

int fdstore_put(const struct handover *h, int file)
{
	(void)h;
	(void)file;
	return -EOPNOTSUPP;
}

int fdstore_take(struct handover *h)
{
	(void)h;
	return 0;
}

void fdstore_forget(void)
{
}
#endif
