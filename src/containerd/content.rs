//! Blobs of containerd's content store.
//!
//! A blob is read through the content service, or, much faster, from its file: containerd's own content store tells its
//! directory and keeps a blob in `<root>/blobs/sha256/<hex>`. Whether the namespace has the blob is asked of the service first,
//! in both cases; the file is used only if it is there with the size that the service says.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bytes::{Buf, Bytes};
use tokio::runtime::Handle;
use tonic::Streaming;

use super::{Containerd, ContainerdError, MESSAGE_LIMIT, found};
use crate::oci::{Digest, Sha256};
use crate::proto::containerd::services::content::v1 as proto;
use crate::proto::containerd::services::content::v1::content_client::ContentClient;
use crate::proto::containerd::services::introspection::v1 as introspection;
use crate::proto::containerd::services::introspection::v1::introspection_client::IntrospectionClient;

/// The label that says on a layer's blob what its uncompressed tar is called.
pub const LABEL_UNCOMPRESSED: &str = "containerd.io/uncompressed";

/// What is known of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Its labels.
    pub labels: HashMap<String, String>,
}

/// A blob that is being written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ingest {
    /// Under which name; ends with its digest when it is fetched from a registry.
    pub name: String,
    /// How much of it is there.
    pub bytes: u64,
}

impl Containerd {
    /// What is known of a blob, or `None` if this namespace does not have it.
    pub async fn blob(&self, digest: &Digest) -> Result<Option<BlobInfo>, ContainerdError> {
        let request = proto::InfoRequest { digest: digest.as_str().to_owned() };
        let answer = found(self.blobs_client().info(self.call(request)).await)?;
        Ok(answer.and_then(|answer| answer.info).and_then(info))
    }

    /// The blobs that match one of containerd's filters, such as `labels."containerd.io/uncompressed"==sha256:...`; at most
    /// `limit` of them.
    pub async fn blobs(&self, filter: &str, limit: usize) -> Result<Vec<BlobInfo>, ContainerdError> {
        let request = proto::ListContentRequest { filters: vec![filter.to_owned()] };
        let mut listed = self.blobs_client().list(self.call(request)).await?.into_inner();
        let mut blobs = Vec::new();
        while let Some(part) = listed.message().await? {
            blobs.extend(part.info.into_iter().filter_map(info).take(limit - blobs.len()));
            if blobs.len() == limit {
                break;
            }
        }
        Ok(blobs)
    }

    /// The blob of which this is the uncompressed tar, if this namespace has one that containerd unpacked.
    pub async fn blob_of_diff(&self, diff: &Digest) -> Result<Option<BlobInfo>, ContainerdError> {
        let filter = format!("labels.\"{LABEL_UNCOMPRESSED}\"=={diff}");
        Ok(self.blobs(&filter, 1).await?.pop())
    }

