//! Servers of lazy layers that are killed while reads are under way, and their successors, on both ways of taking over.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use speedy::keeper::client::Keeper;
use speedy::keeper::protocol::Name;
use speedy::layer::attach::Attacher;
use speedy::layer::lazy::helper::Helper;
use speedy::layer::lazy::session::Resume;
use speedy::layer::lazy::{Kept, Lazy};
use speedy::sys::fuse::Mount;
use speedy::sys::loopdev;
use speedy::sys::mount::{self, Unmount};

use crate::cold::{Cold, noise};
use crate::keeper;
use crate::process::{drop_caches, require_root, runtime};

const DIR: &str = "TEST_TAKEOVER_DIR";
const RESUME: &str = "TEST_TAKEOVER_RESUME";
const DELAY: &str = "TEST_TAKEOVER_DELAY";
const PATIENCE: Duration = Duration::from_secs(120);
/// Longer than anybody waits.
const NEVER: u64 = 3_600_000;
/// More than the journal has banks.
const KILLS: usize = 6;
const NAMES: [&str; 3] = ["connection", "mount", "journal"];

fn contents() -> BTreeMap<String, Vec<u8>> {
    (0..8).map(|n| (format!("file-{n}"), noise(n + 1, 280_000))).collect()
}

fn exe() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_speedy"))
}

/// One server: takes what the keeper has, and serves until it is killed.
#[test]
#[ignore = "a part of the tests of this file, which start it"]
fn child_that_serves() {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    let dir = PathBuf::from(std::env::var_os(DIR).unwrap());
    let resume = match &std::env::var(RESUME).unwrap()[..] {
        "first" => Resume::First,
        "again" => Resume::Again,
        "journal" => Resume::ByJournal,
        other => panic!("{other}"),
    };
    let runtime = runtime();
    let contents = contents();
    let files: Vec<(&str, &[u8])> = contents.iter().map(|(name, bytes)| (&name[..], &bytes[..])).collect();
    let node = runtime.block_on(Cold::new(&dir, &files));
    if resume == Resume::First {
        runtime.block_on(node.begin(7));
    }
    node.store.delay.store(std::env::var(DELAY).unwrap().parse().unwrap(), Ordering::SeqCst);
    let keeper = Keeper::connect(&dir.join("k.sock")).unwrap();
    let [connection, mount, journal] =
        NAMES.map(|name| keeper.get(&Name::new(name).unwrap()).unwrap().unwrap());
    let _inside = runtime.enter();
    let lazy =
        Lazy::start(Kept { connection, mount, journal }, Arc::clone(&node.layers), resume, exe()).unwrap();
    let lazy = &lazy;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let told = dir.join("told");
            while !told.exists() {
                if !dir.exists() {
                    std::process::exit(1);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            let point = dir.join("l/7");
            // Nobody is here any more when it is done.
            match &fs::read_to_string(told).unwrap()[..] {
                "detach" => lazy.detach(&point).unwrap(),
                device => {
                    fs::write(node.files.image(7), &node.bytes).unwrap();
                    lazy.to_native(7, Path::new(device), &node.files.image(7)).unwrap();
                }
            }
        });
        count(&dir, lazy)
    })
}

