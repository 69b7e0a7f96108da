#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=120
"""nbdrsctl upgrade: the daemon becomes another program under its clients' feet."""

import base64
import fcntl
import http.server
import json
import os
import random
import re
import signal
import socket

import subprocess
import threading
import time

from ctl_test import Ctl, wait_until
from nbdrs_test import *

CTL = os.path.join(BUILD, "nbdrsctl")
# NBDRS_FULL=1 makes many more.
ROUNDS = 100 if os.environ.get("NBDRS_FULL") else 8

suite = Suite()


def upgrade(d, *args, code=0):
    """Runs `nbdrsctl upgrade`; its stderr."""
    done = subprocess.run([CTL, "--control", d.control, "upgrade", *args], capture_output=True, text=True,
                          timeout=WAIT_S, check=False)
    assert done.returncode == code, (done, d.text())
    return done.stderr


def image(size=4 * MIB):
    path = os.path.join(temp_dir(), "disk.img")
    with open(path, "wb") as f:
        f.truncate(size)
    return path


def on_file(path, *args, layers="", **kwargs):
    return Daemon([("disk", "raw", f"{layers}file:{path}")], args, **kwargs)


def cached(folder, lag="10m"):
    return f"cache[mode=writeback,disk={folder},lag={lag}]:"


class Exports:
    """A file that --exports names."""

    def __init__(self, *lines):
        self.path = os.path.join(temp_dir(), "exports.conf")
        self.write(*lines)

    def write(self, *lines):
        with open(self.path, "w") as f:
            f.write("".join(f"{line}\n" for line in lines))

    def serve(self):
        return Daemon([], ["--exports", self.path])


def program(text):
    """An executable file."""
    path = os.path.join(temp_dir(), "program")
    with open(path, "w") as f:
        f.write("#!/bin/sh\n" + text)
    os.chmod(path, 0o755)
    return path


@suite.case
def clients_of_every_kind_go_over():
    with on_file(image(), tcp=True) as d, Ctl(d.control) as c:
        reply, fds = c.attach(export="disk", connections=2)
        c.ask("attached", attach_id=reply["attach_id"], device="/dev/nbd9")
        kernel = []
        for fd in fds:
            k = Nbd.__new__(Nbd)
            k.s, k.structured, k.cookie = socket.socket(fileno=fd), False, 1
            k.s.settimeout(WAIT_S)
            kernel.append(k)
        clients = [Nbd.connect(d.unix, "disk"), Nbd.connect(d.port, "disk", context=True), *kernel]
        for i, n in enumerate(clients):
            n.write(i * 4096, bytes([i + 1]) * 4096)
        pid = d.process.pid
        for generation in (1, 2):
            upgrade(d)
            with Ctl(d.control) as c2:
                version = c2.ask("version")
                assert version["pid"] == pid and version["generation"] == generation, version
                _, exports = c2.status()
                [device] = exports[0]["devices"]
                assert device["device"] == "/dev/nbd9" and device["connections_alive"] == 2, device
                assert c2.ask("device", device="/dev/nbd9", backend_id="nbdrs.disk")["alive"] == 2
                peers = {x["peer"] for x in exports[0]["clients"]}
                assert "unix" in peers and any(p.startswith("127.0.0.1:") for p in peers), peers
        for n in clients:
            for i in range(len(clients)):
                assert n.read(i * 4096, 4096) == bytes([i + 1]) * 4096
        assert clients[1].block_status(0, 65536), "what was negotiated is kept"
        for where in (d.unix, d.port):	# the listening sockets went over, too
            with Nbd.connect(where, "disk") as n:
                assert n.read(0, 1) == b"\1"
        for n in clients:
            n.close()
    assert not os.path.exists(d.unix), "the new one removes the socket file at its end"


