#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=120
"""The negotiation as NBD proto.md wants it, and the listeners around it."""

import functools
import os
import re
import socket
import stat
import struct
import time

from nbdrs_test import *

MEM = ("disk", "raw", "mem[size=1Mi]")
SECOND = ("second disk/ü", "raw", "mem[size=2Mi]")

suite = Suite()


@functools.cache
def shared():
    """The daemon of all cases that do not need their own."""
    return Daemon([MEM, SECOND], tcp=True)


def started():
    c = Nbd(shared().unix)
    c.start()
    return c


def works(c):
    """The connection is in transmission phase and in step."""
    data = os.urandom(4096)
    c.write(8192, data)
    assert c.read(8192, 4096) == data


def eventually(what, condition):
    """Asks again and again, each time after a round trip to the daemon, so it gets on meanwhile."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not in {WAIT_S} s: {what}"


# --- Greeting and flags ----------------------------------------------------------------------------


@suite.case
def greeting_offers_fixed_newstyle_and_no_zeroes_only():
    with Nbd(shared().unix) as c:
        assert c.start() == FIXED_NEWSTYLE | NO_ZEROES


@suite.case
def unknown_client_flags_close():
    for bit in (2, 3, 8, 16, 31):
        with Nbd(shared().unix) as c:
            c.start(flags=FIXED_NEWSTYLE | 1 << bit)
            c.must_be_closed()  # without waiting for an option


@suite.case
def without_fixed_newstyle_only_export_name():
    with Nbd(shared().unix) as c:
        c.start(flags=0)
        c.send(c.option(OPT_LIST))
        c.must_be_closed()


@suite.case
def wrong_option_magic_closes():
    with started() as c:
        c.send(c.option(OPT_LIST, magic=b"IHAVEOPU"))
        c.must_be_closed()


# --- EXPORT_NAME -----------------------------------------------------------------------------------


def export_name(flags, name):
    c = Nbd(shared().unix)
    c.start(flags)
    c.send(c.option(OPT_EXPORT_NAME, name))
    size, tflags = struct.unpack(">QH", c.recv(10))
    if not flags & NO_ZEROES:
        assert c.recv(124) == bytes(124)
    assert size == (2 * MIB if name.startswith(b"second") else MIB)
    assert tflags & HAS_FLAGS and not tflags & (READ_ONLY | SEND_DF)
    return c


@suite.case
def export_name_begins_transmission():
    for flags in (0, FIXED_NEWSTYLE, NO_ZEROES, FIXED_NEWSTYLE | NO_ZEROES):
        for name in (b"disk", b"", "second disk/ü".encode()):
            with export_name(flags, name) as c:
                works(c)
                c.disconnect()


@suite.case
def export_name_of_an_unknown_export_closes():
    for name in (b"dis", b"disk2", b"disk\0", b"n" * 4096, b"n" * 4097):
        with started() as c:
            c.send(c.option(OPT_EXPORT_NAME, name))
            c.must_be_closed()


# --- INFO and GO -----------------------------------------------------------------------------------


@suite.case
def go_begins_transmission_without_zeroes():
    for flags in (FIXED_NEWSTYLE, FIXED_NEWSTYLE | NO_ZEROES):
        with Nbd(shared().unix) as c:
            c.start(flags)
            c.go("disk")
            assert c.size == MIB
            works(c)


@suite.case
def info_and_go_give_the_same():
    for structured in (False, True):
        with started() as c:
            if structured:
                c.use_structured()
            asked = [INFO_BLOCK_SIZE, INFO_NAME, 0x4711, INFO_DESCRIPTION]
            first, end = c.info("", asked)
            assert end == REP_ACK
            assert c.info("", asked) == (first, end)
            assert c.go("", asked) == first
            assert first[INFO_NAME] == b"disk"
            assert b"mem" in first[INFO_DESCRIPTION]
            assert set(first) == {INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE}
            assert bool(c.flags & SEND_DF) == structured
            works(c)


@suite.case
def block_sizes_are_powers_of_two_in_order():
    with started() as c:
        got, _ = c.info("disk", [INFO_BLOCK_SIZE])
        least, preferred, most = struct.unpack(">III", got[INFO_BLOCK_SIZE])
        assert least & (least - 1) == 0 and 1 <= least <= 65536
        assert preferred & (preferred - 1) == 0 and preferred >= max(least, 512)
        assert most >= max(preferred, 32 * MIB)


@suite.case
def unknown_export_is_an_error_reply():
    with started() as c:
        for name in ("dis", "disk2", "disk\0", "Disk", " disk", "n" * 4096):
            for option in (OPT_INFO, OPT_GO):
                assert c.info(name, option=option) == ({}, ERR_UNKNOWN)
        c.go("disk")
        works(c)


@suite.case
def unknown_exports_disturb_nobody():
    d = shared()
    with Nbd.connect(d.unix, "disk") as other:
        for i in range(100):
            with Nbd(d.unix) as c:
                c.start()
                assert c.info(f"no{i}", option=OPT_GO) == ({}, ERR_UNKNOWN)
                if i % 2:
                    c.send(c.option(OPT_EXPORT_NAME, b"no"))
                    c.must_be_closed()
            works(other)


@suite.case
def malformed_options_stay_in_step():
    with started() as c:
        for data in (b"", b"\0\0\0", b"\0\0\0\0", b"\0\0\0\0\0", b"\0\0\0\0\0\1", b"\0\0\0\0\0\0\0",
                     b"\0\0\0\5disk\0\0", b"\xff\xff\xff\xffdisk", b"\xff\xff\xff\xfcdi\0\0",
                     b"\0\0\0\4disk\0\2\0\3", b"\0\0\0\4disk\0\1\0\3\0\3"):
            for option in (OPT_INFO, OPT_GO):
                assert c.ask(option, data) == ([], ERR_INVALID), data
        c.go("disk")
        works(c)


@suite.case
def long_options_are_drained_and_refused():
    with started() as c:
        assert c.ask(OPT_GO, c.info_data("n" * 4097)) == ([], ERR_TOO_BIG)
        for option in (OPT_GO, OPT_INFO):
            assert c.ask(option, b"x" * 20000) == ([], ERR_TOO_BIG)
        assert c.ask(OPT_GO, b"x" * (4 * MIB)) == ([], ERR_TOO_BIG)
        # As long as is looked at, and all of it asked for.
        got, end = c.info("disk", [INFO_NAME] * 8000)
        assert end == REP_ACK and got[INFO_NAME] == b"disk"
        c.go("disk")
        works(c)


@suite.case
def endless_option_is_cut_off():
    with started() as c:
        c.send(c.option(77, length=0xFFFFFFFF))
        try:
            for _ in range(1024):
                c.send(bytes(MIB))
        except (BrokenPipeError, ConnectionResetError):
            return
        raise AssertionError("1 GiB of an option was taken")


# --- Other options ---------------------------------------------------------------------------------


@suite.case
def unknown_options_are_drained_and_refused():
    with started() as c:
        for option in (0, 4, 12, 99, OPT_EXTENDED_HEADERS, 0x80000000, 0xFFFFFFFF):
            for length in (0, 1, 17, 100000):
                assert c.ask(option, b"o" * length) == ([], ERR_UNSUP)
        c.go("disk")
        works(c)


@suite.case
def starttls_is_refused():
    with started() as c:
        for data in (b"", b"", b"data"):
            found, end = c.ask(OPT_STARTTLS, data)
            assert not found and end in (ERR_UNSUP, ERR_POLICY, ERR_INVALID)
        c.go("disk")
        works(c)


@suite.case
def abort_is_acknowledged():
    for data in (b"", b"ignored"):
        with started() as c:
            assert c.ask(OPT_ABORT, data) == ([], REP_ACK)
            c.must_be_closed()


@suite.case
def abort_by_a_client_that_is_gone():
    d = shared()
    for _ in range(20):
        with started() as c:
            c.send(c.option(OPT_ABORT))
    with Nbd.connect(d.unix, "disk") as c:
        works(c)


@suite.case
def list_names_every_export():
    with started() as c:
        found, end = c.ask(OPT_LIST)
        assert end == REP_ACK and all(kind == REP_SERVER for kind, _ in found)
        names = []
        for _, data in found:
            (n,) = struct.unpack(">I", data[:4])
            names.append(data[4:4 + n].decode())
            data[4 + n:].decode()
        assert names == ["disk", "second disk/ü"]
        assert c.ask(OPT_LIST, b"x") == ([], ERR_INVALID)
        assert c.ask(OPT_LIST)[0] == found


@suite.case
def list_of_many_exports_with_long_names():
    exports = [(f"{i:04}" + "n" * (i * 20), "raw", "mem[size=4Ki]") for i in range(150)]
    with Daemon(exports) as d, Nbd(d.unix) as c:
        c.start()
        found, end = c.ask(OPT_LIST)
        assert end == REP_ACK
        assert [data[4:4 + struct.unpack(">I", data[:4])[0]].decode() for _, data in found] == [
            name for name, _, _ in exports]
        for name, _, _ in exports:
            assert c.info(name)[1] == REP_ACK
        c.go(exports[-1][0])


@suite.case
def structured_replies():
    with started() as c:
        assert c.ask(OPT_STRUCTURED_REPLY, b"x") == ([], ERR_INVALID)
        c.use_structured()
        found, end = c.ask(OPT_STRUCTURED_REPLY)
        assert not found and end in (REP_ACK, ERR_INVALID)
        c.go("disk")
        works(c)


# --- Metadata contexts -----------------------------------------------------------------------------


@suite.case
def contexts_need_structured_replies():
    with started() as c:
        for option in (OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT):
            assert c.ask(option, c.meta_data("disk", ["base:allocation"])) == ([], ERR_INVALID)


def listed(c, name, queries):
    found, end = c.ask(OPT_LIST_META_CONTEXT, c.meta_data(name, queries))
    assert end == REP_ACK and all(kind == REP_META_CONTEXT for kind, _ in found)
    return [data[4:].decode() for _, data in found]


@suite.case
def contexts_are_listed():
    with started() as c:
        c.use_structured()
        for queries in ([], ["base:"], ["base:allocation"], ["x", "base:", "base:allocation"]):
            assert listed(c, "disk", queries) == ["base:allocation"], queries
        for queries in ([""], ["base"], ["base:alloc"], ["qemu:"], ["base:allocation "]):
            assert listed(c, "disk", queries) == [], queries
        assert c.ask(OPT_LIST_META_CONTEXT, c.meta_data("none")) == ([], ERR_UNKNOWN)
        # A list chooses nothing.
        c.go("disk")
        assert c.do(BLOCK_STATUS, 0, 4096) == EINVAL


@suite.case
def contexts_are_set_and_replaced():
    with started() as c:
        c.use_structured()
        for queries in ([], ["base:"], ["qemu:x"]):
            assert c.set_context("disk") != {}
            assert c.set_context("disk", queries) == {}
        c.go("disk")
        assert c.do(BLOCK_STATUS, 0, 4096) == EINVAL
    for bad, error in ((Nbd.meta_data("none", ["base:allocation"]), ERR_UNKNOWN), (b"\0", ERR_INVALID),
                       (b"x" * 20000, ERR_TOO_BIG)):
        with started() as c:
            c.use_structured()
            c.set_context("disk")
            assert c.ask(OPT_SET_META_CONTEXT, bad) == ([], error)
            c.go("disk")
            assert c.do(BLOCK_STATUS, 0, 4096) == EINVAL


@suite.case
def contexts_belong_to_an_export():
    for name, other in (("disk", "second disk/ü"), ("second disk/ü", "disk"), ("disk", ""), ("", "disk")):
        with started() as c:
            c.use_structured()
            c.set_context(name)
            c.go(other)
            assert c.do(BLOCK_STATUS, 0, 4096) == EINVAL
        with started() as c:
            c.use_structured()
            c.context = c.set_context(name)["base:allocation"]
            c.go(name)
            assert sum(n for n, _ in c.block_status(0, 4096)) >= 4096


@suite.case
def malformed_context_options_stay_in_step():
    with started() as c:
        c.use_structured()
        for data in (b"", b"\0\0\0\0", b"\0\0\0\0\0\0\0\1", b"\0\0\0\0\xff\xff\xff\xff\0\0\0\0",
                     b"\0\0\0\0\0\0\0\1\xff\xff\xff\xff", b"\0\0\0\0\0\0\0\1\0\0\0\1xy",
                     b"\0\0\0\11\0\0\0\0\0\0\0\0"):
            for option in (OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT):
                assert c.ask(option, data) == ([], ERR_INVALID), data
        assert c.ask(OPT_SET_META_CONTEXT, c.meta_data("disk", ["q" * 4097])) == ([], ERR_TOO_BIG)
        c.go("disk")
        works(c)


# --- How it arrives --------------------------------------------------------------------------------


@suite.case
def everything_in_one_send():
    with Nbd(shared().unix) as c:
        c.send(struct.pack(">I", 3), c.option(OPT_STRUCTURED_REPLY), c.option(99, b"x" * 5000),
               c.option(OPT_SET_META_CONTEXT, c.meta_data("disk", ["base:allocation"])), c.option(OPT_LIST),
               c.option(OPT_GO, c.info_data("disk")), c.request(READ, 0, 512), c.request(DISC))
        c.recv(18)
        assert c.answer(OPT_STRUCTURED_REPLY)[1] == REP_ACK
        assert c.answer(99)[1] == ERR_UNSUP
        assert len(c.answer(OPT_SET_META_CONTEXT)[0]) == 1
        assert len(c.answer(OPT_LIST)[0]) == 2
        assert c.answer(OPT_GO)[1] == REP_ACK
        c.structured = True
        c.cookie -= 1
        assert c.reply(READ, 0, 512)[0] == 0
        c.must_be_closed()


@suite.case
def everything_byte_by_byte():
    with Nbd(shared().unix) as c:
        for byte in (struct.pack(">I", 3) + c.option(99, b"xyz") + c.option(OPT_GO, c.info_data("disk"))
                     + c.request(READ, 0, 512)):
            c.send(bytes([byte]))
        c.recv(18)
        assert c.answer(99) == ([], ERR_UNSUP)
        assert c.answer(OPT_GO)[1] == REP_ACK
        assert c.reply(READ, 0, 512)[0] == 0


@suite.case
def an_answer_is_one_send():
    """Parts sent one by one would cost 40 ms each on TCP; here a single receive gets all of it."""
    with started() as c:
        for _ in range(50):
            c.send(c.option(OPT_INFO, c.info_data("disk", [INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE])))
            data, messages = c.s.recv(65536), 0
            while data:
                (length,) = struct.unpack(">I", data[16:20])
                data, messages = data[20 + length:], messages + 1
            assert messages == 5


@suite.case
def over_tcp():
    d = shared()
    for _ in range(20):
        with Nbd.connect(d.port, "disk", structured=True, context=True) as c:
            works(c)
            c.disconnect()


@suite.case
def clients_that_vanish_leave_nothing():
    d = shared()
    talk = (struct.pack(">I", 3) + Nbd.option(OPT_STRUCTURED_REPLY) + Nbd.option(99, b"x" * 100)
            + Nbd.option(OPT_GO, Nbd.info_data("disk")))
    with Nbd.connect(d.unix, "disk") as other:
        before = d.fds()
        for cut in range(len(talk)):
            with Nbd(d.port if cut % 4 == 0 else d.unix) as c:
                c.send(talk[:cut])
        works(other)
        eventually("descriptors are back", lambda: works(other) or d.fds() <= before)


# --- Limits ----------------------------------------------------------------------------------------


@suite.case
def a_silent_client_is_closed_in_time():
    with Daemon([MEM], ["--handshake-timeout", "300ms"]) as d:
        begin = time.monotonic()
        silent = [Nbd(d.unix) for _ in range(5)]
        silent[1].start()
        silent[2].send(b"\0")
        silent[3].start()
        silent[3].send(Nbd.option(OPT_GO, b"x", length=100))
        silent[4].start()
        silent[4].ask(OPT_LIST)
        for c, rest in zip(silent, (18, 0, 18, 0, 0)):
            c.recv(rest)
            c.must_be_closed()
            c.close()
        assert time.monotonic() - begin >= 0.29
        d.wait_log(r"negotiation failed .*ETIMEDOUT")
        with Nbd.connect(d.unix, "disk") as c:
            works(c)


@suite.case
def a_busy_client_is_closed_in_time():
    with Daemon([MEM], ["--handshake-timeout", "300ms"]) as d, Nbd.connect(d.unix, "disk") as other:
        with Nbd(d.unix) as c:
            c.start()
            try:
                for i in range(10**9):
                    c.send(c.option(OPT_LIST) * 100)
                    for _ in range(100):
                        c.answer(OPT_LIST)
                    works(other)
            except (Closed, BrokenPipeError, ConnectionResetError):
                pass
        works(other)


@suite.case
def a_client_that_does_not_read_is_closed_in_time():
    with Daemon([MEM], ["--handshake-timeout", "300ms"]) as d, Nbd.connect(d.unix, "disk") as other:
        with Nbd(d.unix) as c:
            c.start()
            try:
                while True:
                    c.send(c.option(OPT_LIST) * 1000)
            except (BrokenPipeError, ConnectionResetError):
                pass
        works(other)


@suite.case
def the_connection_limit():
    with Daemon([MEM], ["--max-connections", "3"], tcp=True) as d:
        two = [Nbd.connect(d.unix, "disk"), Nbd.connect(d.port, "disk")]
        third = Nbd(d.unix)
        third.start()  # in negotiation counts too
        for where in (d.unix, d.port):
            with Nbd(where) as c:
                c.must_be_closed()
        d.wait_log("connection limit")
        third.go("disk")
        for c in (*two, third):
            works(c)
        two[0].disconnect()

        def let_in():
            try:
                with Nbd.connect(d.unix, "disk") as c:
                    works(c)
                    return True
            except (Closed, BrokenPipeError, ConnectionResetError):
                return False

        eventually("a place is free again", let_in)
        two[1].close()
        third.close()


@suite.case
def no_descriptors_left():
    """Clients wait in the backlog; nobody else notices, and all is well when some have gone."""
    with Daemon([MEM], shell="ulimit -n 60") as d, Nbd.connect(d.unix, "disk") as other:
        clients = [Nbd(d.unix) for _ in range(80)]
        d.wait_log("accept failed.*EMFILE")
        works(other)
        for c in clients[:60]:
            c.close()
        for c in clients[60:]:
            c.start()
            c.go("disk")
            works(c)
            c.close()
        works(other)


# --- The end ---------------------------------------------------------------------------------------


@suite.case
def negotiations_end_with_err_shutdown():
    d = Daemon([MEM])
    with Nbd(d.unix) as c, Nbd(d.unix) as idle:
        c.start()
        idle.start()
        assert c.info("disk")[1] == REP_ACK
        d.send_signal()
        end = REP_ACK
        while end == REP_ACK:
            _, end = c.info("disk")
        assert end == ERR_SHUTDOWN, hex(end)
        assert c.info("disk", option=OPT_GO) == ({}, ERR_SHUTDOWN)
        c.close()
        idle.must_be_closed()  # soon, not after its whole time limit
        assert d.wait() == 0, d.text()
    assert not os.path.exists(d.unix)


# --- Listeners -------------------------------------------------------------------------------------


@suite.case
def a_stale_socket_is_replaced():
    path = os.path.join(temp_dir(), "s")
    d = Daemon([MEM], ["--unix", path])
    d.kill()
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    with Daemon([MEM], ["--unix", path]):
        with Nbd.connect(path, "disk") as c:
            works(c)
    assert not os.path.exists(path)


@suite.case
def a_killed_daemon_is_followed_at_once():
    """The kernel takes a dead daemon's sockets down a little later; its successor waits for that."""
    path = os.path.join(temp_dir(), "s")
    d = Daemon([MEM], ["--unix", path], tcp=True)
    again = ["--unix", path, "--control", d.control, "--listen", f"127.0.0.1:{d.port}"]
    for _ in range(5):
        clients = [Nbd.connect(where, "disk") for where in (path, d.port)]
        port = d.port
        d.kill()
        d = Daemon([MEM], again, listen=False)
        d.port = port
        for c in clients:
            c.close()
    d.stop()


