//! Images of containerd's image store: names and what they point at.

use std::collections::HashMap;

use super::manifest::{Descriptor, Document, LONGEST_DOCUMENT, Layer, Platform, Resolved, read_document};
use super::{Containerd, ContainerdError, MESSAGE_LIMIT, found};
use crate::oci::Digest;
use crate::proto::containerd::services::images::v1 as proto;
use crate::proto::containerd::services::images::v1::images_client::ImagesClient;
use crate::proto::containerd::services::namespaces::v1::ListNamespacesRequest;
use crate::proto::containerd::services::namespaces::v1::namespaces_client::NamespacesClient;

/// An image as containerd knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its name, a full reference.
    pub name: String,
    /// Its manifest, or an index of manifests.
    pub target: Descriptor,
    /// When it was last changed: seconds since 1970 UTC, and nanoseconds.
    pub updated: (i64, i32),
    /// Its labels.
    pub labels: HashMap<String, String>,
}

impl Containerd {
    /// The image with exactly this name, or `None` if this namespace has none.
    pub async fn image(&self, name: &str) -> Result<Option<Image>, ContainerdError> {
        let request = proto::GetImageRequest { name: name.to_owned() };
        let answer = found(self.images_client().get(self.call(request)).await)?;
        Ok(answer.and_then(|answer| answer.image).and_then(image))
    }

    /// Removes an image; succeeds when there is none. Its blobs go when containerd collects next, if nothing else needs them.
    pub async fn remove_image(&self, name: &str) -> Result<(), ContainerdError> {
        let request = proto::DeleteImageRequest { name: name.to_owned(), ..Default::default() };
        found(self.images_client().delete(self.call(request)).await)?;
        Ok(())
    }

    /// The names of all namespaces.
    pub async fn namespaces(&self) -> Result<Vec<String>, ContainerdError> {
        let mut client = NamespacesClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        let answer = client.list(self.call(ListNamespacesRequest::default())).await?.into_inner();
        Ok(answer.namespaces.into_iter().map(|namespace| namespace.name).collect())
    }

    /// All images of this namespace.
    pub async fn images(&self) -> Result<Vec<Image>, ContainerdError> {
        let request = proto::ListImagesRequest { filters: Vec::new() };
        let answer = self.images_client().list(self.call(request)).await?.into_inner();
        Ok(answer.images.into_iter().filter_map(image).collect())
    }

    /// The image with this name, or with the name that a short one stands for (`alpine` for
    /// `docker.io/library/alpine:latest`).
    pub async fn find_image(&self, name: &str) -> Result<Option<Image>, ContainerdError> {
        for name in full_names(name) {
            if let Some(image) = self.image(&name).await? {
                return Ok(Some(image));
            }
        }
        Ok(None)
    }

    /// The layers of an image for a platform, lowest first, from the documents in the content store.
    pub async fn image_layers(
        &self,
        image: &Image,
        platform: &Platform,
    ) -> Result<Vec<Layer>, ContainerdError> {
        Ok(self.resolve_image(image, platform).await?.layers)
    }

    /// What an image is for a platform, from the documents in the content store.
    pub async fn resolve_image(
        &self,
        image: &Image,
        platform: &Platform,
    ) -> Result<Resolved, ContainerdError> {
        let (mut target, mut documents) = (image.target.clone(), Vec::new());
        // An index names a manifest, and no index of indexes is deeper than this.
        for _ in 0..4 {
            let bytes = self.read(&target.digest, LONGEST_DOCUMENT).await?;
            documents.push(target.digest.clone());
            match read_document(&bytes, &target.digest, platform)? {
                Document::Index(manifest) => target = manifest,
                Document::Manifest(manifest) => {
                    let config = self.read(&manifest.config.digest, LONGEST_DOCUMENT).await?;
                    let (layers, platform) = manifest.layers(&config)?;
                    documents.push(manifest.config.digest);
                    let (manifest, target) = (target, image.target.clone());
                    return Ok(Resolved { platform, target, manifest, documents, layers });
                }
            }
        }
        Err(ContainerdError::TooDeep { digest: target.digest })
    }

    fn images_client(&self) -> ImagesClient<tonic::transport::Channel> {
        ImagesClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT)
    }
}

fn image(image: proto::Image) -> Option<Image> {
    let target = image.target?;
    let target = Descriptor {
        media_type: target.media_type,
        digest: Digest::parse(&target.digest).ok()?,
        size: u64::try_from(target.size).ok()?,
    };
    let updated = image.updated_at.map_or((0, 0), |at| (at.seconds, at.nanos));
    Some(Image { name: image.name, target, updated, labels: image.labels })
}

/// What a name may stand for, the name itself first; as docker's clients read it.
fn full_names(name: &str) -> Vec<String> {
    let mut names = vec![name.to_owned()];
    let has_tag = name.rsplit('/').next().is_some_and(|last| last.contains([':', '@']));
    let tagged = if has_tag { name.to_owned() } else { format!("{name}:latest") };
    names.push(tagged.clone());
    match tagged.split_once('/') {
        None => names.push(format!("docker.io/library/{tagged}")),
        Some((host, _)) if !host.contains(['.', ':']) && host != "localhost" => {
            names.push(format!("docker.io/{tagged}"));
        }
        Some(_) => {}
    }
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_stand_for_long_ones() {
        assert_eq!(full_names("alpine").last().unwrap(), "docker.io/library/alpine:latest");
        assert_eq!(full_names("team/app:1").last().unwrap(), "docker.io/team/app:1");
        assert_eq!(full_names("localhost:5000/app:1"), ["localhost:5000/app:1"]);
        assert_eq!(full_names("r.example/app").last().unwrap(), "r.example/app:latest");
    }
}
