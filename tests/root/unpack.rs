//! A layer image written out onto what is below it is what an extraction of the layer makes there.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use speedy::image::below::{Found, in_directory};
use speedy::image::extract::{Durability, Extract, Whiteouts, extract, unpack};
use speedy::image::{Attributes, Below, Compression, EntryFault, ImageError, Limits, Source, build};

use crate::extract::{Random, Seen, tree};
use crate::maker::tars::{Item, Tar};
use crate::process::require_root;

const GO_ON: &(dyn Fn() -> bool + Sync) = &|| false;

/// What is below is all there is of it.
#[derive(Debug)]
pub(crate) struct Directory(pub(crate) PathBuf);

impl Below for Directory {
    fn directory(&self, path: &[&[u8]]) -> io::Result<Option<Attributes>> {
        Ok(match in_directory(&self.0, path)? {
            Found::Directory(attributes) => Some(attributes),
            Found::Nothing | Found::Other => None,
        })
    }
}

fn source(tar: &[u8]) -> Source<&[u8]> {
    Source { blob: tar, compression: Compression::Plain }
}

/// As layers are applied to volumes.
pub(crate) fn apply(tar: &[u8], dir: &Path) -> Result<(), ImageError> {
    let (whiteouts, durability, limits) = (Whiteouts::Remove, Durability::Unsynced, Limits::default());
    let how = Extract { whiteouts, below: &speedy::image::NothingBelow, limits: &limits, durability };
    extract(source(tar), dir, &how, GO_ON).map(drop)
}

/// The layer as an image, which is then written out.
fn apply_image(tar: &[u8], dir: &Path, scratch: &Path) -> Result<(), ImageError> {
    let path = scratch.join("layer.erofs");
    let image = fs::File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    let below = Directory(dir.to_owned());
    let facts = build(source(tar), &image, &below, &Limits::default(), GO_ON)?;
    unpack(&image, &facts.layout, dir, GO_ON)
}

struct Two {
    scratch: tempfile::TempDir,
}

impl Two {
    /// The same layer in two directories.
    fn with(below: &[Item]) -> Option<Two> {
        let two = Two { scratch: tempfile::Builder::new().prefix("spd").tempdir().unwrap() };
        for dir in [two.files(), two.image()] {
            fs::create_dir(&dir).unwrap();
            apply(&Tar::of(below), &dir).ok()?;
        }
        Some(two)
    }

    fn files(&self) -> PathBuf {
        self.scratch.path().join("files")
    }

    fn image(&self) -> PathBuf {
        self.scratch.path().join("image")
    }
}

/// What must be equal: an extraction leaves a directory that the layer only implies with the time of the extraction.
fn equal_part(dir: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = tree(dir);
    for seen in seen.values_mut().filter(|seen| seen.mode & 0o170_000 == 0o040_000) {
        seen.mtime = (0, 0);
    }
    seen
}

pub(crate) fn lower_layer() -> Vec<Item> {
    vec![
        Item::dir("etc").mode(0o2750).owner(3, 4).mtime(5).xattr("user.below", b"kept"),
        Item::file("etc/kept", b"kept"),
        Item::file("etc/removed", b"x"),
        Item::file("etc/replaced", b"old"),
        Item::dir("tree/deep/er"),
        Item::file("tree/deep/er/file", b"x"),
        Item::dir("opaque/sub"),
        Item::file("opaque/hidden", b"x"),
        Item::file("opaque/sub/hidden", b"x"),
        Item::dir("becomes-file"),
        Item::file("becomes-file/x", b"x"),
        Item::file("becomes-directory", b"x"),
        Item::symlink("usr-lib", "usr/lib"),
        Item::dir("usr/lib").mode(0o711).owner(9, 9),
    ]
}

pub(crate) fn upper_layer() -> Vec<Item> {
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut holes = vec![0; 300_000];
    holes[200_000] = 7;
    vec![
        Item::dir("etc").mode(0o700).owner(1, 2).mtime(42).xattr("user.above", b"new"),
        Item::file("etc/.wh.removed", b""),
        Item::file("etc/replaced", b"new").owner(1000, 2000).xattr("user.note", b"x").mtime(77),
        Item::file("bin/su", b"su").mode(0o4755).xattr("security.capability", &capability),
        Item::link("bin/also-su", "bin/su").mode(0o4711),
        Item::link("usr/lib/su", "bin/su").mode(0o4711),
        Item::file("usr/lib/holes", &holes),
        Item::file("tree/.wh.deep", b""),
        Item::dir("opaque"),
        Item::file("opaque/.wh..wh..opq", b""),
        Item::dir("opaque/sub").mode(0o1777),
        Item::file("opaque/sub/seen", b"x"),
        Item::file("becomes-file", b"file"),
        Item::dir("becomes-directory").mode(0o711),
        Item::file("becomes-directory/x", b"x"),
        Item { device: (1, 3), ..Item::new(b'3', "dev/null").mode(0o666) },
        Item { device: (8, 257), ..Item::new(b'4', "dev/disk") },
        Item::new(b'6', "run/fifo").mode(0o1600),
        Item::symlink("run/link", "../etc").owner(5, 6).mtime(88),
        Item::link("run/same-link", "run/link").owner(5, 6).mtime(88),
        Item::file("empty", b"").pax("mtime", b"1234567890.123456789"),
    ]
}

