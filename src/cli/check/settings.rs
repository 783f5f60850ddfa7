//! containerd's configuration files: what they say about us, about pulling, and what follows.
//!
//! Where: `run` calls [`probe`] with the running containerd's answer, if there is one. Reading follows containerd's own
//! loader; versions 2, 3 and 4 of the format are understood.
//!
//! Words: *imports* are further files that are laid over the first; an *unpack entry* is one element of
//! `unpack_config`, which tells the transfer service what it may unpack into.
//!
//! Invariants:
//! 1. Tables are merged, arrays are replaced, and an entry of `proxy_plugins` is replaced whole, as containerd does.
//! 2. A file that is not there is no failure: containerd runs without one, and perhaps without us.
//!
//! When it fails: [`SettingsError`], shown as a skipped finding, or as a failed one where containerd would refuse too.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use super::client::Answer;
use super::containerd::{self, Entry};
use super::{Area, Expected, Finding, NAME};
use crate::config::toml_to_json;

mod differ;
mod hosts;
mod pull;

/// Where containerd looks when it is told nothing.
const DEFAULT_FILE: &str = "/etc/containerd/config.toml";
/// Most files that are read.
const MAX_FILES: usize = 256;
/// The CRI plugin's settings for images: since version 3 and before.
const IMAGES: &str = "io.containerd.cri.v1.images";
const CRI_V2: &str = "io.containerd.grpc.v1.cri";

/// Why the configuration could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The first file is not there.
    #[error("containerd has no configuration file {}", .0.display())]
    Absent(PathBuf),
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not TOML.
    #[error("{} is not valid TOML: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// Imports have no end.
    #[error("more than {MAX_FILES} files are imported")]
    TooMany,
}

/// The configuration with its imports laid over it.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    files: Vec<PathBuf>,
    merged: Map<String, Value>,
}

/// Every judgement on the files. `named` overrides where they are looked for; else the command line of the running
/// containerd counts, else the usual place.
pub fn probe(running: Option<&Answer>, named: Option<&Path>, expected: &Expected<'_>) -> Vec<Finding> {
    let command = running
        .and_then(|answer| fs::read(format!("/proc/{}/cmdline", answer.pid?)).ok())
        .and_then(|command| file_of_command(&command));
    let path = named.map(Path::to_owned).or(command).unwrap_or_else(|| DEFAULT_FILE.into());
    match read(&path) {
        Ok(settings) => judge(&settings, running, expected),
        Err(error @ SettingsError::Syntax { .. }) => {
            vec![Finding::failure(Area::Configuration, "files", error.to_string())]
        }
        Err(error @ SettingsError::Absent(_)) => {
            let detail = format!("{error}; for Speedy it would hold:");
            vec![Finding::skipped(Area::Configuration, "files", detail).fix(first_file(expected))]
        }
        Err(error) => vec![Finding::skipped(Area::Configuration, "files", error.to_string())],
    }
}

/// What a containerd without a configuration file needs in one.
fn first_file(expected: &Expected<'_>) -> String {
    let unpack = |snapshotter| pull::entry_lines("linux", snapshotter);
    format!("version = 3\n{}\n{}\n{}", expected.section(), unpack(NAME), unpack("overlayfs"))
}

/// The file named on a command line, whose words are separated by zero bytes.
fn file_of_command(command: &[u8]) -> Option<PathBuf> {
    let text = String::from_utf8_lossy(command);
    let mut words = text.split('\0');
    while let Some(word) = words.next() {
        if matches!(word, "-c" | "--config" | "-config") {
            return words.next().map(PathBuf::from).filter(|path| path.is_absolute());
        }
        let inline = ["-c=", "--config=", "-config="].iter().find_map(|flag| word.strip_prefix(flag));
        if let Some(path) = inline {
            return Some(PathBuf::from(path)).filter(|path| path.is_absolute());
        }
    }
    None
}

/// Reads a configuration and everything it imports.
pub fn read(path: &Path) -> Result<Settings, SettingsError> {
    let mut settings = Settings::default();
    let mut pending = VecDeque::from([path.to_owned()]);
    while let Some(path) = pending.pop_front() {
        if settings.files.contains(&path) {
            continue;
        }
        if settings.files.len() == MAX_FILES {
            return Err(SettingsError::TooMany);
        }
        let text = fs::read_to_string(&path).map_err(|source| {
            if source.kind() == io::ErrorKind::NotFound && settings.files.is_empty() {
                SettingsError::Absent(path.clone())
            } else {
                SettingsError::Read { path: path.clone(), source }
            }
        })?;
        let document =
            toml_to_json(&text).map_err(|reason| SettingsError::Syntax { path: path.clone(), reason })?;
        let Value::Object(table) = document else { continue };
        pending.extend(imports(&path, &table));
        settings.merge(table);
        settings.files.push(path);
    }
    Ok(settings)
}

