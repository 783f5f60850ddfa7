//! What a lower layer has at a path: the same, be it an image or files, and never what is outside.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use speedy::image::below::{Found, in_directory, in_image};
use speedy::image::check::{Metadata, Parts};

use crate::maker::{Image, Maker, Node};

fn ask_image(image: &Image, path: &str) -> std::io::Result<Found> {
    let size = |offset: u64| usize::try_from(offset).unwrap();
    let metadata_at = image.layout.metadata.start;
    let parts = Parts { head: &image.bytes[..size(4096)], metadata: image.metadata(), metadata_at };
    let metadata = Metadata::open(parts, &image.layout).unwrap();
    in_image(&metadata, &names(path))
}

fn names(path: &str) -> Vec<&[u8]> {
    path.split('/').filter(|name| !name.is_empty()).map(str::as_bytes).collect()
}

/// The same layer as an image and as files.
struct Both {
    image: Image,
    files: tempfile::TempDir,
}

impl Both {
    fn new(directories: &[&str], plain: &[&str], links: &[(&str, &str)]) -> Both {
        let files = tempfile::tempdir().unwrap();
        let mut maker = Maker::new();
        for (n, path) in directories.iter().enumerate() {
            let mode = 0o700 + u16::try_from(n).unwrap();
            maker = maker.with(path, Node { mode: 0o040_000 | mode, ..Node::dir() });
            fs::create_dir(files.path().join(path)).unwrap();
            let mode = fs::Permissions::from_mode(mode.into());
            fs::set_permissions(files.path().join(path), mode).unwrap();
        }
        for path in plain {
            maker = maker.with(path, Node::file(b""));
            fs::write(files.path().join(path), "").unwrap();
        }
        for (path, target) in links {
            maker = maker.with(path, Node::symlink(target.as_bytes()));
            symlink(target, files.path().join(path)).unwrap();
        }
        Both { image: maker.make(), files }
    }

    /// The mode of the directory, which tells which one it is; what else there is; nothing after an error.
    fn ask(&self, path: &str) -> Result<u16, Option<Found>> {
        let from_files = in_directory(self.files.path(), &names(path));
        let from_image = ask_image(&self.image, path);
        match (from_files, from_image) {
            (Ok(Found::Directory(a)), Ok(Found::Directory(b))) => {
                assert_eq!(a.mode, b.mode, "{path}");
                Ok(a.mode)
            }
            (Err(a), Err(b)) => {
                assert_eq!(a.to_string(), b.to_string(), "{path}");
                Err(None)
            }
            (a, b) => {
                let (a, b) = (a.unwrap(), b.unwrap());
                assert_eq!(a, b, "{path}");
                Err(Some(a))
            }
        }
    }
}

#[test]
fn links_are_followed_inside_the_layer() {
    let layer = Both::new(
        &["usr", "usr/lib", "etc", "usr/deep", "usr/deep/er"],
        &["file"],
        &[
            ("lib", "usr/lib"),
            ("abs", "/usr"),
            ("chain", "abs/deep"),
            ("up", "../../../etc"),
            ("usr/side", "../etc"),
            ("dangling", "nowhere"),
            ("loop", "loop"),
            ("to-file", "file"),
            ("host", "/proc"),
        ],
    );
    let (usr, lib, etc, deep, deeper) = (0o700, 0o701, 0o702, 0o703, 0o704);
    for (path, mode) in [
        ("usr", usr),
        ("lib", lib),
        ("abs/lib", lib),
        ("chain", deep),
        ("chain/er", deeper),
        ("up", etc),
        ("usr/side", etc),
        ("abs/side", etc),
    ] {
        assert_eq!(layer.ask(path), Ok(mode), "{path}");
    }
    for path in ["none", "usr/none", "dangling", "dangling/x", "host", "host/self", "up/ssl"] {
        assert_eq!(layer.ask(path), Err(Some(Found::Nothing)), "{path}");
    }
    for path in ["file", "to-file", "file/x", "to-file/x/y"] {
        assert_eq!(layer.ask(path), Err(Some(Found::Other)), "{path}");
    }
    for path in ["loop", "loop/x"] {
        assert_eq!(layer.ask(path), Err(None), "{path}");
    }
}

