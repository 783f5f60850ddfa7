//! The machine: kernel, file system below the root, and the rights and limits of the daemon.
//!
//! Where: `run` calls [`probe()`]; everything else here judges text from `/proc` or the outcome of a trial. Versions are
//! reported, not compared: distributions backport, and a trial mount tells the truth.
//!
//! Words: the *base* is the root, or the nearest directory above it that exists already.
//!
//! Invariants: trials happen in a directory of their own below the base and leave nothing there.
//!
//! When it fails: what cannot be read is a skipped finding.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Area, Finding};
use crate::config::Config;
use crate::driver::probe;
use crate::layer::attach::{AttachError, Attacher, Mode, Way};
use crate::layer::lazy;
use crate::sys::idmap::IdMapped;
use crate::sys::mount::TrialMount;
use crate::sys::mountinfo::{self, MountEntry};
use crate::sys::space::{self, Space};
use crate::sys::tree;

/// The rights Speedy uses, as bits of the kernel's sets, and what for.
const CAPABILITIES: &[(u32, &str, &str)] = &[
    (0, "CAP_CHOWN", "giving a container's root directory to its mapped root"),
    (1, "CAP_DAC_OVERRIDE", "removing what containers wrote"),
    (2, "CAP_DAC_READ_SEARCH", "measuring what containers wrote"),
    (3, "CAP_FOWNER", "removing and changing files of other owners"),
    (SYS_ADMIN, "CAP_SYS_ADMIN", "trial mounts"),
];
const SYS_ADMIN: u32 = 21;

/// Fewer descriptors than this are a warning.
const FEW_FILES: u64 = 4096;

/// Everything about this machine. `daemon` is the process of a running `speedy serve`, else we look at ourselves.
pub fn probe(config: &Config, daemon: Option<u32>) -> Vec<Finding> {
    let filesystems = read("/proc/filesystems");
    let own_status = read("/proc/self/status");
    let can_mount = own_status.as_deref().is_ok_and(|text| holds(text, SYS_ADMIN));
    let base = existing(&config.root);
    let mut findings = vec![kernel(read("/proc/sys/kernel/osrelease"))];
    findings.push(overlay(&filesystems, try_overlay(&base, &config.overlayfs.mount_options, can_mount)));
    findings.push(id_mapping(can_mount.then(|| try_id_mapping(&base))));
    findings.push(lazy_kernel(&filesystems, |device| Path::new(device).exists()));
    findings.push(layer_images(can_mount.then(|| Attacher::probe(&base, Mode::Auto))));
    findings.push(taking_over(can_mount.then(lazy::kernel_repeats)));
    findings.push(fuse_timeout(read("/proc/sys/fs/fuse/max_request_timeout").ok().as_deref()));

    let table = read("/proc/self/mountinfo").map(|text| mountinfo::parse(&text));
    let absent = (!config.root.exists()).then_some(config.root.as_path());
    findings.push(file_system(table.as_deref().map(|table| mountinfo::holding(table, &base)), &base, absent));
    findings.extend(room(space::space(&base), &base));

    let whose = daemon.map_or(Whose::Ours, Whose::Daemon);
    let of = |name: &str| read(&format!("/proc/{}/{name}", whose.directory()));
    findings.push(daemon_runs(whose, &config.address));
    findings.push(privileges(of("status"), whose));
    findings.push(open_files(of("limits"), whose));
    findings.push(user_namespace(of("uid_map")));
    findings
}

/// Which process is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// A running `speedy serve`.
    Daemon(u32),
    /// This command, in place of a daemon that does not run.
    Ours,
}

impl Whose {
    /// Its directory in `/proc`.
    fn directory(self) -> String {
        match self {
            Whose::Daemon(pid) => pid.to_string(),
            Whose::Ours => "self".to_owned(),
        }
    }
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Whose::Daemon(pid) => write!(f, "the daemon (pid {pid})"),
            Whose::Ours => write!(f, "this command"),
        }
    }
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))
}

