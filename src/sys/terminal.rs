//! The terminal on standard error.

use std::io::IsTerminal;

/// How many columns it has; `None` if standard error is no terminal, or one that does not say.
pub fn columns() -> Option<u16> {
    let stderr = std::io::stderr();
    if !stderr.is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(&stderr).ok()?;
    (size.ws_col > 0).then_some(size.ws_col)
}
