# SPDX-License-Identifier: GPL-3.0-or-later
"""The points of the comparison and the targets at each.

Names: rr/rw = random read/write of 4 KiB, sr/sw = sequential read/write; qN = N requests in flight
on a connection; cN = N connections (one client thread each); split = server and client on a
processor of their own; same = both on one processor.
"""

from dataclasses import dataclass
from typing import Optional, Tuple

PATTERN = {"rr": "randread", "rw": "randwrite", "sr": "seqread", "sw": "seqwrite"}


@dataclass(frozen=True)
class Point:
    """One line of the table."""

    name: str
    kind: str = "load"  # load, handshakes, idle
    transport: str = "unix"
    storage: str = "tmpfs"  # tmpfs, disk (page cache warm), cold (page cache empty)
    rate: Optional[float] = None  # target: rate against the best peer
    cpu: Optional[float] = None  # target: operations per CPU second against the best peer
    limit: Optional[Tuple[str, float]] = None  # target: (figure, most it may be)
    quick: bool = False

    def _words(self):
        return self.name.split("-", 1)[1].split("-")

    def pin(self):
        """None, 'split' or 'same'."""
        last = self._words()[-1]
        return last if last in ("split", "same") else None

    def block(self):
        """Bytes per request."""
        for word in self._words():
            if word in ("128k", "1m"):
                return {"128k": 131072, "1m": 1048576}[word]
        return 4096

    def writes(self):
        """Whether the file is changed."""
        return self.kind == "load" and self._words()[0] in ("rw", "sw")

    def load_args(self):
        """The load, as options of nbdload."""
        words = self._words()
        depth = next(w[1:] for w in words if w[0] == "q" and w[1:].isdigit())
        connections = next((w[1:] for w in words if w[0] == "c" and w[1:].isdigit()), "1")
        args = ["--pattern", PATTERN[words[0]], "--block", str(self.block()), "--depth", depth,
                "--connections", connections]
        if self.storage == "cold":
            args.append("--once")
        return args

    def unit(self):
        """What the rate is counted in."""
        return "MB/s" if self.block() > 4096 else "/s"


POINTS = (
    Point("unix-rr-q1", rate=1.1, quick=True),
    Point("unix-rw-q1", rate=1.1),
    Point("unix-rr-q1-split", rate=2.0, cpu=1.1),
    Point("unix-rr-q1-same", rate=1.4, cpu=1.6, quick=True),
    Point("unix-rw-q1-same", rate=1.3, cpu=1.5),
    Point("unix-rr-q32", rate=1.5, cpu=1.7, limit=("p999", 800), quick=True),
    Point("unix-rw-q32", rate=1.4, cpu=1.4, quick=True),
    Point("unix-rr-q32-c4", rate=1.8, cpu=1.7, quick=True),
    Point("unix-rw-q32-c4", rate=1.5, cpu=1.3, quick=True),
    Point("unix-sr-128k-q8", rate=1.25, cpu=1.4, quick=True),
    Point("unix-sw-128k-q8", rate=1.0, cpu=1.15),
    Point("unix-sr-1m-q8", rate=1.25, cpu=1.4, quick=True),
    Point("unix-sw-1m-q8", rate=1.1, cpu=1.15),
    Point("tcp-rr-q1", transport="tcp", rate=1.15),
    Point("tcp-rr-q32", transport="tcp", rate=1.3, cpu=1.4, quick=True),
    Point("tcp-rw-q32", transport="tcp", rate=1.6, cpu=1.7, quick=True),
    Point("tcp-rr-q32-c4", transport="tcp", rate=2.0, cpu=1.8),
    Point("tcp-sr-128k-q8", transport="tcp", rate=1.4, cpu=1.4),
    Point("tcp-sw-128k-q8", transport="tcp", rate=1.0, cpu=1.05),
    Point("disk-rr-q32", storage="disk", rate=1.5, cpu=1.8, quick=True),
    Point("disk-rw-q32", storage="disk", rate=1.2, cpu=1.4),
    Point("cold-rr-q32", storage="cold", rate=0.95, quick=True),
    Point("unix-handshake", kind="handshakes", rate=1.0, cpu=1.0, quick=True),
    Point("tcp-handshake", kind="handshakes", transport="tcp", rate=3.5, cpu=5.0, quick=True),
    Point("unix-idle", kind="idle", limit=("seconds", 0.2), quick=True),
    Point("tcp-idle", kind="idle", transport="tcp", limit=("seconds", 0.6)),
)

IDLE_BYTES_MAX = 4096  # target: anonymous memory per idle connection
