#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=120
"""One object on a web server as a read-only disk: nginx, and the same behind a proxy that fails."""

import re
import socket
import threading

from faultproxy import Fault, FaultProxy
from servers import TOKEN, Nginx
from stores_test import *

suite = Suite()
web = Nginx()
SIZE = 6 * MIB + 1023  # no multiple of anything
IMAGE = random.Random(SEED).randbytes(SIZE)
web.put("disk.img", IMAGE)


def at(path="disk.img", port=None):
    return f"//127.0.0.1:{port or web.port}/{path}"


def serve(path="disk.img", port=None, layer="http", args=()):
    return Daemon([("disk", "raw", f"{layer}:{at(path, port)}")], args=args)


def refused(conn, *words, driver="raw", **kwargs):
    """`check --open` fails, and its error has all these words."""
    _, err = run("check", "--open", driver, conn, code=1, **kwargs)
    for w in words:
        assert w in err, f"no {w!r} in: {err}"
    assert len(err.splitlines()) <= 3, err
    return err


def get_and_count(uri):
    """What nginx answered for `uri` so far; it writes a line after the answer, so one more goes behind."""
    mark = f"/mark-{random.getrandbits(64):x}"
    with socket.create_connection(("127.0.0.1", web.port), WAIT_S) as s:
        s.sendall(f"GET {mark} HTTP/1.0\r\n\r\n".encode())
        while s.recv(4096):
            pass
    deadline = time.monotonic() + WAIT_S
    while not web.requests(mark):
        assert time.monotonic() < deadline, "nginx writes no log"
        os.sched_yield()
    return web.requests(uri)


# --- Content ---------------------------------------------------------------------------------------


@suite.case
def the_content_is_the_same():
    with serve() as d:
        same(copy_out(d), IMAGE)
        r = random.Random(SEED)
        with Nbd.connect(d.unix, "disk") as c:
            assert c.size == SIZE
            for _ in range(60):
                off = r.randrange(SIZE)
                n = min(r.choice((1, 511, 512, 4096, 65536, 300000)), SIZE - off)
                same(c.read(off, n), IMAGE[off:off + n], f"{off}+{n}")
            same(c.read(SIZE - 1, 1), IMAGE[-1:])


@suite.case
def many_readers_at_a_time():
    with serve() as d, Nbd.connect(d.unix, "disk") as c:
        r = random.Random(SEED + 1)
        wanted = {}
        for _ in range(128):
            off = r.randrange(SIZE - 4096)
            c.send(c.request(READ, off, 4096))
            wanted[c.cookie] = off
        while wanted:
            error, cookie = c.simple()
            assert error == 0
            off = wanted.pop(cookie)
            same(c.recv(4096), IMAGE[off:off + 4096], f"{off}+4096")


@suite.case
def a_small_read_fetches_little():
    web.put("little.img", IMAGE)
    with serve("little.img") as d, Nbd.connect(d.unix, "disk") as c:
        before = len(get_and_count("/little.img"))
        for off in (5 * MIB, MIB, 3 * MIB):
            c.read(off, 512)
        log = get_and_count("/little.img")[before:]
    assert [(e[0], e[1]) for e in log] == [("GET", 206)] * 3, log
    assert sum(e[2] for e in log) <= 3 * 4096, log


@suite.case
def a_stream_is_read_in_few_requests():
    # From a server that is near enough even small ones would do.
    with FaultProxy(web.port, latency=0.01) as proxy, serve(port=proxy.port) as d, Nbd.connect(d.unix, "disk") as c:
        proxy.clear()
        got = b"".join(c.read(off, min(4096, SIZE - off)) for off in range(0, SIZE, 4096))
        same(got, IMAGE)
        ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", r.headers["range"]) for r in proxy.requests]
    fetched = sum(int(m[2]) + 1 - int(m[1]) for m in ranges)
    assert len(ranges) < 60, f"{len(ranges)} requests for {SIZE // 4096} reads in a row"
    assert fetched < SIZE * 1.5, f"{fetched} bytes for {SIZE}"


@suite.case
def it_is_read_only():
    for args in ((), ("-r",)):
        with serve(args=args) as d, Nbd.connect(d.unix, "disk") as c:
            assert c.flags & READ_ONLY
            assert c.do(WRITE, 0, 512, 0, b"x" * 512) == EPERM
            assert c.do(TRIM, 0, 512) == EPERM
            same(c.read(0, 4096), IMAGE[:4096])


