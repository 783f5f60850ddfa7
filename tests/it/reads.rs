//! Layer images that are not wholly here: any mix of reads gives the layer's bytes, whatever store, disk and process do.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures::future::join_all;
use proptest::prelude::*;
use speedy::layer::cold::Cold as Layer;
use speedy::layer::lazy::session::Source as _;

use crate::cold::{Cold, noise};
use crate::support::runtime;

fn joined(pieces: &[Bytes]) -> Vec<u8> {
    pieces.concat()
}

fn at<'a>(bytes: &'a [u8], range: &Range<u64>) -> &'a [u8] {
    &bytes[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]
}

/// Some chunks, holes between them, and files that are shorter than a chunk.
async fn some_layer(root: &std::path::Path) -> Cold {
    let mut large = noise(3, 5 << 20);
    large[2 << 20..3 << 20].fill(0);
    let small: Vec<Vec<u8>> =
        (0..40).map(|seed| noise(seed + 10, 5000 + 700 * usize::try_from(seed).unwrap())).collect();
    let names: Vec<String> = (0..small.len()).map(|n| format!("small/{n}")).collect();
    let mut files = vec![("large", &large[..])];
    files.extend(names.iter().zip(&small).map(|(name, content)| (&name[..], &content[..])));
    Cold::new(root, &files).await
}

/// Where some bytes of files are.
fn data(node: &Cold) -> Range<u64> {
    let (start, _) = node.index.chunk(2);
    start..start + 4096
}

async fn read(layer: &Arc<Layer>, range: Range<u64>) -> Vec<u8> {
    match layer.read_now(range.clone()) {
        Some(pieces) => joined(&pieces),
        None => joined(&layer.read(range).await.unwrap()),
    }
}

#[test]
fn reads_of_every_kind_give_the_layers_bytes() {
    let ranges = proptest::collection::vec((0_u64..1800, 1_u64..300), 1..24);
    proptest!(ProptestConfig::with_cases(24), |(ranges in ranges, at_once in any::<bool>(), again in any::<bool>())| {
        let dir = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let node = some_layer(dir.path()).await;
            node.store.delay.store(1, Ordering::SeqCst);
            let mut layer = node.begin(7).await;
            let size = node.bytes.len() as u64;
            let ranges: Vec<Range<u64>> = ranges.iter().map(|(start, length)| {
                let start = (start * 4096).min(size - 4096);
                start..(start + length * 4096).min(size)
            }).collect();
            let (first, second) = ranges.split_at(ranges.len() / 2);
            for part in [first, second] {
                match at_once {
                    true => for (range, bytes) in part.iter().zip(join_all(part.iter().map(|range| read(&layer, range.clone()))).await) {
                        prop_assert!(bytes == at(&node.bytes, range), "{range:?}");
                    },
                    false => for range in part {
                        let bytes = read(&layer, range.clone()).await;
                        prop_assert!(bytes == at(&node.bytes, range), "{range:?}");
                    },
                }
                if again {
                    // Another process, by what is on the disk.
                    let index = Arc::clone(&node.index);
                    layer = node.again().open(7, || Some(index)).unwrap();
                }
            }
            Ok(())
        })?;
    });
}

#[test]
fn eight_readers_have_eight_fetches_under_way() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layer = node.begin(7).await;
        node.store.most_under_way.store(0, Ordering::SeqCst);
        node.store.delay.store(50, Ordering::SeqCst);
        let chunks = node.index.chunks().len();
        let starts: Vec<u64> = (0..8).map(|n| node.index.chunk(1 + n * (chunks - 4) / 8).0).collect();
        join_all(starts.iter().map(|start| read(&layer, *start..start + 4096))).await;
        assert!(node.store.most_under_way.load(Ordering::SeqCst) >= 6);
    });
}

#[test]
fn a_chunk_is_fetched_once_however_many_want_it() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layer = node.begin(7).await;
        node.store.delay.store(20, Ordering::SeqCst);
        let before = node.store.gets.load(Ordering::SeqCst);
        let (start, chunk) = node.index.chunk(node.index.chunks().len() - 3);
        let range = start..start + u64::from(chunk.length).min(4096);
        let all = join_all((0..50).map(|_| read(&layer, range.clone()))).await;
        assert!(all.iter().all(|bytes| bytes == at(&node.bytes, &range)));
        // What comes after it is fetched ahead, if anything is.
        let ahead = node.index.chunks().len() - (node.index.chunks().len() - 3);
        assert!(node.store.gets.load(Ordering::SeqCst) - before <= ahead);
    });
}

#[test]
fn a_store_that_lies_or_fails_is_asked_again() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layer = node.begin(7).await;
        node.store.lies.store(2, Ordering::SeqCst);
        node.store.failures.store(2, Ordering::SeqCst);
        let range = data(&node);
        assert!(read(&layer, range.clone()).await == at(&node.bytes, &range));
    });
}

