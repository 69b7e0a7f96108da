#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=60
"""Devices that lose connections, as the daemon sees them: the kernel's part is played here."""

import os
import re
import socket
import struct
import subprocess
import time

from nbdrs_test import *
from ctl_test import Ctl, wait_until

suite = Suite()
DEVICE = {"backend_id": "nbdrs.disk", "device": "/dev/nbd0"}


class Socks:
    """What an attach gave, as the kernel has it."""

    def __init__(self, c, **members):
        self.reply, fds = c.attach(**members)
        self.socks = [socket.socket(fileno=fd) for fd in fds]
        for s in self.socks:
            s.settimeout(WAIT_S)

    def close(self, n=None):
        for s in self.socks[:n]:
            s.close()
        del self.socks[:n]


def request(kind, cookie, off=0, length=0, data=b""):
    return struct.pack(">IHHQQI", REQUEST_MAGIC, 0, kind, cookie, off, length) + data


def alive(c):
    return c.ask("device", **DEVICE)["alive"]


@suite.case
def a_new_daemon_gives_sockets_to_the_device_it_finds():
    with Daemon([("disk", "raw", "mem[size=1Mi]")]) as d, Ctl(d.control) as c:
        assert c.ask("device", **DEVICE) == {"nbdrs": 1, "ok": True, "export": "disk", "size": MIB, "alive": 0,
                                             "connections": 0}
        k = Socks(c, **DEVICE, size=MIB, connections=2)
        assert len(k.socks) == 2 and alive(c) == 2
        [device] = c.status(export="disk")[1][0]["devices"]
        assert device["device"] == "/dev/nbd0" and device["connections"] == 2, device
        # One that the kernel drops is gone when it is asked for next: that is how the tool finds out.
        for n in (1, 0):
            k.close(1)
            assert alive(c) == n
        again = Socks(c, **DEVICE, size=MIB)
        assert alive(c) == 1
        again.close()


@suite.case
def sockets_join_those_that_are_left():
    with Daemon([("disk", "raw", "mem[size=1Mi]")]) as d, Ctl(d.control) as c:
        k = Socks(c, export="disk", connections=4)
        assert alive(c) == 4, "being attached is as good as attached"
        c.ask("attached", attach_id=k.reply["attach_id"], device="/dev/nbd0")
        k.close(2)
        assert alive(c) == 2 and c.ask("device", **DEVICE)["connections"] == 4
        more = Socks(c, **DEVICE, size=MIB, connections=2)
        assert alive(c) == 4
        [device] = c.status(export="disk")[1][0]["devices"]
        assert device["connections"] == device["connections_alive"] == 4, device
        for s in k.socks + more.socks:
            s.sendall(request(READ, 7, 0, 512))
            assert struct.unpack(">IIQ", s.recv(16)) == (SIMPLE_MAGIC, 0, 7)
        k.close()
        more.close()


@suite.case
def two_that_mend_a_device_at_once_do_not_make_it_larger():
    """The kernel drops what it has no place for; were the device said to have more, it would be cut off for ever."""
    with Daemon([("disk", "raw", "mem[size=1Mi]")]) as d, Ctl(d.control) as c:
        def has(connections, n):
            got = c.ask("device", **DEVICE)
            assert (got["connections"], got["alive"]) == (connections, n), got

        k = Socks(c, export="disk", connections=2)
        c.ask("attached", attach_id=k.reply["attach_id"], device="/dev/nbd0")
        k.close(1)
        first, second = (Socks(c, **DEVICE, size=MIB) for _ in range(2))
        second.close()
        has(2, 2)
        # A daemon that finds the device has the number from the first who asks.
        for x in (k, first):
            x.close()
        wait_until("it is forgotten", lambda: not c.status()[1][0]["devices"])
        first, second = (Socks(c, **DEVICE, size=MIB, connections=2) for _ in range(2))
        second.close()
        has(2, 2)
        first.close()


