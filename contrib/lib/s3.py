#!/usr/bin/env python3
"""Asks an S3-compatible store, with nothing but Python's standard library. For tests, and to make a bucket.

    s3.py make s3://BUCKET                    make the bucket, unless it is there
    s3.py ls s3://BUCKET[/PREFIX]             names and sizes of objects below PREFIX
    s3.py du s3://BUCKET[/PREFIX]             their number and the sum of their sizes
    s3.py get|head|rm s3://BUCKET/NAME        an object to standard output; its size; remove it
    s3.py put s3://BUCKET/NAME FILE           FILE "-" is standard input
    s3.py rm-all s3://BUCKET[/PREFIX]         remove every object below PREFIX
    s3.py speed s3://BUCKET/PREFIX            MB/s of puts and of gets, 256 objects of 1 MiB, eight at a time

Endpoint and credentials come from AWS_ENDPOINT_URL (or AWS_ENDPOINT), AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and
AWS_REGION. Addresses are path-style. The exit code is 1 if the store refuses, 4 if the object is not there.
"""

import datetime
import hashlib
import hmac
import http.client
import os
import sys
import threading
import time
import urllib.parse
import xml.etree.ElementTree as xml


class Refused(Exception):
    def __init__(self, status, text):
        super().__init__(f"the store answered {status}: {text[:300]}")
        self.status = status


class Store:
    """One connection, AWS signature version 4."""

    def __init__(self):
        endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT")
        if not endpoint:
            sys.exit("AWS_ENDPOINT_URL is not set")
        url = urllib.parse.urlsplit(endpoint)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        self.host = url.netloc
        self.connection = kind(url.netloc, timeout=60)
        self.region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        self.key = os.environ.get("AWS_ACCESS_KEY_ID", "")
        self.secret = os.environ.get("AWS_SECRET_ACCESS_KEY", "")

    def call(self, method, bucket, name="", query=None, body=b""):
        path = "/" + bucket + ("/" + urllib.parse.quote(name, safe="/-_.~") if name else "")
        pairs = sorted((query or {}).items())
        query_text = "&".join(f"{urllib.parse.quote(k, safe='-_.~')}={urllib.parse.quote(v, safe='-_.~')}" for k, v in pairs)
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        digest = hashlib.sha256(body).hexdigest()
        headers = {"host": self.host, "x-amz-content-sha256": digest, "x-amz-date": now}
        signed = ";".join(sorted(headers))
        canonical = "\n".join([method, path, query_text, *(f"{k}:{headers[k]}" for k in sorted(headers)), "", signed, digest])
        scope = f"{now[:8]}/{self.region}/s3/aws4_request"
        to_sign = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        key = ("AWS4" + self.secret).encode()
        for part in (now[:8], self.region, "s3", "aws4_request"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        signature = hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
        headers["authorization"] = f"AWS4-HMAC-SHA256 Credential={self.key}/{scope}, SignedHeaders={signed}, Signature={signature}"
        self.connection.request(method, path + ("?" + query_text if query_text else ""), body, headers)
        response = self.connection.getresponse()
        content = response.read()
        if response.status >= 300:
            raise Refused(response.status, content.decode(errors="replace"))
        return response, content

    def list(self, bucket, prefix):
        token = {}
        while True:
            _, content = self.call("GET", bucket, query={"list-type": "2", "prefix": prefix, **token})
            tree = xml.fromstring(content)
            space = tree.tag[: tree.tag.index("}") + 1] if "}" in tree.tag else ""
            for entry in tree.findall(space + "Contents"):
                yield entry.findtext(space + "Key"), int(entry.findtext(space + "Size"))
            more = tree.findtext(space + "NextContinuationToken")
            if not more:
                return
            token = {"continuation-token": more}


def make(store, bucket):
    try:
        store.call("PUT", bucket)
    except Refused as error:
        if error.status != 409 or "BucketAlreadyOwnedByYou" not in str(error):
            raise


def speed(bucket, prefix):
    """Objects that do not compress, removed again afterwards."""
    body, count = os.urandom(1 << 20), 256

    def all_of(method, data):
        left, lock, errors = list(range(count)), threading.Lock(), []

        def worker():
            try:
                store = Store()
                while True:
                    with lock:
                        if not left:
                            return
                        number = left.pop()
                    store.call(method, bucket, f"{prefix}/{number}", body=data)
            except (Refused, OSError, http.client.HTTPException) as error:
                errors.append(error)

        workers = [threading.Thread(target=worker) for _ in range(8)]
        start = time.monotonic()
        for thread in workers:
            thread.start()
        for thread in workers:
            thread.join()
        if errors:
            raise errors[0]
        return count * len(body) / 1e6 / (time.monotonic() - start)

    rates = [all_of("PUT", body), all_of("GET", b"")]
    all_of("DELETE", b"")
    print(*(round(rate) for rate in rates))


def main():
    if len(sys.argv) < 3 or not sys.argv[2].startswith("s3://"):
        sys.exit(__doc__)
    command, store = sys.argv[1], Store()
    bucket, _, name = sys.argv[2][len("s3://"):].partition("/")
    if command == "make":
        make(store, bucket)
    elif command == "ls":
        for key, size in store.list(bucket, name):
            print(f"{size}\t{key}")
    elif command == "du":
        sizes = [size for _, size in store.list(bucket, name)]
        print(f"{len(sizes)}\t{sum(sizes)}")
    elif command == "get":
        sys.stdout.buffer.write(store.call("GET", bucket, name)[1])
    elif command == "head":
        print(store.call("HEAD", bucket, name)[0].getheader("Content-Length"))
    elif command == "rm":
        store.call("DELETE", bucket, name)
    elif command == "put":
        with (sys.stdin.buffer if sys.argv[3] == "-" else open(sys.argv[3], "rb")) as source:
            store.call("PUT", bucket, name, body=source.read())
    elif command == "speed":
        speed(bucket, name)
    elif command == "rm-all":
        for key, _ in list(store.list(bucket, name)):
            store.call("DELETE", bucket, key)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main()
    except Refused as refused:
        print(refused, file=sys.stderr)
        sys.exit(4 if refused.status == 404 else 1)
    except (OSError, http.client.HTTPException) as broken:
        print(f"cannot talk to the store: {broken}", file=sys.stderr)
        sys.exit(1)