@suite.case
def https_with_a_ca():
    path = f"//127.0.0.1:{web.tls_port}/disk.img"
    with Daemon([("disk", "raw", f"https[ca_file={web.ca}]:{path}")]) as d:
        same(copy_out(d), IMAGE)
    refused(f"retry[deadline=5s]:https:{path}", f"127.0.0.1:{web.tls_port}", "certificate")


@suite.case
def commands_that_make_and_remove_are_refused():
    for words in (["init", "--size", "1Mi"], ["destroy", "--force"]):
        _, err = run(*words, "raw", "http:" + at(), code=1)
        assert "http" in err and "no volume" in err, err
    out, _ = run("info", "raw", "http:" + at())
    assert str(SIZE) in out, out
    out, _ = run("check", "raw", "http:" + at())
    assert out == f"readahead:raw:retry:http:{at()}\n", out


# --- Changes and errors ----------------------------------------------------------------------------


def never_a_mixture(path):
    old, new = bytes([1]) * 4 * MIB, bytes([2]) * 4 * MIB
    web.put("changing.img", old)
    os.utime(f"{web.www}/changing.img", (1e9, 1e9))
    with serve(path) as d, Nbd.connect(d.unix, "disk") as c:
        same(c.read(0, 4096), old[:4096])
        web.put("changing.img", new)
        c.send(c.request(READ, 2 * MIB, 4096))
        error, _ = c.reply(READ, 2 * MIB, 4096)
        assert error == EIO, error
        d.wait_log(r"changed")
        # It stays an error, however long one waits.
        c.send(c.request(READ, MIB, 4096))
        assert c.reply(READ, MIB, 4096)[0] == EIO
    with serve(path) as d:
        same(copy_out(d), new)


@suite.case
def an_object_that_changes_is_an_error():
    never_a_mixture("changing.img")


@suite.case
def an_object_that_changes_is_an_error_without_etags():
    never_a_mixture("noetag/changing.img")


@suite.case
def an_object_that_goes_away_is_an_error():
    web.put("gone.img", IMAGE)
    with serve("gone.img") as d, Nbd.connect(d.unix, "disk") as c:
        c.read(0, 512)
        os.unlink(f"{web.www}/gone.img")
        c.send(c.request(READ, MIB, 512))
        assert c.reply(READ, MIB, 512)[0] == EIO


@suite.case
def errors_name_endpoint_and_cause():
    here = f"127.0.0.1:{web.port}"
    web.put("empty.img", b"")
    for path, *words in (("nope.img", "404"), ("forbidden/x", "403"), ("unauthorized/x", "401"),
                         ("noranges/disk.img", "range")):
        refused("http:" + at(path), here, *words)
    # What may pass is tried again for as long as the chain says.
    refused(f"retry[deadline=300ms]:http:{at('broken/x')}", here, "500")
    with FaultProxy(web.port) as proxy:
        proxy.rule("no_ranges")
        refused("http:" + at(port=proxy.port), f"127.0.0.1:{proxy.port}", "range")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, but nobody listens
        port = s.getsockname()[1]
        refused("retry[deadline=300ms]:http:" + at(port=port), f"127.0.0.1:{port}", "connect")
    refused("retry[deadline=300ms]:http://no.such.host.invalid/x", "no.such.host.invalid")


@suite.case
def headers_come_from_a_file():
    path = os.path.join(temp_dir(), "headers")
    with open(path, "w") as f:
        f.write(f"X-Token: {TOKEN}\nX-Other: 1\n")
    conn = f"http[header_file={path}]:{at('private/disk.img')}"
    with Daemon([("disk", "raw", conn)]) as d:
        same(copy_out(d), IMAGE)
        text = d.text()
    must_hide(text, [TOKEN])
    refused("http:" + at("private/disk.img"), "403", secrets=[TOKEN])
    refused(f"http[header_file={path}.not]:{at()}", path + ".not")
    with open(path, "w") as f:
        f.write(f"no header at all {TOKEN}\n")
    refused(conn, path, secrets=[TOKEN])