/// The nearest directory at or above `path` that exists, without links in its path.
fn existing(path: &Path) -> PathBuf {
    let found = path.ancestors().find_map(|ancestor| fs::canonicalize(ancestor).ok());
    found.unwrap_or_else(|| PathBuf::from("/"))
}

fn kernel(release: Result<String, String>) -> Finding {
    let title = "version";
    match release {
        Ok(release) => Finding::ok(Area::Kernel, title, format!("Linux {}", release.trim())),
        Err(reason) => Finding::skipped(Area::Kernel, title, reason),
    }
}

/// Whether a type of file system is among those the kernel has now.
fn listed(filesystems: &str, kind: &str) -> bool {
    filesystems.lines().any(|line| line.split_whitespace().next_back() == Some(kind))
}

/// What a trial mount came to: the options it needed, or why it failed; `None` when it could not be made.
type Trial = Option<Result<Vec<String>, String>>;

fn try_overlay(base: &Path, options: &[String], can_mount: bool) -> Trial {
    can_mount.then(|| probe::overlay_options(base, options).map_err(|error| error.to_string()))
}

fn overlay(filesystems: &Result<String, String>, trial: Trial) -> Finding {
    let (area, title) = (Area::Kernel, "overlayfs");
    let known = filesystems.as_deref().is_ok_and(|text| listed(text, "overlay"));
    match trial {
        Some(Ok(options)) => {
            let options = if options.is_empty() { "no extra options".into() } else { options.join(",") };
            let detail = format!("a trial mount with whiteout and copy-up works; every mount gets {options}");
            Finding::ok(area, title, detail)
        }
        Some(Err(reason)) if !known => Finding::failure(area, title, reason)
            .fix("modprobe overlay\necho overlay > /etc/modules-load.d/overlay.conf   # and at every start"),
        Some(Err(reason)) => Finding::failure(area, title, reason),
        None => {
            let detail = "not tried: a trial mount needs CAP_SYS_ADMIN";
            Finding::skipped(area, title, detail).fix("sudo speedy check")
        }
    }
}

/// Mounts an overlay over id-mapped lower directories the way containerd does; whether owners came out mapped.
fn try_id_mapping(base: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    /// A range that no file system treats specially.
    const HOST: u32 = 100_000;
    const SIZE: u32 = 65_536;

    let scratch = Scratch::new(base)?;
    let at = |name: &str| scratch.0.join(name);
    for name in ["lower/1", "lower/2", "mapped", "upper", "work", "merged"] {
        fs::create_dir_all(at(name))?;
    }
    fs::write(at("lower/1/file"), "x")?;
    let owner = fs::metadata(at("lower/1/file"))?.uid();
    // The common parent of the lower directories is mapped as a whole, as containerd's mounter does.
    let mapped = IdMapped::mount(&at("lower"), &at("mapped"), HOST, SIZE)?;
    let options = format!(
        "lowerdir={0}/1:{0}/2,upperdir={1},workdir={2}",
        at("mapped").display(),
        at("upper").display(),
        at("work").display()
    );
    let merged = TrialMount::overlay(&at("merged"), &options)?;
    let seen = fs::metadata(at("merged/file"))?.uid();
    drop(merged);
    drop(mapped);
    Ok(seen == owner + HOST)
}

/// A directory for a trial, removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(base: &Path) -> io::Result<Scratch> {
        let dir = base.join(format!(".check-{}", std::process::id()));
        fs::create_dir(&dir)?;
        Ok(Scratch(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = tree::remove(&self.0, &|| false) {
            tracing::warn!(dir = %self.0.display(), %error, "cannot remove the directory of a trial");
        }
    }
}

