//! What every store of chunks, and every wrapper around one, must do.

use bytes::Bytes;
use speedy::chunk::store::{ChunkPrune, Deletion};
use speedy::chunk::{ChunkError, ChunkId, ChunkRef, MAX_CHUNK};

const FAR_FUTURE: i64 = i64::MAX;

/// All of it, on an empty store.
pub(crate) async fn run(store: &dyn ChunkPrune) {
    what_is_put_can_be_had(store).await;
    a_missing_chunk_is_missing(store).await;
    another_length_is_never_answered(store).await;
    putting_twice_is_harmless(store).await;
    renewing_needs_the_chunk(store).await;
    listing_shows_what_is_there(store).await;
    c3_what_is_young_stays(store).await;
    many_at_once(store).await;
}

/// Bytes of which zstd makes nothing, or a lot.
fn bytes(seed: u64, length: usize) -> Bytes {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if seed.is_multiple_of(2) { b"ab"[usize::from(state >> 63 == 0)] } else { state.to_le_bytes()[7] }
    };
    (0..length).map(|_| next()).collect()
}

pub(crate) fn chunk(seed: u64, length: usize) -> (ChunkRef, Bytes) {
    let plain = bytes(seed, length);
    (ChunkRef { id: ChunkId::of(&plain), length: u32::try_from(length).unwrap() }, plain)
}

async fn what_is_put_can_be_had(store: &dyn ChunkPrune) {
    for (seed, length) in
        [(1, 4096), (2, 4096), (3, 262_144), (4, 262_144), (5, MAX_CHUNK as usize), (6, MAX_CHUNK as usize)]
    {
        let (chunk, plain) = chunk(seed, length);
        assert!(!store.contains(chunk.id).await.unwrap());
        let size = store.put(chunk.id, plain.clone()).await.unwrap();
        assert!(size > 0 && size <= length as u64 + 64, "{size}");
        assert!(store.contains(chunk.id).await.unwrap());
        assert_eq!(store.get(chunk).await.unwrap(), plain);
    }
}

async fn a_missing_chunk_is_missing(store: &dyn ChunkPrune) {
    let (chunk, _) = chunk(100, 4096);
    assert!(matches!(store.get(chunk).await, Err(ChunkError::Missing { id }) if id == chunk.id));
    assert!(!store.contains(chunk.id).await.unwrap());
}

/// The length comes from an index that somebody wrote.
async fn another_length_is_never_answered(store: &dyn ChunkPrune) {
    let (chunk, _) = chunk(3, 262_144);
    for length in [0, 4096, 262_143, 262_145, MAX_CHUNK, u32::MAX] {
        let answer = store.get(ChunkRef { length, ..chunk }).await;
        assert!(matches!(answer, Err(ChunkError::Corrupt { .. })), "{length}: {answer:?}");
    }
}

async fn putting_twice_is_harmless(store: &dyn ChunkPrune) {
    let (chunk, plain) = chunk(7, 8192);
    let first = store.put(chunk.id, plain.clone()).await.unwrap();
    assert_eq!(store.put(chunk.id, plain.clone()).await.unwrap(), first);
    assert_eq!(store.get(chunk).await.unwrap(), plain);
}

async fn renewing_needs_the_chunk(store: &dyn ChunkPrune) {
    let (chunk, plain) = chunk(8, 8192);
    assert!(matches!(store.renew(chunk.id).await, Err(ChunkError::Missing { .. })));
    store.put(chunk.id, plain.clone()).await.unwrap();
    store.renew(chunk.id).await.unwrap();
    assert_eq!(store.get(chunk).await.unwrap(), plain);
}

async fn listing_shows_what_is_there(store: &dyn ChunkPrune) {
    let (chunk, plain) = chunk(9, 12_288);
    let size = store.put(chunk.id, plain).await.unwrap();
    let first = chunk.id.as_bytes()[0];
    let listed = store.list(first).await.unwrap();
    assert!(listed.iter().all(|stored| stored.id.as_bytes()[0] == first));
    let own = listed.iter().find(|stored| stored.id == chunk.id).unwrap();
    assert_eq!(own.size, size);
    assert!(own.modified > 1_600_000_000, "{}", own.modified);
    assert!(store.list(first.wrapping_add(1)).await.unwrap().iter().all(|stored| stored.id != chunk.id));
}

async fn c3_what_is_young_stays(store: &dyn ChunkPrune) {
    let (chunk, plain) = chunk(10, 4096);
    assert_eq!(store.delete(chunk.id, FAR_FUTURE).await.unwrap(), Deletion::Absent);
    store.put(chunk.id, plain).await.unwrap();
    assert_eq!(store.delete(chunk.id, 0).await.unwrap(), Deletion::Young);
    assert!(store.contains(chunk.id).await.unwrap());
    assert_eq!(store.delete(chunk.id, FAR_FUTURE).await.unwrap(), Deletion::Deleted);
    assert!(!store.contains(chunk.id).await.unwrap());
    assert_eq!(store.delete(chunk.id, FAR_FUTURE).await.unwrap(), Deletion::Absent);
}

async fn many_at_once(store: &dyn ChunkPrune) {
    let chunks: Vec<(ChunkRef, Bytes)> =
        (0..40).map(|n| chunk(1000 + n, 4096 * (1 + usize::try_from(n % 5).unwrap()))).collect();
    let puts = chunks.iter().map(|(chunk, plain)| store.put(chunk.id, plain.clone()));
    assert!(futures::future::join_all(puts).await.iter().all(Result::is_ok));
    // Each is wanted by several.
    let gets = chunks.iter().chain(&chunks).chain(&chunks).map(|(chunk, _)| store.get(*chunk));
    let had = futures::future::join_all(gets).await;
    for (answer, (_, plain)) in had.iter().zip(chunks.iter().cycle()) {
        assert_eq!(answer.as_ref().unwrap(), plain);
    }
}
