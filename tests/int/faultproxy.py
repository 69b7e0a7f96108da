#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""An HTTP proxy between the daemon and a server that misbehaves as it is told, request by request.

    with FaultProxy(s3.port, seed=7) as proxy:
        proxy.mix(0.05)                                     5 % of requests fail, in all MIX ways
        proxy.rule(Fault("status", code=503, retry_after=1), method="PUT", path=r"/block-3$", times=2)
        ... talk to 127.0.0.1:proxy.port ...
        assert proxy.counts["PUT 503"] == 2

The first rule that fits a request decides; else chance does (seeded, drawn in the order of arrival); else it passes.
.requests is what was asked, .counts what came of it, .peak the most requests at a time.

Faults, with what they take (bytes count from the body's first):
    pass
    delay seconds               the request waits before it goes on
    throttle rate               the answer's body comes at `rate` bytes a second
    stall                       no answer until release() or close(), the connection stays
    reset                       RST once the request's head was read
    reset_request at            RST after `at` bytes of the request's body have gone to the server
    reset_response at           RST after `at` bytes of the answer's body
    truncate at                 the connection ends in order after `at` bytes of the answer's body
    corrupt at                  one bit of the answer's body at `at` is turned
    corrupt_request at          one bit of the request's body
    status code, retry_after    that answer (retry_after None: without the header); the server sees nothing;
                                body and headers may be given, too
    length by                   Content-Length of an answer with a body is wrong by `by`, then the connection ends
                                (that of a HEAD would be believed: nothing contradicts it)
    lost                        the server has done it, the answer is dropped and the connection reset
    garbage                     something that is not HTTP
    no_ranges                   the Range header is taken out on the way
    late                        the server gets all but the last byte of the request's body; that, when let_late_in() is
                                called, though the client may have gone. No answer comes back.

clock(skew, s3): the server's clock is `skew` seconds ahead: requests signed for another time get
RequestTimeTooSkewed with that clock's Date, the others are signed anew for the real server.
"""

import asyncio
import collections
import concurrent.futures
import datetime
import email.utils
import random
import re
import socket
import struct
import sys
import threading
import time

CHUNK = 256 << 10
START_S = 30
SKEW_MAX_S = 900  # what S3 servers tolerate


class Fault:
    def __init__(self, kind, at=0, seconds=0.0, rate=0, code=503, retry_after=None, by=0,
                 body=None, headers=None):
        assert kind in KINDS, kind
        self.kind, self.at, self.seconds, self.rate = kind, at, seconds, rate
        self.code, self.retry_after, self.by = code, retry_after, by
        self.body, self.headers = body, headers or {}

    def __repr__(self):
        return self.kind if self.kind != "status" else str(self.code)


KINDS = ("pass delay throttle stall reset reset_request reset_response truncate corrupt corrupt_request "
         "status length lost garbage no_ranges late").split()
PASS = Fault("pass")

# What a network or a busy server does: all of it must go unnoticed behind `retry`.
MIX = (Fault("reset"), Fault("reset_request", at=1), Fault("reset_request", at=70000),
       Fault("reset_response"), Fault("reset_response", at=40000), Fault("truncate"), Fault("truncate", at=40000),
       Fault("status", code=503), Fault("status", code=503, retry_after=1), Fault("status", code=500),
       Fault("status", code=429), Fault("status", code=429, retry_after=1), Fault("length", by=7),
       Fault("lost"), Fault("lost"), Fault("delay", seconds=0.05), Fault("throttle", rate=4 << 20),
       Fault("corrupt_request", at=0))


class Request:
    """.method, .path (with its query), .headers ({small name: value}), .length of the body, .fault."""

    def __init__(self, line, headers):
        self.method, self.path, self.version = line.split(" ", 2)
        self.headers = headers
        self.length = int(headers.get("content-length", "0"))
        self.fault = PASS

    def __repr__(self):
        return f"{self.method} {self.path}"


class Rule:
    def __init__(self, fault, method, path, times, after):
        self.fault, self.method, self.times, self.after = fault, method, times, after
        self.path = re.compile(path) if path else None

    def fits(self, request):
        if self.method not in (None, request.method) or self.path and not self.path.search(request.path):
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is not None:
            self.times -= 1
            return self.times >= 0
        return True


class Reset(Exception):
    """The client's connection is to be reset."""


class End(Exception):
    """The client's connection is to be closed in order."""


def parse_head(raw):
    lines = raw.decode("latin-1").split("\r\n")
    headers = {}
    for line in lines[1:]:
        if line:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
    return lines[0], headers


def turned(data, at, start):
    """`data`, which begins at byte `start`, with one bit of byte `at` turned if it is in there."""
    if not start <= at < start + len(data):
        return data
    changed = bytearray(data)
    changed[at - start] ^= 0x10
    return bytes(changed)


class FaultProxy:
    def __init__(self, port, seed=1, latency=0.0):
        self.server_port, self.latency = port, latency
        self.random = random.Random(seed)
        self.rate, self.faults = 0.0, MIX
        self.rules = []
        self.lock = threading.Lock()
        self.requests, self.counts = [], collections.Counter()
        self.in_flight = self.peak = self.stalled = self.kept = 0
        self.late_codes = []
        self.changed = threading.Condition(self.lock)
        self.skew, self.signer = 0, None
        ready = concurrent.futures.Future()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve(ready)), daemon=True)
        self.thread.start()
        self.port = ready.result(START_S)

    # What to do.

    def mix(self, rate, faults=MIX):
        with self.lock:
            self.rate, self.faults = rate, tuple(faults)

    def rule(self, fault, method=None, path=None, times=None, after=0):
        """`fault` for requests of that verb whose path (with query) matches, `times` times, after `after` passed."""
        with self.lock:
            self.rules.append(Rule(fault if isinstance(fault, Fault) else Fault(fault), method, path, times, after))

    def clear(self):
        """Everything passes from now on; what was counted is forgotten."""
        with self.lock:
            self.rules, self.rate = [], 0.0
            self.requests, self.counts = [], collections.Counter()
            self.peak = self.in_flight

    def clock(self, skew, signer):
        self.skew, self.signer = skew, signer

    def release(self):
        """Lets stalled requests go on to the server, and those of rules that stall."""
        with self.lock:
            self.rules = [r for r in self.rules if r.fault.kind != "stall"]
        self.loop.call_soon_threadsafe(self.unstall)

    def unstall(self):
        self.go.set()
        self.go = asyncio.Event()

    def let_late_in(self):
        """Lets requests go on to the server that are kept as `late`; the statuses that it answers."""
        with self.lock:
            self.late_codes = []
        self.loop.call_soon_threadsafe(self.let_go)
        self.wait(lambda p: p.kept == 0)
        return self.late_codes

    def let_go(self):
        self.late.set()
        self.late = asyncio.Event()

    def wait(self, what, limit_s=START_S):
        """Waits until what(self) is true; looked at whenever a request comes or goes."""
        with self.changed:
            assert self.changed.wait_for(lambda: what(self), limit_s), \
                f"{self.in_flight} in flight, {self.stalled} stalled, {dict(self.counts)}"

    def asked(self, method=None, path=None):
        """How many requests of that verb and path there were, failed or not."""
        with self.lock:
            return sum(1 for r in self.requests
                       if method in (None, r.method) and (not path or re.search(path, r.path)))

    def failed(self):
        with self.lock:
            return sum(n for what, n in self.counts.items() if not what.endswith(" pass"))

    def close(self):
        self.loop.call_soon_threadsafe(self.ending.set)
        self.thread.join(START_S)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # How it is done: in its own thread, with asyncio.

    async def serve(self, ready):
        self.loop = asyncio.get_running_loop()
        self.go, self.ending, self.late = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.tasks = set()
        try:
            server = await asyncio.start_server(self.client, "127.0.0.1", 0, limit=CHUNK, backlog=1024)
        except OSError as e:
            ready.set_exception(e)
            return
        ready.set_result(server.sockets[0].getsockname()[1])
        await self.ending.wait()
        server.close()
        for t in list(self.tasks):
            t.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def decide(self, request):
        with self.lock:
            self.requests.append(request)
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            request.fault = next((r.fault for r in self.rules if r.fits(request)), None)
            if request.fault is None:
                by_chance = self.random.random() < self.rate
                request.fault = self.random.choice(self.faults) if by_chance else PASS
            self.counts[f"{request.method} {request.fault}"] += 1
            self.changed.notify_all()
        return request.fault

    def done(self):
        with self.lock:
            self.in_flight -= 1
            self.changed.notify_all()

    async def client(self, reader, writer):
        task = asyncio.current_task()
        self.tasks.add(task)
        link = Link(self, reader, writer)
        try:
            while await link.one():
                pass
        except (Reset, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            link.reset()
        except End:
            pass
        except asyncio.CancelledError:
            pass
        finally:
            self.tasks.discard(task)
            link.close()


class Link:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, proxy, reader, writer):
        self.proxy, self.reader, self.writer = proxy, reader, writer
        self.up_reader = self.up_writer = None
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def reset(self):
        sock = self.writer.get_extra_info("socket")
        if sock is not None:
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:
                pass  # the client was faster
        self.writer.transport.abort()

    def close(self):
        self.writer.close()
        if self.up_writer:
            self.up_writer.transport.abort()

    async def one(self):
        """A request and its answer. False when the client has gone."""
        try:
            raw = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        request = Request(*parse_head(raw))
        fault = self.proxy.decide(request)
        try:
            await self.handle(request, raw, fault)
        finally:
            self.proxy.done()
        return True

    async def handle(self, request, raw, fault):
        if self.proxy.latency:
            await asyncio.sleep(self.proxy.latency)
        if fault.kind == "reset":
            raise Reset
        if fault.kind == "delay":
            await asyncio.sleep(fault.seconds)
        if fault.kind == "stall":
            await self.stall()
        if request.headers.get("expect", "").lower() == "100-continue":
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault.kind == "status":
            return await self.answer_status(request, fault)
        if fault.kind == "garbage":
            self.writer.write(b"SSH-2.0-Elsewhere_1.0\r\n")
            await self.writer.drain()
            raise End
        if self.proxy.skew:
            raw = await self.check_clock(request, raw)
            if raw is None:
                return None
        if fault.kind == "late":
            return await self.keep(request, raw)
        await self.send_request(request, raw, fault)
        return await self.pass_answer(request, fault)

    async def stall(self):
        p = self.proxy
        with p.changed:
            p.stalled += 1
            p.changed.notify_all()
        try:
            gone = asyncio.ensure_future(self.watch_client())
            wait = asyncio.ensure_future(p.go.wait())
            try:
                await asyncio.wait({gone, wait}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
                wait.cancel()
            if not p.ending.is_set() and gone.done() and not gone.cancelled():
                raise Reset
        finally:
            with p.changed:
                p.stalled -= 1
                p.changed.notify_all()

    async def keep(self, request, raw):
        p = self.proxy
        body = await self.reader.readexactly(request.length)
        await self.connect()
        self.up_writer.write(raw + body[:-1])
        await self.up_writer.drain()
        late = p.late
        with p.changed:
            p.kept += 1
            p.changed.notify_all()
        code = 0
        try:
            await late.wait()
            self.up_writer.write(body[-1:])
            code = int((await self.up_reader.readuntil(b"\r\n\r\n")).split(b" ")[1])
        finally:
            with p.changed:
                p.kept -= 1
                p.late_codes.append(code)
                p.changed.notify_all()
        raise End

    async def watch_client(self):
        """Returns when the client hangs up; what it sends meanwhile stays in the stream."""
        while not self.reader.at_eof() and self.reader.exception() is None:
            await asyncio.sleep(0.05)

    async def answer(self, request, head, body):
        await self.skip_body(request)
        head += f"\r\nContent-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + (b"" if request.method == "HEAD" else body))
        await self.writer.drain()

    async def skip_body(self, request):
        left = request.length
        while left:
            data = await self.reader.read(min(left, CHUNK))
            if not data:
                raise Reset
            left -= len(data)

    async def answer_status(self, request, fault):
        name = {503: "SlowDown", 429: "TooManyRequests", 500: "InternalError"}.get(fault.code, "AsTold")
        head = f"HTTP/1.1 {fault.code} {name}\r\nContent-Type: application/xml"
        if fault.retry_after is not None:
            head += f"\r\nRetry-After: {fault.retry_after}"
        head += "".join(f"\r\n{k}: {v}" for k, v in fault.headers.items())
        body = fault.body
        if body is None:
            body = f"<Error><Code>{name}</Code><Message>as told</Message></Error>".encode()
        await self.answer(request, head, body)

    async def check_clock(self, request, raw):
        """The head for the real server, None when the request was refused."""
        p = self.proxy
        stamp = request.headers.get("x-amz-date", "")
        now = time.time() + p.skew
        try:
            told = datetime.datetime.strptime(stamp + "+0000", "%Y%m%dT%H%M%SZ%z").timestamp()
        except ValueError:
            told = 0
        if abs(told - now) > SKEW_MAX_S:
            with p.lock:
                p.counts[f"{request.method} skewed"] += 1
            head = ("HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nDate: "
                    + email.utils.formatdate(now, usegmt=True))
            await self.answer(request, head, b"<Error><Code>RequestTimeTooSkewed</Code></Error>")
            return None
        return p.signer.sign_again(raw)

    async def connect(self):
        if self.up_writer is None:
            self.up_reader, self.up_writer = await asyncio.open_connection(
                "127.0.0.1", self.proxy.server_port, limit=CHUNK)
            self.up_writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def send_request(self, request, raw, fault):
        await self.connect()
        if fault.kind == "no_ranges":
            raw = re.sub(rb"\r\nrange:[^\r]*", b"", raw, flags=re.I)
        raw = re.sub(rb"\r\nexpect: *100-continue", b"", raw, flags=re.I)
        self.up_writer.write(raw)
        done = 0
        while done < request.length:
            want = min(request.length - done, CHUNK)
            if fault.kind == "reset_request":
                want = min(want, fault.at - done)
                if want <= 0:
                    raise Reset
            data = await self.reader.read(want)
            if not data:
                raise Reset
            if fault.kind == "corrupt_request":
                data = turned(data, fault.at, done)
            self.up_writer.write(data)
            await self.up_writer.drain()
            done += len(data)
        await self.up_writer.drain()

    async def pass_answer(self, request, fault):
        raw = await self.up_reader.readuntil(b"\r\n\r\n")
        while raw.startswith(b"HTTP/1.1 100"):
            raw = await self.up_reader.readuntil(b"\r\n\r\n")
        line, headers = parse_head(raw)
        code = int(line.split(" ")[1])
        has_body = request.method != "HEAD" and code not in (204, 304)
        if fault.kind == "length" and has_body and "content-length" in headers:
            wrong = max(0, int(headers["content-length"]) + fault.by)
            raw = re.sub(rb"\r\ncontent-length:[^\r]*", b"\r\nContent-Length: %d" % wrong, raw, flags=re.I)
        if fault.kind != "lost":
            self.writer.write(raw)
        if not has_body:
            chunks = None
        elif headers.get("transfer-encoding", "").lower() == "chunked":
            chunks = self.chunked()
        elif "content-length" in headers:
            chunks = self.counted(int(headers["content-length"]))
        else:
            chunks = self.to_the_end()
        done = 0
        if chunks is not None:
            async for data in chunks:
                await self.pass_body(data, done, fault)
                done += len(data)
        if fault.kind in ("lost", "reset_response"):
            raise Reset
        await self.writer.drain()
        if fault.kind in ("length", "truncate") or headers.get("connection", "").lower() == "close":
            raise End

    async def pass_body(self, data, start, fault):
        if fault.kind == "lost":
            return
        if fault.kind in ("reset_response", "truncate") and start + len(data) >= fault.at:
            self.writer.write(data[:max(0, fault.at - start)])
            await self.writer.drain()
            raise Reset if fault.kind == "reset_response" else End
        if fault.kind == "corrupt":
            data = turned(data, fault.at, start)
        if fault.kind != "throttle":
            self.writer.write(data)
            await self.writer.drain()
            return
        step = max(1, fault.rate // 50)
        for i in range(0, len(data), step):
            part = data[i:i + step]
            self.writer.write(part)
            await self.writer.drain()
            await asyncio.sleep(len(part) / fault.rate)

    # The answer's body as it travels, in pieces.

    async def counted(self, left):
        while left:
            data = await self.up_reader.read(min(left, CHUNK))
            if not data:
                raise Reset
            left -= len(data)
            yield data

    async def to_the_end(self):
        while data := await self.up_reader.read(CHUNK):
            yield data
        raise End

    async def chunked(self):
        while True:
            line = await self.up_reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line + await self.up_reader.readexactly(size + 2)
            if size == 0:
                return


class BytePipe:
    """A proxy that does not look into what it passes on (TLS, say); corrupt() turns one bit of the server's next bytes,
    `after` further on."""

    def __init__(self, port):
        self.server_port, self.left, self.corrupted = port, None, 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        self.sockets = [self.listener]
        threading.Thread(target=self.accept, daemon=True).start()

    def corrupt(self, after):
        self.left = after

    def accept(self):
        while True:
            try:
                client = self.listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self.server_port))
            except OSError:
                return
            self.sockets += [client, server]
            for pair in ((client, server, False), (server, client, True)):
                threading.Thread(target=self.pump, args=pair, daemon=True).start()

    def pump(self, source, sink, is_answer):
        try:
            while data := source.recv(64 << 10):
                if is_answer and self.left is not None:
                    if self.left < len(data):
                        data = turned(data, self.left, 0)
                        self.left = None
                        self.corrupted += 1
                    else:
                        self.left -= len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one side has hung up: so does the other, by the pump that reads from it
            for s in (source, sink):
                try:
                    s.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def close(self):
        for s in self.sockets:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            s.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def main():
    """By hand: faultproxy.py PORT [RATE [LATENCY_S [SEED]]], for a server on PORT of 127.0.0.1; prints its own."""
    words = [float(w) for w in sys.argv[1:]]
    if not 1 <= len(words) <= 4:
        sys.exit(main.__doc__)
    port, rate, latency, seed = (words + [0, 0, 1][len(words) - 1:])
    with FaultProxy(int(port), int(seed), latency) as proxy:
        proxy.mix(rate)
        print(proxy.port, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(dict(proxy.counts))


if __name__ == "__main__":
    main()
