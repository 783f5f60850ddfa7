//! The power fails while a layer is filled: every write to the disk is recorded (dm-log-writes), and what the disk would
//! hold after any number of them is mounted again.
//!
//! **Format of a record** (little-endian words of 8 bytes, in sectors of the disk): sector 0 holds magic, version, the number of
//! entries and the size of a sector; then every entry has a sector of its own (where to, how many sectors, flags, the length of a
//! mark, the mark), and what was written follows.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use speedy::layer::LayerStore;
use speedy::layer::attach::Attacher;
use speedy::layer::lazy::session::Source;

use crate::cold::{Cold, noise};
use crate::process::{require_root, runtime};

/// `DATA:LOG`, two empty disks.
pub(crate) const DISKS: &str = "TEST_POWER_DISKS";
const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

fn run(command: &str) {
    let status = Command::new("sh").args(["-ec", command]).status().unwrap();
    assert!(status.success(), "{command}: {status}");
}

/// Unmounts or removes something when dropped.
pub(crate) struct Undo(pub(crate) String);

impl Drop for Undo {
    fn drop(&mut self) {
        // A task that still lets go of a file.
        run(&format!("{0} || {{ sleep 1; {0}; }}", self.0));
    }
}

/// What the disk was told, in its order.
#[derive(Debug)]
pub(crate) enum Entry {
    Write { at: u64, length: u64, log: u64 },
    Flush,
    Mark(String),
}

pub(crate) struct Recorded {
    log: File,
    pub(crate) entries: Vec<Entry>,
}

impl Recorded {
    pub(crate) fn read(path: &str) -> Recorded {
        let log = File::open(path).unwrap();
        let word = |at: u64| {
            let mut bytes = [0; 8];
            log.read_exact_at(&mut bytes, at).unwrap();
            u64::from_le_bytes(bytes)
        };
        assert_eq!((word(0), word(8)), (MAGIC, 1));
        let (count, sector) = (word(16), word(24) & 0xffff_ffff);
        let (mut position, mut entries) = (sector, Vec::new());
        for _ in 0..count {
            let [to, sectors, flags, length] = [0, 8, 16, 24].map(|at| word(position + at));
            let data = position + sector;
            position = data;
            if flags & FLUSH != 0 {
                entries.push(Entry::Flush);
            }
            if flags & MARK != 0 {
                let mut name = vec![0; usize::try_from(length).unwrap()];
                log.read_exact_at(&mut name, data - sector + 32).unwrap();
                let name = String::from_utf8(name).unwrap();
                entries.push(Entry::Mark(name.trim_end_matches('\0').to_owned()));
            } else if sectors != 0 && flags & DISCARD == 0 {
                entries.push(Entry::Write { at: to * sector, length: sectors * sector, log: data });
                position += sectors * sector;
            }
        }
        Recorded { log, entries }
    }

    /// What the disk holds after so many entries.
    pub(crate) fn replay(&self, entries: usize, size: u64, path: &Path) {
        drop(fs::remove_file(path));
        let disk = File::options().write(true).create_new(true).open(path).unwrap();
        disk.set_len(size).unwrap();
        for entry in &self.entries[..entries] {
            let Entry::Write { at, length, log } = entry else { continue };
            let mut bytes = vec![0; usize::try_from(*length).unwrap()];
            self.log.read_exact_at(&mut bytes, *log).unwrap();
            disk.write_all_at(&bytes, *at).unwrap();
        }
    }

    pub(crate) fn mark(&self, name: &str) -> usize {
        let is_it = |entry: &Entry| matches!(entry, Entry::Mark(found) if found == name);
        self.entries.iter().position(is_it).unwrap_or_else(|| panic!("no mark {name}"))
    }

    /// Where it is tried: around flushes, and here and there between.
    pub(crate) fn points(&self, from: usize) -> Vec<usize> {
        let flushes = (from..self.entries.len()).filter(|at| matches!(self.entries[*at], Entry::Flush));
        let around: Vec<usize> = flushes.flat_map(|at| [at, at + 1]).collect();
        let mut points: Vec<usize> =
            around.iter().step_by(around.len().div_ceil(16).max(1)).copied().collect();
        let between = self.entries.len() - from;
        let random = noise(77, 12 * 8);
        points.extend(random.chunks(8).map(|word| {
            from + usize::try_from(u64::from_le_bytes(word.try_into().unwrap()) % between as u64).unwrap()
        }));
        points.push(self.entries.len());
        points.sort_unstable();
        points.dedup();
        points
    }
}

/// Fills a layer on a recorded file system; the node, whose store has what it was.
fn record(data: &str, log: &str, point: &Path, runtime: &tokio::runtime::Runtime) -> Cold {
    let sectors = disk_size(data) / 512;
    run(&format!("dmsetup create recorded --table '0 {sectors} log-writes {data} {log}'"));
    let _device = Undo("dmsetup remove recorded".into());
    run("mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/mapper/recorded");
    run(&format!("mount -t ext4 /dev/mapper/recorded {}", point.display()));
    let _mounted = Undo(format!("umount {}", point.display()));
    let mark = |name: &str| run(&format!("dmsetup message recorded 0 mark {name}"));
    let content: Vec<Vec<u8>> = (0..24).map(|n| noise(n + 1, 350_000)).collect();
    let names: Vec<String> = (0..24).map(|n| format!("file-{n}")).collect();
    let files: Vec<(&str, &[u8])> =
        names.iter().map(|name| &name[..]).zip(content.iter().map(|c| &c[..])).collect();
    let node = runtime.block_on(Cold::new(point, &files));
    run("sync");
    mark("begin");
    runtime.block_on(async {
        let layer = node.begin(7).await;
        let map = File::open(point.join("layer/7.map")).unwrap();
        for at in 0..node.index.chunks().len() {
            layer.fetch([at]).await.unwrap();
            // The kernel writes back when it likes, in any order: the map before the bytes, or some of them before the map.
            match at % 7 {
                0 | 3 => map.sync_all().unwrap(),
                5 => layer.file().sync_all().unwrap(),
                _ => {}
            }
        }
        layer.fill().await.unwrap();
    });
    mark("filled");
    node.files.complete(7, node.layers.get(7).unwrap().file()).unwrap();
    mark("complete");
    run("sync");
    node.layers.close(7);
    node
}

