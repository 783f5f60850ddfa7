//! Layer images on this node: their files, their attach points, and how they are filled.
//!
//! ```text
//! <root>/layer/<serial>.part    a layer image that is being made or fetched; sparse
//! <root>/layer/<serial>.erofs   a complete one: written, checked, synced, then renamed to this
//! <root>/layer/<serial>.map     beside a `.part`: which of its chunks are there (see [`presence`])
//! <root>/layer/<serial>.index   its layer index, once it is known; can always be made or fetched again
//! <root>/layer/<serial>.new     beside a complete one until it is recorded
//! <root>/l/<serial>             where it is attached; its tree is the directory `fs` inside, so that an attach point without
//!                               its mount has no `fs` and every container on it fails loudly
//! ```
//!
//! **Where.** Called by `snapshot`; calls `content` for chunks and `image` for checks. Files and attaching are blocking, filling
//! is async.
//!
//! **Invariants.**
//! * A `.erofs` file is whole and durable, and is not written to as long as it has that name: one that the disk has changed becomes a
//!   `.part` again. A `.part` beside a `.erofs` is another file, with which the layer begins anew to have room.
//! * A file that was below a mount is never punched.
//! * **L1** A layer that is attached from its `.erofs` file needs neither this process nor the network.
//!
//! **When it fails.** What a crash leaves is a `.part` file (filled on from where it was: each chunk in it is hashed, not
//! believed, unless a `.map` of this boot vouches for it) or files of a serial that no record names, which `remove` takes away. A complete image of a Pending Id is worth
//! something only if it was recorded once, that is, in a newer `metadata.db`: the `.new` file tells that it was not.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

pub mod allowance;
pub mod attach;
pub mod chunks;
pub mod cold;
pub mod fill;
pub mod gate;
pub mod lazy;
mod pace;
pub mod presence;
mod trial;
pub mod work;

use crate::content::index::{IndexDigest, LayerIndex};
use crate::sys::space::{self, Space};
use crate::sys::{decimal, lease};
use attach::Attacher;
use presence::{Earlier, Presence};

/// How the name of a file ends that is of use to nobody once its maker is gone.
const TEMPORARY: &str = ".tmp";

