# SPDX-License-Identifier: GPL-3.0-or-later
"""A small S3 client for the tests: signature version 4 and XML, by the standard library only.

Written from Amazon's description, not from the daemon's code: a test must not trust what it tests. Path style.

    with S3("http://127.0.0.1:7480", ACCESS, SECRET) as s3:
        s3.put("bucket", "key", b"data")
"""

import datetime
import hashlib
import hmac
import http.client
import urllib.parse
import xml.etree.ElementTree as ET

LIMIT_S = 30
EMPTY = hashlib.sha256(b"").hexdigest()


class S3Error(Exception):
    """The server said no: .status, .code (of the XML answer, '' without one)."""

    def __init__(self, what, status, body):
        self.status, self.code = status, ""
        try:
            self.code = ET.fromstring(body).findtext("Code") or ""
        except ET.ParseError:
            pass
        super().__init__(f"{what}: {status} {self.code}")


def quote(text):
    """As the signature wants it: all but letters, digits and -._~ and, in a path, the slash."""
    return urllib.parse.quote(text, safe="/-._~")


def sign(key, text):
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


class S3:
    def __init__(self, endpoint, access, secret, region="us-east-1"):
        url = urllib.parse.urlsplit(endpoint)
        assert url.scheme == "http" and not url.path.strip("/"), endpoint
        self.host = url.netloc
        self.access, self.secret, self.region = access, secret, region
        self.conn = http.client.HTTPConnection(url.hostname, url.port, timeout=LIMIT_S)

    def close(self):
        self.conn.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def headers(self, method, path, query, digest, extra):
        """What to send beside Content-Length, signed; path and query as they are sent."""
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        day = now[:8]
        h = {"host": self.host, "x-amz-date": now, "x-amz-content-sha256": digest}
        h.update({name.lower(): value for name, value in extra.items()})
        names = ";".join(sorted(h))
        canonical = "\n".join([method, path, query, *(f"{n}:{h[n]}" for n in sorted(h)), "", names, digest])
        scope = f"{day}/{self.region}/s3/aws4_request"
        text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        key = ("AWS4" + self.secret).encode()
        for part in scope.split("/"):
            key = sign(key, part)
        h["authorization"] = (f"AWS4-HMAC-SHA256 Credential={self.access}/{scope}, SignedHeaders={names}, "
                              f"Signature={sign(key, text).hex()}")
        return h

    def sign_again(self, raw):
        """A request's head, as bytes, signed anew with the right time: of a client whose clock is wrong."""
        first, *rest = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        method, target, version = first.split(" ")
        path, _, query = target.partition("?")
        query = "&".join(sorted(p if "=" in p else p + "=" for p in query.split("&") if p))
        kept = dict(line.split(":", 1) for line in rest)
        kept = {name.lower(): value.strip() for name, value in kept.items()}
        digest = kept.get("x-amz-content-sha256", "UNSIGNED-PAYLOAD")
        signed = {n: v for n, v in kept.items() if n.startswith("x-amz-") and n != "x-amz-date"}
        signed = self.headers(method, path, query, digest, signed)
        sent = {n: v for n, v in kept.items() if n not in signed} | signed
        return "\r\n".join([first, *(f"{n}: {v}" for n, v in sent.items()), "", ""]).encode("latin-1")

    def ask(self, method, path, query=(), body=b"", headers=None):
        """One request: (status, headers, body). Once more on a connection that had been closed meanwhile."""
        line = "&".join(f"{urllib.parse.quote(k, safe='-._~')}={urllib.parse.quote(v, safe='-._~')}"
                        for k, v in sorted(query))
        digest = hashlib.sha256(body).hexdigest() if body else EMPTY
        h = self.headers(method, quote(path), line, digest, headers or {})
        for last in (False, True):
            try:
                self.conn.request(method, quote(path) + ("?" + line if line else ""), body or None, h)
                r = self.conn.getresponse()
                return r.status, r.headers, r.read()
            except (http.client.HTTPException, ConnectionError):
                self.conn.close()
                if last:
                    raise

    def must(self, method, path, *args, **kwargs):
        status, headers, body = self.ask(method, path, *args, **kwargs)
        if not 200 <= status < 300:
            raise S3Error(f"{method} {path}", status, body)
        return headers, body

    def make_bucket(self, bucket):
        self.must("PUT", f"/{bucket}")

    def put(self, bucket, key, data):
        """Its ETag."""
        return self.must("PUT", f"/{bucket}/{key}", body=data)[0]["ETag"].strip('"')

    def get(self, bucket, key):
        return self.must("GET", f"/{bucket}/{key}")[1]

    def head(self, bucket, key):
        """(size, etag), None when there is none."""
        status, headers, body = self.ask("HEAD", f"/{bucket}/{key}")
        if status == 404:
            return None
        if status != 200:
            raise S3Error(f"HEAD {key}", status, body)
        return int(headers["Content-Length"]), headers["ETag"].strip('"')

    def delete(self, bucket, key):
        self.must("DELETE", f"/{bucket}/{key}")

    def list(self, bucket, prefix=""):
        """{key: size}"""
        found, after = {}, None
        while True:
            query = [("list-type", "2"), ("prefix", prefix)]
            if after:
                query.append(("continuation-token", after))
            root = ET.fromstring(self.must("GET", f"/{bucket}", query)[1])
            ns = root.tag[:root.tag.index("}") + 1]
            for c in root.iter(f"{ns}Contents"):
                found[c.findtext(f"{ns}Key")] = int(c.findtext(f"{ns}Size"))
            after = root.findtext(f"{ns}NextContinuationToken")
            if root.findtext(f"{ns}IsTruncated") != "true":
                return found

    def delete_all(self, bucket, prefix):
        for key in self.list(bucket, prefix):
            self.delete(bucket, key)
