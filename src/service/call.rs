//! What every call has in common: its span, its count, and its end even if the caller goes away.

use std::time::Instant;

use tokio_util::task::TaskTracker;
use tonic::Status;
use tonic::metadata::MetadataMap;
use tracing::Instrument;

use super::status;
use crate::snapshot::{Key, SnapshotError};
use crate::telemetry::{Method, Metrics};

/// Runs calls. `tasks` owns those of several steps: they come to their end even if the caller goes away.
#[derive(Debug, Clone)]
pub(super) struct Calls {
    pub(super) tasks: TaskTracker,
    pub(super) metrics: Metrics,
}

impl Calls {
    /// Runs a use case of several steps under its span, counts it, and gives its error a code. It runs on a task of its own: a
    /// caller that cancels or times out does not leave it half done.
    pub(super) async fn run_to_end<T: Send + 'static>(
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
    pub(super) async fn run<T>(
        &self,
        method: Method,
        span: tracing::Span,
        run: impl Future<Output = Result<T, SnapshotError>>,
    ) -> Result<T, Status> {
        let began = Instant::now();
        let result = run.instrument(span.clone()).await;
        self.finish(method, &span, began, result)
    }

    pub(super) fn finish<T>(
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
pub(super) fn span(method: Method, metadata: &MetadataMap, key: &str) -> tracing::Span {
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
