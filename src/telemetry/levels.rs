//! What is read when metrics are asked for: how things stand, and what others count.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

/// A number for each value of a label.
type Parts = Vec<(&'static str, u64)>;

/// What is asked for when metrics are read.
#[derive(Debug, Clone, Default)]
pub struct Levels {
    /// Each root that is served, the main one first.
    pub roots: Vec<RootLevels>,
    /// Layer images of this node.
    pub layers: LayerLevels,
    /// What is known of starts of images.
    pub traces: TraceLevels,
    /// What is put on the store.
    pub publish: PublishLevels,
    /// The store, if there is one.
    pub store: Option<StoreLevels>,
    /// Requests on the registry port, by what came of them; none without that port.
    pub registry: Parts,
}

/// A root: its snapshots, and what they stand on.
#[derive(Debug, Clone, Default)]
pub struct RootLevels {
    /// Under which snapshotter's name it is served; none for the main one, whose metrics have no such label.
    pub snapshotter: Option<String>,
    /// Views, active and committed snapshots.
    pub snapshots: Parts,
    /// Ids made ahead.
    pub pending_ids: u64,
    /// Removed snapshots whose storage is not freed yet.
    pub pending_removals: u64,
    /// Bytes of all committed snapshots measured so far.
    pub committed_bytes: u64,
    /// Bytes of the metadata file and its log.
    pub metadata_bytes: u64,
    /// Bytes free on the file system that holds the root.
    pub free_bytes: u64,
    /// Where the snapshots' blocks are from, if they are volumes.
    pub pool: Option<PoolLevels>,
}

/// A pool of volumes.
#[derive(Debug, Clone, Default)]
pub struct PoolLevels {
    /// What is free of its devices, in percent.
    pub free: Parts,
    /// Whether something is wrong with it.
    pub in_trouble: bool,
}

/// Layer images of this node.
#[derive(Debug, Clone, Default)]
pub struct LayerLevels {
    /// How many, by state.
    pub states: Parts,
    /// Those that no snapshot uses.
    pub unclaimed: u64,
    /// Those that are mounted.
    pub attached: u64,
    /// Those of them that are read through this process.
    pub lazy: u64,
    /// Reads of these, by outcome.
    pub lazy_reads: Parts,
    /// Bytes they were answered with.
    pub lazy_bytes: u64,
    /// Requests that an earlier process had taken and not answered.
    pub taken_over: u64,
    /// What their files take.
    pub bytes: u64,
    /// Fills that ended, by outcome.
    pub fills: Parts,
    /// Plain bytes that were filled in, by where they came from.
    pub filled_bytes: Parts,
    /// Prepares that asked the store for a layer, by what came of it.
    pub lookups: Parts,
    /// How many of these layers had been looked up before they were asked for.
    pub foreseen: u64,
    /// What they may take; 0 for no limit.
    pub limit: u64,
    /// Bytes that were punched out of them.
    pub punched: u64,
    /// Complete ones that were made incomplete.
    pub demotions: u64,
    /// Bytes that were checked again.
    pub scrubbed: u64,
    /// Chunks that were found damaged, and those that were repaired.
    pub scrub_chunks: Parts,
}

/// What is known of starts of images.
#[derive(Debug, Clone, Default)]
pub struct TraceLevels {
    /// Traces, by what was done with them.
    pub traces: Parts,
    /// Chunks fetched because of them.
    pub prefetched: u64,
    /// Plain bytes of these.
    pub bytes: u64,
    /// Chunks of traces whose images were started, by whether they were read.
    pub chunks: Parts,
}

/// What is put on the store.
#[derive(Debug, Clone, Default)]
pub struct PublishLevels {
    /// Entries of the queue, by state.
    pub queue: Parts,
    /// Layers published.
    pub layers: u64,
    /// Names of images written.
    pub names: u64,
    /// Plain bytes of the layers.
    pub bytes: u64,
    /// Bytes uploaded for them.
    pub uploaded: u64,
    /// Attempts that failed.
    pub failures: u64,
    /// Uses of images to be noted, by what came of it.
    pub uses: Parts,
}

/// What has happened on the store.
#[derive(Debug, Clone, Default)]
pub struct StoreLevels {
    /// How long requests took.
    pub requests: Vec<Timing>,
    /// Requests made again after a failure.
    pub retries: u64,
    /// Second requests for what was slow, by whether they were answered first.
    pub hedges: Parts,
    /// Calls that came to nothing without the store's answer, by reason.
    pub failed_calls: Parts,
    /// Whether the store is left alone at the moment, for not answering.
    pub resting: bool,
    /// How often that began.
    pub rests: u64,
    /// Bytes of objects that arrived whole.
    pub read_bytes: u64,
    /// Bytes of objects that were written.
    pub written_bytes: u64,
    /// What the last check of the whole store found, by what was wrong.
    pub scrub_found: Parts,
    /// Bytes that were read for these checks.
    pub scrubbed: u64,
    /// How many came to their end.
    pub scrub_rounds: u64,
    /// When the last one did, seconds since 1970 UTC; 0 for never.
    pub scrub_ended: u64,
}

/// How long what was done took.
#[derive(Debug, Clone, Default)]
pub struct Timing {
    /// What was asked of the store.
    pub operation: &'static str,
    /// How it ended.
    pub outcome: &'static str,
    /// In seconds, all together.
    pub seconds: f64,
    /// Upper bounds in seconds, each with how many took no longer and longer than the bound before. The last has no bound.
    pub counts: Vec<(f64, u64)>,
}

/// Reads the levels whenever metrics are read.
pub(super) struct LevelCollector<F>(pub(super) F);

impl<F> fmt::Debug for LevelCollector<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LevelCollector")
    }
}

