#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=150
"""Other people's NBD clients against the daemon, in the forms that the README shows.

QEMU's tools, libnbd's, fio and nbd-client, over TCP and unix sockets, on each kind of store. What goes in
and out is compared with the files themselves.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import urllib.parse

from nbdrs_test import *

try:
    import nbd
except ImportError:
    nbd = None

SANITIZER = os.environ.get("NBDRS_SANITIZER")
SIZE = 24 * MIB

suite = Suite()


def run(*argv, code=0):
    """What a client prints; it must end with `code`."""
    if shutil.which(argv[0]) is None and not os.path.exists(argv[0]):
        raise Skip(f"{argv[0]} is missing")
    p = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       timeout=WAIT_S * (4 if SANITIZER else 1), text=True,
                       errors="replace")  # nbdinfo quotes what file(1) says of random data
    assert p.returncode == code, f"{' '.join(argv)}: exit status {p.returncode}\n{p.stdout}"
    return p.stdout


def sbin(name):
    """Debian keeps some clients where only root's PATH looks."""
    return shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin") or name


def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Disks:
    """One daemon with every kind of export, and the images behind them."""

    daemon = None

    @classmethod
    def get(cls):
        if cls.daemon is not None:
            return cls
        cls.dir, cls.shm = temp_dir(), tmpfs_dir()
        cls.source = os.path.join(cls.dir, "source.img")
        make_source(cls.source)
        shutil.copyfile(cls.source, os.path.join(cls.dir, "ro.img"))
        os.chmod(os.path.join(cls.dir, "ro.img"), 0o444)
        cls.paths = {"disk": f"{cls.dir}/disk.img", "direct": f"{cls.dir}/direct.img",
                     "shm": f"{cls.shm}/shm.img"}
        for path in cls.paths.values():
            with open(path, "wb") as f:
                f.truncate(SIZE)
        cls.daemon = Daemon([("disk", "raw", "file:" + cls.paths["disk"]),
                             ("direct", "raw", "file[direct=on]:" + cls.paths["direct"]),
                             ("shm", "raw", "file:" + cls.paths["shm"]),
                             ("mem", "raw", f"mem[size={SIZE}]")], tcp=True)
        cls.writable = list(cls.paths) + ["mem"]
        return cls

    @classmethod
    def uris(cls, name):
        """Both ways in."""
        d = cls.get().daemon
        return [f"nbd://127.0.0.1:{d.port}/{name}", f"nbd+unix:///{name}?socket={urllib.parse.quote(d.unix)}"]


def both_or_one(name, i):
    """Both ways in for a file, one of them in turns for other stores: copying takes its time."""
    return Disks.uris(name) if name == "disk" else [Disks.uris(name)[i % 2]]


def make_source(path):
    """Data and holes of many lengths, pieces that are zero but not holes, and an end that is a hole."""
    with open(path, "wb") as f:
        at = 0
        for i, n in enumerate((4 * KIB, 60 * KIB, MIB, 3 * MIB, 512, 100 * KIB, 2 * MIB)):
            f.seek(at)
            f.write(os.urandom(n))
            if i == 2:
                f.write(bytes(MIB))
                at += MIB
            at += n + (i + 1) * 64 * KIB
            at += -at % 4096
        f.truncate(SIZE)


def data_ranges(path):
    """[(start, end)] of what is no hole, as the file system says."""
    found, at = [], 0
    with open(path, "rb") as f:
        while True:
            try:
                start = os.lseek(f.fileno(), at, os.SEEK_DATA)
            except OSError:
                return found
            at = os.lseek(f.fileno(), start, os.SEEK_HOLE)
            found.append((start, at))


# --- QEMU ------------------------------------------------------------------------------------------


@suite.case
def qemu_img_info_in_the_readmes_form():
    d = Disks.get().daemon
    for name in Disks.writable:
        out = run("qemu-img", "info", f"nbd:127.0.0.1:{d.port}:exportname={name}")
        assert "file format: raw" in out and f"({SIZE} bytes)" in out, out
        out = run("qemu-img", "info", f"nbd:unix:{d.unix}:exportname={name}")
        assert f"({SIZE} bytes)" in out, out
        for uri in Disks.uris(name):
            info = json.loads(run("qemu-img", "info", "--output=json", uri))
            assert info["virtual-size"] == SIZE, info
    out = run("qemu-img", "info", f"nbd:127.0.0.1:{d.port}:exportname=nonesuch", code=1)
    assert "nonesuch" in out, out


