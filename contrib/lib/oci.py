#!/usr/bin/env python3
"""Layers, OCI layouts and pushes, with nothing but Python's standard library and gzip.

    oci.py layer DIRECTORY OUT            DIRECTORY, an overlay's upper directory or a whole root, as OUT/layer.tar.gz
                                          and OUT/layer.json
    oci.py unpack LAYER DIRECTORY         a layer's directory (see above) into DIRECTORY, as an overlay's lower directory
    oci.py layout OUT COMMAND LAYER...    an OCI layout with one image of these layers; COMMAND is JSON
    oci.py push LAYOUT REGISTRY NAME      to a registry that speaks plain http, as NAME:1
    oci.py size LAYOUT                    layers, bytes of the tars, and of the blobs

A tar holds its entries in the order of their names, with every ancestor directory of a changed file, as the tools that
make layers from an overlay do. The blob is what `gzip -6 -n` makes of it.
"""

import hashlib
import http.client
import json
import os
import platform
import stat
import subprocess
import sys
import tarfile

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64"}
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class Hashed:
    """A file object that hashes and counts what passes."""

    def __init__(self, to):
        self.to, self.hash, self.size = to, hashlib.sha256(), 0

    def write(self, data):
        self.hash.update(data)
        self.size += len(data)
        return self.to.write(data)

    def digest(self):
        return "sha256:" + self.hash.hexdigest()


def entries(root):
    """Paths below root, a directory before what is in it, in the order of names."""
    def walk(below):
        with os.scandir(os.path.join(root, below)) as found:
            for entry in sorted(found, key=lambda e: e.name):
                path = os.path.join(below, entry.name)
                yield path
                if entry.is_dir(follow_symlinks=False):
                    yield from walk(path)
    yield from walk("")


def add(tar, root, path):
    full = os.path.join(root, path)
    info = os.lstat(full)
    if stat.S_ISSOCK(info.st_mode):
        return False
    if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
        parent, base = os.path.split(path)
        whiteout = tarfile.TarInfo(os.path.join(parent, ".wh." + base))
        whiteout.mtime = int(info.st_mtime)
        tar.addfile(whiteout)
        return True
    entry = tar.gettarinfo(full, arcname=path)
    for name in os.listxattr(full, follow_symlinks=False):
        if not name.startswith(("trusted.overlay.", "user.overlay.", "system.")):
            entry.pax_headers["SCHILY.xattr." + name] = os.getxattr(full, name, follow_symlinks=False).decode("utf-8", "surrogateescape")
    if entry.isreg():
        with open(full, "rb") as content:
            tar.addfile(entry, content)
    else:
        tar.addfile(entry)
    if entry.isdir() and b"y" == next((os.getxattr(full, n) for n in os.listxattr(full) if n == "trusted.overlay.opaque"), b""):
        tar.addfile(tarfile.TarInfo(os.path.join(path, ".wh..wh..opq")))
    return True


