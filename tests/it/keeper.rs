//! The keeper as a real process, and clients of it: good ones, dead ones and hostile ones.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use speedy::keeper::client::{Keeper, KeeperError};
use speedy::keeper::protocol::{
    Answer, LONGEST_MESSAGE, MOST_HELD, Name, Refusal, Request, decode_answer, encode_request,
};
use speedy::sys::fdpass::{Channel, MOST_DESCRIPTORS};

const SPEEDY: &str = env!("CARGO_BIN_EXE_speedy");
const PATIENCE: Duration = Duration::from_secs(20);

/// A keeper that is killed at the end of the test, if it is still there.
struct Running {
    dir: tempfile::TempDir,
    child: Child,
}

impl Running {
    fn start() -> Running {
        Running::start_from(SPEEDY.as_ref(), tempfile::tempdir().unwrap())
    }

    fn start_from(program: &Path, dir: tempfile::TempDir) -> Running {
        let log = File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new(program);
        command.env_clear().arg("keeper").arg("--socket").arg(dir.path().join("k.sock"));
        command.args(["--dead-man", "100"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().unwrap();
        let running = Running { dir, child };
        running.until_logged("keeping");
        running
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("k.sock")
    }

    fn connect(&self) -> Keeper {
        Keeper::connect(&self.socket()).unwrap()
    }

    fn raw(&self) -> Channel {
        Channel::connect(&self.socket(), PATIENCE).unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    fn until_logged(&self, text: &str) {
        until(|| self.log().contains(text), || format!("{text:?} is not in the log:\n{}", self.log()));
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    fn ended(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            match self.child.try_wait().unwrap() {
                Some(status) => return status,
                None => assert!(started.elapsed() < PATIENCE, "still there:\n{}", self.log()),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The descriptors of the process beyond standard input, output and error: those that exec would close, and the others.
    fn descriptors(&self) -> (usize, usize) {
        let dir = format!("/proc/{}/fdinfo", self.child.id());
        let (mut closing, mut others) = (0, 0);
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let number: u32 = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
            let Ok(text) = std::fs::read_to_string(&path) else { continue };
            let flags = text.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim().to_owned();
            match i64::from_str_radix(&flags, 8).unwrap() & 0o2_000_000 {
                _ if number < 3 => {}
                0 => others += 1,
                _ => closing += 1,
            }
        }
        (closing, others)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already, which is no error here.
        if self.child.kill().is_ok() {
            self.child.wait().unwrap();
        }
    }
}

fn until(mut done: impl FnMut() -> bool, or: impl Fn() -> String) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < PATIENCE, "{}", or());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn pipe() -> (File, File) {
    let (reader, writer) = std::io::pipe().unwrap();
    (OwnedFd::from(reader).into(), OwnedFd::from(writer).into())
}

/// Another process copies: were it this one, a child that another test starts meanwhile could have the file open for writing,
/// and running it would fail (ETXTBSY).
fn install(program: &Path) {
    assert!(Command::new("cp").arg(SPEEDY).arg(program).status().unwrap().success());
}

fn ask(channel: &Channel, request: &Request) -> Answer {
    channel.send(&encode_request(request).unwrap(), &[]).unwrap();
    answer(channel)
}

fn answer(channel: &Channel) -> Answer {
    let mut buffer = vec![0; LONGEST_MESSAGE];
    let (length, descriptors) = channel.receive(&mut buffer).unwrap();
    decode_answer(&buffer[..length], descriptors.len()).unwrap()
}

#[test]
fn what_was_left_is_the_same_open_file_for_the_next_daemon() {
    let running = Running::start();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"0123456789").unwrap();
    let first = running.connect();
    first.put(&name("journal/1"), file.as_fd()).unwrap();
    first.put(&name("fuse"), File::open("/dev/null").unwrap().as_fd()).unwrap();
    drop(first);

    let second = running.connect();
    assert_eq!(second.held(), 2);
    assert_eq!(second.list().unwrap(), [name("fuse"), name("journal/1")]);
    let mut got = File::from(second.get(&name("journal/1")).unwrap().unwrap());
    // One position for both: it is one open file, not the file opened twice.
    file.seek(SeekFrom::Start(7)).unwrap();
    let mut rest = String::new();
    got.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "789");
    assert!(second.get(&name("absent")).unwrap().is_none());
    assert!(second.remove(&name("fuse")).unwrap() && !second.remove(&name("fuse")).unwrap());
    // A second one of the same name takes the place of the first.
    second.put(&name("journal/1"), File::open("/dev/null").unwrap().as_fd()).unwrap();
    assert_eq!(second.list().unwrap(), [name("journal/1")]);
}

#[test]
fn a_client_that_is_killed_leaves_what_it_put() {
    let running = Running::start();
    let (mut reader, writer) = pipe();
    // The connection is inherited by a process that is killed while it has it.
    let channel = running.raw();
    let hello = Request::Hello { version: 1, pid: 1 };
    assert!(matches!(ask(&channel, &hello), Answer::Welcome { held: 0, .. }));
    channel.send(&encode_request(&Request::Put { name: name("w") }).unwrap(), &[writer.as_fd()]).unwrap();
    let end = channel.as_fd().try_clone_to_owned().unwrap();
    let mut client = Command::new("sleep").arg("100").stdin(end).spawn().unwrap();
    drop((channel, writer));
    client.kill().unwrap();
    client.wait().unwrap();
    running.until_logged("the daemon is gone");
    let next = running.connect();
    File::from(next.get(&name("w")).unwrap().unwrap()).write_all(b"alive").unwrap();
    next.release().unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "alive");
}

#[test]
fn who_says_hello_last_is_the_owner_at_once() {
    let running = Running::start();
    let first = running.connect();
    first.put(&name("a"), File::open("/dev/null").unwrap().as_fd()).unwrap();
    assert!(!first.lost());
    let second = running.connect();
    assert!(first.lost());
    assert!(matches!(first.list(), Err(KeeperError::Lost)));
    assert!(first.lost());
    drop(first);
    // The end of the first one's connection starts no clock.
    assert_eq!(second.list().unwrap(), [name("a")]);
    assert!(!running.log().contains("the daemon is gone"), "{}", running.log());
}

#[test]
fn the_dead_mans_clock_ends_what_nobody_owns() {
    let running = Running::start();
    let (mut reader, writer) = pipe();
    let client = running.connect();
    client.put(&name("w"), writer.as_fd()).unwrap();
    client.dead_man(Duration::from_secs(1), None).unwrap();
    drop(writer);
    drop(client);
    let started = Instant::now();
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    let took = started.elapsed();
    assert!(took > Duration::from_millis(900), "{took:?}");
    running.until_logged("gave up what was kept");
    assert!(running.log().contains("EIO"), "{}", running.log());
    assert_eq!(running.connect().held(), 0);
}

#[test]
fn a_new_owner_stops_the_clock() {
    let running = Running::start();
    let first = running.connect();
    first.put(&name("a"), File::open("/dev/null").unwrap().as_fd()).unwrap();
    first.dead_man(Duration::from_secs(1), None).unwrap();
    drop(first);
    running.until_logged("the daemon is gone");
    let second = running.connect();
    std::thread::sleep(Duration::from_millis(1300));
    assert_eq!(second.list().unwrap(), [name("a")]);
    // Nothing is kept for nobody after a release.
    second.release().unwrap();
    drop(second);
    running.until_logged("nothing was held");
    assert_eq!(running.connect().held(), 0);
}

#[test]
fn an_upgrade_keeps_everything() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("speedy");
    install(&program);
    let running = Running::start_from(&program, dir);
    let (mut reader, writer) = pipe();
    let client = running.connect();
    client.put(&name("w"), writer.as_fd()).unwrap();
    client.dead_man(Duration::from_secs(2), None).unwrap();
    drop(writer);
    let guest = running.raw();
    let list = Request::List { after: None };
    assert!(matches!(ask(&guest, &list), Answer::Refused { reason: Refusal::NotOwner, .. }));
    let before = running.descriptors();

