//! `speedy fsck`: what is missing or damaged on the store and in this node's layer images, and bringing it back.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;

use self::node::NodeReport;
use self::repair::{Outcome, Repair};
use self::show::Meter;
use super::{Settings, long, print, publish};
use crate::config::{ByteSize, Config};
use crate::content::fsck::{Checker, Options, Report};

mod node;
mod registry;
mod repair;
mod show;

/// Nothing is missing or damaged, or everything was brought back.
const CLEAN: u8 = 0;
const DAMAGED: u8 = 1;
/// Nothing can be said, or not of everything.
const CANNOT_TELL: u8 = 2;

/// How long it may be away once it has answered.
const PATIENCE: Duration = Duration::from_secs(60);

/// The arguments of `speedy fsck`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    settings: Settings,
    /// Bring back what is missing or damaged: from this node's layer images, from containerd's content store, and by publishing
    /// images again. Right bytes are written over wrong ones; nothing is deleted
    #[arg(long)]
    repair: bool,
    /// With --repair: what neither this node nor its containerd has is fetched from the images' registries, as `speedy fetch` does
    #[arg(long, requires = "repair")]
    from_registry: bool,
    /// containerd's configuration of registries [default: /etc/containerd/certs.d, if it is there]
    #[arg(long, value_name = "DIR", requires = "from_registry")]
    hosts_dir: Option<std::path::PathBuf>,
    /// Do not read chunks and documents: only look whether they are there, and of a size that they can have
    #[arg(long)]
    quick: bool,
    /// The most bytes a second that are read, such as 20MiB [default: no limit]
    #[arg(long, value_name = "BYTES")]
    rate: Option<String>,
    /// Look at the store alone, not at this node's layer images
    #[arg(long)]
    store_only: bool,
    /// Where layer images are made that are published again [default: the root]
    #[arg(long, value_name = "DIR")]
    temp: Option<std::path::PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Everything that a run has found and done.
struct Found {
    store: Report,
    /// What became of each finding, in their order; nothing without `--repair`.
    outcomes: Vec<Outcome>,
    node: Option<NodeReport>,
}

impl Found {
    fn is_damaged(&self) -> bool {
        let all_repaired = self.outcomes.len() == self.store.findings.len()
            && self.outcomes.iter().all(|outcome| matches!(outcome, Outcome::Repaired));
        let store = !self.store.is_clean() && (self.store.unlisted > 0 || !all_repaired);
        store || self.node.as_ref().is_some_and(|node| !node.damaged.is_empty())
    }

    fn code(&self) -> u8 {
        match self.is_damaged() {
            true => DAMAGED,
            false if !self.store.newer.is_empty() => CANNOT_TELL,
            false => CLEAN,
        }
    }
}

/// Every failure is one of telling.
pub(super) fn run(mut arguments: Arguments) -> anyhow::Result<ExitCode> {
    let settings = std::mem::take(&mut arguments.settings);
    let then = "what was repaired stays, run it again to go on";
    let checked = settings.load().and_then(|effective| long::run(check(&effective.config, &arguments), then));
    match checked {
        Ok(found) => {
            let text = match arguments.json {
                true => format!("{:#}\n", show::json(&found, found.code())),
                false => show::human(&found, arguments.repair),
            };
            print(&text)?;
            Ok(ExitCode::from(found.code()))
        }
        Err(error) => {
            #[expect(
                clippy::print_stderr,
                reason = "the other place where errors are printed: this one has a code of its own"
            )]
            {
                eprintln!("speedy: cannot tell whether the store is sound: {error:#}");
            }
            Ok(ExitCode::from(CANNOT_TELL))
        }
    }
}

async fn check(config: &Config, arguments: &Arguments) -> anyhow::Result<Found> {
    let config = &publish::with_store(config).await?;
    let rate = match &arguments.rate {
        Some(text) => ByteSize::parse(text).map_err(anyhow::Error::msg).context("--rate")?.bytes(),
        None => 0,
    };
    let objects = publish::open_existing(config, PATIENCE).await?;
    let checker = Checker::new(objects.clone(), Options { quick: arguments.quick, rate });
    let meter = Meter::new(arguments.json);
    let store = checker.check(&|progress| meter.show(progress)).await?;
    meter.end();
    let outcomes = match arguments.repair && !store.is_clean() {
        true => {
            let repair = Repair::new(config, &objects, &checker, &store, arguments.temp.as_deref())?;
            let registry = arguments.from_registry.then_some(arguments.hosts_dir.as_deref());
            repair.run(registry, &meter).await?
        }
        false => Vec::new(),
    };
    meter.end();
    let node = match arguments.store_only {
        true => None,
        false => Some(node::check(config, arguments.quick, rate, arguments.repair, &meter).await?),
    };
    meter.end();
    Ok(Found { store, outcomes, node })
}

#[cfg(test)]
mod tests;
