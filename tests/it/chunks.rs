//! Every store of chunks and every wrapper through the suite, and chunks that are not what they should be.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt;
use speedy::chunk::memory::Memory;
use speedy::chunk::merged::Merged;
use speedy::chunk::remote::Remote;
use speedy::chunk::store::{ChunkPrune, ChunkSink, ChunkStore, Deletion, RENEWED};
use speedy::chunk::verified::Verified;
use speedy::chunk::{BLOCK, ChunkError, ChunkId, ChunkRef};
use speedy::object::{Hedging, ObjectError, Objects, StoreOptions, layout};
use tokio::sync::Semaphore;

use crate::s3::{Fault, Server};
use crate::suite;
use crate::suite::chunk_store::chunk;

#[tokio::test]
async fn memory() {
    suite::chunk_store::run(&Memory::default()).await;
}

#[tokio::test]
async fn remote_in_memory() {
    suite::chunk_store::run(&Remote::new(Objects::memory())).await;
}

fn directory(dir: &std::path::Path) -> Objects {
    Objects::open(&format!("file://{}", dir.display()), &StoreOptions::default()).unwrap()
}

#[tokio::test]
async fn remote_in_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    suite::chunk_store::run(&Remote::new(directory(dir.path()))).await;
}

#[tokio::test]
async fn remote_on_s3() {
    let server = Server::start().await;
    suite::chunk_store::run(&Remote::new(server.store("a/b", StoreOptions::default()))).await;
}

#[tokio::test]
async fn verified() {
    suite::chunk_store::run(&Verified::new(Memory::default())).await;
}

#[tokio::test]
async fn merged() {
    suite::chunk_store::run(&Merged::new(Memory::default())).await;
}

#[tokio::test]
async fn as_a_node_stacks_them() {
    let stack: Arc<dyn ChunkPrune> = Arc::new(Merged::new(Verified::new(Remote::new(Objects::memory()))));
    suite::chunk_store::run(&stack).await;
}

fn options() -> StoreOptions {
    StoreOptions {
        total: Duration::from_secs(4),
        attempt: Duration::from_millis(400),
        hedging: Hedging::Off,
        ..StoreOptions::default()
    }
}

type Stack = Merged<Verified<Remote>>;

/// A chunk of `length` on a server that can fail.
async fn on_s3(length: usize) -> (Server, Stack, ChunkRef, Bytes) {
    let server = Server::start().await;
    let stack = Merged::new(Verified::new(Remote::new(server.store("x", options()))));
    let (chunk, plain) = chunk(3, length);
    stack.put(chunk.id, plain.clone()).await.unwrap();
    server.requests();
    (server, stack, chunk, plain)
}

#[tokio::test]
async fn c1_bytes_that_the_wire_spoilt_are_fetched_again() {
    let (server, stack, chunk, plain) = on_s3(262_144).await;
    server.fault_times(Fault::Flipped, 1);
    assert_eq!(stack.get(chunk).await.unwrap(), plain);
    assert_eq!((server.requests(), stack.inner().spoilt()), (2, 1));
}

#[tokio::test]
async fn c1_damaged_chunks_are_never_answered() {
    let damages: [(&str, fn(&mut Vec<u8>)); 7] = [
        ("a bit", |bytes| bytes[1000] ^= 1),
        ("the header", |bytes| bytes[0] = 0),
        ("cut", |bytes| bytes.truncate(1000)),
        ("longer", |bytes| bytes.extend_from_slice(b"more")),
        ("empty", Vec::clear),
        ("another chunk", |bytes| *bytes = speedy::chunk::codec::encode(&[7; 262_144]).to_vec()),
        ("huge", |bytes| bytes.resize(8 << 20, 0)),
    ];
    for (name, damage) in damages {
        let (server, stack, chunk, plain) = on_s3(262_144).await;
        server.spoil(&chunk.id.to_string(), damage);
        let error = stack.get(chunk).await.unwrap_err();
        assert!(matches!(&error, ChunkError::Corrupt { id, .. } if *id == chunk.id), "{name}: {error}");
        assert_eq!(server.requests(), 2, "{name}");
        // Putting it again heals it.
        stack.put(chunk.id, plain.clone()).await.unwrap();
        assert_eq!(stack.get(chunk).await.unwrap(), plain);
    }
}

