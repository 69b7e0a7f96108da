# SPDX-License-Identifier: GPL-3.0-or-later
"""What the integration tests share: a daemon of their own, a raw NBD client, and a list of cases.

Environment: BUILD (folder with nbdrsd, default build), NBDRS_IO_ENGINE (default auto), CI.

    from nbdrs_test import Daemon, Nbd, Suite

    suite = Suite()

    @suite.case
    def reads_back_what_was_written(): ...

    suite.main()

Nothing sleeps: a daemon is ready when it says so, everything else is waited for by reading a socket.
Every wait has a limit, so a test fails rather than hangs.
"""

import atexit
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback

BUILD = os.path.abspath(os.environ.get("BUILD", "build"))
ENGINE = os.environ.get("NBDRS_IO_ENGINE", "auto")
# Generous: sanitizers are slow, and a limit that is met means a failure anyway.
WAIT_S = 30

# Sanitizers keep freed memory for a while: then limits on memory say nothing.
SANITIZED = "ASAN_OPTIONS" in os.environ or "TSAN_OPTIONS" in os.environ

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# --- The protocol's numbers (NBD proto.md), written down anew: a test must not trust the daemon's ---

NBDMAGIC = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
REP_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

FIXED_NEWSTYLE, NO_ZEROES = 1, 2

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO = 1, 2, 3, 5, 6, 7
OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT = 8, 9, 10
OPT_EXTENDED_HEADERS = 11

REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
REP_ERR = 1 << 31
ERR_UNSUP, ERR_POLICY, ERR_INVALID = REP_ERR + 1, REP_ERR + 2, REP_ERR + 3
ERR_TLS_REQD, ERR_UNKNOWN, ERR_SHUTDOWN = REP_ERR + 5, REP_ERR + 6, REP_ERR + 7
ERR_BLOCK_SIZE_REQD, ERR_TOO_BIG = REP_ERR + 8, REP_ERR + 9

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, ROTATIONAL, SEND_TRIM = (1 << i for i in range(6))
SEND_WRITE_ZEROES, SEND_DF, CAN_MULTI_CONN, SEND_RESIZE = (1 << i for i in range(6, 10))
SEND_CACHE, SEND_FAST_ZERO = 1 << 10, 1 << 11

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = (1 << i for i in range(5))

CHUNK_DONE = 1
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_BLOCK_STATUS = 0, 1, 2, 5
CHUNK_ERROR, CHUNK_ERROR_OFFSET = 0x8001, 0x8002

EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = (
    1, 5, 12, 22, 28, 75, 95, 108)


class Skip(Exception):
    """A prerequisite is missing; the text says which."""


class Closed(Exception):
    """The server closed the connection."""


# --- Folders and daemons ---------------------------------------------------------------------------


def temp_dir(within=None):
    """A folder of this test's own, removed at its end. Short: a socket's path has at most 107 bytes."""
    path = tempfile.mkdtemp(prefix="nbdrs-", dir=within)
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def tmpfs_dir():
    """The same in memory."""
    with open("/proc/mounts") as f:
        if not any(l.split()[1:3] == ["/dev/shm", "tmpfs"] for l in f):
            raise Skip("/dev/shm is not a tmpfs")
    return temp_dir("/dev/shm")


