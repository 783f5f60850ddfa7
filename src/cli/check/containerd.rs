//! containerd as it runs: its version, what it knows of us, and whether it sees the same directories.
//!
//! Where: `run` hands [`probe`] the answer of `client`; `settings` uses `proxy` for the section of a configuration
//! file, so that file and running process are judged alike.
//!
//! Words: our *entry* is `[proxy_plugins.speedy]`, as containerd read it.
//!
//! Invariants: without a containerd every finding is skipped and none fails.
//!
//! When it fails: what cannot be read is a skipped finding.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::client::{Answer, AskError, Plugin};
use super::{Area, Expected, Finding, NAME};
use crate::containerd::numbers;
use crate::sys::mountinfo::{self, MountEntry, Propagation};

/// The type of plugin we are.
const SNAPSHOTTER: &str = "io.containerd.snapshotter.v1";
/// Plugins that use us; when one of them did not start, pulling or running through us does not work.
const USERS: &[&str] = &["io.containerd.cri.v1", "io.containerd.grpc.v1", "io.containerd.transfer.v1"];

/// Every judgement on a running containerd. `daemon` is the process of a running `speedy serve`.
pub fn probe(
    answer: &Result<Answer, AskError>,
    expected: &Expected<'_>,
    daemon: Option<u32>,
) -> Vec<Finding> {
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => return vec![Finding::skipped(Area::Containerd, "socket", error.to_string())],
    };
    let pid = answer.pid.map_or_else(|| "unknown here".to_owned(), |pid| pid.to_string());
    let mut findings = vec![
        Finding::ok(Area::Containerd, "socket", format!("containerd answers, pid {pid}")),
        version(&answer.version),
    ];
    findings.extend(sight(answer.pid, expected, daemon));
    match &answer.plugins {
        Ok(plugins) => findings.extend(registered(plugins, expected)),
        Err(reason) => findings.push(Finding::skipped(Area::Containerd, "plugin", reason.clone())),
    }
    findings
}

fn version(version: &str) -> Finding {
    let (area, title) = (Area::Containerd, "version");
    match numbers(version) {
        Some(number) if number >= (2, 1) => Finding::ok(area, title, version),
        Some((2, 0)) => Finding::warning(
            area,
            title,
            format!(
                "{version}: works, but its transfer service passes no image references; 2.1 or newer does"
            ),
        ),
        Some(_) => Finding::failure(area, title, format!("{version} is older than 2.0 and not supported"))
            .fix("apt-get install containerd   # 2.1 or newer"),
        None => Finding::skipped(area, title, format!("{version:?} is not a number")),
    }
}

/// What containerd's list of plugins says about us.
fn registered(plugins: &[Plugin], expected: &Expected<'_>) -> Vec<Finding> {
    let (area, title) = (Area::Containerd, "plugin");
    let mut findings = Vec::new();
    match plugins.iter().find(|plugin| plugin.kind == SNAPSHOTTER && plugin.id == NAME) {
        None => {
            let detail =
                format!("containerd has no snapshotter {NAME}; add this to its configuration and restart it");
            findings.push(Finding::failure(area, title, detail).fix(expected.section()));
        }
        Some(Plugin { init_error: Some(error), .. }) => {
            findings.push(Finding::failure(
                area,
                title,
                format!("{SNAPSHOTTER}.{NAME} did not start: {error}"),
            ));
        }
        Some(plugin) => {
            findings.push(Finding::ok(area, title, format!("{SNAPSHOTTER}.{NAME} is loaded")));
            findings.extend(proxy(area, &Entry::from(plugin), expected));
        }
    }
    findings.push(users(plugins));
    findings
}

/// Whether the plugins that would use us have started. One that was skipped for want of a kernel feature is no error.
fn users(plugins: &[Plugin]) -> Finding {
    let (area, title) = (Area::Containerd, "plugins that use snapshotters");
    let failed: Vec<String> = plugins
        .iter()
        .filter(|plugin| USERS.contains(&plugin.kind.as_str()))
        .filter_map(|plugin| {
            let error = plugin.init_error.as_deref().filter(|error| !error.contains("skip plugin"))?;
            Some(format!("{}.{}: {error}", plugin.kind, plugin.id))
        })
        .collect();
    if failed.is_empty() {
        return Finding::ok(area, title, "none reports an error");
    }
    Finding::warning(area, title, failed.join("; ")).fix("journalctl -u containerd --since today")
}

