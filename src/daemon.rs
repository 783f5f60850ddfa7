//! The composition root: open, reconcile, serve, drain. Owns every background task (**S1**: each has an owner that waits for
//! it at shutdown).
//!
//! **When it fails.** Before the socket answers: an error says why and what to do, and nothing of the root was changed that the
//! next start does not mend. Afterwards: SIGTERM or SIGINT finishes the calls that have begun; a second one ends the process
//! at once, which is safe, as is a kill at any instant.

use std::ffi::OsStr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{Config, DriverKind, LayerSharing};
use crate::containerd::blob::Blobs;
use crate::containerd::events::Noticed;
use crate::containerd::manifest::{LONGEST_DOCUMENT, chains_of};
use crate::containerd::{self, ContainerdError};
use crate::content::ContentError;
use crate::content::memory::MemoryError;
use crate::content::trust::{KEY_FILE, KeyError};
use crate::driver::overlay::{Overlay, OverlayOptions};
use crate::driver::{Driver, DriverError, probe};
use crate::keeper::circular::{self, Circular};
use crate::layer::LayerError;
use crate::oci::Digest;
use crate::registry::RegistryError;
use crate::service::{self, About, ServeError, Served, Shown};
use crate::snapshot::SnapshotError;
use crate::snapshot::layers::Layers;
use crate::snapshot::metastore::{self, MetaError, MetaStore};
use crate::snapshot::reconcile::Room;
use crate::snapshot::snapshotter::{Policy, Sharing, Snapshotter, UpperdirLabel};
use crate::sys::lock::{self, FileLock};
use crate::sys::socket::{self, Bound, SocketError};
use crate::sys::{host, space};
use crate::telemetry::Metrics;

use keeping::Keeping;
use ports::Ports;

mod keeping;
mod levels;
mod ports;
pub mod remote;
mod store_scrub;
mod thin;

/// How often, and after which time each, the lock of a predecessor that was killed is asked for.
const DYING_TRIES: u32 = 100;
const DYING_PAUSE: Duration = Duration::from_millis(100);
/// How long begun calls may take after the signal to stop.
const DRAIN: Duration = Duration::from_secs(10);

