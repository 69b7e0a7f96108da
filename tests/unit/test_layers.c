/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * All layers against the conformance suite, each one's own promises, and the documentation.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "conformance.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"

enum { KI = 1024, MI = KI * KI };

/* More than max_io of all layers. */
#define BIG (33 * MI)

static const struct conform chains[] = {
	{ .text = "mem[size=33Mi]", .size = BIG, .only = "boundaries" },
	{ .text = "mem[size=5Mi]", .size = 5 * MI, .has_holes = true },
	{ .text = "mem[size=5000001]", .size = 5000001 },
	{ .text = "raw:mem[size=5Mi]", .size = 5 * MI, .has_holes = true },
	{ .text = "null[size=5Mi]", .size = 5 * MI, .is_forgetful = true },
	{ .text = "delay:mem[size=5Mi]", .size = 5 * MI, .has_holes = true },
	{ .text = "delay[read=200us,write=100us,zero=50us,trim=50us,flush=300us,jitter=300us]:mem[size=5Mi]",
	  .size = 5 * MI,
	  .has_holes = true },
	{ .text = "fault[rate=0%]:mem[size=5Mi]", .size = 5 * MI, .has_holes = true },
	{ .text = "readahead:mem[size=33Mi]", .size = BIG, .only = "boundaries" },
	{ .text = "readahead:mem[size=5Mi]", .size = 5 * MI, .has_holes = true },
	{ .text = "readahead[window=64Ki,request=64Ki,mem=1Mi,streams=2]:"
		  "delay[read=200us,write=100us,jitter=300us]:mem[size=5000001]",
	  .size = 5000001 },
	{ .text = "readahead:delay[read=1ms]:fault[rate=0%]:mem[size=5Mi]",
	  .size = 5 * MI,
	  .has_holes = true },
	{ .text = "cache:mem[size=33Mi]", .size = BIG, .only = "boundaries" },
	{ .text = "cache[mem=1Mi]:mem[size=5Mi]", .size = 5 * MI, .has_holes = true },
	{ .text = "cache[mem=1Mi,granule=4Ki]:delay[read=200us,write=100us,jitter=300us]:mem[size=5000001]",
	  .size = 5000001 },
	{ .text = "cache[disk=@/cache,volume=v,size=2Mi,mem=1Mi,granule=8Ki]:delay[read=100us,jitter=200us]:"
		  "raw:file:@/disk.img",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_memory = true },
	{ .text = "cache[disk=@/cache,volume=v,size=3Mi,mem=1Mi]:raw:file:@/disk.img",
	  .size = 5000001,
	  .is_volume = true,
	  .in_memory = true },
	{ .text = "sharded[size=64Ki]:cache[disk=@/cache,size=3Mi,mem=1Mi,granule=4Ki]:mem[partial=off]",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_chain = true,
	  .in_memory = true },
	{ .text = "sharded[size=64Ki]:cache[disk=@/cache,volume=v,size=4Mi,journal=1Mi,mode=writeback,mem=1Mi,"
		  "granule=16Ki,lag=2ms]:file:@/vol/",
	  .size = 5000001,
	  .is_volume = true,
	  .in_memory = true },
	{ .text = "sharded:cache[mem=1Mi]:mem[partial=off]",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_chain = true },
	{ .text = "cache[mode=writeback,size=8Mi]:mem[size=33Mi]",
	  .size = BIG,
	  .only = "boundaries" },
	{ .text = "cache[mode=writeback,mem=1Mi,lag=2ms]:mem[size=5Mi]", .size = 5 * MI },
	{ .text = "cache[mode=writeback,size=1Mi,mem=1Mi,granule=4Ki,lag=1ms]:"
		  "delay[read=200us,write=100us,jitter=300us]:mem[size=5000001]",
	  .size = 5000001 },
	{ .text = "cache[disk=@/cache,size=8Mi,mode=writeback,lag=5ms]:raw:file:@/disk.img",
	  .size = 5000001,
	  .is_volume = true,
	  .in_memory = true },
	{ .text = "cache[disk=@/cache,size=4Mi,mode=writeback,lag=1ms,mem=1Mi]:sharded[size=64Ki]:mem[partial=off]",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_chain = true,
	  .in_memory = true },
	{ .text = "sharded[size=64Ki]:cache[mode=writeback,mem=1Mi,lag=3ms]:mem[partial=off]",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_chain = true },
	{ .text = "sharded[size=64Ki]:cache[disk=@/cache,size=8Mi,mode=writeback,lag=2ms]:"
		  "retry[base=1ms,cap=5ms]:fault[rate=5%,error=EAGAIN]:mem[partial=off]",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_chain = true,
	  .in_memory = true },
	{ .text = "sharded:cache[disk=@/cache,size=8Mi,mode=writeback,durability=remote]:mem[partial=off]",
	  .size = 9 * MI,
	  .is_volume = true,
	  .in_chain = true,
	  .in_memory = true },
	{ .text = "sharded[size=64Ki]:cache[disk=@/cache,size=8Mi,mode=writeback]:file:@/vol/",
	  .size = 5000001,
	  .is_volume = true,
	  .in_memory = true },
	{ .text = "raw:file:@/disk.img", .size = BIG, .is_volume = true, .only = "boundaries" },
	{ .text = "raw:file:@/disk.img", .size = 5 * MI, .is_volume = true },
	{ .text = "raw:file:@/", .size = 5000001, .is_volume = true, .in_memory = true },
	{ .text = "file[lend=off]:@/disk.img",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_memory = true },
	{ .text = "file[prealloc=falloc]:@/disk.img",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_memory = true },
	{ .text = "file[prealloc=full]:@/disk.img",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_memory = true },
	{ .text = "raw:file[direct]:@/disk.img",
	  .size = BIG,
	  .is_volume = true,
	  .only = "boundaries" },
	{ .text = "raw:file[direct]:@/disk.img", .size = 5 * MI, .is_volume = true },
	{ .text = "raw:fault[rate=0%]:delay[write=50us]:file[direct]:@/",
	  .size = 5 * MI,
	  .is_volume = true },
	{ .text = "sharded:mem",
	  .size = BIG,
	  .is_volume = true,
	  .in_chain = true,
	  .only = "boundaries" },
	{ .text = "sharded:mem", .size = 5000001, .is_volume = true, .in_chain = true },
	{ .text = "sharded[size=64Ki]:mem",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_chain = true,
	  .has_holes = true },
	{ .text = "sharded:mem[partial=off]",
	  .size = BIG,
	  .is_volume = true,
	  .in_chain = true,
	  .only = "boundaries" },
	{ .text = "sharded:mem[partial=off]",
	  .size = 5000001,
	  .is_volume = true,
	  .in_chain = true },
	{ .text = "sharded[size=64Ki]:mem[partial=off]",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_chain = true,
	  .has_holes = true },
	{ .text = "sharded[size=16Ki,age=2ms,puts=3]:mem[partial=off]",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_chain = true },
	{ .text = "sharded[size=4Ki,dirty=1Mi,age=1ms]:mem[partial=off]",
	  .size = 5000001,
	  .is_volume = true,
	  .in_chain = true },
	{ .text = "sharded[dirty=1Mi]:delay[write=1ms,read=200us,jitter=1ms]:mem[partial=off]",
	  .size = 9 * MI,
	  .is_volume = true,
	  .in_chain = true },
	{ .text = "sharded[size=64Ki,age=5ms]:delay[write=1ms,jitter=2ms]:mem[partial=off]",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_chain = true },
	{ .text = "sharded[age=10ms]:retry[base=1ms,cap=5ms]:fault[rate=5%,error=EAGAIN]:mem[partial=off]",
	  .size = 9 * MI,
	  .is_volume = true,
	  .in_chain = true },
	{ .text = "sharded[size=64Ki]:retry[base=1ms,cap=5ms]:fault[rate=5%,error=EAGAIN,when=after]:mem",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_chain = true },
	{ .text = "sharded:distributed[replicas=2]{mem,mem,mem}",
	  .size = 9 * MI,
	  .is_volume = true,
	  .in_chain = true },
	{ .text = "sharded[size=64Ki,age=5ms]:distributed[replicas=2]{mem[partial=off],mem,mem[partial=off]}",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_chain = true },
	{ .text = "sharded[size=64Ki]:distributed[replicas=3,quorum=2]{mem,mem,delay[write=300us]:mem,mem}",
	  .size = 5000001,
	  .is_volume = true,
	  .in_chain = true },
	{ .text = "sharded[size=64Ki]:distributed[replicas=2,quorum=1,recheck=5ms]"
		  "{mem,fault[rate=5%,ops=read|write|zero|put|del,error=ETIMEDOUT]:mem,mem}",
	  .size = 5 * MI,
	  .is_volume = true,
	  .in_chain = true },
	{ .text = "sharded:file:@/vol/", .size = 5 * MI, .is_volume = true, .in_memory = true },
	{ .text = "sharded[size=64Ki]:file:@/vol/",
	  .size = 5000001,
	  .is_volume = true,
	  .in_memory = true },
};