@suite.case
def a_live_socket_is_left_alone():
    d = shared()
    second = Daemon([MEM], ["--unix", d.unix], ready=False)
    assert second.wait() == 1
    assert "another server listens" in second.text() and d.unix in second.text(), second.text()
    with Nbd.connect(d.unix, "disk") as c:
        works(c)


@suite.case
def a_file_is_not_replaced():
    path = os.path.join(temp_dir(), "f")
    with open(path, "w") as f:
        f.write("precious")
    d = Daemon([MEM], ["--unix", path], ready=False)
    assert d.wait() == 1
    assert "is not a socket" in d.text(), d.text()
    with open(path) as f:
        assert f.read() == "precious"


@suite.case
def somebody_elses_socket_is_not_removed():
    with Daemon([MEM]) as d:
        os.unlink(d.unix)
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(d.unix)
            d.stop()
        assert os.path.exists(d.unix)


@suite.case
def unix_paths_that_cannot_be():
    folder = temp_dir()
    for path, word in ((os.path.join(folder, "p" * 108), "1 to 107 bytes"),
                       (os.path.join(folder, "none", "s"), "No such file")):
        d = Daemon([MEM], ["--unix", path], ready=False)
        assert d.wait() == 1
        assert word in d.text(), d.text()


def listen_once(*addresses):
    """A daemon that listens on these, or fails to: (exit code or None, daemon)."""
    args = [w for a in addresses for w in ("--listen", a)]
    d = Daemon([MEM], ["--unix", os.path.join(temp_dir(), "s"), *args], listen=False, ready=False)
    try:
        d.wait_log("ready version=")
    except AssertionError:
        return d.wait(), d
    return None, d


