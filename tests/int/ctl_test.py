# SPDX-License-Identifier: GPL-3.0-or-later
"""A client of the control socket, for tests."""

import json
import socket
import time

from nbdrs_test import *

MAX_PACKET = 128 << 10


class Ctl:
    """A control client: says exactly what it is told."""

    def __init__(self, path):
        self.s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.s.settimeout(WAIT_S)
        self.s.connect(path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.s.close()

    def send(self, data):
        self.s.send(data)

    def recv(self):
        """(reply, descriptors) of one packet; None when the daemon closed."""
        data, fds, flags, _ = socket.recv_fds(self.s, MAX_PACKET + 1, 64)
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC), flags
        if not data:
            return None, fds
        reply = json.loads(data)
        assert reply["nbdrs"] == 1, reply
        return reply, fds

    def ask(self, cmd, **members):
        self.send(json.dumps({"nbdrs": 1, "cmd": cmd, **members}).encode())
        reply, fds = self.recv()
        assert not fds
        return reply

    def must_refuse(self, error, data=None, **members):
        """The request is refused with `error`; the text of it."""
        if data is None:
            reply = self.ask(**members)
        else:
            self.send(data)
            reply, _ = self.recv()
        assert reply is not None, "closed instead of answered"
        assert reply["ok"] is False and reply["errno"] == error, (data, members, reply)
        assert reply["error"], reply
        return reply["error"]

    def status(self, **members):
        """(first packet, [exports])."""
        reply = head = self.ask("status", **members)
        assert head["ok"] is True, head
        exports = []
        while reply.get("more"):
            reply, _ = self.recv()
            exports.append(reply["export"])
        return head, exports

    def attach(self, **members):
        self.send(json.dumps({"nbdrs": 1, "cmd": "attach", **members}).encode())
        reply, fds = self.recv()
        assert reply["ok"] is True, reply
        return reply, fds

    def must_be_closed(self):
        try:
            reply, _ = self.recv()
        except ConnectionResetError:
            return
        assert reply is None, reply


def wait_until(what, fn):
    """Asks again until fn() is true: for what the daemon does after it answered."""
    deadline = time.monotonic() + WAIT_S
    while not fn():
        if time.monotonic() > deadline:
            raise AssertionError("in vain: " + what)
        time.sleep(0.01)
