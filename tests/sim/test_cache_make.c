/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer cache: a volume is made where the folder has unsaved data of a former one of its name, or was made
 * by somebody who did not look. It must never be played over the new one, nor lost unless somebody said so.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "layer/cache/cache_journal.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/identity.h"
#include "world.h"

#define NS_PER_S UINT64_C(1000000000)
#define NEVER    UINT64_MAX
#define SIZE     ((uint64_t)BLOCKS * BLOCK)
#define BELOW    "sharded:remote[name=x]"
#define ABOVE    CACHE("") BELOW
#define NEW      "cache[disk=/disk/new,size=2Mi,mode=writeback]:" BELOW
#define INSIDE   "sharded:" CACHE("") "remote[name=x]"
#define NAMED    CACHE(",volume=v") BELOW
#define REMOTELY CACHE(",durability=remote") BELOW
#define FORMER   "00000000000000aa"
#define LATER    "00000000000000bb"

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

/* As `init` would; NULL: it has no identity any more. */
static CO_FN int identify(const char *identity)
{
	struct err err = { "" };
	struct volume v;
	struct chan *store;
	struct obj obj;
	struct iovec vec;
	struct iov iov = iov_one(&vec, (void *)(uintptr_t)identity, IDENTITY_LEN);
	struct put p = { .obj = &obj, .iov = &iov, .cond = PUT_ALWAYS };

	SIM_EXPECT(volume_open(&v, BELOW, &err) == 0, "%s", err.msg);
	SIM_EXPECT(layer_chan_open(chain_top(v.chain)->kids[0], &store) == 0);
	(void)obj_set(&obj, IDENTITY_OBJECT);
	SIM_EXPECT((identity ? ch_put(store, &p, NULL) : ch_del(store, &obj, 1)) == 0);
	layer_chan_close(store);
	SIM_EXPECT(volume_close(&v) == 0);
	return 0;
}

/* Makes the volume and leaves SOME blocks of it in the journal alone. `identity` NULL: it has none. */
static CO_FN int leave_some_of(struct world *w, const char *text, const char *identity)
{
	int rc;

	if (volume_create(text, SIZE) || identify(identity) || world_enter(w, text))
		return -1;
	sim_remote_fails(-EACCES, 1000000, NEVER);
	while (w->written < SOME)
		SIM_EXPECT(world_write_next(w) == 0);
	rc = world_leave(w);
	SIM_EXPECT(rc == (strcmp(text, REMOTELY) == 0 ? -EACCES : 0), "the journal has it: %d", rc);
	sim_remote_fails(-EACCES, 0, 0);
	return 0;
}

