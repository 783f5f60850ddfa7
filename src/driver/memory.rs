//! A driver without storage, for tests of everything above: it remembers which Ids exist.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use super::{Cancelled, Creation, Driver, DriverError, Id, Inventory, Measure, Mount, MountRequest};

/// Passes the same suite as the real drivers, as far as values go. Nothing outlives it.
#[derive(Debug, Default)]
pub struct Memory {
    present: Mutex<BTreeSet<u64>>,
}

impl Memory {
    fn require(&self, id: Id) -> Result<(), DriverError> {
        if self.present.lock().contains(&id.serial) {
            Ok(())
        } else {
            Err(DriverError::Missing(PathBuf::from(id.serial.to_string())))
        }
    }
}

impl Driver for Memory {
    fn reserve(&self, ids: &[Id]) -> Result<(), DriverError> {
        self.present.lock().extend(ids.iter().map(|id| id.serial));
        Ok(())
    }

    fn create(&self, new: &Creation) -> Result<(), DriverError> {
        self.require(new.id)?;
        new.parent.map_or(Ok(()), |parent| self.require(parent))
    }

    fn mounts(&self, request: &MountRequest<'_>) -> Vec<Mount> {
        let options = request.parents.iter().map(|id| format!("below={}", id.serial)).collect();
        vec![Mount { kind: "memory".into(), source: request.id.serial.to_string(), options }]
    }

    fn fill(&self, id: Id, _write: &mut dyn FnMut(&Path) -> io::Result<()>) -> Result<(), DriverError> {
        self.require(id)
    }

    fn usage(&self, id: Id, _cancelled: Cancelled<'_>) -> Result<Measure, DriverError> {
        self.require(id).map(|()| Measure { bytes: 4096, inodes: 1 })
    }

    fn remove(&self, id: Id, _cancelled: Cancelled<'_>) -> Result<(), DriverError> {
        self.present.lock().remove(&id.serial);
        Ok(())
    }

    fn inventory(&self) -> Result<Inventory, DriverError> {
        Ok(Inventory::Serials(self.present.lock().iter().copied().collect()))
    }

    fn is_unused(&self, _id: Id) -> Result<bool, DriverError> {
        Ok(true)
    }

    fn upperdir(&self, _id: Id) -> Option<PathBuf> {
        None
    }
}
