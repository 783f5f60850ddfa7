//! `containerd.services.snapshots.v1.Snapshots`: one short function for each RPC.

use std::sync::Arc;
use std::time::Instant;

use prost::Message;
use tokio_stream::Stream;
use tokio_util::task::TaskTracker;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};
use tracing::Instrument;

use super::{convert, status};
use crate::proto::containerd::services::snapshots::v1 as wire;
use crate::proto::containerd::services::snapshots::v1::snapshots_server::Snapshots;
use crate::snapshot::filter::Filter;
use crate::snapshot::metastore::Record;
use crate::snapshot::snapshotter::Snapshotter;
use crate::snapshot::{Key, Prepared, SnapshotError};
use crate::telemetry::{Method, Metrics};

/// Snapshots in one message of a List, as in containerd's own services.
const LIST_INFOS: usize = 100;
/// Bytes in one message of a List beyond which it is sent, well below containerd's limit of 16 MiB.
const LIST_BYTES: usize = 2 * 1024 * 1024;

/// The service. `tasks` owns the calls of several steps: they come to their end even if the caller goes away.
#[derive(Debug, Clone)]
pub(super) struct SnapshotsService {
    pub(super) snapshotter: Arc<Snapshotter>,
    pub(super) tasks: TaskTracker,
    pub(super) metrics: Metrics,
}

type Answer<T> = Result<Response<T>, Status>;

impl SnapshotsService {
    /// Runs a use case of several steps under its span, counts it, and gives its error a code. It runs on a task of its own: a
    /// caller that cancels or times out does not leave it half done.
    async fn run_to_end<T: Send + 'static>(
        &self,
        method: Method,
        span: tracing::Span,
        run: impl Future<Output = Result<T, SnapshotError>> + Send + 'static,
    ) -> Result<T, Status> {
        let began = Instant::now();
        let task = self.tasks.spawn(run.instrument(span.clone()));
        let result = match task.await {
            Ok(result) => result,
            Err(error) if error.is_panic() => {
                tracing::error!(%error, "a call panicked");
                self.metrics.rpc(method, status::code_name(tonic::Code::Internal), began.elapsed());
                return Err(Status::internal("internal error; see speedy's log"));
            }
            Err(_) => Err(SnapshotError::ShuttingDown),
        };
        self.finish(method, &span, began, result)
    }

    /// The same for a use case of one step: to wait for an answer, or to hand one operation to the metadata store, which does
    /// it wholly or not at all whether or not somebody still waits.
    async fn run<T>(
        &self,
        method: Method,
        span: tracing::Span,
        run: impl Future<Output = Result<T, SnapshotError>>,
    ) -> Result<T, Status> {
        let began = Instant::now();
        let result = run.instrument(span.clone()).await;
        self.finish(method, &span, began, result)
    }

    fn finish<T>(
        &self,
        method: Method,
        span: &tracing::Span,
        began: Instant,
        result: Result<T, SnapshotError>,
    ) -> Result<T, Status> {
        let _entered = span.enter();
        let took = began.elapsed();
        let result = result.map_err(|error| status::status(&error));
        let code = result.as_ref().map_or_else(Status::code, |_| tonic::Code::Ok);
        self.metrics.rpc(method, status::code_name(code), took);
        match &result {
            Ok(_) => tracing::debug!(?took, "done"),
            Err(status) if is_ours(code) => tracing::error!(?code, ?took, "{}", status.message()),
            Err(status) => tracing::debug!(?code, ?took, "{}", status.message()),
        }
        result
    }
}

/// Whether an error is this daemon's trouble rather than the caller's mistake.
fn is_ours(code: tonic::Code) -> bool {
    use tonic::Code;
    matches!(
        code,
        Code::Internal | Code::DataLoss | Code::ResourceExhausted | Code::Unavailable | Code::Unknown
    )
}

/// The span of a call: who asks (namespace, lease), as part of what (trace), and about which snapshot. Calls of containerd's
/// collector carry none of the first.
fn span(method: Method, metadata: &MetadataMap, key: &str) -> tracing::Span {
    let text = |name: &str| metadata.get(name).and_then(|value| value.to_str().ok());
    // W3C trace context: version-traceid-parentid-flags.
    let trace = text("traceparent").and_then(|parent| parent.split('-').nth(1));
    let key = Key::new(key).ok();
    tracing::info_span!(
        "rpc",
        method = method.as_str(),
        namespace = text("containerd-namespace"),
        lease = text("containerd-lease"),
        trace_id = trace,
        key = key.map(tracing::field::display),
    )
}

