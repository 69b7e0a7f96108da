#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare nbdrs over S3 and HTTP with what Debian has: s3backer, nbdkit's S3 and curl plugins.

Method
  - The stores run on this machine, started for this run: RadosGW (objects in memory) and nginx. Their
    processor time is spent beside the measured systems, and is the same for all of them.
  - Points "apart": the store has one half of the processors, the system and its load have the other. What
    the store takes from plain requests is then what it can, and not what they leave it.
  - Before each run memory is used and given back, so that none has to be fetched from a virtual machine's host.
  - Each run starts its system afresh. The systems take turns (A B C, B C A, ...). Reported are
    medians; the spread is (max - min) of the runs, relative to the median.
  - S3: fio, in one process. It speaks NBD itself (engine nbd) to nbdrs and nbdkit; of s3backer,
    which has only FUSE, it reads and writes the file in the mount (engine psync), without the
    kernel's NBD client or a loop device between them.
  - HTTP: nbdload, with 16 requests in flight, spread over 1, 4 or 16 NBD connections. Each system is
    judged by its best.
  - Honest: an answered flush (fsync) must mean that the data is in S3. s3backer does that only with
    --blockCacheSync, nbdkit writes through; s3backer's write-back cache ignores fsync: it is shown,
    its rate includes the time until an unmount has written everything, and it is not compared.
  - Volumes are created new for sequential writes, and full of random data for the other points.
  - Caches: a flush of nbdrs's write-back cache is answered when the data is in its journal, on a disk here. It is
    held to a raw file on that disk, and to what the store does without anybody in between (plain requests by
    curl). The rate of its sequential writes includes the time until the daemon has sent everything and ended;
    CPU time is the daemon's.
  - Several object sizes are tried with each system; the ratio is between the best of nbdrs and the
    best honest peer. That of nbdrs with its default settings stands beside it.
  - Requests and bytes are counted by the store, from the load's start to the end of its last flush
    (sequential writes: to the end of the system, so that nothing is left out; its CPU time, too). 'bytes' are
    those of objects, without headers.

Exit status: 0 measured, 1 something failed (or, with --gate, a target was missed), 2 usage.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True

import cli  # noqa: E402
import procstat  # noqa: E402
import remote_plain  # noqa: E402
import remote_report as report  # noqa: E402
import remote_servers as systems  # noqa: E402
from cli import say  # noqa: E402
from remote_points import DEPTH, MIB, POINTS  # noqa: E402
from remote_servers import RemoteError  # noqa: E402

LOAD_TIMEOUT = 120
MEMORY = 4  # times the volume's size is used in a run: by store, system, load and page cache
SHAPES = ((1, 16), (4, 4), (16, 1))  # NBD connections, requests in flight on each


def parse_args():
    p = cli.parser(__doc__, "nbdrsd and nbdload", "system", "points and systems",
                   seconds="time of a run of random requests (3; quick: 1)",
                   size="of the volumes (256; quick: 64)",
                   disk="a folder on a disk, for journals of caches and the file (the build folder)")
    p.add_argument("--quick", action="store_true", help="3 short runs, fewer settings of the peers")
    p.add_argument("--systems", metavar="NAME,...", help=f"of {', '.join(systems.SYSTEMS)}")
    args = p.parse_args()
    cli.fill_in(p, args, seconds=(3, 1), size=(256, 64), least=16, step=4)
    args.points = cli.chosen(p, args.only, POINTS) if args.only else list(POINTS)
    args.names = cli.named(p, args.systems, systems.SYSTEMS, "system") if args.systems else None
    return args


# ---- load ----