/// Why the daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// It would wait for itself.
    #[error(transparent)]
    Circular(#[from] Circular),
    /// Another daemon has the root.
    #[error("{0} is in use by another speedy; stop that one or choose another --root")]
    RootInUse(PathBuf),
    /// The root holds something else.
    #[error(
        "{root} holds {found:?} but no metadata.db of Speedy; nothing was touched: choose an empty directory as --root, or \
         restore metadata.db"
    )]
    RootOccupied {
        /// The root.
        root: PathBuf,
        /// An entry that is not ours.
        found: String,
    },
    /// The root cannot be used.
    #[error("cannot use the root {root}: {source}")]
    Root {
        /// The root.
        root: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// Settings that do not go together.
    #[error("{0}")]
    Settings(String),
    /// The records cannot be used.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// The storage cannot be used.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The layer source cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The store cannot be used.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// This node's key cannot be used.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Layer images cannot be kept.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// Records and storage cannot be brought together.
    #[error("cannot recover: {0}")]
    Recover(#[source] SnapshotError),
    /// The socket cannot be taken.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Serving failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The registry port cannot be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The system refused something else.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// How many configurations of images are read at once, and how long one may take.
const CONFIGURATIONS: usize = 4;
const CONFIGURATION: Duration = Duration::from_secs(5);

/// Runs the daemon until `stop`. `inherited` is the socket that systemd made, if it did.
pub async fn run(
    config: &Config,
    inherited: Option<std::os::unix::net::UnixListener>,
    stop: CancellationToken,
) -> Result<(), DaemonError> {
    let root = Root::open(config)?;
    // What containers wait for comes first; all that follows may wait for them.
    let store = remote::open_store(config)?;
    let root = root.locked().await?;
    let (driver, meta) = open_driver(config).await?;
    let blobs = Blobs::new(config.containerd.clone());
    let composed = remote::compose(config, &meta, &blobs, store)?;
    let about = about(config, &composed);
    let (layers, content) = (composed.remote.layers.clone(), composed.remote.content.clone());
    let (keeping, scrubber) = (composed.keeping.clone(), composed.scrubber.clone());
    let scrubbed = composed.objects.clone().zip(Some(scrubber.clone()));
    let applier = remote::applier(config, &meta, &driver, layers.clone());
    let snapshotter =
        Arc::new(Snapshotter::new(Arc::clone(&meta), driver, applier, composed.remote, policy(config)));
    snapshotter.start().await.map_err(DaemonError::Recover)?;

    let beside = thin::open_beside(config, policy(config), content.clone()).await?;
    let ports = Ports::open(config, content).await?;
    let roots = thin::roots(config, &snapshotter, &meta, beside.as_ref());
    let metrics = Metrics::new(levels::read(&snapshotter, roots.clone(), scrubbed, ports.mirror()));
    let (metrics_address, registry_address) = ports.addresses();
    let about = Arc::new(About { mirror: ports.mirror_state(), pools: levels::pools(roots), ..about });
    let bound = match inherited {
        Some(listener) => Bound::inherited(listener)?,
        None => socket::listen(&config.address)?,
    };

    let background = TaskTracker::new();
    let background_stop = CancellationToken::new();
    let _stop_on_error = background_stop.clone().drop_guard();
    spawn_work(&background, &snapshotter, beside.as_ref(), config, &blobs, &background_stop);
    let volumes = beside.as_ref().map(|beside| beside.serve(&background, &background_stop));
    scrubber.map(|scrubber| background.spawn(scrubber.run(background_stop.clone())));
    keeping.clone().map(|keeping| background.spawn(keeping.watch(background_stop.clone())));
    let shown = Shown { metrics: metrics.clone(), snapshotter: snapshotter.clone(), about: about.clone() };
    ports.serve(&background, shown, &background_stop);
    background.close();

    let calls = TaskTracker::new();
    let served = Served { snapshotter, beside: volumes, blobs, about, metrics, tasks: calls.clone() };
    let serving = service::serve(bound.listener.try_clone()?, served, stop.clone());
    notify(sd_notify::NotifyState::Ready);
    let counts = meta.counts();
    tracing::info!(
        address = %config.address.display(),
        root = %config.root.display(),
        metrics = metrics_address.map(tracing::field::display),
        registry = registry_address.map(tracing::field::display),
        snapshots = counts.views + counts.active + counts.committed,
        to_free = counts.removing,
        "ready"
    );
    let served = serve_then_drain(serving, &bound, stop).await;
    calls.close();
    calls.wait().await;
    background_stop.cancel();
    background.wait().await;
    if let Some(layers) = layers {
        end_lazy(&layers, keeping.as_deref()).await;
    }
    thin::close(meta, beside).await?;
    drop(root);
    tracing::info!("stopped");
    served
}

/// What containers still read through us waits for the next process; if there is nothing, nobody need wait for it.
async fn end_lazy(layers: &Layers, keeping: Option<&Keeping>) {
    layers.end_reads().await;
    if let Some(keeping) = keeping.filter(|_| !layers.has_lazy()) {
        keeping.release();
    }
}

/// What goes on in the background as long as calls are answered.
fn spawn_work(
    background: &TaskTracker,
    snapshotter: &Arc<Snapshotter>,
    beside: Option<&thin::Beside>,
    config: &Config,
    blobs: &Blobs,
    stop: &CancellationToken,
) {
    let foreseeing = Foreseeing {
        blobs: blobs.clone(),
        work: background.clone(),
        stop: stop.clone(),
        reads: Arc::new(Semaphore::new(CONFIGURATIONS)),
    };
    let (work, work_stop) = (Arc::clone(snapshotter), stop.clone());
    background.spawn(async move { work.run(work_stop).await });
    let (watching, beside) = (Arc::clone(snapshotter), beside.map(thin::Beside::snapshotter));
    let tell = move |noticed: Noticed<'_>| match noticed {
        Noticed::There(version) => {
            watching.containerd_is(Some(version));
            // Nobody tells what happened before.
            watching.images_changed();
        }
        Noticed::Gone => watching.containerd_is(None),
        Noticed::Removal => {
            [Some(&watching), beside.as_ref()].into_iter().flatten().for_each(|one| one.removed())
        }
        Noticed::Image => watching.images_changed(),
        Noticed::Configuration { namespace, digest } => {
            let all = [Some(&watching), beside.as_ref()].into_iter().flatten();
            foreseeing.tell(namespace, digest, all.filter(|one| one.looks_ahead()).cloned().collect());
        }
    };
    background.spawn(containerd::events::watch(config.containerd.clone(), tell, stop.clone()));
}

/// Reads configurations of images that are being pulled.
struct Foreseeing {
    blobs: Blobs,
    work: TaskTracker,
    stop: CancellationToken,
    reads: Arc<Semaphore>,
}

impl Foreseeing {
    /// Tells of the layers of the image whose configuration this is; what is none is none.
    fn tell(&self, namespace: &str, digest: Digest, told: Vec<Arc<Snapshotter>>) {
        if told.is_empty() {
            return;
        }
        // Only a hint: with more of them than that there is something else going on than pulls.
        let Ok(turn) = Arc::clone(&self.reads).try_acquire_owned() else { return };
        let (blobs, namespace, stop) = (self.blobs.clone(), namespace.to_owned(), self.stop.clone());
        let read = async move {
            let config = blobs.containerd(&namespace).await?.read(&digest, LONGEST_DOCUMENT).await?;
            Ok::<_, ContainerdError>(chains_of(&config, &digest)?)
        };
        self.work.spawn(async move {
            let _turn = turn;
            match stop.run_until_cancelled(tokio::time::timeout(CONFIGURATION, read)).await {
                Some(Ok(Ok(chains))) => {
                    told.iter().for_each(|snapshotter| snapshotter.configuration_stored(chains.clone()));
                }
                Some(Ok(Err(error))) => tracing::debug!(%error, "the layers of an image cannot be foreseen"),
                // Too late to be of use, or nobody wants it any more.
                Some(Err(_)) | None => {}
            }
        });
    }
}

/// Serves until told to stop; then takes the socket away, so that nobody new comes, and waits for those that are there, but not
/// for ever: containerd keeps its connection open, and calls that wait on it are finished by their own tasks.
async fn serve_then_drain(
    serving: impl Future<Output = Result<(), ServeError>>,
    bound: &Bound,
    stop: CancellationToken,
) -> Result<(), DaemonError> {
    tokio::pin!(serving);
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        served = &mut serving => {
            bound.unlink();
            return Ok(served?);
        }
    }
    notify(sd_notify::NotifyState::Stopping);
    tracing::info!("stopping: finishing the calls that have begun");
    bound.unlink();
    match tokio::time::timeout(DRAIN, serving).await {
        Ok(served) => Ok(served?),
        Err(_) => {
            tracing::warn!(after = ?DRAIN, "some connections did not end; closing them");
            Ok(())
        }
    }
}

fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "cannot tell systemd");
    }
}

/// The storage of a root with its records. What of the two can be tried without the other comes first.
async fn open_driver(config: &Config) -> Result<(Arc<dyn Driver>, Arc<MetaStore>), DaemonError> {
    let open = || MetaStore::open(&config.root, config.driver.as_str()).map(Arc::new);
    match config.driver {
        DriverKind::Overlayfs => {
            let mount_options = probe::overlay_options(&config.root, &config.overlayfs.mount_options)?;
            let driver = Overlay::open(&config.root, OverlayOptions { mount_options })?;
            Ok((Arc::new(driver), open()?))
        }
        DriverKind::Thin => {
            let meta = open()?;
            Ok((thin::open(config, &meta).await?, meta))
        }
    }
}

fn policy(config: &Config) -> Policy {
    Policy {
        sharing: match config.layers.share {
            LayerSharing::Isolated => Sharing::Isolated,
            LayerSharing::Node => Sharing::Node,
        },
        upperdir_label: match config.overlayfs.upperdir_label {
            true => UpperdirLabel::Shown,
            false => UpperdirLabel::Hidden,
        },
        cleanup_limit: config.cleanup.time_limit.duration(),
        lookup_deadline: config.fetch.deadline.duration(),
        room: Room { budget: config.layers.budget.bytes(), floor: config.layers.keep_free.number() },
    }
}

