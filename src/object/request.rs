//! The requests themselves: what one attempt of each call does.

use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{GetOptions, GetResult, GetResultPayload, ObjectMeta, ObjectStore, ObjectStoreExt};
use tokio::time::{Instant, sleep, timeout};

use super::call::{Call, Lane};
use super::failure::is_no_such_store;
use super::stats::Operation;
use super::{Failure, Handle, Hedging, ObjectError, ObjectInfo, Objects};

/// The slowest upload that is waited for, bytes a second.
const SLOWEST_UPLOAD: u64 = 64 * 1024;
/// What a whole body may take at most: the pauses are watched one by one, the call's own time ends it otherwise.
const LONGEST_BODY: Duration = Duration::from_secs(24 * 3600);

impl Objects {
    pub(super) async fn fetch(
        &self,
        name: &str,
        limit: u64,
        until: Instant,
    ) -> Result<Option<Bytes>, ObjectError> {
        let what = format!("GET {name}");
        let path = self.path(name);
        let call = self.call(&what, Operation::Get, LONGEST_BODY, until);
        let attempt = || self.handle.get_once(&path, name, limit);
        self.run(call, attempt).await
    }

    pub(super) async fn store(&self, name: &str, bytes: Bytes, until: Instant) -> Result<(), ObjectError> {
        let what = format!("PUT {name}");
        let path = self.path(name);
        let size = bytes.len() as u64;
        let slowest = self.handle.options.attempt + Duration::from_secs(size / SLOWEST_UPLOAD);
        let call = self.call(&what, Operation::Put, slowest, until);
        let attempt = || async {
            self.handle.engine.store().await?.put(&path, bytes.clone().into()).await?;
            self.handle.conduct.counters.written.add(size);
            Ok(())
        };
        self.run(call, attempt).await
    }

    pub(super) async fn head(&self, name: &str, until: Instant) -> Result<Option<ObjectInfo>, ObjectError> {
        let what = format!("HEAD {name}");
        let path = self.path(name);
        let call = self.call(&what, Operation::Head, self.handle.options.attempt, until);
        let attempt = || async {
            let found = self.handle.engine.store().await?.head(&path).await;
            Ok(found_or_missing(found)?.map(|meta| self.info(&meta)))
        };
        self.run(call, attempt).await
    }

    pub(super) async fn enumerate(
        &self,
        prefix: &str,
        limit: usize,
        until: Instant,
    ) -> Result<Vec<ObjectInfo>, ObjectError> {
        let what = format!("LIST {prefix}");
        let path = self.path(prefix);
        let call = self.call(&what, Operation::List, LONGEST_BODY, until);
        let attempt = || async {
            let store = self.handle.engine.store().await?;
            let mut listed = store.list(Some(&path)).take(limit);
            let mut found = Vec::new();
            while let Some(meta) = self.handle.in_time(listed.try_next()).await?? {
                found.push(self.info(&meta));
            }
            Ok(found)
        };
        self.run(call, attempt).await
    }

    pub(super) async fn remove(&self, name: &str, until: Instant) -> Result<(), ObjectError> {
        let what = format!("DELETE {name}");
        let path = self.path(name);
        let call = self.call(&what, Operation::Change, self.handle.options.attempt, until);
        let attempt = || async {
            let gone = self.handle.engine.store().await?.delete(&path).await;
            found_or_missing(gone).map(|_| ())
        };
        self.run(call, attempt).await
    }

    pub(super) fn call<'a>(
        &self,
        what: &'a str,
        operation: Operation,
        attempt: Duration,
        deadline: Instant,
    ) -> Call<'a> {
        let lane = match operation {
            Operation::Get | Operation::Head | Operation::List => Lane::Read,
            Operation::Put | Operation::Change => Lane::Write,
        };
        Call { what, operation, lane, deadline, attempt, patience: self.patience }
    }

    /// Makes the call; once more if the store refused it and there are other credentials since.
    pub(super) async fn run<T, F>(&self, call: Call<'_>, attempt: impl Fn() -> F) -> Result<T, ObjectError>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let Handle { conduct, credentials, .. } = &*self.handle;
        let Some(credentials) = credentials else { return self.hinted(conduct.run(call, attempt).await) };
        let before = credentials.generation();
        let mut outcome = conduct.run(call, &attempt).await;
        if matches!(outcome, Err(ObjectError::Denied(_))) && credentials.are_newer_than(before).await {
            outcome = conduct.run(call, &attempt).await;
        }
        self.hinted(outcome)
    }

    fn hinted<T>(&self, outcome: Result<T, ObjectError>) -> Result<T, ObjectError> {
        outcome.map_err(|error| match (error, self.handle.hint) {
            (ObjectError::Denied(told), Some(hint)) => ObjectError::Denied(format!("{told} ({hint})")),
            (ObjectError::Unreachable(told), Some(hint)) => {
                ObjectError::Unreachable(format!("{told} ({hint})"))
            }
            (error, _) => error,
        })
    }

    fn info(&self, meta: &ObjectMeta) -> ObjectInfo {
        let whole = meta.location.as_ref();
        let own = whole.strip_prefix(self.handle.prefix.as_ref()).unwrap_or(whole);
        ObjectInfo {
            name: own.trim_start_matches('/').to_owned(),
            size: meta.size,
            modified: meta.last_modified.timestamp(),
        }
    }

    /// Parts that are not plain (`..`, an empty one, one with a slash in disguise) are encoded or left out: no name leads out
    /// of the prefix.
    pub(super) fn path(&self, name: &str) -> Path {
        name.split('/')
            .filter(|part| !part.is_empty())
            .fold(self.handle.prefix.clone(), |path, part| path.join(part))
    }
}

