//! What layers take on the disk, and what the disk makes of them: room is made below containers that read, damage is repaired.
//!
//! `DISK_LIMIT_MIB` is how much the layers of the first test may take; they have twice as much. `DISK_ROUNDS` and `DISK_SEED` say how
//! long the random one goes on. `DISK_LOG` (`info`, say) shows what the layers say.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use speedy::content::ContentStore;
use speedy::content::index::{IndexDigest, LayerIndex};
use speedy::driver::Id;
use speedy::driver::memory::Memory;
use speedy::layer::LayerStore;
use speedy::layer::allowance::Allowance;
use speedy::layer::attach::{Attacher, Mode};
use speedy::layer::fill::Supply;
use speedy::layer::lazy::session::Resume;
use speedy::layer::lazy::{ColdLayers, Kept, Lazy};
use speedy::snapshot::layers::{Layers, Upkeep};
use speedy::snapshot::metastore::{LayerChoice, MetaStore, NewLayer, NewSnapshot, Origin, Progress};
use speedy::snapshot::reconcile::{Reconciler, Room};
use speedy::snapshot::{Key, Kind, Labels, Timestamp};
use speedy::sys::loopdev;
use speedy::sys::mount::{self, Unmount};
use tokio_util::sync::CancellationToken;

use crate::cold::{self, Slow, noise};
use crate::process::{drop_caches, require_root};

const MIB: u64 = 1 << 20;
/// What may be used beyond the limit for a moment: metadata, indexes, and what was begun before it was measured.
const SLACK: u64 = 4 * MIB;

/// One layer of the store: its files, each made of a seed.
struct Image {
    serial: u64,
    index: Arc<LayerIndex>,
    files: BTreeMap<String, (u64, usize)>,
}

/// A root, a store, and what is recorded; daemons come and go.
struct Node {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    store: Arc<Slow>,
    content: Arc<ContentStore>,
    meta: Arc<MetaStore>,
    images: Vec<Image>,
}

/// What a daemon has.
struct Daemon {
    layers: Arc<Layers>,
    stop: CancellationToken,
    runs: Option<tokio::task::JoinHandle<()>>,
}

impl Node {
    /// So many layers of so many MiB.
    fn new(layers: u64, mib: usize) -> Node {
        require_root();
        if let Ok(level) = std::env::var("DISK_LOG") {
            drop(speedy::telemetry::init_logs(&level, speedy::telemetry::LogFormat::Human));
        }
        let dir = tempfile::Builder::new().prefix("spd").tempdir().unwrap();
        fs::create_dir(dir.path().join("l")).unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let store = Arc::new(Slow::default());
        let content = Arc::new(cold::content(&store));
        let meta = Arc::new(MetaStore::open(dir.path(), "memory").unwrap());
        let images =
            (0..layers).map(|n| runtime.block_on(image(dir.path(), &content, &meta, n, mib))).collect();
        Node { dir, runtime, store, content, meta, images }
    }

    fn files(&self) -> LayerStore {
        LayerStore::at(self.dir.path())
    }

    fn start(&self, limit: Option<u64>, upkeep: Upkeep) -> Daemon {
        self.start_on(self.files(), limit, upkeep)
    }

    fn start_on(&self, files: LayerStore, limit: Option<u64>, upkeep: Upkeep) -> Daemon {
        files.prepare(Attacher::open(self.dir.path(), Mode::Auto).unwrap()).unwrap();
        let files = Arc::new(files);
        let allowance = Allowance::new(limit);
        let _inside = self.runtime.enter();
        let cold = ColdLayers::new(Supply::new(&files, &self.content)).with_allowance(allowance);
        let cold = Arc::new(cold);
        let exe = Path::new(env!("CARGO_BIN_EXE_speedy"));
        let served = Arc::clone(&cold) as Arc<_>;
        let lazy = Lazy::start(Kept::create().unwrap(), served, Resume::First, exe).unwrap();
        let layers = Layers::new(Arc::clone(&self.meta), files, Some(cold), Some(Arc::new(lazy)));
        let layers = Arc::new(layers.with_upkeep(upkeep));
        self.runtime.block_on(layers.start()).unwrap();
        let (stop, running) = (CancellationToken::new(), Arc::clone(&layers));
        let until = stop.clone();
        let runs = Some(self.runtime.spawn(async move { running.run(until).await }));
        Daemon { layers, stop, runs }
    }

