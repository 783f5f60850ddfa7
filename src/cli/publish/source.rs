//! Where an image's documents and blobs are: containerd, an OCI layout, or a docker archive.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};

use super::archive::{self, Archive};
use super::layout::Layout;
use super::name;
use crate::containerd::manifest::{
    Descriptor, Document as Parsed, LONGEST_DOCUMENT, Layer, Manifest, Platform, read_document,
};
use crate::containerd::{Containerd, ContainerdError};
use crate::content::document::Document;
use crate::oci::Digest;

/// How deep indexes may lie in indexes.
const DEPTH: usize = 4;
/// Where else an image is looked for when it is not found, to say so.
const OTHER_NAMESPACES: [&str; 3] = ["k8s.io", "default", "moby"];
/// How long the lease on an image's blobs lives should nobody be there to end it.
const LEASE: Duration = Duration::from_secs(60 * 60);

/// An image that is to be published.
#[derive(Debug, Clone)]
pub(super) struct Image {
    /// Its full reference.
    pub(super) reference: String,
    pub(super) platform: Platform,
    /// What its name points at.
    pub(super) target: Descriptor,
    /// Its manifest; its configuration, without a media type, where there is no manifest.
    pub(super) manifest: Descriptor,
    /// From the target down to the configuration; none where there is no manifest, because no registry would have them.
    pub(super) documents: Vec<Document>,
    /// From the bottom up.
    pub(super) layers: Vec<Layer>,
}

/// Where it comes from.
#[derive(Debug)]
pub(super) enum Source {
    Containerd { client: Containerd, content: Option<PathBuf>, lease: String },
    Layout { layout: Layout, tag: Option<String> },
    Archive { archive: Archive, image: Option<archive::Found> },
}

impl Source {
    pub(super) async fn containerd(socket: &Path, namespace: &str) -> anyhow::Result<Source> {
        let client = connect(socket, namespace).await?;
        let content = client.content_root().await;
        Ok(Source::Containerd { client, content, lease: format!("speedy-publish-{}", std::process::id()) })
    }

    /// `DIR` or `DIR:TAG`.
    pub(super) fn layout(text: &str) -> anyhow::Result<Source> {
        let (directory, tag) = match text.rsplit_once(':') {
            Some((directory, tag)) if !Path::new(text).is_dir() && !tag.contains('/') => {
                (directory, Some(tag.to_owned()))
            }
            _ => (text, None),
        };
        Ok(Source::Layout { layout: Layout::open(Path::new(directory))?, tag })
    }

    pub(super) fn archive(path: &Path) -> anyhow::Result<Source> {
        let archive = Archive::open(path).with_context(|| path.display().to_string())?;
        Ok(Source::Archive { archive, image: None })
    }

    /// Finds the image; from then on its blobs stay until [`Source::end`], where that is in anybody's hand.
    pub(super) async fn image(&mut self, wanted: &str, platform: &Platform) -> anyhow::Result<Image> {
        if let Source::Archive { archive, image } = self {
            let found = archive.image(wanted)?;
            let described = Image {
                reference: name::full(wanted),
                platform: found.platform.clone(),
                target: found.config.clone(),
                manifest: found.config.clone(),
                documents: Vec::new(),
                layers: found.layers.clone(),
            };
            *image = Some(found);
            return Ok(described);
        }
        let (reference, target) = self.target(wanted).await?;
        if let Source::Containerd { client, lease, .. } = self {
            client.create_lease(lease, LEASE).await?;
        }
        let found = self.manifest(target.clone(), platform).await.with_context(|| reference.clone())?;
        let (parsed, manifest, mut documents) = found;
        let config = self.document(&parsed.config.digest).await?;
        let (layers, platform) = parsed.layers(&config)?;
        documents.push(Document::of(config.into()));
        if let Source::Containerd { client, lease, .. } = self {
            for layer in &layers {
                if client.blob(&layer.blob.digest).await?.is_some() {
                    client.lease_blob(lease, &layer.blob.digest).await?;
                }
            }
        }
        Ok(Image { reference, platform, target, manifest, documents, layers })
    }

