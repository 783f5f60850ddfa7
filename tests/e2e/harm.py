"""Harms objects of a store in a directory, and says which: harm.py DIR KIND HOW SEED, with KIND as in the store (chunks, refs, ...) and
HOW lost, cut or flipped. `harm.py DIR all SEED` does each of these to another object of each kind."""

import os
import random
import sys


def objects(top, kind):
    found = []
    for directory, _, files in os.walk(os.path.join(top, kind)):
        found += [os.path.relpath(os.path.join(directory, name), top) for name in files]
    return sorted(found)


def harm(top, name, how, dice):
    path = os.path.join(top, name)
    if how == "lost":
        os.unlink(path)
    else:
        data = bytearray(open(path, "rb").read())
        if how == "cut":
            del data[dice.randrange(len(data)) :]
        else:
            # Beyond what a compressed chunk may have otherwise without being another one.
            data[-1 - dice.randrange(min(16, len(data)))] ^= 0xFF
        with open(path + ".new", "wb") as file:
            file.write(data)
        os.rename(path + ".new", path)
    print(name)


top = sys.argv[1]
if sys.argv[2] == "all":
    dice = random.Random(sys.argv[3])
    for kind in ("images", "documents", "refs", "indexes", "chunks"):
        # A name that is gone is nothing that a store misses.
        faults = ["cut"] if kind == "images" else ["lost", "cut", "flipped"]
        names = objects(top, kind)
        for name, how in zip(dice.sample(names, min(len(faults), len(names))), faults):
            harm(top, name, how, dice)
else:
    kind, how = sys.argv[2:4]
    dice = random.Random(sys.argv[4])
    harm(top, dice.choice(objects(top, kind)), how, dice)
