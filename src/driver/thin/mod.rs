//! The driver of thin devices: each snapshot a block device with its own file system, whose blocks are shared with its parent until
//! they are written.
//!
//! ```text
//! speedy-<tag>-pool       the pool; its blocks are on two devices, or in <root>/pool/{data,metadata}
//! speedy-<tag>-<serial>   a snapshot that is in use; committed ones are not active
//! <root>/pool.begun       the pool was empty when this root took it
//! thin id 0 or 1          the template of ext4 or xfs: an empty file system, made once; 2 is one that is being made
//! thin id 16 + <slot>     a snapshot
//! ```
//!
//! **What.** A writable snapshot is a thin device of its own. A view is none: it is a read-only device on its parent's, which nobody
//! writes to any more; so it takes no room and is really read-only, whatever mounts it.
//!
//! **Words.** As the kernel's: *pool*, *thin device*, *thin id*, *origin*; *activate*: make a device that shows a thin device.
//!
//! **Invariants.**
//! * **T1** The records are the only authority. An Id is Pending in them before its thin device is made, and forgotten after it is
//!   deleted; a slot is a thin id, a serial is a name, and names are never used again.
//! * **T2** The pool's transaction number is the largest serial that storage was made ready for: never above what the records have
//!   given out, never below what a snapshot of theirs has. Otherwise they do not belong together, and nothing is touched.
//! * **T3** An origin that is active is suspended while it is snapshotted, and resumed whatever happens.
//! * **T4** A thin device that no record names is never removed: it can only be somebody else's.
//!
//! **When it fails.** A full pool is [`DriverError::Full`] before it is full; what is in use is [`DriverError::Busy`]; a call that was cut
//! short is finished, or undone with its Id, by the next start.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use super::{
    Access, Cancelled, Creation, Driver, DriverError, Id, Inventory, Known, Measure, Mount, MountRequest,
    PoolHealth, Storage,
};
use crate::sys::{blockdev, decimal};
use device::{Info, Kernel, MAPPER, node_of, path_of, within};
use pool::Pool;

mod device;
mod fs;
mod metadata;
mod pool;
mod table;

pub use fs::Kind;
pub use pool::{Devices, PoolOptions};
pub use table::{Mode, PoolStatus, Share};

/// Thin ids of our own before those of slots.
const OWN_IDS: u32 = 16;
const MAKING: u32 = 2;
/// A file of the root: the pool was empty when it was begun with.
const BEGUN: &str = "pool.begun";
/// Thin ids have 24 bits.
const MOST_SLOTS: u32 = (1 << 24) - OWN_IDS;
/// What a snapshot must have at least, so that the file system's own growth is worth it.
const GROWTH: u64 = 1 << 20;
/// The largest that a container may ask for.
const LARGEST: u64 = 16 << 40;
const TURNS: usize = 16;
/// How long a call waits for another one's work on the same device.
const PATIENCE: Duration = Duration::from_secs(60);

/// What thin devices are to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThinOptions {
    /// Told apart by it: the pools and devices of several roots on one machine.
    pub tag: String,
    /// What is made on them.
    pub kind: Kind,
    /// How large each is, where nobody asks for another size.
    pub size: u64,
    /// Options of each mount that is written to.
    pub mount_options: Vec<String>,
    /// Whether the blocks of a removed snapshot are discarded on the devices below.
    pub discard: bool,
    /// Where the blocks are.
    pub pool: PoolOptions,
}

/// See the module's page.
#[derive(Debug)]
pub struct Thin {
    kernel: Kernel,
    pool: Pool,
    root: PathBuf,
    options: ThinOptions,
    /// Held while a device is activated, taken away, or suspended to be snapshotted, each for a share of the serials: two callers would
    /// undo each other's work.
    turns: [Mutex<()>; TURNS],
    /// The thin ids that there are, or may be.
    present: Mutex<HashSet<u32>>,
}

impl Thin {
    /// Opens the storage of `root`: its pool is active afterwards. [`Driver::recover`] comes next.
    pub fn open(root: &Path, options: ThinOptions) -> Result<Thin, DriverError> {
        if options.size < options.kind.smallest() {
            return Err(DriverError::Unsupported(format!(
                "thin.size is too small: a {} has {} MiB at least",
                options.kind.as_str(),
                options.kind.smallest() >> 20
            )));
        }
        let kernel = Kernel::open()?;
        let pool = Pool::open(&kernel, root, &pool_name(&options.tag), options.pool.clone())?;
        Ok(Thin {
            kernel,
            pool,
            root: root.to_owned(),
            options,
            turns: Default::default(),
            present: Mutex::default(),
        })
    }

