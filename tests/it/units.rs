//! The systemd units: what systemd itself says of them, and what they must not say.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

const UNITS: [&str; 3] = ["speedy.service", "speedy.socket", "speedy-keeper.service"];

fn path(unit: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/systemd").join(unit)
}

/// The settings of a unit, each with all that was said of it.
fn settings(unit: &str) -> BTreeMap<String, String> {
    let mut settings = BTreeMap::<String, String>::new();
    for line in std::fs::read_to_string(path(unit)).unwrap().lines().filter(|line| !line.starts_with('#')) {
        if let Some((name, value)) = line.split_once('=') {
            let all = settings.entry(name.to_owned()).or_default();
            *all = format!("{all} {value}").trim().to_owned();
        }
    }
    settings
}

fn words(settings: &BTreeMap<String, String>, name: &str) -> Vec<String> {
    settings.get(name).map(String::as_str).unwrap_or_default().split(' ').map(str::to_owned).collect()
}

#[test]
fn every_unit_is_known_here() {
    let mut found: Vec<_> = std::fs::read_dir(path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    found.sort();
    let mut known = UNITS.map(std::ffi::OsString::from);
    known.sort();
    assert_eq!(found, known);
}

#[test]
#[ignore = "needs systemd-analyze: contrib/check runs it where there is one"]
fn systemd_analyze_has_nothing_to_object() {
    let dir = tempfile::tempdir().unwrap();
    for unit in UNITS {
        // It looks whether the program is there.
        let text = std::fs::read_to_string(path(unit)).unwrap();
        let text = text.replace("/usr/local/bin/speedy", env!("CARGO_BIN_EXE_speedy"));
        std::fs::write(dir.path().join(unit), text).unwrap();
    }
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]).args(UNITS.map(|unit| dir.path().join(unit)));
    let said = verify.output().unwrap().stderr;
    let said = String::from_utf8_lossy(&said);
    // The rest may be about the machine's own units.
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("speedy")).collect();
    assert!(ours.is_empty(), "{}", ours.join("\n"));
}

/// `udevadm verify` is systemd's from version 254 on.
#[test]
#[ignore = "needs udevadm verify: contrib/check runs it where there is one"]
fn udevadm_has_nothing_to_object() {
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/udev/59-speedy.rules");
    let output = Command::new("udevadm").arg("verify").arg(&rules).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
}

/// The rule must come before systemd's own of the number 60, and jump to where it can.
#[test]
fn the_rule_of_udev_is_whole() {
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/udev/59-speedy.rules");
    let text = std::fs::read_to_string(rules).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let named = |key: &str| -> std::collections::BTreeSet<&str> {
        let parts = lines.iter().flat_map(|line| line.split(", "));
        parts.filter_map(|part| part.strip_prefix(key)?.strip_prefix("=\"")?.strip_suffix('"')).collect()
    };
    assert_eq!(named("GOTO"), named("LABEL"));
    assert_eq!(lines.last(), Some(&"LABEL=\"speedy_end\""));
    for line in lines {
        assert!(line.split(", ").all(|part| part.ends_with('"') && part.matches('"').count() == 2), "{line}");
    }
}

#[test]
fn nothing_that_stops_the_daemon_stops_the_keeper() {
    let daemon = settings("speedy.service");
    let keeper = settings("speedy-keeper.service");
    for settings in [&daemon, &keeper] {
        for tie in ["Requires", "Requisite", "BindsTo", "PartOf", "Conflicts", "PropagatesStopTo", "Upholds"]
        {
            assert!(!settings.contains_key(tie), "{tie}");
        }
    }
    let keeper_unit = "speedy-keeper.service".to_owned();
    assert!(words(&daemon, "Wants").contains(&keeper_unit) && words(&daemon, "After").contains(&keeper_unit));
    assert_eq!(keeper["RefuseManualStop"], "yes");
    assert_eq!(keeper["Restart"], "on-failure");
    assert_eq!(keeper["RestartPreventExitStatus"], "78");
    assert_eq!((keeper["KillMode"].as_str(), daemon["KillMode"].as_str()), ("process", "process"));
    assert_eq!(keeper["OOMScoreAdjust"], "-999");
    assert_eq!(
        (&keeper["RuntimeDirectory"], &keeper["RuntimeDirectoryPreserve"]),
        (&daemon["RuntimeDirectory"], &daemon["RuntimeDirectoryPreserve"])
    );
}

/// What a service mounts in a namespace of its own is invisible to containerd; and one that keeps a copy of the node's mounts
/// keeps layers from being unmounted.
#[test]
fn no_unit_has_a_mount_namespace_of_its_own() {
    for unit in UNITS {
        let settings = settings(unit);
        for option in [
            "PrivateTmp",
            "PrivateDevices",
            "PrivateMounts",
            "PrivateNetwork",
            "ProtectSystem",
            "ProtectHome",
            "ProtectKernelTunables",
            "ProtectKernelModules",
            "ProtectKernelLogs",
            "ProtectControlGroups",
            "ProtectProc",
            "ReadOnlyPaths",
            "ReadWritePaths",
            "InaccessiblePaths",
            "BindPaths",
            "TemporaryFileSystem",
            "RootDirectory",
            "DynamicUser",
            "MountFlags",
        ] {
            assert!(!settings.contains_key(option), "{unit}: {option}");
        }
    }
}
