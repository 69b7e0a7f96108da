#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=120
"""nbdrsd's command line, its one-off commands, and its life from start to the second signal."""

import ctypes
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

from nbdrs_test import *

NBDRSD = os.path.join(BUILD, "nbdrsd")
MEM = ("disk", "raw", "mem[size=1Mi]")
EXPORT = ["-e", *MEM]

suite = Suite()


def run(*args, code=0, **kwargs):
    """Runs nbdrsd to its end; (standard output, standard error)."""
    p = subprocess.run([NBDRSD, *args], text=True, errors="replace", capture_output=True, timeout=WAIT_S,
                       stdin=subprocess.DEVNULL, check=False, **kwargs)
    assert p.returncode == code, (args, p)
    assert "\x1b" not in p.stderr
    return p.stdout, p.stderr


def image(size=MIB):
    path = os.path.join(temp_dir(), "disk.img")
    with open(path, "wb") as f:
        f.truncate(size)
    return path


# --- Words -----------------------------------------------------------------------------------------


def exports_file(text, name="exports.conf"):
    path = os.path.join(temp_dir(), name)
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
    return path


@suite.case
def exports_come_from_a_file():
    conn = exports_file("# a key stays out of the list\nmem[size=2Mi]\n", "conn")
    path = exports_file(f"# exports\none raw mem[size=1Mi]   # the first\n\n'two b' raw @{conn}\n")
    out, _ = run("check", "--exports", path)
    assert "mem[size=1Mi]" in out and "mem[size=2Mi]" in out, out
    with Daemon([MEM], ["--exports", path]) as d:
        for name, size in (("disk", MIB), ("one", MIB), ("two b", 2 * MIB)):
            with Nbd.connect(d.unix, name) as n:
                assert n.size == size, name


@suite.case
def mistakes_in_a_file_of_exports_are_found_by_line():
    def fails(text, *words):
        path = exports_file(text)
        _, err = run("--exports", path, "--control", "none", code=2)
        for word in words:
            assert word.replace("FILE", path) in err, (word, err)
    fails("", "FILE names no export", "NAME DRIVER CONN")
    fails("a raw mem[size=1Mi]\nb raw\n", "FILE:2: a line has three words", "this one 2")
    fails("a raw mem[size=1Mi] x\n", "FILE:1: a line has three words", "this one 4")
    fails("a raw mem[size=1Mi]\n\na raw mem[size=1Mi]\n", "FILE:3: the name 'a' is given twice")
    fails("\na raw foo:x\n", "FILE:2: export a: column 5")
    fails("a raw 'x\n", "FILE:1: a quote is opened")
    fails("a raw @x\n", "FILE:1: '@x'", "absolute path")
    fails("a raw @/nonexistent/x\n", "FILE:1: cannot open /nonexistent/x: No such file")
    fails("a raw @/dev/null\n", "FILE:1: /dev/null must hold one word")
    _, err = run("--exports", "/nonexistent/e", code=2)
    assert "cannot open /nonexistent/e: No such file" in err, err


@suite.case
def a_key_that_everybody_may_read_is_told_of():
    path = exports_file("a raw mem[size=1Mi]\nb raw fault[secret=k3y]:mem[size=1Mi]\n")
    for mode, is_told in ((0o644, True), (0o600, False)):
        os.chmod(path, mode)
        _, err = run("--exports", path, "--control", "none", code=2)  # fault has no such option
        assert ("everybody may read a key" in err) == is_told and "k3y" not in err, err


@suite.case
def help_and_version_go_to_standard_output():
    for args in (["--help"], ["-h"], ["help"], ["init", "--help"]):
        out, err = run(*args)
        assert out.startswith("Usage:\n") and not err, args
        for word in ("init", "destroy", "check", "info", "--listen", "--drain-timeout", "--io-engine"):
            assert word in out, word
    for args in (["--version"], ["-V"]):
        out, err = run(*args)
        assert re.fullmatch(r"nbdrsd \d+\.\d+\.\d+\n", out) and not err, args