static bool has_direct; /* O_DIRECT in the temporary folder */

static void probe_direct(void)
{
	char path[300];
	int fd;

	(void)snprintf(path, sizeof(path), "%s/nbdrs-direct-XXXXXX", conform_tmp());
	fd = mkstemp(path);
	assert_true(fd >= 0);
	has_direct = fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_DIRECT) == 0;
	close(fd);
	unlink(path);
}

/* One case over one chain: the state of one test. */
struct job {
	const struct conform *what;
	const struct conform_case *c;
};

static void test_job(void **state)
{
	const struct job *job = *state;
	const char *failure, *ci = getenv("CI");

	if (strstr(job->what->text, "direct") && !has_direct) {
		if (ci && strcmp(ci, "true") == 0)
			fail_msg("no O_DIRECT in %s: set TMPDIR to a folder on a disk",
				 conform_tmp());
		print_message("no O_DIRECT in %s\n", conform_tmp());
		skip();
	}
	failure = conform_run(job->what, job->c);
	if (failure)
		fail_msg("%s", failure);
}

static struct ext at(uint64_t off, uint64_t len)
{
	return (struct ext){ &obj_none, off, len };
}

/* A write that is expected to end with rc; the model is left alone. */
static CO_FN int expect_write(struct run *r, uint64_t off, uint64_t len, uint8_t byte, int rc)
{
	struct chan *c = run_chan(r);
	_cleanup_free_ uint8_t *buf = malloc(len);
	struct iovec v;
	struct iov iov = iov_one(&v, buf, len);
	int got;

	if (!c || !buf)
		return -1;
	memset(buf, byte, len);
	got = ch_write(c, at(off, len), &iov, 0);
	EXPECT(r, got == rc, "write: %s, not %s", err_name(got), err_name(rc));
	return 0;
}

