#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=120
"""Volumes that get another size while they are served: nbdrsctl resize, without a kernel."""

import json
import os
import random
import subprocess
import sys
import threading
import time

from nbdrs_test import *

CTL = os.path.join(BUILD, "nbdrsctl")
NBDRSD = os.path.join(BUILD, "nbdrsd")
EINVAL, ENOSPC = 22, 28

suite = Suite()


def resize(d, name, size, *args, code=0):
    """Runs it; standard error."""
    p = subprocess.run([CTL, "--control", d.control, "resize", name, str(size), *args], text=True,
                       capture_output=True, timeout=WAIT_S, check=False)
    assert p.returncode == code, p
    return p.stderr


def size_of(d, name):
    with Nbd.connect(d.unix, name) as n:
        return n.size


def volumes():
    """[(name, driver, conn)] of every kind that can be resized, 8 MiB each, and the folder of the files."""
    folder = temp_dir()
    made = [("file", "raw", f"file:{folder}/a.img"),
            ("cached", "raw", f"cache[mem=16Mi]:file:{folder}/b.img"),
            ("ahead", "raw", f"readahead:file:{folder}/c.img"),
            ("shards", "readahead:sharded[size=1Mi]", f"file:{folder}/d/")]
    for name, driver, conn in made:
        subprocess.run([NBDRSD, "init", "--size", "8Mi", driver, conn], check=True, capture_output=True)
    return [*made, ("mem", "raw", "mem[size=8Mi]"),
            ("waits", "raw", "retry:delay[read=1ms,write=1ms]:mem[size=8Mi]")], folder


@suite.case
def a_volume_grows_under_its_clients():
    vols, folder = volumes()
    d = Daemon(vols)
    try:
        for name, _, _ in vols:
            with Nbd.connect(d.unix, name) as old:
                # Up to the end: caches and read-ahead know the last, short part.
                old.write(0, b"a" * 4096)
                old.write(8 * MIB - 4096, b"z" * 4096)
                for off in range(0, 8 * MIB, 128 << 10):
                    old.read(off, 128 << 10)
                assert old.do(WRITE, 8 * MIB, data=b"x" * 512) == ENOSPC, name
                resize(d, name, 11 * MIB + 512)
                assert size_of(d, name) == 11 * MIB + 512, name
                # Who was connected before does not know, but may.
                assert old.read(8 * MIB - 4096, 8192) == b"z" * 4096 + bytes(4096), name
                assert old.read(11 * MIB, 512) == bytes(512), name
                old.write(11 * MIB, b"e" * 512)
                old.write(9 * MIB, b"n" * 4096)
                assert old.do(FLUSH) == 0
                assert old.do(READ, 11 * MIB, 1024) == EINVAL, name
                assert old.read(0, 4096) == b"a" * 4096, name
            resize(d, name, 11 * MIB + 512)  # again: done already
        assert os.path.getsize(f"{folder}/a.img") == 11 * MIB + 512
        for _ in range(9):  # lent from the page cache, behind where its mapping ended
            with Nbd.connect(d.unix, "file") as n:
                assert n.read(9 * MIB, 4096) == b"n" * 4096
    finally:
        d.kill()
    with Daemon(vols[:4]) as d:
        for name, _, _ in vols[:4]:
            with Nbd.connect(d.unix, name) as n:
                assert n.size == 11 * MIB + 512, name
                assert n.read(9 * MIB, 4096) == b"n" * 4096 and n.read(11 * MIB, 512) == b"e" * 512, name


@suite.case
def a_volume_shrinks_only_when_told_and_nothing_comes_back():
    vols, _ = volumes()
    with Daemon(vols) as d:
        for name, _, _ in vols:
            with Nbd.connect(d.unix, name) as old:
                for off in range(0, 8 * MIB, MIB):
                    old.write(off, os.urandom(MIB))
                assert old.do(FLUSH) == 0
                kept = old.read(2 * MIB, MIB + 512)
                err = resize(d, name, 3 * MIB + 512, code=1)
                assert "--shrink" in err and "8388608" in err, err
                assert size_of(d, name) == 8 * MIB, name
                resize(d, name, 3 * MIB + 512, "--shrink")
                assert size_of(d, name) == 3 * MIB + 512, name
                assert old.do(WRITE, 3 * MIB + 512, data=b"x" * 512) == ENOSPC, name
                assert old.do(READ, 3 * MIB, 1024) == EINVAL, name
                assert old.read(2 * MIB, MIB + 512) == kept, name
                resize(d, name, "8Mi")
                for off in range(3 * MIB + 512, 8 * MIB, 512 << 10):
                    length = min(512 << 10, 8 * MIB - off)
                    assert old.read(off, length) == bytes(length), (name, off)
                assert old.read(2 * MIB, MIB + 512) == kept, name


