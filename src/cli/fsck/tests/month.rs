//! A month of a fleet: three nodes publish, pull, use, remove, collect, check and repair at random, are killed at any point, have clocks that
//! differ by up to an hour and see listings that are late by up to a quarter of one, on a store that loses and flips objects.
//!
//! What must hold is looked at with every change of the store: while a name is there, so is all that it needs; no rule removes what was used;
//! a check finds only what was harmed. In the end no image lacks a byte, and no dead byte is left.
//!
//! `GC_SCHEDULES` says how many schedules there are, `GC_DAYS` how long each is, `GC_SEED` which is the first.
//!
//! Then each guard of the protocol is taken away, and the same fleet has to notice.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::join_all;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::METER;
use crate::cli::fsck::repair::{Outcome, Repair};
use crate::config::Config;
use crate::content::collect::keep::KeepRule;
use crate::content::collect::tests::catalogue::{Catalogue, Layer, NODES, keys, slow_node};
use crate::content::collect::{CollectError, Collector, Rules, Step};
use crate::content::fsck::{Checker, Finding, Object, Options, Report};
use crate::content::guard::{Guard, Guards};
use crate::content::publish::PublishRequest;
use crate::content::{ContentError, ContentStore, Lookup, Word};
use crate::object::layout::{self, Kind};
use crate::object::simulated::{BEGINNING, Change, Random, World};
use crate::object::{ObjectError, Objects};
use crate::oci::ChainId;

const MINUTE: u64 = 60;
const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;
/// A node may still want what it found so long ago.
const LONGEST_PULL: u64 = 40 * HOUR;
/// By how much what a rule sees may differ from what is so: clocks, late listings, and the time of a collection.
const RULES_SEE: i64 = 2 * 3600;
/// A use is written once a day.
const USE_RENEWAL: i64 = 24 * 3600;

/// What a schedule is like.
#[derive(Debug, Clone)]
struct Weather {
    days: u64,
    /// By how much listings are late.
    late: u64,
    /// For how long a ref without a name stays: half of the time the least that is allowed.
    unnamed: u64,
    /// The store has a clock; else each node dates what it writes, as in a directory.
    one_clock: bool,
    /// The longest pause between two deeds of a node.
    idle: u64,
    /// The longest time that a chunk takes now and then.
    slow: u64,
    /// The longest time between a plan and its execution.
    pause: u64,
    /// Objects are lost and flipped.
    harm: bool,
    /// The first node's clock is wrong by days.
    astray: bool,
    /// A rule for names, and the time of which it keeps what was used.
    keep: Option<(&'static str, i64)>,
    guards: Guards,
}

impl Weather {
    fn of(days: u64, random: &mut Random) -> Weather {
        let mut one = |choices: &[u64]| choices[usize::try_from(random.below(choices.len() as u64)).unwrap()];
        let late = one(&[0, 5 * MINUTE, 15 * MINUTE]);
        let unnamed = one(&[2 * DAY, 7 * DAY]);
        let (one_clock, harm) = (one(&[0, 1]) == 1, one(&[0, 1]) == 1);
        let idle = one(&[HOUR, 12 * HOUR]);
        let pause = one(&[MINUTE, 2 * HOUR, 4 * DAY]);
        let astray = one_clock && one(&[0, 0, 0, 1]) == 1;
        let keep = [
            None,
            None,
            Some(("r.example/* used<3d", 3 * DAY.cast_signed())),
            Some(("r.example/* age<1h used<5d newest=1", 5 * DAY.cast_signed())),
        ][usize::try_from(one(&[0, 1, 2, 3])).unwrap()];
        let guards = Guards::default();
        Weather { days, late, unnamed, one_clock, idle, slow: 7 * HOUR, pause, harm, astray, keep, guards }
    }
}

/// What the store is known to hold, and what went wrong.
#[derive(Default)]
struct Model {
    /// Harmed and not written since; and ever harmed.
    harmed: BTreeSet<String>,
    ever_harmed: BTreeSet<String>,
    /// Of each image when somebody began or ended to remove its names.
    removed: HashMap<usize, i64>,
    /// Of each image when names and uses of it were written.
    used: HashMap<usize, Vec<i64>>,
    counts: BTreeMap<String, u64>,
    violations: Vec<String>,
}

/// One schedule.
struct Fleet {
    catalogue: Arc<Catalogue>,
    world: Arc<World>,
    weather: Weather,
    model: Arc<Mutex<Model>>,
}

/// Which node, and what it acts with.
struct Node {
    store: ContentStore,
    objects: Objects,
    random: Mutex<Random>,
    config: Config,
    /// What it is doing, for the count of what it was killed in.
    doing: Mutex<&'static str>,
    /// Told when it begins to delete, which takes seconds: who dies at any time hardly ever dies in it.
    deletes: Notify,
}

impl Node {
    fn below(&self, limit: u64) -> u64 {
        self.random.lock().below(limit)
    }

