/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Why a request failed, in words, with the mend; and what an operator asks of a client. Never a
 * key.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "client/s3_int.h"
#include "nbdrs/cleanup.h"

/* What an error code of S3 means to who set this up. */
static const struct {
	const char *code, *text;
} codes[] = {
	{ "InvalidAccessKeyId", "the server does not know this access key; look at the key" },
	{ "SignatureDoesNotMatch",
	  "the secret does not belong to this access key; look at the secret (in a URL \"/\" is "
	  "written %2F, \"%\" is %25, \"@\" is %40)" },
	{ "ExpiredToken", "the session's keys have expired; get new ones" },
	{ "InvalidToken", "the session token is not valid; get new keys" },
	{ "TokenRefreshRequired", "the session's keys have expired; get new ones" },
	{ "RequestTimeTooSkewed",
	  "the clocks of this machine and the server differ too much; set them" },
	{ "AccessDenied", "access denied; these keys lack the right to it" },
	{ "AllAccessDisabled", "all access to this bucket is disabled" },
	{ "AccountProblem", "there is a problem with the account" },
	{ "UserSuspended", "this user is suspended" },
	{ "InvalidBucketName", "this is no valid name for a bucket" },
	{ "QuotaExceeded", "the quota is used up" },
	{ "SlowDown", "the server is overloaded; try later" },
	{ "NotImplemented", "the server lacks a function that is needed" },
	{ "XAmzContentSHA256Mismatch", "the data was altered on its way" },
};

static const char *code_text(const char *code)
{
	for (unsigned i = 0; i < ARRAY_LEN(codes); i++) {
		if (strcmp(codes[i].code, code) == 0)
			return codes[i].text;
	}
	return NULL;
}

/* There was no response. */
static int explain_transport(const struct s3 *s, int rc, const struct s3_resp *resp,
			     struct err *err)
{
	const char *why = resp->http.error[0] ? resp->http.error : err_name(rc);

	switch (rc) {
	case -ECONNREFUSED:
		return err_set(err, rc,
			       "nobody listens there (%s); is the server up, and the port right?",
			       why);
	case -EHOSTUNREACH:
	case -ENETUNREACH:
		return err_set(
			err, rc,
			"no such host, or no way there (%s); look at the name and the network%s",
			why,
			s->is_default_endpoint
				? " (nobody named an endpoint, so it is Amazon's; another one "
				  "goes into the URL or AWS_ENDPOINT_URL)"
				: "");
	case -ETIMEDOUT:
		return err_set(
			err, rc,
			"no answer in time (%s); look at the address and the network, or give a longer "
			"timeout=",
			why);
	case -EKEYREJECTED:
		return err_set(
			err, rc,
			"the server's certificate is not trusted (%s); name its authority by ca_file=, "
			"or switch verification off by insecure",
			why);
	case -ECONNRESET:
	case -EPROTO:
		return err_set(
			err, rc,
			"the connection broke or did not speak %s (%s); look at scheme and port",
			s->is_https ? "https" : "http", why);
	default: return err_set(err, rc, "%s (%s)", err_name(rc), why);
	}
}

static int explain_elsewhere(const struct s3 *s, int rc, const struct s3_resp *resp,
			     struct err *err)
{
	const char *region = resp->http.region[0] ? resp->http.region : resp->error.region;

	if (region[0] && strcmp(region, s->region) != 0)
		return err_set(
			err, rc,
			"the bucket is in region %s, not %s; give s3[region=%s] and that region's endpoint",
			region, s->region, region);
	if (resp->error.code[0])
		return err_set(
			err, rc,
			"wrong region %s for this bucket (%s: %s); give the right one by s3[region=...]",
			s->region, resp->error.code, resp->error.message);
	return err_set(
		err, rc,
		"the server sends us elsewhere (status %d, location \"%s\"); use that address",
		resp->http.status, resp->http.location);
}

static int explain_answer(const struct s3 *s, int rc, const struct s3_resp *resp, struct err *err)
{
	const struct s3_error *e = &resp->error;
	const char *text = code_text(e->code);
	bool is_anonymous = !atomic_load(&((struct s3 *)s)->keys)->creds.key;

	if (rc == -EREMCHG)
		return explain_elsewhere(s, rc, resp, err);
	if (rc == -ENODEV)
		return err_set(err, rc, "there is no such bucket; make it, or look at the name");
	if (rc == -EACCES && is_anonymous)
		return err_set(
			err, rc,
			"access denied, and no keys were found; put them into the URL (KEY:SECRET@host), "
			"a file (key_file=), AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
			"~/.aws/credentials");
	if (rc == -EACCES)
		return err_set(err, rc, "%s (keys from %s; status %d %s)",
			       text ? text : "access denied; look at the keys and their rights",
			       s3_key_source(s), resp->http.status, e->code);
	if (text)
		return err_set(err, rc, "%s (status %d %s)", text, resp->http.status, e->code);
	if (e->code[0])
		return err_set(err, rc, "status %d %s: %s", resp->http.status, e->code, e->message);
	if (rc == -EAGAIN)
		return err_set(err, rc,
			       "the server is out of order or overloaded (status %d); try later",
			       resp->http.status);
	return err_set(err, rc, "status %d, and not in S3's words; is this an S3 endpoint?",
		       resp->http.status);
}

int s3_explain(const struct s3 *s, int rc, const struct s3_resp *resp, struct err *err)
{
	if (resp->http.status == 0)
		(void)explain_transport(s, rc, resp, err);
	else
		(void)explain_answer(s, rc, resp, err);
	return err_prefix(err, rc, "s3 %s, bucket %s", s->endpoint, s->bucket);
}

void s3_status(struct s3 *s, struct info *i)
{
	const int64_t skew = atomic_load_explicit(&s->skew_s, memory_order_relaxed);
	char behind[24];

	i->add(i, "endpoint", s->endpoint);
	i->add(i, "bucket", s->bucket);
	i->add(i, "keys_from", s3_key_source(s));
	http_show_counts(s->http, i);
	info_number(i, "bytes_sent", atomic_load_explicit(&s->sent, memory_order_relaxed));
	info_number(i, "bytes_received", atomic_load_explicit(&s->received, memory_order_relaxed));
	if (skew == 0)
		return;
	(void)snprintf(behind, sizeof(behind), "%" PRId64, skew);
	i->add(i, "clock_behind_s", behind);
}
