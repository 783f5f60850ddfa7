//! `speedy check`: what works on this machine, what does not, and the exact lines that change it.
//!
//! Where: the verb of the command line calls [`run`] with the effective configuration and what it found out about the
//! store; the [`Report`] renders itself for people and for programs. The rooms: `host` looks at kernel, storage and
//! process, `client` asks containerd, `containerd` judges its answers, `settings` reads its configuration files.
//!
//! Words: a *probe* gathers facts, a *finding* is one judgement on them: a mark, a sentence, and where something is to
//! be done, the *fix*: lines to add or a command to run. *Skipped* means that nothing could be found out, and says why.
//!
//! Invariants:
//! 1. Probing changes nothing: trial mounts live in a directory of their own and are gone when the probe returns.
//! 2. A missing containerd, or a missing configuration file of it, is never a failure: Speedy starts without either.
//! 3. A judgement is a function of values, so that each can be tested without the machine it describes.
//! 4. Every finding that is not fine says what to do, unless nothing can be done.
//!
//! When it fails: a probe that cannot look becomes a skipped finding; the report always comes to its end. A crash in a
//! trial leaves a directory `.probe-<pid>` or `.check-<pid>` beside the data, which may be deleted.

use std::net::SocketAddr;
use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

use crate::config::{Config, LayerSharing};

pub mod client;
pub mod containerd;
pub mod host;
mod pool;
pub mod settings;
pub mod store;

/// The name under which containerd knows us.
pub const NAME: &str = "speedy";

/// How a judgement came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It works.
    Ok,
    /// It works, but somebody should know.
    Warning,
    /// It does not work.
    Failure,
    /// It could not be looked at.
    Skipped,
}

impl Status {
    /// What stands before the finding.
    fn mark(self) -> &'static str {
        match self {
            Status::Ok => "ok  ",
            Status::Warning => "WARN",
            Status::Failure => "FAIL",
            Status::Skipped => "skip",
        }
    }
}

/// What a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Area {
    /// What the kernel can do.
    Kernel,
    /// The file system below the root.
    Storage,
    /// The rights and limits of the daemon.
    Process,
    /// containerd as it runs.
    Containerd,
    /// containerd's configuration files.
    Configuration,
    /// Our metadata against our disk.
    Store,
}

impl Area {
    fn heading(self) -> &'static str {
        match self {
            Area::Kernel => "Kernel",
            Area::Storage => "Storage",
            Area::Process => "Process",
            Area::Containerd => "containerd",
            Area::Configuration => "containerd's configuration",
            Area::Store => "Store",
        }
    }
}

/// One judgement. Area and title together are stable and unique in a report; the detail is for reading.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub area: Area,
    /// What was looked at, in a few words that do not change with the outcome.
    pub title: &'static str,
    /// How it came out.
    pub status: Status,
    /// What was found and what follows from it.
    pub detail: String,
    /// The lines to add or the command to run.
    pub fix: Option<String>,
}

impl Finding {
    fn new(area: Area, title: &'static str, status: Status, detail: impl Into<String>) -> Finding {
        Finding { area, title, status, detail: detail.into(), fix: None }
    }

    /// It works.
    pub fn ok(area: Area, title: &'static str, detail: impl Into<String>) -> Finding {
        Finding::new(area, title, Status::Ok, detail)
    }

    /// It works, but somebody should know.
    pub fn warning(area: Area, title: &'static str, detail: impl Into<String>) -> Finding {
        Finding::new(area, title, Status::Warning, detail)
    }

    /// It does not work.
    pub fn failure(area: Area, title: &'static str, detail: impl Into<String>) -> Finding {
        Finding::new(area, title, Status::Failure, detail)
    }

    /// It could not be looked at.
    pub fn skipped(area: Area, title: &'static str, reason: impl Into<String>) -> Finding {
        Finding::new(area, title, Status::Skipped, reason)
    }

    /// The same with what to do about it.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Finding {
        self.fix = Some(fix.into());
        self
    }
}

/// What the caller found out about the store: judgements, and the object shown as `store` in JSON.
#[derive(Debug, Clone, Default)]
pub struct StoreReport {
    /// Judgements, with [`Area::Store`].
    pub findings: Vec<Finding>,
    /// Details for programs.
    pub detail: Value,
}

/// What containerd should say about us.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// Our root directory.
    pub root: &'a Path,
    /// Our socket.
    pub address: &'a Path,
    /// Whether a Prepare may be answered from a layer that is already there.
    pub hits: bool,
    /// Where we answer for registries that are away.
    pub registry: Option<SocketAddr>,
}

