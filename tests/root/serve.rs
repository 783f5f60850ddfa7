//! The daemon's life: socket, signals, systemd, two of them.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::{Command, Stdio};
use std::time::Duration;

use speedy::proto::containerd::services::snapshots::v1 as wire;

use crate::crash::require_equal;
use crate::process::{Daemon, Place, commit, list, prepare, runtime};

#[test]
fn the_socket_is_private_and_gone_after_a_clean_stop() {
    let place = Place::new();
    runtime().block_on(async {
        let mut daemon = place.start();
        let mut client = daemon.client(&place.socket()).await;
        assert_eq!(std::fs::metadata(place.socket()).unwrap().permissions().mode() & 0o777, 0o600);
        client.prepare(prepare("a", "", &[])).await.unwrap();
        daemon.signal("TERM");
        assert!(daemon.wait().success(), "{}", daemon.log());
        assert!(!place.socket().exists());
        let mut daemon = place.start();
        let mut client = daemon.client(&place.socket()).await;
        assert_eq!(list(&mut client).await.len(), 1);
    });
}

/// What containers wait for must not wait for the disk of the daemon's program; where that cannot be had it runs all the same.
#[test]
fn the_program_stays_in_memory_where_it_may() {
    let locked = |daemon: &crate::process::Daemon| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap().to_owned();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let place = Place::new();
    runtime().block_on(async {
        let mut daemon = place.start();
        daemon.client(&place.socket()).await;
        assert!(locked(&daemon) > 1024, "{} KiB", locked(&daemon));
        daemon.kill();
        let command = place.command();
        let mut limited = Command::new("/bin/sh");
        let drop_rights = "ulimit -l 0; exec setpriv --bounding-set -ipc_lock,-sys_resource \"$@\"";
        limited.args(["-c", drop_rights, "sh"]).arg(command.get_program()).args(command.get_args());
        let mut daemon = place.start_command(limited);
        daemon.client(&place.socket()).await;
        assert_eq!(locked(&daemon), 0);
        assert!(daemon.log().contains("not locked in memory"), "{}", daemon.log());
    });
}

#[test]
fn a_stale_socket_is_replaced() {
    let place = Place::new();
    runtime().block_on(async {
        let mut daemon = place.start();
        daemon.client(&place.socket()).await;
        daemon.kill();
        assert!(place.socket().exists());
        place.start().client(&place.socket()).await;
    });
}

#[test]
fn two_daemons_share_neither_root_nor_socket() {
    let place = Place::new();
    runtime().block_on(async {
        let mut daemon = place.start();
        let mut client = daemon.client(&place.socket()).await;
        client.prepare(prepare("a", "", &[])).await.unwrap();

        let program = env!("CARGO_BIN_EXE_speedy");
        let mut same_root = Command::new(program);
        same_root.env_clear().args(["serve", "--root"]).arg(place.root());
        same_root.arg("--address").arg(place.path("other.sock"));
        let refused = same_root.output().unwrap();
        assert_eq!(refused.status.code(), Some(1));
        let message = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(message.contains("in use by another speedy"), "{message}");

        let mut same_socket = Command::new(program);
        same_socket.env_clear().args(["serve", "--root"]).arg(place.path("other"));
        same_socket.arg("--address").arg(place.socket());
        let refused = same_socket.output().unwrap();
        assert_eq!(refused.status.code(), Some(1));
        let message = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(message.contains("another process answers"), "{message}");

        assert_eq!(list(&mut client).await.len(), 1, "the first one is not disturbed");
    });
}

#[test]
fn systemd_gets_its_notifications_and_keeps_its_socket() {
    let place = Place::new();
    let notify = UnixDatagram::bind(place.path("notify")).unwrap();
    notify.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let said = || {
        let mut buffer = [0; 256];
        let length = notify.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    runtime().block_on(async {
        // As systemd does it: the socket exists before the daemon and is passed as descriptor 3.
        let listener = UnixListener::bind(place.path("passed.sock")).unwrap();
        let mut command = Command::new("sh");
        let serve = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\" 3<&0 </dev/null";
        command.env_clear().arg("-c").arg(serve).arg(env!("CARGO_BIN_EXE_speedy")).arg("serve");
        command.arg("--root").arg(place.root()).arg("--address").arg(place.socket());
        command.env("NOTIFY_SOCKET", place.path("notify")).env("PATH", "/usr/bin:/bin");
        command.stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)));
        let mut daemon = place.start_command(command);
        assert!(said().contains("READY=1"), "{}", daemon.log());
        daemon.client(&place.path("passed.sock")).await;
        assert!(!place.socket().exists(), "no second socket");
        daemon.signal("TERM");
        assert!(said().contains("STOPPING=1"));
        assert!(daemon.wait().success(), "{}", daemon.log());
        assert!(place.path("passed.sock").exists(), "the socket is systemd's");
    });
}