/// Our entry, from a running containerd or from a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Entry {
    /// The socket it connects to.
    pub(super) address: Option<String>,
    /// What it tells others.
    pub(super) exports: BTreeMap<String, String>,
    /// What it can do.
    pub(super) capabilities: Vec<String>,
}

impl From<&Plugin> for Entry {
    fn from(plugin: &Plugin) -> Entry {
        // The loader adds the address to the exports.
        let address = plugin.exports.get("address").cloned();
        Entry { address, exports: plugin.exports.clone(), capabilities: plugin.capabilities.clone() }
    }
}

/// Judges our entry.
pub(super) fn proxy(area: Area, entry: &Entry, expected: &Expected<'_>) -> Vec<Finding> {
    vec![
        address(area, entry, expected),
        exported_root(area, entry, expected),
        annotations(area, entry),
        rebase(area, entry, expected),
        remap(area, entry, expected),
    ]
}

fn in_section(line: &str) -> String {
    format!("[proxy_plugins.{NAME}]\n  {line}")
}

fn in_exports(line: &str) -> String {
    format!("[proxy_plugins.{NAME}.exports]\n  {line}")
}

fn address(area: Area, entry: &Entry, expected: &Expected<'_>) -> Finding {
    let title = "address";
    let fix = in_section(&format!("address = {:?}", expected.address));
    match entry.address.as_deref().map(|address| address.trim_start_matches("unix://")) {
        Some(address) if Path::new(address) == expected.address => Finding::ok(area, title, address),
        Some(address) => {
            let ours = expected.address.display();
            let detail = format!("containerd connects to {address}, but Speedy listens on {ours}");
            Finding::failure(area, title, detail).fix(fix)
        }
        None => Finding::failure(area, title, "no address is given").fix(fix),
    }
}

fn exported_root(area: Area, entry: &Entry, expected: &Expected<'_>) -> Finding {
    let title = "exports.root";
    let fix = in_exports(&format!("root = {:?}", expected.root));
    match entry.exports.get("root") {
        Some(root) if Path::new(root) == expected.root => Finding::ok(area, title, root.as_str()),
        Some(root) => {
            let ours = expected.root.display();
            let detail = format!(
                "is {root}, but Speedy's root is {ours}: CRI's image statistics are about another disk"
            );
            Finding::failure(area, title, detail).fix(fix)
        }
        None => {
            let detail = "is not set: CRI reports the space of a directory that does not exist, and the kubelet's \
                          image collection does not work";
            Finding::warning(area, title, detail).fix(fix)
        }
    }
}

fn annotations(area: Area, entry: &Entry) -> Finding {
    let title = "exports.enable_remote_snapshot_annotations";
    if entry.exports.get(title.trim_start_matches("exports.")).is_some_and(|value| value == "true") {
        return Finding::ok(area, title, "true");
    }
    let detail = "is not \"true\": pulls through the transfer service do not say which image and blob a layer belongs to";
    Finding::warning(area, title, detail).fix(in_exports("enable_remote_snapshot_annotations = \"true\""))
}

fn rebase(area: Area, entry: &Entry, expected: &Expected<'_>) -> Finding {
    let title = "capability rebase";
    let has = entry.capabilities.iter().any(|capability| capability == "rebase");
    match (has, expected.hits) {
        (false, _) => Finding::ok(area, title, "not advertised"),
        (true, false) => Finding::ok(area, title, "advertised; layers are unpacked in parallel"),
        (true, true) => {
            let detail = "advertised while layers may be answered from a store or from this node: containerd then \
                          prepares each layer without its parent, and an image whose layer \"already exists\" loses \
                          the layers below it. Take the capability away, or set store = \"\" and layers.share = \
                          \"isolated\"";
            Finding::failure(area, title, detail).fix(right_capabilities(entry, expected))
        }
    }
}

fn remap(area: Area, entry: &Entry, expected: &Expected<'_>) -> Finding {
    let title = "capability remap-ids";
    if entry.capabilities.iter().any(|capability| capability == "remap-ids") {
        return Finding::ok(area, title, "advertised; containers in user namespaces share layers");
    }
    let detail = "not advertised: for each container in a user namespace containerd copies the whole image to change \
                  its owners";
    Finding::warning(area, title, detail).fix(right_capabilities(entry, expected))
}