impl<'a> Expected<'a> {
    /// What follows from our own configuration.
    pub fn from_config(config: &'a Config) -> Expected<'a> {
        let hits = !config.store.is_empty() || config.layers.share == LayerSharing::Node;
        Expected { root: &config.root, address: &config.address, hits, registry: config.registry }
    }

    /// The section that makes containerd know us.
    pub fn section(&self) -> String {
        format!(
            "[proxy_plugins.{NAME}]\n  type = \"snapshot\"\n  address = {:?}\n  capabilities = [\"remap-ids\"]\n  \
             [proxy_plugins.{NAME}.exports]\n    root = {:?}\n    enable_remote_snapshot_annotations = \"true\"",
            self.address, self.root
        )
    }
}

/// Everything that was found.
#[derive(Debug, Clone)]
pub struct Report {
    findings: Vec<Finding>,
    store: Value,
}

/// Runs every probe. `containerd_config` overrides where containerd's configuration is looked for.
pub async fn run(config: &Config, containerd_config: Option<&Path>, store: StoreReport) -> Report {
    let expected = Expected::from_config(config);
    let daemon = client::daemon(&config.address).await;
    // The probes block, on an otherwise idle runtime that runs nothing but this.
    let mut findings = host::probe(config, daemon);
    let asked = client::ask(&config.containerd).await;
    findings.extend(containerd::probe(&asked, &expected, daemon));
    findings.extend(settings::probe(asked.as_ref().ok(), containerd_config, &expected));
    Report::new(findings, store)
}

impl Report {
    /// A report of these findings and those about the store.
    pub fn new(mut findings: Vec<Finding>, store: StoreReport) -> Report {
        findings.extend(store.findings);
        // Stable: within an area the order of the probes is kept.
        findings.sort_by_key(|finding| finding.area);
        Report { findings, store: store.detail }
    }

    /// The findings, grouped by area.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Whether something does not work; then the exit code is 1.
    pub fn has_failures(&self) -> bool {
        self.count(Status::Failure) > 0
    }

    fn count(&self, status: Status) -> usize {
        self.findings.iter().filter(|finding| finding.status == status).count()
    }

    /// For people: grouped, a mark a line, fixes indented, a summary at the end.
    pub fn to_human(&self) -> String {
        let mut out = String::new();
        let mut area = None;
        for finding in &self.findings {
            if area != Some(finding.area) {
                if area.is_some() {
                    out.push('\n');
                }
                out.push_str(finding.area.heading());
                out.push('\n');
                area = Some(finding.area);
            }
            let line = format!("  {}  {}: {}", finding.status.mark(), finding.title, finding.detail);
            wrap(&line, &mut out);
            for line in finding.fix.iter().flat_map(|fix| fix.lines()) {
                out.push_str(&format!("            {line}\n"));
            }
        }
        out.push_str(&format!("\n{}\n", self.summary()));
        out
    }

    fn summary(&self) -> String {
        let plural = |count: usize, one: &str| format!("{count} {one}{}", if count == 1 { "" } else { "s" });
        format!(
            "{} ok, {}, {}, {} skipped",
            self.count(Status::Ok),
            plural(self.count(Status::Warning), "warning"),
            plural(self.count(Status::Failure), "failure"),
            self.count(Status::Skipped)
        )
    }

