#!/usr/bin/env python3
"""Makes objects of contrib/ceph older than they are, for tests: S3 has no way to say when something was written.

    ceph_old.py CEPH.CONF SECONDS PREFIX      what there is below PREFIX of the bucket; prints how many objects

The gateway's Last-Modified is the RADOS time of an object's head, and its listings have a copy of that in the bucket's index. Both are
written here; for times when nobody else writes.
"""

import struct
import sys
import time

import rados

INDEX, DATA = "default.rgw.buckets.index", "default.rgw.buckets.data"


def entries(index, shard):
    """Names and entries of a shard of the bucket's index."""
    after = ""
    while True:
        with rados.ReadOpCtx() as op:
            found, _ = index.get_omap_vals(op, after, "", 1000)
            index.operate_read_op(op, shard)
            some = list(found)
        if not some:
            return
        yield from some
        after = some[-1][0]


def time_in(name, entry):
    """Where an entry has its time: behind its own head and name, an epoch, whether it exists, and the head, kind and size of its metadata."""
    return 6 + 4 + len(name) + 8 + 1 + 6 + 1 + 8


def older(name, entry, written, by):
    """The entry with an earlier time, which must be what it is taken for."""
    at = time_in(name, entry)
    (seconds,) = struct.unpack_from("<I", entry, at)
    if abs(seconds - written) > 2:
        sys.exit(f"the index's entry of {name} is not understood: {seconds} at {at}, and it was written at {written}: {entry.hex()}")
    return entry[:at] + struct.pack("<I", seconds - by) + entry[at + 4:]


def main():
    conf, by, prefix = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    count = 0
    with rados.Rados(conffile=conf, conf={"admin_socket": ""}, name="client.admin") as cluster:
        index, data = cluster.open_ioctx(INDEX), cluster.open_ioctx(DATA)
        # A head is called BUCKET-ID_NAME; a bucket's id has no underscore.
        heads = {found.key.split("_", 1)[1]: found.key for found in data.list_objects()}
        for shard in [found.key for found in index.list_objects() if found.key.startswith(".dir.")]:
            changed = {}
            for name, entry in entries(index, shard):
                if not name.startswith(prefix) or name not in heads:
                    continue
                _, stat = data.stat(heads[name])
                written = int(time.mktime(stat))
                changed[name] = older(name, entry, written, by)
                with rados.WriteOpCtx() as op:
                    # Something has to be written for the time to change; the gateway knows no such attribute.
                    op.set_xattr("older", b"x")
                    data.operate_write_op(op, heads[name], written - by)
                count += 1
            if changed:
                with rados.WriteOpCtx() as op:
                    index.set_omap(op, tuple(changed), tuple(changed.values()))
                    index.operate_write_op(op, shard)
    print(count)


main()