    fn ids(&self) -> Vec<Id> {
        self.images.iter().map(|image| self.meta.layer(image.serial).unwrap().id).collect()
    }

    fn ready(&self, daemon: &Daemon) {
        self.runtime.block_on(daemon.layers.ready(&self.ids())).unwrap();
    }

    fn point(&self, image: &Image) -> PathBuf {
        self.dir.path().join(format!("l/{}", image.serial))
    }

    /// Reads all of it; what is wrong with it, if anything.
    fn wrong(&self, image: &Image) -> Option<String> {
        let wrong = |(name, (seed, length)): (&String, &(u64, usize))| match fs::read(
            self.point(image).join("fs").join(name),
        ) {
            Ok(found) => (found != noise(*seed, *length)).then(|| format!("{name} has other bytes")),
            Err(error) => Some(format!("{name}: {error}")),
        };
        image.files.iter().find_map(wrong)
    }

    fn all_right(&self) {
        for image in &self.images {
            assert_eq!(self.wrong(image), None, "layer {}", image.serial);
        }
    }

    /// What the files of all layers take.
    fn used(&self) -> u64 {
        let files = fs::read_dir(self.dir.path().join("layer")).unwrap();
        files.filter_map(|entry| entry.ok()?.metadata().ok()).map(|file| file.blocks() * 512).sum()
    }

    fn is_native(&self, image: &Image) -> bool {
        let complete = self.meta.layer(image.serial).unwrap().progress == Progress::Complete;
        let device = Attacher::untried(self.dir.path()).devices().unwrap().remove(&image.serial);
        complete
            && device
                .is_none_or(|device| below(&device).is_some_and(|path| path.starts_with(self.dir.path())))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for image in &self.images {
            while mount::unmount(&self.point(image), Unmount::FromSight).unwrap_or(false) {}
        }
    }
}

impl Daemon {
    /// Nothing is left of it, as of a process that ended: a layer whose switch it was in the middle of was once held open by what was
    /// left, and could not be given up.
    fn end(mut self, node: &Node) {
        self.stop.cancel();
        if let Some(runs) = self.runs.take() {
            node.runtime.block_on(runs).unwrap();
        }
        node.runtime.block_on(self.layers.end_reads());
    }
}

fn below(device: &Path) -> Option<PathBuf> {
    loopdev::backing_file(device).unwrap()
}

/// A layer on the store, and on the node its metadata and a snapshot on it, as a hit leaves it.
async fn image(root: &Path, content: &Arc<ContentStore>, meta: &MetaStore, n: u64, mib: usize) -> Image {
    let mut files = BTreeMap::from([("large".to_owned(), (n * 1000 + 1, (mib << 20) / 2))]);
    let small = (mib << 20) / 2 / 64;
    files.extend((0..64).map(|at| (format!("small/{at}"), (n * 1000 + at + 2, small - 777))));
    let made: Vec<(String, Vec<u8>)> =
        files.iter().map(|(name, (seed, length))| (name.clone(), noise(*seed, *length))).collect();
    let made: Vec<(&str, &[u8])> = made.iter().map(|(name, bytes)| (&name[..], &bytes[..])).collect();
    let (index, _) = cold::publish(root, content, &made).await;
    let ids = meta.reserve(2).await.unwrap();
    let new = NewLayer {
        id: ids[0],
        facts: index.facts().clone(),
        origin: Origin::Fetched,
        progress: Progress::Filling,
        blob: None,
        index: Some(*IndexDigest::of(&index.encode()).as_bytes()),
        now: Timestamp::now(),
    };
    let store = Arc::new(LayerStore::open(root, Attacher::untried(root)).unwrap());
    let serial = ids[0].serial;
    store.write_index(serial, &index.encode()).unwrap();
    store.create(serial).unwrap();
    let layers = ColdLayers::new(Supply::new(&store, content));
    let opened = layers.open(serial, || Some(Arc::clone(&index))).unwrap();
    opened.fetch(index.metadata_places()).await.unwrap();
    use_layer(meta, ids[1], LayerChoice::New(new), n).await;
    Image { serial, index, files }
}