@suite.case
def qemu_img_convert_in_and_out():
    source = Disks.get().source
    for i, name in enumerate(Disks.writable):
        for uri in both_or_one(name, i):
            out = os.path.join(Disks.shm, "out.img")
            run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri)
            if name in Disks.paths:
                assert digest(Disks.paths[name]) == digest(source), f"{uri}: in"
            run("qemu-img", "convert", "-f", "raw", "-O", ("raw", "qcow2")[i % 2], uri, out)
            assert "identical" in run("qemu-img", "compare", source, out), f"{uri}: out"
            assert "identical" in run("qemu-img", "compare", "-f", "raw", source, uri)


@suite.case
def qemu_img_map_shows_the_holes():
    source = Disks.get().source
    for uri in Disks.uris("disk"):
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri)
        extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri))
        data = [(e["start"], e["start"] + e["length"]) for e in extents if e["data"]]
        assert sum(e["length"] for e in extents) == SIZE
        assert data == data_ranges(Disks.paths["disk"]), (data, data_ranges(Disks.paths["disk"]))
        assert len(data) >= 5


def qemu_io(uri, *commands, options=()):
    words = [w for c in commands for w in ("-c", c)]
    out = run("qemu-io", "-f", "raw", *options, *words, uri)
    assert "failed" not in out.lower() and "error" not in out.lower(), out
    return out


@suite.case
def qemu_io_every_command():
    Disks.get()
    for name in Disks.writable:
        for uri in Disks.uris(name):
            qemu_io(uri, "write -P 0xab 1M 1M", "read -P 0xab 1M 1M", "write -P 0xcd 1000 3001",
                    "read -P 0xcd 1000 3001", "flush",
                    "write -f -P 0x11 2M 64k", "read -P 0x11 2M 64k",
                    "write -z 1M 64k", "read -P 0 1M 64k", "read -P 0xab 1114112 64k",
                    "write -z -u 1114112 64k", "read -P 0 1114112 64k", "read -P 0xab 1179648 64k",
                    "discard 1536k 256k", "read -P 0xab 1792k 256k",
                    "aio_write -P 0x22 3M 1M", "aio_write -P 0x33 4M 1M", "aio_flush",
                    "read -P 0x22 3M 1M", "read -P 0x33 4M 1M",
                    "writev -P 0x44 5M 512 1024 4096", "readv -P 0x44 5M 4096 1024 512",
                    "write -P 0x55 23M 1M", "read -P 0x55 23M 1M", "flush")
            # The same through QEMU's own cache modes: another process, what was flushed is there.
            qemu_io(uri, "read -P 0x11 2M 64k", "read -P 0x33 4M 1M", options=("-t", "none"))


# --- libnbd ----------------------------------------------------------------------------------------


@suite.case
def nbdinfo_describes():
    d = Disks.get().daemon
    for name in Disks.writable:
        for uri in Disks.uris(name):
            info = json.loads(run("nbdinfo", "--json", uri))
            assert info["protocol"] == "newstyle-fixed" and info["structured"] is True, info
            (export,) = info["exports"]
            assert export["export-name"] == name and export["export-size"] == SIZE
            assert export["contexts"] == ["base:allocation"]
            for flag in ("can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero", "can_df", "can_cache"):
                assert export[flag] is True, (name, flag)
            assert export["is_read_only"] is False
            assert export["block_size_minimum"] <= export["block_size_preferred"] <= \
                export["block_size_maximum"] == 32 * MIB
    exports = json.loads(run("nbdinfo", "--list", "--json", f"nbd://127.0.0.1:{d.port}"))["exports"]
    assert [e["export-name"] for e in exports] == ["disk", "direct", "shm", "mem"]
    assert run("nbdinfo", "--size", Disks.uris("mem")[0]).strip() == str(SIZE)
    assert run("nbdinfo", "--can", "multi-conn", Disks.uris("disk")[1]) == ""


@suite.case
def nbdinfo_map_shows_the_holes():
    source = Disks.get().source
    for uri in Disks.uris("disk") + Disks.uris("direct"):
        name = "disk" if "/disk" in uri else "direct"
        run("nbdcopy", "--flush", source, uri)
        extents = json.loads(run("nbdinfo", "--map", "--json", uri))
        data = [(e["offset"], e["offset"] + e["length"]) for e in extents if e["type"] == 0]
        holes = [e for e in extents if e["type"] == 3]
        assert sum(e["length"] for e in extents) == SIZE
        assert data == data_ranges(Disks.paths[name]), (uri, data)
        assert holes and len(data) >= 5


