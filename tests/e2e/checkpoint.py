#!/usr/bin/env python3
"""Adds a container's specification to a checkpoint of it, as an archive for `ctr images import`.

    checkpoint.py INDEX SPECIFICATION NAME ARCHIVE

`ctr containers checkpoint` writes the specification only together with the task's memory, which takes CRIU; and `ctr containers
restore` wants it always. INDEX is the checkpoint's JSON, SPECIFICATION the container's; everything else that INDEX names must be
in the content store already.
"""

import hashlib
import io
import json
import sys
import tarfile

TYPE = b"types.containerd.io/opencontainers/runtime-spec/1/Spec"


def varint(number):
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def field(number, value):
    return bytes([number << 3 | 2]) + varint(len(value)) + value


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        index = json.load(file)
    with open(sys.argv[2], "rb") as file:
        specification = json.dumps(json.load(file)).encode()
    name, blobs = sys.argv[3], {}

    def blob(data, kind):
        digest = hashlib.sha256(data).hexdigest()
        blobs["blobs/sha256/" + digest] = data
        return {"mediaType": kind, "digest": "sha256:" + digest, "size": len(data)}

    # A google.protobuf.Any.
    index["manifests"].append(blob(field(1, TYPE) + field(2, specification), "application/vnd.containerd.container.checkpoint.config.v1+proto"))
    checkpoint = blob(json.dumps(index).encode(), "application/vnd.oci.image.index.v1+json")
    checkpoint["annotations"] = {"io.containerd.image.name": name}
    blobs["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [checkpoint]}).encode()
    blobs["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
    with tarfile.open(sys.argv[4], "w") as archive:
        for path, data in blobs.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main()
