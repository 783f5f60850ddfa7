//! `speedy publish`: an image's layers to the store, without the daemon.

use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;

use self::show::{Meter, Shown};
use self::source::Source;
use self::work::{Present, Work};
use super::Settings;
use super::{ask, trust};
use crate::chunk::merged::Merged;
use crate::chunk::remote::Remote;
use crate::chunk::verified::Verified;
use crate::config::{Config, Effective, StoreUrl};
use crate::containerd::manifest::Platform;
use crate::daemon;

use crate::content::{ContentStore, Options, Parts};
use crate::object::{Objects, Settings as StoreSettings, StoreOptions};

mod archive;
mod layout;
mod name;
mod show;
mod source;
#[cfg(test)]
mod tests;
mod work;

/// The environment variable in which ctr and nerdctl look for the namespace.
const NAMESPACE: &str = "CONTAINERD_NAMESPACE";
/// How long a store that is away is waited for, in each call: somebody is watching, and nothing is lost by going on later.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long reads that nobody waits for any more may take at the end.
const END: Duration = Duration::from_secs(1);

/// The arguments of `speedy publish`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    pub(super) settings: Settings,
    /// The image, by the name that it has in containerd; for a layout or an archive, the name that it is published under
    image: String,
    /// containerd's namespace [environment: CONTAINERD_NAMESPACE; default: default; Kubernetes uses k8s.io]
    #[arg(long, value_name = "NS", conflicts_with_all = ["oci_layout", "docker_archive"])]
    namespace: Option<String>,
    /// Which of the image's platforms, such as linux/arm64 [default: this machine's]
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// Take the image from this OCI image layout instead of containerd
    #[arg(long, value_name = "DIR[:TAG]", conflicts_with = "docker_archive")]
    oci_layout: Option<String>,
    /// Take the image from this archive of `docker save` instead of containerd
    #[arg(long, value_name = "FILE")]
    docker_archive: Option<PathBuf>,
    /// Where layer images are made; as large as the image's files together [default: the root]
    #[arg(long, value_name = "DIR")]
    temp: Option<PathBuf>,
    /// Publish layers that are published already, too
    #[arg(long)]
    force: bool,
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
    let start = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let published = runtime.block_on(async {
        tokio::select! {
            published = publish(effective, arguments, start) => published,
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                bail!("interrupted; what was uploaded stays, run it again to go on")
            }
        }
    });
    runtime.shutdown_timeout(END);
    writeln!(io::stdout(), "{}", published?)?;
    Ok(ExitCode::SUCCESS)
}

/// Publishes and answers what to print.
async fn publish(effective: &Effective, arguments: &Arguments, start: Instant) -> anyhow::Result<String> {
    let config = &with_store(&effective.config).await?;
    let store = Arc::new(open_store(config)?);
    let temp = arguments.temp.clone().unwrap_or_else(|| config.root.clone());
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&temp)
        .with_context(|| temp.display().to_string())?;
    let platform = match &arguments.platform {
        Some(text) => Platform::parse(text)?,
        None => Platform::host(),
    };
    let mut source = match (&arguments.oci_layout, &arguments.docker_archive) {
        (Some(layout), _) => Source::layout(layout)?,
        (None, Some(archive)) => Source::archive(archive)?,
        (None, None) => {
            let set = std::env::var(NAMESPACE).ok().filter(|namespace| !namespace.is_empty());
            let namespace = arguments.namespace.clone().or(set).unwrap_or_else(|| "default".to_owned());
            Source::containerd(&config.containerd, &namespace).await?
        }
    };
    let image = source.image(&arguments.image, &platform).await?;
    // An image of one platform has no index that would have been asked.
    if arguments.platform.is_some() && !platform.takes(&image.platform) {
        bail!("{} is for {} only, not for {platform}", image.reference, image.platform);
    }
    let meter = Arc::new(Meter::new(&image, arguments.json));
    // Also after an interrupt, when threads that still build a layer have the meter.
    let shown = Shown(Arc::clone(&meter));
    let present = if arguments.force { Present::PublishAgain } else { Present::Skip };
    let limits = daemon::remote::limits(config);
    let work = Work { store, source, image, temp, present, limits, meter };
    let outcomes = work.run().await;
    drop(shown);
    work.source.end().await;
    let outcomes = outcomes?;
    Ok(match arguments.json {
        true => serde_json::to_string_pretty(&show::to_json(&work.image, &outcomes, start))?,
        false => show::human(&work.image, &outcomes, start),
    })
}

/// The configuration, with the store and the root of the running daemon where no store is configured.
async fn with_store(config: &Config) -> anyhow::Result<Config> {
    let mut config = config.clone();
    if !config.store.is_empty() {
        return Ok(config);
    }
    let running = ask::running(&config.address).await;
    let Some((store, root)) = running.and_then(|status| Some((status.store?.url, status.root))) else {
        bail!(
            "no store to publish to: give --store file:///DIR or s3://BUCKET/PREFIX, set `store` in the configuration, or name \
             a running daemon that has one with --address"
        );
    };
    config.store = StoreUrl::parse(&store).map_err(anyhow::Error::msg)?;
    config.root = root.into();
    Ok(config)
}

fn open_store(config: &Config) -> anyhow::Result<ContentStore> {
    let options = StoreOptions { settings: StoreSettings::from_env(), ..StoreOptions::default() };
    let objects = Objects::open(config.store.as_str(), &options)?.patient(PATIENCE);
    let chunks = Arc::new(Merged::new(Verified::new(Remote::new(objects.clone()))));
    let key = trust::own_key(&config.root)?;
    let parts = Parts { objects, chunks, key, trust: daemon::remote::trust(config) };
    Ok(ContentStore::new(parts, Options::default()))
}
