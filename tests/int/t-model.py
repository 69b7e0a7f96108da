#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=120
"""Random operations on local stores, each answer compared with a model: see model_test.py."""

import ctypes

from model_test import *
from nbdrs_test import *

suite = Suite()


def can_punch(folder):
    """Whether trim on a file in there must give zeroes: asked of the file system, not of the daemon."""
    libc = ctypes.CDLL(None, use_errno=True)
    path = os.path.join(folder, "punch")
    with open(path, "wb") as f:
        f.write(b"x" * 8192)
        f.flush()
        ok = libc.fallocate64(f.fileno(), 3, ctypes.c_int64(0), ctypes.c_int64(4096)) == 0
    os.unlink(path)
    return ok


def read_file(path):
    with open(path, "rb") as f:
        return f.read()


def check_file(options, ops, folder=None, wrap="", trim_unit=1):
    folder = folder or temp_dir()
    path = os.path.join(folder, "disk.img")
    with open(path, "wb") as f:
        f.truncate(SIZE)
    check(f"{wrap}file{options}:{path}", ops, lambda: read_file(path), trim_unit if can_punch(folder) else 0)


@suite.case
def file_on_disk_100000_operations():
    check_file("", 100000)


@suite.case
def file_in_tmpfs():
    check_file("", 15000, tmpfs_dir())


@suite.case
def file_without_lending():
    check_file("[lend=off]", 15000)


@suite.case
def file_direct():
    # Around the device's blocks, trim leaves what does not fill one.
    check_file("[direct=on]", 5000, trim_unit=4096)


@suite.case
def answers_in_another_order():
    check_file("", 15000, wrap="delay[read=200us,write=200us,zero=1ms,trim=1ms,flush=1ms,jitter=5ms]:")


@suite.case
def mem():
    check(f"mem[size={SIZE}]", 15000)


@suite.case
def a_disk_that_forgets_is_noticed():
    try:
        check(f"null[size={SIZE}]", 1000)
    except AssertionError as e:
        assert "bytes wrong" in str(e) or "is not zero" in str(e), e
    else:
        raise AssertionError("nothing was noticed")


suite.main()