    /// How the pool is.
    pub fn status(&self) -> Result<PoolStatus, DriverError> {
        self.pool.status()
    }

    fn prefix(&self) -> String {
        format!("speedy-{}-", self.options.tag)
    }

    fn name(&self, serial: u64) -> String {
        format!("{}{serial}", self.prefix())
    }

    fn turn(&self, serial: u64) -> Result<MutexGuard<'_, ()>, DriverError> {
        let at = usize::try_from(serial).unwrap_or(0) % TURNS;
        self.turns[at].try_lock_for(PATIENCE).ok_or_else(|| {
            DriverError::Busy(format!("{} is waited for by another call; see dmesg", self.name(serial)))
        })
    }

    fn template(&self) -> u32 {
        match self.options.kind {
            Kind::Ext4 => 0,
            Kind::Xfs => 1,
        }
    }

    fn thin_table(&self, thin_id: u32, bytes: u64) -> device::Table {
        table::thin(self.pool.numbers, thin_id, bytes)
    }

    /// Resumes what was left suspended, and takes away what is active for no record.
    fn recover_devices(&self, known: &HashSet<u64>) -> Result<(), DriverError> {
        for name in self.kernel.names(&self.prefix())? {
            let Some(info) = self.kernel.info(&name)?.filter(|_| name != self.pool.name) else { continue };
            if info.suspended && info.live {
                tracing::warn!(name, "a device was left suspended; it goes on");
                self.kernel.resume(&name)?;
            }
            let serial = name.strip_prefix(&self.prefix()).and_then(decimal::parse);
            if !serial.is_some_and(|serial| known.contains(&serial)) {
                tracing::info!(name, "a device of no snapshot is taken away");
                self.kernel.remove(&name)?;
            }
        }
        // Names that a machine that went down, or a kill, has left without a device.
        for entry in std::fs::read_dir(MAPPER).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&self.prefix()) && !entry.path().exists() {
                drop(std::fs::remove_file(entry.path()));
            }
        }
        Ok(())
    }

    /// Refuses a pool and records that do not belong together (**T2**).
    fn require_same_life(&self, known: &Known) -> Result<(), DriverError> {
        let transaction = self.pool.status()?.transaction;
        let of = format!("the pool {} (transaction {transaction})", self.pool.name);
        if known.last_serial == 0 {
            let (devices, begun) = (self.pool.devices()?, self.root.join(BEGUN).exists());
            if transaction > 0 || devices.keys().any(|id| *id >= OWN_IDS || !begun) {
                return Err(DriverError::Unsupported(format!(
                    "{of} has {} thin devices, and the records of {} are new: another program uses it, or metadata.db is lost; nothing \
                     was touched: give this root devices of its own, or restore metadata.db",
                    devices.len(),
                    self.root.display()
                )));
            }
        } else if transaction > known.last_serial {
            return Err(DriverError::Unsupported(format!(
                "{of} is newer than the records of {}, which have given out {} numbers: metadata.db is an older copy, and what it \
                 would take for free is in use; nothing was touched: restore the newer metadata.db, or begin anew with another root and \
                 cleared devices",
                self.root.display(),
                known.last_serial
            )));
        } else if known.newest > transaction {
            return Err(DriverError::Unsupported(format!(
                "{of} is older than the records of {}, which have a snapshot {}: the pool's devices are not those of this root, or were \
                 restored from a copy; nothing was touched: attach the right devices, or begin anew with an empty root",
                self.root.display(),
                known.newest
            )));
        }
        Ok(())
    }

    /// Notes durably that what is in the pool from now on is ours: the template is there before the records give out a number.
    fn begin(&self) -> Result<(), DriverError> {
        let path = self.root.join(BEGUN);
        let noted = File::create(&path).and_then(|_| File::open(&self.root)?.sync_all());
        noted.map_err(|error| DriverError::at(&path, error))
    }

    /// Makes the template, unless there is one that will do.
    fn make_template(&self) -> Result<(), DriverError> {
        let devices = self.pool.devices()?;
        if devices.contains_key(&MAKING) {
            self.pool.delete(MAKING)?;
        }
        let name = format!("{}template", self.prefix());
        if devices.contains_key(&self.template()) {
            let table = self.thin_table(self.template(), self.options.size);
            let info = self.kernel.activate(&name, &table, true)?;
            let node = node_of(info);
            let found = within(&name, move || fs::look(&node));
            self.kernel.remove(&name)?;
            if found?
                .is_some_and(|found| found.kind == self.options.kind && found.bytes() <= self.options.size)
            {
                return Ok(());
            }
            // Nothing stands on a template: its blocks live on where they are shared.
            self.pool.delete(self.template())?;
        }
        let image = self.root.join("template.new");
        fs::make(self.options.kind, &image, self.options.size)?;
        self.pool.create(MAKING)?;
        crash_here("template created");
        let info = self.kernel.activate(&name, &self.thin_table(MAKING, self.options.size), false)?;
        let (node, kind, from) = (node_of(info), self.options.kind, image.clone());
        let written = within("the template", move || {
            fs::copy(&from, &node)?;
            fs::tidy(kind, &node)
        });
        drop(std::fs::remove_file(&image));
        self.kernel.remove(&name)?;
        written?;
        crash_here("template written");
        // Complete or not there at all.
        self.pool.snapshot(self.template(), MAKING)?;
        self.pool.delete(MAKING)
    }

    /// Snapshots an origin that may still be active.
    fn snapshot_of(&self, parent: Option<Id>, thin_id: u32) -> Result<(), DriverError> {
        let Some(parent) = parent else { return self.pool.snapshot(thin_id, self.template()) };
        let (name, origin) = (self.name(parent.serial), thin_id_of(parent)?);
        if self.kernel.info(&name)?.is_none() {
            return self.pool.snapshot(thin_id, origin);
        }
        let _alone = self.turn(parent.serial)?;
        match self.kernel.info(&name)? {
            None => self.pool.snapshot(thin_id, origin),
            Some(info) if !info.open => {
                self.kernel.remove(&name)?;
                self.pool.snapshot(thin_id, origin)
            }
            Some(_) => {
                let suspended = self.kernel.suspend(&name)?;
                crash_here("origin suspended");
                let made = self.pool.snapshot(thin_id, origin);
                drop(suspended);
                made
            }
        }
    }

    /// A device on the thin device of a snapshot that is written to, as large as its file system needs it.
    fn activate_writable(&self, id: Id, size: Option<u64>) -> Result<Info, DriverError> {
        let (name, thin_id) = (self.name(id.serial), thin_id_of(id)?);
        let wanted = size.unwrap_or(self.options.size);
        let in_use = self.kernel.info(&name)?.is_some_and(|info| info.live && !info.suspended && info.open);
        let info = self.kernel.activate(&name, &self.thin_table(thin_id, wanted), false)?;
        if in_use {
            // It is as large as it is going to be.
            return Ok(info);
        }
        let node = node_of(info);
        let found = within(&name, {
            let node = node.clone();
            move || fs::look(&node)
        })?;
        let Some(found) = found else {
            return Err(DriverError::Missing(path_of(&name).join("a file system")));
        };
        if let Some(size) = size.filter(|size| *size < found.bytes()) {
            return Err(DriverError::Invalid(format!(
                "a size of {size} bytes is asked for, and the file system of what it stands on has {} already; set thin.size to the \
                 smallest that is needed, and pull again",
                found.bytes()
            )));
        }
        let bytes = found.bytes().max(wanted);
        let (length, ..) = self.kernel.table(&name)?;
        if length < bytes.div_ceil(table::SECTOR) {
            self.kernel.reload(&name, &self.thin_table(thin_id, bytes))?;
        }
        if found.bytes() + GROWTH <= bytes {
            within(&name, move || fs::grow(found, &node, bytes))?;
        }
        Ok(info)
    }

    /// Gives the blocks of a thin device that nobody uses back to the devices below.
    fn discard(&self, id: Id) -> Result<(), DriverError> {
        let (name, thin_id) = (self.name(id.serial), thin_id_of(id)?);
        let info = match self.kernel.activate(&name, &self.thin_table(thin_id, self.options.size), false) {
            Err(DriverError::Missing(_)) => return Ok(()),
            activated => activated?,
        };
        if let Some(highest) = table::highest_sector(&self.kernel.status(&name)?.1) {
            let bytes = (highest + 1).saturating_mul(table::SECTOR);
            if self.kernel.table(&name)?.0 <= highest {
                self.kernel.reload(&name, &self.thin_table(thin_id, bytes))?;
            }
            let node = node_of(info);
            within(&name, move || {
                let device = File::options().write(true).open(&node);
                let discarded = device.and_then(|device| blockdev::discard(&device, 0, bytes));
                discarded.map_err(|error| DriverError::at(&node, error))
            })?;
        }
        self.kernel.remove(&name)
    }
}

