//! What every storage driver must do.

use speedy::driver::{Access, Driver, DriverError, Id, MountRequest, Purpose};

const NEVER: &dyn Fn() -> bool = &|| false;

/// All of it, on an empty driver.
pub(crate) fn run(driver: &dyn Driver) {
    reserve_and_remove_can_be_repeated(driver);
    inventory_is_what_was_reserved(driver);
    a_missing_parent_is_an_error(driver);
    d1_mounts_depends_only_on_its_arguments(driver);
    usage_of_something_missing_is_an_error(driver);
}

fn id(serial: u64) -> Id {
    Id { serial, slot: u32::try_from(serial).unwrap() }
}

fn reserve_and_remove_can_be_repeated(driver: &dyn Driver) {
    for _ in 0..2 {
        driver.reserve(&[id(1), id(2)]).unwrap();
    }
    driver.create(id(1), None, None).unwrap();
    driver.create(id(2), Some(id(1)), None).unwrap();
    for _ in 0..2 {
        driver.remove(id(2), NEVER).unwrap();
        driver.remove(id(1), NEVER).unwrap();
    }
    assert!(driver.inventory().unwrap().is_empty());
}

fn inventory_is_what_was_reserved(driver: &dyn Driver) {
    driver.reserve(&[id(7), id(1_000_000_007)]).unwrap();
    let mut found = driver.inventory().unwrap();
    found.sort_unstable();
    assert_eq!(found, [7, 1_000_000_007]);
    for serial in found {
        driver.remove(id(serial), NEVER).unwrap();
    }
}

fn a_missing_parent_is_an_error(driver: &dyn Driver) {
    driver.reserve(&[id(3)]).unwrap();
    assert!(matches!(driver.create(id(3), Some(id(4)), None), Err(DriverError::Missing(_))));
    driver.remove(id(3), NEVER).unwrap();
}

fn d1_mounts_depends_only_on_its_arguments(driver: &dyn Driver) {
    let parents = [id(12), id(11)];
    let request = |access, parents| MountRequest {
        id: id(13),
        parents,
        access,
        mapping: None,
        purpose: Purpose::Ordinary,
    };
    for access in [Access::ReadWrite, Access::ReadOnly] {
        for below in [&parents[..], &parents[..1], &[]] {
            // Nothing of these ids exists: the answer is made of the arguments alone.
            let before = driver.mounts(&request(access, below));
            assert_eq!(before.len(), 1);
            assert_eq!(before, driver.mounts(&request(access, below)));
        }
    }
}

fn usage_of_something_missing_is_an_error(driver: &dyn Driver) {
    assert!(matches!(driver.usage(id(99), NEVER), Err(DriverError::Missing(_))));
}
