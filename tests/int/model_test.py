# SPDX-License-Identifier: GPL-3.0-or-later
"""Random operations from four connections at once, each answer compared with a model in memory.

Many requests are in flight on each connection, two of them over unix and two over TCP, with simple and
with structured replies. Requests whose ranges overlap are never in flight together, unless both only
read; requests that merely touch (the same sector, the same page) are, and often: chosen on purpose.
So each read has exactly one right answer. At the end comes a FLUSH, then SIGKILL, then the store itself is
compared, and what a new daemon serves from it.

NBDRS_SEED repeats a run's choices (not its timing). NBDRS_OPS replaces the number of operations.
"""
import os
import random
import select
import struct
import time

from nbdrs_test import *

SANITIZER = os.environ.get("NBDRS_SANITIZER")
SEED = int(os.environ.get("NBDRS_SEED", "0")) or int.from_bytes(os.urandom(4), "big") | 1
SIZE = 24 * MIB + 512 * 3  # not a multiple of anything that matters
DEPTH = 24
RECV = MIB

HEADER = struct.Struct(">IHHQQI")
SIMPLE = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
NAMES = {READ: "READ", WRITE: "WRITE", FLUSH: "FLUSH", TRIM: "TRIM", CACHE: "CACHE",
         WRITE_ZEROES: "WRITE_ZEROES", BLOCK_STATUS: "BLOCK_STATUS"}


class Op:
    """A request in flight. `check` is the kind whose outcome a READ is to find out, or None."""

    __slots__ = ("kind", "flags", "off", "end", "excludes", "buf", "extents", "error", "check")

    def __init__(self, kind, flags, off, length, excludes, check=None):
        self.kind, self.flags, self.off, self.end = kind, flags, off, off + length
        self.excludes = excludes
        self.buf = self.extents = None
        self.error = 0
        self.check = check

    def __str__(self):
        return f"{NAMES[self.kind]} {self.off}+{self.end - self.off} flags {self.flags}"


class Wire:
    """One connection, never blocking: bytes out when there is room, operations answered when they came."""

    def __init__(self, where, structured):
        self.nbd = Nbd.connect(where, "disk", structured=structured, context=structured)
        self.s = self.nbd.s
        self.s.setblocking(False)
        self.structured = structured
        self.out = b""
        self.parts = []
        self.got = bytearray()
        self.at = 0
        self.flying = {}
        self.cookie = random.getrandbits(62)

    def submit(self, op, payload=b""):
        self.cookie += 1
        self.flying[self.cookie] = op
        self.parts.append(HEADER.pack(REQUEST_MAGIC, op.flags, op.kind, self.cookie, op.off,
                                      op.end - op.off))
        if payload:
            self.parts.append(payload)

    def send(self):
        """True when bytes are left."""
        if self.parts:
            self.out = b"".join((self.out, *self.parts))
            self.parts.clear()
        try:
            while self.out:
                self.out = self.out[self.s.send(self.out):]
        except BlockingIOError:
            pass
        return bool(self.out)

    def receive(self):
        """What the socket has, up to RECV bytes; the operations that this completes."""
        data = self.s.recv(RECV)
        if not data:
            raise Closed("the daemon closed the connection")
        if self.at:
            del self.got[:self.at]
            self.at = 0
        self.got += data
        done = []
        while self.parse(done):
            pass
        return done

    def parse(self, done):
        have = len(self.got) - self.at
        if have < 4:
            return False
        (magic,) = struct.unpack_from(">I", self.got, self.at)
        if magic == SIMPLE_MAGIC:
            return have >= 16 and self.parse_simple(have, done)
        assert magic == CHUNK_MAGIC and self.structured, hex(magic)
        return have >= 20 and self.parse_chunk(have, done)

    def parse_simple(self, have, done):
        _, error, cookie = SIMPLE.unpack_from(self.got, self.at)
        op = self.flying[cookie]
        assert not (self.structured and op.kind in (READ, BLOCK_STATUS)), "a simple reply"
        length = op.end - op.off if op.kind == READ and not error else 0
        if have < 16 + length:
            return False
        if length:
            op.buf = bytes(memoryview(self.got)[self.at + 16:self.at + 16 + length])
        op.error = error
        self.at += 16 + length
        done.append(self.flying.pop(cookie))
        return True

    def parse_chunk(self, have, done):
        _, flags, kind, cookie, length = CHUNK.unpack_from(self.got, self.at)
        if have < 20 + length:
            return False
        op = self.flying[cookie]
        at = self.at + 20
        if kind == CHUNK_DATA:
            (off,) = struct.unpack_from(">Q", self.got, at)
            data = memoryview(self.got)[at + 8:at + length]
            assert op.off <= off and off + len(data) <= op.end, (str(op), off, len(data))
            if off == op.off and off + len(data) == op.end:
                op.buf = bytes(data)
            else:
                self.buffer_of(op)[off - op.off:off - op.off + len(data)] = data
            data.release()
        elif kind == CHUNK_HOLE:
            off, n = struct.unpack_from(">QI", self.got, at)
            assert op.off <= off and off + n <= op.end, (str(op), off, n)
            self.buffer_of(op)[off - op.off:off - op.off + n] = bytes(n)
        elif kind == CHUNK_BLOCK_STATUS:
            op.extents = list(struct.iter_unpack(">II", self.got[at + 4:at + length]))
        elif kind & 0x8000:
            (op.error,) = struct.unpack_from(">I", self.got, at)
        else:
            assert kind == CHUNK_NONE, kind
        self.at += 20 + length
        if flags & CHUNK_DONE:
            done.append(self.flying.pop(cookie))
        return True

    @staticmethod
    def buffer_of(op):
        # Not zero: what no chunk filled must not look like a hole.
        if op.buf is None:
            op.buf = bytearray(b"\xa5" * (op.end - op.off))
        return op.buf


