/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Makes an S3 client: finds endpoint, region, keys and the form of URLs. Nothing is sent.
 *
 * Region: the option; else the one that an Amazon endpoint names; else the environment's, the
 * profile's, us-east-1.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/s3_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"

enum { RENEW_PAUSE_S = 30 };

/* ---- keys ---- */

struct load_job {
	struct s3_config *config;
	const struct s3_url *url;
	struct err *err;
};

static int load_job(void *arg)
{
	const struct load_job *job = arg;

	return s3_config_load(job->config, job->url, job->err);
}

/* Puts new keys in front; takes them over. */
static int push_keys(struct s3 *s, struct s3_creds *creds)
{
	struct s3_keys *keys = calloc(1, sizeof(*keys));

	if (!keys)
		return -ENOMEM;
	keys->creds = *creds;
	*creds = (struct s3_creds){ 0 };
	keys->older = atomic_load(&s->keys);
	/*
	 * Sequentially consistent: who loads the pointer sees what it points to. Only `renewing`'s
	 * holder stores.
	 */
	atomic_store(&s->keys, keys);
	return 0;
}

static bool is_same(const char *a, const char *b)
{
	return a && b ? strcmp(a, b) == 0 : a == b;
}

bool s3_renew(struct s3 *s, const struct s3_creds *used)
{
	const struct s3_creds *now;
	bool is_other;

	co_mutex_lock(&s->renewing);
	now = &atomic_load(&s->keys)->creds;
	if (now == used &&
	    (!s->renewed_ns || now_ns() - s->renewed_ns > RENEW_PAUSE_S * UINT64_C(1000000000))) {
		struct s3_config config = { .key_file = s->key_file,
					    .profile = s->profile,
					    .token = s->token };
		struct load_job job = { &config, &s->url, NULL };

		s->renewed_ns = now_ns();
		if (offload(load_job, &job) == 0) {
			const struct s3_creds *found = &config.creds;

			if (found->key &&
			    !(is_same(found->key, used->key) &&
			      is_same(found->secret, used->secret) &&
			      is_same(found->token, used->token)) &&
			    push_keys(s, &config.creds) == 0)
				log_info("s3 keys were read again endpoint=%s from=\"%s\"",
					 s->endpoint, s3_key_source(s));
			s3_config_free(&config);
		}
	}
	is_other = &atomic_load(&s->keys)->creds != used;
	co_mutex_unlock(&s->renewing);
	return is_other;
}

/* ---- endpoint and region ---- */

static char *join(const char *a, const char *b, const char *c)
{
	char *text;

	return asprintf(&text, "%s%s%s", a, b, c) < 0 ? NULL : text;
}

/* The region in "s3.REGION.amazonaws.com" or "s3.dualstack.REGION.amazonaws.com"; "" = none. */
static void region_of_host(const char *host, char *out, size_t room)
{
	const char *p = host, *end;

	out[0] = '\0';
	if (s3_wants_path_style(host) || strncmp(p, "s3.", 3) != 0)
		return;
	p += 3;
	if (strncmp(p, "dualstack.", 10) == 0)
		p += 10;
	end = strstr(p, ".amazonaws.com");
	if (end && end > p && !memchr(p, '.', (size_t)(end - p)))
		(void)snprintf(out, room, "%.*s", (int)(end - p), p);
}

