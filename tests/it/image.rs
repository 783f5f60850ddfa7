//! Layers become images: the same bytes every time, read back by a reader that is not ours, and bad ones are refused.

use std::fs::File;
use std::io::{Read, Write};

use proptest::prelude::*;
use speedy::image::{
    Attributes, Below, Compression, EntryFault, Facts, ImageError, Layout, Limit, Limits, NothingBelow,
    RESERVED, Source, TarFault, Unrepresentable, build, tar,
};

use crate::fuzz;
use crate::layers::cases::{self, CAPABILITY, Fate};
use crate::layers::seen::{self, Seen, Tree};
use crate::layers::{Item, Tar, image, image_on, random};

fn made(tar: &[u8]) -> (File, Facts) {
    let file = tempfile::tempfile().unwrap();
    let facts = image(tar, &file).unwrap();
    (file, facts)
}

fn bytes(mut file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn hash(file: &File) -> String {
    blake3::hash(&bytes(file)).to_string()
}

fn limited(tar: &[u8], limits: &Limits) -> Result<Facts, ImageError> {
    let source = Source { blob: tar, compression: Compression::Plain };
    build(source, &tempfile::tempfile().unwrap(), &NothingBelow, limits, &|| false)
}

#[test]
fn every_case_is_kept_or_refused_as_it_should_be() {
    for case in cases::all() {
        let file = tempfile::tempfile().unwrap();
        let result = image(&case.tar, &file);
        let is_kept = matches!(case.fate, Fate::Kept | Fate::KeptHere);
        assert_eq!(result.is_ok(), is_kept, "{}: {result:?}", case.name);
        match result {
            Ok(facts) => {
                let tree = seen::in_image(&file);
                assert_eq!(facts.inodes, seen::inodes(&tree), "{}", case.name);
                assert_eq!(facts.layout, Layout::of_image(&file).unwrap(), "{}", case.name);
                assert_eq!(facts.tar_size, case.tar.len() as u64);
            }
            Err(error) => assert!(!error.is_limit_of_images(), "{}: {error}", case.name),
        }
    }
}

#[test]
fn what_is_wrong_is_said() {
    let fault = |items: Vec<Item>| match image(&Tar::of(items), &tempfile::tempfile().unwrap()) {
        Err(ImageError::Entry { fault, path }) => (fault, path),
        other => panic!("{other:?}"),
    };
    let a = || Item::file("a", b"");
    assert_eq!(fault(vec![Item::file("x/../../b", b"")]), (EntryFault::Escapes, "x/../../b".into()));
    assert_eq!(fault(vec![a(), Item::file("a/b", b"")]), (EntryFault::NotADirectory, "a/b".into()));
    assert_eq!(fault(vec![Item::hard_link("b", "c")]).0, EntryFault::LinkTargetMissing);
    assert_eq!(fault(vec![Item::dir("a"), Item::hard_link("b", "a")]).0, EntryFault::LinkToDirectory);
    assert_eq!(fault(vec![a(), Item::file(".wh.a", b"")]).0, EntryFault::WhiteoutOccupied);
    assert_eq!(fault(vec![Item::file(".wh.", b"")]).0, EntryFault::WhiteoutName);
    assert_eq!(fault(vec![Item::symlink("a", "a"), Item::file("a/b", b"")]).0, EntryFault::SymlinkLoop);
    assert_eq!(fault(vec![Item::symlink("a", "")]).0, EntryFault::SymlinkTarget);
    assert_eq!(fault(vec![Item::new(b'7', "a")]).0, EntryFault::Type('7'));
    assert_eq!(fault(vec![Item::file("n".repeat(256), b"")]).0, EntryFault::NameTooLong);
    assert_eq!(fault(vec![Item::device(b'4', "a", 0, 1 << 33)]).0, EntryFault::DeviceNumber);
    assert_eq!(fault(vec![a().xattr("security.capability", b"x")]).0, EntryFault::Xattr);
    assert_eq!(fault(vec![Item::dir("a"), Item::symlink("a", "b")]).0, EntryFault::DirectoryGone);

    let tar_fault = |tar: &[u8]| match image(tar, &tempfile::tempfile().unwrap()) {
        Err(ImageError::Tar { fault, .. }) => fault,
        other => panic!("{other:?}"),
    };
    let whole = Tar::of([Item::file("a", [1; 2000])]);
    assert_eq!(tar_fault(&whole[..1000]), TarFault::Truncated);
    assert_eq!(tar_fault(&[b'x'; 512]), TarFault::Checksum);
    assert_eq!(
        tar_fault(&Tar::new().with_raw(&Item { data: b"9".into(), ..Item::new(b'x', "x") }).finish()),
        TarFault::Pax
    );
}

/// Whoever makes an image, wherever, must get these bytes: stores are shared between versions and machines. If this test has to
/// be changed, the format version of layer indexes must be, too.
#[test]
fn i1_the_bytes_of_an_image_are_fixed() {
    let layer = Tar::of([
        Item::dir("./").mtime(1_700_000_000),
        Item::dir("etc").mode(0o755).mtime(1_600_000_000),
        Item::file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n").owner(0, 42).mode(0o640),
        Item::file("usr/bin/ping", vec![0x7f; 10_000]).mode(0o755).xattr("security.capability", CAPABILITY),
        Item::file("usr/bin/ping6", vec![0x7f; 10_000]).mode(0o4755).xattr("user.note", b"same content"),
        Item::hard_link("usr/bin/ping4", "usr/bin/ping6").mode(0o4755),
        Item::symlink("bin", "usr/bin"),
        Item::file("var/.wh.cache", b""),
        Item::file("opt/.wh..wh..opq", b""),
        Item::device(b'3', "dev/null", 1, 3).mode(0o666).pax("mtime", "1500000000.123456789"),
        Item::file("zeros", vec![0; 40_000]),
    ]);
    let (first, facts) = made(&layer);
    let (second, _) = made(&layer);
    assert_eq!(hash(&first), hash(&second));
    assert_eq!(facts.bytes, 4096 + 12_288 + 40_960);
    assert_eq!(facts.attributes, None);
    assert_eq!(hash(&first), "1235277db6daf3bff7aa5c9bb0419c44e7bf1951169be07d6757c30abee35abc");
}

#[test]
fn i1_the_compression_makes_no_difference() {
    let layer = Tar::of((0..300).map(|n| Item::file(format!("d{}/f{n}", n % 7), vec![7; n * 37])));
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&layer).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = zstd::encode_all(&layer[..], 1).unwrap();
    let (plain, facts) = made(&layer);
    for blob in [&gzip, &zstd, &layer] {
        let file = tempfile::tempfile().unwrap();
        // What was there before is gone.
        file.set_len(100 << 20).unwrap();
        (&file).write_all(&[0xaa; 100_000]).unwrap();
        let source = Source { blob: &blob[..], compression: Compression::ByMagic };
        assert_eq!(build(source, &file, &NothingBelow, &Limits::default(), &|| false).unwrap(), facts);
        assert_eq!(hash(&file), hash(&plain));
    }
    let source = Source { blob: &gzip[..gzip.len() / 2], compression: Compression::ByMagic };
    let cut = build(source, &tempfile::tempfile().unwrap(), &NothingBelow, &Limits::default(), &|| false);
    assert!(matches!(cut, Err(ImageError::Compressed(_))), "{cut:?}");
}

