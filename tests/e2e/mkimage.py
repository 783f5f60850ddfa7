#!/usr/bin/env python3
"""Makes the test images and pushes them to a registry on this machine.

    mkimage.py REGISTRY EXPECTED NAME...

NAME is tiny, pause, eight, deep (128 layers), or one of those about layers: more (eight's and one more), aba (a layer, another,
the first one again), empties (the empty layer five times), large (one layer with 96 MiB of noise), plain, docker, zstd, encrypted
(eight's layers as other media types; encrypted is: each byte with 0x5A). deep-N is like deep, fresh-N has
two layers of noise, wide-N 50,000 files, a fifth of them not empty; they share only their first layer with others.

Every tar entry is written here, so that the tests know exactly what a container must see. What that
is goes to EXPECTED/NAME.txt, in the form that the image's own /bin/listing prints. Only the standard
library is used; the one program in the images is a static busybox, $BUSYBOX.
"""

import gzip
import hashlib
import http.client
import io
import json
import os
import platform
import stat
import random
import struct
import subprocess
import sys
import tarfile

BUSYBOX = os.environ.get("BUSYBOX", "/bin/busybox")
APPLETS = (
    "sh ls cat find stat sort sed sha256sum sleep touch rm mkdir mv ln chmod chown id mount df wc echo "
    "true false test env ps kill readlink dd sync grep head tail getopt awk tr cut printf pwd"
).split()
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64"}

# Prints one line per entry of the root file system, leaving out what the runtime mounts and makes.
# Directories have no link count: it differs between file systems without meaning anything.
LISTING = rb"""#!/bin/sh
cd / || exit 1
skip='-xdev ( -path ./proc -o -path ./sys -o -path ./dev -o -path ./etc -o -path ./run ) -prune -o'
find . $skip -type d -exec stat -c 'd %f %u %g %n' {} +
find . $skip ! -type d -exec stat -c 'f %f %u %g %h %t:%T %n' {} +
find . $skip -type f -exec sha256sum {} +
find . $skip -type l -exec sh -c 'for l; do echo "l $(readlink "$l") $l"; done' - {} +
"""
UNLISTED = ("proc", "sys", "dev", "etc", "run")

# A virtual file capability set, version 2, effective: cap_net_bind_service (bit 10).
CAP_NET_BIND_SERVICE = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)


class Layer:
    """One layer: a tar being written, and the list of what is in it."""

    def __init__(self):
        self.buffer = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.buffer, mode="w", format=tarfile.PAX_FORMAT)
        self.entries = []

    def add(self, name, kind=tarfile.REGTYPE, data=b"", mode=0o644, uid=0, gid=0, link="", device=(0, 0), mtime=1_600_000_000, xattrs=None):
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, uid, gid, mtime
        info.linkname, info.size = link, len(data)
        info.devmajor, info.devminor = device
        if xattrs:
            self._xattrs(xattrs)
        self.tar.addfile(info, io.BytesIO(data) if kind == tarfile.REGTYPE else None)
        self.entries.append((info, data))

    def _xattrs(self, xattrs):
        """Their values are bytes, and tarfile writes only text into PAX headers: a header block of our own."""
        body = b""
        for key, value in xattrs.items():
            tail = b" SCHILY.xattr." + key.encode() + b"=" + value + b"\n"
            size = len(tail)
            while len(str(size)) + len(tail) != size:
                size = len(str(size)) + len(tail)
            body += str(size).encode() + tail
        header = tarfile.TarInfo("PaxHeaders/xattr")
        header.type, header.size = tarfile.XHDTYPE, len(body)
        self.tar.fileobj.write(header.tobuf(tarfile.USTAR_FORMAT))
        self.tar.fileobj.write(body + b"\0" * (-len(body) % 512))
        self.tar.offset += 512 + len(body) + (-len(body) % 512)

    def dir(self, name, mode=0o755, **more):
        self.add(name, tarfile.DIRTYPE, mode=mode, **more)

    def file(self, name, data="", mode=0o644, **more):
        self.add(name, tarfile.REGTYPE, data.encode() if isinstance(data, str) else data, mode, **more)

    def symlink(self, name, target):
        self.add(name, tarfile.SYMTYPE, link=target, mode=0o777)

    def hardlink(self, name, target):
        self.add(name, tarfile.LNKTYPE, link=target)

    def whiteout(self, name):
        parent, base = os.path.split(name)
        self.add(os.path.join(parent, ".wh." + base), mode=0)

    def opaque(self, directory):
        self.add(os.path.join(directory, ".wh..wh..opq"), mode=0)

    def bytes(self):
        self.tar.close()
        return self.buffer.getvalue()