/// The files a table imports: relative to its own file, patterns expanded in alphabetical order.
fn imports(parent: &Path, table: &Map<String, Value>) -> Vec<PathBuf> {
    let names = table.get("imports").and_then(Value::as_array).into_iter().flatten();
    let mut out = Vec::new();
    for name in names.filter_map(Value::as_str) {
        let path = clean(&parent.parent().unwrap_or(Path::new("/")).join(name));
        if name.contains('*') {
            out.extend(expand(&path));
        } else {
            out.push(path);
        }
    }
    out
}

/// A path without `.` and `..`, taken as text as containerd does, so that one file has one name.
fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            part => out.push(part),
        }
    }
    out
}

/// The files that match a pattern with `*` and `?` in any of its parts.
fn expand(pattern: &Path) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::new()];
    for part in pattern.components() {
        let part = part.as_os_str();
        let wild = part.to_str().filter(|text| text.contains(['*', '?']));
        found = match wild {
            None => found.iter().map(|dir| dir.join(part)).collect(),
            Some(wild) => found.iter().flat_map(|dir| matching(dir, wild)).collect(),
        };
    }
    found.retain(|path| path.exists());
    found
}

fn matching(dir: &Path, wild: &str) -> Vec<PathBuf> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut found: Vec<PathBuf> = names
        .filter(|name| name.to_str().is_some_and(|name| glob(wild.as_bytes(), name.as_bytes())))
        .map(|name| dir.join(name))
        .collect();
    found.sort();
    found
}

/// Whether a name matches a pattern of `*` and `?`.
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    // Where to go on when the rest does not fit: after the last star, one byte of the name further.
    let (mut p, mut n) = (0, 0);
    let mut retry = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                p += 1;
                retry = Some((p, n));
            }
            Some(c) if *c == b'?' || *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((after_star, at)) = retry else { return false };
                (p, n) = (after_star, at + 1);
                retry = Some((after_star, at + 1));
            }
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

impl Settings {
    /// Lays another file over what was read so far.
    fn merge(&mut self, table: Map<String, Value>) {
        for (key, value) in table {
            match (self.merged.get_mut(&key), value) {
                (Some(Value::Array(list)), Value::Array(more)) => {
                    for item in more {
                        if !list.contains(&item) {
                            list.push(item);
                        }
                    }
                }
                (Some(Value::Object(plugins)), Value::Object(more)) if key == "proxy_plugins" => {
                    plugins.extend(more);
                }
                (Some(Value::Object(to)), Value::Object(from)) => overlay(to, from),
                (_, value) => {
                    self.merged.insert(key, value);
                }
            }
        }
    }

    fn version(&self) -> u64 {
        self.merged.get("version").and_then(Value::as_u64).unwrap_or(1)
    }

    fn plugin(&self, id: &str) -> Option<&Value> {
        self.merged.get("plugins")?.get(id)
    }

    /// A setting of the CRI plugin for images, where this version of the format has it.
    fn image(&self, name: &str) -> Option<&Value> {
        let new = self.plugin(IMAGES).and_then(|images| images.get(name));
        // Before version 3 some settings were below `containerd`, others beside it.
        let old = || {
            let cri = self.plugin(CRI_V2)?;
            cri.get("containerd").and_then(|containerd| containerd.get(name)).or_else(|| cri.get(name))
        };
        new.or_else(old)
    }

    /// The table in which this version has a setting of the CRI plugin for images.
    fn image_table(&self) -> String {
        match self.version() {
            0..=2 => format!("[plugins.'{CRI_V2}'.containerd]"),
            _ => format!("[plugins.'{IMAGES}']"),
        }
    }

    /// Whether the CRI plugin is switched off.
    fn without_cri(&self) -> bool {
        let disabled = self.merged.get("disabled_plugins").and_then(Value::as_array);
        let names = disabled.into_iter().flatten().filter_map(Value::as_str);
        names.into_iter().any(|name| matches!(name, "cri" | CRI_V2 | IMAGES))
    }

    fn entry(&self) -> Option<&Map<String, Value>> {
        self.merged.get("proxy_plugins")?.get(NAME)?.as_object()
    }
}