class Model:
    """What the disk must hold, and who may be in flight with whom."""

    def __init__(self, wires, seed, trim_unit):
        self.rnd = random.Random(seed)
        self.data = bytearray(SIZE)
        self.pool = self.rnd.randbytes(2 * MIB)
        self.wires = wires
        self.flags = wires[0].nbd.flags
        self.trim_unit = trim_unit  # whole blocks of this in a TRIM must be zero; 0: none
        self.flying = {}  # op: None, in order
        self.last_end = 0
        self.waits = []  # READs that find out what a TRIM did
        self.count = dict.fromkeys(NAMES, 0)
        self.touching = 0

    def is_free(self, off, end, excludes):
        for o in self.flying:
            if o.off < end and off < o.end and (excludes or o.excludes):
                return False
        return True

    def range(self):
        """(offset, length): half of them odd, most of them short, many beginning where one ended."""
        r = self.rnd
        x = r.random()
        if x < 0.55:
            length, unit = r.randint(1, 6000), 1
        elif x < 0.80:
            length, unit = 512 * r.randint(1, 32), 512
        elif x < 0.97:
            length, unit = 4 * KIB * r.randint(1, 12), 4 * KIB
        else:
            length, unit = r.randint(1, 256 * KIB), r.choice((1, 512))
        if r.random() < 0.35 and self.last_end + length <= SIZE:
            return self.last_end, length
        return r.randrange(0, SIZE - length + 1) // unit * unit, length

    def kind(self):
        x = self.rnd.random()
        for kind, share in ((READ, 0.42), (WRITE, 0.85), (WRITE_ZEROES, 0.915), (TRIM, 0.965),
                            (BLOCK_STATUS, 0.98), (CACHE, 0.99)):
            if x < share:
                return kind
        return FLUSH

    def next(self, wire):
        """One more operation for this connection; None when what was chosen has to wait."""
        if self.waits:
            op = self.waits.pop()
            wire.submit(op)
            return op
        r = self.rnd
        kind = self.kind()
        if kind == BLOCK_STATUS and not wire.structured or kind == CACHE and not self.flags & SEND_CACHE:
            kind = READ
        off, length = (0, 0) if kind == FLUSH else self.range()
        changes = kind in (WRITE, WRITE_ZEROES, TRIM)
        for _ in range(8):
            if self.is_free(off, off + length, changes):
                break
            off, length = self.range()
        else:
            return None
        flags, payload = 0, b""
        if changes and r.random() < 0.01:
            flags |= FUA
        if kind == READ and wire.structured and r.random() < 0.1:
            flags |= DF
        if kind == WRITE:
            at = r.randrange(0, len(self.pool) - length)
            payload = self.pool[at:at + length]
            self.data[off:off + length] = payload
        elif kind == WRITE_ZEROES:
            flags |= r.choice((0, NO_HOLE))
            if self.flags & SEND_FAST_ZERO and r.random() < 0.3:
                flags |= FAST_ZERO
            else:
                self.data[off:off + length] = bytes(length)
        op = Op(kind, flags, off, length, changes)
        self.touching += any(o.end == off or o.off == off + length for o in self.flying)
        self.flying[op] = None
        self.last_end = op.end if length else self.last_end
        wire.submit(op, payload)
        self.count[kind] += 1
        return op

    def done(self, op):
        if op.check is not None:
            self.learn(op)
        elif op.kind == WRITE_ZEROES and op.flags & FAST_ZERO:
            assert op.error in (0, ENOTSUP), f"{op}: error {op.error}"
            self.ask_again(op)
            return
        elif op.kind == TRIM:
            assert op.error == 0, f"{op}: error {op.error}"
            self.ask_again(op)
            return
        else:
            assert op.error == 0, f"{op}: error {op.error}"
            if op.kind == READ:
                self.compare(op)
            elif op.kind == BLOCK_STATUS:
                self.compare_status(op)
        del self.flying[op]

    def ask_again(self, op):
        """What it left has to be read, before anybody else may have the range."""
        unit = self.trim_unit if op.kind == TRIM else int(op.error == 0)
        read = Op(READ, 0, op.off, op.end - op.off, True, check=(op, unit))
        del self.flying[op]
        self.flying[read] = None
        self.waits.append(read)

    def learn(self, op):
        cause, unit = op.check
        assert op.error == 0, f"{op}: error {op.error}"
        old, new = self.data[op.off:op.end], op.buf
        if new.count(0) != len(new):
            if unit:
                first = -op.off % unit
                last = max(first, len(new) - op.end % unit)
                assert new.count(0, first, last) == last - first, f"{cause}: not zero afterwards"
            for i, byte in enumerate(new):
                assert byte in (0, old[i]), f"{cause}: byte {op.off + i} neither zero nor as before"
        self.data[op.off:op.end] = new

    def compare(self, op):
        want = self.data[op.off:op.end]
        if op.buf == want:
            return
        bad = [i for i in range(len(want)) if op.buf[i] != want[i]]
        raise AssertionError(f"{op}: {len(bad)} bytes wrong, the first at {op.off + bad[0]}, "
                             f"the last at {op.off + bad[-1]}")

    def compare_status(self, op):
        at = op.off
        assert op.extents, f"{op}: no extents"
        for n, flags in op.extents:
            assert n > 0 and at < op.end, f"{op}: {op.extents}"
            end = min(at + n, op.end)
            if flags & 2:
                assert self.data.count(0, at, end) == end - at, f"{op}: {at}+{n} is not zero"
            at = end