@suite.case
def nbdcopy_in_and_out():
    source = Disks.get().source
    for i, name in enumerate(Disks.writable):
        for uri in both_or_one(name, i + 1):
            out = os.path.join(Disks.shm, "out.img")
            with open(out, "wb"):
                pass
            run("nbdcopy", "--connections=4", "--requests=32", "--flush", source, uri)
            if name in Disks.paths:
                assert digest(Disks.paths[name]) == digest(source), f"{uri}: in"
            run("nbdcopy", "--connections=4", uri, out)
            assert digest(out) == digest(source), f"{uri}: out"
    # From one export to another, sparse as it was; and back with everything allocated.
    run("nbdcopy", Disks.uris("disk")[0], Disks.uris("shm")[1])
    assert digest(Disks.paths["shm"]) == digest(source)
    used = os.stat(Disks.paths["shm"]).st_blocks * 512
    assert used < SIZE // 2, f"{used} bytes for a sparse disk"
    run("nbdcopy", "--allocated", "--synchronous", Disks.uris("shm")[0], Disks.uris("mem")[1])
    run("nbdcopy", "--no-extents", Disks.uris("mem")[0], out)
    assert digest(out) == digest(source)


def need_libnbd():
    if nbd is None:
        raise Skip("python3-libnbd is missing (or this is not /usr/bin/python3)")


@suite.case
def libnbd_structured_and_simple():
    need_libnbd()
    Disks.get()
    for name in Disks.writable:
        for uri in Disks.uris(name):
            for structured in (True, False):
                h = nbd.NBD()
                h.set_strict_mode(0)
                h.set_request_structured_replies(structured)
                if structured:
                    h.add_meta_context("base:allocation")
                h.connect_uri(uri)
                assert h.get_structured_replies_negotiated() == structured
                assert h.get_size() == SIZE and h.can_df() == structured
                data = os.urandom(300001)
                h.pwrite(data, 777)
                assert h.pread(len(data), 777) == data
                h.zero(100000, 5000, nbd.CMD_FLAG_NO_HOLE)
                h.trim(8192, 200 * 4096)
                assert h.pread(100000, 5000) == bytes(100000)
                assert h.pread(4223, 777) == data[:4223]
                h.cache(65536, 0)
                h.flush(0)
                for off, n in ((SIZE - 1, 2), (SIZE, 1), (1 << 62, 512)):
                    try:
                        h.pread(n, off)
                    except nbd.Error as e:
                        assert e.errnum == EINVAL, e
                    else:
                        raise AssertionError("a read beyond the end")
                if structured:
                    check_structured(h, name in Disks.paths)
                h.shutdown()


def check_structured(h, sends_holes):
    h.trim(4 * MIB, 8 * MIB)
    h.pwrite(b"x" * MIB, 9 * MIB)
    chunks = []

    def chunk(buf, offset, status, error):
        chunks.append((offset, len(buf), status))

    data = h.pread_structured(4 * MIB, 8 * MIB, chunk)
    assert data == bytes(MIB) + b"x" * MIB + bytes(2 * MIB)
    # Only stores that may be largely empty look for zeroes.
    assert any(s == nbd.READ_HOLE for _, _, s in chunks) == sends_holes, chunks
    chunks.clear()
    assert h.pread_structured(4 * MIB, 8 * MIB, chunk, nbd.CMD_FLAG_DF) == data
    assert chunks == [(8 * MIB, 4 * MIB, nbd.READ_DATA)], chunks
    entries = []

    def extent(context, offset, found, error):
        assert context == "base:allocation" and error.value == 0
        entries.extend(zip(found[::2], found[1::2]))

    h.block_status(4 * MIB, 8 * MIB, extent)
    assert sum(n for n, _ in entries) == 4 * MIB, entries
    merged = []
    for n, flags in entries:
        if merged and merged[-1][1] == flags:
            n += merged.pop()[0]
        merged.append((n, flags))
    assert merged == [(MIB, 3), (MIB, 0), (2 * MIB, 3)], merged