    fn image(&self, fleet: &Fleet) -> usize {
        usize::try_from(self.below(fleet.catalogue.images.len() as u64)).unwrap()
    }

    async fn sleep(&self, longest: u64) {
        let time = self.random.lock().seconds(longest);
        sleep(time).await;
    }
}

/// Why something was not done; nothing of it is wrong.
struct Failed;

impl From<ContentError> for Failed {
    fn from(_: ContentError) -> Failed {
        Failed
    }
}

impl From<ObjectError> for Failed {
    fn from(_: ObjectError) -> Failed {
        Failed
    }
}

impl Fleet {
    fn count(&self, what: &str) {
        *self.model.lock().counts.entry(what.to_owned()).or_default() += 1;
    }

    fn violated(&self, what: String) {
        self.model.lock().violations.push(what);
    }

    fn was_ref_harmed(&self, chain: &ChainId) -> bool {
        let refs = layout::refs(chain);
        self.model.lock().ever_harmed.iter().any(|name| name.starts_with(&refs))
    }

    fn harmed(&self, name: &str) -> bool {
        self.model.lock().harmed.contains(name)
    }

    fn rules(&self, ignore_damage: bool) -> Rules {
        let keep = self.weather.keep.iter().map(|(rule, _)| KeepRule::parse(rule).unwrap()).collect();
        Rules {
            unnamed: Duration::from_secs(self.weather.unnamed),
            no_names: true,
            guards: self.weather.guards,
            ignore_damage,
            keep,
            ..Rules::default()
        }
    }

    fn node(&self, number: u8, clock: i64, store_clock: i64, seed: u64) -> Node {
        let seen = self.world.seen_by(clock, store_clock);
        let slow = self.weather.slow;
        let (store, objects) = slow_node(&seen, number, Duration::from_secs(120), seed + 77, slow);
        let mut config = Config {
            root: self.catalogue.root(number),
            containerd: PathBuf::from("/nonexistent/containerd.sock"),
            ..Config::default()
        };
        config.trust.keys = keys().iter().map(ToString::to_string).collect();
        let random = Mutex::new(Random::new(seed));
        Node { store, objects, random, config, doing: Mutex::new(""), deletes: Notify::new() }
    }

    async fn publish(&self, node: &Node, image: usize) -> Result<(), Failed> {
        for (place, layer) in self.catalogue.images[image].iter().enumerate() {
            let chain = self.catalogue.chain(image, place);
            if matches!(node.store.word(&chain).await?, Word::Accepted(_)) {
                continue;
            }
            let Layer { image, facts, .. } = &self.catalogue.layers[*layer];
            let chains = [chain];
            let request = PublishRequest { image, facts, chains: &chains };
            node.store.publish(request, &|_| (), &CancellationToken::new()).await?;
            let longest = if node.below(4) == 0 { 5 * HOUR } else { 1 };
            node.sleep(longest).await;
        }
        node.store.publish_name(&self.catalogue.name(image), &Catalogue::document(image)).await?;
        self.count("published");
        Ok(())
    }

    /// Finds an image, and reads it over the next hours as a container that runs lazily does.
    async fn pull(&self, node: &Node, image: usize) {
        let began = Instant::now();
        let mut chunks = Vec::new();
        for place in 0..self.catalogue.images[image].len() {
            let layer = self.catalogue.images[image][place];
            let chain = self.catalogue.chain(image, place);
            let deadline = Instant::now() + Duration::from_secs(60);
            match node.store.lookup(&chain, deadline).await {
                Ok(Lookup::Found(found)) => {
                    chunks.extend(found.index.chunks().map(|(_, chunk)| (chain.clone(), chunk)));
                }
                Ok(_) => return self.count("pulled from the registry"),
                Err(error) if error.is_outage() => return,
                // Its own trouble: an ordinary pull follows.
                Err(ContentError::Ref { .. }) => return,
                Err(_) if self.harmed(&self.catalogue.layers[layer].index) => return,
                Err(error) => return self.violated(format!("a pull of image {image}: {error}")),
            }
        }
        let longest = node.below(LONGEST_PULL);
        for (chain, chunk) in chunks {
            let at = node.below(longest + 1);
            tokio::time::sleep_until(began + Duration::from_secs(at)).await;
            match node.store.chunk(chunk).await {
                Ok(_) => {}
                Err(error) if error.is_outage() => {}
                Err(_) if self.harmed(&layout::chunk(chunk.id.as_bytes())) => {}
                // A ref that the store has lost, of a layer that no name keeps, says nothing to a collection any more.
                Err(_) if self.was_ref_harmed(&chain) => return,
                Err(error) => {
                    return self
                        .violated(format!("image {image}, read after {:?}: {error}", began.elapsed()));
                }
            }
        }
        self.count("pulled");
    }