fn count(dir: &Path, lazy: &Lazy) -> ! {
    loop {
        fs::write(dir.join("taken.new"), lazy.counts().numbers().taken_over.to_string()).unwrap();
        fs::rename(dir.join("taken.new"), dir.join("taken")).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A keeper with a connection, and a layer of which nothing but the metadata is here.
struct Place {
    dir: tempfile::TempDir,
    keeper: Child,
    mount: Mount,
}

impl Place {
    fn new() -> Place {
        require_root();
        let dir = tempfile::Builder::new().prefix("spd").tempdir().unwrap();
        fs::create_dir(dir.path().join("l")).unwrap();
        let child = keeper::start(dir.path());
        let kept = Kept::create().unwrap();
        let keeper = Keeper::connect(&dir.path().join("k.sock")).unwrap();
        let descriptors = [kept.connection.as_fd(), kept.mount.as_fd(), kept.journal.as_fd()];
        for (name, descriptor) in NAMES.iter().zip(descriptors) {
            keeper.put(&Name::new(*name).unwrap(), descriptor).unwrap();
        }
        Place { dir, keeper: child, mount: Mount::from_fd(kept.mount) }
    }

    fn point(&self) -> PathBuf {
        self.dir.path().join("l/7")
    }

    fn attach(&self) {
        Helper::new(exe().to_owned()).attach(&self.mount, 7, &self.point()).unwrap();
    }

    fn device(&self) -> PathBuf {
        Attacher::untried(self.dir.path()).attached().unwrap()[0].device.clone().unwrap()
    }

    /// All files have the right bytes.
    fn require_right(&self) {
        for (name, bytes) in contents() {
            assert!(fs::read(self.point().join("fs").join(name)).unwrap() == bytes);
        }
    }

    /// Tells the server to detach the layer, or to switch this device of it to its file.
    fn tell(&self, what: &str) {
        fs::write(self.dir.path().join("new"), what).unwrap();
        fs::rename(self.dir.path().join("new"), self.dir.path().join("told")).unwrap();
    }

    /// The helper that does it waits in the kernel, where nothing can end it.
    fn helper_that_waits(&self) -> Option<PathBuf> {
        let dir = self.dir.path().as_os_str().as_encoded_bytes().to_vec();
        let is_ours = |process: &PathBuf| {
            let line = fs::read(process.join("cmdline")).unwrap_or_default();
            let stat = fs::read_to_string(process.join("stat")).unwrap_or_default();
            line.windows(dir.len()).any(|part| part == dir)
                && line.split(|byte| *byte == 0).any(|part| part == b"kernel-call")
                && stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" D"))
        };
        fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path()).find(is_ours)
    }

    /// One for each file; whether it has the right bytes.
    fn readers<'scope>(&self, scope: &'scope Scope<'scope, '_>) -> Vec<ScopedJoinHandle<'scope, bool>> {
        let fs_dir = self.point().join("fs");
        let reader = |(name, bytes): (String, Vec<u8>)| {
            let path = fs_dir.join(name);
            scope.spawn(move || fs::read(path).unwrap() == bytes)
        };
        contents().into_iter().map(reader).collect()
    }

    fn taken(&self) -> Option<u64> {
        fs::read_to_string(self.dir.path().join("taken")).ok()?.parse().ok()
    }

    /// A server that serves.
    fn serve(&self, resume: &str, delay: u64) -> Child {
        drop(fs::remove_file(self.dir.path().join("taken")));
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "takeover::child_that_serves", "--ignored", "--nocapture"]);
        command.env(DIR, self.dir.path()).env(RESUME, resume).env(DELAY, delay.to_string());
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        let began = Instant::now();
        while self.taken().is_none() {
            assert!(child.try_wait().unwrap().is_none() && began.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(5));
        }
        child
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // The last descriptors go with it: whoever still waits gets an error.
        self.keeper.kill().unwrap();
        self.keeper.wait().unwrap();
        drop(mount::unmount(&self.point(), Unmount::FromSight));
    }
}

fn kill(child: &mut Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Reads wait over the deaths of more servers than the journal has banks, none of which had an answer.
fn reads_outlast_their_servers(resume: &str) {
    let place = Place::new();
    let mut server = place.serve("first", NEVER);
    place.attach();
    std::thread::scope(|scope| {
        let readers = place.readers(scope);
        for _ in 0..KILLS {
            std::thread::sleep(Duration::from_millis(400));
            kill(&mut server);
            assert!(readers.iter().all(|reader| !reader.is_finished()));
            server = place.serve(resume, NEVER);
        }
        kill(&mut server);
        server = place.serve(resume, 1);
        until("all reads are answered", || readers.iter().all(|reader| reader.is_finished()));
        assert!(readers.into_iter().all(|reader| reader.join().unwrap()));
    });
    if resume == "journal" {
        std::thread::sleep(Duration::from_millis(50));
        assert!(place.taken().unwrap() >= 8, "{:?}", place.taken());
    }
    kill(&mut server);
}

#[test]
fn reads_outlast_their_servers_where_the_kernel_sends_again() {
    reads_outlast_their_servers("again");
}

/// As on Linux before 6.9, where `again` is the same.
#[test]
fn reads_outlast_their_servers_by_the_journal() {
    reads_outlast_their_servers("journal");
}

/// Answers are under way at every kill: what was answered and not yet cleared is answered twice.
#[test]
fn readers_do_not_notice_kills() {
    for resume in ["again", "journal"] {
        let place = Place::new();
        let mut server = place.serve("first", 20);
        place.attach();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for half in 0..2 {
                let (place, done) = (&place, &done);
                scope.spawn(move || {
                    while !done.load(Ordering::SeqCst) {
                        for (name, bytes) in contents().into_iter().skip(half) {
                            assert!(fs::read(place.point().join("fs").join(name)).unwrap() == bytes);
                        }
                        fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
                    }
                });
            }
            for round in 0..KILLS {
                std::thread::sleep(Duration::from_millis(30 + 17 * round as u64));
                kill(&mut server);
                server = place.serve(resume, 20);
            }
            done.store(true, Ordering::SeqCst);
        });
        kill(&mut server);
    }
}