@suite.case
def libnbd_many_commands_in_flight():
    need_libnbd()
    count, n = 2000, 4096
    for uri in Disks.uris("disk") + Disks.uris("mem"):
        h = nbd.NBD()
        h.connect_uri(uri)
        data = [bytes([i % 256, i // 256]) * (n // 2) for i in range(count)]
        for what in ("write", "read"):
            cookies, buffers = set(), []
            for i in range(count):
                buf = nbd.Buffer.from_bytearray(bytearray(data[i] if what == "write" else n))
                buffers.append(buf)
                submit = h.aio_pwrite if what == "write" else h.aio_pread
                cookies.add(submit(buf, i * n))
                while h.aio_in_flight() > 500:
                    h.poll(-1)
            while h.aio_in_flight() > 0:
                h.poll(-1)
            for c in cookies:
                assert h.aio_command_completed(c)
            if what == "read":
                for i in range(count):
                    assert buffers[i].to_bytearray() == data[i], f"{uri} block {i}"
        h.shutdown()


# --- Read-only -------------------------------------------------------------------------------------


@suite.case
def a_read_only_export():
    source = Disks.get().source
    with Daemon([("disk", "raw", f"file:{Disks.dir}/ro.img")], ["-r"], tcp=True) as d:
        uri = f"nbd://127.0.0.1:{d.port}/disk"
        (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
        assert export["is_read_only"] is True and export["export-size"] == SIZE
        for flag in ("can_trim", "can_zero", "can_fua"):
            assert export[flag] is False, flag
        out = os.path.join(Disks.dir, "out.img")
        with open(out, "wb"):
            pass
        run("nbdcopy", uri, out)
        assert digest(out) == digest(source)
        said = run("qemu-io", "-f", "raw", "-c", "write 0 4k", uri, code=1)
        assert re.search("read.?only|denied|not permitted", said, re.IGNORECASE), said
        qemu_io(uri, "read 0 1M", options=("-r",))
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, out)
        assert digest(out) == digest(source)
        # Others may read the file meanwhile, and serve it; nobody may write to it.
        with Daemon([("again", "raw", f"file:{Disks.dir}/ro.img")], ["-r"]):
            pass
        assert digest(f"{Disks.dir}/ro.img") == digest(source)


# --- fio, nbdload, nbd-client ----------------------------------------------------------------------


@suite.case
def fio_verify_with_several_connections():
    if "nbd" not in run("fio", "--enghelp").split():
        raise Skip("this fio has no nbd engine")
    for name, uri in (("disk", Disks.uris("disk")[0]), ("disk", Disks.uris("disk")[1]),
                      ("direct", Disks.uris("direct")[1]), ("mem", Disks.uris("mem")[0])):
        out = run("fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--bsrange=512-64k",
                  "--bs_unaligned=0", "--size=4m", "--offset_increment=4m", "--numjobs=4", "--iodepth=16",
                  "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=256", "--fsync=64",
                  "--verify_state_save=0", "--thread", "--group_reporting", "--output-format=json")
        result = json.loads(out[out.index("{"):])
        (job,) = result["jobs"]
        assert job["error"] == 0, out
        assert job["write"]["io_kbytes"] > 4 * KIB and job["read"]["io_kbytes"] > 4 * KIB, name
        assert job["job options"]["numjobs"] == "4"


@suite.case
def nbdload_verifies_four_connections():
    d = Disks.get().daemon
    for name in ("disk", "shm", "mem"):
        for where in (["--unix", d.unix], ["--tcp", f"127.0.0.1:{d.port}"]):
            out = json.loads(run(os.path.join(BUILD, "nbdload"), *where, "--export", name, "--verify",
                                 "--pattern", "mixed", "--connections", "4", "--depth", "32", "--block", "4k",
                                 "--ops", "4000" if SANITIZER else "20000"))
            assert out["errors"] == 0 and out["ops"] > 0, out
            assert out["verify"]["mismatches"] == 0 and out["verify"]["checked"] > 0, out


@suite.case
def nbd_client_lists():
    d = Disks.get().daemon
    out = run(sbin("nbd-client"), "-l", "127.0.0.1", str(d.port))
    names = [l.split(":")[0].strip() for l in out.splitlines()]
    assert [n for n in names if n in ("disk", "direct", "shm", "mem")] == ["disk", "direct", "shm", "mem"], out


# --- Many exports, many clients --------------------------------------------------------------------


@suite.case
def several_exports_at_the_same_time():
    """Each client sees its own disk."""
    source = Disks.get().source
    folder = temp_dir()
    exports = []
    for i in range(4):
        path = f"{folder}/disk{i}.img"
        with open(path, "wb") as f:
            f.truncate(SIZE)
        exports.append((f"disk{i}", "raw", "file:" + folder + "/" + f"disk{i}.img"))
    with Daemon(exports, tcp=True) as d:
        copies = []
        for i in range(4):
            own = f"{folder}/source{i}.img"
            shutil.copyfile(source, own)
            with open(own, "r+b") as f:
                f.write(bytes([i]) * MIB)
            copies.append(subprocess.Popen(["nbdcopy", "--flush", own, f"nbd://127.0.0.1:{d.port}/disk{i}"]))
        assert [p.wait(WAIT_S * 4) for p in copies] == [0] * 4
        for i in range(4):
            assert digest(f"{folder}/disk{i}.img") == digest(f"{folder}/source{i}.img")
        out = os.path.join(folder, "first.img")
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", f"nbd:127.0.0.1:{d.port}", out)
        assert digest(out) == digest(f"{folder}/source0.img"), "no name is not the first export"


@suite.case
def the_shared_daemon_ends_well():
    Disks.get().daemon.stop()


suite.main()
