# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests of volumes on object stores share: commands that must not show a secret, images, and nbd-rs's
format, written and read from its description only.

    FULL = with NBDRS_FULL=1: the sizes and numbers that take minutes
"""

import itertools
import json
import os
import random
import re
import subprocess

from nbdrs_test import *

NBDRSD = os.path.join(BUILD, "nbdrsd")
FULL = os.environ.get("NBDRS_FULL", "") not in ("", "0")
SANITIZER = os.environ.get("NBDRS_SANITIZER")
SEED = int(os.environ.get("NBDRS_SEED", "0")) or int.from_bytes(os.urandom(4), "big") | 1
SHARD = 4 * MIB


# --- Commands --------------------------------------------------------------------------------------


def must_hide(text, secrets):
    """No secret in there, neither as it is nor as a URL has it."""
    for s in secrets:
        for form in (s, urlquote(s)):
            assert form not in text, f"a secret is shown: {text.replace(form, '<<<SECRET>>>')}"


def urlquote(text):
    return "".join(c if c.isalnum() or c in "-._~" else f"%{ord(c):02X}" for c in text)


def clean_env(**more):
    """Our environment without what would lend keys to the daemon, and `more`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    env["HOME"] = "/nonexistent"
    env.update(more)
    return env


def run(*args, code=0, secrets=(), env=None, limit_s=WAIT_S):
    """Runs nbdrsd to its end; (standard output, standard error)."""
    try:
        p = subprocess.run([NBDRSD, *args, f"--io-engine={ENGINE}"], text=True, errors="replace", capture_output=True,
                           timeout=limit_s, stdin=subprocess.DEVNULL, check=False, env=env or clean_env())
    except subprocess.TimeoutExpired as e:
        said = (e.stderr or b"").decode(errors="replace")
        must_hide(said, secrets)
        raise AssertionError(f"nbdrsd {args[0]} has not ended after {limit_s} s:\n{said}") from None
    must_hide(p.stdout + p.stderr, secrets)
    assert p.returncode == code, f"{p.returncode}, not {code}:\n{p.stdout}{p.stderr}"
    return p.stdout, p.stderr


def serve(driver, conn, **kwargs):
    """A daemon with that one export, "disk"."""
    return Daemon([("disk", driver, conn)], env=clean_env(), **kwargs)


def status(daemon):
    """What `nbdrsctl --json status` says."""
    p = subprocess.run([os.path.join(BUILD, "nbdrsctl"), "--control", daemon.control, "--json", "status"],
                       text=True, capture_output=True, timeout=WAIT_S, check=True)
    return json.loads(p.stdout)


def values(found, key):
    """All values of a key, wherever it is in there."""
    if isinstance(found, dict):
        for k, v in found.items():
            if k == key:
                yield v
            yield from values(v, key)
    elif isinstance(found, list):
        for v in found:
            yield from values(v, key)


def shown(pid):
    """What `ps` shows of a process."""
    with open(f"/proc/{pid}/cmdline", "rb") as f:
        return f.read().decode(errors="replace")


# --- Images ----------------------------------------------------------------------------------------


