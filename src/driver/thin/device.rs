//! Devices of device-mapper: made, looked at, suspended, removed, each by one ioctl.
//!
//! **Where.** The only place that names the `devicemapper` crate, and of it only its low-level calls: the others forget to resume
//! an origin when a snapshot of it fails, and cannot be told how long to wait.
//!
//! **Invariants.**
//! * Every call that may wait for the kernel runs on a thread of its own and is waited for [`DEADLINE`] at most. A thread that is
//!   given up goes on: what it has suspended it resumes.
//! * udev is told with every device to leave it alone: all file systems here are copies of one template and have its UUID, so no
//!   rule may look at them. The link `/dev/mapper/NAME` is made here.
//! * A device of ours has our UUID beside its name; one of that name with another UUID is somebody else's and is not touched.
//!
//! **When it fails.** [`DriverError::Busy`] when a device is in use or the kernel does not answer; the errno otherwise.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use devicemapper::{DM, DevId, DmError, DmFlags, DmName, DmOptions, DmUdevFlags, DmUuid, errors};

use crate::driver::DriverError;

/// How long the kernel may take for one call.
const DEADLINE: Duration = Duration::from_secs(60);
const DEV: &str = "/dev";
/// The directory of names.
pub(super) const MAPPER: &str = "/dev/mapper";

const ENXIO: i32 = 6;
pub(super) const EBUSY: i32 = 16;
pub(super) const EEXIST: i32 = 17;
pub(super) const ENODATA: i32 = 61;

/// What a device is made of: one target over its whole length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table {
    /// Sectors of 512 bytes.
    pub(super) sectors: u64,
    pub(super) target: &'static str,
    pub(super) parameters: String,
}

/// What is known of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Info {
    pub(super) numbers: (u32, u32),
    pub(super) open: bool,
    pub(super) suspended: bool,
    /// It has a table: without one it was left half-made.
    pub(super) live: bool,
}

/// The way to the kernel's device-mapper.
#[derive(Clone)]
pub(super) struct Kernel {
    dm: Arc<DM>,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kernel")
    }
}

impl Kernel {
    pub(super) fn open() -> Result<Kernel, DriverError> {
        let dm = DM::new().map_err(|error| {
            DriverError::Unsupported(format!(
                "device-mapper cannot be used: {error}; load it (modprobe dm_thin_pool) or use a kernel that has it"
            ))
        })?;
        Ok(Kernel { dm: Arc::new(dm) })
    }

    /// The names of all devices that begin so.
    pub(super) fn names(&self, prefix: &str) -> Result<Vec<String>, DriverError> {
        let all = self.ask("list devices", DM::list_devices)?;
        Ok(all
            .into_iter()
            .map(|(name, ..)| name.to_string())
            .filter(|name| name.starts_with(prefix))
            .collect())
    }

    /// What is known of a device of ours; `None` if there is none.
    pub(super) fn info(&self, name: &str) -> Result<Option<Info>, DriverError> {
        let owned = name.to_owned();
        let asked = within(name, {
            let dm = Arc::clone(&self.dm);
            move || Ok(dm.device_info(&DevId::Name(dm_name(&owned)?)))
        })?;
        let info = match asked {
            Err(error) if errno(&error) == Some(ENXIO) => return Ok(None),
            Err(error) => return Err(failed(name, &error)),
            Ok(info) => info,
        };
        if info.uuid().map(ToString::to_string) != Some(uuid_of(name)) {
            return Err(DriverError::Unsupported(format!(
                "{MAPPER}/{name} was made by another program; it was not touched: remove it, or choose another root"
            )));
        }
        let (device, flags) = (info.device(), info.flags());
        Ok(Some(Info {
            numbers: (device.major, device.minor),
            open: info.open_count() > 0,
            suspended: flags.contains(DmFlags::DM_SUSPEND),
            live: flags.contains(DmFlags::DM_ACTIVE_PRESENT),
        }))
    }

    /// Makes a device with this table, or finishes one that was left half-made. One that is there already is left as it is.
    pub(super) fn activate(&self, name: &str, table: &Table, read_only: bool) -> Result<Info, DriverError> {
        match self.info(name)? {
            Some(found) if found.live && !found.suspended => return self.shown(name, found),
            Some(found) if found.live => {
                self.resume(name)?;
                return self.shown(name, found);
            }
            Some(_) => {}
            None => self.create(name, read_only)?,
        }
        let loaded = self.load(name, table, read_only).and_then(|()| self.resume(name));
        if let Err(error) = loaded {
            if let Err(left) = self.remove(name) {
                tracing::warn!(name, error = %left, "a device that could not be made stays until the next start");
            }
            return Err(error);
        }
        match self.info(name)? {
            Some(found) => self.shown(name, found),
            None => Err(DriverError::Missing(path_of(name))),
        }
    }

