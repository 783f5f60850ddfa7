//! Room set aside on a file system, so that what frees a full one does not itself fail for want of room.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;

/// Tried in turn until one fits.
const SIZES: [u64; 4] = [4 << 20, 2 << 20, 1 << 20, 256 << 10];
/// Empty files beside the large one: a file system can run out of inodes too.
const INODES: usize = 4;

/// A directory with an allocated file and a few empty ones, given up when room is needed.
#[derive(Debug)]
pub struct Reserve {
    dir: PathBuf,
    held: bool,
}

impl Reserve {
    /// The reserve in the directory `dir`, as an earlier process may have left it; given up at once, because a start may be
    /// what needs the room. Nothing is set aside until [`Reserve::hold`].
    pub fn given_up(dir: PathBuf) -> io::Result<Reserve> {
        let mut reserve = Reserve { dir, held: true };
        reserve.give_up()?;
        Ok(reserve)
    }

    /// Sets room aside, as much as there is up to 4 MiB; answers whether any is held.
    pub fn hold(&mut self) -> bool {
        if !self.held {
            self.held = self.try_hold().is_ok();
            if !self.held && self.remove_all().is_err() {
                tracing::warn!(dir = %self.dir.display(), "cannot remove an unfinished reserve");
            }
        }
        self.held
    }

    /// Gives the room back to the file system; answers whether there was any.
    pub fn give_up(&mut self) -> io::Result<bool> {
        let had = self.held;
        self.remove_all()?;
        self.held = false;
        Ok(had)
    }

    fn try_hold(&self) -> io::Result<()> {
        std::fs::create_dir_all(&self.dir)?;
        let file = File::create(self.dir.join("room"))?;
        let mut allocated = Err(io::ErrorKind::StorageFull.into());
        for size in SIZES {
            allocated =
                rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size).map_err(io::Error::from);
            if allocated.is_ok() {
                break;
            }
            file.set_len(0)?;
        }
        allocated?;
        (0..INODES).try_for_each(|n| File::create(self.dir.join(format!("inode-{n}"))).map(drop))
    }

    fn remove_all(&self) -> io::Result<()> {
        let names = (0..INODES).map(|n| format!("inode-{n}")).chain(["room".to_owned()]);
        let absent_is_fine = |result: io::Result<()>| match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        for name in names {
            absent_is_fine(std::fs::remove_file(self.dir.join(name)))?;
        }
        absent_is_fine(std::fs::remove_dir(&self.dir))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_allocated_and_can_be_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let mut reserve = Reserve::given_up(dir.path().join("reserve")).unwrap();
        assert!(!reserve.path().exists());
        assert!(reserve.hold());
        assert_eq!(std::fs::metadata(reserve.path().join("room")).unwrap().len(), SIZES[0]);
        assert!(reserve.give_up().unwrap());
        assert!(!reserve.give_up().unwrap());
        assert!(!reserve.path().exists());
    }

    #[test]
    fn an_earlier_process_reserve_is_given_up_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = Reserve::given_up(dir.path().join("reserve")).unwrap();
        assert!(first.hold());
        drop(first);
        Reserve::given_up(dir.path().join("reserve")).unwrap();
        assert!(!dir.path().join("reserve").exists());
    }
}
