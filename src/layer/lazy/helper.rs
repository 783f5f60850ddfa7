//! System calls that may wait for our own FUSE server, made by a process of their own.
//!
//! A process that waits in one of them cannot be killed as long as nobody serves, and keeps everything that it holds: the daemon
//! must never be that process. A helper holds no record, no socket and no lock. It is this binary again (`speedy kernel-call`),
//! with the unattached FUSE mount as its standard input.
//!
//! **When it fails.** [`HelperError`] has what the helper said. One that does not come back in time is left behind, alive: what it
//! was told to do may still happen.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::message;
use crate::layer::attach::{self, Attacher};
use crate::sys::fuse::Mount;
use crate::sys::loopdev::{self, LoopDevice};

/// How long the kernel may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How far a file system reads ahead on a device whose bytes may have to be fetched.
const READ_AHEAD: u32 = 128 << 10;

/// Why a helper did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// It could not be started.
    #[error("cannot start {exe}: {source}")]
    Start {
        /// The program.
        exe: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel is still busy with it.
    #[error("the kernel did not do it within {0:?}; it may still")]
    Late(Duration),
    /// What it says.
    #[error("{0}")]
    Refused(String),
}

/// Starts helpers.
#[derive(Debug)]
pub struct Helper {
    exe: PathBuf,
}

impl Helper {
    /// With this program, a `speedy`.
    pub fn new(exe: PathBuf) -> Helper {
        Helper { exe }
    }

    /// Attaches the FUSE file of a layer image at `point`, through a loop device.
    pub fn attach(&self, mount: &Mount, serial: u64, point: &Path) -> Result<(), HelperError> {
        self.call(mount, &["attach".as_ref(), serial.to_string().as_ref(), point.as_os_str()])
    }

    /// Puts the complete `image` below the loop device of a layer image, where its FUSE file is now.
    pub fn to_native(
        &self,
        mount: &Mount,
        serial: u64,
        device: &Path,
        image: &Path,
    ) -> Result<(), HelperError> {
        let serial = serial.to_string();
        self.call(mount, &["to-native".as_ref(), serial.as_ref(), device.as_os_str(), image.as_os_str()])
    }

    /// Puts the FUSE file of a layer image below its loop device, where `image` is now.
    pub fn to_lazy(
        &self,
        mount: &Mount,
        serial: u64,
        device: &Path,
        image: &Path,
    ) -> Result<(), HelperError> {
        let serial = serial.to_string();
        self.call(mount, &["to-lazy".as_ref(), serial.as_ref(), device.as_os_str(), image.as_os_str()])
    }

    /// Puts the FUSE file of a layer image below its loop device, where that of a connection is that ended.
    pub fn revive(&self, mount: &Mount, serial: u64, device: &Path) -> Result<(), HelperError> {
        self.call(mount, &["revive".as_ref(), serial.to_string().as_ref(), device.as_os_str()])
    }

    /// Takes what is attached at `point` away.
    pub fn detach(&self, mount: &Mount, point: &Path) -> Result<(), HelperError> {
        self.call(mount, &["detach".as_ref(), point.as_os_str()])
    }

    fn call(&self, mount: &Mount, arguments: &[&std::ffi::OsStr]) -> Result<(), HelperError> {
        let start = |source| HelperError::Start { exe: self.exe.clone(), source };
        let mut command = Command::new(&self.exe);
        command.arg("kernel-call").args(arguments);
        command.stdin(Stdio::from(mount.as_fd().try_clone_to_owned().map_err(start)?));
        command.stdout(Stdio::piped()).stderr(Stdio::inherit());
        // Signals to our group are not meant for it.
        command.process_group(0);
        let mut child = command.spawn().map_err(start)?;
        let status = wait(&mut child).map_err(start)?;
        let Some(status) = status else {
            // Reaped when it ends, however late.
            std::thread::spawn(move || child.wait());
            return Err(HelperError::Late(PATIENCE));
        };
        if status.success() {
            return Ok(());
        }
        let mut said = String::new();
        let read = child.stdout.take().map(|mut output| output.read_to_string(&mut said));
        match read {
            Some(Ok(_)) if !said.is_empty() => Err(HelperError::Refused(said.trim_end().to_owned())),
            _ => Err(HelperError::Refused(format!("the helper ended with {status}"))),
        }
    }
}

