/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What nbdrs-attach reads from the kernel and from names that users choose. The first byte picks the
 * parser. Besides not crashing: a name that is decoded is encoded to what it was, up to the case of
 * escapes, and a link made from it is a file name.
 */
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "fuzz.h"
#include "lostdata.h"
#include "mounts.h"
#include "names.h"
#include "nbdrs/cleanup.h"
#include "nl.h"

static void check_names(const char *text)
{
	static char name[EXPORT_NAME_LEN], again[3 * EXPORT_NAME_LEN + 16];
	char link[LINK_NAME_LEN];
	uint32_t index;

	if (name_to_index(text, &index) == 0) {
		must(index <= DEVICE_INDEX_MAX);
		must(!name_is_partition(text));
	}
	if (name_from_backend(text, name) == 0) {
		/* Escapes of plain bytes are allowed, too: then the second form is the shorter one. */
		must(name_to_backend(name, again, sizeof(again)) == 0);
		must(strlen(again) <= strlen(text));
		if (strlen(again) == strlen(text))
			must(strcasecmp(again, text) == 0);
	}
	if (name_to_link(text, link) == 0) {
		must(link[0] && link[0] != '.' && !strchr(link, '/') && !strchr(link, '%'));
		must(strlen(link) + strlen("nbdrs--part31") <= 255);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	_cleanup_free_ char *text = NULL;
	struct nbdnl_device devices[4];
	struct lost_data lost = { 0 };
	struct mount_line m;
	const char *file;
	unsigned n = 0;

	if (size < 1)
		return 0;
	/* Copied, so that a read beyond the end is seen, and netlink's attributes are aligned. */
	text = malloc(size);
	must(text);
	memcpy(text, data + 1, size - 1);
	text[size - 1] = '\0';
	switch (data[0] & 7) {
	case 0:
		if (mount_parse(text, &m) == 0)
			must(m.point && m.type && m.source && m.super_options);
		break;
	case 1:
		if (swap_parse(text, &file) == 0)
			must(file[0] == '/');
		break;
	case 2:
		lost_data_line(&lost, "nbd0", text);
		must(lost.errors_n <= 1);
		break;
	case 3:
		if (nbdnl_parse_status(text, size - 1, devices, 4, &n) == 0)
			must(n <= 4);
		break;
	default: check_names(text);
	}
	return 0;
}
