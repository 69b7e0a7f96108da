# SPDX-License-Identifier: GPL-3.0-or-later
"""The systems that remote.py compares, and the stores below them, which count what they are asked for.

Every system keeps a volume in the same bucket, below a prefix of its own, in its own format. None
may answer a flush before the data is in the store, unless it says so by `honest=False`: such a one is
shown, and not compared.
"""

import base64
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import xml.sax.saxutils

import procstat

_INT = os.path.join(os.path.dirname(os.path.realpath(__file__)), os.pardir, "int")
sys.path.append(_INT)
import s3client  # noqa: E402 pylint: disable=wrong-import-position

# Not by its name: there is a servers.py here, too.
_spec = importlib.util.spec_from_file_location("int_servers", f"{_INT}/servers.py")
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)

READY_SECONDS = 30
STOP_SECONDS = 60
KEYS_PER_DELETE = 1000
EXPORT = "disk"


class RemoteError(Exception):
    """A system did not start, or died; the text says which and why."""


# ---- stores ----

class CountedRadosGW(fixtures.RadosGW):
    """A RadosGW of our own that can be asked for its counters."""

    def spawn(self, name, argv, env=None):
        if name == "rgw":
            argv = [*argv, f"--admin-socket={self.dir}/rgw.asok"]
        return super().spawn(name, argv, env)

    def counters(self):
        """(requests, bytes of objects that were sent out, bytes of objects that came in) so far."""
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(READY_SECONDS)
            s.connect(f"{self.dir}/rgw.asok")
            s.sendall(b'{"prefix": "perf dump"}\0')
            length = struct.unpack(">I", s.recv(4, socket.MSG_WAITALL))[0]
            rgw = json.loads(s.recv(length, socket.MSG_WAITALL))["rgw"]
        return rgw["req"], rgw["get_b"], rgw["put_b"]

    def cpu_seconds(self):
        """Of the gateway and what is behind it."""
        return sum(procstat.cpu_seconds(p.pid) for p in self.processes.values())

    def pin(self, cpus):
        """Run on these processors only."""
        for p in self.processes.values():
            procstat.pin(p.pid, cpus)

    def remove(self, prefix):
        """Delete every object below prefix, a thousand with each request."""
        with s3client.S3(self.endpoint, self.access, self.secret) as s3:
            keys = list(s3.list(self.bucket, prefix))
            for at in range(0, len(keys), KEYS_PER_DELETE):
                names = "".join(f"<Object><Key>{xml.sax.saxutils.escape(k)}</Key></Object>"
                                for k in keys[at:at + KEYS_PER_DELETE])
                body = f"<Delete><Quiet>true</Quiet>{names}</Delete>".encode()
                digest = base64.b64encode(hashlib.md5(body).digest()).decode()
                s3.must("POST", f"/{self.bucket}", [("delete", "")], body, {"Content-MD5": digest})


class CountedNginx(fixtures.Nginx):
    """nginx, whose access log is the count."""

    def __init__(self):
        self._seen = 0
        self._total = [0, 0]
        super().__init__()

    def counters(self):
        """(requests, bytes sent, 0) so far."""
        with open(f"{self.dir}/access.log", encoding="ascii", errors="replace") as f:
            f.seek(self._seen)
            for line in f:
                self._total[0] += 1
                self._total[1] += int(line.split(" ", 3)[2])
            self._seen = f.tell()
        return self._total[0], self._total[1], 0

    def cpu_seconds(self):
        """Of nginx."""
        return sum(procstat.cpu_seconds(p.pid) for p in self.processes.values())


class Files:
    """A store that is a folder here: nobody else works for it, nothing is counted."""

    @staticmethod
    def counters():
        """Nothing to count."""
        return 0, 0, 0

    @staticmethod
    def cpu_seconds():
        """Of nobody."""
        return 0

    def stop(self):
        """Nothing to stop."""


# ---- systems ----

@dataclasses.dataclass
class Place:
    """Where a system's volume is: the store, a prefix in its bucket, the size in bytes."""

    store: object
    prefix: str
    size: int


