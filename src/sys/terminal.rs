//! Standard error, be it a terminal or not.

use std::io::{self, IsTerminal, Write};

use rustix::event::{PollFd, PollFlags, Timespec};

/// Where there is any room in a pipe or a socket, there is room for this much.
const ROOM: usize = 4096;

/// Standard error for a process that must not wait for whoever reads it: what finds no room is lost.
#[derive(Debug, Clone, Copy, Default)]
pub struct HastyStderr;

impl Write for HastyStderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        let mut polled = [PollFd::new(&stderr, PollFlags::OUT)];
        rustix::event::poll(&mut polled, Some(&Timespec::default()))?;
        match polled[0].revents().contains(PollFlags::OUT) {
            true => stderr.lock().write(&bytes[..bytes.len().min(ROOM)]),
            false => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How many columns it has; `None` if standard error is no terminal, or one that does not say.
pub fn columns() -> Option<u16> {
    let stderr = io::stderr();
    if !stderr.is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(&stderr).ok()?;
    (size.ws_col > 0).then_some(size.ws_col)
}