@suite.case
def errors_hide_the_query():
    conn = f"http:{at('nope.img')}?signature=verysecret"
    refused(conn, "404", secrets=["verysecret"])
    with Daemon([("disk", "raw", f"http:{at()}?signature=verysecret")]) as d:
        must_hide(shown(d.process.pid), ["verysecret"])
        same(copy_out(d), IMAGE)
        text = d.text()
    must_hide(text, ["verysecret"])


@suite.case
def a_moved_object_is_named():
    refused("http:" + at("moved/disk.img"), "302", "moved to " + web.url + "/disk.img")


# --- Faults ----------------------------------------------------------------------------------------


@suite.case
def failing_requests_go_unnoticed():
    with FaultProxy(web.port, SEED) as proxy, serve(port=proxy.port) as d:
        # Not a stream, so that there are many requests.
        proxy.mix(0.05)
        r = random.Random(SEED + 2)
        with Nbd.connect(d.unix, "disk") as c:
            for _ in range(12):
                wanted = {}
                for _ in range(16):
                    off = r.randrange(SIZE - 20000)
                    c.send(c.request(READ, off, 20000))
                    wanted[c.cookie] = off
                while wanted:
                    error, cookie = c.simple()
                    assert error == 0, error
                    off = wanted.pop(cookie)
                    same(c.recv(20000), IMAGE[off:off + 20000], f"{off}+20000")
        proxy.mix(0.3)
        same(copy_out(d), IMAGE)
        assert proxy.failed() >= 3, proxy.counts


@suite.case
def each_fault_goes_unnoticed():
    with FaultProxy(web.port, SEED) as proxy, serve(port=proxy.port) as d, Nbd.connect(d.unix, "disk") as c:
        for i, fault in enumerate((
                Fault("reset"), Fault("reset_response", at=0), Fault("reset_response", at=9), Fault("truncate", at=0),
                Fault("truncate", at=9), Fault("status", code=500), Fault("status", code=502),
                Fault("status", code=503), Fault("status", code=429), Fault("length", by=1), Fault("lost"),
                Fault("garbage"), Fault("throttle", rate=100000), Fault("delay", seconds=0.02))):
            proxy.clear()
            proxy.rule(fault, method="GET", times=1)
            off = (i * 1237 * 512) % (5 * MIB)
            same(c.read(off, 4096), IMAGE[off:off + 4096], repr(fault))
            assert proxy.counts[f"GET {fault}"] == 1, (fault, proxy.counts)


@suite.case
def a_server_that_asks_to_wait_is_left_alone():
    with FaultProxy(web.port, SEED) as proxy, serve(port=proxy.port) as d, Nbd.connect(d.unix, "disk") as c:
        proxy.rule(Fault("status", code=503, retry_after=1), method="GET", times=1)
        start = time.monotonic()
        same(c.read(MIB, 4096), IMAGE[MIB:MIB + 4096])
        assert time.monotonic() - start >= 0.9, "Retry-After: 1 was not heeded"


@suite.case
def a_stalled_request_ends_in_time():
    with FaultProxy(web.port, SEED) as proxy, serve(port=proxy.port, layer="http[timeout=500ms]") as d, \
            Nbd.connect(d.unix, "disk") as c:
        proxy.rule(Fault("stall"), method="GET", times=1)
        same(c.read(MIB, 4096), IMAGE[MIB:MIB + 4096])
        assert proxy.counts["GET stall"] == 1, proxy.counts


@suite.case
def a_server_may_go_away_for_a_while():
    with serve() as d, Nbd.connect(d.unix, "disk") as c:
        same(c.read(0, 512), IMAGE[:512])
        web.stop_serving()
        c.send(c.request(READ, 2 * MIB, 4096))
        d.wait_log(r"127\.0\.0\.1:%d" % web.port)  # says that it is away
        web.start()
        error, data = c.reply(READ, 2 * MIB, 4096)
        assert error == 0
        same(data, IMAGE[2 * MIB:2 * MIB + 4096])


@suite.case
def it_gives_up_when_told_to():
    with Daemon([("disk", "raw", f"retry[deadline=300ms]:http:{at()}")]) as d, Nbd.connect(d.unix, "disk") as c:
        web.stop_serving()
        try:
            c.send(c.request(READ, 0, 4096))
            assert c.reply(READ, 0, 4096)[0] == EIO
            d.wait_log(r"127\.0\.0\.1:%d" % web.port)
        finally:
            web.start()
        same(c.read(0, 4096), IMAGE[:4096])


suite.main()
