#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=120
"""The control socket: what it answers, what it refuses, what it must not leak; and nbdrsctl."""

import functools
import grp
import json
import os
import re
import socket
import stat
import struct
import subprocess
import sys
import threading
import time

from ctl_test import MAX_PACKET, Ctl, wait_until
from nbdrs_test import *

MAX_CLIENTS = 32
CTL = os.path.join(BUILD, "nbdrsctl")
MEM = ("disk", "raw", "mem[size=1Mi]")
OTHER = ("other one", "raw", "mem[size=2Mi]")

suite = Suite()


@functools.cache
def shared():
    """The daemon of all cases that do not need their own."""
    return Daemon([MEM, OTHER])


def client():
    return Ctl(shared().control)


def is_served(d):
    """Whether a new client gets an answer, and not the door."""
    with Ctl(d.control) as c:
        try:
            return c.ask("version")["ok"]
        except OSError:
            return False  # closed before the request could be sent


# --- Answers ---------------------------------------------------------------------------------------


@suite.case
def version_says_who_answers():
    with client() as c:
        reply = c.ask("version")
        assert reply["ok"] is True and reply["pid"] == shared().process.pid, reply
        assert reply["version"] and reply["threads"] >= 1, reply
        assert reply["engine"] == (ENGINE if ENGINE != "auto" else reply["engine"]), reply


@suite.case
def status_has_every_export_in_order():
    with client() as c:
        head, exports = c.status()
        assert head["exports_n"] == 2 and head["uptime_ns"] > 0, head
        assert [e["name"] for e in exports] == ["disk", "other one"], exports
        disk = exports[0]
        assert disk["size"] == 1 * MIB and disk["read_only"] is False, disk
        assert disk["flags"] & HAS_FLAGS and disk["chain"].startswith("raw:mem["), disk
        assert [(l["name"], l["depth"]) for l in disk["layers"]] == [("raw", 0), ("mem", 1)], disk
        head, exports = c.status(export="other one")
        assert [e["name"] for e in exports] == ["other one"] and head["exports_n"] == 2
        assert "'nope'" in c.must_refuse("ENOENT", cmd="status", export="nope")
        c.must_refuse("EINVAL", cmd="status", export=7)
        assert c.ask("version")["ok"] is True, "a refusal does not end the talk"


@suite.case
def status_counts_what_was_done():
    with Daemon([MEM]) as d, Ctl(d.control) as c:
        with Nbd.connect(d.unix, "disk") as n:
            for i in range(10):
                n.write(i * 4096, b"x" * 4096)
            for i in range(7):
                n.read(i * 4096, 4096)
            assert n.do(FLUSH) == 0
            assert n.do(READ, MIB - 512, 4096) == EINVAL, "beyond the end"
            _, [disk] = c.status()
            assert disk["connections"] == 1 and len(disk["clients"]) == 1, disk
            assert disk["clients"][0]["peer"] == "unix" and disk["clients_omitted"] == 0, disk
            assert disk["clients"][0]["requests"] >= 18, disk
        assert disk["requests"]["write"] == 10 and disk["bytes"]["write"] == 40960, disk
        assert disk["requests"]["flush"] == 1 and disk["errors"].get("read") == 1, disk
        assert disk["bytes"]["read"] == 7 * 4096, disk
        for kind in ("read", "write", "flush"):
            l = disk["latency_ns"][kind]
            assert 0 < l["p50"] <= l["p99"] <= l["p999"], disk
        mem = disk["layers"][1]
        assert mem["ops"]["write"] == 10 and mem["bytes"]["write"] == 40960, mem
        wait_until("the connection is gone", lambda: c.status()[1][0]["connections"] == 0)


@suite.case
def status_of_many_exports_comes_in_packets():
    exports = [(f"disk{i}", "raw", "mem[size=64Ki]") for i in range(60)]
    with Daemon(exports) as d, Ctl(d.control) as c:
        head, got = c.status()
        assert head["exports_n"] == 60
        assert [e["name"] for e in got] == [name for name, _, _ in exports]
        assert c.ask("version")["ok"] is True, "nothing comes after the last one"


# --- Attach ----------------------------------------------------------------------------------------


def read_over(fd, offset, length):
    """READ over a socket in transmission phase, as the kernel does; the data."""
    s = socket.socket(fileno=os.dup(fd))
    s.settimeout(WAIT_S)
    cookie = 0x1122334455667788
    s.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, READ, cookie, offset, length))
    data = b""
    while len(data) < 16 + length:
        part = s.recv(65536)
        assert part, "closed"
        data += part
    s.close()
    assert struct.unpack(">IIQ", data[:16]) == (SIMPLE_MAGIC, 0, cookie), data[:16]
    return data[16:]


