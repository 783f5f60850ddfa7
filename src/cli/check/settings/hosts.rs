//! Whether containerd comes to our `registry` port when a registry is away.
//!
//! Source: containerd's `core/remotes/docker/config`: a directory for each registry with a file `hosts.toml`, below the
//! directories of CRI's `registry.config_path`.

use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::Settings;
use crate::cli::check::{Area, Finding};
use crate::cli::hosts::DIRECTORY;

const TITLE: &str = "hosts of registries";
/// The most registries that are looked at.
const MOST: usize = 256;
/// The longest file that is read, in bytes.
const LONGEST: u64 = 64 << 10;

/// Nothing, if there is no such port.
pub(super) fn judge(settings: &Settings, registry: Option<SocketAddr>) -> Vec<Finding> {
    let Some(address) = registry else { return Vec::new() };
    let configured = settings
        .image("registry")
        .and_then(|registry| registry.get("config_path"))
        .and_then(serde_json::Value::as_str)
        .filter(|path| !path.is_empty());
    let path = configured.unwrap_or(DIRECTORY);
    vec![found(address, path, configured.is_some(), &registries(address, path))]
}

/// The registries whose `hosts.toml` names the port.
fn registries(address: SocketAddr, path: &str) -> Vec<String> {
    let directories = path.split(':').map(PathBuf::from);
    let entries = directories.filter_map(|directory| std::fs::read_dir(directory).ok()).flatten().flatten();
    let names = entries.take(MOST).filter(|entry| {
        let text = read(&entry.path().join("hosts.toml"));
        text.contains(&format!("\"http://{address}\"")) || text.contains(&format!("\"http://{address}/"))
    });
    let mut names: Vec<String> =
        names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn read(path: &Path) -> String {
    let mut text = String::new();
    let file = std::fs::File::open(path).map(|file| file.take(LONGEST));
    // What is no text names nobody.
    match file.and_then(|mut file| file.read_to_string(&mut text)) {
        Ok(_) => text,
        Err(_) => String::new(),
    }
}

fn found(address: SocketAddr, path: &str, is_configured: bool, registries: &[String]) -> Finding {
    let area = Area::Configuration;
    if registries.is_empty() {
        let first = path.split(':').next().unwrap_or(DIRECTORY);
        let detail =
            format!("no hosts.toml below {path} names {address}: nobody asks there when a registry is away");
        return Finding::warning(area, TITLE, detail).fix(format!(
            "speedy config hosts docker.io > {first}/docker.io/hosts.toml   # for each registry"
        ));
    }
    let names = registries.join(", ");
    if is_configured {
        return Finding::ok(area, TITLE, format!("{address} is asked when one of these is away: {names}"));
    }
    let detail =
        format!("{address} is named for {names}, but config_path is not set here: CRI may not look there");
    Finding::warning(area, TITLE, detail)
        .fix(format!("[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = \"{DIRECTORY}\""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::Status;

    #[test]
    fn registries_are_found_by_what_names_the_port() {
        let dir = tempfile::tempdir().unwrap();
        let address: SocketAddr = "127.0.0.1:5051".parse().unwrap();
        let hosts = |registry: &str, text: &[u8]| {
            std::fs::create_dir_all(dir.path().join(registry)).unwrap();
            std::fs::write(dir.path().join(registry).join("hosts.toml"), text).unwrap();
        };
        hosts("r.example", b"server = \"http://127.0.0.1:5051\"\n");
        hosts("plain.example", b"server = \"http://127.0.0.1:5051/http\"\n");
        hosts("other.example", b"server = \"http://127.0.0.1:50511\"\n");
        hosts("rubbish.example", b"\xff\xfe");
        std::fs::create_dir(dir.path().join("empty.example")).unwrap();
        let path = format!("/no/such/directory:{}", dir.path().display());
        assert_eq!(registries(address, &path), ["plain.example", "r.example"]);
        assert!(registries(address, "/no/such/directory").is_empty());
    }

    #[test]
    fn who_is_never_asked_is_told() {
        let address: SocketAddr = "127.0.0.1:5051".parse().unwrap();
        let none = found(address, "/etc/certs:/other", true, &[]);
        assert_eq!(none.status, Status::Warning);
        assert!(none.fix.unwrap().contains("> /etc/certs/docker.io/hosts.toml"));
        let names = ["r.example".to_owned()];
        assert_eq!(found(address, "/etc/certs", true, &names).status, Status::Ok);
        assert!(found(address, DIRECTORY, false, &names).fix.unwrap().contains("config_path"));
    }
}
