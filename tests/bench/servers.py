# SPDX-License-Identifier: GPL-3.0-or-later
"""The servers that are compared: how each is started, found ready, and stopped.

All serve the same file, uncached by themselves and through the page cache, as an export named
'disk', with the settings they have by default; see COMMANDS for what is not default and why.
"""

import ctypes
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import procstat

EXPORT = "disk"
READY_SECONDS = 20
STOP_SECONDS = 20
PR_SET_CHILD_SUBREAPER = 36


class ServerError(Exception):
    """A server did not start, or died; the text says which and why."""


def adopt_orphans():
    """Make daemons that detach themselves our children, so that they can be waited for."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def free_port():
    """A TCP port of 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _nbdrs(extra):
    def command(b, at, file, folder):
        where = ["--unix", at.path, "--listen", "none"] if at.path else \
                ["--listen", f"127.0.0.1:{at.port}"]
        return [f"{b}/nbdrsd", "-e", EXPORT, "raw", f"file:{file}", *where,
                "--control", f"{folder}/control.sock", *extra]
    return command


def _qemu(aio):
    # --persistent and --shared: survive the first client, admit many. Cache mode is the default.
    def command(_b, at, file, _folder):
        where = ["-k", at.path] if at.path else ["-b", "127.0.0.1", "-p", str(at.port)]
        return ["qemu-nbd", "-f", "raw", "--persistent", "--shared=0", f"--aio={aio}",
                "-x", EXPORT, *where, file]
    return command


def _nbdkit(_b, at, file, _folder):
    where = ["-U", at.path] if at.path else ["-i", "127.0.0.1", "-p", str(at.port)]
    return ["nbdkit", "-f", *where, "file", file]


def _nbd_server(_b, at, file, folder):
    # It always opens a TCP port as well. It must detach: in the foreground it serves one client.
    conf = f"{folder}/nbd-server.conf"
    port = at.port or free_port()
    with open(conf, "w", encoding="ascii") as f:
        f.write(f"[generic]\nlistenaddr = 127.0.0.1\nport = {port}\n")
        if at.path:
            f.write(f"unixsock = {at.path}\n")
        f.write(f"[{EXPORT}]\nexportname = {file}\n")
    return ["nbd-server", "-C", conf, "-p", f"{folder}/pid"]


def _ceiling(extra):
    def command(b, at, file, _folder):
        where = ["--unix", at.path] if at.path else ["--port", str(at.port)]
        return [f"{b}/ceiling", *extra, *where, file]
    return command


# name: (command line, version command); 'peer' servers are what nbdrs is compared with.
COMMANDS = {
    "nbdrs": (_nbdrs([]), ["{build}/nbdrsd", "--version"]),
    "nbdrs-epoll": (_nbdrs(["--io-engine=epoll"]), ["{build}/nbdrsd", "--version"]),
    "qemu-threads": (_qemu("threads"), ["qemu-nbd", "--version"]),
    "qemu-uring": (_qemu("io_uring"), ["qemu-nbd", "--version"]),
    "nbdkit": (_nbdkit, ["nbdkit", "--version"]),
    "nbd-server": (_nbd_server, ["nbd-server", "-V"]),
    "ceiling": (_ceiling([]), None),
    "ceiling-spin": (_ceiling(["--spin", "50"]), None),
    "ceiling-mmap": (_ceiling(["--mmap", "--spin", "50"]), None),
}
PEERS = ("qemu-threads", "qemu-uring", "nbdkit", "nbd-server")
DEFAULT = ("nbdrs", *PEERS, "ceiling")
QUICK = ("nbdrs", "qemu-uring", "nbdkit", "nbd-server", "ceiling")
DETACHES = ("nbd-server",)


def binary(name, build):
    """Path of the program behind a server's name, or None when it is not there."""
    if name.startswith("nbdrs"):
        path = f"{build}/nbdrsd"
    elif name.startswith("ceiling"):
        path = f"{build}/ceiling"
    else:
        path = "qemu-nbd" if name.startswith("qemu") else name
    return shutil.which(path)


