//! The program that this process runs: where it is, becoming another, starting one that outlives us.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The program of this process, whatever happened to its file.
const OURSELVES: &str = "/proc/self/exe";

/// The path under which the program that replaces this one will be found.
///
/// That is the path it was started with, if that is absolute and is this program: where it is a link, an upgrade changes
/// the link. Else the file itself, as it was called before it was replaced.
pub fn path() -> io::Result<PathBuf> {
    let ours = std::fs::metadata(OURSELVES)?;
    if let Some(given) = std::env::args_os().next().map(PathBuf::from)
        && given.is_absolute()
        && std::fs::metadata(&given).is_ok_and(|it| (it.dev(), it.ino()) == (ours.dev(), ours.ino()))
    {
        return Ok(given);
    }
    let link = std::fs::read_link(OURSELVES)?.into_os_string().into_vec();
    let path = link.strip_suffix(b" (deleted)").map(<[u8]>::to_vec).unwrap_or(link);
    Ok(PathBuf::from(OsString::from_vec(path)))
}

/// Becomes the program at `path` with these arguments and the same environment; returns only what went wrong. Signals that
/// are held back stay so, and descriptors that are not closed on exec stay open.
pub fn become_program(path: &Path, arguments: &[&OsStr]) -> io::Error {
    let text = |part: &OsStr| CString::new(part.as_bytes());
    let Ok(program) = text(path.as_os_str()) else { return io::ErrorKind::InvalidInput.into() };
    let parts: Result<Vec<CString>, _> =
        std::iter::once(path.as_os_str()).chain(arguments.iter().copied()).map(text).collect();
    let Ok(parts) = parts else { return io::ErrorKind::InvalidInput.into() };
    let mut pointers: Vec<_> = parts.iter().map(|part| part.as_ptr()).collect();
    pointers.push(std::ptr::null());
    // SAFETY: `program` and each part end with a zero and outlive the call, the list of pointers ends with a null. The
    // standard library's exec would let the held signals loose first.
    unsafe { libc::execv(program.as_ptr(), pointers.as_ptr()) };
    io::Error::last_os_error()
}

/// Makes what `command` starts a session of its own: it gets no signal of our terminal or process group.
pub fn detach(command: &mut Command) {
    let new_session = || rustix::process::setsid().map(drop).map_err(io::Error::from);
    // SAFETY: between fork and exec it makes one system call and touches no memory or lock of ours.
    unsafe { command.pre_exec(new_session) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_has_a_path() {
        assert!(path().unwrap().is_absolute());
        assert!(path().unwrap().exists());
    }

    #[test]
    fn a_program_that_is_not_there_leaves_us_as_we_are() {
        let error = become_program(Path::new("/nonexistent/speedy"), &[OsStr::new("x")]);
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let error = become_program(Path::new("/a\0b"), &[]);
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn what_is_detached_leads_its_own_session() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "read -r _ _ _ _ _ session _ < /proc/$$/stat; [ \"$session\" = $$ ]"]);
        detach(&mut command);
        assert!(command.status().unwrap().success());
    }
}