#[test]
fn calls_that_have_begun_are_finished_at_a_stop() {
    let place = Place::new();
    runtime().block_on(async {
        let mut daemon = place.start();
        let client = daemon.client(&place.socket()).await;
        let mut calls = tokio::task::JoinSet::new();
        for n in 0..64 {
            let mut client = client.clone();
            calls.spawn(async move {
                let key = format!("key {n}");
                let made = client.prepare(prepare(&key, "", &[])).await.is_ok();
                made.then_some(key)
            });
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        daemon.signal("TERM");
        let mut answered: Vec<String> = calls.join_all().await.into_iter().flatten().collect();
        assert!(daemon.wait().success(), "{}", daemon.log());
        let mut daemon = place.start();
        let mut client = daemon.client(&place.socket()).await;
        let found: Vec<String> = list(&mut client).await.into_iter().map(|i| i.name).collect();
        answered.retain(|key| !found.contains(key));
        assert!(answered.is_empty(), "answered but lost: {answered:?}");
    });
}

#[test]
fn a_call_that_is_given_up_is_done_or_not_done() {
    let place = Place::new();
    runtime().block_on(async {
        let mut daemon = place.start();
        let mut client = daemon.client(&place.socket()).await;
        for n in 0..50_u64 {
            let mut request = tonic::Request::new(prepare(&format!("key {n}"), "", &[]));
            request.set_timeout(Duration::from_micros(n * 20));
            drop(client.prepare(request).await);
        }
        // What has begun goes on without its caller; a clean stop waits for it.
        daemon.signal("TERM");
        assert!(daemon.wait().success(), "{}", daemon.log());
        let mut daemon = place.start();
        let mut client = daemon.client(&place.socket()).await;
        for info in list(&mut client).await {
            client.commit(commit(&format!("{} done", info.name), &info.name)).await.unwrap();
        }
        client.cleanup(wire::CleanupRequest::default()).await.unwrap();
        require_equal(&place, "given up");
    });
}

/// Where it answers for metrics, as it says when it is ready.
pub(crate) fn metrics_of(daemon: &Daemon) -> String {
    let log = daemon.log();
    log.split("\"metrics\":\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap().to_owned()
}

/// What the loopback port answers to this request.
pub(crate) fn asked(at: &str, path: &str, host: &str) -> String {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(at).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn metrics_and_the_status_page_are_served_on_loopback() {
    let place = Place::new();
    runtime().block_on(async {
        let mut command = place.command();
        command.args(["--metrics", "127.0.0.1:0"]);
        let mut daemon = place.start_command(command);
        let mut client = daemon.client(&place.socket()).await;
        client.prepare(prepare("a", "", &[])).await.unwrap();
        client.prepare(prepare("a", "", &[])).await.unwrap_err();
        let at = metrics_of(&daemon);
        let text = asked(&at, "/metrics", "x");
        for line in [
            "speedy_rpc_calls_total{method=\"Prepare\",code=\"OK\"} 1",
            "speedy_rpc_calls_total{method=\"Prepare\",code=\"AlreadyExists\"} 1",
            "speedy_rpc_duration_seconds_count{method=\"Prepare\"} 2",
            "speedy_snapshots{kind=\"active\"} 1",
            "speedy_pending_removals 0",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        let page = asked(&at, "/", &at);
        for part in ["200 OK", "content-security-policy: default-src 'none'", "1 active", "</html>"] {
            assert!(page.contains(part), "{part} is not in\n{page}");
        }
        assert!(
            page.contains("SpeedyContainerdAway"),
            "there is no containerd, and the page says so:\n{page}"
        );
        assert!(asked(&at, "/", "evil.example").contains("403 Forbidden"));
    });
}
