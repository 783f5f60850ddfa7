//! Layers that readers have got wrong, one for each way.

use super::{Item, Tar, header, pax, seal};

/// What becomes of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It becomes the tree that containerd's applier makes of it.
    Kept,
    /// It is refused, by containerd's applier too.
    Refused,
    /// Refused here, though containerd takes it: only hostile layers are like this.
    RefusedHere,
    /// Taken here, though containerd refuses it.
    KeptHere,
}

/// A layer and what becomes of it.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) tar: Vec<u8>,
    pub(crate) fate: Fate,
}

fn kept(name: &'static str, items: impl IntoIterator<Item = Item>) -> Case {
    Case { name, tar: Tar::of(items), fate: Fate::Kept }
}

fn refused(name: &'static str, items: impl IntoIterator<Item = Item>) -> Case {
    Case { name, tar: Tar::of(items), fate: Fate::Refused }
}

fn refused_here(name: &'static str, items: impl IntoIterator<Item = Item>) -> Case {
    Case { name, tar: Tar::of(items), fate: Fate::RefusedHere }
}

fn raw(name: &'static str, tar: Vec<u8>, fate: Fate) -> Case {
    Case { name, tar, fate }
}

/// All of them.
pub(crate) fn all() -> Vec<Case> {
    [
        kinds(),
        names(),
        numbers(),
        repeats(),
        links(),
        whiteouts(),
        attributes(),
        formats(),
        sparse(),
        broken(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A file capability, as `setcap cap_net_raw=p` writes it.
pub(crate) const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn kinds() -> Vec<Case> {
    vec![
        raw("an empty stream", Vec::new(), Fate::Kept),
        kept("no entries", []),
        kept(
            "one of each",
            [
                Item::dir("dir/").mode(0o1777).owner(1, 2),
                Item::file("dir/file", b"content").mode(0o4755).owner(3, 4),
                Item::file("dir/empty", b"").mode(0o000),
                Item::symlink("dir/link", "../somewhere").owner(5, 6),
                Item::hard_link("again", "dir/file").mode(0o4755).owner(3, 4),
                Item::device(b'3', "char", 1, 3).mode(0o666),
                Item::device(b'4', "block", 259, 70_000).mode(0o660).owner(0, 6),
                Item::new(b'6', "fifo").mode(0o620),
            ],
        ),
        kept(
            "a root that brings its attributes",
            [Item::dir("./").mode(0o700).owner(7, 8), Item::file("a", b"")],
        ),
        kept("a device 0:0", [Item::device(b'3', "a", 0, 0)]),
        kept("large device numbers are cut", [Item::device(b'3', "a", 0x1234, 0x12_3456)]),
        refused("device numbers out of range", [Item::device(b'3', "a", 1 << 32, 0)]),
        refused("an unknown type", [Item::new(b'7', "a")]),
        refused("a vendor's type", [Item::new(b'V', "a")]),
        kept(
            "directories whose header has a size",
            [Item { size: Some(99), ..Item::dir("a") }, Item::file("a/b", b"c")],
        ),
        kept(
            "links whose header has a size",
            [
                Item::file("a", b"x"),
                Item { size: Some(600), ..Item::hard_link("b", "a") },
                Item { size: Some(600), ..Item::symlink("c", "a") },
            ],
        ),
        kept(
            "many files in a directory",
            (0..700).map(|n| Item::file(format!("dir/{n:0>40}"), n.to_string())),
        ),
        kept(
            "identical files",
            [
                Item::file("a", [7; 5000]),
                Item::file("b", [8; 4096]),
                Item::file("c", [7; 5000]),
                Item::file("d", [8; 4096]),
                Item::file("e", [7; 4999]),
                Item::file("f", [0; 9000]),
                Item::file("g", [0; 9000]),
            ],
        ),
    ]
}

fn names() -> Vec<Case> {
    let long = "n".repeat(255);
    let deep = vec!["d"; 120].join("/");
    vec![
        kept(
            "names before a dot",
            [Item::file("dir/-x", b""), Item::file("dir/ y", b""), Item::file("dir/..z", b"")],
        ),
        kept(
            "names that are no text",
            [Item::file(b"\xff\xfe/\x01\x7f", b"x"), Item::symlink(b"\xe9", b"\xff")],
        ),
        kept(
            "long names",
            [Item::file(&long, b"x"), Item::file(format!("{long}/{long}"), b"y")].into_iter().skip(1),
        ),
        refused("a name too long", [Item::file("n".repeat(256), b"x")]),
        refused("a directory's name too long", [Item::file(format!("{}/x", "n".repeat(256)), b"x")]),
        kept("a deep path", [Item::file(format!("{deep}/file"), b"x")]),
        kept(
            "paths that want cleaning",
            [
                Item::dir("./a/"),
                Item::file("a//b", b"1"),
                Item::file("./a/./c", b"2"),
                Item::file("a/x/../d", b"3"),
                Item::file("/absolute/e", b"4"),
                Item::file("/../f", b"5"),
            ],
        ),
        refused_here("a path out of the root", [Item::file("../a", b"x")]),
        refused_here("a path out of the root later", [Item::file("a/../../b", b"x")]),
        kept(
            "names for the root",
            [Item::file("/", b"data"), Item::file(".", b""), Item::dir("a/.."), Item::file("b", b"")],
        ),
        refused(
            "a NUL in a sparse file's name",
            [Item::file("a", b"")
                .pax("GNU.sparse.major", "0")
                .pax("GNU.sparse.minor", "1")
                .pax("GNU.sparse.name", b"b\0c")
                .pax("GNU.sparse.numblocks", "0")],
        ),
    ]
}

fn numbers() -> Vec<Case> {
    vec![
        kept(
            "large owners",
            [
                Item::file("a", b"").owner(70_000, 4_000_000_000),
                Item::file("b", b"").pax("uid", "4294967294").pax("gid", "65536"),
                Item::file("c", b"").pax("uid", "4294967295").pax("gid", "-1"),
                Item::file("d", b"").pax("uid", "4294967301"),
            ],
        ),
        kept(
            "times",
            [
                Item::file("a", b"").mtime(0),
                Item::file("b", b"").pax("mtime", "1700000000.123456789"),
                Item::file("c", b"").pax("mtime", "-1.5"),
                Item::file("d", b"").pax("mtime", "-0.5"),
                Item::file("e", b"").pax("mtime", "4294967296.5"),
                Item::file("f", b"").pax("mtime", "9300000000"),
                Item::file("g", b"").mtime(u64::MAX - 5),
                Item::dir("h").pax("mtime", "1600000000.000000001"),
                Item::file("h/i", b""),
                Item::symlink("j", "k").pax("mtime", "1500000000.25"),
            ],
        ),
        refused("a time that is none", [Item::file("a", b"").pax("mtime", "yesterday")]),
        refused("a time of access that is none", [Item::file("a", b"").pax("atime", "1.5.5")]),
        refused("an owner that is none", [Item::file("a", b"").pax("uid", "root")]),
        refused("a negative size", [Item::file("a", b"").pax("size", "-1")]),
        kept("modes with a type", [Item::file("a", b"").mode(0o100_644), Item::dir("b").mode(0o42_755)]),
        kept(
            "a size from PAX",
            [Item { size: Some(0), ..Item::file("a", b"x").pax("size", "1") }, Item::file("b", b"y")],
        ),
    ]
}

fn repeats() -> Vec<Case> {
    vec![
        kept(
            "the last file wins",
            [
                Item::file("a", b"first").owner(1, 1).xattr("user.x", b"1"),
                Item::file("a", b"second").mode(0o600),
            ],
        ),
        kept(
            "directories merge",
            [
                Item::dir("a").mode(0o700).owner(1, 1).xattr("user.x", b"1").xattr("user.y", b"1"),
                Item::file("a/b", b"kept"),
                Item::dir("a").mode(0o755).mtime(5).xattr("user.y", b"2"),
            ],
        ),
        kept(
            "a file over a directory",
            [Item::dir("a"), Item::file("a/b", b"x"), Item::dir("a/c"), Item::file("a", b"")]
                .into_iter()
                .take(1),
        ),
        refused(
            "a file over a directory that had another in it",
            [Item::dir("a"), Item::dir("a/c"), Item::file("a", b"y")],
        ),
        kept("a file over a full directory", [Item::file("a/b/c", b"x"), Item::file("a", b"y")]),
        kept(
            "a directory over a file",
            [Item::file("a", b"x"), Item::dir("a").mode(0o711), Item::file("a/b", b"y")],
        ),
        kept(
            "a directory over a symlink",
            [Item::dir("b"), Item::symlink("a", "b"), Item::dir("a"), Item::file("a/c", b"")],
        ),
        kept(
            "a symlink over a directory",
            [
                Item::dir("a").mtime(11),
                Item::file("a/x", b""),
                Item::dir("b").mtime(22),
                Item::symlink("a", "b").mtime(33),
            ],
        ),
        refused("a symlink over a directory leads nowhere", [Item::dir("a"), Item::symlink("a", "b")]),
        kept(
            "one name of several is replaced",
            [
                Item::file("a", b"x"),
                Item::hard_link("b", "a"),
                Item::hard_link("c", "a"),
                Item::file("a", b"y"),
            ],
        ),
        kept(
            "names below a directory that goes",
            [Item::file("d/a", b"x"), Item::hard_link("b", "d/a"), Item::file("d", b"")],
        ),
        kept(
            "directories after their content",
            [
                Item::file("a/b/c", b"x"),
                Item::dir("a/b").mode(0o700).mtime(7),
                Item::dir("a").mode(0o711).mtime(8),
            ],
        ),
        kept(
            "a global header removes what has its name",
            [
                Item::file("a", b"x"),
                Item::file("b", b"y"),
                Item { data: pax(&[(b"comment".to_vec(), b"c".to_vec())]), ..Item::new(b'g', "a") },
            ],
        ),
        kept(
            "a global header makes directories and says nothing of what follows",
            [
                Item {
                    data: pax(&[(b"path".to_vec(), b"x/y".to_vec()), (b"mtime".to_vec(), b"9".to_vec())]),
                    ..Item::new(b'g', "pax_global_header")
                },
                Item::file("a", b"y"),
            ],
        ),
    ]
}

fn links() -> Vec<Case> {
    vec![
        kept(
            "a link has the last entry's attributes",
            [
                Item::file("a", b"x").owner(1, 1).mode(0o600).mtime(1),
                Item::hard_link("b", "./a").owner(2, 2).mode(0o644).mtime(2),
            ],
        ),
        kept(
            "a link takes the capability away",
            [
                Item::file("a", b"x").xattr("security.capability", CAPABILITY).xattr("user.x", b"1"),
                Item::hard_link("b", "a"),
            ],
        ),
        kept(
            "a link keeps the capability that it brings",
            [
                Item::file("a", b"x").xattr("security.capability", CAPABILITY),
                Item::hard_link("b", "a").xattr("security.capability", CAPABILITY),
            ],
        ),
        kept(
            "a link to a symlink",
            [
                Item::file("a", b"x"),
                Item::symlink("b", "a"),
                Item::hard_link("c", "b").mode(0o600).owner(9, 9),
            ],
        ),
        kept(
            "a link through a symlink",
            [Item::file("d/a", b"x"), Item::symlink("e", "/d"), Item::hard_link("c", "e/a")],
        ),
        kept("a link to a device", [Item::device(b'3', "a", 5, 1), Item::hard_link("b", "a")]),
        refused("a link to what is not there", [Item::hard_link("a", "b")]),
        refused("a link to what comes later", [Item::hard_link("a", "b"), Item::file("b", b"")]),
        refused("a link to itself", [Item::file("a", b""), Item::hard_link("a", "a")]),
        refused("a link to a directory", [Item::dir("a"), Item::hard_link("b", "a")]),
        refused("a link to the root", [Item::hard_link("b", "/")]),
        refused_here("a link out of the root", [Item::file("a", b""), Item::hard_link("b", "../a")]),
        refused_here("a link with a slash behind", [Item::file("a", b""), Item::hard_link("b", "a/")]),
        kept(
            "an entry below a symlink goes where it leads",
            [Item::dir("real/dir"), Item::symlink("l", "real/dir"), Item::file("l/a", b"x")],
        ),
        kept(
            "symlinks lead no farther than the root",
            [
                Item::symlink("up", "../../../etc"),
                Item::file("up/passwd", b"x"),
                Item::symlink("abs", "/etc"),
                Item::file("abs/shadow", b"y"),
            ],
        ),
        kept(
            "symlinks to symlinks",
            [
                Item::symlink("a", "b"),
                Item::symlink("b", "/c"),
                Item::symlink("c", "./d/"),
                Item::file("a/x", b"1"),
                Item::symlink("d/e", "../b"),
                Item::file("d/e/y", b"2"),
            ],
        ),
        kept(
            "a symlink with dots",
            [
                Item::dir("x/y"),
                Item::symlink("s", "x/y"),
                Item::symlink("t", "s/../z"),
                Item::file("t/a", b"1"),
                Item::symlink("u", "/s/../w"),
                Item::file("u/b", b"2"),
            ],
        ),
        refused(
            "symlinks in a circle",
            [Item::symlink("a", "b"), Item::symlink("b", "a"), Item::file("a/x", b"")],
        ),
        refused("a symlink to itself", [Item::symlink("a", "a"), Item::file("a/x", b"")]),
        refused("an entry below a file", [Item::file("a", b""), Item::file("a/b", b"")]),
        refused(
            "an entry below a symlink to a file",
            [Item::file("f", b""), Item::symlink("a", "f"), Item::file("a/b", b"")],
        ),
        refused("a symlink to nothing", [Item::symlink("a", "")]),
        kept(
            "a long symlink",
            [Item::symlink("a", vec![b't'; 4000]), Item::symlink("b", "x"), Item::file("c", b"")],
        ),
        kept("the longest symlink", [Item::symlink("a", vec![b't'; 4095]), Item::symlink("b", "x")]),
        refused("a symlink too long", [Item::symlink("a", vec![b't'; 4096])]),
    ]
}

/// A file below `length` symlinks that lead to each other.
fn chain(length: usize) -> Vec<Item> {
    let links = (1..=length).map(|n| Item::symlink(format!("l{n}"), format!("l{}", n - 1)));
    let file = Item::file(format!("l{length}/x"), b"x");
    [Item::dir("l0")].into_iter().chain(links).chain([file]).collect()
}

fn whiteouts() -> Vec<Case> {
    vec![
        kept("a whiteout", [Item::file(".wh.a", b"").owner(1, 2), Item::file("d/.wh.b", b"with data")]),
        kept("a whiteout of a long name", [Item::file(format!(".wh.{}", "n".repeat(255)), b"")]),
        kept(
            "an opaque directory",
            [Item::file("d/a", b"x"), Item::file("d/.wh..wh..opq", b""), Item::file("d/b", b"y")],
        ),
        kept(
            "opaque before its directory",
            [Item::file("d/.wh..wh..opq", b""), Item::dir("d").mode(0o700), Item::file("d/a", b"")],
        ),
        kept("an opaque root", [Item::file(".wh..wh..opq", b"")]),
        kept("an opaque directory that goes", [Item::file("d/.wh..wh..opq", b""), Item::file("d", b"")]),
        kept("other names with the prefix", [Item::file(".wh..wh.plnk", b""), Item::dir("d/.wh..wh.aufs")]),
        kept("a file in the place of a whiteout", [Item::file(".wh.a", b""), Item::file("a", b"x")]),
        kept(
            "a directory in the place of a whiteout",
            [Item::file(".wh.a", b""), Item::dir("a"), Item::file("a/b", b"")],
        ),
        refused(
            "an implied directory in the place of a whiteout",
            [Item::file(".wh.a", b""), Item::file("a/b", b"")],
        ),
        refused("a whiteout of what the layer holds", [Item::file("a", b""), Item::file(".wh.a", b"")]),
        refused("a whiteout twice", [Item::file(".wh.a", b""), Item::file(".wh.a", b"")]),
        refused("a whiteout of nothing", [Item::file("d/.wh.", b"")]),
        refused("a whiteout of the directory", [Item::file("d/.wh..", b"")]),
        refused("a whiteout of the directory above", [Item::file("d/.wh...", b"")]),
        kept(
            "a whiteout below a symlink",
            [Item::dir("d"), Item::symlink("l", "d"), Item::file("l/.wh.a", b"")],
        ),
        kept("a link to a whiteout", [Item::file(".wh.a", b""), Item::hard_link("b", "a").mode(0o644)]),
    ]
}

fn attributes() -> Vec<Case> {
    vec![
        kept(
            "attributes that stay",
            [
                Item::file("a", b"x")
                    .xattr("security.capability", CAPABILITY)
                    .xattr("user.a", b"1\0\xff")
                    .xattr("user.empty", b"")
                    .xattr("security.other", b"x"),
                Item::dir("d").xattr("user.d", vec![b'v'; 3000]),
            ],
        ),
        kept(
            "attributes that are passed over",
            [
                Item::file("a", b"x")
                    .xattr("trusted.overlay.opaque", b"y")
                    .xattr("system.foo", b"x")
                    .xattr("plain", b"x"),
                Item::symlink("s", "a").xattr("user.s", b"1"),
                Item::new(b'6', "f").xattr("user.f", b"1"),
                Item::device(b'3', "c", 1, 1).xattr("user.c", b"1"),
            ],
        ),
        refused(
            "a capability that is none",
            [Item::file("a", b"").xattr("security.capability", b"\x01\0\0\x02")],
        ),
        refused("an attribute without a name", [Item::file("a", b"").xattr("", b"x")]),
        refused("an attribute with a prefix alone", [Item::file("a", b"").xattr("user.", b"x")]),
        refused(
            "an attribute's name too long",
            [Item::file("a", b"").xattr(format!("user.{}", "n".repeat(251)), b"x")],
        ),
        kept(
            "the longest name of an attribute",
            [Item::file("a", b"").xattr(format!("user.{}", "n".repeat(250)), b"x")],
        ),
        kept(
            "a group from a setgid directory",
            [
                Item::dir("d").mode(0o2755).owner(0, 50),
                Item { gid: u64::from(u32::MAX), ..Item::file("d/a", b"") },
                Item::file("d/implied/b", b""),
                Item { gid: u64::from(u32::MAX), ..Item::file("d/.wh.c", b"") },
            ],
        ),
    ]
}

fn formats() -> Vec<Case> {
    let v7 = |item: &Item| {
        let mut block = header(item);
        block[257..265].fill(0);
        seal(block)
    };
    let old_dir = v7(&Item { kind: 0, ..Item::dir("olddir/") });
    let old_file = v7(&Item { kind: 0, ..Item::file("oldfile", b"") });
    let gnu = |item: &Item| {
        let mut block = header(item);
        block[257..265].copy_from_slice(b"ustar  \0");
        seal(block)
    };
    let long = format!("{}\0", "l".repeat(120));
    let long_item = |kind| Item { data: long.clone().into_bytes(), ..Item::new(kind, "././@LongLink") };
    let mut prefixed = header(&Item::file("name", b""));
    prefixed[345..351].copy_from_slice(b"prefix");
    let mut star = header(&Item::file("name", b""));
    star[345..349].copy_from_slice(b"star");
    star[508..512].copy_from_slice(b"tar\0");
    let mut before_18 = gnu(&Item::file("name", b""));
    before_18[345..351].copy_from_slice(b"prefix");
    let duplicate = pax(&[(b"path".to_vec(), b"one".to_vec()), (b"path".to_vec(), b"two".to_vec())]);
    vec![
        raw("V7", Tar::new().bytes(&old_dir).bytes(&old_file).finish(), Fate::Kept),
        raw("a prefix", Tar::new().bytes(&seal(prefixed)).finish(), Fate::Kept),
        raw("a prefix of star", Tar::new().bytes(&seal(star)).finish(), Fate::Kept),
        raw("a prefix of Go before 1.8", Tar::new().bytes(&seal(before_18)).finish(), Fate::Kept),
        kept("a long name of GNU", [long_item(b'L'), Item::file("short", b"x")]),
        kept(
            "a long name of GNU before one of PAX",
            [long_item(b'L'), Item::file("s", b"").pax("path", "pax")],
        ),
        kept("a long link of GNU", [Item::file("f", b""), long_item(b'K'), Item::symlink("s", "short")]),
        kept(
            "an extended header twice: the second counts",
            [
                Item { data: pax(&[(b"path".to_vec(), b"first".to_vec())]), ..Item::new(b'x', "x") },
                Item { data: pax(&[(b"uid".to_vec(), b"5".to_vec())]), ..Item::new(b'x', "x") },
                Item::file("own", b""),
            ],
        ),
        kept(
            "a key twice: the second counts",
            [Item { data: duplicate, ..Item::new(b'x', "x") }, Item::file("a", b"")],
        ),
        kept(
            "an empty value keeps the header's",
            [Item::file("a", b"").pax("path", "").pax("uid", "").pax("mtime", "")],
        ),
        kept(
            "an extended header before a global one is lost",
            [
                Item { data: pax(&[(b"path".to_vec(), b"lost".to_vec())]), ..Item::new(b'x', "x") },
                Item { data: Vec::new(), ..Item::new(b'g', "global") },
                Item::file("a", b""),
            ],
        ),
        raw("no blocks of zeros", Tar::new().with(Item::file("a", b"x")).0, Fate::Kept),
        raw("one block of zeros", Tar::new().with(Item::file("a", b"x")).bytes(&[0; 512]).0, Fate::Kept),
        raw("an end in the padding", Tar::new().with(Item::file("a", b"x")).0[..700].to_vec(), Fate::Kept),
        raw(
            "more behind the end",
            {
                let tail = Tar::of([Item::file("b", b"x")]);
                Tar::new().with(Item::file("a", b"x")).bytes(&[0; 1024]).bytes(&tail).bytes(b"garbage").0
            },
            Fate::Kept,
        ),
    ]
}

/// Data of `length` bytes at `offset` of a file, as the tar holds it.
fn sparse() -> Vec<Case> {
    let sparse = |name: &str, version: (&str, &str), size: &str, data: &[u8]| {
        Item::file("GNUSparseFile.0/x", data)
            .pax("GNU.sparse.major", version.0)
            .pax("GNU.sparse.minor", version.1)
            .pax("GNU.sparse.name", name)
            .pax("GNU.sparse.realsize", size)
    };
    let mut in_data = [b"2\n4096\n5\n100000\n3\n".to_vec(), vec![0; 494], b"helloend".to_vec()].concat();
    in_data.truncate(520);
    let old = |realsize: &[u8], pairs: &[(&str, &str)], extended: u8, data: &[u8]| {
        let item = Item { data: data.to_vec(), ..Item::new(b'S', "old") };
        let mut block = header(&item);
        block[257..265].copy_from_slice(b"ustar  \0");
        block[345..].fill(0);
        for (at, (offset, length)) in pairs.iter().enumerate() {
            let at = 386 + at * 24;
            block[at..at + offset.len()].copy_from_slice(offset.as_bytes());
            block[at + 12..at + 12 + length.len()].copy_from_slice(length.as_bytes());
        }
        block[482] = extended;
        block[483..483 + realsize.len()].copy_from_slice(realsize);
        seal(block)
    };
    let mut more = [0; 512];
    more[..5].copy_from_slice(b"20000");
    more[12..13].copy_from_slice(b"3");
    let padded = |data: &[u8]| [data, &vec![0; 512 - data.len()]].concat();
    vec![
        kept(
            "a sparse file, 0.0",
            [Item::file("a", b"helloend")
                .pax("GNU.sparse.size", "200000")
                .pax("GNU.sparse.numblocks", "2")
                .pax("GNU.sparse.offset", "4096")
                .pax("GNU.sparse.numbytes", "5")]
            .map(|mut item| {
                item.pax.push((b"GNU.sparse.offset".to_vec(), b"100000".to_vec()));
                item.pax.push((b"GNU.sparse.numbytes".to_vec(), b"3".to_vec()));
                item
            }),
        ),
        kept(
            "a sparse file, 0.1",
            [
                sparse("b", ("0", "1"), "200000", b"helloend")
                    .pax("GNU.sparse.numblocks", "2")
                    .pax("GNU.sparse.map", "4096,5,100000,3"),
                Item::file("after", b"it"),
            ],
        ),
        kept(
            "a sparse file, 1.0",
            [sparse("d/c", ("1", "0"), "200000", &in_data), Item::file("after", b"it")],
        ),
        kept(
            "a sparse file without data",
            [sparse("e", ("0", "1"), "70000", b"")
                .pax("GNU.sparse.numblocks", "0")
                .pax("GNU.sparse.map", "")],
        ),
        kept("a sparse file of an unknown version is its data", [sparse("f", ("2", "0"), "9", b"data")]),
        refused(
            "a sparse map beyond the file",
            [sparse("b", ("0", "1"), "10", b"hello")
                .pax("GNU.sparse.numblocks", "1")
                .pax("GNU.sparse.map", "8,5")],
        ),
        refused(
            "a sparse map with less data than it says",
            [sparse("b", ("0", "1"), "100", b"he")
                .pax("GNU.sparse.numblocks", "1")
                .pax("GNU.sparse.map", "8,5")],
        ),
        refused(
            "a sparse map with more data than it says",
            [sparse("b", ("0", "1"), "100", b"hello you")
                .pax("GNU.sparse.numblocks", "1")
                .pax("GNU.sparse.map", "8,5")],
        ),
        refused(
            "a sparse map that counts wrong",
            [sparse("b", ("0", "1"), "100", b"hello")
                .pax("GNU.sparse.numblocks", "2")
                .pax("GNU.sparse.map", "8,5")],
        ),
        refused("a sparse map in the data without an end", [sparse("b", ("1", "0"), "100", &[b'1'; 1024])]),
        raw(
            "an old sparse file",
            {
                let block = old(b"40000", &[("0", "5"), ("10000", "3")], 1, b"helloendxyz");
                Tar::new().bytes(&block).bytes(&more).bytes(&padded(b"helloendxyz")).finish()
            },
            Fate::KeptHere,
        ),
        raw(
            "an old sparse file that is none of GNU's",
            {
                Tar::new()
                    .bytes(&seal({
                        let mut block = old(b"10", &[], 0, b"");
                        block[257..265].copy_from_slice(b"ustar\x0000");
                        block
                    }))
                    .finish()
            },
            Fate::Refused,
        ),
    ]
}

fn broken() -> Vec<Case> {
    let whole = Tar::of([Item::file("a", [1; 2000])]);
    let mut flipped = whole.clone();
    flipped[3] ^= 1;
    let mut between = Tar::new().with(Item::file("a", b"")).bytes(&[0; 512]);
    between = between.with(Item::file("b", b""));
    let records = |data: &[u8]| {
        let item = Item { data: data.to_vec(), ..Item::new(b'x', "x") };
        Tar::new().with_raw(&item).with(Item::file("a", b"")).finish()
    };
    let mut number = header(&Item::file("a", b""));
    number[124..136].copy_from_slice(b"0000000000z\0");
    let mut dev = header(&Item::file("a", b""));
    dev[329..337].copy_from_slice(b"garbage\0");
    vec![
        raw("no tar", vec![b'x'; 2048], Fate::Refused),
        raw("less than a block", vec![b'x'; 100], Fate::Refused),
        raw("an end in a header", whole[..300].to_vec(), Fate::Refused),
        raw("an end in the data", whole[..1500].to_vec(), Fate::Refused),
        raw("an end behind an extended header", Tar::of([Item::new(b'x', "x")])[..512].to_vec(), Fate::Kept),
        raw("a wrong checksum", flipped, Fate::Refused),
        raw("a block of zeros between entries", between.finish(), Fate::Refused),
        raw("a size that is none", Tar::new().bytes(&seal(number)).finish(), Fate::Refused),
        raw("a device number that is none", Tar::new().bytes(&seal(dev)).finish(), Fate::Refused),
        raw("a record without a length", records(b"path=a\n"), Fate::Refused),
        raw("a record without an end", records(b"9 path=a"), Fate::Refused),
        raw("a record too long", records(b"99 path=a\n"), Fate::Refused),
        raw(
            "a size beyond all",
            Tar::of([Item { size: Some((1 << 63) - 1), ..Item::file("a", b"") }]),
            Fate::Refused,
        ),
    ]
}