@suite.case
def attach_gives_sockets_that_work_and_keeps_none():
    d = shared()
    with client() as c:
        c.ask("version")
        before = d.fds()
        reply, fds = c.attach(export="disk", connections=4)
        assert len(fds) == 4 and reply["size"] == MIB and reply["attach_id"] > 0, reply
        assert reply["flags"] & CAN_MULTI_CONN and reply["backend_id"] == "nbdrs.disk", reply
        assert reply["min_block"] >= 1 and reply["backing"] == [], reply
        for fd in fds:
            s = socket.socket(fileno=os.dup(fd))
            assert s.family == socket.AF_UNIX and s.type == socket.SOCK_STREAM
            assert s.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= MIB
            s.close()
            assert read_over(fd, 4096, 8192) == bytes(8192)
        assert d.fds() == before + 4, "the daemon must drop the kernel's ends"
        _, exports = c.status(export="disk")
        [device] = exports[0]["devices"]
        assert device["device"] is None and device["connections"] == 4, device
        assert c.ask("attached", attach_id=reply["attach_id"], device="/dev/nbd7")["ok"] is True
        before = d.fds() - 4	# now with the pipe of the helper, where it may have one
        _, exports = c.status(export="disk")
        [device] = exports[0]["devices"]
        assert device["device"] == "/dev/nbd7" and device["connections_alive"] == 4, device
        for fd in fds[:1]:
            os.close(fd)
        wait_until("one connection is gone", lambda: c.status(
            export="disk")[1][0]["devices"][0]["connections_alive"] == 3)
        for fd in fds[1:]:
            os.close(fd)
        wait_until("the device is forgotten", lambda: not c.status(export="disk")[1][0]["devices"])
        wait_until("the descriptors are back", lambda: d.fds() == before)


@suite.case
def attach_names_the_backing_file():
    path = os.path.join(temp_dir(), "disk.img")
    with open(path, "wb") as f:
        f.truncate(MIB)
    with Daemon([("f", "raw", "file:" + path)]) as d, Ctl(d.control) as c:
        reply, fds = c.attach(export="f")
        assert reply["backing"] == [path] and len(fds) == 1, reply
        os.close(fds[0])


@suite.case
def attach_read_only_offers_nothing_that_writes():
    with client() as c:
        reply, fds = c.attach(export="disk", read_only=True)
        os.close(fds[0])
        assert reply["flags"] & READ_ONLY, reply
        assert not reply["flags"] & (SEND_TRIM | SEND_WRITE_ZEROES), reply


def devices(c):
    """{device: attach_id} of "disk"."""
    return {d["device"]: d["attach_id"] for d in c.status(export="disk")[1][0]["devices"]}


@suite.case
def detached_forgets_the_device():
    with client() as c:
        reply, fds = c.attach(export="disk")
        c.ask("attached", attach_id=reply["attach_id"], device="/dev/nbd3")
        assert devices(c).get("/dev/nbd3") == reply["attach_id"]
        assert c.ask("detached", device="/dev/nbd3")["ok"] is True
        assert "/dev/nbd3" not in devices(c)
        assert c.ask("detached", device="/dev/nbd3")["ok"] is True, "twice is fine"
        # A device that is attached anew replaces its old entry.
        first, fds1 = c.attach(export="disk")
        second, fds2 = c.attach(export="disk")
        for reply in (first, second):
            c.ask("attached", attach_id=reply["attach_id"], device="/dev/nbd4")
        assert devices(c)["/dev/nbd4"] == second["attach_id"]
        assert first["attach_id"] not in devices(c).values()
        for fd in fds + fds1 + fds2:
            os.close(fd)


@suite.case
def attach_refuses_what_is_wrong():
    with client() as c:
        for n in (0, 65, -1, 1.5, "1", None, 1 << 40):
            assert "connections" in c.must_refuse("EINVAL", cmd="attach", export="disk", connections=n)
        c.must_refuse("EINVAL", cmd="attach")
        c.must_refuse("EINVAL", cmd="attach", export=["disk"])
        c.must_refuse("EINVAL", cmd="attach", export="disk", read_only="yes")
        assert "'nope'" in c.must_refuse("ENOENT", cmd="attach", export="nope")
        c.must_refuse("ENOENT", cmd="attached", attach_id=1 << 60, device="/dev/nbd0")
        c.must_refuse("EINVAL", cmd="attached", attach_id="1", device="/dev/nbd0")
        for device in ("", "/dev/nbd 0", "x" * 65, "\x1b[31m", "ä", None, 5):
            c.must_refuse("EINVAL", cmd="attached", attach_id=1, device=device)
            c.must_refuse("EINVAL", cmd="detached", device=device)
        assert c.ask("version")["ok"] is True


