//! What the kernel does with what we say.

use std::path::Path;
use std::process::Command;

use speedy::driver::overlay::{Overlay, OverlayOptions};
use speedy::driver::{Driver, DriverError, Id, Inventory, probe};
use speedy::sys::tree::{self, TreeError};

use crate::process::require_root;

struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        assert!(Command::new("umount").arg("-l").arg(self.0).status().unwrap().success());
    }
}

fn tmpfs(at: &Path) -> Mounted<'_> {
    let mount = Command::new("mount").args(["-t", "tmpfs", "none"]).arg(at).status().unwrap();
    assert!(mount.success());
    Mounted(at)
}

#[test]
fn d3_no_recursive_delete_crosses_a_mount_point() {
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let driver = Overlay::open(dir.path(), OverlayOptions::default()).unwrap();
    let id = Id { serial: 1, slot: 0 };
    driver.reserve(&[id]).unwrap();
    let inside = dir.path().join("l/1/fs/a/mnt");
    std::fs::create_dir_all(&inside).unwrap();
    let mounted = tmpfs(&inside);
    std::fs::write(inside.join("precious"), "x").unwrap();
    let refused = driver.remove(id, &|| false);
    assert!(matches!(refused, Err(DriverError::Busy(_))), "{refused:?}");
    assert_eq!(std::fs::read(inside.join("precious")).unwrap(), b"x");
    assert_eq!(tree::measure(&dir.path().join("l/1/fs"), &|| false).unwrap().inodes, 2);
    drop(mounted);
    driver.remove(id, &|| false).unwrap();
    assert_eq!(driver.inventory().unwrap(), Inventory::Serials(Vec::new()));
}

/// One file that cannot be removed once kept all its neighbours on the disk.
#[test]
fn what_cannot_be_removed_does_not_keep_its_neighbours() {
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top");
    for name in ["a", "b", "c"] {
        std::fs::create_dir_all(top.join(name)).unwrap();
        std::fs::write(top.join(name).join("file"), "x").unwrap();
    }
    let inside = top.join("b");
    let mounted = tmpfs(&inside);
    assert!(matches!(tree::remove(&top, &|| false), Err(TreeError::MountPoint(_))));
    assert!(!top.join("a").exists() && top.join("b").exists() && !top.join("c").exists());
    drop(mounted);
    tree::remove(&top, &|| false).unwrap();
    assert!(!top.exists());
}

#[test]
fn what_a_killed_trial_left_is_taken_away() {
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let merged = dir.path().join(".probe-77/merged");
    std::fs::create_dir_all(&merged).unwrap();
    std::mem::forget(tmpfs(&merged));
    std::fs::create_dir(dir.path().join(".check-78")).unwrap();
    std::fs::create_dir(dir.path().join("other")).unwrap();
    probe::clear_leftovers(dir.path());
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["other"]);
}

#[test]
fn a_mount_on_the_top_itself_is_refused_too() {
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top");
    std::fs::create_dir(&top).unwrap();
    let mounted = tmpfs(&top);
    assert!(matches!(tree::remove(&top, &|| false), Err(TreeError::MountPoint(_))));
    drop(mounted);
    tree::remove(&top, &|| false).unwrap();
}

#[test]
fn the_probe_tells_what_to_do() {
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let options = probe::overlay_options(dir.path(), &[]).unwrap();
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none(), "the probe left something");
    assert!(options.iter().all(|o| o == "index=off" || o == "userxattr"), "{options:?}");
    let kept = probe::overlay_options(dir.path(), &["index=on".to_owned()]).unwrap();
    assert!(kept.contains(&"index=on".to_owned()) && !kept.contains(&"index=off".to_owned()));

    let unknown = probe::overlay_options(dir.path(), &["no_such_option".to_owned()]).unwrap_err();
    assert!(unknown.to_string().contains("overlayfs.mount_options"), "{unknown}");

    // An overlay on an overlay's upper: what a root inside a container would be.
    let nested = tempfile::tempdir().unwrap();
    for name in ["lower", "upper", "work", "merged"] {
        std::fs::create_dir(nested.path().join(name)).unwrap();
    }
    let at = |name: &str| nested.path().join(name).display().to_string();
    let data = format!("lowerdir={},upperdir={},workdir={}", at("lower"), at("upper"), at("work"));
    let merged = nested.path().join("merged");
    let mount = Command::new("mount").args(["-t", "overlay", "overlay", "-o", &data]).arg(&merged).status();
    assert!(mount.unwrap().success());
    let mounted = Mounted(&merged);
    let refused = probe::overlay_options(&merged, &[]).unwrap_err();
    assert!(refused.to_string().contains("ext4, xfs or btrfs"), "{refused}");
    drop(mounted);
}

#[test]
fn a_mapped_directory_shows_other_owners() {
    use std::os::unix::fs::MetadataExt;
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    std::fs::create_dir(&source).unwrap();
    std::fs::create_dir(&target).unwrap();
    std::fs::write(source.join("file"), "x").unwrap();
    let mounted = speedy::sys::idmap::IdMapped::mount(&source, &target, 100_000, 65_536).unwrap();
    assert_eq!(std::fs::metadata(target.join("file")).unwrap().uid(), 100_000);
    drop(mounted);
    assert!(!target.join("file").exists());
}
