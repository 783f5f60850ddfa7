#!/usr/bin/env python3
"""Prints everything a file system can say about a directory tree, one line per entry, for comparing two of them.

    listtree.py DIRECTORY

Unlike the listing inside a container it sees extended attributes, sizes and times. What the runtime mounts over an
image is left out.
"""

import hashlib
import os
import stat
import sys

UNLISTED = {"proc", "sys", "dev", "run"}


def describe(path, info):
    kind = stat.S_IFMT(info.st_mode)
    parts = [f"{info.st_mode:06o}", f"{info.st_uid}:{info.st_gid}"]
    if kind != stat.S_IFDIR:
        # Directories that a layer implies, or puts a whiteout into, have the time of unpacking.
        parts.append(f"links={info.st_nlink} size={info.st_size} mtime={info.st_mtime_ns}")
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        parts.append(f"device={os.major(info.st_rdev)}:{os.minor(info.st_rdev)}")
    if kind == stat.S_IFREG:
        with open(path, "rb") as content:
            parts.append(hashlib.file_digest(content, "sha256").hexdigest() if hasattr(hashlib, "file_digest")
                         else hashlib.sha256(content.read()).hexdigest())
    if kind == stat.S_IFLNK:
        parts.append(f"to={os.readlink(path)!r}")
    for name in sorted(os.listxattr(path, follow_symlinks=False)):
        parts.append(f"{name}={os.getxattr(path, name, follow_symlinks=False).hex()}")
    return " ".join(parts)


def walk(root, below):
    path = os.path.join(root, below) if below else root
    info = os.lstat(path)
    print(f"{os.fsencode(below or '.')!r} {describe(path, info)}")
    if stat.S_ISDIR(info.st_mode):
        for name in sorted(os.listdir(path)):
            if below or name not in UNLISTED:
                walk(root, os.path.join(below, name))


walk(sys.argv[1].rstrip("/"), "")