# --- Bad clients -----------------------------------------------------------------------------------


@suite.case
def garbage_is_refused_and_the_talk_goes_on():
    with client() as c:
        for data in (b"garbage", b"\0", b"\0" * 4096, b"[]", b"{", b'"version"', b"7", b"\xff\xfe{}",
                     b'{"nbdrs": 1, "nbdrs": 1, "cmd": "version"}', b'{"nbdrs": 1}', b"{}garbage",
                     b'{"nbdrs": 1, "cmd": 7}', b'{"nbdrs": 1, "cmd": "v\\u0000"}',
                     b'{"nbdrs": 1, "cmd": "\xff"}', b"[" * 100000, b'{"a":' * 20000,
                     b'{"nbdrs": 1, "cmd": "version", "x": ' + b"[" * 50 + b"]" * 50 + b"}"):
            c.send(data)
            reply, _ = c.recv()
            assert reply["ok"] is False and reply["errno"] in ("EINVAL", "EPROTO"), (data[:40], reply)
        assert "version" in c.must_refuse("EOPNOTSUPP", cmd="frobnicate")
        assert c.ask("version", what_is_not_known={"is": ["left", "alone"]})["ok"] is True


@suite.case
def another_version_of_the_protocol_is_told_so():
    with client() as c:
        for data in (b'{"nbdrs": 2, "cmd": "version"}', b'{"cmd": "version"}', b"{}",
                     b'{"nbdrs": "1", "cmd": "version"}'):
            assert "version 1" in c.must_refuse("EPROTO", data=data)


@suite.case
def packets_have_a_limit():
    request = b'{"nbdrs": 1, "cmd": "version"}'
    with client() as c:
        c.send(request + b" " * (MAX_PACKET - len(request)))
        assert c.recv()[0]["ok"] is True
        c.send(request + b" " * (MAX_PACKET - len(request) + 1))
        reply, _ = c.recv()
        assert reply["errno"] == "EMSGSIZE" and str(MAX_PACKET) in reply["error"], reply
        c.must_be_closed()
    with client() as c:
        c.send(b"")  # indistinguishable from an end
        c.must_be_closed()


@suite.case
def clients_that_leave_midway_leave_nothing_behind():
    with Daemon([MEM]) as d:
        with Ctl(d.control) as c:
            c.ask("version")
            base = d.fds() - 1  # without this client
        for i in range(100):
            with Ctl(d.control) as c:
                try:
                    c.send(b'{"nbdrs": 1, "cmd": "status"}' if i % 2 else
                           b'{"nbdrs": 1, "cmd": "attach", "export": "disk", "connections": 8}')
                except BrokenPipeError:
                    pass  # too many at once: shown the door already
        wait_until("there is room again", lambda: is_served(d))
        # One that stays and never reads must not hold up the others.
        with Ctl(d.control) as deaf:
            deaf.s.setblocking(False)
            try:
                for _ in range(2000):
                    deaf.send(b'{"nbdrs": 1, "cmd": "status"}')
            except BlockingIOError:
                pass
            wait_until("the others are served", lambda: is_served(d))
        wait_until("the descriptors are back", lambda: d.fds() <= base)
        with Ctl(d.control) as c:
            wait_until("no connection is left", lambda: c.status()[0]["connections_n"] == 0)


@suite.case
def descriptors_that_clients_send_are_not_kept():
    d = shared()
    with client() as c:
        c.ask("version")
        base = d.fds()
        r, w = os.pipe()
        for _ in range(50):
            socket.send_fds(c.s, [b'{"nbdrs": 1, "cmd": "version"}'], [r, w])
            assert c.recv()[0]["ok"] is True
        assert d.fds() == base
        os.close(w)
        os.set_blocking(r, False)
        assert os.read(r, 1) == b"", "the daemon holds the pipe open"
        os.close(r)


@suite.case
def clients_have_a_limit():
    with Daemon([MEM]) as d:
        clients = [Ctl(d.control) for _ in range(MAX_CLIENTS)]
        for c in clients:
            assert c.ask("version")["ok"] is True
        with Ctl(d.control) as c:
            reply, _ = c.recv()
            assert reply["ok"] is False and reply["errno"] == "EBUSY", reply
            c.must_be_closed()
        clients.pop().s.close()

        wait_until("a place is free again", lambda: is_served(d))
        # The daemon stops although they are all still connected.
        d.stop()
        for c in clients:
            c.must_be_closed()