    /// Gives a device another table.
    pub(super) fn reload(&self, name: &str, table: &Table) -> Result<(), DriverError> {
        self.load(name, table, false)?;
        // The resume takes the new table; whatever happens, it comes.
        drop(self.suspend(name)?);
        Ok(())
    }

    /// Takes a device away; at once, or, if somebody has it open, when he is done. Nothing happens if there is none.
    pub(super) fn remove(&self, name: &str) -> Result<(), DriverError> {
        let options = ours().set_flags(DmFlags::DM_DEFERRED_REMOVE);
        let owned = name.to_owned();
        let removed = within(name, {
            let dm = Arc::clone(&self.dm);
            move || Ok(dm.device_remove(&DevId::Name(dm_name(&owned)?), options))
        })?;
        match removed {
            Err(error) if errno(&error) != Some(ENXIO) => return Err(failed(name, &error)),
            _ => {}
        }
        match std::fs::remove_file(path_of(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(DriverError::at(&path_of(name), error))
            }
            _ => Ok(()),
        }
    }

    /// Tells the target of a device something.
    pub(super) fn message(&self, name: &str, text: &str) -> Result<(), Refused> {
        let (owned, words) = (name.to_owned(), text.to_owned());
        let dm = Arc::clone(&self.dm);
        let told = within(name, move || Ok(dm.target_msg(&DevId::Name(dm_name(&owned)?), None, &words)));
        match told {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => {
                Err(Refused { errno: errno(&error), error: failed(&format!("{name}: {text}"), &error) })
            }
            Err(error) => Err(Refused { errno: None, error }),
        }
    }

    /// Type and status of a device's target, as they are now: nothing is written for it.
    pub(super) fn status(&self, name: &str) -> Result<(String, String), DriverError> {
        self.target(name, DmFlags::DM_NOFLUSH).map(|(_, kind, text)| (kind, text))
    }

    /// Length, type and parameters of a device's target.
    pub(super) fn table(&self, name: &str) -> Result<(u64, String, String), DriverError> {
        self.target(name, DmFlags::DM_NOFLUSH | DmFlags::DM_STATUS_TABLE)
    }

    fn target(&self, name: &str, flags: DmFlags) -> Result<(u64, String, String), DriverError> {
        let owned = name.to_owned();
        let (_, targets) = self.ask(name, move |dm| {
            dm.table_status(&DevId::Name(DmName::new(&owned)?), DmOptions::default().set_flags(flags))
        })?;
        match targets.into_iter().next() {
            Some((_, length, kind, text)) => Ok((length, kind, text)),
            None => Err(DriverError::Missing(path_of(name))),
        }
    }

    /// Lets nothing more through to a device, with everything written that was; it goes on when the answer is dropped.
    pub(super) fn suspend(&self, name: &str) -> Result<Suspended, DriverError> {
        let owned = name.to_owned();
        let options = ours().set_flags(DmFlags::DM_SUSPEND);
        let kernel = self.clone();
        within(name, move || {
            let suspended = Suspended { kernel: kernel.clone(), name: owned.clone() };
            // Also after an error: a device that is not suspended takes no harm from a resume.
            let done = kernel.dm.device_suspend(&DevId::Name(dm_name(&owned)?), options);
            done.map(|_| suspended).map_err(|error| failed(&owned, &error))
        })
    }

    /// Lets a device go on, with the table that was loaded last.
    pub(super) fn resume(&self, name: &str) -> Result<(), DriverError> {
        let owned = name.to_owned();
        self.ask(name, move |dm| dm.device_suspend(&DevId::Name(DmName::new(&owned)?), ours())).map(drop)
    }

    fn create(&self, name: &str, read_only: bool) -> Result<(), DriverError> {
        let owned = name.to_owned();
        let options = ours().set_flags(access(read_only));
        self.ask(name, move |dm| {
            let uuid = uuid_of(&owned);
            dm.device_create(DmName::new(&owned)?, Some(DmUuid::new(&uuid)?), options)
        })
        .map(drop)
    }

