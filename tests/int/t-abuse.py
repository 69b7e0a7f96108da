#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=150
"""Clients that die, stall and flood, media that fail: everybody else must not notice.

While something bad goes on, a Watcher writes and reads through a connection of its own and compares.
NBDRS_SEED repeats a run's choices.
"""

import ctypes
import fcntl
import os
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

from nbdrs_test import *

SANITIZER = os.environ.get("NBDRS_SANITIZER")
SEED = int(os.environ.get("NBDRS_SEED", "0")) or int.from_bytes(os.urandom(4), "big") | 1
SLOWER = 4 if SANITIZER else 1
SIZE = 64 * MIB
WATCHED = 4 * MIB  # the Watcher's part of the disk, at its beginning
KILLS = 250  # between two looks at the memory

suite = Suite()


def image(size=SIZE, folder=None):
    path = os.path.join(folder or temp_dir(), "disk.img")
    with open(path, "wb") as f:
        f.truncate(size)
    return path


def eventually(what, condition):
    """Asks again and again; a process that does not get there in time fails the test."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not in {WAIT_S} s: {what}"
        os.sched_yield()


class Watcher(threading.Thread):
    """A client whose data is right all the time, or the test fails."""

    def __init__(self, where, export="disk"):
        super().__init__(daemon=True)
        self.c = Nbd.connect(where, export, structured=True)
        self.model = bytearray(WATCHED)
        self.rounds = 0
        self.slowest = 0.0
        self.error = None
        self.over = False

    def run(self):
        rnd = random.Random(SEED)
        pool = rnd.randbytes(MIB)
        try:
            self.c.write(0, bytes(WATCHED))
            while not self.over:
                start = time.monotonic()
                n = rnd.randint(1, 32 * KIB)
                off = rnd.randrange(0, WATCHED - n)
                at = rnd.randrange(0, len(pool) - n)
                self.c.write(off, pool[at:at + n])
                self.model[off:off + n] = pool[at:at + n]
                n = rnd.randint(1, 32 * KIB)
                off = rnd.randrange(0, WATCHED - n)
                assert self.c.read(off, n) == self.model[off:off + n], f"wrong data at {off}+{n}"
                self.rounds += 1
                self.slowest = max(self.slowest, time.monotonic() - start)
            assert self.c.read(0, WATCHED) == self.model, "wrong data at the end"
            self.c.disconnect()
        except BaseException as e:  # handed over to leave()
            self.error = e

    def progress(self):
        """Waits until it has done some more."""
        before = self.rounds
        eventually("the other client gets on", lambda: self.rounds > before + 2 or self.error)
        if self.error:
            raise self.error

    def __enter__(self):
        self.start()
        self.progress()
        return self

    def __exit__(self, kind, *_):
        self.over = True
        self.join(WAIT_S)
        if kind is None:
            assert not self.is_alive(), "the other client is stuck"
            if self.error:
                raise self.error


# --- Clients that die ------------------------------------------------------------------------------


def reset(c):
    """The way a dead host's or a crashed program's connection ends: no FIN, a RST."""
    c.s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    c.close()


class Killer:
    """Connections that end at random points."""

    def __init__(self, daemon, rnd):
        self.daemon, self.rnd = daemon, rnd
        self.noise = rnd.randbytes(2 * MIB)
        self.ways = [self.in_the_handshake, self.in_a_header, self.in_a_payload, self.in_a_long_payload,
                     self.replies_unread, self.in_a_reply, self.in_a_refused_payload, self.half_closed]
        self.done = dict.fromkeys((w.__name__ for w in self.ways), 0)

    def connect(self):
        where = self.rnd.choice((self.daemon.unix, self.daemon.port))
        return Nbd.connect(where, self.rnd.choice(("disk", "slow")), structured=self.rnd.random() < 0.5)

    def range(self, longest):
        n = self.rnd.randint(1, longest)
        return self.rnd.randrange(WATCHED, SIZE - n), n

    def one(self):
        way = self.rnd.choice(self.ways)
        self.done[way.__name__] += 1
        c = way()
        if c.s.family == socket.AF_INET and self.rnd.random() < 0.5:
            reset(c)
        else:
            c.close()

    def in_the_handshake(self):
        c = Nbd(self.rnd.choice((self.daemon.unix, self.daemon.port)))
        said = struct.pack(">I", 3) + c.option(OPT_STRUCTURED_REPLY) + c.option(OPT_LIST) + \
            c.option(OPT_SET_META_CONTEXT, c.meta_data("disk", ["base:allocation"])) + \
            c.option(OPT_GO, c.info_data("disk"))
        c.send(said[:self.rnd.randint(0, len(said))])
        return c

    def in_a_header(self):
        c = self.connect()
        off, n = self.range(64 * KIB)
        whole = b"".join(c.request(READ, off, n) for _ in range(self.rnd.randint(0, 3)))
        c.send(whole, c.request(READ, off, n)[:self.rnd.randint(1, 27)])
        return c

    def in_a_payload(self):
        c = self.connect()
        off, n = self.range(64 * KIB)
        c.send(c.request(WRITE, off, n), self.noise[:self.rnd.randint(0, n - 1)])
        return c

    def in_a_long_payload(self):
        c = self.connect()
        n = 32 * MIB
        c.send(c.request(WRITE, WATCHED, n), self.noise[:self.rnd.randint(0, len(self.noise))])
        return c

    def in_a_refused_payload(self):
        c = self.connect()
        n = self.rnd.randint(1, MIB)
        c.send(c.request(WRITE, SIZE - n + 1, n), self.noise[:self.rnd.randint(0, n - 1)])
        return c

    def flood(self, c):
        for _ in range(self.rnd.randint(1, 40)):
            off, n = self.range(128 * KIB)
            x = self.rnd.random()
            if x < 0.5:
                c.send(c.request(READ, off, n))
            elif x < 0.8:
                n = min(n, 16 * KIB)
                c.send(c.request(WRITE, off, n), self.noise[:n])
            elif x < 0.9:
                c.send(c.request(self.rnd.choice((TRIM, WRITE_ZEROES)), off, n))
            else:
                c.send(c.request(FLUSH))

    def replies_unread(self):
        c = self.connect()
        self.flood(c)
        return c

    def in_a_reply(self):
        c = self.connect()
        off, n = self.range(MIB)
        c.send(c.request(READ, off, n), c.request(READ, off, n))
        c.s.recv(self.rnd.randint(1, 16 + n))  # holes are not sent, so it may be less
        return c

    def half_closed(self):
        """No more requests, but what was asked is answered."""
        c = self.connect()
        n = self.rnd.randint(1, 20)
        c.send(*(c.request(WRITE_ZEROES, WATCHED + i * 4096, 4096) for i in range(n)))
        c.s.shutdown(socket.SHUT_WR)
        for _ in range(n):
            error, _ = c.simple()
            assert error == 0
        c.must_be_closed()
        return c


@suite.case
def a_thousand_kills():
    path, slow = image(), image()
    rnd = random.Random(SEED)
    # "slow" keeps requests in flight when their client dies, and its data is copied, not lent.
    with Daemon([("disk", "raw", "file:" + path),
                 ("slow", "raw", f"delay[read=1ms,write=1ms,flush=1ms,jitter=4ms]:file[lend=off]:{slow}")],
                tcp=True) as d, Watcher(d.unix) as w:
        fds = d.fds()
        killer = Killer(d, rnd)
        memory = []
        # Pools go on reaching new peaks, ever more rarely, while what is lost with each kill makes every
        # round grow: so the rounds go on until one has lost less than 1 KiB a kill. Sanitizers, whose
        # own memory grows, find leaks by themselves.
        while len(memory) < 5 or (memory[-1] - memory[-2] >= KILLS and not SANITIZER):
            assert len(memory) < 40, f"memory grows: {memory} KiB"
            for _ in range(KILLS):
                killer.one()
            w.progress()
            eventually("all descriptors are back", lambda: d.fds() == fds)
            memory.append(d.memory_kib())
        print(f"     seed {SEED}, " + ", ".join(f"{k.replace('_', ' ')} {n}" for k, n in killer.done.items()))
        print(f"     anonymous memory after each {KILLS}: {memory} KiB; the other client: {w.rounds} rounds, "
              f"the slowest {w.slowest * 1000:.0f} ms")


@suite.case
def client_processes_killed():
    path = image()
    rnd = random.Random(SEED)
    with Daemon([("disk", "raw", "file:" + path)], tcp=True) as d, Watcher(d.unix) as w:
        fds = d.fds()
        for i in range(16):
            address = ["--unix", d.unix] if i % 2 else ["--tcp", f"127.0.0.1:{d.port}"]
            with subprocess.Popen([os.path.join(BUILD, "nbdload"), *address, "--export", "disk", "--pattern",
                                   "randread", "--connections", "4", "--depth", "32", "--block", "64k",
                                   "--seconds", "600"], stdout=subprocess.DEVNULL) as load:
                enough = rnd.randint(1, 10)
                try:
                    eventually("the client is busy",
                               lambda: load.poll() is not None or cpu_ticks(load.pid) >= enough)
                    assert load.poll() is None, "it ended by itself"
                finally:
                    load.kill()
            w.progress()
        eventually("all descriptors are back", lambda: d.fds() == fds)


def cpu_ticks(pid):
    """What all its threads have used: it is at work."""
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# --- Clients that stall and flood ------------------------------------------------------------------


def settled_memory(d, w):
    """The highest figure until it has not changed for a while in which others got on."""
    highest = last = d.memory_kib()
    same = 0
    while same < 5:
        w.progress()
        now = d.memory_kib()
        same = same + 1 if abs(now - last) < 256 else 0
        last = now
        highest = max(highest, now)
    return highest


def send_until_full(c, parts):
    """Sends for as long as the daemon takes it: the number of parts that left wholly."""
    c.s.settimeout(0.5 * SLOWER)
    for i, part in enumerate(parts):
        try:
            c.s.sendall(part)
        except TimeoutError:
            return i
    return len(parts)


@suite.case
def one_that_never_pauses():
    """Always more requests than may be in flight, and every reply taken at once: others get their turns."""
    batch, batches = 300_000 // (10 if SLOWER > 1 else 1), 20
    taken = longest = 0
    with Daemon([("disk", "raw", "null[size=1Mi]")], ["--threads", "1"]) as d, \
            Nbd.connect(d.unix, "disk") as a, Nbd.connect(d.unix, "disk") as b:
        text = a.request(FLUSH) * batch

        def send():
            for _ in range(batches):
                a.s.sendall(text)

        def take():
            nonlocal taken
            while taken < 16 * batch * batches:
                got = len(a.s.recv(4 * MIB))
                assert got, "the connection has ended"
                taken += got

        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(send), pool.submit(take)]
            while not both[1].done():
                before = taken
                assert b.do(FLUSH) == 0
                longest = max(longest, (taken - before) // 16)
                wait(both, timeout=0.005)  # the clients share an interpreter, and the first must be ahead
            for one in both:
                one.result()
        print(f"     at most {longest} requests of the other client were served before one of ours")
        # Counted, not timed.
        assert longest < batch * batches / 10, f"{longest} requests were served before one of ours"


def check_flood(what, bound_kib, flood):
    path = image(256 * MIB)
    with Daemon([("disk", "raw", f"file[lend=off]:{path}")]) as d, Watcher(d.unix) as w:
        fds, before = d.fds(), settled_memory(d, w)
        for _ in range(2):
            with Nbd.connect(d.unix, "disk") as c:
                sent = flood(c)
                peak = settled_memory(d, w) - before
            eventually("the connection is gone", lambda: d.fds() == fds)
        after = settled_memory(d, w) - before
        print(f"     {what}: {sent} requests were taken, at most {peak} KiB more memory, {after} KiB afterwards")
        if not SANITIZER:
            assert peak < bound_kib, f"{peak} KiB more memory, the bound is {bound_kib} KiB"
            # Buffers kept for reuse: 32 MiB for each thread.
            assert after < 72 * KIB, f"{after} KiB stay"


@suite.case
def reads_whose_replies_nobody_takes():
    # 64 MiB of payload, and half of a buffer unused at the worst size.
    for n, bound in ((MIB, 80 * KIB), (64 * KIB + 1, 144 * KIB)):
        def flood(c, n=n):
            sent = send_until_full(c, [c.request(READ, 0, n)] * 4000)
            # Some are in the socket's buffers, some in the daemon: never all.
            assert sent * n > 60 * MIB, f"only {sent} were taken"
            return sent
        check_flood(f"reads of {n}", bound, flood)


@suite.case
def writes_that_pin_receive_buffers():
    # The socket's way back is full; then each small write shares its receive buffer with a payload that
    # is thrown away: 512 buffers of 256 KiB may be held.
    def flood(c):
        send_until_full(c, [c.request(READ, 0, 64 * KIB)] * 20)
        refused = c.request(WRITE, 256 * MIB, 250 * KIB) + bytes(250 * KIB)
        return send_until_full(c, [c.request(WRITE, WATCHED, 1) + b"x" + refused] * 1000)
    check_flood("writes of 1 byte", 200 * KIB, flood)


@suite.case
def a_slow_loris():
    count = 300
    with Daemon([("disk", "raw", "mem[size=64Mi]")], ["--handshake-timeout", f"{1500 * SLOWER}ms"]) as d, \
            Watcher(d.unix) as w:
        fds = d.fds()
        said = struct.pack(">I", 3) + IHAVEOPT + struct.pack(">II", 77, 10000) + bytes(10000)
        start = time.monotonic()
        lot = [Nbd(d.unix) for _ in range(count)]
        open_ones, at = set(range(count)), 0
        while open_ones:
            w.progress()
            for i in list(open_ones):
                try:
                    lot[i].send(said[at:at + 1])
                except (BrokenPipeError, ConnectionResetError):
                    open_ones.discard(i)
            at += 1
            assert time.monotonic() - start < WAIT_S, f"{len(open_ones)} still open"
        took = time.monotonic() - start
        for c in lot:
            c.close()
        eventually("all descriptors are back", lambda: d.fds() == fds)
        print(f"     {count} clients, a byte at a time: all dropped after {took:.1f} s, {at} bytes each")


@suite.case
def a_thousand_idle_connections():
    count = 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + 200:
        raise Skip(f"only {hard} descriptors are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 200), hard))
    path = image()
    with Daemon([("disk", "raw", "file:" + path)], tcp=True) as d, Watcher(d.unix) as w:
        fds, before = d.fds(), settled_memory(d, w)
        lot = [Nbd.connect(d.port if i % 2 else d.unix, "disk") for i in range(count)]
        for i, c in enumerate(lot):  # none is new: each has done something
            c.write(WATCHED + i * 512, struct.pack(">Q", i) * 64)
        each = (settled_memory(d, w) - before) * KIB / count
        print(f"     {each:.0f} bytes of memory a connection")
        if not SANITIZER:
            assert each < 8 * KIB, f"{each:.0f} bytes a connection"
        for i, c in enumerate(lot):
            assert c.read(WATCHED + i * 512, 512) == struct.pack(">Q", i) * 64
        for c in lot:
            c.close()
        eventually("all descriptors are back", lambda: d.fds() == fds)


@suite.case
def slow_beside_fast():
    wait = 1500 * SLOWER
    with Daemon([("disk", "raw", "mem[size=64Mi]"),
                 ("slow", "raw", f"delay[write={wait}ms,flush={wait}ms]:mem[size=64Mi]")]) as d, \
            Nbd.connect(d.unix, "slow", structured=True) as slow, Nbd.connect(d.unix, "disk") as fast:
        # As many as may be in flight, save one: a read still finds its place.
        slow.send(*(slow.request(WRITE, i * 512, 512) + bytes([i % 251]) * 512 for i in range(1000)))
        slow.send(slow.request(FLUSH))
        flush = slow.cookie
        for i in range(200):
            off, n = i * 997, 1 + i * 13
            slow.send(slow.request(READ, off, n))
            assert slow.assemble(slow.chunks(), off, n) == bytes(n), "a write was early"
            fast.write(off, bytes([i]) * n)
            assert fast.read(off, n) == bytes([i]) * n
        # Only now the slow ones.
        cookies = [slow.simple()[1] for _ in range(1001)]
        assert sorted(cookies) == list(range(flush - 1000, flush + 1))
        for i in (0, 1, 500, 999):
            assert slow.read(i * 512, 512) == bytes([i % 251]) * 512


# --- Media that fail -------------------------------------------------------------------------------


@suite.case
def errors_reach_the_client_and_nobody_else():
    switch = os.path.join(temp_dir(), "fail")
    path = image()
    with Daemon([("disk", "raw", f"file:{path}"),
                 ("eio", "raw", f"fault[error=EIO,file={switch}]:mem[size=64Mi]"),
                 ("full", "raw", f"fault[error=ENOSPC,ops=write|zero,when=partly,file={switch}]:mem[size=64Mi]")]
                ) as d, Watcher(d.unix):
        for name, structured in (("eio", True), ("eio", False), ("full", True)):
            with Nbd.connect(d.unix, name, structured=structured) as c:
                old, new = b"o" * 8192, b"n" * 8192
                c.write(0, old * 3)
                open(switch, "w").close()
                error = ENOSPC if name == "full" else EIO
                for _ in range(50):
                    assert c.do(WRITE, 8192, data=new) == error
                    assert c.do(WRITE_ZEROES, 8192, 4096) == error
                    assert c.do(READ, 0, 4096) == (0 if name == "full" else EIO)
                    assert c.do(FLUSH) == (0 if name == "full" else EIO)
                os.unlink(switch)
                assert c.read(0, 8192) == old and c.read(16384, 8192) == old, "the error spread"
                c.write(8192, new)
                assert c.read(8192, 8192) == new
                assert c.do(FLUSH) == 0


def failing_fdatasync(how):
    """Words that run a daemon whose fdatasync calls fail as strace is told."""
    if shutil.which("strace") is None:
        raise Skip("strace is missing")
    if subprocess.run(["strace", "-f", "true"], stderr=subprocess.DEVNULL).returncode != 0:
        raise Skip("strace may not trace")
    asan = os.environ.get("ASAN_OPTIONS", "") + ":detect_leaks=0"  # it cannot look for them under strace
    return ["env", f"ASAN_OPTIONS={asan}", "strace", "-D", "-f", "-qq", "-o", "/dev/null",
            "-e", "trace=fdatasync", "-e", f"inject=fdatasync:{how}"]


@suite.case
def a_failed_flush_stays_failed():
    """The kernel drops what it could not write, so a later success would be a lie."""
    if ENGINE != "epoll":
        # A ring makes no fdatasync call that could be made to fail; the code above the engine is the same.
        ops = "fault[ops=flush,after=1,count=1]:mem[size=1Mi]"
        with Daemon([("disk", "raw", ops)]) as d, Nbd.connect(d.unix, "disk") as c:
            assert [c.do(FLUSH) for _ in range(3)] == [0, EIO, 0]
            d.wait_log(r"error.*request failed export=disk .*reason=EIO")
        return
    path = image()
    wrap = failing_fdatasync("error=EIO:when=1")  # the first call of each thread
    d = Daemon([("disk", "raw", "file:" + path), ("other", "raw", "mem[size=64Mi]")], wrap=wrap)
    with Watcher(d.unix, "other"), Nbd.connect(d.unix, "disk") as a, Nbd.connect(d.unix, "disk") as b:
        a.write(0, b"1" * 4096)
        assert b.do(FLUSH) == EIO, "the failure was hidden"
        for c in (a, b) * 8:  # by now there are threads whose fdatasync works
            assert c.do(FLUSH) == EIO, "a failed flush was forgotten"
            assert c.do(WRITE, 8192, flags=FUA, data=b"3" * 512) == EIO
            assert c.do(WRITE_ZEROES, 8192, 4096, flags=FUA) == EIO
        assert a.read(0, 4096) == b"1" * 4096
    d.send_signal()
    assert d.wait() == 1, "data may be lost, and the exit code does not say so"


def a_failing_flush_fails_for_all_who_wait():
    """The kernel tells a failure once; a flush that runs beside the one which is told must not succeed."""
    # The second call of a thread fails, and late; what runs beside it is another thread's first or third.
    wrap = failing_fdatasync("error=EIO:delay_exit=300000:when=2")
    for i in range(10):
        d = Daemon([("disk", "raw", "file:" + image())], wrap=wrap)
        with Nbd.connect(d.unix, "disk") as a, Nbd.connect(d.unix, "disk") as b:
            if i % 2 == 0:  # or else it may always be the second that fails
                assert a.do(FLUSH) == 0
            first = second = 0
            while first == second == 0:
                a.write(0, os.urandom(4096))
                a.send(a.request(FLUSH))
                flush = a.cookie
                a.read(0, 1)  # answered ahead of the flush, so that has begun
                b.write(4096, os.urandom(4096))
                second = b.do(FLUSH)
                first, cookie = a.simple()
                assert cookie == flush
        d.send_signal()
        assert d.wait() == 1
        if first == EIO:
            assert second == EIO, "the failure was hidden from the second"
            return
    raise AssertionError("the first of two flushes never fails")


if ENGINE == "epoll":  # as above: a ring makes no call that could be made to fail
    suite.case(a_failing_flush_fails_for_all_who_wait)


def no_space_daemon(limit):
    """(daemon with two exports on one full file system of `limit` bytes)."""
    where = temp_dir()
    script = (f"mount -t tmpfs -o size={limit} none {where} && "
              f"truncate -s 16M {where}/a.img {where}/b.img && exec \"$@\"")
    probe = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    if subprocess.run([*probe, "mount", "-t", "tmpfs", "none", where], stderr=subprocess.DEVNULL).returncode:
        raise Skip("mounting a tmpfs in a namespace is not permitted")
    return Daemon([("a", "raw", f"file:{where}/a.img"), ("b", "raw", f"file:{where}/b.img"),
                   ("disk", "raw", "mem[size=64Mi]")], wrap=[*probe, "sh", "-c", script, "sh"])


@suite.case
def a_full_file_system():
    with no_space_daemon("4M") as d, Watcher(d.unix), Nbd.connect(d.unix, "a") as a, \
            Nbd.connect(d.unix, "b", structured=True) as b:
        a.write(0, b"a" * 4096)
        filled = 0
        while (error := b.do(WRITE, filled, data=b"b" * 65536)) == 0:
            filled += 65536
        assert error == ENOSPC, error
        assert 3 * MIB < filled < 4 * MIB, filled
        while b.do(WRITE, filled, data=b"b" * 4096) == 0:
            filled += 4096
        assert a.do(WRITE, 8 * MIB, data=b"x" * 4096) == ENOSPC
        assert a.do(WRITE, 8 * MIB, flags=FUA, data=b"x" * 4096) == ENOSPC
        # What is there is there, can be changed in place, and flushed.
        assert a.read(0, 4096) == b"a" * 4096
        a.write(0, b"A" * 4096)
        assert a.read(0, 4096) == b"A" * 4096 and a.do(FLUSH) == 0 and b.do(FLUSH) == 0
        assert b.read(0, filled) == b"b" * filled
        # Space that one gives back, the other can use.
        assert b.do(TRIM, 0, MIB) == 0
        a.write(8 * MIB, b"x" * (512 * KIB))
        assert a.read(8 * MIB, 512 * KIB) == b"x" * (512 * KIB)
        assert a.do(FLUSH) == 0


@suite.case
def a_file_truncated_while_served():
    for options in ("", "[lend=off]"):
        path, other = image(), image()
        with Daemon([("cut", "raw", f"file{options}:{path}"), ("disk", "raw", "file:" + other)]) as d, \
                Watcher(d.unix):
            for structured in (False, True):
                with Nbd.connect(d.unix, "cut", structured=structured) as c:
                    c.write(0, os.urandom(MIB))
                    c.read(0, MIB)  # in the page cache, and mapped
                    for off in range(0, MIB, 64 * KIB):
                        c.read(off, 64 * KIB)
                    os.truncate(path, 12345)
                    for off, n in ((64 * KIB, 4096), (16 * KIB, 16 * KIB), (32 * MIB, 4096)):
                        c.send(c.request(READ, off, n))
                        error, _ = c.reply(READ, off, n)
                        assert error == EIO, f"{options} {off}+{n}: error {error}"
                    c.write(64 * KIB, b"back")  # makes the file longer again
                    assert c.read(64 * KIB, 4) == b"back"
                    os.truncate(path, SIZE)
                    assert c.read(16 * KIB, 16 * KIB) == bytes(16 * KIB)
                    assert c.do(FLUSH) == 0


@suite.case
def a_file_truncated_again_and_again_under_readers():
    path, other = image(), image()
    with open(path, "r+b") as f:
        f.write(b"d" * (8 * MIB))
    with Daemon([("cut", "raw", f"file:{path}"), ("disk", "raw", "file:" + other)], tcp=True) as d, \
            Watcher(d.unix):
        over = threading.Event()

        def cut():
            while not over.is_set():
                for size in (MIB, SIZE, 100, SIZE):
                    os.truncate(path, size)
                with open(path, "r+b") as f:
                    f.write(b"d" * (8 * MIB))

        cutter = threading.Thread(target=cut, daemon=True)
        cutter.start()
        good = bad = closed = 0
        rnd = random.Random(SEED)
        try:
            while closed < 5 and good + bad < 3000 // SLOWER:
                c = Nbd.connect(rnd.choice((d.unix, d.port)), "cut")
                try:
                    while good + bad < 3000 // SLOWER:
                        n = rnd.randint(1, 128 * KIB)
                        off = rnd.randrange(0, 8 * MIB - n)
                        c.send(*[c.request(READ, off, n)] * 8)
                        for _ in range(8):
                            error, _ = c.simple()
                            assert error in (0, EIO), error
                            if error:
                                bad += 1
                                continue
                            data = c.recv(n)
                            assert data.count(b"d") + data.count(0) == n
                            good += 1
                except Closed:
                    closed += 1
                c.close()
        finally:
            over.set()
            cutter.join(WAIT_S)
        print(f"     {good} reads good, {bad} errors, {closed} connections ended")


@suite.case
def a_file_is_served_once():
    path = image()
    with Daemon([("disk", "raw", "file:" + path)]) as d:
        second = Daemon([("disk", "raw", "file:" + path)], ready=False)
        assert second.wait() == 1
        assert f"{path} is in use by process {d.process.pid} (nbdrsd)" in second.text(), second.text()
        with Nbd.connect(d.unix, "disk") as c:
            assert c.read(0, 512) == bytes(512)
        d.process.kill()
        d.wait()
        with Daemon([("disk", "raw", "file:" + path)]):
            pass
        third = Daemon([("one", "raw", "file:" + path), ("two", "raw", "file:" + path)], ready=False)
        assert third.wait() == 1
        assert "in use by another export of this daemon" in third.text(), third.text()
        Daemon.running.append(d)  # it is dead: what stops it at the end finds that out
        d.stop = lambda: Daemon.running.remove(d)


# --- Flush -----------------------------------------------------------------------------------------


class CachestatRange(ctypes.Structure):
    _fields_ = [("off", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class Cachestat(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint64) for n in ("cache", "dirty", "writeback", "evicted", "recent")]


SYS_CACHESTAT = 451  # on every architecture
FS_IOC_FIEMAP = 0xC020660B
FIEMAP_EXTENT_DELALLOC = 4


def not_on_disk(fd, off, n):
    """Whether something of the range waits in the page cache; asked of the kernel, not of the daemon."""
    libc = ctypes.CDLL(None, use_errno=True)
    where, stat = CachestatRange(off, n), Cachestat()
    if libc.syscall(SYS_CACHESTAT, fd, ctypes.byref(where), ctypes.byref(stat), 0) == 0:
        return stat.dirty + stat.writeback > 0
    # Before Linux 6.5: blocks of a sparse file that were written, and have no place on the disk yet.
    query = bytearray(struct.pack("=QQLLLL", off, n, 0, 0, 64, 0) + bytes(64 * 56))
    try:
        fcntl.ioctl(fd, FS_IOC_FIEMAP, query)
    except OSError:
        raise Skip("neither cachestat(2) nor FIEMAP tell here what is dirty") from None
    mapped = struct.unpack_from("=L", query, 20)[0]
    return any(struct.unpack_from("=L", query, 32 + i * 56 + 40)[0] & FIEMAP_EXTENT_DELALLOC
               for i in range(mapped))


@suite.case
def flush_covers_what_other_connections_wrote():
    rounds = 40
    path = image(rounds * 64 * KIB + SIZE)
    fd = os.open(path, os.O_RDONLY)
    with Daemon([("disk", "raw", "file:" + path)], tcp=True) as d, Watcher(d.unix), \
            Nbd.connect(d.port, "disk") as a, Nbd.connect(d.unix, "disk") as b:
        seen = 0
        for i in range(rounds):
            off = SIZE + i * 64 * KIB
            a.write(off, os.urandom(4096))
            a.write(off + 5000, os.urandom(10000))
            seen += not_on_disk(fd, off, 64 * KIB)
            assert b.do(FLUSH) == 0
            assert not not_on_disk(fd, off, 64 * KIB), "flushed, and not on the disk"
            b.write(off + 32 * KIB, os.urandom(4096))
            seen += not_on_disk(fd, off + 32 * KIB, 4096)
            a.write(off + 40 * KIB, os.urandom(4096), FUA)
            assert not not_on_disk(fd, off + 40 * KIB, 4096), "FUA, and not on the disk"
        print(f"     {seen} of {2 * rounds} writes were seen waiting before the flush")
        assert seen > rounds, "the kernel does not tell what is dirty"
    os.close(fd)


@suite.case
def flushes_at_the_same_time_as_writes():
    """A flush may be left out only if nothing was answered since the last: no race may lose one."""
    path = image()
    fd = os.open(path, os.O_RDONLY)
    errors = []
    with Daemon([("disk", "raw", "file:" + path)], tcp=True) as d, Watcher(d.unix):
        def worker(n):
            try:
                where = d.port if n % 2 else d.unix
                base = WATCHED + n * MIB
                with Nbd.connect(where, "disk") as a, Nbd.connect(where, "disk") as b:
                    for i in range(40):
                        off = base + i * 8192
                        a.write(off, os.urandom(4096))
                        assert b.do(FLUSH) == 0
                        assert not not_on_disk(fd, off, 4096), "flushed, and not on the disk"
            except BaseException as e:  # handed over
                errors.append(e)

        lot = [threading.Thread(target=worker, args=(n,), daemon=True) for n in range(4)]
        for t in lot:
            t.start()
        for t in lot:
            t.join(WAIT_S)
            assert not t.is_alive(), "stuck"
    os.close(fd)
    if errors:
        raise errors[0]


# --- The end ---------------------------------------------------------------------------------------


@suite.case
def sigterm_answers_everything():
    path = image()
    count, conns = 200, 4
    d = Daemon([("disk", "raw", f"delay[write={700 * SLOWER}ms,jitter=200ms]:file:{path}")], tcp=True)
    lot = [Nbd.connect(d.port if i % 2 else d.unix, "disk") for i in range(conns)]
    first = {}
    for n, c in enumerate(lot):
        first[c] = c.cookie + 1
        c.send(*(c.request(WRITE, (n * count + i) * 4096, 4096) + bytes([n + 1, i]) * 2048 for i in range(count)))
        # Answered ahead of all of them, so the daemon has them all.
        c.send(c.request(READ, SIZE - 512, 512))
        assert c.simple() == (0, c.cookie) and c.recv(512) == bytes(512)
    d.send_signal()
    done = []
    for n, c in enumerate(lot):
        got = [c.simple() for _ in range(count)]
        assert sorted(cookie for _, cookie in got) == list(range(first[c], first[c] + count))
        assert all(error == 0 for error, _ in got), "a request in flight was given up"
        done.append(got)
        c.must_be_closed()
        c.close()
    assert d.wait() == 0
    with open(path, "rb") as f:
        for n in range(conns):
            for i in range(count):
                assert f.read(4096) == bytes([n + 1, i]) * 2048, f"write {i} of connection {n}"


suite.main()
