/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Sends signed requests and makes errno of the answers. What to do about them is decided above
 * (layer retry), but for two things that only this file can mend, once per request:
 *
 *	the server finds our clock wrong	its Date gives the difference, which is kept for all later requests
 *	a session's keys have expired		their sources are read again
 *
 * One client serves all reactors: settings never change after s3_new(); keys are replaced whole,
 * and the old ones kept until the end, because a request may be using them; the cached signing keys
 * are per reactor.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "client/s3_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"
#include "nbdrs/log.h"

enum {
	SKEW_MAX_S = 300, /* a server bears 15 minutes; below 5 the clock is not the trouble */
	RETRY_AFTER_MAX_S = 60,
	HASH_INLINE_LEN = 32 * 1024, /* 30 us with SHA instructions in the CPU, 200 us without */
	HEADERS_MAX = S3_SIGNED_MAX + 2,
};

#define NS_PER_S UINT64_C(1000000000)

static const char empty_hash[] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/* A request in the making. On the heap: it is larger than a fiber's frame may be. */
struct call {
	struct http_header
		headers[HEADERS_MAX]; /* host first, which is signed but not listed for http_do */
	unsigned headers_n;
	char hash[S3_HASH_LEN + 1];
	char date[S3_DATE_LEN + 1];
	char range[64];
	char auth[S3_AUTH_MAX];
	time_t signed_at;
	const char *path; /* the canonical one: a part of the URL, by itself */
	char url[];
};

struct s3_resp *s3_resp_new(void)
{
	return calloc(1, sizeof(struct s3_resp));
}

void s3_resp_free(struct s3_resp *resp)
{
	if (!resp)
		return;
	http_resp_free(&resp->http);
	free(resp);
}

/* ---- making a request ---- */

/* Appends a text, NUL and all; returns where the NUL is. */
static char *append(char *out, const char *text)
{
	size_t len = strlen(text);

	memcpy(out, text, len + 1);
	return out + len;
}

static struct call *call_new(const struct s3 *s, const struct s3_req *req)
{
	const char *query = req->query ? req->query : "";
	size_t key_len = strlen(req->key), path_room = strlen(s->root) + 3 * key_len + 1;
	size_t url_room = strlen(s->base) + path_room + strlen(query) + 1;
	struct call *c = calloc(1, sizeof(*c) + url_room + path_room);
	char *path, *end;

	if (!c)
		return NULL;
	path = c->url + url_room;
	c->path = path;
	(void)s3_encode(req->key, key_len, true, append(path, s->root));
	end = append(append(c->url, s->base), path);
	if (*query)
		(void)append(append(end, "?"), query);
	return c;
}

static void add_header(struct call *c, const char *name, const char *value)
{
	c->headers[c->headers_n++] = (struct http_header){ name, value };
}

static void add_headers(struct call *c, const struct s3 *s, const struct s3_creds *creds,
			const struct s3_req *req)
{
	add_header(c, "host", s->host);
	if (req->has_range) {
		(void)snprintf(c->range, sizeof(c->range), "bytes=%" PRIu64 "-%" PRIu64, req->off,
			       req->off + req->len - 1);
		add_header(c, "range", c->range);
	}
	/* Without quotes: Ceph compares the text, Amazon takes both. */
	if (req->cond == PUT_IF_MATCH)
		add_header(c, "if-match", req->etag);
	else if (req->cond == PUT_IF_ABSENT)
		add_header(c, "if-none-match", "*");
	if (req->md5)
		add_header(c, "content-md5", req->md5);
	if (!creds->key)
		return;
	add_header(c, "x-amz-content-sha256", c->hash);
	add_header(c, "x-amz-date", c->date);
	if (creds->token)
		add_header(c, "x-amz-security-token", creds->token);
}

struct hash_job {
	const struct iov *iov;
	char *out;
};

static int hash_job(void *arg)
{
	const struct hash_job *job = arg;

	return s3_hash(job->iov, job->out);
}

static CO_FN int hash_body(const struct s3 *s, const struct iov *body, char *out)
{
	struct hash_job job = { body, out };

	if (!body || body->len == 0) {
		memcpy(out, empty_hash, sizeof(empty_hash));
		return 0;
	}
	if (s->is_unsigned) {
		(void)snprintf(out, S3_HASH_LEN + 1, "UNSIGNED-PAYLOAD");
		return 0;
	}
	return body->len <= HASH_INLINE_LEN ? hash_job(&job) : offload(hash_job, &job);
}

