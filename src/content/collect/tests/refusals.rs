//! What a collection refuses, and what it does to a quiet store.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::sleep;

use super::catalogue::{Catalogue, key, node};
use crate::content::collect::keep::KeepRule;
use crate::content::collect::{CollectError, Collector, Freed, Plan, Rules};
use crate::content::survey::Survey;
use crate::content::{ContentError, ContentStore, reference};
use crate::object::layout::{self, Kind};
use crate::object::simulated::World;
use crate::object::{ObjectError, Objects};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// A store with the images 0 and 3, which share nothing, a hundred days old.
struct Old {
    world: Arc<World>,
    objects: Objects,
    store: ContentStore,
    catalogue: Catalogue,
}

async fn old() -> Old {
    let catalogue = Catalogue::make().await;
    let world = World::new(1, Duration::ZERO);
    let objects = world.seen_by(0, 0).patient(Duration::from_secs(600));
    let (store, _) = node(&objects, 0, Duration::ZERO, 0);
    catalogue.publish(&store, 0).await;
    catalogue.publish(&store, 3).await;
    sleep(100 * DAY).await;
    Old { world, objects, store, catalogue }
}

impl Old {
    async fn plan(&self, rules: &Rules) -> (Collector, Plan) {
        let collector = Collector::new(self.objects.clone(), rules.clone()).unwrap();
        let plan = collector.plan(&|_| ()).await.unwrap();
        (collector, plan)
    }

    async fn collect(&self, rules: &Rules) -> Result<Freed, CollectError> {
        let (collector, plan) = self.plan(rules).await;
        collector.execute(&plan, &|_| ()).await
    }

    /// Refused, and nothing is changed.
    async fn refused(&self, rules: &Rules) -> CollectError {
        let before = self.world.objects();
        let refused = self.collect(rules).await.unwrap_err();
        assert_eq!(self.world.objects(), before);
        refused
    }

    async fn remove(&self, image: usize) {
        self.objects.delete(&self.catalogue.name(image).object(key(0).public())).await.unwrap();
    }

