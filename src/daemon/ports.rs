//! The loopback ports: metrics and the status page, and images of registries that are away.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::DaemonError;
use crate::config::Config;
use crate::content::ContentStore;
use crate::registry::{self, Mirror, MirrorCounts, UpstreamProbe};
use crate::service::{self, Shown};
use crate::snapshot::report::MirrorState;

/// Those that are configured, each with who answers there.
#[derive(Debug)]
pub(super) struct Ports {
    metrics: Option<TcpListener>,
    registry: Option<(TcpListener, Arc<Mirror>)>,
}

impl Ports {
    /// Takes them; nobody answers there yet.
    pub(super) async fn open(
        config: &Config,
        content: Option<Arc<ContentStore>>,
    ) -> Result<Ports, DaemonError> {
        let metrics = match config.metrics {
            Some(address) => Some(service::bind_metrics(address).await?),
            None => None,
        };
        let registry = match (config.registry, content) {
            (None, _) => None,
            (Some(address), None) => {
                tracing::warn!(%address, "nothing answers for registries without a store: set `store`, or unset `registry`");
                None
            }
            (Some(address), Some(content)) => {
                let mirror = Mirror::new(content, Box::new(UpstreamProbe::new()?));
                Some((registry::bind(address).await?, Arc::new(mirror)))
            }
        };
        Ok(Ports { metrics, registry })
    }

    /// As the ports were given: a configured 0 takes any.
    pub(super) fn addresses(&self) -> (Option<SocketAddr>, Option<SocketAddr>) {
        let address = |port: &TcpListener| port.local_addr().ok();
        (self.metrics.as_ref().and_then(address), self.registry.as_ref().and_then(|(port, _)| address(port)))
    }

    /// Who answers for registries.
    pub(super) fn mirror(&self) -> Option<Arc<Mirror>> {
        self.registry.as_ref().map(|(_, mirror)| Arc::clone(mirror))
    }

    /// The same as it is reported.
    pub(super) fn mirror_state(&self) -> Box<dyn Fn() -> Option<MirrorState> + Send + Sync> {
        let (address, mirror) = (self.addresses().1, self.mirror());
        Box::new(move || {
            let MirrorCounts { served, absent, reachable, failed, malformed } = mirror.as_ref()?.counts();
            let address = address?.to_string();
            Some(MirrorState { address, served, absent, reachable, failed, malformed })
        })
    }

    /// Answers on them until `stop`.
    pub(super) fn serve(self, background: &TaskTracker, shown: Shown, stop: &CancellationToken) {
        if let Some(port) = self.metrics {
            background.spawn(show(port, shown, stop.clone()));
        }
        if let Some((port, mirror)) = self.registry {
            background.spawn(registry::serve(port, mirror, stop.clone()));
        }
    }
}

async fn show(port: TcpListener, shown: Shown, stop: CancellationToken) {
    if let Err(error) = service::serve_metrics(port, shown, stop).await {
        tracing::error!(%error, "metrics and the status page are no longer served");
    }
}
