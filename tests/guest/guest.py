# SPDX-License-Identifier: GPL-3.0-or-later
"""A Debian kernel under QEMU's TCG, with nbdrs inside: what run, bench and the demo share.

A Guest is one boot. Its root disk (image.sh) holds Debian's programs and is the same for weeks; a tar
archive made per boot, the second disk, holds nbdrs, the scripts and /run/guest/env. The guest talks
back through one virtio port, a stream of lines. Lines that start with "@@ " are the protocol, all
others are output of whatever runs:

	@@ booted RELEASE UPTIME	the archive is unpacked, main.sh starts
	@@ slow FACTOR			this guest is so much slower than usual: longer limits
	@@ begin FILE SECONDS		FILE must say end within SECONDS
	@@ ok TEXT / @@ not ok TEXT / @@ skip TEXT # REASON
	@@ end FILE STATUS SECONDS
	@@ note TEXT			to be printed, whatever comes of the test
	@@ dirty TEXT			the kernel is left in a state that only a new boot mends
	@@ result JSON			a measurement (bench)
	@@ done STATUS

Nothing is ever waited for without a deadline, and QEMU never outlives the Guest.
"""
import contextlib
import functools
import io
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOP = HERE.parent.parent
BUILD = (TOP / os.environ.get("BUILD", "build")).resolve()
BINARIES = ("nbdrsd", "nbdrs-attach", "nbdrsctl")
# A loaded machine, or one slower than we think: multiplies every deadline.
SLOW = float(os.environ.get("NBDRS_GUEST_SLOW", "1"))


class Lacking(Exception):
    """This machine cannot run the guest; the text says what it needs."""


class Broken(Exception):
    """The guest hung, died or never came up; the text says which."""


def policy():
    """NBDRS_KERNEL_TESTS: require (nothing may skip), auto (skip with a reason), no."""
    value = os.environ.get("NBDRS_KERNEL_TESTS")
    if not value:
        return "require" if os.environ.get("CI") == "true" else "auto"
    if value not in ("require", "auto", "no"):
        sys.exit(f"NBDRS_KERNEL_TESTS={value}: must be require, auto or no")
    return value


