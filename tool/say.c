/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Messages of nbdrs-attach: see say.h. One write per line, so that lines of several tools never mix;
 * control characters are replaced, because names come from command lines and other processes.
 */
#include "say.h"

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

void note(const char *fmt, ...)
{
	char line[2048] = "nbdrs-attach: ";
	const size_t head = sizeof("nbdrs-attach: ") - 1;
	const size_t room = sizeof(line) - head - 1; /* a newline comes behind */
	size_t len = head;
	va_list ap;
	int n;

	va_start(ap, fmt);
	n = vsnprintf(line + head, room, fmt, ap);
	va_end(ap);
	if (n > 0)
		len += (size_t)n < room ? (size_t)n : room - 1;
	for (size_t i = head; i < len; i++)
		if ((unsigned char)line[i] < ' ' || line[i] == 0x7f)
			line[i] = '?';
	line[len++] = '\n';
	(void)!write(STDERR_FILENO, line, len); /* nowhere left to complain */
}
