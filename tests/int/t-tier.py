#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=120
"""Clean data of the cache on disk: a killed daemon's successor reads from there, a flushed write is never lost behind
it, the folder has one daemon, and goes with its volume.
"""

from stores_test import *

suite = Suite()
SIZE = 8 * MIB
OBJECT = 256 * KIB


def number(daemon, key):
    return int(next(values(status(daemon), key)))


def volume(more=""):
    """A volume with random data: driver, connection, the folder, the data."""
    place = tempfile.mkdtemp(dir=temp_dir())
    folder = os.path.join(place, "cache")
    driver = "sharded[size=256Ki]"
    conn = f"cache[disk={folder},size=16Mi,mem=1Mi{more}]:file:{place}/vol/"
    run("init", "--size", str(SIZE), driver, conn)
    data = random.Random(SEED).randbytes(SIZE)
    with serve(driver, conn) as d, Nbd.connect(d.unix, "disk") as c:
        for off in range(0, SIZE, MIB):
            c.write(off, data[off:off + MIB])
        c.do(FLUSH)
    return driver, conn, folder, data


def read_all(daemon):
    with Nbd.connect(daemon.unix, "disk") as c:
        return b"".join(c.read(off, 64 * KIB) for off in range(0, SIZE, 64 * KIB))


def kill(daemon):
    daemon.process.kill()
    daemon.wait()


@suite.case
def killed_and_found():
    driver, conn, folder, data = volume()
    d = serve(driver, conn)
    same(read_all(d), data)
    with Nbd.connect(d.unix, "disk") as c:
        for k in range(16):
            c.write(k * 4096, b"%02d" % k * 2048)
        c.do(FLUSH)
    data = b"".join(b"%02d" % k * 2048 for k in range(16)) + data[16 * 4096:]
    kill(d)
    d = serve(driver, conn)
    marks = number(d, "tier_marks")
    assert marks == 1, f"one region was written: {marks}"
    same(read_all(d), data)
    hits, all_of_it = number(d, "tier_hits"), SIZE // (64 * KIB) // 2  # 16 objects, 4 MiB, are that region
    assert hits >= all_of_it, f"{hits} of {all_of_it} granules"
    assert number(d, "tier_bad") == 0
    kill(d)
    # The mark is there until somebody has seen to it.
    with serve(driver, conn) as d:
        assert number(d, "tier_marks") == 1
        same(read_all(d), data)
    with serve(driver, conn) as d:
        assert number(d, "tier_marks") == 0
        same(read_all(d), data)
        assert number(d, "tier_hits") >= SIZE // (64 * KIB)
    run("destroy", "--force", driver, conn)
    assert not os.path.exists(folder), os.listdir(folder)


@suite.case
def killed_with_a_journal():
    driver, conn, folder, data = volume(",journal=2Mi,mode=writeback,lag=50ms")
    data = bytearray(data)
    rnd = random.Random(SEED)
    for _ in range(6):
        d = serve(driver, conn)
        same(read_all(d), bytes(data))
        with Nbd.connect(d.unix, "disk") as c:
            for _ in range(rnd.randrange(1, 100)):
                at, n = rnd.randrange(0, SIZE - 8192), rnd.randrange(1, 8192)
                data[at:at + n] = rnd.randbytes(n)
                c.write(at, bytes(data[at:at + n]))
        kill(d)
    with serve(driver, conn) as d:
        same(read_all(d), bytes(data))
    run("destroy", "--force", driver, conn)
    assert not os.path.exists(folder), os.listdir(folder)


@suite.case
def made_anew_over_a_journal():
    """A killed daemon's journal is not played over the next volume of that name."""
    place = tempfile.mkdtemp(dir=temp_dir())
    folder = os.path.join(place, "cache")
    driver, conn = f"cache[disk={folder},size=4Mi,mode=writeback,lag=10m]", f"raw:file:{place}/disk.img"

    def init(size, *more, **how):
        return run("init", "--size", str(size), *more, "-e", "disk", driver, conn, **how)[1]

    def first_bytes(daemon):
        with Nbd.connect(daemon.unix, "disk") as c:
            return c.read(0, 4096)

    init(MIB)
    d = serve(driver, conn)
    with Nbd.connect(d.unix, "disk") as c:
        c.write(0, b"old " * 1024)
        c.do(FLUSH)
    err = init(MIB, "--force", code=1)
    assert f"{folder} is in use by process {d.process.pid} (nbdrsd)" in err, err
    kill(d)
    err = init(2 * MIB, code=1)
    assert f"{folder} has unsaved data, up to " in err and "--force" in err, err
    d = serve(driver, conn)
    same(first_bytes(d), b"old " * 1024)
    kill(d)
    init(MIB, "--force")
    with serve(driver, conn) as d:
        same(first_bytes(d), bytes(4096))


