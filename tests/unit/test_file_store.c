/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * `file` as an object store, beyond what every store must do: its folder, its lock, its descriptors, failed syncs.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "conform_store.h"
#include "conformance.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"
#include "temp.h"

#undef EXPECT

static void check(const char *text, bool in_memory, int (*fn)(void *run))
{
	const struct store_what what = { .text = text, .in_memory = in_memory };
	const char *failure = store_with(&what, fn);

	if (failure)
		fail_msg("%s", failure);
}

/* The path of an object's file; static storage. */
static const char *path_of(struct store_run *r, const char *name)
{
	static _Thread_local char path[600];

	(void)snprintf(path, sizeof(path), "%s/o/%s%s", r->folder, r->prefix, name);
	return path;
}

/* --- The folder ------------------------------------------------------------------------------- */

struct
try {
	const char *text;
	bool read_only;
	struct err err;
};

/* Opens another chain; its result. */
static CO_FN int try_open(void *arg)
{
	struct try *t = arg;
	struct spec *spec = NULL;
	struct chain *chain = NULL;
	int rc = spec_parse(t->text, &spec, &t->err);

	if (rc == 0)
		rc = chain_build_keyed(spec, t->read_only, &chain, &t->err);
	if (rc == 0)
		rc = chain_open(chain, &t->err);
	if (rc == 0)
		rc = chain_close(chain);
	chain_free(chain);
	spec_free(spec);
	return rc;
}

/* A plain file with the object's name, readable by its owner only. */
static CO_FN int layout(void *arg)
{
	struct store_run *r = arg;
	char path[300], got[16] = "";
	struct stat st;
	int fd;

	CHECK(r, store_put(r, "size", "1048576", 7, PUT_ALWAYS, NULL, NULL) == 0, "put");
	CHECK(r, store_write_at(r, "block-3", 4096, "x", 1, 0) == 0, "write");
	CHECK(r,
	      stat(path_of(r, "size"), &st) == 0 && st.st_size == 7 && (st.st_mode & 0777) == 0600,
	      "size: %o", st.st_mode);
	CHECK(r,
	      stat(path_of(r, "block-3"), &st) == 0 && st.st_size == 4097 &&
		      (st.st_mode & 0777) == 0600,
	      "%o", st.st_mode);
	fd = open(path_of(r, "size"), O_RDONLY | O_CLOEXEC);
	CHECK(r, fd >= 0 && read(fd, got, sizeof(got)) == 7 && strcmp(got, "1048576") == 0, "%s",
	      got);
	close(fd);
	(void)snprintf(path, sizeof(path), "%s/o", r->folder);
	CHECK(r, stat(path, &st) == 0 && (st.st_mode & 0777) == 0700, "folder: %o", st.st_mode);
	return 0;
}

/* Names that stand for unfinished files are refused, whatever is asked of them. */
static CO_FN int temp_names(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	struct obj obj;
	struct obj_stat st;
	struct iovec v;
	char byte = 'x';
	struct iov iov = iov_one(&v, &byte, 1);
	struct put p = { .obj = &obj, .iov = &iov };

	CHECK(r, c && obj_set(&obj, ".nbdrs-tmp-1-1") == 0, "channel");
	CHECK(r, ch_put(c, &p, NULL) == -EINVAL, "put");
	CHECK(r, ch_stat(c, &obj, &st) == -EINVAL, "stat");
	CHECK(r, ch_del(c, &obj, 1) == -EINVAL, "del");
	CHECK(r, ch_read(c, (struct ext){ &obj, 0, 1 }, &iov, 0) == -EINVAL, "read");
	CHECK(r, ch_write(c, (struct ext){ &obj, 0, 1 }, &iov, 0) == -EINVAL, "write");
	return 0;
}

static void test_layout(void **state)
{
	check("file:@/o/", true, layout);
	check("file:@/o", true, temp_names);
}

static CO_FN int locked(void *arg)
{
	struct store_run *r = arg;
	char text[300];
	struct try t = { .text = text };
	int rc;

	(void)snprintf(text, sizeof(text), "file:%s/o", r->folder);
	rc = try_open(&t);
	CHECK(r, rc == -EBUSY && strstr(t.err.msg, "is in use by another export of this daemon"),
	      "%s", t.err.msg);
	t.read_only = true;
	rc = try_open(&t);
	CHECK(r, rc == -EBUSY && strstr(t.err.msg, "it has it open for writing"), "%s", t.err.msg);
	return 0;
}

static void test_locked(void **state)
{
	check("file:@/o/", true, locked);
}

struct readers {
	char text[300];
	struct err err;
	const char *failure;
};

