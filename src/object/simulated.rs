//! A store in memory on virtual time, as bad as a real one: late answers, requests that take effect after their caller has given up or died,
//! listings that show each object as it was some minutes ago, and clocks that differ.
//!
//! For tests with a paused clock. Everything random comes from one seed.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep, sleep_until};

use super::{Clock, Objects, StoreOptions};

/// When a world begins, seconds since 1970.
pub(crate) const BEGINNING: i64 = 1_900_000_000;

/// xorshift64*: the same numbers for the same seed.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit.max(1)
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn seconds(&mut self, most: u64) -> Duration {
        Duration::from_millis(self.below(most * 1000 + 1))
    }
}

/// An object as it was from some time on; `None` is that it was not there.
#[derive(Debug, Clone)]
struct Version {
    since: Instant,
    content: Option<(i64, Bytes)>,
}

/// What a request is going to do, whether somebody still waits for it or not.
#[derive(Debug)]
struct Effect {
    due: Instant,
    number: u64,
    path: String,
    content: Option<(i64, Bytes)>,
}

#[derive(Debug)]
struct State {
    random: Random,
    versions: BTreeMap<String, Vec<Version>>,
    pending: Vec<Effect>,
    number: u64,
}

/// Something that has just happened to an object.
pub(crate) struct Change<'a> {
    pub(crate) name: &'a str,
    pub(crate) deleted: bool,
    /// True time, seconds since 1970.
    pub(crate) at: i64,
    /// Whether there is an object of this name now.
    pub(crate) is_there: &'a dyn Fn(&str) -> bool,
}

type OnChange = Arc<dyn Fn(&Change<'_>) + Send + Sync>;

/// What all who use the store share.
pub(crate) struct World {
    began: Instant,
    state: Mutex<State>,
    /// The longest time by which a listing is late.
    late: Duration,
    on_change: Mutex<Option<OnChange>>,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("World")
    }
}

impl World {
    pub(crate) fn new(seed: u64, late: Duration) -> Arc<World> {
        let state =
            State { random: Random::new(seed), versions: BTreeMap::new(), pending: Vec::new(), number: 0 };
        Arc::new(World { began: Instant::now(), state: Mutex::new(state), late, on_change: Mutex::default() })
    }

    /// The store as somebody sees it whose clock is `own` seconds ahead; what he writes is dated by a clock that is `store` ahead.
    pub(crate) fn seen_by(self: &Arc<World>, own: i64, store: i64) -> Objects {
        let world = Arc::clone(self);
        let clock = Clock(Arc::new(move || world.now() + own));
        let view = View { world: Arc::clone(self), ahead: store };
        Objects::by_clock(Arc::new(view), StoreOptions::default(), clock)
    }

    /// True time.
    pub(crate) fn now(&self) -> i64 {
        BEGINNING + i64::try_from(self.began.elapsed().as_secs()).unwrap()
    }

    /// Called with each change, after it.
    pub(crate) fn on_change(&self, call: impl Fn(&Change<'_>) + Send + Sync + 'static) {
        *self.on_change.lock() = Some(Arc::new(call));
    }

    /// An object is lost, or flipped in the middle, by nobody's wish; answers whether it was there.
    pub(crate) fn harm(&self, name: &str, lost: bool) -> bool {
        let mut state = self.state.lock();
        self.settle(&mut state);
        let Some(versions) = state.versions.get_mut(name) else { return false };
        let Some((modified, bytes)) = versions.last().and_then(|version| version.content.clone()) else {
            return false;
        };
        let mut flipped = bytes.to_vec();
        let middle = flipped.len() / 2;
        flipped.iter_mut().skip(middle).take(1).for_each(|byte| *byte ^= 1);
        let content = (!lost).then(|| (modified, flipped.into()));
        versions.push(Version { since: Instant::now(), content });
        true
    }

    /// What is there now, with sizes and times.
    pub(crate) fn objects(&self) -> Vec<(String, i64)> {
        let mut state = self.state.lock();
        self.settle(&mut state);
        let current = state.versions.iter().filter_map(|(path, versions)| {
            let (modified, _) = versions.last()?.content.as_ref()?;
            Some((path.clone(), *modified))
        });
        current.collect()
    }

    /// Lets everything happen that is due.
    fn settle(&self, state: &mut State) {
        let now = Instant::now();
        state.pending.sort_by_key(|effect| (effect.due, effect.number));
        while state.pending.first().is_some_and(|effect| effect.due <= now) {
            let Effect { due, path, content, .. } = state.pending.remove(0);
            let deleted = content.is_none();
            let versions = state.versions.entry(path.clone()).or_default();
            versions.push(Version { since: due, content });
            // What no listing shows any more is forgotten.
            let horizon = due.checked_sub(self.late).unwrap_or(self.began);
            let shown = versions.iter().rposition(|version| version.since <= horizon).unwrap_or(0);
            versions.drain(..shown);
            if let Some(call) = self.on_change.lock().clone() {
                let is_there = |name: &str| {
                    state.versions.get(name).and_then(|v| v.last()).is_some_and(|v| v.content.is_some())
                };
                let at = BEGINNING + i64::try_from(due.duration_since(self.began).as_secs()).unwrap();
                call(&Change { name: &path, deleted, at, is_there: &is_there });
            }
        }
    }

    fn current(&self, path: &Path) -> Option<(i64, Bytes)> {
        let mut state = self.state.lock();
        self.settle(&mut state);
        state.versions.get(path.as_ref())?.last()?.content.clone()
    }

    /// How long something takes: mostly milliseconds, now and then longer than anybody waits.
    fn delay(&self) -> Duration {
        let mut state = self.state.lock();
        match state.random.below(200) {
            0 => state.random.seconds(25),
            1..=9 => state.random.seconds(3),
            _ => Duration::from_millis(state.random.below(50)),
        }
    }

    async fn change(self: &Arc<World>, path: &Path, content: Option<(i64, Bytes)>) {
        let due = Instant::now() + self.delay();
        let number = {
            let mut state = self.state.lock();
            state.number += 1;
            let number = state.number;
            state.pending.push(Effect { due, number, path: path.to_string(), content });
            number
        };
        let mut abandoned = Abandoned { world: Arc::clone(self), number, armed: true };
        sleep_until(due).await;
        abandoned.armed = false;
        self.settle(&mut self.state.lock());
        sleep(self.delay()).await;
    }
}

/// A request whose caller goes away before it took effect: as often as not it does all the same, when it would have.
struct Abandoned {
    world: Arc<World>,
    number: u64,
    armed: bool,
}

impl Drop for Abandoned {
    fn drop(&mut self) {
        if self.armed {
            let mut state = self.world.state.lock();
            if state.random.one_in(2) {
                let number = self.number;
                state.pending.retain(|effect| effect.number != number);
            }
        }
    }
}

/// The store as one of its users sees it.
#[derive(Debug)]
struct View {
    world: Arc<World>,
    ahead: i64,
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated")
    }
}

