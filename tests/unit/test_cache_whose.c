/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Layer cache, its folder: another volume's data, or a former one's of the same name, is never taken for
 * this one's; one daemon has it.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "nbdrs/identity.h"
#include "tiered.h"

/* --- Whose it is ------------------------------------------------------------------------------ */

#define OTHER "cache[disk=@/c,size=8Mi,mem=1Mi]:raw:file:@/other.img"

/* Another volume in the folder sees nothing of this one, and its end leaves this one's files alone. */
static CO_FN int another_volume(void *arg)
{
	struct run *r = arg;
	struct err err = { "" };
	struct tiered_other o;
	char path[320], buf[4096];
	struct iovec v;
	struct iov iov = iov_one(&v, buf, sizeof(buf));
	int rc = 0;

	if (tiered_fill(r) || run_shut(r))
		return -1;
	(void)snprintf(path, sizeof(path), "%s/c/tier-index", r->folder);
	if (tiered_other(r, OTHER, &o))
		return -1;
	EXPECT(r, chain_create(o.chain, SIZE, false, &err) == 0, "%s", err.msg);
	EXPECT(r, chain_destroy(o.chain, &err) == 0, "%s", err.msg);
	EXPECT(r, access(path, F_OK) == 0, "they are not that volume's");
	EXPECT(r, chain_create(o.chain, SIZE, false, &err) == 0, "%s", err.msg);
	EXPECT(r, chain_open(o.chain, &err) == 0, "%s", err.msg);
	for (uint64_t off = 0; off < SIZE && !rc; off += sizeof(buf)) {
		rc = ch_read(chain_chan(o.chain, &rc), (struct ext){ &obj_none, off, sizeof(buf) },
			     &iov, 0);
		EXPECT(r, !rc && iov_is_zero(&iov), "it is empty: %d", rc);
	}
	EXPECT(r, chain_close(o.chain) == 0, "close");
	if (run_reopen(r, false) || run_check_all(r))
		return -1;
	EXPECT(r, run_status(r, "tier_hits") == 0, "that one's: %" PRIu64,
	       run_status(r, "tier_hits"));
	if (run_shut(r))
		return -1;
	EXPECT(r, chain_destroy(o.chain, &err) == 0, "%s", err.msg);
	tiered_other_free(&o);
	return run_reopen(r, false);
}

static void test_another_volume(void **state)
{
	tiered_check(TIERED FILE_BELOW, SIZE, another_volume);
}

/* Removed and made again by somebody without a cache: the same place, another identity. */
static CO_FN int made_again(void *arg)
{
	struct run *r = arg;
	struct err err = { "" };
	struct tiered_other o;
	char was[IDENTITY_LEN + 1];

	if (run_shut(r) || tiered_other(r, "sharded[size=256Ki]:file:@/vol/", &o))
		return -1;
	EXPECT(r, identity_make(o.chain, false, &err) == 0, "%s", err.msg);
	if (run_reopen(r, false) || tiered_fill(r) || tiered_reopen(r) || run_check_all(r))
		return -1;
	EXPECT(r, run_status(r, "tier_hits") == UINT64_MAX, "the top is sharded");
	EXPECT(r, run_ops(r, 2, CH_READ) <= 2, "it is used: %" PRIu64, run_ops(r, 2, CH_READ));
	if (run_shut(r))
		return -1;
	EXPECT(r, identity_remove(o.chain, was, &err) == 0, "%s", err.msg);
	EXPECT(r, chain_destroy(o.chain, &err) == 0, "%s", err.msg);
	EXPECT(r, chain_create(o.chain, SIZE, false, &err) == 0, "%s", err.msg);
	EXPECT(r, identity_make(o.chain, false, &err) == 0, "%s", err.msg);
	memset(r->model, 0, SIZE);
	if (run_reopen(r, false) || run_check_all(r) || run_shut(r))
		return -1;
	EXPECT(r, identity_remove(o.chain, was, &err) == 0, "%s", err.msg);
	tiered_other_free(&o);
	return run_reopen(r, false);
}

static void test_made_again(void **state)
{
	tiered_check("sharded[size=256Ki]:cache[disk=@/c,size=8Mi,mem=1Mi]:file:@/vol/", SIZE,
		     made_again);
}

