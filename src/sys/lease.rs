//! Whether anything else has a file open: a process, a loop device, or a file system that is mounted from it, wherever.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Whether nothing but this descriptor has the file open, for reading or writing. It must have been opened for reading only.
///
/// The kernel grants a lease for writing (fcntl(2), `F_SETLEASE`) to nobody else's detriment only; it is given back at once. What
/// opens the file afterwards is the caller's to prevent.
pub fn is_alone(file: &File) -> io::Result<bool> {
    if set(file, libc::F_WRLCK)? {
        return set(file, libc::F_UNLCK);
    }
    Ok(false)
}

fn set(file: &File, kind: libc::c_int) -> io::Result<bool> {
    // SAFETY: the request takes a number as its argument, and the descriptor is open during the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EAGAIN) => Ok(false),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_else_has_a_file_open_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "x").unwrap();
        let file = File::open(&path).unwrap();
        assert!(is_alone(&file).unwrap());
        for writes in [false, true] {
            let other = File::options().read(!writes).write(writes).open(&path).unwrap();
            assert!(!is_alone(&file).unwrap());
            drop(other);
            assert!(is_alone(&file).unwrap());
        }
        std::fs::remove_file(&path).unwrap();
        assert!(is_alone(&file).unwrap());
    }
}
