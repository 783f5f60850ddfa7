//! Everything about layers that are not just unpacked: how they are mounted here, the store, what is published.

use std::path::Path;
use std::sync::Arc;

use super::DaemonError;
use super::keeping::{self, Keeping};
use super::store_scrub::StoreScrubber;
use crate::chunk::merged::Merged;
use crate::chunk::remote::Remote as RemoteChunks;
use crate::chunk::verified::Verified;
use crate::config::{Config, DriverKind, LazyMode, PublishPolicy, TraceMode, TrustMode};
use crate::containerd::blob::Blobs;
use crate::content::memory::MemorySource;
use crate::content::pattern::Pattern;
use crate::content::trust::{KEY_FILE, PublicKey, PublisherKey, Trust};
use crate::content::{self, ContentStore};
use crate::driver::Driver;
use crate::image::Limits;
use crate::layer::LayerStore;
use crate::layer::allowance::Allowance;
use crate::layer::attach::{AttachError, Attacher, Mode};
use crate::layer::fill::Supply;
use crate::layer::lazy::ColdLayers;
use crate::object::{Objects, Settings, StoreOptions, StoreStats};
use crate::snapshot::apply::Applier;
use crate::snapshot::layers::{Layers, Upkeep};
use crate::snapshot::metastore::MetaStore;
use crate::snapshot::pins::Pins;
use crate::snapshot::publish::Publisher;
use crate::snapshot::report::{StoreNumbers, StoreState};
use crate::snapshot::snapshotter::Remote;
use crate::snapshot::traces::Traces;

/// What was composed, and what can be said about it.
pub(super) struct Composed {
    pub(super) remote: Remote,
    /// How layer images are mounted here, or why they are not.
    pub(super) layer_images: String,
    /// Whether layers are read lazily here, or why not.
    pub(super) lazy: String,
    /// Whether starts are recorded here, or why not.
    pub(super) traces: &'static str,
    pub(super) objects: Option<Objects>,
    pub(super) keeping: Option<Arc<Keeping>>,
    pub(super) scrubber: Option<Arc<StoreScrubber>>,
}

/// The store, as far as it can be had before there are records.
#[derive(Debug)]
pub(super) struct Store {
    layers: Arc<LayerStore>,
    content: Option<(Arc<ContentStore>, Objects)>,
    cold: Option<Arc<ColdLayers>>,
    keeping: Option<Arc<Keeping>>,
}

/// Opens the store, and serves what containers may be waiting for.
pub(super) fn open_store(config: &Config) -> Result<Store, DaemonError> {
    let layers = Arc::new(LayerStore::at(&config.root));
    let is_store = !config.store.is_empty() && !config.store.as_str().starts_with("memory:");
    let opened = if is_store { Some(open_content(config)?) } else { None };
    let content = opened.map(|(content, objects)| (Arc::new(content), objects));
    let cold = content.as_ref().map(|(content, _)| cold_layers(&layers, content, config));
    let keeping = match (&cold, config.fetch.lazy, config.driver) {
        (Some(cold), LazyMode::Auto, DriverKind::Overlayfs) => keeping::open(config, cold).map(Arc::new),
        _ => None,
    };
    Ok(Store { layers, content, cold, keeping })
}

fn cold_layers(layers: &Arc<LayerStore>, content: &Arc<ContentStore>, config: &Config) -> Arc<ColdLayers> {
    let limit = Some(config.layers.limit.bytes()).filter(|limit| *limit > 0);
    let cold = ColdLayers::new(Supply::new(layers, content)).with_rate(config.fetch.rate.bytes());
    Arc::new(cold.with_allowance(Allowance::new(limit)))
}

/// What thin volumes below a root of their own are made of: layers of this store.
pub(super) fn for_volumes(
    root: &Path,
    meta: &Arc<MetaStore>,
    content: Option<Arc<ContentStore>>,
) -> Result<Remote, DaemonError> {
    let files = Arc::new(LayerStore::at(root));
    files.prepare(Attacher::untried(root))?;
    let cold = content.as_ref().map(|content| Arc::new(ColdLayers::new(Supply::new(&files, content))));
    let layers = Some(Arc::new(Layers::new(Arc::clone(meta), files, cold, None)));
    Ok(Remote { layers, content, ..Remote::default() })
}

