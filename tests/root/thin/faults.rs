//! Devices below a pool that fail, and come back: what is said, that nothing which was committed is lost, and that the way out that
//! is told leads out.

use std::fs;

use speedy::driver::thin::{Devices, Kind, trouble};
use speedy::driver::{Access, Creation, Driver, DriverError};

use super::disks::{DATA, Disks, METADATA};
use super::{Mounted, NEVER, Node, clear, id, request, sh};

/// A root on devices that can be made to fail; the node goes first.
struct Failing {
    node: Node,
    disks: Disks,
}

impl Failing {
    fn new(tag: &str, metadata_mib: u64, reserve: u8) -> Failing {
        let mut node = Node::new(tag, Kind::Ext4, 0);
        let disks = Disks::new(tag, metadata_mib, 256);
        node.options.pool.devices =
            Devices::Direct { data: disks.device(DATA), metadata: disks.device(METADATA) };
        node.options.pool.reserve = reserve;
        Failing { node, disks }
    }
}

/// A snapshot with a file, committed.
fn commit_one(driver: &dyn Driver, mounted: impl FnOnce() -> Mounted) {
    let one = mounted();
    fs::write(one.path("file"), vec![7; 2 << 20]).unwrap();
    sh("sync");
    drop(one);
    driver.seal(id(1)).unwrap();
}

fn require_one(driver: &speedy::driver::thin::Thin) {
    let (below, view) = ([id(1)], id(90));
    let view = request(view, &below, Access::ReadOnly, None);
    driver.create(&Creation { access: Access::ReadOnly, ..Creation::active(view.id, Some(id(1))) }).unwrap();
    let seen = Mounted::of(driver, &view);
    assert_eq!(fs::read(seen.path("file")).unwrap(), vec![7; 2 << 20]);
    drop(seen);
    driver.remove(view.id, NEVER).unwrap();
}

/// The kernel takes a message and writes the metadata afterwards: an answer that did not wait for that would promise a snapshot that
/// is gone when the device is back.
#[test]
#[ignore = "needs device-mapper"]
fn a_metadata_device_that_fails_is_named_and_repaired() {
    let failing = Failing::new("eiometa", 8, 0);
    let driver = failing.node.recovered(&[]);
    driver.reserve(&[id(1), id(2)]).unwrap();
    driver.create(&Creation::active(id(1), None)).unwrap();
    commit_one(&driver, || Mounted::of(&driver, &request(id(1), &[], Access::ReadWrite, None)));

    failing.disks.fail(METADATA, true);
    let refused = driver.create(&Creation::active(id(2), Some(id(1)))).unwrap_err();
    println!("a snapshot: {refused}");
    let said = trouble(&driver.status().unwrap()).unwrap();
    println!("the pool: {said}");
    assert!(said.contains("dmsetup remove") && said.contains("thin_check"), "{said}");
    let again = driver.create(&Creation::active(id(2), Some(id(1))));
    assert!(matches!(again, Err(DriverError::Unsupported(_))), "and no snapshot afterwards: {again:?}");
    drop(driver);

    // As it says.
    failing.disks.fail(METADATA, false);
    clear("eiometa");
    sh("pdata_tools thin_check --clear-needs-check-flag /dev/mapper/failing-eiometa-metadata");
    let driver = failing.node.recovered(&[id(1), id(2)]);
    assert_eq!(trouble(&driver.status().unwrap()), None);
    require_one(&driver);
    driver.remove(id(2), NEVER).unwrap();
    driver.create(&Creation::active(id(2), Some(id(1)))).unwrap();
}

#[test]
#[ignore = "needs device-mapper"]
fn a_data_device_that_fails_costs_what_was_not_committed() {
    let failing = Failing::new("eiodata", 8, 0);
    let driver = failing.node.recovered(&[]);
    driver.reserve(&[id(1), id(2)]).unwrap();
    driver.create(&Creation::active(id(1), None)).unwrap();
    commit_one(&driver, || Mounted::of(&driver, &request(id(1), &[], Access::ReadWrite, None)));
    driver.create(&Creation::active(id(2), Some(id(1)))).unwrap();
    let refused = driver.fill(id(2), &mut |dir| {
        fs::write(dir.join("more"), vec![8; 2 << 20])?;
        // From here to the sync.
        failing.disks.fail(DATA, true);
        Ok(())
    });
    let refused = refused.unwrap_err();
    println!("a layer: {refused}");
    assert!(matches!(refused, DriverError::Io { .. }), "{refused:?}");
    failing.disks.fail(DATA, false);
    driver.remove(id(2), NEVER).unwrap();
    require_one(&driver);
    driver.create(&Creation::active(id(2), Some(id(1)))).unwrap();
    driver.fill(id(2), &mut |dir| fs::write(dir.join("more"), vec![8; 2 << 20])).unwrap();
}

/// Each snapshot takes some blocks of metadata.
#[test]
#[ignore = "needs device-mapper"]
fn a_metadata_device_that_is_nearly_full_takes_no_more_snapshots() {
    let failing = Failing::new("fullmeta", 2, 50);
    let driver = failing.node.recovered(&[]);
    let ids: Vec<_> = (1..600).map(id).collect();
    driver.reserve(&ids).unwrap();
    driver.create(&Creation::active(id(1), None)).unwrap();
    commit_one(&driver, || Mounted::of(&driver, &request(id(1), &[], Access::ReadWrite, None)));
    let mut made = Vec::new();
    let refused = loop {
        let next = ids[made.len() + 1];
        match driver.create(&Creation::active(next, None)) {
            Ok(()) => made.push(next),
            Err(refused) => break refused,
        }
        // Blocks of its own.
        driver.fill(next, &mut |dir| fs::write(dir.join("own"), "own")).unwrap();
        driver.seal(next).unwrap();
    };
    let DriverError::Full { source, .. } = &refused else { panic!("{refused:?}") };
    println!("after {} snapshots: {source}", made.len());
    assert!(source.to_string().contains("of the pool's metadata is free"), "{source}");
    assert!(made.len() > 5, "{}", made.len());
    for id in &made {
        driver.remove(*id, NEVER).unwrap();
    }
    require_one(&driver);
    driver.create(&Creation::active(made[0], Some(id(1)))).unwrap();
}