impl Driver for Thin {
    fn storage(&self) -> Storage {
        Storage::Volumes
    }

    fn recover(&self, known: &Known) -> Result<(), DriverError> {
        self.require_same_life(known)?;
        if known.last_serial == 0 {
            self.begin()?;
        }
        self.recover_devices(&known.ids.iter().map(|id| id.serial).collect())?;
        self.make_template()?;
        *self.present.lock() = self.pool.devices()?.into_keys().collect();
        Ok(())
    }

    fn reserve(&self, ids: &[Id]) -> Result<(), DriverError> {
        match ids.iter().map(|id| id.serial).max() {
            Some(newest) => self.pool.advance(newest),
            None => Ok(()),
        }
    }

    fn create(&self, new: &Creation) -> Result<(), DriverError> {
        if new.root.is_some() {
            return Err(DriverError::Invalid(
                "id-mapped snapshots need the overlayfs driver: do not give remap-ids to this snapshotter"
                    .into(),
            ));
        }
        if new.access == Access::ReadOnly {
            return Ok(());
        }
        self.pool.require_room()?;
        let thin_id = thin_id_of(new.id)?;
        // Also after an error: a call that was given up may still be done.
        self.present.lock().insert(thin_id);
        let made = self.snapshot_of(new.parent, thin_id);
        if let Err(DriverError::Taken(_)) = made {
            self.present.lock().remove(&thin_id);
        }
        made?;
        crash_here("snapshot made");
        Ok(())
    }