@suite.case
def another_image_never_gets_the_device():
    with Daemon([("disk", "raw", "mem[size=1Mi]"), ("two", "raw", "mem[size=2Mi]")]) as d, Ctl(d.control) as c:
        for name in ("nbdrs.other", "disk", "nbdrs.", "nbdrs.disk2"):
            c.must_refuse("ENOENT", cmd="attach", device="/dev/nbd0", size=MIB, backend_id=name)
            c.must_refuse("ENOENT", cmd="device", device="/dev/nbd0", backend_id=name)
        why = c.must_refuse("ESTALE", cmd="attach", device="/dev/nbd0", size=2 * MIB, backend_id="nbdrs.disk")
        assert str(MIB) in why and str(2 * MIB) in why, why
        c.must_refuse("EINVAL", cmd="attach", device="/dev/nbd0", backend_id="nbdrs.disk")
        c.must_refuse("EINVAL", cmd="attach", size=MIB, backend_id="nbdrs.disk")
        c.must_refuse("EINVAL", cmd="attach", size=MIB, device="/dev/nbd0", backend_id=7)
        c.must_refuse("EINVAL", cmd="device", backend_id="nbdrs.disk")
        c.must_refuse("EINVAL", cmd="device", device="/dev/nbd0")
        assert not c.status(export="disk")[1][0]["devices"]
        # The device went to another export, and nobody said that it was detached.
        old = Socks(c, **DEVICE, size=MIB)
        new = Socks(c, backend_id="nbdrs.two", device="/dev/nbd0", size=2 * MIB)
        assert c.ask("device", backend_id="nbdrs.two", device="/dev/nbd0")["alive"] == 1
        for k in (old, new):
            k.close()


def init(*words):
    subprocess.run([os.path.join(BUILD, "nbdrsd"), "init", "--size", "1Mi", *words], check=True,
                   stdout=subprocess.DEVNULL)


def backend_id(*chain):
    with Daemon([("a disk", *chain)]) as d, Ctl(d.control) as c:
        return Socks(c, export="a disk").reply["backend_id"]


@suite.case
def volumes_of_one_name_and_size_are_told_apart():
    folder = temp_dir()
    for one, two in ((("raw", f"file:{folder}/1.img"), ("raw", f"file:{folder}/2.img")),
                     (("sharded", f"file:{folder}/1/"), ("sharded", f"cache:file:{folder}/2/"))):
        init(*one)
        init(*two)
        first, second = backend_id(*one), backend_id(*two)
        for text in (first, second):
            assert re.fullmatch(r"nbdrs\.a%20disk~[0-9a-f]{16}", text), text
        assert first != second
        init(*one)
        assert backend_id(*one) == first, "a volume that is there already keeps it"
        with Daemon([("a disk", *two)]) as d, Ctl(d.control) as c:
            device = {"device": "/dev/nbd0", "size": MIB}
            c.must_refuse("ENOENT", cmd="attach", backend_id=first, **device)
            c.must_refuse("ENOENT", cmd="attach", backend_id="nbdrs.a", **device)
            # Attached before the volume had an identity: the name has to do.
            for known in ("nbdrs.a%20disk", second):
                Socks(c, backend_id=known, **device).close()
    # One that replaces another is another; and what init made, destroy removes.
    init("--force", *("raw", f"file:{folder}/1.img"))
    assert backend_id("raw", f"file:{folder}/1.img") not in (first, second)
    assert os.path.exists(f"{folder}/1/uuid")
    subprocess.run([os.path.join(BUILD, "nbdrsd"), "destroy", "--force", "sharded", f"file:{folder}/1/"], check=True,
                   stdout=subprocess.DEVNULL)
    assert not os.path.exists(f"{folder}/1")


@suite.case
def a_volume_that_grew_alone_keeps_its_device():
    """A daemon that dies between growing the volume and the device: the resize is done again, after this."""
    path = f"{temp_dir()}/x.img"
    init("raw", f"file:{path}")
    known = backend_id("raw", f"file:{path}")
    os.truncate(path, 2 * MIB)
    with Daemon([("a disk", "raw", f"file:{path}")]) as d, Ctl(d.control) as c:
        device = {"device": "/dev/nbd0", "backend_id": known}
        Socks(c, size=MIB, **device).close()
        Socks(c, size=2 * MIB, **device).close()
        why = c.must_refuse("ESTALE", cmd="attach", size=2 * MIB + 512, **device)
        assert str(2 * MIB) in why, why
        # By its name only, it has to be what it was: whole blocks of it.
        device["backend_id"] = "nbdrs.a%20disk"
        c.must_refuse("ESTALE", cmd="attach", size=MIB, **device)
        os.truncate(path, 2 * MIB + 512)
    with Daemon([("a disk", "raw", f"file:{path}")]) as d, Ctl(d.control) as c:
        for size, block in ((2 * MIB + 512, 512), (2 * MIB, 4096)):
            Socks(c, size=size, block_size=block, **device).close()
        c.must_refuse("ESTALE", cmd="attach", size=2 * MIB, **device)
        for block in (0, "1", 256):
            c.must_refuse("EINVAL", cmd="attach", size=2 * MIB, block_size=block, **device)


