/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * S3: targets, keys, signatures and XML (pure, any thread), and a client that sends signed
 * requests.
 *
 * A key (of an object) here is raw bytes; it is percent-encoded in one place only, s3_encode().
 * Sources: Amazon S3 API reference; "Signature Version 4 signing process".
 */
#ifndef NBDRS_S3_H
#define NBDRS_S3_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "nbdrs/co.h"
#include "nbdrs/err.h"
#include "nbdrs/http.h"
#include "nbdrs/iov.h"
#include "nbdrs/layer.h"

/* ---- targets ---- */

enum { S3_KEY_MAX = 1024 }; /* bytes of an object's key, before encoding */

/* A target taken apart. All owned; NULL = not there. */
struct s3_url {
	char *scheme;	/* "http" or "https"; NULL: the endpoint is left to the environment */
	char *host;	/* "s3.example.org", "[::1]:9000": small letters, no default port */
	char *key, *secret; /* of the userinfo, decoded */
	char *key_file; /* of a userinfo "@/path" */
	char *bucket;
	char *path;	/* what follows the bucket, decoded; "" = nothing */
};

/*
 * "http://K:S@host:9000/bucket/prefix/", "https://@/path/of/keys@host/bucket", "/bucket/prefix/".
 * Error texts never repeat the userinfo. -EINVAL, -ENOMEM. On failure nothing is left to free.
 */
int s3_url_parse(const char *target, struct s3_url *out, struct err *err);
/* The scheme and host of an endpoint from the environment or a profile, "http://host:9000". */
int s3_endpoint_parse(const char *text, const char *where, char **scheme, char **host, struct err *err);
void s3_url_free(struct s3_url *u);

/*
 * Is `host` (with port) one that wants the bucket in the path: an address, a single label, or not
 * Amazon's?
 */
bool s3_wants_path_style(const char *host);
/* May `bucket` stand before a host name? */
bool s3_bucket_fits_host(const char *bucket, bool is_https);

/*
 * Percent-encodes all but [A-Za-z0-9-._~] (and "/" if keep_slash): the canonical form of
 * signatures, which is also sent. Returns the length, NUL not counted; `out` has room for 3 * len +
 * 1.
 */
size_t s3_encode(const char *in, size_t len, bool keep_slash, char *out);

/* ---- keys ---- */

struct s3_creds {
	char *key, *secret, *token; /* token NULL = none; key NULL = requests are not signed */
	char source[320];	    /* where they came from: "the URL", "profile default of /home/a/.aws/credentials" */
};

/* What the user said, and what the sources add. */
struct s3_config {
	const char *key_file, *profile, *token, *region; /* options; NULL = not given */
	struct s3_creds creds;
	char *found_region;   /* NULL = nowhere */
	char *found_endpoint; /* URL, NULL = nowhere; only looked for when the target has none */
	const char *endpoint_source;
};

/*
 * Fills in the keys: those of the URL, of key_file, of AWS_* variables, of the shared credentials
 * file. Reads files: run it by offload(). None at all is fine: creds.key stays NULL. -EINVAL for a
 * source that makes no sense, -ENOENT, -EACCES ... for a file that was named; no text ever shows a
 * key. On failure nothing is left to free.
 */
int s3_config_load(struct s3_config *c, const struct s3_url *u, struct err *err);
void s3_config_free(struct s3_config *c);
void s3_creds_free(struct s3_creds *c);

/* ---- signatures ---- */

enum {
	S3_HASH_LEN = 64,
	S3_MD5_LEN = 32,
	S3_DATE_LEN = 16,
	S3_REGION_MAX = 63,
	S3_AUTH_MAX = 1024,
	S3_SIGNED_MAX = 12,
};

/*
 * The day's signing key; one per reactor (no locks), or one per thread. Zero-initialised = empty.
 */
struct s3_signer {
	const struct s3_creds *creds; /* whose key it is */
	char day[9];
	char region[S3_REGION_MAX + 1];
	uint8_t key[32];
};

struct s3_to_sign {
	const char *method;
	const char *path;  /* encoded, from "/" on */
	const char *query; /* encoded and sorted, without "?"; "" = none */
	const struct http_header *headers; /* names in small letters; "host" among them; any order */
	unsigned headers_n;		   /* at most S3_SIGNED_MAX */
	const char *payload;		   /* hex hash of the body, or "UNSIGNED-PAYLOAD" */
	const char *region;
	const char *service; /* "s3" */
	const char *date;    /* from s3_date() */
};

/* "20150830T123600Z"; out has S3_DATE_LEN + 1 bytes. */
void s3_date(time_t t, char *out);
/*
 * Hex SHA-256 of a body; out has S3_HASH_LEN + 1 bytes. `iov` may be NULL (empty). -EIO when
 * libcrypto fails.
 */
