/* SPDX-License-Identifier: GPL-3.0-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kill_child.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "conformance.h"
#include "nbdrs/reactor.h"

enum { WRITERS_MAX = 16 };

/* --- The child -------------------------------------------------------------------------------- */

struct child {
	struct kill_writer w; /* `number` apart */
	void (*write)(void *writer);
	unsigned n;
};

bool kill_child_is(int argc, char **argv)
{
	return argc == 5 && strcmp(argv[1], "--child") == 0;
}

static CO_FN int child_run(void *arg)
{
	struct child *child = arg;
	struct kill_writer w[WRITERS_MAX];
	struct co_group g = CO_GROUP_INIT;
	struct err err = { "" };
	int rc = chain_open(child->w.chain, &err);

	if (rc) {
		fprintf(stderr, "child: %s\n", err.msg);
		return rc;
	}
	for (unsigned i = 0; i < child->n; i++) {
		w[i] = child->w;
		w[i].number = i;
		co_group_spawn(&g, child->write, &w[i]);
	}
	co_group_wait(&g);
	return -EIO;
}

int kill_child_main(char **argv, void (*write)(void *writer), unsigned n)
{
	struct child child = { .w = { .pipe = (int)strtol(argv[3], NULL, 10),
				      .first = strtoull(argv[4], NULL, 10) },
			       .write = write,
			       .n = n };
	struct spec *spec = NULL;
	struct err err = { "" };

	assert(n <= WRITERS_MAX);
	if (spec_parse(argv[2], &spec, &err) != 0 ||
	    chain_build_keyed(spec, false, &child.w.chain, &err) != 0) {
		fprintf(stderr, "child: %s\n", err.msg);
		return 1;
	}
	conform_start();
	(void)reactor_call_blocking(reactor_get(0), child_run, &child);
	return 1;
}

/* --- The parent ------------------------------------------------------------------------------- */

static void exec_child(const char *chain, uint64_t first, int pipe_fd)
{
	char fd[16], generation[24];
	char *argv[] = { (char *)(uintptr_t) "child",
			 (char *)(uintptr_t) "--child",
			 (char *)(uintptr_t)chain,
			 fd,
			 generation,
			 NULL };

	(void)snprintf(fd, sizeof(fd), "%d", pipe_fd);
	(void)snprintf(generation, sizeof(generation), "%ju", (uintmax_t)first);
	(void)dup2(open("/dev/null", O_WRONLY | O_CLOEXEC), STDOUT_FILENO);
	(void)fcntl(pipe_fd, F_SETFD, 0);
	execv("/proc/self/exe", argv);
	_exit(127);
}

pid_t kill_child_start(const char *chain, uint64_t first, int *from)
{
	int pipes[2];
	pid_t pid;

	assert_int_equal(pipe2(pipes, O_CLOEXEC), 0);
	pid = fork();
	if (pid == 0)
		exec_child(chain, first, pipes[1]);
	assert_true(pid > 0);
	close(pipes[1]);
	*from = pipes[0];
	return pid;
}

void kill_child_kill(pid_t pid)
{
	assert_int_equal(kill(pid, SIGKILL), 0);
}

void kill_child_wait(pid_t pid)
{
	int status;

	assert_int_equal(waitpid(pid, &status, 0), pid);
	if (!WIFSIGNALED(status))
		fail_msg("the child has ended by itself: %x", (unsigned)status);
}
