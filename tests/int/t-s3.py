#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
# suite: timeout=180 s3 once
"""Volumes on S3: every form of command against RadosGW, keys from everywhere, and what goes wrong there."""

import json
import socket

from faultproxy import BytePipe, Fault, FaultProxy
from s3client import S3
from servers import RadosGW
from stores_test import *

suite = Suite()
server = RadosGW()
client = S3(server.endpoint, server.access, server.secret)
SECRETS = (server.secret, server.secret2, "wrongsecret123", "tokentokentoken")
HERE = f"127.0.0.1:{server.port}"
COLON_BUCKET = f"nbdrs-colon-{os.getpid()}"
S64 = "sharded[size=64Ki]"


def s3run(*args, **kwargs):
    return run(*args, secrets=SECRETS, **kwargs)


def init(driver, conn, size="10Mi", **kwargs):
    return s3run("init", "--size", size, driver, conn, **kwargs)


def refused(conn, *words, driver="sharded", cmd=("check", "--open"), **kwargs):
    """The command fails, and its one error has all these words."""
    _, err = s3run(*cmd, driver, conn, code=1, **kwargs)
    for w in words:
        assert w.lower() in err.lower(), f"no {w!r} in: {err}"
    assert len(err.splitlines()) <= 6, err
    return err


def ctl(daemon, *words):
    p = subprocess.run([os.path.join(BUILD, "nbdrsctl"), "--control", daemon.control, *words], text=True,
                       capture_output=True, timeout=WAIT_S, check=False)
    assert p.returncode == 0, p.stderr
    return p.stdout