int s3_hash(const struct iov *iov, char *out);
/* Hex MD5, which is the ETag of most objects; out has S3_MD5_LEN + 1 bytes. As s3_hash. */
int s3_md5_hex(const struct iov *iov, char *out);
/* Base64 of MD5; out has 25 bytes. */
int s3_md5(const void *data, size_t len, char *out);
/* The value of the header Authorization. -E2BIG, -EIO. */
int s3_sign(struct s3_signer *s, const struct s3_creds *creds, const struct s3_to_sign *what, char *out,
	    size_t room);

/* ---- XML ---- */

struct s3_error {
	char code[64];	   /* "NoSuchKey"; "" = the body was none of S3's */
	char message[192]; /* control characters replaced */
	char region[S3_REGION_MAX + 1];
};

/* What an error's body says; all empty when it is not S3's. */
void s3_xml_error(const char *text, size_t len, struct s3_error *out);

/*
 * One object of a listing: key decoded; etag without quotes, "" = not told. Not 0 ends the parsing, which returns it.
 */
typedef int s3_key_fn(void *arg, const char *key, uint64_t size, const char *etag);

struct s3_page {
	bool is_truncated;
	char *token; /* of the next page, decoded; owned */
	unsigned keys;
};

/*
 * A page of ListObjectsV2. -EPROTO when it is not one; page->token is to be freed in either case.
 */
int s3_xml_list(const char *text, size_t len, struct s3_page *page, s3_key_fn *fn, void *arg);

/* One failure in a DeleteResult. */
typedef void s3_undeleted_fn(void *arg, const char *key, const char *code, const char *message);

/* -EPROTO when it is no DeleteResult. */
int s3_xml_deleted(const char *text, size_t len, s3_undeleted_fn *fn, void *arg);

enum { S3_DELETE_MAX = 1000 };

/* The body that deletes prefix + name of each; the caller frees *out. -ENOMEM. */
int s3_xml_delete(const char *prefix, const struct obj *objs, unsigned n, char **out, size_t *len);

/* ---- client ---- */

struct s3;

enum s3_style { S3_STYLE_AUTO, S3_STYLE_PATH, S3_STYLE_VIRTUAL };

struct s3_conf {
	const struct s3_url *url;
	const char *key_file, *profile, *token, *region; /* NULL = not given */
	enum s3_style style;
	bool is_unsigned; /* payloads are not hashed; https only */
	struct http_conf http;
};

/* Finds keys, region and endpoint. Copies what it needs. */
CO_FN int s3_new(const struct s3_conf *conf, struct s3 **out, struct err *err);
/* As http_close_here, http_free. */
CO_FN void s3_close_here(struct s3 *s);
void s3_free(struct s3 *s);

struct s3_req {
	const char *method;
	const char *key;   /* raw, "" = the bucket itself */
	const char *query; /* encoded and sorted; NULL = none */
	bool has_range;
	uint64_t off, len; /* of the range; len > 0 */
	enum put_cond cond; /* PUT; GET: only PUT_IF_MATCH */
	const char *etag;   /* without quotes */
	/*
	 * Of a conditional PUT: the caller looks into a refusal, so that a second copy of the request does no harm,
	 * and a kept connection may be used (http_req.is_once).
	 */
	bool may_repeat;
	const char *md5;    /* Content-MD5; NULL = none */
	const struct iov *body, *into; /* as http_req */
	bool is_quiet; /* no log line about a failure: the caller makes a text of it */
};

struct s3_resp {
	struct http_resp http;
	struct s3_error error; /* of a status that is none of 2xx, and has a body */
};

/*
 * Signs, sends, and makes an errno of the answer: 0 for 2xx; -ENOENT no such object, -ENODEV no
 * such bucket; -EEXIST (PUT_IF_ABSENT) and -ESTALE (PUT_IF_MATCH, GET) for an unmet condition;
 * -ENOTSUP what the server has not; -ERANGE 416; -EACCES; -EREMCHG: the bucket lives elsewhere;
 * else as http_do and http_status_error. Failures other than those that answer a question are
 * logged. *not_before (may be NULL) is set when the server asks to wait. Always s3_resp_free().
 * struct s3_resp is too large for a fiber's stack: s3_resp_new().
 */
CO_FN int s3_do(struct s3 *s, const struct s3_req *req, struct s3_resp *resp, uint64_t *not_before);
/* What S3's own word for an error means, as s3_do; 0 = nothing beyond the status. */
int s3_code_error(const char *code);
struct s3_resp *s3_resp_new(void);
void s3_resp_free(struct s3_resp *resp);

/* Puts into words why a request failed, with the mend: "s3 http://host/bucket: ...". */
int s3_explain(const struct s3 *s, int rc, const struct s3_resp *resp, struct err *err);

/* "http://host:9000", "us-east-1", where the keys came from; borrowed. */
const char *s3_endpoint(const struct s3 *s);
const char *s3_bucket(const struct s3 *s);
const char *s3_region(const struct s3 *s);
const char *s3_key_source(const struct s3 *s);
bool s3_is_path_style(const struct s3 *s);
void s3_status(struct s3 *s, struct info *i);

#endif
