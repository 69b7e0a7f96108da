/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Going over to a new process image: the part that has to do with programs. What is handed over is in handover.h, when
 * is in serve.c.
 *
 *	old: upgrade_prepare -> ... upgrade_ask (checks the new program) -> the main thread wakes up -> upgrade_exec
 *	new: upgrade_take
 *
 * It is the same process, so it keeps its number, its rights, its parent and what waits in its sockets. The command
 * line is the old one's, as it was before secrets in it were masked.
 */
#include "cmd/cmd.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/handover.h"
#include "nbdrs/io.h"
#include "nbdrs/opt.h"

extern char **environ;

enum { CHECK_LIMIT_MS = 10000, SAID_MAX = 300 };

static struct {
	char **argv; /* a copy */
	int argc;
	char exe[PATH_MAX];	/* where this program was started from; another one may lie there now */
	char binary[PATH_MAX];	/* to be started */
	int exe_fd;		/* this very program */
	int event_fd;		/* readable: upgrade_ask was successful */
} self = { .exe_fd = -1, .event_fd = -1 };

int upgrade_prepare(const struct args *a)
{
	ssize_t n = readlink("/proc/self/exe", self.exe, sizeof(self.exe) - 1);

	if (n < 0)
		n = 0; /* no /proc: only a program that is named can be started */
	self.exe[n] = '\0';
	self.exe_fd = open("/proc/self/exe", O_PATH | O_CLOEXEC);
	self.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	self.argc = a->argc;
	self.argv = calloc((size_t)a->argc + 1, sizeof(*self.argv));
	if (!self.argv || self.event_fd < 0)
		return -ENOMEM;
	for (int i = 0; i < a->argc; i++) {
		self.argv[i] = strdup(a->argv[i]);
		if (!self.argv[i])
			return -ENOMEM;
	}
	return 0;
}

int upgrade_event_fd(void)
{
	return self.event_fd;
}

/* --- Checking the new program ------------------------------------------------------------------- */

/* What `fd` says until its end, in one line. -ETIMEDOUT. */
static int read_said(int fd, char *said)
{
	const uint64_t until = now_ns() + CHECK_LIMIT_MS * UINT64_C(1000000);
	size_t len = 0;

	for (;;) {
		struct pollfd p = { .fd = fd, .events = POLLIN };
		char rest[64];
		const uint64_t now = now_ns();
		ssize_t n;

		if (now >= until)
			return -ETIMEDOUT;
		if (poll(&p, 1, (int)((until - now) / 1000000) + 1) <= 0)
			continue;
		n = len < SAID_MAX ? read(fd, said + len, SAID_MAX - len) : read(fd, rest, sizeof(rest));
		if (n <= 0)
			break;
		len += len < SAID_MAX ? (size_t)n : 0;
	}
	said[len] = '\0';
	said[strcspn(said, "\n")] = '\0';
	return 0;
}

struct check {
	const char *binary;
	struct err *err;
};

/*
 * Our command line with --check-handover, which makes nbdrsd parse everything and exit. The caller's; its words
 * are not.
 */
static char **check_argv(char *option)
{
	char **argv = calloc((size_t)self.argc + 2, sizeof(*argv));
	/* Behind the command, if there is one, and before anything that could end the options. */
	const int at = self.argc > 1 && self.argv[1][0] != '-' ? 2 : 1;

	if (!argv)
		return NULL;
	memcpy(argv, self.argv, (size_t)at * sizeof(*argv));
	argv[at] = option;
	memcpy(argv + at + 1, self.argv + at, (size_t)(self.argc - at) * sizeof(*argv));
	return argv;
}