/// The line that sets right whatever is wrong with the capabilities, the same for each finding about them.
fn right_capabilities(entry: &Entry, expected: &Expected<'_>) -> String {
    let mut names: Vec<&str> = entry.capabilities.iter().map(String::as_str).collect();
    names.retain(|name| *name != "remap-ids" && !(*name == "rebase" && expected.hits));
    names.push("remap-ids");
    in_section(&format!("capabilities = {names:?}"))
}

/// How the daemon gets containerd's view of the mounts.
const UNIT: &str = "[Service]   # in the daemon's systemd unit, without PrivateTmp=, ProtectSystem= or RootDirectory=\n\
                    PrivateMounts=no\n\
                    # where one of the two runs in a container: give it the root as a volume at the same path, with \
                    propagation rshared";

/// Whether containerd sees our directories as we do.
fn sight(pid: Option<u32>, expected: &Expected<'_>, daemon: Option<u32>) -> Vec<Finding> {
    let (area, title) = (Area::Containerd, "mount namespace");
    let Some(pid) = pid else {
        let reason = "containerd's process cannot be seen from here (another process namespace)";
        return vec![Finding::skipped(area, title, reason)];
    };
    let us = daemon.map_or_else(|| "self".to_owned(), |pid| pid.to_string());
    let link = |process: &str| {
        let path = format!("/proc/{process}/ns/mnt");
        fs::read_link(&path).map_err(|error| format!("cannot read {path}: {error}"))
    };
    let theirs = pid.to_string();
    let same = match namespaces(link(&us), link(&theirs)) {
        Ok(same) => same,
        Err(reason) => return vec![Finding::skipped(area, title, reason)],
    };
    if same {
        return vec![Finding::ok(area, title, "the same as ours, so every mount is seen")];
    }
    let table = |process: &str| {
        let text = fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap_or_default();
        mountinfo::parse(&text)
    };
    let identity = |process: &str| {
        let path = PathBuf::from(format!("/proc/{process}/root")).join(relative(expected.root));
        fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
    };
    vec![
        Finding::ok(area, title, "another than ours; see the next lines"),
        same_root(identity(&us), identity(&theirs), expected.root),
        propagation(&table(&us), &table(&theirs), expected.root),
    ]
}

fn namespaces(ours: Result<PathBuf, String>, theirs: Result<PathBuf, String>) -> Result<bool, String> {
    Ok(ours? == theirs?)
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// Judges the identities (device, inode) of the root in both namespaces.
fn same_root(ours: Option<(u64, u64)>, theirs: Option<(u64, u64)>, root: &Path) -> Finding {
    let (area, title) = (Area::Containerd, "root directory");
    let shown = root.display();
    match (ours, theirs) {
        (None, _) => Finding::skipped(area, title, format!("{shown} does not exist yet")),
        (Some(ours), Some(theirs)) if ours == theirs => {
            Finding::ok(area, title, format!("{shown} is the same directory for containerd"))
        }
        (Some(_), seen) => {
            let how = if seen.is_some() { "is another directory" } else { "does not exist" };
            let detail =
                format!("{shown} {how} for containerd: the mounts that Speedy describes cannot be made");
            Finding::failure(area, title, detail).fix(UNIT)
        }
    }
}

/// Judges whether mounts that we make below the root would reach containerd.
fn propagation(ours: &[MountEntry], theirs: &[MountEntry], root: &Path) -> Finding {
    let (area, title) = (Area::Containerd, "mount propagation");
    let (Some(our), Some(their)) = (mountinfo::holding(ours, root), mountinfo::holding(theirs, root)) else {
        return Finding::skipped(area, title, "a mount table cannot be read");
    };
    match mountinfo::propagation(our, their) {
        Propagation::BothWays => Finding::ok(area, title, "shared with containerd"),
        Propagation::Forward => Finding::ok(area, title, "what is mounted here reaches containerd"),
        Propagation::None => {
            let detail = "what is mounted here does not reach containerd. The overlayfs driver mounts nothing itself; \
                          layers fetched while a container runs will need it";
            Finding::warning(area, title, detail).fix(UNIT)
        }
    }
}

#[cfg(test)]
#[path = "containerd_tests.rs"]
mod tests;