/* Date, headers and signature; the body's hash is there. Again for each attempt. */
static int sign_call(struct s3 *s, struct call *c, const struct s3_creds *creds,
		     const struct s3_req *req)
{
	struct s3_to_sign what = {
		.method = req->method,
		.path = c->path,
		.query = req->query ? req->query : "",
		.headers = c->headers,
		.payload = c->hash,
		.region = s->region,
		.service = "s3",
		.date = c->date,
	};
	int rc;

	c->headers_n = 0;
	c->signed_at = time(NULL) + (time_t)atomic_load_explicit(&s->skew_s, memory_order_relaxed);
	s3_date(c->signed_at, c->date);
	add_headers(c, s, creds, req);
	if (!creds->key)
		return 0;
	what.headers_n = c->headers_n;
	rc = s3_sign(&s->signers[reactor_index(reactor_self())], creds, &what, c->auth,
		     sizeof(c->auth));
	if (!rc)
		add_header(c, "authorization", c->auth);
	return rc;
}

/* ---- judging an answer ---- */

static bool is_one_of(const char *code, const char *const *list)
{
	for (; *list; list++) {
		if (strcmp(*list, code) == 0)
			return true;
	}
	return false;
}

int s3_code_error(const char *code)
{
	static const char *const later[] = { "SlowDown",
					     "RequestTimeout",
					     "InternalError",
					     "OperationAborted",
					     "ServiceUnavailable",
					     "Throttling",
					     "ThrottlingException",
					     "RequestLimitExceeded",
					     "BandwidthLimitExceeded",
					     NULL };
	/* The body was altered or cut on its way. */
	static const char *const altered[] = { "BadDigest", "XAmzContentSHA256Mismatch",
					       "IncompleteBody", NULL };
	static const char *const full[] = { "QuotaExceeded", "EntityTooLarge", NULL };
	static const char *const elsewhere[] = { "PermanentRedirect",
						 "TemporaryRedirect",
						 "IllegalLocationConstraint",
						 "IllegalLocationConstraintException",
						 "AuthorizationHeaderMalformed",
						 NULL };
	static const char *const refused[] = { "InvalidAccessKeyId",
					       "SignatureDoesNotMatch",
					       "ExpiredToken",
					       "InvalidToken",
					       "TokenRefreshRequired",
					       "RequestTimeTooSkewed",
					       NULL };

	if (is_one_of(code, later))
		return -EAGAIN;
	if (is_one_of(code, altered))
		return -EPROTO;
	if (is_one_of(code, full))
		return -ENOSPC;
	if (is_one_of(code, elsewhere))
		return -EREMCHG;
	if (is_one_of(code, refused))
		return -EACCES;
	if (strcmp(code, "NoSuchBucket") == 0)
		return -ENODEV;
	return strcmp(code, "NotImplemented") == 0 ? -ENOTSUP : 0;
}

static int answer_error(const struct s3_req *req, const struct s3_resp *resp)
{
	int status = resp->http.status, rc = s3_code_error(resp->error.code);

	if (status >= 200 && status < 300)
		return 0;
	if (rc)
		return rc;
	switch (status) {
	case 404: return req->cond == PUT_IF_MATCH ? -ESTALE : -ENOENT;
	case 409:
	case 412:
		return req->cond == PUT_IF_ABSENT  ? -EEXIST
		       : req->cond == PUT_IF_MATCH ? -ESTALE
						   : -EAGAIN;
	case 416: return -ERANGE;
	case 301:
	case 307:
	case 308: return -EREMCHG;
	case 405:
	case 501: return -ENOTSUP;
	case 507: return -ENOSPC;
	default: return http_status_error(status);
	}
}

/* Answers to questions; not worth a line. */
static bool is_expected(int rc)
{
	return rc == -ENOENT || rc == -EEXIST || rc == -ESTALE || rc == -ERANGE;
}

static void log_failure(struct s3 *s, const struct s3_req *req, const struct s3_resp *resp, int rc)
{
	unsigned suppressed;

	if (rc == 0 || req->is_quiet || is_expected(rc) || !log_gate_open(&s->log, &suppressed))
		return;
	log_warn(
		"s3 request failed endpoint=%s bucket=%s verb=%s object=%s status=%d code=%s error=%s reason=\"%s\" "
		"suppressed=%u",
		s->endpoint, s->bucket, req->method, req->key, resp->http.status,
		resp->error.code[0] ? resp->error.code : "-", err_name(rc),
		resp->http.status ? resp->error.message : resp->http.error, suppressed);
}