def aws_env(access=None, secret=None, endpoint=None, **more):
    env = {"AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret, "AWS_ENDPOINT_URL": endpoint, **more}
    return clean_env(**{k: v for k, v in env.items() if v})


def write_and_read(daemon, seed=1):
    """Some writes, with what must be read then: {offset: data}."""
    r = random.Random(seed)
    with Nbd.connect(daemon.unix, "disk") as c:
        pieces = {off: r.randbytes(n) for off, n in ((0, 512), (4 * MIB - 700, 1400), (9 * MIB, 70000))}
        for off, data in pieces.items():
            c.write(off, data)
        assert c.do(FLUSH) == 0
        for off, data in pieces.items():
            same(c.read(off, len(data)), data, f"{off}+{len(data)}")
    return pieces


def goes_round(driver, conn, env=None, again=None):
    """init, check, serve, info, destroy of one volume of 10 MiB; `again` reads it from the store in between."""
    out, _ = init(driver, conn, env=env)
    assert "10MiB" in out, out
    out, _ = s3run("check", "--open", driver, conn, env=env)
    assert "retry:s3:" in out and "10MiB" in out, out
    with Daemon([("disk", driver, conn)], env=env or clean_env()) as d:
        must_hide(shown(d.process.pid), SECRETS)
        pieces = write_and_read(d)
        status = ctl(d, "status") + ctl(d, "--json", "status")
    must_hide(d.text() + status, SECRETS)
    if again:
        data = again()
        assert len(data) == 10 * MIB
        for off, piece in pieces.items():
            same(data[off:off + len(piece)], piece, f"the store at {off}")
    out, _ = s3run("info", driver, conn, env=env)
    assert "10485760" in out, out
    _, err = s3run("destroy", driver, conn, env=env, code=2)  # asks, and nobody answers
    assert "--force" in err
    s3run("destroy", "--force", driver, conn, env=env)
    s3run("check", "--open", driver, conn, env=env, code=1)


# --- Forms of commands -----------------------------------------------------------------------------


@suite.case
def sharded_in_every_command():
    b = Bucket(server, client)
    goes_round("sharded", b.chain, again=lambda: read_sharded(b))
    assert b.names() == set(), b.names()


@suite.case
def distributed_in_every_command():
    nodes = [Bucket(server, client) for _ in range(3)]
    backends = ",".join(n.chain for n in nodes)
    goes_round("distributed", f"replicas=2;backends={backends};", again=lambda: read_distributed(nodes, 2))
    for n in nodes:
        assert n.names() == set(), n.names()


@suite.case
def with_a_cache_in_every_command():
    # nbd-rs's way to write it: the cache is below the mapping.
    b = Bucket(server, client)
    goes_round("sharded", "cache:" + b.chain, again=lambda: read_sharded(b))
    nodes = [Bucket(server, client) for _ in range(2)]
    backends = ",".join("cache:" + n.chain for n in nodes)
    goes_round("distributed", f"replicas=2;backends={backends};", again=lambda: read_distributed(nodes, 2))
    assert not b.names() and not nodes[0].names() and not nodes[1].names()


@suite.case
def raw_is_one_object_to_read():
    data = random.Random(SEED).randbytes(5 * MIB + 17)
    name = f"disk-{os.getpid()}"
    client.put(server.bucket, name, data)
    client.put(server.bucket, f"below/{name}", data)
    whole = "s3:" + server.url(name)
    # The export's name in a bucket, below a prefix, and the object itself; with and without -r.
    forms = ((name, "s3:" + server.url().rstrip("/")), (name, "s3:" + server.url("below/")), ("disk", whole))
    for args in ((), ("-r",)):
        d = Daemon([(f"e{i}" if n == "disk" else n, "raw", c) for i, (n, c) in enumerate(forms) if i in (0, 2)],
                   args=args, env=clean_env())
        with d:
            for export in (name, "e2"):
                same(copy_out(d, export), data)
            with Nbd.connect(d.unix, name) as c:
                assert c.flags & READ_ONLY
                assert c.do(WRITE, 0, 512, 0, b"x" * 512) == EPERM
            must_hide(d.text() + shown(d.process.pid), SECRETS)
    out, _ = s3run("check", "--open", "-e", *[name, "raw", forms[1][1]])
    assert "readahead:raw:retry:s3:" in out, out
    out, _ = s3run("info", "raw", whole)
    assert str(len(data)) in out, out
    for words in (["init", "--size", "1Mi"], ["destroy", "--force"]):
        refused(whole, "s3", "no volume", driver="raw", cmd=words)
    assert client.get(server.bucket, name) == data
    refused("s3:" + server.url(name + "x"), HERE, "no object", driver="raw")
    client.delete(server.bucket, name)
    client.delete(server.bucket, f"below/{name}")


@suite.case
def the_conformance_suite_passes():
    b = Bucket(server, client)
    # Keys by the environment: an "@" in its chain means something else to it.
    env = aws_env(server.access, server.secret, CMOCKA_MESSAGE_OUTPUT="TAP",
                  NBDRS_STORE=f"retry:s3:http://{HERE}/{server.bucket}/{b.prefix}")
    # All of it takes its time at RadosGW, which does not care by which engine it is asked.
    some = ["*: r*"] if ENGINE == "epoll" else []
    p = subprocess.run([os.path.join(BUILD, "tests", "test_stores"), *some], text=True, capture_output=True, timeout=60,
                       env=env, check=False)
    assert p.returncode == 0, p.stdout + p.stderr
    assert re.search(r"^ok \d", p.stdout, re.M), p.stdout
    assert not b.names(), f"left over: {b.names()}"


@suite.case
def paths_and_virtual_hosts_and_tls():
    b = Bucket(server, client)
    rest = f"{server.bucket}/{b.prefix}"
    keys = server.quoted_keys()
    init("sharded", b.chain)
    host = f"{keys}@s3.localhost:{server.port}"
    tls = f"{keys}@127.0.0.1:{server.tls_port}"
    for conn in (f"s3[style=path]:http://{host}/{rest}", f"s3[style=virtual]:http://{host}/{rest}",
                 f"s3[ca_file={server.ca}]:https://{tls}/{rest}",
                 f"s3[ca_file={server.ca},style=virtual]:https://{keys}@s3.localhost:{server.tls_port}/{rest}",
                 f"s3[region=eu-central-7]:http://{host}/{rest}"):
        out, _ = s3run("check", "--open", "sharded", conn)
        assert "10MiB" in out, out
    refused(f"retry[deadline=5s]:s3:https://{tls}/{rest}", f"127.0.0.1:{server.tls_port}", "certificate")
    b.clear()


# --- Keys --------------------------------------------------------------------------------------------


def key_file(text):
    path = os.path.join(temp_dir(), "keys")
    with open(path, "w") as f:
        f.write(text)
    os.chmod(path, 0o600)
    return path


@suite.case
def keys_come_from_the_environment_a_file_or_a_profile():
    b = Bucket(server, client)
    rest = f"{server.bucket}/{b.prefix}"
    init("sharded", b.chain)
    a, s = server.access, server.secret
    two_lines, profiles = key_file(f"{a}\n{s}\n"), key_file(
        f"[default]\naws_access_key_id = nobody\naws_secret_access_key = wrongsecret123\n\n"
        f"[work]\naws_access_key_id = {a}\naws_secret_access_key = {s}\n")
    for conn, env in (
            (f"s3:/{rest}", aws_env(a, s, server.endpoint)),
            (f"s3:/{rest}", aws_env(a, s, None, AWS_ENDPOINT_URL_S3=server.endpoint)),
            (f"s3:http://{HERE}/{rest}", aws_env(a, s)),
            (f"s3:http://@{two_lines}@{HERE}/{rest}", None),
            (f"s3[key_file={two_lines}]:http://{HERE}/{rest}", None),
            (f"s3[profile=work]:http://{HERE}/{rest}", aws_env(AWS_SHARED_CREDENTIALS_FILE=profiles)),
            (f"s3:http://{HERE}/{rest}", aws_env(AWS_SHARED_CREDENTIALS_FILE=profiles, AWS_PROFILE="work")),
            (f"s3:/{rest}", aws_env(AWS_SHARED_CREDENTIALS_FILE=profiles, AWS_PROFILE="work",
                                    AWS_ENDPOINT_URL=server.endpoint)),
    ):
        out, _ = s3run("check", "--open", "sharded", conn, env=env)
        assert "10MiB" in out, (conn, out)
    # The one that is served as well: init, serve, destroy by the environment only.
    other = Bucket(server, client)
    goes_round("sharded", f"s3:/{server.bucket}/{other.prefix}", env=aws_env(a, s, server.endpoint),
               again=lambda: read_sharded(other))
    b.clear()


@suite.case
def keys_may_hold_colons():
    mine = S3(server.endpoint, server.access2, server.secret2)
    mine.make_bucket(COLON_BUCKET)
    a, s = server.access2, server.secret2
    rest = f"{COLON_BUCKET}/x/"
    conn = f"s3:http://{urlquote(a)}:{urlquote(s)}@{HERE}/{rest}"
    init("sharded", conn)
    two_lines = key_file(f"{a}\n{s}\n")
    for conn, env in ((conn, None), (f"s3:http://{HERE}/{rest}", aws_env(a, s)),
                      (f"s3[key_file={two_lines}]:http://{HERE}/{rest}", None)):
        out, _ = s3run("check", "--open", "sharded", conn, env=env)
        assert "10MiB" in out, out
    s3run("destroy", "--force", "sharded", conn)
    mine.must("DELETE", f"/{COLON_BUCKET}")


@suite.case
def sources_of_keys_that_make_no_sense():
    b = Bucket(server, client)
    rest = f"{server.bucket}/{b.prefix}"
    refused(f"s3:http://{HERE}/{rest}", "AWS_SECRET_ACCESS_KEY", env=aws_env("x"))
    refused(f"s3[key_file=/nonexistent/keys]:http://{HERE}/{rest}", "/nonexistent/keys", "can't be read")
    refused(f"s3[profile=nope]:http://{HERE}/{rest}", "nope")
    refused(f"s3:/{rest}", "AWS_ENDPOINT_URL", "http://", env=aws_env("x", "y", "nonsense"))
    refused(f"s3[key_file={key_file('onlyone')}]:http://{HERE}/{rest}", "secret")
    refused(f"s3:http://{HERE}/{rest}", HERE, "no keys")


# --- Errors ------------------------------------------------------------------------------------------


@suite.case
def wrong_keys_buckets_and_places():
    b = Bucket(server, client)
    a, s = urlquote(server.access), urlquote(server.secret)
    rest = f"{server.bucket}/{b.prefix}"
    for cmd in (("check", "--open"), ("init", "--size", "1Mi"), ("destroy", "--force"), ("info",)):
        refused(f"s3:http://{a}:wrongsecret123@{HERE}/{rest}", HERE, "SignatureDoesNotMatch", cmd=cmd)
    refused(f"s3:http://nobody:wrongsecret123@{HERE}/{rest}", HERE, "InvalidAccessKeyId")
    refused(f"s3:http://{a}:{s}@{HERE}/no-such-bucket/x/", HERE, "no such bucket")
    refused(f"s3:http://{a}:{s}@{HERE}/no-such-bucket/x/", HERE, "no such bucket", cmd=("init", "--size", "1Mi"))
    # Not a volume: the mend is named.
    refused(b.chain, HERE, "init")
    # The daemon says the same and ends.
    d = Daemon([("disk", "sharded", f"s3:http://{a}:wrongsecret123@{HERE}/{rest}")], ready=False, env=clean_env())
    assert d.wait() == 1
    assert HERE in d.text() and "SignatureDoesNotMatch" in d.text(), d.text()
    must_hide(d.text(), SECRETS)


@suite.case
def no_network():
    b = Bucket(server, client)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, but nobody listens
        conn = "retry[deadline=300ms]:s3:" + server.url(b.prefix, s.getsockname()[1])
        for cmd in (("check", "--open"), ("init", "--size", "1Mi"), ("destroy", "--force")):
            refused(conn, f"127.0.0.1:{s.getsockname()[1]}", "nobody listens", cmd=cmd)
    keys = server.quoted_keys()
    refused(f"retry[deadline=300ms]:s3:http://{keys}@no.such.host.invalid/b/p/", "no.such.host.invalid")
    # Something else lives there.
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()  # takes connections, says nothing
        refused("retry[deadline=300ms]:s3[timeout=200ms]:" + server.url(b.prefix, s.getsockname()[1]),
                f"127.0.0.1:{s.getsockname()[1]}", "in time")


@suite.case
def wrong_region():
    b = Bucket(server, client)
    body = (b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region 'us-east-1' is wrong; expecting "
            b"'eu-west-3'</Message><Region>eu-west-3</Region></Error>")
    moved = b"<Error><Code>PermanentRedirect</Code><Message>use the other endpoint</Message></Error>"
    with FaultProxy(server.port) as proxy:
        conn = "s3:" + server.url(b.prefix, proxy.port)
        proxy.rule(Fault("status", code=400, body=body))
        refused(conn, f"127.0.0.1:{proxy.port}", "region", "eu-west-3")
        proxy.clear()
        proxy.rule(Fault("status", code=301, body=moved, headers={"x-amz-bucket-region": "ap-south-2"}))
        refused(conn, f"127.0.0.1:{proxy.port}", "region", "ap-south-2")


@suite.case
def a_clock_that_is_wrong_is_corrected():
    b = Bucket(server, client)
    for skew in (7200, -86400):
        with FaultProxy(server.port) as proxy:
            proxy.clock(skew, client)
            conn = "s3:" + server.url(b.prefix, proxy.port)
            init("sharded", conn)
            with Daemon([("disk", "sharded", conn)], env=clean_env()) as d:
                write_and_read(d)
            skewed = sum(n for what, n in proxy.counts.items() if what.endswith("skewed"))
            assert 2 <= skewed <= 10, proxy.counts
            s3run("destroy", "--force", "sharded", conn)
        assert not b.names()


@suite.case
def a_clock_that_cannot_be_corrected():
    b = Bucket(server, client)
    with FaultProxy(server.port) as proxy:
        proxy.rule(Fault("status", code=403, body=b"<Error><Code>RequestTimeTooSkewed</Code></Error>"))
        refused("retry[deadline=1s]:s3:" + server.url(b.prefix, proxy.port), f"127.0.0.1:{proxy.port}", "clock")
        assert proxy.asked() < 20


@suite.case
def volumes_that_make_no_sense():
    b = Bucket(server, client)
    for text, word in ((b"12x", "size"), (b"", "size"), (b"-5", "size"), (b"9" * 30, "size"), (b"0", "size")):
        b.put("size", text)
        refused(b.chain, HERE, word)
    b.put("size", b" 1048576\n")
    out, _ = s3run("check", "--open", "sharded", b.chain)
    assert "1MiB" in out
    # A volume of another size, of another shard size.
    _, err = init("sharded", b.chain, "2Mi", code=1)
    assert "--force" in err, err
    assert b.get("size") == b" 1048576\n"
    init("sharded", b.chain, "1Mi")
    b.clear()
    init(S64, b.chain, "1Mi")
    refused(b.chain.replace("s3:", "s3:"), "64", driver="sharded[size=1Mi]")
    out, _ = s3run("check", "--open", S64, b.chain)
    assert "1MiB" in out
    b.clear()


# --- Requests ----------------------------------------------------------------------------------------


@suite.case
def requests_are_few():
    b = Bucket(server, client)
    with FaultProxy(server.port) as proxy:
        conn = "s3:" + server.url(b.prefix, proxy.port)
        init(S64, conn, "16Mi")
        with Daemon([("disk", S64, conn)], env=clean_env()) as d, Nbd.connect(d.unix, "disk") as c:
            shard = 64 * KIB
            data = random.Random(SEED).randbytes(200 * shard)
            proxy.clear()
            # Whole shards read nothing and cost one PUT each, also when they come in pieces of 4 KiB.
            for off in range(0, 8 * shard, 4 * KIB):
                c.write(off, data[off:off + 4 * KIB])
            for at in range(8 * shard, len(data), 24 * shard):
                c.write(at, data[at:at + 24 * shard])
            assert c.do(FLUSH) == 0
            puts, gets = proxy.asked("PUT"), proxy.asked("GET")
            assert 200 <= puts <= 240 and gets <= 8, (puts, gets)
            # Of shards that are new, and of those that it has put itself, a daemon asks nothing.
            assert proxy.asked("HEAD") == 0, proxy.requests
            assert sum(n.startswith("block-") for n in b.names()) == 200
            # Trim and zero of whole shards: one multi-delete for those that exist, nothing for the others.
            proxy.clear()
            assert c.do(TRIM, 0, 16 * MIB) == 0
            assert c.do(FLUSH) == 0
            assert proxy.asked() <= 3 and proxy.asked("POST", r"\?delete") >= 1, proxy.requests
            assert not any(n.startswith("block-") for n in b.names())
            proxy.clear()
            assert c.do(TRIM, 0, 16 * MIB) == 0
            assert c.do(WRITE_ZEROES, 0, 16 * MIB) == 0
            assert c.do(WRITE_ZEROES, 0, 16 * MIB, NO_HOLE) == 0
            assert c.read(5 * MIB, MIB) == bytes(MIB)
            assert c.do(FLUSH) == 0
            assert proxy.asked() == 0, proxy.requests
            # Zeroes that are written leave no object behind.
            c.write(3 * shard, data[:shard])
            assert c.do(FLUSH) == 0
            assert "block-3" in b.names()
            c.write(3 * shard, bytes(shard))
            assert c.do(FLUSH) == 0
            assert "block-3" not in b.names()
            assert proxy.asked("HEAD") == 0, proxy.requests
            # A small read of a shard fetches little of it.
            c.write(0, data[:shard])
            assert c.do(FLUSH) == 0
        with Daemon([("disk", S64, conn)], env=clean_env()) as d, Nbd.connect(d.unix, "disk") as c:
            proxy.clear()
            same(c.read(1024, 512), data[1024:1536])
            assert [r.headers.get("range") for r in proxy.requests] == ["bytes=1024-1535"], proxy.requests
            found = json.dumps(status(d))
        assert "GET 206" in found, "no counters of requests"
        s3run("destroy", "--force", S64, conn)


@suite.case
def destroy_leaves_what_is_not_its_own():
    b = Bucket(server, client)
    near = Bucket(server, client)
    init("sharded", b.chain)
    init("sharded", near.chain)
    b.put("block-1", b"x")
    b.put("block-1.bak", b"mine")
    b.put("block-99999999", b"")  # behind the end: not of this volume, but of this name
    b.put("notes/size", b"mine")
    out, _ = s3run("destroy", "--force", "sharded", b.chain)
    assert {"block-1.bak", "notes/size"} <= b.names() <= {"block-1.bak", "notes/size", "block-99999999"}, b.names()
    assert near.names()
    _, err = s3run("destroy", "--force", "sharded", b.chain, code=1)
    assert HERE in err, err
    b.clear()
    near.clear()


@suite.case
def destroy_that_was_cut_short_goes_on():
    b = Bucket(server, client)
    for verb, path, left in (("DELETE", "uuid", 21), ("POST", None, 21), ("DELETE", "/size", 1)):
        init(S64, b.chain)
        for n in range(20):
            b.put(f"block-{n}", b"x")
        with FaultProxy(server.port) as proxy:
            # First it is not let go who it is, then the blocks, then the last, the volume's own object.
            proxy.rule(Fault("status", code=403, body=b"<Error><Code>AccessDenied</Code></Error>"), method=verb, path=path)
            conn = "s3:" + server.url(b.prefix, proxy.port)
            refused(conn, f"127.0.0.1:{proxy.port}", driver=S64, cmd=("destroy", "--force"))
            found = {n for n in b.names() if n == "size" or n.startswith("block-")}
            assert "size" in found and len(found) == left, found
            proxy.clear()
            s3run("destroy", "--force", S64, conn)
            assert b.get("size") is None and not any(n.startswith("block-") for n in b.names())
            b.clear()


@suite.case
def small_faults_go_unnoticed():
    b = Bucket(server, client)
    with FaultProxy(server.port, SEED) as proxy:
        conn = "s3:" + server.url(b.prefix, proxy.port)
        init("sharded", conn)
        shared = [Fault("reset"), Fault("reset_response"), Fault("status", code=500), Fault("status", code=503),
                  Fault("status", code=429), Fault("lost"), Fault("garbage"), Fault("truncate")]
        with Daemon([("disk", "sharded", conn)], env=clean_env()) as d, Nbd.connect(d.unix, "disk") as c:
            r = random.Random(SEED)
            for fault in (shared + [Fault("reset_request", at=1000), Fault("corrupt_request", at=7)]):
                data = r.randbytes(20000)
                off = r.randrange(9 * MIB)
                proxy.clear()
                proxy.rule(fault, method="PUT", times=1)
                c.write(off, data)
                assert c.do(FLUSH) == 0, fault
                assert proxy.counts[f"PUT {fault}"] == 1, (fault, proxy.counts)
                same(read_sharded(b)[off:off + len(data)], data, repr(fault))
            # Behind an object's end nothing is asked for.
            for end in (4 * MIB, 8 * MIB, 9 * MIB):
                c.write(end - 512, r.randbytes(512))
            assert c.do(FLUSH) == 0
            disk = read_sharded(b)
            for i, fault in enumerate(shared + [Fault("length", by=3), Fault("length", by=-3)]):
                proxy.clear()
                proxy.rule(fault, method="GET", times=1)
                off = (i * 7919 * 512 + 100) % (9 * MIB)  # no stream, which would be fetched before we come
                same(c.read(off, 600), disk[off:off + 600], repr(fault))
                assert proxy.counts[f"GET {fault}"] == 1, (fault, proxy.counts)
    b.clear()


@suite.case
def tls_notices_what_was_changed_on_the_way():
    # Over plain HTTP a server checks what it is sent (it is signed), but nobody can check a range that is read.
    b = Bucket(server, client)
    data = random.Random(SEED).randbytes(8 * MIB)
    write_sharded(b, data)
    with BytePipe(server.tls_port) as pipe:
        conn = f"s3[ca_file={server.ca}]:https://{server.quoted_keys()}@127.0.0.1:{pipe.port}/{server.bucket}/{b.prefix}"
        with Daemon([("disk", "sharded", conn)], env=clean_env()) as d, Nbd.connect(d.unix, "disk") as c:
            for off, after in ((5 * MIB, 100000), (0, 0), (3 * MIB, 1000)):
                before = pipe.corrupted
                pipe.corrupt(after)
                same(c.read(off, 300000), data[off:off + 300000], f"{off}")
                assert pipe.corrupted == before + 1
    b.clear()


# --- Puts that are late ------------------------------------------------------------------------------


def late_puts_of_a_dead_daemon(cache):
    """It is killed while the server has all but the last byte of three puts, of which one is of a new object."""
    b = Bucket(server, client)
    size = 3 * 64 * KIB
    first, late, newer = (random.Random(SEED + i).randbytes(size) for i in range(3))
    with FaultProxy(server.port) as proxy:
        # Without conditions they do harm: so this test would notice.
        for probe, code, stays in (("on", 412, newer), ("off", 200, late)):
            conn = f"{cache}s3[probe={probe}]:" + server.url(b.prefix, proxy.port)
            init(S64, conn)
            dead = Daemon([("disk", S64, conn)], env=clean_env())
            with Nbd.connect(dead.unix, "disk") as c:
                proxy.clear()
                c.write(0, first[:size // 3 * 2])
                assert c.do(FLUSH) == 0
                proxy.wait(lambda p: sum(r.method == "PUT" and "/block-" in r.path for r in p.requests) == 2)
                proxy.rule(Fault("late"), method="PUT", path="/block-", times=3)
                c.write(0, late)
                proxy.wait(lambda p: p.kept == 3)
            dead.kill()
            proxy.clear()
            with Daemon([("disk", S64, conn)], env=clean_env()) as d, Nbd.connect(d.unix, "disk") as c:
                c.write(0, newer)
                assert c.do(FLUSH) == 0
            codes = proxy.let_late_in()
            assert codes == [code] * 3, codes
            same(b"".join(b.get(f"block-{n}") for n in range(3)), stays)
            b.clear()


@suite.case
def late_puts_of_a_dead_daemon_undo_nothing():
    late_puts_of_a_dead_daemon("")


@suite.case
def late_puts_of_a_dead_daemon_undo_nothing_of_its_journal():
    folder = os.path.join(temp_dir(), "journal")
    late_puts_of_a_dead_daemon(f"cache[disk={folder},size=8Mi,mode=writeback,lag=50ms]:")


@suite.case
def late_puts_that_were_given_up_undo_nothing():
    b = Bucket(server, client)
    shard = 64 * KIB
    first, late, newer = (random.Random(SEED + i).randbytes(shard) for i in range(3))
    with FaultProxy(server.port) as proxy:
        conn = "s3[timeout=1s]:" + server.url(b.prefix, proxy.port)
        init(S64, conn)
        with Daemon([("disk", S64, conn)], env=clean_env()) as d, Nbd.connect(d.unix, "disk") as c:
            c.write(0, first)
            assert c.do(FLUSH) == 0
            for n in (0, 1):  # an object that is there, a new one
                proxy.rule(Fault("late"), method="PUT", path=f"/block-{n}$", times=1)
                c.write(n * shard, late)
                assert c.do(FLUSH) == 0  # by another put, after the time-out
                c.write(n * shard, newer)
                assert c.do(FLUSH) == 0
            codes = proxy.let_late_in()
            assert codes == [412, 412], codes
        same(b.get("block-0") + b.get("block-1"), newer + newer)
    b.clear()


suite.main()