static int choose_region(struct s3 *s, const struct s3_conf *conf, const struct s3_config *config,
			 const char *host, struct err *err)
{
	char of_host[S3_REGION_MAX + 1];
	const char *region = conf->region;

	region_of_host(host ? host : "", of_host, sizeof(of_host));
	if (!region && of_host[0])
		region = of_host;
	if (!region)
		region = config->found_region ? config->found_region : "us-east-1";
	if (!*region || strlen(region) > S3_REGION_MAX ||
	    strspn(region, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._") !=
		    strlen(region))
		return err_set(err, -EINVAL,
			       "s3: \"%s\" can't be the name of a region; one is us-east-1",
			       region);
	(void)snprintf(s->region, sizeof(s->region), "%s", region);
	return 0;
}

/* Of the target, the environment, or Amazon's in that region. */
static int choose_endpoint(struct s3 *s, const struct s3_conf *conf, const struct s3_config *config,
			   char **scheme, char **host, struct err *err)
{
	const struct s3_url *u = conf->url;
	int rc;

	if (u->host) {
		*scheme = strdup(u->scheme);
		*host = strdup(u->host);
	} else if (config->found_endpoint) {
		rc = s3_endpoint_parse(config->found_endpoint, config->endpoint_source, scheme,
				       host, err);
		if (rc)
			return rc;
	}
	rc = choose_region(s, conf, config, *host, err);
	if (rc)
		return rc;
	if (!u->host && !config->found_endpoint) {
		bool is_china = strncmp(s->region, "cn-", 3) == 0;

		s->is_default_endpoint = true;
		*scheme = strdup("https");
		*host = join("s3.", s->region, is_china ? ".amazonaws.com.cn" : ".amazonaws.com");
	}
	return *scheme && *host ? 0 : err_set(err, -ENOMEM, "out of memory");
}

static int choose_style(struct s3 *s, const struct s3_conf *conf, const char *host, struct err *err)
{
	bool fits = s3_bucket_fits_host(s->bucket, s->is_https);

	s->is_path_style = conf->style == S3_STYLE_PATH ||
			   (conf->style == S3_STYLE_AUTO && (s3_wants_path_style(host) || !fits));
	if (conf->style == S3_STYLE_VIRTUAL && !fits)
		return err_set(err, -EINVAL,
			       "s3: bucket \"%s\" can't be a part of a host's name; use style=path",
			       s->bucket);
	return 0;
}

static int choose_form(struct s3 *s, const struct s3_conf *conf, const char *scheme,
		       const char *host, struct err *err)
{
	char bucket[3 * 255 + 1];
	int rc;

	s->is_https = strcmp(scheme, "https") == 0;
	s->is_unsigned = conf->is_unsigned;
	if (s->is_unsigned && !s->is_https)
		return err_set(
			err, -EINVAL,
			"s3: payload=unsigned leaves the data to TLS to protect; over http leave it out");
	rc = choose_style(s, conf, host, err);
	if (rc)
		return rc;
	(void)s3_encode(s->bucket, strlen(s->bucket), false, bucket);
	s->endpoint = join(scheme, "://", host);
	s->host = s->is_path_style ? strdup(host) : join(s->bucket, ".", host);
	s->base = s->host ? join(scheme, "://", s->host) : NULL;
	s->root = s->is_path_style ? join("/", bucket, "/") : strdup("/");
	return s->endpoint && s->base && s->root ? 0 : err_set(err, -ENOMEM, "out of memory");
}

/* ---- the client ---- */

static char *copy(const char *text)
{
	return text ? strdup(text) : NULL;
}

/* What s3_renew needs to find the keys' sources again. */
static int keep_sources(struct s3 *s, const struct s3_conf *conf)
{
	const struct s3_url *u = conf->url;

	s->url.host = copy(u->host);
	s->url.key = copy(u->key);
	s->url.secret = copy(u->secret);
	s->url.key_file = copy(u->key_file);
	s->key_file = copy(conf->key_file);
	s->profile = copy(conf->profile);
	s->token = copy(conf->token);
	s->bucket = copy(u->bucket);
	return (u->host && !s->url.host) || (u->key && !s->url.key) ||
			       (u->secret && !s->url.secret) || (u->key_file && !s->url.key_file) ||
			       (conf->key_file && !s->key_file) || (conf->profile && !s->profile) ||
			       (conf->token && !s->token) || !s->bucket
		       ? -ENOMEM
		       : 0;
}

static int fill(struct s3 *s, const struct s3_conf *conf, struct s3_config *config, struct err *err)
{
	_cleanup_free_ char *scheme = NULL, *host = NULL;
	int rc;

	if (keep_sources(s, conf) != 0 || push_keys(s, &config->creds) != 0)
		return err_set(err, -ENOMEM, "out of memory");
	rc = choose_endpoint(s, conf, config, &scheme, &host, err);
	if (!rc)
		rc = choose_form(s, conf, scheme, host, err);
	if (!rc)
		rc = http_new(&conf->http, &s->http, err);
	return rc;
}

int s3_new(const struct s3_conf *conf, struct s3 **out, struct err *err)
{
	struct s3_config config = { .key_file = conf->key_file,
				    .profile = conf->profile,
				    .token = conf->token };
	struct load_job job = { &config, conf->url, err };
	struct s3 *s = calloc(1, sizeof(*s));
	int rc;

	if (!s)
		return err_set(err, -ENOMEM, "out of memory");
	co_mutex_init(&s->renewing);
	rc = offload(load_job, &job);
	if (!rc) {
		rc = fill(s, conf, &config, err);
		s3_config_free(&config);
	}
	if (rc)
		s3_free(s);
	else
		*out = s;
	return rc;
}

void s3_close_here(struct s3 *s)
{
	http_close_here(s->http);
}

void s3_free(struct s3 *s)
{
	if (!s)
		return;
	http_free(s->http);
	for (struct s3_keys *k = atomic_load(&s->keys), *older; k; k = older) {
		older = k->older;
		s3_creds_free(&k->creds);
		free(k);
	}
	s3_url_free(&s->url);
	free(s->endpoint);
	free(s->bucket);
	free(s->base);
	free(s->host);
	free(s->root);
	free(s->key_file);
	free(s->profile);
	if (s->token)
		explicit_bzero(s->token, strlen(s->token));
	free(s->token);
	explicit_bzero(s->signers, sizeof(s->signers));
	co_mutex_destroy(&s->renewing);
	free(s);
}

const char *s3_endpoint(const struct s3 *s)
{
	return s->endpoint;
}

const char *s3_bucket(const struct s3 *s)
{
	return s->bucket;
}

const char *s3_region(const struct s3 *s)
{
	return s->region;
}

const char *s3_key_source(const struct s3 *s)
{
	return atomic_load(&((struct s3 *)s)->keys)->creds.source;
}

bool s3_is_path_style(const struct s3 *s)
{
	return s->is_path_style;
}