# --- Who may ---------------------------------------------------------------------------------------

ASK = """
import json, socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.settimeout(30)
s.connect(sys.argv[1])
try:
    s.send(b'{"nbdrs": 1, "cmd": "version"}')
except OSError:
    pass
print(json.loads(s.recv(65536)).get("errno", "ok"))
"""


def ask_as(path, **who):
    return subprocess.run([sys.executable, "-c", ASK, path], check=True, text=True, timeout=WAIT_S,
                          capture_output=True, **who).stdout.strip()


@suite.case
def other_users_are_refused_and_the_group_is_not():
    if os.geteuid() != 0:
        raise Skip("needs root, to be somebody else")
    group = grp.getgrgid(65534).gr_name
    with Daemon([MEM], args=["--control-group", group]) as d:
        st = os.stat(d.control)
        assert stat.S_IMODE(st.st_mode) == 0o660 and st.st_gid == 65534, oct(st.st_mode)
        os.chmod(d.dir, 0o755)
        os.chmod(d.control, 0o666)  # so that it is the daemon who says no
        assert ask_as(d.control, user=12345, group=12345, extra_groups=[]) == "EACCES"
        assert ask_as(d.control, user=12345, group=65534, extra_groups=[]) == "ok"
        assert ask_as(d.control, user=12345, group=12345, extra_groups=[7, 65534]) == "ok"
        assert ask_as(d.control) == "ok"


# --- The socket's file -----------------------------------------------------------------------------


@suite.case
def a_stale_socket_is_replaced_and_a_live_one_is_not():
    path = os.path.join(temp_dir(), "ctl.sock")
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.bind(path)
    s.listen()
    second = Daemon([MEM], args=["--control", path], ready=False)
    assert second.wait() == 1
    assert path in second.text() and "another program serves" in second.text(), second.text()
    assert stat.S_ISSOCK(os.stat(path).st_mode), "not ours to remove"
    s.close()
    with Daemon([MEM], args=["--control", path]) as d, Ctl(path) as c:
        assert c.ask("version")["pid"] == d.process.pid
        d.stop()
        assert not os.path.exists(path), "left behind"


@suite.case
def what_is_no_socket_is_left_alone():
    folder = temp_dir()
    path = os.path.join(folder, "file")
    with open(path, "w") as f:
        f.write("precious")
    d = Daemon([MEM], args=["--control", path], ready=False)
    assert d.wait() == 1 and "no socket" in d.text(), d.text()
    with open(path) as f:
        assert f.read() == "precious"
    assert not os.path.exists(d.unix), "a failed start leaves no listener's file behind"
    for path, word in (("x" * 200, "bytes"), (folder + "/a/b/c", "cannot make the folder"),
                       (folder + "/file/sock", "file")):
        d = Daemon([MEM], args=["--control", path], ready=False)
        assert d.wait() == 1 and word in d.text(), d.text()
    d = Daemon([MEM], args=["--control-group", "no such group"], ready=False)
    assert d.wait() == 1 and "'no such group'" in d.text(), d.text()
    # A folder is made; nobody else's file is removed at the end.
    path = folder + "/new/ctl.sock"
    with Daemon([MEM], args=["--control", path]) as d:
        assert stat.S_IMODE(os.stat(folder + "/new").st_mode) == 0o755
        os.unlink(path)
        with open(path, "w") as f:
            f.write("somebody's")
        d.stop()
        assert os.path.exists(path)


# --- nbdrsctl --------------------------------------------------------------------------------------


def ctl(*args, code=0, control=None, **kwargs):
    """Runs nbdrsctl; what it printed: standard output, or standard error when it must fail."""
    p = subprocess.run([CTL, *args, "--control", control or shared().control], text=True,
                       capture_output=True, timeout=WAIT_S, stdin=subprocess.DEVNULL, **kwargs)
    assert p.returncode == code, (args, p)
    assert bool(p.stderr) == (code != 0), p
    return p.stderr if code else p.stdout


@suite.case
def nbdrsctl_shows_the_status():
    text = ctl("status")
    assert re.search(r"^nbdrsd \S+  pid \d+ .* 2 exports, \d+ connections?$", text, re.M), text
    assert re.search(r"^disk  1MiB  read-write$", text, re.M), text
    assert re.search(r"^  chain +raw:mem\[size=1Mi\]$", text, re.M), text
    assert "other one" not in ctl("status", "disk")
    j = json.loads(ctl("status", "--json"))
    assert j["exports_n"] == 2 and [e["name"] for e in j["exports"]] == ["disk", "other one"], j
    assert "more" not in j and "ok" not in j, j
    assert json.loads(ctl("version", "--json"))["pid"] == shared().process.pid
    assert len(ctl("version").splitlines()) == 2


