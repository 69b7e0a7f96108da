#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real servers for the tests, each in a folder of its own, on loopback, without root: RadosGW and nginx.

    with RadosGW() as s3: ...           the one that the whole run shares, or one of our own
    with Nginx() as web: ...

By hand, or from a shell script:

    servers.py radosgw|nginx DIR [--bluestore] [--stdin]

prints NAME=VALUE lines (what environment() says), then 'ready', and serves until SIGTERM or SIGINT;
with --stdin also until the end of its standard input, so that it never outlives a caller who died.

RadosGW is Ceph's S3 gateway. It wants a monitor and an OSD, which we start as well: the OSD keeps all in
memory, or with bluestore=True in a file that survives restart(). tests/run/suite starts one for a whole
run and passes it on by NBDRS_TEST_S3: each test then uses a prefix (folder) of its own.
"""

import atexit
import base64
import ctypes
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.parse
import uuid

START_S = 60  # a limit, met only when something is broken
STOP_S = 5
PR_SET_PDEATHSIG = 1

# Fixed, as nobody else can reach the server. The secret needs quoting in a URL on purpose, and the second
# user's access key holds colons.
ACCESS, SECRET = "nbdrstest", "se/cret+of%tests"
ACCESS2, SECRET2 = "tenant:user:key", "another:se/cret"
BUCKET = "nbdrs"
TOKEN = "nobody-may-see-this"  # nginx wants it in the header X-Token for /private/
DNS_NAME = "s3.localhost"  # bucket.s3.localhost: curl takes all of .localhost for loopback

libc = ctypes.CDLL(None, use_errno=True)


class ServerError(Exception):
    """A server did not start, or died; the text says which and why."""


def die_with_parent():
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def free_port():
    """A port of 127.0.0.1 that is free, below those that the kernel hands out: nobody connects from it."""
    while True:
        port = random.SystemRandom().randrange(12000, 32000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


def wait_for(what, check, process, log):
    """Calls check() until it is true; fails when the process ends or the time is up."""
    deadline = time.monotonic() + START_S
    pause = 0.002
    while not check():
        if process.poll() is not None:
            raise ServerError(f"{what}: ended with {process.returncode}:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise ServerError(f"{what}: not ready after {START_S} s:\n{tail(log)}")
        # Another process's port gives no event to wait for.
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
        return True
    except OSError:
        return False


def tail(path, n=40):
    try:
        with open(path, errors="replace") as f:
            return "".join(f.readlines()[-n:])
    except OSError:
        return "(no log)"


def make_ca(folder, name):
    """A key and a certificate that signs itself, for loopback: (certificate, key)."""
    cert, key = f"{folder}/{name}.crt", f"{folder}/{name}.key"
    names = f"IP:127.0.0.1,DNS:localhost,DNS:{DNS_NAME},DNS:*.{DNS_NAME}"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
                    "-nodes", "-days", "30", "-subj", "/CN=nbdrs test", "-addext",
                    f"subjectAltName={names}", "-keyout", key, "-out", cert],
                   check=True, capture_output=True, timeout=START_S)
    return cert, key


class Server:
    """Processes in a folder; what RadosGW and Nginx share."""

    def __init__(self, folder=None):
        self.own_folder = folder is None
        self.dir = os.path.abspath(folder) if folder else tempfile.mkdtemp(prefix="nbdrs-srv-")
        os.makedirs(self.dir, exist_ok=True)
        self.processes = {}  # name: Popen, in order of their start
        atexit.register(self.stop)

    def log(self, name):
        return f"{self.dir}/{name}.log"

    def spawn(self, name, argv, env=None):
        with open(self.log(name), "ab") as out:
            p = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env,
                                 start_new_session=True, preexec_fn=die_with_parent)
        self.processes[name] = p
        return p

    def end(self, name):
        p = self.processes.pop(name, None)
        if p is None:
            return
        p.send_signal(signal.SIGCONT)
        p.terminate()
        try:
            p.wait(STOP_S)
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()

    def stop(self):
        """Ends all, the last started first, and removes the folder if it was ours to make."""
        for name in reversed(list(self.processes)):
            self.end(name)
        if self.own_folder:
            shutil.rmtree(self.dir, ignore_errors=True)
        atexit.unregister(self.stop)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


# --- RadosGW ---------------------------------------------------------------------------------------

CEPH_CONF = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}/0]
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = {dir}/keyring
run dir = {dir}
admin socket =
log file =
log to stderr = true
err to stderr = true
ms bind ipv6 = false
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail warn = 1
mon data avail crit = 0
osd crush chooseleaf type = 0
osd pool default pg autoscale mode = off
osd pool default pg num = 8
osd pool default pgp num = 8
paxos propose interval = 0.05
debug rocksdb = 0
debug bluestore = 0
debug mon = 0
debug monc = 0
debug paxos = 0
debug osd = 0
debug rgw = 0
[mon]
mon data = {dir}/mon
mon initial members = a
[osd]
osd data = {dir}/osd
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd objectstore = {objectstore}
memstore device bytes = 17179869184
bluestore block size = 4294967296
bluestore fsck on mkfs = false
osd memory target = 1073741824
osd numa auto affinity = false
[client]
rgw frontends = beast endpoint=127.0.0.1:{port} ssl_endpoint=127.0.0.1:{tls_port} ssl_certificate={cert} \
ssl_private_key={key}
rgw dns name = {dns_name}
rgw thread pool size = 64
rgw enable lc threads = false
rgw enable gc threads = false
rgw enable quota threads = false
rgw enable usage log = false
rgw run sync thread = false
rgw dynamic resharding = false
rgw cache enabled = true
"""