fn id_mapping(trial: Option<io::Result<bool>>) -> Finding {
    let (area, title) = (Area::Kernel, "id-mapped overlay");
    let without = "containers in user namespaces need a full copy of their image; do not give containerd the \
                   capability remap-ids for speedy on this machine";
    match trial {
        Some(Ok(true)) => Finding::ok(
            area,
            title,
            "works; containers in user namespaces share layers (capability remap-ids)",
        ),
        Some(Ok(false)) => {
            Finding::warning(area, title, format!("mounts, but owners are not mapped: {without}"))
        }
        Some(Err(error)) => {
            let detail = format!(
                "does not work here ({error}; Linux 5.19 and a file system that allows it): {without}"
            );
            Finding::warning(area, title, detail)
        }
        None => not_tried(title),
    }
}

/// What layers that are fetched while a container runs would need. The overlayfs driver needs none of it.
fn lazy_kernel(filesystems: &Result<String, String>, exists: impl Fn(&str) -> bool) -> Finding {
    let (area, title) = (Area::Kernel, "EROFS, FUSE and loop devices");
    let text = match filesystems {
        Ok(text) => text,
        Err(reason) => return Finding::skipped(area, title, reason.clone()),
    };
    let parts = [
        ("EROFS", listed(text, "erofs")),
        ("FUSE", listed(text, "fuse") && exists("/dev/fuse")),
        ("loop devices", exists("/dev/loop-control")),
    ];
    let absent: Vec<&str> = parts.iter().filter(|(_, there)| !there).map(|(name, _)| *name).collect();
    let detail = if absent.is_empty() {
        "all there".to_owned()
    } else {
        format!("not loaded: {}; not needed by the overlayfs driver", absent.join(", "))
    };
    Finding::ok(area, title, detail)
}

/// How complete layer images are mounted here, by trying.
fn layer_images(tried: Option<Result<Way, AttachError>>) -> Finding {
    let (area, title) = (Area::Kernel, "layer images");
    match tried {
        Some(Ok(way @ Way::FileBacked(_))) => Finding::ok(area, title, format!("{way}")),
        Some(Ok(way @ Way::Loop)) => {
            let detail =
                format!("{way}; from Linux 6.12 on the kernel mounts most file systems' files without them");
            Finding::ok(area, title, detail)
        }
        Some(Err(error)) => Finding::warning(area, title, error.to_string()).fix("modprobe -a erofs loop"),
        None => not_tried(title),
    }
}

/// What becomes of reads that a daemon has begun to answer when it dies, by asking the kernel.
fn taking_over(repeats: Option<io::Result<bool>>) -> Finding {
    let (area, title) = (Area::Kernel, "lazy layers");
    match repeats {
        Some(Ok(true)) => {
            Finding::ok(area, title, "can be read; what a daemon that died was asked, the kernel asks again")
        }
        Some(Ok(false)) => Finding::ok(
            area,
            title,
            "can be read; what a daemon that died was asked, the next one knows from its journal (Linux before 6.9)",
        ),
        Some(Err(error)) => {
            let detail = format!("no FUSE ({error}): layers are fetched whole before containers start");
            Finding::warning(area, title, detail).fix("modprobe fuse")
        }
        None => not_tried(title),
    }
}

fn not_tried(title: &'static str) -> Finding {
    Finding::skipped(Area::Kernel, title, "not tried: a trial mount needs CAP_SYS_ADMIN")
        .fix("sudo speedy check")
}

fn fuse_timeout(value: Option<&str>) -> Finding {
    let (area, title) = (Area::Kernel, "FUSE request timeout");
    match value.map(|text| text.trim().parse::<u32>()) {
        None => Finding::ok(area, title, "this kernel has none"),
        Some(Ok(0)) => Finding::ok(area, title, "none is set"),
        Some(Ok(seconds)) => {
            let detail = format!(
                "requests end after {seconds} s, which matters only to layers fetched while a container runs"
            );
            Finding::ok(area, title, detail)
        }
        Some(Err(_)) => Finding::skipped(area, title, "fs.fuse.max_request_timeout is not a number"),
    }
}

