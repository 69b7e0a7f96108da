#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare nbdrs with the NBD servers of Debian: nbdkit, qemu-nbd, nbd-server.

Method
  - All servers serve the same fully allocated file of incompressible data: on tmpfs, on the disk
    with its pages cached, on the disk with its pages dropped (checked with fincore).
  - Each run starts its server afresh. The servers take turns (A B C, B C A, ...), so that a change
    of the machine's mood meets all of them. Reported are medians; the spread is (max - min) of the
    runs, relative to the median.
  - The load comes from nbdload: one thread per connection, blocking receives, all requests that
    are due in one send. A short warm-up precedes the measured time.
  - Two figures count: the rate, and operations per CPU second of the server (user and system time
    of all its processes and threads, over warm-up and measured time). nbdrs is compared with the
    best peer in each, which need not be the same one. 'ceiling' is no peer: it is a bare server
    without features, the yardstick for what the machine allows.
  - A run is disturbed when, on the processors in question, more than a small share of the time was
    neither idle nor spent by server, load generator and this script. Disturbed runs are repeated
    within a budget and left out; where too few clean runs remain, all are used and the figure is
    marked '~'. There, judge by the CPU figure: beside strangers a server with many threads gets
    more of the processors than one with few, whatever it makes of them. --nice helps.
  - Absolute figures belong to the machine. Compare ratios of one and the same run.

Exit status: 0 measured, 1 something failed (or, with --gate, a target was missed), 2 usage.
"""

import dataclasses
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True

import cli  # noqa: E402
import points  # noqa: E402
import procstat  # noqa: E402
import report  # noqa: E402
import servers  # noqa: E402
from cli import say  # noqa: E402

MIB = 1 << 20
RUN_TIMEOUT = 120
IDLE_GIVE_UP = 10  # seconds; a server that has not taken all connections by then is extrapolated
COLD_RESIDENT_MAX = 0.01  # share of the file that may be cached at the start of a cold run
# Share of the processors' time that others may use before a run counts as disturbed. Writing to a
# disk makes the kernel write back beside us, for every server alike.
DISTURBED = {"tmpfs": 0.06, "disk": 0.25, "cold": 0.25}


class BenchError(Exception):
    """The benchmark cannot go on; the text says what is wrong and how to mend it."""


def parse_args():
    p = cli.parser(__doc__, "nbdrsd, nbdload, ceiling", "server", "points",
                   seconds="measured time of a run (0.7; quick: 0.35)",
                   size="of the files (2048; quick: 1024)",
                   disk="a folder on a disk (the build folder)")
    p.add_argument("--quick", action="store_true",
                   help="core points only, 3 short runs, four servers and the ceiling")
    p.add_argument("--servers", metavar="NAME,...", help=f"of {', '.join(servers.COMMANDS)}")
    p.add_argument("--shm-dir", default="/dev/shm", help="a folder on tmpfs")
    args = p.parse_args()
    cli.fill_in(p, args, seconds=(0.7, 0.35), size=(2048, 1024), least=64)
    args.warmup = 0.15 if args.quick else 0.2
    args.points = [q for q in points.POINTS if q.quick or not args.quick]
    if args.only:
        args.points = cli.chosen(p, args.only, points.POINTS)
    args.names = list(servers.QUICK if args.quick else servers.DEFAULT)
    if args.servers:
        args.names = cli.named(p, args.servers, servers.COMMANDS, "server")
    return args


def make_file(folder, size):
    """A fully allocated file of incompressible data; returns its path."""
    free = shutil.disk_usage(folder).free
    if free < size + 64 * MIB:
        raise BenchError(f"{folder} has {free // MIB} MiB free, the benchmark wants "
                         f"{size // MIB + 64}; see --size, --shm-dir, --disk-dir")
    path = os.path.join(folder, "disk.img")
    chunk = bytearray(os.urandom(4 * MIB))
    with open(path, "wb") as f:
        for n in range(0, size, len(chunk)):
            chunk[0:8] = n.to_bytes(8, "little")  # no two chunks alike
            f.write(chunk[:min(len(chunk), size - n)])
        f.flush()
        os.fsync(f.fileno())
    return path


def resident(path):
    """Share of the file's pages that are in the page cache."""
    done = subprocess.run(["fincore", "-b", "-n", "-r", "-o", "RES,SIZE", path], check=True,
                          text=True, capture_output=True)
    cached, size = done.stdout.split()
    return int(cached) / int(size)


