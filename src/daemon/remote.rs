//! Everything about layers that are not just unpacked: how they are mounted here, the store, what is published.

use std::path::Path;
use std::sync::Arc;

use super::DaemonError;
use crate::chunk::merged::Merged;
use crate::chunk::remote::Remote as RemoteChunks;
use crate::chunk::verified::Verified;
use crate::config::{Config, PublishPolicy, TrustMode};
use crate::containerd::blob::Blobs;
use crate::content::memory::MemorySource;
use crate::content::trust::{KEY_FILE, PublicKey, PublisherKey, Trust};
use crate::content::{self, ContentStore};
use crate::image::Limits;
use crate::layer::LayerStore;
use crate::layer::attach::{AttachError, Attacher, Mode};
use crate::object::{Objects, Settings, StoreOptions};
use crate::snapshot::layers::Layers;
use crate::snapshot::metastore::MetaStore;
use crate::snapshot::publish::Publisher;
use crate::snapshot::report::StoreState;
use crate::snapshot::snapshotter::Remote;

/// What was composed, and what can be said about it.
pub(super) struct Composed {
    pub(super) remote: Remote,
    /// How layer images are mounted here, or why they are not.
    pub(super) layer_images: String,
    pub(super) objects: Option<Objects>,
}

/// Composes what `config` asks for.
pub(super) fn compose(
    config: &Config,
    meta: &Arc<MetaStore>,
    blobs: &Blobs,
) -> Result<Composed, DaemonError> {
    let (store, layer_images) = open_layers(&config.root)?;
    let source = match config.store.as_str().starts_with("memory:") {
        true => MemorySource::open(config.store.as_str())?,
        false => None,
    };
    let opened = match config.store.is_empty() || source.is_some() {
        true => None,
        false => Some(open_content(config)?),
    };
    let (content, objects) = match opened {
        Some((content, objects)) => (Some(Arc::new(content)), Some(objects)),
        None => (None, None),
    };
    let layers = store.map(|store| Arc::new(Layers::new(Arc::clone(meta), store, content.clone())));
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
    Ok(Composed { remote: Remote { source, layers, content, publisher }, layer_images, objects })
}

/// A node that cannot mount layer images is a node like any other, without them.
fn open_layers(root: &Path) -> Result<(Option<Arc<LayerStore>>, String), DaemonError> {
    match Attacher::open(root, Mode::Auto) {
        Ok(attacher) => {
            let way = attacher.way().to_string();
            Ok((Some(Arc::new(LayerStore::open(root, attacher)?)), way))
        }
        Err(error @ AttachError::Unsupported { .. }) => {
            tracing::warn!(%error, "no layer images on this node");
            Ok((None, format!("none: {error}")))
        }
        Err(error) => {
            // A full disk, say: a start must be possible, it is the way to free it.
            tracing::warn!(%error, "cannot try how layer images are mounted; taken for mounted from files");
            let attacher = Attacher::untried(root);
            let way = attacher.way().to_string();
            Ok((Some(Arc::new(LayerStore::open(root, attacher)?)), way))
        }
    }
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
    let (url, trust) = (config.store.to_string(), config.trust.mode.to_string());
    let listed = config.trust.keys.clone();
    move || {
        let (content, objects) = (content.as_ref()?, objects.as_ref()?);
        let state = match objects.stats().resting {
            None => "in use".to_owned(),
            Some(left) => format!("left alone for {} s more: it did not answer", left.as_secs().max(1)),
        };
        let keys = std::iter::once(content.publisher().to_string()).chain(listed.iter().cloned());
        Some(StoreState { url: url.clone(), state, trust: trust.clone(), keys: keys.collect() })
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
