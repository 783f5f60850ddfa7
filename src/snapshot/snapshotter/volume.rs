//! A volume made of a layer that the store has.
//!
//! A volume holds its layer and all below it, so nothing can stand on one whose data is still on its way. The whole layer image is
//! fetched before the Prepare is answered, and written out into a snapshot of the parent's volume; as long as that may take, and
//! if it takes longer, the layer is pulled.
//!
//! The volume is recorded as that of an active snapshot under a name of ours before anything is written to it, and committed as
//! a whole. What a crash leaves is an active snapshot that the next start removes.

use std::fs::File;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::Snapshotter;
use crate::driver::Id;
use crate::image::{Layout, extract};
use crate::snapshot::hit::{Hit, HitError, Hits};
use crate::snapshot::metastore::{LayerChoice, NewCommit, NewSnapshot, Own, Record};
use crate::snapshot::remote::{self, LayerRequest};
use crate::snapshot::stock::blocking;
use crate::snapshot::{Key, Kind, Labels, SnapshotError, Timestamp};

/// What the key of a snapshot whose volume is being made begins with. No client's key can look so.
const UNFINISHED: &str = "@unfinished/";

impl Snapshotter {
    /// What an earlier process had not finished is removed.
    pub(super) async fn remove_unfinished(&self) -> Result<(), SnapshotError> {
        for record in self.meta.all() {
            let key = &record.info.name;
            if record.info.kind == Kind::Active && key.as_str().starts_with(UNFINISHED) {
                tracing::info!(%key, "a volume that was being made of a layer is going to be freed");
                self.meta.remove(key.clone()).await?;
            }
        }
        Ok(())
    }

    /// The committed snapshot whose volume holds the layer of `hit` on this parent.
    pub(super) async fn make_volume(
        &self,
        hits: &Hits,
        hit: &Hit,
        request: &LayerRequest,
        parent: Option<&Key>,
        labels: &Labels,
    ) -> Result<Arc<Record>, HitError> {
        let layer = match &hit.layer {
            LayerChoice::New(layer) => layer,
            // Volumes have no layer images beside them.
            LayerChoice::Own | LayerChoice::Known(_) => return Err(HitError::OtherIndex),
        };
        let id = self.stock.take().await?;
        let key = Key::new(&format!("{UNFINISHED}{}", id.serial))?;
        let new = NewSnapshot {
            id,
            key: key.clone(),
            parent: parent.cloned(),
            kind: Kind::Active,
            labels: labels.clone(),
            now: Timestamp::now(),
        };
        self.record(new, LayerChoice::Own, None).await?;
        let made = async {
            hits.in_time(&request.chain, async {
                let image = hits.fetch_whole(layer.id.serial).await?;
                Ok(self.fill_volume(id, image, layer.facts.layout.clone()).await?)
            })
            .await?;
            let name = Key::new(&remote::committed_name(id.serial, &request.chain))?;
            let (key, labels, now) = (key.clone(), labels.clone(), Timestamp::now());
            let commit = NewCommit { name, key, parent: None, labels, own: Own::Used, publish: None, now };
            Ok(self.meta.commit(commit).await?)
        };
        let made = made.await;
        match &made {
            Ok(_) => self.committed.notify_one(),
            Err(_) => self.meta.remove(key).await?,
        }
        made
    }

    /// Whoever drops this has the writing end soon, not at once.
    async fn fill_volume(&self, id: Id, image: Arc<File>, layout: Layout) -> Result<(), SnapshotError> {
        let cancel = CancellationToken::new();
        let _end = cancel.clone().drop_guard();
        let driver = Arc::clone(&self.driver);
        blocking(move || {
            let cancelled = || cancel.is_cancelled();
            driver.fill(id, &mut |dir| {
                extract::unpack(&image, &layout, dir, &cancelled).map_err(std::io::Error::other)
            })
        })
        .await
    }
}
