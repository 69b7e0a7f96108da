/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the process asks of the kernel before it serves. A daemon that the kernel writes pages through
 * must not wait for those very pages: KERNEL-NBD.md 2.3, prctl(2) PR_SET_IO_FLUSHER.
 */
#include "cmd/cmd.h"

#include <errno.h>
#include <linux/capability.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

/* Threads inherit it, so it comes before them. Never called with 0: that would take it away again. */
static void become_io_flusher(void)
{
	if (prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0))
		log_info("not an IO flusher: local attaches may stall when memory is short error=%s "
			 "mend=\"give nbdrsd CAP_SYS_RESOURCE\"",
			 err_name(errno));
}

bool process_has_cap(int cap)
{
	struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct caps[_LINUX_CAPABILITY_U32S_3] = { 0 };

	return syscall(SYS_capget, &head, caps) == 0 &&
	       caps[CAP_TO_INDEX(cap)].effective & CAP_TO_MASK(cap);
}

extern char **environ;

/* In `files`: descriptor `fd`, -1 = ours, is `number` there. */
static int add_fd(posix_spawn_file_actions_t *files, int fd, int number)
{
	return fd < 0 ? 0 : posix_spawn_file_actions_adddup2(files, fd, number);
}

int process_spawn(const char *program, char *const argv[], int in, int out, pid_t *pid)
{
	posix_spawn_file_actions_t files;
	posix_spawnattr_t attr;
	sigset_t none, all;
	int rc = posix_spawn_file_actions_init(&files);

	if (rc)
		return -rc;
	rc = posix_spawnattr_init(&attr);
	if (rc) {
		(void)posix_spawn_file_actions_destroy(&files); /* can't fail */
		return -rc;
	}
	(void)sigemptyset(&none); /* these can't fail */
	(void)sigfillset(&all);
	rc = posix_spawnattr_setsigmask(&attr, &none);
	if (!rc)
		rc = posix_spawnattr_setsigdefault(&attr, &all);
	if (!rc)
		rc = posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
	if (!rc)
		rc = add_fd(&files, in, STDIN_FILENO);
	if (!rc)
		rc = add_fd(&files, out, STDOUT_FILENO);
	if (!rc)
		rc = add_fd(&files, out, STDERR_FILENO);
	if (!rc)
		rc = posix_spawn(pid, program, &files, &attr, argv, environ);
	(void)posix_spawnattr_destroy(&attr); /* nor can these */
	(void)posix_spawn_file_actions_destroy(&files);
	return -rc;
}

/* With CAP_IPC_LOCK the limit does not count. */
static bool is_lock_unlimited(void)
{
	struct rlimit limit = { RLIM_INFINITY, RLIM_INFINITY };

	if (process_has_cap(CAP_IPC_LOCK))
		return true;
	(void)setrlimit(RLIMIT_MEMLOCK, &limit); /* needs CAP_SYS_RESOURCE; looked at next */
	return getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur == RLIM_INFINITY;
}

/*
 * ONFAULT: stacks and pools are large and mostly untouched. Only without a limit: with one, MCL_FUTURE
 * makes every later mmap beyond it fail.
 */
static void lock_memory(void)
{
	if (!is_lock_unlimited()) {
		log_info("memory not locked: parts may be swapped out "
			 "mend=\"run nbdrsd with LimitMEMLOCK=infinity\"");
		return;
	}
	if (mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT))
		log_info("memory not locked: parts may be swapped out error=%s", err_name(errno));
}

/* A descriptor per connection and file: the soft limit of 1024 is for select(2), which is not used. */
static void raise_open_files(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit))
		return;
	limit.rlim_cur = limit.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &limit))
		log_info("limit of open files not raised error=%s", err_name(errno));
}

/*
 * A core would hold keys and users' data, and be written perhaps to the disk that this very process
 * serves. The hard limit stays: `prlimit --core=unlimited --pid PID` turns cores on for debugging.
 */
static void forgo_core_dumps(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_CORE, &limit))
		return;
	limit.rlim_cur = 0;
	(void)setrlimit(RLIMIT_CORE, &limit); /* lowering the soft limit is always permitted */
}

void process_prepare(void)
{
	forgo_core_dumps();
	raise_open_files();
	become_io_flusher();
	lock_memory();
}
