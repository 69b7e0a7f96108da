/* SPDX-License-Identifier: GPL-3.0-or-later */
#include "s3_trial.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/log.h"

struct s3_fake *fake;

int trial_start(void **state)
{
	fake = s3_fake_start();
	return 0;
}

int trial_stop(void **state)
{
	s3_fake_stop(fake);
	return 0;
}

void trial_open(struct trial *t, const char *options, const char *keys, const char *path,
		const char *name, bool is_ro)
{
	char text[CHAIN_MAX];

	*t = (struct trial){ .rc = 0 };
	(void)snprintf(text, sizeof(text), "%ss3%s:http://%s127.0.0.1:%d/b/%s", name ? "raw:" : "",
		       options, keys, fake->port, path);
	t->rc = spec_parse(text, &t->spec, &t->err);
	EXPECT(t->rc == 0);
	t->rc = name ? chain_build(t->spec, name, is_ro, &t->chain, &t->err)
		     : chain_build_keyed(t->spec, is_ro, &t->chain, &t->err);
	if (t->rc == 0)
		t->rc = chain_open(t->chain, &t->err);
	if (t->rc == 0)
		t->c = chain_chan(t->chain, &t->rc);
	if (strstr(t->err.msg, FAKE_SECRET))
		EXPECT(!"the secret is in an error");
}

void trial_open_store(struct trial *t)
{
	trial_open(t, "[timeout=10s]", FAKE_KEY ":" FAKE_SECRET "@", "p/", NULL, false);
	EXPECT(t->rc == 0);
}

void trial_open_quiet(struct trial *t)
{
	trial_open(t, "[timeout=10s,probe=off]", FAKE_KEY ":" FAKE_SECRET "@", "p/", NULL, false);
	EXPECT(t->rc == 0);
}

void trial_close(struct trial *t)
{
	if (t->chain) {
		EXPECT(chain_close(t->chain) == 0);
		chain_free(t->chain);
	}
	spec_free(t->spec);
}

struct obj trial_obj(const char *name)
{
	struct obj o = { 0 };

	EXPECT(obj_set(&o, name) == 0);
	return o;
}

int trial_put(struct trial *t, const char *name, const char *data, enum put_cond cond,
	      const char *etag, struct obj_stat *st)
{
	struct obj o = trial_obj(name);
	struct iovec v = { (char *)(uintptr_t)data, strlen(data) };
	struct iov iov = { &v, 1, strlen(data) };
	struct put p = { .obj = &o, .iov = &iov, .cond = cond, .etag = etag };

	return ch_put(t->c, &p, st);
}

int trial_get(struct trial *t, const char *name, uint64_t off, char *buf, size_t len)
{
	struct obj o = name[0] ? trial_obj(name) : obj_none;
	struct iovec v;
	struct iov iov = iov_one(&v, buf, len);

	return ch_read(t->c, (struct ext){ &o, off, len }, &iov, 0);
}

void trial_force(unsigned n, const char *method, int status, const char *headers, const char *body)
{
	s3_fake_force(fake, n, method, status, headers, body);
}

void trial_body(void **state)
{
	core_run(*state, NULL);
}

int trial_start_all(void **state)
{
	static const char *const variables[] = { "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
						 "AWS_SESSION_TOKEN", "AWS_PROFILE",
						 "AWS_CONFIG_FILE",   "AWS_SHARED_CREDENTIALS_FILE",
						 "AWS_REGION",        "AWS_DEFAULT_REGION" };

	for (size_t i = 0; i < ARRAY_LEN(variables); i++)
		(void)unsetenv(variables[i]);
	(void)setenv("HOME", "/nonexistent", 1);
	log_set_level(LOG_LEVEL_ERROR); /* provoked warnings are no news */
	return core_start(state);
}