#[test]
fn a_filled_layer_is_complete_and_asks_nobody() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layer = node.begin(7).await;
        assert!(!layer.is_complete());
        layer.fill().await.unwrap();
        assert!(layer.is_complete());
        layer.verify().await.unwrap();
        node.files.complete(7, layer.file()).unwrap();
        node.files.remove_map(7).unwrap();
        assert!(std::fs::read(node.files.image(7)).unwrap() == node.bytes);
        let gets = node.store.gets.load(Ordering::SeqCst);
        let index = Arc::clone(&node.index);
        let later = node.again().open(7, || Some(index)).unwrap();
        assert!(later.is_complete());
        assert!(read(&later, 0..node.bytes.len() as u64).await == node.bytes);
        assert_eq!(node.store.gets.load(Ordering::SeqCst), gets);
    });
}

#[test]
fn what_the_disk_changed_is_found_before_it_is_used_and_fetched_again() {
    use std::os::unix::fs::FileExt;
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layer = node.begin(7).await;
        layer.fill().await.unwrap();
        layer.file().write_all_at(&[0xff; 8], node.index.chunk(2).0 + 4096).unwrap();
        layer.file().sync_all().unwrap();
        layer.verify().await.unwrap_err();
        assert!(!layer.is_complete());
        layer.fill().await.unwrap();
        layer.verify().await.unwrap();
    });
}

/// A file whose map is lost, as after a reboot: what is in it is hashed, not believed, and not fetched again.
#[test]
fn without_a_map_the_file_is_hashed() {
    use std::os::unix::fs::FileExt;
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layer = node.begin(7).await;
        layer.fill().await.unwrap();
        layer.file().write_all_at(&[0xff; 8], node.index.chunk(2).0 + 4096).unwrap();
        node.files.remove_map(7).unwrap();
        let gets = node.store.gets.load(Ordering::SeqCst);
        let index = Arc::clone(&node.index);
        let later = node.again().open(7, || Some(index)).unwrap();
        assert!(!later.is_complete());
        assert!(read(&later, 0..node.bytes.len() as u64).await == node.bytes);
        assert_eq!(node.store.gets.load(Ordering::SeqCst), gets + 1, "only the damaged chunk is fetched");
    });
}

#[test]
fn what_is_not_there_any_more_is_an_error_in_the_end() {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap().block_on(
        async {
            let dir = tempfile::tempdir().unwrap();
            let node = some_layer(dir.path()).await;
            let layer = node.begin(7).await;
            node.store.failures.store(usize::MAX, Ordering::SeqCst);
            let error = layer.read(data(&node)).await.unwrap_err().to_string();
            assert!(error.contains("it was told to fail"), "{error}");
        },
    );
}

/// What one node saw of a start, another one has fetched before anybody reads, and nothing else of the layer until that is over.
#[test]
fn what_was_read_first_elsewhere_is_fetched_first() {
    runtime().block_on(async {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let node = some_layer(one.path()).await;
        node.begin(7).await;
        let last = node.index.chunks().len() - node.index.metadata_chunks().count();
        let wanted = [last, 9, 3, 10];
        let watch = node.layers.touches().watch(vec![7], 100);
        for at in [0, last, last, 9, 3, 10, 9] {
            let (start, chunk) = node.index.chunk(at);
            let length = chunk.length;
            if node.layers.read_now(7, start, length).is_none() {
                node.layers.read(7, start, length).await.unwrap();
            }
        }
        let order = watch.order();
        assert_eq!(order, wanted.map(|at| (7, at)), "the superblock is here before anybody reads");
        drop(watch);

        let node = some_layer(other.path()).await;
        let layer = node.begin(5).await;
        let held = node.layers.hold(vec![5]);
        node.store.asked.lock().unwrap().clear();
        let prefetching = async {
            for (_, at) in &order {
                assert!(layer.prefetch(*at).await.unwrap() > 0);
            }
            let asked = node.store.asked.lock().unwrap().clone();
            let ids: Vec<_> = wanted.iter().map(|at| node.index.chunk(*at).1.id).collect();
            assert_eq!(asked, ids, "a fill that is held takes no place on the link");
            for at in wanted {
                let (start, chunk) = node.index.chunk(at);
                let range = start..start + u64::from(chunk.length);
                assert!(
                    joined(&layer.read_now(range.clone()).unwrap()) == crate::reads::at(&node.bytes, &range)
                );
                assert_eq!(layer.prefetch(at).await.unwrap(), 0);
            }
            drop(held);
        };
        let (filled, ()) = futures::join!(layer.fill(), prefetching);
        filled.unwrap();
        assert!(layer.is_complete());
    });
}