@suite.case
def addresses_of_all_forms():
    forms = ["127.0.0.1:0", "localhost:0", "*:0", ":0"]
    if os.path.exists("/proc/net/if_inet6") and "00000000000000000000000000000001" in open(
            "/proc/net/if_inet6").read():
        forms += ["[::1]:0", "[::]:0"]
    code, d = listen_once(*forms)
    assert code is None, d.text()
    for line in d.log:
        found = re.search(r"listening address=(.*):(\d+)$", line or "")
        if found:
            host = found.group(1).strip("[]")
            with socket.create_connection((host, int(found.group(2))), WAIT_S) as s:
                assert s.recv(16, socket.MSG_WAITALL) == NBDMAGIC + IHAVEOPT
    assert len([l for l in d.log if l and "listening address=" in l]) >= len(forms)
    d.stop()


@suite.case
def addresses_that_cannot_be():
    port = shared().port
    for text, word in ((f"127.0.0.1:{port}", "ddress already in use"), ("127.0.0.1:65536", "no address"),
                       ("127.0.0.1:x", "no address"), ("127.0.0.1:", "no address"), ("[::1", "no address"),
                       ("[::1]x", "no address"), ("[]:1", "no address"), ("", "no address"),
                       ("192.0.2.1:0", "192.0.2.1"), ("no.such.host.invalid:0", "no.such.host.invalid")):
        code, d = listen_once(text)
        assert code in (1, 2), (text, code)
        assert word in d.text() and f"'{text}'" in d.text() or text and text in d.text(), d.text()


