//! Two devices for a pool that can be made to fail, and to grow.

use std::fs;
use std::path::PathBuf;

use super::{MIB, sh};

pub(super) const DATA: &str = "data";
pub(super) const METADATA: &str = "metadata";

/// Each is a device `failing-TAG-NAME` on a loop device on a file.
pub(super) struct Disks {
    tag: String,
    files: tempfile::TempDir,
}

impl Disks {
    pub(super) fn new(tag: &str, metadata_mib: u64, data_mib: u64) -> Disks {
        let disks = Disks { tag: tag.into(), files: tempfile::tempdir().unwrap() };
        for (name, mib) in [(METADATA, metadata_mib), (DATA, data_mib)] {
            let path = disks.file(name);
            fs::File::create(&path).unwrap().set_len(mib * MIB).unwrap();
            sh(&format!(
                "loop=$(losetup -f); losetup $loop {}; echo $loop >{0}.loop; \
                 dmsetup create {} --table \"0 {} linear $loop 0\"",
                path.display(),
                disks.name(name),
                mib * 2048
            ));
        }
        disks
    }

    fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    fn name(&self, name: &str) -> String {
        format!("failing-{}-{name}", self.tag)
    }

    pub(super) fn device(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/dev/mapper/{}", self.name(name)))
    }

    /// Every request to the device is an error from now on, or is served again.
    pub(super) fn fail(&self, name: &str, fails: bool) {
        let sectors = fs::metadata(self.file(name)).unwrap().len() / 512;
        let target = match fails {
            true => "error".to_owned(),
            false => format!("linear $(cat {}.loop) 0", self.file(name).display()),
        };
        self.load(name, &format!("0 {sectors} {target}"));
    }

    /// Only writes are errors from now on; `fail` with false ends it.
    pub(super) fn fail_writes(&self, name: &str) {
        let path = self.file(name);
        let sectors = fs::metadata(&path).unwrap().len() / 512;
        self.load(name, &format!("0 {sectors} flakey $(cat {}.loop) 0 0 60 1 error_writes", path.display()));
    }

    pub(super) fn grow(&self, name: &str, mib: u64) {
        let path = self.file(name);
        fs::File::options().write(true).open(&path).unwrap().set_len(mib * MIB).unwrap();
        sh(&format!("losetup -c $(cat {}.loop)", path.display()));
        self.load(name, &format!("0 {} linear $(cat {}.loop) 0", mib * 2048, path.display()));
    }

    fn load(&self, name: &str, table: &str) {
        let device = self.name(name);
        sh(&format!(
            "dmsetup load {device} --table \"{table}\"; dmsetup suspend --noflush --nolockfs {device}; dmsetup resume {device}"
        ));
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        for name in [METADATA, DATA] {
            let (name, path) = (self.name(name), self.file(name));
            sh(&format!("dmsetup remove {name}; losetup -d $(cat {}.loop)", path.display()));
        }
    }
}
