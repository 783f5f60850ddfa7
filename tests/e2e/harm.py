"""Harms objects of a store, and says which: harm.py STORE KIND HOW SEED, with KIND as in the store (chunks, refs, ...) and HOW lost, cut or
flipped. `harm.py STORE all SEED` does each of these to another object of each kind. `harm.py STORE copy DIR` copies the store. STORE is a
directory or s3://BUCKET/PREFIX."""

import os
import random
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../../contrib/lib"))
import s3


class Directory:
    def __init__(self, top):
        self.top = top

    def path(self, name):
        return os.path.join(self.top, name)

    def names(self, kind):
        return [os.path.relpath(os.path.join(at, name), self.top) for at, _, names in os.walk(self.path(kind)) for name in names]

    def read(self, name):
        with open(self.path(name), "rb") as file:
            return file.read()

    def write(self, name, data):
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name) + ".new", "wb") as file:
            file.write(data)
        os.rename(self.path(name) + ".new", self.path(name))

    def remove(self, name):
        os.unlink(self.path(name))


class Bucket:
    def __init__(self, url):
        self.bucket, self.prefix = url.removeprefix("s3://").split("/", 1)
        self.store = s3.Store()

    def names(self, kind):
        return [key.removeprefix(self.prefix + "/") for key, _ in self.store.list(self.bucket, f"{self.prefix}/{kind}/")]

    def call(self, method, name, body=b""):
        return self.store.call(method, self.bucket, f"{self.prefix}/{name}", body=body)[1]

    def read(self, name):
        return self.call("GET", name)

    def write(self, name, data):
        self.call("PUT", name, bytes(data))

    def remove(self, name):
        self.call("DELETE", name)


def harm(store, name, how, dice):
    if how == "lost":
        store.remove(name)
    else:
        data = bytearray(store.read(name))
        if how == "cut":
            del data[dice.randrange(len(data)) :]
        else:
            # Beyond what a compressed chunk may have otherwise without being another one.
            data[-1 - dice.randrange(min(16, len(data)))] ^= 0xFF
        store.write(name, data)
    print(name)


KINDS = ("images", "documents", "refs", "indexes", "chunks")
store = Bucket(sys.argv[1]) if sys.argv[1].startswith("s3://") else Directory(sys.argv[1])
if sys.argv[2] == "copy":
    for name in [name for kind in KINDS for name in store.names(kind)]:
        Directory(sys.argv[3]).write(name, store.read(name))
elif sys.argv[2] == "all":
    dice = random.Random(sys.argv[3])
    for kind in KINDS:
        # A name that is gone is nothing that a store misses.
        faults = ["cut"] if kind == "images" else ["lost", "cut", "flipped"]
        names = sorted(store.names(kind))
        for name, how in zip(dice.sample(names, min(len(faults), len(names))), faults):
            harm(store, name, how, dice)
else:
    kind, how = sys.argv[2:4]
    dice = random.Random(sys.argv[4])
    harm(store, dice.choice(sorted(store.names(kind))), how, dice)