    /// The bytes of a layer's blob, to be read on a thread that may block.
    pub(super) async fn open(&self, image: &Image, position: usize) -> anyhow::Result<Box<dyn Read + Send>> {
        let layer = image.layers.get(position).context("no such layer")?;
        match self {
            Source::Containerd { client, content, .. } => {
                match client.open_blob(&layer.blob.digest, content.as_deref()).await {
                    Ok(blob) => Ok(Box::new(blob)),
                    Err(error @ ContainerdError::NoBlob { .. }) => Err(error).context(format!(
                        "containerd has unpacked the image but not kept this layer (discard_unpacked_layers), or never fetched \
                         it; bring its blobs with `speedy fetch --namespace {} {}`",
                        client.namespace(),
                        image.reference
                    )),
                    Err(error) => Err(error.into()),
                }
            }
            Source::Layout { layout, .. } => Ok(Box::new(layout.layer(&layer.blob.digest)?)),
            Source::Archive { archive, image } => {
                Ok(Box::new(archive.layer(image.as_ref().context("no image was chosen")?, position)?))
            }
        }
    }

    /// The blobs may go.
    pub(super) async fn end(&self) {
        if let Source::Containerd { client, lease, .. } = self
            && let Err(error) = client.delete_lease(lease).await
        {
            tracing::debug!(%error, "a lease stays until it expires");
        }
    }

    async fn target(&self, wanted: &str) -> anyhow::Result<(String, Descriptor)> {
        match self {
            Source::Containerd { client, .. } => {
                let image = find_image(client, wanted).await?;
                Ok((image.name, image.target))
            }
            Source::Layout { layout, tag } => {
                let reference = name::full(wanted);
                let target = layout.target(tag.as_deref(), &reference)?;
                Ok((reference, target))
            }
            Source::Archive { .. } => bail!("an archive has no index"),
        }
    }

    async fn manifest(
        &self,
        target: Descriptor,
        platform: &Platform,
    ) -> anyhow::Result<(Manifest, Descriptor, Vec<Document>)> {
        let (mut target, mut documents) = (target, Vec::new());
        for _ in 0..DEPTH {
            let bytes = self.document(&target.digest).await?;
            let parsed = read_document(&bytes, &target.digest, platform)?;
            documents.push(Document::of(bytes.into()));
            match parsed {
                Parsed::Manifest(manifest) => return Ok((manifest, target, documents)),
                Parsed::Index(next) => target = next,
            }
        }
        bail!("indexes lie in indexes deeper than {DEPTH}")
    }

    async fn document(&self, digest: &Digest) -> anyhow::Result<Vec<u8>> {
        match self {
            Source::Containerd { client, .. } => {
                let read = client.read(digest, LONGEST_DOCUMENT).await;
                Ok(read.context("a document of the image; was it pulled for this platform?")?.into())
            }
            Source::Layout { layout, .. } => layout.document(digest),
            Source::Archive { .. } => bail!("an archive has no blobs by digest"),
        }
    }
}

/// A client of the containerd that listens there.
pub(in crate::cli) async fn connect(socket: &Path, namespace: &str) -> anyhow::Result<Containerd> {
    let client = Containerd::open(socket, namespace).await;
    client.with_context(|| format!("{}; is containerd running, and is this its socket?", socket.display()))
}

/// The image that containerd knows by this name, short or full; an error that says what may have been meant.
pub(in crate::cli) async fn find_image(
    client: &Containerd,
    wanted: &str,
) -> anyhow::Result<crate::containerd::image::Image> {
    for name in [wanted.to_owned(), name::full(wanted)] {
        if let Some(image) = client.image(&name).await? {
            return Ok(image);
        }
    }
    bail!("{}", not_found(client, wanted).await?)
}

/// What to tell somebody whose image is not there.
async fn not_found(client: &Containerd, wanted: &str) -> anyhow::Result<String> {
    let mut text = format!("containerd has no image {wanted:?} in namespace {}", client.namespace());
    for namespace in OTHER_NAMESPACES.into_iter().filter(|namespace| *namespace != client.namespace()) {
        let other = client.in_namespace(namespace)?;
        if other.image(wanted).await?.is_some() || other.image(&name::full(wanted)).await?.is_some() {
            text.push_str(&format!("; namespace {namespace} has it: add --namespace {namespace}"));
            return Ok(text);
        }
    }
    let images = client.images().await?;
    match name::similar(wanted, images.iter().map(|image| image.name.as_str())).as_slice() {
        [] => text.push_str("; pull it first"),
        similar => text.push_str(&format!("; it has {}", similar.join(", "))),
    }
    Ok(text)
}
