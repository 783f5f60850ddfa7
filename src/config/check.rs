//! Checks of single values, beyond their types.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use super::key::{Problem, value};
use super::value::{ByteSize, Timespan};
use crate::content::collect::keep::KeepRule;
use crate::content::pattern::Pattern;
use crate::content::trust::PublicKey;

fn absolute(text: &str) -> Result<PathBuf, Problem> {
    let path = Path::new(text);
    if text.is_empty() {
        return Err(value("the path is empty"));
    }
    if !path.is_absolute() {
        return Err(value(format!("{text:?} is a relative path")));
    }
    if text.chars().any(|c| c.is_control() || c == char::REPLACEMENT_CHARACTER) {
        return Err(value(format!("{text:?} holds control characters or is not UTF-8")));
    }
    if path.components().any(|part| part == std::path::Component::ParentDir) {
        return Err(value(format!("{text:?} holds \"..\"")));
    }
    // Components drop doubled and trailing slashes, so that one directory has one spelling.
    Ok(path.components().collect())
}

pub(super) fn root_path(text: &str) -> Result<PathBuf, Problem> {
    let path = absolute(text)?;
    if path.parent().is_none() {
        return Err(value("the root directory of the system cannot be used"));
    }
    // Mount options are joined with commas and lower directories with colons, and readers of the options in
    // containerd know no escapes.
    if let Some(c) = text.chars().find(|c| matches!(c, ':' | ',' | '\\' | '"')) {
        return Err(value(format!("{text:?} holds {c:?}, which has a meaning in mount options")));
    }
    Ok(path)
}

pub(super) fn socket_path(text: &str) -> Result<PathBuf, Problem> {
    /// What fits into `sun_path` with its closing zero.
    const LONGEST: usize = 107;
    let path = absolute(text)?;
    let length = path.as_os_str().len();
    if length > LONGEST {
        return Err(value(format!("the path is {length} bytes long, a socket's is at most {LONGEST}")));
    }
    Ok(path)
}

pub(super) fn loopback(text: &str) -> Result<Option<SocketAddr>, Problem> {
    if text.is_empty() {
        return Ok(None);
    }
    let address = match text.strip_prefix("localhost:") {
        Some(port) => port.parse().ok().map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)),
        None => text.parse::<SocketAddr>().ok(),
    };
    let address = address.ok_or_else(|| value(format!("{text:?} is not an address with a port")))?;
    if !address.ip().is_loopback() {
        // There is no access control on it.
        return Err(value(format!("{address} can be reached from other machines")));
    }
    Ok(Some(address))
}

pub(super) fn time_limit(text: &str) -> Result<Timespan, Problem> {
    let limit = Timespan::parse(text).map_err(value)?;
    if limit < Timespan::from_millis(1) || limit > Timespan::from_secs(3600) {
        return Err(value(format!("{limit} is out of range")));
    }
    Ok(limit)
}

pub(super) fn size_or_none(least: ByteSize, most: ByteSize, text: &str) -> Result<ByteSize, Problem> {
    if text == "0" { Ok(ByteSize::from_mib(0)) } else { size_from(least, most, text) }
}

/// So much each second; 0 for none, or no limit.
pub(super) fn rate(text: &str) -> Result<ByteSize, Problem> {
    size_or_none(ByteSize::from_kib(64), ByteSize::from_gib(16), text)
}

pub(super) fn size_from(least: ByteSize, most: ByteSize, text: &str) -> Result<ByteSize, Problem> {
    match ByteSize::parse(text).map_err(value)? {
        size if size < least || size > most => Err(value(format!("{size} is out of range"))),
        size => Ok(size),
    }
}

pub(super) fn trusted_keys(keys: Vec<String>) -> Result<Vec<String>, Problem> {
    match keys.iter().find(|key| PublicKey::parse(key).is_err()) {
        None => Ok(keys),
        Some(key) => Err(value(format!("{key:?} is not a public key"))),
    }
}

pub(super) fn keep_rules(rules: Vec<String>) -> Result<Vec<String>, Problem> {
    match rules.iter().find_map(|rule| KeepRule::parse(rule).err()) {
        None => Ok(rules),
        Some(problem) => Err(value(problem)),
    }
}

pub(super) fn patterns(texts: Vec<String>) -> Result<Vec<String>, Problem> {
    match texts.iter().find_map(|text| Pattern::parse(text).err()) {
        None => Ok(texts),
        Some(problem) => Err(value(problem)),
    }
}

pub(super) fn mount_options(options: Vec<String>) -> Result<Vec<String>, Problem> {
    /// What Speedy decides for each mount, and what would turn an overlay mount into something else.
    const OURS: &[&str] = &[
        "lowerdir",
        "lowerdir+",
        "datadir+",
        "upperdir",
        "workdir",
        "userxattr",
        "uidmap",
        "gidmap",
        "ro",
        "rw",
        "bind",
        "rbind",
        "remount",
        "loop",
    ];
    for (index, option) in options.iter().enumerate() {
        let name = option.split('=').next().unwrap_or_default();
        if name.is_empty() {
            return Err(value("an option is empty"));
        }
        if option.chars().any(|c| c == ',' || c.is_whitespace() || c.is_control()) {
            return Err(value(format!("{option:?} holds a comma or white space; give one option per item")));
        }
        if OURS.contains(&name) || name.to_ascii_lowercase().starts_with("x-") {
            return Err(value(format!("{option:?} is an option that Speedy or containerd sets itself")));
        }
        if options.iter().take(index).any(|other| other.split('=').next() == Some(name)) {
            return Err(value(format!("{name:?} is given twice")));
        }
    }
    Ok(options)
}

/// A block device, or nothing.
pub(super) fn device_path(text: &str) -> Result<PathBuf, Problem> {
    if text.is_empty() { Ok(PathBuf::new()) } else { absolute(text) }
}

/// The name of a snapshotter, as containerd allows it for a plugin.
pub(super) fn plugin_name(text: &str) -> Result<String, Problem> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    match text.len() {
        1..=64 if text.chars().all(fits) => Ok(text.to_owned()),
        _ => Err(value(format!("{text:?} is no name of a snapshotter"))),
    }
}
