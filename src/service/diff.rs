//! `containerd.services.diff.v1.Diff`: layers that containerd fetched are applied to our snapshots.
//!
//! containerd reaches it on two routes. Its diff service tries a list of differs, of which ours is the first, and goes on with
//! the next only after *unimplemented*; its transfer service calls the one that is configured and fails the pull after any
//! error. So mounts that are not ours, and Compare, are answered *unimplemented* at once, and every layer for mounts that are
//! ours is applied, whatever it takes.
//!
//! Encryption is told by the media type alone: clients send decryption parameters with every layer, encrypted or not.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::call::{Calls, span};
use super::convert;
use crate::containerd::blob::Blobs;
use crate::oci::Digest;
use crate::proto::containerd::services::diff::v1 as wire;
use crate::proto::containerd::services::diff::v1::diff_server::Diff;
use crate::proto::containerd::types;
use crate::snapshot::SnapshotError;
use crate::snapshot::apply::{ApplyError, ApplyRequest};
use crate::snapshot::snapshotter::Snapshotter;
use crate::telemetry::Method;

/// What an uncompressed layer is called.
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// The service.
#[derive(Debug, Clone)]
pub(super) struct DiffService {
    /// One for each driver.
    pub(super) snapshotters: Vec<Arc<Snapshotter>>,
    pub(super) blobs: Blobs,
    pub(super) calls: Calls,
}

#[tonic::async_trait]
impl Diff for DiffService {
    async fn apply(
        &self,
        request: Request<wire::ApplyRequest>,
    ) -> Result<Response<wire::ApplyResponse>, Status> {
        let digest = request.get_ref().diff.as_ref().map_or("", |diff| &diff.digest);
        let span = span(Method::Apply, request.metadata(), digest);
        let namespace = request.metadata().get("containerd-namespace").and_then(|name| name.to_str().ok());
        let namespace = namespace.unwrap_or("default").to_owned();
        let request = request.into_inner();
        let mounts = convert::driver_mounts(request.mounts);
        let Some(snapshotter) = self.snapshotters.iter().find(|snapshotter| snapshotter.is_ours(&mounts))
        else {
            return Err(Status::unimplemented("these mounts are not of a snapshot of speedy"));
        };
        let (snapshotter, blobs) = (Arc::clone(snapshotter), self.blobs.clone());
        let metrics = self.calls.metrics.clone();
        let apply = async move {
            let diff = request.diff.unwrap_or_default();
            let blob = Digest::parse(&diff.digest).map_err(|_| ApplyError::NotADigest)?;
            let open = blobs.opener(&namespace, &blob);
            let request = ApplyRequest { blob, media_type: diff.media_type, mounts, open };
            let applied = snapshotter.apply(request).await?;
            metrics.applied(applied.how.as_str());
            Ok::<_, SnapshotError>(applied)
        };
        let applied = self.calls.run_to_end(Method::Apply, span, apply).await?;
        let applied = types::Descriptor {
            media_type: TAR.to_owned(),
            digest: applied.diff_id.to_string(),
            size: i64::try_from(applied.tar_size).unwrap_or(i64::MAX),
            ..types::Descriptor::default()
        };
        Ok(Response::new(wire::ApplyResponse { applied: Some(applied) }))
    }

    async fn diff(&self, _: Request<wire::DiffRequest>) -> Result<Response<wire::DiffResponse>, Status> {
        Err(Status::unimplemented("speedy applies layers and does not compute them; list walking after it"))
    }
}
