//! What several tests need.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use speedy::content::memory::MemorySource;
use speedy::driver::Driver;
use speedy::image::Limits;
use speedy::snapshot::apply::Applier;
use speedy::snapshot::metastore::MetaStore;
use speedy::snapshot::reconcile::Room;
use speedy::snapshot::snapshotter::{Policy, Remote, Sharing, Snapshotter, UpperdirLabel};
use speedy::snapshot::{Key, Labels};
use tokio_util::sync::CancellationToken;

pub(crate) const POLICY: Policy = Policy {
    sharing: Sharing::Isolated,
    upperdir_label: UpperdirLabel::Hidden,
    cleanup_limit: Duration::from_secs(20),
    lookup_deadline: Duration::from_secs(5),
    room: Room { budget: 0, floor: 0 },
};

pub(crate) fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

pub(crate) fn no_labels() -> Labels {
    Labels::new()
}

pub(crate) fn labels(entries: &[(&str, &str)]) -> Labels {
    entries.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A snapshotter that runs, background work included, until it is stopped.
pub(crate) struct Running {
    pub(crate) snapshotter: Arc<Snapshotter>,
    pub(crate) meta: Arc<MetaStore>,
    stop: CancellationToken,
    work: tokio::task::JoinHandle<()>,
}

impl Running {
    pub(crate) async fn start(root: &Path, driver: Arc<dyn Driver>, policy: Policy, store: &str) -> Running {
        let meta = Arc::new(MetaStore::open(root, "test").unwrap());
        let source = MemorySource::open(store).unwrap();
        let applier = Applier::new(Arc::clone(&meta), Arc::clone(&driver), None, Limits::default(), root);
        let remote = Remote { source, ..Remote::default() };
        let snapshotter = Arc::new(Snapshotter::new(Arc::clone(&meta), driver, applier, remote, policy));
        snapshotter.start().await.unwrap();
        let stop = CancellationToken::new();
        let (worker, token) = (Arc::clone(&snapshotter), stop.clone());
        #[expect(clippy::disallowed_methods, reason = "stop() waits for it")]
        let work = tokio::spawn(async move { worker.run(token).await });
        Running { snapshotter, meta, stop, work }
    }

    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.work.await.unwrap();
        self.meta.close();
    }
}