@suite.case
def what_cannot_be_is_refused_by_name():
    folder = temp_dir()
    with open(f"{folder}/disk.img", "wb") as f:
        f.truncate(MIB)
    with Daemon([("disk", "raw", "mem[size=1Mi]"), ("small", "raw", "mem[size=1Mi]")]) as d:
        for size, code, text in (("0", 2, "not a size"), ("x", 2, "not a size"), ("1000", 1, "multiple of 512"),
                                 ("8Ei", 2, "not a size"), ("512Ti", 1, "mem: it can grow to 1GiB, not further")):
            err = resize(d, "disk", size, code=code)
            assert text in err, (size, err)
        assert "no export 'nope'" in resize(d, "nope", "2Mi", code=4)
        assert size_of(d, "disk") == MIB
    with Daemon([("disk", "raw", f"file:{folder}/disk.img")], ["-r"]) as d:
        assert "read-only" in resize(d, "disk", "2Mi", code=1)
    with Daemon([("disk", "raw", f"file[direct]:{folder}/disk.img")]) as d:
        os.truncate(f"{folder}/disk.img", MIB)
        resize(d, "disk", 2 * MIB)
        with Nbd.connect(d.unix, "disk") as n:
            n.write(2 * MIB - 100, b"x" * 100)
            assert n.read(2 * MIB - 100, 100) == b"x" * 100
    for args, text in ((["resize", "disk"], "EXPORT SIZE"), (["resize"], "EXPORT SIZE"),
                       (["status", "--shrink"], "goes with resize")):
        p = subprocess.run([CTL, *args], text=True, capture_output=True, check=False)
        assert p.returncode == 2 and text in p.stderr, p


@suite.case
def a_resize_that_fails_changes_nothing():
    switch = os.path.join(temp_dir(), "broken")
    folder = temp_dir()
    chain = f"fault[file={switch},ops=put|del|list|stat]:file:{folder}/"
    subprocess.run([NBDRSD, "init", "--size", "4Mi", "sharded[size=1Mi]", f"file:{folder}/"], check=True,
                   capture_output=True)
    with Daemon([("disk", "sharded[size=1Mi]", chain)]) as d, Nbd.connect(d.unix, "disk") as n:
        n.write(0, b"x" * 4 * MIB)
        with open(switch, "wb"):
            pass
        for size in ("8Mi", "2Mi"):
            err = resize(d, "disk", size, "--shrink", code=1)
            assert "export 'disk': layer sharded" in err, err
            assert size_of(d, "disk") == 4 * MIB
            assert n.read(0, 4 * MIB) == b"x" * 4 * MIB
        os.unlink(switch)
        resize(d, "disk", "2Mi", "--shrink")
        resize(d, "disk", "8Mi")
        assert n.read(0, 8 * MIB) == b"x" * 2 * MIB + bytes(6 * MIB)


@suite.case
def requests_in_flight_are_waited_for():
    with Daemon([("disk", "raw", "delay[write=1s]:mem[size=1Mi]")]) as d, Nbd.connect(d.unix, "disk") as n:
        n.send(n.request(WRITE, 512 << 10, 4096), b"w" * 4096)
        first = n.cookie
        time.sleep(0.1)  # it is in the chain: nothing outside shows that
        begun = time.monotonic()
        resize(d, "disk", "256Ki", "--shrink")
        assert time.monotonic() - begun > 0.5
        assert n.simple() == (0, first)
        assert n.do(READ, 512 << 10, 512) == EINVAL


@suite.case
def clients_go_on_through_fifty_resizes():
    rounds = 50 if os.environ.get("NBDRS_FULL") == "1" else 12
    vols, _ = volumes()
    stop = threading.Event()
    wrong = []

    def work(d, name, seed):
        rnd = random.Random(seed)
        model = bytearray(MIB)
        base = seed * MIB
        try:
            with Nbd.connect(d.unix, name) as n:
                while not stop.is_set():
                    off, length = rnd.randrange(0, MIB - 8192, 512), rnd.randrange(512, 8192, 512)
                    if rnd.random() < .5:
                        data = rnd.randbytes(length)
                        n.write(base + off, data)
                        model[off:off + length] = data
                    else:
                        assert n.read(base + off, length) == model[off:off + length], (name, off)
                assert n.read(base, MIB) == bytes(model), name
        except Exception as e:  # pylint: disable=broad-except
            wrong.append((name, e))
    with Daemon(vols) as d:
        threads = [threading.Thread(target=work, args=(d, v[0], s)) for v in vols for s in (0, 1)]
        for t in threads:
            t.start()
        for i in range(rounds):
            for name, _, _ in vols:
                resize(d, name, (5 + i * 7 % 11) * MIB + 512 * (i % 3), "--shrink")
        stop.set()
        for t in threads:
            t.join()
    assert not wrong, wrong


if __name__ == "__main__":
    suite.main()