class Tree:
    """What a container sees after the layers so far: path -> (mode, uid, gid, links, device, content or target)."""

    def __init__(self):
        self.nodes = {"": (stat.S_IFDIR | 0o755, 0, 0, 0, (0, 0), None)}

    def remove(self, path, itself=True):
        for name in [n for n in self.nodes if n.startswith(path + "/") or (itself and n == path)]:
            del self.nodes[name]

    def apply(self, layer):
        # Whiteouts speak of the layers below, wherever they stand in the tar.
        for info, _ in layer.entries:
            parent, base = os.path.split(info.name)
            if base == ".wh..wh..opq":
                self.remove(parent, itself=False)
            elif base.startswith(".wh."):
                self.remove(os.path.join(parent, base[4:]))
        kinds = {tarfile.REGTYPE: stat.S_IFREG, tarfile.SYMTYPE: stat.S_IFLNK, tarfile.DIRTYPE: stat.S_IFDIR,
                 tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK, tarfile.FIFOTYPE: stat.S_IFIFO}
        links = {}
        for info, data in layer.entries:
            if os.path.basename(info.name).startswith(".wh."):
                continue
            self.parents(info.name)
            if info.type == tarfile.LNKTYPE:
                self.nodes[info.name] = self.nodes[info.linkname]
                links.setdefault(info.linkname, []).append(info.name)
                continue
            old = self.nodes.get(info.name)
            if old and not (stat.S_ISDIR(old[0]) and info.type == tarfile.DIRTYPE):
                self.remove(info.name)
            content = info.linkname if info.type == tarfile.SYMTYPE else data
            self.nodes[info.name] = (kinds[info.type] | info.mode, info.uid, info.gid, 1, (info.devmajor, info.devminor), content)
        for first, others in links.items():
            for name in [first, *others]:
                mode, uid, gid, _, device, content = self.nodes[name]
                self.nodes[name] = (mode, uid, gid, 1 + len(others), device, content)

    def parents(self, name):
        """A layer need not have an entry for a directory it puts things in."""
        parent = os.path.dirname(name)
        while parent:
            self.nodes.setdefault(parent, (stat.S_IFDIR | 0o755, 0, 0, 0, (0, 0), None))
            parent = os.path.dirname(parent)

    def listing(self):
        lines = []
        for path, (mode, uid, gid, links, device, content) in self.nodes.items():
            if path.split("/")[0] in UNLISTED:
                continue
            name = "./" + path if path else "."
            if stat.S_ISDIR(mode):
                lines.append(f"d {mode:x} {uid} {gid} {name}")
                continue
            lines.append(f"f {mode:x} {uid} {gid} {links} {device[0]:x}:{device[1]:x} {name}")
            if stat.S_ISREG(mode):
                lines.append(f"{hashlib.sha256(content).hexdigest()}  {name}")
            if stat.S_ISLNK(mode):
                lines.append(f"l {content} {name}")
        return "".join(sorted(line + "\n" for line in lines))


def base_layer(hello):
    layer = Layer()
    for name in ("bin", "data", "dev", "etc", "proc", "root", "run", "sys", "usr", "usr/bin", "var"):
        layer.dir(name, 0o700 if name == "root" else 0o755)
    layer.dir("tmp", 0o1777)
    with open(BUSYBOX, "rb") as busybox:
        layer.file("bin/busybox", busybox.read(), 0o755)
    for applet in APPLETS:
        layer.symlink("bin/" + applet, "busybox")
    layer.file("bin/listing", LISTING, 0o755)
    layer.file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nguest:x:1000:1000:guest:/tmp:/bin/sh\n")
    layer.file("etc/group", "root:x:0:\nguest:x:1000:\nstaff:x:50:guest\n")
    layer.file("data/hello", hello)
    return layer


