//! The keeper and a real FUSE connection that nobody serves.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags};
use speedy::keeper::client::Keeper;
use speedy::keeper::protocol::Name;
use speedy::sys::fusectl::CONNECTIONS;

use crate::process::require_root;

const PATIENCE: Duration = Duration::from_secs(20);

/// A FUSE whose connection is `device`; out of sight when dropped.
struct Mounted {
    point: PathBuf,
    device: Option<File>,
    connection: u32,
}

impl Mounted {
    fn new(point: &Path) -> Mounted {
        std::fs::create_dir(point).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let data = std::ffi::CString::new(data).unwrap();
        rustix::mount::mount("keeper-test", point, "fuse", MountFlags::empty(), data.as_c_str()).unwrap();
        // Nothing may ask the mount itself: there is nobody to answer. The number is the minor one of its device.
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = table.lines().find(|line| line.contains(point.to_str().unwrap())).unwrap();
        let numbers = line.split(' ').nth(2).unwrap().to_owned();
        let connection = numbers.split_once(':').unwrap().1.parse().unwrap();
        Mounted { point: point.to_owned(), device: Some(device), connection }
    }

    /// Asks for something that only a daemon could answer; the receiver hears when it is over.
    fn ask(&self) -> mpsc::Receiver<std::io::Result<()>> {
        let (over, heard) = mpsc::channel();
        let path = self.point.join("file");
        std::thread::spawn(move || over.send(File::open(path).map(drop)));
        heard
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.point, UnmountFlags::DETACH).unwrap();
    }
}

pub(crate) fn start(dir: &Path) -> std::process::Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_speedy"));
    command.env_clear().arg("keeper").arg("--socket").arg(dir.join("k.sock"));
    command.stdin(Stdio::null()).stderr(File::create(dir.join("log")).unwrap());
    let child = command.spawn().unwrap();
    let started = Instant::now();
    while !std::fs::read_to_string(dir.join("log")).unwrap().contains("keeping") {
        assert!(started.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

/// Its device stays open here, so that it is the abort that ends the wait and not the last close.
#[test]
fn keeper_aborts_the_connection_when_no_daemon_comes_back() {
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let list_was_there = list_is_mounted();
    let mut child = start(dir.path());
    let fuse = Mounted::new(&dir.path().join("mnt"));
    let daemon = Keeper::connect(&dir.path().join("k.sock")).unwrap();
    daemon.put(&Name::new("fuse").unwrap(), fuse.device.as_ref().unwrap().as_fd()).unwrap();
    daemon.dead_man(Duration::from_secs(1), Some(fuse.connection)).unwrap();
    let over = fuse.ask();
    assert!(over.recv_timeout(Duration::from_millis(1500)).is_err(), "nobody answers, and it is over");
    drop(daemon);
    let answer = over.recv_timeout(PATIENCE).unwrap();
    assert!(answer.is_err());
    // The reader may hear of it before it is written down.
    let told = Instant::now();
    loop {
        let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
        if log.contains("gave up what was kept") && log.contains("aborted") {
            break;
        }
        assert!(told.elapsed() < PATIENCE, "{log}");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // The keeper mounts the list where the system has not; the machine is left as it was.
    assert!(list_is_mounted());
    if !list_was_there {
        rustix::mount::unmount(CONNECTIONS, UnmountFlags::DETACH).unwrap();
    }
}

fn list_is_mounted() -> bool {
    std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(" - fusectl ")
}

/// The daemon dies and another takes the same connection; who waits does not notice but for the time.
#[test]
fn keeper_lets_the_next_daemon_answer_what_the_last_was_asked() {
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let mut child = start(dir.path());
    let mut fuse = Mounted::new(&dir.path().join("mnt"));
    let daemon = Keeper::connect(&dir.path().join("k.sock")).unwrap();
    let name = Name::new("fuse").unwrap();
    daemon.put(&name, fuse.device.as_ref().unwrap().as_fd()).unwrap();
    let over = fuse.ask();
    // All descriptors of the first daemon are gone, as at its death.
    fuse.device = None;
    drop(daemon);
    assert!(over.recv_timeout(Duration::from_millis(500)).is_err());
    let next = Keeper::connect(&dir.path().join("k.sock")).unwrap();
    let mut device = File::from(next.get(&name).unwrap().unwrap());
    // The first request of a connection, FUSE_INIT (26), is still there to be answered.
    let mut request = vec![0; 1 << 16];
    let length = device.read(&mut request).unwrap();
    assert!(length >= 40);
    assert_eq!(u32::from_le_bytes(request[4..8].try_into().unwrap()), 26);
    next.release().unwrap();
    drop(device);
    drop(fuse);
    assert!(over.recv_timeout(PATIENCE).unwrap().is_err());
    child.kill().unwrap();
    child.wait().unwrap();
}
