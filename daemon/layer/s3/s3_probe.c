/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What layer s3 finds out about a bucket before it uses it: whether it may, and whether conditional
 * puts work. Servers that do not know If-None-Match or If-Match answer 501, or take the put and ignore
 * the condition: only trying tells.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "layer/s3/s3_guard.h"
#include "layer/s3/s3_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/log.h"

enum { QUERY_MAX = 3 * S3_KEY_MAX + 128 };

/* s3_insist, with a failure put into words. */
static CO_FN int ask(struct s3 *s3, const struct s3_req *req, struct s3_resp *resp, struct err *err)
{
	int rc = s3_insist(s3, req, resp, NULL);

	return rc ? s3_explain(s3, rc, resp, err) : 0;
}

/*
 * Lists one object below the prefix: shows whether address, keys, bucket, region and clock are
 * right.
 */
int s3_check_access(struct s3_self *self, struct err *err)
{
	struct s3_resp *resp = s3_resp_new();
	_cleanup_free_ char *query = malloc(QUERY_MAX);
	struct s3_req req = { .method = "GET", .key = "", .query = query, .is_quiet = true };
	int at, rc;

	if (!resp || !query) {
		s3_resp_free(resp);
		return err_set(err, -ENOMEM, "out of memory");
	}
	at = snprintf(query, QUERY_MAX,
		      "delimiter=%%2F&encoding-type=url&list-type=2&max-keys=1&prefix=");
	(void)s3_encode(self->prefix, strlen(self->prefix), false, query + at);
	rc = ask(self->s3, &req, resp, err);
	if (!rc) {
		struct s3_error e;

		s3_xml_error(resp->http.text, resp->http.text_len, &e);
		if (e.code[0] || !resp->http.text || !strstr(resp->http.text, "ListBucketResult"))
			rc = err_set(
				err, -EPROTO,
				"s3 %s: what answers there is no S3 server; look at host and port",
				s3_endpoint(self->s3));
	}
	s3_resp_free(resp);
	return rc;
}

/* One put of the probe's object. */
static CO_FN int probe_put(struct s3_self *self, const char *key, enum put_cond cond,
			   const char *etag, char *new_etag, struct err *err)
{
	struct s3_resp *resp = s3_resp_new();
	struct iovec v;
	char body[] = "nbdrs";
	struct iov iov = iov_one(&v, body, sizeof(body) - 1);
	struct s3_req req = { .method = "PUT",
			      .key = key,
			      .cond = cond,
			      .etag = etag,
			      .body = &iov,
			      .is_quiet = true };
	int rc;

	if (!resp)
		return err_set(err, -ENOMEM, "out of memory");
	rc = ask(self->s3, &req, resp, err);
	if (!rc && new_etag)
		(void)snprintf(new_etag, ETAG_MAX + 1, "%.*s", ETAG_MAX, resp->http.etag);
	s3_resp_free(resp);
	return rc;
}

/* The ETag of the probe's object. */
static CO_FN int probe_etag(struct s3_self *self, const char *key, char *etag, struct err *err)
{
	struct s3_resp *resp = s3_resp_new();
	struct s3_req req = { .method = "HEAD", .key = key, .is_quiet = true };
	int rc;

	if (!resp)
		return err_set(err, -ENOMEM, "out of memory");
	rc = ask(self->s3, &req, resp, err);
	if (!rc)
		(void)snprintf(etag, ETAG_MAX + 1, "%.*s", ETAG_MAX, resp->http.etag);
	s3_resp_free(resp);
	return rc;
}

/*
 * 0 = conditions work, -ENOTSUP = they do not (*why says how), else a failure. The object may be
 * there afterwards. `etag` ("", ETAG_MAX + 1 bytes) becomes one that the server gives.
 */
static CO_FN int probe_steps(struct s3_self *self, const char *key, char *etag, const char **why,
			     struct err *err)
{
	int rc = probe_put(self, key, PUT_IF_ABSENT, NULL, etag, err);

	*why = "refused";
	/* The name is random: it can only be there because an answer was lost. */
	if (rc == -EEXIST)
		rc = probe_etag(self, key, etag, err);
	if (rc)
		return rc;
	rc = probe_put(self, key, PUT_IF_ABSENT, NULL, NULL, err);
	if (rc == 0) {
		*why = "ignored";
		return -ENOTSUP;
	}
	if (rc != -EEXIST)
		return rc;
	rc = probe_put(self, key, PUT_IF_MATCH, "00000000000000000000000000000000", NULL, err);
	if (rc == 0) {
		*why = "ignored (If-Match)";
		return -ENOTSUP;
	}
	if (rc != -ESTALE)
		return rc;
	/* An unmet one is seen; a met one must be, too. */
	rc = etag[0] ? probe_put(self, key, PUT_IF_MATCH, etag, NULL, err) : 0;
	if (rc == -ESTALE) {
		/* Perhaps by itself, if the answer was lost. */
		rc = probe_etag(self, key, etag, err);
		if (!rc)
			rc = probe_put(self, key, PUT_IF_MATCH, etag, NULL, err);
	}
	*why = "refused (If-Match)";
	return rc == -ESTALE ? -ENOTSUP : rc;
}

static CO_FN void probe_clean(struct s3_self *self, const char *key)
{
	struct s3_resp *resp = s3_resp_new();
	struct s3_req req = { .method = "DELETE", .key = key };

	/* Left behind it does no harm: its name is none of a volume's. s3_do logs the failure. */
	if (resp)
		(void)s3_insist(self->s3, &req, resp, NULL);
	s3_resp_free(resp);
}

int s3_probe(struct layer *l, struct err *err)
{
	struct s3_self *self = l->self;
	char key[S3_KEY_MAX + 1], etag[ETAG_MAX + 1] = "";
	const char *why;
	uint64_t random;
	int rc;

	if (getrandom(&random, sizeof(random), 0) != sizeof(random))
		return err_set(err, -errno, "layer s3: no random numbers");
	(void)snprintf(key, sizeof(key), "%s.nbdrs-probe-%016" PRIx64, self->prefix, random);
	rc = probe_steps(self, key, etag, &why, err);
	if (rc == -EACCES || rc == -EROFS)
		return err_prefix(
			err, rc,
			"may not write below \"%s\" (serve it read-only, or get the right to it)",
			self->prefix);
	probe_clean(self, key);
	if (rc && rc != -ENOTSUP && rc != -EINVAL)
		return rc;
	if (!rc) {
		l->caps |= CAN_PUT_IF;
		if (s3_guard_open(self, etag) != 0)
			return err_set(err, -ENOMEM, "out of memory");
	}
	log_info("s3 conditional puts are %s endpoint=%s prefix=%s", rc ? why : "atomic",
		 s3_endpoint(self->s3), self->prefix);
	return 0;
}