/* Nothing says that the disk is the one it was: it may have got another's name, or be empty. */
static CO_FN int nameless(void *arg)
{
	struct run *r = arg;
	char path[320];

	(void)snprintf(path, sizeof(path), "%s/disk.img", r->folder);
	if (tiered_fill(r) || run_check_all(r) || run_shut(r))
		return -1;
	EXPECT(r, truncate(path, 0) == 0 && truncate(path, SIZE) == 0, "%s", path);
	memset(r->model, 0, SIZE);
	return run_reopen(r, false) || run_check_all(r) ? -1 : 0;
}

static void test_nameless(void **state)
{
	tiered_check(NAMELESS FILE_BELOW, SIZE, nameless);
}

/* Made anew through the same chain: whoever it is said to be, it is empty. */
static CO_FN int made_anew(void *arg)
{
	struct run *r = arg;
	struct err err = { "" };
	struct tiered_other o;

	if (tiered_fill(r) || run_check_all(r) || run_shut(r) || tiered_other(r, r->what->text, &o))
		return -1;
	EXPECT(r, chain_create(o.chain, SIZE, true, &err) == 0, "%s", err.msg);
	tiered_other_free(&o);
	memset(r->model, 0, SIZE);
	return run_reopen(r, false) || run_check_all(r) ? -1 : 0;
}

static void test_made_anew(void **state)
{
	tiered_check(TIERED FILE_BELOW, SIZE, made_anew);
}

#define UNSAVED                                                                \
	"cache[disk=@/c,volume=v,size=8Mi,journal=2Mi,mode=writeback,lag=1h]:" \
	"fault[ops=write,count=1,error=EPERM]:" FILE_BELOW

/* The write below fails at its end. */
static CO_FN void shut_unsaved(struct run *r)
{
	(void)chain_close(r->chain);
	chain_free(r->chain);
	r->chain = NULL;
}

/* Leaves data in the journal, with the chain shut. */
static CO_FN int leave_unsaved(struct run *r)
{
	EXPECT(r, run_write(r, 0, 4096, 0, 1) == 0 && ch_flush(run_chan(r)) == 0, "write");
	shut_unsaved(r);
	return 0;
}

/* Nor is a journal's unsaved data the new one's: it goes when that is said, and only then. */
static CO_FN int unsaved(void *arg)
{
	struct run *r = arg;
	struct err err = { "" };
	char path[320];
	struct tiered_other o;

	(void)snprintf(path, sizeof(path), "%s/c", r->folder);
	if (leave_unsaved(r) || tiered_other(r, r->what->text, &o))
		return -1;
	EXPECT(r, chain_create(o.chain, SIZE, false, &err) == 0, "%s", err.msg);
	EXPECT(r, chain_create(o.chain, 2 * SIZE, false, &err) == -EEXIST, "%s", err.msg);
	EXPECT(r, strstr(err.msg, path) && strstr(err.msg, "or say --force"), "%s", err.msg);
	if (run_reopen(r, false) || run_check_all(r))
		return -1;
	EXPECT(r, chain_create(o.chain, SIZE, true, &err) == -EBUSY, "it is served: %s", err.msg);
	shut_unsaved(r);
	EXPECT(r, chain_create(o.chain, SIZE, true, &err) == 0, "%s", err.msg);
	tiered_other_free(&o);
	memset(r->model, 0, SIZE);
	return run_reopen(r, false) || run_check_all(r) ? -1 : 0;
}

static void test_unsaved(void **state)
{
	tiered_check(UNSAVED, SIZE, unsaved);
}

/* Opened for a write of one byte, or none. */
static CO_FN int use_other(struct run *r, const char *form, const uint8_t *byte)
{
	struct err err = { "" };
	struct tiered_other o;
	struct iovec v;
	struct iov iov = iov_one(&v, (void *)(uintptr_t)byte, 1);
	int rc = 0;

	if (tiered_other(r, form, &o))
		return -1;
	EXPECT(r, chain_open(o.chain, &err) == 0, "%s", err.msg);
	if (byte)
		rc = ch_write(chain_chan(o.chain, &rc), (struct ext){ &obj_none, MI, 1 }, &iov, 0);
	EXPECT(r, rc == 0 && chain_close(o.chain) == 0, "write, close");
	tiered_other_free(&o);
	return 0;
}

/* One name for two places in the chain: what is changed in one is not noticed in the other. */
static CO_FN int above_and_below(void *arg)
{
	const uint8_t byte = 0x55;
	struct run *r = arg;

	if (tiered_fill(r) || run_check_all(r) || run_shut(r) ||
	    use_other(r,
		      "sharded[size=256Ki]:cache[disk=@/c,volume=v,size=8Mi,mem=1Mi]:file:@/vol/",
		      &byte))
		return -1;
	run_model(r, MI, &byte, 1);
	return run_reopen(r, false) || run_check_all(r) ? -1 : 0;
}

