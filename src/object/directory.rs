//! What only a directory can do: make a file young without writing it, and clean up after a crash and after deletions.
//!
//! A directory that is empty and that nobody has changed for long goes, if it is one of those that exist for a single hash
//! (`refs/15/<hash>`): of the others there are few. A writer may be about to use it. Where it was before that makes its file in it, and
//! then it is not empty, or finds it gone, and makes it anew; one that it has just made is not old. It waits for the disk to know a new directory from the lowest one on
//! that was there when it looked, which is why those above are left alone.

use std::fs;
use std::io;
use std::path::Path as FilePath;
use std::time::{Duration, SystemTime};

use super::description::Access;
use super::open::failed;
use super::stats::Operation;
use super::{ObjectError, Objects};
use crate::sys::blocking;

/// How many directories deep objects are at most.
const DEPTH: u32 = 8;
/// So deep, and deeper, a directory is one hash's.
const OF_ONE_HASH: u32 = 3;

/// What came of [`Objects::touch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touched {
    /// The object is as young as a new one, durably.
    Done,
    /// There is no such object.
    Missing,
    /// This kind of store cannot do it: write the object again.
    Unsupported,
}

impl Objects {
    /// Makes an object as young as a new one without reading it, where the store can.
    pub async fn touch(&self, name: &str) -> Result<Touched, ObjectError> {
        let until = self.deadline();
        self.ready(Access::Write, until).await?;
        let what = format!("TOUCH {name}");
        let path = self.path(name);
        let call = self.call(&what, Operation::Change, self.handle.options.attempt, until);
        let attempt = || async {
            let Some(file) = self.handle.engine.file(&path).await? else { return Ok(Touched::Unsupported) };
            blocking(move || touch(&file).map_err(|error| failed(&error))).await
        };
        self.run(call, attempt).await
    }

    /// Removes what writes into a directory left unfinished, and the empty directories that deletions leave, if nobody has touched them
    /// for `older_than`; answers how many. Other stores have nothing of the kind.
    pub async fn tidy(&self, older_than: Duration) -> Result<u64, ObjectError> {
        let until = self.deadline();
        self.ready(Access::Write, until).await?;
        let call = self.call("TIDY", Operation::Change, self.total, until);
        let attempt = || async {
            let Some(top) = self.handle.engine.top() else { return Ok(0) };
            blocking(move || tidy(&top, older_than, 0).map_err(|error| failed(&error))).await
        };
        self.run(call, attempt).await
    }
}

fn touch(file: &FilePath) -> io::Result<Touched> {
    let file = match fs::File::open(file) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Touched::Missing),
        Err(error) => return Err(error),
    };
    file.set_modified(SystemTime::now())?;
    file.sync_all()?;
    Ok(Touched::Done)
}

/// Below a directory that is `depth` deep.
fn tidy(dir: &FilePath, older_than: Duration, depth: u32) -> io::Result<u64> {
    let mut removed = 0;
    let entries = match fs::read_dir(dir) {
        // Somebody else tidies up as well.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() && depth < DEPTH {
            removed += tidy(&entry.path(), older_than, depth + 1)?;
            if depth + 1 >= OF_ONE_HASH {
                removed += remove_if_old(&entry, older_than, remove_empty)?;
            }
        } else if kind.is_file() && is_unfinished(&entry.file_name().to_string_lossy()) {
            removed += remove_if_old(&entry, older_than, |path| fs::remove_file(path).map(|()| 1))?;
        }
    }
    Ok(removed)
}

/// Removes a directory if nothing is in it.
fn remove_empty(path: &FilePath) -> io::Result<u64> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(0),
        removed => removed.map(|()| 1),
    }
}

/// As the crate below names them: `NAME#N`.
fn is_unfinished(name: &str) -> bool {
    let suffix = name.rsplit_once('#').map(|(_, suffix)| suffix);
    suffix.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
}

fn remove_if_old(
    entry: &fs::DirEntry,
    older_than: Duration,
    remove: impl Fn(&FilePath) -> io::Result<u64>,
) -> io::Result<u64> {
    let gone_is_fine = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Ok(0),
        _ => Err(error),
    };
    let modified = match entry.metadata().and_then(|meta| meta.modified()) {
        Ok(modified) => modified,
        Err(error) => return gone_is_fine(error),
    };
    // A clock that went back makes nothing old.
    if modified.elapsed().unwrap_or_default() < older_than {
        return Ok(0);
    }
    remove(&entry.path()).or_else(gone_is_fine)
}
