//! The pull side of OCI's distribution API, for the time that a registry cannot be reached.
//!
//! **What.** [`Mirror`] answers for manifests and configurations from the documents on the store ([`crate::content::document`]);
//! layers it has none of: a snapshotter that finds them on the store needs no blobs. [`serve`] is the HTTP server on a loopback
//! port. containerd comes here last, after the registry itself (`speedy config hosts` prints its configuration).
//!
//! **Where.** Built and owned by `daemon`; calls [`crate::content`]. `request` reads what is asked, `probe` knows whether a registry
//! answers, `repositories` which document belongs to which repository. The only module that knows hyper and reqwest.
//!
//! **Words.** A *registry* is what a reference begins with, such as `docker.io`; containerd tells it in the parameter `ns`. The
//! *upstream* is the host that answers for it.
//!
//! **Invariants.**
//! * **R1** While the upstream gives any answer below 500, the answer here is 404. containerd asks the next host after 401, 403, 404
//!   and 429 too: whoever may not pull an image from the registry must not get it from here.
//! * **R2** A tag leads where an accepted publisher says; a document has the digest under which it is asked for.
//! * **R3** A host is probed only if an accepted publisher has named an image of it, of the very repository that is asked for: a local
//!   process cannot have this one connect wherever it likes. A probe is `GET /v2/`, carries no credentials, and follows no redirect.
//! * **R4** What a client can hold is bounded: connections, their headers, their time.
//!
//! **When it fails.** Every failure is a 404 and a line in the log: containerd then says of the pull what it would say without us.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use mirror::{Mirror, MirrorCounts};
pub use probe::{Probe, Reach, UpstreamProbe};
pub use request::{PLAIN, Upstream};

mod mirror;
mod probe;
mod repositories;
mod request;

/// Connections that are served at once; more of them wait.
const CONNECTIONS: usize = 32;
/// How long a client may take for the headers of a request, which is also how long a connection may be idle.
const HEADERS: Duration = Duration::from_secs(10);
/// How long a connection may live: whoever reads slowly is cut off.
const LIFETIME: Duration = Duration::from_secs(60);
/// More than a client of registries sends.
const MOST_HEADERS: usize = 64;
/// The longest head of a request, in bytes.
const LONGEST_HEAD: usize = 16 << 10;
/// How long nobody new is accepted after that failed, for want of descriptors say.
const REST: Duration = Duration::from_millis(200);

/// Why the port cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot answer as a registry on {address}: {source}")]
pub struct RegistryError {
    /// As configured.
    pub address: SocketAddr,
    /// The system's answer.
    #[source]
    pub source: std::io::Error,
}

/// Takes the port.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, RegistryError> {
    TcpListener::bind(address).await.map_err(|source| RegistryError { address, source })
}

/// Answers on this port until `stop`.
pub async fn serve(listener: TcpListener, mirror: Arc<Mirror>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS => match accepted {
                Ok((stream, _)) => drop(connections.spawn(connection(stream, Arc::clone(&mirror)))),
                Err(error) => {
                    tracing::warn!(%error, "a connection to the registry port cannot be accepted");
                    tokio::time::sleep(REST).await;
                }
            },
        }
    }
}

async fn connection(stream: TcpStream, mirror: Arc<Mirror>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let mirror = Arc::clone(&mirror);
        async move { Ok::<_, Infallible>(respond(&mirror, &request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .max_headers(MOST_HEADERS)
        .max_buf_size(LONGEST_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(LIFETIME, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a connection to the registry port ended"),
        Err(_) => tracing::debug!("a connection to the registry port took too long"),
    }
}

/// What the mirror answers.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    /// This is a registry.
    Version,
    /// A document.
    Document { media_type: String, digest: crate::oci::Digest, bytes: Bytes },
    /// Nothing, for this reason in OCI's words and ours.
    Refused { status: StatusCode, code: &'static str, message: String },
}

async fn respond(mirror: &Mirror, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let uri = request.uri();
    let answer = match *request.method() {
        Method::GET | Method::HEAD => mirror.answer(uri.path(), uri.query().unwrap_or_default()).await,
        _ => Answer::Refused {
            status: StatusCode::METHOD_NOT_ALLOWED,
            code: "UNSUPPORTED",
            message: "images can only be pulled from here".to_owned(),
        },
    };
    let mut response = to_response(answer);
    if request.method() == Method::HEAD {
        *response.body_mut() = Full::default();
    }
    response
}

/// With its length, which a HEAD tells too.
fn to_response(answer: Answer) -> Response<Full<Bytes>> {
    let (status, media_type, digest, body) = match answer {
        Answer::Version => (StatusCode::OK, "application/json".to_owned(), None, Bytes::from_static(b"{}")),
        Answer::Document { media_type, digest, bytes } => (StatusCode::OK, media_type, Some(digest), bytes),
        Answer::Refused { status, code, message } => {
            let body = json!({ "errors": [{ "code": code, "message": message }] });
            (status, "application/json".to_owned(), None, Bytes::from(body.to_string()))
        }
    };
    let length = HeaderValue::from(body.len());
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert("docker-distribution-api-version", HeaderValue::from_static("registry/2.0"));
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    headers.insert(CONTENT_LENGTH, length);
    let octets = HeaderValue::from_static("application/octet-stream");
    headers.insert(CONTENT_TYPE, HeaderValue::from_str(&media_type).unwrap_or(octets));
    if let Some(digest) = digest.and_then(|digest| HeaderValue::from_str(digest.as_str()).ok()) {
        headers.insert("docker-content-digest", digest);
    }
    response
}