def version(name, build):
    """What the server says about its version, one line; '' when it has nothing to say."""
    command = COMMANDS[name][1]
    if command is None:
        return ""
    done = subprocess.run([c.format(build=build) for c in command], check=False, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0] if lines else ""


class Address:
    """Where a server listens: path of a unix socket, or a TCP port of 127.0.0.1."""

    def __init__(self, transport, folder):
        self.path = f"{folder}/nbd.sock" if transport == "unix" else None
        self.port = None if self.path else free_port()

    def load_args(self):
        """The same for nbdload."""
        where = ["--unix", self.path] if self.path else ["--tcp", f"127.0.0.1:{self.port}"]
        return [*where, "--export", EXPORT]

    def greeting(self):
        """Connect and wait for the first byte: the server is there. OSError if it is not."""
        family = socket.AF_UNIX if self.path else socket.AF_INET
        with socket.socket(family) as s:
            s.settimeout(READY_SECONDS)
            s.connect(self.path or ("127.0.0.1", self.port))
            if not s.recv(18):
                raise ConnectionResetError("closed without a greeting")


class Server:
    """A running server; use as a context manager, in a folder of its own."""

    def __init__(self, name, build, transport, file, folder, cpus=None):
        self.name = name
        self.at = Address(transport, folder)
        self.pid = None
        self._log = f"{folder}/log"
        self._folder = folder
        command = COMMANDS[name][0](build, self.at, file, folder)
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=lambda: self._prepare(cpus))
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        if self.name in DETACHES:  # it has made a session of its own: give it what the others have
            procstat.group_priority(self.pid, procstat.group_priority("self"))

    @staticmethod
    def _prepare(cpus):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        if cpus:
            os.sched_setaffinity(0, cpus)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def _fail(self, what):
        with open(self._log, encoding="utf-8", errors="replace") as f:
            said = f.read().strip()[-1000:]
        return ServerError(f"{self.name} {what}: {' '.join(self._process.args)}\n{said}")

    def _find_pid(self):
        """The serving process; None while a detaching server has not written its pid file."""
        if self.name not in DETACHES:
            return self._process.pid
        try:
            with open(f"{self._folder}/pid", encoding="ascii") as f:
                return int(f.read().split()[0])
        except (FileNotFoundError, IndexError, ValueError):
            return None

    def _wait_ready(self):
        limit = time.monotonic() + READY_SECONDS
        while True:
            code = self._process.poll()
            if code is not None and (code != 0 or self.name not in DETACHES):
                raise self._fail(f"ended with status {code} instead of serving")
            self.pid = self._find_pid()
            if self.pid is not None:
                try:
                    self.at.greeting()
                    return
                except OSError as e:
                    why = e
            else:
                why = "no pid file"
            if time.monotonic() > limit:
                raise self._fail(f"is not ready after {READY_SECONDS} s ({why})")
            time.sleep(0.005)

    def alive(self):
        """Raise ServerError when the server has ended."""
        gone = self._process.poll() is not None if self.name not in DETACHES else \
            not os.path.exists(f"/proc/{self.pid}")
        if gone:
            raise self._fail("ended under load")

    def stop(self):
        """End the server and whatever it has forked."""
        pid = self.pid or self._find_pid()
        pids = procstat.family(pid) if pid and os.path.exists(f"/proc/{pid}") else []
        for sig in (signal.SIGTERM, signal.SIGKILL):
            if sig == signal.SIGKILL:
                print(f"bench: {self.name} did not end within {STOP_SECONDS} s of SIGTERM",
                      file=sys.stderr)
            for p in pids:
                try:
                    os.kill(p, sig)
                except ProcessLookupError:
                    pass
            limit = time.monotonic() + STOP_SECONDS
            while pids and time.monotonic() < limit:
                pids = [p for p in pids if not self._reaped(p)]
                if pids:
                    time.sleep(0.002)
            if not pids:
                break
        self._process.wait()

    def _reaped(self, pid):
        if pid == self._process.pid:
            return self._process.poll() is not None
        try:
            return os.waitpid(pid, os.WNOHANG)[0] == pid
        except ChildProcessError:  # its parent, not we, has reaped it or will
            return not os.path.exists(f"/proc/{pid}")
