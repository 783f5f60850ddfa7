//! `speedy gc`: what no image needs is deleted from the store.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use indicatif::{HumanBytes, HumanCount, HumanDuration};
use serde_json::{Value, json};

use super::long::{self, Display};
use super::{Settings, print, publish};
use crate::config::Effective;
use crate::content::collect::keep::{self, KeepRule};
use crate::content::collect::{Collector, Freed, KindReport, Removed, Report, Rules, Step, Tally};
use crate::object::Objects;
use crate::object::layout::Kind;

/// How often a collection that ran out of time begins again.
const ROUNDS: u32 = 50;
/// What writers and deletions leave in a directory goes when nobody has touched it for so long.
const LEFT: Duration = Duration::from_secs(24 * 3600);
/// Images that are listed for people; all of them are in the JSON.
const MOST_SHOWN: usize = 50;

/// The arguments of `speedy gc`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    settings: Settings,
    /// Delete; without it, only say what would be deleted
    #[arg(long)]
    execute: bool,
    /// How old something must be to be deleted: 48h at least, beside publishers
    #[arg(long, value_name = "TIME", default_value = "48h", value_parser = keep::span)]
    grace: Duration,
    /// How long a layer without the name of an image is kept; not less than the grace period
    #[arg(long, value_name = "TIME", default_value = "7d", value_parser = keep::span)]
    unnamed: Duration,
    /// Nothing publishes to this store and nothing pulls from it meanwhile: the grace period may be shorter
    #[arg(long)]
    alone: bool,
    /// Collect although objects are damaged or missing: what only they need is deleted, and images that need that with it
    ///
    /// For what `speedy fsck --repair` brings back on no node. What is found damaged only when it is executed stops it all the same.
    #[arg(long)]
    ignore_damage: bool,
    /// Collect although not one image has a name
    #[arg(long)]
    no_names: bool,
    /// How many objects are deleted each second at most
    #[arg(long, value_name = "COUNT", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(super) fn take_settings(&mut self) -> Settings {
        std::mem::take(&mut self.settings)
    }

    fn rules(&self, keep: &[String]) -> anyhow::Result<Rules> {
        let keep: Result<Vec<KeepRule>, String> = keep.iter().map(|rule| KeepRule::parse(rule)).collect();
        Ok(Rules {
            grace: self.grace,
            unnamed: self.unnamed,
            keep: keep.map_err(anyhow::Error::msg)?,
            alone: self.alone,
            ignore_damage: self.ignore_damage,
            no_names: self.no_names,
            rate: self.rate,
            ..Rules::default()
        })
    }
}

pub(super) fn run(effective: &Effective, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let collected =
        long::run(collect(effective, arguments), "what is deleted is deleted, run it again to go on")?;
    print(&collected)?;
    Ok(ExitCode::SUCCESS)
}

/// What came of it.
struct Collected {
    report: Report,
    /// Nothing if it was a dry run.
    freed: Option<Freed>,
    /// Why a dry run's plan would not be executed.
    refused: Option<String>,
}

async fn collect(effective: &Effective, arguments: &Arguments) -> anyhow::Result<String> {
    let config = publish::with_store(&effective.config).await?;
    let rules = arguments.rules(&config.gc.keep)?;
    rules.check()?;
    let objects = publish::open_existing(&config, publish::PATIENCE).await?;
    let collector = Collector::new(objects.clone(), rules)?;
    let shown = Display::spinner(arguments.json);
    let watch = |step: Step| show(&shown, step);
    let mut plan = collector.plan(&watch).await?;
    let checked = collector.check(&plan);
    let report = plan.report.clone();
    let collected = if arguments.execute {
        checked?;
        let mut freed = Freed::default();
        for _ in 0..ROUNDS {
            // Publishers are not made to wait for nothing.
            if plan.report.dead().objects == 0 {
                break;
            }
            freed.add(&collector.execute(&plan, &watch).await?);
            if !freed.unfinished {
                break;
            }
            plan = collector.plan(&watch).await?;
        }
        objects.tidy(LEFT).await?;
        Collected { report, freed: Some(freed), refused: None }
    } else {
        Collected { report, freed: None, refused: checked.err().map(|refused| refused.to_string()) }
    };
    drop(shown);
    Ok(match arguments.json {
        true => format!("{}\n", serde_json::to_string_pretty(&to_json(&collected, arguments))?),
        false => human(&collected, arguments, &objects),
    })
}

/// Says on a terminal how far it is.
pub(super) fn show(line: &Display, Step { doing, done, total }: Step) {
    line.set_message(match (done, total) {
        (0, 0) => doing.to_owned(),
        (_, 0) => format!("{doing}: {}", HumanCount(done)),
        _ => {
            format!("{doing}: {} of {}, {} %", HumanCount(done), HumanCount(total), done * 100 / total.max(1))
        }
    });
}

/// What people call a kind.
fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Name => "names",
        kind => kind.prefix(),
    }
}