@suite.case
def a_volume_without_an_identity_has_its_name():
    folder = temp_dir()
    with open(f"{folder}/x.img", "wb") as f:
        f.truncate(MIB)
    init("sharded", f"file:{folder}/v/")
    os.unlink(f"{folder}/v/uuid")
    for chain in (("raw", f"file:{folder}/x.img"), ("sharded", f"file:{folder}/v/"), ("raw", "mem[size=1Mi]")):
        assert backend_id(*chain) == "nbdrs.a%20disk"
    for text in ("", "0123456789abcde", "0123456789ABCDEF", "0123456789abcdeg"):
        with open(f"{folder}/v/uuid", "w") as f:
            f.write(text)
        assert backend_id("sharded", f"file:{folder}/v/") == "nbdrs.a%20disk", text


@suite.case
def what_a_lost_connection_asked_for_ends_before_it_is_asked_again():
    """The kernel sends it again. Were that and a newer write answered first, the old one would undo the newer."""
    with Daemon([("disk", "raw", "delay[write=700ms,count=1]:mem[size=1Mi]")]) as d, Ctl(d.control) as c:
        k = Socks(c, **DEVICE, size=MIB)
        k.socks[0].sendall(request(WRITE, 1, 0, 4096, b"1" * 4096))
        wait_until("the write is in the chain", lambda: c.status(export="disk")[1][0]["clients"][0]["in_flight"] == 1)
        k.close()
        assert alive(c) == 0
        c.must_refuse("EBUSY", cmd="attach", size=MIB, **DEVICE)
        wait_until("it has ended", lambda: not c.status(export="disk")[1][0]["clients"])
        again = Socks(c, **DEVICE, size=MIB)
        again.socks[0].sendall(request(READ, 2, 0, 4096))
        reply = b""
        while len(reply) < 16 + 4096:
            reply += again.socks[0].recv(65536)
        assert reply[16:] == b"1" * 4096
        again.close()


@suite.case
def a_copy_waits_for_the_first_one():
    """With several connections the kernel gives up the one that is slow, and sends over the other one at once."""
    with Daemon([("disk", "raw", "delay[write=700ms,zero=700ms,trim=700ms,count=1]:mem[size=1Mi]")]) as d, \
            Ctl(d.control) as c:
        k = Socks(c, export="disk", connections=3)
        slow, other, third = k.socks
        slow.sendall(request(WRITE, 1, 0, 4096, b"1" * 4096))
        wait_until("the write is in the chain",
                   lambda: sum(x["in_flight"] for x in c.status(export="disk")[1][0]["clients"]) == 1)
        slow.close()
        wait_until("it was noticed", lambda: alive(c) == 2)
        third.sendall(request(WRITE, 2, 0, 4096, b"x" * 4096))	# waits, is cut, and is never done
        wait_until("that waits", lambda: sum(x["in_flight"] for x in c.status(export="disk")[1][0]["clients"]) == 2)
        third.close()
        other.sendall(request(READ, 3, 8192, 512))
        assert other.recv(16 + 512, socket.MSG_WAITALL)[8:16] == struct.pack(">Q", 3), "reads don't wait"
        begun = time.monotonic()
        for cookie, fill in ((4, b"1"), (5, b"2")):
            other.sendall(request(WRITE, cookie, 0, 4096, fill * 4096))
            assert struct.unpack(">IIQ", other.recv(16, socket.MSG_WAITALL)) == (SIMPLE_MAGIC, 0, cookie)
        assert time.monotonic() - begun > 0.2, "the copy did not wait"
        wait_until("the lost ones are gone", lambda: len(c.status(export="disk")[1][0]["clients"]) == 1)
        other.sendall(request(READ, 6, 0, 4096))
        assert other.recv(16 + 4096, socket.MSG_WAITALL)[16:] == b"2" * 4096
        other.close()


