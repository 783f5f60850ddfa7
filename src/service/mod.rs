//! The wire: gRPC on a unix socket; metrics and the status page on a loopback port.
//!
//! **Where.** Built and owned by `daemon`; calls `snapshot` and nothing below it. The only module that knows gRPC: RPCs are in
//! `snapshots`, values are turned in `convert`, errors get their codes in `status`;
//! `page` is what a browser sees.
//!
//! **Invariants.** A call that changes something comes to its end even if its caller goes away. Nothing is answered that is not
//! durable.

use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::containerd::blob::Blobs;
use crate::proto::containerd::services::diff::v1::diff_server::DiffServer;
use crate::proto::containerd::services::snapshots::v1::snapshots_server::SnapshotsServer;
use crate::proto::speedy::v1::control_server::ControlServer;
use crate::snapshot::snapshotter::Snapshotter;
use crate::telemetry::Metrics;

mod call;
mod control;
mod convert;
mod diff;
mod page;
mod snapshots;
mod status;

pub use control::About;

/// containerd's own limit for messages, both ways.
const MESSAGE_BYTES: usize = 16 * 1024 * 1024;

/// Why serving ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket cannot be used.
    #[error("cannot use the socket: {0}")]
    Socket(#[source] std::io::Error),
    /// The metrics port cannot be used.
    #[error("cannot serve metrics on {address}: {source}")]
    Metrics {
        /// As configured.
        address: SocketAddr,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The gRPC server failed.
    #[error("gRPC server: {0}")]
    Grpc(#[source] tonic::transport::Error),
}

/// What is served.
#[derive(Debug)]
pub struct Served {
    /// The use cases.
    pub snapshotter: Arc<Snapshotter>,
    /// Those of another driver, for calls with this snapshotter's name.
    pub beside: Option<(String, Arc<Snapshotter>)>,
    /// Where layers to be applied are read from.
    pub blobs: Blobs,
    /// What the daemon says of itself.
    pub about: Arc<About>,
    /// What is counted.
    pub metrics: Metrics,
    /// Owns the calls that go on without their callers.
    pub tasks: TaskTracker,
}

/// Serves the snapshots API and the diff API, with health beside them, until `stop`; then finishes what was begun.
pub async fn serve(
    listener: UnixListener,
    served: Served,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let listener = tokio::net::UnixListener::from_std(listener).map_err(ServeError::Socket)?;
    let Served { snapshotter, beside, blobs, about, metrics, tasks } = served;
    let calls = call::Calls { tasks, metrics };
    let control = control::ControlService { snapshotter: Arc::clone(&snapshotter), about };
    let all = std::iter::once(&snapshotter).chain(beside.as_ref().map(|(_, beside)| beside));
    let diff = diff::DiffService { snapshotters: all.cloned().collect(), blobs, calls: calls.clone() };
    let service = snapshots::SnapshotsService { snapshotter, beside, calls };
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<SnapshotsServer<snapshots::SnapshotsService>>().await;
    let snapshots = SnapshotsServer::new(service)
        .max_decoding_message_size(MESSAGE_BYTES)
        .max_encoding_message_size(MESSAGE_BYTES);
    let diff = DiffServer::new(diff).max_decoding_message_size(MESSAGE_BYTES);
    tonic::transport::Server::builder()
        .add_service(health_service)
        .add_service(snapshots)
        .add_service(diff)
        .add_service(ControlServer::new(control))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled_owned())
        .await
        .map_err(ServeError::Grpc)
}

/// What is shown on the loopback port.
#[derive(Debug, Clone)]
pub struct Shown {
    /// What is counted.
    pub metrics: Metrics,
    /// The use cases.
    pub snapshotter: Arc<Snapshotter>,
    /// What the daemon says of itself.
    pub about: Arc<About>,
}

/// Serves `GET /metrics` and the status page, `GET /`, until `stop`.
pub async fn serve_metrics(
    listener: tokio::net::TcpListener,
    shown: Shown,
    stop: CancellationToken,
) -> std::io::Result<()> {
    const TEXT: [(&str, &str); 1] =
        [("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    let Shown { metrics, snapshotter, about } = shown;
    let text = move || {
        let metrics = metrics.clone();
        // Sizes of files are looked up for it.
        async move { (TEXT, tokio::task::spawn_blocking(move || metrics.text()).await.unwrap_or_default()) }
    };
    let control = control::ControlService { snapshotter, about };
    let page = move |headers: axum::http::HeaderMap| {
        let control = control.clone();
        async move {
            let host = headers.get(axum::http::header::HOST).map(|host| host.to_str().unwrap_or_default());
            if !page::is_own_host(host) {
                return Err((axum::http::StatusCode::FORBIDDEN, "ask by address, or as localhost\n"));
            }
            Ok((
                page::HEADERS,
                tokio::task::spawn_blocking(move || page::now(&control)).await.unwrap_or_default(),
            ))
        }
    };
    let router =
        axum::Router::new().route("/metrics", axum::routing::get(text)).route("/", axum::routing::get(page));
    // Not gracefully: somebody who holds a connection open must not hold up a stop.
    tokio::select! {
        () = stop.cancelled() => Ok(()),
        served = axum::serve(listener, router) => served,
    }
}

/// Takes the metrics port.
pub async fn bind_metrics(address: SocketAddr) -> Result<tokio::net::TcpListener, ServeError> {
    let bound = tokio::net::TcpListener::bind(address).await;
    bound.map_err(|source| ServeError::Metrics { address, source })
}