/// Deep merge: tables key by key, everything else replaced.
fn overlay(to: &mut Map<String, Value>, from: Map<String, Value>) {
    for (key, value) in from {
        match (to.get_mut(&key), value) {
            (Some(Value::Object(to)), Value::Object(from)) => overlay(to, from),
            (_, value) => {
                to.insert(key, value);
            }
        }
    }
}

/// Every judgement on what the files say.
fn judge(settings: &Settings, running: Option<&Answer>, expected: &Expected<'_>) -> Vec<Finding> {
    let mut findings = vec![files(settings)];
    findings.extend(section(settings, running, expected));
    findings.extend(pull::judge(settings, running));
    findings.extend(differ::judge(settings, expected.address));
    findings.extend(hosts::judge(settings, expected.registry));
    findings
}

fn files(settings: &Settings) -> Finding {
    let (area, title) = (Area::Configuration, "files");
    let names: Vec<String> = settings.files.iter().map(|path| path.display().to_string()).collect();
    let detail = format!("{}, version {}", names.join(", "), settings.version());
    match settings.version() {
        2..=4 => Finding::ok(area, title, detail),
        _ => Finding::warning(area, title, format!("{detail}: only versions 2, 3 and 4 are understood here"))
            .fix("containerd config migrate"),
    }
}

/// The section about us: in the file, and against the running containerd.
fn section(settings: &Settings, running: Option<&Answer>, expected: &Expected<'_>) -> Vec<Finding> {
    let (area, title) = (Area::Configuration, "section of speedy");
    let loaded = running.and_then(|answer| answer.plugins.as_ref().ok()).map(|plugins| {
        plugins.iter().find(|plugin| plugin.kind == "io.containerd.snapshotter.v1" && plugin.id == NAME)
    });
    let restart = "systemctl restart containerd";
    let Some(table) = settings.entry() else {
        return vec![match loaded {
            Some(Some(_)) => Finding::warning(
                area,
                title,
                "is missing here, but the running containerd has it: another file was used, or this one was changed \
                 since, and after the next start it will be gone",
            )
            .fix(expected.section()),
            _ => Finding::failure(area, title, "[proxy_plugins.speedy] is missing").fix(expected.section()),
        }];
    };
    let entry = entry(table);
    let kind = table.get("type").and_then(Value::as_str).unwrap_or_default();
    if !matches!(kind, "snapshot" | "io.containerd.snapshotter.v1") {
        let detail = format!("type is {kind:?}: containerd does not start with a type it does not know");
        let fix = format!("[proxy_plugins.{NAME}]\n  type = \"snapshot\"");
        return vec![Finding::failure(area, title, detail).fix(fix)];
    }
    match loaded {
        Some(None) => {
            let detail = "is there, but the running containerd was started without it";
            vec![Finding::failure(area, title, detail).fix(restart)]
        }
        // The running one was judged already; here it only matters whether the next start will be the same.
        Some(Some(plugin)) if same(&Entry::from(plugin), &entry) => {
            vec![Finding::ok(area, title, "[proxy_plugins.speedy], as containerd runs with it")]
        }
        Some(Some(_)) => {
            let mut findings = vec![
                Finding::warning(area, title, "differs from what the running containerd was started with")
                    .fix(restart),
            ];
            findings.extend(containerd::proxy(area, &entry, expected));
            findings
        }
        None => {
            let mut findings = vec![Finding::ok(area, title, "[proxy_plugins.speedy] is there")];
            findings.extend(containerd::proxy(area, &entry, expected));
            findings
        }
    }
}

fn entry(table: &Map<String, Value>) -> Entry {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let exports: BTreeMap<String, String> = table
        .get("exports")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(name, value)| Some((name.clone(), text(value)?)))
        .collect();
    let capabilities = table.get("capabilities").and_then(Value::as_array).into_iter().flatten();
    Entry {
        address: table.get("address").and_then(text),
        exports,
        capabilities: capabilities.filter_map(text).collect(),
    }
}

/// Whether two entries mean the same; the running one has its address among the exports as well.
fn same(running: &Entry, file: &Entry) -> bool {
    let plain = |entry: &Entry| {
        let mut entry = entry.clone();
        entry.exports.remove("address");
        entry.address = entry.address.map(|address| address.trim_start_matches("unix://").to_owned());
        entry.capabilities.sort();
        entry
    };
    plain(running) == plain(file)
}

#[cfg(test)]
mod tests;