    /// What is being written.
    pub async fn ingests(&self) -> Result<Vec<Ingest>, ContainerdError> {
        let request = proto::ListStatusesRequest { filters: Vec::new() };
        let answer = self.blobs_client().list_statuses(self.call(request)).await?.into_inner();
        let bytes = |number: i64| u64::try_from(number).unwrap_or(0);
        let ingest = |status: proto::Status| Ingest { name: status.r#ref, bytes: bytes(status.offset) };
        Ok(answer.statuses.into_iter().map(ingest).collect())
    }

    /// The bytes of a document, which have this digest.
    pub async fn read(&self, digest: &Digest, limit: u64) -> Result<Bytes, ContainerdError> {
        let info = self.blob(digest).await?;
        let BlobInfo { size, .. } = info.ok_or_else(|| ContainerdError::NoBlob { digest: digest.clone() })?;
        if size > limit {
            return Err(ContainerdError::BlobTooLarge { digest: digest.clone(), size, limit });
        }
        let mut stream = self.stream_blob(digest).await?;
        let mut bytes = Vec::new();
        let mut hasher = Sha256::default();
        let damaged = || ContainerdError::DamagedBlob { digest: digest.clone() };
        while let Some(part) = stream.message().await? {
            hasher.update(&part.data);
            bytes.extend_from_slice(&part.data);
            if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > size {
                return Err(damaged());
            }
        }
        if hasher.digest() == *digest { Ok(bytes.into()) } else { Err(damaged()) }
    }

    /// A blob to be read from front to back, on a thread that may block; its digest is not checked here. `root` is what
    /// [`Containerd::content_root`] said.
    pub async fn open_blob(&self, digest: &Digest, root: Option<&Path>) -> Result<Blob, ContainerdError> {
        let info = self.blob(digest).await?;
        let BlobInfo { size, .. } = info.ok_or_else(|| ContainerdError::NoBlob { digest: digest.clone() })?;
        if let Some(file) = root.and_then(|root| blob_file(root, digest, size)) {
            return Ok(Blob { size, from: From::File(file) });
        }
        let parts = self.stream_blob(digest).await?;
        let stream = Stream { parts, ready: Bytes::new(), runtime: Handle::current() };
        Ok(Blob { size, from: From::Stream(Box::new(stream)) })
    }

    /// Where containerd's own content store keeps its files, if that is the store in use and it says so.
    pub async fn content_root(&self) -> Option<PathBuf> {
        let filters = vec!["type==io.containerd.content.v1,id==content".to_owned()];
        let mut client =
            IntrospectionClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        let answer = client.plugins(self.call(introspection::PluginsRequest { filters })).await;
        let plugins = answer.ok()?.into_inner().plugins;
        let root =
            plugins.iter().filter(|plugin| plugin.init_err.is_none()).find_map(|p| p.exports.get("root"))?;
        Some(PathBuf::from(root))
    }

    async fn stream_blob(
        &self,
        digest: &Digest,
    ) -> Result<Streaming<proto::ReadContentResponse>, ContainerdError> {
        let request = proto::ReadContentRequest { digest: digest.as_str().to_owned(), offset: 0, size: 0 };
        let stream = found(self.blobs_client().read(self.stream(request)).await)?;
        stream.ok_or_else(|| ContainerdError::NoBlob { digest: digest.clone() })
    }

    fn blobs_client(&self) -> ContentClient<tonic::transport::Channel> {
        ContentClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT)
    }
}

fn info(info: proto::Info) -> Option<BlobInfo> {
    let digest = Digest::parse(&info.digest).ok()?;
    Some(BlobInfo { digest, size: u64::try_from(info.size).ok()?, labels: info.labels })
}

fn blob_file(root: &Path, digest: &Digest, size: u64) -> Option<File> {
    let hex = digest.as_str().strip_prefix("sha256:")?;
    let file = File::open(root.join("blobs/sha256").join(hex)).ok()?;
    let found = file.metadata().ok()?;
    (found.is_file() && found.len() == size).then_some(file)
}

/// The bytes of a blob.
#[derive(Debug)]
pub struct Blob {
    size: u64,
    from: From,
}

#[derive(Debug)]
enum From {
    File(File),
    Stream(Box<Stream>),
}

#[derive(Debug)]
struct Stream {
    parts: Streaming<proto::ReadContentResponse>,
    ready: Bytes,
    runtime: Handle,
}

impl Blob {
    /// Its length in bytes, as containerd says.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it is read from containerd's own file.
    pub fn is_file(&self) -> bool {
        matches!(self.from, From::File(_))
    }
}

impl Read for Blob {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match &mut self.from {
            From::File(file) => file.read(into),
            From::Stream(stream) => {
                let Stream { parts, ready, runtime } = &mut **stream;
                while ready.is_empty() && !into.is_empty() {
                    match runtime.block_on(parts.message()).map_err(io::Error::other)? {
                        Some(part) => *ready = part.data.into(),
                        None => return Ok(0),
                    }
                }
                let length = ready.len().min(into.len());
                ready.copy_to_slice(&mut into[..length]);
                Ok(length)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_is_read_from_its_file_only_if_it_is_whole() {
        let root = tempfile::tempdir().unwrap();
        let mut hasher = Sha256::default();
        hasher.update(b"blob");
        let digest = hasher.digest();
        assert!(blob_file(root.path(), &digest, 4).is_none());
        let dir = root.path().join("blobs/sha256");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(&digest.as_str()[7..]), b"blob").unwrap();
        assert!(blob_file(root.path(), &digest, 4).is_some());
        assert!(blob_file(root.path(), &digest, 5).is_none());
    }
}