def refused(driver, conn):
    """What a daemon says that must not start."""
    d = serve(driver, conn, ready=False)
    code = d.wait()
    assert code == 1, f"it ended with {code}:\n" + d.text()
    return d.text()


@suite.case
def made_anew_without_the_cache():
    """A killed daemon's journal is not played over a volume that was made anew by somebody who did not look."""
    size = ("--size", str(SIZE))
    for form in "above", "below", "image":
        place = tempfile.mkdtemp(dir=temp_dir())
        folder = os.path.join(place, "cache")
        cache = f"cache[disk={folder},size=4Mi,mode=writeback,lag=10m]"
        driver, conn, bare = {"above": (cache, f"sharded:file:{place}/vol/", ("sharded", f"file:{place}/vol/")),
                              "below": ("sharded", f"{cache}:file:{place}/vol/", ("sharded", f"file:{place}/vol/")),
                              "image": (cache, f"raw:file:{place}/disk.img", ("raw", f"file:{place}/disk.img"))}[form]

        def first_bytes():
            with serve(driver, conn) as d, Nbd.connect(d.unix, "disk") as c:
                return c.read(0, 4096)

        run("init", *size, *bare)
        if form == "image" and "user.nbdrs.id" not in os.listxattr(f"{place}/disk.img"):
            continue  # a file system without attributes
        d = serve(driver, conn)
        with Nbd.connect(d.unix, "disk") as c:
            c.write(0, b"old " * 1024)
            c.do(FLUSH)
        kill(d)
        run("destroy", "--force", *bare)
        run("init", *size, *bare)
        with serve(*bare) as d, Nbd.connect(d.unix, "disk") as c:
            c.write(0, b"new " * 1024)
        said = refused(driver, conn)
        assert f"{folder} has unsaved data, up to " in said and "a former volume of this name" in said, said
        assert "move the folder away" in said and ("init --force" in said) == (form != "image"), said
        err = run("init", *size, "-e", "disk", driver, conn, code=1)[1]
        assert "former volume" in err, err
        # Away with it; then the other ways.
        os.rename(folder, folder + ".away")
        same(first_bytes(), b"new " * 1024)
        if form != "below":
            run("destroy", "--force", "-e", "disk", driver, conn)
            run("init", *size, "-e", "disk", driver, conn)
            same(first_bytes(), bytes(4096))
        shutil.rmtree(folder)
        os.rename(folder + ".away", folder)
        assert "former volume" in refused(driver, conn)
        if form == "below":
            err = run("destroy", "--force", driver, conn, code=1)[1]
            assert "former volume" in err, err
        run("init", "--force", *size, "-e", "disk", driver, conn)
        same(first_bytes(), b"new " * 1024 if form == "below" else bytes(4096))


@suite.case
def upgraded():
    """The next program finds it, and what the journal has is not older behind it."""
    for more in "", ",journal=2Mi,mode=writeback,lag=10m":
        driver, conn, _, data = volume(more)
        with serve(driver, conn) as d:
            same(read_all(d), data)
            with Nbd.connect(d.unix, "disk") as c:
                c.write(MIB, b"u" * 10000)
            data = data[:MIB] + b"u" * 10000 + data[MIB + 10000:]
            subprocess.run([os.path.join(BUILD, "nbdrsctl"), "--control", d.control, "upgrade"], timeout=WAIT_S,
                           check=True, capture_output=True)
            same(read_all(d), data)
            hits, few = number(d, "tier_hits"), SIZE // (64 * KIB) // 2
            assert hits >= few, f"{hits} hits, not {few}"


@suite.case
def one_daemon_for_a_folder():
    driver, conn, folder, _ = volume()
    with serve(driver, conn) as d:
        other = conn.replace("/vol/", "/vol2/")
        _, err = run("init", "--size", str(SIZE), driver, other, code=1)
        assert f"{folder} is in use by process {d.process.pid} (nbdrsd)" in err, err


suite.main()
