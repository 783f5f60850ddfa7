//! The storage of a snapshot: made, mounted, let go of.

use std::sync::Arc;

use super::Snapshotter;
use crate::driver::{Access, Creation, Id, Mount, MountRequest, Owner, Purpose, Storage};
use crate::snapshot::metastore::{Own, Record, Stack};
use crate::snapshot::stock::blocking;
use crate::snapshot::{Key, Kind, SnapshotError, mapping, remote};

impl Snapshotter {
    /// Makes the storage of a snapshot on `parent`.
    pub(super) async fn make_storage(
        &self,
        storage: Creation,
        parent: Option<&Key>,
    ) -> Result<(), SnapshotError> {
        let (parent, root) = match parent {
            None => (None, storage.root),
            Some(key) => match self.meta.get(key) {
                Some(record) => self.root_of(&record, storage.root),
                None => return Err(SnapshotError::ParentNotFound { parent: key.clone() }),
            },
        };
        let (driver, storage) = (Arc::clone(&self.driver), Creation { parent, root, ..storage });
        blocking(move || driver.create(&storage)).await
    }

    /// What the root directory on top of `parent` takes its owner from: the directory of the parent, or what is recorded of its
    /// layer image, which need not be attached.
    fn root_of(&self, parent: &Record, root: Option<Owner>) -> (Option<Id>, Option<Owner>) {
        let image =
            parent.layer.filter(|_| parent.own == Own::Unused).and_then(|serial| self.meta.layer(serial));
        match image {
            None => (Some(parent.id), root),
            Some(layer) => {
                let owner = Owner { uid: layer.facts.root_uid, gid: layer.facts.root_gid };
                (None, root.or(Some(owner)))
            }
        }
    }

    /// What to mount for a snapshot, which can be mounted when this answers, but for layer images.
    pub(super) async fn usable_mounts_of(
        &self,
        record: &Record,
        stack: &Stack,
    ) -> Result<Vec<Mount>, SnapshotError> {
        let info = &record.info;
        let access = match info.kind {
            Kind::Active => Access::ReadWrite,
            Kind::View => Access::ReadOnly,
            Kind::Committed => return Err(SnapshotError::NotMountable { key: info.name.clone() }),
        };
        if self.driver.storage() == Storage::Volumes {
            let (driver, id, parents) = (Arc::clone(&self.driver), record.id, stack.below.clone());
            let size = remote::size_of(info)?;
            let request = move || {
                let purpose = Purpose::Ordinary;
                driver.activate(&MountRequest { id, parents: &parents, access, mapping: None, purpose, size })
            };
            blocking(request).await?;
        }
        self.mounts_with(access, record, stack)
    }

    /// containerd's collector goes on after *failed precondition*, and comes again. It is asked before the record is removed: afterwards
    /// nobody is there to be told.
    pub(super) async fn require_unused(&self, key: &Key) -> Result<(), SnapshotError> {
        if self.driver.storage() == Storage::Directories {
            return Ok(());
        }
        match self.meta.get(key) {
            Some(record) if record.info.kind != Kind::Committed => {
                let driver = Arc::clone(&self.driver);
                blocking(move || driver.require_unused(record.id)).await
            }
            _ => Ok(()),
        }
    }

    pub(super) fn mounts_with(
        &self,
        access: Access,
        record: &Record,
        stack: &Stack,
    ) -> Result<Vec<Mount>, SnapshotError> {
        let info = &record.info;
        let mapping = mapping::from_labels(&info.labels)?;
        let purpose = match remote::is_detached(&info.labels, info.parent.as_ref()) {
            true => Purpose::DetachedLayer,
            false => Purpose::Ordinary,
        };
        Ok(self.driver.mounts(&MountRequest {
            id: record.id,
            parents: &stack.below,
            access,
            mapping: mapping.as_ref(),
            purpose,
            size: None,
        }))
    }
}
