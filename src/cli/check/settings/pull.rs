//! What containerd's settings mean for pulling into Speedy.
//!
//! Where: called by `settings` with the merged files. There are two ways to pull: the *transfer service* (`ctr`, and CRI
//! since 2.1) and the *local* pull inside the CRI plugin, to which CRI falls back by itself when certain settings are
//! used.
//!
//! Invariants: a judgement that concerns CRI only is skipped where there is no CRI.
//!
//! When it fails: it does not; a setting of the wrong type reads as absent, as containerd itself complains about it.

use serde_json::Value;

use super::super::client::Answer;
use super::super::{Area, Finding, NAME};
use super::Settings;

const TRANSFER: &str = "io.containerd.transfer.v1.local";

/// Every judgement on pulling.
pub(super) fn judge(settings: &Settings, running: Option<&Answer>) -> Vec<Finding> {
    let mut findings = Vec::new();
    match no_cri(settings, running) {
        Some(reason) => findings.push(Finding::skipped(Area::Configuration, "CRI", reason)),
        None => {
            findings.push(snapshotter(settings));
            findings.push(annotations(settings));
            findings.push(discarded(settings));
            findings.push(route(settings));
        }
    }
    findings.extend(unpack(settings, &platform(std::env::consts::ARCH)));
    findings
}

/// Why CRI need not be looked at.
fn no_cri(settings: &Settings, running: Option<&Answer>) -> Option<String> {
    if settings.without_cri() {
        return Some("the CRI plugin is among disabled_plugins".into());
    }
    let plugins = running?.plugins.as_ref().ok()?;
    let loaded = plugins.iter().any(|plugin| match plugin.kind.as_str() {
        "io.containerd.cri.v1" => plugin.id == "images",
        "io.containerd.grpc.v1" => plugin.id == "cri",
        _ => false,
    });
    (!loaded).then(|| "the running containerd has no CRI plugin".into())
}

fn snapshotter(settings: &Settings) -> Finding {
    let (area, title) = (Area::Configuration, "CRI snapshotter");
    let chosen = settings.image("snapshotter").and_then(Value::as_str).unwrap_or("overlayfs");
    if chosen == NAME {
        return Finding::ok(area, title, "Kubernetes and crictl use speedy");
    }
    let fix = format!("{}\n  snapshotter = {NAME:?}", settings.image_table());
    let handlers = handlers(settings);
    if !handlers.is_empty() {
        let detail = format!("{chosen} by default, speedy for the runtimes {}", handlers.join(", "));
        return Finding::ok(area, title, detail);
    }
    let detail = format!(
        "is {chosen}: Kubernetes and crictl do not use speedy (ctr and nerdctl choose for themselves)"
    );
    Finding::warning(area, title, detail).fix(fix)
}

/// The runtime handlers that have us as their snapshotter.
fn handlers(settings: &Settings) -> Vec<String> {
    let runtimes = settings
        .plugin("io.containerd.cri.v1.runtime")
        .and_then(|runtime| runtime.get("containerd")?.get("runtimes"))
        .or_else(|| settings.plugin(super::CRI_V2)?.get("containerd")?.get("runtimes"));
    let platforms = settings.image("runtime_platforms");
    let mut names: Vec<String> = [runtimes, platforms]
        .into_iter()
        .flatten()
        .filter_map(Value::as_object)
        .flatten()
        .filter(|(_, handler)| handler.get("snapshotter").and_then(Value::as_str) == Some(NAME))
        .map(|(name, _)| name.clone())
        .collect();
    names.sort();
    names.dedup();
    names
}

fn flag(settings: &Settings, name: &str, default: bool) -> bool {
    settings.image(name).and_then(Value::as_bool).unwrap_or(default)
}

fn annotations(settings: &Settings) -> Finding {
    let (area, title) = (Area::Configuration, "disable_snapshot_annotations");
    if flag(settings, title, true) {
        return Finding::ok(
            area,
            title,
            "true; the transfer service follows exports.enable_remote_snapshot_annotations",
        );
    }
    let detail = "is false: image references reach the snapshotter, but CRI leaves the transfer service for its local \
                  pull. With exports.enable_remote_snapshot_annotations = \"true\" it is not needed (containerd 2.1)";
    Finding::warning(area, title, detail).fix(format!("{}\n  {title} = true", settings.image_table()))
}

fn discarded(settings: &Settings) -> Finding {
    let (area, title) = (Area::Configuration, "discard_unpacked_layers");
    if !flag(settings, title, false) {
        return Finding::ok(area, title, "false; pulled blobs stay, so an image can be unpacked again");
    }
    let detail = "is true: blobs are thrown away after unpacking, so an image cannot be unpacked again after a \
                  repair, or for another snapshotter; and CRI leaves the transfer service for its local pull";
    Finding::warning(area, title, detail).fix(format!("{}\n  {title} = false", settings.image_table()))
}