def run(model, wires, ops):
    """Keeps all connections busy until `ops` operations were begun and all answered."""
    poll = select.poll()
    by_fd = {w.s.fileno(): w for w in wires}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    begun, waiting_out = 0, set()
    while True:
        for w in wires:
            while len(w.flying) < DEPTH and (begun < ops or model.waits):
                was_wait = bool(model.waits)
                if model.next(w) is None:
                    break
                begun += not was_wait
            if w.parts and w not in waiting_out and w.send():
                waiting_out.add(w)
                poll.modify(w.s, select.POLLIN | select.POLLOUT)
        if not model.flying:
            return
        ready = poll.poll(WAIT_S * 1000)
        assert ready, "no answer: " + ", ".join(map(str, list(model.flying)[:5]))
        for fd, events in ready:
            w = by_fd[fd]
            if events & select.POLLOUT and not w.send():
                waiting_out.discard(w)
                poll.modify(w.s, select.POLLIN)
            if events & ~select.POLLOUT:
                for op in w.receive():
                    model.done(op)


def fill(wire, model):
    """Something to read in one half, holes in the other."""
    half = SIZE // 2
    wire.nbd.s.settimeout(WAIT_S)
    for off in range(0, half, MIB):
        n = min(MIB, half - off)
        wire.nbd.write(off, model.pool[:n])
        model.data[off:off + n] = model.pool[:n]
    wire.nbd.s.setblocking(False)


def compare_whole(what, got, want):
    assert len(got) == len(want), f"{what}: {len(got)} bytes, not {len(want)}"
    if got == want:
        return
    first = next(i for i in range(len(want)) if got[i] != want[i])
    raise AssertionError(f"{what} differs from the model, first at byte {first}")


def read_all(where):
    with Nbd.connect(where, "disk") as c:
        return b"".join(c.read(off, min(4 * MIB, SIZE - off)) for off in range(0, SIZE, 4 * MIB))


def check(conn, ops, read_store=None, trim_unit=1, driver="raw"):
    """`read_store` gives what the store holds, after SIGKILL; None: it is gone with the daemon."""
    if SANITIZER:
        ops //= 5
    ops = int(os.environ.get("NBDRS_OPS", ops))
    daemon = Daemon([("disk", driver, conn)], tcp=True)
    wires = [Wire(where, structured) for where, structured in
             ((daemon.unix, True), (daemon.unix, False), (daemon.port, True), (daemon.port, False))]
    model = Model(wires, SEED, trim_unit)
    print(f"     seed {SEED}, {driver} {conn.split(':')[0]}, {ops} operations")
    start = time.monotonic()
    fill(wires[0], model)
    try:
        run(model, wires, ops)
        first = wires[0].nbd
        first.s.settimeout(WAIT_S)
        assert first.do(FLUSH) == 0
        if read_store is None:
            compare_whole("the disk", read_all(daemon.unix), model.data)
    except BaseException:
        daemon.kill()
        raise
    took = time.monotonic() - start
    counts = ", ".join(f"{NAMES[k]} {n}" for k, n in model.count.items())
    print(f"     {took:.1f} s: {counts}; {model.touching} begun right beside one in flight; 0 mismatches")
    assert model.touching > ops // 100, "hardly any requests touched"
    if read_store is None:
        for w in wires:
            w.nbd.close()
        daemon.stop()
        return
    daemon.process.kill()
    daemon.wait()
    compare_whole("after SIGKILL the store", read_store(), model.data)
    with Daemon([("disk", driver, conn)]) as again:
        compare_whole("the disk served anew", read_all(again.unix), model.data)
    for w in wires:
        w.nbd.close()
