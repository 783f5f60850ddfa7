//! Messages with descriptors, over unix sockets that keep message boundaries (`SOCK_SEQPACKET`, `SCM_RIGHTS`).
//!
//! **What.** A [`Channel`] is one end of a connection: [`Channel::send`] and [`Channel::receive`] move one message, bytes and
//! up to [`MOST_DESCRIPTORS`] descriptors. A [`PassListener`] waits for connections at a private path.
//!
//! **Where.** The keeper and its client; nobody else passes descriptors.
//!
//! **Invariants.** A descriptor that arrives is closed on exec from its first instant. What did not fit, bytes or
//! descriptors, is an error, and what did arrive of such a message is closed, never handed on in part. Two processes that
//! take the same path at the same time end with one listener: the parent directory is locked meanwhile.
//!
//! **When it fails.** [`PassError`]; after a truncated message the connection is still in step, because the kernel keeps
//! the boundaries.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::FlockOperation;
use rustix::io::{Errno, FdFlags};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use super::socket::{SocketError, clear_the_way, private};

/// How many descriptors one message may carry.
pub const MOST_DESCRIPTORS: usize = 16;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;
const SPACE: usize = rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS));

/// Why a message was not received.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The other end hung up, or sent an empty message, which looks the same.
    #[error("the other end hung up")]
    Closed,
    /// Nothing came in time, or nothing is there yet.
    #[error("nothing came in time")]
    Nothing,
    /// The message is longer than the room for it.
    #[error("a message is longer than {0} bytes")]
    TooLong(usize),
    /// More descriptors than a message may carry, or than this process may open.
    #[error(
        "a message has more than {MOST_DESCRIPTORS} descriptors, or more than this process may still open"
    )]
    TooManyDescriptors,
    /// The system refused.
    #[error(transparent)]
    Io(io::Error),
}

/// Whether calls on a channel wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// At most this long.
    UpTo(Duration),
    /// Not at all.
    Never,
}

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its process when it connected; 0 if that cannot be seen from here.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
}

impl Peer {
    /// Whether it is this process's own user, or root.
    pub fn is_trusted(self) -> bool {
        self.uid == 0 || self.uid == rustix::process::geteuid().as_raw()
    }
}

/// One end of a connection.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Connects to whoever listens at `path`; calls on the channel then wait up to `limit`, as connecting does.
    pub fn connect(path: &Path, limit: Duration) -> io::Result<Channel> {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&socket, Timeout::Send, Some(limit))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(limit))?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Channel { socket })
    }

    /// Two connected ends, for tests and for children.
    pub fn pair(waiting: Waiting) -> io::Result<(Channel, Channel)> {
        let flags = SocketFlags::CLOEXEC;
        let (one, other) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let (one, other) = (Channel { socket: one }, Channel { socket: other });
        one.set_waiting(waiting)?;
        other.set_waiting(waiting)?;
        Ok((one, other))
    }

    /// Changes how long calls on this channel wait.
    pub fn set_waiting(&self, waiting: Waiting) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&self.socket, waiting == Waiting::Never)?;
        if let Waiting::UpTo(limit) = waiting {
            set_socket_timeout(&self.socket, Timeout::Send, Some(limit))?;
            set_socket_timeout(&self.socket, Timeout::Recv, Some(limit))?;
        }
        Ok(())
    }

    /// A channel of a descriptor that this process got from its predecessor.
    pub fn adopt(socket: OwnedFd) -> io::Result<Channel> {
        let channel = Channel { socket };
        channel.set_waiting(Waiting::Never)?;
        Ok(channel)
    }

    /// Sends one message, whole or not at all. An error of kind `WouldBlock`: no room in time.
    pub fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        if descriptors.len() > MOST_DESCRIPTORS || bytes.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut space = [MaybeUninit::uninit(); SPACE];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let sent = again(|| {
            rustix::net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
        })?;
        // The kernel keeps boundaries: less than the whole cannot happen.
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Receives one message into `buffer`: its length and its descriptors.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), PassError> {
        let room = buffer.len();
        let mut space = [MaybeUninit::uninit(); SPACE];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = again(|| {
            let mut parts = [IoSliceMut::new(buffer)];
            rustix::net::recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
        });
        let received = match received {
            Ok(received) => received,
            Err(Errno::AGAIN) => return Err(PassError::Nothing),
            Err(Errno::CONNRESET) => return Err(PassError::Closed),
            Err(errno) => return Err(PassError::Io(errno.into())),
        };
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        // The room for descriptors is rounded up, so that one more than allowed may fit.
        if received.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > MOST_DESCRIPTORS {
            return Err(PassError::TooManyDescriptors);
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(PassError::TooLong(room));
        }
        if received.bytes == 0 {
            return Err(PassError::Closed);
        }
        Ok((received.bytes, descriptors))
    }

    /// Whether the other end hung up, or sent something that nobody received yet.
    pub fn has_news(&self) -> bool {
        let mut polled = [PollFd::new(&self.socket, PollFlags::IN)];
        rustix::event::poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Who is at the other end (`SO_PEERCRED`).
    pub fn peer(&self) -> io::Result<Peer> {
        let mut found = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut length = libc::socklen_t::try_from(size_of::<libc::ucred>()).map_err(io::Error::other)?;
        // SAFETY: `found` is the structure that this option fills in, `length` its size; both outlive the call. Not
        // rustix: its process id cannot be 0, which the kernel says for a peer of another process id namespace.
        let done = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut found).cast(),
                &raw mut length,
            )
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Peer { pid: found.pid, uid: found.uid })
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A listening socket; it never waits.
#[derive(Debug)]
pub struct PassListener {
    socket: OwnedFd,
    path: PathBuf,
    inode: u64,
}