    fn mounts(&self, request: &MountRequest<'_>) -> Vec<Mount> {
        let kind = self.options.kind;
        let mut options: Vec<String> = Vec::new();
        match request.access {
            Access::ReadOnly => options.extend(kind.options_for_reading().iter().map(|o| (*o).to_owned())),
            Access::ReadWrite => {
                options.extend(kind.options().iter().map(|option| (*option).to_owned()));
                options.extend(self.options.mount_options.iter().cloned());
            }
        }
        let source = path_of(&self.name(request.id.serial)).display().to_string();
        vec![Mount { kind: kind.as_str().into(), source, options }]
    }

    fn activate(&self, request: &MountRequest<'_>) -> Result<(), DriverError> {
        if let Some(size) = request.size.filter(|size| *size > LARGEST) {
            return Err(DriverError::Invalid(format!("a size of {size} bytes is more than {LARGEST}")));
        }
        let _alone = self.turn(request.id.serial)?;
        match request.access {
            Access::ReadWrite => self.activate_writable(request.id, request.size).map(drop),
            Access::ReadOnly => {
                let shown = match request.parents.first() {
                    Some(parent) => thin_id_of(*parent)?,
                    None => self.template(),
                };
                let (name, size) = (self.name(request.id.serial), self.options.size);
                let info = self.kernel.activate(&name, &self.thin_table(shown, size), true)?;
                let node = node_of(info);
                let Some(found) = within(&name, move || fs::look(&node))? else {
                    return Err(DriverError::Missing(path_of(&name).join("a file system")));
                };
                if self.kernel.table(&name)?.0 >= found.bytes().div_ceil(table::SECTOR) {
                    return Ok(());
                }
                self.kernel.remove(&name)?;
                self.kernel.activate(&name, &self.thin_table(shown, found.bytes()), true).map(drop)
            }
        }
    }

    fn volume_of(&self, mount: &Mount) -> Option<u64> {
        let name = Path::new(&mount.source).strip_prefix(MAPPER).ok()?.to_str()?;
        let serial = decimal::parse(name.strip_prefix(&self.prefix())?)?;
        let writable =
            mount.kind == self.options.kind.as_str() && !mount.options.iter().any(|option| option == "ro");
        writable.then_some(serial)
    }

