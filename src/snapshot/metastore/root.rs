//! What is recorded of a root as a whole: its properties, and slots that are not its own.

use std::path::Path;

use super::{MetaError, MetaStore, Room, tables};
use crate::driver::Id;
use crate::snapshot::{SnapshotError, schema};

impl MetaStore {
    /// Keeps these slots from being given to anybody: something that is not ours has them. All others that were kept so are let go of.
    pub async fn hold(&self, slots: Vec<u32>) -> Result<(), SnapshotError> {
        self.submit(Room::Frees, move |db, _| tables::hold(db, &slots)).await
    }

    /// Keeps the slot of an Id that was made ahead from being given to anybody: something that is not ours has it.
    pub async fn leave(&self, id: Id) -> Result<(), SnapshotError> {
        self.submit(Room::Frees, move |db, _| tables::leave(db, id)).await
    }

    /// What is recorded of the whole root under this name; `first` is recorded if nothing was.
    pub async fn property(&self, name: &'static str, first: String) -> Result<String, SnapshotError> {
        self.submit(Room::Takes, move |db, _| tables::property(db, name, &first)).await
    }
}

/// What is recorded of the whole root under this name, read without a daemon and without changing anything.
pub fn read_property(root: &Path, name: &str) -> Result<Option<String>, MetaError> {
    let Some(db) = schema::open_read_only(&root.join("metadata.db"))? else { return Ok(None) };
    Ok(tables::find_property(&db, name)?)
}