fn user(n: u64) -> Key {
    Key::new(&format!("user-{n}")).unwrap()
}

/// An active snapshot that consists of the layer.
async fn use_layer(meta: &MetaStore, id: Id, layer: LayerChoice, n: u64) {
    let new = NewSnapshot {
        id,
        key: user(n),
        parent: None,
        kind: Kind::Active,
        labels: Labels::new(),
        now: Timestamp::now(),
    };
    meta.create(new, layer).await.unwrap();
}

#[track_caller]
fn wait_for(what: &str, seconds: u64, mut is: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < Duration::from_secs(seconds), "no {what} within {seconds} s");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Twice as much as there may be, in use and native; then the limit comes, while everything is read from end to end all the while.
#[test]
fn layers_in_use_keep_within_their_limit_and_are_read_right() {
    let mib = number("DISK_LIMIT_MIB", 32);
    let limit = mib * MIB;
    let node = Node::new(4, usize::try_from(mib / 2).unwrap());
    let before = node.start(None, Upkeep::default());
    node.ready(&before);
    node.all_right();
    wait_for("native layers", 60 + mib, || node.images.iter().all(|image| node.is_native(image)));
    before.end(&node);
    assert!(node.used() > 2 * limit * 9 / 10, "{}", node.used());
    let after = node.start(Some(limit), Upkeep::default());
    let (done, rounds, most) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                node.all_right();
                rounds.fetch_add(1, Ordering::SeqCst);
                drop_caches();
            }
        });
        wait_for("room", 30 + mib, || node.used() <= limit + SLACK || reader.is_finished());
        let seen = rounds.load(Ordering::SeqCst);
        // On a busy machine four rounds may be over before the third layer is given up.
        let enough = || {
            let counts = after.layers.disk_counts();
            counts.demotions >= 3 && counts.given_up > 0
        };
        let until = std::time::Instant::now() + Duration::from_secs(30);
        let more =
            || rounds.load(Ordering::SeqCst) < seen + 4 || (!enough() && std::time::Instant::now() < until);
        while more() && !reader.is_finished() {
            most.fetch_max(usize::try_from(node.used() / 1024).unwrap(), Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(20));
        }
        done.store(true, Ordering::SeqCst);
        reader.join().unwrap();
    });
    let most = most.into_inner() as u64 * 1024;
    let counts = after.layers.disk_counts();
    println!("limit {limit}, most used {most}, {} rounds, {counts:?}", rounds.into_inner());
    assert!(most <= limit + SLACK, "{most} bytes of {limit}");
    assert!(counts.demotions >= 3 && counts.given_up > 0, "{counts:?}");
    after.end(&node);
    // What is left is whole enough for the next daemon.
    let next = node.start(Some(limit), Upkeep::default());
    drop_caches();
    node.all_right();
    next.end(&node);
}