CAPS = {
    "mon.": ['mon = "allow *"'],
    "client.admin": ['mon = "allow *"', 'osd = "allow *"', 'mgr = "allow *"', 'mds = "allow *"'],
    "osd.0": ['mon = "allow profile osd"', 'mgr = "allow profile osd"', 'osd = "allow *"'],
}

# Its own process, as librados has many threads. One connection for all: each `ceph` takes a second to start.
MON_SCRIPT = """
import json, sys, time, rados
conf, osd_uuid, limit = sys.argv[1], sys.argv[2], float(sys.argv[3])
c = rados.Rados(conffile=conf, name="client.admin")
c.connect(timeout=limit)
def ask(**words):
    rc, out, why = c.mon_command(json.dumps(dict(words, format="json")), b"", timeout=limit)
    if rc:
        sys.exit(f"{words['prefix']}: {why} ({rc})")
    return json.loads(out or b"{}")
if osd_uuid:
    ask(prefix="osd new", uuid=osd_uuid)
    print("new", flush=True)
deadline = time.monotonic() + limit
while not ask(prefix="osd stat").get("num_up_osds"):
    if time.monotonic() > deadline:
        sys.exit("the OSD does not come up")
    time.sleep(0.02)
print("up", flush=True)
"""


class RadosGW(Server):
    """An S3 server. .endpoint, .tls_endpoint and .ca; ACCESS, SECRET; the bucket .bucket is there.

    Uses that of the run (NBDRS_TEST_S3) where there is one, unless shared=False: whoever stops, restarts or
    fills it wants his own.
    """

    def __init__(self, folder=None, bluestore=False, shared=True):
        self.access, self.secret, self.region, self.bucket = ACCESS, SECRET, "us-east-1", BUCKET
        self.access2, self.secret2 = ACCESS2, SECRET2
        self.is_shared = shared and not bluestore and folder is None and "NBDRS_TEST_S3" in os.environ
        if self.is_shared:
            url = urllib.parse.urlsplit(os.environ["NBDRS_TEST_S3"])
            self.port = url.port
            self.tls_port = urllib.parse.urlsplit(os.environ["NBDRS_TEST_S3_TLS"]).port
            self.ca = os.environ["NBDRS_TEST_S3_CA"]
            self.name_endpoints()
            return
        super().__init__(folder)
        self.objectstore = "bluestore" if bluestore else "memstore"
        try:
            self.make()
        except BaseException:
            self.stop()
            raise

    def name_endpoints(self):
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.tls_endpoint = f"https://127.0.0.1:{self.tls_port}"

    def quoted_keys(self):
        return ":".join(urllib.parse.quote(s, safe="") for s in (self.access, self.secret))

    def url(self, path="", port=None):
        """http://KEY:SECRET@127.0.0.1:PORT/bucket/PATH, as a chain takes it; `port`: of a proxy."""
        return f"http://{self.quoted_keys()}@127.0.0.1:{port or self.port}/{self.bucket}/{path}"

    def environment(self):
        keys = self.quoted_keys()
        return {"NBDRS_TEST_S3": f"http://{keys}@127.0.0.1:{self.port}/{self.bucket}/",
                "NBDRS_TEST_S3_TLS": f"https://{keys}@127.0.0.1:{self.tls_port}/{self.bucket}/",
                "NBDRS_TEST_S3_CA": self.ca}

    def stop(self):
        if not self.is_shared:
            super().stop()

    def make(self):
        self.env = dict(os.environ, CEPH_CONF=f"{self.dir}/ceph.conf")
        self.env.pop("CEPH_ARGS", None)
        self.mon_port, self.port, self.tls_port = free_port(), free_port(), free_port()
        fsid, osd_uuid = str(uuid.uuid4()), str(uuid.uuid4())
        self.ca, key = make_ca(self.dir, "rgw")
        with open(f"{self.dir}/ceph.conf", "w") as f:
            f.write(CEPH_CONF.format(fsid=fsid, dir=self.dir, mon_port=self.mon_port, port=self.port,
                                     tls_port=self.tls_port, cert=self.ca, key=key, dns_name=DNS_NAME,
                                     objectstore=self.objectstore))
        # One throw-away key for everybody: type 1 (AES), its time, its length, the key.
        secret = base64.b64encode(struct.pack("<HIIH", 1, 0, 0, 16) + os.urandom(16)).decode()
        with open(f"{self.dir}/keyring", "w") as f:
            for name, caps in CAPS.items():
                f.write(f"[{name}]\n\tkey = {secret}\n" + "".join(f"\tcaps {c}\n" for c in caps))
        for name in ("mon", "osd"):
            os.mkdir(f"{self.dir}/{name}")
        osd_made = self.spawn("osd-mkfs", ["ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid,
                                           "--no-mon-config"], self.env)
        self.run("monmap", ["monmaptool", "--create", "--fsid", fsid, "--addv", "a",
                            f"[v2:127.0.0.1:{self.mon_port}]", f"{self.dir}/monmap"])
        self.run("mon-mkfs", ["ceph-mon", "--mkfs", "-i", "a", "--monmap", f"{self.dir}/monmap",
                              "--keyring", f"{self.dir}/keyring"])
        self.start_store(osd_uuid, osd_made)
        self.add_user("test", self.access, self.secret)
        second = self.spawn("user2", self.user_argv("test2", self.access2, self.secret2), self.env)
        self.start_gateway()
        self.wait_end("user2", second)
        self.name_endpoints()
        self.make_bucket()

    def make_bucket(self):
        from s3client import S3
        with S3(self.endpoint, self.access, self.secret) as s3:
            s3.make_bucket(self.bucket)

    def wait_end(self, name, process):
        process.wait(START_S)
        self.processes.pop(name)
        if process.returncode:
            raise ServerError(f"{name}: {process.returncode}:\n{tail(self.log(name))}")

    def run(self, name, argv):
        self.wait_end(name, self.spawn(name, argv, self.env))

    @staticmethod
    def user_argv(name, access, secret):
        return ["radosgw-admin", "user", "create", f"--uid={name}", f"--display-name={name}",
                f"--access-key={access}", f"--secret-key={secret}"]

    def add_user(self, name, access, secret):
        self.run(f"user-{name}", self.user_argv(name, access, secret))

    def start_store(self, osd_uuid="", osd_made=None):
        """Monitor and OSD. An OSD that is not known yet, or an OSD map without it, costs 5 s of waiting."""
        mon = self.spawn("mon", ["ceph-mon", "-f", "-i", "a"], self.env)
        wait_for("ceph-mon", lambda: listens(self.mon_port), mon, self.log("mon"))
        with open(self.log("ask"), "ab") as log:
            ask = subprocess.Popen(["/usr/bin/python3", "-c", MON_SCRIPT, f"{self.dir}/ceph.conf", osd_uuid,
                                    str(START_S)], stdout=subprocess.PIPE, stderr=log, env=self.env,
                                   stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
        self.processes["ask"] = ask
        if osd_made:
            self.wait_end("osd-mkfs", osd_made)
            if ask.stdout.readline() != b"new\n":
                raise ServerError(f"osd new:\n{tail(self.log('ask'))}{tail(self.log('mon'))}")
        self.spawn("osd", ["ceph-osd", "-f", "-i", "0"], self.env)
        if ask.stdout.readline() != b"up\n":
            raise ServerError(f"ceph-osd:\n{tail(self.log('ask'))}{tail(self.log('osd'))}")
        ask.stdout.close()
        self.wait_end("ask", ask)

    def start_gateway(self):
        gateway = self.spawn("rgw", ["radosgw", "-f", "-n", "client.admin"], self.env)
        wait_for("radosgw", lambda: listens(self.port) and listens(self.tls_port), gateway, self.log("rgw"))

    def stop_gateway(self):
        """The objects stay where they are; start_gateway() listens on the same port."""
        self.end("rgw")

    def restart(self):
        """All of it from cold: what a bluestore OSD had acknowledged is there again."""
        for name in ("rgw", "osd", "mon"):
            self.end(name)
        self.start_store()
        self.start_gateway()


# --- nginx -----------------------------------------------------------------------------------------

NGINX_CONF = """
daemon off;
master_process off;
worker_rlimit_nofile 8192;
pid {dir}/nginx.pid;
error_log {dir}/nginx.log notice;
events {{ worker_connections 2048; }}
http {{
	client_body_temp_path {dir}/tmp-body;
	proxy_temp_path {dir}/tmp-proxy;
	fastcgi_temp_path {dir}/tmp-fastcgi;
	uwsgi_temp_path {dir}/tmp-uwsgi;
	scgi_temp_path {dir}/tmp-scgi;
	log_format counted '$request_method $status $body_bytes_sent $uri "$http_range"';
	access_log {dir}/access.log counted;
	default_type application/octet-stream;
	sendfile on;
	tcp_nodelay on;
	keepalive_requests 1000000;
	server {{
		listen 127.0.0.1:{port};
		listen 127.0.0.1:{tls_port} ssl;
		ssl_certificate {cert};
		ssl_certificate_key {key};
		root {dir}/www;
		location /slow/ {{ alias {dir}/www/; limit_rate {rate}; }}
		location /noranges/ {{ alias {dir}/www/; max_ranges 0; }}
		location /noetag/ {{ alias {dir}/www/; etag off; }}
		location /private/ {{ if ($http_x_token != "{token}") {{ return 403; }} alias {dir}/www/; }}
		location /forbidden/ {{ return 403; }}
		location /unauthorized/ {{ return 401; }}
		location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
		location /broken/ {{ return 500; }}
		location /busy/ {{ add_header Retry-After 1 always; return 503; }}
	}}
}}
"""


class Nginx(Server):
    """A web server of the files in .www: /NAME, and /slow/NAME (`rate` bytes a second on each connection),
    /noranges/NAME, /noetag/NAME, /moved/NAME, /private/NAME (see TOKEN); /forbidden/, /unauthorized/, /broken/ and /busy/ never serve."""

    def __init__(self, folder=None, rate="256k"):
        super().__init__(folder)
        try:
            self.www = f"{self.dir}/www"
            os.makedirs(self.www, exist_ok=True)
            self.port, self.tls_port = free_port(), free_port()
            self.ca, key = make_ca(self.dir, "nginx")
            with open(f"{self.dir}/nginx.conf", "w") as f:
                f.write(NGINX_CONF.format(dir=self.dir, port=self.port, tls_port=self.tls_port, cert=self.ca,
                                          key=key, rate=rate, token=TOKEN))
            self.url = f"http://127.0.0.1:{self.port}"
            self.tls_url = f"https://127.0.0.1:{self.tls_port}"
            self.start()
        except BaseException:
            self.stop()
            raise

    def start(self):
        p = self.spawn("nginx", ["nginx", "-p", self.dir, "-e", f"{self.dir}/nginx.log", "-c",
                                 f"{self.dir}/nginx.conf"], {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
        wait_for("nginx", lambda: listens(self.port), p, self.log("nginx"))

    def stop_serving(self):
        """Until start()."""
        self.end("nginx")

    def environment(self):
        return {"NBDRS_TEST_HTTP": self.url, "NBDRS_TEST_HTTPS": self.tls_url,
                "NBDRS_TEST_HTTP_CA": self.ca, "NBDRS_TEST_WWW": self.www}

    def put(self, name, data):
        """Serves `data` as /NAME: as a new file, so that a reader sees the old one or the new one."""
        with open(f"{self.dir}/new", "wb") as f:
            f.write(data)
        os.replace(f"{self.dir}/new", f"{self.www}/{name}")

    def requests(self, uri=None):
        """What was answered so far: [(method, status, bytes, uri, range or '')]. A request's line is
        written after its answer was sent: whoever counts sends one more and waits for that."""
        found = []
        with open(f"{self.dir}/access.log", errors="replace") as f:
            for line in f:
                m = re.match(r'^(\S+) (\d+) (\d+) (\S+) "(.*)"$', line)
                if m and uri in (None, m[4]):
                    found.append((m[1], int(m[2]), int(m[3]), m[4], "" if m[5] == "-" else m[5]))
        return found


# --- By hand ---------------------------------------------------------------------------------------


def main():
    kinds = {"radosgw": RadosGW, "nginx": Nginx}
    args = [a for a in sys.argv[1:] if not a.startswith("--")]
    options = set(sys.argv[1:]) - set(args)
    if len(args) != 2 or args[0] not in kinds or options - {"--bluestore", "--stdin"}:
        sys.exit(__doc__)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        server = kinds[args[0]](args[1], **({"bluestore": True} if "--bluestore" in options else {}))
    except (ServerError, OSError, subprocess.SubprocessError) as e:
        sys.exit(f"servers.py: {args[0]}: {e}")
    with server:
        for name, value in server.environment().items():
            print(f"{name}={value}")
        print("ready", flush=True)
        if "--stdin" in options:
            sys.stdin.buffer.read()
        else:
            while True:
                signal.pause()


if __name__ == "__main__":
    main()
