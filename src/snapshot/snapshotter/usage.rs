//! What snapshots take: measured off every caller's path for committed ones, when asked for active ones.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::Snapshotter;
use crate::driver::Id;
use crate::snapshot::metastore::{Own, Record};
use crate::snapshot::stock::blocking;
use crate::snapshot::{SnapshotError, Usage};

/// How long after a commit its snapshot is measured.
const MEASURE_DELAY: Duration = Duration::from_secs(2);

impl Snapshotter {
    /// Measures committed snapshots off every caller's path: some time after a commit, so that the layers of a pull are measured
    /// together, recorded in one transaction, and what is gone by then not at all. One that cannot be measured (its storage is
    /// damaged) is passed over until something else is committed.
    pub(super) async fn measure_committed(&self, stop: CancellationToken) {
        let mut skip = HashSet::new();
        loop {
            let mut measured = Vec::new();
            while let Some(record) = self.meta.unmeasured(&skip) {
                skip.insert(record.id);
                let (driver, id) = (Arc::clone(&self.driver), record.id);
                if let Err(error) = blocking(move || driver.seal(id)).await {
                    tracing::warn!(key = %record.info.name, %error, "a committed snapshot stays active");
                }
                let usage = tokio::select! {
                    () = stop.cancelled() => return,
                    usage = self.measure(&record) => usage,
                };
                match usage {
                    Ok(usage) => measured.push((record.id, usage)),
                    Err(_) if self.meta.get(&record.info.name).is_none() => {}
                    Err(error) => {
                        tracing::warn!(key = %record.info.name, %error, "cannot measure a committed snapshot");
                    }
                }
            }
            if !measured.is_empty()
                && let Err(error) = self.meta.measured(measured).await
            {
                tracing::warn!(%error, "cannot record what snapshots take; it is measured again when asked for");
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.committed.notified() => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(MEASURE_DELAY) => {}
            }
            skip.clear();
        }
    }

    /// A layer image takes what it takes, however many snapshots share it.
    pub(super) async fn measure(&self, record: &Record) -> Result<Usage, SnapshotError> {
        let image = match record.layer.and_then(|serial| self.meta.layer(serial)) {
            Some(layer) => {
                let metadata = &layer.facts.layout.metadata;
                let bytes = layer.facts.bytes + (metadata.end - metadata.start);
                Usage { bytes, inodes: layer.facts.inodes }
            }
            None => Usage { bytes: 0, inodes: 0 },
        };
        if record.layer.is_some() && record.own == Own::Unused {
            return Ok(image);
        }
        let own = self.measure_directory(record.id).await?;
        Ok(Usage { bytes: image.bytes + own.bytes, inodes: image.inodes + own.inodes })
    }

    async fn measure_directory(&self, id: Id) -> Result<Usage, SnapshotError> {
        let _turn = self.walks.acquire().await.map_err(|_| SnapshotError::ShuttingDown)?;
        let cancel = CancellationToken::new();
        // Dropped with the caller's future: a walk nobody waits for ends.
        let _end = cancel.clone().drop_guard();
        let driver = Arc::clone(&self.driver);
        let measure = blocking(move || driver.usage(id, &|| cancel.is_cancelled())).await?;
        Ok(Usage { bytes: measure.bytes, inodes: measure.inodes })
    }
}
