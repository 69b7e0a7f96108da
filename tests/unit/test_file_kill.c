/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * `file` as an object store, killed while it puts: every object is whole afterwards, and none is older than what was
 * answered.
 *
 *	test_file_kill --child CHAIN PIPE GENERATION	is the one that gets killed
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "conform_store.h"
#include "conformance.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"

static char *temp_folder(void)
{
	char *path = NULL;

	assert_true(asprintf(&path, "%s/nbdrs-kill-XXXXXX", conform_tmp()) > 0);
	assert_non_null(mkdtemp(path));
	return path;
}

static void remove_folder(char *folder)
{
	DIR *dir = opendir(folder);
	struct dirent *d;

	assert_non_null(dir);
	while ((d = readdir(dir)) != NULL)
		if (strcmp(d->d_name, ".") != 0 && strcmp(d->d_name, "..") != 0)
			assert_int_equal(unlinkat(dirfd(dir), d->d_name, 0), 0);
	closedir(dir);
	assert_int_equal(rmdir(folder), 0);
	free(folder);
}

enum { ROUNDS = 50, OBJECTS = 8, SIZE_MAX_KILLED = 200000 };

struct header {
	uint64_t magic, generation, size;
};

#define MAGIC UINT64_C(0x6e62647273746f72)

/* One line of the pipe: this generation of this object was answered. */
struct answered {
	uint32_t object, generation;
};

struct child {
	struct chain *chain;
	int pipe;
	uint64_t first; /* generation */
};

struct putter {
	struct child *child;
	unsigned object;
};

/* Whole objects, and parts of others, until somebody kills us. */
static CO_FN void put_for_ever(void *arg)
{
	struct putter p = *(struct putter *)arg;
	_cleanup_free_ uint8_t *data = malloc(SIZE_MAX_KILLED);
	struct obj obj;
	char name[16];
	int rc = 0;
	struct chan *c = chain_chan(p.child->chain, &rc);

	(void)snprintf(name, sizeof(name), "k-%u", p.object);
	if (!c || !data || obj_set(&obj, name))
		return;
	for (uint64_t generation = p.child->first;; generation++) {
		uint64_t state = generation * 31 + p.object;
		struct header h = { MAGIC, generation,
				    sizeof(h) + random_below(&state, SIZE_MAX_KILLED - sizeof(h)) };
		struct answered a = { p.object, (uint32_t)generation };
		struct iovec v;
		struct iov iov = iov_one(&v, data, h.size);
		struct put put = { .obj = &obj, .iov = &iov };

		store_fill(data, h.size, generation);
		memcpy(data, &h, sizeof(h));
		if (ch_put(c, &put, NULL) != 0 || write(p.child->pipe, &a, sizeof(a)) != sizeof(a))
			return;
	}
}

static CO_FN int child_run(void *arg)
{
	struct child *child = arg;
	struct putter p[OBJECTS];
	struct co_group g = CO_GROUP_INIT;
	struct err err;
	int rc = chain_open(child->chain, &err);

	if (rc) {
		fprintf(stderr, "child: %s\n", err.msg);
		return rc;
	}
	for (unsigned i = 0; i < OBJECTS; i++) {
		p[i] = (struct putter){ child, i };
		co_group_spawn(&g, put_for_ever, &p[i]);
	}
	co_group_wait(&g);
	return -EIO;
}

static int child_main(char **argv)
{
	struct child child = { .pipe = (int)strtol(argv[1], NULL, 10),
			       .first = strtoull(argv[2], NULL, 10) };
	struct spec *spec = NULL;
	struct err err = { "" };

	if (spec_parse(argv[0], &spec, &err) != 0 ||
	    chain_build_keyed(spec, false, &child.chain, &err) != 0) {
		fprintf(stderr, "child: %s\n", err.msg);
		return 1;
	}
	conform_start();
	(void)reactor_call_blocking(reactor_get(0), child_run, &child);
	return 1;
}

struct kill_state {
	char text[300];
	uint32_t generations[OBJECTS]; /* the last that was answered */
	struct err err;
	char failure[300];
};

static pid_t start_child(const char *text, int pipe_fd, uint64_t first)
{
	char fd[16], generation[24];
	char *argv[] = { (char *)(uintptr_t) "test_file_kill",
			 (char *)(uintptr_t) "--child",
			 (char *)(uintptr_t)text,
			 fd,
			 generation,
			 NULL };
	pid_t pid;

	(void)snprintf(fd, sizeof(fd), "%d", pipe_fd);
	(void)snprintf(generation, sizeof(generation), "%ju", (uintmax_t)first);
	pid = fork();
	if (pid == 0) {
		int null = open("/dev/null", O_WRONLY);

		(void)dup2(null, STDOUT_FILENO);
		(void)fcntl(pipe_fd, F_SETFD, 0);
		execv("/proc/self/exe", argv);
		_exit(127);
	}
	return pid;
}