static CO_FN int leave_some(struct world *w, const char *text)
{
	return leave_some_of(w, text, NULL);
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

/* --- Made anew without its cache in the chain --------------------------------------------------- */

static CO_FN int expect_former(const char *text, bool is_ro)
{
	struct volume v = { NULL, NULL };
	struct err err = { "" };

	SIM_EXPECT(spec_parse(text, &v.spec, &err) == 0 &&
			   chain_build(v.spec, "disk0", is_ro, &v.chain, &err) == 0,
		   "%s", err.msg);
	SIM_EXPECT(chain_open(v.chain, &err) == -EBUSY, "%s: %s", text, err.msg);
	SIM_EXPECT(strstr(err.msg, "/disk/c has unsaved data, up to ") &&
			   strstr(err.msg, "a former volume of this name") &&
			   strstr(err.msg, "move the folder away"),
		   "%s", err.msg);
	SIM_EXPECT(strstr(err.msg, FORMER) && strstr(err.msg, LATER), "%s", err.msg);
	volume_free(&v);
	return 0;
}

/* Some of one in the journal of `text`, and another one with a few blocks in the store. */
static CO_FN int make_two(struct world *former, struct world *later, const char *text)
{
	*former = *later = (struct world){ 0 };
	if (leave_some_of(former, text, FORMER) || identify(NULL) || remove_below() ||
	    volume_create(BELOW, SIZE) || identify(LATER) || world_enter(later, BELOW))
		return -1;
	while (later->written < 3)
		SIM_EXPECT(world_write_next(later) == 0);
	SIM_EXPECT(world_leave(later) == 0);
	return 0;
}

/* Refused, whoever asks, and nothing is changed: neither this one nor, if it was the same one, that. */
static CO_FN int made_again_over(const char *text)
{
	struct world former, later, none = { 0 };
	struct err err = { "" };

	if (make_two(&former, &later, text) || expect_former(text, false) ||
	    expect_former(text, true) || expect_all(&later, BELOW) ||
	    expect_refused(text, SIZE, false, -EEXIST, "former volume"))
		return -1;
	if (identify(FORMER) || expect_all(&former, text) || remove_below())
		return -1;
	if (make_two(&former, &later, text))
		return -1;
	SIM_EXPECT(make(text, SIZE, true, &err) == 0, "%s", err.msg);
	SIM_EXPECT(has_journal() == (strcmp(text, INSIDE) == 0), "there it is a new one");
	if (expect_all(&later, text) || remove_below())
		return -1;
	/* Another size. */
	if (make_two(&former, &later, text) ||
	    expect_refused(text, 2 * SIZE, false, -EEXIST, "former volume"))
		return -1;
	SIM_EXPECT(make(text, 2 * SIZE, true, &err) == 0, "%s", err.msg);
	if (expect_all(&later, text) || remove_below())
		return -1;
	SIM_EXPECT(make(text, SIZE, false, &err) == 0, "%s", err.msg);
	return expect_all(&none, text) || remove_below() ? -1 : 0;
}

static CO_FN int made_again(void *model)
{
	return made_again_over(ABOVE) || made_again_over(NAMED) || made_again_over(REMOTELY) ? -1
											     : 0;
}

static CO_FN int made_again_inside(void *model)
{
	return made_again_over(INSIDE);
}

/* It can be removed with what its folder has of the former one. */
static CO_FN int removed_with_it(void *model)
{
	struct world former, later;
	struct err err = { "" };
	struct volume v;

	if (make_two(&former, &later, ABOVE))
		return -1;
	SIM_EXPECT(volume_build(&v, ABOVE, "disk0", &err) == 0, "%s", err.msg);
	SIM_EXPECT(chain_destroy(v.chain, &err) == 0, "%s", err.msg);
	volume_free(&v);
	SIM_EXPECT(!has_journal());
	SIM_EXPECT(make(ABOVE, SIZE, false, &err) == 0, "%s", err.msg);
	return expect_empty(ABOVE);
}

/* Where one of the two is not known the name is all there is, as in journals of an older release. */
static CO_FN int not_known(void *model)
{
	static const char *const texts[] = { ABOVE, INSIDE };
	static const char *const was[] = { NULL, FORMER, FORMER };
	static const char *const is[] = { LATER, NULL, FORMER };

	for (unsigned i = 0; i < ARRAY_LEN(texts) * ARRAY_LEN(was); i++) {
		const unsigned k = i % ARRAY_LEN(was);
		struct world w = { 0 };

		if (leave_some_of(&w, texts[i / ARRAY_LEN(was)], was[k]) || identify(is[k]) ||
		    expect_all(&w, texts[i / ARRAY_LEN(was)]) || identify(NULL) || remove_below())
			return -1;
	}
	return 0;
}

/* As somebody would who puts files of two folders together. */
static CO_FN int relabel(const char *path, const char *identity)
{
	const int fd = io_openat(AT_FDCWD, path, O_RDWR, 0);
	uint8_t bytes[SEGMENT_HEADS];
	struct iovec v = { bytes, sizeof(bytes) };
	struct segment_head h;

	SIM_EXPECT(fd >= 0 && io_pread_full(fd, &v, 1, 0) == 0, "%s", path);
	SIM_EXPECT(segment_head_read(bytes, &h) == HEAD_GOOD, "%s", path);
	(void)snprintf(h.identity, sizeof(h.identity), "%s", identity);
	segment_head_write(bytes, &h, h.volume);
	v = (struct iovec){ bytes, sizeof(bytes) };
	SIM_EXPECT(io_pwrite_full(fd, &v, 1, 0, 0) == 0 && io_fsync(fd) == 0, "%s", path);
	(void)io_close(fd); /* it is synced */
	return 0;
}

/* Of two volumes one at least is not this one, even if nobody knows which. */
static CO_FN int of_two(void *model)
{
	struct world w = { 0 };
	struct err err = { "" };

	if (leave_some_of(&w, ABOVE, FORMER) || relabel("/disk/c/journal-000002", LATER) ||
	    expect_former(ABOVE, false) || identify(LATER) || expect_former(ABOVE, false) ||
	    identify(NULL) || expect_former(ABOVE, false) ||
	    expect_refused(ABOVE, SIZE, false, -EEXIST, "former volume"))
		return -1;
	/* Some of it may be an older release's. */
	if (relabel("/disk/c/journal-000002", "") || identify(LATER) ||
	    expect_former(ABOVE, false) || identify(FORMER) || expect_all(&w, ABOVE) ||
	    remove_below())
		return -1;
	w = (struct world){ 0 };
	if (leave_some_of(&w, ABOVE, FORMER) || relabel("/disk/c/journal-000002", LATER) ||
	    identify(NULL))
		return -1;
	SIM_EXPECT(make(ABOVE, SIZE, true, &err) == 0, "%s", err.msg);
	SIM_EXPECT(!has_journal());
	if (world_enter(&w, ABOVE))
		return -1;
	SIM_EXPECT(world_leave(&w) == 0);
	return 0;
}

/* Who cannot find out does not begin, and nothing is lost by that. */
static CO_FN int cannot_tell(void *model)
{
	struct world w = { 0 };
	struct volume v;
	struct err err = { "" };

	if (leave_some_of(&w, INSIDE, FORMER))
		return -1;
	sim_remote_fails(-ETIMEDOUT, 1000000, NEVER);
	SIM_EXPECT(volume_open(&v, INSIDE, &err) == -ETIMEDOUT, "%s", err.msg);
	SIM_EXPECT(strstr(err.msg, "layer cache: which volume it is cannot be read"), "%s",
		   err.msg);
	sim_remote_fails(-ETIMEDOUT, 0, 0);
	SIM_EXPECT(has_journal());
	return expect_all(&w, INSIDE);
}

struct cut {
	bool has_begun;
	struct world later;
};

/* Cut off where the former one's journal goes: it is there or not, and this one is as it was. */
static CO_FN int cut_off_again(void *model)
{
	struct cut *cut = model;
	struct world former;
	struct err err = { "" };

	if (make_two(&former, &cut->later, ABOVE))
		return -1;
	cut->has_begun = true;
	SIM_EXPECT(make(ABOVE, SIZE, true, &err) == 0, "%s", err.msg);
	return 0;
}

static CO_FN int kept(void *model)
{
	const struct cut *cut = model;
	struct world w = { .written = cut->later.written };
	struct volume v;
	struct err err = { "" };
	int rc;

	if (!cut->has_begun)
		return 0; /* cut off before it began */
	rc = volume_open(&v, ABOVE, &err);
	SIM_EXPECT(rc == 0 || rc == -EBUSY, "%s", err.msg);
	if (!rc)
		SIM_EXPECT(volume_close(&v) == 0);
	SIM_EXPECT(make(ABOVE, SIZE, true, &err) == 0, "%s", err.msg);
	return expect_all(&w, ABOVE);
}

static const struct sim_case cases[] = {
	{ .name = "made-again", .scenario = made_again, .seeds = 3 },
	{ .name = "made-again-inside", .scenario = made_again_inside, .seeds = 3 },
	{ .name = "removed-with-it", .scenario = removed_with_it, .seeds = 3 },
	{ .name = "not-known", .scenario = not_known, .seeds = 3 },
	{ .name = "of-two", .scenario = of_two, .seeds = 3 },
	{ .name = "cannot-tell", .scenario = cannot_tell, .seeds = 3 },
	{ .name = "cut-off-again",
	  .scenario = cut_off_again,
	  .recover = kept,
	  .model_len = sizeof(struct cut),
	  .crash = SIM_ANY_CRASH,
	  .seeds = 50 },
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