    fn fill(&self, id: Id, write: &mut dyn FnMut(&Path) -> io::Result<()>) -> Result<(), DriverError> {
        let info = {
            let _alone = self.turn(id.serial)?;
            self.activate_writable(id, None)?
        };
        fs::write(self.options.kind, &node_of(info), write)?;
        crash_here("volume filled");
        Ok(())
    }

    fn usage(&self, id: Id, _cancelled: Cancelled<'_>) -> Result<Measure, DriverError> {
        match self.pool.own_bytes(thin_id_of(id)?)? {
            Some(bytes) => Ok(Measure { bytes, inodes: 0 }),
            None => Err(DriverError::Missing(path_of(&self.name(id.serial)))),
        }
    }

    fn seal(&self, id: Id) -> Result<(), DriverError> {
        let (name, _alone) = (self.name(id.serial), self.turn(id.serial)?);
        match self.kernel.info(&name)? {
            Some(info) if !info.open => self.kernel.remove(&name),
            _ => Ok(()),
        }
    }

    fn require_unused(&self, id: Id) -> Result<(), DriverError> {
        let name = self.name(id.serial);
        match self.kernel.info(&name)? {
            Some(info) if info.open => Err(DriverError::Busy(format!(
                "{} is mounted or open; unmount it and remove the snapshot again",
                path_of(&name).display()
            ))),
            _ => Ok(()),
        }
    }

    fn remove(&self, id: Id, cancelled: Cancelled<'_>) -> Result<(), DriverError> {
        let (name, _alone) = (self.name(id.serial), self.turn(id.serial)?);
        let open = self.kernel.info(&name)?.is_some_and(|info| info.open);
        // A view's device shows its parent: what is discarded below is never this one.
        self.kernel.remove(&name)?;
        if open {
            return Err(DriverError::Busy(format!(
                "{name} is still mounted or open; it goes when that ends"
            )));
        }
        crash_here("device removed");
        if cancelled() {
            return Err(DriverError::Cancelled);
        }
        let thin_id = thin_id_of(id)?;
        if !self.present.lock().contains(&thin_id) {
            return Ok(());
        }
        if self.options.discard {
            self.discard(id)?;
            crash_here("blocks discarded");
        }
        self.pool.delete(thin_id)?;
        self.present.lock().remove(&thin_id);
        crash_here("thin device deleted");
        Ok(())
    }

    fn inventory(&self) -> Result<Inventory, DriverError> {
        let devices = self.pool.devices()?;
        Ok(Inventory::Slots(devices.keys().filter_map(|id| id.checked_sub(OWN_IDS)).collect()))
    }

    fn is_unused(&self, id: Id) -> Result<bool, DriverError> {
        let thin_id = thin_id_of(id)?;
        // What was only made shares every block with its origin.
        Ok(!self.present.lock().contains(&thin_id) || self.pool.own_bytes(thin_id)?.unwrap_or(0) == 0)
    }

    fn tend(&self) -> Result<(), DriverError> {
        self.pool.grow()
    }

    fn pool(&self) -> Option<PoolHealth> {
        Some(self.pool.health())
    }

    fn upperdir(&self, _id: Id) -> Option<PathBuf> {
        None
    }
}

/// What the pool of this tag is called.
pub fn pool_name(tag: &str) -> String {
    format!("speedy-{tag}-pool")
}

fn thin_id_of(id: Id) -> Result<u32, DriverError> {
    match id.slot {
        slot if slot < MOST_SLOTS => Ok(slot + OWN_IDS),
        _ => Err(DriverError::Unsupported(
            "a pool has no more than 16 million thin devices: remove images".into(),
        )),
    }
}

/// How the pool of this tag is, looked at beside a running daemon; `None` where it is not active.
pub fn look(tag: &str) -> Result<Option<PoolStatus>, DriverError> {
    let (kernel, name) = (Kernel::open()?, pool_name(tag));
    match kernel.info(&name)? {
        None => Ok(None),
        Some(_) => Ok(PoolStatus::parse(&kernel.status(&name)?.1)),
    }
}

/// What is wrong with a pool, and what to do about it.
pub fn trouble(status: &PoolStatus) -> Option<String> {
    pool::trouble(status, Path::new("the metadata device"))
}

/// Ends the process where a test asked for it (`THIN_CRASH`, of test builds only): no destructor runs, as in a crash.
fn crash_here(step: &str) {
    if cfg!(debug_assertions) && std::env::var("THIN_CRASH").is_ok_and(|asked| asked == step) {
        std::process::abort();
    }
}
