//! `speedy config hosts`: what containerd needs to start images while their registry is away.

use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context, bail};
use serde_json::json;

use crate::config::Effective;
use crate::registry::{PLAIN, Upstream};

/// Where containerd looks for such files, in its own example and in nerdctl's default.
pub(super) const DIRECTORY: &str = "/etc/containerd/certs.d";

pub(super) fn run(
    effective: &Effective,
    registry: &str,
    plain: bool,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let Some(address) = effective.config.registry else {
        bail!(
            "nothing answers for registries yet: set registry = \"127.0.0.1:5051\" in the configuration of the daemon, or give the \
             address that it has with --registry"
        );
    };
    let upstream = Upstream::of(registry, plain).with_context(|| {
        format!("{registry:?} is no registry: expected a host, such as docker.io or registry.example:5000")
    })?;
    let (path, text) = (format!("{DIRECTORY}/{registry}/hosts.toml"), hosts(&upstream, plain, address));
    match json {
        true => {
            let value = json!({ "registry": registry, "path": path, "hosts": text });
            writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&value)?)?;
        }
        false => write!(std::io::stdout(), "# {path}\n{EXPLANATION}{text}")?,
    }
    Ok(ExitCode::SUCCESS)
}

const EXPLANATION: &str = "\
# The registry itself first, as without this file; while it cannot be reached, what the store knows of its images.
# What the registry needs (ca, client, skip_verify, header) belongs below its [host].
# containerd reads this if config_path is the directory above it: for CRI below [plugins.'io.containerd.cri.v1.images'.registry],
# for the transfer service below [plugins.'io.containerd.transfer.v1.local']; ctr takes --hosts-dir, nerdctl looks there by itself.
";

/// `server` is whom containerd asks last. Without capabilities it would be pushed to.
fn hosts(upstream: &Upstream, plain: bool, address: SocketAddr) -> String {
    let origin = upstream.url().origin().ascii_serialization();
    let path = if plain { PLAIN } else { "" };
    format!(
        "server = \"http://{address}{path}\"\n\
         capabilities = [\"pull\", \"resolve\"]\n\n\
         [host.\"{origin}\"]\n  \
         capabilities = [\"pull\", \"resolve\", \"push\"]\n  \
         dial_timeout = \"2s\"\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(registry: &str, plain: bool) -> (String, Vec<String>) {
        let upstream = Upstream::of(registry, plain).unwrap();
        let text = hosts(&upstream, plain, "127.0.0.1:5051".parse().unwrap());
        let mut lines = text.lines().map(str::to_owned);
        let server = lines.next().unwrap();
        (server, lines.filter(|line| line.starts_with('[')).collect())
    }

    #[test]
    fn the_registry_itself_is_asked_first() {
        for (registry, plain, server, host) in [
            ("docker.io", false, "http://127.0.0.1:5051", "https://registry-1.docker.io"),
            ("r.example", false, "http://127.0.0.1:5051", "https://r.example"),
            ("r.example:5000", false, "http://127.0.0.1:5051", "https://r.example:5000"),
            ("r.example:5000", true, "http://127.0.0.1:5051/http", "http://r.example:5000"),
            ("localhost:5000", false, "http://127.0.0.1:5051", "http://localhost:5000"),
            ("[::1]:5000", false, "http://127.0.0.1:5051", "http://[::1]:5000"),
        ] {
            let expected = (format!("server = \"{server}\""), vec![format!("[host.\"{host}\"]")]);
            assert_eq!(of(registry, plain), expected);
        }
    }
}
