/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Signature Version 4: a request in canonical form is hashed; the hash, with date, region and
 * service, is signed by a key that is derived from the secret for that day, region and service. The
 * day's key is kept, so that a request costs two HMACs. Pure but for that cache.
 *
 * Source: "Signature Version 4 signing process", Amazon S3 API reference. S3's own rule: paths are
 * encoded once.
 */
#include <errno.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/s3.h"

enum { DIGEST_LEN = 32, DAY_LEN = 8, SCOPE_MAX = 160, NAMES_MAX = 320 };

static void to_hex(const uint8_t *in, size_t len, char *out)
{
	static const char hex[] = "0123456789abcdef";

	for (size_t i = 0; i < len; i++) {
		*out++ = hex[in[i] >> 4];
		*out++ = hex[in[i] & 15];
	}
	*out = '\0';
}

void s3_date(time_t t, char *out)
{
	struct tm tm;

	(void)gmtime_r(&t, &tm); /* fails only for years that do not fit an int */
	(void)strftime(out, S3_DATE_LEN + 1, "%Y%m%dT%H%M%SZ", &tm);
}

/* The context is taken, NULL or not. */
static int end_hex(EVP_MD_CTX *ctx, bool is_fine, char *out)
{
	uint8_t digest[EVP_MAX_MD_SIZE];
	unsigned n = 0;

	is_fine = is_fine && EVP_DigestFinal_ex(ctx, digest, &n) == 1;
	EVP_MD_CTX_free(ctx);
	if (!is_fine)
		return -EIO;
	to_hex(digest, n, out);
	return 0;
}

static int iov_hex(const EVP_MD *md, const struct iov *iov, char *out)
{
	EVP_MD_CTX *ctx = EVP_MD_CTX_new();
	bool is_fine = ctx && EVP_DigestInit_ex(ctx, md, NULL) == 1;

	for (unsigned i = 0; iov && i < iov->n && is_fine; i++)
		is_fine = EVP_DigestUpdate(ctx, iov->v[i].iov_base, iov->v[i].iov_len) == 1;
	return end_hex(ctx, is_fine, out);
}

int s3_hash(const struct iov *iov, char *out)
{
	return iov_hex(EVP_sha256(), iov, out);
}

int s3_md5_hex(const struct iov *iov, char *out)
{
	return iov_hex(EVP_md5(), iov, out);
}

int s3_md5(const void *data, size_t len, char *out)
{
	uint8_t digest[EVP_MAX_MD_SIZE];
	unsigned n = 0;

	if (EVP_Digest(data, len, digest, &n, EVP_md5(), NULL) != 1)
		return -EIO;
	(void)EVP_EncodeBlock((unsigned char *)out, digest, (int)n);
	return 0;
}

static int hmac(const void *key, size_t key_len, const char *text, size_t len, uint8_t *out)
{
	return HMAC(EVP_sha256(), key, (int)key_len, (const unsigned char *)text, len, out, NULL)
		       ? 0
		       : -EIO;
}

/* ---- the day's key ---- */

static int derive(struct s3_signer *s, const struct s3_creds *creds, const struct s3_to_sign *what)
{
	size_t len = strlen(creds->secret) + 4;
	_cleanup_free_ char *start = malloc(len + 1);
	uint8_t key[DIGEST_LEN];
	int rc;

	if (!start)
		return -ENOMEM;
	(void)snprintf(start, len + 1, "AWS4%s", creds->secret);
	rc = hmac(start, len, what->date, DAY_LEN, key);
	explicit_bzero(start, len);
	if (!rc)
		rc = hmac(key, DIGEST_LEN, what->region, strlen(what->region), key);
	if (!rc)
		rc = hmac(key, DIGEST_LEN, what->service, strlen(what->service), key);
	if (!rc)
		rc = hmac(key, DIGEST_LEN, "aws4_request", strlen("aws4_request"), s->key);
	explicit_bzero(key, sizeof(key));
	if (rc)
		return rc;
	s->creds = creds;
	memcpy(s->day, what->date, DAY_LEN);
	s->day[DAY_LEN] = '\0';
	(void)snprintf(s->region, sizeof(s->region), "%s", what->region);
	return 0;
}

static int day_key(struct s3_signer *s, const struct s3_creds *creds, const struct s3_to_sign *what)
{
	if (s->creds == creds && memcmp(s->day, what->date, DAY_LEN) == 0 &&
	    strcmp(s->region, what->region) == 0)
		return 0;
	if (strlen(what->region) > S3_REGION_MAX)
		return -E2BIG;
	s->creds = NULL;
	return derive(s, creds, what);
}