fn about(config: &Config, composed: &remote::Composed) -> About {
    let root = config.root.clone();
    let publish_policy = match (&composed.remote.content, config.driver) {
        (Some(_), DriverKind::Overlayfs) => config.publish.policy.as_str(),
        _ => "none",
    };
    About {
        node: host::name(),
        root: config.root.display().to_string(),
        layer_images: composed.layer_images.clone(),
        lazy: composed.lazy.clone(),
        traces: composed.traces,
        publish_policy: publish_policy.to_owned(),
        store: Box::new(remote::store_state(config, composed)),
        mirror: Box::new(|| None),
        pools: Box::new(Vec::new),
        free_bytes: Box::new(move || space::free_bytes(&root).unwrap_or(0)),
    }
}

/// The root directory, ours alone.
#[derive(Debug)]
enum Root {
    Locked(#[expect(dead_code, reason = "held for its lock")] FileLock),
    /// A predecessor was killed and has not let go of it yet.
    Dying(PathBuf),
}

impl Root {
    fn open(config: &Config) -> Result<Root, DaemonError> {
        let root = config.root.as_path();
        // Before anything there is asked for.
        circular::refuse(&[("the root", root), ("the keeper's socket", &config.keeper)])??;
        let refused = |source| DaemonError::Root { root: root.to_owned(), source };
        // 0700: layers hold setuid files of strangers, which no local user may reach by path.
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(refused)?;
        if !metastore::is_present(root)? {
            require_unoccupied(root)?;
        }
        let lock = root.join("lock");
        match FileLock::try_exclusive(&lock).map_err(refused)? {
            Some(lock) => Ok(Root::taken(lock, root)),
            None if lock::holder_is_dying(&lock).unwrap_or(false) => Ok(Root::Dying(root.to_owned())),
            None => Err(DaemonError::RootInUse(root.to_owned())),
        }
    }

    fn taken(lock: FileLock, root: &Path) -> Root {
        probe::clear_leftovers(root);
        Root::Locked(lock)
    }

    /// Waits for a predecessor that was killed: what it may wait for is served by now.
    async fn locked(self) -> Result<Root, DaemonError> {
        let Root::Dying(root) = &self else { return Ok(self) };
        let refused = |source| DaemonError::Root { root: root.clone(), source };
        for _ in 0..DYING_TRIES {
            if let Some(lock) = FileLock::try_exclusive(&root.join("lock")).map_err(refused)? {
                return Ok(Root::taken(lock, root));
            }
            tokio::time::sleep(DYING_PAUSE).await;
        }
        Err(DaemonError::RootInUse(root.clone()))
    }
}

/// A root without records must hold nothing but what a start that was cut short may leave.
fn require_unoccupied(root: &Path) -> Result<(), DaemonError> {
    let refused = |source| DaemonError::Root { root: root.to_owned(), source };
    for entry in std::fs::read_dir(root).map_err(refused)? {
        let name = entry.map_err(refused)?.file_name();
        let ours = name == "lock"
            || name == "lost+found"
            || name == metastore::RESERVE
            || starts_with(&name, KEY_FILE)
            || (name == "layer" && is_empty_dir(&root.join("layer")))
            || starts_with(&name, "metadata.db.new")
            || probe::is_leftover(&name.to_string_lossy())
            || (name == "l" && is_empty_dir(&root.join("l")));
        if !ours {
            let found = name.to_string_lossy().into_owned();
            return Err(DaemonError::RootOccupied { root: root.to_owned(), found });
        }
    }
    Ok(())
}

fn starts_with(name: &OsStr, prefix: &str) -> bool {
    name.as_encoded_bytes().starts_with(prefix.as_bytes())
}

fn is_empty_dir(path: &Path) -> bool {
    std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}