@suite.case
def layers_have_help():
    out, _ = run("layers")
    names = [line.split()[0] for line in out.splitlines()]
    assert {"raw", "file", "mem", "null", "delay", "fault"} <= set(names), names
    for name in names:
        out, _ = run("help", name)
        assert out.startswith(f"{name}: ") and f"In a chain: {name}" in out, out
    assert "direct=" in run("help", "file")[0]
    assert "'nope'" in run("help", "nope", code=2)[1]


@suite.case
def mistakes_are_named():
    for args, word in (
            ([], "no export"),
            (["serve"], "no export"),
            (["-e"], "--export needs a value"),
            (["-e", "disk"], "both DRIVER and CONN"),
            (["-e", "disk", "raw"], "CONN is missing"),
            (["-e", "disk", "raw", "--unix", "x"], "'--unix'"),
            (["-e", "disk", "-r", "x"], "'-r'"),
            (["--export=disk", "raw"], "CONN is missing"),
            (["-e", "", "raw", "mem"], "needs a name"),
            (["-e", "bad\nname", "raw", "mem"], "control character"),
            (["-e", b"bad\xff", "raw", "mem"], "not UTF-8"),
            (["check", "-e", "x" * 4097, "raw", "mem"], "4097"),
            ([*EXPORT, *EXPORT], "'disk' is given twice"),
            ([*EXPORT, "more"], "'more'"),
            (["frobnicate", *EXPORT], "'frobnicate'"),
            ([*EXPORT, "--frobnicate"], "'--frobnicate'"),
            ([*EXPORT, "--frobnicate=7"], "'--frobnicate=7'"),
            ([*EXPORT, "-q"], "'-q'"),
            ([*EXPORT, "--read-only=yes"], "--read-only takes no value"),
            ([*EXPORT, "\x1b[31mred"], "'?[31mred'"),
            ([*EXPORT, "--threads"], "--threads needs a value"),
            ([*EXPORT, "--threads=0"], "'0'"),
            ([*EXPORT, "--threads=65"], "'65'"),
            ([*EXPORT, "--threads=two"], "'two'"),
            ([*EXPORT, "--io-engine=aio"], "'aio'"),
            ([*EXPORT, "--spin=fast"], "'fast'"),
            ([*EXPORT, "--spin=10001"], "'10001'"),
            ([*EXPORT, "--spin=-1"], "'-1'"),
            ([*EXPORT, "--max-connections=-1"], "'-1'"),
            ([*EXPORT, "--handshake-timeout=0"], "'0'"),
            ([*EXPORT, "--drain-timeout=25h"], "'25h'"),
            ([*EXPORT, "--log-level=loud"], "'loud'"),
            ([*EXPORT, "--listen=none", "--listen=::1"], "excludes"),
            ([*EXPORT, "--listen=[::1:80"], "'[::1:80' is no address"),
            ([*EXPORT, "--listen=127.0.0.1:65536"], "'127.0.0.1:65536' is no address"),
            ([*EXPORT, "--listen=127.0.0.1:"], "'127.0.0.1:' is no address"),
            ([*EXPORT, "--listen=::1", "--listen=none"], "excludes"),
            ([*EXPORT, "--control=none", "--control-group=x"], "--control is none"),
            ([*EXPORT, "--size=1G"], "--size is not an option of `nbdrsd serve`"),
            (["init", "raw", "file:/x"], "needs --size"),
            (["init", "--size=0", "raw", "file:/x"], "'0'"),
            (["init", "--size=1Z", "raw", "file:/x"], "'1Z'"),
            (["init", "--size=9Ei", "raw", "file:/x"], "'9Ei'"),
            (["init", "--size=-1", "raw", "file:/x"], "'-1'"),
            (["init", "--size=1G"], "needs a volume"),
            (["init", "--size=1G", "raw"], "CONN is missing"),
            (["init", "--size=1G", "--listen=::1", "raw", "file:/x"], "--listen is not an option"),
            (["init", "--size=1G", "raw", "file:/x", "more"], "'more'"),
            (["info", *EXPORT, "-e", "b", "raw", "mem"], "one volume"),
            (["layers", "raw"], "'raw'"),
            (["-e", "disk", "raw", "nope"], "column 5: there is no layer 'nope'"),
            (["-e", "disk", "raw", "nope:/x"], "column 10: "),
            (["-e", "disk", "raw", "mem[size=1Q]"], "1Q"),
            (["-e", "disk", "raw", "mem[colour=red]"], "colour"),
            (["check", "raw", "file"], "file")):
        out, err = run(*args, code=2)
        assert err.startswith("nbdrsd: ") and word in err, (args, err)
        assert not out, (args, out)


