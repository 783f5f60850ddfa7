//! containerd, seen as its client: which version answers, and which plugins it loaded.
//!
//! Optional at every moment: containerd starts after us, restarts, or is not there at all. Commit, Update, Remove, List and
//! Cleanup never come here: they run inside containerd's own write transaction.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use crate::proto::containerd::services::version::v1::version_client::VersionClient;

const TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);

/// Why containerd could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ContainerdError {
    /// Nobody answers on the socket.
    #[error("cannot connect to containerd: {0}")]
    Connect(#[source] tonic::transport::Error),
    /// It answered with an error.
    #[error("containerd: {0}")]
    Call(#[from] tonic::Status),
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

/// The version that answers on the socket, such as `v2.4.2`.
pub async fn version(socket: &Path) -> Result<String, ContainerdError> {
    let mut client = VersionClient::new(connect(socket).await?);
    let mut request = tonic::Request::new(());
    request.set_timeout(TIMEOUT);
    Ok(client.version(request).await?.into_inner().version)
}

/// Reports in the log which containerd is there, now and whenever that changes, until `stop`.
pub async fn watch(socket: PathBuf, stop: CancellationToken) {
    let mut known: Option<String> = None;
    let mut wait = FIRST_RETRY;
    loop {
        match version(&socket).await {
            Ok(version) if known.as_ref() != Some(&version) => {
                tracing::info!(%version, socket = %socket.display(), "containerd is there");
                known = Some(version);
                wait = LAST_RETRY;
            }
            Ok(_) => wait = LAST_RETRY,
            Err(error) => {
                if known.take().is_some() {
                    tracing::warn!(%error, "containerd went away; snapshots are served as before");
                    wait = FIRST_RETRY;
                }
                wait = (wait * 2).min(LAST_RETRY);
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}