def fio(running, folder, pattern, block, depth, size, seconds=0, sync=False):
    """One fio job against a running system: {ops, seconds, latency_us, ...}."""
    out = f"{folder}/fio.json"
    command = ["fio", "--output-format=json", f"--output={out}", "--thread", "--name=load",
               f"--rw={pattern}", f"--bs={block}", f"--size={size}", "--refill_buffers",
               "--randrepeat=0", "--norandommap", "--percentile_list=50:99:99.9"]
    if running.system.uses_fuse():
        command += ["--ioengine=psync", f"--filename={running.file}", "--allow_file_create=0",
                    "--invalidate=0"]
    else:
        command += ["--ioengine=nbd", f"--iodepth={depth}",
                    f"--uri=nbd+unix:///{systems.EXPORT}?socket={running.socket}"]
    if seconds:
        command += ["--time_based", f"--runtime={seconds}"]
    if "write" in pattern:
        command += ["--fsync=1"] if sync else ["--end_fsync=1"]
    done = subprocess.run(command, check=False, text=True, stdin=subprocess.DEVNULL, cwd=folder,
                          capture_output=True, timeout=LOAD_TIMEOUT)
    running.alive()
    if done.returncode:
        raise RemoteError(f"{running.system.name}: {' '.join(command)} failed with status "
                          f"{done.returncode}:\n{(done.stdout + done.stderr).strip()[-1500:]}")
    with open(out, encoding="utf-8") as f:
        text = f.read()
    job = json.loads(text[text.index("{"):])["jobs"][0]
    side = job["write" if "write" in pattern else "read"]
    if job["error"] or not side["total_ios"]:
        raise RemoteError(f"{running.system.name}: fio reports error {job['error']} after "
                          f"{side['total_ios']} requests")
    # A write that is flushed is done when its flush is.
    later = job["sync"]["lat_ns"].get("percentile", {}) if sync else {}
    spent = side["clat_ns"].get("percentile", {})
    latency = {q: (spent.get(key, 0) + later.get(key, 0)) / 1000
               for q, key in (("p50", "50.000000"), ("p99", "99.000000"), ("p999", "99.900000"))}
    return {"ops": side["total_ios"], "seconds": side["runtime"] / 1000, "latency_us": latency}


def nbdload(args, running, connections, depth):
    """4 KiB random reads: the same figures."""
    command = [f"{args.build}/nbdload", "--unix", running.socket, "--export", systems.EXPORT,
               "--pattern", "randread", "--block", "4096", "--connections", str(connections),
               "--depth", str(depth), "--seconds", str(args.seconds)]
    done = subprocess.run(command, check=False, text=True, stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=LOAD_TIMEOUT)
    running.alive()
    if done.returncode:
        raise RemoteError(f"{running.system.name}: {' '.join(command)} failed with status "
                          f"{done.returncode}:\n{done.stderr.strip()[-1500:]}")
    result = json.loads(done.stdout)
    return {k: result[k] for k in ("ops", "seconds", "latency_us")}


# ---- one run ----

