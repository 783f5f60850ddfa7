//! A store that is asked once for what many want at the same time.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};
use parking_lot::Mutex;

use super::store::{ChunkPrune, ChunkSink, ChunkStore, Deletion, Stored};
use super::{ChunkError, ChunkId, ChunkRef};

type Answer = Result<Bytes, ChunkError>;
type Fetch = BoxFuture<'static, Answer>;

/// Concurrent requests for one chunk are one request to `S`, and all get its answer, an error too. Who stops waiting takes
/// nothing from the others: the request goes on as long as anybody waits for it, and ends with the last. Nothing is kept
/// after that.
#[derive(Debug)]
pub struct Merged<S> {
    inner: Arc<S>,
    under_way: Arc<UnderWay>,
}

#[derive(Debug, Default)]
struct UnderWay(Mutex<Requests>);

#[derive(Debug, Default)]
struct Requests {
    serial: u64,
    /// By id and length: somebody's wrong idea of a chunk's length is not everybody's.
    fetches: HashMap<ChunkRef, (u64, WeakShared<Fetch>)>,
}

/// Takes its request off the list when it ends, whichever way.
struct Listed {
    under_way: Arc<UnderWay>,
    chunk: ChunkRef,
    serial: u64,
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut requests = self.under_way.0.lock();
        // A later request may stand there when this one was given up by everybody.
        if requests.fetches.get(&self.chunk).is_some_and(|(serial, _)| *serial == self.serial) {
            requests.fetches.remove(&self.chunk);
        }
    }
}

impl<S> Merged<S> {
    /// Around `inner`.
    pub fn new(inner: S) -> Merged<S> {
        Merged { inner: Arc::new(inner), under_way: Arc::default() }
    }

    /// The store beneath.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// How many requests are under way.
    pub fn under_way(&self) -> usize {
        self.under_way.0.lock().fetches.len()
    }
}

impl<S: ChunkStore + 'static> Merged<S> {
    /// The request for this chunk: one that is under way, or a new one.
    fn join(&self, chunk: ChunkRef) -> Shared<Fetch> {
        let mut requests = self.under_way.0.lock();
        if let Some(fetch) = requests.fetches.get(&chunk).and_then(|(_, fetch)| fetch.upgrade()) {
            return fetch;
        }
        requests.serial += 1;
        let listed = Listed { under_way: Arc::clone(&self.under_way), chunk, serial: requests.serial };
        let inner = Arc::clone(&self.inner);
        let fetch = async move {
            let _listed = listed;
            inner.get(chunk).await
        };
        let fetch = fetch.boxed().shared();
        let weak = fetch.downgrade().expect("it has not been polled");
        let serial = requests.serial;
        requests.fetches.insert(chunk, (serial, weak));
        fetch
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: ChunkStore + 'static> ChunkStore for Merged<S> {
    async fn get(&self, chunk: ChunkRef) -> Result<Bytes, ChunkError> {
        self.join(chunk).await
    }

    async fn contains(&self, id: ChunkId) -> Result<bool, ChunkError> {
        self.inner.contains(id).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: ChunkSink + 'static> ChunkSink for Merged<S> {
    async fn put(&self, id: ChunkId, plain: Bytes) -> Result<u64, ChunkError> {
        self.inner.put(id, plain).await
    }

    async fn renew(&self, id: ChunkId) -> Result<(), ChunkError> {
        self.inner.renew(id).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: ChunkPrune + 'static> ChunkPrune for Merged<S> {
    async fn list(&self, first: u8) -> Result<Vec<Stored>, ChunkError> {
        self.inner.list(first).await
    }

    async fn delete(&self, id: ChunkId, young_from: i64) -> Result<Deletion, ChunkError> {
        self.inner.delete(id, young_from).await
    }
}
