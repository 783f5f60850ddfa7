//! The store: what is recorded against what is on the disk, by the same comparison that a start makes. Changes nothing, and may
//! run beside the daemon.

use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::{Area, Finding, StoreReport};
use crate::driver::overlay::{Overlay, OverlayOptions};
use crate::driver::{Driver, Id};
use crate::layer;
use crate::snapshot::SnapshotError;
use crate::snapshot::metastore::{self, Recorded};
use crate::snapshot::reconcile::{self, Inventory, Plan};

const TITLE: &str = "records and storage";
/// A daemon may free something between the two looks; what is wrong stays wrong.
const LOOKS: usize = 3;
const PAUSE: Duration = Duration::from_millis(100);

/// Compares records and storage below `root`.
pub fn report(root: &Path) -> StoreReport {
    if let Ok(Some(driver)) = metastore::read_property(root, "driver")
        && driver == "thin"
    {
        return super::pool::report(root);
    }
    match compare(root) {
        Ok(Some(found)) => describe(&found),
        Ok(None) => StoreReport {
            findings: vec![Finding::skipped(Area::Store, TITLE, "no store yet: the first start makes it")],
            detail: json!({ "present": false }),
        },
        Err(error) => StoreReport {
            findings: vec![
                Finding::failure(Area::Store, TITLE, error.to_string())
                    .fix("look at the message; nothing was changed"),
            ],
            detail: json!({ "present": true, "error": error.to_string() }),
        },
    }
}

/// What a look at both sides found.
struct Found {
    recorded: Recorded,
    plan: Plan,
    /// Serials that no snapshot has and that hold content all the same.
    kept: Vec<u64>,
}

fn compare(root: &Path) -> Result<Option<Found>, SnapshotError> {
    for look in 1.. {
        if !metastore::is_present(root)? {
            return Ok(None);
        }
        let driver = Overlay::at(root, OverlayOptions::default());
        let inventory = Inventory::of(&driver, layer::images_below(root)?)?;
        let Some(recorded) = metastore::read_recorded(root)? else { return Ok(None) };
        let plan = reconcile::plan(&recorded, &inventory);
        let mut kept = recorded.pending.clone();
        kept.retain(|serial| !driver.is_unused(Id { serial: *serial, slot: 0 }).unwrap_or(true));
        if (plan.is_empty() && kept.is_empty()) || look == LOOKS {
            return Ok(Some(Found { recorded, plan, kept }));
        }
        std::thread::sleep(PAUSE);
    }
    Ok(None)
}

fn describe(Found { recorded, plan, kept }: &Found) -> StoreReport {
    let mut findings = Vec::new();
    let summary = format!(
        "{} snapshots, {} to be freed by the next Cleanup, {} made ahead",
        recorded.ready.len(),
        recorded.removing.len(),
        recorded.pending.len()
    );
    if plan.is_empty() {
        findings.push(Finding::ok(Area::Store, TITLE, summary));
    }
    if !plan.missing.is_empty() {
        let keys: Vec<String> = plan.missing.iter().take(5).map(|(_, key)| key.to_string()).collect();
        let detail = format!("{} snapshots have no storage: {}", plan.missing.len(), keys.join(", "));
        findings.push(
            Finding::failure(Area::Store, "missing storage", detail).fix(
                "remove the images that use them and pull again (ctr -n NAMESPACE images rm --sync IMAGE)",
            ),
        );
    }
    if !plan.missing_layers.is_empty() {
        let detail = format!("{} layer images are recorded and not there", plan.missing_layers.len());
        findings.push(Finding::failure(Area::Store, "missing layer images", detail).fix(
            "remove the images that use them and pull again; `speedy explain IMAGE` tells which they are",
        ));
    }
    findings.extend(strangers(plan, kept));
    let serials =
        |missing: &[(u64, crate::snapshot::Key)]| -> Vec<u64> { missing.iter().map(|(s, _)| *s).collect() };
    StoreReport {
        findings,
        detail: json!({
            "present": true,
            "consistent": plan.is_empty(),
            "snapshots": recorded.ready.len(),
            "pending": recorded.pending.len(),
            "removing": recorded.removing.len(),
            "layers": recorded.layers.len(),
            "missing": serials(&plan.missing),
            "missing_layers": plan.missing_layers,
            "kept": kept,
            "unknown": plan.unknown,
            "beyond": plan.beyond,
        }),
    }
}

/// What is on storage and in no record.
fn strangers(plan: &Plan, kept: &[u64]) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !plan.unknown.is_empty() {
        let detail = format!("{} directories that no record names", plan.unknown.len());
        findings.push(
            Finding::warning(Area::Store, "unknown storage", detail)
                .fix("the next start of speedy serve frees them"),
        );
    }
    if !plan.beyond.is_empty() {
        let detail = format!(
            "{} directories with numbers that the records never gave out: metadata.db is older than the disk",
            plan.beyond.len()
        );
        findings.push(
            Finding::failure(Area::Store, "storage from the future", detail)
                .fix("restore the newer metadata.db, or move the directories away; they are never deleted"),
        );
    }
    if !kept.is_empty() {
        let detail = format!(
            "{} directories hold content that no snapshot names: metadata.db is older than they are",
            kept.len()
        );
        findings.push(
            Finding::warning(Area::Store, "kept storage", detail).fix(
                "restore the newer metadata.db, or move away what is not needed; --json has the numbers",
            ),
        );
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::metastore::MetaStore;

    #[test]
    fn no_store_is_skipped_and_nothing_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let report = report(dir.path());
        assert_eq!(report.detail, json!({ "present": false }));
        assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
    }

    #[test]
    fn agreement_and_disagreement_are_told() {
        let dir = tempfile::tempdir().unwrap();
        MetaStore::open(dir.path(), "overlayfs").unwrap().close();
        assert_eq!(report(dir.path()).detail["consistent"], true);
        std::fs::create_dir_all(dir.path().join("l/7")).unwrap();
        let report = report(dir.path());
        assert_eq!(report.detail["consistent"], false);
        assert_eq!(report.detail["beyond"], json!([7]));
        assert_eq!(report.findings.len(), 1);
    }

    #[test]
    fn content_that_no_snapshot_names_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let meta = MetaStore::open(dir.path(), "overlayfs").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let id = runtime.block_on(meta.reserve(1)).unwrap()[0];
        std::fs::create_dir_all(dir.path().join(format!("l/{}/fs/precious", id.serial))).unwrap();
        let report = report(dir.path());
        assert_eq!(report.detail["kept"], json!([id.serial]));
        assert_eq!(report.detail["consistent"], true);
    }
}