/// Why CRI pulls by itself and not through the transfer service.
fn local_reasons(settings: &Settings) -> Vec<&'static str> {
    let set = |name: &str| match settings.image("registry").and_then(|registry| registry.get(name)) {
        Some(Value::Object(table)) => !table.is_empty(),
        _ => false,
    };
    let downloads = settings.image("max_concurrent_downloads").and_then(Value::as_i64).unwrap_or(3);
    [
        (flag(settings, "use_local_image_pull", false), "use_local_image_pull = true"),
        (!flag(settings, "disable_snapshot_annotations", true), "disable_snapshot_annotations = false"),
        (flag(settings, "discard_unpacked_layers", false), "discard_unpacked_layers = true"),
        (flag(settings, "image_pull_with_sync_fs", false), "image_pull_with_sync_fs = true"),
        (downloads != 3, "max_concurrent_downloads"),
        (set("mirrors"), "registry.mirrors"),
        (set("configs"), "registry.configs"),
        (set("auths"), "registry.auths"),
    ]
    .into_iter()
    .filter_map(|(used, name)| used.then_some(name))
    .collect()
}

fn route(settings: &Settings) -> Finding {
    let (area, title) = (Area::Configuration, "way of CRI pulls");
    let reasons = local_reasons(settings);
    if reasons.is_empty() {
        return Finding::ok(area, title, "through the transfer service (containerd 2.1 or newer)");
    }
    let detail = format!(
        "local, because of {}: layers are unpacked one after another, and unpack_config does not count for CRI",
        reasons.join(", ")
    );
    Finding::ok(area, title, detail)
}

/// Our platform as containerd writes it.
fn platform(arch: &str) -> String {
    let arch = match arch {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    };
    format!("linux/{arch}")
}

/// Whether an unpack entry is for our platform: the same, or with a variant or features after it.
fn covers(entry: &Value, platform: &str) -> bool {
    let theirs = entry.get("platform").and_then(Value::as_str).unwrap_or_default();
    theirs == "linux"
        || theirs == platform
        || theirs.strip_prefix(platform).is_some_and(|rest| rest.starts_with('/'))
}

/// An entry of the transfer service's list, as it stands in the file.
pub(super) fn entry_lines(platform: &str, snapshotter: &str) -> String {
    format!(
        "[[plugins.'{TRANSFER}'.unpack_config]]\n  platform = {platform:?}\n  snapshotter = {snapshotter:?}"
    )
}