    // As an installation does it: a new file under the old name.
    let exe = format!("/proc/{}/exe", running.child.id());
    install(&running.dir.path().join("new"));
    std::fs::rename(running.dir.path().join("new"), &program).unwrap();
    assert!(std::fs::read_link(&exe).unwrap().to_str().unwrap().ends_with(" (deleted)"));
    running.signal("USR2");
    running.until_logged("upgraded");
    assert_eq!(std::fs::read_link(&exe).unwrap(), program);
    assert!(!client.lost());
    assert_eq!(client.list().unwrap(), [name("w")]);
    client.upgrade().unwrap();
    client.upgrade().unwrap();
    assert_eq!(client.list().unwrap(), [name("w")]);
    assert!(matches!(ask(&guest, &list), Answer::Refused { reason: Refusal::NotOwner, .. }));
    // All closed on exec again, and nothing left over.
    assert_eq!(running.descriptors(), before);

    // The clock goes on through an upgrade.
    drop(client);
    running.until_logged("the daemon is gone");
    let started = Instant::now();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(Keeper::replace(&running.socket()).unwrap(), 1);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
}

/// A signal may come at any time: between a request and its answer, during another upgrade, just before the end.
#[test]
fn upgrades_at_any_time_lose_no_request() {
    let mut running = Running::start();
    let client = running.connect();
    let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let requests = scope.spawn(|| {
            let file = File::open("/dev/null").unwrap();
            while !stop.load(Relaxed) {
                let name = name(&format!("n{}", done.fetch_add(1, Relaxed) % 50));
                client.put(&name, file.as_fd()).unwrap();
                assert!(client.get(&name).unwrap().is_some());
            }
        });
        for count in 1..=10 {
            running.signal("USR2");
            running.signal("USR2");
            let seen = || running.log().matches("upgraded").count();
            until(|| seen() >= count, || format!("{} upgrades:\n{}", seen(), running.log()));
            let before = done.load(Relaxed);
            until(|| done.load(Relaxed) > before + 20, || "no request is answered".to_owned());
        }
        stop.store(true, Relaxed);
        requests.join().unwrap();
    });
    assert_eq!(client.list().unwrap().len(), 50);
    running.signal("USR2");
    running.signal("TERM");
    assert_eq!(running.ended().code(), Some(0));
    assert!(!running.log().contains("the daemon is gone"), "{}", running.log());
}

