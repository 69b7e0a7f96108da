#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=180 s3 once
"""Whole disks on object stores: nbd-rs's format both ways, images through servers that fail, SIGKILL, memory, 16 TiB.

NBDRS_FULL=1: images of 256 MiB, 100 kills. NBDRS_SEED repeats a run's choices, not its timing.
"""

import json
import select
import socket
import struct

from ctl_test import Ctl
from faultproxy import Fault, FaultProxy
from s3client import S3
from servers import Nginx, RadosGW
from stores_test import *

suite = Suite()
server = RadosGW()
client = S3(server.endpoint, server.access, server.secret)
IMAGE_SIZE = 256 * MIB if FULL else 24 * MIB
FAILING = 0.05 if FULL else 0.2  # of few requests 5 % may be none
KILLS = 100 if FULL else 10
TIB = 1 << 40


def init(driver, conn, size):
    return run("init", "--size", str(size), driver, conn, secrets=[server.secret], limit_s=120)


def distributed(nodes, replicas=2):
    return f"replicas={replicas};backends={','.join(n.chain for n in nodes)};"


# --- nbd-rs's format -----------------------------------------------------------------------------------


def foreign_disk(size):
    """A disk whose shards 1 and 4 are empty and whose shards 2 and 5 end in zeroes."""
    data = bytearray(random.Random(SEED).randbytes(size))
    for n in (1, 4):
        data[n * SHARD:(n + 1) * SHARD] = bytes(SHARD)
    for n, kept in ((2, 1), (5, 3 * MIB + 17)):
        data[n * SHARD + kept:(n + 1) * SHARD] = bytes(SHARD - kept)
    return bytes(data), {"skip": (1, 4), "cut": (2, 5)}


@suite.case
def volumes_of_others_are_read():
    # The last shard is not whole either.
    data, how = foreign_disk(6 * SHARD + 77 * 512)
    for place in (Folder(), Bucket(server, client)):
        write_sharded(place, data, **how)
        out, _ = run("info", "sharded", place.chain)
        assert str(len(data)) in out, out
        with serve("sharded", place.chain) as d:
            same(copy_out(d), data)
            with Nbd.connect(d.unix, "disk") as c:
                for off, n in ((2 * SHARD - 10, 30), (len(data) - 1, 1), (5 * SHARD + 3 * MIB, 5000)):
                    same(c.read(off, n), data[off:off + n], f"{off}+{n}")


@suite.case
def distributed_volumes_of_others_are_read():
    data, how = foreign_disk(6 * SHARD + 512)
    for count, replicas in ((3, 2), (4, 3)):
        nodes = [Folder() for _ in range(count - 1)] + [Bucket(server, client)]
        write_distributed(nodes, replicas, data, **how)
        with serve("distributed", distributed(nodes, replicas)) as d:
            same(copy_out(d), data)


def change(daemon, data):
    """Writes, zeroes and trims at random; `data` is changed alike. Trimmed parts are zero afterwards."""
    r = random.Random(SEED + 9)
    with Nbd.connect(daemon.unix, "disk") as c:
        for i in range(24):
            off = r.randrange(len(data) - 70000)
            n = r.choice((1, 512, 4096, 65536))
            piece = r.randbytes(n)
            c.write(off, piece, FUA if i % 7 == 0 else 0)
            data[off:off + n] = piece
        for at, n in ((3 * SHARD - 1000, 2000), (4 * SHARD, SHARD)):
            assert c.do(WRITE_ZEROES, at, n) == 0
            data[at:at + n] = bytes(n)
        assert c.do(TRIM, 5 * SHARD, SHARD) == 0
        data[5 * SHARD:6 * SHARD] = c.read(5 * SHARD, SHARD)
        assert not any(data[5 * SHARD:6 * SHARD])
        assert c.do(FLUSH) == 0
        same(c.read(0, len(data)), bytes(data))


@suite.case
def what_we_write_others_read():
    size = 6 * SHARD + 77 * 512
    for place in (Folder(), Bucket(server, client)):
        init("sharded", place.chain, size)
        assert place.get("size").strip() == b"%d" % size
        data = bytearray(size)
        with serve("sharded", place.chain) as d:
            change(d, data)
            # Flushed: it is in the store now, not only when the daemon ends.
            same(read_sharded(place), bytes(data), "the store")
        same(read_sharded(place), bytes(data), "the store")
        assert "block-5" not in place.names() and "block-4" not in place.names()
    nodes = [Bucket(server, client), Bucket(server, client), Folder()]
    init("distributed", distributed(nodes), size)
    data = bytearray(size)
    with serve("distributed", distributed(nodes)) as d:
        change(d, data)
        same(read_distributed(nodes, 2), bytes(data), "the stores")


