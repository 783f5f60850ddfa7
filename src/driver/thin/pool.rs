//! The pool: where the blocks of all thin devices come from.
//!
//! **What.** Makes a pool or takes the one that is there, says how it is, lists what is in it, and lets it grow with its devices.
//!
//! **Words.** *transaction*: a number that the pool keeps with its metadata for its user. Ours is the largest serial for which
//! storage was made ready, so that records and pool that do not belong together are told apart ([`super::Thin`] compares).
//!
//! **Invariants.** Nothing is written to a device that holds anything but zeros or a pool of ours. A copy of the metadata that the
//! kernel keeps for a reading is let go of afterwards.
//!
//! **When it fails.** Before anything is changed, with what to do about it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use parking_lot::Mutex;

use super::device::{EBUSY, EEXIST, ENODATA, Kernel, path_of, within};
use super::metadata::{Device, Reader, Roots, Superblock};
use super::table::{self, BLOCK, BLOCK_BYTES, METADATA_BLOCK, Mode, PoolStatus};
use crate::driver::{DriverError, PoolHealth};
use crate::sys::loopdev::{self, LoopDevice};
use crate::sys::{blockdev, space};

/// What is looked at before a pool is made on a device: superblocks of what is usually there lie here.
const LOOKED_AT: usize = 128 << 10;
/// How long a call waits for another one's reading of the metadata.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a pool's blocks are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Devices {
    /// In two sparse files below the root, which are made.
    Loop {
        /// The size of the data file.
        bytes: u64,
    },
    /// On two devices.
    Direct {
        /// The larger one.
        data: PathBuf,
        /// 1/1000 of it is enough.
        metadata: PathBuf,
    },
}

/// What a pool is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolOptions {
    /// Where.
    pub devices: Devices,
    /// The share, in percent, that is kept free: of data, of metadata, and of the file system of a pool in files.
    pub reserve: u8,
}

/// A pool that is active.
#[derive(Debug)]
pub(super) struct Pool {
    kernel: Kernel,
    pub(super) name: String,
    root: PathBuf,
    options: PoolOptions,
    metadata: PathBuf,
    data: PathBuf,
    pub(super) numbers: (u32, u32),
    /// One copy of the metadata at a time is what the kernel keeps.
    reading: Mutex<()>,
}

impl Pool {
    /// Makes the pool of this name, or takes the one that is there.
    pub(super) fn open(
        kernel: &Kernel,
        root: &Path,
        name: &str,
        options: PoolOptions,
    ) -> Result<Pool, DriverError> {
        if kernel.info(name)?.is_some_and(|found| !found.live) {
            // A start that was killed before the pool had a table.
            kernel.remove(name)?;
        }
        let (metadata, data, _held) = match (&options.devices, kernel.info(name)?) {
            (Devices::Direct { data, metadata }, _) => (metadata.clone(), data.clone(), None),
            (Devices::Loop { bytes }, None) => {
                let (metadata, data) = open_files(root, *bytes)?;
                (metadata.path().to_owned(), data.path().to_owned(), Some((metadata, data)))
            }
            (Devices::Loop { .. }, Some(_)) => {
                let [metadata, data] = loops_below(kernel, root, name)?;
                (metadata, data, None)
            }
        };
        let info = match kernel.info(name)? {
            Some(found) if found.live => {
                require_devices(kernel, name, &metadata, &data)?;
                if found.suspended {
                    kernel.resume(name)?;
                }
                found
            }
            _ => {
                require_usable(&metadata, &data, matches!(options.devices, Devices::Direct { .. }))?;
                let length = length_of(&data)?;
                let table = table::pool(numbers_of(&metadata)?, numbers_of(&data)?, length);
                kernel.activate(name, &table, false)?
            }
        };
        let (kernel, name, root) = (kernel.clone(), name.to_owned(), root.to_owned());
        let pool = Pool {
            kernel,
            name,
            root,
            options,
            metadata,
            data,
            numbers: info.numbers,
            reading: Mutex::default(),
        };
        pool.grow()?;
        pool.require_health()?;
        Ok(pool)
    }