/// Somebody goes back to a version that has no keeper: an exec of it would end, and with it what is held.
#[test]
fn a_program_that_cannot_take_over_does_not_get_the_chance() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("speedy");
    install(&program);
    let running = Running::start_from(&program, dir);
    let client = running.connect();
    client.put(&name("a"), File::open("/dev/null").unwrap().as_fd()).unwrap();
    let before = running.descriptors();
    let older = "#!/bin/sh\necho 'error: unrecognized subcommand' >&2\nexit 2\n";
    for bad in [Some(older), Some("garbage"), None] {
        std::fs::remove_file(&program).unwrap();
        if let Some(text) = bad {
            std::fs::write(&program, text).unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(&program, mode).unwrap();
        }
        let error = client.upgrade().unwrap_err();
        assert!(matches!(error, KeeperError::Refused { reason: Refusal::UpgradeFailed, .. }), "{error}");
        assert_eq!(client.list().unwrap(), [name("a")]);
    }
    assert_eq!(running.descriptors(), before);
}

#[test]
fn sigterm_gives_up_and_ends_and_other_signals_do_nothing() {
    let mut running = Running::start();
    let (mut reader, writer) = pipe();
    let client = running.connect();
    client.put(&name("w"), writer.as_fd()).unwrap();
    drop(writer);
    running.signal("INT");
    running.signal("HUP");
    assert_eq!(client.list().unwrap(), [name("w")]);
    running.signal("TERM");
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    assert_eq!(running.ended().code(), Some(0));
    assert!(client.lost());
    assert!(matches!(client.list(), Err(KeeperError::Lost)));
    assert!(!running.socket().exists());
    assert!(matches!(Keeper::connect(&running.socket()), Err(KeeperError::Absent { .. })));
    assert!(running.log().contains("told to end"), "{}", running.log());
}

