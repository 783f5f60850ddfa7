//! Limits of this process.

use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard one: the soft one is for programs that use select(2).
pub fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Files are made for this user only, whatever started us; what others may read gets its mode explicitly.
pub fn private_files() {
    rustix::process::umask(Mode::from_raw_mode(0o077));
}