    pub(super) fn status(&self) -> Result<PoolStatus, DriverError> {
        let (kind, text) = self.kernel.status(&self.name)?;
        PoolStatus::parse(&text).filter(|_| kind == "thin-pool").ok_or_else(|| {
            DriverError::Unsupported(format!("{}: not the status of a pool: {text:?}", self.name))
        })
    }

    pub(super) fn health(&self) -> PoolHealth {
        match self.status() {
            Ok(status) => PoolHealth {
                data_free: status.data.free_percent(),
                metadata_free: status.metadata.free_percent(),
                trouble: trouble(&status, &self.metadata),
            },
            Err(error) => PoolHealth { data_free: 0, metadata_free: 0, trouble: Some(error.to_string()) },
        }
    }

    /// An error if the pool cannot be used at all.
    fn require_health(&self) -> Result<(), DriverError> {
        let status = self.status()?;
        match trouble(&status, &self.metadata) {
            // What is in it cannot be told: for that the kernel writes to its metadata.
            Some(problem) if matches!(status.mode, Mode::ReadOnly | Mode::Failed) => {
                Err(DriverError::Unsupported(problem))
            }
            Some(problem) => {
                tracing::error!(pool = self.name, problem, "the pool is in trouble");
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// An error if no snapshot may be made any more, lest those that are there run into the end of the pool.
    pub(super) fn require_room(&self) -> Result<(), DriverError> {
        let (status, reserve) = (self.status()?, u64::from(self.options.reserve));
        let full = |what: String| {
            let source = io::Error::new(io::ErrorKind::StorageFull, what);
            Err(DriverError::Full { path: path_of(&self.name), source })
        };
        if let Some(problem) = trouble(&status, &self.metadata) {
            return Err(self.refusal(&status, problem));
        }
        for (what, share) in [("data", status.data), ("metadata", status.metadata)] {
            let free = share.free_percent();
            if free < reserve {
                return full(format!(
                    "only {free} % of the pool's {what} is free, and pool.reserve keeps {reserve} %: remove images, or make the \
                     {what} device larger"
                ));
            }
        }
        if let Devices::Loop { .. } = self.options.devices {
            let below = space::space(&self.root).map_err(|error| DriverError::at(&self.root, error))?;
            let free = below.bytes_free.saturating_mul(100) / below.bytes.max(1);
            if free < reserve {
                return full(format!("only {free} % of the file system below the pool's files is free"));
            }
        }
        Ok(())
    }

    /// Takes over what its devices have become larger by.
    pub(super) fn grow(&self) -> Result<(), DriverError> {
        if let Devices::Loop { bytes } = self.options.devices {
            for (name, device, bytes) in
                [("data", &self.data, bytes), ("metadata", &self.metadata, metadata_bytes(bytes))]
            {
                let path = self.root.join("pool").join(name);
                let grown = || {
                    let file = File::options().write(true).open(&path)?;
                    if file.metadata()?.len() < bytes {
                        file.set_len(bytes)?;
                        LoopDevice::existing(device)?.grow()?;
                    }
                    Ok(())
                };
                grown().map_err(|error| DriverError::at(&path, error))?;
            }
        }
        let (length, ..) = self.kernel.table(&self.name)?;
        let (data, status) = (length_of(&self.data)?, self.status()?);
        let metadata = length_of(&self.metadata)? / METADATA_BLOCK;
        let more = data / BLOCK_BYTES * BLOCK > length;
        // The kernel uses 16 GiB less one block map at most; what is a little larger than it says is not worth a suspension.
        let more_metadata =
            metadata > status.metadata.total + status.metadata.total / 8 && metadata < 4_145_152;
        let wanted = match status.mode {
            Mode::ReadWrite => more || more_metadata,
            Mode::OutOfData => more,
            // With room again the kernel makes it writable.
            Mode::ReadOnly => more_metadata && status.is_out_of_metadata() && !status.needs_check,
            Mode::Failed => false,
        };
        if wanted {
            let table = table::pool(numbers_of(&self.metadata)?, numbers_of(&self.data)?, data);
            self.kernel.reload(&self.name, &table)?;
            tracing::info!(pool = self.name, bytes = data, "the pool has grown with its devices");
        }
        Ok(())
    }

    /// Counts up the pool's transaction number. It never goes down.
    pub(super) fn advance(&self, to: u64) -> Result<(), DriverError> {
        let from = self.status()?.transaction;
        if from >= to {
            return Ok(());
        }
        self.tell(&format!("set_transaction_id {from} {to}"))
    }

    /// Makes a thin device out of nothing.
    pub(super) fn create(&self, thin_id: u32) -> Result<(), DriverError> {
        self.tell(&format!("create_thin {thin_id}"))
    }

    /// Makes a thin device that is what another is now. The origin must not be written to meanwhile.
    pub(super) fn snapshot(&self, thin_id: u32, origin: u32) -> Result<(), DriverError> {
        self.tell(&format!("create_snap {thin_id} {origin}"))
    }

    /// Removes a thin device; nothing happens if there is none.
    pub(super) fn delete(&self, thin_id: u32) -> Result<(), DriverError> {
        match self.kernel.message(&self.name, &format!("delete {thin_id}")) {
            Err(refused) if refused.errno == Some(ENODATA) => Ok(()),
            Err(refused) if refused.errno == Some(EBUSY) => {
                Err(DriverError::Busy(format!("thin device {thin_id} of {} is in use", self.name)))
            }
            Err(refused) => Err(self.explained(refused.error)),
            Ok(()) => self.require_written(),
        }
    }

    /// The kernel answers a message before it has written the metadata, and says nothing when it cannot: the pool is read-only then.
    fn require_written(&self) -> Result<(), DriverError> {
        let status = self.status()?;
        match (status.mode, trouble(&status, &self.metadata)) {
            (Mode::ReadOnly | Mode::Failed, Some(problem)) => Err(self.refusal(&status, problem)),
            _ => Ok(()),
        }
    }

    /// What the kernel says of a pool in trouble is an errno that could mean anything.
    fn explained(&self, error: DriverError) -> DriverError {
        self.require_written().err().unwrap_or(error)
    }

    /// What is full can be given room; anything else wants repair.
    fn refusal(&self, status: &PoolStatus, problem: String) -> DriverError {
        match status.mode == Mode::OutOfData || status.is_out_of_metadata() {
            true => {
                let source = io::Error::new(io::ErrorKind::StorageFull, problem);
                DriverError::Full { path: path_of(&self.name), source }
            }
            false => DriverError::Unsupported(problem),
        }
    }

    fn tell(&self, text: &str) -> Result<(), DriverError> {
        self.kernel.message(&self.name, text).map_err(|refused| match refused.errno {
            Some(EEXIST) => DriverError::Taken(format!(
                "{}: {text}: the thin device is there already, and not ours; it was left alone, and its number is not used any more: try \
                 again",
                self.name
            )),
            Some(ENODATA) => DriverError::Missing(path_of(&self.name).join(text)),
            _ => self.explained(refused.error),
        })?;
        self.require_written()
    }

    /// All thin devices of the pool.
    pub(super) fn devices(&self) -> Result<BTreeMap<u32, Device>, DriverError> {
        self.read(|reader, roots| reader.devices(roots))
    }

    /// The bytes that a thin device has written since it was made; `None` if there is no such device.
    pub(super) fn own_bytes(&self, thin_id: u32) -> Result<Option<u64>, DriverError> {
        let own = self.read(move |reader, roots| match reader.devices(roots)?.get(&thin_id) {
            Some(device) => reader.own_blocks(roots, thin_id, *device).map(Some),
            None => Ok(None),
        })?;
        Ok(own.map(|blocks| blocks.saturating_mul(BLOCK_BYTES)))
    }

    fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&mut Reader, &Roots) -> io::Result<T> + Send + 'static,
    ) -> Result<T, DriverError> {
        let Some(_one_at_a_time) = self.reading.try_lock_for(PATIENCE) else {
            return Err(DriverError::Busy(format!("the metadata of {} are being read", self.name)));
        };
        let kept = Kept::new(self).map_err(|error| self.explained(error))?;
        let metadata = self.metadata.clone();
        let found = within(&self.name, move || {
            let found = File::open(&metadata).and_then(|device| {
                let mut reader = Reader::open(&device)?;
                let roots = reader.kept()?.ok_or(io::ErrorKind::NotFound)?;
                read(&mut reader, &roots)
            });
            found.map_err(|error| DriverError::at(&metadata, error))
        });
        drop(kept);
        found
    }
}

/// What is wrong with a pool, and the way out.
pub(super) fn trouble(status: &PoolStatus, metadata: &Path) -> Option<String> {
    let metadata = metadata.display();
    match status.mode {
        Mode::Failed => Some(format!(
            "the pool has failed: look at dmesg, stop everything on it, remove its devices (dmsetup remove), then thin_check \
             --clear-needs-check-flag {metadata} and start again; if the device cannot be read or thin_check finds errors, thin_repair -i \
             {metadata} -o a new device several times as large, and name that as pool.metadata"
        )),
        Mode::ReadOnly if status.is_out_of_metadata() => {
            let way = match status.needs_check {
                false => format!(
                    "make {metadata} larger (lvextend; of a pool in files: pool.size), and the pool goes on within a minute, or with the \
                     next start; if that cannot be, stop Speedy and everything on the pool, remove its devices (dmsetup remove), dd \
                     if={metadata} of=a larger device bs=1M conv=fsync"
                ),
                // What two snapshots share of it is written once for each: it may need several times the room.
                true => format!(
                    "stop Speedy and everything on the pool, remove its devices (dmsetup remove), thin_repair -i {metadata} -o a device \
                     several times as large"
                ),
            };
            Some(format!(
                "the pool's metadata device is full to its last block and the pool read-only, so that nothing can be removed either: \
                 {way}, name that as pool.metadata, and start again"
            ))
        }
        _ if status.needs_check => Some(format!(
            "the pool's metadata are to be checked (needs_check): stop everything on it, remove its devices (dmsetup remove), then \
             thin_check --clear-needs-check-flag {metadata}; if that finds errors, thin_repair"
        )),
        Mode::ReadOnly => Some(format!(
            "the pool is read-only because its metadata could not be written: look at dmesg and at {metadata}, then remove the pool's \
             devices and start again"
        )),
        Mode::OutOfData => {
            Some("the pool's data device is full: remove images, or make the data device larger".to_owned())
        }
        Mode::ReadWrite => None,
    }
}

/// The copy of its metadata that the kernel keeps for a reading.
struct Kept<'a>(&'a Pool);

