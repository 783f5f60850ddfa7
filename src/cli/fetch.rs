//! `speedy fetch`: an image's blobs from the registry into containerd's content store.

use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use indicatif::HumanBytes;
use serde_json::{Value, json};

use super::long::{self, Display};
use super::publish::source::{connect, find_image};
use super::{Settings, hosts, namespace_or_default, platform_or_host};
use crate::config::Effective;
use crate::containerd::image::Image;
use crate::containerd::manifest::{Descriptor, Platform};
use crate::containerd::transfer::{Credentials, Fetch};
use crate::containerd::{Containerd, ContainerdError};
use crate::content::name::repository;
use crate::oci::Digest;
use crate::registry::Upstream;

/// How often progress is looked at.
const TICK: Duration = Duration::from_millis(200);

/// The arguments of `speedy fetch`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    settings: Settings,
    /// The image, by the name that it has in containerd
    image: String,
    /// containerd's namespace [environment: CONTAINERD_NAMESPACE; default: default; Kubernetes uses k8s.io]
    #[arg(long, short, value_name = "NS")]
    namespace: Option<String>,
    /// Which of the image's platforms, such as linux/arm64 [default: this machine's]
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// containerd's configuration of registries [default: /etc/containerd/certs.d, if it is there]
    #[arg(long, value_name = "DIR")]
    hosts_dir: Option<PathBuf>,
    /// Who you are to the registry; without a password it is read from standard input, one line
    #[arg(long, short, value_name = "USER[:PASSWORD]")]
    user: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(super) fn take_settings(&mut self) -> Settings {
        std::mem::take(&mut self.settings)
    }
}

pub(super) fn run(effective: &Effective, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let then = "run it again to go on with what containerd has kept";
    let text = long::run(fetch(&effective.config.containerd, arguments), then)?;
    writeln!(io::stdout(), "{text}")?;
    Ok(ExitCode::SUCCESS)
}

/// A blob of the image, and whether it was here before.
struct Blob {
    digest: Digest,
    size: u64,
    here: bool,
}

/// Fetches and answers what to print.
async fn fetch(socket: &Path, arguments: &Arguments) -> anyhow::Result<String> {
    let start = Instant::now();
    let platform = platform_or_host(arguments.platform.as_deref())?;
    let client = connect(socket, &namespace_or_default(arguments.namespace.clone())).await?;
    let image = find_image(&client, &arguments.image).await?;
    let (hosts, user) = (arguments.hosts_dir.as_deref(), arguments.user.as_deref());
    let wanted = to_fetch(&image.name, &image.target.digest, &platform, hosts, user)?;
    let mut blobs = blobs(&client, &image, &platform).await?;
    let lacking =
        |blobs: &Option<Vec<Blob>>| blobs.as_ref().is_none_or(|blobs| blobs.iter().any(|blob| !blob.here));
    if lacking(&blobs) {
        let shown = Shown::new(blobs.as_deref(), arguments.json);
        let fetched = tokio::select! {
            fetched = client.fetch(&image, &wanted) => fetched,
            () = shown.follow(&client) => Ok(()),
        };
        drop(shown);
        fetched.with_context(|| format!("cannot fetch {}", wanted.reference))?;
        let now = self::blobs(&client, &image, &platform).await?;
        ensure!(
            !lacking(&now),
            "containerd says that it has fetched {}, but blobs are missing: run it again",
            wanted.reference
        );
        // Documents were missing, so that nobody could say what else was.
        blobs = blobs
            .or_else(|| now.map(|now| now.into_iter().map(|blob| Blob { here: false, ..blob }).collect()));
    }
    let blobs = blobs.unwrap_or_default();
    Ok(match arguments.json {
        true => serde_json::to_string_pretty(&to_json(&image, &wanted, &client, &blobs, start))?,
        false => human(&image, &blobs, start),
    })
}

/// What the image `name` is here, wherever its tag points by now.
pub(super) fn to_fetch(
    name: &str,
    target: &Digest,
    platform: &Platform,
    hosts: Option<&Path>,
    user: Option<&str>,
) -> anyhow::Result<Fetch> {
    let repository = repository(name);
    let Some((registry, _)) = repository.split_once('/') else {
        bail!("{name} names no registry; give the image by the name under which it was pulled");
    };
    let upstream = Upstream::of(registry, false);
    let upstream = upstream.with_context(|| format!("{registry:?} in {name} is no registry"))?;
    let hosts = hosts
        .map(Path::to_owned)
        .or_else(|| Some(PathBuf::from(hosts::DIRECTORY)).filter(|dir| dir.is_dir()));
    let hosts_dir = hosts.map(std::path::absolute).transpose()?.unwrap_or_default();
    let credentials = match user {
        Some(user) => Some(credentials(user, &upstream, &mut io::stdin().lock())?),
        None => None,
    };
    Ok(Fetch {
        reference: format!("{repository}@{target}"),
        platform: platform.clone(),
        hosts_dir: hosts_dir.to_string_lossy().into_owned(),
        credentials,
    })
}