#[test]
fn the_diff_id_is_that_of_every_byte() {
    let layer = [Tar::of([Item::file("a", b"x")]), b"what stands behind the end".to_vec()].concat();
    let (_, facts) = made(&layer);
    let mut sha256 = speedy::oci::Sha256::default();
    sha256.update(&layer);
    assert_eq!(facts.diff_id.0, sha256.digest());
    assert_eq!(facts.tar_size, layer.len() as u64);
    let (_, empty) = made(b"");
    assert!(empty.diff_id.to_string().starts_with("sha256:e3b0c44298fc1c14"));
}

#[test]
fn i2_head_and_tail_hold_nothing_of_the_layer() {
    let (file, facts) =
        made(&Tar::of([Item::file("a", vec![0xff; 100_000]), Item::file("b", vec![0xee; 1])]));
    let bytes = bytes(&file);
    let at = |offset: u64| usize::try_from(offset).unwrap();
    assert_eq!(bytes.len() as u64, facts.layout.size);
    assert!(bytes[..1024].iter().chain(&bytes[1152..at(RESERVED)]).all(|byte| *byte == 0));
    assert_eq!(facts.layout.metadata.end, facts.layout.size - RESERVED);
    assert!(bytes[at(facts.layout.metadata.end)..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_layout_is_read_back_or_refused() {
    let (file, facts) = made(&Tar::of([Item::file("a", b"x")]));
    assert_eq!(Layout::of_image(&file).unwrap(), facts.layout);
    let mut image = bytes(&file);
    let refused = |bytes: &[u8]| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        assert_eq!(Layout::of_image(&file).unwrap_err().kind(), std::io::ErrorKind::InvalidData);
    };
    refused(b"");
    refused(&image[..4096]);
    refused(&image[..image.len() - 1]);
    for (at, value) in
        [(1024, 0), (1024 + 12, 9), (1024 + 80, 1), (1024 + 36, 0xff), (1024 + 43, 0xff), (1024 + 41, 0)]
    {
        let before = std::mem::replace(&mut image[at], value);
        refused(&image);
        image[at] = before;
    }
}

#[test]
fn files_that_come_again_take_no_room() {
    let big = |byte: u8| vec![byte; 3 << 20];
    let layer = Tar::of([
        Item::file("a", big(1)),
        Item::file("b", big(1)),
        Item::file("c", vec![0; 3 << 20]),
        Item::file("d", big(1)),
        Item::file("e", b"small"),
    ]);
    let (file, facts) = made(&layer);
    assert_eq!(facts.bytes, (6 << 20) + 4096);
    let tree = seen::in_image(&file);
    assert_eq!(tree[&b"b"[..]].content, blake3::hash(&big(1)).as_bytes());
    assert_eq!(tree[&b"c"[..]].content, blake3::hash(&vec![0; 3 << 20]).as_bytes());
    assert_eq!(tree[&b"e"[..]].content, blake3::hash(b"small").as_bytes());
    // Zeros take none on the disk either, where the file system can leave them out.
    use std::os::unix::fs::MetadataExt;
    assert!(file.metadata().unwrap().blocks() * 512 < (4 << 20));
}

#[test]
fn a_file_beyond_four_gigabytes() {
    let size = (5_u64 << 30) + 1;
    let layer = Tar::of([
        Item::file("x", b"begin|end")
            .pax("GNU.sparse.major", "0")
            .pax("GNU.sparse.minor", "1")
            .pax("GNU.sparse.name", "huge")
            .pax("GNU.sparse.realsize", size.to_string())
            .pax("GNU.sparse.numblocks", "2")
            .pax("GNU.sparse.map", format!("0,6,{},3", size - 3)),
        Item::file("after", b"it"),
    ]);
    let (file, facts) = made(&layer);
    assert_eq!(facts.bytes, (5 << 30) + 4096 + 4096);
    let mut end = [0; 3];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut end, RESERVED + size - 3).unwrap();
    assert_eq!(&end, b"end");
}

/// Directories below, by path.
struct Directories(Vec<(&'static str, Attributes)>);

impl Below for Directories {
    fn directory(&self, path: &[&[u8]]) -> std::io::Result<Option<Attributes>> {
        let path = String::from_utf8(path.join(&b'/')).unwrap();
        if path == "broken" {
            return Err(std::io::Error::from(std::io::ErrorKind::StorageFull));
        }
        Ok(self.0.iter().find(|(known, _)| *known == path).map(|(_, attributes)| attributes.clone()))
    }
}

fn directory(mode: u16, uid: u32, gid: u32) -> Attributes {
    Attributes { mode, uid, gid, xattrs: Vec::new() }
}

#[test]
fn implied_directories_take_their_attributes_from_below() {
    let xattr = |name: &[u8], value: &[u8]| tar::Xattr { name: name.into(), value: value.into() };
    let xattrs = vec![
        xattr(b"user.z", b"1"),
        xattr(b"trusted.overlay.opaque", b"y"),
        xattr(b"user.a", b"2"),
        // Of a name space that no image has: it was written without its prefix, which the checker refuses.
        xattr(b"btrfs.compression", b"x"),
    ];
    let below = Directories(vec![
        ("", directory(0o700, 5, 6)),
        ("srv", directory(0o2770, 7, 8)),
        ("srv/data", Attributes { xattrs, ..directory(0o1777, 9, 10) }),
        ("own", directory(0o700, 1, 1)),
    ]);
    let layer = Tar::of([
        Item::file("srv/data/new/file", b"x").mtime(77),
        Item::dir("own").mode(0o750).owner(2, 2),
        Item::file("elsewhere/file", b"y"),
    ]);
    let file = tempfile::tempfile().unwrap();
    let facts = image_on(&layer, &file, &below).unwrap();
    let tree = seen::in_image(&file);
    let look = |path: &str| {
        let seen = &tree[path.as_bytes()];
        (seen.mode & 0o7777, seen.uid, seen.gid)
    };
    assert_eq!((facts.root_uid, facts.root_gid), (5, 6));
    assert_eq!(look(""), (0o755, 5, 6), "the owner of the root below, and nothing else");
    assert_eq!(look("srv"), (0o2770, 7, 8));
    assert_eq!(look("srv/data"), (0o1777, 9, 10));
    assert_eq!(look("srv/data/new"), (0o755, 0, 0), "nobody below has it");
    assert_eq!(look("own"), (0o750, 2, 2), "it is in the layer");
    assert_eq!(tree[&b"srv/data"[..]].mtime, (77, 0), "the time of the entry that implies it");
    let names: Vec<_> = tree[&b"srv/data"[..]].xattrs.keys().collect();
    assert_eq!(names, [b"user.a", b"user.z"]);
    speedy::image::check::check(&file, &facts.layout).unwrap();
}

#[test]
fn the_key_says_what_was_taken_from_below() {
    let key = |items: &[Item], below: Vec<(&'static str, Attributes)>| {
        let file = tempfile::tempfile().unwrap();
        image_on(&Tar::of(items.to_vec()), &file, &Directories(below)).unwrap().attributes
    };
    let file = || Item::file("d/e/f", b"x");
    let odd = || directory(0o700, 0, 0);
    assert_eq!(key(&[file()], vec![]), None);
    assert_eq!(key(&[file()], vec![("d", directory(0o755, 0, 0)), ("", directory(0o700, 0, 0))]), None);
    let one = key(&[file()], vec![("d", odd())]);
    assert!(one.is_some());
    assert_eq!(one, key(&[Item::file("d/other", b"y")], vec![("d", odd()), ("unused", odd())]));
    assert_ne!(one, key(&[file()], vec![("d/e", odd())]));
    assert_ne!(one, key(&[file()], vec![("d", odd()), ("d/e", odd())]));
    assert_ne!(one, key(&[file()], vec![("d", directory(0o701, 0, 0))]));
    assert!(key(&[file()], vec![("", directory(0o755, 0, 1))]).is_some(), "the root's owner counts");
    assert_eq!(key(&[Item::dir("d"), file()], vec![("d", odd())]), None, "the layer says it itself");
    assert_eq!(key(&[file(), Item::dir("d")], vec![("d", odd())]), None, "the layer says it later");
    assert_eq!(key(&[file(), Item::file("d", b"")], vec![("d", odd())]), None, "nothing is left of it");
    // What a setgid directory gave to others stays theirs.
    let setgid = || directory(0o2755, 0, 50);
    assert!(key(&[file(), Item::dir("d")], vec![("d", setgid())]).is_some());
    // Below says what would have been otherwise: the group of the layer's own setgid directory.
    let parent = Item::dir("d").mode(0o2755).owner(0, 50);
    assert_eq!(key(&[parent.clone(), file()], vec![]), None);
    assert_eq!(key(&[parent.clone(), file()], vec![("d/e", directory(0o755, 0, 50))]), None);
    assert!(key(&[parent, file()], vec![("d/e", directory(0o755, 0, 0))]).is_some());

    let broken = image_on(
        &Tar::of([Item::file("broken/a", b"")]),
        &tempfile::tempfile().unwrap(),
        &Directories(vec![]),
    );
    assert!(matches!(broken, Err(ImageError::Below { .. })), "{broken:?}");
}

fn limit(result: Result<Facts, ImageError>) -> (Limit, bool) {
    match result {
        Err(error @ ImageError::Limit { limit, .. }) => (limit, error.is_limit_of_images()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_limit_is_said_and_kept() {
    let files = |count: usize| Tar::of((0..count).map(|n| Item::file(format!("f{n}"), vec![1; 5000])));
    let limits = || Limits { entries: 10, ..Limits::default() };
    limited(&files(10), &limits()).unwrap();
    assert_eq!(limit(limited(&files(11), &limits())), (Limit::Entries, true));
    let deep = Tar::of([Item::file("a/b/c/d/e/f/g/h/i/j/k", b"")]);
    assert_eq!(limit(limited(&deep, &limits())), (Limit::Entries, true));

    let limits = Limits { metadata: 20_000, ..Limits::default() };
    limited(&files(20), &limits).unwrap();
    assert_eq!(limit(limited(&files(2000), &limits)), (Limit::Metadata, true));
    let targets = Tar::of((0..10).map(|n| Item::symlink(format!("s{n}"), vec![b't'; 3000])));
    assert_eq!(limit(limited(&targets, &limits)), (Limit::Metadata, true));
    // The times of directories are set again at the end, so that an entry is remembered each time that it comes: a layer that
    // repeated one with a long path took memory without any limit.
    let again =
        |count: usize| Tar::of((0..count).map(|_| Item::dir(["d".repeat(200), "e".repeat(200)].join("/"))));
    let limits = Limits { metadata: 40_000, ..Limits::default() };
    limited(&again(50), &limits).unwrap();
    assert_eq!(limit(limited(&again(100), &limits)), (Limit::Metadata, true));

    let different = Tar::of((0..5_u8).map(|n| Item::file(format!("f{n}"), vec![n; 4096])));
    limited(&different, &Limits { data: 5 * 4096, ..Limits::default() }).unwrap();
    assert_eq!(
        limit(limited(&different, &Limits { data: 4 * 4096, ..Limits::default() })),
        (Limit::Data, true)
    );

    let plain = |plain| Limits { plain, ..Limits::default() };
    let layer = files(100);
    limited(&layer, &plain(layer.len() as u64)).unwrap();
    assert_eq!(limit(limited(&layer, &plain(layer.len() as u64 - 1))), (Limit::Plain, false));
    let hole = Tar::of([Item::file("x", b"")
        .pax("GNU.sparse.major", "0")
        .pax("GNU.sparse.minor", "1")
        .pax("GNU.sparse.realsize", i64::MAX.to_string())
        .pax("GNU.sparse.numblocks", "0")]);
    assert_eq!(limit(limited(&hole, &Limits::default())), (Limit::Plain, false), "holes count");

    let path = Tar::of([Item::file(vec!["d"; 100].join("/"), b"")]);
    assert_eq!(limit(limited(&path, &Limits { path: 150, ..Limits::default() })), (Limit::Path, false));
    let target = vec!["t"; 100].join("/");
    let link = Tar::of([Item::symlink("a", target), Item::file("a/b", b"")]);
    assert_eq!(limit(limited(&link, &Limits { path: 150, ..Limits::default() })), (Limit::Path, false));

    let value = Item::file("a", b"").xattr("user.a", vec![1; 600]).xattr("user.b", vec![1; 600]);
    let xattrs = |xattrs| Limits { xattrs, ..Limits::default() };
    limited(&Tar::of([value.clone()]), &xattrs(2000)).unwrap();
    assert_eq!(limit(limited(&Tar::of([value.clone()]), &xattrs(1000))), (Limit::Xattrs, true));
    let headers = Limits { headers: 1500, ..Limits::default() };
    assert_eq!(limit(limited(&Tar::of([value]), &headers)), (Limit::Headers, false));
}

#[test]
fn headers_that_never_end_are_refused() {
    let endless = (0..5000).fold(Tar::new(), |tar, _| tar.with_raw(&Item::new(b'x', "x")));
    assert_eq!(limit(limited(&endless.finish(), &Limits::default())), (Limit::Headers, false));
    let huge = Item { size: Some(1 << 40), ..Item::new(b'x', "x") };
    let huge = Tar::new().with_raw(&huge).finish();
    assert_eq!(limit(limited(&huge, &Limits::default())), (Limit::Headers, false));
}

#[test]
fn a_bomb_is_refused_by_its_ratio() {
    let zeros = Tar::of([Item::file("zeros", vec![0; 8 << 20])]);
    let bomb = zstd::encode_all(&zeros[..], 19).unwrap();
    let read = |limits: &Limits| {
        let source = Source { blob: &bomb[..], compression: Compression::ByMagic };
        build(source, &tempfile::tempfile().unwrap(), &NothingBelow, limits, &|| false)
    };
    read(&Limits::default()).unwrap();
    let limits = Limits { ratio: 100, ratio_from: 1 << 20, ..Limits::default() };
    assert_eq!(limit(read(&limits)), (Limit::Ratio, false));
    let large_enough = Limits { ratio: 100, ratio_from: 16 << 20, ..Limits::default() };
    read(&large_enough).unwrap();
}

#[test]
fn what_an_image_cannot_hold_may_still_be_extracted() {
    let reason = |item: Item| match image(&Tar::of([item]), &tempfile::tempfile().unwrap()) {
        Err(error @ ImageError::Unrepresentable { reason, .. }) => {
            assert!(error.is_limit_of_images());
            reason
        }
        other => panic!("{other:?}"),
    };
    let acl = Item::file("a", b"").xattr("system.posix_acl_access", b"\x02\0\0\0");
    assert_eq!(reason(acl), Unrepresentable::Acl);
    let value = Item::file("a", b"").xattr("user.x", vec![1; 65536]);
    assert_eq!(reason(value), Unrepresentable::XattrValue);
    let link = Item::symlink("a", vec![b't'; 4095]).xattr("security.x", vec![1; 23]);
    assert_eq!(reason(link), Unrepresentable::Symlink);
}

#[test]
fn cancelling_ends_it() {
    let layer = Tar::of([Item::file("a", vec![1; 4 << 20])]);
    let asked = std::sync::atomic::AtomicU32::new(0);
    let cancelled = || asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) > 3;
    let source = Source { blob: &layer[..], compression: Compression::Plain };
    let result = build(source, &tempfile::tempfile().unwrap(), &NothingBelow, &Limits::default(), &cancelled);
    assert!(matches!(result, Err(ImageError::Cancelled)), "{result:?}");
}

/// A blob that fails after a while.
struct Failing(u64);

impl Read for Failing {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0 = self.0.checked_sub(1).ok_or(std::io::ErrorKind::ConnectionReset)?;
        buffer.fill(0x1f);
        Ok(buffer.len())
    }
}

#[test]
fn errors_of_reading_and_writing_are_told_apart() {
    let read = |blob: Failing| {
        let source = Source { blob, compression: Compression::ByMagic };
        build(source, &tempfile::tempfile().unwrap(), &NothingBelow, &Limits::default(), &|| false)
    };
    assert!(matches!(read(Failing(0)), Err(ImageError::Read(_))));
    // Garbage comes first here, and it is the first error that counts.
    assert!(matches!(read(Failing(9)), Err(ImageError::Tar { .. })));
    let full = File::options().write(true).open("/dev/full").unwrap();
    let result = image(&Tar::of([Item::file("a", b"x")]), &full);
    assert!(matches!(result, Err(ImageError::Write(_))), "{result:?}");
}

#[test]
fn chunks_of_a_file_are_all_of_it() {
    let layer = Tar::of([Item::file("a", [1; 1000]), Item::dir("d"), Item::file("b", [2; 513])]);
    let limits = Limits::default();
    for piece in [1, 100, 512, 4096] {
        let mut source = std::io::BufReader::with_capacity(piece, &layer[..]);
        let mut reader = tar::Reader::new(&mut source, &limits);
        let mut files = Vec::new();
        while let Some(entry) = reader.next_entry().unwrap() {
            let mut data = Vec::new();
            // Every second byte string is left to be skipped.
            while let Some(tar::Chunk::Bytes(bytes)) = reader.chunk().unwrap() {
                data.extend_from_slice(bytes);
            }
            assert_eq!(data.len() as u64, entry.size);
            files.push(data);
        }
        assert_eq!(files, [vec![1; 1000], vec![], vec![2; 513]]);
    }
}

/// A layer without surprises, and the tree that it must become.
fn plain_layer() -> impl Strategy<Value = (Vec<u8>, Tree)> {
    let name = prop_oneof![
        4 => prop::collection::vec(1_u8..=255, 1..12),
        1 => prop::collection::vec(1_u8..=255, 200..255),
        1 => "[-!+ a-c.]{1,3}".prop_map(String::into_bytes),
    ];
    let name = name.prop_filter("a name", |name: &Vec<u8>| {
        !name.contains(&b'/') && name != b"." && name != b".." && !name.starts_with(b".wh.")
    });
    let xattr = (prop::collection::vec(1_u8..=255, 1..30), prop::collection::vec(any::<u8>(), 0..200));
    let node = (
        0_u8..12,
        any::<prop::sample::Index>(),
        (0_u32..0o10000, any::<u32>(), any::<u32>(), 0_u64..1 << 33, 0_u32..1_000_000_000),
        prop::collection::btree_map(
            xattr.clone().prop_map(|(name, _)| name),
            xattr.prop_map(|(_, value)| value),
            0..3,
        ),
        (prop::collection::vec(any::<u8>(), 0..20), 0_usize..30_000),
    );
    prop::collection::vec((name, node), 0..60).prop_map(|nodes| {
        let mut tree = Tree::new();
        let root = Seen {
            mode: 0o040_755,
            uid: 0,
            gid: 0,
            size: 0,
            content: Vec::new(),
            device: (0, 0),
            links: 2,
            same_as: None,
            mtime: (0, 0),
            xattrs: Default::default(),
        };
        let mut items = Vec::new();
        let mut directories = vec![Vec::new()];
        tree.insert(Vec::new(), root.clone());
        for (name, (kind, parent, (mode, uid, gid, seconds, nanoseconds), xattrs, (seed, size))) in nodes {
            let parent = parent.get(&directories).clone();
            let path = if parent.is_empty() { name } else { [&parent[..], b"/", &name].concat() };
            if tree.contains_key(&path) || path.len() > 4000 {
                continue;
            }
            let (uid, gid) = (uid.min(u32::MAX - 1), gid.min(u32::MAX - 1));
            let content: Vec<u8> =
                seed.iter().copied().cycle().take(if seed.is_empty() { 0 } else { size }).collect();
            let target = [b"t", &content[..content.len().min(4094)]].concat();
            let target: Vec<u8> = target.into_iter().map(|byte| byte.max(1)).collect();
            let device = (u32::from(kind) * 7, nanoseconds & 0xf_ffff);
            let mut item = match kind {
                0..=2 => Item::dir(&path),
                3..=6 => Item::file(&path, &content),
                7..=8 => Item::symlink(&path, &target),
                9 => Item { device: (device.0.into(), device.1.into()), ..Item::new(b'3', &path) },
                10 => Item { device: (device.0.into(), device.1.into()), ..Item::new(b'4', &path) },
                _ => Item::new(b'6', &path),
            };
            item = item
                .mode(mode)
                .owner(uid.into(), gid.into())
                .pax("mtime", format!("{seconds}.{nanoseconds:09}"));
            let mut seen =
                Seen { uid, gid, mtime: (seconds.cast_signed(), nanoseconds), links: 1, ..root.clone() };
            seen.mode = mode
                | match item.kind {
                    b'5' => 0o040_000,
                    b'0' => 0o100_000,
                    b'2' => 0o120_000,
                    b'3' => 0o020_000,
                    b'4' => 0o060_000,
                    _ => 0o010_000,
                };
            match item.kind {
                b'5' => {
                    seen.links = 2;
                    tree.get_mut(&parent).unwrap().links += 1;
                    directories.push(path.clone());
                }
                b'0' => {
                    seen.size = content.len() as u64;
                    seen.content = blake3::hash(&content).as_bytes().to_vec();
                }
                b'2' => {
                    seen.mode = 0o120_777;
                    seen.content = target;
                }
                b'3' | b'4' => seen.device = device,
                _ => {}
            }
            // A symlink with attributes may be too long for a block.
            if item.kind != b'2' {
                for (name, value) in xattrs.into_iter().filter(|(name, _)| !name.contains(&b'=')) {
                    let name = [b"security.x", &name[..]].concat();
                    item = item.xattr(&name, &value);
                    seen.xattrs.insert(name, value);
                }
            }
            items.push(item);
            tree.insert(path, seen);
        }
        if let Some(first) = items.first() {
            let mtime = &first.pax.iter().find(|(key, _)| key == b"mtime").unwrap().1;
            let (seconds, nanoseconds) = std::str::from_utf8(mtime).unwrap().split_once('.').unwrap();
            tree.get_mut(&Vec::new()).unwrap().mtime =
                (seconds.parse().unwrap(), nanoseconds.parse().unwrap());
        }
        (Tar::of(items), tree)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn i3_what_goes_in_is_what_another_reader_finds((layer, expected) in plain_layer()) {
        let (file, _) = made(&layer);
        let found = seen::in_image(&file);
        for (path, seen) in &expected {
            prop_assert_eq!(found.get(path), Some(seen), "{}", seen::shown(path));
        }
        prop_assert_eq!(found.len(), expected.len());
    }
}

#[test]
fn i1_random_layers_are_the_same_twice_and_readable() {
    let mut kept = 0;
    for seed in 0..1000 {
        let layer = random::layer(seed);
        let (first, second) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        match (image(&layer, &first), image(&layer, &second)) {
            (Ok(one), Ok(two)) => {
                assert_eq!(one, two, "seed {seed}");
                kept += 1;
                assert_eq!(seen::inodes(&seen::in_image(&first)), one.inodes, "seed {seed}");
                if seed % 10 == 0 {
                    assert_eq!(hash(&first), hash(&second), "seed {seed}");
                }
            }
            (Err(one), Err(two)) => assert_eq!(one.to_string(), two.to_string(), "seed {seed}"),
            (one, two) => panic!("seed {seed}: {one:?} and {two:?}"),
        }
    }
    assert!(kept > 200, "only {kept} of 1000 random layers are proper");
}

/// Reads an uncompressed layer with small limits; whatever it is, it must come to an end without a panic, and without memory
/// that the layer chose.
fn read_anything(layer: &[u8]) {
    let limits =
        Limits { plain: 1 << 20, data: 1 << 20, metadata: 1 << 20, entries: 1000, ..Limits::default() };
    let file = tempfile::tempfile().unwrap();
    let source = Source { blob: layer, compression: Compression::ByMagic };
    if build(source, &file, &NothingBelow, &limits, &|| false).is_ok() {
        seen::in_image(&file);
    }
}

/// Checksums are mended, or hardly any mutation would come farther than the first header.
fn with_checksums(layer: &[u8]) -> Vec<u8> {
    let mut layer = layer.to_vec();
    for block in layer.chunks_exact_mut(512) {
        if block[148..156].iter().filter(|byte| byte.is_ascii_digit()).count() >= 6 {
            let sealed = crate::layers::seal(block.try_into().unwrap());
            block.copy_from_slice(&sealed);
        }
    }
    layer
}

#[test]
fn fuzz_layers() {
    let cases = cases::all().into_iter().map(|case| case.tar).filter(|tar| tar.len() < 32 * 1024);
    let corpus: Vec<Vec<u8>> = cases.chain((0..50).map(random::layer)).collect();
    fuzz::run("layer", &corpus, |input| {
        read_anything(&with_checksums(input));
        read_anything(input);
    });
}