impl Kept<'_> {
    fn new(pool: &Pool) -> Result<Kept<'_>, DriverError> {
        let reserve = || pool.kernel.message(&pool.name, "reserve_metadata_snap");
        let reserved = reserve().or_else(|refused| match refused.errno {
            // Left by one that was killed while it read.
            Some(EBUSY) => pool.kernel.message(&pool.name, "release_metadata_snap").and_then(|()| reserve()),
            _ => Err(refused),
        });
        reserved.map(|()| Kept(pool)).map_err(|refused| refused.error)
    }
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        if let Err(refused) = self.0.kernel.message(&self.0.name, "release_metadata_snap") {
            tracing::warn!(pool = self.0.name, error = %refused.error, "the pool keeps a copy of its metadata until it is read again");
        }
    }
}

/// What a pool in files has for its metadata.
fn metadata_bytes(data: u64) -> u64 {
    (data / 500).clamp(16 << 20, 15 << 30) / METADATA_BLOCK * METADATA_BLOCK
}

/// The two files of a pool, on loop devices.
fn open_files(root: &Path, bytes: u64) -> Result<(LoopDevice, LoopDevice), DriverError> {
    let dir = root.join("pool");
    match std::fs::create_dir(&dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(DriverError::at(&dir, error));
        }
        _ => {}
    }
    let open = |name: &str, bytes: u64| {
        let path = dir.join(name);
        let opened = || {
            let mut options = File::options();
            let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
            if file.metadata()?.len() < bytes {
                file.set_len(bytes)?;
                file.sync_all()?;
            }
            LoopDevice::open_writable(&file, &path)
        };
        opened().map_err(|error| DriverError::at(&path, error))
    };
    let opened = (open("metadata", metadata_bytes(bytes))?, open("data", bytes / BLOCK_BYTES * BLOCK_BYTES)?);
    File::open(&dir).and_then(|dir| dir.sync_all()).map_err(|error| DriverError::at(&dir, error))?;
    tracing::warn!(
        dir = %dir.display(),
        "the pool is in sparse files on loop devices: to try it out only. It is slower than devices, a full file system below loses \
         writes, and a power loss may cost more than the last of them; use pool.mode = \"direct\" in production"
    );
    Ok(opened)
}