def _nbdrs(objects, driver="sharded"):
    def command(b, place, folder):
        conn = f"s3:{place.store.url(place.prefix)}"
        chain = f"{driver}[size={objects}]" if objects else driver
        return [f"{b}/nbdrsd", "-e", EXPORT, chain, conn, "--unix", f"{folder}/nbd.sock",
                "--listen", "none", "--control", f"{folder}/control.sock"]

    def create(b, place, _folder):
        chain = f"{driver}[size={objects}]" if objects else driver
        return [f"{b}/nbdrsd", "init", "--size", str(place.size), chain,
                f"s3:{place.store.url(place.prefix)}"]
    return command, create


def _nbdrs_cache(is_above, journal="1Gi"):
    def command(b, place, folder):
        # All of a volume fits into the memory.
        cache = f"cache[disk={folder}/journal,size={journal},mode=writeback,mem=512Mi]"
        s3 = f"s3:{place.store.url(place.prefix)}"
        words = [cache, f"sharded:{s3}"] if is_above else ["sharded", f"{cache}:{s3}"]
        return [f"{b}/nbdrsd", "-e", EXPORT, *words, "--unix", f"{folder}/nbd.sock", "--listen", "none",
                "--control", f"{folder}/control.sock"]
    return command, _nbdrs("")[1]


def _nbdrs_file(b, place, folder):
    return [f"{b}/nbdrsd", "-e", EXPORT, "raw", f"file:{place.prefix}", "--unix", f"{folder}/nbd.sock",
            "--listen", "none", "--control", f"{folder}/control.sock"]


def _s3backer(block, *options):
    def command(_b, place, folder):
        # Not in the command line: a file that only we can read.
        with open(os.open(f"{folder}/keys", os.O_WRONLY | os.O_CREAT, 0o600), "w",
                  encoding="ascii") as f:
            f.write(f"{place.store.access}:{place.store.secret}\n")
        os.makedirs(f"{folder}/mnt")
        return ["s3backer", "-f", f"--baseURL={place.store.endpoint}/",
                f"--accessFile={folder}/keys", f"--prefix={place.prefix}", f"--size={place.size}",
                f"--blockSize={block}", "--quiet", "-o", "big_writes", *options,
                place.store.bucket, f"{folder}/mnt"]
    return command, None


# Every write waits for its PUT, and nothing waits for the MD5 of a recent write of the same block.
S3BACKER_HONEST = ("--blockCacheSync", "--blockCacheWriteDelay=0", "--md5CacheSize=0",
                   "--md5CacheTime=0", "--minWriteDelay=0")


def _nbdkit_s3(objects, filters=()):
    # The plugin forbids requests smaller than an object, which libnbd obeys; it can serve them.
    def command(_b, place, folder):
        return ["nbdkit", "-f", "-U", f"{folder}/nbd.sock", "-t", "16", "--filter=blocksize-policy",
                *[f"--filter={f}" for f in filters], "S3",
                f"endpoint-url={place.store.endpoint}", f"bucket={place.store.bucket}",
                f"key={place.prefix.rstrip('/')}", f"size={place.size}", f"object-size={objects}",
                "blocksize-minimum=1"]
    return command, None


def _nbdrs_http(b, place, folder):
    return [f"{b}/nbdrsd", "-e", EXPORT, "raw", f"{place.store.url}/{place.prefix}",
            "--unix", f"{folder}/nbd.sock", "--listen", "none",
            "--control", f"{folder}/control.sock"]


def _nbdkit_curl(_b, place, folder):
    return ["nbdkit", "-f", "-r", "-U", f"{folder}/nbd.sock", "-t", "16", "curl",
            f"url={place.store.url}/{place.prefix}"]


@dataclasses.dataclass(frozen=True)
class System:
    """One way to have a volume in a store."""

    name: str
    note: str  # what is not default, and why
    make: tuple  # (command line of the server, command line that creates the volume or None)
    program: str
    is_ours: bool = False
    honest: bool = True  # an answered flush means that the data is in the store
    is_measure: bool = False  # neither ours nor a peer: there for others to be held to
    fill_as: str = ""  # the system that fills the volume, where this one would take too long

    def uses_fuse(self):
        """Whether the volume is a file in a FUSE mount, not an NBD export."""
        return self.program == "s3backer"