def _script(name, *args):
    done = subprocess.run([HERE / name, *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, check=False)
    text = done.stderr.strip()
    if done.returncode == 77:
        raise Lacking(text.splitlines()[-1].removeprefix("guest: ") if text else name)
    if done.returncode:
        raise Broken(f"{name} failed with status {done.returncode}: {text}")
    if text:
        print(text, flush=True)
    return Path(done.stdout.split("\n", 1)[0])


@functools.cache
def _kernel():
    import shutil
    if not shutil.which("qemu-system-x86_64"):
        raise Lacking("qemu-system-x86_64 (run: apt-get install qemu-system-x86)")
    return _script("kernel.sh")


# Kept: to find out what the image is made of takes seconds.
@functools.cache
def prepare(systemd=False):
    """Kernel folder and root image, from the cache or made now."""
    return _kernel(), _script("image.sh", str(_kernel()), *(["systemd"] if systemd else []))


def need_binaries(names=BINARIES):
    for name in names:
        if not os.access(BUILD / name, os.X_OK):
            raise Lacking(f"{BUILD / name} (run: make)")


def _libraries(binaries):
    """Shared libraries of binaries, {path in the guest: path here}."""
    out = subprocess.run(["ldd", *map(str, binaries)], stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL, text=True, check=False).stdout
    found = set(re.findall(r"(?:=> |^\t)(/\S+) \(0x", out, re.M))
    return {str(Path(p).parent.resolve() / Path(p).name): Path(p).resolve() for p in found}


def nbdrs_files():
    """nbdrs as `make install` would place it: programs, their libraries, udev rules."""
    binaries = [BUILD / n for n in BINARIES if (BUILD / n).exists()]
    files = {f"/usr/sbin/{b.name}": b for b in binaries}
    files.update(_libraries(binaries))
    for rule in sorted((TOP / "udev").glob("*.rules")):
        files[f"/usr/lib/udev/rules.d/{rule.name}"] = rule
    for unit in sorted([*(TOP / "udev").glob("*.service"), *(TOP / "udev").glob("*.socket")]):
        files[f"/usr/lib/systemd/system/{unit.name}"] = unit.read_bytes().replace(b"@SBINDIR@", b"/usr/sbin")
    return files


def _archive(path, files, env):
    """Write the second disk: files is {guest path: Path, or bytes}; env becomes shell variables."""
    quoted = "".join("export {}='{}'\n".format(k, str(v).replace("'", "'\\''"))
                     for k, v in env.items())
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, source in {**files, "/run/guest/env": quoted.encode()}.items():
            info = tarfile.TarInfo(name.lstrip("/"))
            data = source if isinstance(source, bytes) else source.read_bytes()
            info.size, info.mtime = len(data), int(time.time())
            info.mode = 0o755 if data[:2] == b"#!" or data[:4] == b"\x7fELF" else 0o644
            tar.addfile(info, io.BytesIO(data))


class Guest:
    """One boot, as a context manager.

    files is {guest path: Path here, or bytes}, env {name: value} for main.sh; console is the file
    that gets the kernel's messages; of cpus, online are running after boot; disks are files that become /dev/vdc and
    so on, written for good; systemd says that the root disk has it, and /run/guest/init in files starts it; root is where else to have the root disk from (a URL for QEMU's block layer); with
    net=True it has a network card, and finds this machine's loopback at 10.0.2.2.
    """

    def __init__(self, files, env, console, *, icount=None, cpus=2, online=None,
                 memory=1024, disks=(), root=None, net=False, systemd=False):
        kernel, image = prepare(systemd)
        self.console = Path(console)
        self.console.parent.mkdir(parents=True, exist_ok=True)
        self._stack = contextlib.ExitStack()
        self._dir = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdrs-guest.")))
        _archive(self._dir / "run.tar", files, env)
        vmlinux = kernel / "vmlinux"
        self._boot = vmlinux if vmlinux.exists() else kernel / "vmlinuz"
        # No ERMS and FSRM: TCG runs "rep movsb" a byte at a time, copies are 3 times slower.
        accel, cpu = "tcg,thread=multi", "max,-la57,-erms,-fsrm"
        clock = []
        if icount is not None:
            # Time = instructions << shift; one thread, so that the count is exact.
            accel, cpus, clock = "tcg,thread=single", 1, ["-icount", f"shift={icount},sleep=off"]
        self._argv = [
            # Ends with us, however we end.
            "setpriv", "--pdeathsig", "KILL",
            "qemu-system-x86_64", "-M", "pc", "-cpu", cpu, "-accel", accel, *clock,
            "-smp", str(cpus), "-m", str(memory), "-no-reboot", "-nodefaults", "-display", "none",
            "-kernel", str(self._boot), "-initrd", str(kernel / "initramfs"),
            # panic=-1: reboot at once, which -no-reboot turns into an end we see. no_timer_check: on a busy machine
            # the emulated timer comes too late for the kernel's check, which panics then. tsc=reliable: else the
            # clock is a device, and every look at it leaves the translated code. norandmaps: QEMU finds translated
            # code by its virtual address, so without it each exec translates the C library anew (4 times slower).
            "-append", "console=ttyS0 loglevel=6 mitigations=off panic=-1 oops=panic no_timer_check tsc=reliable "
            f"norandmaps net.ifnames=0 nokaslr random.trust_cpu=on maxcpus={online or cpus}",
            "-drive", f"if=none,id=root,file={root or image},format=raw,snapshot=on,cache=unsafe",
            "-device", "virtio-blk-pci,drive=root",
            "-drive", f"if=none,id=run,file={self._dir}/run.tar,format=raw,readonly=on",
            "-device", "virtio-blk-pci,drive=run",
            "-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console",
            "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=out,name=nbdrs.out",
        ]
        for n, disk in enumerate(disks):
            self._argv += ["-drive", f"if=none,id=disk{n},file={disk},format=raw,discard=unmap",
                           "-device", f"virtio-blk-pci,drive=disk{n}"]

        if net:
            # romfile: nobody boots from it.
            self._argv += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]

    def __enter__(self):
        with self._stack as stack:
            ours, theirs = socket.socketpair()
            self._sock = stack.enter_context(ours)
            self._errors = stack.enter_context(open(self._dir / "qemu.log", "wb"))
            with theirs:
                self._qemu = subprocess.Popen(
                    [*self._argv, "-chardev", f"socket,id=out,fd={theirs.fileno()}"],
                    stdin=subprocess.DEVNULL, stdout=self._errors, stderr=self._errors,
                    pass_fds=[theirs.fileno()], start_new_session=True,
                    # snapshot=on puts what the guest writes here; /tmp may be a small tmpfs.
                    env={**os.environ, "TMPDIR": os.environ.get("TMPDIR", "/var/tmp")})
            stack.callback(self._end)
            self._stack = stack.pop_all()
        self._left = b""
        self._select = selectors.DefaultSelector()
        self._select.register(self._sock, selectors.EVENT_READ)
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _end(self):
        if self._qemu.poll() is None:
            self._qemu.kill()
        self._qemu.wait()

    def line(self, deadline):
        """The next line, None when the guest has ended. Raises Broken after deadline (monotonic)."""
        while b"\n" not in self._left:
            wait = deadline - time.monotonic()
            if wait <= 0:
                raise Broken("hung: said nothing more before its deadline")
            if not self._select.select(wait):
                continue
            data = self._sock.recv(1 << 16)
            if not data:
                self._qemu.wait()
                return None
            self._left += data
        head, self._left = self._left.split(b"\n", 1)
        return head.decode(errors="replace").rstrip("\r")

    def cpu_seconds(self):
        """What the machine has taken of our processors so far."""
        fields = Path(f"/proc/{self._qemu.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def boot(self, seconds=90):
        """Wait until the guest's main.sh starts; its uptime then, in seconds."""
        deadline = time.monotonic() + seconds * SLOW
        while (text := self.line(deadline)) is not None:
            if text.startswith("@@ booted "):
                return float(text.split()[3])
            if text.startswith("@@ broken "):
                break
        raise Broken(f"did not come up: {text or self.post_mortem()}")

    def post_mortem(self, lines=40):
        """The end of the kernel's console, and what QEMU said."""
        with contextlib.suppress(OSError):
            said = (self._dir / "qemu.log").read_text(errors="replace").strip()
            kernel = self.console.read_text(errors="replace").splitlines()[-lines:]
            return "\n".join([*([f"qemu: {said}"] if said else []), *kernel])
        return "no console"


def end_on_signals():
    """Turn SIGTERM and SIGHUP into SystemExit, so that with-blocks end QEMU."""
    def leave(number, _):
        sys.exit(128 + number)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