@suite.case
def requests_received_in_part_go_on():
    """Cut everywhere: in a header, before, in and behind a payload that fits into a buffer or does not."""
    size = 4 * MIB
    with on_file(image(size)) as d:
        model = bytearray(size)
        for length in (1, 4096, 250 << 10, 2 * MIB):
            data = random.randbytes(length)
            for cut in sorted({0, 1, 27, 28, 28 + length // 2, 27 + length}):
                with Nbd.connect(d.unix, "disk") as n:
                    off = random.randrange(size - length)
                    assert n.read(0, 512) == bytes(model[:512])
                    stream = n.request(WRITE, off, length) + data
                    n.send(stream[:cut])
                    upgrade(d)
                    n.send(stream[cut:])
                    assert n.reply(WRITE) == (0, None), (length, cut)
                    assert n.read(off, length) == data, (length, cut)
                    model[off:off + length] = data
        with Nbd.connect(d.unix, "disk") as n:
            assert n.read(0, size) == bytes(model)


@suite.case
def a_refused_write_is_still_refused():
    """Its payload comes before and after; were it lost count of, payload would be taken for requests."""
    with on_file(image(), "--read-only") as d, Nbd.connect(d.unix, "disk") as n:
        n.send(n.request(WRITE, 0, 65536), b"x" * 1000)
        with Nbd.connect(d.unix, "disk") as other:	# by then those 1000 have been read, too
            other.read(0, 512)
        upgrade(d)
        n.send(b"x" * (65536 - 1000))
        assert n.reply(WRITE)[0] == EPERM
        assert n.read(0, 512) == bytes(512)


@suite.case
def what_is_in_flight_is_answered_first():
    with on_file(image(), layers="delay[write=400ms]:") as d, Nbd.connect(d.unix, "disk") as n:
        n.send(n.request(WRITE, 0, 4096), b"y" * 4096)
        with Ctl(d.control) as c:
            while not c.status()[1][0]["clients"][0]["in_flight"]:
                pass
        upgrade(d)
        n.s.setblocking(False)
        assert struct.unpack(">IIQ", n.s.recv(16)) == (SIMPLE_MAGIC, 0, n.cookie), "answered before"
        n.s.settimeout(WAIT_S)
        assert n.read(0, 4096) == b"y" * 4096


@suite.case
def a_request_that_takes_too_long_calls_it_off():
    with on_file(image(), "--drain-timeout", "100ms", layers="delay[write=1500ms,count=1]:") as d, \
            Ctl(d.control) as c:
        _, fds = c.attach(export="disk")
        k = Nbd.__new__(Nbd)
        k.s, k.structured, k.cookie = socket.socket(fileno=fds[0]), False, 1
        k.s.settimeout(WAIT_S)
        k.send(k.request(WRITE, 0, 4096), b"z" * 4096)
        with Nbd.connect(d.unix, "disk") as n:
            n.read(0, 512)
            assert "--drain-timeout" in upgrade(d, code=1)
            # It goes on: the slow one is answered, others are served, new clients come in.
            assert k.reply(WRITE) == (0, None)
            assert n.read(0, 4096) == b"z" * 4096
            with Nbd.connect(d.unix, "disk") as other:
                assert other.read(0, 1) == b"z"
            upgrade(d)
            assert n.read(0, 4096) == b"z" * 4096
        k.close()


def helpers(d):
    """Processes that give kernel devices new connections: one, where the daemon has the privilege."""
    found = subprocess.run(["pgrep", "-P", str(d.process.pid), "-f", "nbdrs-attach --watch"], capture_output=True,
                           text=True, check=False)
    return found.stdout.split()


def is_privileged(d):
    with open(f"/proc/{d.process.pid}/status") as f:
        return int(re.search(r"^CapEff:\s*(\w+)", f.read(), re.M)[1], 16) >> 21 & 1


@suite.case
def the_helper_is_there_before_and_after():
    with on_file(image(), "--drain-timeout", "50ms", layers="delay[write=1500ms,count=1]:") as d, \
            Ctl(d.control) as c:
        reply, fds = c.attach(export="disk")
        c.ask("attached", attach_id=reply["attach_id"], device="/dev/nbd9")
        wait_until("it is there", lambda: len(helpers(d)) == is_privileged(d))
        old = helpers(d)
        k = played_by_kernel(fds[0])
        k.send(k.request(WRITE, 0, 512), b"z" * 512)
        upgrade(d, code=1)
        wait_until("another one is there", lambda: len(helpers(d)) == is_privileged(d) and
                   not set(old) & set(helpers(d)))
        assert k.reply(WRITE) == (0, None)
        k.close()


@suite.case
def a_device_that_comes_during_an_upgrade_has_a_helper():
    with on_file(image(), "--drain-timeout", "50ms", layers="delay[write=3s,flush=1s,count=2]:") as d, \
            Ctl(d.control) as c, Ctl(d.control) as c2:
        reply, fds = c.attach(export="disk")
        assert c2.ask("upgrade")["ok"]
        c.ask("attached", attach_id=reply["attach_id"], device="/dev/nbd9")	# it is flushing
        k = played_by_kernel(fds[0])
        k.send(k.request(WRITE, 0, 512), b"z" * 512)
        assert "--drain-timeout" in why_called_off(c)
        wait_until("it is there", lambda: len(helpers(d)) == is_privileged(d))
        assert k.reply(WRITE) == (0, None)
        k.close()


@suite.case
def a_connection_over_its_limits_goes_on_after_that():
    """Its replies leave while it is held, and nothing is in flight when it is let go."""
    path, n, long = image(), 1100, 8 if SANITIZED else 3
    with Daemon([("fast", "raw", f"delay[write=200ms]:file:{path}"),
                 ("slow", "raw", f"delay[write={long}s]:file:{image()}")], ["--drain-timeout", "1s"]) as d, \
            Ctl(d.control) as c:
        fast, slow = (played_by_kernel(c.attach(export=e)[1][0]) for e in ("fast", "slow"))
        slow.send(slow.request(WRITE, 0, 512), b"s" * 512)
        for _ in range(n):
            fast.send(fast.request(WRITE, 0, 512), b"f" * 512)
        assert "--drain-timeout" in upgrade(d, code=1)
        for _ in range(n):
            assert len(fast.s.recv(16, socket.MSG_WAITALL)) == 16, "the connection hangs"
        assert slow.reply(WRITE) == (0, None)
        fast.close()
        slow.close()


@suite.case
def a_client_that_takes_no_replies_is_cut_off():
    with on_file(image(), "--drain-timeout", "100ms") as d, Nbd.connect(d.unix, "disk") as n, \
            Nbd.connect(d.unix, "disk") as good:
        for _ in range(16):
            n.send(n.request(READ, 0, 2 * MIB))
        assert good.read(0, 512) == bytes(512)
        upgrade(d)
        assert good.read(0, 512) == bytes(512)
        try:
            while n.s.recv(1 << 20):
                pass
        except ConnectionResetError:
            pass


@suite.case
def a_program_that_cannot_take_over_changes_nothing():
    with on_file(image()) as d, Nbd.connect(d.unix, "disk") as n:
        bad = (("exit 3", "status 3"), ("echo 'it is too old' >&2; exit 1", "it is too old"),
               ("kill -SEGV $$", "signal 11"), ("exit 0", "not an nbdrsd"))
        for text, why in bad:
            said = upgrade(d, "--binary", program(text), code=1)
            assert why in said, said
        assert "No such file" in upgrade(d, "--binary", "/no/such/nbdrsd", code=1)
        folder = temp_dir()
        assert folder in upgrade(d, "--binary", folder, code=1)
        n.write(0, b"1" * 512)
        with Ctl(d.control) as c:
            assert c.ask("version")["generation"] == 0
            c.must_refuse("EINVAL", cmd="upgrade", binary="nbdrsd")
            c.must_refuse("EINVAL", cmd="upgrade", binary=1)


@suite.case
def a_program_that_fails_after_all_is_replaced_by_the_old_one():
    """It passed the check, and is gone when it is to be started."""
    with on_file(image()) as d, Nbd.connect(d.unix, "disk") as n:
        path = program("rm \"$0\"\necho nbdrsd can take over")
        upgrade(d, "--binary", path)
        d.wait_log("going on with the old one")
        assert n.read(0, 512) == bytes(512)


@suite.case
def exports_that_are_gone_from_the_list_call_it_off():
    """It is read anew; nobody is cut, or joined to another image, for an edit of a file."""
    one, other = f"raw file:{image()}", f"raw file:{image()}"
    exports = Exports(f"a {one}", f"b {other}")
    with exports.serve() as d:
        n = Nbd.connect(d.unix, "a")
        n.write(0, b"a" * 512)
        exports.write(f"b {other}")
        assert "export 'a'" in upgrade(d, code=1)
        exports.write(f"a {other}", f"b {one}")
        assert "another store" in upgrade(d, code=1)
        assert n.read(0, 512) == b"a" * 512
        exports.write(f"a {one}")  # nobody is connected to b
        upgrade(d)
        assert n.read(0, 512) == b"a" * 512
        n.close()


@suite.case
def a_resize_and_an_upgrade_wait_for_each_other():
    with on_file(image(), layers="delay[write=1s,count=1]:") as d, Nbd.connect(d.unix, "disk") as n, \
            Ctl(d.control) as c, Ctl(d.control) as c2:
        n.send(n.request(WRITE, 0, 512), b"w" * 512)
        while not c.status()[1][0]["clients"][0]["in_flight"]:
            pass
        c2.send(json.dumps({"nbdrs": 1, "cmd": "resize", "export": "disk", "size": 8 * MIB}).encode())
        c.ask("version")	# asked later, answered later: by now it has begun
        assert "resize" in c.must_refuse("EBUSY", cmd="upgrade")
        assert n.reply(WRITE) == (0, None)
        reply, _ = c2.recv()
        assert reply["ok"] and reply["size"] == 8 * MIB, reply
        upgrade(d)
        assert n.read(4 * MIB, 512) == bytes(512)


@suite.case
def volumes_are_opened_at_the_same_time():
    """Each takes some round trips to its store."""
    folder, names = temp_dir(), [f"v{i}" for i in range(8)]
    for name in names:
        subprocess.run([os.path.join(BUILD, "nbdrsd"), "init", "--size", "4Mi", "sharded", f"file:{folder}/{name}/"],
                       check=True, capture_output=True)
    with Daemon([(name, "sharded", f"delay[read=200ms]:file:{folder}/{name}/") for name in names]) as d, \
            Ctl(d.control) as c, Nbd.connect(d.unix, "v7") as n:
        assert [e["name"] for e in c.status()[1]] == names
        begun = time.monotonic()
        upgrade(d)
        n.write(0, b"x" * 512)
        assert time.monotonic() - begun < 1.8, "one after the other"
    # The first one in the list that is wrong is named.
    exports = [(name, "sharded", f"file:{folder}/{name}/") for name in ("v0", "nope", "v1", "neither")]
    d = Daemon(exports, ready=False)
    assert d.wait() == 1 and "export 'nope'" in d.text(), d.text()


@suite.case
def what_a_journal_has_is_not_sent_while_everybody_waits():
    """It may be gigabytes, and the store far away."""
    path = image()
    with Daemon([("disk", "raw", f"{cached(temp_dir())}delay[write=2s]:file:{path}")]) as d, Nbd.connect(d.unix, "disk") as n:
        n.write(0, b"j" * 512)
        begun = time.monotonic()
        upgrade(d)
        assert n.read(0, 512) == b"j" * 512
        assert time.monotonic() - begun < 1.8, "it waited for the store"
        with open(path, "rb") as f:
            assert f.read(512) == bytes(512), "this test shows nothing: it was sent before"
        n.close()


def why_called_off(c):
    """The upgrade that was asked for does not happen."""
    wait_until("it is called off", lambda: "upgrade_error" in c.ask("version"))
    return c.ask("version")["upgrade_error"]


def journal_used(c):
    [state] = [layer["state"] for layer in c.status()[1][0]["layers"] if layer["name"] == "cache"]
    return int(state["journal_used"])


@suite.case
def a_store_is_not_served_without_its_journal():
    """Another journal, or none, in the file of exports: the store alone is older than what was flushed."""
    store, journal, other = f"file:{image()}", temp_dir(), temp_dir()
    with_journal = f"disk raw {cached(journal)}{store}"
    exports = Exports(with_journal)
    with exports.serve() as d, Nbd.connect(d.unix, "disk") as n:
        n.write(0, b"j" * 512)
        n.do(FLUSH)
        for layers in (cached(other), ""):
            exports.write(f"disk raw {layers}{store}")
            said = upgrade(d, code=1)
            assert "export 'disk'" in said and "journal" in said, said
        n.close()	# nor without anybody who would see it now
        assert "journal" in upgrade(d, code=1)
        exports.write(with_journal)
        upgrade(d)
        with Nbd.connect(d.unix, "disk") as n2:
            assert n2.read(0, 512) == b"j" * 512
    exports.write(f"disk raw {cached(journal, '10ms')}{store}")
    with exports.serve() as d, Nbd.connect(d.unix, "disk") as n, Ctl(d.control) as c:
        n.write(512, b"k" * 512)
        wait_until("all is in the store", lambda: not journal_used(c))
        exports.write(f"disk raw {store}")
        upgrade(d)
        assert n.read(0, 1024) == b"j" * 512 + b"k" * 512


@suite.case
def a_list_that_is_edited_meanwhile_is_read_again():
    store = f"file:{image()}"
    with_journal = f"disk raw delay[flush=300ms]:{cached(temp_dir())}{store}"
    exports = Exports(with_journal)
    with exports.serve() as d, Nbd.connect(d.unix, "disk") as n:
        n.write(0, b"j" * 512)
        for driver, why in (("raw", "journal"), ("nonsense", "list of exports")):
            with Ctl(d.control) as c:
                assert c.ask("upgrade")["ok"]
                exports.write(f"disk {driver} {store}")
                assert why in why_called_off(c)
            assert n.read(0, 512) == b"j" * 512
            exports.write(with_journal)
        upgrade(d)
        assert n.read(0, 512) == b"j" * 512


@suite.case
def a_store_that_is_away_calls_it_off():
    """The next program would have to open it, and everybody wait for that; this one goes on from its journal."""
    folder, away = temp_dir(), os.path.join(temp_dir(), "away")
    subprocess.run([os.path.join(BUILD, "nbdrsd"), "init", "--size", "4Mi", "sharded", f"file:{folder}/"],
                   check=True, capture_output=True)
    for driver, store in (("sharded", f"{folder}/"), ("raw", image())):
        chain = f"{cached(temp_dir(), '10ms')}retry:fault[file={away},error=ECONNREFUSED]:file:{store}"
        with Daemon([("disk", driver, chain)]) as d, Nbd.connect(d.unix, "disk") as n:
            upgrade(d)
            assert n.read(0, 512) == bytes(512)
            with open(away, "wb"):
                pass
            n.write(0, b"j" * 512)
            begun = time.monotonic()
            said = upgrade(d, code=1)
            assert "store of export 'disk' does not answer (ECONNREFUSED)" in said, said
            assert time.monotonic() - begun < 5, "it waited for the store"
            assert n.read(0, 512) == b"j" * 512, "it goes on"
            os.unlink(away)
            upgrade(d)
            assert n.read(0, 512) == b"j" * 512


@suite.case
def a_second_upgrade_is_refused():
    with on_file(image(), layers="delay[flush=300ms]:") as d, Nbd.connect(d.unix, "disk") as n, \
            Ctl(d.control) as c, Ctl(d.control) as c2:
        n.write(0, b"2" * 512)
        assert c.ask("upgrade")["ok"]
        assert "another upgrade" in c2.must_refuse("EBUSY", cmd="upgrade")
        assert "new program" in c2.must_refuse("EBUSY", cmd="resize", export="disk", size=8 * MIB), "it is not thawed"
        wait_until("it goes over", lambda: not os.path.exists(d.control))
        assert n.read(0, 512) == b"2" * 512


@suite.case
def data_in_memory_is_not_thrown_away():
    with Daemon([("m", "raw", "mem[size=1Mi]")]) as d:
        assert "memory" in upgrade(d, code=1)


@suite.case
def another_file_can_be_the_new_program():
    with on_file(image()) as d:
        copy = os.path.join(temp_dir(), "nbdrsd-new")
        subprocess.run(["cp", os.path.join(BUILD, "nbdrsd"), copy], check=True)
        upgrade(d, "--binary", copy)
        assert os.readlink(f"/proc/{d.process.pid}/exe") == copy
        # And from there on it is the one that a plain upgrade starts.
        os.rename(copy, copy + ".old")
        assert "nbdrsd-new" in upgrade(d, code=1)


class Guarded(http.server.BaseHTTPRequestHandler):
    """4096 bytes for who knows the password."""
    protocol_version = "HTTP/1.1"
    password = "tops3cret"

    def do_GET(self):
        want = "Basic " + base64.b64encode(f"me:{self.password}".encode()).decode()
        if self.headers["Authorization"] != want:
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = bytes(4096)
        found = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.send_response(206 if found else 200)
        if found:
            first, last = int(found[1]), min(int(found[2]), len(data) - 1)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first:last + 1]
        self.send_header("ETag", '"1"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@suite.case
def secrets_survive_and_stay_secret():
    """They are masked in the command line once they were read, and the next program has to read them, too."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    target = f"http://me:{Guarded.password}@127.0.0.1:{server.server_port}/x"
    with Daemon([("disk", "raw", target)]) as d, Nbd.connect(d.unix, "disk") as n:
        for _ in range(2):
            assert n.read(0, 512) == bytes(512)
            with open(f"/proc/{d.process.pid}/cmdline", "rb") as f:
                assert Guarded.password.encode() not in f.read()
            upgrade(d)
        assert n.read(512, 512) == bytes(512)
    assert Guarded.password not in d.text()
    server.shutdown()


@suite.case
def sigterm_during_an_upgrade_stops_it():
    d = on_file(image(), layers="delay[write=500ms]:")
    with Nbd.connect(d.unix, "disk") as n:
        n.send(n.request(WRITE, 0, 512), b"a" * 512)
        with Ctl(d.control) as c:
            while not c.status()[1][0]["clients"][0]["in_flight"]:
                pass
            assert c.ask("upgrade")["ok"]
            d.send_signal(signal.SIGTERM)
        assert n.reply(WRITE)[0] == 0
    assert d.wait() == 0


@suite.case
def sigterm_when_there_is_no_way_back_stops_the_next_one():
    """It sends what lies in the journal, and removes the socket files: a stop is a stop."""
    path, journal = image(), temp_dir()
    d = on_file(path, layers=f"delay[flush=400ms]:{cached(journal)}")
    with Nbd.connect(d.unix, "disk") as n, Ctl(d.control) as c:
        n.write(0, b"j" * 512)
        assert c.ask("upgrade")["ok"]
        wait_until("no way back", lambda: not os.path.exists(d.control))
        d.send_signal(signal.SIGTERM)
        assert d.wait() == 0, d.text()
    with open(path, "rb") as f:
        assert f.read(512) == b"j" * 512, "left in the journal by an orderly stop"
    assert not os.path.exists(d.unix) and not os.path.exists(d.control)


class Manager:
    """The part of systemd that keeps descriptors between two runs of a service."""

    def __init__(self, path, room=64):
        self.dir = temp_dir()
        self.room = room
        self.control, self.unix = os.path.join(self.dir, "ctl"), os.path.join(self.dir, "nbd")
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(os.path.join(self.dir, "notify"))
        self.notify.settimeout(WAIT_S)
        self.store, self.process = {}, None
        self.serve(path)

    def serve(self, path):
        self.argv = [os.path.join(BUILD, "nbdrsd"), "-e", "disk", "raw", "file:" + path, "--listen", "none", "--unix",
                     self.unix, "--control", self.control, f"--io-engine={ENGINE}"]

    def hear(self, what):
        """Does as it is told, until `what` is among it."""
        while True:
            data, fds, _, _ = socket.recv_fds(self.notify, 4096, 8)
            said = dict(line.split("=", 1) for line in data.decode().splitlines())
            if "FDSTORE" in said:
                # High numbers: the low ones are where the next process wants its own.
                self.store[said["FDNAME"]] = fcntl.fcntl(fds[0], fcntl.F_DUPFD_CLOEXEC, 200)
            if "FDSTOREREMOVE" in said:
                kept = self.store.pop(said["FDNAME"], None)
                if kept is not None:
                    os.close(kept)
            for fd in fds:
                os.close(fd)
            if what in said:
                return

    def start(self):
        kept = list(self.store.items())

        def place():
            for i, (_, fd) in enumerate(kept):
                os.dup2(fd, 3 + i)

        env = dict(os.environ, NOTIFY_SOCKET=self.notify.getsockname(), FDSTORE=str(self.room))
        if kept:
            env |= {"LISTEN_FDS": str(len(kept)), "LISTEN_FDNAMES": ":".join(n for n, _ in kept)}
        self.process = subprocess.Popen(["sh", "-c", 'export LISTEN_PID=$$; exec "$@"', "sh", *self.argv], env=env,
                                        close_fds=False, preexec_fn=place, stdin=subprocess.DEVNULL,
                                        stderr=open(os.path.join(self.dir, "log"), "a"))
        self.hear("READY")

    def stop(self, number=signal.SIGTERM, keeps=True):
        self.process.send_signal(number)
        if number == signal.SIGTERM and keeps:
            self.hear("BARRIER")
        return self.process.wait(WAIT_S)

    def attach(self, connections=2):
        with Ctl(self.control) as c:
            reply, fds = c.attach(export="disk", connections=connections)
            c.ask("attached", attach_id=reply["attach_id"], device="/dev/nbd9")
        return [played_by_kernel(fd) for fd in fds]

    def log(self):
        with open(os.path.join(self.dir, "log")) as f:
            return f.read()


def played_by_kernel(fd):
    """A client at a socket that the control socket gave."""
    k = Nbd.__new__(Nbd)
    k.s, k.structured, k.cookie = socket.socket(fileno=fd), False, 1
    k.s.settimeout(WAIT_S)
    return k


@suite.case
def a_restart_keeps_devices_where_systemd_keeps_descriptors():
    m = Manager(image())
    m.start()
    with Ctl(m.control) as c:
        reply, fds = c.attach(export="disk", connections=3)
        c.ask("attached", attach_id=reply["attach_id"], device="/dev/nbd9")
    kernel = [played_by_kernel(fd) for fd in fds]
    client = Nbd.connect(m.unix, "disk")
    for i, k in enumerate(kernel):
        k.write(i * 4096, bytes([i + 1]) * 4096)
    kernel[0].send(kernel[0].request(WRITE, 65536, 4096), b"p" * 1000)	# half a request goes over, too
    for _ in range(2):
        assert m.stop() == 0
        client.must_be_closed()		# a client ends as ever
        kernel[1].send(kernel[1].request(READ, 4096, 4096))	# asked while nobody is there
        assert sorted(m.store) == ["nbdrs-0", "nbdrs-1", "nbdrs-2", "nbdrs-handover"], m.store
        m.start()
        assert kernel[1].reply(READ, 4096, 4096) == (0, b"\2" * 4096)
        assert kernel[2].read(8192, 4096) == b"\3" * 4096
        with Ctl(m.control) as c:
            assert c.ask("device", device="/dev/nbd9", backend_id=reply["backend_id"])["alive"] == 3
            assert not m.store, "the manager must not keep the other end of a connection that we end"
        client = Nbd.connect(m.unix, "disk")
    kernel[0].send(b"p" * 3096)
    assert kernel[0].reply(WRITE) == (0, None)
    assert client.read(65536, 4096) == b"p" * 4096
    client.close()
    # After a crash there is nothing to take, and the kernel sees the end of its connections.
    m.stop(signal.SIGKILL)
    for k in kernel:
        k.must_be_closed()
    m.start()
    for k in kernel:
        k.close()
    assert m.stop(signal.SIGINT) == 0 and not m.store


@suite.case
def a_restart_never_joins_a_connection_to_another_image():
    for size in (4 * MIB, 8 * MIB):	# another file; another size, too
        m = Manager(image())
        m.start()
        kernel = m.attach()
        assert m.stop() == 0
        m.serve(image(size))
        m.start()
        for k in kernel:
            k.must_be_closed()
        assert not m.store and "ESTALE" in m.log(), m.log()
        assert m.stop(keeps=False) == 0
    # One with an identity is the same wherever it lies.
    path = os.path.join(temp_dir(), "disk.img")
    subprocess.run([os.path.join(BUILD, "nbdrsd"), "init", "--size", "4Mi", "raw", "file:" + path], check=True,
                   capture_output=True)
    m = Manager(path)
    m.start()
    kernel = m.attach()
    kernel[0].write(0, b"i" * 512)
    has_identity = b"user.nbdrs.id" in os.fsencode(" ".join(os.listxattr(path)))
    assert m.stop() == 0
    os.rename(path, path + ".moved")
    m.serve(path + ".moved")
    m.start()
    if has_identity:
        assert kernel[1].read(0, 512) == b"i" * 512
    else:	# a file system without attributes
        kernel[1].must_be_closed()
    m.stop(keeps=has_identity)


@suite.case
def what_systemd_kept_and_is_of_no_use_is_cut():
    """Else the kernel would wait for ever for connections that nobody serves."""
    def no_file(m):
        os.close(m.store.pop("nbdrs-handover"))

    def spoilt(m):
        os.pwrite(m.store["nbdrs-handover"], b"nonsense", 0)

    for spoil in (no_file, spoilt):
        m = Manager(image())
        m.start()
        kernel = m.attach()
        assert m.stop() == 0
        spoil(m)
        m.start()	# as after a crash
        for k in kernel:
            k.must_be_closed()
        assert not m.store, m.store
        again = m.attach()
        again[0].write(0, b"x" * 512)
        assert m.stop() == 0


@suite.case
def without_room_for_all_nothing_is_kept():
    m = Manager(image(), room=2)
    m.start()
    kernel = m.attach()	# and the file: three
    assert m.stop(keeps=False) == 0
    for k in kernel:
        k.must_be_closed()
    m.start()
    assert not m.store
    assert m.stop(signal.SIGINT) == 0


class Load(threading.Thread):
    """Writes and reads its own part of the disk, many requests at a time, and compares."""

    def __init__(self, where, base, seed):
        super().__init__(daemon=True)
        self.n = Nbd.connect(where, "disk", structured=seed % 2 == 0)
        self.base, self.random = base, random.Random(seed)
        self.stop, self.failed, self.done = False, None, 0
        self.start()

    def run(self):
        try:
            self.work()
        except BaseException as e:
            self.failed = repr(e)

    def work(self):
        model = bytearray(MIB)
        while not self.stop:
            batch = []
            taken = set()
            for _ in range(self.random.randrange(1, 12)):
                at, length = self.random.randrange(250) * 4096, self.random.randrange(1, 5) * 4096
                blocks = set(range(at // 4096, (at + length) // 4096))
                if taken & blocks:
                    continue	# what overlaps may be done in any order
                taken |= blocks
                is_write = self.random.random() < 0.5
                data = self.random.randbytes(length) if is_write else b""
                self.n.send(self.n.request(WRITE if is_write else READ, self.base + at, length), data)
                batch.append((self.n.cookie, is_write, at, length, data))
            left = {b[0]: b for b in batch}
            while left:
                # Each cookie once: a request that was lost, or done twice, shows here.
                peek = self.n.s.recv(16, socket.MSG_PEEK | socket.MSG_WAITALL)
                assert len(peek) == 16, "the connection is cut"
                cookie = struct.unpack(">8xQ", peek)[0]
                assert cookie in left, f"{cookie:x} was not asked for, or was answered"
                _, is_write, at, length, data = left.pop(cookie)
                self.n.cookie = cookie
                error, found = self.n.reply(WRITE if is_write else READ, self.base + at, length)
                assert error == 0, error
                if is_write:
                    model[at:at + length] = data
                else:
                    assert found == model[at:at + length], f"wrong data at {at}"
                self.done += 1
            self.n.cookie = max(b[0] for b in batch)


@suite.case
def under_load_nothing_is_lost_or_done_twice():
    with on_file(image(), tcp=True) as d:
        loads = [Load(d.unix if i % 2 else d.port, i * MIB, i) for i in range(4)]
        worst = 0
        for _ in range(ROUNDS):
            before = [l.done for l in loads]
            begin = time.monotonic()
            upgrade(d)
            worst = max(worst, time.monotonic() - begin)
            deadline = time.monotonic() + WAIT_S
            while any(l.done < b + 20 and not l.failed for l, b in zip(loads, before)):
                assert time.monotonic() < deadline, "a client makes no progress"
                time.sleep(0.001)
        for l in loads:
            l.stop = True
        for l in loads:
            l.join(WAIT_S)
            assert not l.failed, l.failed
            l.n.close()
        print(f"# {ROUNDS} upgrades, {sum(l.done for l in loads)} requests, longest upgrade {worst * 1000:.0f} ms")


suite.main()
