# SPDX-License-Identifier: GPL-3.0-or-later
"""What remote.py measures: the kinds of load, the systems that take them, and what nbdrs is held to."""

import dataclasses

MIB = 1 << 20
DEPTH = 16


@dataclasses.dataclass(frozen=True)
class Bar:
    """What the best of nbdrs's systems at a point is held to."""

    target: float
    against: str = ""  # a system; "": the best honest peer
    figure: str = "rate"  # rate: at least `target` times that system's; cpu: at most `target` us more per request


@dataclasses.dataclass(frozen=True)
class Point:
    """One kind of load."""

    name: str
    text: str
    kind: str  # write, read, sync (each write flushed), http, warm
    depth: int  # requests in flight
    bars: tuple
    systems: tuple
    quick: tuple = ()  # fewer, for --quick
    is_apart: bool = False  # the store has processors of its own, half of them, as if it was another machine

    def unit(self):
        """What the rate is counted in."""
        return "MB/s" if self.kind in ("write", "read") else "/s"

    def block(self):
        """Bytes of one request."""
        return MIB if self.kind in ("write", "read") else 4096


CACHES = ("nbdrs-cache", "nbdrs-cache-above")

POINTS = (
    Point("s3-seq-write", "1 MiB sequential writes into a new volume, then a flush", "write", DEPTH,
          (Bar(4.0),), ("nbdrs", "s3backer-64k", "s3backer-128k", "nbdkit-s3-64k", "s3backer-1m-cached"),
          ("nbdrs", "s3backer-128k", "nbdkit-s3-64k")),
    Point("s3-seq-read", "1 MiB sequential reads, one at a time, nothing cached", "read", 1, (Bar(3.0),),
          ("nbdrs", "s3backer-64k-cached", "s3backer-128k-cached", "s3backer-1m-cached",
           "nbdkit-s3-64k", "nbdkit-s3-64k-ahead"),
          ("nbdrs", "s3backer-1m-cached", "nbdkit-s3-64k-ahead")),
    Point("s3-sync-write", "4 KiB random writes, each flushed, one at a time", "sync", 1, (Bar(1.0),),
          ("nbdrs", "nbdrs-64k", "nbdrs-4k", "s3backer-4k", "s3backer-64k", "nbdkit-s3-4k",
           "nbdkit-s3-64k", "nbdkit-s3-64k-cache"),
          ("nbdrs", "nbdrs-64k", "s3backer-64k", "nbdkit-s3-64k-cache")),
    Point("cache-seq-write", "1 MiB sequential writes into a new volume, a flush, and all of it sent to the store",
          "write", DEPTH, (Bar(0.8, "plain"),), (*CACHES, "nbdrs-cache-64m", "plain", "plain-unsigned")),
    Point("cache-seq-write-apart", "the same, the store on processors of its own", "write", DEPTH, (Bar(0.8, "plain"),),
          (*CACHES, "plain", "plain-unsigned"), is_apart=True),
    Point("cache-seq-read", "1 MiB sequential reads, one at a time, nothing cached", "read", 1,
          (Bar(0.6, "plain"),), (*CACHES, "plain")),
    Point("cache-seq-read-apart", "the same, the store on processors of its own", "read", 1, (Bar(0.6, "plain"),),
          (*CACHES, "plain"), is_apart=True),
    Point("cache-sync-write", "4 KiB random writes, each flushed, one at a time", "sync", 1,
          (Bar(10.0, "nbdkit-s3-64k-cache"), Bar(0.5, "nbdrs-file")), (*CACHES, "nbdkit-s3-64k-cache", "nbdrs-file")),
    Point("cache-warm-read", f"4 KiB random reads, {DEPTH} in flight, of what was read before", "warm", DEPTH,
          (Bar(0.8, "nbdrs-file"), Bar(1.5, "nbdrs-file", "cpu")), (*CACHES, "nbdrs-file")),
    Point("http-rand-read", f"4 KiB random reads, {DEPTH} in flight", "http", DEPTH, (Bar(1.5),),
          ("nbdrs-http", "nbdkit-curl")),
)
