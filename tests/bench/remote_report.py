# SPDX-License-Identifier: GPL-3.0-or-later
"""The figures of remote.py as text: Markdown tables."""

import os
import platform
import subprocess
import time

import remote_servers as systems

PACKAGES = ("s3backer", "nbdkit", "nbdkit-plugin-python", "python3-boto3", "radosgw", "nginx",
            "fio")
NOISY = 0.10  # share of the processors' time that others had


def _package(name):
    done = subprocess.run(["dpkg-query", "-W", "-f", "${Version}", name], check=False, text=True,
                          capture_output=True)
    return done.stdout.strip()


def _model():
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
        for line in f:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "?"


def header(args):
    """Machine, versions and settings, as they go above the tables and into the JSON."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    versions = {"nbdrs": systems.version("nbdrsd", args.build)}
    versions.update({p: v for p in PACKAGES if (v := _package(p))})
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{_model()}, {len(os.sched_getaffinity(0))} CPUs, {memory / (1 << 30):.0f} GiB",
        "kernel": platform.release(),
        "versions": versions,
        "runs": args.runs,
        "seconds": args.seconds,
        "size_mib": args.size,
        "quick": args.quick,
        "nice": args.nice,
    }


def _rate(result, f):
    if result["unit"] == "MB/s":
        value = f["rate"] * result["block"] / 1e6
        text = f"{value:.1f}" if value < 100 else f"{value:.0f}"
    elif f["rate"] >= 10000:
        text = f"{f['rate'] / 1000:.1f}k"
    else:
        text = f"{f['rate']:.0f}"
    return text + ("~" if f["disturbance"] > NOISY else "")


def _size(n):
    if n < 1:
        return "0"
    if n < 10 << 10:
        return f"{n:.0f} B"
    return f"{n / 1024:.0f} KiB" if n < 10 << 20 else f"{n / (1 << 20):.1f} MiB"


def _ms(us):
    return f"{us / 1000:.1f}" if us < 99950 else f"{us / 1000:.0f}"


def _us(seconds):
    return f"{seconds * 1e6:.1f}" if seconds < 1e-4 else f"{seconds * 1e6:.0f}"


def progress(result):
    """One line for the person who waits."""
    cells = [f"{n} {_rate(result, f)}" for n, f in result["systems"].items()]
    cells += [f"=> {_value(v, v['value'])} of {v['against']}" for v in result["bars"]]
    return f"{result['name']} ({result['unit']}): " + ", ".join(cells)


def _table(head, rows):
    widths = [max(len(str(r[i])) for r in [head, *rows]) for i in range(len(head))]

    def line(cells):
        return "| " + " | ".join(str(c).ljust(w) for c, w in zip(cells, widths)) + " |"
    return [line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows), ""]


def _value(bar, value):
    return f"{value:+.1f} us" if bar["figure"] == "cpu" else f"x{value:.2f}"


def bar_text(bar):
    """What nbdrs is held to."""
    held = f"<= {bar['target']:g} us of CPU more" if bar["figure"] == "cpu" else f">= {bar['target']:g}"
    return f"{held} ({bar['against'] or 'best peer'})"


def _shown(result, bar, name):
    f = result["systems"][name]
    return f"{name}: " + (f"{f['server_cpu_s_per_op'] * 1e6:.1f} us" if bar["figure"] == "cpu" else _rate(result, f))


def _verdicts(results):
    rows = []
    for r in results:
        for v in r["bars"]:
            rows.append([r["name"], _shown(r, v, v["against"]), _shown(r, v, v["ours"]), _value(v, v["value"]),
                         _value(v, v["default"]), f"{bar_text(v).partition(' (')[0]} {'met' if v['met'] else 'MISSED'}"])
    return _table(["point", "held to", "best of nbdrs", "ratio", "by default", "target"], rows) if rows else []


def _point(r):
    rows = []
    for name, f in r["systems"].items():
        system = systems.SYSTEMS[name]
        note = system.note
        if "shape" in f:
            note += f", {f['shape'][0]} NBD connections of {f['shape'][1]}"
        if not system.honest and r["kind"] == "write":
            answered = f"{f['rate_answered'] * r['block'] / 1e6:.0f} MB/s"
            note += f" (until all was sent; the flush was answered at {answered})" if system.is_ours else \
                " (not compared; until unmounted)"
        rows.append([name, note, f"{_rate(r, f)} +-{f['rate_spread'] / 2:.0%}",
                     f"{f['requests_per_op']:.2f}", _size(f["bytes_out_per_op"]),
                     _size(f["bytes_in_per_op"]), _us(f["server_cpu_s_per_op"]),
                     _us(f["store_cpu_s_per_op"]),
                     "/".join(_ms(f[q]) for q in ("p50", "p99", "p999")) if f["p50"] else "-"])
    return [f"{r['name']}: {r['text']}", "",
            *_table(["system", "settings", r["unit"], "requests", "bytes read", "bytes written",
                     "CPU us", "store CPU us", "latency p50/p99/p99.9 ms"], rows)]


def text(head, results):
    """The whole report."""
    out = [f"nbdrs benchmark over S3 and HTTP, {head['date']}: {head['machine']}, "
           f"Linux {head['kernel']}", "",
           f"{head['runs']} runs, volumes of {head['size_mib']} MiB, random requests for "
           f"{head['seconds']:g} s{', quick' if head['quick'] else ''}"
           f"{', priority ' + str(head['nice']) if head['nice'] else ''}; medians; "
           f"~ = others had more than {NOISY:.0%} of the processors", ""]
    out += [", ".join(f"{n} {v}" for n, v in head["versions"].items()), ""]
    out += _verdicts(results)
    if results:
        out += ["Requests to the store, bytes and CPU time are per operation.", ""]
    for r in results:
        out += _point(r)
    judged = [r for r in results if "met" in r]
    if judged:
        missed = [r["name"] for r in judged if not r["met"]]
        out.append(f"{len(judged) - len(missed)} of {len(judged)} points meet their targets"
                   + (f"; missed: {', '.join(missed)}" if missed else ""))
    return "\n".join(out)
