/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Configuration files. Besides not crashing: an error names a line, words have no newline in them, and lines are in
 * order. Lines that attach.conf would take are parsed as such.
 */
#include <string.h>

#include "autoattach.h"
#include "conf/conffile.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	_cleanup_conf_ struct conf_file f = { 0 };
	struct err err = { "" };
	unsigned last = 0;

	if (conf_parse("f", (const char *)data, size, &f, &err)) {
		must(!f.text && strncmp(err.msg, "f:", 2) == 0);
		return 0;
	}
	for (size_t i = 0; i < f.lines_n; i++) {
		must(f.lines[i].number > last && f.lines[i].words_n > 0);
		last = f.lines[i].number;
		for (unsigned w = 0; w < f.lines[i].words_n; w++)
			must(!strchr(f.lines[i].words[w], '\n') && strlen(f.lines[i].words[w]) <= size);
	}
	if (autoattach_check(&f, &err))
		must(strncmp(err.msg, "f:", 2) == 0);
	return 0;
}