class Daemon:
    """A running nbdrsd.

    exports: list of (NAME, DRIVER, CONN); args: further words of the command line. Listens on a unix
    socket (.unix) and, with tcp=True, on a port of 127.0.0.1 that the kernel picks (.port). .control is
    the control socket. Usable in a `with`; leaving it stops the daemon and insists on a clean exit.
    `shell` is run by sh before the daemon takes its place, `fd` is passed on as descriptor 3; `wrap` is a
    list of words before the command line, of a program that executes what follows;
    `env` is its whole environment; listen=False leaves out all listeners. With ready=False it returns at
    once: see wait() and .text().
    """

    running = []

    def __init__(self, exports, args=(), tcp=False, shell=None, fd=None, listen=True, ready=True,
                 wrap=(), env=None):
        self.dir = temp_dir()
        self.unix = os.path.join(self.dir, "nbd.sock")
        self.control = os.path.join(self.dir, "ctl.sock")
        self.port = None
        self.log = []
        self.log_changed = threading.Condition()
        self.argv = [os.path.join(BUILD, "nbdrsd")]
        for name, driver, conn in exports:
            self.argv += ["-e", name, driver, conn]
        if listen:
            self.argv += ["--unix", self.unix, "--listen", "127.0.0.1:0" if tcp else "none"]
        self.argv += ["--control", self.control, f"--io-engine={ENGINE}", *args]
        if fd is not None:
            shell = f"{shell or ':'}; exec 3<&{fd}"
        if shell:
            self.argv = ["sh", "-c", f'{shell}; exec "$@"', "sh", *self.argv]
        self.argv = [*wrap, *self.argv]
        self.process = subprocess.Popen(
            self.argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=env, pass_fds=() if fd is None else (fd,))
        Daemon.running.append(self)
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()
        if ready:
            self.wait_log(r"\bready version=")
            if tcp:
                line = self.wait_log(r"listening address=127\.0\.0\.1:(\d+)")
                self.port = int(line.group(1))

    def read_log(self):
        for line in self.process.stderr:
            with self.log_changed:
                self.log.append(line.decode(errors="replace").rstrip("\n"))
                self.log_changed.notify_all()
        with self.log_changed:
            self.log.append(None)  # the end
            self.log_changed.notify_all()

    def wait_log(self, pattern, start=0):
        """The first match in the log from line `start` on; waits for it."""
        deadline = time.monotonic() + WAIT_S
        with self.log_changed:
            at = start
            while True:
                for line in self.log[at:]:
                    if line is None:
                        raise AssertionError(f"the daemon ended without saying {pattern!r}:\n" + self.text())
                    found = re.search(pattern, line)
                    if found:
                        return found
                at = len(self.log)
                if not self.log_changed.wait(deadline - time.monotonic()):
                    raise AssertionError(f"the daemon does not say {pattern!r}:\n" + self.text())

    def text(self):
        return "\n".join(l for l in self.log if l is not None)

    def send_signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def wait(self):
        """Its exit code; everything it said is in .log then."""
        code = self.process.wait(WAIT_S)
        self.reader.join(WAIT_S)
        self.process.stderr.close()
        if self in Daemon.running:
            Daemon.running.remove(self)
        return code

    def stop(self, number=signal.SIGTERM):
        """Ends it as a service manager would; it must leave with 0."""
        if self.process.poll() is None:
            self.send_signal(number)
        code = self.wait()
        assert code == 0, f"nbdrsd ended with {code}:\n" + self.text()

    def memory_kib(self):
        """Private memory: anonymous pages, KiB."""
        with open(f"/proc/{self.process.pid}/smaps_rollup") as f:
            return int(re.search(r"^Anonymous: +(\d+) kB", f.read(), re.M).group(1))

    def fds(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def kill(self):
        """Without ceremony, for a test that failed."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait()

    def __enter__(self):
        return self

    def __exit__(self, kind, value, tb):
        if kind is None:
            self.stop()
            return
        self.kill()
        sys.stdout.write("".join(f"# nbdrsd: {l}\n" for l in self.log[-40:] if l is not None))


@atexit.register
def end_daemons():
    for d in list(Daemon.running):
        d.kill()


# --- A client --------------------------------------------------------------------------------------


class Nbd:
    """A raw client: says exactly what it is told, right or wrong.

    Where: a socket's path, or a port of 127.0.0.1. Nothing is negotiated before start() or connect().
    """

    def __init__(self, where):
        if isinstance(where, int):
            self.s = socket.create_connection(("127.0.0.1", where), WAIT_S)
            self.s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            self.s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.s.settimeout(WAIT_S)
            self.s.connect(where)
        self.structured = False
        self.size = self.flags = None
        self.cookie = 0x1234567800000000

    # Bytes.

    def send(self, *parts):
        self.s.sendall(b"".join(parts))

    def recv(self, n):
        data = bytearray(n)
        view, got = memoryview(data), 0
        while got < n:
            try:
                part = self.s.recv_into(view[got:])
            except (ConnectionResetError, BrokenPipeError):
                part = 0
            if not part:
                raise Closed(f"after {got} of {n} bytes")
            got += part
        return bytes(data)

    def must_be_closed(self):
        """The server has closed, without another byte."""
        try:
            data = self.recv(1)
        except Closed:
            return
        raise AssertionError(f"the connection is open: got {data!r}")

    def close(self):
        self.s.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # Negotiation.

    def start(self, flags=FIXED_NEWSTYLE | NO_ZEROES):
        """Takes the greeting, sends the flags."""
        assert self.recv(16) == NBDMAGIC + IHAVEOPT
        (offered,) = struct.unpack(">H", self.recv(2))
        self.send(struct.pack(">I", flags))
        return offered

    @staticmethod
    def option(code, data=b"", length=None, magic=IHAVEOPT):
        """An option's bytes."""
        return magic + struct.pack(">II", code, len(data) if length is None else length) + data

    @staticmethod
    def info_data(name, infos=()):
        name = name.encode()
        return struct.pack(f">I{len(name)}sH{len(infos)}H", len(name), name, len(infos), *infos)

    @staticmethod
    def meta_data(name, queries=()):
        name = name.encode()
        data = struct.pack(f">I{len(name)}sI", len(name), name, len(queries))
        for q in queries:
            data += struct.pack(">I", len(q)) + q.encode()
        return data

    def rep(self, option):
        """One reply to `option`: (type, data)."""
        magic, echo, kind, length = struct.unpack(">QIII", self.recv(20))
        assert magic == REP_MAGIC, hex(magic)
        assert echo == option, f"reply to option {echo}, not {option}"
        assert length < 65536, length
        return kind, self.recv(length)

    def answer(self, option):
        """All replies to `option` up to the ACK or error that ends them: ([(type, data)], end)."""
        found = []
        while True:
            kind, data = self.rep(option)
            if kind == REP_ACK:
                assert data == b""
            if kind == REP_ACK or kind & REP_ERR:
                return found, kind
            found.append((kind, data))

    def ask(self, option, data=b""):
        self.send(self.option(option, data))
        return self.answer(option)

    def info(self, name, infos=(), option=OPT_INFO):
        """INFO or GO: ({information type: data}, end)."""
        found, end = self.ask(option, self.info_data(name, infos))
        assert all(kind == REP_INFO for kind, _ in found), found
        got = {struct.unpack(">H", data[:2])[0]: data[2:] for _, data in found}
        assert len(got) == len(found), "an information came twice"
        return got, end

    def go(self, name, infos=()):
        got, end = self.info(name, infos, OPT_GO)
        assert end == REP_ACK, hex(end)
        self.size, self.flags = struct.unpack(">QH", got[INFO_EXPORT])
        return got

    def use_structured(self):
        assert self.ask(OPT_STRUCTURED_REPLY) == ([], REP_ACK)
        self.structured = True

    def set_context(self, name, queries=("base:allocation",)):
        """{name: id}"""
        found, end = self.ask(OPT_SET_META_CONTEXT, self.meta_data(name, queries))
        assert end == REP_ACK, hex(end)
        return {d[4:].decode(): struct.unpack(">I", d[:4])[0] for _, d in found}

    @classmethod
    def connect(cls, where, name, structured=False, context=False):
        """Everything up to the transmission phase."""
        c = cls(where)
        try:
            c.start()
            if structured or context:
                c.use_structured()
            if context:
                c.context = c.set_context(name)["base:allocation"]
            c.go(name)
        except BaseException:
            c.close()
            raise
        return c

    # Transmission.

    def request(self, kind, off=0, length=0, flags=0, cookie=None, magic=REQUEST_MAGIC):
        """A request's bytes; a WRITE's payload is for the caller. Sets .cookie."""
        if cookie is None:
            self.cookie += 1
            cookie = self.cookie
        return struct.pack(">IHHQQI", magic, flags, kind, cookie, off, length)

    def simple(self):
        """A simple reply: (error, cookie)."""
        magic, error, cookie = struct.unpack(">IIQ", self.recv(16))
        assert magic == SIMPLE_MAGIC, hex(magic)
        return error, cookie

    def chunk(self):
        """A structured reply's chunk: (flags, type, cookie, payload)."""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.recv(20))
        assert magic == CHUNK_MAGIC, hex(magic)
        assert not flags & ~CHUNK_DONE, flags
        assert length <= 64 * MIB, length
        return flags, kind, cookie, self.recv(length)

    def chunks(self, cookie=None):
        """All chunks of one structured reply, nothing of others between: [(type, payload)]."""
        cookie = self.cookie if cookie is None else cookie
        found = []
        while True:
            flags, kind, echo, payload = self.chunk()
            assert echo == cookie, f"cookie {echo:x}, not {cookie:x}"
            found.append((kind, payload))
            if flags & CHUNK_DONE:
                return found

    @staticmethod
    def chunk_error(found):
        """The error in a structured reply, 0 without one; checks how error chunks are made."""
        error = 0
        for kind, payload in found:
            if kind not in (CHUNK_ERROR, CHUNK_ERROR_OFFSET):
                continue
            error, length = struct.unpack(">IH", payload[:6])
            assert error != 0
            assert length <= 4096
            assert len(payload) == 6 + length + (8 if kind == CHUNK_ERROR_OFFSET else 0)
            payload[6:6 + length].decode()
        return error

    def reply(self, kind, off=0, length=0):
        """The reply to the last request: (error, data or None)."""
        peek = self.s.recv(4, socket.MSG_PEEK | socket.MSG_WAITALL)
        if len(peek) < 4:
            raise Closed("instead of a reply")
        if struct.unpack(">I", peek)[0] == SIMPLE_MAGIC:
            assert not (self.structured and kind in (READ, BLOCK_STATUS)), "a simple reply"
            error, cookie = self.simple()
            assert cookie == self.cookie, f"cookie {cookie:x}, not {self.cookie:x}"
            return error, self.recv(length) if kind == READ and not error else None
        assert self.structured, "a structured reply that was not negotiated"
        found = self.chunks()
        return self.chunk_error(found), self.assemble(found, off, length) if kind == READ else found

    def assemble(self, found, off, length):
        """The data of a structured READ reply; None when it holds an error."""
        if self.chunk_error(found):
            return None
        parts = []
        for kind, payload in found:
            if kind == CHUNK_NONE:
                assert payload == b""
            if kind == CHUNK_DATA:
                parts.append((struct.unpack(">Q", payload[:8])[0], payload[8:]))
            elif kind == CHUNK_HOLE:
                at, n = struct.unpack(">QI", payload)
                assert n <= length, n
                parts.append((at, bytes(n)))
        at = off
        for start, data in sorted(parts):
            assert start == at, f"chunk at {start} instead of {at}: they overlap or leave a gap"
            assert data, "an empty chunk"
            at += len(data)
        assert at == off + length, f"the chunks end at {at} instead of {off + length}"
        return b"".join(data for _, data in sorted(parts))

    def do(self, kind, off=0, length=0, flags=0, data=b""):
        """A request and its reply: the error, 0 = success."""
        self.send(self.request(kind, off, length or len(data), flags), data)
        return self.reply(kind, off, length or len(data))[0]

    def read(self, off, length, flags=0):
        self.send(self.request(READ, off, length, flags))
        error, data = self.reply(READ, off, length)
        assert error == 0, f"READ {off}+{length}: error {error}"
        return data

    def write(self, off, data, flags=0):
        error = self.do(WRITE, off, len(data), flags, data)
        assert error == 0, f"WRITE {off}+{len(data)}: error {error}"

    def block_status(self, off, length, flags=0):
        """[(length, flags)] of base:allocation."""
        self.send(self.request(BLOCK_STATUS, off, length, flags))
        error, found = self.reply(BLOCK_STATUS)
        assert error == 0, f"BLOCK_STATUS {off}+{length}: error {error}"
        assert [kind for kind, _ in found if kind != CHUNK_NONE] == [CHUNK_BLOCK_STATUS], found
        payload = [p for kind, p in found if kind == CHUNK_BLOCK_STATUS][0]
        assert struct.unpack(">I", payload[:4])[0] == self.context
        assert len(payload) > 4 and len(payload) % 8 == 4
        return list(struct.iter_unpack(">II", payload[4:]))

    def disconnect(self):
        """DISC, and the server closes without a word."""
        self.send(self.request(DISC))
        self.must_be_closed()
        self.close()


