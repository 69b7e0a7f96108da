# SPDX-License-Identifier: GPL-3.0-or-later
"""What guests find outside: a RadosGW and a web server on this machine's loopback, which QEMU's user network shows
to a guest as 10.0.2.2, and a root disk that a web server gives through nbdrsd."""
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import guest

sys.path.append(str(guest.TOP / "tests" / "int"))
import servers  # noqa: E402 pylint: disable=wrong-import-position

HOST = "10.0.2.2"
READY_S = 30


def need_servers():
    """Lacking, unless both servers can be run."""
    import shutil
    for tool, package in (("radosgw", "radosgw ceph-mon ceph-osd ceph-common"), ("nginx", "nginx-light")):
        if not shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin"):
            raise guest.Lacking(f"{tool} (run: apt-get install {package})")


class S3:
    """A RadosGW (that of the run, where there is one); .env is what a guest must know of it."""

    def __init__(self):
        self._server = servers.RadosGW()
        url = f"http://{self._server.quoted_keys()}@{HOST}:{self._server.port}/{self._server.bucket}"
        self.env = {"GUEST_S3": f"{url}/guest-{os.getpid()}"}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.stop()


class HttpRoot:
    """The image as /root.img of a web server, served read-only by nbdrsd from there; .drive is it for QEMU."""

    def __init__(self, image):
        self._stack = contextlib.ExitStack()
        with self._stack as stack:
            self._dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdrs-root.")))
            self._web = stack.enter_context(servers.Nginx())
            os.symlink(image, f"{self._web.www}/root.img")
            self._log = open(self._dir / "nbdrsd.log", "wb")  # pylint: disable=consider-using-with
            stack.callback(self._log.close)
            path = self._dir / "nbd.sock"
            self._nbdrsd = subprocess.Popen(
                [guest.BUILD / "nbdrsd", "-r", "-e", "root", "raw", f"{self._web.url}/root.img", "--unix", path,
                 "--listen", "none", "--control", "none"],
                stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                preexec_fn=servers.die_with_parent)
            stack.callback(self._end)
            self._wait(path)
            self._stack = stack.pop_all()
        self.drive = f"nbd+unix:///root?socket={path}"

    def _wait(self, path):
        deadline = time.monotonic() + READY_S * guest.SLOW
        while True:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as s:
                s.settimeout(READY_S)
                s.connect(str(path))
                if s.recv(8):
                    return
            if self._nbdrsd.poll() is not None or time.monotonic() > deadline:
                said = (self._dir / "nbdrsd.log").read_text(errors="replace")
                raise guest.Broken(f"nbdrsd does not serve the root disk from {self._web.url}:\n{said}")
            time.sleep(0.01)  # another process's socket gives no event to wait for

    def requests(self):
        """(number, bytes) of what the web server sent so far."""
        sent = [r[2] for r in self._web.requests("/root.img")]
        return len(sent), sum(sent)

    def _end(self):
        self._nbdrsd.terminate()
        try:
            self._nbdrsd.wait(READY_S)
        except subprocess.TimeoutExpired:
            self._nbdrsd.kill()
            self._nbdrsd.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()