#[tonic::async_trait]
impl Snapshots for SnapshotsService {
    type ListStream = ListStream;

    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Answer<wire::PrepareSnapshotResponse> {
        let span = span(Method::Prepare, request.metadata(), &request.get_ref().key);
        let (request, snapshotter) = (request.into_inner(), Arc::clone(&self.snapshotter));
        let prepare = async move {
            let (key, parent) = (Key::new(&request.key)?, Key::optional(&request.parent)?);
            match snapshotter.prepare(key, parent, convert::labels(request.labels)).await? {
                Prepared::Mounts(mounts) => Ok(mounts),
                // In containerd's protocol a remote hit is this error.
                Prepared::AlreadyCommitted(name) => Err(SnapshotError::AlreadyExists { key: name }),
            }
        };
        let mounts = convert::mounts(self.run_to_end(Method::Prepare, span, prepare).await?);
        Ok(Response::new(wire::PrepareSnapshotResponse { mounts }))
    }

    async fn view(&self, request: Request<wire::ViewSnapshotRequest>) -> Answer<wire::ViewSnapshotResponse> {
        let span = span(Method::View, request.metadata(), &request.get_ref().key);
        let (request, snapshotter) = (request.into_inner(), Arc::clone(&self.snapshotter));
        let view = async move {
            let (key, parent) = (Key::new(&request.key)?, Key::optional(&request.parent)?);
            snapshotter.view(key, parent, convert::labels(request.labels)).await
        };
        let mounts = convert::mounts(self.run_to_end(Method::View, span, view).await?);
        Ok(Response::new(wire::ViewSnapshotResponse { mounts }))
    }

    async fn mounts(&self, request: Request<wire::MountsRequest>) -> Answer<wire::MountsResponse> {
        let began = Instant::now();
        let span = span(Method::Mounts, request.metadata(), &request.get_ref().key);
        let mounts = Key::new(&request.get_ref().key).and_then(|key| self.snapshotter.mounts(&key));
        let mounts = convert::mounts(self.finish(Method::Mounts, &span, began, mounts)?);
        Ok(Response::new(wire::MountsResponse { mounts }))
    }

    async fn commit(&self, request: Request<wire::CommitSnapshotRequest>) -> Answer<()> {
        let span = span(Method::Commit, request.metadata(), &request.get_ref().key);
        let request = request.into_inner();
        let commit = async {
            let (name, key) = (Key::new(&request.name)?, Key::new(&request.key)?);
            let parent = Key::optional(&request.parent)?;
            self.snapshotter.commit(name, key, parent, convert::labels(request.labels)).await
        };
        self.run(Method::Commit, span, commit).await.map(Response::new)
    }

    async fn remove(&self, request: Request<wire::RemoveSnapshotRequest>) -> Answer<()> {
        let span = span(Method::Remove, request.metadata(), &request.get_ref().key);
        let remove = async { self.snapshotter.remove(Key::new(&request.get_ref().key)?).await };
        self.run(Method::Remove, span, remove).await.map(Response::new)
    }

    async fn stat(&self, request: Request<wire::StatSnapshotRequest>) -> Answer<wire::StatSnapshotResponse> {
        let began = Instant::now();
        let span = span(Method::Stat, request.metadata(), &request.get_ref().key);
        let info = Key::new(&request.get_ref().key).and_then(|key| self.snapshotter.stat(&key));
        let info = Some(convert::info(self.finish(Method::Stat, &span, began, info)?));
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
            self.snapshotter.update(Key::new(&info.name)?, update).await
        };
        let info = Some(convert::info(self.run(Method::Update, span, update).await?));
        Ok(Response::new(wire::UpdateSnapshotResponse { info }))
    }

    async fn list(&self, request: Request<wire::ListSnapshotsRequest>) -> Answer<Self::ListStream> {
        let began = Instant::now();
        let span = span(Method::List, request.metadata(), "");
        let (filters, snapshotter) = (request.into_inner().filters, Arc::clone(&self.snapshotter));
        let find = move || Filter::parse(&filters).map(|filter| snapshotter.list(&filter));
        // Matching a filter of somebody's making takes what it takes: not on the threads that everybody's calls need.
        let records = tokio::task::spawn_blocking(find).await;
        let records = records.map_err(|_| SnapshotError::ShuttingDown).and_then(|found| Ok(found?));
        let records = self.finish(Method::List, &span, began, records)?;
        let snapshotter = Arc::clone(&self.snapshotter);
        Ok(Response::new(ListStream { records: records.into_iter(), snapshotter }))
    }

    async fn usage(&self, request: Request<wire::UsageRequest>) -> Answer<wire::UsageResponse> {
        let span = span(Method::Usage, request.metadata(), &request.get_ref().key);
        let usage = async { self.snapshotter.usage(&Key::new(&request.get_ref().key)?).await };
        self.run(Method::Usage, span, usage).await.map(convert::usage).map(Response::new)
    }

    async fn cleanup(&self, request: Request<wire::CleanupRequest>) -> Answer<()> {
        let span = span(Method::Cleanup, request.metadata(), "");
        let cleanup = async {
            self.snapshotter.cleanup().await;
            Ok(())
        };
        self.run(Method::Cleanup, span, cleanup).await.map(Response::new)
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