/* --- mem -------------------------------------------------------------------------------------- */

static CO_FN int holes_in(struct run *r, uint64_t *holes)
{
	struct chan *c = run_chan(r);
	struct extent v[64];
	struct extmap m = { v, 0, ARRAY_LEN(v) };

	if (!c)
		return -1;
	EXPECT(r, ch_map(c, at(0, r->what->size), &m) == 0, "map");
	*holes = 0;
	for (unsigned i = 0; i < m.n; i++)
		*holes += v[i].flags & EXTENT_HOLE ? v[i].len : 0;
	return 0;
}

/* Only whole pages come and go, and only where asked. */
static CO_FN int mem_allocation(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), size = r->what->size, holes = 0;

	if (!c || run_write(r, 10 * page + 5, page, 0, 1) || holes_in(r, &holes))
		return -1;
	EXPECT(r, holes == size - 2 * page, "a write over two pages took %ju",
	       (uintmax_t)(size - holes));

	/* Zero of parts of them keeps them; of nothing allocates nothing. */
	EXPECT(r, ch_zero(c, at(10 * page + 1, page), IO_PUNCH) == 0, "zero");
	EXPECT(r, ch_zero(c, at(20 * page + 1, page), IO_PUNCH) == 0, "zero");
	memset(r->model + 10 * page + 1, 0, page);
	if (holes_in(r, &holes))
		return -1;
	EXPECT(r, holes == size - 2 * page, "%ju", (uintmax_t)(size - holes));

	/* Without leave to deallocate, memory is kept and taken; that is no faster than writing. */
	EXPECT(r, ch_zero(c, at(10 * page, 4 * page), IO_FAST) == -ENOTSUP, "fast");
	EXPECT(r, ch_zero(c, at(10 * page, 4 * page), 0) == 0, "zero");
	memset(r->model + 10 * page, 0, 4 * page);
	if (holes_in(r, &holes))
		return -1;
	EXPECT(r, holes == size - 4 * page, "%ju", (uintmax_t)(size - holes));

	EXPECT(r, ch_trim(c, at(0, size), 0) == 0, "trim");
	if (holes_in(r, &holes))
		return -1;
	EXPECT(r, holes == size, "%ju", (uintmax_t)(size - holes));
	memset(r->model, 0, size);
	return run_check_all(r);
}