impl PassListener {
    /// Listens at `path`, under the rules of [`super::socket::listen`].
    pub fn bind(path: &Path) -> Result<PassListener, SocketError> {
        let io = |source: io::Error| SocketError::Io { path: path.to_owned(), source };
        let address = SocketAddrUnix::new(path).map_err(|errno| io(errno.into()))?;
        // Twice, because the parent may have to be made before it can be locked.
        clear_the_way(path, SocketType::SEQPACKET)?;
        let _alone = lock_parent(path).map_err(io)?;
        clear_the_way(path, SocketType::SEQPACKET)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let bound = || -> Result<OwnedFd, Errno> {
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            private(|| rustix::net::bind(&socket, &address))?;
            rustix::net::listen(&socket, BACKLOG)?;
            Ok(socket)
        };
        let socket = bound().map_err(|errno| io(errno.into()))?;
        let inode = std::fs::symlink_metadata(path).map_err(io)?.ino();
        Ok(PassListener { socket, path: path.to_owned(), inode })
    }

    /// The listener of a predecessor, with what it knew of its file.
    pub fn adopt(socket: OwnedFd, path: PathBuf, inode: u64) -> PassListener {
        PassListener { socket, path, inode }
    }

    /// The next connection, which does not wait either; `None` when there is none.
    pub fn accept(&self) -> io::Result<Option<Channel>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match again(|| rustix::net::accept_with(&self.socket, flags)) {
            Ok(socket) => Ok(Some(Channel { socket })),
            Err(Errno::AGAIN | Errno::CONNABORTED) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The inode of its file.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Removes the socket's file if it is still this listener's.
    pub fn unlink(&self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

impl AsFd for PassListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Waits until one of the descriptors has something to read or was hung up, or until the time is over; tells which are ready.
pub fn wait(descriptors: &[BorrowedFd<'_>], limit: Option<Duration>) -> io::Result<Vec<bool>> {
    let until = limit.map(|limit| Instant::now() + limit);
    let mut polled: Vec<PollFd<'_>> =
        descriptors.iter().map(|descriptor| PollFd::from_borrowed_fd(*descriptor, PollFlags::IN)).collect();
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let left = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        match rustix::event::poll(&mut polled, left.as_ref()) {
            Ok(_) => return Ok(polled.iter().map(|one| !one.revents().is_empty()).collect()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Takes a descriptor that this process inherited by number, and closes it on exec from now on.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // Standard input, output and error have their owners.
    if number < 3 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: only asked and changed by number; the kernel answers EBADF for one that is not open.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and by the contract of the handover nobody else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Whether a descriptor goes on to the program that this process becomes.
pub fn set_inherited(descriptor: BorrowedFd<'_>, inherited: bool) -> io::Result<()> {
    let flags = if inherited { FdFlags::empty() } else { FdFlags::CLOEXEC };
    Ok(rustix::io::fcntl_setfd(descriptor, flags)?)
}

/// The parent directory, locked until dropped.
fn lock_parent(path: &Path) -> io::Result<File> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let dir = File::open(parent.unwrap_or(Path::new(".")))?;
    again(|| rustix::fs::flock(&dir, FlockOperation::LockExclusive))?;
    Ok(dir)
}

/// A call that a signal interrupted is made again.
fn again<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    const SOON: Waiting = Waiting::UpTo(Duration::from_millis(200));

    fn pipe() -> (File, File) {
        let (reader, writer) = io::pipe().unwrap();
        (OwnedFd::from(reader).into(), OwnedFd::from(writer).into())
    }

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (one, other) = Channel::pair(SOON).unwrap();
        let (mut reader, writer) = pipe();
        one.send(b"hello", &[writer.as_fd()]).unwrap();
        one.send(b"second", &[]).unwrap();
        let mut buffer = [0; 16];
        let (length, descriptors) = other.receive(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], descriptors.len()), (&b"hello"[..], 1));
        let flags = rustix::io::fcntl_getfd(&descriptors[0]).unwrap();
        assert!(flags.contains(FdFlags::CLOEXEC));
        drop(writer);
        File::from(descriptors.into_iter().next().unwrap()).write_all(b"x").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
        let (length, descriptors) = other.receive(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], descriptors.len()), (&b"second"[..], 0));
    }

