//! What every storage driver must do.

use speedy::driver::{Access, Creation, Driver, DriverError, Id, Inventory, MountRequest, Purpose};

const NEVER: &dyn Fn() -> bool = &|| false;

/// All of it, on an empty driver.
pub(crate) fn run(driver: &dyn Driver) {
    reserve_and_remove_can_be_repeated(driver);
    inventory_is_what_was_made(driver);
    a_missing_parent_is_an_error(driver);
    d1_mounts_depends_only_on_its_arguments(driver);
    usage_of_something_missing_is_an_error(driver);
}

fn id(serial: u64) -> Id {
    Id { serial, slot: u32::try_from(serial % 1_000_000).unwrap() }
}

/// By whichever number the storage has them.
fn found(driver: &dyn Driver) -> Vec<u64> {
    let mut found: Vec<u64> = match driver.inventory().unwrap() {
        Inventory::Serials(serials) => serials,
        Inventory::Slots(slots) => slots.into_iter().map(u64::from).collect(),
    };
    found.sort_unstable();
    found
}

fn reserve_and_remove_can_be_repeated(driver: &dyn Driver) {
    for _ in 0..2 {
        driver.reserve(&[id(1), id(2)]).unwrap();
    }
    driver.create(&Creation::active(id(1), None)).unwrap();
    driver.create(&Creation::active(id(2), Some(id(1)))).unwrap();
    for _ in 0..2 {
        driver.remove(id(2), NEVER).unwrap();
        driver.remove(id(1), NEVER).unwrap();
    }
    assert!(found(driver).is_empty());
}

fn inventory_is_what_was_made(driver: &dyn Driver) {
    let ids = [id(3), id(7)];
    driver.reserve(&ids).unwrap();
    ids.iter().for_each(|id| driver.create(&Creation::active(*id, None)).unwrap());
    assert_eq!(found(driver), [3, 7]);
    for id in ids {
        assert!(driver.is_unused(id).unwrap());
        driver.remove(id, NEVER).unwrap();
    }
    assert!(found(driver).is_empty());
}

fn a_missing_parent_is_an_error(driver: &dyn Driver) {
    driver.reserve(&[id(3)]).unwrap();
    let made = driver.create(&Creation::active(id(3), Some(id(4))));
    assert!(matches!(made, Err(DriverError::Missing(_))), "{made:?}");
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
        size: None,
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
