//! What outlives the daemon: taken back from the keeper at the start, given to it again, and given up at the end.
//!
//! **What.** [`open`] comes before everything else: containers may be waiting for bytes that only this process can give them, and
//! what else a start does (the database, mounts) may wait for them.
//!
//! **When it fails.** Without a keeper layers are still read lazily, but a death of the daemon is then an I/O error for every
//! container that reads what is not here yet: a warning says so.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::keeper::client::{Keeper, KeeperError};
use crate::keeper::protocol::Name;
use crate::layer::lazy::session::Resume;
use crate::layer::lazy::{ColdLayers, Kept, Lazy};

/// How long containers wait for a daemon that is dead: less than the 120 s after which the kernel calls them hung.
const DEAD_MAN: Duration = Duration::from_secs(100);
/// How often it is looked whether the keeper is there.
const PAUSE: Duration = Duration::from_secs(1);
/// How long one that cannot be started is not tried again.
const RETRY: Duration = Duration::from_secs(60);

const CONNECTION: &str = "fuse/connection";
const MOUNT: &str = "fuse/mount";
const JOURNAL: &str = "fuse/journal";

/// Lazy serving, and who holds what it needs beside us.
#[derive(Debug)]
pub(super) struct Keeping {
    pub(super) lazy: Arc<Lazy>,
    keeper: Mutex<Option<Arc<Keeper>>>,
    socket: PathBuf,
    exe: PathBuf,
}

/// Serves lazily: what a predecessor left with the keeper, or something new. `None` where the kernel cannot, with a warning.
pub(super) fn open(config: &Config, cold: &Arc<ColdLayers>) -> Option<Keeping> {
    let exe = match std::env::current_exe() {
        Ok(exe) => exe,
        Err(error) => {
            tracing::warn!(%error, "layers are fetched whole before containers start: no program for helpers");
            return None;
        }
    };
    let keeper = Keeper::connect_or_start(&config.keeper, &exe);
    let keeper = keeper.map(Arc::new).inspect_err(warn_alone).ok();
    let left = keeper.as_deref().and_then(|keeper| left(keeper).inspect_err(warn_alone).ok().flatten());
    let begun = match left {
        Some(kept) => Lazy::start(kept, Arc::clone(cold), Resume::Again, &exe),
        None => Kept::create().and_then(|kept| Lazy::start(kept, Arc::clone(cold), Resume::First, &exe)),
    };
    match begun {
        Ok(lazy) => {
            let (lazy, socket) = (Arc::new(lazy), config.keeper.clone());
            let keeping = Keeping { lazy, keeper: Mutex::new(keeper), socket, exe };
            keeping.give();
            Some(keeping)
        }
        Err(error) => {
            tracing::warn!(%error, "layers cannot be read lazily here; they are fetched whole before containers start");
            None
        }
    }
}

fn warn_alone(error: &KeeperError) {
    tracing::warn!(
        %error,
        "no keeper: if speedy dies, containers get I/O errors where they read what is not on this node yet; see speedy keeper --help"
    );
}

fn name(text: &str) -> Result<Name, KeeperError> {
    Name::new(text).map_err(|_| KeeperError::WrongAnswer)
}

/// What a predecessor left.
fn left(keeper: &Keeper) -> Result<Option<Kept>, KeeperError> {
    let get = |text| keeper.get(&name(text)?);
    let found: [Option<OwnedFd>; 3] = [get(CONNECTION)?, get(MOUNT)?, get(JOURNAL)?];
    Ok(match found {
        [Some(connection), Some(mount), Some(journal)] => Some(Kept { connection, mount, journal }),
        _ => None,
    })
}

fn give(keeper: &Keeper, lazy: &Lazy) -> Result<(), KeeperError> {
    let kept = lazy.kept()?;
    // The connection last: without it the others are worth nothing.
    keeper.put(&name(JOURNAL)?, kept.journal.as_fd())?;
    keeper.put(&name(MOUNT)?, kept.mount.as_fd())?;
    keeper.put(&name(CONNECTION)?, kept.connection.as_fd())?;
    keeper.dead_man(DEAD_MAN, lazy.connection().ok())
}

impl Keeping {
    fn give(&self) {
        let mut keeper = self.keeper.lock();
        if keeper.as_deref().is_some_and(|keeper| give(keeper, &self.lazy).inspect_err(warn_alone).is_err()) {
            *keeper = None;
        }
    }

    /// Gives everything to another keeper whenever the one there is dies, until `stop`.
    pub(super) async fn watch(self: Arc<Self>, stop: CancellationToken) {
        let mut pause = PAUSE;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            if self.keeper.lock().as_ref().is_some_and(|keeper| !keeper.lost()) {
                continue;
            }
            let this = Arc::clone(&self);
            let again = move || match Keeper::connect_or_start(&this.socket, &this.exe) {
                Ok(keeper) => {
                    tracing::warn!("the keeper was lost; there is one again");
                    *this.keeper.lock() = Some(Arc::new(keeper));
                    this.give();
                }
                Err(error) => warn_alone(&error),
            };
            if tokio::task::spawn_blocking(again).await.is_err() {
                return;
            }
            pause = if self.keeper.lock().is_some() { PAUSE } else { RETRY };
        }
    }

    /// Nothing that containers use depends on us: the keeper need hold nothing.
    pub(super) fn release(&self) {
        if let Some(keeper) = &*self.keeper.lock()
            && let Err(error) = keeper.release()
        {
            tracing::warn!(%error, "the keeper was not told that nothing depends on it");
        }
    }
}
