//! What people ask: the numbers of this daemon, its layers, and where the layers of a snapshot came from.

use std::sync::Arc;

use super::Snapshotter;
use crate::driver::PoolHealth;
use crate::layer::lazy::session::Numbers as LazyCounts;
use crate::oci::ChainId;
use crate::snapshot::layers::FillCounts;
use crate::snapshot::metastore::{Own, Record};
use crate::snapshot::report::{
    DiskCounts, LayerExplained, LayerNumbers, LayerReport, PublishState, SnapshotNumbers, TraceState,
};
use crate::snapshot::{Key, SnapshotError};
use crate::snapshot::{publish, remote};

impl Snapshotter {
    /// Numbers of snapshots.
    pub fn snapshot_numbers(&self) -> SnapshotNumbers {
        let counts = self.meta.counts();
        SnapshotNumbers {
            views: counts.views,
            active: counts.active,
            committed: counts.committed,
            removing: counts.removing,
        }
    }

    /// How the pool of its volumes is, if it has one. Blocking.
    pub fn pool(&self) -> Option<PoolHealth> {
        self.driver.pool()
    }

    /// Numbers of layer images. Blocking.
    pub fn layer_numbers(&self) -> LayerNumbers {
        let reports = self.layer_reports();
        LayerNumbers {
            count: reports.len(),
            filling: reports.iter().filter(|layer| layer.state != "complete").count(),
            unclaimed: reports.iter().filter(|layer| layer.snapshots == 0).count(),
            attached: reports.iter().filter(|layer| layer.attached).count(),
            lazy: reports.iter().filter(|layer| layer.lazy).count(),
            bytes: reports.iter().map(|layer| layer.bytes).sum(),
            disk: self.disk_counts(),
        }
    }

    /// What was given up of layer images, checked and repaired since the daemon started.
    pub fn disk_counts(&self) -> DiskCounts {
        self.remote.layers.as_ref().map(|layers| layers.disk_counts()).unwrap_or_default()
    }

    /// What was filled since the daemon started.
    pub fn fill_counts(&self) -> FillCounts {
        self.remote.layers.as_ref().map(|layers| layers.fill_counts()).unwrap_or_default()
    }

    /// What was read through this daemon since it started.
    pub fn lazy_counts(&self) -> LazyCounts {
        self.remote.layers.as_ref().map(|layers| layers.lazy_counts()).unwrap_or_default()
    }

    /// How many Prepares that asked the store for a layer came to what, since the daemon started.
    pub fn lookups(&self) -> Vec<(&'static str, u64)> {
        self.hits.as_ref().map(|hits| hits.lookups()).unwrap_or_default()
    }

    /// How many of them had looked their layer up before.
    pub fn foreseen(&self) -> u64 {
        self.hits.as_ref().map(|hits| hits.foreseen_used()).unwrap_or_default()
    }

    /// All layer images. Blocking.
    pub fn layer_reports(&self) -> Vec<LayerReport> {
        let Some(layers) = &self.remote.layers else { return Vec::new() };
        let claims = self.meta.claims();
        let report = |serial: u64| claims.get(&serial).copied().unwrap_or(0);
        self.meta.layers().iter().map(|layer| layers.report(layer, report(layer.id.serial))).collect()
    }

    /// What is known of starts of images.
    pub fn trace_state(&self, policy: &str) -> TraceState {
        match &self.remote.traces {
            Some(traces) => traces.state(policy),
            None => TraceState { policy: policy.to_owned(), ..TraceState::default() },
        }
    }

    /// What is put on the store.
    pub fn publish_state(&self, policy: &str) -> PublishState {
        match &self.remote.publisher {
            Some(publisher) => publisher.state(policy),
            None => publish::state_of(&self.meta.publish_queue(), policy),
        }
    }

    /// Where these layers of an image are on this node, in the order given. Blocking.
    pub fn explain_chains(&self, chains: &[ChainId]) -> Vec<LayerExplained> {
        let records = self.meta.all();
        let find = |chain: &ChainId| {
            let holds = |record: &&Arc<Record>| {
                let name = &record.info.name;
                remote::chain_of(&record.info.labels, name).as_ref() == Some(chain)
            };
            // With a layer image first: several namespaces may have the same layer, each in its own way.
            let mut found: Vec<&Arc<Record>> = records.iter().filter(holds).collect();
            found.sort_by_key(|record| record.layer.is_none());
            found.first().map(|record| Arc::clone(record))
        };
        let layers = chains.iter().map(|chain| (Some(chain.clone()), find(chain)));
        self.explain(layers.collect())
    }

    /// What lies below the snapshot whose key a client called `key` in `namespace`, the lowest first. Blocking.
    pub fn explain_key(&self, namespace: &str, key: &str) -> Result<Vec<LayerExplained>, SnapshotError> {
        let is_it = |record: &&Arc<Record>| {
            let name = record.info.name.as_str();
            name == key || (name.starts_with(&format!("{namespace}/")) && remote::client_key(name) == key)
        };
        let records = self.meta.all();
        let mut at = records.iter().find(is_it).cloned();
        if at.is_none() {
            return Err(SnapshotError::NotFound { key: Key::new(key)? });
        }
        let mut layers = Vec::new();
        while let Some(record) = at {
            let chain = remote::chain_of(&record.info.labels, &record.info.name);
            at = record.info.parent.as_ref().and_then(|parent| self.meta.get(parent));
            layers.push((chain, Some(record)));
        }
        layers.reverse();
        Ok(self.explain(layers))
    }

    fn explain(&self, layers: Vec<(Option<ChainId>, Option<Arc<Record>>)>) -> Vec<LayerExplained> {
        let (claims, queue) = (self.meta.claims(), self.meta.publish_queue());
        let explain = |(chain, record): (Option<ChainId>, Option<Arc<Record>>)| {
            let image =
                record.as_ref().and_then(|record| record.layer).and_then(|serial| self.meta.layer(serial));
            let claims = |serial: u64| claims.get(&serial).copied().unwrap_or(0);
            let image = image.zip(self.remote.layers.as_ref());
            let image = image.map(|(layer, layers)| layers.report(&layer, claims(layer.id.serial)));
            let kind = match (&record, &image) {
                (None, _) => "absent",
                (Some(_), None) => "files",
                (Some(record), Some(_)) if record.own == Own::Used => "files on an image",
                (Some(_), Some(_)) => "image",
            };
            let entry = chain.as_ref().and_then(|chain| queue.iter().find(|entry| entry.chain == *chain));
            let publish = entry.map(|entry| match (&entry.dropped, entry.message.is_empty()) {
                (Some(reason), _) => format!("given up: {reason}"),
                (None, true) => "waiting".to_owned(),
                (None, false) => format!("tried {} times: {}", entry.attempts, entry.message),
            });
            LayerExplained {
                chain: chain.as_ref().map(ToString::to_string),
                kind: kind.to_owned(),
                image,
                remote: chain.as_ref().and_then(|chain| self.hits.as_ref()?.answer(chain)),
                trace: chain.as_ref().and_then(|chain| self.remote.traces.as_ref()?.explain(chain)),
                publish,
                names: match (&chain, &self.remote.publisher) {
                    (Some(chain), Some(publisher)) => publisher.explain_names(chain),
                    _ => Vec::new(),
                },
            }
        };
        layers.into_iter().map(explain).collect()
    }
}
