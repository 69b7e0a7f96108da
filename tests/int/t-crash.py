#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=120
"""The daemon is killed at random points of a stream of writes; then the file must hold what was promised.

docs/consistency.md: what was answered is in the file, flushed or not, because the kernel has it; what was
not answered was done, partly done (by parts of 512 bytes) or not done; nothing else has changed. That what was
flushed also survives the machine is seen by asking the kernel whether it still waits in memory
(t-abuse.py, flush...). NBDRS_SEED repeats a run's choices, not its timing.
"""

import os
import random
import select
import struct
import threading
import time

from nbdrs_test import *

SANITIZER = os.environ.get("NBDRS_SANITIZER")
SEED = int(os.environ.get("NBDRS_SEED", "0")) or int.from_bytes(os.urandom(4), "big") | 1
SECTOR = 512
SIZE = 4 * MIB
SLOTS = SIZE // SECTOR
CONNS = 3
DEPTH = 16

suite = Suite()


def sector(number, generation):
    """What a sector holds after its n-th write: it says where it belongs and when it was written."""
    return struct.pack(">QQ", number, generation) * 32


class Stream(threading.Thread):
    """A client that writes its own third of the disk until the connection breaks."""

    def __init__(self, where, index, seed):
        super().__init__(daemon=True)
        self.c = Nbd.connect(where, "disk")
        self.rnd = random.Random(seed)
        self.first, self.last = SLOTS * index // CONNS, SLOTS * (index + 1) // CONNS
        self.flying = {}    # cookie: (kind, first sector, number of them, generation)
        self.answered = {}  # sector: generation, 0 = zeroed
        self.open = {}      # sector: generations that may be there or not
        self.generation = 0
        self.count = self.flushes = 0
        self.error = None

    def next(self):
        """One more request, on sectors that nobody is writing."""
        r = self.rnd
        x = r.random()
        if x < 0.05:
            self.c.send(self.c.request(FLUSH))
            self.flying[self.c.cookie] = (FLUSH, 0, 0, 0)
            return
        while True:
            n = r.choice((1, 1, 2, 7, 8, 9, 64, 200))
            at = r.randrange(self.first, self.last - n)
            if all(a + m <= at or at + n <= a for _, a, m, _ in self.flying.values()):
                break
        flags = FUA if r.random() < 0.02 else 0
        if x < 0.15:
            kind, generation, data = WRITE_ZEROES, 0, b""
        else:
            self.generation += 1
            kind, generation = WRITE, self.generation
            data = b"".join(sector(i, generation) for i in range(at, at + n))
        for i in range(at, at + n):
            self.open.setdefault(i, set()).add(generation)
        head = self.c.request(kind, at * SECTOR, n * SECTOR, flags)
        self.flying[self.c.cookie] = (kind, at, n, generation)
        self.c.send(head, data)

    def take(self):
        error, cookie = self.c.simple()
        assert error == 0, f"error {error}"
        kind, at, n, generation = self.flying.pop(cookie)
        self.count += 1
        self.flushes += kind == FLUSH
        for i in range(at, at + n):
            self.answered[i] = generation
            del self.open[i]

    def run(self):
        try:
            while True:
                while len(self.flying) < DEPTH:
                    self.next()
                self.take()
                while select.select([self.c.s], [], [], 0)[0]:
                    self.take()
        except (Closed, ConnectionError):
            pass
        except BaseException as e:  # looked at after the kill
            self.error = e

    def after_the_kill(self):
        """Replies that had left before it came."""
        self.join(WAIT_S)
        assert not self.is_alive(), "the connection does not break"
        if self.error:
            raise self.error
        self.c.close()


def check_file(path, streams, known):
    """Compares the file with what may be there; `known` is carried on to the next round."""
    with open(path, "rb") as f:
        data = f.read()
    assert len(data) == SIZE
    undecided = 0
    for s in streams:
        for i in range(s.first, s.last):
            got = data[i * SECTOR:(i + 1) * SECTOR]
            want = s.answered.get(i, known.get(i, b""))
            allowed = [want if isinstance(want, bytes) else contents(i, want)]
            allowed[0] = allowed[0] or bytes(SECTOR)
            for g in s.open.get(i, ()):
                allowed.append(contents(i, g))
                undecided += 1
            assert got in allowed, (f"sector {i} holds {got[:16].hex()}, not "
                                    + " or ".join(a[:16].hex() for a in allowed))
            known[i] = got
    return undecided


def contents(number, generation):
    return sector(number, generation) if generation else bytes(SECTOR)


def rounds(conn, path, count):
    if SANITIZER:
        count //= 4
    known = {}
    requests = flushes = undecided = 0
    rnd = random.Random(SEED)
    print(f"     seed {SEED}")
    for i in range(count):
        d = Daemon([("disk", "raw", conn)], tcp=True)
        streams = [Stream((d.unix, d.port)[n % 2], n, rnd.random()) for n in range(CONNS)]
        enough = rnd.randint(0, 400)
        for s in streams:
            s.start()
        deadline = time.monotonic() + WAIT_S
        while sum(s.count for s in streams) < enough and not any(s.error for s in streams):
            assert time.monotonic() < deadline, "no answers"
            os.sched_yield()
        d.process.kill()
        d.wait()
        for s in streams:
            s.after_the_kill()
            requests += s.count
            flushes += s.flushes
        undecided += check_file(path, streams, known)
        # The next daemon reads the same.
        if i % 5 == 0:
            with Daemon([("disk", "raw", conn)]) as again, Nbd.connect(again.unix, "disk") as c:
                with open(path, "rb") as f:
                    assert c.read(0, SIZE) == f.read()
    print(f"     {count} kills, {requests} requests answered, {flushes} of them flushes; "
          f"{undecided} sectors were in flight")
    assert undecided > 0 and requests > 0 and (flushes > 0 or count < 5)


def image():
    path = os.path.join(temp_dir(), "disk.img")
    with open(path, "wb") as f:
        f.truncate(SIZE)
    return path


@suite.case
def killed_while_it_writes():
    path = image()
    rounds("file:" + path, path, 20)


@suite.case
def killed_while_it_writes_past_the_page_cache():
    path = image()
    rounds("file[direct=on]:" + path, path, 6)


@suite.case
def killed_while_writes_wait():
    path = image()
    rounds("delay[write=500us,zero=500us,flush=1ms,jitter=3ms]:file:" + path, path, 6)


@suite.case
def lost_writes_are_noticed():
    # The check itself is checked.
    path = image()
    known = {}
    with Daemon([("disk", "raw", "file:" + path)]) as d:
        s = Stream(d.unix, 0, SEED)
        for _ in range(8):
            s.next()
        while s.flying:
            s.take()
    check_file(path, [s], known)
    victim = next(i for i, g in s.answered.items() if g)
    with open(path, "r+b") as f:
        f.seek(victim * SECTOR)
        f.write(bytes(16))
    try:
        check_file(path, [s], {})
    except AssertionError as e:
        assert f"sector {victim} " in str(e), e
    else:
        raise AssertionError("the check passes whatever the file holds")
    s.c.close()


suite.main()