@suite.case
def sockets_from_systemd():
    path = os.path.join(temp_dir(), "s")
    with socket.socket(socket.AF_UNIX) as passed:
        passed.bind(path)
        passed.listen(10)
        with Daemon([MEM], shell="export LISTEN_FDS=1 LISTEN_PID=$$", fd=passed.fileno(), listen=False,
                    ready=False) as d:
            d.wait_log("ready version=")
            if "without libsystemd" in d.text():
                raise Skip("built without libsystemd")
            with Nbd.connect(path, "disk") as c:
                works(c)
            assert "127.0.0.1:10809" not in d.text(), "the defaults are for want of others"
        # It is systemd's: still there, still listening, for the daemon's next start.
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(path)


@suite.case
def a_descriptor_from_systemd_that_does_not_listen():
    with socket.socket(socket.AF_UNIX) as passed:
        d = Daemon([MEM], shell="export LISTEN_FDS=1 LISTEN_PID=$$", fd=passed.fileno(), listen=False,
                   ready=False)
        assert d.wait() == 1
        assert "ListenStream=" in d.text() or "without libsystemd" in d.text(), d.text()


# --- Exports ---------------------------------------------------------------------------------------


@suite.case
def export_names_that_cannot_be():
    for names, word in ((("a", "a"), "name 'a'"), (("",), "needs a name"), (("a\nb",), "control character"),
                        ((b"\xff\xfe",), "not UTF-8"), (("n" * 4097,), "4097")):
        d = Daemon([(n, "raw", "mem[size=1Mi]") for n in names], ready=False)
        assert d.wait() in (1, 2)
        assert word in d.text(), d.text()


suite.main()
