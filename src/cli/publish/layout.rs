//! An OCI image layout: a directory of blobs with an `index.json`.
//!
//! Source: the OCI image specification, image-layout.md.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;

use crate::containerd::manifest::{Descriptor, LONGEST_DOCUMENT};
use crate::oci::{Digest, Sha256};

/// The annotation with a manifest's tag, and the one that containerd and BuildKit write with the full reference.
const TAG: &str = "org.opencontainers.image.ref.name";
const NAME: &str = "io.containerd.image.name";

/// A layout on disk.
#[derive(Debug)]
pub(super) struct Layout {
    directory: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Version {
    #[serde(rename = "imageLayoutVersion")]
    version: String,
}

#[derive(Debug, Deserialize)]
struct Index {
    manifests: Vec<Tagged>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Tagged {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

impl Layout {
    pub(super) fn open(directory: &Path) -> anyhow::Result<Layout> {
        let layout = Layout { directory: directory.to_owned() };
        let version: Version =
            serde_json::from_slice(&layout.file(Path::new("oci-layout"))?).context("oci-layout")?;
        ensure!(version.version.starts_with("1."), "OCI layout version {} is not known", version.version);
        Ok(layout)
    }

    /// What this tag names; without one, the only image there is. `wanted` is the name it is going to have, which may be the
    /// name that it has there.
    pub(super) fn target(&self, tag: Option<&str>, wanted: &str) -> anyhow::Result<Descriptor> {
        let index: Index =
            serde_json::from_slice(&self.file(Path::new("index.json"))?).context("index.json")?;
        let has = |entry: &&Tagged, annotation: &str, text: &str| {
            entry.annotations.get(annotation).is_some_and(|value| value == text)
        };
        let chosen = match (tag, index.manifests.as_slice()) {
            (Some(tag), entries) => entries.iter().find(|entry| has(entry, TAG, tag)),
            (None, [only]) => Some(only),
            (None, entries) => {
                let mut named =
                    entries.iter().filter(|entry| has(entry, NAME, wanted) || has(entry, TAG, wanted));
                named.next()
            }
        };
        let Some(chosen) = chosen else {
            let tags: Vec<&str> = index
                .manifests
                .iter()
                .filter_map(|entry| entry.annotations.get(TAG))
                .map(String::as_str)
                .collect();
            bail!(
                "the layout has several images or not this one; choose with DIR:TAG of {}",
                tags.join(", ")
            );
        };
        let digest =
            Digest::parse(&chosen.digest).with_context(|| format!("{:?} in index.json", chosen.digest))?;
        Ok(Descriptor { media_type: chosen.media_type.clone(), digest, size: chosen.size })
    }

    /// The bytes of a document, which have this digest.
    pub(super) fn document(&self, digest: &Digest) -> anyhow::Result<Vec<u8>> {
        let bytes = self.file(&blob(digest))?;
        let mut hasher = Sha256::default();
        hasher.update(&bytes);
        ensure!(hasher.digest() == *digest, "blob {digest} of the layout is damaged");
        Ok(bytes)
    }

    /// The bytes of a layer, unchecked.
    pub(super) fn layer(&self, digest: &Digest) -> anyhow::Result<File> {
        let path = self.directory.join(blob(digest));
        File::open(&path)
            .with_context(|| format!("{}: the layout lacks a layer of the image", path.display()))
    }

    fn file(&self, name: &Path) -> anyhow::Result<Vec<u8>> {
        let path = self.directory.join(name);
        let context = || format!("{}: not an OCI image layout, or not a whole one", path.display());
        let mut bytes = Vec::new();
        File::open(&path)
            .with_context(context)?
            .take(LONGEST_DOCUMENT + 1)
            .read_to_end(&mut bytes)
            .with_context(context)?;
        ensure!(bytes.len() as u64 <= LONGEST_DOCUMENT, "{} is longer than a document is", path.display());
        Ok(bytes)
    }
}

fn blob(digest: &Digest) -> PathBuf {
    Path::new("blobs").join(digest.as_str().replacen(':', "/", 1))
}