def settle(path, storage):
    """Bring the file into the state the point is about: written back, and cached or not."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if storage != "tmpfs":
            os.fsync(fd)
        if storage == "cold":
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        elif resident(path) < 1:
            buf = mmap.mmap(-1, 4 * MIB)
            off = 0
            while n := os.preadv(fd, [buf], off):
                off += n
    finally:
        os.close(fd)


# ---- one run ----

class Bench:
    """What does not change between runs."""

    def __init__(self, args, files, folder):
        self.args = args
        self.files = files  # storage: path
        self.folder = folder
        self.cpus = sorted(os.sched_getaffinity(0))

    def _placement(self, point):
        """(processors of the server, processor of the client, processors to watch)."""
        pin = point.pin()
        if pin == "same":
            return {self.cpus[0]}, self.cpus[0], self.cpus[:1]
        if pin == "split":
            return {self.cpus[0]}, self.cpus[1], self.cpus[:2]
        return None, None, self.cpus

    def _client(self, point):
        a = self.args
        if point.kind == "handshakes":
            return ["--handshakes", "--seconds", str(a.seconds)]
        if point.kind == "idle":
            return ["--idle", "1000", "--max-seconds", str(IDLE_GIVE_UP)]
        cold = point.storage == "cold"
        return [*point.load_args(), "--seconds", str(a.seconds * (1.5 if cold else 1)),
                "--warmup", str(0 if cold else a.warmup)]

    def run(self, point, name):
        """One run of one server at one point: a dict of figures."""
        folder = tempfile.mkdtemp(dir=self.folder)
        file = self.files[point.storage]
        server_cpus, client_cpu, watched = self._placement(point)
        settle(file, point.storage)
        with servers.Server(name, self.args.build, point.transport, file, folder,
                            server_cpus) as server:
            if point.storage == "cold" and (share := resident(file)) > COLD_RESIDENT_MAX:
                raise BenchError(f"{file}: {share:.0%} still cached after POSIX_FADV_DONTNEED; "
                                 "choose a --disk-dir on a disk file system")
            command = [f"{self.args.build}/nbdload", *server.at.load_args(),
                       *self._client(point), "--hold"]
            if client_cpu is not None:
                command += ["--cpu", str(client_cpu)]
            figures = self._measure(server, command, watched, point)
        shutil.rmtree(folder)
        return figures

    def _measure(self, server, command, watched, point):
        memory = procstat.anonymous_bytes(server.pid) if point.kind == "idle" else 0
        cpu = procstat.cpu_seconds(server.pid)
        own = time.process_time()
        idle = procstat.idle_seconds(watched)
        start = time.monotonic()
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True) as client:
            try:
                line = client.stdout.readline()
                wall = time.monotonic() - start
                idle = procstat.idle_seconds(watched) - idle
                cpu = procstat.cpu_seconds(server.pid) - cpu
                own = time.process_time() - own
                if not line:
                    client.wait(RUN_TIMEOUT)
                    server.alive()
                    raise BenchError(f"{server.name} at {point.name}: {' '.join(command)} failed")
                result = json.loads(line)
                if point.kind == "idle":
                    result["processes"], result["server_threads"] = procstat.threads(server.pid)
                    memory = procstat.anonymous_bytes(server.pid) - memory
                    result["bytes_per_connection"] = memory / max(result["opened"], 1)
                client.stdin.close()
                client.wait(RUN_TIMEOUT)
            except BaseException:
                client.kill()
                raise
        if client.returncode != 0 or result.get("errors"):
            raise BenchError(f"{server.name} at {point.name}: {result.get('errors')} error "
                             f"replies, nbdload status {client.returncode}")
        if point.kind == "load" and result["ops"] == 0:
            raise BenchError(f"{server.name} at {point.name}: no request was answered")
        busy = wall * len(watched) - idle
        others = max(0.0, busy - cpu - result["client_cpu_s"] - own)
        result["server_cpu_s"] = cpu
        result["disturbance"] = others / (wall * len(watched))
        result["disturbed"] = result["disturbance"] > DISTURBED[point.storage]
        return result


# ---- all runs ----

def enough(runs, wanted):
    """Whether the clean runs among them are a majority of the wanted number."""
    return sum(not r["disturbed"] for r in runs) > wanted // 2


def run_point(bench, point, names, repeats):
    """All runs at a point: {server: [figures]}, and what is left of the repeats."""
    wanted = bench.args.runs
    if point.kind == "idle":
        wanted = min(wanted, 1 if bench.args.quick else 3)
    runs = {name: [] for name in names}
    for turn in range(wanted):
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            # 1000 connections can take a slow server most of a minute: once will do.
            if point.kind == "idle" and runs[name] and runs[name][0]["seconds"] > 2:
                continue
            runs[name].append(bench.run(point, name))
    # Opening connections is brief and takes both processors to itself: nothing to be repeated.
    for _ in range(wanted if point.kind != "idle" else 0):
        for name in names:
            if repeats > 0 and not enough(runs[name], wanted):
                runs[name].append(bench.run(point, name))
                repeats -= 1
    return runs, repeats


def available(args):
    """The servers that can be run; complains about those that are not there."""
    if not os.access(f"{args.build}/nbdload", os.X_OK):
        raise BenchError(f"{args.build}/nbdload is missing: run 'make bench', or make it first")
    names = []
    for name in args.names:
        if servers.binary(name, args.build):
            names.append(name)
        elif name.startswith("nbdrs"):
            raise BenchError(f"{args.build}/nbdrsd is missing: run 'make' first")
        else:
            say(f"bench: {name} is not installed and is left out (make deps)")
    if not names:
        raise BenchError("no server is left to be measured")
    return names


def measure(args, names, header):
    """Run everything; returns the results, point by point."""
    results = []
    todo = [p for p in args.points]
    needs = {p.storage for p in todo}
    if len(os.sched_getaffinity(0)) < 2 and any(p.pin() == "split" for p in todo):
        say("bench: only one processor: points with '-split' are left out")
        todo = [p for p in todo if p.pin() != "split"]
    repeats = max(len(todo) * len(names) * args.runs // 10, args.runs)
    with tempfile.TemporaryDirectory(prefix="nbdrs-bench-", dir=args.shm_dir) as shm, \
            tempfile.TemporaryDirectory(prefix="nbdrs-bench-", dir=args.disk_dir) as disk, \
            tempfile.TemporaryDirectory(prefix="nbdrs-bench-") as work:
        files = {}
        if "tmpfs" in needs:
            files["tmpfs"] = make_file(shm, args.size * MIB)
        if needs & {"disk", "cold"}:
            files["disk"] = files["cold"] = make_file(disk, args.size * MIB)
        bench = Bench(args, files, work)
        for number, point in enumerate(todo, 1):
            runs, repeats = run_point(bench, point, names, repeats)
            results.append(report.summarize(point, runs, args.runs))
            say(f"[{number}/{len(todo)}] {report.progress(results[-1])}")
            cli.write_json(args.json, header, results)
    return results


def main():
    args = parse_args()
    if args.list:
        for p in points.POINTS:
            print(p.name, json.dumps({k: v for k, v in dataclasses.asdict(p).items()
                                      if k != "name" and v}))
        return 0
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def measured():
        servers.adopt_orphans()
        names = available(args)
        header = report.header(args, names)
        return header, measure(args, names, header)

    return cli.run(args, measured, (BenchError, servers.ServerError, OSError, subprocess.SubprocessError),
                       report.text)


if __name__ == "__main__":
    sys.exit(main())
