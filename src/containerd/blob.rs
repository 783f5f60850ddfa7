//! Blobs by namespace, over one connection that is made when it is needed.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::Mutex;

use super::content::Blob;
use super::{Containerd, ContainerdError};
use crate::oci::Digest;

/// Opens a blob for reading; to be called on a thread that may block.
pub type OpenBlob = Arc<dyn Fn() -> io::Result<Box<dyn Read + Send>> + Send + Sync>;

/// containerd's blobs. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Blobs {
    socket: PathBuf,
    connected: Arc<Mutex<Option<Connected>>>,
}

#[derive(Debug, Clone)]
struct Connected {
    containerd: Containerd,
    /// Where containerd's own content store keeps its files.
    root: Option<PathBuf>,
}

impl Blobs {
    /// Nothing is connected yet.
    pub fn new(socket: PathBuf) -> Blobs {
        Blobs { socket, connected: Arc::default() }
    }

    /// A blob of a namespace, to be read from front to back.
    pub async fn open(&self, namespace: &str, digest: &Digest) -> Result<Blob, ContainerdError> {
        let Connected { containerd, root } = self.connect(namespace).await?;
        containerd.open_blob(digest, root.as_deref()).await
    }

    /// The same, to be opened later and more than once.
    pub fn opener(&self, namespace: &str, digest: &Digest) -> OpenBlob {
        let (this, namespace, digest) = (self.clone(), namespace.to_owned(), digest.clone());
        let runtime = Handle::current();
        Arc::new(move || {
            let blob = runtime.block_on(this.open(&namespace, &digest)).map_err(io::Error::other)?;
            Ok(Box::new(blob))
        })
    }

    /// containerd, in this namespace.
    pub async fn containerd(&self, namespace: &str) -> Result<Containerd, ContainerdError> {
        Ok(self.connect(namespace).await?.containerd)
    }

    /// The connection mends itself when containerd is restarted; where its content lies is asked once.
    async fn connect(&self, namespace: &str) -> Result<Connected, ContainerdError> {
        let mut connected = self.connected.lock().await;
        if let Some(known) = &*connected {
            let containerd = known.containerd.in_namespace(namespace)?;
            return Ok(Connected { containerd, root: known.root.clone() });
        }
        let containerd = Containerd::open(&self.socket, namespace).await?;
        let root = containerd.content_root().await;
        tracing::debug!(root = ?root, "containerd's content store");
        Ok(connected.insert(Connected { containerd, root }).clone())
    }
}