/// What can go wrong with a layer image on this node.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// No room.
    #[error("no space left for layer images under {path}")]
    Full {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The file of a layer image is not there.
    #[error("layer image {0} is missing")]
    Missing(PathBuf),
    /// It cannot be attached.
    #[error(transparent)]
    Attach(#[from] attach::AttachError),
    /// A helper could not do it.
    #[error(transparent)]
    Helper(#[from] lazy::helper::HelperError),
    /// What the disk holds is not what was written.
    #[error("{path} is damaged on the disk: chunk {chunk} has other bytes")]
    Damaged {
        /// The layer image.
        path: PathBuf,
        /// Which part of it.
        chunk: crate::chunk::ChunkId,
    },
    /// A chunk cannot be had.
    #[error("layer {layer}: {source}")]
    Chunk {
        /// The layer's diff ID.
        layer: String,
        /// Which chunk, and why.
        #[source]
        source: crate::content::ContentError,
    },
    /// The system refused.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl LayerError {
    /// Whether nobody answers, for now.
    pub fn is_outage(&self) -> bool {
        matches!(self, LayerError::Chunk { source, .. } if source.is_outage())
    }

    /// Gives an I/O error its meaning.
    pub fn at(path: &Path, source: io::Error) -> LayerError {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => LayerError::Full { path, source },
            io::ErrorKind::NotFound => LayerError::Missing(path),
            _ => LayerError::Io { path, source },
        }
    }
}

/// The layer images below one root. Blocking.
#[derive(Debug)]
pub struct LayerStore {
    files: PathBuf,
    attacher: OnceLock<Attacher>,
    untried: Attacher,
    sync: fn(&File) -> io::Result<()>,
}

impl LayerStore {
    /// Opens the store below `root`, making its directory (0700) if needed.
    pub fn open(root: &Path, attacher: Attacher) -> Result<LayerStore, LayerError> {
        let store = LayerStore::at(root);
        store.prepare(attacher)?;
        Ok(store)
    }

    /// The store below `root`, good for reading what is there; nothing is touched before [`LayerStore::prepare`].
    pub fn at(root: &Path) -> LayerStore {
        let (files, untried) = (root.join("layer"), Attacher::untried(root));
        LayerStore { files, attacher: OnceLock::new(), untried, sync: File::sync_all }
    }

    /// The same with another way of making files durable: for tests of disks that cannot.
    pub fn with_sync(self, sync: fn(&File) -> io::Result<()>) -> LayerStore {
        LayerStore { sync, ..self }
    }

    /// Makes a layer image durable.
    pub fn sync(&self, serial: u64, file: &File) -> Result<(), LayerError> {
        (self.sync)(file).map_err(|error| LayerError::at(&self.part(serial), error))
    }

    /// Makes it whole. To be called once, by whoever has the root to himself.
    pub fn prepare(&self, attacher: Attacher) -> Result<(), LayerError> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.files)
            .map_err(|error| LayerError::at(&self.files, error))?;
        self.clear_temporary().map_err(|error| LayerError::at(&self.files, error))?;
        self.attacher.get_or_init(|| attacher);
        Ok(())
    }

    fn attacher(&self) -> &Attacher {
        self.attacher.get().unwrap_or(&self.untried)
    }

    fn clear_temporary(&self) -> io::Result<()> {
        for entry in std::fs::read_dir(&self.files)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().ends_with(TEMPORARY) {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Where a complete layer image is.
    pub fn image(&self, serial: u64) -> PathBuf {
        self.files.join(format!("{serial}.erofs"))
    }

    /// Where one is that is not complete.
    pub fn part(&self, serial: u64) -> PathBuf {
        self.files.join(format!("{serial}.part"))
    }

    fn index(&self, serial: u64) -> PathBuf {
        self.files.join(format!("{serial}.index"))
    }

    fn map(&self, serial: u64) -> PathBuf {
        self.files.join(format!("{serial}.map"))
    }

    /// The file that tells which chunks of a layer image are there, made if it is not there.
    pub fn open_map(&self, serial: u64) -> Result<File, LayerError> {
        let path = self.map(serial);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        options.open(&path).map_err(|error| LayerError::at(&path, error))
    }

    /// Which chunks of the layer image with this index are there, by its map, and what that is worth.
    pub fn presence(&self, serial: u64, index: &LayerIndex) -> Result<(Presence, Earlier), LayerError> {
        let io = |error| LayerError::at(&self.map(serial), error);
        let digest = IndexDigest::of(&index.encode());
        let boot = presence::boot_id().map_err(io)?;
        let map = self.open_map(serial)?;
        Presence::open(&map, digest.as_bytes(), index.chunks().len(), boot).map_err(io)
    }

    /// The same for who only looks: of each chunk whether the map vouches for it; nothing if there is none of this boot.
    pub fn vouched_for(&self, serial: u64, index: IndexDigest, chunks: usize) -> Option<Vec<bool>> {
        let map = std::fs::read(self.map(serial)).ok()?;
        presence::read(&map, index.as_bytes(), chunks, presence::boot_id().ok()?)
    }

    /// A complete layer image needs no map. Of no consequence if it fails.
    pub fn remove_map(&self, serial: u64) -> Result<(), LayerError> {
        remove_file(&self.map(serial))
    }

    fn new_mark(&self, serial: u64) -> PathBuf {
        self.files.join(format!("{serial}.new"))
    }

    /// A new, empty file for a layer image to be made in; only root may read it.
    pub fn create(&self, serial: u64) -> Result<File, LayerError> {
        let path = self.part(serial);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        options.open(&path).map_err(|error| LayerError::at(&path, error))
    }

    /// The file of a layer image that is being filled, made if it is not there.
    pub fn reopen(&self, serial: u64) -> Result<File, LayerError> {
        let path = self.part(serial);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        options.open(&path).map_err(|error| LayerError::at(&path, error))
    }

    /// A new file for a layer image that is not kept; the caller removes it. What a crash leaves is removed at the next start.
    pub fn temporary(&self) -> Result<(PathBuf, File), LayerError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = self.files.join(format!("{}{TEMPORARY}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(&path).map_err(|error| LayerError::at(&path, error))?;
        Ok((path, file))
    }

    /// Makes a written layer image complete: on return it is durable under its name.
    pub fn complete(&self, serial: u64, file: &File) -> Result<(), LayerError> {
        self.sync(serial, file)?;
        self.rename(&self.part(serial), &self.image(serial))
    }

    /// A complete layer image is none any more, until its file was filled again; durable on return. Its name says so from now on.
    pub fn reopen_complete(&self, serial: u64) -> Result<(), LayerError> {
        self.rename(&self.image(serial), &self.part(serial))
    }

    /// Removes the file of a complete layer image, of which there is another one that is being filled, unless something has it open:
    /// `false` then.
    pub fn discard_complete(&self, serial: u64) -> Result<bool, LayerError> {
        let image = self.image(serial);
        let io = |error| LayerError::at(&image, error);
        if !lease::is_alone(&self.read(serial)?).map_err(io)? {
            return Ok(false);
        }
        remove_file(&image)?;
        self.sync_directory()?;
        Ok(true)
    }

    /// A complete layer image needs no other file that is being filled.
    pub fn remove_part(&self, serial: u64) -> Result<(), LayerError> {
        remove_file(&self.part(serial))
    }

    /// Durable on return.
    fn rename(&self, from: &Path, to: &Path) -> Result<(), LayerError> {
        std::fs::rename(from, to).map_err(|error| LayerError::at(from, error))?;
        self.sync_directory()
    }

    fn sync_directory(&self) -> Result<(), LayerError> {
        File::open(&self.files)
            .and_then(|dir| dir.sync_all())
            .map_err(|error| LayerError::at(&self.files, error))
    }

    /// To be called before [`LayerStore::complete`] by whoever records the layer image only afterwards.
    pub fn mark_new(&self, serial: u64) -> Result<(), LayerError> {
        let mark = self.new_mark(serial);
        File::create(&mark).map(drop).map_err(|error| LayerError::at(&mark, error))
    }

    /// The layer image is recorded.
    pub fn unmark_new(&self, serial: u64) -> Result<(), LayerError> {
        remove_file(&self.new_mark(serial))
    }

    /// Gives a recorded layer image, whose file was lost, the file of another that has the same bytes.
    pub fn replace(&self, lost: u64, with: u64) -> Result<(), LayerError> {
        self.rename(&self.image(with), &self.image(lost))
    }

    /// Whether there is a layer image that was recorded, be it in records that are lost.
    pub fn was_recorded(&self, serial: u64) -> bool {
        self.is_complete(serial) && !self.new_mark(serial).exists()
    }

    /// Whether all bytes of it are here.
    pub fn is_complete(&self, serial: u64) -> bool {
        self.image(serial).exists()
    }

    /// Opens a complete layer image for reading.
    pub fn read(&self, serial: u64) -> Result<File, LayerError> {
        let path = self.image(serial);
        File::open(&path).map_err(|error| LayerError::at(&path, error))
    }

    /// Opens a layer image for reading whether it is complete or not.
    pub fn read_any(&self, serial: u64) -> Result<File, LayerError> {
        self.read(serial).or_else(|_| {
            let part = self.part(serial);
            File::open(&part).map_err(|error| LayerError::at(&part, error))
        })
    }

    /// Keeps a layer index beside its image. Not synced: it can be had again.
    pub fn write_index(&self, serial: u64, bytes: &[u8]) -> Result<(), LayerError> {
        let path = self.index(serial);
        std::fs::write(&path, bytes).map_err(|error| LayerError::at(&path, error))
    }

    /// The layer index kept beside an image, as it is on disk: not checked.
    pub fn read_index(&self, serial: u64) -> Option<Vec<u8>> {
        std::fs::read(self.index(serial)).ok()
    }

    /// Bytes that the files of a layer image take on disk.
    pub fn allocated(&self, serial: u64) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let files = [self.image(serial), self.part(serial), self.index(serial)];
        files.iter().filter_map(|path| std::fs::metadata(path).ok()).map(|file| file.blocks() * 512).sum()
    }

    /// How full the file system of the layer images is.
    pub fn space(&self) -> io::Result<Space> {
        space::space(&self.files)
    }

    /// Attaches a layer image all of whose bytes are here, durable or not; harmless when it is attached.
    pub fn attach(&self, serial: u64) -> Result<(), LayerError> {
        let (image, part, point) = (self.image(serial), self.part(serial), self.attacher().point(serial));
        if !image.exists() && part.exists() {
            match self.attacher().attach(&part, &point) {
                // Made durable, and so renamed, between the two.
                Err(_) if image.exists() => {}
                attached => return Ok(attached?),
            }
        }
        if !image.exists() {
            return Err(LayerError::Missing(image));
        }
        Ok(self.attacher().attach(&image, &point)?)
    }

    /// Attaches a complete layer image so that its file can be exchanged later.
    pub fn attach_by_device(&self, serial: u64) -> Result<(), LayerError> {
        Ok(self.attacher().attach_by_device(&self.image(serial), &self.point(serial))?)
    }

    /// The loop devices that layer images are attached from, by serial, below whatever covers them.
    pub fn devices(&self) -> Result<HashMap<u64, PathBuf>, LayerError> {
        Ok(self.attacher().devices()?)
    }

    /// Undoes [`LayerStore::cover`]. Containers that started on it keep what they have.
    pub fn uncover(&self, serial: u64) -> Result<(), LayerError> {
        Ok(self.attacher().uncover(&self.point(serial))?)
    }

    /// Attaches a complete layer image over itself, without the loop device that it is attached by, where that can be: containers
    /// that start from now on read it some 25 % quicker. Those that run keep what they have.
    pub fn cover(&self, serial: u64) -> Result<(), LayerError> {
        Ok(self.attacher().cover(&self.image(serial), &self.point(serial))?)
    }

    /// See [`Attacher::cached`].
    pub fn cached(&self) -> Result<Vec<u64>, LayerError> {
        Ok(self.attacher().cached()?)
    }

    /// See [`Attacher::settle`].
    pub fn settle(&self, serial: u64) -> Result<(), LayerError> {
        let image = self.image(serial);
        // Not durable yet: it is looked at again.
        let file = if image.exists() { image } else { self.part(serial) };
        Ok(self.attacher().settle(&file, &self.point(serial))?)
    }

    /// Takes a layer image away from its attach point; harmless when it is not there. What is mounted on top of it keeps it.
    pub fn detach(&self, serial: u64) -> Result<(), LayerError> {
        Ok(self.attacher().detach(&self.attacher().point(serial))?)
    }

    /// Where a layer image is attached.
    pub fn point(&self, serial: u64) -> PathBuf {
        self.attacher().point(serial)
    }

    /// What is attached.
    pub fn attached(&self) -> Result<Vec<attach::Attached>, LayerError> {
        Ok(self.attacher().attached()?)
    }

    /// Detaches a layer image and removes its files; succeeds when there is nothing.
    pub fn remove(&self, serial: u64) -> Result<(), LayerError> {
        if self.is_complete(serial) || self.part(serial).exists() {
            self.detach(serial)?;
        }
        let files = [
            self.image(serial),
            self.part(serial),
            self.map(serial),
            self.index(serial),
            self.new_mark(serial),
        ];
        files.iter().try_for_each(|path| remove_file(path))
    }

    /// The serials that have an image, complete or not.
    pub fn inventory(&self) -> Result<Vec<u64>, LayerError> {
        inventory(&self.files)
    }
}

/// The serials that have a layer image below `root`; nothing is made.
pub fn images_below(root: &Path) -> Result<Vec<u64>, LayerError> {
    match inventory(&root.join("layer")) {
        Err(LayerError::Missing(_)) => Ok(Vec::new()),
        found => found,
    }
}

fn remove_file(path: &Path) -> Result<(), LayerError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(LayerError::at(path, error)),
        _ => Ok(()),
    }
}

fn inventory(files: &Path) -> Result<Vec<u64>, LayerError> {
    let entries = std::fs::read_dir(files).map_err(|error| LayerError::at(files, error))?;
    let mut serials = std::collections::BTreeSet::new();
    for entry in entries {
        let name = entry.map_err(|error| LayerError::at(files, error))?.file_name();
        let serial = name.to_str().and_then(|name| name.split_once('.')).and_then(|(n, kind)| {
            let ours = matches!(kind, "erofs" | "part" | "map" | "index" | "new");
            decimal::parse(n).filter(|_| ours)
        });
        match serial {
            Some(serial) => drop(serials.insert(serial)),
            None if name.to_string_lossy().ends_with(TEMPORARY) => {}
            None => tracing::warn!(entry = ?name, "unknown entry among the layer images; left alone"),
        }
    }
    Ok(serials.into_iter().collect())
}