/* One object: whole, and not older than what was answered. */
static CO_FN int check_killed(struct kill_state *k, struct chan *c, unsigned object, uint8_t *data,
			      uint8_t *want)
{
	struct obj_stat st;
	struct header h;
	struct iovec v;
	struct iov iov;
	struct obj obj;
	char name[16];
	int rc;

	(void)snprintf(name, sizeof(name), "k-%u", object);
	(void)obj_set(&obj, name);
	rc = ch_stat(c, &obj, &st);
	if (rc == -ENOENT && k->generations[object] == 0)
		return 0;
	if (rc == 0 && (st.size > SIZE_MAX_KILLED || st.size < sizeof(h)))
		rc = -EFBIG;
	if (rc == 0) {
		iov = iov_one(&v, data, st.size);
		rc = ch_read(c, (struct ext){ &obj, 0, st.size }, &iov, 0);
	}
	if (rc) {
		(void)snprintf(k->failure, sizeof(k->failure), "%s: %s", name, err_name(rc));
		return -1;
	}
	memcpy(&h, data, sizeof(h));
	store_fill(want, st.size, h.generation);
	memcpy(want, &h, sizeof(h));
	if (h.magic == MAGIC && h.size == st.size && memcmp(data, want, st.size) == 0 &&
	    h.generation >= k->generations[object])
		return 0;
	(void)snprintf(k->failure, sizeof(k->failure),
		       "%s: torn or old: generation %ju of %ju bytes, in %ju; %u was answered",
		       name, (uintmax_t)h.generation, (uintmax_t)h.size, (uintmax_t)st.size,
		       k->generations[object]);
	return -1;
}

static int no_temps(void *arg, const char *name, uint64_t size)
{
	unsigned *n = arg;

	(*n)++;
	return strncmp(name, "k-", 2) == 0 ? 0 : -EINVAL;
}

static CO_FN int look_at_killed(void *arg)
{
	struct kill_state *k = arg;
	_cleanup_free_ uint8_t *data = malloc(SIZE_MAX_KILLED), *want = malloc(SIZE_MAX_KILLED);
	struct spec *spec = NULL;
	struct chain *chain = NULL;
	struct chan *c = NULL;
	unsigned n = 0;
	int rc = spec_parse(k->text, &spec, &k->err);

	if (rc == 0)
		rc = chain_build_keyed(spec, false, &chain, &k->err);
	if (rc == 0)
		rc = chain_open(chain, &k->err);
	if (rc)
		(void)snprintf(k->failure, sizeof(k->failure), "%.250s", k->err.msg);
	else
		c = chain_chan(chain, &rc);
	for (unsigned i = 0; c && i < OBJECTS && !k->failure[0]; i++)
		(void)check_killed(k, c, i, data, want);
	if (c && ch_list(c, "", no_temps, &n) != 0)
		(void)snprintf(k->failure, sizeof(k->failure), "list");
	if (c)
		(void)chain_close(chain);
	chain_free(chain);
	spec_free(spec);
	return 0;
}

/* Lets the child answer so many puts, kills it, takes in what it had answered by then. */
static void kill_after(struct kill_state *k, pid_t pid, int fd, unsigned answers)
{
	struct answered a;
	int status;

	for (unsigned n = 0; read(fd, &a, sizeof(a)) == sizeof(a); n++) {
		assert_true(a.object < OBJECTS);
		k->generations[a.object] = a.generation;
		if (n == answers)
			assert_int_equal(kill(pid, SIGKILL), 0);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	if (!WIFSIGNALED(status))
		fail_msg("the child has ended by itself: %x", (unsigned)status);
}

static void test_killed(void **state)
{
	struct kill_state k = { .failure = "" };
	char *folder = temp_folder();
	uint64_t seed = 99;

	(void)snprintf(k.text, sizeof(k.text), "file:%s/", folder);
	for (unsigned round = 0; round < ROUNDS && !k.failure[0]; round++) {
		uint64_t first = 1;
		int pipes[2];
		pid_t pid;

		for (unsigned i = 0; i < OBJECTS; i++)
			first = MAX(
				first,
				k.generations[i] +
					UINT64_C(
						100)); /* a put that was not answered may be there */
		assert_int_equal(pipe2(pipes, O_CLOEXEC), 0);
		pid = start_child(k.text, pipes[1], first);
		assert_true(pid > 0);
		close(pipes[1]);
		kill_after(&k, pid, pipes[0], (unsigned)random_below(&seed, 40));
		close(pipes[0]);
		assert_int_equal(reactor_call_blocking(reactor_get(0), look_at_killed, &k), 0);
		if (k.failure[0])
			fail_msg("round %u: %s", round, k.failure);
	}
	remove_folder(folder);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_killed),
	};
	int failed;

	if (argc == 5 && strcmp(argv[1], "--child") == 0)
		return child_main(argv + 2);
	conform_start();
	failed = cmocka_run_group_tests_name("file store killed", tests, NULL, NULL);
	conform_stop();
	return failed;
}