/// An answer, or that there is none.
fn found_or_missing<T>(answer: object_store::Result<T>) -> Result<Option<T>, Failure> {
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(error @ object_store::Error::NotFound { .. }) if is_no_such_store(&error) => {
            Err(Failure::Final(ObjectError::Rejected("there is no such bucket".to_owned())))
        }
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

impl Handle {
    pub(super) async fn get_once(
        &self,
        path: &Path,
        name: &str,
        limit: u64,
    ) -> Result<Option<Bytes>, Failure> {
        let store = self.engine.store().await?;
        let asked = Instant::now();
        let head = self.in_time(self.ask(store.as_ref(), path)).await?;
        let took = asked.elapsed();
        let found = found_or_missing(head)?;
        // Not of a refusal, which may be quick wherever the store is.
        self.conduct.latency.record(took);
        let Some(found) = found else { return Ok(None) };
        let size = found.meta.size;
        if size > limit {
            return Err(Failure::Final(ObjectError::TooLarge { path: name.to_owned(), size, limit }));
        }
        let bytes = self.body(found, size).await?;
        if bytes.len() as u64 != size {
            return Err(Failure::Transient(format!("{} bytes arrived of {size}", bytes.len())));
        }
        self.conduct.counters.read.add(size);
        Ok(Some(bytes))
    }

    /// Has one more connection to the store, if there is none that is idle; counts for nothing.
    pub(super) async fn connect(&self, path: &Path) {
        if let Ok(store) = self.engine.store().await
            && let Ok(answer) = store.get_opts(path, GetOptions::default()).await
        {
            drop(answer.bytes().await);
        }
    }

    /// The beginning of an answer: of the first request, or of a second one when the first is slow.
    async fn ask(&self, store: &dyn ObjectStore, path: &Path) -> object_store::Result<GetResult> {
        let mut first = pin!(store.get_opts(path, GetOptions::default()));
        if self.options.hedging == Hedging::Off || !self.engine.is_worth_hedging() {
            return first.await;
        }
        tokio::select! {
            biased;
            answer = &mut first => return answer,
            () = sleep(self.conduct.latency.hedge_after()) => {}
        }
        if !self.conduct.budget.hedge() {
            return first.await;
        }
        self.conduct.counters.hedges.add(1);
        self.conduct.counters.requests.add(1);
        let mut second = pin!(store.get_opts(path, GetOptions::default()));
        tokio::select! {
            biased;
            answer = &mut first => if is_answer(&answer) { answer } else { second.await },
            answer = &mut second => if is_answer(&answer) {
                self.conduct.counters.hedges_won.add(1);
                answer
            } else {
                first.await
            },
        }
    }

    async fn body(&self, found: GetResult, size: u64) -> Result<Bytes, Failure> {
        let GetResultPayload::Stream(mut frames) = found.payload else {
            return Ok(self.in_time(found.bytes()).await??);
        };
        let mut whole: Option<Bytes> = None;
        let mut pieces = BytesMut::new();
        while let Some(frame) = self.in_time(frames.try_next()).await?? {
            if frame.len() as u64 == size && whole.is_none() {
                whole = Some(frame);
                continue;
            }
            if pieces.is_empty() {
                // Checked against the limit of the call before.
                pieces.reserve(usize::try_from(size).unwrap_or(0));
                pieces.extend_from_slice(whole.take().as_deref().unwrap_or_default());
            }
            if (pieces.len() + frame.len()) as u64 > size {
                return Err(Failure::Transient(format!("more than the announced {size} bytes arrived")));
            }
            pieces.extend_from_slice(&frame);
        }
        Ok(whole.unwrap_or_else(|| pieces.freeze()))
    }

    /// The next thing the store has to say, unless it takes too long.
    async fn in_time<T>(&self, said: impl Future<Output = T>) -> Result<T, Failure> {
        let longest = self.options.attempt;
        timeout(longest, said)
            .await
            .map_err(|_| Failure::Transient(format!("no answer within {:.1} s", longest.as_secs_f32())))
    }
}

/// "There is none" is one.
fn is_answer(answer: &object_store::Result<GetResult>) -> bool {
    matches!(answer, Ok(_) | Err(object_store::Error::NotFound { .. }))
}
