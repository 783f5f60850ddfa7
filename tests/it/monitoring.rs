//! What operators get in `contrib`: alerts and a dashboard speak of metrics that there are, and each alarm is explained.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use speedy::telemetry::{Levels, Method, Metrics, PoolLevels, RootLevels, StoreLevels, Timing};

const PROMETHEUS: &str = "contrib/prometheus/speedy.rules.yml";
const GRAFANA: &str = "contrib/grafana/speedy.json";
const OPERATIONS: &str = "src/design/operations.md";
const PAGE: &str = "src/service/page/problems.rs";

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(path(name)).unwrap()
}

/// All that match, with what is in the first group.
fn all(pattern: &str, text: &str) -> BTreeSet<String> {
    let pattern = regex::Regex::new(pattern).unwrap();
    pattern.captures_iter(text).map(|found| found[1].to_owned()).collect()
}

/// The names of all samples that a daemon with a store and a pool can export.
fn exported() -> BTreeSet<String> {
    let metrics = Metrics::new(|| {
        let timing = Timing { operation: "get", outcome: "ok", ..Timing::default() };
        let store = StoreLevels { requests: vec![timing], ..StoreLevels::default() };
        let root = RootLevels { pool: Some(PoolLevels::default()), ..RootLevels::default() };
        Levels { roots: vec![root], store: Some(store), ..Levels::default() }
    });
    metrics.rpc(Method::Prepare, "OK", std::time::Duration::from_millis(1));
    metrics.applied("image");
    let mut names = BTreeSet::new();
    for line in metrics.text().lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        match kind {
            "counter" => drop(names.insert(format!("{name}_total"))),
            "histogram" => {
                names.extend(["bucket", "sum", "count"].map(|part| format!("{name}_{part}")));
            }
            _ => drop(names.insert(name.to_owned())),
        }
    }
    assert!(names.len() > 40, "{names:?}");
    names
}

#[test]
fn every_metric_that_alerts_and_dashboard_ask_for_is_exported() {
    let exported = exported();
    for (file, least) in [(PROMETHEUS, 15), (GRAFANA, 30)] {
        let asked = all(r"\b(speedy_[a-z_]+)\b", &text(file));
        let unknown: Vec<_> = asked.difference(&exported).collect();
        assert!(unknown.is_empty(), "{file} asks for {unknown:?}, which no daemon exports");
        assert!(asked.len() >= least, "{file} asks for {asked:?} only");
    }
}

#[test]
fn every_alarm_is_explained_and_nothing_else_is() {
    let alerts = all(r"- alert: (\w+)", &text(PROMETHEUS));
    let shown = all(r#"alarm: "(\w+)""#, &text(PAGE));
    let explained = all(r"(?m)^### (\w+)$", &text(OPERATIONS));
    assert_eq!(
        explained,
        &alerts | &shown,
        "sections of {OPERATIONS}, and what {PROMETHEUS} and {PAGE} know"
    );
    for section in text(OPERATIONS).split("\n### ").skip(1) {
        let name = section.lines().next().unwrap();
        assert!(section.contains("*Do:*"), "{name}: nothing is to be done?");
        let told = section.contains("Shown on the page only.");
        assert_eq!(told, !alerts.contains(name), "{name}: where it is shown");
    }
}

#[test]
fn every_alert_is_tried() {
    let alerts = all(r"- alert: (\w+)", &text(PROMETHEUS));
    let firing = all(r"exp_samples: \[\{value: (\d+)\}\]", &text("contrib/prometheus/speedy.test.yml"));
    assert_eq!(firing, BTreeSet::from([alerts.len().to_string()]), "each alert fires in the tests");
}

#[test]
fn the_dashboard_is_json_with_a_data_source_to_choose() {
    let dashboard: serde_json::Value = serde_json::from_str(&text(GRAFANA)).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut ids: Vec<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    ids.dedup();
    assert_eq!(ids.len(), panels.len(), "each panel has an id of its own");
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        assert_eq!(panel["datasource"]["uid"], "${source}", "{panel}");
        assert!(!panel["targets"].as_array().unwrap().is_empty(), "{panel}");
    }
}

#[test]
#[ignore = "needs promtool: contrib/check runs it where there is one"]
fn promtool_has_nothing_to_object() {
    for arguments in [["check", "rules", "speedy.rules.yml"], ["test", "rules", "speedy.test.yml"]] {
        let mut promtool = Command::new("promtool");
        promtool.args(arguments).current_dir(path("contrib/prometheus"));
        let said = promtool.output().unwrap();
        let text = [said.stdout, said.stderr].concat();
        assert!(said.status.success(), "{arguments:?}:\n{}", String::from_utf8_lossy(&text));
    }
}
