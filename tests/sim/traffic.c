/* SPDX-License-Identifier: GPL-3.0-or-later */
#include "traffic.h"

#include <errno.h>
#include <string.h>

#include "nbdrs/cleanup.h"

#define NS_PER_S UINT64_C(1000000000)

/* ---- a volume ---- */

int volume_build(struct volume *v, const char *text, const char *export, struct err *err)
{
	int rc;

	*v = (struct volume){ 0 };
	rc = spec_parse(text, &v->spec, err);
	return rc == 0 ? chain_build(v->spec, export, false, &v->chain, err) : rc;
}

void volume_free(struct volume *v)
{
	chain_free(v->chain);
	spec_free(v->spec);
	*v = (struct volume){ 0 };
}

int volume_open(struct volume *v, const char *text, struct err *err)
{
	int rc = volume_build(v, text, "disk0", err);

	if (rc == 0)
		rc = chain_open(v->chain, err);
	if (rc != 0)
		volume_free(v);
	return rc;
}

int volume_close(struct volume *v)
{
	int rc = chain_close(v->chain);

	volume_free(v);
	return rc;
}

int volume_create(const char *text, uint64_t size)
{
	struct volume v;
	struct err err = { "" };
	int rc = volume_build(&v, text, "disk0", &err);

	if (rc == 0)
		rc = chain_create(v.chain, size, false, &err);
	volume_free(&v);
	SIM_EXPECT(rc == 0, "%s", err.msg);
	return 0;
}

struct chan *volume_chan(const struct volume *v)
{
	int rc = 0;
	struct chan *c = chain_chan(v->chain, &rc);

	if (c == NULL)
		(void)sim_failed(__FILE__, __LINE__, "no channel: %d", rc);
	return c;
}

/* ---- traffic ---- */

int read_block(struct chan *c, uint64_t block, uint64_t *words)
{
	const struct ext e = { &obj_none, block * BLOCK, BLOCK };
	struct iovec v;
	struct iov iov = iov_one(&v, words, BLOCK);
	struct loan loan;

	if (sim_below(2) || ch_lend(c, e, &loan))
		return ch_read(c, e, &iov, 0);
	memcpy(words, loan.base, BLOCK);
	loan_return(&loan);
	return 0;
}

void weather(uint64_t until)
{
	static const int errors[] = { -EAGAIN, -ETIMEDOUT, -ECONNRESET, -ECONNREFUSED };
	static const uint32_t ppm[] = { 0, 200000, 1000000 };

	while (now_ns() < until) {
		const uint64_t ns = NS_PER_S * (10 + sim_below(590));

		sim_remote_fails(errors[sim_below(ARRAY_LEN(errors))],
				 ppm[sim_below(ARRAY_LEN(ppm))], now_ns() + ns);
		co_sleep(ns + NS_PER_S * sim_below(600));
	}
	sim_remote_fails(-EAGAIN, 0, 0);
}
