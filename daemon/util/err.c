/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Error texts of set-up code.
 */
#include "nbdrs/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "nbdrs/cleanup.h"

/* Marks a text that did not fit, so that nobody takes the rest for the whole. */
static void mark_truncated(struct err *err, int would_be_len)
{
	if (would_be_len >= 0 && (size_t)would_be_len >= sizeof(err->msg))
		memcpy(err->msg + sizeof(err->msg) - 4, "...", 4);
}

int (err_set)(struct err *err, int rc, const char *fmt, ...)
{
	va_list ap;

	if (!err)
		return rc;
	va_start(ap, fmt);
	mark_truncated(err, vsnprintf(err->msg, sizeof(err->msg), fmt, ap));
	va_end(ap);
	return rc;
}

int (err_prefix)(struct err *err, int rc, const char *fmt, ...)
{
	char prefix[256];
	va_list ap;
	int n;
	size_t prefix_len, msg_len, room;

	if (!err)
		return rc;
	va_start(ap, fmt);
	n = vsnprintf(prefix, sizeof(prefix) - 2, fmt, ap);
	va_end(ap);
	if (n < 0)
		return rc;
	prefix_len = strlen(prefix);
	memcpy(prefix + prefix_len, ": ", 2);
	prefix_len += 2;

	msg_len = strlen(err->msg);
	room = sizeof(err->msg) - 1 - prefix_len;
	memmove(err->msg + prefix_len, err->msg, MIN(msg_len, room));
	memcpy(err->msg, prefix, prefix_len);
	err->msg[prefix_len + MIN(msg_len, room)] = '\0';
	mark_truncated(err, (int)(prefix_len + msg_len));
	return rc;
}

const char *err_name(int rc)
{
	static _Thread_local char unknown[32];
	const char *name;
	unsigned no = rc < 0 ? -(unsigned)rc : (unsigned)rc;

	name = strerrorname_np((int)no);
	if (name && no)
		return name;
	(void)snprintf(unknown, sizeof(unknown), "errno %u", no); /* 10 digits always fit */
	return unknown;
}
