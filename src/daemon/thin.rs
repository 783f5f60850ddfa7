//! The driver of thin devices: opened for the main root, or with a root of its own beside another driver, on the same socket.

use std::path::PathBuf;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::levels::ServedRoot;
use super::{DaemonError, Root};
use crate::config::{Config, DriverKind};
use crate::content::ContentStore;
use crate::driver::Driver;
use crate::snapshot::metastore::MetaStore;
use crate::snapshot::snapshotter::{Policy, Snapshotter};

/// The storage below `config.root`.
#[cfg(feature = "devicemapper")]
pub(super) async fn open(config: &Config, meta: &Arc<MetaStore>) -> Result<Arc<dyn Driver>, DaemonError> {
    use crate::config::{FileSystem, PoolMode};
    use crate::driver::thin::{Devices, Kind, PoolOptions, Thin, ThinOptions};

    // Devices have names for the whole machine; a root may be a path in another mount namespace.
    let random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), &config.root);
    let tag = meta.property(TAG, format!("{:08x}", random >> 32)).await.map_err(DaemonError::Recover)?;
    let fs = config.thin.fs.as_str();
    let found = meta.property("thin.fs", fs.to_owned()).await.map_err(DaemonError::Recover)?;
    if found != fs {
        return Err(DaemonError::Settings(format!(
            "the snapshots of {} are {found}, not {fs}: set thin.fs = \"{found}\", or choose another root",
            config.root.display()
        )));
    }
    let pool = &config.pool;
    let devices = match pool.mode {
        PoolMode::Loop => Devices::Loop { bytes: pool.size.bytes() },
        PoolMode::Direct if pool.data.as_os_str().is_empty() || pool.metadata.as_os_str().is_empty() => {
            return Err(DaemonError::Settings(
                "pool.mode is \"direct\": set pool.data and pool.metadata to two block devices that nobody else uses".into(),
            ));
        }
        PoolMode::Direct => Devices::Direct { data: pool.data.clone(), metadata: pool.metadata.clone() },
    };
    let options = ThinOptions {
        tag,
        kind: match config.thin.fs {
            FileSystem::Ext4 => Kind::Ext4,
            FileSystem::Xfs => Kind::Xfs,
        },
        size: config.thin.size.bytes(),
        mount_options: config.thin.mount_options.clone(),
        discard: config.thin.discard,
        pool: PoolOptions { devices, reserve: pool.reserve.number() },
    };
    let root = config.root.clone();
    let opened = tokio::task::spawn_blocking(move || Thin::open(&root, options));
    Ok(Arc::new(opened.await.map_err(std::io::Error::other)??))
}

/// The storage below `config.root`.
#[cfg(not(feature = "devicemapper"))]
pub(super) async fn open(_config: &Config, _meta: &Arc<MetaStore>) -> Result<Arc<dyn Driver>, DaemonError> {
    Err(DaemonError::Settings("this build has no devicemapper driver (cargo feature devicemapper)".into()))
}

/// What of a root's records tells its devices from those of other roots.
#[cfg(feature = "devicemapper")]
const TAG: &str = "thin.tag";

/// A second snapshotter, of thin devices.
pub(super) struct Beside {
    name: String,
    path: PathBuf,
    snapshotter: Arc<Snapshotter>,
    meta: Arc<MetaStore>,
    _root: Root,
}

/// All roots that are served, the main one first.
pub(super) fn roots(
    config: &Config,
    snapshotter: &Arc<Snapshotter>,
    meta: &Arc<MetaStore>,
    beside: Option<&Beside>,
) -> Vec<ServedRoot> {
    let (snapshotter, meta) = (Arc::clone(snapshotter), Arc::clone(meta));
    let main = ServedRoot { name: None, path: config.root.clone(), snapshotter, meta };
    let second = beside.map(|beside| ServedRoot {
        name: Some(beside.name.clone()),
        path: beside.path.clone(),
        snapshotter: Arc::clone(&beside.snapshotter),
        meta: Arc::clone(&beside.meta),
    });
    std::iter::once(main).chain(second).collect()
}

/// Opens what `thin.root` names, if it names something.
pub(super) async fn open_beside(
    config: &Config,
    policy: Policy,
    content: Option<Arc<ContentStore>>,
) -> Result<Option<Beside>, DaemonError> {
    if config.thin.root.as_os_str().is_empty() {
        return Ok(None);
    }
    let (main, own) = (&config.root, &config.thin.root);
    if config.driver == DriverKind::Thin || main.starts_with(own) || own.starts_with(main) {
        return Err(DaemonError::Settings(format!(
            "thin.root is {}, of a driver of thin devices beside another driver: leave it empty when driver = \"thin\", and give it a \
             directory that is neither inside {} nor around it",
            own.display(),
            main.display()
        )));
    }
    let config = Config { root: own.clone(), driver: DriverKind::Thin, ..config.clone() };
    let root = Root::open(&config)?.locked().await?;
    let (driver, meta) = super::open_driver(&config).await?;
    let applier = super::remote::applier(&config, &meta, &driver, None);
    let remote = super::remote::for_volumes(&config.root, &meta, content)?;
    let snapshotter = Snapshotter::new(Arc::clone(&meta), driver, applier, remote, policy);
    let snapshotter = Arc::new(snapshotter);
    snapshotter.start().await.map_err(DaemonError::Recover)?;
    tracing::info!(root = %own.display(), name = config.thin.name, "thin devices beside the main driver");
    let (name, path) = (config.thin.name.clone(), config.root.clone());
    Ok(Some(Beside { name, path, snapshotter, meta, _root: root }))
}

impl Beside {
    /// It hears of what happens in containerd as well.
    pub(super) fn snapshotter(&self) -> Arc<Snapshotter> {
        Arc::clone(&self.snapshotter)
    }

    /// Its work in the background begins; what is served, under its name.
    pub(super) fn serve(
        &self,
        background: &TaskTracker,
        stop: &CancellationToken,
    ) -> (String, Arc<Snapshotter>) {
        let (work, stop) = (Arc::clone(&self.snapshotter), stop.clone());
        background.spawn(async move { work.run(stop).await });
        (self.name.clone(), Arc::clone(&self.snapshotter))
    }
}

/// Closes the records; to be called when nothing is served any more. The roots are free afterwards.
pub(super) async fn close(meta: Arc<MetaStore>, beside: Option<Beside>) -> Result<(), DaemonError> {
    for meta in std::iter::once(meta).chain(beside.as_ref().map(|beside| Arc::clone(&beside.meta))) {
        tokio::task::spawn_blocking(move || meta.close()).await.map_err(std::io::Error::other)?;
    }
    Ok(())
}