#[tokio::test]
async fn a_lost_chunk_and_a_lost_store_are_told_apart() {
    let (server, stack, chunk, _) = on_s3(4096).await;
    server.fault(Fault::Status(403, "AccessDenied"));
    let error = stack.get(chunk).await.unwrap_err();
    assert!(matches!(error, ChunkError::Store { source: ObjectError::Denied(_), .. }), "{error}");
    server.fault(Fault::None);
    server.lose(&chunk.id.to_string());
    assert!(matches!(stack.get(chunk).await, Err(ChunkError::Missing { .. })));
    server.fault(Fault::Slow(Duration::from_secs(5)));
    let error = stack.get(chunk).await.unwrap_err();
    assert!(matches!(error, ChunkError::Store { source: ObjectError::Unreachable(_), .. }), "{error}");
    assert!(error.to_string().contains(&chunk.id.to_string()), "{error}");
    assert!(matches!(stack.list(0).await, Err(ChunkError::List { .. })));
}

#[tokio::test]
async fn what_is_not_the_chunk_is_not_stored() {
    let (server, stack, chunk, plain) = on_s3(8192).await;
    let before = server.keys();
    for wrong in [plain.slice(..4096), Bytes::new(), Bytes::from(vec![0; 8192])] {
        assert!(matches!(stack.put(chunk.id, wrong).await, Err(ChunkError::Mismatch { .. })));
    }
    for length in [1, 4095, 4097, (1 << 20) + 4096] {
        let odd = Bytes::from(vec![1; length]);
        assert!(
            matches!(stack.put(ChunkId::of(&odd), odd).await, Err(ChunkError::Mismatch { .. })),
            "{length}"
        );
    }
    assert_eq!(server.keys(), before);
}

const OLD: Duration = Duration::from_secs(30 * 24 * 3600);

/// On S3 there is no other way to make an object young than to write it again.
#[tokio::test]
async fn c3_renewed_on_s3_is_young() {
    let (server, stack, chunk, plain) = on_s3(262_144).await;
    stack.renew(chunk.id).await.unwrap();
    assert_eq!(server.requests(), 1, "it is young: nothing to do");
    server.age(OLD);
    let modified = |listed: Vec<speedy::chunk::store::Stored>| listed[0].modified;
    let before = modified(stack.list(chunk.id.as_bytes()[0]).await.unwrap());
    stack.renew(chunk.id).await.unwrap();
    let after = modified(stack.list(chunk.id.as_bytes()[0]).await.unwrap());
    assert!(after - before >= 30 * 24 * 3600 - 5);
    assert_eq!(stack.delete(chunk.id, after - 60).await.unwrap(), Deletion::Young);
    assert_eq!(stack.get(chunk).await.unwrap(), plain);
}

/// A damaged chunk must not be made young, nor a sound one be overwritten by what the wire made of it.
#[tokio::test]
async fn renewing_looks_at_what_it_writes() {
    let (server, stack, chunk, plain) = on_s3(262_144).await;
    server.age(OLD);
    server.fault_times(Fault::None, 1);
    server.spoil(&chunk.id.to_string(), |bytes| bytes[5000] ^= 1);
    server.requests();
    assert!(matches!(stack.renew(chunk.id).await, Err(ChunkError::Corrupt { .. })));
    assert_eq!(server.requests(), 2, "HEAD and GET, no PUT");
    server.lose(&chunk.id.to_string());
    assert!(matches!(stack.renew(chunk.id).await, Err(ChunkError::Missing { .. })));
    stack.put(chunk.id, plain).await.unwrap();
    stack.renew(chunk.id).await.unwrap();
}

#[tokio::test]
async fn c3_renewed_in_a_directory_is_young() {
    let dir = tempfile::tempdir().unwrap();
    let remote = Remote::new(directory(dir.path()));
    let (chunk, plain) = chunk(4, 8192);
    remote.put(chunk.id, plain.clone()).await.unwrap();
    let file = std::fs::File::open(dir.path().join(layout::chunk(chunk.id.as_bytes()))).unwrap();
    file.set_modified(SystemTime::now() - OLD).unwrap();
    remote.renew(chunk.id).await.unwrap();
    assert!(file.metadata().unwrap().modified().unwrap().elapsed().unwrap() < RENEWED);
    assert_eq!(remote.get(chunk).await.unwrap(), plain);
}

