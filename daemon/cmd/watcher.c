/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The helper that reconnects kernel devices: `nbdrs-attach --watch`, a process of its own because requests to
 * the driver may hang, and because it knows the driver already.
 *
 * A thread starts it and waits for its end. It ends when its standard input does: that is a pipe which
 * only this process holds the other end of, so it goes whichever way we go (kill -9 and exec included).
 */
#include "cmd/cmd.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "nbdrs/backend.h"
#include "nbdrs/cleanup.h"

enum { PATH_LEN = 4096, PAUSE_S = 1 };

static struct {
	pthread_t thread;
	bool is_started;
	_Atomic bool is_stopping;
	int pipe[2]; /* read end: the helper's standard input */
	char program[PATH_LEN], control[PATH_LEN];
} watcher = { .pipe = { -1, -1 } };

static pthread_mutex_t start_lock = PTHREAD_MUTEX_INITIALIZER;

bool watcher_has_devices(void)
{
	bool found = false;
	DIR *dir = opendir("/sys/block");
	struct dirent *e;

	while (dir && !found && (e = readdir(dir))) {
		char path[sizeof("/sys/block//backend") + sizeof(e->d_name)], text[8] = "";
		const ssize_t len = sizeof(BACKEND_PREFIX) - 1;
		_cleanup_close_ int fd = -1;

		if (strncmp(e->d_name, "nbd", 3) != 0)
			continue;
		(void)snprintf(path, sizeof(path), "/sys/block/%s/backend", e->d_name); /* fits */
		fd = open(path, O_RDONLY | O_CLOEXEC);
		found = fd >= 0 && read(fd, text, (size_t)len) == len && strcmp(text, BACKEND_PREFIX) == 0;
	}
	if (dir)
		(void)closedir(dir);
	return found;
}

/* nbdrs-attach beside our own file. */
static int find_program(void)
{
	ssize_t n = readlink("/proc/self/exe", watcher.program, sizeof(watcher.program) - 1);
	char *slash;

	if (n < 0)
		return -errno;
	watcher.program[n] = '\0';
	slash = strrchr(watcher.program, '/');
	if (!slash || (size_t)(slash - watcher.program) + sizeof("/nbdrs-attach") > sizeof(watcher.program))
		return -ENAMETOOLONG;
	memcpy(slash, "/nbdrs-attach", sizeof("/nbdrs-attach"));
	return access(watcher.program, X_OK) ? -errno : 0;
}

static int spawn_helper(pid_t *pid)
{
	static char words[][16] = { "nbdrs-attach", "--watch", "--until-eof", "--control" };
	char *const argv[] = { words[0], words[1], words[2], words[3], watcher.control, NULL };

	return process_spawn(watcher.program, argv, watcher.pipe[0], -1, pid);
}

static void *watcher_thread(void *arg)
{
	const struct timespec pause = { .tv_sec = PAUSE_S };
	pid_t pid;
	int status;

	while (!watcher.is_stopping) {
		int rc = spawn_helper(&pid);

		if (rc) {
			log_warn("devices are not given new connections: cannot run the helper program=%s error=%s",
				 watcher.program, err_name(rc));
			break;
		}
		while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
			;
		if (watcher.is_stopping)
			break;
		log_warn("the helper that gives devices new connections has ended status=%d", status);
		(void)nanosleep(&pause, NULL);
	}
	return arg;
}

static void start_locked(const char *path)
{
	int rc;

	if (watcher.is_started || watcher.is_stopping || !process_has_cap(CAP_SYS_ADMIN))
		return;
	rc = find_program();
	if (!rc && snprintf(watcher.control, sizeof(watcher.control), "%s", path) >= (int)sizeof(watcher.control))
		rc = -ENAMETOOLONG;
	if (!rc && pipe2(watcher.pipe, O_CLOEXEC))
		rc = -errno;
	if (!rc) {
		rc = -pthread_create(&watcher.thread, NULL, watcher_thread, NULL);
		watcher.is_started = rc == 0;
	}
	if (rc)
		log_warn("devices are not given new connections when they lose some error=%s mend=\"install "
			 "nbdrs-attach beside nbdrsd, or run nbdrs-attach --watch\"",
			 err_name(rc));
}

void watcher_start(const char *path)
{
	pthread_mutex_lock(&start_lock);
	start_locked(path);
	pthread_mutex_unlock(&start_lock);
}

bool watcher_stop(void)
{
	bool is_started;

	pthread_mutex_lock(&start_lock);
	watcher.is_stopping = true; /* none is started from here on */
	is_started = watcher.is_started;
	pthread_mutex_unlock(&start_lock);
	if (!is_started)
		return false;
	(void)close(watcher.pipe[1]); /* its end of input */
	(void)pthread_join(watcher.thread, NULL);
	(void)close(watcher.pipe[0]);
	watcher.is_started = false;
	return true;
}

void watcher_may_start(void)
{
	pthread_mutex_lock(&start_lock);
	watcher.is_stopping = false;
	pthread_mutex_unlock(&start_lock);
}
