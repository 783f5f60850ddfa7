//! The kernel's list of FUSE connections (fusectl): ending one that nobody serves any more.

use std::io;
use std::path::Path;

use rustix::mount::MountFlags;

/// Where the kernel's list is.
pub const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// What came of an abort.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aborted {
    /// The connection is at its end: who waits for it gets an error, and so does everybody who asks later.
    Yes,
    /// There is no such connection, or no such list.
    NoSuchConnection,
}

/// Ends the FUSE connection of this number. `connections` is [`CONNECTIONS`], or another directory in tests.
pub fn abort(connections: &Path, number: u32) -> io::Result<Aborted> {
    match std::fs::OpenOptions::new().write(true).open(connections.join(number.to_string()).join("abort")) {
        Ok(mut file) => {
            io::Write::write_all(&mut file, b"1")?;
            Ok(Aborted::Yes)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Aborted::NoSuchConnection),
        Err(error) => Err(error),
    }
}

/// Makes the list visible where the system has not done so. `false`: it was already.
pub fn mount_list(connections: &Path) -> io::Result<bool> {
    let nothing_shown = std::fs::read_dir(connections)?.next().is_none();
    if nothing_shown {
        // EBUSY: mounted already, and there is no connection.
        match rustix::mount::mount(
            "fusectl",
            connections,
            "fusectl",
            MountFlags::empty(),
            None::<&std::ffi::CStr>,
        ) {
            Ok(()) => return Ok(true),
            Err(rustix::io::Errno::BUSY) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abort_writes_to_the_connections_file() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(abort(dir.path(), 51).unwrap(), Aborted::NoSuchConnection);
        std::fs::create_dir(dir.path().join("51")).unwrap();
        std::fs::write(dir.path().join("51/abort"), "").unwrap();
        assert_eq!(abort(dir.path(), 51).unwrap(), Aborted::Yes);
        assert_eq!(std::fs::read(dir.path().join("51/abort")).unwrap(), b"1");
        assert_eq!(abort(&dir.path().join("absent"), 51).unwrap(), Aborted::NoSuchConnection);
    }
}
