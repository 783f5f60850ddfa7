//! Layer images that are read before they are here: loop devices over files of our own FUSE server.
//!
//! ```text
//! container → overlayfs → EROFS → loop device ┬─ our FUSE file → Cold: chunk in the file? memory? other layer? store
//!                                             └─ the local file, once it is complete (LOOP_CHANGE_FD)
//! ```
//!
//! **What.** [`Lazy`] serves one FUSE connection with one directory, in which every layer image has a file that is named by its
//! serial; it attaches layer images from there, and switches them to their local file and back.
//!
//! **Words.** *lazy*: attached from the FUSE file. *native*: attached from the local file, no byte of it passes through us.
//!
//! **Invariants.**
//! * The connection, its unattached mount and the [`journal`] are held by the keeper too: a reader never sees that we died, it waits.
//! * Nothing here waits for our own server: what may is done by a [`helper`].
//! * Serving needs no record: what is in `<root>/layer` is enough.
//!
//! **When it fails.** A read whose bytes cannot be had fails with EIO, never with wrong bytes.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use super::LayerError;
use super::allowance::Allowance;
use super::cold::{Cold, Means};
use super::fill::Supply;
use super::gate::{Gate, Held};
use super::presence::Presence;
use super::work::Work;
use crate::content::index::{IndexDigest, LayerIndex, Limits};
use crate::sys::decimal;
use crate::sys::fuse::{self, Mount};

use helper::{Helper, HelperError};
use journal::Journal;
use session::{Resume, Session, Source};
use touches::Touches;

pub mod helper;
pub mod journal;
pub mod message;
pub mod session;
pub mod touches;

/// What outlives this process, because the keeper holds it too.
#[derive(Debug)]
pub struct Kept {
    /// The FUSE connection.
    pub connection: OwnedFd,
    /// The mount of it that no path leads to.
    pub mount: OwnedFd,
    /// The memory of the [`journal`].
    pub journal: OwnedFd,
}

impl Kept {
    /// A new connection with nothing on it.
    pub fn create() -> std::io::Result<Kept> {
        let connection = fuse::open()?;
        let mount = fuse::mount(&connection)?.into_fd();
        Ok(Kept { connection, mount, journal: Journal::memory()? })
    }
}

/// Whether this kernel sends again what a process that died was asked, or its successor must know it (see [`journal`]).
pub fn kernel_repeats() -> std::io::Result<bool> {
    let kept = Kept::create()?;
    match fuse::write(&kept.connection, &[std::io::IoSlice::new(&message::resend())]) {
        Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => Ok(false),
        done => done.map(|()| true),
    }
}

/// The layer images that are not wholly here.
#[derive(Debug)]
pub struct ColdLayers {
    means: Means,
    work: Arc<Work>,
    open: Mutex<HashMap<u64, Arc<Cold>>>,
    touches: Arc<Touches>,
}

impl ColdLayers {
    /// None is open yet.
    pub fn new(supply: Supply) -> ColdLayers {
        let allowance = Arc::new(Allowance::new(None));
        let means = Means { supply, gate: Arc::default(), allowance };
        let (work, open, touches) = (Arc::default(), Mutex::default(), Arc::default());
        ColdLayers { means, work, open, touches }
    }

    /// The same that fetches so many bytes each second, at most, for which nobody waits; 0 for no limit.
    pub fn with_rate(mut self, rate: u64) -> ColdLayers {
        self.means.gate = Arc::new(Gate::new(rate));
        self
    }

    /// The same with so much room.
    pub fn with_allowance(mut self, allowance: Allowance) -> ColdLayers {
        self.means.allowance = Arc::new(allowance);
        self
    }

    /// What they may take.
    pub fn allowance(&self) -> &Arc<Allowance> {
        &self.means.allowance
    }

    /// What chunks are had from.
    pub fn supply(&self) -> &Supply {
        &self.means.supply
    }

    /// What is read of them.
    pub fn touches(&self) -> &Arc<Touches> {
        &self.touches
    }

    /// Fills of these fetch only what readers will want next, as long as the answer lives.
    pub fn hold(&self, serials: Vec<u64>) -> Held {
        self.means.gate.hold(serials)
    }

    /// The layer image of this serial with this index, opened if it is not. Blocking.
    pub fn open(
        &self,
        serial: u64,
        index: impl FnOnce() -> Option<Arc<LayerIndex>>,
    ) -> Result<Arc<Cold>, LayerError> {
        let mut open = self.open.lock();
        if let Some(cold) = open.get(&serial) {
            return Ok(Arc::clone(cold));
        }
        let index = index().ok_or_else(|| LayerError::Missing(self.means.supply.layers.image(serial)))?;
        let cold = self.open_new(serial, index)?;
        open.insert(serial, Arc::clone(&cold));
        Ok(cold)
    }

    fn open_new(&self, serial: u64, index: Arc<LayerIndex>) -> Result<Arc<Cold>, LayerError> {
        let cold = Arc::new(Cold::open(serial, index, self.means.clone())?);
        self.means.allowance.register(&cold);
        Ok(cold)
    }

    /// Another beginning of the layer image of this serial, with nothing in it, in a file of its own beside the complete one.
    /// Nobody reads it before [`ColdLayers::put`]. Blocking.
    pub fn begin_beside(&self, serial: u64, index: Arc<LayerIndex>) -> Result<Arc<Cold>, LayerError> {
        let cold = Arc::new(Cold::begin(serial, index, self.means.clone())?);
        self.means.allowance.register(&cold);
        Ok(cold)
    }