/// A layer that is mounted from its file cannot be switched: it stays, and nobody reads zeros.
#[test]
fn a_layer_that_is_mounted_from_its_file_is_not_given_up() {
    let node = Node::new(1, 24);
    let first = node.start(None, Upkeep::default());
    node.ready(&first);
    wait_for("native layers", 60, || node.is_native(&node.images[0]));
    first.end(&node);
    while mount::unmount(&node.point(&node.images[0]), Unmount::FromSight).unwrap() {}
    let unlimited = node.start(None, Upkeep::default());
    node.ready(&unlimited);
    unlimited.end(&node);
    if !Attacher::untried(node.dir.path()).devices().unwrap().is_empty() {
        println!("SKIPPED: this kernel mounts no layers from their files");
        return;
    }
    let limited = node.start(Some(16 * MIB), Upkeep::default());
    node.runtime.block_on(limited.layers.make_room()).unwrap();
    assert!(node.used() > 24 * MIB && node.is_native(&node.images[0]));
    drop_caches();
    node.all_right();
    // Once nobody uses it, it is.
    node.runtime.block_on(async {
        node.meta.remove(user(0)).await.unwrap();
        let id = node.meta.reserve(1).await.unwrap()[0];
        let new = NewSnapshot {
            id,
            key: Key::new("committed").unwrap(),
            parent: None,
            kind: Kind::Committed,
            labels: Labels::new(),
            now: Timestamp::now(),
        };
        let layer = LayerChoice::Known(node.meta.layer(node.images[0].serial).unwrap().id);
        node.meta.adopt(new, "sha256:x".into(), layer).await.unwrap();
    });
    wait_for("room", 90, || {
        node.runtime.block_on(limited.layers.make_room()).unwrap();
        node.used() <= 16 * MIB
    });
    node.ready(&limited);
    node.all_right();
    limited.end(&node);
}

/// While the store gives nothing, nothing is given up that only it has.
#[test]
fn nothing_is_given_up_while_the_store_is_away() {
    let node = Node::new(2, 16);
    let first = node.start(None, Upkeep::default());
    node.ready(&first);
    wait_for("native layers", 60, || node.images.iter().all(|image| node.is_native(image)));
    first.end(&node);
    node.store.failures.store(usize::MAX, Ordering::SeqCst);
    let limited = node.start(Some(16 * MIB), Upkeep::default());
    node.runtime.block_on(limited.layers.make_room()).unwrap();
    drop_caches();
    node.all_right();
    assert!(node.images.iter().all(|image| node.is_native(image)));
    limited.end(&node);
}

fn damage(node: &Node, image: &Image, at: usize) {
    let path = node.files().image(image.serial);
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[0xff; 8], image.index.chunk(at).0 + 4096).unwrap();
    file.sync_all().unwrap();
    drop_caches();
}

#[test]
fn the_scrub_finds_what_the_disk_has_changed_and_repairs_it() {
    let node = Node::new(2, 16);
    let upkeep = Upkeep { scrub_rate: 400 * MIB, scrub_every: Duration::from_secs(1) };
    let daemon = node.start(None, upkeep);
    node.ready(&daemon);
    wait_for("native layers", 60, || node.images.iter().all(|image| node.is_native(image)));
    let image = &node.images[0];
    for at in [2, 9, 10, 11, 12] {
        damage(&node, image, at);
    }
    let repaired = || daemon.layers.disk_counts().repaired;
    wait_for("repair", 60, || repaired() >= 5 && node.is_native(image));
    drop_caches();
    node.all_right();
    let counts = daemon.layers.disk_counts();
    assert!(counts.damaged >= 5 && counts.scrubbed > 0, "{counts:?}");
    // Through the device too, which containers that run have below them.
    let device = Attacher::untried(node.dir.path()).devices().unwrap().remove(&image.serial).unwrap();
    assert_eq!(below(&device), Some(node.files().image(image.serial)));
    daemon.end(&node);
}

/// The disk keeps nothing: containers read right bytes through us, and the layer is not read natively whatever it would hold later.
#[test]
fn a_failed_fsync_forbids_native() {
    let node = Node::new(1, 16);
    let files = node.files().with_sync(|_| Err(std::io::Error::from_raw_os_error(5)));
    let daemon = node.start_on(files, None, Upkeep::default());
    node.ready(&daemon);
    let image = &node.images[0];
    wait_for("failed fsync", 60, || daemon.layers.failed(image.serial).is_some());
    assert!(daemon.layers.failed(image.serial).unwrap().contains("never natively"));
    File::options()
        .write(true)
        .open(node.files().part(image.serial))
        .unwrap()
        .write_all_at(&[0; 1 << 20], MIB + 4096)
        .unwrap();
    drop_caches();
    node.all_right();
    // A container that starts now may.
    node.ready(&daemon);
    std::thread::sleep(Duration::from_secs(3));
    assert!(!node.is_native(image));
    daemon.end(&node);
}

