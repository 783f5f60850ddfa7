//! Signals as something to read (signalfd(2)), for a process of one thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// A signal that means something to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM: end.
    Terminate,
    /// SIGUSR2: become the program that is installed now.
    Upgrade,
}

/// The signals of this process: SIGTERM and SIGUSR2 are read here, SIGINT and SIGHUP have no effect any more.
///
/// They are held back rather than handled, so that one that comes while the process becomes another program waits there.
#[derive(Debug)]
pub struct Signals {
    descriptor: OwnedFd,
}

impl Signals {
    /// Holds the signals of the calling thread back from now on. Call it before there are other threads.
    pub fn take() -> io::Result<Signals> {
        let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set before anything else uses it; the numbers are signals; the set outlives
        // the calls.
        let descriptor = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in [libc::SIGTERM, libc::SIGUSR2, libc::SIGINT, libc::SIGHUP] {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            match libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) {
                0 => libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK),
                errno => return Err(io::Error::from_raw_os_error(errno)),
            }
        };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel made it just now, for us alone.
        Ok(Signals { descriptor: unsafe { OwnedFd::from_raw_fd(descriptor) } })
    }

    /// The next signal that came and means something; `None` when there is none.
    pub fn next(&self) -> io::Result<Option<Signal>> {
        loop {
            // `ssi_signo`, the first field of `struct signalfd_siginfo`, is all we need.
            let mut info = [0; size_of::<libc::signalfd_siginfo>()];
            match rustix::io::read(&self.descriptor, &mut info) {
                Ok(_) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            let number = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            match number {
                libc::SIGTERM => return Ok(Some(Signal::Terminate)),
                libc::SIGUSR2 => return Ok(Some(Signal::Upgrade)),
                _ => {}
            }
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}