/// The loop devices of a pool that is active already: they must be those of our files.
fn loops_below(kernel: &Kernel, root: &Path, name: &str) -> Result<[PathBuf; 2], DriverError> {
    let (.., parameters) = kernel.table(name)?;
    let numbers = table::devices_of(&parameters).unwrap_or_default();
    let mut found = [PathBuf::new(), PathBuf::new()];
    for (at, file) in ["metadata", "data"].into_iter().enumerate() {
        let device = PathBuf::from(format!("/dev/loop{}", numbers[at].1));
        let expected = root.join("pool").join(file);
        let below = loopdev::backing_file(&device).map_err(|error| DriverError::at(&device, error))?;
        if numbers_of(&device)? != numbers[at] || below.as_ref() != Some(&expected) {
            return Err(other_devices(name));
        }
        found[at] = device;
    }
    Ok(found)
}

fn other_devices(name: &str) -> DriverError {
    DriverError::Unsupported(format!(
        "the pool {name} is active on other devices than the configuration names; nothing was touched: set pool.mode, pool.data and \
         pool.metadata to what `dmsetup table {name}` shows"
    ))
}

fn require_devices(kernel: &Kernel, name: &str, metadata: &Path, data: &Path) -> Result<(), DriverError> {
    let (.., parameters) = kernel.table(name)?;
    match table::devices_of(&parameters) == Some([numbers_of(metadata)?, numbers_of(data)?]) {
        true => Ok(()),
        false => Err(other_devices(name)),
    }
}