/// Applies layers: they become images, or are written out into volumes.
pub(super) fn applier(
    config: &Config,
    meta: &Arc<MetaStore>,
    driver: &Arc<dyn Driver>,
    layers: Option<Arc<Layers>>,
) -> Applier {
    let images = layers.filter(|_| config.driver == DriverKind::Overlayfs);
    Applier::new(Arc::clone(meta), Arc::clone(driver), images, limits(config), &config.root)
}

/// Composes what `config` asks for.
pub(super) fn compose(
    config: &Config,
    meta: &Arc<MetaStore>,
    blobs: &Blobs,
    store: Store,
) -> Result<Composed, DaemonError> {
    if config.driver == DriverKind::Thin {
        return compose_for_volumes(config, meta, store);
    }
    let Store { layers: files, content, cold, keeping } = store;
    let (can_mount, layer_images) = prepare_layers(&config.root, &files)?;
    let source = trial_source(config)?;
    let (content, objects) = content.unzip();
    let lazy = keeping.as_ref().map(|keeping| Arc::clone(&keeping.lazy));
    let upkeep = Upkeep { scrub_rate: config.scrub.rate.bytes(), scrub_every: config.scrub.every.duration() };
    // The configuration has checked that each is a pattern.
    let patterns = config.pin.iter().filter_map(|pattern| Pattern::parse(pattern).ok()).collect();
    let pins = Pins::new(patterns, Arc::clone(meta), blobs.clone()).map(Arc::new);
    let layers = Layers::new(Arc::clone(meta), files, cold, lazy).with_upkeep(upkeep).with_pins(pins.clone());
    let layers = can_mount.then(|| Arc::new(layers));
    let publisher = match (&layers, &content, config.publish.policy) {
        (Some(layers), Some(content), PublishPolicy::Auto) => Some(Arc::new(Publisher::new(
            Arc::clone(meta),
            Arc::clone(layers),
            Arc::clone(content),
            blobs.clone(),
            limits(config),
            &config.root,
        ))),
        _ => None,
    };
    let lazy = match (&keeping, config.fetch.lazy, &content) {
        (Some(_), ..) => "on",
        (None, LazyMode::Off, _) => "off: fetch.lazy says so",
        (None, _, None) => "off: there is no store",
        (None, ..) => "off: this kernel cannot; see the log and speedy check",
    };
    let traces = match (config.fetch.traces, &layers, &content) {
        (TraceMode::Auto, Some(layers), Some(content)) => {
            Traces::new(Arc::clone(meta), Arc::clone(layers), Arc::clone(content)).map(Arc::new)
        }
        _ => None,
    };
    let trace_policy = match (config.fetch.traces, &traces) {
        (TraceMode::Off, _) => "off: fetch.traces says so",
        (TraceMode::Auto, None) => "off: layers are not read lazily here",
        (TraceMode::Auto, Some(_)) => "auto",
    };
    let (remote, lazy) = (Remote { source, layers, content, publisher, traces, pins }, lazy.to_owned());
    let scrubber = objects.as_ref().and_then(|objects| StoreScrubber::new(objects, &config.scrub));
    Ok(Composed { remote, layer_images, lazy, traces: trace_policy, objects, keeping, scrubber })
}

fn trial_source(config: &Config) -> Result<Option<MemorySource>, DaemonError> {
    match config.store.as_str().starts_with("memory:") {
        true => Ok(MemorySource::open(config.store.as_str())?),
        false => Ok(None),
    }
}

/// Volumes are made of what the store has. They are not published, nor read lazily.
fn compose_for_volumes(
    config: &Config,
    meta: &Arc<MetaStore>,
    store: Store,
) -> Result<Composed, DaemonError> {
    let (content, objects) = store.content.unzip();
    let source = trial_source(config)?;
    Ok(Composed {
        remote: Remote { source, ..for_volumes(&config.root, meta, content)? },
        layer_images: "none: snapshots are thin volumes".to_owned(),
        lazy: "off: snapshots are thin volumes".to_owned(),
        traces: "off: snapshots are thin volumes",
        scrubber: objects.as_ref().and_then(|objects| StoreScrubber::new(objects, &config.scrub)),
        objects,
        keeping: None,
    })
}