SYSTEMS = {s.name: s for s in (
    System("nbdrs", "4 MiB objects, the default", _nbdrs(""), "nbdrsd", is_ours=True),
    System("nbdrs-64k", "64 KiB objects", _nbdrs("64Ki"), "nbdrsd", is_ours=True),
    System("nbdrs-4k", "4 KiB objects", _nbdrs("4Ki"), "nbdrsd", is_ours=True),
    # What a flush answers is in the journal, and in the store a little later.
    System("nbdrs-cache", "write-back cache with a journal on disk, below the mapping", _nbdrs_cache(False),
           "nbdrsd", is_ours=True, honest=False, fill_as="nbdrs"),
    System("nbdrs-cache-above", "the same above the mapping", _nbdrs_cache(True), "nbdrsd", is_ours=True,
           honest=False, fill_as="nbdrs"),
    System("nbdrs-cache-64m", "below the mapping, with a journal of 64 MiB, which the writes outrun",
           _nbdrs_cache(False, "64Mi"), "nbdrsd", is_ours=True, honest=False, fill_as="nbdrs"),
    System("nbdrs-file", "raw file on the journal's disk", (_nbdrs_file, None), "nbdrsd", is_measure=True),
    System("plain", "curl, 16 parallel requests of whole objects of 4 MiB", (None, None), "curl",
           is_measure=True, fill_as="nbdrs"),
    System("plain-unsigned", "the same, the body's hash left out", (None, None), "curl",
           is_measure=True, fill_as="nbdrs"),
    System("s3backer-4k", "4 KiB objects, synchronous", _s3backer("4k", *S3BACKER_HONEST),
           "s3backer"),
    System("s3backer-64k", "64 KiB objects, synchronous", _s3backer("64k", *S3BACKER_HONEST),
           "s3backer", fill_as="s3backer-64k-cached"),
    # FUSE brings 128 KiB at a time.
    System("s3backer-128k", "128 KiB objects, synchronous", _s3backer("128k", *S3BACKER_HONEST),
           "s3backer", fill_as="s3backer-128k-cached"),
    System("s3backer-64k-cached", "64 KiB objects, write-back cache; flush does nothing",
           _s3backer("64k", "--blockCacheSize=8000"), "s3backer", honest=False),
    System("s3backer-128k-cached", "128 KiB objects, write-back cache; flush does nothing",
           _s3backer("128k", "--blockCacheSize=4000", "--readAhead=16"), "s3backer", honest=False),
    System("s3backer-1m-cached", "1 MiB objects, write-back cache, read-ahead of 16; flush does "
           "nothing", _s3backer("1M", "--blockCacheSize=500", "--readAhead=16"), "s3backer",
           honest=False),
    System("nbdkit-s3-4k", "4 KiB objects", _nbdkit_s3("4k"), "nbdkit"),
    System("nbdkit-s3-64k", "64 KiB objects, its largest", _nbdkit_s3("64k"), "nbdkit"),
    System("nbdkit-s3-64k-cache", "64 KiB objects, filter cache: written at a flush",
           _nbdkit_s3("64k", ("cache",)), "nbdkit", fill_as="nbdkit-s3-64k"),
    System("nbdkit-s3-64k-ahead", "64 KiB objects, filters readahead and cache",
           _nbdkit_s3("64k", ("readahead", "cache")), "nbdkit", fill_as="nbdkit-s3-64k"),
    System("nbdrs-http", "raw over http", (_nbdrs_http, None), "nbdrsd", is_ours=True),
    System("nbdkit-curl", "curl plugin", (_nbdkit_curl, None), "nbdkit"),
)}