def random_image(path, size, seed=SEED):
    """Random data with some holes in it, as disks have; returns it."""
    r = random.Random(seed)
    data = bytearray(b"".join(r.randbytes(min(16 * MIB, size - at)) for at in range(0, size, 16 * MIB)))
    for _ in range(size // (3 * MIB)):
        at = r.randrange(0, size - 64 * KIB)
        n = r.choice((4 * KIB, 64 * KIB, 700 * KIB))
        data[at:at + n] = bytes(min(n, size - at))
    with open(path, "wb") as f:
        f.write(data)
    return bytes(data)


def uri(daemon, name="disk"):
    return f"nbd+unix:///{name}?socket={daemon.unix}"


def nbdcopy(*words, limit_s=120):
    p = subprocess.run(["nbdcopy", *words], capture_output=True, text=True, timeout=limit_s, check=False)
    assert p.returncode == 0, f"nbdcopy {words}: {p.stderr}"


def copy_out(daemon, name="disk", *options):
    """The whole disk by nbdcopy."""
    path = os.path.join(daemon.dir, "out.img")
    nbdcopy(*options, uri(daemon, name), path)
    with open(path, "rb") as f:
        data = f.read()
    os.unlink(path)
    return data


def same(got, want, what="the disk"):
    """Compares without printing megabytes."""
    if got == want:
        return
    assert len(got) == len(want), f"{what}: {len(got)} bytes, not {len(want)}"
    at = next(i for i in range(0, len(want), 512) if got[i:i + 512] != want[i:i + 512])
    raise AssertionError(f"{what} differs at {at}: {got[at:at + 16].hex()}, not {want[at:at + 16].hex()}")


# --- Places where objects are ------------------------------------------------------------------------


class Folder:
    """Objects as files; .chain is what nbdrsd takes."""

    def __init__(self):
        self.path = temp_dir() + "/o/"
        os.mkdir(self.path)
        self.chain = "file:" + self.path

    def put(self, name, data):
        with open(self.path + name, "wb") as f:
            f.write(data)

    def get(self, name):
        """None when it is not there."""
        try:
            with open(self.path + name, "rb") as f:
                return f.read()
        except FileNotFoundError:
            return None

    def names(self):
        return {n for n in os.listdir(self.path) if not n.startswith(".")}


class Bucket:
    """Objects below a prefix in a bucket; `port` may be a proxy's."""

    count = itertools.count()

    def __init__(self, server, client, port=None):
        self.server, self.client = server, client
        self.prefix = f"t{os.getpid()}-{next(Bucket.count)}/"
        self.chain = "s3:" + server.url(self.prefix, port)

    def put(self, name, data):
        self.client.put(self.server.bucket, self.prefix + name, data)

    def get(self, name):
        status, _, body = self.client.ask("GET", f"/{self.server.bucket}/{self.prefix}{name}")
        assert status in (200, 404), status
        return body if status == 200 else None

    def names(self):
        return {k[len(self.prefix):] for k in self.client.list(self.server.bucket, self.prefix)}

    def clear(self):
        self.client.delete_all(self.server.bucket, self.prefix)


# --- nbd-rs's format -----------------------------------------------------------------------------------
# `size` holds the disk's bytes in decimal; block-N is the N-th 4 MiB. What is missing, or behind the end of a
# short one, is zero. distributed: block-N-R is replica R of shard N; with C ways to choose `replicas` of the nodes
# shard N goes to the (N mod C)-th in lexicographic order. `size` is on the first node.


def shards(data, skip=(), cut=()):
    """{N: bytes}: those in `skip` are missing, those in `cut` are short (their data must end in zeroes)."""
    found = {}
    for n in range((len(data) + SHARD - 1) // SHARD):
        piece = data[n * SHARD:(n + 1) * SHARD]
        if n in skip:
            assert not any(piece)
            continue
        found[n] = piece.rstrip(b"\0") if n in cut else piece
    return found


def nodes_of(n, nodes, replicas):
    ways = list(itertools.combinations(range(nodes), replicas))
    return ways[n % len(ways)]


def write_sharded(place, data, **how):
    place.put("size", b"%d" % len(data))
    for n, piece in shards(data, **how).items():
        place.put(f"block-{n}", piece)


def write_distributed(places, replicas, data, **how):
    places[0].put("size", b"%d" % len(data))
    for n, piece in shards(data, **how).items():
        for r, node in enumerate(nodes_of(n, len(places), replicas)):
            places[node].put(f"block-{n}-{r}", piece)


def read_with(get, size, shard=SHARD):
    data = bytearray(size)
    for n in range((size + shard - 1) // shard):
        piece = get(n)
        if piece is None:
            continue
        room = min(shard, size - n * shard)
        assert len(piece) <= shard and not any(piece[room:]), f"shard {n} has {len(piece)} bytes"
        piece = piece[:room]
        data[n * shard:n * shard + len(piece)] = piece
    return bytes(data)


def read_sharded(place, shard=SHARD):
    return read_with(lambda n: place.get(f"block-{n}"), int(place.get("size")), shard)


def read_distributed(places, replicas, shard=SHARD):
    """The disk; all replicas must be alike, and nothing may lie where it does not belong."""
    size = int(places[0].get("size"))
    allowed = [set() for _ in places]

    def get(n):
        found = []
        for r, node in enumerate(nodes_of(n, len(places), replicas)):
            allowed[node].add(f"block-{n}-{r}")
            found.append(places[node].get(f"block-{n}-{r}"))
        padded = {(f or b"").rstrip(b"\0") for f in found}
        assert len(padded) == 1, f"replicas of shard {n} differ: {[f and len(f) for f in found]}"
        return found[0]

    data = read_with(get, size, shard)
    for node, place in enumerate(places):
        blocks = {n for n in place.names() if re.match(r"block-", n)}
        assert blocks <= allowed[node], f"node {node} holds {sorted(blocks - allowed[node])[:5]}"
    return data