    fn has(&self, name: &str) -> bool {
        self.world.objects().iter().any(|(object, _)| object == name)
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_in_use_loses_nothing_and_a_plan_writes_nothing() {
    let old = old().await;
    let before = old.world.objects();
    let (collector, plan) = old.plan(&Rules::default()).await;
    assert_eq!((plan.report.dead().objects, plan.report.images), (0, 2));
    assert_eq!(old.world.objects(), before);
    assert_eq!(collector.execute(&plan, &|_| ()).await.unwrap(), Freed::default());
    let after: Vec<_> =
        old.world.objects().into_iter().filter(|(name, _)| name != layout::COLLECTION).collect();
    assert_eq!(after, before);
}

#[tokio::test(start_paused = true)]
async fn what_a_removed_image_needed_goes_in_two_steps() {
    let old = old().await;
    old.remove(0).await;
    let layer = &old.catalogue.layers[0];
    let (collector, plan) = old.plan(&Rules::default()).await;
    assert_eq!(plan.report.kind(Kind::Ref).dead.objects, 1);
    assert_eq!(plan.report.kind(Kind::Index).later.objects, 1);
    // Some layers begin with the same block.
    let others: Vec<&String> = [3, 4].iter().flat_map(|other| &old.catalogue.layers[*other].chunks).collect();
    let own: Vec<&String> = layer.chunks.iter().filter(|chunk| !others.contains(chunk)).collect();
    let chunks = own.len() as u64;
    assert_eq!(plan.report.kind(Kind::Chunk).later.objects, chunks);
    collector.execute(&plan, &|_| ()).await.unwrap();
    assert!(!old.has(&reference::name(&old.catalogue.chain(0, 0), key(0).public())));
    assert!(old.has(&layer.index) && layer.chunks.iter().all(|chunk| old.has(chunk)));
    sleep(2 * DAY + Duration::from_secs(60)).await;
    let freed = old.collect(&Rules::default()).await.unwrap();
    let of = |kind| freed.kinds.iter().find(|(found, _)| *found == kind).map(|(_, tally)| tally.objects);
    assert_eq!((of(Kind::Index), of(Kind::Chunk)), (Some(1), Some(chunks)));
    assert!(!old.has(&layer.index) && !own.iter().any(|chunk| old.has(chunk)));
    let survey = Survey::of(old.objects.clone(), &|_| ()).await.unwrap();
    assert!(survey.images.len() == 1 && survey.images[0].is_complete(), "{survey:?}");
}

#[tokio::test(start_paused = true)]
async fn rules_remove_names_but_not_of_images_in_use() {
    let old = old().await;
    let rule = KeepRule::parse("r.example/* used<30d").unwrap();
    let rules = Rules { keep: vec![rule], ..Rules::default() };
    assert!(old.store.record_use(&old.catalogue.name(3)).await.unwrap());
    assert!(!old.store.record_use(&old.catalogue.name(3)).await.unwrap());
    let (collector, plan) = old.plan(&rules).await;
    let removed: Vec<&str> = plan.report.removed.iter().map(|image| image.reference.as_str()).collect();
    assert_eq!(removed, ["r.example/app:0"]);
    // Published again before it is executed: it stays.
    old.catalogue.publish(&old.store, 0).await;
    let freed = collector.execute(&plan, &|_| ()).await.unwrap();
    assert_eq!(freed.total().objects, 0);
    assert!(old.has(&old.catalogue.name(0).object(key(0).public())));
    // And goes when it was not used for long again.
    sleep(31 * DAY).await;
    old.store.record_use(&old.catalogue.name(3)).await.unwrap();
    let freed = old.collect(&rules).await.unwrap();
    assert!(freed.kinds.iter().any(|(kind, tally)| *kind == Kind::Name && tally.objects == 1), "{freed:?}");
}

#[tokio::test(start_paused = true)]
async fn a_short_grace_period_is_for_those_who_are_alone() {
    let rules = Rules { grace: Duration::from_secs(90 * 60), ..Rules::default() };
    let refused = Collector::new(Objects::memory(), rules.clone()).unwrap_err();
    assert!(refused.to_string().starts_with("a grace period of 90m is shorter"), "{refused}");
    assert!(Collector::new(Objects::memory(), Rules { alone: true, ..rules }).is_ok());
}

#[tokio::test(start_paused = true)]
async fn what_a_newer_version_wrote_is_left_alone() {
    let old = old().await;
    old.remove(0).await;
    let name = reference::name(&old.catalogue.chain(1, 1), key(1).public());
    old.objects.put(&name, Bytes::from_static(&[0x08, 2])).await.unwrap();
    sleep(10 * DAY).await;
    for ignore_damage in [false, true] {
        let refused = old.refused(&Rules { ignore_damage, ..Rules::default() }).await;
        assert!(
            matches!(&refused, CollectError::Newer { count: 1, name: found, .. } if *found == name),
            "{refused}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_of_a_newer_version_is_left_alone() {
    let old = old().await;
    old.objects.put(layout::STORE, Bytes::from_static(br#"{"format": 2}"#)).await.unwrap();
    old.objects.forget_description();
    let before = old.world.objects();
    let collector = Collector::new(old.objects.clone(), Rules::default()).unwrap();
    let refused = collector.plan(&|_| ()).await.unwrap_err();
    let format = matches!(
        refused,
        CollectError::Content(ContentError::Object(ObjectError::Format { found: 2, known: 1 }))
    );
    assert!(format, "{refused}");
    assert_eq!(old.world.objects(), before);
}

#[tokio::test(start_paused = true)]
async fn damage_stops_it_unless_it_is_to_be_ignored() {
    let old = old().await;
    old.remove(0).await;
    let name = old.catalogue.name(5).object(key(1).public());
    old.objects.put(&name, Bytes::from_static(b"rubbish")).await.unwrap();
    sleep(10 * DAY).await;
    let refused = old.refused(&Rules::default()).await;
    assert!(matches!(&refused, CollectError::Damaged { name: found, .. } if *found == name), "{refused}");
    old.collect(&Rules { ignore_damage: true, ..Rules::default() }).await.unwrap();
    assert!(!old.has(&name));
}

/// An index that a ref names and that is not there: its chunks were not known, and went.
#[tokio::test(start_paused = true)]
async fn a_missing_index_is_damage() {
    let old = old().await;
    let index = &old.catalogue.layers[0].index;
    old.objects.delete(index).await.unwrap();
    let refused = old.refused(&Rules::default()).await;
    assert!(matches!(&refused, CollectError::Damaged { name, .. } if name == index), "{refused}");
    let survey = Survey::of(old.objects.clone(), &|_| ()).await.unwrap();
    let complete: Vec<bool> = survey.images.iter().map(|line| line.is_complete()).collect();
    assert_eq!(complete, [false, true], "{survey:?}");
}

#[tokio::test(start_paused = true)]
async fn a_store_without_a_single_name_is_asked_about() {
    let old = old().await;
    old.remove(0).await;
    old.remove(3).await;
    let refused = old.refused(&Rules::default()).await;
    assert!(matches!(refused, CollectError::NoNames { refs: 3 }), "{refused}");
    old.collect(&Rules { no_names: true, ..Rules::default() }).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_wrong_is_told_and_deletes_nothing() {
    let old = old().await;
    old.remove(0).await;
    let there = || {
        let names = old.world.objects().into_iter().map(|(name, _)| name);
        names.filter(|name| name != layout::COLLECTION).collect::<Vec<String>>()
    };
    let before = there();
    let wrong = old.world.seen_by(2 * 3600, 0).patient(Duration::from_secs(600));
    let collector = Collector::new(wrong.clone(), Rules::default()).unwrap();
    let plan = collector.plan(&|_| ()).await.unwrap();
    assert!(plan.report.dead().objects > 0);
    let refused = collector.execute(&plan, &|_| ()).await.unwrap_err();
    assert!(matches!(refused, CollectError::Content(ContentError::Clock { .. })), "{refused}");
    assert_eq!(there(), before);
}

/// Bounded memory does not change what is found.
#[tokio::test(start_paused = true)]
async fn rounds_find_what_one_reading_finds() {
    let old = old().await;
    old.remove(0).await;
    let (mut collector, plan) = old.plan(&Rules::default()).await;
    collector.most_marks = 1;
    let again = collector.plan(&|_| ()).await.unwrap();
    assert_eq!(plan.report.rounds, 1);
    assert!(again.report.rounds > 2, "{}", again.report.rounds);
    assert_eq!(again.report.kinds, plan.report.kinds);
}

#[tokio::test(start_paused = true)]
async fn shared_and_own_bytes_are_told_apart() {
    let catalogue = Catalogue::make().await;
    let objects = World::new(1, Duration::ZERO).seen_by(0, 0).patient(Duration::from_secs(600));
    let (store, _) = node(&objects, 0, Duration::ZERO, 0);
    for image in [0, 1, 5] {
        catalogue.publish(&store, image).await;
    }
    let told = Mutex::new(Vec::new());
    let survey = Survey::of(objects, &|step| told.lock().push(step.doing)).await.unwrap();
    let mut told = told.into_inner();
    told.dedup();
    assert_eq!(told, ["reading names of images", "reading refs", "reading indexes", "looking at chunks"]);
    let [base, app, alone] = survey.images.as_slice() else { panic!("{survey:?}") };
    let common = |line: &crate::content::survey::Line| line.bytes - line.own_bytes;
    assert_eq!(base.own_bytes, 0);
    assert!(app.own_bytes > 0 && app.own_bytes < app.bytes && app.bytes > base.bytes);
    // All but the block with which they may all begin.
    assert!(common(alone) <= 4096, "{alone:?}");
    assert_eq!(survey.chunk_bytes, app.bytes + alone.own_bytes);
    assert_eq!(survey.unused_bytes, 0);
    assert_eq!((app.layers, app.publishers.len()), (2, 1));
}

/// A ref was lost, two collections took the index and the chunks of its layer, and fsck had nothing left to write the ref from.
#[tokio::test(start_paused = true)]
async fn a_layer_of_a_named_image_without_a_ref_is_damage() {
    let old = old().await;
    let lost = reference::name(&old.catalogue.chain(3, 0), key(0).public());
    old.objects.delete(&lost).await.unwrap();
    sleep(10 * DAY).await;
    let refused = old.refused(&Rules::default()).await;
    assert!(matches!(&refused, CollectError::Damaged { name, .. } if lost.starts_with(name)), "{refused}");
    // What nothing names any more is missed by nobody.
    old.remove(3).await;
    old.collect(&Rules::default()).await.unwrap();
}

/// Between plan and execution were days: an image that the rules gave up was published again, and given up again. Its name, another object
/// than the one of the plan, stayed, and its documents went.
#[tokio::test(start_paused = true)]
async fn a_name_that_a_plan_did_not_see_keeps_what_it_needs() {
    let old = old().await;
    let rules = Rules { keep: vec![KeepRule::parse("r.example/app:0 used<3d").unwrap()], ..Rules::default() };
    let (collector, plan) = old.plan(&rules).await;
    assert_eq!(plan.report.removed.len(), 1);
    sleep(DAY / 2).await;
    old.catalogue.publish(&old.store, 0).await;
    sleep(4 * DAY).await;
    collector.execute(&plan, &|_| ()).await.unwrap();
    let name = old.catalogue.name(0).object(key(0).public());
    assert!(old.has(&name), "it goes with the next plan");
    for need in old.catalogue.needs(0, &[*key(0).public()]).into_iter().flatten() {
        assert!(old.has(&need), "{need} went");
    }
    old.collect(&rules).await.unwrap();
    assert!(!old.has(&name));
}

/// Damage was to be ignored, and one answer was damaged on its way, or an object between plan and execution: what the plan had found to be
/// needed went with it.
#[tokio::test(start_paused = true)]
async fn only_damage_that_the_plan_found_is_ignored() {
    for what in ["images/", "refs/", "indexes/"] {
        let old = old().await;
        let publisher = [*key(0).public()];
        assert!(old.world.harm(&old.catalogue.layers[0].index, false));
        let (collector, plan) =
            old.plan(&Rules { ignore_damage: true, no_names: true, ..Rules::default() }).await;
        assert_eq!(plan.report.damage.len(), 1);
        let mut needs: Vec<String> = old.catalogue.needs(3, &publisher).into_iter().flatten().collect();
        needs.push(old.catalogue.name(3).object(&publisher[0]));
        let harmed = needs.iter().find(|need| need.starts_with(what)).unwrap();
        assert!(old.world.harm(harmed, false));
        let refused = collector.execute(&plan, &|_| ()).await.unwrap_err();
        let told = matches!(&refused, CollectError::DamagedSince { name, .. } if name == harmed);
        assert!(told, "{harmed}: {refused}");
        let gone: Vec<&String> = needs.iter().filter(|need| !old.has(need)).collect();
        assert!(gone.is_empty(), "{harmed} was harmed, and {gone:?} went");
        // The next plan knows it.
        old.collect(&Rules { ignore_damage: true, no_names: true, ..Rules::default() }).await.unwrap();
    }
}
