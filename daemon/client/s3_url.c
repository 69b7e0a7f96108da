/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Targets of layer s3, and percent-encoding. Pure.
 *
 *	http[s]://[USERINFO@]HOST[:PORT]/BUCKET[/PATH]
 *	/BUCKET[/PATH]				endpoint and keys from the environment
 *
 * USERINFO is KEY:SECRET, or @FILE. Key and secret are percent-decoded after they were split at the
 * first ":", so a key that holds ":" is written with %3A. Secrets are often pasted as they are,
 * with "/" in them; that is taken where what stands before the first "/" cannot be a host.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "nbdrs/ascii.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/s3.h"

enum { HOST_MAX = 255, BUCKET_MAX = 255, PORT_MAX = 65535 };

static const char form[] = "http://KEY:SECRET@host:port/bucket/prefix/ or /bucket/prefix/";

size_t s3_encode(const char *in, size_t len, bool keep_slash, char *out)
{
	static const char hex[] = "0123456789ABCDEF";
	char *p = out;

	for (size_t i = 0; i < len; i++) {
		unsigned char c = (unsigned char)in[i];

		if (ascii_is_alnum(in[i]) || memchr("-._~", c, 4) || (c == '/' && keep_slash)) {
			*p++ = (char)c;
			continue;
		}
		*p++ = '%';
		*p++ = hex[c >> 4];
		*p++ = hex[c & 15];
	}
	*p = '\0';
	return (size_t)(p - out);
}

/* -EINVAL: a "%" without two digits, or a control character. The caller frees *out. */
static int decode(const char *in, size_t len, char **out)
{
	char *text = malloc(len + 1);
	size_t n = 0;

	if (!text)
		return -ENOMEM;
	for (size_t i = 0; i < len; i++) {
		int c = (unsigned char)in[i];

		if (c == '%') {
			c = i + 2 < len ? ascii_percent(in + i) : -1;
			i += 2;
		}
		if (c < 0x20 || c == 0x7f) {
			free(text);
			return -EINVAL;
		}
		text[n++] = (char)c;
	}
	text[n] = '\0';
	*out = text;
	return 0;
}

/* ---- hosts ---- */

/* Length of the host's name in "name:port", "[::1]:port"; 0 = neither. */
static size_t name_len(const char *host, size_t len)
{
	const char *end;

	if (len > 0 && host[0] == '[') {
		end = memchr(host, ']', len);
		return end && end > host + 2 ? (size_t)(end + 1 - host) : 0;
	}
	end = memchr(host, ':', len);
	return end ? (size_t)(end - host) : len;
}

static bool is_name(const char *name, size_t len)
{
	bool is_v6 = len > 0 && name[0] == '[';

	for (size_t i = is_v6 ? 1 : 0; i < len - (is_v6 ? 1 : 0); i++) {
		if (is_v6 ? ascii_hex(name[i]) < 0 && name[i] != ':' && name[i] != '.'
			  : !ascii_is_alnum(name[i]) && !memchr("-._", name[i], 3))
			return false;
	}
	return len > 0;
}

/*
 * The port's number, 0 when there is none, -1 when it is not one. `text` is what follows the name.
 */
static int port_number(const char *text, size_t len)
{
	int port = 0;

	if (len == 0)
		return 0;
	if (text[0] != ':' || len < 2 || len > 6)
		return -1;
	for (size_t i = 1; i < len; i++) {
		if (!ascii_is_digit(text[i]))
			return -1;
		port = port * 10 + (text[i] - '0');
	}
	return port >= 1 && port <= PORT_MAX ? port : -1;
}

static bool is_host(const char *host, size_t len)
{
	size_t n = name_len(host, len);

	return len <= HOST_MAX && is_name(host, n) && port_number(host + n, len - n) >= 0;
}

/*
 * Small letters, and no port that the scheme implies: what curl sends as Host is what gets signed.
 */
static int take_host(const char *host, size_t len, const char *scheme, char **out)
{
	size_t n = name_len(host, len);
	int port = port_number(host + n, len - n);
	char *text;

	if (port == (strcmp(scheme, "https") == 0 ? 443 : 80))
		len = n;
	text = strndup(host, len);
	if (!text)
		return -ENOMEM;
	for (size_t i = 0; i < len; i++) {
		if (text[i] >= 'A' && text[i] <= 'Z')
			text[i] = (char)(text[i] - 'A' + 'a');
	}
	*out = text;
	return 0;
}

/* "https", "http" or NULL; *rest is what follows the "//". */
static const char *scheme_of(const char *text, const char **rest)
{
	static const char *const schemes[] = { "http", "https" };

	for (unsigned i = 0; i < ARRAY_LEN(schemes); i++) {
		size_t len = strlen(schemes[i]);

		if (strncasecmp(text, schemes[i], len) == 0 && strncmp(text + len, "://", 3) == 0) {
			*rest = text + len + 3;
			return schemes[i];
		}
	}
	return NULL;
}

int s3_endpoint_parse(const char *text, const char *where, char **scheme, char **host,
		      struct err *err)
{
	const char *rest, *name = scheme_of(text, &rest);
	size_t len = name ? strcspn(rest, "/") : 0;

	if (!name || !is_host(rest, len) || strspn(rest + len, "/") != strlen(rest + len))
		return err_set(
			err, -EINVAL,
			"s3: the endpoint \"%s\" in %s must be http://HOST:PORT or https://HOST:PORT",
			strchr(text, '@') ? "..." : text, where);
	*host = NULL;
	*scheme = strdup(name);
	if (!*scheme || take_host(rest, len, name, host) != 0) {
		free(*scheme);
		return err_set(err, -ENOMEM, "out of memory");
	}
	return 0;
}

