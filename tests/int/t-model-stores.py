#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=180 s3 once
"""Random operations on volumes of objects, each answer compared with a model: see model_test.py.

Small shards, little memory and a store that fails, so that everything happens at once: shards that are put while they
are written, completed, zeroed, deleted and read.
"""

from model_test import SIZE, check
from s3client import S3
from servers import RadosGW
from stores_test import *

suite = Suite()
server = RadosGW()
client = S3(server.endpoint, server.access, server.secret)


def init(driver, conn):
    run("init", "--size", str(SIZE), driver, conn, secrets=[server.secret])


@suite.case
def objects_replaced_as_a_whole():
    place = Bucket(server, client)
    init("sharded[size=256Ki]", place.chain)
    check(f"retry[base=1ms,cap=20ms]:fault[rate=3%,error=EAGAIN,ops=read|put|del,seed={SEED}]:{place.chain}", 1500,
          lambda: read_sharded(place, 256 * KIB), 256 * KIB, driver="sharded[dirty=2Mi,age=20ms]")
    place.clear()


@suite.case
def objects_written_in_place():
    place = Folder()
    init("sharded[size=64Ki]", place.chain)
    check(f"retry[base=1ms,cap=20ms]:fault[rate=3%,error=EAGAIN,ops=read|write|zero|trim|del,seed={SEED}]:{place.chain}",
          6000, lambda: read_sharded(place, 64 * KIB), 64 * KIB, driver="sharded")


@suite.case
def objects_on_two_of_three_nodes():
    nodes = [Folder(), Bucket(server, client), Folder()]
    faults = f"retry[base=1ms,cap=20ms]:fault[rate=2%,error=EAGAIN,ops=read|write|put|zero|trim|del,seed={SEED}]:"
    chain = f"distributed[replicas=2]{{{','.join(faults + n.chain for n in nodes)}}}"
    init("sharded[size=256Ki]", chain)
    check(chain, 1500, lambda: read_distributed(nodes, 2, 256 * KIB), 256 * KIB, driver="sharded[dirty=2Mi,age=20ms]")
    nodes[1].clear()


@suite.case
def caches_and_read_ahead():
    place = Folder()
    init("sharded[size=256Ki]", place.chain)
    check(f"readahead[mem=4Mi]:sharded:cache[mem=1Mi,granule=16Ki]:delay[jitter=1ms]:{place.chain}", 6000,
          lambda: read_sharded(place, 256 * KIB), 256 * KIB, driver="cache[mem=2Mi,granule=8Ki]")


suite.main()
