//! A repair beside a collection.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;

use super::METER;
use crate::cli::fsck::repair::{Outcome, Repair};
use crate::config::Config;
use crate::content::collect::tests::catalogue::{Catalogue, keys, node};
use crate::content::collect::{Collector, Rules, Step};
use crate::content::fsck::{Checker, Options};
use crate::object::simulated::World;

/// A collection that ignores damage had read the wrong bytes of an index. A repair brought the index back and called it sound, and the
/// collection went on to delete its chunks.
#[tokio::test(start_paused = true)]
async fn an_index_that_comes_back_beside_a_collection_has_its_chunks() {
    let catalogue = Catalogue::make().await;
    let world = World::new(1, Duration::ZERO);
    let objects = world.seen_by(0, 0).patient(Duration::from_secs(600));
    catalogue.publish(&node(&objects, 0, Duration::ZERO, 0).0, 5).await;
    sleep(Duration::from_secs(100 * 24 * 3600)).await;
    let layer = &catalogue.layers[catalogue.images[5][0]];
    assert!(world.harm(&layer.index, false));

    let mut config = Config {
        root: catalogue.root(0),
        containerd: PathBuf::from("/nonexistent/containerd.sock"),
        ..Config::default()
    };
    config.trust.keys = keys().iter().map(ToString::to_string).collect();
    let checker = Checker::new(objects.clone(), Options::default());
    let report = checker.check(&|_| ()).await.unwrap();
    let repair = Repair::new(&config, &objects, &checker, &report, None).unwrap();

    // Slow enough to be met in the middle of it.
    let rules = Rules { ignore_damage: true, rate: 1, ..Rules::default() };
    let collector = Collector::new(objects.clone(), rules).unwrap();
    let plan = collector.plan(&|_| ()).await.unwrap();
    let marked = Notify::new();
    let watch = |step: Step| {
        if step.doing == "looking at chunks" {
            marked.notify_one();
        }
    };
    let repaired = async {
        marked.notified().await;
        repair.run(None, &METER).await.unwrap()
    };
    let (freed, outcomes) = tokio::join!(collector.execute(&plan, &watch), repaired);
    assert!(freed.unwrap().total().objects > 0, "the collection had nothing to do");
    assert_eq!(outcomes, [Outcome::Repaired]);
    let report = checker.check(&|_| ()).await.unwrap();
    let found: Vec<String> = report.findings.iter().map(|finding| finding.object.name()).collect();
    assert!(found.is_empty(), "it called the index repaired, and then these were gone: {found:?}");
}
