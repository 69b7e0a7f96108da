/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the tests of the cache's clean data on disk share, see tiered.h.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "tiered.h"

#include <stdlib.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"

void tiered_check(const char *text, uint64_t size, int (*fn)(void *run))
{
	const struct conform what = {
		.text = text, .size = size, .is_volume = true, .in_memory = true
	};

	conform_must(&what, fn);
}

uint64_t tiered_below(struct run *r)
{
	return run_ops(r, 1, CH_READ);
}

int tiered_reopen(struct run *r)
{
	return run_shut(r) || run_reopen(r, false) ? -1 : 0;
}

/* What left memory is on disk: these reads come faster than any client's. */
int tiered_settle(struct run *r)
{
	const uint64_t deadline = now_ns() + UINT64_C(20000000000);

	while (run_status(r, "tier_queued") + 1 > 1) { /* none: UINT64_MAX */
		EXPECT(r, now_ns() < deadline, "it is never written");
		co_yield();
	}
	return 0;
}

int tiered_fill(struct run *r)
{
	for (uint64_t off = 0; off < r->what->size; off += 256 * KI)
		if (run_write(r, off, 256 * KI, 0, 1) || tiered_settle(r))
			return -1;
	return 0;
}

int tiered_other(struct run *r, const char *form, struct tiered_other *o)
{
	_cleanup_free_ char *text = conform_expand(form, r->folder);
	struct err err = { "" };
	int rc;

	*o = (struct tiered_other){ NULL, NULL };
	EXPECT(r, text, "out of memory");
	rc = spec_parse(text, &o->spec, &err);
	if (!rc)
		rc = chain_build(o->spec, "disk0", false, &o->chain, &err);
	EXPECT(r, rc == 0, "%s", err.msg);
	return 0;
}

void tiered_other_free(struct tiered_other *o)
{
	chain_free(o->chain);
	spec_free(o->spec);
}
