//! The real binary as a child process, and a client of it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use speedy::proto::containerd::services::snapshots::v1 as wire;
use speedy::proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use tonic::transport::Channel;

pub(crate) type Client = SnapshotsClient<Channel>;

/// For a daemon on an emulated processor, whose pool is slow besides, too.
const PATIENCE: Duration = Duration::from_secs(60);

/// Fails loudly where the tests cannot run.
pub(crate) fn require_root() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let uid = status.lines().find(|l| l.starts_with("Uid:")).unwrap().split_whitespace().nth(2);
    assert_eq!(uid, Some("0"), "this test needs root (contrib/test counts it as skipped without)");
}

/// Whoever reads next finds nothing of a disk in memory.
pub(crate) fn drop_caches() {
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// A directory for a root and a socket, with short names: a socket's path ends at 107 bytes.
pub(crate) struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Place {
        require_root();
        Place { dir: tempfile::Builder::new().prefix("spd").tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.path("root")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("s.sock")
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_speedy"));
        command.env_clear().arg("serve").arg("--root").arg(self.root()).arg("--address").arg(self.socket());
        command.arg("--containerd").arg(self.path("no-containerd.sock"));
        command
    }

    pub(crate) fn start(&self) -> Daemon {
        self.start_command(self.command())
    }

    pub(crate) fn start_command(&self, mut command: Command) -> Daemon {
        let log = self.path("log");
        let file = File::options().create(true).append(true).open(&log).unwrap();
        let child = command.stderr(file).stdout(Stdio::null()).spawn().unwrap();
        Daemon { child, log }
    }
}

pub(crate) struct Daemon {
    pub(crate) child: Child,
    log: PathBuf,
}

impl Daemon {
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(began.elapsed() < PATIENCE, "the daemon does not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until the socket answers.
    pub(crate) async fn client(&mut self, socket: &Path) -> Client {
        let began = Instant::now();
        loop {
            if let Ok(channel) = speedy::containerd::connect(socket).await {
                return SnapshotsClient::new(channel);
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() && began.elapsed() < PATIENCE, "no answer ({ended:?}):\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

pub(crate) fn prepare(key: &str, parent: &str, labels: &[(&str, &str)]) -> wire::PrepareSnapshotRequest {
    wire::PrepareSnapshotRequest {
        snapshotter: "speedy".into(),
        key: key.into(),
        parent: parent.into(),
        labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
    }
}

pub(crate) fn commit(name: &str, key: &str) -> wire::CommitSnapshotRequest {
    wire::CommitSnapshotRequest {
        snapshotter: "speedy".into(),
        name: name.into(),
        key: key.into(),
        ..Default::default()
    }
}

pub(crate) async fn list(client: &mut Client) -> Vec<wire::Info> {
    let mut stream = client.list(wire::ListSnapshotsRequest::default()).await.unwrap().into_inner();
    let mut all = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        all.extend(message.info);
    }
    all
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}