/// What became of it; `None` if it still runs after a long time.
fn wait(child: &mut Child) -> io::Result<Option<ExitStatus>> {
    let (began, mut pause) = (Instant::now(), Duration::from_micros(500));
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if began.elapsed() > PATIENCE {
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 5 / 4).min(Duration::from_millis(50));
    }
}

/// What a helper is told to do, as its arguments have it.
#[derive(Debug, Clone)]
pub enum Call {
    /// See [`Helper::attach`].
    Attach {
        /// The layer image.
        serial: u64,
        /// Where.
        point: PathBuf,
    },
    /// See [`Helper::to_native`].
    ToNative {
        /// The layer image.
        serial: u64,
        /// Its loop device.
        device: PathBuf,
        /// Its file.
        image: PathBuf,
    },
    /// See [`Helper::to_lazy`].
    ToLazy {
        /// The layer image.
        serial: u64,
        /// Its loop device.
        device: PathBuf,
        /// Its file.
        image: PathBuf,
    },
    /// See [`Helper::revive`].
    Revive {
        /// The layer image.
        serial: u64,
        /// Its loop device.
        device: PathBuf,
    },
    /// See [`Helper::detach`].
    Detach {
        /// Where.
        point: PathBuf,
    },
}

/// The helper's own side: does it, with the mount on its standard input; what went wrong is printed.
pub fn run(call: &Call) -> bool {
    let Err(problem) = attempt(call) else { return true };
    // Whoever started us may be gone.
    drop(writeln!(io::stdout(), "{problem}"));
    false
}

fn attempt(call: &Call) -> Result<(), Box<dyn std::error::Error>> {
    let input = io::stdin();
    let mount = Mount::from_fd(input.as_fd().try_clone_to_owned()?);
    match call {
        Call::Attach { serial, point } => {
            let file = mount.open(&serial.to_string())?;
            Ok(attach::attach_device(&file, &PathBuf::from(format!("/{serial}")), point, READ_AHEAD)?)
        }
        Call::ToNative { serial, device, image } => {
            let device = LoopDevice::existing(device)?;
            require_below(&device, (mount.device()?, message::node(*serial)))?;
            change(&device, &File::open(image)?)
        }
        Call::ToLazy { serial, device, image } => {
            let device = LoopDevice::existing(device)?;
            let there = std::fs::metadata(image)?;
            require_below(&device, (there.dev(), there.ino()))?;
            change(&device, &mount.open(&serial.to_string())?)
        }
        Call::Revive { serial, device } => {
            let device = LoopDevice::existing(device)?;
            // A file system that nobody serves tells no numbers; its files have names that no other file can have.
            let below = loopdev::backing_file(device.path())?;
            if below.as_deref().and_then(super::serial_below) != Some(*serial) {
                return Err(format!("{} has another file below: {below:?}", device.path().display()).into());
            }
            change(&device, &mount.open(&serial.to_string())?)
        }
        Call::Detach { point } => {
            Ok(Attacher::untried(point.parent().and_then(Path::parent).unwrap_or(point)).detach(point)?)
        }
    }
}

/// A device that was let go and taken by somebody else is not touched.
fn require_below(device: &LoopDevice, wanted: (u64, u64)) -> Result<(), Box<dyn std::error::Error>> {
    match device.below()? {
        found if found == wanted => Ok(()),
        found => {
            Err(format!("{} has another file below: {found:?}, not {wanted:?}", device.path().display())
                .into())
        }
    }
}

fn change(device: &LoopDevice, file: &File) -> Result<(), Box<dyn std::error::Error>> {
    device.change(file)?;
    if !device.is_direct()? {
        device.set_direct()?;
    }
    match device.is_direct()? {
        true => Ok(()),
        false => Err(format!("{} lost its direct I/O", device.path().display()).into()),
    }
}
