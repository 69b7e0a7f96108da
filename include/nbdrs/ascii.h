/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Letters and digits of names, URLs and numbers: those of ASCII, whatever the locale is, which <ctype.h>
 * asks.
 */
#ifndef NBDRS_ASCII_H
#define NBDRS_ASCII_H

#include <stdbool.h>

static inline bool ascii_is_digit(char c)
{
	return c >= '0' && c <= '9';
}

static inline bool ascii_is_alnum(char c)
{
	return ascii_is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

/* The value of a hexadecimal digit of either case, or -1. */
static inline int ascii_hex(char c)
{
	if (ascii_is_digit(c))
		return c - '0';
	c |= 0x20;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* The byte that the "%2F" at `p` stands for (RFC 3986, 2.1), or -1. Looks at no byte behind a '\0'. */
static inline int ascii_percent(const char *p)
{
	int high = *p == '%' ? ascii_hex(p[1]) : -1;
	int low = high >= 0 ? ascii_hex(p[2]) : -1;

	return low >= 0 ? high << 4 | low : -1;
}

#endif
