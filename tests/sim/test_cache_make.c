/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer cache: a volume is made where the folder has unsaved data of a former one of its name. It must
 * never be played over the new one, nor lost unless somebody said so.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "world.h"

#define NS_PER_S UINT64_C(1000000000)
#define NEVER    UINT64_MAX
#define SIZE     ((uint64_t)BLOCKS * BLOCK)
#define BELOW    "sharded:remote[name=x]"
#define ABOVE    CACHE("") BELOW
#define NEW      "cache[disk=/disk/new,size=2Mi,mode=writeback]:" BELOW
#define INSIDE   "sharded:" CACHE("") "remote[name=x]"

enum { SOME = 100 }; /* blocks */

static CO_FN int make(const char *text, uint64_t size, bool force, struct err *err)
{
	struct volume v;
	int rc = volume_build(&v, text, "disk0", err);

	if (!rc)
		rc = chain_create(v.chain, size, force, err);
	volume_free(&v);
	return rc;
}

static CO_FN int remove_below(void)
{
	struct volume v;
	struct err err = { "" };
	int rc = volume_build(&v, BELOW, "disk0", &err);

	if (!rc)
		rc = chain_destroy(v.chain, &err);
	volume_free(&v);
	SIM_EXPECT(rc == 0, "%s", err.msg);
	return 0;
}

/* Makes the volume and leaves SOME blocks of it in the journal alone. */
static CO_FN int leave_some(struct world *w, const char *text)
{
	if (volume_create(text, SIZE) || world_enter(w, text))
		return -1;
	sim_remote_fails(-EACCES, 1000000, NEVER);
	while (w->written < SOME)
		SIM_EXPECT(world_write_next(w) == 0);
	SIM_EXPECT(world_leave(w) == 0, "the journal has it");
	sim_remote_fails(-EACCES, 0, 0);
	return 0;
}

static CO_FN bool has_journal(void)
{
	const int fd = io_openat(AT_FDCWD, "/disk/c/journal-000001", O_RDONLY, 0);

	if (fd >= 0)
		(void)io_close(fd); /* only looked at */
	return fd >= 0;
}

static CO_FN int expect_refused(const char *text, uint64_t size, bool force, int rc,
				const char *message)
{
	struct err err = { "" };

	SIM_EXPECT(make(text, size, force, &err) == rc && strstr(err.msg, message), "%s", err.msg);
	SIM_EXPECT(strstr(err.msg, "/disk/c"), "it is named: %s", err.msg);
	SIM_EXPECT(has_journal());
	return 0;
}

/* All of it is there, and gets below. */
static CO_FN int expect_all(struct world *w, const char *text)
{
	if (world_enter(w, text) || world_check(w))
		return -1;
	SIM_EXPECT(world_leave(w) == 0);
	if (world_enter(w, BELOW) || world_check(w))
		return -1;
	SIM_EXPECT(world_leave(w) == 0);
	return 0;
}

static CO_FN int expect_empty(const char *text)
{
	struct world w = { 0 };

	return expect_all(&w, text);
}

/* A volume of that size is left as it is, with its journal; so it may be made at each start. */
static CO_FN int there(void *model)
{
	struct world w = { 0 };
	struct err err = { "" };

	if (leave_some(&w, ABOVE))
		return -1;
	SIM_EXPECT(make(ABOVE, SIZE, false, &err) == 0 && make(ABOVE, SIZE, true, &err) == 0, "%s",
		   err.msg);
	SIM_EXPECT(has_journal());
	return expect_all(&w, ABOVE);
}

/* Another size keeps its data, and without what is unsaved it would be torn. */
static CO_FN int another_size(void *model)
{
	struct world w = { 0 };
	struct err err = { "" };

	if (leave_some(&w, ABOVE) ||
	    expect_refused(ABOVE, 2 * SIZE, false, -EEXIST, "unsaved data") ||
	    expect_refused(ABOVE, 2 * SIZE, true, -EEXIST, "keeps its data") ||
	    expect_refused(ABOVE, SIZE / 2, true, -EEXIST, "keeps its data") ||
	    expect_all(&w, ABOVE))
		return -1;
	/* Now it is saved. */
	SIM_EXPECT(make(ABOVE, 2 * SIZE, true, &err) == 0, "%s", err.msg);
	return expect_all(&w, ABOVE);
}

