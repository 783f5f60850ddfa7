//! What a keeper leaves to the program that it becomes.
//!
//! **Where.** `process` writes it before and reads it after the step; the numbers in it are descriptors, which stay open across.
//!
//! **Invariants.** The installed program is asked first, as a child that has none of the descriptors, whether it
//! understands this version ([`ask`]): a program that does not would end, and everything held with it. A reader
//! takes over each descriptor once.
//!
//! **When it fails.** Before the step: nothing has changed. After it there is no way back, which is why the question comes first.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::protocol::Name;
use crate::sys::fdpass;

/// The version of [`Handover`].
pub(super) const VERSION: u32 = 1;
/// The flags of `speedy keeper` that carry a handover and ask about it.
const ADOPT: &str = "--adopt";
const UNDERSTANDS: &str = "--understands";
/// How long the installed program may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Longer than any handover: 1024 names of 128 bytes each.
const LONGEST: u64 = 1 << 20;

/// Everything that outlives the step.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Handover {
    pub(super) version: u32,
    pub(super) socket: PathBuf,
    pub(super) inode: u64,
    pub(super) listener: RawFd,
    /// The connections; the owner and the one that asked for the upgrade are among them.
    pub(super) connections: Vec<RawFd>,
    pub(super) owner: Option<RawFd>,
    pub(super) asker: Option<RawFd>,
    pub(super) held: Vec<(Name, RawFd)>,
    pub(super) dead_man_ms: u64,
    /// What is left of it, if its clock runs.
    pub(super) left_ms: Option<u64>,
    pub(super) connection: Option<u32>,
}

impl Handover {
    /// What the predecessor left in its memory file.
    pub(super) fn read(number: RawFd) -> io::Result<Handover> {
        use io::Read;
        let mut text = Vec::new();
        File::from(fdpass::inherited(number)?).take(LONGEST).read_to_end(&mut text)?;
        let handover: Handover = serde_json::from_slice(&text)?;
        match handover.version {
            VERSION => Ok(handover),
            other => Err(io::Error::other(format!("a handover of version {other}, this is {VERSION}"))),
        }
    }
}

/// The descriptors of a handover, each taken once.
#[derive(Debug, Default)]
pub(super) struct Taken(std::collections::BTreeSet<RawFd>);

impl Taken {
    pub(super) fn take(&mut self, number: RawFd) -> io::Result<OwnedFd> {
        if self.0.insert(number) {
            fdpass::inherited(number)
        } else {
            Err(io::Error::other(format!("descriptor {number} was handed over twice")))
        }
    }
}

/// The arguments of this process with a handover, in place of the one that it was started with itself.
pub(super) fn arguments(ours: &[OsString], handover: RawFd) -> Vec<OsString> {
    let mut arguments = without_handover(ours);
    arguments.extend([ADOPT.into(), handover.to_string().into()]);
    arguments
}

fn without_handover(ours: &[OsString]) -> Vec<OsString> {
    let mut arguments = Vec::new();
    let mut rest = ours.iter();
    while let Some(argument) = rest.next() {
        if argument == ADOPT {
            rest.next();
        } else {
            arguments.push(argument.clone());
        }
    }
    arguments
}

/// Whether the program at `path` runs, here and now, takes our arguments and understands what this one would leave it.
pub(super) fn ask(path: &Path, ours: &[OsString]) -> io::Result<()> {
    let mut command = Command::new(path);
    command.args(without_handover(ours)).args([UNDERSTANDS, &VERSION.to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    let until = Instant::now() + PATIENCE;
    loop {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => {
                let path = path.display();
                return Err(io::Error::other(format!("{path} cannot take over from this keeper: {status}")));
            }
            None if Instant::now() > until => {
                child.kill()?;
                child.wait()?;
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{} hangs", path.display())));
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_carry_one_handover() {
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        let first = arguments(&words(&["keeper", "--socket", "/s"]), 7);
        assert_eq!(first, words(&["keeper", "--socket", "/s", "--adopt", "7"]));
        assert_eq!(arguments(&first, 9), words(&["keeper", "--socket", "/s", "--adopt", "9"]));
    }

    #[test]
    fn a_program_that_cannot_take_over_is_found_out() {
        assert!(ask(Path::new("/bin/true"), &[]).is_ok());
        assert!(ask(Path::new("/bin/false"), &[]).unwrap_err().to_string().contains("cannot take over"));
        assert!(ask(Path::new("/nonexistent/speedy"), &[]).is_err());
        assert!(ask(Path::new("/dev/null"), &[]).is_err());
    }

    #[test]
    fn nothing_is_taken_twice() {
        let mut taken = Taken::default();
        let number = std::os::fd::IntoRawFd::into_raw_fd(File::open("/dev/null").unwrap());
        let _first = taken.take(number).unwrap();
        assert!(taken.take(number).is_err());
    }

    #[test]
    fn another_version_is_refused() {
        let mut text = serde_json::json!({ "version": 2, "socket": "/s", "inode": 1, "listener": 3,
            "connections": [], "owner": null, "asker": null, "held": [], "dead_man_ms": 1, "left_ms": null,
            "connection": null });
        let read = |text: &serde_json::Value| {
            let file = crate::sys::memory::file("test", text.to_string().as_bytes()).unwrap();
            Handover::read(std::os::fd::IntoRawFd::into_raw_fd(file))
        };
        assert!(read(&text).unwrap_err().to_string().contains("version 2"));
        text["version"] = 1.into();
        assert_eq!(read(&text).unwrap().listener, 3);
    }
}