    fn load(&self, name: &str, table: &Table, read_only: bool) -> Result<(), DriverError> {
        let owned = name.to_owned();
        let options = ours().set_flags(access(read_only));
        let targets = [(0, table.sectors, table.target.to_owned(), table.parameters.clone())];
        self.ask(name, move |dm| dm.table_load(&DevId::Name(DmName::new(&owned)?), &targets, options))
            .map(drop)
    }

    /// Sees to the link by which the device is known.
    fn shown(&self, name: &str, info: Info) -> Result<Info, DriverError> {
        let (link, target) = (path_of(name), PathBuf::from(format!("../dm-{}", info.numbers.1)));
        if std::fs::read_link(&link).is_ok_and(|found| found == target) {
            return Ok(info);
        }
        // Beside it and renamed, so that nobody meets a name without a device.
        let beside = path_of(&format!("{name}.new"));
        drop(std::fs::remove_file(&beside));
        std::os::unix::fs::symlink(&target, &beside)
            .and_then(|()| std::fs::rename(&beside, &link))
            .map_err(|error| DriverError::at(&link, error))?;
        Ok(info)
    }

    fn ask<T: Send + 'static>(
        &self,
        what: &str,
        run: impl FnOnce(&DM) -> Result<T, DmError> + Send + 'static,
    ) -> Result<T, DriverError> {
        let (dm, name) = (Arc::clone(&self.dm), what.to_owned());
        within(what, move || run(&dm).map_err(|error| failed(&name, &error)))
    }
}

/// Why a message was not taken.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) errno: Option<i32>,
    pub(super) error: DriverError,
}

/// A suspended device; it is resumed when this is dropped.
#[derive(Debug)]
pub(super) struct Suspended {
    kernel: Kernel,
    name: String,
}

impl Drop for Suspended {
    fn drop(&mut self) {
        if let Err(error) = self.kernel.resume(&self.name) {
            tracing::error!(name = self.name, %error, "cannot resume a device: whoever uses it waits until the next start");
        }
    }
}

/// `/dev/mapper/NAME`.
pub(super) fn path_of(name: &str) -> PathBuf {
    Path::new(MAPPER).join(name)
}

/// The node of a device, whatever it is called.
pub(super) fn node_of(info: Info) -> PathBuf {
    Path::new(DEV).join(format!("dm-{}", info.numbers.1))
}

/// Runs something that may wait for the kernel, on a thread of its own, and waits for it, but not for ever.
pub(super) fn within<T: Send + 'static>(
    what: &str,
    run: impl FnOnce() -> Result<T, DriverError> + Send + 'static,
) -> Result<T, DriverError> {
    let (answer, answered) = mpsc::channel();
    let spawned = std::thread::Builder::new().name("devicemapper".into()).spawn(move || {
        // Nobody listens any more after the deadline; the answer is dropped then, and with it what it holds.
        drop(answer.send(run()));
    });
    spawned.map_err(|error| DriverError::at(Path::new(what), error))?;
    answered.recv_timeout(DEADLINE).unwrap_or_else(|_| {
        Err(DriverError::Busy(format!("{what}: the kernel did not answer within {DEADLINE:?}; see dmesg")))
    })
}

fn uuid_of(name: &str) -> String {
    format!("SPEEDY-{name}")
}

fn dm_name(name: &str) -> Result<&DmName, DriverError> {
    DmName::new(name)
        .map_err(|error| DriverError::Unsupported(format!("{name:?} is no name of a device: {error}")))
}

fn access(read_only: bool) -> DmFlags {
    if read_only { DmFlags::DM_READONLY } else { DmFlags::empty() }
}

fn ours() -> DmOptions {
    DmOptions::default().set_udev_flags(
        DmUdevFlags::DM_UDEV_DISABLE_DM_RULES_FLAG
            | DmUdevFlags::DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG
            | DmUdevFlags::DM_UDEV_DISABLE_DISK_RULES_FLAG
            | DmUdevFlags::DM_UDEV_DISABLE_OTHER_RULES_FLAG,
    )
}

fn errno(error: &DmError) -> Option<i32> {
    match error {
        DmError::Core(errors::Error::Ioctl(.., errno)) => Some(**errno as i32),
        _ => None,
    }
}

fn failed(what: &str, error: &DmError) -> DriverError {
    match errno(error) {
        Some(EBUSY) => DriverError::Busy(format!("{what} is in use")),
        Some(ENODATA) => DriverError::Missing(PathBuf::from(what)),
        Some(errno) => DriverError::at(Path::new(what), io::Error::from_raw_os_error(errno)),
        None => DriverError::Unsupported(format!("{what}: {error}")),
    }
}