    async fn remove(&self, node: &Node, image: usize) -> Result<(), Failed> {
        let now = || self.world.now();
        self.model.lock().removed.insert(image, now());
        for key in keys() {
            node.objects.delete(&self.catalogue.name(image).object(&key)).await?;
            self.model.lock().removed.insert(image, now());
        }
        self.count("removed");
        Ok(())
    }

    /// A container of it starts.
    async fn start(&self, node: &Node, image: usize) -> Result<(), Failed> {
        if node.store.record_use(&self.catalogue.name(image)).await? {
            self.count("used");
        }
        Ok(())
    }

    async fn collect(&self, node: &Node, ignore_damage: bool) -> Result<(), Failed> {
        let watch = |step: Step| {
            *node.doing.lock() = step.doing;
            if step.doing == "deleting" {
                node.deletes.notify_waiters();
            }
        };
        let collected = async {
            let collector = Collector::new(node.objects.clone(), self.rules(ignore_damage))?;
            let plan = collector.plan(&watch).await?;
            node.sleep(self.weather.pause).await;
            collector.execute(&plan, &watch).await
        };
        match collected.await {
            Ok(_) => self.count("collected"),
            Err(CollectError::Damaged { name, problem, .. }) => {
                if self.model.lock().ever_harmed.is_empty() {
                    self.violated(format!("{name} is called damaged: {problem}"));
                }
                self.count("collections stopped by damage");
            }
            Err(CollectError::Content(_)) => return Err(Failed),
            Err(error) => self.violated(error.to_string()),
        }
        Ok(())
    }

    /// Loses or flips something that an image needs.
    fn harm(&self, node: &Node) {
        let there: BTreeSet<String> = self.world.objects().into_iter().map(|(name, _)| name).collect();
        let keys = keys();
        let named = (0..self.catalogue.images.len())
            .filter(|image| keys.iter().any(|key| there.contains(&self.catalogue.name(*image).object(key))));
        let needed = named.flat_map(|image| self.catalogue.needs(image, &keys).into_iter().flatten());
        let needed: Vec<String> = needed.filter(|name| there.contains(name)).collect();
        if needed.is_empty() {
            return;
        }
        let name = &needed[usize::try_from(node.below(needed.len() as u64)).unwrap()];
        let lost = node.below(2) == 0;
        let mut model = self.model.lock();
        model.harmed.insert(name.clone());
        model.ever_harmed.insert(name.clone());
        drop(model);
        if self.world.harm(name, lost) {
            self.count("harmed");
        }
    }

    /// `speedy fsck --repair`, and what a node's containerd has of documents and names.
    async fn mend(&self, node: &Node) -> Result<Vec<(Finding, Outcome)>, Failed> {
        *node.doing.lock() = "checking";
        let checker = Checker::new(node.objects.clone(), Options::default()).at_once(8);
        let report = checker.check(&|_| ()).await?;
        self.judge(&report);
        *node.doing.lock() = "repairing";
        let repair =
            Repair::new(&node.config, &node.objects, &checker, &report, None).expect("the node has a root");
        let Ok(outcomes) = repair.run(None, &METER).await else { return Err(Failed) };
        let became: Vec<(Finding, Outcome)> = report.findings.into_iter().zip(outcomes).collect();
        for (finding, outcome) in &became {
            if *outcome == Outcome::Repaired {
                continue;
            }
            for image in 0..self.catalogue.images.len() {
                let name = self.catalogue.name(image);
                let documents = Catalogue::document(image);
                let is_own = finding.object.name() == name.object(node.store.publisher());
                let of_it = |document: &crate::content::document::Document| {
                    finding.object.name() == layout::document(document.digest())
                };
                if is_own {
                    self.publish(node, image).await?;
                } else if let Some(document) = documents.iter().find(|document| of_it(document)) {
                    node.store.restore_document(document).await?;
                }
            }
        }
        self.count("mended");
        Ok(became)
    }

