//! The status page: what `speedy status` and `speedy layers` say, and the last faults, for people with a browser.
//!
//! One HTML document without scripts and without anything from elsewhere; it asks for itself again every ten seconds. Names of
//! images, messages of a store and what was logged are other people's words: the template escapes every value, and the
//! answer's headers allow no script, no frame and no request to anywhere else.

use std::net::IpAddr;

use askama::Template;

use super::control::ControlService;
use crate::snapshot::report::{LayerReport, StatusReport};
use crate::telemetry::{self, Fault};

use problems::Trouble;

mod problems;

/// How many layers the page lists.
const MOST_LAYERS: usize = 200;

/// What a browser may do with the page.
pub(super) const HEADERS: [(&str, &str); 5] = [
    ("content-type", "text/html; charset=utf-8"),
    (
        "content-security-policy",
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-store"),
];

/// Whether a page may be answered to a request for this host. A name that its owner points at a loopback address makes a
/// browser read our page for a stranger's script; nobody owns `localhost` or an address.
pub(super) fn is_own_host(host: Option<&str>) -> bool {
    let Some(host) = host else { return true };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok()
}

/// The page as it is now. Blocking.
pub(super) fn now(service: &ControlService) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    render(&service.status_report(), service.layer_reports(), telemetry::recent_faults(), now)
}

fn render(status: &StatusReport, layers: Vec<LayerReport>, faults: Vec<Fault>, now: i64) -> String {
    let problems = problems::of(status, &layers);
    let states = parts(&layers);
    let hidden = layers.len().saturating_sub(MOST_LAYERS);
    let page = Page {
        status,
        now: prost_types::Timestamp { seconds: now, nanos: 0 }.to_string(),
        problems,
        states,
        layers: rows(layers, now),
        hidden,
        faults: faults.into_iter().map(|fault| FaultRow { when: ago(fault.at, now), fault }).collect(),
    };
    page.render().unwrap_or_else(|error| format!("<!doctype html><p>the page cannot be made: {error}</p>"))
}

#[derive(Template)]
#[template(path = "status.html")]
struct Page<'a> {
    status: &'a StatusReport,
    now: String,
    problems: Vec<Trouble>,
    states: Vec<Part>,
    layers: Vec<Row>,
    hidden: usize,
    faults: Vec<FaultRow>,
}

/// The layers of one state.
struct Part {
    name: &'static str,
    class: &'static str,
    count: usize,
    percent: usize,
}

struct Row {
    report: LayerReport,
    digest: String,
    class: &'static str,
    mounted: &'static str,
    used: String,
}

struct FaultRow {
    fault: Fault,
    when: String,
}

/// In which order states are shown, and as what.
const STATES: [(&str, &str); 4] =
    [("failed", "bad"), ("filling", "filling"), ("cold", "cold"), ("complete", "good")];

fn parts(layers: &[LayerReport]) -> Vec<Part> {
    let count = |name: &str| layers.iter().filter(|layer| layer.state == name).count();
    let part = |(name, class)| {
        let count = count(name);
        Part { name, class, count, percent: count * 100 / layers.len().max(1) }
    };
    STATES.map(part).into_iter().filter(|part| part.count > 0).collect()
}

/// Those first that something is to be said of, then what was used last.
fn rows(mut layers: Vec<LayerReport>, now: i64) -> Vec<Row> {
    let place = |state: &str| STATES.iter().position(|(name, _)| *name == state).unwrap_or(STATES.len());
    layers.sort_by_key(|layer| (place(&layer.state), std::cmp::Reverse(layer.used)));
    layers.truncate(MOST_LAYERS);
    let row = |report: LayerReport| Row {
        digest: report.diff_id.chars().take("sha256:".len() + 12).collect(),
        class: STATES.iter().find(|(name, _)| *name == report.state).map_or("", |(_, class)| class),
        mounted: report.mounted(),
        used: ago(report.used, now),
        report,
    };
    layers.into_iter().map(row).collect()
}

/// How long ago something was, for people.
fn ago(at: i64, now: i64) -> String {
    match now.saturating_sub(at) {
        ..=1 => "now".to_owned(),
        seconds @ 2..=119 => format!("{seconds} s ago"),
        seconds @ 120..=7199 => format!("{} min ago", seconds / 60),
        seconds @ 7200..=172_799 => format!("{} h ago", seconds / 3600),
        seconds => format!("{} days ago", seconds / 86_400),
    }
}

/// What the template calls by name.
#[expect(unreachable_pub, reason = "the macro makes it so")]
mod filters {
    /// A size for people.
    #[askama::filter_fn]
    pub(super) fn size(bytes: &u64, _: &dyn askama::Values) -> askama::Result<String> {
        Ok(indicatif::BinaryBytes(*bytes).to_string())
    }
}

#[cfg(test)]
mod tests;
