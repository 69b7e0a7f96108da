/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Chain texts. Besides not crashing: an error names a column, an accepted text has a canonical form that
 * is accepted again and is its own canonical form.
 */
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/spec.h"

/* Tolerated: masks can make a canonical text longer than a text may be. */
static void check_canonical(const struct spec *s)
{
	_cleanup_free_ char *once = spec_format(s), *twice = NULL;
	struct spec *again = NULL;
	struct err err = { "" };

	must(once);
	if (strlen(once) > SPEC_MAX_LEN)
		return;
	must(spec_parse(once, &again, &err) == 0);
	twice = spec_format(again);
	must(twice && strcmp(once, twice) == 0);
	spec_free(again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	_cleanup_free_ char *text = malloc(size + 1);
	struct spec *s = NULL;
	struct err err = { "" };
	int rc;

	must(text);
	memcpy(text, data, size);
	text[size] = '\0';
	rc = spec_parse(text, &s, &err);
	if (rc) {
		must(!s && strncmp(err.msg, "column ", 7) == 0);
		return 0;
	}
	check_canonical(s);
	must(spec_expand(&s, &err) == 0);
	check_canonical(s);
	spec_free(s);
	return 0;
}
