/* SPDX-License-Identifier: GPL-3.0-or-later */
#include "world.h"

#include <errno.h>
#include <inttypes.h>

#include "nbdrs/cleanup.h"

#define NS_PER_S UINT64_C(1000000000)

int world_enter(struct world *w, const char *text)
{
	struct err err = { "" };

	SIM_EXPECT(volume_open(&w->volume, text, &err) == 0, "%s", err.msg);
	w->c = volume_chan(&w->volume);
	return w->c != NULL ? 0 : -1;
}

int world_leave(struct world *w)
{
	return volume_close(&w->volume);
}

int world_write_with(struct world *w, unsigned fl)
{
	const uint64_t before = now_ns();
	uint64_t words[WORDS];
	struct iovec v;
	struct iov iov = iov_one(&v, words, BLOCK);
	int rc;

	for (unsigned k = 0; k < ARRAY_LEN(words); k++)
		words[k] = w->written + 1;
	rc = ch_write(w->c, (struct ext){ &obj_none, w->written % BLOCKS * BLOCK, BLOCK }, &iov,
		      fl);
	if (rc == 0)
		w->written++;
	w->longest = MAX(w->longest, now_ns() - before);
	return rc;
}

int world_write_next(struct world *w)
{
	return world_write_with(w, 0);
}

int world_check(struct world *w)
{
	uint64_t words[WORDS];

	for (uint64_t k = 0; k < BLOCKS; k++) {
		uint64_t want = k < w->written ? (w->written - 1 - k) / BLOCKS * BLOCKS + k + 1 : 0;

		SIM_EXPECT(read_block(w->c, k, words) == 0);
		for (unsigned i = 0; i < ARRAY_LEN(words); i++)
			SIM_EXPECT(words[i] == want,
				   "block %" PRIu64 " has %" PRIu64 ", not %" PRIu64, k, words[i],
				   want);
	}
	return 0;
}

/* What the store has without the cache. */
int world_check_store(const struct world *before)
{
	struct world w = { .written = before->written };
	int rc = world_enter(&w, DISK);

	if (rc == 0)
		rc = world_check(&w);
	SIM_EXPECT(world_leave(&w) == 0);
	return rc;
}

int world_come_back(struct world *w)
{
	sim_remote_fails(-ETIMEDOUT, 0, 0);
	for (unsigned i = 0; i < 10; i++)
		SIM_EXPECT((co_sleep(NS_PER_S), world_write_next(w)) == 0);
	SIM_EXPECT(ch_flush(w->c) == 0);
	SIM_EXPECT(world_leave(w) == 0, "it closes well");
	return world_check_store(w);
}

void world_fill_up(void *arg)
{
	struct world *w = arg;

	while (w->rc == 0 && w->written < FULL)
		w->rc = world_write_next(w);
	w->is_done = true;
}
