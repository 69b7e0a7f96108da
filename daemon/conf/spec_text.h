/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * How a chain text is shown in an error.
 */
#ifndef NBDRS_CONF_SPEC_TEXT_H
#define NBDRS_CONF_SPEC_TEXT_H

#include <stdarg.h>
#include <stddef.h>

#include "nbdrs/err.h"

/*
 * Fills `err`: "column N: MESSAGE", the text around offset `at` with secrets masked, and a caret below.
 * Returns -EINVAL.
 */
int spec_text_error(struct err *err, const char *text, size_t at, const char *fmt, va_list ap)
	__attribute__((format(printf, 4, 0)));

#endif