/* The volume is not there any more: what the journal has is nobody's. */
static CO_FN int gone(void *model)
{
	struct world w = { 0 };
	struct err err = { "" };

	if (leave_some(&w, ABOVE) || remove_below() ||
	    expect_refused(ABOVE, SIZE, false, -EEXIST, "former volume"))
		return -1;
	SIM_EXPECT(make(ABOVE, SIZE, true, &err) == 0, "%s", err.msg);
	SIM_EXPECT(!has_journal());
	if (expect_empty(ABOVE))
		return -1;
	/* Neither a volume nor a folder. */
	if (remove_below())
		return -1;
	SIM_EXPECT(make(NEW, SIZE, false, &err) == 0, "%s", err.msg);
	return expect_empty(NEW);
}

/* Whatever is said, another volume's stays; so does all of it when the new one cannot be made. */
static CO_FN int stays(void *model)
{
	struct world w = { 0 };

	if (leave_some(&w, ABOVE) ||
	    expect_refused(CACHE(",volume=z") BELOW, SIZE, true, -EBUSY,
			   "another volume, sharded:remote (disk0)") ||
	    expect_refused(CACHE(",volume=z") BELOW, SIZE, false, -EBUSY, "another volume"))
		return -1;
	sim_remote_fails(-EACCES, 1000000, NEVER);
	if (expect_refused(ABOVE, SIZE, true, -EACCES, "unsaved data") ||
	    expect_refused(ABOVE, SIZE, false, -EACCES, "unsaved data"))
		return -1;
	sim_remote_fails(-EACCES, 0, 0);
	return expect_all(&w, ABOVE);
}

/* Below the mapping the journal is a part of the store, and is seen and changed like it. */
static CO_FN int inside(void *model)
{
	struct world w = { 0 };
	struct err err = { "" };

	if (leave_some(&w, INSIDE))
		return -1;
	SIM_EXPECT(make(INSIDE, SIZE, false, &err) == 0 && make(INSIDE, 2 * SIZE, true, &err) == 0,
		   "%s", err.msg);
	if (expect_all(&w, INSIDE) || remove_below())
		return -1;
	w = (struct world){ 0 };
	if (leave_some(&w, INSIDE) || remove_below())
		return -1;
	SIM_EXPECT(make(INSIDE, SIZE, false, &err) == -EEXIST && strstr(err.msg, "block-N"), "%s",
		   err.msg);
	SIM_EXPECT(make(INSIDE, SIZE, true, &err) == 0, "%s", err.msg);
	return expect_empty(INSIDE);
}

/* Cut off anywhere, there is no new volume with an old journal; doing it again mends it. */
static CO_FN int cut_off(void *model)
{
	struct world w = { 0 };
	struct err err = { "" };
	bool *has_begun = model;

	if (leave_some(&w, ABOVE) || remove_below())
		return -1;
	*has_begun = true;
	SIM_EXPECT(make(ABOVE, SIZE, true, &err) == 0, "%s", err.msg);
	return 0;
}

static CO_FN int done_again(void *model)
{
	const bool *has_begun = model;
	struct volume v;
	struct err err = { "" };
	int rc;

	if (!*has_begun)
		return 0; /* cut off before it began */
	rc = volume_open(&v, BELOW, &err);
	if (!rc) {
		SIM_EXPECT(volume_close(&v) == 0);
		if (expect_empty(ABOVE))
			return -1;
	}
	SIM_EXPECT(rc == 0 || rc == -ENOENT, "%s", err.msg);
	SIM_EXPECT(make(ABOVE, SIZE, true, &err) == 0, "%s", err.msg);
	return expect_empty(ABOVE);
}

static const struct sim_case cases[] = {
	{ .name = "there", .scenario = there, .seeds = 3 },
	{ .name = "another-size", .scenario = another_size, .seeds = 3 },
	{ .name = "gone", .scenario = gone, .seeds = 3 },
	{ .name = "stays", .scenario = stays, .seeds = 3 },
	{ .name = "inside", .scenario = inside, .seeds = 3 },
	{ .name = "cut-off",
	  .scenario = cut_off,
	  .recover = done_again,
	  .model_len = sizeof(bool),
	  .crash = SIM_ANY_CRASH,
	  .seeds = 100 },
};

int main(int argc, char **argv)
{
	return sim_main(argc, argv, cases, ARRAY_LEN(cases));
}