#[test]
fn an_image_is_written_out_as_its_layer_is_extracted() {
    require_root();
    let two = Two::with(&lower_layer()).unwrap();
    let tar = Tar::of(&upper_layer());
    apply(&tar, &two.files()).unwrap();
    apply_image(&tar, &two.image(), two.scratch.path()).unwrap();
    let (files, image) = (equal_part(&two.files()), equal_part(&two.image()));
    for path in files.keys().chain(image.keys()) {
        assert_eq!(files.get(path), image.get(path), "{}", path.display());
    }
    let times = tree(&two.image());
    assert_eq!(times[Path::new("etc")].mtime, (42, 0), "set after what is in it");
    let holes = fs::metadata(two.image().join("usr/lib/holes")).unwrap();
    assert!(std::os::unix::fs::MetadataExt::blocks(&holes) * 512 <= 128 * 1024, "zeros take no room");
}

#[test]
fn an_image_that_does_not_say_what_becomes_of_a_link_is_refused() {
    require_root();
    let two = Two::with(&lower_layer()).unwrap();
    for item in [Item::file("usr-lib/x", b"x"), Item::dir("usr-lib")] {
        let refused = apply_image(&Tar::of(&[item]), &two.image(), two.scratch.path());
        assert!(
            matches!(refused, Err(ImageError::Entry { fault: EntryFault::NotADirectory, .. })),
            "{refused:?}"
        );
    }
    let stopped = {
        let path = two.scratch.path().join("layer.erofs");
        let image = fs::File::open(path).unwrap();
        let layout = speedy::image::Layout::of_image(&image).unwrap();
        unpack(&image, &layout, &two.image(), &|| true)
    };
    assert!(matches!(stopped, Err(ImageError::Cancelled)), "{stopped:?}");
}

#[test]
fn generated_layers_are_written_out_as_they_are_extracted() {
    require_root();
    let mut random = Random(0xb10c);
    let (mut equal, mut refused) = (0, 0);
    for round in 0..3000 {
        let mut items = || -> Vec<Item> { (0..1 + random.below(6)).map(|_| random.item()).collect() };
        let (below, above) = (items(), items());
        // What a whiteout removes of its own layer depends on the order, which an image does not know.
        let hidden = |item: &Item| item.name.contains(".wh.");
        // A header for all that follows removes a file of its name, which an image does not know either.
        if above.iter().any(|item| item.kind == b'g')
            || (above.iter().any(hidden) && !above.iter().all(hidden))
        {
            continue;
        }
        // So does what a layer has twice, or below something that is no directory.
        let is_again = |(at, item): (usize, &Item)| {
            let inside = format!("{}/", item.name);
            let others = above.iter().enumerate().filter(|(other, _)| *other != at);
            others
                .map(|(_, other)| &other.name)
                .any(|name| *name == item.name || (item.kind != b'5' && name.starts_with(&inside)))
        };
        if above.iter().enumerate().any(is_again) {
            continue;
        }
        let Some(two) = Two::with(&below) else { continue };
        let tar = Tar::of(&above);
        let written = apply_image(&tar, &two.image(), two.scratch.path());
        if written.is_err() {
            refused += 1;
            continue;
        }
        // Something below a file of the layers below: an image shows a directory there, as an overlay would.
        match apply(&tar, &two.files()) {
            Err(ImageError::Entry { fault: EntryFault::NotADirectory, .. }) => continue,
            applied => applied.unwrap(),
        }
        equal += 1;
        let (files, image) = (equal_part(&two.files()), equal_part(&two.image()));
        let different: Vec<_> =
            (files.keys().chain(image.keys())).filter(|path| files.get(*path) != image.get(*path)).collect();
        let short = |items: &[Item]| -> Vec<String> {
            items.iter().map(|item| format!("{} {} {}", item.kind, item.name, item.link)).collect()
        };
        assert!(
            different.is_empty(),
            "round {round}: {different:?}: {:?} {:?}",
            short(&below),
            short(&above)
        );
    }
    println!("{equal} layers equal, {refused} refused");
    assert!(equal > 40, "{equal} {refused}");
}