    /// What was never harmed is no finding.
    fn judge(&self, report: &Report) {
        let model = self.model.lock();
        let hash = |name: &str| name.rsplit_once('/').map(|(hash, _)| hash.to_owned()).unwrap_or_default();
        let was_harmed = |object: &Object| match object {
            Object::Kept(Kind::Ref, _) => {
                model.ever_harmed.iter().any(|name| hash(name) == hash(&object.name()))
            }
            object => model.ever_harmed.contains(&object.name()),
        };
        let wrong: Vec<String> = report
            .findings
            .iter()
            .filter(|finding| !was_harmed(&finding.object))
            .map(|finding| format!("a check found {}: {:?}", finding.object.name(), finding.problem))
            .collect();
        drop(model);
        wrong.into_iter().for_each(|wrong| self.violated(wrong));
    }

    /// What one node does in some days.
    async fn live(&self, node: Node) {
        while self.world.now() < BEGINNING + (self.weather.days * DAY).cast_signed() {
            node.sleep(self.weather.idle).await;
            let image = node.image(self);
            let what = node.below(16);
            *node.doing.lock() = "something else";
            let act = async {
                match what {
                    0..=3 => self.publish(&node, image).await,
                    4..=5 => {
                        self.pull(&node, image).await;
                        Ok(())
                    }
                    6..=7 => self.remove(&node, image).await,
                    8 => self.start(&node, image).await,
                    9 if self.weather.harm => {
                        self.harm(&node);
                        Ok(())
                    }
                    10..=11 => self.mend(&node).await.map(drop),
                    _ => self.collect(&node, false).await,
                }
            };
            // Killed, as often as not in the first minutes.
            let longest = [240, 9 * HOUR, 10 * DAY, 10 * DAY, 10 * DAY, 10 * DAY];
            let longest = longest[usize::try_from(node.below(6)).unwrap()];
            let life = node.random.lock().seconds(longest);
            let dies_deleting = node.below(8) == 0;
            let in_deletion = async {
                if !dies_deleting {
                    return std::future::pending().await;
                }
                node.deletes.notified().await;
                node.sleep(4).await;
            };
            let lived = async {
                tokio::select! {
                    done = timeout(life, act) => done.ok(),
                    () = in_deletion => None,
                }
            };
            match lived.await {
                None => {
                    self.count("killed");
                    let doing = *node.doing.lock();
                    self.count(&format!("killed while {doing}"));
                }
                Some(Ok(())) => {}
                Some(Err(Failed)) => self.count("failed"),
            }
        }
    }

    /// All is mended, and what nothing needs is collected.
    async fn end(&self) {
        let nodes: Vec<Node> =
            (0..NODES).map(|number| self.node(number, 0, 0, 1000 + u64::from(number))).collect();
        let mut left = Vec::new();
        for _ in 0..3 {
            for node in &nodes {
                let became = self.mend(node).await;
                // Until listings show what was written: a ref of somebody of whom they show nothing yet is called missing.
                sleep(Duration::from_secs(HOUR)).await;
                let Ok(became) = became else { continue };
                left = became;
            }
        }
        // What a ref said that no image needs any more nobody knows.
        for (finding, outcome) in left.iter().filter(|(finding, _)| finding.image_count > 0) {
            self.violated(format!("{} cannot be mended: {outcome:?}, {finding:?}", finding.object.name()));
        }
        for _ in 0..3 {
            sleep(Duration::from_secs(8 * DAY)).await;
            // A late answer ends a collection, which is then called again.
            let mut tries = 0;
            while self.collect(&nodes[0], true).await.is_err() && tries < 5 {
                tries += 1;
            }
            if tries == 5 {
                self.violated("the last collections fail".to_owned());
            }
        }
        let Ok(became) = self.mend(&nodes[0]).await else { return self.violated("no last check".to_owned()) };
        for (finding, _) in &became {
            self.violated(format!("{} is {:?} in the end", finding.object.name(), finding.problem));
        }
        self.judge_end();
    }

