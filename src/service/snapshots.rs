//! `containerd.services.snapshots.v1.Snapshots`: one short function for each RPC.

use std::sync::Arc;
use std::time::Instant;

use prost::Message;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::call::{Calls, span};
use super::convert;
use crate::proto::containerd::services::snapshots::v1 as wire;
use crate::proto::containerd::services::snapshots::v1::snapshots_server::Snapshots;
use crate::snapshot::filter::Filter;
use crate::snapshot::metastore::Record;
use crate::snapshot::snapshotter::Snapshotter;
use crate::snapshot::{Key, Prepared, SnapshotError};
use crate::telemetry::Method;

/// Snapshots in one message of a List, as in containerd's own services.
const LIST_INFOS: usize = 100;
/// Bytes in one message of a List beyond which it is sent, well below containerd's limit of 16 MiB.
const LIST_BYTES: usize = 2 * 1024 * 1024;

/// The service.
#[derive(Debug, Clone)]
pub(super) struct SnapshotsService {
    pub(super) snapshotter: Arc<Snapshotter>,
    /// Of another driver, under its name; all other names are the main one's.
    pub(super) beside: Option<(String, Arc<Snapshotter>)>,
    pub(super) calls: Calls,
}

impl SnapshotsService {
    fn of(&self, name: &str) -> Arc<Snapshotter> {
        match &self.beside {
            Some((own, beside)) if own == name => Arc::clone(beside),
            _ => Arc::clone(&self.snapshotter),
        }
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Snapshots for SnapshotsService {
    type ListStream = ListStream;

    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Answer<wire::PrepareSnapshotResponse> {
        let span = span(Method::Prepare, request.metadata(), &request.get_ref().key);
        let request = request.into_inner();
        let snapshotter = self.of(&request.snapshotter);
        let prepare = async move {
            let (key, parent) = (Key::new(&request.key)?, Key::optional(&request.parent)?);
            match snapshotter.prepare(key, parent, convert::labels(request.labels)).await? {
                Prepared::Mounts(mounts) => Ok(mounts),
                // In containerd's protocol a remote hit is this error.
                Prepared::AlreadyCommitted(name) => Err(SnapshotError::AlreadyExists { key: name }),
            }
        };
        let mounts = convert::mounts(self.calls.run_to_end(Method::Prepare, span, prepare).await?);
        Ok(Response::new(wire::PrepareSnapshotResponse { mounts }))
    }

    async fn view(&self, request: Request<wire::ViewSnapshotRequest>) -> Answer<wire::ViewSnapshotResponse> {
        let span = span(Method::View, request.metadata(), &request.get_ref().key);
        let request = request.into_inner();
        let snapshotter = self.of(&request.snapshotter);
        let view = async move {
            let (key, parent) = (Key::new(&request.key)?, Key::optional(&request.parent)?);
            snapshotter.view(key, parent, convert::labels(request.labels)).await
        };
        let mounts = convert::mounts(self.calls.run_to_end(Method::View, span, view).await?);
        Ok(Response::new(wire::ViewSnapshotResponse { mounts }))
    }

    async fn mounts(&self, request: Request<wire::MountsRequest>) -> Answer<wire::MountsResponse> {
        let span = span(Method::Mounts, request.metadata(), &request.get_ref().key);
        let mounts = async {
            self.of(&request.get_ref().snapshotter).mounts(&Key::new(&request.get_ref().key)?).await
        };
        let mounts = convert::mounts(self.calls.run(Method::Mounts, span, mounts).await?);
        Ok(Response::new(wire::MountsResponse { mounts }))
    }

    async fn commit(&self, request: Request<wire::CommitSnapshotRequest>) -> Answer<()> {
        let span = span(Method::Commit, request.metadata(), &request.get_ref().key);
        let request = request.into_inner();
        let commit = async {
            let (name, key) = (Key::new(&request.name)?, Key::new(&request.key)?);
            let parent = Key::optional(&request.parent)?;
            self.of(&request.snapshotter).commit(name, key, parent, convert::labels(request.labels)).await
        };
        self.calls.run(Method::Commit, span, commit).await.map(Response::new)
    }

    async fn remove(&self, request: Request<wire::RemoveSnapshotRequest>) -> Answer<()> {
        let span = span(Method::Remove, request.metadata(), &request.get_ref().key);
        let remove =
            async { self.of(&request.get_ref().snapshotter).remove(Key::new(&request.get_ref().key)?).await };
        self.calls.run(Method::Remove, span, remove).await.map(Response::new)
    }

    async fn stat(&self, request: Request<wire::StatSnapshotRequest>) -> Answer<wire::StatSnapshotResponse> {
        let began = Instant::now();
        let span = span(Method::Stat, request.metadata(), &request.get_ref().key);
        let snapshotter = self.of(&request.get_ref().snapshotter);
        let info = Key::new(&request.get_ref().key).and_then(|key| snapshotter.stat(&key));
        let info = Some(convert::info(self.calls.finish(Method::Stat, &span, began, info)?));
        Ok(Response::new(wire::StatSnapshotResponse { info }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateSnapshotRequest>,
    ) -> Answer<wire::UpdateSnapshotResponse> {
        let key = request.get_ref().info.as_ref().map_or("", |info| &info.name);
        let span = span(Method::Update, request.metadata(), key);
        let request = request.into_inner();
        let update = async {
            let info = request.info.unwrap_or_default();
            let update = convert::label_update(info.labels, request.update_mask)?;
            self.of(&request.snapshotter).update(Key::new(&info.name)?, update).await
        };
        let info = Some(convert::info(self.calls.run(Method::Update, span, update).await?));
        Ok(Response::new(wire::UpdateSnapshotResponse { info }))
    }

    async fn list(&self, request: Request<wire::ListSnapshotsRequest>) -> Answer<Self::ListStream> {
        let began = Instant::now();
        let span = span(Method::List, request.metadata(), "");
        let request = request.into_inner();
        let (filters, snapshotter) = (request.filters, self.of(&request.snapshotter));
        let listed = Arc::clone(&snapshotter);
        let find = move || Filter::parse(&filters).map(|filter| listed.list(&filter));
        // Matching a filter of somebody's making takes what it takes: not on the threads that everybody's calls need.
        let records = tokio::task::spawn_blocking(find).await;
        let records = records.map_err(|_| SnapshotError::ShuttingDown).and_then(|found| Ok(found?));
        let records = self.calls.finish(Method::List, &span, began, records)?;
        Ok(Response::new(ListStream { records: records.into_iter(), snapshotter }))
    }

    async fn usage(&self, request: Request<wire::UsageRequest>) -> Answer<wire::UsageResponse> {
        let span = span(Method::Usage, request.metadata(), &request.get_ref().key);
        let usage =
            async { self.of(&request.get_ref().snapshotter).usage(&Key::new(&request.get_ref().key)?).await };
        self.calls.run(Method::Usage, span, usage).await.map(convert::usage).map(Response::new)
    }

    async fn cleanup(&self, request: Request<wire::CleanupRequest>) -> Answer<()> {
        let span = span(Method::Cleanup, request.metadata(), "");
        let cleanup = async {
            self.of(&request.get_ref().snapshotter).cleanup().await;
            Ok(())
        };
        self.calls.run(Method::Cleanup, span, cleanup).await.map(Response::new)
    }
}

/// The answer to a List: records as they were when it was asked, turned into messages as the caller takes them. Holds no
/// lock, so that the caller may do anything meanwhile.
#[derive(Debug)]
pub(super) struct ListStream {
    records: std::vec::IntoIter<Arc<Record>>,
    snapshotter: Arc<Snapshotter>,
}

impl Stream for ListStream {
    type Item = Result<wire::ListSnapshotsResponse, Status>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        let mut info = Vec::with_capacity(LIST_INFOS);
        let mut bytes = 0;
        while info.len() < LIST_INFOS && bytes < LIST_BYTES {
            let Some(record) = self.records.next() else { break };
            let next = convert::info(self.snapshotter.info(&record));
            bytes += next.encoded_len();
            info.push(next);
        }
        let message = (!info.is_empty()).then_some(Ok(wire::ListSnapshotsResponse { info }));
        std::task::Poll::Ready(message)
    }
}
