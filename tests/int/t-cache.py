#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=120 s3 once
"""The write-back cache over a real S3 server: SIGKILL at random points, then the next daemon has everything that was
answered, from the journal; an orderly end leaves all of it in the store.

NBDRS_FULL=1: 100 kills. NBDRS_SEED repeats a run's choices, not its timing.
"""

import struct

from faultproxy import Fault, FaultProxy
from s3client import S3
from servers import RadosGW
from stores_test import *

suite = Suite()
server = RadosGW()
client = S3(server.endpoint, server.access, server.secret)
KILLS = 100 if FULL else 20
SECTOR = 512
SIZE = 4 * MIB
SLOTS = SIZE // SECTOR
OBJECT = 256 * KIB
DEPTH = 12


def sector(number, generation):
    return struct.pack(">QQ", number, generation) * 32


def options(folder, more=""):
    return f"cache[disk={folder},size=8Mi,mode=writeback,lag=100ms{more}]"


class Model:
    """What each sector may hold."""

    def __init__(self, rnd):
        self.rnd = rnd
        self.answered = [0] * SLOTS  # generation; 0 = zeroes
        self.open = {}               # sector: generations that may be there as well
        self.generation = self.count = self.flushes = 0

    def write_until_killed(self, daemon, requests, before=lambda: None, number=signal.SIGKILL):
        """Kills it after so many answers, with more on their way, and after before()."""
        flying = {}
        c = Nbd.connect(daemon.unix, "disk")

        def take():
            error, cookie = c.simple()
            assert error == 0, f"error {error}:\n{daemon.text()}"
            kind, at, n, generation = flying.pop(cookie)
            self.count += 1
            self.flushes += kind == FLUSH
            for i in range(at, at + n):
                self.answered[i] = generation
                self.open.pop(i, None)

        for _ in range(requests):
            while len(flying) < DEPTH:
                self.send_one(c, flying)
            take()
        before()
        daemon.send_signal(number)
        daemon.wait()
        try:
            while flying:
                take()
        except (Closed, ConnectionError):
            pass
        c.close()

    def send_one(self, c, flying):
        r = self.rnd
        x = r.random()
        if x < 0.05:
            c.send(c.request(FLUSH))
            flying[c.cookie] = (FLUSH, 0, 0, 0)
            return
        while True:
            n = r.choice((1, 2, 8, 8, 8, 8, 64, 200))
            at = r.randrange(0, SLOTS - n)
            if all(a + m <= at or at + n <= a for _, a, m, _ in flying.values()):
                break
        generation, data, kind = 0, b"", WRITE_ZEROES
        if x < 0.9:
            self.generation += 1
            generation, kind = self.generation, WRITE
            data = b"".join(sector(i, generation) for i in range(at, at + n))
        for i in range(at, at + n):
            self.open.setdefault(i, set()).add(generation)
        head = c.request(kind, at * SECTOR, n * SECTOR, FUA if r.random() < 0.05 else 0)
        flying[c.cookie] = (kind, at, n, generation)
        c.send(head, data)

    def check(self, data):
        """What is found is what is there from now on."""
        for i in range(SLOTS):
            got = data[i * SECTOR:(i + 1) * SECTOR]
            number, found = struct.unpack(">QQ", got[:16])
            may = self.open.pop(i, set()) | {self.answered[i]}
            assert found in may and got == (sector(i, found) if found else bytes(SECTOR)), \
                f"sector {i} has generation {found} of sector {number}, not one of {may}; seed {SEED}"
            self.answered[i] = found


def rounds(driver, conn, kills, read):
    run("init", "--size", str(SIZE), driver, conn, secrets=[server.secret])
    m = Model(random.Random(SEED))
    for _ in range(kills):
        d = serve(driver, conn)
        with Nbd.connect(d.unix, "disk") as c:
            m.check(c.read(0, SIZE))
        m.write_until_killed(d, m.rnd.randint(1, 150))
    with serve(driver, conn) as d, Nbd.connect(d.unix, "disk") as c:
        m.check(c.read(0, SIZE))
        assert list(values(status(d), "mode")) == ["writeback"] and list(values(status(d), "durability")) == ["local"]
    m.check(read())  # it ended orderly
    print(f"     {driver} {kills} kills, {m.count} requests answered, {m.flushes} of them flushes; seed {SEED}")
    assert m.count > 0 and (m.flushes > 0 or kills < KILLS)  # one in thirty is a flush
    # Over a store that fails one request may take all of its time-out, 30 s.
    run("destroy", "--force", driver, conn, secrets=[server.secret], limit_s=3 * WAIT_S)


@suite.case
def killed_below_the_mapping():
    place = Bucket(server, client)
    folder = os.path.join(temp_dir(), "journal")
    rounds("sharded[size=256Ki]", f"{options(folder)}:{place.chain}", KILLS, lambda: read_sharded(place, OBJECT))
    assert not os.path.exists(folder), os.listdir(folder)
    place.clear()