@suite.case
def nbdrsctl_says_what_is_wrong():
    assert "'nope'" in ctl("status", "nope", code=4)
    assert "no daemon answers" in ctl("status", code=3, control="/nonexistent/sock")
    assert "--control" in ctl("status", code=3, control="/nonexistent/sock")
    for args in (["frob"], ["status", "a", "b"], ["version", "x"], ["--frob"], ["status", "--wait=soon"],
                 ["status", "--timeout", "0"]):
        assert args[-1].split("=")[-1] in ctl(*args, code=2), args
    assert subprocess.run([CTL], capture_output=True).returncode == 2
    assert subprocess.run([CTL, "--help"], capture_output=True, check=True).stdout.startswith(b"Usage")
    with open("/dev/full", "w") as full:
        p = subprocess.run([CTL, "status", "--control", shared().control], stdout=full,
                           stderr=subprocess.PIPE, text=True)
        assert p.returncode == 1 and "cannot write" in p.stderr, p


@suite.case
def nbdrsctl_waits_for_a_daemon():
    start = time.monotonic()
    ctl("status", "--wait=200ms", code=3, control=os.path.join(temp_dir(), "none"))
    assert time.monotonic() - start >= 0.2
    path = os.path.join(temp_dir(), "late.sock")
    p = subprocess.Popen([CTL, "status", "--wait", "--control", path], stdout=subprocess.PIPE)
    with Daemon([MEM], args=["--control", path]):
        assert b"disk" in p.communicate(timeout=WAIT_S)[0] and p.returncode == 0


class FakeDaemon:
    """Answers a control client with what it is told, byte by byte."""

    def __init__(self, *packets, fds=()):
        self.path = os.path.join(temp_dir(), "ctl.sock")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(self.path)
        self.listener.listen()
        self.packets, self.fds = packets, fds
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        s, _ = self.listener.accept()
        s.settimeout(WAIT_S)
        s.recv(MAX_PACKET)
        for p in self.packets:
            socket.send_fds(s, [p], self.fds)
        if not self.packets:
            s.recv(MAX_PACKET)  # until the tool gives up
        s.close()

    def __enter__(self):
        return self.path

    def __exit__(self, *_):
        self.thread.join(WAIT_S)
        self.listener.close()


@suite.case
def nbdrsctl_survives_a_sick_daemon():
    with FakeDaemon() as path:
        assert "did not answer" in ctl("status", "--timeout=200ms", code=8, control=path)
    for packets, word in (
            ([b"garbage"], "not nbdrsd"),
            ([b"[]"], "not nbdrsd"),
            ([b'{"nbdrs": 1}'], "not nbdrsd"),
            ([b'{"nbdrs": 9, "ok": true}'], "version 9"),
            ([b'{"nbdrs": 1, "ok": false}'], "did not say why"),
            ([b'{"nbdrs": 1, "ok": false, "errno": "EBUSY", "error": "some text"}'], "some text"),
            ([b'{"nbdrs": 1, "ok": true, "more": true}', b'{"nbdrs": 1, "ok": true}'], "without an export"),
            ([b'{"nbdrs": 1, "ok": true, "more": true}'], "closed the connection"),
            ([b" " * (MAX_PACKET + 1)], "cut off")):
        with FakeDaemon(*packets) as path:
            assert word in ctl("status", code=1, control=path), packets
    # Members of any type, or none, are no reason to fall over.
    for export in ("{}", '{"name": 5, "size": "x", "layers": {}, "clients": [1, {}], "devices": [[]]}'):
        with FakeDaemon(b'{"nbdrs": 1, "ok": true, "more": true}',
                        b'{"nbdrs": 1, "ok": true, "export": %s}' % export.encode()) as path:
            ctl("status", control=path)
    with FakeDaemon(b'{"nbdrs": 1, "ok": true, "version": "\\u001b[31mred"}') as path:
        assert "\x1b" not in ctl("version", control=path)
    r, w = os.pipe()
    with FakeDaemon(b'{"nbdrs": 1, "ok": true}', fds=[r, w]) as path:
        assert "2 sockets, 0 were expected" in ctl("version", code=1, control=path)
    os.close(r)
    os.close(w)


suite.main()
