//! containerd, seen as its client.
//!
//! **What.** Which version answers ([`version`]), and what it is about to do ([`events`]); and in one of its namespaces ([`Containerd`]) its images ([`image`]),
//! blobs ([`content`]) and leases ([`lease`]). [`manifest`] are OCI's documents, wherever they come from.
//!
//! **Where.** Called by `daemon`, `service` and `cli`. Optional at every moment: containerd starts after us, restarts, or is not
//! there at all. Commit, Update, Remove, List and Cleanup never come here: they run inside containerd's own write transaction.
//!
//! **Invariants.** What containerd sends is bounded before it is read, and a blob's bytes are believed after their digest was
//! checked: here for documents, by whoever reads it for a layer.
//!
//! **When it fails.** [`ContainerdError`] tells nobody there, no such thing and everything else apart. Every call but the stream
//! of a blob's bytes ends within [`TIMEOUT`].

use std::path::Path;
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};

use crate::oci::Digest;
use crate::proto::containerd::services::version::v1::version_client::VersionClient;

pub mod blob;
pub mod content;
pub mod events;
pub mod image;
pub mod lease;
pub mod manifest;
pub mod transfer;

/// The header that names the namespace of a call.
const NAMESPACE_HEADER: &str = "containerd-namespace";
/// The header that names the lease of a call.
const LEASE_HEADER: &str = "containerd-lease";
/// Most bytes of one answer; containerd itself sends up to 16 MiB.
const MESSAGE_LIMIT: usize = 16 << 20;
/// How long one call may take.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// Why containerd did not give what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ContainerdError {
    /// Nobody answers on the socket.
    #[error("cannot connect to containerd: {0}")]
    Connect(#[source] tonic::transport::Error),
    /// It answered with an error.
    #[error("containerd: {0}")]
    Call(#[from] tonic::Status),
    /// The text is no name of a namespace or a lease.
    #[error("{0:?} is no name that containerd takes")]
    BadName(String),
    /// Its content store does not have the blob, in this namespace.
    #[error("blob {digest} is not in containerd's content store")]
    NoBlob {
        /// The blob.
        digest: Digest,
    },
    /// A blob is larger than anything of its kind can be.
    #[error("blob {digest} has {size} bytes, more than the {limit} there can be")]
    BlobTooLarge {
        /// The blob.
        digest: Digest,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A document is not what an image consists of.
    #[error(transparent)]
    Manifest(#[from] manifest::ManifestError),
    /// Indexes that name indexes.
    #[error("{digest} is an index of indexes of indexes")]
    TooDeep {
        /// The last one.
        digest: Digest,
    },
    /// The bytes of a blob are not those of its digest.
    #[error("blob {digest} is damaged in containerd's content store")]
    DamagedBlob {
        /// The blob.
        digest: Digest,
    },
}

/// Connects to containerd's socket.
pub async fn connect(socket: &Path) -> Result<Channel, ContainerdError> {
    // The authority is not used on a unix socket, but HTTP/2 wants one.
    let endpoint = Endpoint::from_static("http://localhost").connect_timeout(TIMEOUT);
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
    });
    endpoint.connect_with_connector(connector).await.map_err(ContainerdError::Connect)
}

/// One of containerd's namespaces. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Containerd {
    channel: Channel,
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Containerd {
    /// Connects to the socket; every call is about this namespace.
    pub async fn open(socket: &Path, namespace: &str) -> Result<Containerd, ContainerdError> {
        let namespace = header(namespace)?;
        Ok(Containerd { channel: connect(socket).await?, namespace, lease: None })
    }

    /// The same containerd in another namespace.
    pub fn in_namespace(&self, namespace: &str) -> Result<Containerd, ContainerdError> {
        Ok(Containerd { channel: self.channel.clone(), namespace: header(namespace)?, lease: None })
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        self.namespace.to_str().unwrap_or_default()
    }

    /// A call of a service that has no function here, with its headers and its time limit.
    pub fn request<T>(&self, message: T) -> tonic::Request<T> {
        self.call(message)
    }

    /// A call with its headers and its time limit.
    fn call<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = self.stream(message);
        request.set_timeout(TIMEOUT);
        request
    }

    /// A call that may take as long as it goes on.
    fn stream<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.metadata_mut().insert(NAMESPACE_HEADER, self.namespace.clone());
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert(LEASE_HEADER, lease.clone());
        }
        request
    }
}

fn header(name: &str) -> Result<MetadataValue<Ascii>, ContainerdError> {
    let bad = || ContainerdError::BadName(name.to_owned());
    if name.is_empty() { Err(bad()) } else { name.parse().map_err(|_| bad()) }
}

/// `None` for what containerd does not have.
fn found<T>(answer: Result<tonic::Response<T>, tonic::Status>) -> Result<Option<T>, ContainerdError> {
    match answer {
        Ok(answer) => Ok(Some(answer.into_inner())),
        Err(status) if status.code() == tonic::Code::NotFound => Ok(None),
        Err(status) => Err(status.into()),
    }
}

/// The version that answers on the socket, such as `v2.4.2`.
pub async fn version(socket: &Path) -> Result<String, ContainerdError> {
    version_of(connect(socket).await?).await
}

async fn version_of(channel: Channel) -> Result<String, ContainerdError> {
    let mut request = tonic::Request::new(());
    request.set_timeout(TIMEOUT);
    Ok(VersionClient::new(channel).version(request).await?.into_inner().version)
}

/// Major and minor number of a version; `None` if it has none.
pub fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split(['.', '-', '+', '~']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}