@suite.case
def all_of_them_in_one_daemon():
    disk0, disk1 = Bucket(server, client), Folder()
    nodes = [Bucket(server, client), Bucket(server, client), Folder()]
    iso = random.Random(SEED).randbytes(3 * MIB + 2048)
    with Nginx() as web:
        web.put("alpine.iso", iso)
        exports = [("disk0", "sharded", disk0.chain), ("disk1", "sharded", disk1.chain),
                   ("iso", "raw", web.url + "/alpine.iso"), ("disk3", "distributed", distributed(nodes))]
        for name, driver, conn in exports:
            if name != "iso":
                init(driver, conn, 12 * MIB)
        out, _ = run("check", "--open", *(w for e in exports for w in ("-e", *e)), secrets=[server.secret])
        assert [l.split()[0] for l in out.splitlines()] == ["disk0:", "disk1:", "iso:", "disk3:"], out
        data = {name: random.Random(name).randbytes(9 * MIB) for name, _, _ in exports}
        with Daemon(exports, env=clean_env()) as d:
            for name, _, _ in exports:
                if name != "iso":
                    path = os.path.join(d.dir, "in.img")
                    with open(path, "wb") as f:
                        f.write(data[name])
                    nbdcopy("--flush", path, uri(d, name))
            for name, _, _ in exports:
                same(copy_out(d, name), iso if name == "iso" else data[name] + bytes(3 * MIB), name)
            shown_chains = json.dumps(status(d))
            must_hide(shown_chains + d.text() + shown(d.process.pid), [server.secret])
    for place, driver, conn in ((disk0, "sharded", exports[0][2]), (disk1, "sharded", exports[1][2]),
                                (nodes[0], "distributed", exports[3][2])):
        run("destroy", "--force", driver, conn, secrets=[server.secret])
        assert not os.path.exists(place.path) if isinstance(place, Folder) else not place.names()
    assert not nodes[1].names() and not os.path.exists(nodes[2].path)


@suite.case
def raw_with_a_cache():
    folder = temp_dir() + "/"
    data = bytearray(random_image(folder + "disk", 5 * MIB + 512))
    with serve("raw", "cache:file:" + folder) as d, Nbd.connect(d.unix, "disk") as c:
        for _ in range(2):
            same(c.read(0, len(data)), bytes(data))
        c.write(MIB - 100, b"z" * 1000)
        data[MIB - 100:MIB + 900] = b"z" * 1000
        same(c.read(0, len(data)), bytes(data))
    with open(folder + "disk", "rb") as f:
        same(f.read(), bytes(data))


# --- Images ----------------------------------------------------------------------------------------


def in_and_out(driver, conn, read, proxy=None):
    """An image in and out by nbdcopy, through faults; `read` gives what the store holds."""
    path = os.path.join(temp_dir(), "in.img")
    data = random_image(path, IMAGE_SIZE)
    init(driver, conn, IMAGE_SIZE)
    if proxy:
        proxy.mix(FAILING)
    start = time.monotonic()
    with serve(driver, conn) as d:
        nbdcopy("--flush", path, uri(d), limit_s=600)
        middle = time.monotonic()
        same(read(), data, "the store")
        same(copy_out(d), data)
    end = time.monotonic()
    failed = f"{proxy.failed()} of {proxy.asked()} requests failed" if proxy else "faults by layer"
    print(f"     {driver}: {IMAGE_SIZE // MIB} MiB in {middle - start:.1f} s, out {end - middle:.1f} s; {failed}")
    if proxy:
        assert proxy.failed() > 0, proxy.counts
        proxy.clear()
    os.unlink(path)


@suite.case
def an_image_through_sharded_s3_that_fails():
    place = Bucket(server, client)
    with FaultProxy(server.port, SEED) as proxy:
        conn = "s3:" + server.url(place.prefix, proxy.port)
        in_and_out("sharded", conn, lambda: read_sharded(place), proxy)
    place.clear()