fn unpack(settings: &Settings, platform: &str) -> Vec<Finding> {
    let (area, title) = (Area::Configuration, "unpack_config");
    let line = |snapshotter: &str| entry_lines(platform, snapshotter);
    let list = settings
        .plugin(TRANSFER)
        .and_then(|transfer| transfer.get("unpack_config"))
        .and_then(Value::as_array);
    let has = |snapshotter: &str| {
        list.into_iter().flatten().any(|entry| {
            entry.get("snapshotter").and_then(Value::as_str) == Some(snapshotter) && covers(entry, platform)
        })
    };
    let without = "a pull for speedy through the transfer service (crictl and the kubelet with speedy as CRI's \
                   snapshotter, ctr images pull --snapshotter speedy) fails with \"unable to initialize unpacker: no \
                   unpack platforms defined\"; a pull that names no snapshotter unpacks into overlayfs, and the first \
                   container unpacks it again for speedy";
    match list {
        None => {
            let detail = format!(
                "is not given, so containerd's own list holds, which has only its own snapshotters: {without}"
            );
            let fix = format!("{}\n{}", line(NAME), line("overlayfs"));
            vec![Finding::failure(area, title, detail).fix(fix)]
        }
        Some(_) if !has(NAME) => {
            let detail = format!(
                "has no entry for speedy on {platform}: {without}. Add it to the file that has the others, \
                                  for an import replaces the whole list"
            );
            vec![Finding::failure(area, title, detail).fix(line(NAME))]
        }
        Some(_) if !has("overlayfs") => {
            let detail = format!(
                "has speedy on {platform}, but nothing for overlayfs: the list replaces containerd's own, so images can no \
                 longer be pulled for overlayfs"
            );
            vec![Finding::warning(area, title, detail).fix(line("overlayfs"))]
        }
        Some(_) => vec![Finding::ok(area, title, format!("speedy and overlayfs on {platform}"))],
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::Status;
    use super::super::super::client::Plugin;
    use super::*;

    fn settings(text: &str) -> Settings {
        let Value::Object(table) = crate::config::toml_to_json(text).unwrap() else { panic!("not a table") };
        let mut settings = Settings::default();
        settings.merge(table);
        settings
    }

    const V3: &str = "version = 3\n[plugins.'io.containerd.cri.v1.images']\n";
    const V2: &str = "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\n";

    fn with(head: &str, line: &str) -> Settings {
        settings(&format!("{head}  {line}\n"))
    }

    #[test]
    fn the_snapshotter_of_cri_is_found_in_both_formats() {
        assert_eq!(snapshotter(&with(V3, "snapshotter = 'speedy'")).status, Status::Ok);
        assert_eq!(snapshotter(&with(V2, "snapshotter = 'speedy'")).status, Status::Ok);
        let other = snapshotter(&settings("version = 3"));
        assert_eq!(other.status, Status::Warning);
        assert_eq!(
            other.fix.as_deref(),
            Some("[plugins.'io.containerd.cri.v1.images']\n  snapshotter = \"speedy\"")
        );
        let old = snapshotter(&with(V2, "snapshotter = 'native'"));
        assert!(old.detail.starts_with("is native"), "{}", old.detail);
        assert!(old.fix.unwrap().starts_with("[plugins.'io.containerd.grpc.v1.cri'.containerd]\n"));
    }

    #[test]
    fn a_runtime_may_have_speedy_alone() {
        for text in [
            "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.lazy]\nsnapshotter = 'speedy'",
            "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.lazy]\nsnapshotter = 'speedy'",
            "version = 3\n[plugins.'io.containerd.cri.v1.images'.runtime_platforms.lazy]\nsnapshotter = 'speedy'",
        ] {
            let finding = snapshotter(&settings(text));
            assert_eq!(finding.status, Status::Ok, "{text}");
            assert_eq!(finding.detail, "overlayfs by default, speedy for the runtimes lazy");
        }
    }

    #[test]
    fn settings_that_change_the_way_are_named() {
        assert_eq!(annotations(&settings("version = 3")).status, Status::Ok);
        assert_eq!(annotations(&with(V3, "disable_snapshot_annotations = false")).status, Status::Warning);
        assert_eq!(annotations(&with(V2, "disable_snapshot_annotations = false")).status, Status::Warning);
        assert_eq!(discarded(&settings("version = 3")).status, Status::Ok);
        assert_eq!(discarded(&with(V3, "discard_unpacked_layers = true")).status, Status::Warning);
        assert!(route(&settings("version = 3")).detail.starts_with("through the transfer service"));
        let text = format!(
            "{V3}use_local_image_pull = true\nmax_concurrent_downloads = 10\n\
             [plugins.'io.containerd.cri.v1.images'.registry.mirrors.'docker.io']\nendpoint = ['http://m']\n"
        );
        let finding = route(&settings(&text));
        assert!(
            finding
                .detail
                .contains("use_local_image_pull = true, max_concurrent_downloads, registry.mirrors:"),
            "{}",
            finding.detail
        );
    }

    #[test]
    fn cri_is_skipped_where_there_is_none() {
        let count = |settings: &Settings, running: Option<&Answer>| judge(settings, running).len();
        let all = count(&settings("version = 3"), None);
        for name in ["cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"] {
            let without = settings(&format!("version = 2\ndisabled_plugins = ['{name}']"));
            assert_eq!(judge(&without, None)[0].status, Status::Skipped);
            assert!(count(&without, None) < all);
        }
        let answer = |kind: &str, id: &str| Answer {
            version: "v2.4.2".into(),
            revision: String::new(),
            pid: None,
            plugins: Ok(vec![Plugin { kind: kind.into(), id: id.into(), ..Plugin::default() }]),
        };
        let running = answer("io.containerd.snapshotter.v1", "overlayfs");
        assert_eq!(judge(&settings(""), Some(&running))[0].status, Status::Skipped);
        assert_eq!(count(&settings(""), Some(&answer("io.containerd.cri.v1", "images"))), all);
    }

    #[test]
    fn platforms_are_written_as_containerd_does() {
        assert_eq!(platform("x86_64"), "linux/amd64");
        assert_eq!(platform("aarch64"), "linux/arm64");
        assert_eq!(platform("riscv64"), "linux/riscv64");
    }

    fn judged(entries: &[(&str, &str)]) -> Finding {
        let mut text = String::from("version = 3\n");
        for (platform, snapshotter) in entries {
            text.push_str(&format!(
                "[[plugins.'{TRANSFER}'.unpack_config]]\nplatform = '{platform}'\nsnapshotter = '{snapshotter}'\n"
            ));
        }
        unpack(&settings(&text), "linux/arm64").remove(0)
    }

    #[test]
    fn unpack_entries_are_judged_with_what_happens_without_them() {
        let none = judged(&[]);
        assert_eq!(none.status, Status::Failure);
        assert!(none.detail.contains("no unpack platforms defined"));
        let fix = crate::config::toml_to_json(none.fix.as_ref().unwrap()).unwrap();
        let list = fix["plugins"][TRANSFER]["unpack_config"].as_array().unwrap();
        assert_eq!(list.len(), 2);
        assert_eq!(list[0]["platform"], "linux/arm64");

        let others = judged(&[("linux/arm64", "overlayfs"), ("linux/amd64", "speedy")]);
        assert_eq!(others.status, Status::Failure);
        assert!(!others.fix.unwrap().contains("overlayfs"));

        assert_eq!(judged(&[("linux/arm64", "speedy")]).status, Status::Warning);
        assert_eq!(judged(&[("linux/arm64/v8", "speedy"), ("linux", "overlayfs")]).status, Status::Ok);
    }
}
