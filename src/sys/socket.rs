//! Unix listening sockets: made private, a stale one replaced, a live one refused.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Why a socket could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error("{0} is in use: another process answers on it; stop that one or choose another address")]
    Live(PathBuf),
    /// A file of another kind is in the way; it is not touched.
    #[error("{0} exists and is not a socket; it was left alone: choose another address or remove it")]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("cannot listen on {path}: {source}")]
    Io {
        /// The address.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// A bound socket and, where it made the file, the means to take it away again.
#[derive(Debug)]
pub struct Bound {
    /// The listener, non-blocking.
    pub listener: UnixListener,
    file: Option<(PathBuf, u64)>,
}

impl Bound {
    /// A listener that somebody else (systemd) made and will keep: nothing is removed at the end.
    pub fn inherited(listener: UnixListener) -> io::Result<Bound> {
        listener.set_nonblocking(true)?;
        Ok(Bound { listener, file: None })
    }

    /// Removes the socket's file if it is still the one that was bound here.
    pub fn unlink(&self) {
        if let Some((path, inode)) = &self.file
            && std::fs::symlink_metadata(path).is_ok_and(|m| m.ino() == *inode)
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove the socket");
        }
    }
}

/// Binds `path` with mode 0600. A socket that nobody answers on is replaced, a live one refused, and any other kind of
/// file left alone. The parent directory is made (0711: others may pass, not list) where it is missing.
pub fn listen(path: &Path) -> Result<Bound, SocketError> {
    let io = |source| SocketError::Io { path: path.to_owned(), source };
    clear_the_way(path, SocketType::STREAM)?;
    let listener = private(|| UnixListener::bind(path)).map_err(io)?;
    listener.set_nonblocking(true).map_err(io)?;
    let inode = std::fs::symlink_metadata(path).map_err(io)?.ino();
    Ok(Bound { listener, file: Some((path.to_owned(), inode)) })
}

/// Makes the parent directory and removes a stale socket, so that a socket of this `kind` can be bound at `path`.
pub(super) fn clear_the_way(path: &Path, kind: SocketType) -> Result<(), SocketError> {
    let io = |source| SocketError::Io { path: path.to_owned(), source };
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        make_parent(parent).map_err(io)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) => match connect_now(path, kind) {
            // EAGAIN: somebody listens and is too busy to be asked. EPROTOTYPE: somebody has it, with another kind of socket.
            Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(SocketError::Live(path.to_owned())),
            Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(io),
            Err(errno) => Err(io(errno.into())),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io(error)),
    }
}

/// Runs `bind` with a mask that makes the file 0600 from its first instant; a chmod afterwards would leave a window.
pub(super) fn private<T>(bind: impl FnOnce() -> T) -> T {
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let bound = bind();
    rustix::process::umask(before);
    bound
}

/// Connects without waiting, and hangs up.
fn connect_now(path: &Path, kind: SocketType) -> Result<(), Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}

fn make_parent(parent: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o711).create(parent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_new_socket_is_private_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/s.sock");
        let bound = listen(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        bound.unlink();
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        drop(UnixListener::bind(&path).unwrap());
        let live = listen(&path).unwrap();
        assert!(matches!(listen(&path), Err(SocketError::Live(_))));
        drop(live);
    }

    /// A start once waited for ever in connect(2), deaf to signals.
    #[test]
    fn a_listener_that_is_too_busy_to_be_asked_is_live() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let busy = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&busy, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&busy, 0).unwrap();
        let _fills_the_backlog = std::os::unix::net::UnixStream::connect(&path).unwrap();
        assert!(matches!(listen(&path), Err(SocketError::Live(_))));
    }

    #[test]
    fn another_kind_of_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(listen(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_successors_socket_is_not_unlinked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let first = listen(&path).unwrap();
        // Both sockets must exist at once, else the file system may give the second one the first one's inode.
        std::fs::rename(&path, dir.path().join("aside")).unwrap();
        let second = listen(&path).unwrap();
        first.unlink();
        assert!(path.exists());
        second.unlink();
    }
}