/* ---- canonical form ---- */

/* Indices of the headers by name. */
static void sort_headers(const struct s3_to_sign *what, unsigned *order)
{
	for (unsigned i = 0; i < what->headers_n; i++) {
		unsigned at = i;

		while (at > 0 &&
		       strcmp(what->headers[order[at - 1]].name, what->headers[i].name) > 0) {
			order[at] = order[at - 1];
			at--;
		}
		order[at] = i;
	}
}

/* Feeds a text to the hash. */
static void feed(EVP_MD_CTX *ctx, bool *is_fine, const char *text, size_t len)
{
	*is_fine = *is_fine && EVP_DigestUpdate(ctx, text, len) == 1;
}

static void feed_text(EVP_MD_CTX *ctx, bool *is_fine, const char *text)
{
	feed(ctx, is_fine, text, strlen(text));
}

/* Without blanks at its ends, and one for several in a row. */
static void feed_value(EVP_MD_CTX *ctx, bool *is_fine, const char *value)
{
	bool is_first = true;

	for (value += strspn(value, " "); *value; value += strspn(value, " ")) {
		size_t len = strcspn(value, " ");

		if (!is_first)
			feed_text(ctx, is_fine, " ");
		is_first = false;
		feed(ctx, is_fine, value, len);
		value += len;
	}
}

/* Hex hash of the canonical request. `names` is the list of signed headers. */
static int hash_request(const struct s3_to_sign *what, const unsigned *order, const char *names,
			char *out)
{
	EVP_MD_CTX *ctx = EVP_MD_CTX_new();
	bool is_fine = ctx && EVP_DigestInit_ex(ctx, EVP_sha256(), NULL) == 1;

	feed_text(ctx, &is_fine, what->method);
	feed_text(ctx, &is_fine, "\n");
	feed_text(ctx, &is_fine, what->path);
	feed_text(ctx, &is_fine, "\n");
	feed_text(ctx, &is_fine, what->query);
	feed_text(ctx, &is_fine, "\n");
	for (unsigned i = 0; i < what->headers_n; i++) {
		const struct http_header *h = &what->headers[order[i]];

		feed_text(ctx, &is_fine, h->name);
		feed_text(ctx, &is_fine, ":");
		feed_value(ctx, &is_fine, h->value);
		feed_text(ctx, &is_fine, "\n");
	}
	feed_text(ctx, &is_fine, "\n");
	feed_text(ctx, &is_fine, names);
	feed_text(ctx, &is_fine, "\n");
	feed_text(ctx, &is_fine, what->payload);
	return end_hex(ctx, is_fine, out);
}

/* "host;x-amz-date" */
static int join_names(const struct s3_to_sign *what, const unsigned *order, char *out, size_t room)
{
	size_t at = 0;

	out[0] = '\0';
	for (unsigned i = 0; i < what->headers_n; i++) {
		int n = snprintf(out + at, room - at, "%s%s", i ? ";" : "",
				 what->headers[order[i]].name);

		if (n < 0 || (size_t)n >= room - at)
			return -E2BIG;
		at += (size_t)n;
	}
	return 0;
}

int s3_sign(struct s3_signer *s, const struct s3_creds *creds, const struct s3_to_sign *what,
	    char *out, size_t room)
{
	char names[NAMES_MAX], hash[S3_HASH_LEN + 1], scope[SCOPE_MAX], text[SCOPE_MAX + 128];
	unsigned order[S3_SIGNED_MAX];
	uint8_t digest[DIGEST_LEN];
	int n, rc;

	if (what->headers_n > S3_SIGNED_MAX || strlen(what->date) != S3_DATE_LEN)
		return -E2BIG;
	sort_headers(what, order);
	rc = join_names(what, order, names, sizeof(names));
	if (!rc)
		rc = hash_request(what, order, names, hash);
	if (!rc)
		rc = day_key(s, creds, what);
	if (rc)
		return rc;
	n = snprintf(scope, sizeof(scope), "%.8s/%s/%s/aws4_request", what->date, what->region,
		     what->service);
	if (n < 0 || (size_t)n >= sizeof(scope))
		return -E2BIG;
	n = snprintf(text, sizeof(text), "AWS4-HMAC-SHA256\n%s\n%s\n%s", what->date, scope, hash);
	rc = hmac(s->key, DIGEST_LEN, text, (size_t)n, digest);
	if (rc)
		return rc;
	to_hex(digest, DIGEST_LEN, hash);
	n = snprintf(out, room, "AWS4-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%s",
		     creds->key, scope, names, hash);
	return n < 0 || (size_t)n >= room ? -E2BIG : 0;
}