def lacks(system, build):
    """What is missing to run a system; '' when nothing is."""
    if system.program == "nbdrsd":
        return "" if os.access(f"{build}/nbdrsd", os.X_OK) else f"{build}/nbdrsd (make)"
    if not shutil.which(system.program):
        return f"the package {system.program}"
    if system.uses_fuse() and not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse (load the module fuse; in a container, hand the device in)"
    if system.name.startswith("nbdkit-s3"):
        done = subprocess.run(["nbdkit", "--dump-plugin", "S3"], check=False, capture_output=True)
        if done.returncode:
            return "nbdkit's S3 plugin (packages nbdkit-plugin-python, python3-boto3)"
    if system.name == "nbdkit-curl":
        done = subprocess.run(["nbdkit", "--dump-plugin", "curl"], check=False, capture_output=True)
        if done.returncode:
            return "nbdkit's curl plugin (package nbdkit)"
    return ""


def version(program, build):
    """One line."""
    path = f"{build}/nbdrsd" if program == "nbdrsd" else program
    done = subprocess.run([path, "--version"], check=False, text=True, stdin=subprocess.DEVNULL,
                          capture_output=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0] if lines else "?"


class Running:
    """A system that serves its volume; a context manager, in a folder of its own."""

    def __init__(self, system, build, place, folder, is_new=False):
        self.system = system
        self._folder = folder
        self._log = f"{folder}/log"
        env = dict(os.environ, AWS_DEFAULT_REGION="us-east-1")
        if hasattr(place.store, "access"):
            env.update(AWS_ACCESS_KEY_ID=place.store.access,
                       AWS_SECRET_ACCESS_KEY=place.store.secret)
        serve, create = system.make
        if is_new and create:
            done = subprocess.run(create(build, place, folder), check=False, text=True, env=env,
                                  stdin=subprocess.DEVNULL, capture_output=True)
            if done.returncode:
                raise RemoteError(f"{system.name}: cannot create the volume: {done.stderr.strip()}")
        self._log_file = open(self._log, "wb")  # pylint: disable=consider-using-with
        self._process = subprocess.Popen(serve(build, place, folder), stdin=subprocess.DEVNULL,
                                         stdout=self._log_file, stderr=self._log_file, env=env,
                                         preexec_fn=fixtures.die_with_parent)
        self.pid = self._process.pid
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def file(self):
        """The volume, of a system that uses FUSE."""
        return f"{self._folder}/mnt/file"

    @property
    def socket(self):
        """Where the NBD server listens."""
        return f"{self._folder}/nbd.sock"

    def _fail(self, what):
        with open(self._log, encoding="utf-8", errors="replace") as f:
            said = f.read().strip()[-1500:]
        return RemoteError(f"{self.system.name} {what}\n{said}")

    def _is_ready(self):
        if self.system.uses_fuse():
            return os.path.exists(self.file)
        try:
            with socket.socket(socket.AF_UNIX) as s:
                s.settimeout(READY_SECONDS)
                s.connect(self.socket)
                return len(s.recv(18, socket.MSG_WAITALL)) == 18
        except OSError:
            return False

    def _wait_ready(self):
        limit = time.monotonic() + READY_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None:
                raise self._fail(f"ended with status {self._process.returncode}")
            if time.monotonic() > limit:
                raise self._fail(f"is not ready after {READY_SECONDS} s")
            time.sleep(0.01)

    def alive(self):
        """Raise RemoteError when it has ended."""
        if self._process.poll() is not None:
            raise self._fail(f"ended under load with status {self._process.returncode}")

    def stop(self):
        """End it in the orderly way: what it has cached is in the store afterwards."""
        if self.system.uses_fuse() and self._process.poll() is None:
            # A lazy one if somebody still looks at it: the process must end in any case.
            if subprocess.run(["umount", f"{self._folder}/mnt"], check=False,
                              capture_output=True).returncode:
                subprocess.run(["umount", "-l", f"{self._folder}/mnt"], check=False,
                               capture_output=True)
        elif self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"bench: {self.system.name} did not end within {STOP_SECONDS} s",
                  file=sys.stderr)
            self._process.kill()
            self._process.wait()
        self._log_file.close()