def layer(root, out):
    blob = os.path.join(out, "layer.tar.gz")
    count = 0
    with open(blob, "wb") as file, subprocess.Popen(["gzip", "-6", "-n"], stdin=subprocess.PIPE, stdout=file) as gzip:
        plain = Hashed(gzip.stdin)
        with tarfile.open(fileobj=plain, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:
            for path in entries(root):
                count += add(tar, root, path)
        gzip.stdin.close()
        if gzip.wait() != 0:
            sys.exit("gzip failed")
    with open(blob, "rb") as file:
        digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else sha256_of(file)
    facts = {"diff_id": plain.digest(), "plain": plain.size, "digest": digest, "size": os.path.getsize(blob), "entries": count}
    with open(os.path.join(out, "layer.json"), "w", encoding="ascii") as file:
        json.dump(facts, file)


def sha256_of(file):
    sha = hashlib.sha256()
    while chunk := file.read(1 << 20):
        sha.update(chunk)
    return "sha256:" + sha.hexdigest()


def unpack(source, directory):
    subprocess.run(["tar", "-C", directory, "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpzf", os.path.join(source, "layer.tar.gz")], check=True)
    for path in [p for p in entries(directory) if os.path.basename(p).startswith(".wh.")]:
        parent, base = os.path.split(os.path.join(directory, path))
        os.unlink(os.path.join(parent, base))
        if base == ".wh..wh..opq":
            os.setxattr(parent, "trusted.overlay.opaque", b"y")
        else:
            os.mknod(os.path.join(parent, base[4:]), stat.S_IFCHR, 0)


def write_blob(out, data, kind):
    digest = hashlib.sha256(data).hexdigest()
    with open(os.path.join(out, "blobs/sha256", digest), "wb") as file:
        file.write(data)
    return {"mediaType": kind, "digest": "sha256:" + digest, "size": len(data)}


def layout(out, command, layers):
    os.makedirs(os.path.join(out, "blobs/sha256"))
    diff_ids, descriptors, plain = [], [], []
    for directory in layers:
        with open(os.path.join(directory, "layer.json"), encoding="ascii") as file:
            facts = json.load(file)
        target = os.path.join(out, "blobs/sha256", facts["digest"].removeprefix("sha256:"))
        if not os.path.exists(target):
            # Layers stay in the cache for other images: one copy on the disk.
            os.link(os.path.join(directory, "layer.tar.gz"), target)
        diff_ids.append(facts["diff_id"])
        plain.append(facts["plain"])
        descriptors.append({"mediaType": LAYER, "digest": facts["digest"], "size": facts["size"]})
    config = json.dumps({
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()), "os": "linux",
        "config": {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"], "Cmd": json.loads(command), "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created_by": f"layer of {size} bytes"} for size in plain],
    }).encode()
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": MANIFEST, "config": write_blob(out, config, CONFIG), "layers": descriptors,
    }).encode()
    index = {"schemaVersion": 2, "manifests": [
        {**write_blob(out, manifest, MANIFEST), "annotations": {"org.opencontainers.image.ref.name": "1"}}]}
    with open(os.path.join(out, "index.json"), "w", encoding="ascii") as file:
        json.dump(index, file)
    with open(os.path.join(out, "oci-layout"), "w", encoding="ascii") as file:
        json.dump({"imageLayoutVersion": "1.0.0"}, file)
    with open(os.path.join(out, "plain"), "w", encoding="ascii") as file:
        file.write(f"{sum(plain)}\n")


def manifest_of(out):
    with open(os.path.join(out, "index.json"), encoding="ascii") as file:
        digest = json.load(file)["manifests"][0]["digest"]
    with open(blob_path(out, digest), "rb") as file:
        return digest, file.read()


def blob_path(out, digest):
    return os.path.join(out, "blobs/sha256", digest.removeprefix("sha256:"))


class Registry:
    def __init__(self, address, name):
        self.connection = http.client.HTTPConnection(address)
        self.name = name

    def call(self, method, path, body=None, headers=None, want=()):
        self.connection.request(method, path, body, headers or {})
        response = self.connection.getresponse()
        text = response.read()
        if want and response.status not in want:
            sys.exit(f"{method} {path}: {response.status} {text[:200]!r}")
        return response

    def blob(self, digest, path):
        if self.call("HEAD", f"/v2/{self.name}/blobs/{digest}").status == 200:
            return
        place = self.call("POST", f"/v2/{self.name}/blobs/uploads/", b"", want=(202,)).getheader("Location")
        target = place.split("/", 3)[3] if place.startswith("http") else place.lstrip("/")
        with open(path, "rb") as file:
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(os.path.getsize(path))}
            self.call("PUT", f"/{target}{'&' if '?' in target else '?'}digest={digest}", file, headers, want=(201,))


def push(out, address, name):
    registry = Registry(address, name)
    _, data = manifest_of(out)
    manifest = json.loads(data)
    for descriptor in [*manifest["layers"], manifest["config"]]:
        registry.blob(descriptor["digest"], blob_path(out, descriptor["digest"]))
    registry.call("PUT", f"/v2/{name}/manifests/1", data, {"Content-Type": manifest["mediaType"]}, want=(201,))


def size(out):
    manifest = json.loads(manifest_of(out)[1])
    with open(os.path.join(out, "plain"), encoding="ascii") as file:
        print(len(manifest["layers"]), file.read().strip(), sum(d["size"] for d in manifest["layers"]))


COMMANDS = {"layer": layer, "unpack": unpack, "layout": lambda out, command, *layers: layout(out, command, layers), "push": push, "size": size}

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    COMMANDS[sys.argv[1]](*sys.argv[2:])