/* Two that only read share the folder; writing is refused there, to files and to the lock. */
static CO_FN int read_only(void *arg)
{
	struct readers *rs = arg;
	struct try t = { .text = rs->text, .read_only = true };
	struct spec *spec = NULL;
	struct chain *chain = NULL;
	struct obj obj;
	struct iovec v;
	char buf[4] = "";
	struct iov iov = iov_one(&v, buf, 4);
	struct put p = { .obj = &obj, .iov = &iov };
	struct chan *c;
	int rc;

	if (obj_set(&obj, "there") || spec_parse(rs->text, &spec, &rs->err) ||
	    chain_build_keyed(spec, true, &chain, &rs->err) || chain_open(chain, &rs->err)) {
		rs->failure = rs->err.msg;
	} else {
		c = chain_chan(chain, &rc);
		if (try_open(&t) != 0)
			rs->failure = t.err.msg;
		else if (ch_read(c, (struct ext){ &obj, 0, 4 }, &iov, 0) != 0 ||
			 memcmp(buf, "data", 4) != 0)
			rs->failure = "read";
		else if (ch_put(c, &p, NULL) != -EROFS || ch_del(c, &obj, 1) != -EROFS ||
			 ch_write(c, (struct ext){ &obj, 0, 4 }, &iov, 0) != -EROFS)
			rs->failure = "was written to";
		else if (ch_flush(c) != 0)
			rs->failure = "flush";
		t.read_only = false;
		if (!rs->failure &&
		    (try_open(&t) != -EBUSY || !strstr(t.err.msg, "serve it read-only")))
			rs->failure = "a writer was let in";
		(void)chain_close(chain);
	}
	chain_free(chain);
	spec_free(spec);
	return 0;
}

static void make_file(const char *folder, const char *name, const char *text)
{
	char path[400];
	int fd;

	(void)snprintf(path, sizeof(path), "%s/%s", folder, name);
	fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
	assert_true(fd >= 0);
	assert_int_equal(write(fd, text, strlen(text)), strlen(text));
	close(fd);
}

static void test_read_only(void **state)
{
	struct readers rs = { .failure = NULL };
	char *folder = temp_folder();

	make_file(folder, "there", "data");
	make_file(folder, ".nbdrs-tmp-7-7", "left");
	(void)snprintf(rs.text, sizeof(rs.text), "file:%s", folder);
	assert_int_equal(reactor_call_blocking(reactor_get(0), read_only, &rs), 0);
	if (rs.failure)
		fail_msg("%s", rs.failure);
	make_file(folder, ".nbdrs-tmp-7-7", "still there: who only reads removes nothing");
	temp_remove_free(folder);
}

static void test_folder_errors(void **state)
{
	static const struct {
		const char *text, *message;
		int rc;
	} cases[] = {
		{ "file:@/none/", "/none/ does not exist; nbdrsd init makes the folder", -ENOENT },
		{ "file:@/plain", "/plain is not a folder, which is where objects are kept",
		  -ENOTDIR },
		{ "file:@/plain/", "is not a folder", -ENOTDIR },
		{ "file:", "", -EINVAL },
		{ "file[direct]:@/", "option \"direct\" (column 6): it takes no options", -EINVAL },
		{ "null", "null holds one disk, no objects; use it with raw", -EINVAL },
	};
	char *folder = temp_folder();

	make_file(folder, "plain", "");
	for (unsigned i = 0; i < ARRAY_LEN(cases); i++) {
		const char *at = strchr(cases[i].text, '@');
		_cleanup_free_ char *text = NULL;
		struct try t = { 0 };
		int rc;

		assert_true(asprintf(&text, "%.*s%s%s",
				     (int)(at ? at - cases[i].text : (long)strlen(cases[i].text)),
				     cases[i].text, at ? folder : "", at ? at + 1 : "") >= 0);
		t.text = text;
		rc = reactor_call_blocking(reactor_get(0), try_open, &t);
		if (rc != cases[i].rc || !strstr(t.err.msg, cases[i].message))
			fail_msg("%s: %s: %s", text, err_name(rc), t.err.msg);
	}
	temp_remove_free(folder);
}