@suite.case
def options_stand_anywhere():
    out, _ = run("check", "raw", "mem[size=1Mi]", "--log-level=warn")
    assert out == "raw:mem[size=1Mi]\n", out
    out, _ = run("check", "--export=a", "raw", "mem[size=1Mi]", "-eb", "raw", "null[size=4Ki]", "--open")
    assert out.splitlines() == ["a: raw:mem[size=1Mi] 1MiB", "b: raw:null[size=4Ki] 4KiB"], out


# --- One-off commands ------------------------------------------------------------------------------


@suite.case
def a_volume_is_made_described_and_removed():
    path = os.path.join(temp_dir(), "disk.img")
    chain = ["raw", "file:" + path]
    assert "init --size" in run("info", *chain, code=1)[1]
    out, err = run("init", "--size", "1.5Mi", *chain, f"--io-engine={ENGINE}")
    assert out == f"raw:file:{path}: 1.5MiB (1572864 bytes)\n" and not err, (out, err)
    assert os.path.getsize(path) == 1572864
    with open(path, "r+b") as f:
        f.write(b"x" * 8192)
    # Made already: left as it is. Of another size: refused. By force: empty.
    run("init", "--size", "1536Ki", *chain)
    with open(path, "rb") as f:
        assert f.read(8192) == b"x" * 8192
    assert "--force" in run("init", "--size", "1Mi", *chain, code=1)[1]
    out, _ = run("info", *chain)
    for word in (f"raw:file:{path}", "1.5MiB (1572864 bytes)", "8KiB (8192 bytes)", "multi-conn"):
        assert word in out, (word, out)
    assert run("check", "--open", *chain)[0] == f"raw:file:{path} 1.5MiB\n"
    run("init", "--size", "1Mi", "--force", *chain)
    with open(path, "rb") as f:
        assert f.read() == bytes(MIB)
    assert "--force" in run("destroy", *chain, code=2)[1]
    assert os.path.exists(path)
    assert path in run("destroy", "--force", *chain)[0]
    assert not os.path.exists(path)
    assert path in run("destroy", "--force", *chain, code=1)[1]


@suite.case
def a_name_completes_a_folder():
    folder = temp_dir()
    run("init", "--size=64Ki", "-e", "disk0", "raw", f"file:{folder}/")
    assert os.path.getsize(f"{folder}/disk0") == 65536
    with Daemon([("disk0", "raw", f"file:{folder}/")]) as d, Nbd.connect(d.unix, "disk0") as n:
        assert n.size == 65536
    run("destroy", "--force", "-e", "disk0", "raw", f"file:{folder}/")
    assert os.listdir(folder) == []


@suite.case
def odd_sizes_are_noted():
    path = os.path.join(temp_dir(), "disk.img")
    assert "last 488" in run("init", "--size=1000", "raw", "file:" + path)[1]
    assert os.path.getsize(path) == 1000


