//! What `speedy fsck` prints: a bar on a terminal while it runs, and the result.

use std::borrow::Cow;
use std::fmt::Write as _;

use indicatif::BinaryBytes;
use serde_json::{Value, json};

use super::Found;
use super::node::NodeReport;
use super::repair::Outcome;
use crate::cli::long::Display;
use crate::content::fsck::{Finding, Problem, Progress};

/// How many images are named in a line.
const IMAGES: usize = 3;

/// What is shown while it runs.
#[derive(Debug)]
pub(super) struct Meter(Display);

impl Meter {
    pub(super) fn new(json: bool) -> Meter {
        Meter(Display::bar(json, 0))
    }

    pub(super) fn show(&self, Progress { phase, done, total, findings }: Progress) {
        let wrong = if findings == 0 { String::new() } else { format!(", {findings} missing or damaged") };
        self.draw(done, total, format!("{phase}: {done}{wrong}"));
    }

    pub(super) fn say(&self, done: usize, total: usize, what: impl Into<Cow<'static, str>>) {
        self.draw(done as u64, total as u64, what);
    }

    fn draw(&self, done: u64, total: u64, what: impl Into<Cow<'static, str>>) {
        self.0.set_length(total.max(1));
        self.0.set_position(done);
        self.0.set_message(what);
    }

    pub(super) fn end(&self) {
        self.0.set_message("");
        self.0.set_position(0);
    }
}

/// For people.
pub(super) fn human(found: &Found, repair: bool) -> String {
    let report = &found.store;
    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").expect("writing to a string does not fail");
    for (number, finding) in report.findings.iter().enumerate() {
        line(finding_line(finding, found.outcomes.get(number)));
    }
    for newer in &report.newer {
        line(format!("newer      {newer}: written by a newer Speedy; update this one to check it"));
    }
    if let Some(node) = &found.node {
        node_lines(node).into_iter().for_each(&mut line);
    }
    let counted: Vec<String> = report.checked.iter().map(|(kind, count)| counted(kind, *count)).collect();
    line(format!("checked: {}; {} read", counted.join(", "), BinaryBytes(report.bytes)));
    if report.foreign > 0 {
        line(format!("{} objects are not Speedy's; they were left alone", report.foreign));
    }
    line(verdict(found, repair));
    out
}

fn verdict(found: &Found, repair: bool) -> String {
    let wrong = found.store.findings.len() as u64 + found.store.unlisted;
    let local = found.node.as_ref().map_or(0, |node| node.damaged.len());
    let node = match local {
        0 => String::new(),
        count => format!("; {count} layer images of this node are damaged"),
    };
    if wrong == 0 {
        return match (found.store.newer.is_empty(), local) {
            (true, 0) => "clean".to_owned(),
            (true, _) => format!("the store is clean{node}"),
            (false, _) => format!("what this version can read is sound{node}"),
        };
    }
    if !repair {
        return format!(
            "{wrong} objects are missing or damaged{node}; --repair brings back what can be had here"
        );
    }
    let repaired =
        found.outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Repaired)).count() as u64;
    match wrong - repaired {
        0 => format!("{wrong} objects were missing or damaged, all were repaired{node}"),
        left => format!(
            "{wrong} objects were missing or damaged, {repaired} were repaired, {left} could not be{node}; run it on other nodes \
             that have these images, or publish the images again"
        ),
    }
}

fn counted(kind: &str, count: u64) -> String {
    match (kind, count) {
        (kind, 1) => format!("1 {kind}"),
        ("index", _) => format!("{count} indexes"),
        (kind, _) => format!("{count} {kind}s"),
    }
}