class Bench:
    """The stores, and which volumes are in them."""

    def __init__(self, args, folder):
        self.args = args
        self.folder = folder
        self._stores = {}
        self._full = {}  # name of the system that made it: Place
        self._number = 0
        self._cpus = sorted(os.sched_getaffinity(0))

    def close(self):
        """Stop the stores."""
        for store in self._stores.values():
            store.stop()

    def store(self, kind):
        """The store of a point, started when it is first asked for."""
        name = "http" if kind == "http" else "s3"
        if name not in self._stores:
            self._stores[name] = systems.CountedNginx() if name == "http" else \
                systems.CountedRadosGW(shared=False)
        return self._stores[name]

    def _file_place(self):
        """A file of random data on the disk."""
        if "file" not in self._full:
            place = systems.Place(systems.Files(), f"{self.folder}/disk.img", self.args.size * MIB)
            with open(place.prefix, "wb") as f:
                for _ in range(self.args.size):
                    f.write(os.urandom(MIB))
                f.flush()
                os.fsync(f.fileno())
            self._full["file"] = place
        return self._full["file"]

    def _place(self, kind, suffix=""):
        self._number += 1
        return systems.Place(self.store(kind), f"bench-{self._number}{suffix}",
                             self.args.size * MIB)

    def _folder(self):
        return tempfile.mkdtemp(dir=self.folder)

    def _full_place(self, system):
        """A volume of random data in the format of system."""
        maker = systems.SYSTEMS[system.fill_as or system.name]
        if maker.name not in self._full:
            place = self._place("s3", "/")
            folder = self._folder()
            with systems.Running(maker, self.args.build, place, folder, is_new=True) as running:
                # Blocks of 4 KiB are never read before they are written: a part will do.
                size = place.size // 64 if maker.name.endswith("-4k") else place.size
                fio(running, folder, "write", MIB, DEPTH, size)
            shutil.rmtree(folder)
            self._full[maker.name] = place
        return self._full[maker.name]

    def _http_place(self):
        if "http" not in self._full:
            place = self._place("http", ".img")
            place.store.put(place.prefix, os.urandom(place.size))
            self._full["http"] = place
        return self._full["http"]

    def _place_for(self, point, system):
        if system.name == "nbdrs-file":
            return self._file_place()
        if point.kind == "http":
            return self._http_place()
        return self._place(point.kind, "/") if point.kind == "write" else self._full_place(system)

    def run(self, point, system, shape):
        """One run of one system at one point: a dict of figures."""
        place = self._place_for(point, system)
        folder = self._folder()
        procstat.touch_memory(MEMORY * place.size)
        if point.is_apart:
            self._divide(place.store)
        if system.program == "curl":
            result = self._run_plain(point, system, place, folder)
        else:
            result = self._run_system(point, system, place, folder, shape)
        if point.is_apart:
            place.store.pin(self._cpus)
            os.sched_setaffinity(0, self._cpus)
        shutil.rmtree(folder)
        if point.kind == "write":
            place.store.remove(place.prefix)
        return result

    def _divide(self, store):
        """The store gets one half of the processors, everything else the other; what is started later, too."""
        half = len(self._cpus) // 2
        if not half:
            raise RemoteError("points with the store on processors of its own need two at least")
        store.pin(self._cpus[half:])
        os.sched_setaffinity(0, self._cpus[:half])

    def _run_plain(self, point, system, place, folder):
        before = self._meters(None, place.store)
        result = remote_plain.transfer("PUT" if point.kind == "write" else "GET", place, folder,
                                       system.name != "plain-unsigned")
        self._count(result, before, self._meters(None, place.store), place.store.counters())
        return result

    def _run_system(self, point, system, place, folder, shape):
        is_new = point.kind == "write"
        with systems.Running(system, self.args.build, place, folder, is_new=is_new) as running:
            if point.kind == "warm":
                fio(running, folder, "read", MIB, 1, place.size)
            before = self._meters(running, place.store)
            if point.kind in ("http", "warm"):
                result = nbdload(self.args, running, *(shape or (1, point.depth)))
            elif point.kind == "sync":
                result = fio(running, folder, "randwrite", point.block(), point.depth, place.size,
                             self.args.seconds, sync=True)
            else:
                result = fio(running, folder, point.kind, point.block(), point.depth, place.size)
            after = self._meters(running, place.store)
            if is_new:
                running.stop()
                answered, after = after, self._meters(None, place.store)
                after["server"] = after["client"] - answered["client"]  # its whole life's: it was waited for
                after["client"] = answered["client"]
                result["answered_s"] = result["seconds"]
                if not system.honest:  # only now is it where it should be
                    result["seconds"] += after["wall"] - answered["wall"]
            counters = place.store.counters()
        self._count(result, before, after, counters)
        return result

    def _meters(self, running, store):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {"wall": time.monotonic(), "server": procstat.cpu_seconds(running.pid) if running else 0,
                "store": store.cpu_seconds(), "client": used.ru_utime + used.ru_stime,
                "own": time.process_time(), "counters": store.counters(),
                "idle": procstat.idle_seconds(self._cpus)}

    def _count(self, result, before, after, counters):
        spent = {k: after[k] - before[k] for k in before if k != "counters"}
        busy = spent["wall"] * len(self._cpus) - spent["idle"]
        others = busy - sum(spent[k] for k in ("server", "store", "client", "own"))
        result["server_cpu_s"] = spent["server"]
        result["store_cpu_s"] = spent["store"]
        result["disturbance"] = max(0.0, others) / (spent["wall"] * len(self._cpus))
        for key, was, now in zip(("requests", "bytes_out", "bytes_in"), before["counters"],
                                 counters):
            result[key] = now - was


def best_shape(bench, point, system):
    """How a system likes 16 requests to be spread over NBD connections; None where that is fixed."""
    if point.kind != "http":
        return None
    rates = {}
    for shape in SHAPES:
        r = bench.run(point, system, shape)
        rates[shape] = r["ops"] / r["seconds"]
    return max(rates, key=rates.get)


def run_point(bench, point, chosen):
    """All runs at a point, in turns: {system: [figures]}."""
    runs = {s.name: [] for s in chosen}
    shapes = {s.name: best_shape(bench, point, s) for s in chosen}
    for turn in range(bench.args.runs):
        first = turn % len(chosen)
        for system in chosen[first:] + chosen[:first]:
            runs[system.name].append(bench.run(point, system, shapes[system.name]))
    return runs, shapes


def choose(args, point, missing):
    """The systems to be measured at a point."""
    names = point.quick if args.quick and point.quick and not args.names else point.systems
    chosen = [systems.SYSTEMS[n] for n in names if not args.names or n in args.names]
    return [s for s in chosen if s.name not in missing]


