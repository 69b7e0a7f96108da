# SPDX-License-Identifier: GPL-3.0-or-later
"""What /proc says about processes and processors: CPU time, memory, threads, idle time.

And, for want of a better place, what of that can be changed: priorities, and on which processors they run.
"""

import mmap
import os

TICK = os.sysconf("SC_CLK_TCK")


def _stat(pid):
    """The fields of /proc/PID/stat after the command name, or None when the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as f:
            return f.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def family(root):
    """Process ids of root and all its living descendants."""
    children = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            fields = _stat(name)
            if fields:
                children.setdefault(int(fields[1]), []).append(int(name))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def cpu_seconds(root):
    """User and system seconds of root, its threads, its living and its reaped descendants.

    The kernel scales user and system time so that their sum is the scheduler's exact run time;
    only the unit, 1/100 s, is coarse.
    """
    total = 0
    for pid in family(root):
        fields = _stat(pid)
        if fields:
            total += sum(int(x) for x in fields[11:15])  # utime stime cutime cstime
    return total / TICK


def threads(root):
    """(processes, threads) of root and its descendants."""
    processes = count = 0
    for pid in family(root):
        fields = _stat(pid)
        if fields:
            processes += 1
            count += int(fields[17])
    return processes, count


def anonymous_bytes(root):
    """Anonymous memory of root and its descendants, shared pages by share (Pss_Anon)."""
    total = 0
    for pid in family(root):
        try:
            with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as f:
                for line in f:
                    if line.startswith("Pss_Anon:"):
                        total += int(line.split()[1]) * 1024
        except (FileNotFoundError, ProcessLookupError):
            pass
    return total


def group_priority(pid, nice=None):
    """Priority of the scheduling group of pid's session; sets it when nice is given.

    Where the kernel groups tasks by session (sched(7), autogroup), a nice value counts only within
    its session, and this one counts between sessions. None where it does not.
    """
    try:
        with open(f"/proc/{pid}/autogroup", "r+", encoding="ascii") as f:
            before = int(f.read().rpartition(" ")[2])
            if nice is not None:
                f.write(f"{nice}\n")
            return before
    except (OSError, ValueError):
        return None


def idle_seconds(cpus):
    """Seconds the given processors have been idle since boot (waiting for a disk is idle)."""
    want = {f"cpu{n}" for n in cpus}
    total = 0
    with open("/proc/stat", encoding="ascii") as f:
        for line in f:
            fields = line.split()
            if fields[0] in want:
                total += int(fields[4]) + int(fields[5])
    return total / TICK


def pin(root, cpus):
    """Run root and its descendants, all threads of them, on these processors only."""
    for pid in family(root):
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(thread), cpus)
        except (FileNotFoundError, ProcessLookupError):
            pass


def touch_memory(size):
    """Use so many bytes of memory and give them back: fewer than half of what is free.

    A virtual machine may hand free memory back to its host, and gets it again page by page at the next use: 1 to
    2 ms for each MiB here, more than all else that is done with it. Whoever uses it in the next seconds does not
    pay for that.
    """
    page = os.sysconf("SC_PAGESIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * page
    size = min(size, free // 2) // page * page
    if size:
        with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as m:
            m.madvise(mmap.MADV_HUGEPAGE)
            m[::page] = bytes(size // page)
