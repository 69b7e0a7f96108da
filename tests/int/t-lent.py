#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=60
"""Clients that do not take what layer cache has lent for them: its memory waits for their sockets, and nobody else does.
"""

import os
import struct
import subprocess
import time

from ctl_test import Ctl, wait_until
from nbdrs_test import *

CTL = os.path.join(BUILD, "nbdrsctl")
BLOCK = 4 * KIB
SIZE, MEM = 40 * MIB, 8 * MIB
BLOCKS = 1000  # asked for twice: more than may be ...
IN_FLIGHT = 1024
CACHE = f"cache[mem={MEM},granule=4Ki]"
BACK = f"cache[mode=writeback,mem={MEM},granule=4Ki]"

suite = Suite()


def old(block):
    """A block's bytes."""
    return struct.pack(">Q", block) * (BLOCK // 8)


def new(block):
    """What it is changed to: in each byte something else, or the same."""
    return struct.pack(">Q", block | 1 << 63) * (BLOCK // 8)


def is_mixed(data, block):
    """Each byte is old or new: an answer may be half on its way when its block is changed."""
    return data in (old(block), new(block)) or all(d in on for d, *on in zip(data, old(block), new(block)))


def image():
    path = os.path.join(temp_dir(), "disk.img")
    with open(path, "wb") as f:
        for start in range(0, SIZE // BLOCK, 1024):
            f.write(b"".join(map(old, range(start, start + 1024))))
    return path


def serve(cache=CACHE, *args):
    return Daemon([("disk", "raw", f"{cache}:file[lend=off]:{image()}")], args)


def layer(ctl, name="cache"):
    [found] = [l for l in ctl.status()[1][0]["layers"] if l["name"] == name]
    return found


def number(ctl, key):
    return int(layer(ctl)["state"][key])


def ctl_tool(d, *words, code=0):
    done = subprocess.run([CTL, "--control", d.control, *words], capture_output=True, text=True, timeout=WAIT_S,
                          check=False)
    assert done.returncode == code, (done, d.text())
    return done.stderr


class Stalled:
    """A client with reads of warm blocks in flight, as many as there may be, that takes no replies yet."""

    def __init__(self, d, ctl):
        self.blocks = list(range(BLOCKS)) * 2
        with Nbd.connect(d.unix, "disk") as n:
            n.read(0, BLOCKS * BLOCK)
        before = layer(ctl)["lent"]
        self.n = Nbd.connect(d.unix, "disk")
        self.good = 0  # replies taken
        self.first = self.n.cookie + 1
        self.n.send(*(self.n.request(READ, b * BLOCK, BLOCK) for b in self.blocks))
        wait_until("as many as may be in flight are", lambda: self.in_flight(ctl) == IN_FLIGHT)
        self.lent = layer(ctl)["lent"] - before
        assert self.lent > 400, f"{self.lent} loans: that proves nothing"

    @staticmethod
    def in_flight(ctl):
        return max(c["in_flight"] for c in ctl.status()[1][0]["clients"])

    def take(self, is_right, errors=()):
        """All replies, each once; they come in any order."""
        left = dict(zip(range(self.first, self.first + len(self.blocks)), self.blocks))
        self.good = 0
        while left:
            error, cookie = self.n.simple()
            block = left.pop(cookie)
            if error:
                assert error in errors, f"error {error} of block {block}"
                continue
            data = self.n.recv(BLOCK)
            assert is_right(data, block), f"wrong data in block {block}: {data[:8].hex()} {data[-8:].hex()}"
            self.good += 1


def is_old(data, block):
    return data == old(block)


def read_all(n, ctl=None, start=0, end=SIZE):
    """With an eye on how much of the cache's memory is used: the most there was."""
    highest = 0
    for at in range(start, end, MIB):
        data = n.read(at, MIB)
        assert data[:BLOCK] == old(at // BLOCK) and data[-BLOCK:] == old((at + MIB) // BLOCK - 1), at
        if ctl:
            highest = max(highest, number(ctl, "mem_bytes"))
    return highest


def lent_again(n, ctl):
    """Reads some blocks until they are lent: what was lent before has come back."""
    before = layer(ctl)["lent"]

    def is_lent():
        for block in range(100):
            n.read(block * BLOCK, BLOCK)
        return layer(ctl)["lent"] > before + 50
    wait_until("it is lent again", is_lent)


def check_others(cache):
    with serve(cache) as d, Ctl(d.control) as ctl, Nbd.connect(d.unix, "disk") as n:
        read_all(n)
        s = Stalled(d, ctl)
        memory, evictions = d.memory_kib(), number(ctl, "evictions")
        # All of it, several times the memory; then what is little more and read again soon, and so makes the rest go.
        highest = max(read_all(n, ctl), *(read_all(n, ctl, SIZE // 2, SIZE // 2 + MEM * 3 // 2) for _ in range(6)))
        memory, evictions = d.memory_kib() - memory, number(ctl, "evictions") - evictions
        print(f"     {cache}: {s.lent} loans; then at most {highest} bytes of cache, {evictions} evictions, "
              f"{memory} KiB more memory")
        assert highest <= MEM + MIB, f"{highest} bytes of cache"  # what is being fetched comes on top
        assert SANITIZED or memory < 16 * KIB, f"{memory} KiB more memory"
        changed = range(0, BLOCKS, 2)
        for block in changed:
            n.write(block * BLOCK, new(block))
        s.take(lambda data, block: is_mixed(data, block) if block in changed else is_old(data, block))
        for block in range(BLOCKS):
            assert n.read(block * BLOCK, BLOCK) == (new if block in changed else old)(block), block
        assert n.do(FLUSH) == 0
        lent_again(n, ctl)
        s.n.close()


@suite.case
def others_are_served_and_memory_is_bounded():
    check_others(CACHE)


@suite.case
def so_they_are_over_a_journal():
    check_others(BACK)


@suite.case
def a_resize_does_not_wait_for_them():
    with serve() as d, Ctl(d.control) as ctl, Nbd.connect(d.unix, "disk") as n:
        s = Stalled(d, ctl)
        ctl_tool(d, "resize", "disk", str(SIZE + MIB))
        assert n.read(SIZE, BLOCK) == bytes(BLOCK)
        end = BLOCKS // 2
        ctl_tool(d, "resize", "disk", str(end * BLOCK), "--shrink")
        assert n.do(READ, end * BLOCK, BLOCK) == EINVAL
        ctl_tool(d, "resize", "disk", str(SIZE))
        assert n.read((end - 1) * BLOCK, 2 * BLOCK) == old(end - 1) + bytes(BLOCK)
        # What was answered is as it was then; what comes in now finds zeroes.
        s.take(lambda data, block: is_old(data, block) or (block >= end and data == bytes(BLOCK)))
        lent_again(n, ctl)
        s.n.close()
    with serve(BACK) as d, Ctl(d.control) as ctl:
        s = Stalled(d, ctl)
        assert "mode=writeback above the mapping" in ctl_tool(d, "resize", "disk", str(SIZE + MIB), code=1)
        s.take(is_old)
        s.n.close()


@suite.case
def an_upgrade_takes_them_over_or_cuts_them_off():
    with serve() as d, Ctl(d.control) as ctl, Nbd.connect(d.unix, "disk") as n:
        s = Stalled(d, ctl)
        with subprocess.Popen([CTL, "--control", d.control, "upgrade"], stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE) as p:
            # It waits for us: up to --drain-timeout.
            d.wait_log("going over to a new nbdrsd")
            s.take(is_old)
            assert p.wait(WAIT_S) == 0, p.stderr.read()
        s.n.send(s.n.request(READ, 7 * BLOCK, BLOCK))
        assert s.n.reply(READ, 7 * BLOCK, BLOCK) == (0, old(7))
        assert n.read(0, BLOCK) == old(0)
        s.n.close()
    with serve(CACHE, "--drain-timeout", "100ms") as d, Ctl(d.control) as ctl, Nbd.connect(d.unix, "disk") as n:
        s = Stalled(d, ctl)
        ctl_tool(d, "upgrade")
        d.wait_log("connection cut off: it does not take its replies")
        read_all(n)
        try:
            s.take(is_old)
        except Closed:
            pass
        else:
            raise AssertionError("it was not cut off")
        s.n.close()


@suite.case
def sigterm_ends_the_daemon_in_time():
    d = serve(CACHE, "--drain-timeout", "300ms")
    with Ctl(d.control) as ctl:
        s = Stalled(d, ctl)
    begun = time.monotonic()
    d.stop()
    assert time.monotonic() - begun < 10, "late"
    assert "connections cut off when the drain time was over n=1" in d.text(), d.text()
    s.n.close()


@suite.case
def who_takes_them_meanwhile_has_all():
    d = serve()
    with Ctl(d.control) as ctl:
        s = Stalled(d, ctl)
    d.send_signal()
    d.wait_log("draining connections=1")
    try:
        s.take(is_old, errors=[ESHUTDOWN])
        s.n.must_be_closed()
    except Closed:  # it may be before all that has not been taken in is refused
        pass
    assert s.good >= IN_FLIGHT, f"{s.good} replies"
    s.n.close()
    assert d.wait() == 0, d.text()


suite.main()
