/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What S3 servers send as XML. Besides not crashing: a page that is not the last names the next
 * one, keys have no NUL, a document is never two things at once, and texts for the log have no
 * control characters.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "nbdrs/s3.h"

static void check_clean(const char *text)
{
	for (; *text; text++)
		must((unsigned char)*text >= 0x20 && *text != 0x7f);
}

struct count {
	unsigned n, stop_at;
};

static int on_key(void *arg, const char *key, uint64_t size, const char *etag)
{
	struct count *c = arg;

	must(key != NULL && etag != NULL && !strchr(etag, '"'));
	return ++c->n == c->stop_at ? -ECANCELED : 0;
}

static void on_failure(void *arg, const char *key, const char *code, const char *message)
{
	check_clean(key);
	check_clean(code);
	check_clean(message);
}

static bool check_list(const char *text, size_t len)
{
	struct count all = { 0, 0 }, some = { 0, 2 };
	struct s3_page page;
	int rc = s3_xml_list(text, len, &page, on_key, &all);

	must(rc <= 0 && (rc == 0 || all.n <= page.keys));
	if (rc == 0)
		must(all.n == page.keys && (!page.is_truncated || (page.token && *page.token)));
	free(page.token);
	if (rc == 0 && all.n >= 2) {
		must(s3_xml_list(text, len, &page, on_key, &some) == -ECANCELED && some.n == 2);
		free(page.token);
	}
	return rc == 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const char *text = (const char *)data;
	struct s3_error e;
	unsigned meanings = check_list(text, size);

	meanings += s3_xml_deleted(text, size, on_failure, NULL) == 0;
	s3_xml_error(text, size, &e);
	check_clean(e.code);
	check_clean(e.message);
	check_clean(e.region);
	meanings += e.code[0] != '\0';
	must(meanings <= 1);
	return 0;
}
