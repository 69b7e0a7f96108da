/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Locks that keep a second writer out, and who holds them: /proc/PID/fdinfo lists each descriptor's locks.
 */
#include "layer/file/file_lock.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/log.h"

enum { LOCK_WAIT_MS = 3000, LOCK_PAUSE_MS = 20 };

/* Does this /proc/PID/fdinfo file list a lock on inode `ino`? The line ends in " MAJ:MIN:INODE START END". */
static bool fdinfo_has_lock(const char *path, ino_t ino)
{
	_cleanup_free_ char *line = NULL;
	FILE *f = fopen(path, "re");
	bool found = false;
	size_t room = 0;
	char want[32];

	if (f == NULL)
		return false;
	(void)snprintf(want, sizeof(want), ":%ju ", (uintmax_t)ino);
	while (!found && getline(&line, &room, f) > 0)
		found = strncmp(line, "lock:", 5) == 0 && strstr(line, want) != NULL;
	(void)fclose(f);
	return found;
}

static bool process_has_lock(const char *pid, ino_t ino)
{
	char dir[64], path[340];
	struct dirent *d;
	bool found = false;
	DIR *fds;

	(void)snprintf(dir, sizeof(dir), "/proc/%.20s/fdinfo", pid);
	fds = opendir(dir);
	if (fds == NULL)
		return false;
	while (!found && (d = readdir(fds)) != NULL) {
		(void)snprintf(path, sizeof(path), "%s/%s", dir, d->d_name);
		found = d->d_name[0] != '.' && fdinfo_has_lock(path, ino);
	}
	(void)closedir(fds);
	return found;
}

/* "process 4711 (qemu-nbd)". False, and "another process", when there is none to be seen. */
static bool name_holder(ino_t ino, char *out, size_t len)
{
	DIR *proc = opendir("/proc");
	bool found = false;
	struct dirent *d;

	(void)snprintf(out, len, "another process");
	while (proc != NULL && (d = readdir(proc)) != NULL) {
		char path[64], comm[64] = "";
		ssize_t n = 0;
		int fd;

		if (d->d_name[0] < '1' || d->d_name[0] > '9' || !process_has_lock(d->d_name, ino))
			continue;
		(void)snprintf(path, sizeof(path), "/proc/%.20s/comm", d->d_name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd >= 0) {
			n = read(fd, comm, sizeof(comm) - 1);
			(void)close(fd);
		}
		comm[strcspn(comm, "\n")] = '\0';
		if (strtol(d->d_name, NULL, 10) == getpid())
			(void)snprintf(out, len, "another export of this daemon");
		else
			(void)snprintf(out, len, "process %.20s%s%s%s", d->d_name,
				       n > 0 ? " (" : "", comm, n > 0 ? ")" : "");
		found = true;
		break;
	}
	if (proc != NULL)
		(void)closedir(proc);
	return found;
}

/* One try; 0 or -errno. */
static int try_lock(int fd, enum lock_kind kind, bool is_ro)
{
	struct flock fl = { .l_type = is_ro ? F_RDLCK : F_WRLCK, .l_whence = SEEK_SET };
	int rc = kind == LOCK_OFD ? fcntl(fd, F_OFD_SETLK, &fl)
				  : flock(fd, LOCK_NB | (is_ro ? LOCK_SH : LOCK_EX));

	if (rc == 0)
		return 0;
	return errno == EACCES || errno == EWOULDBLOCK ? -EAGAIN : -errno;
}

/* EBADF: NFS wants a descriptor open for writing, which a folder's never is. */
static bool means_no_locks(int rc)
{
	return rc == -ENOLCK || rc == -EOPNOTSUPP || rc == -ENOSYS || rc == -EBADF;
}

int file_lock(int fd, enum lock_kind kind, bool is_ro, const char *path, struct err *err)
{
	struct stat st;
	char holder[128] = "another process";
	int rc;

	/*
	 * A killed daemon's ring keeps its files for some milliseconds more: a lock that no process is seen to
	 * hold is waited for.
	 */
	for (int waited_ms = 0;; waited_ms += LOCK_PAUSE_MS) {
		rc = try_lock(fd, kind, is_ro);
		if (rc != -EAGAIN)
			break;
		if ((fstat(fd, &st) == 0 && name_holder(st.st_ino, holder, sizeof(holder))) ||
		    waited_ms >= LOCK_WAIT_MS)
			return err_set(
				err, -EBUSY, "%s is in use by %s; %s", path, holder,
				is_ro ? "it has it open for writing"
				      : "stop that first, or serve it read-only there and here");
		(void)usleep(LOCK_PAUSE_MS * 1000);
	}
	if (rc == 0)
		return 0;
	if (means_no_locks(rc)) {
		log_warn("no locks on this file system, nothing keeps a second writer out file=%s",
			 path);
		return 0;
	}
	return err_set(err, rc, "%s: cannot lock: %s", path, strerror(-rc));
}