@suite.case
def an_image_through_sharded_files_that_fail():
    place = Folder()
    in_and_out("sharded", f"retry[deadline=20s]:fault[rate={FAILING:.0%},error=EAGAIN,ops=read|write|zero|trim|flush,seed={SEED}]:"
               + place.chain, lambda: read_sharded(place))


@suite.case
def an_image_through_distributed_that_fails():
    nodes = [Bucket(server, client), Bucket(server, client), Folder()]
    with FaultProxy(server.port, SEED) as proxy:
        chains = ["s3:" + server.url(n.prefix, proxy.port) for n in nodes[:2]] + [nodes[2].chain]
        in_and_out("distributed", f"replicas=2;backends={','.join(chains)};",
                   lambda: read_distributed(nodes, 2), proxy)
    for n in nodes[:2]:
        n.clear()


# --- SIGKILL ---------------------------------------------------------------------------------------

SECTOR = 512
CONNS = 3
DEPTH = 8


def sector(number, generation):
    """What a sector holds after its n-th write: it says where it belongs and when it was written. -n: zeroed then."""
    return struct.pack(">QQ", number, generation) * 32 if generation > 0 else bytes(SECTOR)


class Writer:
    """Connections that write at random, with FLUSH and FUA between; knows what may be in the store.

    .maybe[sector] is a list of generations, oldest first: the first is the last one that a flush or FUA has
    promised, the others were written later. FLUSH covers what had been answered on any connection before it was sent.
    """

    def __init__(self, where, size, maybe, rnd):
        self.conns = [Nbd.connect(where, "disk") for _ in range(CONNS)]
        self.sectors = size // SECTOR
        self.maybe, self.rnd = maybe, rnd
        self.flying = {}  # (connection, cookie): (kind, first, n, generation, flags, answered writes at its start)
        self.busy = set()
        self.answered = []  # (sector, generation), in order
        self.settled = 0    # so many of these are promised
        self.generation = max((abs(g) for known in maybe.values() for g in known), default=0)
        self.count = self.flushes = 0

    def next(self, c):
        r = self.rnd
        if r.random() < 0.08:
            c.send(c.request(FLUSH))
            self.flying[c, c.cookie] = (FLUSH, 0, 0, 0, 0, len(self.answered))
            return
        while True:
            n = r.choice((1, 1, 8, 8, 9, 64, 300))
            at = r.randrange(self.sectors - n)
            if self.busy.isdisjoint(range(at, at + n)):
                break
        self.busy.update(range(at, at + n))
        flags = FUA if r.random() < 0.04 else 0
        self.generation += 1
        if r.random() < 0.1:
            kind, generation, data = WRITE_ZEROES, -self.generation, b""
        else:
            kind, generation = WRITE, self.generation
            data = b"".join(sector(i, generation) for i in range(at, at + n))
        for i in range(at, at + n):
            self.maybe.setdefault(i, [0]).append(generation)
        c.send(c.request(kind, at * SECTOR, n * SECTOR, flags), data)
        self.flying[c, c.cookie] = (kind, at, n, generation, flags, 0)

    def settle(self, i, generation):
        """From here on sector i holds that or something later."""
        known = self.maybe[i]
        if generation in known:
            del known[:known.index(generation)]

    def take(self, c):
        error, cookie = c.simple()
        assert error == 0, f"error {error}"
        kind, at, n, generation, flags, upto = self.flying.pop((c, cookie))
        self.count += 1
        if kind == FLUSH:
            self.flushes += 1
            for i, g in self.answered[self.settled:upto]:
                self.settle(i, g)
            self.settled = max(self.settled, upto)
            return
        self.busy.difference_update(range(at, at + n))
        for i in range(at, at + n):
            self.answered.append((i, generation))
            if flags & FUA:
                self.settle(i, generation)

    def step(self, limit_s):
        """Takes one round of answers; False when all connections have ended."""
        by_socket = {c.s: c for c in self.conns}
        if not by_socket:
            return False
        ready = select.select(list(by_socket), [], [], limit_s)[0]
        assert ready, "no answers"
        for s in ready:
            try:
                self.take(by_socket[s])
            except (Closed, ConnectionError):
                by_socket[s].close()
                self.conns.remove(by_socket[s])
        return True

    def fill(self):
        for c in self.conns:
            while sum(1 for k in self.flying if k[0] is c) < DEPTH:
                self.next(c)

    def until(self, flushes, more):
        """Until so many flushes were answered, and then so many requests of any kind."""
        while self.flushes < flushes or more > 0:
            count, was = self.count, self.flushes
            self.fill()
            self.step(WAIT_S)
            more -= self.count - count if was >= flushes else 0

    def drain(self):
        while self.step(WAIT_S):
            pass