fn finding_line(finding: &Finding, outcome: Option<&Outcome>) -> String {
    let (word, detail) = match &finding.problem {
        Problem::Missing => ("missing", String::new()),
        Problem::Damaged(how) => ("damaged", format!(" ({how})")),
    };
    let mut text = format!("{word:<9}  {}{detail}: ", finding.object.name());
    match (finding.layer_count, finding.image_count) {
        (0, 0) => text.push_str("no image is known to need it"),
        (layers, 0) => {
            let layers = counted("layer", layers as u64);
            write!(text, "{layers}, no named image").expect("writing to a string does not fail")
        }
        (layers, images) => {
            let names = finding
                .images
                .iter()
                .take(IMAGES)
                .map(|image| format!("{} ({})", image.reference, image.platform));
            let names: Vec<String> = names.collect();
            let more = if images > IMAGES { format!(" and {} more", images - IMAGES) } else { String::new() };
            let layers = counted("layer", layers as u64);
            write!(text, "{layers}; {}{more}", names.join(", ")).expect("writing to a string does not fail");
        }
    }
    match outcome {
        None => {}
        Some(Outcome::Repaired) => text.push_str("\n           repaired"),
        Some(Outcome::Left(why)) => {
            write!(text, "\n           not repaired: {why}").expect("writing to a string does not fail");
        }
    }
    text
}

fn node_lines(node: &NodeReport) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for damaged in &node.damaged {
        lines.push(format!(
            "damaged    layer image {} of this node: {}; {}",
            damaged.serial, damaged.problem, damaged.to_do
        ));
    }
    let mut line =
        format!("this node: {} layer images checked, {} read", node.checked, BinaryBytes(node.bytes));
    for (count, told) in [
        (node.incomplete, "not wholly here, of which only what is here was checked"),
        (
            node.without_index,
            "without an index were passed over: they were made here and not published, so nothing says what they should be",
        ),
        (
            node.unvouched,
            "not wholly here were passed over: nothing vouches for what is there, and the daemon hashes it before it is used",
        ),
    ] {
        if count > 0 {
            write!(line, "; {count} {told}").expect("writing to a string does not fail");
        }
    }
    lines.push(line);
    lines
}

/// For scripts.
pub(super) fn json(found: &Found, code: u8) -> Value {
    let report = &found.store;
    let findings = report.findings.iter().enumerate();
    json!({
        "code": code,
        "checked": report.checked,
        "bytes": report.bytes,
        "findings": findings.map(|(n, finding)| finding_json(finding, found.outcomes.get(n))).collect::<Vec<_>>(),
        "unlisted": report.unlisted,
        "newer": report.newer,
        "foreign": report.foreign,
        "node": found.node.as_ref().map(node_json),
    })
}

fn finding_json(finding: &Finding, outcome: Option<&Outcome>) -> Value {
    let (problem, detail) = match &finding.problem {
        Problem::Missing => ("missing", None),
        Problem::Damaged(how) => ("damaged", Some(how)),
    };
    let layers = finding.layers.iter().map(|layer| {
        json!({
            "chain": layer.chain.as_ref().map(ToString::to_string),
            "diff_id": layer.diff_id.as_ref().map(ToString::to_string),
            "index": layer.index.as_ref().map(ToString::to_string),
        })
    });
    let images = finding
        .images
        .iter()
        .map(|image| json!({ "reference": image.reference, "platform": image.platform }));
    json!({
        "object": finding.object.name(),
        "kind": finding.object.kind(),
        "problem": problem,
        "detail": detail,
        "layers": layers.collect::<Vec<_>>(),
        "layer_count": finding.layer_count,
        "images": images.collect::<Vec<_>>(),
        "image_count": finding.image_count,
        "repaired": outcome.map(|outcome| matches!(outcome, Outcome::Repaired)),
        "why_not": outcome.and_then(|outcome| match outcome {
            Outcome::Repaired => None,
            Outcome::Left(why) => Some(why),
        }),
    })
}

fn node_json(node: &NodeReport) -> Value {
    let damaged = node.damaged.iter().map(
        |damaged| json!({ "serial": damaged.serial, "problem": damaged.problem, "to_do": damaged.to_do }),
    );
    json!({
        "checked": node.checked,
        "bytes": node.bytes,
        "incomplete": node.incomplete,
        "passed_over": node.without_index + node.unvouched,
        "without_index": node.without_index,
        "unvouched": node.unvouched,
        "damaged": damaged.collect::<Vec<_>>(),
    })
}