def eight():
    one = base_layer("eight\n")
    for directory in ("data/keep", "data/gone", "data/gone/below", "data/opaque", "data/opaque/old", "data/remade", "data/to-file", "data/later"):
        one.dir(directory)
    for number in range(20):
        one.file(f"data/keep/{number:02}", f"{number}\n" * 100)
    for name in ("gone/below/x", "gone/y", "opaque/old/a", "opaque/b", "remade/old", "to-file/inside", "to-dir", "removed", "changed", "later/first"):
        one.file("data/" + name, name)
    one.hardlink("data/removed-too", "data/removed")
    yield one

    two = Layer()
    two.dir("special")
    two.file("special/setuid", "s", 0o4755)
    two.file("special/setgid", "s", 0o2755, gid=50)
    two.dir("special/setgid-dir", 0o2775, gid=50)
    two.dir("special/sticky", 0o1777)
    two.file("special/none", "", 0o000, uid=65534, gid=65534)
    two.file("special/guests", "mine", 0o640, uid=1000, gid=1000)
    two.file("special/big", bytes(range(256)) * 4096)
    two.file("special/old", "from 1970", mtime=0)
    two.file("special/new", "from 2100", mtime=4_102_444_800)
    yield two

    three = Layer()
    three.dir("links")
    three.file("links/one", "three names")
    three.hardlink("links/two", "links/one")
    three.hardlink("links/three", "links/one")
    three.symlink("links/relative", "../data/hello")
    three.symlink("links/absolute", "/data/hello")
    three.symlink("links/dangling", "/nowhere/at/all")
    three.symlink("links/long", "x" * 1000)
    yield three

    four = Layer()
    four.dir("attrs")
    four.file("attrs/capable", "#!/bin/sh\n", 0o755, xattrs={"security.capability": CAP_NET_BIND_SERVICE})
    four.file("attrs/user", "x", xattrs={"user.comment": b"a comment", "user.binary": b"\0\xff\n="})
    four.dir("attrs/dir", xattrs={"user.on-dir": b"1"})
    yield four

    five = Layer()
    five.dir("nodes")
    five.add("nodes/null", tarfile.CHRTYPE, mode=0o666, device=(1, 3))
    five.add("nodes/loop", tarfile.BLKTYPE, mode=0o660, gid=6, device=(7, 200))
    five.add("nodes/fifo", tarfile.FIFOTYPE, mode=0o600)
    yield five

    six = Layer()
    for name in ("data/removed", "data/gone", "links/two", "data/keep/07"):
        six.whiteout(name)
    six.dir("data/remade", 0o711)
    six.opaque("data/remade")
    six.file("data/remade/new", "again")
    six.file("data/to-file", "a directory once")
    six.dir("data/to-dir")
    six.file("data/to-dir/inside", "a file once")
    six.file("data/changed", "changed in layer six", 0o600)
    yield six

    seven = Layer()
    deep = "names/" + "/".join(["d" * 60] * 6)
    seven.dir("names")
    seven.file("names/" + "n" * 101, "longer than a tar header's name")
    seven.file("names/" + "f" * 255, "as long as a name can be")
    seven.file(deep + "/file", "a path of more than 255 bytes")
    for name in ("\u00fcml\u00e4ut", "\u65e5\u672c\u8a9e", "\U0001f680", "e\u0301 combining", "with space", "quote'\"", "back\\slash", "-dash", "a:b,c=d", "*?[x]$(y)"):
        seven.file("names/" + name, name)
    seven.symlink("names/to \u00fcml\u00e4ut", "\u00fcml\u00e4ut")
    yield seven

    eight_ = Layer()
    eight_.dir("data/opaque", 0o750, gid=50)
    eight_.opaque("data/opaque")
    eight_.file("data/opaque/only", "nothing else is here")
    eight_.dir("special/setgid-dir", 0o2770, gid=50)
    eight_.file("data/later/second", "no entry for its directory in this layer")
    eight_.file("implied/by/this", "no entry for its directories in any layer")
    yield eight_


def deep(which=""):
    yield base_layer("deep\n")
    for number in range(2, 129):
        layer = Layer()
        layer.dir("deep")
        layer.file(f"deep/{number:03}", f"layer {number}{which}\n")
        layer.file("deep/top", f"{number}\n")
        layer.file(f"deep/passing-{number}", "gone in the next layer")
        if number > 2:
            layer.whiteout(f"deep/passing-{number - 1}")
        yield layer


def more():
    yield from eight()
    layer = Layer()
    layer.file("data/hello", "nine\n")
    layer.whiteout("data/changed")
    layer.dir("data/remade", 0o711)
    layer.opaque("data/remade")
    layer.file("data/remade/newest", "once more")
    yield layer


def aba():
    """Directories that change to and fro, and a file that comes back."""
    for name in "ABA":
        layer = base_layer("A\n") if name == "A" else Layer()
        if name == "A":
            layer.file("data/one", "of A")
            layer.file("data/both", "of A", 0o600)
        else:
            layer.whiteout("data/one")
            layer.file("data/both", "of B")
            layer.file("data/two", "of B")
        yield layer


def empties():
    yield base_layer("empties\n")
    for number in range(5):
        yield Layer()
        if number == 2:
            layer = Layer()
            layer.file("data/between", "the empty ones")
            yield layer


def large():
    layer = base_layer("large\n")
    noise = random.Random(1)
    for number in range(6):
        layer.file(f"data/noise-{number}", noise.randbytes(16 << 20))
    layer.file("data/program", "#!/bin/sh\ncd /data && sha256sum noise-*\n", 0o755)
    yield layer


def fresh(which=""):
    """Three layers, of which two are nobody else's."""
    yield base_layer("fresh\n")
    noise = random.Random(which)
    for number in range(2):
        layer = Layer()
        layer.dir("data")
        layer.file(f"data/fresh-{number}", noise.randbytes(2 << 20))
        yield layer