# --- Cases -----------------------------------------------------------------------------------------


class Suite:
    """Runs cases in order, a line each, and ends with the sum that tests/run/suite reads."""

    def __init__(self):
        self.cases = []

    def case(self, fn):
        self.cases.append(fn)
        return fn

    def main(self):
        # So that daemons and folders go also when whoever runs the tests loses patience.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        if not os.access(os.path.join(BUILD, "nbdrsd"), os.X_OK):
            print(f"{BUILD}/nbdrsd is missing (make)")
            sys.exit(1 if os.environ.get("CI") == "true" else 77)
        wanted = sys.argv[1:]
        passed = failed = skipped = 0
        for fn in self.cases:
            name = fn.__name__.replace("_", " ")
            if wanted and not any(w in name for w in wanted):
                continue
            start = time.monotonic()
            try:
                fn()
            except Skip as e:
                skipped += 1
                print(f"skip {name}: {e}", flush=True)
            except Exception:
                failed += 1
                print(f"FAIL {name}", flush=True)
                print("".join(f"     {l}\n" for l in traceback.format_exc().splitlines()), end="", flush=True)
            else:
                passed += 1
                print(f"ok   {name} ({time.monotonic() - start:.2f} s)", flush=True)
        for d in list(Daemon.running):
            try:
                d.stop()  # a leak, say, is noticed only here
            except Exception as e:
                failed += 1
                print(f"FAIL a clean end: {e}")
        print(f"{passed} passed, {failed} failed, {skipped} skipped")
        sys.exit(1 if failed or not passed or (skipped and os.environ.get("CI") == "true") else 0)
