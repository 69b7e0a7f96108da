# SPDX-License-Identifier: GPL-3.0-or-later
"""Boots of a machine with systemd whose fstab has file systems on nbdrs: mounted without a hand, unmounted cleanly,
and down in bounded time when the store is away; the daemon restarted and killed under them. A part of run, which shows and counts its results."""
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import guest

NAME = "systemd"
DISK_MIB = 64
REBOOT_S = 60		# from `systemctl reboot` to the end, in which nothing may wait for a dead connection (300 s)
AWAY_S = 120		# the same when the store is away and every request has to be given up

EXPORTS = """\
# the second one has a store that can be taken away
disk0 raw file:/dev/vdc
disk1 raw retry[deadline=1s]:fault[file=/run/store-away,error=ECONNREFUSED]:file:/dev/vdd
"""
ATTACH = """\
disk0 /dev/nbd2 --connections 2 --timeout 10
disk1           # the kernel picks
"""
FSTAB = """\
/dev/nbdrs/disk0 /data ext4 _netdev,x-systemd.requires=nbdrs-attach@disk0.service 0 2
/dev/disk/by-id/nbdrs-disk1-part1 /part ext4 _netdev,nofail 0 2
"""


def _do(*argv, stdin=None):
    done = subprocess.run(argv, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                          env={**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"})
    if done.returncode:
        raise guest.Broken(f"{' '.join(map(str, argv))}: status {done.returncode}\n{done.stdout}")
    return done.stdout


class Disk:
    """A volume: the file behind /dev/vdX, with a file system in all of it, or in a partition."""

    def __init__(self, path, is_partitioned):
        self.path, self.offset = path, 1 << 20 if is_partitioned else 0
        with open(path, "wb") as f:
            f.truncate(DISK_MIB << 20)
        if is_partitioned:
            _do("sfdisk", "-q", path, stdin="label: gpt\nstart=1MiB, size=60MiB\n")
        _do("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-E", f"offset={self.offset}", path,
            "60M" if is_partitioned else f"{DISK_MIB}M")

    def _file_system(self):
        return f"{self.path}?offset={self.offset}"

    def is_clean(self):
        """Unmounted, no journal to be played, and nothing wrong with it; "" or what is."""
        head = _do("dumpe2fs", "-h", self._file_system())
        if not re.search(r"^Filesystem state: +clean$", head, re.M):
            return "not clean"
        if re.search(r"^Filesystem features:.*\bneeds_recovery\b", head, re.M):
            return "was not unmounted: its journal needs recovery"
        try:
            _do("e2fsck", "-fn", self._file_system())
        except guest.Broken as e:
            return str(e)
        return ""


class Boots:
    """What run.Run is for its tests; `say` prints."""

    def __init__(self, say):
        self.say = say
        self.passed = self.failed = self.skipped = 0
        self.is_done = False
        self.log = []
        self.count = self.bad = 0
        self.where = guest.BUILD / "guest"
        self.where.mkdir(parents=True, exist_ok=True)
        self.is_full = os.environ.get("NBDRS_FULL") == "1"
        # Reboots as they should be, then one with the store away, then a look at what is left.
        self.reboots = 10 if self.is_full else 1
        self.boots = self.reboots + (2 if self.is_full else 1)

    def run(self):
        begun = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="nbdrs-boots.") as d:
                disks = [Disk(Path(d) / "disk0", False), Disk(Path(d) / "disk1", True)]
                for n in range(1, self.boots + 1):
                    self.boot(n, disks)
        except guest.Broken as e:
            self.result(False, f"the systemd guest: {e}")
        (self.where / f"{NAME}.log").write_text("\n".join([*self.log, ""]))
        text = f"{'FAIL' if self.bad else 'ok  '}  {NAME} ({self.count} results, {time.monotonic() - begun:.0f} s)"
        self.say("\n".join([text, *([f"  | {t}" for t in self.log[-150:]] if self.bad else [])]))
        self.is_done = True

    def result(self, is_ok, text):
        self.log.append(f"{'ok' if is_ok else 'not ok'} {text}")
        self.count += 1
        self.passed += is_ok
        self.failed += not is_ok
        self.bad += not is_ok

    def boot(self, n, disks):
        is_away = n == self.reboots + 1
        files = {**guest.nbdrs_files(), "/run/guest/init": guest.HERE / "systemd-init.sh",
                 "/run/guest/main.sh": guest.HERE / "systemd-boot.sh", "/run/guest/lib.sh": guest.HERE / "lib.sh",
                 "/etc/nbdrs/exports.conf": EXPORTS.encode(), "/etc/nbdrs/attach.conf": ATTACH.encode(),
                 "/etc/fstab": FSTAB.encode()}
        console = self.where / f"console-{NAME}-{n}"
        env = {"BOOT": n, "AWAY": "1" if is_away else "", "TRIGGERS": 10 if self.is_full else 3}
        with guest.Guest(files, env, console, disks=[d.path for d in disks],
                         systemd=True) as g:
            begun = time.monotonic()
            g.boot(180)
            self.say(f"systemd guest, boot {n}, is up after {time.monotonic() - begun:.1f} s ({g.cpu_seconds():.1f} s CPU)")
            slow = max(1.0, (time.monotonic() - begun) / 15)
            self.follow(g, time.monotonic() + 180 * guest.SLOW * slow)
            begun = time.monotonic()
            self.follow(g, begun + 600 * guest.SLOW)
            took = time.monotonic() - begun
        limit = (AWAY_S if is_away else REBOOT_S) * guest.SLOW * slow
        what = f"boot {n}: a reboot{' with the store away' if is_away else ''}"
        self.result(took < limit, f"{what} takes {took:.1f} s, less than {limit:.0f} s")
        self.say(f"      {what}: {took:.1f} s")
        for d in disks[:1] if is_away else disks:
            wrong = d.is_clean()
            self.result(not wrong, f"{what}: {d.path.name} is clean{': ' if wrong else ''}{wrong}")

    def follow(self, g, deadline):
        """Takes what the guest says, up to "@@ done" or its end."""
        while (line := g.line(deadline)) is not None:
            if line.startswith("@@ done "):
                if line != "@@ done 0":
                    raise guest.Broken("gave up")
                return
            if line.startswith(("@@ ok ", "@@ not ok ")):
                self.result(line.startswith("@@ ok "), line[3:].removeprefix("not ").removeprefix("ok "))
            else:
                self.log.append(line)