    /// No name lacks anything, and no dead byte is left.
    fn judge_end(&self) {
        let keys = keys();
        let objects: BTreeSet<String> = self.world.objects().into_iter().map(|(name, _)| name).collect();
        let mut needed: BTreeSet<String> = [layout::STORE.to_owned(), layout::COLLECTION.to_owned()].into();
        for image in 0..self.catalogue.images.len() {
            let names: Vec<String> = keys
                .iter()
                .map(|key| self.catalogue.name(image).object(key))
                .filter(|name| objects.contains(name))
                .collect();
            if names.is_empty() {
                continue;
            }
            let needs = self.catalogue.needs(image, &keys);
            for need in needs.iter().filter(|need| !need.iter().any(|one| objects.contains(one))) {
                self.violated(format!("image {image} lacks {need:?} in the end"));
            }
            needed.extend(names);
            needed.extend(needs.into_iter().flatten());
            let used = keys.iter().map(|key| self.catalogue.name(image).object(key));
            needed.extend(used.map(|name| name.replacen("images/", "uses/", 1)));
            self.count("images in the end");
        }
        for left in objects.difference(&needed) {
            self.violated(format!("nothing needs {left}, and it is left"));
        }
    }
}

/// Judges each change of the store.
fn watch(fleet: &Fleet) {
    let catalogue = Arc::clone(&fleet.catalogue);
    let model = Arc::clone(&fleet.model);
    let kept = fleet.weather.keep.map(|(_, kept)| kept);
    let keys = keys();
    let images: HashMap<String, (usize, Vec<Vec<String>>)> = (0..catalogue.images.len())
        .flat_map(|image| keys.iter().map(move |key| (image, key)))
        .map(|(image, key)| (catalogue.name(image).object(key), (image, catalogue.needs(image, &keys))))
        .collect();
    fleet.world.on_change(move |change| {
        let Change { name, deleted, at, is_there } = *change;
        let mut model = model.lock();
        if let Some((image, _)) = images.get(&name.replacen("uses/", "images/", 1)) {
            match deleted {
                false => model.used.entry(*image).or_default().push(at),
                true if name.starts_with("images/") => judge_rule(&mut model, *image, at, kept),
                true => {}
            }
        }
        if !deleted {
            model.harmed.remove(name);
            if !name.starts_with("images/") {
                return;
            }
        }
        for (named, (_, needs)) in images.iter().filter(|(named, _)| is_there(named)) {
            for need in needs {
                if !need.iter().any(|one| is_there(one) || model.harmed.contains(one)) {
                    let what = if deleted { "went" } else { "came" };
                    model.violations.push(format!("{named} lacks {need:?} after {name} {what}"));
                }
            }
        }
    });
}

/// A name went that nobody asked to remove: a rule has to be the reason.
fn judge_rule(model: &mut Model, image: usize, at: i64, kept: Option<i64>) {
    if model.removed.get(&image).is_some_and(|removed| at - removed < RULES_SEE) {
        return;
    }
    let Some(kept) = kept else {
        return model.violations.push(format!("the name of image {image} went, and there is no rule"));
    };
    let used = model.used.get(&image).into_iter().flatten();
    // What happens while a collection is under way may come too late.
    let known = used.filter(|used| at - **used > RULES_SEE).max();
    if let Some(used) = known.filter(|used| at - **used < kept - USE_RENEWAL - RULES_SEE) {
        let hours = (at - used) / 3600;
        model.violations.push(format!("the name of image {image} went {hours} h after its use"));
    }
}

/// What happened in a schedule, and what went wrong in it.
fn schedule(catalogue: &Arc<Catalogue>, weather: Weather, seed: u64) -> (BTreeMap<String, u64>, Vec<String>) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let mut random = Random::new(seed.wrapping_add(1 << 32));
        let world = World::new(seed, Duration::from_secs(weather.late));
        let fleet = Fleet { catalogue: Arc::clone(catalogue), world, weather, model: Arc::default() };
        watch(&fleet);
        let mut ahead = || random.below(HOUR).cast_signed() - 1800;
        let store_clock = ahead();
        let lives = (0..NODES).map(|number| {
            let clock = ahead();
            let astray = fleet.weather.astray && number == 0;
            let clock = if astray { clock + 5 * DAY.cast_signed() } else { clock };
            let dates = if fleet.weather.one_clock { store_clock } else { clock };
            fleet.live(fleet.node(number, clock, dates, seed.wrapping_mul(31) + u64::from(number)))
        });
        join_all(lives).await;
        fleet.end().await;
        let mut model = fleet.model.lock();
        (std::mem::take(&mut model.counts), std::mem::take(&mut model.violations))
    })
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn catalogue() -> Arc<Catalogue> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    Arc::new(runtime.block_on(Catalogue::make()))
}

