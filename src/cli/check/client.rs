//! Asking containerd who it is, over its own socket.
//!
//! Where: `run` calls [`ask`] and [`daemon`] once; the answers are plain values, so that everything that judges them
//! needs no connection. The connection is made by `crate::containerd`; only this part of `check` is asynchronous and
//! knows gRPC.
//!
//! Words: the *peer* of a unix socket is the process that listens on it.
//!
//! Invariants: containerd has five seconds for all its answers, then it counts as not answering.
//!
//! When it fails: [`AskError`]; nothing is kept open.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixStream;

use crate::containerd::{self, ContainerdError};
use crate::proto::containerd::services::introspection::v1 as introspection;
use crate::proto::containerd::services::introspection::v1::introspection_client::IntrospectionClient;
use crate::proto::containerd::services::version::v1::version_client::VersionClient;

/// How long containerd may take for its answers.
const TIME_LIMIT: Duration = Duration::from_secs(5);
/// Most bytes of one answer: the list of plugins is some 50 KiB.
const MESSAGE_LIMIT: usize = 16 << 20;

/// What a running containerd says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its version, as in `v2.4.2`.
    pub version: String,
    /// The commit it was built from.
    pub revision: String,
    /// Its process, where it can be seen from here.
    pub pid: Option<u32>,
    /// Its plugins, or why it would not tell.
    pub plugins: Result<Vec<Plugin>, String>,
}

/// One plugin of containerd.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plugin {
    /// Its type, such as `io.containerd.snapshotter.v1`.
    pub kind: String,
    /// Its name.
    pub id: String,
    /// What it tells others.
    pub exports: BTreeMap<String, String>,
    /// What it can do.
    pub capabilities: Vec<String>,
    /// Why it does not run.
    pub init_error: Option<String>,
}

/// Why containerd did not answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No such socket.
    #[error("containerd is not running: there is no {}", .0.display())]
    Absent(PathBuf),
    /// Nobody listens on it, or we may not connect.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It refused to answer.
    #[error("no answer from {}: {error}", path.display())]
    Refused {
        /// The socket.
        path: PathBuf,
        /// What it said instead.
        #[source]
        error: ContainerdError,
    },
    /// It took too long.
    #[error("{} did not answer within {} seconds", .0.display(), TIME_LIMIT.as_secs())]
    Timeout(PathBuf),
}

/// The process that listens on our own socket, if it is `speedy` itself. With socket activation the listener is the
/// service manager, which says nothing about the daemon.
pub async fn daemon(address: &Path) -> Option<u32> {
    let pid = peer(address).await.ok()??;
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    (name.trim_end() == "speedy").then_some(pid)
}

/// The process behind a socket; `None` when it lives in a process namespace that cannot be seen from here.
async fn peer(socket: &Path) -> io::Result<Option<u32>> {
    let connected = tokio::time::timeout(TIME_LIMIT, UnixStream::connect(socket)).await;
    let stream = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let pid = stream.peer_cred()?.pid();
    Ok(pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0))
}

/// Asks containerd for its version, its process and its plugins.
pub async fn ask(socket: &Path) -> Result<Answer, AskError> {
    let peer = peer(socket).await.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => AskError::Absent(socket.to_owned()),
        io::ErrorKind::TimedOut => AskError::Timeout(socket.to_owned()),
        _ => AskError::Connect { path: socket.to_owned(), source },
    })?;
    let answer = tokio::time::timeout(TIME_LIMIT, questions(socket, peer)).await;
    answer.map_err(|_| AskError::Timeout(socket.to_owned()))?
}

async fn questions(socket: &Path, peer: Option<u32>) -> Result<Answer, AskError> {
    let refused = |error: ContainerdError| AskError::Refused { path: socket.to_owned(), error };
    let channel = containerd::connect(socket).await.map_err(refused)?;
    let version = VersionClient::new(channel.clone()).version(()).await;
    let version = version.map_err(|status| refused(status.into()))?.into_inner();
    let mut client = IntrospectionClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT);
    let server = client.server(()).await.ok().map(tonic::Response::into_inner);
    let plugins = client.plugins(introspection::PluginsRequest::default()).await;
    Ok(Answer {
        version: version.version,
        revision: version.revision,
        pid: server.and_then(|server| visible_pid(&server, own_pid_namespace())).or(peer),
        plugins: plugins
            .map(|response| response.into_inner().plugins.into_iter().map(Plugin::from).collect())
            .map_err(|status| status.to_string()),
    })
}