@suite.case
def killed_above_the_mapping():
    place = Bucket(server, client)
    folder = os.path.join(temp_dir(), "journal")
    rounds(options(folder), f"sharded[size=256Ki]:{place.chain}", KILLS // 7, lambda: read_sharded(place, OBJECT))
    place.clear()


@suite.case
def killed_over_a_store_that_fails():
    place = Bucket(server, client)
    folder = os.path.join(temp_dir(), "journal")
    with FaultProxy(server.port, SEED) as proxy:
        proxy.mix(0.05)
        rounds("sharded[size=256Ki]", f"{options(folder)}:s3:" + server.url(place.prefix, proxy.port), KILLS // 7,
               lambda: read_sharded(place, OBJECT))
    place.clear()


@suite.case
def killed_with_puts_that_are_late():
    """Every other daemon leaves puts that the store does when the next one has sent all that was answered, and ended."""
    place = Bucket(server, client)
    folder = os.path.join(temp_dir(), "journal")
    codes = []
    with FaultProxy(server.port, SEED) as proxy:
        conn = f"{options(folder)}:s3:" + server.url(place.prefix, proxy.port)
        run("init", "--size", str(SIZE), "sharded[size=256Ki]", conn, secrets=[server.secret])
        m = Model(random.Random(SEED))
        rounds_n = KILLS // 4 * 2
        for i in range(rounds_n):
            proxy.clear()
            d = serve("sharded[size=256Ki]", conn)
            with Nbd.connect(d.unix, "disk") as c:
                m.check(c.read(0, SIZE))
            if i % 2 == 0:
                proxy.rule(Fault("late"), method="PUT", path="/block-", times=3)
                m.write_until_killed(d, m.rnd.randint(50, 150), lambda: proxy.wait(lambda p: p.kept == 3))
            else:
                m.write_until_killed(d, m.rnd.randint(50, 150), number=signal.SIGTERM)
                codes += proxy.let_late_in()
        proxy.clear()
        with serve("sharded[size=256Ki]", conn) as d, Nbd.connect(d.unix, "disk") as c:
            m.check(c.read(0, SIZE))
        m.check(read_sharded(place, OBJECT))
    print(f"     {rounds_n // 2} kills, {len(codes)} late puts, {codes.count(412)} of them refused; seed {SEED}")
    assert 412 in codes, codes  # with s3[probe=off] it is 200, and the model finds what is lost
    place.clear()


@suite.case
def one_daemon_for_a_folder():
    place = Bucket(server, client)
    folder = os.path.join(temp_dir(), "journal")
    conn = f"{options(folder)}:{place.chain}"
    run("init", "--size", str(SIZE), "sharded", conn, secrets=[server.secret])
    with serve("sharded", conn) as d:
        assert re.search(r"disk: cache mode=writeback durability=local disk=\S+ unsaved_bytes=0", d.text()), d.text()
        _, err = run("check", "--open", "sharded", conn, code=1, secrets=[server.secret])
        assert f"{folder} is in use by process {d.process.pid} (nbdrsd)" in err, err
    run("check", "--open", "sharded", conn, secrets=[server.secret])
    place.clear()


@suite.case
def what_is_missing_is_not_the_volume():
    """A certificate that is not found, say, does not mean that the volume is gone: its journal stays."""
    place, bucket = tempfile.mkdtemp(dir=temp_dir()), Bucket(server, client)
    driver = f"cache[disk={place}/cache,size=4Mi,mode=writeback,lag=10m]"

    def init(conn, code):
        return run("init", "--force", "--size", str(SIZE), "-e", "disk", driver, conn, code=code)[1]

    init("sharded:" + bucket.chain, 0)
    d = serve(driver, "sharded:" + bucket.chain)
    with Nbd.connect(d.unix, "disk") as c:
        c.write(0, b"kept" * 1024)
        c.do(FLUSH)
    d.process.kill()
    d.wait()
    err = init("sharded:" + bucket.chain.replace("s3:", f"s3[ca_file={place}/typo]:", 1), 1)
    assert f"{place}/cache has unsaved data, up to " in err and f"{place}/typo" in err, err
    with serve(driver, "sharded:" + bucket.chain) as d, Nbd.connect(d.unix, "disk") as c:
        same(c.read(0, 4096), b"kept" * 1024)
    bucket.clear()


@suite.case
def a_destroy_that_is_refused_changes_nothing():
    """The volume is the one it was, by its identity too: devices and cached data know it by that."""
    folder, bucket = os.path.join(tempfile.mkdtemp(dir=temp_dir()), "cache"), Bucket(server, client)
    chain = f"cache[disk={folder},size=4Mi,mode=writeback]", f"sharded:{bucket.chain}"
    run("init", "--size", str(SIZE), *chain)
    identity = bucket.get("uuid")
    assert identity
    with serve(*chain) as d:
        _, err = run("destroy", "--force", *chain, code=1)
        assert f"{folder} is in use by process {d.process.pid} (nbdrsd)" in err, err
    same(bucket.get("uuid"), identity)
    run("destroy", "--force", *chain)
    assert not bucket.names(), bucket.names()


suite.main()
