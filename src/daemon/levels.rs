//! What the metrics show of how things stand, gathered from those who know.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::store_scrub::StoreScrubber;
use crate::driver::PoolHealth;
use crate::object::{BOUNDS, Objects};
use crate::registry::{Mirror, MirrorCounts};
use crate::snapshot::metastore::MetaStore;
use crate::snapshot::report::PoolState;
use crate::snapshot::snapshotter::Snapshotter;
use crate::sys::space;
use crate::telemetry::{
    LayerLevels, Levels, PoolLevels, PublishLevels, RootLevels, StoreLevels, Timing, TraceLevels,
};

/// A root that is served.
#[derive(Clone)]
pub(super) struct ServedRoot {
    /// Under which snapshotter's name; none for the main one.
    pub(super) name: Option<String>,
    pub(super) path: PathBuf,
    pub(super) snapshotter: Arc<Snapshotter>,
    pub(super) meta: Arc<MetaStore>,
}

/// Gathers it whenever that is called, on a thread that may block. Only the main root has layer images and publishes.
pub(super) fn read(
    main: &Arc<Snapshotter>,
    roots: Vec<ServedRoot>,
    store_and_scrub: Option<(Objects, Option<Arc<StoreScrubber>>)>,
    mirror: Option<Arc<Mirror>>,
) -> impl Fn() -> Levels + Send + Sync + 'static {
    let main = Arc::clone(main);
    move || Levels {
        roots: roots.iter().map(root).collect(),
        layers: layers(&main),
        traces: traces(&main),
        publish: publish(&main),
        store: store_and_scrub.as_ref().map(|(objects, scrubber)| store(objects, scrubber.as_deref())),
        registry: mirror.as_deref().map(registry).unwrap_or_default(),
    }
}

/// Those of these roots that are of volumes, as they are whenever that is called.
pub(super) fn pools(roots: Vec<ServedRoot>) -> Box<dyn Fn() -> Vec<PoolState> + Send + Sync> {
    let state = |root: &ServedRoot| {
        let PoolHealth { data_free, metadata_free, trouble } = root.snapshotter.pool()?;
        Some(PoolState {
            snapshotter: root.name.clone(),
            root: root.path.display().to_string(),
            snapshots: root.snapshotter.snapshot_numbers(),
            data_free,
            metadata_free,
            trouble,
        })
    };
    Box::new(move || roots.iter().filter_map(state).collect())
}

fn root(root: &ServedRoot) -> RootLevels {
    let (counts, meta) = (root.snapshotter.counts(), root.meta.path());
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
    RootLevels {
        snapshotter: root.name.clone(),
        snapshots: vec![
            ("view", number(counts.views)),
            ("active", number(counts.active)),
            ("committed", number(counts.committed)),
        ],
        pending_ids: number(counts.pending),
        pending_removals: number(counts.removing),
        committed_bytes: counts.committed_bytes,
        metadata_bytes: size(meta) + size(Path::new(&format!("{}-wal", meta.display()))),
        free_bytes: space::free_bytes(&root.path).unwrap_or(0),
        pool: root.snapshotter.pool().map(|pool| PoolLevels {
            free: vec![("data", pool.data_free), ("metadata", pool.metadata_free)],
            in_trouble: pool.trouble.is_some(),
        }),
    }
}

fn registry(mirror: &Mirror) -> Vec<(&'static str, u64)> {
    let MirrorCounts { served, absent, reachable, failed, malformed } = mirror.counts();
    vec![
        ("served", served),
        ("absent", absent),
        ("reachable", reachable),
        ("failed", failed),
        ("malformed", malformed),
    ]
}

fn layers(snapshotter: &Snapshotter) -> LayerLevels {
    let reports = snapshotter.layer_reports();
    let count = |state: &str| number(reports.iter().filter(|layer| layer.state == state).count());
    let fills = snapshotter.fill_counts();
    let (lazy, disk) = (snapshotter.lazy_counts(), snapshotter.disk_counts());
    LayerLevels {
        states: ["complete", "filling", "cold", "failed"].map(|state| (state, count(state))).to_vec(),
        unclaimed: number(reports.iter().filter(|layer| layer.snapshots == 0).count()),
        attached: number(reports.iter().filter(|layer| layer.attached).count()),
        lazy: number(reports.iter().filter(|layer| layer.lazy).count()),
        lazy_reads: vec![("ok", lazy.reads), ("failed", lazy.failed)],
        lazy_bytes: lazy.bytes,
        taken_over: lazy.taken_over,
        bytes: reports.iter().map(|layer| layer.bytes).sum(),
        fills: vec![("done", fills.done), ("failed", fills.failed)],
        filled_bytes: vec![("store", fills.fetched), ("node", fills.shared)],
        lookups: snapshotter.lookups(),
        foreseen: snapshotter.foreseen(),
        limit: disk.limit.unwrap_or(0),
        punched: disk.given_up,
        demotions: disk.demotions,
        scrubbed: disk.scrubbed,
        scrub_chunks: vec![("damaged", disk.damaged), ("repaired", disk.repaired)],
    }
}

fn traces(snapshotter: &Snapshotter) -> TraceLevels {
    let state = snapshotter.trace_state("");
    TraceLevels {
        traces: vec![
            ("read", state.read),
            ("passed_over", state.passed_over),
            ("written", state.written),
            ("failed", state.failed),
        ],
        prefetched: state.chunks,
        bytes: state.bytes,
        chunks: vec![("yes", state.used), ("no", state.expected.saturating_sub(state.used))],
    }
}

fn publish(snapshotter: &Snapshotter) -> PublishLevels {
    let state = snapshotter.publish_state("");
    PublishLevels {
        queue: vec![("pending", number(state.pending)), ("dropped", number(state.dropped))],
        layers: state.layers,
        names: state.names,
        bytes: state.bytes,
        uploaded: state.uploaded,
        failures: state.failures,
        uses: vec![("written", state.uses), ("failed", state.unnoted_uses)],
    }
}

fn store(objects: &Objects, scrubber: Option<&StoreScrubber>) -> StoreLevels {
    let stats = objects.stats();
    let scrub = scrubber.map(StoreScrubber::state).unwrap_or_default();
    let bounds = || BOUNDS.into_iter().chain([f64::INFINITY]);
    let requests = objects.attempts().into_iter().map(|attempts| Timing {
        operation: attempts.operation,
        outcome: attempts.outcome,
        seconds: attempts.seconds,
        counts: bounds().zip(attempts.counts).collect(),
    });
    StoreLevels {
        requests: requests.collect(),
        retries: stats.retries,
        hedges: vec![("won", stats.hedges_won), ("lost", stats.hedges.saturating_sub(stats.hedges_won))],
        failed_calls: vec![("unreachable", stats.unreachable), ("resting", stats.refused)],
        resting: stats.resting.is_some(),
        rests: stats.opened,
        read_bytes: stats.read,
        written_bytes: stats.written,
        scrub_found: vec![("missing", scrub.missing), ("damaged", scrub.damaged)],
        scrubbed: scrub.bytes,
        scrub_rounds: scrub.rounds,
        scrub_ended: scrub.ended.and_then(|at| u64::try_from(at).ok()).unwrap_or(0),
    }
}

fn number(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}
