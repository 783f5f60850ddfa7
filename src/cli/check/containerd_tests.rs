use super::super::Status;
use super::*;

fn expected(hits: bool) -> Expected<'static> {
    let (root, address) = (Path::new("/var/lib/speedy"), Path::new("/run/speedy/speedy.sock"));
    Expected { root, address, hits, registry: None }
}

fn plugin(kind: &str, id: &str) -> Plugin {
    Plugin { kind: kind.into(), id: id.into(), ..Plugin::default() }
}

/// What a containerd says that was configured with our own section.
fn ours() -> Plugin {
    let exports = [
        ("root", "/var/lib/speedy"),
        ("address", "/run/speedy/speedy.sock"),
        ("enable_remote_snapshot_annotations", "true"),
    ];
    Plugin {
        exports: exports.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
        capabilities: vec!["remap-ids".into()],
        ..plugin(SNAPSHOTTER, NAME)
    }
}

fn statuses(findings: &[Finding]) -> Vec<(&'static str, Status)> {
    findings.iter().map(|finding| (finding.title, finding.status)).collect()
}

fn one<'a>(findings: &'a [Finding], title: &str) -> &'a Finding {
    findings
        .iter()
        .find(|finding| finding.title == title)
        .unwrap_or_else(|| panic!("no {title}: {findings:?}"))
}

#[test]
fn without_containerd_everything_is_skipped() {
    let absent = probe(&Err(AskError::Absent("/run/c.sock".into())), &expected(false), None);
    assert_eq!(statuses(&absent), [("socket", Status::Skipped)]);
    assert_eq!(absent[0].detail, "containerd is not running: there is no /run/c.sock");
}

#[test]
fn versions_are_judged() {
    for (text, status) in [
        ("v2.4.2", Status::Ok),
        ("2.1.9~ds1-1", Status::Ok),
        ("v3.0.0-beta.1", Status::Ok),
        ("v2.0.11", Status::Warning),
        ("1.7.27", Status::Failure),
        ("main", Status::Skipped),
        ("", Status::Skipped),
    ] {
        assert_eq!(version(text).status, status, "{text}");
    }
}

#[test]
fn a_right_entry_is_fine() {
    let findings = registered(&[plugin(SNAPSHOTTER, "overlayfs"), ours()], &expected(true));
    assert!(findings.iter().all(|finding| finding.status == Status::Ok), "{findings:?}");
}

#[test]
fn a_missing_entry_comes_with_its_lines() {
    let findings = registered(&[plugin(SNAPSHOTTER, "overlayfs")], &expected(false));
    let finding = one(&findings, "plugin");
    assert_eq!(finding.status, Status::Failure);
    let fix = crate::config::toml_to_json(finding.fix.as_ref().unwrap()).unwrap();
    assert_eq!(fix["proxy_plugins"]["speedy"]["exports"]["root"], "/var/lib/speedy");
}

#[test]
fn errors_at_start_are_shown() {
    let broken = Plugin { init_error: Some("no such file".into()), ..ours() };
    let findings = registered(&[broken], &expected(false));
    assert_eq!(one(&findings, "plugin").status, Status::Failure);
    assert!(one(&findings, "plugin").detail.ends_with("did not start: no such file"));
    assert_eq!(findings.len(), 2, "an entry that did not start is not judged further");

    let cri = Plugin {
        init_error: Some("snapshotter speedy was not found".into()),
        ..plugin("io.containerd.cri.v1", "images")
    };
    let skipped = Plugin { init_error: Some("skip plugin: no btrfs".into()), ..plugin(SNAPSHOTTER, "btrfs") };
    let finding = users(&[cri, skipped, ours()]);
    assert_eq!(finding.status, Status::Warning);
    assert_eq!(finding.detail, "io.containerd.cri.v1.images: snapshotter speedy was not found");
}