/// Returns when it is so. A panic would wait for readers whom nobody answers.
#[expect(clippy::print_stderr, reason = "the last words before an abort")]
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        if began.elapsed() > PATIENCE {
            eprintln!("waited {PATIENCE:?} in vain: {what}");
            std::process::abort();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The helper is inside the call, and stays there as long as nobody answers what the call waits for.
fn killed_inside(place: &Place, server: &mut Child) {
    let mut helper = None;
    let mut stays = |what: &str| {
        let began = Instant::now();
        until(what, || {
            let found = place.helper_that_waits();
            assert_or_abort(helper.is_none() || found == helper, what);
            helper = found;
            helper.is_some() && began.elapsed() > Duration::from_millis(300)
        });
    };
    stays("the helper waits for the reads that are under way");
    kill(server);
    stays("it goes on waiting when the server is dead");
}

#[expect(clippy::print_stderr, reason = "the last words before an abort")]
fn assert_or_abort(holds: bool, what: &str) {
    if !holds {
        eprintln!("this does not hold: {what}");
        std::process::abort();
    }
}

/// LOOP_CHANGE_FD waits for the reads that the device has begun, and these wait for whoever serves it.
#[test]
fn a_server_dies_inside_a_switch() {
    for resume in ["again", "journal"] {
        let place = Place::new();
        let mut server = place.serve("first", NEVER);
        place.attach();
        let device = place.device();
        std::thread::scope(|scope| {
            let readers = place.readers(scope);
            std::thread::sleep(Duration::from_millis(400));
            place.tell(device.to_str().unwrap());
            killed_inside(&place, &mut server);
            assert_or_abort(readers.iter().all(|reader| !reader.is_finished()), "the reads wait");
            fs::remove_file(place.dir.path().join("told")).unwrap();
            server = place.serve(resume, 1);
            until("all reads are answered", || readers.iter().all(|reader| reader.is_finished()));
            assert!(readers.into_iter().all(|reader| reader.join().unwrap()));
        });
        let image = place.dir.path().join("layer/7.erofs");
        until("it is switched", || loopdev::backing_file(&device).unwrap().as_deref() == Some(&image));
        drop_caches();
        kill(&mut server);
        // Nobody serves: it is read from the disk.
        place.require_right();
    }
}

/// The last unmount of a file system waits for what was read ahead for nobody.
#[test]
fn a_server_dies_inside_an_unmount() {
    for resume in ["again", "journal"] {
        let place = Place::new();
        let mut server = place.serve("first", NEVER);
        place.attach();
        let device = place.device();
        for name in contents().keys() {
            let file = fs::File::open(place.point().join("fs").join(name)).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::WillNeed).unwrap();
        }
        place.tell("detach");
        killed_inside(&place, &mut server);
        fs::remove_file(place.dir.path().join("told")).unwrap();
        server = place.serve(resume, 1);
        until("it is detached", || !place.point().exists());
        until("its device is free", || loopdev::backing_file(&device).unwrap().is_none());
        // It can be attached again, and read.
        place.attach();
        place.require_right();
        kill(&mut server);
    }
}