/* Of an offload thread: waits for the program. */
static int check_program(void *arg)
{
	const struct check *c = arg;
	_cleanup_close_ int in = -1, out = -1;
	_cleanup_free_ char **argv = NULL;
	char said[SAID_MAX + 1], option[40];
	int rc, status = 0, pipes[2];
	pid_t pid;

	(void)snprintf(option, sizeof(option), "--check-handover=%d", HANDOVER_FORMAT);
	argv = check_argv(option);
	if (!argv || pipe2(pipes, O_CLOEXEC))
		return err_set(c->err, -ENOMEM, "cannot check %s: out of memory or descriptors", c->binary);
	in = pipes[0];
	out = pipes[1];
	rc = process_spawn(c->binary, argv, -1, out, &pid);
	if (rc)
		return err_set(c->err, -ENOEXEC, "cannot start %s: %s; this daemon goes on", c->binary, strerror(-rc));
	(void)close(TAKE_FD(out));
	rc = read_said(in, said);
	if (rc)
		(void)kill(pid, SIGKILL);
	while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	if (rc)
		return err_set(c->err, rc, "%s --check-handover does not end; this daemon goes on", c->binary);
	if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
		return err_set(c->err, -ENOEXEC, "%s cannot take over (%s %d): %s; this daemon goes on", c->binary,
			       WIFEXITED(status) ? "status" : "signal",
			       WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status), said);
	if (strcmp(said, HANDOVER_YES) != 0)
		return err_set(c->err, -ENOEXEC, "%s is not an nbdrsd that can take over; this daemon goes on",
			       c->binary);
	return 0;
}

/* --- Asked ------------------------------------------------------------------------------------- */

CO_FN int upgrade_check_again(struct err *err)
{
	return upgrade_check_list(self.argc, self.argv, false, err);
}

CO_FN int upgrade_ask(const char *binary, struct err *err)
{
	struct check c = { .binary = binary ? binary : self.exe, .err = err };
	int rc = upgrade_check_memory(err);

	if (rc)
		return rc;
	if (!*c.binary || strlen(c.binary) >= sizeof(self.binary))
		return err_set(err, -ENOENT, "which program to start is not known: name it by --binary");
	rc = exports_freeze();
	if (rc)
		return err_set(err, rc, "a resize or another upgrade is under way; try again when it has ended");
	rc = offload(check_program, &c);
	if (!rc)
		rc = upgrade_check_list(self.argc, self.argv, true, err);
	if (rc) {
		exports_thaw();
		return rc;
	}
	(void)snprintf(self.binary, sizeof(self.binary), "%s", c.binary);
	(void)eventfd_write(self.event_fd, 1); /* can't overflow */
	return 0;
}

/* --- From one to the next ----------------------------------------------------------------------- */

int upgrade_save(const struct handover *h, int *fd, struct err *err)
{
	_cleanup_close_ int file = memfd_create("nbdrs-handover", MFD_CLOEXEC);
	int rc;

	if (file < 0)
		return err_set(err, -errno, "cannot make a file in memory: %s", strerror(errno));
	rc = handover_save(h, file, err);
	if (!rc)
		*fd = TAKE_FD(file);
	return rc;
}

/* Flips close-on-exec of everything that goes over. */
static void set_cloexec(const struct handover *h, int file, bool on)
{
	const int flags = on ? FD_CLOEXEC : 0;

	/* These fail only for numbers that are no descriptors, which sending then finds out. */
	for (size_t i = 0; i < h->conns_n; i++)
		(void)fcntl(h->conns[i].fd, F_SETFD, flags);
	for (size_t i = 0; i < h->listeners_n; i++)
		(void)fcntl(h->listeners[i].fd, F_SETFD, flags);
	if (file >= 0)
		(void)fcntl(file, F_SETFD, flags);
}

int upgrade_exec(const struct handover *h, int file)
{
	char number[16];
	int rc;

	set_cloexec(h, file, false);
	(void)snprintf(number, sizeof(number), "%d", file);
	if (setenv(HANDOVER_ENV, number, 1))
		return -ENOMEM;
	(void)execve(self.binary, self.argv, environ);
	rc = -errno;
	log_error("cannot start the new program, going on with the old one program=%s error=%s", self.binary,
		  err_name(rc));
	(void)syscall(SYS_execveat, self.exe_fd, "", self.argv, environ, AT_EMPTY_PATH);
	return -errno;
}

int upgrade_take(struct handover *h, struct err *err)
{
	const char *text = getenv(HANDOVER_ENV);
	uint64_t fd;
	int rc;

	if (!text)
		return 0;
	if (parse_u64(text, &fd) || fd > INT_MAX)
		return err_set(err, -EINVAL, HANDOVER_ENV "='%.32s' is not the number of a descriptor", text);
	(void)unsetenv(HANDOVER_ENV);
	rc = handover_load((int)fd, h, err);
	(void)close((int)fd); /* read only */
	if (rc)
		return err_prefix(err, rc, HANDOVER_ENV);
	set_cloexec(h, -1, true);
	return 1;
}
