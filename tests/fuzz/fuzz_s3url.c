/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Targets of layer s3. Besides not crashing: an error says something; what is accepted has a
 * bucket, an endpoint that is accepted again as it is, keys in pairs, and no control characters.
 */
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/s3.h"

static void check_clean(const char *text)
{
	for (; text && *text; text++)
		must((unsigned char)*text >= 0x20 && *text != 0x7f);
}

static void check_host(const struct s3_url *u)
{
	_cleanup_free_ char *text = malloc(strlen(u->scheme) + strlen(u->host) + 4);
	char *scheme, *host;
	struct err err;

	must(text);
	(void)stpcpy(stpcpy(stpcpy(text, u->scheme), "://"), u->host);
	must(s3_endpoint_parse(text, "here", &scheme, &host, &err) == 0);
	must(strcmp(scheme, u->scheme) == 0 && strcmp(host, u->host) == 0);
	free(scheme);
	free(host);
	(void)s3_wants_path_style(u->host);
}

static void check_encoding(const char *path)
{
	size_t len = strlen(path), n;
	_cleanup_free_ char *out = malloc(3 * len + 1);

	must(out);
	n = s3_encode(path, len, true, out);
	must(n == strlen(out) && n >= len && n <= 3 * len);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	_cleanup_free_ char *text = malloc(size + 1);
	struct err err = { "" };
	struct s3_url u;

	must(text);
	memcpy(text, data, size);
	text[size] = '\0';
	if (s3_url_parse(text, &u, &err) != 0) {
		must(strncmp(err.msg, "s3: ", 4) == 0);
		return 0;
	}
	must(u.bucket && *u.bucket && u.path && strlen(u.path) <= S3_KEY_MAX);
	must(!u.key == !u.secret && !(u.key && u.key_file) && !u.scheme == !u.host);
	must(u.host || (!u.key && !u.key_file));
	check_clean(u.key);
	check_clean(u.secret);
	check_clean(u.key_file);
	check_clean(u.bucket);
	check_clean(u.path);
	check_encoding(u.path);
	(void)s3_bucket_fits_host(u.bucket, true);
	if (u.host)
		check_host(&u);
	s3_url_free(&u);
	return 0;
}