static void test_mem_allocation(void **state)
{
	/* The second disk ends inside of a page, which is given back whole all the same. */
	conform_check("mem[size=4Mi]", 4 * MI, mem_allocation);
	conform_check("mem[size=4001000]", 4001000, mem_allocation);
}

static void test_mem_size_missing(void **state)
{
	const struct conform what = { .text = "mem", .size = 512 };
	const char *failure = conform_with(&what, conform_cases[0].fn);

	assert_non_null(failure);
	assert_non_null(strstr(failure, "layer mem needs its size: mem[size=1Gi]"));
}

/* --- delay ------------------------------------------------------------------------------------ */

static CO_FN int delay_times(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	uint64_t start = now_ns(), took;

	if (!c || run_write(r, 0, 4096, 0, 1))
		return -1;
	took = now_ns() - start;
	EXPECT(r, took >= 20000000, "write took %ju ns", (uintmax_t)took);
	start = now_ns();
	if (run_check(r, 0, 4096, 1))
		return -1;
	EXPECT(r, ch_flush(c) == 0, "flush");
	took = now_ns() - start;
	EXPECT(r, took >= 30000000, "read and flush took %ju ns", (uintmax_t)took);
	EXPECT(r, !(chain_top(r->chain)->caps & CAN_LEND), "a loan can't wait");
	return 0;
}

static void test_delay(void **state)
{
	conform_check("delay[read=10ms,write=20ms,flush=20ms]:mem[size=1Mi]", MI, delay_times);
}

/* --- fault ------------------------------------------------------------------------------------ */

/* "The third flush fails", and nothing else does. */
static CO_FN int fault_third_flush(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);

	if (!c)
		return -1;
	for (int i = 0; i < 6; i++) {
		int rc = ch_flush(c);

		EXPECT(r, rc == (i == 2 ? -ENOSPC : 0), "flush %d: %s", i, err_name(rc));
		if (run_write(r, 0, 1000, 0, 1))
			return -1;
	}
	return run_check_all(r);
}

/* An error before it: the layer below has seen nothing. */
static CO_FN int fault_before(void *arg)
{
	struct run *r = arg;

	if (expect_write(r, 5000, 70000, 'x', -EIO) || run_check_all(r))
		return -1;
	EXPECT(r, run_ops(r, 1, CH_WRITE) == 0, "below: %ju", (uintmax_t)run_ops(r, 1, CH_WRITE));
	EXPECT(r, run_ops(r, 0, CH_WRITE) == 1, "top: %ju", (uintmax_t)run_ops(r, 0, CH_WRITE));
	/* The one failure is used up. */
	return run_write(r, 5000, 70000, 0, 1) ? -1 : run_check_all(r);
}