/// What a believed map would have vouched for wrongly.
fn vouched_wrongly(root: &Path, node: &Cold) -> usize {
    let (Ok(map), Ok(file)) = (fs::read(root.join("layer/7.map")), File::open(root.join("layer/7.part")))
    else {
        return 0;
    };
    let says = |at: usize| map.get(64 + at / 8).is_some_and(|byte| byte & (1 << (at % 8)) != 0);
    let is_wrong = |at: &usize| {
        let (offset, chunk) = node.index.chunk(*at);
        let mut bytes = vec![0; usize::try_from(chunk.length).unwrap()];
        let begin = usize::try_from(offset).unwrap();
        file.read_exact_at(&mut bytes, offset).is_err() || bytes != node.bytes[begin..begin + bytes.len()]
    };
    (0..node.index.chunks().len()).filter(|at| says(*at)).filter(is_wrong).count()
}

/// After the reboot: whatever is there, every byte that is served is right.
fn serve_after_reboot(root: &Path, node: &Cold, runtime: &tokio::runtime::Runtime) -> (bool, u64) {
    let files = Arc::new(LayerStore::open(root, Attacher::untried(root)).unwrap());
    if files.is_complete(7) {
        let bytes = fs::read(files.image(7)).unwrap();
        assert!(bytes == node.bytes, "a complete layer image has other bytes");
        return (true, bytes.len() as u64);
    }
    let layers = node.again_on(&files);
    runtime.block_on(async {
        // By what lies there, as a read would, else with the index of the store, as after a new lookup.
        if layers.size(7).is_none() {
            layers.open(7, || Some(Arc::clone(&node.index))).unwrap();
        }
        let layer = layers.get(7).unwrap();
        let length = node.bytes.len();
        for part in (0..length).step_by(200_000).chain([0, length - 100_000]) {
            let end = (part + 200_000).min(length);
            let range = part as u64..end as u64;
            let pieces = match layer.read_now(range.clone()) {
                Some(pieces) => pieces,
                None => layer.read(range).await.unwrap(),
            };
            assert!(pieces.concat() == node.bytes[part..end], "wrong bytes at {part}");
        }
        layer.fill().await.unwrap();
        let kept = layer.progress.kept.load(Ordering::SeqCst);
        files.complete(7, layer.file()).unwrap();
        (false, kept)
    })
}

#[test]
#[ignore = "needs device-mapper and two empty disks, named by TEST_POWER_DISKS: contrib/test runs it in a virtual machine"]
fn nothing_wrong_is_served_after_a_power_loss() {
    require_root();
    let disks = std::env::var(DISKS).unwrap();
    let (data, log) = disks.split_once(':').unwrap();
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("m");
    fs::create_dir(&point).unwrap();
    let runtime = runtime();
    let node = record(data, log, &point, &runtime);
    let recorded = Recorded::read(log);
    let size = disk_size(data);
    let (begin, complete) = (recorded.mark("begin"), recorded.mark("complete"));
    let (mut dangers, mut kept, mut whole) = (0, 0, 0);
    let points = recorded.points(begin);
    fs::write(dir.path().join("boot_id"), "00000000-1111-2222-3333-444444444444\n").unwrap();
    for entries in &points {
        let image = dir.path().join("disk");
        recorded.replay(*entries, size, &image);
        run(&format!("mount -t ext4 -o loop {} {}", image.display(), point.display()));
        let _mounted = Undo(format!("umount {}", point.display()));
        dangers += vouched_wrongly(&point, &node);
        // Another start of the machine has another name.
        run(&format!("mount --bind {}/boot_id {BOOT_ID}", dir.path().display()));
        let _booted = Undo(format!("umount {BOOT_ID}"));
        let (complete_now, bytes) = serve_after_reboot(&point, &node, &runtime);
        assert!(complete_now || *entries <= complete, "entry {entries}: what was made durable is not there");
        whole += usize::from(complete_now);
        kept += u64::from(!complete_now && bytes > 0);
    }
    println!(
        "{} writes recorded, {} moments tried: the layer whole after {whole}, parts of it kept after {kept}; a map that is \
         believed would have been wrong about {dangers} chunks",
        recorded.entries.len(),
        points.len()
    );
    assert!(whole > 0 && kept > 0 && dangers > 0, "nothing was tried");
}

pub(crate) fn disk_size(path: &str) -> u64 {
    let sectors =
        fs::read_to_string(PathBuf::from("/sys/class/block").join(&path[5..]).join("size")).unwrap();
    sectors.trim().parse::<u64>().unwrap() * 512
}