impl<F: Fn() -> Levels + Send + Sync + 'static> Collector for LevelCollector<F> {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let levels = (self.0)();
        let mut page = Page(encoder);
        page.roots(&levels.roots)?;
        page.layers(&levels.layers)?;
        page.traces(&levels.traces)?;
        page.publish(&levels.publish)?;
        if !levels.registry.is_empty() {
            let help = "Requests for images on the registry port, by what came of them";
            page.counters("registry_requests", help, None, "outcome", &levels.registry)?;
        }
        match &levels.store {
            Some(store) => page.store(store),
            None => Ok(()),
        }
    }
}

struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn roots(&mut self, roots: &[RootLevels]) -> fmt::Result {
        self.root_parts("snapshots", "Snapshots, by kind", "kind", roots, |root| &root.snapshots)?;
        self.root_gauge("pending_ids", "Storage made ahead of its use", None, roots, |root| {
            root.pending_ids
        })?;
        let removals = "Removed snapshots whose storage is not freed yet";
        self.root_gauge("pending_removals", removals, None, roots, |root| root.pending_removals)?;
        let bytes = Some(Unit::Bytes);
        let committed = "Allocated by committed snapshots, as far as measured";
        self.root_gauge("committed", committed, bytes.as_ref(), roots, |root| root.committed_bytes)?;
        let metadata = "Size of the metadata file and its log";
        self.root_gauge("metadata", metadata, bytes.as_ref(), roots, |root| root.metadata_bytes)?;
        let free = "Free on the file system of the root";
        self.root_gauge("root_free", free, bytes.as_ref(), roots, |root| root.free_bytes)?;
        let pools: Vec<RootLevels> = roots.iter().filter(|root| root.pool.is_some()).cloned().collect();
        if pools.is_empty() {
            return Ok(());
        }
        let free = "Free of the devices of a pool of volumes, in percent";
        self.root_parts("pool_free_percent", free, "device", &pools, |root| match &root.pool {
            Some(pool) => &pool.free,
            None => &[],
        })?;
        let trouble = "Whether something is wrong with a pool of volumes: `speedy check` says what";
        let in_trouble =
            |root: &RootLevels| u64::from(root.pool.as_ref().is_some_and(|pool| pool.in_trouble));
        self.root_gauge("pool_trouble", trouble, None, &pools, in_trouble)
    }

    /// A number for each root.
    fn root_gauge(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        roots: &[RootLevels],
        value: impl Fn(&RootLevels) -> u64,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        let named = |root: &&RootLevels| root.snapshotter.is_some();
        for root in roots.iter().filter(named) {
            let label = [("snapshotter", root.snapshotter.as_deref().unwrap_or_default())];
            ConstGauge::new(value(root)).encode(family.encode_family(&label)?)?;
        }
        match roots.iter().find(|root| !named(root)) {
            Some(main) => ConstGauge::new(value(main)).encode(family),
            None => Ok(()),
        }
    }

    /// A number for each root and each value of a label.
    fn root_parts(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        roots: &[RootLevels],
        parts: impl Fn(&RootLevels) -> &[(&'static str, u64)],
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for root in roots {
            for (part, value) in parts(root) {
                let mut labels = vec![(label, *part)];
                labels.extend(root.snapshotter.as_deref().map(|name| ("snapshotter", name)));
                ConstGauge::new(*value).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn layers(&mut self, layers: &LayerLevels) -> fmt::Result {
        self.gauges("layers", "Layer images on this node, by state", "state", &layers.states)?;
        self.gauge("layers_unclaimed", "Layer images that no snapshot uses", None, layers.unclaimed)?;
        self.gauge("layers_attached", "Layer images that are mounted", None, layers.attached)?;
        self.gauge("layers_lazy", "Layer images that are read through this process", None, layers.lazy)?;
        self.counters(
            "lazy_reads",
            "Reads of layer images that are not all here, by outcome",
            None,
            "outcome",
            &layers.lazy_reads,
        )?;
        self.counter("lazy_read", "Answered to these reads", Some(&Unit::Bytes), layers.lazy_bytes)?;
        let taken_over = "Reads that an earlier process had taken and not answered";
        self.counter("lazy_taken_over", taken_over, None, layers.taken_over)?;
        self.gauge("layers", "Allocated by layer images", Some(&Unit::Bytes), layers.bytes)?;
        self.counters("fills", "Layer images filled, by outcome", None, "outcome", &layers.fills)?;
        let filled = "Plain bytes of layer images, by where they came from";
        self.counters("filled", filled, Some(&Unit::Bytes), "source", &layers.filled_bytes)?;
        let lookups = "Layers that the store was asked for in a Prepare, by what came of it";
        self.counters("remote_lookups", lookups, None, "outcome", &layers.lookups)?;
        let foreseen = "Layers of these that had been looked up before they were asked for";
        self.counter("remote_lookups_foreseen", foreseen, None, layers.foreseen)?;
        self.disk(layers)
    }

    fn disk(&mut self, layers: &LayerLevels) -> fmt::Result {
        let bytes = Some(Unit::Bytes);
        self.gauge(
            "layers_limit",
            "What layer images may take, 0 for no limit",
            bytes.as_ref(),
            layers.limit,
        )?;
        let punched = "Given up of layer images that are not all here, for want of room";
        self.counter("punched", punched, bytes.as_ref(), layers.punched)?;
        let demotions =
            "Complete layer images made incomplete, for want of room or because they were damaged";
        self.counter("demotions", demotions, None, layers.demotions)?;
        let scrubbed = "Read again of complete layer images and checked";
        self.counter("scrubbed", scrubbed, bytes.as_ref(), layers.scrubbed)?;
        let chunks = "Chunks that the disk had changed, and those of them that were fetched again";
        self.counters("scrub_chunks", chunks, None, "outcome", &layers.scrub_chunks)
    }

    fn traces(&mut self, traces: &TraceLevels) -> fmt::Result {
        let help = "Traces of starts of images, by what was done with them";
        self.counters("traces", help, None, "outcome", &traces.traces)?;
        let prefetched = "Chunks fetched because a trace has them, before anybody asked";
        self.counter("trace_prefetched_chunks", prefetched, None, traces.prefetched)?;
        self.counter("trace_prefetched", "Their plain bytes", Some(&Unit::Bytes), traces.bytes)?;
        let chunks =
            "Chunks of traces whose images were started, by whether they were read, as far as that was seen";
        self.counters("trace_chunks", chunks, None, "read", &traces.chunks)
    }

    fn publish(&mut self, publish: &PublishLevels) -> fmt::Result {
        let queue = "Layers and image names to be published, and layers that were given up";
        self.gauges("publish_queue", queue, "state", &publish.queue)?;
        let bytes = Some(Unit::Bytes);
        self.counter("published_layers", "Layers published", None, publish.layers)?;
        self.counter("published_images", "Names of images published", None, publish.names)?;
        self.counter("published", "Plain bytes of published layers", bytes.as_ref(), publish.bytes)?;
        let uploaded = "Bytes uploaded for published layers, compressed, without what the store had";
        self.counter("uploaded", uploaded, bytes.as_ref(), publish.uploaded)?;
        let failures = "Attempts to publish a layer or the name of an image that failed";
        self.counter("publish_failures", failures, None, publish.failures)?;
        let uses = "Uses of images to be noted on the store, by what came of it";
        self.counters("image_uses", uses, None, "outcome", &publish.uses)
    }

    fn store(&mut self, store: &StoreLevels) -> fmt::Result {
        let help = "Time of a request to the store, by what was asked and how it ended";
        let unit = Unit::Seconds;
        let name = "store_request_duration";
        let mut family = self.0.encode_descriptor(name, help, Some(&unit), MetricType::Histogram)?;
        for Timing { operation, outcome, seconds, counts } in &store.requests {
            let labels = [("operation", *operation), ("outcome", *outcome)];
            let count = counts.iter().map(|(_, count)| count).sum();
            let mut metric = family.encode_family(&labels)?;
            metric.encode_histogram::<NoLabelSet>(*seconds, count, counts, None)?;
        }
        self.counter("store_retries", "Requests made again after a failure", None, store.retries)?;
        let hedges = "Second requests for what was slow, by whether they were answered first";
        self.counters("store_hedges", hedges, None, "outcome", &store.hedges)?;
        let failed = "Calls that came to nothing without an answer of the store, by reason";
        self.counters("store_failed_calls", failed, None, "reason", &store.failed_calls)?;
        let open = "Whether the store is left alone for a while because it did not answer";
        self.gauge("store_breaker_open", open, None, u64::from(store.resting))?;
        self.counter("store_breaker_opened", "How often that began", None, store.rests)?;
        let bytes = Some(Unit::Bytes);
        self.counter("store_read", "Bytes of objects read whole", bytes.as_ref(), store.read_bytes)?;
        self.counter("store_written", "Bytes of objects written", bytes.as_ref(), store.written_bytes)?;
        self.store_scrub(store)
    }

    fn store_scrub(&mut self, store: &StoreLevels) -> fmt::Result {
        let found = "Objects that the last check of the whole store found wrong, by what was wrong";
        self.gauges("store_scrub_found", found, "problem", &store.scrub_found)?;
        let bytes = Some(Unit::Bytes);
        self.counter("store_scrubbed", "Read to check the whole store", bytes.as_ref(), store.scrubbed)?;
        self.counter("store_scrub_rounds", "Checks of the whole store", None, store.scrub_rounds)?;
        let ended = "When the last check of the whole store ended, since 1970 UTC; 0 for never";
        self.gauge("store_scrub_ended", ended, Some(&Unit::Seconds), store.scrub_ended)
    }

    fn gauge(&mut self, name: &str, help: &str, unit: Option<&Unit>, value: u64) -> fmt::Result {
        ConstGauge::new(value).encode(self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?)
    }

    fn gauges(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        values: &[(&'static str, u64)],
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (part, value) in values {
            ConstGauge::new(*value).encode(family.encode_family(&[(label, *part)])?)?;
        }
        Ok(())
    }

    fn counter(&mut self, name: &str, help: &str, unit: Option<&Unit>, value: u64) -> fmt::Result {
        ConstCounter::new(value).encode(self.0.encode_descriptor(name, help, unit, MetricType::Counter)?)
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        label: &'static str,
        values: &[(&'static str, u64)],
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Counter)?;
        for (part, value) in values {
            ConstCounter::new(*value).encode(family.encode_family(&[(label, *part)])?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use super::*;
    use crate::telemetry::{Method, Metrics};

    fn levels() -> Levels {
        let timing = Timing {
            operation: "get",
            outcome: "ok",
            seconds: 2.5,
            counts: vec![(0.1, 3), (1.0, 0), (f64::INFINITY, 2)],
        };
        let store = StoreLevels {
            requests: vec![timing],
            retries: 1,
            hedges: vec![("won", 1), ("lost", 2)],
            failed_calls: vec![("unreachable", 3), ("resting", 4)],
            resting: true,
            rests: 5,
            read_bytes: 6,
            written_bytes: 7,
            scrub_found: vec![("missing", 1), ("damaged", 8)],
            ..StoreLevels::default()
        };
        let main = RootLevels {
            snapshots: vec![("view", 1), ("active", 2), ("committed", 3)],
            pending_removals: 4,
            ..RootLevels::default()
        };
        let pool = PoolLevels { free: vec![("data", 30), ("metadata", 70)], in_trouble: true };
        let volumes = RootLevels {
            snapshotter: Some("speedy-thin".into()),
            snapshots: vec![("active", 5)],
            pending_removals: 6,
            pool: Some(pool),
            ..RootLevels::default()
        };
        Levels {
            roots: vec![main, volumes],
            layers: LayerLevels {
                states: vec![("complete", 4), ("filling", 1), ("failed", 0)],
                bytes: 4096,
                fills: vec![("done", 2), ("failed", 1)],
                filled_bytes: vec![("store", 100), ("node", 50)],
                lookups: vec![("hit", 2), ("missing", 9)],
                foreseen: 7,
                punched: 77,
                scrub_chunks: vec![("damaged", 3), ("repaired", 2)],
                ..LayerLevels::default()
            },
            publish: PublishLevels {
                queue: vec![("pending", 8), ("dropped", 1)],
                ..PublishLevels::default()
            },
            store: Some(store),
            ..Levels::default()
        }
    }

    /// The samples of a page, after what the text format demands of it was checked.
    fn parse(page: &str) -> BTreeMap<String, f64> {
        let (mut types, mut samples) = (BTreeMap::new(), BTreeMap::new());
        let mut described = HashSet::new();
        assert_eq!(page.lines().last(), Some("# EOF"));
        for line in page.lines().filter(|line| *line != "# EOF") {
            if let Some(comment) = line.strip_prefix("# ") {
                let (kind, rest) = comment.split_once(' ').unwrap();
                let (name, text) = rest.split_once(' ').unwrap();
                assert!(name.starts_with("speedy_"), "{line}");
                match kind {
                    "HELP" => assert!(described.insert(name.to_owned()), "twice: {line}"),
                    "TYPE" => assert!(types.insert(name.to_owned(), text.to_owned()).is_none(), "{line}"),
                    _ => assert!(kind == "UNIT" && name.ends_with(&format!("_{text}")), "{line}"),
                }
                continue;
            }
            let (name, value) = line.rsplit_once(' ').unwrap();
            let family = name.split('{').next().unwrap();
            let is_of = |(name, kind): (&String, &String)| match kind.as_str() {
                "counter" => family == format!("{name}_total"),
                "histogram" => {
                    ["_sum", "_count", "_bucket"].iter().any(|end| family == format!("{name}{end}"))
                }
                _ => family == name,
            };
            assert!(types.iter().any(is_of), "{line} belongs to nothing that was described");
            assert!(samples.insert(name.to_owned(), value.parse().unwrap()).is_none(), "twice: {line}");
        }
        samples
    }

    #[test]
    fn the_page_says_what_an_operator_needs() {
        let metrics = Metrics::new(levels);
        metrics.rpc(Method::Prepare, "OK", std::time::Duration::from_millis(3));
        metrics.applied("image");
        let samples = parse(&metrics.text());
        let want = [
            ("speedy_snapshots{kind=\"active\"}", 2.0),
            ("speedy_snapshots{kind=\"active\",snapshotter=\"speedy-thin\"}", 5.0),
            ("speedy_pending_removals", 4.0),
            ("speedy_pending_removals{snapshotter=\"speedy-thin\"}", 6.0),
            ("speedy_pool_free_percent{device=\"data\",snapshotter=\"speedy-thin\"}", 30.0),
            ("speedy_pool_trouble{snapshotter=\"speedy-thin\"}", 1.0),
            ("speedy_layers{state=\"complete\"}", 4.0),
            ("speedy_layers_bytes", 4096.0),
            ("speedy_fills_total{outcome=\"done\"}", 2.0),
            ("speedy_filled_bytes_total{source=\"node\"}", 50.0),
            ("speedy_remote_lookups_total{outcome=\"missing\"}", 9.0),
            ("speedy_remote_lookups_foreseen_total", 7.0),
            ("speedy_punched_bytes_total", 77.0),
            ("speedy_scrub_chunks_total{outcome=\"repaired\"}", 2.0),
            ("speedy_publish_queue{state=\"pending\"}", 8.0),
            ("speedy_published_layers_total", 0.0),
            ("speedy_uploaded_bytes_total", 0.0),
            ("speedy_publish_failures_total", 0.0),
            ("speedy_store_request_duration_seconds_count{operation=\"get\",outcome=\"ok\"}", 5.0),
            ("speedy_store_request_duration_seconds_sum{operation=\"get\",outcome=\"ok\"}", 2.5),
            (
                "speedy_store_request_duration_seconds_bucket{le=\"1.0\",operation=\"get\",outcome=\"ok\"}",
                3.0,
            ),
            (
                "speedy_store_request_duration_seconds_bucket{le=\"+Inf\",operation=\"get\",outcome=\"ok\"}",
                5.0,
            ),
            ("speedy_store_retries_total", 1.0),
            ("speedy_store_hedges_total{outcome=\"won\"}", 1.0),
            ("speedy_store_failed_calls_total{reason=\"resting\"}", 4.0),
            ("speedy_store_breaker_open", 1.0),
            ("speedy_store_breaker_opened_total", 5.0),
            ("speedy_store_written_bytes_total", 7.0),
            ("speedy_store_scrub_found{problem=\"damaged\"}", 8.0),
            ("speedy_store_scrub_rounds_total", 0.0),
            ("speedy_rpc_calls_total{method=\"Prepare\",code=\"OK\"}", 1.0),
            ("speedy_diff_applies_total{how=\"image\"}", 1.0),
        ];
        for (name, value) in want {
            assert_eq!(samples.get(name), Some(&value), "{name} in\n{}", metrics.text());
        }
    }

    #[test]
    fn without_a_store_nothing_is_said_of_one() {
        let samples = parse(&Metrics::new(Levels::default).text());
        let is_of_one =
            |name: &&String| name.starts_with("speedy_store_") || name.starts_with("speedy_pool_");
        assert!(!samples.keys().any(|name| is_of_one(&name)), "{samples:?}");
    }
}