    /// The descriptors of a message that is refused are closed: the pipe's reader sees its end.
    #[test]
    fn what_does_not_fit_is_an_error_and_closed() {
        let (one, other) = Channel::pair(SOON).unwrap();
        let (mut reader, writer) = pipe();
        one.send(b"a long message", &[writer.as_fd()]).unwrap();
        drop(writer);
        assert!(matches!(other.receive(&mut [0; 4]), Err(PassError::TooLong(4))));
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        one.send(b"next", &[]).unwrap();
        assert_eq!(other.receive(&mut [0; 4]).unwrap().0, 4);
    }

    #[test]
    fn a_message_has_at_most_so_many_descriptors() {
        let (one, other) = Channel::pair(SOON).unwrap();
        let file = File::open("/dev/null").unwrap();
        let many = [file.as_fd(); MOST_DESCRIPTORS + 1];
        assert_eq!(one.send(b"x", &many).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        one.send(b"x", &many[1..]).unwrap();
        assert_eq!(other.receive(&mut [0; 4]).unwrap().1.len(), MOST_DESCRIPTORS);
        // Another program may send more than we do.
        for count in [MOST_DESCRIPTORS + 1, 100] {
            let many = vec![file.as_fd(); count];
            let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(100))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
            let bytes = [IoSlice::new(b"x")];
            rustix::net::sendmsg(&one.socket, &bytes, &mut control, SendFlags::empty()).unwrap();
            assert!(matches!(other.receive(&mut [0; 4]), Err(PassError::TooManyDescriptors)), "{count}");
        }
    }

    #[test]
    fn silence_and_the_end_are_told_apart() {
        let (one, other) = Channel::pair(SOON).unwrap();
        assert!(matches!(other.receive(&mut [0; 4]), Err(PassError::Nothing)));
        assert!(!other.has_news());
        drop(one);
        assert!(other.has_news());
        assert!(matches!(other.receive(&mut [0; 4]), Err(PassError::Closed)));
        assert_eq!(other.send(b"x", &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_listener_is_private_knows_its_peer_and_takes_over_what_is_stale() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/k.sock");
        let listener = PassListener::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(listener.accept().unwrap().is_none());
        assert!(matches!(PassListener::bind(&path), Err(SocketError::Live(_))));
        while listener.accept().unwrap().is_some() {}
        let client = Channel::connect(&path, Duration::from_secs(1)).unwrap();
        let peer = listener.accept().unwrap().unwrap().peer().unwrap();
        assert_eq!(u32::try_from(peer.pid).unwrap(), std::process::id());
        assert!(peer.is_trusted());
        drop(client);
        drop(listener);
        let next = PassListener::bind(&path).unwrap();
        next.unlink();
        assert!(!path.exists());
    }

    #[test]
    fn root_and_our_own_user_are_trusted_and_nobody_else() {
        let ours = rustix::process::geteuid().as_raw();
        for (uid, trusted) in [(0, true), (ours, true), (ours + 12_345, false), (u32::MAX, false)] {
            assert_eq!(Peer { pid: 1, uid }.is_trusted(), trusted, "{uid}");
        }
    }

    /// A stream socket at the path is somebody's, even if it cannot be asked.
    #[test]
    fn a_live_socket_of_another_kind_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k.sock");
        let _stream = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(matches!(PassListener::bind(&path), Err(SocketError::Live(_))));
    }

    #[test]
    fn waiting_tells_which_are_ready() {
        let (one, other) = Channel::pair(SOON).unwrap();
        let (reader, _writer) = pipe();
        let now = Some(Duration::ZERO);
        assert_eq!(wait(&[other.as_fd(), reader.as_fd()], now).unwrap(), [false, false]);
        one.send(b"x", &[]).unwrap();
        assert_eq!(wait(&[other.as_fd(), reader.as_fd()], None).unwrap(), [true, false]);
    }

    #[test]
    fn a_number_that_is_no_descriptor_is_refused() {
        for number in [-1, 0, 2, 1_000_000] {
            assert!(inherited(number).is_err(), "{number}");
        }
    }
}
