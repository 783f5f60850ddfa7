//! What `speedy status`, `layers` and `explain` ask.

use std::sync::Arc;

use serde::Serialize;
use tonic::{Request, Response, Status};

use super::status;
use crate::oci::{ChainId, Digest};
use crate::proto::speedy::v1 as wire;
use crate::proto::speedy::v1::control_server::Control;
use crate::snapshot::report::{LayerReport, MirrorState, PoolState, StatusReport, StoreState};
use crate::snapshot::snapshotter::Snapshotter;

/// What a daemon says of itself beside what its snapshotter knows.
pub struct About {
    /// What its machine calls itself.
    pub node: String,
    /// Where its snapshots are.
    pub root: String,
    /// How layer images are mounted here, or why they are not.
    pub layer_images: String,
    /// Whether layers are read lazily here, or why not.
    pub lazy: String,
    /// Whether starts are recorded here, or why not.
    pub traces: &'static str,
    /// The publishing policy.
    pub publish_policy: String,
    /// The store as it is now.
    pub store: Box<dyn Fn() -> Option<StoreState> + Send + Sync>,
    /// Who answers for registries, as it is now.
    pub mirror: Box<dyn Fn() -> Option<MirrorState> + Send + Sync>,
    /// Roots of volumes, as they are now.
    pub pools: Box<dyn Fn() -> Vec<PoolState> + Send + Sync>,
    /// Bytes free on the root's file system.
    pub free_bytes: Box<dyn Fn() -> u64 + Send + Sync>,
}

impl std::fmt::Debug for About {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("About").field("root", &self.root).finish_non_exhaustive()
    }
}

/// The service.
#[derive(Debug, Clone)]
pub(super) struct ControlService {
    pub(super) snapshotter: Arc<Snapshotter>,
    pub(super) about: Arc<About>,
}

impl ControlService {
    pub(super) fn layer_reports(&self) -> Vec<LayerReport> {
        self.snapshotter.layer_reports()
    }

    pub(super) fn status_report(&self) -> StatusReport {
        let about = &self.about;
        StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: about.node.clone(),
            root: about.root.clone(),
            containerd: self.snapshotter.containerd_version(),
            layer_images: about.layer_images.clone(),
            lazy: about.lazy.clone(),
            snapshots: self.snapshotter.snapshot_numbers(),
            pools: (about.pools)(),
            layers: self.snapshotter.layer_numbers(),
            store: (about.store)(),
            traces: self.snapshotter.trace_state(about.traces),
            publish: self.snapshotter.publish_state(&about.publish_policy),
            mirror: (about.mirror)(),
            free_bytes: (about.free_bytes)(),
        }
    }
}

/// Looks at files, so on a thread that may block.
async fn report<T: Serialize + Send + 'static>(
    make: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<Response<wire::Report>, Status> {
    let internal = |error: &dyn std::fmt::Display| Status::internal(error.to_string());
    let made = tokio::task::spawn_blocking(make).await.map_err(|error| internal(&error))??;
    let json = serde_json::to_vec(&made).map_err(|error| internal(&error))?;
    Ok(Response::new(wire::Report { json }))
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn status(&self, _: Request<wire::StatusRequest>) -> Result<Response<wire::Report>, Status> {
        let this = self.clone();
        report(move || Ok(this.status_report())).await
    }

    async fn layers(&self, _: Request<wire::LayersRequest>) -> Result<Response<wire::Report>, Status> {
        let this = self.clone();
        report(move || Ok(this.layer_reports())).await
    }

    async fn explain(
        &self,
        request: Request<wire::ExplainRequest>,
    ) -> Result<Response<wire::Report>, Status> {
        let request = request.into_inner();
        let snapshotter = Arc::clone(&self.snapshotter);
        report(move || {
            if !request.key.is_empty() {
                let explained = snapshotter.explain_key(&request.namespace, &request.key);
                return explained.map_err(|error| status::status(&error));
            }
            let chains: Result<Vec<ChainId>, _> =
                request.chains.iter().map(|chain| Digest::parse(chain).map(ChainId)).collect();
            let chains = chains.map_err(|error| Status::invalid_argument(error.to_string()))?;
            Ok(snapshotter.explain_chains(&chains))
        })
        .await
    }
}