bool s3_wants_path_style(const char *host)
{
	static const char amazon[] = ".amazonaws.com", china[] = ".amazonaws.com.cn";
	size_t len = strlen(host);

	/*
	 * Addresses have no names below them, and a port or a private name seldom comes with a
	 * wildcard in the DNS.
	 */
	return !(len > strlen(amazon) && strcmp(host + len - strlen(amazon), amazon) == 0) &&
	       !(len > strlen(china) && strcmp(host + len - strlen(china), china) == 0);
}

bool s3_bucket_fits_host(const char *bucket, bool is_https)
{
	size_t len = strlen(bucket);

	if (len < 3 || len > 63)
		return false;
	for (size_t i = 0; i < len; i++) {
		char c = bucket[i];

		/* A wildcard certificate stands for one label: no dots. */
		if (!(c >= 'a' && c <= 'z') && !ascii_is_digit(c) && c != '-' && (c != '.' || is_https))
			return false;
		if (c == '.' && (i + 1 == len || i == 0 || bucket[i + 1] == '.'))
			return false;
	}
	return bucket[0] != '-' && bucket[len - 1] != '-';
}

/* ---- userinfo, bucket, path ---- */

static int bad(struct err *err, const char *why)
{
	return err_set(err, -EINVAL, "s3: %s; the target is %s", why, form);
}

static int take_userinfo(const char *info, size_t len, struct s3_url *u, struct err *err)
{
	const char *colon = memchr(info, ':', len);
	int rc;

	if (!colon)
		return bad(err, "no \":\" between KEY and SECRET");
	rc = decode(info, (size_t)(colon - info), &u->key);
	if (!rc)
		rc = decode(colon + 1, len - (size_t)(colon + 1 - info), &u->secret);
	if (rc == -EINVAL)
		return bad(
			err,
			"in KEY or SECRET a \"%\" is not followed by two hex digits (write %25 for it)");
	if (rc)
		return err_set(err, rc, "out of memory");
	if (!*u->key || !*u->secret)
		return bad(err, "KEY or SECRET is empty");
	return 0;
}

/* Takes the userinfo off; *rest is moved to the host. */
static int split_userinfo(const char **rest, struct s3_url *u, struct err *err)
{
	const char *text = *rest;
	size_t authority = strcspn(text, "/");
	const char *at = memrchr(text, '@', authority);

	if (text[0] == '@') {
		at = strchr(text + 1, '@');
		if (!at || at == text + 1)
			return bad(
				err,
				"after @ comes the file with the keys, then @host: http://@/etc/keys@host/bucket");
		*rest = at + 1;
		if (decode(text + 1, (size_t)(at - text - 1), &u->key_file) != 0)
			return bad(err, "the file's name has a \"%\" without two hex digits");
		return 0;
	}
	if (!at && !is_host(text, authority))
		at = strchr(text, '@'); /* a secret with "/" in it */
	if (!at)
		return 0;
	*rest = at + 1;
	return take_userinfo(text, (size_t)(at - text), u, err);
}

/* `path` is "BUCKET[/PATH]". */
static int take_path(const char *path, struct s3_url *u, struct err *err)
{
	size_t bucket = strcspn(path, "/");
	int rc;

	if (bucket == 0)
		return bad(err, "no bucket");
	if (strchr(path, '?'))
		return bad(
			err,
			"no query is allowed behind the path (a \"?\" in a name is written %3F)");
	rc = decode(path, bucket, &u->bucket);
	if (!rc)
		rc = decode(path[bucket] ? path + bucket + 1 : "",
			    path[bucket] ? strlen(path + bucket + 1) : 0, &u->path);
	if (rc == -EINVAL)
		return bad(
			err,
			"bucket or path has control characters, or a \"%\" without two hex digits (write "
			"%25 for it)");
	if (rc)
		return err_set(err, rc, "out of memory");
	if (strlen(u->bucket) > BUCKET_MAX || strchr(u->bucket, '/') ||
	    strcmp(u->bucket, ".") == 0 || strcmp(u->bucket, "..") == 0)
		return bad(err, "this cannot be a bucket's name");
	if (strlen(u->path) > S3_KEY_MAX)
		return err_set(err, -EINVAL,
			       "s3: the path behind the bucket is longer than %d bytes",
			       S3_KEY_MAX);
	return 0;
}

static int parse(const char *target, struct s3_url *u, struct err *err)
{
	const char *rest, *scheme = scheme_of(target, &rest);
	size_t len;
	int rc;

	if (target[0] == '/')
		return take_path(target + 1, u, err);
	if (!scheme)
		return bad(err, "neither http:// nor https:// nor a /bucket");
	rc = split_userinfo(&rest, u, err);
	if (rc)
		return rc;
	len = strcspn(rest, "/");
	if (!is_host(rest, len))
		return bad(err, "no valid host and port");
	if (!rest[len])
		return bad(err, "no bucket");
	u->scheme = strdup(scheme);
	if (!u->scheme || take_host(rest, len, scheme, &u->host) != 0)
		return err_set(err, -ENOMEM, "out of memory");
	return take_path(rest + len + 1, u, err);
}

int s3_url_parse(const char *target, struct s3_url *out, struct err *err)
{
	struct s3_url u = { 0 };
	int rc = parse(target, &u, err);

	if (rc)
		s3_url_free(&u);
	else
		*out = u;
	return rc;
}

/* The compiler may not leave out the wiping. */
static void free_secret(char *s)
{
	if (s)
		explicit_bzero(s, strlen(s));
	free(s);
}

void s3_url_free(struct s3_url *u)
{
	free(u->scheme);
	free(u->host);
	free_secret(u->key);
	free_secret(u->secret);
	free(u->key_file);
	free(u->bucket);
	free(u->path);
	*u = (struct s3_url){ 0 };
}
