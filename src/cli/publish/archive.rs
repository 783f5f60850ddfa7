//! What `docker save` writes: a tar of layers with a `manifest.json`.
//!
//! The archive is read once from header to header to learn where its entries are; layers are then read from their places. Old
//! archives have `<id>/layer.tar` and `<digest>.json`, newer ones `blobs/sha256/<digest>`; `manifest.json` names them in both.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use tar_core::EntryType;
use tar_core::parse::{Limits, ParseEvent, Parser};

use super::name;
use crate::containerd::manifest::{Descriptor, LONGEST_DOCUMENT, Layer, Manifest, Platform};
use crate::oci::Sha256;
use crate::sys::extent;

/// More entries than any archive of an image has.
const MOST_ENTRIES: usize = 100_000;
/// What is read for one header; with its extensions one may take more.
const HEADERS: usize = 64 * 1024;
/// More than a header with all its extensions takes within the parser's limits.
const LONGEST_HEADERS: usize = 4 << 20;
/// Docker's layers are tars whose first bytes tell how they are compressed.
const LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";

/// A place in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    offset: u64,
    size: u64,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    File(Place),
    Link(String),
}

/// An archive with the places of its entries.
#[derive(Debug)]
pub(super) struct Archive {
    file: Arc<File>,
    entries: BTreeMap<String, Entry>,
    images: Vec<ArchivedImage>,
}

#[derive(Debug, Deserialize)]
struct ArchivedImage {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "RepoTags", default)]
    tags: Option<Vec<String>>,
    #[serde(rename = "Layers", default)]
    layers: Vec<String>,
}

/// An image of the archive, with the places of its layers in their order.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) config: Descriptor,
    pub(super) platform: Platform,
    pub(super) layers: Vec<Layer>,
    places: Vec<Place>,
}

impl Archive {
    pub(super) fn open(path: &Path) -> anyhow::Result<Archive> {
        let file = File::open(path)?;
        let entries = index(&file).context("not an archive of `docker save`")?;
        let mut archive = Archive { file: Arc::new(file), entries, images: Vec::new() };
        let manifest = archive.document("manifest.json")?;
        archive.images = serde_json::from_slice(&manifest).context("manifest.json")?;
        Ok(archive)
    }

    /// The image with this name, or the only one there is.
    pub(super) fn image(&self, wanted: &str) -> anyhow::Result<Found> {
        let is_it = |image: &&ArchivedImage| {
            image.tags.iter().flatten().any(|tag| name::full(tag) == name::full(wanted))
        };
        let image = match (self.images.iter().find(is_it), self.images.as_slice()) {
            (Some(image), _) | (None, [image]) => image,
            (None, images) => {
                let tags: Vec<&str> =
                    images.iter().flat_map(|i| i.tags.iter().flatten()).map(String::as_str).collect();
                bail!("the archive has several images and none is {wanted}; it has {}", tags.join(", "));
            }
        };
        let config = self.document(&image.config)?;
        let mut hasher = Sha256::default();
        hasher.update(&config);
        let digest = hasher.digest();
        let said = image.config.trim_end_matches(".json").rsplit('/').next().unwrap_or_default();
        ensure!(digest.as_str().ends_with(said) && said.len() == 64, "{} is damaged", image.config);
        let places =
            image.layers.iter().map(|layer| self.place(layer)).collect::<anyhow::Result<Vec<_>>>()?;
        let manifest = Manifest {
            config: Descriptor {
                media_type: String::new(),
                digest: digest.clone(),
                size: config.len() as u64,
            },
            // What the blobs are called is not told; what they hold is checked by their diff IDs.
            layers: places
                .iter()
                .map(|place| Descriptor {
                    media_type: LAYER.into(),
                    digest: digest.clone(),
                    size: place.size,
                })
                .collect(),
        };
        let (layers, platform) = manifest.layers(&config)?;
        Ok(Found { config: manifest.config, platform, layers, places })
    }

    /// The bytes of a layer.
    pub(super) fn layer(&self, image: &Found, position: usize) -> anyhow::Result<impl Read + Send + use<>> {
        let place = image.places.get(position).copied().context("no such layer")?;
        Ok(Part { file: Arc::clone(&self.file), place })
    }

    fn place(&self, name: &str) -> anyhow::Result<Place> {
        let missing =
            || format!("the archive names {name} and does not have it: it is cut off or was changed");
        match self.entries.get(name).with_context(missing)? {
            Entry::File(place) => Ok(*place),
            Entry::Link(target) => match self.entries.get(target).with_context(missing)? {
                Entry::File(place) => Ok(*place),
                Entry::Link(_) => bail!("{name} is a link to a link"),
            },
        }
    }

    fn document(&self, name: &str) -> anyhow::Result<Vec<u8>> {
        let place = self.place(name)?;
        ensure!(place.size <= LONGEST_DOCUMENT, "{name} has {} bytes: more than a document has", place.size);
        let mut bytes = Vec::new();
        Part { file: Arc::clone(&self.file), place }.read_to_end(&mut bytes)?;
        ensure!(bytes.len() as u64 == place.size, "the archive ends in the middle of {name}");
        Ok(bytes)
    }
}

/// Where the entries of a tar are.
fn index(file: &File) -> anyhow::Result<BTreeMap<String, Entry>> {
    let mut parser = Parser::new(Limits { max_path_len: Some(4096), ..Limits::default() });
    let mut entries = BTreeMap::new();
    let (mut at, mut window) = (0_u64, HEADERS);
    let mut buffer = vec![0; window];
    loop {
        let length = extent::read_up_to(file, &mut buffer, at)?;
        match parser.parse(&buffer[..length])? {
            ParseEvent::NeedData { min_bytes } => {
                ensure!(length == window, "the archive ends in the middle of an entry");
                ensure!(min_bytes <= LONGEST_HEADERS, "an entry has endless headers");
                window = min_bytes.max(window + 1);
                buffer.resize(window, 0);
            }
            ParseEvent::GlobalExtensions { consumed, .. } => at += consumed as u64,
            ParseEvent::SparseEntry { .. } => bail!("the archive has a sparse file"),
            ParseEvent::End { .. } => return Ok(entries),
            ParseEvent::Entry { consumed, entry } => {
                let offset = at.saturating_add(consumed as u64);
                let place = Place { offset, size: entry.size };
                let name = normal(&entry.path_lossy());
                let found = match (entry.entry_type, entry.link_target_lossy()) {
                    (EntryType::Regular | EntryType::Continuous, _) => Some(Entry::File(place)),
                    (EntryType::Symlink, Some(target)) => Some(Entry::Link(beside(&name, &target))),
                    (EntryType::Link, Some(target)) => Some(Entry::Link(normal(&target))),
                    _ => None,
                };
                entries.extend(found.map(|found| (name, found)));
                ensure!(entries.len() <= MOST_ENTRIES, "the archive has more entries than an image has");
                at = offset.checked_add(entry.padded_size()).context("an entry without end")?;
            }
        }
    }
}

/// `./a//b/../c` as `a/c`; what leads out of the archive stays at its top.
fn normal(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// Where a symlink at `name` points.
fn beside(name: &str, target: &str) -> String {
    let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
    normal(&format!("{directory}/{target}"))
}

/// A part of a file as a file.
#[derive(Debug)]
struct Part {
    file: Arc<File>,
    place: Place,
}

impl Read for Part {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let length = usize::try_from(self.place.size).unwrap_or(usize::MAX).min(into.len());
        let read = self.file.read_at(&mut into[..length], self.place.offset)?;
        self.place.offset += read as u64;
        self.place.size -= read as u64;
        Ok(read)
    }
}