fn credentials(user: &str, upstream: &Upstream, input: &mut dyn BufRead) -> anyhow::Result<Credentials> {
    let (user, secret) = match user.split_once(':') {
        Some((user, secret)) => (user, secret.to_owned()),
        None => {
            let mut line = String::new();
            input.read_line(&mut line).context("the password, from standard input")?;
            (user, line.trim_end_matches(['\r', '\n']).to_owned())
        }
    };
    ensure!(!secret.is_empty(), "no password: give --user USER:PASSWORD, or the password on standard input");
    let url = upstream.url();
    let host = match (url.host_str().unwrap_or_default(), url.port()) {
        (host, Some(port)) => format!("{host}:{port}"),
        (host, None) => host.to_owned(),
    };
    Ok(Credentials { host, user: user.to_owned(), secret })
}

/// The layers' blobs, each once; `None` where documents are missing that would tell.
async fn blobs(client: &Containerd, image: &Image, platform: &Platform) -> anyhow::Result<Option<Vec<Blob>>> {
    let layers = match client.image_layers(image, platform).await {
        Ok(layers) => layers,
        Err(ContainerdError::NoBlob { .. }) => return Ok(None),
        Err(error) => return Err(error).context(image.name.clone()),
    };
    let mut blobs: Vec<Blob> = Vec::new();
    for Descriptor { digest, size, .. } in layers.into_iter().map(|layer| layer.blob) {
        if blobs.iter().all(|blob| blob.digest != digest) {
            let here = client.blob(&digest).await?.is_some();
            blobs.push(Blob { digest, size, here });
        }
    }
    Ok(Some(blobs))
}

/// The progress on a terminal; goes away when it is dropped.
struct Shown {
    line: Display,
    lacking: Vec<(Digest, u64)>,
}

impl Shown {
    fn new(blobs: Option<&[Blob]>, json: bool) -> Shown {
        let lacking = blobs.unwrap_or_default().iter().filter(|blob| !blob.here);
        let lacking: Vec<(Digest, u64)> = lacking.map(|blob| (blob.digest.clone(), blob.size)).collect();
        Shown { line: Display::bar(json, lacking.iter().map(|(_, size)| size).sum()), lacking }
    }

    /// Never ends by itself.
    async fn follow(&self, client: &Containerd) {
        if self.line.is_hidden() {
            return std::future::pending().await;
        }
        loop {
            // What cannot be asked now is shown the next time.
            if let Ok((done, bytes)) = self.look(client).await {
                self.line.set_position(bytes);
                let rate = self.line.per_sec();
                let of = self.lacking.len();
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a rate that is shown"
                )]
                let rate = HumanBytes(rate as u64);
                self.line.set_message(format!("{done}/{of} blobs, {}, {rate}/s", HumanBytes(bytes)));
            }
            tokio::time::sleep(TICK).await;
        }
    }

    /// How many blobs are here, and how many bytes of all.
    async fn look(&self, client: &Containerd) -> Result<(usize, u64), ContainerdError> {
        let ingests = client.ingests().await?;
        let (mut done, mut bytes) = (0, 0);
        for (digest, size) in &self.lacking {
            match ingests.iter().find(|ingest| ingest.name.ends_with(digest.as_str())) {
                Some(ingest) => bytes += ingest.bytes.min(*size),
                None if client.blob(digest).await?.is_some() => {
                    done += 1;
                    bytes += size;
                }
                None => {}
            }
        }
        Ok((done, bytes))
    }
}

fn human(image: &Image, blobs: &[Blob], start: Instant) -> String {
    let fetched: Vec<&Blob> = blobs.iter().filter(|blob| !blob.here).collect();
    if fetched.is_empty() {
        return format!("all {} layers of {} are in the content store already", blobs.len(), image.name);
    }
    let bytes = fetched.iter().map(|blob| blob.size).sum();
    format!(
        "fetched {}: {} of {} layers, {} in {:.1} s",
        image.name,
        fetched.len(),
        blobs.len(),
        HumanBytes(bytes),
        start.elapsed().as_secs_f64()
    )
}

fn to_json(image: &Image, wanted: &Fetch, client: &Containerd, blobs: &[Blob], start: Instant) -> Value {
    let blob =
        |blob: &Blob| json!({ "digest": blob.digest.as_str(), "size": blob.size, "fetched": !blob.here });
    json!({
        "image": image.name,
        "namespace": client.namespace(),
        "reference": wanted.reference,
        "platform": wanted.platform.to_string(),
        "seconds": start.elapsed().as_secs_f64(),
        "layers": blobs.iter().map(blob).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_comes_with_the_name_or_on_standard_input() {
        let upstream = |registry: &str| Upstream::of(registry, false).unwrap();
        let read = |user: &str, registry: &str, mut input: &[u8]| {
            credentials(user, &upstream(registry), &mut input)
                .map(|found| (found.host, found.user, found.secret))
        };
        let told =
            |host: &str, user: &str, secret: &str| (host.to_owned(), user.to_owned(), secret.to_owned());
        assert_eq!(read("me:a:b", "r.example:5000", b"x").unwrap(), told("r.example:5000", "me", "a:b"));
        assert_eq!(
            read("me", "docker.io", b"a b\r\nc\n").unwrap(),
            told("registry-1.docker.io", "me", "a b")
        );
        assert_eq!(read(":token", "r.example", b"").unwrap(), told("r.example", "", "token"));
        for (user, input) in [("me:", &b""[..]), ("me", b""), ("me", b"\n")] {
            assert!(read(user, "r.example", input).is_err(), "{user}");
        }
    }
}