/* What a crash has left goes, what is not ours stays, and is no object. */
static CO_FN int leftovers(void *arg)
{
	struct store_run *r = arg;
	char path[400];
	struct stat st;

	(void)snprintf(path, sizeof(path), "%s/o/.nbdrs-tmp-1-1", r->folder);
	(void)close(open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
	CHECK(r, mkdir(path_of(r, "folder"), 0700) == 0, "mkdir");
	CHECK(r, mkfifo(path_of(r, "pipe"), 0600) == 0, "mkfifo");
	if (store_reopen(r))
		return -1;
	CHECK(r, stat(path, &st) != 0 && errno == ENOENT, "%s is still there", path);
	CHECK(r, store_put(r, "folder", "x", 1, PUT_ALWAYS, NULL, NULL) == -EISDIR,
	      "put over a folder");
	CHECK(r, store_get(r, "pipe", 0, path, 1) == -EINVAL, "read of a pipe");
	CHECK(r, rmdir(path_of(r, "folder")) == 0, "the folder has gone");
	CHECK(r, unlink(path_of(r, "pipe")) == 0, "the pipe has gone");
	return 0;
}

static void test_leftovers(void **state)
{
	check("file:@/o/", true, leftovers);
}

/* destroy() leaves a folder alone that somebody keeps other things in. */
static CO_FN int destroy_twice(void *arg)
{
	struct try *t = arg;
	struct spec *spec = NULL;
	struct chain *chain = NULL;
	int rc = spec_parse(t->text, &spec, &t->err);

	if (rc == 0)
		rc = chain_build_keyed(spec, false, &chain, &t->err);
	if (rc == 0)
		rc = chain_create(chain, 0, false, &t->err); /* it is there: fine */
	if (rc == 0)
		rc = chain_destroy(chain, &t->err);
	chain_free(chain);
	spec_free(spec);
	return rc;
}

static void test_destroy(void **state)
{
	char *folder = temp_folder(), text[300];
	struct try t = { .text = text };

	(void)snprintf(text, sizeof(text), "file:%s/", folder);
	make_file(folder, "notes", "mine");
	assert_int_equal(reactor_call_blocking(reactor_get(0), destroy_twice, &t), 0);
	temp_remove_free(folder); /* it was there still */
	assert_int_equal(reactor_call_blocking(reactor_get(0), destroy_twice, &t), 0);
	assert_int_not_equal(access(folder, F_OK), 0);
}

/* --- Descriptors ------------------------------------------------------------------------------ */

enum { FEW_FDS = 256, MANY_FILES = 300 };

static unsigned count_fds(struct store_run *r)
{
	DIR *dir = opendir("/proc/self/fd");
	struct dirent *d;
	unsigned n = 0;

	while (dir && (d = readdir(dir)) != NULL) {
		char target[600] = "";

		if (readlinkat(dirfd(dir), d->d_name, target, sizeof(target) - 1) > 0 &&
		    strncmp(target, r->folder, strlen(r->folder)) == 0 && strstr(target, "-f-"))
			n++;
	}
	if (dir)
		closedir(dir);
	return n;
}

static CO_FN int many_files(struct store_run *r, unsigned fiber, void *arg)
{
	const char *what = arg;

	for (unsigned i = fiber; i < MANY_FILES; i += 40) {
		char name[16], data[32];
		int rc;

		(void)snprintf(name, sizeof(name), "f-%u", i);
		(void)snprintf(data, sizeof(data), "%s %u", what, i);
		rc = store_write_at(r, name, 0, data, sizeof(data), 0);
		CHECK(r, rc == 0, "write: %s", err_name(rc));
	}
	return 0;
}

static CO_FN int few_descriptors(void *arg)
{
	struct store_run *r = arg;
	struct chan *c;

	/* The second round writes to files that were closed, synced or not. */
	for (unsigned round = 0; round < 2; round++) {
		char what[8];

		(void)snprintf(what, sizeof(what), "r%u", round);
		if (store_fibers(r, 40, many_files, what))
			return -1;
		CHECK(r, count_fds(r) <= FEW_FDS / 8, "%u files are open", count_fds(r));
	}
	c = store_chan(r);
	CHECK(r, c && ch_flush(c) == 0, "flush");
	for (unsigned i = 0; i < MANY_FILES; i++) {
		char name[16], data[32] = "";

		(void)snprintf(name, sizeof(name), "f-%u", i);
		(void)store_get(r, name, 0, data, sizeof(data));
		CHECK(r, strncmp(data, "r1 ", 3) == 0 && strtoul(data + 3, NULL, 10) == i, "%s: %s",
		      name, data);
	}
	CHECK(r, count_fds(r) <= FEW_FDS / 8, "%u files are open", count_fds(r));
	CHECK(r, count_fds(r) >= FEW_FDS / 16, "only %u files are kept open", count_fds(r));
	return 0;
}

/* Others have taken all descriptors but a handful: ours make room. */
static CO_FN int others_descriptors(void *arg)
{
	struct store_run *r = arg;
	struct rlimit old, few;
	char what[] = "r1";
	int rc, first;

	CHECK(r, getrlimit(RLIMIT_NOFILE, &old) == 0, "limit");
	first = open("/dev/null", O_RDONLY | O_CLOEXEC); /* the first free one */
	CHECK(r, first >= 0, "/dev/null");
	few = old;
	few.rlim_cur = (rlim_t)first + 6;
	CHECK(r, setrlimit(RLIMIT_NOFILE, &few) == 0, "limit");
	close(first);
	rc = store_fibers(r, 40, many_files, what);
	for (unsigned i = 0; i < MANY_FILES && rc == 0; i++) {
		char name[16], data[32] = "";

		(void)snprintf(name, sizeof(name), "f-%u", i);
		if (i % 10 == 0)
			rc = store_put(r, name, "r1 put", 6, PUT_ALWAYS, NULL, NULL);
		rc = rc ? rc : store_get(r, name, 0, data, sizeof(data));
		if (rc == 0 && strncmp(data, "r1 ", 3) != 0)
			rc = store_fail(r, __LINE__, "%s: %s", name, data);
	}
	(void)setrlimit(RLIMIT_NOFILE, &old);
	CHECK(r, rc == 0, "%s", err_name(rc));
	return 0;
}

static void test_descriptors_of_others(void **state)
{
	check("file:@/o/", true, others_descriptors);
}

static void test_descriptors(void **state)
{
	struct rlimit old, few;

	assert_int_equal(getrlimit(RLIMIT_NOFILE, &old), 0);
	few = old;
	few.rlim_cur = FEW_FDS;
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
	check("file:@/o/", true, few_descriptors);
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &old), 0);
}

