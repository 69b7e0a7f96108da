/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Where keys, region and endpoint of S3 come from: every source, their order, and what is wrong with
 * them.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/s3.h"

static bool same(const char *a, const char *b)
{
	return a && b ? strcmp(a, b) == 0 : a == b;
}

static char folder[256];

static const char *const variables[] = {
	"AWS_ACCESS_KEY_ID",   "AWS_SECRET_ACCESS_KEY",
	"AWS_SESSION_TOKEN",   "AWS_REGION",
	"AWS_DEFAULT_REGION",  "AWS_ENDPOINT_URL",
	"AWS_ENDPOINT_URL_S3", "AWS_PROFILE",
	"AWS_CONFIG_FILE",     "AWS_SHARED_CREDENTIALS_FILE",
};

static int keys_start(void **state)
{
	const char *tmp = getenv("TMPDIR");

	(void)snprintf(folder, sizeof(folder), "%s/nbdrs-s3-XXXXXX", tmp ? tmp : "/tmp");
	return mkdtemp(folder) ? 0 : -1;
}

static int keys_stop(void **state)
{
	return rmdir(folder);
}

/* Writes folder/name; "" = removes it. The path is static. */
static const char *file(const char *name, const char *text)
{
	static char path[300];
	FILE *f;

	(void)snprintf(path, sizeof(path), "%s/%s", folder, name);
	if (!*text) {
		(void)unlink(path); /* not there is fine */
		return path;
	}
	f = fopen(path, "w");
	assert_non_null(f);
	assert_true(fputs(text, f) >= 0);
	assert_int_equal(fclose(f), 0);
	return path;
}

struct source {
	const char *what;                                /* a name for failures */
	const char *target, *key_file, *profile, *token; /* key_file: its contents */
	const char *env[8];                              /* "NAME=VALUE" */
	const char *credentials, *config;                /* contents of the shared files */
	int rc;
	const char *word; /* in the error, or in source */
	const char *key, *secret, *session, *region, *endpoint;
};

static void set_up(const struct source *s)
{
	for (size_t i = 0; i < ARRAY_LEN(variables); i++)
		assert_int_equal(unsetenv(variables[i]), 0);
	assert_int_equal(setenv("HOME", "/nonexistent", 1), 0);
	assert_int_equal(setenv("AWS_SHARED_CREDENTIALS_FILE",
				file("credentials", s->credentials ? s->credentials : ""), 1),
			 0);
	if (!s->credentials)
		assert_int_equal(unsetenv("AWS_SHARED_CREDENTIALS_FILE"), 0);
	assert_int_equal(setenv("AWS_CONFIG_FILE", file("config", s->config ? s->config : ""), 1),
			 0);
	if (!s->config)
		assert_int_equal(unsetenv("AWS_CONFIG_FILE"), 0);
	for (size_t i = 0; i < ARRAY_LEN(s->env) && s->env[i]; i++) {
		const char *value = strchr(s->env[i], '=') + 1;
		_cleanup_free_ char *name = strndup(s->env[i], (size_t)(value - 1 - s->env[i]));

		assert_int_equal(setenv(name, value, 1), 0);
	}
}

static void check_source(const struct source *s)
{
	struct s3_config c = { .profile = s->profile, .token = s->token };
	struct err err = { "" };
	struct s3_url u;
	int rc;

	set_up(s);
	assert_int_equal(s3_url_parse(s->target ? s->target : "http://h/b", &u, &err), 0);
	if (s->key_file)
		c.key_file = file("keys", s->key_file);
	rc = s3_config_load(&c, &u, &err);
	if (rc != s->rc)
		fail_msg("%s: %d %s", s->what, rc, err.msg);
	if (strstr(err.msg, "S1KRIT"))
		fail_msg("%s: tells the secret: %s", s->what, err.msg);
	if (rc && !strstr(err.msg, s->word))
		fail_msg("%s: no \"%s\" in: %s", s->what, s->word, err.msg);
	if (!rc && (!same(c.creds.key, s->key) || !same(c.creds.secret, s->secret) ||
		    !same(c.creds.token, s->session) || !same(c.found_region, s->region) ||
		    !same(c.found_endpoint, s->endpoint)))
		fail_msg("%s: key %s secret %s token %s region %s endpoint %s", s->what,
			 c.creds.key, c.creds.secret, c.creds.token, c.found_region,
			 c.found_endpoint);
	if (!rc && s->word && !strstr(c.creds.source, s->word))
		fail_msg("%s: from %s", s->what, c.creds.source);
	if (!rc)
		s3_config_free(&c);
	s3_url_free(&u);
	(void)file("keys", "");
	(void)file("credentials", "");
	(void)file("config", "");
}