#[test]
fn one_keeper_a_socket() {
    let mut running = Running::start();
    let mut second = Command::new(SPEEDY);
    second.env_clear().arg("keeper").arg("--socket").arg(running.socket());
    let refused = second.output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("is in use: another process answers on it"), "{said}");
    // One that was killed leaves its socket behind, which is no obstacle.
    running.child.kill().unwrap();
    running.ended();
    let dir = std::mem::replace(&mut running.dir, tempfile::tempdir().unwrap());
    assert!(dir.path().join("k.sock").exists());
    Running::start_from(SPEEDY.as_ref(), dir).connect();
}

#[test]
fn nonsense_is_refused_and_the_owner_does_not_notice() {
    let running = Running::start();
    let owner = running.connect();
    owner.put(&name("a"), File::open("/dev/null").unwrap().as_fd()).unwrap();
    let before = running.descriptors();
    let file = File::open("/dev/null").unwrap();
    let many = [file.as_fd(); MOST_DESCRIPTORS];

    let guest = running.raw();
    let put = encode_request(&Request::Put { name: name("x") }).unwrap();
    let hello = encode_request(&Request::Hello { version: 1, pid: 1 }).unwrap();
    let long = vec![b' '; LONGEST_MESSAGE + 1];
    let half = &hello[..hello.len() / 2];
    let messages: [(&[u8], usize); 8] =
        [(half, 0), (b"\0", 0), (b"{}", 3), (&long, 0), (&put, 0), (&put, 16), (&hello, 1), (b"x", 16)];
    for (bytes, descriptors) in messages {
        guest.send(bytes, &many[..descriptors]).unwrap();
        let said = answer(&guest);
        assert!(matches!(said, Answer::Refused { reason: Refusal::BadRequest, .. }), "{said:?}");
    }
    for request in [Request::List { after: None }, Request::Release, Request::Get { name: name("a") }] {
        let said = ask(&guest, &request);
        assert!(matches!(said, Answer::Refused { reason: Refusal::NotOwner, .. }), "{said:?}");
    }
    let other = Request::Hello { version: 2, pid: 1 };
    assert_eq!(ask(&guest, &other), Answer::OtherVersion { version: 1 });
    assert_eq!(owner.list().unwrap(), [name("a")]);
    assert_eq!(running.log().matches("a message was refused").count(), 1, "{}", running.log());
    drop(guest);
    assert_eq!(owner.list().unwrap(), [name("a")]);
    until(|| running.descriptors() == before, || format!("{:?}, not {before:?}", running.descriptors()));
}

#[test]
fn floods_do_not_keep_the_owner_from_being_heard() {
    let running = Running::start();
    let owner = running.connect();
    let before = running.descriptors();
    let file = File::open("/dev/null").unwrap();
    let many = [file.as_fd(); MOST_DESCRIPTORS];
    // Connections that say nothing: the oldest make room.
    let silent: Vec<Channel> = (0..40).map(|_| running.raw()).collect();
    until(|| silent[0].has_news(), || "the oldest guest is still there".to_owned());
    assert!(owner.list().unwrap().is_empty());
    let descriptors = running.descriptors().0;
    assert!(descriptors <= before.0 + 8, "{descriptors}");

    // One that sends and never reads its answers.
    let flood = running.raw();
    let sent = (0..100_000).take_while(|_| flood.send(b"{", &many).is_ok()).count();
    assert!(sent < 100_000, "the keeper stores answers without end");
    assert!(owner.list().unwrap().is_empty());

    // Those that hang up in the middle.
    for _ in 0..200 {
        let short = running.raw();
        short.send(&encode_request(&Request::Put { name: name("x") }).unwrap(), &many[..1]).unwrap();
    }
    assert!(owner.list().unwrap().is_empty());
    drop((silent, flood));
    until(|| running.descriptors() == before, || format!("{:?}, not {before:?}", running.descriptors()));
}