fn meta(path: &Path, modified: i64, size: usize) -> ObjectMeta {
    let last_modified = std::time::UNIX_EPOCH + Duration::from_secs(modified.unsigned_abs());
    ObjectMeta {
        location: path.clone(),
        last_modified: last_modified.into(),
        size: size as u64,
        e_tag: None,
        version: None,
    }
}

#[async_trait]
impl ObjectStore for View {
    async fn put_opts(
        &self,
        at: &Path,
        payload: PutPayload,
        _: PutOptions,
    ) -> object_store::Result<PutResult> {
        let modified = self.world.now() + self.ahead;
        self.world.change(at, Some((modified, payload.into()))).await;
        Ok(PutResult { e_tag: None, version: None, extensions: Default::default() })
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        Err(Error::NotImplemented { operation: "multipart".into(), implementer: "simulated".into() })
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        sleep(self.world.delay()).await;
        let found = self.world.current(at);
        sleep(self.world.delay()).await;
        let Some((modified, bytes)) = found else {
            return Err(Error::NotFound { path: at.to_string(), source: "simulated".into() });
        };
        let (meta, range) = (meta(at, modified, bytes.len()), 0..bytes.len() as u64);
        let bytes = if options.head { Bytes::new() } else { bytes };
        let payload = GetResultPayload::Stream(futures::stream::iter([Ok(bytes)]).boxed());
        Ok(GetResult { payload, meta, range, attributes: Default::default(), extensions: Default::default() })
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        let world = Arc::clone(&self.world);
        let delete = move |location: object_store::Result<Path>| {
            let world = Arc::clone(&world);
            async move {
                let location = location?;
                world.change(&location, None).await;
                Ok(location)
            }
        };
        locations.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let (world, prefix) =
            (Arc::clone(&self.world), prefix.map(|prefix| format!("{prefix}/")).unwrap_or_default());
        let listed = async move {
            sleep(world.delay()).await;
            let mut state = world.state.lock();
            world.settle(&mut state);
            let State { random, versions, .. } = &mut *state;
            let mut listed = Vec::new();
            for (path, versions) in
                versions.range(prefix.clone()..).take_while(|(path, _)| path.starts_with(&prefix))
            {
                // Each object as late as it likes.
                let late =
                    if random.one_in(2) { Duration::ZERO } else { random.seconds(world.late.as_secs()) };
                let shown = Instant::now().checked_sub(late).unwrap_or(world.began);
                let version = versions.iter().rev().find(|version| version.since <= shown);
                if let Some((modified, bytes)) = version.and_then(|version| version.content.as_ref()) {
                    listed.push(Ok(meta(&Path::from(path.as_str()), *modified, bytes.len())));
                }
            }
            futures::stream::iter(listed)
        };
        listed.into_stream().flatten().boxed()
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> object_store::Result<ListResult> {
        Err(Error::NotImplemented { operation: "list".into(), implementer: "simulated".into() })
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> object_store::Result<()> {
        Err(Error::NotImplemented { operation: "copy".into(), implementer: "simulated".into() })
    }
}
