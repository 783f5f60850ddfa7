//! `speedy publish`: an image's layers to the store, without the daemon.

use std::collections::HashSet;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;

use self::show::{Meter, Shown};
use self::source::{Image, Source};
use self::work::{Present, Work};
use super::{Settings, ask, long, namespace_or_default, platform_or_host, trust};
use crate::chunk::ChunkId;
use crate::chunk::merged::Merged;
use crate::chunk::remote::Remote;
use crate::chunk::verified::Verified;
use crate::config::{Config, Effective, StoreUrl};
use crate::containerd::manifest::Platform;
use crate::daemon;

use crate::content::{ContentStore, Options, Parts};
use crate::object::layout::{Kind, STORE};
use crate::object::{ObjectError, Objects, Settings as StoreSettings, StoreOptions};

mod archive;
mod layout;
mod name;
mod show;
pub(super) mod source;
#[cfg(test)]
mod tests;
mod work;

/// How long a store that is away is waited for, in each call: somebody is watching, and nothing is lost by going on later.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
/// How long a store that does not answer is asked before that is said.
const FIRST_ANSWER: Duration = Duration::from_secs(20);

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
    let then = "what was uploaded stays, run it again to go on";
    let published = long::run(publish(effective, arguments, start), then)?;
    writeln!(io::stdout(), "{published}")?;
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
    let platform = platform_or_host(arguments.platform.as_deref())?;
    let mut source = match (&arguments.oci_layout, &arguments.docker_archive) {
        (Some(layout), _) => Source::layout(layout)?,
        (None, Some(archive)) => Source::archive(archive)?,
        (None, None) => {
            let namespace = namespace_or_default(arguments.namespace.clone());
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
pub(super) async fn with_store(config: &Config) -> anyhow::Result<Config> {
    let mut config = config.clone();
    if !config.store.is_empty() {
        return Ok(config);
    }
    let running = ask::running(&config.address).await;
    let Some((store, root)) = running.and_then(|status| Some((status.store?.url, status.root))) else {
        bail!(
            "no store is configured: give --store file:///DIR or s3://BUCKET/PREFIX, set `store` in the configuration, or name \
             a running daemon that has one with --address"
        );
    };
    config.store = StoreUrl::parse(&store).map_err(anyhow::Error::msg)?;
    config.root = root.into();
    Ok(config)
}

/// The objects of the configured store, for somebody who watches and waits.
pub(super) fn open_objects(config: &Config) -> anyhow::Result<Objects> {
    Ok(open_impatient(config)?.patient(PATIENCE))
}

/// The same for somebody who is told soon that it does not answer.
fn open_impatient(config: &Config) -> anyhow::Result<Objects> {
    let options = StoreOptions { settings: StoreSettings::from_env(), ..StoreOptions::default() };
    Ok(Objects::open(config.store.as_str(), &options)?)
}

/// The same for somebody who looks at what is there: told soon if the store does not answer, or if there is nothing. Mostly another store
/// is meant then, or its file system is not mounted, and neither is a sound store.
pub(super) async fn open_existing(config: &Config, patience: Duration) -> anyhow::Result<Objects> {
    let objects = open_impatient(config)?;
    if !holds_anything(&objects.within(FIRST_ANSWER)).await? {
        bail!(
            "there is nothing at {}: nothing was published to it yet, or it is not mounted, or another store is meant",
            config.store.as_str()
        );
    }
    Ok(objects.patient(patience))
}

async fn holds_anything(objects: &Objects) -> Result<bool, ObjectError> {
    if objects.stat(STORE).await?.is_some() {
        return Ok(true);
    }
    for kind in Kind::ALL {
        if !objects.list(kind.prefix(), 1).await?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn open_store(config: &Config) -> anyhow::Result<ContentStore> {
    content_store(config, &open_objects(config)?, Arc::default())
}

/// Layers on this store, signed with this node's key; `doubted` chunks are written although they are there.
pub(super) fn content_store(
    config: &Config,
    objects: &Objects,
    doubted: Arc<HashSet<ChunkId>>,
) -> anyhow::Result<ContentStore> {
    let objects = objects.clone();
    let chunks = Arc::new(Merged::new(Verified::new(Remote::new(objects.clone()))));
    let key = trust::own_key(&config.root)?;
    let parts = Parts { objects, chunks, key, trust: daemon::remote::trust(config) };
    Ok(ContentStore::new(parts, Options { doubted, ..Options::default() }))
}

/// An image of containerd that is published once more, for a repair.
pub(super) struct Again<'a> {
    pub(super) config: &'a Config,
    pub(super) content: Arc<ContentStore>,
    pub(super) namespace: &'a str,
    /// What containerd calls it, and what it is published as.
    pub(super) record: &'a str,
    pub(super) reference: &'a str,
    pub(super) platform: &'a str,
    pub(super) temp: &'a Path,
}

impl Again<'_> {
    /// All of it, whatever the store says it has.
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let platform = Platform::parse(self.platform)?;
        let mut source = Source::containerd(&self.config.containerd, self.namespace).await?;
        let found = source.image(self.record, &platform).await;
        let done = match found {
            Ok(image) => {
                let image = Image { reference: self.reference.to_owned(), ..image };
                let meter = Arc::new(Meter::new(&image, true));
                let (store, temp, limits) =
                    (self.content, self.temp.to_owned(), daemon::remote::limits(self.config));
                let present = Present::PublishAgain;
                let work = Work { store, source, image, temp, present, limits, meter };
                let done = work.run().await;
                source = work.source;
                done.map(drop)
            }
            Err(error) => Err(error),
        };
        source.end().await;
        done
    }
}