static void test_above_and_below(void **state)
{
	tiered_check(TIERED "sharded[size=256Ki]:file:@/vol/", SIZE, above_and_below);
}

/* Made smaller, used, and made larger again, by somebody else: behind the old end are zeroes. */
static CO_FN int smaller_and_larger(void *arg)
{
	struct run *r = arg;
	char path[320];

	(void)snprintf(path, sizeof(path), "%s/disk.img", r->folder);
	if (tiered_fill(r) || run_check_all(r) || run_shut(r))
		return -1;
	EXPECT(r, truncate(path, SIZE / 2) == 0, "%s", path);
	if (use_other(r, TIERED "raw:file:@/disk.img", NULL))
		return -1;
	EXPECT(r, truncate(path, SIZE) == 0, "%s", path);
	memset(r->model + SIZE / 2, 0, SIZE / 2);
	return run_reopen(r, false) || run_check_all(r) ? -1 : 0;
}

static void test_smaller_and_larger(void **state)
{
	tiered_check(TIERED FILE_BELOW, SIZE, smaller_and_larger);
}

/* --- The folder ------------------------------------------------------------------------------- */

static CO_FN int one_daemon(void *arg)
{
	struct run *r = arg;
	struct err err = { "" };
	struct tiered_other o;

	if (tiered_other(r, OTHER, &o))
		return -1;
	EXPECT(r, chain_create(o.chain, SIZE, false, &err) == -EBUSY, "%s", err.msg);
	EXPECT(r, strstr(err.msg, "/c"), "it is named: %s", err.msg);
	if (run_shut(r))
		return -1;
	EXPECT(r, chain_create(o.chain, SIZE, false, &err) == 0, "%s", err.msg);
	if (run_reopen(r, false))
		return -1;
	EXPECT(r, chain_open(o.chain, &err) == -EBUSY, "%s", err.msg);
	EXPECT(r, strstr(err.msg, "/c"), "it is named: %s", err.msg);
	if (run_shut(r))
		return -1;
	EXPECT(r, chain_destroy(o.chain, &err) == 0, "%s", err.msg);
	tiered_other_free(&o);
	return run_reopen(r, false);
}

static void test_one_daemon(void **state)
{
	tiered_check(TIERED FILE_BELOW, SIZE, one_daemon);
}

/* What is only in a journal would be read as it was before. */
static CO_FN int journal_first(void *arg)
{
	struct run *r = arg;
	struct err err = { "" };
	struct tiered_other o;

	if (leave_unsaved(r) || tiered_other(r, TIERED "raw:file:@/disk.img", &o))
		return -1;
	EXPECT(r, chain_open(o.chain, &err) == -EBUSY, "%s", err.msg);
	EXPECT(r, strstr(err.msg, "serve it with mode=writeback"), "%s", err.msg);
	tiered_other_free(&o);
	return run_reopen(r, false);
}

static void test_journal_first(void **state)
{
	tiered_check(UNSAVED, SIZE, journal_first);
}

/* With no room for it any more it must not stay: changes would not be noted there. */
static CO_FN int no_room_left(void *arg)
{
	struct run *r = arg;
	const uint8_t byte = 0x55;

	if (tiered_fill(r) || run_shut(r) ||
	    use_other(r, "cache[disk=@/c,volume=v,size=2Mi,mode=writeback]:" FILE_BELOW, &byte))
		return -1;
	run_model(r, MI, &byte, 1);
	return run_reopen(r, false) || run_check_all(r) ? -1 : 0;
}

static void test_no_room_left(void **state)
{
	tiered_check("cache[disk=@/c,volume=v,size=10Mi,journal=2Mi,mode=writeback]:" FILE_BELOW,
		     SIZE, no_room_left);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_another_volume),  cmocka_unit_test(test_made_again),
		cmocka_unit_test(test_one_daemon),      cmocka_unit_test(test_journal_first),
		cmocka_unit_test(test_no_room_left),    cmocka_unit_test(test_nameless),
		cmocka_unit_test(test_made_anew),       cmocka_unit_test(test_unsaved),
		cmocka_unit_test(test_above_and_below), cmocka_unit_test(test_smaller_and_larger),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = cmocka_run_group_tests_name("cache on disk, whose it is", tests, NULL, NULL);
	conform_stop();
	return failed;
}