@suite.case
def a_connection_over_its_limits_is_still_seen_to_be_cut():
    """It has 1024 writes in the chain and is not read: cut then, they end before a newer one begins."""
    limit, old, new = 1024, b"o" * 512, b"n" * 512
    long = 8 if SANITIZED else 1
    with Daemon([("disk", "raw", f"delay[write={long}s,count={limit}]:mem[size=1Mi]")]) as d, Ctl(d.control) as c:
        k = Socks(c, **DEVICE, size=MIB, connections=2)
        for i in range(limit + 50):
            k.socks[0].sendall(request(WRITE, i, 0, 512, old))
        wait_until("it is over its limit", lambda: sum(x["in_flight"] for x in c.status()[1][0]["clients"]) == limit)
        k.socks[0].shutdown(socket.SHUT_RDWR)
        wait_until("it was noticed", lambda: alive(c) == 1)
        k.socks[1].sendall(request(WRITE, 1, 0, 512, new))
        assert k.socks[1].recv(16, socket.MSG_WAITALL) == struct.pack(">IIQ", SIMPLE_MAGIC, 0, 1)
        wait_until("the cut one is gone", lambda: len(c.status()[1][0]["clients"]) == 1)
        k.socks[1].sendall(request(READ, 2, 0, 512))
        assert k.socks[1].recv(16 + 512, socket.MSG_WAITALL)[16:] == new, "an old copy undid a newer write"
        assert c.status()[1][0]["requests"]["write"] <= limit + 1, "what it had not read is the kernel's to send again"
        k.close()


@suite.case
def what_a_lost_connection_had_left_is_not_done_later():
    """Cut while nobody reads, in an upgrade: the kernel has sent again what is in its socket, too."""
    folder = temp_dir()
    path, gates = f"{folder}/disk.img", [f"{folder}/held", f"{folder}/go"]
    with open(path, "wb") as f:
        f.truncate(MIB)
    for gate in gates:
        os.mkfifo(gate)
    with open(f"{folder}/program", "w") as f:
        f.write("#!/bin/sh\n"
                f'[ -z "$NBDRS_HANDOVER" ] || {{ echo >{gates[0]}; read -r go <{gates[1]}; }}\n'
                f'exec {BUILD}/nbdrsd "$@"\n')
    os.chmod(f.name, 0o755)
    with Daemon([("disk", "raw", f"file:{path}")]) as d:
        with Ctl(d.control) as c:
            k = Socks(c, export="disk", connections=8)
            assert c.ask("upgrade", binary=f.name)["ok"]
        *lost, other = k.socks
        with open(gates[0]) as held:
            held.read()
        for s in lost:
            s.sendall(request(WRITE, 1, 0, 512, b"1" * 512))
            s.shutdown(socket.SHUT_RDWR)
        begun = len(d.log)
        with open(gates[1], "w") as go:
            go.write("\n")
        for cookie in (1, 2):
            other.sendall(request(WRITE, cookie, 0, 512, b"%d" % cookie * 512))
            assert other.recv(16, socket.MSG_WAITALL) == struct.pack(">IIQ", SIMPLE_MAGIC, 0, cookie)
        d.wait_log("ready version=", begun)
        with Ctl(d.control) as c:
            wait_until("the lost ones are gone", lambda: len(c.status()[1][0]["clients"]) == 1)
            assert c.status()[1][0]["requests"]["write"] == 2, "an old copy came after it"
        k.close()


@suite.case
def a_store_that_says_it_shuts_down_is_an_error_in_the_log():
    """Only requests that were cut off before they began are left out of it."""
    with Daemon([("disk", "raw", "fault[ops=write,error=ESHUTDOWN]:mem[size=1Mi]")]) as d, Ctl(d.control) as c:
        k = Socks(c, **DEVICE, size=MIB)
        k.socks[0].sendall(request(WRITE, 1, 0, 512, b"x" * 512))
        d.wait_log("request failed export=disk .*reason=ESHUTDOWN")
        k.close()


suite.main()