/// containerd's own idea of its process number, if it means the same to us.
fn visible_pid(server: &introspection::ServerResponse, ours: Option<u64>) -> Option<u32> {
    let same = server.pidns == 0 || Some(server.pidns) == ours;
    u32::try_from(server.pid).ok().filter(|pid| same && *pid != 0)
}

/// The number in `pid:[4026531836]`.
fn own_pid_namespace() -> Option<u64> {
    let link = std::fs::read_link("/proc/self/ns/pid").ok()?;
    link.to_str()?.strip_prefix("pid:[")?.strip_suffix(']')?.parse().ok()
}

impl From<introspection::Plugin> for Plugin {
    fn from(plugin: introspection::Plugin) -> Plugin {
        Plugin {
            kind: plugin.r#type,
            id: plugin.id,
            exports: plugin.exports.into_iter().collect(),
            capabilities: plugin.capabilities,
            init_error: plugin.init_err.map(|status| status.message),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::wrappers::UnixListenerStream;
    use tonic::{Request, Response, Status};

    use super::*;
    use crate::proto::containerd::services::introspection::v1::introspection_server::{
        Introspection, IntrospectionServer,
    };
    use crate::proto::containerd::services::version::v1::VersionResponse;
    use crate::proto::containerd::services::version::v1::version_server::{Version, VersionServer};

    /// A containerd of a few lines.
    struct Small;

    #[tonic::async_trait]
    impl Version for Small {
        async fn version(&self, _: Request<()>) -> Result<Response<VersionResponse>, Status> {
            Ok(Response::new(VersionResponse { version: "v2.4.2".into(), revision: "abc".into() }))
        }
    }

    #[tonic::async_trait]
    impl Introspection for Small {
        async fn plugins(
            &self,
            _: Request<introspection::PluginsRequest>,
        ) -> Result<Response<introspection::PluginsResponse>, Status> {
            let plugin = introspection::Plugin {
                r#type: "io.containerd.snapshotter.v1".into(),
                id: "speedy".into(),
                exports: [("root".to_owned(), "/r".to_owned())].into(),
                capabilities: vec!["remap-ids".into()],
                init_err: Some(crate::proto::google::rpc::Status {
                    message: "broken".into(),
                    ..Default::default()
                }),
                ..Default::default()
            };
            Ok(Response::new(introspection::PluginsResponse { plugins: vec![plugin] }))
        }

        async fn server(&self, _: Request<()>) -> Result<Response<introspection::ServerResponse>, Status> {
            let pid = 4_000_000_001;
            Ok(Response::new(introspection::ServerResponse { pid, pidns: 1, ..Default::default() }))
        }

        async fn plugin_info(
            &self,
            _: Request<introspection::PluginInfoRequest>,
        ) -> Result<Response<introspection::PluginInfoResponse>, Status> {
            Err(Status::unimplemented("not here"))
        }
    }

    #[tokio::test]
    async fn a_running_containerd_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("c.sock");
        let incoming = UnixListenerStream::new(tokio::net::UnixListener::bind(&socket).unwrap());
        let server = tonic::transport::Server::builder()
            .add_service(VersionServer::new(Small))
            .add_service(IntrospectionServer::new(Small));
        let answer = tokio::select! {
            answer = ask(&socket) => answer.unwrap(),
            ended = server.serve_with_incoming(incoming) => panic!("the server ended: {ended:?}"),
        };
        assert_eq!((answer.version.as_str(), answer.revision.as_str()), ("v2.4.2", "abc"));
        // The number it tells belongs to another process namespace, so the socket's peer counts.
        assert_eq!(answer.pid, Some(std::process::id()));
        let plugins = answer.plugins.unwrap();
        assert_eq!(plugins[0].exports["root"], "/r");
        assert_eq!(plugins[0].init_error.as_deref(), Some("broken"));
        assert_eq!(daemon(&socket).await, None, "this test is not the daemon");
    }

    #[tokio::test]
    async fn a_missing_or_dead_containerd_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("c.sock");
        assert!(matches!(ask(&socket).await, Err(AskError::Absent(_))));
        drop(tokio::net::UnixListener::bind(&socket).unwrap());
        assert!(matches!(ask(&socket).await, Err(AskError::Connect { .. })));
    }

    #[test]
    fn a_number_of_another_process_namespace_means_nothing_here() {
        let server = |pid, pidns| introspection::ServerResponse { pid, pidns, ..Default::default() };
        assert_eq!(visible_pid(&server(7, 5), Some(5)), Some(7));
        assert_eq!(visible_pid(&server(7, 5), Some(6)), None);
        assert_eq!(visible_pid(&server(7, 0), None), Some(7));
        assert_eq!(visible_pid(&server(0, 5), Some(5)), None);
    }
}