/* ---- clocks ---- */

/* Takes over the server's clock if it is the reason of the refusal. True: try again. */
static bool mend_clock(struct s3 *s, const struct call *c, const struct s3_resp *resp)
{
	bool is_told = strcmp(resp->error.code, "RequestTimeTooSkewed") == 0;
	int64_t off = resp->http.date - (int64_t)c->signed_at;
	unsigned suppressed;

	/* An answer to HEAD has no body to tell the reason. */
	if (!is_told && !(resp->http.status == 403 && resp->error.code[0] == '\0'))
		return false;
	if (resp->http.date == 0 || (off >= -SKEW_MAX_S && off <= SKEW_MAX_S))
		return false;
	atomic_store_explicit(&s->skew_s, resp->http.date - (int64_t)time(NULL),
			      memory_order_relaxed);
	if (log_gate_open(&s->skew_log, &suppressed))
		log_warn(
			"s3 clocks differ: requests are signed with the server's time from now on endpoint=%s "
			"seconds=%" PRId64,
			s->endpoint, resp->http.date - (int64_t)time(NULL));
	return true;
}

/* ---- sending ---- */

static bool is_expired(const struct s3_resp *resp, const struct s3_creds *creds)
{
	static const char *const codes[] = { "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
					     "InvalidAccessKeyId", NULL };

	if (is_one_of(resp->error.code, codes))
		return true;
	return creds->token && !resp->error.code[0] &&
	       (resp->http.status == 400 || resp->http.status == 403);
}

static void count(_Atomic uint64_t *counter, uint64_t by)
{
	atomic_fetch_add_explicit(counter, by, memory_order_relaxed);
}

static CO_FN int send_once(struct s3 *s, struct call *c, const struct s3_creds *creds,
			   const struct s3_req *req, struct s3_resp *resp)
{
	struct http_req http = {
		.method = req->method,
		.url = c->url,
		.body = req->body,
		.into = req->into,
		/* Sent twice, the second would be refused because of the first. */
		.is_once = req->body && req->cond != PUT_ALWAYS && !req->may_repeat,
	};
	int rc = sign_call(s, c, creds, req);

	if (rc)
		return rc;
	http.headers = c->headers + 1; /* without host */
	http.headers_n = c->headers_n - 1;
	memset(&resp->error, 0, sizeof(resp->error));
	rc = http_do(s->http, &http, &resp->http);
	count(&s->received, resp->http.body_len);
	if (req->body)
		count(&s->sent, req->body->len);
	if (rc)
		return rc;
	if (resp->http.status < 200 || resp->http.status > 299)
		s3_xml_error(resp->http.text, resp->http.text_len, &resp->error);
	return answer_error(req, resp);
}

static CO_FN int send_call(struct s3 *s, struct call *c, const struct s3_req *req,
			   struct s3_resp *resp)
{
	const struct s3_creds *creds = &atomic_load(&s->keys)->creds;
	int rc = hash_body(s, req->body, c->hash);

	if (!rc)
		rc = send_once(s, c, creds, req, resp);
	if (!rc || !resp->http.status || !creds->key)
		return rc;
	if (mend_clock(s, c, resp)) {
		http_resp_free(&resp->http);
		rc = send_once(s, c, creds, req, resp);
	} else if (is_expired(resp, creds) && s3_renew(s, creds)) {
		http_resp_free(&resp->http);
		rc = send_once(s, c, &atomic_load(&s->keys)->creds, req, resp);
	}
	return rc;
}

int s3_do(struct s3 *s, const struct s3_req *req, struct s3_resp *resp, uint64_t *not_before)
{
	struct call *c = call_new(s, req);
	int rc;

	if (!c)
		return -ENOMEM;
	rc = send_call(s, c, req, resp);
	free(c);
	if (rc == -EAGAIN && not_before && resp->http.retry_after_ns)
		*not_before =
			now_ns() + MIN(resp->http.retry_after_ns, RETRY_AFTER_MAX_S * NS_PER_S);
	log_failure(s, req, resp, rc);
	return rc;
}