    /// From now on this is what is read of its serial.
    pub fn put(&self, cold: &Arc<Cold>) {
        self.open.lock().insert(cold.serial(), Arc::clone(cold));
    }

    /// The tasks that fetch, and reads under way.
    pub fn work(&self) -> &Arc<Work> {
        &self.work
    }

    /// The same if it is open.
    pub fn get(&self, serial: u64) -> Option<Arc<Cold>> {
        self.open.lock().get(&serial).cloned()
    }

    /// It is not wanted any more; who uses it keeps it.
    pub fn close(&self, serial: u64) {
        self.open.lock().remove(&serial);
    }

    /// By what lies beside it on the disk, which the map vouches for.
    fn by_files(&self, serial: u64) -> Option<Arc<Cold>> {
        let store = &self.means.supply.layers;
        let opened = self.open(serial, || {
            let bytes = store.read_index(serial)?;
            let digest = *IndexDigest::of(&bytes).as_bytes();
            // A complete one has no map, and every byte of it was checked.
            let vouched = store.is_complete(serial)
                || Presence::index_of(&store.open_map(serial).ok()?).ok()?? == digest;
            vouched.then(|| LayerIndex::decode(&bytes, Limits::default()).ok().map(Arc::new))?
        });
        opened
            .inspect_err(|error| tracing::error!(serial, %error, "a layer that is in use cannot be read"))
            .ok()
    }
}

#[async_trait]
impl Source for ColdLayers {
    fn size(&self, serial: u64) -> Option<u64> {
        Some(self.by_files(serial)?.index().facts().layout.size)
    }

    fn read_now(&self, serial: u64, offset: u64, size: u32) -> Option<Vec<Bytes>> {
        let cold = self.by_files(serial)?;
        let range = offset..offset + u64::from(size);
        self.touches.touched(serial, || cold.index().data_covering(&range));
        cold.read_now(range)
    }

    async fn read(&self, serial: u64, offset: u64, size: u32) -> Option<Vec<Bytes>> {
        let cold = self.get(serial)?;
        cold.read(offset..offset + u64::from(size)).await.ok()
    }
}

/// See the module's page.
#[derive(Debug)]
pub struct Lazy {
    session: Arc<Session>,
    connection: Arc<OwnedFd>,
    mount: Mount,
    journal: OwnedFd,
    helper: Helper,
    resumed: bool,
}

impl Lazy {
    /// Serves the layers on what is kept.
    pub fn start(kept: Kept, layers: Arc<ColdLayers>, resume: Resume, exe: &Path) -> std::io::Result<Lazy> {
        let journal = Journal::open(kept.journal.as_fd())?;
        let connection = Arc::new(kept.connection);
        let work = Arc::clone(layers.work());
        let session = Session::start(Arc::clone(&connection), journal, layers, work, resume)?;
        let (mount, helper) = (Mount::from_fd(kept.mount), Helper::new(exe.to_owned()));
        let resumed = resume != Resume::First;
        Ok(Lazy { session, connection, mount, journal: kept.journal, helper, resumed })
    }

    /// What outlives this process, once more.
    pub fn kept(&self) -> std::io::Result<Kept> {
        Ok(Kept {
            connection: self.connection.try_clone()?,
            mount: self.mount.as_fd().try_clone_to_owned()?,
            journal: self.journal.try_clone()?,
        })
    }

    /// Whether layer images that are attached lazily are served by this connection: a predecessor's has ended else.
    pub fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// What was served.
    pub fn counts(&self) -> &session::Counts {
        &self.session.counts
    }

    /// Whether nobody can be served any more, because the connection was aborted.
    pub fn has_ended(&self) -> bool {
        self.session.has_ended()
    }

    /// The number of the connection in `/sys/fs/fuse/connections`.
    pub fn connection(&self) -> std::io::Result<u32> {
        self.mount.connection()
    }

    /// Attaches a layer image from its FUSE file.
    pub fn attach(&self, serial: u64, point: &Path) -> Result<(), HelperError> {
        self.helper.attach(&self.mount, serial, point)
    }

    /// Switches a lazy layer image to its complete local file, under its live mount.
    pub fn to_native(&self, serial: u64, device: &Path, image: &Path) -> Result<(), HelperError> {
        self.helper.to_native(&self.mount, serial, device, image)
    }

    /// Switches a native layer image back.
    pub fn to_lazy(&self, serial: u64, device: &Path, image: &Path) -> Result<(), HelperError> {
        self.helper.to_lazy(&self.mount, serial, device, image)
    }

    /// Serves a layer image again that was attached from a connection that ended.
    pub fn revive(&self, serial: u64, device: &Path) -> Result<(), HelperError> {
        self.helper.revive(&self.mount, serial, device)
    }

    /// Takes a lazy layer image away from its attach point.
    pub fn detach(&self, point: &Path) -> Result<(), HelperError> {
        self.helper.detach(&self.mount, point)
    }
}

/// Whether a file that is below a loop device is a layer image's FUSE file; its serial.
pub fn serial_below(image: &Path) -> Option<u64> {
    decimal::parse(image.to_str()?.strip_prefix('/')?)
}