/* --- Failed syncs ----------------------------------------------------------------------------- */

/* Makes the store's descriptor of that file one that can't be synced; -1 when it has none. */
static int break_fd(const char *path)
{
	int pipes[2], broken = -1;
	DIR *dir;
	struct dirent *d;

	if (pipe2(pipes, O_CLOEXEC) != 0)
		return -1;
	dir = opendir("/proc/self/fd");
	while (dir && broken < 0 && (d = readdir(dir)) != NULL) {
		char target[600] = "";

		if (readlinkat(dirfd(dir), d->d_name, target, sizeof(target) - 1) > 0 &&
		    strcmp(target, path) == 0)
			broken = dup3(pipes[1], (int)strtol(d->d_name, NULL, 10), O_CLOEXEC);
	}
	if (dir)
		closedir(dir);
	close(pipes[0]);
	close(pipes[1]);
	return broken;
}

/* The kernel tells of lost pages once. We don't forget. */
static CO_FN int failed_sync(void *arg)
{
	struct store_run *r = arg;
	struct chan *c = store_chan(r);
	int rc;

	CHECK(r, c, "channel");
	CHECK(r, store_write_at(r, "good", 0, "x", 1, 0) == 0, "write");
	CHECK(r, ch_flush(c) == 0, "flush");
	CHECK(r, store_write_at(r, "bad", 0, "x", 1, 0) == 0, "write");
	CHECK(r, break_fd(path_of(r, "bad")) >= 0, "no descriptor of %s", path_of(r, "bad"));
	for (unsigned i = 0; i < 3; i++) {
		rc = ch_flush(c);
		CHECK(r, rc == -EINVAL, "flush %u: %s", i, err_name(rc));
	}
	/* Writes go on, nothing is promised to be stable any more. */
	CHECK(r, store_write_at(r, "good", 0, "y", 1, 0) == 0, "write");
	rc = store_write_at(r, "good", 0, "z", 1, IO_FUA);
	CHECK(r, rc == -EINVAL, "FUA: %s", err_name(rc));
	rc = ch_flush(c);
	CHECK(r, rc == -EINVAL, "flush: %s", err_name(rc));
	/* Opened anew, as after a restart: the file is as it is. */
	rc = chain_close(r->chain);
	CHECK(r, rc == -EINVAL, "close: %s", err_name(rc));
	rc = chain_open(r->chain, &(struct err){ "" });
	CHECK(r, rc == 0, "open: %s", err_name(rc));
	c = store_chan(r);
	CHECK(r, c && ch_flush(c) == 0, "flush");
	return store_expect(r, "good", "z", 1);
}

static void test_failed_sync(void **state)
{
	check("file:@/o/", true, failed_sync);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_layout),      cmocka_unit_test(test_locked),
		cmocka_unit_test(test_read_only),   cmocka_unit_test(test_folder_errors),
		cmocka_unit_test(test_leftovers),   cmocka_unit_test(test_destroy),
		cmocka_unit_test(test_descriptors), cmocka_unit_test(test_descriptors_of_others),
		cmocka_unit_test(test_failed_sync),
	};
	int failed;

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	conform_start();
	failed = cmocka_run_group_tests_name("file store", tests, NULL, NULL);
	conform_stop();
	return failed;
}