/// What came of many schedules.
#[derive(Default)]
struct Tried {
    counts: BTreeMap<String, u64>,
    /// The first schedule, by its number, in which something went wrong, and what.
    wrong: Option<(u64, String)>,
}

/// Tries schedules on all processors until something goes wrong.
fn try_all(
    catalogue: &Arc<Catalogue>,
    seeds: Range<u64>,
    weather: &(dyn Fn(u64) -> Weather + Sync),
) -> Tried {
    let (next, tried) = (AtomicU64::new(seeds.start), Mutex::new(Tried::default()));
    let work = || loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= seeds.end || tried.lock().wrong.is_some() {
            return;
        }
        let weather = weather(seed);
        let told = format!("{weather:?}");
        let (counts, violations) = schedule(catalogue, weather, seed);
        let mut tried = tried.lock();
        for (what, count) in counts {
            *tried.counts.entry(what).or_default() += count;
        }
        if !violations.is_empty() {
            tried.wrong = Some((seed, format!("{told}:\n{}", violations.join("\n"))));
        }
    };
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| (0..processors).for_each(|_| drop(scope.spawn(work))));
    tried.into_inner()
}

/// A thousand: `GC_SCHEDULES=1000 cargo test --lib -- a_fleet_and_its_collections --nocapture`; months: `GC_DAYS=30`.
#[test]
fn a_fleet_and_its_collections() {
    let (first, schedules) = (number("GC_SEED", 1), number("GC_SCHEDULES", 100));
    let days = number("GC_DAYS", 4);
    let began = std::time::Instant::now();
    let Tried { counts, wrong } =
        try_all(&catalogue(), first..first + schedules, &|seed| Weather::of(days, &mut Random::new(seed)));
    assert!(wrong.is_none(), "schedule {wrong:?}");
    println!("{schedules} schedules of {days} days in {:?}: {counts:#?}", began.elapsed());
    for what in ["published", "pulled", "removed", "collected", "killed", "mended", "images in the end"] {
        assert!(counts.get(what).is_some_and(|count| *count >= schedules / 2), "{what}: {counts:?}");
    }
    // Each phase of a collection and of a repair was died in.
    let phases = [
        "reading names of images",
        "reading refs",
        "listing indexes",
        "reading indexes",
        "looking at chunks",
        "telling publishers, a minute",
        "deleting",
        "checking",
        "repairing",
    ];
    for phase in phases.into_iter().filter(|_| schedules >= 1000) {
        assert!(counts.contains_key(&format!("killed while {phase}")), "{phase}: {counts:?}");
    }
}

/// Makes a weather in which a guard is needed more than in others.
type Tune = fn(&mut Weather);

/// Each guard with the weather in which it is needed most.
const GUARDS: [(Guard, Tune); 4] = [
    (Guard::SecondReading, |weather| weather.pause = 4 * DAY),
    (Guard::Grace, |_| ()),
    (Guard::Order, |weather| weather.keep = Some(("r.example/* used<3d", 3 * DAY.cast_signed()))),
    (Guard::RenewIndex, |_| ()),
];

/// The protocol is broken on purpose, one guard at a time: what the simulation does not notice it does not prove. With the guard, the same
/// schedule is sound.
#[test]
fn a_fleet_notices_each_guard_that_is_missing() {
    let catalogue = catalogue();
    let (days, most) = (number("GC_DAYS", 5), number("GC_GUARD_SCHEDULES", 200));
    let only = std::env::var("GC_GUARD").ok();
    let mut unnoticed = Vec::new();
    for (guard, tune) in GUARDS {
        if only.as_ref().is_some_and(|only| format!("{guard:?}") != *only) {
            continue;
        }
        let weather = |seed: u64, guards: Guards| {
            let mut weather = Weather::of(days, &mut Random::new(seed));
            tune(&mut weather);
            Weather { guards, ..weather }
        };
        let began = std::time::Instant::now();
        let without = Guards { without: Some(guard) };
        match try_all(&catalogue, 1..1 + most, &|seed| weather(seed, without)).wrong {
            Some((seed, what)) => {
                let told: Vec<&str> = what.lines().skip(1).take(1).collect();
                println!("{guard:?}: schedule {seed} in {:?}: {}", began.elapsed(), told.join(""));
                let (_, violations) = schedule(&catalogue, weather(seed, Guards::default()), seed);
                assert!(violations.is_empty(), "seed {seed}: {violations:?}");
            }
            None => unnoticed.push(guard),
        }
    }
    assert!(unnoticed.is_empty(), "nobody misses {unnoticed:?}");
}