/// One path could be followed for minutes: 255 links, each as long as a path can be, were all walked through, and again for every
/// directory that a layer on top implied.
#[test]
fn links_are_not_followed_for_ever() {
    let name = |n: usize| format!("l{n:02}");
    let chain = |length: usize| -> Vec<(String, String)> {
        let link = |n| (name(n), if n + 1 == length { "end".into() } else { name(n + 1) });
        (0..length).map(link).collect()
    };
    let ask = |links: &[(String, String)]| {
        let links: Vec<(&str, &str)> = links.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        Both::new(&["d", "end"], &[], &links).ask(&name(0))
    };
    assert_eq!(ask(&chain(40)), Ok(0o701));
    assert_eq!(ask(&chain(41)), Err(None), "as the kernel");
    // Each pass would be longer than the last.
    let long =
        (0..39).map(|n| (name(n), format!("/{}{}", "d/../".repeat(700), name(n + 1)))).collect::<Vec<_>>();
    assert_eq!(ask(&long), Err(None));
}

#[test]
fn attributes_come_with_the_directory() {
    let root = Node::dir().owner(5, 6);
    let node = Node { mode: 0o043_751, ..Node::dir().owner(1, 2) }.xattr(1, b"a", b"b").opaque();
    let image = Maker::new().root(root).with("d", node).with("w", Node::whiteout()).make();
    let Ok(Found::Directory(found)) = ask_image(&image, "d") else { panic!() };
    assert_eq!((found.mode, found.uid, found.gid, found.xattrs.len()), (0o3751, 1, 2, 2));
    let Ok(Found::Directory(found)) = ask_image(&image, "") else { panic!() };
    assert_eq!((found.uid, found.gid), (5, 6));
    assert_eq!(ask_image(&image, "w").unwrap(), Found::Other);
    assert!(in_directory(Path::new("/nonexistent"), &[]).is_err());
}

/// Small trees full of links, every path of three names.
#[test]
fn image_and_files_agree() {
    let mut state = 0x9e37_79b9_u64;
    let mut random = |limit: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state >> 33).unwrap() % limit
    };
    let names = ["a", "b", "c"];
    let mut directories_found = 0;
    for _ in 0..15 {
        let (mut directories, mut plain, mut links): (Vec<String>, Vec<String>, Vec<(String, String)>) =
            Default::default();
        for top in names {
            let mut paths = vec![top.to_owned()];
            while let Some(path) = paths.pop() {
                let other = format!("{}/{}", names[random(3)], names[random(3)]);
                match random(6) {
                    0 | 1 if path.len() < 5 => {
                        paths.extend(names.map(|name| format!("{path}/{name}")));
                        directories.push(path);
                    }
                    2 => plain.push(path),
                    3 => links.push((path, format!("/{other}"))),
                    4 => links.push((path, format!("../{other}"))),
                    5 => links.push((path, ["..", ".", "a", "b", "c/.."][random(5)].to_owned())),
                    _ => {}
                }
            }
        }
        directories.sort();
        let directories: Vec<&str> = directories.iter().map(String::as_str).collect();
        let plain: Vec<&str> = plain.iter().map(String::as_str).collect();
        let links: Vec<(&str, &str)> = links.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        let layer = Both::new(&directories, &plain, &links);
        for n in 0..27 {
            let path = [names[n % 3], names[n / 3 % 3], names[n / 9]].join("/");
            // `ask` compares the two.
            for asked in [&path[..], &path[..3], &path[..1]] {
                directories_found += u32::from(layer.ask(asked).is_ok());
            }
        }
    }
    assert!(directories_found > 150, "{directories_found}");
}