#define IN_ENV "AWS_ACCESS_KEY_ID=E", "AWS_SECRET_ACCESS_KEY=F"
#define SHARED                                                                                                \
	"# mine\n[default]\naws_access_key_id=D\naws_secret_access_key=S1KRIT\n"                              \
	"[ work ]\r\nAWS_ACCESS_KEY_ID = W:1 \r\naws_secret_access_key = a=b/c \r\naws_session_token=tok\r\n" \
	"[half]\naws_access_key_id = H\n[none]\n"

static void test_keys(void **state)
{
	static const struct source sources[] = {
		{ .what = "nowhere", .word = "nowhere" },
		{ .what = "URL first",
		  .target = "http://K%3A1:S@h/b",
		  .env = { IN_ENV, "AWS_SESSION_TOKEN=x" },
		  .credentials = SHARED,
		  .key = "K:1",
		  .secret = "S",
		  .word = "the URL" },
		{ .what = "URL and token",
		  .target = "http://K:S@h/b",
		  .token = "t",
		  .key = "K",
		  .secret = "S",
		  .session = "t" },
		{ .what = "environment",
		  .env = { IN_ENV },
		  .credentials = SHARED,
		  .key = "E",
		  .secret = "F",
		  .word = "environment" },
		{ .what = "session",
		  .env = { IN_ENV, "AWS_SESSION_TOKEN=T" },
		  .key = "E",
		  .secret = "F",
		  .session = "T" },
		{ .what = "empty variables",
		  .env = { "AWS_ACCESS_KEY_ID=", "AWS_SECRET_ACCESS_KEY=" } },
		{ .what = "half",
		  .env = { "AWS_ACCESS_KEY_ID=E" },
		  .rc = -EINVAL,
		  .word = "only the first" },
		{ .what = "other half",
		  .env = { "AWS_SECRET_ACCESS_KEY=S1KRIT" },
		  .rc = -EINVAL,
		  .word = "only the second" },
		{ .what = "line break",
		  .env = { "AWS_ACCESS_KEY_ID=E\nX: y", "AWS_SECRET_ACCESS_KEY=S1KRIT" },
		  .rc = -EINVAL,
		  .word = "control characters" },
		{ .what = "two lines",
		  .key_file = "a:b:c\n\n# note\n S1KRIT \n",
		  .env = { IN_ENV },
		  .key = "a:b:c",
		  .secret = "S1KRIT",
		  .word = "/keys" },
		{ .what = "three lines",
		  .key_file = "a\nb\nc\n",
		  .key = "a",
		  .secret = "b",
		  .session = "c" },
		{ .what = "one line", .key_file = "a:b", .key = "a", .secret = "b" },
		{ .what = "one line, ambiguous",
		  .key_file = "a:b:S1KRIT",
		  .rc = -EINVAL,
		  .word = "second" },
		{ .what = "one word", .key_file = "S1KRIT", .rc = -EINVAL, .word = "second" },
		{ .what = "empty key", .key_file = ":S1KRIT", .rc = -EINVAL, .word = "first line" },
		{ .what = "too many",
		  .key_file = "a\nb\nc\nS1KRIT",
		  .rc = -EINVAL,
		  .word = "third" },
		{ .what = "file of profiles",
		  .key_file = "\n" SHARED,
		  .profile = "work",
		  .key = "W:1",
		  .secret = "a=b/c",
		  .session = "tok",
		  .word = "profile work" },
		{ .what = "file without the profile",
		  .key_file = SHARED,
		  .profile = "x",
		  .rc = -EINVAL,
		  .word = "[x]" },
		{ .what = "file, profile without keys",
		  .key_file = SHARED,
		  .profile = "none",
		  .rc = -EINVAL,
		  .word = "no keys" },
		{ .what = "no file",
		  .target = "http://@/nonexistent/keys@h/b",
		  .rc = -ENOENT,
		  .word = "/nonexistent/keys" },
		{ .what = "a folder",
		  .target = "http://@/@h/b",
		  .rc = -EISDIR,
		  .word = "file of keys /" },
		{ .what = "URL and file",
		  .target = "http://K:S@h/b",
		  .key_file = "a\nb",
		  .rc = -EINVAL,
		  .word = "both" },
		{ .what = "two files",
		  .target = "http://@/x@h/b",
		  .key_file = "a\nb",
		  .rc = -EINVAL,
		  .word = "two files" },
		{ .what = "shared",
		  .credentials = SHARED,
		  .key = "D",
		  .secret = "S1KRIT",
		  .word = "profile default" },
		{ .what = "AWS_PROFILE",
		  .credentials = SHARED,
		  .env = { "AWS_PROFILE=work" },
		  .key = "W:1",
		  .secret = "a=b/c",
		  .session = "tok",
		  .word = "profile work" },
		{ .what = "profile before environment",
		  .credentials = SHARED,
		  .profile = "work",
		  .env = { IN_ENV },
		  .key = "W:1",
		  .secret = "a=b/c",
		  .session = "tok" },
		{ .what = "half a profile",
		  .credentials = SHARED,
		  .profile = "half",
		  .rc = -EINVAL,
		  .word = "aws_secret_access_key" },
		{ .what = "no such profile",
		  .credentials = SHARED,
		  .env = { "AWS_PROFILE=x" },
		  .rc = -ENOENT,
		  .word = "AWS_PROFILE" },
		{ .what = "profile without keys",
		  .credentials = SHARED,
		  .profile = "none",
		  .rc = -EINVAL,
		  .word = "environment" },
		{ .what = "named file missing",
		  .env = { "AWS_SHARED_CREDENTIALS_FILE=/nonexistent/c" },
		  .rc = -ENOENT,
		  .word = "AWS_SHARED_CREDENTIALS_FILE" },
		{ .what = "named file missing, not needed",
		  .env = { "AWS_SHARED_CREDENTIALS_FILE=/nonexistent/c", IN_ENV },
		  .key = "E",
		  .secret = "F" },
		{ .what = "config",
		  .credentials = "[work]\naws_access_key_id=A\naws_secret_access_key=B\n",
		  .config = "[default]\nregion=no\n[profile work]\nregion = eu-1\n"
			    "endpoint_url = http://e:1\ns3 =\n  region = x\n",
		  .profile = "work",
		  .target = "/b",
		  .key = "A",
		  .secret = "B",
		  .region = "eu-1",
		  .endpoint = "http://e:1" },
		{ .what = "config has the keys",
		  .config = "[default]\naws_access_key_id=A\naws_secret_access_key=B\nregion=r\n",
		  .key = "A",
		  .secret = "B",
		  .region = "r",
		  .word = "/config",
		  .endpoint = NULL },
		{ .what = "[work] is no profile of the config",
		  .config = "[work]\naws_access_key_id=A\naws_secret_access_key=B\n",
		  .env = { "AWS_PROFILE=work" },
		  .rc = -ENOENT,
		  .word = "work" },
		{ .what = "region",
		  .env = { "AWS_REGION=a", "AWS_DEFAULT_REGION=b" },
		  .config = "[default]\nregion=c\n",
		  .region = "a" },
		{ .what = "default region",
		  .env = { "AWS_DEFAULT_REGION=b" },
		  .config = "[default]\nregion=c\n",
		  .region = "b" },
		{ .what = "endpoints",
		  .target = "/b",
		  .env = { "AWS_ENDPOINT_URL=http://a", "AWS_ENDPOINT_URL_S3=http://b" },
		  .endpoint = "http://b" },
		{ .what = "endpoint",
		  .target = "/b",
		  .env = { "AWS_ENDPOINT_URL=http://a" },
		  .endpoint = "http://a" },
		{ .what = "endpoint of the URL",
		  .target = "http://h/b",
		  .env = { "AWS_ENDPOINT_URL=http://a" } },
	};

	for (size_t i = 0; i < ARRAY_LEN(sources); i++)
		check_source(&sources[i]);
}

int main(void)
{
	static const struct CMUnitTest tests[] = { cmocka_unit_test_setup_teardown(
		test_keys, keys_start, keys_stop) };

	return cmocka_run_group_tests(tests, NULL, NULL);
}
