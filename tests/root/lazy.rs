//! Layers that are read before they are here: loop devices over our FUSE files, switched to the local file and back under their
//! live mounts.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use speedy::layer::attach::Attacher;
use speedy::layer::lazy::session::Resume;
use speedy::layer::lazy::{Kept, Lazy};
use speedy::sys::loopdev::LoopDevice;
use speedy::sys::mount::{self, Unmount};

use crate::cold::{Cold, noise};
use crate::process::{drop_caches, require_root};

struct Place {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    node: Cold,
    contents: BTreeMap<String, Vec<u8>>,
}

impl Place {
    fn new() -> Place {
        require_root();
        let dir = tempfile::Builder::new().prefix("spd").tempdir().unwrap();
        fs::create_dir(dir.path().join("l")).unwrap();
        let mut contents = BTreeMap::from([("large".to_owned(), noise(1, 24 << 20))]);
        contents.extend(
            (0..200).map(|n| (format!("small/{n}"), noise(n + 2, 3000 + 331 * usize::try_from(n).unwrap()))),
        );
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let files: Vec<(&str, &[u8])> =
            contents.iter().map(|(name, bytes)| (&name[..], &bytes[..])).collect();
        let node = runtime.block_on(Cold::new(dir.path(), &files));
        Place { dir, runtime, node, contents }
    }

    fn point(&self) -> PathBuf {
        self.dir.path().join("l/7")
    }

    fn serve(&self) -> Lazy {
        self.runtime.block_on(async { self.node.begin(7).await });
        let _inside = self.runtime.enter();
        let exe = Path::new(env!("CARGO_BIN_EXE_speedy"));
        Lazy::start(Kept::create().unwrap(), Arc::clone(&self.node.layers) as Arc<_>, Resume::First, exe)
            .unwrap()
    }

    fn device(&self) -> PathBuf {
        let attached = Attacher::untried(self.dir.path()).attached().unwrap();
        assert_eq!(attached.len(), 1);
        attached[0].device.clone().unwrap()
    }

    /// Reads everything; `None` is all well.
    fn wrong(&self) -> Option<String> {
        let wrong = |(name, bytes): &(&String, &Vec<u8>)| match fs::read(self.point().join("fs").join(name)) {
            Ok(found) => found != **bytes,
            Err(_) => true,
        };
        self.contents.iter().find(wrong).map(|(name, _)| name.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(mount::unmount(&self.point(), Unmount::FromSight));
    }
}

#[test]
fn a_layer_is_read_before_it_is_here() {
    let place = Place::new();
    let lazy = place.serve();
    lazy.attach(7, &place.point()).unwrap();
    let before = place.node.store.gets.load(Ordering::SeqCst);
    assert_eq!(fs::read(place.point().join("fs/small/100")).unwrap(), place.contents["small/100"]);
    let gets = place.node.store.gets.load(Ordering::SeqCst) - before;
    assert!((1..30).contains(&gets), "{gets} chunks for one small file");
    assert_eq!(place.wrong(), None);
    assert!(
        fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .all(|line| !line.contains(" fuse ") || !line.contains("speedy"))
    );
    lazy.detach(&place.point()).unwrap();
    assert!(!place.point().exists());
}

#[test]
fn readers_of_a_cold_layer_do_not_wait_for_each_other() {
    let place = Place::new();
    let lazy = place.serve();
    lazy.attach(7, &place.point()).unwrap();
    place.node.store.most_under_way.store(0, Ordering::SeqCst);
    place.node.store.delay.store(40, Ordering::SeqCst);
    std::thread::scope(|scope| {
        for n in 0..8 {
            let path = place.point().join(format!("fs/small/{}", n * 24));
            scope.spawn(move || fs::read(path).unwrap());
        }
    });
    let most = place.node.store.most_under_way.load(Ordering::SeqCst);
    assert!(most >= 6, "{most} fetches at once");
}

#[test]
fn a_complete_layer_is_switched_to_its_file_and_back_under_readers() {
    let place = Place::new();
    let lazy = place.serve();
    lazy.attach(7, &place.point()).unwrap();
    let (done, rounds) = (AtomicBool::new(false), std::sync::atomic::AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                assert_eq!(place.wrong(), None);
                rounds.fetch_add(1, Ordering::SeqCst);
                drop_caches();
            }
        });
        let layer = place.node.layers.get(7).unwrap();
        place.runtime.block_on(async {
            layer.fill().await.unwrap();
        });
        place.node.files.complete(7, layer.file()).unwrap();
        let (device, image) = (place.device(), place.node.files.image(7));
        for _ in 0..10 {
            lazy.to_native(7, &device, &image).unwrap();
            let there = fs::metadata(&image).unwrap();
            let below = LoopDevice::existing(&device).unwrap();
            assert_eq!(below.below().unwrap(), (there.dev(), there.ino()));
            assert!(below.is_direct().unwrap());
            lazy.to_native(7, &device, &image).unwrap_err();
            lazy.to_lazy(7, &device, &image).unwrap();
            assert!(below.is_direct().unwrap());
        }
        lazy.to_native(7, &device, &image).unwrap();
        let seen = rounds.load(Ordering::SeqCst);
        while rounds.load(Ordering::SeqCst) < seen + 2 {
            assert!(!reader.is_finished());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        // Nothing passes through us any more.
        let reads = lazy.counts().reads.load(Ordering::SeqCst);
        let seen = rounds.load(Ordering::SeqCst);
        while rounds.load(Ordering::SeqCst) < seen + 2 {
            assert!(!reader.is_finished());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert_eq!(lazy.counts().reads.load(Ordering::SeqCst), reads);
        done.store(true, Ordering::SeqCst);
        reader.join().unwrap();
    });
}

#[test]
fn what_cannot_be_had_is_an_error_and_not_other_bytes() {
    let place = Place::new();
    let lazy = place.serve();
    lazy.attach(7, &place.point()).unwrap();
    place.node.store.lies.store(3, Ordering::SeqCst);
    assert_eq!(fs::read(place.point().join("fs/small/7")).unwrap(), place.contents["small/7"]);
}

/// It asks the kernel; here the version says what the answer must be.
#[test]
fn check_says_what_this_kernel_can_do() {
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let mut check = std::process::Command::new(env!("CARGO_BIN_EXE_speedy"));
    let said = check.env_clear().args(["check", "--root"]).arg(dir.path()).output().unwrap().stdout;
    let said = String::from_utf8(said).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let numbers: Vec<u32> = release.split(['.', '-']).map_while(|part| part.parse().ok()).collect();
    let images = if numbers >= vec![6, 12] {
        "layer images: file-backed EROFS"
    } else {
        "layer images: EROFS on loop devices"
    };
    let asks = if numbers >= vec![6, 9] { "the kernel asks again" } else { "knows from its journal" };
    assert!(said.contains(images) && said.contains(asks), "{release}: {said}");
}