#[tokio::test]
async fn a_listing_shows_chunks_only() {
    let dir = tempfile::tempdir().unwrap();
    let remote = Remote::new(directory(dir.path()));
    let (chunk, plain) = chunk(5, 8192);
    remote.put(chunk.id, plain).await.unwrap();
    let own = dir.path().join(layout::chunk(chunk.id.as_bytes()));
    for other in ["README", "ab", "0000#1"] {
        std::fs::write(own.with_file_name(other), "x").unwrap();
    }
    // A chunk under the wrong byte is not where anybody would look for it.
    std::fs::write(own.with_file_name(ChunkId::of(b"z").to_string()), "x").unwrap();
    let listed = remote.list(chunk.id.as_bytes()[0]).await.unwrap();
    assert_eq!(listed.iter().map(|stored| stored.id).collect::<Vec<_>>(), [chunk.id]);
}

/// Counts what it is asked for, and answers when it is let.
#[derive(Debug)]
struct Gated {
    inner: Memory,
    asked: AtomicU64,
    gate: Semaphore,
}

impl Gated {
    fn new() -> Gated {
        Gated { inner: Memory::default(), asked: AtomicU64::new(0), gate: Semaphore::new(0) }
    }
}

#[async_trait]
impl ChunkStore for Gated {
    async fn get(&self, chunk: ChunkRef) -> Result<Bytes, ChunkError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.gate.acquire().await.unwrap().forget();
        self.inner.get(chunk).await
    }

    async fn contains(&self, id: ChunkId) -> Result<bool, ChunkError> {
        self.inner.contains(id).await
    }
}

async fn gated() -> (Merged<Gated>, ChunkRef, Bytes) {
    let (chunk, plain) = chunk(1, 8192);
    let merged = Merged::new(Gated::new());
    merged.inner().inner.put(chunk.id, plain.clone()).await.unwrap();
    (merged, chunk, plain)
}

/// Polls once: as far as it goes without waiting.
fn poke<T>(future: &mut (impl Future<Output = T> + Unpin)) -> Option<T> {
    future.now_or_never()
}

#[tokio::test]
async fn many_who_want_one_chunk_make_one_request() {
    let (merged, chunk, plain) = gated().await;
    let mut askers: Vec<_> = (0..100).map(|_| merged.get(chunk)).collect();
    for asker in &mut askers {
        assert!(poke(asker).is_none());
    }
    assert_eq!(merged.under_way(), 1);
    merged.inner().gate.add_permits(1);
    for answer in futures::future::join_all(askers).await {
        assert_eq!(answer.unwrap(), plain);
    }
    assert_eq!((merged.inner().asked.load(Ordering::Relaxed), merged.under_way()), (1, 0));
    // Nothing is kept: a later one asks again.
    merged.inner().gate.add_permits(1);
    merged.get(chunk).await.unwrap();
    assert_eq!(merged.inner().asked.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn who_stops_waiting_takes_nothing_from_the_others() {
    let (merged, chunk, plain) = gated().await;
    let (mut first, mut second) = (merged.get(chunk), merged.get(chunk));
    assert!(poke(&mut first).is_none() && poke(&mut second).is_none());
    drop(first);
    merged.inner().gate.add_permits(1);
    assert_eq!(second.await.unwrap(), plain);
    assert_eq!(merged.inner().asked.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn when_nobody_waits_the_request_ends() {
    let (merged, chunk, plain) = gated().await;
    let mut only = merged.get(chunk);
    assert!(poke(&mut only).is_none());
    drop(only);
    assert_eq!(merged.under_way(), 0);
    let mut next = merged.get(chunk);
    assert!(poke(&mut next).is_none());
    merged.inner().gate.add_permits(1);
    assert_eq!(next.await.unwrap(), plain);
    assert_eq!(merged.inner().asked.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_wrong_length_is_its_askers_own_problem() {
    let (merged, chunk, plain) = gated().await;
    merged.inner().gate.add_permits(2);
    let wrong = ChunkRef { length: chunk.length + BLOCK, ..chunk };
    let (wrong, right) = futures::join!(merged.get(wrong), merged.get(chunk));
    assert!(matches!(wrong, Err(ChunkError::Corrupt { .. })));
    assert_eq!(right.unwrap(), plain);
}

#[tokio::test]
async fn verified_asks_twice_and_no_more() {
    let verified = Verified::new(Memory::default());
    let (chunk, plain) = chunk(2, 8192);
    verified.put(chunk.id, plain).await.unwrap();
    let memory = Arc::new(Memory::default());
    memory.put(chunk.id, Bytes::from(vec![0; 8192])).await.unwrap();
    let verified = Verified::new(Arc::clone(&memory));
    assert!(matches!(verified.get(chunk).await, Err(ChunkError::Corrupt { .. })));
    assert_eq!(verified.spoilt(), 1);
}