/// A node that cannot mount layer images is a node like any other, without them.
fn prepare_layers(root: &Path, layers: &LayerStore) -> Result<(bool, String), DaemonError> {
    let attacher = match Attacher::open(root, Mode::Auto) {
        Ok(attacher) => attacher,
        Err(error @ AttachError::Unsupported { .. }) => {
            tracing::warn!(%error, "no layer images on this node");
            return Ok((false, format!("none: {error}")));
        }
        Err(error) => {
            // A full disk, say: a start must be possible, it is the way to free it.
            tracing::warn!(%error, "cannot try how layer images are mounted; taken for mounted from files");
            Attacher::untried(root)
        }
    };
    let way = attacher.way().to_string();
    layers.prepare(attacher)?;
    Ok((true, way))
}

fn open_content(config: &Config) -> Result<(ContentStore, Objects), DaemonError> {
    let options = StoreOptions { settings: Settings::from_env(), ..StoreOptions::default() };
    let objects = Objects::open(config.store.as_str(), &options).map_err(content::ContentError::from)?;
    let key = PublisherKey::open_or_create(&config.root.join(KEY_FILE))?;
    tracing::info!(
        store = %config.store, trust = %config.trust.mode, own_key = %key.public(), keys = config.trust.keys.len(),
        "layers are kept on the store"
    );
    let chunks = Arc::new(Merged::new(Verified::new(RemoteChunks::new(objects.clone()))));
    let parts = content::Parts { objects: objects.clone(), chunks, key, trust: trust(config) };
    Ok((ContentStore::new(parts, content::Options::default()), objects))
}

/// Whose layers are taken.
pub fn trust(config: &Config) -> Trust {
    match config.trust.mode {
        TrustMode::Any => Trust::Any,
        // The configuration has checked that each is a key.
        TrustMode::Keys => {
            Trust::Keys(config.trust.keys.iter().filter_map(|key| PublicKey::parse(key).ok()).collect())
        }
    }
}

/// What a layer may have at most.
pub fn limits(config: &Config) -> Limits {
    let limits = &config.limits;
    let (size, entries, metadata) = (limits.size.bytes(), limits.entries, limits.metadata.bytes());
    Limits { data: size, plain: size, entries, metadata, ..Limits::default() }
}

/// The store as people are told of it.
pub(super) fn store_state(config: &Config, composed: &Composed) -> impl Fn() -> Option<StoreState> + use<> {
    let (content, objects) = (composed.remote.content.clone(), composed.objects.clone());
    let scrubber = composed.scrubber.clone();
    let (url, trust) = (config.store.to_string(), config.trust.mode.to_string());
    let listed = config.trust.keys.clone();
    move || {
        let (content, objects) = (content.as_ref()?, objects.as_ref()?);
        let stats = objects.stats();
        let state = match stats.resting {
            None => "in use".to_owned(),
            Some(left) => format!("left alone for {} s more: it did not answer", left.as_secs().max(1)),
        };
        let keys = std::iter::once(content.publisher().to_string()).chain(listed.iter().cloned());
        let (keys, numbers) = (keys.collect(), store_numbers(&stats, objects));
        let scrub = scrubber.as_ref().map(|scrubber| scrubber.state());
        Some(StoreState { url: url.clone(), state, trust: trust.clone(), keys, numbers, scrub })
    }
}

fn store_numbers(stats: &StoreStats, objects: &Objects) -> StoreNumbers {
    let attempts = objects.attempts().into_iter();
    let denied =
        attempts.filter(|attempts| attempts.outcome == "denied").flat_map(|attempts| attempts.counts);
    StoreNumbers {
        resting: stats.resting.is_some(),
        rests: stats.opened,
        requests: stats.requests,
        failures: stats.failures,
        denied: denied.sum(),
        retries: stats.retries,
        read: stats.read,
        written: stats.written,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_nobody_set_are_those_of_images() {
        assert_eq!(limits(&Config::default()), Limits::default());
    }
}