static CO_FN int fault_after(void *arg)
{
	struct run *r = arg;

	if (expect_write(r, 5000, 70000, 'x', -EIO))
		return -1;
	memset(r->model + 5000, 'x', 70000);
	return run_check_all(r);
}

static CO_FN int fault_partly(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);

	if (!c || expect_write(r, 5000, 70000, 'x', -EIO))
		return -1;
	memset(r->model + 5000, 'x', 35000);
	EXPECT(r, ch_zero(c, at(5000, 20000), IO_PUNCH) == -EIO, "zero");
	memset(r->model + 5000, 0, 10000);
	return run_check_all(r);
}

static CO_FN int fault_range(void *arg)
{
	struct run *r = arg;

	if (run_write(r, 0, 4096, 0, 1) || run_write(r, 8192, 4096, 0, 1) ||
	    expect_write(r, 4095, 2, 'x', -EIO) || expect_write(r, 8191, 1, 'x', -EIO) ||
	    expect_write(r, 0, 100000, 'x', -EIO))
		return -1;
	return run_check_all(r);
}

/* Every kind of request can fail, with the error asked for. */
static CO_FN int fault_all_ops(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	struct extent v;
	struct extmap m = { &v, 0, 1 };
	struct iovec vec;
	char byte;
	struct iov iov = iov_one(&vec, &byte, 1);

	if (!c)
		return -1;
	EXPECT(r, ch_read(c, at(0, 1), &iov, 0) == -ESHUTDOWN, "read");
	EXPECT(r, ch_write(c, at(0, 1), &iov, 0) == -ESHUTDOWN, "write");
	EXPECT(r, ch_zero(c, at(0, 1), 0) == -ESHUTDOWN, "zero");
	EXPECT(r, ch_trim(c, at(0, 1), 0) == -ESHUTDOWN, "trim");
	EXPECT(r, ch_flush(c) == -ESHUTDOWN, "flush");
	EXPECT(r, ch_map(c, at(0, 1), &m) == -ESHUTDOWN, "map");
	EXPECT(r, ch_cache(c, at(0, 1)) == -ESHUTDOWN, "cache");
	EXPECT(r, ch_flush(c) == 0, "the eighth");
	return 0;
}

/* Which of 400 reads fail, as a string of 0 and 1 in static memory. */
static char verdicts[401];

static CO_FN int fault_rate(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	struct iovec vec;
	char byte;
	struct iov iov = iov_one(&vec, &byte, 1);

	if (!c)
		return -1;
	for (int i = 0; i < 400; i++) {
		int rc = ch_read(c, at(7, 1), &iov, 0);

		EXPECT(r, rc == 0 || rc == -EIO, "%s", err_name(rc));
		verdicts[i] = rc ? '1' : '0';
	}
	return 0;
}

static void test_fault_seed(void **state)
{
	char first[sizeof(verdicts)];
	unsigned failed = 0;

	conform_check("fault[rate=25%,ops=read,seed=7]:null", UINT64_C(1) << 10, fault_rate);
	memcpy(first, verdicts, sizeof(first));
	for (unsigned i = 0; i < 400; i++)
		failed += first[i] == '1';
	assert_in_range(failed, 60, 140); /* 100 expected, deviation 8.7 */
	conform_check("fault[rate=25%,ops=read,seed=7]:null", UINT64_C(1) << 10, fault_rate);
	assert_string_equal(first, verdicts);
	conform_check("fault[rate=25%,ops=read,seed=8]:null", UINT64_C(1) << 10, fault_rate);
	assert_string_not_equal(first, verdicts);
}