/// Its log goes to the same pipe as the daemon's, and whoever reads that may hang as everything else may.
#[test]
fn a_log_that_nobody_reads_keeps_nobody_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("k.sock");
    let mut command = Command::new(SPEEDY);
    command.env_clear().arg("keeper").arg("--socket").arg(&socket).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = [0; 1];
    child.stderr.as_mut().unwrap().read_exact(&mut line).unwrap();
    let owner = Keeper::connect(&socket).unwrap();
    // A pipe holds 64 KiB; each of these is a line of about 200 bytes, or of much more if it were logged whole.
    let unknown = format!(r#"{{"request":"{}"}}"#, "x".repeat(60_000));
    for message in std::iter::repeat_n("nonsense", 1000).chain([unknown.as_str()]) {
        let guest = Channel::connect(&socket, PATIENCE).unwrap();
        guest.send(message.as_bytes(), &[]).unwrap();
        assert!(matches!(answer(&guest), Answer::Refused { .. }));
    }
    assert!(owner.list().unwrap().is_empty());
    // And one whose reader is gone.
    child.stderr = None;
    let next = Keeper::connect(&socket).unwrap();
    assert!(next.list().unwrap().is_empty());
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn there_is_room_for_so_many_and_no_more() {
    let running = Running::start();
    let client = running.connect();
    let file = File::open("/dev/null").unwrap();
    let names: Vec<Name> = (0..MOST_HELD).map(|number| name(&format!("{number:0>128}"))).collect();
    for name in &names {
        client.put(name, file.as_fd()).unwrap();
    }
    let error = client.put(&name("one-more"), file.as_fd()).unwrap_err();
    assert!(matches!(error, KeeperError::Refused { reason: Refusal::Full, .. }), "{error}");
    client.put(&names[0], file.as_fd()).unwrap();
    assert_eq!(client.list().unwrap(), names);
    client.upgrade().unwrap();
    assert_eq!(client.list().unwrap(), names);
    client.release().unwrap();
    assert!(client.list().unwrap().is_empty());
}

/// It is there on every node for nothing but this: less than 8 MiB of its own.
#[test]
fn the_keeper_is_small() {
    let running = Running::start();
    let client = running.connect();
    for number in 0..100 {
        client.put(&name(&format!("journal/{number}")), File::open("/dev/null").unwrap().as_fd()).unwrap();
    }
    let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", running.child.id())).unwrap();
    let kib = |field: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    println!("keeper: {} KiB private dirty, {} KiB resident", kib("Private_Dirty:"), kib("Rss:"));
    assert!(kib("Private_Dirty:") < 8 << 10, "{text}");
}

#[test]
fn a_daemon_starts_a_keeper_that_ends_when_nobody_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("run/k.sock");
    let first = Keeper::connect_or_start(&socket, SPEEDY.as_ref()).unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", first.pid())).unwrap();
    // After the name: state, parent, process group, session.
    let session = stat.rsplit(") ").next().unwrap().split(' ').nth(3).unwrap().to_owned();
    assert_eq!(session, first.pid().to_string());
    first.put(&name("a"), File::open("/dev/null").unwrap().as_fd()).unwrap();
    let second = Keeper::connect_or_start(&socket, SPEEDY.as_ref()).unwrap();
    assert_eq!((second.pid(), second.held()), (first.pid(), 1));
    assert!(first.lost());
    second.release().unwrap();
    drop(second);
    until(|| !socket.exists(), || "the keeper is still there".to_owned());
    // It was started by the first, which takes it out of the list of processes.
    let process = format!("/proc/{}", first.pid());
    drop(first);
    assert!(!Path::new(&process).exists());
}

#[test]
fn a_keeper_that_cannot_be_started_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let error = Keeper::connect_or_start(&dir.path().join("k.sock"), "/bin/false".as_ref()).unwrap_err();
    assert!(matches!(error, KeeperError::NotStarted { status: Some(_), .. }), "{error}");
    let error = Keeper::connect_or_start(&dir.path().join("k.sock"), "/nonexistent".as_ref()).unwrap_err();
    assert!(matches!(error, KeeperError::Io(_)), "{error}");
}
