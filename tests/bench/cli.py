# SPDX-License-Identifier: GPL-3.0-or-later
"""What both benchmarks share as commands: options, the choice of points, priority, the file of figures, exit status."""

import argparse
import json
import os
import signal
import sys
import time

import procstat


def say(text):
    print(text, file=sys.stderr, flush=True)


def parser(doc, programs, who, lists, seconds, size, disk):
    """programs: what --build has; who: what is compared, a word; lists: what --list does; the rest: help texts."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--build", default="build", help=f"folder with {programs}")
    p.add_argument("--json", metavar="FILE", help="write all figures, run by run")
    p.add_argument("--only", metavar="POINT,...", help="these points; a prefix names several")
    p.add_argument("--runs", type=int, help=f"runs per point and {who} (5; quick: 3)")
    p.add_argument("--seconds", type=float, help=seconds)
    p.add_argument("--size", type=int, metavar="MIB", help=size)
    p.add_argument("--disk-dir", help=disk)
    p.add_argument("--nice", type=int, default=0, metavar="N",
                   help="priority of servers and load (0); -15, as root, where others work too")
    p.add_argument("--gate", action="store_true", help="exit 1 when a target is missed")
    p.add_argument("--list", action="store_true", help=f"list {lists} and exit")
    return p


def fill_in(p, args, seconds, size, least, step=1):
    """What was not given; seconds, size: (all, quick). The size, MiB, is at least that much and in such steps."""
    args.runs = args.runs or (3 if args.quick else 5)
    args.seconds = args.seconds or seconds[args.quick]
    args.size = args.size or size[args.quick]
    args.disk_dir = os.path.abspath(args.disk_dir or args.build)  # some servers change their folder
    if args.runs < 1 or args.seconds <= 0 or args.size < least or args.size % step:
        p.error(f"--runs, --seconds and --size want at least 1, above 0 and {least}"
                + (f", a multiple of {step}" if step > 1 else ""))


def chosen(p, only, points):
    """Those that --only names: a whole name is that point alone, anything else begins names."""
    wanted = only.split(",")
    for w in wanted:
        if not any(q.name.startswith(w) for q in points):
            p.error(f"no point is called '{w}'; see --list")
    exact = {q.name for q in points}
    return [q for q in points
            if any(q.name == w or w not in exact and q.name.startswith(w) for w in wanted)]


def named(p, text, known, what):
    """The list of names, each of which has to be known."""
    names = text.split(",")
    for n in names:
        if n not in known:
            p.error(f"no {what} is called '{n}'; known: {', '.join(known)}")
    return names


def write_json(path, header, results):
    """Write all that is known so far; readers never see half a file."""
    if path:
        with open(path + ".new", "w", encoding="utf-8") as f:
            json.dump({"header": header, "points": results}, f, indent=1)
            f.write("\n")
        os.replace(path + ".new", path)


def run(args, measure, errors, text):
    """Calls measure() for (header, results) with the priority asked for, and reports; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start = time.monotonic()
    group = None
    try:
        if args.nice:  # inherited by servers and load; the session's is put back at the end
            os.setpriority(os.PRIO_PROCESS, 0, args.nice)
            group = procstat.group_priority("self", args.nice)
        header, results = measure()
    except errors as e:
        say(f"bench: {e}")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if group is not None:
            procstat.group_priority("self", group)
    header["minutes"] = round((time.monotonic() - start) / 60, 1)
    write_json(args.json, header, results)
    print(text(header, results))
    missed = [r["name"] for r in results if r.get("met") is False]
    return 1 if args.gate and missed else 0