def check_store(data, maybe):
    """Compares what the store holds with what may be there; the number of sectors where that is not one thing."""
    undecided = 0
    for i, known in maybe.items():
        got = data[i * SECTOR:(i + 1) * SECTOR]
        assert any(got == sector(i, g) for g in known), (
            f"sector {i} holds {struct.unpack('>QQ', got[:16])}, not one of the generations {known}, of which the "
            "first was promised")
        undecided += len(known) > 1
    for i in range(len(data) // SECTOR):
        assert i in maybe or not any(data[i * SECTOR:(i + 1) * SECTOR]), f"sector {i} was never written"
    return undecided


def rounds(driver, conn, size, count, reads, flushes_max=6):
    """`reads`: functions that give the disk as each copy of it in the stores has it."""
    if SANITIZER:
        count = max(2, count // 4)
    init(driver, conn, size)
    maybe = {}
    rnd = random.Random(SEED)
    answered = flushes = undecided = 0
    for i in range(count):
        d = serve(driver, conn)
        w = Writer(d.unix, size, maybe, rnd)
        w.until(rnd.randint(int(i == 0), flushes_max), rnd.randint(0, 60))
        d.process.kill()
        d.wait()
        w.drain()
        answered += w.count
        flushes += w.flushes
        for read in reads:
            undecided += check_store(read(), maybe)
        if i % 5 == 0:
            # The next daemon finds the same.
            with serve(driver, conn) as again, Nbd.connect(again.unix, "disk") as c:
                check_store(c.read(0, size), maybe)
    print(f"     {driver}: {count} kills, {answered} requests answered, {flushes} of them flushes; {undecided} sectors "
          f"were undecided; seed {SEED}")
    assert flushes > 0 and answered > 0 and undecided > 0


@suite.case
def killed_while_it_writes_to_s3():
    place = Bucket(server, client)
    rounds("sharded[size=256Ki]", place.chain, 2 * MIB, KILLS, [lambda: read_sharded(place, 256 * KIB)])
    place.clear()


@suite.case
def killed_while_it_writes_whole_shards_to_s3():
    place = Bucket(server, client)
    rounds("sharded", place.chain, 8 * MIB, KILLS // 5, [lambda: read_sharded(place)], flushes_max=3)
    place.clear()


@suite.case
def killed_while_it_writes_to_s3_that_fails():
    place = Bucket(server, client)
    with FaultProxy(server.port, SEED) as proxy:
        proxy.mix(0.1)
        rounds("sharded[size=256Ki]", "s3:" + server.url(place.prefix, proxy.port), 2 * MIB, KILLS // 3,
               [lambda: read_sharded(place, 256 * KIB)], flushes_max=3)
    place.clear()


@suite.case
def what_a_device_was_answered_survives_kill_9():
    """A kernel does not write again what was answered, so there nothing may be in the daemon's memory only."""
    place = Bucket(server, client)
    chain = ("sharded[size=256Ki]", place.chain)
    init(*chain, MIB)

    def ask(sock, data):
        sock.sendall(data)
        head = b""
        while len(head) < 16:
            head += sock.recv(16 - len(head))
        assert struct.unpack(">IIQ", head)[1] == 0, head

    def request(kind, off, length, data=b""):
        return struct.pack(">IHHQQI", REQUEST_MAGIC, 0, kind, 1, off, length) + data

    d = serve(*chain)
    with Ctl(d.control) as c:
        _, fds = c.attach(export="disk")
        with socket.socket(fileno=fds[0]) as kernel:
            kernel.settimeout(WAIT_S)
            ask(kernel, request(WRITE, 4096, 8192, b"x" * 8192))
            ask(kernel, request(WRITE_ZEROES, 8192, 4096))
            d.kill()
    data = read_sharded(place, 256 << 10)
    assert data[4096:12288] == b"x" * 4096 + bytes(4096), "answered, and lost"


@suite.case
def killed_while_it_writes_to_a_folder():
    place = Folder()
    rounds("sharded", place.chain, 8 * MIB, KILLS, [lambda: read_sharded(place)])


@suite.case
def killed_while_it_writes_to_two_nodes():
    nodes = [Bucket(server, client), Folder()]

    def copy(node):
        return lambda: read_with(lambda n: nodes[node].get(f"block-{n}-{node}"), 8 * MIB)

    rounds("distributed", distributed(nodes), 8 * MIB, KILLS // 2, [copy(0), copy(1)], flushes_max=3)
    # What the last kill left different is equal again, and no record of it is left when the volume is closed.
    with serve("distributed", distributed(nodes)) as d:
        deadline = time.monotonic() + WAIT_S
        while not re.search(r'"objects_to_compare": "?0\b', json.dumps(status(d))):
            assert time.monotonic() < deadline, status(d)
        same(copy(0)(), copy(1)())
    assert not [n for node in nodes for n in node.names() if n == "doubt" or n.startswith("stale-")]
    nodes[0].clear()


@suite.case
def lost_writes_are_noticed():
    # The check itself is checked.
    place = Folder()
    init("sharded", place.chain, 8 * MIB)
    maybe = {}
    with serve("sharded", place.chain) as d:
        w = Writer(d.unix, 8 * MIB, maybe, random.Random(SEED))
        w.until(3, 50)
        while w.flying:
            w.step(WAIT_S)
        c = w.conns[0]
        c.send(c.request(FLUSH))
        w.flying[c, c.cookie] = (FLUSH, 0, 0, 0, 0, len(w.answered))
        w.take(c)
        for c in w.conns:
            c.close()
    data = bytearray(read_sharded(place))
    assert check_store(bytes(data), maybe) == 0  # all was flushed
    victim = next(i for i, known in maybe.items() if known[0] > 0)
    data[victim * SECTOR:victim * SECTOR + 16] = bytes(16)
    try:
        check_store(bytes(data), maybe)
    except AssertionError as e:
        assert f"sector {victim} " in str(e), e
    else:
        raise AssertionError("the check passes whatever the store holds")


# --- Nodes that go away -----------------------------------------------------------------------------


@suite.case
def a_node_that_was_away_never_serves_old_data():
    nodes = [Bucket(server, client), Folder()]
    size = 8 * MIB
    with FaultProxy(server.port) as proxy:
        chain = (f"distributed[replicas=2,quorum=1,recheck=100ms]{{retry[deadline=200ms]:s3:"
                 f"{server.url(nodes[0].prefix, proxy.port)},{nodes[1].chain}}}")
        init("sharded", chain, size)
        r = random.Random(SEED)
        old, new = r.randbytes(size), bytearray(r.randbytes(size))
        d = serve("sharded", chain)
        with Nbd.connect(d.unix, "disk") as c:
            c.write(0, old[:4 * MIB])
            c.write(4 * MIB, old[4 * MIB:])
            assert c.do(FLUSH) == 0
            proxy.rule("reset")
            # Node 0 is away. What is flushed now is on node 1, which knows that node 0 lacks it.
            c.write(0, bytes(new[:4 * MIB]))
            c.write(5 * MIB, bytes(new[5 * MIB:6 * MIB]))
            assert c.do(FLUSH) == 0
        d.kill()
        new[4 * MIB:5 * MIB], new[6 * MIB:] = old[4 * MIB:5 * MIB], old[6 * MIB:]
        # With a quorum of 1 either node may be the only one that has an answered change: both are needed to open.
        proxy.clear()
        proxy.rule(Fault("status", code=403))
        _, err = run("check", "--open", "sharded", chain, code=1, secrets=[server.secret])
        assert "node 0" in err and f"127.0.0.1:{proxy.port}" in err, err
        proxy.clear()
        with serve("sharded", chain) as d:
            same(copy_out(d), bytes(new))
            deadline = time.monotonic() + WAIT_S
            while nodes[0].get("block-0-0") != bytes(new[:4 * MIB]) or nodes[0].get("block-1-0") != bytes(new[4 * MIB:]):
                assert time.monotonic() < deadline, f"node 0 is not caught up:\n{d.text()}"
            same(copy_out(d), bytes(new))
        same(read_distributed(nodes, 2), bytes(new))
    nodes[0].clear()


# --- Memory and size -------------------------------------------------------------------------------


def resident_kib(pid):
    with open(f"/proc/{pid}/status") as f:
        return int(re.search(r"^VmHWM:\s+(\d+) kB", f.read(), re.M).group(1))


def in_flight(daemon):
    return sum(c["in_flight"] for e in status(daemon)["exports"] for c in e["clients"])


@suite.case
def a_thousand_requests_against_a_stalled_store():
    place = Bucket(server, client)
    size, conns, each = 16 * 1024 * MIB, 20, 50
    init("sharded", place.chain, size)
    r = random.Random(SEED)
    # Shards that exist, so that reads and parts of them have to be fetched.
    for n in range(48):
        place.put(f"block-{n}", b"x" * 1000)
    with FaultProxy(server.port) as proxy:
        with serve("sharded", "s3:" + server.url(place.prefix, proxy.port)) as d:
            proxy.rule("stall")
            clients = [Nbd.connect(d.unix, "disk") for _ in range(conns)]
            wanted = {}
            for c in clients:
                for i in range(each):
                    # Reads of what is there, and writes of parts, for which the rest will have to be read.
                    kind = READ if i % 2 else WRITE
                    n = r.choice((4 * KIB, 64 * KIB, 128 * KIB))
                    off = (r.randrange(24) + (24 if kind == WRITE else 0)) * SHARD + r.randrange(SHARD // KIB) * KIB
                    c.s.settimeout(WAIT_S)
                    # FUA, or they would be answered from memory.
                    c.send(c.request(kind, off, n, FUA if kind == WRITE else 0), b"y" * n if kind == WRITE else b"")
                    wanted[c, c.cookie] = (kind, n)
            # All of them are in the daemon, as many at the store as it has connections, the rest in line.
            deadline = time.monotonic() + WAIT_S
            while (flying := in_flight(d)) < len(wanted):
                assert time.monotonic() < deadline, f"only {flying} of {len(wanted)} are in flight"
            proxy.wait(lambda p: p.stalled >= 32)
            peak = resident_kib(d.process.pid)
            limit = 256 * 1024
            if not SANITIZED:
                assert peak < limit, f"{peak} KiB"
            proxy.release()
            for c in clients:
                c.s.settimeout(120)
                while any(k[0] is c for k in wanted):
                    error, cookie = c.simple()
                    kind, n = wanted.pop((c, cookie))
                    assert error == 0, error
                    if kind == READ:
                        c.recv(n)
                c.close()
            after = resident_kib(d.process.pid)
            print(f"     {conns * each} requests, {proxy.peak} at the store at a time: {peak // 1024} MiB, at most "
                  f"{after // 1024} MiB")
            if not SANITIZED:
                assert after < limit, f"{after} KiB"
    place.clear()


@suite.case
def sixteen_tib_far_away():
    place = Bucket(server, client)
    size = 16 * TIB
    with FaultProxy(server.port, latency=0.05) as proxy:
        conn = "s3:" + server.url(place.prefix, proxy.port)
        start = time.monotonic()
        init("sharded", conn, size)
        init_s, init_n = time.monotonic() - start, proxy.asked()
        for n in (0, 1, 77, 1000000, size // SHARD - 1):
            place.put(f"block-{n}", b"something")
        with serve("sharded", conn) as d, Nbd.connect(d.unix, "disk") as c:
            assert c.size == size
            proxy.clear()
            start = time.monotonic()
            step, flying, off = 2048 * MIB, 0, 0
            while off < size or flying:
                while off < size and flying < 64:
                    c.send(c.request(TRIM, off, step))
                    off += step
                    flying += 1
                error, _ = c.simple()
                assert error == 0, error
                flying -= 1
            assert c.do(FLUSH) == 0
            trim_s, trim_n = time.monotonic() - start, proxy.asked()
            left = place.names()
            assert not any(n.startswith("block-") for n in left), left
            assert c.read(77 * SHARD, 4096) == bytes(4096)
        print(f"     init {init_s:.2f} s and {init_n} requests; trim of 16 TiB {trim_s:.2f} s and {trim_n} requests")
        assert init_n <= 20 and trim_n <= 10, (init_n, trim_n)
        assert trim_s < 15 * (10 if SANITIZER else 1) and init_s < 10, (trim_s, init_s)
        start = time.monotonic()
        run("destroy", "--force", "sharded", conn)
        assert time.monotonic() - start < 10
    assert not place.names()


suite.main()