/* Switched on and off by a file in the run's folder. */
static CO_FN int fault_file(void *arg)
{
	struct run *r = arg;
	struct chan *c = run_chan(r);
	char path[300];
	int fd;

	(void)snprintf(path, sizeof(path), "%s/on", r->folder);
	if (!c || run_write(r, 0, 100, 0, 1))
		return -1;
	fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
	EXPECT(r, fd >= 0, "%s", path);
	close(fd);
	if (expect_write(r, 0, 100, 'x', -EIO))
		return -1;
	EXPECT(r, unlink(path) == 0, "%s", path);
	return run_write(r, 50, 100, 0, 1) ? -1 : run_check_all(r);
}

static void test_fault(void **state)
{
	conform_check("fault[ops=flush,after=2,count=1,error=ENOSPC]:mem[size=1Mi]", MI, fault_third_flush);
	conform_check("fault[ops=write,count=1]:mem[size=1Mi]", MI, fault_before);
	conform_check("fault[ops=write,count=1,when=after]:mem[size=1Mi]", MI, fault_after);
	conform_check("fault[ops=write|zero,when=partly]:mem[size=1Mi]", MI, fault_partly);
	conform_check("fault[ops=write,range=4Ki-8Ki]:mem[size=1Mi]", MI, fault_range);
	conform_check("fault[ops=read|write|zero|trim|flush|map|cache,count=7,error=ESHUTDOWN]:mem[size=1Mi]",
	      MI, fault_all_ops);
	conform_check("fault[ops=write,file=@/on]:mem[size=1Mi]", MI, fault_file);
}

/* --- Errors of set-up ------------------------------------------------------------------------- */

static void test_setup_errors(void **state)
{
	static const struct {
		const char *text, *message;
	} cases[] = {
		{ "fault[ops=read|wrote]:mem[size=1Mi]",
		  "\"read|wrote\" must be words out of read|write|zero" },
		{ "fault[ops=]:mem[size=1Mi]", "\"\" must be words out of" },
		{ "fault[range=8Ki-4Ki]:mem[size=1Mi]", "\"8Ki-4Ki\" must be FROM-TO" },
		{ "fault[range=8Ki]:mem[size=1Mi]", "\"8Ki\" must be FROM-TO" },
		{ "fault[range=x-y]:mem[size=1Mi]", "\"x-y\" must be FROM-TO" },
		{ "fault[rate=101%]:mem[size=1Mi]",
		  "layer fault: option \"rate\" (column 7): \"101%\" is out of" },
		{ "fault", "column 1: layer fault needs a layer below it" },
		{ "mem[size=1Mi]:mem[size=1Mi]", "column 1: mem is a store and ends a chain" },
		{ "raw:shredded:mem", "column 5: there is no layer 'shredded'" },
		{ "mem[size=100]", "\"100\" is out of range 512B..16TiB" },
	};

	for (unsigned i = 0; i < ARRAY_LEN(cases); i++)
		conform_refuses(cases[i].text, cases[i].message);
}

/* What can't hold a volume says so. */
static CO_FN int create_fails(void *arg)
{
	const char **want = arg; /* chain, message */
	struct spec *spec = NULL;
	struct chain *chain = NULL;
	struct err err = { "" };
	int rc = spec_parse(want[0], &spec, &err);

	if (!rc)
		rc = chain_build(spec, NULL, false, &chain, &err);
	if (!rc)
		rc = chain_create(chain, MI, false, &err) && strstr(err.msg, want[1]) ? 0 : -EPROTO;
	if (!rc)
		rc = chain_destroy(chain, &err) && strstr(err.msg, want[2]) ? 0 : -EPROTO;
	if (rc)
		fprintf(stderr, "%s: %s\n", want[0], err.msg);
	chain_free(chain);
	spec_free(spec);
	return rc;
}