def wide(which=""):
    yield base_layer("wide\n")
    noise = random.Random(which)
    layer = Layer()
    for directory in range(500):
        layer.dir(f"wide/{directory:03}")
        for number in range(100):
            content = "" if number % 5 else noise.randbytes(500)
            layer.file(f"wide/{directory:03}/a-file-with-a-name-{number:02}", content)
    yield layer


WAIT = ["/bin/sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 1000 & wait $!; done"]
IMAGES = {
    "tiny": (lambda: [base_layer("hello from tiny\n")], ["/bin/cat", "/data/hello"]),
    "pause": (lambda: [base_layer("pause\n")], WAIT),
    "eight": (eight, ["/bin/listing"]),
    "deep": (deep, ["/bin/cat", "/deep/top"]),
    "more": (more, ["/bin/listing"]),
    "aba": (aba, ["/bin/listing"]),
    "empties": (empties, ["/bin/listing"]),
    "large": (large, ["/bin/listing"]),
    "fresh": (fresh, ["/bin/listing"]),
    "wide": (wide, ["/bin/true"]),
    "plain": (eight, ["/bin/listing"]),
    "docker": (eight, ["/bin/listing"]),
    "zstd": (eight, ["/bin/listing"]),
    "encrypted": (eight, ["/bin/listing"]),
}

OCI, DOCKER = "application/vnd.oci.image", "application/vnd.docker"
# Media types of manifest, configuration and layers, and how a layer is packed.
GZIP = (OCI + ".manifest.v1+json", OCI + ".config.v1+json", OCI + ".layer.v1.tar+gzip", lambda tar: gzip.compress(tar, 1, mtime=0))
FORMS = {
    "plain": (*GZIP[:2], OCI + ".layer.v1.tar", lambda tar: tar),
    "zstd": (*GZIP[:2], OCI + ".layer.v1.tar+zstd", lambda tar: subprocess.run(["zstd", "-1qc"], input=tar, stdout=subprocess.PIPE, check=True).stdout),
    "encrypted": (*GZIP[:2], GZIP[2] + "+encrypted", lambda tar: GZIP[3](tar).translate(bytes(n ^ 0x5A for n in range(256)))),
    "docker": (DOCKER + ".distribution.manifest.v2+json", DOCKER + ".container.image.v1+json", DOCKER + ".image.rootfs.diff.tar.gzip", GZIP[3]),
}


class Registry:
    def __init__(self, address, name):
        self.connection = http.client.HTTPConnection(address)
        self.name = name

    def call(self, method, path, body=None, kind="application/octet-stream", want=()):
        self.connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
        response = self.connection.getresponse()
        text = response.read()
        if want and response.status not in want:
            sys.exit(f"{method} {path}: {response.status} {text[:200]!r}")
        return response

    def blob(self, data, kind):
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        if self.call("HEAD", f"/v2/{self.name}/blobs/{digest}").status != 200:
            place = self.call("POST", f"/v2/{self.name}/blobs/uploads/", b"", want=(202,)).getheader("Location")
            path = place.split("/", 3)[3] if place.startswith("http") else place.lstrip("/")
            self.call("PUT", f"/{path}{'&' if '?' in path else '?'}digest={digest}", data, want=(201,))
        return {"mediaType": kind, "digest": digest, "size": len(data)}

    def manifest(self, tag, data, kind):
        self.call("PUT", f"/v2/{self.name}/manifests/{tag}", data, kind, want=(201,))


def make(address, expected, name):
    kind, _, which = name.partition("-")
    layers, command = IMAGES[kind]
    manifest_kind, config_kind, layer_kind, pack = FORMS.get(name, GZIP)
    registry, tree = Registry(address, name), Tree()
    diff_ids, descriptors = [], []
    for layer in layers(f" of {which}") if which else layers():
        tree.apply(layer)
        tar = layer.bytes()
        diff_ids.append("sha256:" + hashlib.sha256(tar).hexdigest())
        descriptors.append(registry.blob(pack(tar), layer_kind))
    config = json.dumps({
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()), "os": "linux",
        "config": {"Env": ["PATH=/bin:/usr/bin"], "Cmd": command, "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created_by": f"mkimage.py {name}"} for _ in diff_ids],
    }).encode()
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": manifest_kind,
        "config": registry.blob(config, config_kind),
        "layers": descriptors,
    }).encode()
    registry.manifest("1", manifest, manifest_kind)
    with open(os.path.join(expected, name + ".txt"), "w", encoding="utf-8") as out:
        out.write(tree.listing())
    print(f"{address}/{name}:1  {len(descriptors)} layers, {sum(d['size'] for d in descriptors)} bytes")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    os.makedirs(sys.argv[2], exist_ok=True)
    for wanted in sys.argv[3:]:
        make(sys.argv[1], sys.argv[2], wanted)