/// Judges the mount that holds the base; `absent` is the root when it does not exist yet.
fn file_system(mount: Result<Option<&MountEntry>, &String>, base: &Path, absent: Option<&Path>) -> Finding {
    let (area, title) = (Area::Storage, "file system");
    let mount = match mount {
        Ok(Some(mount)) => mount,
        Ok(None) => return Finding::skipped(area, title, format!("no mount holds {}", base.display())),
        Err(reason) => return Finding::skipped(area, title, reason.clone()),
    };
    let mut what = format!("{} ({} at {})", mount.kind, mount.source, mount.point.display());
    if let Some(root) = absent {
        what = format!("{what}; {} does not exist yet, so {} was looked at", root.display(), base.display());
    }
    let move_it = "root = \"/path/on/ext4/xfs/or/btrfs\"   # in /etc/speedy/speedy.toml, or --root";
    if mount.is_read_only() {
        return Finding::failure(area, title, format!("read-only: {what}")).fix(move_it);
    }
    match mount.kind.as_str() {
        "overlay" => {
            let detail = format!("an overlay cannot hold the upper directories of overlays: {what}");
            Finding::failure(area, title, detail).fix(move_it)
        }
        "nfs" | "nfs4" | "cifs" | "smb3" | "9p" | "ceph" | "lustre" | "gpfs" | "virtiofs" => {
            let detail =
                format!("a network file system is slow below containers and often refuses overlays: {what}");
            Finding::warning(area, title, detail).fix(move_it)
        }
        "tmpfs" | "ramfs" => {
            let detail = format!(
                "snapshots do not survive a reboot there, but containerd's record of them does: {what}"
            );
            Finding::warning(area, title, detail).fix(move_it)
        }
        kind if kind == "fuse" || kind.starts_with("fuse.") => {
            let detail = format!("overlays on FUSE file systems are slow and often refused: {what}");
            Finding::warning(area, title, detail).fix(move_it)
        }
        _ => Finding::ok(area, title, what),
    }
}

fn room(space: io::Result<Space>, base: &Path) -> Vec<Finding> {
    const GIB: u64 = 1 << 30;
    let (bytes, inodes) = ("free space", "free inodes");
    let space = match space {
        Ok(space) => space,
        Err(error) => {
            let reason = format!("cannot ask {}: {error}", base.display());
            return vec![
                Finding::skipped(Area::Storage, bytes, reason.clone()),
                Finding::skipped(Area::Storage, inodes, reason),
            ];
        }
    };
    let percent = |part: u64, whole: u64| part.saturating_mul(100).checked_div(whole).unwrap_or(0);
    let free = format!(
        "{} of {} GiB ({} %)",
        space.bytes_free / GIB,
        space.bytes / GIB,
        percent(space.bytes_free, space.bytes)
    );
    let bytes = if space.bytes_free < GIB || percent(space.bytes_free, space.bytes) < 5 {
        Finding::warning(Area::Storage, bytes, format!("only {free}; images will soon not fit"))
            .fix("ctr images prune --all   # or move root to a larger disk")
    } else {
        Finding::ok(Area::Storage, bytes, free)
    };
    let inodes = match percent(space.inodes_free, space.inodes) {
        _ if space.inodes == 0 => Finding::ok(Area::Storage, inodes, "made as needed"),
        left if left < 5 => {
            let detail = format!("only {} of {} ({left} %)", space.inodes_free, space.inodes);
            Finding::warning(Area::Storage, inodes, detail)
                .fix("ctr images prune --all   # or move root to another disk")
        }
        left => Finding::ok(Area::Storage, inodes, format!("{} ({left} %)", space.inodes_free)),
    };
    vec![bytes, inodes]
}

