//! A root of thin volumes: how its pool is, and the way out where it is in trouble. Changes nothing, and may run beside the daemon.

use std::path::Path;

use serde_json::{Value, json};

use super::{Area, Finding, StoreReport};
use crate::snapshot::metastore;

const TITLE: &str = "pool of thin volumes";

/// What the pool of the root says.
pub(super) fn report(root: &Path) -> StoreReport {
    let (finding, pool) = match metastore::read_property(root, "thin.tag") {
        Ok(Some(tag)) => look(&tag),
        Ok(None) => {
            (Finding::skipped(Area::Store, TITLE, "no pool yet: the first start makes it"), Value::Null)
        }
        Err(error) => (Finding::failure(Area::Store, TITLE, error.to_string()), Value::Null),
    };
    let snapshots = metastore::read_recorded(root).ok().flatten().map(|recorded| recorded.ready.len());
    StoreReport {
        findings: vec![finding],
        detail: json!({ "present": true, "driver": "thin", "snapshots": snapshots, "pool": pool }),
    }
}

#[cfg(feature = "devicemapper")]
fn look(tag: &str) -> (Finding, Value) {
    use crate::driver::thin;

    let pool = thin::pool_name(tag);
    let status = match thin::look(tag) {
        Err(error) => return (Finding::failure(Area::Store, TITLE, error.to_string()), Value::Null),
        Ok(None) => {
            let finding = Finding::warning(Area::Store, TITLE, format!("{pool} is not active"));
            return (finding.fix("speedy serve makes it active, or says why it cannot"), Value::Null);
        }
        Ok(Some(status)) => status,
    };
    let shares = format!(
        "{pool}: {} % of data and {} % of metadata free",
        status.data.free_percent(),
        status.metadata.free_percent()
    );
    let detail = json!({
        "name": pool,
        "mode": format!("{:?}", status.mode),
        "needs_check": status.needs_check,
        "transaction": status.transaction,
        "data_free_percent": status.data.free_percent(),
        "metadata_free_percent": status.metadata.free_percent(),
    });
    match thin::trouble(&status) {
        None => (Finding::ok(Area::Store, TITLE, shares), detail),
        Some(problem) => (Finding::failure(Area::Store, TITLE, shares).fix(problem), detail),
    }
}

#[cfg(not(feature = "devicemapper"))]
fn look(_tag: &str) -> (Finding, Value) {
    (Finding::failure(Area::Store, TITLE, "this build has no devicemapper driver"), Value::Null)
}