/// How long ago, for people.
pub(super) fn ago(now: i64, then: i64) -> String {
    let seconds = u64::try_from(now.saturating_sub(then)).unwrap_or(0);
    format!("{:#} ago", HumanDuration(Duration::from_secs(seconds)))
}

fn amount(tally: Tally) -> String {
    match tally.objects {
        0 => "-".to_owned(),
        objects => format!("{} ({})", HumanCount(objects), HumanBytes(tally.bytes)),
    }
}

fn human(collected: &Collected, arguments: &Arguments, objects: &Objects) -> String {
    let (report, now) = (&collected.report, objects.now());
    let mut text = String::new();
    let mut line = |words: String| {
        text.push_str(&words);
        text.push('\n');
    };
    line(format!("{} images stay, {} go", report.images, report.removed.len()));
    for Removed { reference, platform, published, used, why } in report.removed.iter().take(MOST_SHOWN) {
        let (published, used) = (ago(now, *published), ago(now, *used));
        line(format!("  {reference} ({platform}): {why}; published {published}, used {used}"));
    }
    if report.removed.len() > MOST_SHOWN {
        line(format!("  and {} more; --json has all of them", report.removed.len() - MOST_SHOWN));
    }
    line(format!("{:10} {:>22} {:>22} {:>22} {:>22}", "", "needed", "goes now", "goes later", "too young"));
    for found in &report.kinds {
        let KindReport { kind, needed, dead, later, young, oldest, foreign } = found;
        let oldest = oldest.map(|oldest| format!("  oldest {}", ago(now, oldest))).unwrap_or_default();
        let foreign = if *foreign == 0 { String::new() } else { format!("  {foreign} foreign, left alone") };
        let [needed, dead, later, young] = [needed, dead, later, young].map(|tally| amount(*tally));
        line(format!("{:10} {needed:>22} {dead:>22} {later:>22} {young:>22}{oldest}{foreign}", word(*kind)));
    }
    for damage in report.damage.iter().take(MOST_SHOWN) {
        line(format!("unreadable: {}: {}", damage.name, damage.problem));
    }
    let grace = keep::spelled(arguments.grace);
    if report.later().objects > 0 {
        line(format!(
            "what goes later is kept for {grace} after a collection, for nodes that have just begun to fetch it"
        ));
    }
    line(last_line(collected));
    text
}

fn last_line(Collected { report, freed, refused }: &Collected) -> String {
    match (freed, refused) {
        (None, Some(refused)) => format!("--execute would refuse to delete anything: {refused}"),
        (None, None) if report.dead().objects == 0 => "nothing to delete".to_owned(),
        (None, None) => format!("would delete {}; run it with --execute to do so", amount(report.dead())),
        (Some(freed), _) => {
            let spared = match freed.spared {
                0 => String::new(),
                spared => format!("; {spared} became needed or young meanwhile and stay"),
            };
            let unfinished = if freed.unfinished { "; there is more, run it again" } else { "" };
            let deleted = match freed.total() {
                Tally { objects: 0, .. } => "nothing was to be deleted".to_owned(),
                total => format!("deleted {}", amount(total)),
            };
            format!("{deleted}{spared}{unfinished}")
        }
    }
}

fn tally_json(tally: Tally) -> Value {
    json!({ "objects": tally.objects, "bytes": tally.bytes })
}

fn to_json(collected: &Collected, arguments: &Arguments) -> Value {
    let report = &collected.report;
    let kind = |found: &KindReport| {
        json!({
            "kind": word(found.kind),
            "needed": tally_json(found.needed),
            "dead": tally_json(found.dead),
            "later": tally_json(found.later),
            "young": tally_json(found.young),
            "oldest": found.oldest,
            "foreign": found.foreign,
        })
    };
    let removed = |image: &Removed| {
        json!({
            "image": image.reference,
            "platform": image.platform,
            "published": image.published,
            "used": image.used,
            "why": image.why,
        })
    };
    let freed = collected.freed.as_ref().map(|freed| {
        let kinds: serde_json::Map<String, Value> =
            freed.kinds.iter().map(|(kind, tally)| (word(*kind).to_owned(), tally_json(*tally))).collect();
        json!({ "total": tally_json(freed.total()), "kinds": kinds, "spared": freed.spared, "unfinished": freed.unfinished })
    });
    json!({
        "executed": freed.is_some(),
        "grace_seconds": arguments.grace.as_secs(),
        "images": report.images,
        "removed": report.removed.iter().map(removed).collect::<Vec<_>>(),
        "kinds": report.kinds.iter().map(kind).collect::<Vec<_>>(),
        "dead": tally_json(report.dead()),
        "later": tally_json(report.later()),
        "unreadable": report.damage.iter().map(|damage| json!({ "name": damage.name, "problem": damage.problem })).collect::<Vec<_>>(),
        "refused": collected.refused,
        "freed": freed,
    })
}