    /// For programs: `{"findings": [...], "summary": {...}, "store": {...}}`.
    pub fn to_json(&self) -> Value {
        json!({
            "findings": self.findings,
            "summary": {
                "ok": self.count(Status::Ok),
                "warnings": self.count(Status::Warning),
                "failures": self.count(Status::Failure),
                "skipped": self.count(Status::Skipped),
            },
            "store": self.store,
        })
    }
}

/// Appends a line, broken between words where it is too long for reading; what follows is indented.
fn wrap(line: &str, out: &mut String) {
    const WIDTH: usize = 110;
    const INDENT: &str = "        ";
    // The mark at the beginning keeps its spaces.
    let (mark, text) = line.split_at(line.len().min(INDENT.len()));
    out.push_str(mark);
    let mut column = INDENT.len();
    for (index, word) in text.split_whitespace().enumerate() {
        let width = word.chars().count();
        if index > 0 && column + 1 + width > WIDTH {
            out.push('\n');
            out.push_str(INDENT);
            column = INDENT.len();
        } else if index > 0 {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += width;
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let store = StoreReport {
            findings: vec![Finding::ok(Area::Store, "disk and metadata", "agree")],
            detail: json!({ "consistent": true }),
        };
        let findings = vec![
            Finding::failure(Area::Containerd, "plugin", "not there").fix("[a]\n  b = 1"),
            Finding::ok(Area::Kernel, "version", "Linux 6"),
            Finding::warning(Area::Kernel, "other", "two\nlines"),
            Finding::skipped(Area::Process, "limits", "not readable"),
        ];
        Report::new(findings, store)
    }

    #[test]
    fn people_see_groups_marks_fixes_and_a_summary() {
        assert_eq!(
            report().to_human(),
            "Kernel\n  ok    version: Linux 6\n  WARN  other: two lines\n\n\
             Process\n  skip  limits: not readable\n\n\
             containerd\n  FAIL  plugin: not there\n            [a]\n              b = 1\n\n\
             Store\n  ok    disk and metadata: agree\n\n\
             2 ok, 1 warning, 1 failure, 1 skipped\n"
        );
        assert!(report().has_failures());
    }

    #[test]
    fn long_findings_are_broken_between_words() {
        let detail = format!("{} {}", "word ".repeat(30).trim(), "x".repeat(200));
        let findings = vec![Finding::ok(Area::Kernel, "long", detail.clone())];
        let human = Report::new(findings, StoreReport::default()).to_human();
        let lines: Vec<&str> = human.lines().skip(1).take_while(|line| !line.is_empty()).collect();
        assert_eq!(lines.len(), 3, "{human}");
        assert!(lines[0].len() <= 110 && lines[0].starts_with("  ok    long: word word"));
        assert!(lines[1].starts_with("        word"));
        let joined: Vec<&str> = lines.iter().flat_map(|line| line.split_whitespace()).skip(2).collect();
        assert_eq!(joined.join(" "), detail);
    }

    #[test]
    fn programs_see_the_same() {
        let json = report().to_json();
        assert_eq!(json["summary"], json!({ "ok": 2, "warnings": 1, "failures": 1, "skipped": 1 }));
        assert_eq!(json["store"], json!({ "consistent": true }));
        assert_eq!(
            json["findings"][3],
            json!({ "area": "containerd", "title": "plugin", "status": "failure", "detail": "not there",
                    "fix": "[a]\n  b = 1" })
        );
        assert_eq!(json["findings"][0]["fix"], Value::Null);
    }

    #[test]
    fn only_failures_make_the_exit_code() {
        let fine = vec![Finding::warning(Area::Kernel, "a", "b"), Finding::skipped(Area::Kernel, "c", "d")];
        assert!(!Report::new(fine, StoreReport::default()).has_failures());
    }

    #[test]
    fn the_section_is_toml_that_says_what_is_expected() {
        let config = Config::default();
        let expected = Expected::from_config(&config);
        assert!(!expected.hits);
        let section = crate::config::toml_to_json(&expected.section()).unwrap();
        assert_eq!(
            section["proxy_plugins"]["speedy"],
            json!({ "type": "snapshot", "address": "/run/speedy/speedy.sock", "capabilities": ["remap-ids"],
                    "exports": { "root": "/var/lib/speedy", "enable_remote_snapshot_annotations": "true" } })
        );
    }

    /// The whole, on whatever machine runs the tests and without a containerd: it ends, says something about each
    /// area, and no finding appears twice.
    #[tokio::test]
    async fn a_report_is_complete_without_containerd() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            root: dir.path().join("root"),
            address: dir.path().join("speedy.sock"),
            containerd: dir.path().join("containerd.sock"),
            ..Config::default()
        };
        let absent = dir.path().join("config.toml");
        let report = run(&config, Some(&absent), StoreReport::default()).await;
        for area in [Area::Kernel, Area::Storage, Area::Process, Area::Containerd, Area::Configuration] {
            assert!(report.findings().iter().any(|finding| finding.area == area), "{area:?}");
        }
        let mut names: Vec<_> =
            report.findings().iter().map(|finding| (finding.area, finding.title)).collect();
        names.dedup();
        assert_eq!(names.len(), report.findings().len(), "{names:?}");
        for finding in report.findings() {
            if matches!(finding.area, Area::Containerd | Area::Configuration) {
                assert_eq!(finding.status, Status::Skipped, "{finding:?}");
            }
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "a probe left something behind");
    }
}