/// Before a pool is made active: nobody else has its devices, and they hold one of ours, or nothing.
fn require_usable(metadata: &Path, data: &Path, ours_alone: bool) -> Result<(), DriverError> {
    let open = |path: &Path| match ours_alone {
        true => blockdev::open_exclusive(path),
        false => File::open(path),
    };
    let explain = |path: &Path, error: io::Error| match error.kind() {
        io::ErrorKind::ResourceBusy => DriverError::Unsupported(format!(
            "{} is in use by another program (a mount, or another device: see lsblk); nothing was touched: give this pool devices of \
             its own",
            path.display()
        )),
        io::ErrorKind::NotFound => DriverError::Unsupported(format!(
            "the pool's device {} is not there: attach it, or correct pool.data and pool.metadata",
            path.display()
        )),
        _ => DriverError::at(path, error),
    };
    let (below, blocks) = (
        open(metadata).map_err(|error| explain(metadata, error))?,
        open(data).map_err(|error| explain(data, error))?,
    );
    let look = || {
        let superblock = Reader::open(&below)?.superblock()?;
        let mut head = vec![0; LOOKED_AT];
        std::os::unix::fs::FileExt::read_exact_at(&blocks, &mut head, 0)?;
        Ok((superblock, head.iter().all(|byte| *byte == 0)))
    };
    let foreign = |path: &Path| {
        DriverError::Unsupported(format!(
            "{} holds something that is no pool of Speedy; nothing was touched: choose another device, or clear it (blkdiscard -z, or \
             dd if=/dev/zero of={} bs=1M count=1) if nobody needs it",
            path.display(),
            path.display()
        ))
    };
    match look().map_err(|error| DriverError::at(metadata, error))? {
        (Superblock::Foreign, _) => Err(foreign(metadata)),
        (Superblock::Blank, false) => Err(foreign(data)),
        (Superblock::Pool(roots), _) if u64::from(roots.data_block) != BLOCK => Err(foreign(metadata)),
        (Superblock::Blank, true) | (Superblock::Pool(_), _) => Ok(()),
    }
}

fn numbers_of(device: &Path) -> Result<(u32, u32), DriverError> {
    blockdev::numbers(device).map_err(|error| DriverError::at(device, error))
}

fn length_of(device: &Path) -> Result<u64, DriverError> {
    let length = File::open(device).and_then(|file| blockdev::length(&file));
    length.map_err(|error| DriverError::at(device, error))
}