fn daemon_runs(whose: Whose, address: &Path) -> Finding {
    let (area, title) = (Area::Process, "daemon");
    match whose {
        Whose::Daemon(pid) => {
            Finding::ok(area, title, format!("speedy serve runs as pid {pid} on {}", address.display()))
        }
        Whose::Ours => {
            let detail = format!(
                "nothing listens on {}, or systemd does in its place; what follows is about this command",
                address.display()
            );
            Finding::skipped(area, title, detail)
        }
    }
}

/// The value of a line `name:\tvalue` of `/proc/<pid>/status`.
fn status_line<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// Whether a capability is in effect.
fn holds(status: &str, bit: u32) -> bool {
    let effective = status_line(status, "CapEff").and_then(|hex| u64::from_str_radix(hex, 16).ok());
    effective.is_some_and(|set| set >> bit & 1 == 1)
}

fn privileges(status: Result<String, String>, whose: Whose) -> Finding {
    let (area, title) = (Area::Process, "privileges");
    let status = match status {
        Ok(status) => status,
        Err(reason) => return Finding::skipped(area, title, reason),
    };
    // The second number is the effective user.
    let user = status_line(&status, "Uid").and_then(|ids| ids.split_whitespace().nth(1)).unwrap_or("?");
    let missing: Vec<String> = CAPABILITIES
        .iter()
        .filter(|(bit, _, _)| !holds(&status, *bit))
        .map(|(_, name, what)| format!("{name} ({what})"))
        .collect();
    if missing.is_empty() {
        return Finding::ok(
            area,
            title,
            format!("{whose} runs as user {user} with every capability it uses"),
        );
    }
    let detail = format!("{whose} runs as user {user} without {}", missing.join(", "));
    if whose == Whose::Ours && user != "0" {
        // An ordinary user looking around says nothing about the daemon.
        return Finding::skipped(area, title, detail).fix("sudo speedy check");
    }
    let names: Vec<&str> = CAPABILITIES.iter().map(|(_, name, _)| *name).collect();
    Finding::failure(area, title, detail).fix(format!(
        "[Service]   # in the daemon's systemd unit; or run it as root outside a container\nUser=root\n\
         CapabilityBoundingSet={}",
        names.join(" ")
    ))
}

fn open_files(limits: Result<String, String>, whose: Whose) -> Finding {
    let (area, title) = (Area::Process, "open files");
    let limits = match limits {
        Ok(limits) => limits,
        Err(reason) => return Finding::skipped(area, title, reason),
    };
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let number = |text: &str| if text == "unlimited" { Some(u64::MAX) } else { text.parse().ok() };
    let numbers: Vec<u64> = line.unwrap_or_default().split_whitespace().filter_map(number).collect();
    let [soft, hard] = numbers[..] else {
        return Finding::skipped(area, title, format!("the limits of {whose} cannot be read"));
    };
    let shown = |limit: u64| if limit == u64::MAX { "no limit".to_owned() } else { limit.to_string() };
    let detail = format!("{whose} may open {}, and can raise that to {}", shown(soft), shown(hard));
    if hard < FEW_FILES {
        return Finding::warning(area, title, detail)
            .fix("[Service]   # in the daemon's systemd unit\nLimitNOFILE=65536");
    }
    Finding::ok(area, title, detail)
}

fn user_namespace(uid_map: Result<String, String>) -> Finding {
    let (area, title) = (Area::Process, "user namespace");
    let map = match uid_map {
        Ok(map) => map,
        Err(reason) => return Finding::skipped(area, title, reason),
    };
    let ranges: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    if ranges == [["0", "0", "4294967295"]] {
        return Finding::ok(area, title, "the machine's own");
    }
    let shown: Vec<String> = ranges.iter().map(|range| range.join(":")).collect();
    let detail = format!(
        "a nested one ({}): overlays get userxattr, device nodes cannot be made, and id-mapped mounts do not work",
        shown.join(", ")
    );
    Finding::warning(area, title, detail).fix(format!(
        "capabilities = []   # in [proxy_plugins.{}] of containerd, without remap-ids",
        super::NAME
    ))
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
