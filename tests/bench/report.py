# SPDX-License-Identifier: GPL-3.0-or-later
"""From runs to medians, ratios and verdicts, and from those to tables in Markdown."""

import os
import platform
import statistics
import subprocess
import time

import points
import servers

OURS = "nbdrs"


# ---- facts about the machine ----

def _first_line(path, key):
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return "?"


def _file_system(folder):
    done = subprocess.run(["findmnt", "-n", "-o", "FSTYPE", "-T", folder], check=False, text=True,
                          capture_output=True)
    return done.stdout.strip() or "?"


def header(args, names):
    """Machine, versions and settings, as they go above the tables and into the JSON."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{_first_line('/proc/cpuinfo', 'model name')}, "
                   f"{len(os.sched_getaffinity(0))} CPUs, {memory / (1 << 30):.0f} GiB",
        "kernel": platform.release(),
        "disk": _file_system(args.disk_dir),
        "versions": {n: servers.version(n, args.build) for n in names},
        "runs": args.runs,
        "seconds": args.seconds,
        "size_mib": args.size,
        "quick": args.quick,
        "nice": args.nice,
    }


# ---- figures ----

def _spread(values):
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


def _figures(point, runs, wanted):
    """Medians of one server: over the clean runs, or over all when they are the minority."""
    clean = [r for r in runs if not r["disturbed"]]
    noisy = point.kind != "idle" and len(clean) <= wanted // 2
    used = clean if clean and not noisy and point.kind != "idle" else runs
    out = {"noisy": noisy, "runs": len(runs), "used": len(used),
           "disturbance": statistics.median(r["disturbance"] for r in used)}

    def median(get):
        return statistics.median(get(r) for r in used)

    if point.kind == "idle":
        out["opened"] = median(lambda r: r["opened"])
        out["seconds"] = median(lambda r: r["seconds"] * r["wanted"] / r["opened"])
        out["bytes_per_connection"] = median(lambda r: r["bytes_per_connection"])
        out["threads"] = median(lambda r: r["server_threads"])
        out["processes"] = median(lambda r: r["processes"])
        return out
    rates = [r["ops"] / r["seconds"] for r in used]
    # 10 ms is the unit of the CPU time: a server that used less than that counts as half of it.
    cpu = [max(r["server_cpu_s"], 0.005) / max(r["ops_all"], 1) for r in used]
    out["rate"] = statistics.median(rates)
    out["rate_spread"] = _spread(rates)
    out["cpu_us"] = statistics.median(cpu) * 1e6
    out["cpu_spread"] = _spread(cpu)
    out["ops_per_cpu_s"] = 1 / statistics.median(cpu)
    for q in ("p50", "p99", "p999"):
        out[q] = median(lambda r, q=q: r["latency_us"][q])
    return out


def _best(figures, key, largest=True):
    """(name, value) of the best peer; (None, None) without peers."""
    peers = [(f[key], n) for n, f in figures.items() if n in servers.PEERS]
    if not peers:
        return None, None
    value, name = max(peers) if largest else min(peers)
    return name, value


def _verdict(point, ours, ratios):
    """True, False, or None when there is nothing to judge."""
    checks = []
    if point.rate and ratios.get("rate"):
        checks.append(ratios["rate"] >= point.rate)
    if point.cpu and ratios.get("cpu"):
        checks.append(ratios["cpu"] >= point.cpu)
    if point.limit:
        checks.append(ours[point.limit[0]] <= point.limit[1])
    if point.kind == "idle":
        checks.append(ours["bytes_per_connection"] <= points.IDLE_BYTES_MAX)
    return all(checks) if checks else None


def summarize(point, runs, wanted):
    """Everything about a point: medians per server, ratios, verdict, and the runs themselves."""
    figures = {name: _figures(point, r, wanted) for name, r in runs.items() if r}
    out = {"name": point.name, "kind": point.kind, "unit": point.unit() if point.kind == "load"
           else "/s", "block": point.block() if point.kind == "load" else 0,
           "target": {"rate": point.rate, "cpu": point.cpu, "limit": point.limit},
           "servers": figures, "raw": runs}
    ours = figures.get(OURS)
    if point.kind != "idle":
        out["best_rate"], rate = _best(figures, "rate")
        out["best_cpu"], cpu = _best(figures, "ops_per_cpu_s")
        if ours and rate:
            out["ratio"] = {"rate": ours["rate"] / rate, "cpu": ours["ops_per_cpu_s"] / cpu}
    if ours:
        out["met"] = _verdict(point, ours, out.get("ratio", {}))
        out["noisy"] = any(f["noisy"] for f in figures.values())
    return out


# ---- text ----

def _rate(result, f):
    """'123.4k' operations, or MB/s for large blocks."""
    if result["unit"] == "MB/s":
        text = f"{f['rate'] * result['block'] / 1e6:.0f}"
    elif f["rate"] >= 10000:
        text = f"{f['rate'] / 1000:.1f}k"
    elif f["rate"] >= 1000:
        text = f"{f['rate'] / 1000:.2f}k"
    else:
        text = f"{f['rate']:.0f}"
    return text + ("~" if f["noisy"] else "")


def _bytes(n):
    return f"{n / 1024:.1f} KiB" if abs(n) < 10 << 20 else f"{n / (1 << 20):.1f} MiB"


def progress(result):
    """One line for the person who waits."""
    cells = []
    for name, f in result["servers"].items():
        if result["kind"] == "idle":
            cells.append(f"{name} {f['seconds']:.2f} s {_bytes(f['bytes_per_connection'])}")
        else:
            cells.append(f"{name} {_rate(result, f)}")
    if "ratio" in result:
        cells.append(f"=> x{result['ratio']['rate']:.2f} cpu x{result['ratio']['cpu']:.2f}")
    return f"{result['name']}: " + ", ".join(cells)


def _table(head, rows):
    if not rows:
        return []
    widths = [max(len(str(r[i])) for r in [head, *rows]) for i in range(len(head))]
    def line(cells):
        return "| " + " | ".join(str(c).ljust(w) for c, w in zip(cells, widths)) + " |"
    return [line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows), ""]


def _met(yes):
    return "met" if yes else "MISSED"


def _mark(value, target):
    """'>= 1.5' with its verdict."""
    if not target:
        return "-"
    return f">= {target:g} {_met(value >= target)}"


def _targets(results):
    rows = []
    for r in results:
        if "ratio" not in r:
            continue
        ratio, target, limit = r["ratio"], r["target"], r["target"]["limit"]
        further = "-"
        if limit:
            value = r["servers"][OURS][limit[0]]
            further = f"{limit[0]} {value:.0f} <= {limit[1]:g} us {_met(value <= limit[1])}"
        rows.append([r["name"] + ("~" if r["noisy"] else ""), r["best_rate"],
                     f"x{ratio['rate']:.2f}", _mark(ratio["rate"], target["rate"]),
                     r["best_cpu"], f"x{ratio['cpu']:.2f}", _mark(ratio["cpu"], target["cpu"]),
                     further])
    return _table(["point", "best peer, rate", "nbdrs rate", "target", "best peer, ops/CPU s",
                   "nbdrs ops/CPU s", "target", "further target"], rows)


def _by_server(results, names, cell, best, more=()):
    """A row for each point, a column for each server; `best`: the key of the one in bold; more: keys of further columns."""
    rows = []
    for r in results:
        if r["kind"] == "idle":
            continue
        cells = {n: cell(r, r["servers"][n]) if r["servers"].get(n) else "-" for n in names}
        rows.append([r["name"], *(r[key] for key in more),
                     *(f"**{text}**" if best and n == r[best] else text for n, text in cells.items())])
    return _table(["point", *more, *names], rows)


def _rates(results, names):
    return _by_server(results, names, lambda r, f: f"{_rate(r, f)} +-{f['rate_spread'] * 50:.0f}%", "best_rate", ["unit"])


def _cpu(results, names):
    return _by_server(results, names,
                      lambda _, f: f"{f['cpu_us']:.3g}" if f["cpu_us"] < 100 else f"{f['cpu_us']:.0f}", "best_cpu")


def _latencies(results, names):
    return _by_server(results, names, lambda _, f: "/".join(f"{f[q]:.0f}" for q in ("p50", "p99", "p999")), None)


def _idle(results, names):
    out = []
    for r in results:
        if r["kind"] != "idle":
            continue
        rows = []
        for n in names:
            f = r["servers"].get(n)
            if not f:
                continue
            note = "" if f["opened"] >= 1000 else f" (from {f['opened']:.0f} connections)"
            rows.append([n, f"{f['seconds']:.2f} s{note}", _bytes(f["bytes_per_connection"]),
                         f"{f['threads']:.0f} / {f['processes']:.0f}"])
        verdict = ""
        ours = r["servers"].get(OURS)
        if ours:
            seconds = r["target"]["limit"][1]
            verdict = f" (targets: <= {seconds:g} s " \
                      f"{_met(ours['seconds'] <= seconds)}, <= 4 KiB each " \
                      f"{_met(ours['bytes_per_connection'] <= points.IDLE_BYTES_MAX)})"
        out += [f"1000 idle connections, {r['name'].split('-', maxsplit=1)[0]}{verdict}", "",
                *_table(["server", "opened in", "memory each (anonymous)", "threads / processes"],
                        rows)]
    return out


def text(head, results):
    """The whole report."""
    names = list(head["versions"])
    out = [f"nbdrs benchmark, {head['date']}: {head['machine']}, Linux {head['kernel']}, "
           f"disk: {head['disk']}", "",
           f"{head['runs']} runs of {head['seconds']:g} s, files of {head['size_mib']} MiB"
           f"{', quick' if head['quick'] else ''}"
           f"{', priority ' + str(head['nice']) if head['nice'] else ''}; medians; ~ = too few undisturbed runs", ""]
    out += [f"- {n}: {v}" for n, v in head["versions"].items() if v] + [""]
    targets = _targets(results)
    if targets:
        out += ["nbdrs against the best peer of the same run", "", *targets]
    if any(r["kind"] != "idle" for r in results):
        out += ["Rate (median, half the spread; bold = best peer)", "", *_rates(results, names),
                "Server CPU, us per operation (bold = best peer)", "", *_cpu(results, names),
                "Latency p50/p99/p99.9, us", "", *_latencies(results, names)]
    out += _idle(results, names)
    judged = [r for r in results if r.get("met") is not None]
    if judged:
        missed = [r["name"] + ("~" if r["noisy"] else "") for r in judged if not r["met"]]
        out.append(f"{len(judged) - len(missed)} of {len(judged)} points meet their targets"
                   + (f"; missed: {', '.join(missed)}" if missed else ""))
    return "\n".join(out)