def destroy_on_a_terminal(driver, conn, answer):
    """(exit code, what was on the terminal)."""
    master, slave = pty.openpty()
    p = subprocess.Popen([NBDRSD, "destroy", driver, conn], stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""
    while b"yes: " not in seen:
        seen += os.read(master, 1024)
    os.write(master, answer)
    code = p.wait(WAIT_S)
    try:
        while True:
            seen += os.read(master, 1024)
    except OSError:
        os.close(master)  # EIO: the other end is closed and nothing is left
    return code, seen.decode()


@suite.case
def destroy_asks_on_a_terminal():
    path = image()
    for answer in (b"no\n", b"\n", b"y\n", b"\x04", b"yes please, all of it, and quick\n"):
        code, seen = destroy_on_a_terminal("raw", "file:" + path, answer)
        assert code == 1 and "nothing was removed" in seen and os.path.exists(path), (answer, code, seen)
    code, seen = destroy_on_a_terminal("raw", "file:" + path, b"yes\n")
    assert code == 0 and path in seen and not os.path.exists(path), (code, seen)


@suite.case
def a_terminal_shows_progress():
    folder = os.path.join(temp_dir(), "volume")
    run("init", "--size=1Gi", "sharded", f"file:{folder}/")
    for i in range(7):
        with open(f"{folder}/block-{i}", "wb") as f:
            f.write(b"x")
    code, seen = destroy_on_a_terminal("sharded", f"file:{folder}/", b"yes\n")
    # Drawn on one line, and gone at the end.
    assert code == 0 and re.search("\r\x1b\\[Kdeleting objects 7 of 7\r\x1b\\[K", seen), (code, seen)
    assert not os.path.exists(folder)


@suite.case
def check_looks_at_all_and_opens_nothing():
    out, err = run("check", "-e", "a", "raw", "nope", "-e", "b", "raw", "file:/nonexistent/x", code=2)
    assert out == "b: raw:file:/nonexistent/x\n" and "export a: " in err, (out, err)
    out, err = run("check", "--open", "-e", "b", "raw", "file:/nonexistent/x", code=1)
    assert "/nonexistent/x" in err, err


# --- Secrets ---------------------------------------------------------------------------------------


@suite.case
def secrets_are_shown_nowhere():
    for conn in ("s3:http://KEYID:SECRETVALUE@host:9000/bucket/", "nope:s3:KEYID:SECRETVALUE@host/b",
                 "nope[secret=SECRETVALUE,key=KEYID]", "http://h/x?sig=SECRETVALUE&id=KEYID"):
        for words in (["check", "raw", conn], ["check", "--open", "-e", "x", "raw", conn], ["info", "raw", conn]):
            p = subprocess.run([NBDRSD, *words], text=True, capture_output=True, timeout=WAIT_S, check=False)
            assert p.stdout + p.stderr, words
            assert "SECRETVALUE" not in p.stdout + p.stderr and "KEYID" not in p.stdout + p.stderr, (words, p)


@suite.case
def ps_shows_no_secrets():
    # A file whose path looks like a URL with keys: it can be served without a server of that kind.
    folder = os.path.join(temp_dir(), "http:", "KEYID:SECRETVALUE@host")
    os.makedirs(folder)
    conn = "file:" + folder.replace("/http:/", "/http://") + "/disk.img"
    run("init", "--size=1Mi", "raw", conn)
    assert os.path.exists(folder + "/disk.img")
    with Daemon([("file", "raw", conn), MEM]) as d:
        with open(f"/proc/{d.process.pid}/cmdline", "rb") as f:
            words = f.read()
        assert b"SECRETVALUE" not in words and b"KEYID" not in words, words
        assert b"file\0raw\0file:" in words and b"@host/disk.img" in words, words
        assert b"raw\0mem[size=1Mi]\0" in words, "what is no secret stays as it was"


# --- Listening -------------------------------------------------------------------------------------


# Switches the loopback device of a new network namespace on (SIOCSIFFLAGS, IFF_UP), and IPv6 perhaps off.
ENTER_NETNS = """
import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sH14x", b"lo", 1))
if sys.argv[1] == "no-ipv6":
    with open("/proc/sys/net/ipv6/conf/all/disable_ipv6", "w") as f:
        f.write("1")
os.execv(sys.argv[2], sys.argv[2:])
"""


def netns_command():
    """Words that run a program in a network namespace of its own."""
    for words in (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"]):
        try:
            if subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0:
                return words
        except FileNotFoundError:
            break
    raise Skip("needs unshare (util-linux) and the right to make a network namespace")


def in_netns(*args, mode="all", ready=True):
    """A daemon where the default ports are free."""
    words = [*netns_command(), sys.executable, "-c", ENTER_NETNS, mode]
    return Daemon([MEM], args=args, listen=False, shell='set -- %s "$@"' % shlex.join(words), ready=ready)


@suite.case
def the_default_addresses_are_local():
    with in_netns() as d:
        assert re.findall(r"listening address=(\S+)", d.text()) == ["127.0.0.1:10809", "[::1]:10809"]
    # Without IPv6: one line, and on with the rest.
    with in_netns(mode="no-ipv6") as d:
        assert re.findall(r"listening address=(\S+)", d.text()) == ["127.0.0.1:10809"], d.text()
        assert "no IPv6" in d.text(), d.text()
    # Taken by another: an error.
    d = in_netns("--listen=127.0.0.1:10809", "--listen=127.0.0.1:10809", ready=False)
    assert d.wait() == 1 and "127.0.0.1:10809" in d.text() and "--listen" in d.text(), d.text()


@suite.case
def without_any_way_in_it_does_not_start():
    out, err = run(*EXPORT, "--listen=none", "--control=none", code=1)
    assert "nothing could ever connect" in err, err


@suite.case
def a_failed_start_takes_everything_back():
    path = image()
    folder = temp_dir()
    _, err = run("-e", "good", "raw", "file:" + path, "-e", "bad", "raw", "file:/nonexistent/x",
                 "--listen=none", "--control=none", "--unix", folder + "/s", code=1)
    assert "/nonexistent/x" in err, err
    _, err = run("-e", "good", "raw", "file:" + path, "--listen=none", "--control=none", "--unix",
                 folder + "/s", "--unix", folder + "/none/s", code=1)
    assert folder + "/none/s" in err, err
    assert os.listdir(folder) == [], "a socket file was left behind"
    if ENGINE == "io_uring":
        return
    # The epoll engine needs no more than a kernel.
    out, _ = run("check", "--open", "--io-engine=epoll", "raw", "file:" + path)
    assert "1MiB" in out, out


# --- Signals ---------------------------------------------------------------------------------------


SLOW = ("slow", "raw", "delay[read=%s]:mem[size=1Mi]")


def slow(seconds):
    return [(SLOW[0], SLOW[1], SLOW[2] % f"{seconds}s")]


def start_read(d):
    """A client with a READ that is in flight when this returns."""
    n = Nbd.connect(d.unix, "slow")
    n.send(n.request(READ, 0, 4096))
    # A request that is answered at once came after it on the same stream: the first one was taken.
    n.send(n.request(FLUSH, cookie=7))
    assert n.simple() == (0, 7)
    return n


@suite.case
def sigterm_answers_what_is_in_flight():
    for number in (signal.SIGTERM, signal.SIGINT):
        with Daemon(slow(0.5)) as d, start_read(d) as n:
            d.send_signal(number)
            d.wait_log("stopping signal=" + signal.Signals(number).name)
            assert n.reply(READ, 0, 4096) == (0, bytes(4096))
            n.must_be_closed()
            assert d.wait() == 0, d.text()
            assert "stopped" in d.text() and not os.path.exists(d.unix)


@suite.case
def a_second_signal_ends_at_once():
    d = Daemon(slow(60))
    with start_read(d):
        start = time.monotonic()
        d.send_signal(signal.SIGTERM)
        d.wait_log("stopping signal=SIGTERM")
        d.send_signal(signal.SIGTERM)
        assert d.wait() == 3, d.text()
        assert "second signal" in d.text() and time.monotonic() - start < 30, d.text()


@suite.case
def the_drain_has_a_limit():
    with Daemon(slow(1), args=["--drain-timeout=50ms"]) as d, start_read(d) as n:
        d.send_signal(signal.SIGTERM)
        n.must_be_closed()
        assert d.wait() == 0, d.text()
        assert "cut off" in d.text(), d.text()


@suite.case
def a_failing_last_flush_is_told():
    exports = [("sick", "raw", "fault[ops=flush,error=EIO]:mem[size=1Mi]")]
    d = Daemon(exports)
    d.send_signal()
    assert d.wait() == 1, d.text()
    assert "flush failed" in d.text() and "EIO" in d.text(), d.text()


@suite.case
def the_container_has_every_library():
    with open(os.path.join(os.path.dirname(__file__), "../../Dockerfile")) as f:
        installed = f.read().split("FROM")[2]
    needed = set()
    for program in ("nbdrsd", "nbdrs-attach", "nbdrsctl"):
        out = subprocess.run(["readelf", "-d", os.path.join(BUILD, program)], capture_output=True, text=True,
                             check=True).stdout
        # A sanitizer's library, and what every image of Debian has, are no part of it.
        needed |= {n for n in re.findall(r"NEEDED.*\[(\S+)\]", out)
                   if not re.match(r"lib(c|m|gcc_s|asan|tsan|ubsan)\.", n)}
    assert "libcurl.so.4" in needed, needed
    for library in needed:
        out = subprocess.run(["dpkg-query", "-S", f"*/{library}"], capture_output=True, text=True, check=True).stdout
        packages = set(re.findall(r"^([^:\n]+):", out, re.M))
        assert any(re.search(rf"(?<![\w-]){re.escape(p)}(?![\w-])", installed) for p in packages), \
            f"{library}: none of {packages} is installed by the Dockerfile"


@suite.case
def sighup_is_survived():
    with Daemon([MEM]) as d, Nbd.connect(d.unix, "disk") as n:
        d.send_signal(signal.SIGHUP)
        d.wait_log("SIGHUP ignored")
        n.read(0, 512)


@suite.case
def read_only_holds_for_all():
    path = image()
    with Daemon([("f", "raw", "file:" + path), MEM], args=["-r"]) as d:
        for name in ("f", "disk"):
            with Nbd.connect(d.unix, name) as n:
                assert n.flags & READ_ONLY and n.do(WRITE, 0, 512, 0, b"x" * 512) == EPERM


# --- The service manager ---------------------------------------------------------------------------


def notify_socket(address):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    s.settimeout(WAIT_S)
    s.bind(address)
    return s


@suite.case
def the_service_manager_is_told():
    path = os.path.join(temp_dir(), "notify")
    for address, env in ((path, path), (f"\0nbdrs-test-{os.getpid()}", f"@nbdrs-test-{os.getpid()}")):
        with notify_socket(address) as s, Daemon([MEM], shell=f"export NOTIFY_SOCKET={env}") as d:
            ready = s.recv(4096).decode().splitlines()
            assert "READY=1" in ready and "STATUS=serving 1 export" in ready, ready
            # Ready means ready.
            with Nbd.connect(d.unix, "disk") as n:
                n.read(0, 512)
            d.send_signal()
            assert "STOPPING=1" in s.recv(4096).decode().splitlines()
            assert d.wait() == 0
    # A manager that is gone is no reason to stop.
    with Daemon([MEM], shell="export NOTIFY_SOCKET=/nonexistent/notify") as d:
        d.wait_log("cannot notify the service manager error=ENOENT")
    # A start that fails is not announced.
    with notify_socket(path + "2") as s:
        d = Daemon([("f", "raw", "file:/nonexistent/x")], shell=f"export NOTIFY_SOCKET={path}2", ready=False)
        assert d.wait() == 1
        s.setblocking(False)
        try:
            assert False, s.recv(4096)
        except BlockingIOError:
            pass


def hold_thread(tid):
    """Stops one thread, as a hang would; the function that it returns lets it go on."""
    libc = ctypes.CDLL(None, use_errno=True)

    def ptrace(request):
        if libc.ptrace(request, tid, 0, 0):
            raise OSError(ctypes.get_errno(), "ptrace")
    ptrace(0x4206)  # PTRACE_SEIZE
    ptrace(0x4207)  # PTRACE_INTERRUPT
    os.waitpid(tid, 0x40000000)  # __WALL
    return lambda: ptrace(17)  # PTRACE_DETACH


def reactors(pid):
    tids = [int(t) for t in os.listdir(f"/proc/{pid}/task")]
    named = {open(f"/proc/{pid}/task/{t}/comm", encoding="utf-8").read().strip(): t for t in tids}
    return [named[n] for n in sorted(named) if re.fullmatch(r"nbdrs-\d+", n)]


@suite.case
def the_watchdog_hears_of_it_while_every_reactor_turns():
    path = os.path.join(temp_dir(), "notify")

    def hear(s):
        while b"WATCHDOG=1" not in s.recv(4096):
            pass
    with notify_socket(path) as s, Daemon([MEM], ["--threads", "2"], shell=f"export NOTIFY_SOCKET={path} "
                                          "WATCHDOG_USEC=100000 WATCHDOG_PID=$$") as d:
        hear(s)
        hear(s)
        for tid in reactors(d.process.pid):
            go_on = hold_thread(tid)
            try:
                s.settimeout(0.5)
                hear(s)  # one may have been under way
                hear(s)
                assert False, "a reactor hangs, and the watchdog is fed"
            except TimeoutError:
                pass
            finally:
                go_on()
            s.settimeout(WAIT_S)
            hear(s)
        d.send_signal()
        assert d.wait() == 0
    # Not ours, or none.
    for env in ("WATCHDOG_USEC=100000 WATCHDOG_PID=1", "WATCHDOG_USEC=x"):
        with notify_socket(path + "2") as s, Daemon([MEM], shell=f"export NOTIFY_SOCKET={path}2 {env}") as d:
            s.settimeout(0.3)
            try:
                hear(s)
                assert False, env
            except TimeoutError:
                os.unlink(path + "2")


@suite.case
def sockets_of_the_manager_take_the_place_of_the_defaults():
    path = os.path.join(temp_dir(), "nbd.sock")
    if shutil.which("systemd-socket-activate") is None:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path)
            s.listen()
            with Daemon([MEM], shell="export LISTEN_FDS=1 LISTEN_PID=$$", fd=s.fileno(), listen=False) as d:
                with Nbd.connect(path, "disk") as n:
                    assert n.read(0, 4096) == bytes(4096)
                assert "from=systemd" in d.text() and "10809" not in d.text(), d.text()
        return
    p = subprocess.Popen(["systemd-socket-activate", "--listen", path, NBDRSD, *EXPORT, "--control=none",
                          f"--io-engine={ENGINE}"], stderr=subprocess.PIPE, text=True)
    try:
        for line in p.stderr:
            if "Listening on" in line:
                break
        # The first client is what starts the daemon.
        with Nbd.connect(path, "disk") as n:
            assert n.read(0, 4096) == bytes(4096)
        p.terminate()
        log = p.stderr.read()
        assert p.wait(WAIT_S) == 0 and "from=systemd" in log and "10809" not in log, log
    finally:
        p.kill()
        p.wait()


suite.main()
