//! Every driver through the suite, and the overlay's mounts as values.

use speedy::driver::memory::Memory;
use speedy::driver::overlay::{Overlay, OverlayOptions};
use speedy::driver::{Access, Driver, Id, IdMapping, Inventory, Mount, MountRequest, Owner, Purpose};

use crate::suite;

#[test]
fn memory_driver() {
    suite::driver::run(&Memory::default());
}

#[test]
fn overlay_driver() {
    let root = tempfile::tempdir().unwrap();
    suite::driver::run(&Overlay::open(root.path(), OverlayOptions::default()).unwrap());
}

#[test]
fn what_is_not_the_overlay_drivers_stays() {
    let root = tempfile::tempdir().unwrap();
    let driver = Overlay::open(root.path(), OverlayOptions::default()).unwrap();
    for name in ["007", "x", "-1", "1 ", "99999999999999999999999"] {
        std::fs::create_dir(root.path().join("l").join(name)).unwrap();
    }
    assert_eq!(driver.inventory().unwrap(), Inventory::Serials(Vec::new()));
}

/// The shapes of containerd's own overlayfs snapshotter; appliers, shims and BuildKit take them apart again.
#[test]
fn overlay_mounts_are_containerds() {
    let root = tempfile::tempdir().unwrap();
    let mount_options = vec!["volatile".to_owned(), "index=off".to_owned()];
    let driver = Overlay::open(root.path(), OverlayOptions { mount_options }).unwrap();
    let at = |serial: u64, name: &str| root.path().join(format!("l/{serial}/{name}")).display().to_string();
    let id = |serial: u64| Id { serial, slot: 0 };
    let mounts = |access, parents: &[Id], mapping, purpose| {
        driver.mounts(&MountRequest { id: id(9), parents, access, mapping, purpose, size: None }).remove(0)
    };
    let bind = |source: String, options: &[&str]| Mount {
        kind: "bind".into(),
        source,
        options: options.iter().map(|o| (*o).to_owned()).collect(),
    };
    let overlay = |options: Vec<String>| Mount { kind: "overlay".into(), source: "overlay".into(), options };
    let (rw, ro, plain) = (Access::ReadWrite, Access::ReadOnly, Purpose::Ordinary);

    assert_eq!(mounts(rw, &[], None, plain), bind(at(9, "fs"), &["rw", "rbind"]));
    assert_eq!(mounts(ro, &[], None, plain), bind(at(9, "fs"), &["ro", "rbind"]));
    assert_eq!(mounts(ro, &[id(4)], None, plain), bind(at(4, "fs"), &["ro", "rbind"]));
    let lower = format!("lowerdir={}:{}", at(4, "fs"), at(2, "fs"));
    let extra = ["volatile".to_owned(), "index=off".to_owned()];
    assert_eq!(
        mounts(ro, &[id(4), id(2)], None, plain),
        overlay([vec![lower.clone()], extra.to_vec()].concat())
    );
    let writable = vec![format!("workdir={}", at(9, "work")), format!("upperdir={}", at(9, "fs"))];
    assert_eq!(
        mounts(rw, &[id(4), id(2)], None, plain),
        overlay([writable.clone(), vec![lower], extra.to_vec()].concat())
    );
    let mapping = IdMapping {
        uids: "0:1000:10".into(),
        gids: "0:2000:10".into(),
        root: Owner { uid: 1000, gid: 2000 },
    };
    let mapped = mounts(rw, &[id(4)], Some(&mapping), plain);
    assert_eq!(mapped.options[..2], ["uidmap=0:1000:10", "gidmap=0:2000:10"]);
    assert_eq!(mapped.options[2..4], writable[..]);
    // A layer extracted away from its parent keeps its whiteouts only if the applier sees an overlay.
    assert_eq!(
        mounts(rw, &[], None, Purpose::DetachedLayer),
        overlay(vec![format!("upperdir={}", at(9, "fs"))])
    );
}

/// containerd changes into the lowerdirs' common parent when the options are too long; what is left must fit a page.
#[test]
fn many_layers_fit_one_page_of_options() {
    let root = tempfile::tempdir().unwrap();
    let driver = Overlay::open(root.path(), OverlayOptions::default()).unwrap();
    let parents: Vec<Id> = (10_000..10_128).map(|serial| Id { serial, slot: 0 }).collect();
    let request = MountRequest {
        id: Id { serial: 20_000, slot: 0 },
        parents: &parents,
        access: Access::ReadWrite,
        mapping: None,
        purpose: Purpose::Ordinary,
        size: None,
    };
    let options = driver.mounts(&request).remove(0).options.join(",");
    let common = format!("{}/", root.path().join("l").display());
    let (own, lower) = options.split_once("lowerdir=").unwrap();
    let compacted = own.len() + lower.replace(&common, "").len();
    assert!(compacted < 2048, "{compacted} bytes");
}