/// Readers, fills, switches, evictions, damage, users that come and go, daemons that are started again, in a random order: whoever
/// has a layer attached reads its bytes.
///
/// It found chunks that were given up between the end of a fill and the switch, after they were verified: zeros below a native mount.
/// A layer is held from the beginning of its fill on, and for good when its file has its name.
#[test]
fn any_schedule_of_fills_switches_and_evictions_reads_right() {
    let (rounds, mut seed) = (number("DISK_ROUNDS", 40), number("DISK_SEED", 7));
    println!("DISK_SEED={seed} DISK_ROUNDS={rounds}");
    let node = Node::new(3, 16);
    let upkeep = Upkeep { scrub_rate: 400 * MIB, scrub_every: Duration::from_secs(1) };
    let mut daemon = node.start(Some(24 * MIB), upkeep);
    node.ready(&daemon);
    let mut used = [true; 3];
    let mut next = |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    for round in 0..rounds {
        let n = usize::try_from(next(3)).unwrap();
        let what = next(9);
        println!("{round}: {what} of {n}");
        let image = &node.images[n];
        match what {
            0..=3 if used[n] => std::thread::scope(|scope| {
                for other in (0..3).filter(|other| used[*other]) {
                    let node = &node;
                    scope.spawn(move || assert_eq!(node.wrong(&node.images[other]), None, "layer {other}"));
                }
                node.runtime.block_on(daemon.layers.make_room()).unwrap();
            }),
            4 => drop_caches(),
            5 if used[n] && node.is_native(image) => {
                damage(&node, image, 2);
                wait_for("repair", 60, || {
                    drop_caches();
                    node.wrong(image).is_none()
                });
            }
            6 => {
                // Its only user goes, or comes.
                let id = node.meta.layer(image.serial).unwrap().id;
                node.runtime.block_on(async {
                    match used[n] {
                        true => keep_without_user(&node.meta, n, id).await,
                        false => {
                            let own = node.meta.reserve(1).await.unwrap()[0];
                            use_layer(&node.meta, own, LayerChoice::Known(id), n as u64).await;
                            daemon.layers.ready(&[id]).await.unwrap();
                        }
                    }
                });
                used[n] = !used[n];
            }
            7 => node.runtime.block_on(async {
                let driver = Arc::new(Memory::default());
                let room = Room { budget: u64::MAX, floor: 0 };
                let layers = Some(Arc::clone(&daemon.layers));
                let reconciler = Reconciler::new(Arc::clone(&node.meta), driver, layers, room);
                let stop = CancellationToken::new();
                tokio::join!(reconciler.run(stop.clone()), async {
                    reconciler.cleanup(Duration::from_secs(20)).await;
                    stop.cancel();
                });
            }),
            8 => {
                let limit = [None, Some(24 * MIB), Some(48 * MIB)][usize::try_from(next(3)).unwrap()];
                daemon.end(&node);
                daemon = node.start(limit, upkeep);
            }
            _ => std::thread::sleep(Duration::from_millis(next(1500))),
        }
    }
    for n in (0..3).filter(|n| used[*n]) {
        drop_caches();
        assert_eq!(node.wrong(&node.images[n]), None);
    }
    daemon.end(&node);
}

/// A committed snapshot keeps the layer claimed when its active one goes.
async fn keep_without_user(meta: &MetaStore, n: usize, layer: Id) {
    let key = Key::new(&format!("committed-{n}")).unwrap();
    if meta.get(&key).is_none() {
        let id = meta.reserve(1).await.unwrap()[0];
        let new = NewSnapshot {
            id,
            key,
            parent: None,
            kind: Kind::Committed,
            labels: Labels::new(),
            now: Timestamp::now(),
        };
        meta.adopt(new, format!("sha256:{n}"), LayerChoice::Known(layer)).await.unwrap();
    }
    meta.remove(user(n as u64)).await.unwrap();
}
