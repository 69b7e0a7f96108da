# SPDX-License-Identifier: GPL-3.0-or-later
"""What a store takes and gives when nobody is in between: parallel plain PUTs and GETs of whole objects, by curl.

Everything that costs the client time is done before the clock starts: the body is one file, and its hash and the
signatures of all requests are made in advance. With signed=False the store does not check the body's hash.
"""

import hashlib
import os
import subprocess
import sys
import time

_INT = os.path.join(os.path.dirname(os.path.realpath(__file__)), os.pardir, "int")
sys.path.append(_INT)
import s3client  # noqa: E402 pylint: disable=wrong-import-position

OBJECT = 4 << 20  # as the objects of nbdrs, by default
PARALLEL = 16
TIMEOUT = 120


class PlainError(Exception):
    """curl failed; the text says how."""


def _lines(store, folder, method, keys, digest):
    """A curl configuration: one request for each key."""
    out = []
    with s3client.S3(store.endpoint, store.access, store.secret) as s3:
        for key in keys:
            path = f"/{store.bucket}/{s3client.quote(key)}"
            if out:
                out.append("next")
            out += [f'url = "{store.endpoint}{path}"', "fail", "silent", "show-error", f'output = "{os.devnull}"',
                    'header = "Expect:"']
            if method == "PUT":
                out.append(f'upload-file = "{folder}/body"')
            out += [f'header = "{n}: {v}"' for n, v in s3.headers(method, path, "", digest, {}).items() if n != "host"]
    return out


def transfer(method, place, folder, signed=True):
    """All objects of a volume of place.size; figures as fio() gives them, counted in MiB."""
    keys = [f"{place.prefix}block-{n}" for n in range(place.size // OBJECT)]
    digest = s3client.EMPTY
    if method == "PUT":
        body = os.urandom(OBJECT)
        with open(f"{folder}/body", "wb") as f:
            f.write(body)
        digest = hashlib.sha256(body).hexdigest() if signed else "UNSIGNED-PAYLOAD"
    with open(os.open(f"{folder}/curl", os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="ascii") as f:
        f.write("\n".join(_lines(place.store, folder, method, keys, digest)) + "\n")
    command = ["curl", "--parallel", "--parallel-immediate", "--parallel-max", str(PARALLEL), "--no-progress-meter",
               "--config", f"{folder}/curl"]
    begun = time.monotonic()
    done = subprocess.run(command, check=False, text=True, stdin=subprocess.DEVNULL, capture_output=True,
                          timeout=TIMEOUT)
    seconds = time.monotonic() - begun
    if done.returncode:
        raise PlainError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr.strip()[-1500:]}")
    return {"ops": place.size >> 20, "seconds": seconds, "latency_us": {"p50": 0, "p99": 0, "p999": 0}}
