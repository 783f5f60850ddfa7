//! `speedy images`: what the store has, and the removal of images from it.

use std::process::ExitCode;

use anyhow::ensure;
use clap::{Args, Subcommand};
use indicatif::HumanBytes;
use serde_json::{Value, json};

use super::gc::{self, ago};
use super::long::{self, Display};
use super::{Settings, print, publish};
use crate::config::Effective;
use crate::content::pattern::Pattern;
use crate::content::survey::{Line, Survey};
use crate::object::{Deletion, Objects};

/// The arguments of `speedy images`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Arguments {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    settings: Settings,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Remove images from the store by their names
    ///
    /// Only the names go; what nothing else needs is deleted by `speedy gc`. A node that still has such an image in containerd, and
    /// publishes, names it again when it starts: remove it there first.
    Rm {
        #[command(flatten)]
        settings: Box<Settings>,
        /// Names, or patterns of names with * and ?
        #[arg(required = true, value_name = "PATTERN")]
        patterns: Vec<String>,
        /// Only this platform, such as linux/arm64
        #[arg(long, value_name = "PLATFORM")]
        platform: Option<String>,
        /// Remove them; without it, only say which ones
        #[arg(long)]
        execute: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// What `rm` is to do.
struct Removal {
    patterns: Vec<Pattern>,
    platform: Option<String>,
    execute: bool,
}

impl Arguments {
    pub(super) fn take_settings(&mut self) -> Settings {
        match &mut self.verb {
            Some(Verb::Rm { settings, .. }) => std::mem::take(settings),
            None => std::mem::take(&mut self.settings),
        }
    }
}

pub(super) fn run(effective: &Effective, arguments: Arguments) -> anyhow::Result<ExitCode> {
    let (json, removal) = match arguments.verb {
        None => (arguments.json, None),
        Some(Verb::Rm { patterns, platform, execute, json, .. }) => {
            let patterns: Result<_, String> = patterns.iter().map(|text| Pattern::parse(text)).collect();
            (json, Some(Removal { patterns: patterns.map_err(anyhow::Error::msg)?, platform, execute }))
        }
    };
    print(&long::run(look(effective, json, removal), "run it again to go on")?)?;
    Ok(ExitCode::SUCCESS)
}

async fn look(effective: &Effective, json: bool, removal: Option<Removal>) -> anyhow::Result<String> {
    let config = publish::with_store(&effective.config).await?;
    let objects = publish::open_existing(&config, publish::PATIENCE).await?;
    let shown = Display::spinner(json);
    let survey = Survey::of(objects.clone(), &|step| gc::show(&shown, step)).await?;
    drop(shown);
    let now = objects.now();
    let Some(removal) = removal else {
        return Ok(match json {
            true => format!("{}\n", serde_json::to_string_pretty(&to_json(&survey))?),
            false => human(&survey, now),
        });
    };
    remove(&survey, &objects, &removal, json).await
}

async fn remove(survey: &Survey, objects: &Objects, removal: &Removal, json: bool) -> anyhow::Result<String> {
    let Removal { patterns, platform, execute } = removal;
    let is_meant = |line: &&Line| {
        platform.as_ref().is_none_or(|platform| *platform == line.platform)
            && patterns.iter().any(|pattern| pattern.matches(&line.reference))
    };
    let lines: Vec<&Line> = survey.images.iter().filter(is_meant).collect();
    ensure!(!lines.is_empty(), "no image in the store has such a name; `speedy images` lists them");
    let mut kept = 0;
    if *execute {
        for entry in lines.iter().flat_map(|line| &line.objects) {
            // What was written since is another image.
            let came = objects.delete_unless_young(&entry.name(), entry.modified + 1).await?;
            kept += u64::from(came == Deletion::Young);
        }
    }
    if json {
        let images: Vec<Value> = lines.iter().map(|line| line_json(line)).collect();
        let value = json!({ "executed": execute, "images": images, "kept": kept });
        return Ok(format!("{}\n", serde_json::to_string_pretty(&value)?));
    }
    let verb = if *execute { "removed" } else { "would remove" };
    let mut text: String =
        lines.iter().map(|line| format!("{verb} {} ({})\n", line.reference, line.platform)).collect();
    if kept > 0 {
        text.push_str(&format!("{kept} names were written again meanwhile and stay\n"));
    }
    text.push_str(match execute {
        true => "speedy gc --execute deletes what nothing else needs\n",
        false => "run it with --execute to do so\n",
    });
    Ok(text)
}

fn human(survey: &Survey, now: i64) -> String {
    let size = |bytes| HumanBytes(bytes).to_string();
    let rows: Vec<[String; 7]> = survey
        .images
        .iter()
        .map(|line| {
            [
                line.reference.clone(),
                line.platform.clone(),
                size(line.bytes),
                size(line.own_bytes),
                ago(now, line.published),
                ago(now, line.used),
                if line.is_complete() { "yes".to_owned() } else { format!("no: {}", line.problems[0]) },
            ]
        })
        .collect();
    let head = ["IMAGE", "PLATFORM", "BYTES", "OWN", "PUBLISHED", "USED", "COMPLETE"].map(str::to_owned);
    let width = |column: usize| {
        rows.iter().chain([&head]).map(|row| row[column].chars().count()).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..6).map(width).collect();
    let line = |row: &[String; 7]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}  "));
        format!("{}{}\n", cells.collect::<String>(), row[6])
    };
    let mut text: String = [&head].into_iter().chain(&rows).map(line).collect();
    text.push_str(&format!(
        "{} images; {} in chunks, {} of it needed by no image\n",
        survey.images.len(),
        size(survey.chunk_bytes),
        size(survey.unused_bytes)
    ));
    if survey.unreadable > 0 {
        text.push_str(&format!("names that cannot be read: {}; speedy fsck says why\n", survey.unreadable));
    }
    text
}

fn line_json(line: &Line) -> Value {
    json!({
        "image": line.reference,
        "platform": line.platform,
        "manifest": line.manifest,
        "publishers": line.publishers,
        "published": line.published,
        "used": line.used,
        "layers": line.layers,
        "bytes": line.bytes,
        "own_bytes": line.own_bytes,
        "shared_bytes": line.bytes - line.own_bytes,
        "complete": line.is_complete(),
        "problems": line.problems,
    })
}

fn to_json(survey: &Survey) -> Value {
    json!({
        "images": survey.images.iter().map(line_json).collect::<Vec<_>>(),
        "unreadable_names": survey.unreadable,
        "chunk_bytes": survey.chunk_bytes,
        "unused_bytes": survey.unused_bytes,
    })
}