static void test_create_errors(void **state)
{
	const char *mem[] = { "raw:mem[size=1Mi]", "layer mem holds no volume that could be made",
			      "layer mem holds no volume that could be removed" };
	const char *folder[] = { "raw:file:/nonexistent/", "name the file in it",
				 "name the file in it" };

	assert_int_equal(reactor_call_blocking(reactor_get(0), create_fails, mem), 0);
	assert_int_equal(reactor_call_blocking(reactor_get(0), create_fails, folder), 0);
}

/* --- Documentation ---------------------------------------------------------------------------- */

static char *read_text(const char *path)
{
	FILE *f = fopen(path, "re");
	char *text = calloc(1, 1 << 20);

	if (!f)
		fail_msg("%s: %s (run the tests from the top of the source)", path,
			 strerror(errno));
	assert_non_null(text);
	(void)fread(text, 1, (1 << 20) - 1, f);
	fclose(f);
	return text;
}

/* Each layer has a section in docs/layers.md that names every option, with its default. */
static void test_documented(void **state)
{
	_cleanup_free_ char *text = read_text("docs/layers.md");

	for (unsigned i = 0; layers[i]; i++) {
		char head[64], *section, *end;

		(void)snprintf(head, sizeof(head), "\n## %s\n", layers[i]->name);
		section = strstr(text, head);
		if (!section) {
			fail_msg("docs/layers.md has no section \"## %s\"", layers[i]->name);
			return; /* never reached, which only cmocka knows */
		}
		section += strlen(head) - 1;
		end = strstr(section, "\n## ");
		section = end ? strndup(section, (size_t)(end - section)) : strdup(section);
		assert_non_null(section);
		for (const struct opt *o = layers[i]->opts; o && o->name; o++) {
			char row[128];

			(void)snprintf(row, sizeof(row), "\n| `%s` | %s%s%s |", o->name,
				       o->def ? "`" : "", o->def ? o->def : "none",
				       o->def ? "`" : "");
			if (!strstr(section, row))
				fail_msg("docs/layers.md, section %s, lacks the row: %s",
					 layers[i]->name, row + 1);
		}
		free(section);
	}
}

static void test_registry(void **state)
{
	assert_ptr_equal(layer_find("mem")->name, layer_find("mem")->name);
	assert_null(layer_find("men"));
	assert_null(layer_find(""));
	for (unsigned i = 0; layers[i]; i++) {
		assert_ptr_equal(layer_find(layers[i]->name), layers[i]);
		assert_non_null(layers[i]->help);
	}
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest own[] = {
		cmocka_unit_test(test_mem_allocation), cmocka_unit_test(test_mem_size_missing),
		cmocka_unit_test(test_delay),          cmocka_unit_test(test_fault),
		cmocka_unit_test(test_fault_seed),     cmocka_unit_test(test_setup_errors),
		cmocka_unit_test(test_create_errors),  cmocka_unit_test(test_documented),
		cmocka_unit_test(test_registry),
	};
	static struct CMUnitTest tests[ARRAY_LEN(own) + ARRAY_LEN(chains) * 16];
	static struct job jobs[ARRAY_LEN(tests)];
	static char names[ARRAY_LEN(tests)][160];
	unsigned n = 0;
	int failed;

	for (unsigned i = 0; i < ARRAY_LEN(chains); i++) {
		for (const struct conform_case *c = conform_cases; c->name; c++) {
			if (chains[i].only && strcmp(chains[i].only, c->name) != 0)
				continue;
			jobs[n] = (struct job){ &chains[i], c };
			(void)snprintf(names[n], sizeof(names[n]), "%s: %s", chains[i].text,
				       c->name);
			tests[n] = (struct CMUnitTest){ .name = names[n],
							.test_func = test_job,
							.initial_state = &jobs[n] };
			n++;
		}
	}
	memcpy(tests + n, own, sizeof(own));
	n += ARRAY_LEN(own);

	probe_direct();
	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a pattern with * and ? */
	conform_start();
	failed = _cmocka_run_group_tests("layers", tests, n, NULL, NULL);
	conform_stop();
	return failed;
}