def find_missing(args):
    """{system: what it lacks}; an error when it is ours, or a tool."""
    missing = {}
    for name in sorted({n for p in args.points for n in p.systems}):
        if why := systems.lacks(systems.SYSTEMS[name], args.build):
            if systems.SYSTEMS[name].is_ours:
                raise RemoteError(f"needs {why}")
            say(f"bench: {name} is left out, it needs {why} (make deps-bench)")
            missing[name] = why
    tools = {"curl": "curl", "fio": "fio", "radosgw": "radosgw, ceph-mon and ceph-osd", "nginx": "nginx-light"}
    for tool, package in tools.items():
        if not shutil.which(tool):
            raise RemoteError(f"needs {tool} (packages {package}; make deps)")
    if not os.access(f"{args.build}/nbdload", os.X_OK):
        raise RemoteError(f"needs {args.build}/nbdload: run 'make bench', or make it first")
    return missing


def summarize(point, runs, shapes):
    """Medians per system, ratios, verdict, and the runs themselves."""
    figures = {}
    for name, rs in runs.items():
        rates = [r["ops"] / r["seconds"] for r in rs]
        rate = statistics.median(rates)
        f = {"rate": rate, "rate_spread": (max(rates) - min(rates)) / rate,
             "disturbance": statistics.median(r["disturbance"] for r in rs)}
        for key in ("requests", "bytes_out", "bytes_in", "server_cpu_s", "store_cpu_s"):
            f[f"{key}_per_op"] = statistics.median(r[key] / r["ops"] for r in rs)
        for q in ("p50", "p99", "p999"):
            f[q] = statistics.median(r["latency_us"][q] for r in rs)
        if shapes[name]:
            f["shape"] = shapes[name]
        if "answered_s" in rs[0]:
            f["rate_answered"] = statistics.median(r["ops"] / r["answered_s"] for r in rs)
        figures[name] = f
    out = {"name": point.name, "text": point.text, "kind": point.kind, "unit": point.unit(),
           "block": point.block(), "systems": figures, "raw": runs}
    out["bars"] = [v for bar in point.bars if (v := judge(point, bar, figures))]
    if out["bars"]:
        out["met"] = all(v["met"] for v in out["bars"])
    return out


def judge(point, bar, figures):
    """How the best of ours stands to what it is held to; None where one of them was not measured."""
    known = {n: systems.SYSTEMS[n] for n in figures}
    ours = [n for n, s in known.items() if s.is_ours]
    others = [bar.against] if bar.against else \
        [n for n, s in known.items() if not s.is_ours and not s.is_measure and (s.honest or point.kind == "read")]
    others = [n for n in others if n in figures]
    if not ours or not others:
        return None
    if bar.figure == "cpu":
        value = {n: (figures[n]["server_cpu_s_per_op"] - figures[bar.against]["server_cpu_s_per_op"]) * 1e6 for n in ours}
        best = min(value, key=value.get)
    else:
        most = max(figures[n]["rate"] for n in others)
        value = {n: figures[n]["rate"] / most for n in ours}
        best = max(value, key=value.get)
    return {"figure": bar.figure, "target": bar.target, "ours": best, "value": value[best], "default": value[ours[0]],
            "against": max(others, key=lambda n: figures[n]["rate"]),
            "met": value[best] <= bar.target if bar.figure == "cpu" else value[best] >= bar.target}


def measure(args, header):
    """Run everything; returns the results, point by point."""
    results = []
    missing = find_missing(args)
    with tempfile.TemporaryDirectory(prefix="nbdrs-bench-", dir=args.disk_dir) as folder:
        bench = Bench(args, folder)
        try:
            for number, point in enumerate(args.points, 1):
                chosen = choose(args, point, missing)
                if not chosen:
                    say(f"[{number}/{len(args.points)}] {point.name}: no system is left")
                    continue
                results.append(summarize(point, *run_point(bench, point, chosen)))
                say(f"[{number}/{len(args.points)}] {report.progress(results[-1])}")
                cli.write_json(args.json, header, results)
        finally:
            bench.close()
    return results


def main():
    args = parse_args()
    if args.list:
        for p in POINTS:
            print(f"{p.name}: {p.text}; {', '.join(report.bar_text(vars(b)) for b in p.bars)}")
        for s in systems.SYSTEMS.values():
            print(f"  {s.name}: {s.note}{'' if s.honest or s.is_ours else ' (not compared)'}")
        return 0

    def measured():
        header = report.header(args)
        return header, measure(args, header)

    return cli.run(args, measured, (RemoteError, remote_plain.PlainError, systems.fixtures.ServerError, OSError,
                                        subprocess.SubprocessError), report.text)


if __name__ == "__main__":
    sys.exit(main())