#[test]
fn each_wrong_part_of_an_entry_is_found() {
    let change = |name: &str, value: Option<&str>| {
        let mut plugin = ours();
        match value {
            Some(value) => plugin.exports.insert(name.into(), value.into()),
            None => plugin.exports.remove(name),
        };
        registered(&[plugin], &expected(false))
    };
    let cases = [
        ("address", Some("/run/other.sock"), "address", Status::Failure),
        ("address", None, "address", Status::Failure),
        ("address", Some("unix:///run/speedy/speedy.sock"), "address", Status::Ok),
        ("root", Some("/var/lib/other"), "exports.root", Status::Failure),
        ("root", Some("/var/lib/speedy/"), "exports.root", Status::Ok),
        ("root", None, "exports.root", Status::Warning),
        (
            "enable_remote_snapshot_annotations",
            Some("True"),
            "exports.enable_remote_snapshot_annotations",
            Status::Warning,
        ),
        (
            "enable_remote_snapshot_annotations",
            None,
            "exports.enable_remote_snapshot_annotations",
            Status::Warning,
        ),
    ];
    for (name, value, title, status) in cases {
        let findings = change(name, value);
        let finding = one(&findings, title);
        assert_eq!(finding.status, status, "{name} = {value:?}");
        assert_eq!(finding.fix.is_none(), status == Status::Ok, "{finding:?}");
        if let Some(fix) = &finding.fix {
            assert!(crate::config::toml_to_json(fix).is_ok(), "{fix}");
        }
    }
}

#[test]
fn rebase_and_stores_do_not_go_together() {
    let with = |capabilities: &[&str]| Plugin {
        capabilities: capabilities.iter().map(|name| (*name).to_owned()).collect(),
        ..ours()
    };
    let judge = |capabilities: &[&str], hits| registered(&[with(capabilities)], &expected(hits));
    let wrong = judge(&["rebase", "remap-ids"], true);
    let finding = one(&wrong, "capability rebase");
    assert_eq!(finding.status, Status::Failure);
    assert_eq!(finding.fix.as_deref(), Some("[proxy_plugins.speedy]\n  capabilities = [\"remap-ids\"]"));
    assert_eq!(one(&judge(&["rebase", "remap-ids"], false), "capability rebase").status, Status::Ok);
    // Two findings about one line give one and the same line.
    let both = judge(&["rebase"], true);
    assert_eq!(one(&both, "capability rebase").fix, one(&both, "capability remap-ids").fix);
    let none = judge(&["rebase"], false);
    let finding = one(&none, "capability remap-ids");
    assert_eq!(finding.status, Status::Warning);
    assert!(finding.fix.as_deref().unwrap().ends_with("capabilities = [\"rebase\", \"remap-ids\"]"));
}

#[test]
fn the_root_must_be_one_directory() {
    let root = Path::new("/var/lib/speedy");
    assert_eq!(same_root(Some((1, 2)), Some((1, 2)), root).status, Status::Ok);
    assert_eq!(same_root(None, Some((1, 2)), root).status, Status::Skipped);
    let other = same_root(Some((1, 2)), Some((1, 3)), root);
    assert_eq!(other.status, Status::Failure);
    assert!(other.detail.contains("is another directory") && other.fix.is_some());
    assert!(same_root(Some((1, 2)), None, root).detail.contains("does not exist"));
}

#[test]
fn propagation_matters_between_namespaces() {
    let table = |tags: &str| mountinfo::parse(&format!("1 0 8:1 / / rw {tags} - ext4 /dev/sda1 rw"));
    let root = Path::new("/var/lib/speedy");
    assert_eq!(propagation(&table("shared:1"), &table("shared:1"), root).status, Status::Ok);
    assert_eq!(propagation(&table("shared:1"), &table("master:1"), root).status, Status::Ok);
    let none = propagation(&table(""), &table("shared:1"), root);
    assert_eq!(none.status, Status::Warning);
    assert!(none.fix.unwrap().contains("PrivateMounts=no"));
    assert_eq!(propagation(&[], &table(""), root).status, Status::Skipped);
}

#[test]
fn our_own_process_is_in_our_namespace() {
    let findings = sight(Some(std::process::id()), &expected(false), None);
    assert_eq!(statuses(&findings), [("mount namespace", Status::Ok)]);
    assert_eq!(sight(None, &expected(false), None)[0].status, Status::Skipped);
    let gone = sight(Some(u32::MAX), &expected(false), None);
    assert_eq!(gone[0].status, Status::Skipped, "{gone:?}");
}
