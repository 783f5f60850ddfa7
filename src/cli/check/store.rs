//! The store: what is recorded against what is on the disk, by the same comparison that a start makes. Changes nothing, and may
//! run beside the daemon.

use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::{Area, Finding, StoreReport};
use crate::driver::Driver;
use crate::driver::overlay::{Overlay, OverlayOptions};
use crate::snapshot::SnapshotError;
use crate::snapshot::metastore::{self, Recorded};
use crate::snapshot::reconcile::{self, Plan};

const TITLE: &str = "records and storage";
/// A daemon may free something between the two looks; what is wrong stays wrong.
const LOOKS: usize = 3;
const PAUSE: Duration = Duration::from_millis(100);

/// Compares records and storage below `root`.
pub fn report(root: &Path) -> StoreReport {
    match compare(root) {
        Ok(Some((recorded, plan))) => describe(&recorded, &plan),
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

fn compare(root: &Path) -> Result<Option<(Recorded, Plan)>, SnapshotError> {
    for look in 1.. {
        if !metastore::is_present(root)? {
            return Ok(None);
        }
        let inventory = Overlay::at(root, OverlayOptions::default()).inventory()?;
        let Some(recorded) = metastore::read_recorded(root)? else { return Ok(None) };
        let plan = reconcile::plan(&recorded, &inventory);
        if plan.is_empty() || look == LOOKS {
            return Ok(Some((recorded, plan)));
        }
        std::thread::sleep(PAUSE);
    }
    Ok(None)
}

fn describe(recorded: &Recorded, plan: &Plan) -> StoreReport {
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
            "missing": serials(&plan.missing),
            "unknown": plan.unknown,
            "beyond": plan.beyond,
        }),
    }
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
}
