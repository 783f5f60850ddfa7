//! Whether containerd lets Speedy apply layers, on both of its routes, and whether that is safe.
//!
//! Not to have it is an ordinary way of using Speedy; to have it half is a mistake, and to have it without the systemd socket is
//! a risk for every snapshotter's users.

use std::path::Path;

use serde_json::Value;

use super::super::{Area, Finding, NAME};
use super::Settings;

/// The name of the differ's plugin.
pub(super) const DIFFER: &str = "speedy-diff";
const SERVICE: &str = "io.containerd.service.v1.diff-service";
const TRANSFER: &str = "io.containerd.transfer.v1.local";
/// Where systemd looks for units.
const UNITS: [&str; 4] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
];

/// Every judgement on the differ.
pub(super) fn judge(settings: &Settings, address: &Path) -> Vec<Finding> {
    let has_unit = UNITS.iter().any(|dir| Path::new(dir).join("speedy.socket").exists());
    judge_with(settings, address, has_unit)
}

fn judge_with(settings: &Settings, address: &Path, has_unit: bool) -> Vec<Finding> {
    let (area, title) = (Area::Configuration, "differ");
    let plugin = settings.merged.get("proxy_plugins").and_then(|plugins| plugins.get(DIFFER));
    let listed = list(settings);
    let routed = is_routed(settings);
    let Some(plugin) = plugin else {
        if listed.contains(&DIFFER) || routed {
            let detail =
                "is named but not configured: containerd's diff service, or every pull for speedy, fails";
            return vec![Finding::failure(area, title, detail).fix(plugin_lines(address))];
        }
        let detail = "not used: containerd unpacks layers into files itself";
        return vec![Finding::ok(area, title, detail)];
    };
    let text = |key: &str| plugin.get(key).and_then(Value::as_str).unwrap_or_default();
    let mut findings = Vec::new();
    let found = text("address").trim_start_matches("unix://");
    if text("type") != "diff" || Path::new(found) != address {
        let detail = format!("[proxy_plugins.{DIFFER}] is not a diff plugin on speedy's socket");
        findings.push(Finding::failure(area, title, detail).fix(plugin_lines(address)));
    }
    findings.push(service(&listed));
    findings.push(transfer(routed));
    if listed.contains(&DIFFER) && !has_unit {
        let detail = "is in the diff service's list, and no speedy.socket is installed: whenever speedy does not run, that list \
                      fails for every snapshotter's users (nerdctl, BuildKit)";
        findings.push(
            Finding::warning(area, "differ's socket", detail)
                .fix("install contrib/systemd/speedy.socket; remove the line before uninstalling speedy"),
        );
    }
    findings
}

fn list(settings: &Settings) -> Vec<&str> {
    let list = settings.plugin(SERVICE).and_then(|service| service.get("default")).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Whether the transfer service applies layers for us with our differ.
fn is_routed(settings: &Settings) -> bool {
    let entries = settings.plugin(TRANSFER).and_then(|transfer| transfer.get("unpack_config"));
    let entries = entries.and_then(Value::as_array);
    let is = |entry: &Value, key: &str, value: &str| entry.get(key).and_then(Value::as_str) == Some(value);
    entries.into_iter().flatten().any(|entry| is(entry, "snapshotter", NAME) && is(entry, "differ", DIFFER))
}

fn service(listed: &[&str]) -> Finding {
    let (area, title) = (Area::Configuration, "diff-service");
    let fix = format!("[plugins.'{SERVICE}']\n  default = [{DIFFER:?}, \"walking\"]");
    let (ours, walking) =
        (listed.iter().position(|n| *n == DIFFER), listed.iter().position(|n| *n == "walking"));
    match (ours, walking) {
        (Some(ours), Some(walking)) if ours < walking => {
            Finding::ok(area, title, "speedy applies its own layers, walking the others")
        }
        (Some(_), None) => {
            let detail = "walking is not in the list: commits, builds and layers of other snapshotters fail";
            Finding::failure(area, title, detail).fix(fix)
        }
        (Some(_), Some(_)) => {
            Finding::warning(area, title, "speedy comes after walking and is never asked").fix(fix)
        }
        (None, _) => {
            let detail = "speedy is not in the list: nerdctl and BuildKit unpack layers into files";
            Finding::warning(area, title, detail).fix(fix)
        }
    }
}

fn transfer(routed: bool) -> Finding {
    let (area, title) = (Area::Configuration, "unpack_config differ");
    match routed {
        true => Finding::ok(area, title, "pods and ctr have their layers applied by speedy"),
        false => {
            let detail = "is not speedy-diff: pods and ctr have their layers unpacked into files";
            let fix = format!("in the unpack_config entry for speedy:\n  differ = {DIFFER:?}");
            Finding::warning(area, title, detail).fix(fix)
        }
    }
}

fn plugin_lines(address: &Path) -> String {
    format!("[proxy_plugins.{DIFFER}]\n  type = \"diff\"\n  address = {:?}", address.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::super::super::Status;
    use super::*;

    fn judged(text: &str, has_unit: bool) -> Vec<Finding> {
        let Value::Object(table) = crate::config::toml_to_json(text).unwrap() else { panic!("not a table") };
        let mut settings = Settings::default();
        settings.merge(table);
        judge_with(&settings, Path::new("/run/s.sock"), has_unit)
    }

    const PLUGIN: &str = "[proxy_plugins.speedy-diff]\ntype = 'diff'\naddress = '/run/s.sock'\n";
    const LIST: &str =
        "[plugins.'io.containerd.service.v1.diff-service']\ndefault = ['speedy-diff', 'walking']\n";
    const ROUTE: &str = "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux'\n\
                         snapshotter = 'speedy'\ndiffer = 'speedy-diff'\n";

    fn worst(findings: &[Finding]) -> Status {
        let rank = |finding: &&Finding| match finding.status {
            Status::Failure => 2,
            Status::Warning => 1,
            _ => 0,
        };
        findings.iter().max_by_key(rank).unwrap().status
    }

    #[test]
    fn all_or_nothing_is_well() {
        assert_eq!(worst(&judged("", false)), Status::Ok);
        assert_eq!(worst(&judged(&format!("{PLUGIN}{LIST}{ROUTE}"), true)), Status::Ok);
    }

    #[test]
    fn half_of_it_is_told() {
        assert_eq!(worst(&judged(LIST, true)), Status::Failure);
        assert_eq!(worst(&judged(ROUTE, true)), Status::Failure);
        assert_eq!(worst(&judged(&format!("{PLUGIN}{LIST}"), true)), Status::Warning);
        assert_eq!(worst(&judged(&format!("{PLUGIN}{ROUTE}"), true)), Status::Warning);
        let alone = LIST.replace(", 'walking'", "");
        assert_eq!(worst(&judged(&format!("{PLUGIN}{alone}{ROUTE}"), true)), Status::Failure);
        let other = PLUGIN.replace("/run/s.sock", "/run/x.sock");
        assert_eq!(worst(&judged(&format!("{other}{LIST}{ROUTE}"), true)), Status::Failure);
    }

    #[test]
    fn a_list_without_the_socket_unit_is_a_risk() {
        let findings = judged(&format!("{PLUGIN}{LIST}{ROUTE}"), false);
        assert_eq!(worst(&findings), Status::Warning);
        assert!(findings.iter().any(|finding| finding.title == "differ's socket"));
    }
}
